"""``precision=auto`` is decided once, for what this machine computes faster in, and said."""

from __future__ import annotations

import pytest
import torch

from pipeline import environment
from pipeline.training import prepare


@pytest.mark.parametrize(
    ("instructions", "gpus", "chosen"),
    [(None, 0, "float32"), ("avx512_bf16", 0, "bfloat16"), ("amx_bf16", 0, "bfloat16"), (None, 1, "bfloat16")],
)
def test_auto(monkeypatch, capsys, small_run, instructions, gpus, chosen) -> None:
    monkeypatch.setattr(prepare, "bfloat16_instructions", lambda: instructions)
    raw = small_run("prototypical", "precision=auto", f"cluster.gpus_per_worker={gpus}")
    config, stored, run = prepare.prepare(raw)
    assert config.precision == stored["precision"] == run.config["precision"] == chosen
    assert f"precision=auto: {chosen} (" in capsys.readouterr().out


def test_what_the_processor_has_is_what_torch_says() -> None:
    told = torch.cpu.get_capabilities()
    has = bool(told.get("amx_bf16") or told.get("avx512_bf16"))
    assert (environment.bfloat16_instructions() is not None) == has
    assert environment.machine()["bfloat16"] == environment.bfloat16_instructions()
