"""`alembert export`."""

from __future__ import annotations

import json
import logging
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alembert.cli import options as o
from alembert.common.errors import InputError
from alembert.common.files import write_json

if TYPE_CHECKING:
    from alembert.runtime.manifest import Manifest

RUNTIMES = ("onnx",)
QUALITY_FILE = "quality.json"


def export(
    run: Annotated[str, typer.Argument(help="A run directory, a folder in Hugging Face layout or a hub id.")],
    output: Annotated[Path, typer.Option("--output", help="Folder of the exported model.")],
    runtime: Annotated[str, typer.Option(help="What will run it: onnx.")] = "onnx",
    precision: Annotated[str, typer.Option(help="fp32 or int8, of the linear layers' weights.")] = "int8",
    exits: o.ExitsOption = None,
    prune_exits: Annotated[
        str | None,
        typer.Option(
            "--prune-exits",
            help="File of texts like those to come: exits that save no time on them are left out.",
        ),
    ] = None,
    prune_speed: Annotated[
        str | None,
        typer.Option(
            help="Speeds at which exits must pay, separated by commas; 0.1, 0.3, 0.5, 0.7 unless given."
        ),
    ] = None,
    merge_exits: Annotated[
        str | None,
        typer.Option(
            "--merge-exits",
            help="Also write one graph for single texts, with exits after these layers, such as 1,3, or all.",
        ),
    ] = None,
    policy: o.PolicyOption = None,
    top_k: o.TopKOption = None,
    reduce_range: Annotated[
        bool, typer.Option("--reduce-range", help="7-bit weights, for CPUs without VNNI instructions.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an exported model.")] = False,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", help="Labelled texts (TSV, CSV, JSONL, Parquet): tell what the export costs in quality."
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Of the labelled texts; test where there is one, else dev.")
    ] = None,
    max_rows: Annotated[
        int | None, typer.Option(min=2, help="Use this many labelled rows, drawn by seed.")
    ] = None,
    task: o.TaskOption = None,
    text_column: o.TextColumnOption = None,
    text_pair_column: o.PairColumnOption = None,
    label_column: o.LabelColumnOption = None,
    label_separator: o.LabelSeparatorOption = None,
    label_type: o.LabelTypeOption = None,
    config: o.ConfigOption = None,
    json_output: o.JsonOption = False,
) -> None:
    """Writes a model as ONNX graphs that run without torch, in float32 or int8."""
    if runtime not in RUNTIMES:
        raise InputError(f"--runtime {runtime}: choose one of {', '.join(RUNTIMES)}")
    labelled_options = {"--split": split, "--max-rows": max_rows, "--task": task, "--label-column": label_column,
                        "--label-separator": label_separator, "--label-type": label_type}  # fmt: skip
    unread = [name for name, value in labelled_options.items() if value is not None]
    if data is None and unread:
        raise InputError(f"{unread[0]} is about labelled texts: name them with --data, or leave it out")
    columns = {"text_column": text_column, "text_pair_column": text_pair_column}
    if prune_exits is None and prune_speed is not None:
        raise InputError(
            "--prune-speed is about exits to be left out: name texts with --prune-exits, or leave it out"
        )
    if prune_exits is None and data is None:
        o.refuse_columns(columns, "no file of texts is read: name one with --prune-exits or --data")
    chosen = None if exits is None else o.parse_layers(exits)
    merged: Any = (
        merge_exits if merge_exits in (None, "all") else o.parse_layers(merge_exits, "--merge-exits")
    )
    o.quiet_libraries()
    from alembert.benchmarks.export_quality import export_quality
    from alembert.benchmarks.pruning import segment_macs
    from alembert.cli.evaluate import ProgressBars
    from alembert.runtime.export import export_classifier
    from alembert.runtime.export_folder import check_output

    check_output(output, overwrite)
    pruning: dict[str, Any] | None = None
    quality: dict[str, Any] | None = None
    labelled = None
    if data is not None:
        known: dict[str, Any] = columns | {
            "preset": task,
            "label_column": label_column,
            "label_separator": label_separator,
            "label_type": label_type,
        }
        before = o.load_adaptive(run, speed=0.0)
        loaded, split, _ = o.load_evaluation_task(data, run, before, split, **known)
        labelled = o.limit_rows(loaded, {split: max_rows}, 0)
    with ProgressBars() as notify:
        if prune_exits is not None:
            pruning = _prune(run, prune_exits, chosen, precision, prune_speed, policy, top_k, columns, notify)
            chosen = pruning["exits"]
            if not chosen and (policy is not None or top_k is not None):
                # It was read, by the pruning: no reason to throw that away.
                logging.getLogger("alembert").warning(
                    "%s: no exit is left, so the exported model has no policy", prune_exits
                )
                policy = top_k = None
            if merged not in (None, "all"):
                merged = [layer for layer in merged if layer in pruning["exits"]]
        manifest = export_classifier(
            run,
            output,
            precision=precision,
            exits=chosen,
            merge_exits=merged,
            policy=policy,
            top_k=top_k,
            reduce_range=reduce_range,
            count_macs=segment_macs,
            overwrite=overwrite,
            progress=notify,
        )
        if labelled is not None and split is not None:
            after = o.load_adaptive(str(output), speed=0.0)
            quality = export_quality(before, after, labelled, split, progress=notify)
            write_json(output / QUALITY_FILE, quality)
    if json_output:
        found = {"pruning": pruning, "quality": quality}
        typer.echo(json.dumps(describe(manifest, output) | found, ensure_ascii=False))
        return
    _print(manifest, output, pruning, quality)


def _prune(
    run: str,
    file: str,
    exits: list[int] | None,
    precision: str,
    speeds: str | None,
    policy: str | None,
    top_k: int | None,
    columns: dict[str, str | None],
    notify: Any,
) -> dict[str, Any]:
    from alembert.benchmarks.pruning import DEFAULT_SPEEDS, MAX_TEXTS, prune_exits
    from alembert.cli.evaluate import parse_speeds
    from alembert.data.texts import iterate_texts
    from alembert.models.loading import run_configuration

    is_pair = run_configuration(run).get("task", {}).get("is_pair")
    pair_column = o.pair_column(columns["text_column"], columns["text_pair_column"], is_pair)
    rows = iterate_texts(file, text_column=columns["text_column"], text_pair_column=pair_column)
    texts = list(islice(rows, MAX_TEXTS))
    return prune_exits(
        run,
        texts,
        precision=precision,
        exits=exits,
        speeds=DEFAULT_SPEEDS if speeds is None else parse_speeds(speeds),
        policy=policy,
        top_k=top_k,
        progress=notify,
    )


def describe(manifest: Manifest, output: Path) -> dict[str, Any]:
    """The facts of an export, as one JSON-ready dictionary."""
    files = [
        *(segment.file for segment in manifest.segments),
        *(head.file for head in manifest.heads.values()),
        *([manifest.merged.file] if manifest.merged else []),
    ]
    return {
        "output": str(output),
        "precision": manifest.precision,
        "exit_layers": list(manifest.exit_layers),
        "num_layers": manifest.num_layers,
        "files": {name: (output / name).stat().st_size for name in files},
        "merged": manifest.merged.file if manifest.merged else None,
    }


def _print(
    manifest: Manifest, output: Path, pruning: dict[str, Any] | None, quality: dict[str, Any] | None
) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if pruning is not None:
        console.print(_pruning_table(pruning))
    table = Table(title=f"{manifest.model_type}, {manifest.precision}")
    for column in ("file", "layers", "exit after layer", "MB"):
        table.add_column(column, justify="left" if column == "file" else "right")
    sizes = describe(manifest, output)["files"]
    for segment in manifest.segments:
        end = "full model" if segment.exit_layer == manifest.num_layers else str(segment.exit_layer)
        layers = f"{segment.first_layer}–{segment.last_layer}"
        table.add_row(segment.file, layers, "" if segment.head else end, f"{sizes[segment.file] / 1e6:.1f}")
        if segment.head is not None:
            table.add_row(segment.head.file, "", end, f"{sizes[segment.head.file] / 1e6:.1f}")
    if manifest.merged is not None:
        ends = ", ".join(str(layer) for layer in manifest.merged.exit_layers)
        megabytes = f"{sizes[manifest.merged.file] / 1e6:.1f}"
        table.add_row(manifest.merged.file, f"1–{manifest.num_layers}", ends, megabytes)
    console.print(table)
    if quality is not None:
        console.print(_quality_table(quality))
    graphs = "1 graph" if len(sizes) == 1 else f"{len(sizes)} graphs"
    console.print(f"{output}: {graphs}, tokenizer, manifest.json", soft_wrap=True)


def _pruning_table(pruning: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(
        title=f"exits on {pruning['texts']} texts, mean of speeds "
        f"{', '.join(f'{speed:g}' for speed in pruning['speeds'])}"
    )
    for column in ("exit after layer", "texts that leave", "head, ms/text", "ms/text without it", "kept"):
        table.add_column(column, justify="right")
    for row in pruning["exits_measured"]:
        table.add_row(
            str(row["exit"]),
            f"{row['share']:.1%}",
            f"{row['head_ms']:.4f}",
            f"{row['ms_without']:.3f}",
            "yes" if row["kept"] else "no",
        )
    table.caption = f"{pruning['ms_before']:.3f} ms/text with all, {pruning['ms_after']:.3f} with those kept"
    return table


def _quality_table(quality: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title=f"{quality['metric']} on {quality['rows']} rows of {quality['split']}, exit by exit")
    for column in ("exit after layer", "run", "exported", "difference", "95% interval", "same answer"):
        table.add_column(column, justify="right")
    for row in quality["exits"]:
        low, high = row["interval"]
        same = row["same_answer"]
        table.add_row(
            str(row["exit"]),
            f"{row['run']:.4f}",
            f"{row['exported']:.4f}",
            f"{row['difference']:+.4f}",
            f"{low:+.4f} to {high:+.4f}",
            "" if same is None else f"{same:.2%}",
        )
    return table
