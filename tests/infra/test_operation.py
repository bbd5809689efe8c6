"""What an operator relies on: where pods land, who may do what, what is mounted, what is repeated, what it may cost."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.infra.kustomize import (
    INFRA,
    OVERLAYS,
    build,
    cluster_of,
    job_of,
    lasting_templates,
    one,
    pod_templates,
    ray_object,
    worker_templates,
)

SPOT = [  # labels of nodes that may be taken back: EKS's node groups, Karpenter, GKE, AKS
    {"eks.amazonaws.com/capacityType": "SPOT"},
    {"karpenter.sh/capacity-type": "spot"},
    {"cloud.google.com/gke-spot": "true"},
    {"kubernetes.azure.com/scalesetpriority": "spot"},
]
CRONJOB = yaml.safe_load((INFRA / "schedules" / "cronjob.yaml").read_text())
RAY_OVERLAYS = [name for name in OVERLAYS if not name.endswith(("/mlflow", "/namespace", "/restore"))]


def lands_on(pod: dict[str, Any], node: dict[str, str]) -> bool:
    """Whether the scheduler may place a pod on a node with these labels."""

    def holds(expression: dict[str, Any]) -> bool:
        value, values = node.get(expression["key"]), expression.get("values", [])
        held = {"In": value in values, "NotIn": value not in values,
                "Exists": value is not None, "DoesNotExist": value is None}  # fmt: skip
        return held[expression["operator"]]

    selected = all(node.get(key) == value for key, value in pod.get("nodeSelector", {}).items())
    affinity = pod.get("affinity", {}).get("nodeAffinity", {}).get("requiredDuringSchedulingIgnoredDuringExecution")
    terms = affinity["nodeSelectorTerms"] if affinity else [{"matchExpressions": []}]
    return selected and any(all(map(holds, term["matchExpressions"])) for term in terms)


@pytest.mark.parametrize("node", SPOT, ids=str)
def test_what_a_run_cannot_lose_lands_on_no_spot_node(node: dict[str, str]) -> None:
    manifests = [CRONJOB, *(manifest for overlay in OVERLAYS for manifest in build(overlay))]
    lasting = [template["spec"] for manifest in manifests for template in lasting_templates(manifest)]
    assert lasting and not [pod["containers"][0]["name"] for pod in lasting if lands_on(pod, node)]
    assert all(lands_on(pod, {}) for pod in lasting), "and on every other"


def test_the_spot_workers_do() -> None:
    workers = worker_templates(one("production/cluster", "RayCluster"))
    node = {"eks.amazonaws.com/capacityType": "SPOT", "node.kubernetes.io/instance-type": "g5.2xlarge"}
    assert [lands_on(template["spec"], node) for template in workers] == [True, False]


@pytest.mark.parametrize("overlay", RAY_OVERLAYS)
def test_only_the_head_may_ask_kubernetes(overlay: str) -> None:
    spec = cluster_of(ray_object(overlay))
    head = spec["headGroupSpec"]["template"]["spec"]["serviceAccountName"]
    accounts = {manifest["metadata"]["name"]: manifest for manifest in build(overlay)
                if manifest["kind"] == "ServiceAccount"}  # fmt: skip
    for template in worker_templates(ray_object(overlay)):
        account = template["spec"]["serviceAccountName"]
        assert account != head and template["spec"]["automountServiceAccountToken"] is False
        assert accounts[account]["automountServiceAccountToken"] is False
    assert "automountServiceAccountToken" not in accounts[head]
    if overlay.startswith("production"):  # both reach the bucket
        roles = {account["metadata"]["annotations"]["eks.amazonaws.com/role-arn"] for account in accounts.values()}
        assert len(roles) == 1


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nothing_but_heads_has_a_token_of_kubernetes(overlay: str) -> None:
    for manifest in build(overlay):
        for template in pod_templates(manifest):
            head = template["spec"]["containers"][0]["name"] == "ray-head"
            assert template["spec"].get("automountServiceAccountToken", True) is head
    assert CRONJOB["spec"]["jobTemplate"]["spec"]["template"]["spec"]["automountServiceAccountToken"] is False


@pytest.mark.parametrize("overlay", RAY_OVERLAYS)
def test_every_node_is_told_where_the_bucket_is(overlay: str) -> None:
    region = one(overlay, "ConfigMap") if overlay.startswith("development") else next(
        manifest for manifest in build(overlay) if manifest["metadata"]["name"] == "storage"
    )  # fmt: skip
    assert set(region["data"]) == {"AWS_REGION"}
    manifest = ray_object(overlay)
    for template in [cluster_of(manifest)["headGroupSpec"]["template"], *worker_templates(manifest)]:
        [container] = template["spec"]["containers"]
        config, login, *_ = container["envFrom"]
        assert config == {"configMapRef": {"name": "storage"}}
        # Development has no role: without endpoint and login no pod is to start.
        assert login == {"secretRef": {"name": "storage", "optional": overlay.startswith("production")}}
        assert not [entry["name"] for entry in container["env"] if entry["name"].startswith("AWS_")]


def absolute_paths(arguments: list[str]) -> list[str]:
    return [value for _, _, value in (argument.partition("=") for argument in arguments) if value.startswith("/")]


def mounts(pod: dict[str, Any]) -> set[str]:
    volumes = {volume["name"] for volume in pod["volumes"]}
    [container] = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    return {mount["mountPath"] for mount in container["volumeMounts"]}


@pytest.mark.parametrize("overlay", ["production/retrain", "production/cluster"])
def test_every_path_that_a_schedule_reads_is_mounted_where_it_runs(overlay: str) -> None:
    """KubeRay's schedule brings its cluster; the other one submits to the standing cluster."""
    manifest = ray_object(overlay)
    if overlay == "production/retrain":
        arguments = shlex.split(job_of(manifest)["entrypoint"])
    else:
        arguments = CRONJOB["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]["command"]
    paths = absolute_paths(arguments)
    assert paths
    for template in [cluster_of(manifest)["headGroupSpec"]["template"], *worker_templates(manifest)]:
        for path in paths:
            assert any(Path(path).is_relative_to(mounted) for mounted in mounts(template["spec"])), path
    claim = one(overlay, "PersistentVolumeClaim")
    volume = one(overlay, "PersistentVolume")
    assert claim["spec"]["volumeName"] == volume["metadata"]["name"]
    asked = {key: claim["metadata"][key] for key in ("namespace", "name")}
    assert volume["spec"]["claimRef"] == asked
    assert claim["spec"]["accessModes"] == volume["spec"]["accessModes"] == ["ReadOnlyMany"]
    assert claim["spec"]["storageClassName"] == volume["spec"]["storageClassName"] == ""


def test_a_lost_connection_of_the_submitter_is_no_lost_job() -> None:
    for overlay in OVERLAYS:
        if overlay.endswith(("/train", "/campaign", "/retrain")):
            assert job_of(ray_object(overlay))["submitterConfig"]["backoffLimit"] > 2, overlay


def test_nights_do_not_pile_up() -> None:
    """What KubeRay's RayCronJob lacks, its jobs have: an end before the next begins, and rules that delete them."""
    cron = one("production/retrain", "RayCronJob")["spec"]
    assert re.fullmatch(r"\d{1,2} \d{1,2} \* \* \*", cron["schedule"]), "daily"
    job = cron["jobTemplate"]
    assert (job["backoffLimit"] + 1) * job["activeDeadlineSeconds"] < 86400
    assert "clusterSelector" not in job, "KubeRay deletes no RayJob that has one"
    assert not {"shutdownAfterJobFinishes", "ttlSecondsAfterFinished"} & set(job), "KubeRay takes either these or rules"
    after: dict[tuple[str, str], dict[str, int]] = {}
    for rule in job["deletionStrategy"]["deletionRules"]:
        [(kind, status)] = [(k, v) for k, v in rule["condition"].items() if k != "ttlSeconds"]
        after.setdefault((kind, status), {})[rule["policy"]] = rule["condition"]["ttlSeconds"]
    ends = {("jobStatus", "SUCCEEDED"), ("jobStatus", "FAILED"), ("jobDeploymentStatus", "Failed")}
    assert set(after) == ends
    for policies in after.values():
        assert policies["DeleteCluster"] <= 600 and policies["DeleteCluster"] < policies["DeleteSelf"] <= 7 * 86400


def test_no_drain_takes_a_head_under_a_job() -> None:
    for overlay in RAY_OVERLAYS:
        labels = cluster_of(ray_object(overlay))["headGroupSpec"]["template"]["metadata"]["labels"]
        own = labels | {"ray.io/node-type": "head"}  # which KubeRay sets
        budgets = [manifest["spec"] for manifest in build(overlay) if manifest["kind"] == "PodDisruptionBudget"]
        [mine] = [budget for budget in budgets if budget["selector"]["matchLabels"].items() <= own.items()]
        assert mine["minAvailable"] == 1 and mine["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
        for template in worker_templates(ray_object(overlay)):
            worker = template["metadata"]["labels"] | {"ray.io/node-type": "worker"}
            assert not [one for one in budgets if one["selector"]["matchLabels"].items() <= worker.items()]


def test_classes_of_priority_are_those_that_pods_name() -> None:
    for environment in ("development", "production"):
        classes = {manifest["metadata"]["name"]: manifest for manifest in build(f"{environment}/namespace")
                   if manifest["kind"] == "PriorityClass"}  # fmt: skip
        for overlay in [name for name in OVERLAYS if name.startswith(environment)]:
            for manifest in build(overlay):
                for template in lasting_templates(manifest):
                    lasting = classes[template["spec"]["priorityClassName"]]
                for template in worker_templates(manifest):
                    worker = classes[template["spec"]["priorityClassName"]]
                    assert worker["preemptionPolicy"] == "Never" and worker["value"] < lasting["value"]
    assert CRONJOB["spec"]["jobTemplate"]["spec"]["template"]["spec"]["priorityClassName"] in classes


@pytest.mark.parametrize("environment", ["development", "production"])
def test_a_quota_bounds_the_cost_and_leaves_room_for_a_job(environment: str) -> None:
    namespace = one(f"{environment}/namespace", "Namespace")["metadata"]["name"]
    quota = one(f"{environment}/namespace", "ResourceQuota")
    assert quota["metadata"]["namespace"] == namespace == ray_object(f"{environment}/cluster")["metadata"]["namespace"]
    hard = quota["spec"]["hard"]
    assert hard["services.loadbalancers"] == hard["services.nodeports"] == "0"
    groups = cluster_of(ray_object(f"{environment}/cluster"))["workerGroupSpecs"]
    gpus = cpus = 0
    for group in groups:
        asked = group["template"]["spec"]["containers"][0]["resources"]["requests"]
        gpus += group["maxReplicas"] * int(asked.get("nvidia.com/gpu", 0))
        cpus += group["maxReplicas"] * int(asked["cpu"])
    assert gpus <= int(hard["requests.nvidia.com/gpu"]) <= 2 * gpus
    assert 2 * cpus < int(hard["requests.cpu"])
    limits = one(f"{environment}/namespace", "LimitRange")["spec"]["limits"]
    assert limits[0]["default"] and limits[0]["defaultRequest"], "a quota refuses pods that ask for nothing"


@pytest.mark.parametrize("environment", ["development", "production"])
def test_nothing_comes_into_the_namespace_that_no_policy_lets_in(environment: str) -> None:
    policy = one(f"{environment}/namespace", "NetworkPolicy")["spec"]
    assert policy == {"podSelector": {}, "policyTypes": ["Ingress"]}


def test_the_autoscaler_beside_the_head_has_no_privileges() -> None:
    for overlay in RAY_OVERLAYS:
        security = cluster_of(ray_object(overlay))["autoscalerOptions"]["securityContext"]
        assert security == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
