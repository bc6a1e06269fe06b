"""Where each family of encoders keeps its parts: one small adapter per structure, and a registry.

An adapter calls the family's own modules in the order of the stock forward pass and computes nothing itself,
but for the attention scores of families that show them nowhere.
To add a family, write an adapter (or reuse one) and add a line to `FAMILIES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask, create_bidirectional_sliding_window_mask

Context = Mapping[str, Any]


class BertFamily:
    """BERT's structure (bert, ernie), which the other adapters vary.

    Attributes:
        projections: names of the attention's query, key and value projections, in families whose attention
            does not go through transformers' registry of attention functions; None in all others.
        model: the model as given, with or without a classification head.
        base: its base encoder.
    """

    projections: ClassVar[tuple[str, str, str] | None] = None

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model
        self.base: Any = model.base_model

    @property
    def num_layers(self) -> int:
        """N, the number of layers that the stock forward pass runs."""
        return len(self.base.encoder.layer)

    def layer(self, index: int) -> nn.Module:
        """The module that layer `index` (1..N) runs."""
        module: nn.Module = self.base.encoder.layer[index - 1]
        return module

    def attention(self, index: int) -> nn.Module:
        """The module of layer `index` that projects queries, keys and values and attends."""
        layer: Any = self.layer(index)
        module: nn.Module = layer.attention.self
        return module

    def source(self, index: int) -> nn.Module:
        """The module whose output is hidden state `index`: 0 is what layer 1 reads, N what a head reads."""
        module: nn.Module = self.layer(index) if index else self.base.embeddings
        return module

    def embed(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """What layer 1 reads: (rows, tokens) → (rows, tokens, hidden)."""
        embeddings: Tensor = self.base.embeddings(input_ids=input_ids, token_type_ids=token_type_ids)
        return embeddings

    def context(self, hidden_states: Tensor, attention_mask: Tensor, wider: Context | None = None) -> Context:
        """The keyword arguments that the layers take besides the hidden states.

        With `wider`, the context of a batch with as many or more tokens, what depends on positions only is
        cut from it instead of computed again.
        """
        return {"attention_mask": self._mask(create_bidirectional_mask, hidden_states, attention_mask)}

    def layer_arguments(self, index: int, context: Context) -> Context:
        """The part of the context that layer `index` takes."""
        return context

    def run_layer(
        self, index: int, hidden_states: Tensor, attention_mask: Tensor, context: Context
    ) -> Tensor:
        """The hidden states (rows, tokens, hidden) after layer `index`."""
        # Gradient checkpointing needs the hidden states as a positional argument.
        result = self.layer(index)(hidden_states, **self.layer_arguments(index, context))
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return output

    def output(self, hidden_states: Tensor) -> Tensor:
        """What a head reads: the hidden states after the final norm, where the family has one."""
        return hidden_states

    def pool(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        """The stock head's vector of each row: (rows, tokens, hidden) → (rows, hidden)."""
        pooled: Tensor = self.base.pooler(hidden_states)
        return pooled

    def classify(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        """The stock head's logits: (rows, tokens, hidden) → (rows, labels)."""
        logits: Tensor = self.model.classifier(self.model.dropout(self.pool(hidden_states, attention_mask)))
        return logits

    def attention_scores(self, index: int, outputs: Mapping[str, Tensor], arguments: Context) -> Tensor:
        """The scores (rows, heads, tokens, tokens) before the mask, in families that have `projections`.

        Args:
            index: the layer.
            outputs: what the submodules of its attention gave on this forward pass, by name; of those that
                run more than once, the first.
            arguments: what its attention was called with, by name.
        """
        raise TypeError(f"{type(self).__name__} has no scores of its own: transformers' registry gives them")

    def _mask(self, create: Callable[..., Any], hidden_states: Tensor, attention_mask: Tensor) -> Any:
        return create(config=self.base.config, inputs_embeds=hidden_states, attention_mask=attention_mask)


class RobertaFamily(BertFamily):
    """roberta, xlm-roberta, camembert: the head picks the first token itself."""

    def classify(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model.classifier(hidden_states)
        return logits


class ElectraFamily(RobertaFamily):
    """electra: embeddings may be narrower than the layers."""

    def source(self, index: int) -> nn.Module:
        if index == 0 and hasattr(self.base, "embeddings_project"):
            module: nn.Module = self.base.embeddings_project
            return module
        return super().source(index)

    def embed(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None) -> Tensor:
        embeddings = super().embed(input_ids, attention_mask, token_type_ids)
        if hasattr(self.base, "embeddings_project"):
            embeddings = self.base.embeddings_project(embeddings)
        return embeddings


class MPNetFamily(RobertaFamily):
    """mpnet: one relative position bias for all layers, no token types."""

    projections = ("q", "k", "v")

    def attention(self, index: int) -> nn.Module:
        layer: Any = self.layer(index)
        module: nn.Module = layer.attention.attn
        return module

    def attention_scores(self, index: int, outputs: Mapping[str, Tensor], arguments: Context) -> Tensor:
        queries, keys = (split_heads(outputs[name], self.attention(index)) for name in ("q", "k"))
        scores = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])
        bias: Tensor = arguments["position_bias"]
        return scores + bias

    def embed(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None) -> Tensor:
        embeddings: Tensor = self.base.embeddings(input_ids=input_ids)
        return embeddings

    def context(self, hidden_states: Tensor, attention_mask: Tensor, wider: Context | None = None) -> Context:
        tokens = hidden_states.shape[1]
        # The bias is the same for every row: one row of it broadcasts.
        bias = self._position_bias(hidden_states[:1]) if wider is None else wider["position_bias"]
        masks = super().context(hidden_states, attention_mask)
        return {**masks, "position_bias": bias[:, :, :tokens, :tokens]}

    def _position_bias(self, hidden_states: Tensor) -> Tensor:
        return self.base.encoder.compute_position_bias(hidden_states)  # type: ignore[no-any-return]


class DistilBertFamily(BertFamily):
    """distilbert: no token types, no pooler in the base encoder."""

    @property
    def num_layers(self) -> int:
        return len(self.base.transformer.layer)

    def layer(self, index: int) -> nn.Module:
        module: nn.Module = self.base.transformer.layer[index - 1]
        return module

    def attention(self, index: int) -> nn.Module:
        layer: Any = self.layer(index)
        module: nn.Module = layer.attention
        return module

    def embed(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None) -> Tensor:
        embeddings: Tensor = self.base.embeddings(input_ids)
        return embeddings

    def pool(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        return torch.relu(self.model.pre_classifier(hidden_states[:, 0]))


class AlbertFamily(BertFamily):
    """albert: layers share their weights in groups; embeddings are narrower than the layers."""

    @property
    def num_layers(self) -> int:
        num_layers: int = self.base.config.num_hidden_layers
        return num_layers

    def layer(self, index: int) -> nn.Module:
        groups = self.base.encoder.albert_layer_groups
        module: nn.Module = groups[int((index - 1) / (self.num_layers / len(groups)))]
        return module

    def attention(self, index: int) -> nn.Module:
        # A group of several inner layers counts as one layer; its last attention stands for it.
        layer: Any = self.layer(index)
        module: nn.Module = layer.albert_layers[-1].attention
        return module

    def source(self, index: int) -> nn.Module:
        module: nn.Module = self.layer(index) if index else self.base.encoder.embedding_hidden_mapping_in
        return module

    def embed(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None) -> Tensor:
        embeddings = super().embed(input_ids, attention_mask, token_type_ids)
        projected: Tensor = self.base.encoder.embedding_hidden_mapping_in(embeddings)
        return projected

    def pool(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        pooled: Tensor = self.base.pooler_activation(self.base.pooler(hidden_states[:, 0]))
        return pooled


class DebertaV2Family(BertFamily):
    """deberta-v2, versions 2 and 3: relative position embeddings, and in version 2 a convolution."""

    projections = ("query_proj", "key_proj", "value_proj")

    def source(self, index: int) -> nn.Module:
        convolution: nn.Module | None = self.base.encoder.conv
        return convolution if index == 1 and convolution is not None else super().source(index)

    def attention_scores(self, index: int, outputs: Mapping[str, Tensor], arguments: Context) -> Tensor:
        attention: Any = self.attention(index)
        heads = [split_heads(outputs[name], attention) for name in ("query_proj", "key_proj")]
        queries, keys = (head.flatten(0, 1) for head in heads)
        # Content to content, and each kind of position attention in use (He et al., DeBERTa, ICLR 2021, eq. 4).
        terms = 1 + sum(kind in attention.pos_att_type for kind in ("c2p", "p2c"))
        scores = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1] * terms)
        if attention.relative_attention:
            # The position embeddings as dropout left them, or the scores would not be those of this pass.
            scores = scores + attention.disentangled_attention_bias(
                queries, keys, arguments.get("relative_pos"), outputs["pos_dropout"], terms
            )
        return scores.view(heads[0].shape[:2] + scores.shape[1:])

    def embed(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None) -> Tensor:
        embeddings: Tensor = self.base.embeddings(
            input_ids=input_ids, token_type_ids=token_type_ids, mask=attention_mask
        )
        return embeddings

    def context(self, hidden_states: Tensor, attention_mask: Tensor, wider: Context | None = None) -> Context:
        encoder, tokens = self.base.encoder, hidden_states.shape[1]
        if wider is None:
            relative_positions = encoder.get_rel_pos(hidden_states)
            relative_embeddings = encoder.get_rel_embedding()
        else:
            relative_positions, relative_embeddings = wider["relative_pos"], wider["rel_embeddings"]
        if relative_positions is not None:
            relative_positions = relative_positions[:, :tokens, :tokens]
        return {
            "attention_mask": encoder.get_attention_mask(attention_mask),
            "relative_pos": relative_positions,
            "rel_embeddings": relative_embeddings,
        }

    def run_layer(
        self, index: int, hidden_states: Tensor, attention_mask: Tensor, context: Context
    ) -> Tensor:
        output = super().run_layer(index, hidden_states, attention_mask, context)
        convolution = self.base.encoder.conv
        if index == 1 and convolution is not None:
            # It reads the embeddings, which are what layer 1 read: nothing has to be kept for it.
            output = convolution(hidden_states, output, attention_mask)
        return output

    def pool(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        pooled: Tensor = self.model.pooler(hidden_states)
        return pooled


class ModernBertFamily(BertFamily):
    """modernbert: rotary positions, full and sliding-window layers, pre-norm layers and a final norm."""

    MASKS: ClassVar[dict[str, Callable[..., Any]]] = {
        "full_attention": create_bidirectional_mask,
        "sliding_attention": create_bidirectional_sliding_window_mask,
    }

    @property
    def num_layers(self) -> int:
        return len(self.base.layers)

    def layer(self, index: int) -> nn.Module:
        module: nn.Module = self.base.layers[index - 1]
        return module

    def attention(self, index: int) -> nn.Module:
        layer: Any = self.layer(index)
        module: nn.Module = layer.attn
        return module

    def source(self, index: int) -> nn.Module:
        module: nn.Module = self.base.final_norm if index == self.num_layers else super().source(index)
        return module

    def embed(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None) -> Tensor:
        embeddings: Tensor = self.base.embeddings(input_ids=input_ids)
        return embeddings

    def context(self, hidden_states: Tensor, attention_mask: Tensor, wider: Context | None = None) -> Context:
        tokens = hidden_states.shape[1]
        positions = torch.arange(tokens, device=hidden_states.device)[None]

        def arguments(attention_type: str) -> Context:
            if wider is None:
                cosine, sine = self.base.rotary_emb(hidden_states, positions, attention_type)
            else:
                cosine, sine = wider[attention_type]["position_embeddings"]
            return {
                "attention_mask": self._mask(self.MASKS[attention_type], hidden_states, attention_mask),
                "position_embeddings": (cosine[:, :tokens], sine[:, :tokens]),
            }

        return {attention_type: arguments(attention_type) for attention_type in set(self._attention_types)}

    def layer_arguments(self, index: int, context: Context) -> Context:
        arguments: Context = context[self._attention_types[index - 1]]
        return arguments

    def output(self, hidden_states: Tensor) -> Tensor:
        normalised: Tensor = self.base.final_norm(hidden_states)
        return normalised

    def pool(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        if self.base.config.classifier_pooling == "mean":
            summed = (hidden_states * attention_mask[:, :, None]).sum(dim=1)
            row_vectors = summed / attention_mask.sum(dim=1, keepdim=True)
        else:
            row_vectors = hidden_states[:, 0]
        pooled: Tensor = self.model.head(row_vectors)
        return pooled

    def classify(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model.classifier(self.model.drop(self.pool(hidden_states, attention_mask)))
        return logits

    @property
    def _attention_types(self) -> list[str]:
        attention_types: list[str] = self.base.config.layer_types
        return attention_types


def split_heads(projected: Tensor, attention: nn.Module) -> Tensor:
    """(rows, tokens, heads × width) → (rows, heads, tokens, width)."""
    rows, tokens, width = projected.shape
    heads = int(attention.num_attention_heads)  # type: ignore[arg-type]
    return projected.view(rows, tokens, heads, width // heads).transpose(1, 2)


FAMILIES: dict[str, type[BertFamily]] = {
    "albert": AlbertFamily,
    "bert": BertFamily,
    "camembert": RobertaFamily,
    "deberta-v2": DebertaV2Family,
    "distilbert": DistilBertFamily,
    "electra": ElectraFamily,
    "ernie": BertFamily,
    "modernbert": ModernBertFamily,
    "mpnet": MPNetFamily,
    "roberta": RobertaFamily,
    "xlm-roberta": RobertaFamily,
}
