"""`alembert calibrate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from alembert.cli import options as o
from alembert.cli.evaluate import ProgressBars, parse_speeds
from alembert.common.errors import InputError


def calibrate(
    run: Annotated[
        str, typer.Argument(help="A run directory, a folder in Hugging Face layout, or an exported folder.")
    ],
    data: o.DataOption,
    max_drop: Annotated[
        float,
        typer.Option("--max-drop", help="The most risk that is allowed; 0.01 is one point of accuracy."),
    ] = 0.01,
    confidence: Annotated[float, typer.Option(help="How sure that must be, such as 0.95.")] = 0.95,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Measure the drop against this model at full depth, such as the teacher, not the model's own."
        ),
    ] = None,
    risk: Annotated[
        str,
        typer.Option(
            help="accuracy-drop (against the full model), disagreement (with the full model) or task-error."
        ),
    ] = "accuracy-drop",
    mode: Annotated[
        str, typer.Option(help="certified, or empirical: the risk seen on the rows, guaranteeing nothing.")
    ] = "certified",
    per_class: Annotated[
        bool, typer.Option("--per-class", help="Every class must keep to the budget, not just the whole.")
    ] = False,
    scale: Annotated[
        float | None, typer.Option(help="Regression: the difference that counts as a whole mistake.")
    ] = None,
    speed: Annotated[
        str | None,
        typer.Option(help="Speeds to test, separated by commas; 109 between 0.001 and 1 unless given."),
    ] = None,
    policy: o.PolicyOption = None,
    top_k: o.TopKOption = None,
    renormalise: o.RenormaliseOption = None,
    tolerance: o.ToleranceOption = None,
    exits: o.ExitsOption = None,
    split: Annotated[
        str | None,
        typer.Option(help="dev or test; dev, held out of train if need be, else test, unless given."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Write the record to this file; RUN/calibration.json unless given."),
    ] = None,
    config: o.ConfigOption = None,
    task: o.TaskOption = None,
    text_column: o.TextColumnOption = None,
    text_pair_column: o.PairColumnOption = None,
    label_column: o.LabelColumnOption = None,
    label_separator: o.LabelSeparatorOption = None,
    label_type: o.LabelTypeOption = None,
    max_rows: Annotated[int | None, typer.Option(min=2, help="Use this many rows, drawn by seed.")] = None,
    batch_tokens: o.BatchTokensOption = None,
    max_length: o.MaxLengthOption = None,
    threads: o.ThreadsOption = None,
    device: o.DeviceOption = None,
    precision: Annotated[
        o.Precision | None,
        typer.Option(help="Numbers that a run computes in; a speed holds for those it was found in."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the rows drawn.")] = 0,
    json_output: o.JsonOption = False,
) -> None:
    """Finds the largest speed that keeps to an accuracy budget, surely so, and stores it in the model."""
    if not Path(run).is_dir() and output is None:
        raise InputError(
            f"{run}: is no folder, so the speed cannot be stored in it; name a file with --output"
        )
    if output is not None and output.is_dir():
        raise InputError(f"--output {output}: is a folder; name a file")
    o.quiet_libraries()
    from alembert.benchmarks.calibration import SPEEDS, store
    from alembert.benchmarks.calibration import calibrate as run_calibration
    from alembert.benchmarks.risk_budget import RiskBudget
    from alembert.runtime.calibration_file import model_files_fingerprint

    speeds = SPEEDS if speed is None else parse_speeds(speed)
    # Naming a speed keeps an earlier calibration's policy and exits out of this one.
    classifier = o.load_adaptive(
        run,
        speed=0.0,
        tolerance=tolerance,
        batch_tokens=batch_tokens,
        max_length=max_length,
        exits=exits,
        threads=threads,
        device=device,
        dtype=precision,
    )
    classifier.policy(policy, top_k, renormalise)
    budget = RiskBudget(risk, max_drop, confidence, mode, per_class, scale)
    budget.check(classifier.facts.problem_type)
    columns = {
        "preset": task,
        "text_column": text_column,
        "text_pair_column": text_pair_column,
        "label_column": label_column,
        "label_separator": label_separator,
        "label_type": label_type,
    }
    loaded, chosen_split = o.load_calibration_task(data, run, classifier, split, **columns)
    loaded = o.limit_rows(loaded, {chosen_split: max_rows}, seed)
    teacher = (
        None
        if reference is None
        else o.load_adaptive(reference, speed=0.0, batch_tokens=batch_tokens, device=device)
    )
    if teacher is not None and teacher.label_names != classifier.label_names:
        raise InputError(
            f"--reference {reference} has the labels {', '.join(teacher.label_names)}, {run} has "
            f"{', '.join(classifier.label_names)}: both must have the same, in the same order"
        )
    try:
        with ProgressBars() as notify:
            results = run_calibration(
                classifier,
                loaded,
                chosen_split,
                budget,
                model_name=str(run) if not Path(run).is_absolute() else Path(run).name,
                data_name=loaded.name,
                reference=teacher,
                reference_name=None if reference is None else Path(reference).name,
                reference_files=None if reference is None else model_files_fingerprint(reference),
                policy=policy,
                top_k=top_k,
                renormalise=renormalise,
                speeds=speeds,
                progress=notify,
            )
    except InputError as error:
        if (before := _in_force(run)) is None:
            raise
        raise InputError(f"{error}. {before}") from error
    written = store(results, run, output)
    if json_output:
        typer.echo(json.dumps(results, ensure_ascii=False))
        return
    from rich.console import Console

    from alembert.reports.calibration import calibration_table, verdict

    console = Console(highlight=False)
    console.print(calibration_table(results))
    console.print(verdict(results))
    console.print(f"Written to {written}", soft_wrap=True)


def _in_force(run: str) -> str | None:
    """What to say of an earlier calibration beside a model, which loading goes on to use; None where it uses none."""
    from alembert.runtime.calibration_file import CALIBRATION_FILE, CalibratedSpeed

    try:
        calibrated = CalibratedSpeed.read(run)
    except InputError:
        return None
    if calibrated is None or not calibrated.fits(run):
        return None
    asked = calibrated.record
    budget = f", found for {asked.get('risk')} within {asked.get('max_drop')}" if "risk" in asked else ""
    return (
        f"{Path(run) / CALIBRATION_FILE} of an earlier calibration stays in force: speed {calibrated.speed:g}{budget}. "
        "Delete the file if the model is not to run at that speed"
    )
