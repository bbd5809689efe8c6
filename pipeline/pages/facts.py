"""What files of the store must look like before a page shows them. Anything else is left out, and said to be."""

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from pipeline.charts import campaign as charts

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=2**53)]
Place = Annotated[int, Field(ge=0, le=10**6)]
Name = Annotated[str, Field(max_length=1000)]
M = TypeVar("M", bound="Facts")


class Facts(BaseModel):
    """Unknown keys are passed over: a later version may have more of them."""

    model_config = ConfigDict(extra="ignore", frozen=True)


def checked(kind: type[M], content: Any) -> M | None:
    try:
        return kind.model_validate(content)
    except ValidationError:
        return None


class Result(Facts):
    """Of ``evaluation.json``."""

    split: Name
    way: Count
    shot: Count
    query: Count | None = None
    episodes: Count | None = None
    seed: int | None = None
    accuracy: Share
    interval: FiniteFloat

    @property
    def setting(self) -> str:
        return f"{self.way}-way {self.shot}-shot"


class Interval(Facts):
    value: Share
    low: Share
    high: Share


class Rate(Facts):
    """Of a threshold that lets a share of the strangers pass."""

    asked: Share
    threshold: FiniteFloat
    passed: Interval
    refused: Interval


class Point(Facts):
    way: Count
    shot: Count
    threshold: FiniteFloat
    false_acceptance: Share
    false_rejection: Share
    equal_error: Share
    accuracy: Share
    enrolled_queries: Count
    stranger_queries: Count
    score: Name = "logit"
    auroc: Annotated[dict[Name, Share], Field(max_length=50)] = {}
    oscr: Share | None = None
    rates: Annotated[list[Rate], Field(max_length=100)] = []
    stranger_images: Count = 0
    stranger_classes: Count = 0


class Calibration(Facts):
    target: Share
    split: Name
    points: Annotated[list[Point], Field(max_length=200)]


class Tiles(Facts):
    columns: Annotated[int, Field(ge=1, le=256)]
    width: Annotated[int, Field(ge=1, le=256)]
    height: Annotated[int, Field(ge=1, le=256)]
    count: Annotated[int, Field(ge=0, le=20_000)]


class Known(Facts):
    """A class that is spoken of, and where its samples are on the sheet."""

    name: Name
    tiles: Annotated[list[Place], Field(max_length=10)]


class Data(Facts):
    name: Name
    fingerprint: Name
    images: Count
    shape: tuple[Count, Count, Count]
    rotations: Annotated[list[int], Field(max_length=8)] = []
    source: Annotated[dict[Name, Any], Field(max_length=20)] = {}
    classes: dict[Name, Count]
    counts: tuple[Count, Count] | None = None


class Question(Facts):
    split: Name
    way: Count
    shot: Count
    query: Count
    episodes: Count
    seed: int


class Pair(Facts):
    true: Place
    given: Place
    count: Count
    asked: Annotated[int, Field(ge=1)]


class Matrix(Facts):
    classes: Annotated[list[Place], Field(max_length=40)]
    counts: list[list[Count]]
    asked: list[list[Count]]
    way: Count
    shot: Count
    query: Count
    episodes: Count


class Bin(Facts):
    queries: Count
    confidence: Share
    accuracy: Share


class Reliability(Facts):
    bins: Annotated[list[Bin], Field(max_length=100)]
    error: Share


class Embedding(Facts):
    points: Annotated[list[tuple[FiniteFloat, FiniteFloat, Place]], Field(max_length=5000)]
    variance: tuple[FiniteFloat, FiniteFloat]
    images: Count

    @property
    def members(self) -> list[int]:
        """Places of the classes that have points."""
        return list(dict.fromkeys(member for _, _, member in self.points))


class Wrong(Facts):
    tile: Place
    given: Place


class FailedClass(Facts):
    member: Place = Field(alias="class")
    support: Annotated[list[Place], Field(max_length=20)]
    asked: Count
    right: Count
    wrong: Annotated[list[Wrong], Field(max_length=50)]


class Failure(Facts):
    number: Count
    accuracy: Share
    classes: Annotated[list[FailedClass], Field(max_length=500)]

    @property
    def shown(self) -> list[FailedClass]:
        """The classes with mistakes, and those that were answered instead."""
        given = {wrong.given for member in self.classes for wrong in member.wrong}
        return [member for place, member in enumerate(self.classes) if member.wrong or place in given]


class Card(Facts):
    """Of ``card.json``; places of classes and images are within their lists."""

    run: Name
    step: Count
    arguments: Annotated[list[Name], Field(max_length=500)] = []
    untrained: Annotated[list[Result], Field(max_length=200)] = []
    data: Data
    question: Question
    examined: Count
    accuracy: Share
    reliability: Reliability
    pairs: Annotated[list[Pair], Field(max_length=100)]
    matrix: Matrix | None
    embedding: Embedding
    worst: Annotated[list[tuple[Count, Share]], Field(max_length=200)]
    failures: Annotated[list[Failure], Field(max_length=20)]
    classes: Annotated[list[Known], Field(max_length=5000)]
    tiles: Tiles

    @property
    def consistent(self) -> bool:
        members = [*(m for p in self.pairs for m in (p.true, p.given)), *(m for _, _, m in self.embedding.points)]
        members += [c.member for failure in self.failures for c in failure.classes]
        answers = all(w.given < len(f.classes) for f in self.failures for c in f.classes for w in c.wrong)
        square = True
        if self.matrix is not None:
            members += self.matrix.classes
            tables, side = (self.matrix.counts, self.matrix.asked), len(self.matrix.classes)
            square = all(len(table) == side and all(len(row) == side for row in table) for table in tables)
        return square and answers and max(members, default=-1) < len(self.classes)


class Trial(Facts, charts.Trial):
    """Of ``ledger.jsonl``: a trial of a campaign."""

    number: Count
    run: Name
    values: dict[Name, Any]
    status: Name
    reason: Annotated[str, Field(max_length=5000)] = ""
    curve: Annotated[list[tuple[Count, Share]], Field(max_length=100_000)] = []
    seed: int | None = None
    began: FiniteFloat = 0.0
    ended: FiniteFloat | None = None


class Dimension(Facts):
    """Of ``space.yaml``."""

    low: FiniteFloat | None = None
    high: FiniteFloat | None = None
    log: bool = False
    choices: Annotated[list[Any], Field(max_length=200)] | None = None


class Finalist(Facts):
    number: Count
    values: dict[Name, Any]
    accuracy: Share
    interval: FiniteFloat | None = None
    by_seed: Annotated[list[Share], Field(max_length=100)] = []
    default: bool = False


class Best(Facts):
    values: dict[Name, Any]
    number: Count
    run: Name | None = None
    accuracy: Share


class Summary(Facts):
    """Of ``summary.json``: what a campaign concluded."""

    finalists: Annotated[list[Finalist], Field(max_length=100)] = []
    statement: Annotated[str, Field(max_length=2000)] = ""
    best: Best | None = None


class Decision(Facts):
    """Of a version's tag: challenger against champion."""

    challenger: Count
    champion: Count | None
    promoted: bool
    reason: Annotated[str, Field(max_length=2000)]
