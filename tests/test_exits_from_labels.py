"""DeeBERT and BERxiT: exits that learn from labels, beside a frozen or a moving backbone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import alembert
from alembert.data import Task
from alembert.methods.berxit import BerxitObjective, BerxitOptions
from alembert.methods.deebert import DeeBertObjective
from alembert.methods.self_distillation import labels_as_logits, mistake_loss
from alembert.models.features import Features
from alembert.models.loading import load_classifier, load_encoder
from alembert.models.multi_exit import MultiExitModel, MultiExitOutput

SINGLE = "single_label_classification"
LABELS = torch.tensor([0, 1, 2, 3, 1])


def features(
    exit_logits: torch.Tensor, logits: torch.Tensor, mistakes: torch.Tensor | None = None
) -> Features:
    output = MultiExitOutput(logits=logits, exit_logits=exit_logits, mistake_logits=mistakes)
    return Features(attention_mask=torch.ones(len(logits), 3), logits=logits, output=output)


def cross_entropy(logits: torch.Tensor) -> torch.Tensor:
    return -logits.log_softmax(-1)[torch.arange(len(LABELS)), LABELS].mean()


def test_deebert_is_the_sum_over_the_exits_without_the_full_model() -> None:
    logits = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    terms = DeeBertObjective((1, 3), SINGLE)(features(logits[:2], logits[2]), None, LABELS)
    assert list(terms) == ["exit_1", "exit_3"]
    for layer_logits, term in zip(logits, terms.values(), strict=False):
        torch.testing.assert_close(term, cross_entropy(layer_logits))


def test_berxit_takes_turns_and_remembers_whose_it_is() -> None:
    logits = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))
    objective = BerxitObjective((1, 3), 4, SINGLE, BerxitOptions())
    given = features(logits[:2], logits[2])
    everyone = sum(cross_entropy(one) for one in logits)
    losses = [sum(objective(given, None, LABELS).values()) for _ in range(3)]
    for loss, expected in zip(
        losses, (cross_entropy(logits[2]), everyone, cross_entropy(logits[2])), strict=True
    ):
        torch.testing.assert_close(loss, expected)
    resumed = BerxitObjective((1, 3), 4, SINGLE, BerxitOptions())
    resumed.load_state_dict(objective.state_dict())
    torch.testing.assert_close(sum(resumed(given, None, LABELS).values()), everyone)
    joint = BerxitObjective((1, 3), 4, SINGLE, BerxitOptions(strategy="joint"))
    torch.testing.assert_close(sum(joint(given, None, LABELS).values()), everyone)


def test_turns_do_not_meet_in_one_step(teacher: Path, task: Task, tmp_path: Path) -> None:
    settings = {"batch_size": 8, "gradient_accumulation_steps": 2, "max_length": 32, "epochs": 1}
    with pytest.raises(alembert.InputError, match="strategy=alternating with gradient_accumulation_steps=2"):
        alembert.distill("berxit", str(teacher), task, tmp_path / "run", settings=settings)
    assert not (tmp_path / "run").exists()
    alembert.distill(
        "berxit", str(teacher), task, tmp_path / "run", options={"strategy": "joint"}, settings=settings
    )


def test_every_parameter_has_a_gradient_in_the_full_models_turn() -> None:
    exit_logits = nn.Parameter(torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(2)))
    logits = nn.Parameter(torch.randn(5, 4, generator=torch.Generator().manual_seed(3)))
    mistakes = nn.Parameter(torch.zeros(2, 5))
    objective = BerxitObjective((1, 3), 4, SINGLE, BerxitOptions())
    terms = objective(features(exit_logits, logits, mistakes), None, LABELS)
    torch.stack(list(terms.values())).sum().backward()
    assert exit_logits.grad is not None and not exit_logits.grad.any()
    assert mistakes.grad is not None and not mistakes.grad.any()
    assert logits.grad is not None and logits.grad.any()


@pytest.mark.parametrize(
    ("problem_type", "labels", "exit_logits", "targets"),
    [
        (SINGLE, [0, 1], [[2.0, -1.0], [3.0, 1.0]], [0.0, 1.0]),
        ("multi_label_classification", [[1.0, 0.0], [1.0, 1.0]], [[2.0, -1.0], [3.0, -1.0]], [0.0, 1.0]),
        ("regression", [1.0, 2.0], [[1.0], [2.5]], [0.0, float(torch.tanh(torch.tensor(0.5)))]),
    ],
)
def test_mistakes_are_measured_against_the_labels(
    problem_type: str, labels: list[object], exit_logits: list[list[float]], targets: list[float]
) -> None:
    answers = torch.tensor([exit_logits])
    mistakes = torch.tensor([[0.3, -0.7]])
    reference = labels_as_logits(torch.tensor(labels), answers[0], problem_type)
    by_hand = ((torch.sigmoid(mistakes) - torch.tensor([targets])) ** 2).mean()
    torch.testing.assert_close(mistake_loss(mistakes, answers, reference, problem_type), by_hand)


def test_foreseeing_mistakes_moves_no_layer(tiny_encoder: Path, task: Task) -> None:
    full = load_encoder(str(tiny_encoder), label_names=task.label_names, problem_type=SINGLE)
    model = MultiExitModel.from_full_model(full, exit_layers=(1, 3), exit_head="mean", learned_exit=True)
    output = model(input_ids=torch.tensor([[2, 5, 6, 3], [2, 7, 8, 3]]))
    mistake_loss(output.mistake_logits, output.exit_logits, output.logits, SINGLE).backward()
    moved = {name for name, one in model.named_parameters() if one.grad is not None and one.grad.any()}
    assert moved and all(name.startswith("learned_exit.") for name in moved)


@pytest.mark.parametrize(("method", "backbone_moves"), [("deebert", False), ("berxit", True)])
def test_what_moves_and_what_is_learnt(
    teacher: Path, task: Task, tmp_path: Path, method: str, backbone_moves: bool
) -> None:
    start = load_classifier(str(teacher)).state_dict()
    settings = {"epochs": 3, "batch_size": 16, "learning_rate": 3e-3, "max_length": 32}
    alembert.distill(method, str(teacher), task, tmp_path / "run", settings=settings)
    model = load_classifier(str(tmp_path / "run"))
    assert model.exit_layers == (1, 3)
    assert (model.learned_exit is not None) == (method == "berxit")
    moved = any(
        not torch.equal(weight, start[name]) for name, weight in model.full_model.state_dict().items()
    )
    assert moved == backbone_moves
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["dev"]["3"]["accuracy"] > metrics["majority_baseline"]
