"""python -m jobs.scale ...: see --help."""

from jobs._main import run
from pipeline.report.scale import scale

if __name__ == "__main__":
    run("scale", scale)
