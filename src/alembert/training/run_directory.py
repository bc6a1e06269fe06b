"""A run's folder: resumes the same command, refuses another, and is either finished or visibly not."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alembert.common.errors import InputError
from alembert.common.files import read_json, write_json
from alembert.common.locks import LOCK, FolderLock
from alembert.models.projections import PROJECTION_FILE, HiddenProjection

FINISHED = "alembert.json"
IN_PROGRESS = "in_progress.json"
CHECKPOINTS = "checkpoints"
EVALUATION = "evaluation"
STEPS = "steps"
"""Runs that this one builds on, where methods are run in turn."""
_STAGING = ".finishing"


def check_sources(output_dir: str | Path, *sources: str | Path | None) -> None:
    """Raises InputError where a run would be written over the very model or file that it is made from."""
    folder = Path(output_dir).resolve()
    for source in sources:
        path = None if source is None else Path(source).resolve()
        if path is not None and (path == folder or (path.is_file() and path.parent == folder)):
            raise InputError(
                f"{source}: is what the run is made from, and the run would be written over it: choose another --output"
            )


class RunDirectory:
    """The folder `path` of a run with the resolved `configuration`; from `begin` to `finish` it is one process's.

    A folder with the same configuration is gone on with (`finished` says whether anything is left to do);
    any other content, and any at all when `resume` is off, raises InputError unless `overwrite`. Nothing is
    written or removed before `begin`, but for what a finished run left over.
    """

    def __init__(
        self,
        path: str | Path,
        configuration: dict[str, Any],
        *,
        overwrite: bool = False,
        resume: bool = True,
        main_process: bool = True,
    ) -> None:
        self.path = Path(path).resolve()
        self.configuration = configuration
        self._main_process = main_process
        self._lock = FolderLock(self.path)
        previous = previous_configuration(self.path)
        occupied = self.path.exists() and (not self.path.is_dir() or _has_content(self.path))
        if occupied and previous is None:
            raise InputError(f"{self.path} exists and is no run of Alembert: choose another --output")
        if previous is not None and not overwrite:
            if previous != configuration:
                raise InputError(
                    f"{self.path} holds a run with another configuration "
                    f"({', '.join(_differences(previous, configuration))}): choose another --output, or pass "
                    "--overwrite to replace it"
                )
            if not resume:
                raise InputError(
                    f"{self.path} holds this run already: let it resume, or pass --overwrite to start it anew"
                )
        self._clears = occupied and overwrite
        self._seen = self._state()
        self.finished = not overwrite and (self.path / FINISHED).exists()
        if self.finished and main_process:
            self._remove_leftovers()

    def begin(self) -> None:
        """Claims the folder, once everything else has been checked.

        Raises InputError where another process works there, or has worked since this one looked.
        """
        if not self._main_process:
            return
        self._lock.acquire()
        if self._state() != self._seen:
            self.release()
            raise InputError(f"{self.path} has changed meanwhile: give the same command again")
        if self._clears:
            self._clear()
        write_json(self.path / IN_PROGRESS, self.configuration)

    def release(self) -> None:
        """Lets other processes work in the folder; for runs that end before they are finished."""
        self._lock.release()

    @contextmanager
    def released_on_error(self) -> Iterator[None]:
        """Releases the folder where the block ends with an exception, which a notebook keeps for long."""
        try:
            yield
        except BaseException:
            self.release()
            raise

    def _state(self) -> tuple[dict[str, Any] | None, bool]:
        return previous_configuration(self.path), (self.path / FINISHED).exists()

    def checkpoints(self, stage: str) -> Path:
        """The folder of a stage's checkpoints."""
        return self.path / CHECKPOINTS / stage

    def finish(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        metrics: dict[str, Any],
        history: dict[str, Any],
        model_card: str,
        projection: HiddenProjection | None = None,
    ) -> None:
        """Leaves the finished run: model, tokenizer, metrics, history and card, and last of all `alembert.json`.

        `projection` is what a later stage, in a run of its own, goes on with.

        Everything is written to a folder inside the run first; until `alembert.json` stands the run counts as
        unfinished and can be gone on with.
        """
        staging = self.path / _STAGING
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        if projection is not None:
            save_file(projection.state_dict(), staging / PROJECTION_FILE)
        write_json(staging / "metrics.json", metrics)
        write_json(staging / "trainer_state.json", history)
        (staging / "README.md").write_text(model_card, encoding="utf-8")
        for file in staging.iterdir():
            file.replace(self.path / file.name)
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(
            self.path / FINISHED,
            {"configuration": self.configuration, "versions": versions(), "finished": finished},
        )
        self._remove_leftovers()
        self.release()

    def metrics(self) -> dict[str, Any]:
        """The metrics of a finished run."""
        metrics: dict[str, Any] = read_json(self.path / "metrics.json")
        return metrics

    def _clear(self) -> None:
        """Removes what runs and their evaluations write; folders of other making stay."""
        (self.path / FINISHED).unlink(missing_ok=True)
        for name in (_STAGING, CHECKPOINTS, EVALUATION):
            shutil.rmtree(self.path / name, ignore_errors=True)
        for entry in self.path.iterdir():
            if entry.is_file() and entry.name != LOCK:
                entry.unlink()

    def _remove_leftovers(self) -> None:
        for leftover in (_STAGING, CHECKPOINTS):
            shutil.rmtree(self.path / leftover, ignore_errors=True)
        (self.path / IN_PROGRESS).unlink(missing_ok=True)


def previous_configuration(folder: Path) -> dict[str, Any] | None:
    """The configuration of the run in a folder, finished or not; None where there is none."""
    previous: dict[str, Any] | None = None
    if (folder / FINISHED).exists():
        previous = read_json(folder / FINISHED)["configuration"]
    elif (folder / IN_PROGRESS).exists():
        previous = read_json(folder / IN_PROGRESS)
    return previous


def versions() -> dict[str, str]:
    """Versions of what a run's numbers depend on."""
    packages = ("alembert", "torch", "transformers", "datasets", "tokenizers", "numpy")
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in packages
    }


def _has_content(folder: Path) -> bool:
    # A process killed while it wrote its first file leaves a hidden temporary one behind.
    return any(not entry.name.startswith(".") and entry.name != STEPS for entry in folder.iterdir())


def _differences(previous: dict[str, Any], configuration: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in sorted(previous.keys() | configuration.keys()):
        old, new = previous.get(key), configuration.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}: {old!r} there, {new!r} now")
    return found
