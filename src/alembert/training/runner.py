"""Runs stages one after another in a run directory, from wherever an earlier attempt got to."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerState,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from alembert.common.errors import InputError
from alembert.common.files import finite
from alembert.common.progress import progress_bar
from alembert.data.corpus import load_corpus
from alembert.data.metrics import compute_metrics
from alembert.data.task import Task
from alembert.data.tokenisation import tokenise
from alembert.training.checkpoints import is_last, last_complete_checkpoint
from alembert.training.progress import TrainingProgress
from alembert.training.run_directory import RunDirectory
from alembert.training.stage import Stage
from alembert.training.stage_model import all_logits
from alembert.training.teacher_cache import TeacherCache
from alembert.training.teachers import Teacher
from alembert.training.trainer import (
    MODEL_INPUTS,
    ROW,
    DistillationTrainer,
    check_rate_of_heads,
    training_arguments,
    without_aliases,
)


def run_stages(
    model: PreTrainedModel,
    stages: Sequence[Stage],
    task: Task | None,
    tokenizer: PreTrainedTokenizerBase,
    run: RunDirectory,
    report_to: list[str] | None = None,
    stop_at: float | None = None,
) -> dict[str, Any]:
    """Trains `model` in place through all stages and returns each stage's log history by name.

    A stage with complete checkpoints goes on from the newest; the end of a stage is itself a checkpoint, so a
    finished stage costs only its loading. Without a task every stage must bring a corpus, and nothing is measured.
    Once `time.monotonic()` has passed `stop_at`, or the stages have taken `max_minutes`, the stage that runs stops
    with the weights that it has, and each that follows after one step.
    Numbers of the log that are not finite become None. Raises InputError, before anything is written, when a stage
    cannot run, and when a training diverges.
    """
    for stage in stages:
        stage_data(stage, task, tokenizer)
        if task is not None and "dev" in task.splits:
            tokenised(task, "dev", tokenizer, stage.settings.max_length)
        training_arguments(stage, run.checkpoints(stage.name), False, report_to)
        check_rate_of_heads(stage, model)
    run.begin()
    with run.released_on_error():
        return _run_begun(model, stages, task, tokenizer, run, report_to, stop_at)


def _run_begun(
    model: PreTrainedModel,
    stages: Sequence[Stage],
    task: Task | None,
    tokenizer: PreTrainedTokenizerBase,
    run: RunDirectory,
    report_to: list[str] | None,
    stop_at: float | None,
) -> dict[str, Any]:
    limits = [60 * stage.settings.max_minutes for stage in stages if stage.settings.max_minutes is not None]
    ends = [time.monotonic() + limit for limit in limits] + ([] if stop_at is None else [stop_at])
    histories: dict[str, Any] = {}
    for stage in stages:
        set_seed(stage.settings.seed)
        train, shards = stage_data(stage, task, tokenizer)
        measured = task if task is not None and "dev" in task.splits and stage.corpus is None else None
        dev = None if measured is None else tokenised(measured, "dev", tokenizer, stage.settings.max_length)
        teacher = _cached_teacher(stage, train, tokenizer)
        folder = run.checkpoints(stage.name)
        progress = TrainingProgress(stage.name)
        trainer = DistillationTrainer(
            model,
            stage,
            train if teacher is None else train.add_column(ROW, np.arange(len(train))),
            dev,
            tokenizer,
            folder,
            score=None if measured is None else partial(mean_exit_score, measured),
            callbacks=[progress],
            report_to=report_to,
            teacher=teacher,
            shards=shards,
            stop_at=min(ends, default=None),
        )
        checkpoint = last_complete_checkpoint(folder) if PartialState().is_main_process else None
        PartialState().wait_for_everyone()
        checkpoint = checkpoint or last_complete_checkpoint(folder)
        if checkpoint is not None and is_last(checkpoint):
            state = _restore(trainer, checkpoint)
        else:
            try:
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            finally:
                progress.bar.stop()
            state = trainer.state
        _check_finite(all(bool(weights.isfinite().all()) for weights in model.parameters()), "weights")
        histories[stage.name] = finite(
            {
                "log_history": state.log_history,
                "best_metric": state.best_metric,
                "global_step": state.global_step,
            }
        )
    return histories


def _restore(trainer: DistillationTrainer, checkpoint: Path) -> TrainerState:
    """Gives the weights that a stage ended with, of which `checkpoint` is the last, to its student and objective.

    transformers would train on: resumed, it forgets that a training was stopped.
    """
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    kept = checkpoint.with_name(Path(state.best_model_checkpoint or checkpoint).name)
    saved = load_file(kept / SAFE_WEIGHTS_NAME)
    # Not strict: a tensor with two names is saved under one.
    _, unexpected = trainer.model.load_state_dict(saved, strict=False)
    missing = without_aliases(trainer.model.state_dict()).keys() - saved.keys()
    if missing or unexpected:
        raise InputError(
            f"{kept}: is a checkpoint of another model: it lacks {sorted(missing) or 'nothing'} and has "
            f"{sorted(unexpected) or 'nothing'} more: pass --overwrite to begin anew"
        )
    return state


def _check_finite(finite: bool, what: str) -> None:
    if not finite:
        raise InputError(
            f"the model's {what} are not finite numbers: the training diverged; lower the learning rate"
        )


def stage_data(
    stage: Stage, task: Task | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, tuple[int, ...] | None]:
    """A stage's tokenised rows, and the sizes of the shards of a corpus; other processes wait for the first."""
    with PartialState().main_process_first():
        if stage.corpus is not None:
            corpus = load_corpus(stage.corpus, tokenizer, stage.settings.max_length)
            return corpus.dataset, corpus.shard_rows
        if stage.texts is not None:
            return tokenise(stage.texts, tokenizer, stage.settings.max_length), None
        assert task is not None
        return tokenise(task.dataset("train"), tokenizer, stage.settings.max_length), None


def _cached_teacher(stage: Stage, train: Dataset, tokenizer: PreTrainedTokenizerBase) -> Teacher | None:
    request = stage.objective.teacher_request
    if stage.teacher_cache is None or stage.teacher is None or request is None:
        return None
    return TeacherCache.prepare(
        stage.teacher_cache,
        stage.teacher,
        train,
        tokenizer,
        request,
        dtype=stage.settings.teacher_cache_dtype,
    )


def tokenised(task: Task, split: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """A split as token ids, cached on disk; other processes wait for the first to write it."""
    with PartialState().main_process_first():
        return tokenise(task.dataset(split), tokenizer, max_length)


def mean_exit_score(task: Task, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """`score`: the main metric's mean over all exits of logits (rows, exits, labels).

    Raises InputError when these are not finite.
    """
    _check_finite(bool(np.isfinite(logits).all()), "logits")
    scores = [
        compute_metrics(task.problem_type, (task.main_metric,), logits[:, exit_], labels)[task.main_metric]
        for exit_ in range(logits.shape[1])
    ]
    return {"score": float(np.mean(scores))}


def predict_logits(
    model: PreTrainedModel,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    description: str,
    batch_size: int = 32,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Logits (rows, exits, labels) of a tokenised data set in its order, full model last, and its labels.

    Raises InputError when the logits are not finite.
    """
    order = np.argsort(np.asarray(dataset["length"]), kind="stable")
    pad = DataCollatorWithPadding(tokenizer)
    loader = DataLoader(
        dataset.select(order),
        batch_size=batch_size,
        collate_fn=lambda rows: pad(
            [{key: row[key] for key in MODEL_INPUTS if key in row and key != "labels"} for row in rows]
        ),
    )
    was_training, chunks = model.training, []
    model.eval()
    with torch.inference_mode(), progress_bar() as bar:
        for batch in bar.track(loader, description=description, total=len(loader)):
            chunks.append(all_logits(model(**batch.to(model.device))).float().cpu().numpy())
    model.train(was_training)
    logits = np.empty((len(dataset), *chunks[0].shape[1:]), dtype=np.float32)
    logits[order] = np.concatenate(chunks)
    _check_finite(bool(np.isfinite(logits).all()), "logits")
    labels = np.asarray(dataset["labels"]) if "labels" in dataset.column_names else None
    return logits, labels
