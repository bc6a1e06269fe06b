"""Alembert makes BERT-type text classifiers many times cheaper to run, and proves what it cost in accuracy.

Importing it registers multi-exit models and BiLSTM students with transformers' Auto classes.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from alembert.common.errors import InputError
from alembert.models.bilstm import BilstmConfig, BilstmForSequenceClassification
from alembert.models.multi_exit import MultiExitConfig, MultiExitModel

if TYPE_CHECKING:
    from alembert.benchmarks.evaluation import evaluate
    from alembert.data import Task, load_task
    from alembert.methods.distillation import distill
    from alembert.runtime.adaptive import AdaptiveClassifier, Prediction
    from alembert.runtime.policies import ExitPolicy
    from alembert.training.finetuning import finetune
    from alembert.training.settings import TrainingSettings

__version__ = version("alembert")

__all__ = [
    "AdaptiveClassifier",
    "BilstmConfig",
    "BilstmForSequenceClassification",
    "ExitPolicy",
    "InputError",
    "MultiExitConfig",
    "MultiExitModel",
    "Prediction",
    "Task",
    "TrainingSettings",
    "distill",
    "evaluate",
    "finetune",
    "load_task",
]

# Imported on first use: training and evaluation pull in libraries that a command's help does not need.
_HOMES = {
    "AdaptiveClassifier": "alembert.runtime.adaptive",
    "ExitPolicy": "alembert.runtime.policies",
    "Prediction": "alembert.runtime.adaptive",
    "Task": "alembert.data",
    "TrainingSettings": "alembert.training.settings",
    "distill": "alembert.methods.distillation",
    "evaluate": "alembert.benchmarks.evaluation",
    "finetune": "alembert.training.finetuning",
    "load_task": "alembert.data",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'alembert' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
