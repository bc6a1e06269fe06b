"""The report's sentences and figures, as page and Markdown share them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MINUS = "−"
COSTS = "A million texts cost %s instead of %s at %s per machine-hour."
"""Of the verdict's model and the baseline, and the price."""
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


def bound(value: float) -> str:
    """A limit in points of a hundred, exactly: rounded it would promise something else."""
    text = f"{100 * value:.6g}"
    return text if "." in text else f"{text}.0"


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
    if value < 1:
        return f"{value:#.2g}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def price(per_hour: float) -> str:
    """A price with two decimals, or more where it has more."""
    return f"{per_hour:.2f}" if round(per_hour, 2) == per_hour else f"{per_hour:g}"


def engine(row: Mapping[str, Any]) -> str:
    """What runs a candidate: library, precision, and the order of batches where it is not said by the library."""
    name = _BACKENDS.get(row["backend"], row["backend"])
    return name if row["precision"] is None else f"{name}, {row['precision']}"


def machine(facts: Mapping[str, Any]) -> str:
    """What time was measured on."""
    if facts.get("device", "cpu") != "cpu":
        return str(facts["device"])
    return f"{facts['processor']}, {facts['threads']} thread{'' if facts['threads'] == 1 else 's'}"


def metric_name(report: Mapping[str, Any]) -> str:
    """The task's metric in words."""
    return str(report["task"]["metric"]).replace("_", " ")


def speed_origin(model: Mapping[str, Any]) -> str:
    """Where the default speed of a model with exits comes from; of a calibrated one the mode: what it is worth."""
    origin = str(model["exits"]["default_from"])
    return str(model["calibration"]["mode"]) if origin == "calibrated" else origin


def headline(report: Mapping[str, Any]) -> str:
    """The verdict in one line: "4.1× cheaper at −0.3 points, 95% sure of ≤ 1.0".

    What the guarantee compares with is named where that is not the baseline, which the loss before it compares with.
    """
    return " ".join(headline_parts(report))


def headline_parts(report: Mapping[str, Any]) -> tuple[str, ...]:
    """The headline as what was measured and, where there is a guarantee, what is promised."""
    verdict = report["verdict"]
    if not verdict["met"]:
        return ("Nothing met the aim",)
    saving = _saving(verdict)
    if verdict["ratio_kind"] == "estimated":
        hedge = "About" if _timed_speeds(report) > 1 else "At best"
        saving = f"{hedge} {saving[0].lower()}{saving[1:]}"
    line = f"{saving} {_change(verdict['drop'], metric_name(report))}"
    guarantee = verdict["guarantee"]
    if guarantee is None:
        return (line,)
    most = bound(guarantee["max_drop"])
    if guarantee.get("scale") is None and verdict["against_baseline"] and guarantee["risk"] != "task-error":
        if guarantee["risk"] == "disagreement":
            promised = f"≤ {most}% changed answers"
        else:
            promised = f"≤ {most}" if metric_name(report) == "accuracy" else f"≤ {most} of accuracy lost"
        return f"{line},", f"{_sure(guarantee)} of {promised}"
    return f"{line},", promise(guarantee, metric_name(report))


def promise(guarantee: Mapping[str, Any], metric: str) -> str:
    """What is promised of a model, and against what, in one line: "95% sure of at most 1 below its own full model".

    Args:
        guarantee: the calibration's facts.
        metric: the task's, in words.
    """
    if guarantee.get("scale") is not None:
        return f"{_sure(guarantee)}: {_about_errors(guarantee)}"
    most, other = bound(guarantee["max_drop"]), _compared_with(guarantee)
    lost = "below" if metric == "accuracy" else "of accuracy lost against"
    promised = {
        "accuracy-drop": f"at most {most} {lost} {other}",
        "disagreement": f"at most {most}% of answers other than those of {other}",
        "task-error": f"≤ {most}% errors",
    }[str(guarantee["risk"])]
    return f"{_sure(guarantee)} of {promised}"


def _sure(guarantee: Mapping[str, Any]) -> str:
    return f"{100 * guarantee['confidence']:g}% sure"


def _about_errors(guarantee: Mapping[str, Any]) -> str:
    """What is promised where labels are numbers: errors count as their share of the scale, at most whole."""
    most, other = f"{guarantee['max_drop'] * guarantee['scale']:g}", _compared_with(guarantee)
    counted = f", no text counting for more than {guarantee['scale']:g}"
    promised = {
        "accuracy-drop": f"the mean error is larger than that of {other} by at most {most}",
        "disagreement": f"answers differ from those of {other} by at most {most} on average",
        "task-error": f"the mean error is at most {most}",
    }[str(guarantee["risk"])]
    return promised + counted


def _compared_with(guarantee: Mapping[str, Any]) -> str:
    return str(guarantee.get("reference") or "its own full model")


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
    """What stands under the headline: what was scored, how fast it is, what is better still."""
    verdict, task = report["verdict"], report["task"]
    sentences, start = [], ""
    if not verdict["met"]:
        # The search's own sentence names what came nearest to its aim.
        sentences, start = [f"{report['compression']['verdict'].rstrip('.')}."], "Measured here, "
    doubts = [f"Mind: {doubt}: scores on them may flatter it." for doubt in report.get("doubts", ())]
    if _is_baseline_alone(report):
        return [*sentences, *doubts]
    low, high = verdict["metric_interval"]
    speed = "" if verdict["speed"] is None else f" at speed {verdict['speed']:g}"
    sentences.append(
        f"{start}{verdict['model']}{speed} reaches {points(verdict['metric'])} {metric_name(report)} (95% interval "
        f"{points(low)} to {points(high)}) where {verdict['baseline']} reaches "
        f"{points(verdict['baseline_metric'])}, on {_rows(task)} texts of {task['name']}, {task['split']}."
    )
    rates = verdict_rates(report)
    if rates is not None:
        kind = "measured" if verdict["ratio_kind"] == "measured" else _estimated(report)
        sentences.append(f"It answers {number(rates[0])} texts a second against {number(rates[1])} ({kind}).")
    if verdict["beaten_by"]:
        other = max(verdict["beaten_by"], key=lambda row: float(row["texts_per_second"]))
        speed = "" if other["speed"] is None else f" at speed {other['speed']:g}"
        sentences.append(
            f"Measured here, {other['name']}{speed} run by {engine(other)} is faster still "
            f"({number(other['texts_per_second'])} texts a second) and no worse ({points(other['metric'])})."
        )
    return [*sentences, *doubts]


def _rows(task: Mapping[str, Any]) -> str:
    drawn_from = task.get("drawn_from")
    return f"the {task['rows']:,}" if drawn_from is None else f"{task['rows']:,} of the {drawn_from:,}"


def _estimated(report: Mapping[str, Any]) -> str:
    """How the rate of the verdict's speed, which nobody timed, was come by."""
    return "estimated from measured speeds" if _timed_speeds(report) > 1 else "at best, by operations"


def _timed_speeds(report: Mapping[str, Any]) -> int:
    """How many speeds of the verdict's model, which has exits, were timed."""
    model = next(model for model in report["models"] if model["name"] == report["verdict"]["model"])
    return len(model["exits"]["measured_speeds"])


def verdict_rates(report: Mapping[str, Any]) -> tuple[float, float] | None:
    """Texts per second of the verdict's model and of the baseline; None where one is not known, or both are one."""
    rates = report["verdict"]["texts_per_second"], report["candidates"][0]["texts_per_second"]
    return None if None in rates or _is_baseline_alone(report) else rates


def _is_baseline_alone(report: Mapping[str, Any]) -> bool:
    """Whether a search found nothing at all to set against the baseline."""
    verdict = report["verdict"]
    return not verdict["met"] and verdict["model"] == report["models"][0]["name"]


def guarantee_sentence(report: Mapping[str, Any]) -> str:
    """What is promised of the verdict's model, and on what; or that nothing is."""
    verdict = report["verdict"]
    guarantee = verdict["guarantee"]
    if guarantee is None:
        return _no_guarantee(verdict)
    most = bound(guarantee["max_drop"])
    whose = " of every class" if guarantee["per_class"] else ""
    other = _compared_with(guarantee)
    promised = {
        "accuracy-drop": f"at most {most} points of accuracy{whose} are lost against {other}",
        "disagreement": f"at most {most}% of the answers{whose} differ from those of {other}",
        "task-error": f"at most {most}% of the answers{whose} are wrong",
    }[guarantee["risk"]]
    if guarantee.get("scale") is not None:
        promised = _about_errors(guarantee)
    further = ""
    if guarantee.get("among"):
        further = (
            f" It was chosen here among {guarantee['among']} that are certified one by one: of all of them together no "
            "more can be said."
        )
    if guarantee["same_rows"]:
        further += " These are the rows of this report, so the score above flatters."
    return (
        f"With {100 * guarantee['confidence']:g}% confidence {promised}, for texts like the {guarantee['rows']:,} of "
        f"{guarantee['data']}, {guarantee['split']}, that it was calibrated on.{further}"
    )


def _no_guarantee(verdict: Mapping[str, Any]) -> str:
    if verdict["default_from"] is None:
        return (
            "Nothing is guaranteed beyond what was measured here. A model without exits has no speed to calibrate, but "
            "can be held against another (alembert calibrate --reference)."
        )
    if verdict["default_from"] == "picked":
        return (
            "Nothing is guaranteed: the model has no calibrated speed, and this one was picked on the very texts that "
            "it is scored on. Calibrate the model on rows of their own (alembert calibrate)."
        )
    if verdict["default_from"] == "own":
        return "Nothing is guaranteed: the speed is a setting of the model, not a calibrated one (alembert calibrate)."
    if verdict["speed"] == 0:
        return (
            "The calibration found no speed above 0 that saves work and that it could vouch for, so the full model "
            "answers every text."
        )
    return "Nothing is guaranteed: the model was calibrated in empirical mode, which promises nothing."
