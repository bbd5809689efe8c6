"""python -m jobs.train ...: see --help."""

from jobs._main import run
from pipeline.workflow import train

if __name__ == "__main__":
    run("train", train)
