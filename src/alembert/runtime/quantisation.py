"""int8 weights for graphs: dynamic quantisation of the matrix products over all tokens, and of large tables.

Weights are signed 8-bit integers with one scale per output column; activations are quantised anew at every call.
What runs on one vector per text alone (the last maps of a head) stays in float32: it costs little, and the
probabilities that decide over exits come out of it.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

LARGE_TABLE = 2**20
"""Numbers in an embedding table from which on it is stored in int8."""


def quantise(source: str | Path, target: str | Path, *, reduce_range: bool = False) -> None:
    """Writes a float32 graph with int8 weights.

    Args:
        source: a graph that no optimiser has fused yet; its constants should be folded.
        target: where the quantised graph goes.
        reduce_range: 7 bits for the weights: sums of products then fit the 16 bits that CPUs without VNNI
            instructions have for them. On all others it only costs accuracy.
    """
    with warnings.catch_warnings(), _Silence(logging.getLogger()):
        warnings.simplefilter("ignore")
        quantize_dynamic(
            str(source),
            str(target),
            op_types_to_quantize=["MatMul", "LSTM"],
            per_channel=True,
            reduce_range=reduce_range,
            # Unsigned weights are handled by a kernel that takes more than twice the time.
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True, "DefaultTensorType": TensorProto.FLOAT},
        )
    model = onnx.load(str(target))
    quantise_tables(model.graph)
    onnx.save(model, str(target))


def quantise_tables(graph: GraphProto, smallest: int = LARGE_TABLE) -> int:
    """Stores tables of at least `smallest` numbers, from which whole rows are gathered, in int8; in place.

    Each row has a scale of its own: value = int8 · scale, with the row's largest magnitude at 127. Returns how many
    tables there were.
    """
    tables = {
        tensor.name: tensor
        for tensor in graph.initializer
        if tensor.data_type == TensorProto.FLOAT
        and len(tensor.dims) == 2
        and np.prod(tensor.dims) >= smallest
    }
    readers: dict[str, list[NodeProto]] = {name: [] for name in tables}
    for node in graph.node:
        for name in set(node.input) & set(tables):
            readers[name].append(node)
    chosen = [
        name
        for name, nodes in readers.items()
        if nodes
        and all(node.op_type == "Gather" and _axis(node) == 0 and node.input[0] == name for node in nodes)
    ]
    for name in chosen:
        values = numpy_helper.to_array(tables[name])
        scales = np.abs(values).max(axis=1, keepdims=True) / 127
        scales[scales == 0] = 1
        rounded = np.clip(np.rint(values / scales), -127, 127).astype(np.int8)
        graph.initializer.remove(tables[name])
        graph.initializer.extend(
            [
                numpy_helper.from_array(rounded, f"{name}_int8"),
                numpy_helper.from_array(scales.astype(np.float32), f"{name}_scales"),
            ]
        )
        for node in readers[name]:
            _replace(graph, node, name)
    return len(chosen)


def _replace(graph: GraphProto, gather: NodeProto, table: str) -> None:
    rows, output = gather.input[1], gather.output[0]
    nodes = [
        helper.make_node("Gather", [f"{table}_int8", rows], [f"{output}_int8"]),
        helper.make_node("Cast", [f"{output}_int8"], [f"{output}_float"], to=TensorProto.FLOAT),
        helper.make_node("Gather", [f"{table}_scales", rows], [f"{output}_scales"]),
        helper.make_node("Mul", [f"{output}_float", f"{output}_scales"], [output]),
    ]
    position = list(graph.node).index(gather)
    graph.node.remove(gather)
    for offset, node in enumerate(nodes):
        graph.node.insert(position + offset, node)


def _axis(gather: NodeProto) -> int:
    return next((attribute.i for attribute in gather.attribute if attribute.name == "axis"), 0)


class _Silence:
    """Keeps a logger's warnings back, and handlers out: the quantiser advises steps that have been taken."""

    def __init__(self, logger: logging.Logger) -> None:
        self.logger, self.level, self.handlers = logger, logger.level, list(logger.handlers)

    def __enter__(self) -> None:
        self.logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        self.logger.setLevel(self.level)
        self.logger.handlers[:] = self.handlers
