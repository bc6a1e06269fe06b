"""Tasks: labelled texts read, checked, tokenised and scored."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

# Imported on first use: reading texts needs none of the libraries that tasks need.
_HOMES = {
    "PRESETS": "presets",
    "Task": "task",
    "bootstrap_interval": "metrics",
    "compute_metrics": "metrics",
    "expected_calibration_error": "metrics",
    "iterate_texts": "texts",
    "load_task": "task",
    "majority_score": "metrics",
    "tokenise": "tokenisation",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'alembert.data' has no attribute {name!r}")
    return getattr(import_module(f"alembert.data.{_HOMES[name]}"), name)
