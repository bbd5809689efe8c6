"""What a registered model carries: only the light part, only pinned requirements, and the user's own modules."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.registry.package import LIGHT, LIGHT_DATA, REQUIREMENTS, pinned, stage_code
from tests.registry.conftest import SPEC

HEAVY = ("ray", "mlflow", "hydra", "omegaconf", "pyarrow", "pandas", "pydantic", "matplotlib")


def test_staged_code_needs_nothing_heavy(tmp_path: Path) -> None:
    (package,), requirements = stage_code(SPEC, tmp_path / "code")
    assert requirements == []
    top = {path.name for path in package.iterdir()}
    data = {str(path.relative_to(package / "data")) for path in (package / "data").rglob("*.py")}
    assert top == {*LIGHT, "data"} and data == set(LIGHT_DATA)
    assert not [path for path in package.rglob("*") if path.is_file() and path.suffix != ".py"]
    program = f"""
import importlib, pkgutil, sys
class Refuse:
    def find_spec(self, name, *_):
        if name.split('.')[0] in {HEAVY}: raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import pipeline
for module in pkgutil.walk_packages(pipeline.__path__, 'pipeline.'):
    importlib.import_module(module.name)
assert pipeline.__file__.startswith({str(tmp_path)!r}), pipeline.__file__
print(len([name for name in sys.modules if name.startswith('pipeline')]))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path / "code", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


def test_requirements_are_pinned_to_what_an_index_has() -> None:
    lines = pinned(REQUIREMENTS)
    assert [line.split("==")[0] for line in lines] == list(REQUIREMENTS)
    assert not [line for line in lines if "+" in line]


def test_the_users_own_module_travels_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own" / "mine").mkdir(parents=True)
    (tmp_path / "own" / "mine" / "__init__.py").write_text("")
    (tmp_path / "own" / "mine" / "nets.py").write_text("x = 1")
    (tmp_path / "own" / "single.py").write_text("y = 2")
    monkeypatch.syspath_prepend(str(tmp_path / "own"))
    spec = {**SPEC, "method": {"name": "single.Method"}, "backbone": {"name": "mine.nets.Net"}}
    code, requirements = stage_code(spec, tmp_path / "code")
    assert sorted(path.name for path in code) == ["mine", "pipeline", "single.py"] and requirements == []
    assert (tmp_path / "code" / "mine" / "nets.py").read_text() == "x = 1"
    installed = {**SPEC, "backbone": {"name": "safetensors.torch.Net"}}
    code, requirements = stage_code(installed, tmp_path / "other")
    assert [path.name for path in code] == ["pipeline"] and requirements == pinned(["safetensors"])
