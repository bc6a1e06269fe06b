"""A calibration as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

_MOST_ROWS = 14


def calibration_table(results: Mapping[str, Any]) -> Table:
    """The curve that `alembert calibrate` chose a speed from, for the terminal: at most 14 of its speeds.

    Shown are the full model, the chosen speed (bold), the last one that was accepted and the first that was not, and
    others evenly spaced between and after them.
    """
    curve, task = results["curve"], results["task"]
    chosen = next(index for index, row in enumerate(curve) if row["speed"] == results["speed"])
    last = sum(row["accepted"] for row in curve) - 1
    table = Table(
        title=Text(
            f"{results['model']} on {results['data']}, {results['split']} ({results['rows']} texts): "
            f"{results['risk']} within {results['max_drop']:g}"
        ),
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    risk = "risk seen" if not results["per_class"] else "worst class"
    for heading in (
        "speed",
        risk,
        "p-value",
        task["metric"].replace("_", " "),
        "changed",
        "speed-up",
        "rows needed",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for index in _shown(len(curve), {0, chosen, last, min(last + 1, len(curve) - 1)}):
        row = curve[index]
        table.add_row(
            f"{row['speed']:g}",
            f"{row['risk']:+.4f}",
            "–" if row["p_value"] is None else f"{row['p_value']:.4f}",
            f"{row['metric']:.4f}",
            f"{row['changed']:.2%}",
            "–" if row["speedup"] is None else f"{row['speedup']:.2f}×",
            _rows_needed(row, results["mode"]),
            style="bold" if index == chosen else ("" if row["accepted"] else "dim"),
            end_section=index == last,
        )
    return table


def verdict(results: Mapping[str, Any]) -> str:
    """The outcome in a sentence or two, with what more rows would bring."""
    curve, speed, most = results["curve"], results["speed"], results["max_drop"]
    risk = f"{results['risk']} of every class" if results["per_class"] else results["risk"]
    if results["reference"] and results["risk"] != "task-error":
        risk = f"{risk} against {results['reference']}"
    if results["mode"] == "empirical":
        kept = f"the {risk} was at most {most:g} on these rows; no guarantee"
    else:
        kept = f"the {risk} is at most {most:g} with {100 * results['confidence']:g}% confidence"
    largest = [row for row in curve if row["accepted"]][-1]
    if len(curve) == 1:
        said = f"The model as it is, without exits: {kept}."
    elif largest["speed"] > speed:
        said = (
            f"Speed 0, though up to speed {largest['speed']:g} {kept}: that speed takes "
            f"{1 / largest['speedup']:.2f}× the MACs of speed 0, for few texts leave and all pay for the exits."
        )
    elif speed == 0 and results["mode"] != "empirical":
        # Where speed 0 was tested itself, it has a p-value.
        full = "" if curve[0]["p_value"] is None else f"{kept}; "
        said = f"Speed 0: {full}no other speed can be shown to keep the {risk} within {most:g}."
    else:
        speedup = results["at_speed"]["speedup"]
        said = f"Speed {speed:g}{'' if speedup is None else f' ({speedup:.2f}× fewer MACs)'}: {kept}."
    if results["left_out"]:
        said += f" {results['left_out']:,} rows that stand in train too were left out."
    following = results["next"]
    if results["mode"] == "empirical" or following is None:
        return said
    if following["rows_needed"] is None:
        return f"{said} Speed {following['speed']:g} is over the budget on these rows."
    needed = max(following["rows_needed"], results["rows"] + 1)
    return f"{said} For speed {following['speed']:g} it would take about {needed:,} rows."


def _rows_needed(row: Mapping[str, Any], mode: str) -> str:
    if row["accepted"] or mode == "empirical":
        return ""
    return "over budget" if row["rows_needed"] is None else f"{row['rows_needed']:,}"


def _shown(rows: int, kept: set[int]) -> list[int]:
    best = kept
    for step in range(1, _MOST_ROWS + 1):
        kept_then = kept | {round(part * (rows - 1) / step) for part in range(step + 1)}
        if len(kept_then) > _MOST_ROWS:
            break
        best = kept_then
    return sorted(best)
