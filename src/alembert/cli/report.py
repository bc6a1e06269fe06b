"""`alembert report`."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import typer

from alembert.cli import options as o
from alembert.common.errors import InputError


def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Run directories, folders in Hugging Face layout or exported folders; the first is the baseline.",
        ),
    ],
    data: o.DataOption,
    split: Annotated[
        str | None, typer.Option(help="train, dev or test; test where there is one, else dev.")
    ] = None,
    benchmark: Annotated[
        Path | None,
        typer.Option(help="benchmark.json of the same models on the same rows; measured now unless given."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", help="Folder of the report.")] = Path("report"),
    machine_price_per_hour: Annotated[
        float, typer.Option(min=0, help="What the machine costs per hour, in any currency.")
    ] = 0.10,
    examples: Annotated[int, typer.Option(min=0, help="Texts of each kind that are shown.")] = 6,
    title: Annotated[str | None, typer.Option(help="Of the page; data set and split unless given.")] = None,
    config: o.ConfigOption = None,
    task: o.TaskOption = None,
    text_column: o.TextColumnOption = None,
    text_pair_column: o.PairColumnOption = None,
    label_column: o.LabelColumnOption = None,
    label_separator: o.LabelSeparatorOption = None,
    label_type: o.LabelTypeOption = None,
    max_rows: Annotated[int | None, typer.Option(min=2, help="Use this many rows, drawn by seed.")] = None,
    batch_tokens: o.BatchTokensOption = None,
    peers: Annotated[
        str | None,
        typer.Option(help="What the first model is also timed as, as in alembert benchmark; none for none."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 5,
    timing_rows: Annotated[int, typer.Option(min=1, help="Texts of a timed round.")] = 512,
    latency_rows: Annotated[
        int, typer.Option(min=0, help="Texts of a round that are also run one by one; 0 leaves latency out.")
    ] = 64,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of each library.")] = None,
    one_process: Annotated[
        bool, typer.Option("--one-process", help="Time all in one process; memory is not measured.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the rows drawn.")] = 0,
    json_output: o.JsonOption = False,
) -> None:
    """Makes one page of what models cost and lose: verdict, speed slider, exits, examples, provenance."""
    from alembert.common.files import read_json, write_json
    from alembert.reports.report_files import check_report_extra, write_report

    check_report_extra()
    if benchmark is not None and not benchmark.is_file():
        raise InputError(f"--benchmark {benchmark}: there is no such file")
    if output.suffix in (".html", ".htm"):
        raise InputError(
            f"--output {output}: is a page's name; name the folder for the page, Markdown and pictures"
        )
    o.check_output_folder(output)
    measured = None if benchmark is None else read_json(benchmark)
    if measured is not None and not isinstance(measured, dict):
        raise InputError(f"--benchmark {benchmark}: is not what alembert benchmark writes")
    o.quiet_libraries()
    from alembert.benchmarks.comparison_engines import check_models
    from alembert.benchmarks.comparison_settings import BenchmarkSettings
    from alembert.benchmarks.report_data import collect_report
    from alembert.cli.benchmark import available_peers
    from alembert.cli.evaluate import ProgressBars

    settings = None
    if measured is None:
        settings = BenchmarkSettings(
            peers=available_peers(peers),
            repeats=repeats,
            timing_rows=timing_rows,
            latency_rows=latency_rows,
            threads=threads,
            own_processes=not one_process,
            seed=seed,
        )
    facts = check_models(runs)[0]
    loaded, chosen_split, doubts = o.load_evaluation_task(
        data,
        runs[0],
        SimpleNamespace(facts=facts),
        split,
        others=runs[1:],
        preset=task,
        text_column=text_column,
        text_pair_column=text_pair_column,
        label_column=label_column,
        label_separator=label_separator,
        label_type=label_type,
    )
    whole, loaded = loaded, o.limit_rows(loaded, {chosen_split: max_rows}, seed)
    drawn = loaded.dataset(chosen_split).num_rows < whole.dataset(chosen_split).num_rows
    with ProgressBars() as notify:
        collected = collect_report(
            runs,
            loaded,
            chosen_split,
            benchmark=measured,
            settings=settings,
            price_per_hour=machine_price_per_hour,
            examples=examples,
            batch_tokens=batch_tokens,
            title=title,
            drawn_from=whole if drawn else None,
            doubts=doubts,
            measured=partial(write_json, output / "benchmark.json"),
            progress=notify,
        )
    written = [*write_report(collected, output), *(["benchmark.json"] if measured is None else [])]
    if json_output:
        typer.echo(json.dumps(collected, ensure_ascii=False))
        return
    from rich.console import Console

    from alembert.reports.page import wording

    console = Console(highlight=False, markup=False)
    console.print(f"{wording.headline(collected)}.")
    console.print(wording.guarantee_sentence(collected))
    console.print(f"{output}: {', '.join(written)}", soft_wrap=True)
