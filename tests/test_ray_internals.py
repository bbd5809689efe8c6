"""A Ray that has moved what is not public: nothing fails, and what is missing is said once."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import ray_internals

PACKAGE = Path(ray_internals.__file__).parent
PRIVATE = {"_internal", "_private", "_common", "core", "_raylet"}


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "ray._private.state",
        "ray.data._internal.execution.execution_callback",
        "ray.train.v2._internal.execution.context",
    ):
        monkeypatch.setitem(sys.modules, name, None)  # its import fails
    ray_internals._warn.cache_clear()
    ray_internals._pause_class.cache_clear()


def test_without_them_a_run_goes_on(moved: None, caplog: pytest.LogCaptureFixture) -> None:
    context = SimpleNamespace()
    for _ in range(2):
        assert ray_internals.autoscaler_limits() == {}
        assert ray_internals.node_is_draining() is False
        ray_internals.rest_between_turns(context)
    assert not vars(context)
    assert len(caplog.records) == 3 and all("this version of Ray gives no" in r.getMessage() for r in caplog.records)


def test_with_them_each_does_what_it_says() -> None:
    ray_internals._pause_class.cache_clear()
    context = SimpleNamespace()
    ray_internals.rest_between_turns(context)
    (pause,) = context.custom_execution_callback_classes
    pause().on_execution_step(None)
    assert ray_internals.node_is_draining() is False, "not in a worker"


def test_nobody_else_imports_what_is_not_public() -> None:
    found = []
    for path in PACKAGE.rglob("*.py"):
        if path == Path(ray_internals.__file__):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [f"{path.name}: {n}" for n in names if n.startswith("ray.") and PRIVATE & set(n.split("."))]
    assert not found
