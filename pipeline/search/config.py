"""The configuration of a campaign, checked. Keys and defaults stand in ``conf/tune.yaml``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from pipeline.config import Section
from pipeline.training.config import Count, Name, Positive

Nonnegative = Annotated[int, Field(ge=0)]


class Objective(Section):
    """The validation episodes that all trials are measured on; null: as the base configuration has it."""

    split: str | None
    way: Count | None
    shot: Count | None
    query: Count | None
    episodes: Count | None
    seed: int | None


class Search(Section):
    kind: Literal["tpe", "random"]
    startup: Nonnegative
    seed: int


def _renamed(kind: Any) -> Any:
    return "pbt" if kind == "population" else kind  # campaigns of an earlier release go on


class Scheduler(Section):
    kind: Annotated[Literal["asha", "hyperband", "pbt", "none"], BeforeValidator(_renamed)]
    grace: Count | None
    factor: Annotated[int, Field(ge=2)]


class Finalists(Section):
    count: Nonnegative
    seeds: Nonnegative


class Settings(Section):
    """What else is set where some values are chosen."""

    when: dict[str, Any]
    set: list[str]


class CampaignConfig(Section):
    """Keys of ``conf/tune.yaml``."""

    campaign: Name | None
    name: Name | None
    storage: str
    resume: Name | None
    base: list[str]
    overrides: list[str]
    space: dict[str, Any]
    fix: list[str]
    settings: list[Settings]
    first: list[dict[str, Any]]
    objective: Objective
    trials: Count
    search: Search
    scheduler: Scheduler
    finalists: Finalists
    cpus_per_trial: Positive | None
    gpus_per_trial: Positive | None
    concurrent: Count | None
    register_as: Name | None
    tracking: dict[str, Any]
