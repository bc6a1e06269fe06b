"""Losses between hidden states against loops over tokens and torch's own cosine."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional

from alembert.common.errors import InputError
from alembert.losses.hidden import hidden_state_cosine, hidden_state_mse, normalised_cls_mse

LOSSES = [hidden_state_mse, hidden_state_cosine]
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]])


def _sides(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    values = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values[0].to(dtype), values[1].to(dtype)


def test_losses_equal_a_loop_over_tokens() -> None:
    student, teacher = _sides(3, 4, 5)
    tokens = [(student[b, i].tolist(), teacher[b, i].tolist()) for b, i in torch.nonzero(MASK).tolist()]
    squares = [sum((x - y) ** 2 for x, y in zip(s, t, strict=True)) / 5 for s, t in tokens]
    assert hidden_state_mse(student, teacher, MASK).item() == pytest.approx(sum(squares) / 8, rel=1e-12)

    pairs = torch.tensor(tokens, dtype=torch.float64)
    expected = functional.cosine_embedding_loss(pairs[:, 0], pairs[:, 1], torch.ones(8))
    torch.testing.assert_close(hidden_state_cosine(student, teacher, MASK), expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients(loss: Callable[..., Tensor]) -> None:
    student, teacher = (side.requires_grad_() for side in _sides(3, 4, 5))
    assert gradcheck(lambda s, t: loss(s, t, MASK), (student, teacher))
    assert gradcheck(normalised_cls_mse, (student[:, 0], teacher[:, 0]))


@pytest.mark.parametrize("garbage", [1e30, float("inf"), float("nan")])
@pytest.mark.parametrize("loss", LOSSES)
def test_padding_changes_nothing(loss: Callable[..., Tensor], garbage: float) -> None:
    student, teacher = _sides(3, 4, 5)
    expected = loss(student, teacher, MASK)
    padded_student, padded_teacher = (
        functional.pad(side.masked_fill(MASK[..., None] == 0, garbage), (0, 0, 0, 3), value=garbage)
        for side in (student, teacher)
    )
    padded_student.requires_grad_()
    value = loss(padded_student, padded_teacher, functional.pad(MASK, (0, 3)))
    torch.testing.assert_close(value, expected)
    (gradient,) = torch.autograd.grad(value, padded_student)
    assert (gradient[functional.pad(MASK, (0, 3)) == 0] == 0).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_no_tokens_is_zero(loss: Callable[..., Tensor]) -> None:
    student, teacher = _sides(3, 4, 5)
    assert loss(student, teacher, torch.zeros(3, 4)) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_is_raised(loss: Callable[..., Tensor], dtype: torch.dtype) -> None:
    # Squares of 300 overflow float16.
    student, teacher = (300 * side for side in _sides(3, 4, 5, dtype=dtype))
    value = loss(student, teacher, MASK)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(student.float(), teacher.float(), MASK))


@settings(deadline=None, max_examples=25)
@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.integers(0, 100))
def test_cosine_and_normalised_losses_ignore_lengths(first: float, second: float, seed: int) -> None:
    student, teacher = _sides(3, 4, 5, seed=seed)
    scaled = first * student, second * teacher
    expected = hidden_state_cosine(student, teacher, MASK)
    torch.testing.assert_close(hidden_state_cosine(*scaled, MASK), expected)
    vectors = normalised_cls_mse(student[:, 0], teacher[:, 0])
    torch.testing.assert_close(normalised_cls_mse(scaled[0][:, 0], scaled[1][:, 0]), vectors)
    # ‖a − b‖² = 2 − 2 cos for vectors of length 1.
    cosine = functional.cosine_similarity(student[:, 0], teacher[:, 0])
    torch.testing.assert_close(vectors, (2 - 2 * cosine).mean())


def test_normalised_mse_of_the_code_divides_by_the_width() -> None:
    student, teacher = _sides(6, 7)
    expected = functional.mse_loss(functional.normalize(student), functional.normalize(teacher))
    torch.testing.assert_close(normalised_cls_mse(student, teacher, "mean"), expected)
    torch.testing.assert_close(normalised_cls_mse(student, teacher, "sum"), 7 * expected)


def test_zero_vectors_have_a_finite_gradient() -> None:
    student = torch.zeros(2, 3, 4, requires_grad=True)
    loss = hidden_state_cosine(student, torch.ones(2, 3, 4), torch.ones(2, 3))
    assert loss == 1
    (gradient,) = torch.autograd.grad(loss + normalised_cls_mse(student[:, 0], torch.ones(2, 4)), student)
    assert gradient.abs().max() < 10


def test_refusals() -> None:
    student, teacher = torch.zeros(2, 3, 4), torch.zeros(2, 3, 6)
    with pytest.raises(InputError, match="4 wide and the teacher 6: project"):
        hidden_state_mse(student, teacher, torch.ones(2, 3))
    with pytest.raises(InputError, match="4 wide and the teacher 6: project"):
        normalised_cls_mse(student[:, 0], teacher[:, 0])
    with pytest.raises(InputError, match="same texts"):
        hidden_state_cosine(student, student[:1], torch.ones(2, 3))
    with pytest.raises(InputError, match=r"mask must be \(2, 3\)"):
        hidden_state_mse(student, student, torch.ones(2, 4))
    with pytest.raises(InputError, match="choose one of sum, mean"):
        normalised_cls_mse(student[:, 0], student[:, 0], "none")
