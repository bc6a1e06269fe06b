"""Whether exports answer as the run that they were made from, and whether a text's company changes its answer.

    python benchmarks/parity.py RUN --exported FOLDER FOLDER --data FOLDER --speed 0,0.5 --output parity.json

Each is run at each speed over all texts of the split, in batches by length, and over some of them one by one. Exports
are compared with the run on torch: share of texts with the same exit and label, how far probabilities lie apart, and
accuracy, with the difference in pairs. Texts alone are compared with the same texts in batches, by the same model.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from alembert.benchmarks.comparison_rows import as_scores
from alembert.benchmarks.evaluation import task_texts
from alembert.benchmarks.timing import machine_description
from alembert.cli.evaluate import parse_speeds
from alembert.cli.options import load_evaluation_task, quiet_libraries
from alembert.common.errors import InputError
from alembert.common.files import write_json
from alembert.data.metrics import resampled_accuracy_differences
from alembert.runtime.adaptive import AdaptiveClassifier, Text

RESAMPLES = 10_000


@dataclass(frozen=True)
class Answers:
    """Decisions (rows, labels) bool, the layers (rows,) that the texts left after, probabilities (rows, labels)."""

    decisions: np.ndarray
    exits: np.ndarray
    probabilities: np.ndarray

    @classmethod
    def of(cls, classifier: AdaptiveClassifier, groups: Sequence[Sequence[Text]], speed: float) -> Answers:
        """To all texts of the groups, in their order; each group is answered by itself."""
        predictions = [one for texts in groups for one in classifier.predict(texts, speed=speed)]
        labels: Any = [list(p.label) if isinstance(p.label, tuple) else p.label for p in predictions]
        scores = as_scores(labels, classifier.facts.problem_type, classifier.label_names)
        probabilities = [classifier.predict_proba(texts, speed=speed) for texts in groups]
        return cls(scores > 0, np.array([one.exit for one in predictions]), np.concatenate(probabilities))

    def rows(self, chosen: np.ndarray) -> Answers:
        """The answers to some texts."""
        return Answers(self.decisions[chosen], self.exits[chosen], self.probabilities[chosen])

    def against(self, other: Answers) -> dict[str, float]:
        """Shares of texts with the same exit and label; the largest |Δp| of a text's labels, its maximum and mean."""
        apart = np.abs(self.probabilities - other.probabilities).max(axis=1)
        return {
            "same_exit": float((self.exits == other.exits).mean()),
            "same_label": float((self.decisions == other.decisions).all(axis=1).mean()),
            "max_difference": float(apart.max()),
            "mean_difference": float(apart.mean()),
        }


def paired_difference(right: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    """Accuracy less the reference's (rows,), with a 95% bootstrap interval over pairs, and what was lost and gained."""
    rows, lost, gained = len(right), int((reference & ~right).sum()), int((right & ~reference).sum())
    interval = np.quantile(
        resampled_accuracy_differences(right, reference, resamples=RESAMPLES), [0.025, 0.975]
    )
    return {
        "accuracy_difference": (gained - lost) / rows,
        "accuracy_difference_interval": interval.tolist(),
        "lost": lost,
        "gained": gained,
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Compares, prints and returns the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", help="a run directory, for one or several labels per text")
    parser.add_argument("--exported", nargs="+", required=True, help="folders of `alembert export`")
    parser.add_argument("--data", required=True)
    parser.add_argument("--split")
    parser.add_argument("--speed", default="0,0.5")
    parser.add_argument("--alone-rows", type=int, default=200, help="texts that are also run one by one")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output")
    given = parser.parse_args(arguments)
    quiet_libraries()
    if given.threads:
        torch.set_num_threads(given.threads)
    threads, speeds = torch.get_num_threads(), parse_speeds(given.speed)
    # A speed is given, so that a calibration of one of them does not choose exits or length for it.
    run = AdaptiveClassifier.from_pretrained(given.run, speed=0.0, threads=threads)
    rule = run.policy()
    exports = {
        source: AdaptiveClassifier.from_pretrained(
            source, speed=0.0, threads=threads, policy=rule.name, top_k=rule.top_k
        )
        for source in given.exported
    }
    opened = {given.run: run, **exports}
    if run.facts.problem_type == "regression":
        raise InputError(f"{given.run}: answers numbers, which have no accuracy; give a classifier")
    task, split, _ = load_evaluation_task(given.data, given.run, run, given.split)
    texts, labels = task_texts(task, split), np.array(task.dataset(split)["labels"])
    truth = labels > 0 if labels.ndim == 2 else np.eye(len(run.label_names), dtype=bool)[labels]
    alone = np.sort(np.random.default_rng(0).permutation(len(texts))[: given.alone_rows])
    rows: list[dict[str, Any]] = []
    for speed in speeds:
        expected: Answers | None = None
        for source, classifier in opened.items():
            found = Answers.of(classifier, [texts], speed)
            right = (found.decisions == truth).all(axis=1)
            row: dict[str, Any] = {"model": source, "speed": speed, "accuracy": float(right.mean())}
            if expected is None:
                expected = found
            else:
                reference = (expected.decisions == truth).all(axis=1)
                row |= {"against_run": found.against(expected) | paired_difference(right, reference)}
            singles = Answers.of(classifier, [[texts[index]] for index in alone], speed)
            row |= {"alone_against_batches": singles.against(found.rows(alone))}
            rows.append(row)
            for name in ("against_run", "alone_against_batches"):
                if name in row:
                    print(f"{source} at {speed:g}, {name.replace('_', ' ')}: {_in_words(row[name])}")
    results = {
        "machine": machine_description(run.backend.device) | {"threads": threads},
        "model": given.run,
        "data": given.data,
        "split": split,
        "rows": len(texts),
        "alone_rows": len(alone),
        "policy": run.policy().name,
        "results": rows,
    }
    if given.output:
        write_json(given.output, results)
    return results


def _in_words(values: dict[str, Any]) -> str:
    numbers = {name.replace("_", " "): value for name, value in values.items() if not isinstance(value, list)}
    return ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())


if __name__ == "__main__":
    main()
