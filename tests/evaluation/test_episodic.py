"""Episodic and joint accuracy against one episode at a time, written out."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from pipeline.data.dataset import Dataset, class_table
from pipeline.data.episodes import EpisodeSpec, plan_episodes
from pipeline.errors import PipelineError, Unavailable
from pipeline.evaluation import generalized, spread
from pipeline.evaluation.episodic import episode_accuracies
from pipeline.evaluation.evaluate import EpisodicProtocol, evaluate
from pipeline.evaluation.generalized import FineTuning, GeneralizedProtocol, evaluate_joint
from pipeline.evaluation.model import Built, Model
from pipeline.evaluation.spread import OnCluster, fetched
from pipeline.model import build_model, build_preprocess


def spec(method: str = "prototypical", **options) -> dict:
    return {
        "method": {"name": method, **options},
        "backbone": {"name": "conv4", "width": 8},
        "input": {"shape": [1, 28, 28], "scaling": "unit"},
        "way": 5,
        "classes": 60,
    }


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    return dict(build_model(spec()).state_dict())


def test_accuracy_is_nearest_prototype_one_episode_at_a_time(glyphs, weights):
    dataset = Dataset(glyphs)
    table, shape = class_table(dataset.manifest, "test"), EpisodeSpec(5, 2, 4)
    method, preprocess = build_model(spec()), build_preprocess(spec())
    method.load_state_dict(weights)
    found = episode_accuracies(method, preprocess, dataset, table, shape, 9, np.arange(3, 20), chunk=7)
    method.eval()
    for number, accuracy in zip(range(3, 20), found, strict=True):
        plan = plan_episodes(table, shape, 9, np.asarray([number]))
        images = torch.from_numpy(dataset.gather(plan.rows)).float() / 255
        with torch.no_grad():
            features = method.backbone(images).double().numpy()
        support, query = features[: plan.support], features[plan.support :]
        prototypes = np.stack([support[plan.labels[0, : plan.support] == c].mean(0) for c in range(5)])
        answers = ((query[:, None] - prototypes) ** 2).sum(-1).argmin(1)
        assert accuracy == pytest.approx((answers == plan.labels[0, plan.support :]).mean())


def test_a_slow_evaluation_says_how_far_it_is(ray_session, glyphs, weights, monkeypatch, capsys):
    monkeypatch.setattr(spread, "PROGRESS_S", 0.01)
    evaluate(Model(spec(), weights), [EpisodicProtocol(glyphs, "test", 5, shot, 4, episodes=40) for shot in (1, 2)])
    assert " of 80 episodes answered\n" in capsys.readouterr().out


def test_a_damaged_shard_is_not_measured_on(ray_session, glyphs, weights, tmp_path):
    folder = shutil.copytree(glyphs, tmp_path / "glyphs")
    shard = next(folder.glob("*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1  # of a pixel
    shard.write_bytes(content)
    with pytest.raises(PipelineError, match=rf"^shard {shard} is damaged"):
        evaluate(Model(spec(), weights), [EpisodicProtocol(str(folder), "test", 5, 1, 4, episodes=4)])


def test_a_task_says_what_is_wrong_in_one_line(ray_session, weights):
    """As it was raised, and of its kind: by the kind a job ends with 75 and not with 2."""

    def work(*_):
        raise Unavailable("s3://bucket does not answer; try again later")

    with pytest.raises(PipelineError) as caught:
        fetched(OnCluster(Model(spec(), weights)).spread(work, [1]))
    assert type(caught.value) is Unavailable
    assert str(caught.value) == "s3://bucket does not answer; try again later"


def test_the_number_computed_at_once_changes_nothing(glyphs, weights):
    dataset = Dataset(glyphs)
    table = class_table(dataset.manifest, "test")
    method, preprocess = build_model(spec()), build_preprocess(spec())
    method.load_state_dict(weights)
    results = [
        episode_accuracies(method, preprocess, dataset, table, EpisodeSpec(5, 1, 4), 0, np.arange(12), chunk=chunk)
        for chunk in (1, 5, 12)
    ]
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def by_the_batch(method: str, **options) -> tuple:
    """A method of random weights on a network that normalises by the images it is given."""
    backbone = {"name": "relation_encoder" if method == "relation" else "conv4", "width": 8, "norm": "batch_statistics"}
    described = {**spec(method, **options), "backbone": backbone}
    torch.manual_seed(5)
    return build_model(described).eval(), build_preprocess(described)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("prototypical", {}),
        ("baseline", {"head": "nearest"}),
        ("baseline", {"head": "support_initialised", "epochs": 1}),
        ("relation", {"transductive": False}),
        ("pmf", {}),
    ],
)
def test_a_network_that_looks_at_the_batch_sees_one_episode_at_once(glyphs, method, options):
    """Neither the number computed at once nor how episodes are shared by workers decides what comes out."""
    dataset = Dataset(glyphs)
    table = class_table(dataset.manifest, "test")
    built, preprocess = by_the_batch(method, **options)

    def found(numbers: np.ndarray, chunk: int) -> np.ndarray:
        return episode_accuracies(built, preprocess, dataset, table, EpisodeSpec(5, 1, 4), 0, numbers, chunk)

    alone = found(np.arange(12), 1)
    for chunk in (5, 12):
        np.testing.assert_array_equal(found(np.arange(12), chunk), alone)
    for rank in range(3):
        np.testing.assert_array_equal(found(np.arange(12)[rank::3], 12), alone[rank::3])


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("maml", {}),
        ("maml", {"transductive": False}),
        ("maml_plus_plus", {}),
        ("meta_lstm", {"inner_steps_eval": 2}),
        ("reptile", {"inner_steps_eval": 2}),
        ("relation", {}),
        ("baseline", {"head": "finetune_all", "epochs": 2}),
        ("pmf", {"rates": [0.01], "steps": 2}),
    ],
)
def test_what_goes_task_by_task_may_be_given_several(method, options):
    built, _ = by_the_batch(method, **options)
    assert built.task_by_task
    support, query, labels = torch.rand(3, 5, 1, 28, 28), torch.rand(3, 6, 1, 28, 28), torch.arange(5).expand(3, 5)

    def answers(part: slice) -> torch.Tensor:
        torch.manual_seed(1)  # of a classifier that begins at random
        return built.classify(built.adapt(support[part], labels[part]), query[part]).detach()

    together = answers(slice(0, 3))
    for t in range(3):
        torch.testing.assert_close(together[t : t + 1], answers(slice(t, t + 1)), rtol=1e-3, atol=1e-4)


def test_spread_over_the_cluster_it_is_the_same(ray_session, glyphs, weights):
    protocol = EpisodicProtocol(glyphs, "test", 5, 1, 4, episodes=30, seed=3, tasks=4)
    [result] = evaluate(Model(spec(), weights), [protocol])
    dataset = Dataset(glyphs)
    method = build_model(spec())
    method.load_state_dict(weights)
    table = class_table(dataset.manifest, "test")
    alone = episode_accuracies(method, build_preprocess(spec()), dataset, table, protocol.spec, 3, np.arange(30), 30)
    np.testing.assert_array_equal(result.accuracies, alone)
    assert result.summary()["accuracy"] == pytest.approx(alone.mean())


@pytest.mark.parametrize(
    ("change", "method", "says"),
    [
        ({"way": 41}, "prototypical", "way=41: split 'test' has only 40 classes; give way=40 at most"),
        ({"way": 5, "query": 20}, "prototypical", "has only 20 images"),
        ({"way": 6}, "maml", "answers for 5 classes only"),
        ({"split": "valid"}, "prototypical", "has no split 'valid'"),
    ],
)
def test_the_impossible_is_refused(ray_session, glyphs, change, method, says):
    asked = {"dataset": glyphs, "split": "test", "way": 5, "shot": 1, "query": 4, **change}
    with pytest.raises(PipelineError) as error:
        evaluate(Model(spec(method), None), [EpisodicProtocol(**asked)])
    assert says in str(error.value) and "evaluation." not in str(error.value), "a key that jobs.evaluate has not"


def test_joint_accuracy_written_out(ray_session, glyphs):
    """Imprinted weights beside the base weights, every query against all of them."""
    torch.manual_seed(1)
    model = build_model(spec("imprinted"))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    protocol = GeneralizedProtocol(glyphs, "train", 0.25, "test", shot=2, query=5, draws=2, seed=4)
    result = evaluate_joint(Model(spec("imprinted"), weights), protocol)
    dataset = Dataset(glyphs)
    model.eval()

    def features(rows: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            out = model.backbone(torch.from_numpy(dataset.gather(rows)).float() / 255).double().numpy()
        return out / np.linalg.norm(out, axis=1, keepdims=True)

    starts = dataset.manifest.class_starts[:60]
    base_rows = (starts[:, None] + 15 + np.arange(5)).reshape(-1)  # the last quarter of every class
    base = features(base_rows)
    base_weights = weights["weight"].double().numpy()
    table = class_table(dataset.manifest, "test")
    for draw in range(2):
        plan = plan_episodes(table, EpisodeSpec(40, 2, 5), 4, np.asarray([draw]))
        vectors = features(plan.rows[0])
        support, query = vectors[:80], vectors[80:]
        novel = np.stack([support[plan.labels[0, :80] == c].mean(0) for c in range(40)])
        novel /= np.linalg.norm(novel, axis=1, keepdims=True)
        every = np.concatenate([base_weights, novel])
        right_novel = (query @ every.T).argmax(1) == plan.labels[0, 80:] + 60
        right_base = (base @ every.T).argmax(1) == np.repeat(np.arange(60), 5)
        assert result.accuracies["novel"][draw] == pytest.approx(right_novel.mean(), abs=0.006)
        assert result.accuracies["base"][draw] == pytest.approx(right_base.mean(), abs=0.004)
        both = np.concatenate([right_novel, right_base])
        assert result.accuracies["all"][draw] == pytest.approx(both.mean(), abs=0.004)
        only = (query @ novel.T).argmax(1) == plan.labels[0, 80:]
        assert result.accuracies["novel_only"][draw] == pytest.approx(only.mean(), abs=0.006)


def test_labels_of_the_joint_space_lie_where_its_images_are(glyphs, monkeypatch):
    """On a GPU; here on a device without numbers, up to where the method is asked."""
    protocol = GeneralizedProtocol(glyphs, "train", 0.25, "test", shot=2, query=5, draws=2, seed=4)
    device, asked = torch.device("meta"), []
    method, preprocess = build_model(spec("imprinted")).to(device).eval(), build_preprocess(spec()).to(device)
    measured = generalized._Measured(Built(method, preprocess, device), protocol)

    def joint_state(support, labels, way):
        asked.extend([support.device, labels.device])
        raise LookupError

    monkeypatch.setattr(method, "joint_state", joint_state)
    with pytest.raises(LookupError):
        measured.draw(0)
    assert asked == [device, device]


def test_the_joint_space_is_of_the_dataset_of_the_training(glyphs):
    """A base class is a number there: after a class more, or on other data, every label would be another one's."""
    protocol = GeneralizedProtocol(glyphs, "train", 0.25, "test", shot=2, query=5, draws=2, seed=4)
    model = Model(spec("imprinted"), None, "one", glyphs, fingerprint="of another time")
    with pytest.raises(PipelineError, match=f"one was trained on, and {glyphs} is another dataset, or has"):
        evaluate_joint(model, protocol)


def test_fine_tuning_helps_the_novel_classes_and_leaves_the_model_alone(ray_session, glyphs):
    torch.manual_seed(1)
    weights = dict(build_model(spec("imprinted")).state_dict())
    plain = GeneralizedProtocol(glyphs, "train", 0.25, "test", shot=5, query=5, draws=2, seed=4)
    tuned = GeneralizedProtocol(glyphs, "train", 0.25, "test", 5, 5, 2, 4, FineTuning(steps=400, lr=0.1, batch_size=64))
    model = Model(spec("imprinted"), weights)
    before, after = evaluate_joint(model, plain), evaluate_joint(model, tuned)
    again = evaluate_joint(model, plain)
    assert after.estimates()["all"].mean > before.estimates()["all"].mean + 0.1
    np.testing.assert_array_equal(before.accuracies["all"], again.accuracies["all"])
