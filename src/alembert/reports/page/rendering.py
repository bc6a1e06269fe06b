"""The page: template, style and scripts filled with the report, in one file that needs nothing from outside."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from alembert.common.errors import InputError
from alembert.common.files import write_text
from alembert.reports.figures import required_module
from alembert.reports.page import wording

Report = Mapping[str, Any]
"""What `collect_report` returns."""

PARTS: tuple[str, ...] = (
    *("title", "created", "alembert_version", "task", "machine", "price_per_hour", "benchmark"),
    *("verdict", "candidates", "models"),
)
_THEME_SCRIPT = "theme.js"
_SCRIPTS = ("charts.js", "page.js")


def check_report(report: Report) -> None:
    """Raises InputError naming a part that the report lacks."""
    missing = [part for part in PARTS if part not in report]
    if missing:
        raise InputError(f"The report has no {missing[0]!r}: give the JSON that `alembert report` writes.")


def write_page(path: str | Path, report: Report) -> None:
    """Writes `render_page`, whole or not at all."""
    write_text(path, render_page(report))


def render_page(report: Report) -> str:
    """The report as HTML: style, scripts and data inside, every text escaped, no address of anything outside.

    The page's own policy (Content-Security-Policy) forbids loading anything, and running scripts other than its own.

    Raises:
        InputError: jinja2 is not installed, or a part of the report is missing.
    """
    check_report(report)
    jinja = required_module("jinja2")
    environment = jinja.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja.StrictUndefined
    )
    environment.filters |= {
        "points": wording.points,
        "signed_points": wording.signed_points,
        "times": wording.times,
        "number": wording.number,
        "operations": wording.operations,
        "engine": wording.engine,
        "flat": lambda value: list(flat(value)),
        "facts": model_facts,
        "shown": shown,
    }
    safe = environment.filters["safe"]
    theme, script = _asset(_THEME_SCRIPT), "\n".join(_asset(name) for name in _SCRIPTS)
    return str(
        environment.from_string(_asset("page.html.j2")).render(
            report=report,
            metric=wording.metric_name(report),
            machine=wording.machine(report["machine"]),
            headline=wording.headline(report),
            headline_parts=wording.headline_parts(report),
            sentences=wording.verdict_sentences(report),
            rates=wording.verdict_rates(report),
            costs=wording.COSTS,
            guarantee=wording.guarantee_sentence(report),
            price=wording.price(report["price_per_hour"]),
            cost=lambda rate: wording.cost(rate, report["price_per_hour"]),
            compression=_compression(report.get("compression")),
            style=safe(_asset("page.css")),
            theme_script=safe(theme),
            script=safe(script),
            script_hashes=safe(" ".join(_hash(text) for text in (theme, script))),
            data=safe(json_in_html(_with_promises(report))),
        )
    )


def _with_promises(report: Report) -> dict[str, Any]:
    """The report with what is promised of each calibrated model in words, which the script shows."""
    metric = wording.metric_name(report)
    models = [
        model
        if model["calibration"] is None
        else {
            **model,
            "calibration": model["calibration"] | {"promise": wording.promise(model["calibration"], metric)},
        }
        for model in report["models"]
    ]
    return {**report, "models": models}


def json_in_html(value: Any) -> str:
    """JSON that may stand inside a script element whatever its texts hold.

    Raises ValueError for NaN and infinity.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _asset(name: str) -> str:
    return (files("alembert.reports.page") / "assets" / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def model_facts(model: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Where a model lies, its size, and what decides its exits, by name; what is not known is left out."""
    exits = model["exits"] or {}
    facts = {
        "folder": model["source"],
        "layers": model["layers"],
        "parameters": None if model["parameters"] is None else f"{model['parameters']:,}",
        "tokens read of a text": model["max_length"],
        "exits after layers": exits.get("layers", [None])[:-1] or None,
        "exit policy": {key: value for key, value in exits.get("policy", {}).items() if value is not None}
        or None,
    }
    return [(name, value) for name, value in facts.items() if value is not None]


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A nested mapping's leaves, with the names on the way joined by dots."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from flat(entry, f"{prefix}.{key}" if prefix else str(key))
    elif value is not None:
        yield prefix, value


def shown(value: Any) -> str:
    """A value of a configuration or a table in words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(shown(item) for item in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {shown(item)}" for key, item in value.items())
    return "–" if value is None else str(value)


def _compression(part: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What a compression left, as a verdict and tables whose columns are its rows' keys."""
    if not part:
        return None
    return {
        "verdict": part.get("verdict"),
        "tables": [
            {"name": name, "columns": _columns(rows), "rows": rows}
            for name in ("candidates", "steps")
            if (rows := [_as_row(row) for row in part.get(name) or ()])
        ],
    }


def _as_row(row: Any) -> Mapping[str, Any]:
    return row if isinstance(row, Mapping) else {"step": row}


def _columns(rows: list[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))
