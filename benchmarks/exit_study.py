"""Compares ways to teach exits on one frozen teacher, over one pass of the backbone for all of them.

The placements (every second layer, the last half, all) are read off afterwards, because an exit's training does not
depend on which others exist. The banks (exit_banks.py) differ in what they learn from (`--compare methods`), or in the
kind of their heads (`--compare heads`).

    python benchmarks/exit_study.py --teacher runs/teacher --data reviews/ --output study.json --seed 1
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from exit_banks import ExitBanks, train_banks

from alembert.benchmarks.evaluation import ExitAnswers
from alembert.benchmarks.flops import CostModel
from alembert.cli.options import limit_rows, quiet_libraries
from alembert.common.files import write_json
from alembert.data import compute_metrics, load_task
from alembert.methods.ms_bert import MsBertOptions
from alembert.methods.self_distillation import ExitOptions
from alembert.models.exit_heads import EXIT_HEADS
from alembert.models.loading import classifier_facts, load_tokenizer
from alembert.models.placement import exit_layers
from alembert.runtime.policies import ExitPolicy, default_policy
from alembert.training.runner import tokenised
from alembert.training.settings import TrainingSettings

METHODS: dict[str, ExitOptions] = {
    "fastbert": ExitOptions(placement="all"),
    "fastbert, KL(teacher||student)": ExitOptions(placement="all", kl="teacher||student"),
    "ms-bert, histogram, paper": MsBertOptions(placement="all", emd="histogram", weighting="paper"),
    "ms-bert, sorted, paper": MsBertOptions(placement="all", emd="sorted", weighting="paper"),
    "ms-bert, sorted, normalised": MsBertOptions(placement="all", emd="sorted", weighting="normalised"),
    "ms-bert, sorted, inverse": MsBertOptions(placement="all", emd="sorted", weighting="inverse"),
    "ms-bert, class_aware, paper": MsBertOptions(placement="all", emd="class_aware", weighting="paper"),
    "ms-bert, class_aware, inverse": MsBertOptions(placement="all", emd="class_aware", weighting="inverse"),
    "ms-bert, sorted, inverse, KL(teacher||student)": MsBertOptions(
        placement="all", emd="sorted", weighting="inverse", kl="teacher||student"
    ),
    "ms-bert, class_aware, inverse, KL(teacher||student)": MsBertOptions(
        placement="all", emd="class_aware", weighting="inverse", kl="teacher||student"
    ),
}
HEADS = {
    kind: ExitOptions(placement="all", exit_head=kind, kl="teacher||student")  # type: ignore[arg-type]
    for kind in EXIT_HEADS
}
SPEED_UPS = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
FINE_SPEEDS = [round(0.01 * step, 2) for step in range(101)]


@dataclass
class Placed:
    """A placement's exits as positions among all layers' exits."""

    name: str
    layers: tuple[int, ...]

    def answers(self, logits: np.ndarray, lengths: np.ndarray, num_layers: int) -> ExitAnswers:
        chosen = [layer - 1 for layer in (*self.layers, num_layers)]
        return ExitAnswers((*self.layers, num_layers), logits[:, chosen], None, lengths)


def main(command_line: Sequence[str] | None = None) -> None:
    """Trains and measures the banks and writes the results."""
    arguments = parse_arguments(command_line)
    quiet_libraries()
    facts = classifier_facts(arguments.teacher)
    task = load_task(
        arguments.data,
        problem_type=facts.problem_type,
        label_names=facts.label_names,
        required_splits=("train",),
    )
    limits = {"train": arguments.max_train_rows, "test": arguments.max_test_rows}
    task = limit_rows(task, limits, arguments.seed)
    tokenizer = load_tokenizer(arguments.teacher)
    compared = HEADS if arguments.compare == "heads" else METHODS
    if arguments.compare == "methods":
        compared = {
            name: options.model_copy(update={"exit_head": arguments.exit_head})
            for name, options in compared.items()
        }
    settings = TrainingSettings(
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        max_length=arguments.max_length,
        max_grad_norm=0.0,
        seed=arguments.seed,
        checkpoint_steps=200,
    )
    methods = {
        name: ("ms-bert" if isinstance(options, MsBertOptions) else "fastbert", options)
        for name, options in compared.items()
    }
    model, banks, history = train_banks(
        methods, arguments.teacher, task, settings, arguments.checkpoints / Path(arguments.output).stem
    )
    num_layers = model.backbone.num_layers
    test = tokenised(task, arguments.split, tokenizer, arguments.max_length)
    logits = predict(model.eval(), test, tokenizer)
    labels, lengths = np.asarray(test["labels"]), np.asarray(test["length"])
    study = {
        "arguments": {key: str(value) for key, value in vars(arguments).items()},
        "task": task.describe() | {"evaluated_split": arguments.split},
        "num_layers": num_layers,
        "banks": {name: options.model_dump(mode="json") for name, options in compared.items()},
        "terms": [entry for entry in history if "loss" in entry][-1],
        "results": analyse(logits, labels, lengths, task, banks, num_layers),
    }
    if task.num_labels > 20 and arguments.compare == "methods":
        study["top_k"] = analyse_top_k(logits, labels, lengths, task, banks, num_layers)
    write_json(arguments.output, study)
    if arguments.models is not None:
        for name, bank in banks.items():
            folder = arguments.models / name.replace(", ", "-").replace("(", "-").replace(")", "").replace(
                "||", "-"
            )
            bank.save_pretrained(folder)
            tokenizer.save_pretrained(folder)


def predict(model: ExitBanks, dataset: Any, tokenizer: Any) -> dict[str, np.ndarray]:
    """Logits (rows, layers, labels) per bank, the teacher's own last."""
    order = np.argsort(np.asarray(dataset["length"]), kind="stable")
    logits: dict[str, np.ndarray] = {}
    for start in range(0, len(order), 64):
        rows = order[start : start + 64]
        columns = [
            name for name in ("input_ids", "attention_mask", "token_type_ids") if name in dataset.column_names
        ]
        batch = tokenizer.pad({name: dataset[rows][name] for name in columns}, return_tensors="pt")
        with torch.inference_mode():
            outputs = model(**batch)
        for name, output in outputs.items():
            stacked = torch.cat([output.exit_logits, output.logits[None]]).transpose(0, 1).numpy()
            logits.setdefault(name, np.empty((len(order), *stacked.shape[1:]), np.float32))[rows] = stacked
    return logits


def analyse(
    logits: dict[str, np.ndarray],
    labels: np.ndarray,
    lengths: np.ndarray,
    task: Any,
    banks: Any,
    num_layers: int,
) -> list[dict[str, Any]]:
    """For every bank and placement: each exit's own score, the ten speeds, and the score at given speed-ups."""
    placements = [
        Placed("every 2", exit_layers(num_layers, "every_k", 2)),
        Placed(f"last {num_layers // 2}", exit_layers(num_layers, "last_k")),
        Placed("all", exit_layers(num_layers, "all")),
    ]
    results = []
    for bank, values in logits.items():
        costs = CostModel.from_model(banks[bank])
        for placed in placements:
            answers = placed.answers(values, lengths, num_layers)
            name = default_policy(task.problem_type, task.num_labels)
            policy = ExitPolicy(name, task.problem_type, len(answers.exit_layers)).resolve(task.num_labels)
            curve = [measure(answers, labels, task, costs, policy, speed) for speed in FINE_SPEEDS]
            results.append(
                {
                    "bank": bank,
                    "placement": placed.name,
                    "policy": policy.name,
                    "top_k": policy.top_k,
                    "exit_scores": {
                        str(layer): score(task, answers.logits[:, index], labels)
                        for index, layer in enumerate(answers.exit_layers)
                    },
                    "speeds": [point for point in curve if round(point["speed"] * 10, 6) % 1 == 0],
                    "at_speedup": {str(wanted): at_speedup(curve, wanted) for wanted in SPEED_UPS},
                }
            )
    return results


def analyse_top_k(
    logits: dict[str, np.ndarray],
    labels: np.ndarray,
    lengths: np.ndarray,
    task: Any,
    banks: Any,
    num_layers: int,
) -> list[dict[str, Any]]:
    """MS-BERT's Figs. 4 and 5: uncertainty per exit, and the speed curve, as functions of K, in both forms."""
    placed = Placed("every 2", exit_layers(num_layers, "every_k", 2))
    results = []
    for bank in ("fastbert", "ms-bert, histogram, paper", "ms-bert, sorted, inverse"):
        answers = placed.answers(logits[bank], lengths, num_layers)
        costs = CostModel.from_model(banks[bank])
        probabilities = torch.from_numpy(answers.logits).softmax(-1).numpy()
        for k in (2, 3, 5, 10, 18, 50, task.num_labels):
            for renormalise in (False, True):
                policy = ExitPolicy(
                    "top_k_entropy", task.problem_type, len(answers.exit_layers), k, renormalise
                ).resolve(task.num_labels)
                results.append(
                    {
                        "bank": bank,
                        "k": k,
                        "renormalise": renormalise,
                        "mean_uncertainty": {
                            str(layer): float(policy.uncertainty(probabilities[:, index])[0].mean())
                            for index, layer in enumerate(answers.exit_layers)
                        },
                        "speeds": [
                            measure(answers, labels, task, costs, policy, round(0.1 * step, 1))
                            for step in range(11)
                        ],
                    }
                )
    return results


def measure(
    answers: ExitAnswers, labels: np.ndarray, task: Any, costs: CostModel, policy: ExitPolicy, speed: float
) -> dict[str, Any]:
    """Score, MACs, speed-up and exits at one speed."""
    taken = answers.replay(policy, speed)
    layers = np.array(answers.exit_layers)[taken]
    macs = costs.macs(
        layers, lengths := answers.lengths, active_exits=answers.exit_layers[:-1] if speed > 0 else ()
    )
    chosen = answers.logits[np.arange(len(taken)), taken]
    return {
        "speed": speed,
        "metric": score(task, chosen, labels),
        "macs": float(macs.mean()),
        "speedup": float(costs.full_model_macs(lengths).mean() / macs.mean()),
        "exits": {str(layer): float((layers == layer).mean()) for layer in answers.exit_layers},
    }


def score(task: Any, logits: np.ndarray, labels: np.ndarray) -> float:
    return compute_metrics(task.problem_type, (task.main_metric,), logits, labels)[task.main_metric]


def at_speedup(curve: list[dict[str, Any]], wanted: float) -> float | None:
    """The score at a speed-up, interpolated between neighbouring speeds; None beyond the curve."""
    speedups = np.array([point["speedup"] for point in curve])
    metrics = np.array([point["metric"] for point in curve])
    order = np.argsort(speedups)
    if not speedups.min() <= wanted <= speedups.max():
        return None
    return float(np.interp(wanted, speedups[order], metrics[order]))


def parse_arguments(command_line: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True, help="JSON file of results")
    parser.add_argument("--compare", choices=("methods", "heads"), default="methods")
    parser.add_argument("--split", default="test")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--max-train-rows", type=int)
    parser.add_argument("--max-test-rows", type=int)
    parser.add_argument("--exit-head", default="fastbert")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--checkpoints", type=Path, default=Path("runs/study-checkpoints"))
    parser.add_argument("--models", type=Path, help="folder to save every bank in, as a model with all exits")
    return parser.parse_args(command_line)


if __name__ == "__main__":
    main()
