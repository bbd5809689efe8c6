"""The test split, the objective and what is not a trial's own are out of a campaign's reach."""

from __future__ import annotations

import json
import re

import pytest

from pipeline import store
from pipeline.data.dataset import read_manifest
from pipeline.errors import PipelineError
from pipeline.search.arguments import OBJECTIVE, check_classes, check_trial, translate


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("base.evaluation.episodes=10", "a search never touches the test split"),
        ("base.evaluation={split: test}", "a search never touches the test split"),
        ("base.++evaluation.split=test", "a search never touches the test split"),
        ("base.train.split=train+test", "train.split=train+test: a search never touches the test split"),
        ("base.validation.split=test", "validation episodes are the campaign's: set objective.split"),
        ("base.validation.seed=3", "set objective.seed"),
        ("base.validation.episodes=3", "set objective.episodes"),
        ("base.validation.way=3", "set objective.way"),
        ("base.++validation.query=3", "set objective.query"),
        ("base.validation={split: test}", "validation episodes are the campaign's"),
        ("objective.split=test", "validation.split=test: a search never touches the test split"),
        ("objective.split=val+test", "validation.split=val+test: a search never touches the test split"),
        ("base.train.split=train+val", "it has classes of validation.split=val"),
        ("objective.split=train", "it has classes of validation.split=train"),
        ("base.name=mine", "trials are named by the campaign"),
        ("base.resume=mine", "set the campaign's resume"),
        ("base.recipe=omniglot_maml", "train.split=train+val"),
    ],
)
def test_what_a_search_may_not_touch_is_refused(campaign, argument, says):
    with pytest.raises(PipelineError) as error:
        campaign(argument)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("evaluation", "a search never touches the test split"),
        ("evaluation.split", "a search never touches the test split"),
        ("validation.split", "the objective is the same for all trials"),
        ("++validation.seed", "the objective is the same for all trials"),
        ("validation.select", "the objective is the same for all trials"),
        ("train.split", "all trials train on one split"),
        ("data", "all trials have one dataset"),
        ("recipe", "put it into base"),
        ("seed", "finalists.seeds"),
        ("storage", "set the campaign's storage"),
    ],
)
def test_what_may_not_differ_between_trials_is_refused(campaign, key, says):
    with pytest.raises(PipelineError, match=re.escape(says)):
        campaign(space={key: {"choices": [1, 2]}})
    with pytest.raises(PipelineError, match=re.escape(says)):
        campaign(settings=[{"when": {}, "set": [f"{key}=1"]}])


def test_a_campaign_evaluates_nothing_but_validation(campaign):
    for name in ("metric_scale", "inner_lr"):
        small = campaign(campaign=name)
        for values in small.first:
            config = small.compose(values, "x")
            assert config["evaluation"] is None and config["register_as"] is None
            objective = {"split": "val", "way": 5, "shot": 1, "query": 5, "episodes": 10, "seed": 1000}
            assert {key: config["validation"][key] for key in OBJECTIVE} == objective
            assert config["train"]["split"] == "train"


def test_a_trial_that_would_be_measured_otherwise_is_refused(campaign):
    base = campaign().base
    other = json.loads(json.dumps(base))
    check_trial(other, base)
    other["validation"]["seed"] = 5
    with pytest.raises(PipelineError, match=r"validation\.seed=5: all trials have 1000"):
        check_trial(other, base)


def test_a_split_that_shares_classes_with_the_test_split_is_refused(campaign, glyphs, tmp_path):
    """A manifest says that its splits are disjoint; what is compared are the classes, not the names."""
    manifest = read_manifest(glyphs)
    manifest.splits["val"].append(manifest.splits["test"][0])
    try:
        with pytest.raises(PipelineError, match=r"validation\.split=val: it has classes of the dataset's test split"):
            check_classes(manifest, campaign().base)
    finally:
        manifest.splits["val"].pop()


def test_arguments_of_the_base_are_gathered(tmp_path):
    assert translate(["campaign=inner_lr", "base.data=glyphs", 'base.a="x y"', "trials=3"]) == [
        "campaign=inner_lr", "trials=3", 'overrides=["data=glyphs","a=\\"x y\\""]',
    ]  # fmt: skip
    file = tmp_path / "campaign" / "mine.yaml"
    with pytest.raises(PipelineError, match="there is no such file"):
        translate([f"campaign={file}"])
    store.write_bytes(str(file), b"# @package _global_\ncampaign: mine\n")
    assert translate([f"campaign={file}"]) == ["campaign=mine", f'hydra.searchpath=["file://{tmp_path}"]']
    store.write_bytes(str(tmp_path / "mine.yaml"), b"campaign: mine\n")
    with pytest.raises(PipelineError, match="put it into a folder named campaign"):
        translate([f"campaign={tmp_path}/mine.yaml"])
