"""What a model is worth at every speed: quality, MACs, and measured time, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from alembert.benchmarks.flops import FLOPS_PER_MAC, CostModel
from alembert.benchmarks.timing import Timing, interleave, machine_description, ratio
from alembert.common.errors import InputError
from alembert.data.metrics import bootstrap_interval, compute_metrics, expected_calibration_error
from alembert.data.task import Task
from alembert.data.validation import check_same_labels
from alembert.runtime.adaptive import AdaptiveClassifier, Text
from alembert.runtime.policies import ExitPolicy, PolicyHistory, check_speed
from alembert.runtime.torch_backend import to_probabilities


@dataclass(frozen=True)
class ExitAnswers:
    """Every exit's answer to every text, from one pass: any policy and speed can be replayed from it.

    Attributes:
        exit_layers: layers of the exits, ascending, the full model's last.
        logits: (rows, exits, labels) float32.
        learned_uncertainties: (rows, exits − 1) float32, of models with a learned exit.
        lengths: (rows,) tokens of each text.
    """

    exit_layers: tuple[int, ...]
    logits: np.ndarray
    learned_uncertainties: np.ndarray | None
    lengths: np.ndarray

    def replay(self, policy: ExitPolicy, speed: float) -> np.ndarray:
        """Index (rows,) of the exit that each text takes, as the runtime would decide."""
        rows = len(self.logits)
        taken = np.full(rows, len(self.exit_layers) - 1)
        running = np.arange(rows)
        history: PolicyHistory | None = None
        if speed == 0:
            return taken
        for index in range(len(self.exit_layers) - 1):
            logits = torch.from_numpy(self.logits[running, index])
            probabilities = to_probabilities(logits, policy.problem_type).numpy()
            learned = (
                None if self.learned_uncertainties is None else self.learned_uncertainties[running, index]
            )
            uncertainty, history = policy.uncertainty(probabilities, history, learned)
            leaves = uncertainty < speed
            taken[running[leaves]] = index
            running = running[~leaves]
            history = None if history is None else history.select(~leaves)
        return taken


def collect_exit_answers(
    classifier: AdaptiveClassifier, texts: Sequence[Text], progress: Callable[[int, int], None] | None = None
) -> ExitAnswers:
    """Runs every layer and every exit over all texts once."""
    encoded = classifier.encode(texts)
    lengths = np.array([len(row["input_ids"]) for row in encoded])
    batches = classifier.batches(encoded)
    logits = np.empty((len(texts), len(classifier.exit_layers), len(classifier.label_names) or 1), np.float32)
    learned: np.ndarray | None = None
    for done, (positions, batch) in enumerate(batches, 1):
        batch_logits, batch_learned = classifier.backend.run_all_exits(batch)
        logits[positions] = batch_logits.float().cpu().numpy()
        if batch_learned is not None:
            learned = (
                np.empty((len(texts), len(classifier.exit_layers) - 1), np.float32)
                if learned is None
                else learned
            )
            learned[positions] = batch_learned.float().cpu().numpy()
        if progress is not None:
            progress(done, len(batches))
    return ExitAnswers(classifier.exit_layers, logits, learned, lengths)


def task_texts(task: Task, split: str) -> list[Text]:
    """The texts or pairs of a split."""
    dataset = task.dataset(split)
    if task.is_pair:
        return list(zip(dataset["text"], dataset["text_pair"], strict=True))
    return list(dataset["text"])


def measure_quality(
    answers: ExitAnswers, labels: np.ndarray, task: Task, costs: CostModel, policy: ExitPolicy, speed: float
) -> dict[str, Any]:
    """Quality and MACs at one speed, replayed: the entries of a speed's row that need no clock."""
    taken = answers.replay(policy, speed)
    logits = answers.logits[np.arange(len(taken)), taken]
    layers = np.array(answers.exit_layers)[taken]
    active = answers.exit_layers[:-1] if speed > 0 else ()
    macs = costs.macs(layers, answers.lengths, active_exits=active)
    full_macs = costs.full_model_macs(answers.lengths)
    metrics = compute_metrics(task.problem_type, task.metrics, logits, labels)
    low, high = bootstrap_interval(task.problem_type, task.main_metric, logits, labels)
    mean_macs = float(macs.mean())
    return {
        "speed": speed,
        "policy": policy.name,
        "top_k": policy.top_k,
        "renormalise": policy.renormalise,
        "metric": metrics[task.main_metric],
        "metric_interval": [low, high],
        "metrics": metrics,
        "agreement": _agreement(logits, answers.logits[:, -1], task.problem_type),
        "macs": mean_macs,
        "flops": FLOPS_PER_MAC * mean_macs,
        "macs_full_convention": float(
            costs.macs(layers, answers.lengths, "full", active_exits=active).mean()
        ),
        "speedup": float(full_macs.mean()) / mean_macs,
        "exits": {str(layer): float((layers == layer).mean()) for layer in answers.exit_layers},
        "exit_metrics": _exit_metrics(task, logits, labels, layers, answers.exit_layers),
    }


def evaluate(
    classifier: AdaptiveClassifier,
    task: Task,
    split: str,
    speeds: Sequence[float],
    *,
    model_name: str,
    data_name: str,
    policy: str | None = None,
    top_k: int | None = None,
    renormalise: bool | None = None,
    repeats: int = 3,
    timing_rows: int = 512,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Measures a classifier at several speeds and returns the results of `alembert evaluate`.

    Quality, exits and MACs come from all rows of the split: one pass collects every exit's answer, and each speed's
    decisions are replayed from it. Time is measured by really running each speed, and the stock full model, over a
    sample of `timing_rows` texts: interleaved, with warm-up, in the same batches, tokenisation left out on
    all sides. `timing` says how far the replayed exits agree with those really taken.

    Args:
        classifier: model, tokenizer and batching.
        task: labelled data; its labels must be the model's.
        split: which split.
        speeds: each in [0, 1].
        model_name, data_name: for the record.
        policy, top_k, renormalise: over the classifier's.
        repeats: timed rounds; 0 leaves time out.
        timing_rows: texts in the timed sample.
        seed: of the sample.
        progress: called with a description, steps done and steps in all.

    Examples:
        >>> import alembert
        >>> classifier = alembert.AdaptiveClassifier.from_pretrained("runs/fast")
        >>> task = alembert.load_task("topics/")
        >>> results = alembert.evaluate(
        ...     classifier, task, "test", [0.0, 0.5], model_name="fast", data_name="topics", repeats=0
        ... )
        >>> [row["speed"] for row in results["speeds"]]
        [0.0, 0.5]

    Raises InputError for wrong speeds, an empty text, and labels that are not the model's.
    """
    if not speeds:
        raise InputError("no speeds given: name at least one between 0 and 1")
    speeds = [check_speed(speed) for speed in speeds]
    check_same_labels(classifier.label_names, task, model_name)
    chosen = classifier.policy(policy, top_k, renormalise)
    texts, labels = task_texts(task, split), np.asarray(task.dataset(split)["labels"])
    notify = progress or (lambda *_: None)
    answers = collect_exit_answers(
        classifier, texts, lambda done, total: notify("running every exit", done, total)
    )
    costs = CostModel.from_model(classifier.backend.model)
    rows = [measure_quality(answers, labels, task, costs, chosen, speed) for speed in speeds]
    full = measure_quality(answers, labels, task, costs, chosen, 0.0)
    results: dict[str, Any] = {
        "alembert_version": version("alembert"),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": model_name,
        "data": data_name,
        "split": split,
        "rows": len(texts),
        "task": {
            "problem_type": task.problem_type,
            "metric": task.main_metric,
            "num_labels": task.num_labels,
        },
        "machine": machine_description(classifier.backend.device),
        "batch_tokens": classifier.batch_tokens,
        "max_length": classifier.max_length,
        "dtype": classifier.backend.dtype,
        "exit_layers": list(classifier.exit_layers),
        "repeats": repeats,
        "full_model": {
            name: full[name] for name in ("metric", "metric_interval", "metrics", "macs", "flops")
        },
        "speeds": rows,
    }
    if repeats:
        _add_timings(results, classifier, texts, answers, chosen, speeds, repeats, timing_rows, seed, notify)
    return results


def _add_timings(
    results: dict[str, Any],
    classifier: AdaptiveClassifier,
    texts: Sequence[Text],
    answers: ExitAnswers,
    policy: ExitPolicy,
    speeds: Sequence[float],
    repeats: int,
    timing_rows: int,
    seed: int,
    notify: Callable[[str, int, int], None],
) -> None:
    sample = np.random.default_rng(seed).permutation(len(texts))[:timing_rows]
    batches = classifier.batches(classifier.encode([texts[index] for index in sample]))
    timed = sample[np.concatenate([positions for positions, _ in batches])]
    backend = classifier.backend

    def full_model() -> None:
        for _, batch in batches:
            backend.run_stock(batch)

    exits_taken: dict[float, np.ndarray] = {}

    def adaptive(speed: float) -> Callable[[], None]:
        def run() -> None:
            exited = [backend.run(batch, policy, speed) for _, batch in batches]
            exits_taken[speed] = np.concatenate([part.exit_layers for part in exited])

        return run

    candidates = {"full": full_model} | {f"speed {speed}": adaptive(speed) for speed in speeds}
    timings = interleave(
        candidates, repeats=repeats, progress=lambda done, total: notify("measuring time", done, total)
    )
    full = timings["full"]
    results["full_model"] |= _throughput(full, len(sample))
    results["timing"] = {"rows": len(sample), "seed": seed, "tokenisation": "left out"}
    for row, speed in zip(results["speeds"], speeds, strict=True):
        timing = timings[f"speed {speed}"]
        against = ratio(full, timing)
        layers = exits_taken[speed]
        replayed = np.array(answers.exit_layers)[answers.replay(policy, speed)][timed]
        row.update(
            _throughput(timing, len(sample)),
            ratio_to_full=against.median,
            ratio_to_full_quartiles=[against.lower, against.upper],
            same_exit_as_replayed=float((layers == replayed).mean()),
            sample_speedup=_sample_speedup(classifier, layers, answers.lengths[timed], speed),
        )


def _sample_speedup(
    classifier: AdaptiveClassifier, layers: np.ndarray, lengths: np.ndarray, speed: float
) -> float:
    """MACs of the full model over those of the exits taken, on the timed sample alone."""
    costs = CostModel.from_model(classifier.backend.model)
    active = classifier.exit_layers[:-1] if speed > 0 else ()
    return float(
        costs.full_model_macs(lengths).sum() / costs.macs(layers, lengths, active_exits=active).sum()
    )


def _throughput(timing: Timing, rows: int) -> dict[str, Any]:
    quartiles = timing.per_second(rows)
    return {
        "texts_per_second": quartiles.median,
        "texts_per_second_quartiles": [quartiles.lower, quartiles.upper],
    }


def _agreement(logits: np.ndarray, full_logits: np.ndarray, problem_type: str) -> float | None:
    """Share of texts answered as by the full model; None for regression."""
    if problem_type == "regression":
        return None
    if problem_type == "multi_label_classification":
        return float(((logits > 0) == (full_logits > 0)).all(-1).mean())
    return float((logits.argmax(-1) == full_logits.argmax(-1)).mean())


def _exit_metrics(
    task: Task, logits: np.ndarray, labels: np.ndarray, layers: np.ndarray, exit_layers: Sequence[int]
) -> dict[str, Any]:
    """Rows, main metric and, for single labels, calibration error of the texts that left at each exit."""
    result: dict[str, Any] = {}
    for layer in exit_layers:
        left = layers == layer
        if left.sum() < 2:
            continue
        entry: dict[str, Any] = {"rows": int(left.sum())}
        metric = compute_metrics(task.problem_type, (task.main_metric,), logits[left], labels[left])
        entry["metric"] = metric[task.main_metric]
        if task.problem_type == "single_label_classification":
            probabilities = to_probabilities(torch.from_numpy(logits[left]), task.problem_type).numpy()
            entry["expected_calibration_error"] = expected_calibration_error(probabilities, labels[left])
        result[str(layer)] = entry
    return result
