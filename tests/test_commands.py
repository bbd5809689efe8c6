"""Commands that are printed work when they are pasted."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from pipeline.commands import command, data_root, from_anywhere
from pipeline.config import compose, validate
from pipeline.errors import PipelineError
from pipeline.evaluation.protocols import EvaluateConfig
from pipeline.pages.report import ReportConfig
from pipeline.registry.promotion import PromoteConfig
from pipeline.registry.tracking_config import naming, registering
from pipeline.training.prepare import prepare
from pipeline.training.runs import Run

ROOT = Path(__file__).resolve().parent.parent
ODD = "/my runs/it's (1), new"


def pasted(text: str) -> dict:
    """The configuration that a shell would give the job."""
    python, module, job, *arguments = shlex.split(text)
    assert (python, module) == ("python", "-m")
    return compose(job.removeprefix("jobs."), arguments)


def test_a_value_is_what_it_was_whatever_is_in_it() -> None:
    assert pasted(Run("a", ODD, {}, {}, {}).resume)["resume"] == ODD
    found = pasted(command("tune", "resume=a", f"storage={ODD}"))
    assert (found["resume"], found["storage"]) == ("a", ODD)


def test_what_is_owed_to_mlflow_is_delivered_to_the_store_it_is_owed_to() -> None:
    for given in (
        compose("train", ["tracking=server", "tracking.uri=http://mlflow:5000"])["tracking"],
        compose("train", [f"tracking.uri=sqlite:///{ODD}/mlflow.db", f"tracking.artifacts={ODD}",
                          "tracking.experiment=my things"])["tracking"],
    ):  # fmt: skip
        found = pasted(registering(ODD, given))
        assert found["run"] == ODD
        assert {k: v for k, v in found["tracking"].items() if given[k] is not None} == {
            k: v for k, v in given.items() if v is not None
        }


def test_no_command_is_put_together_by_hand() -> None:
    """Where a value stands in it; ``command`` quotes it."""
    by_hand = re.compile(r"python -m jobs\.\w+[^\n\"']*=\{")
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in (ROOT / "pipeline").rglob("*.py")
        for line in path.read_text().splitlines()
        if by_hand.search(line) and "shlex" not in line
    ]
    assert not found, found


@pytest.mark.parametrize("tracking", [{}, {"uri": "sqlite:////x/mlflow.db"}])
def test_part_of_a_tracking_is_enough(tracking: dict) -> None:
    assert pasted(registering("/runs/a", tracking))["run"] == "/runs/a"


def test_a_store_named_by_a_relative_path_is_the_same_in_every_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIPELINE_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    usual = compose("train")["tracking"]
    assert usual["uri"].startswith("sqlite:///./") and naming(usual) == naming(from_anywhere(usual))
    monkeypatch.setenv("PIPELINE_HOME", f"{tmp_path}/home")
    at_home = compose("train")["tracking"]
    said_at_home = registering("/runs/a", at_home)
    monkeypatch.delenv("PIPELINE_HOME")  # another shell
    other = compose("train", ["tracking.uri=sqlite:///other/mlflow.db"])["tracking"]
    said = registering("/runs/a", other, "my name")
    monkeypatch.chdir("/")
    assert pasted(said_at_home)["tracking"] == at_home
    found = pasted(said)
    assert found["tracking"]["uri"] == f"sqlite:///{tmp_path}/other/mlflow.db" and found["register_as"] == "my name"
    assert from_anywhere({"uri": "http://a", "artifacts": "mlflow-artifacts:/x"}) == {
        "uri": "http://a", "artifacts": "mlflow-artifacts:/x",
    }  # fmt: skip


def test_where_datasets_are_is_said_where_they_are_not_as_usual(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPELINE_HOME", str(tmp_path))
    assert data_root(f"{tmp_path}/datasets") == []
    assert pasted(command("train", *data_root(ODD)))["data"]["root"] == ODD
    monkeypatch.delenv("PIPELINE_HOME")
    monkeypatch.chdir("/")
    given = ["data=features", "data.name=x", "backbone=features", f"data.root={tmp_path}/my sets"]
    with pytest.raises(PipelineError, match="no features at") as refused:
        prepare(compose("train", given))
    assert shlex.split(str(refused.value))[-1] == f"data.root={tmp_path}/my sets"


def test_a_dataset_s_folder_is_the_same_for_workers_whose_working_directory_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a cluster that is joined have that of ``ray start``: there may be another dataset at a relative path."""
    monkeypatch.chdir(tmp_path)
    jobs = {"evaluate": EvaluateConfig, "promote": PromoteConfig, "report": ReportConfig}
    for place, seen in (("sets/a", f"{tmp_path}/sets/a"), ("file:///sets/a", "/sets/a"), ("s3://b/a", "s3://b/a")):
        for job, schema in jobs.items():
            given = ["name=a"] if job == "promote" else []
            assert validate(schema, compose(job, [*given, f"dataset={place}"])).dataset == seen
        assert validate(ReportConfig, compose("report", [f"datasets=['{place}']"])).datasets == [seen]
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert validate(EvaluateConfig, compose("evaluate", ["dataset=sets/a"])).dataset == "sets/a", "the job's own files"
