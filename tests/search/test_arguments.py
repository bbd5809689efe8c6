"""The command line of a campaign, before Hydra reads it."""

from __future__ import annotations

import json

import pytest

from pipeline.config import compose
from pipeline.errors import PipelineError
from pipeline.search.arguments import translate
from pipeline.search.campaign import CAMPAIGN_FILE, begin


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


def test_a_key_that_is_gone_is_left_out_with_a_warning(arguments, tmp_path, capsys) -> None:
    """In the command, in a campaign's file, and in a campaign that an earlier release began."""
    assert translate(["name=a", "batched=true", "together=6"]) == ["name=a"]
    said = capsys.readouterr().err
    assert "batched is ignored" in said and "together is ignored" in said
    raw = compose("tune", translate(arguments("trials=5")))
    begun = begin({**raw, "batched": None})
    assert "batched" not in begun.raw and capsys.readouterr().err.count("\n") == 1
    file = tmp_path / "runs" / "small" / CAMPAIGN_FILE
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, "config": {**record["config"], "batched": None, "together": 6}}))
    assert begin(compose("tune", ["resume=small", f"storage={tmp_path}/runs"])).config.trials == 5
