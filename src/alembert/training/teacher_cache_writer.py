"""The pass over the data that fills a cache of a teacher's outputs."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from alembert.common.errors import InputError
from alembert.common.files import read_json, replacing, write_json
from alembert.common.progress import progress_bar
from alembert.models.features import LAYER_FEATURES, FeatureRequest, Features
from alembert.training.teacher_cache_files import (
    LENGTHS,
    MANIFEST,
    Identity,
    Shape,
    batch_place,
    file_bytes,
    file_numbers,
    row_offsets,
)
from alembert.training.teacher_cache_fingerprints import row_lengths
from alembert.training.teachers import LiveTeacher

_PARTIAL = ".partial.json"
_SAVE_SECONDS = 60.0
_MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_TOKEN_AXES = {
    "hidden_states": (0,),
    "attention_scores": (1, 2),
    "attention_probabilities": (1, 2),
    "queries": (1,),
    "keys": (1,),
    "values": (1,),
}

logger = logging.getLogger("alembert")


class Preparation:
    """One pass over the data that writes the files which are missing."""

    def __init__(
        self,
        folder: Path,
        identity: Identity,
        teacher_model: PreTrainedModel,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        request: FeatureRequest,
        missing: Sequence[str],
    ) -> None:
        self.folder, self.identity, self.dataset = folder, identity, dataset
        self.model = teacher_model
        self.teacher = LiveTeacher(teacher_model, _only(request, missing))
        self.missing = list(missing)
        self.lengths = row_lengths(dataset)
        # The longest first: what does not fit into memory fails at once.
        self.order = np.argsort(-self.lengths, kind="stable")
        self.pad = DataCollatorWithPadding(tokenizer)

    def run(self, batch_size: int, budget_bytes: int | None, description: str) -> None:
        """Writes what is missing; raises InputError when it does not fit the disk or the budget."""
        with _on_training_device(self.model):
            shapes = self._shapes()
            written = {name: shape for name, shape in shapes.items() if shape is not None}
            done = self._resumable(list(written))
            if written:
                if done is None:
                    self._remove_leftovers()
                self._announce(written, budget_bytes, reserved=done is not None)
            self._begin()
            if written:
                self._write(written, batch_size, done or 0, description)
        for name in written:
            self._partial(name).replace(self.folder / f"{name}.npy")
        manifest = read_json(self.folder / MANIFEST)
        manifest["features"] |= shapes
        write_json(self.folder / MANIFEST, manifest)
        (self.folder / _PARTIAL).unlink(missing_ok=True)

    def _shapes(self) -> dict[str, Shape | None]:
        """How a row of each missing file is shaped, found out on the shortest row; None: the teacher has none."""
        features = self.teacher(self._batch(self.order[-1:]), None)
        shapes: dict[str, Shape | None] = {}
        for name in self.missing:
            values = _value(features, name)
            if values is None:
                shapes[name] = None
                continue
            sizes = values.shape[1:]
            axes = _TOKEN_AXES.get(name.rsplit("-", 1)[0], (0,) if len(sizes) == 2 else ())
            shapes[name] = tuple(None if axis in axes else size for axis, size in enumerate(sizes))
        return shapes

    def _announce(self, shapes: dict[str, Shape], budget_bytes: int | None, *, reserved: bool) -> None:
        needed = sum(file_bytes(self.lengths, shape, self.identity.dtype) for shape in shapes.values())
        existing = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free
        logger.info(
            "Teacher cache %s: %d rows, %s: %s to write, %s free on this disk",
            self.folder,
            len(self.lengths),
            ", ".join(shapes),
            _gib(needed),
            _gib(free),
        )
        advice = "ask for fewer layers, free some room, or let the teacher run in every step"
        if budget_bytes is not None and needed > budget_bytes:
            raise InputError(
                f"{self.folder}: the teacher's outputs take {_gib(needed)}, and no more than {_gib(budget_bytes)} may "
                f"be written: {advice}"
            )
        if not reserved and needed > free:
            raise InputError(
                f"{self.folder}: the teacher's outputs take {_gib(needed)}, but the disk has {_gib(free)} left: "
                f"{advice}"
            )

    def _begin(self) -> None:
        """Claims the folder."""
        manifest_path = self.folder / MANIFEST
        features = read_json(manifest_path)["features"] if manifest_path.is_file() else {}
        # The manifest first: without it, the folder would be taken for someone else's.
        write_json(manifest_path, {"identity": vars(self.identity), "features": features})
        with replacing(self.folder / LENGTHS) as temporary:
            np.save(temporary, self.lengths)

    def _resumable(self, names: list[str]) -> int | None:
        """How many rows an interrupted pass over the same files got through; None = there is none."""
        if not (self.folder / _PARTIAL).is_file():
            return None
        partial = read_json(self.folder / _PARTIAL)
        same = partial["identity"] == vars(self.identity) and partial["names"] == names
        if same and all(self._partial(name).is_file() for name in names):
            return int(partial["rows"]) or None
        return None

    def _remove_leftovers(self) -> None:
        """Frees what a pass that cannot be resumed has left, before the room on the disk is looked at."""
        (self.folder / _PARTIAL).unlink(missing_ok=True)
        for leftover in self.folder.glob(".*.npy.partial"):
            leftover.unlink()

    def _write(self, shapes: dict[str, Shape], batch_size: int, done: int, description: str) -> None:
        arrays = {
            name: _reserved(self._partial(name), file_numbers(self.lengths, shape), self.identity.dtype)
            for name, shape in shapes.items()
        }
        offsets = {name: row_offsets(self.lengths, shape) for name, shape in shapes.items()}
        loader = DataLoader(
            self.dataset.select_columns(self._columns()).select(self.order[done:]),
            batch_size=batch_size,
            collate_fn=self.pad,
        )
        saved = time.monotonic()
        try:
            with progress_bar() as bar:
                task = bar.add_task(description, total=len(self.order), completed=done)
                for batch in loader:
                    rows = self.order[done : done + len(batch["input_ids"])]
                    features = self.teacher(batch.to(self.model.device), None)
                    for name, array in arrays.items():
                        values = _value(features, name)
                        assert values is not None
                        self._store(
                            name, array, offsets[name], shapes[name], rows, batch["attention_mask"], values
                        )
                    done += len(rows)
                    bar.update(task, completed=done)
                    if time.monotonic() - saved > _SAVE_SECONDS:
                        self._save(arrays, done)
                        saved = time.monotonic()
        except InputError:
            for name in shapes:
                self._partial(name).unlink()
            (self.folder / _PARTIAL).unlink(missing_ok=True)
            raise
        finally:
            if self._partial(next(iter(shapes))).exists():
                self._save(arrays, done)

    def _store(
        self,
        name: str,
        array: NDArray[Any],
        offsets: NDArray[np.int64],
        shape: Shape,
        rows: NDArray[np.int64],
        attention_mask: Tensor,
        values: Tensor,
    ) -> None:
        numbers, starts = values.float().cpu().numpy(), attention_mask.argmax(dim=1).tolist()
        for index, (row, start) in enumerate(zip(rows, starts, strict=True)):
            span = slice(start, start + int(self.lengths[row]))
            exact = numbers[batch_place(shape, index, span)]
            with np.errstate(over="ignore"):
                stored = exact.astype(array.dtype)
            if not np.isfinite(stored).all():
                self._refuse(name, int(row), exact)
            array[offsets[row] : offsets[row + 1]] = stored.reshape(-1)

    def _refuse(self, name: str, row: int, exact: NDArray[np.float32]) -> None:
        if not np.isfinite(exact).all():
            raise InputError(
                f"the teacher's {name} of row {row} are not finite numbers: look into the teacher"
            )
        raise InputError(
            f"the teacher's {name} of row {row} reach {np.abs(exact).max():.4g}, more than float16 holds (65504): "
            'prepare the cache with dtype="float32" (--training teacher_cache_dtype=float32)'
        )

    def _save(self, arrays: dict[str, np.memmap[Any, Any]], rows: int) -> None:
        for array in arrays.values():
            array.flush()
        write_json(
            self.folder / _PARTIAL, {"identity": vars(self.identity), "names": list(arrays), "rows": rows}
        )

    def _partial(self, name: str) -> Path:
        return self.folder / f".{name}.npy.partial"

    def _columns(self) -> list[str]:
        return [name for name in _MODEL_INPUTS if name in self.dataset.column_names]

    def _batch(self, rows: NDArray[np.int64]) -> dict[str, Tensor]:
        selected = self.dataset.select_columns(self._columns()).select(rows)
        return dict(self.pad(list(selected)).to(self.model.device))


def _reserved(path: Path, size: int, dtype: str) -> np.memmap[Any, Any]:
    """A writable array in a file whose room on disk is taken: a full disk would kill the process later on."""
    if path.exists():
        array: np.memmap[Any, Any] = np.lib.format.open_memmap(path, mode="r+")
        return array
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=(size,))
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            except OSError as error:
                path.unlink()
                raise InputError(f"{path.parent}: no room for {path.name}: {error.strerror}") from error
    return array


def _only(request: FeatureRequest, names: Sequence[str]) -> FeatureRequest:
    """The part of a request that these files are of."""
    return FeatureRequest(
        **{
            feature: tuple(layer for layer in getattr(request, feature) if f"{feature}-{layer}" in names)
            for feature in LAYER_FEATURES
        }
    )


def _value(features: Features, name: str) -> Tensor | None:
    if name == "logits":
        return features.logits
    feature, layer = name.rsplit("-", 1)
    value: Tensor = getattr(features, feature)[int(layer)]
    return value


@contextmanager
def _on_training_device(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, the model is on this process's GPU, where there is one."""
    device = model.device
    model.to(PartialState().device if torch.cuda.is_available() else device)
    try:
        yield
    finally:
        model.to(device)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
