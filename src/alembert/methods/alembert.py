"""Alembert's own way: backbone and exits learn together, from the labels and from the teacher as it was."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from alembert.data.task import Task
from alembert.losses.prediction import distillation_divergence, task_loss
from alembert.methods.base import Preset, Sources
from alembert.methods.self_distillation import EXITS, PlacementOptions, SelfDistillation, mistake_loss
from alembert.models.features import FeatureRequest, Features
from alembert.models.multi_exit import MultiExitModel, MultiExitOutput
from alembert.training.objective import Objective
from alembert.training.settings import TrainingSettings
from alembert.training.stage import Stage


class AlembertOptions(PlacementOptions):
    """Options beyond those of every method with exits.

    Attributes:
        exit_head: `mean` reads all tokens and costs hardly more than one of them.
        hard_weight: of the labels' loss at every exit; the teacher's has 1 − hard_weight.
        temperature: softens teacher and exits; the divergence is multiplied by its square.
        full_model_share: of the whole loss, for the full model's own answer; the exits divide the rest.
        exit_weights: how they divide it: `uniform`, or by `depth` (the layer's number).
        exit_epochs: epochs in which the new exits learn alone before the backbone learns with them.
    """

    exit_head: Literal["fastbert", "pooled", "linear", "mean"] = "mean"
    hard_weight: float = Field(0.5, ge=0, le=1)
    temperature: float = Field(2.0, gt=0)
    full_model_share: float = Field(0.5, ge=0, le=1)
    exit_weights: Literal["uniform", "depth"] = "uniform"
    exit_epochs: float = Field(1.0, ge=0)


class AlembertObjective(Objective):
    """Σ_j w_j (h · L(ŷ_j, labels) + (1 − h) · T² · KL(teacher ‖ exit j)) over the exits, the full model's included.

    The teacher is the fine-tuned model before this training, not the full model of the moment: its answers stand
    still, and hold the full model, too, where it was.
    """

    teacher_request = FeatureRequest()

    def __init__(
        self, exits: tuple[int, ...], num_layers: int, problem_type: str, options: AlembertOptions
    ) -> None:
        super().__init__()
        self.layers, self.problem_type, self.options = (*exits, num_layers), problem_type, options
        shares = [layer if options.exit_weights == "depth" else 1 for layer in exits]
        rest = 1 - options.full_model_share
        self.weights = [*(rest * share / sum(shares) for share in shares), options.full_model_share]

    def forward(
        self, student: Features, teacher: Features | None, labels: Tensor | None
    ) -> dict[str, Tensor]:
        output: MultiExitOutput = student.output
        assert labels is not None and teacher is not None and teacher.logits is not None
        assert output.exit_logits is not None and output.logits is not None
        options, terms = self.options, {}
        for layer, weight, logits in zip(
            self.layers, self.weights, [*output.exit_logits, output.logits], strict=True
        ):
            hard = task_loss(logits, labels, self.problem_type)
            soft = distillation_divergence(
                logits,
                teacher.logits,
                self.problem_type,
                direction="teacher||student",
                temperature=options.temperature,
            )
            terms[f"exit_{layer}"] = weight * (options.hard_weight * hard + (1 - options.hard_weight) * soft)
        if output.mistake_logits is not None:
            terms["learned_exit"] = mistake_loss(
                output.mistake_logits, output.exit_logits, output.logits, self.problem_type
            )
        return terms


class Alembert(SelfDistillation[AlembertOptions]):
    """Every exit learns from labels and from the teacher, and the backbone learns to serve them."""

    name = "alembert"
    paper = "none: docs/methods/alembert.md says what it takes from which"
    options_class = AlembertOptions
    trainable = None
    has_teacher = True
    presets: ClassVar[dict[str, Preset]] = {
        "default": Preset(settings={"epochs": 3, "learning_rate": 5e-5, "head_learning_rate": 1e-3}),
    }

    def objective(self, model: MultiExitModel, task: Task) -> AlembertObjective:
        return AlembertObjective(model.exit_layers, model.num_layers, task.problem_type, self.options)

    def stages(self, model: PreTrainedModel, sources: Sources, settings: TrainingSettings) -> list[Stage]:
        (planned,) = super().stages(model, sources, settings)
        # The model that learns shares its backbone with the teacher that was loaded.
        together = replace(planned, teacher=deepcopy(sources.teacher), teacher_cache=sources.teacher_cache)
        if not self.options.exit_epochs:
            return [together]
        alone = {
            "epochs": self.options.exit_epochs,
            "evaluate_every_epoch": False,
            "early_stopping_patience": None,
        }
        exits = replace(together, name="exits", settings=settings.model_copy(update=alone), trainable=EXITS)
        return [exits, together]
