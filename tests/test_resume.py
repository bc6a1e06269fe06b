"""Runs that were killed go on and end, bit for bit, where an undisturbed run ends."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import alembert
from alembert.cli.app import run
from alembert.common.files import file_sha256
from alembert.training.checkpoints import COMPLETE_MARKER, last_complete_checkpoint

PROGRAM = [sys.executable, "-c", "from alembert.cli import main; main()"]


def distill_command(teacher: Path, task_folder: Path, output: Path) -> list[str]:
    return [
        "distill", "--method", "ms-bert", "--teacher", str(teacher), "--data", str(task_folder),
        "--output", str(output), "--set", "placement=all", "--epochs", "9", "--batch-size", "2",
        "--learning-rate", "5e-3", "--max-length", "32", "--training", "checkpoint_steps=3",
    ]  # fmt: skip


def test_a_distillation_killed_three_times_ends_as_an_undisturbed_one(
    teacher: Path, task_folder: Path, tmp_path: Path
) -> None:
    command = distill_command(teacher, task_folder, tmp_path / "killed")
    checkpoints = tmp_path / "killed" / "checkpoints" / "self-distillation"
    generator = random.Random(7)
    progress, kills = [0], 0
    for _ in range(3):
        process = subprocess.Popen([*PROGRAM, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        target = progress[-1] + generator.randint(4, 20)
        deadline = time.monotonic() + 120
        while process.poll() is None and newest(checkpoints) < target and time.monotonic() < deadline:
            time.sleep(0.002)
        # A moment more, so that it is between two checkpoints, or in the middle of one.
        time.sleep(generator.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        process.stderr.close()  # type: ignore[union-attr]
        progress.append(newest(checkpoints))
    assert kills == 3
    assert progress == sorted(progress)
    assert 0 < progress[1] < progress[3] < 288
    assert not (tmp_path / "killed" / "alembert.json").exists()

    finished = subprocess.run([*PROGRAM, *command], capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr
    assert f"going on from step {progress[3]} of 288" in finished.stderr
    assert not checkpoints.exists()

    assert run(distill_command(teacher, task_folder, tmp_path / "undisturbed")) == 0
    assert file_sha256(tmp_path / "killed" / "model.safetensors") == file_sha256(
        tmp_path / "undisturbed" / "model.safetensors"
    )
    assert (tmp_path / "killed" / "metrics.json").read_bytes() == (
        tmp_path / "undisturbed" / "metrics.json"
    ).read_bytes()


def newest(checkpoints: Path) -> int:
    """The step of the newest complete checkpoint."""
    steps = [int(marker.parent.name.rsplit("-", 1)[1]) for marker in checkpoints.glob(f"*/{COMPLETE_MARKER}")]
    return max(steps, default=0)


class Killed(BaseException):
    """Stands for the end of the process."""


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from alembert.training.progress import TrainingProgress

    def on_step_end(
        self: TrainingProgress, args: object, state: object, *rest: object, **more: object
    ) -> None:
        if state.global_step == step:  # type: ignore[attr-defined]
            raise Killed

    monkeypatch.setattr(TrainingProgress, "on_step_end", on_step_end)


@pytest.fixture
def settings() -> alembert.TrainingSettings:
    return alembert.TrainingSettings(
        epochs=3, batch_size=8, learning_rate=2e-3, max_length=32, checkpoint_steps=3
    )


def test_a_finetuning_with_dropout_goes_on_in_the_middle_of_an_epoch(
    tiny_encoder: Path,
    task: alembert.Task,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: alembert.TrainingSettings,
) -> None:
    alembert.finetune(str(tiny_encoder), task, tmp_path / "whole", settings=settings)
    killed = tmp_path / "killed"
    # 8 steps an epoch, a checkpoint every 3: each stop is inside an epoch and after the last checkpoint.
    for step, complete in ((5, "checkpoint-3"), (13, "checkpoint-12")):
        with monkeypatch.context() as patch:
            stop_after(step, patch)
            with pytest.raises(Killed):
                alembert.finetune(str(tiny_encoder), task, killed, settings=settings)
        found = last_complete_checkpoint(killed / "checkpoints" / "finetune")
        assert found is not None
        assert found.name == complete
        assert not (killed / "alembert.json").exists()
    alembert.finetune(str(tiny_encoder), task, killed, settings=settings)
    assert file_sha256(killed / "model.safetensors") == file_sha256(tmp_path / "whole" / "model.safetensors")


def test_best_epochs_and_patience_survive_a_stop(
    tiny_encoder: Path, task: alembert.Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = alembert.TrainingSettings(
        epochs=4, batch_size=16, learning_rate=4e-3, max_length=32, evaluate_every_epoch=True,
        early_stopping_patience=2,
    )  # fmt: skip
    alembert.finetune(str(tiny_encoder), task, tmp_path / "whole", settings=settings)
    with monkeypatch.context() as patch:
        stop_after(7, patch)
        with pytest.raises(Killed):
            alembert.finetune(str(tiny_encoder), task, tmp_path / "killed", settings=settings)
    alembert.finetune(str(tiny_encoder), task, tmp_path / "killed", settings=settings)
    for name in ("model.safetensors", "metrics.json"):
        assert file_sha256(tmp_path / "killed" / name) == file_sha256(tmp_path / "whole" / name)


@pytest.mark.parametrize("lost", ["model.safetensors", "trainer_state.json"])
def test_half_written_checkpoints_are_passed_over(
    tiny_encoder: Path,
    task: alembert.Task,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: alembert.TrainingSettings,
    lost: str,
) -> None:
    killed = tmp_path / "killed"
    with monkeypatch.context() as patch:
        stop_after(7, patch)
        with pytest.raises(Killed):
            alembert.finetune(str(tiny_encoder), task, killed, settings=settings)
    folder = killed / "checkpoints" / "finetune"
    newest_one = folder / "checkpoint-6"
    (newest_one / lost).unlink()
    (newest_one / COMPLETE_MARKER).unlink()
    shutil.copytree(killed, tmp_path / "copy")
    found = last_complete_checkpoint(tmp_path / "copy" / "checkpoints" / "finetune")
    assert found is not None
    assert found.name == "checkpoint-3"
    alembert.finetune(str(tiny_encoder), task, killed, settings=settings)
    alembert.finetune(str(tiny_encoder), task, tmp_path / "whole", settings=settings)
    assert file_sha256(killed / "model.safetensors") == file_sha256(tmp_path / "whole" / "model.safetensors")


def test_there_is_nothing_to_go_on_from_in_an_empty_folder(tmp_path: Path) -> None:
    assert last_complete_checkpoint(tmp_path) is None
    assert last_complete_checkpoint(tmp_path / "none") is None
    (tmp_path / "checkpoint-5").mkdir()
    assert last_complete_checkpoint(tmp_path) is None
    assert not list(tmp_path.iterdir())
