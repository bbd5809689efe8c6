"""python -m jobs.classify ...: see --help."""

from jobs._main import run
from pipeline.registry.classify import classify

if __name__ == "__main__":
    run("classify", classify)
