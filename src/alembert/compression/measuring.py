"""A finished run in two numbers: the task's main metric, and MACs per text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alembert.benchmarks.evaluation import evaluate
from alembert.data.task import Task
from alembert.runtime.adaptive import AdaptiveClassifier

SPEEDS = tuple(step / 10 for step in range(10))


def measure(
    run: str | Path,
    task: Task,
    split: str,
    speed: float,
    *,
    policy: str | None = None,
    top_k: int | None = None,
    all_speeds: bool = False,
) -> dict[str, Any]:
    """Quality and cost of a run on a split; at `speed` where it has exits, else of the whole model.

    Args:
        run: a run directory or any classifier.
        task: with the split.
        split: which.
        speed: in [0, 1], of models with exits.
        policy, top_k: over the defaults of the exits.
        all_speeds: for models with exits also "speeds", a list of {"speed", "metric", "macs"} for 0, 0.1 … 0.9.

    Returns "metric" (the task's main one), "metrics", "macs" and "flops" (a mean over the split's texts, in the
    paper convention at their own lengths), "macs_full_convention" and "speed" (None without exits).
    """
    # Naming a speed keeps a calibration's policy, exits and length out of what is compared.
    classifier = AdaptiveClassifier.from_pretrained(run, speed=0.0)
    has_exits = len(classifier.exit_layers) > 1
    further = SPEEDS if has_exits and all_speeds else ()
    results = evaluate(
        classifier,
        task,
        split,
        [speed if has_exits else 0.0, *further],
        model_name=str(run),
        data_name=task.name,
        policy=policy if has_exits else None,
        top_k=top_k if has_exits else None,
        repeats=0,
    )
    chosen, *others = results["speeds"]
    names = ("metric", "metrics", "macs", "flops", "macs_full_convention")
    measured = {name: chosen[name] for name in names} | {"speed": speed if has_exits else None}
    if others:
        measured["speeds"] = [{name: row[name] for name in ("speed", "metric", "macs")} for row in others]
    return measured
