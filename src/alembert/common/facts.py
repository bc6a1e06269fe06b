"""What data for a classifier must fit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ClassifierFacts:
    """What data for a classifier must fit: its problem type and, in the order of its logits, its label names."""

    problem_type: str
    label_names: tuple[str, ...]
