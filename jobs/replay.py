"""python -m jobs.replay ...: see --help."""

from jobs._main import run
from pipeline.training.replay import replay_job

if __name__ == "__main__":
    run("replay", replay_job)
