"""What a batch costs when one row of it is hard, against the full model on that batch.

    python benchmarks/hard_row.py --model 12x768 --batch 32x20 --exits 1,3,5,7,9,11 --output hard-row.json

A model with random weights is exported twice: with exits, and as one graph without any. In place of a policy stands a
script: the first rows never leave, the others leave at the first exit. So `hard` rows pass every layer and every head,
beside rows that leave as early as can be. "all hard" pays for all heads and gains nothing: the most that exits can
cost. The hard row is as long as the batch; `--mixed-lengths` draws the others' lengths. Streams and lists run several
batches side by side and put survivors together: the same for `GROUP` batches, against the full model on these. A single
text (`--batch 1x16`) also goes through the one graph of `--merge-exits all`, at a speed at which it leaves nowhere. All
take turns.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
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

from alembert.benchmarks.timing import interleave, machine_description, ratio
from alembert.cli.options import parse_layers, quiet_libraries
from alembert.common.files import write_json
from alembert.runtime.batching import run_regrouped
from alembert.runtime.policies import ExitPolicy, PolicyHistory

GROUP = 8


@dataclass(frozen=True)
class ScriptedPolicy(ExitPolicy):
    """At the first exit all leave but the first `hard` rows, and these leave nowhere."""

    hard: int = 0

    def uncertainty(
        self, probabilities: Any, history: PolicyHistory | None = None, learned_uncertainty: Any = None
    ) -> tuple[Any, PolicyHistory | None]:
        """1 for hard rows, 0 for others; only hard ones have a history."""
        rows = len(probabilities)
        values = (np.arange(rows) < (self.hard if history is None else rows)).astype(np.float32)
        seen = PolicyHistory(np.zeros((rows, 1), np.int64), np.zeros(rows, np.int64))
        return (torch.from_numpy(values) if torch.is_tensor(probabilities) else values), seen


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints and returns the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="12x768")
    parser.add_argument("--batch", default="32x20")
    parser.add_argument("--exits", default="1,3,5,7,9,11")
    parser.add_argument("--exit-head", default="fastbert")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--mixed-lengths", action="store_true")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output")
    given = parser.parse_args(arguments)
    quiet_libraries()
    shape, batch_shape = Shape(*parse_pair(given.model)), BatchShape(*parse_pair(given.batch))
    exits = tuple(layer for layer in parse_layers(given.exits) if layer < shape.layers)
    lengths = None
    if given.mixed_lengths:
        lengths = np.random.default_rng(0).integers(4, batch_shape.tokens + 1, size=batch_shape.rows)
        lengths[0] = batch_shape.tokens
    batch = random_batch(batch_shape, lengths)
    with tempfile.TemporaryDirectory() as folder:

        def backend(name: str, layers: tuple[int, ...]) -> Any:
            exported = export_random_model(
                Path(folder) / name,
                shape,
                given.precision,
                exits=layers,
                exit_head=given.exit_head,
                merge_exits="all" if layers and batch_shape.rows == 1 else None,
            )
            return open_export_backend(exported, given.threads)

        plain, adaptive = backend("plain", ()), backend("exits", exits)
        if batch_shape.rows == 1:
            # Now, for the folder is gone when the first text comes.
            single_text_graph = adaptive._open_merged()
            assert single_text_graph is not None, "texts would go through the segments instead"
    policy = ScriptedPolicy("entropy", "single_label_classification", len(exits) + 1)
    rows = batch_shape.rows
    candidates = {
        "full model, one graph": lambda: plain.run(batch, policy, 0.0),
        "full model, speed 0": lambda: adaptive.run(batch, policy, 0.0),
    }
    for hard in sorted({0, 1, rows // 4, rows // 2, rows}):
        scripted = ScriptedPolicy("entropy", "single_label_classification", len(exits) + 1, hard=hard)
        left = adaptive.run(batch, scripted, 0.5).exit_layers
        assert (left == shape.layers).sum() == hard
        candidates[f"{hard} of {rows} hard"] = lambda p=scripted: adaptive.run(batch, p, 0.5)
        if rows > 1:
            group = [(np.arange(rows) + rows * number, batch) for number in range(GROUP)]
            candidates[f"{hard} of {rows} hard, {GROUP} batches regrouped"] = lambda p=scripted, g=group: (
                run_regrouped(adaptive, g, p, 0.5, rows * batch_shape.tokens)
            )
    if rows == 1:
        own, least = adaptive._merged_policy, float(np.finfo(np.float32).tiny)
        assert adaptive.run_alone(batch, own, least).exit_layer == shape.layers
        candidates["1 of 1 hard, one graph with exits"] = lambda: adaptive.run_alone(batch, own, least)
    timings = interleave(candidates, repeats=given.repeats, warm_up=2)
    results: dict[str, Any] = {
        "machine": machine_description() | {"threads": given.threads},
        "model": given.model,
        "batch": given.batch,
        "exits": list(exits),
        "exit_head": given.exit_head,
        "precision": given.precision,
        "mixed_lengths": given.mixed_lengths,
        "repeats": given.repeats,
        "results": {},
    }
    for name, timing in timings.items():
        share = ratio(timing, timings["full model, one graph"])
        batches = GROUP if "regrouped" in name else 1
        results["results"][name] = {
            "batches": batches,
            "ms": 1000 * timing.median,
            "share_of_full_model": share.median / batches,
            "share_quartiles": [share.lower / batches, share.upper / batches],
        }
        print(
            f"{name:42} {1000 * timing.median:9.2f} ms  {share.median / batches:6.1%} of the full model on the same"
        )
    if given.output:
        write_json(given.output, results)
    return results


if __name__ == "__main__":
    main()
