"""`alembert distill`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alembert.cli import options as o
from alembert.cli.distillation_data import load_distillation_data
from alembert.cli.finetune import print_run


def distill(
    method: Annotated[
        str, typer.Option(help="See `alembert methods`; tinybert+ms-bert gives a student exits.")
    ],
    teacher: Annotated[
        str,
        typer.Option(help="Folder or hub id of a fine-tuned classifier; for a general stage of an encoder."),
    ],
    output: o.OutputOption,
    data: o.OptionalDataOption = None,
    student: o.StudentOption = None,
    stages: o.StagesOption = None,
    corpus: Annotated[
        str | None, typer.Option(help="File or folder of plain text, for general stages.")
    ] = None,
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
    report_to: o.ReportToOption = None,
    resume: o.ResumeOption = o.Resume.auto,
    overwrite: o.OverwriteOption = False,
    json_output: o.JsonOption = False,
) -> None:
    """Distils a fine-tuned classifier into one that is cheaper to run."""
    o.quiet_libraries()
    from alembert.common.errors import InputError
    from alembert.methods.base import resolve
    from alembert.methods.distillation import check_student, general_method
    from alembert.methods.distillation import distill as run_distill
    from alembert.methods.registry import find_method

    options = o.parse_assignments(set_, "--set")
    settings = o.training_settings(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        max_length=max_length,
        seed=seed,
        training=training,
    )
    chosen_stages = None if stages is None else [name.strip() for name in stages.split(",") if name.strip()]
    if "+" not in method:
        check_student(find_method(method), student)
        named = {} if chosen_stages is None else {"stages": tuple(chosen_stages)}
        resolved, _ = resolve(find_method(method), preset, options | named, settings)
        general_method(
            find_method(method)(resolved), has_task=data is not None, has_corpus=corpus is not None
        )
    loaded, rows = None, None
    if data is not None:
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
    else:
        about_rows = {
            "--augmented": augmented,
            "--task": task,
            "--text-column": text_column,
            "--text-pair-column": text_pair_column,
            "--label-column": label_column,
            "--problem-type": problem_type,
            "--label-separator": label_separator,
            "--label-type": label_type,
            "--max-train-rows": max_train_rows,
            "--max-dev-rows": max_dev_rows,
            "--max-test-rows": max_test_rows,
        }
        if unused := [name for name, value in about_rows.items() if value is not None]:
            raise InputError(
                f"{', '.join(unused)}: about the labelled rows of --data, and there are none here; leave it out"
            )
    run_distill(
        method,
        teacher,
        loaded,
        output,
        student=student,
        preset=preset,
        options=options,
        settings=settings,
        stages=chosen_stages,
        augmented=rows,
        corpus=corpus,
        teacher_cache=teacher_cache,
        overwrite=overwrite,
        resume=resume is o.Resume.auto,
        report_to=report_to,
    )
    report_layer_transport(output)
    print_run(output, json_output)


def report_layer_transport(output: Path) -> None:
    """Puts JSON and, where the `report` extra is installed, a picture of BERT-EMD's transport into its run's folder.

    Of methods in turn each run is looked at. The main process does it alone.
    """
    import logging

    from accelerate import PartialState

    from alembert.common.errors import InputError
    from alembert.reports.layer_transport import (
        layer_transport_history,
        plot_layer_transport,
        write_layer_transport,
    )
    from alembert.training.run_directory import STEPS

    if not PartialState().is_main_process:
        return
    for log in sorted([*output.glob("trainer_state.json"), *output.glob(f"{STEPS}/*/trainer_state.json")]):
        if not layer_transport_history(log.parent):
            continue
        write_layer_transport(log.parent, log.parent / "layer_transport.json")
        try:
            plot_layer_transport(log.parent, log.parent / "layer_transport.png")
        except InputError as error:
            logging.getLogger("alembert").warning("No picture of the layers' transport: %s", error)
