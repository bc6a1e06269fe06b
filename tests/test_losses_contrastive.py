"""COS-NCE against loops over Eq. 1, and the vectors of a layer."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional

from alembert.common.errors import InputError
from alembert.losses.contrastive import VECTOR_KINDS, cos_nce, layer_vectors

MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]])


def _sides(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    values = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values[0], values[1]


def _distance(a: list[float], b: list[float]) -> float:
    product = sum(x * y for x, y in zip(a, b, strict=True))
    return 1 - product / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def _reference(student: Tensor, teacher: Tensor, count: int) -> float:
    z_s, z_t, rows = student.tolist(), teacher.tolist(), len(student)
    total = 0.0
    for i in range(rows):
        positive = _distance(z_t[i], z_s[i])
        negatives = [z_t[(i + k) % rows] for k in range(1, count + 1)]
        push = sum(2 - (_distance(n, z_s[i]) - positive) for n in negatives)
        total += push / (2 * count) + positive
    return total / rows


@pytest.mark.parametrize(("negatives", "count"), [(None, 5), (2, 2), (5, 5), (99, 5)])
def test_loss_equals_equation_1(negatives: int | None, count: int) -> None:
    student, teacher = _sides(6, 4)
    value = cos_nce(student, teacher, negatives)
    assert value.item() == pytest.approx(_reference(student, teacher, count), rel=1e-12)


def test_extremes() -> None:
    axes = torch.eye(2)
    assert cos_nce(axes, axes).item() == pytest.approx(1 + 0 - 0.5)
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert cos_nce(opposite, opposite).item() == pytest.approx(0)
    assert cos_nce(opposite, opposite.flip(0)).item() == pytest.approx(4)


def test_one_row_has_only_the_pull() -> None:
    student, teacher = _sides(1, 4)
    expected = _distance(teacher[0].tolist(), student[0].tolist())
    assert cos_nce(student, teacher).item() == pytest.approx(expected)


def test_gradients() -> None:
    student, teacher = (side.requires_grad_() for side in _sides(5, 4))
    assert gradcheck(cos_nce, (student, teacher))
    assert gradcheck(lambda s, t: cos_nce(s, t, 2), (student, teacher))


def test_zero_vectors_have_a_finite_gradient() -> None:
    student = torch.zeros(3, 4, requires_grad=True)
    loss = cos_nce(student, torch.ones(3, 4))
    # All distances are 1: 1 + 1.5 − 0.5.
    assert loss == 2
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.isfinite().all()
    assert cos_nce(torch.ones(3, 4), torch.zeros(3, 4)) == 2


@settings(deadline=None, max_examples=25)
@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.integers(0, 100))
def test_loss_ignores_lengths_and_stays_in_range(first: float, second: float, seed: int) -> None:
    student, teacher = _sides(4, 3, seed=seed)
    value = cos_nce(student, teacher)
    torch.testing.assert_close(cos_nce(first * student, second * teacher), value)
    assert 0 <= value <= 4


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_raised(autocast: bool) -> None:
    student, teacher = (side.bfloat16() for side in _sides(6, 4))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = cos_nce(student, teacher)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(_reference(student, teacher, 5), rel=1e-5)


def test_vectors_of_a_layer() -> None:
    hidden, _ = _sides(3, 4, 5)
    assert layer_vectors(hidden, MASK, "cls").equal(hidden[:, 0])
    for row, length in enumerate(MASK.sum(1).tolist()):
        kept = hidden[row, :length]
        torch.testing.assert_close(layer_vectors(hidden, MASK, "mean")[row], kept.mean(0))
        flat = torch.cat([kept.flatten(), torch.zeros((4 - length) * 5, dtype=kept.dtype)])
        assert layer_vectors(hidden, MASK, "flatten")[row].equal(flat)
        tokens = layer_vectors(hidden, MASK, "tokens")[row].view(4, 5)
        torch.testing.assert_close(tokens[:length], functional.normalize(kept, dim=-1))
        assert (tokens[length:] == 0).all()


def test_cosine_of_tokens_is_the_mean_over_tokens() -> None:
    student, teacher = _sides(3, 4, 5)
    value = functional.cosine_similarity(
        layer_vectors(student, MASK, "tokens"), layer_vectors(teacher, MASK, "tokens")
    )
    per_token = functional.cosine_similarity(student, teacher, dim=-1) * MASK
    torch.testing.assert_close(value, per_token.sum(1) / MASK.sum(1))


@pytest.mark.parametrize("kind", VECTOR_KINDS)
@pytest.mark.parametrize("garbage", [1e30, float("nan")])
def test_padding_changes_nothing(kind: str, garbage: float) -> None:
    student, teacher = _sides(3, 4, 5)
    expected = cos_nce(layer_vectors(student, MASK, kind), layer_vectors(teacher, MASK, kind))
    mask = functional.pad(MASK, (0, 2))
    padded = [
        functional.pad(side, (0, 0, 0, 2)).masked_fill(mask[..., None] == 0, garbage)
        for side in (student, teacher)
    ]
    padded[0].requires_grad_()
    value = cos_nce(*(layer_vectors(side, mask, kind) for side in padded))
    torch.testing.assert_close(value, expected)
    (gradient,) = torch.autograd.grad(value, padded[0])
    assert gradient.isfinite().all()
    assert (gradient[mask == 0] == 0).all()


@pytest.mark.parametrize("kind", VECTOR_KINDS)
def test_a_row_without_tokens_is_harmless(kind: str) -> None:
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    vectors = layer_vectors(hidden, torch.tensor([[0, 0, 0], [1, 1, 0]]), kind)
    assert (vectors[0] == 0).all()
    (gradient,) = torch.autograd.grad(cos_nce(vectors, torch.ones_like(vectors)), hidden)
    assert gradient.isfinite().all()


def test_refusals() -> None:
    with pytest.raises(InputError, match="4 numbers and the teacher's 6: project"):
        cos_nce(torch.zeros(2, 4), torch.zeros(2, 6))
    with pytest.raises(InputError, match="same texts"):
        cos_nce(torch.zeros(2, 4), torch.zeros(3, 4))
    with pytest.raises(InputError, match="negatives must be at least 1"):
        cos_nce(torch.zeros(2, 4), torch.zeros(2, 4), 0)
    with pytest.raises(InputError, match="choose one of flatten, cls, mean, tokens"):
        layer_vectors(torch.zeros(2, 3, 4), torch.ones(2, 3), "max")
    with pytest.raises(InputError, match="rows, tokens, width"):
        layer_vectors(torch.zeros(2, 3), torch.ones(2, 3))
