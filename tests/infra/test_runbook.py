"""The runbook speaks of all of it, and its sums are right; ``tests/test_documentation.py`` checks its commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
RUNBOOK = (ROOT / "infra" / "RUNBOOK.md").read_text()


def test_the_runbook_speaks_of_all_of_it() -> None:
    headings = set(re.findall(r"^## (.+)$", RUNBOOK, flags=re.M))
    assert {"Bring up", "Submit", "Watch", "Search", "Schedule", "Upgrade with a running job",
            "Restore, from the bucket and the database", "Cost, and how to stop it"} <= headings  # fmt: skip


def test_every_manifest_that_is_named_is_there() -> None:
    for file in re.findall(r"(?:apply -f|crontab|compose -f) (infra/\S+)", RUNBOOK):
        assert (ROOT / file.rstrip("`")).is_file(), file
    for overlay in re.findall(r"kubectl apply -k ([\w/-]+)", RUNBOOK):
        assert (ROOT / overlay / "kustomization.yaml").is_file(), overlay


def test_costs_are_the_sums_of_the_table_of_prices() -> None:
    prices = yaml.safe_load((ROOT / "infra" / "costs.yaml").read_text())
    hours, machines = prices["hours_per_month"], prices["instance_hour"]

    def disk(gib: int) -> float:
        return gib * float(prices["disk_gib_month"]) / hours

    head, worker = machines["m6i.xlarge"] + disk(200), machines["g5.2xlarge"] + disk(200)
    wanted = {
        "head": head, "a GPU worker, on demand": worker, "8 workers on demand and the head": head + 8 * worker,
        "MLflow host": machines["t3.large"] + disk(50), "Kubernetes' control plane": prices["eks_hour"],
        "100 GiB in the bucket": 100 * prices["s3_gib_month"] / hours,
    }  # fmt: skip
    rows = dict(re.findall(r"^\| ([^|]+?) \| [^|]*? ?\| ([\d.]+) \|", RUNBOOK, flags=re.M))
    assert rows.keys() == wanted.keys()
    for name, shown in rows.items():
        assert float(shown) == pytest.approx(wanted[name], abs=0.5 * 10 ** -len(shown.partition(".")[2])), name
    assert f"noted on {str(prices['noted']).split(',')[0]}" in RUNBOOK and "look them up" in RUNBOOK


def test_what_the_cluster_is_made_of_has_a_price() -> None:
    prices = yaml.safe_load((ROOT / "infra" / "costs.yaml").read_text())["instance_hour"]
    types = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())["available_node_types"].values()
    for node in types:
        assert node["node_config"]["InstanceType"] in prices
        assert node["node_config"]["BlockDeviceMappings"][0]["Ebs"]["VolumeSize"] == 200
