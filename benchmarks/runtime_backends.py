"""Which library runs the same layers fastest: ONNX Runtime, OpenVINO, torch, torch.compile; fp32, bf16, int8.

    python benchmarks/runtime_backends.py --model 6x384 --model 12x768 --batch 32x20 --batch 16x128 --batch 1x16 \\
        --output backends.json

One model of random weights for all. torch runs the module. ONNX Runtime and OpenVINO run the graph that PyTorch's
exporter makes of it, fp32 and with ONNX Runtime's dynamic quantisation; "Alembert" is ONNX Runtime on what
`alembert export` writes. Every library gets the same number of threads, the same padded batches, and goes from ids to
logits. All that run take turns; what does not run is listed with the reason.
A candidate whose logits are further from those of torch fp32 than its precision explains is marked.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_models import (
    BatchShape,
    Shape,
    export_random_model,
    open_export_backend,
    parse_pair,
    random_batch,
    random_model,
    random_tokenizer,
)

from alembert.benchmarks.plain_onnx import export_plain, quantise_plain
from alembert.benchmarks.timing import interleave, machine_description, ratio
from alembert.cli.options import quiet_libraries
from alembert.common.files import write_json

Run = Callable[[dict[str, np.ndarray]], np.ndarray]
"""A padded batch, as `random_batch` makes it, to logits (rows, labels)."""

BASELINE = "torch fp32"
MARKED_FROM = {"fp32": 1e-3, "bf16": 0.25, "int8": 0.5}
"""Largest differences of logits that a precision explains, as shares of the logits' standard deviation."""


def torch_run(model: Any) -> Run:
    """The module as it stands."""

    @torch.inference_mode()
    def run(batch: dict[str, np.ndarray]) -> np.ndarray:
        tensors = {name: torch.from_numpy(values) for name, values in batch.items()}
        return model(**tensors).logits.float().numpy()  # type: ignore[no-any-return]

    return run


def compiled(model: Any) -> Any:
    """The module under torch.compile, for any batch shape."""
    return torch.compile(model, dynamic=True)


def quantised(model: Any) -> Any:
    """The module with linear layers in int8, activations quantised as they come."""
    quantise = torch.ao.quantization.quantize_dynamic
    return quantise(copy.deepcopy(model), {torch.nn.Linear}, dtype=torch.qint8)


def onnxruntime_run(graph: Path, threads: int) -> Run:
    """A graph under ONNX Runtime as it comes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    return lambda batch: session.run(["logits"], {name: batch[name] for name in names})[0]


def alembert_run(folder: Path, threads: int) -> Run:
    """An exported folder of one segment, by the backend that `AdaptiveClassifier` uses."""
    backend = open_export_backend(folder, threads)
    return backend.run_stock


def openvino_run(graph: Path, threads: int, precision: str) -> Run:
    """The exported graph under OpenVINO; `precision` is what it may compute in."""
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    loaded = core.compile_model(core.read_model(graph), "CPU", settings)
    request, names = loaded.create_infer_request(), [port.any_name for port in loaded.inputs]

    def run(batch: dict[str, np.ndarray]) -> np.ndarray:
        outputs = request.infer({name: batch[name] for name in names})
        return np.array(outputs["logits"])

    return run


def candidates(shape: Shape, folder: Path, threads: int) -> dict[str, Callable[[], Run]]:
    """How to make each candidate ready, by name; its last word is the precision."""
    model = random_model(shape).full_model
    name = f"{shape.layers}x{shape.width}"
    graphs = {precision: folder / f"{name}-{precision}.onnx" for precision in ("fp32", "int8")}
    export_plain(model, random_tokenizer(), graphs["fp32"])
    quantise_plain(graphs["fp32"], graphs["int8"])

    def exported(precision: str) -> Run:
        return alembert_run(export_random_model(folder / f"{name}-{precision}", shape, precision), threads)

    halved = copy.deepcopy(model).to(torch.bfloat16)
    return {
        BASELINE: lambda: torch_run(model),
        "torch bf16": lambda: torch_run(halved),
        "torch int8": lambda: torch_run(quantised(model)),
        "torch.compile fp32": lambda: torch_run(compiled(model)),
        "torch.compile bf16": lambda: torch_run(compiled(halved)),
        "torch.compile int8": lambda: torch_run(compiled(quantised(model))),
        "ONNX Runtime fp32": lambda: onnxruntime_run(graphs["fp32"], threads),
        "ONNX Runtime int8": lambda: onnxruntime_run(graphs["int8"], threads),
        "Alembert fp32": lambda: exported("fp32"),
        "Alembert int8": lambda: exported("int8"),
        "OpenVINO fp32": lambda: openvino_run(graphs["fp32"], threads, "fp32"),
        "OpenVINO bf16": lambda: openvino_run(graphs["fp32"], threads, "bf16"),
        "OpenVINO int8": lambda: openvino_run(graphs["int8"], threads, "fp32"),
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints and returns the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", action="append", help="layers x width; may be repeated")
    parser.add_argument("--batch", action="append", help="rows x tokens; may be repeated")
    parser.add_argument(
        "--only", action="append", help="a candidate's name; may be repeated; all unless given"
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output")
    given = parser.parse_args(arguments)
    quiet_libraries()
    torch.set_num_threads(given.threads)
    results: dict[str, Any] = {
        "machine": machine_description() | {"threads": given.threads} | _versions(),
        "repeats": given.repeats,
        "results": [],
        "not_run": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for model_name in given.model or ["6x384", "12x768"]:
            ready = candidates(Shape(*parse_pair(model_name)), Path(folder), given.threads)
            if given.only:
                ready = {name: make for name, make in ready.items() if name in {BASELINE, *given.only}}
            measure_model(
                model_name, ready, given.batch or ["32x20", "16x128", "1x16"], given.repeats, results
            )
    if given.output:
        write_json(given.output, results)
    return results


def measure_model(
    model_name: str,
    ready: dict[str, Callable[[], Run]],
    batch_names: Sequence[str],
    repeats: int,
    results: dict[str, Any],
) -> None:
    """Appends a row per batch shape and candidate to the results."""
    batches = {name: random_batch(BatchShape(*parse_pair(name))) for name in batch_names}
    runs: dict[str, Run] = {}
    logits: dict[str, dict[str, np.ndarray]] = {}
    for name, make in ready.items():
        try:
            run = make()
            # Whatever is compiled for a shape is compiled now.
            logits[name] = {shape: run(batch) for shape, batch in batches.items()}
            runs[name] = run
        except Exception as error:  # whatever a library cannot do is a finding, not a failure of this program
            reason = str(error).strip().splitlines() or [""]
            results["not_run"].append(
                {
                    "model": model_name,
                    "candidate": name,
                    "reason": f"{type(error).__name__}: {reason[0][:200]}",
                }
            )
            print(f"{model_name} {name:20} not run: {type(error).__name__}: {reason[0][:90]}")
    for batch_name, batch in batches.items():
        timings = interleave(
            {name: (lambda r=run, b=batch: r(b)) for name, run in runs.items()}, repeats=repeats, warm_up=2
        )
        expected = logits[BASELINE][batch_name]
        for name, timing in timings.items():
            against, precision = ratio(timings[BASELINE], timing), name.rpartition(" ")[2]
            difference = float(np.abs(logits[name][batch_name] - expected).max())
            row = {
                "model": model_name,
                "batch": batch_name,
                "candidate": name,
                "ms": 1000 * timing.median,
                "ratio_to_torch_fp32": against.median,
                "ratio_quartiles": [against.lower, against.upper],
                "largest_difference": difference,
                "logits_differ": difference > MARKED_FROM[precision] * max(float(expected.std()), 1e-2),
            }
            results["results"].append(row)
            print(
                f"{model_name} {batch_name:7} {name:20} {row['ms']:9.2f} ms {against.median:6.2f}×"
                f"{'  LOGITS DIFFER' if row['logits_differ'] else ''}"
            )


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("onnxruntime", "openvino"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
