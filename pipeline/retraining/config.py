"""The configuration of ``jobs.retrain``: that of a training, and a section of its own."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from pipeline import store
from pipeline.config import Config, Section, config_hash, validate
from pipeline.config_kinds import Count, Name, Positive, Real
from pipeline.data.dataset import class_table
from pipeline.data.episodes import EpisodeSpec, check_spec
from pipeline.data.manifest import Manifest
from pipeline.errors import PipelineError
from pipeline.model import build_model
from pipeline.registry.promotion import Contest, PromoteConfig
from pipeline.renamed import at_first
from pipeline.training.check import model_spec
from pipeline.training.config import TrainConfig
from pipeline.training.paths import absolute
from pipeline.weights import settle

ELSEWHERE = ("name", "storage", "resume", "cluster", "tracking", "register_as", "initial")  # change no result
Word = Annotated[bool | str, BeforeValidator(lambda value: str(value) if type(value) in (int, float) else value)]


class RetrainSection(Section):
    """Keys of the section ``retrain`` of ``conf/retrain.yaml``."""

    ingest: bool
    max_skipped_fraction: Annotated[Real, Field(ge=0, le=1)]
    shard_mb: Annotated[int, Field(ge=1, le=1024)]
    max_age_days: Positive | None
    force: Word
    start: Literal["scratch", "warm"]
    attempts: Count
    promotion: Contest
    exit_zero: bool
    lease: Positive


@dataclass(frozen=True)
class Settings:
    """A checked configuration."""

    train: TrainConfig
    raw: Config  # of the training, as plain containers
    retrain: RetrainSection
    name: Name  # of the registered model

    @property
    def uri(self) -> str:
        """The folder that keeps what retrainings of this model did."""
        return store.join(self.train.storage, f"{self.name}.retraining")

    @property
    def recipe(self) -> str:
        """What the challenger is, apart from its data: a hash of how it is trained."""
        kept = {key: value for key, value in self.raw.items() if key not in ELSEWHERE}
        kept["data"] = self.raw["data"]["name"]
        return config_hash({**at_first(kept), "start": self.retrain.start})[:16]

    def promotion(self, version: int, images: str) -> PromoteConfig:
        """As ``jobs.promote`` would be asked for this version, on the dataset ``images``."""
        return PromoteConfig(
            name=self.name,
            challenger=str(version),
            rollback=False,
            dataset=images,
            seen=True,  # was asked before the training, by refuse_seen_classes: what is trained since is decided on
            cluster=self.train.cluster,
            tracking=self.train.tracking,  # type: ignore[arg-type]
            **self.retrain.promotion.model_dump(),
        )

    def check_promotion(self, images: Manifest, trained_on: Manifest) -> None:
        """Refuse a contest that the images or the method cannot serve, before anything is trained for it.

        ``trained_on``: the dataset of the training: those images, or features of them.
        """
        how, training = self.retrain.promotion, self.train.train.split
        both = set(how.split.split("+")) & set(training.split("+"))
        if both and self.train.steps:
            raise PipelineError(
                f"retrain.promotion.split={how.split}: the challenger is trained on split {min(both)!r} "
                f"(train.split={training}) and would win by it; name a split that is not trained on"
            )
        table = class_table(images, how.split)
        check_spec(table, EpisodeSpec(how.way, how.shot, how.query), "retrain.promotion")
        train = self.train.model_copy(update={"backbone": settle(self.train.backbone)})
        fixed = build_model(model_spec(train, trained_on)).fixed_way
        if fixed not in (None, how.way):
            raise PipelineError(
                f"retrain.promotion.way={how.way}: {self.train.method['name']} trained with {fixed} ways answers for "
                f"{fixed} classes only: set retrain.promotion.way={fixed}"
            )

    def ingest(self) -> dict[str, Any]:
        """As ``jobs.ingest`` would be asked."""
        how = self.retrain.model_dump(include={"max_skipped_fraction", "shard_mb"})
        return {"data": self.raw["data"], "overwrite": True, **how}


def settings_of(raw: Config) -> Settings:
    """Check everything that needs neither data nor store.

    Raises:
        PipelineError: a wrong key or value.
    """
    raw = dict(raw)
    section = validate(_Whole, {"retrain": raw.pop("retrain", {})}).retrain
    data = {**raw["data"], "root": absolute("data.root", str(raw["data"]["root"]))}
    raw = {**raw, "data": data, "storage": absolute("storage", str(raw["storage"]))}
    train = validate(TrainConfig, raw)
    for key, instead in (
        ("name", "a retraining names its runs itself"),
        ("resume", "the same command goes on with it"),
    ):
        if getattr(train, key) is not None:
            raise PipelineError(f"{key}={getattr(train, key)}: {instead}; leave it out")
    if train.initial is not None:
        raise PipelineError(f"initial={train.initial}: retrain.start=warm begins with the champion's weights")
    if train.register_as is None:
        raise PipelineError("register_as must be given: the name of the registered model whose champion is challenged")
    if train.tracking.get("uri") is None:
        raise PipelineError(
            "tracking.uri is null: champions live in an MLflow store; give tracking=embedded or =server"
        )
    return Settings(train, raw, section, train.register_as)


class _Whole(Section):
    retrain: RetrainSection
