"""python -m jobs.report: make the README's tables from the measured files."""

from typing import Any

from jobs._main import run
from pipeline.config import Config
from pipeline.inference.files import write_atomic
from pipeline.report.measured import README, readme_text


def report(config: Config) -> dict[str, Any]:
    write_atomic(README, readme_text(README.read_text()).encode())
    print(f"{README.name} is up to date")
    return {"readme": str(README)}


if __name__ == "__main__":
    run("report", report)
