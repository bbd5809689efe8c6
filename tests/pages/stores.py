"""A tracking store as training, evaluation and campaigns leave it, and one that somebody filled with malice."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlflow import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from pipeline import store, workflow
from pipeline.config import compose, to_yaml, validate
from pipeline.data.dataset import Dataset, class_table, read_manifest
from pipeline.evaluation.episodic import episode_accuracies
from pipeline.evaluation.evaluate import EpisodicProtocol
from pipeline.inference.calibration import Calibration, CalibrationPoint
from pipeline.inference.rates import Rate, Share
from pipeline.model import build_model, build_preprocess
from pipeline.registry.aliases import Decision, settle
from pipeline.registry.publish import publish
from pipeline.registry.tracking import connect
from pipeline.registry.versions import Registered, register_run, set_alias
from pipeline.training.checkpoint import load_checkpoint, save_checkpoint
from pipeline.training.config import TrainConfig
from pipeline.training.learner import Learner
from pipeline.training.runs import CALIBRATION, EVALUATION, REPORT, RUN_FILE, best_checkpoint, find_run

EVIL = "<script>document.title='owned';window.owned=1</script><img src=x onerror=window.owned=1>\"'`--"
EVIL_NAME = '<script>window.owned=1<script><img src=x onerror=window.owned=1> &"'  # no store takes "/" in a name
PAPERS = [
    {"label": "Prototypical networks", "method": "prototypical", "dataset": "glyphs", "way": 5, "shot": 1,
     "accuracy": 0.615, "interval": 0.004, "source": "a paper"},
]  # fmt: skip
SPACE = {
    "method.distance": {"choices": ["cosine", "euclidean"]},
    "method.scale": {"low": 0.1, "high": 100.0, "log": True},
    "method.learn_scale": {"choices": [False, True]},
}


def tracking_in(folder: Path, database: Path) -> dict[str, Any]:
    """The configuration of a store of its own."""
    shutil.copy(database, folder / "mlflow.db")
    place = {"uri": f"sqlite:///{folder}/mlflow.db", "artifacts": str(folder / "artifacts")}
    return {**place, "experiment": "few-shot", "timeout": 10}


def make_run(glyphs: str, folder: Path, name: str, method: str = "prototypical", *overrides: str) -> str:
    """A hardly trained run with its evaluation, its calibration and its model card; its folder."""
    root, data = glyphs.rsplit("/", 1)
    manifest = read_manifest(glyphs)
    place = [f"data.root={root}", f"data.name={data}", f"storage={folder}", "backbone.width=8", *overrides]
    raw = compose("train", [f"method={method}", *place])
    config = validate(TrainConfig, raw)
    spec = {
        "method": config.method, "backbone": config.backbone, "way": 5, "shot": 1,
        "input": {"shape": list(manifest.shape), "scaling": "unit"}, "classes": len(class_table(manifest, "train")),
    }  # fmt: skip
    learner = Learner(config, spec)
    for step, accuracy in ((100, 0.5), (200, 0.62), (300, 0.66)):
        learner.step = step
        learner.record({"train/loss": 100.0 / step, "val/accuracy": accuracy, "val/interval": 0.03})
    for _ in range(3):
        learner.method.backbone(torch.rand(64, *manifest.shape))
    described = {"name": data, "fingerprint": manifest.fingerprint, "uri": glyphs}
    uri = f"{folder}/{name}"
    record = {"name": name, "config": raw, "spec": spec, "dataset": described, "arguments": [f"method={method}"]}
    store.write_bytes(f"{uri}/{RUN_FILE}", json.dumps(record).encode())
    save_checkpoint(f"{uri}/step_000300", learner.checkpoint(raw, described))
    write_report(uri, glyphs)
    return uri


def write_report(uri: str, glyphs: str) -> None:
    run = find_run(uri, "")
    checkpoint = load_checkpoint(best_checkpoint(run.uri))
    method, preprocess = build_model(checkpoint.spec), build_preprocess(checkpoint.spec)
    method.load_state_dict(checkpoint.model)
    dataset, table = Dataset(glyphs, verify=False), class_table(read_manifest(glyphs), "test")
    results = []
    for shot in (1, 5):
        protocol = EpisodicProtocol(glyphs, "test", 5, shot, 3, 12, 7)
        found = episode_accuracies(method, preprocess, dataset, table, protocol.spec, 7, np.arange(12))
        shape = {"split": "test", "way": 5, "shot": shot, "query": 3, "episodes": 12, "seed": 7}
        if shot == 1:
            first = [{"model": "untrained", **shape, "accuracy": 0.2345, "interval": 0.05}]
            model = workflow.model_of_run(run)
            workflow._write_card(run, model, dataset, protocol, found, None, first, None)
        results.append({"model": run.name, **shape, "accuracy": float(found.mean()), "interval": 0.05})
    store.write_bytes(f"{uri}/{REPORT}/{EVALUATION}", json.dumps(results).encode())
    points = [
        CalibrationPoint(way, shot, 1.5, 0.05, 0.3 / shot, 0.1, 0.8, 100, 100) for way in (5, 20) for shot in (1, 5)
    ]
    told = tuple(Rate(a, 2 - a, Share(a, a / 2, 2 * a), Share(0.5 - a, 0.2, 0.6)) for a in (0.01, 0.05, 0.2))
    points[0] = replace(
        points[0], score="energy", auroc={"logit": 0.8, "energy": 0.8712}, oscr=0.7, rates=told, stranger_images=150,
        stranger_classes=40,
    )  # fmt: skip
    doubted = replace(told[1], passed=Share(0.05, 0.01, 0.23))  # by so few classes
    points[1] = replace(points[0], shot=5, rates=(told[0], doubted, told[2]), stranger_images=400, stranger_classes=7)
    calibration = Calibration(0.05, "val", 0, tuple(points))
    store.write_bytes(f"{uri}/{REPORT}/{CALIBRATION}", json.dumps(calibration.to_dict()).encode())


def fill(tracking: dict[str, Any], glyphs: str, folder: Path) -> None:
    """Two models, one with a decision, and two campaigns, one of them running."""
    first = add_model(tracking, make_run(glyphs, folder, "first"), "glyphs")
    second = add_model(tracking, make_run(glyphs, folder, "second", "prototypical", "seed=5"), "glyphs")
    set_alias(tracking, "glyphs", "challenger", second.version)
    settle(tracking, Decision("glyphs", first.version, None, True, "there was no champion", {"difference": 0.01}))
    add_model(tracking, make_run(glyphs, folder, "matching", "matching"), "matching")
    add_campaign(tracking, "alpha")
    add_campaign(tracking, "running", ended=False)


def add_model(tracking: dict[str, Any], uri: str, name: str) -> Registered:
    publish(uri, tracking)
    return register_run(uri, tracking, name)


def trials() -> list[dict[str, Any]]:
    """Of a search: finished ones, one that was stopped, one that failed; and the finalists' repetitions."""
    rng, out = np.random.default_rng(0), []
    for number in range(14):
        scale = float(10 ** rng.uniform(-1, 2)) if number else 1.0
        distance = ["cosine", "euclidean"][number % 2]
        top = 0.9 - 0.08 * (np.log10(scale) - 0.9) ** 2 - 0.03 * (number % 2)
        status = "stopped" if number % 5 == 3 else "failed" if number == 6 else "finished"
        steps = {"finished": (20, 40, 60), "stopped": (20,), "failed": ()}[status]
        reason = {"finished": "", "stopped": "not among the best at step 20", "failed": "the loss is no number"}[status]
        values = {"method.distance": distance, "method.scale": scale, "method.learn_scale": number % 3 == 0}
        out.append(
            {
                "number": number, "run": f"trial-{number:03d}", "values": values, "status": status, "reason": reason,
                "curve": [[step, top - 0.05 * (60 - step) / 40] for step in steps], "seed": None,
                "began": 1.7e9 + 30 * number, "ended": 1.7e9 + 30 * number + 20 * max(1, len(steps)),
            }
        )  # fmt: skip
    for seed in (1, 2):
        again = {"run": f"trial-002-seed{seed}", "seed": seed, "began": 1.7e9 + 450 + seed, "ended": 1.7e9 + 520}
        out.append({**out[2], **again})
    return out


def add_campaign(
    tracking: dict[str, Any], name: str, ended: bool = True, changed: dict[str, Any] | None = None
) -> None:
    """As the campaign's delivery leaves it; ``changed`` are files that are otherwise."""
    known = connect(tracking)
    client = known.client
    tags = {"pipeline.run": name, "dataset.name": "glyphs", **({"pipeline.campaign": name} if ended else {})}
    parent = client.create_run(known.experiment_id, run_name=name, tags=tags).info.run_id
    for key, value in {"campaign": "metric_scale", "trials": "14", "search.kind": "tpe"}.items():
        client.log_param(parent, key, value)
    client.log_text(parent, to_yaml({"space": SPACE}), "config.yaml")
    records = trials()
    for record in records[:4]:
        tags = {MLFLOW_PARENT_RUN_ID: parent, "pipeline.run": f"{name}-{record['run']}", "trial.kind": "search"}
        tags |= {
            "trial.number": str(record["number"]),
            "trial.status": record["status"],
            "trial.reason": record["reason"],
        }
        child = client.create_run(known.experiment_id, run_name=record["run"], tags=tags).info.run_id
        for key, value in record["values"].items():
            client.log_param(child, key, str(value))
        for step, accuracy in record["curve"]:
            client.log_metric(child, "val/accuracy", accuracy, step=step)
        client.set_terminated(child)
    if not ended:
        return
    best = records[2]
    finalists = [
        {"number": 2, "values": best["values"], "accuracy": 0.87, "interval": 0.02, "by_seed": [0.86, 0.88]},
        {
            "number": 0,
            "values": records[0]["values"],
            "accuracy": 0.82,
            "interval": None,
            "by_seed": [0.82],
            "default": True,
        },
    ]
    files = {
        "ledger.jsonl": "\n".join(map(json.dumps, records)),
        "summary.json": json.dumps(
            {
                "finalists": finalists,
                "statement": "the best is better than the default: +5.00 points (+3.00 … +7.00)",
                "best": {"values": best["values"], "number": 2, "run": "trial-002-seed2", "accuracy": 0.87},
            }
        ),
        "space.yaml": to_yaml(SPACE),
        "best.yaml": to_yaml({"method": {"name": "prototypical"}, "validation": {"select": "best"}}),
    }
    for path, text in {**files, **(changed or {})}.items():
        client.log_text(parent, text, path)
    client.log_metric(parent, "best/accuracy", 0.87)
    client.set_terminated(parent)


def fill_with_malice(tracking: dict[str, Any]) -> None:
    """Markup wherever a text may stand, and files that are not what they are called."""
    known = connect(tracking)
    client: MlflowClient = known.client
    evil_results = [
        {"split": EVIL, "way": 5, "shot": 1, "query": 1, "episodes": 10, "seed": 1, "accuracy": 0.5, "interval": 0.1},
        {"split": "test", "way": 5, "shot": 5, "accuracy": 7.0, "interval": 0.1},
        {"split": "test", "way": EVIL, "shot": 5, "accuracy": 0.7, "interval": 0.1},
        EVIL,
    ]
    files = {"report/evaluation.json": json.dumps(evil_results), "config.yaml": f"a: {EVIL!r}"}
    files |= {
        "environment.json": json.dumps({"python": EVIL, "gpus": [EVIL]}),
        "report/card.json": json.dumps(evil_card()),
    }
    files |= {
        "report/card.png": EVIL,
        "report/calibration.json": json.dumps({"target": 0.05, "split": EVIL, "points": []}),
    }
    run = add_run(client, known.experiment_id, files)
    name = EVIL_NAME
    client.create_registered_model(name, description=EVIL)
    client.create_registered_model(f"{name}.promotion-lock")
    client.create_registered_model("it's <b>quoted")
    tags = {"accuracy.5way_1shot": EVIL, "dataset.name": EVIL, "pipeline.run": EVIL}
    tags["pipeline.promotion"] = json.dumps({"challenger": 1, "champion": None, "promoted": True, "reason": EVIL})
    client.create_model_version(name, "/nowhere", run, tags=tags)
    client.set_registered_model_alias(name, "champion", "1")
    nested = "[" * 100_000
    add_run(client, known.experiment_id, {"report/evaluation.json": nested})
    aliases = "a: &a [x,x]\nb: &b [*a,*a]\nspace: {k: *b}"
    records = [{**record, "reason": EVIL, "values": {"method.scale": 1.0, EVIL: EVIL}} for record in trials()]
    records[1]["curve"] = [[20, 99.0]]
    lines = "\n".join([*map(json.dumps, records), "[1]"])
    space = to_yaml({EVIL: {"choices": [EVIL, "b"]}, "method.scale": {"low": 0.1, "high": 100.0, "log": True}})
    changed = {
        "ledger.jsonl": lines,
        "space.yaml": space,
        "best.yaml": aliases,
        "summary.json": '{"best": {"values": 3}}',
    }
    add_campaign(tracking, EVIL, changed=changed)


def add_run(client: MlflowClient, experiment: str, files: dict[str, str]) -> str:
    run = client.create_run(experiment, run_name=EVIL, tags={"dataset.name": EVIL, "pipeline.run": EVIL}).info.run_id
    client.log_param(run, "method.name", EVIL)
    client.log_metric(run, "test/accuracy_5way_1shot", 0.5)
    client.log_metric(run, "val/accuracy", float("nan"), step=1)
    client.log_metric(run, "val/accuracy", 0.5, step=2)
    for path, text in files.items():
        client.log_text(run, text, path)
    client.set_terminated(run)
    return str(run)


def evil_card() -> dict[str, Any]:
    classes = [{"name": EVIL, "tiles": [0, 999]}, {"name": "b", "tiles": []}]
    failed = {"class": 0, "support": [0], "asked": 3, "right": 1, "wrong": [{"tile": 1, "given": 1}]}
    other = {"class": 1, "support": [], "asked": 3, "right": 3, "wrong": []}
    return {
        "run": EVIL, "step": 5, "arguments": [EVIL], "examined": 10, "accuracy": 0.5,
        "data": {"name": EVIL, "fingerprint": EVIL, "images": 5, "shape": [1, 2, 2], "classes": {EVIL: 3}},
        "question": {"split": EVIL, "way": 5, "shot": 1, "query": 1, "episodes": 10, "seed": 1},
        "reliability": {"bins": [{"queries": 3, "confidence": 0.5, "accuracy": 0.4}], "error": 0.1},
        "pairs": [{"true": 0, "given": 1, "count": 1, "asked": 2}],
        "matrix": {"classes": [0, 1], "counts": [[5, 1], [0, 6]], "asked": [[6, 6], [6, 6]],
                   "way": 2, "shot": 1, "query": 1, "episodes": 6},
        "embedding": {"points": [[0.0, 1.0, 0], [1.0, 0.0, 1]], "variance": [0.5, 0.2], "images": 1},
        "worst": [[3, 0.2]], "failures": [{"number": 3, "accuracy": 0.2, "classes": [failed, other]}],
        "classes": classes, "tiles": {"columns": 32, "width": 4, "height": 4, "count": 2},
    }  # fmt: skip
