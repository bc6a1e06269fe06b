"""Graphs rewritten for speed before they are saved, so that they load fast and run the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, numpy_helper
from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

from alembert.runtime.first_token import keep_first_token

_SLOW_FUSIONS = {
    # Its kernel takes about ten times what the addition and the layer normalisation take apart.
    "SkipLayerNormFusion",
    # Likewise, twice; the bias goes into the quantised matrix product for nothing.
    "BiasGeluFusion",
}


def optimise(source: str | Path, target: str | Path) -> None:
    """Writes the graph as ONNX Runtime's optimiser leaves it, without the fusions that are slower on CPUs.

    The result holds operators of ONNX Runtime, which are the same on every CPU, and must be opened with optimisation
    switched off, or the slow fusions come back.
    """
    _run_optimiser(source, target, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED)


def fold_constants(source: str | Path, target: str | Path) -> None:
    """Writes the graph in standard operators without what need not be worked out at run time.

    That is what depends on constants alone, shapes, and tokens that nothing reads.
    """
    _run_optimiser(source, target, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC)
    model = fix_reshapes(onnx.load(str(target)))
    keep_first_token(model.graph, infer_shapes(model))
    onnx.save(model, str(target))


def _run_optimiser(source: str | Path, target: str | Path, level: Any) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(
        str(source), options, providers=["CPUExecutionProvider"], disabled_optimizers=_SLOW_FUSIONS
    )


def fix_reshapes(model: ModelProto) -> ModelProto:
    """Gives every Reshape a constant shape where that says the same, and drops the nodes that worked it out.

    A dimension equal to the input's at the same place is written 0, one further unknown dimension −1. At one text
    per call these nodes are a good part of the run time.
    """
    shapes = infer_shapes(model)
    constants = {tensor.name for tensor in model.graph.initializer}
    for index, node in enumerate(model.graph.node):
        if node.op_type != "Reshape" or node.input[1] in constants:
            continue
        target = _constant_shape(shapes.get(node.input[0]), shapes.get(node.output[0]))
        if target is not None:
            name = f"reshape_shape_{index}"
            model.graph.initializer.append(numpy_helper.from_array(np.array(target, np.int64), name))
            node.input[1] = name
    drop_unused(model.graph)
    return model


def infer_shapes(model: ModelProto) -> dict[str, list[int | str] | None]:
    """Shapes of the tensors of a graph by name, free dimensions as expressions; empty where they cannot be found."""
    shapes: dict[str, list[int | str] | None] = {
        tensor.name: list(tensor.dims) for tensor in model.graph.initializer
    }
    try:
        inferred = SymbolicShapeInference.infer_shapes(model, auto_merge=True)
    except Exception:  # it knows not every operator of every family, and the graph is right without it
        return shapes
    values = [*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output]
    return {value.name: _dimensions(value) for value in values} | shapes


def drop_unused(graph: GraphProto) -> None:
    """Removes nodes and initialisers that no output depends on, in subgraphs too, in place."""
    needed = {output.name for output in graph.output}
    kept: list[NodeProto] = []
    for node in reversed(graph.node):
        if not any(name in needed for name in node.output):
            continue
        for subgraph in _subgraphs(node):
            drop_unused(subgraph)
        kept.append(node)
        needed.update(_reads(node))
    initializers = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.node[:]
    graph.node.extend(reversed(kept))
    del graph.initializer[:]
    graph.initializer.extend(initializers)
    del graph.value_info[:]


def _subgraphs(node: NodeProto) -> list[GraphProto]:
    return [attribute.g for attribute in node.attribute if attribute.type == AttributeProto.GRAPH]


def _reads(node: NodeProto) -> set[str]:
    """Names that a node reads, those of its subgraphs included."""
    names = set(node.input)
    for graph in _subgraphs(node):
        names.update(name for inner in graph.node for name in _reads(inner))
        names.update(output.name for output in graph.output)
    return names


def _dimensions(value: onnx.ValueInfoProto) -> list[int | str] | None:
    if not value.type.tensor_type.HasField("shape"):
        return None
    return [
        dimension.dim_value if dimension.HasField("dim_value") else dimension.dim_param
        for dimension in value.type.tensor_type.shape.dim
    ]


def _constant_shape(before: Any, after: Any) -> list[int] | None:
    """The argument of Reshape that turns `before` into `after` whatever the free dimensions; None if there is none."""
    if before is None or after is None:
        return None
    target = []
    for position, dimension in enumerate(after):
        if isinstance(dimension, int):
            target.append(dimension)
        elif dimension and position < len(before) and before[position] == dimension:
            target.append(0)
        else:
            target.append(-1)
    return target if target.count(-1) <= 1 else None
