"""The models that `alembert compress` has to choose from: exported, held against the budget, measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alembert.benchmarks.calibration import NothingCertifiedError, calibrate, store
from alembert.benchmarks.pruning import segment_macs
from alembert.benchmarks.risk_budget import RiskBudget
from alembert.benchmarks.risk_control import smallest_set
from alembert.data.task import Task
from alembert.runtime.adaptive import AdaptiveClassifier
from alembert.runtime.calibration_file import CALIBRATION_FILE
from alembert.runtime.export import export_classifier
from alembert.runtime.manifest import MANIFEST_FILE

Progress = Callable[[str, int, int], None]


def export_once(run: Path, output: Path, progress: Progress, *, has_exits: bool) -> None:
    """An int8 export of a run, unless it is there already; with exits also as one graph for single texts."""
    if not (output / MANIFEST_FILE).exists():
        export_classifier(
            run,
            output,
            precision="int8",
            merge_exits="all" if has_exits else None,
            count_macs=segment_macs,
            progress=progress,
        )


def split_confidence(confidence: float, models: int) -> float:
    """The confidence that each of several models must be certified with for all to hold together (Bonferroni)."""
    return 1 - (1 - confidence) / models


def enough_rows(task: Task, budget: RiskBudget) -> bool:
    """Whether the dev split could certify the budget if no answer changed."""
    needed = smallest_set(budget.loss_kind(task.problem_type), budget.most, budget.level)
    return int(task.dataset("dev").num_rows) >= needed


@dataclass(frozen=True)
class Certificate:
    """How a model stands to the budget.

    Attributes:
        kept: whether it keeps to the budget at some speed.
        speed: the largest such speed; 0 for models without exits.
        risk: the drop seen on dev, at that speed, or at full depth where none is kept.
        macs: per text at that speed; None where not kept.
        reason: why it is not kept; None where it is.
        rows_needed: dev rows that would probably show it to keep to the budget, going by what was seen; None where it
            is kept, and where no number would do.
    """

    kept: bool
    speed: float
    risk: float
    macs: float | None
    reason: str | None
    rows_needed: int | None = None

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        return dict(vars(self))


def certify(
    exported: Path, reference: AdaptiveClassifier, task: Task, budget: RiskBudget, progress: Progress
) -> Certificate:
    """Finds the largest speed of an exported model at which it keeps to the budget against the teacher.

    The speed of a model with exits is stored beside it.
    """
    classifier = AdaptiveClassifier.from_pretrained(exported, speed=0.0)
    try:
        record = calibrate(
            classifier,
            task,
            "dev",
            budget,
            model_name=exported.name,
            data_name=task.name,
            reference=reference,
            reference_name="teacher",
            progress=progress,
        )
    except NothingCertifiedError as error:
        (exported / CALIBRATION_FILE).unlink(missing_ok=True)
        return Certificate(False, 0.0, error.risk, None, str(error), error.rows_needed)
    if len(classifier.exit_layers) > 1:
        store(record, exported)
    at_speed = record["at_speed"]
    return Certificate(True, record["speed"], at_speed["risk"], at_speed["macs"], None)


def dominated(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names of the rows that another beats in texts per second and equals or beats in the metric, or the reverse."""

    def beats(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        better = [one[key] - other[key] for key in ("metric", "texts_per_second")]
        return bool(min(better) >= 0 and max(better) > 0)

    return [name for name, row in rows.items() if any(beats(other, row) for other in rows.values())]
