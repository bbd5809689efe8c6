"""The configuration of a training run, checked. Defaults and the meaning of every key stand in ``conf/train.yaml``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from pipeline.config import Section
from pipeline.config_kinds import Cluster, Count, Name, Positive, Share
from pipeline.data.episodes import EpisodeSpec
from pipeline.errors import PipelineError

if TYPE_CHECKING:
    from pipeline.data.augment import Augmentation


def _as_range(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Grouping = Annotated[tuple[Count, Annotated[int, Field(ge=2)]], BeforeValidator(_as_range)]
Spread = Annotated[int | tuple[int, int], BeforeValidator(_as_range)]


class EpisodeShape(Section):
    way: Spread
    shot: Spread
    query: Spread

    def spec(self, tasks: int = 1, balanced_query: bool = True) -> EpisodeSpec:
        return EpisodeSpec(self.way, self.shot, self.query, tasks, balanced_query)


class Train(EpisodeShape):
    split: str
    meta_batch_size: Count
    balanced_query: bool
    batch_size: Count
    grouping: Grouping | None
    holdout: Share


class Validation(EpisodeShape):
    split: str
    every: Count
    episodes: Count
    tasks: Count
    seed: int
    patience: Count | None
    select: Literal["best", "last"]


class Evaluation(Section):
    untrained: bool
    split: str
    episodes: Count
    tasks: Count
    seed: int
    way: Annotated[list[Count], Field(min_length=1)]
    shot: Annotated[list[Count], Field(min_length=1)]
    query: Count


class Checkpoint(Section):
    every: Count
    keep: Count


class Clip(Section):
    norm: Positive | None
    value: Positive | None


class Augment(Section):
    crop_padding: Annotated[int, Field(ge=0)]
    flip: bool
    jitter: Share
    affine: Annotated[float, Field(ge=0, le=2)] = 0.0

    def build(self) -> Augmentation:
        from pipeline.data.augment import Augmentation  # and with it torch, while Ray can be starting

        return Augmentation(self.crop_padding, self.flip, self.jitter, self.affine)


class Input(Section):
    scaling: Literal["unit", "standard", "none", "backbone"]


class TrainConfig(Section):
    """One run, whole: enough to repeat it."""

    name: Name | None
    storage: str
    seed: int
    steps: Annotated[int, Field(ge=0)]
    data: dict[str, Any]
    method: dict[str, Any]
    backbone: dict[str, Any]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    input: Input
    train: Train
    validation: Validation
    evaluation: Evaluation | None
    checkpoint: Checkpoint
    augmentation: Augment
    clip: Clip
    precision: Literal["float32", "bfloat16", "auto"]
    compile: bool
    deterministic: bool
    materialize: Literal["worker", "cluster", "device"]
    log_every: Count
    cluster: Cluster
    tracking: dict[str, Any]
    register_as: Name | None
    resume: Name | None
    initial: str | None = None

    @property
    def dataset_uri(self) -> str:
        return f"{str(self.data['root']).rstrip('/')}/{self.data['name']}"

    def check_workers(self, regime: str) -> None:
        workers, grouping = self.cluster.workers, self.train.grouping
        shares = [("train.meta_batch_size", self.train.meta_batch_size, 1)] if regime != "classical" else []
        if regime != "episodic":
            shares.append(("train.batch_size", self.train.batch_size, grouping[0] * grouping[1] if grouping else 1))
        for key, number, unit in shares:
            if number % (workers * unit):
                groups = f" in groups of {grouping[0]} x {grouping[1]} images" if grouping and unit > 1 else ""
                raise PipelineError(f"{key}={number} cannot be shared equally by cluster.workers={workers}{groups}")
