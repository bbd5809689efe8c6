"""Backbones and their blocks. ``build_backbone`` makes one from a configuration."""

from __future__ import annotations

from pipeline.nets.base import Backbone, build_backbone
from pipeline.nets.preprocess import Preprocess

__all__ = ["Backbone", "Preprocess", "build_backbone"]
