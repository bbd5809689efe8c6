"""python -m jobs.benchmark [what] [--profile] ...: see --help."""

from jobs._main import run
from jobs._studies import study
from pipeline.config import gather


def translate(arguments: list[str]) -> list[str]:
    named = ["profile=trace.json" if argument == "--profile" else argument for argument in arguments]
    return gather(named, {"base": "train"})


if __name__ == "__main__":
    run("benchmark", study("benchmark.run", "benchmark"), word="what", translate=translate)
