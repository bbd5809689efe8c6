"""Published and measured figures side by side, and what comparisons of runs say, from the figures themselves."""

from __future__ import annotations

import json
from importlib import import_module

import numpy as np
import pytest

from pipeline.evaluation.embeddings import EmbeddedClasses
from pipeline.report import findings, measured
from pipeline.report.embeddings import discriminant_plane, plane, side_by_side
from pipeline.report.published import by_setting, matching, protocol, published, setting
from pipeline.report.reproduction import entries, markdown, summary, text
from pipeline.tables import markdown_table, text_table


def run_file(folder, name="x", method="maml", dataset="omniglot", accuracy=0.99, interval=0.004, **method_options):
    content = {
        "command": f"python -m jobs.train recipe={name}", "evaluation": "python -m jobs.evaluate run=RUN",
        "protocol": "episodic", "method": method, "dataset": {"name": dataset, "fingerprint": "f" * 64},
        "steps": 1234, "seed": 0, "train_seconds": 600, "machine": {"cores": 2},
        "config": {"method": {"name": method, "adapt_parameters": "all", "first_order": False} | method_options},
        "results": [
            {"model": "trained", "way": 5, "shot": 1, "episodes": 9, "accuracy": accuracy, "interval": interval},
            {"model": "untrained", "way": 5, "shot": 1, "episodes": 9, "accuracy": 0.3, "interval": 0.01},
        ],
    }  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps(content))


def test_published_rows_are_whole():
    rows = published()
    keys = [(row["label"], row["dataset"], setting(row)) for row in rows]
    assert len(set(keys)) == len(keys)
    for row in rows:
        assert 0 < row["accuracy"] < 1 and row["source"] and 0 < row.get("interval", 0.01) < 0.05
        assert set(row) <= {
            "label", "method", "options", "dataset", "way", "shot", "setting", "accuracy", "interval", "source",
            "memory", "reruns",
        }  # fmt: skip
    assert {protocol(row) for row in rows} == {"episodic", "generalized", "one_shot_runs"}


def test_options_of_published_figures_are_options_of_the_methods():
    from pipeline.config import compose, flat

    for method in sorted({row["method"] for row in published()}):
        import_module(f"pipeline.methods.{method}")
        known = flat({"method": compose("train", [f"method={method}"])["method"]})
        for row in published():
            if row["method"] == method:
                assert [k for k in row.get("options", {}) if k.startswith("method.") and k not in known] == []


@pytest.mark.parametrize(
    ("options", "label"),
    [
        ({}, "MAML"),
        ({"adapt_parameters": "all_but_norm"}, "MAML"),
        ({"first_order": True}, "First-order MAML"),
        ({"adapt_parameters": "head"}, "ANIL"),
    ],
)
def test_a_run_is_compared_with_the_figures_of_its_form(tmp_path, options, label):
    run_file(tmp_path, **options)
    [entry] = [entry for entry in entries(tmp_path) if entry.run is not None]
    assert entry.label == label and list(entry.measured) == ["5-way 1-shot"]
    rows = matching(published(), "maml", entry.run["config"])
    assert {row["label"] for row in rows} == {label}
    assert entry.published == by_setting(rows, "omniglot")


def test_conditions_on_a_number():
    def labels(consensus):
        config = {"method": {"consensus": consensus, "query_statistics": "batch"}}
        return {row["label"] for row in matching(published(), "reptile", config)}

    assert labels(0.0) == {"Reptile, transductive"} and labels(0.1) == {"Reptile with weight clustering"}


def test_the_table_has_every_method_its_command_and_its_time(tmp_path):
    run_file(tmp_path, "omniglot_maml")
    run_file(tmp_path, "other", method="prototypical", accuracy=0.9)
    run_file(tmp_path, "mine", method="relation", dataset="my_data")
    found = entries(tmp_path)
    for shown in (text(found), markdown(found)):
        assert all(row["label"] in shown for row in published())
        assert "python -m jobs.train recipe=omniglot_maml" in shown and "1,234 of 60,000" in shown and " 10 " in shown
        assert "98.7 → 99.00 ± 0.40" in shown and "98.8 → 90.00 ± 0.40" in shown and "→ 99.00 ± 0.40" in shown
        assert "48.7 ± 1.84" in shown and "49.21 ± 0.96°" in shown and "30.00" not in shown
        assert "Of 2 measured figures with a published one, 1 reach it" in shown
    by_name = {(e["method"], e["dataset"]): e for e in summary(found)}
    figure = by_name["MAML", "omniglot"]["figures"]["5-way 1-shot"]
    assert (figure["published"], figure["measured"]) == (0.987, 0.99) and by_name["MAML", "omniglot"]["steps"] == 1234
    assert by_name["Relation networks", "my_data"]["figures"]["5-way 1-shot"]["published"] is None


def test_the_projects_own_measurements():
    found = entries(measured.FOLDER)
    runs = [path for path in measured.FOLDER.glob("*.json") if "method" in json.loads(path.read_text())]
    assert len([entry for entry in found if entry.run is not None]) == len(runs)
    assert measured.render("reproduction").endswith("`python -m jobs.report reproduction`")


def comparison(heads: dict[str, tuple[float, float]]) -> dict:
    runs = [{"name": n, "kind": k, "method": "m", "steps": 5} for n, k in (("A", "meta"), ("B", "classical"))]
    results = [{"run": n, "head": h, "accuracy": 0.5, "interval": 0.01} for n in "AB" for h in heads]
    rows = [
        {"meta": "A", "classical": "B", "head": h, "difference": (low + high) / 2, "low": low, "high": high}
        for h, (low, high) in heads.items()
    ]
    return {"runs": runs, "results": results, "comparisons": rows}


@pytest.mark.parametrize(
    ("intervals", "verdict"),
    [
        ([(0.01, 0.03), (0.001, 0.002)], "under svm, ridge and worse under none: the paper's direction, that "
         "meta-trained features are better, holds throughout"),
        ([(0.01, 0.03), (-0.001, 0.002)], "under svm and worse under none: the paper's direction, that meta-trained "
         "features are better, holds where it is decided"),
        ([(0.01, 0.03), (-0.02, -0.01)], "under svm and worse under ridge: the paper's direction, that meta-trained "
         "features are better, holds in part"),
        ([(-0.01, 0.03), (-0.02, -0.01)], "under none and worse under ridge: the paper's direction, that meta-trained "
         "features are better, does not hold"),
        ([(-0.01, 0.03), (-0.02, 0.01)], "under none and worse under none: the paper's direction, that meta-trained "
         "features are better, is not decided"),
    ],
)  # fmt: skip
def test_what_the_cross_table_says(intervals, verdict):
    content = comparison(dict(zip(("svm", "ridge"), intervals, strict=True)))
    for table in (text_table, markdown_table):
        shown = findings.cross_table(content, table)
        assert f"A is better than B {verdict}" in shown and "50.00 ± 1.00" in shown
        low, high = intervals[0]
        assert f"{50 * (low + high):+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]" in shown


@pytest.mark.parametrize(
    ("fc", "hv", "verdict"),
    [
        ((-2, -1), (-0.2, -0.1), "by R_FC, R_HV and more by none: the paper's direction, that meta-trained features "
         "are more clustered, holds throughout"),
        ((1, 2), (-0.2, -0.1), "by R_HV and more by R_FC: the paper's direction, that meta-trained features are more "
         "clustered, holds in part"),
        ((1, 2), (-0.2, 0.1), "by none and more by R_FC: the paper's direction, that meta-trained features are more "
         "clustered, does not hold"),
    ],
)  # fmt: skip
def test_what_clustering_says(fc, hv, verdict):
    content = comparison({})
    measures = dict(zip(findings.MEASURES, (fc, hv), strict=True))
    content["results"] = [
        {"run": n, **{m: {"value": 1.5, "interval": 0.1} for m in measures}, "classes": 4, "images": 8, "features": 6}
        for n in "AB"
    ]
    content["comparisons"] = [
        {"meta": "A", "classical": "B", "measure": m, "difference": sum(i) / 2, "low": i[0], "high": i[1]}
        for m, i in measures.items()
    ]
    shown = findings.clustering(content, text_table)
    assert f"A has less spread than B {verdict}" in shown and "1.500 ± 0.100" in shown
    content["comparisons"] = []
    assert "direction" not in findings.clustering(content, text_table)


def test_comparisons_in_the_readme(tmp_path, monkeypatch):
    content = comparison({"svm": (0.01, 0.03)})
    for run in content["runs"]:
        run |= {"command": f"python -m jobs.train name={run['name']}", "train_seconds": 120}
    content |= {"protocol": "cross_table", "command": "python -m jobs.report cross_table 'runs=[A,B]'"}
    (tmp_path / "cross_table_x.json").write_text(json.dumps(content))
    run_file(tmp_path)
    monkeypatch.setattr(measured, "FOLDER", tmp_path)
    page = "a\n<!-- measured: cross_table_x -->\nold\n<!-- end -->\nb\n<!-- measured: reproduction -->\n<!-- end -->\n"
    made = measured.readme_text(page)
    assert "\nold\n" not in made and "| A | m (meta) | 50.00 ± 1.00 |" in made and "+2.00 [+1.00, +3.00]" in made
    assert "`python -m jobs.train name=B`, 5 steps, 2 minutes" in made and "| MAML | 98.7 → 99.00" in made
    assert measured.readme_text(made) == made
    with pytest.raises(measured.PipelineError, match=r"jobs.report clustering runs=\[...\] record=clustering_y.json"):
        measured.render("clustering_y")


def classes(noise: float, count=4, images=30, width=200) -> EmbeddedClasses:
    rng = np.random.default_rng(0)
    means = rng.normal(size=(count, 1, 1, width))
    noises = np.where(np.arange(width) < 3, 30.0, noise)  # in three directions much, whatever the class
    features = means + noises * rng.normal(size=(count, 2, images, width))
    fitted, shown = (features[:, side].reshape(count * images, width) for side in (0, 1))
    return EmbeddedClasses(fitted, shown, np.repeat(np.arange(count), images), [f"c{n}" for n in range(count)])


def separation(points, labels) -> float:
    means = np.stack([points[labels == label].mean(0) for label in np.unique(labels)])
    within = sum(((points[labels == n] - m) ** 2).sum() for n, m in enumerate(means)) / len(points)
    return float(((means - means.mean(0)) ** 2).sum() / len(means) / within)


def test_the_plane_separates_classes_and_nothing_else():
    given = classes(1.0)
    assert separation(plane(given, "lda"), given.labels) > 5 > 0.5 > separation(plane(given, "pca"), given.labels)
    rng = np.random.default_rng(1)
    noise = EmbeddedClasses(rng.normal(size=(120, 200)), rng.normal(size=(120, 200)), given.labels, given.names)
    assert separation(plane(noise, "lda"), noise.labels) < 0.1
    assert separation(discriminant_plane(noise.fitted, noise.labels, noise.fitted), noise.labels) > 1


def test_the_plane_against_the_definition():
    """In two dimensions, without shrinkage to speak of, the first axis is within^-1 (m1 - m2)."""
    rng = np.random.default_rng(2)
    covariance = np.array([[4.0, 1.9], [1.9, 1.0]])
    features = np.concatenate([rng.multivariate_normal(m, covariance, 4000) for m in ([0, 0], [1, 0])])
    labels = np.repeat([0, 1], 4000)
    points = discriminant_plane(features, labels, features)
    within = np.cov(features[:4000].T, bias=True) / 2 + np.cov(features[4000:].T, bias=True) / 2
    within += 0.1 * np.trace(within) / 2 * np.eye(2)
    axis = np.linalg.solve(within, features[4000:].mean(0) - features[:4000].mean(0))
    expected = (features - features.mean(0)) @ (axis / np.sqrt(axis @ within @ axis))
    assert min(np.abs(points[:, 0] - sign * expected).max() for sign in (1, -1)) < 1e-9
    assert np.abs(points[:, 1]).max() == 0


@pytest.mark.parametrize("projection", ["lda", "pca"])
def test_the_picture(projection):
    panels = [("meta", classes(1.0)), ("classical", classes(3.0))]
    svg = side_by_side(panels, "Novel classes", projection, "svg")
    assert svg == side_by_side(panels, "Novel classes", projection, "svg") and svg.count(b"<svg") == 1
    assert side_by_side(panels[:1], kind="png")[:4] == b"\x89PNG"
