"""What can be read out of an encoder's forward pass, and how it is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

ATTENTION_FEATURES = ("attention_scores", "attention_probabilities", "queries", "keys", "values")
LAYER_FEATURES = ("hidden_states", *ATTENTION_FEATURES)


@dataclass(frozen=True)
class FeatureRequest:
    """The features wanted of a model, each for chosen layers; logits are always there.

    Attributes:
        hidden_states: layers 0 … N; 0 is the embedding output, which layer 1 reads.
        attention_scores: layers 1 … N; before mask and softmax.
        attention_probabilities: layers 1 … N; after mask and softmax, before dropout.
        queries, keys, values: layers 1 … N; split into heads.
    """

    hidden_states: tuple[int, ...] = ()
    attention_scores: tuple[int, ...] = ()
    attention_probabilities: tuple[int, ...] = ()
    queries: tuple[int, ...] = ()
    keys: tuple[int, ...] = ()
    values: tuple[int, ...] = ()

    def __or__(self, other: FeatureRequest) -> FeatureRequest:
        """Everything that either asks for."""
        return FeatureRequest(
            **{
                item.name: tuple(sorted({*getattr(self, item.name), *getattr(other, item.name)}))
                for item in fields(self)
            }
        )

    def __bool__(self) -> bool:
        return any(getattr(self, item.name) for item in fields(self))


@dataclass
class Features:
    """What a forward pass gave; B rows, n tokens, h heads.

    Attributes:
        attention_mask: (B, n) int64, 1 = token.
        logits: (B, labels); (B, n, vocabulary) of a masked language model; None of a bare encoder.
        hidden_states: by layer, (B, n, width).
        attention_scores: by layer, (B, h, n, n): query · key × scaling, with the family's position bias where it has
            one, before the padding mask is added.
        attention_probabilities: by layer, (B, h, n, n), before dropout.
        queries, keys, values: by layer, (B, h, n, width of a head).
        output: the model's own output object; None where features come from a cache.
    """

    attention_mask: Tensor
    logits: Tensor | None = None
    hidden_states: dict[int, Tensor] = field(default_factory=dict)
    attention_scores: dict[int, Tensor] = field(default_factory=dict)
    attention_probabilities: dict[int, Tensor] = field(default_factory=dict)
    queries: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    output: Any = None
