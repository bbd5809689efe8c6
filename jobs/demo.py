"""python -m jobs.demo: see --help."""

from jobs._main import run
from pipeline.demo import demo

if __name__ == "__main__":
    run("demo", demo)
