"""What a search varies: ranges and choices of a method's options and of training settings, from text."""

from __future__ import annotations

import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args, get_origin

import yaml

from alembert.common.errors import InputError
from alembert.methods.base import Method, resolve
from alembert.training.settings import TrainingSettings

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})(:log)?")
SYNTAX = "name=low..high, name=low..high:log or name=first|second|third"


class Suggests(Protocol):
    """What this module needs of an Optuna trial."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """A number of the range."""

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        """A whole number of the range, both ends included."""

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> Any:
        """One of the choices."""


@dataclass(frozen=True)
class Dimension:
    """One name that a search varies.

    Attributes:
        name: an option of the method, or a training setting.
        kind: `float` and `int` are ranges, ends included; `choice` is a list.
        low, high: of a range.
        log: whether a range is uniform in the logarithm.
        choices: as written.
        values: the choices as the option takes them, in the same order.
        is_setting: whether it is a training setting.
    """

    name: str
    kind: Literal["float", "int", "choice"]
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    choices: tuple[str, ...] = ()
    values: tuple[Any, ...] = ()
    is_setting: bool = False

    def suggest(self, trial: Suggests) -> Any:
        """The value that a trial has for it."""
        if self.kind == "float":
            return trial.suggest_float(self.name, self.low, self.high, log=self.log)
        if self.kind == "int":
            return trial.suggest_int(self.name, int(self.low), int(self.high), log=self.log)
        # Lists are no choices that a database can hold, so the choice is made among the texts.
        return self.values[self.choices.index(trial.suggest_categorical(self.name, self.choices))]

    def extremes(self) -> tuple[Any, ...]:
        """Values that must be valid for all to be: both ends of a range, every choice."""
        if self.kind == "choice":
            return self.values
        return (int(self.low), int(self.high)) if self.kind == "int" else (self.low, self.high)

    def describe(self) -> str:
        """The dimension in the syntax of `--space`, without the name."""
        if self.kind == "choice":
            return "|".join(self.choices)
        low, high = self.extremes()
        return f"{low}..{high}{':log' if self.log else ''}"


def parse_space(
    texts: Sequence[str],
    method: type[Method[Any]],
    preset: str,
    options: dict[str, Any],
    settings: dict[str, Any],
) -> tuple[Dimension, ...]:
    """`--space` assignments as dimensions, every one checked against the method's options and training settings.

    Args:
        texts: in the form of `SYNTAX`.
        method: whose options may be varied, beside training settings.
        preset, options, settings: what all trials have in common.

    Raises InputError for text that cannot be read, unknown names, values that an option does not take, and names
    that are given twice or are fixed as well.
    """
    dimensions: dict[str, Dimension] = {}
    for text in texts:
        dimension = parse_dimension(text, method)
        if dimension.name in dimensions:
            raise InputError(f"--space {dimension.name} is given twice: give it once")
        if dimension.name in (settings if dimension.is_setting else options):
            raise InputError(
                f"--space varies {dimension.name}, which has a fixed value too: leave one of the two out"
            )
        for value in dimension.extremes():
            changed = {dimension.name: value}
            resolve(
                method,
                preset,
                options if dimension.is_setting else options | changed,
                settings | changed if dimension.is_setting else settings,
            )
        dimensions[dimension.name] = dimension
    if not dimensions:
        raise InputError(f"there is nothing to search: give --space as {SYNTAX}")
    return tuple(dimensions.values())


def parse_dimension(text: str, method: type[Method[Any]]) -> Dimension:
    """One `--space` assignment.

    Ranges are whole numbers where the option is one. A single value for an option that takes several is a list of one.

    Raises InputError for text that cannot be read, unknown names and ranges of what has none.
    """
    name, equals, value = text.partition("=")
    name, value = name.strip().replace("-", "_"), value.strip()
    if not equals or not name or not value:
        raise InputError(f"--space {text!r}: must be {SYNTAX}")
    fields = method.options_class.model_fields
    is_setting = name not in fields
    if is_setting and name not in TrainingSettings.model_fields:
        known = ", ".join([*fields, *TrainingSettings.model_fields])
        raise InputError(
            f"--space {name}: method {method.name} has no such option or setting; choose from {known}"
        )
    types = _types((TrainingSettings.model_fields if is_setting else fields)[name].annotation)
    found = _RANGE.fullmatch(value)
    if found:
        return _range(name, text, found, types, is_setting)
    if ".." in value:
        raise InputError(f"--space {text!r}: a range is two numbers, such as 1e-5..5e-4 or 1e-5..5e-4:log")
    choices = tuple(part.strip() for part in value.split("|"))
    if "" in choices or len(set(choices)) < len(choices):
        raise InputError(f"--space {text!r}: a choice is empty or listed twice")
    values = tuple(_value(choice, text, types) for choice in choices)
    return Dimension(name, "choice", choices=choices, values=values, is_setting=is_setting)


def _range(name: str, text: str, found: re.Match[str], types: set[Any], is_setting: bool) -> Dimension:
    low, high, log = float(found[1]), float(found[2]), found[3] is not None
    if not types & {int, float}:
        raise InputError(f"--space {text!r}: {name} is no number; list its values as {name}=first|second")
    if not low < high:
        raise InputError(f"--space {text!r}: the lower end must be below the upper one")
    if log and low <= 0:
        raise InputError(f"--space {text!r}: a logarithmic range must be above 0")
    if float in types:
        return Dimension(name, "float", low, high, log, is_setting=is_setting)
    if not (low.is_integer() and high.is_integer()):
        raise InputError(f"--space {text!r}: {name} is a whole number, so both ends must be")
    return Dimension(name, "int", low, high, log, is_setting=is_setting)


def _value(choice: str, text: str, types: set[Any]) -> Any:
    if types <= {str, type(None)}:
        # YAML reads 0x16 as a hexadecimal number, and it may be a student's shape.
        return None if choice in ("null", "None") else choice
    try:
        value = yaml.safe_load(choice)
    except yaml.YAMLError as error:
        raise InputError(f"--space {text!r}: {choice!r} is no valid YAML") from error
    if isinstance(value, str) and types & {int, float} and re.fullmatch(_NUMBER, value):
        value = float(value)  # YAML takes 1e-4, which has no point, for text.
    if tuple in types and not isinstance(value, list) and value is not None:
        return [value]
    return value


def _types(annotation: Any) -> set[Any]:
    """The types that an annotation consists of: `int | None` is {int, NoneType}, a tuple of anything {tuple}."""
    origin = get_origin(annotation)
    if origin is typing.Annotated:
        return _types(get_args(annotation)[0])
    if origin is Literal:
        return {type(value) for value in get_args(annotation)} | {Literal}
    if origin is not None and origin is not tuple:
        return set().union(*(_types(part) for part in get_args(annotation)))
    return {origin or annotation}
