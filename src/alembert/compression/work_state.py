"""The record of what a work has done, beside its results, so that the same call goes on with it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from alembert.common.errors import InputError
from alembert.common.files import read_json, write_json
from alembert.common.locks import LOCK

STATE, SUMMARY = "compress.json", "summary.json"
DONE, SKIPPED, FAILED = "done", "skipped", "failed"
"""What became of a training."""
RUNS, BEST = "runs", "best"
CLEARING = {"clearing": True}
"""The record while a former work is being removed: interrupted, the next call of any kind goes on with that."""
OF_AIMS = ("report", "benchmark")
"""Folders of results that depend on what was asked. `best/` stays until the next choice."""
OF_TRAININGS = (
    *("configuration", "plan", "needs_finetuning", "seconds_after_training", "seconds_to_measure"),
    *("started", "trainings"),
)
"""Entries of the record that do not depend on what the result is to be."""


def open_state(
    folder: Path, configuration: dict[str, Any], aims: dict[str, Any], overwrite: bool
) -> dict[str, Any]:
    """The record of the work in `folder`, or that of a new one.

    A work with the same `configuration` and other `aims` keeps what it has trained; what follows is done anew, and its
    former results are removed. With another budget what was skipped for want of time, or failed, is planned anew. A
    removal that was interrupted is finished, and the work begins anew.

    Raises InputError, and touches nothing, where something else lies there; with `overwrite` any work is replaced.
    """
    path = folder / STATE
    if path.exists():
        state: dict[str, Any] = read_json(path)
        if state == CLEARING:
            return _begin(folder, configuration, aims)
        differing = [key for key, value in configuration.items() if state["configuration"].get(key) != value]
        if not differing and not overwrite and state.get("aims") == aims:
            return state
        if not differing and not overwrite:
            before = state.get("aims", {})
            state = {key: value for key, value in state.items() if key in OF_TRAININGS} | {"aims": aims}
            if before.get("budget_seconds") != aims["budget_seconds"]:
                done = {name: it for name, it in state["trainings"].items() if it["status"] == DONE}
                for name in [name for name, it in state["trainings"].items() if it["status"] == FAILED]:
                    state["started"].pop(name, None)
                    shutil.rmtree(folder / RUNS / name, ignore_errors=True)
                state |= {"plan": None, "trainings": done}
            write_json(path, state)
            (folder / SUMMARY).unlink(missing_ok=True)
            for name in OF_AIMS:
                shutil.rmtree(folder / name, ignore_errors=True)
            return state
        if not overwrite:
            raise InputError(
                f"{folder} holds another work: {', '.join(differing)} differ. Give another --output, or "
                "--overwrite to begin anew"
            )
    elif folder.exists() and any(entry.name != LOCK for entry in folder.iterdir()):
        raise InputError(f"{folder} is not empty and holds no work of this command: give another --output")
    return _begin(folder, configuration, aims)


def _begin(folder: Path, configuration: dict[str, Any], aims: dict[str, Any]) -> dict[str, Any]:
    """Empties the folder; whenever that is interrupted, what is left does not look like a work."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / STATE, CLEARING)
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name not in (LOCK, STATE):
            entry.unlink()
    state = {"configuration": configuration, "aims": aims, "plan": None, "started": {}, "trainings": {}}
    write_json(folder / STATE, state)
    return state
