"""Alembert's own way: a student of half the teacher's layers that has exits from the beginning."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from alembert.data.task import Task
from alembert.losses.prediction import distillation_divergence, task_loss
from alembert.methods.base import Preset, Sources
from alembert.methods.self_distillation import (
    ExitWeights,
    JointObjective,
    PlacementOptions,
    SelfDistillation,
    exits_first,
    learned_exit_term,
)
from alembert.methods.student_distillation import full_model
from alembert.models.features import FeatureRequest, Features
from alembert.models.layered import LayeredEncoder
from alembert.models.multi_exit import MultiExitModel, MultiExitOutput
from alembert.models.students import build_student
from alembert.training.settings import TrainingSettings
from alembert.training.stage import Stage


class AlembertOptions(PlacementOptions):
    """Options beyond those of every method with exits.

    Attributes:
        placement: an exit after every layer: those that save nothing can be dropped at export.
        exit_head: `mean` reads all tokens and costs hardly more than one of them.
        depth: of the student, as a share of the teacher's layers; 1 = the teacher's own layers go on learning.
        init_layers: the teacher's layers to copy; None = evenly spread.
        hard_weight: of the labels' loss at every exit; the teacher's has 1 − hard_weight.
        temperature: softens teacher and exits; the divergence is multiplied by its square.
        exit_weights: of the exits' losses, the last layer's included: `uniform`, or by `depth` (the layer's number).
            They are divided by their sum.
        exit_epochs: epochs in which the new exits learn alone, at `head_learning_rate`, before the student learns.
    """

    placement: Literal["every_k", "last_k", "all"] = "all"
    exit_head: Literal["fastbert", "pooled", "linear", "mean"] = "mean"
    depth: float = Field(0.5, gt=0, le=1)
    init_layers: tuple[int, ...] | None = None
    hard_weight: float = Field(0.5, ge=0, le=1)
    temperature: float = Field(1.0, gt=0)
    exit_weights: ExitWeights = "uniform"
    exit_epochs: float = Field(1.0, ge=0)


class AlembertObjective(JointObjective):
    """Σ_j w_j (h · L(ŷ_j, labels) + (1 − h) · T² · KL(teacher ‖ exit j)) over the exits, the last layer's included.

    Args:
        exits: layers of the exits.
        num_layers: of the student, whose own answer is the last exit.
        problem_type: transformers' problem type.
        options: hard_weight h, temperature T and exit_weights w.
    """

    def __init__(
        self, exits: tuple[int, ...], num_layers: int, problem_type: str, options: AlembertOptions
    ) -> None:
        super().__init__(exits, num_layers, problem_type, options.exit_weights)
        self.options = options
        if options.hard_weight < 1:
            self.teacher_request = FeatureRequest()

    def forward(
        self, student: Features, teacher: Features | None, labels: Tensor | None
    ) -> dict[str, Tensor]:
        output: MultiExitOutput = student.output
        assert labels is not None
        options, terms = self.options, {}
        for layer, weight, logits in self.weighted(output):
            loss = options.hard_weight * task_loss(logits, labels, self.problem_type)
            if self.teacher_request is not None:
                assert teacher is not None and teacher.logits is not None
                soft = distillation_divergence(
                    logits,
                    teacher.logits,
                    self.problem_type,
                    direction="teacher||student",
                    temperature=options.temperature,
                )
                loss = loss + (1 - options.hard_weight) * soft
            terms[f"exit_{layer}"] = weight * loss
        return terms | learned_exit_term(output, output.logits, self.problem_type)


class Alembert(SelfDistillation[AlembertOptions]):
    """A student learns with its exits, so that its first layers never learn anything that they cannot read."""

    name = "alembert"
    paper = "Alembert's own"
    options_class = AlembertOptions
    trainable = None
    separate_teacher = True
    presets: ClassVar[dict[str, Preset]] = {
        "default": Preset(settings={"epochs": 3, "learning_rate": 1e-4, "head_learning_rate": 1e-3}),
    }

    def build_model(self, sources: Sources) -> MultiExitModel:
        assert sources.task is not None
        options, teacher = self.options, full_model(sources.teacher)
        depth = student_depth(LayeredEncoder(teacher).num_layers, options.depth)
        # At full depth, too, a model of its own: the teacher stays as it is beside it.
        student = build_student(
            f"{depth}x{teacher.config.hidden_size}",
            teacher,
            initialise="layers",
            init_layers=options.init_layers,
            label_names=sources.task.label_names,
            problem_type=sources.task.problem_type,
        )
        return MultiExitModel.from_full_model(student, **self.exits(depth))

    def objective(self, model: MultiExitModel, task: Task) -> AlembertObjective:
        return AlembertObjective(model.exit_layers, model.num_layers, task.problem_type, self.options)

    def stages(self, model: PreTrainedModel, sources: Sources, settings: TrainingSettings) -> list[Stage]:
        (planned,) = super().stages(model, sources, settings)
        teacher = full_model(sources.teacher)
        together = replace(planned, name="together", teacher=teacher, teacher_cache=sources.teacher_cache)
        return exits_first(together, self.options.exit_epochs)


def student_depth(num_layers: int, share: float) -> int:
    """Layers of a student of a share of the teacher's: the nearest number, halves up, at least 2."""
    return min(num_layers, max(2, math.floor(share * num_layers + 0.5)))
