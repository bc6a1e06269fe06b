"""What a report says first: which model to take, what it saves, what it loses, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alembert.benchmarks.report_models import CALIBRATED, TOLERATED_DROP
from alembert.benchmarks.report_rates import is_of, measured_rates
from alembert.benchmarks.risk_budget import CERTIFIED

MEASURED, ESTIMATED = "measured", "estimated"


def verdict(
    models: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    lead: str | None = None,
    promise: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The offer to put first, against the baseline, which is the benchmark's first row.

    Every given model makes one offer: itself, at its default speed where it has exits. Of those that save time at a
    certified speed the fastest is taken; else the fastest that loses at most a point of the baseline's metric; else the
    one that loses least.

    Args:
        models: the report's "models".
        rows: the report's "candidates".
        lead: source of the model to put first, chosen elsewhere.
        promise: what is guaranteed of that model, in place of its own calibration's facts.

    Returns:
        The chosen offer: "model", "speed" (None without exits), "default_from", "metric", "metric_interval", "drop"
        (baseline's metric less this one), "ratio" (texts per second over the baseline's), "ratio_kind" ("measured",
        "estimated" or None), "texts_per_second", "fewer_macs" (times) and "guarantee" (None, or the calibration's facts
        where it is certified); "baseline" and "baseline_metric"; and "beaten_by", names and engines of candidates of
        other models or engines that were measured both faster and no worse.
    """
    offers = [_offer(model, rows) for model in models]
    baseline = rows[0]
    certified = [o for o in offers if o["guarantee"] is not None and (_ratio(o) > 1)]
    close = [offer for offer in offers if offer["drop"] <= TOLERATED_DROP]
    if lead is not None:
        chosen = next(o for o, model in zip(offers, models, strict=True) if model["source"] == lead)
        chosen |= {"guarantee": promise or chosen["guarantee"]}
    elif certified:
        chosen = max(certified, key=_ratio)
    elif close:
        chosen = max(close, key=_ratio)
    else:
        chosen = min(offers, key=lambda offer: offer["drop"])
    return chosen | {
        "baseline": f"{baseline['name']} ({baseline['backend']} {baseline['precision']})",
        "baseline_metric": baseline["metric"],
        "beaten_by": _better(chosen, rows),
    }


def _better(chosen: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    rate = chosen["texts_per_second"]
    return [
        {key: row[key] for key in ("name", "backend", "precision", "batching", "metric", "texts_per_second")}
        for row in rows
        if rate and (row["texts_per_second"] or 0) > rate and row["metric"] >= chosen["metric"]
    ]


def _ratio(offer: Mapping[str, Any]) -> float:
    return float(offer["ratio"] or 0.0)


def _offer(model: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    exits, baseline = model["exits"], rows[0]
    speed = None if exits is None else exits["default_speed"]
    own = [row for row in rows if is_of(row, model["source"]) and row["backend"] in ("torch", "onnx")]
    if exits is not None:
        engine = measured_rates(rows, model["source"])
        own = [row for row in (engine or own) if row["speed"] == speed]
    row = own[0] if own else None
    offer: dict[str, Any] = {
        "model": model["name"],
        "speed": speed,
        "default_from": None if exits is None else exits["default_from"],
        "guarantee": None,
    }
    if exits is not None:
        calibration = exits["calibration"]
        if exits["default_from"] == CALIBRATED and calibration["mode"] == CERTIFIED and speed:
            offer["guarantee"] = calibration
    if row is not None:
        return offer | {
            "metric": row["metric"],
            "metric_interval": row["metric_interval"],
            "drop": baseline["metric"] - row["metric"],
            "ratio": row["ratio_to_baseline"],
            "ratio_kind": MEASURED if row["ratio_to_baseline"] is not None else None,
            "texts_per_second": row["texts_per_second"],
            "fewer_macs": row["speedup"],
        }
    return offer | _replayed(model, exits, speed, baseline)


def _replayed(
    model: Mapping[str, Any],
    exits: Mapping[str, Any] | None,
    speed: float | None,
    baseline: Mapping[str, Any],
) -> dict[str, Any]:
    """The offer of a model that nobody timed at its default speed."""
    if exits is None:
        metric = model["metric"]
        unknown = dict.fromkeys(("ratio", "ratio_kind", "texts_per_second", "fewer_macs"))
        return {
            "metric": metric,
            "metric_interval": model["metric_interval"],
            "drop": baseline["metric"] - metric,
            **unknown,
        }
    place, curve = exits["speeds"].index(speed), exits["curve"]
    rate = exits["texts_per_second"][place] if exits["texts_per_second"] else None
    known = rate is not None and baseline["texts_per_second"]
    macs = curve["macs"][place]
    return {
        "metric": curve["metric"][place],
        "metric_interval": [curve["low"][place], curve["high"][place]],
        "drop": baseline["metric"] - curve["metric"][place],
        "ratio": rate / baseline["texts_per_second"] if known else None,
        "ratio_kind": ESTIMATED if known else None,
        "texts_per_second": rate,
        "fewer_macs": baseline["macs"] / macs if macs and baseline["macs"] else None,
    }
