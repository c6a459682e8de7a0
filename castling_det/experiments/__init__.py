"""Whole experiments: chains of commands that go on where they stopped."""

from castling_det.experiments.comparison import Comparison, comparison_steps
from castling_det.experiments.steps import Step, StepFailed, mmdet_tool, run_steps
from castling_det.experiments.study import Study, Variant, study_steps
from castling_det.experiments.uptraining import Uptraining, uptraining_steps

__all__ = [
    "Comparison",
    "Step",
    "StepFailed",
    "Study",
    "Uptraining",
    "Variant",
    "comparison_steps",
    "mmdet_tool",
    "run_steps",
    "study_steps",
    "uptraining_steps",
]
