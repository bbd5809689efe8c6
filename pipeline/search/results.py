"""What a campaign found: tables for a terminal, plain data, and charts as files."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from pipeline.charts.campaign import Finalist, accuracy_over, parallel_coordinates, trials_over_time
from pipeline.charts.style import in_both_kinds
from pipeline.evaluation.statistics import Comparison
from pipeline.search.campaign import Campaign
from pipeline.search.finalists import Verdict
from pipeline.search.ledger import Ledger, Record
from pipeline.search.space import Space, Values
from pipeline.tables import percent, text_table


def trials_table(records: Sequence[Record], space: Space, select: str) -> str:
    """A row a trial, in their order; the best is marked."""
    keys = [key for key in space.dimensions if any(key in record.values for record in records)]
    short = _short(keys)
    scores = {record.run: record.score(select) for record in records}
    best = max(
        (score for record in records if record.status == "finished" and (score := scores[record.run])), default=0
    )
    rows = []
    for record in records:
        score = scores[record.run]
        shown = "" if score is None else f"{100 * score:.2f}{' *' if best and score == best else ''}"
        values = [value_text(record.values.get(key, "")) for key in keys]
        rows.append(
            [record.number, *values, f"{record.step:,}", shown, ": ".join(filter(None, [record.status, record.reason]))]
        )
    return text_table(["trial", *short, "steps", "accuracy, %", "status"], rows)


def finalists_table(verdict: Verdict, default: Values) -> str:
    rows = []
    for standing in verdict.standings:
        found = standing.estimate
        shown = percent(found.mean, found.interval if len(standing.by_seed) > 1 else None)
        who = values_text(standing.record.values) + (" (default)" if standing.record.values == default else "")
        rows.append([shown, standing.record.number, " ".join(percent(score) for score in standing.by_seed), who])
    return text_table(["accuracy, %", "trial", "by seed", "configuration"], rows)


def statement(verdict: Verdict) -> str:
    """One sentence: is the winner better than the default?"""
    if verdict.default is None:
        return "the default configuration could not be trained with the best one's seeds: nothing to compare with"
    if verdict.over_episodes is None:
        return "no configuration was better than the default"
    said = [f"{_points(verdict.over_episodes)} over the same episodes"]
    if verdict.over_seeds is not None:
        said.append(f"{_points(verdict.over_seeds)} over the seeds")
    both = verdict.default.trained & verdict.winner.trained
    if not both.all():
        said.append(f"by {both.sum()} of {len(both)} seeds: with the others a run failed")
    intervals = [found for found in (verdict.over_episodes, verdict.over_seeds) if found is not None]
    sure = all(found.better_by(0.0) for found in intervals)
    return f"the best is {'' if sure else 'not measurably '}better than the default: {'; '.join(said)}"


def summary(records: Sequence[Record], verdict: Verdict | None, select: str) -> dict[str, Any]:
    counts = Counter(record.status for record in records)
    found: dict[str, Any] = {
        "trials": [
            {
                "number": record.number, "run": record.run, "seed": record.seed, "values": record.values,
                "status": record.status, "reason": record.reason, "steps": record.step,
                "accuracy": record.score(select),
            }
            for record in records
        ],
        **{status: counts.get(status, 0) for status in ("finished", "stopped", "failed")},
    }  # fmt: skip
    if verdict is not None:
        found["finalists"] = [
            {
                "number": standing.record.number, "values": standing.record.values,
                "accuracy": standing.estimate.mean,
                "interval": standing.estimate.interval if len(standing.by_seed) > 1 else None,
                "by_seed": standing.by_seed.tolist(), "default": standing is verdict.default,
            }
            for standing in verdict.standings
        ]  # fmt: skip
        found["comparison"] = {
            name: None if compared is None else vars(compared)
            for name, compared in (("episodes", verdict.over_episodes), ("seeds", verdict.over_seeds))
        }
        found["statement"] = statement(verdict)
    return found


def value_text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def values_text(values: Values) -> str:
    """``method.scale=10 method.distance=cosine``"""
    return " ".join(f"{key}={value_text(value)}" for key, value in values.items())


def _short(keys: Sequence[str]) -> list[str]:
    """Last parts of keys, where they tell them apart."""
    last = [key.rpartition(".")[2] for key in keys]
    return [part if last.count(part) == 1 else key for key, part in zip(keys, last, strict=True)]


def _points(found: Comparison) -> str:
    return f"{100 * found.difference:+.2f} points ({100 * found.low:+.2f} … {100 * found.high:+.2f})"


def draw_campaign(campaign: Campaign, ledger: Ledger, verdict: Verdict | None) -> dict[str, bytes]:
    """Every chart as SVG and PNG, by file name."""
    records, select, space = ledger.search, campaign.train.validation.select, campaign.space.dimensions
    standings = verdict.standings if verdict and campaign.config.finalists.seeds > 1 else []
    finalists = [Finalist(s.record.values, s.estimate.mean, s.estimate.interval) for s in standings]
    charts = {
        f"accuracy_over_{key}": partial(
            accuracy_over, key, space, records, select, campaign.default, finalists, f"Accuracy over {key}"
        )
        for key, dimension in space.items()
        if dimension.choices is None and any(key in record.values and record.curve for record in records)
    }
    charts["parallel_coordinates"] = partial(parallel_coordinates, space, records, select)
    charts["trials_over_time"] = partial(trials_over_time, [*records, *ledger.repetitions], select)
    return in_both_kinds(charts)
