"""What an export costs in quality: every exit's answers beside those of the run that it was made from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from alembert.benchmarks.evaluation import ExitAnswers, task_texts
from alembert.benchmarks.replayed_exits import collect_answers
from alembert.data.metrics import bootstrap_difference_interval, compute_metrics, predictions_of
from alembert.data.task import Task
from alembert.runtime.adaptive import AdaptiveClassifier


def export_quality(
    run: AdaptiveClassifier,
    exported: AdaptiveClassifier,
    task: Task,
    split: str,
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Runs both models with all exits over a split and compares them exit by exit.

    Args:
        run: on torch.
        exported: made from it, with all or some of its exits.
        task, split: labelled texts.
        progress: called with a description, batches done and batches in all.

    Returns:
        "metric" (its name), "split", "rows", and "exits": for every exit of the export, the full model's last, "exit"
        (its layer), "run" and "exported" (the metric of each), "difference" (the second less the first), "interval"
        (95%, bootstrap over pairs) and "same_answer" (share of texts with the same label or labels; None for
        regression).
    """
    texts, labels = task_texts(task, split), np.asarray(task.dataset(split)["labels"])

    def answers(classifier: AdaptiveClassifier, name: str) -> ExitAnswers:
        notify = None if progress is None else lambda done, total: progress(name, done, total)
        return collect_answers(classifier, texts, notify)

    before, after = answers(run, "answers of the run"), answers(exported, "answers of the export")
    exits = [
        _compare(
            layer,
            before.logits[:, before.exit_layers.index(layer)],
            after.logits[:, position],
            labels,
            task,
        )
        for position, layer in enumerate(after.exit_layers)
    ]
    return {"metric": task.main_metric, "split": split, "rows": len(texts), "exits": exits}


def _compare(
    layer: int, run: np.ndarray, exported: np.ndarray, labels: np.ndarray, task: Task
) -> dict[str, Any]:
    kind, metric = task.problem_type, task.main_metric
    scores = [compute_metrics(kind, [metric], logits, labels)[metric] for logits in (run, exported)]
    same = None
    if kind != "regression":
        equal = predictions_of(kind, run) == predictions_of(kind, exported)
        same = float((equal.all(axis=1) if equal.ndim > 1 else equal).mean())
    return {
        "exit": layer,
        "run": scores[0],
        "exported": scores[1],
        "difference": scores[1] - scores[0],
        "interval": list(bootstrap_difference_interval(kind, metric, exported, run, labels)),
        "same_answer": same,
    }
