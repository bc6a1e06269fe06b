"""FastBERT and MS-BERT: every option trains, exits learn what the papers say, bad input stops before anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

import alembert
from alembert import AdaptiveClassifier, InputError, MultiExitModel, Task, TrainingSettings
from alembert.methods.base import Sources, resolve
from alembert.methods.fastbert import FastBert, FastBertObjective
from alembert.methods.ms_bert import MsBert
from alembert.methods.registry import METHODS, find_method
from alembert.methods.self_distillation import ExitOptions, mistake_loss
from alembert.models.capture import capture
from alembert.models.features import FeatureRequest
from alembert.models.loading import load_classifier, load_encoder, load_tokenizer
from alembert.models.placement import exit_layers
from alembert.training.run_directory import RunDirectory
from alembert.training.runner import run_stages

SINGLE = "single_label_classification"
TINY = {"epochs": 1, "batch_size": 32, "learning_rate": 5e-3, "max_length": 32}
SHARED: list[dict[str, Any]] = [
    {"placement": "every_k"},
    {"placement": "every_k", "k": 3},
    {"placement": "last_k"},
    {"placement": "all"},
    {"layers": [2]},
    {"exit_head": "pooled"},
    {"exit_head": "linear"},
    {"exit_head_size": 8},
    {"learned_exit": True},
    {"kl": "teacher||student"},
    {"kl": "symmetric"},
    {"temperature": 2.0},
]
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "fastbert": SHARED,
    "ms-bert": [
        *SHARED,
        {"emd": "histogram"},
        {"emd": "class_aware"},
        {"emd": "class_aware", "ground_cost": "classifier"},
        {"weighting": "paper"},
        {"weighting": "normalised"},
        {"teacher_weight": 0.0},
        {"teacher_logits": "deep_supervision"},
        {"teacher_logits": "branches"},
        {"scope": "batch"},
        {"values": "probabilities"},
        {"weighting_temperature": 3.0},
    ],
}


@pytest.mark.parametrize(
    ("method", "options"), [(method, options) for method, every in OPTIONS.items() for options in every]
)
def test_every_option_trains_exits_and_nothing_else(
    teacher: Path, task: Task, tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    start = load_classifier(str(teacher))
    model = alembert.distill(method, str(teacher), task, tmp_path / "run", options=options, settings=TINY)
    assert isinstance(model, MultiExitModel)
    assert not model.training
    loaded = load_classifier(str(tmp_path / "run"))
    assert set(loaded.state_dict()) == set(model.state_dict())
    for name, weight in start.state_dict().items():
        assert torch.equal(loaded.full_model.state_dict()[name], weight), name
    expected = {"every_k": (1, 3), "last_k": (2, 3), "all": (1, 2, 3)}[options.get("placement", "every_k")]
    if "k" in options:
        expected = (1,)
    assert model.exit_layers == tuple(options.get("layers", expected))
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    stages = ["layer-heads"] if options.get("teacher_logits") == "deep_supervision" else []
    assert list(history) == [*stages, "self-distillation"]
    losses = [entry["train_loss"] for stage in history.values() for entry in stage["log_history"][-1:]]
    assert np.isfinite(losses).all()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert list(metrics["dev"]) == [str(layer) for layer in (*model.exit_layers, 4)]
    assert metrics["dev"]["4"] == metrics["teacher"]["dev"]


def test_the_exits_of_a_full_run_beat_the_commonest_label(fast: Path) -> None:
    metrics = json.loads((fast / "metrics.json").read_text())
    for layer in ("1", "2", "3", "4"):
        assert metrics["dev"][layer]["accuracy"] > metrics["majority_baseline"] + 0.1


def inputs_of(task: Task, teacher: Path, rows: int = 8) -> dict[str, Tensor]:
    tokenizer = load_tokenizer(str(teacher))
    return dict(tokenizer(list(task.dataset("train")["text"])[:rows], padding=True, return_tensors="pt"))


@pytest.mark.parametrize("direction", ["student||teacher", "teacher||student"])
def test_fastbert_gradients_are_those_of_the_formula(teacher: Path, task: Task, direction: str) -> None:
    torch.manual_seed(0)
    model = MultiExitModel.from_teacher(load_classifier(str(teacher)), exit_layers=(1, 3), exit_head_size=8)
    model.freeze_backbone()
    model.train()
    batch = inputs_of(task, teacher)
    objective = FastBertObjective((1, 3), SINGLE, ExitOptions(kl=direction))
    terms = objective(capture(model, batch, FeatureRequest()), None, None)
    assert set(terms) == {"exit_1", "exit_3"}
    sum(terms.values()).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.exit_heads.named_parameters()}
    model.zero_grad()

    stock = AutoModelForSequenceClassification.from_pretrained(teacher).eval()
    with torch.no_grad():
        output = stock(**batch, output_hidden_states=True)
    teacher_chances = output.logits.softmax(-1)
    loss = torch.zeros(())
    for layer in (1, 3):
        logits = model.exit_heads[str(layer)](output.hidden_states[layer], batch["attention_mask"])
        chances = logits.softmax(-1)
        first, second = chances, teacher_chances
        if direction == "teacher||student":
            first, second = second, first
        divergences = [
            (first[row] * (first[row].log() - second[row].log())).sum() for row in range(len(chances))
        ]
        loss = loss + torch.stack(divergences).mean()
    loss.backward()
    for name, parameter in model.exit_heads.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)
        assert parameter.grad.abs().sum() > 0 or "key.bias" in name


@pytest.mark.parametrize("method", ["fastbert", "ms-bert"])
def test_exits_learn_independently_of_one_another(
    teacher: Path, task: Task, tmp_path: Path, method: str
) -> None:
    trained = {}
    for placement in ("all", "every_k"):
        options, settings = resolve(
            find_method(method), "default", {"placement": placement, "exit_head_size": 8},
            TINY | {"max_grad_norm": 0.0},
        )  # fmt: skip
        instance = find_method(method)(options)
        sources = Sources(load_classifier(str(teacher)), load_tokenizer(str(teacher)), task)
        model = instance.build_model(sources)
        for layer, head in model.exit_heads.items():
            torch.manual_seed(int(layer))
            for parameter in head.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
        run = RunDirectory(tmp_path / placement, {"placement": placement})
        run_stages(model, instance.stages(model, sources, settings), task, load_tokenizer(str(teacher)), run)
        trained[placement] = model
    for layer in ("1", "3"):
        ones, others = (trained[placement].exit_heads[layer].state_dict() for placement in ("all", "every_k"))
        for name in ones:
            torch.testing.assert_close(ones[name], others[name], rtol=0, atol=1e-6)


def test_learned_exit_learns_where_exits_are_wrong() -> None:
    exit_logits = torch.tensor([[[2.0, 0], [0, 1]], [[0, 3], [0, 1]]])
    logits = torch.tensor([[1.0, 0], [0, 5]])
    mistake_logits = torch.tensor([[0.3, -1.0], [2.0, 0.5]], requires_grad=True)
    chances = mistake_logits.sigmoid()
    wrong = torch.tensor([[0.0, 0], [1, 0]])
    loss = mistake_loss(mistake_logits, exit_logits, logits, SINGLE)
    torch.testing.assert_close(loss, ((chances - wrong) ** 2).mean())
    multi = mistake_loss(mistake_logits, exit_logits, logits, "multi_label_classification")
    torch.testing.assert_close(multi, ((chances - torch.tensor([[0.0, 0], [1, 0]])) ** 2).mean())
    values = torch.tensor([[[0.5], [1.0]], [[2.0], [-1.0]]])
    targets = torch.tanh((values - torch.tensor([[1.0], [1.0]])).abs())[..., 0]
    regression = mistake_loss(mistake_logits, values, torch.tensor([[1.0], [1.0]]), "regression")
    torch.testing.assert_close(regression, ((chances - targets) ** 2).mean())


@pytest.mark.parametrize(
    ("method", "preset"), [(name, preset) for name, method in METHODS.items() for preset in method.presets]
)
def test_presets_resolve_and_can_be_overridden(method: str, preset: str) -> None:
    values = find_method(method).presets[preset]
    # Our own method has no paper.
    needed = {"default"} if method == "alembert" else {"default", "paper"}
    assert needed <= find_method(method).presets.keys()
    changed = (
        {"temperature": 3.5} if "temperature" in find_method(method).options_class.model_fields else {"k": 3}
    )
    options, settings = resolve(find_method(method), preset, changed, {"epochs": 7})
    assert changed.items() <= options.model_dump().items()
    assert settings.epochs == 7
    kept = {name: value for name, value in values.options.items() if name not in changed}
    assert all(options.model_dump()[name] == value for name, value in kept.items())
    assert all(
        getattr(settings, name) == value for name, value in values.settings.items() if name != "epochs"
    )


def test_a_student_with_weights_keeps_them_under_every_preset(tiny_encoder: Path) -> None:
    method = find_method("distilbert")
    student = {"student": str(tiny_encoder)}
    assert resolve(method, "paper", {"student": "2x16"}, {})[0].model_dump()["initialise"] == "layers"
    assert resolve(method, "paper", student, {})[0].model_dump()["initialise"] is None
    asked_for = resolve(method, "paper", student | {"initialise": "layers"}, {})[0]
    assert asked_for.model_dump()["initialise"] == "layers"


def test_paper_presets_are_the_papers() -> None:
    options, settings = resolve(FastBert, "paper", {}, {})
    assert options == ExitOptions(placement="all", kl="student||teacher", exit_head="fastbert")
    assert (settings.epochs, settings.learning_rate, settings.batch_size) == (5, 2e-4, 32)
    options, settings = resolve(MsBert, "paper", {}, {})
    chosen = options.model_dump()
    assert (chosen["emd"], chosen["weighting"], chosen["k"]) == ("histogram", "paper", None)
    assert exit_layers(12, options.placement, options.k) == (1, 3, 5, 7, 9, 11)
    assert (settings.epochs, settings.learning_rate, settings.batch_size) == (5, 2e-5, 16)
    assert resolve(FastBert, "code", {}, {})[0].model_dump()["kl"] == "teacher||student"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"method": "nobert"},
            "unknown method 'nobert': choose one of alembert, bert-emd, berxit, deebert",
        ),
        ({"preset": "mine"}, "has no preset 'mine'"),
        ({"options": {"emdd": "sorted"}}, "unknown option of method ms-bert 'emdd'"),
        ({"options": {"emd": "cosine"}}, "emd='cosine'"),
        ({"options": {"emd": "class_aware", "scope": "batch"}}, "scope='batch'"),
        ({"options": {"emd": "sorted", "ground_cost": "classifier"}}, "only for emd='class_aware'"),
        ({"options": {"k": 9}}, "k=9"),
        ({"options": {"layers": [1], "teacher_logits": "branches"}}, "at least 2 exits"),
        ({"options": {"layers": [4]}}, "between 1 and 3"),
        ({"options": {"exit_head_size": 7}}, "not a multiple"),
        ({"settings": {"epoch": 1}}, "unknown training setting 'epoch'"),
        ({"settings": {"scheduler": "sawtooth"}}, "scheduler='sawtooth'"),
        ({"settings": {"batch_size": 8, "gradient_accumulation_steps": 3}}, "not a multiple"),
    ],
)
def test_wrong_names_and_values_stop_before_anything_is_written(
    teacher: Path, task: Task, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    arguments = {"method": "ms-bert", "settings": TINY} | changes
    with pytest.raises(InputError, match=words):
        alembert.distill(teacher=str(teacher), task=task, output_dir=tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_knows_nothing_stops_before_anything_is_written(
    tiny_encoder: Path, task: Task, tmp_path: Path
) -> None:
    classifier = load_encoder(str(tiny_encoder), label_names=task.label_names, problem_type=SINGLE)
    torch.nn.init.zeros_(classifier.classifier.weight)
    classifier.save_pretrained(tmp_path / "ignorant")
    load_tokenizer(str(tiny_encoder)).save_pretrained(tmp_path / "ignorant")
    with pytest.raises(InputError, match="no better than always giving the commonest answer"):
        alembert.distill("fastbert", str(tmp_path / "ignorant"), task, tmp_path / "run", settings=TINY)
    assert not (tmp_path / "run").exists()


def test_labels_that_differ_from_the_teachers_are_refused(teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "task"
    folder.mkdir()
    rows = "".join(f"{label}\ta soup of {label}\n" for label in ("food", "sport", "wether") * 4)
    for split in ("train", "dev"):
        (folder / f"{split}.tsv").write_text("label\ttext\n" + rows, encoding="utf-8")
    with pytest.raises(InputError, match="wether"):
        alembert.distill("fastbert", str(teacher), alembert.load_task(folder), tmp_path / "run")
    numbers = folder / "numbers"
    numbers.mkdir()
    values = "".join(f"{value}.5\tsoup {value}\n" for value in range(9))
    for split in ("train", "dev"):
        (numbers / f"{split}.tsv").write_text("label\ttext\n" + values, encoding="utf-8")
    with pytest.raises(InputError, match="regression"):
        alembert.distill("fastbert", str(teacher), alembert.load_task(numbers), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["multi", "regression", "pair"])
def test_other_tasks_run_end_to_end(
    tiny_encoder: Path, tmp_path: Path, write_task: Callable[..., Path], kind: str
) -> None:
    folder = write_task(tmp_path / "task", kind)
    task = alembert.load_task(folder, label_separator="|" if kind == "multi" else None)
    settings = TrainingSettings(
        epochs=12, batch_size=8, learning_rate=2e-3, max_length=32, evaluate_every_epoch=True
    )
    alembert.finetune(str(tiny_encoder), task, tmp_path / "teacher", settings=settings)
    for method in ("fastbert", "ms-bert"):
        model = alembert.distill(
            method,
            str(tmp_path / "teacher"),
            task,
            tmp_path / method,
            options={"learned_exit": True},
            settings=TINY,
        )
        assert model.config.problem_type == task.problem_type
    classifier = AdaptiveClassifier.from_pretrained(tmp_path / "ms-bert")
    results = alembert.evaluate(classifier, task, "test", [0.5], model_name="m", data_name="d", repeats=1)
    assert results["task"]["problem_type"] == task.problem_type
    assert all(row["same_exit_as_replayed"] == 1.0 for row in results["speeds"])
    dataset = task.dataset("test")
    texts: list[Any] = list(dataset["text"])
    if kind == "pair":
        texts = list(zip(texts, dataset["text_pair"], strict=True))
    for policy in (None, "learned", "patience"):
        predictions = classifier.predict(texts, speed=0.5, policy=policy)
        assert len(predictions) == 32
        kinds = {"multi": tuple, "regression": float, "pair": str}
        assert all(isinstance(prediction.label, kinds[kind]) for prediction in predictions)
    probabilities = classifier.predict_proba(texts)
    assert probabilities.shape == (32, task.num_labels)
    if kind == "multi":
        for row, prediction in zip(probabilities, classifier.predict(texts), strict=True):
            names = tuple(name for name, chance in zip(task.label_names, row, strict=True) if chance >= 0.5)
            assert prediction.label == names
            assert prediction.score == pytest.approx(np.maximum(row, 1 - row).min())


def test_the_automatic_distance_suits_the_task() -> None:
    from alembert.methods.ms_bert import MsBertOptions

    assert MsBertOptions().distance("single_label_classification") == "class_aware"
    assert MsBertOptions().distance("multi_label_classification") == "sorted"
    assert MsBertOptions().distance("regression") == "sorted"
    assert MsBertOptions(scope="batch").distance("single_label_classification") == "sorted"
    assert MsBertOptions(values="probabilities").distance("single_label_classification") == "sorted"
    assert MsBertOptions(emd="histogram").distance("single_label_classification") == "histogram"


@pytest.mark.parametrize(
    ("method", "preset", "expected"),
    [
        ("tinybert", "paper", (3, 5e-5, 256)),
        ("tinybert", "default", (1, 5e-4, 32)),
        ("lrc-bert", "paper", (1, 1e-4, 16)),
        ("minilm", "paper", (1, 5e-4, 1024)),
        ("minilm-v2", "paper", (1, 6e-4, 256)),
    ],
)
def test_stages_on_plain_text_have_settings_of_their_own(
    method: str, preset: str, expected: tuple[float, float, int]
) -> None:
    _, settings = resolve(find_method(method), preset, {"student": "2x16", "stages": ["general"]}, {})
    assert (settings.epochs, settings.learning_rate, settings.batch_size) == expected
    _, settings = resolve(
        find_method(method), preset, {"student": "2x16", "stages": ["general"]}, {"epochs": 0.5}
    )
    assert settings.epochs == 0.5
