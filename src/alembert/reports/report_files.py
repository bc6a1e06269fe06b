"""The files of a report: page, JSON, Markdown and pictures."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from alembert.common.errors import InputError, install_extra
from alembert.common.files import write_json

_PACKAGES = ("jinja2", "matplotlib")


def check_report_extra() -> None:
    """Raises InputError when the `report` extra is not installed."""
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise InputError(f"reports need {missing[0]}: {install_extra('report')}")


def write_report(collected: dict[str, Any], folder: Path) -> list[str]:
    """Writes report.json, report.html, report.md and its pictures; returns their names.

    Raises InputError when the `report` extra is not installed.
    """
    check_report_extra()
    from alembert.reports.page import add_layer_transport, write_page
    from alembert.reports.page_summary import write_summary

    add_layer_transport(collected)
    write_json(folder / "report.json", collected)
    write_page(folder / "report.html", collected)
    return ["report.html", "report.json", *write_summary(folder, collected)]
