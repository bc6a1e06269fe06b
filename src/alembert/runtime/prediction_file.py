"""A file of predictions that grows window by window, and that an interrupted run can go on with."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from alembert.common.errors import InputError
from alembert.common.files import file_sha256, read_json, write_json
from alembert.runtime.calibration_file import model_files_fingerprint

FORMATS = ("jsonl", "csv", "tsv")
COLUMNS = ("label", "score", "exit", "uncertainty", "error")

_TOKENIZER_FILES = (
    *("tokenizer*", "vocab*", "merges*", "*.model", "bpe.codes"),
    *("special_tokens_map.json", "added_tokens.json"),
)

Text = str | tuple[str, str]
Record = dict[str, Any]


class PredictionFile:
    """Collects predictions beside `output` and moves them there when all are written.

    Until then they lie in `output` + ".part". A journal, `output` + ".part.json", says how many rows and bytes of it
    are whole; it is written after them, and atomically. What a killed run wrote behind that is cut off. A lock keeps
    other processes off until `close`, or until this one ends, however it ends. To be used as a context.

    Args:
        output: the file to be; its ending tells the format, one of `FORMATS`.
        job: all that the predictions depend on besides the texts, with defaults filled in; JSON values. An
            interrupted run of another job is not gone on with.
        resume: whether to go on with an interrupted run; else it is thrown away.

    Attributes:
        rows: number of input rows whose predictions are written.
        errors: how many of them were bad.

    Raises InputError when the interrupted run was of another job, another process writes to the same file, or nothing
    can be written there.
    """

    def __init__(self, output: Path, job: dict[str, Any], *, resume: bool) -> None:
        self.output, self.job = output, json.loads(json.dumps(job))
        self.part = output.with_name(f"{output.name}.part")
        self.journal = output.with_name(f"{output.name}.part.json")
        self.form = output_format(output)
        self._digest = hashlib.sha256()
        self.rows, self.errors, self._bytes = 0, 0, 0
        self._texts_digest = ""
        self._lock = FileLock(output.with_name(f".{output.name}.lock"))
        try:
            if output.is_dir():
                raise InputError(f"--output {output}: is a folder: name a file")
            output.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(blocking=False)
        except Timeout:
            raise InputError(
                f"--output {output}: another process is writing to it: wait for its end, or give another file"
            ) from None
        except OSError as error:
            no_folder = isinstance(error, FileExistsError | NotADirectoryError)
            why = f"{output.parent} is no folder" if no_folder else error.strerror
            raise InputError(
                f"--output {output}: nothing can be written there ({why}): name another file"
            ) from error
        try:
            if resume and self.part.exists() and self.journal.exists():
                self._go_on()
            else:
                self._discard()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets other processes write."""
        # Removed while it is held: afterwards it may be another's. Windows removes no open file.
        with suppress(OSError):
            Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()

    def skip(self, rows: Iterator[tuple[int, Text | InputError]]) -> None:
        """Passes over the rows whose predictions are there already; InputError when they are not the same rows."""
        passed = 0
        for _, text in islice(rows, self.rows):
            passed += 1
            self._note(text)
        if passed < self.rows or (self.rows and self._digest.hexdigest() != self._texts_digest):
            raise InputError(
                f"{self.part}: holds {self.rows} predictions of an interrupted run, and the first {self.rows} rows "
                "of the input are no longer those. Give the same input, or start anew with --resume never."
            )

    def append(self, texts: Sequence[Text | InputError], records: Sequence[Record]) -> None:
        """Writes the records of the next texts; they are kept whatever happens afterwards."""
        for text in texts:
            self._note(text)
        # What is wrong with a row may quote a lone surrogate of it.
        content = self._formatted(records).encode(errors="backslashreplace")
        with self.part.open("ab") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self.rows += len(records)
        self.errors += sum(record.get("error") is not None for record in records)
        self._bytes += len(content)
        state = {"rows": self.rows, "errors": self.errors, "bytes": self._bytes}
        write_json(self.journal, state | {"texts": self._digest.hexdigest(), "job": self.job})

    def finish(self) -> None:
        """Moves the predictions to their place."""
        if not self.part.exists():
            self.append([], [])
        self.part.replace(self.output)
        self.journal.unlink(missing_ok=True)

    def _go_on(self) -> None:
        state = read_json(self.journal)
        before = state.get("job", {})
        others = [
            f"{name.replace('_', ' ')} ({_difference(before.get(name), self.job.get(name))})"
            for name in dict.fromkeys([*self.job, *before])
            if before.get(name) != self.job.get(name)
        ]
        if others:
            raise InputError(
                f"{self.part}: holds {state.get('rows')} predictions of an interrupted run with another "
                f"{', '.join(others)}. Go on as it began, or start anew with --resume never."
            )
        if self.part.stat().st_size < state["bytes"]:
            raise InputError(f"{self.part}: was cut short; start anew with --resume never")
        os.truncate(self.part, state["bytes"])
        self.rows, self.errors, self._bytes = state["rows"], state["errors"], state["bytes"]
        self._texts_digest = state["texts"]

    def _discard(self) -> None:
        self.journal.unlink(missing_ok=True)
        self.part.unlink(missing_ok=True)

    def _note(self, text: Text | InputError) -> None:
        content = str(text) if isinstance(text, InputError) else text
        self._digest.update(json.dumps(content, ensure_ascii=True).encode())

    def _formatted(self, records: Sequence[Record]) -> str:
        if self.form == "jsonl":
            return "".join(json_line(record) for record in records)
        rows: list[list[Any]] = [] if self._bytes else [list(COLUMNS)]
        for record in records:
            label = record.get("label")
            cells = ["|".join(label) if isinstance(label, tuple) else label]
            rows.append([*cells, *(record.get(name) for name in COLUMNS[1:])])
        if self.form == "tsv":
            return "".join("\t".join(map(_tsv_cell, row)) + "\n" for row in rows)
        text = io.StringIO(newline="")
        csv.writer(text).writerows(rows)
        return text.getvalue()


def _tsv_cell(value: Any) -> str:
    """A value as a field of TSV, which has no quoting: tabs and line breaks become a space."""
    return "" if value is None else re.sub(r"\r\n|[\t\r\n]", " ", str(value))


def output_format(output: Path) -> str:
    """The format that a file's ending tells; InputError for another one than `FORMATS`."""
    form = output.suffix.lstrip(".").lower()
    if form not in FORMATS:
        raise InputError(f"--output {output}: the name must end in .jsonl, .csv or .tsv")
    return form


def json_line(record: Record) -> str:
    """A record as a line of JSON; raises ValueError for NaN and infinity, which JSON does not know."""
    wanted = {name: record.get(name) for name in COLUMNS}
    return json.dumps(wanted, ensure_ascii=False, allow_nan=False) + "\n"


def model_fingerprint(source: str | Path) -> dict[str, Any]:
    """What changes when the model or the tokenizer in a folder is another one; for a hub id its name alone."""
    folder = Path(source)
    if not folder.is_dir():
        return {"model": str(source)}
    names = sorted({path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()})
    tokenizer = {path.name: file_sha256(path) for path in names}
    model = {
        name: digest for name, digest in model_files_fingerprint(folder).items() if name not in tokenizer
    }
    return {"model": model, "tokenizer": tokenizer}


def _difference(before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        return ", ".join(names)
    return f"{before!r} there, {now!r} now"
