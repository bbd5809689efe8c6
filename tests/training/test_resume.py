"""Going on with a run, and beginning with another's weights: what may change, and what is refused before Ray starts."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import store
from pipeline.config import compose, validate
from pipeline.errors import PipelineError
from pipeline.registry.tracker import Tracker
from pipeline.training.checkpoint import save_checkpoint
from pipeline.training.config import TrainConfig
from pipeline.training.learner import Learner
from pipeline.training.loop import should_stop
from pipeline.training.prepare import prepare
from pipeline.training.runs import RUN_FILE, Run, read_run, write_run


@pytest.fixture
def begun(small_run) -> Run:
    """A run of 12 steps that was interrupted after its first checkpoint."""
    config, _, run = prepare(small_run("prototypical", "name=begun", "schedule=cosine"))
    write_run(run)
    learner = Learner(config, run.spec)
    learner.step = 4
    save_checkpoint(store.join(run.uri, "step_00000004"), learner.checkpoint(run.config, run.dataset))
    return run


def resumed(run: Run, *overrides: str):
    return prepare(compose("train", [f"resume={run.name}", f"storage={Path(run.uri).parent}", *overrides]))


def test_a_run_may_become_longer(begun: Run, capsys) -> None:
    config, _, run = resumed(begun, "steps=20")
    said = capsys.readouterr().out
    assert "20 steps instead of 12" in said and "schedule cosine over 20 steps" in said
    write_run(run)
    assert config.steps == run.config["steps"] == 20
    assert resumed(begun)[0].steps == 20, "the run's folder says so from here on"
    kept = json.loads(Path(run.uri, RUN_FILE).read_text())
    assert kept["spec"] == begun.spec and kept["arguments"] == ["steps=20"], "the command that a table shows"


@pytest.mark.parametrize("steps", [1, 3])
def test_but_no_shorter_than_it_is(begun: Run, steps: int) -> None:
    with pytest.raises(PipelineError, match=f"steps={steps}: run begun has 4 steps already"):
        resumed(begun, f"steps={steps}")


def test_a_run_that_its_patience_ended_may_become_longer(small_run, capsys) -> None:
    """More steps are more steps: the patience begins anew, and ends it again after as many rounds in vain."""
    config, _, run = prepare(small_run("prototypical", "name=begun", "validation.patience=2", "steps=40"))
    write_run(run)
    learner = Learner(config, run.spec)
    for step, accuracy in ((6, 0.4), (12, 0.5), (18, 0.5), (24, 0.4)):
        learner.step = step
        learner.record({"val/accuracy": accuracy})
    assert should_stop(learner.history, 2)
    save_checkpoint(store.join(run.uri, "step_00000024"), learner.checkpoint(run.config, run.dataset))
    assert resumed(run)[0].validation.patience == 2, "gone on with as it is, it has ended"
    config, _, longer = resumed(run, "steps=80")
    assert "validation.patience=2 had ended it; 2 more rounds without a better" in capsys.readouterr().out
    history, patience = learner.history, config.validation.patience
    vain = [{"step": 30, "val/accuracy": 0.5}, {"step": 36, "val/accuracy": 0.3}]
    assert [should_stop(history + vain[:rounds], patience) for rounds in range(3)] == [False, False, True]
    write_run(longer)
    assert resumed(run)[0].validation.patience == patience, "the run's folder says so from here on"


def test_a_copy_goes_on_under_its_name_alone(begun: Run, tmp_path: Path) -> None:
    """Under another it would begin anew, in a folder within it."""
    copy = shutil.copytree(begun.uri, f"{Path(begun.uri).parent}/copy")
    with pytest.raises(PipelineError, match="resume=.*/copy: this is a copy of run begun, or it was renamed: call"):
        prepare(compose("train", [f"resume={copy}"]))
    moved = shutil.move(copy, f"{tmp_path}/others/begun")
    config, _, run = prepare(compose("train", [f"resume={moved}"]))
    assert run.uri == moved and config.storage == f"{tmp_path}/others"
    worker = validate(TrainConfig, run.config)  # as it reads it, and names the run in what it says
    assert worker.storage == read_run(moved).config["storage"] == f"{tmp_path}/others"
    owed = Tracker(run.name, {"uri": "sqlite:////proc/nope/x.db", "timeout": 1}, run.config, run.dataset)
    owed.log(1, {"train/loss": 1.0})
    assert f"jobs.register run={moved} " in owed.close().message


def test_a_runs_address_may_end_in_a_slash(begun: Run, moto_bucket: str) -> None:
    write_run(replace(begun, uri=f"{moto_bucket}/slash/begun"))
    config, _, run = prepare(compose("train", [f"resume={moto_bucket}/slash/begun/"]))
    assert run.uri == f"{moto_bucket}/slash/begun" and config.storage == f"{moto_bucket}/slash"


def test_a_dataset_may_have_moved(begun: Run, tmp_path: Path) -> None:
    root = Path(begun.config["data"]["root"])
    (tmp_path / "elsewhere").symlink_to(root)
    assert resumed(begun, f"data.root={tmp_path}/elsewhere")[0].dataset_uri.startswith(f"{tmp_path}/elsewhere/")
    with pytest.raises(PipelineError, match="train.shot: a resumed run keeps"):
        resumed(begun, "train.shot=2")


def test_a_submitted_job_resumes_by_the_folder_alone(begun: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its working directory is thrown away: relative defaults that a resumed run does not use are no matter."""
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert resumed(begun)[2].uri == begun.uri
    *_, argument = shlex.split(begun.resume)
    assert prepare(compose("train", [argument]))[2].uri == begun.uri
    with pytest.raises(PipelineError, match="storage=.*relative path"):
        prepare(compose("train", ["resume=begun"]))


def test_workers_that_cannot_share_a_step_are_refused(begun: Run) -> None:
    """As a new run refuses them, and not in the workers."""
    assert resumed(begun, "cluster.workers=4")[0].cluster.workers == 4
    with pytest.raises(PipelineError, match=r"train.meta_batch_size=4 cannot be shared .* by cluster.workers=3"):
        resumed(begun, "cluster.workers=3")


def test_weights_to_begin_with(begun: Run, small_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = f"{begun.uri}/step_00000004"
    monkeypatch.chdir(Path(begun.uri).parent)
    for given in (checkpoint, begun.uri, "begun", "begun/step_00000004"):
        assert prepare(small_run("prototypical", f"initial={given}"))[0].initial == checkpoint
    with pytest.raises(PipelineError, match="initial=nowhere: neither a checkpoint's folder, nor a run's"):
        prepare(small_run("prototypical", "initial=nowhere"))
    wanted = "train it first: python -m jobs.train recipe=omniglot_classical name=omniglot_classical$"
    with pytest.raises(PipelineError, match=wanted):
        prepare(small_run("prototypical", "initial=omniglot_classical"))


def test_how_to_go_on_again_says_what_the_runs_folder_does_not_know(begun: Run, tmp_path: Path) -> None:
    (tmp_path / "my sets").symlink_to(begun.config["data"]["root"])
    given = [
        f"data.root={tmp_path}/my sets", "cluster.workers=1", "tracking.uri=sqlite:///other.db",
        "tracking.experiment=it's mine", "cluster.restarts=3",
    ]  # fmt: skip
    config, _, run = resumed(begun, *given)
    _, _, _, *arguments = shlex.split(run.resume)
    assert not [argument for argument in arguments if "restarts" in argument], "that is as it was"
    again, _, same = prepare(compose("train", arguments))
    assert again == config and same.resume == run.resume
    assert config.tracking["uri"] == f"sqlite:///{Path.cwd()}/other.db"
    assert begun.resume == resumed(begun)[2].resume == f"python -m jobs.train resume={begun.uri}"


def test_a_run_knows_its_store_in_every_folder(small_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["tracking=embedded", "tracking.uri=sqlite:///./mlflow.db", "tracking.artifacts=files"]
    _, _, run = prepare(small_run("prototypical", *given))
    assert run.config["tracking"]["uri"] == f"sqlite:///{tmp_path}/mlflow.db"
    assert run.config["tracking"]["artifacts"] == f"{tmp_path}/files"
