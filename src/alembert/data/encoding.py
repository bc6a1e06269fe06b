"""From checked rows to numbered labels, on disk."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, List

from alembert.common.errors import InputError
from alembert.data.cache import cached_dataset, fingerprint_of
from alembert.data.labels import LabelReader, check_label_kinds, label_kind
from alembert.data.reading import Table, at
from alembert.data.validation import Columns, Example, checked_rows

_BATCH_ROWS = 10_000
_BATCH_CHARACTERS = 16_000_000
_CACHE_VERSION = 3
"""To be raised whenever the same file would be read differently."""
_INDICATORS = {"0", "1", "0.0", "1.0"}


@dataclass(frozen=True)
class LabelledRows:
    """The checked rows of one split with their labels still as written.

    Attributes:
        source, field: what messages call the file and its label column.
        rows: columns "text", "text_pair" (pairs only), "label" (string or list of strings) and "row".
    """

    source: str
    field: str
    rows: Dataset

    @property
    def has_lists(self) -> bool:
        """Whether each row has a list of labels."""
        return isinstance(self.rows.features["label"], List)

    def labels(self) -> Iterator[tuple[int, str]]:
        """Every row number and label, in order."""
        for batch in self.rows.select_columns(["row", "label"]).iter(batch_size=_BATCH_ROWS):
            if self.has_lists:
                for row, labels in zip(batch["row"], batch["label"], strict=True):
                    yield from ((row, label) for label in labels)
            else:
                yield from zip(batch["row"], batch["label"], strict=True)

    def place(self, row: int) -> str:
        """The place that a message about this row's label speaks of."""
        return at(self.source, row, self.field)


def read_labelled_rows(
    table: Table, columns: Columns, *, several: bool, separator: str | None, as_strings: bool
) -> LabelledRows:
    """Checks every row of `table`, and keeps them on disk; the arguments are those of `LabelReader`.

    Raises:
        InputError: a row is bad.
    """
    field = str(columns.label)
    key = fingerprint_of(_CACHE_VERSION, table.content_key, columns.names, several, separator, as_strings)

    def batches() -> Iterator[pa.RecordBatch]:
        read_label = LabelReader(
            table.source, field, several=several, separator=separator, as_strings=as_strings
        )
        return _as_batches(checked_rows(table, columns, read_label), columns.text_pair is not None)

    return LabelledRows(table.source, field, cached_dataset(key, batches))


def label_kinds(part: LabelledRows) -> dict[str, tuple[int, str]]:
    """For each kind of label that occurs (see `label_kind`), the first row and label of that kind."""
    kinds: dict[str, tuple[int, str]] = {}
    for row, label in part.labels():
        kind = label_kind(label)
        if kind not in kinds:
            kinds[kind] = (row, label)
    return kinds


def count_labels(part: LabelledRows) -> Counter[str]:
    """How often each label occurs."""
    return Counter(label for _, label in part.labels())


def infer_problem_type(part: LabelledRows, as_strings: bool) -> str:
    """Lists are multi-label; numbers with a decimal part, or all with a point, regression; else single-label.

    Raises:
        InputError: some labels are numbers and others not (unless `as_strings`).
    """
    if part.has_lists:
        return "multi_label_classification"
    if as_strings:
        return "single_label_classification"
    kinds = label_kinds(part)
    check_label_kinds(part.source, part.field, kinds)
    return "regression" if kinds.keys() & {"whole", "fraction"} else "single_label_classification"


def check_labels_known(part: LabelledRows, counts: Counter[str], ids: dict[str, int], where: str) -> None:
    """Raises InputError, naming label, file, row and count, if a label is not among `ids`.

    Args:
        counts: `count_labels` of the part.
        where: what the labels are known from, e.g. "seen in train".
    """
    unknown = counts.keys() - ids.keys()
    if not unknown:
        return
    row, label = next((row, label) for row, label in part.labels() if label in unknown)
    rows = f"{counts[label]} row{'s' if counts[label] > 1 else ''}"
    others = f" Nor are {_some(sorted(unknown - {label}))}." if len(unknown) > 1 else ""
    raise InputError(
        f"{part.place(row)}: the label '{label}' ({rows}) is not {where}: {_some(ids)}.{others} "
        "Correct it, or remove its rows."
    )


def check_label_lists(part: LabelledRows) -> None:
    """Raises InputError where every list has a 0 or a 1 for each label, in place of the names of those that apply."""
    lists = part.rows.with_format("arrow")["label"][:].combine_chunks()
    lengths = pc.unique(pc.list_value_length(lists)).to_pylist()
    if (
        len(lengths) == 1
        and lengths[0] > 1
        and set(pc.unique(pc.list_flatten(lists)).to_pylist()) <= _INDICATORS
    ):
        raise InputError(
            f"{part.place(part.rows[0]['row'])}: every list has {lengths[0]} numbers 0 or 1, which looks like one for "
            'each label. Write the names of the labels that apply instead, as in ["food", "sport"].'
        )


def encode_labels(part: LabelledRows, problem_type: str, ids: dict[str, int], num_labels: int) -> Dataset:
    """Replaces "label" and "row" by "labels" (see `Task`). Raises InputError on a score that is no number."""
    key = fingerprint_of(_CACHE_VERSION, part.rows._fingerprint, problem_type, sorted(ids.items()))
    texts = [name for name in ("text", "text_pair") if name in part.rows.column_names]

    def numbers(batch: pa.Table) -> pa.Array:
        labels = batch["label"].to_pylist()
        if problem_type == "single_label_classification":
            return pa.array([ids[label] for label in labels], pa.int64())
        if problem_type == "regression":
            scores = (
                _score(part, row, label) for row, label in zip(batch["row"].to_pylist(), labels, strict=True)
            )
            return pa.array(scores, pa.float64())
        vectors = np.zeros((len(labels), num_labels), dtype=np.float32)
        for vector, row_labels in zip(vectors, labels, strict=True):
            vector[[ids[label] for label in row_labels]] = 1.0
        offsets = np.arange(len(labels) + 1, dtype=np.int32) * num_labels
        return pa.ListArray.from_arrays(offsets, vectors.reshape(-1))

    def batches() -> Iterator[pa.RecordBatch]:
        for batch in part.rows.with_format("arrow").iter(batch_size=_BATCH_ROWS):
            columns: dict[str, Any] = {name: batch[name].combine_chunks() for name in texts}
            yield pa.RecordBatch.from_pydict(columns | {"labels": numbers(batch)})

    return cached_dataset(key, batches)


def _score(part: LabelledRows, row: int, label: str) -> float:
    try:
        score = float(label)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise InputError(
            f"{part.place(row)}: '{label}' is not a finite number, which a regression's label must be."
        )
    return score


def _as_batches(examples: Iterator[Example], is_pair: bool) -> Iterator[pa.RecordBatch]:
    first = next(examples)
    label_type = pa.list_(pa.string()) if isinstance(first.label, list) else pa.string()
    fields = [("row", pa.int64()), ("text", pa.string()), ("text_pair", pa.string()), ("label", label_type)]
    kept = [position for position, (name, _) in enumerate(fields) if is_pair or name != "text_pair"]
    schema = pa.schema([fields[position] for position in kept])
    held: list[Example] = []
    characters = 0
    for example in itertools.chain([first], examples):
        held.append(example)
        characters += len(example.text) + len(example.text_pair or "")
        if len(held) == _BATCH_ROWS or characters > _BATCH_CHARACTERS:
            yield _as_batch(held, kept, schema)
            held, characters = [], 0
    if held:
        yield _as_batch(held, kept, schema)


def _as_batch(examples: list[Example], kept: list[int], schema: pa.Schema) -> pa.RecordBatch:
    columns = list(zip(*examples, strict=True))
    return pa.RecordBatch.from_arrays(
        [pa.array(columns[position], field.type) for position, field in zip(kept, schema, strict=True)],
        schema=schema,
    )


def _some(labels: Collection[str], limit: int = 5) -> str:
    names = [f"'{label}'" for label in itertools.islice(labels, limit)]
    return ", ".join(names) + (f" and {len(labels) - limit} more" if len(labels) > limit else "")
