"""Batches of similar lengths under a token budget, over input of any size, with the order restored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import numpy as np

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
