"""What the losses share: precision, masks, unit vectors.

A mask is `(B, n)`, 1 (or True) where there is a token. What stands at padding is replaced before any
arithmetic, so that not even NaN or infinity there reaches a value or a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alembert.common.errors import InputError


def full_precision(values: Tensor) -> Tensor:
    """float32 for half precision; float32 and float64 as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def without_autocast(values: Tensor) -> torch.autocast:
    """Context in which matrix products keep the operands' precision under mixed precision, too."""
    return torch.autocast(device_type=values.device.type, enabled=False)


def valid_tokens(mask: Tensor, rows: int, tokens: int) -> Tensor:
    """The mask as `(B, n)` bool.

    Raises:
        InputError: the mask has another shape than `(rows, tokens)`.
    """
    if mask.shape != (rows, tokens):
        raise InputError(
            f"mask must be ({rows}, {tokens}), one value per row and token, but has shape {tuple(mask.shape)}."
        )
    return mask != 0


def valid_pairs(valid: Tensor) -> Tensor:
    """`(B, 1, n, n)` bool from `(B, n)`: query and key are both tokens."""
    return valid[:, None, :, None] & valid[:, None, None, :]


def masked_mean(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of `values` where `valid`, which broadcasts to its shape; 0 where nothing is valid.

    `values` must be finite at padding.
    """
    count = valid.sum() * (values.numel() // valid.numel())
    return values.masked_fill(~valid, 0).sum() / count.clamp_min(1)


def unit_vectors(vectors: Tensor) -> Tensor:
    """`(..., D)` scaled to length 1; a zero vector stays zero and keeps a finite gradient."""
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / torch.where(length > 0, length, 1)
