"""python -m jobs.report [pages | cross_table | cross_domain | clustering | strangers | results | campaign | ...] ...

See --help. The last four compare with papers and write the project's own results: they need a checkout.
"""

from typing import Any

from jobs._main import run
from jobs._studies import study
from pipeline.config import Config
from pipeline.pages.report import report


def dispatch(raw: Config) -> dict[str, Any]:
    own = raw.get("what") in ("results", "readme", "reproduction", "campaign", "embeddings")
    return (study("report", "report") if own else report)(raw)


if __name__ == "__main__":
    run("report", dispatch, word="what")
