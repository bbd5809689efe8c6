"""python -m jobs.export ...: see --help."""

from jobs._main import run
from pipeline.registry.export import export

if __name__ == "__main__":
    run("export", export)
