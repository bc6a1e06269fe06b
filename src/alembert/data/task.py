"""A classification or regression task: its splits, labels and metrics."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from alembert.common.errors import InputError
from alembert.data.cache import fingerprint_of
from alembert.data.encoding import (
    LabelledRows,
    check_label_lists,
    check_labels_known,
    count_labels,
    encode_labels,
    infer_problem_type,
    label_kinds,
    read_labelled_rows,
)
from alembert.data.labels import check_label_kinds, sorted_labels
from alembert.data.metrics import DEFAULT_METRICS, PROBLEM_TYPES, check_metrics
from alembert.data.presets import get_preset
from alembert.data.reading import Table, at
from alembert.data.sources import SPLIT_NAMES, open_splits
from alembert.data.validation import LABEL_COLUMNS, Columns, find_columns, warn_of_shared_rows

logger = logging.getLogger("alembert")


@dataclass(frozen=True)
class Task:
    """Labelled texts, what their labels mean, and how predictions of them are scored.

    Attributes:
        name: the preset's name, else the folder's or the file's.
        problem_type: "single_label_classification", "multi_label_classification" or "regression".
        label_names: a label's id is its position here; () for regression.
        metrics: names of the metrics, the main one first.
        splits: some of "train", "dev" and "test". Columns: "text" (string), "text_pair" (string; pairs
            only) and "labels" (int64; for multi-label a list of 0.0 and 1.0, one per label name; for
            regression float64).

    Examples:
        >>> import alembert
        >>> task = alembert.load_task("topics/")
        >>> task.problem_type, task.label_names, task.main_metric
        ('single_label_classification', ('food', 'sport', 'weather'), 'accuracy')
    """

    name: str
    problem_type: str
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    splits: dict[str, Dataset]

    @property
    def is_pair(self) -> bool:
        """Whether each row has two texts."""
        return any("text_pair" in split.column_names for split in self.splits.values())

    @property
    def num_labels(self) -> int:
        """The number of outputs that a model of this task has: 1 for regression."""
        return len(self.label_names) or 1

    @property
    def main_metric(self) -> str:
        """The metric that decides."""
        return self.metrics[0]

    def dataset(self, split: str) -> Dataset:
        """That split. Raises InputError, naming those there are, if there is none."""
        if split not in self.splits:
            raise InputError(f"{self.name}: there is no {split} split; there are: {', '.join(self.splits)}.")
        return self.splits[split]

    def describe(self) -> dict[str, Any]:
        """What a run's configuration keeps of the task: everything but the rows, and a hash of these."""
        fingerprint = self.fingerprint()
        return {
            "name": self.name,
            "problem_type": self.problem_type,
            "num_labels": self.num_labels,
            "label_names": list(self.label_names),
            "metrics": list(self.metrics),
            "is_pair": self.is_pair,
            "splits": {
                split: {"rows": fingerprint[f"{split}_rows"], "sha256": fingerprint[f"{split}_sha256"]}
                for split in self.splits
            },
        }

    def fingerprint(self) -> dict[str, str | int]:
        """Rows and SHA-256 of each split's texts and labels: ``{"train_rows": 9, "train_sha256": "…"}``."""
        result: dict[str, str | int] = {}
        for name, split in self.splits.items():
            result |= {f"{name}_rows": split.num_rows, f"{name}_sha256": rows_sha256(split)}
        return result


def rows_sha256(rows: Dataset) -> str:
    """SHA-256 of a data set's content."""
    digest = hashlib.sha256()
    for batch in rows.iter(batch_size=10_000):
        digest.update(json.dumps(batch, ensure_ascii=False, sort_keys=True).encode())
    return digest.hexdigest()


def load_task(
    source: str | Path,
    *,
    preset: str | None = None,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    label_column: str | None = None,
    problem_type: str | None = None,
    label_names: Sequence[str] | None = None,
    label_separator: str | None = None,
    label_type: str | None = None,
    metrics: Sequence[str] | None = None,
    seed: int = 42,
    required_splits: Sequence[str] = ("train",),
) -> Task:
    """Reads and checks a task: every row is checked before this returns, and kept on disk.

    Args:
        source: a folder with ``train.*``, ``dev.*``, ``test.*``; one file; or a hub id,
            ``organisation/name``, ``name:configuration`` or both.
        preset: the name of a GLUE task; sets problem type, label names and metrics. Labels may then be the
            names or GLUE's integers.
        text_column, text_pair_column, label_column: column names, where they are not the usual ones; an empty
            text_pair_column means that texts are no pairs, whatever the columns are called.
        problem_type: else found: lists or a separator mean multi-label, numbers with a decimal part
            regression, all else single-label.
        label_names: the labels in the order of their ids, e.g. a model's; else train's labels, numbers by
            value, all else alphabetically.
        label_separator: splits the label field of TSV and CSV into several labels; an empty field then
            means none.
        label_type: "string" takes labels as they are written, though some look like numbers.
        metrics: else the preset's, else the problem type's usual ones.
        seed: chooses the rows held out of train where there is no dev split.
        required_splits: those that must be there. If "train" or "dev" is among them and there is train but
            no dev, a tenth of train is held out as dev.

    Raises:
        InputError: the data cannot be used; the message names file, row and field, and what to do.

    Examples:
        >>> import alembert
        >>> task = alembert.load_task("topics/", text_column="text", label_column="label")
        >>> {split: data.num_rows for split, data in task.splits.items()}
        {'train': 64, 'dev': 32, 'test': 32}
    """
    known = get_preset(preset) if preset is not None else None
    problem_type = problem_type or (known.problem_type if known else None)
    if problem_type is not None and problem_type not in PROBLEM_TYPES:
        raise InputError(f"Unknown problem type '{problem_type}'; known are {', '.join(PROBLEM_TYPES)}.")
    if label_type not in (None, "string"):
        raise InputError(f"Unknown label type '{label_type}'; the only one is 'string'.")
    as_strings = label_type == "string"

    tables = open_splits(source, required_splits)
    _check_required(source, tables, required_splits)

    def columns_of(table: Table, labelled: bool = True) -> Columns:
        preset_pair = known.text_pair_column_in(table.columns) if known else None
        return find_columns(
            table,
            text_column=text_column or (known.text_column_in(table.columns) if known else None),
            text_pair_column=preset_pair if text_pair_column is None else text_pair_column,
            label_column=label_column,
            labelled=labelled,
        )

    unlabelled = len(tables) > 1 and "test" in tables and not _has_labels(tables["test"], label_column)
    if unlabelled:
        columns_of(tables["test"], labelled=False)
        if "train" in required_splits and "test" not in required_splits:
            test = tables.pop("test")
            logger.warning("%s: there is no label column, so this split is left out.", test.source)
    try:
        columns = {split: columns_of(table) for split, table in tables.items()}
    except InputError as error:
        if not unlabelled:
            raise
        raise InputError(f"{error} Where test has no labels, give another split's file alone.") from error
    declared = next(
        (table.class_names.get(str(columns[split].label)) for split, table in tables.items()), None
    )
    if label_names is None and known is None:
        label_names = declared
    _check_pairs(tables, columns)
    is_pair = any(names.text_pair is not None for names in columns.values())
    if known is not None and is_pair != (known.text_pair_column is not None):
        kinds = ("pairs of texts", "single texts")
        raise InputError(
            f"{source}: holds {kinds[not is_pair]}, but '{preset}' is a task of {kinds[is_pair]}."
        )
    _log_extra_columns(tables, columns)
    parts = {
        split: read_labelled_rows(
            table,
            columns[split],
            several=label_separator is not None or problem_type == "multi_label_classification",
            separator=label_separator,
            as_strings=as_strings or problem_type == "regression",
        )
        for split, table in tables.items()
    }
    if problem_type is None:
        problem_type = _infer_problem_type(parts, as_strings or label_names is not None)
    _check_lists(parts, problem_type)
    if problem_type == "multi_label_classification":
        for part in parts.values():
            check_label_lists(part)
    if known is not None and known.problem_type != problem_type:
        known = None
    if label_names is None and known is not None:
        label_names = known.label_names

    names: tuple[str, ...] = ()
    ids: dict[str, int] = {}
    if problem_type != "regression":
        counts = {split: count_labels(part) for split, part in parts.items()}
        names = tuple(label_names) if label_names is not None else _learn_labels(parts, counts, as_strings)
        ids = _label_ids(names, () if known is None else known.label_names, declared or ())
        where = "one of the known labels" if label_names is not None else "among the labels seen in train"
        for split, part in parts.items():
            check_labels_known(part, counts[split], ids, where)
        if "train" in required_splits:
            _check_classes(parts["train"], counts["train"], ids, problem_type)

    splits = {split: encode_labels(part, problem_type, ids, len(names)) for split, part in parts.items()}
    if "train" in splits and "dev" not in splits and {"train", "dev"} & set(required_splits):
        splits = _hold_out(splits, problem_type, seed, parts["train"].source)
    warn_of_shared_rows(splits)
    metrics = metrics or (known.metrics if known else DEFAULT_METRICS[problem_type])
    return Task(
        name=preset or Path(source).stem,
        problem_type=problem_type,
        label_names=names,
        metrics=check_metrics(problem_type, metrics, len(names) or 1),
        splits=splits,
    )


def _has_labels(table: Table, label_column: str | None) -> bool:
    """Whether a table has a label column; benchmarks and contests publish test files without one."""
    if label_column is not None:
        return label_column in table.columns
    return any(str(name).casefold() in LABEL_COLUMNS for name in table.columns)


def _learned_from(parts: dict[str, LabelledRows]) -> LabelledRows:
    return parts.get("train") or next(iter(parts.values()))


def _infer_problem_type(parts: dict[str, LabelledRows], as_strings: bool) -> str:
    part = _learned_from(parts)
    problem_type = infer_problem_type(part, as_strings)
    if problem_type == "regression":
        logger.info(
            "%s: decimal numbers for labels, so this is a regression; --problem-type can say otherwise.",
            part.source,
        )
    return problem_type


def _learn_labels(
    parts: dict[str, LabelledRows], counts: dict[str, Counter[str]], as_strings: bool
) -> tuple[str, ...]:
    part = _learned_from(parts)
    if not as_strings:
        check_label_kinds(part.source, part.field, label_kinds(part))
    seen = [counts["train"]] if "train" in counts else counts.values()
    return sorted_labels(itertools.chain.from_iterable(seen), as_strings)


def _label_ids(
    names: tuple[str, ...], numbered: tuple[str, ...], declared: tuple[str, ...]
) -> dict[str, int]:
    """Positions among `names` of a file's labels.

    `numbered` are those that a preset's files have numbers for, `declared` those that the source has names for.
    """
    ids = {name: position for position, name in enumerate(names)}
    # A model that was given no names calls its labels so; files then have the numbers, or names in their order.
    if all(name in (f"LABEL_{position}", str(position)) for name, position in ids.items()):
        given = declared if len(declared) == len(names) else ()
        ids |= {name: position for position, name in enumerate(given) if name not in ids}
        return {str(position): position for position in range(len(names))} | ids
    # A model may have a preset's labels in another order than its files number them.
    folded = {name.casefold(): position for name, position in ids.items()}
    if {name.casefold() for name in numbered} == set(folded):
        return {str(number): folded[name.casefold()] for number, name in enumerate(numbered)} | ids
    return ids


def _check_required(source: str | Path, tables: Iterable[str], required: Sequence[str]) -> None:
    there = set(tables) | ({"dev"} if "train" in tables else set())
    for split in required:
        if split not in there:
            wanted = ", ".join(f"{name}.*" for name in SPLIT_NAMES[split])
            raise InputError(
                f"{source}: there is no {split} split ({wanted}); there are: {', '.join(tables)}."
            )


def _check_pairs(tables: dict[str, Table], columns: dict[str, Columns]) -> None:
    pairs = [split for split in tables if columns[split].text_pair is not None]
    if pairs and len(pairs) < len(tables):
        single = next(split for split in tables if split not in pairs)
        raise InputError(
            f"{tables[single].source}: there is no second text column, which {tables[pairs[0]].source} has "
            f"('{columns[pairs[0]].text_pair}'); the splits must be alike."
        )


def _log_extra_columns(tables: dict[str, Table], columns: dict[str, Columns]) -> None:
    extra = {
        name for split, table in tables.items() for name in table.columns if name not in columns[split].names
    }
    if extra:
        used = ", ".join(next(iter(columns.values())).names)
        logger.info("Columns not used: %s (used: %s).", ", ".join(sorted(extra)), used)


def _check_lists(parts: dict[str, LabelledRows], problem_type: str) -> None:
    several = problem_type == "multi_label_classification"
    for part in parts.values():
        if part.has_lists != several:
            has, wants = (
                ("lists of labels", "one label a row") if part.has_lists else ("one label a row", "lists")
            )
            raise InputError(f"{part.place(part.rows[0]['row'])}: {has}, but {problem_type} has {wants}.")


def _check_classes(part: LabelledRows, counts: Counter[str], ids: dict[str, int], problem_type: str) -> None:
    place = at(part.source, field=part.field)
    if not counts:
        raise InputError(f"{place}: no row has any label.")
    if problem_type == "single_label_classification" and len({ids[label] for label in counts}) < 2:
        raise InputError(
            f"{place}: every row has the label '{next(iter(counts))}'; training needs two classes."
        )


def _hold_out(splits: dict[str, Dataset], problem_type: str, seed: int, source: str) -> dict[str, Dataset]:
    """Moves a tenth of train to dev: every tenth row in the order of labels, shuffled within each label.

    So classes and scores keep their shares, and the first row of each class stays in train.
    """
    train = splits["train"]
    order = np.random.default_rng(seed).permutation(train.num_rows)
    candidates = order
    if problem_type != "multi_label_classification":
        labels = train.with_format("numpy")["labels"][:][order]
        by_label = np.argsort(labels, kind="stable")
        order = order[by_label]
        candidates = order
        if problem_type == "single_label_classification":
            candidates = order[1:][np.diff(labels[by_label]) == 0]
    wanted = max(train.num_rows // 10, 1)
    if len(candidates) < wanted or train.num_rows < 2:
        raise InputError(f"{source}: too few rows to hold out a dev split; add a dev file.")
    positions = np.linspace(0, len(candidates) - 1, wanted + 2)[1:-1].round().astype(np.int64)
    if len(np.unique(positions)) < wanted:
        # Hardly more candidates than are wanted: rounding met some of them twice.
        positions = (np.arange(wanted) * len(candidates)) // wanted
    held_out = np.sort(candidates[positions])
    kept = np.setdiff1d(np.arange(train.num_rows), held_out)
    logger.info(
        "%s: there is no dev split, so %d of %d rows are held out of train (seed %d).",
        source, len(held_out), train.num_rows, seed,
    )  # fmt: skip
    key = train._fingerprint
    parts = {
        "train": train.select(kept, new_fingerprint=fingerprint_of(key, "kept", seed)),
        "dev": train.select(held_out, new_fingerprint=fingerprint_of(key, "held out", seed)),
    }
    return parts | {name: split for name, split in splits.items() if name not in parts}
