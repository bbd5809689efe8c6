"""python -m jobs.scale ...: see --help."""

from jobs._main import run
from jobs._studies import study

if __name__ == "__main__":
    run("scale", study("scale", "scale"))
