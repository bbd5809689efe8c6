"""The charts of a campaign, as files."""

from __future__ import annotations

from pipeline.charts.campaign import Finalist, accuracy_over, parallel_coordinates, trials_over_time
from pipeline.charts.style import Kind
from pipeline.search.campaign import Campaign
from pipeline.search.finalists import Verdict
from pipeline.search.ledger import Ledger


def draw_campaign(campaign: Campaign, ledger: Ledger, verdict: Verdict | None) -> dict[str, bytes]:
    """Every chart as SVG and PNG, by file name."""
    records, select, space = ledger.search, campaign.train.validation.select, campaign.space.dimensions
    standings = verdict.standings if verdict and campaign.config.finalists.seeds > 1 else []
    finalists = [Finalist(s.record.values, s.estimate.mean, s.estimate.interval) for s in standings]
    out: dict[str, bytes] = {}
    kinds: tuple[Kind, Kind] = ("svg", "png")
    for kind in kinds:
        for key, dimension in space.items():
            if dimension.choices is None and any(key in record.values and record.curve for record in records):
                out[f"accuracy_over_{key}.{kind}"] = accuracy_over(
                    key, space, records, select, campaign.default, finalists, f"Accuracy over {key}", kind
                )
        out[f"parallel_coordinates.{kind}"] = parallel_coordinates(space, records, select, kind)
        out[f"trials_over_time.{kind}"] = trials_over_time([*records, *ledger.repetitions], select, kind)
    return out
