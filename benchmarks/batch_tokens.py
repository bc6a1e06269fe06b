"""How many tokens a batch should have: throughput by token budget, on texts of real lengths.

    python benchmarks/batch_tokens.py FOLDER --data FOLDER --speed 0 --speed 0.5 --output batch-tokens.json

A run or an export answers as many texts as `--rows` says (may be repeated) in batches under each budget, in turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from alembert.benchmarks.evaluation import task_texts
from alembert.benchmarks.timing import interleave, machine_description, ratio
from alembert.cli.options import limit_rows, load_evaluation_task, quiet_libraries
from alembert.common.files import write_json
from alembert.runtime.adaptive import AdaptiveClassifier

BUDGETS = (128, 256, 512, 1024, 2048, 4096)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints and returns the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="a run directory, or a folder of `alembert export`")
    parser.add_argument("--data", required=True)
    parser.add_argument("--policy")
    parser.add_argument("--speed", type=float, action="append")
    parser.add_argument("--rows", type=int, action="append", help="texts answered at a time; 128 and 1,000")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output")
    given = parser.parse_args(arguments)
    quiet_libraries()
    classifier = AdaptiveClassifier.from_pretrained(
        given.model, speed=0.0, policy=given.policy, threads=given.threads
    )
    task, split, _ = load_evaluation_task(given.data, given.model, classifier, None)
    rows = []
    for count in given.rows or [128, 1000]:
        texts = task_texts(limit_rows(task, {split: count}, 0), split)
        for speed in given.speed or [0.0]:
            ways = {budget: partial(answer, classifier, texts, speed, budget) for budget in BUDGETS}
            timings = interleave({str(budget): way for budget, way in ways.items()}, repeats=given.repeats)
            for budget, timing in timings.items():
                against = ratio(timings[str(BUDGETS[-1])], timing)
                rate = timing.per_second(len(texts)).median
                rows.append(
                    {
                        "rows": len(texts),
                        "speed": speed,
                        "batch_tokens": int(budget),
                        "texts_per_second": rate,
                        "ratio_to_largest": against.median,
                        "ratio_quartiles": [against.lower, against.upper],
                    }
                )
                print(
                    f"{len(texts)} texts, speed {speed:g}, {budget:>5} tokens a batch: {rate:8.1f} texts/s, "
                    f"{against.median:.2f} times as many as with {BUDGETS[-1]}"
                )
    results = {
        "machine": machine_description() | {"threads": given.threads},
        "model": given.model,
        "data": task.name,
        "results": rows,
    }
    if given.output:
        write_json(given.output, results)
    return results


def answer(classifier: AdaptiveClassifier, texts: Sequence[Any], speed: float, budget: int) -> None:
    """Answers texts under a token budget."""
    classifier.batch_tokens = budget
    classifier.predict(texts, speed=speed)


if __name__ == "__main__":
    main()
