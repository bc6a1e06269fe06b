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

from alembert.benchmarks.evaluation import ExitAnswers, collect_exit_answers
from alembert.benchmarks.flops import CostModel
from alembert.common.errors import InputError
from alembert.models.multi_exit import MultiExitModel
from alembert.runtime.adaptive import AdaptiveClassifier, Text
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
    """

    stretches: dict[int, float]
    heads: dict[int, float]

    def per_text(self, exits: Sequence[int], taken: np.ndarray) -> float:
        """Mean time of texts that leave after layers `taken` (rows,) when the exits after layers `exits` run."""
        layers = sum(ms * (taken >= layer).mean() for layer, ms in self.stretches.items())
        heads = sum(self.heads[layer] * (taken >= layer).mean() for layer in exits)
        return float(layers + heads)


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
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Leaves out exits one by one as long as the mean time per text falls.

    Every exit answers every text once; the policy is then replayed for each choice of exits, so that texts which left
    at an exit left out go on to the next. Layers and heads are timed as exported graphs, on one thread.

    Args:
        source: a run with exits.
        texts: like those to come; the first `MAX_TEXTS` are used.
        precision: "fp32" or "int8", of the timed graphs.
        exits: layers of the exits to choose from; None = all.
        speeds: the exits must pay on average over these.
        policy: over the model's own.
        progress: called with a description, steps done and steps in all.

    Returns:
        "exits" (layers kept), "ms_before" and "ms_after" (per text), "texts", "tokens" (of the timed batch),
        "speeds", and "exits_measured": for each exit "exit", "share" (of texts that leave there with all exits),
        "head_ms", "ms_without" (time per text with this one alone left out) and "kept".

    Raises:
        InputError: the model has no exits, or there are no texts.
    """
    texts = list(texts[:MAX_TEXTS])
    if not texts:
        raise InputError("no texts to choose exits by: give a file with texts like those to come")
    chosen_speeds = [check_speed(speed) for speed in speeds]
    classifier = AdaptiveClassifier.from_pretrained(source, exits=exits, device="cpu")
    model = classifier.backend.model
    known = classifier.backend.exit_layers
    if not isinstance(model, MultiExitModel) or not known:
        raise InputError(f"{source}: has no exits to choose from: distil exits first (alembert distill)")
    notify = progress or (lambda *_: None)
    answers = collect_exit_answers(
        classifier, texts, lambda done, total: notify("running every exit", done, total)
    )
    tokens = int(np.median(answers.lengths))
    times = time_parts(model, known, precision, tokens, notify)
    rule = classifier.policy(policy)

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
    model: MultiExitModel,
    exits: Sequence[int],
    precision: str,
    tokens: int,
    progress: Callable[[str, int, int], None],
) -> PartTimes:
    """Times layers and heads as exported graphs, on one thread, with `TIMED_ROWS` texts of `tokens` tokens."""
    from alembert.runtime.export import write_segment
    from alembert.runtime.segment_graph import SegmentModule, segment_modules

    hidden_size = model.layered.hidden_size
    modules: dict[tuple[str, int], Any] = {
        ("stretch", module.last): module
        for module in segment_modules(model, exits, token_types=False)
        if isinstance(module, SegmentModule)
    }
    # A stretch of no layers is the head alone.
    modules |= {("head", layer): SegmentModule(model, layer + 1, layer, token_types=False) for layer in exits}
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        for done, (key, module) in enumerate(modules.items()):
            progress("timing layers and heads", done, len(modules))
            path = Path(folder) / "part.onnx"
            write_segment(module, path, hidden_size, precision)
            measured[key] = _time(path, tokens, hidden_size)
    progress("timing layers and heads", len(modules), len(modules))
    heads = {layer: measured["head", layer] for layer in exits}
    stretches = {
        layer: max(0.0, ms - heads.get(layer, 0.0))
        for (part, layer), ms in measured.items()
        if part == "stretch"
    }
    return PartTimes(stretches, heads)


def _time(path: Path, tokens: int, hidden_size: int) -> float:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    shape = (TIMED_ROWS, tokens)
    examples = {
        "input_ids": np.ones(shape, np.int64),
        "attention_mask": np.ones(shape, np.int64),
        "hidden_states": np.random.default_rng(0).normal(size=(*shape, hidden_size)).astype(np.float32),
    }
    feeds = {entry.name: examples[entry.name] for entry in session.get_inputs()}
    best = np.inf
    for _ in range(TIMED_ROUNDS + 1):
        start = time.perf_counter()
        session.run(None, feeds)
        best = min(best, time.perf_counter() - start)
    return float(best) * 1000 / TIMED_ROWS


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
