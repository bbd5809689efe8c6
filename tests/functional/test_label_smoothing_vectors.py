from __future__ import annotations

from pipeline.functional.losses import smoothed_cross_entropy

CASES = "label_smoothing.npz"


def test_both_conventions(case, check):
    logits, labels = case["in_logits"][None], case["in_labels"][None]
    check(smoothed_cross_entropy(logits, labels, 0.0), "out_metaopt_smooth_loss_eps0p0")
    check(smoothed_cross_entropy(logits, labels, 0.1), "out_metaopt_smooth_loss_eps0p1")
    check(smoothed_cross_entropy(logits, labels, 0.1, over="all"), "out_torch_style_smooth_loss_eps0p1")
