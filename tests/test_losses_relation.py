"""Relations of queries, keys and values against loops over rows, relation heads and tokens."""

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
from alembert.losses.relation import common_relation_heads, relation_divergence

MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]])


def _vectors(heads: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, heads, 4, width, generator=generator, dtype=torch.float64)


def _relation(vectors: Tensor) -> list[list[float]]:
    """Rows of softmax(A Aᵀ / √d) of one relation head, `(tokens, d)`."""
    rows = vectors.tolist()
    result = []
    for query in rows:
        scores = [
            math.exp(sum(x * y for x, y in zip(query, key, strict=True)) / math.sqrt(len(query)))
            for key in rows
        ]
        result.append([score / sum(scores) for score in scores])
    return result


def _reference(student: Tensor, teacher: Tensor, relation_heads: int | None) -> float:
    total = 0.0
    for row, length in enumerate(MASK.sum(1).tolist()):
        sides = []
        for side in (student, teacher):
            if relation_heads is None:
                heads = list(side[row, :, :length])
            else:
                concatenated = torch.cat(list(side[row]), dim=-1)[:length]
                heads = list(concatenated.chunk(relation_heads, dim=-1))
            sides.append([_relation(head) for head in heads])
        divergence = sum(
            p * math.log(p / q)
            for q_head, p_head in zip(*sides, strict=True)
            for q_row, p_row in zip(q_head, p_head, strict=True)
            for q, p in zip(q_row, p_row, strict=True)
        )
        total += divergence / (len(sides[0]) * length)
    return total / 3


@pytest.mark.parametrize(("student_heads", "relation_heads"), [(2, None), (2, 4), (4, 2), (3, 1)])
def test_divergence_equals_a_loop(student_heads: int, relation_heads: int | None) -> None:
    student, teacher = _vectors(student_heads, 4, 0), _vectors(2, 8, 1)
    value = relation_divergence(student, teacher, MASK, relation_heads)
    assert value.item() == pytest.approx(_reference(student, teacher, relation_heads), rel=1e-9)


def test_gradients() -> None:
    student, teacher = _vectors(2, 4, 0).requires_grad_(), _vectors(3, 4, 1).requires_grad_()
    assert gradcheck(lambda s, t: relation_divergence(s, t, MASK, 4), (student, teacher))


@pytest.mark.parametrize("garbage", [1e4, float("inf"), float("nan")])
def test_padding_changes_nothing(garbage: float) -> None:
    student, teacher = _vectors(2, 4, 0), _vectors(3, 4, 1)
    mask = functional.pad(MASK, (0, 2))
    padded = [
        functional.pad(side, (0, 0, 0, 2)).masked_fill(mask[:, None, :, None] == 0, garbage)
        for side in (student, teacher)
    ]
    padded[0].requires_grad_()
    value = relation_divergence(*padded, mask, 4)
    torch.testing.assert_close(value, relation_divergence(student, teacher, MASK, 4))
    (gradient,) = torch.autograd.grad(value, padded[0])
    assert gradient.isfinite().all()


def test_rows_without_tokens_are_left_out() -> None:
    student, teacher = _vectors(2, 4, 0), _vectors(2, 4, 1)
    mask = MASK.clone()
    mask[2] = 0
    expected = relation_divergence(student[:2], teacher[:2], MASK[:2])
    torch.testing.assert_close(relation_divergence(student, teacher, mask), expected)
    assert relation_divergence(student, teacher, torch.zeros(3, 4)) == 0


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_raised(autocast: bool) -> None:
    student, teacher = _vectors(2, 4, 0).bfloat16(), _vectors(2, 4, 1).bfloat16()
    expected = relation_divergence(student.double(), teacher.double(), MASK).float()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = relation_divergence(student, teacher, MASK)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60))
def test_common_relation_heads_is_the_largest_divisor(student: int, teacher: int, wanted: int) -> None:
    divisors = [x for x in range(1, wanted + 1) if student % x == 0 and teacher % x == 0]
    assert common_relation_heads(student, teacher, wanted) == max(divisors)


def test_common_relation_heads_of_usual_widths() -> None:
    assert common_relation_heads(384, 768, 48) == 48
    assert common_relation_heads(312, 768, 48) == 24


def test_refusals() -> None:
    student, teacher = torch.zeros(2, 3, 5, 4), torch.zeros(2, 2, 5, 4)
    mask = torch.ones(2, 5)
    with pytest.raises(InputError, match="3 attention heads and the teacher 2: set relation_heads"):
        relation_divergence(student, teacher, mask)
    with pytest.raises(InputError, match="width 12 and the teacher's 8: choose one of 1, 2, 4"):
        relation_divergence(student, teacher, mask, 3)
    with pytest.raises(InputError, match="same texts"):
        relation_divergence(student, teacher[:, :, :4], mask, 2)
    with pytest.raises(InputError, match="at least 1"):
        common_relation_heads(312, 768, 0)
