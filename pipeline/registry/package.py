"""A classifier as an MLflow model folder: weights, the light part of the package, signature, pinned requirements."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import AnyType, Array

import pipeline
from pipeline.errors import PipelineError
from pipeline.files import write_atomic
from pipeline.inference import FewShotClassifier
from pipeline.nets.own_code import FOLDER, digest_of, outside
from pipeline.weights import own_sources

ROOT = Path(pipeline.__file__).resolve().parent
LIGHT = (
    "__init__.py", "errors.py", "files.py", "options.py", "batch.py", "model.py",
    "nets", "functional", "methods", "inference",
)  # fmt: skip
LIGHT_DATA = (  # what reads image files as an ingest does
    "__init__.py", "images.py", "png.py", "archives.py",
    "sources/__init__.py", "sources/base.py", "sources/files.py", "sources/tree.py",
)  # fmt: skip
REQUIREMENTS = ("mlflow", "torch", "numpy", "pandas", "safetensors", "pillow", "pyspng")
LIBRARIES = {"timm": "timm", "huggingface": "transformers"}  # of backbones
ARTIFACT = "classifier"


def save_model(classifier: FewShotClassifier, folder: str | Path, model: Model) -> None:
    """Write the MLflow model to ``folder``, which must not be there; ``model`` carries the run's and model's ids."""
    with tempfile.TemporaryDirectory() as staging:
        stage = Path(staging)
        classifier.save(stage / ARTIFACT)
        code, requirements = stage_code(classifier.spec, stage / "code")
        if len(code) > 1:
            _try_elsewhere(stage)
        shutil.copy(ROOT / "registry" / "served.py", stage / "served.py")
        mlflow.pyfunc.save_model(
            str(folder),
            python_model=str(stage / "served.py"),
            artifacts={ARTIFACT: str(stage / ARTIFACT)},
            code_paths=[str(path) for path in code],
            signature=signature(),
            input_example=(example(classifier), {"threshold": "auto", "top_k": 1}),
            pip_requirements=[*pinned(REQUIREMENTS), *requirements],
            mlflow_model=model,
        )


def stage_code(spec: dict[str, Any], folder: Path) -> tuple[list[Path], list[str]]:
    """Copy what the model needs to run: the light part of this package, and the user's own modules.

    Returns:
        Paths for ``code_paths``, and pinned requirements of the user's modules that are installed distributions.
    """
    package = folder / "pipeline"
    package.mkdir(parents=True)
    for name in LIGHT:
        _copy(ROOT / name, package / name)
    for name in LIGHT_DATA:
        _copy(ROOT / "data" / name, package / "data" / name)
    code, library = [package], LIBRARIES.get(spec["backbone"].get("name", ""))
    requirements = pinned([library]) if library else []
    sources = own_sources(spec)
    if sources is not None:
        own = folder / FOLDER
        write_atomic(own / digest_of(sources) / "sources.json", json.dumps(dict(sources)).encode())
        code.append(own)
        for name in sorted(outside(sources)):
            distributions = packages_distributions().get(name, [])  # none: what is not needed, or the trial tells
            requirements += pinned([d for d in dict.fromkeys(distributions) if d not in REQUIREMENTS])
    named = {str(spec[part].get("name", "")) for part in ("method", "backbone")}  # or import paths of the user's own
    for module in sorted({name.split(".")[0] for name in named if "." in name} - {"pipeline"}):
        origin = _origin(module)
        if origin.is_relative_to(sysconfig.get_path("purelib")):
            requirements += pinned(packages_distributions().get(module, [module]))
        else:
            _copy(origin, folder / origin.name)
            code.append(folder / origin.name)
    return code, requirements


def _try_elsewhere(stage: Path) -> None:
    """Refuse a model that another process cannot load which has neither this folder nor this environment's paths."""
    program = (
        f"import sys; sys.path.insert(0, {str(stage / 'code')!r}); from pipeline.inference import FewShotClassifier; "
        f"FewShotClassifier.load({str(stage / ARTIFACT)!r})"
    )
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    clean |= {"XDG_CACHE_HOME": str(stage / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program], cwd=stage, env=clean, capture_output=True, text=True)
    if done.returncode:
        why = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no reason")
        raise PipelineError(f"the model cannot be loaded where only its code and requirements are: {why}")


def signature() -> ModelSignature:
    """Of ``predict``: its parameters, and one row a query.

    Inputs are not declared: MLflow would cast fractions to pixels, and take neither files beside arrays nor names.
    ``predict`` checks them itself, and says what is wrong.
    """
    outputs = Schema(
        [
            ColSpec(AnyType(), "label"),  # a number or a name, as it was enrolled
            ColSpec("double", "probability"),
            ColSpec("double", "score"),
            ColSpec("boolean", "known"),
            ColSpec(AnyType(), "top_labels"),
            ColSpec(Array("double"), "top_probabilities"),
        ]
    )
    params = ParamSchema(
        [
            ParamSpec("threshold", "string", "auto"),
            ParamSpec("unknown_pass", "string", "auto"),
            ParamSpec("enrolment", "string", ""),
            ParamSpec("top_k", "long", 1),
            ParamSpec("invert", "boolean", False),
        ]
    )
    return ModelSignature(outputs=outputs, params=params)


def example(classifier: FewShotClassifier) -> dict[str, np.ndarray]:
    """A support set and two queries of random pixels: real images may be of people, and an example is public."""
    way = classifier.method.fixed_way or 5
    rng = np.random.default_rng(0)
    support = rng.integers(0, 256, (way, *classifier.shape), dtype=np.uint8)
    labels = np.arange(way, dtype=np.int64)
    return {"support_images": support, "support_labels": labels, "query_images": support[:2].copy()}


def pinned(names: list[str] | tuple[str, ...]) -> list[str]:
    """``name==installed version``, without a local build's suffix (torch 2.x+cpu), which no index knows."""
    return [f"{name}=={version(name).split('+')[0]}" for name in names]


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=lambda _, names: [n for n in names if n == "__pycache__"])
    else:
        shutil.copy(source, target)


def _origin(module: str) -> Path:
    found = importlib.util.find_spec(module)
    if found is None or (found.origin is None and not found.submodule_search_locations):
        raise PipelineError(f"module {module!r}, which the model's method or backbone is from, cannot be found")
    if found.submodule_search_locations:
        return Path(next(iter(found.submodule_search_locations))).resolve()
    return Path(str(found.origin)).resolve()
