"""What a model card shows and a table of accuracies does not: measured at evaluation, kept as JSON and one image.

Confusion among test classes, how far stated probabilities can be believed, a projection of unseen classes, and the
episodes that the model fails on, by number and with their images. Pages are made from these two files alone.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from pipeline.charts.classes import project
from pipeline.data.dataset import ClassTable, Dataset, class_table
from pipeline.data.episodes import Plan, plan_episodes
from pipeline.data.features import Pictures
from pipeline.data.manifest import FEATURES
from pipeline.evaluation.embedded import Embeddings, class_features
from pipeline.evaluation.episodic import answer, evaluating
from pipeline.evaluation.evaluate import EpisodicProtocol
from pipeline.evaluation.seen import TRAINED
from pipeline.inference.temperature import reliability
from pipeline.methods.base import Method, one_task_at_once
from pipeline.nets.preprocess import Preprocess
from pipeline.registry.masking import mask

CARD, SHEET = "card.json", "card.png"  # files of a run's report
FORMAT = 1
IMAGES = 2000  # through the network at once
MOST_IMAGES = 5000  # through a network that is adapted to every task, more or less: it is on one core
MOST_EPISODES = 200
PAIRS, HARD, FAILED, LISTED = 20, 12, 6, 20
PROJECTED_CLASSES, PROJECTED_IMAGES = 10, 20
SAMPLES, WRONG = 3, 12  # images shown of a class; wrong answers shown of a class of an episode
THUMBNAIL, COLUMNS = 48, 32  # pixels; images in a row of the sheet


def draw_card(
    method: Method,
    preprocess: Preprocess,
    dataset: Dataset,
    protocol: EpisodicProtocol,
    accuracies: np.ndarray,
    origin: dict[str, Any],
    temperature: float = 1.0,
    embeddings: Embeddings | None = None,
) -> dict[str, bytes]:
    """File name to content.

    Args:
        method: in evaluation mode or not, on the CPU.
        embeddings: of the protocol's split, where they are known.
        protocol: whose episodes are examined, the first of them; the same that ``accuracies`` [episodes] are of.
        origin: what else the card is to tell: of which run and step it is, and by which command that was trained.
        temperature: of the stated probabilities, as calibration found it.
    """
    table = class_table(dataset.manifest, protocol.split)
    with evaluating(method):
        looker = Looker(method, preprocess, dataset, embeddings, temperature)
        numbers = np.arange(min(protocol.episodes, looker.episodes(protocol)))
        examined = looker.answer(table, protocol, numbers)
        sheet = _Sheet(dataset, table)
        pairs, by_class = _confused(examined, table)
        hard = _hard(pairs, by_class, len(table))
        worst = np.lexsort((np.arange(len(accuracies)), accuracies))[:LISTED]
        failed = looker.answer(table, protocol, np.sort(worst[:FAILED]))
        content = {
            "format": FORMAT,
            **origin,
            "data": _data(dataset, sheet),
            "question": {k: getattr(protocol, k) for k in ("split", "way", "shot", "query", "episodes", "seed")},
            "examined": len(numbers),
            "accuracy": float(np.mean([found.right.mean() for found in examined])),
            "reliability": reliability(
                *(np.concatenate([getattr(found, kind) for found in examined]) for kind in ("confidence", "right"))
            ),
            "pairs": [
                {"true": sheet.member(t), "given": sheet.member(g), "count": n, "asked": of} for t, g, n, of in pairs
            ],
            "matrix": _matrix(looker, table, protocol, hard, sheet),
            "embedding": _embedding(looker, table, sheet),
            "worst": [[int(number), float(accuracies[number])] for number in worst],
            "failures": [_failure(found, sheet) for found in sorted(failed, key=lambda f: (f.right.mean(), f.number))],
        }
    content |= {"classes": sheet.classes, "tiles": sheet.description}
    return {CARD: json.dumps(content).encode(), SHEET: sheet.png()}


@dataclass(frozen=True)
class _Answered:
    """One episode with the model's answers. Classes are positions in the split's table."""

    number: int
    classes: np.ndarray  # [way]
    rows: np.ndarray  # [S + Q] of the dataset
    labels: np.ndarray  # [S + Q], places in classes
    support: int
    answers: np.ndarray  # [Q], places in classes
    confidence: np.ndarray  # [Q], probability of the answer

    @property
    def right(self) -> np.ndarray:
        return self.answers == self.labels[self.support :]

    @property
    def true_and_given(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the queries' classes [Q], and of those that were answered [Q]."""
        return self.classes[self.labels[self.support :]], self.classes[self.answers]


@dataclass(frozen=True)
class Looker:
    """A model that answers episodes, from the embeddings of the split where there are any."""

    method: Method
    preprocess: Preprocess
    dataset: Dataset
    embeddings: Embeddings | None
    temperature: float = 1.0

    def episodes(self, protocol: EpisodicProtocol) -> int:
        """So many episodes of this form are looked at, at most."""
        if self.embeddings is not None or self.dataset.manifest.encoding == FEATURES:  # they cost little
            return MOST_EPISODES
        images = protocol.way * (protocol.shot + protocol.query)
        return max(1, min(MOST_EPISODES, MOST_IMAGES // 2 // images))

    def answer(self, table: ClassTable, protocol: EpisodicProtocol, numbers: np.ndarray) -> list[_Answered]:
        """The episodes ``numbers`` of ``protocol``, drawn from ``table``, which may be a part of the split."""
        out: list[_Answered] = []
        chunk = max(1, IMAGES // (protocol.way * (protocol.shot + protocol.query)))
        chunk = 1 if one_task_at_once(self.method) else chunk
        for start in range(0, len(numbers), chunk):
            plan = plan_episodes(table, protocol.spec, protocol.seed, numbers[start : start + chunk])
            out += self.answers(table, plan)
        return out

    def answers(self, table: ClassTable, plan: Plan) -> Iterator[_Answered]:
        """Every episode of a plan that was drawn from ``table``."""
        logits, _ = answer(self.method, self.preprocess, self.dataset, plan, embeddings=self.embeddings)
        probabilities = (logits.float() / self.temperature).softmax(-1)
        confidence, answers = (part.numpy() for part in probabilities.max(-1))
        classes = table.find(plan.classes)
        for i, number in enumerate(plan.numbers):
            rows, known = plan.rows[i], plan.labels[i]
            yield _Answered(int(number), classes[i], rows, known, plan.support, answers[i], confidence[i].astype(float))


def _confused(examined: Sequence[_Answered], table: ClassTable) -> tuple[list[tuple[int, int, int, int]], np.ndarray]:
    """The most confused pairs (true, given, queries so answered, queries asked while both were there), and the share
    of right answers of every class [classes], NaN where it was not asked."""
    count = len(table)
    codes, asked = [], []
    total, right = np.zeros(count), np.zeros(count)
    for found in examined:
        truth, given = found.true_and_given
        codes.append(truth * count + given)
        np.add.at(total, truth, 1)
        np.add.at(right, truth, truth == given)
        asked.append((truth[:, None] * count + found.classes[None]).reshape(-1))
    present, times = np.unique(np.concatenate(asked), return_counts=True)
    kinds, counts = np.unique(np.concatenate(codes), return_counts=True)
    wrong = kinds // count != kinds % count
    kinds, counts = kinds[wrong], counts[wrong]
    chances = times[np.searchsorted(present, kinds)]
    order = np.lexsort((kinds, -counts / chances, -counts))[:PAIRS]
    pairs = [(int(kinds[i] // count), int(kinds[i] % count), int(counts[i]), int(chances[i])) for i in order]
    with np.errstate(invalid="ignore"):
        return pairs, right / total


def _hard(pairs: Sequence[tuple[int, int, int, int]], by_class: np.ndarray, count: int) -> np.ndarray:
    """Positions of the classes that are mistaken most, at most :data:`HARD`."""
    asked = np.flatnonzero(~np.isnan(by_class))
    weakest = asked[np.argsort(by_class[asked], kind="stable")]
    others = np.arange(count)
    order = dict.fromkeys([*(c for pair in pairs for c in pair[:2]), *weakest.tolist(), *others.tolist()])
    return np.sort(np.asarray(list(order)[: min(HARD, count)]))


def _matrix(
    looker: Looker, table: ClassTable, protocol: EpisodicProtocol, hard: np.ndarray, sheet: _Sheet
) -> dict[str, Any] | None:
    """How often each of the hard classes is taken for each other one, in episodes among them."""
    chosen = ClassTable(table.ids[hard], table.starts[hard], table.counts[hard], table.split)
    way = looker.method.fixed_way or len(hard)
    query = min(protocol.query, int(chosen.counts.min()) - protocol.shot)
    if way > len(hard) or query < 1:
        return None
    among = replace(protocol, way=way, query=query, balanced_query=True)
    episodes = looker.episodes(among)
    counts, asked = (np.zeros((len(hard), len(hard)), dtype=np.int64) for _ in range(2))
    for found in looker.answer(chosen, among, np.arange(episodes)):
        truth, given = found.true_and_given
        np.add.at(counts, (truth, given), 1)
        np.add.at(asked, (truth[:, None], found.classes[None]), 1)
    return {
        "classes": [sheet.member(int(position)) for position in hard],
        "counts": counts.tolist(),
        "asked": asked.tolist(),
        **{"way": way, "shot": protocol.shot, "query": query, "episodes": episodes},
    }


def _embedding(looker: Looker, table: ClassTable, sheet: _Sheet) -> dict[str, Any]:
    """Features of a few classes, evenly spaced in the split, on their first two principal components."""
    features, chosen, each = class_features(
        looker.method, looker.preprocess, looker.dataset, table, PROJECTED_CLASSES, PROJECTED_IMAGES, looker.embeddings
    )
    if not np.isfinite(features).all():
        return {"points": [], "variance": [0.0, 0.0], "images": each}
    points, variance = project(features)
    members = np.repeat([sheet.member(int(position)) for position in chosen], each)
    return {
        "points": [[float(x), float(y), int(m)] for (x, y), m in zip(points, members, strict=True)],
        "variance": [float(share) for share in variance],
        "images": each,
    }


def _failure(found: _Answered, sheet: _Sheet) -> dict[str, Any]:
    """An episode with its support images and the queries that were mistaken; a class without mistakes has only its
    support images, by which the others can be understood."""
    queries, labels = found.rows[found.support :], found.labels[found.support :]
    classes = []
    for place, position in enumerate(found.classes.tolist()):
        support = found.rows[: found.support][found.labels[: found.support] == place]
        mine = np.flatnonzero(labels == place)
        wrong = mine[found.answers[mine] != place]
        classes.append(
            {
                "class": sheet.member(position, tiles=False),
                "support": [sheet.tile(int(row), position) for row in support[:5]],
                "asked": len(mine),
                "right": len(mine) - len(wrong),
                "wrong": [
                    {"tile": sheet.tile(int(queries[i]), position), "given": int(found.answers[i])}
                    for i in wrong[:WRONG]
                ],
            }
        )
    return {"number": found.number, "accuracy": float(found.right.mean()), "classes": classes}


def _data(dataset: Dataset, sheet: _Sheet) -> dict[str, Any]:
    manifest = dataset.manifest
    turns = len(manifest.rotations)
    return {
        "name": manifest.name,
        "fingerprint": manifest.fingerprint,
        "images": manifest.rows,
        "source": mask({key: value for key, value in manifest.source.items() if key not in ("archives", TRAINED)}),
        "shape": list(manifest.shape),
        "rotations": list(manifest.rotations),
        "classes": {split: len(members) * turns for split, members in manifest.splits.items()},
        "counts": [int(min(manifest.class_counts)), int(max(manifest.class_counts))],
    }


class _Sheet:
    """Small images, each once, on one picture; and the classes that are spoken of, by their place in a list."""

    def __init__(self, dataset: Dataset, table: ClassTable) -> None:
        self._manifest, self._table, self._pictures = dataset.manifest, table, Pictures(dataset)
        self._tiles: dict[tuple[int, int], int] = {}  # by row and turn
        self._members: dict[int, int] = {}  # by position in the table
        self._images: list[Image.Image] = []
        self.classes: list[dict[str, Any]] = []

    def member(self, position: int, tiles: bool = True) -> int:
        """The place of a class in the list, with the first of its images as samples."""
        if position not in self._members:
            self._members[position] = len(self.classes)
            manifest, turn = self._manifest, self._turn(position)
            name = manifest.class_names[int(self._table.ids[position]) // len(manifest.rotations)]
            self.classes.append({"name": f"{name} {turn}°" if turn else name, "tiles": []})
        entry = self.classes[self._members[position]]
        if tiles and not entry["tiles"]:
            start, count = int(self._table.starts[position]), int(self._table.counts[position])
            entry["tiles"] = [self.tile(start + i, position) for i in range(min(SAMPLES, count))]
        return self._members[position]

    def tile(self, row: int, position: int) -> int:
        """The place on the sheet of a dataset's row, turned as its class is."""
        degrees = self._turn(position)
        key = (row, degrees)
        if key not in self._tiles:
            self._tiles[key] = len(self._images)
            pixels = np.rot90(self._pictures.of(np.asarray([row]))[0], degrees // 90, axes=(1, 2))
            grey = pixels.shape[0] == 1
            image = Image.fromarray(np.ascontiguousarray(pixels[0] if grey else pixels[:3].transpose(1, 2, 0)))
            if max(image.size) > THUMBNAIL:
                image.thumbnail((THUMBNAIL, THUMBNAIL))
            self._images.append(image)
        return self._tiles[key]

    @property
    def description(self) -> dict[str, Any]:
        width, height = self._images[0].size if self._images else (1, 1)
        return {"file": SHEET, "columns": COLUMNS, "width": width, "height": height, "count": len(self._images)}

    def png(self) -> bytes:
        width, height = self._images[0].size if self._images else (1, 1)
        rows = max(1, -(-len(self._images) // COLUMNS))
        sheet = Image.new(self._images[0].mode if self._images else "L", (COLUMNS * width, rows * height))
        for number, image in enumerate(self._images):
            sheet.paste(image, (number % COLUMNS * width, number // COLUMNS * height))
        buffer = io.BytesIO()
        sheet.save(buffer, "png", optimize=True)
        return buffer.getvalue()

    def _turn(self, position: int) -> int:
        rotations = self._manifest.rotations
        return int(rotations[int(self._table.ids[position]) % len(rotations)])
