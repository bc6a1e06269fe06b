"""The last stage of most methods: the student's answers against the teacher's and the labels'."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional

from alembert.losses.prediction import distillation_divergence, soft_cross_entropy, task_loss
from alembert.models.features import FeatureRequest, Features
from alembert.training.objective import Objective

SoftLoss = Literal["divergence", "cross_entropy", "logits_mse"]


class PredictionObjective(Objective):
    """w_soft · L_soft(student, teacher) + w_hard · L_hard(student, labels).

    Args:
        problem_type: transformers' problem type.
        soft_weight, hard_weight: of the two terms; a term of weight 0 is not computed.
        temperature: T of the soft term, which is multiplied by T².
        soft_loss: `divergence` is KL(teacher ‖ student); `cross_entropy` has the same gradient and the teacher's
            entropy on top; `logits_mse` compares the logits themselves and knows no temperature.
        regression_target: what a regression's soft term compares with.
    """

    def __init__(
        self,
        problem_type: str,
        *,
        soft_weight: float = 1.0,
        hard_weight: float = 0.0,
        temperature: float = 1.0,
        soft_loss: SoftLoss = "divergence",
        regression_target: Literal["teacher", "labels"] = "teacher",
    ) -> None:
        super().__init__()
        self.problem_type = problem_type
        self.soft_weight, self.hard_weight, self.temperature = soft_weight, hard_weight, temperature
        self.soft_loss: SoftLoss = soft_loss
        if problem_type == "regression" and regression_target == "labels":
            self.soft_weight, self.hard_weight = 0.0, soft_weight + hard_weight
        if self.soft_weight:
            self.teacher_request = FeatureRequest()

    def forward(
        self, student: Features, teacher: Features | None, labels: Tensor | None
    ) -> dict[str, Tensor]:
        assert student.logits is not None
        terms = {}
        if self.soft_weight:
            assert teacher is not None
            assert teacher.logits is not None
            terms["soft"] = self.soft_weight * self._soft(student.logits, teacher.logits)
        if self.hard_weight:
            assert labels is not None
            terms["hard"] = self.hard_weight * task_loss(student.logits, labels, self.problem_type)
        return terms

    def _soft(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.soft_loss == "logits_mse":
            return functional.mse_loss(student.float(), teacher.float())
        if self.soft_loss == "cross_entropy":
            return soft_cross_entropy(student, teacher, self.problem_type, temperature=self.temperature)
        return distillation_divergence(
            student,
            teacher,
            self.problem_type,
            direction="teacher||student",
            temperature=self.temperature,
        )
