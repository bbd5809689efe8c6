"""The manifests for Kubernetes: built, held against the published schemas, and against what they promise."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import socket
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

import pipeline
from pipeline.config import compose
from pipeline.search.arguments import translate
from tests.infra.kustomize import INFRA, OVERLAYS, build, cluster_of, job_of, one, pod_templates, ray_object

KUBERNETES = "1.33"  # whose schemas the objects are held against
CRDS = "KUBERAY_CRDS"  # folder or URL that holds ray.io_rayclusters.yaml, _rayjobs and _raycronjobs; else the release's
RELEASE = "https://raw.githubusercontent.com/ray-project/kuberay/v1.7.0/ray-operator/config/crd/bases"
RAY = re.search(r"^ray==(\S+)", (INFRA.parent / "constraints.txt").read_text(), flags=re.M)[1]
CLUSTERS = [name for name in OVERLAYS if name.endswith("/cluster")]
JOBS = [name for name in OVERLAYS if name.endswith(("/train", "/campaign"))]
RAY_OVERLAYS = [*CLUSTERS, *JOBS, "production/retrain"]


def test_every_environment_has_its_cluster_and_its_jobs() -> None:
    wanted = {f"{environment}/{what}" for environment in ("development", "production")
              for what in ("namespace", "cluster", "train", "campaign")}  # fmt: skip
    assert wanted | {f"production/{what}" for what in ("mlflow", "restore", "retrain")} == set(OVERLAYS)


@pytest.mark.parametrize("file", sorted(INFRA.rglob("kustomization.yaml")), ids=str)
def test_what_a_kustomization_names_exists(file: Path) -> None:
    content = yaml.safe_load(file.read_text())
    named = content.get("resources", []) + content.get("components", [])
    named += [name for generator in content.get("configMapGenerator", []) for name in generator.get("files", [])]
    assert named
    for name in named:
        path = file.parent / name
        assert path.is_file() or (path / "kustomization.yaml").is_file(), path


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubernetes_knows_every_field(overlay: str) -> None:
    """Objects of Kubernetes, and the pod templates inside those of Ray, against the published schemas."""
    pytest.importorskip("kubernetes_validate", reason="needs the package kubernetes-validate")
    for manifest in build(overlay):
        if "." not in manifest["apiVersion"].split("/")[0] or ".k8s.io/" in manifest["apiVersion"]:
            validate(json.dumps(manifest))
        for template in pod_templates(manifest):
            metadata = {**template.get("metadata", {}), "name": "template"}
            validate(json.dumps({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}))


@functools.cache
def validate(manifest: str) -> None:
    """Once for objects that several overlays share."""
    import kubernetes_validate

    kubernetes_validate.validate(json.loads(manifest), KUBERNETES, strict=True)


def test_the_schemas_refuse_a_typo() -> None:
    pytest.importorskip("kubernetes_validate")
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": {"containers": [], "volume": []}}
    with pytest.raises(Exception, match="volume"):
        validate(json.dumps(pod))


def closed(schema: Any) -> Any:
    """The schema of a custom resource with unknown fields refused, as the API server prunes them."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: closed(value) for key, value in schema.items()}
    named = isinstance(out.get("properties"), dict) and out.get("type") == "object"
    if named and not schema.get("x-kubernetes-preserve-unknown-fields"):
        out.setdefault("additionalProperties", False)
    if out.pop("x-kubernetes-int-or-string", False):
        out = {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    return out


def check_custom(manifest: dict[str, Any], definition: dict[str, Any]) -> None:
    version = manifest["apiVersion"].split("/")[1]
    found = next(v for v in definition["spec"]["versions"] if v["name"] == version)
    schema = closed(found["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # the API server's own
    jsonschema.validate(manifest, schema)


def test_a_typo_in_a_custom_resource_is_refused() -> None:
    spec = {"type": "object", "properties": {"a": {"type": "string"}, "n": {"x-kubernetes-int-or-string": True}}}
    whole = {"type": "object", "properties": {"apiVersion": {}, "kind": {}, "metadata": {}, "spec": spec}}
    definition = {"spec": {"versions": [{"name": "v1", "schema": {"openAPIV3Schema": whole}}]}}
    good = {"apiVersion": "ray.io/v1", "kind": "X", "metadata": {"name": "x"}, "spec": {"a": "1", "n": "5%"}}
    check_custom(good, definition)
    with pytest.raises(jsonschema.ValidationError, match="'b' was unexpected"):
        check_custom({**good, "spec": {"b": "1"}}, definition)


@pytest.mark.parametrize("overlay", RAY_OVERLAYS)
def test_kuberay_knows_every_field(overlay: str) -> None:
    manifest = ray_object(overlay)
    check_custom(manifest, definition_of(manifest["kind"]))


@functools.cache
def definition_of(kind: str) -> dict[str, Any]:
    """KubeRay's definition of a kind: a megabyte of YAML, read once."""
    where, name = os.environ.get(CRDS, RELEASE), f"ray.io_{kind.lower()}s.yaml"
    text = fetched(f"{where.rstrip('/')}/{name}") if "://" in where else (Path(where) / name).read_text()
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def fetched(address: str) -> str:
    """What is at an address. Where nothing can be reached and none was asked for, the test is skipped, and says so."""
    if address.startswith(RELEASE) and not reachable(urllib.parse.urlsplit(RELEASE).hostname or ""):
        pytest.skip(f"{RELEASE} cannot be reached from here: set {CRDS} to a folder with KubeRay's CRDs")
    with urllib.request.urlopen(address, timeout=60) as answer:
        text: str = answer.read().decode()
    return text


@functools.cache
def reachable(host: str) -> bool:
    try:
        socket.create_connection((host, 443), timeout=5).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("overlay", RAY_OVERLAYS)
def test_ray_is_the_pinned_one_with_authentication_and_an_idle_head(overlay: str) -> None:
    spec = cluster_of(ray_object(overlay))
    assert spec["rayVersion"] == RAY
    assert spec["authOptions"] == {"mode": "token"}
    head = spec["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == head["rayStartParams"]["num-gpus"] == "0"
    assert head["serviceType"] == "ClusterIP"
    assert spec["enableInTreeAutoscaling"] and spec["autoscalerOptions"]["version"] == "v2"
    for group in spec["workerGroupSpecs"]:
        assert group["replicas"] == group["minReplicas"] == 0 < group["maxReplicas"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_container_is_pinned_limited_and_without_privileges(overlay: str) -> None:
    serving = {"Deployment", "StatefulSet", "RayCluster", "RayJob", "RayCronJob"}
    for kind, template in [
        (manifest["kind"], found) for manifest in build(overlay) for found in pod_templates(manifest)
    ]:
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True and spec["securityContext"]["runAsUser"] > 0
        assert not spec.get("hostNetwork")
        for container in spec["containers"] + spec.get("initContainers", []):
            image, _, tag = container["image"].rpartition(":")
            assert image and tag and tag != "latest", container["image"]
            if image.endswith(("meta-training", "mlflow-server")):
                variant = "-cuda" if overlay.startswith("production") else "-cpu"
                assert tag == pipeline.__version__ + (variant if image.endswith("meta-training") else "")
            for bound in ("requests", "limits"):
                assert {"cpu", "memory"} <= set(container["resources"][bound]), container["name"]
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False and security["capabilities"] == {"drop": ["ALL"]}
            if kind in serving and container["name"] != "submitter":
                assert {"readinessProbe", "livenessProbe"} <= set(container), container["name"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nothing_is_open_to_the_outside_and_no_secret_is_written_down(overlay: str) -> None:
    for manifest in build(overlay):
        assert manifest["kind"] not in ("Ingress", "Secret"), manifest["metadata"]["name"]
        if manifest["kind"] == "Service":
            assert manifest["spec"].get("type", "ClusterIP") == "ClusterIP"
    assert not re.search(r"NodePort|LoadBalancer|hostPort|://[^/\s\"]*:[^/\s\"]*@", json.dumps(build(overlay)))


@pytest.mark.parametrize("overlay", [name for name in RAY_OVERLAYS if name.startswith("production/")])
def test_gpus_are_requested_in_production_only_as_limits(overlay: str) -> None:
    markets = {}
    for group in cluster_of(ray_object(overlay))["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        resources = pod["containers"][0]["resources"]
        assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] == "1"
        assert pod["terminationGracePeriodSeconds"] >= 120
        markets[group["groupName"]] = pod["nodeSelector"]["eks.amazonaws.com/capacityType"]
    assert markets == {"gpu-spot": "SPOT", "gpu-on-demand": "ON_DEMAND"}


def test_development_asks_for_no_gpu() -> None:
    for overlay in OVERLAYS:
        if overlay.startswith("development/"):
            requested = json.dumps([pod_templates(manifest) for manifest in build(overlay)])
            assert "nvidia.com/gpu" not in requested


@pytest.mark.parametrize("overlay", JOBS)
def test_the_command_of_a_job_is_understood(overlay: str) -> None:
    """Its arguments compose, whether the run is begun or gone on with."""
    job = one(overlay, "RayJob")["spec"]
    assert job["backoffLimit"] >= 1 and job["shutdownAfterJobFinishes"] and job["activeDeadlineSeconds"] > 0
    script, name, run, *arguments = shlex.split(job["entrypoint"])
    assert (INFRA / "image" / script).is_file()
    assert name == {"train": "train", "campaign": "tune"}[overlay.split("/")[1]]
    assert not re.search(r"[|&;$<>`]", job["entrypoint"]), "KubeRay and Ray both put the entrypoint through a shell"
    if name == "tune":
        arguments = translate(arguments)
    config = compose(name, [f"name={run}", *arguments])
    assert config["name"] == run and config["storage"].startswith("s3://BUCKET/")
    if name == "train":
        assert config["data"]["root"].startswith("s3://BUCKET/")
        spec = cluster_of(one(overlay, "RayJob"))
        most = sum(group["maxReplicas"] for group in spec["workerGroupSpecs"])
        assert config["cluster"]["workers"] <= most * (2 if overlay.startswith("development") else 1)


def test_the_jobs_run_on_the_cluster_that_the_overlay_describes() -> None:
    for overlay in [*JOBS, "production/retrain"]:
        environment, name = overlay.split("/")
        manifest = ray_object(overlay)
        own, described = cluster_of(manifest), cluster_of(one(f"{environment}/cluster", "RayCluster"))
        label = "app.kubernetes.io/instance"  # by which the disruption budgets tell the heads apart
        assert own["headGroupSpec"]["template"]["metadata"]["labels"][label] == name == manifest["metadata"]["name"]
        renamed = json.loads(json.dumps(own))
        renamed["headGroupSpec"]["template"]["metadata"]["labels"][label] = "cluster"
        assert renamed == described
        assert job_of(manifest)["submitterPodTemplate"] == one(f"{environment}/cluster", "PodTemplate")["template"]
        assert not {"RayCluster", "PodTemplate"} & {manifest["kind"] for manifest in build(overlay)}
