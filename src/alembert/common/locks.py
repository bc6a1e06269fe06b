"""One process at a time in a folder that is gone on with."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from alembert.common.errors import InputError

logger = logging.getLogger("alembert")
LOCK = ".lock"
"""A hidden file: folders in which there is nothing else are empty to those who ask."""


class FolderLock:
    """Keeps other processes out of a folder until `release`, or until this process ends, however it ends.

    The same process may take it again: what an exception left behind does not lock it out.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock: FileLock | None = None

    def __enter__(self) -> FolderLock:
        self.acquire()
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Makes the folder and takes its lock. Raises InputError where another process has it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._folder / LOCK, is_singleton=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise InputError(
                f"{self._folder}: another process is working on it: wait for its end, or give another --output "
                f"(where none is, a killed one left {self._folder / LOCK}: remove it)"
            ) from None
        except PermissionError:
            raise
        except OSError as error:
            # Some network drives know no locks.
            logger.warning("%s: cannot be locked (%s): start no second process in it", self._folder, error)
            return
        self._lock = lock

    def release(self) -> None:
        """Lets other processes in; nothing where it was not taken."""
        if self._lock is None:
            return
        # Removed while it is held: afterwards it may be another's. Windows removes no open file.
        with suppress(OSError):
            (self._folder / LOCK).unlink(missing_ok=True)
        self._lock.release(force=True)
        self._lock = None
