"""python -m jobs.tune ...: see --help."""

from jobs._main import run
from pipeline.search.arguments import translate
from pipeline.search.run import tune

if __name__ == "__main__":
    run("tune", tune, translate=translate)
