"""The leaderboard compares what can be compared."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

from pipeline.pages.facts import Result
from pipeline.pages.leaderboard import Scored, boards, scored_runs


def scored(name: str, dataset: str, fingerprint: str, accuracy: float, backbone: str = "conv4") -> Scored:
    data = SimpleNamespace(
        tags={"dataset.fingerprint": fingerprint}, params={"backbone.name": backbone, "steps": "300"}
    )
    run = SimpleNamespace(data=data, info=SimpleNamespace(run_id=name, run_name=name))
    result = Result(split="test", way=5, shot=1, accuracy=accuracy, interval=0.01)
    return Scored(run, "MAML", "maml", dataset, {"5-way 1-shot": result}, {})


def test_runs_on_other_test_classes_stand_in_a_table_of_their_own():
    runs = [scored("a", "products", "1" * 64, 0.9), scored("b", "products", "2" * 64, 0.5)]
    runs += [scored("c", "products", "2" * 64, 0.6, "resnet12"), scored("d", "omniglot", "3" * 64, 0.7)]
    found = boards(runs, {})
    names = [(board.dataset, [row[-1].text for row in board.table.rows]) for board in found]
    second, first = f"products, {'2' * 12}", f"products, {'1' * 12}"
    assert names == [(second, ["c", "b"]), (first, ["a"]), ("omniglot", ["d"])]
    best = [row[1].mark for row in found[0].table.rows]
    assert best == ["best", ""], "the best of its own classes"


def test_a_run_on_features_says_what_their_network_was_trained_on():
    run = scored("a", "x", "1", 0.9, "features")
    run.run.data.tags["backbone.weights"] = "weights trained on birds"
    [board] = boards([run], {})
    assert board.table.rows[0][board.table.header.index("backbone")].note == "weights trained on birds"


def test_the_backbone_has_a_column():
    [board] = boards([scored("a", "x", "1", 0.9), scored("b", "x", "1", 0.5, "resnet12")], {})
    at = board.table.header.index("backbone")
    assert [row[at].text for row in board.table.rows] == ["conv4", "resnet12"]


def test_a_split_has_a_table_of_its_own():
    """Accuracy on validation classes, as of ``evaluation.split=val``, is no better accuracy on test classes."""
    runs = [scored("a", "x", "1", 0.5), replace(scored("b", "x", "1", 0.9), split="val"), scored("c", "x", "1", 0.4)]
    test, val = boards(runs, {})
    names = [(board.dataset, [row[-1].text for row in board.table.rows]) for board in (test, val)]
    assert names == [("x", ["a", "c"]), ("x, split val", ["b"])]
    assert "on the test classes" in test.table.caption and "on the val classes" in val.table.caption


def test_a_run_that_was_measured_on_two_splits_stands_in_both():
    shape = {"way": 5, "shot": 1, "interval": 0.1}
    entries = [{"split": "test", "accuracy": 0.5, **shape}, {"split": "val", "accuracy": 0.6, **shape}]
    run = scored("a", "x", "1", 0.5).run
    run.data.params["method.name"] = "maml"
    run.data.tags["dataset.name"] = "x"
    site = SimpleNamespace(runs=[run], files=SimpleNamespace(json=lambda *_: entries))
    found = scored_runs(site, [])
    assert [(one.split, one.results["5-way 1-shot"].accuracy) for one in found] == [("test", 0.5), ("val", 0.6)]
