"""`alembert compress`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from alembert.cli import options as o
from alembert.common.errors import InputError


def compress(
    model: Annotated[
        str,
        typer.Option(
            help="Folder or hub id of a fine-tuned classifier; a pretrained encoder is fine-tuned first."
        ),
    ],
    data: o.DataOption,
    output: Annotated[Path, typer.Option("--output", help="Folder for everything; interrupted, it goes on.")],
    max_drop: Annotated[
        float, typer.Option("--max-drop", help="The most accuracy that may be lost; 0.01 is one point.")
    ] = 0.01,
    confidence: Annotated[float, typer.Option(help="How sure that must be, such as 0.95.")] = 0.95,
    mode: Annotated[
        str, typer.Option(help="certified, or empirical: the drop seen on dev, guaranteeing nothing.")
    ] = "certified",
    min_speedup: Annotated[
        float | None,
        typer.Option(
            "--min-speedup", help="Texts per second that it must have, in multiples of the teacher's."
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Time for the whole work, such as 40m or 2h; as long as it takes unless given."),
    ] = None,
    config: o.ConfigOption = None,
    task: o.TaskOption = None,
    text_column: o.TextColumnOption = None,
    text_pair_column: o.PairColumnOption = None,
    label_column: o.LabelColumnOption = None,
    problem_type: o.ProblemTypeOption = None,
    label_separator: o.LabelSeparatorOption = None,
    label_type: o.LabelTypeOption = None,
    max_train_rows: o.MaxTrainRowsOption = None,
    max_dev_rows: o.MaxDevRowsOption = None,
    max_test_rows: o.MaxTestRowsOption = None,
    max_length: o.MaxLengthOption = None,
    scale: Annotated[
        float | None, typer.Option(help="Regression: the difference that counts as a whole mistake.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all trainings and samples.")] = 42,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew in an occupied folder.")] = False,
    json_output: o.JsonOption = False,
) -> None:
    """Finds the fastest model that loses at most so much accuracy: trains, exports, calibrates, measures."""
    from alembert.compression.durations import parse_duration

    seconds = None if budget is None else parse_duration(budget)
    o.quiet_libraries()
    from alembert.cli.evaluate import ProgressBars
    from alembert.compression.candidates import without_learned_rows
    from alembert.compression.compress import compress as run_compress

    loaded = _load(
        model,
        data,
        problem_type,
        seed,
        {
            "preset": task,
            "text_column": text_column,
            "text_pair_column": text_pair_column,
            "label_column": label_column,
            "label_separator": label_separator,
            "label_type": label_type,
        },
    )
    # A teacher may have learned the rows of train that are not used here, too.
    loaded = without_learned_rows(loaded)
    loaded = o.limit_rows(loaded, {"train": max_train_rows, "dev": max_dev_rows, "test": max_test_rows}, seed)
    with ProgressBars() as notify:
        summary = run_compress(
            model,
            loaded,
            output,
            max_drop=max_drop,
            confidence=confidence,
            mode=mode,
            min_speedup=min_speedup,
            budget=seconds,
            max_length=max_length,
            scale=scale,
            seed=seed,
            overwrite=overwrite,
            progress=notify,
        )
    if json_output:
        typer.echo(json.dumps(summary, ensure_ascii=False))
    else:
        _print(summary, output)
    if not summary["met"]:
        raise typer.Exit(1)


def _load(model: str, data: str, problem_type: str | None, seed: int, columns: dict[str, Any]) -> Any:
    """The task, with the teacher's labels where the model is one, and a dev split held out where there is none.

    Raises InputError where it is not known which rows a teacher's training held out.
    """
    from alembert.data import load_task
    from alembert.models.loading import classifier_facts, load_any
    from alembert.runtime.hold_out import held_out_alike, read_hold_out

    _, is_classifier = load_any(model)
    hold_out = read_hold_out(model)
    seed = seed if hold_out is None else hold_out.seed
    names = None
    if is_classifier:
        facts = classifier_facts(model)
        names, problem_type = facts.label_names, problem_type or facts.problem_type

    def read(*required: str) -> Any:
        return load_task(
            data,
            problem_type=problem_type,
            label_names=names,
            seed=seed,
            required_splits=required,
            **columns,
        )

    try:
        task = read()
        has_dev = "dev" in task.splits
        task = task if has_dev and "train" in task.splits else read("train")
    except InputError as error:
        if not is_classifier:
            raise
        raise InputError(f"{error} (The labels are those of {model}.)") from error
    if is_classifier and not has_dev and not held_out_alike(task, hold_out):
        raise InputError(
            f"{data}: has no dev split, and which rows {model} has not learned is not known: put rows that were kept "
            "apart from its training into a dev file"
        )
    return task


def _print(summary: dict[str, Any], output: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from alembert.compression.choice import outcome

    console = Console(highlight=False)
    table = Table(title="candidates, int8 on ONNX Runtime")
    for column in ("model", "speed", "metric", "difference", "texts/s", "× teacher", "note"):
        table.add_column(column, justify="left" if column in ("model", "note") else "right")
    for row in summary["candidates"]:
        note = outcome(row, summary["best"]).partition(":")[0]
        if row["ratio"] is None:
            table.add_row(row["name"], "–", "–", f"{-100 * row['risk']:+.1f} on dev", "–", "–", note)
            continue
        table.add_row(
            row["name"],
            f"{row['speed']:g}",
            f"{row['metric']:.4f}",
            f"{100 * row['metric_difference']:+.1f}",
            f"{row['texts_per_second']:,.0f}",
            f"{row['ratio']:.1f}",
            note,
        )
    console.print(table)
    for name, training in summary["trainings"].items():
        if training["reason"] is not None:
            console.print(f"{name} {training['status']}: {training['reason']}", soft_wrap=True)
    console.print(summary["verdict"], style="bold", soft_wrap=True)
    if summary["unsure"] is not None:
        console.print(summary["unsure"], soft_wrap=True)
    if summary["met"]:
        console.print(f"{output}/best: torch and onnx; {output}/summary.json", soft_wrap=True)
    if summary["report"] is not None:
        console.print(f"{output}/{summary['report']}", soft_wrap=True)
