"""What ``jobs.benchmark`` does: measure the chosen rows and print their table."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

from docs.studies.benchmark import rows
from docs.studies.benchmark.config import BenchmarkConfig
from docs.studies.benchmark.rows import Bench
from docs.studies.benchmark.table import line, text
from pipeline import store
from pipeline.config import Config, validate
from pipeline.environment import code_version, machine
from pipeline.errors import PipelineError
from pipeline.training.cluster import start_ray

# Every theme registers its rows when it is imported.
from . import (  # noqa: F401  # isort: skip
    campaign, classical, distributed, evaluation, features, features_memory, gpu, ingest, memory, photographs, startup,
    step, stream,
)  # fmt: skip


def benchmark(raw: Config) -> dict[str, Any]:
    """Measure ``what`` and print one table; with ``profile`` write a trace instead."""
    config = validate(BenchmarkConfig, raw)
    for key, file in (("record", config.record), ("profile", config.profile)):
        if file:
            store.check_output(str(file), key)
    with _folder(config.folder) as folder:
        if config.profile:
            from docs.studies.benchmark.profile import profile

            return profile(config.profile, config.train, folder, config.cluster)
        found = _measure(config, folder)
    about = {"command": _command(), "code": code_version(), "machine": machine()}
    content = {"protocol": "benchmark", **about, "rows": found}
    print(f"\n{text(content)}", flush=True)
    if config.record:
        store.write_bytes(config.record, (json.dumps(content, indent=1) + "\n").encode())
        print(f"recorded in {config.record}")
    return content


def _measure(config: BenchmarkConfig, folder: Path) -> list[dict[str, Any]]:
    bench = Bench(config.repetitions, config.scale, folder, config.cluster, config.images)
    chosen = rows.select(config.what)
    found = []
    console = Console(stderr=True)
    for number, row in enumerate(sorted(chosen, key=lambda r: r.needs_ray), 1):  # an idle Ray is not quite idle
        if row.needs_ray:
            start_ray(config.cluster)
        console.print(f"[{number}/{len(chosen)}] {row.theme}: {row.name}", highlight=False, markup=False)
        for summary in rows.measured(row, bench):
            found.append(summary)
            console.print(f"    {line(summary)}", highlight=False, markup=False, soft_wrap=True)
    if ray.is_initialized():
        ray.shutdown()
    order = {row.name: place for place, row in enumerate(chosen)}
    return sorted(found, key=lambda summary: order[summary["row"]])


@contextlib.contextmanager
def _folder(path: str | None) -> Iterator[Path]:
    if path is None:
        with tempfile.TemporaryDirectory(prefix="benchmark-", ignore_cleanup_errors=True) as made:
            yield Path(made)
        return
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise PipelineError(f"folder={path}: {error.strerror}") from error
    yield Path(path).resolve()


def _command() -> str:
    job = "docs.studies.peers" if "peers" in Path(sys.argv[0]).parts else "jobs.benchmark"
    kept = [a for a in sys.argv[1:] if not a.startswith(("record=", "folder=", "images=", "--"))]
    return " ".join(["python -m", job, *kept])
