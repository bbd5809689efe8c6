"""A day in five minutes: many who use one head at once, while something of it is killed or taken away."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.conftest import ROOT

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(3600)]


def test_a_day_in_five_minutes(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    command = [sys.executable, "-m", "tests.cluster.day", "minutes=5", "seed=0", "people=3", "at_once=3", "--json"]
    done = subprocess.run([*command, tmp_path / "day.json"], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "day.json").read_text())
    outcome = f"{found['jobs']} jobs: {found['runs with the weights of undisturbed ones']} runs with the same weights"
    record_property("fault", {"fault": "a day in five minutes", "outcome": outcome, "seconds": 300.0, "lost": None})
