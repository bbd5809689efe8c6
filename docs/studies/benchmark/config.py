"""The configuration of a benchmark, checked. Keys and defaults stand in ``conf/benchmark.yaml``."""

from __future__ import annotations

from pipeline.config import Section
from pipeline.training.config import Cluster, Count, Positive


class BenchmarkConfig(Section):
    what: str
    repetitions: Count
    scale: Positive
    images: str | None
    folder: str | None
    record: str | None
    profile: str | None
    train: list[str]
    cluster: Cluster
