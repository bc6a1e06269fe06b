"""Which kernel of PyTorch computes attention while a model learns."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

_MOST_TOKENS = 128
"""Beyond, matrix products hold rows × heads × tokens² numbers a layer for no measured gain."""


def attention_for_learning(encoder: Sequence[nn.Parameter], tokens: int) -> AbstractContextManager[Any]:
    """A context for a forward pass that gradients may flow back through.

    PyTorch's fused attention has no dropout on processors, so that models with dropout in their attention learn by
    plain matrix products. Those without (ModernBERT) take the fused kernel, whose gradient takes several times as
    long in bfloat16 (`benchmarks/attention_kernels.py`): they get the matrix products too, for batches of at most 128
    tokens a row. A frozen encoder keeps the fused kernel, which is faster forwards, and so does CUDA.

    Args:
        encoder: weights of what attends.
        tokens: of the longest row.
    """
    on_processor = all(weight.device.type == "cpu" for weight in encoder)
    learns = any(weight.requires_grad for weight in encoder)
    if on_processor and learns and tokens <= _MOST_TOKENS and torch.is_autocast_enabled("cpu"):
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()
