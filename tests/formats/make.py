"""Makes ``tests/formats/files``: what a revision writes, and what it answered; later revisions have to answer the same.

    cd CHECKOUT_OF_THE_REVISION
    PYTHONPATH=$PWD python THIS_FOLDER/make.py THIS_FOLDER/files

The files that are kept here are of the revision before the first release (2054bbb), and are not to be made anew: that
would test nothing. Files of a later format go to a folder of their own. The commands run against an S3 server in a
process of its own, so that what they store names no folder of the machine that made it.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

STORE = "s3://pipeline-tests/formats"
DATASET, ENCODED = f"{STORE}/datasets/tiny", f"{STORE}/datasets/tiny-png"
SHAPE, WAY = (1, 16, 16), 5
TINY = [
    "data=glyphs", "data.name=tiny", f"data.root={STORE}/datasets", "data.source.classes=36", "data.source.per_class=6",
    "data.source.size=16",
]  # fmt: skip
SHORT = [
    *TINY, f"storage={STORE}/runs", "steps=4", "log_every=1", "cluster.workers=1", "train.query=2",
    "train.tasks=2", "train.batch_size=8", "validation.way=4", "validation.every=2", "validation.episodes=4",
    "validation.query=2", "validation.tasks=2", "checkpoint.every=2", "evaluation=null",
]  # fmt: skip
FILES = [
    "data=folder", "data.name=tiny-png", f"data.root={STORE}/datasets", "data.source.path=pictures",
    "data.source.encoding=encoded", "data.source.shape=[1,16,16]",
    "data.source.fractions={train: 0.5, val: 0.25, test: 0.25}",
]  # fmt: skip
METHODS = {  # name of the run: what it is trained with beside SHORT
    "tadam": ["method=tadam", "backbone=resnet12_tadam", "backbone.widths=[2,2,2,2]", "optimizer=sgd",
              "input.scaling=none"],
    "prototypical": ["method=prototypical", "backbone.width=4"],
    "maml": ["method=maml", "backbone.width=4", "train.way=4", "validation.select=last"],
    "r2d2": ["method=r2d2", "backbone.width=4"],
    "matching": ["method=matching", "backbone.width=4", "method.full_context=true"],
    "reptile": ["method=reptile", "backbone.width=4", "train.way=4", "method.inner_steps_eval=3"],
    "baseline": ["method=baseline", "backbone.width=4", "method.epochs=2", "optimizer=sgd"],
}  # fmt: skip
EVALUATE = ["split=test", "way=[5]", "shot=[1,2]", "query=2", "episodes=12", "seed=7", "tracking=none"]
CAMPAIGN = [
    "campaign=metric_scale", "name=campaign", "tracking=none", f"storage={STORE}/runs", "trials=2", "first=[]",
    "finalists.count=0", "search.kind=random", "fix.method=prototypical", "objective.way=4", "objective.query=2",
    "objective.episodes=4", "base.train.way=4", "base.train.query=2", "base.train.tasks=2", "base.validation.tasks=2",
    "base.validation.every=2", "base.steps=4", "base.checkpoint.every=2", "base.log_every=1", "base.backbone.width=2",
    *(f"base.{argument}" for argument in TINY),
]  # fmt: skip
RETRAIN = [
    *SHORT, "method=prototypical", "backbone.width=4", "register_as=people", "retrain.shard_mb=1",
    "retrain.promotion.episodes=12", "retrain.promotion.query=2",
]  # fmt: skip


def run_job(job: str, arguments: list[str], folder: Path) -> None:
    """Run a job in ``folder``; 3 and 4 of a search and a retraining are no failures."""
    command = [sys.executable, "-m", f"jobs.{job}", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode not in (0, 3):
        raise SystemExit(f"{command} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")


def draw_files(folder: Path) -> None:
    """The first 12 classes as folders of PNG files."""
    from PIL import Image

    for number, drawings in enumerate(images_of(DATASET).reshape(-1, 6, *SHAPE)[:12]):
        (folder / f"class{number:02d}").mkdir(parents=True)
        for position, drawing in enumerate(drawings):
            Image.fromarray(drawing[0]).save(folder / f"class{number:02d}" / f"{position}.png")


def images_of(uri: str) -> np.ndarray:
    """All images of a dataset, uint8 [N, C, H, W]."""
    from pipeline.data.dataset import Dataset

    dataset = Dataset(uri)
    return dataset.gather(np.arange(dataset.manifest.rows))


def fingerprint_of(uri: str) -> np.ndarray:
    from pipeline.data.dataset import read_manifest

    return np.array(read_manifest(uri).fingerprint)


def support_and_queries(way: int) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Two images each of the dataset's last ``way`` classes, their names, and two others of each."""
    images = images_of(DATASET).reshape(36, 6, *SHAPE)[-way:]
    labels = [f"class {number}" for number in range(way) for _ in range(2)]
    return images[:, :2].reshape(-1, *SHAPE), labels, images[:, 2:4].reshape(-1, *SHAPE)


def newest_checkpoint(run: str):  # noqa: ANN201 - the class is the revision's
    from pipeline.training.checkpoint import load_checkpoint

    return load_checkpoint(f"{STORE}/runs/{run}/step_00000004")


def classifier_of(run: str):  # noqa: ANN201 - the class is the revision's
    from pipeline.inference import FewShotClassifier

    checkpoint = newest_checkpoint(run)
    return FewShotClassifier.from_weights(checkpoint.spec, checkpoint.model)


def way_of(run: str) -> int:
    return 4 if run in ("maml", "reptile") else WAY


def logits_of(run: str) -> np.ndarray:
    """Of a run's last checkpoint, float32 [2 * way, way]."""
    classifier = classifier_of(run)
    support, labels, queries = support_and_queries(way_of(run))
    return classifier.logits(classifier.enrol(support, labels), queries)


def start_store() -> subprocess.Popen[bytes]:
    """An S3 server with the bucket, which the environment names."""
    import boto3

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], **quiet)
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    for _ in range(100):
        try:
            boto3.client("s3").create_bucket(Bucket="pipeline-tests")
            return server
        except Exception:
            time.sleep(0.1)
    raise SystemExit("the S3 server does not answer")


def copy_from_store(folder: Path) -> None:
    """Everything in the bucket below ``formats``, less what Ray keeps for itself."""
    import boto3

    client = boto3.client("s3")
    kept = ("manifest.json", ".arrow", "run.json", "state.json", ".safetensors", "journal.json", ".jsonl", ".yaml")
    for page in client.get_paginator("list_objects_v2").paginate(Bucket="pipeline-tests", Prefix="formats/"):
        for entry in page.get("Contents", []):
            name = entry["Key"].removeprefix("formats/")
            parts = name.split("/")
            if len(parts) < 3:  # what an object store has in place of a folder
                continue
            trial = parts[1] == "campaign" and len(parts) > 3 and parts[-1] != "run.json"
            retrained = parts[1].startswith("people-") or "champion-" in name
            if (name.endswith(kept) or parts[-1] in ("campaign.json", "summary.json")) and not trial and not retrained:
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                client.download_file("pipeline-tests", entry["Key"], str(target))


def main(target: Path) -> None:
    answers: dict[str, np.ndarray] = {}
    server = start_store()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            folder = Path(scratch)
            os.environ["PIPELINE_HOME"] = scratch
            run_job("ingest", TINY, folder)
            draw_files(folder / "pictures")
            run_job("ingest", FILES, folder)
            for name, arguments in METHODS.items():
                print(name, flush=True)
                run_job("train", [*SHORT, f"name={name}", "tracking=none", *arguments], folder)
                answers[name] = logits_of(name)
            print("evaluation, campaign, retraining", flush=True)
            output = f"output={scratch}/evaluation.json"
            run_job("evaluate", ["run=prototypical", f"storage={STORE}/runs", *EVALUATE, output], folder)
            run_job("tune", CAMPAIGN, folder)
            run_job("retrain", RETRAIN, folder)
            shutil.rmtree(target, ignore_errors=True)
            copy_from_store(target)
            shutil.copy(folder / "evaluation.json", target / "evaluation.json")
            classifier = classifier_of("prototypical")
            support, labels, queries = support_and_queries(WAY)
            enrolment = classifier.enrol(support[:-2], labels[:-2])
            enrolment.save(target / "enrolment.safetensors")
            answers["enrolment"] = classifier.logits(enrolment, queries)
            extended = classifier.extend(enrolment, support[-2:], labels[-2:])
            answers["extended"] = classifier.logits(extended, queries)
            [mlmodel] = folder.glob("mlartifacts/**/MLmodel")
            shutil.make_archive(str(target / "model"), "zip", mlmodel.parent)
            given = {
                "support_images": support, "support_labels": np.repeat(np.arange(WAY), 2), "query_images": queries,
            }  # fmt: skip
            table = predict(mlmodel.parent, given)
            answers |= {f"model {column}": np.asarray(table[column].tolist()) for column in ("label", "score", "known")}
            answers |= {"fingerprint": fingerprint_of(DATASET), "encoded fingerprint": fingerprint_of(ENCODED)}
            np.savez_compressed(target / "answers.npz", pixels=images_of(DATASET), **answers)
        finally:
            server.terminate()


def predict(model: Path, given: dict[str, np.ndarray]):  # noqa: ANN201 - a pandas table
    import mlflow

    return mlflow.pyfunc.load_model(str(model)).predict(given, params={"top_k": 2})


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
