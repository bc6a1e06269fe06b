"""The time that a piece of work has taken over all its sessions, those that were killed included."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from alembert.common.files import read_json, write_json

_SECONDS_BETWEEN_RECORDS = 5.0


class WorkClock:
    """Counts the seconds of a `with` block on top of those of earlier sessions, and records them as it goes.

    A session that is killed loses at most a few seconds of its count.

    Args:
        path: the JSON file of the record.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._before = float(read_json(self._path)["seconds"]) if self._path.exists() else 0.0
        self._started: float | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_recording, daemon=True)

    @property
    def seconds(self) -> float:
        """Spent so far, in all sessions."""
        return self._before + (0.0 if self._started is None else time.monotonic() - self._started)

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._started = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._record()

    def _keep_recording(self) -> None:
        while not self._stop.wait(_SECONDS_BETWEEN_RECORDS):
            self._record()

    def _record(self) -> None:
        write_json(self._path, {"seconds": round(self.seconds, 1)})
