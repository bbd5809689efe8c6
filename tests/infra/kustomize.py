"""The manifests of ``infra``, built as ``kubectl apply -k`` builds them."""

from __future__ import annotations

import functools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

INFRA = Path(__file__).resolve().parents[2] / "infra"
OVERLAYS = sorted(str(file.parent.relative_to(INFRA / "k8s")) for file in INFRA.glob("k8s/*/*/kustomization.yaml")
                  if file.parent.parent.name != "jobs")  # fmt: skip

Manifest = dict[str, Any]


@functools.cache
def build(overlay: str) -> tuple[Manifest, ...]:
    """All objects of an overlay; skips where neither kubectl nor kustomize is installed."""
    for command in (["kubectl", "kustomize"], ["kustomize", "build"]):
        if shutil.which(command[0]):
            done = subprocess.run([*command, str(INFRA / "k8s" / overlay)], capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stderr
            return tuple(yaml.safe_load_all(done.stdout))
    pytest.skip("needs kubectl or kustomize to build the overlays")


def one(overlay: str, kind: str) -> Manifest:
    found = [manifest for manifest in build(overlay) if manifest["kind"] == kind]
    assert len(found) == 1, [manifest["kind"] for manifest in build(overlay)]
    return found[0]


def job_of(manifest: Manifest) -> Manifest:
    """The job of a RayJob, or the one that a RayCronJob makes."""
    spec: Manifest = manifest["spec"]
    return spec["jobTemplate"] if manifest["kind"] == "RayCronJob" else spec


def cluster_of(manifest: Manifest) -> Manifest:
    """The description of the Ray cluster in a RayCluster, a RayJob or a RayCronJob."""
    if manifest["kind"] == "RayCluster":
        spec: Manifest = manifest["spec"]
        return spec
    cluster: Manifest = job_of(manifest)["rayClusterSpec"]
    return cluster


def ray_object(overlay: str) -> Manifest:
    """The one RayCluster, RayJob or RayCronJob of an overlay."""
    [found] = [manifest for manifest in build(overlay) if manifest["apiVersion"].startswith("ray.io/")]
    return found


def lasting_templates(manifest: Manifest) -> list[Manifest]:
    """The pod templates of an object that no run can do without: all but those of Ray's workers."""
    kind = manifest["kind"]
    if kind in ("RayCluster", "RayJob", "RayCronJob"):
        head: Manifest = cluster_of(manifest)["headGroupSpec"]["template"]
        return [head] if kind == "RayCluster" else [head, job_of(manifest)["submitterPodTemplate"]]
    if kind == "PodTemplate":
        return [manifest["template"]]
    if kind == "CronJob":
        return [manifest["spec"]["jobTemplate"]["spec"]["template"]]
    return [manifest["spec"]["template"]] if kind in ("Deployment", "StatefulSet", "Job") else []


def worker_templates(manifest: Manifest) -> list[Manifest]:
    ray = manifest["kind"] in ("RayCluster", "RayJob", "RayCronJob")
    return [group["template"] for group in cluster_of(manifest)["workerGroupSpecs"]] if ray else []


def pod_templates(manifest: Manifest) -> list[Manifest]:
    """Every pod template of an object."""
    return lasting_templates(manifest) + worker_templates(manifest)
