"""MS-BERT (Huang et al., CollaborateCom 2021): every exit learns from all layers, weighted by transport distance."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from alembert.data.task import Task
from alembert.losses.prediction import task_loss
from alembert.losses.self_distillation import ms_bert_loss
from alembert.losses.transport import class_ground_cost
from alembert.methods.base import Preset, Sources
from alembert.methods.self_distillation import ExitOptions, SelfDistillation, SelfDistillationObjective
from alembert.models.features import Features
from alembert.models.multi_exit import MultiExitModel, MultiExitOutput
from alembert.training.objective import Objective
from alembert.training.settings import TrainingSettings
from alembert.training.stage import Stage


class MsBertOptions(ExitOptions):
    """Options of MS-BERT beyond those of every self-distillation.

    Attributes:
        emd: distance of Eq. 5: `sorted` (exact 1-D Wasserstein), `histogram` (pyemd's emd_samples), `class_aware`
            (probability mass moved between classes), or `auto` (`class_aware` for single-label tasks, else `sorted`).
        weighting: of the layers in Eq. 6: `paper` (by distance, not normalised), `normalised`, or `inverse`
            (closer layers weigh more).
        teacher_weight: λ of Eq. 7.
        teacher_logits: where the layers' logits come from: `shared_head` (the frozen final head on every
            layer), `deep_supervision` (a linear head per layer, trained on the labels first) or `branches` (the
            exits' own answers, where a layer has an exit).
        scope: a distance per `example`, or one per `batch`.
        values: distances between `logits` or `probabilities`; the targets mix logits either way.
        weighting_temperature: of `normalised` and `inverse`; larger is more even.
        ground_cost: for `class_aware`: `uniform`, or `classifier` (distance between the classes' output weights).
    """

    emd: Literal["auto", "sorted", "histogram", "class_aware"] = "auto"
    weighting: Literal["paper", "normalised", "inverse"] = "inverse"
    teacher_weight: float = Field(1.0, ge=0)
    teacher_logits: Literal["shared_head", "deep_supervision", "branches"] = "shared_head"
    scope: Literal["example", "batch"] = "example"
    values: Literal["logits", "probabilities"] = "logits"
    weighting_temperature: float = Field(1.0, gt=0)
    ground_cost: Literal["uniform", "classifier"] = "uniform"

    def distance(self, problem_type: str) -> str:
        """The distance to use: `auto` is between classes where these exclude each other, else between sorted values."""
        if self.emd != "auto":
            return self.emd
        between_classes = self.scope == "example" and self.values == "logits"
        return (
            "class_aware" if between_classes and problem_type == "single_label_classification" else "sorted"
        )


class MsBertObjective(SelfDistillationObjective):
    """Σ_j KL(p_sj ‖ p_t^j), with p_t^j mixed from all layers (MS-BERT, Eq. 5–10)."""

    student_arguments: ClassVar[dict[str, Any]] = {"output_layer_logits": True}

    def __init__(
        self,
        exits: tuple[int, ...],
        problem_type: str,
        options: MsBertOptions,
        ground_cost: Tensor | None = None,
    ) -> None:
        super().__init__(exits, problem_type)
        self.options = options
        self.ground_cost: Tensor | None
        self.register_buffer("ground_cost", ground_cost)
        # Options that do not go together are refused here, before a run begins.
        labels = 2 if ground_cost is None else len(ground_cost)
        number = len(exits)
        self._loss(torch.zeros(number, 1, labels), torch.zeros(number + 1, 1, labels))

    def exit_losses(self, exit_logits: Tensor, output: MultiExitOutput) -> Tensor:
        return self._loss(exit_logits, self.teacher_layer_logits(exit_logits, output))

    def _loss(self, exit_logits: Tensor, layer_logits: Tensor) -> Tensor:
        options = self.options
        return ms_bert_loss(
            exit_logits,
            layer_logits,
            emd=options.distance(self.problem_type),
            weighting=options.weighting,
            teacher_weight=options.teacher_weight,
            scope=options.scope,
            values=options.values,
            weighting_temperature=options.weighting_temperature,
            ground_cost=self.ground_cost,
            own_layers=options.teacher_logits == "branches",
            kl=options.kl,
            temperature=options.temperature,
            problem_type=self.problem_type,
        )

    def teacher_layer_logits(self, exit_logits: Tensor, output: MultiExitOutput) -> Tensor:
        """z_i^T (layers, rows, labels), the full model last: all N layers, or those with exits for `branches`."""
        assert output.layer_logits is not None
        if self.options.teacher_logits == "branches":
            return torch.cat([exit_logits.detach(), output.layer_logits[-1:]])
        return output.layer_logits


class LayerHeadsObjective(Objective):
    """Deep supervision: Σ_i<N task loss of layer i's own head against the labels."""

    student_arguments: ClassVar[dict[str, Any]] = {"output_layer_logits": True}

    def __init__(self, problem_type: str) -> None:
        super().__init__()
        self.problem_type = problem_type

    def forward(
        self, student: Features, teacher: Features | None, labels: Tensor | None
    ) -> dict[str, Tensor]:
        assert labels is not None
        layers = student.output.layer_logits[:-1]
        return {
            f"layer_{i}": task_loss(logits, labels, self.problem_type) for i, logits in enumerate(layers, 1)
        }


class MsBert(SelfDistillation[MsBertOptions]):
    """Frozen backbone, spliced exits, targets mixed from all layers by transport distance."""

    name = "ms-bert"
    paper = "Huang et al., MS-BERT: a Multi-layer Self-distillation Approach for BERT Compression, CollaborateCom 2021"
    options_class = MsBertOptions
    conditions: ClassVar[dict[str, tuple[str, tuple[Any, ...]]]] = {
        **SelfDistillation.conditions,
        "weighting_temperature": ("weighting", ("normalised", "inverse")),
        "values": ("emd", ("auto", "sorted", "histogram")),
    }
    presets: ClassVar[dict[str, Preset]] = {
        "default": Preset(settings={"epochs": 5, "learning_rate": 1e-3}),
        "paper": Preset(
            options={"emd": "histogram", "weighting": "paper", "placement": "every_k"},
            settings={"epochs": 5, "learning_rate": 2e-5, "batch_size": 16},
        ),
        "code": Preset(
            options={"emd": "histogram", "weighting": "paper", "kl": "teacher||student"},
            settings={"epochs": 5, "learning_rate": 2e-4, "batch_size": 16, "weight_decay": 0.0},
        ),
    }

    def build_model(self, sources: Sources) -> MultiExitModel:
        model = super().build_model(sources)
        if self.options.teacher_logits == "deep_supervision":
            model.add_layer_heads()
        return model

    def objective(self, model: MultiExitModel, task: Task) -> MsBertObjective:
        ground_cost = None
        if self.options.ground_cost == "classifier":
            ground_cost = class_ground_cost(model.output_weight().detach())
        return MsBertObjective(model.exit_layers, task.problem_type, self.options, ground_cost)

    def stages(self, model: PreTrainedModel, sources: Sources, settings: TrainingSettings) -> list[Stage]:
        stages = super().stages(model, sources, settings)
        if self.options.teacher_logits == "deep_supervision":
            # The exits do not move yet, so their dev score says nothing about these heads.
            whole = settings.model_copy(
                update={"evaluate_every_epoch": False, "early_stopping_patience": None}
            )
            assert sources.task is not None
            heads = LayerHeadsObjective(sources.task.problem_type)
            # On the task's own rows: labels of others need not be true.
            stages.insert(0, Stage("layer-heads", heads, whole, ("layer_heads.",)))
        return stages

    def finish(self, model: PreTrainedModel) -> None:
        assert isinstance(model, MultiExitModel)
        model.remove_layer_heads()
