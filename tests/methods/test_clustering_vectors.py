from __future__ import annotations

import torch
from torch import nn

from pipeline.batch import Images
from pipeline.functional.clustering import (
    class_spread,
    feature_clustering,
    hyperplane_variation,
    official_feature_clustering,
    official_hyperplane_variation,
    spread_clustering,
)
from pipeline.methods.clustering import Clustering

CASES = "goldblum_reg_*.npz"


class Flat(nn.Flatten):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.out_features = features


def groups(case):
    """The official layout [first of class 1; second of 1; first of 2; second of 2] as pairs of classes [G, 2, 2, D]."""
    chunks = case["in_features_4chunks"].view(2, 2, int(case["meta_chunk"]), -1)
    return chunks.permute(2, 0, 1, 3)


def as_chunks(gradient):
    return gradient.permute(1, 2, 0, 3).flatten(0, 2)


def test_official_functions(case, check):
    names = {  # theirs and ours
        "feature_clustering": official_hyperplane_variation,
        "hyperplane_variation": official_feature_clustering,
    }
    for name, function in names.items():
        features = groups(case).contiguous().requires_grad_()
        value = function(features).mean()
        value.backward()
        check(value, f"out_code_fn_{name}")
        check(as_chunks(features.grad), f"out_grad_code_fn_{name}")


def test_paper_forms(case, check):
    check(hyperplane_variation(groups(case)).mean(), "out_paper_R_HV_mean")
    features = case["in_features_class_by_sample"].clone().requires_grad_()
    ratio = feature_clustering(features, "none")
    ratio.backward()
    check(ratio, "out_within_over_between_ratio")
    check(features.grad, "out_grad_within_over_between_ratio")
    check(feature_clustering(features), "out_paper_R_FC_C_over_N")
    check(feature_clustering(features, "one_over_n"), "out_paper_R_FC_normalised_variances")
    check(feature_clustering(torch.stack([features, 3 * features]))[1], "out_paper_R_FC_C_over_N")


def test_of_a_whole_split(case, check):
    features = case["in_features_class_by_sample"]
    labels = torch.arange(len(features)).repeat_interleave(features.shape[1])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    spread = class_spread(features.flatten(0, 1)[order], labels[order])
    like = torch.zeros((), dtype=features.dtype)
    check(like + spread_clustering(spread), "out_paper_R_FC_C_over_N")
    check(like + spread_clustering(spread, "none"), "out_within_over_between_ratio")
    check(like + spread_clustering(spread, "one_over_n"), "out_paper_R_FC_normalised_variances")


def test_penalties_in_the_loss(case, check):
    features = groups(case).flatten(0, 2)
    labels = torch.arange(2 * int(case["meta_chunk"])).repeat_interleave(2)
    batch = Images(features[..., None, None], labels)
    options = {"classes": len(labels), "hyperplane_variation": 0.5}
    for form in ("official", "paper"):
        method = Clustering(Flat(features.shape[1]), form=form, **options).to(features.dtype)
        loss, figures = method(batch)
        plain, _ = Clustering(Flat(features.shape[1]), len(labels), feature_clustering=0).to(features.dtype)(batch)
        assert torch.isfinite(plain)
        if form == "official":
            check(figures["hyperplane_variation"], "out_code_fn_feature_clustering")
            check(figures["feature_clustering"], "out_code_fn_hyperplane_variation")
        else:
            check(figures["hyperplane_variation"], "out_paper_R_HV_mean")
        penalty = figures["feature_clustering"] + 0.5 * figures["hyperplane_variation"]
        expected = nn.functional.cross_entropy(method.classifier(features), labels) + penalty
        torch.testing.assert_close(loss, expected)
