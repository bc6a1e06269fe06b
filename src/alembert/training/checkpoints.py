"""Which checkpoint a run goes on from."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

COMPLETE_MARKER = "complete"


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint of `folder` whose every file was written; half-written ones are removed."""
    complete: list[tuple[int, Path]] = []
    for checkpoint in Path(folder).glob("checkpoint-*"):
        if (checkpoint / COMPLETE_MARKER).exists():
            complete.append((int(checkpoint.name.rsplit("-", 1)[1]), checkpoint))
        else:
            shutil.rmtree(checkpoint)
    return max(complete)[1] if complete else None


def mark_complete(checkpoint: Path) -> None:
    """Says that every file of a checkpoint is written."""
    (checkpoint / COMPLETE_MARKER).touch()


def remove_checkpoints(folder: str | Path, keep: Iterable[Path]) -> None:
    """Removes all checkpoints of `folder` but `keep`; each loses its mark first, so that no half of it is trusted."""
    kept = {checkpoint.resolve() for checkpoint in keep}
    for checkpoint in Path(folder).glob("checkpoint-*"):
        if checkpoint.resolve() not in kept:
            (checkpoint / COMPLETE_MARKER).unlink(missing_ok=True)
            shutil.rmtree(checkpoint)
