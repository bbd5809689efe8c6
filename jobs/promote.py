"""python -m jobs.promote ...: see --help."""

from jobs._main import run
from pipeline.registry.promotion import promote_job

if __name__ == "__main__":
    run("promote", promote_job)
