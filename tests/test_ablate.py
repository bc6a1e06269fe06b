"""Ablations: every row of the tables runs, is compared with the full method, and stands beside the paper's figures."""

from __future__ import annotations

import io
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import concatenate_datasets

import alembert
from alembert.cli.app import run
from alembert.common.errors import InputError
from alembert.compression import ablation as ablation_module
from alembert.compression.ablation import ablate, summarise
from alembert.methods.ablations import ABLATIONS, FULL, find_ablations
from alembert.methods.base import resolve
from alembert.methods.registry import find_method
from alembert.reports.ablation import ablation_table, messages

TINY: dict[str, Any] = {"epochs": 1, "batch_size": 32, "max_length": 32}
STUDENT: dict[str, Any] = {"student_heads": 2}


@pytest.mark.parametrize("method", ABLATIONS)
def test_tables_are_consistent(method: str) -> None:
    table = find_ablations(method)
    assert table.rows[0].name == FULL and table.rows[0].steps[0].options == {}
    assert len({row.name for row in table.rows}) == len(table.rows)
    for row in table.rows:
        for step in row.steps:
            resolve(find_method(step.method or method), "default", dict(step.options), {})
        if row.figures is not None:
            assert set(row.figures.values) <= set(table.columns)


def test_averages_of_tinybert_are_those_of_its_tasks() -> None:
    rows = [row.figures.values for row in find_ablations("tinybert").rows if row.figures is not None]
    assert len(rows) == 12
    for values in rows:
        tasks = [values[name] for name in ("MNLI-m", "MNLI-mm", "MRPC", "CoLA")]
        # Printed to one decimal, from tasks with more.
        assert abs(statistics.mean(tasks) - values["Avg"]) <= 0.1001


def test_summary_spelled_out() -> None:
    summary = summarise([0.5, 0.7, 0.9], [0.6, 0.6, 0.9])
    assert summary["mean"] == pytest.approx(0.7)
    assert summary["standard_deviation"] == pytest.approx((0.08 / 2) ** 0.5)
    assert summary["difference"] == pytest.approx(0.0)
    assert summarise([0.5], None) == {"mean": 0.5, "standard_deviation": None, "difference": None}


@pytest.fixture(scope="module")
def tinybert(
    tmp_path_factory: pytest.TempPathFactory, teacher: Path, task: alembert.Task
) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ablate") / "tinybert"
    rows = [
        "without-prediction",
        "without-task-distillation",
        "mapping-top",
        "without-general",
        "without-augmentation",
    ]
    return folder, ablate(
        "tinybert", str(teacher), task, folder, seeds=[1, 2], rows=rows, student="2x16",
        options=STUDENT | {"intermediate_epochs": 1}, settings=TINY,
    )  # fmt: skip


def test_rows_are_means_over_seeds_of_their_runs(
    tinybert: tuple[Path, dict[str, Any]], task: alembert.Task
) -> None:
    folder, results = tinybert
    assert json.loads((folder / "ablation.json").read_text()) == results
    full = results["rows"][0]
    assert full["name"] == FULL and full["dev"]["difference"] == 0
    complete = [row for row in results["rows"] if row["state"] == "complete"]
    assert [row["name"] for row in complete] == [
        FULL, "without-prediction", "without-task-distillation", "mapping-top",
    ]  # fmt: skip
    for row in complete:
        for split in ("dev", "test"):
            values = []
            for seed in (1, 2):
                run_folder = folder / row["name"] / f"seed-{seed}"
                configuration = json.loads((run_folder / "alembert.json").read_text())["configuration"]
                assert configuration["settings"]["seed"] == seed
                metrics = json.loads((run_folder / "metrics.json").read_text())
                values.append(metrics[split]["full"][task.main_metric])
            assert row[split]["mean"] == pytest.approx(statistics.mean(values))
            assert row[split]["standard_deviation"] == pytest.approx(statistics.stdev(values))
            assert row[split]["difference"] == pytest.approx(row[split]["mean"] - full[split]["mean"])


def test_rows_change_what_they_say(tinybert: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = tinybert

    def configuration(*parts: str) -> dict[str, Any]:
        path = folder.joinpath(*parts) / "alembert.json"
        return dict(json.loads(path.read_text())["configuration"])

    assert configuration("mapping-top", "seed-1")["options"]["mapping"] == "top"
    labels = configuration("without-task-distillation", "seed-1")
    assert (labels["method"], labels["options"]["hard_weight"]) == ("kd", 1.0)
    first = configuration("without-prediction", "seed-1-step-1")
    assert first["options"]["stages"] == ["task-intermediate"]
    second = configuration("without-prediction", "seed-1")
    assert second["method"] == "kd"
    assert second["options"]["student"] == str(folder / "without-prediction" / "seed-1-step-1")


def test_rows_that_make_no_difference_are_left_out(tinybert: tuple[Path, dict[str, Any]]) -> None:
    _, results = tinybert
    left_out = {row["name"]: row["message"] for row in results["rows"] if row["state"] == "left out"}
    assert left_out.keys() == {"without-general", "without-augmentation"}
    assert "--augmented" in left_out["without-augmentation"]
    assert len(messages(results)) == 2


def test_rows_without_a_general_stage_and_without_augmentation(
    teacher: Path, task: alembert.Task, tmp_path: Path
) -> None:
    settings = TINY | {"batch_size": 16}
    student = tmp_path / "general"
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(task.dataset("train")["text"]) + "\n", encoding="utf-8")
    alembert.distill(
        "tinybert", str(teacher), None, student, corpus=str(corpus),
        options={"student": "2x16", "stages": ("general",)}, settings=settings,
    )  # fmt: skip
    train = task.dataset("train")
    augmented = concatenate_datasets([train, train.select(range(20))])
    results = ablate(
        "tinybert", str(teacher), task, tmp_path / "table", rows=["without-general", "without-augmentation"],
        student=str(student), options={"intermediate_epochs": 1}, settings=settings, augmented=augmented,
        teacher_cache=tmp_path / "cache",
    )  # fmt: skip
    # What a teacher says of other rows is kept elsewhere.
    for cache, rows in (("cache", len(augmented)), ("cache-without-augmentation", len(train))):
        assert len(np.load(tmp_path / cache / "lengths.npy")) == rows
    assert [row["state"] for row in results["rows"]] == ["complete"] * 3
    full, without_general, without_augmentation = (
        json.loads((Path(row["runs"][0]["run"]) / "alembert.json").read_text())["configuration"]
        for row in results["rows"]
    )
    assert full["augmented"]["rows"] == without_general["augmented"]["rows"] == len(augmented)
    assert "augmented" not in without_augmentation
    assert full["options"]["initialise"] is without_augmentation["options"]["initialise"] is None
    assert without_general["options"]["initialise"] == "random"


def test_two_processes_do_not_make_one_table(
    tinybert: tuple[Path, dict[str, Any]], teacher: Path, task: alembert.Task, held_elsewhere: Any
) -> None:
    folder, _ = tinybert
    before = (folder / "ablation.json").read_text()
    with held_elsewhere(folder), pytest.raises(InputError, match="another process is working on it"):
        ablate("tinybert", str(teacher), task, folder, seeds=[1, 2], student="2x16", settings=TINY)
    assert (folder / "ablation.json").read_text() == before


def test_placements_of_the_table_come_before_given_layers() -> None:
    table = find_ablations("ms-bert")
    placed = [
        step.options for name in ("every-2", "last-half", "all-layers") for step in table.row(name).steps
    ]
    assert [options["layers"] for options in placed] == [None] * 3
    options, _ = resolve(find_method("ms-bert"), "default", {"layers": (1, 3)} | dict(placed[2]), {})
    assert (options.layers, options.placement) == (None, "all")


def test_finished_runs_are_reused(
    tinybert: tuple[Path, dict[str, Any]], teacher: Path, task: alembert.Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, results = tinybert
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}
    again = ablate(
        "tinybert", str(teacher), task, folder, seeds=[1, 2], rows=["mapping-top"], student="2x16",
        options=STUDENT | {"intermediate_epochs": 1}, settings=TINY,
    )  # fmt: skip
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")} == before
    # Rows that were not asked for again stay in the table.
    assert again["rows"] == results["rows"] and len(results["rows"]) > 2


def test_a_seed_that_diverges_leaves_the_others(
    tinybert: tuple[Path, dict[str, Any]],
    teacher: Path,
    task: alembert.Task,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measure = ablation_module.measure

    def diverged(run: Path, *arguments: Any, **options: Any) -> dict[str, Any]:
        bad = {"metric": float("nan")} if run.name == "seed-2" else {}
        return measure(run, *arguments, **options) | bad

    monkeypatch.setattr(ablation_module, "measure", diverged)
    folder = tmp_path / "table"
    shutil.copytree(tinybert[0], folder)
    # Only the runs are left: the table is made anew.
    folder.joinpath("ablation.json").write_text("{}")
    results = ablate(
        "tinybert", str(teacher), task, folder, seeds=[1, 2], rows=["mapping-top"], student="2x16",
        options=STUDENT | {"intermediate_epochs": 1}, settings=TINY,
    )  # fmt: skip
    for row in results["rows"]:
        assert row["state"] == "complete" and [run["seed"] for run in row["runs"]] == [1]
        assert row["message"].startswith("seed 2:") and "diverged" in row["message"]


def test_interrupted_table_goes_on(
    teacher: Path, task: alembert.Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []
    distill = ablation_module.distill

    def cut_off(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments[3])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return distill(*arguments, **options)

    monkeypatch.setattr(ablation_module, "distill", cut_off)
    with pytest.raises(KeyboardInterrupt):
        ablate("lrc-bert", str(teacher), task, tmp_path / "out", rows=["mse"], student="2x16", settings=TINY)
    assert [row["name"] for row in json.loads((tmp_path / "out" / "ablation.json").read_text())["rows"]] == [
        FULL
    ]
    results = ablate(
        "lrc-bert", str(teacher), task, tmp_path / "out", rows=["mse"], student="2x16", settings=TINY
    )
    assert [row["state"] for row in results["rows"]] == ["complete", "complete"]
    assert calls[1] == calls[3] == tmp_path / "out" / "mse" / "seed-42"


def test_unequal_heads_refuse_the_full_method(teacher: Path, task: alembert.Task, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"full method is refused.*attention heads"):
        ablate(
            "bert-emd", str(teacher), task, tmp_path / "out", student="2x16", options={"student_heads": 1},
            settings=TINY,
        )  # fmt: skip


def test_general_student_is_begun_at_random(teacher: Path, task: alembert.Task, tmp_path: Path) -> None:
    student = tmp_path / "student"
    options = STUDENT | {"student": "2x16"}
    alembert.distill("kd", str(teacher), task, student, options=options, settings=TINY)
    results = ablate(
        "tinybert", str(teacher), task, tmp_path / "out", rows=["without-general"], student=str(student),
        options={"intermediate_epochs": 1}, settings=TINY,
    )  # fmt: skip
    assert [row["state"] for row in results["rows"]] == ["complete", "complete"]
    path = tmp_path / "out" / "without-general" / "seed-42" / "alembert.json"
    options = json.loads(path.read_text())["configuration"]["options"]
    assert (options["student"], options["initialise"]) == (str(student / "config.json"), "random")


def test_exits_are_judged_at_a_speed_and_by_top_k(
    teacher: Path, task_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "ablate", "--method", "ms-bert", "--teacher", teacher, "--data", task_folder, "--output", tmp_path / "out",
        "--rows", "top-k-half,without-multi-layer,without-emd", "--speed", 0.9, "--epochs", 1, "--batch-size", 32,
        "--max-length", 32,
    ]  # fmt: skip
    assert run([*map(str, arguments), "--json"]) == 0
    out, _ = capfd.readouterr()
    results = json.loads(out)
    rows = {row["name"]: row for row in results["rows"]}
    assert rows["top-k-half"]["runs"][0]["run"] == rows[FULL]["runs"][0]["run"]
    assert not (tmp_path / "out" / "top-k-half").exists()
    path = tmp_path / "out" / "without-multi-layer" / "seed-42" / "alembert.json"
    assert json.loads(path.read_text())["configuration"]["method"] == "fastbert"
    assert all(row["runs"][0]["dev"]["speed"] == 0.9 for row in rows.values())
    assert (tmp_path / "out" / "ablation.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("method", ABLATIONS)
def test_every_row_runs_and_changes_what_its_steps_say(
    method: str, teacher: Path, task_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = ["ablate", "--method", method, "--teacher", teacher, "--data", task_folder, "--output", output,
                 "--seeds", 3, "--epochs", 2, "--batch-size", 8, "--max-length", 32]  # fmt: skip
    if method != "ms-bert":
        arguments += ["--student", "2x16", "--set", "student_heads=2"]
    if method == "tinybert":
        arguments += ["--set", "intermediate_epochs=1"]
    assert run([*map(str, arguments), "--json"]) == 0
    results = json.loads(capfd.readouterr()[0])
    table = find_ablations(method)
    assert [row["name"] for row in results["rows"]] == [row.name for row in table.rows]
    weights = {}
    for row, result in zip(table.rows, results["rows"], strict=True):
        if row.needs is not None:
            assert result["state"] == "left out"
            continue
        assert result["state"] == "complete", result["message"]
        folder = Path(result["runs"][0]["run"])
        configuration = json.loads((folder / "alembert.json").read_text())["configuration"]
        last = row.steps[-1]
        assert configuration["method"] == (last.method or method)
        for name, value in last.options.items():
            assert configuration["options"][name] == value
        if folder.parent.name != FULL:
            weights[row.name] = (folder / "model.safetensors").read_bytes()
    # These two are the defaults, under the name of the table's row.
    same = {"mapping-uniform"} if method == "tinybert" else {"every-2"}
    full = (output / FULL / "seed-3" / "model.safetensors").read_bytes()
    for name, content in weights.items():
        assert (content == full) == (name in same), name


def test_table_marks_recalled_figures(tinybert: tuple[Path, dict[str, Any]]) -> None:
    from rich.console import Console

    def shown(results: dict[str, Any]) -> str:
        console = Console(width=200, file=io.StringIO(), record=True)
        console.print(ablation_table(results))
        return console.export_text()

    text = shown(tinybert[1])
    assert "84.3" in text and "Table 3" in text and "(recalled)" not in text
    row: dict[str, Any] = {
        "title": "w/o COS-NCE", "state": "complete", "message": None, "test": None,
        "dev": {"mean": 0.5, "standard_deviation": 0.01, "difference": -0.02},
        "figures": {"values": {"CoLA": 37.0}, "table": "Table 3", "verified": False},
    }  # fmt: skip
    results = tinybert[1] | {"rows": [row], "columns": ["CoLA"]}
    assert "50.0 ± 1.0" in shown(results) and "-2.0" in shown(results)
    assert "37.0 (recalled)" in shown(results)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--method", "kd"], ["kd", "tinybert"]),
        (["--rows", "without-luck"], ["without-luck", "mapping-top"]),
        (["--seeds", "1,x"], ["seeds"]),
        (["--seeds", "1,1"], ["seeds"]),
        ([], ["--student"]),
    ],
)
def test_bad_commands_are_refused_before_anything_is_written(
    extra: list[str], words: list[str], teacher: Path, task_folder: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    output = tmp_path / "out"
    arguments = ["--method", "tinybert", "--teacher", teacher, "--data", task_folder, "--output", output]
    assert run(["ablate", *map(str, arguments), *extra]) == 2
    out, err = capfd.readouterr()
    assert out == "" and not output.exists()
    assert all(word in err for word in words), err
