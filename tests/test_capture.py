"""Captured features against eager attention, the projections themselves and the layer-by-layer view."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from alembert.common.errors import InputError
from alembert.models.capture import capture
from alembert.models.families import FAMILIES
from alembert.models.features import FeatureRequest, Features
from alembert.models.layered import LayeredEncoder
from alembert.models.multi_exit import MultiExitModel
from test_layered import BERT_SIZES, CASES, NUM_LAYERS, TOLERANCE, VARIANTS, batch, build, randomise, run

LAYERS = tuple(range(1, NUM_LAYERS + 1))
PROJECTIONS = FeatureRequest(queries=LAYERS, keys=LAYERS, values=LAYERS)
EXPLICIT = FeatureRequest(attention_scores=LAYERS, attention_probabilities=LAYERS)
EVERYTHING = PROJECTIONS | EXPLICIT | FeatureRequest(hidden_states=(0, *LAYERS))
PROJECTION_NAMES = (
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("query_proj", "key_proj", "value_proj"),
)
HEADS = 4
HEAD_WIDTH = 8
WINDOW = 2  # of the sliding layers of the tiny ModernBERT: half of `local_attention`


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class SoftmaxInputs(TorchFunctionMode):
    """Keeps what every softmax of a forward pass reads: the masked attention scores, in the order of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is nn.functional.softmax:
            self.inputs.append(args[0])
        return function(*args, **(kwargs or {}))


def accepted(name: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return inputs if CASES[name].token_types else {k: v for k, v in inputs.items() if k != "token_type_ids"}


def masked_scores(model: PreTrainedModel, inputs: dict[str, Tensor]) -> list[Tensor]:
    with SoftmaxInputs() as mode:
        model(**inputs)
    assert len(mode.inputs) == NUM_LAYERS
    return mode.inputs


def visible(model: PreTrainedModel, layer: int, mask: Tensor) -> Tensor:
    """(B, 1, n, n): pairs of tokens that may attend to each other."""
    pairs = mask[:, None, :, None].bool() & mask[:, None, None, :].bool()
    if model.config.model_type == "modernbert" and model.config.layer_types[layer - 1] == "sliding_attention":
        positions = torch.arange(mask.shape[1])
        pairs = pairs & ((positions[:, None] - positions).abs() <= WINDOW)
    return pairs


def assert_visible_close(actual: Tensor, expected: Tensor, pairs: Tensor) -> None:
    pairs = pairs.expand_as(expected)
    torch.testing.assert_close(actual[pairs], expected[pairs], **TOLERANCE)


def project(attention: Any, hidden_states: Tensor) -> dict[str, Tensor]:
    """Queries, keys and values, (B, h, n, d) each, from the weights of the attention module."""
    if hasattr(attention, "Wqkv"):
        projected = attention.Wqkv(hidden_states).chunk(3, dim=-1)
    else:
        names = next(names for names in PROJECTION_NAMES if hasattr(attention, names[0]))
        projected = [getattr(attention, name)(hidden_states) for name in names]
    rows, tokens = hidden_states.shape[:2]
    heads = [value.reshape(rows, tokens, HEADS, HEAD_WIDTH).transpose(1, 2) for value in projected]
    return dict(zip(("queries", "keys", "values"), heads, strict=True))


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize(("name", "attention"), VARIANTS)
class TestEveryFamily:
    def test_scores_and_probabilities_equal_eager_attention(self, name: str, attention: str) -> None:
        model, eager, inputs = build(name, attention), build(name, "eager"), batch(name)
        features = capture(model, inputs, EXPLICIT)
        scores = masked_scores(eager, inputs)
        probabilities = eager(**inputs, output_attentions=True).attentions
        mask = inputs["attention_mask"]
        for layer in LAYERS:
            pairs = visible(model, layer, mask)
            assert_visible_close(features.attention_scores[layer], scores[layer - 1], pairs)
            queries = mask[:, None, :, None].bool()
            assert_visible_close(features.attention_probabilities[layer], probabilities[layer - 1], queries)

    def test_the_output_stays_the_stock_one(self, name: str, attention: str) -> None:
        model, inputs = build(name, attention), batch(name)
        hooks, stock = hooks_of(model), model(**inputs).logits
        for request in (FeatureRequest(), PROJECTIONS, EVERYTHING, FeatureRequest(attention_scores=(2,))):
            features = capture(model, inputs, request)
            torch.testing.assert_close(features.logits, stock, **TOLERANCE)
            assert features.output.logits is features.logits
            assert features.output.hidden_states is None
            for item in fields(request):
                assert tuple(getattr(features, item.name)) == getattr(request, item.name)
        assert hooks_of(model) == hooks and model.config._attn_implementation == attention
        assert torch.equal(model(**inputs).logits, stock)

    def test_hidden_states_equal_the_stock_ones(self, name: str, attention: str) -> None:
        model, inputs = build(name, attention), batch(name)
        stock = model.base_model(**inputs, output_hidden_states=True).hidden_states
        features = capture(model, inputs, FeatureRequest(hidden_states=(0, *LAYERS)))
        for layer in (0, *LAYERS):
            torch.testing.assert_close(features.hidden_states[layer], stock[layer], **TOLERANCE)

    def test_queries_keys_and_values_are_projections(self, name: str, attention: str) -> None:
        model, inputs = build(name, attention), batch(name)
        adapter = FAMILIES[model.config.model_type](model)
        read: list[Tensor] = []

        def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
            read.append(args[0] if args else kwargs["hidden_states"])

        modules = {adapter.attention(layer) for layer in LAYERS}
        handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in modules]
        features = capture(model, inputs, PROJECTIONS | EXPLICIT)
        for handle in handles:
            handle.remove()
        for layer, hidden_states in zip(LAYERS, read, strict=True):
            expected = project(adapter.attention(layer), hidden_states)
            if model.config.model_type == "modernbert":
                # Queries and keys are rotated; their products are checked against eager attention above.
                dots = features.queries[layer] @ features.keys[layer].transpose(2, 3) / HEAD_WIDTH**0.5
                torch.testing.assert_close(features.attention_scores[layer], dots, **TOLERANCE)
                assert features.queries[layer].shape == features.values[layer].shape
                expected = {"values": expected["values"]}
            for feature, value in expected.items():
                torch.testing.assert_close(getattr(features, feature)[layer], value, **TOLERANCE)

    def test_gradients_equal_those_of_eager_attention(self, name: str, attention: str) -> None:
        model, eager = copy.deepcopy(build(name, attention)), copy.deepcopy(build(name, "eager"))
        inputs = batch(name)
        pairs = visible(model, 3, inputs["attention_mask"])
        features = capture(model, inputs, EXPLICIT)
        features.attention_scores[3].masked_fill(~pairs, 0).square().mean().backward()
        with SoftmaxInputs() as mode:
            eager(**inputs)
        mode.inputs[2].masked_fill(~pairs, 0).square().mean().backward()
        reached = 0
        for (label, actual), expected in zip(model.named_parameters(), eager.parameters(), strict=True):
            assert (actual.grad is None) == (expected.grad is None), label
            if actual.grad is not None:
                reached += int(actual.grad.abs().sum() > 0)
                torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-4, atol=1e-5)
        assert reached > 5

    def test_an_offset_is_read_by_layer_1(self, name: str, attention: str) -> None:
        model, inputs = build(name, attention), batch(name)
        encoder, stock = LayeredEncoder(model), model(**inputs).logits
        state = encoder.embed(**inputs)
        offset = torch.randn(state.hidden_states.shape, generator=torch.Generator().manual_seed(5))
        same = capture(model, inputs, FeatureRequest(), embedding_offset=torch.zeros_like(offset))
        torch.testing.assert_close(same.logits, stock, **TOLERANCE)
        offset.requires_grad_()
        shifted = state.hidden_states + offset
        end = run(encoder, replace(state, hidden_states=shifted))
        expected = encoder.classify(encoder.output(end), end.attention_mask)
        features = capture(model, inputs, FeatureRequest(hidden_states=(0, 2)), embedding_offset=offset)
        torch.testing.assert_close(features.logits, expected, **TOLERANCE)
        torch.testing.assert_close(features.hidden_states[0], shifted, **TOLERANCE)
        assert (features.logits - stock).abs().max() > 1e-2
        actual, wanted = (
            torch.autograd.grad(logits.square().mean(), offset)[0] for logits in (features.logits, expected)
        )
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForMaskedLM])
    def test_a_bare_encoder_and_a_language_model_serve_as_well(
        self, name: str, attention: str, auto_class: type
    ) -> None:
        model, inputs = other_head(name, attention, auto_class), batch(name)
        stock = model(**accepted(name, inputs))
        features = capture(model, inputs, EVERYTHING)
        tokens = inputs["attention_mask"].bool()
        torch.testing.assert_close(features.output[0][tokens], stock[0][tokens], **TOLERANCE)
        if auto_class is AutoModel:
            assert features.logits is None
            last = features.hidden_states[NUM_LAYERS]
            torch.testing.assert_close(last, features.output.last_hidden_state, **TOLERANCE)
        else:
            assert features.logits is not None and features.logits.shape[-1] == BERT_SIZES["vocab_size"]

    def test_autocast_and_training_mode(self, name: str, attention: str) -> None:
        model, inputs = copy.deepcopy(build(name, attention)).train(), batch(name)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = capture(model, inputs, EVERYTHING)
        assert model.training and features.logits is not None
        total = features.logits.float().square().mean()
        for item in fields(EVERYTHING):
            for value in getattr(features, item.name).values():
                assert value.isfinite().all() and value.requires_grad
                total = total + value.float().clamp(-10, 10).square().mean()
        total.backward()
        assert all(
            parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters()
        )


@cache
def other_head(name: str, attention: str, auto_class: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(CASES[name].family, **(BERT_SIZES | CASES[name].settings))
    return randomise(auto_class.from_config(config, attn_implementation=attention))


class TestBert:
    def test_everything_from_the_weights(self) -> None:
        """BERT's attention spelled out (Vaswani et al., 2017, equation 1)."""
        model, inputs = build("bert", "sdpa"), batch("bert")
        features = capture(model, inputs, EVERYTHING)
        for layer in LAYERS:
            attention = model.bert.encoder.layer[layer - 1].attention.self
            hidden_states = features.hidden_states[layer - 1]
            rows, tokens = inputs["input_ids"].shape
            q, k, v = (
                (hidden_states @ linear.weight.T + linear.bias).view(rows, tokens, 4, 8).permute(0, 2, 1, 3)
                for linear in (attention.query, attention.key, attention.value)
            )
            scores = torch.einsum("bhid,bhjd->bhij", q, k) / 8**0.5
            lengths = inputs["attention_mask"].sum(dim=1)
            for row, length in enumerate(lengths.tolist()):
                expected = scores[row, :, :, :length].softmax(dim=-1)
                actual = features.attention_probabilities[layer][row]
                torch.testing.assert_close(actual[..., :length], expected, **TOLERANCE)
                assert actual[..., length:].abs().sum() == 0
            torch.testing.assert_close(features.queries[layer], q, **TOLERANCE)
            torch.testing.assert_close(features.keys[layer], k, **TOLERANCE)
            torch.testing.assert_close(features.values[layer], v, **TOLERANCE)
            torch.testing.assert_close(features.attention_scores[layer], scores, **TOLERANCE)

    def test_a_missing_mask_means_tokens_everywhere_and_a_boolean_one_serves(self) -> None:
        model, inputs = build("bert", "sdpa"), batch("bert", (6, 4))
        boolean = inputs | {"attention_mask": inputs["attention_mask"].bool()}
        expected = capture(model, inputs, EVERYTHING)
        actual = capture(model, boolean, EVERYTHING)
        assert torch.equal(actual.attention_mask, inputs["attention_mask"])
        torch.testing.assert_close(actual.attention_scores, expected.attention_scores)
        del inputs["attention_mask"]
        features = capture(model, inputs, EXPLICIT)
        assert torch.equal(features.attention_mask, torch.ones(2, 6, dtype=torch.long))
        torch.testing.assert_close(features.logits, model(**inputs).logits, **TOLERANCE)

    def test_probabilities_come_before_dropout(self) -> None:
        config = AutoConfig.for_model("bert", **BERT_SIZES, attention_probs_dropout_prob=0.5)
        model = randomise(AutoModel.from_config(config)).train()
        probabilities = capture(model, batch("bert"), EXPLICIT).attention_probabilities[2]
        torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(probabilities.shape[:-1]))

    def test_other_arguments_reach_the_forward_pass(self) -> None:
        model, inputs = build("bert", "sdpa"), batch("bert")
        labels = torch.zeros(len(inputs["input_ids"]), dtype=torch.long)
        features = capture(model, inputs, EXPLICIT, labels=labels)
        expected = nn.functional.cross_entropy(model(**inputs).logits, labels)
        torch.testing.assert_close(features.output.loss, expected)

    def test_another_capture_within_one(self) -> None:
        outer, inner, inputs = build("bert", "sdpa"), build("roberta", "sdpa"), batch("bert")
        inner_features: list[Features] = []
        handle = outer.bert.encoder.layer[1].register_forward_hook(
            lambda *_: inner_features.append(capture(inner, inputs, EVERYTHING))
        )
        features = capture(outer, inputs, EVERYTHING)
        handle.remove()
        torch.testing.assert_close(
            features.attention_scores, capture(outer, inputs, EVERYTHING).attention_scores
        )
        torch.testing.assert_close(
            inner_features[0].attention_scores, capture(inner, inputs, EVERYTHING).attention_scores
        )


@pytest.mark.parametrize("name", ["mpnet", "deberta-v2", "deberta-v3"])
def test_scores_of_a_pass_with_dropout_are_those_that_it_used(name: str) -> None:
    """Under dropout too, captured scores and probabilities belong to the same forward pass."""
    settings = BERT_SIZES | CASES[name].settings | {"hidden_dropout_prob": 0.5}
    config = AutoConfig.for_model(CASES[name].family, **settings)
    model, inputs = randomise(AutoModel.from_config(config)).train(), batch(name)
    features = capture(model, inputs, EXPLICIT)
    mask = inputs["attention_mask"].bool()
    for layer in LAYERS:
        scores = features.attention_scores[layer].masked_fill(~mask[:, None, None], -torch.inf)
        queries = mask[:, None, :, None]
        assert_visible_close(scores.softmax(dim=-1), features.attention_probabilities[layer], queries)


class TestFusedAttention:
    @pytest.mark.parametrize("name", ["bert", "albert", "modernbert", "distilbert"])
    @pytest.mark.parametrize(
        ("request_", "fused"),
        [
            (PROJECTIONS, NUM_LAYERS),
            (FeatureRequest(hidden_states=(0, 4)), NUM_LAYERS),
            (FeatureRequest(attention_scores=(2,), queries=(1,)), NUM_LAYERS - 1),
            (FeatureRequest(attention_scores=(2,), attention_probabilities=(4,)), NUM_LAYERS - 2),
            (EXPLICIT, 0),
        ],
    )
    def test_it_is_left_only_where_it_must_be(
        self, name: str, request_: FeatureRequest, fused: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[None] = []
        function = nn.functional.scaled_dot_product_attention

        def spy(*args: Any, **kwargs: Any) -> Tensor:
            calls.append(None)
            return function(*args, **kwargs)

        monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy)
        capture(build(name, "sdpa"), batch(name), request_)
        assert len(calls) == fused

    @pytest.mark.parametrize("name", ["bert", "modernbert"])
    def test_flash_attention_keeps_its_mask_and_its_layers(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A stand-in with flash attention's interface: a padding mask (B, n) or none, and a window to apply."""
        calls: list[Any] = []

        def flash(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **arguments: Any) -> Any:
            calls.append(mask)
            visible = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool)
            if arguments.get("sliding_window") is not None:
                visible = visible.tril(arguments["sliding_window"] - 1)
                visible = visible.triu(1 - arguments["sliding_window"])
            if mask is not None:
                visible = visible & mask[:, None, None].bool()
            scores = query @ key.transpose(2, 3) * arguments["scaling"]
            weights = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(dim=-1)
            return (weights @ value).transpose(1, 2), None

        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "stand_in", flash)
        monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "stand_in", flash_attention_mask)
        model, eager = copy.deepcopy(build(name, "sdpa")), build(name, "eager")
        model.config._attn_implementation = "stand_in"
        for lengths in ((9, 4, 6), (9, 9)):
            inputs = batch(name, lengths)
            calls.clear()
            features = capture(model, inputs, FeatureRequest(attention_probabilities=(2, 4)))
            assert len(calls) == 2 and all(mask is None or mask.ndim == 2 for mask in calls)
            expected = eager(**inputs, output_attentions=True)
            torch.testing.assert_close(features.logits, expected.logits, **TOLERANCE)
            queries = inputs["attention_mask"][:, None, :, None].bool()
            for layer, probabilities in features.attention_probabilities.items():
                assert_visible_close(probabilities, expected.attentions[layer - 1], queries)
        assert model.config._attn_implementation == "stand_in"

    def test_an_unreadable_mask_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(
            ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "blocks", lambda **arguments: object()
        )
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "blocks", None)
        model = copy.deepcopy(build("bert", "sdpa"))
        model.config._attn_implementation = "blocks"
        with pytest.raises(InputError, match="sdpa"):
            capture(model, batch("bert"), EXPLICIT)
        assert model.config._attn_implementation == "blocks"


class TestRestoring:
    @pytest.mark.parametrize("name", ["bert", "albert", "mpnet", "deberta-v2"])
    def test_after_an_exception(self, name: str) -> None:
        attention = CASES[name].attention[0]
        model, inputs = copy.deepcopy(build(name, attention)), batch(name)
        stock = model(**inputs).logits
        hooks = hooks_of(model)

        def fail(*_: Any) -> None:
            raise ArithmeticError("a layer failed")

        handle = FAMILIES[model.config.model_type](model).layer(4).register_forward_hook(fail)
        with pytest.raises(ArithmeticError):
            capture(model, inputs, EVERYTHING, embedding_offset=torch.zeros(5, 9, 32))
        handle.remove()
        assert hooks_of(model) == hooks
        assert model.config._attn_implementation == attention
        assert torch.equal(model(**inputs).logits, stock)
        torch.testing.assert_close(capture(model, inputs, EVERYTHING).logits, stock, **TOLERANCE)

    def test_an_offset_of_another_shape_is_refused(self) -> None:
        model = build("bert", "sdpa")
        hooks = hooks_of(model)
        with pytest.raises(InputError, match=r"\(5, 9, 7\).*\(5, 9, 32\)"):
            capture(model, batch("bert"), FeatureRequest(), embedding_offset=torch.zeros(5, 9, 7))
        assert hooks_of(model) == hooks


class TestGradientCheckpointing:
    def test_hidden_states_and_projections_have_the_same_gradients(self) -> None:
        model, inputs = copy.deepcopy(build("bert", "sdpa")).train(), batch("bert")
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        request = PROJECTIONS | FeatureRequest(hidden_states=(0, 2, 4))
        offset = torch.full((5, 9, 32), 0.3)

        def gradients() -> list[Tensor]:
            features = capture(model, inputs, request, embedding_offset=offset)
            values = [*features.queries.values(), *features.values.values(), *features.hidden_states.values()]
            total = sum(value.square().mean() for value in values)
            parameters = list(model.bert.encoder.parameters())
            return [g for g in torch.autograd.grad(total, parameters, allow_unused=True) if g is not None]

        expected = gradients()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for actual, wanted in zip(gradients(), expected, strict=True):
            torch.testing.assert_close(actual, wanted, **TOLERANCE)
        with pytest.raises(InputError, match="gradient checkpointing"):
            capture(model, inputs, EXPLICIT)
        model.gradient_checkpointing_enable({"use_reentrant": True})
        hooks = hooks_of(model)
        with pytest.raises(InputError, match="use_reentrant"):
            capture(model, inputs, request)
        assert hooks_of(model) == hooks and model.config._attn_implementation == "sdpa"


class Recurrent(nn.Module):
    """A classifier without layers: of no supported family."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SequenceClassifierOutput:
        summed = (self.embedding(input_ids) * attention_mask[..., None]).sum(dim=1)
        return SequenceClassifierOutput(logits=summed)


class TestRefusals:
    @pytest.mark.parametrize(
        ("request_", "layer"),
        [
            (FeatureRequest(hidden_states=(5,)), "5"),
            (FeatureRequest(queries=(1, 0)), "0"),
            (FeatureRequest(attention_scores=(-1,)), "-1"),
        ],
    )
    def test_layers_that_are_not_there(
        self, request_: FeatureRequest, layer: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = copy.deepcopy(build("bert", "sdpa"))
        monkeypatch.setattr(model.bert, "forward", lambda *_, **__: pytest.fail("the model ran"))
        with pytest.raises(InputError, match=rf"layer {layer} .*4 layers"):
            capture(model, batch("bert"), request_)

    def test_a_multi_exit_model_gives_its_output_alone(self) -> None:
        inputs = batch("bert")
        model = MultiExitModel.from_full_model(
            copy.deepcopy(build("bert", "sdpa")), exit_layers=(1, 2)
        ).eval()
        features = capture(model, inputs, FeatureRequest(), output_layer_logits=True)
        torch.testing.assert_close(features.logits, model(**inputs).logits)
        assert features.output.layer_logits.shape[0] == NUM_LAYERS
        with pytest.raises(InputError, match="full_model"):
            capture(model, inputs, FeatureRequest(hidden_states=(1,)))
        inner = capture(model.full_model, inputs, FeatureRequest(hidden_states=(1,)))
        torch.testing.assert_close(inner.logits, features.logits, **TOLERANCE)

    def test_a_model_without_layers_gives_its_output_alone(self) -> None:
        model, inputs = Recurrent(), batch("bert")
        features = capture(model, inputs, FeatureRequest())  # type: ignore[arg-type]
        expected = torch.stack(
            [
                model.embedding(ids[: mask.sum()]).sum(dim=0)
                for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
            ]
        )
        torch.testing.assert_close(features.logits, expected)
        with pytest.raises(InputError, match="Recurrent"):
            capture(model, inputs, FeatureRequest(values=(1,)))  # type: ignore[arg-type]

    def test_decoders(self) -> None:
        model = copy.deepcopy(build("bert", "sdpa"))
        model.config.is_decoder = True
        with pytest.raises(InputError, match="is_decoder"):
            capture(model, batch("bert"), EXPLICIT)
