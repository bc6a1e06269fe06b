"""`alembert predict`."""

from __future__ import annotations

import json
import logging
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
    batch_tokens: o.BatchTokensOption = None,
    max_length: o.MaxLengthOption = None,
    threads: o.ThreadsOption = None,
    device: o.DeviceOption = None,
    precision: Annotated[
        o.Precision | None,
        typer.Option(help="Numbers that a run computes in; an exported model's were chosen at export."),
    ] = None,
    on_error: Annotated[
        OnError,
        typer.Option(
            help="fail stops at a bad row; skip writes what is wrong with it in its place and goes on."
        ),
    ] = OnError.fail,
    resume: Annotated[
        o.Resume | None,
        typer.Option(
            help="auto, unless given, goes on where an interrupted run to the same --output stopped; never starts anew."
        ),
    ] = None,
    json_output: o.JsonOption = False,
) -> None:
    """Labels texts, in their order, with the exit that each one took."""
    from alembert.runtime.calibration_file import CALIBRATION_FILE
    from alembert.runtime.manifest import is_exported
    from alembert.runtime.policies import check_speed

    if speed is not None:
        check_speed(speed)
    if (input_file is None) == (not texts):
        raise InputError("give either texts as arguments or a file with --input")
    if output is None and resume is not None:
        raise InputError(f"--resume {resume}: is about a file: name it with --output, or leave it out")
    columns = {"text_column": text_column, "text_pair_column": text_pair_column}
    if input_file is None:
        o.refuse_columns(columns, "texts given as arguments have no columns: name a file with --input")
    elif input_file.suffix.lower() == ".txt":
        o.refuse_columns(columns, f"{input_file} has a text per line and no columns")
    if not is_exported(run):
        o.quiet_libraries()
    from alembert.runtime.prediction_file import PredictionFile, model_fingerprint, output_format

    if output is not None:
        output_format(output)
        if input_file is not None and output.exists() and input_file.exists() and output.samefile(input_file):
            raise InputError(f"--output {output}: is the input, which it would replace: name another file")
    # All of it at loading: a calibration beside the model is used or left aside by what is asked for.
    classifier = o.load_adaptive(
        run,
        speed=speed,
        policy=policy,
        top_k=top_k,
        renormalise=renormalise,
        tolerance=tolerance,
        exits=exits,
        max_length=max_length,
        batch_tokens=batch_tokens,
        threads=threads,
        device=device,
        dtype=precision,
    )
    if tolerance is not None and classifier.settings["tolerance"] is None:
        raise InputError(
            f"--tolerance {tolerance}: is for regression under the policy patience, and this is "
            f"{classifier.facts.problem_type} under {classifier.settings['policy']}; leave it out"
        )
    calibrated = (Path(run) / CALIBRATION_FILE).is_file()
    effective = classifier.settings
    if speed is None and not calibrated and effective["speed"] == 0 and effective["exits"]:
        logging.getLogger("alembert").info(
            "At speed 0 the full model answers all texts: --speed, or a calibration (alembert calibrate), lets easy "
            "ones leave early."
        )
    rows = (
        _arguments(texts or [])
        if input_file is None
        else _file_rows(input_file, text_column, text_pair_column, classifier.is_pair)
    )
    skips = on_error is OnError.skip
    if output is None:
        _print(classifier, rows, skips, texts if not json_output else None)
        return
    # What takes effect, not what was typed: defaults come from files that may change between two runs.
    job = model_fingerprint(run) | classifier.settings | {"columns": [text_column, text_pair_column]}
    with PredictionFile(output, job, resume=resume is not o.Resume.never) as file:
        _write(classifier, rows, skips, file, _count(input_file))
    if json_output:
        typer.echo(json.dumps({"output": str(output), "rows": file.rows, "errors": file.errors}))
    else:
        bad = f", {file.errors} bad rows" if skips else ""
        typer.echo(f"{output}: {file.rows} predictions{bad}", err=True)


def _file_rows(
    path: Path, text_column: str | None, pair_column: str | None, is_pair: bool | None
) -> Iterator[tuple[int, Any]]:
    """As `attempt_texts`, for a model of pairs or of single texts; raises InputError where the file has the other."""
    from alembert.data.reading import at
    from alembert.data.texts import attempt_texts

    if is_pair is False and pair_column is not None:
        raise InputError(
            f"{at(str(path), field=pair_column)}: this model was trained on single texts; leave --text-pair-column out"
        )
    second = o.pair_column(text_column, pair_column, is_pair)
    rows = attempt_texts(path, text_column=text_column, text_pair_column=second)
    return _pairs(rows, path) if is_pair else rows


def _pairs(rows: Iterator[tuple[int, Any]], path: Path) -> Iterator[tuple[int, Any]]:
    for row, text in rows:
        if isinstance(text, str):
            remedy = "name it with --text-pair-column"
            if path.suffix.lower() == ".txt":
                remedy = "give the pairs as a table: TSV, CSV, JSON Lines or Parquet"
            raise InputError(
                f"{path}: this model was trained on pairs of texts, and no column of second texts was found; {remedy}"
            )
        yield row, text


def _arguments(texts: Sequence[str]) -> Iterator[tuple[int, Any]]:
    """As `attempt_texts`, of texts given as arguments, numbered from 1."""
    from alembert.runtime.adaptive import check_text

    for number, text in enumerate(texts, 1):
        try:
            check_text(text, f"text argument {number}")
        except InputError as error:
            yield number, error
        else:
            yield number, text


def _print(
    classifier: Any, rows: Iterator[tuple[int, Any]], skips: bool, shown: Sequence[str] | None
) -> None:
    from alembert.runtime.prediction_file import json_line

    for window, records in _windows(classifier, rows, skips):
        for text, record in zip(window, records, strict=True):
            if not shown:
                line = json_line(record)
            elif record.get("error"):
                line = f"error\t{record['error']}\n"
            else:
                line = f"{record['label']}\t{record['score']:.3f}\texit {record['exit']}\t{text}\n"
            sys.stdout.write(line.encode(errors="backslashreplace").decode())


def _write(
    classifier: Any,
    rows: Iterator[tuple[int, Any]],
    skips: bool,
    file: Any,
    total: int | None,
) -> None:
    from alembert.common.progress import progress_bar

    file.skip(rows)
    if file.errors and not skips:
        raise InputError(
            f"{file.part}: {file.errors} of the {file.rows} rows that an interrupted run has done are bad ones: go on "
            "with --on-error skip, or start anew with --resume never"
        )
    if file.rows:
        typer.echo(f"{file.part}: going on after {file.rows} predictions", err=True)
    try:
        with progress_bar() as bar:
            task = bar.add_task("predicting", total=total, completed=file.rows)
            for window, records in _windows(classifier, rows, skips, file.rows):
                file.append(window, records)
                bar.update(task, completed=file.rows)
    except InputError as error:
        if not file.rows:
            raise
        past = ", or go on past bad rows with --on-error skip" if isinstance(error, _BadRowError) else ""
        raise InputError(
            f"{error} The {file.rows} predictions before are kept: mend what is wrong and run the same command "
            f"again{past}."
        ) from error
    file.finish()


class _BadRowError(InputError):
    """A row that could be skipped."""


def _windows(
    classifier: Any, rows: Iterator[tuple[int, Any]], skips: bool, start: int = 0
) -> Iterator[tuple[list[Any], list[dict[str, Any]]]]:
    """Windows of texts and their records, in order; a bad row raises its InputError, or has a record that tells it.

    `start` is the number of rows before the first one.
    """
    from alembert.runtime.batching import windows

    for window in windows((text for _, text in rows), classifier.window):
        bad = next((text for text in window if isinstance(text, InputError)), None)
        if bad is not None and not skips:
            raise _BadRowError(str(bad))
        good = [text for text in window if not isinstance(text, InputError)]
        predictions = classifier.stream(good, start=start)
        records: list[dict[str, Any]] = []
        for text in window:
            records.append({"error": str(text)} if isinstance(text, InputError) else vars(next(predictions)))
        start += len(window)
        yield window, records


def _count(path: Path | None) -> int | None:
    """The number of rows, where it takes no parsing to know it; for the progress bar."""
    if path is None or path.suffix.lower() not in (".txt", ".tsv", ".jsonl", ".json"):
        return None
    count, last = 0, b"\n"
    with suppress(OSError), path.open("rb") as file:
        while block := file.read(1 << 20):
            count += block.count(b"\n")
            last = block[-1:]
    return count + (last != b"\n") - (path.suffix.lower() == ".tsv")
