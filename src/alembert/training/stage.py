"""A stage: an objective, the weights it moves, and how long."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from alembert.training.objective import Objective
from alembert.training.settings import TrainingSettings


@dataclass(frozen=True)
class Stage:
    """One phase of a method; a method is a list of these.

    Attributes:
        name: of the folder of its checkpoints and of its log entries.
        objective: what is minimised.
        settings: duration, optimiser, hardware.
        trainable: prefixes of the names of the parameters that move; None = all.
        teacher: a separate teacher, for objectives with `teacher_features`.
    """

    name: str
    objective: Objective
    settings: TrainingSettings
    trainable: tuple[str, ...] | None = None
    teacher: PreTrainedModel | None = None

    def prepare(self, model: PreTrainedModel) -> None:
        """Lets gradients into the trainable parameters only, and fixes a teacher for good."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.trainable is None or name.startswith(self.trainable))
        if self.teacher is not None:
            self.teacher.requires_grad_(False).eval()
