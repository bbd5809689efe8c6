"""python -m jobs.register ...: see --help."""

from jobs._main import run
from pipeline.registry.deliver import deliver

if __name__ == "__main__":
    run("register", deliver)
