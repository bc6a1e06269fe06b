"""DeeBERT (Xin et al., ACL 2020): exits on a frozen backbone learn from the labels."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from alembert.data.task import Task
from alembert.losses.prediction import task_loss
from alembert.methods.base import Preset
from alembert.methods.self_distillation import (
    PlacementOptions,
    SelfDistillation,
    labels_as_logits,
    learned_exit_term,
)
from alembert.models.features import Features
from alembert.models.multi_exit import MultiExitModel, MultiExitOutput
from alembert.training.objective import Objective


class DeeBertOptions(PlacementOptions):
    """Options of DeeBERT beyond those of every method with exits.

    Attributes:
        exit_head: `pooled` as printed: a pooler of its own and a linear classifier.
    """

    exit_head: Literal["fastbert", "pooled", "linear", "mean"] = "pooled"


class DeeBertObjective(Objective):
    """Σ_j L_j over the exits, the full model's left out, for it is frozen (DeeBERT, section 3.2)."""

    def __init__(self, exits: tuple[int, ...], problem_type: str) -> None:
        super().__init__()
        self.exits, self.problem_type = exits, problem_type

    def forward(
        self, student: Features, teacher: Features | None, labels: Tensor | None
    ) -> dict[str, Tensor]:
        output: MultiExitOutput = student.output
        assert labels is not None and output.exit_logits is not None and output.logits is not None
        terms = {
            f"exit_{layer}": task_loss(logits, labels, self.problem_type)
            for layer, logits in zip(self.exits, output.exit_logits, strict=True)
        }
        answers = labels_as_logits(labels, output.logits, self.problem_type)
        return terms | learned_exit_term(output, answers, self.problem_type)


class DeeBert(SelfDistillation[DeeBertOptions]):
    """Frozen backbone, an exit with a pooler of its own after every layer, gold labels."""

    name = "deebert"
    paper = "Xin et al., DeeBERT: Dynamic Early Exiting for Accelerating BERT Inference, ACL 2020"
    options_class = DeeBertOptions
    presets: ClassVar[dict[str, Preset]] = {
        "default": Preset(settings={"epochs": 5, "learning_rate": 1e-3}),
        "paper": Preset(
            options={"placement": "all"},
            settings={"epochs": 3, "learning_rate": 2e-5, "batch_size": 8},
        ),
    }

    def objective(self, model: MultiExitModel, task: Task) -> DeeBertObjective:
        return DeeBertObjective(model.exit_layers, task.problem_type)
