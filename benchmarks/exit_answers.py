"""What exits say together: their answers scaled, or averaged, against each exit's own, on models already trained.

Reads the folders that `benchmarks/early_exit_study.py` left (ROW-SEED and teacher-SEED), adds a set to the JSON and
writes the tables beside it. Nothing is trained: temperatures are fitted on dev, and the policy is chosen there.

    python benchmarks/exit_answers.py --runs runs/early-exits-clinc150 --data DATA/clinc150 --max-train-rows 3000 \
        --max-dev-rows 1500 --max-test-rows 3000 --max-length 32 --json docs/results/exit-answers.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from early_exit_study import CONVENTION, FASTEST, RESAMPLES, SLOWEST, SPEED_UPS, SPEEDS, area, slug
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from alembert.benchmarks.evaluation import collect_exit_answers, task_texts
from alembert.benchmarks.flops import CostModel
from alembert.cli.options import limit_rows, quiet_libraries
from alembert.common.errors import InputError
from alembert.common.files import read_json, write_json, write_text
from alembert.data import load_task
from alembert.data.task import Task
from alembert.models.loading import load_classifier
from alembert.runtime.adaptive import AdaptiveClassifier
from alembert.runtime.policies import ExitPolicy

POLICIES = ("entropy", "max_probability", "margin")
OWN = "each its own"
"""The way that the others are compared with."""


def geometric_mean(log_probabilities: np.ndarray) -> np.ndarray:
    """Of all exits up to each one, alike: (rows, exits, labels) → the same."""
    return np.cumsum(log_probabilities, axis=1) / np.arange(1, log_probabilities.shape[1] + 1)[:, None]


def half_of_before(log_probabilities: np.ndarray) -> np.ndarray:
    """Half an exit's own, half what was said before it: (rows, exits, labels) → the same."""
    said = log_probabilities.copy()
    for index in range(1, said.shape[1]):
        said[:, index] = log_softmax((said[:, index - 1] + said[:, index]) / 2, axis=-1)
    return said


def half_of_before_but_last(log_probabilities: np.ndarray) -> np.ndarray:
    """As `half_of_before`, where the last layer answers alone."""
    said = half_of_before(log_probabilities)
    said[:, -1] = log_probabilities[:, -1]
    return said


WAYS: dict[str, tuple[bool, Callable[[np.ndarray], np.ndarray]]] = {
    OWN: (False, lambda said: said),
    "temperature per exit": (True, lambda said: said),
    "mean of all so far": (False, geometric_mean),
    "half of what was said before": (False, half_of_before),
    "the same, last layer alone": (False, half_of_before_but_last),
    "temperature, half of before": (True, half_of_before),
}
"""Whether temperatures are fitted, and what is made of the exits' log-probabilities."""


@dataclass(frozen=True)
class Split:
    """What a model's exits say of a split.

    Attributes:
        logits: (rows, exits, labels).
        labels: (rows,).
        shares: (rows, exits) MACs up to each exit over the mean text's in the teacher.
    """

    logits: np.ndarray
    labels: np.ndarray
    shares: np.ndarray

    @classmethod
    def of(cls, classifier: AdaptiveClassifier, teacher: CostModel, task: Task, split: str) -> Split:
        """Runs every exit over a split."""
        answers = collect_exit_answers(classifier, task_texts(task, split))
        costs, layers = CostModel.from_model(classifier.backend.model), answers.exit_layers
        macs = [
            costs.macs(
                np.full(len(answers.lengths), layer), answers.lengths, CONVENTION, active_exits=layers[:-1]
            )
            for layer in layers
        ]
        full = teacher.full_model_macs(answers.lengths, CONVENTION).mean()
        labels = np.asarray(task.dataset(split)["labels"])
        return cls(answers.logits.astype(np.float64), labels, np.stack(macs, axis=1) / full)

    def temperatures(self) -> np.ndarray:
        """Of each exit, the one that makes the labels likeliest (Guo et al. 2017, temperature scaling): (exits,)."""
        rows = np.arange(len(self.labels))

        def fitted(logits: np.ndarray) -> float:
            def loss(logarithm: float) -> float:
                return float(-log_softmax(logits / np.exp(logarithm), axis=-1)[rows, self.labels].mean())

            return float(np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x))

        return np.array([fitted(self.logits[:, index]) for index in range(self.logits.shape[1])])

    def per_row(
        self, way: str, temperatures: np.ndarray, policy: ExitPolicy
    ) -> tuple[np.ndarray, np.ndarray]:
        """Whether right, and share of the teacher's MACs: two arrays (speeds, rows)."""
        scaled, combine = WAYS[way]
        logits = self.logits / temperatures[:, None] if scaled else self.logits
        probabilities = softmax(combine(log_softmax(logits, axis=-1)), axis=-1)
        right = probabilities.argmax(-1) == self.labels[:, None]
        uncertainties, _ = policy.uncertainty(probabilities)
        rows, correct, shares = np.arange(len(self.labels)), [], []
        for speed in SPEEDS:
            leaves = uncertainties < speed
            leaves[:, -1] = True
            taken = leaves.argmax(axis=1)
            correct.append(right[rows, taken])
            shares.append(self.shares[rows, taken])
        return np.array(correct, float), np.array(shares)


def curve(
    correct: np.ndarray, shares: np.ndarray, floor: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy by share of MACs, ascending, from the commonest answer, which costs none; `floor`: where it is right."""
    cost = shares @ weights
    order = np.argsort(cost, kind="stable")
    return np.array([0.0, *cost[order]]), np.array([floor @ weights, *(correct @ weights)[order]])


def measure(
    dev: Split, test: Split, commonest: int, task: Task
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Each way's area and accuracies on test, under the policy whose area on dev is largest, and areas of resamples."""
    temperatures = dev.temperatures()
    policies = [ExitPolicy(name, task.problem_type).resolve(task.num_labels) for name in POLICIES]
    floors = {
        name: (split.labels == commonest).astype(float) for name, split in (("dev", dev), ("test", test))
    }
    even, even_on_dev = (np.full(len(split.labels), 1 / len(split.labels)) for split in (test, dev))
    resamples = np.random.default_rng(0).multinomial(len(even), even, RESAMPLES) / len(even)
    found: dict[str, Any] = {"temperatures": temperatures.round(3).tolist(), "ways": {}}
    samples = {}
    for way in WAYS:
        on_dev = {
            policy.name: area(*curve(*dev.per_row(way, temperatures, policy), floors["dev"], even_on_dev))
            for policy in policies
        }
        policy = max(policies, key=lambda policy: on_dev[policy.name])
        table = test.per_row(way, temperatures, policy)
        points = curve(*table, floors["test"], even)
        found["ways"][way] = {
            "policy": policy.name,
            "area": area(*points),
            "at_speedup": {
                str(wanted): round(float(np.interp(1 / wanted, *points)), 5) for wanted in SPEED_UPS
            },
        }
        samples[way] = np.array([area(*curve(*table, floors["test"], weights)) for weights in resamples])
    return found, samples


def differences(samples: Sequence[Mapping[str, np.ndarray]]) -> dict[str, list[float]]:
    """Of each way's area from each exit's own, means over seeds: the 95% interval over resamples of the test rows."""
    return {
        way: np.percentile(np.mean([each[way] - each[OWN] for each in samples], axis=0), (2.5, 97.5))
        .round(5)
        .tolist()
        for way in WAYS
        if way != OWN
    }


def tables(results: Mapping[str, Any]) -> str:
    """A section a set: means over seeds, and by how much each way's area differs from each exit's own."""
    speedups = "".join(f" {speedup:g}× |" for speedup in SPEED_UPS)
    text = "# What exits say together, in tables\n"
    for name, study in results.items():
        text += f"\n## {name}\n\n| model | seeds | answers | area {SLOWEST:g}×–{FASTEST:g}× | − {OWN} |{speedups}\n"
        text += "|---" * (5 + len(SPEED_UPS)) + "|\n"
        for row, result in study["results"].items():
            seeds = result["seeds"].values()
            mean = {way: 100 * np.mean([seed["ways"][way]["area"] for seed in seeds]) for way in WAYS}
            for way in WAYS:
                difference = ""
                if way != OWN:
                    low, high = result["difference_intervals"][way]
                    difference = f"{mean[way] - mean[OWN]:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
                cells = [row, str(len(seeds)), way, f"**{mean[way]:.1f}**", difference]
                cells += [
                    f"{100 * np.mean([seed['ways'][way]['at_speedup'][str(speedup)] for seed in seeds]):.1f}"
                    for speedup in SPEED_UPS
                ]
                text += "| " + " | ".join(cells) + " |\n"
    return text


def main(command_line: Sequence[str] | None = None) -> None:
    """Measures the models that are there, adds the set to the JSON and writes its tables anew."""
    arguments = parse_arguments(command_line)
    quiet_libraries()
    task = load_task(arguments.data, seed=1, required_splits=("train", "dev", "test"))
    limits = {
        "train": arguments.max_train_rows,
        "dev": arguments.max_dev_rows,
        "test": arguments.max_test_rows,
    }
    task = limit_rows(task, limits, 1)
    commonest = int(np.bincount(np.asarray(task.dataset("train")["labels"])).argmax())
    measured: dict[str, dict[str, Any]] = {}
    for row in arguments.rows.split(";"):
        samples = []
        for seed in arguments.seeds.split(","):
            folder = arguments.runs / f"{slug(row)}-{seed}"
            if not (folder / "config.json").is_file():
                continue
            teacher = CostModel.from_model(load_classifier(str(arguments.runs / f"teacher-{seed}")))
            classifier = AdaptiveClassifier.from_pretrained(str(folder), max_length=arguments.max_length)
            splits = [Split.of(classifier, teacher, task, split) for split in ("dev", "test")]
            found, resampled = measure(*splits, commonest, task)
            measured.setdefault(row, {"seeds": {}})["seeds"][seed] = found
            samples.append(resampled)
            print(f"{row}, seed {seed}: measured", flush=True)
        if samples:
            measured[row]["difference_intervals"] = differences(samples)
    if not measured:
        raise InputError(f"{arguments.runs} holds no model of {arguments.rows!r}: give the study's --output")
    results = read_json(arguments.json) if arguments.json.exists() else {}
    rows = {split: data.num_rows for split, data in task.splits.items()}
    results[task.name] = {"rows": rows, "max_length": arguments.max_length, "results": measured}
    write_json(arguments.json, results)
    write_text(arguments.json.with_name(f"{arguments.json.stem}-tables.md"), tables(results))


def parse_arguments(command_line: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=Path, required=True, help="what the study left")
    parser.add_argument("--data", required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rows", default="fastbert;ms-bert;deebert, mean heads;alembert")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--max-train-rows", type=int)
    parser.add_argument("--max-dev-rows", type=int)
    parser.add_argument("--max-test-rows", type=int)
    return parser.parse_args(command_line)


if __name__ == "__main__":
    main()
