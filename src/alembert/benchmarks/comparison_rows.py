"""The rows of `alembert benchmark`: what was measured of each engine and speed, put into numbers."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from alembert.benchmarks.engines import Label, Text
from alembert.benchmarks.graph_macs import GraphCosts
from alembert.benchmarks.outside import OutsideProgram, read_labels
from alembert.benchmarks.timing import Quartiles, Timing, ratio
from alembert.benchmarks.worker import Worker
from alembert.data.metrics import bootstrap_interval, compute_metrics
from alembert.data.task import Task

POLICY_SETTINGS = ("top_k", "renormalise", "tolerance")
"""What a row says of its policy, besides the name."""
IN_ORDER, BY_LENGTH, WHOLE_PROCESS = "input order", "by length", "whole process"
"""How texts come into batches."""


@dataclass
class Candidate:
    """An engine at a speed, and its answers to all texts.

    Attributes:
        name: of the model.
        backend: "transformers", "onnxruntime", "torch" or "onnx"; the last two are Alembert's.
        precision: of the weights.
        batching: `IN_ORDER` or `BY_LENGTH`.
        batch_size, batch_tokens: which of them limits a batch; the other is None.
        worker: where the engine is asked from; candidates that differ in speed alone share it.
        speed, policy: of a model with exits; the policy's name and settings.
        has_exits: whether it is one.
        load_seconds: what loading took.
        exits: layers of the exits that are used.
        graph_costs: what an exported model's graphs compute; None for others, and where it is not known.
        labels, exit_layers: per text, in the order of the split.
        macs, macs_executed: per text, in the `paper` convention and as really computed; None where they are not known.
    """

    name: str
    backend: str
    precision: str
    batching: str
    batch_size: int | None
    batch_tokens: int | None
    worker: Worker
    policy: Mapping[str, Any] | None
    has_exits: bool
    load_seconds: float
    speed: float = 0.0
    exits: tuple[int, ...] = ()
    graph_costs: GraphCosts | None = None
    labels: list[Label] = field(default_factory=list)
    exit_layers: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    macs: np.ndarray | None = None
    macs_executed: np.ndarray | None = None

    @property
    def title(self) -> str:
        """Unique among the candidates."""
        return f"{self.name} ({self.backend} {self.precision}, {self.batching}) at speed {self.speed:g}"

    def answer(self, texts: Sequence[Text]) -> None:
        """Has the engine label all texts."""
        reply = self.worker.ask("answers", texts=texts, speed=self.speed)
        self.labels = reply["labels"]
        self.exit_layers = np.array(reply["exit_layers"])
        self.macs = None if reply["macs"] is None else np.array(reply["macs"])
        executed = reply["macs_executed"]
        self.macs_executed = None if executed is None else np.array(executed)
        if self.graph_costs is not None:
            active = self.exits if self.speed > 0 else ()
            self.macs_executed = self.graph_costs.macs(self.exit_layers, np.array(reply["lengths"]), active)


@dataclass
class OutsideCandidate:
    """A program of others, its answers to all texts, and the peak memory of that run in MB."""

    program: OutsideProgram
    labels: list[Label]
    peak_memory_mb: float

    @classmethod
    def measure(cls, program: OutsideProgram, task: Task, texts: Sequence[Text]) -> OutsideCandidate:
        """Has the program label all texts; InputError when it fails."""
        lines, run = program.label(texts)
        where = f"--against {program.name}"
        return cls(
            program, read_labels(lines, task.problem_type, task.label_names, where), run.peak_memory_mb
        )

    @property
    def title(self) -> str:
        """Unique among the candidates."""
        return f"{self.program.name} (outside)"

    def seconds(self, texts: Sequence[Text]) -> float:
        """What n texts take without the program's start: n / (n − 1) of what n take more than one does.

        Infinite where n take no longer than one, so that nothing can be said.
        """
        _, one = self.program.label(texts[:1])
        _, many = self.program.label(texts)
        difference = many.seconds - one.seconds
        return difference * len(texts) / (len(texts) - 1) if difference > 0 else math.inf


@dataclass(frozen=True)
class Measurements:
    """All that was measured, by candidates' titles.

    Attributes:
        task, truth: what answers are scored by; truth as in the data set's "labels".
        sample: (timed,) positions of the timed texts.
        timings: seconds of all timed texts, by round.
        latencies: seconds of each text alone, by round; empty when they were left out.
        latency_rows: the first so many of the sample were run alone.
        memory: peak in MB by worker's identity; empty when it was left out.
        tokenisation: seconds of tokenising all timed texts, by worker's identity.
    """

    task: Task
    truth: np.ndarray
    sample: np.ndarray
    timings: Mapping[str, Timing]
    latencies: Mapping[str, list[list[float]]]
    latency_rows: int
    memory: Mapping[int, float | None]
    tokenisation: Mapping[int, float]

    def row(self, candidate: Candidate, candidates: Sequence[Candidate]) -> dict[str, Any]:
        """A candidate's row; the first of `candidates` is the baseline."""
        baseline = candidates[0]
        layers, policy = np.unique(candidate.exit_layers).tolist(), candidate.policy or {}
        return {
            "name": candidate.name,
            "backend": candidate.backend,
            "precision": candidate.precision,
            "batching": candidate.batching,
            "batch_size": candidate.batch_size,
            "batch_tokens": candidate.batch_tokens,
            "speed": candidate.speed if candidate.has_exits else None,
            "policy": policy.get("name"),
            **{name: policy.get(name) for name in POLICY_SETTINGS},
            **self._quality(candidate.labels, baseline.labels),
            **self._throughput(candidate.title, baseline.title),
            **_latency(self.latencies.get(candidate.title), self.latencies.get(baseline.title)),
            "macs": None if candidate.macs is None else float(candidate.macs.mean()),
            "macs_executed": None
            if candidate.macs_executed is None
            else float(candidate.macs_executed.mean()),
            "speedup": _times_fewer(baseline.macs, candidate.macs),
            "exits": {str(layer): float((candidate.exit_layers == layer).mean()) for layer in layers},
            "full_depth": self._full_depth(candidate, candidates),
            "peak_memory_mb": self.memory.get(id(candidate.worker)),
            "load_seconds": candidate.load_seconds,
            "tokenisation_ms": 1000 * self.tokenisation[id(candidate.worker)] / len(self.sample),
        }

    def outside_row(self, outside: OutsideCandidate, baseline: Candidate) -> dict[str, Any]:
        """The row of a program of others: what is not known of it is None."""
        unknown = (
            *(
                "precision",
                "batch_size",
                "batch_tokens",
                "speed",
                "policy",
                *POLICY_SETTINGS,
                "macs",
                "macs_executed",
                "speedup",
            ),
            *("exits", "full_depth", "load_seconds", "tokenisation_ms"),
        )
        return {
            **dict.fromkeys(unknown),
            "name": outside.program.name,
            "backend": "outside",
            "batching": WHOLE_PROCESS,
            **self._quality(outside.labels, baseline.labels),
            **self._outside_throughput(outside, baseline),
            **_latency(None, None),
            "peak_memory_mb": outside.peak_memory_mb,
            "command": outside.program.command,
        }

    def _quality(self, labels: Sequence[Label], baseline: Sequence[Label]) -> dict[str, Any]:
        task = self.task
        scores = as_scores(labels, task.problem_type, task.label_names)
        metrics = compute_metrics(task.problem_type, task.metrics, scores, self.truth)
        low, high = bootstrap_interval(task.problem_type, task.main_metric, scores, self.truth)
        same = None
        if task.problem_type != "regression":
            others = as_scores(baseline, task.problem_type, task.label_names)
            same = float((scores == others).all(axis=1).mean())
        return {
            "metric": metrics[task.main_metric],
            "metric_interval": [low, high],
            "metrics": metrics,
            "agreement": same,
        }

    def _throughput(self, title: str, baseline: str) -> dict[str, Any]:
        rate = self.timings[title].per_second(len(self.sample))
        against = ratio(self.timings[baseline], self.timings[title])
        return {
            "texts_per_second": rate.median,
            "texts_per_second_quartiles": _bounds(rate),
            "ratio_to_baseline": against.median,
            "ratio_to_baseline_quartiles": _bounds(against),
        }

    def _outside_throughput(self, outside: OutsideCandidate, baseline: Candidate) -> dict[str, Any]:
        measured = self._throughput(baseline.title, baseline.title)
        if all(map(math.isfinite, self.timings[outside.title].seconds)):
            return self._throughput(outside.title, baseline.title)
        logging.getLogger("alembert").warning(
            "%s: %d texts took no longer than one, so that its start hides its speed: time more rows",
            outside.program.name,
            len(self.sample),
        )
        return dict.fromkeys(measured)

    def _full_depth(self, candidate: Candidate, candidates: Sequence[Candidate]) -> dict[str, Any] | None:
        """Against the same engine at speed 0: the speed-up in time and those in MACs, on the timed texts.

        What arrives of a speed-up is told by the MACs that were really saved. The `paper` convention charges FastBERT
        heads more than they cost, so that its speed-up is smaller and the quotient by it larger.
        """
        full = next((c for c in candidates if c.worker is candidate.worker and c.speed == 0), None)
        if not candidate.has_exits or full is None:
            return None
        timed = ratio(self.timings[full.title], self.timings[candidate.title])
        result: dict[str, Any] = {"ratio": timed.median, "ratio_quartiles": _bounds(timed)}
        result |= _speedups(full, candidate, self.sample, timed.median)
        if self.latencies:
            # Means, because the MACs that they are compared with are means.
            means = np.mean(self.latencies[candidate.title], axis=1)
            ratios = np.mean(self.latencies[full.title], axis=1) / means
            latency = float(np.median(ratios))
            result["latency_ratio_quartiles"] = np.quantile(ratios, [0.25, 0.75]).tolist()
            alone = _speedups(full, candidate, self.sample[: self.latency_rows], latency)
            result |= {f"latency_{name}": value for name, value in ({"ratio": latency} | alone).items()}
        return result


def _speedups(
    full: Candidate, candidate: Candidate, rows: np.ndarray, measured: float
) -> dict[str, float | None]:
    """Speed-ups in MACs on some rows, and the quotients of the measured one by them."""
    paper = _times_fewer(full.macs, candidate.macs, rows)
    executed = _times_fewer(full.macs_executed, candidate.macs_executed, rows)
    return {
        "speedup": paper,
        "speedup_executed": executed,
        "ratio_over_speedup": executed and measured / executed,
        "ratio_over_paper_speedup": paper and measured / paper,
    }


def as_scores(labels: Sequence[Label], problem_type: str, names: Sequence[str]) -> np.ndarray:
    """Numbers (rows, labels) that decide as the labels did; regression: the values, (rows, 1)."""
    if problem_type == "regression":
        return np.array(labels, np.float64)[:, None]
    column = {name: place for place, name in enumerate(names)}
    scores = np.full((len(labels), len(names)), -1.0)
    for row, label in enumerate(labels):
        for name in label if isinstance(label, list) else [str(label)]:
            scores[row, column[name]] = 1.0
    return scores


def _times_fewer(
    many: np.ndarray | None, few: np.ndarray | None, rows: np.ndarray | None = None
) -> float | None:
    """The sum of `many` over that of `few`, of some rows or all."""
    if many is None or few is None:
        return None
    chosen = slice(None) if rows is None else rows
    return float(many[chosen].sum() / few[chosen].sum())


def _latency(rounds: list[list[float]] | None, baseline: list[list[float]] | None) -> dict[str, Any]:
    if rounds is None or baseline is None:
        ratios_of_p50 = ("p50_ratio_to_baseline", "p50_ratio_to_baseline_quartiles")
        return dict.fromkeys(("p50_ms", "p95_ms", "p99_ms", "mean_ms", *ratios_of_p50))
    p50, p95, p99 = (1000 * np.quantile(rounds, [0.5, 0.95, 0.99])).tolist()
    ratios = np.median(baseline, axis=1) / np.median(rounds, axis=1)
    return {
        "p50_ms": p50,
        "p95_ms": p95,
        "p99_ms": p99,
        "mean_ms": float(1000 * np.mean(rounds)),
        "p50_ratio_to_baseline": float(np.median(ratios)),
        "p50_ratio_to_baseline_quartiles": np.quantile(ratios, [0.25, 0.75]).tolist(),
    }


def _bounds(quartiles: Quartiles) -> list[float]:
    return [quartiles.lower, quartiles.upper]
