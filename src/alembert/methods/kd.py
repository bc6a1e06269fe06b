"""Plain knowledge distillation (Hinton et al., 2015), also into a BiLSTM (Tang et al., 2019)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from transformers import PreTrainedModel

from alembert.common.errors import InputError
from alembert.methods.base import Preset, Sources
from alembert.methods.prediction import PredictionObjective, SoftLoss
from alembert.methods.student_distillation import StudentDistillation, StudentOptions, full_model
from alembert.models.students import BILSTM, build_bilstm


class KdOptions(StudentOptions):
    """Options of plain distillation.

    Attributes:
        temperature: softens both sides; the soft term is multiplied by its square.
        hard_weight: of the labels' loss; the teacher's has 1 − hard_weight. 1 trains on the labels alone.
        soft_loss: `divergence`, `cross_entropy`, or `logits_mse` (Distilled BiLSTM, Eq. 7).
        regression_target: the `teacher`'s values, or the `labels`.
        bilstm_hidden_size: of each direction of the student `bilstm`.
    """

    temperature: float = Field(2.0, gt=0)
    hard_weight: float = Field(0.5, ge=0, le=1)
    soft_loss: SoftLoss = "divergence"
    regression_target: Literal["teacher", "labels"] = "teacher"
    bilstm_hidden_size: int = Field(150, ge=1)


class Kd(StudentDistillation[KdOptions]):
    """The student imitates the teacher's softened answers, and the labels."""

    name = "kd"
    paper = "Hinton et al., Distilling the Knowledge in a Neural Network, 2015"
    options_class = KdOptions
    conditions: ClassVar[dict[str, tuple[str, tuple[Any, ...]]]] = {
        "temperature": ("soft_loss", ("divergence", "cross_entropy")),
    }
    presets: ClassVar[dict[str, Preset]] = {
        "default": Preset(settings={"epochs": 3, "learning_rate": 2e-4}),
        "paper": Preset(
            options={"temperature": 2.0, "hard_weight": 0.1},
            settings={"epochs": 4, "learning_rate": 5e-5, "batch_size": 32},
        ),
        "code": Preset(
            options={"student": "bilstm", "soft_loss": "logits_mse", "hard_weight": 0.0},
            settings={"epochs": 30, "learning_rate": 1e-3, "batch_size": 50, "weight_decay": 0.0},
        ),
    }

    def build_model(self, sources: Sources) -> PreTrainedModel:
        options = self.options
        if options.student != BILSTM and "bilstm_hidden_size" in options.model_fields_set:
            raise InputError(
                f"bilstm_hidden_size={options.bilstm_hidden_size} is of the student bilstm, and the student is "
                f"{options.student}: leave it out, or choose --student bilstm"
            )
        return super().build_model(sources)

    def build_bilstm(self, sources: Sources) -> PreTrainedModel:
        assert sources.task is not None
        if self.options.initialise == "layers":
            raise InputError(
                "a BiLSTM cannot be initialised from layers: choose initialise=embeddings or random"
            )
        of_layers = ("student_heads", "student_intermediate_size", "init_layers")
        given = [name for name in of_layers if getattr(self.options, name) is not None]
        if given:
            raise InputError(
                f"a BiLSTM has no transformer layers, so it has no {', '.join(given)}: leave them out (its size is "
                "bilstm_hidden_size), or choose a student such as 4x312"
            )
        return build_bilstm(
            full_model(sources.teacher),
            label_names=sources.task.label_names,
            problem_type=sources.task.problem_type,
            hidden_size=self.options.bilstm_hidden_size,
            initialise=self.options.initialise or "embeddings",
        )

    def objective(self, stage: str, student: PreTrainedModel, sources: Sources) -> PredictionObjective:
        options = self.options
        assert sources.task is not None
        return PredictionObjective(
            sources.task.problem_type,
            soft_weight=1 - options.hard_weight,
            hard_weight=options.hard_weight,
            temperature=options.temperature,
            soft_loss=options.soft_loss,
            regression_target=options.regression_target,
        )
