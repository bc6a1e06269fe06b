"""Alembert makes BERT-type text classifiers many times cheaper to run, and proves what it cost in accuracy.

Importing it registers multi-exit models with transformers' Auto classes.
"""

from importlib.metadata import version

from alembert.benchmarks.evaluation import evaluate
from alembert.common.errors import InputError
from alembert.data import Task, load_task
from alembert.methods.distillation import distill
from alembert.models.multi_exit import MultiExitConfig, MultiExitModel
from alembert.runtime.adaptive import AdaptiveClassifier, Prediction
from alembert.runtime.policies import ExitPolicy
from alembert.training.finetuning import finetune
from alembert.training.settings import TrainingSettings

__version__ = version("alembert")

__all__ = [
    "AdaptiveClassifier",
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
