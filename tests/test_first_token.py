"""Graphs cut to the first token: the same answers, from less work."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from onnx import GraphProto, TensorProto, helper, numpy_helper

from alembert.runtime.first_token import keep_first_token
from alembert.runtime.graph_optimisation import infer_shapes

ROWS, TOKENS, WIDTH, HEADS = 3, 5, 8, 2
RNG = np.random.default_rng(0)


def weights(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


CONSTANTS = {
    "wq": weights(WIDTH, WIDTH),
    "wk": weights(WIDTH, WIDTH),
    "wv": weights(WIDTH, WIDTH),
    "wo": weights(WIDTH, WIDTH),
    "scale": weights(WIDTH),
    "bias": weights(WIDTH),
    "split": np.array([0, 0, HEADS, WIDTH // HEADS]),
    "join": np.array([0, 0, WIDTH]),
    "zero": np.array(0),
    "one": np.array(1),
}
ATTENTION = [
    *(
        node
        for name in "qkv"
        for node in (
            helper.make_node("MatMul", ["x", f"w{name}"], [name]),
            helper.make_node("Reshape", [name, "split"], [f"{name}_heads"]),
            helper.make_node(
                "Transpose",
                [f"{name}_heads"],
                [f"{name}_t"],
                perm=[0, 2, 3, 1] if name == "k" else [0, 2, 1, 3],
            ),
        )
    ),
    helper.make_node("MatMul", ["q_t", "k_t"], ["scores"]),
    helper.make_node("Add", ["scores", "mask"], ["masked"]),
    helper.make_node("Softmax", ["masked"], ["weights"], axis=-1),
    helper.make_node("MatMul", ["weights", "v_t"], ["context"]),
    helper.make_node("Transpose", ["context"], ["context_t"], perm=[0, 2, 1, 3]),
    helper.make_node("Reshape", ["context_t", "join"], ["joined"]),
    helper.make_node("MatMul", ["joined", "wo"], ["projected"]),
    helper.make_node("Add", ["projected", "x"], ["residual"]),
    helper.make_node("LayerNormalization", ["residual", "scale", "bias"], ["y"], axis=-1),
]


def layer(*extra: helper.OperatorSetIdProto, outputs: dict[str, list[str | int]]) -> GraphProto:
    return helper.make_graph(
        [*ATTENTION, *extra],
        "layer",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", "tokens", WIDTH]),
            helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["rows", 1, 1, "tokens"]),
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [
            numpy_helper.from_array(v if v.dtype == np.float32 else v.astype(np.int64), name)
            for name, v in CONSTANTS.items()
        ],
    )


def answers(graph: GraphProto) -> list[np.ndarray]:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    generator = np.random.default_rng(1)
    mask = np.zeros((ROWS, 1, 1, TOKENS), np.float32)
    mask[1, ..., 3:] = -1e9
    feeds = {"x": generator.normal(size=(ROWS, TOKENS, WIDTH)).astype(np.float32), "mask": mask}
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)


def cut(graph: GraphProto) -> int:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return keep_first_token(graph, infer_shapes(model))


def test_a_layer_read_at_its_first_token_computes_one_query() -> None:
    pick = helper.make_node("Gather", ["y", "zero"], ["first"], axis=1)
    outputs = {"first": ["rows", WIDTH]}
    before, graph = answers(layer(pick, outputs=outputs))[0], layer(pick, outputs=outputs)
    # All but keys and values: three operators each.
    assert cut(graph) == len(ATTENTION) - 6
    sliced = [node for node in graph.node if node.op_type == "Slice"]
    assert [node.input[0] for node in sliced] == ["x"]
    np.testing.assert_allclose(answers(graph)[0], before, atol=1e-5)


@pytest.mark.parametrize("index", ["zero", "one"])
def test_what_is_read_whole_stays_whole(index: str) -> None:
    pick = helper.make_node("Gather", ["y", index], ["first"], axis=1)
    outputs = {"first": ["rows", WIDTH], "y": ["rows", "tokens", WIDTH]}
    assert cut(layer(pick, outputs=outputs)) == 0
    only = layer(pick, outputs={"first": ["rows", WIDTH]})
    assert (cut(only) == 0) == (index == "one")


def test_a_tensor_that_a_second_reader_needs_whole_is_cut_for_the_first_alone() -> None:
    pick = helper.make_node("Gather", ["y", "zero"], ["first"], axis=1)
    outputs = {"first": ["rows", WIDTH], "joined": ["rows", "tokens", WIDTH]}
    before, graph = answers(layer(pick, outputs=outputs)), layer(pick, outputs=outputs)
    assert cut(graph) == 3
    assert {node.input[0] for node in graph.node if node.op_type == "Slice"} == {"x", "joined"}
    for got, expected in zip(answers(graph), before, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_unknown_shapes_leave_the_graph_alone() -> None:
    pick = helper.make_node("Gather", ["y", "zero"], ["first"], axis=1)
    assert keep_first_token(layer(pick, outputs={"first": ["rows", WIDTH]}), {}) == 0
