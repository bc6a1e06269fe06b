"""The data of commands that distil: read with the teacher's labels."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any

from alembert.cli import options as o

_AUGMENTED_COLUMNS = {"label", "text", "text_pair"}
logger = logging.getLogger("alembert")


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
    """The task, with a dev split held out where the data has none, and the augmented rows or None.

    These are the rows that the teacher's run held out, for on rows that it has learned no score means anything; a
    warning says so where that is not known.

    Raises InputError for unusable data, for a limit of train rows beside augmented rows, and for rows augmented from
    the dev split.
    """
    from alembert.common.errors import InputError
    from alembert.data import Task, load_task
    from alembert.data.sources import open_splits
    from alembert.models.loading import classifier_facts, load_classifier
    from alembert.runtime.hold_out import held_out_alike, read_hold_out

    if augmented is not None and limits.get("train") is not None:
        raise InputError(
            f"--max-train-rows {limits['train']} cuts the train split, and --augmented {augmented} is trained on in "
            "its place: leave --max-train-rows out, or augment a train file of fewer rows"
        )
    facts, seed = classifier_facts(teacher), resolved_seed(settings)
    problem_type = problem_type or facts.problem_type

    def read(source: str, required: tuple[str, ...], columns: dict[str, Any], seed: int = seed) -> Task:
        return load_task(
            source,
            problem_type=problem_type,
            label_names=facts.label_names,
            seed=seed,
            required_splits=required,
            **columns,
        )

    hold_out = read_hold_out(teacher)
    # Where the teacher has learned from other data, its seed means nothing.
    seeds = (seed,) if hold_out is None else dict.fromkeys((hold_out.seed, seed))
    has_own_dev, is_known = False, False
    for holding_seed in seeds:
        try:
            task = read(data, ("train",), columns, holding_seed)
        except InputError:
            # A teacher that was never fine-tuned knows no labels: that is to be said, not that these are wrong.
            load_classifier(teacher)
            raise
        is_known = held_out_alike(task, hold_out)
        has_own_dev = "dev" in open_splits(data, ("train",))
        if is_known or has_own_dev:
            break
    if not is_known and not has_own_dev:
        logger.warning(
            "%s: has no dev split, and the rows that seed %d holds out of train are not known to be new to %s and its "
            "teachers: scores on them may flatter it and what learns from it.",
            data, holding_seed, teacher,
        )  # fmt: skip
    rows = None
    if augmented is not None:
        columns = augmented_columns(augmented, columns, problem_type)
        (rows,) = read(augmented, (), columns).splits.values()
        check_shared_rows(task, rows, augmented, None if has_own_dev else holding_seed)
    return o.limit_rows(task, limits, seed), rows


def augmented_columns(source: str, columns: dict[str, Any], problem_type: str) -> dict[str, Any]:
    """How to read the columns of a file of augmented rows, given how those of the data are read.

    Raises InputError where there are several splits.
    """
    from alembert.common.errors import InputError
    from alembert.data.sources import open_splits

    tables = open_splits(source, ())
    if len(tables) > 1:
        raise InputError(
            f"--augmented {source}: holds the splits {', '.join(tables)}: give the one file of rows that "
            "`alembert augment` wrote"
        )
    (table,) = tables.values()
    if not set(table.columns) <= _AUGMENTED_COLUMNS:
        return columns
    # `alembert augment` wrote it, or could have: whatever the data's columns are called, these have its own names.
    named = dict.fromkeys(("text_column", "text_pair_column", "label_column"))
    if problem_type == "multi_label_classification" and columns.get("label_separator") is None:
        named["label_separator"] = "|"
    return columns | named


def check_shared_rows(task: Any, rows: Any, source: str, held_out_by: int | None) -> None:
    """Warns of rows of dev and test among augmented rows.

    Args:
        held_out_by: the seed that held dev out of train; None where the data has a dev split of its own.

    Raises InputError when dev was held out, and most of it was augmented.
    """
    from alembert.common.errors import InputError

    held = {name: list(_texts(task.splits[name])) for name in ("dev", "test") if name in task.splits}
    shared = set(itertools.chain.from_iterable(held.values())).intersection(_texts(rows))
    if held_out_by is not None:
        # Of the others a copy may be one by chance, and rows that stand in the data twice are in train too.
        dev = set(held["dev"]).difference(_texts(task.splits["train"]))
        if len(dev & shared) > len(dev) / 2:
            raise InputError(
                f"--augmented {source}: holds {len(dev & shared)} of the {len(dev)} rows that seed {held_out_by} "
                "holds out of train as dev, so that dev would flatter the student: augment the data as a folder (a "
                f"single file is augmented whole) with --seed {held_out_by}, or put a dev file beside the train file"
            )
    for name, texts in held.items():
        count = sum(text in shared for text in texts)
        if count:
            logger.warning(
                "%d of %d rows of %s also stand in --augmented %s: its scores flatter the student.",
                count, len(texts), name, source,
            )  # fmt: skip


def _texts(rows: Any) -> Iterator[tuple[str, ...]]:
    """Each row's text or pair, with single spaces: a file of augmented rows has no other white space."""
    names = [name for name in ("text", "text_pair") if name in rows.column_names]
    for batch in rows.select_columns(names).iter(batch_size=10_000):
        for texts in zip(*(batch[name] for name in names), strict=True):
            yield tuple(" ".join(text.split()) for text in texts)


def resolved_seed(settings: dict[str, Any]) -> int:
    """The seed that a run will have: the one given, else the training settings' default."""
    from alembert.training.settings import TrainingSettings

    return int(settings.get("seed", TrainingSettings.model_fields["seed"].default))
