"""Students of every family: sizes, what they take over from the teacher, and what is refused."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedModel,
)

from alembert.common.errors import InputError
from alembert.models.families import FAMILIES
from alembert.models.layered import SUPPORTED_FAMILIES
from alembert.models.loading import load_classifier
from alembert.models.multi_exit import MultiExitModel
from alembert.models.student_configuration import parse_shape, usable_heads
from alembert.models.students import build_student, describe_student, encoder_of
from alembert.models.vocabulary import check_vocabulary

LABELS = ("no", "maybe", "yes")
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 50,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
    "id2label": dict(enumerate(LABELS)),
    "label2id": {name: index for index, name in enumerate(LABELS)},
}
DEBERTA = {
    "relative_attention": True,
    "position_buckets": 4,
    "pos_att_type": "p2c|c2p",
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
}
# A family's name, and what its case departs in from the sizes above.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("bert", "camembert", "mpnet", "roberta", "xlm-roberta")},
    "ernie": ("ernie", {"use_task_id": True}),
    "electra": ("electra", {"embedding_size": 32}),
    "electra-projected": ("electra", {"embedding_size": 16}),
    "distilbert": ("distilbert", {"hidden_dim": 48}),
    "albert": ("albert", {"embedding_size": 16}),
    "albert-groups": ("albert", {"embedding_size": 16, "num_hidden_groups": 2}),
    "deberta-v2": ("deberta-v2", DEBERTA | {"conv_kernel_size": 3, "position_biased_input": False}),
    "deberta-v3": ("deberta-v2", DEBERTA | {"type_vocab_size": 2}),
    "modernbert": ("modernbert", {"local_attention": 4}),
}
IDS = torch.tensor([[4, 7, 9, 12, 3, 8, 22], [4, 30, 41, 3, 1, 1, 1]])
INPUTS = {"input_ids": IDS, "attention_mask": (IDS != 1).long()}


@cache
def teacher_of(case: str, auto_class: Any = AutoModelForSequenceClassification) -> PreTrainedModel:
    family, settings = CASES[case]
    model = auto_class.from_config(AutoConfig.for_model(family, **(SIZES | settings)))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.3, 0.2, generator=generator)
    return model.eval()


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model.eval()(**INPUTS).logits


def refused(*parts: str, **arguments: Any) -> None:
    arguments = {"student": "2x32", "teacher": teacher_of("bert"), "label_names": LABELS} | arguments
    with pytest.raises(InputError) as caught:
        build_student(arguments.pop("student"), arguments.pop("teacher"), **arguments)
    missing = [part for part in parts if part not in str(caught.value)]
    assert not missing, str(caught.value)


def test_shapes() -> None:
    assert parse_shape("4x312") == (4, 312)
    for text in ("4", "4x", "0x312", "4x312x2", "big", "-4x312"):
        with pytest.raises(InputError, match=r"4x312 or 6x768"):
            parse_shape(text)


def test_sizes_of_published_students() -> None:
    with torch.device("meta"):
        base = BertModel(BertConfig())
        tiny = build_student("4x312", base, task_head="encoder")
        six = build_student("6x768", base, task_head="encoder")
        large = build_student("3x312", BertModel(BertConfig(num_attention_heads=16, hidden_size=1024)))
    # Embeddings with their norm; attention, feed-forward and two norms per layer; pooler.
    d, ffn = 312, 1200
    layer = 4 * (d * d + d) + (d * ffn + ffn) + (ffn * d + d) + 4 * d
    assert (30522 + 512 + 2) * d + 2 * d + 4 * layer + d * d + d == 14_350_248
    assert describe_student(tiny) == {
        "model_type": "bert",
        "layers": 4,
        "hidden_size": 312,
        "heads": 12,
        "intermediate_size": 1200,
        "parameters": 14_350_248,
    }
    described = describe_student(six)
    assert (described["heads"], described["intermediate_size"]) == (12, 3072)
    assert described["parameters"] == 66_955_008
    assert describe_student(large)["heads"] == 13  # 16 does not divide 312


def test_every_family_has_a_case() -> None:
    assert {family for family, _ in CASES.values()} == set(SUPPORTED_FAMILIES)


@pytest.mark.parametrize("case", CASES)
def test_shape_of_every_family_survives_saving(case: str, tmp_path: Path) -> None:
    teacher = teacher_of(case)
    student = build_student("3x24", teacher, label_names=LABELS, initialise="embeddings", seed=1)
    assert type(student) is type(teacher)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    described = describe_student(student)
    assert (described["layers"], described["hidden_size"], described["heads"]) == (3, 24, 4)
    assert described["intermediate_size"] == 36  # one and a half times the width, as in the teacher
    assert FAMILIES[student.config.model_type](student).num_layers == 3
    assert student.config.num_labels == 3 and student.config.problem_type == "single_label_classification"
    student.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), logits(student), rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_student_of_all_layers_is_the_teacher(case: str, tmp_path: Path) -> None:
    teacher = teacher_of(case)
    student = build_student("4x32", teacher, label_names=LABELS, initialise="layers", seed=1)
    torch.testing.assert_close(logits(student), logits(teacher), rtol=0, atol=1e-6)
    student.save_pretrained(tmp_path)
    torch.testing.assert_close(
        logits(AutoModelForSequenceClassification.from_pretrained(tmp_path)), logits(teacher)
    )


@pytest.mark.parametrize("case", [case for case in CASES if case != "modernbert"])
def test_chosen_layers_are_the_teachers(case: str) -> None:
    teacher = teacher_of(case)
    student = build_student(
        "3x32", teacher, label_names=LABELS, initialise="layers", init_layers=(1, 3, 4), seed=1
    )
    ours, theirs = (FAMILIES[model.config.model_type](model) for model in (student, teacher))
    for layer, source in enumerate((1, 3, 4), start=1):
        state = theirs.layer(source).state_dict()
        assert all(torch.equal(value, state[key]) for key, value in ours.layer(layer).state_dict().items())


def test_modernbert_layers_keep_their_attention_type() -> None:
    teacher = teacher_of("modernbert")
    student = build_student(
        "3x32", teacher, label_names=LABELS, initialise="layers", init_layers=(2, 3, 4), seed=1
    )
    assert student.config.layer_types == teacher.config.layer_types[1:]
    ours, theirs = student.model.layers, teacher.model.layers
    assert torch.equal(ours[0].mlp.Wi.weight, theirs[1].mlp.Wi.weight)
    assert torch.equal(ours[2].attn_norm.weight, theirs[3].attn_norm.weight)
    assert torch.isfinite(logits(student)).all()


def test_albert_gets_as_many_groups_as_its_layers_need() -> None:
    teacher = teacher_of("albert-groups")  # layers 1 and 2, and layers 3 and 4, share weights

    def groups(layers: tuple[int, ...]) -> int:
        student = build_student(
            f"{len(layers)}x32", teacher, label_names=LABELS, initialise="layers", init_layers=layers
        )
        return student.config.num_hidden_groups

    assert groups((1, 2)) == 1
    assert groups((1, 4)) == 2
    assert groups((1, 2, 3)) == 2
    assert groups((1, 3, 4)) == 3


def test_default_layers_are_spread() -> None:
    teacher = teacher_of("bert")
    student = build_student("2x32", teacher, label_names=LABELS, initialise="layers")
    for layer, source in ((0, 0), (1, 3)):
        assert torch.equal(
            student.bert.encoder.layer[layer].output.dense.weight,
            teacher.bert.encoder.layer[source].output.dense.weight,
        )


def test_head_is_copied_only_for_the_same_labels() -> None:
    teacher = teacher_of("bert")
    same = build_student("2x32", teacher, label_names=LABELS, initialise="layers")
    other = build_student("2x32", teacher, label_names=("a", "b", "c"), initialise="layers")
    fewer = build_student("2x32", teacher, label_names=("a", "b"), initialise="layers")
    assert torch.equal(same.classifier.weight, teacher.classifier.weight)
    assert not torch.equal(other.classifier.weight, teacher.classifier.weight)
    assert fewer.classifier.weight.shape == (2, 32)
    assert torch.equal(other.bert.pooler.dense.weight, teacher.bert.pooler.dense.weight)


def test_regression_student_has_one_output() -> None:
    student = build_student("2x32", teacher_of("bert"))
    assert student.config.num_labels == 1 and student.config.problem_type == "regression"


@pytest.mark.parametrize(
    "case", ["bert", "roberta", "distilbert", "albert", "electra-projected", "deberta-v3"]
)
def test_masked_language_model_takes_over_the_head(case: str) -> None:
    teacher = teacher_of(case, AutoModelForMaskedLM)
    student = build_student("4x32", teacher, task_head="masked_lm", initialise="layers", seed=1)
    torch.testing.assert_close(logits(student), logits(teacher), rtol=0, atol=1e-5)


def test_encoder_from_masked_language_model_has_a_fresh_pooler() -> None:
    teacher = teacher_of("bert", AutoModelForMaskedLM)
    student = build_student("4x32", teacher, task_head="encoder", initialise="layers", seed=1)
    with torch.no_grad():
        expected = teacher.bert(**INPUTS).last_hidden_state
        torch.testing.assert_close(student.eval()(**INPUTS).last_hidden_state, expected)
    assert isinstance(student, BertModel) and student.pooler is not None


def test_multi_exit_teacher_stands_for_its_full_model() -> None:
    teacher = teacher_of("bert")
    wrapped = MultiExitModel.from_full_model(teacher, exit_layers=(1, 2))
    student = build_student("4x32", wrapped, label_names=LABELS, initialise="layers")
    torch.testing.assert_close(logits(student), logits(teacher))
    own_head = MultiExitModel.from_full_model(teacher.base_model, final_head="fastbert")
    student = build_student("4x32", own_head, label_names=LABELS, initialise="layers")
    assert torch.equal(student.bert.pooler.dense.weight, teacher.bert.pooler.dense.weight)
    assert not torch.equal(student.classifier.weight, teacher.classifier.weight)
    assert encoder_of(wrapped) is teacher.bert


def test_seed_decides_the_weights_and_nothing_else() -> None:
    teacher, state = teacher_of("bert"), torch.get_rng_state()
    weights = [
        build_student("2x16", teacher, label_names=LABELS, seed=seed).bert.embeddings.word_embeddings.weight
        for seed in (1, 1, 2)
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_random_student_has_the_familys_initialisation() -> None:
    student = build_student("2x24", teacher_of("bert"), label_names=LABELS, seed=0)
    assert abs(float(student.bert.encoder.layer[0].output.dense.weight.detach().std()) - 0.02) < 0.003


def test_projected_embeddings_are_recovered_as_well_as_their_width_allows() -> None:
    teacher = teacher_of("bert")
    student = build_student("2x16", teacher, label_names=LABELS, initialise="embeddings", seed=0)
    tokens = teacher.bert.embeddings.word_embeddings.weight.detach().double()
    projected = student.bert.embeddings.word_embeddings.weight.detach().double()
    singular_values = torch.linalg.svdvals(tokens)
    optimal = float((singular_values[16:] ** 2).sum())
    back = torch.linalg.lstsq(projected, tokens).solution
    assert float(((projected @ back - tokens) ** 2).sum()) == pytest.approx(optimal, rel=1e-4)
    # Positions went through the same map as the tokens.
    components = torch.linalg.lstsq(tokens, projected).solution
    positions = teacher.bert.embeddings.position_embeddings.weight.detach().double()
    torch.testing.assert_close(
        student.bert.embeddings.position_embeddings.weight.detach().double(),
        positions @ components,
        rtol=0,
        atol=1e-5,
    )
    torch.testing.assert_close(components.T @ components, torch.eye(16).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_embeddings_of_equal_width_are_copied(case: str) -> None:
    teacher = teacher_of(case)
    student = build_student("2x32", teacher, label_names=LABELS, initialise="embeddings", seed=0)
    ours, theirs = (model.base_model.embeddings.state_dict() for model in (student, teacher))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    layers = [FAMILIES[model.config.model_type](model).layer(1) for model in (student, teacher)]
    own, source = ([p for p in layer.parameters() if p.dim() == 2] for layer in layers)
    assert not any(torch.equal(first, second) for first, second in zip(own, source, strict=True))


@pytest.mark.parametrize("case", ["albert", "electra-projected"])
def test_narrow_embeddings_keep_their_width(case: str) -> None:
    teacher = teacher_of(case)
    student = build_student("2x24", teacher, label_names=LABELS, initialise="embeddings", seed=0)
    assert student.config.embedding_size == 16
    ours, theirs = (model.get_input_embeddings().weight for model in (student, teacher))
    assert torch.equal(ours, theirs)


def test_full_electra_embeddings_stay_full() -> None:
    student = build_student("2x24", teacher_of("electra"), label_names=LABELS)
    assert student.config.embedding_size == 24


def test_heads_of_rotary_families_have_even_width() -> None:
    assert usable_heads(12, "bert") == [1, 2, 3, 4, 6, 12]
    assert usable_heads(12, "modernbert") == [1, 2, 3, 6]
    student = build_student("2x12", teacher_of("modernbert"), label_names=LABELS)
    assert student.config.num_attention_heads == 3
    refused("12", "4", "1, 2, 3, 6", student="2x12", teacher=teacher_of("modernbert"), heads=4)


def test_student_from_a_configuration(tmp_path: Path) -> None:
    teacher = teacher_of("bert")
    settings = SIZES | {"model_type": "bert", "num_hidden_layers": 2, "hidden_size": 16}
    settings = {key: value for key, value in settings.items() if "label" not in key}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    for source in (tmp_path, tmp_path / "config.json"):
        student = build_student(str(source), teacher, label_names=LABELS, initialise="embeddings")
        assert describe_student(student)["hidden_size"] == 16
    refused("hidden_size", "16", "32", student=str(tmp_path), initialise="layers")
    refused("config.json", student=str(tmp_path), heads=2)
    (tmp_path / "config.json").write_text(json.dumps(settings | {"vocab_size": 40}))
    refused("40", "50", "vocab_size", student=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(settings | {"model_type": "roberta"}))
    refused("roberta", "bert", student=str(tmp_path), initialise="embeddings")
    assert build_student(str(tmp_path), teacher, label_names=LABELS).config.model_type == "roberta"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    refused("gpt2", "supported", student=str(tmp_path))


def test_student_from_a_distilled_encoder(tmp_path: Path) -> None:
    teacher = teacher_of("bert")
    general = build_student("2x16", teacher, task_head="masked_lm", seed=3)
    encoder_of(general).save_pretrained(tmp_path / "encoder")
    general.save_pretrained(tmp_path / "masked")
    expected = general.bert.encoder.layer[1].output.dense.weight
    for folder in ("encoder", "masked"):
        for head, auto_class in (("classification", None), ("encoder", AutoModel), ("masked_lm", None)):
            student = build_student(
                str(tmp_path / folder), teacher, task_head=head, label_names=LABELS, seed=5
            )
            assert torch.equal(student.base_model.encoder.layer[1].output.dense.weight, expected)
            assert auto_class is None or isinstance(student, BertModel)
    again = build_student(str(tmp_path / "encoder"), teacher, label_names=LABELS, seed=5)
    assert again.config.id2label == dict(enumerate(LABELS))
    first = build_student(str(tmp_path / "encoder"), teacher, label_names=LABELS, seed=5)
    assert torch.equal(first.classifier.weight, again.classifier.weight)
    again.save_pretrained(tmp_path / "student")
    torch.testing.assert_close(logits(load_classifier(str(tmp_path / "student"))), logits(again))
    refused("weights", "embeddings", "4x312", student=str(tmp_path / "encoder"), initialise="embeddings")


def test_checkpoint_with_missing_weights_is_refused(tmp_path: Path) -> None:
    build_student("2x16", teacher_of("bert"), task_head="encoder").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    for head in ("classification", "encoder", "masked_lm"):
        refused("missing", "encoder.layer.2", student=str(tmp_path), task_head=head)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"heads": 5}, ("32", "5", "1, 2, 4, 8, 16, 32")),
        ({"intermediate_size": 0}, ("intermediate size 0",)),
        ({"student": "2x16", "initialise": "layers"}, ("hidden_size", "16", "32", "random or embeddings")),
        ({"initialise": "layers", "heads": 2}, ("num_attention_heads", "2", "4")),
        ({"initialise": "layers", "intermediate_size": 64}, ("intermediate_size", "64", "48")),
        ({"student": "6x32", "initialise": "layers"}, ("student of 6", "teacher of 4", "choose 1 to 4")),
        ({"initialise": "layers", "init_layers": (1, 5)}, ("1, 5", "1 to 4")),
        ({"initialise": "layers", "init_layers": (1, 2, 3)}, ("3 teacher layers", "2 student layers")),
        ({"init_layers": (1, 2)}, ("random", "layers")),
        ({"student": "2x64", "initialise": "embeddings"}, ("64", "32", "at random")),
        ({"student": "2x"}, ("4x312",)),
        ({"student": "no/such-model"}, ("no/such-model", "neither a folder")),
        ({"initialise": "magic"}, ("magic", "random, layers, embeddings")),
        ({"task_head": "tail"}, ("tail", "classification, encoder, masked_lm")),
    ],
)
def test_refused(arguments: dict[str, Any], parts: tuple[str, ...]) -> None:
    refused(*parts, **arguments)


def test_vocabularies_must_be_equal(tiny_encoder: Path) -> None:
    teacher = AutoTokenizer.from_pretrained(tiny_encoder)
    size = len(teacher)
    config = BertConfig(vocab_size=size)
    check_vocabulary("student", config, None, teacher)
    check_vocabulary("student", config, AutoTokenizer.from_pretrained(tiny_encoder), teacher)
    with pytest.raises(InputError, match=rf"7 tokens, the teacher's tokenizer has {size}.*4x312"):
        check_vocabulary("student", BertConfig(vocab_size=7), None, teacher)
    longer = AutoTokenizer.from_pretrained(tiny_encoder)
    longer.add_tokens(["zebra"])
    with pytest.raises(
        InputError, match=rf"vocabulary of {size + 1} tokens, the teacher one of {size}.*4x312"
    ):
        check_vocabulary("student", BertConfig(vocab_size=99), longer, teacher)
    other = AutoTokenizer.from_pretrained(tiny_encoder, cls_token="[SEP]")
    with pytest.raises(InputError, match=r"cls token has id 3 there and 2 in the teacher"):
        check_vocabulary("student", config, other, teacher)
