"""Which checkpoint a run goes on from."""

from __future__ import annotations

import shutil
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
