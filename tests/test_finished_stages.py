"""A stage that is over is not trained again, and one that diverged ends in one message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

import alembert
from alembert.common.errors import InputError
from alembert.data.task import Task
from alembert.models.features import Features
from alembert.models.loading import load_encoder, load_tokenizer
from alembert.training import finetuning
from alembert.training import trainer as trainer_module
from alembert.training.checkpoints import complete_checkpoints
from alembert.training.objective import Objective, TaskObjective
from alembert.training.run_directory import RunDirectory
from alembert.training.runner import run_stages
from alembert.training.settings import TrainingSettings
from alembert.training.stage import Stage
from alembert.training.trainer import DistillationTrainer

SINGLE = "single_label_classification"
QUICK: dict[str, Any] = {
    "batch_size": 16, "learning_rate": 2e-3, "max_length": 32, "scheduler": "constant", "bf16": False
}  # fmt: skip


class Killed(BaseException):
    """Stands for the end of the process."""


def no_training(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("a stage that was over is trained")


def weights(model: nn.Module) -> Tensor:
    return torch.cat([value.detach().flatten() for value in model.parameters()])


def run(
    encoder: Path, task: Task, folder: Path, *settings: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Fine-tuning in a stage per settings, on fresh weights of a fixed seed."""
    torch.manual_seed(0)
    model = load_encoder(str(encoder), label_names=task.label_names, problem_type=SINGLE)
    stages = [
        Stage(f"stage-{number}", TaskObjective(SINGLE), TrainingSettings(**QUICK | changes))
        for number, changes in enumerate(settings, 1)
    ]
    histories = run_stages(model, stages, task, load_tokenizer(str(encoder)), RunDirectory(folder, {}))
    return model, histories


def test_after_early_stopping_a_killed_measurement_costs_no_further_epoch(
    tiny_encoder: Path, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = TrainingSettings(
        **QUICK | {"batch_size": 8}, epochs=20, evaluate_every_epoch=True, early_stopping_patience=1
    )

    def killed(*arguments: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(finetuning, "predict_logits", killed)
        alembert.finetune(str(tiny_encoder), task, tmp_path / "run", settings=settings)
    # The run may have been moved meanwhile.
    (tmp_path / "run").rename(tmp_path / "moved")
    checkpoints = complete_checkpoints(tmp_path / "moved" / "checkpoints" / "finetune")
    state = json.loads((checkpoints[-1] / "trainer_state.json").read_text())
    assert state["epoch"] < 20
    assert Path(state["best_model_checkpoint"]).name != checkpoints[-1].name

    monkeypatch.setattr(Trainer, "train", no_training)
    alembert.finetune(str(tiny_encoder), task, tmp_path / "moved", settings=settings)
    history = json.loads((tmp_path / "moved" / "trainer_state.json").read_text())["finetune"]
    assert history == {key: state[key] for key in ("log_history", "best_metric", "global_step")}
    metrics = json.loads((tmp_path / "moved" / "metrics.json").read_text())
    assert metrics["dev"]["accuracy"] == pytest.approx(state["best_metric"])


@pytest.mark.parametrize("checkpoint_steps", [None, 1])
def test_a_stage_of_a_fraction_of_an_epoch_takes_no_further_step(
    tiny_encoder: Path,
    task: Task,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    checkpoint_steps: int | None,
) -> None:
    first = {"epochs": 0.5, "checkpoint_steps": checkpoint_steps}
    whole, histories = run(tiny_encoder, task, tmp_path / "whole", first, {"epochs": 1})
    assert histories["stage-1"]["global_step"] == 2

    trained, train = [], Trainer.train

    def killed_in_the_second(self: DistillationTrainer, **options: Any) -> Any:
        trained.append(self.stage.name)
        if trained == ["stage-1", "stage-2"]:
            raise Killed
        return train(self, **options)

    monkeypatch.setattr(Trainer, "train", killed_in_the_second)
    with pytest.raises(Killed):
        run(tiny_encoder, task, tmp_path / "run", first, {"epochs": 1})
    resumed, again = run(tiny_encoder, task, tmp_path / "run", first, {"epochs": 1})
    assert trained == ["stage-1", "stage-2", "stage-2"]
    assert again["stage-1"]["global_step"] == 2
    assert weights(resumed).equal(weights(whole))


def test_an_epochs_checkpoint_holds_its_evaluation(
    tiny_encoder: Path, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: Any, **options: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "evaluate", killed)
        run(
            tiny_encoder,
            task,
            tmp_path,
            {"epochs": 1, "checkpoint_steps": 2, "evaluate_every_epoch": True},
        )
    # The epoch has 4 steps; at the second checkpoint the evaluation was still to come.
    steps = [path.name for path in complete_checkpoints(tmp_path / "checkpoints" / "stage-1")]
    assert steps == ["checkpoint-2"]


@pytest.mark.parametrize("checkpoint_steps", [None, 1])
def test_the_end_of_the_time_is_one_checkpoint_with_its_evaluation(
    tiny_encoder: Path,
    task: Task,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    checkpoint_steps: int | None,
) -> None:
    saved, marked = [], []
    save, mark = DistillationTrainer._save_checkpoint, trainer_module.mark_last

    def counted(self: DistillationTrainer, *arguments: Any, **options: Any) -> Any:
        evaluated = [entry["step"] for entry in self.state.log_history if "eval_score" in entry]
        saved.append((self.state.global_step, self.state.global_step in evaluated))
        return save(self, *arguments, **options)

    def marking(checkpoint: Path) -> None:
        marked.append(checkpoint.name)
        mark(checkpoint)

    monkeypatch.setattr(DistillationTrainer, "_save_checkpoint", counted)
    monkeypatch.setattr(trainer_module, "mark_last", marking)
    changes = {"epochs": 9, "evaluate_every_epoch": True, "max_minutes": 1e-9}
    _, histories = run(tiny_encoder, task, tmp_path, changes | {"checkpoint_steps": checkpoint_steps})
    assert histories["stage-1"]["global_step"] == 1
    assert saved == [(1, True)]
    assert marked == ["checkpoint-1"]


def test_a_checkpoint_of_another_model_is_refused(
    tiny_encoder: Path, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny_encoder, task, tmp_path, {"epochs": 1})
    (checkpoint,) = complete_checkpoints(tmp_path / "checkpoints" / "stage-1")
    saved = load_file(checkpoint / "model.safetensors")
    name = next(iter(saved))
    save_file(
        {("renamed" if key == name else key): value for key, value in saved.items()},
        checkpoint / "model.safetensors",
    )
    with pytest.raises(InputError, match="a checkpoint of another model") as refused:
        run(tiny_encoder, task, tmp_path, {"epochs": 1})
    assert f"lacks ['{name}'] and has ['renamed'] more" in str(refused.value)


class Poisoned(Objective):
    """A term whose gradient is scaled by `factor`, and one that is infinite, without gradient."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(
        self, student: Features, teacher: Features | None, labels: Tensor | None
    ) -> dict[str, Tensor]:
        assert student.logits is not None
        return {"task": student.logits.sum() * self.factor, "endless": torch.tensor(float("inf"))}


def test_numbers_of_the_log_that_are_not_finite_are_written_as_null(
    tiny_encoder: Path, task: Task, tmp_path: Path
) -> None:
    model = load_encoder(str(tiny_encoder), label_names=task.label_names, problem_type=SINGLE)
    tokenizer, directory = load_tokenizer(str(tiny_encoder)), RunDirectory(tmp_path, {})
    stage = Stage("stage", Poisoned(1.0), TrainingSettings(**QUICK, epochs=1))
    histories = run_stages(model, [stage], task, tokenizer, directory)
    directory.finish(model, tokenizer, {}, histories, "")
    entry = json.loads((tmp_path / "trainer_state.json").read_text())["stage"]["log_history"][0]
    assert entry["terms/endless"] is None
    assert isinstance(entry["terms/task"], float)


@pytest.mark.parametrize("evaluated", [False, True])
def test_a_diverged_training_is_one_message_and_again_when_resumed(
    tiny_encoder: Path, task: Task, tmp_path: Path, evaluated: bool
) -> None:
    model = load_encoder(str(tiny_encoder), label_names=task.label_names, problem_type=SINGLE)
    settings = TrainingSettings(**QUICK, epochs=1, evaluate_every_epoch=evaluated)
    stage = Stage("stage", Poisoned(float("nan")), settings)
    for _ in range(2):
        with pytest.raises(InputError, match="not finite numbers: the training diverged; lower the learning"):
            run_stages(model, [stage], task, load_tokenizer(str(tiny_encoder)), RunDirectory(tmp_path, {}))
