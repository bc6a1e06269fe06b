from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from alembert.benchmarks.flops import CostModel, fastbert_head_macs, layer_macs
from alembert.common.errors import InputError
from alembert.models.exit_heads import EXIT_HEADS
from alembert.models.multi_exit import MultiExitModel

LAYER, HEAD = 905_969_664, 20_987_904

SIZES = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "num_labels": 3,
}
FAMILIES = {
    "bert": {},
    "ernie": {},
    "roberta": {},
    "electra": {"embedding_size": 10},
    "distilbert": {
        "dim": 24, "hidden_dim": 40, "n_layers": 3, "n_heads": 2,
        "vocab_size": 50, "pad_token_id": 0, "num_labels": 3,
    },
    "albert": {"embedding_size": 10},
    "mpnet": {},
    "deberta-v2": {"relative_attention": True, "position_buckets": 4, "pos_att_type": ["c2p", "p2c"]},
    "modernbert": {
        "global_attn_every_n_layers": 2, "local_attention": 4,
        "bos_token_id": 1, "cls_token_id": 1, "eos_token_id": 2, "sep_token_id": 2,
    },
}  # fmt: skip


def tiny(
    family: str, attention: str, auto_class: type = AutoModelForSequenceClassification
) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = FAMILIES[family] if family == "distilbert" else SIZES | FAMILIES[family]
    config = AutoConfig.for_model(family, **sizes)
    return auto_class.from_config(config, attn_implementation=attention).eval()


def counted_macs(model: torch.nn.Module, rows: int, length: int) -> float:
    """Half the FLOPs that torch counts in one forward pass; the math backend shows it every product."""
    input_ids = torch.randint(3, 50, (rows, length))
    counter = FlopCounterMode(display=False)
    model.requires_grad_(False)  # the counter's hooks ask every input for its gradient function
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
    return counter.get_total_flops() / 2


def bert_base(exit_layers: tuple[int, ...] = ()) -> CostModel:
    """BERT-base with FastBERT heads, the final one included, without memory for its weights."""
    with torch.device("meta"):
        encoder = AutoModel.from_config(AutoConfig.for_model("bert"))
        return CostModel.from_model(
            MultiExitModel.from_full_model(encoder, exit_layers=exit_layers, final_head="fastbert")
        )


def test_closed_forms_give_the_published_integers() -> None:
    assert layer_macs(128, 768, 3072) == LAYER
    assert fastbert_head_macs(128, 768) == HEAD


def test_full_bert_base_costs_what_fastbert_and_ms_bert_print() -> None:
    model = bert_base()
    assert 2 * model.full_model_macs(128) == 21_785_247_744
    assert model.full_model_macs(128) / 1e6 == pytest.approx(10_892.62, abs=0.01)
    assert model.full_model_macs(256) / 1e6 == pytest.approx(21_785.23, abs=0.01)
    assert model.full_model_macs([7, 300], fixed_length=128).tolist() == [21_785_247_744 / 2] * 2


def test_every_second_exit_costs_what_ms_berts_table_implies() -> None:
    model = bert_base((1, 3, 5, 7, 9, 11))
    assert model.macs(1, 256) / 1e6 == pytest.approx(1854, abs=0.5)
    assert model.macs(3, 128) == 3 * LAYER + 2 * HEAD
    assert model.macs(12, 128) / 1e6 == pytest.approx(11_019, abs=0.5)
    # The share of texts that leave at layer 1 explains 1204M: it lies between one and two layers.
    assert model.macs(1, 128) / 1e6 < 1204 < 2 * LAYER / 1e6


def test_last_six_and_all_exits() -> None:
    last = bert_base(tuple(range(6, 12)))
    assert last.macs(6, 128) / 1e6 == pytest.approx(5457, abs=0.5)
    assert bert_base(tuple(range(1, 12))).macs(12, 128) / 1e6 == pytest.approx(11_123.5, abs=0.1)


def test_a_stock_head_counts_its_first_token_without_the_labels() -> None:
    with torch.device("meta"):
        config = AutoConfig.for_model("bert", num_hidden_layers=6, num_labels=5)
        model = CostModel.from_model(AutoModelForSequenceClassification.from_config(config))
    # BERT-EMD prints 5436M for six layers, plus 0.6M of BERT's pooler.
    assert model.full_model_macs(128) == 6 * LAYER + 768**2
    assert model.full_model_macs(128, "full") == 6 * (LAYER + 2 * 128**2 * 768) + 768**2 + 768 * 5
    assert [row["head"] for row in model.table(128)] == ["stock"]


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        *((family, "eager") for family in FAMILIES),
        ("bert", "sdpa"),
        ("distilbert", "sdpa"),
        ("modernbert", "sdpa"),
    ],
)
def test_full_convention_agrees_with_torchs_counter(family: str, attention: str) -> None:
    model = tiny(family, attention)
    cost = CostModel.from_model(model)
    for length in (5, 12):
        # One more text in the batch: what a batch pays once whatever its texts is no text's cost.
        expected = counted_macs(model, 2, length) - counted_macs(model, 1, length)
        assert cost.full_model_macs(length, "full") == expected


def test_a_base_encoder_has_no_head() -> None:
    model = CostModel.from_model(tiny("bert", "eager", AutoModel))
    assert model.full_model_macs(10, "full") == 3 * (10 * (4 * 24**2 + 2 * 24 * 40) + 2 * 10**2 * 24)


@pytest.mark.parametrize("kind", EXIT_HEADS)
def test_exits_agree_with_torchs_counter(kind: str) -> None:
    model = MultiExitModel.from_full_model(
        tiny("bert", "eager"), exit_layers=(1, 2), exit_head=kind, exit_head_size=8
    ).eval()
    cost = CostModel.from_model(model)
    assert cost.macs(3, 9, "full") == counted_macs(model, 1, 9)
    assert [row["head"] for row in cost.table(9)] == [kind, kind, "stock"]


def test_costs_of_a_batch_add_up_part_by_part() -> None:
    model = MultiExitModel.from_full_model(tiny("bert", "eager"), exit_layers=(1, 2), exit_head="pooled")
    cost = CostModel.from_model(model)
    exits, lengths = np.array([1, 2, 3, 3]), np.array([4, 7, 5, 11])
    layer, head = 4 * 24**2 + 2 * 24 * 40, 24**2
    heads = np.array([1, 2, 3, 3])  # the stock head's pooler is as large
    np.testing.assert_array_equal(cost.macs(exits, lengths), exits * lengths * layer + heads * head)
    np.testing.assert_array_equal(
        cost.macs(exits, lengths, fixed_length=16), exits * 16 * layer + heads * head
    )
    np.testing.assert_array_equal(
        cost.macs([2, 3], [7, 5], active_exits=(2,)), [14 * layer + head, 15 * layer + 2 * head]
    )
    np.testing.assert_array_equal(cost.macs(3, [5, 11], active_exits=()), cost.full_model_macs([5, 11]))


def test_table_of_exits() -> None:
    rows = bert_base((1, 6)).table(128)
    assert [row["layer"] for row in rows] == [1, 6, 12]
    assert [row["macs"] for row in rows] == [LAYER + HEAD, 6 * LAYER + 2 * HEAD, 12 * LAYER + 3 * HEAD]
    assert all(row["flops"] == 2 * row["macs"] for row in rows)
    assert rows[0]["speedup"] == pytest.approx((12 * LAYER + HEAD) / (LAYER + HEAD))
    assert rows[-1]["speedup"] < 1


def test_unknown_exits_and_conventions_are_refused() -> None:
    model = bert_base((1, 6))
    with pytest.raises(InputError, match=r"layer 3.*\[1, 6, 12\]"):
        model.macs([1, 3], 128)
    with pytest.raises(InputError, match="layer 1"):
        model.macs(1, 128, active_exits=(6,))
    with pytest.raises(InputError, match="layer 5"):
        model.macs(12, 128, active_exits=(5,))
    with pytest.raises(InputError, match="paper, full"):
        model.macs(12, 128, "thop")  # type: ignore[arg-type]
