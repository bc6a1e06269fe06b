"""What exit heads cost in time: each kind, as exported and run, against the layers that it stands between.

    python benchmarks/exit_head_cost.py --model 12x768 --batch 32x20 --batch 1x16 --output exit-heads.json

For each kind of head a model with random weights and an exit after every layer is exported. It is run so that no row
ever leaves: once at a speed at which every head is asked, once at speed 0, at which none is. The difference is what the
heads cost, the policy and the borders between graphs included; a graph of all layers without exits shows what the
borders cost. All take turns. What the heads are worth is measured by `alembert evaluate` on distilled models.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
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
)

from alembert.benchmarks.timing import interleave, machine_description
from alembert.cli.options import quiet_libraries
from alembert.common.files import write_json
from alembert.models.exit_heads import EXIT_HEADS
from alembert.runtime.policies import ExitPolicy

NOBODY_LEAVES = 1e-12
"""A speed above 0, so that heads are asked, and below any uncertainty of random weights."""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints and returns the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="12x768")
    parser.add_argument("--batch", action="append", help="rows x tokens; may be repeated")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--labels", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output")
    given = parser.parse_args(arguments)
    quiet_libraries()
    shape = Shape(*parse_pair(given.model))
    exits = tuple(range(1, shape.layers))
    kind = "single_label_classification"
    policy = ExitPolicy("entropy", kind, len(exits) + 1)
    results: dict[str, Any] = {
        "machine": machine_description() | {"threads": given.threads},
        "model": given.model,
        "precision": given.precision,
        "labels": given.labels,
        "exits": len(exits),
        "repeats": given.repeats,
        "results": [],
    }
    with tempfile.TemporaryDirectory() as folder:

        def backend(name: str, layers: tuple[int, ...], head: str = "linear") -> Any:
            exported = export_random_model(
                Path(folder) / name,
                shape,
                given.precision,
                exits=layers,
                exit_head=head,
                num_labels=given.labels,
            )
            return open_export_backend(exported, given.threads)

        plain = backend("plain", ())
        with_heads = {head: backend(head, exits, head) for head in EXIT_HEADS}
    for batch_name in given.batch or ["32x20", "1x16"]:
        batch = random_batch(BatchShape(*parse_pair(batch_name)))
        candidates: dict[str, Any] = {"plain": lambda b=batch: plain.run(b, policy, 0.0)}
        for head, opened in with_heads.items():
            assert (opened.run(batch, policy, NOBODY_LEAVES).exit_layers == shape.layers).all()
            candidates[head] = lambda o=opened, b=batch: o.run(b, policy, NOBODY_LEAVES)
            candidates[f"{head}, not asked"] = lambda o=opened, b=batch: o.run(b, policy, 0.0)
        timings = {name: np.array(timing.seconds) for name, timing in interleave(
            candidates, repeats=given.repeats, warm_up=2).items()}  # fmt: skip
        layer = np.median(timings["plain"]) / shape.layers
        print(f"{given.model} {given.precision}, batch {batch_name}: {1000 * layer:.3f} ms a layer")
        for head in EXIT_HEADS:
            # Round by round, so that what disturbs one of the two disturbs the other.
            cost = np.median(timings[head] - timings[f"{head}, not asked"]) / len(exits)
            border = np.median(timings[f"{head}, not asked"] - timings["plain"]) / len(exits)
            row = {
                "batch": batch_name,
                "head": head,
                "layer_ms": 1000 * float(layer),
                "head_ms": 1000 * float(cost),
                "border_ms": 1000 * float(border),
                "head_share_of_layer": float(cost / layer),
            }
            results["results"].append(row)
            print(
                f"  {head:10} {row['head_ms']:8.3f} ms a head, {row['head_share_of_layer']:6.1%} of a layer; "
                f"{row['border_ms']:7.3f} ms a border between graphs"
            )
    if given.output:
        write_json(given.output, results)
    return results


if __name__ == "__main__":
    main()
