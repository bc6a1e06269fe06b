"""Losses between hidden states of a student and a teacher.

Shapes: B rows, n tokens, width d. Both sides have the same width: a narrower student is projected before.
Half precision is raised to float32 first.
"""

from __future__ import annotations

from torch import Tensor

from alembert.common.errors import InputError
from alembert.losses.tensors import full_precision, masked_mean, unit_vectors, valid_tokens

CLS_REDUCTIONS = ("sum", "mean")


def hidden_state_mse(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean squared difference over valid tokens and width (TinyBERT, Eq. 8–9; BERT-EMD, Eq. 5 and 8).

    The mean is over the batch's valid tokens at once, so every token weighs the same. The published codes
    average over padding, too.

    Args:
        student: `(B, n, d)`.
        teacher: `(B, n, d)`.
        mask: `(B, n)`, 1 = token.

    Returns:
        A scalar ≥ 0; 0 for a batch without tokens.

    Raises:
        InputError: widths or other dimensions differ.
    """
    valid = _check(student, teacher, mask)
    difference = full_precision(student) - full_precision(teacher)
    # Filled before it is squared: what stands at padding must not reach the gradient.
    return masked_mean(difference.masked_fill(~valid[..., None], 0).square(), valid[..., None])


def hidden_state_cosine(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean of 1 − cosine similarity over valid tokens (DistilBERT's cosine embedding loss).

    Arguments and errors as for `hidden_state_mse`.

    Returns:
        A scalar in [0, 2]; a zero vector is at distance 1 from everything.
    """
    valid = _check(student, teacher, mask)
    student, teacher = (
        unit_vectors(full_precision(side).masked_fill(~valid[..., None], 0)) for side in (student, teacher)
    )
    return masked_mean(1 - (student * teacher).sum(dim=-1), valid)


def normalised_cls_mse(student: Tensor, teacher: Tensor, reduction: str = "sum") -> Tensor:
    """Squared distance of two vectors scaled to length 1, mean over rows (BERT-PKD, Eq. 7).

    Args:
        student: `(B, d)`, the first token's hidden state after one layer.
        teacher: `(B, d)`.
        reduction: `"sum"` over the width, as the paper's ‖·‖²; `"mean"` over it, as the published code, which
            is smaller by the factor d.

    Returns:
        A scalar: in [0, 4] for `"sum"`, in [0, 4 / d] for `"mean"`.

    Raises:
        InputError: widths or rows differ, or unknown reduction.
    """
    _check_shapes(student, teacher, ("rows", "width"))
    if reduction not in CLS_REDUCTIONS:
        raise InputError(f"reduction {reduction!r} is unknown: choose one of {', '.join(CLS_REDUCTIONS)}.")
    difference = unit_vectors(full_precision(student)) - unit_vectors(full_precision(teacher))
    squares = difference.square()
    return squares.mean() if reduction == "mean" else squares.sum(dim=-1).mean()


def _check(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    _check_shapes(student, teacher, ("rows", "tokens", "width"))
    return valid_tokens(mask, *student.shape[:2])


def _check_shapes(student: Tensor, teacher: Tensor, dimensions: tuple[str, ...]) -> None:
    if (
        student.ndim != len(dimensions)
        or teacher.ndim != len(dimensions)
        or student.shape[:-1] != teacher.shape[:-1]
    ):
        raise InputError(
            f"Both sides must be ({', '.join(dimensions)}) of the same texts, but the student's shape is "
            f"{tuple(student.shape)} and the teacher's {tuple(teacher.shape)}."
        )
    if student.shape[-1] != teacher.shape[-1]:
        raise InputError(
            f"The student is {student.shape[-1]} wide and the teacher {teacher.shape[-1]}: project the "
            "student's hidden states to the teacher's width first."
        )
