"""The layer-by-layer view against the stock forward pass, for every family."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from alembert.common.errors import InputError
from alembert.models.layered import SUPPORTED_FAMILIES, EncoderState, LayeredEncoder

TOLERANCE = {"rtol": 0.0, "atol": 1e-5}
LENGTHS = (9, 4, 2, 7, 3)
SUBSETS = ([3, 0], [1], [4, 2], [2, 3, 1, 4, 0])
NUM_LAYERS = 4
PADDING = 1

BERT_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 50,
    "max_position_embeddings": 40,
    "pad_token_id": PADDING,
    "num_labels": 3,
}
DEBERTA_V2 = {
    "relative_attention": True,
    "position_buckets": 4,
    "max_relative_positions": -1,
    "position_biased_input": False,
    "pos_att_type": "p2c|c2p",
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other make models this small ten times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Case:
    """A tiny model: its family, what departs from the sizes above, and what the family offers."""

    family: str
    settings: dict[str, Any]
    token_types: bool = True
    attention: tuple[str, ...] = ("sdpa", "eager")


CASES = {
    "bert": Case("bert", {}),
    "ernie": Case("ernie", {"use_task_id": True}),
    "roberta": Case("roberta", {"type_vocab_size": 2}),
    "xlm-roberta": Case("xlm-roberta", {"type_vocab_size": 2}),
    "camembert": Case("camembert", {"type_vocab_size": 1}, token_types=False),
    "electra": Case("electra", {"embedding_size": 32}),
    "electra-projected": Case("electra", {"embedding_size": 16}),
    "distilbert": Case("distilbert", {"hidden_dim": 48}, token_types=False),
    "albert": Case("albert", {"embedding_size": 16}),
    "albert-groups": Case("albert", {"embedding_size": 16, "num_hidden_groups": 2}),
    "mpnet": Case("mpnet", {}, token_types=False, attention=("eager",)),
    "deberta-v2": Case("deberta-v2", DEBERTA_V2 | {"conv_kernel_size": 3}, False, ("eager",)),
    "deberta-v3": Case("deberta-v2", DEBERTA_V2 | {"type_vocab_size": 2}, True, ("eager",)),
    "deberta-absolute": Case("deberta-v2", {"type_vocab_size": 2}, True, ("eager",)),
    "modernbert": Case("modernbert", {"local_attention": 4}, token_types=False),
    "modernbert-mean": Case(
        "modernbert", {"local_attention": 4, "classifier_pooling": "mean"}, token_types=False
    ),
}
VARIANTS = [
    pytest.param(name, attention, id=f"{name}-{attention}")
    for name, case in CASES.items()
    for attention in case.attention
]


def randomise(model: PreTrainedModel) -> PreTrainedModel:
    """Weights large enough for a mistake to show: the stock initialisation hides many below the tolerance."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.add_(1.0)
    return model.eval()


@cache
def build(name: str, attention: str) -> PreTrainedModel:
    case = CASES[name]
    config = AutoConfig.for_model(case.family, **(BERT_SIZES | case.settings))
    return randomise(AutoModelForSequenceClassification.from_config(config, attn_implementation=attention))


def batch(name: str, lengths: tuple[int, ...] = LENGTHS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (len(lengths), max(lengths))
    mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
    input_ids = torch.randint(PADDING + 1, BERT_SIZES["vocab_size"], shape, generator=generator)
    inputs = {"input_ids": input_ids.where(mask.bool(), PADDING), "attention_mask": mask}
    if CASES[name].token_types:
        second = torch.arange(shape[1]) >= torch.tensor(lengths)[:, None] // 2
        inputs["token_type_ids"] = (second & mask.bool()).long()
    return inputs


def rows_of(inputs: dict[str, Tensor], rows: list[int]) -> dict[str, Tensor]:
    """These rows as if they had been batched alone."""
    tokens = int(inputs["attention_mask"][rows].sum(dim=1).max())
    return {key: value[rows, :tokens] for key, value in inputs.items()}


def run(encoder: LayeredEncoder, state: EncoderState, first: int = 1) -> EncoderState:
    for index in range(first, encoder.num_layers + 1):
        state = encoder.run_layer(index, state)
    return state


def assert_tokens_close(actual: Tensor, expected: Tensor, mask: Tensor) -> None:
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], **TOLERANCE)


def test_every_supported_family_has_a_case() -> None:
    assert {case.family for case in CASES.values()} == set(SUPPORTED_FAMILIES)


@pytest.mark.parametrize(("name", "attention"), VARIANTS)
class TestParity:
    def test_every_layer_equals_the_stock_forward(self, name: str, attention: str) -> None:
        model, inputs = build(name, attention), batch(name)
        encoder = LayeredEncoder(model)
        stock = model.base_model(**inputs, output_hidden_states=True)
        state = encoder.embed(**inputs)
        for index in range(1, NUM_LAYERS + 1):
            torch.testing.assert_close(state.hidden_states, stock.hidden_states[index - 1], **TOLERANCE)
            state = encoder.run_layer(index, state)
        assert encoder.num_layers == NUM_LAYERS == len(stock.hidden_states) - 1
        assert encoder.hidden_size == state.hidden_states.shape[-1]
        assert model.config._attn_implementation == attention
        torch.testing.assert_close(encoder.output(state), stock.last_hidden_state, **TOLERANCE)

    def test_classify_equals_the_stock_logits(self, name: str, attention: str) -> None:
        model, inputs = build(name, attention), batch(name)
        encoder = LayeredEncoder(model)
        state = run(encoder, encoder.embed(**inputs))
        logits = encoder.classify(encoder.output(state), state.attention_mask)
        torch.testing.assert_close(logits, model(**inputs).logits, **TOLERANCE)

    def test_without_a_mask_every_position_is_a_token(self, name: str, attention: str) -> None:
        model, inputs = build(name, attention), batch(name, (6, 6))
        encoder = LayeredEncoder(model)
        inputs.pop("attention_mask")
        state = run(encoder, encoder.embed(**inputs))
        assert torch.equal(state.attention_mask, torch.ones(2, 6, dtype=torch.long))
        expected = model.base_model(**inputs).last_hidden_state
        torch.testing.assert_close(encoder.output(state), expected, **TOLERANCE)

    def test_a_wrong_mask_would_show(self, name: str, attention: str) -> None:
        model, inputs = build(name, attention), batch(name)
        encoder = LayeredEncoder(model)
        wrong = inputs | {"attention_mask": torch.ones_like(inputs["attention_mask"])}
        state = run(encoder, encoder.embed(**wrong))
        expected = model.base_model(**inputs).last_hidden_state
        shorter = inputs["attention_mask"].sum(dim=1) < max(LENGTHS)
        difference = (encoder.output(state) - expected)[shorter, 0].abs().amax(dim=1)
        assert difference.min() > 100 * TOLERANCE["atol"]

    def test_a_boolean_mask_serves_as_well(self, name: str, attention: str) -> None:
        encoder, inputs = LayeredEncoder(build(name, attention)), batch(name)
        expected = run(encoder, encoder.embed(**inputs))
        boolean = inputs | {"attention_mask": inputs["attention_mask"].bool()}
        torch.testing.assert_close(
            run(encoder, encoder.embed(**boolean)).hidden_states, expected.hidden_states
        )

    def test_half_precision_is_kept(self, name: str, attention: str) -> None:
        model, inputs = copy.deepcopy(build(name, attention)).to(torch.bfloat16), batch(name)
        encoder = LayeredEncoder(model)
        state = run(encoder, encoder.embed(**inputs))
        logits = encoder.classify(encoder.output(state), state.attention_mask)
        assert logits.dtype == torch.bfloat16
        torch.testing.assert_close(logits, model(**inputs).logits)


@pytest.mark.parametrize(("name", "attention"), VARIANTS)
class TestSelection:
    def test_selected_rows_end_as_in_their_own_stock_forward(self, name: str, attention: str) -> None:
        model, inputs = build(name, attention), batch(name)
        encoder = LayeredEncoder(model)
        alone = [rows_of(inputs, rows) for rows in SUBSETS]
        expected = [model.base_model(**subset).last_hidden_state for subset in alone]
        state = encoder.embed(**inputs)
        for index in range(NUM_LAYERS + 1):
            if index:
                state = encoder.run_layer(index, state)
            for rows, subset, hidden_states in zip(SUBSETS, alone, expected, strict=True):
                selected = encoder.select(state, torch.tensor(rows))
                assert torch.equal(selected.attention_mask, subset["attention_mask"])
                end = run(encoder, selected, first=index + 1)
                assert_tokens_close(encoder.output(end), hidden_states, subset["attention_mask"])

    def test_selections_follow_each_other(self, name: str, attention: str) -> None:
        model, inputs = build(name, attention), batch(name)
        encoder = LayeredEncoder(model)
        state, rows = encoder.embed(**inputs), torch.arange(len(LENGTHS))
        for index, kept in enumerate(([4, 3, 1, 2], [1, 3, 2], [2, 1], [0]), start=1):
            state = encoder.select(encoder.run_layer(index, state), torch.tensor(kept))
            rows = rows[kept]
        alone = rows_of(inputs, rows.tolist())
        expected = model.base_model(**alone).last_hidden_state
        assert_tokens_close(encoder.output(state), expected, alone["attention_mask"])

    def test_gradients_flow_through_layers_and_selection(self, name: str, attention: str) -> None:
        model, inputs = copy.deepcopy(build(name, attention)), batch(name)
        encoder = LayeredEncoder(model)
        state = encoder.embed(**inputs)
        hidden_states = state.hidden_states.detach().requires_grad_()
        state = encoder.run_layer(1, replace(state, hidden_states=hidden_states))
        state = run(encoder, encoder.select(state, torch.tensor([1, 2])), first=2)
        encoder.classify(encoder.output(state), state.attention_mask).square().sum().backward()
        assert hidden_states.grad is not None
        reached = hidden_states.grad.abs().sum(dim=(1, 2)) > 0
        assert reached.tolist() == [False, True, True, False, False]
        for index in range(1, NUM_LAYERS + 1):
            gradients = [parameter.grad for parameter in encoder.layer(index).parameters()]
            assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize("name", CASES)
def test_classify_reads_any_layer_as_a_shallower_stock_model_does(name: str) -> None:
    model, inputs = build(name, "eager"), batch(name)
    depth = NUM_LAYERS // 2
    config = copy.deepcopy(model.config)
    if CASES[name].family == "modernbert":
        config.layer_types = config.layer_types[:depth]
    if CASES[name].family == "albert":
        config.num_hidden_groups = 1
    config.num_hidden_layers = depth
    shallow = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval()
    assert not shallow.load_state_dict(model.state_dict(), strict=False).missing_keys
    encoder = LayeredEncoder(model)
    state = encoder.embed(**inputs)
    for index in range(1, depth + 1):
        state = encoder.run_layer(index, state)
    logits = encoder.classify(encoder.output(state), state.attention_mask)
    torch.testing.assert_close(logits, shallow(**inputs).logits, **TOLERANCE)


def test_inner_layers_of_an_albert_group_count_as_one_layer() -> None:
    settings = BERT_SIZES | {"embedding_size": 16, "num_hidden_groups": 2, "inner_group_num": 2}
    model = randomise(AutoModel.from_config(AutoConfig.for_model("albert", **settings)))
    encoder, inputs = LayeredEncoder(model), batch("albert")
    assert encoder.num_layers == NUM_LAYERS
    assert encoder.layer(1) is encoder.layer(2)
    assert encoder.layer(2) is not encoder.layer(3)
    expected = model(**inputs).last_hidden_state
    torch.testing.assert_close(run(encoder, encoder.embed(**inputs)).hidden_states, expected, **TOLERANCE)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_selection_keeps_the_rows_and_drops_common_padding(data: st.DataObject) -> None:
    lengths = tuple(data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=6)))
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=8))
    encoder, inputs = LayeredEncoder(build("bert", "sdpa")), batch("bert", lengths)
    state = encoder.embed(**inputs)
    selected = encoder.select(state, torch.tensor(rows, dtype=torch.long))
    tokens = max(lengths[row] for row in rows)
    assert torch.equal(selected.attention_mask, inputs["attention_mask"][rows, :tokens])
    assert torch.equal(selected.hidden_states, state.hidden_states[rows, :tokens])
    assert run(encoder, selected).hidden_states.shape == (len(rows), tokens, encoder.hidden_size)


def test_one_column_remains_of_rows_without_tokens() -> None:
    encoder, inputs = LayeredEncoder(build("bert", "sdpa")), batch("bert", (3, 0))
    assert encoder.select(encoder.embed(**inputs), torch.tensor([1])).attention_mask.tolist() == [[0]]


def test_padding_on_the_left_is_not_dropped() -> None:
    encoder = LayeredEncoder(build("bert", "sdpa"))
    inputs = {key: value.flip(1) for key, value in batch("bert").items()}
    selected = encoder.select(encoder.embed(**inputs), torch.tensor([2]))
    assert torch.equal(selected.attention_mask, inputs["attention_mask"][[2]])


def test_the_view_owns_nothing_and_follows_its_model() -> None:
    model, inputs = copy.deepcopy(build("bert", "sdpa")), batch("bert")
    encoder = LayeredEncoder(model)
    before = run(encoder, encoder.embed(**inputs)).hidden_states
    assert encoder.layer(2) is model.bert.encoder.layer[1]
    randomise(model).bert.encoder.layer[3].output.dense.weight.data.zero_()
    after = run(encoder, encoder.embed(**inputs)).hidden_states
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, model.bert(**inputs).last_hidden_state, **TOLERANCE)


def test_an_unsupported_family_is_refused_with_the_supported_ones() -> None:
    config = AutoConfig.for_model("gpt2", n_embd=8, n_layer=1, n_head=1, vocab_size=10, n_positions=8)
    with pytest.raises(InputError) as error:
        LayeredEncoder(AutoModel.from_config(config))
    assert "gpt2" in str(error.value)
    assert all(family in str(error.value) for family in SUPPORTED_FAMILIES)


def test_a_decoder_is_refused() -> None:
    config = AutoConfig.for_model("bert", **BERT_SIZES, is_decoder=True)
    with pytest.raises(InputError, match="decoder"):
        LayeredEncoder(AutoModel.from_config(config))


@pytest.mark.parametrize("name", CASES)
def test_a_base_encoder_runs_but_cannot_classify(name: str) -> None:
    base, inputs = build(name, "eager").base_model, batch(name)
    encoder = LayeredEncoder(base)
    state = run(encoder, encoder.embed(**inputs))
    torch.testing.assert_close(encoder.output(state), base(**inputs).last_hidden_state, **TOLERANCE)
    with pytest.raises(InputError, match="AutoModelForSequenceClassification"):
        encoder.classify(encoder.output(state), state.attention_mask)


@pytest.mark.parametrize("index", [0, -1, NUM_LAYERS + 1])
def test_layers_are_numbered_from_one(index: int) -> None:
    encoder = LayeredEncoder(build("bert", "sdpa"))
    state = encoder.embed(**batch("bert"))
    with pytest.raises(InputError, match=f"no layer {index}"):
        encoder.layer(index)
    with pytest.raises(InputError, match=f"no layer {index}"):
        encoder.run_layer(index, state)
