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


def cluster_of(manifest: Manifest) -> Manifest:
    """The description of the Ray cluster in a RayCluster or a RayJob."""
    spec: Manifest = manifest["spec"]
    return spec if manifest["kind"] == "RayCluster" else spec["rayClusterSpec"]


def pod_templates(manifest: Manifest) -> list[Manifest]:
    """Every pod template of an object."""
    if manifest["kind"] in ("RayCluster", "RayJob"):
        spec = cluster_of(manifest)
        groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
        submitter = manifest["spec"].get("submitterPodTemplate")
        return [group["template"] for group in groups] + ([submitter] if submitter else [])
    template = manifest.get("spec", {}).get("template") if manifest["kind"] in ("Deployment", "StatefulSet") else None
    return [template] if template else []
