"""Scores of many resamples of the same rows at once, from how often each resample holds each row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_MOST_COUNTS = 4_000_000
"""Numbers that are held at a time."""


def draws_of_rows(rows: int, resamples: int, seed: int) -> Iterator[Array]:
    """Bootstrap resamples as counts (some resamples, rows), floats; each resample's sum is `rows`."""
    random = np.random.default_rng(seed)
    step = max(1, _MOST_COUNTS // rows)
    for start in range(0, resamples, step):
        drawn = [
            np.bincount(random.integers(rows, size=rows), minlength=rows)
            for _ in range(min(step, resamples - start))
        ]
        yield np.array(drawn, float)


def scores_of_draws(metric: str, predictions: Array, labels: Array, counts: Array) -> Array:
    """Scores (resamples,) by a metric of several labels or of regression, as scikit-learn and scipy define them.

    Args:
        metric: `f1_micro` or `f1_macro`; `pearson`, `spearman` or `mean_squared_error`.
        predictions, labels: (rows, labels) of 0 and 1; (rows,) floats for regression.
        counts: (resamples, rows), how often each resample holds each row.
    """
    if metric in ("f1_micro", "f1_macro"):
        return _f1(predictions > 0, labels > 0, counts, micro=metric == "f1_micro")
    predictions, labels = predictions.astype(float), labels.astype(float)
    if metric == "mean_squared_error":
        return np.asarray(counts @ (predictions - labels) ** 2 / counts.sum(axis=1))
    if metric == "spearman":
        return _correlation(_ranks(predictions, counts), _ranks(labels, counts), counts)
    rows = (1, len(labels))
    return _correlation(predictions.reshape(rows), labels.reshape(rows), counts)


def _f1(predicted: Array, labelled: Array, counts: Array, *, micro: bool) -> Array:
    hits = counts @ (predicted & labelled).astype(float)  # (resamples, labels)
    occurring = counts @ (predicted.astype(float) + labelled)
    if micro:
        hits, occurring = hits.sum(axis=1), occurring.sum(axis=1)
    f1 = 2.0 * hits / np.maximum(occurring, 1.0)
    return np.asarray(f1 if micro else f1.mean(axis=1))


def _ranks(values: Array, counts: Array) -> Array:
    """Ranks (resamples, rows) of the rows within each resample, equal ones having their mean rank."""
    _, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    size = np.add.reduceat(counts[:, order], starts, axis=1)  # (resamples, distinct values)
    return np.asarray((np.cumsum(size, axis=1) - (size - 1) / 2)[:, group])


def _correlation(one: Array, other: Array, counts: Array) -> Array:
    """Pearson's, (resamples,), of values (resamples or 1, rows); 0 where it is not defined."""
    rows = counts.sum(axis=1)
    # Moments about the mean of all rows, which is near that of a resample, lose no digits.
    one, other = one - one.mean(), other - other.mean()
    sums = [_sum(counts, values) for values in (one, other, one**2, other**2, one * other)]
    first, second, first_squares, second_squares, products = sums
    covariance = products - first * second / rows
    spread = np.array([first_squares - first**2 / rows, second_squares - second**2 / rows])
    # Of equal values rounding leaves a little of a spread.
    defined = (spread > 1e-12 * np.array([first_squares, second_squares])).all(axis=0)
    return np.where(defined, covariance / np.sqrt(np.where(defined, spread.prod(axis=0), 1.0)), 0.0)


def _sum(counts: Array, values: Array) -> Array:
    return np.asarray(counts @ values[0] if len(values) == 1 else np.einsum("ij,ij->i", counts, values))
