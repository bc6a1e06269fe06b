"""What a small model with exits keeps of a large teacher's accuracy at a small share of its MACs.

Policy and placement (all exits, or every second) are those with the highest accuracy on dev at the asked speed-up.

    python benchmarks/slim_exits.py --teacher runs/mpnet --model runs/minilm-exits --data DATA/clinc150 \
        --max-length 32 --output docs/results/slim-exits.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from early_exit_study import CONVENTION, POLICIES, RESAMPLES, Measured

from alembert.benchmarks.evaluation import collect_exit_answers, task_texts
from alembert.benchmarks.flops import CostModel
from alembert.benchmarks.timing import machine_description
from alembert.cli.options import quiet_libraries
from alembert.common.errors import InputError
from alembert.common.files import write_json
from alembert.data import load_task
from alembert.data.task import Task
from alembert.methods.student_distillation import full_model
from alembert.runtime.adaptive import AdaptiveClassifier

SPEED_UPS = (2.0, 4.0, 8.0, 12.0, 16.0, 19.0, 24.0)


@dataclass(frozen=True)
class Split:
    """A split as the model answers it, and which of its rows the teacher answers rightly."""

    model: Measured
    teacher_right: np.ndarray


def main(command_line: Sequence[str] | None = None) -> None:
    """Measures both models, and writes what the small one keeps."""
    arguments = parse_arguments(command_line)
    quiet_libraries()
    task = load_task(arguments.data, seed=1, required_splits=("train", "dev", "test"))
    teacher = AdaptiveClassifier.from_pretrained(
        str(arguments.teacher), speed=0.0, max_length=arguments.max_length
    )
    model = AdaptiveClassifier.from_pretrained(str(arguments.model), max_length=arguments.max_length)
    costs, teacher_costs = (CostModel.from_model(each.backend.model) for each in (model, teacher))
    commonest = int(np.bincount(np.asarray(task.dataset("train")["labels"])).argmax())
    dev, test = (
        read_split(task, split, model, teacher, teacher_costs, commonest) for split in ("dev", "test")
    )
    found = {}
    for wanted in SPEED_UPS:
        on_dev = {
            (every, policy): accuracy_at(wanted, dev.model.placed(every), costs, policy, task)[0]
            for every in (1, 2)
            for policy in POLICIES
            if policy != "learned" or dev.model.answers.learned_uncertainties is not None
        }
        every, policy = max(on_dev, key=lambda key: on_dev[key])
        accuracy, samples = accuracy_at(
            wanted, test.model.placed(every), costs, policy, task, test.teacher_right
        )
        full = float(test.teacher_right.mean())
        low, high = np.quantile(samples, [0.025, 0.975])
        found[f"{wanted:g}"] = {
            "placement": "all" if every == 1 else f"every {every}",
            "policy": policy,
            "accuracy": round(accuracy, 5),
            "share_of_teacher": round(accuracy / full, 5),
            "share_interval": [round(float(low), 5), round(float(high), 5)],
        }
        print(f"1/{wanted:g} of the MACs: {accuracy:.4f}, {accuracy / full:.2%} of {full:.4f}", flush=True)
    rows = {split: data.num_rows for split, data in task.splits.items()}
    write_json(
        arguments.output,
        {
            "task": task.name,
            "rows": rows,
            "teacher": describe(teacher, test.teacher_right),
            "model": describe(model, None),
            "max_length": arguments.max_length,
            "machine": machine_description(),
            "at_speedup": found,
        },
    )


def read_split(
    task: Task,
    split: str,
    model: AdaptiveClassifier,
    teacher: AdaptiveClassifier,
    teacher_costs: CostModel,
    commonest: int,
) -> Split:
    """The answers of both to a split; the teacher's MACs are of its own tokens."""
    texts, labels = task_texts(task, split), np.asarray(task.dataset(split)["labels"])
    full = collect_exit_answers(teacher, texts)
    macs = teacher_costs.full_model_macs(full.lengths, CONVENTION)
    return Split(
        Measured(collect_exit_answers(model, texts), labels, macs, commonest),
        full.logits[:, -1].argmax(-1) == labels,
    )


def accuracy_at(
    speed_up: float,
    measured: Measured,
    costs: CostModel,
    policy: str,
    task: Task,
    teacher_right: np.ndarray | None = None,
) -> tuple[float, list[float]]:
    """Accuracy at a share of the teacher's MACs, and, over resampled rows, its share of the teacher's accuracy."""
    table = measured.per_row(costs, policy, task)
    accuracy = float(np.interp(1 / speed_up, *measured.curve(*table)))
    if teacher_right is None:
        return accuracy, []
    rows = len(teacher_right)
    resamples = np.random.default_rng(0).multinomial(rows, np.full(rows, 1 / rows), RESAMPLES) / rows
    shares = [
        float(np.interp(1 / speed_up, *measured.curve(*table, weights)) / (teacher_right @ weights))
        for weights in resamples
    ]
    return accuracy, shares


def describe(classifier: AdaptiveClassifier, right: np.ndarray | None) -> dict[str, object]:
    """Shape of a model, and its accuracy on test where it is known."""
    config = full_model(classifier.backend.model).config
    shape = {"layers": config.num_hidden_layers, "width": config.hidden_size, "family": config.model_type}
    return shape if right is None else shape | {"accuracy": round(float(right.mean()), 5)}


def parse_arguments(command_line: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="a run directory with exits")
    parser.add_argument("--data", required=True)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args(command_line)
    for folder in (arguments.teacher, arguments.model):
        if not (folder / "config.json").exists():
            raise InputError(f"{folder} holds no model: there is no config.json")
    return arguments


if __name__ == "__main__":
    main()
