"""Backbones and their blocks. ``build_backbone`` makes one from a configuration."""

from pipeline.nets.base import Backbone, build_backbone
from pipeline.nets.preprocess import Preprocess

__all__ = ["Backbone", "Preprocess", "build_backbone"]
