"""The command line: parse, call, print."""

from alembert.cli.app import main

__all__ = ["main"]
