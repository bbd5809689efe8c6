"""The runbook speaks of all of it, and its sums are right; ``tests/test_documentation.py`` checks its commands."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
RUNBOOK = (ROOT / "infra" / "RUNBOOK.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", RUNBOOK, flags=re.S)


def test_the_runbook_speaks_of_all_of_it() -> None:
    headings = set(re.findall(r"^## (.+)$", RUNBOOK, flags=re.M))
    assert {"Bring up", "Submit", "Watch", "Search", "Schedule", "Upgrade with a running job",
            "Restore, from the bucket and the database", "Cost, and how to stop it"} <= headings  # fmt: skip


def test_every_manifest_that_is_named_is_there() -> None:
    for file in re.findall(r"(?:apply -f|crontab|compose -f) (infra/\S+)", RUNBOOK):
        assert (ROOT / file.rstrip("`")).is_file(), file
    for overlay in re.findall(r"kubectl apply -k ([\w/-]+)", RUNBOOK):
        assert (ROOT / overlay / "kustomization.yaml").is_file(), overlay


def compose_calls(text: str) -> list[tuple[str, str]]:
    """Of every block and every command within a line that calls Compose: the file, and the text before the call."""
    calls = []
    for code in [*BLOCKS, *re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"```.*?```", "", text, flags=re.S))]:
        for found in re.finditer(r"docker compose -f \S*?(\w+/compose\.yaml) (?:up|exec|run|down)", code):
            calls.append((found[1], code[: found.start()]))
    return calls


def test_whoever_calls_compose_sets_what_its_file_requires() -> None:
    """Compose reads the file before every command, and refuses it where a required variable is missing."""
    calls = compose_calls(RUNBOOK)
    assert len(calls) >= 7 and {file for file, _ in calls} == {"mlflow/compose.yaml", "monitoring/compose.yaml"}
    for file, before in calls:
        for name in re.findall(r"\$\{(\w+):\?", (ROOT / "infra" / file).read_text()):
            assert re.search(rf"export [^\n]*\b{name}=|\b{name}=\S+ [^\n]*$", before), (file, name, before)
    for code in BLOCKS:  # a server that is started with other variables than before is made anew with them
        if re.search(r"mlflow/compose\.yaml (up|run)", code):
            assert "MLFLOW_BIND=" in code and "MLFLOW_ALLOWED_HOSTS=" in code


STAND_IN = {
    "docker": """
test -n "${SECRETS:-}" && test -n "${BUCKET:-}" || { echo "required variable SECRETS is missing a value" >&2; exit 1; }
echo "docker $*" >> "$LOG"
case "$*" in
  *pg_dump*) name="${@: -1}"; echo "copy of $name"; test "$name" != "${BROKEN:-}" ;;
  *pg_restore*) content=$(cat); echo "restored: $content" >> "$LOG"; test "$content" != "copy of ${BROKEN:-}" ;;
esac
""",
    "aws": """
echo "aws $*" >> "$LOG"
case "$3" in
  s3://*) name=$(basename "$3"); echo "copy of ${name%-*}" > "$4" ;;
  -) cat >> "$LOG" ;;
  *) cat "$3" >> "$LOG" ;;
esac
""",
}


def follow(code: str, folder: Path, **more: str) -> tuple[int, str]:
    """Run a block as cron would, where docker and aws write down what they are asked; status and writing."""
    folder.mkdir()
    for name, text in STAND_IN.items():
        (folder / name).write_text(f"#!/bin/bash{text}")
        (folder / name).chmod(0o755)
    log = folder / "log"
    log.touch()
    own = {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder), "LOG": str(log), "TMPDIR": str(folder)}
    done = subprocess.run(["bash", "-c", code], env={**own, **more}, capture_output=True, text=True)
    assert sorted(path.name for path in folder.iterdir()) == ["aws", "docker", "log"], "copies are left"
    return done.returncode, log.read_text()


def test_the_containers_read_their_secrets_and_other_users_of_the_host_read_none(tmp_path: Path) -> None:
    """Alertmanager and Grafana run as users of their own, and a mounted file keeps the mode that it has on the host."""
    [make] = [code for code in BLOCKS if "secret()" in code]
    (tmp_path / ".meta-training").mkdir(mode=0o755)  # of before
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    subprocess.run(["bash", "-euc", make], env=environment, check=True)
    compose = yaml.safe_load((ROOT / "infra" / "monitoring" / "compose.yaml").read_text())
    mounted = {Path(secret["file"]).name for secret in compose["secrets"].values()}
    for folder in (".meta-training", ".meta-training-mlflow"):
        assert (tmp_path / folder).stat().st_mode & 0o777 == 0o700
    made = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.glob(".meta-training*/**/*") if path.is_file()}
    assert mounted == {"grafana_password", "alert_webhook"} and mounted < made.keys()
    for name, mode in made.items():
        assert mode == (0o644 if name in mounted else 0o600), name


def test_a_copy_of_the_database_is_stored_whole_or_not_at_all(tmp_path: Path) -> None:
    [backup] = [code for code in BLOCKS if "pg_dump" in code]
    status, log = follow(backup, tmp_path / "good")
    assert status == 0 and re.findall("^copy of .*", log, flags=re.M) == ["copy of mlflow", "copy of mlflow_auth"]
    assert re.search(r"aws s3 cp \S+ s3://your-bucket/backups/mlflow-\d{4}-\d\d-\d\d\.dump", log)
    status, log = follow(backup, tmp_path / "halfway", BROKEN="mlflow")
    assert status != 0 and "pg_dump" in log and "aws" not in log


def test_a_database_is_restored_whole_or_not_at_all(tmp_path: Path) -> None:
    [restore] = [code for code in BLOCKS if "pg_restore" in code]
    status, log = follow(restore, tmp_path / "good")
    assert status == 0 and re.findall("^restored: .*", log, flags=re.M) == [
        "restored: copy of mlflow", "restored: copy of mlflow_auth",
    ]  # fmt: skip
    assert log.count("--single-transaction --exit-on-error") == 2 and log.rstrip().endswith("up --detach")
    status, log = follow(restore, tmp_path / "broken", BROKEN="mlflow")
    assert status != 0 and not log.rstrip().endswith("up --detach")


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
