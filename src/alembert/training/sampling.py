"""The order of training examples: a function of seed and epoch alone, so that a resumed run repeats it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class EpochSampler(Sampler[int]):
    """Shuffles anew each epoch, with batches of similar lengths when `lengths` are given.

    transformers' own length-grouped sampler draws from the global random state, which a resumed run does
    not restore before the order is drawn.

    Args:
        size: number of examples.
        batch_size: examples per optimiser step over all processes: grouping by it makes the order the same
            for any number of processes.
        seed: of the order.
        lengths: tokens per example; None = plain shuffling.
    """

    def __init__(self, size: int, batch_size: int, seed: int, lengths: Sequence[int] | None = None) -> None:
        self.size, self.batch_size, self.seed, self.lengths = size, batch_size, seed, lengths
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order: that of epoch `epoch`, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        if self.lengths is None:
            return iter(torch.randperm(self.size, generator=generator).tolist())
        indices = get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)
        batches = [indices[start : start + self.batch_size] for start in range(0, self.size, self.batch_size)]
        # A short last batch stays last, or it would shift every batch behind it.
        full, rest = (batches[:-1], batches[-1:]) if self.size % self.batch_size else (batches, [])
        order = torch.randperm(len(full), generator=generator).tolist()
        return iter([index for batch in [*(full[i] for i in order), *rest] for index in batch])
