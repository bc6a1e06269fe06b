"""What a cache of a teacher's outputs was made from: the rows' tokens and the teacher's weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedModel

from alembert.common.errors import InputError

# Of the configuration, what changes when a model is saved or moved, or says only what answers are called.
_IGNORED_CONFIGURATION = (
    "_name_or_path",
    "architectures",
    "dtype",
    "id2label",
    "label2id",
    "problem_type",
    "transformers_version",
)


def data_fingerprint(dataset: Dataset) -> str:
    """SHA-256 of the token ids, token types and lengths of all rows, however the data set is stored."""
    digests = {}
    for column in ("input_ids", "token_type_ids"):
        if column in dataset.column_names:
            lengths_digest, digest = hashlib.sha256(), hashlib.sha256()
            for lengths, values in _tokens(dataset, column):
                lengths_digest.update(lengths.tobytes())
                digest.update(values.tobytes())
            digests[column] = [lengths_digest.hexdigest(), digest.hexdigest()]
    return _digest(digests)


def teacher_fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 of the weights, the class and what the configuration says of the computation."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(json.dumps([name, str(weight.dtype), list(weight.shape)]).encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    configuration = {
        key: value for key, value in model.config.to_dict().items() if key not in _IGNORED_CONFIGURATION
    }
    return _digest([type(model).__name__, configuration, digest.hexdigest()])


def row_lengths(dataset: Dataset) -> NDArray[np.int32]:
    """(rows,) tokens per row."""
    return np.concatenate([lengths for lengths, _ in _tokens(dataset, "input_ids")])


def _tokens(dataset: Dataset, column: str) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32]]]:
    """The lengths and the values, one after another, of the lists of a column, some rows at a time."""
    if not len(dataset):
        raise InputError("there are no rows to run the teacher on")
    for batch in dataset.select_columns([column]).with_format("arrow").iter(batch_size=10_000):
        lists = batch[column].combine_chunks()
        lengths = lists.value_lengths().to_numpy(zero_copy_only=False).astype(np.int32)
        yield lengths, lists.flatten().to_numpy(zero_copy_only=False).astype(np.int32)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
