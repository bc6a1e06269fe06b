"""What a stage minimises: named loss terms from the outputs of student and teacher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn

from alembert.losses.prediction import task_loss


class Objective(nn.Module, ABC):
    """Maps model outputs to named loss terms; the loss is their sum, and every term is logged.

    Class attributes say which features it needs: `student_features` and `teacher_features` are keyword
    arguments of the models' forward (`{"output_layer_logits": True}`); `teacher_features` None means that no
    separate teacher is run, as in self-distillation, where both sides come from one pass.
    """

    student_features: ClassVar[dict[str, Any]] = {}
    teacher_features: ClassVar[dict[str, Any] | None] = None
    needs_labels: ClassVar[bool] = False

    @abstractmethod
    def forward(self, student: Any, teacher: Any | None, labels: Tensor | None) -> dict[str, Tensor]:
        """Returns scalar terms, already weighted; `student` and `teacher` are the models' outputs."""


class TaskObjective(Objective):
    """Cross-entropy, binary cross-entropy or mean squared error of the full model against the labels."""

    needs_labels = True

    def __init__(self, problem_type: str) -> None:
        super().__init__()
        self.problem_type = problem_type

    def forward(self, student: Any, teacher: Any | None, labels: Tensor | None) -> dict[str, Tensor]:
        assert labels is not None
        return {"task": task_loss(student.logits, labels, self.problem_type)}
