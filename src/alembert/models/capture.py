"""One stock forward pass, and what was asked for out of its inside.

Hidden states come from hooks on the family's own modules. Queries, keys, values, scores and probabilities
come from an attention function that stands in for the configured one during the pass, through transformers'
registry of attention functions; it computes attention in the open only in layers whose scores or
probabilities are asked for, and leaves all others to the configured function. MPNet and DeBERTa do not use
the registry: there, hooks read the projections and the scores are computed a second time.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from alembert.common.errors import InputError
from alembert.models.families import FAMILIES, BertFamily, split_heads
from alembert.models.features import ATTENTION_FEATURES, LAYER_FEATURES, FeatureRequest, Features
from alembert.models.multi_exit import MultiExitModel

EXPLICIT_FEATURES = ("attention_scores", "attention_probabilities")
REGISTRY_PREFIX = "alembert_capture_"


def capture(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    request: FeatureRequest,
    *,
    embedding_offset: Tensor | None = None,
    **forward_arguments: Any,
) -> Features:
    """Runs the model's own forward pass once and returns what was asked for; gradients flow.

    At tokens, the output is the stock one within floating-point rounding. Training mode, autocast and the configured
    attention implementation are the model's and the caller's; hooks and settings are taken back at the end,
    whatever happens. With active dropout, layers whose scores or probabilities are asked for draw other random
    numbers than fused attention would.

    What the features are:
        hidden_states: 0 is what layer 1 reads, after any projection to the layers' width, dropout included.
            N is what a head reads: in ModernBERT after the final norm (layers below N are before any norm).
            In DeBERTa, layer 1's is the one after the convolution, where there is one.
        queries, keys: as they enter the dot product; in ModernBERT after rotary embedding, in DeBERTa and
            MPNet without any position information.
        attention_scores: with position bias (MPNet, DeBERTa's disentangled attention). In ModernBERT's
            sliding-window layers, scores outside the window are there; probabilities there are 0.
        attention_probabilities: positions of padding attend to the tokens, except in DeBERTa, where their rows
            are uniform; they are for no one to read.

    Args:
        model: of one of the supported families, with any head or none. Any other model will do, as long as
            nothing but its output is asked for.
        inputs: `input_ids` (B, n) int64, and where there are any, `attention_mask` (B, n), 1 or True = token,
            and `token_type_ids` (B, n) int64, left out where the model's forward pass has no such argument.
        request: the features and their layers.
        embedding_offset: (B, n, width), added to what layer 1 reads; hidden state 0 is the sum. In DeBERTa,
            the convolution reads the sum as well.
        forward_arguments: further arguments of the model's forward pass.

    Raises:
        InputError: a layer that the model does not have; features asked of a model that is of no supported
            family, of a `MultiExitModel` or of a decoder; an offset of another shape; scores or probabilities
            with gradient checkpointing, or with an attention implementation whose mask cannot be read.
    """
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask.long()
    parameters = inspect.signature(model.forward).parameters
    arguments = {key: value for key, value in inputs.items() if key != "token_type_ids" or key in parameters}
    if "attention_mask" in parameters:
        arguments["attention_mask"] = mask
    arguments |= forward_arguments
    features = Features(attention_mask=mask)
    if not request and embedding_offset is None:
        features.output = model(**arguments)
    else:
        adapter = _adapter(model)
        _check_layers(adapter, request)
        _check_checkpointing(adapter, request)
        with _recording(adapter, request, features, embedding_offset):
            features.output = model(**arguments)
        _check_complete(adapter, request, features)
    features.logits = getattr(features.output, "logits", None)
    return features


def _adapter(model: PreTrainedModel) -> BertFamily:
    if isinstance(model, MultiExitModel):
        raise InputError(
            "a MultiExitModel's inside is read from the stock model within: pass its `full_model` instead"
        )
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family not in FAMILIES or not isinstance(model, PreTrainedModel):
        raise InputError(
            f"{type(model).__name__} (model type {family!r}) has no layers whose features can be read: ask for its "
            f"output alone, or choose a model of one of: {', '.join(FAMILIES)}"
        )
    if getattr(model.config, "is_decoder", False):
        raise InputError(f"this {family} model is a decoder: set is_decoder to false in its config.json")
    return FAMILIES[family](model)


def _check_layers(adapter: BertFamily, request: FeatureRequest) -> None:
    for feature in LAYER_FEATURES:
        first = 0 if feature == "hidden_states" else 1
        for layer in getattr(request, feature):
            if not first <= layer <= adapter.num_layers:
                raise InputError(
                    f"{feature} of layer {layer} asked for, but this {adapter.model.config.model_type} model has "
                    f"{adapter.num_layers} layers: choose from {first} to {adapter.num_layers}"
                )


def _check_checkpointing(adapter: BertFamily, request: FeatureRequest) -> None:
    explicit = any(getattr(request, feature) for feature in EXPLICIT_FEATURES)
    if not (explicit and adapter.base.training and torch.is_grad_enabled()):
        return
    if any(getattr(module, "gradient_checkpointing", False) for module in adapter.base.modules()):
        # The backward pass would run the layers anew without computing the scores.
        raise InputError(
            "attention scores and probabilities cannot be read under gradient checkpointing: turn it off "
            "(`model.gradient_checkpointing_disable()`), or choose a method that reads hidden states"
        )


def _check_complete(adapter: BertFamily, request: FeatureRequest, features: Features) -> None:
    for feature in LAYER_FEATURES:
        missing = set(getattr(request, feature)) - set(getattr(features, feature))
        if missing:
            raise InputError(
                f"the forward pass of {type(adapter.model).__name__} did not give {feature} of layers "
                f"{', '.join(map(str, sorted(missing)))}: does it run every layer once, and on one thread?"
            )


class _Recorder:
    """Puts what a forward pass gives into `features`, as far as `request` asks for it."""

    def __init__(self, adapter: BertFamily, request: FeatureRequest, features: Features) -> None:
        self._request, self._features = request, features
        self._builds_graph = torch.is_grad_enabled()
        layers = range(1, adapter.num_layers + 1)
        # A module that several layers share runs for them in ascending order.
        shared = _layers_by_module(adapter.attention, layers)
        self._pending = {module: iter(indices) for module, indices in shared.items()}

    def attention_layer(self, module: nn.Module) -> int | None:
        """The layer for which this attention module runs now; None for a module of another model."""
        return next(self._pending.get(module, iter(())), None)

    def wants(self, layer: int, *names: str) -> bool:
        return any(layer in getattr(self._request, name) for name in names)

    def record(self, layer: int, **values: Tensor) -> None:
        for name, value in values.items():
            if self.wants(layer, name):
                if self._builds_graph and not torch.is_grad_enabled():
                    raise InputError(
                        "features of a model under re-entrant gradient checkpointing have no gradients: enable "
                        'it with gradient_checkpointing_kwargs={"use_reentrant": False}, or not at all'
                    )
                getattr(self._features, name)[layer] = value


_active: ContextVar[_Recorder | None] = ContextVar("alembert_capture", default=None)


@contextmanager
def _recording(
    adapter: BertFamily, request: FeatureRequest, features: Features, embedding_offset: Tensor | None
) -> Iterator[None]:
    recorder = _Recorder(adapter, request, features)
    with ExitStack() as stack:
        # The offset comes first, for hidden state 0 to be the sum.
        if embedding_offset is not None:
            add_offset = partial(_add_offset, embedding_offset)
            stack.callback(adapter.source(0).register_forward_hook(add_offset).remove)
        _record_hidden_states(adapter, request, recorder, stack)
        if any(getattr(request, feature) for feature in ATTENTION_FEATURES):
            if adapter.projections is None:
                stack.enter_context(_recording_attention_function(adapter, recorder))
            else:
                _record_projections(adapter, recorder, stack)
        yield


def _add_offset(offset: Tensor, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    if offset.shape != output.shape:
        raise InputError(
            f"an embedding offset of shape {tuple(offset.shape)} does not fit embeddings of shape {tuple(output.shape)}"
        )
    return output + offset.to(output)


def _record_hidden_states(
    adapter: BertFamily, request: FeatureRequest, recorder: _Recorder, stack: ExitStack
) -> None:
    def hook(layers: Iterator[int], module: nn.Module, args: Any, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        recorder.record(next(layers), hidden_states=value)

    by_module = _layers_by_module(adapter.source, range(adapter.num_layers + 1))
    for module, layers in by_module.items():
        if set(layers) & set(request.hidden_states):
            stack.callback(module.register_forward_hook(partial(hook, iter(layers))).remove)


def _layers_by_module(module_of: Callable[[int], nn.Module], layers: range) -> dict[nn.Module, list[int]]:
    by_module: dict[nn.Module, list[int]] = {}
    for layer in layers:
        by_module.setdefault(module_of(layer), []).append(layer)
    return by_module


# --- families that use transformers' registry of attention functions ---


@contextmanager
def _recording_attention_function(adapter: BertFamily, recorder: _Recorder) -> Iterator[None]:
    """Sets the recording function as the model's attention implementation, with the configured one inside."""
    config = adapter.base.config
    configured: str = config._attn_implementation or "eager"
    nested = configured.startswith(REGISTRY_PREFIX)
    token = _active.set(recorder)
    try:
        if not nested:
            # The mask goes by the name of the implementation too, and must be the configured one's.
            name = REGISTRY_PREFIX + configured
            ALL_ATTENTION_FUNCTIONS.register(name, partial(_attention, configured))
            ALL_MASK_ATTENTION_FUNCTIONS.register(name, partial(_mask, configured))
            config._attn_implementation = name
        yield
    finally:
        if not nested:
            config._attn_implementation = configured
        _active.reset(token)


def _mask(configured: str, **arguments: Any) -> Any:
    """The mask of the configured implementation; none where transformers knows of none."""
    function = ALL_MASK_ATTENTION_FUNCTIONS.get(configured)
    return None if function is None else function(**arguments)


def _attention(
    configured: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **arguments: Any,
) -> tuple[Tensor, Tensor | None]:
    """Records, and attends as configured, or explicitly where scores or probabilities are wanted.

    Queries, keys and values are (B, h, n, d); the result is (B, n, h, d), and the weights where there are any.
    """
    recorder = _active.get()
    layer = None if recorder is None else recorder.attention_layer(module)
    if recorder is not None and layer is not None:
        recorder.record(layer, queries=query, keys=key, values=value)
    if recorder is None or layer is None or not recorder.wants(layer, *EXPLICIT_FEATURES):
        attend = _attention_function(configured, module)
        result: tuple[Tensor, Tensor | None] = attend(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **arguments
        )
        return result
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    masked = _apply_mask(scores, attention_mask, arguments.get("sliding_window"))
    probabilities = torch.softmax(masked, dim=-1, dtype=torch.float32).to(value.dtype)
    recorder.record(layer, attention_scores=scores, attention_probabilities=probabilities)
    weights = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def _attention_function(configured: str, module: nn.Module) -> Callable[..., Any]:
    """The configured attention function; plain attention is no entry of the registry, but the family's own."""
    family_module = sys.modules[type(module).__module__]
    function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
        configured, getattr(family_module, "eager_attention_forward", None)
    )
    return function


def _apply_mask(scores: Tensor, mask: Any, sliding_window: int | None) -> Tensor:
    """Scores with the smallest number wherever the mask of any implementation lets no attention through."""
    if mask is not None and not isinstance(mask, Tensor):
        raise InputError(
            "attention scores and probabilities cannot be read with this attention implementation: load the "
            'model with attn_implementation="sdpa"'
        )
    if mask is not None and mask.ndim == 4:
        if mask.is_floating_point():
            return scores + mask
        visible = mask.bool()
    else:
        # Flash attention takes the padding mask (B, n) and applies the window, own position included, itself.
        visible = scores.new_ones(scores.shape[-2:], dtype=torch.bool)
        if sliding_window is not None:
            positions = torch.arange(scores.shape[-1], device=scores.device)
            visible = (positions[:, None] - positions).abs() < sliding_window
        if mask is not None:
            visible = visible & mask.bool()[:, None, None, :]
    return scores.masked_fill(~visible, torch.finfo(scores.dtype).min)


# --- families that compute attention themselves ---


def _record_projections(adapter: BertFamily, recorder: _Recorder, stack: ExitStack) -> None:
    for layer in range(1, adapter.num_layers + 1):
        if recorder.wants(layer, *ATTENTION_FEATURES):
            _record_layer_projections(adapter, layer, recorder, stack)


def _record_layer_projections(adapter: BertFamily, layer: int, recorder: _Recorder, stack: ExitStack) -> None:
    attention: Any = adapter.attention(layer)
    signature = inspect.signature(attention.forward)
    outputs: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        # DeBERTa's projections run again on the position embeddings.
        outputs.setdefault(name, output)

    def record_probabilities(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        recorder.record(layer, attention_probabilities=args[0])

    def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        projected = zip(("queries", "keys", "values"), adapter.projections or (), strict=True)
        recorder.record(layer, **{name: split_heads(outputs[part], attention) for name, part in projected})
        if recorder.wants(layer, "attention_scores"):
            arguments = signature.bind(*args, **kwargs).arguments
            recorder.record(layer, attention_scores=adapter.attention_scores(layer, outputs, arguments))

    for name, module in attention.named_children():
        stack.callback(module.register_forward_hook(partial(keep, name)).remove)
    stack.callback(attention.dropout.register_forward_pre_hook(record_probabilities).remove)
    stack.callback(attention.register_forward_hook(record, with_kwargs=True).remove)
