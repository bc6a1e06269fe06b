"""Multiply-accumulates (MACs) and floating-point operations (FLOPs = 2 · MACs) per text, in two conventions.

"paper" is what FastBERT, MS-BERT and BERT-EMD print: linear layers only, those of the encoder layers and of
FastBERT heads on every token, no attention products, no embeddings, and no final projection to the labels.

"full" counts every matrix product that a text causes: linear layers wherever they run, attention products,
embedding projections, and heads as they are computed here (a FastBERT head computes the query and the output
of the first token only). Neither counts biases, normalisation, activations or softmax.

In both, an LSTM's input and recurrent matrices are linear layers that every token goes through: 4h · (e + h) per
token and direction, for input width e and state width h. Its gates' products of single numbers do not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import nn
from transformers import PreTrainedModel

from alembert.common.errors import InputError
from alembert.models.bilstm import BilstmForSequenceClassification
from alembert.models.layered import LayeredEncoder
from alembert.models.multi_exit import MultiExitModel

Convention = Literal["paper", "full"]
CONVENTIONS: tuple[str, ...] = get_args(Convention)
FLOPS_PER_MAC = 2
"""One multiplication and one addition; FastBERT prints FLOPs, MS-BERT and BERT-EMD print MACs."""

_QUERY_PROJECTIONS = {"query": 1, "q": 1, "q_lin": 1, "query_proj": 1, "Wqkv": 3}
"""Names of the families' query projections, and how many times the attention's width they put out."""


def layer_macs(length: int, hidden_size: int, intermediate_size: int) -> int:
    """MACs of one encoder layer in the paper convention: length · (4 d² + 2 d · d_ff) (FastBERT, Table 1)."""
    return length * (4 * hidden_size**2 + 2 * hidden_size * intermediate_size)


def fastbert_head_macs(length: int, hidden_size: int, head_size: int = 128) -> int:
    """MACs of one FastBERT head in the paper convention: length · (d · h + 4 h²) + h².

    FastBERT's Table 1 charges the last Linear(h → h) to every token; its code, and so this, to the first.
    """
    return _fastbert_head_paper(hidden_size, head_size).at_length(length)


class Polynomial(NamedTuple):
    """MACs as a function of a text's length in tokens, exact because no part grows faster than its square."""

    constant: int = 0
    per_token: int = 0
    per_token_squared: int = 0

    def at(self, lengths: NDArray[np.float64]) -> NDArray[np.float64]:
        """MACs for each length."""
        return self.constant + lengths * (self.per_token + lengths * self.per_token_squared)

    def at_length(self, length: int) -> int:
        """MACs for one length, as an exact integer."""
        return self.constant + length * (self.per_token + length * self.per_token_squared)


@dataclass(frozen=True)
class PartCost:
    """MACs of one part of a model in both conventions; `kind` names what it is, such as "fastbert"."""

    kind: str
    paper: Polynomial
    full: Polynomial


@dataclass(frozen=True)
class CostModel:
    """What a text costs in a model with exits, by the layer after which it leaves.

    Attention products are counted over the whole text, as eager and SDPA attention compute them, also where
    ModernBERT masks all but a window. Left out of "full": DeBERTa's projection of its position embeddings,
    made once per batch and layer whatever the texts; the convolution of DeBERTa-v2's largest checkpoints;
    the learned policy's Linear(d → 1) per exit.
    """

    embedding: PartCost
    layers: tuple[PartCost, ...]
    final_head: PartCost
    exit_heads: Mapping[int, PartCost] = field(default_factory=dict)
    """By layer, ascending; without the full model's head."""

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> CostModel:
        """Reads the costs off a model's modules.

        Args:
            model: a `MultiExitModel`, a BiLSTM, or any transformers model that `LayeredEncoder` takes, which has
                no exits, and no head either if it is a base encoder.

        Raises:
            InputError: the model's family is not supported.
        """
        if isinstance(model, BilstmForSequenceClassification):
            return cls._from_bilstm(model)
        if not isinstance(model, MultiExitModel):
            return cls._from_full_model(model)
        plain = cls._from_full_model(model.full_model)
        heads = {layer: _exit_head(model.exit_heads[str(layer)]) for layer in model.exit_layers}
        final = plain.final_head if model.final_head is None else _exit_head(model.final_head)
        return cls(plain.embedding, plain.layers, final, heads)

    @classmethod
    def _from_full_model(cls, model: PreTrainedModel) -> CostModel:
        layered = LayeredEncoder(model)
        layers = [layered.layer(index) for index in range(1, layered.num_layers + 1)]
        inside_layers = {id(module) for layer in layers for module in layer.modules()}
        outside = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and id(module) not in inside_layers
        }
        embedding = sum(_size(module) for name, module in outside.items() if "embed" in name)
        head = []
        if model.base_model is not model:
            head = [_size(module) for name, module in outside.items() if "embed" not in name]
        return cls(
            PartCost("embedding", Polynomial(), Polynomial(per_token=embedding)),
            tuple(_layer(layer) for layer in layers),
            PartCost("stock", Polynomial(sum(head[:-1])), Polynomial(sum(head))),
        )

    @classmethod
    def _from_bilstm(cls, model: BilstmForSequenceClassification) -> CostModel:
        dense, classifier = _size(model.dense), _size(model.classifier)
        return cls(
            PartCost("embedding", Polynomial(), Polynomial()),
            tuple(_lstm_layer(model.lstm, layer) for layer in range(model.lstm.num_layers)),
            PartCost("stock", Polynomial(dense), Polynomial(dense + classifier)),
        )

    @property
    def num_layers(self) -> int:
        """N, the number of layers; also the exit of the full model's head."""
        return len(self.layers)

    def macs(
        self,
        exit_layers: ArrayLike,
        lengths: ArrayLike,
        convention: Convention = "paper",
        *,
        active_exits: Iterable[int] | None = None,
        fixed_length: int | None = None,
    ) -> NDArray[np.float64]:
        """MACs per text: layers up to the exit and every active exit's head up to it.

        Args:
            exit_layers: integers, the layer after which each text leaves; N is the full model's head.
            lengths: integers, tokens of each text, broadcast against `exit_layers`.
            convention: "paper" or "full".
            active_exits: the exits whose heads run; default all. Speed 0 runs none: `()`.
            fixed_length: replaces `lengths`, as in the papers, which pad every text to one length.

        Returns:
            float64 array of the broadcast shape.

        Raises:
            InputError: unknown convention; an exit that the model does not have or that is not active.
        """
        if convention not in CONVENTIONS:
            raise InputError(
                f"Unknown FLOPs convention {convention!r}: choose one of {', '.join(CONVENTIONS)}."
            )
        active = set(self.exit_heads if active_exits is None else active_exits)
        self._check_exits(active, self.exit_heads)
        self._check_exits(np.unique(np.asarray(exit_layers)).tolist(), active | {self.num_layers})
        left, tokens = np.broadcast_arrays(np.asarray(exit_layers), np.asarray(lengths, np.float64))
        if fixed_length is not None:
            tokens = np.full_like(tokens, fixed_length)

        def cost(part: PartCost) -> NDArray[np.float64]:
            return (part.paper if convention == "paper" else part.full).at(tokens)

        total = cost(self.embedding)
        for layer, part in enumerate(self.layers, start=1):
            total = total + np.where(left >= layer, cost(part), 0.0)
        for layer in active:
            total = total + np.where(left >= layer, cost(self.exit_heads[layer]), 0.0)
        return total + np.where(left == self.num_layers, cost(self.final_head), 0.0)

    def full_model_macs(
        self, lengths: ArrayLike, convention: Convention = "paper", *, fixed_length: int | None = None
    ) -> NDArray[np.float64]:
        """MACs per text of all layers and the final head alone: speed 0, and the base of every speed-up."""
        return self.macs(self.num_layers, lengths, convention, active_exits=(), fixed_length=fixed_length)

    def table(self, length: int, convention: Convention = "paper") -> list[dict[str, Any]]:
        """One row per exit for a text of `length` tokens that leaves there, with every exit active.

        Keys: "layer", "head" (its kind), "macs", "flops", "speedup" (MACs of the full model without exits
        over `macs`; just below 1 at the last exit, which pays for all heads before it).
        """
        full = float(self.full_model_macs(length, convention))
        heads = {**self.exit_heads, self.num_layers: self.final_head}
        macs = {layer: float(self.macs(layer, length, convention)) for layer in heads}
        return [
            {
                "layer": layer,
                "head": head.kind,
                "macs": macs[layer],
                "flops": FLOPS_PER_MAC * macs[layer],
                "speedup": full / macs[layer],
            }
            for layer, head in heads.items()
        ]

    @staticmethod
    def _check_exits(asked: Iterable[int], known: Iterable[int]) -> None:
        unknown = sorted(set(asked) - set(known))
        if unknown:
            raise InputError(f"No exit after layer {unknown[0]}: the exits are {sorted(known)}.")


def _size(linear: nn.Linear) -> int:
    return linear.in_features * linear.out_features


def _layer(layer: nn.Module) -> PartCost:
    linears = [
        (name.rpartition(".")[2], module)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    ]
    # DeBERTa's pos_key_proj and pos_query_proj read the table of positions, not the tokens.
    per_token = sum(_size(module) for name, module in linears if not name.startswith("pos_"))
    width = sum(
        module.out_features // _QUERY_PROJECTIONS[name]
        for name, module in linears
        if name in _QUERY_PROJECTIONS
    )
    positions = sum(2 * width * _position_products(module) for module in layer.modules())
    return PartCost("layer", Polynomial(per_token=per_token), Polynomial(0, per_token + positions, 2 * width))


def _lstm_layer(lstm: nn.LSTM, layer: int) -> PartCost:
    matrices = [
        weight
        for name, weight in lstm.named_parameters()
        if name.startswith("weight_") and name.removesuffix("_reverse").endswith(f"_l{layer}")
    ]
    per_token = Polynomial(per_token=sum(matrix.numel() for matrix in matrices))
    return PartCost("lstm", per_token, per_token)


def _position_products(module: Any) -> int:
    """Positions that DeBERTa's attention multiplies every query and every key with, halved (they are ±)."""
    return (
        module.pos_ebd_size * len(module.pos_att_type) if getattr(module, "relative_attention", False) else 0
    )


def _exit_head(head: nn.Module) -> PartCost:
    linears = {name: module for name, module in head.named_modules() if isinstance(module, nn.Linear)}
    kind = str(head.kind)
    if kind == "fastbert":
        projection = linears["input_projection"]
        width, classifier = projection.out_features, _size(linears["classifier"])
        # Keys and values of all tokens; query, output and dense of the first; its products with every token.
        full = Polynomial(3 * width**2 + classifier, _size(projection) + 2 * width**2 + 2 * width)
        return PartCost(kind, _fastbert_head_paper(projection.in_features, width), full)
    if kind == "mean":
        # The mean: every token, once per feature.
        full = Polynomial(_size(linears["classifier"]), per_token=linears["classifier"].in_features)
        return PartCost(kind, Polynomial(), full)
    first_token = sum(_size(module) for module in linears.values())
    return PartCost(kind, Polynomial(first_token - _size(linears["classifier"])), Polynomial(first_token))


def _fastbert_head_paper(hidden_size: int, head_size: int) -> Polynomial:
    return Polynomial(head_size**2, hidden_size * head_size + 4 * head_size**2)
