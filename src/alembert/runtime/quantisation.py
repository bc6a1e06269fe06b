"""int8 for graphs: the matrix products over all tokens, and large tables.

Weights are signed 8-bit integers with one scale per output column. Inputs of the products become unsigned 8-bit
integers with a scale that no other text of the batch has a say in, so that a text's answer does not depend on its
company. Most inputs have one constant range, measured at export. Where a few tokens are far larger than the others, as
behind activation functions, such a range would leave the others a handful of steps: there every token is scaled by its
own largest magnitude. What runs on one vector per text alone (the last maps of a head) stays in float32: it costs
little, and the probabilities that decide over exits come out of it.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from alembert.runtime.batching import pad_rows
from alembert.runtime.graph_optimisation import drop_unused

LARGE_TABLE = 2**20
"""Numbers in an embedding table from which on it is stored in int8."""
LARGEST_SPREAD = 5.0
"""Of an input with a constant range: the largest token's magnitude over the median token's."""
_DOMAIN = "com.microsoft"

Sample = Mapping[str, np.ndarray]
"""Arrays that a graph reads, by name, `attention_mask` (rows, tokens) among them."""


@dataclass(frozen=True)
class InputRange:
    """What the tokens of a matrix product's input (rows, tokens, width) came to.

    Attributes:
        low, high: smallest and largest value.
        spread: the largest token's largest magnitude, over the median token's.
    """

    low: float
    high: float
    spread: float


def random_inputs(
    tokenizer: Any, max_length: int, *, is_pair: bool = False, rows: int = 32, batch: int = 8
) -> list[Sample]:
    """Texts of random tokens and all lengths (to 48), special tokens in place, on which ranges can be measured.

    Ranges hardly differ from those of real texts: normalisation comes before most products, and the largest values
    belong to special tokens. So an export needs no data, and serves any language.

    Args:
        tokenizer: of transformers.
        max_length: tokens of a text, at most.
        is_pair: whether texts come in pairs.
        rows, batch: how many texts, and how many of them at a time.
    """
    pattern = tokenizer(*(["a"] * (1 + is_pair)), return_special_tokens_mask=True, return_token_type_ids=True)
    tokens = list(
        zip(pattern["input_ids"], pattern["special_tokens_mask"], pattern["token_type_ids"], strict=True)
    )
    free = max(1, sum(not special for _, special, _ in tokens))
    words = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
    generator = np.random.default_rng(0)
    longest = max(1, (min(max_length, 48) - len(tokens) + free) // free)
    encoded = []
    for count in np.linspace(1, longest, rows).round().astype(int):
        row: dict[str, list[int]] = {"input_ids": [], "token_type_ids": []}
        for token, special, kind in tokens:
            ids = [token] if special else generator.choice(words, count).tolist()
            row["input_ids"] += ids
            row["token_type_ids"] += [kind] * len(ids)
        encoded.append(row)
    fill = {"input_ids": int(tokenizer.pad_token_id), "token_type_ids": int(tokenizer.pad_token_type_id)}
    return [pad_rows(encoded[start : start + batch], fill) for start in range(0, rows, batch)]


def quantise(
    source: str | Path, target: str | Path, samples: Sequence[Sample], *, reduce_range: bool = False
) -> list[dict[str, np.ndarray]]:
    """Writes a float32 graph in int8.

    An LSTM is quantised by ONNX Runtime's tool: its inputs get their ranges at every call, from the whole batch.

    Args:
        source: a graph that no optimiser has fused yet; its constants should be folded.
        target: where the quantised graph goes.
        samples: on which the ranges of the products' inputs are measured; padding is left out.
        reduce_range: 7 bits for the weights: sums of products then fit the 16 bits that CPUs without VNNI
            instructions have for them. On all others it only costs accuracy.

    Returns the float32 graph's outputs for each sample, by name.
    """
    ranges, outputs = measure_ranges(source, target, samples)
    model = onnx.load(str(source))
    if any(node.op_type == "LSTM" for node in model.graph.node):
        _quantise_lstm(source, target, reduce_range)
        model = onnx.load(str(target))
    quantise_products(model.graph, ranges, reduce_range)
    quantise_tables(model.graph)
    drop_unused(model.graph)
    if all(entry.domain != _DOMAIN for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))
    onnx.save(model, str(target))
    return outputs


def measure_ranges(
    source: str | Path, scratch: str | Path, samples: Iterable[Sample]
) -> tuple[dict[str, InputRange], list[dict[str, np.ndarray]]]:
    """Ranges of the inputs of all products over tokens, by name, and the graph's outputs for each sample.

    `scratch` is a file that is written on the way. Inputs of other shapes than (rows, tokens, width) are left out.
    """
    model = onnx.load(str(source))
    given = [output.name for output in model.graph.output]
    inputs = list(dict.fromkeys(node.input[0] for node in _products(model.graph)))
    for name in inputs:
        for operator in ("ReduceMin", "ReduceMax"):
            output = f"{name}_{operator}"
            model.graph.node.append(helper.make_node(operator, [name], [output], axes=[-1], keepdims=0))
            model.graph.output.append(helper.make_empty_tensor_value_info(output))
    onnx.save(model, str(scratch))
    session = onnxruntime.InferenceSession(str(scratch), providers=["CPUExecutionProvider"])
    read = [entry.name for entry in session.get_inputs()]
    lows: dict[str, list[np.ndarray]] = {name: [] for name in inputs}
    highs: dict[str, list[np.ndarray]] = {name: [] for name in inputs}
    outputs = []
    for sample in samples:
        values = session.run(None, {name: sample[name] for name in read})
        outputs.append(dict(zip(given, values, strict=False)))
        mask = sample["attention_mask"] == 1
        extremes = values[len(given) :]
        for name, low, high in zip(inputs, extremes[::2], extremes[1::2], strict=True):
            if low.ndim == 2:
                # One column where the graph was cut to the first token.
                tokens = mask[:, : low.shape[1]]
                lows[name].append(low[tokens])
                highs[name].append(high[tokens])
    ranges = {
        name: _range(np.concatenate(lows[name]), np.concatenate(highs[name])) for name in inputs if lows[name]
    }
    return ranges, outputs


def _range(low: np.ndarray, high: np.ndarray) -> InputRange:
    magnitudes = np.maximum(np.abs(low), np.abs(high))
    spread = float(magnitudes.max() / max(float(np.median(magnitudes)), 1e-12))
    return InputRange(float(low.min()), float(high.max()), spread)


def quantise_products(
    graph: GraphProto, ranges: Mapping[str, InputRange], reduce_range: bool = False
) -> None:
    """Turns products with a constant matrix into products of integers, in place; those of inputs without range stay."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    builder = _Products(weights, reduce_range)
    products = {node.output[0]: node for node in _products(graph) if node.input[0] in ranges}
    biased = {name: found for name, node in products.items() if (found := _bias(graph, node, weights))}
    merged = {output for _, output in biased.values()}
    for node in graph.node:
        output = node.output[0]
        if output in products:
            bias, end = biased.get(output, (None, output))
            builder.add(node, ranges[node.input[0]], bias, end)
        elif output not in merged:
            builder.nodes.append(node)
    copies = [NodeProto.FromString(node.SerializeToString()) for node in builder.nodes]
    del graph.node[:]
    graph.node.extend(copies)
    graph.initializer.extend(builder.constants.values())
    del graph.value_info[:]


class _Products:
    """Nodes and constants of the quantised products; inputs and weights that several products share are made once."""

    def __init__(self, weights: Mapping[str, TensorProto], reduce_range: bool) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, TensorProto] = {}
        self._weights, self._reduce_range = weights, reduce_range
        self._inputs: dict[str, tuple[tuple[str, str, str], str | None]] = {}

    def add(self, node: NodeProto, given: InputRange, bias: str | None, output: str) -> None:
        """The product of a MatMul node, a bias (by name) added, as `output`."""
        source, weight = node.input
        if source not in self._inputs:
            by_token = given.spread > LARGEST_SPREAD
            self._inputs[source] = self._by_token(source) if by_token else self._by_range(source, given)
        (values, scale, zero), magnitude = self._inputs[source]
        integers, scales = self._weight(weight)
        read = [values, integers, scale, scales, zero, ""]
        if magnitude is None:
            self._node("MatMulIntegerToFloat", [*read, bias or ""], output, domain=_DOMAIN)
            return
        product = self._node("MatMulIntegerToFloat", read, f"{output}_of_scaled", domain=_DOMAIN)
        if bias is None:
            self._node("Mul", [product, magnitude], output)
        else:
            self._node(
                "Add", [self._node("Mul", [product, magnitude], f"{output}_without_bias"), bias], output
            )

    def _by_range(self, name: str, given: InputRange) -> tuple[tuple[str, str, str], None]:
        low, high = min(given.low, 0.0), max(given.high, 0.0)
        step = (high - low) / 255 or 1.0
        scale = self._constant(f"{name}_scale", np.float32(step))
        zero = self._constant(f"{name}_zero", np.uint8(round(-low / step)))
        return (self._node("QuantizeLinear", [name, scale, zero], f"{name}_uint8"), scale, zero), None

    def _by_token(self, name: str) -> tuple[tuple[str, str, str], str]:
        scale = self._constant("token_scale", np.float32(1 / 127))
        zero = self._constant("token_zero", np.uint8(128))
        least = self._constant("token_least", np.float32(1e-12))
        high = self._node("ReduceMax", [name], f"{name}_high", axes=[-1], keepdims=1)
        low = self._node("ReduceMin", [name], f"{name}_low", axes=[-1], keepdims=1)
        below = self._node("Neg", [low], f"{name}_below")
        magnitude = self._node("Max", [high, below, least], f"{name}_magnitude")
        scaled = self._node("Div", [name, magnitude], f"{name}_scaled")
        return (self._node("QuantizeLinear", [scaled, scale, zero], f"{name}_uint8"), scale, zero), magnitude

    def _weight(self, name: str) -> tuple[str, str]:
        integers, scales = f"{name}_int8", f"{name}_scales"
        if integers not in self.constants:
            values = numpy_helper.to_array(self._weights[name])
            rounded, steps = to_int8(values, axis=0, largest=64 if self._reduce_range else 127)
            self._constant(integers, rounded)
            self._constant(scales, steps[0])
        return integers, scales

    def _constant(self, name: str, value: Any) -> str:
        self.constants[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def _node(self, operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, list(inputs), [output], **attributes))
        return output


def to_int8(values: np.ndarray, axis: int, largest: int = 127) -> tuple[np.ndarray, np.ndarray]:
    """int8 values and their float32 scales along an axis (kept): value ≈ int8 · scale, largest magnitude `largest`."""
    scales = np.abs(values).max(axis=axis, keepdims=True) / largest
    scales[scales == 0] = 1
    rounded = np.clip(np.rint(values / scales), -largest, largest).astype(np.int8)
    return rounded, scales.astype(np.float32)


def _products(graph: GraphProto) -> list[NodeProto]:
    matrices = {
        tensor.name
        for tensor in graph.initializer
        if len(tensor.dims) == 2 and tensor.data_type == TensorProto.FLOAT
    }
    return [node for node in graph.node if node.op_type == "MatMul" and node.input[1] in matrices]


def _bias(
    graph: GraphProto, product: NodeProto, constants: Mapping[str, TensorProto]
) -> tuple[str, str] | None:
    """The constant vector that is added to a product, and the sum, by name, where nothing else reads the product."""
    name, width = product.output[0], constants[product.input[1]].dims[1]
    readers = [node for node in graph.node if name in node.input]
    if len(readers) != 1 or readers[0].op_type != "Add" or any(o.name == name for o in graph.output):
        return None
    vectors = [i for i in readers[0].input if i in constants and list(constants[i].dims) == [width]]
    return (vectors[0], readers[0].output[0]) if vectors else None


def _quantise_lstm(source: str | Path, target: str | Path, reduce_range: bool) -> None:
    with warnings.catch_warnings(), _Silence(logging.getLogger()):
        warnings.simplefilter("ignore")
        quantize_dynamic(
            str(source),
            str(target),
            op_types_to_quantize=["LSTM"],
            per_channel=True,
            reduce_range=reduce_range,
            weight_type=QuantType.QInt8,
            extra_options={"DefaultTensorType": TensorProto.FLOAT},
        )


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
        rounded, scales = to_int8(numpy_helper.to_array(tables[name]), axis=1)
        graph.initializer.remove(tables[name])
        graph.initializer.extend(
            [
                numpy_helper.from_array(rounded, f"{name}_int8"),
                numpy_helper.from_array(scales, f"{name}_scales"),
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
