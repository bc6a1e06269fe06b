"""What `alembert compress` trains, and how long that takes on this machine."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alembert.benchmarks.evaluation import task_texts
from alembert.common.errors import InputError
from alembert.compression.durations import format_duration
from alembert.data.task import Task
from alembert.methods.student_distillation import full_model
from alembert.models.layered import LayeredEncoder
from alembert.training.attention_kernel import attention_for_learning
from alembert.training.settings import TrainingSettings
from alembert.training.stage_model import encoder_parameters

logger = logging.getLogger("alembert")
TEACHER = "teacher"
BATCH_SIZE = 32
_PROBES = 5
_EVALUATION_SPLIT_READS = 4.5
"""Reads of dev and of test, in passes of the teacher in fp32: by the teacher, by every candidate, for the page."""
_SECONDS_TO_EXPORT = 25.0
_SECONDS_TO_START = 40.0
"""Of a benchmark: processes that load their libraries and models."""
_TIMED_TEXTS = 256 * 4 * 3
_SHORTEST_SHARE = 0.34
"""Of a recipe's epochs: with less time than that, fewer models are trained instead."""


@dataclass(frozen=True)
class Recipe:
    """A model worth trying.

    Attributes:
        name: of its folder.
        method: a distillation method; the teacher of the work teaches it.
        cost: of a training step, in training steps of the teacher.
        epochs: passes over the train split, if time allows.
        learning_rate: peak, for models as wide as BERT.
        depth: layers of a student as a share of the teacher's; None = no student of its own.
        options: of the method.
        exits: whether it has exits.
    """

    name: str
    method: str
    cost: float
    epochs: float
    learning_rate: float
    depth: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    exits: bool = False


_EVERY = "every_k"
_EXITS = {"exit_head": "mean", "exit_epochs": 1.0, "placement": _EVERY}
RECIPES = (
    Recipe("exits", "pabee", 1.3, 4, 4e-5, options=_EXITS, exits=True),
    Recipe("student-exits", "alembert", 0.9, 6, 5e-5, options={"exit_epochs": 1.0}, exits=True),
    Recipe("student", "lrc-bert", 1.5, 6, 1e-4, depth=0.5, options={"initialise": "layers"}),
)
"""In the order in which they are run; when time is short the last ones are left out first."""
FINETUNING_EPOCHS, _FINETUNING_RATE, _HEAD_RATE = 4.0, 5e-5, 1e-3
_NARROW = 512
"""Below this width models of the whole encoder take twice the learning rate."""
_FINETUNING_SHARE = 0.4
"""Of the budget."""
_LEAST_EPOCHS = 0.1
"""Of a fine-tuning: with fewer a budget is refused."""
_SHALLOW = 6
"""Up to so many layers the teacher has an exit after each; a deeper one after every second."""


@dataclass(frozen=True)
class PlannedTraining:
    """One training.

    Attributes:
        name: of its folder.
        method: "finetune", or a distillation method.
        student: shape of a student, or None.
        options: of the method.
        settings: fields of `TrainingSettings`.
        seconds: how long it should take.
    """

    name: str
    method: str
    student: str | None
    options: dict[str, Any]
    settings: dict[str, Any]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """A JSON value that `PlannedTraining(**value)` reads."""
        return asdict(self)


@dataclass(frozen=True)
class Pace:
    """What this machine does with the teacher.

    Attributes:
        training_step: seconds of a forward and a backward pass of `BATCH_SIZE` texts, and of the optimiser.
        evaluated_row: seconds of a forward pass in fp32, per text.
    """

    training_step: float
    evaluated_row: float


def measure_pace(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, max_length: int, seed: int
) -> Pace:
    """Times a few batches of the train split, drawn by seed and grouped by length, after one that warms up."""
    texts = task_texts(task, "train")
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        texts[int(row)] for row in torch.randint(len(texts), (BATCH_SIZE * _PROBES,), generator=generator)
    ]
    drawn.sort(key=lambda text: len(text) if isinstance(text, str) else sum(map(len, text)))
    batches = [drawn[start : start + BATCH_SIZE] for start in range(0, len(drawn), BATCH_SIZE)]
    autocast = TrainingSettings().autocast_dtype() == "bf16"
    training, evaluation = [], []
    device = next(model.parameters()).device
    # At this rate weights stay what they are.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    for rows in [batches[-1], *batches]:
        firsts, seconds = zip(*rows, strict=True) if task.is_pair else (rows, None)
        batch = tokenizer(
            list(firsts),
            None if seconds is None else list(seconds),
            truncation=True,
            max_length=max_length,
            padding=True,
            return_tensors="pt",
        ).to(device)
        # Without dropout another kernel would run, whose pace is not that of a training.
        model.train()
        started = _now(device)
        with (
            torch.autocast(device.type, torch.bfloat16, enabled=autocast),
            attention_for_learning(encoder_parameters(model), batch["input_ids"].shape[1]),
        ):
            model(**batch).logits.float().sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        training.append(_now(device) - started)
        model.eval()
        started = _now(device)
        with torch.inference_mode():
            model(**batch)
        evaluation.append((_now(device) - started) / BATCH_SIZE)
    return Pace(statistics.mean(training[1:]), statistics.mean(evaluation[1:]))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def make_plan(
    model: PreTrainedModel,
    task: Task,
    pace: Pace,
    *,
    needs_finetuning: bool,
    max_length: int,
    seconds: float | None,
    seed: int,
    recipes: Sequence[Recipe] = RECIPES,
) -> list[PlannedTraining]:
    """The trainings worth having, in order, each with all the epochs that are wanted; `fitted` cuts them to the time.

    Fine-tuning, where it is needed, is cut here: it gets two fifths of the time at most. InputError where that is next
    to nothing.

    Args:
        model: the teacher, or the encoder that becomes it.
        task: with a train and a dev split.
        pace: of the teacher on this machine.
        needs_finetuning: whether the teacher has to be trained first.
        max_length: in tokens, for all.
        seconds: for all trainings, or None.
        seed: of every training.
        recipes: what to try.
    """
    # Of a teacher whose head is an exit's, the encoder within.
    model = full_model(model)
    settings = {"batch_size": BATCH_SIZE, "max_length": max_length, "seed": seed}
    steps = -(-task.dataset("train").num_rows // BATCH_SIZE)
    factor = 2 if model.config.hidden_size < _NARROW else 1
    first = []
    if needs_finetuning:
        rates = {
            "epochs": FINETUNING_EPOCHS,
            "learning_rate": factor * _FINETUNING_RATE,
            "head_learning_rate": _HEAD_RATE,
        }
        whole = steps * FINETUNING_EPOCHS * pace.training_step
        first = [PlannedTraining(TEACHER, "finetune", None, {}, settings | rates, whole)]
        if seconds is not None:
            first = [_cut(first[0], min(1.0, _FINETUNING_SHARE * max(0.0, seconds) / whole))]
            if first[0].settings["epochs"] < _LEAST_EPOCHS:
                least = _LEAST_EPOCHS / FINETUNING_EPOCHS * whole / _FINETUNING_SHARE
                raise InputError(
                    f"the budget leaves {format_duration(max(0.0, seconds))} to train {task.name}, and that takes "
                    f"{format_duration(least)} at the least: give {format_duration(least - min(0.0, seconds) + 60)} "
                    "more, or a fine-tuned model"
                )
    layers = LayeredEncoder(model).num_layers
    between_exits = 1 if layers <= _SHALLOW else 2
    wanted = [
        PlannedTraining(
            recipe.name,
            recipe.method,
            None
            if recipe.depth is None
            else f"{max(1, round(recipe.depth * layers))}x{model.config.hidden_size}",
            recipe.options | ({"k": between_exits} if recipe.options.get("placement") == _EVERY else {}),
            settings | {"epochs": recipe.epochs, "learning_rate": factor * recipe.learning_rate},
            steps * recipe.epochs * recipe.cost * pace.training_step,
        )
        for recipe in recipes
    ]
    return [*first, *wanted]


def fitted(trainings: Sequence[PlannedTraining], seconds: float | None) -> list[PlannedTraining]:
    """What fits in so many seconds: epochs are cut alike for all.

    When that would leave too little of each, the last ones are left out instead.
    """
    chosen = list(trainings)
    while chosen and seconds is not None:
        share = min(1.0, seconds / sum(training.seconds for training in chosen))
        if share >= _SHORTEST_SHARE:
            return [_cut(training, share) for training in chosen]
        chosen.pop()
    return chosen


def reserve(task: Task, pace: Pace, models: int) -> float:
    """Seconds to export, calibrate and benchmark so many models beside the teacher."""
    rows = sum(int(task.dataset(split).num_rows) for split in ("dev", "test") if split in task.splits)
    reads = rows * _EVALUATION_SPLIT_READS + _TIMED_TEXTS
    return reads * pace.evaluated_row + _SECONDS_TO_START + _SECONDS_TO_EXPORT * (models + 1)


def measuring(task: Task, pace: Pace) -> float:
    """Seconds in which a training measures itself at its end, beside its teacher: dev and test, twice."""
    rows = sum(int(task.dataset(split).num_rows) for split in ("dev", "test") if split in task.splits)
    return 2 * rows * pace.evaluated_row


def announce_plan(plan: Sequence[PlannedTraining], seconds_after: float, seconds: float | None) -> None:
    """Logs what will be trained and how long all of it takes.

    Args:
        plan: what is to be trained.
        seconds_after: for what follows the trainings.
        seconds: left of the budget, or None.
    """
    first = [training for training in plan if training.name == TEACHER]
    others = plan[len(first) :]
    before = sum(training.seconds for training in first)
    chosen = [*first, *fitted(others, None if seconds is None else seconds - seconds_after - before)]
    for training in chosen:
        what = training.method if training.student is None else f"{training.method}, {training.student}"
        logger.info(
            "%s (%s): %s epochs, about %s",
            training.name, what, training.settings["epochs"], format_duration(training.seconds),
        )  # fmt: skip
    for training in plan[len(chosen) :]:
        logger.info("%s: only if the others take less time than expected", training.name)
    seconds = None if seconds is None else max(0.0, seconds)
    needed = sum(training.seconds for training in chosen) + seconds_after
    allowed = "" if seconds is None else f" of {format_duration(seconds)}"
    logger.info("All of it takes about %s%s.", format_duration(needed), allowed)
    if seconds is not None and needed > 1.02 * seconds:
        logger.warning(
            "The budget is too short: %s are left, and to %s takes about %s at the least.",
            format_duration(seconds), "export and measure the teacher alone" if not chosen else "do the shortest plan",
            format_duration(needed),
        )  # fmt: skip


def _cut(training: PlannedTraining, share: float) -> PlannedTraining:
    seconds = training.seconds * share
    changed = {"epochs": round(training.settings["epochs"] * share, 2)}
    options = {
        name: round(value * share, 2) if name == "exit_epochs" else value
        for name, value in training.options.items()
    }
    return replace(training, options=options, settings=training.settings | changed, seconds=seconds)
