"""What a report shows of a model's exits, from one pass over the texts: every speed, every exit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from alembert.benchmarks.evaluation import ExitAnswers
from alembert.benchmarks.replayed_exits import ExitCosts, ReplayedExits
from alembert.data.metrics import bootstrap_interval, compute_metrics, expected_calibration_error
from alembert.data.task import Task
from alembert.runtime.policies import MULTI_LABEL, REGRESSION
from alembert.runtime.torch_backend import to_probabilities

Array = NDArray[Any]

BINS = 20
"""Of the uncertainties' histograms, over [0, 1]."""
CONFIDENCE_BINS = 15
"""Of reliability diagrams, over [0, 1] (Guo et al. 2017)."""
MOST_CLASSES = 24
"""Classes that are shown by themselves; the others are counted together."""
OTHER_CLASSES = "all other classes"


class ExitAnswersOfTask:
    """A model's answers at every exit to a task's texts, and which of them are right.

    Args:
        answers: of every exit, labels in the task's order.
        task: the task.
        labels: (rows,) class ids or values, (rows, labels) of 0 and 1 for several labels.

    Attributes:
        decisions: (rows, exits) class ids or values; (rows, exits, labels) of booleans for several labels.
        probabilities: (rows, exits, labels) float32; values for regression.
        errors: (rows, exits) float64: 1 where the answer is wrong, else 0; for regression the absolute difference.
        wrong: (rows, exits) bool. A value of a regression counts as wrong where it is further off than half of the
            full model's are.
    """

    def __init__(self, answers: ExitAnswers, task: Task, labels: Array) -> None:
        self.answers, self.task, self.labels = answers, task, labels
        self.exit_layers = answers.exit_layers
        logits = torch.from_numpy(answers.logits)
        self.probabilities: Array = to_probabilities(logits, task.problem_type).numpy()
        if task.problem_type == REGRESSION:
            self.decisions: Array = answers.logits[:, :, 0]
            self.errors: Array = np.abs(self.decisions.astype(float) - labels.reshape(-1, 1))
            self.wrong: Array = self.errors > np.median(self.errors[:, -1])
        elif task.problem_type == MULTI_LABEL:
            self.decisions = answers.logits > 0
            self.wrong = (self.decisions != (labels[:, None] > 0)).any(-1)
            self.errors = self.wrong.astype(float)
        else:
            self.decisions = answers.logits.argmax(-1)
            self.wrong = self.decisions != labels[:, None]
            self.errors = self.wrong.astype(float)

    @property
    def rows(self) -> int:
        """How many texts there are."""
        return len(self.labels)

    def describe(self, row: int, exit_: int) -> tuple[str, float | None]:
        """An exit's answer to a text in words, and its probability; None for regression."""
        probabilities = self.probabilities[row, exit_]
        if self.task.problem_type == REGRESSION:
            return f"{self.decisions[row, exit_]:.3g}", None
        if self.task.problem_type == MULTI_LABEL:
            # As a prediction's score: the least sure of the decisions taken.
            return self._names(self.decisions[row, exit_]), float(
                np.maximum(probabilities, 1 - probabilities).min()
            )
        return self.task.label_names[int(self.decisions[row, exit_])], float(probabilities.max())

    def gold(self, row: int) -> str:
        """A text's own label in words."""
        if self.task.problem_type == REGRESSION:
            return f"{float(self.labels[row]):.3g}"
        if self.task.problem_type == MULTI_LABEL:
            return self._names(self.labels[row] > 0)
        return self.task.label_names[int(self.labels[row])]

    def _names(self, chosen: Array) -> str:
        return ", ".join(self.task.label_names[index] for index in np.flatnonzero(chosen)) or "no label"


def speed_curve(
    own: ExitAnswersOfTask,
    replayed: ReplayedExits,
    costs: ExitCosts,
    speeds: Sequence[float],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[Any]]:
    """Columns, one value per speed: "metric", "low", "high" (95% interval), "changed", "macs", "speedup", "counts".

    "counts" holds for each speed how many texts leave at each exit. MACs and speed-up are None where nobody counted.
    """
    task, metric = own.task, own.task.main_metric
    names = ("metric", "low", "high", "changed", "macs", "speedup", "counts")
    columns: dict[str, list[Any]] = {name: [] for name in names}
    seen: dict[bytes, tuple[float, float, float]] = {}
    full = costs.macs(replayed.taken(0.0), 0.0)
    for done, speed in enumerate(speeds, 1):
        taken, logits = replayed.taken(speed), replayed.logits(speed)
        key = taken.tobytes()
        if key not in seen:
            value = compute_metrics(task.problem_type, (metric,), logits, own.labels)[metric]
            seen[key] = (value, *bootstrap_interval(task.problem_type, metric, logits, own.labels))
        macs = costs.macs(taken, speed)
        speedup = None if macs is None or full is None else full / macs
        counts = np.bincount(taken, minlength=len(own.exit_layers)).tolist()
        for name, value in zip(
            names, (*seen[key], replayed.changed(speed), macs, speedup, counts), strict=True
        ):
            columns[name].append(value)
        if progress is not None:
            progress(done, len(speeds))
    return columns


def class_curve(own: ExitAnswersOfTask, taken: Sequence[Array]) -> dict[str, Any] | None:
    """By class and speed, how many texts leave at each exit and how many are answered rightly; None for regression.

    Keys: "labels", "rows", "counts" (speeds, classes, exits) and "right" (speeds, classes). A text of several labels
    counts in each. Of more than 24 classes the commonest stand by themselves.

    Args:
        own: the answers.
        taken: per speed, the index (rows,) of the exit that each text takes.
    """
    members = _members(own)
    if members is None:
        return None
    exits, order = len(own.exit_layers), np.arange(own.rows)
    counts, right = [], []
    for at_speed in taken:
        correct = ~own.wrong[order, at_speed]
        counts.append([np.bincount(at_speed[rows], minlength=exits).tolist() for rows in members.values()])
        right.append([int(correct[rows].sum()) for rows in members.values()])
    return {
        "labels": list(members),
        "rows": [len(rows) for rows in members.values()],
        "counts": counts,
        "right": right,
    }


def _members(own: ExitAnswersOfTask) -> dict[str, Array] | None:
    """Positions of each class's texts, the classes in the task's order."""
    names = own.task.label_names
    if own.task.problem_type == REGRESSION:
        return None
    belongs = own.labels > 0 if own.task.problem_type == MULTI_LABEL else _one_hot(own.labels, len(names))
    sizes = belongs.sum(0)
    shown = np.sort(np.argsort(-sizes, kind="stable")[:MOST_CLASSES])
    members = {names[index]: np.flatnonzero(belongs[:, index]) for index in shown if sizes[index]}
    others = np.setdiff1d(np.arange(len(names)), shown)
    rest = np.flatnonzero(belongs[:, others].any(1))
    return members | ({OTHER_CLASSES: rest} if len(rest) else {})


def uncertainty_histograms(own: ExitAnswersOfTask, replayed: ReplayedExits) -> dict[str, Any]:
    """How uncertain each exit but the last is of all texts: "edges" (21,), counts "right", "wrong" (exits, 20)."""
    edges = np.linspace(0, 1, BINS + 1)
    columns = range(replayed.uncertainties.shape[1])

    def histogram(exit_: int, rows: Array) -> list[int]:
        values = replayed.uncertainties[rows, exit_]
        return [int(count) for count in np.histogram(values, edges)[0]]

    return {
        "edges": edges.round(4).tolist(),
        "right": [histogram(exit_, ~own.wrong[:, exit_]) for exit_ in columns],
        "wrong": [histogram(exit_, own.wrong[:, exit_]) for exit_ in columns],
    }


def reliability(own: ExitAnswersOfTask) -> list[dict[str, Any]] | None:
    """Confidence against accuracy of every exit over all texts; None for regression.

    Of several labels each decision counts by itself. Keys of an exit: "layer", "metric" (the task's, of all texts),
    "expected_calibration_error" and "bins": "low" and "high" (its bounds), "rows", mean "confidence", "accuracy".
    """
    if own.task.problem_type == REGRESSION:
        return None
    result = []
    for exit_, layer in enumerate(own.exit_layers):
        probabilities, truth = own.probabilities[:, exit_], own.labels
        if own.task.problem_type == MULTI_LABEL:
            flat = probabilities.reshape(-1)
            probabilities, truth = np.stack([1 - flat, flat], axis=1), (truth.reshape(-1) > 0).astype(int)
        metric = compute_metrics(
            own.task.problem_type, (own.task.main_metric,), own.answers.logits[:, exit_], own.labels
        )
        result.append(
            {
                "layer": layer,
                "metric": metric[own.task.main_metric],
                "expected_calibration_error": expected_calibration_error(
                    probabilities, truth, CONFIDENCE_BINS
                ),
                "bins": _bins(probabilities.max(1), probabilities.argmax(1) == truth),
            }
        )
    return result


def _bins(confidence: Array, correct: Array) -> list[dict[str, Any]]:
    # Bins are closed above, as in the expected calibration error.
    places = np.clip(np.ceil(confidence * CONFIDENCE_BINS).astype(int) - 1, 0, CONFIDENCE_BINS - 1)
    return [
        {
            "low": place / CONFIDENCE_BINS,
            "high": (place + 1) / CONFIDENCE_BINS,
            "rows": int((places == place).sum()),
            "confidence": float(confidence[places == place].mean()),
            "accuracy": float(correct[places == place].mean()),
        }
        for place in np.unique(places).tolist()
    ]


def _one_hot(labels: Array, classes: int) -> Array:
    return np.asarray(labels[:, None] == np.arange(classes))
