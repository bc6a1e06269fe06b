"""MiniLM (Wang et al., NeurIPS 2020): the last layer's attention and relations between values."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, TypeVar

from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from alembert.common.errors import InputError
from alembert.losses.attention import attention_divergence
from alembert.losses.relation import relation_divergence
from alembert.methods.base import Preset, Sources
from alembert.methods.prediction import PredictionObjective
from alembert.methods.student_distillation import (
    GENERAL,
    TASK_INTERMEDIATE,
    TASK_PREDICTION,
    StudentDistillation,
    StudentOptions,
    check_equal_heads,
    depths,
)
from alembert.methods.tinybert import intermediate_settings
from alembert.models.features import FeatureRequest, Features
from alembert.training.objective import Objective
from alembert.training.settings import TrainingSettings


class RelationOptions(StudentOptions):
    """Options of the methods that distil relations between tokens, and then predictions.

    Attributes:
        teacher_layer: the teacher's layer; None = its last.
        temperature: of the soft term on the task, which is multiplied by its square.
        hard_weight: of the labels' loss on the task; the teacher's has 1 − hard_weight. The papers fine-tune on
            labels alone: 1.
        intermediate_epochs, intermediate_learning_rate: of the relations on the task's texts; the training settings
            are the prediction stage's.
    """

    teacher_layer: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, gt=0)
    hard_weight: float = Field(0.0, ge=0, le=1)
    intermediate_epochs: float = Field(3.0, gt=0)
    intermediate_learning_rate: float = Field(3e-4, gt=0)


RelationOptionsT = TypeVar("RelationOptionsT", bound=RelationOptions)


class RelationDistillation(StudentDistillation[RelationOptionsT]):
    """Stages: relations on plain text (`general`) or on the task's texts, then predictions."""

    stage_names = (GENERAL, TASK_INTERMEDIATE, TASK_PREDICTION)
    general_stages = (GENERAL,)
    stage_options: ClassVar[dict[str, dict[str, str]]] = {
        TASK_INTERMEDIATE: {"epochs": "intermediate_epochs", "learning_rate": "intermediate_learning_rate"}
    }

    @abstractmethod
    def relations(self, student: PreTrainedModel, teacher: PreTrainedModel) -> Objective:
        """The objective on relations."""

    def objective(self, stage: str, student: PreTrainedModel, sources: Sources) -> Objective:
        options = self.options
        if stage != TASK_PREDICTION:
            return self.relations(student, sources.teacher)
        assert sources.task is not None
        return PredictionObjective(
            sources.task.problem_type,
            soft_weight=1 - options.hard_weight,
            hard_weight=options.hard_weight,
            temperature=options.temperature,
        )

    def stage_settings(self, stage: str, settings: TrainingSettings) -> TrainingSettings:
        options = self.options
        if stage != TASK_INTERMEDIATE:
            return settings
        return intermediate_settings(
            settings, options.intermediate_epochs, options.intermediate_learning_rate, settings.scheduler
        )


def teacher_layer(options: RelationOptions, teacher_layers: int) -> int:
    """The teacher's layer whose relations are learned. Raises InputError for one that the teacher does not have."""
    layer = options.teacher_layer or teacher_layers
    if layer > teacher_layers:
        raise InputError(
            f"teacher_layer={layer}, but the teacher has {teacher_layers} layers: choose one of 1 to {teacher_layers}"
        )
    return layer


class MiniLmObjective(Objective):
    """L_AT + L_VR (MiniLM, Eq. 5–9). Raises InputError for depths or heads that cannot be compared."""

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, options: RelationOptions) -> None:
        super().__init__()
        student_layers, teacher_layers = depths(student, teacher)
        check_equal_heads(student, teacher, "use --method minilm-v2, which splits heads anew")
        self.student_layer, self.teacher_layer = student_layers, teacher_layer(options, teacher_layers)
        own, other = (self.student_layer,), (self.teacher_layer,)
        self.student_request = FeatureRequest(attention_scores=own, values=own)
        self.teacher_request = FeatureRequest(attention_scores=other, values=other)

    def forward(
        self, student: Features, teacher: Features | None, labels: Tensor | None
    ) -> dict[str, Tensor]:
        assert teacher is not None
        m, g, mask = self.student_layer, self.teacher_layer, student.attention_mask
        return {
            "attention": attention_divergence(student.attention_scores[m], teacher.attention_scores[g], mask),
            "value_relation": relation_divergence(student.values[m], teacher.values[g], mask),
        }


class MiniLm(RelationDistillation[RelationOptions]):
    """Attention distributions and value relations of the last layers, head by head."""

    name = "minilm"
    paper = "Wang et al., MiniLM: Deep Self-Attention Distillation, NeurIPS 2020"
    options_class = RelationOptions
    presets: ClassVar[dict[str, Preset]] = {
        "default": Preset(
            settings={"epochs": 3, "learning_rate": 2e-4},
            general_settings={"epochs": 1, "learning_rate": 5e-4},
        ),
        "paper": Preset(
            options={"hard_weight": 1.0, "initialise": "random", "intermediate_learning_rate": 5e-4},
            settings={"epochs": 3, "learning_rate": 3e-5, "batch_size": 32},
            general_settings={"epochs": 1, "learning_rate": 5e-4, "batch_size": 1024},
        ),
    }

    def relations(self, student: PreTrainedModel, teacher: PreTrainedModel) -> MiniLmObjective:
        return MiniLmObjective(student, teacher, self.options)
