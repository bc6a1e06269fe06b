"""`alembert benchmark`."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import typer

from alembert.cli import options as o
from alembert.common.errors import InputError, install_extra


def benchmark(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Run directories, folders in Hugging Face layout or exported folders; the first is the baseline.",
        ),
    ],
    data: o.DataOption,
    speed: Annotated[
        str | None,
        typer.Option(help="Speeds in [0, 1], separated by commas; each model's own, else 0, 0.1 … 0.9."),
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(
            help="What the first model is also run as, separated by commas: transformers-bf16, onnx-int8, "
            "onnx-int8-sorted; none for none. All that is installed unless given."
        ),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=COMMAND",
            help="A program of others: reads texts, one per line, from {input}, writes labels to {output}.",
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="train, dev or test; test where there is one, else dev.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", help="Folder of results.")] = Path("benchmark"),
    config: o.ConfigOption = None,
    task: o.TaskOption = None,
    text_column: o.TextColumnOption = None,
    text_pair_column: o.PairColumnOption = None,
    label_column: o.LabelColumnOption = None,
    label_separator: o.LabelSeparatorOption = None,
    label_type: o.LabelTypeOption = None,
    max_rows: Annotated[int | None, typer.Option(min=2, help="Use this many rows, drawn by seed.")] = None,
    policy: o.PolicyOption = None,
    top_k: o.TopKOption = None,
    renormalise: o.RenormaliseOption = None,
    tolerance: o.ToleranceOption = None,
    exits: o.ExitsOption = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Texts of a batch; Alembert's own batches hold as many on average.")
    ] = 32,
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Rows × longest row of Alembert's own batches instead.")
    ] = None,
    max_length: o.MaxLengthOption = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 5,
    timing_rows: Annotated[int, typer.Option(min=1, help="Texts of a timed round.")] = 512,
    latency_rows: Annotated[
        int, typer.Option(min=0, help="Texts of a round that are also run one by one; 0 leaves latency out.")
    ] = 64,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of each library.")] = None,
    device: Annotated[str, typer.Option(help="Of torch: cpu, cuda …")] = "cpu",
    torch_precision: Annotated[
        str, typer.Option(help="Of the given models on torch: fp32, bf16 or fp32,bf16.")
    ] = "fp32",
    one_process: Annotated[
        bool, typer.Option("--one-process", help="Load all into one process; memory is not measured.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the rows drawn.")] = 0,
    json_output: o.JsonOption = False,
) -> None:
    """Measures models beside what people use: accuracy, texts per second, latency, memory, in turn."""
    from alembert.benchmarks.outside import OutsideProgram
    from alembert.cli.evaluate import ProgressBars, parse_speeds

    speeds = None if speed is None else tuple(parse_speeds(speed))
    programs = [OutsideProgram.parse(given) for given in against or []]
    if len({program.name for program in programs}) < len(programs):
        raise InputError("--against: two programs have the same name")
    o.quiet_libraries()
    from alembert.benchmarks.comparison import benchmark as run_benchmark
    from alembert.benchmarks.comparison_engines import check_models
    from alembert.benchmarks.comparison_settings import BenchmarkSettings

    settings = BenchmarkSettings(
        peers=available_peers(peers),
        speeds=speeds,
        batch_size=batch_size,
        batch_tokens=batch_tokens,
        repeats=repeats,
        timing_rows=timing_rows,
        latency_rows=latency_rows,
        threads=threads,
        device=device,
        torch_precisions=tuple(_parts(torch_precision)),
        exits=None if exits is None else tuple(o.parse_layers(exits)),
        policy=policy,
        top_k=top_k,
        renormalise=renormalise,
        tolerance=tolerance,
        max_length=max_length,
        own_processes=not one_process,
        seed=seed,
    )
    o.check_output_folder(output)
    facts = check_models(models)[0]
    loaded, split, _ = o.load_evaluation_task(
        data,
        models[0],
        SimpleNamespace(facts=facts),
        split,
        others=models[1:],
        preset=task,
        text_column=text_column,
        text_pair_column=text_pair_column,
        label_column=label_column,
        label_separator=label_separator,
        label_type=label_type,
    )
    loaded = o.limit_rows(loaded, {split: max_rows}, seed)
    with ProgressBars() as notify:
        results = run_benchmark(
            models,
            loaded,
            split,
            data_name=loaded.name,
            settings=settings,
            against=programs,
            progress=notify,
        )
    plot = write_results(results, output)
    if json_output:
        typer.echo(json.dumps(results, ensure_ascii=False))
        return
    from rich.console import Console

    from alembert.reports.benchmark import benchmark_table

    console = Console(highlight=False)
    console.print(benchmark_table(results))
    console.print(f"{output}: benchmark.json, benchmark.csv{plot}", soft_wrap=True)


def write_results(results: dict[str, Any], folder: Path) -> str:
    """Writes JSON, CSV and, where the `report` extra is installed, a plot; returns what was drawn, for a message."""
    import logging

    from alembert.common.files import write_json
    from alembert.reports.benchmark import plot_benchmark, write_benchmark_csv

    write_json(folder / "benchmark.json", results)
    write_benchmark_csv(folder / "benchmark.csv", results)
    try:
        plot_benchmark(results, folder / "benchmark.png")
    except InputError as error:
        logging.getLogger("alembert").warning("No plot: %s", error)
        return ""
    return ", benchmark.png"


def available_peers(given: str | None) -> tuple[str, ...]:
    """The peers named, or all that can be run here."""
    import logging
    from importlib.util import find_spec

    from alembert.benchmarks.comparison_settings import PEERS

    if given is not None:
        names = tuple(dict.fromkeys(_parts(given)))
        return () if names == ("none",) else names
    if find_spec("onnxruntime") is None or find_spec("onnx") is None:
        logging.getLogger("alembert").warning(
            "ONNX Runtime is left out: %s.", install_extra("onnx"), extra={"markup": False}
        )
        return tuple(peer for peer in PEERS if not peer.startswith("onnx"))
    return PEERS


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
