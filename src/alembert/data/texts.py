"""Texts without labels, streamed from a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from alembert.common.errors import InputError
from alembert.data.reading import attempt_lines, open_table, sound
from alembert.data.validation import attempt_rows, check_text, find_columns

Text = str | tuple[str, str]


def iterate_texts(
    path: str | Path, *, text_column: str | None = None, text_pair_column: str | None = None
) -> Iterator[Text]:
    """Streams the texts, or pairs of texts, of a TSV, CSV, JSON Lines, Parquet or plain text file.

    A ``.txt`` file has a text per line; of the others see `open_table`. Labels and other columns are
    ignored. The file is opened, and its columns found, before this returns; rows are checked as they come.

    Raises:
        InputError: the file cannot be used, or a row has no text; names file, row and field.
    """
    texts = attempt_texts(path, text_column=text_column, text_pair_column=text_pair_column)
    rows: Iterator[tuple[int, Text]] = sound(texts)
    return (text for _, text in rows)


def attempt_texts(
    path: str | Path, *, text_column: str | None = None, text_pair_column: str | None = None
) -> Iterator[tuple[int, Text | InputError]]:
    """As `iterate_texts`, with the rows' numbers; in place of a bad row's text comes what is wrong with it.

    Raises:
        InputError: the file as a whole cannot be used.
    """
    path = Path(path)
    if path.suffix.lower() == ".txt":
        if not path.is_file():
            raise InputError(f"{path}: no such file.")
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty.")
        return _lines(path)
    table = open_table(path)
    columns = find_columns(table, text_column=text_column, text_pair_column=text_pair_column, labelled=False)
    return (
        (row, example if isinstance(example, InputError) else _text(example.text, example.text_pair))
        for row, example in attempt_rows(table, columns)
    )


def _text(text: str, pair: str | None) -> Text:
    return text if pair is None else (text, pair)


def _lines(path: Path) -> Iterator[tuple[int, Text | InputError]]:
    for row, line in attempt_lines(path):
        if isinstance(line, InputError):
            yield row, line
            continue
        try:
            yield row, check_text(str(path), row, "text", line)
        except InputError as error:
            yield row, error
