"""How many candidates a campaign gets through in an hour."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Iterator
from pathlib import Path

from docs.studies.benchmark import made
from docs.studies.benchmark.rows import Bench, Finding, ratio, row
from docs.studies.benchmark.timing import interleaved
from pipeline.config import compose
from pipeline.search.arguments import translate
from pipeline.search.campaign import begin
from pipeline.search.ledger import Ledger
from pipeline.search.searchers import SearchTrials, run_trials
from pipeline.search.trial import Trial
from pipeline.training.config import Cluster

CANDIDATES = 6
APART, AGAIN = "a run under Ray Train each", "in processes used again"


class UnderRayTrain(Trial):
    """A trial that launches a run, whatever its workers."""

    @classmethod
    def trains_here(cls, cluster: Cluster) -> bool:
        return False


def candidates_an_hour(bench: Bench, uri: str, trainable: type[Trial], steps: int) -> float:
    """Of the metric scale's campaign, on the cluster that is there already, without finalists."""
    path, cluster = Path(uri), bench.cluster
    arguments = [
        "campaign=metric_scale", "fix.method=prototypical", "fix.method.distance=cosine", f"trials={CANDIDATES}",
        "objective.way=5", "objective.query=5", "objective.episodes=40",
        f"base.steps={steps}", f"base.validation.every={steps}", "base.train.way=5", "base.train.meta_batch_size=1",
        f"base.data.root={path.parent}", f"base.data.name={path.name}", "base.cluster.workers=1",
        f"base.cluster.cpus_per_worker={cluster.cpus_per_worker}",
        f"base.cluster.gpus_per_worker={cluster.gpus_per_worker}",
        f"base.cluster.threads_per_worker={cluster.threads_per_worker or 'null'}",
        f"storage={bench.folder / 'campaigns'}", f"name=benchmark-{time.time_ns()}", "tracking=none",
    ]  # fmt: skip
    campaign = begin(compose("tune", translate(arguments)))
    ledger = Ledger(campaign.uri)
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        run_trials(SearchTrials(campaign, ledger), None, None, trainable)
    took = time.perf_counter() - began
    if unfinished := [record for record in ledger.search if record.status != "finished"]:
        raise RuntimeError(f"{len(unfinished)} of {CANDIDATES} trials did not finish: {unfinished[0].reason}")
    return 3600 * CANDIDATES / took


@row("campaign", needs_ray=True)
def candidates(bench: Bench) -> Iterator[Finding]:
    """Candidates an hour of a campaign whose trials use processes again, against a run under Ray Train for each."""
    uri = made.dataset(bench.folder, made.SMALL)
    for steps in (bench.count(100), bench.count(300)):
        sides = {
            APART: lambda steps=steps: candidates_an_hour(bench, uri, UnderRayTrain, steps),
            AGAIN: lambda steps=steps: candidates_an_hour(bench, uri, Trial, steps),
        }
        found = interleaved(sides, min(2, bench.repetitions), warm_up=0)
        yield ratio(
            f"candidates an hour of a campaign, {steps:,} steps each (prototypical, 5-way 1-shot, Conv-4-64): "
            f"{AGAIN}, against {APART}",
            found, (AGAIN, APART), "candidates/h", least=2.5,
        )  # fmt: skip
