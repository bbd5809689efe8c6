"""The pages say what was measured: their tables are those of the measured files, and nothing else."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from docs.studies import results
from docs.studies.results import FOLDER, page_text, pages, render
from pipeline.config import Config, validate
from pipeline.data.dataset import class_table, read_manifest
from pipeline.evaluation.evaluate import EpisodicProtocol, Result
from pipeline.evaluation.model import Model
from pipeline.evaluation.protocols import EvaluateConfig
from pipeline.pages.record import _anywhere, record
from pipeline.renamed import current
from pipeline.training.checkpoint import Checkpoint, save_checkpoint
from pipeline.training.config import TrainConfig
from pipeline.training.learner import Learner
from pipeline.training.runs import Run, write_run


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.name)
def test_a_page_is_up_to_date(path):
    text = path.read_text()
    assert page_text(text) == text, "run: python -m jobs.report results"


def test_every_picture_of_a_page_is_there():
    for path in pages():
        for picture in re.findall(r"!\[[^]]*\]\(([^)]+\.png)\)", path.read_text()):
            assert (path.parent / picture).exists(), f"{path.name}: {picture}"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_measured_files_hold_all_it_takes_to_measure_again(path):
    content = json.loads(path.read_text())
    if content["protocol"] == "benchmark":  # of no run
        assert content["rows"] and content["machine"] and content["command"] in render(path.stem)
        return
    if content["protocol"] == "campaign":
        for key in ("results", "finalists", "comparison", "statement", "dataset", "config", "machine"):
            assert content[key], key
        assert content["command"] in render(path.stem) and "/" not in content["command"]
        assert all((FOLDER / plot).exists() for plot in content["plots"].values())
        return
    runs = content.get("runs", [content])  # a comparison has several
    for part in (content, *runs):
        assert not re.search(r"(?<!\w)[~/]", part["command"].replace("s3://", "")), "a path of the machine it ran on"
    for key in ("results", "machine") if "runs" in content else ("evaluation", "results"):
        assert content.get(key) not in (None, "", [], {}), key
    rendered = render(path.stem)
    for run in runs:
        for key in ("command", "method", "dataset", "steps", "seed", "config", "machine"):
            assert run.get(key) not in (None, "", [], {}), key
        assert len(run["dataset"]["fingerprint"]) == 64 and f"{run['steps']:,} steps" in rendered
        check(run["config"])


@pytest.mark.parametrize("path", sorted(FOLDER.glob("variants_*/*.json")), ids=lambda path: path.stem)
def test_so_do_those_of_runs_over_several_seeds(path):
    content = json.loads(path.read_text())
    assert not re.search(r"(?<!\w)[~/]", content["command"]), "a path of the machine it ran on"
    for key in ("method", "steps", "curve", "results", "machine", "code", "evaluation"):
        assert content.get(key) not in (None, "", [], {}), key
    assert len(content["dataset"]["fingerprint"]) == 64 and content["command"] in render(path.parent.name)
    check(content["config"])


def check(config: Config) -> None:
    """A stored configuration is a whole one; keys that came later have their default."""
    from pipeline.config import compose

    rest: Config = {"name": None, "storage": "runs", "tracking": {}, "resume": None, "register_as": None}
    config = current(config)  # files of before keys were renamed
    filled = {**config, "train": {**compose("train")["train"], **config["train"]}}
    validate(TrainConfig, {**filled, **rest, "data": {"name": "x", "root": "y"}})


def test_a_record_knows_no_folder_of_one_machine():
    method = {"name": "rfs", "teacher": "/home/me/runs/first/step_00000100"}
    backbone = {"name": "module", "path": "/home/me/net.py", "weights": None}
    kept = _anywhere({"method": method, "backbone": backbone, "storage": "/home/me/runs"})
    assert kept["method"]["teacher"] == "first" and kept["backbone"]["path"] == "net.py"
    assert "/home" not in json.dumps(kept) and kept["backbone"]["weights"] is None


def test_a_record_is_rendered(tmp_path, monkeypatch, glyphs):
    import numpy as np

    from pipeline.config import compose

    root, name = glyphs.rsplit("/", 1)
    raw = compose("train", [f"data.root={root}", f"data.name={name}", f"storage={tmp_path}"])
    config = validate(TrainConfig, raw)
    manifest = read_manifest(glyphs)
    spec = {
        "method": config.method, "backbone": config.backbone, "way": 5,
        "input": {"shape": list(manifest.shape), "scaling": "unit"}, "classes": len(class_table(manifest, "train")),
    }  # fmt: skip
    learner = Learner(config, spec)
    learner.step = 100
    learner.record({"train/steps_per_s": 2.0, "train/loss": 1.0})
    learner.record({"val/accuracy": 0.5, "val/interval": 0.01})
    dataset = {"name": "omniglot", "fingerprint": "f" * 64, "uri": glyphs}
    run = Run("r", "u", raw, spec, dataset, ("recipe=demo", f"data.root={root}", "name=r"))
    protocol = EpisodicProtocol(glyphs, "test", 5, 1, 4, episodes=2)
    result = Result(protocol, np.asarray([0.5, 0.7]))
    rows = [{"model": Model(spec, None).label, **result.summary()}]
    asked = validate(EvaluateConfig, compose("evaluate", ["run=r", f"storage={tmp_path}", "way=20", "query=4"]))
    monkeypatch.setattr("sys.argv", ["/x/ipykernel_launcher.py", "-f", "/x/kernel-1.json"])
    record(str(tmp_path / "case.json"), run, learner.checkpoint(raw, dataset), rows, asked)
    said = json.loads((tmp_path / "case.json").read_text())["evaluation"]
    assert said == "python -m jobs.evaluate run=RUN 'way=[20]' query=4"
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    text = render("case")
    assert "60.00 ± 19.60" in text and "98.8" in text and "98.4" in text
    assert "`python -m jobs.train recipe=demo`, 100 steps, 0 minutes" in text and str(root) not in text
    assert json.loads((tmp_path / "case.json").read_text())["train_seconds"] == 25  # 50 logged steps at 2 a second
    write_run(replace(run, uri=str(tmp_path / "first"), config={**raw, "steps": 100}))
    save_checkpoint(tmp_path / "first" / "step_00000100", learner.checkpoint(raw, dataset))
    backbone = {**raw["backbone"], "weights": f"{tmp_path}/w.pth"}
    given = {"initial": f"{tmp_path}/first/step_00000100", "backbone": backbone}
    later = learner.checkpoint({**raw, **given}, dataset)
    monkeypatch.setattr("sys.argv", ["/x/evaluate.py", "run=r", "way=20", "dataset=s3://b/set?token=abc"])
    record(str(tmp_path / "later.json"), run, later, rows, asked)
    said = json.loads((tmp_path / "later.json").read_text())["evaluation"]
    assert said == "python -m jobs.evaluate run=RUN way=20 'dataset=s3://b/set?token=***'"
    begun = json.loads((tmp_path / "later.json").read_text())["initial"]
    assert begun["command"] == "python -m jobs.train recipe=demo"
    assert str(tmp_path) not in (tmp_path / "later.json").read_text()
    assert (begun["steps"], begun["train_seconds"]) == (100, 25)
    champion = Checkpoint(0, spec, {}, {"name": "", "uri": ""}, {}, [], {})  # as a retraining keeps its weights
    save_checkpoint(tmp_path / "products.retraining" / "champion-3", champion)
    for place, told in (
        (f"{tmp_path}/first/step_00000100/", {"initial": begun}),
        (f"{tmp_path}/first/step_00000050", {"began_with": "first/step_00000050"}),  # deleted since
        (f"{tmp_path}/products.retraining/champion-3", {"began_with": "products.retraining/champion-3"}),
    ):
        later = learner.checkpoint({**raw, **given, "initial": place}, dataset)
        record(str(tmp_path / "other.json"), run, later, rows, asked)
        said = json.loads((tmp_path / "other.json").read_text())
        assert {key: said[key] for key in ("initial", "began_with") if key in said} == told
