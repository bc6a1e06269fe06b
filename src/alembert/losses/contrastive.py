"""COS-NCE: the contrastive loss of LRC-BERT on the angles between layer outputs.

Shapes: B rows, n tokens, width d, D numbers in the vector of a layer. Half precision is raised to float32
first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alembert.common.errors import InputError
from alembert.losses.tensors import full_precision, unit_vectors, valid_tokens, without_autocast

VECTOR_KINDS = ("flatten", "cls", "mean", "tokens")


def cos_nce(student: Tensor, teacher: Tensor, negatives: int | None = None) -> Tensor:
    """Pulls each row's student towards its teacher and away from other rows' teachers (LRC-BERT, Eq. 1).

    With g = 1 − cos, the mean over rows of

        1 / (2K) · Σ_k (2 − (g(n_k, z_S) − g(z_T, z_S))) + g(z_T, z_S),

    that is 1 + 1.5 · g(z_T, z_S) − 0.5 · mean_k g(n_k, z_S): the pull weighs three times the push.

    Args:
        student: z_S, `(B, D)`.
        teacher: z_T, `(B, D)`; the other rows' are the negatives n_k.
        negatives: K ≥ 1, for each row the K rows that follow it, cyclically; None or more than there are
            means all B − 1.

    Returns:
        A scalar in [0, 4]. A batch of one row has no negatives: only the pull g(z_T, z_S) is left, in [0, 2].
        A zero vector is at distance 1 from everything.

    Raises:
        InputError: widths or rows differ, no rows, or K below 1.
    """
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher) or not len(student):
        raise InputError(
            "Both sides must be (rows, width) of the same texts, but the student's shape is "
            f"{tuple(student.shape)} and the teacher's {tuple(teacher.shape)}."
        )
    if student.shape[1] != teacher.shape[1]:
        raise InputError(
            f"The student's vectors have {student.shape[1]} numbers and the teacher's {teacher.shape[1]}: "
            "project the student's hidden states to the teacher's width first."
        )
    if negatives is not None and negatives < 1:
        raise InputError(f"negatives must be at least 1, but is {negatives}.")
    student, teacher = unit_vectors(full_precision(student)), unit_vectors(full_precision(teacher))
    rows = len(student)
    count = rows - 1 if negatives is None else min(negatives, rows - 1)
    if count == 0:
        return 1 - (student * teacher).sum(dim=-1).mean()
    with without_autocast(student):
        distances = 1 - student @ teacher.T.to(student.dtype)
    positive = distances.diagonal()
    index = torch.arange(rows, device=student.device)
    offset = torch.arange(1, count + 1, device=student.device)
    negative = distances.gather(1, (index[:, None] + offset) % rows)
    return ((2 - (negative - positive[:, None])).mean(dim=1) / 2 + positive).mean()


def layer_vectors(hidden: Tensor, mask: Tensor, kind: str = "flatten") -> Tensor:
    """One vector per row from a layer's output; the paper leaves open which.

    - `"flatten"`: all tokens one after the other, zeros at padding. The cosine of two rows compares the tokens
      that both have; what only one has counts in its length.
    - `"tokens"`: the same, every token scaled to length 1 first. The cosine of one text's student and teacher
      is then the mean over its tokens of the tokens' cosines.
    - `"cls"`: the first token.
    - `"mean"`: the mean over valid tokens.

    Args:
        hidden: `(B, n, d)`.
        mask: `(B, n)`, 1 = token.
        kind: one of `VECTOR_KINDS`.

    Returns:
        `(B, n · d)` for `"flatten"` and `"tokens"`, `(B, d)` otherwise; at least float32. More padding
        appends zeros to the former, which no cosine notices.

    Raises:
        InputError: unknown kind, or shapes do not fit.
    """
    if hidden.ndim != 3:
        raise InputError(f"hidden must be (rows, tokens, width), but has shape {tuple(hidden.shape)}.")
    valid = valid_tokens(mask, *hidden.shape[:2])
    hidden = full_precision(hidden).masked_fill(~valid[..., None], 0)
    if kind == "flatten":
        return hidden.flatten(1)
    if kind == "tokens":
        return unit_vectors(hidden).flatten(1)
    if kind == "cls":
        return hidden[:, 0]
    if kind == "mean":
        return hidden.sum(dim=1) / valid.sum(dim=1, keepdim=True).clamp_min(1)
    raise InputError(f"kind {kind!r} is unknown: choose one of {', '.join(VECTOR_KINDS)}.")
