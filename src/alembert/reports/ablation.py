"""An ablation table: own results and the paper's side by side, as a terminal table and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from alembert.common.errors import InputError
from alembert.reports.figures import DOTS_PER_INCH, GREY, STYLE, required_module, save_figure, wrapped

FULL_COLOUR, ROW_COLOUR = "#D55E00", "#0072B2"
RECALLED = "(recalled)"
"""Marks figures that were not compared with the paper's text."""
Ablation = Mapping[str, Any]


def ablation_table(results: Ablation) -> Table:
    """One line per row: mean ± standard deviation in percent, the difference from the full method, the paper's figures.

    Own results are those of dev, and of test where it was measured.
    """
    splits = [split for split in ("dev", "test") if any(row[split] for row in results["rows"])]
    seeds = len(results["seeds"])
    paper = "On the right the paper's own figures" if results["columns"] else "Paper"
    table = Table(
        title=f"{results['method']} on {results['data']}: {results['metric']} × 100, "
        f"{seeds} seed{'s' if seeds > 1 else ''}",
        title_justify="left",
        caption=f"{paper}: {results['paper']}. {results['note']}",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("row", no_wrap=True)
    for split in splits:
        table.add_column(split, justify="right", no_wrap=True)
        table.add_column("vs full", justify="right", no_wrap=True)
    for column in results["columns"]:
        table.add_column(column, justify="right")
    if results["columns"]:
        table.add_column("source", no_wrap=True)
    for row in results["rows"]:
        cells = [row["title"]]
        for split in splits:
            cells += _own(row, split)
        if results["columns"]:
            cells += _papers(row, results["columns"])
        table.add_row(*cells)
    return table


def messages(results: Ablation) -> list[str]:
    """What is to be said of the rows without results, a sentence each."""
    return [f"{row['title']}: {row['state']}: {row['message']}" for row in results["rows"] if row["message"]]


def plot_ablation(results: Ablation, path: str | Path, split: str = "dev") -> None:
    """Draws a dot per row at its mean, a bar of ± one standard deviation, small dots for seeds, as a PNG.

    Raises InputError when matplotlib is not installed or no row has results on the split.
    """
    rows = [row for row in results["rows"] if row[split]]
    if not rows:
        raise InputError(f"no row has results on {split}, so there is nothing to draw")
    matplotlib = required_module("matplotlib")
    figure_module = required_module("matplotlib.figure")
    with matplotlib.rc_context(STYLE):
        figure = figure_module.Figure(
            figsize=(6.8, 1.8 + 0.36 * len(rows)), dpi=DOTS_PER_INCH, layout="constrained"
        )
        panel = figure.subplots()
        panel.axvline(100 * rows[0][split]["mean"], color=GREY, linewidth=0.8, linestyle="--")
        for position, row in enumerate(rows):
            colour = FULL_COLOUR if position == 0 else ROW_COLOUR
            seeds = [100 * run[split]["metric"] for run in row["runs"]]
            panel.plot(seeds, [position] * len(seeds), "o", color=colour, ms=3, alpha=0.45)
            panel.errorbar(
                100 * row[split]["mean"], position, xerr=100 * (row[split]["standard_deviation"] or 0.0),
                fmt="o", color=colour, ms=7, capsize=3,
            )  # fmt: skip
        panel.set_yticks(range(len(rows)), [row["title"] for row in rows])
        panel.invert_yaxis()
        panel.margins(x=0.08, y=0.06)
        panel.set_xlabel(f"{results['metric'].replace('_', ' ')} on {split} × 100, mean ± standard deviation")
        title = f"{results['method']} on {results['data']}: what each part is worth"
        figure.suptitle(wrapped(title, 70), x=0.01, ha="left", fontsize=12, fontweight="bold")
        save_figure(figure, path)


def _own(row: Mapping[str, Any], split: str) -> list[str]:
    measured = row[split]
    if measured is None:
        return [row["state"] if row["state"] != "complete" else "—", "—"]
    deviation = measured["standard_deviation"]
    spread = "" if deviation is None else f" ± {100 * deviation:.1f}"
    return [f"{100 * measured['mean']:.1f}{spread}", f"{100 * measured['difference']:+.1f}"]


def _papers(row: Mapping[str, Any], columns: list[str]) -> list[str]:
    figures = row["figures"]
    if figures is None:
        return ["—"] * (len(columns) + 1)
    mark = "" if figures["verified"] else f" {RECALLED}"
    values = figures["values"]
    return [f"{values[column]:.1f}{mark}" if column in values else "—" for column in columns] + [
        figures["table"]
    ]
