"""The record of what a work has done, beside its results, so that the same call goes on with it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from alembert.common.errors import InputError
from alembert.common.files import read_json, write_json

STATE = "compress.json"


def open_state(folder: Path, configuration: dict[str, Any], overwrite: bool) -> dict[str, Any]:
    """The record of the work in `folder`, or that of a new one.

    Raises InputError, and touches nothing, where something else lies there; with `overwrite` another work is replaced.
    """
    path = folder / STATE
    if path.exists():
        state: dict[str, Any] = read_json(path)
        differing = [key for key, value in configuration.items() if state["configuration"].get(key) != value]
        if not differing:
            return state
        if not overwrite:
            raise InputError(
                f"{folder} holds another work: {', '.join(differing)} differ. Give another --output, or "
                "--overwrite to begin anew"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty and holds no work of this command: give another --output")
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    state = {"configuration": configuration, "plan": None, "trainings": {}}
    write_json(path, state)
    return state
