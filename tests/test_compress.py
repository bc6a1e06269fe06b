"""`alembert compress`: the plan, the clock, the choice, and the whole work on a tiny model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import concatenate_datasets
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from alembert import AdaptiveClassifier, InputError, Task, TrainingSettings, finetune, load_task
from alembert.benchmarks.evaluation import collect_exit_answers, task_texts
from alembert.benchmarks.risk_budget import CERTIFIED, EMPIRICAL, RiskBudget
from alembert.cli import compress as compress_command
from alembert.cli.app import app
from alembert.common.files import read_json, remove, write_json
from alembert.common.locks import FolderLock
from alembert.compression import compress as module
from alembert.compression import work_trainings as trainings_module
from alembert.compression.candidates import (
    Certificate,
    certify,
    dominated,
    fewest_rows,
    split_confidence,
    timed_speeds,
    without_learned_rows,
)
from alembert.compression.choice import unsure, verdict
from alembert.compression.compress import compress
from alembert.compression.durations import format_duration, parse_duration
from alembert.compression.plan import RECIPES, Pace, fitted, make_plan, measure_pace, reserve
from alembert.compression.work_clock import WorkClock
from alembert.compression.work_state import STATE, open_state
from alembert.models.loading import load_classifier, load_encoder, load_tokenizer
from alembert.models.multi_exit import MultiExitModel
from alembert.runtime.calibration_file import CalibratedSpeed
from alembert.runtime.export import export_classifier


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("40m", 2400), ("2h", 7200), ("1h30m", 5400), ("90s", 90), ("0.5 H", 1800), ("1d", 86400)],
)
def test_lengths_of_time(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "40", "m", "0m", "-3m", "2 weeks", "1h30"])
def test_what_is_no_length_of_time(text: str) -> None:
    with pytest.raises(InputError, match="40m, 2h"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(42.4, "42 s"), (61, "1 min"), (2400, "40 min"), (5400, "1 h 30 min"), (7200, "2 h")],
)
def test_lengths_of_time_are_shown_in_two_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_the_clock_goes_on_after_a_session_that_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "work" / "clock.json"
    with WorkClock(path) as clock:
        time.sleep(0.2)
        assert clock.seconds >= 0.2
    first = read_json(path)["seconds"]
    assert first >= 0.2
    write_json(path, {"seconds": 100.0})  # what a killed session had recorded last
    with WorkClock(path) as clock:
        assert 100.0 <= clock.seconds < 110.0
    assert read_json(path)["seconds"] >= 100.0


PACE = Pace(training_step=20.0, evaluated_row=0.0)


def plan(task: Task, teacher: Path, seconds: float | None, **how: Any) -> Any:
    model = load_classifier(str(teacher))
    given = {"needs_finetuning": False, "max_length": 32, "seed": 1} | how
    return make_plan(model, task, PACE, seconds=seconds, **given)


def test_a_plan_without_a_budget_is_that_of_the_recipes(task: Task, teacher: Path) -> None:
    trainings = plan(task, teacher, None, needs_finetuning=True)
    assert [training.name for training in trainings] == ["teacher", *(recipe.name for recipe in RECIPES)]
    steps = -(-task.dataset("train").num_rows // 32)
    for training, recipe in zip(trainings[1:], RECIPES, strict=True):
        assert training.settings["epochs"] == recipe.epochs
        assert training.seconds == pytest.approx(steps * recipe.epochs * recipe.cost * PACE.training_step)
    exits, student_exits, student = trainings[1:]
    assert exits.options == {"placement": "every_k", "k": 1, "exit_head": "mean", "exit_epochs": 1.0}
    assert (student_exits.method, student_exits.options) == ("alembert", {"exit_epochs": 1.0})
    assert student.student == "2x32"


def test_what_is_fitted_takes_no_longer_than_there_is(task: Task, teacher: Path) -> None:
    wanted = plan(task, teacher, 1e4)
    total = sum(training.seconds for training in wanted)

    @settings(max_examples=25, deadline=None)
    @given(share=st.floats(0.01, 1.5))
    def fits(share: float) -> None:
        trainings = fitted(wanted, share * total)
        assert [training.name for training in trainings] == [
            recipe.name for recipe in RECIPES[: len(trainings)]
        ]
        assert sum(training.seconds for training in trainings) <= share * total + 1e-6
        for training, recipe in zip(trainings, RECIPES, strict=False):
            assert 0.33 * recipe.epochs <= training.settings["epochs"] <= recipe.epochs
            if "exit_epochs" in recipe.options:
                share_of_epochs = training.settings["epochs"] / recipe.epochs
                assert training.options["exit_epochs"] == pytest.approx(share_of_epochs, abs=0.02)

    fits()
    assert fitted(wanted, None) == fitted(wanted, 10 * total) == wanted
    assert len(fitted(wanted, 0.9 * total)) == len(RECIPES) and fitted(wanted, 1.0) == []


def test_finetuning_gets_two_fifths_of_the_budget(task: Task, teacher: Path) -> None:
    finetuning = plan(task, teacher, 100.0, needs_finetuning=True)[0]
    assert finetuning.seconds == pytest.approx(40.0)
    for seconds in (5.0, -100.0):
        with pytest.raises(InputError, match=r"at the least: give .* more, or a fine-tuned model"):
            plan(task, teacher, seconds, needs_finetuning=True)


def test_the_pace_is_that_of_this_machine(task: Task, teacher: Path) -> None:
    source = str(teacher)
    model = load_classifier(source)
    modes: list[tuple[bool, bool]] = []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.register_forward_pre_hook(lambda *_: modes.append((torch.is_grad_enabled(), model.training)))
    pace = measure_pace(model, load_tokenizer(source), task, 32, seed=1)
    assert 0 < pace.evaluated_row < pace.training_step < 10
    assert set(modes) == {(True, True), (False, False)}
    assert not model.training
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_dominated_rows() -> None:
    def row(metric: float, rate: float) -> dict[str, float]:
        return {"metric": metric, "ratio_to_baseline": rate}

    rows = {
        "slow": row(0.9, 10),
        "front": row(0.9, 20),
        "fast": row(0.8, 30),
        "twin": row(0.8, 30),
        "bad": row(0.7, 5),
    }
    assert dominated(rows) == ["slow", "bad"]
    assert dominated({"alone": row(0.5, 1)}) == []


def test_several_models_share_the_confidence() -> None:
    assert split_confidence(0.95, 1) == pytest.approx(0.95)
    assert split_confidence(0.95, 4) == pytest.approx(0.9875)


def test_a_faster_model_that_is_not_sure_is_named() -> None:
    def row(name: str, ratio: float | None, kept: bool, rows_needed: int | None) -> dict[str, Any]:
        return {
            "name": name,
            "ratio": ratio,
            "kept": kept,
            "rows_needed": rows_needed,
            "metric_difference": -0.002,
        }

    best, over = row("teacher", 7.6, True, None), row("student", None, False, None)
    slow, fast = row("exits", 6.0, False, 2000), row("student-exits", 21.0, False, 4700)
    assert unsure(best, [best, over, slow], 1000) is None
    sentence = unsure(best, [best, over, slow, fast], 1000)
    assert sentence is not None and "student-exits, 21.0 times" in sentence
    assert "-0.2 points" in sentence and "4,700 dev rows" in sentence
    assert unsure(best, [best, over, slow, fast], 469) is None
    assert "exits, 6.0 times" in (unsure(None, [over, slow], 1000) or "")
    assert unsure(None, [over, slow], 1000, min_speedup=7.0) is None


def test_too_few_rows_guarantee_nothing(task: Task, many: Task) -> None:
    budget = RiskBudget(most=0.05, confidence=0.95)
    assert task.dataset("dev").num_rows < fewest_rows(task, budget) <= many.dataset("dev").num_rows


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, task_folder: Path) -> Task:
    """The tiny task with a dev split of rows enough to certify something."""
    folder = tmp_path_factory.mktemp("many")
    for split in ("train", "test"):
        (folder / f"{split}.tsv").write_text((task_folder / f"{split}.tsv").read_text())
    head, *lines = (task_folder / "dev.tsv").read_text().splitlines()
    (folder / "dev.tsv").write_text("\n".join([head, *(lines * 6)]) + "\n")
    return load_task(folder)


def test_a_model_within_the_budget_may_not_be_sure(many: Task, tiny_encoder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = load_encoder(
        str(tiny_encoder), label_names=many.label_names, problem_type="single_label_classification"
    )
    model = MultiExitModel.from_full_model(encoder, exit_layers=(1, 2), exit_head="mean")
    model.save_pretrained(tmp_path / "run")
    load_tokenizer(str(tiny_encoder)).save_pretrained(tmp_path / "run")
    exported = tmp_path / "exported"
    export_classifier(tmp_path / "run", exported, precision="fp32")
    labels = np.asarray(many.dataset("dev")["labels"])
    classifier = AdaptiveClassifier.from_pretrained(exported, speed=0.0)
    own = np.log(classifier.predict_proba(task_texts(many, "dev"), speed=0.0))
    wrong = np.flatnonzero(own.argmax(1) != labels)
    assert len(wrong) > 40, "random weights"

    def stands(lost_rows: int, confidence: float = 0.999) -> Certificate:
        """Against a reference that answers as the model does, but for some rows that it alone has right."""
        reference = own.copy()
        reference[wrong[:lost_rows]] = 10 * np.eye(len(many.label_names))[labels[wrong[:lost_rows]]]
        budget = RiskBudget(most=0.05, confidence=confidence)
        files = {"model.safetensors": "0"}
        return certify(exported, reference, many, budget, lambda *_: None, reference_files=files)

    near = stands(4)
    assert not near.kept and near.within_on_dev and near.risk <= 0.025
    assert near.rows_needed is not None and near.rows_needed > len(labels)
    stored = CalibratedSpeed.read(exported)
    assert stored is not None and stored.speed == near.speed
    assert read_json(exported / "calibration.json")["mode"] == EMPIRICAL
    assert stored.record["reference_files"] == {"model.safetensors": "0"}
    timed = timed_speeds(exported, near.speed)
    assert {0.0, near.speed} <= set(timed) <= {row["speed"] for row in stored.record["curve"]}
    assert list(timed) == sorted(timed) and len(timed) <= 4
    nearer = stands(7)  # of 192 rows: within the budget, but beyond half of it
    assert (nearer.kept, nearer.within_on_dev, nearer.speed) == (False, True, 0.0)
    assert nearer.risk == pytest.approx(7 / 192) and CalibratedSpeed.read(exported) is None
    assert nearer.rows_needed is not None and nearer.rows_needed > len(labels)
    over = stands(12)
    assert (over.kept, over.within_on_dev, over.rows_needed, over.speed) == (False, False, None, 0.0)
    assert over.risk == pytest.approx(12 / 192)
    sure = stands(0, confidence=0.95)
    assert sure.kept and sure.rows_needed is None and sure.reason is None


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes that a tiny model learns by in seconds."""
    recipes = tuple(replace(recipe, epochs=25, learning_rate=3e-3) for recipe in RECIPES)
    monkeypatch.setattr(module, "RECIPES", recipes)


def test_interrupted_work_goes_on_and_leaves_the_best_model(
    many: Task, teacher: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, real = tmp_path / "small", trainings_module.distill
    begun: list[str] = []

    def interrupted(method: str, *arguments: Any, **options: Any) -> Any:
        begun.append(method)
        if method == "alembert":
            raise KeyboardInterrupt
        return real(method, *arguments, **options)

    monkeypatch.setattr(trainings_module, "distill", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compress(str(teacher), many, output, max_drop=0.3)
    assert begun == ["pabee", "alembert"]
    state = read_json(output / "compress.json")
    assert {name: record["status"] for name, record in state["trainings"].items()} == {"exits": "done"}

    with pytest.raises(InputError, match="seed differ"):
        compress(str(teacher), many, output, max_drop=0.3, seed=1)
    monkeypatch.setattr(trainings_module, "distill", real)
    budgets: list[RiskBudget] = []

    def certified(*arguments: Any, **options: Any) -> Certificate:
        budgets.append(arguments[3])
        return certify(*arguments, **options)

    monkeypatch.setattr(module, "certify", certified)
    summary = compress(str(teacher), many, output, max_drop=0.3)
    # All four hold together with the confidence asked for.
    assert [budget.confidence for budget in budgets] == pytest.approx([1 - 0.05 / 4] * 4)
    assert summary == read_json(output / "summary.json")
    assert [row["name"] for row in summary["candidates"]] == ["teacher", "exits", "student-exits", "student"]
    assert summary["met"] and summary["mode"] == CERTIFIED
    best = summary["best"]
    kept = [row for row in summary["candidates"] if row["kept"]]
    assert best["ratio"] == max(row["ratio"] for row in kept)
    assert best["risk"] <= 0.3 and "95% sure" in summary["verdict"]
    measured = read_json(output / "benchmark" / "benchmark.json")["results"]
    for row in kept:
        assert row["texts_per_second"] > 0 and 0 <= row["metric"] <= 1
        own = [
            line for line in measured if (line["name"], line["backend"]) == (f"{row['name']}-int8", "onnx")
        ]
        timed = {line["speed"] or 0.0 for line in own}
        assert {0.0, row["speed"]} <= timed and (len(timed) > 1) == (
            row["name"] in ("exits", "student-exits")
        )
        (taken,) = (line for line in own if (line["speed"] or 0.0) == row["speed"])
        assert taken["texts_per_second"] == row["texts_per_second"]

    texts, labels = task_texts(many, "test"), np.asarray(many.dataset("test")["labels"])
    names = many.label_names
    onnx = AdaptiveClassifier.from_pretrained(output / "best" / "onnx")
    answers = [names.index(str(answer.label)) for answer in onnx.predict(texts)]
    assert np.mean(np.array(answers) == labels) == pytest.approx(best["metric"], abs=2 / len(labels))
    calibrated = CalibratedSpeed.read(output / "best" / "onnx")
    assert calibrated is None or calibrated.speed == best["speed"]
    assert AdaptiveClassifier.from_pretrained(output / "best" / "torch").predict(texts[0]).label in names

    card = (output / "best" / "README.md").read_text()
    assert summary["verdict"] in card and f"**{best['name']}**" in card and f"| {best['ratio']:.1f} |" in card
    assert summary["report"] == "report/report.html"
    page = (output / "report" / "report.html").read_text()
    assert "Compression" in page and "student-exits" in page
    assert "lost against the teacher" in page
    lines = read_json(output / "report" / "report.json")["compression"]
    assert [line["model"] for line in lines["candidates"]] == [
        f"{row['name']}, int8" for row in summary["candidates"]
    ]
    assert {line["outcome"] for line in lines["candidates"]} >= {"best"} and len(lines["steps"]) == 3
    verdict = read_json(output / "report" / "report.json")["verdict"]
    assert (verdict["model"], verdict["ratio"]) == (f"{best['name']}-int8", best["ratio"])
    assert (verdict["guarantee"]["max_drop"], verdict["guarantee"]["confidence"]) == (0.3, 0.95)
    exported = {path.name for path in (output / "exports").iterdir()}
    assert exported == {f"{row['name']}-int8" for row in summary["candidates"] if not row["dominated"]}

    before = (output / "summary.json").stat().st_mtime_ns
    assert compress(str(teacher), many, output, max_drop=0.3) == summary
    assert (output / "summary.json").stat().st_mtime_ns == before

    def stopped(*_: Any, **__: Any) -> Certificate:
        raise KeyboardInterrupt

    # What is made anew because it is gone is not finished until it is.
    shutil.rmtree(output / "best")
    monkeypatch.setattr(module, "certify", stopped)
    with pytest.raises(KeyboardInterrupt):
        compress(str(teacher), many, output, max_drop=0.3)
    assert "finished" not in read_json(output / STATE)
    monkeypatch.setattr(module, "certify", certify)

    def no_training(*_: Any, **__: Any) -> Any:
        raise AssertionError("another aim needs no other models")

    monkeypatch.setattr(trainings_module, "distill", no_training)
    strict = compress(str(teacher), many, output, max_drop=0.1)
    assert strict["max_drop"] == 0.1 and strict["mode"] == CERTIFIED and strict["plan"] == summary["plan"]
    for row in strict["candidates"]:
        assert row["kept"] == (row["rows_needed"] is None) or row["risk"] >= 0.1
        assert (row["ratio"] is None) == (not row["kept"] and row["rows_needed"] is None)
    seen = compress(str(teacher), many, output, max_drop=0.02, mode=EMPIRICAL)
    assert seen["mode"] == EMPIRICAL and "guarantees nothing" in seen["verdict"]
    for row in seen["candidates"]:
        assert row["kept"] == (row["risk"] <= 0.02) and row["rows_needed"] is None
    assert seen["met"] and f"**{seen['best']['name']}**" in (output / "best" / "README.md").read_text()
    unmet = compress(str(teacher), many, output, max_drop=0.3, min_speedup=1e6)
    assert not unmet["met"] and not (output / "best").exists()
    assert (output / "runs" / "exits" / "model.safetensors").exists()


def test_an_interrupted_removal_leaves_nothing_that_looks_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configuration, aims = {"seed": 1}, {"max_drop": 0.1}
    folder, real = tmp_path / "small", shutil.rmtree
    open_state(folder, configuration, aims, False)
    for name in ("best", "exports", "report", "runs"):
        (folder / name).mkdir()
        (folder / name / "content").write_text("old")
    write_json(folder / "summary.json", {"met": True})
    write_json(folder / STATE, read_json(folder / STATE) | {"finished": True, "trainings": {"exits": {}}})
    removed: list[Path] = []

    def interrupted(path: Path, **how: Any) -> None:
        if len(removed) == 2:
            raise KeyboardInterrupt
        removed.append(path)
        real(path, **how)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_state(folder, configuration, aims, True)
    monkeypatch.setattr(shutil, "rmtree", real)
    state = open_state(folder, configuration, aims, False)
    assert "finished" not in state and state["trainings"] == {}
    assert [path.name for path in folder.iterdir()] == [STATE]


def test_a_folder_whose_removal_is_interrupted_is_gone_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("old")

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        remove(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    monkeypatch.undo()
    (tmp_path / "model").mkdir()
    remove(tmp_path / "model")
    remove(tmp_path / "model")
    assert not list(tmp_path.iterdir())

    def immovable(*_: Any) -> None:
        raise OSError

    monkeypatch.setattr(Path, "replace", immovable)
    (tmp_path / "model").mkdir()
    remove(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_the_teacher_reads_whole_texts_where_candidates_do_not(
    many: Task,
    teacher: Path,
    tmp_path: Path,
    quick: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def held_against(exported: Path, reference: np.ndarray, *_: Any, **options: Any) -> Certificate:
        whole = AdaptiveClassifier.from_pretrained(teacher, speed=0.0)
        assert options["max_length"] == 4 < whole.max_length
        expected = collect_exit_answers(whole, task_texts(many, "dev")).logits[:, -1]
        np.testing.assert_allclose(reference, expected, atol=1e-5)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "certify", held_against)
    monkeypatch.setattr(module, "RECIPES", ())
    caplog.set_level("WARNING", "alembert")
    with pytest.raises(KeyboardInterrupt):
        compress(str(teacher), many, tmp_path / "small", max_drop=0.3, max_length=4)
    assert "rows of dev are longer than the 4 tokens" in caplog.text


def test_the_command_says_when_nothing_is_good_enough(
    many: Task, teacher: Path, task_folder: Path, tmp_path: Path, quick: None
) -> None:
    arguments = ["compress", "--model", str(teacher), "--data", str(task_folder), "--output", str(tmp_path / "small"),
                 "--mode", "empirical", "--min-speedup", "100000", "--budget", "3s", "--json"]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1, result.output
    summary = json.loads(result.stdout)
    assert not summary["met"] and summary["best"] is None
    assert "100000 times" in summary["verdict"] or "nothing could be shown" in summary["verdict"]
    assert not (tmp_path / "small" / "best").exists()


def test_what_cannot_be_compressed_is_refused(
    teacher: Path, write_task: Callable[..., Path], task: Task, tmp_path: Path
) -> None:
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="not empty"):
            compress(str(teacher), task, occupied, max_drop=0.3, overwrite=overwrite)
    with pytest.raises(InputError, match="min_speedup"):
        compress(str(teacher), task, tmp_path / "a", min_speedup=0)
    with pytest.raises(InputError, match="max_drop"):
        compress(str(teacher), task, tmp_path / "b", max_drop=2)
    inside = tmp_path / "teacher"
    shutil.copytree(teacher, inside)
    with pytest.raises(InputError, match=r"lies in .*copied"):
        compress(str(inside), task, inside / "small", max_drop=0.3)
    with pytest.raises(InputError, match="is a file"):
        compress(str(teacher), task, occupied / "thesis.txt", max_drop=0.3)
    for wrong in ({"max_length": 0}, {"max_length": -5}, {"seed": -1}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            compress(str(teacher), task, tmp_path / "a", max_drop=0.3, **wrong)
    with pytest.raises(InputError, match=r"dev has 32 rows, .* takes 91 at the least"):
        compress(str(teacher), task, tmp_path / "d", max_drop=0.05)
    assert not (tmp_path / "d").exists()
    known = replace(task, splits=task.splits | {"dev": task.dataset("train").select(range(20))})
    with pytest.raises(InputError, match="all rows of dev stand in train"):
        compress(str(teacher), known, tmp_path / "e", mode=EMPIRICAL)
    values = load_task(write_task(tmp_path / "values", "regression"))
    with pytest.raises(InputError, match="scale"):
        compress(str(teacher), values, tmp_path / "c")
    assert not (tmp_path / "a").exists() and not (tmp_path / "c").exists()
    assert (occupied / "thesis.txt").read_text() == "mine"


def test_a_model_with_exits_is_no_teacher(many: Task, fast: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has exits already"):
        compress(str(fast), many, tmp_path / "a", max_drop=0.3)
    with pytest.raises(InputError, match="takes 3 to 64 tokens"):
        compress(str(tiny_encoder), many, tmp_path / "b", max_drop=0.3, max_length=100)


@pytest.mark.parametrize("kind", ["regression", "single"])
def test_exports_are_for_the_length_and_the_policy_of_the_work(
    kind: str, write_task: Callable[..., Path], teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, asked = load_task(write_task(tmp_path / "data", kind)), []
    monkeypatch.setattr(module, "export_once", lambda run, folder, _, **how: asked.append((folder.name, how)))
    scale = {"scale": 2.0} if kind == "regression" else {}
    risk = RiskBudget(most=0.3, mode=EMPIRICAL, **scale)
    work = module._Work(
        str(teacher), task, tmp_path / "work", risk, None, None, 20, 1, False, lambda *_: None
    )
    done = {"status": "done", "reason": None, "seconds": 1.0}
    work.state |= {"trainings": {"exits": done, "student": done}, "needs_finetuning": False}
    work._export()
    # Exits of regression compare themselves with each other: no graph for single texts can.
    merged = {"teacher-int8": False, "exits-int8": kind == "single", "student-int8": False}
    assert {name: how["merge_exits"] for name, how in asked} == merged
    assert all(how["max_length"] == 20 for _, how in asked)


def test_the_verdict_names_what_is_promised() -> None:
    best = {"name": "exits", "precision": "int8", "ratio": 4.0, "metric_difference": -0.03, "kept": True}
    budget = RiskBudget(most=0.01)
    assert verdict(best, [best], budget, None).endswith("95% sure of at most 1 points")
    said = verdict(best, [best], budget, None, "f1_macro")
    assert said.endswith("95% sure of at most 1 points of accuracy lost")
    said = verdict(best, [best], RiskBudget(most=0.01, scale=5.0), None, "pearson")
    assert said.endswith("at most 0.05, no text counting for more than 5")
    nearest = best | {"kept": False, "risk": -0.004}
    assert "gained 0.4 points on dev: allow more, or give" in verdict(None, [nearest], budget, None)
    assert verdict(None, [nearest], RiskBudget(most=0.01, mode=EMPIRICAL), None).endswith("dev: allow more")


@pytest.fixture
def without_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Works end with their trainings."""
    monkeypatch.setattr(module._Work, "_export", lambda self: {})
    monkeypatch.setattr(module._Work, "_certify", lambda *_: {})
    monkeypatch.setattr(module._Work, "_benchmark", lambda *_: {})
    monkeypatch.setattr(module._Work, "_choose", lambda *_: {"candidates": []})
    monkeypatch.setattr(module._Work, "_report", lambda *_: None)


class _Distil:
    """In place of distillation: remembers what it is told, and lets the work's clock run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.taken, self.interrupts, self.fails = 0.0, 1.0, "", ""
        self.calls: list[tuple[str, float, float | None]] = []
        monkeypatch.setattr(WorkClock, "seconds", property(lambda _: self.now))
        monkeypatch.setattr(trainings_module.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(trainings_module, "distill", self)

    def __call__(
        self, method: str, *_: Any, settings: dict[str, Any], stop_at: float | None, **__: Any
    ) -> None:
        self.calls.append((method, settings["epochs"], None if stop_at is None else stop_at - self.now))
        # Longer than planned: until it is stopped.
        self.now = max(self.now, min(self.now + self.taken, np.inf if stop_at is None else stop_at))
        if method == self.interrupts:
            raise KeyboardInterrupt
        if method == self.fails:
            raise InputError("diverged")


@pytest.fixture
def distil(monkeypatch: pytest.MonkeyPatch) -> _Distil:
    """At the pace `PACE`."""
    monkeypatch.setattr(module, "measure_pace", lambda *_: PACE)
    return _Distil(monkeypatch)


def statuses(output: Path) -> dict[str, str]:
    trainings = read_json(output / "compress.json")["trainings"]
    return {name: record["status"] for name, record in trainings.items()}


def test_the_budget_is_kept_whatever_trainings_take(
    many: Task, teacher: Path, tmp_path: Path, without_results: None, distil: _Distil
) -> None:
    output = tmp_path / "small"
    kept_back = reserve(many, PACE, len(RECIPES))
    wanted = {training.method: training.seconds for training in plan(many, teacher, None)}
    budget = 2 * kept_back + sum(wanted.values())
    distil.taken = 1e9
    compress(str(teacher), many, output, max_drop=0.3, budget=budget)
    first, second, third = distil.calls
    assert first == ("pabee", 4, pytest.approx(1.3 * wanted["pabee"]))
    # The others took 1.3 times what was planned, so that the rest is expected to.
    others = wanted["alembert"] + wanted["lrc-bert"]
    share = (others - 0.3 * wanted["pabee"] + 0.7 * kept_back) / (1.3 * others)
    assert second[:2] == ("alembert", pytest.approx(share * 6, abs=0.01))
    assert second[2] == pytest.approx(1.3 * 1.3 * share * wanted["alembert"])
    assert third[1] < second[1], "it took more time than that: fewer epochs"
    assert distil.now <= budget - kept_back + 1e-6
    records = read_json(output / "compress.json")["trainings"]
    assert records["exits"]["reason"] == "stopped when its time was up"
    assert f"{third[1]:g} of 6 epochs" in records["student"]["reason"]
    assert set(statuses(output).values()) == {"done"}


def test_time_that_trainings_did_not_take_goes_to_those_that_follow(
    many: Task, teacher: Path, tmp_path: Path, without_results: None, distil: _Distil
) -> None:
    wanted = plan(many, teacher, None)
    total = sum(training.seconds for training in wanted)
    budget = reserve(many, PACE, len(wanted)) + 0.6 * total
    distil.taken = 0.1 * wanted[0].seconds
    compress(str(teacher), many, tmp_path / "a", max_drop=0.3, budget=budget)
    assert [epochs for _, epochs, _ in distil.calls] == [pytest.approx(0.6 * 4, abs=0.01), 6, 6]
    # What takes longer than expected leaves fewer epochs to the others, or none.
    distil.calls.clear()
    distil.now, distil.taken = 0.0, 0.75 * wanted[0].seconds
    compress(str(teacher), many, tmp_path / "b", max_drop=0.3, budget=budget)
    (_, first, _), (method, second, _), *_ = distil.calls
    assert first == pytest.approx(0.6 * 4, abs=0.01) and method == "alembert" and second < 0.6 * 6


def test_an_interrupted_training_goes_on_with_what_is_left_of_its_time(
    many: Task, teacher: Path, tmp_path: Path, without_results: None, distil: _Distil
) -> None:
    output = tmp_path / "small"
    wanted = {training.method: training.seconds for training in plan(many, teacher, None)}
    kept_back = reserve(many, PACE, len(RECIPES))
    # Time enough for the first model, and hardly any for the others.
    distil.taken, distil.interrupts = 0.9 * wanted["pabee"], "pabee"
    budget = kept_back + sum(wanted.values())
    with pytest.raises(KeyboardInterrupt):
        compress(str(teacher), many, output, max_drop=0.3, budget=budget)
    distil.interrupts = ""
    distil.now = budget - kept_back - 0.1 * wanted["pabee"]
    compress(str(teacher), many, output, max_drop=0.3, budget=budget)
    # What was begun is gone on with as it was, until the budget ends it; the others have no time.
    again = distil.calls[1]
    assert again[:2] == distil.calls[0][:2] and again[2] <= 0.1 * wanted["pabee"] + 1e-6
    assert statuses(output) == {"exits": "done", "student-exits": "skipped", "student": "skipped"}
    # More time trains what had none, and nothing twice.
    distil.calls.clear()
    distil.taken = 1.0
    compress(str(teacher), many, output, max_drop=0.3, budget=10 * budget)
    assert [method for method, *_ in distil.calls] == ["alembert", "lrc-bert"]
    assert set(statuses(output).values()) == {"done"}


def test_what_failed_is_planned_anew_with_another_budget(
    many: Task, teacher: Path, tmp_path: Path, without_results: None, distil: _Distil
) -> None:
    output = tmp_path / "small"
    distil.fails, wanted = "alembert", plan(many, teacher, None)
    budget = reserve(many, PACE, len(RECIPES)) + 1.1 * sum(training.seconds for training in wanted)
    compress(str(teacher), many, output, max_drop=0.3, budget=budget)
    assert statuses(output) == {"exits": "done", "student-exits": "failed", "student": "done"}
    broken = output / "runs" / "student-exits"
    broken.mkdir(parents=True)
    distil.calls.clear()
    distil.fails = ""
    compress(str(teacher), many, output, max_drop=0.3, budget=2 * budget)
    ((method, epochs, left),) = distil.calls
    assert (method, epochs) == ("alembert", 6.0) and left is not None and left > wanted[1].seconds
    assert not broken.exists() and set(statuses(output).values()) == {"done"}
    planned = read_json(output / "compress.json")["plan"]
    assert [training["name"] for training in planned] == ["exits", "student", "student-exits"]


def test_a_work_is_one_process_s_and_what_is_hidden_is_not_its_own(tmp_path: Path) -> None:
    for kept in (".git", ".bashrc"):
        folder = tmp_path / f"mine{kept}"
        folder.mkdir()
        (folder / kept).write_text("precious")
        with pytest.raises(InputError, match="is not empty"):
            open_state(folder, {"seed": 1}, {}, False)
        assert (folder / kept).read_text() == "precious"
    lock = FolderLock(tmp_path / "work")
    lock.acquire()
    for overwrite in (False, True):
        open_state(tmp_path / "work", {"seed": 1}, {}, overwrite)
        (tmp_path / "work" / "runs").mkdir()
        program = (
            "import sys\nfrom pathlib import Path\nfrom alembert.common.locks import FolderLock\n"
            "FolderLock(Path(sys.argv[1])).acquire()"
        )
        other = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "work")],
            capture_output=True,
            text=True,
            check=False,
        )
        assert "another process is working on it" in other.stderr
    open_state(tmp_path / "work", {"seed": 2}, {}, True)
    assert not (tmp_path / "work" / "runs").exists()
    lock.release()


def test_beginning_anew(
    many: Task, teacher: Path, tmp_path: Path, without_results: None, distil: _Distil
) -> None:
    output = tmp_path / "small"
    for times in (1, 2):
        compress(str(teacher), many, output, max_drop=0.3, overwrite=times == 2)
        assert len(distil.calls) == times * len(RECIPES)
    inside = output / "runs" / "teacher"
    shutil.copytree(teacher, inside)
    with pytest.raises(InputError, match="lies in"):
        compress(str(inside), many, output, max_drop=0.3, overwrite=True)
    assert (inside / "model.safetensors").exists()


def test_a_teacher_that_knows_nothing_is_refused(
    many: Task, tiny_encoder: Path, teacher: Path, tmp_path: Path
) -> None:
    model = load_classifier(str(teacher))
    torch.nn.init.zeros_(model.classifier.weight)
    model.save_pretrained(tmp_path / "useless")
    load_tokenizer(str(teacher)).save_pretrained(tmp_path / "useless")
    with pytest.raises(InputError, match="no better than always"):
        compress(str(tmp_path / "useless"), many, tmp_path / "small", max_drop=0.3, max_length=32)
    assert not (tmp_path / "small" / "best").exists()


def test_dev_is_what_the_teacher_held_out(
    teacher: Path, tiny_encoder: Path, write_task: Callable[..., Path], tmp_path: Path
) -> None:
    folder = write_task(tmp_path / "data")
    (folder / "dev.tsv").unlink()
    dev = {seed: list(load_task(folder, seed=seed).dataset("dev")["text"]) for seed in (1, 7)}
    assert dev[1] != dev[7]
    learning = TrainingSettings(epochs=0.1, max_length=32, seed=7)
    finetune(str(tiny_encoder), load_task(folder, seed=7), tmp_path / "run", settings=learning)
    for source, seed in ((tmp_path / "run", 7), (tiny_encoder, 1)):
        loaded = compress_command._load(str(source), str(folder), None, 1, {})
        assert list(loaded.dataset("dev")["text"]) == dev[seed]
    # It learned all rows of train.
    with pytest.raises(InputError, match="has no dev split"):
        compress_command._load(str(teacher), str(folder), None, 1, {})


def test_rows_of_dev_that_stand_in_train_are_left_out(task: Task) -> None:
    train, dev = task.dataset("train"), task.dataset("dev")
    known = set(train["text"])
    new = [row for row, text in enumerate(dev["text"]) if text not in known]
    shared = replace(task, splits=task.splits | {"dev": concatenate_datasets([train.select(range(5)), dev])})
    assert list(without_learned_rows(shared).dataset("dev")["text"]) == [dev["text"][row] for row in new]
    alone = replace(task, splits={"dev": dev})
    assert without_learned_rows(alone) is alone
