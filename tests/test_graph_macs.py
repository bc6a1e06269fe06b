"""What exported graphs compute, counted on the graphs, against the counts spelled out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from alembert.benchmarks.flops import Polynomial
from alembert.benchmarks.graph_macs import GraphCosts, graph_macs
from alembert.benchmarks.pruning import segment_macs
from alembert.runtime.export import export_classifier

D, FF, HEAD, LABELS = 32, 64, 32, 3
LAYER = Polynomial(0, 4 * D**2 + 2 * D * FF, 2 * D)
# The first token's query in each of two heads, the maps after the sum of values as one, the labels; of every token
# the projection, and its products with the queries and with the weights.
FOLDED = Polynomial(2 * HEAD**2 + 2 * HEAD**2 + HEAD * LABELS, D * HEAD + 2 * 2 * HEAD, 0)
# Keys and values of every token; the rest of the layer, and the pooled head, for the first one.
LAST = Polynomial(D**2 + D**2 + 2 * D * FF + D**2 + D * LABELS, 2 * D**2 + 2 * D, 0)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_graphs_of_an_export_are_counted_as_they_are(fast: Path, tmp_path: Path, precision: str) -> None:
    folder = tmp_path / precision
    export_classifier(fast, folder, precision=precision, exits=(1, 3), count_macs=segment_macs)
    costs = GraphCosts.of_export(folder)
    assert costs is not None
    heads = {layer: _without_mistakes(cost) for layer, cost in costs.heads.items()}
    assert heads == {1: FOLDED, 3: FOLDED}
    twice = Polynomial(*(2 * part for part in LAYER))
    assert costs.bodies == {1: LAYER, 3: twice, 4: LAST}
    exits, lengths = np.array([1, 3, 4, 4]), np.array([5, 9, 9, 40])
    expected = [
        sum(LAYER.at_length(n) for _ in range(min(left, 3))) + (LAST.at_length(n) if left == 4 else 0)
        for left, n in zip(exits.tolist(), lengths.tolist(), strict=True)
    ]
    np.testing.assert_array_equal(costs.macs(exits, lengths, ()), expected)
    head = [costs.heads[1].at_length(n) for n in lengths.tolist()]
    np.testing.assert_array_equal(costs.macs(exits, lengths, (1,)), np.add(expected, head))
    with_both = np.add(expected, head) + np.where(exits >= 3, head, 0)
    np.testing.assert_array_equal(costs.macs(exits, lengths, (1, 3)), with_both)


def _without_mistakes(cost: Polynomial) -> Polynomial:
    """Less the learned exit's one product with the first token's hidden state."""
    return cost._replace(constant=cost.constant - D)


def test_what_cannot_be_counted_is_not_known(tmp_path: Path) -> None:
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["rows", "tokens"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Einsum", ["x", "x"], ["logits"], equation="rt,rt->r"),
    ]
    path = tmp_path / "graph.onnx"

    def write() -> None:
        graph = helper.make_graph(nodes, "g", [ids], [logits])
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)

    write()
    assert graph_macs(path, D) is None
    nodes[1] = helper.make_node("Gemm", ["x", "x"], ["logits"], transA=1)
    write()
    # (tokens × rows) times (rows × tokens).
    assert graph_macs(path, D) == Polynomial(0, 0, 1)
