"""What all pictures share: the style, the optional libraries, and how a file is written."""

from __future__ import annotations

import importlib
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from alembert.common.errors import InputError, install_extra
from alembert.common.files import replacing

GREY = "#6E6E6E"
DOTS_PER_INCH = 150
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "axes.edgecolor": GREY,
    # A dollar sign in a file name is a dollar sign.
    "text.parse_math": False,
}
"""Matplotlib settings."""


def readable_on(colour: tuple[float, float, float, float]) -> str:
    """Black or white, whichever contrasts more (relative luminance as in WCAG 2, gamma 2.2)."""
    luminance = np.dot(np.power(colour[:3], 2.2), (0.2126, 0.7152, 0.0722))
    return "black" if luminance > 0.18 else "white"


def wrapped(text: str, width: int) -> str:
    """Text in lines of at most `width` characters."""
    return "\n".join(textwrap.wrap(text, width))


def save_figure(figure: Any, path: str | Path) -> None:
    """Writes a matplotlib figure as a PNG, whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", facecolor="white")


def required_module(module: str) -> Any:
    """A module of the `report` extra. Raises InputError when it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        name = module.partition(".")[0]
        raise InputError(f"Plots need {name}: {install_extra('report')}.") from error
