"""Student and objective as one module, so that one optimiser, checkpoint and gradient exchange serve both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alembert.models.capture import capture
from alembert.models.features import Features
from alembert.models.multi_exit import MultiExitModel
from alembert.training.attention_kernel import attention_for_learning
from alembert.training.objective import Objective
from alembert.training.teachers import Teacher


def encoder_parameters(student: PreTrainedModel) -> list[nn.Parameter]:
    """Those of a student without its heads; all of one that is not made of the two, as a BiLSTM."""
    full_model = student.full_model if isinstance(student, MultiExitModel) else student
    return list(full_model.base_model.parameters())


class StageModel(nn.Module):
    """What the trainer trains in a stage.

    In training mode a batch gives the objective's terms; in evaluation mode the student's logits, without the
    teacher being run. The teacher is no submodule: it is neither trained nor saved.

    Args:
        student: the model that learns.
        objective: of the stage.
        teacher: gives the features that the objective reads; None = none.
        perturbation: see `Stage`.
    """

    # transformers' Trainer asks for it when a checkpoint's weights are loaded.
    _keys_to_ignore_on_save = None

    def __init__(
        self,
        student: PreTrainedModel,
        objective: Objective,
        teacher: Teacher | None = None,
        perturbation: float | None = None,
    ) -> None:
        super().__init__()
        self.student, self.objective, self.perturbation = student, objective, perturbation
        self._teacher = (teacher,)

    def forward(
        self, labels: Tensor | None = None, row: Tensor | None = None, **inputs: Tensor
    ) -> dict[str, Any]:
        """`{"terms": {name: scalar}}` in training mode, `{"logits": (rows, exits, labels)}` otherwise.

        Args:
            labels: of the rows, where the data has some.
            row: (rows,) int64, numbers of the rows in the data set, for teachers that look them up.
            inputs: `input_ids` and what else the tokenizer gives.
        """
        if not self.training:
            return {"logits": all_logits(self.student(**inputs))}
        inputs, labels = self.objective.prepare(inputs, labels)
        teacher = self._teacher[0]
        features = None if teacher is None else teacher(inputs, row)
        if self.perturbation is None:
            return {"terms": self.objective(self._student_features(inputs), features, labels)}
        return {"terms": self._perturbed_terms(inputs, features, labels, self.perturbation)}

    def _student_features(self, inputs: dict[str, Tensor], offset: Tensor | None = None) -> Features:
        objective = self.objective
        with attention_for_learning(encoder_parameters(self.student), inputs["input_ids"].shape[1]):
            return capture(
                self.student,
                inputs,
                objective.student_request,
                embedding_offset=offset,
                **objective.student_arguments,
            )

    def _perturbed_terms(
        self, inputs: dict[str, Tensor], teacher: Features | None, labels: Tensor | None, length: float
    ) -> dict[str, Tensor]:
        """The terms of a second pass whose embeddings are shifted along the first's gradient, one unit per row."""
        features = self._student_features(inputs)
        loss = torch.stack(list(self.objective(features, teacher, labels).values())).sum()
        (gradient,) = torch.autograd.grad(loss, features.hidden_states[0])
        gradient = gradient.float()
        norm = gradient.flatten(1).norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        offset = (length * gradient / norm[:, None, None]).to(features.hidden_states[0].dtype)
        return self.objective(self._student_features(inputs, offset), teacher, labels)  # type: ignore[no-any-return]


def all_logits(output: Any) -> Tensor:
    """Logits (rows, exits, labels): student exits in ascending order, the full model last."""
    logits = output.logits.unsqueeze(0)
    exits = getattr(output, "exit_logits", None)
    stacked = logits if exits is None else torch.cat([exits, logits])
    return stacked.transpose(0, 1).contiguous()
