"""The trade between speed and quality as pictures: PNG files and one interactive page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from alembert.common.errors import InputError
from alembert.common.files import write_text
from alembert.reports.figures import DOTS_PER_INCH, STYLE, readable_on, required_module, save_figure, wrapped
from alembert.reports.tables import FULL_MODEL, Results, exit_layers, part, speed_rows, title

# Okabe and Ito's palette, which colour-blind readers can tell apart; its yellow is too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
FULL_MODEL_EXIT = "#C9C9C9"


def plot_speed_curve(results_list: Sequence[Results], path: str | Path) -> None:
    """Draws the metric against MACs per text and against measured texts per second, as a PNG.

    Points are labelled by speed wherever a label has room; the band is the metric's confidence interval, the
    star and the dashed line are the full model. Several results share the panels.

    Args:
        results_list: results of `alembert evaluate` with one metric in common.
        path: file to write, whole or not at all.

    Raises:
        InputError: matplotlib is not installed; no results, different metrics, or a part is missing.
    """
    curves = _curves(results_list)
    axes = _axes(results_list, curves)
    matplotlib = required_module("matplotlib")
    figure_module = required_module("matplotlib.figure")
    with matplotlib.rc_context(STYLE):
        figure = figure_module.Figure(figsize=(5.5 * len(axes), 4.8), dpi=DOTS_PER_INCH, layout="constrained")
        panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
        for panel, (key, label) in zip(panels, axes.items(), strict=True):
            for curve in curves:
                _draw_curve(panel, curve, key, band_alpha=0.12 if len(curves) == 1 else 0.05)
            panel.set_xlabel(label)
            panel.margins(x=0.06, y=0.1)
            panel.set_xlim(left=0)
        panels[0].set_ylabel(curves[0].metric.replace("_", " "))
        figure.suptitle(
            wrapped(_headline(results_list), 50 * len(axes)),
            x=0.01,
            ha="left",
            fontsize=12,
            fontweight="bold",
        )
        lines = [curve for curve in panels[0].get_lines() if not curve.get_label().startswith("_")]
        figure.legend(
            handles=lines, loc="outside lower center", ncols=min(len(lines), 3), frameon=False, fontsize=9
        )
        # Where labels fit is known only once everything else has its place.
        figure.draw_without_rendering()
        for panel, key in zip(panels, axes, strict=True):
            _label_points(panel, curves, key)
        save_figure(figure, path)


def plot_exit_shares(results: Results, path: str | Path) -> None:
    """Draws, for every speed, a bar stacked from the shares of texts that leave after each layer, as a PNG.

    Raises:
        InputError: matplotlib is not installed, or a part of the results is missing.
    """
    layers = exit_layers(results)
    rows = [row for row in speed_rows(results) if row["speed"] != FULL_MODEL]
    matplotlib = required_module("matplotlib")
    figure_module = required_module("matplotlib.figure")
    # The full model's exit is grey; earlier exits run from light to dark along a colour-blind-safe map.
    shades = matplotlib.colormaps["viridis_r"]
    early = {layer: shades(0.05 + 0.85 * i / max(1, len(layers) - 2)) for i, layer in enumerate(layers[:-1])}
    colours = {**early, layers[-1]: matplotlib.colors.to_rgba(FULL_MODEL_EXIT)}
    with matplotlib.rc_context(STYLE):
        figure = figure_module.Figure(
            figsize=(max(6.0, 2.6 + 0.75 * len(rows)), 4.6), dpi=DOTS_PER_INCH, layout="constrained"
        )
        panel = figure.subplots()
        bottoms = [0.0] * len(rows)
        for layer in layers:
            shares = [100 * row[f"exit_{layer}"] for row in rows]
            name = f"layer {layer}" + (" (full model)" if layer == layers[-1] else "")
            panel.bar(
                range(len(rows)), shares, bottom=bottoms, color=colours[layer], label=name,
                width=0.82, edgecolor="white", linewidth=0.6,
            )  # fmt: skip
            for position, (bottom, share) in enumerate(zip(bottoms, shares, strict=True)):
                if share >= 6:
                    panel.text(
                        position, bottom + share / 2, f"{share:.0f}", ha="center", va="center",
                        fontsize=8, color=readable_on(colours[layer]),
                    )  # fmt: skip
            bottoms = [bottom + share for bottom, share in zip(bottoms, shares, strict=True)]
        panel.set_xticks(range(len(rows)), [f"{row['speed']:g}" for row in rows])
        panel.set_xlabel("speed")
        panel.set_ylabel("share of texts (%)")
        panel.set_ylim(0, 100)
        panel.grid(visible=False)
        handles, names = panel.get_legend_handles_labels()
        figure.legend(
            handles[::-1],
            names[::-1],
            loc="outside right center",
            frameon=False,
            fontsize=9,
            title="leave after",
        )
        figure.suptitle(wrapped(title(results), 80), x=0.01, ha="left", fontsize=12, fontweight="bold")
        save_figure(figure, path)


def plot_speed_curve_html(results_list: Sequence[Results], path: str | Path) -> None:
    """Writes `plot_speed_curve` as one self-contained interactive page; pointing at a speed shows its exits.

    Raises:
        InputError: plotly is not installed; no results, different metrics, or a part is missing.
    """
    curves = _curves(results_list)
    plotly = required_module("plotly.graph_objects")
    axes = _axes(results_list, curves)
    figure = required_module("plotly.subplots").make_subplots(
        rows=1, cols=len(axes), shared_yaxes=True, horizontal_spacing=0.04
    )
    for column, (key, label) in enumerate(axes.items(), start=1):
        for curve in curves:
            shared = {"legendgroup": curve.name, "name": curve.name, "showlegend": column == 1}
            points = plotly.Scatter(
                x=[row[key] for row in curve.rows],
                y=[row[curve.metric] for row in curve.rows],
                mode="lines+markers",
                line={"color": curve.colour, "width": 2},
                marker={"size": 9, "symbol": _PLOTLY_SYMBOLS[curve.marker]},
                hovertext=[_hover(curve, row) for row in curve.rows],
                hoverinfo="text",
                **shared,
            )
            star = plotly.Scatter(
                x=[curve.full[key]],
                y=[curve.full[curve.metric]],
                mode="markers",
                marker={"size": 15, "symbol": "star", "color": curve.colour},
                hovertext=[_hover(curve, curve.full)],
                hoverinfo="text",
                **{**shared, "showlegend": False},
            )
            figure.add_traces([points, star], rows=1, cols=column)
        figure.update_xaxes(title_text=label, rangemode="tozero", row=1, col=column)
    for curve in curves:
        figure.add_hline(
            y=curve.full[curve.metric], line={"color": curve.colour, "dash": "dash", "width": 1}, opacity=0.6
        )
    figure.update_yaxes(title_text=curves[0].metric.replace("_", " "), row=1, col=1)
    figure.update_layout(
        template="plotly_white",
        title={"text": f"{_headline(results_list)}<br><sub>★ and dashed line: the full model</sub>"},
        legend={"orientation": "h", "y": -0.2},
        hoverlabel={"align": "left"},
        font={"size": 14},
    )
    write_text(path, figure.to_html(include_plotlyjs=True, full_html=True))


@dataclass(frozen=True)
class _Curve:
    """One evaluation as it is drawn."""

    name: str
    metric: str
    full: dict[str, Any]
    rows: list[dict[str, Any]]
    layers: list[int]
    colour: str
    marker: str


_PLOTLY_SYMBOLS = dict(
    zip(MARKERS, ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x"), strict=True)
)
_MEGA_MACS = "mega_macs"
_LABEL_PLACES = (
    (0, 10),
    (0, -10),
    (14, 4),
    (-14, 4),
    (14, -4),
    (-14, -4),
    (11, 9),
    (-11, 9),
    (11, -9),
    (-11, -9),
)
"""Where a point's label may stand, best first, in points from it."""


def _curves(results_list: Sequence[Results]) -> list[_Curve]:
    if not results_list:
        raise InputError("Nothing to plot: give at least one evaluation's results.")
    metrics = {str(part(results, "task")["metric"]) for results in results_list}
    if len(metrics) > 1:
        raise InputError(
            f"The results measure different things ({', '.join(sorted(metrics))}): plot them separately."
        )
    same_data = len({part(results, "data") for results in results_list}) == 1
    curves = []
    for index, results in enumerate(results_list):
        full, *rows = [{**row, _MEGA_MACS: row["macs"] / 1e6} for row in speed_rows(results)]
        name = str(part(results, "model")) if same_data else title(results)
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        rows.sort(key=lambda row: float(row["speed"]))
        curves.append(_Curve(name, metrics.copy().pop(), full, rows, exit_layers(results), colour, marker))
    return curves


def _axes(results_list: Sequence[Results], curves: list[_Curve]) -> dict[str, str]:
    """The panels, key of a row to the axis' name: MACs, and texts per second where all were timed."""
    axes = {_MEGA_MACS: "million MACs per text (less is cheaper)"}
    if all(row["texts_per_second"] is not None for curve in curves for row in (curve.full, *curve.rows)):
        machines = {_machine(part(results, "machine")) for results in results_list}
        where = machines.pop() if len(machines) == 1 else "on different machines"
        axes["texts_per_second"] = f"texts per second ({where})"
    return axes


def _machine(machine: Mapping[str, Any]) -> str:
    device = str(part(machine, "device"))
    if device != "cpu":
        return device
    return f"{part(machine, 'processor')}, threads: {part(machine, 'threads')}"


def _headline(results_list: Sequence[Results]) -> str:
    if len(results_list) == 1:
        return title(results_list[0])
    data = {str(part(results, "data")) for results in results_list}
    return f"{len(results_list)} models on {', '.join(sorted(data))}"


def _draw_curve(panel: Any, curve: _Curve, key: str, band_alpha: float) -> None:
    x = [row[key] for row in curve.rows]
    panel.axhline(curve.full[curve.metric], color=curve.colour, linestyle=(0, (4, 4)), linewidth=1, alpha=0.6)
    if all(row["metric_lower"] is not None for row in curve.rows):
        lower, upper = ([row[bound] for row in curve.rows] for bound in ("metric_lower", "metric_upper"))
        panel.fill_between(x, lower, upper, color=curve.colour, alpha=band_alpha, linewidth=0)
    panel.plot(
        x,
        [row[curve.metric] for row in curve.rows],
        color=curve.colour,
        marker=curve.marker,
        markersize=5,
        linewidth=1.6,
        label=f"{curve.name}, by speed",
    )
    panel.plot(
        [curve.full[key]],
        [curve.full[curve.metric]],
        color=curve.colour,
        marker="*",
        markersize=14,
        markeredgecolor="white",
        linestyle="none",
        label=f"{curve.name}, full model",
    )


def _label_points(panel: Any, curves: list[_Curve], key: str) -> None:
    """Writes every point's speed beside it, unless all places around it are taken."""
    bbox = required_module("matplotlib.transforms").Bbox
    dot = panel.figure.dpi / 72  # pixels per point

    def box(x: float, y: float, size: float) -> Any:
        return bbox.from_bounds(x - size * dot / 2, y - size * dot / 2, size * dot, size * dot)

    taken = []
    for curve in curves:
        line = panel.transData.transform([(row[key], row[curve.metric]) for row in curve.rows])
        taken += [box(x, y, 8) for x, y in line]
        x, y = panel.transData.transform((curve.full[key], curve.full[curve.metric]))
        taken.append(box(x, y, 14))
        for start, end in pairwise(line):
            steps = np.linspace(0, 1, max(2, int(np.hypot(*(end - start)) / (2 * dot))))[:, None]
            taken += [box(x, y, 2) for x, y in start + steps * (end - start)]
    for curve in curves:
        for row in curve.rows:
            for shift in _LABEL_PLACES:
                label = panel.annotate(
                    f"{row['speed']:g}", (row[key], row[curve.metric]), xytext=shift,
                    textcoords="offset points", ha="center", va="center", fontsize=8, color=curve.colour,
                )  # fmt: skip
                label.set_in_layout(False)
                extent = label.get_window_extent()
                if not extent.count_overlaps(taken):
                    taken.append(extent)
                    break
                label.remove()


def _hover(curve: _Curve, row: dict[str, Any]) -> str:
    full = row["speed"] == FULL_MODEL
    lines = [f"<b>{curve.name}</b>", "full model" if full else f"speed {row['speed']:g} ({row['policy']})"]
    value = f"{curve.metric.replace('_', ' ')} {row[curve.metric]:.4f}"
    if row["metric_lower"] is not None:
        value += f" ({row['metric_lower']:.4f} to {row['metric_upper']:.4f})"
    lines.append(value)
    lines.append(f"{row[_MEGA_MACS]:,.1f} million MACs, speed-up {row['speedup']:.2f}×")
    if row["texts_per_second"] is not None:
        lines.append(f"{row['texts_per_second']:,.1f} texts/s, {row['ratio_to_full']:.2f}× the full model")
    shares = {layer: row[f"exit_{layer}"] for layer in curve.layers}
    if not full:
        leaving = ", ".join(f"{layer}: {share:.1%}" for layer, share in shares.items() if share > 0)
        lines.append(f"exits after layer {leaving}")
    return "<br>".join(lines)
