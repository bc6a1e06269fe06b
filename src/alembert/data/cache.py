"""Data sets that are written once and then read from disk, memory-mapped."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.table import MemoryMappedTable

from alembert.common.files import replacing


def cache_path(name: str) -> Path:
    """Where a cached data set of that name lies, below the folder that HF_DATASETS_CACHE names."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "alembert"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.arrow"


def fingerprint_of(*parts: Any) -> str:
    """32 hexadecimal digits that stand for `parts`, which must be JSON values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def cached_dataset(key: str, batches: Callable[[], Iterable[pa.RecordBatch]]) -> datasets.Dataset:
    """The data set cached under `key`, else written there from `batches` (at least one), a batch at a time.

    An error raised by `batches` passes through, and nothing is left behind.
    """
    path = cache_path(key)
    if not path.exists():
        with replacing(path) as temporary, pa.OSFile(str(temporary), "wb") as sink:
            remaining = iter(batches())
            first = next(remaining)
            with pa.ipc.new_stream(sink, first.schema) as writer:
                writer.write_batch(first)
                for batch in remaining:
                    writer.write_batch(batch)
    return datasets.Dataset(MemoryMappedTable.from_file(str(path)), fingerprint=key)


@contextmanager
def quiet_unless_terminal() -> Iterator[None]:
    """Within the block, `datasets` draws progress bars only if standard error is a terminal."""
    silence = not sys.stderr.isatty() and datasets.is_progress_bar_enabled()
    if silence:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if silence:
            datasets.enable_progress_bars()
