"""TinyBERT (Jiao et al., Findings of EMNLP 2020): embeddings, attention, hidden states, then predictions."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from alembert.common.errors import InputError
from alembert.losses.attention import attention_score_mse, average_heads, common_heads
from alembert.losses.hidden import hidden_state_mse
from alembert.methods.base import Preset, Sources
from alembert.methods.prediction import PredictionObjective, SoftLoss
from alembert.methods.student_distillation import (
    GENERAL,
    TASK_INTERMEDIATE,
    TASK_PREDICTION,
    StudentDistillation,
    StudentOptions,
    check_equal_heads,
    depths,
    widths,
)
from alembert.models.features import FeatureRequest, Features
from alembert.models.layer_mapping import layer_mapping
from alembert.models.projections import HiddenProjection
from alembert.training.objective import Objective
from alembert.training.settings import TrainingSettings


class TinyBertOptions(StudentOptions):
    """Options of TinyBERT.

    Attributes:
        mapping: the teacher's layer g(m) for the student's layer m: `uniform` m·N/M, `top` m+N−M, `bottom` m.
        teacher_layers: explicit g(1) … g(M) instead of a mapping.
        projection: W of Eq. 8 and 9: one `shared` by embeddings and all layers, or one `per_layer`.
        heads: `match` compares attention head by head; `average` means over groups of heads, as many as the greatest
            common divisor of the two numbers.
        attention, hidden, embedding: whether the intermediate stages have L_attn, L_hidn and L_embd.
        temperature: t of Eq. 10.
        soft_loss: of L_pred: `cross_entropy` (Eq. 10), `divergence` or `logits_mse`.
        hard_weight: of the labels' loss beside L_pred.
        regression_target: the `teacher`'s values, or the `labels` as in the published code.
        intermediate_epochs, intermediate_learning_rate, intermediate_scheduler: of the stage `task-intermediate`; the
            training settings are those of the other stages.
    """

    mapping: Literal["uniform", "top", "bottom"] = "uniform"
    teacher_layers: tuple[int, ...] | None = None
    projection: Literal["shared", "per_layer"] = "shared"
    heads: Literal["match", "average"] = "match"
    attention: bool = True
    hidden: bool = True
    embedding: bool = True
    temperature: float = Field(1.0, gt=0)
    soft_loss: SoftLoss = "cross_entropy"
    hard_weight: float = Field(0.0, ge=0)
    regression_target: Literal["teacher", "labels"] = "teacher"
    intermediate_epochs: float = Field(3.0, gt=0)
    intermediate_learning_rate: float = Field(3e-4, gt=0)
    intermediate_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"


class TinyBertIntermediateObjective(Objective):
    """Σ_m L_attn + Σ_m L_hidn + L_embd (TinyBERT, Eq. 7–9).

    Raises InputError for depths, layers or heads that cannot be compared, and when no term is left.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, options: TinyBertOptions) -> None:
        super().__init__()
        if not (options.attention or options.hidden or options.embedding):
            raise InputError(
                "attention, hidden and embedding are all off: leave the intermediate stage out with "
                f"--stages {TASK_PREDICTION}"
            )
        student_layers, teacher_layers = depths(student, teacher)
        self.options = options
        self.mapping = layer_mapping(options.mapping, student_layers, teacher_layers, options.teacher_layers)
        if options.attention and options.heads == "match":
            check_equal_heads(
                student,
                teacher,
                "compare the mean over heads (--set heads=average) or no attention (--set attention=false)",
            )
        layers = tuple(range(1, student_layers + 1))
        hidden = (0,) * options.embedding + layers * options.hidden
        teacher_hidden = (0,) * options.embedding + self.mapping * options.hidden
        attention = layers if options.attention else ()
        self.student_request = FeatureRequest(hidden_states=hidden, attention_scores=attention)
        self.teacher_request = FeatureRequest(
            hidden_states=tuple(sorted(set(teacher_hidden))),
            attention_scores=tuple(sorted(set(self.mapping))) if options.attention else (),
        )
        self.projection: HiddenProjection | None = None
        if options.hidden or options.embedding:
            self.projection = HiddenProjection(
                *widths(student, teacher),
                layers=self.student_request.hidden_states,
                sharing=options.projection,
            )

    def forward(
        self, student: Features, teacher: Features | None, labels: Tensor | None
    ) -> dict[str, Tensor]:
        assert teacher is not None
        mask, terms = student.attention_mask, {}
        pairs = list(enumerate(self.mapping, 1))
        if self.options.attention:
            terms["attention"] = torch.stack(
                [
                    self._attention(student.attention_scores[m], teacher.attention_scores[g], mask)
                    for m, g in pairs
                ]
            ).sum()
        if self.options.hidden:
            terms["hidden"] = torch.stack(
                [self._hidden(m, student.hidden_states[m], teacher.hidden_states[g], mask) for m, g in pairs]
            ).sum()
        if self.options.embedding:
            terms["embedding"] = self._hidden(0, student.hidden_states[0], teacher.hidden_states[0], mask)
        return terms

    def _attention(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        heads = common_heads(student.shape[1], teacher.shape[1])
        if student.shape[1] != teacher.shape[1]:
            student, teacher = average_heads(student, heads), average_heads(teacher, heads)
        return attention_score_mse(student, teacher, mask)

    def _hidden(self, layer: int, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        assert self.projection is not None
        return hidden_state_mse(self.projection(student, layer), teacher, mask)


class TinyBert(StudentDistillation[TinyBertOptions]):
    """Stages: `general` on plain text, then on the task `task-intermediate` and `task-prediction`."""

    name = "tinybert"
    paper = (
        "Jiao et al., TinyBERT: Distilling BERT for Natural Language Understanding, Findings of EMNLP 2020"
    )
    options_class = TinyBertOptions
    stage_names = (GENERAL, TASK_INTERMEDIATE, TASK_PREDICTION)
    general_stages = (GENERAL,)
    stage_options: ClassVar[dict[str, dict[str, str]]] = {
        TASK_INTERMEDIATE: {
            "epochs": "intermediate_epochs",
            "learning_rate": "intermediate_learning_rate",
            "scheduler": "intermediate_scheduler",
        }
    }
    conditions: ClassVar[dict[str, tuple[str, tuple[Any, ...]]]] = {
        "mapping": ("teacher_layers", (None,)),
        "temperature": ("soft_loss", ("divergence", "cross_entropy")),
    }
    serves: ClassVar[dict[str, tuple[str, ...]]] = {
        "heads": ("attention",),
        "projection": ("hidden", "embedding"),
    }
    presets: ClassVar[dict[str, Preset]] = {
        "default": Preset(
            settings={"epochs": 3, "learning_rate": 2e-4},
            general_settings={"epochs": 1, "learning_rate": 5e-4},
        ),
        "paper": Preset(
            options={
                "intermediate_epochs": 20,
                "intermediate_learning_rate": 5e-5,
                "intermediate_scheduler": "constant",
                "initialise": "random",
            },
            settings={"epochs": 3, "learning_rate": 3e-5, "batch_size": 32},
            general_settings={"epochs": 3, "learning_rate": 5e-5, "batch_size": 256},
        ),
        "code": Preset(
            options={
                "intermediate_epochs": 10,
                "intermediate_learning_rate": 5e-5,
                "intermediate_scheduler": "constant",
                "initialise": "random",
                "regression_target": "labels",
            },
            settings={"epochs": 3, "learning_rate": 3e-5, "batch_size": 32},
            general_settings={"epochs": 3, "learning_rate": 5e-5, "batch_size": 256},
        ),
    }

    def objective(self, stage: str, student: PreTrainedModel, sources: Sources) -> Objective:
        options = self.options
        if stage in (GENERAL, TASK_INTERMEDIATE):
            return TinyBertIntermediateObjective(student, sources.teacher, options)
        assert sources.task is not None
        return PredictionObjective(
            sources.task.problem_type,
            hard_weight=options.hard_weight,
            temperature=options.temperature,
            soft_loss=options.soft_loss,
            regression_target=options.regression_target,
        )

    def stage_settings(self, stage: str, settings: TrainingSettings) -> TrainingSettings:
        options = self.options
        if stage != TASK_INTERMEDIATE:
            return settings
        return intermediate_settings(
            settings,
            options.intermediate_epochs,
            options.intermediate_learning_rate,
            options.intermediate_scheduler,
        )


def intermediate_settings(
    settings: TrainingSettings, epochs: float, learning_rate: float, scheduler: str
) -> TrainingSettings:
    """The settings of a stage whose answers are not trained yet, so that its dev score says nothing."""
    return settings.model_copy(
        update={
            "epochs": epochs,
            "learning_rate": learning_rate,
            "scheduler": scheduler,
            "warmup_ratio": 0.0 if scheduler == "constant" else settings.warmup_ratio,
            "evaluate_every_epoch": False,
            "early_stopping_patience": None,
        }
    )
