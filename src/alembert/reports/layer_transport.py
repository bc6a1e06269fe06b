"""Where BERT-EMD's student layers learned from: the transport between layers and the layers' weights, as heat maps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from alembert.benchmarks.report_runs import logged_stages
from alembert.common.errors import InputError
from alembert.common.files import read_json, write_text
from alembert.reports.figures import (
    DOTS_PER_INCH,
    STYLE,
    readable_on,
    required_module,
    save_figure,
    wrapped,
)

KINDS = ("attention", "hidden")
_NAMES = {"attention": "attention", "hidden": "hidden states"}
# The colours reach at least this far from even, as a part of it: rounding is not to look like a difference.
_LEAST_DEVIATION = 0.02
_MOST_LAYER_TICKS = 13
_GRID = "#D0D0D0"


@dataclass(frozen=True)
class LayerTransport:
    """One kind of features' transport between M student and N teacher layers, at S logged steps.

    Attributes:
        steps: optimiser steps, ascending; S.
        flows: (S, M, N), the share that went from each student layer to each teacher layer; each sums to 1.
        student_weights: (S, M), the student layers' weights after that step; each row sums to 1.
        teacher_weights: (S, N), likewise.
    """

    steps: list[int]
    flows: list[list[list[float]]]
    student_weights: list[list[float]]
    teacher_weights: list[list[float]]


def layer_transport_history(run_dir: str | Path) -> dict[str, LayerTransport]:
    """What a finished run logged of its layers' transport, by kind: "attention", "hidden".

    Empty for runs of methods without transport between layers.

    Raises:
        InputError: the folder holds no finished run, or its log is damaged.
    """
    log = Path(run_dir) / "trainer_state.json"
    if not log.is_file():
        raise InputError(
            f"{run_dir}: no trainer_state.json in this folder, so it is no finished run of Alembert"
        )
    try:
        snapshots = [
            (int(entry["step"]), entry["snapshot"])
            for stage in logged_stages(read_json(log)).values()
            for entry in stage["log_history"]
            if "snapshot" in entry
        ]
        by_kind = {
            kind: [(step, snapshot[kind]) for step, snapshot in snapshots if kind in snapshot]
            for kind in KINDS
        }
        return {
            kind: LayerTransport(
                steps=[step for step, _ in series],
                flows=[features["flow"] for _, features in series],
                student_weights=[features["student_weights"] for _, features in series],
                teacher_weights=[features["teacher_weights"] for _, features in series],
            )
            for kind, series in by_kind.items()
            if series
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{log}: is no training log of Alembert, or was changed by hand ({error!r})"
        ) from error


def write_layer_transport(run_dir: str | Path, path: str | Path) -> None:
    """Writes `layer_transport_history` as JSON, by kind with the fields of `LayerTransport`.

    Raises:
        InputError: as `layer_transport_history`.
    """
    history = layer_transport_history(run_dir)
    write_text(path, json.dumps({kind: asdict(series) for kind, series in history.items()}) + "\n")


def plot_layer_transport(run_dir: str | Path, path: str | Path) -> None:
    """Draws a run's layer transport as a PNG: the flow early, halfway and at the end, and both sides' weights.

    Flows are in per cent of all that is transported. Weights are in per cent too; white is an even weight, and
    kinds of features that share their weights share a panel.

    Args:
        run_dir: a finished run of BERT-EMD.
        path: file to write, whole or not at all.

    Raises:
        InputError: matplotlib is not installed; the folder holds no finished run, or one without layer transport.
    """
    history = layer_transport_history(run_dir)
    if not history:
        raise InputError(f"{run_dir}: the run logged no transport between layers; method bert-emd does")
    matplotlib, figure_module = required_module("matplotlib"), required_module("matplotlib.figure")
    weights = _by_weights(history)
    first = next(iter(history.values()))
    student_layers, teacher_layers = len(first.flows[-1]), len(first.flows[-1][0])
    moments = len(_moments(first))
    heights = [
        (0.5 + _height(student_layers)) * len(history),
        0.6 + _height(student_layers) * 0.6,
        0.6 + _height(teacher_layers) * 0.6,
    ]
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = figure_module.Figure(
            figsize=(1.6 + max(3.6, 0.34 * teacher_layers) * max(2, moments), 1.4 + sum(heights)),
            dpi=DOTS_PER_INCH,
            layout="constrained",
        )
        figure.get_layout_engine().set(h_pad=0.09, w_pad=0.06)
        rows = figure.subfigures(3, 1, height_ratios=heights)
        _draw_flows(rows[0], history)
        for row, side in zip(rows[1:], ("student", "teacher"), strict=True):
            _draw_weights(row, weights, side)
        heading = f"{Path(run_dir).resolve().name}: transport between student and teacher layers"
        figure.suptitle(wrapped(heading, 80), x=0.01, ha="left", fontsize=12, fontweight="bold")
        save_figure(figure, path)


def _by_weights(history: Mapping[str, LayerTransport]) -> dict[str, LayerTransport]:
    """The series by the names of the kinds that share their weights."""
    groups: list[tuple[list[str], LayerTransport]] = []
    for kind, series in history.items():
        for names, other in groups:
            if (series.student_weights, series.teacher_weights) == (
                other.student_weights,
                other.teacher_weights,
            ):
                names.append(_NAMES[kind])
                break
        else:
            groups.append(([_NAMES[kind]], series))
    return {" and ".join(names): series for names, series in groups}


def _height(layers: int) -> float:
    """Inches that a panel needs for so many layers."""
    return max(1.6, 0.3 * layers)


def _moments(series: LayerTransport) -> list[int]:
    """Positions among the logged steps of the first, the one in the middle and the last."""
    last = len(series.steps) - 1
    return sorted({0, last // 2, last})


def _draw_flows(area: Any, history: Mapping[str, LayerTransport]) -> None:
    moments = _moments(next(iter(history.values())))
    panels = area.subplots(len(history), len(moments), squeeze=False).flatten()
    shown = [(kind, series, moment) for kind, series in history.items() for moment in moments]
    flows = [100 * np.array(series.flows[moment]) for _, series, moment in shown]
    top = max(flow.max() for flow in flows)
    image = None
    for panel, (kind, series, moment), flow in zip(panels, shown, flows, strict=True):
        edges = [np.arange(size + 1) + 0.5 for size in reversed(flow.shape)]
        image = panel.pcolormesh(
            *edges, flow, cmap="Blues", vmin=0, vmax=top, edgecolors=_GRID, linewidth=0.5
        )
        for (student, teacher), share in np.ndenumerate(flow):
            if share >= 0.5:
                panel.text(
                    teacher + 1, student + 1, f"{share:.0f}", ha="center", va="center",
                    fontsize=8, color=readable_on(image.cmap(image.norm(share))),
                )  # fmt: skip
        panel.set_title(f"{_NAMES[kind]}: flow at step {series.steps[moment]:,}", fontsize=10)
        panel.set_xlabel("teacher layer")
        panel.set_ylabel("student layer")
        panel.set_xticks(_layer_ticks(flow.shape[1]))
        panel.set_yticks(_layer_ticks(flow.shape[0]))
    area.colorbar(image, ax=list(panels), label="share of flow (%)", pad=0.02)


def _draw_weights(area: Any, weights: Mapping[str, LayerTransport], side: str) -> None:
    ticker = required_module("matplotlib.ticker")
    panels = area.subplots(1, len(weights), squeeze=False)[0]
    shares = {
        name: 100 * np.array(series.student_weights if side == "student" else series.teacher_weights)
        for name, series in weights.items()
    }
    even = 100 / next(iter(shares.values())).shape[1]
    deviation = max(_LEAST_DEVIATION * even, *(float(abs(share - even).max()) for share in shares.values()))
    image = None
    for panel, (name, share) in zip(panels, shares.items(), strict=True):
        layers = share.shape[1]
        image = panel.pcolormesh(
            _edges(weights[name].steps), np.arange(layers + 1) + 0.5, share.T,
            cmap="PuOr_r", vmin=even - deviation, vmax=even + deviation, rasterized=True,
        )  # fmt: skip
        panel.set_title(f"{name}: {side}'s weights (white: even, {even:.3g}%)", fontsize=10)
        panel.set_xlabel("training step")
        panel.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        panel.xaxis.set_major_formatter("{x:,.0f}")
        panel.set_ylabel(f"{side} layer")
        panel.set_yticks(_layer_ticks(layers))
    scale = area.colorbar(image, ax=list(panels), label="weight (%)", pad=0.02)
    scale.ax.set_ylim(max(0.0, even - deviation), even + deviation)


def _layer_ticks(layers: int) -> list[int]:
    """Layers to be numbered on an axis: all of them, or of many every second, third, …"""
    stride = -(-layers // _MOST_LAYER_TICKS)
    return [layer for layer in range(1, layers + 1) if layer % stride == 0]


def _edges(steps: list[int]) -> Any:
    """Borders (S + 1,) of the columns that stand for S steps, half-way between neighbours."""
    return np.array(
        [steps[0] - 0.5, *((left + right) / 2 for left, right in pairwise(steps)), steps[-1] + 0.5]
    )
