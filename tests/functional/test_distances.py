from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.functional.distances import DISTANCES, by_class, squared_euclidean, squared_euclidean_exact


def brute_force(name: str, x: list[float], y: list[float]) -> float:
    square = sum((a - b) ** 2 for a, b in zip(x, y, strict=True))
    product = sum(a * b for a, b in zip(x, y, strict=True))
    norms = [sum(a * a for a in v) ** 0.5 + 1e-8 for v in (x, y)]
    return {
        "squared_euclidean": square,
        "euclidean": square**0.5,
        "cosine": 1 - product / norms[0] / norms[1],
        "dot": -product,
    }[name]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), st.integers(0, 10**6))
def test_brute_force(tasks, queries, way, features, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tasks, queries, features, generator=generator, dtype=torch.float64)
    y = torch.randn(tasks, way, features, generator=generator, dtype=torch.float64)
    for name, distance in DISTANCES.items():
        expected = [
            [[brute_force(name, q.tolist(), p.tolist()) for p in b] for q in a] for a, b in zip(x, y, strict=True)
        ]
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(distance(x, y), expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(by_class(distance, x, y), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", DISTANCES)
def test_a_class_s_distances_are_bit_for_bit_those_beside_any_others(name):
    torch.manual_seed(0)
    x, y = torch.randn(4, 15, 1600) + 1, torch.randn(4, 5, 1600)
    alone = torch.cat([DISTANCES[name](x, y[:, k : k + 1].clone()) for k in range(5)], dim=-1)
    assert torch.equal(by_class(DISTANCES[name], x, y), alone)
    assert torch.equal(by_class(DISTANCES[name], x, y[:, 1:3]), alone[..., 1:3])


@pytest.mark.parametrize("name", DISTANCES)
def test_gradients_are_finite_differences(name):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(DISTANCES[name], (x, y))


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_gradients_are_finite_where_points_coincide(name, value):
    x = torch.full((1, 2, 3), value, requires_grad=True)
    y = torch.full((1, 2, 3), value, requires_grad=True)
    distance = DISTANCES[name](x, y)
    distance.sum().backward()
    assert distance.isfinite().all() and x.grad.isfinite().all() and y.grad.isfinite().all()


def test_expansion_keeps_its_digits_far_from_the_origin():
    torch.manual_seed(0)
    x, y = torch.randn(1, 20, 64) + 100, torch.randn(1, 5, 64) + 100
    exact = squared_euclidean_exact(x.double(), y.double())
    torch.testing.assert_close(squared_euclidean(x, y).double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", DISTANCES)
def test_half_precision_embeddings_are_compared_in_float32(name):
    torch.manual_seed(0)
    x, y = torch.randn(1, 4, 64).bfloat16(), torch.randn(1, 3, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = DISTANCES[name](x, y)
    torch.testing.assert_close(found, DISTANCES[name](x.float(), y.float()), rtol=0, atol=0)
