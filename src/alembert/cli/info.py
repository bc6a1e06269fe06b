"""`alembert info`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from alembert.cli import options as o


def info(
    model: Annotated[
        str, typer.Argument(help="A run directory, a folder in Hugging Face layout or a hub id.")
    ],
    length: Annotated[int, typer.Option(min=1, help="Tokens of the text whose cost is shown.")] = 128,
    json_output: o.JsonOption = False,
) -> None:
    """Shows layers, exits, parameters, labels and the cost of leaving at each exit."""
    o.quiet_libraries()
    facts = describe(model, length)
    if json_output:
        typer.echo(json.dumps(facts, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(
        f"[bold]{model}[/]: {facts['family']}, {facts['layers']} layers × {facts['hidden_size']}",
        soft_wrap=True,
    )
    console.print(
        f"{facts['parameters'] / 1e6:.1f}M parameters, {facts['exit_parameters'] / 1e6:.2f}M of them in exits"
    )
    if facts["problem_type"] is None:
        console.print("no trained classification head: fine-tune it first (alembert finetune)")
    else:
        names = ", ".join(facts["label_names"][:8]) + (", …" if len(facts["label_names"]) > 8 else "")
        console.print(f"{facts['problem_type']}: {names or 'one value'}", markup=False)
    table = Table(title=f"cost of leaving there, {length} tokens (paper convention: linear layers only)")
    for column in ("exit after layer", "head", "million MACs", "million FLOPs", "speed-up"):
        table.add_column(column, justify="left" if column == "head" else "right")
    for row in facts["exits"]:
        table.add_row(
            str(row["layer"]),
            row["head"],
            f"{row['macs'] / 1e6:,.1f}",
            f"{row['flops'] / 1e6:,.1f}",
            f"{row['speedup']:.2f}×",
        )
    console.print(table)


def describe(source: str, length: int) -> dict[str, Any]:
    """The facts that `info` shows, as one JSON-ready dictionary."""
    from alembert.benchmarks.flops import CostModel
    from alembert.models.loading import classifier_facts, load_any
    from alembert.models.multi_exit import MultiExitModel
    from alembert.models.students import describe_student

    model, is_classifier = load_any(source)
    exits = model.exit_heads if isinstance(model, MultiExitModel) else None
    facts, shape = classifier_facts(model), describe_student(model)
    return {
        "model": source,
        "family": shape["model_type"],
        "layers": shape["layers"],
        "hidden_size": shape["hidden_size"],
        "exit_layers": list(model.exit_layers) if isinstance(model, MultiExitModel) else [],
        "parameters": shape["parameters"],
        "exit_parameters": sum(parameter.numel() for parameter in exits.parameters())
        if exits is not None
        else 0,
        "problem_type": facts.problem_type if is_classifier else None,
        "label_names": list(facts.label_names) if is_classifier else [],
        "length": length,
        "exits": CostModel.from_model(model).table(length),
    }
