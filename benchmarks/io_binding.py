"""Whether handing results from graph to graph inside ONNX Runtime saves time over NumPy arrays.

    python benchmarks/io_binding.py --model 6x384 --batch 32x20 --batch 16x128 --batch 1x16 --output io-binding.json

An export with random weights is run to its full depth, one graph for every segment, in three ways: through `run`, which
takes and gives NumPy arrays, as Alembert's runtime does; through `run_with_ort_values`, whose results stay inside ONNX
Runtime; and through an IO binding, whose outputs go where ONNX Runtime puts them. All take turns.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from random_models import (
    BatchShape,
    Shape,
    export_random_model,
    open_export_backend,
    parse_pair,
    random_batch,
)

from alembert.benchmarks.timing import interleave, machine_description, ratio
from alembert.cli.options import parse_layers, quiet_libraries
from alembert.common.files import write_json
from alembert.runtime.manifest import HIDDEN_STATES, NEXT_HIDDEN_STATES
from alembert.runtime.onnx_backend import OnnxBackend

ARRAYS = "arrays"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints and returns the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="6x384")
    parser.add_argument("--exits", default="1,2,3,4,5")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--batch", action="append")
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output")
    given = parser.parse_args(arguments)
    quiet_libraries()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        shape, exits = Shape(*parse_pair(given.model)), tuple(parse_layers(given.exits))
        exported = export_random_model(Path(folder), shape, given.precision, exits=exits)
        backend = open_export_backend(exported, given.threads)
        for text in given.batch or ["32x20"]:
            ways = _ways(backend, random_batch(BatchShape(*parse_pair(text))))
            answers = {name: way() for name, way in ways.items()}
            assert all(np.array_equal(answer, answers[ARRAYS]) for answer in answers.values())
            timings = interleave(ways, repeats=given.repeats, warm_up=3)
            for name, timing in timings.items():
                gain = ratio(timings[ARRAYS], timing)
                rows.append({"batch": text, "way": name, "ms": 1000 * timing.median,
                             "gain": gain.median, "gain_quartiles": [gain.lower, gain.upper]})  # fmt: skip
                print(
                    f"{text} {name}: {1000 * timing.median:.2f} ms, {gain.median:.3f} times as fast as arrays"
                )
    results = {
        "machine": machine_description() | {"threads": given.threads},
        "model": f"{given.model} {given.precision}, random weights, {len(exits) + 1} graphs",
        "results": rows,
    }
    if given.output:
        write_json(given.output, results)
    return results


def _ways(backend: OnnxBackend, batch: dict[str, np.ndarray]) -> dict[str, Callable[[], Any]]:
    """The ways through all segments, by name; each gives the full model's logits."""
    sessions = [graph._session for graph in backend._segments]
    names = [[entry.name for entry in session.get_inputs()] for session in sessions]
    outputs = [[entry.name for entry in session.get_outputs()] for session in sessions]

    def arrays() -> Any:
        return backend.run_stock(batch)

    def values() -> Any:
        known = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in batch.items()}
        for session, inputs, produced in zip(sessions, names, outputs, strict=True):
            found = session.run_with_ort_values(produced, {name: known[name] for name in inputs})
            known |= dict(zip(produced, found, strict=True))
            known[HIDDEN_STATES] = known.get(NEXT_HIDDEN_STATES)
        return found[0].numpy()

    def binding() -> Any:
        known = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in batch.items()}
        for session, inputs, produced in zip(sessions, names, outputs, strict=True):
            bound = session.io_binding()
            for name in inputs:
                bound.bind_ortvalue_input(name, known[name])
            for name in produced:
                bound.bind_output(name)
            session.run_with_iobinding(bound)
            found = bound.get_outputs()
            known |= dict(zip(produced, found, strict=True))
            known[HIDDEN_STATES] = known.get(NEXT_HIDDEN_STATES)
        return found[0].numpy()

    return {ARRAYS: arrays, "OrtValues": values, "IO binding": binding}


if __name__ == "__main__":
    main()
