"""A stretch of a model's layers, or an exit's head, as one ONNX graph, in the form that ONNX Runtime runs fastest.

What is computed is what the layer-by-layer forward pass computes. Attention is written out with an additive mask of
one row per text, and a FastBERT head with its linear maps multiplied out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import bidirectional_mask_function, eager_mask

from alembert.models.bilstm import BilstmForSequenceClassification
from alembert.models.exit_heads import FastBertHead
from alembert.models.families import BertFamily, MPNetFamily
from alembert.models.layered import EncoderState
from alembert.models.multi_exit import MultiExitModel
from alembert.runtime.manifest import HIDDEN_STATES, LOGITS, MISTAKE_LOGITS, NEXT_HIDDEN_STATES

OPSET = 17
"""Of the graphs: the first with LayerNormalization, and read by every ONNX Runtime since 1.13."""

_ATTENTION = "alembert_export"
_WITHOUT_TOKEN_TYPES = ("distilbert", "mpnet", "modernbert")


class SegmentModule(nn.Module):
    """Layers `first` … `last` of a model; the last layer's module ends in the full model's head.

    Args:
        model: in evaluation mode.
        first, last: layers, 1 … N. From layer 1 the module takes token ids, from a later one hidden states.
        token_types: whether it takes `token_type_ids` too, of layer 1.

    Attributes:
        input_names, output_names: as in the manifest.
    """

    def __init__(self, model: MultiExitModel, first: int, last: int, token_types: bool) -> None:
        super().__init__()
        self.model, self.first, self.last = model, first, last
        self.is_final = last == model.num_layers
        ids = ("input_ids", "attention_mask", *(("token_type_ids",) if token_types else ()))
        self.input_names = ids if first == 1 else (HIDDEN_STATES, "attention_mask")
        self.output_names = (LOGITS,) if self.is_final else (NEXT_HIDDEN_STATES,)
        head = model.final_head if self.is_final else None
        self.head = FoldedFastBertHead(head) if isinstance(head, FastBertHead) else head

    @property
    def weight_bytes(self) -> int:
        """Of its layers in float32, and for the first segment of all that the model has around its layers."""
        layered, numbers = self.model.layered, range(self.first, self.last + 1)
        own = _weights(*(layered.layer(number) for number in numbers))
        if self.first == 1:
            every = _weights(*(layered.layer(number) for number in range(1, self.model.num_layers + 1)))
            own |= {weights for weights in self.model.full_model.parameters() if weights not in every}
        return 4 * sum(weights.numel() for weights in own)

    def forward(self, *inputs: Tensor) -> Tensor:
        layered = self.model.layered
        if self.first == 1:
            # One zero for all tokens, where a tokenizer gives no types: its embedding is a constant of the graph.
            types = inputs[2] if len(inputs) > 2 else torch.zeros(1, 1, dtype=torch.long)
            state = layered.embed(inputs[0], inputs[1], types)
        else:
            hidden_states, mask = inputs
            state = EncoderState(hidden_states, mask, layered._adapter.context(hidden_states, mask))
        for layer in range(self.first, self.last + 1):
            state = layered.run_layer(layer, state)
        if not self.is_final:
            return state.hidden_states
        read = layered.output(state)
        if self.head is None:
            return self.model.final_logits(read, state.attention_mask)
        return self.head(read, state.attention_mask)  # type: ignore[no-any-return]


class HeadModule(nn.Module):
    """The exit after a layer: hidden states to logits and, where the model foresees mistakes, to their logits.

    Attributes:
        input_names, output_names: as in the manifest.
    """

    def __init__(self, model: MultiExitModel, layer: int) -> None:
        super().__init__()
        head = model.exit_heads[str(layer)]
        self.model, self.head = model, FoldedFastBertHead(head) if isinstance(head, FastBertHead) else head
        # A graph may have no input that nothing reads.
        self.input_names = (HIDDEN_STATES, "attention_mask")[: 2 if head.reads_all_tokens else 1]
        self.output_names = (LOGITS, MISTAKE_LOGITS)[: 1 if model.learned_exit is None else 2]

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        read = self.model.layered._adapter.output(hidden_states)
        logits = self.head(read, attention_mask)
        return (logits,) if self.model.learned_exit is None else (logits, self.model.mistake_logits(read))


class BilstmModule(nn.Module):
    """A BiLSTM student, which has nowhere to leave: ids to logits. Padding must be on the right."""

    input_names: tuple[str, ...] = ("input_ids", "attention_mask")
    output_names: tuple[str, ...] = (LOGITS,)

    def __init__(self, model: BilstmForSequenceClassification) -> None:
        super().__init__()
        self.model = model

    @property
    def weight_bytes(self) -> int:
        """In float32."""
        return 4 * sum(weights.numel() for weights in self.parameters())

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        model = self.model
        # The graph takes rows in any order of lengths; only the example that is traced must be sorted.
        packed = nn.utils.rnn.pack_padded_sequence(
            model.embeddings(input_ids), attention_mask.sum(dim=1), batch_first=True, enforce_sorted=True
        )
        # Given here, for the exporter cannot trace how torch would make them from packed rows.
        start = torch.zeros(2 * model.lstm.num_layers, input_ids.shape[0], model.lstm.hidden_size)
        _, (states, _) = model.lstm(packed, (start, start))
        logits: Tensor = model.classifier(
            torch.relu(model.dense(torch.cat([states[-2], states[-1]], dim=-1)))
        )
        return logits


class FoldedFastBertHead(nn.Module):
    """A FastBERT head's function with its linear maps multiplied out, for the first token's query alone.

    With x the projected tokens, head i's score of token t is (Wqᵢ x₀ + bqᵢ)·(Wkᵢ xₜ + bkᵢ) = (Mᵢ x₀ + cᵢ)·xₜ plus a
    term that is the same for all tokens, which softmax ignores; M = Wkᵀ Wq and c = Wkᵀ bq. The weighted sum of values
    is Wvᵢ (Σ pₜ xₜ) + bvᵢ. So keys and values of the tokens are never made, and the maps after the sum are one.
    """

    def __init__(self, head: FastBertHead) -> None:
        super().__init__()
        self.num_heads = head.num_heads
        self.input_projection, self.classifier = head.input_projection, head.classifier
        width = head.query.in_features // head.num_heads
        parts = [slice(i * width, (i + 1) * width) for i in range(head.num_heads)]
        q, k, v, o, d = (_double(m) for m in (head.query, head.key, head.value, head.output, head.dense))
        scale = width**-0.5
        self.queries = _linear(
            torch.cat([k.weight[p].T @ q.weight[p] for p in parts]) * scale,
            torch.cat([k.weight[p].T @ q.bias[p] for p in parts]) * scale,
        )
        after = d.weight @ o.weight
        self.dense = _linear(
            torch.cat([after[:, p] @ v.weight[p] for p in parts], dim=1),
            after @ v.bias + d.weight @ o.bias + d.bias,
        )

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = torch.tanh(self.input_projection(hidden_states))
        width = tokens.shape[-1]
        queries = self.queries(tokens[:, 0]).view(-1, self.num_heads, width)
        scores = queries @ tokens.transpose(1, 2) + additive_mask(attention_mask)[:, None]
        summed = (scores.softmax(-1) @ tokens).view(-1, self.num_heads * width)
        return self.classifier(torch.tanh(self.dense(summed)))  # type: ignore[no-any-return]


def segment_modules(
    model: PreTrainedModel, exits: Sequence[int], token_types: bool
) -> list[SegmentModule | BilstmModule]:
    """The modules between the exits after layers `exits`, ascending; the last ends in the full model's head.

    With `token_types` the first one takes `token_type_ids`; without, all tokens are of type 0.
    """
    if isinstance(model, BilstmForSequenceClassification):
        return [BilstmModule(model)]
    multi_exit = model if isinstance(model, MultiExitModel) else MultiExitModel.from_full_model(model)
    ends = [*exits, multi_exit.num_layers]
    return [
        SegmentModule(multi_exit, first, last, token_types)
        for first, last in zip([1, *(end + 1 for end in exits)], ends, strict=True)
    ]


def head_modules(model: PreTrainedModel, exits: Sequence[int]) -> dict[int, HeadModule]:
    """The modules of the exits after layers `exits`, by layer."""
    return {layer: HeadModule(model, layer) for layer in exits if isinstance(model, MultiExitModel)}


def reads_token_types(model: PreTrainedModel, given: Sequence[str]) -> bool:
    """Whether a model's answers depend on token types that a tokenizer gives; `given` names what it gives."""
    config = model.config.full_model_config() if isinstance(model, MultiExitModel) else model.config
    types = int(getattr(config, "type_vocab_size", 0) or 0)
    return types > 1 and config.model_type not in _WITHOUT_TOKEN_TYPES and "token_type_ids" in given


def _weights(*modules: nn.Module) -> set[nn.Parameter]:
    """Each once, where modules share some."""
    return {weights for module in modules for weights in module.parameters()}


def additive_mask(attention_mask: Tensor) -> Tensor:
    """(rows, tokens), 1 = token → (rows, tokens) float32, 0 for tokens and float32's lowest for padding."""
    return (1.0 - attention_mask.float()) * torch.finfo(torch.float32).min


def write_graph(
    module: SegmentModule | HeadModule | BilstmModule, path: str | Path, hidden_size: int
) -> None:
    """Traces a module in float32 and writes its graph, with free numbers of rows and tokens.

    Args:
        module: from `segment_modules` or `head_modules`.
        path: of the ONNX file.
        hidden_size: width of the hidden states.
    """
    names, outputs = module.input_names, module.output_names
    rows, tokens = 3, 7
    mask = (torch.arange(tokens) < torch.tensor([tokens, 4, 2])[:, None]).long()
    examples = {
        "input_ids": mask,
        "attention_mask": mask,
        "token_type_ids": torch.zeros_like(mask),
        HIDDEN_STATES: torch.linspace(-1, 1, rows * tokens * hidden_size).view(rows, tokens, hidden_size),
    }
    free = {name: {0: "rows", 1: "tokens"} for name in (*names, *outputs) if not name.endswith(LOGITS)}
    free |= {name: {0: "rows"} for name in outputs if name.endswith(LOGITS)}
    with torch.no_grad(), _export_attention(module), _positions(module), warnings.catch_warnings():
        # The tracer warns of every shape that it writes into the graph; the parity tests cover them.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(),
            tuple(examples[name] for name in names),
            str(path),
            input_names=list(names),
            output_names=list(outputs),
            dynamic_axes=free,
            opset_version=OPSET,
            # The newer exporter gives the same operators in twenty times the time.
            dynamo=False,
        )


@contextmanager
def _export_attention(module: nn.Module) -> Iterator[None]:
    configurations: dict[int, Any] = {
        id(part.config): part.config
        for part in module.modules()
        if isinstance(part, nn.Module) and hasattr(part, "config")
    }
    before = {key: config._attn_implementation for key, config in configurations.items()}
    AttentionInterface.register(_ATTENTION, _attention)
    AttentionMaskInterface.register(_ATTENTION, _mask)
    try:
        for config in configurations.values():
            config._attn_implementation = _ATTENTION
        yield
    finally:
        for key, config in configurations.items():
            config._attn_implementation = before[key]


@contextmanager
def _positions(module: nn.Module) -> Iterator[None]:
    """Lets MPNet look its position bias up by distance, instead of working out the bucket of every distance."""
    adapter: Any = module.model.layered._adapter if isinstance(module, SegmentModule) else None
    if not isinstance(adapter, MPNetFamily):
        yield
        return
    longest = int(adapter.base.config.max_position_embeddings)
    bias = adapter.base.encoder.compute_position_bias(torch.zeros(1, longest, 1))[0]
    # Distances −(longest − 1) … longest − 1: keys before the query, then those from it on.
    by_distance = torch.cat([bias[:, :, 0].flip(-1)[:, :-1], bias[:, 0]], dim=1).T.contiguous()

    def context(hidden_states: Tensor, attention_mask: Tensor, wider: Any = None) -> dict[str, Any]:
        positions = torch.arange(hidden_states.shape[1])
        distances = positions[None] - positions[:, None] + (longest - 1)
        masks = BertFamily.context(adapter, hidden_states, attention_mask)
        return {**masks, "position_bias": by_distance[distances].permute(2, 0, 1)[None]}

    named: Any = adapter
    named.context = context
    try:
        yield
    finally:
        del named.context


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of (rows, heads, tokens, width) queries, keys and values: (rows, tokens, heads, width)."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(-1, -2) * scale
    if attention_mask is not None:
        scores = scores + attention_mask
    return (scores.softmax(-1) @ value).transpose(1, 2), None


def _mask(*arguments: Any, **named: Any) -> Tensor | None:
    """An additive mask: (rows, 1, 1, tokens) where every token sees every other, else (rows, 1, tokens, tokens)."""
    function: Callable[..., Any] | None = named.get("mask_function")
    attention_mask: Tensor | None = named.get("attention_mask")
    if function is bidirectional_mask_function and attention_mask is not None:
        return additive_mask(attention_mask)[:, None, None]
    mask: Tensor | None = eager_mask(*arguments, **named)
    return mask


def _double(linear: nn.Linear) -> nn.Linear:
    return _linear(linear.weight, linear.bias, torch.float64)


def _linear(weight: Tensor, bias: Tensor, dtype: torch.dtype = torch.float32) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
    return linear.requires_grad_(False)
