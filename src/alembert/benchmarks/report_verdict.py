"""What a report says first: which model to take, what it saves, what it loses, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alembert.benchmarks.report_models import CALIBRATED, TOLERATED_DROP
from alembert.benchmarks.report_rates import engine_of, measured_rates, own_rows
from alembert.benchmarks.risk_budget import TASK_ERROR

MEASURED, ESTIMATED = "measured", "estimated"
_ROUNDING = 1e-9


def verdict(
    models: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    lead: str | None = None,
    promise: Mapping[str, Any] | None = None,
    met: bool = True,
) -> dict[str, Any]:
    """The offer to put first, against the baseline, which is the benchmark's first row.

    Every given model makes one offer: itself, at its default speed where it has exits. Of those that are certified,
    save time and lose no more of the baseline's metric than was promised the fastest is taken; else the fastest that
    loses at most a point of it; else the one that loses least. A choice among several certified offers is as sure
    as all of their promises are together, by the union bound.

    Args:
        models: the report's "models"; the first is the baseline's.
        rows: the report's "candidates".
        lead: source of the model to put first, chosen elsewhere.
        promise: what is guaranteed of that model against the baseline, in place of its own calibration's facts.
        met: False where a search found nothing that met its aim: then the baseline itself is offered only if nothing
            else is there.

    Returns:
        The chosen offer: "model", "speed" (None without exits), "default_from" (None without exits or calibration),
        "metric", "metric_interval", "drop" (baseline's metric less this one), "ratio" (texts per second over the
        baseline's), "ratio_kind" ("measured", "estimated" or None), "texts_per_second", "fewer_macs" (times),
        "guarantee" (None, or the calibration's facts where it is certified; chosen among several with "among", how
        many, and the "confidence" of all together) and "against_baseline" (whether the guarantee compares with the
        baseline's model); "baseline" and "baseline_metric"; "met"; and "beaten_by", names,
        engines and speeds of candidates of other models or engines that were measured both faster and no worse.
    """
    offers = [_offer(model, rows) for model in models]
    if lead is not None:
        chosen = next(o for o, model in zip(offers, models, strict=True) if model["source"] == lead)
        if promise is not None:
            chosen |= {"guarantee": promise, "against_baseline": True}
    else:
        chosen = _best(offers if met else offers[1:] or offers)
        chosen |= {"guarantee": _of_choice(chosen["guarantee"], offers)}
    model = next(model for model in models if model["name"] == chosen["model"])
    baseline = rows[0]
    return chosen | {
        "baseline": f"{baseline['name']} ({baseline['backend']} {baseline['precision']})",
        "baseline_metric": baseline["metric"],
        "met": met,
        "beaten_by": _better(chosen, model, rows),
    }


def _best(offers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    certified = [offer for offer in offers if offer["guarantee"] and _ratio(offer) > 1]
    kept = [offer for offer in certified if _loses_at_most(offer, _promised_drop(offer["guarantee"]))]
    fitting = kept or [offer for offer in offers if _loses_at_most(offer, TOLERATED_DROP)]
    return max(fitting, key=_ratio) if fitting else min(offers, key=lambda offer: float(offer["drop"]))


def _of_choice(
    guarantee: Mapping[str, Any] | None, offers: Sequence[Mapping[str, Any]]
) -> Mapping[str, Any] | None:
    """A guarantee as it holds of an offer that was chosen for its score among all that are certified."""
    # One calibration beside a model and its export promises one thing.
    promises: list[Mapping[str, Any]] = []
    for offer in offers:
        if offer["guarantee"] is not None and offer["guarantee"] not in promises:
            promises.append(offer["guarantee"])
    if guarantee is None or len(promises) == 1:
        return guarantee
    doubt = sum(1 - promise["confidence"] for promise in promises)
    return {**guarantee, "among": len(promises), "confidence": max(0.0, round(1 - doubt, 9))}


def _loses_at_most(offer: Mapping[str, Any], most: float) -> bool:
    return bool(offer["drop"] <= most + _ROUNDING)


def _promised_drop(guarantee: Mapping[str, Any]) -> float:
    """What may be lost of the metric under a guarantee; one of errors, or of a share of a scale, says nothing of it."""
    other = guarantee.get("risk") == TASK_ERROR or guarantee.get("scale") is not None
    return TOLERATED_DROP if other else float(guarantee["max_drop"])


def _better(
    chosen: Mapping[str, Any], model: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    own = own_rows(rows, model)
    keys = ("name", "backend", "precision", "batching", "speed", "metric", "texts_per_second")
    return [
        {key: row[key] for key in keys}
        for row in rows
        if 0 < _ratio(chosen) < (row["ratio_to_baseline"] or 0.0) and row["metric"] >= chosen["metric"]
        if not own or engine_of(row) != engine_of(own[0])
    ]


def _ratio(offer: Mapping[str, Any]) -> float:
    return float(offer["ratio"] or 0.0)


def _offer(model: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    exits, calibration, baseline = model["exits"], model["calibration"], rows[0]
    speed = None if exits is None else exits["default_speed"]
    own = own_rows(rows, model)
    if exits is not None:
        own = [row for row in measured_rates(rows, model) or own if row["speed"] == speed]
    row = own[0] if own else None
    origin = exits["default_from"] if exits is not None else CALIBRATED if calibration is not None else None
    offer: dict[str, Any] = {
        "model": model["name"],
        "speed": speed,
        "default_from": origin,
        "guarantee": None,
        "against_baseline": False,
    }
    if origin == CALIBRATED and (speed or 0.0) in calibration["certified_speeds"]:
        offer |= {"guarantee": calibration, "against_baseline": calibration["against_baseline"]}
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
    rate, ratio = (exits[key] and exits[key][place] for key in ("texts_per_second", "ratio_to_baseline"))
    macs = curve["macs"][place]
    return {
        "metric": curve["metric"][place],
        "metric_interval": [curve["low"][place], curve["high"][place]],
        "drop": baseline["metric"] - curve["metric"][place],
        "ratio": ratio,
        "ratio_kind": None if ratio is None else ESTIMATED,
        "texts_per_second": rate,
        "fewer_macs": baseline["macs"] / macs if macs and baseline["macs"] else None,
    }
