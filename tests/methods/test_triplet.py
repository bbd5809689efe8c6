from __future__ import annotations

import pytest
import torch

from pipeline.batch import Episodes
from pipeline.errors import PipelineError
from pipeline.functional.distances import euclidean, squared_euclidean_exact
from pipeline.functional.triplets import MININGS, REDUCTIONS, candidates, mine, reduce
from pipeline.methods.triplet import Triplet
from pipeline.nets.mlp import MLP
from tests.methods import toy

SHAPE = (1, 6, 6)
LABELS = torch.tensor([[0, 1, 2, 0, -1, 1, 0, 3], [2, 2, 2, 2, 2, -1, -1, -1], [1, 0, 3, 1, 0, 0, 3, 1]])
# Three images and a lonely one; a task of one class, without any negative; every class twice or more.


def build(**options) -> Triplet:
    torch.manual_seed(1)
    return Triplet(MLP(SHAPE, widths=[7]), **options).double()


def distances(metric=squared_euclidean_exact) -> torch.Tensor:
    x = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return metric(x, x)


def triplets(d, labels, mining: str, margin: float) -> list[float]:
    """Hinges of one task, by loops; "facenet" and "sandberg" as lists of what a pair may draw."""
    n, out = len(labels), []
    for a in range(n):
        negative = [d[a, k].item() for k in range(n) if labels[k] >= 0 and labels[k] != labels[a]]
        positive = [p for p in range(n) if p != a and labels[p] == labels[a] >= 0]
        if not negative or not positive:
            continue
        if mining == "batch_hard":
            out.append(max(0.0, max(d[a, p].item() for p in positive) - min(negative) + margin))
            continue
        for p in positive:
            d_ap = d[a, p].item()
            if mining == "batch_all":
                out += [max(0.0, d_ap - d_an + margin) for d_an in negative]
            elif mining == "semi_hard":
                beyond = [d_an for d_an in negative if d_an > d_ap]
                out.append(max(0.0, d_ap - (min(beyond) if beyond else max(negative)) + margin))
            elif mining == "facenet" or p > a:
                low = d_ap if mining == "facenet" else -1.0
                out.append([d_ap - d_an + margin for d_an in negative if low < d_an < d_ap + margin])
    return out


@pytest.mark.parametrize("mining", ["batch_all", "semi_hard", "batch_hard"])
@pytest.mark.parametrize("metric", [squared_euclidean_exact, euclidean])
@pytest.mark.parametrize("margin", [0.2, 3.0])
def test_mining_by_definition(mining, metric, margin):
    d = distances(metric)
    mined = mine(d, LABELS, mining, margin)
    for t in range(3):
        expected = triplets(d[t], LABELS[t], mining, margin)
        active = [x for x in expected if x > 0]
        values = {"sum": sum(expected), "mean": sum(expected) / max(len(expected), 1)}
        values["mean_nonzero"] = sum(expected) / max(len(active), 1)
        for reduction in REDUCTIONS:
            assert reduce(mined, reduction)[t].item() == pytest.approx(values[reduction], abs=1e-10)
        alone = mine(d[t : t + 1], LABELS[t : t + 1], mining, margin)
        torch.testing.assert_close(reduce(alone, "mean")[0], reduce(mined, "mean")[t])


@pytest.mark.parametrize("mining", ["facenet", "sandberg"])
def test_random_mining_draws_every_allowed_negative_and_no_other(mining):
    d, margin = distances(), 3.0
    labels = LABELS[2]
    torch.manual_seed(0)
    seen: dict[tuple[int, int], list[float]] = {}
    for _ in range(300):
        mined = mine(d[2:], labels[None], mining, margin)
        for a, p in mined.triplets[0].nonzero().tolist():
            seen.setdefault((a, p), []).append(round(mined.total[0, a, p].item(), 9))
    found = sorted(sorted(set(values)) for values in seen.values())
    expected = sorted(sorted({round(x, 9) for x in e}) for e in triplets(d[2], labels, mining, margin) if e)
    assert found == [pytest.approx(e) for e in expected]
    assert all(len(values) == 300 for values in seen.values())  # every pair with a candidate, in every draw
    for values in seen.values():
        assert min(values.count(v) for v in set(values)) > 0.5 * 300 / len(set(values))
    assert candidates(d, LABELS, margin).any(-1)[2].sum() > candidates(d, LABELS, 0.0).sum() == 0


@pytest.mark.parametrize("mining", ["batch_all", "semi_hard", "batch_hard"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients(mining, reduction):
    d = distances().requires_grad_()
    assert torch.autograd.gradcheck(lambda d: reduce(mine(d, LABELS, mining, 1.0), reduction), d)


@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("squared", [True, False])
def test_equal_images_have_a_finite_gradient(mining, squared):
    method, batch = build(mining=mining, squared=squared), toy.awkward()
    same = {"support": batch.support[:, :1].expand_as(batch.support), "query": batch.query * 0}
    method(Episodes(**{**vars(batch), **same}))[0].backward()
    assert all(p.grad.isfinite().all() for p in method.parameters())


@pytest.mark.parametrize("answer", ["class_mean", "nearest"])
@pytest.mark.parametrize("options", [{}, {"squared": False}, {"normalise": False, "embedding_dim": 3}])
def test_method_by_definition(answer, options):
    """The loss of support and queries together, and the answers, from embeddings computed by hand."""
    method, batch = build(answer=answer, mining="batch_all", **options), toy.awkward()
    power = 1 if options.get("squared") is False else 2
    logits = method.classify(method.adapt(batch.support, batch.support_labels, 4), batch.query)
    losses = []
    for t in range(3):
        z = method.embedding(method.backbone(torch.cat([batch.support, batch.query], 1)[t]))
        z = z if options.get("normalise") is False else z / z.norm(dim=1, keepdim=True)
        d = (z[:, None] - z[None]).norm(dim=-1) ** power
        labels = torch.cat([batch.support_labels, batch.query_labels], 1)[t]
        hinges = triplets(d, labels, "batch_all", 0.2)
        losses.append(sum(hinges) / len(hinges))
        for c in range(4):
            own = z[:8][batch.support_labels[t] == c]
            to_all = (z[8:, None] - own[None]).norm(dim=-1) ** power
            to_mean = (z[8:] - own.mean(0)).norm(dim=-1) ** power
            expected = -(to_mean if answer == "class_mean" else to_all.amin(1))
            torch.testing.assert_close(logits[t, :, c], expected, rtol=0, atol=1e-10)
    loss, metrics = method(batch)
    assert loss.item() == pytest.approx(sum(losses) / 3, abs=1e-10) and 0 < metrics["active"] <= 1


def test_extend():
    method, batch = build().eval().float(), toy.awkward(dtype=torch.float32)
    state = method.adapt(batch.support, batch.support_labels, 4)
    extended = method.extend(state, batch.query[:, :3], torch.tensor([[4, 5, 4]] * 3))
    known, every = method.classify(state, batch.query), method.classify(extended, batch.query)
    assert every.shape[-1] == 6 and torch.equal(every[..., :4], known)
    with pytest.raises(PipelineError, match="numbered from 4"):
        method.extend(state, batch.query[:, :3], torch.tensor([[3, 4, 4]] * 3))
    assert build(answer="nearest").extend(state, batch.query[:, :3], torch.tensor([[4, 5, 4]] * 3)) is None


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        *(({"mining": m}, 40) for m in MININGS if m != "batch_hard"),
        ({"mining": "batch_hard", "squared": False}, 100),  # it has to leave the state where all embeddings are one
    ],
)
def test_learns(options, steps):
    torch.manual_seed(0)
    method = Triplet(MLP((1, toy.SIDE, toy.SIDE), widths=[24]), embedding_dim=12, margin=0.5, **options)
    before = toy.accuracy(method)
    toy.train(method, steps)
    after = toy.accuracy(method)
    assert after > max(0.6, before + 0.15), (before, after)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mining": "hard"}, "choose one of semi_hard, facenet, sandberg, batch_all, batch_hard"),
        ({"reduction": "max"}, "choose one of mean, sum, mean_nonzero"),
        ({"answer": "soft"}, "choose one of class_mean, nearest"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(PipelineError, match=message):
        build(**options)
