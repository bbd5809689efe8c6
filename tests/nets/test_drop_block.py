"""DropBlock: whole squares, the stated share, the mean kept; and the rate's rise over the training of ResNet-12."""

from __future__ import annotations

import pytest
import torch

from pipeline.nets import build_backbone
from pipeline.nets.blocks import drop_block

SMALL = {"name": "resnet12", "widths": [3, 4, 5, 6], "drop": 0.3, "drop_ramp": 4}


@pytest.mark.parametrize(("side", "size"), [(10, 5), (5, 5), (7, 2), (6, 3), (3, 5)])
def test_zeros_are_whole_squares(side, size):
    torch.manual_seed(0)
    x = torch.ones(50, 8, side, side, dtype=torch.float64)
    zeros = drop_block(x, 0.1, size) == 0
    assert 0 < zeros.double().mean() < 0.2
    whole = torch.zeros_like(zeros)
    size = min(size, side)
    for row in range(side - size + 1):
        for column in range(side - size + 1):
            place = (slice(None), slice(None), slice(row, row + size), slice(column, column + size))
            whole[place] |= zeros[place].flatten(2).all(-1)[..., None, None]
    assert torch.equal(whole, zeros)


@pytest.mark.parametrize(("side", "size"), [(10, 5), (5, 5), (7, 2)])
@pytest.mark.parametrize("rate", [0.05, 0.2])
def test_share_and_mean(side, size, rate):
    """The expected share follows from the chance of a square at each of its places, independent of each other."""
    torch.manual_seed(0)
    x = torch.rand(600, 20, side, side, dtype=torch.float64) + 1
    out = drop_block(x, torch.tensor(rate), size)
    chance = rate / size**2 * side**2 / (side - size + 1) ** 2
    covers = [sum(0 <= i - k <= side - size for k in range(size)) for i in range(side)]
    expected = sum(1 - (1 - chance) ** (a * b) for a in covers for b in covers) / side**2
    assert (out == 0).double().mean().item() == pytest.approx(expected, rel=0.05)
    left = out != 0
    factor = x.numel() / left.sum().item()
    torch.testing.assert_close(out[left], x[left] * factor)


def test_nothing_is_left_out_at_rate_0_and_everything_at_1():
    x = torch.rand(4, 3, 6, 6)
    assert torch.equal(drop_block(x, torch.tensor(0.0), 3), x)
    assert drop_block(x, 1e9, 3).count_nonzero() == 0


def test_half_precision_keeps_its_type():
    assert drop_block(torch.rand(2, 2, 5, 5, dtype=torch.bfloat16), torch.tensor(0.1), 5).dtype == torch.bfloat16


def test_the_rate_rises_with_the_forward_passes_of_training(monkeypatch):
    rates = []
    monkeypatch.setattr(
        "pipeline.nets.resnet12.drop_block", lambda x, rate, size: (rates.append((float(rate), size)), x)[1]
    )
    net = build_backbone(SMALL, (1, 48, 48))
    for _ in range(6):
        net(torch.rand(2, 1, 48, 48))
        net.eval()(torch.rand(2, 1, 48, 48))
        net.train()
    assert [r for r, _ in rates] == pytest.approx([0.075, 0.075, 0.15, 0.15, 0.225, 0.225] + [0.3] * 6)
    assert {s for _, s in rates} == {5} and int(net.forwards) == 6


def test_resumed_equals_uninterrupted():
    def steps(net, first, last):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        for step in range(first, last):
            torch.manual_seed(step)
            net(torch.rand(4, 1, 48, 48)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return net

    def new():
        torch.manual_seed(7)
        return build_backbone(SMALL, (1, 48, 48))

    whole = steps(new(), 0, 6)
    resumed = build_backbone(SMALL, (1, 48, 48))
    resumed.load_state_dict(steps(new(), 0, 3).state_dict())
    resumed = steps(resumed, 3, 6)
    assert whole.state_dict().keys() == resumed.state_dict().keys()
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )
    torch.manual_seed(0)
    found = whole(torch.rand(4, 1, 48, 48))
    torch.manual_seed(0)
    assert torch.equal(found, resumed(torch.rand(4, 1, 48, 48)))


def test_evaluation_leaves_nothing_out():
    net = build_backbone({**SMALL, "drop": 0.9}, (1, 48, 48)).eval()
    x = torch.rand(4, 1, 48, 48)
    assert torch.equal(net(x), net(x)) and (net(x) == 0).sum() == 0


def test_under_vmap_every_task_has_its_own_squares():
    torch.manual_seed(0)
    net = build_backbone({**SMALL, "drop": 0.5, "drop_ramp": 1}, (1, 48, 48))
    net.forwards.fill_(1)
    tasks = torch.rand(1, 4, 1, 48, 48).expand(3, -1, -1, -1, -1)
    found = torch.func.vmap(net, randomness="different")(tasks)
    zeros = found == 0
    assert int(net.forwards) == 1 and zeros.any() and not torch.equal(zeros[0], zeros[1])
