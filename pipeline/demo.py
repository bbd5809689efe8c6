"""The demonstration: the whole road from images to a pulled model, each part by the job that a user would run."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import PositiveInt

from pipeline import store
from pipeline.commands import command
from pipeline.config import CONF, Config, Section, compose, validate
from pipeline.data.dataset import ClassTable, Dataset, class_table
from pipeline.data.manifest import MANIFEST_NAME
from pipeline.errors import PipelineError


class DemoConfig(Section):
    """Keys of ``conf/demo.yaml``."""

    data: dict[str, Any]
    method: str
    recipe: str
    support: PositiveInt
    queries: PositiveInt
    classes: PositiveInt


def demo(raw: Config) -> dict[str, Any]:
    """Ingest, train (with evaluation and registration), pull the registered model and classify unseen classes."""
    config = validate(DemoConfig, raw)
    name, root = config.data["name"], config.data["root"]
    if store.is_remote(root):
        raise PipelineError(f"data.root={root}: the demonstration shows files; set PIPELINE_HOME to a local folder")
    files = (path.stem for path in (CONF / "data").glob("*.yaml"))
    known = {file: compose("demo", [f"data={file}"])["data"] for file in files}
    file = next(file for file, usual in known.items() if usual["source"] == config.data["source"])
    given = [f"data.{key}={config.data[key]}" for key in ("name", "root") if config.data[key] != known[file][key]]
    data = [f"data={file}", *given]
    uri = store.join(root, name)
    if not store.exists(store.join(uri, MANIFEST_NAME)):
        run_job("ingest", *data)
    trained = run_job("train", *data, f"method={config.method}", f"recipe={config.recipe}")
    if "model" not in trained:
        later = command("register", f"run={trained['folder']}")
        raise PipelineError(f"run {trained['run']} is trained but not registered; later: {later}")
    folder = Path(os.path.relpath(trained["folder"])) / "demo"
    export_examples(config, Dataset(uri), folder)
    answers = run_job(
        "classify", f"model={trained['model']}", f"support={folder / 'support'}", f"queries={folder / 'queries'}"
    )["answers"]
    print(verdict(answers, folder))
    print(NEXT.format(report=folder.parent / "report", tracking=trained["tracking"]))
    return {**trained, "answers": answers}


def run_job(job: str, *arguments: str) -> dict[str, Any]:
    """Run a job as a process of its own, showing its command and what it says; its summary."""
    print(f"\n$ {command(job, *arguments)}", flush=True)
    # -P and this code's folder: a folder named jobs in the working directory does not take the place of ours.
    path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]))
    asked = [sys.executable, "-P", "-m", f"jobs.{job}", *arguments, "--json"]  # --json: people's text is on stderr
    done = subprocess.run(asked, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})
    if done.returncode:
        raise PipelineError(f"jobs.{job} ended with status {done.returncode}; what it said stands above")
    return json.loads(done.stdout)


def export_examples(config: DemoConfig, dataset: Dataset, folder: Path) -> None:
    """Image files of classes that training never saw: ``support`` of some, ``queries`` of these and of one more."""
    table = class_table(dataset.manifest, "test")
    step = len(dataset.manifest.rotations)
    known = list(range(0, config.classes * step, step))
    last = config.support + config.queries
    export_images(dataset, table, known, slice(0, config.support), folder / "support")
    export_images(dataset, table, [*known, known[-1] + step], slice(config.support, last), folder / "queries")


def verdict(answers: list[dict[str, Any]], folder: Path) -> str:
    """How many queries of enrolled classes got their name, and how many strangers were called unknown."""
    enrolled = {child.name for child in (folder / "support").iterdir()}
    counts: Counter[str] = Counter()
    for answer in answers:
        truth = Path(answer["file"]).parent.name
        kind = "enrolled" if truth in enrolled else "strangers"
        counts[kind] += 1
        counts[f"{kind} right"] += answer["label"] == (truth if truth in enrolled else None)
    return (
        f"\n{counts['enrolled right']} of {counts['enrolled']} images of classes that training never saw were named "
        f"rightly; {counts['strangers right']} of {counts['strangers']} of a class that was not enrolled were unknown"
    )


NEXT = """
What to look at next (first: source .venv/bin/activate)
  pictures of the run        {report}
  all runs and models        mlflow ui --backend-store-uri {tracking}
  every key of training      python -m jobs.train --help
  your own images            python -m jobs.ingest data=folder data.source.path=FOLDER   (one sub-folder a class)
                             python -m jobs.train data=folder
  a cluster, other methods   README.md"""


def export_images(
    dataset: Dataset, table: ClassTable, classes: Sequence[int], images: slice, folder: str | Path
) -> list[Path]:
    """Write ``images`` (a range within each class) of the classes at these positions of ``table`` as PNG files.

    They are named ``folder/CLASS/NUMBER.png``. Classes are written as they lie in the shards, without rotation.
    """
    written = []
    for position in classes:
        if not 0 <= position < len(table):
            raise PipelineError(f"class {position} of split {table.split!r}, which has {len(table)} classes")
        numbers = np.arange(table.counts[position])[images]
        name = dataset.manifest.class_names[int(table.ids[position]) // len(dataset.manifest.rotations)]
        target = Path(folder) / name.replace("/", "-")
        target.mkdir(parents=True, exist_ok=True)
        for number, pixels in zip(numbers, dataset.gather(table.starts[position] + numbers), strict=True):
            written.append(target / f"{number:04d}.png")
            image = pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0))
            Image.fromarray(image).save(written[-1])
    return written
