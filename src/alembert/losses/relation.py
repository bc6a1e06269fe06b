"""Self-attention relations of a student and a teacher: MiniLM's value relation, MiniLMv2's QQ, KK and VV.

Widths may differ: a relation is a distribution over tokens.
"""

from __future__ import annotations

import math

from torch import Tensor

from alembert.common.errors import InputError
from alembert.losses.attention import query_divergences
from alembert.losses.tensors import full_precision, valid_tokens, without_autocast


def relation_divergence(
    student: Tensor, teacher: Tensor, mask: Tensor, relation_heads: int | None = None
) -> Tensor:
    """KL(teacher ‖ student) of the relations softmax(A Aᵀ / √d_r), over valid tokens.

    A is queries, keys or values. With `relation_heads` the heads are concatenated and split anew into that
    many (MiniLMv2, Eq. 4–5, "relation heads"); without, they stay as they are (MiniLM, Eq. 5–6).

    As in both papers every row's sum is divided by its own relation heads × valid tokens, and the rows are
    averaged: a short text weighs as much as a long one.

    Args:
        student: `(B, h, n, d)`.
        teacher: `(B, h', n, d')`; h' = h without `relation_heads`.
        mask: `(B, n)`, 1 = token.
        relation_heads: a divisor of h · d and of h' · d'; `common_relation_heads` gives one.

    Returns:
        A scalar in nats, ≥ 0 up to rounding; rows without tokens are left out.

    Raises:
        InputError: head counts differ, widths are not divisible, or other dimensions differ.
    """
    if (
        student.ndim != 4
        or teacher.ndim != 4
        or (student.shape[0], student.shape[2]) != (teacher.shape[0], teacher.shape[2])
    ):
        raise InputError(
            "Both sides must be (rows, heads, tokens, width of a head) of the same texts, but the student's "
            f"shape is {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}."
        )
    valid = valid_tokens(mask, student.shape[0], student.shape[2])
    if relation_heads is None:
        if student.shape[1] != teacher.shape[1]:
            raise InputError(
                f"The student has {student.shape[1]} attention heads and the teacher {teacher.shape[1]}: set "
                f"relation_heads, for example to {_usable(student, teacher)[-1]}."
            )
    else:
        student, teacher = _split(student, teacher, relation_heads)
    divergences = query_divergences(_relation_scores(student, valid), _relation_scores(teacher, valid), valid)
    tokens = valid.sum(dim=-1)
    per_row = divergences.mean(dim=1).sum(dim=-1) / tokens.clamp_min(1)
    return per_row.sum() / (tokens > 0).sum().clamp_min(1)


def common_relation_heads(student_width: int, teacher_width: int, wanted: int) -> int:
    """The largest number of relation heads, no more than wanted, into which both widths can be split.

    Raises:
        InputError: a number is below 1.
    """
    if min(student_width, teacher_width, wanted) < 1:
        raise InputError(
            f"Widths {student_width} and {teacher_width} and {wanted} relation heads must all be at least 1."
        )
    return max(value for value in _divisors(math.gcd(student_width, teacher_width)) if value <= wanted)


def _relation_scores(vectors: Tensor, valid: Tensor) -> Tensor:
    # Filled before the product: its gradient multiplies with what stands at padding.
    vectors = full_precision(vectors).masked_fill(~valid[:, None, :, None], 0)
    with without_autocast(vectors):
        return vectors @ vectors.transpose(-1, -2) / math.sqrt(vectors.shape[-1])


def _split(student: Tensor, teacher: Tensor, relation_heads: int) -> tuple[Tensor, Tensor]:
    usable = _usable(student, teacher)
    if relation_heads not in usable:
        raise InputError(
            f"relation_heads={relation_heads} does not divide both the student's width "
            f"{student.shape[1] * student.shape[3]} and the teacher's {teacher.shape[1] * teacher.shape[3]}: "
            f"choose one of {', '.join(map(str, usable))}."
        )
    rows_and_tokens = student.shape[0], student.shape[2]
    first, second = (
        side.transpose(1, 2).reshape(*rows_and_tokens, relation_heads, -1).transpose(1, 2)
        for side in (student, teacher)
    )
    return first, second


def _usable(student: Tensor, teacher: Tensor) -> list[int]:
    return _divisors(math.gcd(student.shape[1] * student.shape[3], teacher.shape[1] * teacher.shape[3]))


def _divisors(number: int) -> list[int]:
    return [value for value in range(1, number + 1) if number % value == 0]
