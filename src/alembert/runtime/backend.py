"""What runs a classifier, and what the classifier must know of it. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from alembert.common.facts import ClassifierFacts
from alembert.runtime.exited import ExitedBatch, ExitedText
from alembert.runtime.policies import ExitPolicy
from alembert.runtime.tokenization import TextEncoder


class Backend(Protocol):
    """Runs padded batches.

    Attributes:
        exit_layers: layers of the student exits that are used, ascending.
        num_layers: N; the full model answers after it.
    """

    exit_layers: tuple[int, ...]
    num_layers: int

    def run(self, batch: dict[str, np.ndarray], policy: ExitPolicy, speed: float) -> ExitedBatch:
        """Runs one padded batch: after each exit the rows with uncertainty < speed leave.

        Args:
            batch: input_ids, attention_mask and, for families that have them, token_type_ids; (rows, tokens) int64.
            policy: resolved for the model's labels.
            speed: in [0, 1]; at 0 no row can leave, so no exit is run and the full model answers.
        """
        ...


@runtime_checkable
class SingleTextBackend(Protocol):
    """A backend with a way of its own for a text that comes alone."""

    def run_alone(self, batch: dict[str, np.ndarray], policy: ExitPolicy, speed: float) -> ExitedText:
        """As `Backend.run`, for a batch of one row."""
        ...


@runtime_checkable
class SteppedBackend(Protocol):
    """A backend that can stop between exits, so that rows of several batches can go on as one batch.

    What it gives for rows on their way has `positions` (rows,) int64, where they stand in the input, `segment`, the
    number of the segment that they run next, from 0, and `tokens`, the length to which they are padded.
    """

    def start(self, batch: dict[str, np.ndarray], positions: np.ndarray) -> Any:
        """The rows of a padded batch before the first segment; `positions` (rows,) int64 go with them."""
        ...

    def advance(
        self, rows: Any, policy: ExitPolicy, speed: float
    ) -> tuple[tuple[np.ndarray, ExitedBatch] | None, Any | None]:
        """Runs one segment; returns who left (positions, answers) and who goes on, None for nobody."""
        ...

    def merge(self, parts: Sequence[Any]) -> Any:
        """Rows that wait for the same segment as one batch, padded to the longest."""
        ...


@dataclass(frozen=True)
class OpenedClassifier:
    """A model ready to run, and its own defaults.

    Attributes:
        backend: what runs it.
        encoder: its tokenizer.
        facts: problem type and label names.
        max_length: texts are cut to this many tokens.
        is_pair: whether inputs are pairs of texts; None = either.
        speed, policy, top_k: the model's own defaults; None where it has none.
        tokenizer: the tokenizer as its library gives it.
    """

    backend: Backend
    encoder: TextEncoder
    facts: ClassifierFacts
    max_length: int
    is_pair: bool | None
    speed: float | None
    policy: str | None
    top_k: int | None
    tokenizer: Any
