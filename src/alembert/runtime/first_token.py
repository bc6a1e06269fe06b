"""Computes only what the first token needs where a graph reads no other.

Most heads read the first token of the last layer. Keys and values of that layer are needed for all tokens, but its
query, the product after attention and the feed-forward part for the first one alone: most of the layer's work.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

Shape = list[int | str]
Shapes = Mapping[str, Shape | None]

_ELEMENTWISE = frozenset(
    ("Add", "Sub", "Mul", "Div", "Pow", "Where", "Erf", "Tanh", "Relu", "Sigmoid", "Identity", "Sqrt", "Neg")
)
_ALONG_LAST_AXIS = frozenset(("Softmax", "LayerNormalization"))
_WHOLE = -1
"""The demand for all of a tensor; other demands are the axis of which the first entry is needed."""


def keep_first_token(graph: GraphProto, shapes: Shapes) -> int:
    """Cuts tensors to the first token where nothing reads the others, in place.

    A tensor is cut after as few operators as possible: the graph is walked from its outputs back, and an operator that
    works on each token alone hands the demand for the first token on to what it reads.

    Args:
        graph: in standard operators, its nodes in the order in which they run.
        shapes: of the tensors, free dimensions by name; None or absent = unknown.

    Returns how many operators run on the first token alone that ran on all.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    demands: dict[str, set[int]] = defaultdict(set)
    for output in graph.output:
        demands[output.name].add(_WHOLE)
    cut: dict[int, dict[int, int]] = {}
    for index in reversed(range(len(graph.node))):
        node = graph.node[index]
        wanted = set().union(*(demands[name] for name in node.output))
        needed = _reads_first_token(node, constants)
        if needed is None and len(wanted) == 1 and _WHOLE not in wanted and len(node.output) == 1:
            needed = _handed_on(node, next(iter(wanted)), constants, shapes)
            if needed is not None:
                cut[index] = needed
        for position, name in enumerate(node.input):
            demands[name].add(_WHOLE if needed is None else needed.get(position, _WHOLE))
    # What is demanded in part by a node that was not cut itself, such as the head's choice of the first token, needs
    # no cutting: that node picks the same entry out of a tensor of one as out of many.
    _rewrite(graph, cut, {graph.node[index].output[0] for index in cut})
    return len(cut)


def _rewrite(graph: GraphProto, cut: Mapping[int, Mapping[int, int]], shortened: set[str]) -> None:
    nodes: list[NodeProto] = []
    slices: dict[tuple[str, int], str] = {}
    for index, node in enumerate(graph.node):
        for position, axis in cut.get(index, {}).items():
            name = node.input[position]
            if name in shortened:
                continue
            if (name, axis) not in slices:
                slices[name, axis] = _slice(graph, nodes, name, axis)
            node.input[position] = slices[name, axis]
        nodes.append(node)
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    del graph.value_info[:]


def _slice(graph: GraphProto, nodes: list[NodeProto], name: str, axis: int) -> str:
    output = f"{name}_first_{axis}"
    bounds = []
    for part, value in (("start", 0), ("end", 1), ("axis", axis)):
        bounds.append(f"{output}_{part}")
        graph.initializer.append(numpy_helper.from_array(np.array([value], np.int64), bounds[-1]))
    nodes.append(helper.make_node("Slice", [name, *bounds], [output]))
    return output


def _reads_first_token(node: NodeProto, constants: Mapping[str, TensorProto]) -> dict[int, int] | None:
    """The demand of a node that picks the first token, by position of its input; None for other nodes."""
    if node.op_type != "Gather" or _attribute(node, "axis", 0) != 1 or node.input[1] not in constants:
        return None
    index = numpy_helper.to_array(constants[node.input[1]])
    return {0: 1} if index.ndim == 0 and int(index) == 0 else None


def _handed_on(
    node: NodeProto, axis: int, constants: Mapping[str, TensorProto], shapes: Shapes
) -> dict[int, int] | None:
    """The axes to cut a node's inputs at, by position, so that its output is cut at `axis`; None if that cannot be.

    Inputs that are not in the answer are needed whole.
    """
    output = shapes.get(node.output[0])
    inputs = [shapes.get(name) for name in node.input]
    if output is None:
        return None
    if node.op_type in _ELEMENTWISE:
        return _of_elementwise(axis, len(output), inputs)
    if node.op_type in _ALONG_LAST_AXIS:
        last = _attribute(node, "axis", -1) in (-1, len(output) - 1)
        return {0: axis} if last and axis != len(output) - 1 else None
    if node.op_type == "MatMul":
        return {0: axis} if axis == len(output) - 2 and inputs[0] and len(inputs[0]) == len(output) else None
    if node.op_type == "Transpose":
        order = next((list(entry.ints) for entry in node.attribute if entry.name == "perm"), None)
        return None if order is None else {0: order[axis]}
    if node.op_type == "Reshape" and node.input[1] in constants:
        # A 0 copies the dimension at the same place: up to the cut, input and output are alike.
        target = numpy_helper.to_array(constants[node.input[1]])
        return {0: axis} if len(target) > axis and not target[: axis + 1].any() else None
    return None


def _of_elementwise(axis: int, rank: int, inputs: list[Shape | None]) -> dict[int, int] | None:
    needed = {}
    for position, shape in enumerate(inputs):
        if shape is None:
            return None
        own = axis - (rank - len(shape))
        if own >= 0 and shape[own] != 1:
            needed[position] = own
    return needed


def _attribute(node: NodeProto, name: str, default: int) -> int:
    return next((entry.i for entry in node.attribute if entry.name == name), default)
