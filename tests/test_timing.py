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


def test_candidates_take_turns_and_the_order_rotates() -> None:
    clock = FakeClock()
    candidates = {name: clock.candidate(name, *[1.0] * 5) for name in "abc"}
    interleave(candidates, repeats=4, warm_up=1, clock=clock)
    assert clock.runs == list("cababcbcacababc")


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
