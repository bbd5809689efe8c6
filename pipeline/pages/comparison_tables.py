"""Tables of a comparison of several runs, from the plain data that a record holds, and what the figures say.

Whether the paper's direction holds is read off the paired intervals (Goldblum et al. 2020: meta-trained features are
better under every classifier, and more clustered, than those of the same network trained classically).
"""

from collections.abc import Callable, Sequence
from typing import Any

from pipeline.tables import percent
from pipeline.weights import origin

Table = Callable[[Sequence[str], Sequence[Sequence[object]]], str]
MEASURES = {"feature_clustering": "R_FC", "hyperplane_variation": "R_HV"}


def cross_table(content: dict[str, Any], table: Table) -> str:
    """Accuracy by extractor and classifier, then the paired differences of extractors that share a network."""
    heads = list(dict.fromkeys(row["head"] for row in content["results"]))
    cells = {(row["run"], row["head"]): percent(row["accuracy"], row["interval"]) for row in content["results"]}
    rows = [[*_named(run), *(cells[run["name"], head] for head in heads)] for run in content["runs"]]
    parts = [table(["extractor", "trained by", *heads], rows)]
    pairs = _pairs(content, "head")
    if pairs:
        rows = [[f"{a} − {b}", *(_points(of[head]) if head in of else "" for head in heads)]
                for (a, b), of in pairs.items()]  # fmt: skip
        parts.append(table(["same network, same episodes", *heads], rows))
    for (meta, classical), of in pairs.items():
        better, worse = _decided(of)
        said = f"{meta} is better than {classical} under {_listed(better)} and worse under {_listed(worse)}"
        parts.append(f"{said}: {_verdict(better, worse, len(of), 'meta-trained features are better')}")
    return "\n\n".join([*parts, *_origins(content)])


def cross_domain(content: dict[str, Any], table: Table) -> str:
    """Accuracy by model and dataset; that which a model was trained on, by other classes, is marked."""
    columns = list(dict.fromkeys((row["dataset"], row["shot"]) for row in content["results"]))
    cells = {(r["run"], r["dataset"], r["shot"]): percent(r["accuracy"], r["interval"]) for r in content["results"]}
    rows = []
    for run in content["runs"]:
        home = run["dataset"]["name"]
        figures = [cells[run["name"], name, shot] + (" *" if name == home else "") for name, shot in columns]
        rows.append([run["name"], run["method"], home, *figures])
    q = content["question"]
    asked = f"{q['episodes']:,} episodes of {q['way']} classes with {q['query']} queries each, split "
    note = f"Accuracy in percent, mean ± 95 % interval; {asked}{q['split']!r}. * by its own training dataset's classes."
    header = ["run", "method", "trained on", *(f"{name}, {shot}-shot" for name, shot in columns)]
    return "\n\n".join([table(header, rows), note, *_origins(content)])


def clustering(content: dict[str, Any], table: Table) -> str:
    """R_FC and R_HV of every extractor, then their differences where two share a network."""
    measured = {row["run"]: row for row in content["results"]}
    rows = []
    for run in content["runs"]:
        found = measured[run["name"]]
        figures = [f"{found[m]['value']:.3f} ± {found[m]['interval']:.3f}" for m in MEASURES]
        rows.append([*_named(run), *figures, found["classes"], f"{found['images']:,}", found["features"]])
    parts = [table(["extractor", "trained by", *MEASURES.values(), "classes", "images", "features"], rows)]
    pairs = _pairs(content, "measure")
    if pairs:
        rows = [[f"{a} − {b}", *(_interval(of[measure], 3) for measure in MEASURES)] for (a, b), of in pairs.items()]
        parts.append(table(["same network, same images", *MEASURES.values()], rows))
    for (meta, classical), of in pairs.items():
        more, less = ([MEASURES[measure] for measure in measures] for measures in _decided(of))
        said = f"{meta} has less spread than {classical} by {_listed(less)} and more by {_listed(more)}"
        parts.append(f"{said}: {_verdict(less, more, len(of), 'meta-trained features are more clustered')}")
    return "\n\n".join([*parts, *_origins(content)])


def strangers(content: dict[str, Any], table: Table) -> str:
    """How strangers are told, by run and by the number of classes and images; then what calibration promised."""
    told, promised = [], []
    for row in content["results"]:
        setting, of = [row["run"], f"{row['way']} × {row['shot']}"], row["calibrated"]
        area = "{value:.3f} ({low:.3f} to {high:.3f})".format(**row["auroc"])
        refused = [_whole(rate["refused"]) for rate in row["rates"]]
        stated = "{before:.1f}; {after:.1f}".format(**{k: 100 * v for k, v in row["unreliable"].items()})
        accuracy = f"{100 * row['accuracy']:.1f}"
        told.append([*setting, row["score"], accuracy, stated, area, f"{row['oscr']:.3f}", *refused])
        kept = {
            rate["asked"]: f"{_whole(rate['passed'], 1)}; {_whole(rate['refused'])}{_doubt(rate)}"
            for rate in row["promised"]
        }
        cells = [kept.get(rate["asked"], "too few strangers") for rate in row["rates"]]
        classes = f", {of['classes']} classes" if "classes" in of else ""  # which earlier records do not tell
        promised.append([*setting, f"{of['way']} × {of['shot']}{classes}", *cells])
    shares = [f"{100 * rate['asked']:g} %" for rate in content["results"][0]["rates"]]
    doubted = any(not rate.get("borne_out", True) for row in content["results"] for rate in row["promised"])
    doubt = "† no promise: validation has too few classes; by its own interval up to so many percent may pass."
    header = ["run", "classes × images", "score", "accuracy, %", "calibration error, %", "AUROC", "OSCR"]
    return "\n\n".join(
        [
            table([*header, *(f"refused at {share} of strangers, %" for share in shares)], told),
            "Calibration error: of the stated probabilities, by the plain softmax; with validation's temperature.",
            "With the thresholds of validation, set for so many strangers to pass: strangers that passed; enrolled "
            "that were refused, %",
            table(["run", "classes × images", "calibrated for", *shares], promised),
            *([doubt] if doubted else []),
            *_origins(content),
        ]
    )


def _doubt(rate: dict[str, Any]) -> str:
    """A mark where validation did not bear a rate out, and the most that it left room for."""
    return "" if rate.get("borne_out", True) else f" † {100 * rate['validated']['high']:.0f}"


def _whole(share: dict[str, float], digits: int = 0) -> str:
    """A share in percent with its interval."""
    return "{value:.{d}f} ({low:.{d}f} to {high:.{d}f})".format(d=digits, **{k: 100 * v for k, v in share.items()})


def _origins(content: dict[str, Any]) -> list[str]:
    """What is to be known of weights that were trained elsewhere, by run; earlier records have it by configuration."""
    found: dict[str, list[str]] = {}
    for run in content["runs"]:
        said = run.get("weights") or origin(run.get("config", {}).get("backbone", {}))
        if said is not None:
            found.setdefault(said, []).append(run["name"])
    return [f"{', '.join(names)}: {said}." for said, names in found.items()]


def _named(run: dict[str, Any]) -> list[str]:
    return [run["name"], f"{run['method']} ({run['kind']})"]


def _pairs(content: dict[str, Any], key: str) -> dict[tuple[str, str], dict[str, dict[str, float]]]:
    """(meta, classical) to their comparisons by head or measure."""
    found: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for row in content["comparisons"]:
        found.setdefault((row["meta"], row["classical"]), {})[row[key]] = row
    return found


def _points(row: dict[str, float]) -> str:
    """A difference of accuracies with its interval, in points of percent."""
    return _interval({key: 100 * row[key] for key in ("difference", "low", "high")}, 2)


def _interval(row: dict[str, float], digits: int) -> str:
    return f"{row['difference']:+.{digits}f} [{row['low']:+.{digits}f}, {row['high']:+.{digits}f}]"


def _decided(of: dict[str, dict[str, float]]) -> tuple[list[str], list[str]]:
    """Heads or measures whose paired interval lies above zero, and those whose lies below."""
    return [key for key, row in of.items() if row["low"] > 0], [key for key, row in of.items() if row["high"] < 0]


def _verdict(for_: list[str], against: list[str], number: int, direction: str) -> str:
    """What paired intervals that lie on one side of zero say of the paper's direction."""
    if len(for_) == number:
        held = "holds throughout"
    elif against:
        held = "does not hold" if not for_ else "holds in part"
    else:
        held = "is not decided" if not for_ else "holds where it is decided"
    return f"the paper's direction, that {direction}, {held} (95 % intervals of paired differences)."


def _listed(names: list[str]) -> str:
    return ", ".join(names) if names else "none"


COMPARISONS = {
    "cross_table": cross_table,
    "cross_domain": cross_domain,
    "clustering": clustering,
    "strangers": strangers,
}
