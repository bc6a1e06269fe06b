"""Students of one teacher under one budget: every method, several seeds, one JSON.

All rows start from the same student, read the same train rows for the same number of epochs and steps, and share
one cache of the teacher's outputs. Methods of two stages divide the epochs between them. Runs are run directories
and go on where they stopped.

python benchmarks/student_study.py --teacher runs/stsb-teacher --data DATA/glue_stsb --task stsb \
    --student runs/general-4x312 --output runs/stsb-students --seeds 1,2 --json docs/results/students-stsb.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alembert.benchmarks.timing import machine_description
from alembert.cli.options import limit_rows, quiet_libraries
from alembert.common.files import read_json, write_json
from alembert.data import compute_metrics, load_task
from alembert.data.metrics import bootstrap_interval
from alembert.methods.distillation import distill
from alembert.models.features import FeatureRequest
from alembert.models.layered import LayeredEncoder
from alembert.models.loading import classifier_facts, load_classifier, load_tokenizer
from alembert.models.students import describe_student
from alembert.training.runner import predict_logits, tokenised
from alembert.training.teacher_cache import TeacherCache

INTERMEDIATE = 0.6  # share of the epochs that goes to a stage before the predictions
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "labels alone": ("kd", {"hard_weight": 1.0}),
    "kd": ("kd", {}),
    "distilbert": ("distilbert", {"project": True}),
    "pkd": ("pkd", {"project": True}),
    "tinybert": ("tinybert", {}),
    "bert-emd": ("bert-emd", {}),
    "bert-emd, beta 1": ("bert-emd", {"beta": 1.0}),
    "lrc-bert": ("lrc-bert", {}),
    "minilm-v2": ("minilm-v2", {}),
    "tinybert, augmented": ("tinybert", {}),
    "labels alone, no general stage": ("kd", {"hard_weight": 1.0}),
    "tinybert, no general stage": ("tinybert", {}),
}
"""Method and options by row. Any of them with ", slower" behind it has a third of the learning rate."""
SLOWER = ", slower"


def main(command_line: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--task", help="a GLUE task's preset")
    parser.add_argument("--student", required=True, help="a general-distilled checkpoint, or a shape")
    parser.add_argument("--shape", default="4x312", help="of the rows without a general stage")
    parser.add_argument("--initialise", help="random, embeddings or layers, where --student is a shape")
    parser.add_argument("--augmented", help="file made by `alembert augment`, for the rows that use it")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument(
        "--rows", help=f"some of the rows, separated by semicolons; {SLOWER!r} may follow each"
    )
    parser.add_argument("--seeds", default="1,2")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--max-train-rows", type=int)
    parser.add_argument("--max-test-rows", type=int)
    arguments = parser.parse_args(command_line)
    quiet_libraries()
    facts = classifier_facts(arguments.teacher)
    task = load_task(
        arguments.data,
        preset=arguments.task,
        problem_type=facts.problem_type,
        label_names=facts.label_names,
        seed=1,
    )
    task = limit_rows(task, {"train": arguments.max_train_rows, "test": arguments.max_test_rows}, 1)
    augmented = None
    if arguments.augmented:
        (augmented,) = load_task(
            arguments.augmented,
            preset=arguments.task,
            problem_type=facts.problem_type,
            label_names=facts.label_names,
            required_splits=(),
        ).splits.values()
    results = read_json(arguments.json) if arguments.json.exists() else {}
    results |= {
        "task": task.name,
        "metric": task.main_metric,
        "rows": {split: data.num_rows for split, data in task.splits.items()},
        "settings": {
            key: getattr(arguments, key)
            for key in ("epochs", "learning_rate", "batch_size", "max_length", "initialise")
        }
        | {
            "teacher": Path(arguments.teacher).name,
            "student": Path(arguments.student).name,
            "student_without_general_stage": arguments.shape,
        },
        "machine": machine_description(),
    }
    results.setdefault("teacher", measure(arguments.teacher, task, arguments.max_length))
    results.setdefault("students", {})
    prepare_cache(arguments, task)
    wanted = arguments.rows.split(";") if arguments.rows else list(ROWS)
    for seed in map(int, arguments.seeds.split(",")):
        for row in wanted:
            if row == "tinybert, augmented" and augmented is None:
                continue
            folder = arguments.output / f"{row.replace(', ', '-').replace(' ', '-')}-{seed}"
            train(row, seed, folder, task, arguments, augmented)
            scores = measure(str(folder), task, arguments.max_length)
            # Several processes may work on one study: what they wrote meanwhile is kept.
            newest = read_json(arguments.json)["students"] if arguments.json.exists() else {}
            newest.setdefault(row, {})[str(seed)] = scores
            results["students"] = newest
            write_json(arguments.json, results)
            print(f"{row}, seed {seed}: {scores}", flush=True)


def prepare_cache(arguments: argparse.Namespace, task: Any) -> None:
    """Everything that any row reads of the teacher, in one pass over the texts instead of one a method."""
    teacher, tokenizer = load_classifier(arguments.teacher), load_tokenizer(arguments.teacher)
    layers = tuple(range(1, LayeredEncoder(teacher).num_layers + 1))
    request = FeatureRequest(
        hidden_states=(0, *layers),
        attention_scores=layers,
        queries=layers[-1:],
        keys=layers[-1:],
        values=layers[-1:],
    )
    train_rows = tokenised(task, "train", tokenizer, arguments.max_length)
    TeacherCache.prepare(arguments.output / "teacher", teacher, train_rows, tokenizer, request)


def train(
    row: str, seed: int, folder: Path, task: Any, arguments: argparse.Namespace, augmented: Any
) -> None:
    method, options = ROWS[row.removesuffix(SLOWER)]
    options, epochs = dict(options), arguments.epochs
    learning_rate = arguments.learning_rate / 3 if row.endswith(SLOWER) else arguments.learning_rate
    student = arguments.shape if "no general" in row else arguments.student
    if arguments.initialise and student == arguments.student:
        options["initialise"] = arguments.initialise
    uses_augmented = augmented is not None and row == "tinybert, augmented"
    if uses_augmented:
        epochs *= task.dataset("train").num_rows / len(augmented)
    if method in ("tinybert", "minilm-v2"):
        options |= {
            "intermediate_epochs": epochs * INTERMEDIATE,
            "intermediate_learning_rate": arguments.learning_rate,
        }
        epochs *= 1 - INTERMEDIATE
    distill(
        method,
        arguments.teacher,
        task,
        folder,
        student=student,
        options=options,
        settings={
            "epochs": epochs,
            "learning_rate": learning_rate,
            "batch_size": arguments.batch_size,
            "max_length": arguments.max_length,
            "seed": seed,
        },
        augmented=augmented if uses_augmented else None,
        teacher_cache=arguments.output / ("teacher-augmented" if uses_augmented else "teacher"),
    )


def measure(run: str, task: Any, max_length: int) -> dict[str, Any]:
    """Metrics on dev and test with the main one's 95% bootstrap interval, and the model's size."""
    model, tokenizer = load_classifier(run), load_tokenizer(run)
    scores: dict[str, Any] = {"size": describe_student(model)}
    for split in ("dev", "test"):
        if split in task.splits:
            logits, labels = predict_logits(
                model, tokenised(task, split, tokenizer, max_length), tokenizer, split
            )
            assert labels is not None
            last = np.asarray(logits[:, -1])
            scores[split] = compute_metrics(task.problem_type, task.metrics, last, labels)
            interval = bootstrap_interval(task.problem_type, task.main_metric, last, labels)
            scores[split]["interval"] = [float(bound) for bound in interval]
    return scores


if __name__ == "__main__":
    main()
