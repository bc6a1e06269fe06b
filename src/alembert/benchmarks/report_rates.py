"""Texts per second at speeds that nobody timed, from those that somebody did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def measured_rates(rows: Sequence[Mapping[str, Any]], model: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows of a benchmark that hold a model's own speeds, of one engine, by falling MACs.

    Rows whose MACs or time are not known are left out, and those of another policy than the model's. Where several
    engines ran the model the first one counts.

    Args:
        rows: "results" of `alembert benchmark`.
        model: of the report's "models", with exits.
    """
    policy = model["exits"]["policy"]
    own = [row for row in own_rows(rows, model) if row["speed"] is not None and _same_policy(row, policy)]
    first = [row for row in own if engine_of(row) == engine_of(own[0])]
    known = [row for row in first if row["macs"] and row["texts_per_second"]]
    return sorted(known, key=lambda row: -float(row["macs"]))


def own_rows(rows: Sequence[Mapping[str, Any]], model: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows of a model as Alembert loads its folder, which is not what else the benchmark made of it."""
    own = rows_of(rows, model["source"])
    if model["exported"]:
        return [row for row in own if row["backend"] == "onnx"]
    return [row for row in own if (row["backend"], row["precision"]) == ("torch", model["precision"])]


def _same_policy(row: Mapping[str, Any], policy: Mapping[str, Any]) -> bool:
    """Whether a row was measured under a policy, as far as the row says."""
    if row["policy"] is None:
        return True
    settings = {name: value for name, value in policy.items() if name != "name"}
    return row["policy"] == policy["name"] and all(
        row.get(key, value) == value for key, value in settings.items()
    )


def rows_of(rows: Sequence[Mapping[str, Any]], source: str) -> list[Mapping[str, Any]]:
    """The rows of the model that was given as `source`: they have that name, or its folder's."""
    same = [row for row in rows if row["name"] == source]
    return same or [row for row in rows if row["name"] == Path(source).name]


def engine_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What runs a row's model, whatever the speed."""
    return tuple(row[key] for key in ("name", "backend", "precision", "batching"))


def estimated_rates(
    points: Sequence[Mapping[str, Any]], macs: Sequence[float | None]
) -> list[float | None] | None:
    """Texts per second at so many MACs per text, read off measured rows; None without any.

    Time per text is taken to run straight between measured points. Beyond them the line through the outermost two goes
    on, which never falls faster than the MACs do. A single point is scaled by the MACs.

    Args:
        points: rows with "macs" and "texts_per_second".
        macs: of each speed; None where nobody counted.
    """
    if not points:
        return None
    by_macs = {float(row["macs"]): 1 / float(row["texts_per_second"]) for row in points}
    x = np.array(sorted(by_macs))
    y = np.array([by_macs[value] for value in x])
    return [None if value is None else 1 / _seconds(x, y, float(value)) for value in macs]


def speeds_along(
    speeds: Sequence[float], macs: Sequence[float | None], shares: Sequence[float]
) -> list[float]:
    """The speeds that come nearest to saving these shares of all that can be saved; none where MACs are not known.

    Args:
        speeds: ascending from 0.
        macs: of each, per text.
        shares: in (0, 1).
    """
    if None in macs:
        return []
    costs = np.array(macs, float)
    wanted = [costs[0] - share * (costs[0] - costs.min()) for share in shares]
    return [speeds[int(np.abs(costs - at).argmin())] for at in wanted]


def _seconds(x: Any, y: Any, macs: float) -> float:
    if x[0] <= macs <= x[-1]:
        return float(np.interp(macs, x, y))
    end = 0 if macs < x[0] else -1
    proportional = float(y[end] * macs / x[end])
    if len(x) == 1:
        return proportional
    slope = max(0.0, float((y[-1] - y[0]) / (x[-1] - x[0])))
    line = float(y[end] + slope * (macs - x[end]))
    # Below the cheapest point time cannot fall faster than work; above the dearest it cannot grow faster.
    return max(line, proportional) if end == 0 else min(line, proportional)
