"""python -m jobs.benchmark [what] [--profile] ...: see --help."""

import sys

from jobs._main import run
from pipeline.benchmark.run import benchmark

if __name__ == "__main__":
    arguments = ["profile=trace.json" if argument == "--profile" else argument for argument in sys.argv[1:]]
    run("benchmark", benchmark, arguments, word="what")
