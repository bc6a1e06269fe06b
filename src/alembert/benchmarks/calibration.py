"""The largest speed whose risk keeps within a budget with a stated confidence: Learn then Test for early exits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alembert.benchmarks.evaluation import ExitAnswers, task_texts
from alembert.benchmarks.replayed_exits import ExitCosts, ReplayedExits, collect_answers
from alembert.benchmarks.risk_budget import CERTIFIED, EMPIRICAL, TASK_ERROR, RiskBudget
from alembert.benchmarks.risk_control import (
    LossKind,
    fixed_sequence,
    p_value,
    rows_needed,
    smallest_budget,
    smallest_set,
    worst_class,
)
from alembert.common.errors import InputError
from alembert.data.metrics import compute_metrics
from alembert.data.task import Task, rows_sha256
from alembert.data.validation import check_same_labels, rows_not_in_train
from alembert.runtime.adaptive import AdaptiveClassifier
from alembert.runtime.calibration_file import CALIBRATION_FILE, model_files_fingerprint, write_calibration
from alembert.runtime.policies import MULTI_LABEL, REGRESSION, check_speed
from alembert.runtime.torch_backend import DTYPES, precision_of

Array = NDArray[Any]
Progress = Callable[[str, int, int], None]

SPEEDS: tuple[float, ...] = tuple(
    [step / 1000 for step in range(1, 10)] + [step / 100 for step in range(1, 101)]
)
"""The speeds tested unless others are given. Chosen before any data is seen, as the guarantee demands; finer near 0,
where the uncertainties of sharp exits lie."""

ALL_ROWS = "all rows"
"""In the record of `per_class`, the group besides the classes where texts may have several labels or none."""


class NothingCertifiedError(InputError):
    """Not even speed 0 keeps to the budget.

    Attributes:
        risk: what was seen at speed 0.
        rows_needed: rows that would probably certify speed 0, going by what was seen; None where no number would, and
            in "empirical" mode.
    """

    def __init__(self, message: str, risk: float, rows_needed: int | None = None) -> None:
        super().__init__(message)
        self.risk, self.rows_needed = risk, rows_needed


def calibrate(
    classifier: AdaptiveClassifier,
    task: Task,
    split: str,
    budget: RiskBudget | None = None,
    *,
    model_name: str,
    data_name: str,
    reference: AdaptiveClassifier | None = None,
    reference_name: str | None = None,
    reference_files: Mapping[str, str] | None = None,
    answers: ExitAnswers | None = None,
    reference_logits: Array | None = None,
    policy: str | None = None,
    top_k: int | None = None,
    renormalise: bool | None = None,
    speeds: Sequence[float] = SPEEDS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The largest speed that keeps to a budget, and the curve that it was chosen from.

    Every exit is run once over all rows; each speed's exits are replayed. Speeds are tested from small to large until
    one cannot be certified (see `alembert.benchmarks.risk_control`). Speed 0 is the full model, whose drop and
    disagreement are 0 by definition. In "empirical" mode the test is whether the risk seen is within the budget.
    Where the largest speed costs more than speed 0, 0 is chosen.

    The guarantee is for texts drawn as the rows were, independently of each other and of everything that was
    learned or chosen before: rows that the model was trained or selected on do not count. Rows that stand in the
    task's train split too are left out.

    Args:
        classifier: model, tokenizer, exits in use.
        task: labelled data; its labels must be the model's.
        split: which split.
        budget: risk, limit, confidence, mode; `RiskBudget()` unless given.
        model_name, data_name: for the record.
        reference: another model, run at its full depth, that drop and disagreement are against: the teacher of a
            model whose own full answers are not the teacher's. With it a model without exits can be tested too.
        reference_name, reference_files: for the record; the latter is what `model_files_fingerprint` gives.
        answers: of all the classifier's exits to the split's texts in their order, where they are known already.
        reference_logits: (rows, labels), of a reference that has answered these texts already, in place of `reference`.
        policy, top_k, renormalise: over the classifier's.
        speeds: to be tested, in [0, 1]; they must be chosen without looking at the rows.
        progress: called with a description, steps done and steps in all.

    Returns:
        The record of `calibration.json`, as docs/calibration.md describes it.

    Raises:
        NothingCertifiedError: not even speed 0 keeps to the budget.
        InputError: the model has no exits, a setting is wrong, or the rows are too few to certify anything.
    """
    budget = budget or RiskBudget()
    budget.check(task.problem_type)
    check_same_labels(classifier.label_names, task, model_name)
    has_reference = reference is not None or reference_logits is not None
    if len(classifier.exit_layers) == 1 and not has_reference:
        raise InputError(
            f"{model_name} has no exits, so there is no speed to calibrate: distil one with exits, or test it as it is "
            "against the model that it replaces (--reference)"
        )
    tested_speeds = sorted({check_speed(speed) for speed in speeds} - {0.0})
    if len(classifier.exit_layers) == 1:
        tested_speeds = []
    elif not tested_speeds:
        raise InputError("no speeds to test: give at least one above 0")
    computes_in = getattr(classifier.backend, "dtype", None)
    dtype = precision_of(computes_in)
    if computes_in is not None and dtype is None:
        raise InputError(
            f"{model_name} computes in {computes_in}, which it is never loaded in: take {' or '.join(DTYPES)}"
        )
    chosen = classifier.policy(policy, top_k, renormalise)
    given, where = task.dataset(split), f"{data_name}, {split}"
    kept = rows_not_in_train(task.splits, split)
    left_out = given.num_rows - len(kept)
    if left_out:
        where = f"{where} without the {left_out} rows that stand in train too"
        task = replace(task, splits=task.splits | {split: given.select(kept)})
        answers = None if answers is None else _answers_to(kept, answers)
        reference_logits = None if reference_logits is None else reference_logits[kept]
    labels = np.asarray(task.dataset(split)["labels"][:])
    groups = _groups(labels, task, budget)
    _check_sizes(groups, budget, task, where)

    notify = progress or (lambda *_: None)
    if answers is None:
        answers = collect_answers(
            classifier, task_texts(task, split), lambda done, total: notify("running every exit", done, total)
        )
    if reference is not None:
        reference_logits = full_model_logits(reference, task, split, notify)
    replayed = ReplayedExits(answers, chosen, labels, reference_logits)
    test = _RiskTest(replayed, groups, budget, budget.loss_kind(task.problem_type))
    # A drop or a disagreement of the full model with itself needs no test.
    own_answers = not has_reference and budget.risk != TASK_ERROR
    order = tested_speeds if own_answers else [0.0, *tested_speeds]
    values = fixed_sequence(test.p_values(order, notify), budget.level)
    passed = sum(value <= budget.level for value in values)
    if passed == 0 and not own_answers:
        own = "" if has_reference else ", or take the risk accuracy-drop, which compares with the full model"
        needed = test.rows_needed(0.0) if budget.mode == CERTIFIED else None
        more = "" if needed is None else f", give more rows (about {needed:,})"
        raise NothingCertifiedError(
            f"{where}: the full model itself cannot be shown to keep to {budget.most:g}: its "
            f"{'worst ' if budget.per_class else ''}{budget.risk} is {test.risk(0.0):.4f} here. "
            f"Allow more (--max-drop){more}{own}",
            test.risk(0.0),
            needed,
        )
    largest = order[passed - 1] if passed else 0.0

    curve_speeds = [0.0, *tested_speeds]
    p_of_speed = dict(zip(order, values, strict=False)) if budget.mode == CERTIFIED else {}
    costs = ExitCosts(classifier, answers)
    curve = [
        {
            "speed": at,
            "accepted": at <= largest,
            "p_value": p_of_speed.get(at),
            "risk": test.risk(at),
            "rows_needed": test.rows_needed(at),
            **_measured(replayed, at, task, labels, costs),
        }
        for at in curve_speeds
    ]
    at_speed, full = curve[curve_speeds.index(largest)], curve[0]
    if at_speed["speedup"] is not None and at_speed["speedup"] < 1:
        # So few texts leave that the exits cost more than they save, and smaller speeds let even fewer leave.
        at_speed = full
    speed = at_speed["speed"]
    return {
        "alembert_version": version("alembert"),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": model_name,
        "reference": reference_name if has_reference else None,
        "reference_files": dict(reference_files or {}) if has_reference else None,
        "speed": speed,
        "policy": chosen.name,
        "top_k": chosen.top_k,
        "renormalise": chosen.renormalise,
        "tolerance": chosen.tolerance if task.problem_type == REGRESSION else None,
        "exits": list(classifier.exit_layers[:-1]),
        "max_length": classifier.max_length,
        "dtype": dtype,
        "risk": budget.risk,
        "max_drop": budget.most,
        "confidence": budget.confidence,
        "mode": budget.mode,
        "per_class": budget.per_class,
        "scale": budget.scale,
        "data": data_name,
        "split": split,
        "rows": len(labels),
        "left_out": left_out,
        "data_sha256": rows_sha256(given),
        "task": {
            "problem_type": task.problem_type, "metric": task.main_metric, "num_labels": task.num_labels
        },
        "full_model": {"metric": full["metric"], "macs": full["macs"]},
        "at_speed": {name: at_speed[name] for name in ("risk", "changed", "metric", "macs", "speedup")},
        "next": _next(curve, curve_speeds, largest),
        "classes": test.classes(speed) if budget.per_class else None,
        "curve": curve,
    }  # fmt: skip


def full_model_logits(
    classifier: AdaptiveClassifier, task: Task, split: str, progress: Progress | None = None
) -> Array:
    """The full model's logits (rows, labels) float32 for a split, as `calibrate` takes them of a reference."""
    notify = progress or (lambda *_: None)
    answers = collect_answers(
        classifier, task_texts(task, split), lambda done, total: notify("running the reference", done, total)
    )
    return np.asarray(answers.logits[:, -1])


def rows_to_certify(
    classifier: AdaptiveClassifier,
    task: Task,
    split: str,
    budget: RiskBudget,
    speeds: Sequence[float],
    *,
    answers: ExitAnswers,
    reference_logits: Array | None = None,
) -> int | None:
    """About how many rows would certify every one of some speeds, each with 80% probability, going by the split's.

    A speed is certified after all below it, 0 included, so these belong among `speeds`. Other arguments are those of
    `calibrate`. None where a risk seen is not below the budget.
    """
    labels = np.asarray(task.dataset(split)["labels"][:])
    replayed = ReplayedExits(answers, classifier.policy(), labels, reference_logits)
    groups = _groups(labels, task, budget)
    test = _RiskTest(replayed, groups, budget, budget.loss_kind(task.problem_type))
    needed = [test.rows_needed(speed) for speed in speeds]
    known = [rows for rows in needed if rows is not None]
    return max(known) if len(known) == len(needed) else None


def store(results: dict[str, Any], model: str | Path, path: str | Path | None = None) -> Path:
    """Writes the results of `calibrate`, whole or not at all, and returns the file.

    Args:
        results: what `calibrate` returned.
        model: the model's folder; or a hub id, with a `path`.
        path: the file; calibration.json in the model's folder, where loading finds it, unless given.
    """
    path = Path(model) / CALIBRATION_FILE if path is None else Path(path)
    write_calibration(path, results | {"model_files": model_files_fingerprint(model)})
    return path


def _answers_to(rows: Array, answers: ExitAnswers) -> ExitAnswers:
    """The answers to the texts at some positions (rows,)."""
    learned = answers.learned_uncertainties
    return replace(
        answers,
        logits=answers.logits[rows],
        learned_uncertainties=None if learned is None else learned[rows],
        lengths=answers.lengths[rows],
    )


def _groups(labels: Array, task: Task, budget: RiskBudget) -> dict[str, Array]:
    """Positions of the rows whose mean must keep to the budget, by name: all, or each class's, or both."""
    if not budget.per_class:
        return {"": np.arange(len(labels))}
    if task.problem_type == MULTI_LABEL:
        # Texts may have no label or several: that every class keeps to it says nothing of the whole.
        every_class = {name: np.flatnonzero(labels[:, index]) for index, name in enumerate(task.label_names)}
        return every_class | {ALL_ROWS: np.arange(len(labels))}
    return {name: np.flatnonzero(labels == index) for index, name in enumerate(task.label_names)}


def _check_sizes(groups: dict[str, Array], budget: RiskBudget, task: Task, where: str) -> None:
    name, rows = min(((name, len(rows)) for name, rows in groups.items()), key=lambda group: group[1])
    whose = f" of class {name!r}" if budget.per_class else ""
    if rows == 0:
        raise InputError(f"{where}: there are no rows{whose}, so nothing can be said{whose}: add some")
    if budget.mode == EMPIRICAL:
        return
    kind = budget.loss_kind(task.problem_type)
    needed = smallest_set(kind, budget.most, budget.level)
    if rows < needed:
        least = smallest_budget(kind, rows, budget.level)
        more = f" allow {least:g} or more (--max-drop)," if least < 1 else ""
        raise InputError(
            f"{where}: {rows} rows{whose} are too few: even if no early answer were wrong, it takes {needed} to "
            f"be {budget.confidence:.4g} sure that the {budget.risk} is at most {budget.most:g}, and about ten times "
            f"as many for a good speed. Give more rows,{more} ask for "
            "less confidence, or take --mode empirical, which guarantees nothing"
        )


class _RiskTest:
    """The hypothesis "some group's risk exceeds the budget" at any speed."""

    def __init__(
        self, replayed: ReplayedExits, groups: dict[str, Array], budget: RiskBudget, kind: LossKind
    ) -> None:
        self._replayed, self._groups, self._budget, self._kind = replayed, groups, budget, kind

    def p_values(self, speeds: Sequence[float], notify: Progress) -> Iterator[float]:
        """The p-value at each speed, as far as they are asked for; empirical: 0 within the budget, else 1."""
        for done, speed in enumerate(speeds, 1):
            if self._budget.mode == EMPIRICAL:
                yield float(self.risk(speed) > self._budget.most)
            else:
                yield worst_class(self._p_value(losses) for losses in self._losses(speed))
            notify("testing speeds", done, len(speeds))

    def risk(self, speed: float) -> float:
        """The risk seen, the worst group's."""
        return max(float(losses.mean()) for losses in self._losses(speed))

    def rows_needed(self, speed: float) -> int | None:
        """How many rows in all would certify the speed, going by what was seen; None where no number would."""
        most, level = self._budget.most, self._budget.level
        wanted = 0.0
        for losses in self._losses(speed):
            mean, square = float(losses.mean()), float((losses**2).mean())
            needed = rows_needed(self._kind, mean, square, most, level)
            if needed is None:
                return None
            wanted = max(wanted, needed * self._replayed.rows / len(losses))
        return math.ceil(wanted)

    def classes(self, speed: float) -> list[dict[str, Any]]:
        """Rows, risk and p-value of each group."""
        return [
            {
                "label": name,
                "rows": len(losses),
                "risk": float(losses.mean()),
                "p_value": self._p_value(losses) if self._budget.mode == CERTIFIED else None,
            }
            for name, losses in zip(self._groups, self._losses(speed), strict=True)
        ]

    def _losses(self, speed: float) -> list[NDArray[np.float64]]:
        losses = self._replayed.losses(speed, self._budget)
        return [losses[rows] for rows in self._groups.values()]

    def _p_value(self, losses: NDArray[np.float64]) -> float:
        return p_value(self._kind, losses, self._budget.most, self._budget.level)


def _measured(
    replayed: ReplayedExits, speed: float, task: Task, labels: Array, costs: ExitCosts
) -> dict[str, Any]:
    taken, logits = replayed.taken(speed), replayed.logits(speed)
    metric = compute_metrics(task.problem_type, (task.main_metric,), logits, labels)[task.main_metric]
    macs, full_macs = costs.macs(taken, speed), costs.macs(replayed.taken(0.0), 0.0)
    return {
        "changed": replayed.changed(speed),
        "metric": metric,
        "macs": macs,
        "speedup": None if macs is None or full_macs is None else full_macs / macs,
        "exits": costs.shares(taken),
    }


def _next(curve: list[dict[str, Any]], speeds: list[float], largest: float) -> dict[str, Any] | None:
    """The first speed that was not accepted, and what it would take; None where all were."""
    index = speeds.index(largest) + 1
    if index == len(speeds):
        return None
    return {name: curve[index][name] for name in ("speed", "risk", "p_value", "speedup", "rows_needed")}
