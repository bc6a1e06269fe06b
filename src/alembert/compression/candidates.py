"""The models that `alembert compress` has to choose from: exported, held against the budget, measured."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from alembert.benchmarks.calibration import NothingCertifiedError, calibrate, rows_to_certify, store
from alembert.benchmarks.evaluation import task_texts
from alembert.benchmarks.pruning import segment_macs
from alembert.benchmarks.replayed_exits import collect_answers
from alembert.benchmarks.report_rates import speeds_along
from alembert.benchmarks.risk_budget import EMPIRICAL, RiskBudget
from alembert.benchmarks.risk_control import smallest_set
from alembert.data.task import Task
from alembert.data.validation import rows_not_in_train
from alembert.runtime.adaptive import AdaptiveClassifier
from alembert.runtime.calibration_file import CALIBRATION_FILE, CalibratedSpeed
from alembert.runtime.export import export_classifier
from alembert.runtime.manifest import MANIFEST_FILE

logger = logging.getLogger("alembert")
TIMED_SHARES = (1 / 3, 2 / 3)
"""Of what exits can save: where time is measured beside the full model's and the chosen speed's."""
Progress = Callable[[str, int, int], None]
_PROMISING_SHARE = 0.5
"""Of the budget, lost on dev: at the very edge of it no number of rows would make a model sure to keep to it."""


def export_once(run: Path, output: Path, progress: Progress, *, merge_exits: bool, max_length: int) -> None:
    """An int8 export of a run, unless it is there already; `merge_exits` also as one graph for single texts."""
    if not (output / MANIFEST_FILE).exists():
        export_classifier(
            run,
            output,
            precision="int8",
            merge_exits="all" if merge_exits else None,
            max_length=max_length,
            count_macs=segment_macs,
            progress=progress,
        )


def without_learned_rows(task: Task) -> Task:
    """The task without the rows of dev that stand in train too: on them every model looks safe."""
    if not {"train", "dev"} <= set(task.splits):
        return task
    dev, kept = task.dataset("dev"), rows_not_in_train(task.splits, "dev")
    if len(kept) == dev.num_rows:
        return task
    logger.warning(
        "%d of %d rows of dev stand in train too and are left out.", dev.num_rows - len(kept), dev.num_rows
    )
    return replace(task, splits=task.splits | {"dev": dev.select(kept)})


def split_confidence(confidence: float, models: int) -> float:
    """The confidence that each of several models must be certified with for all to hold together (Bonferroni)."""
    return 1 - (1 - confidence) / models


def fewest_rows(task: Task, budget: RiskBudget) -> int:
    """Rows of dev with which the budget could be certified if no answer changed."""
    return smallest_set(budget.loss_kind(task.problem_type), budget.most, budget.level)


def reference_logits(teacher: Path, task: Task, max_length: int, progress: Progress) -> NDArray[Any]:
    """The teacher's logits (rows, labels) for dev, reading as much of a text as it always does.

    Warns where candidates, which read `max_length` tokens, do not read as much.
    """
    classifier = AdaptiveClassifier.from_pretrained(str(teacher), speed=0.0)
    answers = collect_answers(
        classifier,
        task_texts(task, "dev"),
        lambda done, total: progress("running the reference", done, total),
    )
    cut = int((answers.lengths > max_length).sum())
    if cut:
        logger.warning(
            "%d of %d rows of dev are longer than the %d tokens that the candidates read of a text: what that "
            "loses counts against them. --max-length says otherwise, up to %d.",
            cut, len(answers.lengths), max_length, classifier.max_length,
        )  # fmt: skip
    return answers.logits[:, -1]


@dataclass(frozen=True)
class Certificate:
    """How a model stands to the budget.

    Attributes:
        kept: whether it keeps to the budget at some speed: surely, or, in "empirical" mode, on dev.
        speed: the largest such speed. Where there is none, the largest at which it lost half of the budget on dev at
            most, else 0. 0 for models without exits.
        risk: the drop seen on dev at that speed.
        macs: per text at that speed; None where even speed 0 lost more than half of the budget on dev.
        reason: why it is not kept; None where it is.
        rows_needed: dev rows that would probably make it sure, going by what was seen; None where it is kept, where no
            number would do, and in "empirical" mode.
    """

    kept: bool
    speed: float
    risk: float
    macs: float | None
    reason: str | None
    rows_needed: int | None = None

    @property
    def within_on_dev(self) -> bool:
        """Whether it kept to the budget on dev, sure or not."""
        return self.kept or self.rows_needed is not None

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        return dict(vars(self))


def certify(
    exported: Path,
    reference_logits: NDArray[Any],
    task: Task,
    budget: RiskBudget,
    progress: Progress,
    *,
    reference_files: Mapping[str, str],
    max_length: int | None = None,
) -> Certificate:
    """Finds the largest speed of an exported model at which it keeps to the budget against the teacher.

    The speed of a model with exits is stored beside it.

    Args:
        exported: a folder of `alembert export`.
        reference_logits: (rows, labels), the teacher's for the dev split.
        task: with a dev split.
        budget: in either mode.
        progress: called with a description, steps done and steps in all.
        reference_files: the teacher's fingerprint, for the record.
        max_length: of texts, in tokens; None = the model's own.
    """
    classifier = AdaptiveClassifier.from_pretrained(exported, speed=0.0, max_length=max_length)
    answers = collect_answers(
        classifier,
        task_texts(task, "dev"),
        lambda done, total: progress(f"{exported.name}: running every exit", done, total),
    )

    def at_largest_speed(wanted: RiskBudget) -> dict[str, Any]:
        record = calibrate(
            classifier,
            task,
            "dev",
            wanted,
            model_name=exported.name,
            data_name=task.name,
            answers=answers,
            reference_logits=reference_logits,
            reference_name="teacher",
            reference_files=reference_files,
        )
        if len(classifier.exit_layers) > 1:
            store(record, exported)
        return record

    try:
        record = at_largest_speed(budget)
    except NothingCertifiedError as error:
        within = _PROMISING_SHARE * budget.most
        if error.rows_needed is None or error.risk > within:
            (exported / CALIBRATION_FILE).unlink(missing_ok=True)
            return Certificate(False, 0.0, error.risk, None, str(error), error.rows_needed)
        record = at_largest_speed(replace(budget, mode=EMPIRICAL, most=within))
        seen = record["at_speed"]
        needed = rows_to_certify(
            classifier,
            task,
            "dev",
            budget,
            [row["speed"] for row in record["curve"] if row["accepted"] and row["speed"] <= record["speed"]],
            answers=answers,
            reference_logits=reference_logits,
        )
        return Certificate(False, record["speed"], seen["risk"], seen["macs"], str(error), needed)
    at_speed = record["at_speed"]
    return Certificate(True, record["speed"], at_speed["risk"], at_speed["macs"], None)


def timed_speeds(exported: Path, speed: float) -> tuple[float, ...]:
    """The speeds at which an export is to be timed: its own, and of one with exits those that tell the others' time."""
    calibrated = CalibratedSpeed.read(exported)
    if calibrated is None:
        return (0.0, speed)
    curve = calibrated.record["curve"]
    between = speeds_along([row["speed"] for row in curve], [row["macs"] for row in curve], TIMED_SHARES)
    return tuple(sorted({0.0, speed, *between}))


def dominated(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names of the rows that another beats in speed and equals or beats in the metric, or the reverse.

    Speed is texts per second as a multiple of the baseline's, which the best is chosen by.
    """

    def beats(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        better = [one[key] - other[key] for key in ("metric", "ratio_to_baseline")]
        return bool(min(better) >= 0 and max(better) > 0)

    return [name for name, row in rows.items() if any(beats(other, row) for other in rows.values())]
