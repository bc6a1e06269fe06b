"""`alembert evaluate`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from alembert.cli import options as o
from alembert.common.errors import InputError

DEFAULT_SPEEDS = "0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9"


def evaluate(
    run: Annotated[str, typer.Argument(help="A run directory, a folder in Hugging Face layout or a hub id.")],
    data: o.DataOption,
    speed: Annotated[
        str | None,
        typer.Option(
            help="Speeds in [0, 1], separated by commas; 0 to 0.9 and the model's own unless given."
        ),
    ] = None,
    policy: o.PolicyOption = None,
    top_k: o.TopKOption = None,
    renormalise: o.RenormaliseOption = None,
    tolerance: o.ToleranceOption = None,
    exits: o.ExitsOption = None,
    split: Annotated[
        str | None, typer.Option(help="train, dev or test; test where there is one, else dev.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder of results; RUN/evaluation unless given.")
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
        o.Precision | None, typer.Option(help="Numbers that the run computes in; fp32 unless given.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=0, help="Timed rounds; 0 leaves time out.")] = 3,
    timing_rows: Annotated[int, typer.Option(min=1, help="Texts in the timed sample.")] = 512,
    seed: Annotated[int, typer.Option(help="Of the rows drawn.")] = 0,
    json_output: o.JsonOption = False,
) -> None:
    """Measures accuracy, MACs and time at every speed; leaves a table, JSON, CSV and plots."""
    from alembert.runtime.manifest import is_exported

    given = None if speed is None else parse_speeds(speed)
    if is_exported(run):
        raise InputError(
            f"{run} is an exported model: measure it with alembert benchmark, and the run that it was exported "
            "from with alembert evaluate"
        )
    o.quiet_libraries()
    from alembert.benchmarks.evaluation import evaluate as run_evaluation

    # What is named leaves a calibration aside, as it does in predictions.
    named = any(value is not None for value in (speed, policy, top_k, renormalise))
    classifier = o.load_adaptive(
        run,
        speed=0.0 if named else None,
        tolerance=tolerance,
        batch_tokens=batch_tokens,
        max_length=max_length,
        exits=exits,
        threads=threads,
        device=device,
        dtype=precision,
    )
    classifier.policy(policy, top_k, renormalise)
    speeds = sorted({*parse_speeds(DEFAULT_SPEEDS), classifier.speed}) if given is None else given
    loaded, split, _ = o.load_evaluation_task(
        data,
        run,
        classifier,
        split,
        preset=task,
        text_column=text_column,
        text_pair_column=text_pair_column,
        label_column=label_column,
        label_separator=label_separator,
        label_type=label_type,
    )
    loaded = o.limit_rows(loaded, {split: max_rows}, seed)
    folder = output or (Path(run) / "evaluation" if Path(run).is_dir() else Path("evaluation"))
    o.check_output_folder(folder)
    with ProgressBars() as notify:
        results = run_evaluation(
            classifier,
            loaded,
            split,
            speeds,
            model_name=_name(run),
            data_name=loaded.name,
            policy=policy,
            top_k=top_k,
            renormalise=renormalise,
            repeats=repeats,
            timing_rows=timing_rows,
            seed=seed,
            progress=notify,
        )
    plots = write_results(results, folder)
    if json_output:
        typer.echo(json.dumps(results, ensure_ascii=False))
        return
    from rich.console import Console

    from alembert.reports.tables import speed_table

    console = Console(highlight=False)
    console.print(speed_table(results))
    console.print(f"{folder}: results.json, results.csv{plots}", soft_wrap=True)


def parse_speeds(text: str) -> list[float]:
    """Comma-separated speeds; InputError names the one that is no number in [0, 1]."""
    from alembert.runtime.policies import check_speed

    speeds = [part.strip() for part in str(text).split(",") if part.strip()]
    if not speeds:
        raise InputError("--speed names no speed: give numbers between 0 and 1, separated by commas")
    return [check_speed(part) for part in speeds]  # type: ignore[arg-type]


def write_results(results: dict[str, Any], folder: Path) -> str:
    """Writes JSON, CSV and, where the `report` extra is installed, plots; returns what was drawn, for a message."""
    import logging

    from alembert.common.files import write_json
    from alembert.reports.plots import plot_exit_shares, plot_speed_curve, plot_speed_curve_html
    from alembert.reports.tables import write_csv

    write_json(folder / "results.json", results)
    write_csv(folder / "results.csv", results)
    try:
        plot_speed_curve([results], folder / "speed_curve.png")
        plot_speed_curve_html([results], folder / "speed_curve.html")
        plot_exit_shares(results, folder / "exit_shares.png")
    except InputError as error:
        logging.getLogger("alembert").warning("No plots: %s", error)
        return ""
    return ", speed_curve.png, speed_curve.html, exit_shares.png"


class ProgressBars:
    """A progress bar for each description that comes along."""

    def __enter__(self) -> Callable[[str, int, int], None]:
        from alembert.common.progress import progress_bar

        self.bar = progress_bar()
        self.bar.start()
        self.tasks: dict[str, Any] = {}
        return self._notify

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def _notify(self, description: str, done: int, total: int) -> None:
        if description not in self.tasks:
            self.tasks[description] = self.bar.add_task(description, total=total)
            if self.bar.disable:
                self.bar.console.print(f"{description} …", highlight=False)
        self.bar.update(self.tasks[description], completed=done)


def _name(run: str) -> str:
    return str(Path(run)) if not Path(run).is_absolute() else Path(run).name
