"""What `alembert compress` says of its candidates: a line each, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alembert.benchmarks.risk_budget import CERTIFIED, RiskBudget
from alembert.compression.candidates import Certificate

_MOST_TIMES_THE_ROWS = 10


def describe_candidate(
    name: str,
    certificate: Certificate,
    row: dict[str, Any] | None,
    baseline: dict[str, Any],
    is_dominated: bool,
) -> dict[str, Any]:
    """A line of the summary; "metric_difference" is to the teacher's metric, on the benchmark's split."""
    measured: dict[str, Any] = dict.fromkeys(
        ("metric", "metric_difference", "texts_per_second", "ratio", "p50_ms", "speedup")
    )
    if row is not None:
        measured = {
            "metric": row["metric"],
            "metric_difference": row["metric"] - baseline["metric"],
            "texts_per_second": row["texts_per_second"],
            "ratio": row["ratio_to_baseline"],
            "p50_ms": row["p50_ms"],
            "speedup": row["speedup"],
        }
    return (
        {"name": name, "precision": "int8"} | certificate.as_json() | measured | {"dominated": is_dominated}
    )


def outcome(candidate: Mapping[str, Any], best: Mapping[str, Any] | None) -> str:
    """What became of a candidate, in a word or two."""
    if best is not None and candidate["name"] == best["name"]:
        return "best"
    if candidate["ratio"] is None:
        return "over the budget"
    if not candidate["kept"]:
        return f"not sure: takes about {candidate['rows_needed']:,} dev rows"
    return "dominated" if candidate["dominated"] else "keeps to the budget"


def verdict(
    best: Mapping[str, Any] | None,
    candidates: Sequence[Mapping[str, Any]],
    budget: RiskBudget,
    min_speedup: float | None,
    metric: str = "accuracy",
) -> str:
    """The outcome in one sentence; where nothing met what was asked, the nearest candidate.

    Args:
        best: the candidate that was taken, or None.
        candidates: all, as `describe_candidate` gives them.
        budget: what was asked, in the mode in which it was tested.
        min_speedup: what else was asked.
        metric: whose difference is shown; the promise is of accuracy, or of the mean error where there is a scale.
    """
    points = f"{100 * budget.most:g} points"
    most = f"at most {points}"
    if budget.scale is not None:
        most = (
            f"a mean error larger by at most {budget.most * budget.scale:g}, no text counting for more than "
            f"{budget.scale:g}"
        )
    elif metric != "accuracy":
        most += " of accuracy lost"
    sure = f"{100 * budget.confidence:g}% sure of {most}"
    if budget.mode != CERTIFIED:
        sure = f"{most} on dev, which guarantees nothing"
    if best is not None:
        return f"{best['name']} in {best['precision']}: {_gain(best)}; {sure}"
    kept = [candidate for candidate in candidates if candidate["kept"]]
    if kept:
        nearest = max(kept, key=lambda candidate: float(candidate["ratio"]))
        return (
            f"nothing is {min_speedup:g} times as fast within {points}; nearest is {nearest['name']} with "
            f"{nearest['ratio']:.1f} times the teacher's texts per second"
        )
    nearest = min(candidates, key=lambda candidate: float(candidate["risk"]))
    change, remedy = 100 * nearest["risk"], "allow more, or give more dev rows"
    if budget.mode != CERTIFIED:
        remedy = "allow more"
    return (
        f"nothing could be shown to stay within {points}; nearest is {nearest['name']}, which "
        f"{'lost' if change >= 0 else 'gained'} {abs(change):.1f} points on dev: {remedy}"
    )


def unsure(
    best: Mapping[str, Any] | None,
    candidates: Sequence[Mapping[str, Any]],
    dev_rows: int,
    *,
    min_speedup: float | None = None,
) -> str | None:
    """A sentence on the fastest candidate that might be taken if there were more dev rows; None where there is none.

    Args:
        best: the candidate that was taken, or None.
        candidates: all, as `describe_candidate` gives them.
        dev_rows: how many there are; what would take over ten times as many is not spoken of.
        min_speedup: what was asked besides the drop.
    """
    least = max(min_speedup or 0.0, 0.0 if best is None else float(best["ratio"]))
    faster = [
        candidate
        for candidate in candidates
        if not candidate["kept"]
        and candidate["rows_needed"] is not None
        and candidate["rows_needed"] <= _MOST_TIMES_THE_ROWS * dev_rows
        and candidate["ratio"] is not None
        and candidate["ratio"] > least
    ]
    if not faster:
        return None
    fastest = max(faster, key=lambda candidate: float(candidate["ratio"]))
    needed = f"about {fastest['rows_needed']:,} dev rows would tell"
    return f"perhaps, but not surely: {fastest['name']}, {_gain(fastest)}; {needed}"


def _gain(candidate: Mapping[str, Any]) -> str:
    return (
        f"{candidate['ratio']:.1f} times the teacher's texts per second at "
        f"{100 * candidate['metric_difference']:+.1f} points"
    )
