"""Metrics against hand computation and independent formulas."""

from __future__ import annotations

import warnings

import datasets
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from alembert.common.errors import InputError
from alembert.data import (
    Task,
    bootstrap_interval,
    compute_metrics,
    expected_calibration_error,
    majority_score,
)
from alembert.data.metrics import (
    _scores_of_counts,
    bootstrap_difference_interval,
    check_metrics,
    predictions_of,
)
from alembert.data.resampling import draws_of_rows, scores_of_draws

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


def one_hot(predictions: list[int], classes: int) -> np.ndarray:
    return np.eye(classes)[predictions]


def test_single_label_metrics_by_hand() -> None:
    # Of class 1: 2 true positives, 1 false positive, 1 false negative; 1 true negative.
    logits, labels = one_hot([1, 1, 1, 0, 0], 2), np.array([1, 1, 0, 1, 0])
    scores = compute_metrics(SINGLE, ["accuracy", "f1", "f1_macro", "f1_micro", "matthews"], logits, labels)
    assert list(scores) == ["accuracy", "f1", "f1_macro", "f1_micro", "matthews"]
    assert scores["accuracy"] == scores["f1_micro"] == pytest.approx(3 / 5)
    assert scores["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert scores["f1_macro"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert scores["matthews"] == pytest.approx((2 * 1 - 1 * 1) / np.sqrt(3 * 3 * 2 * 2))


def test_multi_label_metrics_by_hand() -> None:
    logits = np.array([[2.0, -1.0], [0.5, 0.5], [-1.0, -2.0]])
    labels = np.array([[1, 0], [1, 0], [0, 1]])
    scores = compute_metrics(MULTI, ["f1_micro", "f1_macro", "subset_accuracy"], logits, labels)
    # Label 0: 2 right of 2; label 1: 1 false positive, 1 false negative.
    assert scores["f1_micro"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert scores["f1_macro"] == pytest.approx((1.0 + 0.0) / 2)
    assert scores["subset_accuracy"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_regression_metrics_by_hand(shape: tuple[int, ...]) -> None:
    predictions, labels = np.array([1.0, 2.0, 4.0, 3.0]), np.array([1.0, 2.0, 3.0, 5.0])
    scores = compute_metrics(
        REGRESSION, ["pearson", "spearman", "mean_squared_error"], predictions.reshape(shape), labels
    )
    assert scores["pearson"] == pytest.approx(np.corrcoef(predictions, labels)[0, 1])
    assert scores["spearman"] == pytest.approx(1 - 6 * 2 / (4 * 15))  # two ranks differ by one
    assert scores["mean_squared_error"] == pytest.approx(5 / 4)


def test_constant_predictions_correlate_with_nothing() -> None:
    scores = compute_metrics(REGRESSION, ["pearson", "spearman"], np.ones(3), np.array([1.0, 2.0, 3.0]))
    assert scores == {"pearson": 0.0, "spearman": 0.0}


def test_rows_must_agree() -> None:
    with pytest.raises(ValueError, match="2 rows of logits for 3 labels"):
        compute_metrics(SINGLE, ["accuracy"], np.zeros((2, 2)), np.zeros(3))


@pytest.mark.parametrize(
    ("problem", "metrics", "labels", "expected"),
    [
        (SINGLE, ["bleu"], 2, "Unknown metric 'bleu'"),
        (MULTI, ["accuracy"], 2, "Unknown metric 'accuracy' for multi_label"),
        (SINGLE, ["f1"], 3, "'f1' is for two classes"),
        (REGRESSION, ["mean_squared_error"], 1, "more is better"),
        (REGRESSION, [], 1, "more is better"),
    ],
)
def test_unfit_metrics_are_refused(problem: str, metrics: list[str], labels: int, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        check_metrics(problem, metrics, labels)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), metric=st.sampled_from(["accuracy", "f1_macro", "matthews", "f1"]))
def test_single_label_intervals_hold_the_score(seed: int, metric: str) -> None:
    random = np.random.default_rng(seed)
    labels = random.integers(2, size=200)
    logits = one_hot(labels, 2) + random.normal(size=(200, 2))
    score = compute_metrics(SINGLE, [metric], logits, labels)[metric]
    low, high = bootstrap_interval(SINGLE, metric, logits, labels, resamples=200, seed=seed)
    assert low <= score <= high
    assert high - low < 0.35


@pytest.mark.parametrize(
    ("problem", "metric"),
    [(MULTI, "f1_micro"), (MULTI, "subset_accuracy"), (REGRESSION, "pearson"), (REGRESSION, "spearman")],
)
def test_other_intervals_hold_the_score(problem: str, metric: str) -> None:
    random = np.random.default_rng(0)
    if problem == MULTI:
        labels = random.integers(2, size=(150, 3))
        logits = labels - 0.5 + random.normal(size=labels.shape)
    else:
        labels = random.normal(size=150)
        logits = (labels + random.normal(size=150))[:, None]
    score = compute_metrics(problem, [metric], logits, labels)[metric]
    low, high = bootstrap_interval(problem, metric, logits, labels, resamples=200, seed=1)
    assert low < score < high
    assert (low, high) == bootstrap_interval(problem, metric, logits, labels, resamples=200, seed=1)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(2, 30),
    metric=st.sampled_from(["f1_micro", "f1_macro", "pearson", "spearman", "mean_squared_error"]),
)
def test_scores_of_draws_agree_with_scores_of_drawn_rows(seed: int, rows: int, metric: str) -> None:
    random = np.random.default_rng(seed)
    if metric.startswith("f1"):
        labels, predictions = random.random((2, rows, 3)) < random.choice([0.05, 0.5])
        problem, logits = MULTI, predictions - 0.5
    else:
        # Few values, so that many are equal, and some resamples hold one alone.
        labels, predictions = random.integers(-2, 3, size=(2, rows)) / 3 + 7
        problem, logits = REGRESSION, predictions[:, None]
    counts = np.concatenate(list(draws_of_rows(rows, 20, seed)))
    assert counts.shape == (20, rows) and (counts.sum(axis=1) == rows).all()
    again = np.random.default_rng(seed)
    drawn = [again.integers(rows, size=rows) for _ in range(20)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's, of labels that do not occur
        expected = [compute_metrics(problem, [metric], logits[draw], labels[draw])[metric] for draw in drawn]
    found = scores_of_draws(metric, predictions, labels, counts)
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_draws_are_made_in_parts_where_rows_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.concatenate(list(draws_of_rows(10, 7, 1)))
    monkeypatch.setattr("alembert.data.resampling._MOST_COUNTS", 25)
    parts = list(draws_of_rows(10, 7, 1))
    assert [len(part) for part in parts] == [2, 2, 2, 1]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@given(
    pairs=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=20),
    metric=st.sampled_from(["f1_macro", "f1_micro", "matthews"]),
)
def test_scores_of_counts_agree_with_scores_of_rows(pairs: list[tuple[int, int]], metric: str) -> None:
    labels, predictions = np.array(pairs).T
    assume(metric != "matthews" or len({*labels, *predictions}) > 1)
    distinct, counts = np.unique(np.array(pairs), axis=0, return_counts=True)
    (score,) = _scores_of_counts(metric, distinct[:, 0], distinct[:, 1], counts[None])
    expected = compute_metrics(SINGLE, [metric], one_hot(predictions, 3), labels)[metric]
    assert score == pytest.approx(expected)


@pytest.mark.parametrize("metric", ["accuracy", "f1", "f1_macro", "matthews"])
def test_shortcuts_agree_with_resampling_rows(metric: str) -> None:
    random = np.random.default_rng(3)
    labels = random.integers(2, size=300)
    logits = one_hot(labels, 2) + random.normal(size=(300, 2))
    draws = [random.integers(300, size=300) for _ in range(300)]
    scores = [compute_metrics(SINGLE, [metric], logits[draw], labels[draw])[metric] for draw in draws]
    interval = bootstrap_interval(SINGLE, metric, logits, labels, confidence=0.9)
    assert interval == pytest.approx(tuple(np.quantile(scores, [0.05, 0.95])), abs=0.02)


def test_calibration_error_by_hand() -> None:
    probabilities = np.array([[0.95, 0.05], [0.92, 0.08], [0.4, 0.6], [0.45, 0.55]])
    labels = np.array([0, 1, 1, 1])
    # Ten bins: (0.9, 1.0] holds 0.95 right, 0.92 wrong; (0.5, 0.6] holds 0.6 and 0.55, both right.
    expected = (abs(1 - 0.95 - 0.92) + abs(2 - 0.6 - 0.55)) / 4
    assert expected_calibration_error(probabilities, labels, bins=10) == pytest.approx(expected)
    assert expected_calibration_error(np.eye(2), np.array([0, 1])) == 0.0
    assert expected_calibration_error(np.eye(2), np.array([1, 0])) == 1.0


def make_task(problem: str, metric: str, names: tuple[str, ...], **splits: list[object]) -> Task:
    return Task(
        "t",
        problem,
        names,
        (metric,),
        {
            name: datasets.Dataset.from_dict({"text": ["x"] * len(labels), "labels": labels})
            for name, labels in splits.items()
        },
    )


def test_majority_scores() -> None:
    names = ("a", "b", "c")
    assert majority_score(make_task(SINGLE, "accuracy", names, train=[1, 1, 2], dev=[2, 2, 1, 0])) == 1 / 4
    assert majority_score(make_task(SINGLE, "accuracy", names, train=[1, 1, 2])) == pytest.approx(2 / 3)
    assert majority_score(make_task(SINGLE, "accuracy", names, test=[0, 0, 2, 0])) == 3 / 4
    vectors = [[1.0, 0.0], [1.0, 1.0], [1.0, 0.0]]
    assert majority_score(
        make_task(MULTI, "subset_accuracy", names[:2], train=vectors, dev=vectors[:2])
    ) == pytest.approx(1 / 2)
    assert majority_score(make_task(REGRESSION, "pearson", (), train=[1.0, 2.0], dev=[1.0, 3.0])) == 0.0


def test_an_interval_of_a_difference_is_about_pairs() -> None:
    # 1,000 rows: 700 right by both, 150 wrong by both, 100 gained, 50 lost.
    labels = np.ones(1000, int)
    found = np.eye(2)[np.repeat([1, 0, 1, 0], [700, 150, 100, 50])]
    before = np.eye(2)[np.repeat([1, 0, 0, 1], [700, 150, 100, 50])]
    low, high = bootstrap_difference_interval(SINGLE, "accuracy", found, before, labels, resamples=20_000)
    half = 1.96 * ((0.15 - 0.05**2) / 1000) ** 0.5  # of the mean of differences that are 1, -1 or 0
    assert (low, high) == pytest.approx((0.05 - half, 0.05 + half), abs=0.002)
    assert bootstrap_difference_interval(SINGLE, "accuracy", found, found, labels) == (0.0, 0.0)
    low, high = bootstrap_difference_interval(SINGLE, "f1_micro", found, before, labels)
    assert (low, high) == pytest.approx((0.05 - half, 0.05 + half), abs=0.005)


@pytest.mark.parametrize(
    ("problem", "metric"), [(MULTI, "f1_macro"), (MULTI, "subset_accuracy"), (REGRESSION, "pearson")]
)
def test_intervals_of_differences_hold_them(problem: str, metric: str) -> None:
    random = np.random.default_rng(3)
    shape = (200, 1) if problem == REGRESSION else (200, 3)
    truth = random.normal(size=shape)
    labels = truth[:, 0] if problem == REGRESSION else (truth > 0).astype(float)
    near, far = truth + 0.2 * random.normal(size=shape), truth + 2.0 * random.normal(size=shape)
    scores = [compute_metrics(problem, [metric], logits, labels)[metric] for logits in (near, far)]
    low, high = bootstrap_difference_interval(problem, metric, near, far, labels, resamples=300)
    assert 0 < low < scores[0] - scores[1] < high < 1


def test_predictions_of_logits() -> None:
    logits = np.array([[0.2, -1.0, 0.3], [2.0, 1.0, -3.0]])
    assert predictions_of(SINGLE, logits).tolist() == [2, 0]
    assert predictions_of(MULTI, logits).tolist() == [[1, 0, 1], [1, 1, 0]]
    assert predictions_of(REGRESSION, logits[:, :1]).tolist() == [0.2, 2.0]
