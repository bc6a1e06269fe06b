"""Sets of exits ("banks") that are trained side by side on one frozen teacher, in one pass of its backbone.

With a frozen backbone the exits' losses have no weight in common, so each bank learns as if alone: same data order,
same initial heads, no gradient clipping, which would couple them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import set_seed

from alembert.data.task import Task
from alembert.methods.registry import find_method
from alembert.methods.self_distillation import PlacementOptions
from alembert.models.loading import load_classifier, load_tokenizer
from alembert.models.multi_exit import MultiExitModel, MultiExitOutput
from alembert.models.placement import exit_layers
from alembert.training.checkpoints import last_complete_checkpoint
from alembert.training.objective import Objective
from alembert.training.progress import TrainingProgress
from alembert.training.runner import tokenised
from alembert.training.settings import TrainingSettings
from alembert.training.stage import Stage
from alembert.training.trainer import DistillationTrainer


class ExitBanks(nn.Module):
    """Several sets of exit heads over one frozen multi-exit model."""

    def __init__(self, backbone: MultiExitModel, banks: dict[str, MultiExitModel]) -> None:
        super().__init__()
        self.names = list(banks)
        self.backbone = backbone
        self.heads = nn.ModuleList([model.exit_heads for model in banks.values()])

    @property
    def base_model(self) -> nn.Module:
        """The encoder, which learns nothing."""
        return self.backbone.full_model.base_model  # type: ignore[no-any-return]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Any:
        model, layered = self.backbone, self.backbone.layered
        exits: list[list[Tensor]] = [[] for _ in self.names]
        layer_logits = []
        with torch.no_grad():
            state = layered.embed(input_ids, attention_mask, token_type_ids)
        for layer in range(1, model.num_layers + 1):
            with torch.no_grad():
                state = layered.run_layer(layer, state)
                hidden_states = layered.output(state)
                layer_logits.append(model.final_logits(hidden_states, state.attention_mask))
            if layer < model.num_layers:
                for bank, heads in zip(exits, self.heads, strict=True):
                    bank.append(heads[str(layer)](hidden_states, state.attention_mask))
        stacked = torch.stack(layer_logits)
        return {
            name: MultiExitOutput(logits=stacked[-1], exit_logits=torch.stack(bank), layer_logits=stacked)
            for name, bank in zip(self.names, exits, strict=True)
        }


class BanksObjective(Objective):
    """The sum of all banks' losses, one term a bank."""

    def __init__(self, objectives: dict[str, Objective]) -> None:
        super().__init__()
        self.names = list(objectives)
        self.objectives = nn.ModuleList(objectives.values())

    def forward(self, student: Any, teacher: Any | None, labels: Tensor | None) -> dict[str, Tensor]:
        return {
            name: torch.stack(
                list(objective(replace(student, output=student.output[name]), None, labels).values())
            ).sum()
            for name, objective in zip(self.names, self.objectives, strict=True)
        }


def train_banks(
    compared: Mapping[str, tuple[str, PlacementOptions]],
    teacher: str,
    task: Task,
    settings: TrainingSettings,
    checkpoints: Path,
) -> tuple[ExitBanks, dict[str, MultiExitModel], list[dict[str, Any]]]:
    """Trains a bank for each name's method and options, or goes on from the last checkpoint.

    Every bank has an exit after every layer. Returns the trained module, each bank as a model, and the log.
    """
    model, tokenizer = load_classifier(teacher), load_tokenizer(teacher)
    backbone = MultiExitModel.from_teacher(model)
    everywhere = exit_layers(backbone.num_layers, "all")
    banks, objectives = {}, {}
    for name, (method, options) in compared.items():
        set_seed(settings.seed)
        banks[name] = MultiExitModel.from_teacher(model, exit_layers=everywhere, exit_head=options.exit_head)
        objectives[name] = find_method(method)(options).objective(banks[name], task)  # type: ignore[attr-defined]
    both = ExitBanks(backbone, banks)
    trainer = DistillationTrainer(
        both,  # type: ignore[arg-type]
        Stage("study", BanksObjective(objectives), settings, ("heads.",)),
        tokenised(task, "train", tokenizer, settings.max_length),
        None,
        tokenizer,
        checkpoints,
        callbacks=[TrainingProgress("study")],
    )
    done = last_complete_checkpoint(checkpoints)
    trainer.train(resume_from_checkpoint=None if done is None else str(done))
    return both, banks, trainer.state.log_history
