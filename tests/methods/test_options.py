"""An option stands in the constructor, its docstring and the YAML, and is the same in all three."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import yaml

from pipeline.config import CONF
from pipeline.errors import PipelineError
from pipeline.methods.base import Method
from pipeline.nets.base import Backbone
from pipeline.nets.by_name import resolve

GIVEN = {"self", "backbone", "way", "shot", "classes", "shape"}  # by the run and its data
FILES = [*sorted((CONF / "method").glob("*.yaml")), *sorted((CONF / "backbone").glob("*.yaml"))]


def plain(value: object) -> object:
    """With lists for tuples."""
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("path", [pytest.param(path, id=f"{path.parent.name}-{path.stem}") for path in FILES])
def test_yaml_constructor_and_docstring_agree(path: Path):
    text = path.read_text()
    options = yaml.safe_load(text)
    name, kind = options.pop("name"), path.parent.name
    cls = resolve(kind, name, *{"method": ("pipeline.methods", Method), "backbone": ("pipeline.nets", Backbone)}[kind])
    parameters = {n: p for n, p in inspect.signature(cls).parameters.items() if n not in GIVEN}
    assert list(options) == list(parameters), "the same options in the same order"
    if path.stem == name:  # a file of another name is a variant of its own, as MAML's strided conv4
        assert {n: plain(p.default) for n, p in parameters.items()} == options
    described = " ".join(re.findall(r"^ {8}(\w[\w, ]*):", cls.__doc__ or "", re.MULTILINE)).replace(",", " ").split()
    assert set(parameters) <= set(described), "every option is in the docstring's Args"
    lines = {key: next(line for line in text.splitlines() if line.startswith(f"{key}:")) for key in options}
    assert [key for key, line in lines.items() if not re.search(r" # \S", line)] == [], "every option has a comment"


def test_every_method_and_backbone_has_a_file():
    for kind, folder in (("method", "methods"), ("backbone", "nets")):
        known = {yaml.safe_load(path.read_text())["name"] for path in (CONF / kind).glob("*.yaml")}
        package, base = f"pipeline.{folder}", Method if kind == "method" else Backbone
        for path in (CONF.parent / folder).glob("[a-z]*.py"):
            try:
                resolve(kind, path.stem, package, base)
            except PipelineError:
                assert path.stem not in known
            else:
                assert path.stem in known
