"""Earth mover's distances against SciPy, POT, pyemd and closed forms."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import ot
import pyemd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import wasserstein_distance
from torch import Tensor

from alembert.common.errors import InputError
from alembert.losses.transport import (
    EMD_FUNCTIONS,
    class_aware_emd,
    class_ground_cost,
    histogram_emd,
    sorted_emd,
)

CLASS_COUNTS = (2, 3, 20, 166)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Hundreds of tiny products: on a busy machine threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _pairs(kind: str, classes: int, rows: int = 30) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(classes)
    first, second = torch.randn(2, rows, classes, generator=generator, dtype=torch.float64)
    second = 2 * second + 0.5
    if kind == "skewed":
        return (2 * first).exp(), second.exp()
    if kind == "duplicates":
        return (2 * first).round() / 10, (2 * second).round() / 10
    if kind == "integers":
        return first.round(), second.round()
    if kind == "constant":
        return torch.full_like(first, 3.0), torch.full_like(second, 3.0)
    if kind == "two constants":
        return torch.full_like(first, 3.0), torch.full_like(second, -1.0)
    if kind == "outlier":
        first[:, 0] = 1e6
    return first, second


def _numbers(classes: int) -> st.SearchStrategy[Tensor]:
    values = st.floats(-50, 50, width=32)
    return arrays(np.float64, (2, classes), elements=values).map(torch.from_numpy)


def _exact_class_distance(p: Tensor, q: Tensor, cost: Tensor) -> np.ndarray:
    return np.array(
        [ot.emd2(x / x.sum(), y / y.sum(), cost.numpy()) for x, y in zip(p.numpy(), q.numpy(), strict=True)]
    )


@pytest.mark.parametrize("classes", (1, *CLASS_COUNTS))
def test_sorted_equals_scipy_and_pot(classes: int) -> None:
    first, second = _pairs("random", classes)
    distances = sorted_emd(first, second).numpy()
    rows = list(zip(first.numpy(), second.numpy(), strict=True))
    np.testing.assert_allclose(distances, [wasserstein_distance(x, y) for x, y in rows], rtol=1e-12)
    np.testing.assert_allclose(distances, [ot.emd2_1d(x, y, metric="euclidean") for x, y in rows], rtol=1e-9)
    single = sorted_emd(first.float(), second.float())
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single, distances, rtol=1e-5)


@pytest.mark.parametrize(
    "kind", ["random", "skewed", "duplicates", "integers", "constant", "two constants", "outlier"]
)
@pytest.mark.parametrize("classes", (1, *CLASS_COUNTS))
def test_histogram_equals_pyemd(classes: int, kind: str) -> None:
    first, second = _pairs(kind, classes)
    expected = [pyemd.emd_samples(x, y) for x, y in zip(first.numpy(), second.numpy(), strict=True)]
    np.testing.assert_allclose(histogram_emd(first, second), expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([2, 3, 5, 8]).flatmap(_numbers))
def test_histogram_equals_pyemd_on_any_numbers(numbers: Tensor) -> None:
    first, second = numbers
    # Below this, pyemd itself refuses: bins would be narrower than float64 can tell apart.
    if 0 < numbers.max() - numbers.min() < 1e-9:
        second = first
    expected = pyemd.emd_samples(first.numpy(), second.numpy())
    assert float(histogram_emd(first, second)) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_histogram_of_not_finite_values_is_nan_for_that_pair_alone() -> None:
    first = torch.tensor([[1.0, float("nan")], [1.0, float("inf")], [0.0, 0.0]])
    distances = histogram_emd(first, torch.ones(2))
    assert distances.isnan().tolist() == [True, True, False]


def test_histogram_takes_half_precision_and_carries_no_gradient() -> None:
    first = torch.randn(3, 5, requires_grad=True)
    assert not histogram_emd(first, torch.zeros(5)).requires_grad
    assert histogram_emd(first.bfloat16(), torch.zeros(5)).dtype == torch.float64


@pytest.mark.parametrize("emd", EMD_FUNCTIONS.values(), ids=EMD_FUNCTIONS)
def test_pairs_broadcast_and_equal_a_loop(emd: Callable[..., Tensor]) -> None:
    layers, exits = torch.randn(4, 1, 3, 7), torch.randn(1, 2, 3, 7)
    distances = emd(layers, exits)
    assert distances.shape == (4, 2, 3)
    for i, j, row in np.ndindex(4, 2, 3):
        torch.testing.assert_close(distances[i, j, row], emd(layers[i, 0, row], exits[0, j, row]))


@pytest.mark.parametrize("emd", EMD_FUNCTIONS.values(), ids=EMD_FUNCTIONS)
@settings(max_examples=50, deadline=None)
@given(numbers=st.integers(1, 9).flatmap(_numbers))
def test_symmetric_not_negative_and_zero_on_equals(emd: Callable[..., Tensor], numbers: Tensor) -> None:
    first, second = numbers
    distance = emd(first, second)
    assert distance >= 0
    torch.testing.assert_close(distance, emd(second, first))
    assert emd(first, first) == 0


@settings(max_examples=50, deadline=None)
@given(numbers=_numbers(5))
def test_sorted_is_zero_only_on_the_same_values(numbers: Tensor) -> None:
    first, second = numbers
    same = torch.equal(first.sort().values, second.sort().values)
    assert (sorted_emd(first, second) == 0) == same


@settings(max_examples=50, deadline=None)
@given(_numbers(6), st.permutations(range(6)))
def test_sorted_forgets_which_class_a_value_belongs_to(numbers: Tensor, order: list[int]) -> None:
    first, second = numbers
    torch.testing.assert_close(sorted_emd(first[order], second), sorted_emd(first, second))
    assert sorted_emd(first[order], first) == 0


def test_only_the_class_aware_distance_tells_opposite_predictions_apart() -> None:
    first, second = torch.tensor([5.0, -5.0]), torch.tensor([-5.0, 5.0])
    assert sorted_emd(first, second) == 0
    assert histogram_emd(first, second) == 0
    assert class_aware_emd(first, second) > 0.99
    assert class_aware_emd(first, second, torch.tensor([[0.0, 1.0], [1.0, 0.0]])) > 0.99


def test_class_aware_without_cost_is_total_variation() -> None:
    first, second = _pairs("random", 20)
    p, q = (first / 2).softmax(-1), (second / 2).softmax(-1)
    expected = _exact_class_distance(p, q, 1 - torch.eye(20, dtype=torch.float64))
    np.testing.assert_allclose(class_aware_emd(first, second, temperature=2.0), expected, rtol=1e-9)


@pytest.mark.parametrize("scale", [1.0, 5.0, 30.0])
@pytest.mark.parametrize("classes", [2, 3, 20, 40])
@pytest.mark.parametrize("ground", ["classifier", "line", "grid"])
def test_class_aware_with_cost_equals_pot(classes: int, ground: str, scale: float) -> None:
    generator = torch.Generator().manual_seed(classes)
    if ground == "classifier":
        cost = class_ground_cost(torch.randn(classes, 8, generator=generator, dtype=torch.float64))
    elif ground == "line":
        points = torch.rand(classes, 1, generator=generator, dtype=torch.float64) * 7
        cost = torch.cdist(points, points, p=1)
    else:
        index = torch.arange(classes)
        points = torch.stack([index % 5, index // 5], dim=-1).double()
        cost = torch.cdist(points, points, p=1)
    first, second = scale * torch.randn(2, 12, classes, generator=generator, dtype=torch.float64)
    expected = _exact_class_distance(first.softmax(-1), second.softmax(-1), cost)
    error = np.abs(class_aware_emd(first, second, cost).numpy() - expected) / float(cost.max())
    assert error.max() < 5e-3
    assert error.mean() < 1e-3


def test_class_aware_charges_less_for_moves_between_near_classes() -> None:
    cost = torch.tensor([[0.0, 0.1, 1.0], [0.1, 0.0, 1.0], [1.0, 1.0, 0.0]])
    logits = 20 * torch.eye(3)
    near, far = class_aware_emd(logits[0], logits[1:], cost)
    assert near == pytest.approx(0.1, abs=1e-4)
    assert far == pytest.approx(1.0, abs=1e-4)


def test_class_aware_with_zero_cost_is_zero() -> None:
    first, second = torch.randn(2, 4, 3)
    assert class_aware_emd(first, second, torch.zeros(3, 3)).tolist() == [0.0] * 4


def test_ground_cost_is_a_metric_from_the_angle_between_rows() -> None:
    weight = torch.randn(9, 4, dtype=torch.float64)
    cost = class_ground_cost(weight)
    cosine = torch.nn.functional.cosine_similarity(weight[:, None], weight[None], dim=-1)
    expected = (1 - cosine).clamp_min(0).sqrt()
    torch.testing.assert_close(cost, expected / expected.max(), atol=1e-7, rtol=0)
    assert cost.max() == 1
    assert torch.equal(cost, cost.T)
    assert (cost[:, None, :] <= cost[:, :, None] + cost[None] + 1e-12).all()


def test_gradients() -> None:
    first = torch.randn(2, 1, 5, dtype=torch.float64, requires_grad=True)
    second = torch.randn(1, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sorted_emd, (first, second))
    assert torch.autograd.gradcheck(class_aware_emd, (first, second))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sorted_emd(torch.zeros(2), torch.zeros(3)), "2 and 3"),
        (lambda: histogram_emd(torch.zeros(2), torch.zeros(3)), "2 and 3"),
        (lambda: class_aware_emd(torch.zeros(2), torch.zeros(3)), "2 and 3"),
        (lambda: class_aware_emd(torch.zeros(2), torch.zeros(2), temperature=0), "temperature"),
        (lambda: class_aware_emd(torch.zeros(2), torch.zeros(2), torch.zeros(3, 3)), r"\(2, 2\)"),
        (lambda: class_aware_emd(torch.zeros(2), torch.zeros(2), torch.eye(2)), "diagonal"),
        (lambda: class_aware_emd(torch.zeros(2), torch.zeros(2), torch.ones(2, 2).triu(1)), "symmetric"),
        (lambda: class_ground_cost(torch.ones(3)), r"\(classes, features\)"),
        (lambda: class_ground_cost(torch.ones(3, 2)), "same way"),
    ],
)
def test_wrong_input_is_named(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
