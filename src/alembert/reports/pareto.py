"""The trials of a search: a table of the Pareto front, and pictures of all trials with the front drawn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from alembert.common.errors import InputError
from alembert.common.files import write_text
from alembert.reports.figures import DOTS_PER_INCH, GREY, STYLE, required_module, save_figure, wrapped

FRONT_COLOUR, TRIAL_COLOUR = "#0072B2", "#A9A9A9"
Search = Mapping[str, Any]


def pareto_front(results: Search) -> list[dict[str, Any]]:
    """The trials that no other beats in both metric and MACs, cheapest first."""
    return sorted((trial for trial in results["trials"] if trial["pareto"]), key=lambda trial: trial["macs"])


def pareto_table(results: Search) -> Table:
    """The front as a terminal table: metric, MACs in millions per text, how many times fewer than the teacher."""
    complete = sum(trial["state"] == "complete" for trial in results["trials"])
    table = Table(
        title=f"{results['method']} on {results['data']}: Pareto front of {complete} trials",
        title_justify="left",
    )
    table.add_column("trial", justify="right")
    table.add_column(results["metric"], justify="right")
    table.add_column("M MACs", justify="right")
    table.add_column("fewer", justify="right")
    for name in results["space"]:
        table.add_column(name, overflow="fold")
    teacher = results["teacher"]
    for trial in pareto_front(results):
        table.add_row(
            str(trial["number"]),
            f"{trial['metric']:.4f}",
            _millions(trial["macs"]),
            f"{teacher['macs'] / trial['macs']:.1f}×",
            *(_shown(trial["options"][name]) for name in results["space"]),
        )
    table.add_section()
    table.add_row("teacher", f"{teacher['metric']:.4f}", _millions(teacher["macs"]), "1.0×")
    return table


def plot_pareto(results: Search, path: str | Path) -> None:
    """Draws all trials, metric against MACs per text, with the front as a line and the teacher as a star, as a PNG.

    Raises InputError when matplotlib is not installed or no trial is complete.
    """
    trials, front = _complete(results), pareto_front(results)
    matplotlib = required_module("matplotlib")
    figure_module = required_module("matplotlib.figure")
    with matplotlib.rc_context(STYLE):
        figure = figure_module.Figure(figsize=(6.5, 4.8), dpi=DOTS_PER_INCH, layout="constrained")
        panel = figure.subplots()
        others = [trial for trial in trials if not trial["pareto"]]
        panel.plot(*_points(others), "o", color=TRIAL_COLOUR, label="trial")
        panel.plot(
            *_points(front), "o-", color=FRONT_COLOUR, drawstyle="steps-post", label="Pareto front", zorder=3
        )
        for trial in front:
            panel.annotate(
                str(trial["number"]), (trial["macs"] / 1e6, trial["metric"]), xytext=(4, 5),
                textcoords="offset points", fontsize=8, color=GREY,
            )  # fmt: skip
        teacher = results["teacher"]
        panel.plot([teacher["macs"] / 1e6], [teacher["metric"]], "*", color="black", ms=12, label="teacher")
        panel.set_xscale("log")
        # Without mathematical text matplotlib's own labels of such an axis are its markup.
        ticker = required_module("matplotlib.ticker")
        panel.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        panel.xaxis.set_minor_formatter(ticker.NullFormatter())
        panel.set_xlabel("million MACs per text (logarithmic)")
        panel.set_ylabel(f"{results['metric'].replace('_', ' ')} on dev")
        panel.margins(x=0.08, y=0.12)
        figure.suptitle(wrapped(_title(results), 70), x=0.01, ha="left", fontsize=12, fontweight="bold")
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
        save_figure(figure, path)


def plot_pareto_html(results: Search, path: str | Path) -> None:
    """The same as an interactive page, where a trial's values show under the pointer; it needs no network.

    Raises InputError when plotly is not installed or no trial is complete.
    """
    trials, front = _complete(results), pareto_front(results)
    objects = required_module("plotly.graph_objects")
    figure = objects.Figure()
    for name, chosen, mode, colour in (
        ("trial", [trial for trial in trials if not trial["pareto"]], "markers", TRIAL_COLOUR),
        ("Pareto front", front, "lines+markers", FRONT_COLOUR),
    ):
        macs, metrics = _points(chosen)
        figure.add_scatter(
            x=macs,
            y=metrics,
            name=name,
            mode=mode,
            marker={"color": colour, "size": 9},
            line={"shape": "hv"},
            text=[_described(trial) for trial in chosen],
            hovertemplate="%{text}<br>%{y:.4f}, %{x:.4g} M MACs<extra></extra>",
        )
    teacher = results["teacher"]
    figure.add_scatter(
        x=[teacher["macs"] / 1e6], y=[teacher["metric"]], name="teacher", mode="markers",
        marker={"color": "black", "symbol": "star", "size": 13},
    )  # fmt: skip
    figure.update_xaxes(type="log", title="million MACs per text (logarithmic)")
    figure.update_yaxes(title=f"{results['metric']} on dev")
    figure.update_layout(title=_title(results), template="simple_white")
    write_text(path, figure.to_html(include_plotlyjs=True, full_html=True))


def _complete(results: Search) -> list[dict[str, Any]]:
    trials = [trial for trial in results["trials"] if trial["state"] == "complete"]
    if not trials:
        raise InputError("no trial is complete yet, so there is nothing to draw")
    return trials


def _points(trials: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    return [trial["macs"] / 1e6 for trial in trials], [trial["metric"] for trial in trials]


def _title(results: Search) -> str:
    at_speed = (
        f" at speed {results['speed']:g}" if any(trial["speeds"] for trial in results["trials"]) else ""
    )
    return f"{results['method']} on {results['data']}{at_speed}"


def _described(trial: Mapping[str, Any]) -> str:
    return f"trial {trial['number']}: " + ", ".join(
        f"{name}={_shown(value)}" for name, value in trial["options"].items()
    )


def _millions(macs: float) -> str:
    return f"{macs / 1e6:.4g}"


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
