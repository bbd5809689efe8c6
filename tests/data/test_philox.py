"""The generator against the known answers of Random123, and its uniform numbers."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.data.philox import philox, uniforms

KNOWN = [  # counter, key, result: Random123's kat_vectors for philox4x32-10
    ([0, 0, 0, 0], (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        (0xA4093822, 0x299F31D0),
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    words = philox(np.asarray(counter, dtype=np.uint64).reshape(4, 1), key)
    assert words.ravel().tolist() == expected


def test_a_number_depends_on_its_index_alone():
    together = uniforms((1, 2), np.arange(50), 7)
    for index in (0, 13, 49):
        np.testing.assert_array_equal(uniforms((1, 2), np.asarray([index]), 7)[0], together[index])
    np.testing.assert_array_equal(uniforms((1, 2), np.arange(50), 4), together[:, :4])
    assert not np.array_equal(uniforms((1, 2), np.arange(50), 7, stream=1), together)


def test_uniform():
    numbers = uniforms((5, 6), np.arange(20_000), 5).ravel()
    assert numbers.min() >= 0 and numbers.max() < 1
    counts, _ = np.histogram(numbers, bins=100, range=(0, 1))
    chi2 = ((counts - 1000) ** 2 / 1000).sum()
    assert 60 < chi2 < 150  # 99 degrees of freedom: 1e-4 quantiles
