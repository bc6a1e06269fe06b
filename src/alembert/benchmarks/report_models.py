"""The part of a report that shows one model: every exit run once over the texts, every speed replayed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alembert.benchmarks.calibration import SPEEDS
from alembert.benchmarks.evaluation import ExitAnswers, task_texts
from alembert.benchmarks.replayed_exits import ExitCosts, ReplayedExits, collect_answers
from alembert.benchmarks.report_examples import confusions, examples
from alembert.benchmarks.report_exits import (
    ExitAnswersOfTask,
    class_curve,
    reliability,
    speed_curve,
    uncertainty_histograms,
)
from alembert.benchmarks.risk_budget import ACCURACY_DROP, CERTIFIED, DISAGREEMENT
from alembert.common.errors import InputError
from alembert.data.metrics import bootstrap_interval, compute_metrics
from alembert.data.task import Task, rows_sha256
from alembert.runtime.adaptive import AdaptiveClassifier
from alembert.runtime.calibration_file import CalibratedSpeed
from alembert.runtime.torch_backend import precision_of

Array = NDArray[Any]
Progress = Callable[[str, int, int], None]

TOLERATED_DROP = 0.01
"""What a speed may lose against the full model to be shown first where nobody chose one."""
CALIBRATED, OWN, PICKED = "calibrated", "own", "picked"
"""Where a default speed comes from: calibration.json, config.json, or the very rows of the report."""
_CALIBRATION_KEYS = (
    *("speed", "risk", "max_drop", "scale", "confidence", "mode", "per_class"),
    *("reference", "reference_files", "data", "split", "rows", "at_speed", "next", "created"),
)
_OWN_RISKS = (ACCURACY_DROP, DISAGREEMENT)
"""Those that are 0 by definition where a full model is compared with itself."""


@dataclass(frozen=True)
class ReportedModel:
    """A model with its part of the report.

    Attributes:
        source: as it was given.
        part: JSON, keys as in docs/report.md.
        decisions: (rows,) or (rows, labels), the full model's answers.
        free_speeds: whether it can be timed at any speed by naming it: a calibration whose policy, exits, length
            or precision differ from the model's own counts only where no speed is named.
    """

    source: str
    part: dict[str, Any]
    decisions: Array
    free_speeds: bool


def report_model(
    source: str,
    name: str,
    task: Task,
    split: str,
    each: int,
    batch_tokens: int | None,
    max_length: int | None,
    progress: Progress,
    drawn_from: Task | None = None,
) -> ReportedModel:
    """Runs a model over a split once and collects what the report shows of it.

    `each` is examples of each kind; texts are cut to `max_length` tokens, where it is not the model's own. `drawn_from`
    has all rows where `task` has some of them.

    Raises InputError when the model cannot be loaded, a text is empty or an answer is not a number.
    """
    classifier = AdaptiveClassifier.from_pretrained(source, batch_tokens=batch_tokens, max_length=max_length)
    texts, labels = task_texts(task, split), np.asarray(task.dataset(split)["labels"])
    answers = collect_answers(
        classifier, texts, lambda done, total: progress(f"{name}: running every exit", done, total)
    )
    if not np.isfinite(answers.logits).all():
        row, exit_ = np.argwhere(~np.isfinite(answers.logits))[0][:2]
        raise InputError(
            f"{source}: answers text {row + 1} of {split} with NaN or infinity after layer "
            f"{answers.exit_layers[exit_]}; its weights are damaged or overflow: train or load it in fp32"
        )
    answers = _in_task_order(answers, classifier.label_names, task.label_names)
    own = ExitAnswersOfTask(answers, task, labels)
    calibrated = _calibration(source, max_length)
    part: dict[str, Any] = {
        "name": name,
        "source": source,
        "exported": hasattr(classifier.backend, "manifest"),
        "precision": precision_of(classifier.settings["dtype"]),
        "layers": classifier.exit_layers[-1],
        "parameters": _parameters(classifier),
        "max_length": classifier.max_length,
        **_full_model(own),
        "calibration": None
        if calibrated is None
        else _calibration_facts(calibrated, drawn_from or task, split),
        "reliability": reliability(own),
        "exits": None,
        "confusions": None,
    }
    has_exits = len(classifier.exit_layers) > 1
    if has_exits:
        part["exits"] = _exits(classifier, calibrated, own, texts, each, name, progress)
        chosen = ReplayedExits(answers, classifier.policy(), labels).taken(part["exits"]["example_speed"])
        early = own.decisions[np.arange(own.rows), chosen]
        part["confusions"] = {
            "against": "its full model",
            "pairs": confusions(task, labels, early, own.decisions[:, -1]),
        }
    free = not has_exits or calibrated is None or _same_without_calibration(source, classifier)
    return ReportedModel(source, part, own.decisions[:, -1], free)


def confusions_against(
    model: ReportedModel, reference: ReportedModel, task: Task, split: str
) -> dict[str, Any]:
    """The part "confusions" of a model without exits: against another model's answers."""
    labels = np.asarray(task.dataset(split)["labels"])
    return {
        "against": reference.part["name"],
        "pairs": confusions(task, labels, model.decisions, reference.decisions),
    }


def _exits(
    classifier: AdaptiveClassifier,
    calibrated: CalibratedSpeed | None,
    own: ExitAnswersOfTask,
    texts: Sequence[Any],
    each: int,
    name: str,
    progress: Progress,
) -> dict[str, Any]:
    policy = classifier.policy()
    replayed = ReplayedExits(own.answers, policy, own.labels)
    speeds = sorted({0.0, *SPEEDS, classifier.speed})
    curve = speed_curve(
        own,
        replayed,
        ExitCosts(classifier, own.answers),
        speeds,
        lambda done, total: progress(f"{name}: replaying speeds", done, total),
    )
    default, origin = _default_speed(classifier, calibrated, speeds, curve)
    shown = default if default > 0 else _picked_speed(speeds, curve)
    return {
        "layers": list(classifier.exit_layers),
        "policy": policy.settings,
        "speeds": speeds,
        "default_speed": default,
        "default_from": origin,
        "example_speed": shown,
        "curve": curve,
        "texts_per_second": None,
        "ratio_to_baseline": None,
        "measured_speeds": [],
        "classes": class_curve(own, [replayed.taken(speed) for speed in speeds]),
        "uncertainty": uncertainty_histograms(own, replayed),
        "examples": examples(own, replayed, texts, shown, each),
    }


def _full_model(own: ExitAnswersOfTask) -> dict[str, Any]:
    task, logits = own.task, own.answers.logits[:, -1]
    metric = compute_metrics(task.problem_type, (task.main_metric,), logits, own.labels)[task.main_metric]
    interval = bootstrap_interval(task.problem_type, task.main_metric, logits, own.labels)
    return {"metric": metric, "metric_interval": list(interval)}


def _calibration(source: str, max_length: int | None) -> CalibratedSpeed | None:
    """The calibration that a classifier takes over which is loaded with this length, if it does."""
    calibrated = CalibratedSpeed.read(source)
    if calibrated is None or not calibrated.fits(source):
        return None
    return None if calibrated.contradicted_by({"max_length": max_length}) else calibrated


def _calibration_facts(calibrated: CalibratedSpeed, task: Task, split: str) -> dict[str, Any]:
    record = calibrated.record
    facts = {key: record.get(key) for key in _CALIBRATION_KEYS}
    return facts | {
        "certified_speeds": _certified_speeds(record),
        "same_rows": record.get("data_sha256") == rows_sha256(task.dataset(split)),
    }


def _certified_speeds(record: Mapping[str, Any]) -> list[float]:
    """The speeds that were tested and accepted; 0 is one where the full model was held against something else."""
    if record.get("mode") != CERTIFIED:
        return []
    accepted = [float(row["speed"]) for row in record.get("curve", ()) if row["accepted"]]
    untested = record.get("reference") is None and record.get("risk") in _OWN_RISKS
    return [speed for speed in accepted if speed > 0 or not untested]


def _default_speed(
    classifier: AdaptiveClassifier,
    calibrated: CalibratedSpeed | None,
    speeds: Sequence[float],
    curve: Mapping[str, Sequence[Any]],
) -> tuple[float, str]:
    if calibrated is not None:
        return calibrated.speed, CALIBRATED
    return (classifier.speed, OWN) if classifier.speed > 0 else (_picked_speed(speeds, curve), PICKED)


def _picked_speed(speeds: Sequence[float], curve: Mapping[str, Sequence[Any]]) -> float:
    """The largest speed up to which the metric stays within a point of the full model's on these rows."""
    least = curve["metric"][0] - TOLERATED_DROP
    kept = 0.0
    for speed, value in zip(speeds, curve["metric"], strict=True):
        if value < least:
            break
        kept = speed
    return kept


def _in_task_order(answers: ExitAnswers, names: Sequence[str], wanted: Sequence[str]) -> ExitAnswers:
    """The answers with their labels in the task's order; models may number the same labels otherwise."""
    if tuple(names) == tuple(wanted):
        return answers
    order = [list(names).index(name) for name in wanted]
    return dataclasses.replace(answers, logits=np.ascontiguousarray(answers.logits[..., order]))


def _same_without_calibration(source: str, classifier: AdaptiveClassifier) -> bool:
    plain = AdaptiveClassifier.from_pretrained(source, speed=0.0)
    return (plain.policy(), plain.exit_layers, plain.max_length, plain.settings["dtype"]) == (
        classifier.policy(),
        classifier.exit_layers,
        classifier.max_length,
        classifier.settings["dtype"],
    )


def _parameters(classifier: AdaptiveClassifier) -> int | None:
    model = getattr(classifier.backend, "model", None)
    return None if model is None else sum(weights.numel() for weights in model.parameters())
