"""The data of commands that distil: read with the teacher's labels."""

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
    from alembert.common.errors import InputError
    from alembert.data import Task, load_task
    from alembert.models.loading import classifier_facts, load_classifier

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

    try:
        task = read(data, ("train",))
    except InputError:
        # A teacher that was never fine-tuned knows no labels: that is to be said, not that these are wrong.
        load_classifier(teacher)
        raise
    rows = None if augmented is None else only_rows(read(augmented, ()), augmented)
    return o.limit_rows(task, limits, seed), rows


def only_rows(augmented: Any, source: str) -> Any:
    """The rows of an augmented file, read as a task. Raises InputError where there are several splits."""
    from alembert.common.errors import InputError

    if len(augmented.splits) > 1:
        raise InputError(
            f"--augmented {source}: holds the splits {', '.join(augmented.splits)}: give the one file of rows that "
            "`alembert augment` wrote"
        )
    (rows,) = augmented.splits.values()
    return rows


def resolved_seed(settings: dict[str, Any]) -> int:
    """The seed that a run will have: the one given, else the training settings' default."""
    from alembert.training.settings import TrainingSettings

    return int(settings.get("seed", TrainingSettings.model_fields["seed"].default))
