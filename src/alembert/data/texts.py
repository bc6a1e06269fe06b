"""Texts without labels, streamed from a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from alembert.common.errors import InputError
from alembert.data.reading import open_table, read_lines
from alembert.data.validation import check_text, checked_rows, find_columns


def iterate_texts(
    path: str | Path, *, text_column: str | None = None, text_pair_column: str | None = None
) -> Iterator[str | tuple[str, str]]:
    """Streams the texts, or pairs of texts, of a TSV, CSV, JSON Lines, Parquet or plain text file.

    A ``.txt`` file has a text per line; of the others see `open_table`. Labels and other columns are
    ignored. The file is opened, and its columns found, before this returns; rows are checked as they come.

    Raises:
        InputError: the file cannot be used, or a row has no text; names file, row and field.
    """
    path = Path(path)
    if path.suffix.lower() == ".txt":
        if not path.is_file():
            raise InputError(f"{path}: no such file.")
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty.")
        return (check_text(str(path), row, "text", line) for row, line in read_lines(path))
    table = open_table(path)
    columns = find_columns(table, text_column=text_column, text_pair_column=text_pair_column, labelled=False)
    examples = checked_rows(table, columns, None)
    return (
        example.text if example.text_pair is None else (example.text, example.text_pair)
        for example in examples
    )
