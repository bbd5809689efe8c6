"""Every command of the runbook exists: jobs compose, options are known, files are there, sums are right."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from pipeline.config import compose
from pipeline.search.arguments import translate

ROOT = Path(__file__).resolve().parents[2]
RUNBOOK = (ROOT / "infra" / "RUNBOOK.md").read_text()
PAGES = [ROOT / "infra" / "RUNBOOK.md", ROOT / "infra" / "README.md"]
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", RUNBOOK, flags=re.S)).replace("\\\n", " ")
INLINE = re.findall(r"`([^`\n]+)`", re.sub(r"```bash\n.*?```", "", RUNBOOK, flags=re.S))
COMMANDS = [line.strip() for line in [*BLOCKS.splitlines(), *INLINE]]
JOBS = [m[0] for line in COMMANDS if (m := re.search(r"python -m jobs\.\w+(?: (?:[\w.]+=\S+|'[^']*'))*", line))]
RAY = [line for line in COMMANDS if re.match(r"ray [a-z]", line)]


def test_the_runbook_speaks_of_all_of_it() -> None:
    headings = set(re.findall(r"^## (.+)$", RUNBOOK, flags=re.M))
    assert {"Bring up", "Submit", "Watch", "Search", "Schedule", "Upgrade with a running job",
            "Restore, from the bucket and the database", "Cost, and how to stop it"} <= headings  # fmt: skip
    assert len(JOBS) >= 12 and len(RAY) >= 10


@pytest.mark.parametrize("command", sorted(set(JOBS)))
def test_a_job_composes(command: str) -> None:
    _, _, job, *arguments = shlex.split(command)
    job = job.removeprefix("jobs.")
    assert (ROOT / "jobs" / f"{job}.py").is_file()
    arguments = [re.sub(r"=NUMBER$", "=1", argument) for argument in arguments]
    config = compose(job, translate(arguments) if job == "tune" else arguments)
    for argument in arguments:
        key, _, value = argument.partition("=")
        if job == "tune" and key.startswith("base."):
            compose("train", [argument.removeprefix("base.")])
        elif "." not in key and not isinstance(config[key], dict):
            assert str(config[key]).lower() == value.lower()


@pytest.mark.parametrize("command", sorted(set(RAY)))
def test_ray_knows_the_command_and_its_options(command: str) -> None:
    from ray.scripts.scripts import cli

    words = shlex.split(command.split(" -- ")[0].split(" #")[0].rstrip("& "))[1:]
    group: Any = cli
    while words and isinstance(group, click.Group):
        name = words.pop(0)
        assert name in group.commands, f"ray has no command {name!r}"
        group = group.commands[name]
    known = {option for parameter in group.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for word in words:
        if word.startswith("-"):
            assert word.split("=")[0] in known, f"{command}: no option {word}"
        elif word.endswith(".yaml"):
            assert (ROOT / word).is_file(), word


def test_every_file_that_is_named_is_there() -> None:
    for page in PAGES:
        text = page.read_text()
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            assert (page.parent / link).exists(), link
        for path in re.findall(r"(?<![\w/.-])((?:infra|pipeline|tests|jobs)/[\w./*-]*\w)", text):
            assert list(ROOT.glob(path)), f"{page.name}: {path}"
    for file in re.findall(r"(?:apply -f|crontab|compose -f) (infra/\S+)", RUNBOOK):
        assert (ROOT / file.rstrip("`")).is_file(), file
    for overlay in re.findall(r"kubectl apply -k ([\w/-]+)", RUNBOOK):
        assert (ROOT / overlay / "kustomization.yaml").is_file(), overlay
    anchors = {
        re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^## (.+)$", RUNBOOK, flags=re.M)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", RUNBOOK)) <= anchors


def test_the_shell_accepts_the_blocks() -> None:
    for block in re.findall(r"```bash\n(.*?)```", RUNBOOK, flags=re.S):
        done = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr + block


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
