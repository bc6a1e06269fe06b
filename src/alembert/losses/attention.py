"""Losses between attention of a student and a teacher.

Shapes: B rows, h heads, n tokens. Scores are query · key × scaling before mask and softmax; what they hold at
padded queries or keys is ignored, be it −inf or NaN. Half precision is raised to float32 first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from alembert.common.errors import InputError
from alembert.losses.tensors import full_precision, masked_mean, valid_pairs, valid_tokens


def attention_score_mse(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean squared difference of unnormalised scores (TinyBERT, Eq. 7; BERT-EMD, Eq. 4 and 7).

    The mean is over heads and all pairs of valid query and valid key in the batch. The published codes set
    scores of padded keys to 0 on both sides and average over padding, too.

    Args:
        student: `(B, h, n, n)`.
        teacher: `(B, h, n, n)`.
        mask: `(B, n)`, 1 = token.

    Returns:
        A scalar ≥ 0; 0 for a batch without tokens.

    Raises:
        InputError: head counts or other dimensions differ.
    """
    pairs = valid_pairs(_check(student, teacher, mask))
    difference = full_precision(student) - full_precision(teacher)
    # Filled before it is squared: what stands at padding must not reach the gradient.
    return masked_mean(difference.masked_fill(~pairs, 0).square(), pairs)


def attention_divergence(student_scores: Tensor, teacher_scores: Tensor, mask: Tensor) -> Tensor:
    """KL(teacher ‖ student) of the attention distributions (MiniLM, Eq. 4), each query of the batch counting alike.

    As printed each text counts alike, however long, as in `relation_divergence`.

    Args:
        student_scores: `(B, h, n, n)`.
        teacher_scores: `(B, h, n, n)`.
        mask: `(B, n)`, 1 = token.

    Returns:
        A scalar in nats, ≥ 0 up to rounding: the mean over heads and the batch's valid queries.

    Raises:
        InputError: head counts or other dimensions differ.
    """
    valid = _check(student_scores, teacher_scores, mask)
    return masked_mean(query_divergences(student_scores, teacher_scores, valid), valid[:, None, :])


def query_divergences(student_scores: Tensor, teacher_scores: Tensor, valid: Tensor) -> Tensor:
    """KL(teacher ‖ student) of the softmaxes over valid keys, for every query.

    Args:
        student_scores: `(B, h, n, n)`.
        teacher_scores: `(B, h, n, n)`.
        valid: `(B, n)` bool.

    Returns:
        `(B, h, n)` in nats; 0 at padded queries.
    """
    padded = ~valid_pairs(valid)
    student, teacher = (
        scores.masked_fill(padded, torch.finfo(scores.dtype).min).log_softmax(dim=-1)
        for scores in (full_precision(student_scores), full_precision(teacher_scores))
    )
    return (teacher.exp() * (teacher - student)).masked_fill(padded, 0).sum(dim=-1)


def average_heads(scores: Tensor, heads: int) -> Tensor:
    """Fewer heads: each is the mean of h / heads consecutive ones.

    Args:
        scores: `(B, h, n, n)`.
        heads: wanted, a divisor of h; `common_heads` gives one for two models.

    Returns:
        `(B, heads, n, n)`, at least float32.

    Raises:
        InputError: `heads` does not divide h.
    """
    present = scores.shape[1]
    if heads < 1 or present % heads:
        usable = ", ".join(str(value) for value in range(1, present + 1) if present % value == 0)
        raise InputError(f"{present} heads cannot be averaged to {heads}: choose one of {usable}.")
    rows, tokens = scores.shape[0], scores.shape[2:]
    return full_precision(scores).reshape(rows, heads, present // heads, *tokens).mean(dim=2)


def common_heads(student_heads: int, teacher_heads: int) -> int:
    """The most heads that both sides can be averaged to: the greatest common divisor."""
    return math.gcd(student_heads, teacher_heads)


def _check(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    same_texts = student.ndim == 4 and teacher.ndim == 4
    same_texts = (
        same_texts and student.shape[0] == teacher.shape[0] and student.shape[2:] == teacher.shape[2:]
    )
    if not same_texts or student.shape[2] != student.shape[3]:
        raise InputError(
            "Both sides must be (rows, heads, tokens, tokens) of the same texts, but the student's shape is "
            f"{tuple(student.shape)} and the teacher's {tuple(teacher.shape)}."
        )
    if student.shape[1] != teacher.shape[1]:
        raise InputError(
            f"The student has {student.shape[1]} attention heads and the teacher {teacher.shape[1]}: average "
            f"both to {common_heads(student.shape[1], teacher.shape[1])} (average_heads), compare relations "
            "(relation_divergence), or choose a student with as many heads."
        )
    return valid_tokens(mask, student.shape[0], student.shape[2])
