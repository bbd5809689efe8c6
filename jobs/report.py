"""python -m jobs.report [WHAT] ...: see --help.

WHAT is pages, cross_table, cross_domain, clustering or strangers, of a user's own runs and models; or results,
reproduction, campaign or embeddings, of the project itself: these need a checkout.
"""

from typing import Any

from jobs._main import run
from jobs._studies import study
from pipeline.config import Config
from pipeline.pages.report import report


def dispatch(raw: Config) -> dict[str, Any]:
    own = raw.get("what") in ("results", "readme", "reproduction", "campaign", "embeddings")  # readme: results, before
    return (study("report", "report") if own else report)(raw)


if __name__ == "__main__":
    run("report", dispatch, word="what")
