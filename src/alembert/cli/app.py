"""The `alembert` program: its commands, its exit codes, its messages."""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from typer.core import TyperGroup

import alembert
from alembert.common.errors import InputError

_INTERRUPTED = 130
COMMANDS = (
    "finetune",
    "augment",
    "distill",
    "search",
    "ablate",
    "evaluate",
    "calibrate",
    "compress",
    "benchmark",
    "report",
    "export",
    "predict",
    "info",
    "methods",
    "demo",
)
_FULL_INSTALLATION = (
    "torch",
    "transformers",
    "datasets",
    "sklearn",
    "scipy",
    "safetensors",
    "ot",
)


class _Commands(dict[str, Any]):
    """Commands by name, each imported when it is asked for: none pays for the others."""

    def __init__(self) -> None:
        super().__init__(dict.fromkeys(COMMANDS))

    def __getitem__(self, name: str) -> Any:
        if super().__getitem__(name) is None:
            holder = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
            holder.command(name)(getattr(import_module(f"alembert.cli.{name}"), name))
            self[name] = typer.main.get_command(holder)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        try:
            return self[name]
        except KeyError:
            return default


class _LazyGroup(TyperGroup):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = _Commands()

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)


app = typer.Typer(
    cls=_LazyGroup,
    name="alembert",
    help="Makes BERT-type text classifiers many times cheaper to run, and proves what it cost in accuracy.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"alembert {alembert.__version__}")
        raise typer.Exit


@app.callback()
def _program(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


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
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] not in _FULL_INSTALLATION:
            raise
        console.print(
            f"[bold red]Error:[/] this needs {error.name}, which the light installation leaves out: "
            "pip install alembert",
            highlight=False,
        )
        return 2
    except SystemExit as exit_:
        if exit_.code != _INTERRUPTED:
            return exit_.code if isinstance(exit_.code, int) else 0
        console.print("Interrupted. A training goes on where it was when the same command is run again.")
        return 1
    return 0


def _escape(message: str) -> str:
    return message.replace("[", r"\[")
