"""The order of training examples: a function of seed and epoch alone, so that a resumed run repeats it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

Lengths = Sequence[int] | Callable[[int, int], Sequence[int]]
"""Tokens per example; a function gives those of examples `start` to `stop`."""


class EpochSampler(Sampler[int]):
    """Shuffles anew each epoch, with batches of similar lengths when `lengths` are given.

    Data in shards is gone through shard by shard, in an order that is shuffled too, and examples are shuffled
    within theirs: memory is that of one shard. What does not fill a batch goes on to the next shard.

    transformers' own length-grouped sampler draws from the global random state, which a resumed run does
    not restore before the order is drawn.

    Args:
        size: number of examples.
        batch_size: examples per optimiser step over all processes: grouping by it makes the order the same
            for any number of processes.
        seed: of the order.
        lengths: see `Lengths`; None = plain shuffling.
        shards: examples per shard, in the order in which they lie; None = all is shuffled at once.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        lengths: Lengths | None = None,
        shards: Sequence[int] | None = None,
    ) -> None:
        if shards is not None and sum(shards) != size:
            raise ValueError(f"the shards have {sum(shards)} examples, not {size}")
        self.size, self.batch_size, self.seed, self.lengths = size, batch_size, seed, lengths
        self.shards = shards
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order: that of epoch `epoch`, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        if self.shards is None:
            order = self._shuffled(self.size, self._lengths_of(0, self.size), generator)
            return iter(order)
        return self._by_shards(self.shards, generator)

    def _by_shards(self, shards: Sequence[int], generator: torch.Generator) -> Iterator[int]:
        stops = torch.tensor(shards).cumsum(0).tolist()
        pool: list[int] = []
        pool_lengths: list[int] | None = None if self.lengths is None else []
        for shard in torch.randperm(len(shards), generator=generator).tolist():
            start, stop = stops[shard] - shards[shard], stops[shard]
            pool += range(start, stop)
            added = self._lengths_of(start, stop)
            if pool_lengths is not None and added is not None:
                pool_lengths += added
            order = self._shuffled(len(pool), pool_lengths, generator)
            full = len(order) - len(order) % self.batch_size
            yield from (pool[index] for index in order[:full])
            if pool_lengths is not None:
                pool_lengths = [pool_lengths[index] for index in order[full:]]
            pool = [pool[index] for index in order[full:]]
        yield from pool

    def _lengths_of(self, start: int, stop: int) -> Sequence[int] | None:
        if self.lengths is None:
            return None
        return list(self.lengths(start, stop) if callable(self.lengths) else self.lengths[start:stop])

    def _shuffled(self, size: int, lengths: Sequence[int] | None, generator: torch.Generator) -> list[int]:
        """0 … size − 1 in random order; given lengths, in batches of similar ones."""
        if lengths is None:
            order: list[int] = torch.randperm(size, generator=generator).tolist()
            return order
        indices = get_length_grouped_indices(lengths, self.batch_size, generator=generator)
        batches = [indices[start : start + self.batch_size] for start in range(0, size, self.batch_size)]
        # A short last batch stays last, or it would shift every batch behind it.
        full, rest = (batches[:-1], batches[-1:]) if size % self.batch_size else (batches, [])
        batch_order = torch.randperm(len(full), generator=generator).tolist()
        return [index for batch in [*(full[i] for i in batch_order), *rest] for index in batch]
