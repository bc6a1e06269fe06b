"""The report's sentences and figures, as page and Markdown share them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MINUS = "−"
_BACKENDS = {
    "transformers": "transformers",
    "onnxruntime": "ONNX Runtime",
    "torch": "Alembert, torch",
    "onnx": "Alembert, ONNX Runtime",
    "outside": "outside program",
}


def points(value: float | None, digits: int = 1) -> str:
    """A metric or a share as points of a hundred; a dash where it is not known."""
    return "–" if value is None else f"{100 * value:.{digits}f}".replace("-", MINUS)


def signed_points(value: float) -> str:
    """A difference of metrics in points, with its sign."""
    return f"{100 * value:+.1f}".replace("-", MINUS)


def times(value: float | None) -> str:
    """A ratio, such as 4.1×; a dash where it is not known."""
    if value is None:
        return "–"
    return f"{value:,.0f}×" if value >= 100 else f"{value:.3g}×" if value >= 10 else f"{value:.2f}×"


def number(value: float | None, digits: int = 3) -> str:
    """A quantity with about three digits and separators of thousands; a dash where it is not known."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.{digits}g}"


def operations(macs: float | None) -> str:
    """FLOPs per text, two for each multiply-accumulate, with a unit."""
    if macs is None:
        return "–"
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if 2 * macs >= limit:
            return f"{2 * macs / limit:.3g} {unit}"
    return f"{2 * macs:,.0f}"


def cost_per_million(rate: float | None, price_per_hour: float) -> float | None:
    """What a million texts cost on a machine of that price that answers `rate` texts per second."""
    return None if not rate else 1e6 / rate / 3600 * price_per_hour


def cost(rate: float | None, price_per_hour: float) -> str:
    """`cost_per_million` in words."""
    value = cost_per_million(rate, price_per_hour)
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def price(per_hour: float) -> str:
    """A price with two decimals, or more where it has more."""
    return f"{per_hour:.2f}" if round(per_hour, 2) == per_hour else f"{per_hour:g}"


def engine(row: Mapping[str, Any]) -> str:
    """What runs a candidate: library, precision, and the order of batches where it is not said by the library."""
    name = _BACKENDS.get(row["backend"], row["backend"])
    return name if row["precision"] is None else f"{name}, {row['precision']}"


def metric_name(report: Mapping[str, Any]) -> str:
    """The task's metric in words."""
    return str(report["task"]["metric"]).replace("_", " ")


def headline(report: Mapping[str, Any]) -> str:
    """The verdict in one line: "4.1× cheaper at −0.3 points, 95% sure of ≤ 1.0"."""
    return " ".join(headline_parts(report))


def headline_parts(report: Mapping[str, Any]) -> tuple[str, ...]:
    """The headline as what was measured and, where there is a guarantee, what is promised."""
    verdict = report["verdict"]
    line = f"{_saving(verdict)} {_change(verdict['drop'], metric_name(report))}"
    guarantee = verdict["guarantee"]
    if guarantee is None:
        return (line,)
    sure = f"{100 * guarantee['confidence']:g}% sure of ≤ {points(guarantee['max_drop'])}"
    if guarantee["risk"] == "disagreement":
        sure += "% changed answers"
    elif guarantee["risk"] == "task-error":
        sure += "% errors"
    return f"{line},", sure


def _saving(verdict: Mapping[str, Any]) -> str:
    ratio, what = verdict["ratio"], "cheaper"
    if ratio is None:
        ratio, what = verdict["fewer_macs"], "fewer operations"
    if ratio is None:
        return "Cost not measured,"
    if 0.95 < ratio < 1.05:
        return "No cheaper" if what == "cheaper" else "No fewer operations"
    if ratio >= 1:
        return f"{ratio:.1f}× {what}"
    return f"{1 / ratio:.1f}× {'dearer' if what == 'cheaper' else 'more operations'}"


def _change(drop: float, metric: str) -> str:
    if abs(drop) < 0.0005:
        return f"at the same {metric}"
    return f"at {signed_points(-drop)} points"


def verdict_sentences(report: Mapping[str, Any]) -> list[str]:
    """What stands under the headline: what was scored, what it costs."""
    verdict, task, per_hour = report["verdict"], report["task"], report["price_per_hour"]
    low, high = verdict["metric_interval"]
    speed = "" if verdict["speed"] is None else f" at speed {verdict['speed']:g}"
    sentences = [
        f"{verdict['model']}{speed} reaches {points(verdict['metric'])} {metric_name(report)} (95% interval "
        f"{points(low)} to {points(high)}) where {verdict['baseline']} reaches "
        f"{points(verdict['baseline_metric'])}, on the {task['rows']:,} texts of {task['name']}, {task['split']}."
    ]
    rate, baseline = verdict["texts_per_second"], report["candidates"][0]["texts_per_second"]
    if rate is not None and baseline is not None:
        kind = "measured" if verdict["ratio_kind"] == "measured" else "estimated from measured speeds"
        sentences.append(
            f"It answers {number(rate)} texts a second against {number(baseline)} ({kind}): a million texts cost "
            f"{cost(rate, per_hour)} instead of {cost(baseline, per_hour)} at {price(per_hour)} per machine-hour."
        )
    if verdict["beaten_by"]:
        other = max(verdict["beaten_by"], key=lambda row: float(row["texts_per_second"]))
        sentences.append(
            f"Measured here, {other['name']} run by {engine(other)} is faster still "
            f"({number(other['texts_per_second'])} texts a second) and no worse ({points(other['metric'])})."
        )
    return sentences


def guarantee_sentence(report: Mapping[str, Any]) -> str:
    """What is promised of the verdict's model, and on what; or that nothing is."""
    verdict = report["verdict"]
    guarantee = verdict["guarantee"]
    if guarantee is None:
        return _no_guarantee(verdict)
    most = points(guarantee["max_drop"])
    whose = " of every class" if guarantee["per_class"] else ""
    other = guarantee.get("reference") or "its own full model"
    promised = {
        "accuracy-drop": f"at most {most} points of accuracy{whose} are lost against {other}",
        "disagreement": f"at most {most}% of the answers{whose} differ from those of {other}",
        "task-error": f"at most {most}% of the answers{whose} are wrong",
    }[guarantee["risk"]]
    seen = (
        " These are the rows of this report, so the score above flatters." if guarantee["same_rows"] else ""
    )
    return (
        f"With {100 * guarantee['confidence']:g}% confidence {promised}, for texts like the {guarantee['rows']:,} of "
        f"{guarantee['data']}, {guarantee['split']}, that it was calibrated on.{seen}"
    )


def _no_guarantee(verdict: Mapping[str, Any]) -> str:
    if verdict["speed"] is None:
        return "Nothing is guaranteed beyond what was measured here: a model without exits has no speed to calibrate."
    if verdict["default_from"] == "picked":
        return (
            "Nothing is guaranteed: the model has no calibrated speed, and this one was picked on the very texts that "
            "it is scored on. Calibrate the model on rows of their own (alembert calibrate)."
        )
    if verdict["default_from"] == "own":
        return "Nothing is guaranteed: the speed is a setting of the model, not a calibrated one (alembert calibrate)."
    if not verdict["speed"]:
        return "The calibration found no speed above 0 that it could vouch for, so the full model answers every text."
    return "Nothing is guaranteed: the speed was calibrated in empirical mode, which promises nothing."
