"""``jobs.report`` as a user runs it: from the folders of runs to tables, statements, records and pictures."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from docs.studies import results
from jobs._main import run as run_job
from jobs.report import dispatch as report
from pipeline import store
from pipeline.config import compose, validate
from pipeline.data.dataset import class_table, read_manifest
from pipeline.data.ingest import ingest
from pipeline.data.write import write_dataset
from pipeline.errors import PipelineError
from pipeline.evaluation.seen import TRAINED, trained_classes
from pipeline.pages import strangers
from pipeline.training.checkpoint import load_checkpoint, save_checkpoint
from pipeline.training.config import TrainConfig
from pipeline.training.learner import Learner
from pipeline.training.runs import RUN_FILE


@pytest.fixture(scope="module")
def runs(glyphs, tmp_path_factory) -> str:
    """The folder of runs "meta" and "classical" of one network, and "other" of another dataset; hardly trained."""
    folder = tmp_path_factory.mktemp("runs")
    root, name = glyphs.rsplit("/", 1)
    manifest = read_manifest(glyphs)
    for run, method in {"meta": "prototypical", "classical": "baseline", "other": "baseline"}.items():
        place = [f"data.root={root}", f"data.name={name}", f"storage={folder}", "backbone.width=8"]
        raw = compose("train", [f"method={method}", *place])
        config = validate(TrainConfig, raw)
        spec = {
            "method": config.method, "backbone": config.backbone, "way": 5, "shot": 1,
            "input": {"shape": list(manifest.shape), "scaling": "unit"},
            "classes": len(class_table(manifest, "train")),
        }  # fmt: skip
        learner = Learner(config, spec)
        learner.record({"train/steps_per_s": 2.0, "val/accuracy": 0.5, "val/interval": 0.1})
        for _ in range(20):
            learner.method.backbone(torch.rand(64, *manifest.shape))
        dataset = {"name": name, "fingerprint": run if run == "other" else manifest.fingerprint, "uri": glyphs}
        record = {
            "name": run,
            "config": raw,
            "spec": spec,
            "dataset": dataset,
            "arguments": [f"method={method}", *place],
        }
        store.write_bytes(f"{folder}/{run}/{RUN_FILE}", json.dumps(record).encode())
        save_checkpoint(f"{folder}/{run}/step_00000000", learner.checkpoint(raw, dataset))
    return str(folder)


def make(what: str, runs: str, *overrides: str) -> dict:
    return report(compose("report", [f"what={what}", f"storage={runs}", "runs=[meta,classical]", *overrides]))


SMALL = ["heads=[svm,ridge,prototypes,maml]", "episodes=6", "query=3", "fine_tune.steps=2"]


def test_cross_domain(ray_session, runs, glyphs, tmp_path, capsys, monkeypatch):
    """Models on another dataset, of colour images of another size, as if it had been ingested in their shape."""
    monkeypatch.setattr("sys.argv", ["report", "cross_domain", "record=x"])
    for number in range(6):
        for image in range(8):
            pixels = np.random.default_rng(number).integers(0, 256, (6, 6, 3)).repeat(7, 0).repeat(7, 1)
            path = tmp_path / "in" / f"class {number}" / f"{image}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.roll(pixels, image, 1).astype(np.uint8)[:, :40]).save(path)
    places = {}
    forms = {"raw": ("raw", "[3,42,40]"), "file": ("encoded", "[3,42,40]"), "own": ("raw", "[1,28,28]")}
    for name, (encoding, shape) in forms.items():
        words = [f"data.name={name}", f"data.root={tmp_path}", f"data.source.path={tmp_path / 'in'}"]
        split = tmp_path / "splits.json"
        split.write_text(json.dumps({"train": ["class 0"], "test": [f"class {number}" for number in range(1, 6)]}))
        words += [f"data.source.encoding={encoding}", f"data.source.shape={shape}", f"data.source.splits={split}"]
        ingest(compose("ingest", ["data=folder", *words]), progress=False)
        places[name] = str(tmp_path / name)
    asked = ["runs=[meta,other]", f"datasets=[{glyphs},{','.join(places.values())}]", "query=3", "episodes=10"]
    found = make("cross_domain", runs, *asked, "shot=[1,2]", f"record={tmp_path}/cross_domain_x.json")
    shown = capsys.readouterr().out
    cells = {(row["run"], row["dataset"]): row["accuracy"] for row in found["results"] if row["shot"] == 1}
    assert len(cells) == 8 and len(found["results"]) == 16
    for run in ("meta", "other"):  # resized when it is read, or when it was ingested: the same images
        assert cells[run, "raw"] == cells[run, "file"] == cells[run, "own"] > 0.2
    assert "10 episodes of 5 classes with 3 queries each, split 'test'" in shown and " *" in shown
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    page = results.page_text("<!-- measured: cross_domain_x -->\n<!-- end -->\n")
    assert "| meta | prototypical | glyphs |" in page
    with pytest.raises(PipelineError, match="needs datasets="):
        make("cross_domain", runs)
    with pytest.raises(PipelineError, match="one number of shots"):
        make("cross_table", runs, "shot=[1,5]")
    with pytest.raises(PipelineError, match="every dataset once"):
        make("cross_domain", runs, f"datasets=[{places['raw']},{places['raw']}]")


def test_a_model_is_not_measured_elsewhere_on_what_it_was_trained_on(ray_session, runs, glyphs, tmp_path):
    """The same classes split anew: those of the model's training are named."""
    manifest = read_manifest(glyphs)
    trained = {"name": "glyphs", "fingerprint": "another", "uri": glyphs, TRAINED: trained_classes(manifest, "test")}
    folder = tmp_path / "runs"
    shutil.copytree(f"{runs}/meta", folder / "meta")
    checkpoint = load_checkpoint(f"{folder}/meta/step_00000000")
    save_checkpoint(f"{folder}/meta/step_00000000", replace(checkpoint, dataset=trained))
    for what in ("cross_domain", "cross_table", "clustering", "strangers"):
        asked = [f"what={what}", f"storage={folder}", "runs=[meta]", f"datasets=[{glyphs}]", f"dataset={glyphs}"]
        says = r"meta was trained on \d+ classes of split 'test' of dataset 'glyphs'.*, or measure another split$"
        with pytest.raises(PipelineError, match=says):
            report(compose("report", asked))


def test_a_model_is_not_measured_on_images_of_another_shape(runs, tmp_path):
    uri = f"{tmp_path}/colour"
    classes = [(f"colour {n}", np.zeros((30, 3, 32, 32), np.uint8)) for n in range(5)]
    write_dataset(uri, "colour", classes, {"test": [name for name, _ in classes]})
    for what in ("cross_table", "clustering", "strangers"):
        with pytest.raises(PipelineError, match=r"'colour' has images of 3 x 32 x 32 .*, meta takes 1 x 28 x 28"):
            make(what, runs, f"dataset={uri}")


def test_cross_table(ray_session, runs, tmp_path, capsys, monkeypatch):
    given = ["cross_table", "runs=[meta,classical]", f"storage={runs}", "record=x"]
    monkeypatch.setattr("sys.argv", ["/x/report.py", *given])
    found = make("cross_table", runs, *SMALL, f"record={tmp_path}/cross_table_x.json")
    shown = capsys.readouterr().out
    assert [(row["run"], row["head"]) for row in found["results"]] == [
        (run, head) for run in ("meta", "classical") for head in ("svm", "ridge", "prototypes", "maml")
    ]
    assert len(found["comparisons"]) == 4 and "meta − classical" in shown and "the paper's direction" in shown
    assert "prototypical (meta)" in shown and "baseline (classical)" in shown
    content = json.loads((tmp_path / "cross_table_x.json").read_text())
    assert content["command"] == "python -m jobs.report cross_table 'runs=[meta,classical]'"
    assert content["runs"][0]["command"] == "python -m jobs.train method=prototypical data.name=glyphs backbone.width=8"
    assert content["results"] == found["results"] and runs not in json.dumps(content)
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    page = results.page_text("<!-- measured: cross_table_x -->\n<!-- end -->\n")
    assert "| meta | prototypical (meta) |" in page and "- classical: `python -m jobs.train" in page


def test_clustering(ray_session, runs, tmp_path, capsys):
    found = make("clustering", runs, "pairs=100", f"record={tmp_path}/clustering_x.json")
    assert [row["images"] for row in found["results"]] == [800, 800]
    assert [row["measure"] for row in found["comparisons"]] == ["feature_clustering", "hyperplane_variation"]
    assert "has less spread than classical" in capsys.readouterr().out
    assert json.loads((tmp_path / "clustering_x.json").read_text())["protocol"] == "clustering"


def test_strangers(runs, tmp_path, capsys, monkeypatch):
    """Embedded once or with every episode, the figures are the same; they come back from the file as a page."""
    monkeypatch.setattr(strangers, "QUERIES", 200)
    found = make("strangers", runs, "strangers=val", f"record={tmp_path}/strangers_x.json")
    assert [(r["run"], r["way"], r["shot"]) for r in found["results"]] == [
        (run, way, shot) for run in ("meta", "classical") for shot in (1, 2, 5) for way in (5, 20, 30)
    ]
    for row in found["results"]:
        assert 0 < row["auroc"]["low"] <= row["auroc"]["value"] == row["scores"][row["score"]] <= row["auroc"]["high"]
        assert row["oscr"] <= min(row["auroc"]["value"], row["accuracy"]) and row["strangers"] > 200
        assert set(row["unreliable"]) == {"before", "after"}
        assert [rate["asked"] for rate in row["rates"]] == [0.01, 0.05, 0.2]
        assert row["promised"][-1]["passed"]["value"] == pytest.approx(0.2, abs=0.15)
    shown = capsys.readouterr().out
    assert "refused at 5 % of strangers, %" in shown and "calibrated for" in shown
    for row in found["results"]:
        for rate in row["promised"]:
            assert rate["borne_out"] == (rate["validated"]["high"] <= 2 * rate["asked"])
    doubted = next(rate for row in found["results"] for rate in row["promised"] if not rate["borne_out"])
    assert f"† {100 * doubted['validated']['high']:.0f}" in shown and "† no promise: validation has too few" in shown
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    page = results.page_text("<!-- measured: strangers_x -->\n<!-- end -->\n")
    assert "| meta | 20 × 2 |" in page and "- classical: `python -m jobs.train" in page
    monkeypatch.setattr(strangers, "ASKED", 0)
    monkeypatch.setattr(strangers, "SHOTS", (2,))
    again = make("strangers", runs, "strangers=val", "runs=[meta]")["results"][1]
    before = next(row for row in found["results"] if (row["way"], row["shot"]) == (20, 2))
    assert again["scores"] == pytest.approx(before["scores"], abs=2e-3) and again["score"] == before["score"]


def test_embeddings(runs, tmp_path, capsys):
    found = make("embeddings", runs, f"output={tmp_path}/a.svg", "classes=3", f"record={tmp_path}/x.json")
    first = (tmp_path / "a.svg").read_bytes()
    assert first.startswith(b"<?xml") and len(found["results"][0]["classes"]) == 3
    assert found["results"][0]["classes"] == found["results"][1]["classes"]
    make("embeddings", runs, f"output={tmp_path}/a.svg", "classes=3")
    assert (tmp_path / "a.svg").read_bytes() == first


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["what=cross_table", "runs=[]"], "cross_table needs runs"),
        (["what=clustering", "runs=[meta,meta]"], "every run once"),
        (["what=clustering", "runs=[meta,nobody]"], "no run 'nobody'"),
        (["what=clustering", "runs=[meta,other]"], "trained on different datasets"),
        (["what=cross_table", "heads=[svm,tree]"], "heads.1='tree': input should be 'svm', 'ridge'"),
        (["what=embeddings", "output=x.pdf"], "a picture is a .png or an .svg"),
        (["what=embeddings", "images=11"], "has only 20 images"),
        (["what=embeddings", "classes=41"], "has only 40 classes"),
        (["what=strangers", "strangers=test"], "strangers=test has classes of split=test"),
        (["what=tables"], "what='tables': input should be 'pages', 'cross_table'"),
    ],
)
def test_refusals(runs, overrides, message):
    with pytest.raises(PipelineError, match=message):
        make(overrides[0].removeprefix("what="), runs, *overrides)


def test_runs_of_one_name_are_not_compared_as_if_they_were_one(runs, tmp_path):
    shutil.copytree(f"{runs}/classical", tmp_path / "classical")
    for name in (str(tmp_path / "classical"), "./classical/../classical", f"{runs}/classical"):
        with pytest.raises(PipelineError, match="every run once, each with a name of its own"):
            report(compose("report", ["what=clustering", f"storage={runs}", f"runs=[classical,{name}]"]))


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["reproduction"], 0, "Prototypical networks"),
        (["what=reproduction"], 0, "published, not measured here"),
        (["reproductions"], 2, "error: what='reproductions': input should be"),
        (["reproduction", "clustering"], 2, "error: 'clustering' is not key=value"),
        (["clustering"], 2, "error: clustering needs runs=[NAME,...]"),
    ],
)
def test_plain_words(arguments, status, message, capsys):
    with pytest.raises(SystemExit) as exited:
        run_job("report", report, arguments, word="what")
    printed = capsys.readouterr()
    assert exited.value.code == status and message in (printed.out if status == 0 else printed.err)
    assert status == 0 or printed.err.count("\n") == 1


def test_a_word_is_no_key_of_other_jobs(capsys):
    with pytest.raises(SystemExit) as exited:
        run_job("evaluate", report, ["word"])
    assert exited.value.code == 2 and "'word' is not key=value" in capsys.readouterr().err
