"""BERT-EMD (Li et al., EMNLP 2020): every student layer learns from every teacher layer, as transport decides."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn
from transformers import PreTrainedModel

from alembert.common.errors import InputError
from alembert.losses.hidden import hidden_state_mse
from alembert.losses.layer_transport import (
    attention_score_distances,
    cost_attention,
    hidden_state_distances,
    layer_flow,
    transport_cost,
)
from alembert.methods.base import Preset, Sources
from alembert.methods.prediction import PredictionObjective, SoftLoss
from alembert.methods.student_distillation import (
    StudentDistillation,
    StudentOptions,
    check_equal_heads,
    depths,
    widths,
)
from alembert.models.features import FeatureRequest, Features
from alembert.models.projections import HiddenProjection
from alembert.training.objective import Objective
from alembert.training.processes import mean_over_processes


class BertEmdOptions(StudentOptions):
    """Options of BERT-EMD.

    Attributes:
        beta: weight of attention, hidden states and embeddings together, beside the prediction's 1.
        theta: weight of attention and hidden states within beta.
        attention, hidden, embedding, prediction: whether the loss has L_attn, L_hidn, L_embd and L_pred.
        cost_attention: whether the layers' weights follow their cost; else they stay even.
        cost_attention_form: softmax(u / τ) as printed (`paper`), or u / Σu as in the later published `code`.
        cost_attention_temperature: τ of the form `paper`.
        separate: whether attention and hidden states have weights of their own; else both use the mean of the two.
        projection: W of the hidden states: one `shared` by embeddings and all layers, or one `per_layer`.
        temperature: T of L_pred, which is multiplied by T².
        soft_loss: of L_pred: `cross_entropy`, `divergence` or `logits_mse`.
        hard_weight: of the labels' loss beside L_pred.
        regression_target: the `teacher`'s values, or the `labels`.
    """

    beta: float = Field(0.01, ge=0)
    theta: float = Field(1.0, ge=0)
    attention: bool = True
    hidden: bool = True
    embedding: bool = True
    prediction: bool = True
    cost_attention: bool = True
    cost_attention_form: Literal["paper", "code"] = "code"
    cost_attention_temperature: float = Field(1.0, gt=0)
    separate: bool = False
    projection: Literal["shared", "per_layer"] = "shared"
    temperature: float = Field(1.0, gt=0)
    soft_loss: SoftLoss = "cross_entropy"
    hard_weight: float = Field(0.0, ge=0)
    regression_target: Literal["teacher", "labels"] = "teacher"

    @field_validator("cost_attention_temperature")
    @classmethod
    def _has_a_part(cls, value: float, info: ValidationInfo) -> float:
        if value != 1 and info.data.get("cost_attention_form") == "code":
            raise ValueError(
                "it has a part in softmax(u / τ) alone, not in u / Σu; set cost_attention_form=paper, or leave it out"
            )
        return value


class LayerWeights(nn.Module):
    """w^S (M,) and w^T (N,), how much of the transport starts and ends at each layer; both sum to 1."""

    student: Tensor
    teacher: Tensor

    def __init__(self, student_layers: int, teacher_layers: int) -> None:
        super().__init__()
        self.register_buffer("student", torch.full((student_layers,), 1 / student_layers))
        self.register_buffer("teacher", torch.full((teacher_layers,), 1 / teacher_layers))

    def both(self) -> tuple[Tensor, Tensor]:
        """w^S and w^T."""
        return self.student, self.teacher

    def update(self, student: Tensor, teacher: Tensor) -> None:
        """Takes over new weights."""
        self.student.copy_(student)
        self.teacher.copy_(teacher)


class BertEmdObjective(Objective):
    """β (θ (EMD_attn + EMD_hidn) + L_embd) + L_pred (BERT-EMD, Eq. 2–12); flows and weights carry no gradient.

    The weights are buffers: checkpointed, and equal in all processes, since the distances that they follow from
    are averaged over processes first.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        problem_type: str,
        options: BertEmdOptions,
    ) -> None:
        super().__init__()
        compared = options.attention or options.hidden or options.embedding
        if not (compared or options.prediction or options.hard_weight):
            raise InputError(
                "attention, hidden, embedding and prediction are all off: nothing is left to learn from"
            )
        self.options = options
        self.prediction = PredictionObjective(
            problem_type,
            soft_weight=float(options.prediction),
            hard_weight=options.hard_weight,
            temperature=options.temperature,
            soft_loss=options.soft_loss,
            regression_target=options.regression_target,
        )
        layers = self.student_layers, self.teacher_layers = depths(student, teacher)
        if options.attention:
            check_equal_heads(student, teacher, "compare no attention (--set attention=false)")
        hidden = tuple(range(1, self.student_layers + 1))
        teacher_hidden = tuple(range(1, self.teacher_layers + 1))
        zero = (0,) * options.embedding
        self.student_request = FeatureRequest(
            hidden_states=zero + hidden * options.hidden, attention_scores=hidden * options.attention
        )
        self.teacher_request = FeatureRequest(
            hidden_states=zero + teacher_hidden * options.hidden,
            attention_scores=teacher_hidden * options.attention,
        )
        self.projection: HiddenProjection | None = None
        if options.hidden or options.embedding:
            self.projection = HiddenProjection(
                *widths(student, teacher),
                layers=self.student_request.hidden_states,
                sharing=options.projection,
            )
        kinds = [kind for kind in ("attention", "hidden") if getattr(options, kind)]
        self.weights = nn.ModuleDict({kind: LayerWeights(*layers) for kind in kinds})
        self._flows: dict[str, Tensor] = {}

    def forward(
        self, student: Features, teacher: Features | None, labels: Tensor | None
    ) -> dict[str, Tensor]:
        assert teacher is not None
        options, mask = self.options, student.attention_mask
        distances = {}
        if options.attention:
            distances["attention"] = attention_score_distances(
                self._layers(student.attention_scores, self.student_layers),
                self._layers(teacher.attention_scores, self.teacher_layers),
                mask,
            )
        if options.hidden:
            distances["hidden"] = hidden_state_distances(
                [self._project(student, m) for m in range(1, self.student_layers + 1)],
                self._layers(teacher.hidden_states, self.teacher_layers),
                mask,
            )
        terms = {
            kind: options.beta * options.theta * transport_cost(flow, distances[kind])
            for kind, flow in self._solve(distances).items()
        }
        if options.embedding:
            embedding = hidden_state_mse(self._project(student, 0), teacher.hidden_states[0], mask)
            terms["embedding"] = options.beta * embedding
        predictions: dict[str, Tensor] = self.prediction(student, teacher, labels)
        return terms | predictions

    def snapshot(self) -> dict[str, Any] | None:
        return {
            kind: {
                "flow": [_rounded(row) for row in flow],
                "student_weights": _rounded(self._weights(kind).student),
                "teacher_weights": _rounded(self._weights(kind).teacher),
            }
            for kind, flow in self._flows.items()
        }

    @torch.no_grad()
    def _solve(self, distances: dict[str, Tensor]) -> dict[str, Tensor]:
        """The flow of each kind of feature under the present weights, which are brought up to date afterwards."""
        costs = {kind: mean_over_processes(distance.detach().float()) for kind, distance in distances.items()}
        flows = {kind: layer_flow(cost, *self._weights(kind).both()) for kind, cost in costs.items()}
        if flows and self.options.cost_attention:
            updated = {kind: self._updated(kind, flows[kind], costs[kind]) for kind in flows}
            if not self.options.separate:
                mean = [torch.stack(side).mean(dim=0) for side in zip(*updated.values(), strict=True)]
                updated = dict.fromkeys(updated, (mean[0], mean[1]))
            for kind, (student, teacher) in updated.items():
                self._weights(kind).update(student, teacher)
        self._flows = flows
        return flows

    def _updated(self, kind: str, flow: Tensor, cost: Tensor) -> tuple[Tensor, Tensor]:
        student, teacher = self._weights(kind).both()
        form, temperature = self.options.cost_attention_form, self.options.cost_attention_temperature
        return (
            cost_attention(flow, cost, student, side="student", temperature=temperature, form=form),
            cost_attention(flow, cost, teacher, side="teacher", temperature=temperature, form=form),
        )

    def _weights(self, kind: str) -> LayerWeights:
        weights = self.weights[kind]
        assert isinstance(weights, LayerWeights)
        return weights

    def _project(self, student: Features, layer: int) -> Tensor:
        assert self.projection is not None
        projected: Tensor = self.projection(student.hidden_states[layer], layer)
        return projected

    def _layers(self, features: dict[int, Tensor], layers: int) -> list[Tensor]:
        return [features[layer] for layer in range(1, layers + 1)]


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 5) for value in values.tolist()]


class BertEmd(StudentDistillation[BertEmdOptions]):
    """One stage: many-to-many layers, weighted by cost attention, and the prediction."""

    name = "bert-emd"
    paper = "Li et al., BERT-EMD: Many-to-Many Layer Mapping for BERT Compression with EMD, EMNLP 2020"
    options_class = BertEmdOptions
    conditions: ClassVar[dict[str, tuple[str, tuple[Any, ...]]]] = {
        "cost_attention_form": ("cost_attention", (True,)),
        "cost_attention_temperature": ("cost_attention", (True,)),
        "separate": ("cost_attention", (True,)),
        "temperature": ("soft_loss", ("divergence", "cross_entropy")),
    }
    serves: ClassVar[dict[str, tuple[str, ...]]] = {
        "theta": ("attention", "hidden"),
        "cost_attention": ("attention", "hidden"),
        "projection": ("hidden", "embedding"),
        "soft_loss": ("prediction",),
        "temperature": ("prediction",),
    }
    presets: ClassVar[dict[str, Preset]] = {
        "default": Preset(settings={"epochs": 3, "learning_rate": 2e-4}),
        "paper": Preset(
            options={"cost_attention_form": "paper", "beta": 0.01},
            settings={"epochs": 10, "learning_rate": 3e-5, "batch_size": 32},
        ),
        "code": Preset(
            options={"cost_attention_form": "code", "beta": 0.01},
            settings={"epochs": 10, "learning_rate": 3e-5, "batch_size": 32, "max_length": 64},
        ),
    }

    def objective(self, stage: str, student: PreTrainedModel, sources: Sources) -> BertEmdObjective:
        assert sources.task is not None
        return BertEmdObjective(student, sources.teacher, sources.task.problem_type, self.options)
