"""Commands that are printed work when they are pasted."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from pipeline.commands import command
from pipeline.config import compose
from pipeline.registry.tracking_config import registering
from pipeline.training.runs import Run

ROOT = Path(__file__).resolve().parent.parent
ODD = "/my runs/it's (1), new"


def pasted(text: str) -> dict:
    """The configuration that a shell would give the job."""
    python, module, job, *arguments = shlex.split(text)
    assert (python, module) == ("python", "-m")
    return compose(job.removeprefix("jobs."), arguments)


def test_a_value_is_what_it_was_whatever_is_in_it() -> None:
    assert pasted(Run("a", ODD, {}, {}, {}).resume)["resume"] == ODD
    found = pasted(command("tune", "resume=a", f"storage={ODD}"))
    assert (found["resume"], found["storage"]) == ("a", ODD)


def test_what_is_owed_to_mlflow_is_delivered_to_the_store_it_is_owed_to() -> None:
    usual = compose("train")["tracking"]
    assert registering("/runs/a", usual) == "python -m jobs.register run=/runs/a"
    for given in (
        compose("train", ["tracking=server", "tracking.uri=http://mlflow:5000"])["tracking"],
        compose("train", [f"tracking.uri=sqlite:///{ODD}/mlflow.db", f"tracking.artifacts={ODD}",
                          "tracking.experiment=my things"])["tracking"],
    ):  # fmt: skip
        found = pasted(registering(ODD, given))
        assert found["run"] == ODD
        assert {k: v for k, v in found["tracking"].items() if given[k] is not None} == {
            k: v for k, v in given.items() if v is not None
        }


def test_no_command_is_put_together_by_hand() -> None:
    """Where a value stands in it; ``command`` quotes it."""
    by_hand = re.compile(r"python -m jobs\.\w+[^\n\"']*=\{")
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in (ROOT / "pipeline").rglob("*.py")
        for line in path.read_text().splitlines()
        if by_hand.search(line) and "shlex" not in line
    ]
    assert not found, found


@pytest.mark.parametrize("tracking", [{}, {"uri": "sqlite:////x/mlflow.db"}])
def test_part_of_a_tracking_is_enough(tracking: dict) -> None:
    assert pasted(registering("/runs/a", tracking))["run"] == "/runs/a"
