"""`alembert methods`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from alembert.cli import options as o


def methods(
    name: Annotated[str | None, typer.Argument(help="A method; all of them unless given.")] = None,
    json_output: o.JsonOption = False,
) -> None:
    """Lists the distillation methods, or one method's options and presets."""
    from rich.console import Console
    from rich.table import Table

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
        "options": _fields(method.options_class),
        "training": _fields(TrainingSettings),
        "presets": {key: preset.model_dump() for key, preset in method.presets.items()},
    }
    if json_output:
        typer.echo(json.dumps(schema, ensure_ascii=False))
        return
    console.print(f"[bold]{method.name}[/]  {method.paper}")
    for title, fields in (("--set", schema["options"]), ("--training", schema["training"])):
        table = Table(title=f"{title} NAME=VALUE", title_justify="left")
        for column in ("name", "values", "default"):
            table.add_column(column, overflow="fold")
        for field, facts in fields.items():
            table.add_row(field, facts["values"], str(facts["default"]))
        console.print(table, markup=False)
    for key, preset in method.presets.items():
        console.print(f"preset {key}: {preset.options | preset.settings}", markup=False)


def _fields(model: Any) -> dict[str, dict[str, Any]]:
    properties = model.model_json_schema()["properties"]
    return {
        name: {"values": _values(facts), "default": facts.get("default")}
        for name, facts in properties.items()
    }


def _values(facts: dict[str, Any]) -> str:
    if "anyOf" in facts:
        return " or ".join(_values(option) for option in facts["anyOf"])
    if "enum" in facts:
        return ", ".join(map(str, facts["enum"]))
    return str(facts.get("type", "any"))
