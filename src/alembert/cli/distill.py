"""`alembert distill`."""

from __future__ import annotations

from typing import Annotated

import typer

from alembert.cli import options as o
from alembert.cli.finetune import print_run


def distill(
    method: Annotated[str, typer.Option(help="fastbert or ms-bert; see `alembert methods`.")],
    teacher: Annotated[str, typer.Option(help="Folder or hub id of a fine-tuned classifier.")],
    data: o.DataOption,
    output: o.OutputOption,
    preset: Annotated[str, typer.Option(help="default, paper or code.")] = "default",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="An option of the method; repeatable."),
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
    """Distils a fine-tuned classifier into one that is cheaper to run."""
    o.quiet_libraries()
    from alembert.data import load_task
    from alembert.methods.base import resolve
    from alembert.methods.distillation import distill as run_distill
    from alembert.methods.registry import find_method
    from alembert.models.loading import classifier_facts

    options = o.parse_assignments(set_, "--set")
    settings = o.training_settings(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        max_length=max_length,
        seed=seed,
        training=training,
    )
    _, resolved = resolve(find_method(method), preset, options, settings)
    facts = classifier_facts(teacher)
    loaded = load_task(
        data,
        preset=task,
        text_column=text_column,
        text_pair_column=text_pair_column,
        label_column=label_column,
        problem_type=problem_type or facts.problem_type,
        label_names=facts.label_names,
        label_separator=label_separator,
        label_type=label_type,
        seed=resolved.seed,
    )
    loaded = o.limit_rows(
        loaded, {"train": max_train_rows, "dev": max_dev_rows, "test": max_test_rows}, resolved.seed
    )
    run_distill(
        method,
        teacher,
        loaded,
        output,
        preset=preset,
        options=options,
        settings=settings,
        overwrite=overwrite,
        resume=resume is o.Resume.auto,
        report_to=report_to,
    )
    print_run(output, json_output)
