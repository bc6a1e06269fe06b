"""Alembert's own method: a shallower student that has exits from the beginning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import alembert
from alembert.data import Task
from alembert.methods.alembert import Alembert, AlembertObjective, AlembertOptions, student_depth
from alembert.methods.base import Sources
from alembert.models.features import FeatureRequest, Features
from alembert.models.loading import load_classifier, load_tokenizer
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


def test_by_labels_alone_no_teacher_is_run() -> None:
    objective = AlembertObjective((1,), 2, SINGLE, AlembertOptions(hard_weight=1.0))
    assert objective.teacher_request is None
    assert AlembertObjective((1,), 2, SINGLE, AlembertOptions()).teacher_request == FeatureRequest()
    logits, labels = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)), torch.arange(5) % 4
    output = MultiExitOutput(logits=logits[1], exit_logits=logits[:1])
    features = Features(attention_mask=torch.ones(5, 3), logits=logits[1], output=output)
    terms = objective(features, None, labels)
    for layer in (1, 2):
        expected = torch.nn.functional.cross_entropy(logits[layer - 1], labels) / 2
        torch.testing.assert_close(terms[f"exit_{layer}"], expected)


def test_a_shallower_student_with_exits(teacher: Path, task: Task, tmp_path: Path) -> None:
    layers = load_classifier(str(teacher)).config.num_hidden_layers
    model = alembert.distill(
        "alembert", str(teacher), task, tmp_path / "run",
        options={"exit_epochs": 1},
        settings={"epochs": 4, "batch_size": 16, "learning_rate": 1e-3, "max_length": 32},
        teacher_cache=tmp_path / "cache",
    )  # fmt: skip
    assert model.num_layers == layers // 2
    assert model.exit_layers == tuple(range(1, layers // 2))
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert list(history) == ["exits", "together"]
    for stage in history.values():
        terms = {name for name in stage["log_history"][0] if name.startswith("terms/")}
        assert terms == {"terms/exit_1", f"terms/exit_{layers // 2}"}
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["dev"]["1"]["accuracy"] > metrics["majority_baseline"]


@pytest.mark.parametrize("depth", [0.5, 1.0])
@pytest.mark.parametrize("kind", ["stock", "with exits"])
def test_the_student_shares_nothing_with_its_teacher(
    teacher: Path, fast: Path, task: Task, depth: float, kind: str
) -> None:
    model = load_classifier(str(teacher if kind == "stock" else fast))
    method = Alembert(AlembertOptions(depth=depth))
    sources = Sources(model, load_tokenizer(str(teacher)), task)
    student = method.build_model(sources)
    (_, together) = method.stages(student, sources, alembert.TrainingSettings())
    assert together.teacher is not None
    taught = {weight.data_ptr() for weight in student.parameters()}
    assert not taught & {
        weight.data_ptr() for weight in [*model.parameters(), *together.teacher.parameters()]
    }
    if depth == 1:
        for name, weight in together.teacher.state_dict().items():
            torch.testing.assert_close(student.full_model.state_dict()[name], weight)


@pytest.mark.parametrize(
    ("layers", "share", "expected"),
    [(12, 0.5, 6), (5, 0.5, 3), (7, 0.5, 4), (4, 0.34, 2), (2, 0.5, 2), (6, 1, 6)],
)
def test_depth_of_the_student(layers: int, share: float, expected: int) -> None:
    assert student_depth(layers, share) == expected


def test_all_layers_go_on_learning(teacher: Path, task: Task, tmp_path: Path) -> None:
    alembert.distill(
        "alembert", str(teacher), task, tmp_path / "run",
        options={"depth": 1, "exit_epochs": 0, "learned_exit": True},
        settings={"epochs": 1, "batch_size": 16, "learning_rate": 1e-3, "max_length": 32},
    )  # fmt: skip
    model, start = load_classifier(str(tmp_path / "run")), load_classifier(str(teacher)).state_dict()
    assert model.exit_layers == (1, 2, 3) and model.learned_exit is not None
    assert list(json.loads((tmp_path / "run" / "trainer_state.json").read_text())) == ["together"]
    weights = model.full_model.state_dict().items()
    assert any("layer.0." in name and not torch.equal(weight, start[name]) for name, weight in weights)


def test_a_slimmer_student_comes_first(teacher: Path, task: Task, tmp_path: Path) -> None:
    model = alembert.distill(
        "tinybert+alembert", str(teacher), task, tmp_path / "run", student="3x16",
        options={"alembert.depth": 1},
        settings={
            "epochs": 8, "batch_size": 8, "learning_rate": 5e-3, "alembert.epochs": 1, "max_length": 32
        },
    )  # fmt: skip
    assert (model.num_layers, model.exit_layers) == (3, (1, 2))
    assert model.full_model.config.hidden_size == 16
