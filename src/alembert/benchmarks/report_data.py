"""Everything that `alembert report` shows, collected into one JSON value."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from alembert.benchmarks.comparison import benchmark as run_benchmark
from alembert.benchmarks.comparison_engines import check_models, short_names
from alembert.benchmarks.comparison_settings import BenchmarkSettings
from alembert.benchmarks.report_models import ReportedModel, confusions_against, report_model
from alembert.benchmarks.report_rates import estimated_rates, measured_rates, rows_of, speeds_along
from alembert.benchmarks.report_runs import run_record
from alembert.benchmarks.report_verdict import verdict
from alembert.common.errors import InputError
from alembert.data.task import Task, rows_sha256
from alembert.runtime.calibration_file import model_files_fingerprint

FORMAT = 1
AXES: dict[str, bool] = {"texts_per_second": True, "macs": False, "p50_ms": False}
"""What candidates are compared by beside the metric, and whether more of it is better."""
DEFAULT_PRICE = 0.10
"""Of a machine-hour, in whatever currency."""
DEFAULT_EXAMPLES = 6
_MEASURED_SHARES = (0.25, 0.5, 0.75)
_BENCHMARK_PARTS = ("results", "machine", "task", "split", "rows", "timing", "settings")


def collect_report(
    runs: Sequence[str | Path],
    task: Task,
    split: str,
    *,
    benchmark: Mapping[str, Any] | None = None,
    settings: BenchmarkSettings | None = None,
    price_per_hour: float = DEFAULT_PRICE,
    examples: int = DEFAULT_EXAMPLES,
    batch_tokens: int | None = None,
    title: str | None = None,
    lead: str | None = None,
    promise: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    drawn_from: Task | None = None,
    doubts: Sequence[str] = (),
    measured: Callable[[dict[str, Any]], None] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Runs every exit of every model over a split once, and measures time unless a benchmark is given.

    Args:
        runs: run directories, folders in Hugging Face layout or exported folders; the first is the baseline, and no
            export.
        task: labelled data with the models' labels.
        split: the split that is scored.
        benchmark: what `alembert benchmark` wrote for these models on these rows; None = it is run now, each model with
            exits at speed 0, at its own speed, and at speeds of a quarter, half and three quarters of its savings.
        settings: of that benchmark; `speeds` are chosen here where they are None.
        price_per_hour: of the machine, in any currency.
        examples: texts of each kind.
        batch_tokens: rows × longest row of a batch, where exits are run; None = the classifier's default.
        title: of the page; the data set's name and split unless given.
        lead, promise: as in `verdict`, where the model was chosen elsewhere.
        extra: further parts, merged over the others. A "compression" without a `lead` found nothing that met its aim.
        drawn_from: the task with all of its rows, where `task` has some of them.
        doubts: why scores on these rows may flatter a model, each a clause.
        measured: called with a benchmark that was run here, before anything else can fail.
        progress: called with a description, steps done and steps in all.

    Returns:
        The value of `report.json`, as docs/report.md describes it.

    Raises:
        InputError: a model cannot be read, labels differ, the benchmark is of other data, other models or other
            exits than the models have.
    """
    sources = [str(run) for run in runs]
    if not np.isfinite(price_per_hour) or price_per_hour < 0:
        raise InputError(f"the price of a machine-hour is {price_per_hour}: give a number of at least 0")
    check_models(sources)
    task.dataset(split)
    if benchmark is not None:
        check_benchmark(benchmark, sources, task, split)
    # Runs are read first: a damaged log is to be known before an hour of measuring.
    records = [run_record(source) for source in sources]
    notify = progress or (lambda *_: None)
    names = short_names(sources)
    max_length = settings.max_length if settings is not None else None
    if benchmark is not None:
        max_length = benchmark["settings"].get("max_length")
    models = [
        report_model(source, name, task, split, examples, batch_tokens, max_length, notify, drawn_from)
        for source, name in zip(sources, names, strict=True)
    ]
    if benchmark is not None:
        check_exits(benchmark["settings"], models)
    measured_here = benchmark is None
    if benchmark is None:
        chosen = _with_speeds(settings or BenchmarkSettings(), models)
        benchmark = run_benchmark(
            sources, task, split, data_name=task.name, settings=chosen, progress=progress
        )
        if measured is not None:
            measured(benchmark)
    rows = _candidates(benchmark["results"])
    met = lead is not None or "compression" not in (extra or {})
    parts = []
    for model, record in zip(models, records, strict=True):
        if model.part["exits"] is None and model is not models[0]:
            model.part["confusions"] = confusions_against(model, models[0], task, split)
        _add_rates(model, rows)
        if model.part["calibration"] is not None:
            model.part["calibration"]["against_baseline"] = _is_against(model, models[0])
        parts.append(model.part | {"run": record})
    return {
        "format": FORMAT,
        "alembert_version": version("alembert"),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "title": title or f"{task.name}, {split}",
        "task": _task_facts(task, split, drawn_from),
        "doubts": list(doubts),
        "machine": dict(benchmark["machine"]),
        "price_per_hour": float(price_per_hour),
        "benchmark": {
            "measured_here": measured_here,
            "created": benchmark.get("created"),
            "timing": benchmark["timing"],
            "settings": {
                key: list(value) if isinstance(value, tuple) else value
                for key, value in benchmark["settings"].items()
            },
        },
        "verdict": verdict(parts, rows, lead, promise, met),
        "candidates": rows,
        "models": parts,
        "compression": None,
        **(extra or {}),
    }


def check_benchmark(benchmark: Mapping[str, Any], sources: Sequence[str], task: Task, split: str) -> None:
    """Raises InputError when a benchmark is none, or is of other rows or other models."""
    missing = [part for part in _BENCHMARK_PARTS if part not in benchmark]
    if missing or not benchmark["results"]:
        raise InputError(
            f"the benchmark has no {(missing or ['results'])[0]!r}: give the benchmark.json that `alembert benchmark` "
            "writes"
        )
    there, here = (
        (benchmark["split"], benchmark["rows"], benchmark["task"]["metric"]),
        (split, task.dataset(split).num_rows, task.main_metric),
    )
    if there != here:
        raise InputError(
            f"the benchmark is of {there[0]}, {there[1]} rows, {there[2]}; the report of {here[0]}, {here[1]} rows, "
            f"{here[2]}: give the same --data, --split and --max-rows to both"
        )
    if "rows_sha256" in benchmark and benchmark["rows_sha256"] != rows_sha256(task.dataset(split)):
        raise InputError(
            f"the benchmark is of other rows of {split} than the report: give the same --data, --max-rows and --seed "
            "to both"
        )
    if benchmark["results"][0] not in rows_of(benchmark["results"], sources[0]):
        raise InputError(
            f"the benchmark compares with {benchmark['results'][0]['name']}, its first model, and the report with "
            f"{sources[0]}: give the same model first to both"
        )
    for source in sources:
        found = rows_of(benchmark["results"], source)
        if not found:
            known = ", ".join(sorted({str(row["name"]) for row in benchmark["results"]}))
            raise InputError(
                f"the benchmark does not hold {source}; it holds {known}: run it again with that model, or without "
                "--benchmark"
            )
        measured = benchmark.get("model_files", {}).get(found[0]["name"])
        if measured is not None and measured != model_files_fingerprint(source):
            raise InputError(
                f"{source} is not the {found[0]['name']} that the benchmark measured, or has changed since: "
                "run it again"
            )


def check_exits(settings: Mapping[str, Any], models: Sequence[ReportedModel]) -> None:
    """Raises InputError when a benchmark ran a model with other exits or another policy than it is reported with."""
    for model in models:
        exits, name = model.part["exits"], model.part["name"]
        if exits is None:
            continue
        own = {
            "exits": exits["layers"][:-1],
            "policy": exits["policy"]["name"],
            "top_k": exits["policy"]["top_k"],
        }
        given = {key: settings[key] for key in own if settings.get(key) is not None}
        for key, value in given.items():
            if (sorted(value) if key == "exits" else value) != own[key]:
                raise InputError(
                    f"the benchmark ran {name} with {key} {value}, the report shows it with {own[key]}: "
                    f"run it again without --{key.replace('_', '-')}"
                )
        named = settings.get("speeds") is not None or model.source in settings.get("model_speeds", {})
        if named and not given and not model.free_speeds:
            raise InputError(
                f"the benchmark named speeds, at which {name} runs without its calibration, which is of another "
                "policy, other exits, another length or precision than its own: run it again without --speeds"
            )


def _with_speeds(settings: BenchmarkSettings, models: Sequence[ReportedModel]) -> BenchmarkSettings:
    """The settings with the models' precisions, and with speeds from which time can be told at any other."""
    precisions = {model.part["precision"] for model in models} - {None}
    settings = dataclasses.replace(
        settings, torch_precisions=tuple(sorted(precisions | {*settings.torch_precisions}))
    )
    if settings.speeds is not None or not all(model.free_speeds for model in models):
        return settings
    speeds = {0.0}
    for exits in (model.part["exits"] for model in models if model.part["exits"] is not None):
        speeds.add(exits["default_speed"])
        speeds |= set(speeds_along(exits["speeds"], exits["curve"]["macs"], _MEASURED_SHARES))
    return dataclasses.replace(settings, speeds=tuple(sorted(speeds)))


def _candidates(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The benchmark's rows, each with "pareto": by axis, whether no other is better in one and as good in the other."""
    result = []
    for row in rows:
        pareto = {
            axis: row[axis] is not None and not any(_beats(other, row, axis) for other in rows)
            for axis in AXES
        }
        result.append(dict(row) | {"pareto": pareto})
    return result


def _beats(other: Mapping[str, Any], row: Mapping[str, Any], axis: str) -> bool:
    if other[axis] is None:
        return False
    gain = other[axis] - row[axis] if AXES[axis] else row[axis] - other[axis]
    better = other["metric"] - row["metric"]
    return bool(gain >= 0 and better >= 0 and (gain > 0 or better > 0))


def _add_rates(model: ReportedModel, rows: Sequence[Mapping[str, Any]]) -> None:
    exits = model.part["exits"]
    if exits is None:
        return
    points = measured_rates(rows, model.part)
    estimated = estimated_rates(points, exits["curve"]["macs"])
    exits["measured_speeds"] = [row["speed"] for row in points]
    if estimated is None:
        return
    # A timed speed keeps its own figures: speeds of the same MACs share an estimate, and a quotient of medians is not
    # the median of the rounds' quotients.
    timed, baseline = {row["speed"]: row for row in points}, rows[0]["texts_per_second"]
    ratios = [rate / baseline if rate and baseline else None for rate in estimated]
    for key, values in (("texts_per_second", estimated), ("ratio_to_baseline", ratios)):
        exits[key] = [
            timed[speed][key] if speed in timed else value
            for speed, value in zip(exits["speeds"], values, strict=True)
        ]


def _is_against(model: ReportedModel, first: ReportedModel) -> bool:
    """Whether a model's calibration compares it with the baseline's model."""
    calibration = model.part["calibration"]
    if calibration["reference"] is None:
        return model is first
    files = calibration["reference_files"]
    return bool(files) and files == model_files_fingerprint(first.source)


def _task_facts(task: Task, split: str, drawn_from: Task | None) -> dict[str, Any]:
    rows = task.dataset(split)
    return {
        "name": task.name,
        "problem_type": task.problem_type,
        "metric": task.main_metric,
        "metrics": list(task.metrics),
        "labels": list(task.label_names),
        "num_labels": task.num_labels,
        "is_pair": task.is_pair,
        "split": split,
        "rows": rows.num_rows,
        "rows_sha256": rows_sha256(rows),
        "drawn_from": None if drawn_from is None else drawn_from.dataset(split).num_rows,
    }
