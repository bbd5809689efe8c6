"""The configuration of an evaluation, checked. Keys and defaults stand in ``conf/evaluate.yaml``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from pipeline.config import Section
from pipeline.config_kinds import Cluster, Count
from pipeline.evaluation.generalized import FineTuning


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, int) and not isinstance(value, bool) else value


Counts = Annotated[list[Count], BeforeValidator(_as_list), Field(min_length=1)]


class EvaluateConfig(Section):
    run: str | None
    model: str | None
    compare: str | None
    untrained: bool
    storage: str
    dataset: str | None
    seen: bool
    protocol: Literal["episodic", "generalized", "one_shot_runs"]
    runs: str | None
    split: str
    episodes: Count
    way: Counts
    shot: Counts
    query: Count
    tasks: Count
    seed: int
    fine_tune: FineTuning | None
    output: str | None
    record: str | None
    publish: bool
    cluster: Cluster
    tracking: dict[str, Any]
