"""Which checkpoint a run goes on from."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

COMPLETE_MARKER = "complete"
_LAST_MARKER = "last"


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint of `folder` whose every file was written; half-written ones are removed."""
    for checkpoint in Path(folder).glob("checkpoint-*"):
        if not (checkpoint / COMPLETE_MARKER).exists():
            shutil.rmtree(checkpoint)
    complete = complete_checkpoints(folder)
    return complete[-1] if complete else None


def complete_checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints of `folder` whose every file was written, oldest first."""
    markers = Path(folder).glob(f"checkpoint-*/{COMPLETE_MARKER}")
    return sorted((marker.parent for marker in markers), key=lambda path: int(path.name.rsplit("-", 1)[1]))


def mark_complete(checkpoint: Path) -> None:
    """Says that every file of a checkpoint is written."""
    (checkpoint / COMPLETE_MARKER).touch()


def mark_last(checkpoint: Path) -> None:
    """Says that a stage was over with a checkpoint; to be said before it is marked complete."""
    (checkpoint / _LAST_MARKER).touch()


def is_last(checkpoint: Path) -> bool:
    """Whether a stage was over with a complete checkpoint."""
    return (checkpoint / _LAST_MARKER).exists()


def remove_checkpoints(folder: str | Path, keep: Iterable[Path]) -> None:
    """Removes all checkpoints of `folder` but `keep`; each loses its mark first, so that no half of it is trusted."""
    kept = {checkpoint.resolve() for checkpoint in keep}
    for checkpoint in Path(folder).glob("checkpoint-*"):
        if checkpoint.resolve() not in kept:
            (checkpoint / COMPLETE_MARKER).unlink(missing_ok=True)
            shutil.rmtree(checkpoint)
