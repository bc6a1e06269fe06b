"""A teacher's outputs for a data set, written once and shared by all that learn from them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alembert.common.errors import InputError
from alembert.common.files import read_json
from alembert.models.features import FeatureRequest, Features
from alembert.training.teacher_cache_files import (
    FORMAT,
    LENGTHS,
    MANIFEST,
    Identity,
    Shape,
    batch_place,
    check_folder,
    feature_names,
    missing_features,
    only_writer,
    row_offsets,
    row_shape,
)
from alembert.training.teacher_cache_fingerprints import data_fingerprint, teacher_fingerprint
from alembert.training.teacher_cache_writer import Preparation
from alembert.training.teachers import CachedTeacher

DType = Literal["float16", "float32"]
_POLL_SECONDS = 1.0


class TeacherCache:
    """A folder of a teacher's outputs for all rows of a tokenised data set, read through memory maps.

    A file holds one feature of one layer (``logits.npy``, ``hidden_states-3.npy``): a flat array of the rows one
    after another, each without padding, so that a batch may be padded to any width. `teacher_cache.json` says
    what they belong to and how a row is shaped, `lengths.npy` how many tokens each row has.

    Args:
        folder: as `prepare` left it.

    Raises:
        InputError: the folder holds no teacher cache.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).is_file():
            raise InputError(f"{self.folder}: is no teacher cache; there is no {MANIFEST} in it")
        manifest = read_json(self.folder / MANIFEST)
        self.dtype = np.dtype(manifest["identity"]["dtype"])
        self.shapes: dict[str, Shape] = {
            name: tuple(shape) for name, shape in manifest["features"].items() if shape is not None
        }
        self.lengths: NDArray[np.int32] = np.load(self.folder / LENGTHS)
        self._arrays: dict[str, NDArray[Any]] = {}
        self._offsets_by_shape: dict[Shape, NDArray[np.int64]] = {}

    @classmethod
    def prepare(
        cls,
        folder: str | Path,
        teacher_model: PreTrainedModel,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        request: FeatureRequest,
        *,
        logits: bool = True,
        dtype: DType = "float16",
        batch_size: int = 32,
        budget_bytes: int | None = None,
        description: str = "Teacher outputs",
    ) -> CachedTeacher:
        """Writes what is missing of `request`, in one pass over the data, and returns a teacher that reads it.

        What it takes is computed from the rows' lengths, announced on the logger "alembert", and reserved on disk
        before the pass. An interrupted pass goes on where it was. Of several processes the main one writes and
        the others wait; they must see the same folder. Of several runs that share a folder one writes at a time.

        Args:
            folder: of the cache; made if need be. One folder holds one data set's outputs of one teacher.
            teacher_model: run in evaluation mode, in the precision of its weights.
            dataset: tokenised rows; `rows` given to the teacher later are its row numbers.
            tokenizer: pads the batches.
            request: the features wanted.
            logits: whether the logits are wanted too. Those of a masked language model are as wide as its
                vocabulary, for every token.
            dtype: of the files. float16 rounds to 11 bits and ends at ±65504.
            batch_size: rows per forward pass.
            budget_bytes: at most so many bytes may be written; None = as many as there is room for.
            description: what the progress bar says.

        Raises:
            InputError: the folder holds something else, or outputs for other data, of another teacher or of another
                dtype (says which); the disk or the budget has no room; the outputs do not fit the dtype.
        """
        folder = Path(folder)
        identity = Identity(FORMAT, dtype, data_fingerprint(dataset), teacher_fingerprint(teacher_model))
        names = [*(["logits"] if logits else []), *feature_names(request)]
        check_folder(folder, identity)
        if PartialState().is_main_process:
            if missing_features(folder, names):
                with only_writer(folder):
                    # What was missing, another run may have written meanwhile.
                    check_folder(folder, identity)
                    missing = missing_features(folder, names)
                    if missing:
                        preparation = Preparation(
                            folder, identity, teacher_model, dataset, tokenizer, request, missing
                        )
                        preparation.run(batch_size, budget_bytes, description)
        else:
            # A barrier would give up long before a large data set is through.
            while not (folder / MANIFEST).is_file() or missing_features(folder, names):
                time.sleep(_POLL_SECONDS)
                check_folder(folder, identity)
        PartialState().wait_for_everyone()
        return CachedTeacher(cls(folder), request, logits=logits)

    def read(
        self, request: FeatureRequest, rows: Tensor, attention_mask: Tensor, *, logits: bool = True
    ) -> Features:
        """The features of some rows, as float32 on the mask's device; positions of padding are 0.

        Args:
            request: the features wanted.
            rows: (B,) int64, row numbers of the data set.
            attention_mask: (B, n), 1 = token; the tokens of a row stand together, at either end.
            logits: whether to read the logits, where there are any.

        Raises:
            InputError: a feature is not in the cache, or a row has another length here than in the cache.
        """
        numbers, mask = rows.cpu().numpy(), attention_mask.cpu().numpy()
        spans = self._spans(numbers, mask)
        features = Features(attention_mask=attention_mask.long())
        for name in feature_names(request):
            feature, layer = name.rsplit("-", 1)
            if name not in self.shapes:
                raise InputError(
                    f"{self.folder}: {feature} of layer {layer} are not in this cache; prepare it with them"
                )
            getattr(features, feature)[int(layer)] = self._padded(name, numbers, spans, attention_mask)
        if logits and "logits" in self.shapes:
            features.logits = self._padded("logits", numbers, spans, attention_mask)
        return features

    def _spans(self, rows: NDArray[np.int64], mask: NDArray[Any]) -> list[slice]:
        """Where each row's tokens stand in the batch."""
        unknown = rows[(rows < 0) | (rows >= len(self.lengths))]
        if len(unknown):
            raise InputError(
                f"{self.folder}: there is no row {unknown[0]}: the cache has {len(self.lengths)} rows"
            )
        lengths = mask.sum(axis=1)
        for row, length in zip(rows, lengths, strict=True):
            if length != self.lengths[row]:
                raise InputError(
                    f"{self.folder}: row {row} has {length} tokens in the batch but {self.lengths[row]} in the cache: "
                    "the data, or its order, is not what the cache was made for"
                )
        starts = mask.argmax(axis=1)
        return [slice(start, start + length) for start, length in zip(starts, lengths, strict=True)]

    def _padded(
        self, name: str, rows: NDArray[np.int64], spans: Sequence[slice], attention_mask: Tensor
    ) -> Tensor:
        shape, offsets = self.shapes[name], self._offsets(self.shapes[name])
        if name not in self._arrays:
            self._arrays[name] = np.load(self.folder / f"{name}.npy", mmap_mode="r")
        width = attention_mask.shape[1]
        padded = torch.zeros(
            len(rows), *(width if size is None else size for size in shape), dtype=_torch_dtype(self.dtype)
        )
        target = padded.numpy()
        for index, (row, span) in enumerate(zip(rows, spans, strict=True)):
            values = self._arrays[name][offsets[row] : offsets[row + 1]]
            target[batch_place(shape, index, span)] = values.reshape(row_shape(shape, span.stop - span.start))
        # Widened on the device, so that half as much has to get there.
        return padded.to(attention_mask.device).float()

    def _offsets(self, shape: Shape) -> NDArray[np.int64]:
        if shape not in self._offsets_by_shape:
            self._offsets_by_shape[shape] = row_offsets(self.lengths, shape)
        return self._offsets_by_shape[shape]


def _torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    return torch.float16 if dtype == np.float16 else torch.float32
