"""What the earth mover's distance between layers costs in a training step of BERT-EMD.

A step: the teacher's forward pass (12 layers × 384 by default), the student's (4 × 312), distances between all
pairs of layers of attention scores and of hidden states, flows and new layer weights for both, loss, backward
pass, AdamW. Timed within it is the earth mover's distance: both flows and both weight updates. Beside it, on the
same distances, the flows by `pyemd.emd_with_flow` on one histogram of M + N bins, as the published code
arranges them; these are left out of the step's time.

    python benchmarks/layer_emd_speed.py --threads 1 --output layer_emd_speed.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyemd
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from alembert.benchmarks.timing import machine_description
from alembert.common.files import write_json
from alembert.losses.hidden import hidden_state_mse
from alembert.losses.layer_transport import (
    attention_score_distances,
    cost_attention,
    hidden_state_distances,
    layer_flow,
    transport_cost,
)
from alembert.losses.prediction import soft_cross_entropy
from alembert.models.capture import capture
from alembert.models.features import FeatureRequest

VOCABULARY, HEADS, LABELS = 30522, 12, 3
Weights = tuple[Tensor, Tensor]
Solver = Callable[[Tensor, Tensor, Tensor], Tensor]


def classifier(layers: int, width: int, intermediate: int) -> BertForSequenceClassification:
    """A random BERT with as many heads as all others here."""
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            num_hidden_layers=layers,
            hidden_size=width,
            num_attention_heads=HEADS,
            intermediate_size=intermediate,
            num_labels=LABELS,
        )
    )


def pyemd_flow(distances: Tensor, student_weights: Tensor, teacher_weights: Tensor) -> Tensor:
    """The flow by pyemd: M + N bins, of which the first M hold the student's weight, the others the teacher's."""
    m, n = distances.shape
    costs = np.zeros((m + n, m + n))
    costs[:m, m:] = distances.cpu().numpy()
    costs[m:, :m] = costs[:m, m:].T
    source = np.concatenate([student_weights.cpu().double().numpy(), np.zeros(n)])
    target = np.concatenate([np.zeros(m), teacher_weights.cpu().double().numpy()])
    _, flow = pyemd.emd_with_flow(source, target, costs)
    return torch.as_tensor(np.array(flow)[:m, m:], dtype=distances.dtype, device=distances.device)


def transport(
    distances: list[Tensor], weights: list[Weights], solve: Solver
) -> tuple[list[Tensor], list[Weights]]:
    """Flows, and new weights by cost attention: the part of a step that is under test."""
    flows, updated = [], []
    for costs, (student, teacher) in zip(distances, weights, strict=True):
        flow = solve(costs, student, teacher)
        flows.append(flow)
        updated.append(
            (
                cost_attention(flow, costs, student, side="student", form="code"),
                cost_attention(flow, costs, teacher, side="teacher", form="code"),
            )
        )
    # Attention and hidden states share the mean of their weights.
    student, teacher = (torch.stack(side).mean(dim=0) for side in zip(*updated, strict=True))
    return flows, [(student, teacher)] * len(distances)


class Clock:
    """Wall-clock seconds, with everything queued on the device done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def measure(arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every repetition: the whole step, the distances' forward pass, and both ways of transport."""
    device = torch.device(arguments.device)
    clock = Clock(device)
    teacher = classifier(arguments.teacher_layers, 384, 1536).to(device).eval()
    student = classifier(arguments.student_layers, 312, 1200).to(device).train()
    projection = nn.Linear(312, 384).to(device)
    optimiser = torch.optim.AdamW([*student.parameters(), *projection.parameters()], lr=5e-5)
    m, n = arguments.student_layers, arguments.teacher_layers
    layers = {"student": tuple(range(1, m + 1)), "teacher": tuple(range(1, n + 1))}
    requests = {
        side: FeatureRequest(hidden_states=(0, *numbers), attention_scores=numbers)
        for side, numbers in layers.items()
    }
    weights: list[Weights] = [
        (torch.full((m,), 1 / m, device=device), torch.full((n,), 1 / n, device=device))
    ] * 2
    seconds: dict[str, list[float]] = {name: [] for name in ("step", "distances", "emd", "pyemd")}
    for _ in range(arguments.repeats + 1):
        input_ids = torch.randint(VOCABULARY, (arguments.rows, arguments.tokens), device=device)
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        mask = inputs["attention_mask"]
        start = clock()
        with torch.no_grad():
            target = capture(teacher, inputs, requests["teacher"])
        output = capture(student, inputs, requests["student"])

        distances_start = clock()
        projected = {layer: projection(hidden) for layer, hidden in output.hidden_states.items()}
        distances = [
            attention_score_distances(
                [output.attention_scores[layer] for layer in layers["student"]],
                [target.attention_scores[layer] for layer in layers["teacher"]],
                mask,
            ),
            hidden_state_distances(
                [projected[layer] for layer in layers["student"]],
                [target.hidden_states[layer] for layer in layers["teacher"]],
                mask,
            ),
        ]
        detached = [costs.detach() for costs in distances]

        emd_start = clock()
        flows, updated = transport(detached, weights, layer_flow)
        emd_end = clock()
        transport(detached, weights, pyemd_flow)
        pyemd_end = clock()

        weights = updated
        loss = torch.stack([transport_cost(*pair) for pair in zip(flows, distances, strict=True)]).sum()
        loss = loss + hidden_state_mse(projected[0], target.hidden_states[0], mask)
        assert output.logits is not None
        assert target.logits is not None
        prediction = soft_cross_entropy(output.logits, target.logits, "single_label_classification")
        (0.01 * loss + prediction).backward()
        optimiser.step()
        optimiser.zero_grad()
        end = clock()
        seconds["step"].append(end - start - (pyemd_end - emd_end))
        seconds["distances"].append(emd_start - distances_start)
        seconds["emd"].append(emd_end - emd_start)
        seconds["pyemd"].append(pyemd_end - emd_end)
    # The first repetition warms up.
    return {name: values[1:] for name, values in seconds.items()}


def quartiles(values: Any) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = np.percentile(np.array(values), [25, 50, 75])
    return {"median": float(middle), "lower_quartile": float(low), "upper_quartile": float(high)}


def main(command_line: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7, help="repetitions of the step")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--device", default="cpu", help="torch device of the models")
    parser.add_argument("--rows", type=int, default=32, help="rows of a batch")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a row")
    parser.add_argument("--teacher-layers", type=int, default=12, help="layers of the teacher, 384 wide")
    parser.add_argument("--student-layers", type=int, default=4, help="layers of the student, 312 wide")
    parser.add_argument("--output", help="JSON file to write")
    arguments = parser.parse_args(command_line)
    sizes = ("repeats", "threads", "rows", "tokens", "teacher_layers", "student_layers")
    if any(getattr(arguments, name) < 1 for name in sizes):
        parser.error("All numbers must be at least 1.")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    seconds = {name: np.array(values) for name, values in measure(arguments).items()}

    share = quartiles(seconds["emd"] / seconds["step"])
    spread = {name: quartiles(1e3 * values) for name, values in seconds.items()}
    result = {
        "machine": machine_description(arguments.device),
        **{name: getattr(arguments, name) for name in (*sizes, "device")},
        "share_of_step": share["median"],
        "share_of_step_quartiles": [share["lower_quartile"], share["upper_quartile"]],
        "pyemd_share_of_step": float(np.median(seconds["pyemd"] / seconds["step"])),
        "times_faster_than_pyemd": float(np.median(seconds["pyemd"] / seconds["emd"])),
        **{f"{name}_ms": row["median"] for name, row in spread.items()},
        **{
            f"{name}_ms_quartiles": [row["lower_quartile"], row["upper_quartile"]]
            for name, row in spread.items()
        },
    }
    labels = {
        "step": "whole step",
        "distances": "distances, forward",
        "emd": "flows and weights",
        "pyemd": "the same by pyemd",
    }
    table = Table("part", "median ms", "quartiles ms", "share of the step", title="A BERT-EMD training step")
    for name, label in labels.items():
        row = spread[name]
        table.add_row(
            label,
            f"{row['median']:.2f}",
            f"{row['lower_quartile']:.2f}–{row['upper_quartile']:.2f}",
            f"{float(np.median(seconds[name] / seconds['step'])):.2%}",
        )
    Console(stderr=True).print(table)
    print(json.dumps(result, indent=2))
    if arguments.output:
        write_json(arguments.output, result)


if __name__ == "__main__":
    main()
