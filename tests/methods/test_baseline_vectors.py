from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.functional.distances import cosine
from pipeline.functional.fine_tuning import Descent, cosine_scale, cosine_scores, fine_tune_cosine, fine_tune_linear
from pipeline.functional.losses import cross_entropy
from pipeline.functional.support_initialised import mean_entropy
from pipeline.methods.baseline import Baseline

CASES = "baseline_*.npz"


class Flat(nn.Flatten):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.out_features = features


def images(features):
    return features[..., None, None]


def tasks(case, copies: int):
    """The support set ``copies`` times, shuffled differently in each, and the epochs' orders of the same images."""
    generator = torch.Generator().manual_seed(0)
    shots, orders = len(case["in_support"]), case["in_epoch_permutations"]
    shuffled = torch.stack([torch.randperm(shots, generator=generator) for _ in range(copies)])
    places = torch.stack([shuffle.argsort()[orders] for shuffle in shuffled], dim=1)  # [epochs, T, S]
    return case["in_support"][shuffled], case["in_support_labels"][shuffled], places


def build(case, classes: int = 3, **options) -> Baseline:
    return Baseline(Flat(case["in_support"].shape[1]), classes, **options).to(case["in_support"].dtype).eval()


def descent(case) -> Descent:
    names = ("lr", "momentum", "dampening", "weight_decay")
    found = {name: float(case[f"meta_{name}"].double()) for name in names}
    found = {name: round(value, 6) for name, value in found.items()}
    return Descent(int(case["meta_epochs"]), int(case["meta_batch_size"]), **found)


@pytest.mark.parametrize("copies", [1, 3])
def test_fine_tuning_of_linear_and_cosine_classifiers(case, check, copies):
    support, labels, orders = tasks(case, copies)
    weight, bias = (case[f"in_{name}_init"].expand(copies, *case[f"in_{name}_init"].shape) for name in "Wb")
    first = case["in_epoch_permutations"][0][: descent(case).batch_size]
    scores = case["in_support"][first] @ case["in_W_init"].mT + case["in_b_init"]
    check(cross_entropy(scores, case["in_support_labels"][first]), "out_baseline_first_batch_loss")
    found = fine_tune_linear(support, labels, weight, bias, orders, descent(case))
    scale = cosine_scale(int(case["in_n_way"]))
    assert scale == float(case["out_baselinepp_scale"])
    length = weight.norm(dim=-1, keepdim=True)
    for task in cosine_scores(case["in_query"].expand(copies, -1, -1), weight, length, scale):
        check(task, "out_baselinepp_init_query_scores")
    direction, length = fine_tune_cosine(support, labels, weight, length, scale, orders, descent(case))
    for t in range(copies):
        check(found[0][t], "out_baseline_W")
        check(found[1][t], "out_baseline_b")
        check(case["in_query"] @ found[0][t].mT + found[1][t], "out_baseline_query_scores")
        check(direction[t], "out_baselinepp_v")
        check(length[t], "out_baselinepp_g")
        check(cosine_scores(case["in_query"], direction[t], length[t], scale), "out_baselinepp_query_scores")


@pytest.mark.parametrize("distance", ["cosine", "euclidean", "squared_euclidean"])
def test_nearest_neighbour(case, check, distance):
    support, labels, _ = tasks(case, 3)
    check(1 - cosine(case["in_query"], case["in_support"], eps=0), "out_nn_cosine_sims")
    method = build(case, head="nearest", distance=distance)
    logits = method.classify(method.adapt(images(support), labels), images(case["in_query"]).expand(3, -1, -1, -1, -1))
    expected = case["out_nn_pred" if distance == "cosine" else "out_nn_pred_l2"]
    assert all(torch.equal(task.argmax(-1), expected) for task in logits)


def test_support_initialisation_and_objective(case, check):
    """The case's vectors are scores of the training classes: the classifier of the training classes passes them on."""
    support, labels, _ = tasks(case, 3)
    query = images(case["in_query"]).expand(3, -1, -1, -1, -1)
    width = support.shape[-1]
    passing = build(case, classes=width, head="support_initialised", epochs=0)
    with torch.no_grad():
        passing.classifier.weight.copy_(torch.eye(width))
        passing.classifier.bias.zero_()
    for method in (passing, build(case, head="support_initialised", initialisation="features", epochs=0)):
        state = method.adapt(images(support), labels)
        logits = method.classify(state, query)
        own = method.classify(state, images(case["in_support"]).expand(3, -1, -1, -1, -1))
        hardness = method.hardness(images(support), labels, query, case["in_query_labels"].expand(3, -1))
        for t in range(3):
            check(state["weight"][t], "out_dhillon_W")
            check(logits[t], "out_dhillon_query_logits")
            check(own[t], "out_dhillon_support_logits")
            fit, doubt = cross_entropy(own[t], case["in_support_labels"]), mean_entropy(logits[t])
            check(fit, "out_dhillon_support_ce")
            check(doubt, "out_dhillon_query_entropy_mean")
            check(fit + doubt, "out_dhillon_objective")
            check(hardness[t], "out_hardness_log_odds_mean")


def test_blog_variant(case, check):
    support, labels, _ = tasks(case, 3)
    method = build(case, head="support_initialised", initialisation="blog", epochs=0)
    state = method.adapt(images(support), labels)
    logits = method.classify(state, images(case["in_query"]).expand(3, -1, -1, -1, -1))
    for t in range(3):
        check(state["weight"][t], "out_blog_M")
        check(logits[t], "out_blog_query_cosine_logits")
        check(logits[t].softmax(-1), "out_blog_query_probs")
