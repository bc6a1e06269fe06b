"""`alembert ablate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from alembert.cli import options as o
from alembert.cli.distillation_data import load_distillation_data
from alembert.common.errors import InputError


def ablate(
    method: Annotated[str, typer.Option(help="tinybert, lrc-bert, bert-emd or ms-bert.")],
    teacher: Annotated[str, typer.Option(help="Folder or hub id of a fine-tuned classifier.")],
    data: o.DataOption,
    output: Annotated[Path, typer.Option("--output", help="Folder of the table and of its runs.")],
    seeds: Annotated[str, typer.Option(help="Seeds of the runs, separated by commas.")] = "42",
    rows: Annotated[
        str | None,
        typer.Option(help="Some of the rows, separated by commas; the full method goes with them."),
    ] = None,
    speed: Annotated[
        float, typer.Option(min=0, max=1, help="Speed at which models with exits are judged.")
    ] = 0.5,
    student: o.StudentOption = None,
    augmented: o.AugmentedOption = None,
    teacher_cache: o.TeacherCacheOption = None,
    preset: o.PresetOption = "default",
    set_: o.MethodSetOption = None,
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
    epochs: o.EpochsOption = None,
    batch_size: o.BatchSizeOption = None,
    learning_rate: o.LearningRateOption = None,
    max_length: o.MaxLengthOption = None,
    training: o.SettingOption = None,
    json_output: o.JsonOption = False,
) -> None:
    """Runs a paper's ablation table over several seeds, beside the paper's own figures."""
    o.quiet_libraries()
    import logging

    from alembert.compression.ablation import ablate as run_ablate
    from alembert.methods.ablations import find_ablations

    table = find_ablations(method)
    names = None if rows is None else [name.strip() for name in rows.split(",") if name.strip()]
    for name in names or ():
        table.row(name)
    options = o.parse_assignments(set_, "--set")
    settings = o.training_settings(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        max_length=max_length,
        training=training,
    )
    loaded, augmented_rows = load_distillation_data(
        data,
        teacher,
        augmented,
        settings,
        {"train": max_train_rows, "dev": max_dev_rows, "test": max_test_rows},
        problem_type=problem_type,
        preset=task,
        text_column=text_column,
        text_pair_column=text_pair_column,
        label_column=label_column,
        label_separator=label_separator,
        label_type=label_type,
    )
    results = run_ablate(
        method,
        teacher,
        loaded,
        output,
        seeds=parse_seeds(seeds),
        rows=names,
        speed=speed,
        student=student,
        preset=preset,
        options=options,
        settings=settings,
        augmented=augmented_rows,
        teacher_cache=teacher_cache,
    )
    from alembert.reports.ablation import ablation_table, messages, plot_ablation

    try:
        plot_ablation(results, output / "ablation.png")
        plots = ", ablation.png"
    except InputError as error:
        logging.getLogger("alembert").warning("No plot: %s", error)
        plots = ""
    if json_output:
        typer.echo(json.dumps(results, ensure_ascii=False))
        return
    from rich.console import Console

    console, shown = Console(highlight=False), ablation_table(results)
    # Figures cut short are of no use, so a narrow terminal gets longer lines.
    needed = Console(width=1000).measure(shown).maximum
    Console(highlight=False, width=max(console.width, needed)).print(shown)
    for message in messages(results):
        console.print(message, markup=False)
    console.print(f"{output}: ablation.json{plots}", soft_wrap=True)


def parse_seeds(text: str) -> list[int]:
    """Comma-separated seeds; InputError names the one that is no whole number."""
    seeds = [part.strip() for part in str(text).split(",") if part.strip()]
    wrong = [part for part in seeds if not part.isdecimal()]
    if wrong or not seeds:
        raise InputError(f"--seeds {text!r}: give whole numbers separated by commas")
    return [int(part) for part in seeds]
