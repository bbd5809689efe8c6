"""Kinds of values that several configurations share: numbers with their limits, names, and where a job runs."""

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from pipeline.config import Section


def _as_float(value: Any) -> Any:
    """YAML reads 1e-3 as a string and 1 as an integer."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _finite(value: float) -> float:
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError("give a finite number")
    return value


Count = Annotated[int, Field(ge=1)]
Several = Annotated[int, Field(ge=2)]  # of what has a spread
Real = Annotated[float, BeforeValidator(_as_float), AfterValidator(_finite)]
Positive = Annotated[Real, Field(gt=0)]
Share = Annotated[Real, Field(ge=0, lt=1)]
Name = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, int | float) else value)]


class Cluster(Section):
    address: str | None
    workers: Count
    cpus_per_worker: Annotated[Real, Field(gt=0)]
    threads_per_worker: Count | None
    gpus_per_worker: Annotated[Real, Field(ge=0)]
    restarts: Annotated[int, Field(ge=0)]
    object_store_mb: Annotated[int, Field(ge=100)]
    worker_output: bool
