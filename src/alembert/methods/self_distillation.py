"""What all methods of exits share: their places and heads, one backbone pass a batch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from alembert.data.task import Task
from alembert.methods.base import Method, MethodOptions, Sources
from alembert.models.features import Features
from alembert.models.layered import LayeredEncoder
from alembert.models.multi_exit import MultiExitModel, MultiExitOutput
from alembert.models.placement import exit_layers
from alembert.training.objective import Objective
from alembert.training.settings import TrainingSettings
from alembert.training.stage import Stage

EXITS = ("exit_heads.", "learned_exit.")
"""Prefixes of the names of all that belongs to the exits."""
ExitWeights = Literal["depth", "uniform"]


class PlacementOptions(MethodOptions):
    """Options of every method that trains exits.

    Attributes:
        placement: splicing strategy: `every_k`, `last_k` or `all` (MS-BERT, Fig. 2).
        k: of the placement; None = 2 for `every_k`, half the layers for `last_k`.
        layers: explicit exit layers instead of a placement.
        exit_head: `fastbert`, `pooled`, `linear` or `mean`.
        exit_head_size: inner width of FastBERT heads.
        learned_exit: also train the layer that foresees an exit's mistakes (BERxiT), for the `learned` policy.
    """

    placement: Literal["every_k", "last_k", "all"] = "every_k"
    k: int | None = None
    layers: tuple[int, ...] | None = None
    exit_head: Literal["fastbert", "pooled", "linear", "mean"] = "fastbert"
    exit_head_size: int = Field(128, ge=2)
    learned_exit: bool = False


class ExitOptions(PlacementOptions):
    """Options of every method whose exits learn from the full model's answers.

    Attributes:
        kl: direction of the divergence; "student||teacher" is KL(p_s ‖ p_t).
        temperature: softens both sides; the loss is scaled by its square.
    """

    kl: Literal["student||teacher", "teacher||student", "symmetric"] = "student||teacher"
    temperature: float = Field(1.0, gt=0)


class SelfDistillationObjective(Objective):
    """Sum over the exits of a per-exit loss, one logged term each, plus the learned exit's where there is one."""

    def __init__(self, exits: tuple[int, ...], problem_type: str) -> None:
        super().__init__()
        self.exits, self.problem_type = exits, problem_type

    @abstractmethod
    def exit_losses(self, exit_logits: Tensor, output: MultiExitOutput) -> Tensor:
        """Losses (E,) from exit logits (E, rows, labels) and the frozen side of the output."""

    def forward(
        self, student: Features, teacher: Features | None, labels: Tensor | None
    ) -> dict[str, Tensor]:
        output: MultiExitOutput = student.output
        assert output.exit_logits is not None
        losses = self.exit_losses(output.exit_logits, output)
        terms = {f"exit_{layer}": loss for layer, loss in zip(self.exits, losses, strict=True)}
        return terms | learned_exit_term(output, output.logits, self.problem_type)


def learned_exit_term(
    output: MultiExitOutput, answers: Tensor | None, problem_type: str
) -> dict[str, Tensor]:
    """`mistake_loss` against `answers` by its name among the terms; nothing where the model has no learned exit."""
    if output.mistake_logits is None:
        return {}
    assert output.exit_logits is not None and answers is not None
    loss = mistake_loss(output.mistake_logits, output.exit_logits, answers, problem_type)
    return {"learned_exit": loss}


class JointObjective(Objective):
    """An objective in which all exits have weights that sum to 1, the full model's own answer being the last exit.

    Args:
        exits: layers of the exits.
        num_layers: of the full model.
        problem_type: transformers' problem type.
        exit_weights: equal (`uniform`), or by the layer's number (`depth`).
    """

    def __init__(
        self, exits: tuple[int, ...], num_layers: int, problem_type: str, exit_weights: ExitWeights
    ) -> None:
        super().__init__()
        self.layers, self.problem_type = (*exits, num_layers), problem_type
        weights = [layer if exit_weights == "depth" else 1 for layer in self.layers]
        self.weights = [weight / sum(weights) for weight in weights]

    def weighted(self, output: MultiExitOutput) -> Iterator[tuple[int, float, Tensor]]:
        """Layer, weight and logits (rows, labels) of every exit, the full model's last."""
        assert output.logits is not None
        exit_logits = [] if output.exit_logits is None else list(output.exit_logits)
        yield from zip(self.layers, self.weights, [*exit_logits, output.logits], strict=True)


def mistake_loss(mistake_logits: Tensor, exit_logits: Tensor, logits: Tensor, problem_type: str) -> Tensor:
    """BERxiT's learning-to-exit loss (Xin et al., EACL 2021, section 3.2).

    MSE between sigmoid(mistake_logits) (E, rows) and 1 where an exit's answer differs from that of `logits`: the full
    model's, where there are no labels, or `labels_as_logits`, as printed. For regression the target is
    |tanh(ŷ_exit − ŷ)|. Mean over exits and rows; no gradient reaches the exits.
    """
    exit_logits, logits = exit_logits.detach(), logits.detach()
    if problem_type == "regression":
        target = torch.tanh(exit_logits - logits).abs()[..., 0]
    elif problem_type == "multi_label_classification":
        target = ((exit_logits > 0) != (logits > 0)).any(-1).float()
    else:
        target = (exit_logits.argmax(-1) != logits.argmax(-1)).float()
    return functional.mse_loss(torch.sigmoid(mistake_logits), target)


def labels_as_logits(labels: Tensor, logits: Tensor, problem_type: str) -> Tensor:
    """Logits whose answers are the labels, shaped like `logits` (rows, labels): what `mistake_loss` compares with."""
    if problem_type == "single_label_classification":
        return functional.one_hot(labels.long(), logits.shape[-1]).to(logits.dtype)
    values = labels.to(logits.dtype).reshape(logits.shape)
    return values if problem_type == "regression" else 2 * values - 1


PlacementOptionsT = TypeVar("PlacementOptionsT", bound=PlacementOptions)


class SelfDistillation(Method[PlacementOptionsT]):
    """A method whose model is a classifier with exits. Unless a subclass says otherwise, backbone and final head are
    the teacher's and frozen, and the exits learn from them.

    Attributes:
        trainable: prefixes of the names of the parameters that move; None = all.
    """

    trainable: ClassVar[tuple[str, ...] | None] = EXITS
    separate_teacher = False
    conditions: ClassVar[dict[str, tuple[str, tuple[Any, ...]]]] = {
        "exit_head_size": ("exit_head", ("fastbert",)),
        "placement": ("layers", (None,)),
        "k": ("layers", (None,)),
    }

    @abstractmethod
    def objective(self, model: MultiExitModel, task: Task) -> Objective:
        """The objective of the exits."""

    def exits(self, num_layers: int) -> dict[str, Any]:
        """What `MultiExitModel` is told of the exits on a model of so many layers."""
        options = self.options
        return {
            "exit_layers": exit_layers(num_layers, options.placement, options.k, options.layers),
            "exit_head": options.exit_head,
            "exit_head_size": options.exit_head_size,
            "learned_exit": options.learned_exit,
        }

    def build_model(self, sources: Sources) -> MultiExitModel:
        teacher = sources.teacher
        full_model = teacher.full_model if isinstance(teacher, MultiExitModel) else teacher
        num_layers = LayeredEncoder(full_model).num_layers
        return MultiExitModel.from_teacher(teacher, **self.exits(num_layers))

    def stages(self, model: PreTrainedModel, sources: Sources, settings: TrainingSettings) -> list[Stage]:
        assert isinstance(model, MultiExitModel)
        assert sources.task is not None
        objective = self.objective(model, sources.task)
        return [Stage("self-distillation", objective, settings, self.trainable, texts=sources.augmented)]


def exits_first(together: Stage, epochs: float) -> list[Stage]:
    """The stage in which all learn, after one of `epochs` epochs in which the new exits learn alone; 0 = without it."""
    if not epochs:
        return [together]
    alone = {"epochs": epochs, "evaluate_every_epoch": False, "early_stopping_patience": None}
    settings = together.settings.model_copy(update=alone)
    return [replace(together, name="exits", settings=settings, trainable=EXITS), together]
