from __future__ import annotations

import pytest
import torch

from pipeline.batch import Episodes
from pipeline.errors import PipelineError
from pipeline.methods.prototypical import Prototypical
from pipeline.nets.conv4 import Conv4
from pipeline.nets.mlp import MLP

LABELS = torch.tensor([[2, 0, 1, 1, 0], [0, 1, 2, 0, 0]])
QUERY_LABELS = torch.tensor([[0, 1, 2, 2], [1, 1, 0, 2]])


def batch(dtype=torch.float64) -> Episodes:
    generator = torch.Generator().manual_seed(0)
    support = torch.randn(2, 5, 1, 8, 8, generator=generator, dtype=dtype)
    query = torch.randn(2, 4, 1, 8, 8, generator=generator, dtype=dtype)
    return Episodes(support, LABELS, query, QUERY_LABELS, torch.arange(3).expand(2, 3), 3)


def build(**options) -> Prototypical:
    torch.manual_seed(1)
    return Prototypical(Conv4((1, 8, 8), width=[3, 4]), **options).double()


def by_definition(method: Prototypical, support, query, e: Episodes) -> float:
    """Mean negative log-probability from embeddings, query by query."""
    losses = []
    for t in range(2):
        means = [support[t][e.support_labels[t] == c].mean(0) for c in range(3)]
        for q, label in zip(query[t], e.query_labels[t], strict=True):
            logits = torch.stack([-method.scale * (q - m).square().sum() for m in means])
            losses.append(-logits.log_softmax(0)[label])
    return torch.stack(losses).mean().item()


@pytest.mark.parametrize("joint", [True, False])
def test_batch_norm_sees_support_and_query_together_only_when_joint(joint):
    method, e = build(joint_forward=joint), batch()
    together = method.backbone(torch.cat([e.support, e.query], 1).flatten(0, 1)).unflatten(0, (2, 9))
    apart = [method.backbone(x.flatten(0, 1)).unflatten(0, x.shape[:2]) for x in (e.support, e.query)]
    support, query = (together[:, :5], together[:, 5:]) if joint else apart
    expected = by_definition(method, support, query, e)
    assert method(e)[0].item() == pytest.approx(expected, abs=1e-10)
    other = by_definition(method, *(apart if joint else (together[:, :5], together[:, 5:])), e)
    assert abs(expected - other) > 1e-3


def test_evaluation_uses_running_averages_both_ways():
    e = batch()
    losses = [build(joint_forward=j).eval()(e)[0].item() for j in (True, False)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-10)


@pytest.mark.parametrize("learned", [True, False])
def test_metric_scale(learned):
    method, e = build(scale=7.5, learn_scale=learned), batch()
    loss, _ = method(e)
    loss.backward()
    plain = build().eval()
    method.eval()
    logits = [m.classify(m.adapt(e.support, LABELS), e.query) for m in (method, build().eval())]
    with torch.no_grad():
        for mine, theirs in zip(method.parameters(), plain.parameters(), strict=True):
            theirs.copy_(mine)
    for a, b in zip(method.buffers(), plain.buffers(), strict=True):
        b.copy_(a)
    plain.scale.data.fill_(1.0)
    torch.testing.assert_close(logits[0], 7.5 * plain.classify(plain.adapt(e.support, LABELS), e.query))
    assert (method.scale.grad is not None) is learned
    if learned:
        step = 1e-6
        method.train()
        with torch.no_grad():
            method.scale += step
            high = method(e)[0]
            method.scale -= 2 * step
            low = method(e)[0]
        assert method.scale.grad.item() == pytest.approx((high - low).item() / (2 * step), rel=1e-6)


@pytest.mark.parametrize("distance", ["squared_euclidean", "euclidean", "cosine", "dot"])
def test_extend_leaves_the_known_classes_alone(distance):
    torch.manual_seed(0)
    method = Prototypical(MLP((1, 8, 8), widths=[16]), distance=distance).eval()
    e = batch(torch.float32)
    state = method.adapt(e.support, LABELS)
    more = torch.randn(2, 3, 1, 8, 8)
    extended = method.extend(state, more, torch.tensor([[3, 4, 3], [4, 4, 3]]))
    assert extended["prototypes"].shape == (2, 5, 16)
    assert torch.equal(extended["prototypes"][:, :3], state["prototypes"])
    assert torch.equal(extended["counts"][:, :3], state["counts"]) and extended["counts"][0, 3:].tolist() == [2, 1]
    known, all_classes = method.classify(state, e.query), method.classify(extended, e.query)
    assert torch.equal(known, all_classes[..., :3])
    at_once = method.adapt(
        torch.cat([e.support, more], 1), torch.cat([LABELS, torch.tensor([[3, 4, 3], [4, 4, 3]])], 1)
    )
    torch.testing.assert_close(extended["prototypes"], at_once["prototypes"])
    with pytest.raises(PipelineError, match="numbered from 3"):
        method.extend(state, more, torch.tensor([[2, 3, 3], [3, 3, 3]]))


def test_more_classes_than_any_training_episode():
    method = build().eval()
    support, labels = torch.randn(1, 50, 1, 8, 8).double(), torch.arange(50)[None]
    assert method.classify(method.adapt(support, labels), support).argmax(-1).tolist() == [list(range(50))]


@pytest.mark.parametrize(
    ("labels", "way", "message"),
    [([[0, 0, 2, 2, 2]], None, "class 1 of 3 has no support"), ([[0, 1, 2, 0, 1]], 2, "0..1, found 0..2")],
)
def test_support_that_cannot_be_learnt_from(labels, way, message):
    with pytest.raises(PipelineError, match=message):
        build().eval().adapt(batch().support[:1], torch.tensor(labels), way)


def test_half_precision_training_has_float32_logits():
    method = Prototypical(Conv4((1, 8, 8), width=[3, 4])).eval()
    e = batch(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        state = method.adapt(e.support, LABELS)
        assert state["prototypes"].dtype == torch.float32
        assert method.classify(state, e.query).dtype == torch.float32
        assert method(e)[0].isfinite()


def test_unknown_distance():
    with pytest.raises(PipelineError, match="choose one of squared_euclidean, euclidean, cosine, dot"):
        build(distance="manhattan")
