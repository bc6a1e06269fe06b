"""All segments of an exported model as one graph for single texts, for programs that run one ONNX file.

At every exit the graph works out the policy's uncertainty and compares it with the input `speed`. What follows an exit
stands inside an ONNX `If`, so that it runs only for a text that stays. Texts must come one at a time: an `If` decides
for a whole batch.

These `If` follow one another and are not nested, and the segments' constants stand outside of them: ONNX Runtime keeps
a copy of what a branch holds for every level of nesting, and prepares constants for its kernels one level up at most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from alembert.common.errors import InputError
from alembert.runtime.graph_optimisation import drop_unused
from alembert.runtime.manifest import (
    HIDDEN_STATES,
    LOGITS,
    MISTAKE_LOGITS,
    NEXT_HIDDEN_STATES,
    SPEED,
    Manifest,
)
from alembert.runtime.policies import ExitPolicy, own_policy

OUTPUTS = ("probabilities", "exit_layer", "uncertainty")
_EXIT_OUTPUTS = ("probabilities", "uncertainty")
_STAGE_OUTPUTS = (*OUTPUTS, "stays", NEXT_HIDDEN_STATES)


def write_merged_graph(
    manifest: Manifest, folder: str | Path, exits: Sequence[int], target: str | Path
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Writes the merged graph of the segments that lie in a folder.

    Args:
        manifest: of these segments.
        folder: where they lie.
        exits: layers of the exits to use, some of the manifest's.
        target: the ONNX file to write.

    Returns the names of its inputs and outputs; `MergedGraph` says what they are. `uncertainty` is NaN where the full
    model answered; at speed 0 that is always so, and no head on the way runs.

    Raises:
        InputError: the model's policy compares exits with each other (patience).
    """
    num_labels = len(manifest.label_names) or 1
    policy = merged_policy(
        manifest.policy, manifest.top_k, manifest.problem_type, num_labels, len(manifest.segments)
    )
    models = [onnx.load(str(Path(folder) / segment.file)) for segment in manifest.segments]
    heads = {layer: onnx.load(str(Path(folder) / manifest.heads[layer].file)) for layer in exits}
    body = _Merger(
        manifest,
        policy,
        {layer: model.graph for layer, model in heads.items()},
        [model.graph for model in models],
    ).merge()
    first = models[0].graph
    models += heads.values()
    inputs = [*first.input, helper.make_tensor_value_info(SPEED, TensorProto.FLOAT, [])]
    graph = helper.make_graph(body.nodes, "merged", inputs, _outputs(manifest, ""), body.initializers)
    opsets = {(entry.domain, entry.version) for model in models for entry in model.opset_import}
    merged = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid(domain, number) for domain, number in sorted(opsets)],
        ir_version=max(model.ir_version for model in models),
        producer_name="alembert",
    )
    drop_unused(merged.graph)
    onnx.save(merged, str(target))
    return tuple(entry.name for entry in inputs), OUTPUTS


def merged_policy(
    policy: str | None, top_k: int | None, problem_type: str, num_labels: int, num_exits: int
) -> ExitPolicy:
    """The policy that a merged graph of a model with these defaults follows; `num_exits` counts the full model's.

    Raises:
        InputError: it compares exits with each other (patience).
    """
    resolved = own_policy(policy, top_k, problem_type, num_labels, num_exits)
    if resolved.name == "patience":
        raise InputError(
            "a merged graph decides at each exit from that exit's answer alone, which the exit policy 'patience' "
            "does not: leave out --merge-exits, or train the model with another policy"
        )
    return resolved


class _Body:
    """Nodes and constants of a graph that is being built; names begin with `prefix`."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []

    def add(self, operator: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Appends a node and returns the name of its output."""
        name = output or f"{self.prefix}step_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def constant(self, value: object, dtype: type) -> str:
        name = f"{self.prefix}constant_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name


class _Merger:
    def __init__(
        self,
        manifest: Manifest,
        policy: ExitPolicy,
        heads: Mapping[int, GraphProto],
        graphs: Sequence[GraphProto],
    ) -> None:
        self.manifest, self.policy, self.heads, self.graphs = manifest, policy, heads, graphs

    def merge(self) -> _Body:
        top = _Body("")
        stages = self._stages()
        before: dict[str, str] = {}
        for number, stage in enumerate(stages, 1):
            names = OUTPUTS if number == len(stages) else _STAGE_OUTPUTS
            suffix = "" if number == len(stages) else f"_{number}"
            if number == 1:
                self._run(top, top, stage, HIDDEN_STATES, suffix)
            else:
                run, skip = _Body(f"run{number}_"), _Body(f"skip{number}_")
                self._run(run, top, stage, before[NEXT_HIDDEN_STATES], f"_run{number}")
                self._skip(skip, before, names, f"_skip{number}")
                branches = {
                    "then_branch": self._graph(run, f"_run{number}", names),
                    "else_branch": self._graph(skip, f"_skip{number}", names),
                }
                outputs = [name + suffix for name in names]
                top.nodes.append(helper.make_node("If", [before["stays"]], outputs, **branches))
            before = {name: name + suffix for name in names}
        return top

    def _stages(self) -> list[list[int]]:
        """Numbers of the segments, in lists that end where a text may leave."""
        stages: list[list[int]] = [[]]
        for index, segment in enumerate(self.manifest.segments):
            stages[-1].append(index)
            if segment.exit_layer in self.heads:
                stages.append([])
        return stages

    def _run(self, body: _Body, top: _Body, stage: Sequence[int], hidden_states: str, suffix: str) -> None:
        """Runs segments, and the head after them; outputs bear the stage's names with a suffix."""
        for index in stage:
            segment = _Body(f"s{index + 1}_")
            _append(segment, self.graphs[index], hidden_states)
            body.nodes += segment.nodes
            top.initializers += segment.initializers
            hidden_states = f"{segment.prefix}{NEXT_HIDDEN_STATES}"
        index = stage[-1]
        layer = self.manifest.segments[index].exit_layer
        if index + 1 == len(self.graphs):
            self._probabilities(body, f"s{index + 1}_{LOGITS}", output=OUTPUTS[0] + suffix)
            self._answer(body, layer, None, suffix)
            return
        probabilities, uncertainty = self._asked(body, index, hidden_states)
        body.add("Identity", probabilities, output=OUTPUTS[0] + suffix)
        self._answer(body, layer, uncertainty, suffix)
        body.add("Not", body.add("Less", uncertainty, SPEED), output="stays" + suffix)
        body.add("Identity", hidden_states, output=NEXT_HIDDEN_STATES + suffix)

    def _skip(self, body: _Body, before: Mapping[str, str], names: Sequence[str], suffix: str) -> None:
        """Hands on the answer of a text that has left."""
        for name in OUTPUTS:
            body.add("Identity", before[name], output=name + suffix)
        if "stays" in names:
            body.add("Identity", before["stays"], output="stays" + suffix)
            nothing = body.constant(np.zeros((1, 1, self.manifest.hidden_size)), np.float32)
            body.add("Identity", nothing, output=NEXT_HIDDEN_STATES + suffix)

    def _asked(self, body: _Body, index: int, hidden_states: str) -> tuple[str, str]:
        """Probabilities and uncertainty at an exit, whose head runs unless the speed is 0."""
        asked = _Body(f"ask{index + 1}_")
        _append(asked, self.heads[self.manifest.segments[index].exit_layer], hidden_states)
        probabilities = self._probabilities(asked, f"{asked.prefix}{LOGITS}")
        uncertainty = self._uncertainty(asked, probabilities, f"{asked.prefix}{MISTAKE_LOGITS}")
        skipped = _Body(f"skip{index + 1}_")
        nothing = np.zeros((1, len(self.manifest.label_names) or 1))
        branches = {
            "then_branch": self._exit(asked, probabilities, uncertainty),
            "else_branch": self._exit(
                skipped, skipped.constant(nothing, np.float32), skipped.constant(1, np.float32)
            ),
        }
        names = [f"{name}_exit{index + 1}" for name in _EXIT_OUTPUTS]
        condition = body.add("Greater", SPEED, body.constant(0, np.float32))
        body.nodes.append(helper.make_node("If", [condition], names, **branches))
        return names[0], names[1]

    def _exit(self, body: _Body, probabilities: str, uncertainty: str) -> GraphProto:
        suffix = f"_{body.prefix.strip('_')}"
        for name, value in zip(_EXIT_OUTPUTS, (probabilities, uncertainty), strict=True):
            body.add("Identity", value, output=name + suffix)
        return self._graph(body, suffix, _EXIT_OUTPUTS)

    def _graph(self, body: _Body, suffix: str, names: Sequence[str]) -> GraphProto:
        outputs = _outputs(self.manifest, suffix, names)
        return helper.make_graph(body.nodes, suffix.strip("_"), [], outputs, body.initializers)

    def _answer(self, body: _Body, layer: int, uncertainty: str | None, suffix: str) -> None:
        body.add("Identity", body.constant(layer, np.int64), output=OUTPUTS[1] + suffix)
        value = uncertainty or body.constant(np.nan, np.float32)
        body.add("Identity", value, output=OUTPUTS[2] + suffix)

    def _probabilities(self, body: _Body, logits: str, output: str | None = None) -> str:
        kind = self.manifest.problem_type
        if kind == "single_label_classification":
            return body.add("Softmax", logits, output=output, axis=-1)
        return body.add(
            "Sigmoid" if kind == "multi_label_classification" else "Identity", logits, output=output
        )

    def _uncertainty(self, body: _Body, probabilities: str, mistake_logits: str) -> str:
        """The policy's uncertainty of the one text, as a scalar in [0, 1]."""
        if self.policy.name == "learned":
            value = body.add("Sigmoid", mistake_logits)
        elif self.manifest.problem_type == "multi_label_classification":
            axis = body.constant([-1], np.int64)
            present = body.add("Unsqueeze", probabilities, axis)
            absent = body.add("Sub", body.constant(1, np.float32), present)
            both = body.add("Concat", present, absent, axis=-1)
            each = self._of_distribution(body, both, 2)
            value = body.add("ReduceMax", each, keepdims=0)
        else:
            value = self._of_distribution(body, probabilities, len(self.manifest.label_names))
        return body.add("Reshape", value, body.constant([], np.int64))

    def _of_distribution(self, body: _Body, probabilities: str, size: int) -> str:
        """(…, size) → (…, 1), as `policies` defines it."""
        name = self.policy.name
        if name in ("max_probability", "margin"):
            return self._from_the_largest(body, probabilities, size)
        count = size
        if name == "top_k_entropy":
            assert self.policy.top_k is not None
            count = self.policy.top_k
            probabilities = self._largest(body, probabilities, count)
            if self.policy.renormalise:
                total = body.add("ReduceSum", probabilities, body.constant([-1], np.int64))
                probabilities = body.add("Div", probabilities, total)
        small = body.constant(1e-30, np.float32)
        logarithms = body.add("Log", body.add("Max", probabilities, small))
        surprise = body.add("Mul", probabilities, logarithms)
        summed = body.add("ReduceSum", surprise, body.constant([-1], np.int64))
        scaled = body.add("Mul", summed, body.constant(-1 / np.log(count), np.float32))
        return self._clipped(body, scaled)

    def _from_the_largest(self, body: _Body, probabilities: str, size: int) -> str:
        one = body.constant(1, np.float32)
        if self.policy.name == "max_probability":
            largest = body.add("ReduceMax", probabilities, axes=[-1])
            scale = body.constant(size / (size - 1), np.float32)
            return self._clipped(body, body.add("Mul", body.add("Sub", one, largest), scale))
        two = self._largest(body, probabilities, 2)
        first = body.add("Gather", two, body.constant([0], np.int64), axis=-1)
        second = body.add("Gather", two, body.constant([1], np.int64), axis=-1)
        return self._clipped(body, body.add("Sub", one, body.add("Sub", first, second)))

    def _largest(self, body: _Body, probabilities: str, count: int) -> str:
        values, indices = f"{body.prefix}largest", f"{body.prefix}largest_indices"
        number = body.constant([count], np.int64)
        body.nodes.append(helper.make_node("TopK", [probabilities, number], [values, indices], axis=-1))
        return values

    def _clipped(self, body: _Body, value: str) -> str:
        return body.add("Clip", value, body.constant(0, np.float32), body.constant(1, np.float32))


def _append(body: _Body, graph: GraphProto, hidden_states: str) -> None:
    """Puts a graph's nodes and constants into a body, under names that begin with the body's prefix."""
    prefix = body.prefix
    given = {entry.name: entry.name for entry in graph.input}
    if HIDDEN_STATES in given:
        given[HIDDEN_STATES] = hidden_states

    def renamed(name: str) -> str:
        return given.get(name) or (f"{prefix}{name}" if name else "")

    for original in graph.node:
        node = NodeProto()
        node.CopyFrom(original)
        node.name = f"{prefix}{node.name}" if node.name else ""
        node.input[:] = [renamed(name) for name in original.input]
        node.output[:] = [renamed(name) for name in original.output]
        body.nodes.append(node)
    for tensor in graph.initializer:
        copy = TensorProto()
        copy.CopyFrom(tensor)
        copy.name = renamed(tensor.name)
        body.initializers.append(copy)


def _outputs(manifest: Manifest, suffix: str, names: Sequence[str] = OUTPUTS) -> list[onnx.ValueInfoProto]:
    kinds: dict[str, tuple[int, list[int | str]]] = {
        "probabilities": (TensorProto.FLOAT, [1, len(manifest.label_names) or 1]),
        "exit_layer": (TensorProto.INT64, []),
        "uncertainty": (TensorProto.FLOAT, []),
        "stays": (TensorProto.BOOL, []),
        NEXT_HIDDEN_STATES: (TensorProto.FLOAT, [1, "tokens", manifest.hidden_size]),
    }
    return [helper.make_tensor_value_info(name + suffix, *kinds[name]) for name in names]
