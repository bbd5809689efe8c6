"""The command line of a campaign, before Hydra reads it."""

from __future__ import annotations

import pytest

from pipeline.config import compose
from pipeline.errors import PipelineError
from pipeline.search.arguments import translate


def test_keys_of_the_base_and_fixed_ones_are_gathered() -> None:
    given = ["name=a", "base.method=maml", "fix.inner_lr=0.1", 'base.data.name="a b"', "base.seed=1"]
    assert translate(given) == [
        "name=a",
        r'overrides=["method=maml","data.name=\"a b\"","seed=1"]',
        'fix=["inner_lr=0.1"]',
    ]
    assert compose("tune", translate(given))["overrides"] == ["method=maml", 'data.name="a b"', "seed=1"]


def test_a_list_and_its_keys_are_not_given_both() -> None:
    with pytest.raises(PipelineError, match=r"give base\.KEY=VALUE or overrides=\[\.\.\.\], not both"):
        translate(["base.seed=1", "overrides=[seed=2]"])


def test_other_keys_stay_as_they_are() -> None:
    given = ["tracking.uri=sqlite:///a.base.db", "base=1", "base."]
    assert translate(given) == given
