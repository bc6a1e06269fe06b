"""Classifiers that stand after a layer: FastBERT's, BERT's pooled one, and linear ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from alembert.common.errors import InputError


class ExitHead(nn.Module, ABC):
    """Maps a layer's hidden states to logits.

    Input: `hidden_states` (rows, tokens, hidden) and `attention_mask` (rows, tokens), 1 = token.
    Output: logits (rows, labels).

    Attributes:
        kind: its name, one of `EXIT_HEADS`.
        reads_all_tokens: whether it needs the mask; else it reads the first token alone.
    """

    kind: ClassVar[str]
    reads_all_tokens: ClassVar[bool] = False

    @abstractmethod
    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits (rows, labels)."""


class FastBertHead(ExitHead):
    """FastBERT's classifier (Liu et al., ACL 2020, section 3.1 and Table 1).

    Linear to `head_size` and tanh; masked self-attention with output projection and no residual; first
    token; Linear and tanh; Linear to the labels. Only the first token is read after the attention, so
    only its query is computed.
    """

    kind = "fastbert"
    reads_all_tokens = True

    def __init__(self, hidden_size: int, num_labels: int, head_size: int = 128, num_heads: int = 2) -> None:
        super().__init__()
        if head_size % num_heads:
            raise InputError(
                f"exit head size {head_size} is not a multiple of its {num_heads} attention heads"
            )
        self.num_heads = num_heads
        self.input_projection = nn.Linear(hidden_size, head_size)
        self.query = nn.Linear(head_size, head_size)
        self.key = nn.Linear(head_size, head_size)
        self.value = nn.Linear(head_size, head_size)
        self.output = nn.Linear(head_size, head_size)
        self.dense = nn.Linear(head_size, head_size)
        self.classifier = nn.Linear(head_size, num_labels)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        projected = torch.tanh(self.input_projection(hidden_states))
        context = functional.scaled_dot_product_attention(
            self._split(self.query(projected[:, :1])),
            self._split(self.key(projected)),
            self._split(self.value(projected)),
            attn_mask=attention_mask[:, None, None, :].bool(),
        )
        first_token = self.output(context.transpose(1, 2).flatten(2))[:, 0]
        return self.classifier(torch.tanh(self.dense(first_token)))  # type: ignore[no-any-return]

    def _split(self, tokens: Tensor) -> Tensor:
        rows, length, width = tokens.shape
        return tokens.view(rows, length, self.num_heads, width // self.num_heads).transpose(1, 2)


class PooledHead(ExitHead):
    """First token, Linear, tanh, Linear: BERT's pooler and classifier, as in DeeBERT (Xin et al., ACL 2020)."""

    kind = "pooled"

    def __init__(self, hidden_size: int, num_labels: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.classifier = nn.Linear(hidden_size, num_labels)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        return self.classifier(torch.tanh(self.dense(hidden_states[:, 0])))  # type: ignore[no-any-return]


class LinearHead(ExitHead):
    """First token, Linear: one layer, as in PABEE (Zhou et al., NeurIPS 2020)."""

    kind = "linear"

    def __init__(self, hidden_size: int, num_labels: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(hidden_size, num_labels)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        return self.classifier(hidden_states[:, 0])  # type: ignore[no-any-return]


class MeanHead(ExitHead):
    """Mean over the text's tokens, Linear: what sentence encoders are read by (Reimers and Gurevych, EMNLP 2019).

    Where early layers have not yet brought a text together in its first token, the mean has all of it.
    """

    kind = "mean"
    reads_all_tokens = True

    def __init__(self, hidden_size: int, num_labels: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(hidden_size, num_labels)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        weights = attention_mask.to(hidden_states.dtype)
        weights = weights / weights.sum(dim=1, keepdim=True)
        mean = torch.bmm(weights[:, None], hidden_states)[:, 0]
        return self.classifier(mean)  # type: ignore[no-any-return]


EXIT_HEADS: tuple[str, ...] = ("fastbert", "pooled", "linear", "mean")


def build_exit_head(kind: str, hidden_size: int, num_labels: int, head_size: int = 128) -> ExitHead:
    """Makes a head of `kind` (one of `EXIT_HEADS`); `head_size` is the FastBERT head's inner width."""
    if kind == "fastbert":
        return FastBertHead(hidden_size, num_labels, head_size)
    if kind == "pooled":
        return PooledHead(hidden_size, num_labels)
    if kind == "linear":
        return LinearHead(hidden_size, num_labels)
    if kind == "mean":
        return MeanHead(hidden_size, num_labels)
    raise InputError(f"unknown exit head {kind!r}: choose one of {', '.join(EXIT_HEADS)}")
