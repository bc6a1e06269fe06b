"""Errors that are the caller's to mend."""

from __future__ import annotations


def install_extra(extra: str) -> str:
    """How to install the packages of an extra: from the clone, for a package of this name elsewhere is not Alembert."""
    return f"run pip install -e '.[{extra}]' in Alembert's clone"


class InputError(ValueError):
    """The input is wrong: says what, where (file, row, field) and what to do.

    The command line prints the message alone and exits with code 2.

    Examples:
        >>> import alembert
        >>> try:
        ...     alembert.load_task("no-such-folder/")
        ... except alembert.InputError as error:
        ...     print("refused:", error)
        refused: ...
    """
