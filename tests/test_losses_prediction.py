"""Prediction losses and self-distillation targets against torch.distributions and loops over equations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Bernoulli, Categorical
from torch.distributions import kl_divergence as reference_kl
from torch.nn import functional

from alembert.common.errors import InputError
from alembert.losses.prediction import (
    KL_DIRECTIONS,
    PROBLEM_TYPES,
    bernoulli_kl_divergence,
    distillation_divergence,
    kl_divergence,
    masked_language_modelling_loss,
    soft_cross_entropy,
    softened_label_loss,
    task_loss,
)
from alembert.losses.self_distillation import (
    fastbert_loss,
    layer_distances,
    layer_weights,
    ms_bert_loss,
    ms_bert_targets,
)
from alembert.losses.transport import EMD_FUNCTIONS, class_aware_emd, sorted_emd

SINGLE, MULTI, REGRESSION = PROBLEM_TYPES


def _logits(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _reference(direction: str, student: Any, teacher: Any) -> Tensor:
    forward, backward = reference_kl(student, teacher), reference_kl(teacher, student)
    return {
        "student||teacher": forward,
        "teacher||student": backward,
        "symmetric": (forward + backward) / 2,
    }[direction]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("direction", KL_DIRECTIONS)
def test_divergences_equal_torch_distributions(direction: str, temperature: float) -> None:
    student, teacher = _logits(4, 3, 6), _logits(3, 6, seed=1)
    scaled = student / temperature, (teacher / temperature).expand(4, 3, 6)
    options: dict[str, Any] = {"direction": direction, "temperature": temperature, "reduction": "none"}

    expected = temperature**2 * _reference(direction, *(Categorical(logits=x) for x in scaled))
    torch.testing.assert_close(kl_divergence(student, teacher, **options), expected)
    torch.testing.assert_close(
        kl_divergence(student, teacher, direction, temperature), expected.mean(), msg="mean over leading dims"
    )

    expected = temperature**2 * _reference(direction, *(Bernoulli(logits=x) for x in scaled)).mean(-1)
    torch.testing.assert_close(bernoulli_kl_divergence(student, teacher, **options), expected)


def test_default_direction_is_student_first() -> None:
    student, teacher = _logits(5, 4), _logits(5, 4, seed=1)
    expected = functional.kl_div(
        teacher.log_softmax(-1), student.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    torch.testing.assert_close(kl_divergence(student, teacher), expected)


@pytest.mark.parametrize("divergence", [kl_divergence, bernoulli_kl_divergence])
@pytest.mark.parametrize("direction", KL_DIRECTIONS)
def test_divergence_gradients(divergence: Callable[..., Tensor], direction: str) -> None:
    student, teacher = _logits(3, 4).requires_grad_(), _logits(3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(
        partial(divergence, direction=direction, temperature=2.0), (student, teacher)
    )


@pytest.mark.parametrize("problem_type", [SINGLE, MULTI])
def test_temperature_keeps_the_gradient_in_size(problem_type: str) -> None:
    """For high T the gradient tends to a constant (Hinton et al.); without T² it would fall with 1 / T²."""
    teacher = _logits(8, 5, seed=1)

    def gradient(temperature: float) -> Tensor:
        student = _logits(8, 5).requires_grad_()
        distillation_divergence(student, teacher, problem_type, temperature=temperature).backward()
        assert student.grad is not None
        return student.grad

    torch.testing.assert_close(gradient(1e3), gradient(1e4), rtol=2e-2, atol=1e-3)
    assert gradient(1e4).norm() > 0.1


@pytest.mark.parametrize("problem_type", [SINGLE, MULTI])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_extreme_logits_stay_finite(problem_type: str, dtype: torch.dtype) -> None:
    student = torch.tensor([[300.0, -300.0]], dtype=dtype, requires_grad=True)
    loss = distillation_divergence(student, -student.detach(), problem_type)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(PROBLEM_TYPES), st.sampled_from(KL_DIRECTIONS))
def test_divergence_is_not_negative_and_zero_on_equals(seed: int, problem_type: str, direction: str) -> None:
    student, teacher = _logits(3, 4, seed=seed), _logits(3, 4, seed=seed + 1)
    assert distillation_divergence(student, teacher, problem_type, direction=direction) > 0
    assert distillation_divergence(student, student, problem_type, direction=direction).abs() < 1e-12


def test_regression_divergence_is_the_squared_difference() -> None:
    student, teacher = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [5.0]])
    assert distillation_divergence(student, teacher, REGRESSION) == 5
    assert distillation_divergence(student, teacher, REGRESSION, reduction="none").tolist() == [1, 9]


def test_task_losses_equal_their_definitions() -> None:
    logits = _logits(6, 3)
    classes = torch.tensor([0, 2, 1, 1, 0, 2])
    expected = -Categorical(logits=logits).log_prob(classes).mean()
    torch.testing.assert_close(task_loss(logits, classes, SINGLE), expected)

    several = torch.eye(3)[classes]
    expected = -Bernoulli(logits=logits).log_prob(several.double()).mean()
    torch.testing.assert_close(task_loss(logits, several, MULTI), expected)

    values = torch.arange(6.0)
    expected = ((logits[:, 0] - values) ** 2).mean()
    torch.testing.assert_close(task_loss(logits[:, :1], values, REGRESSION), expected)
    torch.testing.assert_close(task_loss(logits[:, :1], values[:, None], REGRESSION), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: kl_divergence(x, x, direction="both"), "direction 'both'"),
        (lambda x: kl_divergence(x, x, temperature=0.0), "temperature"),
        (lambda x: kl_divergence(x, x, reduction="sum"), "reduction 'sum'"),
        (lambda x: bernoulli_kl_divergence(x, x, temperature=-1.0), "temperature"),
        (lambda x: distillation_divergence(x, x, "ranking"), "problem_type 'ranking'"),
        (lambda x: task_loss(x, x, "ranking"), "problem_type 'ranking'"),
        (lambda x: task_loss(x, x, SINGLE), "labels of shape"),
        (lambda x: task_loss(x, x[:, 0], MULTI), "labels of shape"),
        (lambda x: task_loss(x, x[:, 0], REGRESSION), "labels of shape"),
        (lambda x: ms_bert_targets(x[None], x[None]), "at least 2 layers"),
        (lambda x: ms_bert_targets(x, x), "must be"),
        (lambda x: ms_bert_targets(x.expand(2, 2, 3), x[None], own_layers=True), "at least 2 exits"),
        (lambda x: ms_bert_targets(x.expand(2, 2, 3), x[None], emd="pyemd"), "emd 'pyemd'"),
        (lambda x: ms_bert_targets(x.expand(2, 2, 3), x[None], weighting="far"), "weighting 'far'"),
        (lambda x: ms_bert_targets(x.expand(2, 2, 3), x[None], scope="epoch"), "scope 'epoch'"),
        (lambda x: ms_bert_targets(x.expand(2, 2, 3), x[None], values="odds"), "values 'odds'"),
        (lambda x: ms_bert_targets(x.expand(2, 2, 3), x[None], teacher_weight=-1), "teacher_weight"),
        (lambda x: ms_bert_targets(x.expand(2, 2, 3), x[None], weighting_temperature=0), "temperature"),
        (lambda x: ms_bert_targets(x.expand(2, 2, 3), x[None], ground_cost=torch.eye(3)), "ground_cost"),
        (lambda x: ms_bert_targets(x.expand(2, 2, 3), x[None], emd="class_aware", scope="batch"), "scope"),
        (
            lambda x: ms_bert_loss(x[None], x.expand(2, 2, 3), emd="class_aware", problem_type=MULTI),
            "class_aware",
        ),
    ],
)
def test_wrong_input_is_named(call: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(torch.zeros(2, 3))


@pytest.mark.parametrize("scope", ["example", "batch"])
@pytest.mark.parametrize("weighting", ["paper", "normalised", "inverse"])
@pytest.mark.parametrize("temperature", [1.0, 1e6])
def test_an_exit_has_no_part_in_its_own_mixture(weighting: str, scope: str, temperature: float) -> None:
    exits, teacher = _logits(3, 5, 4), _logits(5, 4, seed=1)
    layers = torch.cat([exits, teacher[None]])
    how = {"weighting": weighting, "scope": scope, "weighting_temperature": temperature}
    targets = ms_bert_targets(layers, exits, own_layers=True, **how)
    for index in range(3):
        others = torch.cat([layers[:index], layers[index + 1 :]])
        (expected,) = ms_bert_targets(others, exits[index : index + 1], **how)
        torch.testing.assert_close(targets[index], expected)


def test_targets_are_mixed_in_full_precision() -> None:
    layers, exits = 100 * _logits(4, 6, 3).float(), 100 * _logits(2, 6, 3, seed=1).float()
    layers, exits = layers.bfloat16(), exits.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        targets = ms_bert_targets(layers, exits, weighting="paper")
    assert targets.dtype == torch.float32
    torch.testing.assert_close(
        targets, ms_bert_targets(layers.double(), exits.double(), weighting="paper").float()
    )


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
def test_fastbert_loss_is_the_divergence_of_each_exit(problem_type: str) -> None:
    exits, teacher = _logits(4, 5, 3).requires_grad_(), _logits(5, 3, seed=1).requires_grad_()
    losses = fastbert_loss(exits, teacher, kl="teacher||student", problem_type=problem_type, temperature=2.0)
    expected = [
        distillation_divergence(e, teacher, problem_type, direction="teacher||student", temperature=2.0)
        for e in exits
    ]
    torch.testing.assert_close(losses, torch.stack(expected))
    losses.sum().backward()
    assert teacher.grad is None


@pytest.mark.parametrize("emd", EMD_FUNCTIONS)
@pytest.mark.parametrize("weighting", ["paper", "normalised", "inverse"])
def test_targets_equal_a_loop_over_the_equations(emd: str, weighting: str) -> None:
    layers, exits = _logits(5, 3, 4), _logits(2, 3, 4, seed=1)
    targets = ms_bert_targets(layers, exits, emd=emd, weighting=weighting, teacher_weight=0.5)
    assert targets.shape == exits.shape
    for j in range(2):
        for row in range(3):
            distances = torch.stack([EMD_FUNCTIONS[emd](layers[i, row], exits[j, row]) for i in range(4)])
            weights = {
                "paper": distances,
                "normalised": distances / distances.sum(),
                "inverse": (1 / distances) / (1 / distances).sum(),
            }[weighting]
            expected = sum(weights[i] * layers[i, row] for i in range(4)) + 0.5 * layers[4, row]
            torch.testing.assert_close(targets[j, row], expected / (1 if weighting == "paper" else 1.5))


def test_distances_by_batch_and_on_probabilities() -> None:
    layers, exits = _logits(4, 3, 5), _logits(2, 3, 5, seed=1)
    batch = layer_distances(layers, exits, scope="batch")
    assert batch.shape == (4, 2, 3)
    torch.testing.assert_close(batch[2, 1, 0], sorted_emd(layers[2].flatten(), exits[1].flatten()))
    assert (batch == batch[..., :1]).all()
    probabilities = layer_distances(layers, exits, values="probabilities")
    torch.testing.assert_close(probabilities[2, 1], sorted_emd(layers[2].softmax(-1), exits[1].softmax(-1)))
    cost = 1 - torch.eye(5, dtype=torch.float64)
    aware = layer_distances(layers, exits, emd="class_aware", ground_cost=cost)
    torch.testing.assert_close(aware[2, 1], class_aware_emd(layers[2], exits[1]), atol=5e-3, rtol=0)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(0, 100), min_size=1, max_size=8),
    st.sampled_from(["normalised", "inverse"]),
    st.floats(0.1, 10),
)
def test_normalised_weights_sum_to_one_and_follow_the_distances(
    distances: list[float], weighting: str, temperature: float
) -> None:
    values = torch.tensor(distances, dtype=torch.float64)
    weights = layer_weights(values, weighting, temperature)
    assert weights.sum() == pytest.approx(1)
    order = values.argsort(descending=weighting == "inverse")
    assert (weights[order].diff() >= -1e-12).all()


@pytest.mark.parametrize("weighting", ["normalised", "inverse"])
def test_zero_distances_keep_the_target_finite(weighting: str) -> None:
    torch.testing.assert_close(layer_weights(torch.zeros(4), weighting), torch.full((4,), 0.25))
    weights = layer_weights(torch.tensor([0.0, 1.0, 0.0, 3.0]), weighting)
    expected = [0.0, 0.25, 0.0, 0.75] if weighting == "normalised" else [0.5, 0.0, 0.5, 0.0]
    torch.testing.assert_close(weights, torch.tensor(expected))


@pytest.mark.parametrize("weighting", ["normalised", "inverse"])
def test_equal_layers_give_the_teacher_back(weighting: str) -> None:
    teacher, exits = _logits(3, 4), _logits(2, 3, 4, seed=1)
    targets = ms_bert_targets(
        teacher.expand(6, 3, 4), exits, weighting=weighting, teacher_weight=0.7, values="probabilities"
    )
    torch.testing.assert_close(targets, teacher.expand(2, 3, 4))


def test_the_papers_targets_collapse_as_layers_grow_and_normalised_ones_do_not() -> None:
    def entropy(layers: int, weighting: str) -> float:
        teacher = _logits(32, 5) / 3
        targets = ms_bert_targets(teacher.expand(layers, 32, 5), 0 * teacher[None], weighting=weighting)
        return float(Categorical(logits=targets).entropy().mean())

    collapsing = [entropy(layers, "paper") for layers in (2, 6, 12, 24)]
    assert collapsing == sorted(collapsing, reverse=True)
    assert collapsing[-1] < 0.25 * collapsing[0]
    assert entropy(24, "normalised") == pytest.approx(entropy(2, "normalised"))


@pytest.mark.parametrize("emd", EMD_FUNCTIONS)
def test_no_gradient_flows_through_the_distances(emd: str) -> None:
    layers, exits = _logits(5, 3, 4).requires_grad_(), _logits(2, 3, 4, seed=1).requires_grad_()
    ms_bert_loss(exits, layers, emd=emd, weighting="inverse").sum().backward()
    assert layers.grad is None

    constant = ms_bert_targets(layers.detach(), exits.detach(), emd=emd, weighting="inverse")
    again = exits.detach().clone().requires_grad_()
    kl_divergence(again, constant, reduction="none").mean(-1).sum().backward()
    torch.testing.assert_close(exits.grad, again.grad)


def test_ms_bert_loss_is_the_divergence_from_each_exits_own_target() -> None:
    layers, exits = _logits(5, 3, 4), _logits(2, 3, 4, seed=1)
    losses = ms_bert_loss(exits, layers, kl="symmetric", temperature=2.0, weighting="normalised")
    targets = ms_bert_targets(layers, exits, weighting="normalised")
    expected = [kl_divergence(e, t, "symmetric", 2.0) for e, t in zip(exits, targets, strict=True)]
    torch.testing.assert_close(losses, torch.stack(expected))


def test_ms_bert_loss_for_several_labels_and_regression() -> None:
    layers, exits = _logits(5, 3, 4), _logits(2, 3, 4, seed=1)
    targets = ms_bert_targets(layers, exits)
    expected = reference_kl(Bernoulli(logits=exits), Bernoulli(logits=targets)).mean(-1).mean(-1)
    torch.testing.assert_close(ms_bert_loss(exits, layers, problem_type=MULTI), expected)

    values = torch.tensor([0.0, 3.0, 2.0])[:, None, None]
    exit_value = torch.tensor([[[1.0]]])
    # Distances 1 and 2: the layers' mixture is (2·0 + 1·3) / 3 = 1, the target (1 + 2) / 2.
    loss = ms_bert_loss(exit_value, values, weighting="inverse", problem_type=REGRESSION)
    torch.testing.assert_close(loss, torch.tensor([0.25]))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_soft_cross_entropy_equals_its_equation(temperature: float) -> None:
    student, teacher = _logits(5, 4), _logits(5, 4, seed=1)
    expected = functional.cross_entropy(student / temperature, (teacher / temperature).softmax(-1))
    value = soft_cross_entropy(student, teacher, SINGLE, temperature)
    torch.testing.assert_close(value, temperature**2 * expected)

    expected = functional.binary_cross_entropy_with_logits(
        student / temperature, (teacher / temperature).sigmoid(), reduction="none"
    ).mean(-1)
    value = soft_cross_entropy(student, teacher, MULTI, temperature, "none")
    torch.testing.assert_close(value, temperature**2 * expected)

    value = soft_cross_entropy(student, teacher, REGRESSION, temperature)
    torch.testing.assert_close(value, functional.mse_loss(student, teacher))


@pytest.mark.parametrize("problem_type", [SINGLE, MULTI])
def test_soft_cross_entropy_has_the_gradient_of_the_teacher_first_divergence(problem_type: str) -> None:
    student, teacher = _logits(5, 4).requires_grad_(), _logits(5, 4, seed=1)
    cross_entropy = soft_cross_entropy(student, teacher, problem_type, 3.0)
    divergence = distillation_divergence(
        student, teacher, problem_type, direction="teacher||student", temperature=3.0
    )
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (cross_entropy, divergence)]
    torch.testing.assert_close(*gradients)
    assert torch.autograd.gradcheck(lambda s: soft_cross_entropy(s, teacher, problem_type, 3.0), (student,))


def test_squared_temperature_keeps_the_gradient_of_soft_cross_entropy() -> None:
    # For small logits the gradient is (z_S − z_T) / classes at any T (Hinton et al., 2015).
    student, teacher = (1e-5 * (x - x.mean(-1, keepdim=True)) for x in (_logits(1, 4), _logits(1, 4, seed=1)))
    student.requires_grad_()
    for temperature in (1.0, 10.0, 100.0):
        loss = soft_cross_entropy(student, teacher, SINGLE, temperature)
        (gradient,) = torch.autograd.grad(loss, student)
        torch.testing.assert_close(gradient, (student - teacher).detach() / 4, rtol=1e-2, atol=1e-9)


@pytest.mark.parametrize(("classes", "right"), [(2, 0.713), (3, 0.554)])
def test_softened_labels_are_label_smoothing(classes: int, right: float) -> None:
    logits, labels = _logits(6, classes), torch.arange(6) % classes
    targets = torch.full((6, classes), (1 - right) / (classes - 1), dtype=torch.float64)
    targets[torch.arange(6), labels] = right
    expected = -(targets * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(softened_label_loss(logits, labels, SINGLE), expected, rtol=1e-2, atol=0)
    # τ → 0 is the plain loss.
    torch.testing.assert_close(
        softened_label_loss(logits, labels, SINGLE, 1e-3), task_loss(logits, labels, SINGLE)
    )
    half = softened_label_loss(logits.half(), labels, SINGLE)
    assert half.dtype == torch.float32


def test_masked_language_modelling_loss_is_over_the_tokens_to_guess() -> None:
    logits = _logits(3, 5, 7).requires_grad_()
    labels = torch.full((3, 5), -100)
    labels[0, 1], labels[0, 4], labels[2, 0] = 3, 0, 6
    expected = (
        -sum(logits.log_softmax(-1)[b, i, label] for b, i, label in [(0, 1, 3), (0, 4, 0), (2, 0, 6)]) / 3
    )
    torch.testing.assert_close(masked_language_modelling_loss(logits, labels), expected)
    assert masked_language_modelling_loss(logits.half(), labels).dtype == torch.float32

    nothing = masked_language_modelling_loss(logits, torch.full((3, 5), -100))
    assert nothing == 0
    (gradient,) = torch.autograd.grad(nothing, logits)
    assert (gradient == 0).all()


def test_refusals_of_soft_and_token_losses() -> None:
    logits = _logits(4, 3)
    with pytest.raises(InputError, match="use the plain loss against labels"):
        softened_label_loss(logits, torch.zeros(4, 3), MULTI)
    with pytest.raises(InputError, match="do not fit"):
        softened_label_loss(logits, torch.zeros(4, 3), SINGLE)
    with pytest.raises(InputError, match="greater than 0"):
        softened_label_loss(logits, torch.zeros(4), SINGLE, 0)
    with pytest.raises(InputError, match="greater than 0"):
        soft_cross_entropy(logits, logits, SINGLE, 0)
    with pytest.raises(InputError, match="problem_type"):
        soft_cross_entropy(logits, logits, "ranking")
    with pytest.raises(InputError, match="choose one of mean, none"):
        soft_cross_entropy(logits, logits, SINGLE, 1.0, "sum")
    with pytest.raises(InputError, match="do not fit"):
        masked_language_modelling_loss(_logits(2, 4, 3), torch.zeros(2, 3))
