"""What is written in a label column: reading it, and telling numbers from names."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from alembert.common.errors import InputError
from alembert.data.reading import at, check_encoding

_INTEGER = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_AS_STRINGS = ", or read all as strings with --label-type string"


class LabelReader:
    """Turns the values of a label column into text, whatever type the file's format gives them.

    Args:
        source, field: what messages call the file and the column.
        several: every row has a list of labels, even where only one is written.
        separator: splits one field into several labels.
        as_strings: values of different types are taken as they are written (``label_type="string"``).
    """

    def __init__(
        self, source: str, field: str, *, several: bool, separator: str | None, as_strings: bool
    ) -> None:
        self._source, self._field = source, field
        self._several, self._separator, self._as_strings = several, separator, as_strings
        self._first: tuple[str, int] | None = None

    def __call__(self, row: int, value: Any) -> str | list[str]:
        """The label, or the list of labels of a row. Raises InputError if missing, NaN or of another type."""
        if self._separator is not None and isinstance(value, str):
            parts = (part.strip() for part in value.split(self._separator))
            return [self._as_text(row, part) for part in parts if part]
        if isinstance(value, list):
            self._same_kind(row, "list")
            return [self._as_text(row, part, "list") for part in value]
        label = self._as_text(row, value)
        return [label] if self._several else label

    def _as_text(self, row: int, value: Any, container: str = "") -> str:
        if isinstance(value, str):
            kind, text = "string", value.strip()
            check_encoding(self._source, row, self._field, text)
        elif isinstance(value, bool):
            kind, text = "true/false", str(value).lower()
        elif isinstance(value, int | float) and math.isfinite(value):
            kind, text = "number", str(value)
        elif value is None or isinstance(value, float):
            kind, text = "", ""
        else:
            raise InputError(f"{self._place(row)}: a label cannot be a {type(value).__name__}.")
        if not text or (text in ("nan", "NaN") and not self._as_strings):
            raise InputError(
                f"{self._place(row)}: the label is missing{f' ({text or value})' if value else ''}; "
                "fill it or remove the row."
            )
        if not container:
            self._same_kind(row, kind)
        return text

    def _same_kind(self, row: int, kind: str) -> None:
        if self._first is None:
            self._first = (kind, row)
        first_kind, first_row = self._first
        if kind != first_kind and (not self._as_strings or "list" in (kind, first_kind)):
            raise InputError(
                f"{self._place(row)}: mixed label types: this row's label is a {kind}, row {first_row}'s a "
                f"{first_kind}. Write all in one way{'' if 'list' in (kind, first_kind) else _AS_STRINGS}."
            )

    def _place(self, row: int) -> str:
        return at(self._source, row, self._field)


@lru_cache(maxsize=1 << 16)
def label_kind(label: str) -> str:
    """How a label is written: "integer" (3), "whole" (3.0), "fraction" (3.5) or "text"."""
    if _INTEGER.fullmatch(label):
        return "integer"
    if not _NUMBER.fullmatch(label):
        return "text"
    return "whole" if float(label).is_integer() else "fraction"


def check_label_kinds(source: str, field: str, kinds: dict[str, tuple[int, str]]) -> None:
    """Refuses numbers beside text, and 1 beside 1.0.

    Args:
        kinds: for each of `label_kind`'s answers that occurs, the first row and label of that kind.
    """
    groups = [{"text"}, {"integer", "whole", "fraction"}]
    if "fraction" not in kinds:
        groups = [{"text"}, {"integer"}, {"whole"}]
    present = [min(kinds[kind] for kind in group & kinds.keys()) for group in groups if group & kinds.keys()]
    if len(present) > 1:
        (first_row, first), (row, label) = sorted(present)[:2]
        raise InputError(
            f"{at(source, row, field)}: mixed label types: '{label}' here, but '{first}' in row {first_row}: "
            "some labels are numbers and others not, or numbers are written in two ways. "
            f"Write all in one way{_AS_STRINGS}."
        )


def sorted_labels(labels: Iterable[str], as_strings: bool = False) -> tuple[str, ...]:
    """The distinct labels in the order of their ids: numbers by value, all else alphabetically."""
    labels = set(labels)
    if not as_strings and all(label_kind(label) != "text" for label in labels):
        return tuple(sorted(labels, key=lambda label: (float(label), label)))
    return tuple(sorted(labels))
