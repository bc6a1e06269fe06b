"""The engines of `alembert benchmark`: which there are, and loading them one after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alembert.benchmarks.comparison_rows import BY_LENGTH, IN_ORDER, Candidate
from alembert.benchmarks.comparison_settings import DEFAULT_SPEEDS, BenchmarkSettings
from alembert.benchmarks.engines import ALEMBERT, ONNXRUNTIME, TRANSFORMERS, EngineSettings, Text
from alembert.benchmarks.graph_macs import GraphCosts
from alembert.benchmarks.plain_onnx import export_plain_int8
from alembert.benchmarks.pruning import segment_macs
from alembert.benchmarks.worker import EngineRequests, ProcessWorker, Worker
from alembert.common.errors import InputError
from alembert.models.loading import classifier_facts, load_config
from alembert.runtime.manifest import Manifest, is_exported

Notify = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ModelFacts:
    """What must be known of a model before it is loaded: its labels and whether it has exits."""

    source: str
    exported: bool
    precision: str
    problem_type: str
    label_names: tuple[str, ...]
    has_exits: bool

    @classmethod
    def read(cls, source: str) -> ModelFacts:
        """From a manifest or a configuration; InputError when there is neither."""
        if is_exported(source):
            manifest = Manifest.read(source)
            return cls(
                source,
                True,
                manifest.precision,
                manifest.problem_type,
                manifest.label_names,
                bool(manifest.exit_layers),
            )
        config, facts = load_config(source), classifier_facts(source)
        has_exits = bool(getattr(config, "exit_layers", ()))
        return cls(source, False, "fp32", facts.problem_type, facts.label_names, has_exits)


def check_models(models: Sequence[str]) -> list[ModelFacts]:
    """The facts of the models, the first of which can be a baseline.

    Raises InputError when there are none, one is named twice or cannot be read, the first is an export, or labels
    differ.
    """
    if not models:
        raise InputError("give at least one model")
    twice = [source for source in models if models.count(source) > 1]
    if twice:
        raise InputError(f"{twice[0]} is given twice")
    facts = [ModelFacts.read(source) for source in models]
    first = facts[0]
    if first.exported:
        raise InputError(
            f"{first.source}: the first model is the baseline, which transformers runs; give the run directory that "
            "this was exported from, or the teacher, first"
        )
    for other in facts[1:]:
        if other.problem_type != first.problem_type or set(other.label_names) != set(first.label_names):
            raise InputError(
                f"{other.source}: has other labels than {first.source}, so they cannot be compared"
            )
    return facts


class Opener:
    """Loads the engines, one after the other, and has them hold the timed texts."""

    def __init__(
        self,
        settings: BenchmarkSettings,
        threads: int,
        stack: ExitStack,
        texts: Sequence[Text],
        sample: np.ndarray,
        notify: Notify,
    ) -> None:
        self.settings, self.threads, self.stack, self.notify = settings, threads, stack, notify
        self.timed = [texts[index] for index in sample]
        self.batch_tokens = settings.batch_tokens or 0
        self.mean_tokens = 0.0
        self.max_length = settings.max_length
        self.workers = self.expected = 0

    def open_all(self, facts: Sequence[ModelFacts], folder: Path) -> list[Candidate]:
        """The rows to measure, the baseline first."""
        settings, first, names = self.settings, facts[0], short_names([fact.source for fact in facts])
        given = sum(1 if fact.exported else len(settings.torch_precisions) for fact in facts)
        self.expected = 1 + len(settings.peers) + given
        baseline = self._open(names[0], first, TRANSFORMERS, "fp32")
        self.max_length = baseline.worker.ask("facts")["max_length"]
        lengths = np.array(baseline.worker.ask("lengths", texts=self.timed))
        self.mean_tokens = float(lengths.mean())
        if settings.batch_tokens is None:
            # As many texts in a batch as the others have, on average; a text beyond it has a batch of its own.
            self.batch_tokens = max(1, round(settings.batch_size * self.mean_tokens))
        candidates = [baseline]
        if "transformers-bf16" in settings.peers:
            candidates.append(self._open(names[0], first, TRANSFORMERS, "bf16"))
        if "onnx-int8" in settings.peers:
            plain = export_plain_int8(first.source, folder / "plain-int8")
            peer = dataclasses.replace(first, source=str(plain), precision="int8")
            candidates.append(self._open(names[0], peer, ONNXRUNTIME, "int8"))
        if "onnx-int8-sorted" in settings.peers:
            full = export_full_model(first.source, folder / "full-int8", self.max_length)
            peer = dataclasses.replace(
                first, source=str(full), exported=True, precision="int8", has_exits=False
            )
            candidates.append(self._open(names[0], peer, ALEMBERT, "int8"))
        for name, fact in zip(names, facts, strict=True):
            for precision in (fact.precision,) if fact.exported else settings.torch_precisions:
                opened = self._open(name, fact, ALEMBERT, precision)
                candidates += [
                    dataclasses.replace(opened, speed=speed) for speed in self._speeds(opened, fact)
                ]
        return candidates

    def _speeds(self, opened: Candidate, fact: ModelFacts) -> tuple[float, ...]:
        if not opened.has_exits:
            return (0.0,)
        if fact.source in self.settings.model_speeds:
            return tuple(dict.fromkeys(self.settings.model_speeds[fact.source]))
        if self.settings.speeds is not None:
            return tuple(dict.fromkeys(self.settings.speeds))
        # Speed 0 is also what a model has that nobody gave a speed.
        return (opened.speed,) if opened.speed > 0 else DEFAULT_SPEEDS

    def _open(self, name: str, fact: ModelFacts, kind: str, precision: str) -> Candidate:
        settings, adaptive = self.settings, kind == ALEMBERT and fact.has_exits
        batch_tokens = self.batch_tokens if kind == ALEMBERT else None
        engine = EngineSettings(
            source=fact.source,
            kind=kind,
            precision=precision,
            batch_size=settings.batch_size,
            batch_tokens=batch_tokens,
            threads=self.threads,
            device=settings.device,
            exits=settings.exits if adaptive else None,
            policy=settings.policy if adaptive else None,
            top_k=settings.top_k if adaptive else None,
            renormalise=settings.renormalise if adaptive else None,
            tolerance=settings.tolerance if adaptive else None,
            max_length=self.max_length if kind == ONNXRUNTIME else settings.max_length,
            own_speed=settings.speeds is None,
        )
        worker: Worker = ProcessWorker(engine) if settings.own_processes else EngineRequests(engine)
        self.stack.callback(worker.close)
        worker.ask("hold", texts=self.timed, alone=self.timed[: settings.latency_rows])
        self.workers += 1
        self.notify("loading", self.workers, self.expected)
        facts = worker.ask("facts")
        if settings.tolerance is not None and adaptive and facts["policy"]["tolerance"] is None:
            raise InputError(
                f"--tolerance {settings.tolerance}: is for regression under the policy patience, and {fact.source} "
                f"runs under {facts['policy']['name']}; leave it out"
            )
        # Counted here, so that the engine's own process holds no graph twice.
        costs = GraphCosts.of_export(fact.source) if fact.exported else None
        return Candidate(
            name=name,
            backend=kind if kind != ALEMBERT else ("onnx" if fact.exported else "torch"),
            precision=precision,
            batching=BY_LENGTH if kind == ALEMBERT else IN_ORDER,
            batch_size=settings.batch_size if batch_tokens is None else None,
            batch_tokens=batch_tokens,
            worker=worker,
            policy=facts["policy"] if adaptive else None,
            has_exits=adaptive,
            load_seconds=facts["load_seconds"],
            speed=facts["speed"] if adaptive else 0.0,
            exits=tuple(facts["exits"]),
            graph_costs=costs,
        )


def export_full_model(source: str, folder: Path, max_length: int | None = None) -> Path:
    """Exports a classifier without its exits to int8, as `alembert export` does; returns the folder.

    Raises InputError when the `onnx` extra is not installed or the model cannot be exported.
    """
    from alembert.runtime.export import export_classifier

    try:
        export_classifier(
            source, folder, precision="int8", exits=(), max_length=max_length, count_macs=segment_macs
        )
    except InputError as error:
        raise InputError(f"{error}; or leave the peer onnx-int8-sorted out (--peers)") from error
    return folder


def short_names(sources: Sequence[str]) -> list[str]:
    """Short names that differ: the folders' own names, or the sources as they were given."""
    short = [Path(source).name or source for source in sources]
    return short if len(set(short)) == len(short) else list(sources)
