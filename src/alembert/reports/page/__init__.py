"""The report as one self-contained page, from the JSON of `alembert.benchmarks.report_data` alone."""

from __future__ import annotations

from alembert.reports.page.rendering import render_page, write_page
from alembert.reports.page.transport import add_layer_transport

__all__ = ["add_layer_transport", "render_page", "write_page"]
