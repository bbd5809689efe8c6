from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.methods.simple_shot import SimpleShot
from pipeline.nets.mlp import MLP
from tests.methods.toy import awkward


@pytest.mark.parametrize(("centring", "normalise"), [("train_mean", True), ("train_mean", False), ("none", True)])
def test_nearest_mean_by_hand(centring, normalise):
    batch, training = awkward(), torch.randn(50, 1, 6, 6, dtype=torch.float64)
    method = SimpleShot(MLP((1, 6, 6)), 7, centring, normalise).double().eval()
    seen = method.backbone(training).detach()
    method.keep_summary(sum(method.summarise(part, torch.arange(25)) for part in seen.split(25)), 50)
    logits = method.classify(method.adapt(batch.support, batch.support_labels, 4), batch.query).detach()
    for t, labels in enumerate(batch.support_labels.numpy()):
        x, q = (method.backbone(images[t]).detach().numpy() for images in (batch.support, batch.query))
        x, q = (v - seen.numpy().mean(0) if centring == "train_mean" else v for v in (x, q))
        x, q = (v / np.linalg.norm(v, axis=1, keepdims=True) if normalise else v for v in (x, q))
        means = np.stack([x[labels == c].mean(0) for c in range(4)])
        np.testing.assert_allclose(logits[t], -((q[:, None] - means) ** 2).sum(-1), rtol=0, atol=1e-12)
