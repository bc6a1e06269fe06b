"""PABEE (Zhou et al., NeurIPS 2020): backbone and exits are trained together on the labels."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from alembert.data.task import Task
from alembert.losses.prediction import distillation_divergence, task_loss
from alembert.methods.base import Preset, Sources
from alembert.methods.self_distillation import (
    ExitOptions,
    ExitWeights,
    JointObjective,
    SelfDistillation,
    exits_first,
    learned_exit_term,
)
from alembert.models.features import Features
from alembert.models.multi_exit import MultiExitModel, MultiExitOutput
from alembert.training.settings import TrainingSettings
from alembert.training.stage import Stage


class PabeeOptions(ExitOptions):
    """Options of PABEE beyond those of every method with exits.

    Attributes:
        exit_weights: of the exits' losses: `depth` (the layer's number, as printed: deep exits weigh more) or
            `uniform`. They are divided by their sum, the full model's included.
        exit_head: `linear` as printed.
        kl: direction of the self-distillation's divergence.
        self_distillation: weight of each exit's divergence from the full model's answer, beside the labels; 0 = none,
            as printed.
        exit_epochs: epochs in which the new exits learn alone, at `head_learning_rate`, before the backbone learns with
            them: what random heads say would spoil it (Kumar et al., ICLR 2022); 0 as printed.
    """

    exit_head: Literal["fastbert", "pooled", "linear", "mean"] = "linear"
    kl: Literal["student||teacher", "teacher||student", "symmetric"] = "teacher||student"
    exit_weights: ExitWeights = "depth"
    self_distillation: float = Field(1.0, ge=0)
    exit_epochs: float = Field(2.0, ge=0)


class PabeeObjective(JointObjective):
    """Σ_j j L_j / Σ_j j over the exits, the full model's included (PABEE, Eq. 5)."""

    def __init__(
        self, exits: tuple[int, ...], num_layers: int, problem_type: str, options: PabeeOptions
    ) -> None:
        super().__init__(exits, num_layers, problem_type, options.exit_weights)
        self.options = options

    def forward(
        self, student: Features, teacher: Features | None, labels: Tensor | None
    ) -> dict[str, Tensor]:
        output: MultiExitOutput = student.output
        assert labels is not None and output.logits is not None
        exits = list(self.weighted(output))
        terms = {
            f"exit_{layer}": weight * task_loss(logits, labels, self.problem_type)
            for layer, weight, logits in exits
        }
        if self.options.self_distillation:
            for layer, weight, logits in exits[:-1]:
                divergence = distillation_divergence(
                    logits,
                    output.logits.detach(),
                    self.problem_type,
                    direction=self.options.kl,
                    temperature=self.options.temperature,
                )
                terms[f"self_distillation_{layer}"] = self.options.self_distillation * weight * divergence
        return terms | learned_exit_term(output, output.logits, self.problem_type)


class Pabee(SelfDistillation[PabeeOptions]):
    """The teacher's backbone goes on learning, so that its early layers come to serve their exits."""

    name = "pabee"
    paper = "Zhou et al., BERT Loses Patience: Fast and Robust Inference with Early Exit, NeurIPS 2020"
    options_class = PabeeOptions
    serves: ClassVar[dict[str, tuple[str, ...]]] = dict.fromkeys(
        ("kl", "temperature"), ("self_distillation",)
    )
    trainable = None
    presets: ClassVar[dict[str, Preset]] = {
        "default": Preset(settings={"epochs": 3, "learning_rate": 5e-5, "head_learning_rate": 1e-3}),
        "paper": Preset(
            options={"placement": "all", "self_distillation": 0.0, "exit_epochs": 0.0},
            settings={"epochs": 5, "learning_rate": 2e-5, "batch_size": 32},
        ),
    }

    def objective(self, model: MultiExitModel, task: Task) -> PabeeObjective:
        return PabeeObjective(model.exit_layers, model.num_layers, task.problem_type, self.options)

    def stages(self, model: PreTrainedModel, sources: Sources, settings: TrainingSettings) -> list[Stage]:
        (together,) = super().stages(model, sources, settings)
        return exits_first(together, self.options.exit_epochs)
