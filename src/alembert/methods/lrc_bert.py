"""LRC-BERT (Fu et al., AAAI 2021): layers by contrast with the batch, then predictions, on shifted embeddings."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from accelerate import PartialState
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from alembert.common.errors import InputError
from alembert.losses.contrastive import cos_nce, layer_vectors
from alembert.losses.hidden import hidden_state_mse
from alembert.losses.prediction import distillation_divergence, softened_label_loss, task_loss
from alembert.methods.base import Preset, Sources
from alembert.methods.student_distillation import (
    GENERAL,
    TASK_INTERMEDIATE,
    TASK_PREDICTION,
    StudentDistillation,
    StudentOptions,
    depths,
    widths,
)
from alembert.models.features import FeatureRequest, Features
from alembert.models.layer_mapping import layer_mapping
from alembert.models.projections import HiddenProjection
from alembert.training.objective import Objective
from alembert.training.settings import TrainingSettings
from alembert.training.stage import Stage


class LrcBertOptions(StudentOptions):
    """Options of LRC-BERT; the paper's ablations are the switches.

    Attributes:
        contrastive_weight, soft_weight, hard_weight: α, β and γ of Eq. 6 in the last stage; 0 switches a term off.
        layer_loss: `cos_nce`, or `mse` between the layers in its place (Table 3).
        two_stages: whether a first stage trains the layers alone; without it the last stage has all the steps.
        first_stage_share: share of the epochs that the first stage has.
        perturbation: whether the pass that counts has its embeddings shifted along the gradient (Eq. 7 and 8).
        perturbation_length: of the shift of each row.
        mapping: the teacher's layer for the student's layer m: `uniform`, `top` or `bottom`.
        teacher_layers: explicit teacher layers instead of a mapping.
        projection: W of Eq. 3: one `per_layer`, or one `shared` by all.
        vectors: a layer's output as one vector: `flatten` its valid tokens, `cls`, their `mean`, or `tokens` one by
            one.
        temperature: τ of L_soft, which is not multiplied by τ².
        hard_loss: `plain` cross-entropy, or against the labels `softened` by τ as printed (Eq. 5), which only single
            labels can be: other tasks have their plain loss either way.
    """

    contrastive_weight: float = Field(1.0, ge=0)
    soft_weight: float = Field(1.0, ge=0)
    hard_weight: float = Field(3.0, ge=0)
    layer_loss: Literal["cos_nce", "mse"] = "cos_nce"
    two_stages: bool = True
    first_stage_share: float = Field(0.8, gt=0, lt=1)
    perturbation: bool = True
    perturbation_length: float = Field(1.0, gt=0)
    mapping: Literal["uniform", "top", "bottom"] = "uniform"
    teacher_layers: tuple[int, ...] | None = None
    projection: Literal["shared", "per_layer"] = "per_layer"
    vectors: Literal["flatten", "cls", "mean", "tokens"] = "flatten"
    temperature: float = Field(1.1, gt=0)
    hard_loss: Literal["plain", "softened"] = "plain"


class LrcBertObjective(Objective):
    """α Σ_m L_C(m) + β L_soft + γ L_hard (LRC-BERT, Eq. 6).

    Args:
        student, teacher: for depths and widths.
        problem_type: None for plain text, where only L_C is left.
        options: the method's.
        weights: α, β, γ of this stage.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        problem_type: str | None,
        options: LrcBertOptions,
        weights: tuple[float, float, float],
    ) -> None:
        super().__init__()
        if not any(weights):
            raise InputError(
                "contrastive_weight, soft_weight and hard_weight are all 0: nothing is left to learn from"
            )
        self.problem_type, self.options = problem_type, options
        self.contrastive_weight, self.soft_weight, self.hard_weight = weights
        self.mapping: tuple[int, ...] = ()
        self.projection: HiddenProjection | None = None
        if self.contrastive_weight:
            layers = depths(student, teacher)
            self.mapping = layer_mapping(options.mapping, *layers, options.teacher_layers)
            self.projection = HiddenProjection(
                *widths(student, teacher), layers=range(1, layers[0] + 1), sharing=options.projection
            )
        own = tuple(range(1, len(self.mapping) + 1))
        # The perturbation needs the embeddings whose gradient it follows.
        self.student_request = FeatureRequest(hidden_states=(0,) * options.perturbation + own)
        if self.soft_weight or self.contrastive_weight:
            self.teacher_request = FeatureRequest(hidden_states=tuple(sorted(set(self.mapping))))

    def forward(
        self, student: Features, teacher: Features | None, labels: Tensor | None
    ) -> dict[str, Tensor]:
        terms = {}
        if self.contrastive_weight:
            assert teacher is not None
            layers = [self._layer(student, teacher, m, g) for m, g in enumerate(self.mapping, 1)]
            terms["contrastive" if self.options.layer_loss == "cos_nce" else "hidden"] = (
                self.contrastive_weight * torch.stack(layers).sum()
            )
        if self.soft_weight:
            assert teacher is not None
            assert teacher.logits is not None
            terms["soft"] = self.soft_weight * self._soft(student, teacher.logits)
        if self.hard_weight:
            assert labels is not None
            terms["hard"] = self.hard_weight * self._hard(student, labels)
        return terms

    def _layer(self, student: Features, teacher: Features, m: int, g: int) -> Tensor:
        """L_C of the student's layer m and the teacher's layer g (Eq. 1 and 3)."""
        assert self.projection is not None
        mask = student.attention_mask
        projected, target = self.projection(student.hidden_states[m], m), teacher.hidden_states[g]
        if self.options.layer_loss == "mse":
            return hidden_state_mse(projected, target, mask)
        vectors = self.options.vectors
        return cos_nce(layer_vectors(projected, mask, vectors), layer_vectors(target, mask, vectors))

    def _soft(self, student: Features, teacher_logits: Tensor) -> Tensor:
        """L_soft (Eq. 4): KL(teacher ‖ student) at temperature τ, without τ²."""
        assert student.logits is not None
        assert self.problem_type is not None
        temperature = 1.0 if self.problem_type == "regression" else self.options.temperature
        divergence = distillation_divergence(
            student.logits,
            teacher_logits,
            self.problem_type,
            direction="teacher||student",
            temperature=temperature,
        )
        return divergence / temperature**2

    def _hard(self, student: Features, labels: Tensor) -> Tensor:
        assert student.logits is not None
        assert self.problem_type is not None
        softened = self.options.hard_loss == "softened" and self.problem_type == "single_label_classification"
        if softened:
            return softened_label_loss(student.logits, labels, self.problem_type, self.options.temperature)
        return task_loss(student.logits, labels, self.problem_type)


class LrcBert(StudentDistillation[LrcBertOptions]):
    """Stages: `general` on plain text; on the task the layers alone for 80% of the epochs, then everything."""

    name = "lrc-bert"
    paper = "Fu et al., LRC-BERT: Latent-representation Contrastive Knowledge Distillation, AAAI 2021"
    options_class = LrcBertOptions
    stage_names = (GENERAL, TASK_INTERMEDIATE, TASK_PREDICTION)
    general_stages = (GENERAL,)
    conditions: ClassVar[dict[str, tuple[str, tuple[Any, ...]]]] = {
        "mapping": ("teacher_layers", (None,)),
        "vectors": ("layer_loss", ("cos_nce",)),
        "first_stage_share": ("two_stages", (True,)),
        "perturbation_length": ("perturbation", (True,)),
    }
    serves: ClassVar[dict[str, tuple[str, ...]]] = {
        "temperature": ("soft_weight", "hard_weight"),
        "hard_loss": ("hard_weight",),
    }
    presets: ClassVar[dict[str, Preset]] = {
        "default": Preset(
            settings={"epochs": 5, "learning_rate": 2e-4, "batch_size": 16}, general_settings={"epochs": 1}
        ),
        "paper": Preset(
            options={"hard_loss": "softened", "initialise": "random"},
            settings={"epochs": 90, "learning_rate": 1e-4, "batch_size": 16},
            general_settings={"epochs": 1},
        ),
    }

    def chosen_stages(self) -> tuple[str, ...]:
        chosen = super().chosen_stages()
        if self.options.two_stages or TASK_INTERMEDIATE not in chosen:
            return chosen
        if self.options.stages is not None:
            raise InputError(
                f"two_stages=false and --stages {','.join(self.options.stages)} contradict each other: leave one out"
            )
        return (TASK_PREDICTION,)

    def stages(self, model: PreTrainedModel, sources: Sources, settings: TrainingSettings) -> list[Stage]:
        """As of every method. Raises InputError where a step would have no other row to contrast with."""
        contrasts = self.options.contrastive_weight or self.chosen_stages() != (TASK_PREDICTION,)
        processes = PartialState().num_processes
        parts = settings.gradient_accumulation_steps * processes
        if self.options.layer_loss == "cos_nce" and contrasts and settings.batch_size == parts:
            raise InputError(
                f"a batch of {settings.batch_size} in {settings.gradient_accumulation_steps} parts for {processes} "
                "processes leaves 1 row for each forward pass, and COS-NCE needs at least 2 to tell apart: "
                "choose a larger batch size, fewer parts, or --set layer_loss=mse"
            )
        return super().stages(model, sources, settings)

    def objective(self, stage: str, student: PreTrainedModel, sources: Sources) -> LrcBertObjective:
        options = self.options
        whole = options.contrastive_weight, options.soft_weight, options.hard_weight
        return LrcBertObjective(
            student,
            sources.teacher,
            None if sources.task is None else sources.task.problem_type,
            options,
            whole if stage == TASK_PREDICTION else (1.0, 0.0, 0.0),
        )

    def stage_fields(self, stage: str) -> dict[str, Any]:
        return {"perturbation": self.options.perturbation_length if self.options.perturbation else None}

    def stage_settings(self, stage: str, settings: TrainingSettings) -> TrainingSettings:
        if stage == GENERAL:
            return settings
        share = self.options.first_stage_share if len(self.chosen_stages()) > 1 else None
        if stage == TASK_PREDICTION:
            return settings.model_copy(update={"epochs": settings.epochs * (1 - (share or 0))})
        # Its head has learned nothing yet, so dev has nothing to choose by.
        return settings.model_copy(
            update={
                "epochs": settings.epochs * (1 if share is None else share),
                "evaluate_every_epoch": False,
                "early_stopping_patience": None,
            }
        )
