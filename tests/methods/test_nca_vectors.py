from __future__ import annotations

import pytest
import torch

from pipeline.batch import Episodes, Images
from pipeline.functional.distances import euclidean, squared_euclidean, unit
from pipeline.functional.nca import log_right_neighbour, nca_loss, neighbour_probabilities, proxy_distances, proxy_nca
from pipeline.methods.imprinted import cosine_logits
from pipeline.methods.nca import NCA
from pipeline.methods.proxy_nca import ProxyNCA
from tests.methods.test_siamese_vectors import Flat

CASES = "nca_*.npz"
METRICS = {"sq": squared_euclidean, "l2": euclidean}
FORMS = {"strict_neg_only": (False, 0.0), "softmax_with_pos": (True, 0.0), "softmax_with_pos_smooth0p1": (True, 0.1)}


@pytest.mark.parametrize("copies", [1, 3])
def test_neighbours(case, check, copies):
    order = torch.stack([torch.randperm(len(case["in_labels"])) for _ in range(copies)])
    x, labels, a = case["in_X"][order], case["in_labels"][order], case["in_A"].clone().requires_grad_()
    distances = squared_euclidean(x @ a.T, x @ a.T)
    p = neighbour_probabilities(distances, labels)
    log_right, has_positive = log_right_neighbour(distances, labels)
    right = log_right.exp().where(has_positive, 0)
    for t in range(copies):
        back = order[t].argsort()
        check(p[t][back][:, back], "out_nca_pij")
        check(right[t][back], "out_nca_pi")
        assert torch.equal(has_positive[t][back], case["out_nca_has_positive"])
        check(right[t].sum(), "out_nca_objective_sum_pi")
        check(-log_right[t].sum() / has_positive[t].sum(), "out_nca_neg_log_pi_mean")
    right.sum().div(copies).backward()
    check(a.grad, "out_nca_grad_A_of_sum_pi")


@pytest.mark.parametrize("metric", METRICS)
def test_one_triplet_and_its_negatives(case, check, metric):
    points = case["in_X"][case["out_nca_triplet_indices"]]  # x, y and Z
    distances = METRICS[metric](points[:1], points[1:])[0]
    others = (-distances[1:]).logsumexp(0)
    check(nca_loss(distances[0], others, False), f"out_nca_triplet_{metric}_neg_only")
    check(nca_loss(distances[0], others, True), f"out_nca_triplet_{metric}_with_pos")


def test_method(case, check):
    x, labels = case["in_X"][None, :, :, None, None], case["in_labels"][None]
    batch = Episodes(x[:, :7], labels[:, :7], x[:, 7:], labels[:, 7:], torch.arange(5)[None], 5)
    n = int(case["out_nca_has_positive"].sum())
    for objective in ("expected", "log"):
        method = NCA(Flat(x.shape[2]), dim=len(case["in_A"]), objective=objective).to(x.dtype)
        method.transform.weight.data.copy_(case["in_A"])
        loss, _ = method(batch)
        if objective == "log":
            check(loss, "out_nca_neg_log_pi_mean")
        else:
            check(n * (1 - loss), "out_nca_objective_sum_pi")
            loss.backward()
            check(-n * method.transform.weight.grad, "out_nca_grad_A_of_sum_pi")


@pytest.mark.parametrize("form", FORMS)
def test_proxies(case, check, form):
    x, proxies = (case[f"in_{k}"].clone().requires_grad_() for k in ("X", "proxies"))
    scales = float(case["in_scale_x"]), float(case["in_scale_p"])
    distances = proxy_distances(x, proxies, *scales)
    check(distances, "out_proxynca_sqdist")
    losses = proxy_nca(distances, case["in_labels"], *FORMS[form])
    check(losses, f"out_proxynca_{form}")
    losses.mean().backward()
    check(losses.mean(), f"out_proxynca_mean_{form}")
    check(x.grad, f"out_proxynca_gradX_{form}")
    check(proxies.grad, f"out_proxynca_gradP_{form}")
    with_positive, smoothing = FORMS[form]
    options = {"form": "softmax" if with_positive else "strict", "smoothing": smoothing}
    method = ProxyNCA(Flat(x.shape[1]), int(case["in_n_classes"]), **options, scale_x=scales[0], scale_p=scales[1])
    method.to(x.dtype).proxies.data.copy_(case["in_proxies"])
    loss, _ = method(Images(case["in_X"][..., None, None], case["in_labels"]))
    loss.backward()
    check(loss, f"out_proxynca_mean_{form}")
    check(method.proxies.grad, f"out_proxynca_gradP_{form}")


def test_proxies_are_a_cosine_softmax(case, check):
    """Of scale 2 s_x s_p: the two differ by a constant."""
    s_x, s_p = float(case["in_scale_x"]), float(case["in_scale_p"])
    cosine = cosine_logits(case["in_X"], unit(case["in_proxies"]), 2 * s_x * s_p)
    check(cosine, "out_equivalent_cosine_softmax_logits")
    distances = proxy_distances(case["in_X"], case["in_proxies"], s_x, s_p)
    check(s_x**2 + s_p**2 - distances, "out_equivalent_cosine_softmax_logits")
