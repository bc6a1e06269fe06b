"""The data of commands that distil several times: read once, with the teacher's labels."""

from __future__ import annotations

from typing import Any

from alembert.cli import options as o


def load_distillation_data(
    data: str,
    teacher: str,
    augmented: str | None,
    settings: dict[str, Any],
    limits: dict[str, int | None],
    *,
    problem_type: str | None,
    **columns: Any,
) -> tuple[Any, Any]:
    """The task, with a dev split held out where the data has none, and the augmented rows or None."""
    from alembert.cli.distill import resolved_seed
    from alembert.data import Task, load_task
    from alembert.models.loading import classifier_facts

    facts, seed = classifier_facts(teacher), resolved_seed(settings)

    def read(source: str, required: tuple[str, ...]) -> Task:
        return load_task(
            source,
            problem_type=problem_type or facts.problem_type,
            label_names=facts.label_names,
            seed=seed,
            required_splits=required,
            **columns,
        )

    task = o.limit_rows(read(data, ("train", "dev")), limits, seed)
    if augmented is None:
        return task, None
    (rows,) = read(augmented, ()).splits.values()
    return task, rows
