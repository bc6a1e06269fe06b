"""Joint training of backbone and exits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional

import alembert
from alembert.data import Task
from alembert.methods.base import resolve
from alembert.methods.pabee import Pabee, PabeeObjective, PabeeOptions
from alembert.models.features import Features
from alembert.models.loading import load_classifier
from alembert.models.multi_exit import MultiExitOutput

SINGLE = "single_label_classification"


def features(exit_logits: torch.Tensor, logits: torch.Tensor) -> Features:
    output = MultiExitOutput(logits=logits, exit_logits=exit_logits)
    return Features(attention_mask=torch.ones(len(logits), 3), logits=logits, output=output)


@pytest.mark.parametrize(
    ("weights", "expected"), [("depth", (1 / 8, 3 / 8, 4 / 8)), ("uniform", (1 / 3,) * 3)]
)
def test_loss_is_the_papers(weights: str, expected: tuple[float, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 4, generator=generator)
    labels = torch.tensor([0, 1, 2, 3, 1])
    options = PabeeOptions(exit_weights=weights, self_distillation=0.0)
    terms = PabeeObjective((1, 3), 4, SINGLE, options)(features(logits[:2], logits[2]), None, labels)
    assert list(terms) == ["exit_1", "exit_3", "exit_4"]
    for weight, layer_logits, term in zip(expected, logits, terms.values(), strict=True):
        log_probabilities = layer_logits.log_softmax(-1)
        by_hand = -log_probabilities[torch.arange(5), labels].mean()
        torch.testing.assert_close(term, weight * by_hand)


def test_self_distillation_moves_the_exits_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    exit_logits = torch.randn(2, 5, 4, generator=generator, requires_grad=True)
    logits = torch.randn(5, 4, generator=generator, requires_grad=True)
    objective = PabeeObjective((1, 3), 4, SINGLE, PabeeOptions(self_distillation=0.5))
    terms = objective(features(exit_logits, logits), None, torch.tensor([0, 1, 2, 3, 1]))
    teacher = logits.detach().softmax(-1)
    for index, (layer, weight) in enumerate(((1, 1 / 8), (3, 3 / 8))):
        divergence = functional.kl_div(exit_logits[index].log_softmax(-1), teacher, reduction="batchmean")
        torch.testing.assert_close(terms[f"self_distillation_{layer}"], 0.5 * weight * divergence)
    (terms["self_distillation_1"] + terms["self_distillation_3"]).backward()
    assert logits.grad is None
    assert exit_logits.grad is not None and exit_logits.grad.abs().sum() > 0


def test_new_exits_learn_alone_first(teacher: Path, task: Task, tmp_path: Path) -> None:
    start = load_classifier(str(teacher)).state_dict()
    settings = {
        "epochs": 1, "batch_size": 16, "learning_rate": 1e-12, "head_learning_rate": 1e-2, "max_length": 32,
    }  # fmt: skip
    logs = {}
    for exit_epochs in (0, 4):
        output = tmp_path / str(exit_epochs)
        options = {"exit_epochs": exit_epochs}
        alembert.distill("pabee", str(teacher), task, output, options=options, settings=settings)
        logs[exit_epochs] = json.loads((output / "trainer_state.json").read_text())
        backbone = load_classifier(str(output)).full_model.base_model.state_dict()
        for name, weight in backbone.items():
            torch.testing.assert_close(weight, start[f"bert.{name}"])
    assert list(logs[0]) == ["self-distillation"] and list(logs[4]) == ["exits", "self-distillation"]
    assert logs[4]["exits"]["global_step"] == 4 * logs[4]["self-distillation"]["global_step"]
    first = [log["self-distillation"]["log_history"][0]["terms/exit_3"] for log in (logs[0], logs[4])]
    assert first[1] < first[0]


def test_the_paper_trains_them_together_at_once() -> None:
    options, settings = resolve(Pabee, "paper", {}, {})
    assert isinstance(options, PabeeOptions) and options.exit_epochs == 0
    assert settings.epochs == 5 and settings.head_learning_rate is None


@pytest.mark.parametrize("options", [{}, {"learned_exit": True, "exit_head": "pooled"}])
def test_backbone_and_exits_both_move(
    teacher: Path, task: Task, tmp_path: Path, options: dict[str, object]
) -> None:
    start = load_classifier(str(teacher)).state_dict()
    settings = {"epochs": 2, "batch_size": 16, "learning_rate": 1e-3, "max_length": 32}
    alembert.distill("pabee", str(teacher), task, tmp_path / "run", options=options, settings=settings)
    model = load_classifier(str(tmp_path / "run"))
    assert model.exit_layers == (1, 3)
    moved = [
        name for name, weight in model.full_model.state_dict().items() if not torch.equal(weight, start[name])
    ]
    assert any("layer.0." in name for name in moved)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["dev"]["4"]["accuracy"] > metrics["majority_baseline"]
