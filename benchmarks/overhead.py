"""Where the time of one text goes: inside the model's own graphs, in tokenisation, and in everything around them.

    python benchmarks/overhead.py --model 6x384 --tokens 16 --output overhead.json

`AdaptiveClassifier.predict` is called with one text at a time, on an export of a model with random weights or on
`--exported FOLDER`: through the merged graph where there is one, and through one graph per segment. A clock around
every call into ONNX Runtime adds up what its graphs take; a clock around the tokenizer what that takes; the rest is
ours. The clocks' own cost counts as ours.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_models import Shape, export_random_model, parse_pair, random_texts

from alembert.benchmarks.timing import machine_description
from alembert.cli.options import parse_layers, quiet_libraries
from alembert.common.files import write_json
from alembert.runtime.adaptive import AdaptiveClassifier


class Stopwatch:
    """Adds up the time inside the calls that it is put around."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, call: Any) -> Any:
        """The same function, timed."""
        clock = time.perf_counter

        def timed(*arguments: Any, **keywords: Any) -> Any:
            started = clock()
            try:
                return call(*arguments, **keywords)
            finally:
                self.seconds += clock() - started

        return timed

    def take(self) -> float:
        """The seconds since the last time, and starts anew."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints and returns the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--exported", help="a folder of `alembert export`, in place of random weights")
    parser.add_argument("--model", default="6x384")
    parser.add_argument("--exits", default="1,3,5")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--texts", type=int, default=300)
    parser.add_argument(
        "--speed", type=float, action="append", help="may be repeated; 0 and 0.5 unless given"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output")
    given = parser.parse_args(arguments)
    quiet_libraries()
    inside, tokenising = Stopwatch(), Stopwatch()
    results: dict[str, Any] = {
        "machine": machine_description() | {"threads": given.threads},
        "model": given.exported or f"{given.model} {given.precision}, random weights",
        "tokens": given.tokens,
        "texts": given.texts,
        "results": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        source = given.exported
        if source is None:
            shape = Shape(*parse_pair(given.model))
            exits = tuple(layer for layer in parse_layers(given.exits) if layer < shape.layers)
            source = export_random_model(
                Path(folder) / "model", shape, given.precision, exits=exits, merge_exits="all"
            )
        classifier = AdaptiveClassifier.from_pretrained(source, threads=given.threads)
        classifier.warm_up()
    time_sessions(classifier.backend, inside)
    encoder: Any = classifier._encoder
    encoder.encode = tokenising.around(encoder.encode)
    texts = random_texts(given.texts, given.tokens)
    merged_policy = classifier.backend._merged_policy
    ways = ["merged", "segments"] if classifier.backend._merged else ["segments"]
    for speed, way in product(given.speed or [0.0, 0.5], ways):
        classifier.backend._merged_policy = merged_policy if way == "merged" else None
        for text in texts[:20]:
            classifier.predict(text, speed=speed)
        inside.take(), tokenising.take()
        taken, in_graphs, in_tokenizer = [], [], []
        for text in texts:
            started = time.perf_counter()
            classifier.predict(text, speed=speed)
            taken.append(time.perf_counter() - started)
            in_graphs.append(inside.take())
            in_tokenizer.append(tokenising.take())
        total, graphs, tokens = np.array(taken), np.array(in_graphs), np.array(in_tokenizer)
        rest = total - graphs - tokens
        p50, p95, p99 = (1000 * np.quantile(total, [0.5, 0.95, 0.99])).tolist()
        row = {
            "speed": speed,
            "graphs": way,
            "p50_ms": p50,
            "p95_ms": p95,
            "p99_ms": p99,
            "graphs_ms": 1000 * float(np.median(graphs)),
            "tokenizer_ms": 1000 * float(np.median(tokens)),
            "rest_ms": 1000 * float(np.median(rest)),
            "outside_share": float(np.median((total - graphs) / total)),
        }
        results["results"].append(row)
        print(
            f"speed {speed:g}, {way}: p50 {p50:.3f} ms, p95 {p95:.3f}, p99 {p99:.3f}; "
            f"graphs {row['graphs_ms']:.3f} ms, tokenizer {row['tokenizer_ms']:.3f}, rest {row['rest_ms']:.3f}; "
            f"outside {row['outside_share']:.1%}"
        )
    if given.output:
        write_json(given.output, results)
    return results


def time_sessions(backend: Any, stopwatch: Stopwatch) -> None:
    """Puts the stopwatch around every call of the backend into ONNX Runtime."""
    merged = [backend._merged] if backend._merged else []
    for graph in (*backend._segments, *backend._heads.values(), *merged):
        graph._session = TimedSession(graph._session, stopwatch)


class TimedSession:
    """An inference session whose runs are timed; all else is passed on."""

    def __init__(self, session: Any, stopwatch: Stopwatch) -> None:
        self._session = session
        self.run = stopwatch.around(session.run)
        self.run_with_iobinding = stopwatch.around(session.run_with_iobinding)
        self.run_with_ort_values = stopwatch.around(session.run_with_ort_values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


if __name__ == "__main__":
    main()
