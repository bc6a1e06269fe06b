"""Runs a method from teacher and task to a finished run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import PreTrainedModel, set_seed

from alembert.common.errors import InputError
from alembert.data.metrics import compute_metrics, majority_score
from alembert.data.task import Task
from alembert.methods.base import resolve
from alembert.methods.registry import find_method
from alembert.models.loading import (
    check_max_length,
    classifier_facts,
    load_classifier,
    load_tokenizer,
    run_configuration,
    weights_fingerprint,
)
from alembert.models.multi_exit import MultiExitModel
from alembert.training.model_card import model_card
from alembert.training.run_directory import RunDirectory
from alembert.training.runner import predict_logits, run_stages, tokenised


def distill(
    method: str,
    teacher: str,
    task: Task,
    output_dir: str | Path,
    *,
    preset: str = "default",
    options: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    overwrite: bool = False,
    resume: bool = True,
    report_to: list[str] | None = None,
) -> PreTrainedModel:
    """Distils a teacher by a named method and leaves a run directory.

    Args:
        method: one of `alembert.methods.registry.METHODS`.
        teacher: folder or hub id of a fine-tuned classifier, stock or multi-exit.
        task: with a train split; its labels must be the teacher's.
        output_dir: the run directory; an interrupted run of the same configuration is gone on with.
        preset: "default" (our best measured), "paper" or "code".
        options: of the method, over the preset's.
        settings: fields of `TrainingSettings`, over the preset's; `max_length` is the teacher's unless given.
        overwrite: replace whatever the folder holds.
        resume: go on with an interrupted run; when off, an occupied folder is refused.
        report_to: trackers such as "tensorboard".

    Returns the distilled model in evaluation mode. Raises InputError for unknown names and values, labels that
    the teacher does not know, a teacher no better than the commonest label, and occupied folders.

    Example:
        >>> import alembert
        >>> task = alembert.load_task("topics/")
        >>> model = alembert.distill("ms-bert", "runs/teacher", task, "runs/second", settings={"epochs": 1})
        >>> model.exit_layers
        (1, 3)
    """
    method_class = find_method(method)
    trained = run_configuration(teacher).get("settings", {})
    as_trained = {"max_length": trained["max_length"]} if "max_length" in trained else {}
    method_options, training = resolve(method_class, preset, options or {}, as_trained | (settings or {}))
    state = PartialState(cpu=not torch.cuda.is_available())
    configuration = {
        "command": "distill",
        "method": method,
        "preset": preset,
        "teacher": str(teacher),
        "teacher_files": weights_fingerprint(str(teacher)),
        "task": task.describe(),
        "options": method_options.model_dump(mode="json"),
        "settings": training.model_dump(),
        "autocast": training.autocast_dtype(),
    }
    teacher_model, tokenizer = load_classifier(str(teacher)), load_tokenizer(str(teacher))
    _check_labels(teacher_model, task, str(teacher))
    check_max_length(training.max_length, teacher_model, tokenizer)
    set_seed(training.seed)
    instance = method_class(method_options)
    model = instance.build_model(teacher_model, task)
    with state.main_process_first():
        run = RunDirectory(
            output_dir, configuration, overwrite=overwrite, resume=resume, main_process=state.is_main_process
        )
    if run.finished:
        return load_classifier(str(run.path))
    split = "dev" if "dev" in task.splits else "train"
    dataset = tokenised(task, split, tokenizer, training.max_length)
    teacher_score, majority = measure_teacher(teacher_model.to(state.device), task, dataset, tokenizer, split)
    histories = run_stages(model, instance.stages(model, task, training), task, tokenizer, run, report_to)
    instance.finish(model)
    model.eval()
    metrics: dict[str, Any] = {"teacher": {split: teacher_score}, "majority_baseline": majority}
    for name in ("dev", "test"):
        if name in task.splits:
            # In every process: the others wait for the first to tokenise.
            dataset = tokenised(task, name, tokenizer, training.max_length)
            if state.is_main_process:
                logits, labels = predict_logits(model, dataset, tokenizer, f"measuring {name}")
                metrics[name] = exit_metrics(model, task, logits, labels)
    if state.is_main_process:
        run.finish(model, tokenizer, metrics, histories, model_card(configuration, metrics))
    state.wait_for_everyone()
    return model


def measure_teacher(
    teacher: PreTrainedModel, task: Task, dataset: Any, tokenizer: Any, split: str
) -> tuple[dict[str, float], float]:
    """The teacher's metrics on a split, and the main metric of always answering the commonest label.

    Raises InputError when the teacher is no better than that: nothing can be learned from it.
    """
    logits, labels = predict_logits(teacher, dataset, tokenizer, "measuring the teacher")
    assert labels is not None
    score = compute_metrics(task.problem_type, task.metrics, logits[:, -1], labels)
    majority = majority_score(task)
    if not score[task.main_metric] > majority:
        raise InputError(
            f"the teacher's {task.main_metric} on {split} is {score[task.main_metric]:.4f}, no better than always "
            f"giving the commonest answer ({majority:.4f}): there is nothing to learn from it. Is it fine-tuned on "
            "this task, with the same labels? Fine-tune it first (alembert finetune)."
        )
    return score, majority


def exit_metrics(
    model: PreTrainedModel, task: Task, logits: np.ndarray, labels: np.ndarray | None
) -> dict[str, dict[str, float]]:
    """The task's metrics after every exit, by layer, from logits (rows, exits, labels)."""
    assert labels is not None
    layers = [*model.exit_layers, model.num_layers] if isinstance(model, MultiExitModel) else ["full"]
    return {
        str(layer): compute_metrics(task.problem_type, task.metrics, logits[:, index], labels)
        for index, layer in enumerate(layers)
    }


def _check_labels(teacher: PreTrainedModel, task: Task, source: str) -> None:
    if teacher.config.problem_type != task.problem_type:
        raise InputError(
            f"{source} was trained for {teacher.config.problem_type}, the data is {task.problem_type}: "
            "pass --problem-type or choose another teacher"
        )
    names = classifier_facts(teacher).label_names
    if names != task.label_names:
        raise InputError(
            f"{source} knows the labels {_sample(names)}, the data has {_sample(task.label_names)}: they must be the "
            "same, in the same order"
        )


def _sample(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
