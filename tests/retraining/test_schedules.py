"""The schedules call one command, which composes, on the cluster that the manifests bring up."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import store
from pipeline.config import compose
from pipeline.retraining.config import settings_of
from tests.infra.kustomize import one

INFRA = Path(__file__).resolve().parents[2] / "infra"
SCHEDULES = INFRA / "schedules"
NIGHTLY = re.compile(r"\d{1,2} \d{1,2} \* \* \*")


def load(name: str) -> dict[str, Any]:
    content = yaml.safe_load((SCHEDULES / name).read_text())
    assert isinstance(content, dict)
    return content


def cron_line() -> str:
    [line] = [line for line in (SCHEDULES / "crontab").read_text().splitlines() if line[:1].isdigit()]
    return line


def container() -> dict[str, Any]:
    [found] = load("cronjob.yaml")["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    return found


def commands() -> dict[str, list[str]]:
    """What every schedule runs on the cluster, behind ``ray job submit --``."""
    submitted = container()["command"]
    assert submitted[:4] == ["ray", "job", "submit", "--"]
    line = cron_line().split(" ray job submit --working-dir . -- ")[1].split(" >> ")[0]
    template = one("production/retrain", "RayCronJob")["spec"]["jobTemplate"]
    return {
        "raycronjob": shlex.split(template["entrypoint"]),
        "cronjob": submitted[4:],
        "crontab": shlex.split(line),
    }


def test_all_three_call_one_command() -> None:
    first, other, outside = commands().values()
    address = "tracking.uri=http://10.0.0.5:5000"  # outside of Kubernetes no secret names it
    assert other == first == [word for word in outside if word != address] and address in outside
    assert first[:3] == ["python", "-m", "jobs.retrain"]


@pytest.mark.parametrize("name", ["raycronjob", "cronjob", "crontab"])
def test_the_command_composes_and_keeps_everything_where_all_nodes_reach_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # a test before may have set it
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")  # in a submitted job a relative path is refused
    settings = settings_of(compose("retrain", commands()[name][3:]))
    assert store.is_remote(settings.train.dataset_uri) and store.is_remote(settings.uri)
    assert settings.train.tracking["uri"].startswith("http") and settings.retrain.exit_zero
    assert settings.train.data["source"]["grows"] and Path(settings.train.data["source"]["path"]).is_absolute()


def test_the_kuberay_cron_submits_to_a_cluster_of_its_own() -> None:
    manifest = one("production/retrain", "RayCronJob")
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayCronJob")
    assert set(manifest["spec"]) <= {"schedule", "jobTemplate"}, "which KubeRay 1.6 knows"
    template = manifest["spec"]["jobTemplate"]
    assert "clusterSelector" not in template and template["rayClusterSpec"]["workerGroupSpecs"]
    assert template["submissionMode"] == "K8sJobMode", "whose submitter calls `ray job submit`"
    assert template["backoffLimit"] == 0 and NIGHTLY.fullmatch(manifest["spec"]["schedule"])


def test_the_cronjob_reaches_the_cluster_with_its_token_and_its_image() -> None:
    manifest = load("cronjob.yaml")
    spec = manifest["spec"]
    assert (manifest["apiVersion"], manifest["kind"]) == ("batch/v1", "CronJob")
    assert spec["concurrencyPolicy"] == "Forbid" and NIGHTLY.fullmatch(spec["schedule"])
    job = spec["jobTemplate"]["spec"]
    assert job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"
    cluster = yaml.safe_load((INFRA / "k8s" / "cluster" / "raycluster.yaml").read_text())
    name = cluster["metadata"]["name"]
    env = {entry["name"]: entry for entry in container()["env"]}
    assert cluster["spec"]["authOptions"]["mode"] == env["RAY_AUTH_MODE"]["value"] == "token"
    assert env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": name, "key": "auth_token"}
    assert env["RAY_API_SERVER_ADDRESS"]["value"] == f"http://{name}-head-svc:8265"
    overlay = yaml.safe_load((INFRA / "k8s" / "production" / "cluster" / "kustomization.yaml").read_text())
    [image] = overlay["images"]
    assert container()["image"] == f"{image['newName']}:{image['newTag']}", "the cluster's own: one Ray on both sides"


def test_kubernetes_knows_every_field_of_the_cronjob() -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="needs the package kubernetes-validate")
    validator.validate(load("cronjob.yaml"), "1.33", strict=True)


def test_the_crontab_has_no_character_that_cron_would_change() -> None:
    line = cron_line()
    assert NIGHTLY.match(line) and "%" not in line and "flock --nonblock" in line
    settings = dict(
        text.split("=", 1) for text in (SCHEDULES / "crontab").read_text().splitlines() if re.match("[A-Z_]+=", text)
    )
    assert settings["RAY_AUTH_MODE"] == "token" and settings["RAY_AUTH_TOKEN_PATH"].startswith("/")
