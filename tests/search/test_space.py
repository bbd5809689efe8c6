"""Spaces: conditions, kinds of values, and what is refused."""

from __future__ import annotations

import pytest

from pipeline.errors import PipelineError
from pipeline.search.space import Known, Space, as_overrides, propose

ZOO = {
    "method": {"choices": ["maml", "reptile", "nca"]},
    "method.adapt": {"choices": ["all", None, [2, 2]], "when": {"method": "maml"}},
    "method.inner_lr": {"low": 1e-4, "high": 1.0, "log": True, "when": {"method": ["maml", "reptile"]}},
    "method.inner_steps": {"low": 1, "high": 8, "integer": True, "log": True, "when": {"method": ["maml", "reptile"]}},
}


@pytest.mark.parametrize("kind", ["tpe", "random"])
def test_every_proposal_lies_in_the_space(kind):
    space = Space(ZOO)
    known: list[Known] = []
    for number in range(40):
        values = propose(space, kind, 3, number, known, startup=5)
        inner = values["method"] in ("maml", "reptile")
        assert ("method.inner_lr" in values) is ("method.inner_steps" in values) is inner
        assert ("method.adapt" in values) is (values["method"] == "maml")
        assert all(space.dimensions[key].holds(value) for key, value in values.items())
        if inner:
            assert isinstance(values["method.inner_steps"], int)
        known.append(Known(values, 0.5))
    assert {trial.values["method"] for trial in known} == {"maml", "reptile", "nca"}
    assert {str(t.values.get("method.adapt")) for t in known if t.values["method"] == "maml"} <= {
        "all",
        "None",
        "[2, 2]",
    }


def test_a_logarithmic_range_is_drawn_by_its_logarithm():
    space = Space({"lr": {"low": 1e-4, "high": 1.0, "log": True}})
    drawn = [propose(space, "random", 0, number, [])["lr"] for number in range(200)]
    assert 0.4 < sum(value < 1e-2 for value in drawn) / len(drawn) < 0.6


def test_a_proposal_depends_on_seed_number_and_what_is_known_alone():
    space = Space(ZOO)
    known = [Known(propose(space, "random", 0, n, []), n / 20, ((6, n / 20),)) for n in range(12)]
    again = [propose(space, "tpe", 0, 12, known, startup=4) for _ in range(3)]
    assert again[0] == again[1] == again[2]
    assert propose(space, "tpe", 1, 12, known, startup=4) != again[0]
    assert propose(space, "tpe", 0, 13, known, startup=4) != again[0]


@pytest.mark.parametrize("kind", ["tpe", "random"])
def test_no_values_are_proposed_twice(kind):
    """All of a space of seven are, in one order, also while trials run; then there are none."""
    space = Space(
        {
            "method": {"choices": ["simple_shot", "baseline"]},
            "method.head": {"choices": ["linear", "nearest"], "when": {"method": "baseline"}},
            "method.epochs": {"low": 1, "high": 3, "integer": True, "when": {"method": "baseline"}},
        }
    )
    known: list[Known] = []
    while (values := propose(space, kind, 0, len(known), known, startup=3)) is not None:
        assert values not in [trial.values for trial in known]
        assert propose(space, kind, 0, len(known), known, startup=3) == values
        best = values["method"] == "simple_shot"  # what there is one of
        known.append(Known(values, None if len(known) % 3 == 1 else 0.9 if best else 0.5))
    assert len(known) == 7


def test_running_stopped_and_failed_trials_and_values_outside_the_range_may_be_known():
    space = Space({"lr": {"low": 1e-4, "high": 1.0, "log": True}})
    known = [
        Known({"lr": 0.1}, None), Known({"lr": 0.2}, 0.5, ((2, 0.4), (4, 0.5)), stopped=True), Known({"lr": 0.9}, 0.0),
        Known({"lr": 0.0}, 0.7), Known({"lr": 0.01}, 0.8),
    ]  # fmt: skip
    assert 1e-4 <= propose(space, "tpe", 0, 5, known, startup=2)["lr"] <= 1.0


def test_overrides_are_as_on_the_command_line():
    values = {"a.b": 1e-05, "c": True, "d": None, "e": [2, 2], "f": "maml", "g": "x y", "h": 3}
    assert as_overrides(values) == ["a.b=1e-05", "c=true", "d=null", "e=[2, 2]", "f=maml", 'g="x y"', "h=3"]


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({}, "give low and high, or choices"),
        ({"low": 1}, "give low and high, or choices"),
        ({"low": 2, "high": 1}, "low must be below high"),
        ({"low": 0, "high": 1, "log": True}, "a logarithmic range begins above 0"),
        ({"low": 1, "high": 2.5, "integer": True}, "an integer range has whole ends"),
        ({"choices": []}, "choices is empty"),
        ({"choices": [1], "low": 1}, "not both"),
        ({"choices": [1], "when": {"other": 1}}, "a condition names a key of the space above its own"),
        ({"lo": 1, "high": 2}, "unknown key 'lo'; did you mean 'low'?"),
        (3, "give {low: .., high: ..} or {choices: [..]}"),
    ],
)
def test_what_is_no_space_is_refused(entry, says):
    with pytest.raises(PipelineError) as error:
        Space({"lr": entry})
    assert says in str(error.value) and "space.lr" in str(error.value) and "\n" not in str(error.value)
