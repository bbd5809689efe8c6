"""A chart becomes a part of a page: nothing that the policy forbids, no id twice, tips on its marks."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

from pipeline.charts.accuracy import Mark, accuracies, learning_curve
from pipeline.pages.inline import inline

EVIL = "<script>alert(1)</script>\"'$x$\x00"


def test_a_chart_has_no_style_and_no_address_of_its_own():
    shown = inline(learning_curve([(1, 0.5, 0.1), (2, 0.6, 0.1)], [(1, 2.0), (2, 1.0)], kind="svg"), 'a "curve"')
    assert "style" not in shown and "http" not in shown and "font-family" not in shown and "metadata" not in shown
    colours = re.findall(r'(?:fill|stroke)="([^"]+)"', shown)
    assert colours and all(colour == "none" or colour.startswith("var(--") for colour in colours)
    assert shown.startswith("<svg ") and 'aria-label="a &quot;curve&quot;"' in shown and 'role="img"' in shown
    assert "step 2: 60.00 ± 10.00 %" in shown and "validation accuracy" in shown


def test_ids_are_a_charts_own():
    charts = [inline(accuracies([Mark(name, 0.5)], "svg"), name) for name in "ab"]
    first, second = (set(re.findall(r'\bid="([^"]+)"', chart)) for chart in charts)
    assert first and not first & second
    for chart, ids in zip(charts, (first, second), strict=True):
        assert set(re.findall(r'href="#([^"]+)"', chart)) | set(re.findall(r"url\(#([^)]+)\)", chart)) <= ids


def test_names_are_text():
    shown = inline(accuracies([Mark(EVIL, 0.5, 0.1, 0.6)], "svg"), EVIL)
    assert "<script" not in shown and "alert(1)" in shown
    assert [element.text for element in ET.fromstring(shown).iter("title")][0].startswith("<script>alert(1)")
