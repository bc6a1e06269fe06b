"""Where exits stand, and the classifiers that stand there."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from alembert.common.errors import InputError
from alembert.models.exit_heads import EXIT_HEADS, FastBertHead, build_exit_head
from alembert.models.placement import exit_layers


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({}, (1, 3, 5, 7, 9, 11)),
        ({"placement": "every_k", "k": 2}, (1, 3, 5, 7, 9, 11)),
        ({"placement": "every_k", "k": 5}, (1, 6, 11)),
        ({"placement": "every_k", "k": 11}, (1,)),
        ({"placement": "last_k"}, (6, 7, 8, 9, 10, 11)),
        ({"placement": "last_k", "k": 1}, (11,)),
        ({"placement": "last_k", "k": 11}, tuple(range(1, 12))),
        ({"placement": "all"}, tuple(range(1, 12))),
        ({"layers": [7, 2, 7]}, (2, 7)),
    ],
)
def test_exits_of_twelve_layers(options: dict[str, object], layers: tuple[int, ...]) -> None:
    assert exit_layers(12, **options) == layers  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("num_layers", "options", "words"),
    [
        (12, {"placement": "some"}, "some"),
        (12, {"placement": "every_k", "k": 0}, "between 1 and 11"),
        (12, {"placement": "last_k", "k": 12}, "between 1 and 11"),
        (12, {"layers": [0, 3]}, "between 1 and 11"),
        (12, {"layers": [12]}, "between 1 and 11"),
        (12, {"layers": []}, "between 1 and 11"),
        (1, {}, "no room"),
    ],
)
def test_exits_that_cannot_be(num_layers: int, options: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        exit_layers(num_layers, **options)  # type: ignore[arg-type]


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(4, 7, 24, generator=generator, dtype=dtype)
    lengths = torch.tensor([7, 3, 1, 5])
    return hidden_states, (torch.arange(7) < lengths[:, None]).long()


def slow_fastbert_logits(head: FastBertHead, tokens: Tensor) -> Tensor:
    """One text without padding: every token attends, head by head, and the first token is taken at the end."""
    projected = torch.tanh(tokens @ head.input_projection.weight.T + head.input_projection.bias)
    queries, keys, values = (
        projected @ layer.weight.T + layer.bias for layer in (head.query, head.key, head.value)
    )
    width = projected.shape[1] // head.num_heads
    contexts = []
    for number in range(head.num_heads):
        part = slice(number * width, (number + 1) * width)
        scores = queries[:, part] @ keys[:, part].T / math.sqrt(width)
        contexts.append(torch.exp(scores) / torch.exp(scores).sum(1, keepdim=True) @ values[:, part])
    attended = torch.cat(contexts, dim=1) @ head.output.weight.T + head.output.bias
    dense = torch.tanh(attended[0] @ head.dense.weight.T + head.dense.bias)
    return dense @ head.classifier.weight.T + head.classifier.bias


def test_fastbert_head_equals_a_slow_computation() -> None:
    hidden_states, mask = batch(torch.float64)
    head = FastBertHead(24, 3, head_size=16).double()
    logits = head(hidden_states, mask)
    expected = [
        slow_fastbert_logits(head, row[: int(length)])
        for row, length in zip(hidden_states, mask.sum(1), strict=True)
    ]
    torch.testing.assert_close(logits, torch.stack(expected), rtol=0, atol=1e-12)


def test_pooled_and_linear_heads_equal_their_formulas() -> None:
    hidden_states, mask = batch()
    pooled, linear = build_exit_head("pooled", 24, 3), build_exit_head("linear", 24, 3)
    first = hidden_states[:, 0]
    dense = torch.tanh(first @ pooled.dense.weight.T + pooled.dense.bias)
    torch.testing.assert_close(
        pooled(hidden_states, mask), dense @ pooled.classifier.weight.T + pooled.classifier.bias
    )
    torch.testing.assert_close(
        linear(hidden_states, mask), first @ linear.classifier.weight.T + linear.classifier.bias
    )


def test_mean_head_reads_the_tokens_alone() -> None:
    hidden_states, mask = batch()
    head = build_exit_head("mean", 24, 3)
    means = torch.stack(
        [row[: int(length)].mean(0) for row, length in zip(hidden_states, mask.sum(1), strict=True)]
    )
    torch.testing.assert_close(
        head(hidden_states, mask), means @ head.classifier.weight.T + head.classifier.bias
    )


@pytest.mark.parametrize("kind", EXIT_HEADS)
def test_padding_does_not_change_logits(kind: str) -> None:
    hidden_states, mask = batch()
    head = build_exit_head(kind, 24, 3, 16)
    garbage = hidden_states + 100 * (1 - mask)[..., None]
    torch.testing.assert_close(head(garbage, mask), head(hidden_states, mask), rtol=0, atol=1e-6)
    for row, length in enumerate(mask.sum(1)):
        alone = head(hidden_states[row : row + 1, : int(length)], mask[row : row + 1, : int(length)])
        torch.testing.assert_close(head(hidden_states, mask)[row], alone[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", EXIT_HEADS)
def test_gradients_are_the_numeric_ones(kind: str) -> None:
    hidden_states, mask = batch(torch.float64)
    head = build_exit_head(kind, 24, 2, 4).double()
    inputs = hidden_states[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda hidden: head(hidden, mask[:2]), inputs)
    parameter = head.classifier.weight
    head(hidden_states, mask).square().sum().backward()
    step, analytic = 1e-6, parameter.grad[0, 0].item()
    with torch.no_grad():
        parameter[0, 0] += step
        above = head(hidden_states, mask).square().sum()
        parameter[0, 0] -= 2 * step
        below = head(hidden_states, mask).square().sum()
    assert (above - below).item() / (2 * step) == pytest.approx(analytic, rel=1e-5)


def test_wrong_heads_are_refused() -> None:
    with pytest.raises(InputError, match="choose one of fastbert, pooled, linear"):
        build_exit_head("mlp", 24, 3)
    with pytest.raises(InputError, match="not a multiple"):
        build_exit_head("fastbert", 24, 3, head_size=15)
