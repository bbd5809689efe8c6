"""The table of faults: python -m tests.cluster.faults [--json FILE] [pytest's arguments]

Runs the tests that are marked ``faults`` and prints a line for each fault: what came of it, how long it took, and how
much longer than the untouched run of the same configuration (where there is one to compare with). A fault whose test
failed or was skipped has its line too. The exit status is pytest's.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.tables import text_table

FOLDER = Path(__file__).parent


class Table:
    """Collects what the tests say by ``record_property("fault", ...)``."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.rpartition("::")[2]
        if report.when == "call" and report.passed:
            said = [value for key, value in report.user_properties if key == "fault"]
            self.rows += [{**fault, "held": True} for fault in said]
        elif report.failed:
            self.rows.append({"fault": name, "outcome": f"FAILED: {_last_line(report)}", "held": False})
        elif report.skipped:
            self.rows.append({"fault": name, "outcome": f"not tried: {_reason(report)}", "held": None})

    def text(self) -> str:
        return text_table(
            ["fault", "outcome", "seconds", "lost"],
            [[row["fault"], row["outcome"], _seconds(row, "seconds"), _seconds(row, "lost")] for row in self.rows],
        )


def _seconds(row: dict[str, Any], key: str) -> str:
    return f"{row[key]:.0f}" if row.get(key) is not None else ""


def _last_line(report: pytest.TestReport) -> str:
    return (report.longreprtext.strip().splitlines() or ["?"])[-1][:120]


def _reason(report: pytest.TestReport) -> str:
    return str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr).removeprefix("Skipped: ")


def main(arguments: list[str]) -> int:
    target = None
    if "--json" in arguments:
        place = arguments.index("--json")
        target = Path(arguments[place + 1])
        del arguments[place : place + 2]
    table, began = Table(), time.monotonic()
    status = pytest.main(["-m", "faults", "-q", str(FOLDER), *arguments], plugins=[table])
    held = sum(row["held"] is True for row in table.rows)
    print(f"\n{table.text()}\n\n{held} of {len(table.rows)} faults held, in {time.monotonic() - began:.0f} s")
    print("lost: seconds more than the untouched run of the same configuration, on the same nodes")
    if target is not None:
        target.write_text(json.dumps(table.rows, indent=1) + "\n")
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
