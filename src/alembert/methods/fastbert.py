"""FastBERT (Liu et al., ACL 2020): every exit imitates the full model's answer."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from alembert.data.task import Task
from alembert.losses.self_distillation import fastbert_loss
from alembert.methods.base import Preset
from alembert.methods.self_distillation import ExitOptions, SelfDistillation, SelfDistillationObjective
from alembert.models.multi_exit import MultiExitModel, MultiExitOutput


class FastBertObjective(SelfDistillationObjective):
    """Σ_j KL(p_sj ‖ p_t) (FastBERT, Eq. 7 and 8)."""

    def __init__(self, exits: tuple[int, ...], problem_type: str, options: ExitOptions) -> None:
        super().__init__(exits, problem_type)
        self.options = options

    def exit_losses(self, exit_logits: Tensor, output: MultiExitOutput) -> Tensor:
        assert output.logits is not None
        return fastbert_loss(
            exit_logits,
            output.logits,
            kl=self.options.kl,
            temperature=self.options.temperature,
            problem_type=self.problem_type,
        )


class FastBert(SelfDistillation[ExitOptions]):
    """Frozen backbone, an exit after every layer, unlabelled text."""

    name = "fastbert"
    paper = "Liu et al., FastBERT: a Self-distilling BERT with Adaptive Inference Time, ACL 2020"
    options_class = ExitOptions
    presets: ClassVar[dict[str, Preset]] = {
        "default": Preset(settings={"epochs": 5, "learning_rate": 1e-3}),
        "paper": Preset(
            options={"placement": "all"},
            settings={"epochs": 5, "learning_rate": 2e-4, "batch_size": 32, "weight_decay": 0.01},
        ),
        "code": Preset(
            options={"placement": "all", "kl": "teacher||student"},
            settings={"epochs": 10, "learning_rate": 2e-4, "batch_size": 16, "weight_decay": 0.0},
        ),
    }

    def objective(self, model: MultiExitModel, task: Task) -> FastBertObjective:
        return FastBertObjective(model.exit_layers, task.problem_type, self.options)
