"""python -m jobs.embed ...: see --help."""

from jobs._main import run
from pipeline.training.embed import embed

if __name__ == "__main__":
    run("embed", embed)
