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
