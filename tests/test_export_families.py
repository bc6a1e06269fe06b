"""Exported graphs of every family against the torch model: every exit, any shape, float32 and int8."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from alembert import AdaptiveClassifier
from alembert.models.bilstm import BilstmConfig, BilstmForSequenceClassification
from alembert.models.exit_heads import EXIT_HEADS, build_exit_head
from alembert.models.layered import SUPPORTED_FAMILIES
from alembert.models.multi_exit import MultiExitModel
from alembert.runtime.export import export_classifier, write_module
from alembert.runtime.segment_graph import (
    FoldedFastBertHead,
    head_modules,
    reads_token_types,
    segment_modules,
)
from test_layered import BERT_SIZES, CASES, NUM_LAYERS, PADDING, randomise

EXITS = (1, 3)
SHAPES = [(1,), (3,), (17,), (9, 4, 2, 7, 3), (17, 2, 5, 16, 3), (34, 1)]
TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@cache
def multi_exit(name: str) -> MultiExitModel:
    case = CASES[name]
    config = AutoConfig.for_model(case.family, **(BERT_SIZES | case.settings))
    stock = AutoModelForSequenceClassification.from_config(config)
    # Every kind of head with some families.
    head = EXIT_HEADS[list(CASES).index(name) % len(EXIT_HEADS)]
    return randomise(
        MultiExitModel.from_full_model(
            stock, exit_layers=EXITS, exit_head=head, exit_head_size=16, learned_exit=True
        )
    )


def inputs(lengths: tuple[int, ...], token_types: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(lengths))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(PADDING + 1, BERT_SIZES["vocab_size"], mask.shape, generator=generator)
    batch = {"input_ids": ids.where(mask.bool(), PADDING), "attention_mask": mask}
    if token_types:
        second = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None] // 2
        batch["token_type_ids"] = (second & mask.bool()).long()
    return batch


def export(
    model: PreTrainedModel, folder: Path, precision: str, token_types: bool
) -> list[onnxruntime.InferenceSession]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    exits, sessions = getattr(model, "exit_layers", ()), []
    segments, heads = segment_modules(model, exits, token_types), head_modules(model, exits)
    modules = [part for pair in zip(segments, heads.values(), strict=False) for part in pair] + segments[-1:]
    batch = {name: values.numpy() for name, values in inputs((17, 2, 5, 16, 3), token_types).items()}
    for number, module in enumerate(modules):
        path = folder / f"{number}.onnx"
        outputs = write_module(module, path, 32, precision, [batch])
        for given in outputs:
            batch["hidden_states"] = given.get("next_hidden_states", batch.get("hidden_states"))
        sessions.append(onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]))
        assert tuple(entry.name for entry in sessions[-1].get_inputs()) == module.input_names
        assert tuple(entry.name for entry in sessions[-1].get_outputs()) == module.output_names
    return sessions


def run(
    sessions: list[onnxruntime.InferenceSession], batch: dict[str, torch.Tensor]
) -> list[list[np.ndarray]]:
    feeds = {name: values.numpy() for name, values in batch.items()}
    answers = []
    for session in sessions:
        names = [entry.name for entry in session.get_inputs()]
        outputs = session.run(None, {name: feeds[name] for name in names})
        if session.get_outputs()[0].name == "next_hidden_states":
            (feeds["hidden_states"],) = outputs
        else:
            answers.append(outputs)
    return answers


def test_every_family_is_exported() -> None:
    assert {case.family for case in CASES.values()} == set(SUPPORTED_FAMILIES)


@pytest.mark.parametrize("name", CASES)
def test_every_exit_gives_the_torch_models_logits(name: str, tmp_path: Path) -> None:
    model = multi_exit(name)
    token_types = reads_token_types(model, TOKEN_INPUTS)
    assert token_types == (CASES[name].token_types and model.config.full_model_config().type_vocab_size > 1)
    sessions = export(model, tmp_path, "fp32", token_types)
    for lengths in SHAPES:
        batch = inputs(lengths, token_types)
        with torch.no_grad():
            expected = model(**batch)
        answers = run(sessions, batch)
        for index in range(len(EXITS)):
            logits, mistakes = answers[index]
            np.testing.assert_allclose(logits, expected.exit_logits[index], atol=1e-4)
            np.testing.assert_allclose(mistakes, expected.mistake_logits[index], atol=1e-4)
        np.testing.assert_allclose(answers[-1][0], expected.logits, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_one_graph_for_single_texts_decides_as_the_torch_model(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    multi_exit(name).save_pretrained(folder)
    words = [f"w{index}" for index in range(BERT_SIZES["vocab_size"])]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w0", pad_token=words[PADDING], model_max_length=32
    ).save_pretrained(folder)
    export_classifier(folder, tmp_path / "out", precision="fp32", merge_exits="all", policy="margin")
    exported, by_torch = (
        AdaptiveClassifier.from_pretrained(path, policy="margin") for path in (tmp_path / "out", folder)
    )
    generator = np.random.default_rng(5)
    texts = [" ".join(generator.choice(words[PADDING + 1 :], length)) for length in (1, 2, 5, 9, 17, 32)]
    uncertain = [by_torch.predict(text, speed=1.0).uncertainty for text in texts]
    speeds = [0.0, float(np.median([value for value in uncertain if value is not None])), 1.0]
    exits = set()
    for speed in speeds:
        for text in texts:
            found, expected = exported.predict(text, speed=speed), by_torch.predict(text, speed=speed)
            assert (found.label, found.exit) == (expected.label, expected.exit)
            assert found.score == pytest.approx(expected.score, abs=1e-4)
            assert found.uncertainty == (
                expected.uncertainty and pytest.approx(expected.uncertainty, abs=1e-4)
            )
            exits.add(found.exit)
    assert {1, NUM_LAYERS} <= exits
    assert exported.backend._merged is not None, "the segments answered"


@pytest.mark.parametrize("name", CASES)
def test_int8_stays_close(name: str, tmp_path: Path) -> None:
    model = multi_exit(name)
    token_types = reads_token_types(model, TOKEN_INPUTS)
    batch = inputs((17, 2, 5, 16, 3, 9, 11, 4), token_types)
    with torch.no_grad():
        expected = model(**batch)
    answers = run(export(model, tmp_path, "int8", token_types), batch)
    for logits, reference in zip(
        [answer[0] for answer in answers], [*expected.exit_logits, expected.logits], strict=True
    ):
        spread = float(reference.std())
        assert 0 < np.abs(logits - reference.numpy()).mean() < 0.1 * spread
        assert np.corrcoef(logits.ravel(), reference.numpy().ravel())[0, 1] > 0.98


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_bilstm_is_one_graph(precision: str, layers: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BilstmConfig(
        vocab_size=50,
        embedding_size=8,
        hidden_size=32,
        num_hidden_layers=layers,
        head_size=16,
        num_labels=3,
        pad_token_id=PADDING,
    )
    model = BilstmForSequenceClassification(config).eval()
    sessions = export(model, tmp_path, precision, token_types=False)
    assert len(sessions) == 1
    for lengths in [*SHAPES, (2, 9, 5)]:
        batch = inputs(lengths, token_types=False)
        with torch.no_grad():
            expected = model(**batch).logits
        atol = 1e-5 if precision == "fp32" else 0.02
        np.testing.assert_allclose(run(sessions, batch)[0][0], expected, atol=atol)


@pytest.mark.parametrize("labels", [1, 5])
def test_a_folded_head_is_the_head(labels: int) -> None:
    torch.manual_seed(labels)
    head = build_exit_head("fastbert", 12, labels, 8).eval()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.5)
    hidden_states = torch.randn(4, 6, 12)
    mask = (torch.arange(6) < torch.tensor([6, 1, 3, 5])[:, None]).long()
    with torch.no_grad():
        folded = FoldedFastBertHead(head)(hidden_states, mask)  # type: ignore[arg-type]
        torch.testing.assert_close(folded, head(hidden_states, mask), atol=1e-5, rtol=0)
