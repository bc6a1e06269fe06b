"""What the earth mover's distances and the MS-BERT loss cost.

1. `sorted_emd` and `histogram_emd` on all pairs of 11 layers × 6 exits × 16 rows with 150 classes in one call,
   against `pyemd.emd_samples` called once per pair.
2. The share of the MS-BERT loss, targets and divergence, forward and backward, in a step of self-distillation of
   a 12-layer BERT 384 wide: frozen backbone without gradient, six exits with gradient, optimiser step.

Candidates take turns within every repetition, so that a busy machine slows all of them alike.

    python benchmarks/emd_speed.py --threads 2 --output emd_speed.json
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyemd
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from alembert.common.files import write_json
from alembert.losses.self_distillation import ms_bert_loss
from alembert.losses.transport import histogram_emd, sorted_emd

LAYERS, EXITS, ROWS, CLASSES = 11, 6, 16, 150
TOKENS, HIDDEN, HEADS, INTERMEDIATE, HEAD_WIDTH = 64, 384, 12, 1536, 128
EXIT_LAYERS = (1, 3, 5, 7, 9, 11)


class ExitHead(nn.Module):
    """FastBERT's classifier: a narrow self-attention layer between two projections."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Linear(HIDDEN, HEAD_WIDTH)
        self.attention = nn.MultiheadAttention(HEAD_WIDTH, num_heads=2, batch_first=True)
        self.dense = nn.Linear(HEAD_WIDTH, HEAD_WIDTH)
        self.classifier = nn.Linear(HEAD_WIDTH, CLASSES)

    def forward(self, hidden: Tensor) -> Tensor:
        narrow = self.narrow(hidden).tanh()
        attended = self.attention(narrow, narrow, narrow, need_weights=False)[0]
        logits: Tensor = self.classifier(self.dense(attended[:, 0]).tanh())
        return logits


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles in milliseconds."""
    low, middle, high = np.percentile(np.array(seconds) * 1e3, [25, 50, 75])
    return {"median_ms": float(middle), "lower_quartile_ms": float(low), "upper_quartile_ms": float(high)}


def measure_distances(repeats: int) -> dict[str, dict[str, float]]:
    """Times of one call for all pairs, and the median of each repetition's ratio to pyemd."""
    layers, exits = torch.randn(LAYERS, 1, ROWS, CLASSES), torch.randn(1, EXITS, ROWS, CLASSES)
    first, second = (
        x.expand(LAYERS, EXITS, ROWS, CLASSES).reshape(-1, CLASSES).double().numpy() for x in (layers, exits)
    )

    def loop() -> Tensor:
        values = [pyemd.emd_samples(x, y) for x, y in zip(first, second, strict=True)]
        return torch.tensor(values, dtype=torch.float64)

    candidates: dict[str, Callable[[], Tensor]] = {
        "pyemd": loop,
        "histogram": lambda: histogram_emd(layers, exits),
        "sorted": lambda: sorted_emd(layers, exits),
    }
    torch.testing.assert_close(candidates["histogram"]().flatten(), loop(), rtol=1e-6, atol=1e-6)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, call in candidates.items():
            # A call of a few milliseconds is repeated within its turn, and the turn's median counts.
            turns = []
            for _ in range(1 if name == "pyemd" else 5):
                start = time.perf_counter()
                call()
                turns.append(time.perf_counter() - start)
            times[name].append(statistics.median(turns))
    return {
        name: summary(seconds)
        | {"times_faster": statistics.median(np.array(times["pyemd"]) / np.array(seconds))}
        for name, seconds in times.items()
    }


def measure_step(repeats: int, **options: Any) -> dict[str, Any]:
    """Times of a self-distillation step and of the loss in it."""
    config = BertConfig(
        num_hidden_layers=LAYERS + 1,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        intermediate_size=INTERMEDIATE,
    )
    backbone = BertModel(config, add_pooling_layer=False).eval()
    teacher_head, exits = ExitHead().eval(), nn.ModuleList(ExitHead() for _ in EXIT_LAYERS)
    optimiser = torch.optim.AdamW(exits.parameters(), lr=2e-5)
    input_ids = torch.randint(config.vocab_size, (ROWS, TOKENS))
    steps, losses = [], []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        with torch.no_grad():
            hidden = backbone(input_ids, output_hidden_states=True).hidden_states[1:]
            layer_logits = torch.stack([teacher_head(state) for state in hidden])
        exit_logits = torch.stack([head(hidden[i - 1]) for i, head in zip(EXIT_LAYERS, exits, strict=True)])

        # Cut off here so that the loss' own backward pass can be timed.
        cut = exit_logits.detach().requires_grad_()
        loss_start = time.perf_counter()
        ms_bert_loss(cut, layer_logits, **options).sum().backward()
        losses.append(time.perf_counter() - loss_start)

        exit_logits.backward(cut.grad)
        optimiser.step()
        optimiser.zero_grad()
        steps.append(time.perf_counter() - start)
    # The first repetition warms up.
    steps, losses = steps[1:], losses[1:]
    shares = np.percentile(np.array(losses) / np.array(steps), [25, 50, 75])
    return {
        "step": summary(steps),
        "loss": summary(losses),
        "loss_share": float(shares[1]),
        "loss_share_quartiles": [float(shares[0]), float(shares[2])],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7, help="repetitions of every measurement")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of torch")
    parser.add_argument("--output", help="JSON file to write")
    arguments = parser.parse_args()
    if arguments.repeats < 1 or arguments.threads < 1:
        parser.error("--repeats and --threads must be at least 1.")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    distances = measure_distances(arguments.repeats)
    steps = {emd: measure_step(arguments.repeats, emd=emd) for emd in ("sorted", "histogram", "class_aware")}

    console = Console()
    pairs = LAYERS * EXITS * ROWS
    table = Table(
        "distance", "median ms", "quartiles ms", "× faster", title=f"{pairs} pairs, {CLASSES} classes"
    )
    for name, row in distances.items():
        quartiles = f"{row['lower_quartile_ms']:.2f}–{row['upper_quartile_ms']:.2f}"
        table.add_row(name, f"{row['median_ms']:.2f}", quartiles, f"{row['times_faster']:.0f}")
    console.print(table)
    table = Table(
        "distance", "step ms", "loss ms", "share", "quartiles", title="MS-BERT loss in a training step"
    )
    for name, step in steps.items():
        low, high = step["loss_share_quartiles"]
        table.add_row(
            name,
            f"{step['step']['median_ms']:.1f}",
            f"{step['loss']['median_ms']:.2f}",
            f"{step['loss_share']:.1%}",
            f"{low:.1%}–{high:.1%}",
        )
    console.print(table)

    result = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": arguments.threads,
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "repeats": arguments.repeats,
        "pairs": pairs,
        "classes": CLASSES,
        "distances": distances,
        "training_step": steps,
    }
    if arguments.output:
        write_json(arguments.output, result)


if __name__ == "__main__":
    main()
