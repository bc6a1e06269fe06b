"""BERT-PKD (Sun et al., EMNLP 2019): patient distillation of the first token's hidden states."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from alembert.losses.hidden import normalised_cls_mse
from alembert.methods.base import Preset, Sources
from alembert.methods.prediction import PredictionObjective
from alembert.methods.student_distillation import StudentDistillation, StudentOptions, depths, widths
from alembert.methods.width import check_equal_widths
from alembert.models.features import FeatureRequest, Features
from alembert.models.layer_mapping import pkd_layers
from alembert.models.projections import HiddenProjection
from alembert.training.objective import Objective


class PkdOptions(StudentOptions):
    """Options of BERT-PKD.

    Attributes:
        strategy: the teacher's layers that the student's layers 1 … M−1 follow: `skip` every few, or the `last`.
        hard_weight: 1 − α of Eq. 8, of the labels' loss; the teacher's has the rest.
        temperature: T of the soft term, which is multiplied by T².
        patient_weight: β of Eq. 8.
        normalise: whether the states are scaled to length 1 first, as in Eq. 7.
        reduction: of Eq. 7 over layers and width: the `sum` as printed, or the `mean` as in the published code.
        project: whether a learnable map brings the student's states to the teacher's width where the two differ.
    """

    strategy: Literal["skip", "last"] = "skip"
    hard_weight: float = Field(0.5, ge=0, le=1)
    temperature: float = Field(5.0, gt=0)
    patient_weight: float = Field(1.0, ge=0)
    normalise: bool = True
    reduction: Literal["sum", "mean"] = "sum"
    project: bool = False


class PkdObjective(Objective):
    """(1 − α) L_CE + α L_DS + β L_PT (BERT-PKD, Eq. 8). Raises InputError for widths that differ, unprojected."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        problem_type: str,
        options: PkdOptions,
    ) -> None:
        super().__init__()
        self.options = options
        self.prediction = PredictionObjective(
            problem_type,
            soft_weight=1 - options.hard_weight,
            hard_weight=options.hard_weight,
            temperature=options.temperature,
        )
        self.pairs = pkd_layers(options.strategy, *depths(student, teacher))
        self.student_request = FeatureRequest(hidden_states=tuple(m for m, _ in self.pairs))
        self.teacher_request = FeatureRequest(hidden_states=tuple(g for _, g in self.pairs))
        self.projection: HiddenProjection | None = None
        if options.project:
            self.projection = HiddenProjection(
                *widths(student, teacher),
                layers=self.student_request.hidden_states,
                sharing="per_layer",
                when_equal=False,
            )
        else:
            check_equal_widths(student, teacher)

    def forward(
        self, student: Features, teacher: Features | None, labels: Tensor | None
    ) -> dict[str, Tensor]:
        assert teacher is not None
        terms: dict[str, Tensor] = self.prediction(student, teacher, labels)
        states = [
            (self._state(student.hidden_states[m][:, 0], m), teacher.hidden_states[g][:, 0])
            for m, g in self.pairs
        ]
        distances = torch.stack([self._distance(own, target) for own, target in states])
        patient = distances.sum() if self.options.reduction == "sum" else distances.mean()
        return terms | {"patient": self.options.patient_weight * patient}

    def _state(self, vectors: Tensor, layer: int) -> Tensor:
        return vectors if self.projection is None else self.projection(vectors, layer)

    def _distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.options.normalise:
            return normalised_cls_mse(student, teacher, reduction=self.options.reduction)
        squared = (student.float() - teacher.float()).square()
        return (squared.sum(-1) if self.options.reduction == "sum" else squared.mean(-1)).mean()


class Pkd(StudentDistillation[PkdOptions]):
    """The student's first-token states follow those of chosen teacher layers."""

    name = "pkd"
    paper = "Sun et al., Patient Knowledge Distillation for BERT Model Compression, EMNLP 2019"
    options_class = PkdOptions
    serves: ClassVar[dict[str, tuple[str, ...]]] = dict.fromkeys(
        ("strategy", "normalise", "reduction"), ("patient_weight",)
    )
    presets: ClassVar[dict[str, Preset]] = {
        "default": Preset(settings={"epochs": 3, "learning_rate": 2e-4}),
        "paper": Preset(
            options={"hard_weight": 0.5, "temperature": 10.0, "patient_weight": 100.0, "reduction": "mean"},
            settings={"epochs": 4, "learning_rate": 5e-5, "batch_size": 32},
        ),
        "code": Preset(
            options={"hard_weight": 0.3, "temperature": 10.0, "patient_weight": 100.0, "reduction": "mean"},
            settings={"epochs": 4, "learning_rate": 5e-5, "batch_size": 32},
        ),
    }

    def objective(self, stage: str, student: PreTrainedModel, sources: Sources) -> PkdObjective:
        assert sources.task is not None
        return PkdObjective(student, sources.teacher, sources.task.problem_type, self.options)
