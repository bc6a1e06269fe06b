"""`alembert search`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from alembert.cli import options as o
from alembert.cli.distillation_data import load_distillation_data
from alembert.common.errors import InputError


def search(
    method: Annotated[str, typer.Option(help="See `alembert methods`.")],
    teacher: Annotated[str, typer.Option(help="Folder or hub id of a fine-tuned classifier.")],
    data: o.DataOption,
    output: Annotated[Path, typer.Option("--output", help="Folder of the search and of its trials' runs.")],
    trials: Annotated[int, typer.Option(min=1, help="Trials in all; an interrupted search goes on.")],
    timeout: Annotated[
        float | None, typer.Option(min=0, help="Seconds after which no further trial begins.")
    ] = None,
    space: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUES",
            help="What to vary: 1e-5..5e-4:log, 1..10 or 4x312|6x384; the method's default space unless given.",
        ),
    ] = None,
    sampler: Annotated[str, typer.Option(help="tpe or nsga2.")] = "tpe",
    speed: Annotated[
        float, typer.Option(min=0, max=1, help="Speed at which models with exits are judged.")
    ] = 0.5,
    student: o.StudentOption = None,
    stages: o.StagesOption = None,
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
    seed: o.SeedOption = None,
    training: o.SettingOption = None,
    json_output: o.JsonOption = False,
) -> None:
    """Searches for the options with the best metric on dev for the fewest MACs; leaves the Pareto front."""
    o.quiet_libraries()
    from alembert.compression.search import required_optuna
    from alembert.compression.search import search as run_search
    from alembert.methods.distillation import check_teacher_cache
    from alembert.methods.registry import find_method

    required_optuna()
    if "+" not in method:
        check_teacher_cache(find_method(method), teacher_cache)
    options = o.parse_assignments(set_, "--set")
    settings = o.training_settings(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        max_length=max_length,
        seed=seed,
        training=training,
    )
    loaded, rows = load_distillation_data(
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
    results = run_search(
        method,
        teacher,
        loaded,
        output,
        trials=trials,
        timeout=timeout,
        space=space or (),
        sampler=sampler,  # type: ignore[arg-type]
        speed=speed,
        student=student,
        preset=preset,
        options=options,
        settings=settings,
        stages=None if stages is None else [name.strip() for name in stages.split(",") if name.strip()],
        augmented=rows,
        teacher_cache=teacher_cache,
    )
    plots = write_plots(results, output)
    if json_output:
        typer.echo(json.dumps(results, ensure_ascii=False))
        return
    from rich.console import Console

    from alembert.reports.pareto import pareto_table

    console = Console(highlight=False)
    console.print(pareto_table(results))
    console.print(f"{output}: search.json{plots}", soft_wrap=True)


def write_plots(results: dict[str, Any], folder: Path) -> str:
    """Draws the Pareto front where the `report` extra is installed; returns what was drawn, for a message."""
    import logging

    from alembert.reports.pareto import plot_pareto, plot_pareto_html

    try:
        plot_pareto(results, folder / "pareto.png")
        plot_pareto_html(results, folder / "pareto.html")
    except InputError as error:
        logging.getLogger("alembert").warning("No plots: %s", error)
        return ""
    return ", pareto.png, pareto.html"
