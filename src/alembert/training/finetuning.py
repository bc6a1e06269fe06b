"""Stage A of every method: a pretrained encoder becomes a classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, set_seed

from alembert.data.metrics import compute_metrics, majority_score
from alembert.data.task import Task
from alembert.models.loading import (
    check_max_length,
    load_classifier,
    load_encoder,
    load_tokenizer,
    weights_fingerprint,
)
from alembert.models.multi_exit import STOCK_HEAD
from alembert.training.model_card import model_card
from alembert.training.objective import TaskObjective
from alembert.training.processes import process_state
from alembert.training.run_directory import RunDirectory, check_sources
from alembert.training.runner import predict_logits, run_stages, tokenised
from alembert.training.settings import TrainingSettings, validated
from alembert.training.stage import Stage


def finetune(
    model: str,
    task: Task,
    output_dir: str | Path,
    *,
    head: str = STOCK_HEAD,
    settings: dict[str, Any] | TrainingSettings | None = None,
    overwrite: bool = False,
    resume: bool = True,
    report_to: list[str] | None = None,
    stop_at: float | None = None,
) -> PreTrainedModel:
    """Fine-tunes an encoder on a task's labels and leaves a run directory.

    Args:
        model: folder or hub id of a pretrained encoder.
        task: from `alembert.load_task`, with a train split.
        output_dir: the run directory; an interrupted run of the same configuration is gone on with.
        head: "stock" keeps the family's own head, so that plain transformers loads the result; an exit head
            kind ("fastbert", "pooled", "linear", "mean") puts that head after the last layer.
        settings: duration and optimiser; None, or fields of `TrainingSettings` over its defaults, keeps the best of
            three epochs.
        overwrite: replace whatever the folder holds.
        resume: go on with an interrupted run; when off, an occupied folder is refused.
        report_to: trackers such as "tensorboard".
        stop_at: `time.monotonic()` after which the training stops with the weights that it has; no part of what a
            run remembers.

    Returns the classifier in evaluation mode. Raises InputError for unreadable models and occupied folders.

    Examples:
        >>> import alembert
        >>> task = alembert.load_task("topics/")
        >>> settings = alembert.TrainingSettings(epochs=1, learning_rate=1e-3, max_length=32)
        >>> teacher = alembert.finetune("encoder/", task, "runs/first", settings=settings)
        >>> teacher.config.id2label
        {0: 'food', 1: 'sport', 2: 'weather'}
    """
    if not isinstance(settings, TrainingSettings):
        fields = {"evaluate_every_epoch": True} | (settings or {})
        settings = validated(TrainingSettings, fields, "training setting")
    check_sources(output_dir, model)
    state = process_state()
    configuration: dict[str, Any] = {
        "command": "finetune",
        "model": str(model),
        "model_files": weights_fingerprint(str(model)),
        "head": head,
        "task": task.describe(),
        "settings": settings.model_dump(),
        "autocast": settings.autocast_dtype(),
    }
    tokenizer = load_tokenizer(str(model))
    set_seed(settings.seed)
    classifier = load_encoder(
        str(model), label_names=task.label_names, problem_type=task.problem_type, head=head
    )
    check_max_length(settings.max_length, classifier, tokenizer)
    with state.main_process_first():
        run = RunDirectory(
            output_dir, configuration, overwrite=overwrite, resume=resume, main_process=state.is_main_process
        )
    if run.finished:
        return load_classifier(str(run.path))
    stage = Stage("finetune", TaskObjective(task.problem_type), settings)
    with run.released_on_error():
        histories = run_stages(classifier, [stage], task, tokenizer, run, report_to, stop_at)
        classifier.eval()
        metrics: dict[str, Any] = {"majority_baseline": majority_score(task)}
        for split in ("dev", "test"):
            if split in task.splits:
                # In every process: the others wait for the first to tokenise.
                dataset = tokenised(task, split, tokenizer, settings.max_length)
                if state.is_main_process:
                    logits, labels = predict_logits(classifier, dataset, tokenizer, f"measuring {split}")
                    assert labels is not None
                    metrics[split] = compute_metrics(task.problem_type, task.metrics, logits[:, -1], labels)
        if state.is_main_process:
            run.finish(classifier, tokenizer, metrics, histories, model_card(configuration, metrics))
        state.wait_for_everyone()
    return classifier
