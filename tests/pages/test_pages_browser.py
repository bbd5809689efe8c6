"""Pages in a real browser: they render, sort, fit a phone, can be read in the dark, and run nothing of the store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pages.browser import Browser, find_browser

LOOKS = [(1200, False), (390, False), (1200, True), (390, True)]  # width, dark

# The least contrast (WCAG 2) of what is written on the page, and on what. Colours are read off a canvas, so that
# every way to write one is understood; what lies under text is the nearest background that is opaque.
CONTRAST = """(() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const read = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return canvas.getImageData(0, 0, 1, 1).data;
  };
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const under = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const found = read(getComputedStyle(at).backgroundColor);
      if (found[3] === 255) return found;
    }
    return [255, 255, 255, 255];
  };
  let worst = [99, ""];
  for (const element of document.querySelectorAll("h1,h2,p,a,dt,dd,th,td,summary,small,.note,caption,svg text")) {
    if (!element.textContent.trim() || element.closest(".matrix")) continue;
    const style = getComputedStyle(element);
    const pair = [light(read(element.closest("svg") ? style.fill : style.color)), light(under(element))];
    const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    if (ratio < worst[0]) worst = [ratio, element.tagName + " " + element.textContent.trim().slice(0, 40)];
  }
  return worst;
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium here: pages are not looked at (Debian: apt-get install chromium)")
    tab = Browser(program, tmp_path_factory.mktemp("profile"))
    yield tab
    tab.close()


def pages_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.html"))


def column(browser: Browser, number: int) -> list[str]:
    """The keys of a column of the page's first table, from top to bottom."""
    rows = "document.querySelector('table.sorted').tBodies[0].rows"
    return list(browser.run(f"[...{rows}].map((row) => row.cells[{number}].dataset.key)"))


@pytest.mark.parametrize("look", LOOKS, ids=["desktop", "phone", "dark", "phone in the dark"])
def test_pages_render_fit_and_can_be_read(browser, pages_folder, empty_folder, look):
    width, dark = look
    for page in [*pages_of(pages_folder), *pages_of(empty_folder)]:
        browser.open(page.as_uri(), width, dark)
        assert browser.problems == [], page.name
        assert all(url.startswith(("file:", "data:")) for url in browser.requests), page.name
        assert browser.run("document.documentElement.scrollWidth") <= width, page.name
        assert browser.run("getComputedStyle(document.body).backgroundColor") == (
            "rgb(20, 24, 29)" if dark else "rgb(255, 255, 255)"
        )
        ratio, where = browser.run(CONTRAST)
        assert ratio >= 4.5, (page.name, where)
        broken = "[...document.images].filter((image) => !image.complete || !image.naturalWidth).length"
        assert browser.run(broken) == 0, page.name


def test_plots_are_drawn_within_their_frames(browser, pages_folder):
    outside = """[...document.querySelectorAll("svg")].flatMap((svg) => {
      const frame = svg.getBoundingClientRect();
      return [...svg.querySelectorAll("text,circle,rect")].filter((part) => {
        const box = part.getBoundingClientRect();
        return box.width && (box.left < frame.left - 2 || box.right > frame.right + 2 || box.bottom > frame.bottom + 2
          || box.top < frame.top - 2);
      }).map((part) => svg.getAttribute("aria-label") + ": " + (part.textContent || part.outerHTML));
    })"""
    for page in pages_of(pages_folder):
        browser.open(page.as_uri())
        assert browser.run(outside) == [], page.name


def test_tables_sort_by_a_click(browser, pages_folder):
    browser.open((pages_folder / "campaign-alpha.html").as_uri())
    table = "[...document.querySelectorAll('table.sorted')].find((t) => t.caption.textContent === 'All trials')"
    head = f"{table}.tHead.rows[0].cells"
    number = browser.run(f"[...{head}].findIndex((cell) => cell.textContent.startsWith('accuracy'))")
    keys = f"[...{table}.tBodies[0].rows].map((row) => row.cells[{number}].dataset.key)"
    before = browser.run(keys)
    browser.run(f"{head}[{number}].querySelector('button').click()")
    shown = browser.run(keys)
    known = sorted((float(key) for key in before if key), reverse=True)
    assert [float(key) for key in shown if key] == known and shown[-1] == ""
    assert browser.run(f"{head}[{number}].getAttribute('aria-sort')") == "descending"
    browser.run(f"{head}[{number}].querySelector('button').click()")
    shown = browser.run(keys)
    assert [float(key) for key in shown if key] == known[::-1] and shown[-1] == ""


def test_tables_sort_by_the_keyboard(browser, pages_folder):
    browser.open((pages_folder / "index.html").as_uri())
    browser.run("document.querySelector('table.sorted th button').focus()")
    assert browser.run("document.activeElement.tagName") == "BUTTON"
    browser.press("Enter", 13)
    ascending = column(browser, 0)
    assert ascending == sorted(ascending, key=str.lower)
    browser.press(" ", 32)
    assert column(browser, 0) == sorted(ascending, key=str.lower, reverse=True)
    assert browser.run("document.querySelector('table.sorted th').getAttribute('aria-sort')") == "descending"


def test_rows_are_filtered_and_numbers_are_one_click_away(browser, pages_folder):
    browser.open((pages_folder / "campaign-alpha.html").as_uri())
    box = "document.querySelector('.filter')"
    browser.run(f"{box}.value = 'stopped'; {box}.dispatchEvent(new Event('input'))")
    rows = "[...document.querySelector('table.filtered').tBodies[0].rows]"
    assert browser.run(f"{rows}.filter((row) => row.offsetParent !== null).length") == 3
    figure = "document.querySelector('figure')"
    assert not browser.run(f"{figure}.querySelector('table').checkVisibility()")
    browser.run(f"{figure}.querySelector('summary').click()")
    assert browser.run(f"{figure}.querySelector('table').checkVisibility()")
    assert browser.problems == []


def test_links_lead_to_the_pages(browser, pages_folder):
    browser.open((pages_folder / "index.html").as_uri())
    found = browser.run("[...document.querySelectorAll('main a[href$=html]')].map((a) => a.href)")
    assert len(set(found)) == 4  # two models, two campaigns
    for url in sorted(set(found)):
        browser.open(url)
        assert browser.problems == [] and browser.run("document.querySelector('h1').textContent")


def test_nothing_of_a_hostile_store_runs(browser, evil_folder):
    for page in pages_of(evil_folder):
        browser.open(page.as_uri(), 390)
        assert browser.run("window.owned") is None and browser.run("document.title").endswith("meta-training")
        assert browser.problems == [], page.name
        assert browser.run("document.scripts.length") == 1
        assert browser.run("document.documentElement.scrollWidth") <= 390, page.name
        browser.run("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
        browser.run("document.querySelectorAll('th button').forEach((button) => button.click())")
        assert browser.run("window.owned") is None and browser.problems == []
