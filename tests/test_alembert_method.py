"""Alembert's own method: a shallower student that has exits from the beginning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import alembert
from alembert.data import Task
from alembert.methods.alembert import AlembertObjective, AlembertOptions
from alembert.models.features import Features
from alembert.models.loading import load_classifier
from alembert.models.multi_exit import MultiExitOutput

SINGLE = "single_label_classification"


@pytest.mark.parametrize(
    ("weights", "expected"), [("uniform", (1 / 3,) * 3), ("depth", (1 / 8, 3 / 8, 4 / 8))]
)
def test_loss_is_the_printed_one(weights: str, expected: tuple[float, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 4, generator=generator)
    teacher = torch.randn(5, 4, generator=generator)
    labels, mask = torch.tensor([0, 1, 2, 3, 1]), torch.ones(5, 3)
    options = AlembertOptions(exit_weights=weights, hard_weight=0.25, temperature=3.0)
    output = MultiExitOutput(logits=logits[2], exit_logits=logits[:2])
    terms = AlembertObjective((1, 3), 4, SINGLE, options)(
        Features(attention_mask=mask, logits=logits[2], output=output),
        Features(attention_mask=mask, logits=teacher),
        labels,
    )
    assert list(terms) == [
        f"exit_{layer}" for layer, weight in zip((1, 3, 4), expected, strict=True) if weight
    ]
    target = (teacher / 3).softmax(-1)
    for layer, weight, answers in zip((1, 3, 4), expected, logits, strict=True):
        hard = -answers.log_softmax(-1)[torch.arange(5), labels].mean()
        soft = (target * (target.log() - (answers / 3).log_softmax(-1))).sum(-1).mean()
        torch.testing.assert_close(terms[f"exit_{layer}"], weight * (0.25 * hard + 0.75 * 9 * soft))


def test_a_shallower_student_with_exits(teacher: Path, task: Task, tmp_path: Path) -> None:
    start = load_classifier(str(teacher))
    layers = start.config.num_hidden_layers
    model = alembert.distill(
        "alembert", str(teacher), task, tmp_path / "run",
        options={"exit_epochs": 1},
        settings={"epochs": 4, "batch_size": 16, "learning_rate": 1e-3, "max_length": 32},
        teacher_cache=tmp_path / "cache",
    )  # fmt: skip
    assert model.num_layers == layers // 2
    assert model.exit_layers == tuple(range(1, layers // 2))
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert list(history) == ["exits", "self-distillation"]
    for stage in history.values():
        terms = {name for name in stage["log_history"][0] if name.startswith("terms/")}
        assert terms == {"terms/exit_1", f"terms/exit_{layers // 2}"}
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["dev"]["1"]["accuracy"] > metrics["majority_baseline"]
    reloaded = load_classifier(str(teacher)).state_dict()
    assert all(torch.equal(weight, reloaded[name]) for name, weight in start.state_dict().items())


def test_all_layers_go_on_learning_apart_from_the_teacher(teacher: Path, task: Task, tmp_path: Path) -> None:
    start = load_classifier(str(teacher))
    model = alembert.distill(
        "alembert", str(teacher), task, tmp_path / "run",
        options={"depth": 1, "exit_epochs": 0, "learned_exit": True},
        settings={"epochs": 1, "batch_size": 16, "learning_rate": 1e-3, "max_length": 32},
    )  # fmt: skip
    assert model.num_layers == start.config.num_hidden_layers
    assert list(json.loads((tmp_path / "run" / "trainer_state.json").read_text())) == ["self-distillation"]
    moved = [
        name
        for name, weight in model.full_model.state_dict().items()
        if not torch.equal(weight, start.state_dict()[name])
    ]
    assert any("layer.0." in name for name in moved)
    first = json.loads((tmp_path / "run" / "metrics.json").read_text())["teacher"]["dev"]["accuracy"]
    assert first == pytest.approx(json.loads((teacher / "metrics.json").read_text())["dev"]["accuracy"])
