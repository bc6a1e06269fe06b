"""The page of a finished `alembert compress`: the models that it measured, and what it made of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from alembert.benchmarks.comparison_engines import short_names
from alembert.benchmarks.report_data import collect_report
from alembert.benchmarks.report_runs import training_curves
from alembert.benchmarks.risk_budget import CERTIFIED, RiskBudget
from alembert.common.errors import InputError
from alembert.compression.choice import outcome
from alembert.compression.durations import format_duration
from alembert.data.task import Task
from alembert.reports.report_files import check_report_extra, write_report

logger = logging.getLogger("alembert")


def write_work_report(
    folder: Path,
    summary: Mapping[str, Any],
    task: Task,
    risk: RiskBudget,
    *,
    benchmark: Mapping[str, Any],
    teacher: Path,
    exports: Mapping[str, Path],
    runs: Mapping[str, Path],
    progress: Callable[[str, int, int], None],
) -> Path | None:
    """Writes the page with its pictures and data into `folder`, and returns it.

    None where the extra that it needs is not installed, which a warning says.

    Args:
        folder: for the page.
        summary: what summary.json holds.
        task: as the benchmark read it.
        risk: what was asked, in the mode in which it was tested.
        benchmark: results of the measured models.
        teacher: its run.
        exports, runs: by name, of the models to be shown.
        progress: called with a description, steps done and steps in all.
    """
    try:
        check_report_extra()
    except InputError as error:
        logger.warning("No report: %s", error)
        return None
    collected = collect_report(
        [str(teacher), *map(str, exports.values())],
        task,
        benchmark["split"],
        benchmark=benchmark,
        title=f"{task.name}, {benchmark['split']}",
        lead=None if summary["best"] is None else str(exports[summary["best"]["name"]]),
        promise=_promise(risk, task),
        extra={
            "compression": {
                "verdict": ". ".join(
                    text[0].upper() + text[1:] for text in (summary["verdict"], summary["unsure"]) if text
                ),
                "candidates": [_candidate(row, summary["best"], task) for row in summary["candidates"]],
                "steps": [_step(name, record) for name, record in summary["trainings"].items()],
            }
        },
        progress=progress,
    )
    # An export has no log of its own: its curves are those of the run that it was made from.
    for part, name in zip(collected["models"][1:], exports, strict=True):
        part["run"]["training"] = part["run"]["training"] or training_curves(runs[name])
    if summary["best"] is not None:
        # A model that is not sure to keep to the budget is no better offer; the sentence above speaks of it.
        names = short_names([str(teacher), *map(str, exports.values())])[1:]
        kept = {row["name"] for row in summary["candidates"] if row["kept"]}
        unsure = {short for short, name in zip(names, exports, strict=True) if name not in kept}
        better = collected["verdict"]["beaten_by"]
        collected["verdict"]["beaten_by"] = [row for row in better if row["name"] not in unsure]
    write_report(collected, folder)
    return folder / "report.html"


def _candidate(row: Mapping[str, Any], best: Mapping[str, Any] | None, task: Task) -> dict[str, str]:
    """A candidate as a line of the page's table."""

    def number(name: str, shape: str, factor: float = 1.0) -> str:
        return "–" if row[name] is None else format(factor * row[name], shape)

    return {
        "model": f"{row['name']}, {row['precision']}",
        "speed": "–" if row["ratio"] is None else f"{row['speed']:g}",
        task.main_metric: number("metric", ".1f", 100),
        "difference": number("metric_difference", "+.1f", 100),
        "texts/s": number("texts_per_second", ",.0f"),
        "times the teacher's": number("ratio", ".1f"),
        "p50 ms": number("p50_ms", ".1f"),
        "lost on dev": number("risk", ".1f", 100),
        "outcome": outcome(row, best),
    }


def _step(name: str, record: Mapping[str, Any]) -> dict[str, str]:
    reason = "" if record["reason"] is None else f": {record['reason']}"
    return {
        "training": name,
        "outcome": record["status"] + reason,
        "took": format_duration(record["seconds"]),
    }


def _promise(risk: RiskBudget, task: Task) -> dict[str, Any] | None:
    """What holds of the chosen model, with all candidates tested together."""
    if risk.mode != CERTIFIED:
        return None
    return {
        "risk": risk.risk,
        "max_drop": risk.most,
        "scale": risk.scale,
        "confidence": risk.confidence,
        "mode": CERTIFIED,
        "per_class": False,
        "reference": "the teacher",
        "rows": task.dataset("dev").num_rows,
        "data": task.name,
        "split": "dev",
        "same_rows": "test" not in task.splits,
    }
