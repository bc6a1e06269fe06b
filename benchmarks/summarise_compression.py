"""The tables of docs/results/compress-tables.md, from what `alembert compress` left.

    python benchmarks/summarise_compression.py --output docs/results/compress-tables.md docs/results/compress-*.json

Each file is a `summary.json`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alembert.common.files import write_text
from alembert.compression.choice import outcome
from alembert.compression.durations import format_duration

HEAD = """# Compress: tables

Written by `benchmarks/summarise_compression.py` from the `summary.json` of each work; [what they mean](compress.md).
"""
COLUMNS = (
    "model",
    "speed",
    "accuracy",
    "difference",
    "texts/s",
    "× teacher",
    "p50 ms",
    "lost on dev",
    "outcome",
)


def main(arguments: Sequence[str] | None = None) -> str:
    """Writes the page, and returns it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("summaries", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args(arguments)
    parts = [
        section(path.stem.removeprefix("compress-"), json.loads(path.read_text())) for path in given.summaries
    ]
    page = "\n".join([HEAD, *parts])
    write_text(given.output, page)
    return page


def section(name: str, summary: Mapping[str, Any]) -> str:
    """A heading, the verdict and the candidates of one work, as Markdown."""
    budget = summary["budget_seconds"]
    took = f"It took {format_duration(summary['seconds'])}"
    took += "." if budget is None else f" of {format_duration(budget)}."
    lines = [f"## {name}", "", f"**{_sentence(summary['verdict'])}**"]
    if summary["unsure"]:
        lines += ["", _sentence(summary["unsure"])]
    trained = ", ".join(
        f"{training} {format_duration(record['seconds'])}"
        for training, record in summary["trainings"].items()
        if record["status"] == "done"
    )
    lines += ["", f"{took} Trained: {trained}.", "", _line(COLUMNS), _line(["---"] * len(COLUMNS))]
    lines += [_line(_candidate(row, summary["best"])) for row in summary["candidates"]]
    return "\n".join([*lines, ""])


def _candidate(row: Mapping[str, Any], best: Mapping[str, Any] | None) -> list[str]:
    if row["ratio"] is None:
        return [row["name"], *["–"] * 6, f"{100 * row['risk']:.1f}", outcome(row, best)]
    return [
        row["name"],
        f"{row['speed']:g}",
        f"{100 * row['metric']:.1f}",
        f"{100 * row['metric_difference']:+.1f}",
        f"{row['texts_per_second']:,.0f}",
        f"{row['ratio']:.1f}",
        f"{row['p50_ms']:.1f}",
        f"{100 * row['risk']:.1f}",
        outcome(row, best),
    ]


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
