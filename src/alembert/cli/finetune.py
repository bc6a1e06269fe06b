"""`alembert finetune`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from alembert.cli import options as o


def finetune(
    model: Annotated[str, typer.Option(help="Folder or hub id of a pretrained BERT-type encoder.")],
    data: o.DataOption,
    output: o.OutputOption,
    head: Annotated[
        str, typer.Option(help="stock, or an exit head kind: fastbert, pooled, linear, mean.")
    ] = "stock",
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
    report_to: o.ReportToOption = None,
    resume: o.ResumeOption = o.Resume.auto,
    overwrite: o.OverwriteOption = False,
    json_output: o.JsonOption = False,
) -> None:
    """Fine-tunes a pretrained encoder on labelled texts: the teacher of everything else."""
    o.quiet_libraries()
    from alembert.data import load_task
    from alembert.training.finetuning import finetune as run_finetune
    from alembert.training.settings import TrainingSettings, validated

    settings = validated(
        TrainingSettings,
        {"evaluate_every_epoch": True}
        | o.training_settings(
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            max_length=max_length,
            seed=seed,
            training=training,
        ),
        "training setting",
    )
    loaded = load_task(
        data,
        preset=task,
        text_column=text_column,
        text_pair_column=text_pair_column,
        label_column=label_column,
        problem_type=problem_type,
        label_separator=label_separator,
        label_type=label_type,
        seed=settings.seed,
    )
    loaded = o.limit_rows(
        loaded, {"train": max_train_rows, "dev": max_dev_rows, "test": max_test_rows}, settings.seed
    )
    run_finetune(
        model,
        loaded,
        output,
        head=head,
        settings=settings,
        overwrite=overwrite,
        resume=resume is o.Resume.auto,
        report_to=report_to,
    )
    print_run(output, json_output)


def print_run(output: object, json_output: bool) -> None:
    """Prints where a finished run is and what it measured, once however many processes trained it."""
    from pathlib import Path

    from accelerate import PartialState
    from rich.console import Console

    from alembert.common.files import read_json

    if not PartialState().is_main_process:
        return
    metrics = read_json(Path(str(output)) / "metrics.json")
    if json_output:
        typer.echo(json.dumps({"output": str(output), "metrics": metrics}, ensure_ascii=False))
        return
    console = Console(highlight=False)
    console.print(f"[bold]{output}[/] is ready.")
    for name, value in metrics.items():
        console.print(f"  {name}: {json.dumps(value, ensure_ascii=False)}", soft_wrap=True, markup=False)
