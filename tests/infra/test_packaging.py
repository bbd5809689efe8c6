"""The package, its pins and its image say the same."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS: dict[str, Version] = {
    canonicalize_name(line.split("==")[0]): Version(line.split("==")[1])
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
}


def wanted() -> list[Requirement]:
    return [Requirement(text) for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]]


def test_every_requirement_is_pinned_within_its_range() -> None:
    for requirement in wanted():
        assert PINS[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_what_the_requirements_require_is_pinned_too() -> None:
    """Follow the installed packages' own requirements: none may be left to the day of the installation."""
    seen: set[str] = set()
    todo = [(canonicalize_name(r.name), frozenset(r.extras)) for r in wanted()]
    while todo:
        name, extras = todo.pop()
        assert name in PINS, f"{name} is installed but not pinned in constraints.txt"
        key = f"{name}{sorted(extras)}"
        if key in seen:
            continue
        seen.add(key)
        for text in requires(name) or []:
            requirement = Requirement(text)
            if applies(requirement, extras) and not is_cuda(requirement.name):
                todo.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))


def applies(requirement: Requirement, extras: frozenset[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in extras | {""})


def imported() -> set[str]:
    """Top-level names that the package and its jobs import."""
    names: set[str] = set()
    for folder in ("pipeline", "jobs"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import):
                    names |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                    names.add(node.module.split(".")[0])
    return names


def test_what_is_imported_is_required() -> None:
    providers = packages_distributions()
    outside = imported() - set(sys.stdlib_module_names) - {"pipeline", "jobs"}
    extras = PROJECT["optional-dependencies"]  # of what only some need
    texts = [*PROJECT["dependencies"], *extras["timm"], *extras["huggingface"], *extras["onnx"]]
    required = {canonicalize_name(Requirement(text).name) for text in texts}
    missing = {
        name for name in outside if not {canonicalize_name(found) for found in providers.get(name, [name])} & required
    }
    assert not missing, f"imported, but not among the dependencies of pyproject.toml: {sorted(missing)}"


def is_cuda(name: str) -> bool:
    """Torch's default Linux wheel pins its CUDA libraries itself; its CPU wheel has none."""
    return name.startswith(("nvidia-", "cuda-")) or name in {"triton", "cuda-bindings"}


def test_the_pins_are_what_runs_here() -> None:
    for name in ("ray", "torch", "mlflow", "hydra-core", "pyarrow", "numpy"):
        assert Version(Version(version(name)).public) == PINS[name]


def test_pins_name_versions_only() -> None:
    text = (ROOT / "constraints.txt").read_text()
    assert not re.search(r"@|://|\+|^-", re.sub(r"^#.*$", "", text, flags=re.M), flags=re.M)


def test_the_image_has_a_python_that_the_package_allows() -> None:
    lines = (ROOT / "infra" / "Dockerfile").read_text().splitlines()
    python = next(line for line in lines if line.startswith("ARG PYTHON=")).split("=")[1]
    assert Version(python) in SpecifierSet(PROJECT["requires-python"])


def test_a_wheel_carries_every_module_and_configuration(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pipeline", "jobs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(source)], check=True, capture_output=True)
    carried = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    kept = {".py", ".yaml", ".json"}
    present = {str(file.relative_to(ROOT)) for name in ("pipeline", "jobs") for file in (ROOT / name).rglob("*.*")}
    assert {file for file in present if Path(file).suffix in kept} <= carried


def test_make_lists_its_targets() -> None:
    shown = subprocess.run(["make", "-C", str(ROOT)], text=True, capture_output=True, check=True).stdout
    assert {"install", "train", "test", "test-all", "lint", "clean"} <= set(re.findall(r"make (\S+)", shown))
