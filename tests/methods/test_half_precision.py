"""Every method trains and answers under bfloat16 autocast, on processors with and without bfloat16 kernels.

What oneDNN offers depends on the processor: ONEDNN_MAX_CPU_ISA=AVX2 in the environment takes the place of an older one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.batch import Batch, Episodes, Images
from pipeline.config import CONF
from pipeline.model import build_model

ROOT = Path(__file__).resolve().parents[2]
OTHERWISE = {  # options whose code computes differently
    "baseline": [
        *({"head": head} for head in ("cosine", "nearest", "svm", "ridge", "prototype")),
        *({"head": "finetune_all", "epochs": 2, "norm": norm, "tasks": "vmap"} for norm in ("batch", "running")),
        *({"head": "support_initialised", "epochs": 2, "tasks": tasks} for tasks in ("loop", "vmap")),
        {"head": "finetune_all", "epochs": 2, "tasks": "loop"},
        {"classifier": "cosine", "mixup": 0.3},
    ],
    "clustering": [{"hyperplane_variation": 1.0}, {"form": "official", "hyperplane_variation": 1.0}],
    "conditionally_shifted": [{"feedback": "gradient"}],
    "discriminative_kshot": [{"prior": "full", "inference": "laplace"}],
    "maml": [{"inner_loop": "vmap"}, {"adapt_parameters": "head", "transductive": False}],
    "maml_plus_plus": [{"inner_loop": "vmap"}],
    "matching": [{"full_context": True}, {"full_context": True, "reading": "ravi", "prediction": "ravi"}],
    "meta_lstm": [{"inner_loop": "vmap"}],
    "meta_networks": [{"representation_loss": "contrastive", "first_order": False}],
    "metaopt": [{"head": "ridge"}, {"head": "prototypes"}, {"iterations_eval": 3}],
    "nca": [{"objective": "log", "answer": "nearest"}, {"objective": "pairs", "answer": "class_mean"}],
    "pmf": [{"rates": [0.001], "steps": 2, "tasks": tasks} for tasks in ("loop", "vmap")],
    "prototypical": [{"distance": "cosine", "learn_scale": True}, {"joint_forward": False, "distance": "euclidean"}],
    "proxy_nca": [{"form": "softmax", "smoothing": 0.1, "embedding_dim": 8}],
    "r2d2": [{"solver": "logistic"}, {"learn_penalty": True}],
    "relation": [{"transductive": False}, {"tasks": "vmap"}],
    "reptile": [{"inner_loop": "vmap"}, {"inner_optimizer": "sgd", "consensus": 0.1}],
    "rfs": [{"copies": 0}],
    "siamese": [{"loss": "contrastive", "shots": "max", "l2": 0.01}],
    "snail": [{"repo_softmax": True}],
    "soft_kmeans": [{"distance": "cosine", "steps": 3}],
    "tadam": [{"metric": "cosine"}, {"conditioning": False, "auxiliary": False}],
    "triplet": [{"answer": "nearest", "squared": False, "embedding_dim": 8}],
}  # fmt: skip
METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
CASES = [(name, options) for name in METHODS for options in ({}, *OTHERWISE.get(name, []))]


def batches() -> tuple[Episodes, Images]:
    """Two tasks of three classes with two images, and pairs of images of six of seven classes."""
    generator = torch.Generator().manual_seed(0)
    support, query = (torch.randn(2, n, 1, 28, 28, generator=generator) for n in (6, 9))
    labels, query_labels = torch.arange(3).repeat(2, 2), torch.arange(3).repeat(2, 3)
    episodes = Episodes(support, labels, query, query_labels, torch.arange(3).expand(2, 3), 3)
    return episodes, Images(support.flatten(0, 1), torch.arange(12) // 2)


@pytest.mark.parametrize(("name", "options"), [pytest.param(n, o, id=f"{n}-{o}") for n, o in CASES])
def test_trains_and_answers(name: str, options: dict):
    torch.manual_seed(0)
    backbone = {"name": "relation_encoder" if name == "relation" else "conv4", "width": 8}
    spec = {"method": {"name": name, **options}, "backbone": backbone, "input": {"shape": [1, 28, 28]}}
    method = build_model({**spec, "way": 3, "shot": 2, "classes": 7})
    episodes, images = batches()
    given: list[Batch] = [] if method.regime == "classical" else [episodes]
    given += [] if method.regime == "episodic" else [images]
    for batch in given:
        with torch.autocast("cpu", torch.bfloat16):
            loss, figures = method(batch)
        loss.backward()
        assert loss.isfinite() and all(figure.isfinite() for figure in figures.values())
    for parameter, p in method.named_parameters():
        assert not p.requires_grad or (p.grad is not None and p.grad.dtype == torch.float32), parameter
        assert p.grad is None or p.grad.isfinite().all(), parameter
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        state = method.eval().adapt(episodes.support, episodes.support_labels, 3)
        logits = method.classify(state, episodes.query)
    assert logits.shape == (2, 9, 3) and logits.is_floating_point() and logits.isfinite().all()
    assert all(value.isfinite().all() for value in state.values())


@pytest.mark.skipif("ONEDNN_MAX_CPU_ISA" in os.environ, reason="it is the run on an older processor")
def test_on_a_processor_without_bfloat16():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:]
