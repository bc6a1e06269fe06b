"""Stages: the order of examples, what is minimised and logged, what is kept."""

from __future__ import annotations

import json
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel, AutoModelForSequenceClassification

import alembert
from alembert.common.errors import InputError
from alembert.common.files import read_json
from alembert.data.metrics import compute_metrics
from alembert.data.task import Task
from alembert.models.exit_heads import EXIT_HEADS
from alembert.models.loading import load_classifier, load_encoder, load_tokenizer
from alembert.training import settings as training_settings
from alembert.training.attention_kernel import attention_for_learning
from alembert.training.objective import TaskObjective
from alembert.training.run_directory import RunDirectory
from alembert.training.runner import mean_exit_score, predict_logits, run_stages, tokenised
from alembert.training.sampling import EpochSampler
from alembert.training.settings import TrainingSettings, validated
from alembert.training.stage import Stage
from alembert.training.stage_model import encoder_parameters
from alembert.training.trainer import DistillationTrainer, training_arguments

SINGLE = "single_label_classification"


@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=200),
    batch_size=st.integers(1, 16),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 5),
    grouped=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_an_epoch_is_a_permutation_of_seed_and_epoch(
    lengths: list[int], batch_size: int, seed: int, epoch: int, grouped: bool
) -> None:
    def order(epoch: int, seed: int = seed) -> list[int]:
        sampler = EpochSampler(len(lengths), batch_size, seed, lengths if grouped else None)
        sampler.set_epoch(epoch)
        assert len(sampler) == len(lengths)
        return list(sampler)

    first = order(epoch)
    assert sorted(first) == list(range(len(lengths)))
    torch.manual_seed(epoch)
    np.random.seed(epoch)
    assert order(epoch) == first


def test_orders_differ_from_epoch_to_epoch_and_seed_to_seed() -> None:
    lengths = list(np.random.default_rng(0).integers(1, 50, size=100))
    orders = set()
    for seed in (1, 2):
        for epoch in (0, 1, 2):
            sampler = EpochSampler(100, 8, seed, lengths)
            sampler.set_epoch(epoch)
            orders.add(tuple(sampler))
    assert len(orders) == 6


def test_batches_hold_similar_lengths_and_a_short_one_stays_last() -> None:
    lengths = np.random.default_rng(0).integers(1, 200, size=397)
    batches = np.split(np.array(list(EpochSampler(397, 8, 5, lengths.tolist()))), range(8, 397, 8))
    spread = np.mean([np.ptp(lengths[batch]) for batch in batches])
    plain = np.split(np.array(list(EpochSampler(397, 8, 5))), range(8, 397, 8))
    assert spread < 0.2 * np.mean([np.ptp(lengths[batch]) for batch in plain])
    # Were the batches in order of length, the means would fall from first to last.
    means = [lengths[batch].mean() for batch in batches[:-1]]
    assert np.sign(np.diff(means)).mean() > -0.5
    assert len(batches[-1]) == 397 % 8


def read_history(run: Path, stage: str) -> list[dict[str, Any]]:
    return json.loads((run / "trainer_state.json").read_text())[stage]["log_history"]


def test_terms_are_logged_and_sum_to_the_loss(fast: Path) -> None:
    logged = [entry for entry in read_history(fast, "self-distillation") if "loss" in entry]
    assert len(logged) >= 5
    for entry in logged:
        terms = {name: value for name, value in entry.items() if name.startswith("terms/")}
        assert set(terms) == {"terms/exit_1", "terms/exit_2", "terms/exit_3", "terms/learned_exit"}
        assert all(value >= 0 for value in terms.values())
        assert sum(terms.values()) == pytest.approx(entry["loss"], rel=1e-3, abs=1e-4)
    assert logged[-1]["loss"] < logged[0]["loss"]


def train(
    encoder: Path, task: Task, folder: Path, dropout: float = 0.0, **changes: Any
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """One fine-tuning stage on fresh weights of a fixed seed."""
    chosen = TrainingSettings(
        **{"epochs": 1, "batch_size": 16, "learning_rate": 1e-3, "max_length": 32, "bf16": False} | changes
    )
    torch.manual_seed(0)
    model = load_encoder(str(encoder), label_names=task.label_names, problem_type=SINGLE)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    stage = Stage("finetune", TaskObjective(SINGLE), chosen)
    histories = run_stages(
        model, [stage], task, load_tokenizer(str(encoder)), RunDirectory(folder, {"settings": folder.name})
    )
    return model, histories["finetune"]


def test_a_stage_ends_when_its_time_is_up_and_stays_ended(
    tiny_encoder: Path, task: Task, tmp_path: Path
) -> None:
    short = {"epochs": 2000, "max_minutes": 0.02}
    stopped, history = train(tiny_encoder, task, tmp_path / "short", **short)
    assert 1 <= history["global_step"] < 2000 * 4
    again, same = train(tiny_encoder, task, tmp_path / "short", **short)
    assert same["global_step"] == history["global_step"]
    assert distance(stopped, again) == 0.0
    _, whole = train(tiny_encoder, task, tmp_path / "whole", max_minutes=60)
    assert whole["global_step"] == 4


def test_all_stages_share_the_time(tiny_encoder: Path, teacher: Path, task: Task, tmp_path: Path) -> None:
    chosen = {"batch_size": 8, "epochs": 4000, "max_length": 32}
    options = {"placement": "all", "exit_epochs": 2000.0}

    def steps(name: str, stop_at: float | None, **more: float) -> dict[str, int]:
        folder = tmp_path / name
        alembert.distill(
            "pabee", str(teacher), task, folder, options=options, settings=chosen | more, stop_at=stop_at
        )
        histories = json.loads((folder / "trainer_state.json").read_text())
        return {stage: history["global_step"] for stage, history in histories.items()}

    for name, stop_at, more in (("limited", None, {"max_minutes": 0.01}), ("stopped", time.monotonic(), {})):
        first, second = steps(name, stop_at, **more).values()
        assert 1 <= first < 2000 and second == 1


def distance(first: torch.nn.Module, second: torch.nn.Module) -> float:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return sum(float((one - other).detach().square().sum()) for one, other in pairs) ** 0.5


def test_accumulated_gradients_are_those_of_one_big_batch(
    tiny_encoder: Path, task: Task, tmp_path: Path
) -> None:
    start, _ = train(tiny_encoder, task, tmp_path / "start", learning_rate=1e-20)
    whole, history = train(tiny_encoder, task, tmp_path / "whole")
    parts, parts_history = train(tiny_encoder, task, tmp_path / "parts", gradient_accumulation_steps=4)
    assert history["global_step"] == parts_history["global_step"] == 4
    # Adam divides by the gradient's size, which magnifies rounding: compared is the way that the weights went.
    assert distance(whole, parts) < 0.01 * distance(whole, start)
    losses = [history["log_history"][-1]["train_loss"], parts_history["log_history"][-1]["train_loss"]]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_best_epoch_is_kept_and_training_stops_early(
    tiny_encoder: Path, task: Task, tmp_path: Path
) -> None:
    model, history = train(
        tiny_encoder,
        task,
        tmp_path / "run",
        epochs=20,
        batch_size=8,
        learning_rate=2e-3,
        scheduler="constant",
        evaluate_every_epoch=True,
        early_stopping_patience=2,
    )
    scores = [entry["eval_score"] for entry in history["log_history"] if "eval_score" in entry]
    best = int(np.argmax(scores))
    assert len(scores) == best + 3 < 20
    assert history["best_metric"] == scores[best]
    tokenizer = load_tokenizer(str(tiny_encoder))
    logits, labels = predict_logits(model, tokenised(task, "dev", tokenizer, 32), tokenizer, "dev")
    assert labels is not None
    kept = compute_metrics(SINGLE, ("accuracy",), logits[:, -1], labels)["accuracy"]
    assert kept == pytest.approx(scores[best])
    assert scores[-1] < scores[best], scores


def test_predicted_logits_are_in_the_order_of_the_rows(teacher: Path, task: Task) -> None:
    model, tokenizer = load_classifier(str(teacher)), load_tokenizer(str(teacher))
    dataset = tokenised(task, "dev", tokenizer, 32)
    logits, labels = predict_logits(model, dataset, tokenizer, "dev", batch_size=5)
    assert logits.shape == (32, 1, 3)
    assert labels is not None
    assert labels.tolist() == list(task.dataset("dev")["labels"])
    for row in (0, 7, 31):
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([dataset[row]["input_ids"]])).logits
        np.testing.assert_allclose(logits[row, 0], alone[0], atol=1e-5)


def test_score_is_the_mean_over_exits(task: Task) -> None:
    labels = np.array([0, 1, 2, 0])
    right, wrong = np.eye(3)[labels], np.eye(3)[(labels + 1) % 3]
    logits = np.stack([right, wrong, np.where(np.arange(4)[:, None] < 2, right, wrong)], axis=1)
    assert mean_exit_score(task, logits, labels) == {"score": pytest.approx((1 + 0 + 0.5) / 3)}


def stage_of(**values: Any) -> Stage:
    return Stage("stage", TaskObjective(SINGLE), TrainingSettings(**values))


def test_a_batch_that_cannot_be_divided_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="multiple of 3"):
        training_arguments(stage_of(batch_size=16, gradient_accumulation_steps=3), tmp_path, False, None)
    arguments = training_arguments(
        stage_of(batch_size=16, gradient_accumulation_steps=4), tmp_path, False, None
    )
    assert arguments.per_device_train_batch_size == 4


def test_bf16_is_the_hardwares_unless_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for pays, name in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(training_settings, "bf16_pays", lambda pays=pays: pays)
        assert TrainingSettings().autocast_dtype() == name
        assert training_arguments(stage_of(), tmp_path, False, None).bf16 == pays
    assert TrainingSettings(bf16=True).autocast_dtype() == "bf16"
    assert TrainingSettings(bf16=False).autocast_dtype() == "fp32"


class Connecting(BaseException):
    """Stands for the connection of processes."""


@pytest.mark.parametrize("command", ["finetune", "distill"])
def test_processes_wait_for_one_that_prepares_for_days(
    command: str,
    request: pytest.FixtureRequest,
    task: Task,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = str(request.getfixturevalue("tiny_encoder" if command == "finetune" else "teacher"))

    def connect(*arguments: Any, **options: Any) -> None:
        assert options["timeout"] > timedelta(days=1)
        raise Connecting

    monkeypatch.setattr(PartialState, "_shared_state", {})
    monkeypatch.setattr(torch.distributed, "init_process_group", connect)
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_PORT", "29500")
    chosen = {"max_length": 32}
    with pytest.raises(Connecting):
        if command == "finetune":
            alembert.finetune(source, task, tmp_path / "run", settings=TrainingSettings(**chosen))
        else:
            alembert.distill("fastbert", source, task, tmp_path / "run", settings=chosen)


@pytest.mark.parametrize("corpus", [None, "corpus.txt"])
def test_plain_text_has_checkpoints_within_the_epoch(corpus: str | None, tmp_path: Path) -> None:
    for chosen, steps in ((None, None if corpus is None else 1000), (7, 7)):
        stage = Stage(
            "stage", TaskObjective(SINGLE), TrainingSettings(checkpoint_steps=chosen), corpus=corpus
        )
        arguments = training_arguments(stage, tmp_path, False, None)
        found = arguments.save_steps if arguments.save_strategy == "steps" else None
        assert found == steps == stage.checkpoint_steps


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"batch": 3}, "unknown training setting 'batch'"),
        ({"epochs": 0}, "training setting epochs=0"),
        ({"learning_rate": "fast"}, "training setting learning_rate='fast'"),
        ({"warmup_ratio": 1.0}, "training setting warmup_ratio"),
    ],
)
def test_wrong_settings_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        validated(TrainingSettings, values, "training setting")


def test_only_the_trainable_weights_move(tiny_encoder: Path, task: Task) -> None:
    model = load_encoder(str(tiny_encoder), label_names=task.label_names, problem_type=SINGLE)
    Stage("heads", TaskObjective(SINGLE), TrainingSettings(), ("classifier.",)).prepare(model)
    moving = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert moving == {"classifier.weight", "classifier.bias"}
    Stage("all", TaskObjective(SINGLE), TrainingSettings()).prepare(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_finetuned_run_holds_all_that_is_needed(teacher: Path, task: Task) -> None:
    names = {path.name for path in teacher.iterdir()}
    assert names == {
        "README.md",
        "alembert.json",
        "config.json",
        "metrics.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "trainer_state.json",
    }
    record = json.loads((teacher / "alembert.json").read_text())
    assert record["configuration"]["settings"]["seed"] == 42
    assert record["configuration"]["task"] == task.describe()
    assert {"alembert", "torch", "transformers", "python"} <= set(record["versions"])
    metrics = json.loads((teacher / "metrics.json").read_text())
    assert metrics["dev"]["accuracy"] > metrics["majority_baseline"] + 0.2
    model, tokenizer = load_classifier(str(teacher)), load_tokenizer(str(teacher))
    logits, labels = predict_logits(model, tokenised(task, "dev", tokenizer, 32), tokenizer, "dev")
    assert labels is not None
    assert metrics["dev"]["accuracy"] == pytest.approx(float((logits[:, -1].argmax(-1) == labels).mean()))
    assert "accuracy" in (teacher / "README.md").read_text(encoding="utf-8")


def test_settings_are_an_object_or_the_fields_that_change(
    tiny_encoder: Path, teacher: Path, task: Task, tmp_path: Path
) -> None:
    short = {"epochs": 0.5, "max_length": 16, "seed": 3}

    def resolved(folder: str) -> dict[str, Any]:
        settings: dict[str, Any] = read_json(tmp_path / folder / "alembert.json")["configuration"]["settings"]
        return settings

    alembert.finetune(str(tiny_encoder), task, tmp_path / "fields", settings=short)
    alembert.finetune(str(tiny_encoder), task, tmp_path / "object", settings=TrainingSettings(**short))
    assert resolved("fields") == resolved("object") | {"evaluate_every_epoch": True}
    assert {name: resolved("fields")[name] for name in short} == short
    with pytest.raises(InputError, match="unknown training setting 'epoch'"):
        alembert.finetune(str(tiny_encoder), task, tmp_path / "wrong", settings={"epoch": 1})
    for folder, chosen in (("first", short), ("second", TrainingSettings(**short))):
        alembert.distill("fastbert", str(teacher), task, tmp_path / folder, settings=chosen)
    # The preset's rate, which only a field that was given replaces.
    assert resolved("first") == resolved("second") and resolved("first")["learning_rate"] == 1e-3


def test_heads_have_a_rate_of_their_own(tiny_encoder: Path, task: Task, tmp_path: Path) -> None:
    start = {
        name: weight.clone() for name, weight in AutoModel.from_pretrained(tiny_encoder).named_parameters()
    }
    still, moved = (
        alembert.finetune(
            str(tiny_encoder),
            task,
            tmp_path / str(rate),
            settings=TrainingSettings(
                epochs=1, batch_size=16, max_length=32, learning_rate=1e-12, head_learning_rate=rate
            ),
        )
        for rate in (1e-12, 1e-2)
    )
    for name, weight in moved.base_model.named_parameters():
        # A pooler that the encoder did not bring is the encoder's too, and new.
        if name in start:
            torch.testing.assert_close(weight, start[name])
    assert (moved.classifier.weight - still.classifier.weight).abs().mean() > 1e-3


def test_groups_of_parameters_and_their_rates(tiny_encoder: Path, task: Task, tmp_path: Path) -> None:
    chosen = TrainingSettings(learning_rate=1e-5, head_learning_rate=1e-3, weight_decay=0.1)
    encoder = AutoModelForSequenceClassification.from_pretrained(tiny_encoder, num_labels=3)
    model = alembert.MultiExitModel.from_full_model(encoder, exit_layers=(1, 2))
    tokenizer = load_tokenizer(str(tiny_encoder))
    stage = Stage("task", TaskObjective("single_label_classification"), chosen)
    rows = tokenised(task, "train", tokenizer, 32)
    optimizer = DistillationTrainer(model, stage, rows, None, tokenizer, tmp_path).create_optimizer()
    rates = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert len(rates) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        rate, decay = rates[id(parameter)]
        assert rate == (1e-5 if name.startswith("full_model.bert.") else 1e-3), name
        assert decay == (0.1 if parameter.ndim > 1 else 0.0), name


def test_a_rate_for_heads_where_there_are_none(tiny_encoder: Path, task: Task, tmp_path: Path) -> None:
    chosen = TrainingSettings(head_learning_rate=1e-3)
    encoder = AutoModelForSequenceClassification.from_pretrained(tiny_encoder, num_labels=3)
    stage = Stage("task", TaskObjective("single_label_classification"), chosen, trainable=("bert.",))
    run = RunDirectory(tmp_path / "run", {})
    with pytest.raises(InputError, match=r"head_learning_rate=0\.001: stage 'task' trains nothing outside"):
        run_stages(encoder, [stage], task, load_tokenizer(str(tiny_encoder)), run)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("head", EXIT_HEADS)
def test_a_final_head_of_another_kind(tiny_encoder: Path, task: Task, tmp_path: Path, head: str) -> None:
    chosen = TrainingSettings(epochs=1, batch_size=16, max_length=32, learning_rate=1e-3)
    model = alembert.finetune(str(tiny_encoder), task, tmp_path / "run", head=head, settings=chosen)
    loaded = load_classifier(str(tmp_path / "run"))
    assert isinstance(loaded, alembert.MultiExitModel)
    assert loaded.config.final_head == head
    assert loaded.config.num_labels == 3
    assert distance(model, loaded) == 0


def test_occupied_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="no run of Alembert"):
        RunDirectory(tmp_path, {"seed": 1})
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt"}
    run = tmp_path / "run"
    RunDirectory(run, {"seed": 1}, overwrite=True)
    assert not run.exists()
    RunDirectory(run, {"seed": 1, "task": {"rows": 3}}).begin()
    assert not RunDirectory(run, {"seed": 1, "task": {"rows": 3}}).finished
    with pytest.raises(InputError, match=r"task\.rows: 3 there, 4 now"):
        RunDirectory(run, {"seed": 1, "task": {"rows": 4}})
    (run / "old").touch()
    replacement = RunDirectory(run, {"seed": 2}, overwrite=True)
    assert (run / "old").exists()
    replacement.begin()
    assert {path.name for path in run.iterdir()} == {".lock", "in_progress.json"}


FUSED = "aten::_scaled_dot_product_flash_attention_for_cpu"


@pytest.mark.parametrize(
    ("bf16", "frozen", "expected"), [(True, False, False), (True, True, True), (False, False, True)]
)
def test_an_encoder_without_dropout_learns_by_the_faster_attention(
    teacher: Path, task: Task, tmp_path: Path, bf16: bool, frozen: bool, expected: bool
) -> None:
    # With dropout PyTorch has no fused attention on processors to begin with.
    model = AutoModelForSequenceClassification.from_pretrained(
        teacher, attention_probs_dropout_prob=0.0, attn_implementation="sdpa"
    )
    settings = TrainingSettings(epochs=0.01, batch_size=4, bf16=bf16)
    trainable = ("classifier.",) if frozen else None
    stage = Stage("finetune", TaskObjective(SINGLE), settings, trainable)
    tokenizer = load_tokenizer(str(teacher))
    trainer = DistillationTrainer(
        model, stage, tokenised(task, "train", tokenizer, 32), None, tokenizer, tmp_path
    )
    assert frozen != any(weight.requires_grad for weight in encoder_parameters(model))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        trainer.train()
    names = {event.key for event in profile.key_averages()}
    assert any(name.startswith("aten::_scaled_dot_product") for name in names)
    assert (FUSED in names) == expected
    assert torch.backends.cuda.flash_sdp_enabled()


def test_long_texts_keep_the_attention_that_saves_memory() -> None:
    weights = list(torch.nn.Linear(2, 2).parameters())
    with torch.autocast("cpu", torch.bfloat16):
        for tokens, fused in ((128, False), (129, True)):
            with attention_for_learning(weights, tokens):
                assert torch.backends.cuda.flash_sdp_enabled() == fused
