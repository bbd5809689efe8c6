"""A trained few-shot model in use: enrol, classify, extend, and say 'unknown'.

Needs torch, numpy, safetensors and Pillow only, so that a registered model carries this package alone.
"""

from pipeline.inference.answers import Answers
from pipeline.inference.calibrating import calibrate, class_images
from pipeline.inference.calibration import Calibration, CalibrationPoint
from pipeline.inference.classifier import FewShotClassifier
from pipeline.inference.enrolment import Enrolment, Label

__all__ = [
    "Answers",
    "Calibration",
    "CalibrationPoint",
    "Enrolment",
    "FewShotClassifier",
    "Label",
    "calibrate",
    "class_images",
]
