"""A stage: an objective, the weights it moves, the data it reads, and how long."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel

from alembert.training.objective import Objective
from alembert.training.settings import TrainingSettings

_STEPS_ON_PLAIN_TEXT = 1000


@dataclass(frozen=True)
class Stage:
    """One phase of a method; a method is a list of these.

    Attributes:
        name: of the folder of its checkpoints and of its log entries.
        objective: what is minimised.
        settings: duration, optimiser, hardware.
        trainable: prefixes of the names of the parameters that move; None = all.
        teacher: a separate teacher, for objectives with a `teacher_request`.
        teacher_cache: folder where the teacher's outputs are kept instead of computed in every epoch; None = none.
        texts: rows to train on ("text", "text_pair", "labels") in place of the task's train split.
        corpus: plain text to train on, a file or a folder, in place of any task.
        perturbation: length of the step that the embeddings of each row are moved along the loss's gradient, before
            the pass that counts (LRC-BERT, Eq. 7 and 8); None = not.
    """

    name: str
    objective: Objective
    settings: TrainingSettings
    trainable: tuple[str, ...] | None = None
    teacher: PreTrainedModel | None = None
    teacher_cache: Path | None = None
    texts: Dataset | None = None
    corpus: str | None = None
    perturbation: float | None = None

    @property
    def checkpoint_steps(self) -> int | None:
        """Optimiser steps between checkpoints; None = one per epoch, of which plain text has few and long ones."""
        default = None if self.corpus is None else _STEPS_ON_PLAIN_TEXT
        return self.settings.checkpoint_steps or default

    def trained(self, model: PreTrainedModel) -> Iterator[nn.Parameter]:
        """The model's parameters that move, and the objective's own."""
        for name, parameter in model.named_parameters():
            if self.trainable is None or name.startswith(self.trainable):
                yield parameter
        yield from self.objective.parameters()

    def prepare(self, model: PreTrainedModel) -> None:
        """Lets gradients into the trainable parameters only, and fixes a teacher for good."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.trainable is None or name.startswith(self.trainable))
        if self.teacher is not None:
            self.teacher.requires_grad_(False).eval()
