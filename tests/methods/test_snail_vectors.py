from __future__ import annotations

import pytest
import torch

from pipeline.functional.sequences import causal_attention
from pipeline.nets.snail_blocks import AttentionBlock, DenseBlock, dilations

CASES = "snail_blocks_*.npz"
KEYS = "out_attention_correct_softmax_over_keys"


def dense_blocks(case) -> list[DenseBlock]:
    blocks, channels = [], case["in_x"].shape[2]
    for number, dilation in enumerate(case["meta_dilations"].tolist()):
        weights, biases = (
            [case[f"in_tc_dense_blocks_{number}_casualconv{i}_conv1d_{kind}"] for i in (1, 2)]
            for kind in ("weight", "bias")
        )
        block = DenseBlock(channels, dilation, len(biases[0])).to(case["in_x"].dtype)
        with torch.no_grad():
            block.units.weight.copy_(torch.cat([w.mT.flatten(1) for w in weights]))  # earlier position, then this one
            block.units.bias.copy_(torch.cat(biases))
        blocks.append(block)
        channels = block.channels
    return blocks


def attention_block(case, over: str) -> AttentionBlock:
    sizes = [case[f"in_att_linear_{kind}_bias"].shape[0] for kind in ("keys", "values")]
    block = AttentionBlock(case["in_x"].shape[2], *sizes, over).to(case["in_x"].dtype)
    names = {"query": "query", "key": "keys", "value": "values"}
    block.load_state_dict(
        {
            f"{ours}.{k}": case[f"in_att_linear_{theirs}_{k}"]
            for ours, theirs in names.items()
            for k in ("weight", "bias")
        }
    )
    return block


@pytest.mark.parametrize("rows", [slice(None), slice(0, 1), slice(1, 2)])
def test_tc_block(case, check, rows):
    assert list(dilations(case["in_x"].shape[1])) == case["meta_dilations"].tolist()
    x = case["in_x"][rows]
    for block in dense_blocks(case):
        x = block(x, torch.ones(x.shape[:2], dtype=torch.bool))
    case["out_tc_block"] = case["out_tc_block"][rows]
    check(x, "out_tc_block")


@pytest.mark.parametrize("rows", [slice(None), slice(0, 1), slice(1, 2)])
@pytest.mark.parametrize(
    ("over", "key"),
    [("keys", "out_attention_correct_softmax_over_keys"), ("queries", "out_attention_repo_softmax_dim1")],
)
def test_attention_block(case, check, over, key, rows):
    x, block = case["in_x"][rows], attention_block(case, over)
    case[key] = case[key][rows]
    check(block(x, torch.ones(x.shape[:2], dtype=torch.bool)), key)
    read = causal_attention(block.query(x), block.key(x), block.value(x), over=over)
    check(torch.cat([x, read], dim=-1), key)


def test_last_positions(case, check):
    """What is remembered of the first positions gives the last one."""
    x = case["in_x"]
    items, present = x[:, -1:], torch.ones(len(x), x.shape[1] - 1, dtype=torch.bool)
    attention = attention_block(case, "keys")
    case[KEYS] = case[KEYS][:, -1:]
    check(attention.last(items, attention.remember(x[:, :-1]), present), KEYS)
    before = x[:, :-1]
    for block in dense_blocks(case):
        memory = block.remember(before)
        before, items = block(before, present), block.last(items, memory, present)
    case["out_tc_block"] = case["out_tc_block"][:, -1:]
    check(items, "out_tc_block")
