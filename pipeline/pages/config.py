"""The configuration of a report, checked. Keys and defaults stand in ``conf/report.yaml``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.config import Section
from pipeline.evaluation.config import Counts
from pipeline.registry.tracking_config import TrackingConfig
from pipeline.training.config import Cluster, Count, Name, Positive

Head = Literal["svm", "ridge", "prototypes", "nearest", "linear", "cosine", "maml"]


class FineTune(Section):
    steps: Count
    lr: Positive
    norm: Literal["running", "batch"]


class ReportConfig(Section):
    what: Literal[
        "pages", "cross_table", "cross_domain", "clustering", "strangers",
        "results", "reproduction", "campaign", "embeddings",
    ]  # fmt: skip
    published: str | None
    runs: list[Name]
    storage: str
    dataset: str | None
    datasets: list[Name]
    split: str
    strangers: str | None
    way: Count
    shot: Counts
    query: Count
    episodes: Count
    tasks: Count
    seed: int
    heads: Annotated[list[Head], Field(min_length=1)]
    fine_tune: FineTune
    pairs: Annotated[int, Field(ge=2)]
    classes: Annotated[int, Field(ge=2)]
    images: Count | None
    projection: Literal["lda", "pca"]
    output: str | None
    record: str | None
    cluster: Cluster
    tracking: TrackingConfig
