"""The scaled loss, its gradients and their limits, for the three distances; the heads of the official code."""

from __future__ import annotations

import pytest
import torch

from docs.studies.lemma import class_losses, scaled_gradients
from pipeline.functional.losses import cross_entropy
from pipeline.functional.prototypes import prototypes
from pipeline.methods.tadam import METRICS

CASES = "tadam_loss_*.npz"
KINDS = {"sq": "squared_euclidean", "l2": "euclidean", "cos": "cosine"}


def distances(case, kind: str):
    """Distances [Q, W], differentiable in phi."""
    phi = case["in_phi"].clone().requires_grad_()
    support, query = case["in_x_support"] @ phi, case["in_x_query"] @ phi
    means, _ = prototypes(support[None], case["in_support_labels"][None], int(case["in_n_way"]))
    return METRICS[KINDS[kind]](query, means[0]), phi


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients(case, check, kind):
    d, phi = distances(case, kind)
    check(d, f"out_dist_{kind}")
    labels, alphas = case["in_query_labels"], case["in_alphas"]
    losses = torch.stack([class_losses(d, labels, alpha) for alpha in alphas])
    check(losses, f"out_J_{kind}")
    check(torch.stack([cross_entropy(-alpha * d, labels) for alpha in alphas]), f"out_meanCE_{kind}")
    check(losses.sum(1) / len(labels), f"out_meanCE_{kind}")
    by_class = [[torch.autograd.grad(j, phi, retain_graph=True)[0] for j in row] for row in losses]
    check(torch.stack([torch.stack(row) for row in by_class]), f"out_dJ_dphi_{kind}")
    scaled = [alpha * scaled_gradients(d, labels, float(alpha), phi) for alpha in alphas]
    check(torch.stack(scaled), f"out_dJ_dphi_{kind}")


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_scale(case, check, kind):
    d, _ = distances(case, kind)
    found = []
    for alpha in case["in_alphas"]:
        alpha = alpha.clone().requires_grad_()
        found += torch.autograd.grad(class_losses(d, case["in_query_labels"], alpha).sum(), alpha, retain_graph=True)
    check(torch.stack(found), f"out_dJtotal_dalpha_{kind}")


@pytest.mark.parametrize("kind", KINDS)
def test_limits(case, check, kind):
    d, phi = distances(case, kind)
    check(scaled_gradients(d, case["in_query_labels"], 0.0, phi), f"out_lemma_alpha0_{kind}")
    check(scaled_gradients(d, case["in_query_labels"], float("inf"), phi), f"out_lemma_alphainf_{kind}")


def test_heads(case, check):
    support, query = case["in_x_support"] @ case["in_phi"], case["in_x_query"] @ case["in_phi"]
    means, _ = prototypes(support[None], case["in_support_labels"][None], int(case["in_n_way"]))
    check(-7.5 * METRICS["euclidean"](query, means[0]), "out_head_polynomial_order1_logits_alpha7p5")
    check(-METRICS["euclidean"](query, means[0]), "out_head_prototypical_logits")
    check(-7.5 * METRICS["cosine"](query, means[0]), "out_head_cosine_logits_alpha7p5")
