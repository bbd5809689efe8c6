"""The pipeline beside its peers: python -m docs.studies.peers [what] [key=value ...], with the keys of jobs.benchmark.

For an environment that has the peers too: see requirements.txt.
"""

import sys

from docs.studies.benchmark.rows import ROWS
from docs.studies.benchmark.run import benchmark
from jobs._main import run

if __name__ == "__main__":
    ROWS.clear()  # the peers' rows alone
    from docs.studies.peers import solvers, step, stream  # noqa: F401

    run("benchmark", benchmark, sys.argv[1:], word="what")
