from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from alembert.benchmarks.timing import Timing, _processor_name, interleave, machine_description, ratio
from alembert.common.errors import InputError


class FakeClock:
    """A clock that only moves when a candidate says how long it takes."""

    def __init__(self) -> None:
        self.now = 100.0
        self.runs: list[str] = []

    def __call__(self) -> float:
        return self.now

    def candidate(self, name: str, *durations: float):
        remaining = iter(durations)

        def run() -> None:
            self.runs.append(name)
            self.now += next(remaining)

        return run


def _runs(seed: int) -> list[str]:
    clock = FakeClock()
    candidates = {name: clock.candidate(name, *[1.0] * 61) for name in "abcd"}
    interleave(candidates, repeats=60, warm_up=1, seed=seed, clock=clock)
    return ["".join(clock.runs[start : start + 4]) for start in range(0, len(clock.runs), 4)]


def test_candidates_take_turns_in_orders_that_are_drawn() -> None:
    rounds = _runs(3)
    assert len(rounds) == 61
    assert all(sorted(order) == list("abcd") for order in rounds)
    assert rounds == _runs(3) != _runs(4)
    # Each place, and each neighbour before one, comes up about as often as the others: 60 / 4 and 45 / 3.
    for name in "abcd":
        places = [sum(order[place] == name for order in rounds) for place in range(4)]
        before = [sum(f"{other}{name}" in order for order in rounds) for other in "abcd" if other != name]
        assert min(places) > 5 and min(before) > 5


def test_seconds_leave_out_the_warm_up() -> None:
    clock = FakeClock()
    candidates = {
        "slow": clock.candidate("slow", 50.0, 4.0, 6.0, 8.0),
        "fast": clock.candidate("fast", 90.0, 1.0, 2.0, 1.0),
    }
    timings = interleave(candidates, repeats=3, clock=clock)
    assert timings["slow"].seconds == [4.0, 6.0, 8.0]
    assert timings["fast"].seconds == [1.0, 2.0, 1.0]
    assert timings["slow"].median == 6.0
    assert timings["slow"].quartiles == (6.0, 5.0, 7.0)
    assert timings["slow"].per_second(24) == (4.0, 3.5, 5.0)
    # 4/1, 6/2, 8/1: round by round, not the ratio of the medians, which is 6.
    assert ratio(timings["slow"], timings["fast"]) == (4.0, 3.5, 6.0)


def test_progress_counts_every_run() -> None:
    clock, seen = FakeClock(), []
    candidates = {name: clock.candidate(name, *[1.0] * 3) for name in "ab"}
    interleave(
        candidates, repeats=2, warm_up=1, progress=lambda done, total: seen.append((done, total)), clock=clock
    )
    assert seen == [(done, 6) for done in range(1, 7)]


def test_ratio_needs_the_same_rounds() -> None:
    with pytest.raises(ValueError, match="shorter"):
        ratio(Timing([1.0, 2.0]), Timing([1.0]))


@pytest.mark.parametrize(
    ("candidates", "repeats", "warm_up"), [({}, 1, 0), ({"a": int}, 0, 0), ({"a": int}, 1, -1)]
)
def test_nothing_to_time_is_refused(candidates: dict, repeats: int, warm_up: int) -> None:
    with pytest.raises(InputError):
        interleave(candidates, repeats=repeats, warm_up=warm_up)


def test_machine_description() -> None:
    machine = machine_description()
    assert list(machine) == ["processor", "cores", "threads", "torch", "transformers", "device"]
    assert machine["processor"] and machine["device"] == "cpu"
    assert 1 <= machine["cores"] <= (os.cpu_count() or 1)
    assert machine["threads"] == torch.get_num_threads()


def test_processor_name(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Example CPU: 2.0 GHz\nmodel name\t: other\n")
    assert _processor_name(cpuinfo) == "Example CPU: 2.0 GHz"
    cpuinfo.write_text("processor\t: 0\nCPU implementer\t: 0x41\n")
    assert _processor_name(cpuinfo)
    assert _processor_name(tmp_path / "absent") == _processor_name(cpuinfo)
