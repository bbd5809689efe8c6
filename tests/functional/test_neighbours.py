from __future__ import annotations

import pytest
import torch

from pipeline.functional.distances import squared_euclidean, unit
from pipeline.functional.neighbours import ANSWERS, class_logsumexp, class_max, recall, remember
from pipeline.functional.prototypes import one_hot

LABELS = torch.tensor([[2, 0, 0, -1, 1, 2], [1, 1, 1, 0, 2, 2]])


def scores(scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("scale", [1.0, 3e3])
def test_by_class_by_definition(scale):
    """Also where exp() of every score of a class is 0."""
    x, members = scores(scale), one_hot(LABELS, 3)
    largest, total = class_max(x, members), class_logsumexp(x, members)
    for t in range(2):
        for c in range(3):
            own = x[t][:, LABELS[t] == c]
            torch.testing.assert_close(largest[t, :, c], own.amax(1))
            torch.testing.assert_close(total[t, :, c], own.logsumexp(1))


def test_gradients():
    x, members = scores().requires_grad_(), one_hot(LABELS, 3)
    assert torch.autograd.gradcheck(lambda x: class_logsumexp(x, members), x)
    assert torch.autograd.gradcheck(lambda x: class_max(x, members), x)


@pytest.mark.parametrize("answer", ANSWERS)
def test_answers_by_definition(answer):
    generator = torch.Generator().manual_seed(1)
    support, query = (torch.randn(2, n, 5, generator=generator, dtype=torch.float64) for n in (6, 4))
    state = remember(support, LABELS, 3, answer)
    for class_by_class in (True, False):
        logits = recall(state, query, squared_euclidean, answer, class_by_class)
        for t in range(2):
            for q in range(4):
                for c in range(3):
                    own = support[t][LABELS[t] == c]
                    d = (own - query[t, q]).square().sum(1)
                    mean = (own.mean(0) - query[t, q]).square().sum()
                    expected = {"class_mean": -mean, "nearest": -d.min(), "soft": (-d).logsumexp(0)}[answer]
                    torch.testing.assert_close(logits[t, q, c], expected, rtol=0, atol=1e-10)


def test_unit_vectors():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [3e-3, -4e-3]], dtype=torch.float64, requires_grad=True)
    found = unit(x)
    torch.testing.assert_close(found.detach(), torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.6, -0.8]]).double())
    found.sum().backward()
    assert x.grad.isfinite().all()
