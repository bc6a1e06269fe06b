"""Scores of predictions, their uncertainty, and what always giving one answer would score."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn import metrics as sklearn_metrics

from alembert.common.errors import InputError
from alembert.data.resampling import draws_of_rows, scores_of_draws

if TYPE_CHECKING:
    from alembert.data.task import Task

Array = NDArray[Any]

DEFAULT_METRICS = {
    "single_label_classification": ("accuracy", "f1_macro"),
    "multi_label_classification": ("f1_micro", "f1_macro", "subset_accuracy"),
    "regression": ("pearson", "spearman", "mean_squared_error"),
}
PROBLEM_TYPES = tuple(DEFAULT_METRICS)
_METRICS = {
    "single_label_classification": ("accuracy", "f1", "f1_macro", "f1_micro", "matthews"),
    "multi_label_classification": ("f1_micro", "f1_macro", "subset_accuracy"),
    "regression": ("pearson", "spearman", "mean_squared_error"),
}


def check_metrics(problem_type: str, metrics: Iterable[str], num_labels: int) -> tuple[str, ...]:
    """The metrics as a tuple, once each is known to suit the problem.

    Raises:
        InputError: none is given, one is unknown or unfit for the problem type, ``f1`` (of class 1) is asked
            for other than two classes, or the first is ``mean_squared_error``, where less is better.
    """
    metrics = tuple(metrics)
    known = _METRICS[problem_type]
    for metric in metrics:
        if metric not in known:
            raise InputError(f"Unknown metric '{metric}' for {problem_type}; known are {', '.join(known)}.")
    if not metrics or metrics[0] == "mean_squared_error":
        raise InputError("The first metric must be one of which more is better; put another one first.")
    if "f1" in metrics and num_labels != 2:
        raise InputError(
            f"The metric 'f1' is for two classes; with {num_labels} use 'f1_macro' or 'f1_micro'."
        )
    return metrics


def compute_metrics(
    problem_type: str, metrics: Iterable[str], logits: Array, labels: Array
) -> dict[str, float]:
    """Scores `logits` against `labels` by each of `metrics`.

    Args:
        logits: (rows, labels) floats; (rows, 1) or (rows,) for regression. A class is predicted by the
            greatest logit, a label of a multi-label problem by a logit above 0 (probability above 0.5).
        labels: (rows,) ints; (rows, labels) of 0 and 1 for multi-label; (rows,) floats for regression.

    Returns:
        Each metric's value: ``accuracy``, ``subset_accuracy`` and the ``f1`` family in [0, 1]; ``matthews``,
        ``pearson`` and ``spearman`` in [-1, 1], 0 where undefined (constant predictions);
        ``mean_squared_error`` from 0 up.
    """
    labels = np.asarray(labels)
    predictions = predictions_of(problem_type, np.asarray(logits))
    if len(predictions) != len(labels) or not len(labels):
        raise ValueError(f"{len(predictions)} rows of logits for {len(labels)} labels")
    return {metric: _score(metric, predictions, labels) for metric in metrics}


def predictions_of(problem_type: str, logits: Array) -> Array:
    """What logits (rows, labels) say: class ids (rows,), 0 and 1 (rows, labels) of several labels, values (rows,)."""
    if problem_type == "single_label_classification":
        return np.asarray(logits.argmax(axis=1))
    if problem_type == "multi_label_classification":
        return (logits > 0).astype(np.int64)
    return logits.reshape(len(logits))


def majority_score(task: Task) -> float:
    """The main metric of always giving the best constant answer: what any trained model must beat.

    The answer is the commonest class, label-wise the majority of a multi-label problem, or the mean of a
    regression problem, learned from train (else from the scored split), and scored on dev, else on train,
    else on test.
    """
    scored = next(task.splits[name] for name in ("dev", "train", "test") if name in task.splits)
    labels = _label_array(scored)
    known = _label_array(task.splits["train"]) if "train" in task.splits else labels
    if task.problem_type == "single_label_classification":
        answer = np.bincount(known, minlength=task.num_labels).astype(float)
    else:
        answer = np.atleast_1d(known.mean(axis=0)) - (0.5 if task.problem_type.startswith("multi") else 0.0)
    constant = np.broadcast_to(answer, (len(labels), len(answer)))
    return compute_metrics(task.problem_type, [task.main_metric], constant, labels)[task.main_metric]


def bootstrap_interval(
    problem_type: str,
    metric: str,
    logits: Array,
    labels: Array,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a metric over resampled rows (Efron and Tibshirani 1993, ch. 13).

    Shapes are those of `compute_metrics`. Deterministic under `seed`.

    Returns:
        The lower and upper bound that hold `confidence` (in (0, 1)) of the resampled scores between them.
    """
    predictions, labels = predictions_of(problem_type, np.asarray(logits)), np.asarray(labels)
    rows = len(labels)
    random = np.random.default_rng(seed)
    if metric in ("accuracy", "subset_accuracy"):
        # Drawing rows with replacement draws right answers with the observed rate: no row need be touched.
        scores = random.binomial(rows, _score(metric, predictions, labels), size=resamples) / rows
    elif problem_type == "single_label_classification":
        # A score depends on how often each pair (label, prediction) occurs, so the pairs are resampled.
        pairs, counts = np.unique(np.stack([labels, predictions], axis=1), axis=0, return_counts=True)
        draws = random.multinomial(rows, counts / rows, size=resamples)
        scores = _scores_of_counts(metric, pairs[:, 0], pairs[:, 1], draws)
    else:
        drawn = draws_of_rows(rows, resamples, seed)
        scores = np.concatenate([scores_of_draws(metric, predictions, labels, counts) for counts in drawn])
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(scores, [tail, 1.0 - tail])
    return float(low), float(high)


def bootstrap_difference_interval(
    problem_type: str,
    metric: str,
    logits: Array,
    reference: Array,
    labels: Array,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a metric less that of a reference, both scored on the same resampled rows.

    Shapes are those of `compute_metrics`. Deterministic under `seed`. Rows are drawn for both at once, so that what
    both get right or wrong does not widen the interval.

    Returns:
        The lower and upper bound that hold `confidence` (in (0, 1)) of the differences between them.
    """
    found, expected = (predictions_of(problem_type, np.asarray(given)) for given in (logits, reference))
    labels = np.asarray(labels)
    random, rows = np.random.default_rng(seed), len(labels)
    if metric in ("accuracy", "subset_accuracy"):
        differences = resampled_accuracy_differences(
            _right(found, labels), _right(expected, labels), resamples=resamples, seed=seed
        )
    elif problem_type == "single_label_classification":
        triples, counts = np.unique(np.stack([labels, found, expected], axis=1), axis=0, return_counts=True)
        draws_of_triples = random.multinomial(rows, counts / rows, size=resamples)
        differences = _scores_of_counts(metric, triples[:, 0], triples[:, 1], draws_of_triples)
        differences = differences - _scores_of_counts(metric, triples[:, 0], triples[:, 2], draws_of_triples)
    else:
        differences = np.concatenate(
            [
                scores_of_draws(metric, found, labels, counts)
                - scores_of_draws(metric, expected, labels, counts)
                for counts in draws_of_rows(rows, resamples, seed)
            ]
        )
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(differences, [tail, 1.0 - tail])
    return float(low), float(high)


def resampled_accuracy_differences(right: Array, reference: Array, *, resamples: int, seed: int = 0) -> Array:
    """Bootstrap samples (resamples,) of an accuracy less a reference's, from pairs.

    Args:
        right, reference: (rows,) bool, whether each of the two has a row right.
        resamples: how many.
        seed: of the draws.
    """
    rows, lost, gained = len(right), int((reference & ~right).sum()), int((right & ~reference).sum())
    shares = [lost / rows, gained / rows, (rows - lost - gained) / rows]
    # Only rows that one of them alone has right tell them apart, so their number is all that is drawn.
    drawn = np.random.default_rng(seed).multinomial(rows, shares, size=resamples)
    return np.asarray((drawn[:, 1] - drawn[:, 0]) / rows)


def expected_calibration_error(probabilities: Array, labels: Array, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equal bins of confidence (Guo et al. 2017, Eq. 3).

    Args:
        probabilities: (rows, classes) floats, rows summing to 1.
        labels: (rows,) ints.
        bins: the number of bins of equal width over [0, 1].

    Returns:
        A number in [0, 1]; 0 is perfect calibration.
    """
    probabilities, labels = np.asarray(probabilities), np.asarray(labels)
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    # Bins are closed above: (0, 1/bins], (1/bins, 2/bins], …
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(index, weights=correct - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def _right(predictions: Array, labels: Array) -> Array:
    equal = predictions == labels
    return np.asarray(equal.all(axis=1) if equal.ndim > 1 else equal)


def _score(metric: str, predictions: Array, labels: Array) -> float:
    if metric in ("accuracy", "subset_accuracy"):
        return float(sklearn_metrics.accuracy_score(labels, predictions))
    if metric == "f1":
        return float(sklearn_metrics.f1_score(labels, predictions, zero_division=0))
    if metric in ("f1_macro", "f1_micro"):
        average = metric.removeprefix("f1_")
        return float(sklearn_metrics.f1_score(labels, predictions, average=average, zero_division=0))
    if metric == "matthews":
        return float(sklearn_metrics.matthews_corrcoef(labels, predictions))
    if metric == "mean_squared_error":
        return float(sklearn_metrics.mean_squared_error(labels, predictions))
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    correlation = stats.pearsonr if metric == "pearson" else stats.spearmanr
    return float(correlation(predictions, labels).statistic)


def _scores_of_counts(metric: str, labels: Array, predictions: Array, counts: Array) -> Array:
    """Scores of many samples at once: `counts` (samples, pairs) says how often each holds each pair."""
    classes = np.arange(max(labels.max(), predictions.max()) + 1)
    is_label, is_prediction = labels[:, None] == classes, predictions[:, None] == classes
    labelled, predicted = counts @ is_label, counts @ is_prediction  # (samples, classes)
    hits = counts @ (is_label & is_prediction)
    if metric == "matthews":
        rows = counts.sum(axis=1).astype(float)
        covariance = hits.sum(axis=1) * rows - (labelled * predicted).sum(axis=1)
        spread = (rows**2 - (labelled**2).sum(axis=1)) * (rows**2 - (predicted**2).sum(axis=1))
        return np.where(spread > 0, covariance / np.sqrt(np.maximum(spread, 1.0)), 0.0)
    if metric == "f1_micro":
        return np.asarray(hits.sum(axis=1) / counts.sum(axis=1))
    occurring = labelled + predicted
    f1 = 2.0 * hits / np.maximum(occurring, 1)
    if metric == "f1":
        return np.asarray(f1[:, 1]) if len(classes) > 1 else np.zeros(len(counts))
    return np.asarray(f1.sum(axis=1) / (occurring > 0).sum(axis=1))


def _label_array(split: Any) -> Array:
    return np.asarray(split.with_format("numpy")["labels"][:])
