"""A file of predictions that grows window by window, and that an interrupted run can go on with."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from alembert.common.errors import InputError
from alembert.common.files import file_sha256, read_json, write_json

FORMATS = ("jsonl", "csv", "tsv")
COLUMNS = ("label", "score", "exit", "uncertainty")

Text = str | tuple[str, str]
Record = dict[str, Any]


class PredictionFile:
    """Collects predictions beside `output` and moves them there when all are written.

    Until then they lie in `output` + ".part". A journal, `output` + ".part.json", says how many rows and bytes of it
    are whole; it is written after them, and atomically. What a killed run wrote behind that is cut off.

    Args:
        output: the file to be; its ending tells the format, one of `FORMATS`.
        job: what the predictions depend on, JSON values; an interrupted run of another job is not gone on with.
        with_errors: whether records have an "error".
        resume: whether to go on with an interrupted run; else it is thrown away.

    Attributes:
        rows: number of input rows whose predictions are written.
        errors: how many of them were bad.

    Raises InputError when the interrupted run was of another job.
    """

    def __init__(self, output: Path, job: dict[str, Any], *, with_errors: bool, resume: bool) -> None:
        self.output, self.job = output, json.loads(json.dumps(job))
        self.part = output.with_name(f"{output.name}.part")
        self.journal = output.with_name(f"{output.name}.part.json")
        self.form = output_format(output)
        self._columns = (*COLUMNS, "error") if with_errors else COLUMNS
        self._digest = hashlib.sha256()
        self.rows, self.errors, self._bytes = 0, 0, 0
        self._texts_digest = ""
        if resume and self.part.exists() and self.journal.exists():
            self._go_on()
        else:
            self._discard()

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
        self.part.parent.mkdir(parents=True, exist_ok=True)
        content = self._formatted(records).encode()
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
        other = [name for name in self.job if state.get("job", {}).get(name) != self.job[name]]
        if other:
            was, now = state.get("job", {}).get(other[0]), self.job[other[0]]
            raise InputError(
                f"{self.part}: holds {state.get('rows')} predictions of an interrupted run with another "
                f"{other[0].replace('_', ' ')} ({was!r} there, {now!r} now). Go on as it began, or start anew with "
                "--resume never."
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
            return "".join(json_line(record, self._columns) for record in records)
        text = io.StringIO(newline="")
        writer = csv.writer(text, delimiter="\t" if self.form == "tsv" else ",")
        if not self._bytes:
            writer.writerow(self._columns)
        for record in records:
            label = record["label"]
            cells = ["|".join(label) if isinstance(label, tuple) else label]
            writer.writerow([*cells, *(record.get(name) for name in self._columns[1:])])
        return text.getvalue()


def output_format(output: Path) -> str:
    """The format that a file's ending tells; InputError for another one than `FORMATS`."""
    form = output.suffix.lstrip(".").lower()
    if form not in FORMATS:
        raise InputError(f"--output {output}: the name must end in .jsonl, .csv or .tsv")
    return form


def json_line(record: Record, columns: Sequence[str] = COLUMNS) -> str:
    """A record as a line of JSON."""
    return json.dumps({name: record.get(name) for name in columns}, ensure_ascii=False) + "\n"


def model_fingerprint(source: str | Path) -> dict[str, Any]:
    """What changes when the model in a folder is another one; for a hub id its name alone."""
    folder = Path(source)
    if not folder.is_dir():
        return {"model": str(source)}
    described = [path for name in ("manifest.json", "config.json") if (path := folder / name).is_file()]
    weights = sorted(folder.glob("*.safetensors"))
    return {
        "model": [file_sha256(path) for path in described]
        + [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in weights]
    }
