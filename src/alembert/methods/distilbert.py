"""DistilBERT (Sanh et al., 2019): soft targets, masked words and the direction of the last hidden states."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alembert.common.errors import InputError
from alembert.losses.hidden import hidden_state_cosine
from alembert.losses.prediction import kl_divergence, masked_language_modelling_loss
from alembert.methods.base import Preset, Sources
from alembert.methods.prediction import PredictionObjective
from alembert.methods.student_distillation import (
    GENERAL,
    TASK_PREDICTION,
    StudentDistillation,
    StudentOptions,
    depths,
    widths,
)
from alembert.methods.width import check_equal_widths
from alembert.models.features import FeatureRequest, Features
from alembert.models.projections import HiddenProjection
from alembert.training.objective import Objective

_NOT_A_TARGET = -100


class DistilBertOptions(StudentOptions):
    """Options of DistilBERT.

    Attributes:
        soft_weight, hard_weight, cosine_weight: of the teacher's answers, of the labels (in the general stage: of the
            masked words), and of the last hidden states' direction.
        temperature: of the soft term, which is multiplied by its square.
        masked_share: share of the tokens that the general stage masks; of these 80% become the mask token, 10% a
            random one, 10% stay.
        masked_only: whether the general stage compares answers at masked tokens only, not at all of them.
        project: whether a learnable map brings the student's states to the teacher's width where the two differ.
    """

    soft_weight: float = Field(5.0, ge=0)
    hard_weight: float = Field(2.0, ge=0)
    cosine_weight: float = Field(1.0, ge=0)
    temperature: float = Field(2.0, gt=0)
    masked_share: float = Field(0.15, gt=0, lt=1)
    masked_only: bool = False
    project: bool = False


def check_weights(options: DistilBertOptions) -> None:
    """Raises InputError when no term is left."""
    if not (options.soft_weight or options.hard_weight or options.cosine_weight):
        raise InputError(
            "soft_weight, hard_weight and cosine_weight are all 0: nothing is left to learn from"
        )


class DistilBertObjective(Objective):
    """5 · L_soft + 2 · L_hard + 1 · L_cos on a task; the hard loss takes the masked words' place.

    Raises InputError for widths that differ, unprojected.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        problem_type: str,
        options: DistilBertOptions,
    ) -> None:
        super().__init__()
        check_weights(options)
        self.prediction = PredictionObjective(
            problem_type,
            soft_weight=options.soft_weight,
            hard_weight=options.hard_weight,
            temperature=options.temperature,
        )
        self.cosine = LastLayerCosine(student, teacher, options)
        self.student_request, self.teacher_request = self.cosine.requests()

    def forward(
        self, student: Features, teacher: Features | None, labels: Tensor | None
    ) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = self.prediction(student, teacher, labels)
        cosine: dict[str, Tensor] = self.cosine(student, teacher, labels)
        return terms | cosine


class MaskedLanguageObjective(Objective):
    """5 · KL of the words' distributions + 2 · L_mlm + 1 · L_cos on plain text.

    Raises InputError for a tokenizer without a mask token, for vocabularies of different sizes, and for widths that
    differ, unprojected.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        options: DistilBertOptions,
    ) -> None:
        super().__init__()
        check_weights(options)
        if tokenizer.mask_token_id is None:
            raise InputError(
                "the teacher's tokenizer has no mask token, which masked language modelling needs"
            )
        own, other = int(student.config.vocab_size), int(teacher.config.vocab_size)
        if own != other:
            raise InputError(
                f"the student gives answers for {own} tokens, the teacher for {other}, and this stage compares them "
                f"token by token: set vocab_size to {other} in the student's config.json, or choose a shape such as "
                "4x312"
            )
        self.options = options
        self.mask_token_id = int(tokenizer.mask_token_id)
        self.vocabulary = own
        self.special: Tensor
        self.register_buffer("special", torch.tensor(sorted(tokenizer.all_special_ids)), persistent=False)
        self.cosine = LastLayerCosine(student, teacher, options)
        self.student_request, self.teacher_request = self.cosine.requests()

    def prepare(
        self, inputs: dict[str, Tensor], labels: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Masks words by the global random state, which checkpoints keep."""
        ids = inputs["input_ids"]
        candidates = ~torch.isin(ids, self.special)
        chosen = candidates & (torch.rand(ids.shape, device=ids.device) < self.options.masked_share)
        fate = torch.rand(ids.shape, device=ids.device)
        masked = torch.where(chosen & (fate < 0.8), self.mask_token_id, ids)
        random_ids = torch.randint(self.vocabulary, ids.shape, device=ids.device)
        masked = torch.where(chosen & (fate >= 0.9), random_ids, masked)
        return {**inputs, "input_ids": masked}, torch.where(chosen, ids, _NOT_A_TARGET)

    def forward(
        self, student: Features, teacher: Features | None, labels: Tensor | None
    ) -> dict[str, Tensor]:
        assert teacher is not None
        assert labels is not None
        assert student.logits is not None
        assert teacher.logits is not None
        options = self.options
        compared = (labels != _NOT_A_TARGET) if options.masked_only else student.attention_mask.bool()
        soft = kl_divergence(
            student.logits[compared],
            teacher.logits[compared],
            "teacher||student",
            options.temperature,
            reduction="none",
        )
        terms = {
            "soft": options.soft_weight * soft.sum() / max(1, soft.numel()),
            "masked_words": options.hard_weight * masked_language_modelling_loss(student.logits, labels),
        }
        cosine: dict[str, Tensor] = self.cosine(student, teacher, labels)
        return terms | cosine


class LastLayerCosine(Objective):
    """w · mean over tokens of 1 − cos(student's last hidden state, teacher's)."""

    def __init__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, options: DistilBertOptions
    ) -> None:
        super().__init__()
        self.weight = options.cosine_weight
        self.layers = (0, 0)
        self.projection: HiddenProjection | None = None
        if not self.weight:
            return
        self.layers = depths(student, teacher)
        if options.project:
            self.projection = HiddenProjection(
                *widths(student, teacher), layers=(self.layers[0],), when_equal=False
            )
        else:
            check_equal_widths(student, teacher)

    def requests(self) -> tuple[FeatureRequest, FeatureRequest]:
        """What is read of the student and of the teacher."""
        if not self.weight:
            return FeatureRequest(), FeatureRequest()
        own, other = self.layers
        return FeatureRequest(hidden_states=(own,)), FeatureRequest(hidden_states=(other,))

    def forward(
        self, student: Features, teacher: Features | None, labels: Tensor | None
    ) -> dict[str, Tensor]:
        if not self.weight:
            return {}
        assert teacher is not None
        own, target = student.hidden_states[self.layers[0]], teacher.hidden_states[self.layers[1]]
        if self.projection is not None:
            own = self.projection(own, self.layers[0])
        return {"cosine": self.weight * hidden_state_cosine(own, target, student.attention_mask)}


class DistilBert(StudentDistillation[DistilBertOptions]):
    """Stages: `general`, masked words of plain text, and `task-prediction`."""

    name = "distilbert"
    paper = "Sanh et al., DistilBERT, a distilled version of BERT, NeurIPS 2019 workshop EMC²"
    options_class = DistilBertOptions
    stage_names = (GENERAL, TASK_PREDICTION)
    general_stages = (GENERAL,)
    general_head = "masked_lm"
    options_of_stages: ClassVar[dict[str, tuple[str, ...]]] = {GENERAL: ("masked_share", "masked_only")}
    serves: ClassVar[dict[str, tuple[str, ...]]] = {
        "temperature": ("soft_weight",),
        "project": ("cosine_weight",),
    }
    presets: ClassVar[dict[str, Preset]] = {
        "default": Preset(settings={"epochs": 3, "learning_rate": 2e-4}),
        "paper": Preset(
            options={"initialise": "layers"},
            settings={"epochs": 3, "learning_rate": 5e-5, "batch_size": 32},
            general_settings={"learning_rate": 5e-4, "weight_decay": 0.0, "warmup_ratio": 0.05},
        ),
        "code": Preset(
            options={"initialise": "layers"},
            settings={"epochs": 3, "learning_rate": 5e-5, "batch_size": 32},
            general_settings={
                "learning_rate": 5e-4,
                "weight_decay": 0.0,
                "warmup_ratio": 0.05,
                "max_grad_norm": 5.0,
                "batch_size": 250,
                "gradient_accumulation_steps": 50,
            },
        ),
    }

    def objective(self, stage: str, student: PreTrainedModel, sources: Sources) -> Objective:
        if stage == GENERAL:
            return MaskedLanguageObjective(student, sources.teacher, sources.tokenizer, self.options)
        assert sources.task is not None
        return DistilBertObjective(student, sources.teacher, sources.task.problem_type, self.options)
