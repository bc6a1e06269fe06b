"""Any supported encoder as embeddings, layer 1 … layer N, with row selection between the layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, PreTrainedModel

from alembert.common.errors import InputError
from alembert.models.families import FAMILIES

SUPPORTED_FAMILIES: tuple[str, ...] = tuple(FAMILIES)


@dataclass(frozen=True, eq=False)
class EncoderState:
    """A batch on its way through the layers.

    Attributes:
        hidden_states: (rows, tokens, hidden), in the model's floating-point type.
        attention_mask: (rows, tokens), int64, 1 = token.
        context: what the family's layers take besides the hidden states: extended mask, position bias, rotary
            embeddings and the like, for exactly these rows and tokens.
    """

    hidden_states: Tensor
    attention_mask: Tensor
    context: Mapping[str, Any]


class LayeredEncoder:
    """Runs an encoder layer by layer, with its own modules and in its own numbers.

    A view: it owns no parameters, keeps the model's device, floating-point type (half precision included),
    attention implementation and training mode, and lets gradients through. With equal inputs, `embed`, every
    layer and `output` give the stock forward pass's last hidden state.

    Args:
        model: a base encoder (as from `AutoModel`), or a model for sequence classification, which also
            makes `classify` available.

    Attributes:
        family: the configuration's `model_type`, one of `SUPPORTED_FAMILIES`.
        num_layers: N.
        hidden_size: width of the hidden states.

    Raises:
        InputError: the family is not supported, or the model is set up as a decoder.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.family: str = model.config.model_type
        if self.family not in FAMILIES:
            raise InputError(
                f"models of type {self.family!r} are not supported; choose one of: {', '.join(FAMILIES)}"
            )
        if getattr(model.config, "is_decoder", False):
            raise InputError(
                f"this {self.family} model is a decoder: set is_decoder to false in its config.json"
            )
        self._model = model
        self._adapter = FAMILIES[self.family](model)
        self.num_layers: int = self._adapter.num_layers
        self.hidden_size: int = model.config.hidden_size

    def layer(self, index: int) -> nn.Module:
        """The module that layer `index` runs; in ALBERT several layers run the same one.

        Raises:
            InputError: `index` is not in 1..N.
        """
        self._check_layer(index)
        return self._adapter.layer(index)

    def embed(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> EncoderState:
        """The state that layer 1 reads, projection to the hidden size included.

        Args:
            input_ids: (rows, tokens), int64.
            attention_mask: (rows, tokens), 1 or True = token; every position is a token when absent.
            token_type_ids: (rows, tokens), int64; ignored by families without token types.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        hidden_states = self._adapter.embed(input_ids, mask, token_type_ids)
        return EncoderState(hidden_states, mask, self._adapter.context(hidden_states, mask))

    def run_layer(self, index: int, state: EncoderState) -> EncoderState:
        """The state after layer `index` (1..N) of the state before it.

        Raises:
            InputError: `index` is not in 1..N.
        """
        self._check_layer(index)
        hidden_states = self._adapter.run_layer(
            index, state.hidden_states, state.attention_mask, state.context
        )
        return replace(state, hidden_states=hidden_states)

    def select(self, state: EncoderState, rows: Tensor, tokens: int | None = None) -> EncoderState:
        """The state of some rows, in the order given.

        Trailing columns that are padding in all of these rows are dropped, except for the first column. The
        remaining layers give the tokens of these rows the same hidden states as before the selection.

        Args:
            state: the state before or after any layer.
            rows: (kept rows,), int64 indices on the state's device; at least one, for stock layers take no
                empty batch.
            tokens: columns up to the last that holds a token of these rows, where that is known; finding out waits
                for the device.
        """
        mask = state.attention_mask[rows]
        if tokens is None:
            columns = torch.arange(1, mask.shape[1] + 1, device=mask.device)
            tokens = int((mask.any(dim=0) * columns).max())
        tokens = max(1, tokens)
        mask = mask[:, :tokens]
        hidden_states = state.hidden_states[rows, :tokens]
        return EncoderState(
            hidden_states, mask, self._adapter.context(hidden_states, mask, wider=state.context)
        )

    def output(self, state: EncoderState) -> Tensor:
        """The hidden states (rows, tokens, hidden) as a head after this layer reads them.

        They pass the encoder's final norm where the family has one (ModernBERT), and are unchanged elsewhere.
        """
        return self._adapter.output(state.hidden_states)

    def classify(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        """The logits (rows, labels) of the stock classification head.

        Args:
            hidden_states: (rows, tokens, hidden), the `output` of any layer.
            attention_mask: (rows, tokens), 1 = token.

        Raises:
            InputError: the model has no head for sequence classification.
        """
        if not self._has_head:
            raise InputError(
                f"{type(self._model).__name__} has no head for sequence classification: "
                "load the model with AutoModelForSequenceClassification"
            )
        return self._adapter.classify(hidden_states, attention_mask)

    @property
    def _has_head(self) -> bool:
        stock_class = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(self._model.config), ())
        return isinstance(self._model, stock_class)

    def _check_layer(self, index: int) -> None:
        if not 1 <= index <= self.num_layers:
            raise InputError(
                f"there is no layer {index}: this {self.family} model has layers 1 to {self.num_layers}"
            )
