"""Ablations: every row of a paper's table over several seeds, each a run directory, beside the paper's figures."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from datasets import Dataset

from alembert.common.errors import InputError
from alembert.common.files import read_json, write_json
from alembert.common.locks import FolderLock
from alembert.compression.measuring import measure
from alembert.data.task import Task
from alembert.methods.ablations import FULL, AblationRow, AblationTable, Step, find_ablations
from alembert.methods.base import resolve
from alembert.methods.distillation import distill
from alembert.methods.registry import find_method
from alembert.methods.self_distillation import ExitOptions
from alembert.methods.student_distillation import StudentOptions, is_checkpoint
from alembert.runtime.policies import check_speed

RESULTS = "ablation.json"
SPLITS = ("dev", "test")
logger = logging.getLogger("alembert")


@dataclass(frozen=True)
class _Common:
    """What all runs of a table share."""

    table: AblationTable
    teacher: str
    task: Task
    folder: Path
    preset: str
    options: dict[str, Any]
    settings: dict[str, Any]
    augmented: Dataset | None
    teacher_cache: str | Path | None
    speed: float


def ablate(
    method: str,
    teacher: str,
    task: Task,
    output_dir: str | Path,
    *,
    seeds: Sequence[int] = (42,),
    rows: Sequence[str] | None = None,
    speed: float = 0.5,
    student: str | None = None,
    preset: str = "default",
    options: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    augmented: Dataset | None = None,
    teacher_cache: str | Path | None = None,
) -> dict[str, Any]:
    """Runs a paper's ablation table: every row over every seed, in the run directory `ROW/seed-S`.

    Finished runs are reused and interrupted ones gone on with. A row that the method refuses, such as a comparison
    of attention between unequal numbers of heads, is recorded with the message.

    Args:
        method: one of `alembert.methods.ablations.ABLATIONS`.
        teacher: folder or hub id of a fine-tuned classifier.
        task: with train and dev splits; test is measured where there is one.
        output_dir: folder of the table; `ablation.json` is written after every row. Rows that are there and do not run
            now are kept, if all else was the same.
        seeds: of initialisation, order and dropout. The data is the same for all.
        rows: names of some of the rows; the full method always goes with them. None = all that the command can run.
        speed: at which models with exits are judged.
        student, preset, options, settings, augmented: as for `distill`, for every row.
        teacher_cache: as for `distill`; rows that learn from no augmented rows beside others that do have a folder of
            their own, `…-without-augmentation`.

    Returns what `ablation.json` holds: "method", "paper", "columns", "note", "teacher", "data", "metric", "seeds",
    and "rows", each with "name", "title", "state" ("complete", "refused" or "left out"), "message", "runs" (by seed
    the "metric" and "macs" of each split), "dev" and "test" ("mean", "standard_deviation" over seeds with n − 1,
    "difference" of means from the full method, "macs"), and "figures".

    Raises InputError for methods without a table, unknown rows, values that the method does not take, a folder that
    another process works on, and when the full method itself is refused.
    """
    table = find_ablations(method)
    check_speed(speed)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("ablations run in one process: start them without a launcher")
    if "dev" not in task.splits:
        raise InputError("ablations are compared on the dev split, and the data has none")
    if not seeds or len(set(seeds)) < len(seeds):
        raise InputError("--seeds: give whole numbers, each once")
    given = (options or {}) | ({} if student is None else {"student": student})
    chosen = [row for row in table.rows if rows is None or row.name in (*rows, FULL)]
    for name in rows or ():
        table.row(name)
    method_class = find_method(method)
    resolve(method_class, preset, given, settings or {})
    if issubclass(method_class.options_class, StudentOptions) and given.get("student") is None:
        raise InputError(f"method {method} trains a student: name one with --student, such as 4x312")
    for row in chosen:
        overridden = set(given) & {name for step in row.steps for name in step.options} - {"initialise"}
        if overridden:
            logger.info("Row %s sets %s itself.", row.name, ", ".join(sorted(overridden)))
    common = _Common(
        table,
        teacher,
        task,
        Path(output_dir),
        preset,
        given,
        dict(settings or {}),
        augmented,
        teacher_cache,
        speed,
    )
    if common.folder.exists() and not (common.folder / RESULTS).is_file():
        known = {row.name for row in table.rows}
        if not common.folder.is_dir() or any(
            entry.name not in known for entry in common.folder.iterdir() if not entry.name.startswith(".")
        ):
            raise InputError(f"{common.folder} exists and holds no ablations: choose another --output")
    with FolderLock(common.folder):
        entries = _rows_before(common, seeds)
        for number, row in enumerate(chosen, 1):
            logger.info("Row %d of %d: %s", number, len(chosen), row.name)
            entries[row.name] = _run_row(common, row, seeds)
            if row.name == FULL and entries[FULL]["state"] == "refused":
                raise InputError(f"the full method is refused: {entries[FULL]['message']}")
            results = _results(common, seeds, [entries[it.name] for it in table.rows if it.name in entries])
            write_json(common.folder / RESULTS, results)
        return results


_ENTRY = ("name", "title", "state", "message", "runs")


def _rows_before(common: _Common, seeds: Sequence[int]) -> dict[str, dict[str, Any]]:
    """The rows of an earlier table of the same things, by name."""
    path = common.folder / RESULTS
    if not path.is_file():
        return {}
    before = read_json(path)
    same = json.loads(json.dumps(_facts(common, seeds)))
    if any(before.get(name) != value for name, value in same.items() if name != "alembert_version"):
        return {}
    return {row["name"]: {name: row[name] for name in _ENTRY} for row in before["rows"]}


def _run_row(common: _Common, row: AblationRow, seeds: Sequence[int]) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": row.name,
        "title": row.title,
        "state": "complete",
        "message": None,
        "runs": [],
    }
    reason = _left_out(common, row)
    if reason is not None:
        return entry | {"state": "left out", "message": reason}
    for seed in seeds:
        try:
            entry["runs"].append({"seed": seed} | _run_seed(common, row, seed))
        except (InputError, torch.OutOfMemoryError) as error:
            logger.warning("Row %s, seed %d: %s", row.name, seed, error)
            entry["message"] = f"seed {seed}: {error}"
    return entry if entry["runs"] else entry | {"state": "refused"}


def _left_out(common: _Common, row: AblationRow) -> str | None:
    if row.needs == "augmented" and common.augmented is None:
        return "the full method has no augmented rows either: pass --augmented"
    if row.needs == "checkpoint" and not is_checkpoint(common.options["student"]):
        return (
            "the student begins without a general stage anyhow: pass the general stage's output as --student"
        )
    if row.top_k is not None and common.task.problem_type != "single_label_classification":
        return "top-K uncertainty is of tasks with one label of several"
    if row.top_k is not None and common.task.num_labels < 3:
        return "with two labels top-K uncertainty has nothing to leave out"
    return None


def _run_seed(common: _Common, row: AblationRow, seed: int) -> dict[str, Any]:
    trained_as = common.table.row(FULL) if row.top_k is not None else row
    run = common.folder / trained_as.name / f"seed-{seed}"
    before: Path | None = None
    for number, step in enumerate(trained_as.steps, 1):
        last = number == len(trained_as.steps)
        folder = run if last else run.with_name(f"{run.name}-step-{number}")
        _distill(common, trained_as, step, seed, folder, before)
        before = folder
    top_k = None if row.top_k is None else max(2, round(row.top_k * common.task.num_labels))
    measured: dict[str, Any] = {"run": str(run)}
    for split in SPLITS:
        if split in common.task.splits:
            result = measure(
                run,
                common.task,
                split,
                common.speed,
                policy=None if top_k is None else "top_k_entropy",
                top_k=top_k,
            )
            if not math.isfinite(result["metric"]):
                raise InputError(
                    f"{run}: the {common.task.main_metric} is no finite number: the training diverged"
                )
            measured[split] = {name: result[name] for name in ("metric", "metrics", "macs", "flops", "speed")}
    return measured


def _distill(
    common: _Common, row: AblationRow, step: Step, seed: int, folder: Path, before: Path | None
) -> None:
    method, preset = step.method or common.table.method, common.preset
    options, settings = dict(common.options), dict(common.settings)
    if step.method is not None:
        # The row differs from the full method in its loss alone: settings and the model's shape are the full method's.
        full = find_method(common.table.method)
        shared = StudentOptions if issubclass(full.options_class, StudentOptions) else ExitOptions
        options = {
            name: value
            for name, value in (full.presets[preset].options | options).items()
            if name in shared.model_fields and name != "stages"
        }
        settings = full.presets[preset].settings | settings
        preset = "default"
    if row.from_scratch:
        options["student"] = _shape_alone(str(options["student"]))
    if before is not None:
        options = {name: value for name, value in options.items() if name not in _OF_A_FRESH_STUDENT}
        options["student"] = str(before)
    distill(
        method,
        common.teacher,
        common.task,
        folder,
        preset=preset,
        options=options | dict(step.options),
        settings=settings | {"seed": seed},
        augmented=common.augmented if step.augmented else None,
        teacher_cache=_cache(common, step),
    )


def _cache(common: _Common, step: Step) -> str | Path | None:
    """The teacher's outputs for the rows that the step learns from: a folder holds those of one set of rows."""
    if common.teacher_cache is None or common.augmented is None or step.augmented:
        return common.teacher_cache
    folder = Path(common.teacher_cache)
    return folder.with_name(f"{folder.name}-without-augmentation")


_OF_A_FRESH_STUDENT = ("initialise", "init_layers", "student_heads", "student_intermediate_size")


def _shape_alone(student: str) -> str:
    config = Path(student) / "config.json"
    if not config.is_file():
        raise InputError(f"{student}: the row needs the checkpoint's config.json: give it as a folder")
    return str(config)


def summarise(values: Sequence[float], full: Sequence[float] | None) -> dict[str, float | None]:
    """Mean, sample standard deviation (None for one value) and the difference of means from the full method's."""
    return {
        "mean": mean(values),
        "standard_deviation": stdev(values) if len(values) > 1 else None,
        "difference": None if full is None else mean(values) - mean(full),
    }


def _results(common: _Common, seeds: Sequence[int], entries: list[dict[str, Any]]) -> dict[str, Any]:
    by_name = {entry["name"]: entry for entry in entries}
    full = by_name[FULL]

    def metrics(entry: Mapping[str, Any], split: str) -> list[float]:
        return [run[split]["metric"] for run in entry["runs"] if split in run]

    rows = []
    for entry in entries:
        row = dict(entry)
        for split in SPLITS:
            values = metrics(entry, split)
            row[split] = (
                summarise(values, metrics(full, split))
                | {"macs": mean(run[split]["macs"] for run in entry["runs"])}
                if values
                else None
            )
        figures = common.table.row(entry["name"]).figures
        row["figures"] = (
            None
            if figures is None
            else {"values": dict(figures.values), "table": figures.table, "verified": figures.verified}
        )
        rows.append(row)
    return _facts(common, seeds) | {"rows": rows}


def _facts(common: _Common, seeds: Sequence[int]) -> dict[str, Any]:
    """What a table is of."""
    return {
        "alembert_version": version("alembert"),
        "method": common.table.method,
        "paper": common.table.paper,
        "columns": list(common.table.columns),
        "note": common.table.note,
        "preset": common.preset,
        "teacher": common.teacher,
        "data": common.task.name,
        "metric": common.task.main_metric,
        "speed": common.speed,
        "seeds": list(seeds),
        "options": common.options,
        "settings": common.settings,
    }
