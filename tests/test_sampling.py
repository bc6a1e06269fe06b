"""The order of examples that lie in shards."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alembert.training.sampling import EpochSampler


def order(sampler: EpochSampler, epoch: int = 0) -> list[int]:
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize(("grouped", "digest"), [(False, "d971e96e4b64fb79"), (True, "5f81512c1da4fcb1")])
def test_the_order_without_shards_is_what_it_was(grouped: bool, digest: str) -> None:
    lengths = [(37 * index) % 101 + 1 for index in range(200)]
    orders = [order(EpochSampler(200, 8, 5, lengths if grouped else None), epoch) for epoch in (0, 1)]
    assert hashlib.sha256(str(orders).encode()).hexdigest()[:16] == digest


@given(
    shards=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    batch_size=st.integers(1, 16),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 3),
    grouped=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_an_epoch_goes_through_each_shard_once(
    shards: list[int], batch_size: int, seed: int, epoch: int, grouped: bool
) -> None:
    size = sum(shards)
    lengths = np.random.default_rng(0).integers(1, 100, size=size).tolist()
    sampler = EpochSampler(size, batch_size, seed, lengths if grouped else None, shards)
    first = order(sampler, epoch)
    assert sorted(first) == list(range(size))
    torch.manual_seed(epoch)
    assert order(EpochSampler(size, batch_size, seed, lengths if grouped else None, shards), epoch) == first

    # A shard is begun when less than a batch is left of those before it.
    shard_order = torch.randperm(
        len(shards), generator=torch.Generator().manual_seed(seed + 1_000_003 * epoch)
    )
    shard_of = np.repeat(np.arange(len(shards)), shards)[first]
    before = 0
    for shard in shard_order.tolist():
        assert np.flatnonzero(shard_of == shard)[0] > before - batch_size
        before += shards[shard]


def test_orders_differ_from_epoch_to_epoch_and_shards_are_shuffled() -> None:
    shards = (50, 30, 70, 50)
    sampler = EpochSampler(200, 8, 3, None, shards)
    orders = [order(sampler, epoch) for epoch in range(6)]
    assert len(set(map(tuple, orders))) == 6
    shard_of = np.repeat(np.arange(4), shards)
    assert len({int(shard_of[each[0]]) for each in orders}) > 1
    assert orders[0] != sorted(orders[0])


def test_only_one_shard_is_looked_into_at_a_time() -> None:
    lengths = np.random.default_rng(0).integers(1, 200, size=397).tolist()
    asked: list[tuple[int, int]] = []

    def lookup(start: int, stop: int) -> list[int]:
        asked.append((start, stop))
        return lengths[start:stop]

    shards = (101, 149, 147)
    rows = iter(EpochSampler(397, 8, 5, lookup, shards))
    taken = [next(rows) for _ in range(8)]
    assert len(asked) == 1
    assert all(asked[0][0] <= row < asked[0][1] for row in taken)
    taken += rows
    assert sorted(asked) == [(0, 101), (101, 250), (250, 397)]
    assert taken == order(EpochSampler(397, 8, 5, lengths, shards))

    batches = np.split(np.array(taken), range(8, 397, 8))
    plain = np.split(np.array(order(EpochSampler(397, 8, 5, None, shards))), range(8, 397, 8))
    spread, plain_spread = (
        np.mean([np.ptp(np.array(lengths)[batch]) for batch in each]) for each in (batches, plain)
    )
    assert spread < 0.4 * plain_spread
    assert len(batches[-1]) == 397 % 8


def test_shards_that_are_not_the_data_are_refused() -> None:
    with pytest.raises(ValueError, match="the shards have 9 examples, not 10"):
        EpochSampler(10, 2, 0, shards=(4, 5))
