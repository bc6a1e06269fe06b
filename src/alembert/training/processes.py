"""What several training processes have to agree on."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed
from accelerate import PartialState
from torch import Tensor

_PATIENCE = timedelta(days=7)


def process_state() -> PartialState:
    """This process among those that train together; the first call connects them.

    They wait for one another while one of them tokenises, writes or measures, which takes hours on large data;
    torch by itself would give up after 10 minutes (NCCL) or 30 (gloo). torchrun ends those that wait for one that
    failed.
    """
    return PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of `values` over all processes; `values` itself where there is one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    total = values.clone()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()


def in_any_process(flag: bool) -> bool:
    """Whether the flag is up in this process or in another one."""
    raised = torch.tensor(float(flag), device=PartialState().device)
    return bool(mean_over_processes(raised) > 0)
