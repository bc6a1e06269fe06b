"""The transport between layers that BERT-EMD's runs logged, as a part of the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alembert.reports.layer_transport import layer_transport_history

MOST_STEPS = 40
_STEPS = "steps"
_LOG = "trainer_state.json"


def add_layer_transport(report: dict[str, Any]) -> None:
    """Gives every model's "run" its "transport": one entry per run that logged any, methods before it first.

    Keys: "name", "steps" (logged ones, at most 40) and "kinds": by kind "flows" (steps, student, teacher),
    "student_weights" and "teacher_weights" (steps, layers).

    Raises:
        InputError: a run's log is damaged.
    """
    for model in report["models"]:
        folder = Path(model["source"])
        earlier = sorted((folder / _STEPS).iterdir()) if (folder / _STEPS).is_dir() else []
        runs = [run for run in (*earlier, folder) if (run / _LOG).is_file()]
        model["run"]["transport"] = [part for run in runs if (part := _transport(run)) is not None]


def _transport(run: Path) -> dict[str, Any] | None:
    history = layer_transport_history(run)
    if not history:
        return None
    steps = next(iter(history.values())).steps
    kept = _spread(len(steps))
    return {
        "name": run.name,
        "steps": [steps[place] for place in kept],
        "kinds": {
            kind: {
                "flows": [series.flows[place] for place in kept],
                "student_weights": [series.student_weights[place] for place in kept],
                "teacher_weights": [series.teacher_weights[place] for place in kept],
            }
            for kind, series in history.items()
        },
    }


def _spread(length: int) -> list[int]:
    most = min(length, MOST_STEPS)
    return sorted({round(step * (length - 1) / max(1, most - 1)) for step in range(most)})
