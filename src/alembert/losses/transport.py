"""Earth mover's distances between vectors of logits, for all pairs in one call.

All three functions take `(..., classes)` tensors whose leading dimensions broadcast, so that teacher layers
shaped `(layers, 1, batch, classes)` and exits shaped `(1, exits, batch, classes)` give `(layers, exits,
batch)`. They differ in what is moved:

- `sorted_emd` and `histogram_emd` move the logit *values* along the number line and forget which class each
  value belongs to: `[5, −5]` and `[−5, 5]` are at distance 0. The second is the first after binning.
- `class_aware_emd` moves *probability* between classes: the same two vectors are at distance ≈ 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from alembert.common.errors import InputError

_REGULARISATION = 0.005
_ANNEALING_STEPS = 40
_FINAL_STEPS = 100


def sorted_emd(first: Tensor, second: Tensor) -> Tensor:
    """Exact one-dimensional Wasserstein-1 distance: the mean of |sort(first) − sort(second)|.

    Each side is sorted before it is broadcast, so sorting costs as much as there are vectors, not pairs; the
    difference of all pairs is held in memory once.

    Args:
        first: floating point, `(..., classes)`.
        second: floating point, `(..., classes)`, leading dimensions broadcastable with those of `first`.

    Returns:
        `(...)` in the inputs' dtype and unit, ≥ 0; differentiable with respect to both.

    Raises:
        InputError: the numbers of classes differ.
    """
    _check_classes(first, second)
    return (first.sort(dim=-1).values - second.sort(dim=-1).values).abs().mean(dim=-1)


@torch.no_grad()
def histogram_emd(first: Tensor, second: Tensor) -> Tensor:
    """What `pyemd.emd_samples(first, second)` returns with its default arguments, for every pair.

    Both vectors of a pair are counted into one histogram of equal bins over their common range, and the
    distance between the histograms is taken with mass at the bins' centres. The number of bins is NumPy's
    `"auto"` rule (Sturges and Freedman–Diaconis, the latter's width no less than half that of the square-root
    rule, as NumPy 2.4 has it) on the two vectors together. Coarse for few classes: with two there are three
    bins. On one grid the distance is bin width × Σ |difference of cumulated histograms|, so no solver runs.
    The value is that of pyemd 1.1's default solver up to rounding; its older C++ solver rounds masses and
    costs to 10⁻⁶.

    Args:
        first: floating point, `(..., classes)`.
        second: floating point, `(..., classes)`, leading dimensions broadcastable with those of `first`.

    Returns:
        `(...)` float64, ≥ 0, without gradient; NaN where a vector is not finite.

    Raises:
        InputError: the numbers of classes differ.
    """
    _check_classes(first, second)
    shape = torch.broadcast_shapes(first.shape, second.shape)  # type: ignore[no-untyped-call]
    a = first.sort(dim=-1).values.double().expand(shape)
    b = second.sort(dim=-1).values.double().expand(shape)
    classes = a.shape[-1]
    low = torch.minimum(a[..., 0], b[..., 0])
    extent = torch.maximum(a[..., -1], b[..., -1]) - low
    bins = _automatic_bins(a, b, extent)
    width = extent / bins

    # The rule never asks for more bins than this, so the shape does not depend on the data.
    most_bins = math.ceil(max(2 * math.sqrt(2 * classes), math.log2(2 * classes) + 1)) + 1
    inner = torch.arange(1, most_bins, dtype=torch.float64, device=a.device)
    # Multiplied, then added, as NumPy computes its edges: a fused form would move samples across them.
    edges = inner * width[..., None] + low[..., None]
    below_a = torch.searchsorted(a.contiguous(), edges)
    below_b = torch.searchsorted(b.contiguous(), edges)
    inside = inner < bins[..., None]
    difference = ((below_a - below_b).abs() * inside).sum(dim=-1)
    return width * difference / classes


def class_aware_emd(
    first: Tensor, second: Tensor, ground_cost: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """Earth mover's distance from softmax(first / T) to softmax(second / T), moving between classes.

    Without `ground_cost` every move costs 1 and the distance is the total variation ½ Σ |p − q|, exact and
    differentiable. With it, the mass the two distributions share stays (optimal for a metric) and the rest is
    moved by a batched Sinkhorn iteration (Cuturi, 2013) with annealed regularisation and a fixed number of
    steps, whose plan is then charged its true cost. The result is within 0.005 × the largest cost of the
    exact distance, usually within 0.001, and 0 for equal distributions. It carries no gradient: it is meant
    as a weight. It costs some 280 matrix products of (pairs, classes) by (classes, classes) in float64.

    Args:
        first: logits, `(..., classes)`.
        second: logits, `(..., classes)`, leading dimensions broadcastable with those of `first`.
        ground_cost: `(classes, classes)`, a metric: symmetric, ≥ 0, zero diagonal, and no detour cheaper than
            the direct way (that last is not checked). See `class_ground_cost`.
        temperature: T > 0 of both softmaxes.

    Returns:
        `(...)`, from 0 to the largest ground cost (1 without one), in the inputs' dtype.

    Raises:
        InputError: the numbers of classes differ, T is not positive, or `ground_cost` is no cost matrix.
    """
    _check_classes(first, second)
    if not temperature > 0:
        raise InputError(f"temperature must be greater than 0, but is {temperature}.")
    first, second = functional.softmax(first / temperature, -1), functional.softmax(second / temperature, -1)
    difference = first - second
    if ground_cost is None:
        return difference.abs().sum(dim=-1) / 2
    _check_cost(ground_cost, classes=difference.shape[-1])
    with torch.no_grad():
        excess = difference.double().reshape(-1, difference.shape[-1])
        distance = _transport_cost(excess, ground_cost.to(excess))
        return distance.reshape(difference.shape[:-1]).to(difference.dtype)


def class_ground_cost(classifier_weight: Tensor) -> Tensor:
    """Ground cost between classes from a classifier's weight: √(1 − cosine similarity) of its rows, at most
    1.

    The root makes it a metric: it is, up to a factor, the straight line between the rows scaled to length 1.

    Args:
        classifier_weight: `(classes, features)`, one row per class.

    Returns:
        `(classes, classes)`, symmetric, zero diagonal, largest entry 1, without gradient.

    Raises:
        InputError: not a matrix, or all rows point the same way.
    """
    if classifier_weight.ndim != 2:
        raise InputError(
            f"classifier_weight must be (classes, features), but has shape {tuple(classifier_weight.shape)}."
        )
    rows = functional.normalize(classifier_weight.detach(), dim=-1)
    cost = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    largest = cost.max()
    if not largest > 0:
        raise InputError("classifier_weight tells no two classes apart: all its rows point the same way.")
    return cost / largest


EMD_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "sorted": sorted_emd,
    "histogram": histogram_emd,
    "class_aware": class_aware_emd,
}
"""The distances by the name that configuration uses."""


def _automatic_bins(a: Tensor, b: Tensor, extent: Tensor) -> Tensor:
    """NumPy's "auto" number of bins for the union of two sorted vectors, as float64 `(...)`.

    Operations and their order are NumPy's: the quotient is rounded up, so the last bit decides between 3 and
    4.
    """
    size = 2 * a.shape[-1]
    interquartile_range = _quantile(a, b, 0.75) - _quantile(a, b, 0.25)
    freedman_diaconis = 2.0 * interquartile_range * size ** (-1.0 / 3.0)
    square_root = extent / math.sqrt(size)
    sturges = extent / (math.log2(size) + 1.0)
    width = torch.minimum(torch.maximum(freedman_diaconis, square_root / 2), sturges)
    return torch.where(width == 0, 1.0, (extent / width).ceil())


def _quantile(a: Tensor, b: Tensor, fraction: float) -> Tensor:
    """Linearly interpolated quantile of the union of two equally long sorted vectors."""
    position = (2 * a.shape[-1] - 1) * fraction
    rank = math.floor(position)
    lower, upper = _order_statistic(a, b, rank), _order_statistic(a, b, rank + 1)
    weight = position - rank
    # NumPy interpolates from the nearer end.
    if weight < 0.5:
        return lower + (upper - lower) * weight
    return upper - (upper - lower) * (1 - weight)


def _order_statistic(a: Tensor, b: Tensor, rank: int) -> Tensor:
    """The value of 0-based `rank` in the union of two equally long sorted vectors, without merging them.

    Taking i values from `a` and rank + 1 − i from `b`, the larger of the two last ones taken is at least the
    value sought, and equal to it for the right i.
    """
    classes, taken = a.shape[-1], rank + 1
    candidates = []
    if taken <= classes:
        candidates += [a[..., rank], b[..., rank]]
    first, last = max(1, taken - classes), min(taken - 1, classes)
    if first <= last:
        from_a = a[..., first - 1 : last]
        from_b = b[..., taken - last - 1 : taken - first].flip(-1)
        candidates.append(torch.maximum(from_a, from_b).amin(dim=-1))
    return torch.stack(candidates).amin(dim=0)


def _transport_cost(excess: Tensor, cost: Tensor) -> Tensor:
    """Cost of moving the positive part of `excess` onto its negative part; `(pairs, classes)` → `(pairs,)`.

    The kernel exp(−cost / regularisation) is shared by all pairs, so a step is one matrix product and memory
    is pairs × classes. Factors are kept as logarithms and shifted by their largest entry before each product;
    no sum in it is then below exp(−1 / regularisation) = exp(−200), well inside float64.
    """
    largest = cost.max()
    distance = excess.new_zeros(excess.shape[0])
    source, target = excess.clamp_min(0), excess.neg().clamp_min(0)
    # Rounding can leave a trace of mass on one side only.
    mass = torch.minimum(source.sum(dim=-1), target.sum(dim=-1))
    differs = mass > 0
    if largest == 0 or not differs.any():
        return distance
    cost = cost / largest
    source, target = functional.normalize(
        torch.stack([source[differs], target[differs]]), p=1.0, dim=-1, eps=0.0
    )
    log_source, log_target = source.log(), target.log()

    source_potential, target_potential = torch.zeros_like(source), torch.zeros_like(target)
    schedule = [_REGULARISATION ** (step / _ANNEALING_STEPS) for step in range(_ANNEALING_STEPS)]
    for regularisation in schedule + [_REGULARISATION] * _FINAL_STEPS:
        kernel = (-cost / regularisation).exp()
        scaled_source = log_source + source_potential / regularisation
        target_potential = -regularisation * _log_product(scaled_source, kernel)
        scaled_target = log_target + target_potential / regularisation
        source_potential = -regularisation * _log_product(scaled_target, kernel)
    scaled_source = log_source + source_potential / _REGULARISATION
    moved_cost = (scaled_source + _log_product(scaled_target, kernel * cost)).exp().sum(dim=-1)
    arrived = (scaled_target + _log_product(scaled_source, kernel)).exp()
    # The plan leaves the source exactly but has not quite arrived; what is missing is charged at the target's
    # marginal price, which removes the error of stopping early to first order.
    missing_cost = (target_potential * (target - arrived)).sum(dim=-1)
    distance[differs] = (moved_cost + missing_cost).clamp_min(0) * mass[differs] * largest
    return distance


def _log_product(log_factor: Tensor, kernel: Tensor) -> Tensor:
    shift = log_factor.amax(dim=-1, keepdim=True)
    return ((log_factor - shift).exp() @ kernel).log() + shift


def _check_classes(first: Tensor, second: Tensor) -> None:
    if first.shape[-1] != second.shape[-1]:
        raise InputError(
            f"The two sides must have as many classes, but have {first.shape[-1]} and {second.shape[-1]}."
        )


def _check_cost(cost: Tensor, classes: int) -> None:
    if cost.shape != (classes, classes):
        raise InputError(f"ground_cost must be ({classes}, {classes}), but has shape {tuple(cost.shape)}.")
    if not (bool((cost >= 0).all()) and bool((cost.diagonal() == 0).all()) and torch.allclose(cost, cost.T)):
        raise InputError("ground_cost must be symmetric, ≥ 0 and zero on the diagonal.")
