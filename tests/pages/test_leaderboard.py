"""The leaderboard compares what can be compared."""

from __future__ import annotations

from types import SimpleNamespace

from pipeline.pages.facts import Result
from pipeline.pages.leaderboard import Scored, boards


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
