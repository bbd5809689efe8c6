"""Trials that are computed as one program move as each would alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import ray
import torch

from pipeline.batch import Episodes
from pipeline.benchmark import made
from pipeline.config import compose, validate
from pipeline.errors import PipelineError
from pipeline.nets.norm import BatchNorm
from pipeline.search.pack import Pack
from pipeline.search.packs import check_packs
from pipeline.search.program import alike, arrange, pays
from pipeline.training.config import TrainConfig
from pipeline.training.learner import Learner
from tests.search.test_packs import alone, weights

CONV = ["backbone.width=6", "backbone.bias=false"]
SGD = ["optimizer=sgd", "optimizer.lr=0.1"]
REPTILE = ["method=reptile", "backbone=conv4_strided", *CONV, *SGD]
CASES = {
    "prototypical": (["method=prototypical", *CONV, *SGD], ["method.scale=1", "method.scale=3"]),
    "prototypical, support and query apart": (
        ["method=prototypical", "method.joint_forward=false", *CONV, *SGD], ["method.scale=1", "method.scale=3"]
    ),
    "prototypical, learned scale": (
        ["method=prototypical", "method.learn_scale=true", *CONV, *SGD], ["method.scale=1", "optimizer.lr=0.01"]
    ),
    "ResNet-12": (
        ["method=prototypical", "backbone=resnet12", "backbone.widths=[4,4,4,4]", "backbone.drop=0", *SGD],
        ["method.scale=1", "method.scale=3"],
    ),
    "MAML": (["method=maml", "method.inner_steps=2", *CONV, *SGD], ["method.inner_lr=0.4", "method.inner_lr=0.1"]),
    "MAML, first order": (
        ["method=maml", "method.first_order=true", "backbone=mlp", *SGD], ["method.inner_lr=0.4", "method.inner_lr=0.1"]
    ),
    "ANIL, not transductive": (
        ["method=maml", "method.adapt_parameters=head", "method.transductive=false", *CONV, *SGD],
        ["method.inner_lr=0.4", "method.inner_lr=0.1"],
    ),
    "Reptile": (REPTILE, ["method.inner_lr=0.001", "method.inner_lr=0.01"]),
    "Reptile with a penalty": (
        REPTILE, ["method.consensus=0.1", "[method.consensus=0.01,method.inner_lr=0.01]"]
    ),
    "Reptile with a penalty, in turn": (
        [*REPTILE, "method.consensus_order=sequential", "method.inner_optimizer=sgd"],
        ["method.consensus=0.1", "method.consensus=0.01"],
    ),
}  # fmt: skip


def learners(base: list[str], trials: list[str]) -> list[Learner]:
    """In float64, where only an error is larger than rounding."""
    found = []
    for trial in trials:
        own = trial.strip("[]").split(",") if trial.startswith("[") else [trial]
        config = validate(TrainConfig, compose("train", ["data=glyphs", "cluster.workers=1", *base, *own]))
        images = {"shape": [1, 28, 28], "scaling": "unit"}
        spec = {"method": config.method, "backbone": config.backbone, "input": images, "way": 5, "shot": 1}
        learner = Learner(config, spec)
        learner.method.double(), learner.preprocess.double()
        found.append(learner)
    return found


def batch(seed: int) -> Episodes:
    episodes = made.episodes(2, made.OMNIGLOT, way=5, shot=2, query=2, seed=seed)
    return replace(episodes, support=pixels(episodes.support), query=pixels(episodes.query))


def pixels(images: torch.Tensor) -> torch.Tensor:
    return (255 * images).to(torch.uint8)


@pytest.mark.parametrize("case", CASES)
def test_one_program_moves_them_as_they_move_alone(case: str) -> None:
    together, apart = learners(*CASES[case]), learners(*CASES[case])
    before = [{name: value.clone() for name, value in one.method.state_dict().items()} for one in apart]
    (program,) = arrange(together, batched=True)
    assert program.learners == together
    for seed in range(3):
        for ours, theirs in zip(together, apart, strict=True):
            found, expected = ours.train_step(batch(seed)), theirs.train_step(batch(seed))
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)
    for ours, theirs, start in zip(together, apart, before, strict=True):
        end = ours.method.state_dict()
        for name, value in theirs.method.state_dict().items():
            torch.testing.assert_close(end[name], value, rtol=1e-9, atol=1e-10)
        moved = [name for name, p in theirs.method.named_parameters() if p.requires_grad]
        assert any(not torch.equal(end[name], start[name]) for name in moved)
    first, second = (one.method.state_dict() for one in together)
    assert any(not torch.equal(first[name], second[name]) for name in first)  # the trials are two


def test_only_those_are_one_that_differ_in_scalars() -> None:
    one, *others = learners(
        ["method=reptile", "backbone=mlp", *SGD],
        [
            "method.inner_lr=0.01", "optimizer.lr=0.5", "method.inner_steps=3", "method.consensus=0.1",
            "backbone.widths=[8]", "precision=bfloat16", "augmentation.flip=true",
        ],
    )  # fmt: skip
    assert [alike(other) == alike(one) for other in others] == [True, *[False] * 5]
    (other,) = learners(["method=matching", "backbone=mlp"], ["seed=0"])
    (compiled,) = learners(["method=maml", "backbone=mlp"], ["compile=true"])
    (built_on_maml,) = learners(["method=maml_plus_plus", "backbone=mlp"], ["seed=0"])
    assert alike(other) is None and alike(compiled) is None and alike(built_on_maml) is None


def test_a_trial_that_diverges_leaves_the_others_alone() -> None:
    case = ["method=prototypical", *CONV, *SGD], ["method.scale=1", "method.scale=3"]
    (broken, sound), (_, alone) = learners(*case), learners(*case)
    arrange([broken, sound], batched=True)
    with torch.no_grad():
        next(broken.method.backbone.parameters()).fill_(torch.nan)
    assert broken.train_step(batch(0))["loss"].isnan()
    sound.train_step(batch(0)), alone.train_step(batch(0))
    for name, value in alone.method.state_dict().items():
        torch.testing.assert_close(sound.method.state_dict()[name], value, rtol=1e-9, atol=1e-10)


def test_they_are_one_where_it_pays() -> None:
    on_cpu = ["method.scale=1", "method.scale=2"]
    plain = learners(["method=prototypical", "backbone=mlp"], on_cpu)
    convolutional = learners(["method=prototypical", *CONV], on_cpu)
    assert pays(plain[0]) and not pays(convolutional[0])
    assert len(arrange(plain, None)) == 1 and not arrange(convolutional, None) and not arrange(plain, False)
    assert all(one.backward == one.own_backward for one in plain)  # the last word has it


def test_running_averages_are_kept_only_where_each_trial_has_its_own() -> None:
    layer, x = BatchNorm(3).double().train(), torch.randn(4, 2, 3, 5, 5, dtype=torch.float64)
    parameters, buffers = torch.func.stack_module_state([layer] * 4)
    call = torch.func.functional_call
    torch.func.vmap(lambda p, b, x: call(layer, (p, b), (x,)))(parameters, buffers, x)
    for number, images in enumerate(x):
        alone = BatchNorm(3).double().train()
        alone(images)
        torch.testing.assert_close(buffers["running_mean"][number], alone.running_mean)
        torch.testing.assert_close(buffers["running_var"][number], alone.running_var)
    torch.func.vmap(layer)(x)
    assert torch.equal(layer.running_mean, torch.zeros(3, dtype=torch.float64))


def test_a_pack_as_one_program(ray_session, campaign) -> None:
    """To rounding as alone; one is let go in the middle, and a pack of two goes on where the program was."""
    gentle = ["base.optimizer=sgd", "base.optimizer.lr=0.001", "base.backbone.bias=false"]
    small = campaign("batched=true", "together=3", "base.steps=18", *gentle)
    values = [{"method": "prototypical", "method.distance": "cosine", "method.scale": s} for s in (1.0, 10.0, 30.0)]
    runs = [small.prepare(own, f"one-{number}") for number, own in enumerate(values)]
    names = [run.name for run in runs]
    pack = Pack.remote(runs, True)
    assert sorted(ray.get(pack.advance.remote(names))) == names
    assert sorted(ray.get(pack.advance.remote(names[:2]))) == names[:2]
    ray.kill(pack)
    pack = Pack.remote(runs, True)  # at steps 12, 12 and 6
    while ray.get(pack.advance.remote(names)):
        pass
    start = Learner(validate(TrainConfig, runs[0].config), runs[0].spec).method
    for run in runs:
        found, expected = weights(run), alone(run)
        off, moved = 0.0, 0.0
        for name, parameter in start.named_parameters():
            off += float((found[name] - expected[name]).square().sum())
            moved += float((expected[name] - parameter.detach()).square().sum())
        assert moved > 0 and off < 1e-4 * moved  # rounding, grown over 18 steps; other trials are far away


def test_one_trial_a_process_is_no_program(campaign) -> None:
    with pytest.raises(PipelineError, match="batched=true: one program takes trials that share a process"):
        check_packs(campaign("batched=true"))
