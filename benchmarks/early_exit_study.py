"""Methods of early exits against one another: the area under accuracy against MACs, at one budget of training.

For each seed an encoder is fine-tuned for `--epochs`, and each method makes a model with exits of it, for about what
that cost (`epochs_within`). Placement (all layers, or every second) and policy are chosen on dev. Runs go on where they
stopped.

    python benchmarks/early_exit_study.py --model ENCODER --data DATA/clinc150 --output runs/early-exits-clinc150 \
        --json docs/results/early-exits-clinc150.json --max-train-rows 3000 --max-length 32
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from exit_banks import train_banks

from alembert.benchmarks.evaluation import ExitAnswers, collect_exit_answers, task_texts
from alembert.benchmarks.flops import Convention, CostModel
from alembert.benchmarks.timing import machine_description
from alembert.cli.options import limit_rows, quiet_libraries
from alembert.common.errors import InputError
from alembert.common.files import read_json, write_json
from alembert.data import load_task
from alembert.data.metrics import compute_metrics
from alembert.data.task import Task
from alembert.data.validation import rows_not_in_train
from alembert.methods.alembert import student_depth
from alembert.methods.deebert import DeeBertOptions
from alembert.methods.distillation import distill
from alembert.methods.ms_bert import MsBertOptions
from alembert.methods.registry import find_method
from alembert.methods.self_distillation import ExitOptions, PlacementOptions
from alembert.models.loading import load_classifier, load_tokenizer
from alembert.runtime.adaptive import AdaptiveClassifier
from alembert.runtime.policies import ExitPolicy
from alembert.training.finetuning import finetune
from alembert.training.settings import TrainingSettings

HALF = "half"
"""A student of half the teacher's layers."""
FIRST_HALF = (1, 2, 3, 4, 5, 6)
"""Of twelve layers, instead of evenly spread ones."""
FROZEN: dict[str, tuple[str, PlacementOptions]] = {
    "fastbert": ("fastbert", ExitOptions()),
    "ms-bert, paper": ("ms-bert", MsBertOptions(emd="histogram", weighting="paper")),
    "ms-bert": ("ms-bert", MsBertOptions()),
    "deebert": ("deebert", DeeBertOptions()),
    "deebert, mean heads": ("deebert", DeeBertOptions(exit_head="mean")),
}
"""Method and options of the rows whose backbone stays as it is."""
_MEAN = {"placement": "all", "exit_head": "mean"}
MOVING: dict[str, tuple[tuple[str, dict[str, Any], float], ...]] = {
    "berxit": (("berxit", {"placement": "all"}, 1.0),),
    "berxit, mean heads": (("berxit", _MEAN, 1.0),),
    "pabee": (("pabee", {"placement": "all", "exit_epochs": 1.0}, 1.0),),
    "pabee, mean heads": (("pabee", _MEAN | {"exit_epochs": 1.0}, 1.0),),
    "student, then pabee": (
        ("kd", {"student": HALF, "initialise": "layers"}, 0.5),
        ("pabee", _MEAN | {"exit_epochs": 1.0}, 0.5),
    ),
    "alembert, all layers": (("alembert", {"depth": 1.0}, 1.0),),
    "alembert, two thirds": (("alembert", {"depth": 0.6667}, 1.0),),
    "alembert, answers alone": (("alembert", {"hard_weight": 0.0}, 1.0),),
    "alembert, first layers": (("alembert", {"init_layers": FIRST_HALF}, 1.0),),
    "alembert": (("alembert", {}, 1.0),),
    "alembert, two budgets": (("alembert", {}, 2.0),),
    "alembert, all layers, two budgets": (("alembert", {"depth": 1.0}, 2.0),),
}
"""Of the rows whose backbone learns: methods in turn, with options and share of the budget."""
PASS, FROZEN_STEP = 1 / 3, 1 / 2
"""Costs, in training steps of all layers, of a pass without gradients, and of one with exits that learn after it."""
POLICIES = ("entropy", "top_k_entropy", "max_probability", "margin", "patience", "learned")
SPEEDS = np.unique(np.concatenate([[0.0], np.geomspace(1e-4, 1, 60), np.linspace(0, 1, 51)]).round(6))
CONVENTION: Convention = "full"
SPEED_UPS = (2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
SLOWEST, FASTEST = 2.0, 12.0
RESAMPLES = 1000


def main(command_line: Sequence[str] | None = None) -> None:
    """Trains and measures the rows that the JSON does not have yet."""
    arguments = parse_arguments(command_line)
    quiet_libraries()
    wanted = arguments.rows.split(";") if arguments.rows else [*FROZEN, *MOVING]
    if unknown := [row for row in wanted if row not in FROZEN and row not in MOVING]:
        raise InputError(f"unknown rows {unknown}: choose from {'; '.join([*FROZEN, *MOVING])}")
    task = load_task(arguments.data, seed=1, required_splits=("train", "dev"))
    limits = {
        "train": arguments.max_train_rows,
        "dev": arguments.max_dev_rows,
        "test": arguments.max_test_rows,
    }
    task = limit_rows(task, limits, 1)
    scored = task
    if arguments.unseen_rows:
        scored = replace(task, splits={name: unseen(task, name) for name in task.splits})
    study = open_study(arguments, scored)
    for seed in map(int, arguments.seeds.split(",")):
        settings = TrainingSettings(**study["settings"]["training"], seed=seed)
        teacher = arguments.output / f"teacher-{seed}"
        finetune(arguments.model, task, teacher, settings=settings)
        scores = read_json(teacher / "metrics.json")
        if scored is not task:
            scores |= scores_of(teacher, scored, arguments.max_length)
        if scores["dev"][task.main_metric] <= scores["majority_baseline"]:
            raise InputError(
                f"{teacher} only gives the commonest answer: train it on more rows, or for longer"
            )
        study["teacher"][str(seed)] = scores
        # Test is measured once, below.
        seen = replace(task, splits={name: rows for name, rows in task.splits.items() if name != "test"})
        missing = [row for row in wanted if str(seed) not in study["results"].get(row, {})]
        for row, folder in trained(missing, seed, teacher, seen, settings, arguments.output):
            measured = measure(folder, teacher, scored, arguments.max_length)
            study["results"].setdefault(row, {})[str(seed)] = measured
            write_json(arguments.json, study)
            print(f"{row}, seed {seed}: area on dev {max(measured['areas_on_dev'].values()):.4f}", flush=True)


def unseen(task: Task, split: str) -> Dataset:
    """A split without the rows that stand in train too; train itself as it is."""
    rows = task.dataset(split)
    return rows if split == "train" else rows.select(rows_not_in_train(task.splits, split))


def scores_of(model: Path, task: Task, max_length: int) -> dict[str, dict[str, float]]:
    """What a classifier without exits scores on dev and test."""
    classifier = AdaptiveClassifier.from_pretrained(str(model), max_length=max_length)
    scores = {}
    for split in ("dev", "test"):
        logits = collect_exit_answers(classifier, task_texts(task, split)).logits[:, -1]
        labels = np.asarray(task.dataset(split)["labels"])
        scores[split] = compute_metrics(task.problem_type, task.metrics, logits, labels)
    return scores


def open_study(arguments: argparse.Namespace, task: Task) -> dict[str, Any]:
    """The JSON as it is, or a new one. Raises InputError when it holds what other settings came to."""
    settings = {
        "model": Path(arguments.model).name,
        "training": {
            "epochs": arguments.epochs,
            "batch_size": arguments.batch_size,
            "learning_rate": arguments.learning_rate,
            "head_learning_rate": 1e-3,
            "max_length": arguments.max_length,
        },
        "frozen": {
            row: [method, options.model_dump(mode="json")] for row, (method, options) in FROZEN.items()
        },
        "moving": {row: [list(step) for step in steps] for row, steps in MOVING.items()},
    }
    rows = {split: data.num_rows for split, data in task.splits.items()}
    new = {
        "task": task.name, "rows": rows, "settings": settings, "machine": machine_description(), "teacher": {},
        "results": {},
    }  # fmt: skip
    if not arguments.json.exists():
        return new
    study: dict[str, Any] = read_json(arguments.json)
    # As JSON has it: no tuples.
    settings, known = json.loads(json.dumps(settings)), study["settings"]
    same = study["rows"] == rows and all(known[name] == settings[name] for name in ("model", "training"))
    for kind in ("frozen", "moving"):
        same = same and all(settings[kind].get(row, way) == way for row, way in known[kind].items())
    if not same:
        raise InputError(f"{arguments.json} holds a study with other rows or settings: choose another --json")
    return study | {"settings": settings}


def trained(
    rows: Sequence[str], seed: int, teacher: Path, task: Task, settings: TrainingSettings, output: Path
) -> Iterator[tuple[str, Path]]:
    """Each row's name and trained model: the frozen ones first, for all of them learn in one pass."""
    if any(row in FROZEN for row in rows):
        update = {"epochs": settings.epochs / FROZEN_STEP, "learning_rate": 1e-3, "max_grad_norm": 0.0}
        update |= {"head_learning_rate": None}
        _, banks, _ = train_banks(
            FROZEN, str(teacher), task, settings.model_copy(update=update), output / f"frozen-{seed}"
        )
        for row, model in banks.items():
            if row in rows:
                folder = output / f"{slug(row)}-{seed}"
                model.save_pretrained(folder)
                load_tokenizer(str(teacher)).save_pretrained(folder)
                yield row, folder
    config = load_classifier(str(teacher)).config
    for row in rows:
        if row in FROZEN:
            continue
        source, steps = teacher, MOVING[row]
        for number, (method, options, share) in enumerate(steps, 1):
            name = f"{slug(row)}-{seed}" if number == len(steps) else f"{slug(row)}-{seed}-step-{number}"
            separate = find_method(method).separate_teacher
            halved = number > 1 or options.get("student") == HALF
            depth_share = 0.5 if halved else options.get("depth", 0.5 if separate else 1.0)
            depth = student_depth(config.num_hidden_layers, depth_share)
            student = f"{depth}x{config.hidden_size}" if options.get("student") == HALF else None
            epochs = epochs_within(
                share * settings.epochs,
                layers=depth / config.num_hidden_layers,
                exit_epochs=options.get("exit_epochs", 1.0 if method == "alembert" else 0.0),
                has_teacher=separate,
            )
            distill(
                method,
                str(source),
                task,
                output / name,
                student=student,
                options={option: value for option, value in options.items() if option != "student"},
                settings=settings.model_dump() | {"epochs": epochs},
                teacher_cache=output / f"teacher-{seed}-outputs" if separate else None,
            )
            source = output / name
        yield row, source


def epochs_within(budget: float, *, layers: float, exit_epochs: float, has_teacher: bool) -> float:
    """Epochs in which `layers` of the teacher's layers, as a share, are trained, so that all costs `budget`.

    The unit is an epoch of training all of the teacher's layers. `exit_epochs` go to the exits alone before. A
    separate teacher passes over the rows once; its outputs are kept.
    """
    before = exit_epochs * FROZEN_STEP * layers + (PASS if has_teacher else 0.0)
    return round((budget - before) / layers, 2)


def slug(row: str) -> str:
    return row.replace(", ", "-").replace(" ", "-")


@dataclass(frozen=True)
class Measured:
    """What every exit answers to a split's rows, and what the teacher and the commonest answer make of them.

    Attributes:
        answers: of the placement's exits.
        labels: (rows,).
        teacher_macs: (rows,) of the teacher's full depth.
        commonest: the label that train has most of.
    """

    answers: ExitAnswers
    labels: np.ndarray
    teacher_macs: np.ndarray
    commonest: int

    def placed(self, every: int) -> Measured:
        """With every `every`-th exit only, counted from the first layer, and the last."""
        layers = self.answers.exit_layers
        kept = [*range(0, len(layers) - 1, every), len(layers) - 1]
        learned = self.answers.learned_uncertainties
        answers = ExitAnswers(
            tuple(layers[index] for index in kept),
            self.answers.logits[:, kept],
            None if learned is None else learned[:, kept[:-1]],
            self.answers.lengths,
        )
        return Measured(answers, self.labels, self.teacher_macs, self.commonest)

    def per_row(self, costs: CostModel, policy_name: str, task: Task) -> tuple[np.ndarray, np.ndarray]:
        """Whether right, and MACs: two arrays (speeds, rows)."""
        answers = self.answers
        policy = ExitPolicy(policy_name, task.problem_type, len(answers.exit_layers)).resolve(task.num_labels)
        right = answers.logits.argmax(-1) == self.labels[:, None]
        layers = np.array(answers.exit_layers)
        correct, macs = [], []
        for speed in SPEEDS:
            taken = answers.replay(policy, float(speed))
            active = answers.exit_layers[:-1] if speed > 0 else ()
            correct.append(right[np.arange(len(taken)), taken])
            macs.append(costs.macs(layers[taken], answers.lengths, CONVENTION, active_exits=active))
        return np.array(correct, float), np.array(macs)

    def curve(
        self, correct: np.ndarray, macs: np.ndarray, weights: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Accuracy by share of the teacher's MACs, ascending, from the commonest answer, which costs none."""
        weights = np.full(len(self.labels), 1 / len(self.labels)) if weights is None else weights
        shares = macs @ weights / (self.teacher_macs @ weights)
        order = np.argsort(shares, kind="stable")
        floor = (self.labels == self.commonest) @ weights
        return np.array([0.0, *shares[order]]), np.array([floor, *(correct @ weights)[order]])


def area(shares: np.ndarray, accuracies: np.ndarray) -> float:
    """Mean accuracy over the shares of MACs between 1/FASTEST and 1/SLOWEST."""
    return float(np.interp(np.linspace(1 / FASTEST, 1 / SLOWEST, 501), shares, accuracies).mean())


def measure(folder: Path, teacher: Path, task: Task, max_length: int) -> dict[str, Any]:
    """Area and scores on test, in the placement and under the policy whose area on dev is largest."""
    classifier = AdaptiveClassifier.from_pretrained(str(folder), max_length=max_length)
    costs = CostModel.from_model(classifier.backend.model)
    teacher_costs = CostModel.from_model(load_classifier(str(teacher)))
    commonest = int(np.bincount(np.asarray(task.dataset("train")["labels"])).argmax())
    splits = {}
    for split in ("dev", "test"):
        answers = collect_exit_answers(classifier, task_texts(task, split))
        labels = np.asarray(task.dataset(split)["labels"])
        splits[split] = Measured(
            answers, labels, teacher_costs.full_model_macs(answers.lengths, CONVENTION), commonest
        )
    areas = {}
    for every in (1, 2):
        dev = splits["dev"].placed(every)
        for policy in POLICIES:
            if policy != "learned" or dev.answers.learned_uncertainties is not None:
                areas[every, policy] = area(*dev.curve(*dev.per_row(costs, policy, task)))
    every, policy = max(areas, key=lambda key: areas[key])
    test = splits["test"].placed(every)
    rows, table = len(test.labels), test.per_row(costs, policy, task)
    shares, accuracies = test.curve(*table)
    resamples = np.random.default_rng(0).multinomial(rows, np.full(rows, 1 / rows), RESAMPLES) / rows
    return {
        "placement": "all" if every == 1 else f"every {every}",
        "policy": policy,
        "areas_on_dev": {f"{each}, {name}": value for (each, name), value in areas.items()},
        "test": {
            "area": area(shares, accuracies),
            "area_samples": [round(area(*test.curve(*table, weights)), 5) for weights in resamples],
            "at_speedup": {
                str(wanted): round(float(np.interp(1 / wanted, shares, accuracies)), 5)
                for wanted in SPEED_UPS
            },
            "exits": {
                str(layer): float((splits["test"].answers.logits[:, index].argmax(-1) == test.labels).mean())
                for index, layer in enumerate(splits["test"].answers.exit_layers)
            },
        },
    }


def parse_arguments(command_line: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", required=True, help="an encoder")
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rows", help="some of the rows, separated by semicolons")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="of all that moves a backbone")
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--max-train-rows", type=int)
    parser.add_argument("--max-dev-rows", type=int)
    parser.add_argument("--max-test-rows", type=int)
    parser.add_argument(
        "--unseen-rows", action="store_true", help="leave rows of dev and test out that stand in train too"
    )
    return parser.parse_args(command_line)


if __name__ == "__main__":
    main()
