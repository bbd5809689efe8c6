"""What a configuration gives is of the kind that is asked for, or refused in one line, wherever it is used."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_type_hints

import pytest
import torch
from torch import Tensor, nn

from pipeline.config import CONF, usual_choice
from pipeline.data.sources.by_kind import SOURCES, make_source
from pipeline.errors import PipelineError
from pipeline.methods.base import Method
from pipeline.model import build_model
from pipeline.nets import build_backbone
from pipeline.nets.base import Backbone
from pipeline.nets.by_name import resolve
from pipeline.options import check_options, fits
from pipeline.training.optim import OPTIMIZERS, SCHEDULES, build_schedule, check_optimizer

MLP = {"name": "mlp", "widths": [4]}
SPEC = {"method": {"name": "prototypical"}, "backbone": MLP, "way": 5, "shot": 1, "classes": 5,
        "input": {"shape": [1, 4, 4], "scaling": "unit"}}  # fmt: skip
WRONG = ("off", "abc", [[None]], {"a": None}, 1.5, True, None)


def files(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def shipped() -> list[tuple[str, str, Any, dict[str, Any]]]:
    """(key, name, what is called, its options as they are shipped), of every file of the groups."""
    found: list[tuple[str, str, Any, dict[str, Any]]] = []
    tables = {"optimizer": OPTIMIZERS, "schedule": SCHEDULES}
    for group in ("method", "backbone", *tables):
        for stem in files(group):
            options = usual_choice(group, stem)
            name = options.pop("name")
            if group in tables:
                called = tables[group][name]
            elif group == "method":
                called = resolve("method", name, "pipeline.methods", Method)
            else:
                called = resolve("backbone", name, "pipeline.nets", Backbone)
            found.append((group, name, called, options))
    for stem in files("data"):
        options = usual_choice("data", stem).get("source", {})
        if (kind := options.pop("kind", None)) in SOURCES:
            found.append(("data.source", kind, SOURCES[kind], options))
    return found


def made(key: str, name: str, options: dict[str, Any]) -> None:
    if key == "method":
        backbone = {"name": "relation_encoder"} if name == "relation" else MLP
        shape = {"shape": [1, 28, 28], "scaling": "unit"}
        build_model({**SPEC, "method": {"name": name, **options}, "backbone": backbone, "input": shape})
    elif key == "backbone":
        build_backbone({"name": name, **options}, (1, 28, 28))
    elif key == "optimizer":
        check_optimizer(build_model(SPEC), {"name": name, **options})
    elif key == "schedule":
        build_schedule({"name": name, **options}, 100)
    else:
        make_source({"kind": name, **options})


@pytest.mark.parametrize(("key", "name", "called", "options"), shipped(), ids=lambda part: str(part)[:20])
def test_what_is_shipped_fits_and_what_is_of_another_kind_is_refused(key, name, called, options):
    own = {option: value for option, value in options.items() if option != "backbone_lr"}  # which torch does not take
    check_options(key, called, own)
    hints = get_type_hints(called.__init__ if inspect.isclass(called) else called)
    for option in own:
        assert option in hints, f"{option} has no annotation"
        for value in (wrong for wrong in WRONG if not fits(wrong, hints[option])):
            with pytest.raises(PipelineError) as caught:
                made(key, name, {**options, option: value})
            message = str(caught.value)
            assert message.startswith(f"{key}.{option}={value!r}: input should be "), message
            assert "\n" not in message


@pytest.mark.parametrize(
    ("key", "name", "options", "says"),
    [
        ("method", "maml", {"first_order": "no"}, "method.first_order='no': input should be a valid boolean"),
        ("method", "relation", {"transductive": "off"}, "method.transductive='off': input should be a valid boolean"),
        ("method", "maml", {"inner_steps": "abc"}, "method.inner_steps='abc': input should be a valid integer"),
        ("method", "maml", {"inner_steps": True}, "method.inner_steps=True: input should be a valid integer"),
        ("backbone", "conv4", {"strided": "no"}, "backbone.strided='no': input should be a valid boolean"),
        ("backbone", "conv4", {"width": "64"}, "a valid integer or a valid list, each entry a valid integer; this"),
        ("data.source", "folder", {"path": ".", "grows": "no"}, "data.source.grows='no': input should be a valid bool"),
        ("data.source", "folder", {"path": ".", "shape": 84}, "data.source.shape=84: input should be a valid list"),
        ("data.source", "folder", {"path": ".", "rotations": 90}, "data.source.rotations=90: input should be a valid"),
        ("data.source", "folder", {"path": ".", "fractions": 0.5}, "data.source.fractions=0.5: input should be a"),
        ("data.source", "glyphs", {"classes": "many"}, "data.source.classes='many': input should be a valid integer"),
        ("optimizer", "adam", {"lr": "1e-3"}, "optimizer.lr='1e-3': input should be a valid number; this is text"),
        ("optimizer", "adam", {"lr": None}, "optimizer.lr=None: input should be a valid number"),
        ("optimizer", "adam", {}, "key 'optimizer.lr' is missing"),
        ("optimizer", "adam", {"lr": 1, "betas": [0.9]}, "optimizer.betas=[0.9]: input should be a valid list of 2"),
        ("schedule", "step", {"every": 0, "factor": 0.5}, "schedule.every=0: there is at least one step"),
        ("schedule", "step", {"every": 5, "factor": "abc"}, "schedule.factor='abc': input should be a valid number"),
        ("schedule", "step", {"every": 1, "factor": 1e200}, "schedule=step: "),
        ("schedule", "linear", {"final": float("nan")}, "schedule=linear: its factor is not finite"),
    ],
)  # fmt: skip
def test_refusals_are_one_line(key, name, options, says):
    with pytest.raises(PipelineError) as caught:
        made(key, name, options)
    assert says in str(caught.value) and "\n" not in str(caught.value)


class Own(Method):
    def __init__(self, backbone: nn.Module, unknown, depth: int = None, how: Literal["a"] = "a", late: bool = True):
        super().__init__(backbone)
        self.late = late


class Unreadable(Method):
    def __init__(self, backbone: nn.Module, flag: NotImported = False) -> None:  # type: ignore[name-defined] # noqa: F821
        super().__init__(backbone)


def test_a_method_of_ones_own_is_checked_where_it_is_annotated(monkeypatch):
    monkeypatch.setitem(sys.modules, "own_methods", sys.modules[__name__])

    def build(name: str, **options: Any) -> Method:
        return build_model({**SPEC, "method": {"name": f"own_methods.{name}", **options}})

    build("Own", unknown="off", depth="deep", how="b", late=False)
    assert not build("Own", unknown=1, late=0).late
    build("Unreadable", flag="off")
    with pytest.raises(PipelineError, match=r"^method.late='off': input should be a valid boolean$"):
        build("Own", unknown=1, late="off")


def test_options_of_a_network_of_ones_own_are_named_where_they_stand(tmp_path):
    (tmp_path / "own.py").write_text(
        "from torch import nn\n\n\nclass Net(nn.Sequential):\n    def __init__(self, width: int = 3) -> None:\n"
        "        super().__init__(nn.Flatten(), nn.LazyLinear(width))\n"
    )
    spec = {"name": "module", "path": str(tmp_path / "own.py")}
    assert build_backbone({**spec, "options": {"width": 5}}, (1, 4, 4)).out_features == 5
    with pytest.raises(PipelineError, match=r"^backbone.options.width='5': input should be a valid integer"):
        build_backbone({**spec, "options": {"width": "5"}}, (1, 4, 4))


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        (bool, [True, 0, 1], ["off", 2, 1.0, None]),
        (int, [3, -1], [True, 3.0, "3", None]),
        (float, [3, 0.5, float("inf")], [False, "0.5", None]),
        (str, ["a", ""], [1, None, ["a"]]),
        (float | None, [None, 1], ["1"]),
        (float | Tensor, [1.0], ["1", None]),
        (str | int, ["all", 2], [True, None, 1.5]),
        (Sequence[int], [[1], (), (1, 2)], ["12", 1, [1.5], [True], {1: 2}]),
        (Sequence[Sequence[int]], [[[1, 2]], []], [[1], [["a"]]]),
        (tuple[float, float], [[0, 1]], [[0], [0, 1, 2], ["a", 1]]),
        (tuple[int, ...], [[], [1, 2]], [["a"]]),
        (list, [["a", 1]], ["a"]),
        (Mapping[str, float], [{"a": 1}, {}], [{"a": "b"}, {1: 1}, [1]]),
        (dict[str, Any], [{"a": [1]}], [[], "a"]),
        (Any, [1, "a", None], []),
        (torch.dtype, ["float16"], []),
    ],
)
def test_kinds(kind, right, wrong):
    assert all(fits(value, kind) for value in right)
    assert not any(fits(value, kind) for value in wrong)
