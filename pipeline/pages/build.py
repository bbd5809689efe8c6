"""``jobs.report pages``: the whole set, written to a folder."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline import store
from pipeline.pages.campaign_page import campaign_context
from pipeline.pages.leaderboard import boards, scored_runs
from pipeline.pages.model_page import model_context
from pipeline.pages.published import Row
from pipeline.pages.reading import Registered, Site, name_of, read_site
from pipeline.pages.render import file_name, render, when
from pipeline.pages.tables import Cell, Table, number, share, table
from pipeline.registry.tracking import reaching

INDEX = "index.html"


def make_pages(tracking: Mapping[str, Any], folder: str, papers: Sequence[Row] = ()) -> dict[str, Any]:
    """Read the store and write the pages, each whole or not at all and the first page last.

    Args:
        papers: published figures to show beside the runs'.

    Returns:
        ``index``, ``pages`` (file names), and what could not be read (``problems``).
    """
    with reaching(tracking, "check tracking.uri and try again"):
        site = read_site(tracking)
        pages = draw_pages(site, papers)
    for name, content in sorted(pages.items(), key=lambda item: item[0] == INDEX):
        store.write_bytes(store.join(folder, name), content)
    return {"index": store.join(folder, INDEX), "pages": sorted(pages), "problems": site.files.problems}


def draw_pages(site: Site, papers: Sequence[Row]) -> dict[str, bytes]:
    """File name to content."""
    made = when(time.time() * 1000)
    of_runs: dict[str, tuple[str, str]] = {}
    out: dict[str, bytes] = {}
    for model in site.models:
        page = file_name("model", model.name)
        context = model_context(model, site.files, papers, site.tracking)
        out[page] = render("model.html", made=made, here=model.name, **context)
        for version in model.versions:
            if version.run is not None:
                of_runs.setdefault(version.run.info.run_id, (f"{model.name} v{version.number}", page))
    for parent, children in site.campaigns:
        name, context = name_of(parent), campaign_context(parent, children, site.files)
        out[file_name("campaign", name)] = render("campaign.html", made=made, here=name, **context)
    scored = scored_runs(site, papers)
    out[INDEX] = render(
        "index.html", made=made, here="Leaderboard", boards=boards(scored, of_runs), papers=bool(papers),
        models=_models(site.models), campaigns=_campaigns(site),
    )  # fmt: skip
    return out


def _models(models: list[Registered]) -> Table:
    def named(model: Registered) -> Cell:
        return Cell(", ".join(f"@{alias} v{of}" for alias, of in sorted(model.aliases.items())) or "no alias")

    def accuracy(model: Registered) -> Cell:
        """The first that the version's tags have."""
        found = model.shown.accuracies if model.shown else {}
        first = next((setting for setting, (value, _) in found.items() if 0 <= value <= 1), None)
        return share(*found[first], note=first) if first else Cell()

    return table(
        "models",
        "Registered models",
        models,
        {
            "model": lambda m: Cell(m.name, href=file_name("model", m.name)),
            "aliases": named,
            "accuracy, %": accuracy,
            "data set": lambda m: Cell(m.shown.tags.get("dataset.name", "") if m.shown else ""),
            "versions": lambda m: number(len(m.versions), "d"),
            "made (UTC)": lambda m: Cell(when(m.shown.entity.creation_timestamp if m.shown else None)),
        },
        sticky=True,
    )


def _campaigns(site: Site) -> Table:
    states = {"FINISHED": "ended", "RUNNING": "running"}
    best = ("best/accuracy", "best/interval")
    return table(
        "campaigns",
        "Campaigns",
        site.campaigns,
        {
            "campaign": lambda c: Cell(name_of(c[0]), href=file_name("campaign", name_of(c[0]))),
            "data set": lambda c: Cell(c[0].data.tags.get("dataset.name", "")),
            "best validation accuracy, %": lambda c: share(*map(c[0].data.metrics.get, best)),
            "trials": lambda c: number(len(c[1]), "d"),
            "state": lambda c: Cell(states.get(c[0].info.status, c[0].info.status.lower())),
            "begun (UTC)": lambda c: Cell(when(c[0].info.start_time)),
        },
        sticky=True,
    )
