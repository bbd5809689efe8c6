"""The page of a registered model: its model card, of the version that is champion or is to become it."""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from pipeline.charts.accuracy import accuracy_by_shot, error_rates, learning_curve, lines_of, reliability
from pipeline.charts.classes import projection
from pipeline.commands import command
from pipeline.inference.calibration import FEWEST, REPORTED
from pipeline.inference.rates import MOST, borne_out
from pipeline.pages.card import CARD, SHEET
from pipeline.pages.facts import Calibration, Card, Data, Decision, Matrix, Pair, Point, Result, checked
from pipeline.pages.images import Sheet
from pipeline.pages.inline import inline
from pipeline.pages.leaderboard import paper_rows, parameters, results_of
from pipeline.pages.published import Row, printed
from pipeline.pages.reading import Files, Registered, Version, name_of
from pipeline.pages.render import when
from pipeline.pages.tables import Cell, Column, Table, number, share, table
from pipeline.registry.aliases import DECISION_TAG
from pipeline.registry.record import CONFIG, ENVIRONMENT
from pipeline.registry.tracking import RUN_TAG
from pipeline.registry.tracking_config import naming
from pipeline.training.runs import CALIBRATION, REPORT

RECIPE = {  # what of a configuration is shown without asking
    "method.name": "method", "backbone.name": "backbone", "backbone.model": "network",
    "backbone.weights": "first weights",
    "backbone.trained_on": "weights trained on (its classes may be among those of the test)",
    "backbone.weights_sha256": "SHA-256 of the first weights", "data.name": "data set", "train.split": "training split",
    "train.way": "way", "train.shot": "shot", "train.query": "queries per class",
    "train.meta_batch_size": "episodes per step",
    "steps": "steps", "optimizer.name": "optimiser", "optimizer.lr": "learning rate", "schedule.name": "schedule",
    "validation.select": "checkpoint chosen by", "seed": "seed", "cluster.workers": "workers",
}  # fmt: skip
HEAT = 9  # levels of a confusion's colour
MOST_LINES = 7
OF_POINT: dict[str, Column] = {  # of every table of a calibration
    "classes": lambda p: number(p.way, "d"),
    "images each": lambda p: number(p.shot, "d"),
}


class Drawn(NamedTuple):
    """A chart and its figures."""

    plot: Markup
    table: Table


def model_context(
    model: Registered, files: Files, papers: Sequence[Row], tracking: Mapping[str, Any]
) -> dict[str, Any]:
    """What the template shows; ``tracking``: the store that all is read from."""
    version = model.shown
    missing: list[tuple[str, str]] = []  # what, and the command that adds it
    context: dict[str, Any] = {
        "model": model,
        "version": version,
        "names": [alias for alias, of in model.aliases.items() if version and of == version.number],
        "versions": _versions(model),
        "decisions": _decisions(model),
        "missing": missing,
        "papers": bool(papers),
        "run": None,
        "card": None,
    }
    if version is None or version.run is None:
        missing.append(("its run is no longer in the tracking store, and with it all but the versions below", ""))
        return context
    run_id, run, params = version.run.info.run_id, name_of(version.run), parameters(version.run)
    card = checked(Card, files.json(run_id, f"{REPORT}/{CARD}"))
    calibration = checked(Calibration, files.json(run_id, f"{REPORT}/{CALIBRATION}"))
    context |= {
        "run": run,
        "accuracy": _accuracy(results_of(files, version.run), params, version, papers, card.untrained if card else []),
        "curve": _curve(files, run_id),
        "recipe": [(name, str(params[key])) for key, name in RECIPE.items() if params.get(key) is not None],
        "config": files.text(run_id, CONFIG),
        "environment": _environment(files.json(run_id, ENVIRONMENT), version),
        "calibration": calibration,
        **(_calibration(calibration) if calibration else {}),
    }
    if card is not None and card.consistent:
        context |= _card(card, Sheet(files.read(run_id, f"{REPORT}/{SHEET}"), card.tiles))
        step = version.tags.get("step", str(card.step))
        if step != str(card.step):
            other = f"the mistakes of this version; those below are of the same run at step {card.step}, not {step}"
            missing.append((other, ""))
    else:
        where = f"{str(params['storage']).rstrip('/')}/{run}" if "storage" in params else run
        parts = "confusion, reliability, projection and failed episodes; add them with"
        missing.append((parts, command("evaluate", f"run={where}", "publish=true", *naming(tracking))))
    return context


def _versions(model: Registered) -> Table:
    def aliases(version: Version) -> str:
        return " ".join(f"@{alias}" for alias, of in model.aliases.items() if of == version.number)

    def accuracy(setting: str, version: Version) -> Cell:
        return share(*version.accuracies.get(setting, (None, None)))

    settings = list(dict.fromkeys(setting for version in model.versions for setting in version.accuracies))[:6]
    return table(
        "versions", "Versions, accuracies in percent ± 95 % interval", model.versions,
        {
            "version": lambda v: number(v.number, "d", note=aliases(v)),
            **{setting: partial(accuracy, setting) for setting in settings},
            "made": lambda v: Cell(when(v.entity.creation_timestamp), float(v.entity.creation_timestamp)),
            "data": lambda v: Cell(v.tags.get("dataset.name", ""), note=v.tags.get("dataset.fingerprint", "")[:12]),
            "run": lambda v: Cell(v.tags.get(RUN_TAG, ""), code=True),
        },
    )  # fmt: skip


def _decisions(model: Registered) -> Table:
    found = []
    for version in model.versions:
        with suppress(ValueError, RecursionError):
            found.append(checked(Decision, json.loads(version.tags.get(DECISION_TAG, "null"))))
    return table(
        "promotions", "Promotions", filter(None, found),
        {
            "challenger": lambda d: Cell(f"version {d.challenger}", float(d.challenger)),
            "champion then": lambda d: Cell("none" if d.champion is None else f"version {d.champion}"),
            "decision": lambda d: Cell("promoted", mark="good") if d.promoted else Cell("refused", mark="warn"),
            "why": lambda d: Cell(d.reason),
        },
    )  # fmt: skip


def _accuracy(
    results: Sequence[Result], params: dict[str, Any], version: Version, papers: Sequence[Row],
    untrained: Sequence[Result],
) -> Drawn | None:  # fmt: skip
    if not results:
        return None
    _, paper = paper_rows(papers, params, version.tags.get("dataset.name", ""))
    shown = next((r.split for r in results if r.split == "test"), results[0].split)  # a line is of one split's classes
    lines = lines_of([r.model_dump() for r in results if r.way and r.split == shown], paper.values())[:MOST_LINES]
    first = {(r.split, r.setting): r for r in untrained}

    def before(result: Result) -> Cell:
        found = first.get((result.split, result.setting))
        return share(found.accuracy, found.interval) if found else Cell()

    def published(result: Result) -> Cell:
        row = paper.get(result.setting)
        return Cell(printed(row), float(row["accuracy"]), note=str(row["source"])) if row else Cell()

    figures = table(
        "accuracy", "Accuracy with 95 % intervals", sorted(results, key=lambda r: (r.way, r.shot)),
        {
            "way": lambda r: number(r.way, "d"),
            "shot": lambda r: number(r.shot, "d"),
            "accuracy, %": lambda r: share(r.accuracy, r.interval),
            **({"untrained, %": before} if first else {}),
            "published": published,
            "episodes": lambda r: number(r.episodes or None, ","),
            "queries per class": lambda r: number(r.query or None, ","),
            "split": lambda r: Cell(r.split),
            "seed": lambda r: number(r.seed, "d"),
        },
    )  # fmt: skip
    return Drawn(inline(accuracy_by_shot(lines, kind="svg"), "Accuracy by way and shot"), figures)


def _curve(files: Files, run_id: str) -> Drawn | None:
    accuracy, half, loss = (files.metric(run_id, name) for name in ("val/accuracy", "val/interval", "train/loss"))
    if not accuracy:
        return None
    halves = {step: value for step, value in half if math.isfinite(value)}
    points = [(step, value, halves.get(step, 0.0)) for step, value in accuracy if math.isfinite(value)]
    columns = {"step": lambda p: number(p[0], ",.0f"), "validation accuracy, %": lambda p: share(p[1], p[2])}
    figures = table("learning-curve", "Validation accuracy", points, columns)
    return Drawn(inline(learning_curve(points, loss, kind="svg"), "Learning curve"), figures)


def _environment(content: Any, version: Version) -> list[tuple[str, str]]:
    found = content if isinstance(content, dict) else {}
    rows = [(key, str(found[key])[:200]) for key in ("python", "torch", "platform", "code") if key in found]
    gpus = found.get("gpus")
    if isinstance(gpus, list) and gpus:
        rows.append(("GPUs", ", ".join(str(name)[:60] for name in gpus[:16])))
    return [*rows, ("configuration's hash", version.tags.get("config.hash", "")[:16])]


def _calibration(found: Calibration) -> dict[str, Any]:
    points = sorted(found.points, key=lambda p: (p.way, p.shot))
    marks = [
        (f"{p.way} classes, {p.shot} image{'s' if p.shot > 1 else ''}",
         [("strangers that pass", p.false_acceptance), ("enrolled that fail", p.false_rejection)])
        for p in points
    ]  # fmt: skip
    thresholds = table(
        "calibration", "Thresholds and their error rates", points,
        {
            **OF_POINT,
            "threshold": lambda p: number(p.threshold, ".4g"),
            "strangers that pass, %": lambda p: share(p.false_acceptance),
            "enrolled that fail, %": lambda p: share(p.false_rejection),
            "equal error, %": lambda p: share(p.equal_error),
            "accuracy, %": lambda p: share(p.accuracy),
            "enrolled queries": lambda p: number(p.enrolled_queries, ","),
            "strangers": lambda p: number(p.stranger_queries, ","),
        },
    )  # fmt: skip

    def auroc(score: str, point: Point) -> Cell:
        return share(point.auroc.get(score))

    scores = dict.fromkeys(score for p in points for score in p.auroc)
    compared: dict[str, Column] = {**OF_POINT, **{score: partial(auroc, score) for score in scores}}
    caption = "AUROC of the scores that were compared, %"
    return {
        "rates": Drawn(inline(error_rates(marks, "svg"), "Error rates of the threshold for unknown"), thresholds),
        "strangers": _strangers(points),
        "scores": table("scores", caption, [p for p in points if p.auroc], compared),
    }


def _strangers(points: Sequence[Point]) -> Table:
    """How well strangers are told, and what it costs to keep most of them out."""
    caption = "How strangers are told, with 95 % intervals over classes that no threshold was set on"
    doubted = [p for p in points for r in p.rates if r.asked in REPORTED and not borne_out(r.passed.high, r.asked)]
    if doubted:
        fewest = max(p.stranger_classes for p in doubted)
        caption += f"; what is marked is no promise: {fewest} validation classes or fewer leave room for more than "
        caption += f"{MOST:g} times the strangers that were asked for"
    columns: dict[str, Column] = {
        **OF_POINT,
        "score": lambda p: Cell(p.score),
        "AUROC, %": lambda p: share(p.auroc[p.score]),
        "OSCR, %": lambda p: share(p.oscr),
        **{f"enrolled that fail at {100 * a:.0f} % of strangers, %": partial(_failing, a) for a in REPORTED},
        "strangers": lambda p: number(p.stranger_images, ",", note=f"of {p.stranger_classes} classes"),
    }
    return table("strangers", caption, [p for p in points if p.rates and p.score in p.auroc], columns)


def _failing(asked: float, point: Point) -> Cell:
    """Enrolled queries that are refused where a share of the strangers is asked to pass."""
    rate = {rate.asked: rate for rate in point.rates}.get(asked)
    if rate is None or asked < FEWEST / max(point.stranger_images, 1):
        return Cell("too few strangers")
    refused, passed = (f"{100 * s.low:.1f} to {100 * s.high:.1f}" for s in (rate.refused, rate.passed))
    kept = borne_out(rate.passed.high, asked)
    doubt = "" if kept else f"; too few classes to promise {100 * asked:g} %"
    note = f"{refused}; strangers that pass {passed}{doubt}"
    return share(rate.refused.value, note=note, mark="" if kept else "warn")


def _card(card: Card, sheet: Sheet) -> dict[str, Any]:
    def known(place: int) -> Cell:
        member = card.classes[place]
        return Cell(member.name, images=sheet.uris(member.tiles[:3]))

    def mistaken(pair: Pair) -> Cell:
        part = pair.count / pair.asked
        return Cell(f"{pair.count:,} of {pair.asked:,}", part, note=f"{100 * part:.0f} %")

    pairs = {"class": lambda p: known(p.true), "taken for": lambda p: known(p.given), "queries": mistaken}
    worst = {"episode": lambda e: number(e[0], "d"), "accuracy, %": lambda e: share(e[1])}
    return {
        "card": card,
        "sheet": sheet,
        "data": _data(card.data),
        "pairs": table("confusion", "The classes that are confused most", card.pairs, pairs),
        "matrix": _matrix(card, card.matrix) if card.matrix else None,
        "reliability": _reliability(card),
        "projection": _projection(card) if card.embedding.points else None,
        "worst": table("episodes", "The worst episodes", card.worst, worst),
    }


def _data(data: Data) -> list[tuple[str, str]]:
    c, h, w = data.shape
    pixels = f"{data.images:,}, {w} × {h} pixels, {'grey' if c == 1 else f'{c} channels'}"
    order = dict.fromkeys([*(split for split in ("train", "val", "test") if split in data.classes), *data.classes])
    source = {key: value for key, value in data.source.items() if value is not None}
    rows = [
        ("data set", data.name),
        ("images", f"{data.images:,}, {c:,} features of each" if (h, w) == (1, 1) else pixels),
        ("classes", ", ".join(f"{data.classes[split]:,} {split}" for split in order)),
        ("fingerprint", data.fingerprint),
    ]
    if source:
        rows.insert(1, ("source", "; ".join(f"{key} {_text(value)}" for key, value in source.items())))
    if data.counts:
        few, many = data.counts
        rows.insert(2, ("images of a class", f"{few:,}" if few == many else f"{few:,} to {many:,}"))
    if len(data.rotations) > 1:
        rows.insert(3, ("turned copies", "each class turned by " + ", ".join(f"{turn}°" for turn in data.rotations)))
    return rows


def _text(value: Any) -> str:
    return ", ".join(f"{key} {part}" for key, part in value.items()) if isinstance(value, dict) else str(value)


def _matrix(card: Card, found: Matrix) -> dict[str, Any]:
    members = [card.classes[place] for place in found.classes]

    def cell(i: int, j: int) -> dict[str, str]:
        asked, count = found.asked[i][j], found.counts[i][j]
        part = min(1.0, count / asked) if asked else 0.0
        level = math.ceil(HEAT * math.sqrt(part)) if part >= 0.005 else 0
        what = "recognised" if i == j else f"taken for {members[j].name}"
        return {
            "text": f"{100 * part:.0f}" if level else "",
            "kind": f"{'right' if i == j else 'wrong'}{level}",
            "tip": f"{members[i].name} {what}: {count:,} of {asked:,}",
        }

    side = range(len(members))
    columns = {
        "class": lambda at: Cell(members[at[0]].name),
        "answer": lambda at: Cell(members[at[1]].name),
        "queries so answered": lambda at: number(found.counts[at[0]][at[1]], ","),
        "queries asked": lambda at: number(found.asked[at[0]][at[1]], ","),
    }
    answered = [(i, j) for i in side for j in side if found.counts[i][j]]
    return {
        "rows": [(members[i], [cell(i, j) for j in side]) for i in side],
        "table": table("confusion-matrix", "Confusion in figures", answered, columns),
    }


def _reliability(card: Card) -> Drawn:
    bins = [(b.confidence, b.accuracy, b.queries) for b in card.reliability.bins]
    columns = {
        "stated probability, %": lambda b: share(b[0]),
        "right answers, %": lambda b: share(b[1]),
        "queries": lambda b: number(b[2], ","),
    }
    figures = table("reliability", "By the stated probability", bins, columns)
    return Drawn(inline(reliability(bins, "svg"), "Stated probability against share of right answers"), figures)


def _projection(card: Card) -> Drawn:
    found = card.embedding
    names = [card.classes[member].name for member in found.members]
    labels = np.asarray([found.members.index(member) for _, _, member in found.points])
    places = np.asarray([point[:2] for point in found.points])
    columns = {
        "class": lambda p: Cell(card.classes[p[2]].name),
        "first": lambda p: number(p[0], ".4f"),
        "second": lambda p: number(p[1], ".4f"),
    }
    drawn = projection(places, labels, names, found.variance, kind="svg")
    figures = table("projection", "Coordinates", found.points, columns)
    return Drawn(inline(drawn, "Images of unseen classes on a plane"), figures)
