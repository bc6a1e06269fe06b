"""What the processor offers to this process: threads, and instructions for products of 8-bit integers."""

from __future__ import annotations

import math
import os
from pathlib import Path

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
CPU_QUOTA_OLD = Path("/sys/fs/cgroup/cpu")
"""Of version 1 of control groups: a folder."""
CPU_FACTS = Path("/proc/cpuinfo")
_INTEGER_PRODUCTS = frozenset(("avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8"))


def usable_threads() -> int:
    """OMP_NUM_THREADS where it is set, as for torch; else the processors that this process may use.

    These are the ones that it may run on, and no more than its control group's quota, rounded up.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read(CPU_QUOTA).partition(" ")
    if not quota:
        quota, period = (_read(CPU_QUOTA_OLD / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    if quota.isdecimal() and period.strip().isdecimal() and int(period) > 0:
        allowed = min(allowed, math.ceil(int(quota) / int(period)))
    return max(1, allowed)


def adds_up_in_16_bits() -> bool:
    """Whether this is an x86 processor without VNNI: its sums of two 8-bit products are cut off at 16 bits."""
    lines = (line for line in _read(CPU_FACTS).splitlines() if line.startswith("flags"))
    flags = set(next(lines, "").split())
    return "avx2" in flags and not flags & _INTEGER_PRODUCTS


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
