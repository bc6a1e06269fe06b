"""MiniLMv2 (Wang et al., Findings of ACL 2021): relations of queries, keys and values, in heads split anew."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from alembert.common.errors import InputError
from alembert.losses.relation import common_relation_heads, relation_divergence
from alembert.methods.base import Preset
from alembert.methods.minilm import RelationDistillation, RelationOptions, teacher_layer
from alembert.methods.student_distillation import TASK_PREDICTION, depths, widths
from alembert.models.features import FeatureRequest, Features
from alembert.training.objective import Objective


class MiniLmV2Options(RelationOptions):
    """Options of MiniLMv2 beyond MiniLM's.

    Attributes:
        relation_heads: A_r; None = the largest number up to 48 that divides both widths.
        query_weight, key_weight, value_weight: α1, α2 and α3 of Eq. 3.
    """

    relation_heads: int | None = Field(None, ge=1)
    query_weight: float = Field(1.0, ge=0)
    key_weight: float = Field(1.0, ge=0)
    value_weight: float = Field(1.0, ge=0)


class MiniLmV2Objective(Objective):
    """α1 L_QQ + α2 L_KK + α3 L_VV (MiniLMv2, Eq. 3–5).

    Raises InputError for depths, a number of relation heads that does not divide both widths, and when no term is
    left.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, options: MiniLmV2Options) -> None:
        super().__init__()
        student_layers, teacher_layers = depths(student, teacher)
        student_width, teacher_width = widths(student, teacher)
        self.relation_heads = options.relation_heads or common_relation_heads(
            student_width, teacher_width, 48
        )
        # A number that does not fit is refused here, before a run begins.
        relation_divergence(
            torch.zeros(1, 1, 1, student_width),
            torch.zeros(1, 1, 1, teacher_width),
            torch.ones(1, 1),
            self.relation_heads,
        )
        self.weights = {
            "queries": options.query_weight,
            "keys": options.key_weight,
            "values": options.value_weight,
        }
        if not any(self.weights.values()):
            raise InputError(
                "query_weight, key_weight and value_weight are all 0: leave the intermediate stage out with "
                f"--stages {TASK_PREDICTION}"
            )
        self.student_layer, self.teacher_layer = student_layers, teacher_layer(options, teacher_layers)
        kinds = [kind for kind, weight in self.weights.items() if weight]
        self.student_request = FeatureRequest(**dict.fromkeys(kinds, (self.student_layer,)))
        self.teacher_request = FeatureRequest(**dict.fromkeys(kinds, (self.teacher_layer,)))

    def forward(
        self, student: Features, teacher: Features | None, labels: Tensor | None
    ) -> dict[str, Tensor]:
        assert teacher is not None
        return {
            kind: weight
            * relation_divergence(
                getattr(student, kind)[self.student_layer],
                getattr(teacher, kind)[self.teacher_layer],
                student.attention_mask,
                self.relation_heads,
            )
            for kind, weight in self.weights.items()
            if weight
        }


class MiniLmV2(RelationDistillation[MiniLmV2Options]):
    """Query, key and value relations of one layer, whatever the numbers of heads."""

    name = "minilm-v2"
    paper = "Wang et al., MiniLMv2: Multi-Head Self-Attention Relation Distillation, Findings of ACL 2021"
    options_class = MiniLmV2Options
    presets: ClassVar[dict[str, Preset]] = {
        "default": Preset(
            settings={"epochs": 3, "learning_rate": 2e-4},
            general_settings={"epochs": 1, "learning_rate": 5e-4},
        ),
        "paper": Preset(
            options={"hard_weight": 1.0, "initialise": "random", "intermediate_learning_rate": 6e-4},
            settings={"epochs": 3, "learning_rate": 3e-5, "batch_size": 32},
            general_settings={"epochs": 1, "learning_rate": 6e-4, "batch_size": 256},
        ),
    }

    def relations(self, student: PreTrainedModel, teacher: PreTrainedModel) -> MiniLmV2Objective:
        return MiniLmV2Objective(student, teacher, self.options)
