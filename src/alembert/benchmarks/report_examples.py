"""What a report shows of single texts: confusions that grow, and texts that leave early, late and wrongly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alembert.benchmarks.replayed_exits import ReplayedExits
from alembert.benchmarks.report_exits import ExitAnswersOfTask
from alembert.data.task import Task
from alembert.runtime.policies import MULTI_LABEL, REGRESSION

Array = NDArray[Any]

_MOST_CONFUSIONS = 12
_LONGEST_TEXT = 800


def confusions(task: Task, labels: Array, decisions: Array, reference: Array) -> list[dict[str, Any]] | None:
    """The confusions that occur more often than the reference's, the largest growth first; None for regression.

    Keys: "label" (the right one), "answer", "count", "reference_count", "rows" (texts with that label). With several
    labels a confusion is a label that was left out, or one that was given without cause.

    Args:
        task: names of the labels.
        labels: (rows,), or (rows, labels) for several labels.
        decisions, reference: class ids (rows,), or booleans (rows, labels).
    """
    if task.problem_type == REGRESSION:
        return None
    found: list[tuple[str, str, int, int, int]] = []
    if task.problem_type == MULTI_LABEL:
        truth = labels > 0
        for index, name in enumerate(task.label_names):
            for missed in (True, False):
                affected = truth[:, index] == missed
                count, other = (
                    int((affected & (given[:, index] != missed)).sum()) for given in (decisions, reference)
                )
                pair = (name, "(left out)") if missed else ("(not given)", name)
                found.append((*pair, count, other, int(affected.sum())))
    else:
        size = task.num_labels
        matrices = [np.zeros((size, size), np.int64) for _ in range(2)]
        for matrix, given in zip(matrices, (decisions, reference), strict=True):
            np.add.at(matrix, (labels, given), 1)
        growth = matrices[0] - matrices[1]
        np.fill_diagonal(growth, 0)
        rows = np.bincount(labels, minlength=size)
        names = task.label_names
        found = [
            (names[i], names[j], int(matrices[0][i, j]), int(matrices[1][i, j]), int(rows[i]))
            for i, j in np.argwhere(growth > 0)
        ]
    grown = sorted((entry for entry in found if entry[2] > entry[3]), key=lambda e: (e[3] - e[2], -e[2]))
    keys = ("label", "answer", "count", "reference_count", "rows")
    return [dict(zip(keys, entry, strict=True)) for entry in grown[:_MOST_CONFUSIONS]]


def examples(
    own: ExitAnswersOfTask, replayed: ReplayedExits, texts: Sequence[Any], speed: float, each: int
) -> dict[str, list[dict[str, Any]]]:
    """Texts that leave early and are answered rightly, that leave late, and that leave early and wrongly.

    Keys: "early_right" (the earliest and surest, in turn by answer), "late" (the least sure when they could have left
    last), "early_wrong" (where the full model is right; the surest first). Each text is {"text": its one or two parts,
    "label", "exit" (layer), "answers": per exit "layer", "answer", "probability", "uncertainty", "wrong"}.

    Args:
        own: the answers.
        replayed: their replay.
        texts: of the split.
        speed: the speed they leave at.
        each: how many of each kind.
    """
    taken, last, order = replayed.taken(speed), len(own.exit_layers) - 1, np.arange(own.rows)
    early = taken < last
    # A text that never leaves has no uncertainty at the last exit: that of the exit before counts.
    unsure = replayed.uncertainties[order, np.minimum(taken, last - 1)]
    wrong, full_wrong = own.wrong[order, taken], own.wrong[:, -1]
    right = np.flatnonzero(early & ~wrong)
    right = right[np.lexsort((unsure[right], taken[right]))]
    late = np.flatnonzero(~early)
    late = late[np.argsort(-unsure[late], kind="stable")]
    hurt = np.flatnonzero(early & wrong & ~full_wrong)
    hurt = hurt[np.argsort(unsure[hurt], kind="stable")]
    chosen = {"early_right": _in_turn(own, right, each), "late": late[:each], "early_wrong": hurt[:each]}
    return {
        kind: [_example(own, replayed, texts, int(row), int(taken[row])) for row in rows]
        for kind, rows in chosen.items()
    }


def _in_turn(own: ExitAnswersOfTask, rows: Array, each: int) -> Array:
    """The first rows of every answer in turn, so that not all are of one class."""
    turns: dict[str, int] = {}
    keyed = []
    for place, row in enumerate(rows[: 50 * each].tolist()):
        turns[own.gold(row)] = turn = turns.get(own.gold(row), -1) + 1
        keyed.append((turn, place, row))
    return np.array([row for _, _, row in sorted(keyed)[:each]], np.int64)


def _example(
    own: ExitAnswersOfTask, replayed: ReplayedExits, texts: Sequence[Any], row: int, taken: int
) -> dict[str, Any]:
    parts = texts[row] if isinstance(texts[row], tuple) else (texts[row],)
    described = [own.describe(row, exit_) for exit_ in range(len(own.exit_layers))]
    uncertainties = [*replayed.uncertainties[row].tolist(), None]
    return {
        "text": [
            part if len(part) <= _LONGEST_TEXT else part[:_LONGEST_TEXT].rstrip() + " …" for part in parts
        ],
        "label": own.gold(row),
        "exit": own.exit_layers[taken],
        "answers": [
            {
                "layer": layer,
                "answer": answer,
                "probability": probability,
                "uncertainty": uncertainty,
                "wrong": bool(own.wrong[row, exit_]),
            }
            for exit_, (layer, (answer, probability), uncertainty) in enumerate(
                zip(own.exit_layers, described, uncertainties, strict=True)
            )
        ],
    }
