"""python -m jobs.retrain ...: see --help."""

from jobs._main import run
from pipeline.retraining.run import retrain

if __name__ == "__main__":
    run("retrain", retrain)
