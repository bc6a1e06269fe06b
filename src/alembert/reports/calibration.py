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

    Shown are the full model, the chosen speed (bold), the first one that was not accepted, and others evenly spaced
    between and after them.
    """
    curve, task = results["curve"], results["task"]
    chosen = next(index for index, row in enumerate(curve) if row["speed"] == results["speed"])
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
    for index in _shown(len(curve), chosen):
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
            end_section=index == chosen,
        )
    return table


def verdict(results: Mapping[str, Any]) -> str:
    """The outcome in a sentence or two, with what more rows would bring."""
    speedup = results["at_speed"]["speedup"]
    faster = "" if speedup is None else f" ({speedup:.2f}× fewer MACs)"
    if speedup is not None and speedup < 1:
        faster = f" ({1 / speedup:.2f}× the MACs of speed 0, for few texts leave and all pay for the exits)"
    whose = " of every class" if results["per_class"] else ""
    if results["mode"] == "empirical":
        said = f"the {results['risk']}{whose} was at most {results['max_drop']:g} on these rows; no guarantee"
    elif results["speed"] == 0:
        said = (
            f"no other speed can be shown to keep the {results['risk']}{whose} within {results['max_drop']:g}"
        )
    else:
        said = (
            f"the {results['risk']}{whose} is at most {results['max_drop']:g} "
            f"with {100 * results['confidence']:g}% confidence"
        )
    following = results["next"]
    more = ""
    if results["mode"] != "empirical" and following is not None:
        needed = following["rows_needed"]
        more = (
            f" Speed {following['speed']:g} is over the budget on these rows."
            if needed is None
            else f" For speed {following['speed']:g} it would take about {max(needed, results['rows'] + 1):,} rows."
        )
    return f"Speed {results['speed']:g}{faster}: {said}.{more}"


def _rows_needed(row: Mapping[str, Any], mode: str) -> str:
    if row["accepted"] or mode == "empirical":
        return ""
    return "over budget" if row["rows_needed"] is None else f"{row['rows_needed']:,}"


def _shown(rows: int, chosen: int) -> list[int]:
    kept = {0, chosen, min(chosen + 1, rows - 1)}
    for step in range(1, _MOST_ROWS + 1):
        kept_then = kept | {round(part * (rows - 1) / step) for part in range(step + 1)}
        if len(kept_then) > _MOST_ROWS:
            break
        best = kept_then
    return sorted(best)
