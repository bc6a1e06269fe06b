"""What a batch came to once every row has left. NumPy alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from alembert.runtime.policies import MULTI_LABEL, SINGLE_LABEL


@dataclass(frozen=True)
class ExitedBatch:
    """What a batch came to, rows in their order.

    Attributes:
        probabilities: (rows, labels) float32; softmax, sigmoid, or the value itself for regression.
        exit_layers: (rows,) int64, the layer each row left after.
        uncertainties: (rows,) float32, the policy's at the exit taken; NaN where the full model answered.
    """

    probabilities: np.ndarray
    exit_layers: np.ndarray
    uncertainties: np.ndarray

    def alone(self) -> ExitedText:
        """The one row that there is."""
        return ExitedText(
            self.probabilities[0].tolist(), int(self.exit_layers[0]), float(self.uncertainties[0])
        )


class ExitedText(NamedTuple):
    """What a text that came alone came to: numbers of Python, for NumPy takes long over a few of them."""

    probabilities: list[float]
    """One for each label; softmax, sigmoid, or the value itself for regression."""
    exit_layer: int
    """The layer it left after."""
    uncertainty: float
    """The policy's, at the exit taken; NaN where the full model answered."""

    def as_batch(self) -> ExitedBatch:
        """The same as a batch of one row."""
        return ExitedBatch(
            np.array([self.probabilities], np.float32),
            np.array([self.exit_layer]),
            np.array([self.uncertainty], np.float32),
        )


def join(parts: Sequence[tuple[np.ndarray, ExitedBatch]]) -> ExitedBatch:
    """Parts put together in the order of their positions.

    Args:
        parts: positions (rows,) and what these rows came to; together the positions are 0 … n − 1.
    """
    if len(parts) == 1 and len(parts[0][0]) == 1:
        return parts[0][1]
    order = np.concatenate([positions for positions, _ in parts]).argsort()
    return ExitedBatch(
        np.concatenate([exited.probabilities for _, exited in parts])[order],
        np.concatenate([exited.exit_layers for _, exited in parts])[order],
        np.concatenate([exited.uncertainties for _, exited in parts])[order],
    )


def array_probabilities(logits: np.ndarray, problem_type: str) -> np.ndarray:
    """Softmax, sigmoid, or the value itself for regression: (rows, labels) float32 → (rows, labels) float32."""
    if problem_type == SINGLE_LABEL:
        powers: np.ndarray = np.exp(logits - logits.max(axis=-1, keepdims=True))
        shares: np.ndarray = powers / powers.sum(axis=-1, keepdims=True)
        return shares
    return sigmoid(logits) if problem_type == MULTI_LABEL else logits


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + e^−x), without overflow: any shape, float32 → float32."""
    small = np.exp(-np.abs(logits))
    values: np.ndarray = np.where(logits >= 0, 1 / (1 + small), small / (1 + small))
    return values
