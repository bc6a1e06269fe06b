"""Methods in turn: a student is distilled, then given exits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import alembert
from alembert import AdaptiveClassifier, MultiExitModel
from alembert.cli.app import run
from alembert.common.files import file_sha256
from alembert.models.loading import load_classifier
from alembert.training.progress import TrainingProgress

SIZES = ["--epochs", "2", "--batch-size", "16", "--learning-rate", "5e-3", "--max-length", "32"]
# Copied layers of the teacher's width learn fast: a student as good as guessing would get no exits.
COPIED = ["--set", "initialise=layers"]
TINYBERT = ["--student", "4x32", *COPIED, "--set", "intermediate_epochs=1", "--set", "exit_head_size=8"]


def distill(method: str, teacher: Path, task_folder: Path, output: Path, *arguments: object) -> int:
    command = ["distill", "--method", method, "--teacher", teacher, "--data", task_folder, "--output", output]
    return run([str(part) for part in [*command, *SIZES, *arguments]])


def configuration(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "alembert.json").read_text())["configuration"]
    return result


@pytest.fixture(scope="module")
def tinybert_exits(tmp_path_factory: pytest.TempPathFactory, teacher: Path, task_folder: Path) -> Path:
    output = tmp_path_factory.mktemp("combined") / "run"
    assert distill(
        "tinybert+ms-bert", teacher, task_folder, output, *TINYBERT, "--set", "ms-bert.k=1",
        "--training", "ms-bert.epochs=1", "--training", "tinybert.learning_rate=4e-3",
        "--teacher-cache", output.parent / "cache",
    ) == 0  # fmt: skip
    return output


def test_a_distilled_student_gets_exits(tinybert_exits: Path, teacher: Path, task: alembert.Task) -> None:
    first = tinybert_exits / "steps" / "1-tinybert"
    student = load_classifier(str(first))
    model = load_classifier(str(tinybert_exits))
    assert isinstance(model, MultiExitModel)
    assert model.exit_layers == (1, 2, 3)
    for name, weight in student.state_dict().items():
        assert model.full_model.state_dict()[name].equal(weight), name

    ones, others = configuration(first), configuration(tinybert_exits)
    assert (ones["method"], others["method"]) == ("tinybert", "ms-bert")
    assert ones["teacher"] == str(teacher)
    assert Path(others["teacher"]) == first
    assert ones["options"]["student"] == "4x32"
    assert others["options"]["k"] == 1
    assert others["options"]["exit_head_size"] == 8
    assert (ones["settings"]["epochs"], others["settings"]["epochs"]) == (2, 1)
    assert (ones["settings"]["learning_rate"], others["settings"]["learning_rate"]) == (4e-3, 5e-3)

    metrics = json.loads((tinybert_exits / "metrics.json").read_text())
    assert list(metrics["dev"]) == ["1", "2", "3", "4"]
    assert metrics["dev"]["4"] == json.loads((first / "metrics.json").read_text())["dev"]["full"]
    assert not list(tinybert_exits.rglob("checkpoints"))
    classifier = AdaptiveClassifier.from_pretrained(tinybert_exits)
    predictions = classifier.predict(list(task.dataset("test")["text"])[:8], speed=0.5)
    assert {prediction.label for prediction in predictions} <= set(task.label_names)


def test_a_student_with_exits_is_evaluated(tinybert_exits: Path, task_folder: Path, tmp_path: Path) -> None:
    arguments = ["--data", str(task_folder), "--output", str(tmp_path / "evaluation"), "--speed", "0.5"]
    assert run(["evaluate", str(tinybert_exits), *arguments, "--repeats", "1"]) == 0
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert [row["speed"] for row in results["speeds"]] == [0.5]


def test_the_same_command_finds_everything_done(
    tinybert_exits: Path, teacher: Path, task_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*arguments: object, **more: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(TrainingProgress, "on_train_begin", started)
    before = file_sha256(tinybert_exits / "alembert.json")
    assert distill(
        "tinybert+ms-bert", teacher, task_folder, tinybert_exits, *TINYBERT, "--set", "ms-bert.k=1",
        "--training", "ms-bert.epochs=1", "--training", "tinybert.learning_rate=4e-3",
        "--teacher-cache", tinybert_exits.parent / "cache",
    ) == 0  # fmt: skip
    assert file_sha256(tinybert_exits / "alembert.json") == before


def test_names_without_a_method_go_to_all_that_know_them(
    teacher: Path, task_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    assert distill(
        "kd+fastbert", teacher, task_folder, output, "--student", "2x32", *COPIED, "--set", "temperature=3",
        "--set", "kd.temperature=4", "--set", "hard_weight=0.25", "--set", "layers=[1]", "--preset", "code",
        "--set", "exit-head=linear",
    ) == 0  # fmt: skip
    ones, others = configuration(output / "steps" / "1-kd"), configuration(output)
    assert (ones["options"]["temperature"], others["options"]["temperature"]) == (4.0, 3.0)
    assert ones["options"]["hard_weight"] == 0.25
    assert "hard_weight" not in others["options"]
    assert others["options"]["exit_head"] == "linear"
    assert (ones["preset"], others["preset"]) == ("code", "code")
    assert ones["options"]["soft_loss"] == "logits_mse"
    model = load_classifier(str(output))
    assert isinstance(model, MultiExitModel)
    assert model.exit_layers == (1,)


def test_augmented_rows_are_every_steps_train_split(teacher: Path, task_folder: Path, tmp_path: Path) -> None:
    rows = (task_folder / "train.tsv").read_text(encoding="utf-8").splitlines()
    augmented = tmp_path / "augmented.tsv"
    augmented.write_text("\n".join(rows + [f"{row} again" for row in rows[1:33]]) + "\n", encoding="utf-8")
    options = ["--student", "3x32", *COPIED, "--set", "layers=[1]", "--augmented", augmented]
    options += ["--set", "teacher_logits=deep_supervision"]
    output = tmp_path / "run"
    assert distill("kd+ms-bert", teacher, task_folder, output, *options) == 0
    # The layers' own heads learn from labels, which augmented rows need not have: from the 64 rows of train.
    for folder, steps in ((output / "steps" / "1-kd", [12]), (output, [8, 12])):
        assert configuration(folder)["augmented"]["rows"] == 96
        history = json.loads((folder / "trainer_state.json").read_text())
        assert [stage["global_step"] for stage in history.values()] == steps


@pytest.mark.parametrize("method", ["fastbert", "ms-bert"])
def test_texts_without_labels_teach_exits(
    method: str, teacher: Path, task_folder: Path, tmp_path: Path
) -> None:
    lines = (task_folder / "train.tsv").read_text(encoding="utf-8").splitlines()[1:]
    texts = [line.split("\t")[1] for line in lines]
    found = []
    for label in ("food", "sport"):
        unlabelled = tmp_path / f"{label}.tsv"
        unlabelled.write_text("\n".join(["label\ttext", *(f"{label}\t{text}" for text in texts)]) + "\n")
        output = tmp_path / label
        assert distill(method, teacher, task_folder, output, "--augmented", unlabelled, "--epochs", 12) == 0
        found.append(load_classifier(str(output)).state_dict())
    # Whatever label stands there, the exits are the same, and they have learned.
    for name, weight in found[0].items():
        assert weight.equal(found[1][name]), name
    scores = json.loads((tmp_path / "food" / "metrics.json").read_text())["test"]
    *exits, _ = (score["accuracy"] for score in scores.values())
    assert max(exits) > 0.5


class Killed(BaseException):
    """Stands for the end of the process."""


def test_an_interrupted_second_step_goes_on(
    teacher: Path, task_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--student", "3x32", *COPIED, "--set", "layers=[1, 2]", "--training", "checkpoint_steps=3"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert distill("kd+fastbert", teacher, task_folder, whole, *options) == 0

    original = TrainingProgress.on_step_end

    def stop(self: TrainingProgress, args: Any, state: Any, *rest: Any, **more: Any) -> None:
        original(self, args, state, *rest, **more)
        if self.description == "self-distillation" and state.global_step == 5:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(TrainingProgress, "on_step_end", stop)
        with pytest.raises(Killed):
            distill("kd+fastbert", teacher, task_folder, killed, *options)
    first = killed / "steps" / "1-kd"
    finished = file_sha256(first / "alembert.json")
    assert not (killed / "alembert.json").exists()
    assert (killed / "checkpoints" / "self-distillation" / "checkpoint-3").is_dir()

    begun: list[tuple[str, int]] = []
    begin = TrainingProgress.on_train_begin

    def record(self: TrainingProgress, args: Any, state: Any, *rest: Any, **more: Any) -> None:
        begun.append((self.description, state.global_step))
        begin(self, args, state, *rest, **more)

    monkeypatch.setattr(TrainingProgress, "on_train_begin", record)
    assert distill("kd+fastbert", teacher, task_folder, killed, *options) == 0
    assert begun == [("self-distillation", 3)]
    assert file_sha256(first / "alembert.json") == finished
    for folder in (".", "steps/1-kd"):
        for file in ("model.safetensors", "metrics.json"):
            assert file_sha256(killed / folder / file) == file_sha256(whole / folder / file)


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str], teacher: Path, task_folder: Path) -> Callable[..., str]:
    """Runs what must be refused before anything is trained; its one message."""

    def check(method: str, output: Path, *arguments: object) -> str:
        capfd.readouterr()
        assert distill(method, teacher, task_folder, output, *arguments) == 2
        err = capfd.readouterr().err
        assert err.count("Error:") == 1
        assert "Traceback" not in err
        return err[err.index("Error:") :]

    return check


REFUSED: list[tuple[str, list[str], list[str]]] = [
    ("kd+fastbert", ["--set", "tinybert.temperature=2"], ["no method 'tinybert'", "kd+fastbert"]),
    ("kd+fastbert", ["--set", "fastbert.hard_weight=0"], ["unknown option", "hard_weight"]),
    ("kd+fastbert", ["--set", "hard_wait=0"], ["unknown option", "hard_wait", "hard_weight"]),
    ("kd+fastbert", ["--training", "fastbert.epoch=1"], ["unknown training setting", "epochs"]),
    ("kd+fastbert", ["--training", "epoch=1"], ["unknown training setting", "epochs"]),
    ("kd+nobert", [], ["unknown method 'nobert'"]),
    ("kd+kd", [], ["twice"]),
    ("kd+fastbert", ["--set", "kd.student=bilstm"], ["a BiLSTM has no layers"]),
    ("kd+ms-bert", ["--set", "ms-bert.k=nine"], ["k='nine'"]),
    ("kd+ms-bert", ["--training", "ms-bert.epochs=-1"], ["epochs=-1"]),
    ("kd+fastbert", ["--preset", "mine"], ["no preset 'mine'"]),
    ("kd+fastbert", ["--corpus", "text.txt"], ["no --corpus"]),
    ("tinybert+fastbert", ["--stages", "general"], ["--corpus"]),
]


@pytest.mark.parametrize(("method", "arguments", "words"), REFUSED)
def test_what_a_later_step_could_not_do_is_refused_before_the_first(
    refused: Callable[..., str], tmp_path: Path, method: str, arguments: list[str], words: list[str]
) -> None:
    message = refused(method, tmp_path / "run", "--student", "4x16", *arguments)
    for word in words:
        assert word in message, message
    assert not (tmp_path / "run").exists()


def test_occupied_folders_are_refused_before_the_first_step(
    refused: Callable[..., str], teacher: Path, task_folder: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("dear", encoding="utf-8")
    assert "no run of Alembert" in refused("kd+fastbert", mine, "--student", "2x16")
    assert [path.name for path in mine.iterdir()] == ["letter.txt"]
    single = tmp_path / "single"
    assert distill("fastbert", teacher, task_folder, single, "--set", "layers=[1]") == 0
    assert "another configuration" in refused("kd+fastbert", single, "--student", "2x16")
    assert not (single / "steps").exists()
