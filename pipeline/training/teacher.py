"""The trained model that another one learns to answer like."""

from __future__ import annotations

from typing import Any

from pipeline.errors import PipelineError
from pipeline.methods.base import Method
from pipeline.model import build_model
from pipeline.training.checkpoint import load_checkpoint


def load_teacher(spec: dict[str, Any], fingerprint: str | None = None) -> Method:
    """The model of the checkpoint ``spec["method"]["teacher"]``, in evaluation mode, its weights fixed.

    Args:
        spec: of the model that is taught.
        fingerprint: of the dataset that it is taught on; None: known to be the teacher's.

    Raises:
        PipelineError: it was trained on other images, or sees them otherwise.
    """
    uri = spec["method"]["teacher"]
    checkpoint = load_checkpoint(uri)
    refused = f"method.teacher={uri}: it cannot teach this model, since it was trained "
    if fingerprint not in (None, checkpoint.dataset["fingerprint"]):
        raise PipelineError(f"{refused}on another dataset, {checkpoint.dataset['name']!r}")
    if checkpoint.spec["classes"] != spec["classes"]:
        raise PipelineError(f"{refused}on {checkpoint.spec['classes']} classes, not on {spec['classes']}")
    if checkpoint.spec["input"] != spec["input"]:
        raise PipelineError(f"{refused}on images that are prepared otherwise: give both the same input.scaling")
    teacher = build_model(checkpoint.spec)
    teacher.load_state_dict(checkpoint.model)
    return teacher.eval().requires_grad_(False)
