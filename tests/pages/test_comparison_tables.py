"""What comparisons of runs say, from the figures themselves."""

from __future__ import annotations

import pytest

from pipeline.pages import comparison_tables
from pipeline.tables import markdown_table, text_table

WEIGHTS = "weights trained on birds, whose classes may be among those of the test"
BEGUN = {"name": "timm", "weights": "hub", "weights_sha256": "1" * 64, "trained_on": "birds"}


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
        shown = comparison_tables.cross_table(content, table)
        assert f"A is better than B {verdict}" in shown and "50.00 ± 1.00" in shown
        low, high = intervals[0]
        assert f"{50 * (low + high):+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]" in shown


@pytest.mark.parametrize("run", [{"weights": WEIGHTS}, {"config": {"backbone": BEGUN}}], ids=["now", "earlier"])
def test_every_table_says_what_weights_were_trained_on(run):
    content = comparison({"svm": (0.01, 0.03)})
    content["runs"][0] |= run
    content["question"] = {"episodes": 10, "way": 5, "query": 3, "split": "test"}
    said = f"A: {WEIGHTS}."
    assert said in comparison_tables.cross_table(content, text_table)
    spread = {m: {"value": 1.5, "interval": 0.1} for m in comparison_tables.MEASURES}
    of_run = {**spread, "classes": 4, "images": 8, "features": 6, "dataset": "x", "shot": 1, "accuracy": 0.5}
    content |= {"results": [{"run": n, "interval": 0.1, **of_run} for n in "AB"], "comparisons": []}
    for entry in content["runs"]:
        entry["dataset"] = {"name": "x"}
    for make in (comparison_tables.cross_domain, comparison_tables.clustering):
        assert said in make(content, markdown_table) and "B: weights" not in make(content, markdown_table)


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
    measures = dict(zip(comparison_tables.MEASURES, (fc, hv), strict=True))
    content["results"] = [
        {"run": n, **{m: {"value": 1.5, "interval": 0.1} for m in measures}, "classes": 4, "images": 8, "features": 6}
        for n in "AB"
    ]
    content["comparisons"] = [
        {"meta": "A", "classical": "B", "measure": m, "difference": sum(i) / 2, "low": i[0], "high": i[1]}
        for m, i in measures.items()
    ]
    shown = comparison_tables.clustering(content, text_table)
    assert f"A has less spread than B {verdict}" in shown and "1.500 ± 0.100" in shown
    content["comparisons"] = []
    assert "direction" not in comparison_tables.clustering(content, text_table)
