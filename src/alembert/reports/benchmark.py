"""What `alembert benchmark` measured, as a table, a CSV file and a picture."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from alembert.common.errors import InputError
from alembert.common.files import replacing
from alembert.reports.figures import DOTS_PER_INCH, GREY, STYLE, required_module, save_figure, wrapped
from alembert.reports.plots import COLOURS, MARKERS
from alembert.reports.tables import part

Benchmark = Mapping[str, Any]
"""What `alembert benchmark` writes."""

_AXES = {
    "texts_per_second": "texts per second (logarithmic; right is better)",
    "macs": "GFLOPs per text (logarithmic; left is better)",
    "p50_ms": "median ms of one text at a time (logarithmic; left is better)",
}
_SCALES = {"macs": 2e-9}
_ENGINE = ("name", "backend", "precision", "batching")
_FLAT = (
    *("name", "backend", "precision", "batching", "batch_size", "batch_tokens", "speed", "policy"),
    *("metric", "agreement", "texts_per_second", "ratio_to_baseline"),
    *("p50_ms", "p95_ms", "p99_ms", "mean_ms", "p50_ratio_to_baseline"),
    *("macs", "speedup", "peak_memory_mb", "load_seconds", "tokenisation_ms"),
)
_WITH_BOUNDS = {
    "metric": "metric_interval",
    "texts_per_second": "texts_per_second_quartiles",
    "ratio_to_baseline": "ratio_to_baseline_quartiles",
}


@dataclass(frozen=True)
class _Curve:
    """The rows of one engine, which differ in speed alone."""

    name: str
    rows: list[Mapping[str, Any]]
    is_baseline: bool


def benchmark_rows(results: Benchmark) -> list[dict[str, Any]]:
    """Flat rows in the order of the results, all with the same keys in the same order.

    Keys are those of a row of `alembert benchmark`; the metric's interval and the quartiles of rate and ratio stand in
    keys that end in "_lower" and "_upper", and what was measured against full depth in keys that start with
    "full_depth_". What is not known is None.

    Raises:
        InputError: the results lack a part; names it.
    """
    depth = sorted({key for row in part(results, "results") for key in row.get("full_depth") or {}})
    flat = []
    for row in part(results, "results"):
        values: dict[str, Any] = {}
        for key in _FLAT:
            values[key] = part(row, key)
            if key in _WITH_BOUNDS:
                values[f"{key}_lower"], values[f"{key}_upper"] = row.get(_WITH_BOUNDS[key]) or (None, None)
        against = row.get("full_depth") or {}
        for key in depth:
            if not isinstance(against.get(key), list):
                values[f"full_depth_{key}"] = against.get(key)
        flat.append({key: value for key, value in values.items() if key != "full_depth_ratio_quartiles"})
    return flat


def write_benchmark_csv(path: str | Path, results: Benchmark) -> None:
    """Writes `benchmark_rows` as CSV (UTF-8, a header line), whole or not at all."""
    rows = benchmark_rows(results)
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def benchmark_table(results: Benchmark) -> Table:
    """A terminal table: a line per engine and speed, the baseline first and in bold.

    "ratio" is texts per second over the baseline's, p50 and p95 are milliseconds of one text at a time, "MB" is the
    peak memory of the engine's process over all its speeds.

    Raises:
        InputError: the results lack a part; names it.
    """
    timing = part(results, "timing")
    table = Table(
        title=Text(_title(results)),
        title_justify="left",
        caption=(
            f"{timing['rows']} texts a round, {timing['rounds']} rounds, {timing['mean_tokens']:.0f} tokens a text; "
            f"one at a time: {timing['latency_rows']} texts; {part(results, 'machine')['threads']} threads"
        ),
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("model", overflow="fold", min_width=8)
    table.add_column("run by", min_width=len("transformers"))
    metric = str(part(results, "task")["metric"]).replace("_", " ")
    for heading in ("speed", metric, "texts/s", "ratio", "p50\nms", "p95\nms", "MB"):
        table.add_column(heading, justify="right", no_wrap=True)
    curves = _curves(results)
    for curve in curves:
        for index, row in enumerate(curve.rows):
            table.add_row(
                row["name"] if index == 0 else "",
                _how(row) if index == 0 else "",
                "–" if row["speed"] is None else f"{row['speed']:g}",
                f"{row['metric']:.4f}",
                _or_dash(row["texts_per_second"], ",.1f"),
                "–" if row["ratio_to_baseline"] is None else f"{row['ratio_to_baseline']:.2f}×",
                _or_dash(row["p50_ms"], ",.1f"),
                _or_dash(row["p95_ms"], ",.1f"),
                _or_dash(row["peak_memory_mb"], ",.0f"),
                style="bold" if curve.is_baseline else None,
                end_section=index == len(curve.rows) - 1 and len(curve.rows) > 1,
            )
    return table


def plot_benchmark(results: Benchmark, path: str | Path) -> None:
    """Draws the metric against texts per second, operations and the p50 latency, all logarithmic, as a PNG.

    A line joins the speeds of an engine; its ends are labelled with them. The star is the baseline, the dashed line
    its metric, the broad one the Pareto front where the rows say what lies on it. What was not measured is left out.

    Raises:
        InputError: matplotlib is not installed, or a part of the results is missing.
    """
    curves = _curves(results)
    axes = {
        key: label
        for key, label in _AXES.items()
        if key == "texts_per_second" or any(row[key] is not None for curve in curves for row in curve.rows)
    }
    matplotlib = required_module("matplotlib")
    figure_module = required_module("matplotlib.figure")
    with matplotlib.rc_context(STYLE):
        legend_lines, width = -(-len(curves) // 2), 5.6 * min(len(axes), 2) + 4.2 * (len(axes) > 2)
        figure = figure_module.Figure(
            figsize=(width, 4.2 + 0.2 * legend_lines), dpi=DOTS_PER_INCH, layout="constrained"
        )
        panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
        for panel, (key, label) in zip(panels, axes.items(), strict=True):
            _draw_panel(panel, curves, key)
            panel.set_xscale("log")
            # Without mathematical text matplotlib's own labels of such an axis are its markup.
            ticker = required_module("matplotlib.ticker")
            panel.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
            panel.xaxis.set_minor_formatter(ticker.NullFormatter())
            panel.set_xlabel(label)
            panel.margins(x=0.08, y=0.12)
        panels[0].set_ylabel(str(part(results, "task")["metric"]).replace("_", " "))
        figure.suptitle(
            wrapped(_title(results), 55 * len(axes)), x=0.01, ha="left", fontsize=12, fontweight="bold"
        )
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
        save_figure(figure, path)


def _draw_panel(panel: Any, curves: Sequence[_Curve], key: str) -> None:
    others = [curve for curve in curves if not curve.is_baseline]
    front = sorted(
        (_SCALES.get(key, 1) * row[key], row["metric"])
        for curve in curves
        for row in curve.rows
        if row.get("pareto", {}).get(key)
    )
    if len(front) > 1:
        # Between two marks only the one that is better in cost can be had.
        steps = "steps-pre" if key == "texts_per_second" else "steps-post"
        panel.plot(*zip(*front, strict=True), color=GREY, linewidth=5, alpha=0.3, drawstyle=steps, zorder=1)
    for curve in curves:
        rows = [row for row in curve.rows if row[key] is not None]
        if not rows:
            continue
        points = [_SCALES.get(key, 1) * row[key] for row in rows], [row["metric"] for row in rows]
        if curve.is_baseline:
            panel.plot(
                *points, "*", color="black", markersize=13, linestyle="none", label=curve.name, zorder=4
            )
            panel.axhline(curve.rows[0]["metric"], color=GREY, linestyle="--", linewidth=0.9, zorder=1)
            continue
        place = others.index(curve)
        colour = COLOURS[place % (len(COLOURS) - 1)]
        panel.plot(
            *points, marker=MARKERS[place % len(MARKERS)], markersize=5.5, linewidth=1.3, color=colour,
            label=curve.name, zorder=3,
        )  # fmt: skip
        if len(rows) > 1:
            for row in (rows[0], rows[-1]):
                panel.annotate(
                    f"{row['speed']:g}", (_SCALES.get(key, 1) * row[key], row["metric"]), xytext=(0, -11),
                    textcoords="offset points", ha="center", fontsize=8, color=colour,
                )  # fmt: skip


def _curves(results: Benchmark) -> list[_Curve]:
    rows = part(results, "results")
    if not rows:
        raise InputError("The results hold no rows: give the JSON that `alembert benchmark` writes.")
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(part(row, key) for key in _ENGINE), []).append(row)
    return [
        _Curve(
            f"{group[0]['name']}: {_how(group[0])}{' (baseline)' if index == 0 else ''}", group, index == 0
        )
        for index, group in enumerate(groups.values())
    ]


def _how(row: Mapping[str, Any]) -> str:
    """Library, precision and batching in a few words."""
    if row["backend"] == "outside":
        return "outside program"
    library = {"torch": "Alembert torch", "onnx": "Alembert ONNX", "onnxruntime": "ONNX Runtime"}
    return f"{library.get(row['backend'], row['backend'])} {row['precision']}"


def _title(results: Benchmark) -> str:
    split = f", {results['split']}" if results.get("split") else ""
    return f"{part(results, 'data')}{split} ({results.get('rows', '?')} texts)"


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
