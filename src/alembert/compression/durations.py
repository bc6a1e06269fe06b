"""Lengths of time as people write them: 40m, 2h, 1h30m, 90s."""

from __future__ import annotations

import re

from alembert.common.errors import InputError

_SECONDS = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}
_PARTS = re.compile(r"(?:\d+(?:\.\d+)?[dhms])+")


def parse_duration(text: str) -> float:
    """Seconds of a length of time: "40m" → 2400.0.

    Raises InputError for anything but positive numbers, each with d, h, m or s behind it.
    """
    compact = text.replace(" ", "").lower()
    if _PARTS.fullmatch(compact) is None:
        raise InputError(f"{text!r} is no length of time: write 40m, 2h, 1h30m or 90s")
    seconds = sum(float(part[:-1]) * _SECONDS[part[-1]] for part in re.findall(r"[\d.]+[dhms]", compact))
    if seconds <= 0:
        raise InputError(f"{text!r} is no time at all: write 40m, 2h, 1h30m or 90s")
    return seconds


def format_duration(seconds: float) -> str:
    """Seconds in the two largest units that matter: 5,400 → "1 h 30 min"; below a minute "42 s"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    if not hours:
        return f"{minutes} min"
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"
