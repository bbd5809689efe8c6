from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.batch import Images
from pipeline.functional.prototypes import prototypes
from pipeline.methods.imprinted import Imprinted, normalise

CASES = "imprint_*.npz"


class Flat(nn.Flatten):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.out_features = features


def build(case) -> Imprinted:
    base = case["in_base_weights_unit"]
    method = Imprinted(Flat(base.shape[1]), classes=len(base), scale=float(case["in_scale"])).to(base.dtype)
    with torch.no_grad():
        method.weight.copy_(base)
    return method


def images(features):
    return features[..., None, None]


def test_imprinting_and_joint_classifier(case, check):
    method = build(case).eval()
    base, way = int(case["meta_n_base"]), int(case["meta_n_novel"])
    order = torch.randperm(len(case["in_support_labels_novel"]), generator=torch.Generator().manual_seed(1))
    features = torch.stack([case["in_support_features_raw"], case["in_support_features_raw"][order]])
    labels = torch.stack([case["in_support_labels_novel"], case["in_support_labels_novel"][order]])
    query = images(case["in_query_features_raw"]).expand(2, -1, -1, -1, -1)
    check(prototypes(normalise(features), labels, way)[0][0], "out_novel_weights_before_renorm")
    novel, joint = method.adapt(images(features), labels, way), method.joint_state(images(features), labels, way)
    assert torch.equal(joint["weights"][:, :base], method.weight.expand(2, -1, -1))
    logits = method.classify(joint, query)
    for task in range(2):
        check(novel["weights"][task], "out_novel_weights")
        check(logits[task], "out_logits_all")
        check(logits[task].softmax(-1), "out_probs_all")
        assert torch.equal(logits[task].argmax(-1), case["out_pred_all"])
    assert torch.equal(method.classify(novel, query)[0].argmax(-1) + base, case["out_pred_novel_only"])


def test_loss_gradients_and_unit_weights_after_a_step(case, check):
    base = build(case)
    joint = base.with_classes(
        base.joint_state(images(case["in_support_features_raw"])[None], case["in_support_labels_novel"][None])
    )
    features = case["in_query_features_raw"].clone().requires_grad_()
    loss, metrics = joint(Images(images(features), case["in_query_labels_all"]))
    loss.backward()
    check(loss, "out_loss_mean")
    assert float(metrics["accuracy"]) == pytest.approx(float(case["out_acc_all"]))
    check(features.grad, "out_grad_query_features")
    check(joint.weight.grad, "out_grad_weights")
    check(joint.scale.grad, "out_grad_scale")
    torch.optim.SGD([joint.weight], lr=0.1).step()
    joint.after_step()
    check(joint.weight, "out_weights_after_sgd_lr0p1_and_renorm")
