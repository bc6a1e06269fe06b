"""What several training processes have to agree on."""

from __future__ import annotations

import torch.distributed
from torch import Tensor


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of `values` over all processes; `values` itself where there is one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    total = values.clone()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()
