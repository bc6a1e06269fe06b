"""Models and what people use in their place, measured side by side: quality, texts per second, latency, memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from alembert.benchmarks.comparison_engines import Notify, Opener, check_models, short_names
from alembert.benchmarks.comparison_rows import Candidate, Measurements, OutsideCandidate
from alembert.benchmarks.comparison_settings import BenchmarkSettings
from alembert.benchmarks.engines import Text
from alembert.benchmarks.evaluation import task_texts
from alembert.benchmarks.outside import OutsideProgram
from alembert.benchmarks.timing import Timing, machine_description, take_turns
from alembert.common.errors import InputError
from alembert.data.task import Task, rows_sha256
from alembert.runtime.calibration_file import model_files_fingerprint

_PACKAGES = ("onnxruntime", "openvino", "tokenizers")


def benchmark(
    models: Sequence[str],
    task: Task,
    split: str,
    *,
    data_name: str,
    settings: BenchmarkSettings | None = None,
    against: Sequence[OutsideProgram] = (),
    progress: Notify | None = None,
) -> dict[str, Any]:
    """Measures models, what people use in place of the first one, and programs of others, in turn.

    Every row goes all the way from strings to labels, tokenisation included. Quality and exits come from all rows
    of the split. Time comes from a sample: each round runs every row once, in an order that is drawn anew.

    Args:
        models: run directories, folders in Hugging Face layout, hub ids or exported folders. The first is the
            baseline, run by transformers in fp32 on batches in the order of the input; it cannot be an export.
        task: labelled data with the models' labels.
        split: the split that is scored.
        data_name: for the record.
        settings: how to measure.
        against: programs of others.
        progress: called with a description, steps done and steps in all.

    Returns:
        What `alembert benchmark` writes: "machine", how it was measured, and "results", the rows, baseline first.

    Raises:
        InputError: a model cannot be read or has other labels than the first; a program fails.

    Examples:
        >>> import alembert
        >>> from alembert.benchmarks.comparison import BenchmarkSettings, benchmark
        >>> quick = BenchmarkSettings(peers=(), speeds=(0.0, 0.5), repeats=1, own_processes=False)
        >>> task = alembert.load_task("topics/")
        >>> results = benchmark(["runs/fast"], task, "test", data_name="topics", settings=quick)
        >>> [row["backend"] for row in results["results"]]
        ['transformers', 'torch', 'torch']
    """
    settings = settings or BenchmarkSettings()
    notify = progress or (lambda *_: None)
    facts = check_models(models)
    texts, labels = task_texts(task, split), np.asarray(task.dataset(split)["labels"])
    threads = settings.threads or torch.get_num_threads()
    sample = np.random.default_rng(settings.seed).permutation(len(texts))[: settings.timing_rows]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="alembert-benchmark-")))
        opener = Opener(settings, threads, stack, texts, sample, notify)
        candidates = opener.open_all(facts, folder)
        for done, candidate in enumerate(candidates, 1):
            candidate.answer(texts)
            notify("labelling every text", done, len(candidates))
        programs = [OutsideCandidate.measure(program, task, texts) for program in against]
        timings = _time(candidates, programs, [texts[index] for index in sample], settings, notify)
        latencies = _latencies(candidates, settings, notify)
        workers = {id(candidate.worker): candidate.worker for candidate in candidates}
        tokenisation = {key: float(worker.ask("tokenisation")) for key, worker in workers.items()}
        memory: dict[int, float | None] = {}
        if settings.own_processes:
            memory = {key: worker.ask("peak_memory") for key, worker in workers.items()}
    measured = Measurements(
        task, labels, sample, timings, latencies, settings.latency_rows, memory, tokenisation
    )
    rows = [measured.row(candidate, candidates) for candidate in candidates]
    rows += [measured.outside_row(program, candidates[0]) for program in programs]
    return {
        "alembert_version": version("alembert"),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": _machine(settings.device, threads),
        "data": data_name,
        "split": split,
        "rows": len(texts),
        "rows_sha256": rows_sha256(task.dataset(split)),
        "task": {
            "problem_type": task.problem_type,
            "metric": task.main_metric,
            "num_labels": task.num_labels,
        },
        "models": list(models),
        "model_files": {
            name: model_files_fingerprint(fact.source)
            for name, fact in zip(short_names([fact.source for fact in facts]), facts, strict=True)
        },
        "settings": dataclasses.asdict(settings) | {"threads": threads, "batch_tokens": opener.batch_tokens},
        "timing": {
            "rows": len(sample),
            "latency_rows": min(settings.latency_rows, len(sample)),
            "mean_tokens": opener.mean_tokens,
            "rounds": settings.repeats,
            "tokenisation": "included",
            "own_processes": settings.own_processes,
        },
        "results": rows,
    }


def _time(
    candidates: Sequence[Candidate],
    programs: Sequence[OutsideCandidate],
    timed: Sequence[Text],
    settings: BenchmarkSettings,
    notify: Notify,
) -> dict[str, Timing]:
    if programs and len(timed) < 2:
        raise InputError("outside programs need at least 2 timed rows")
    calls: dict[str, Callable[[], float]] = {c.title: _asking("throughput", c) for c in candidates}
    calls |= {program.title: partial(program.seconds, timed) for program in programs}
    measured = take_turns(
        calls,
        repeats=settings.repeats,
        seed=settings.seed,
        progress=lambda done, total: notify("timing batches", done, total),
    )
    return {title: Timing(seconds) for title, seconds in measured.items()}


def _latencies(
    candidates: Sequence[Candidate], settings: BenchmarkSettings, notify: Notify
) -> dict[str, list[list[float]]]:
    """Seconds of every text alone, by row and round; nothing when latency is left out."""
    if settings.latency_rows < 1:
        return {}
    calls: dict[str, Callable[[], list[float]]] = {c.title: _asking("latencies", c) for c in candidates}
    return take_turns(
        calls,
        repeats=settings.repeats,
        # Others than for the batches.
        seed=settings.seed + 1,
        progress=lambda done, total: notify("timing single texts", done, total),
    )


def _asking(what: str, candidate: Candidate) -> Callable[[], Any]:
    return partial(candidate.worker.ask, what, speed=candidate.speed)


def _machine(device: str, threads: int) -> dict[str, Any]:
    machine = machine_description(device) | {"threads": threads}
    for package in _PACKAGES:
        try:
            machine[package] = version(package)
        except PackageNotFoundError:
            continue
    return machine
