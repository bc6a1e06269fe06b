from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from alembert.common.errors import InputError
from alembert.runtime import policies
from alembert.runtime.policies import (
    MULTI_LABEL,
    REGRESSION,
    SINGLE_LABEL,
    ExitPolicy,
    check_speed,
    default_policy,
    entropy,
    margin,
    max_probability,
    top_k_entropy,
)

MEASURES: dict[str, Callable] = {
    "entropy": entropy,
    "top 2 printed": lambda p: top_k_entropy(p, 2, renormalise=False),
    "top 2": lambda p: top_k_entropy(p, 2, renormalise=True),
    "max_probability": max_probability,
    "margin": margin,
}


@st.composite
def distributions(draw: st.DrawFn) -> np.ndarray:
    """(rows, labels) softmax outputs, from flat to so peaked that probabilities underflow to 0."""
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=7))
    logits = draw(hnp.arrays(np.float64, shape, elements=st.floats(-1000, 1000)))
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def test_flat_distribution_over_166_classes_gives_the_values_of_ms_bert() -> None:
    flat = np.full((1, 166), 1 / 166)
    assert top_k_entropy(flat, 18, renormalise=False)[0] == pytest.approx(0.192, abs=5e-4)
    assert top_k_entropy(flat, 5, renormalise=False)[0] == pytest.approx(0.096, abs=5e-4)
    assert top_k_entropy(flat, 18, renormalise=True)[0] == pytest.approx(1.0, abs=1e-12)


def test_measures_by_hand() -> None:
    p = np.array([[0.7, 0.2, 0.1]])
    nats = -(0.7 * math.log(0.7) + 0.2 * math.log(0.2) + 0.1 * math.log(0.1))
    assert entropy(p)[0] == pytest.approx(nats / math.log(3))
    assert top_k_entropy(p, 2, renormalise=False)[0] == pytest.approx(
        -(0.7 * math.log2(0.7) + 0.2 * math.log2(0.2))
    )
    assert top_k_entropy(p, 2, renormalise=True)[0] == pytest.approx(
        -(7 / 9 * math.log2(7 / 9) + 2 / 9 * math.log2(2 / 9))
    )
    assert max_probability(p)[0] == pytest.approx(0.3 * 3 / 2)
    assert margin(p)[0] == pytest.approx(0.5)


@pytest.mark.parametrize("name", MEASURES)
@given(p=distributions(), random=st.randoms(use_true_random=False))
def test_measure_is_in_range_ignores_class_order_and_agrees_between_numpy_and_torch(
    name: str, p: np.ndarray, random: object
) -> None:
    values = MEASURES[name](p)
    assert values.shape == p.shape[:1]
    assert np.all((values >= 0) & (values <= 1))
    order = np.random.default_rng(random.randint(0, 2**32)).permutation(p.shape[1])  # type: ignore[attr-defined]
    np.testing.assert_allclose(MEASURES[name](p[:, order]), values, atol=1e-12)
    tensor = MEASURES[name](torch.from_numpy(p))
    assert tensor.dtype == torch.float64
    np.testing.assert_allclose(tensor.numpy(), values, atol=1e-12)


@given(p=distributions())
def test_top_k_of_all_labels_is_entropy(p: np.ndarray) -> None:
    for renormalise in (False, True):
        np.testing.assert_allclose(top_k_entropy(p, p.shape[1], renormalise), entropy(p), atol=1e-12)


@pytest.mark.parametrize("labels", [2, 3, 166])
@pytest.mark.parametrize("name", [name for name in MEASURES if name != "top 2 printed"])
def test_uniform_is_one_and_one_hot_is_zero(name: str, labels: int) -> None:
    p = np.stack([np.full(labels, 1 / labels), np.eye(labels)[labels - 1]])
    np.testing.assert_allclose(MEASURES[name](p), [1.0, 0.0], atol=1e-12)
    np.testing.assert_allclose(MEASURES[name](p.astype(np.float32)), [1.0, 0.0], atol=1e-6)


@given(
    p=hnp.arrays(np.float64, (3, 4), elements=st.floats(0, 1)), name=st.sampled_from(["entropy", "margin"])
)
def test_multi_label_takes_the_most_uncertain_label(p: np.ndarray, name: str) -> None:
    policy = ExitPolicy(name, MULTI_LABEL)
    values, history = policy.uncertainty(p)
    assert history is None
    for row, value in zip(p, values, strict=True):
        each = [MEASURES[name](np.array([[label, 1 - label]]))[0] for label in row]
        assert value == pytest.approx(max(each), abs=1e-12)
    np.testing.assert_allclose(policy.uncertainty(torch.from_numpy(p))[0].numpy(), values, atol=1e-12)


def slow_exits(outputs: np.ndarray, policy: ExitPolicy, speed: float) -> list[int | None]:
    """PABEE row by row with its integer patience; outputs (exits, rows, width); None = never leaves."""
    patience = math.floor(round((1 - speed) * policy.num_exits, 9)) + 1
    leaves: list[int | None] = []
    for row in range(outputs.shape[1]):
        count, left = 0, None
        for exit_index in range(1, len(outputs)):
            now, before = outputs[exit_index, row], outputs[exit_index - 1, row]
            if policy.problem_type == SINGLE_LABEL:
                same = int(np.argmax(now)) == int(np.argmax(before))
            elif policy.problem_type == MULTI_LABEL:
                same = [x >= 0.5 for x in now] == [x >= 0.5 for x in before]
            else:
                same = abs(now[0] - before[0]) < policy.tolerance
            count = count + 1 if same else 0
            if count >= patience:
                left = exit_index
                break
        leaves.append(left)
    return leaves


@given(
    problem_type=st.sampled_from([SINGLE_LABEL, MULTI_LABEL, REGRESSION]),
    num_exits=st.integers(2, 10),
    tenths=st.integers(0, 10),
    seed=st.integers(0, 2**32 - 1),
    library=st.sampled_from(["numpy", "torch"]),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_patience_against_a_slow_reference(
    *, problem_type: str, num_exits: int, tenths: int, seed: int, library: str, dtype: type
) -> None:
    policy = ExitPolicy("patience", problem_type, num_exits=num_exits, tolerance=0.4)
    speed, rows = tenths / 10, 6
    width = {SINGLE_LABEL: 3, MULTI_LABEL: 2, REGRESSION: 1}[problem_type]
    drift = np.random.default_rng(seed).normal(size=(num_exits - 1, rows, width)) * 0.3
    outputs = np.clip(0.5 + np.cumsum(drift, axis=0), 0, 1).astype(dtype)
    expected = slow_exits(outputs, policy, speed)

    running, history, left = np.arange(rows), None, [None] * rows
    for exit_index, output in enumerate(outputs):
        here = output[running] if library == "numpy" else torch.from_numpy(output[running])
        uncertainty, history = policy.uncertainty(here, history)
        assert uncertainty.dtype == here.dtype
        leaving = np.asarray(uncertainty < speed)
        for row in running[leaving]:
            left[row] = exit_index
        running = running[~leaving]
        keep = np.flatnonzero(~leaving)
        history = history.select(keep if library == "numpy" else torch.from_numpy(keep))
    assert left == expected


def test_patience_equal_to_the_speed_stays_in_every_precision() -> None:
    for num_exits in range(2, 31):
        policy = ExitPolicy("patience", num_exits=num_exits)
        for dtype in (np.float32, np.float64):
            history = None
            for count in range(num_exits - 1):
                values, history = policy.uncertainty(np.array([[0.9, 0.1]], dtype), history)
                assert not (values < (num_exits - count) / num_exits).any()


def test_learned_takes_the_value_given() -> None:
    policy = ExitPolicy("learned", REGRESSION)
    given_values = np.array([0.2, 1.0])
    values, history = policy.uncertainty(np.array([[3.0], [4.0]]), None, given_values)
    assert values.tolist() == given_values.tolist() and history is None
    with pytest.raises(InputError, match="trained"):
        policy.uncertainty(np.array([[3.0]]))


def test_resolve_fills_top_k_from_the_number_of_labels() -> None:
    policy = ExitPolicy("top_k_entropy")
    assert (policy.resolve(20).top_k, policy.resolve(166).top_k) == (20, 18)
    assert policy.resolve(166).renormalise is True
    chosen = ExitPolicy("top_k_entropy", top_k=5, renormalise=False).resolve(166)
    assert (chosen.top_k, chosen.renormalise) == (5, False)
    flat = np.full((1, 166), 1 / 166)
    assert chosen.uncertainty(flat)[0][0] == pytest.approx(0.096, abs=5e-4)
    assert policy.uncertainty(flat)[0][0] == pytest.approx(1.0)
    assert ExitPolicy("entropy").resolve(3) == ExitPolicy("entropy")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"name": "certainty"}, "entropy, top_k_entropy, max_probability, margin, patience, learned"),
        ({"problem_type": "ranking"}, "single_label_classification"),
        ({"problem_type": REGRESSION}, "patience or learned"),
        ({"name": "top_k_entropy", "top_k": 1}, "between 2 and"),
        ({"name": "top_k_entropy", "top_k": 6}, "between 2 and 5"),
        ({"name": "top_k_entropy", "problem_type": MULTI_LABEL}, "multi-label"),
        ({"name": "entropy", "top_k": 4}, "top_k_entropy"),
        ({"num_exits": 0}, "num_exits"),
        ({"name": "patience", "tolerance": 0.0}, "tolerance"),
        ({"name": "patience", "tolerance": math.nan}, "tolerance"),
    ],
)
def test_wrong_settings_are_refused(settings: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        ExitPolicy(**settings).resolve(5)


def test_one_label_is_no_single_label_classifier() -> None:
    with pytest.raises(InputError, match="at least 2"):
        ExitPolicy("entropy").resolve(1)
    assert ExitPolicy("entropy", MULTI_LABEL).resolve(1).name == "entropy"


def test_default_policies() -> None:
    assert default_policy(SINGLE_LABEL, 20) == "entropy"
    assert default_policy(SINGLE_LABEL, 21) == "top_k_entropy"
    assert default_policy(MULTI_LABEL, 80) == "entropy"
    assert default_policy(REGRESSION, 1) == "patience"


@pytest.mark.parametrize("speed", [0, 0.5, 1, "0.25"])
def test_speed_in_range(speed: float) -> None:
    assert check_speed(speed) == float(speed)


@pytest.mark.parametrize("speed", [-0.1, 1.01, math.nan, math.inf, "fast", None])
def test_speed_out_of_range(speed: float) -> None:
    with pytest.raises(InputError, match="Speed"):
        check_speed(speed)


def test_policies_never_import_torch() -> None:
    # Empty parent packages, so that only what this module itself imports is seen.
    source = Path(policies.__file__).parents[1]
    code = f"""
import sys, types, numpy
for name, folder in (("alembert", {str(source)!r}), ("alembert.runtime", {str(source / "runtime")!r})):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
from alembert.runtime.policies import ExitPolicy
ExitPolicy("margin").uncertainty(numpy.array([[0.9, 0.1]]))
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
