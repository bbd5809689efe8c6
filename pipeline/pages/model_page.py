"""The page of a registered model: its model card, of the version that is champion or is to become it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from markupsafe import Markup

from pipeline.charts.accuracy import accuracy_by_shot, error_rates, learning_curve, lines_of, reliability
from pipeline.charts.classes import projection
from pipeline.commands import command
from pipeline.inference.calibration import FEWEST, REPORTED
from pipeline.inference.rates import MOST, borne_out
from pipeline.pages.card import CARD, SHEET
from pipeline.pages.facts import Calibration, Card, Decision, Failure, Point, Result, checked
from pipeline.pages.images import Sheet
from pipeline.pages.inline import inline
from pipeline.pages.leaderboard import paper_rows, parameters, results_of
from pipeline.pages.published import Row, printed
from pipeline.pages.reading import RUN_TAG, Files, Registered, Version
from pipeline.pages.render import when
from pipeline.pages.tables import Cell, Table, number, share
from pipeline.registry.aliases import CHALLENGER, CHAMPION, DECISION_TAG
from pipeline.registry.record import CONFIG, ENVIRONMENT
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
PUBLISHED = "published"
MOST_LINES = 7


def shown_version(model: Registered) -> Version | None:
    """The champion; or the challenger; or the newest."""
    by_number = {version.number: version for version in model.versions}
    for alias in (CHAMPION, CHALLENGER):
        if model.aliases.get(alias) in by_number:
            return by_number[model.aliases[alias]]
    return model.versions[0] if model.versions else None


def headline(version: Version | None) -> tuple[str, float, float] | None:
    """The first of a version's accuracies: its setting, the share and its interval."""
    tags = version.entity.tags if version else {}
    for key in sorted(tags):
        setting = key.removeprefix("accuracy.")
        if setting != key:
            try:
                value, interval = float(tags[key]), float(tags.get(f"interval.{setting}", "nan"))
            except ValueError:
                continue
            if 0 <= value <= 1:
                return setting.replace("way_", "-way ").replace("shot", "-shot"), value, interval
    return None


def model_context(model: Registered, files: Files, papers: Sequence[Row]) -> dict[str, Any]:
    """What the template shows."""
    version = shown_version(model)
    context: dict[str, Any] = {
        "model": model,
        "version": version,
        "names": [alias for alias, of in model.aliases.items() if version and of == version.number],
        "versions": _versions(model),
        "decisions": _decisions(model),
        "missing": [],
        "papers": bool(papers),
    }
    if version is None or version.run is None:
        gone = "its run is no longer in the tracking store, and with it all but the versions below"
        context["missing"].append((gone, ""))
        return context
    run_id = version.run.info.run_id
    params = parameters(version.run)
    context["run"] = version.run.data.tags.get(RUN_TAG) or version.run.info.run_name
    card = checked(Card, files.json(run_id, f"{REPORT}/{CARD}"))
    untrained = card.untrained if card else []
    context["accuracy"] = _accuracy(results_of(files, version.run), params, version, papers, untrained)
    context["curve"] = _curve(files, run_id)
    context["recipe"] = [(name, str(params[key])) for key, name in RECIPE.items() if params.get(key) is not None]
    context["config"] = files.text(run_id, CONFIG)
    context["environment"] = _environment(files.json(run_id, ENVIRONMENT), version)
    calibration = checked(Calibration, files.json(run_id, f"{REPORT}/{CALIBRATION}"))
    context["calibration"] = _calibration(calibration) if calibration else None
    if card is not None and card.consistent:
        context["card"] = _card(card, Sheet(files.read(run_id, f"{REPORT}/{SHEET}"), card.tiles))
        step = version.entity.tags.get("step")
        if step is not None and step != str(card.step):
            other = f"the mistakes of this version; those below are of the same run at step {card.step}, not {step}"
            context["missing"].append((other, ""))
    else:
        where = f"{str(params['storage']).rstrip('/')}/{context['run']}" if "storage" in params else context["run"]
        parts = "confusion, reliability, projection and failed episodes; add them with"
        context["missing"].append((parts, command("evaluate", f"run={where}", "publish=true")))
    return context


def _versions(model: Registered) -> Table:
    aliases: dict[int, list[str]] = {}
    for alias, of in model.aliases.items():
        aliases.setdefault(of, []).append(f"@{alias}")
    tagged = [key for version in model.versions for key in sorted(version.entity.tags)]
    settings = list(dict.fromkeys(key.removeprefix("accuracy.") for key in tagged if key.startswith("accuracy.")))[:6]
    rows = []
    for version in model.versions:
        tags = version.entity.tags
        rows.append(
            [
                Cell(str(version.number), float(version.number), note=" ".join(aliases.get(version.number, []))),
                *(share(_float(tags.get(f"accuracy.{s}")), _float(tags.get(f"interval.{s}"))) for s in settings),
                Cell(when(version.entity.creation_timestamp), float(version.entity.creation_timestamp)),
                Cell(tags.get("dataset.name", ""), note=tags.get("dataset.fingerprint", "")[:12]),
                Cell(tags.get(RUN_TAG, ""), code=True),
            ]
        )
    header = [
        "version",
        *(s.replace("way_", "-way ").replace("shot", "-shot") for s in settings),
        "made",
        "data",
        "run",
    ]
    return Table(header, rows, "Versions, accuracies in percent ± 95 % interval", name="versions")


def _decisions(model: Registered) -> Table | None:
    rows = []
    for version in model.versions:
        try:
            found = checked(Decision, json.loads(version.entity.tags.get(DECISION_TAG, "null")))
        except (ValueError, RecursionError):
            continue
        if found is not None:
            against = "none" if found.champion is None else f"version {found.champion}"
            verdict = Cell("promoted", mark="good") if found.promoted else Cell("refused", mark="warn")
            rows.append(
                [
                    Cell(f"version {found.challenger}", float(found.challenger)),
                    Cell(against),
                    verdict,
                    Cell(found.reason),
                ]
            )
    return (
        Table(["challenger", "champion then", "decision", "why"], rows, "Promotions", name="promotions")
        if rows
        else None
    )


def _accuracy(
    results: Sequence[Result],
    params: dict[str, Any],
    version: Version,
    papers: Sequence[Row],
    untrained: Sequence[Result] = (),
) -> dict[str, Any] | None:
    if not results:
        return None
    _, paper = paper_rows(papers, params, str(version.entity.tags.get("dataset.name", "")))
    lines = lines_of([r.model_dump() for r in results if r.way], paper.values())[:MOST_LINES]
    rows, first = [], {(r.split, r.way, r.shot): r for r in untrained}
    for r in sorted(results, key=lambda r: (r.way, r.shot)):
        key = (r.split, r.way, r.shot)
        row = paper.get(f"{r.way}-way {r.shot}-shot")
        from_paper = Cell(printed(row), float(row["accuracy"]), note=str(row["source"])) if row else Cell()
        rows.append(
            [
                number(r.way, "d"), number(r.shot, "d"), share(r.accuracy, r.interval),
                *([share(first[key].accuracy, first[key].interval) if key in first else Cell()] if first else []),
                from_paper, number(r.episodes, ",") if r.episodes else Cell(),
                number(r.query, ",") if r.query else Cell(), Cell(r.split),
                number(r.seed, "d") if r.seed is not None else Cell(),
            ]
        )  # fmt: skip
    beside = ["untrained, %"] if first else []
    header = ["way", "shot", "accuracy, %", *beside, PUBLISHED, "episodes", "queries per class", "split", "seed"]
    table = Table(header, rows, "Accuracy with 95 % intervals", name="accuracy")
    return {"plot": inline(accuracy_by_shot(lines, kind="svg"), "Accuracy by way and shot"), "table": table}


def _curve(files: Files, run_id: str) -> dict[str, Any] | None:
    accuracy = files.metric(run_id, "val/accuracy")
    if not accuracy:
        return None
    half = dict(files.metric(run_id, "val/interval"))
    loss = [(float(s), v) for s, v in files.metric(run_id, "train/loss")]
    points = [
        (float(s), v, half.get(s, 0.0) if math.isfinite(half.get(s, 0.0)) else 0.0)
        for s, v in accuracy
        if math.isfinite(v)
    ]
    rows = [[number(s, ",.0f"), share(v, h)] for s, v, h in points]
    table = Table(["step", "validation accuracy, %"], rows, "Validation accuracy", name="learning-curve")
    return {"plot": inline(learning_curve(points, loss, kind="svg"), "Learning curve"), "table": table}


def _environment(content: Any, version: Version) -> list[tuple[str, str]]:
    found = content if isinstance(content, dict) else {}
    rows = [(key, str(found[key])[:200]) for key in ("python", "torch", "platform", "code") if key in found]
    gpus = found.get("gpus")
    if isinstance(gpus, list) and gpus:
        rows.append(("GPUs", ", ".join(str(name)[:60] for name in gpus[:16])))
    return [*rows, ("configuration's hash", version.entity.tags.get("config.hash", "")[:16])]


def _calibration(found: Calibration) -> dict[str, Any]:
    points = sorted(found.points, key=lambda p: (p.way, p.shot))
    rows = [
        [
            number(p.way, "d"), number(p.shot, "d"), number(p.threshold, ".4g"), share(p.false_acceptance),
            share(p.false_rejection), share(p.equal_error), share(p.accuracy),
            number(p.enrolled_queries, ","), number(p.stranger_queries, ","),
        ]
        for p in points
    ]  # fmt: skip
    header = ["classes", "images each", "threshold", "strangers that pass, %", "enrolled that fail, %",
              "equal error, %", "accuracy, %", "enrolled queries", "strangers"]  # fmt: skip
    marks = [
        (f"{p.way} classes, {p.shot} image{'s' if p.shot > 1 else ''}",
         [("strangers that pass", p.false_acceptance), ("enrolled that fail", p.false_rejection)])
        for p in points
    ]  # fmt: skip
    return {
        "target": 100 * found.target,
        "split": found.split,
        "plot": inline(error_rates(marks, "svg"), "Error rates of the threshold for unknown"),
        "table": Table(header, rows, "Thresholds and their error rates", name="calibration"),
        "strangers": _strangers(points),
        "scores": _scores(points),
    }


def _strangers(points: Sequence[Point]) -> Table | None:
    """How well strangers are told, and what it costs to keep most of them out."""
    rows = []
    for p in points:
        if not p.rates or p.score not in p.auroc:
            continue
        least = FEWEST / max(p.stranger_images, 1)
        by_share = {rate.asked: rate for rate in p.rates}
        cells = [number(p.way, "d"), number(p.shot, "d"), Cell(p.score), share(p.auroc[p.score]), share(p.oscr)]
        for asked in REPORTED:
            rate = by_share.get(asked)
            if rate is None or asked < least:
                cells.append(Cell("too few strangers"))
            else:
                refused, passed = (f"{100 * s.low:.1f} to {100 * s.high:.1f}" for s in (rate.refused, rate.passed))
                kept = borne_out(rate.passed.high, asked)
                doubt = "" if kept else f"; too few classes to promise {100 * asked:g} %"
                cell = share(rate.refused.value, note=f"{refused}; strangers that pass {passed}{doubt}")
                cells.append(cell if kept else replace(cell, mark="warn"))
        rows.append([*cells, number(p.stranger_images, ",", note=f"of {p.stranger_classes} classes")])
    header = ["classes", "images each", "score", "AUROC, %", "OSCR, %"]
    header += [f"enrolled that fail at {100 * asked:.0f} % of strangers, %" for asked in REPORTED]
    caption = "How strangers are told, with 95 % intervals over classes that no threshold was set on"
    doubted = [p for p in points for r in p.rates if r.asked in REPORTED and not borne_out(r.passed.high, r.asked)]
    if doubted:
        fewest = max(p.stranger_classes for p in doubted)
        caption += f"; what is marked is no promise: {fewest} validation classes or fewer leave room for more than "
        caption += f"{MOST:g} times the strangers that were asked for"
    return Table([*header, "strangers"], rows, caption, name="strangers") if rows else None


def _scores(points: Sequence[Point]) -> Table | None:
    """AUROC of every score that was compared."""
    names = list(dict.fromkeys(name for p in points for name in p.auroc))
    rows = [
        [number(p.way, "d"), number(p.shot, "d"), *(share(p.auroc.get(name)) for name in names)]
        for p in points
        if p.auroc
    ]
    header = ["classes", "images each", *names]
    return Table(header, rows, "AUROC of the scores that were compared, %", name="scores") if rows else None


def _card(card: Card, sheet: Sheet) -> dict[str, Any]:
    names = [known.name for known in card.classes]
    samples = [sheet.uris(known.tiles[:3]) for known in card.classes]
    pairs = [
        [
            Cell(names[p.true], images=samples[p.true]), Cell(names[p.given], images=samples[p.given]),
            Cell(f"{p.count:,} of {p.asked:,}", p.count / p.asked, note=f"{100 * p.count / p.asked:.0f} %"),
        ]
        for p in card.pairs
    ]  # fmt: skip
    return {
        "facts": card,
        "data": _data(card),
        "pairs": Table(["class", "taken for", "queries"], pairs, "The classes that are confused most", name="confusion")
        if pairs
        else None,
        "matrix": _matrix(card, names, samples) if card.matrix else None,
        "reliability": _reliability(card),
        "projection": _projection(card, names),
        "failures": [_failure(failure, names, sheet) for failure in card.failures if failure.accuracy < 1],
        "worst": Table(
            ["episode", "accuracy, %"], [[number(n, "d"), share(a)] for n, a in card.worst], "The worst episodes",
            name="episodes",
        ),
    }  # fmt: skip


def _data(card: Card) -> list[tuple[str, str]]:
    data = card.data
    c, h, w = data.shape
    order = [*(split for split in ("train", "val", "test") if split in data.classes), *data.classes]
    splits = {split: data.classes[split] for split in order}
    pixels = f"{data.images:,}, {w} × {h} pixels, {'grey' if c == 1 else f'{c} channels'}"
    rows = [
        ("data set", data.name),
        ("images", f"{data.images:,}, {c:,} features of each" if (h, w) == (1, 1) else pixels),
        ("classes", ", ".join(f"{count:,} {split}" for split, count in splits.items())),
        ("fingerprint", data.fingerprint),
    ]
    source = {key: value for key, value in data.source.items() if value is not None}
    if source:
        rows.insert(1, ("source", "; ".join(f"{key} {_text(value)}" for key, value in source.items())))
    if data.counts:
        few, many = data.counts
        rows.insert(2, ("images of a class", f"{few:,}" if few == many else f"{few:,} to {many:,}"))
    if len(data.rotations) > 1:
        rows.insert(3, ("turned copies", "each class turned by " + ", ".join(f"{turn}°" for turn in data.rotations)))
    return rows


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {part}" for key, part in value.items())
    return str(value)


def _matrix(card: Card, names: Sequence[str], samples: Sequence[tuple[str, ...]]) -> dict[str, Any]:
    found = card.matrix
    assert found is not None
    rows = []
    for i, member in enumerate(found.classes):
        cells = []
        for j, other in enumerate(found.classes):
            asked, count = found.asked[i][j], found.counts[i][j]
            part = min(1.0, count / asked) if asked else 0.0
            tip = f"{names[member]} taken for {names[other]}: {count:,} of {asked:,}" if i != j else ""
            tip = tip or f"{names[member]} recognised: {count:,} of {asked:,}"
            text = f"{100 * part:.0f}" if part >= 0.005 else ""
            level = math.ceil(HEAT * math.sqrt(part)) if part >= 0.005 else 0
            cells.append({"text": text, "kind": f"{'right' if i == j else 'wrong'}{level}", "tip": tip})
        rows.append({"name": names[member], "image": next(iter(samples[member]), None), "cells": cells})
    heads = [{"name": names[m], "image": next(iter(samples[m]), None)} for m in found.classes]
    figures = [
        [Cell(names[a]), Cell(names[b]), number(found.counts[i][j], ","), number(found.asked[i][j], ",")]
        for i, a in enumerate(found.classes)
        for j, b in enumerate(found.classes)
        if found.counts[i][j]
    ]
    table = Table(["class", "answer", "queries so answered", "queries asked"], figures, "Confusion in figures",
                  name="confusion-matrix")  # fmt: skip
    return {"rows": rows, "heads": heads, "facts": found, "table": table}


def _reliability(card: Card) -> dict[str, Any]:
    bins = [(b.confidence, b.accuracy, b.queries) for b in card.reliability.bins]
    rows = [[share(b.confidence), share(b.accuracy), number(b.queries, ",")] for b in card.reliability.bins]
    header = ["stated probability, %", "right answers, %", "queries"]
    return {
        "plot": inline(reliability(bins, "svg"), "Stated probability against share of right answers"),
        "table": Table(header, rows, "By the stated probability", name="reliability"),
        "error": 100 * card.reliability.error,
    }


def _projection(card: Card, names: Sequence[str]) -> dict[str, Any] | None:
    found = card.embedding
    if not found.points:
        return None
    members = list(dict.fromkeys(member for _, _, member in found.points))
    points = np.asarray([point[:2] for point in found.points])
    labels = np.asarray([members.index(member) for _, _, member in found.points])
    drawn = projection(points, labels, [names[member] for member in members], found.variance, kind="svg")
    rows = [[Cell(names[m]), number(x, ".4f"), number(y, ".4f")] for x, y, m in found.points]
    return {
        "plot": inline(drawn, "Images of unseen classes on a plane"),
        "table": Table(["class", "first", "second"], rows, "Coordinates", name="projection"),
        "classes": len(members),
        "images": found.images,
    }


def _failure(failure: Failure, names: Sequence[str], sheet: Sheet) -> dict[str, Any]:
    classes = []
    mistaken = {wrong.given for c in failure.classes for wrong in c.wrong}
    for place, member in enumerate(failure.classes):
        if not member.wrong and place not in mistaken:
            continue
        wrong = [
            {"image": sheet.uri(w.tile), "given": names[failure.classes[w.given].member],
             "like": next(iter(sheet.uris(failure.classes[w.given].support[:1])), None)}
            for w in member.wrong
        ]  # fmt: skip
        support: tuple[str, ...] | list[Markup] = sheet.uris(member.support)
        classes.append(
            {
                "name": names[member.member],
                "support": support,
                "wrong": wrong,
                "right": member.right,
                "asked": member.asked,
            }
        )
    others = len(failure.classes) - len(classes)
    return {"number": failure.number, "accuracy": 100 * failure.accuracy, "classes": classes, "others": others}


def _float(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
