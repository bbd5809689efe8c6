"""The pipeline beside its peers: python -m tests.benchmarks [what] [key=value ...], with the keys of jobs.benchmark.

For an environment that has the peers too: see requirements.txt.
"""

import sys

from jobs._main import run
from pipeline.benchmark.rows import ROWS
from pipeline.benchmark.run import benchmark

if __name__ == "__main__":
    ROWS.clear()  # the peers' rows alone
    from tests.benchmarks import solvers, step, stream  # noqa: F401

    run("benchmark", benchmark, sys.argv[1:], word="what")
