"""python -m jobs.evaluate ...: see --help."""

from jobs._main import run
from pipeline.workflow import evaluate_job

if __name__ == "__main__":
    run("evaluate", evaluate_job)
