"""Layer flow against SciPy's linear programming, cost attention against its equations, distances against loops."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional

from alembert.common.errors import InputError
from alembert.losses import layer_transport
from alembert.losses.attention import attention_score_mse
from alembert.losses.hidden import hidden_state_mse
from alembert.losses.layer_transport import (
    COST_ATTENTION_FORMS,
    SIDES,
    attention_score_distances,
    cost_attention,
    hidden_state_distances,
    layer_flow,
    pairwise_layer_distances,
    transport_cost,
)

Distances = Callable[[Sequence[Tensor] | Tensor, Sequence[Tensor] | Tensor, Tensor], Tensor]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

MASK = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
KINDS: list[tuple[Distances, Loss, tuple[int, ...]]] = [
    (hidden_state_distances, hidden_state_mse, (4, 4, 5)),
    (attention_score_distances, attention_score_mse, (4, 3, 4, 4)),
]


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _linear_program(distances: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> float:
    m, n = distances.shape
    constraints = np.concatenate([np.kron(np.eye(m), np.ones(n)), np.kron(np.ones(m), np.eye(n))])
    marginals = np.concatenate([rows, columns])
    result = linprog(distances.flatten(), A_eq=constraints, b_eq=marginals, bounds=(0, None), method="highs")
    assert result.success
    return float(result.fun)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 6), st.integers(1, 12), st.integers(0, 1000), st.booleans(), st.floats(1e-6, 1e6))
def test_flow_is_optimal(m: int, n: int, seed: int, zeros: bool, scale: float) -> None:
    generator = np.random.default_rng(seed)
    distances = scale * generator.random((m, n))
    rows, columns = generator.random(m) + 0.01, generator.random(n) + 0.01
    if zeros:
        rows[generator.random(m) < 0.4], columns[generator.random(n) < 0.4] = 0, 0
        rows[0], columns[-1] = 1, 1
    flow = layer_flow(*map(torch.as_tensor, (distances, rows, columns)))

    rows, columns = rows / rows.sum(), columns / columns.sum()
    assert (flow >= 0).all()
    np.testing.assert_allclose(flow.sum(1), rows, atol=1e-12)
    np.testing.assert_allclose(flow.sum(0), columns, atol=1e-12)
    cost = transport_cost(flow, torch.as_tensor(distances)).item()
    # The reference stops at an absolute tolerance, so it is given costs of the size of 1.
    expected = scale * _linear_program(distances / scale, rows, columns)
    assert cost == pytest.approx(expected, rel=1e-6, abs=1e-9 * scale)


def test_flow_of_equal_numbers_is_the_cheapest_matching() -> None:
    distances = torch.tensor([[0.0, 1.0], [1.0, 5.0]])
    flow = layer_flow(distances, torch.ones(2), torch.ones(2))
    torch.testing.assert_close(flow, torch.tensor([[0.0, 0.5], [0.5, 0.0]]))
    assert flow.dtype == torch.float32
    assert transport_cost(flow, distances) == 1


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_flow_ignores_the_scale_of_costs(scale: float) -> None:
    distances = _random(4, 12).abs()
    weights = torch.ones(4), torch.ones(12)
    torch.testing.assert_close(layer_flow(scale * distances, *weights), layer_flow(distances, *weights))
    assert layer_flow(0 * distances, *weights).sum() == pytest.approx(1)


def test_gradient_of_the_cost_is_the_flow() -> None:
    distances = _random(3, 5).abs().requires_grad_()
    flow = layer_flow(distances, torch.ones(3), torch.ones(5))
    assert not flow.requires_grad
    (gradient,) = torch.autograd.grad(transport_cost(flow, distances), distances)
    assert gradient.equal(flow)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_cost_attention_equals_its_equations(side: str, temperature: float) -> None:
    distances, rows, columns = _random(4, 6).abs(), _random(4, seed=1).abs(), _random(6, seed=2).abs()
    rows, columns = rows / rows.sum(), columns / columns.sum()
    flow = layer_flow(distances, rows, columns)
    weights = rows if side == "student" else columns
    moved = (flow * distances).tolist() if side == "student" else (flow * distances).T.tolist()
    cost = [sum(row) / weight for row, weight in zip(moved, weights.tolist(), strict=True)]
    unnormalised = [sum(cost) / value for value in cost]

    code = cost_attention(flow, distances, weights, side, temperature, "code")
    assert code.tolist() == pytest.approx([u / sum(unnormalised) for u in unnormalised])
    assert code.argmax() == torch.tensor(cost).argmin()
    exponents = [math.exp(u / temperature) for u in unnormalised]
    paper = cost_attention(flow, distances, weights, side, temperature, "paper")
    assert paper.tolist() == pytest.approx([e / sum(exponents) for e in exponents])


@pytest.mark.parametrize("form", COST_ATTENTION_FORMS)
def test_cost_attention_closes_gaps(form: str) -> None:
    attend = partial(cost_attention, form=form)
    # The last layer has no weight: it counts as the dearest, whatever its distances.
    flow = torch.tensor([[0.5, 0.0], [0.0, 0.5], [0.0, 0.0]])
    distances = torch.tensor([[1.0, 9.0], [9.0, 2.0], [0.1, 0.1]])
    weights = attend(flow, distances, torch.tensor([0.5, 0.5, 0.0]))
    assert weights[0] > weights[1] == weights[2] > 0
    # Layers that cost nothing share the weight; nothing at all is even.
    flow, even = torch.full((3, 2), 1 / 6), torch.full((3,), 1 / 3)
    distances = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    torch.testing.assert_close(attend(flow, distances, even), torch.tensor([0.5, 0.5, 0.0]))
    torch.testing.assert_close(attend(flow, torch.zeros(3, 2), even), even)
    torch.testing.assert_close(attend(torch.zeros(3, 2), distances, even), even)


_magnitudes = st.one_of(st.just(0.0), st.floats(-30, 30).map(lambda exponent: 10.0**exponent))


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_cost_attention_is_always_a_distribution(data: st.DataObject) -> None:
    m, n = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    side = data.draw(st.sampled_from(SIDES))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))

    def tensor(*shape: int) -> Tensor:
        size = math.prod(shape)
        values = data.draw(st.lists(_magnitudes, min_size=size, max_size=size))
        return torch.tensor(values, dtype=dtype).view(shape)

    distances, weights = tensor(m, n), tensor(m if side == "student" else n)
    if data.draw(st.booleans()) and weights.any():
        both = (weights, torch.ones(n)) if side == "student" else (torch.ones(m), weights)
        flow = layer_flow(distances, *both)
    else:
        flow = tensor(m, n)
    temperature = 10.0 ** data.draw(st.floats(-30, 30))
    form = data.draw(st.sampled_from(COST_ATTENTION_FORMS))
    result = cost_attention(flow, distances, weights, side, temperature, form)
    assert result.dtype == dtype
    assert result.shape == weights.shape
    assert (result >= 0).all()
    assert result.double().sum().item() == pytest.approx(1, abs=1e-6)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 100), st.sampled_from(COST_ATTENTION_FORMS))
def test_weights_stay_distributions_over_many_steps(seed: int, form: str) -> None:
    rows, columns = torch.full((4,), 0.25), torch.full((12,), 1 / 12)
    for step in range(30):
        distances = _random(4, 12, seed=seed * 30 + step).abs().float()
        flow = layer_flow(distances, rows, columns)
        rows, columns = (
            cost_attention(flow, distances, weights, side, form=form)
            for weights, side in ((rows, "student"), (columns, "teacher"))
        )
        for weights in (rows, columns):
            assert weights.isfinite().all()
            assert weights.sum().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("chunk", [1, 100, 10**6])
@pytest.mark.parametrize(("distances", "loss", "shape"), KINDS)
def test_distances_equal_the_losses_of_all_pairs(
    distances: Distances, loss: Loss, shape: tuple[int, ...], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(layer_transport._CHUNK_NUMBERS, "cpu", chunk)
    student, teacher = _random(2, *shape).requires_grad_(), _random(3, *shape, seed=1)
    weights = _random(2, 3, seed=2)
    expected = pairwise_layer_distances(list(student), list(teacher), lambda s, t: loss(s, t, MASK))
    value = distances(student, teacher, MASK)
    torch.testing.assert_close(value, expected)
    gradients = [torch.autograd.grad((weights * side).sum(), student)[0] for side in (value, expected)]
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(distances(list(student), list(teacher), MASK.bool()), expected)


@pytest.mark.parametrize(("distances", "loss", "shape"), KINDS)
def test_distance_gradients(distances: Distances, loss: Loss, shape: tuple[int, ...]) -> None:
    student, teacher = _random(2, *shape).requires_grad_(), _random(3, *shape, seed=1)
    assert gradcheck(lambda s: distances(s, teacher, MASK), (student,))


@pytest.mark.parametrize("garbage", [1e30, float("inf"), float("nan")])
@pytest.mark.parametrize(("distances", "loss", "shape"), KINDS)
def test_padding_changes_nothing(
    distances: Distances, loss: Loss, shape: tuple[int, ...], garbage: float
) -> None:
    mask = functional.pad(MASK, (0, 2))
    if distances is hidden_state_distances:
        margin, kept = (0, 0, 0, 2), mask[..., None]
    else:
        margin, kept = (0, 2, 0, 2), mask[:, None, :, None] & mask[:, None, None, :]
    student, teacher = _random(2, *shape), _random(3, *shape, seed=1)
    padded = [functional.pad(side, margin).masked_fill(kept == 0, garbage) for side in (student, teacher)]
    padded[0].requires_grad_()
    value = distances(padded[0], padded[1], mask)
    torch.testing.assert_close(value, distances(student, teacher, MASK))
    (gradient,) = torch.autograd.grad(value.sum(), padded[0])
    assert gradient.isfinite().all()
    assert (gradient.masked_select(kept == 0) == 0).all()


@pytest.mark.parametrize(("distances", "loss", "shape"), KINDS)
def test_close_layers_keep_their_distance_in_single_precision(
    distances: Distances, loss: Loss, shape: tuple[int, ...]
) -> None:
    teacher = (100 + _random(3, *shape)).float()
    student = (teacher[:2] * (1 + 1e-4)).requires_grad_()
    exact = torch.stack([torch.stack([loss(s, t, MASK) for t in teacher.double()]) for s in student.double()])
    value = distances(student, teacher, MASK)
    torch.testing.assert_close(value, exact.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("distances", "loss", "shape"), KINDS)
def test_half_precision_is_raised(
    distances: Distances, loss: Loss, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    student, teacher = ((300 * _random(2, *shape, seed=seed)).to(dtype) for seed in range(2))
    student.requires_grad_()
    value = distances(student, teacher, MASK)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, distances(student.float(), teacher.float(), MASK))
    (gradient,) = torch.autograd.grad(value.mean(), student)
    assert gradient.dtype == dtype


@pytest.mark.parametrize(("distances", "loss", "shape"), KINDS)
def test_teacher_of_inference_mode_and_student_without_gradient(
    distances: Distances, loss: Loss, shape: tuple[int, ...]
) -> None:
    with torch.inference_mode():
        teacher = list(_random(3, *shape, seed=1))
    projection = torch.ones(shape[-1], dtype=torch.float64, requires_grad=True)
    frozen, trained = _random(*shape), _random(*shape, seed=3) * projection
    distances([frozen, trained], teacher, MASK).sum().backward()
    assert projection.grad is not None
    assert (projection.grad != 0).any()
    assert not distances([frozen], teacher, MASK).requires_grad
    assert (distances([frozen], teacher, 0 * MASK) == 0).all()


def test_refusals() -> None:
    even, distances = torch.ones(2), torch.ones(2, 2)
    with pytest.raises(InputError, match=r"must be \(2, 3\)"):
        layer_flow(distances, even, torch.ones(3))
    with pytest.raises(InputError, match="student layer 2 and teacher layer 1 is nan: training has diverged"):
        layer_flow(torch.tensor([[1.0, 1.0], [float("nan"), 1.0]]), even, even)
    for wrong in (-even, 0 * even, even / 0):
        with pytest.raises(InputError, match="teacher_weights must be finite"):
            layer_flow(distances, even, wrong)
    with pytest.raises(InputError, match="choose one of student, teacher"):
        cost_attention(distances, distances, even, "rows")
    with pytest.raises(InputError, match="choose one of paper, code"):
        cost_attention(distances, distances, even, form="original")
    with pytest.raises(InputError, match="greater than 0"):
        cost_attention(distances, distances, even, temperature=0)
    with pytest.raises(InputError, match="teacher's side do not fit"):
        cost_attention(torch.ones(3, 2), torch.ones(3, 2), torch.ones(3), "teacher")
    with pytest.raises(InputError, match="diverged"):
        cost_attention(distances, distances / 0, even)
    hidden = torch.zeros(1, 2, 3, 4)
    with pytest.raises(InputError, match="project"):
        hidden_state_distances(hidden, hidden[..., :2], torch.ones(2, 3))
    with pytest.raises(InputError, match="average attention heads"):
        attention_score_distances(torch.zeros(1, 2, 8, 3, 3), torch.zeros(1, 2, 12, 3, 3), torch.ones(2, 3))
    with pytest.raises(InputError, match="At least one layer"):
        hidden_state_distances([], hidden, torch.ones(2, 3))
    with pytest.raises(InputError, match=r"mask must be \(2, 3\)"):
        hidden_state_distances(hidden, hidden, torch.ones(3, 2))
