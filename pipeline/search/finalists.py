"""Who wins: the best configurations trained again with other seeds, and compared on the same validation episodes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline import store
from pipeline.errors import PipelineError
from pipeline.evaluation.evaluate import EpisodicProtocol, evaluate
from pipeline.evaluation.statistics import Comparison, Estimate, estimate, paired
from pipeline.search.campaign import Campaign
from pipeline.search.ledger import Record, ranked
from pipeline.search.space import Values
from pipeline.training.models import model_of_run
from pipeline.training.runs import read_run

MEASURED = "validation"  # folder of a campaign: accuracy of every episode, a file a run


@dataclass(frozen=True)
class Standing:
    """A configuration among the finalists.

    Attributes:
        accuracies: [seeds, episodes] of its runs, in the order of the seeds; zeros where a run failed.
        trained: [seeds] whether its run did not fail.
        run: the best of its runs; None: all failed.
    """

    record: Record
    accuracies: np.ndarray
    trained: np.ndarray
    run: str | None

    @property
    def by_seed(self) -> np.ndarray:
        """[seeds] accuracy"""
        return self.accuracies.mean(axis=1)

    @property
    def estimate(self) -> Estimate:
        """Mean over the seeds, with Student's interval."""
        return estimate(self.by_seed, student=True)


@dataclass(frozen=True)
class Verdict:
    """The standings, best first; and the winner against the default, in pairs, by the seeds with which both trained."""

    standings: list[Standing]
    default: Standing | None  # None: it was not trained, or with no seed of the winner's
    over_episodes: Comparison | None  # of the means over the seeds: does it hold for other episodes?
    over_seeds: Comparison | None  # of the means over the episodes: does it hold for other seeds?

    @property
    def winner(self) -> Standing:
        return self.standings[0]


def choose(records: Sequence[Record], default: Values, count: int, select: str) -> list[Record]:
    """The best ``count`` distinct configurations that finished, and the default's trial beside them."""
    chosen: list[Record] = []
    for record in ranked(records, select):
        if len(chosen) < count and all(record.values != other.values for other in chosen):
            chosen.append(record)
    if chosen and all(record.values != default for record in chosen):
        chosen += [record for record in records if record.values == default][:1]
    return chosen


def judge(
    chosen: Sequence[Record], default: Values, measured: Mapping[str, np.ndarray], runs: Mapping[int, Sequence[str]]
) -> Verdict:
    """Compare the chosen configurations.

    Args:
        measured: [episodes] accuracies of every run that finished, on the same episodes.
        runs: of every configuration by its number, in the order of the seeds.
    """
    if not measured:
        raise PipelineError("no finalist could be trained; the ledger has the reasons")
    nothing = np.zeros_like(next(iter(measured.values())))
    standings = []
    for record in chosen:
        names = runs[record.number]
        accuracies = np.stack([measured.get(name, nothing) for name in names])
        alive = [name for name in names if name in measured]
        best = max(alive, key=lambda name: measured[name].mean(), default=None)
        standings.append(Standing(record, accuracies, np.asarray([name in measured for name in names]), best))
    standings.sort(key=lambda standing: (-float(standing.by_seed.mean()), standing.record.number))
    winner = standings[0]
    reference = next((standing for standing in standings if standing.record.values == default), None)
    if reference is None or reference is winner:
        return Verdict(standings, reference, None, None)
    both = reference.trained & winner.trained
    if not both.any():
        return Verdict(standings, None, None, None)
    episodes = paired(reference.accuracies[both].mean(axis=0), winner.accuracies[both].mean(axis=0))
    seeds = paired(reference.by_seed[both], winner.by_seed[both]) if both.sum() > 1 else None
    return Verdict(standings, reference, episodes, seeds)


def measure(campaign: Campaign, run: str) -> np.ndarray:
    """[episodes] accuracy of a run's chosen checkpoint on the campaign's validation episodes; computed once."""
    where = store.join(campaign.uri, MEASURED, f"{run}.json")
    if store.exists(where):
        return np.asarray(json.loads(store.read_bytes(where)), dtype=np.float64)
    how = campaign.train.validation
    shape: dict[str, Any] = {"way": how.way, "shot": how.shot, "query": how.query}
    protocol = EpisodicProtocol(
        campaign.train.dataset_uri, how.split, **shape, episodes=how.episodes, seed=how.seed, tasks=how.tasks
    )
    model = model_of_run(read_run(store.join(campaign.uri, run)))
    accuracies = evaluate(model, [protocol], campaign.train.cluster.gpus_per_worker)[0].accuracies
    store.write_bytes(where, json.dumps(accuracies.tolist()).encode())
    return accuracies
