"""Multiply-accumulates that ONNX graphs really do, counted on the graphs themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alembert.benchmarks.flops import Polynomial
from alembert.runtime.manifest import HIDDEN_STATES, Head, Manifest, Segment

_PRODUCTS = (
    *("MatMul", "Gemm", "FusedMatMul", "FusedGemm", "MatMulInteger", "MatMulIntegerToFloat"),
    *("DynamicQuantizeMatMul", "QLinearMatMul", "MatMulNBits"),
)
"""Operators whose first input is (…, k) or, transposed, (…, k, rows): each number that they put out takes k MACs."""
_UNCOUNTED = (
    *("Attention", "QAttention", "MultiHeadAttention", "QMultiHeadAttention", "PackedAttention", "Einsum"),
    *("Conv", "ConvInteger", "QLinearConv", "FusedConv", "LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"),
)
"""Operators with products inside that their inputs' sizes do not tell."""
_LENGTHS = (3, 5, 8, 13)
"""Tokens of the texts that are tried: three determine the polynomial, the last one checks it."""


@dataclass(frozen=True)
class GraphCosts:
    """What a text costs in an exported model, as its graphs compute it.

    Attributes:
        bodies: of the layers up to each exit, the last with the full model's head, by exit layer, ascending.
        heads: of the exits' heads, by layer.
    """

    bodies: Mapping[int, Polynomial]
    heads: Mapping[int, Polynomial]

    @classmethod
    def of_export(cls, folder: str | Path) -> GraphCosts | None:
        """Counts the graphs of an exported folder; None where one of them cannot be counted."""
        folder = Path(folder)
        manifest = Manifest.read(folder)

        def count(graphs: Mapping[int, Segment | Head]) -> dict[int, Polynomial] | None:
            counts = {}
            for layer, graph in graphs.items():
                cost = graph_macs(folder / graph.file, manifest.hidden_size)
                if cost is None:
                    return None
                counts[layer] = cost
            return counts

        bodies = count({segment.exit_layer: segment for segment in manifest.segments})
        heads = count(manifest.heads)
        return None if bodies is None or heads is None else cls(bodies, heads)

    def macs(
        self, exit_layers: NDArray[Any], lengths: NDArray[Any], active_exits: Iterable[int]
    ) -> NDArray[np.float64]:
        """MACs per text, (rows,): bodies up to the exit, and the heads of the active exits on the way.

        Args:
            exit_layers, lengths: (rows,) of each text.
            active_exits: layers of the exits whose heads are run; speed 0 runs none.
        """
        tokens = np.asarray(lengths, np.float64)
        total = np.zeros(len(tokens))
        before = 0
        for layer, body in self.bodies.items():
            total += np.where(exit_layers > before, body.at(tokens), 0.0)
            before = layer
        for layer in active_exits:
            total += np.where(exit_layers >= layer, self.heads[layer].at(tokens), 0.0)
        return total


def graph_macs(path: str | Path, hidden_size: int) -> Polynomial | None:
    """MACs of a graph for one text as a function of its tokens, all matrix products counted.

    The graph is run on made-up texts of a few lengths, and the sizes of its products are read off; so whatever an
    optimiser fused, cut to the first token or turned into int8 is counted as it is.

    Args:
        path: a graph of `alembert export`.
        hidden_size: width of the hidden states that it reads, if it does.

    Returns None where the graph has an operator whose products cannot be told, they are no such function, or the `onnx`
    extra is not installed.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError:
        return None

    model = onnx.load(str(path))
    graph = model.graph
    if any(node.op_type in _UNCOUNTED for node in graph.node):
        return None
    products = [node for node in graph.node if node.op_type in _PRODUCTS]
    given = {entry.name for entry in graph.input} | {entry.name for entry in graph.output}
    fixed = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    wanted = {name for node in products for name in (node.input[0], node.output[0])} - fixed.keys()
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(wanted - given))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [entry.name for entry in session.get_outputs()]
    counts = []
    for length in _LENGTHS:
        feeds = {entry.name: _example(entry.name, length, hidden_size) for entry in session.get_inputs()}
        values = feeds | dict(zip(names, session.run(names, feeds), strict=True))
        shapes = fixed | {name: np.shape(values[name]) for name in wanted}
        counts.append(sum(_product_macs(node, shapes) for node in products))
    return _polynomial(counts)


def _example(name: str, length: int, hidden_size: int) -> np.ndarray[Any, Any]:
    if name == HIDDEN_STATES:
        return np.zeros((1, length, hidden_size), np.float32)
    return np.full((1, length), 0 if name == "token_type_ids" else 1, np.int64)


def _product_macs(node: Any, shapes: Mapping[str, tuple[int, ...]]) -> int:
    transposed = any(entry.name == "transA" and entry.i for entry in node.attribute)
    inner = shapes[node.input[0]][-2 if transposed else -1]
    return int(np.prod(shapes[node.output[0]], dtype=np.int64)) * int(inner)


def _polynomial(counts: list[int]) -> Polynomial | None:
    """The polynomial of degree 2 through the counts for `_LENGTHS`; None if there is none in whole numbers."""
    (a, b, c, _), (f, g, h, last) = _LENGTHS, counts
    first, second = Fraction(g - f, b - a), Fraction(h - g, c - b)
    square = (second - first) / (c - a)
    linear = first - square * (a + b)
    constant = f - linear * a - square * a * a
    whole = [int(value) for value in (constant, linear, square) if value.denominator == 1]
    if len(whole) < 3 or Polynomial(*whole).at_length(_LENGTHS[-1]) != last:
        return None
    return Polynomial(*whole)
