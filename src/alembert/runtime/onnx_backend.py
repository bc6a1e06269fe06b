"""Runs an exported model's segments with ONNX Runtime. Needs neither torch nor transformers."""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from alembert.common.errors import InputError, install_extra
from alembert.common.facts import ClassifierFacts
from alembert.runtime.backend import OpenedClassifier
from alembert.runtime.exited import ExitedBatch, ExitedText, array_probabilities, join, sigmoid
from alembert.runtime.manifest import (
    HIDDEN_STATES,
    SPEED,
    Head,
    Manifest,
    MergedGraph,
    Segment,
)
from alembert.runtime.policies import ExitPolicy, PolicyHistory, own_policy
from alembert.runtime.processor import adds_up_in_16_bits, usable_threads
from alembert.runtime.tokenization import TokenizersEncoder

logger = logging.getLogger("alembert")
_lock = Lock()
_memory_is_shared = False


@dataclass(frozen=True, eq=False)
class SegmentRows:
    """Rows on their way from one segment to the next.

    Attributes:
        positions: (rows,) int64, where the rows stand in the input.
        segment: number of the segment that they run next, from 0.
        inputs: what that segment reads besides the mask, by name: token ids (rows, tokens) int64, or hidden states
            (rows, tokens, hidden) float32.
        mask: (rows, tokens) int64, 1 = token.
        history: the policy's.
    """

    positions: np.ndarray
    segment: int
    inputs: dict[str, np.ndarray]
    mask: np.ndarray
    history: PolicyHistory | None

    @property
    def tokens(self) -> int:
        """Length to which the rows are padded."""
        return int(self.mask.shape[1])


class OnnxBackend:
    """An exported model on the processor. One instance may be used by several threads at once.

    Args:
        folder: what `alembert export` wrote.
        manifest: that folder's.
        exits: the layers whose student exits are used; None = all that the model has.
        threads: that one segment runs on; None = as many as the process may use.

    Raises InputError when ONNX Runtime is not installed, a graph is broken, or there is no exit after one of `exits`.
    """

    def __init__(
        self,
        folder: str | Path,
        manifest: Manifest,
        *,
        exits: Sequence[int] | None = None,
        threads: int | None = None,
    ) -> None:
        self.manifest = manifest
        self.num_layers = manifest.num_layers
        self.exit_layers = manifest.exit_layers if exits is None else tuple(sorted(set(exits)))
        unknown = sorted(set(self.exit_layers) - set(manifest.exit_layers))
        if unknown:
            raise InputError(
                f"no exit after layer {unknown[0]}: the model's exits are {list(manifest.exit_layers)}"
            )
        self.threads = threads or usable_threads()
        self._runtime = _import_runtime()
        options = _session_options(self._runtime, self.threads)
        self._folder = Path(folder)
        self._open = partial(_OpenGraph, self._runtime, self._folder, options)
        self._segments = [self._open(segment) for segment in manifest.segments]
        self._heads = {layer: self._open(manifest.heads[layer]) for layer in self.exit_layers}
        return_freed_memory()
        # Opened when a single text comes: it holds all weights once more.
        self._merged: _OpenGraph | None = None
        self._merged_lock = Lock()
        self._merged_policy = self._policy_of_merged_graph()

    def run(self, batch: dict[str, np.ndarray], policy: ExitPolicy, speed: float) -> ExitedBatch:
        """As `Backend.run`."""
        rows: SegmentRows | None = self.start(batch, np.arange(len(batch["input_ids"])))
        answered = []
        while rows is not None:
            left, rows = self.advance(rows, policy, speed)
            if left is not None:
                answered.append(left)
        return join(answered)

    def run_alone(self, batch: dict[str, np.ndarray], policy: ExitPolicy, speed: float) -> ExitedText:
        """As `SingleTextBackend.run_alone`: by the merged graph where that decides as the policy does."""
        merged = (self._merged or self._open_merged()) if self._merged_policy == policy else None
        if merged is None:
            return self.run(batch, policy, speed).alone()
        speeds = {SPEED: np.array(speed, np.float32)}
        probabilities, exit_layer, uncertainty = merged.run(batch | speeds, batch["attention_mask"])
        return ExitedText(probabilities.tolist()[0], exit_layer.item(), uncertainty.item())

    def _open_merged(self) -> _OpenGraph | None:
        """The graph for single texts, opened when the first one comes; None where its file is gone by then."""
        with self._merged_lock:
            graph = self.manifest.merged
            if self._merged is None and self._merged_policy is not None and graph is not None:
                try:
                    # Another model may lie there by now.
                    self.manifest.check(self._folder, [graph.file])
                    self._merged = self._open(graph)
                    return_freed_memory()
                except InputError as error:
                    self._merged_policy = None
                    logger.warning("Single texts are answered segment by segment: %s", error)
            return self._merged

    def start(self, batch: dict[str, np.ndarray], positions: np.ndarray) -> SegmentRows:
        """As `SteppedBackend.start`."""
        inputs = {name: batch[name] for name in self.manifest.segments[0].inputs if name != "attention_mask"}
        return SegmentRows(positions, 0, inputs, batch["attention_mask"], None)

    def advance(
        self, rows: SegmentRows, policy: ExitPolicy, speed: float
    ) -> tuple[tuple[np.ndarray, ExitedBatch] | None, SegmentRows | None]:
        """As `SteppedBackend.advance`."""
        layer = self.manifest.segments[rows.segment].exit_layer
        (output,) = self._segments[rows.segment].run(rows.inputs, rows.mask)
        if layer == self.num_layers:
            probabilities = array_probabilities(output, policy.problem_type)
            nobody = np.full(len(probabilities), np.nan, np.float32)
            return (rows.positions, _exited(probabilities, layer, nobody)), None
        hidden_states, head = output, self._heads.get(layer)
        if speed == 0 or head is None:
            return None, self._next(rows, hidden_states, rows.history)
        logits, *mistakes = head.run({HIDDEN_STATES: hidden_states}, rows.mask)
        probabilities = array_probabilities(logits, policy.problem_type)
        learned = sigmoid(mistakes[0]) if mistakes and policy.name == "learned" else None
        uncertainty, history = policy.uncertainty(probabilities, rows.history, learned)
        leaves = uncertainty < speed
        if not leaves.any():
            return None, self._next(rows, hidden_states, history)
        if leaves.all():
            return (rows.positions, _exited(probabilities, layer, uncertainty)), None
        answers = _exited(probabilities[leaves], layer, uncertainty[leaves])
        return (rows.positions[leaves], answers), self._select(rows, hidden_states, history, ~leaves)

    def merge(self, parts: Sequence[SegmentRows]) -> SegmentRows:
        """As `SteppedBackend.merge`."""
        first = parts[0]
        if len(parts) == 1:
            return first
        tokens = max(part.tokens for part in parts)
        total = sum(len(part.positions) for part in parts)
        mask = np.zeros((total, tokens), np.int64)
        # Zeros behind a row's end are masked as any padding, and finite, so that they spoil no sum.
        hidden_states = np.zeros((total, tokens, self.manifest.hidden_size), np.float32)
        start = 0
        for part in parts:
            here = slice(start, start + len(part.positions))
            mask[here, : part.tokens] = part.mask
            hidden_states[here, : part.tokens] = part.inputs[HIDDEN_STATES]
            start = here.stop
        history = None
        if first.history is not None:
            histories = [part.history for part in parts if part.history is not None]
            history = PolicyHistory(*(np.concatenate(fields) for fields in zip(*histories, strict=True)))
        positions = np.concatenate([part.positions for part in parts])
        return SegmentRows(positions, first.segment, {HIDDEN_STATES: hidden_states}, mask, history)

    def run_all_exits(self, batch: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
        """Every used exit's logits (rows, exits, labels), full model last; learned uncertainties (rows, exits − 1)."""
        rows = self.start(batch, np.arange(len(batch["input_ids"])))
        logits, learned = [], []
        for layer, segment in zip(self.manifest.exit_layers, self._segments[:-1], strict=True):
            (hidden_states,) = segment.run(rows.inputs, rows.mask)
            rows = self._next(rows, hidden_states, None)
            if layer in self._heads:
                exit_logits, *mistakes = self._heads[layer].run(rows.inputs, rows.mask)
                logits.append(exit_logits)
                learned += [sigmoid(value) for value in mistakes]
        logits += self._segments[-1].run(rows.inputs, rows.mask)
        return np.stack(logits, axis=1), np.stack(learned, axis=1) if learned else None

    def run_stock(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        """Logits (rows, labels) of the full model, in one pass through all segments without exits."""
        rows = self.start(batch, np.arange(len(batch["input_ids"])))
        for segment in self._segments[:-1]:
            rows = self._next(rows, segment.run(rows.inputs, rows.mask)[0], None)
        return self._segments[-1].run(rows.inputs, rows.mask)[0]

    def _policy_of_merged_graph(self) -> ExitPolicy | None:
        manifest = self.manifest
        if manifest.merged is None or manifest.merged.exit_layers != self.exit_layers:
            return None
        return own_policy(
            manifest.policy,
            manifest.top_k,
            manifest.problem_type,
            len(manifest.label_names) or 1,
            len(self.exit_layers) + 1,
        )

    def _next(
        self, rows: SegmentRows, hidden_states: np.ndarray, history: PolicyHistory | None
    ) -> SegmentRows:
        return SegmentRows(
            rows.positions, rows.segment + 1, {HIDDEN_STATES: hidden_states}, rows.mask, history
        )

    def _select(
        self, rows: SegmentRows, hidden_states: np.ndarray, history: PolicyHistory | None, stay: np.ndarray
    ) -> SegmentRows:
        mask = rows.mask[stay]
        tokens = longest(mask)
        kept = np.ascontiguousarray(hidden_states[:, :tokens][stay])
        return SegmentRows(
            rows.positions[stay],
            rows.segment + 1,
            {HIDDEN_STATES: kept},
            np.ascontiguousarray(mask[:, :tokens]),
            None if history is None else history.select(stay),
        )


class _OpenGraph:
    """A graph in memory."""

    def __init__(self, runtime: Any, folder: Path, options: Any, graph: Segment | Head | MergedGraph) -> None:
        path = folder / graph.file
        try:
            self._session = runtime.InferenceSession(
                str(path), sess_options=options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime raises a kind of its own for each fault
            raise InputError(
                f"{path}: is no graph that ONNX Runtime {runtime.__version__} can run ({_first_line(error)}): "
                "copy the whole folder again, export the model again (alembert export), or install a newer "
                "onnxruntime"
            ) from error
        self._inputs = tuple(entry.name for entry in self._session.get_inputs())
        outputs = tuple(entry.name for entry in self._session.get_outputs())
        if set(self._inputs) != set(graph.inputs) or outputs != graph.outputs:
            raise InputError(
                f"{path}: reads {', '.join(self._inputs)} and gives {', '.join(outputs)}, which is not what "
                "manifest.json says: export the model again (alembert export)"
            )
        self._outputs = list(outputs)

    def run(self, inputs: dict[str, np.ndarray], mask: np.ndarray) -> list[np.ndarray]:
        """All outputs, in the manifest's order; `inputs` as in `SegmentRows`."""
        feeds = {name: mask if name == "attention_mask" else inputs[name] for name in self._inputs}
        return self._session.run(self._outputs, feeds)  # type: ignore[no-any-return]


def open_export(
    folder: str | Path,
    *,
    max_length: int | None = None,
    is_pair: bool | None = None,
    exits: Sequence[int] | None = None,
    device: Any = None,
    threads: int | None = None,
    verify: bool = True,
) -> OpenedClassifier:
    """An exported folder, ready to run.

    Args:
        folder: what `alembert export` wrote.
        max_length: texts are cut to this many tokens; None = as exported, which is also the most.
        is_pair: whether inputs are pairs of texts; None = as exported.
        exits: the layers whose exits are used; None = all that were exported.
        device: None or "cpu".
        threads: of the processor; None = as many as the process may use.
        verify: whether every file is compared with its checksum.

    Raises:
        InputError: the folder is no whole export, a file is not the one that was exported, or an option does not
            fit the model.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    if str(device or "cpu") != "cpu":
        raise InputError(f"device {device!r}: an exported model runs on the processor; leave it out")
    if verify:
        manifest.check(folder)
    encoder = TokenizersEncoder(
        folder,
        reads_token_types="token_type_ids" in manifest.segments[0].inputs,
        pad_token_id=manifest.pad_token_id,
        pad_token_type_id=manifest.pad_token_type_id,
        truncation_side=manifest.truncation_side,
    )
    if manifest.precision == "int8" and not manifest.reduce_range and adds_up_in_16_bits():
        logger.warning(
            "%s: this processor has no VNNI instructions, without which sums of 8-bit products can overflow and give "
            "wrong answers: export the model with --reduce-range for it",
            folder,
        )
    pair = manifest.is_pair if is_pair is None else is_pair
    shortest = encoder.added_tokens(bool(pair)) + 1
    length = manifest.max_length if max_length is None else max_length
    if not shortest <= length <= manifest.max_length:
        raise InputError(
            f"max length {length}: this model was exported for {shortest} to {manifest.max_length} tokens"
        )
    encoder.cut_to(length)
    return OpenedClassifier(
        backend=OnnxBackend(folder, manifest, exits=exits, threads=threads),
        encoder=encoder,
        facts=ClassifierFacts(manifest.problem_type, manifest.label_names),
        max_length=length,
        is_pair=pair,
        speed=manifest.speed,
        policy=manifest.policy,
        top_k=manifest.top_k,
        tokenizer=encoder.tokenizer,
    )


def return_freed_memory() -> bool:
    """Gives back what reading graphs has freed, a fifth of a model's size, which glibc would keep; whether it can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
    return trim is not None


def longest(mask: np.ndarray) -> int:
    """Columns of a mask (rows, tokens) up to the last one in which any row has a token; at least 1."""
    columns = np.flatnonzero(mask.any(axis=0))
    return int(columns[-1]) + 1 if len(columns) else 1


def _session_options(runtime: Any, threads: int) -> Any:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # The graphs are stored as optimised; ONNX Runtime's further fusions made them slower.
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    # A plan of the memory would be kept for every size of batch that ever came, without end.
    options.enable_mem_pattern = False
    # Every segment has threads of its own; those of one must not spin while the next one runs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    _share_memory(runtime)
    options.add_session_config_entry("session.use_env_allocators", "1")
    return options


def _share_memory(runtime: Any) -> None:
    """Lets all segments take memory from one pool: they run one after another, and each would keep its own peak."""
    global _memory_is_shared  # noqa: PLW0603 (the pool is the process's)
    with _lock:
        if not _memory_is_shared:
            kind = runtime.OrtAllocatorType.ORT_ARENA_ALLOCATOR
            place = runtime.OrtMemoryInfo("Cpu", kind, 0, runtime.OrtMemType.DEFAULT)
            runtime.create_and_register_allocator(place, None)
            _memory_is_shared = True


def _exited(probabilities: np.ndarray, layer: int, uncertainty: np.ndarray) -> ExitedBatch:
    return ExitedBatch(probabilities, np.full(len(probabilities), layer), uncertainty)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _import_runtime() -> Any:
    try:
        return import_module("onnxruntime")
    except ImportError as error:
        raise InputError(
            f"an exported model needs ONNX Runtime: {install_extra('onnx')}, or install the light distribution"
        ) from error
