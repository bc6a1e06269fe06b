"""What int8 costs when the ranges of its inputs come from the batch, and when they come from the export or the token.

    python benchmarks/input_ranges.py RUN --data FOLDER --output input-ranges.json

A classifier without exits is exported in float32 and in int8, and its float32 graph is quantised a third time by ONNX
Runtime's own dynamic quantisation, whose ranges come from the batch. All three answer the texts in the same batches.
int8 is compared with float32: accuracy, labels that changed, how far a text's probabilities went; and time, in turns.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import TensorProto
from onnxruntime.quantization import quantize_dynamic

from alembert.benchmarks.evaluation import task_texts
from alembert.benchmarks.timing import interleave, machine_description, ratio
from alembert.cli.options import limit_rows, load_evaluation_task, quiet_libraries
from alembert.common.errors import InputError
from alembert.common.files import write_json
from alembert.runtime.adaptive import AdaptiveClassifier
from alembert.runtime.export import export_classifier

BATCH_TOKENS = 4096
FLOAT, FROM_BATCH, FROM_EXPORT = "float32", "int8, ranges of the batch", "int8, as exported"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints and returns the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", help="a run directory without exits, of a classifier with one label per text")
    parser.add_argument("--data", required=True)
    parser.add_argument("--task", help="a preset that names columns and labels")
    parser.add_argument("--split")
    parser.add_argument("--max-rows", type=int)
    parser.add_argument(
        "--timing-rows", type=int, default=32, help="texts of one timed batch, the first of the split"
    )
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output")
    given = parser.parse_args(arguments)
    quiet_libraries()
    with tempfile.TemporaryDirectory() as name:
        folders = write_exports(given.run, Path(name))
        opened = {
            precision: AdaptiveClassifier.from_pretrained(
                folder, threads=given.threads, batch_tokens=BATCH_TOKENS, verify=False
            )
            for precision, folder in folders.items()
        }
    classifier = opened[FLOAT]
    if classifier.facts.problem_type != "single_label_classification":
        raise InputError(f"{given.run}: has no accuracy; give a classifier with one label per text")
    task, split, _ = load_evaluation_task(given.data, given.run, classifier, given.split, preset=given.task)
    task = limit_rows(task, {split: given.max_rows}, seed=1)
    texts, labels = task_texts(task, split), np.array(task.dataset(split)["labels"])
    probabilities = {precision: one.predict_proba(texts) for precision, one in opened.items()}
    timed = texts[: given.timing_rows]
    ways = {precision: partial(one.predict_proba, timed) for precision, one in opened.items()}
    timings = interleave(ways, repeats=given.repeats, warm_up=3)
    rows = []
    for precision, found in probabilities.items():
        apart = np.abs(found - probabilities[FLOAT]).max(axis=1)
        times = ratio(timings[precision], timings[FLOAT])
        row = {
            "precision": precision,
            "accuracy": float((found.argmax(axis=1) == labels).mean()),
            "other_labels": int((found.argmax(axis=1) != probabilities[FLOAT].argmax(axis=1)).sum()),
            "largest_change": float(apart.max()),
            "mean_change": float(apart.mean()),
            "share_of_float32_time": times.median,
            "share_quartiles": [times.lower, times.upper],
        }
        rows.append(row)
        print(
            f"{precision}: accuracy {row['accuracy']:.4f}, {row['other_labels']} other labels, change of a "
            f"probability at most {apart.max():.3f}, {times.median:.2f} of float32's time"
        )
    results = {
        "machine": machine_description() | {"threads": given.threads},
        "model": Path(given.run).name,
        "task": task.name,
        "split": split,
        "rows": len(texts),
        "batch_tokens": BATCH_TOKENS,
        "timing_rows": len(timed),
        "results": rows,
    }
    if given.output:
        write_json(given.output, results)
    return results


def write_exports(run: str, folder: Path) -> dict[str, Path]:
    """Folders of the three exports, by precision."""
    folders = {
        precision: folder / str(number) for number, precision in enumerate((FLOAT, FROM_BATCH, FROM_EXPORT))
    }
    manifest = export_classifier(run, folders[FLOAT], precision="fp32")
    if manifest.exit_layers:
        raise InputError(f"{run}: has exits; give a teacher or a student")
    export_classifier(run, folders[FROM_EXPORT], precision="int8")
    shutil.copytree(folders[FLOAT], folders[FROM_BATCH])
    root, level = logging.getLogger(), logging.getLogger().level
    # It advises a preparation of the graph that the export has done.
    root.setLevel(logging.ERROR)
    try:
        for segment in manifest.segments:
            quantize_dynamic(
                folders[FLOAT] / segment.file,
                folders[FROM_BATCH] / segment.file,
                per_channel=True,
                extra_options={"DefaultTensorType": TensorProto.FLOAT, "MatMulConstBOnly": True},
            )
    finally:
        root.setLevel(level)
    return folders


if __name__ == "__main__":
    main()
