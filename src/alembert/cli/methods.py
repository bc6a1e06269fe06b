"""`alembert methods`."""

from __future__ import annotations

import inspect
import json
import re
from typing import Annotated, Any

import typer

from alembert.cli import options as o

_LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
_FLAGS = ("student", "stages")
"""Options that have flags of their own."""


def methods(
    name: Annotated[str | None, typer.Argument(help="A method; all of them unless given.")] = None,
    json_output: o.JsonOption = False,
) -> None:
    """Lists the distillation methods, or one method's options and presets."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from alembert.methods.registry import METHODS, find_method
    from alembert.training.settings import TrainingSettings

    console = Console(highlight=False)
    if name is None:
        if json_output:
            typer.echo(json.dumps({key: method.paper for key, method in METHODS.items()}, ensure_ascii=False))
            return
        for key, method in METHODS.items():
            console.print(f"[bold]{key}[/]  {method.paper}")
        return
    method = find_method(name)
    schema: dict[str, Any] = {
        "name": method.name,
        "paper": method.paper,
        "options": _fields(method.options_class, method.presets["default"].options),
        "training": _fields(TrainingSettings, method.presets["default"].settings),
        "presets": {key: preset.model_dump() for key, preset in method.presets.items()},
    }
    if json_output:
        typer.echo(json.dumps(schema, ensure_ascii=False))
        return
    console.print(f"[bold]{method.name}[/]  {method.paper}")
    for title, fields in (("--set", schema["options"]), ("--training", schema["training"])):
        table = Table(title=f"{title} NAME=VALUE", title_justify="left")
        for column in ("name", "values", "default", "what"):
            table.add_column(column, overflow="fold")
        for field, facts in fields.items():
            name_shown = f"--{field}" if field in _FLAGS else field
            table.add_row(*map(Text, (name_shown, facts["values"], str(facts["default"]), facts["what"])))
        console.print(table)
    for key, preset in method.presets.items():
        console.print(f"preset {key}: {preset.options | preset.settings}", markup=False)


def _fields(model: Any, preset: dict[str, Any]) -> dict[str, dict[str, Any]]:
    properties, documented = model.model_json_schema()["properties"], _documented(model)
    return {
        name: {
            "values": _values(facts),
            "default": preset.get(name, facts.get("default")),
            "what": documented.get(name, ""),
        }
        for name, facts in properties.items()
    }


def _documented(model: Any) -> dict[str, str]:
    """What the docstrings of a class and of those above it say of its attributes."""
    words: dict[str, str] = {}
    for each in reversed(model.__mro__):
        section = inspect.cleandoc(each.__doc__ or "").partition("Attributes:\n")[2].partition("\n\n")[0]
        for entry in re.split(r"\n(?= {4}\S)", section):
            names, _, text = entry.partition(": ")
            words |= dict.fromkeys(re.split(r",\s*", names.strip()), " ".join(text.split()))
    return words


def _values(facts: dict[str, Any]) -> str:
    if "anyOf" in facts:
        return " or ".join(_values(option) for option in facts["anyOf"])
    if "enum" in facts:
        return ", ".join(map(str, facts["enum"]))
    limits = ", ".join(f"{sign} {facts[key]:g}" for key, sign in _LIMITS.items() if key in facts)
    return f"{facts.get('type', 'any')} {limits}".rstrip()
