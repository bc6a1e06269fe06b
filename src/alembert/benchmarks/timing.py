"""Wall-clock comparison of candidates on a machine that is not quiet, and what that machine is."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import transformers

from alembert.common.errors import InputError

T = TypeVar("T")


class Quartiles(NamedTuple):
    """Median, first and third quartile of a sample."""

    median: float
    lower: float
    upper: float


@dataclass
class Timing:
    """Seconds that one candidate took, round by round, warm-up left out."""

    seconds: list[float] = field(default_factory=list)

    @property
    def quartiles(self) -> Quartiles:
        """Median and quartiles of the seconds."""
        return _quartiles(self.seconds)

    @property
    def median(self) -> float:
        """Median seconds."""
        return self.quartiles.median

    def per_second(self, items: int) -> Quartiles:
        """Median and quartiles of a throughput, where every round handled `items` items."""
        return _quartiles([items / seconds for seconds in self.seconds])


def interleave(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    repeats: int,
    warm_up: int = 1,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Times every candidate once per round, so that whatever disturbs the machine disturbs all of them alike.

    Args:
        candidates: by name; each call does the whole work and returns only when it is done (a candidate on an
            accelerator synchronises before it returns).
        repeats, warm_up, seed, progress: as in `take_turns`.
        clock: seconds from any starting point, growing.

    Returns:
        The timings by name, each with `repeats` values; values at the same place are of the same round.

    Raises:
        InputError: no candidates, or a number of rounds out of range.
    """

    def timed(call: Callable[[], Any]) -> Callable[[], float]:
        def run() -> float:
            started = clock()
            call()
            return clock() - started

        return run

    measured = take_turns(
        {name: timed(call) for name, call in candidates.items()},
        repeats=repeats,
        warm_up=warm_up,
        seed=seed,
        progress=progress,
    )
    return {name: Timing(values) for name, values in measured.items()}


def take_turns(
    candidates: Mapping[str, Callable[[], T]],
    *,
    repeats: int,
    warm_up: int = 1,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[T]]:
    """Runs every candidate once per round and collects what it returns, which may be its own measurement.

    Each round has an order of its own, drawn by `seed`. A rotation would give every candidate the same one before it
    in all rounds but one, and with it the caches, the heat and the waiting threads that this one leaves behind.

    Args:
        candidates: by name.
        repeats: rounds whose values are kept, at least 1.
        warm_up: rounds before them, at least 0.
        seed: of the orders.
        progress: called after every candidate's run with the runs done and the runs in all, warm-up included.

    Returns:
        `repeats` values by name; values at the same place are of the same round.

    Raises:
        InputError: no candidates, or a number of rounds out of range.
    """
    if not candidates:
        raise InputError("Nothing to time: give at least one candidate.")
    if repeats < 1 or warm_up < 0:
        raise InputError(
            f"repeats is {repeats} and warm_up is {warm_up}: at least 1 and 0 rounds are needed."
        )
    names = list(candidates)
    kept: dict[str, list[T]] = {name: [] for name in names}
    total, done = (warm_up + repeats) * len(names), 0
    generator = np.random.default_rng(seed)
    for round_index in range(-warm_up, repeats):
        for name in (names[place] for place in generator.permutation(len(names))):
            value = candidates[name]()
            if round_index >= 0:
                kept[name].append(value)
            done += 1
            if progress is not None:
                progress(done, total)
    return kept


def ratio(baseline: Timing, candidate: Timing) -> Quartiles:
    """How many times faster the candidate is: median and quartiles of baseline / candidate, round by round.

    Raises:
        ValueError: the two were not timed for the same number of rounds.
    """
    return _quartiles([slow / fast for slow, fast in zip(baseline.seconds, candidate.seconds, strict=True)])


def machine_description(device: str | torch.device = "cpu") -> dict[str, Any]:
    """What a measurement was taken on.

    Keys: "processor" (its name), "cores" (that this process may use), "threads" (torch's, within an
    operation), "torch" and "transformers" (versions), "device".
    """
    return {
        "processor": _processor_name(),
        "cores": _usable_cores(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
        "device": _device_name(torch.device(device)),
    }


def _quartiles(values: list[float]) -> Quartiles:
    lower, median, upper = np.quantile(values, [0.25, 0.5, 0.75])
    return Quartiles(float(median), float(lower), float(upper))


def _processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def _usable_cores() -> int:
    # Containers and batch systems often grant fewer cores than the machine has; macOS cannot tell.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
