"""Which exits earn their place: every exit's head is timed, and the texts of a file say how often it pays."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from alembert.benchmarks.evaluation import ExitAnswers
from alembert.benchmarks.flops import CostModel
from alembert.benchmarks.replayed_exits import collect_answers
from alembert.common.errors import InputError
from alembert.models.loading import classifier_facts, load_classifier
from alembert.models.multi_exit import MultiExitModel
from alembert.runtime.adaptive import AdaptiveClassifier, Text
from alembert.runtime.export import export_classifier
from alembert.runtime.manifest import Head, Manifest, Segment
from alembert.runtime.policies import ExitPolicy, check_speed

DEFAULT_SPEEDS: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7)
MAX_TEXTS = 2000
TIMED_ROWS = 32
TIMED_ROUNDS = 5


@dataclass(frozen=True)
class PartTimes:
    """Time per text of a model's parts, in milliseconds.

    Attributes:
        stretches: for every exit, and last for the full model's head (N): the layers since the exit before it,
            the heads left out but for the last one.
        heads: for every exit, its head.
        border: to hand a text on from one graph to the next; counted in neither of the others.
    """

    stretches: dict[int, float]
    heads: dict[int, float]
    border: float = 0.0

    def per_text(self, exits: Sequence[int], taken: np.ndarray) -> float:
        """Mean time of texts that leave after layers `taken` (rows,) when the exits after layers `exits` run.

        Without an exit two stretches are one graph, so that its border is saved as well as its head.
        """
        layers = sum(ms * (taken >= layer).mean() for layer, ms in self.stretches.items())
        heads = sum(self.heads[layer] * (taken >= layer).mean() for layer in exits)
        borders = sum(self.border * (taken > layer).mean() for layer in exits)
        return float(layers + heads + borders)


def segment_macs(model: PreTrainedModel, exits: Sequence[int], length: int = 128) -> list[int]:
    """MACs of every segment between these exits for one text, its head included, in the paper convention."""
    costs = CostModel.from_model(model)
    ends, before, counts = [*exits, costs.num_layers], 0, []
    for end in ends:
        total = int(costs.macs(end, length, active_exits=[layer for layer in exits if layer <= end]))
        counts.append(total - before)
        before = total
    return counts


def prune_exits(
    source: str | Path,
    texts: Sequence[Text],
    *,
    precision: str = "int8",
    exits: Sequence[int] | None = None,
    speeds: Sequence[float] = DEFAULT_SPEEDS,
    policy: str | None = None,
    top_k: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Leaves out exits one by one as long as the mean time per text falls.

    The model is exported as it will be. Every exit of the export answers every text once; the policy is then replayed
    for each choice of exits, so that texts which left at an exit left out go on to the next. Its layers and heads, and
    what a border between two graphs costs, are timed on one thread.

    Args:
        source: a run with exits.
        texts: like those to come; the first `MAX_TEXTS` are used.
        precision: "fp32" or "int8", of the export.
        exits: layers of the exits to choose from; None = all.
        speeds: the exits must pay on average over these.
        policy, top_k: over the model's own.
        progress: called with a description, steps done and steps in all.

    Returns:
        "exits" (layers kept), "ms_before" and "ms_after" (per text), "texts", "tokens" (of the timed batch),
        "speeds", "border_ms" (per text, from graph to graph), and "exits_measured": for each exit "exit", "share"
        (of texts that leave there with all exits), "head_ms", "ms_without" (time per text with this one alone left
        out) and "kept".

    Raises:
        InputError: the model has no exits, or there are no texts.
    """
    texts = list(texts[:MAX_TEXTS])
    if not texts:
        raise InputError("no texts to choose exits by: give a file with texts like those to come")
    chosen_speeds = [check_speed(speed) for speed in speeds]
    model = load_classifier(str(source))
    if not isinstance(model, MultiExitModel):
        raise InputError(f"{source}: has no exits to choose from: distil exits first (alembert distill)")
    if policy is not None:
        facts = classifier_facts(model)
        ExitPolicy(policy, facts.problem_type, top_k=top_k).resolve(len(facts.label_names) or 1)
    notify = progress or (lambda *_: None)
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "exported"
        manifest = export_classifier(source, exported, precision=precision, exits=exits, progress=progress)
        classifier = AdaptiveClassifier.from_pretrained(exported, threads=1, verify=False)
        answers = collect_answers(
            classifier, texts, lambda done, total: notify("running every exit", done, total)
        )
        tokens = int(np.median(answers.lengths))
        times = time_parts(manifest, exported, tokens, notify)
    known = manifest.exit_layers
    rule = classifier.policy(policy, top_k)

    def cost(layers: Sequence[int]) -> float:
        return float(
            np.mean([times.per_text(layers, _taken(answers, rule, layers, s)) for s in chosen_speeds])
        )

    kept = list(known)
    before = current = cost(kept)
    without = {layer: cost([other for other in known if other != layer]) for layer in known}
    while kept:
        costs = {layer: cost([other for other in kept if other != layer]) for layer in kept}
        cheapest = min(costs, key=lambda layer: costs[layer])
        if costs[cheapest] >= current:
            break
        current = costs[cheapest]
        kept.remove(cheapest)
    taken = np.concatenate([_taken(answers, rule, known, speed) for speed in chosen_speeds])
    return {
        "exits": kept,
        "texts": len(texts),
        "tokens": tokens,
        "precision": precision,
        "policy": rule.name,
        "speeds": chosen_speeds,
        "ms_before": before,
        "ms_after": current,
        "border_ms": times.border,
        "exits_measured": [
            {
                "exit": layer,
                "share": float((taken == layer).mean()),
                "head_ms": times.heads[layer],
                "ms_without": without[layer],
                "kept": layer in kept,
            }
            for layer in known
        ],
    }


def time_parts(
    manifest: Manifest, folder: Path, tokens: int, progress: Callable[[str, int, int], None]
) -> PartTimes:
    """Times an export's graphs, on one thread, with `TIMED_ROWS` texts of `tokens` tokens."""
    graphs: dict[tuple[str, int], Segment | Head] = {("stretch", s.exit_layer): s for s in manifest.segments}
    graphs |= {("head", layer): head for layer, head in manifest.heads.items()}
    border = _time_border(tokens, manifest.hidden_size)
    parts: dict[str, dict[int, float]] = {"stretch": {}, "head": {}}
    for done, ((kind, layer), graph) in enumerate(graphs.items()):
        progress("timing layers and heads", done, len(graphs))
        # A stretch's own time holds what the call costs, which is part of the border.
        called = border if kind == "stretch" and layer != manifest.segments[0].exit_layer else 0.0
        parts[kind][layer] = max(0.0, _time(folder / graph.file, tokens, manifest.hidden_size) - called)
    progress("timing layers and heads", len(graphs), len(graphs))
    return PartTimes(parts["stretch"], parts["head"], border)


def _time(path: Path, tokens: int, hidden_size: int) -> float:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    shape = (TIMED_ROWS, tokens)
    examples = {name: np.ones(shape, np.int64) for name in ("input_ids", "attention_mask")}
    examples["token_type_ids"] = np.zeros(shape, np.int64)
    examples["hidden_states"] = _hidden_states(tokens, hidden_size)
    feeds = {entry.name: examples[entry.name] for entry in session.get_inputs()}
    return _best(lambda: session.run(None, feeds))


def _time_border(tokens: int, hidden_size: int) -> float:
    """A call of a graph that does nothing but hand hidden states out, and the packing of the rows that go on."""
    import onnxruntime
    from onnx import TensorProto, helper

    given, out = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", "tokens", hidden_size])
        for name in ("given", "out")
    )
    graph = helper.make_graph([helper.make_node("Identity", ["given"], ["out"])], "border", [given], [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    states, stay = _hidden_states(tokens, hidden_size), np.arange(TIMED_ROWS) % 4 > 0
    return _best(lambda: session.run(None, {"given": states})[0][stay])


def _best(call: Callable[[], Any]) -> float:
    best = np.inf
    for _ in range(TIMED_ROUNDS + 1):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return float(best) * 1000 / TIMED_ROWS


def _hidden_states(tokens: int, hidden_size: int) -> np.ndarray:
    values = np.random.default_rng(0).normal(size=(TIMED_ROWS, tokens, hidden_size))
    return values.astype(np.float32)


def _taken(answers: ExitAnswers, policy: ExitPolicy, exits: Sequence[int], speed: float) -> np.ndarray:
    """Layers (rows,) after which the texts leave when the exits after layers `exits` run."""
    layers = (*exits, answers.exit_layers[-1])
    columns = [answers.exit_layers.index(layer) for layer in layers]
    learned = answers.learned_uncertainties
    some = ExitAnswers(
        layers,
        answers.logits[:, columns],
        None if learned is None else learned[:, columns[:-1]],
        answers.lengths,
    )
    taken: np.ndarray = np.array(layers)[some.replay(replace(policy, num_exits=len(layers)), speed)]
    return taken
