"""Tasks: labelled texts read, checked, tokenised and scored."""

from alembert.data.metrics import (
    bootstrap_interval,
    compute_metrics,
    expected_calibration_error,
    majority_score,
)
from alembert.data.presets import PRESETS
from alembert.data.task import Task, load_task
from alembert.data.texts import iterate_texts
from alembert.data.tokenisation import tokenise

__all__ = [
    "PRESETS",
    "Task",
    "bootstrap_interval",
    "compute_metrics",
    "expected_calibration_error",
    "iterate_texts",
    "load_task",
    "majority_score",
    "tokenise",
]
