"""``jobs.report pages``: the whole set, written to a folder."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline import store
from pipeline.pages.campaign_page import best_accuracy, campaign_context, campaign_name
from pipeline.pages.leaderboard import boards, scored_runs
from pipeline.pages.model_page import headline, model_context, shown_version
from pipeline.pages.published import Row
from pipeline.pages.reading import Registered, Site, read_site
from pipeline.pages.render import file_name, render, when
from pipeline.pages.tables import Cell, Table, share
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
    for model in site.models:
        for version in model.versions:
            if version.run is not None:
                known = (f"{model.name} v{version.number}", file_name("model", model.name))
                of_runs.setdefault(version.run.info.run_id, known)
    scored = scored_runs(site, papers)
    out: dict[str, bytes] = {}
    for model in site.models:
        context = model_context(model, site.files, papers)
        out[file_name("model", model.name)] = render("model.html", made=made, here=model.name, **context)
    for parent, children in site.campaigns:
        context = campaign_context(parent, children, site.files)
        out[file_name("campaign", campaign_name(parent))] = render(
            "campaign.html", made=made, here=context["name"], **context
        )
    out[INDEX] = render(
        "index.html",
        made=made,
        here="Leaderboard",
        boards=boards(scored, of_runs),
        papers=bool(papers),
        models=_models(site.models),
        campaigns=_campaigns(site),
        empty=not (scored or site.models or site.campaigns),
    )
    return out


def _models(models: list[Registered]) -> Table | None:
    rows = []
    for model in models:
        version = shown_version(model)
        found = headline(version)
        names = ", ".join(f"@{alias} v{number}" for alias, number in sorted(model.aliases.items()))
        tags = version.entity.tags if version else {}
        rows.append(
            [
                Cell(model.name, href=file_name("model", model.name)),
                Cell(names or "no alias"),
                share(found[1], found[2], note=found[0]) if found else Cell(),
                Cell(tags.get("dataset.name", "")),
                Cell(str(len(model.versions)), float(len(model.versions))),
                Cell(when(version.entity.creation_timestamp if version else None)),
            ]
        )
    header = ["model", "aliases", "accuracy, %", "data set", "versions", "made (UTC)"]
    return Table(header, rows, "Registered models", name="models", sticky=True) if rows else None


def _campaigns(site: Site) -> Table | None:
    rows = []
    for parent, children in site.campaigns:
        name = campaign_name(parent)
        rows.append(
            [
                Cell(name, href=file_name("campaign", name)),
                Cell(parent.data.tags.get("dataset.name", "")),
                share(*best_accuracy(parent)),
                Cell(str(len(children)), float(len(children))),
                Cell({"FINISHED": "ended", "RUNNING": "running"}.get(parent.info.status, parent.info.status.lower())),
                Cell(when(parent.info.start_time)),
            ]
        )
    header = ["campaign", "data set", "best validation accuracy, %", "trials", "state", "begun (UTC)"]
    return Table(header, rows, "Campaigns", name="campaigns", sticky=True) if rows else None
