from __future__ import annotations

import pytest
import torch

from pipeline.methods.discriminative_kshot import PRIORS

WEIGHTS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.tensor(
    [1, 2, 3, 4]
)


def covariance(prior: str, strength: float = 2.0, scale: float = 1.0) -> torch.Tensor:
    return PRIORS[prior](WEIGHTS, strength, scale).covary(torch.eye(4).double())


def test_covariances_by_definition():
    centred = WEIGHTS - WEIGHTS.mean(0)
    outer = sum(torch.outer(w, w) for w in centred)
    overall = outer.trace() / 24
    identity = torch.eye(4).double()
    torch.testing.assert_close(covariance("isotropic"), overall * identity)
    torch.testing.assert_close(covariance("full"), (2 * overall * identity + outer) / 8)
    torch.testing.assert_close(covariance("diagonal"), torch.diag(covariance("full").diag()))
    for prior in PRIORS:
        torch.testing.assert_close(PRIORS[prior](WEIGHTS, 2.0, 1.0).mean, WEIGHTS.mean(0))
        torch.testing.assert_close(covariance(prior, scale=3.0), 3 * covariance(prior))


@pytest.mark.parametrize("prior", ["diagonal", "full"])
def test_a_strong_prior_is_isotropic(prior):
    torch.testing.assert_close(covariance(prior, strength=1e9), covariance("isotropic"), rtol=1e-6, atol=1e-6)
