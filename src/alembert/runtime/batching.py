"""Batches of similar lengths under a token budget, over input of any size, with the order restored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any, TypeVar

import numpy as np

from alembert.runtime.backend import SteppedBackend
from alembert.runtime.exited import ExitedBatch
from alembert.runtime.policies import ExitPolicy

T = TypeVar("T")


def windows(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Consecutive lists of at most `size` items, read no further ahead than one list."""
    iterator = iter(items)
    while window := list(islice(iterator, size)):
        yield window


def token_budget_batches(lengths: Sequence[int], budget: int) -> list[np.ndarray]:
    """Splits positions 0 … len(lengths)−1 into batches of similar length.

    Args:
        lengths: tokens of each text.
        budget: rows × longest row of a batch stay at or under this many tokens; a longer text stands alone.

    Returns batches of positions (int64), longest texts first, so that memory peaks at the start.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    batches, start = [], 0
    while start < len(order):
        rows = max(1, budget // max(1, int(lengths[order[start]])))
        batches.append(order[start : start + rows])
        start += rows
    return batches


def pad_rows(rows: Sequence[Mapping[str, Sequence[int]]], fill: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Rows filled up to the longest, with their mask.

    Args:
        rows: `input_ids` and other lists of the same length, by name.
        fill: what each of them is filled up with.

    Returns (rows, tokens) int64 arrays by name, `attention_mask` (1 = token) among them.
    """
    if len(rows) == 1:
        row = {**rows[0], "attention_mask": [1] * len(rows[0]["input_ids"])}
        return {name: np.array([values], np.int64) for name, values in row.items()}
    lengths = np.fromiter((len(row["input_ids"]) for row in rows), dtype=np.int64, count=len(rows))
    mask = np.arange(lengths.max()) < lengths[:, None]
    total = int(lengths.sum())
    padded = {}
    for name in rows[0]:
        padded[name] = np.full(mask.shape, fill[name], dtype=np.int64)
        values = chain.from_iterable(row[name] for row in rows)
        padded[name][mask] = np.fromiter(values, dtype=np.int64, count=total)
    return padded | {"attention_mask": mask.astype(np.int64)}


def run_regrouped(
    backend: SteppedBackend,
    batches: Iterable[tuple[np.ndarray, dict[str, np.ndarray]]],
    policy: ExitPolicy,
    speed: float,
    token_limit: int,
) -> list[tuple[np.ndarray, ExitedBatch]]:
    """Runs batches segment by segment; survivors wait until there are enough of them for a full batch.

    Before each segment there is a place where rows wait. When those of another batch would bring it over the
    limit, the waiting rows go on first, as one batch. So late segments see full batches as early ones do, however
    few rows of each batch are left, and at most `token_limit` tokens wait before each segment.

    Args:
        backend: what runs the segments.
        batches: positions (rows,) and padded arrays (rows, tokens); of similar lengths one after another.
        policy: resolved for the model's labels.
        speed: in [0, 1].
        token_limit: rows × longest row of a batch that is put together.

    Returns positions and answers of the rows that left together.
    """
    answered: list[tuple[np.ndarray, ExitedBatch]] = []
    waiting: dict[int, list[Any]] = {}

    def advance(rows: Any) -> None:
        left, staying = backend.advance(rows, policy, speed)
        if left is not None:
            answered.append(left)
        if staying is not None:
            enqueue(staying)

    def enqueue(rows: Any) -> None:
        parts = waiting.setdefault(rows.segment, [])
        together = [*parts, rows]
        size = sum(len(part.positions) for part in together) * max(part.tokens for part in together)
        if parts and size > token_limit:
            flush(rows.segment)
        waiting.setdefault(rows.segment, []).append(rows)

    def flush(segment: int) -> None:
        advance(backend.merge(waiting.pop(segment)))

    for positions, batch in batches:
        advance(backend.start(batch, positions))
    while waiting:
        flush(min(waiting))
    return answered
