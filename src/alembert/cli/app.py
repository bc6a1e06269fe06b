"""The `alembert` program: its commands, its exit codes, its messages."""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from importlib.metadata import version
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from alembert.common.errors import InputError

_INTERRUPTED = 130
COMMANDS = (
    "finetune",
    "augment",
    "distill",
    "search",
    "ablate",
    "evaluate",
    "predict",
    "info",
    "methods",
    "demo",
)

app = typer.Typer(
    name="alembert",
    help="Makes BERT-type text classifiers many times cheaper to run, and proves what it cost in accuracy.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"alembert {version('alembert')}")
        raise typer.Exit


@app.callback()
def _program(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


for _name in COMMANDS:
    _module = import_module(f"alembert.cli.{_name}")
    app.command(_name)(getattr(_module, _name))


def main(arguments: list[str] | None = None) -> None:
    """Runs the program and exits: 0 success, 2 usage or bad input, 1 anything else."""
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Runs the program and returns its exit code; messages go to standard error."""
    console = Console(stderr=True, soft_wrap=True)
    logger = logging.getLogger("alembert")
    if not logger.handlers:
        logger.addHandler(RichHandler(console=console, show_time=False, show_path=False, show_level=True))
        logger.setLevel(logging.INFO)
    try:
        app(args=arguments)
    except InputError as error:
        console.print(f"[bold red]Error:[/] {_escape(str(error))}", highlight=False)
        return 2
    except SystemExit as exit_:
        if exit_.code != _INTERRUPTED:
            return exit_.code if isinstance(exit_.code, int) else 0
        console.print("Interrupted. A training goes on where it was when the same command is run again.")
        return 1
    return 0


def _escape(message: str) -> str:
    return message.replace("[", r"\[")
