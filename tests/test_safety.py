"""Nothing of the user's is lost, nothing stale is taken for fresh, and what does not fit is refused in time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import alembert
from alembert.benchmarks.calibration import calibrate
from alembert.cli.app import run
from alembert.common import locks
from alembert.methods import distillation
from alembert.runtime.hold_out import read_hold_out
from alembert.training import finetuning, runner
from alembert.training.checkpoints import (
    last_complete_checkpoint,
    mark_complete,
    remove_checkpoints,
)
from alembert.training.run_directory import RunDirectory

QUICK = {"epochs": 1, "batch_size": 16, "max_length": 32}


def test_checkpoints_are_removed_after_the_new_one_is_marked(tmp_path: Path) -> None:
    for step in (3, 6, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
        mark_complete(tmp_path / f"checkpoint-{step}")
    remove_checkpoints(tmp_path, keep=[tmp_path / "checkpoint-9", tmp_path / "checkpoint-3"])
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-9"]
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-9"


def test_checkpoints_come_by_steps_also_where_epochs_are_evaluated(
    tiny_encoder: Path, task: alembert.Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alembert.training import trainer

    saved: list[str] = []

    def record(checkpoint: Path) -> None:
        saved.append(checkpoint.name)
        mark_complete(checkpoint)

    monkeypatch.setattr(trainer, "mark_complete", record)
    settings = alembert.TrainingSettings(
        epochs=2, batch_size=16, max_length=32, checkpoint_steps=3, evaluate_every_epoch=True
    )
    alembert.finetune(str(tiny_encoder), task, tmp_path / "run", settings=settings)
    assert saved == ["checkpoint-3", "checkpoint-4", "checkpoint-6", "checkpoint-8"]


def test_overwriting_leaves_what_no_run_wrote(
    tiny_encoder: Path, task: alembert.Task, tmp_path: Path
) -> None:
    (tmp_path / "project" / "data").mkdir(parents=True)
    (tmp_path / "project" / "data" / "train.tsv").write_text("precious", encoding="utf-8")
    settings = alembert.TrainingSettings(**QUICK)
    with pytest.raises(alembert.InputError, match="no run of Alembert"):
        alembert.finetune(str(tiny_encoder), task, tmp_path / "project", settings=settings, overwrite=True)
    output = tmp_path / "run"
    alembert.finetune(str(tiny_encoder), task, output, settings=settings)
    shutil.move(tmp_path / "project" / "data", output / "data")
    other = settings.model_copy(update={"seed": 7})
    with pytest.raises(alembert.InputError, match=r"settings\.seed"):
        alembert.finetune(str(tiny_encoder), task, output, settings=other)
    alembert.finetune(str(tiny_encoder), task, output, settings=other, overwrite=True)
    assert (output / "data" / "train.tsv").read_text(encoding="utf-8") == "precious"


def test_a_teacher_trained_anew_is_another_teacher(
    teacher: Path, task: alembert.Task, tmp_path: Path
) -> None:
    copy = tmp_path / "teacher"
    shutil.copytree(teacher, copy)
    alembert.distill("fastbert", str(copy), task, tmp_path / "run", settings={"epochs": 1})
    weights = load_file(copy / "model.safetensors")
    weights["classifier.bias"] += 0.01
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(alembert.InputError, match=r"teacher_files\.model\.safetensors"):
        alembert.distill("fastbert", str(copy), task, tmp_path / "run", settings={"epochs": 1})


def test_distillation_takes_the_teachers_length(teacher: Path, task: alembert.Task, tmp_path: Path) -> None:
    alembert.distill("fastbert", str(teacher), task, tmp_path / "run", settings={"epochs": 1})
    assert alembert.AdaptiveClassifier.from_pretrained(tmp_path / "run").max_length == 32


def test_two_processes_do_not_work_in_one_folder(
    teacher: Path, task: alembert.Task, tmp_path: Path, held_elsewhere: Any
) -> None:
    output = tmp_path / "run"

    def distil() -> None:
        alembert.distill("fastbert", str(teacher), task, output, settings={"epochs": 1})

    with (
        held_elsewhere(output),
        pytest.raises(alembert.InputError, match="another process is working on it"),
    ):
        distil()
    distil()
    assert (output / "alembert.json").exists() and not (output / ".lock").exists()


def test_a_run_that_changed_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    late = RunDirectory(tmp_path / "run", {"seed": 1})
    RunDirectory(tmp_path / "run", {"seed": 2}).begin()
    with pytest.raises(alembert.InputError, match="has changed meanwhile"):
        late.begin()
    assert json.loads((tmp_path / "run" / "in_progress.json").read_text()) == {"seed": 2}


def test_an_interrupted_training_lets_others_in(
    teacher: Path, task: alembert.Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(runner, "DistillationTrainer", stop)
        with pytest.raises(KeyboardInterrupt):
            alembert.distill("fastbert", str(teacher), task, tmp_path / "run", settings=QUICK)
    assert (tmp_path / "run" / "in_progress.json").exists()
    assert not (tmp_path / "run" / ".lock").exists()


@pytest.mark.parametrize("module", [distillation, finetuning])
def test_an_interrupted_measurement_lets_others_in(
    module: Any, teacher: Path, task: alembert.Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "predict_logits", stop)
    if module is distillation:
        monkeypatch.setattr(module, "measure_teacher", lambda *_: (0.5, 0.5))
    with pytest.raises(KeyboardInterrupt):
        if module is distillation:
            alembert.distill("fastbert", str(teacher), task, tmp_path / "run", settings=QUICK)
        else:
            alembert.finetune(str(teacher), task, tmp_path / "run", settings=QUICK)
    assert (tmp_path / "run" / "in_progress.json").exists()
    assert not (tmp_path / "run" / ".lock").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_is_not_written_over_what_it_is_made_from(
    teacher: Path, task: alembert.Task, tmp_path: Path, overwrite: bool
) -> None:
    own = shutil.copytree(teacher, tmp_path / "own")
    before = {path.name: path.read_bytes() for path in own.iterdir() if path.is_file()}
    refused = pytest.raises(
        alembert.InputError, match=r"is what the run is made from.*choose another --output"
    )
    with refused:
        alembert.distill("fastbert", str(own), task, own, settings=QUICK, overwrite=overwrite)
    with refused:
        alembert.finetune(
            str(own), task, tmp_path / "own" / ".." / "own", settings=QUICK, overwrite=overwrite
        )
    with refused:
        student = str(own / "config.json")
        alembert.distill("kd", str(teacher), task, own, student=student, settings=QUICK, overwrite=overwrite)
    assert {path.name: path.read_bytes() for path in own.iterdir() if path.is_file()} == before


def test_folders_that_cannot_be_locked_are_worked_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: object, **__: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(locks.FileLock, "acquire", no_locks)
    RunDirectory(tmp_path / "run", {"seed": 1}).begin()
    assert "cannot be locked" in caplog.text and (tmp_path / "run" / "in_progress.json").exists()


def test_models_without_a_tokenizer_are_refused(teacher: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(teacher, tmp_path / "bare", ignore=shutil.ignore_patterns("*token*", "vocab*"))
    with pytest.raises(alembert.InputError, match="tokenizer"):
        alembert.AdaptiveClassifier.from_pretrained(bare)


def test_a_student_that_was_written_anew_is_another_student(
    teacher: Path, task: alembert.Task, tmp_path: Path
) -> None:
    student, settings = tmp_path / "small.json", {"epochs": 1, "batch_size": 16}
    config = json.loads((teacher / "config.json").read_text())
    student.write_text(json.dumps(config | {"num_hidden_layers": 1}))
    alembert.distill("kd", str(teacher), task, tmp_path / "run", student=str(student), settings=settings)
    student.write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(alembert.InputError, match="student_files"):
        alembert.distill("kd", str(teacher), task, tmp_path / "run", student=str(student), settings=settings)


def test_augmented_texts_must_be_of_the_tasks_kind(
    teacher: Path, task: alembert.Task, tmp_path: Path
) -> None:
    pairs = task.dataset("train").add_column("text_pair", task.dataset("train")["text"][:])
    with pytest.raises(alembert.InputError, match="augmented rows are pairs of texts"):
        alembert.distill("fastbert", str(teacher), task, tmp_path / "run", augmented=pairs)


def test_labels_in_another_order_are_refused(fast: Path, task_folder: Path) -> None:
    classifier = alembert.AdaptiveClassifier.from_pretrained(fast)
    turned = alembert.load_task(task_folder, label_names=classifier.label_names[::-1])
    names = {"model_name": "fast", "data_name": "topics"}
    with pytest.raises(alembert.InputError, match="in the same order"):
        alembert.evaluate(classifier, turned, "dev", [0.0], repeats=0, **names)
    with pytest.raises(alembert.InputError, match="in the same order"):
        calibrate(classifier, turned, "dev", **names)


def test_a_single_file_is_the_split_that_is_asked_for(
    fast: Path, task_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--split", "dev", "--speed", "0", "--repeats", "0", "--json"]
    assert run(["evaluate", str(fast), "--data", str(task_folder / "dev.tsv"), *flags]) == 0
    assert '"split": "dev"' in capsys.readouterr().out


@pytest.mark.parametrize("max_length", [2, 65, -5])
def test_lengths_that_do_not_fit_are_refused(fast: Path, max_length: int) -> None:
    with pytest.raises(alembert.InputError, match="takes 3 to 64 tokens"):
        alembert.AdaptiveClassifier.from_pretrained(fast, max_length=max_length)


def test_lengths_beyond_the_positions_stop_a_training_before_it_begins(
    tiny_encoder: Path, task: alembert.Task, tmp_path: Path
) -> None:
    with pytest.raises(alembert.InputError, match="takes 3 to 64 tokens"):
        alembert.finetune(str(tiny_encoder), task, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_patience_without_evaluation_is_refused() -> None:
    with pytest.raises(ValueError, match="needs evaluate_every_epoch"):
        alembert.TrainingSettings(early_stopping_patience=2)


def test_top_k_without_its_policy_is_refused(fast: Path) -> None:
    with pytest.raises(alembert.InputError, match="top_k_entropy"):
        alembert.AdaptiveClassifier.from_pretrained(fast, top_k=2)


def test_held_out_rows_can_be_evaluated(
    tiny_encoder: Path, task_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "train-only"
    folder.mkdir()
    shutil.copy(task_folder / "train.tsv", folder)
    output = str(tmp_path / "run")
    flags = ["--epochs", "1", "--max-length", "32", "--seed", "5"]
    assert (
        run(["finetune", "--model", str(tiny_encoder), "--data", str(folder), "--output", output, *flags])
        == 0
    )
    capsys.readouterr()
    assert run(["evaluate", output, "--data", str(folder), "--speed", "0", "--repeats", "0", "--json"]) == 0
    printed = capsys.readouterr().out
    assert '"split": "dev"' in printed
    assert '"rows": 6' in printed


def test_students_are_scored_on_rows_that_their_teacher_held_out(
    tiny_encoder: Path, teacher: Path, task_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, first, second = tmp_path / "train-only", tmp_path / "first", tmp_path / "second"
    folder.mkdir()
    shutil.copy(task_folder / "train.tsv", folder)
    flags = [
        "--data",
        str(folder),
        "--epochs",
        "16",
        "--max-length",
        "32",
        "--batch-size",
        "8",
        "--learning-rate",
    ]
    assert (
        run(["finetune", "--model", str(tiny_encoder), "--output", str(first), *flags, "2e-3", "--seed", "5"])
        == 0
    )
    distill = ["distill", "--method", "fastbert", *flags, "1e-2", "--seed", "6"]
    assert run([*distill, "--teacher", str(first), "--output", str(second)]) == 0
    splits = [
        json.loads((path / "alembert.json").read_text())["configuration"]["task"]["splits"]
        for path in (first, second)
    ]
    assert splits[0] == splits[1] and splits[0]["dev"]["rows"] == 6
    assert read_hold_out(second) == read_hold_out(first)
    assert "not known to be new" not in caplog.text
    # This teacher has learned from files of its own: the run's seed holds dev out, and a warning says what is unknown.
    other = tmp_path / "other"
    assert run([*distill, "--teacher", str(teacher), "--output", str(other)]) == 0
    assert "rows that seed 6 holds out of train are not known to be new" in caplog.text


def test_broken_records_and_values_are_one_message(
    fast: Path, task_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(fast, tmp_path / "cut")
    (tmp_path / "cut" / "alembert.json").write_text('{"configuration":', encoding="utf-8")
    assert run(["predict", str(tmp_path / "cut"), "soup"]) == 2
    assert "no valid JSON" in " ".join(capsys.readouterr().err.split())
    flags = [
        "--method",
        "fastbert",
        "--teacher",
        str(fast),
        "--data",
        str(task_folder),
        "--output",
        str(tmp_path / "o"),
    ]
    assert run(["distill", *flags, "--set", "layers=[1,3"]) == 2
    assert "no valid YAML" in " ".join(capsys.readouterr().err.split())
    config = tmp_path / "options.yaml"
    config.write_text("speed: [0, 0.5]\n", encoding="utf-8")
    flags = ["--data", str(task_folder), "--repeats", "0", "--json", "--output", str(tmp_path / "e")]
    assert run(["evaluate", str(fast), "--config", str(config), *flags]) == 0
    assert '"speed": 0.5' in capsys.readouterr().out
