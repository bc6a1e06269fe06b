"""Streams rows out of TSV, CSV, JSON Lines and Parquet files, one record at a time."""

from __future__ import annotations

import csv
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from alembert.common.errors import InputError
from alembert.common.files import file_sha256

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")

_LINES_SEARCHED = 1000
"""Lines of a JSON Lines file that are searched for a sound one, which tells the columns."""

FORMATS = {".tsv": "tsv", ".csv": "csv", ".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}

Row = tuple[int, Sequence[Any]]
"""A row's number, as messages give it, and the values of the columns asked for."""

RowOrError = tuple[int, Sequence[Any] | InputError]
"""The same, or in place of the values what is wrong with the row."""


def sound(rows: Iterable[tuple[int, T | InputError]]) -> Iterator[tuple[int, T]]:
    """The rows of `rows`; raises the InputError of the first bad one."""
    for number, values in rows:
        if isinstance(values, InputError):
            raise values
        yield number, values


def at(source: str, row: int | None = None, field: str | None = None) -> str:
    """The place that a message speaks of, e.g. ``train.tsv, row 7, field 'label'``."""
    place = source if row is None else f"{source}, row {row}"
    return place if field is None else f"{place}, field '{field}'"


@dataclass(frozen=True)
class Table:
    """Columns with names and a way to stream their rows.

    Attributes:
        source: what messages call it: the path, or the hub's id and split.
        columns: the column names, in order.
        content_key: text that changes when the content does.
        attempt: given column names, yields each row's number and those columns' values, or the InputError of a
            row that cannot be read; `read` raises that instead. Both raise the InputError of a quote in a CSV file
            that never closes, for it takes the rows behind it along. Rows are numbered as an editor shows them: the
            lines of a text file from 1, its header included; the rows of a Parquet file from 1.
        has_header: whether the column names are the first line of the file.
        class_names: the labels, in the order of their ids, of columns whose source declares them.
    """

    source: str
    columns: tuple[str, ...]
    content_key: str
    attempt: Callable[[Sequence[str]], Iterator[RowOrError]]
    has_header: bool = False
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def read(self, wanted: Sequence[str]) -> Iterator[Row]:
        """The rows' numbers and values of the columns named; see the class."""
        return sound(self.attempt(wanted))


def open_table(path: str | Path) -> Table:
    """Opens a ``.tsv``, ``.csv``, ``.jsonl`` (or ``.json`` with an object per line) or ``.parquet`` file.

    TSV has no quoting: each line is a row, each tab a border. CSV has standard quoting, with line breaks
    inside quotes. Text is UTF-8; a byte order mark is skipped.

    Raises:
        InputError: the ending is unknown, the file is missing, unreadable or empty, it has a header alone,
            or a column name stands twice in it.
    """
    path = Path(path)
    file_format = FORMATS.get(path.suffix.lower())
    if file_format is None:
        raise InputError(f"{path}: unknown file ending '{path.suffix}'; known are {', '.join(FORMATS)}.")
    if not path.is_file():
        raise InputError(f"{path}: no such file.")
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty.")
        if file_format == "parquet":
            columns, read = _parquet(path)
        else:
            _refuse_utf16(path)
            columns, read = _json_lines(path) if file_format == "jsonl" else _delimited(path, file_format)
        content_key = f"{file_format}-{file_sha256(path)}"
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}.") from error
    for column in columns:
        check_encoding(str(path), 1, None, column)
        if columns.count(column) > 1:
            raise InputError(
                f"{at(str(path), 1, column)}: this column stands twice in the header; rename one."
            )
    return Table(str(path), columns, content_key, read, has_header=file_format in ("tsv", "csv"))


def attempt_lines(path: Path) -> Iterator[tuple[int, str | InputError]]:
    """Yields the number and text of each line without its end; empty lines at the file's end are dropped.

    An empty line before one that is not empty is given as an InputError. Bytes that are not UTF-8 become lone
    surrogates, which `check_encoding` reports with their field.
    """
    empty: list[int] = []
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            text = line.rstrip("\r\n")
            if not text:
                empty.append(number)
                continue
            yield from _empty_lines(str(path), empty)
            yield number, text


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """As `attempt_lines`.

    Raises:
        InputError: an empty line stands before a line that is not empty.
    """
    return sound(attempt_lines(path))


def _empty_lines(source: str, numbers: list[int]) -> Iterator[tuple[int, InputError]]:
    for number in numbers:
        yield number, InputError(f"{at(source, number)}: the line is empty; remove it or fill it.")
    numbers.clear()


def check_encoding(source: str, row: int | None, field: str | None, text: str) -> None:
    """Refuses text that held bytes which are not UTF-8 (they arrive here as lone surrogates)."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        what = (
            f"the byte 0x{code - 0xDC00:02x}"
            if 0xDC80 <= code <= 0xDCFF
            else f"the lone surrogate U+{code:04X}"
        )
        raise InputError(
            f"{at(source, row, field)}: not UTF-8: {what} at character {error.start + 1}. Convert the file, "
            "e.g. `iconv -f LATIN1 -t UTF-8 OLD > NEW` with the encoding that it was written in."
        ) from None


def _refuse_utf16(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise InputError(
                f"{at(str(path), 1)}: the file is UTF-16, not UTF-8. "
                "Convert it: `iconv -f UTF-16 -t UTF-8 OLD > NEW`."
            )


def _delimited(
    path: Path, file_format: str
) -> tuple[tuple[str, ...], Callable[[Sequence[str]], Iterator[RowOrError]]]:
    records = partial(_tsv_records if file_format == "tsv" else _csv_records, path)
    first_two = list(itertools.islice(records(), 2))
    if not first_two:
        raise InputError(f"{path}: the file is empty.")
    columns = tuple(name.strip() for name in next(sound(first_two))[1])
    if len(first_two) == 1:
        raise InputError(f"{path}: there are no rows, only the header {_listed(columns)}.")
    return columns, partial(_delimited_rows, str(path), columns, records)


def _delimited_rows(
    source: str, columns: tuple[str, ...], records: Callable[[], Iterator[RowOrError]], wanted: Sequence[str]
) -> Iterator[RowOrError]:
    positions = [columns.index(name) for name in wanted]
    width = len(columns)
    for number, values in itertools.islice(records(), 1, None):
        if isinstance(values, InputError):
            yield number, values
        elif len(values) != width:
            last = columns[min(len(values), width) - 1]
            breaks = sum(value.count("\n") for value in values)
            yield (
                number,
                InputError(
                    f"{at(source, number, last)}: this row{_reach(number, breaks)} has {len(values)} "
                    f"field{'s'[: len(values) != 1]}, the header {width}: {_listed(columns)}. "
                    f"Look for a {'missing' if len(values) < width else 'surplus'} separator there or before."
                ),
            )
        else:
            yield number, [values[position] for position in positions]


def _tsv_records(path: Path) -> Iterator[RowOrError]:
    for number, line in attempt_lines(path):
        yield number, line if isinstance(line, InputError) else line.split("\t")


def _csv_records(path: Path) -> Iterator[RowOrError]:
    csv.field_size_limit(sys.maxsize)
    empty: list[int] = []
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        while True:
            number = reader.line_num + 1
            try:
                values = next(reader, None)
            except csv.Error as error:
                place, further = at(str(path), number), reader.line_num - number
                if further and "end of data" in str(error):
                    # No bad row to be skipped: all rows behind the quote would be lost with it.
                    raise InputError(
                        f"{place}: not well-formed CSV: a quote that opens in this row never closes and swallows the "
                        f"{further} line{'s'[: further != 1]} to the end of the file. Close or remove it."
                    ) from None
                yield from _empty_lines(str(path), empty)
                yield (
                    number,
                    InputError(
                        f"{place}: not well-formed CSV{_reach(number, further)} ({error}); a field with a quote, "
                        'comma or line break is quoted, and quotes in it are doubled ("").'
                    ),
                )
                continue
            if values is None:
                return
            if not values:
                empty.append(number)
                continue
            yield from _empty_lines(str(path), empty)
            yield number, values


def _json_lines(path: Path) -> tuple[tuple[str, ...], Callable[[Sequence[str]], Iterator[RowOrError]]]:
    fault: InputError | None = None
    for _, value in itertools.islice(_json_objects(path), _LINES_SEARCHED):
        if not isinstance(value, InputError):
            return tuple(value), partial(_json_rows, path)
        fault = fault or value
    raise fault or InputError(f"{path}: the file is empty.")


def _json_objects(path: Path) -> Iterator[tuple[int, dict[str, Any] | InputError]]:
    for number, line in attempt_lines(path):
        yield number, line if isinstance(line, InputError) else _json_object(path, number, line)


def _json_object(path: Path, number: int, line: str) -> dict[str, Any] | InputError:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        advice = (
            " The file looks like one JSON list." if number == 1 and line.lstrip().startswith("[") else ""
        )
        return InputError(
            f"{at(str(path), number)}: not JSON ({error.msg}, character {error.colno}); "
            f"each line must be an object.{advice}"
        )
    except (ValueError, RecursionError) as error:
        what = (
            "lists or objects are nested too deep"
            if isinstance(error, RecursionError)
            else "an integer has too many digits"
        )
        return InputError(f"{at(str(path), number)}: cannot be read ({what}); shorten or remove the row.")
    if not isinstance(value, dict):
        return InputError(
            f"{at(str(path), number)}: a JSON {type(value).__name__}; each line must be an object, "
            'e.g. {"text": "…", "label": "…"}.'
        )
    return value


def _json_rows(path: Path, wanted: Sequence[str]) -> Iterator[RowOrError]:
    for number, record in _json_objects(path):
        if isinstance(record, InputError):
            yield number, record
            continue
        lacking = next((name for name in wanted if name not in record), None)
        if lacking is not None:
            yield (
                number,
                InputError(
                    f"{at(str(path), number, lacking)}: this row lacks the field; it has {_listed(record)}."
                ),
            )
        else:
            yield number, [record[name] for name in wanted]


def _parquet(path: Path) -> tuple[tuple[str, ...], Callable[[Sequence[str]], Iterator[RowOrError]]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise InputError(
            f"{path}: Parquet files need pyarrow: pip install pyarrow, or give a .jsonl, .csv or .tsv file"
        ) from error
    try:
        with pq.ParquetFile(path) as file:
            columns, rows = tuple(file.schema_arrow.names), file.metadata.num_rows
    except pa.ArrowException as error:
        raise InputError(f"{path}: cannot be read as Parquet: {error}") from None
    if rows == 0:
        raise InputError(f"{path}: there are no rows, only the columns {_listed(columns)}.")
    return columns, partial(arrow_rows, partial(_parquet_batches, path))


def _parquet_batches(path: Path, wanted: Sequence[str]) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=4096, columns=list(wanted))
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read as Parquet: {error}") from None


def arrow_rows(
    batches: Callable[[Sequence[str]], Iterable[pa.RecordBatch]], wanted: Sequence[str]
) -> Iterator[Row]:
    """The rows of Arrow record batches, numbered from 1; `batches` starts a pass over the columns named."""
    numbers = itertools.count(1)
    for batch in batches(wanted):
        columns = [batch.column(name).to_pylist() for name in wanted]
        # Not zip(numbers, …), which takes a number too many at the end of each batch.
        for values in zip(*columns, strict=True):
            yield next(numbers), values


def _reach(number: int, further: int) -> str:
    """The lines of a row that has more than one: a stray quote makes one row of many."""
    return f" (lines {number} to {number + further})" if further else ""


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
