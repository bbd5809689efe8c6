"""Three retrainings in a row, submitted to a live Ray head, with an MLflow server on SQLite and on PostgreSQL."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipeline.data.dataset import read_manifest
from tests.cluster.conftest import ROOT, RayHead, running_head
from tests.retraining.conftest import add_classes, arguments, spoil
from tests.retraining.servers import mlflow_server, postgresql

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(5400)]

FEW, MANY = 30, 150  # classes, of which 2 in 5 are trained on
LEARNING = [
    "backbone.width=16", "steps=150", "train.meta_batch_size=1", "train.query=5", "validation.every=50",
    "validation.episodes=40", "checkpoint.every=50", "retrain.promotion.episodes=300",
]  # fmt: skip


@pytest.fixture(params=["sqlite", "postgresql"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URI of an MLflow server."""
    if request.param == "sqlite":
        with mlflow_server(f"sqlite:///{tmp_path}/server.db", tmp_path) as uri:
            yield uri
        return
    with postgresql() as database, mlflow_server(database, tmp_path) as uri:
        yield uri


@pytest.fixture(scope="module")
def live_head() -> Iterator[RayHead]:
    with running_head(RAY_AUTH_MODE="disabled", RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2") as started:
        yield started


def submitted(head: RayHead, *given: str) -> tuple[int, dict[str, Any]]:
    """``ray job submit --working-dir . -- python -m jobs.retrain ...``: the job's own exit code and its summary."""
    command = ["ray", "job", "submit", "--address", head.address, "--working-dir", ".", "--"]
    done = subprocess.run(
        [*command, "python", "-m", "jobs.retrain", *given, "--json"],
        cwd=ROOT, env=head.env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=2400,
    )  # fmt: skip
    summaries = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    assert summaries and all(found == summaries[0] for found in summaries), done.stdout[-6000:]
    summary = summaries[0]  # Ray shows the last lines of a job that does not end with 0 once more
    code = re.search(r"exit code (\d+)", done.stdout)
    assert (done.returncode == 0) == (code is None), done.stdout[-3000:]
    return int(code[1]) if code else 0, summary


def test_three_retrainings(live_head: RayHead, server: str, tmp_path: Path) -> None:
    images, client = tmp_path / "images", MlflowClient(tracking_uri=server)
    given = [*arguments(tmp_path, *LEARNING), f"tracking.uri={server}", "tracking.artifacts=null"]

    def retrain(*more: str) -> tuple[int, dict[str, Any]]:
        return submitted(live_head, *given, *more)

    def aliases() -> dict[str, int]:
        assert [model.name for model in client.search_registered_models()] == ["people"]  # no lock is left
        return {name: int(version) for name, version in client.get_registered_model("people").aliases.items()}

    def runs() -> int:
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        return len(client.search_runs(experiments))

    add_classes(images, range(FEW))
    code, first = retrain()
    assert (code, first["outcome"], first["reasons"]) == (0, "promoted", ["there is no champion"])
    assert aliases() == {"challenger": 1, "champion": 1}

    # 1: the data are as they were
    before, shards = runs(), stamps(tmp_path)
    code, unchanged = retrain()
    assert (code, unchanged["outcome"], unchanged["champion"]) == (4, "unchanged", 1)
    assert runs() == before and stamps(tmp_path) == shards and aliases() == {"challenger": 1, "champion": 1}
    assert unchanged["fingerprint"] == first["fingerprint"]

    # 2: four times as many classes
    known = read_manifest(f"{tmp_path}/datasets/growing")
    add_classes(images, range(FEW, MANY))
    code, more = retrain()
    assert (code, more["outcome"], more["champion_before"], more["champion"]) == (0, "promoted", 1, 2), more
    assert more["low"] > 0 and more["accuracy.challenger"] > more["accuracy.champion"] + 0.05
    assert aliases() == {"challenger": 2, "champion": 2, "previous": 1}
    grown = read_manifest(f"{tmp_path}/datasets/growing")
    assert len(grown.class_names) == MANY and splits(known).items() <= splits(grown).items()
    before = runs()
    assert retrain()[0] == 4 and runs() == before  # the same once more

    # 3: the images of the training classes are shuffled among them
    spoil(images, [name for name, split in splits(grown).items() if split == "train"])
    code, spoilt = retrain()
    assert (code, spoilt["outcome"], spoilt["champion"]) == (3, "kept", 2), spoilt
    assert spoilt["high"] < 0 and spoilt["version"] == 3 and "not all above the margin" in spoilt["reason"]
    assert aliases() == {"challenger": 3, "champion": 2, "previous": 1}
    before = runs()
    code, again = retrain()
    assert (code, again["outcome"], aliases()["champion"]) == (4, "unchanged", 2) and runs() == before
    assert "a challenger was trained on these data already" in again["reason"]
    assert retrain("retrain.exit_zero=true")[0] == 0


def stamps(home: Path) -> dict[str, tuple[int, int]]:
    found = {path.name: path.stat() for path in (home / "datasets" / "growing").glob("shard-*.arrow")}
    assert found
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in found.items()}


def splits(manifest: Any) -> dict[str, str]:
    """The split of every class."""
    return {manifest.class_names[n]: split for split, members in manifest.splits.items() for n in members}
