"""The trade between speed and quality as a table, in the manner of MS-BERT's Table 1."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from alembert.common.errors import InputError
from alembert.common.files import replacing

Results = Mapping[str, Any]
"""What `alembert evaluate` writes for one model and one data set."""

FULL_MODEL = "full model"
BARS = "·▁▂▃▄▅▆▇█"


def speed_rows(results: Results) -> list[dict[str, Any]]:
    """Flat rows, the full model first and then one per speed, all with the same keys in the same order.

    Keys: "model", "data", "speed" ("full model" in the first row), "policy", "top_k", the metric's name (such
    as "accuracy"), "metric_lower", "metric_upper" (confidence interval), "agreement" (with the full model),
    "macs", "flops", "macs_full_convention" (per text), "speedup", "texts_per_second", "ratio_to_full", both
    also with "_lower" and "_upper" (quartiles), and per exit "exit_N", the share of texts that leave after
    layer N. What the results do not have is None.

    Raises:
        InputError: the results lack a part; names it.
    """
    layers = exit_layers(results)
    task, full = part(results, "task"), part(results, "full_model")
    timed = None if full.get("texts_per_second") is None else 1.0
    common = {"model": part(results, "model"), "data": part(results, "data")}
    rows = [
        {
            **common,
            "speed": FULL_MODEL,
            "policy": None,
            "top_k": None,
            **_measured(task["metric"], {"speedup": 1.0, "ratio_to_full": timed, **full}),
            **{f"exit_{layer}": 1.0 if layer == layers[-1] else 0.0 for layer in layers},
        }
    ]
    for entry in part(results, "speeds"):
        rows.append(
            {
                **common,
                "speed": part(entry, "speed"),
                "policy": entry.get("policy"),
                "top_k": entry.get("top_k"),
                **_measured(task["metric"], entry),
                **{f"exit_{layer}": entry["exits"].get(str(layer), 0.0) for layer in layers},
            }
        )
    return rows


def speed_table(results: Results) -> Table:
    """A terminal table, 80 columns wide at most for usual models: one line per speed, the full model first.

    The metric comes with its confidence interval, MACs are millions per text, and a bar per exit shows the
    share of texts that leave there.

    Raises:
        InputError: the results lack a part; names it.
    """
    layers = exit_layers(results)
    metric = str(part(results, "task")["metric"])
    table = Table(
        title=Text(title(results)),
        title_justify="left",
        caption=f"exits: share of texts leaving after layer {', '.join(map(str, layers))}",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for heading in ("speed", metric.replace("_", " "), "MACs\n(M)", "speed-up", "texts/s", "ratio\nto full"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("exits", no_wrap=True)
    for row in speed_rows(results):
        is_full = row["speed"] == FULL_MODEL
        table.add_row(
            "full" if is_full else f"{row['speed']:g}",
            _with_interval(row[metric], row["metric_lower"], row["metric_upper"]),
            f"{row['macs'] / 1e6:,.0f}",
            f"{row['speedup']:.2f}×",
            _or_dash(row["texts_per_second"], ",.1f"),
            _or_dash(row["ratio_to_full"], ".2f"),
            "".join(_bar(row[f"exit_{layer}"]) for layer in layers),
            style="bold" if is_full else None,
            end_section=is_full,
        )
    return table


def write_csv(path: str | Path, results: Results) -> None:
    """Writes `speed_rows` as CSV (UTF-8, a header line), whole or not at all."""
    rows = speed_rows(results)
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def part(mapping: Mapping[str, Any], key: str) -> Any:
    """`mapping[key]`.

    Raises:
        InputError: it is not there.
    """
    if key not in mapping:
        raise InputError(f"The results have no {key!r}: give the JSON that `alembert evaluate` writes.")
    return mapping[key]


def exit_layers(results: Results) -> list[int]:
    """Every layer after which some text may leave, ascending; the last is the full model's."""
    return sorted({int(layer) for entry in part(results, "speeds") for layer in part(entry, "exits")})


def title(results: Results) -> str:
    """Model, data set, split and number of texts in one line."""
    split = f", {results['split']}" if results.get("split") else ""
    return f"{part(results, 'model')} on {part(results, 'data')}{split} ({results.get('rows', '?')} texts)"


def _measured(metric: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    def bounds(key: str, name: str) -> dict[str, Any]:
        lower, upper = entry.get(key) or (None, None)
        return {f"{name}_lower": lower, f"{name}_upper": upper}

    return {
        metric: part(entry, "metric"),
        **bounds("metric_interval", "metric"),
        "agreement": entry.get("agreement"),
        "macs": part(entry, "macs"),
        "flops": part(entry, "flops"),
        "macs_full_convention": entry.get("macs_full_convention"),
        "speedup": part(entry, "speedup"),
        "texts_per_second": entry.get("texts_per_second"),
        **bounds("texts_per_second_quartiles", "texts_per_second"),
        "ratio_to_full": entry.get("ratio_to_full"),
        **bounds("ratio_to_full_quartiles", "ratio_to_full"),
    }


def _with_interval(value: float, lower: float | None, upper: float | None) -> str:
    if lower is None or upper is None:
        return f"{value:.3f}"
    return f"{value:.3f} [dim]{lower:.3f}…{upper:.3f}[/dim]"


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _bar(share: float) -> str:
    # Any share at all shows: what looks empty is empty.
    return BARS[max(1, round(share * (len(BARS) - 1)))] if share > 0 else BARS[0]
