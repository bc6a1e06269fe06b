"""BERxiT (Xin et al., EACL 2021): backbone and exits in turns, and exits that foresee their mistakes."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from alembert.common.errors import InputError
from alembert.data.task import Task
from alembert.losses.prediction import task_loss
from alembert.methods.base import Preset, Sources
from alembert.methods.self_distillation import (
    PlacementOptions,
    SelfDistillation,
    labels_as_logits,
    learned_exit_term,
)
from alembert.models.features import Features
from alembert.models.multi_exit import MultiExitModel, MultiExitOutput
from alembert.training.objective import Objective
from alembert.training.settings import TrainingSettings
from alembert.training.stage import Stage


class BerxitOptions(PlacementOptions):
    """Options of BERxiT beyond those of every method with exits.

    Attributes:
        exit_head: `pooled` as published: a pooler of its own and a linear classifier.
        learned_exit: also train what the policy `learned` needs, on the labels.
        strategy: `alternating` (every other batch teaches the full model alone, the others all exits), or `joint` (all
            exits, the full model's included, in every batch).
    """

    exit_head: Literal["fastbert", "pooled", "linear", "mean"] = "pooled"
    learned_exit: bool = True
    strategy: Literal["alternating", "joint"] = "alternating"


class BerxitObjective(Objective):
    """Odd batches: L_N. Even batches: Σ_j L_j over all exits, the full model's included (BERxiT, Eq. 2 and 3).

    The terms left out of an odd batch are multiplied by 0, so that every parameter has a gradient, as a distributed run
    needs.
    """

    def __init__(
        self, exits: tuple[int, ...], num_layers: int, problem_type: str, options: BerxitOptions
    ) -> None:
        super().__init__()
        self.exits, self.num_layers = exits, num_layers
        self.problem_type, self.options = problem_type, options
        self.batches: Tensor
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    def forward(
        self, student: Features, teacher: Features | None, labels: Tensor | None
    ) -> dict[str, Tensor]:
        output: MultiExitOutput = student.output
        assert labels is not None and output.exit_logits is not None and output.logits is not None
        if self.training:
            self.batches += 1
        top_alone = self.options.strategy == "alternating" and int(self.batches) % 2 == 1
        terms = {
            f"exit_{layer}": task_loss(logits, labels, self.problem_type)
            for layer, logits in zip(self.exits, output.exit_logits, strict=True)
        }
        answers = labels_as_logits(labels, output.logits, self.problem_type)
        terms |= learned_exit_term(output, answers, self.problem_type)
        if top_alone:
            terms = {name: 0.0 * term for name, term in terms.items()}
        return terms | {f"exit_{self.num_layers}": task_loss(output.logits, labels, self.problem_type)}


class Berxit(SelfDistillation[BerxitOptions]):
    """The full model keeps its quality, because half of the batches are its own."""

    name = "berxit"
    paper = "Xin et al., BERxiT: Early Exiting for BERT with Better Fine-Tuning and Extension to Regression, EACL 2021"
    options_class = BerxitOptions
    trainable = None
    presets: ClassVar[dict[str, Preset]] = {
        "default": Preset(settings={"epochs": 3, "learning_rate": 5e-5, "head_learning_rate": 1e-3}),
        "paper": Preset(
            options={"placement": "all"},
            settings={"epochs": 3, "learning_rate": 2e-5, "batch_size": 8},
        ),
    }

    def stages(self, model: PreTrainedModel, sources: Sources, settings: TrainingSettings) -> list[Stage]:
        if self.options.strategy == "alternating" and settings.gradient_accumulation_steps > 1:
            raise InputError(
                f"strategy=alternating with gradient_accumulation_steps={settings.gradient_accumulation_steps}: the "
                "two kinds of batches would meet in one step, and none would be the full model's own: leave "
                "accumulation out, or choose strategy=joint (pabee weighs exits by depth)"
            )
        return super().stages(model, sources, settings)

    def objective(self, model: MultiExitModel, task: Task) -> BerxitObjective:
        return BerxitObjective(model.exit_layers, model.num_layers, task.problem_type, self.options)
