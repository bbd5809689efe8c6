"""The reference vectors beside this file: inputs and expected outputs in float64, one file a case (keys in_*, out_*,
meta_*). A folder's conftest.py that imports the names below gives its tests the fixtures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

VECTORS = Path(__file__).parent
Case = dict[str, torch.Tensor]


def read(path: Path, dtype: torch.dtype) -> Case:
    with np.load(path, allow_pickle=False) as arrays:
        numbers = [key for key in arrays if arrays[key].dtype.kind != "U"]  # some constants are words
        tensors = {key: torch.from_numpy(arrays[key]) for key in numbers}
    return {key: t.to(dtype) if t.is_floating_point() else t for key, t in tensors.items()}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for ``case`` runs for every file its module's CASES pattern finds, in both precisions."""
    if "case" in metafunc.fixturenames and hasattr(metafunc.module, "CASES"):
        files = sorted(VECTORS.glob(metafunc.module.CASES))
        assert files, f"no vectors match {metafunc.module.CASES}"
        sets = [(f, d) for f in files for d in (torch.float64, torch.float32)]
        metafunc.parametrize("case", sets, indirect=True, ids=[f"{f.stem}-{str(d)[6:]}" for f, d in sets])


@pytest.fixture
def case(request) -> Case:
    return read(*request.param)


@pytest.fixture
def check(case):
    """Compare with an expected output: 1e-8 absolute and relative in float64, 1e-4 of the largest value in float32."""

    def compare(found: torch.Tensor, key: str) -> None:
        expected = case[key]
        if expected.dtype == torch.float64:
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
        else:
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * max(1.0, float(expected.abs().max())))

    return compare
