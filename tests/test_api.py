"""The pipeline in Python: arguments reach the jobs as they were given, objects come back, and it works twice."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

import pipeline
from pipeline import api
from pipeline.config import compose, literal, to_yaml
from pipeline.data.dataset import Dataset
from pipeline.demo import DemoConfig, export_examples
from pipeline.errors import PipelineError
from pipeline.registry.versions import pull
from pipeline.search.arguments import translate
from pipeline.training import runs

README = Path(__file__).resolve().parents[1] / "README.md"
TINY = {
    "recipe": "demo", "log_every": 2, "backbone.width": 8, "cluster.workers": 1,
    "train": {"way": 5, "query": 3, "meta_batch_size": 1}, "validation": {"every": 4, "episodes": 10, "query": 5},
    "evaluation": {"untrained": False, "episodes": 20, "query": 5, "way": [5], "shot": [1]},
}  # fmt: skip


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = ("ray", "mlflow", "hydra", "torch", "numpy")
    program = f"import sys, pipeline; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_public_names_are_documented() -> None:
    assert pipeline.__all__ == ["evaluate", "ingest", "load", "train", "tune"]
    for name in pipeline.__all__:
        text = getattr(pipeline, name).__doc__
        assert getattr(pipeline, name) is getattr(api, name) and name in dir(pipeline)
        assert all(f"{part}:\n" in text for part in ("Args", "Returns", "Raises"))
    with pytest.raises(AttributeError, match="'trian'"):
        pipeline.trian  # noqa: B018


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)


@given(value=values)
def test_a_value_arrives_as_it_was_given(value: object) -> None:
    """Through Hydra's grammar, whatever the text holds."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    def same(got: object, wanted: object) -> bool:
        if isinstance(wanted, list):
            return isinstance(got, list) and len(got) == len(wanted) and all(map(same, got, wanted))
        text = getattr(got, "text", got)  # Hydra's quoted text
        return type(text) is type(wanted) and text == wanted

    assert same(OverridesParser.create().parse_override(f"key={literal(value)}").value(), value)


@pytest.mark.parametrize(
    "text", ["20241128", "2024_11_28", "/tmp/été", "~/photos", "photo (1).png", "/tmp/a,b", "null", "a=b", '"x"', ""]
)
def test_text_stays_text(text: str) -> None:
    config = api.configuration("ingest", (), {"data": "folder", "data.source.path": text})
    assert config["data"]["source"]["path"] == os.path.expanduser(text)


def test_arguments_come_in_every_form() -> None:
    wanted = compose("train", ["recipe=demo", "train.way=10", "train.query=4", "method.scale=2", "name=x"])
    given = api.configuration(
        "train", ("recipe=demo",), {"train": {"way": 10, "query": 4}, "method.scale": 2, "name": "x"}
    )
    assert OmegaConf.create(given) == OmegaConf.create(wanted)
    wrong = {"stepz": (3, "did you mean 'steps'"), "recipe": ("demoo", "choose one of"), "steps": (object(), "object")}
    for key, (value, said) in wrong.items():
        with pytest.raises(PipelineError, match=said):
            api.configuration("train", (), {key: value})
    with pytest.raises(PipelineError, match="password"):
        api.configuration("train", (), {"tracking.uri": "http://me:secret@host"})


@pytest.mark.parametrize("folder", ["plain", "my runs", "it's", 'a"b', "a\\", "été"])
def test_a_program_names_a_file_of_a_configuration_or_a_campaign_wherever_it_lies(tmp_path: Path, folder: str) -> None:
    """``train(config=campaign.best["config"])``, whose path is absolute."""
    place = tmp_path / folder / "campaign"
    place.mkdir(parents=True)
    stored = place / "best.yaml"
    stored.write_text(to_yaml(compose("train", ["steps=7"])))
    assert api.configuration("train", (), {"config": str(stored)})["steps"] == 7
    (place / "mine.yaml").write_text("# @package _global_\ncampaign: mine\n")
    assert api.configuration("tune", (), {"campaign": place / "mine.yaml"}, translate)["campaign"] == "mine"


def test_a_device_that_is_not_here_is_refused_in_one_line(tmp_path: Path) -> None:
    for device in ["gpu"] if torch.cuda.is_available() else ["gpu", "cuda"]:
        with pytest.raises(PipelineError, match=f"^device={device}: torch cannot use it here; give device=cpu$"):
            api.load(tmp_path, device=device)


def test_a_folder_is_evaluated_that_is_given_as_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict] = []
    monkeypatch.setattr("pipeline.workflow.evaluate_job", lambda config: asked.append(config) or {"results": []})
    pipeline.evaluate(tmp_path / "first", compare=tmp_path / "second")
    assert (asked[0]["run"], asked[0]["compare"]) == (str(tmp_path / "first"), str(tmp_path / "second"))


def test_a_run_is_looked_up_and_published_where_it_was_tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not in the usual store, unless another one is asked for."""
    config = compose("train", ["tracking.experiment=mine", "tracking.uri=http://first"])
    uri = str(tmp_path / "first")
    runs.write_run(runs.Run("first", uri, config, {}, {}))
    run = api.Run("first", uri, "", None, "models:/a/1", "1", "http://server")
    asked: list[dict] = []
    monkeypatch.setattr("pipeline.workflow.evaluate_job", lambda config: asked.append(config) or {"results": []})
    loaded: list[dict] = []
    monkeypatch.setattr(
        "pipeline.registry.classify.load_classifier", lambda model, tracking, device: loaded.append(tracking)
    )
    for call in (pipeline.evaluate, pipeline.load):
        call(run)
        call(run, "tracking.experiment=other", **{"tracking.timeout": 3})
        call(run, "tracking.uri=http://else")
        call(run, tracking="none")
    told = [(found["tracking"]["uri"], found["tracking"]["experiment"]) for found in asked]
    assert told == [("http://server", "mine"), ("http://server", "other"), ("http://else", "few-shot"),
                    (None, "few-shot")]  # fmt: skip
    assert [tracking["uri"] for tracking in loaded] == ["http://server", "http://server", "http://else", None]


def test_a_search_gets_what_it_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict] = []
    found = {
        "campaign": "c", "folder": "f", "statement": "the best is better",
        "trials": [{"number": 0, "values": {"method.scale": 3.0}, "accuracy": 0.5, "status": "finished"}],
        "best": {"values": {"method.scale": 3.0}, "config": "f/best.yaml"},
    }  # fmt: skip
    monkeypatch.setattr("pipeline.search.run.tune", lambda config: asked.append(config) or found)
    campaign = pipeline.tune(
        "campaign=metric_scale", trials=4, base={"data": "glyphs", "steps": 9}, fix={"method": "prototypical"}
    )
    assert asked[0]["trials"] == 4 and asked[0]["fix"] == ["method=prototypical"]
    assert set(asked[0]["base"]) | set(asked[0]["overrides"]) >= {"data=glyphs", "steps=9"}
    assert campaign.trials["method.scale"].tolist() == [3.0] and campaign.best is not None
    assert repr(campaign) == "Campaign('c', 1 trials, best {'method.scale': 3.0})"


@pytest.mark.timeout(600)
def test_a_notebook_from_images_to_answers_and_once_more(
    ray_session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder of the user's own, with everything under PIPELINE_HOME, in one process in which Ray runs already."""
    (tmp_path / "elsewhere" / "jobs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("PIPELINE_HOME", str(tmp_path / "home"))
    dataset = pipeline.ingest(data="glyphs", **{"data.source.classes": 60})
    assert Path(dataset.folder) == tmp_path / "home" / "datasets" / "glyphs" and dataset.images == 1200
    assert set(dataset.classes) == {"train", "val", "test"} and "glyphs" in repr(dataset)
    with pytest.raises(PipelineError, match="overwrite"):
        pipeline.ingest(data="glyphs", **{"data.source.classes": 60})

    first = pipeline.train("name=first", steps=8, **TINY)
    second = pipeline.train("name=second", steps=4, **{**TINY, "method.distance": "cosine", "tracking": "none"})
    assert Path(first.folder) == tmp_path / "home" / "runs" / "first"
    assert first.history.index.tolist() == [2, 4, 6, 8] and second.history.index.tolist() == [2, 4]
    assert first.history["val/accuracy"].count() == 2
    assert first.evaluation is not None and len(first.evaluation.table) == 1
    assert first.model == "models:/prototypical-glyphs/1" and second.model is None
    assert repr(first).startswith("Run('first', models:/prototypical-glyphs/1")
    with pytest.raises(PipelineError, match="not registered"):
        pipeline.load(second)

    measured = pipeline.evaluate(first, episodes=20, query=5, shot=[1, 2], compare=second)
    assert measured.table["model"].tolist() == ["first"] * 2 + ["second"] * 2
    assert measured.table["accuracy"].iloc[0] == pytest.approx(first.evaluation.table["accuracy"].iloc[0])
    assert measured.table["accuracy"].iloc[1] == pytest.approx(measured.accuracies[1].mean())
    assert measured.comparison is not None and len(measured.comparison) == 2
    assert "accuracy" in repr(measured)
    by_name = pipeline.evaluate("models:/prototypical-glyphs/1", "episodes=20", query=5, shot=[1])
    assert by_name.accuracies[0].tolist() == measured.accuracies[0].tolist()

    images = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
    classifier = pipeline.load("models:/prototypical-glyphs@challenger").fit(images[:4], ["x", "y", "x", "y"])
    behind = pull("models:/prototypical-glyphs/1", api.configuration("classify", ("model=x",), {})["tracking"])
    enrolment = behind.enrol(images[:4, None], ["x", "y", "x", "y"])
    assert classifier.predict(images).tolist() == behind.classify(enrolment, images[:, None]).labels
    monkeypatch.chdir(tmp_path / "home")  # where the demonstration leaves its images, and the README looks for them
    demonstration = DemoConfig(data={}, method="prototypical", recipe="demo", support=3, queries=2, classes=4)
    export_examples(demonstration, Dataset(dataset.folder), Path("runs/first/demo"))
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)[0], {})
    assert len(re.findall(r"queries/glyph\d+/\d+\.png is glyph\d+", shown.getvalue())) == 10
    assert pipeline.load(first).fit(images[:4], [0, 1, 0, 1]).predict_proba(images).shape == (6, 2)
