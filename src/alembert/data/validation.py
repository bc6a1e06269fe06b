"""Finds the columns of a table, and refuses rows that no model should be trained or scored on."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from alembert.common.errors import InputError
from alembert.data.labels import LabelReader
from alembert.data.reading import Table, at, check_encoding

if TYPE_CHECKING:
    from datasets import Dataset

    from alembert.data.task import Task

logger = logging.getLogger("alembert")

TEXT_COLUMNS = (
    "text", "sentence", "text_a", "sentence1", "question1", "question", "premise", "review", "content",
    "utterance", "query",
)  # fmt: skip
TEXT_PAIR_COLUMNS = ("text_b", "sentence2", "question2", "hypothesis", "text_pair", "text2")
LABEL_COLUMNS = ("label", "labels", "intent", "category", "class", "target", "score")


@dataclass(frozen=True)
class Columns:
    """The names of the columns that are read; `label` is None for texts without labels."""

    text: str
    text_pair: str | None
    label: str | None

    @property
    def names(self) -> tuple[str, ...]:
        """The columns that are there, in the order text, second text, label."""
        return tuple(name for name in (self.text, self.text_pair, self.label) if name is not None)


class Example(NamedTuple):
    """One checked row: its number, its text(s), and its label as written, or the list of its labels."""

    row: int
    text: str
    text_pair: str | None
    label: str | list[str] | None


def find_columns(
    table: Table,
    *,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    label_column: str | None = None,
    labelled: bool = True,
) -> Columns:
    """The table's columns: those given by name, else the first of the usual names, in any case of letters.

    A `text_pair_column` of "" means that there is none, whatever names the table has.

    Raises:
        InputError: a column is missing; the message lists what there is and names the option to use.
    """
    if text_column is None and text_pair_column is None:
        folded = [name.casefold() for name in table.columns]
        if "question" in folded and "sentence" in folded:
            text_column = table.columns[folded.index("question")]
            text_pair_column = table.columns[folded.index("sentence")]
    text = _find_column(table, text_column, TEXT_COLUMNS, "text")
    text_pair = None
    if text_pair_column != "":
        pair_candidates = [name for name in TEXT_PAIR_COLUMNS if name != text.casefold()]
        text_pair = _find_column(table, text_pair_column, pair_candidates, "text pair", optional=True)
    label = _find_column(table, label_column, LABEL_COLUMNS, "label") if labelled else None
    columns = Columns(text, text_pair, label)
    for name in columns.names:
        if columns.names.count(name) > 1:
            raise InputError(
                f"{table.source}: column '{name}' is given for two purposes; name distinct columns."
            )
    return columns


def _find_column(
    table: Table, given: str | None, candidates: Sequence[str], purpose: str, *, optional: bool = False
) -> Any:
    there = ", ".join(f"'{name}'" for name in table.columns)
    option = f"--{purpose.replace(' ', '-')}-column"
    if given is not None:
        if given not in table.columns:
            raise InputError(f"{table.source}: there is no column '{given}' ({option}); there are {there}.")
        return given
    by_folded = {name.casefold(): name for name in reversed(table.columns)}
    for candidate in candidates:
        if candidate in by_folded:
            return by_folded[candidate]
    if optional:
        return None
    known = {*TEXT_COLUMNS, *TEXT_PAIR_COLUMNS, *LABEL_COLUMNS}
    if len(table.columns) == 1 and (
        other := next((sign for sign in ";\t|" if sign in str(table.columns[0])), None)
    ):
        raise InputError(
            f"{at(table.source, 1)}: there is one column, {there}: fields seem to be separated by {other!r}, and in "
            "this file they are by tabs (.tsv) or commas (.csv). Save it as its ending says, or name it as it is."
        )
    if purpose == "text" and table.has_header and not known & by_folded.keys():
        raise InputError(
            f"{at(table.source, 1)}: the header seems to be missing: no known column name is among "
            f"{_shortened(there)}. Put a header first, such as label and text, or name the columns with "
            "--text-column and --label-column."
        )
    raise InputError(
        f"{table.source}: there is no {purpose} column; there are {there}. Name it with {option} "
        f"(found by themselves: {', '.join(candidates)})."
    )


def check_text(source: str, row: int, field: str, value: Any) -> str:
    """The value, if it is text with at least one visible character, else InputError."""
    if not isinstance(value, str):
        what = "missing" if value is None else f"of type {type(value).__name__}, not a string"
        raise InputError(f"{at(source, row, field)}: the text is {what}; fill it or remove the row.")
    if not value or value.isspace():
        raise InputError(f"{at(source, row, field)}: the text is empty; fill it or remove the row.")
    check_encoding(source, row, field, value)
    return value


def checked_rows(table: Table, columns: Columns, read_label: LabelReader | None) -> Iterator[Example]:
    """Streams the rows of `table`, each checked. Raises InputError at the first bad row."""
    for row, values in table.read(columns.names):
        yield _checked(table, columns, read_label, row, values)


def attempt_rows(table: Table, columns: Columns) -> Iterator[tuple[int, Example | InputError]]:
    """The numbers of the rows of `table`, without labels, and each row checked, or what is wrong with it."""
    for row, values in table.attempt(columns.names):
        if isinstance(values, InputError):
            yield row, values
            continue
        try:
            yield row, _checked(table, columns, None, row, values)
        except InputError as error:
            yield row, error


def _checked(
    table: Table, columns: Columns, read_label: LabelReader | None, row: int, values: Sequence[Any]
) -> Example:
    text = check_text(table.source, row, columns.text, values[0])
    pair = None
    if columns.text_pair is not None:
        pair = check_text(table.source, row, columns.text_pair, values[1])
    return Example(row, text, pair, read_label(row, values[-1]) if read_label else None)


def warn_of_shared_rows(splits: dict[str, Dataset]) -> None:
    """Logs, per split, how many of its texts (or pairs) also stand in train; 8 bytes a row are held."""
    others = [name for name in ("dev", "test") if name in splits]
    if "train" not in splits or not others:
        return
    train = np.unique(_text_hashes(splits["train"]))
    for name in others:
        shared = int(np.isin(_text_hashes(splits[name]), train).sum())
        if shared:
            logger.warning(
                "%d of %d rows of %s also stand in train: its scores flatter the model.",
                shared, splits[name].num_rows, name,
            )  # fmt: skip


def check_same_labels(names: Sequence[str], task: Task, model: str) -> None:
    """Raises InputError when a model's labels, in the order of its logits, are not a task's in theirs."""
    if tuple(names) != tuple(task.label_names):
        raise InputError(
            f"{model} knows the labels {_sample(names)}, the data has {_sample(task.label_names)}: they must be the "
            "same, in the same order (from Python: load_task(…, label_names=the model's))"
        )


def _sample(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def rows_not_in_train(splits: Mapping[str, Dataset], split: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Positions (rows,), ascending, of a split's rows whose text (or pair) does not stand in train too."""
    if "train" not in splits:
        return np.arange(splits[split].num_rows)
    shared = np.isin(_text_hashes(splits[split]), _text_hashes(splits["train"]))
    return np.flatnonzero(~shared)


def _text_hashes(split: Dataset) -> np.ndarray[Any, np.dtype[np.int64]]:
    names = [name for name in ("text", "text_pair") if name in split.column_names]
    texts = split.select_columns(names)
    hashes = (
        hash(row)
        for batch in texts.iter(batch_size=10_000)
        for row in zip(*(batch[name] for name in names), strict=True)
    )
    return np.fromiter(hashes, dtype=np.int64, count=split.num_rows)


def _shortened(text: str, limit: int = 120) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
