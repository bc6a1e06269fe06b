"""How a teacher's outputs lie in the files of a cache, and what says whether they may be used."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from alembert.common.errors import InputError
from alembert.common.files import read_json
from alembert.models.features import LAYER_FEATURES, FeatureRequest

FORMAT = 1
"""To be raised whenever files of the same name would hold something else."""
MANIFEST = "teacher_cache.json"
LENGTHS = "lengths.npy"
_LOCK = ".lock"
_SECONDS_BETWEEN_TRIES = 1.0

Shape = tuple[int | None, ...]
"""The shape of a feature for one row of n tokens; None stands for n."""

logger = logging.getLogger("alembert")


@dataclass(frozen=True)
class Identity:
    """What must agree for a folder's files to be used.

    Attributes:
        format: version of the files' layout.
        dtype: of the numbers.
        data: SHA-256 of the rows' token ids and types.
        teacher: SHA-256 of the teacher's weights and configuration.
    """

    format: int
    dtype: str
    data: str
    teacher: str

    def differences(self, other: Identity) -> list[str]:
        """What differs from `other`, that of the files there, in words."""
        names = {"format": "format", "dtype": "dtype", "data": "tokenised data", "teacher": "teacher"}
        return [
            f"{name}: {str(getattr(other, key))[:12]} there, {str(getattr(self, key))[:12]} now"
            for key, name in names.items()
            if getattr(self, key) != getattr(other, key)
        ]


def file_bytes(lengths: NDArray[np.int32], shape: Shape, dtype: str) -> int:
    """The size of a feature's file for rows of these lengths, to the byte."""
    header = io.BytesIO()
    description = {
        "descr": np.dtype(dtype).str,
        "fortran_order": False,
        "shape": (file_numbers(lengths, shape),),
    }
    np.lib.format.write_array_header_1_0(header, description)
    return header.tell() + file_numbers(lengths, shape) * np.dtype(dtype).itemsize


def file_numbers(lengths: NDArray[np.int32], shape: Shape) -> int:
    """How many numbers a feature's file holds for rows of these lengths."""
    factor = math.prod(size for size in shape if size is not None)
    return int((lengths.astype(np.int64) ** shape.count(None)).sum()) * factor


def row_offsets(lengths: NDArray[np.int32], shape: Shape) -> NDArray[np.int64]:
    """(rows + 1,): where each row starts in the file of a feature."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths.astype(np.int64) ** shape.count(None), out=offsets[1:])
    return offsets * math.prod(size for size in shape if size is not None)


def row_shape(shape: Shape, length: int) -> tuple[int, ...]:
    """The shape of a row of `length` tokens."""
    return tuple(length if size is None else size for size in shape)


def batch_place(shape: Shape, index: int, span: slice) -> tuple[int | slice, ...]:
    """The part of a padded batch that a row's numbers fill."""
    return (index, *(span if size is None else slice(None) for size in shape))


def feature_names(request: FeatureRequest) -> list[str]:
    """The names of a request's files, without their ending."""
    return [f"{feature}-{layer}" for feature in LAYER_FEATURES for layer in getattr(request, feature)]


def check_folder(folder: Path, identity: Identity) -> None:
    """Raises InputError unless the folder is free, or holds a cache of the same identity."""
    if (folder / MANIFEST).is_file():
        manifest = read_json(folder / MANIFEST)
        differences = identity.differences(Identity(**manifest["identity"]))
        # What has no whole file yet may be begun anew.
        if differences and manifest["features"]:
            raise InputError(
                f"{folder}: holds a teacher cache for something else ({'; '.join(differences)}): choose another "
                "folder, or remove this one"
            )
    elif folder.exists() and (
        not folder.is_dir() or any(not entry.name.startswith(".") for entry in folder.iterdir())
    ):
        raise InputError(f"{folder}: exists and is no teacher cache: choose another folder")


def missing_features(folder: Path, names: Iterable[str]) -> list[str]:
    """Those of `names` that have no whole file yet; a teacher that lacks a feature is no reason."""
    if not (folder / MANIFEST).is_file():
        return list(names)
    features = read_json(folder / MANIFEST)["features"]
    return [
        name
        for name in names
        if name not in features or (features[name] is not None and not (folder / f"{name}.npy").is_file())
    ]


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Within the block no other run writes to the folder; waits, however long, for one that does.

    The system ends the hold of a process that is killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        logger.info("Teacher cache %s: another run is writing to it, waiting for its end", folder)
        lock.acquire(poll_interval=_SECONDS_BETWEEN_TRIES)
    try:
        yield
    finally:
        lock.release()
