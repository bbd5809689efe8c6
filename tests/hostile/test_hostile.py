"""Hostile input is refused with one line, or handled: see ``targets``; ``python -m tests.hostile.fuzz`` goes on."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.hostile.targets import TARGETS, attempt

EXAMPLES = {"arguments": 12}  # each composes a configuration


@pytest.mark.parametrize("name", TARGETS)
def test_hostile_input(name: str) -> None:
    @settings(max_examples=EXAMPLES.get(name, 60), deadline=None, database=None, derandomize=True)
    @given(st.integers(0, 2**32 - 1))
    def try_one(seed: int) -> None:
        attempt(name, seed)

    try_one()


FOUND = [  # by the fuzzer, and mended
    ("shard", 218),  # a column of tensors with permuted dimensions
    ("checkpoint", 315),  # a text for the model's description
    ("checkpoint", 828),  # a number for it
    ("enrolment", 418),  # a state under another name
    ("model", 1042),  # an infinite image
]


@pytest.mark.parametrize(("name", "seed"), FOUND)
def test_what_the_fuzzer_found_is_refused(name: str, seed: int) -> None:
    assert attempt(name, seed) == "refused"
