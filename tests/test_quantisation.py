"""int8 graphs: near the float ones, and the same for a text alone, in any batch and beside any neighbour."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import GraphProto, TensorProto, helper, numpy_helper
from transformers import AutoTokenizer

from alembert import AdaptiveClassifier, Task
from alembert.runtime.export import export_classifier
from alembert.runtime.quantisation import (
    LARGEST_SPREAD,
    InputRange,
    measure_ranges,
    quantise,
    quantise_products,
    random_inputs,
    to_int8,
)

ROWS, TOKENS, WIDTH = 4, 6, 32
RNG = np.random.default_rng(0)
WEIGHTS = {
    "w": RNG.normal(size=(WIDTH, 16)).astype(np.float32),
    "b": RNG.normal(size=16).astype(np.float32),
    "v": RNG.normal(size=(WIDTH, 8)).astype(np.float32),
}
OUTPUTS = {"with_bias": 16, "bare": 8, "again": 16}


def two_products() -> onnx.ModelProto:
    """x·w + b, x·v and (2x)·w + x·w, where x·w is made anew."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["xw"]),
        helper.make_node("Add", ["xw", "b"], ["with_bias"]),
        helper.make_node("MatMul", ["x", "v"], ["bare"]),
        helper.make_node("Add", ["x", "x"], ["xx"]),
        helper.make_node("MatMul", ["xx", "w"], ["xxw"]),
        helper.make_node("MatMul", ["x", "w"], ["xw_2"]),
        helper.make_node("Add", ["xxw", "xw_2"], ["again"]),
    ]
    graph = helper.make_graph(
        nodes,
        "products",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", "tokens", WIDTH]),
            helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["rows", "tokens"]),
        ],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", "tokens", width])
            for name, width in OUTPUTS.items()
        ],
        [numpy_helper.from_array(values, name) for name, values in WEIGHTS.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def run(model: onnx.ModelProto | Path, x: np.ndarray) -> dict[str, np.ndarray]:
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    session = onnxruntime.InferenceSession(source)
    feeds = {"x": x, "attention_mask": np.ones(x.shape[:2], np.int64)}
    names = [entry.name for entry in session.get_inputs()]
    return dict(zip(OUTPUTS, session.run(list(OUTPUTS), {name: feeds[name] for name in names}), strict=True))


def operators(graph: GraphProto) -> list[str]:
    return [node.op_type for node in graph.node]


def some_tokens(large: float) -> np.ndarray:
    """Tokens of unit size, but for one that is `large`."""
    values = RNG.normal(size=(ROWS, TOKENS, WIDTH)).astype(np.float32)
    values[1, 2] *= large
    return values


@pytest.mark.parametrize(("spread", "scaled"), [(1.0, False), (LARGEST_SPREAD + 0.1, True)])
def test_products_of_integers_are_close_and_know_no_neighbours(spread: float, scaled: bool) -> None:
    model, x = two_products(), some_tokens(1.0)
    expected = run(model, x)
    span = float(np.abs(x).max())
    quantise_products(
        model.graph, {"x": InputRange(-span, span, spread), "xx": InputRange(-2 * span, 2 * span, spread)}
    )
    assert operators(model.graph).count("MatMulIntegerToFloat") == 4
    # Inputs and matrices that several products share are made once; a constant range needs no further node.
    assert operators(model.graph).count("QuantizeLinear") == 2
    assert ("ReduceMax" in operators(model.graph)) == scaled
    assert operators(model.graph).count("Add") == (3 if scaled else 2)
    answers = run(model, x)
    for name, values in answers.items():
        assert 0 < np.abs(values - expected[name]).max() < 0.04 * np.abs(expected[name]).max()
        alone = np.concatenate([run(model, x[row : row + 1])[name] for row in range(ROWS)])
        np.testing.assert_array_equal(values, alone)
    crowd = x.copy()
    crowd[1:] *= 1000
    for name, values in run(model, crowd).items():
        np.testing.assert_array_equal(values[0], answers[name][0])
        if scaled:
            np.testing.assert_allclose(
                values[1:], 1000 * (answers[name][1:] - bias(name)) + bias(name), rtol=1e-3
            )


def bias(name: str) -> np.ndarray | float:
    return WEIGHTS["b"] if name == "with_bias" else 0.0


def test_a_token_of_zeros_stays_finite() -> None:
    model = two_products()
    quantise_products(model.graph, {name: InputRange(-1, 1, 100) for name in ("x", "xx")})
    answers = run(model, np.zeros((1, 2, WIDTH), np.float32))
    np.testing.assert_array_equal(answers["bare"], 0)
    np.testing.assert_allclose(answers["with_bias"], np.broadcast_to(WEIGHTS["b"], (1, 2, 16)))


def test_ranges_are_measured_on_tokens_alone(tmp_path: Path) -> None:
    source = tmp_path / "float.onnx"
    onnx.save(two_products(), source)
    x, mask = some_tokens(10.0), np.ones((ROWS, TOKENS), np.int64)
    x[0, -1], mask[0, -1] = 1e6, 0
    sample = {"x": x, "attention_mask": mask}
    ranges, outputs = measure_ranges(source, tmp_path / "scratch.onnx", [sample, sample])
    tokens = x[mask == 1]
    magnitudes = np.abs(tokens).max(-1)
    for name, factor in (("x", 1), ("xx", 2)):
        assert ranges[name].low == pytest.approx(factor * tokens.min())
        assert ranges[name].high == pytest.approx(factor * tokens.max())
        assert ranges[name].spread == pytest.approx(magnitudes.max() / np.median(magnitudes))
    np.testing.assert_allclose(outputs[1]["bare"], x @ WEIGHTS["v"], rtol=1e-4, atol=1e-2)
    quantise(source, tmp_path / "int8.onnx", [sample])
    assert "ReduceMax" in operators(onnx.load(tmp_path / "int8.onnx").graph)
    assert not {"w", "v"} & {t.name for t in onnx.load(tmp_path / "int8.onnx").graph.initializer}


@pytest.mark.parametrize(("axis", "largest"), [(0, 127), (1, 127), (0, 64)])
def test_to_int8(axis: int, largest: int) -> None:
    values = RNG.normal(size=(7, 5)).astype(np.float32)
    values[2], values[:, 1] = 0, 0
    rounded, scales = to_int8(values, axis, largest)
    assert rounded.dtype == np.int8 and scales.dtype == np.float32
    assert np.abs(rounded).max() == largest
    assert (np.abs(rounded * scales - values) <= scales / 2 + 1e-7).all()


@pytest.mark.parametrize("is_pair", [False, True])
def test_random_texts_are_whole_texts(tiny_encoder: Path, is_pair: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    batches = random_inputs(tokenizer, 20, is_pair=is_pair)
    lengths = np.concatenate([batch["attention_mask"].sum(1) for batch in batches])
    assert (len(lengths), lengths.min()) == (32, 5 if is_pair else 3)
    assert 18 <= lengths.max() <= 20
    for batch in batches:
        for ids, mask, kinds in zip(
            *(batch[n] for n in ("input_ids", "attention_mask", "token_type_ids")), strict=True
        ):
            count = int(mask.sum())
            assert ids[0] == tokenizer.cls_token_id and ids[count - 1] == tokenizer.sep_token_id
            assert list(ids).count(tokenizer.sep_token_id) == 1 + is_pair
            assert (ids[count:] == tokenizer.pad_token_id).all() and kinds.max() == is_pair
            assert ids.max() < len(tokenizer)
    again = random_inputs(tokenizer, 20, is_pair=is_pair)
    np.testing.assert_array_equal(batches[2]["input_ids"], again[2]["input_ids"])


def test_a_text_gets_the_same_answer_in_any_company(fast: Path, tmp_path: Path, task: Task) -> None:
    export_classifier(fast, tmp_path / "int8")
    export_classifier(fast, tmp_path / "fp32", precision="fp32")
    classifier = AdaptiveClassifier.from_pretrained(tmp_path / "int8")
    exact = AdaptiveClassifier.from_pretrained(tmp_path / "fp32")
    texts = [*task.dataset("test")["text"][:12], "rain", " ".join(["goal soup"] * 14)]
    for speed in (0.0, 0.6):
        alone = np.concatenate([classifier.predict_proba([text], speed=speed) for text in texts])
        exits = [classifier.predict(text, speed=speed).exit for text in texts]
        for budget in (64, 4096):
            classifier.batch_tokens = budget
            np.testing.assert_allclose(classifier.predict_proba(texts, speed=speed), alone, rtol=0, atol=1e-6)
            assert [answer.exit for answer in classifier.predict(texts, speed=speed)] == exits
    difference = np.abs(classifier.predict_proba(texts, speed=0) - exact.predict_proba(texts, speed=0))
    assert 0 < difference.max() < 0.05
