from __future__ import annotations

import pytest
import torch

from pipeline.evaluation.generalized import class_balanced
from pipeline.functional.losses import (
    accuracy,
    cross_entropy,
    labelled,
    smoothed_cross_entropy,
    summed_cross_entropy,
)
from pipeline.functional.prototypes import one_hot, prototypes
from pipeline.methods.imprinted import blend, imprint

LABELS = torch.tensor([[0, 2, 1, 2, 2, -1], [1, 1, 0, -1, -1, 2]])


def embeddings(dtype=torch.float64):
    return torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)


def test_prototypes_are_means_over_the_own_count_and_padding_is_nobody():
    means, counts = prototypes(embeddings(), LABELS, 4)
    assert counts.tolist() == [[1, 1, 3, 0], [1, 2, 1, 0]]
    for t in range(2):
        for c in range(3):
            expected = embeddings()[t][LABELS[t] == c].mean(0)
            torch.testing.assert_close(means[t, c], expected, rtol=0, atol=1e-14)
    assert torch.equal(means[:, 3], torch.zeros(2, 4, dtype=torch.float64))


def test_imprinting_normalises_averages_and_normalises():
    x = embeddings()
    weights = imprint(x, LABELS, 3)
    unit = x / x.norm(dim=-1, keepdim=True)
    for t in range(2):
        for c in range(3):
            mean = unit[t][LABELS[t] == c].mean(0)
            torch.testing.assert_close(weights[t, c], mean / mean.norm(), rtol=0, atol=1e-9)


def test_blend_ends():
    unit = imprint(embeddings(), LABELS, 3)
    torch.testing.assert_close(blend(unit, unit.flip(0), 0.0), unit, rtol=0, atol=1e-9)
    torch.testing.assert_close(blend(unit, unit.flip(0), 1.0), unit.flip(0), rtol=0, atol=1e-9)


def test_one_hot():
    assert one_hot(LABELS, 3)[0].argmax(-1).tolist() == [0, 2, 1, 2, 2, 0]
    assert one_hot(LABELS, 3).sum(-1).tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 1]]


def test_losses_leave_padding_out():
    logits = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    single = [
        [-float(logits[t, i].log_softmax(0)[LABELS[t, i]]) for i in range(6) if LABELS[t, i] >= 0] for t in range(2)
    ]
    summed = [sum(task) for task in single]
    torch.testing.assert_close(summed_cross_entropy(logits, LABELS).tolist(), summed)
    assert labelled(LABELS).tolist() == [5, 4]
    assert float(cross_entropy(logits, LABELS)) == pytest.approx(sum(summed) / 9)
    right = sum(int(logits[t, i].argmax()) == int(LABELS[t, i]) for t in range(2) for i in range(6))
    assert float(accuracy(logits, LABELS)) == pytest.approx(right / 9)


@pytest.mark.parametrize(("over", "right", "wrong"), [("others", 0.7, 0.15), ("all", 0.8, 0.1)])
def test_label_smoothing(over, right, wrong):
    """A share of .3 of the label, over the other two classes or over all three."""
    logits = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logs = logits.log_softmax(-1)
    losses = [
        -sum((right if k == LABELS[t, i] else wrong) * float(logs[t, i, k]) for k in range(3))
        for t in range(2)
        for i in range(6)
        if LABELS[t, i] >= 0
    ]
    found = float(smoothed_cross_entropy(logits, LABELS, 0.3, over))
    assert found == pytest.approx(sum(losses) / 9, rel=1e-12)
    assert float(smoothed_cross_entropy(logits, LABELS, 0.0, over)) == float(cross_entropy(logits, LABELS))


def test_class_balanced_sampling():
    labels = torch.tensor([3] * 900 + [0] * 5 + [1] * 95)[
        torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    ]
    batches = list(class_balanced(labels, 100, 300, seed=7))
    assert all(b.shape == (100,) for b in batches) and len(batches) == 300
    drawn = torch.cat(batches)
    shares = labels[drawn].bincount() / len(drawn)
    torch.testing.assert_close(shares, torch.tensor([1 / 3, 1 / 3, 0, 1 / 3]), rtol=0, atol=0.01)
    assert len(drawn.unique()) == 1000  # every image has its chance
    assert all(torch.equal(a, b) for a, b in zip(batches, class_balanced(labels, 100, 300, seed=7), strict=True))
    assert not torch.equal(batches[0], next(class_balanced(labels, 100, 1, seed=8)))
