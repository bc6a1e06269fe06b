"""The report's pictures as PNG files: candidates, speeds, exits, reliability, training, transport between layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from alembert.reports.benchmark import plot_benchmark
from alembert.reports.figures import (
    DOTS_PER_INCH,
    GREY,
    STYLE,
    readable_on,
    required_module,
    save_figure,
    wrapped,
)
from alembert.reports.plots import COLOURS, plot_exit_shares, plot_speed_curve

Report = Mapping[str, Any]
Panel = tuple[str, Callable[[Any], None]]
"""A heading, and what draws on the axes."""

SHOWN_SPEEDS: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
RIGHT_COLOUR, WRONG_COLOUR = COLOURS[0], COLOURS[1]
_COLUMNS = 4


def write_figures(report: Report, folder: Path) -> dict[str, str]:
    """Draws all pictures that the report has something for, and returns their file names by what they show.

    Names: "candidates", "speeds", and by a model's name "exits NAME", "trust NAME", "training NAME" and those of
    `transport_picture`.

    Raises:
        InputError: matplotlib is not installed.
    """
    written: dict[str, str] = {}

    def draw(what: str, plot: Callable[..., None], *of: Any) -> None:
        stem = re.sub(r"[^\w.-]+", "-", what)
        numbered = (f"{stem}.png" if number == 1 else f"{stem}-{number}.png" for number in count(1))
        # Some file systems tell no capitals from others.
        used = {name.casefold() for name in written.values()}
        file = next(name for name in numbered if name.casefold() not in used)
        plot(*of, folder / file)
        written[what] = file

    draw("candidates", plot_benchmark, _as_benchmark(report))
    curves = [
        as_evaluation(report, model)
        for model in report["models"]
        if model["exits"] is not None and None not in model["exits"]["curve"]["macs"]
    ]
    if curves:
        draw("speeds", plot_speed_curve, curves)
    for results in curves:
        draw(f"exits {results['model']}", plot_exit_shares, results)
    for model in report["models"]:
        name = model["name"]
        if model["reliability"] is not None or model["exits"] is not None:
            draw(f"trust {name}", _plot_trust, model)
        if model["run"]["training"]:
            draw(f"training {name}", _plot_training, model)
        for run in model["run"].get("transport") or ():
            draw(transport_picture(model, run), _plot_transport, run)
    return written


def transport_picture(model: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """What the picture of one run's transport is called; a model made by several methods has several runs."""
    step = "" if run["name"] == model["name"] else f" {run['name']}"
    return f"transport {model['name']}{step}"


def as_evaluation(report: Report, model: Mapping[str, Any]) -> dict[str, Any]:
    """A model's curve at ten speeds or so, as `alembert evaluate` gives its results; time is left out."""
    exits, task = model["exits"], report["task"]
    curve, rows = exits["curve"], task["rows"]
    chosen = sorted({*SHOWN_SPEEDS, exits["default_speed"]} & set(exits["speeds"]))
    places = [exits["speeds"].index(speed) for speed in chosen if speed > 0]

    def entry(place: int) -> dict[str, Any]:
        return {
            "speed": exits["speeds"][place],
            "policy": exits["policy"]["name"],
            "top_k": exits["policy"]["top_k"],
            "metric": curve["metric"][place],
            "metric_interval": [curve["low"][place], curve["high"][place]],
            "agreement": 1 - curve["changed"][place],
            "macs": curve["macs"][place],
            "flops": 2 * curve["macs"][place],
            "speedup": curve["speedup"][place],
            "exits": {
                str(layer): count / rows
                for layer, count in zip(exits["layers"], curve["counts"][place], strict=True)
            },
        }

    return {
        "model": model["name"],
        "data": task["name"],
        "split": task["split"],
        "rows": rows,
        "task": task,
        "machine": report["machine"],
        "full_model": entry(0),
        "speeds": [entry(place) for place in places],
    }


def _as_benchmark(report: Report) -> dict[str, Any]:
    task = report["task"]
    return {
        "results": report["candidates"],
        "task": task,
        "timing": report["benchmark"]["timing"],
        "machine": report["machine"],
        "data": task["name"],
        "split": task["split"],
        "rows": task["rows"],
    }


def _plot_trust(model: Mapping[str, Any], path: Path) -> None:
    """Above the uncertainties of every exit but the last, below confidence against accuracy."""
    exits, parts = model["exits"], list(model["reliability"] or ())
    panels: list[Panel] = []
    if exits is not None:
        for index, layer in enumerate(exits["layers"][:-1]):
            panels.append((f"layer {layer}: uncertainty", partial(_draw_uncertainty, exits, index)))
        panels += [("", _blank)] * (-len(panels) % _COLUMNS)
    for part in parts:
        name = "full model" if part is parts[-1] else f"layer {part['layer']}"
        heading = f"{name}: ECE {part['expected_calibration_error']:.3f}"
        panels.append((heading, partial(_draw_reliability, part)))
    title = f"{model['name']}: how far exits can be trusted (blue right, orange wrong; line: the speed)"
    _small_multiples(panels, title, path)


def _draw_uncertainty(exits: Mapping[str, Any], index: int, panel: Any) -> None:
    histogram = exits["uncertainty"]
    edges = np.array(histogram["edges"])
    right, wrong = (np.array(histogram[kind][index]) for kind in ("right", "wrong"))
    width = np.diff(edges) * 0.9
    panel.bar(edges[:-1], right, width, align="edge", color=RIGHT_COLOUR)
    panel.bar(edges[:-1], wrong, width, bottom=right, align="edge", color=WRONG_COLOUR)
    panel.axvline(exits["default_speed"], color="black", linewidth=1)
    panel.set_xlim(0, 1)


def _draw_reliability(part: Mapping[str, Any], panel: Any) -> None:
    bins = part["bins"]
    rows = np.array([one["rows"] for one in bins])
    points = [one["confidence"] for one in bins], [one["accuracy"] for one in bins]
    panel.plot([0, 1], [0, 1], linestyle="--", color=GREY, linewidth=1)
    panel.scatter(*points, s=10 + 90 * rows / rows.sum(), color=RIGHT_COLOUR, zorder=3)
    panel.set_xlim(0, 1.03)
    panel.set_ylim(0, 1.03)


def _plot_training(model: Mapping[str, Any], path: Path) -> None:
    panels: list[Panel] = []
    for stage in model["run"]["training"]:
        series = dict(stage["terms"])
        if stage["score"] is not None:
            series["score on dev"] = stage["score"]
        for name, one in series.items():
            panels.append((f"{stage['name']}: {name}", partial(_draw_series, one)))
    _small_multiples(panels, f"{model['name']}: loss terms by optimiser step", path)


def _draw_series(series: Mapping[str, Any], panel: Any) -> None:
    values = [np.nan if value is None else value for value in series["values"]]
    panel.plot(series["steps"], values, color=RIGHT_COLOUR, linewidth=1.3, marker="o", markersize=1.5)


def _plot_transport(run: Mapping[str, Any], path: Path) -> None:
    """The last logged flow of each kind of features, in per cent."""
    matplotlib, figure_module = required_module("matplotlib"), required_module("matplotlib.figure")
    flows = {kind: 100 * np.array(part["flows"][-1]) for kind, part in run["kinds"].items()}
    top = max(flow.max() for flow in flows.values())
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = figure_module.Figure(
            figsize=(1 + 4.6 * len(flows), 1.6 + 0.34 * len(next(iter(flows.values())))),
            dpi=DOTS_PER_INCH,
            layout="constrained",
        )
        for panel, (kind, flow) in zip(
            figure.subplots(1, len(flows), squeeze=False)[0], flows.items(), strict=True
        ):
            image = panel.imshow(flow, cmap="Blues", vmin=0, vmax=top, aspect="auto")
            for (student, teacher), share in np.ndenumerate(flow):
                if share >= 0.5:
                    colour = readable_on(image.cmap(image.norm(share)))
                    panel.text(
                        teacher, student, f"{share:.0f}", ha="center", va="center", fontsize=8, color=colour
                    )
            panel.set_xticks(range(flow.shape[1]), range(1, flow.shape[1] + 1))
            panel.set_yticks(range(flow.shape[0]), range(1, flow.shape[0] + 1))
            panel.set_xlabel("teacher layer")
            panel.set_ylabel("student layer")
            panel.set_title(
                f"{'hidden states' if kind == 'hidden' else kind}: % of the flow, step {run['steps'][-1]:,}",
                fontsize=10,
            )
        save_figure(figure, path)


def _small_multiples(panels: Sequence[Panel], title: str, path: Path) -> None:
    matplotlib, figure_module = required_module("matplotlib"), required_module("matplotlib.figure")
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(STYLE | {"font.size": 8}):
        figure = figure_module.Figure(
            figsize=(max(5.0, 2.6 * columns), 0.6 + 1.9 * rows), dpi=DOTS_PER_INCH, layout="constrained"
        )
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis, (name, draw) in zip(axes, panels, strict=False):
            axis.set_title(wrapped(name, 34), fontsize=9, loc="left")
            draw(axis)
        for axis in axes[len(panels) :]:
            _blank(axis)
        figure.suptitle(wrapped(title, 30 * columns), x=0.01, ha="left", fontsize=11, fontweight="bold")
        save_figure(figure, path)


def _blank(panel: Any) -> None:
    panel.set_axis_off()
