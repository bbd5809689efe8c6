"""Plots of a campaign are drawn for every state that it may end in, and equal figures give equal files."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from pipeline.charts import campaign
from pipeline.charts.campaign import Finalist, accuracy_over, groups_of, parallel_coordinates, trials_over_time
from pipeline.search.ledger import Record
from pipeline.search.space import Space

SPACE = Space(
    {
        "method": {"choices": ["reptile", "maml"]},
        "rate": {"low": 1e-3, "high": 1.0, "log": True},
        "steps": {"low": 1, "high": 8, "integer": True, "when": {"method": "maml"}},
    }
)
RECORDS = [
    Record(0, "c-0", {"method": "reptile", "rate": 0.0}, "finished", "", ((5, 0.5), (10, 0.6)), None, 10.0, 20.0),
    Record(1, "c-1", {"method": "maml", "rate": 0.1, "steps": 3}, "finished", "", ((10, 0.9),), None, 11.0, 25.0),
    Record(2, "c-2", {"method": "maml", "rate": 0.5, "steps": 1}, "failed", "the loss is nan", (), None, 20.0, 22.0),
    Record(
        3, "c-3", {"method": "reptile", "rate": 0.5}, "stopped", "not among the best", ((5, 0.3),), None, 22.0, 30.0
    ),
    Record(4, "c-4", {"method": "reptile", "rate": 0.2}, began=30.0),
]


@pytest.mark.parametrize("records", [RECORDS, RECORDS[1:2], RECORDS[2:3]], ids=["all", "one", "failed"])
def test_every_plot_is_drawn(records):
    finalists = [Finalist(RECORDS[1].values, 0.8, 0.4), Finalist(RECORDS[0].values, 0.5, None)]
    default = {"method": "maml", "rate": 0.1, "steps": 3}
    for draw in (
        lambda: accuracy_over("rate", SPACE.dimensions, records, "best", default, finalists, kind="svg"),
        lambda: accuracy_over("steps", SPACE.dimensions, records, "best", default, kind="svg"),
        lambda: parallel_coordinates(SPACE.dimensions, records, "best", "svg"),
        lambda: trials_over_time(records, "best", "svg"),
    ):
        drawn = draw()
        assert drawn.startswith(b"<?xml") and drawn == draw()


def test_a_legend_of_long_names_stays_within_the_figure(monkeypatch):
    choices = ["soft_kmeans", "siamese", "proxy_nca", "discriminative_kshot_with_a_longer_name"]
    space = Space({"method": {"choices": choices}, "rate": {"low": 1e-3, "high": 1.0, "log": True}})
    records = [
        Record(n, f"c-{n}", {"method": choice, "rate": 0.1}, "finished", "", ((5, 0.5),))
        for n, choice in enumerate(choices)
    ]
    ends = []

    def rendered(drawn: Figure, kind: str) -> bytes:
        drawn.draw_without_rendering()
        ends.append([drawn.legends[0].get_window_extent().x1, drawn.bbox.x1, len(drawn.legends)])
        return b""

    monkeypatch.setattr(campaign, "render", rendered)
    accuracy_over("rate", space.dimensions, records, "best")
    [(legend, figure, number)] = ends
    assert legend <= figure and number == 1


def test_zero_on_a_logarithmic_axis_is_a_line_of_its_own():
    shown = accuracy_over("rate", SPACE.dimensions, RECORDS[:2], "best", kind="svg")
    alone = accuracy_over("rate", SPACE.dimensions, RECORDS[1:2], "best", kind="svg")
    assert b"rate 0" in shown and b"rate 0" not in alone


def test_the_first_choice_that_differs_gives_the_colour():
    assert groups_of(SPACE.dimensions, RECORDS[:2]) == {0: "method reptile", 1: "method maml"}
    assert set(groups_of(SPACE.dimensions, RECORDS[1:3]).values()) == {"trials"}
