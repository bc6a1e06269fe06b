"""`alembert predict`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from alembert.cli import options as o
from alembert.common.errors import InputError


class OnError(StrEnum):
    """What to do at a row that cannot be read."""

    fail = "fail"
    skip = "skip"


def predict(
    run: Annotated[
        str,
        typer.Argument(
            help="An exported folder, a run directory, a folder in Hugging Face layout or a hub id."
        ),
    ],
    texts: Annotated[list[str] | None, typer.Argument(help="Texts to classify, instead of --input.")] = None,
    input_file: Annotated[
        Path | None,
        typer.Option("--input", help="TSV, CSV, JSONL or Parquet file, or .txt with a text per line."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="JSONL, CSV or TSV file; standard output unless given.")
    ] = None,
    speed: Annotated[float | None, typer.Option(help="0 = the full model … 1 = the first exit.")] = None,
    policy: o.PolicyOption = None,
    top_k: o.TopKOption = None,
    renormalise: o.RenormaliseOption = None,
    tolerance: o.ToleranceOption = None,
    exits: o.ExitsOption = None,
    config: o.ConfigOption = None,
    text_column: o.TextColumnOption = None,
    text_pair_column: o.PairColumnOption = None,
    batch_tokens: o.BatchTokensOption = 4096,
    max_length: o.MaxLengthOption = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the processor.")] = None,
    on_error: Annotated[
        OnError,
        typer.Option(
            help="fail stops at a bad row; skip writes what is wrong with it in its place and goes on."
        ),
    ] = OnError.fail,
    resume: Annotated[
        o.Resume,
        typer.Option(
            help="auto goes on where an interrupted run to the same --output stopped; never starts anew."
        ),
    ] = o.Resume.auto,
    json_output: o.JsonOption = False,
) -> None:
    """Labels texts, in their order, with the exit that each one took."""
    from alembert.runtime.manifest import is_exported
    from alembert.runtime.policies import check_speed

    if speed is not None:
        check_speed(speed)
    if (input_file is None) == (not texts):
        raise InputError("give either texts as arguments or a file with --input")
    if not is_exported(run):
        o.quiet_libraries()
    from alembert.runtime.prediction_file import PredictionFile, model_fingerprint, output_format

    if output is not None:
        output_format(output)
    rows = _rows(texts, input_file, text_column, text_pair_column)
    opening = {"tolerance": tolerance, "max_length": max_length, "exits": exits}
    classifier = o.load_adaptive(run, batch_tokens=batch_tokens, threads=threads, **opening)
    how = {"speed": speed, "policy": policy, "top_k": top_k, "renormalise": renormalise}
    skips = on_error is OnError.skip
    if output is None:
        _print(classifier, rows, how, skips, texts if not json_output else None)
        return
    job = opening | how | {"on_error": str(on_error), "columns": [text_column, text_pair_column]}
    file = PredictionFile(
        output, model_fingerprint(run) | job, with_errors=skips, resume=resume is o.Resume.auto
    )
    _write(classifier, rows, how, skips, file, _count(input_file))
    if json_output:
        summary = {"output": str(output), "rows": file.rows} | ({"errors": file.errors} if skips else {})
        typer.echo(json.dumps(summary))
    else:
        bad = f", {file.errors} bad rows" if skips else ""
        typer.echo(f"{output}: {file.rows} predictions{bad}", err=True)


def _rows(
    texts: Sequence[str] | None, input_file: Path | None, text_column: str | None, pair_column: str | None
) -> Iterator[tuple[int, Any]]:
    from alembert.data.texts import attempt_texts

    if input_file is None:
        return iter(enumerate(texts or []))
    return attempt_texts(input_file, text_column=text_column, text_pair_column=pair_column)


def _print(
    classifier: Any,
    rows: Iterator[tuple[int, Any]],
    how: dict[str, Any],
    skips: bool,
    shown: Sequence[str] | None,
) -> None:
    from alembert.runtime.prediction_file import COLUMNS, json_line

    columns = (*COLUMNS, "error") if skips else COLUMNS
    for window, records in _windows(classifier, rows, how, skips):
        for text, record in zip(window, records, strict=True):
            if shown:
                typer.echo(f"{record['label']}\t{record['score']:.3f}\texit {record['exit']}\t{text}")
            else:
                sys.stdout.write(json_line(record, columns))


def _write(
    classifier: Any,
    rows: Iterator[tuple[int, Any]],
    how: dict[str, Any],
    skips: bool,
    file: Any,
    total: int | None,
) -> None:
    from alembert.common.progress import progress_bar

    file.skip(rows)
    if file.rows:
        typer.echo(f"{file.part}: going on after {file.rows} predictions", err=True)
    try:
        with progress_bar() as bar:
            task = bar.add_task("predicting", total=total, completed=file.rows)
            for window, records in _windows(classifier, rows, how, skips):
                file.append(window, records)
                bar.update(task, completed=file.rows)
    except InputError as error:
        if not file.rows:
            raise
        raise InputError(
            f"{error} The {file.rows} predictions before are kept: mend what is wrong and run the same command "
            "again, or add --on-error skip and --resume never."
        ) from error
    file.finish()


def _windows(
    classifier: Any, rows: Iterator[tuple[int, Any]], how: dict[str, Any], skips: bool
) -> Iterator[tuple[list[Any], list[dict[str, Any]]]]:
    """Windows of texts and their records, in order; a bad row raises its InputError, or has a record that tells it."""
    from alembert.runtime.batching import windows

    for window in windows((text for _, text in rows), classifier.window):
        bad = next((text for text in window if isinstance(text, InputError)), None)
        if bad is not None and not skips:
            raise bad
        predictions = classifier.stream((text for text in window if not isinstance(text, InputError)), **how)
        records = []
        for text in window:
            if isinstance(text, InputError):
                records.append(
                    dict.fromkeys(("label", "score", "exit", "uncertainty")) | {"error": str(text)}
                )
            else:
                records.append(vars(next(predictions)))
        yield window, records


def _count(path: Path | None) -> int | None:
    """The number of rows, where it takes no parsing to know it; for the progress bar."""
    if path is None or path.suffix.lower() not in (".txt", ".tsv", ".jsonl", ".json"):
        return None
    count = 0
    with suppress(OSError), path.open("rb") as file:
        while block := file.read(1 << 20):
            count += block.count(b"\n")
    return count - (path.suffix.lower() == ".tsv")
