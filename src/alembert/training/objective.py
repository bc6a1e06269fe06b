"""What a stage minimises: named loss terms from the features of student and teacher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from alembert.losses.prediction import task_loss
from alembert.models.features import FeatureRequest, Features


class Objective(nn.Module, ABC):
    """Maps features to named loss terms; the loss is their sum, and every term is logged.

    An objective may own parameters (projections) and buffers (layer weights): they are trained, checkpointed and
    synchronised with the student.

    Attributes:
        student_arguments: further keyword arguments of the student's forward (`{"output_layer_logits": True}`).
        student_request: the features it reads of the student.
        teacher_request: the features it reads of a separate teacher; None = none is run, as in self-distillation,
            where both sides come from one pass.
    """

    student_arguments: ClassVar[Mapping[str, Any]] = {}
    student_request: FeatureRequest = FeatureRequest()
    teacher_request: FeatureRequest | None = None

    @abstractmethod
    def forward(
        self, student: Features, teacher: Features | None, labels: Tensor | None
    ) -> dict[str, Tensor]:
        """Returns scalar terms, already weighted."""

    def prepare(
        self, inputs: dict[str, Tensor], labels: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Inputs and labels as student and teacher see them: for objectives that mask tokens."""
        return inputs, labels

    def snapshot(self) -> dict[str, Any] | None:
        """JSON values to be logged beside the terms, such as the flow between layers; None = nothing."""
        return None


class TaskObjective(Objective):
    """Cross-entropy, binary cross-entropy or mean squared error of the full model against the labels."""

    def __init__(self, problem_type: str) -> None:
        super().__init__()
        self.problem_type = problem_type

    def forward(
        self, student: Features, teacher: Features | None, labels: Tensor | None
    ) -> dict[str, Tensor]:
        assert student.logits is not None
        assert labels is not None
        return {"task": task_loss(student.logits, labels, self.problem_type)}
