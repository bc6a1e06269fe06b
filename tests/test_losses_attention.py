"""Losses between attention scores against loops over pairs and torch.distributions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.distributions import Categorical, kl_divergence
from torch.nn import functional

from alembert.common.errors import InputError
from alembert.losses.attention import (
    attention_divergence,
    attention_score_mse,
    average_heads,
    common_heads,
)

LOSSES = [attention_score_mse, attention_divergence]
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]])
LENGTHS = MASK.sum(1).tolist()


def _sides(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    values = 2 * torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values[0], values[1]


def test_score_mse_equals_a_loop_over_valid_pairs() -> None:
    student, teacher = _sides(3, 2, 4, 4)
    squares = [
        (student[b, h, i, j] - teacher[b, h, i, j]).item() ** 2
        for b, length in enumerate(LENGTHS)
        for h in range(2)
        for i in range(length)
        for j in range(length)
    ]
    assert len(squares) == 2 * (9 + 16 + 4)
    expected = sum(squares) / len(squares)
    assert attention_score_mse(student, teacher, MASK).item() == pytest.approx(expected, rel=1e-12)


def test_divergence_is_teacher_first_over_valid_keys() -> None:
    student, teacher = _sides(3, 2, 4, 4)
    values = []
    for b, length in enumerate(LENGTHS):
        p, q = (Categorical(logits=side[b, :, :length, :length]) for side in (teacher, student))
        values.append(kl_divergence(p, q).flatten())
    expected = torch.cat(values).mean()
    torch.testing.assert_close(attention_divergence(student, teacher, MASK), expected)
    assert abs(attention_divergence(teacher, student, MASK) - expected) > 1e-2


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients(loss: Callable[..., Tensor]) -> None:
    student, teacher = (side.requires_grad_() for side in _sides(3, 2, 4, 4))
    assert gradcheck(lambda s, t: loss(s, t, MASK), (student, teacher))


@pytest.mark.parametrize("garbage", [-1e4, torch.finfo(torch.float64).min, -float("inf"), float("nan")])
@pytest.mark.parametrize("loss", LOSSES)
def test_padding_changes_nothing(loss: Callable[..., Tensor], garbage: float) -> None:
    student, teacher = _sides(3, 2, 4, 4)
    expected = loss(student, teacher, MASK)
    mask = functional.pad(MASK, (0, 2))
    pairs = (mask[:, None, :, None] & mask[:, None, None, :]) == 1
    padded = [functional.pad(side, (0, 2, 0, 2)).masked_fill(~pairs, garbage) for side in (student, teacher)]
    padded[0].requires_grad_()
    value = loss(*padded, mask)
    torch.testing.assert_close(value, expected)
    (gradient,) = torch.autograd.grad(value, padded[0])
    assert gradient.isfinite().all()
    assert (gradient.masked_select(~pairs) == 0).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_no_tokens_is_zero(loss: Callable[..., Tensor]) -> None:
    student, teacher = _sides(3, 2, 4, 4)
    assert loss(student, teacher, torch.zeros(3, 4)) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_is_raised(loss: Callable[..., Tensor], dtype: torch.dtype) -> None:
    student, teacher = ((200 * side).to(dtype) for side in _sides(3, 2, 4, 4))
    value = loss(student, teacher, MASK)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(student.float(), teacher.float(), MASK))


def test_heads_are_averaged_in_consecutive_groups() -> None:
    scores, _ = _sides(3, 6, 4, 4)
    expected = torch.stack([scores[:, :3].mean(1), scores[:, 3:].mean(1)], dim=1)
    torch.testing.assert_close(average_heads(scores, 2), expected)
    assert average_heads(scores, 6).equal(scores)
    assert common_heads(12, 8) == 4
    assert common_heads(12, 12) == 12


def test_refusals() -> None:
    student, teacher = torch.zeros(2, 8, 3, 3), torch.zeros(2, 12, 3, 3)
    for loss in LOSSES:
        with pytest.raises(InputError, match="8 attention heads and the teacher 12: average both to 4"):
            loss(student, teacher, torch.ones(2, 3))
        with pytest.raises(InputError, match="same texts"):
            loss(student, student[..., :2], torch.ones(2, 3))
        with pytest.raises(InputError, match=r"mask must be \(2, 3\)"):
            loss(student, student, torch.ones(3, 2))
    with pytest.raises(InputError, match="8 heads cannot be averaged to 3: choose one of 1, 2, 4, 8"):
        average_heads(student, 3)
