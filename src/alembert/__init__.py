"""Alembert makes BERT-type text classifiers many times cheaper to run, and proves what it cost in accuracy.

With it imported, transformers' Auto classes know multi-exit models and BiLSTM students, whichever of the two was
imported first. Nothing else is imported before it is used: an exported model runs without torch and transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from alembert.common.errors import InputError
from alembert.registration import register_with_transformers

if TYPE_CHECKING:
    from alembert.benchmarks.evaluation import evaluate
    from alembert.data import Task, load_task
    from alembert.methods.distillation import distill
    from alembert.models.bilstm import BilstmConfig, BilstmForSequenceClassification
    from alembert.models.multi_exit import MultiExitConfig, MultiExitModel
    from alembert.runtime.adaptive import AdaptiveClassifier, Prediction
    from alembert.runtime.policies import ExitPolicy
    from alembert.training.finetuning import finetune
    from alembert.training.settings import TrainingSettings

    __version__: str

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

_HOMES = {
    "AdaptiveClassifier": "alembert.runtime.adaptive",
    "BilstmConfig": "alembert.models.bilstm",
    "BilstmForSequenceClassification": "alembert.models.bilstm",
    "ExitPolicy": "alembert.runtime.policies",
    "MultiExitConfig": "alembert.models.multi_exit",
    "MultiExitModel": "alembert.models.multi_exit",
    "Prediction": "alembert.runtime.adaptive",
    "Task": "alembert.data",
    "TrainingSettings": "alembert.training.settings",
    "distill": "alembert.methods.distillation",
    "evaluate": "alembert.benchmarks.evaluation",
    "finetune": "alembert.training.finetuning",
    "load_task": "alembert.data",
}
_DISTRIBUTIONS = ("alembert", "alembert-runtime")


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module 'alembert' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    for name in _DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise AttributeError("Alembert is not installed, so it has no version")


register_with_transformers()
