"""`alembert predict`."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Annotated, Any

import typer

from alembert.cli import options as o
from alembert.common.errors import InputError


def predict(
    run: Annotated[str, typer.Argument(help="A run directory, a folder in Hugging Face layout or a hub id.")],
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
    json_output: o.JsonOption = False,
) -> None:
    """Labels texts, in their order, with the exit that each one took."""
    from alembert.runtime.policies import check_speed

    if speed is not None:
        check_speed(speed)
    if (input_file is None) == (not texts):
        raise InputError("give either texts as arguments or a file with --input")
    o.quiet_libraries()
    from alembert.data import iterate_texts

    stream: Iterable[Any] = texts or []
    if input_file is not None:
        stream = iterate_texts(input_file, text_column=text_column, text_pair_column=text_pair_column)
    form = _form(output)
    classifier = o.load_adaptive(
        run, tolerance=tolerance, batch_tokens=batch_tokens, max_length=max_length, exits=exits
    )
    predictions = classifier.stream(stream, speed=speed, policy=policy, top_k=top_k, renormalise=renormalise)
    if texts and output is None and not json_output:
        for text, prediction in zip(texts, predictions, strict=True):
            typer.echo(f"{prediction.label}\t{prediction.score:.3f}\texit {prediction.exit}\t{text}")
        return
    with _destination(output) as file:
        count = _write((asdict(prediction) for prediction in predictions), file, form)
    if output is not None and json_output:
        typer.echo(json.dumps({"output": str(output), "rows": count}))
    elif output is not None:
        typer.echo(f"{output}: {count} predictions", err=True)


def _write(rows: Iterator[dict[str, Any]], file: IO[str], form: str) -> int:
    from alembert.common.progress import progress_bar

    writer = csv.writer(file, delimiter="\t" if form == "tsv" else ",")
    count = 0
    with progress_bar() as bar:
        for count, row in enumerate(bar.track(rows, description="predicting", total=None), 1):
            if form == "jsonl":
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                continue
            if count == 1:
                writer.writerow(row)
            label = row["label"]
            writer.writerow(
                [("|".join(label) if isinstance(label, tuple) else label), *list(row.values())[1:]]
            )
    return count


def _form(output: Path | None) -> str:
    suffix = "jsonl" if output is None else output.suffix.lstrip(".").lower()
    if suffix not in ("jsonl", "csv", "tsv"):
        raise InputError(f"--output {output}: the name must end in .jsonl, .csv or .tsv")
    return suffix


@contextmanager
def _destination(output: Path | None) -> Iterator[IO[str]]:
    """Standard output, or a file that appears whole when everything is written."""
    if output is None:
        yield sys.stdout
        return
    from alembert.common.files import replacing

    with replacing(output) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        yield file
