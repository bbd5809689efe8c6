"""What a run ran on, as plain values."""

import os
import platform
import subprocess
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

import pipeline


def describe_environment() -> dict[str, Any]:
    """Python, platform, devices, code version and every installed package with its version."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.machine(),
        "torch": str(torch.__version__),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "code": code_version(),
        "packages": installed_packages(),
    }


def machine() -> dict[str, Any]:
    """What a measurement depends on, without naming the machine: ``vectors`` are the widest instructions that PyTorch
    uses of the processor's."""
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "processor": _processor(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": bfloat16_instructions(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }


def bfloat16_instructions() -> str | None:
    """The processor's instructions that multiply in bfloat16, "amx_bf16" or "avx512_bf16"; None without, or where
    PyTorch cannot tell (before 2.13)."""
    told: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return next((name for name in ("amx_bf16", "avx512_bf16") if told.get(name)), None)


def installed_packages() -> list[str]:
    """``name==version`` of every distribution, sorted."""
    return sorted({f"{d.metadata['Name']}=={d.version}" for d in distributions() if d.metadata["Name"]}, key=str.lower)


def code_version() -> str:
    """The package's version and, in a git checkout, the commit, marked when files differ from it."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    if commit is None:
        return pipeline.__version__
    changed = "-changed" if _git("status", "--porcelain", "--untracked-files=no") else ""
    return f"{pipeline.__version__}+{commit}{changed}"


def _git(*arguments: str) -> str | None:
    folder = Path(pipeline.__file__).resolve().parent.parent
    if not (folder / ".git").exists():  # an installed package: a repository further up is somebody else's
        return None
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        return names[0] if names else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()
