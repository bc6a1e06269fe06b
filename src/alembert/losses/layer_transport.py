"""Many-to-many layer mapping by the earth mover's distance (BERT-EMD, Li et al., EMNLP 2020).

Shapes: M student layers, N teacher layers, B rows, n tokens, h heads, width d.

Distances between all pairs of layers carry the gradient; the flow between layers and the layers' weights are
constants, found on the CPU in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import ot
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from alembert.common.errors import InputError
from alembert.losses.tensors import full_precision, valid_pairs, valid_tokens, without_autocast

COST_ATTENTION_FORMS = ("paper", "code")
SIDES = ("student", "teacher")

_SMALLEST_RELATIVE_COST = 1e-12
# Numbers in one student layer's differences from all teacher layers: 1 MiB, within a processor's cache, and
# 256 MiB on an accelerator, where few large steps are faster.
_CHUNK_NUMBERS = {"cpu": 2**18}
_ACCELERATOR_CHUNK_NUMBERS = 2**26


def layer_flow(distances: Tensor, student_weights: Tensor, teacher_weights: Tensor) -> Tensor:
    """The cheapest way to move the student layers' weight onto the teacher layers' (BERT-EMD, Eq. 3 and 6).

    The exact solution of the linear program, by POT's network simplex.

    Args:
        distances: D, finite, `(M, N)`.
        student_weights: `(M,)`, ≥ 0, not all 0; normalised to sum 1. A layer may weigh 0.
        teacher_weights: `(N,)`, likewise.

    Returns:
        F, `(M, N)`, ≥ 0, with row sums `student_weights` and column sums `teacher_weights`; without gradient,
        in the dtype and on the device of `distances`.

    Raises:
        InputError: shapes do not fit, a distance is not finite (training diverged), or weights are negative,
            not finite or all 0.
    """
    costs = _float64(distances)
    if costs.ndim != 2 or costs.shape != (len(student_weights), len(teacher_weights)):
        raise InputError(
            f"distances must be ({len(student_weights)}, {len(teacher_weights)}), student layers by teacher "
            f"layers, but has shape {costs.shape}."
        )
    if not np.isfinite(costs).all():
        student, teacher = np.argwhere(~np.isfinite(costs))[0] + 1
        raise InputError(
            f"The distance of student layer {student} and teacher layer {teacher} is "
            f"{costs[student - 1, teacher - 1]}: training has diverged. Try a smaller learning rate."
        )
    rows = _normalised(_float64(student_weights), "student_weights")
    columns = _normalised(_float64(teacher_weights), "teacher_weights")
    # The solver's tolerances are absolute: costs are brought to the scale of 1, which leaves the flow alone.
    largest = np.abs(costs).max()
    flow = ot.emd(rows, columns, costs / largest if largest > 0 else costs, center_dual=False)
    return torch.as_tensor(flow, dtype=distances.dtype, device=distances.device)


def transport_cost(flow: Tensor, distances: Tensor) -> Tensor:
    """Σ F · D, a scalar; the gradient goes through D alone (BERT-EMD, Eq. 5 and 8).

    Args:
        flow: F, `(M, N)`, taken as constant.
        distances: D, `(M, N)`.
    """
    return (flow.detach() * distances).sum()


def cost_attention(
    flow: Tensor,
    distances: Tensor,
    weights: Tensor,
    side: str = "student",
    temperature: float = 1.0,
    form: str = "paper",
) -> Tensor:
    """New weights of one side's layers: the cheaper a layer's transport, the more it weighs (BERT-EMD, Eq. 9–12).

    With r_i = Σ_j F_ij D_ij / w_i, the cost of moving layer i's weight per unit, and u_i = Σ_k r_k / r_i:
    w = softmax(u / τ) in the paper, w = u / Σ u in the published code since 2021.

    Both leave gaps, closed as follows. A layer without weight or without flow has no cost: it gets the largest
    one of the others, so that it comes last but may return. A cost counts as at least 10⁻¹² of the largest;
    layers below share the weight alike. Without any cost at all, all layers weigh the same.

    Args:
        flow: F, finite, `(M, N)`, ≥ 0.
        distances: D, finite, `(M, N)`, ≥ 0.
        weights: w, finite, ≥ 0: `(M,)` for the student's side, `(N,)` for the teacher's; those that F was
            found with.
        side: one of `SIDES`: whose weights.
        temperature: τ > 0 of the paper's form; larger is more even. Unused by `"code"`.
        form: one of `COST_ATTENTION_FORMS`.

    Returns:
        New weights like `weights`, ≥ 0, with sum 1 and without gradient.

    Raises:
        InputError: unknown side or form, τ not positive, shapes that do not fit, or numbers that are not
            finite.
    """
    if side not in SIDES:
        raise InputError(f"side {side!r} is unknown: choose one of {', '.join(SIDES)}.")
    if form not in COST_ATTENTION_FORMS:
        raise InputError(f"form {form!r} is unknown: choose one of {', '.join(COST_ATTENTION_FORMS)}.")
    if not temperature > 0:
        raise InputError(f"temperature must be greater than 0, but is {temperature}.")
    moved, costs, old = _float64(flow), _float64(distances), _float64(weights)
    if side == "teacher":
        moved, costs = moved.T, costs.T
    if moved.ndim != 2 or moved.shape != costs.shape or old.shape != moved.shape[:1]:
        raise InputError(
            f"flow {tuple(flow.shape)}, distances {tuple(distances.shape)} and weights {tuple(weights.shape)} "
            f"of the {side}'s side do not fit: give (M, N), (M, N) and one weight per layer of that side."
        )
    if not all(np.isfinite(values).all() for values in (moved, costs, old)):
        raise InputError("flow, distances and weights must be finite: training has diverged.")
    cost = _unit_costs(moved, costs, old)
    preference = cost.sum() / cost
    if form == "paper":
        # The largest is taken off before the division, which could overflow.
        with np.errstate(over="ignore"):
            preference = np.exp((preference - preference.max()) / temperature)
    return torch.as_tensor(preference / preference.sum(), dtype=weights.dtype, device=weights.device)


def pairwise_layer_distances(
    student: Sequence[Tensor], teacher: Sequence[Tensor], distance: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """`(M, N)` of any scalar distance between a student layer's and a teacher layer's tensor."""
    return torch.stack([torch.stack([distance(s, t) for t in teacher]) for s in student])


def hidden_state_distances(
    student: Sequence[Tensor] | Tensor, teacher: Sequence[Tensor] | Tensor, mask: Tensor
) -> Tensor:
    """`alembert.losses.hidden.hidden_state_mse` of every student layer and every teacher layer.

    One pass over the data for all pairs: memory beyond the inputs is bounded, in the backward pass, too.

    Args:
        student: M tensors `(B, n, d)`, or `(M, B, n, d)`.
        teacher: N tensors `(B, n, d)`, or `(N, B, n, d)`, taken as constant.
        mask: `(B, n)`, 1 = token.

    Returns:
        `(M, N)`, at least float32, differentiable once with respect to the student.

    Raises:
        InputError: no layers, or shapes differ.
    """
    students, teachers, shape = _layers(student, teacher, ("rows", "tokens", "width"))
    valid = valid_tokens(mask, shape[0], shape[1])
    return _distances(students, teachers, valid, valid[..., None], (1,))


def attention_score_distances(
    student: Sequence[Tensor] | Tensor, teacher: Sequence[Tensor] | Tensor, mask: Tensor
) -> Tensor:
    """`alembert.losses.attention.attention_score_mse` of every student layer and every teacher layer.

    Args:
        student: M tensors `(B, h, n, n)`, or `(M, B, h, n, n)`.
        teacher: N tensors `(B, h, n, n)`, or `(N, B, h, n, n)`, taken as constant.
        mask: `(B, n)`, 1 = token.

    Returns, errors and memory: as for `hidden_state_distances`.
    """
    students, teachers, shape = _layers(student, teacher, ("rows", "heads", "tokens", "tokens"))
    valid = valid_tokens(mask, shape[0], shape[2])
    return _distances(students, teachers, valid, valid_pairs(valid), (2, 3))


def _unit_costs(moved: NDArray[Any], costs: NDArray[Any], weights: NDArray[Any]) -> NDArray[Any]:
    """r of `cost_attention` up to a common factor: in [10⁻¹², 1], the largest is 1."""
    largest = np.finfo(np.float64).max
    moved_cost = (_scaled(moved) * _scaled(costs)).sum(axis=1)
    known = (weights > 0) & (moved.sum(axis=1) > 0)
    cost = np.zeros_like(moved_cost)
    with np.errstate(over="ignore"):
        np.divide(moved_cost, _scaled(weights), out=cost, where=known)
    cost = np.minimum(cost, largest)
    highest = cost.max(initial=0.0)
    if not highest > 0:
        return np.ones_like(cost)
    return np.where(known, np.maximum(cost / highest, _SMALLEST_RELATIVE_COST), 1.0)


def _scaled(values: NDArray[Any]) -> NDArray[Any]:
    largest = values.max(initial=0.0)
    scaled: NDArray[Any] = values / largest if largest > 0 else values
    return scaled


def _float64(values: Tensor) -> NDArray[Any]:
    # To the CPU first: not every accelerator knows float64.
    result: NDArray[Any] = values.detach().cpu().double().numpy()
    return result


def _normalised(weights: NDArray[Any], name: str) -> NDArray[Any]:
    if not (np.isfinite(weights).all() and (weights >= 0).all() and (weights > 0).any()):
        raise InputError(f"{name} must be finite, ≥ 0 and not all 0, but are {weights.tolist()}.")
    scaled = _scaled(weights)
    normalised: NDArray[Any] = scaled / scaled.sum()
    return normalised


def _layers(
    student: Sequence[Tensor] | Tensor, teacher: Sequence[Tensor] | Tensor, dimensions: tuple[str, ...]
) -> tuple[list[Tensor], list[Tensor], tuple[int, ...]]:
    students, teachers = list(student), list(teacher)
    if not students or not teachers:
        raise InputError("At least one layer of each side is needed.")
    shape = tuple(teachers[0].shape)
    for layer in students + teachers:
        if tuple(layer.shape) != shape or layer.ndim != len(dimensions):
            raise InputError(
                f"All layers of both sides must be ({', '.join(dimensions)}) of one shape, but shapes are "
                f"{sorted({tuple(layer.shape) for layer in students + teachers})}: project the student's hidden "
                "states to the teacher's width, or average attention heads to a common number."
            )
    return students, teachers, shape


def _distances(
    students: list[Tensor],
    teachers: list[Tensor],
    valid: Tensor,
    keep: Tensor,
    token_dimensions: tuple[int, ...],
) -> Tensor:
    count = keep.sum() * (teachers[0].numel() // keep.numel())
    result: Tensor = _SquaredDifferences.apply(  # type: ignore[no-untyped-call]
        [layer.detach() for layer in teachers], valid, keep, token_dimensions, *students
    )
    return result / count.clamp_min(1)


class _SquaredDifferences(torch.autograd.Function):
    """Σ (s − t)² of every pair of layers, chunks of rows at a time.

    Differences are taken one by one: ‖s‖² + ‖t‖² − 2 s·t would cancel where layers are close. The gradient
    2 (g_i s_i − Σ_j g_ij t_j) has no such sum of squares and is a matrix product, so no difference is kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        teachers: list[Tensor],
        valid: Tensor,
        keep: Tensor,
        token_dimensions: tuple[int, ...],
        *students: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(*students)
        # Not saved through autograd, which refuses tensors made in inference mode.
        ctx.teachers, ctx.keep = teachers, keep
        ctx.chunks = list(_chunks(valid, teachers, token_dimensions))
        dtype = torch.promote_types(full_precision(students[0]).dtype, full_precision(teachers[0]).dtype)
        totals = torch.zeros(len(students), len(teachers), dtype=dtype, device=students[0].device)
        for chunk in ctx.chunks:
            padded = ~keep[_fitting(chunk, keep)]
            first, second = _gather(students, chunk, padded, dtype), _gather(teachers, chunk, padded, dtype)
            for index, layer in enumerate(first):
                totals[index] += torch.linalg.vector_norm((second - layer).flatten(1), dim=-1).square()
        return totals

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient, students, teachers = gradients[0], ctx.saved_tensors, ctx.teachers
        results = [torch.zeros_like(layer) for layer in students]
        for chunk in ctx.chunks:
            padded = ~ctx.keep[_fitting(chunk, ctx.keep)]
            first, second = (_gather(side, chunk, padded, gradient.dtype) for side in (students, teachers))
            with without_autocast(gradient):
                mixed = (gradient @ second.flatten(1)).view_as(first)
            scale = gradient.sum(dim=1).view(-1, *[1] * (first.ndim - 1))
            for result, value in zip(results, 2 * (scale * first - mixed), strict=True):
                result[chunk] = value.to(result.dtype)
        return (None, None, None, None, *results)


def _chunks(
    valid: Tensor, teachers: Sequence[Tensor], token_dimensions: tuple[int, ...]
) -> Iterator[tuple[slice, ...]]:
    """Slices of rows, cut after their last token, whose differences fit into the memory allowed."""
    positions = torch.arange(1, valid.shape[1] + 1, device=valid.device)
    lengths = (valid * positions).amax(dim=1).tolist() if valid.numel() else []
    layer = teachers[0]
    limit = _CHUNK_NUMBERS.get(layer.device.type, _ACCELERATOR_CHUNK_NUMBERS)
    step = max(1, limit // max(1, len(teachers) * math.prod(layer.shape[1:])))
    for start in range(0, len(lengths), step):
        longest = max(lengths[start : start + step])
        if longest:
            yield tuple(
                slice(start, start + step)
                if dimension == 0
                else slice(0, longest if dimension in token_dimensions else None)
                for dimension in range(layer.ndim)
            )


def _fitting(chunk: tuple[slice, ...], keep: Tensor) -> tuple[slice, ...]:
    """The chunk for a mask in which other dimensions than rows and tokens have size 1."""
    return tuple(slice(None) if size == 1 else part for part, size in zip(chunk, keep.shape, strict=True))


def _gather(layers: Sequence[Tensor], chunk: tuple[slice, ...], padded: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.stack([layer[chunk].to(dtype) for layer in layers]).masked_fill_(padded, 0)
