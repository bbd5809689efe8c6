"""The project's reports on itself (docs/studies), which a checkout has and an installed package has not."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.errors import PipelineError

CHECKOUT = Path(__file__).resolve().parents[1]


def study(module: str, function: str) -> Callable[[Config], dict[str, Any]]:
    """``docs.studies.MODULE.FUNCTION``, imported when it is called, here and in the processes that it starts."""

    def call(raw: Config) -> dict[str, Any]:
        if not (CHECKOUT / "docs" / "studies").is_dir():
            raise PipelineError(
                "this measures the project itself and is no part of the installed package: run it in a checkout of "
                "the repository"
            )
        sys.path.insert(0, str(CHECKOUT))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
        found: Callable[[Config], dict[str, Any]] = getattr(
            importlib.import_module(f"docs.studies.{module}"), function
        )
        return found(raw)

    return call
