"""A split and its varied copies as a data set, computed chunk by chunk and kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from datasets import Dataset

from alembert.common.errors import InputError
from alembert.common.files import replacing
from alembert.common.progress import progress_bar
from alembert.data.augmentation.candidates import CandidateFinder
from alembert.data.augmentation.options import AugmentationOptions
from alembert.data.augmentation.rows import varied_rows
from alembert.data.augmentation.vectors import WordVectors
from alembert.data.cache import cache_path, cached_dataset, fingerprint_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger("alembert")

CHUNK_ROWS = 64
"""Rows that are augmented and kept together; an interrupted run loses fewer than these."""
_BYTES = torch.uint8
_VERSION = 1
"""To be raised whenever the same arguments would give other rows."""


def augment(
    dataset: Dataset,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vectors: WordVectors | None = None,
    options: AugmentationOptions | None = None,
    *,
    batch_size: int = 64,
    resume: bool = True,
) -> Dataset:
    """The rows of a split and varied copies of them, for a student to be distilled on.

    Words are replaced in their places; spaces and punctuation stay. A row that stands twice in `dataset`, with
    the same label, is taken once. What is done is kept on disk: the same call, also in another process, goes
    on after an interruption, and gives the finished data set at once.

    Args:
        dataset: a split of a `Task`: columns "text", optionally "text_pair", and "labels".
        model: a model for masked language modelling, on the device to compute on.
        tokenizer: the model's.
        vectors: for words that the tokenizer cuts in pieces, which stay as they are where it is None.
        options: TinyBERT's unless given.
        batch_size: masked texts in a forward pass; the rows do not depend on it, but for rounding.
        resume: whether to use what an earlier call left.

    Returns:
        A data set with the columns of `dataset`, each row followed by its copies, memory-mapped.

    Raises:
        InputError: `dataset` is empty, or the tokenizer has no mask token or gives no offsets.
    """
    options = options or AugmentationOptions()
    if dataset.num_rows == 0:
        raise InputError("There are no rows to augment.")
    if batch_size < 1:
        raise InputError(f"batch size {batch_size}: must be at least 1")
    finder = CandidateFinder(model.eval(), tokenizer, vectors, options, batch_size)
    key = augmentation_key(dataset, model, tokenizer, vectors, options)
    folder = cache_path(f"augmented-{key}").with_suffix("")
    if not resume:
        cache_path(f"augmented-{key}").unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
    augmented = cached_dataset(f"augmented-{key}", lambda: _chunks(dataset, finder, options, folder))
    shutil.rmtree(folder, ignore_errors=True)
    return augmented


def augmentation_key(
    dataset: Dataset,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vectors: WordVectors | None,
    options: AugmentationOptions,
) -> str:
    """Text that changes whenever the augmented rows would."""
    weights = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(tensor.detach().cpu().contiguous().flatten().view(dtype=_BYTES).numpy())
    content = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    return fingerprint_of(
        _VERSION,
        dataset._fingerprint,
        weights.hexdigest(),
        model.config.to_json_string(),
        content,
        vectors.content_key if vectors is not None else None,
        options.model_dump(),
    )


def _chunks(
    dataset: Dataset, finder: CandidateFinder, options: AugmentationOptions, folder: Path
) -> Iterator[pa.RecordBatch]:
    fields = [name for name in ("text", "text_pair") if name in dataset.column_names]
    table = dataset.select_columns([*fields, "labels"]).with_format("arrow")
    announce = _Announcement(dataset.num_rows)
    seen: set[bytes] = set()
    with progress_bar() as bar:
        progress = bar.add_task("Augmenting", total=dataset.num_rows)
        for start in range(0, dataset.num_rows, CHUNK_ROWS):
            rows: pa.Table = table[start : start + CHUNK_ROWS]
            rows = rows.take(_first_places(rows, seen))
            path = folder / f"{start}.arrow"
            if not path.exists():
                began = time.perf_counter()
                _write(path, _augmented(rows, fields, finder, options))
                announce(start + CHUNK_ROWS, time.perf_counter() - began)
            yield from _read(path)
            bar.update(progress, completed=min(start + CHUNK_ROWS, dataset.num_rows))


def _first_places(rows: pa.Table, seen: set[bytes]) -> list[int]:
    """The places of rows not seen before, which are then."""
    places = []
    for place, row in enumerate(rows.to_pylist()):
        digest = hashlib.sha256(json.dumps(row).encode()).digest()[:16]
        if digest not in seen:
            seen.add(digest)
            places.append(place)
    return places


def _augmented(
    rows: pa.Table, fields: list[str], finder: CandidateFinder, options: AugmentationOptions
) -> pa.RecordBatch:
    examples = list(zip(*(rows[name].to_pylist() for name in fields), strict=True))
    texts = list(dict.fromkeys(text for example in examples for text in example))
    replacements = dict(zip(texts, finder(texts), strict=True)) if texts else {}
    sources: list[int] = []
    varied: list[tuple[str, ...]] = []
    for place, example in enumerate(examples):
        copies = varied_rows(example, [replacements[text] for text in example], options)
        varied += copies
        sources += [place] * len(copies)
    columns: dict[str, Any] = {
        name: pa.array([row[place] for row in varied], pa.string()) for place, name in enumerate(fields)
    }
    labels = rows["labels"].combine_chunks().take(pa.array(sources, pa.int64()))
    return pa.RecordBatch.from_pydict(columns | {"labels": labels})


def _write(path: Path, batch: pa.RecordBatch) -> None:
    with (
        replacing(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_stream(sink, batch.schema) as writer,
    ):
        writer.write_batch(batch)


def _read(path: Path) -> list[pa.RecordBatch]:
    with pa.OSFile(str(path)) as source, pa.ipc.open_stream(source) as reader:
        batches: list[pa.RecordBatch] = reader.read_all().to_batches()
    return batches


class _Announcement:
    """Says after the first chunk how long the rest will take."""

    def __init__(self, rows: int, say: Callable[..., None] = logger.info) -> None:
        self._rows, self._say, self._said = rows, say, False

    def __call__(self, done: int, seconds: float) -> None:
        left = (self._rows - done) * seconds / CHUNK_ROWS
        if not self._said and left > 0:
            self._say(
                "Augmenting %d rows takes about %s; interrupted, the same command goes on.",
                self._rows,
                f"{left / 60:.0f} minutes" if left >= 90 else f"{left:.0f} seconds",
            )
        self._said = True
