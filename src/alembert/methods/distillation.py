"""Runs a method from teacher and task to a finished run directory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, set_seed

from alembert.common.errors import InputError
from alembert.data.corpus import load_corpus
from alembert.data.metrics import compute_metrics, majority_score
from alembert.data.task import Task, rows_sha256
from alembert.data.validation import check_same_labels
from alembert.methods.base import Method, Sources, resolve
from alembert.methods.registry import find_method
from alembert.methods.student_distillation import StudentDistillation, StudentOptions
from alembert.models.loading import (
    check_max_length,
    classifier_facts,
    load_any,
    load_bare_encoder,
    load_classifier,
    load_masked_lm,
    load_tokenizer,
    run_configuration,
    weights_fingerprint,
)
from alembert.models.multi_exit import MultiExitModel
from alembert.models.projections import find_projection
from alembert.training.model_card import model_card
from alembert.training.processes import process_state
from alembert.training.run_directory import RunDirectory, check_sources
from alembert.training.runner import predict_logits, run_stages, tokenised
from alembert.training.settings import TrainingSettings

logger = logging.getLogger("alembert")


def distill(
    method: str,
    teacher: str,
    task: Task | None,
    output_dir: str | Path,
    *,
    student: str | None = None,
    preset: str = "default",
    options: dict[str, Any] | None = None,
    settings: dict[str, Any] | TrainingSettings | None = None,
    stages: Sequence[str] | None = None,
    augmented: Dataset | None = None,
    corpus: str | None = None,
    teacher_cache: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = True,
    report_to: list[str] | None = None,
    stop_at: float | None = None,
) -> PreTrainedModel:
    """Distils a teacher by a named method and leaves a run directory.

    Args:
        method: one of `alembert.methods.registry.METHODS`, or several joined by `+`: each takes the one before as
            its teacher, so that `tinybert+ms-bert` gives a small student exits.
        teacher: folder or hub id of a fine-tuned classifier, stock or multi-exit; for stages on plain text of a
            pretrained encoder.
        task: with a train split; its labels must be the teacher's. None for stages on plain text.
        output_dir: the run directory; an interrupted run of the same configuration is gone on with.
        student: for methods that train a student: a shape `LxH`, a configuration file or a checkpoint.
        preset: "default" (our best measured), "paper" or "code".
        options: of the method, over the preset's.
        settings: fields of `TrainingSettings`, over the preset's, as a dict or as one of which the fields count that
            were given; `max_length` is the teacher's where neither says one.
        stages: some of the method's stages.
        augmented: rows with the task's columns, to train on in place of its train split.
        corpus: a file or a folder of plain text, for general stages.
        teacher_cache: folder for the teacher's outputs, computed once for all epochs and all methods.
        overwrite: replace whatever the folder holds.
        resume: go on with an interrupted run; when off, an occupied folder is refused.
        report_to: trackers such as "tensorboard".
        stop_at: `time.monotonic()` after which the training stops with the weights that it has; no part of what a
            run remembers.

    Returns the distilled model in evaluation mode. Raises InputError for unknown names and values, labels that
    the teacher does not know, a teacher no better than the commonest label, students that the method cannot serve,
    and occupied folders.

    Examples:
        >>> import alembert
        >>> task = alembert.load_task("topics/")
        >>> model = alembert.distill("ms-bert", "runs/teacher", task, "runs/second", settings={"epochs": 1})
        >>> model.exit_layers
        (1, 3)
        >>> student = alembert.distill("kd", "runs/teacher", task, "runs/small", student="2x16", settings={"epochs": 1})
        >>> student.config.num_hidden_layers
        2
    """
    named = {"student": student, "stages": None if stages is None else tuple(stages)}
    options = (options or {}) | {name: value for name, value in named.items() if value is not None}
    if isinstance(settings, TrainingSettings):
        settings = settings.model_dump(exclude_unset=True)
    if "+" in method:
        from alembert.methods.combination import distill_in_turn

        return distill_in_turn(
            method.split("+"),
            teacher,
            task,
            Path(output_dir),
            preset=preset,
            options=options,
            settings=settings or {},
            augmented=augmented,
            corpus=corpus,
            teacher_cache=teacher_cache,
            overwrite=overwrite,
            resume=resume,
            report_to=report_to,
            stop_at=stop_at,
        )
    method_class = find_method(method)
    check_teacher_cache(method_class, teacher_cache)
    check_student(method_class, student)
    method_options, training = resolve(method_class, preset, options, settings or {})
    trained = run_configuration(teacher).get("settings", {})
    if "max_length" in trained and "max_length" not in training.model_fields_set:
        training = training.model_copy(update={"max_length": trained["max_length"]})
    instance = method_class(method_options)
    configuration = {
        "command": "distill",
        "method": method,
        "preset": preset,
        "teacher": str(teacher),
        "teacher_files": weights_fingerprint(str(teacher)),
        "task": None if task is None else task.describe(),
        "options": method_options.model_dump(mode="json"),
        "settings": training.model_dump(),
        "autocast": training.autocast_dtype(),
    }
    if isinstance(method_options, StudentOptions) and method_options.student is not None:
        configuration["student_files"] = weights_fingerprint(method_options.student)
    general = general_method(instance, has_task=task is not None, has_corpus=corpus is not None)
    if general and (teacher_cache is not None or augmented is not None):
        raise InputError("a stage on plain text has no teacher cache and no augmented rows: leave them out")
    if general and (training.evaluate_every_epoch or training.early_stopping_patience is not None):
        raise InputError("a stage on plain text has no dev split to evaluate: leave evaluate_every_epoch out")
    if process_state().is_main_process:
        instance.warn_of_unused(options or {}, settings or {})
        if "max_length" not in {*trained, *training.model_fields_set} and not general:
            logger.warning(
                "%s does not say how long the texts were that it learned from: texts are cut to %d tokens; "
                "--max-length says otherwise.", teacher, training.max_length,
            )  # fmt: skip
    if augmented is not None and task is not None:
        given = "text_pair" in augmented.column_names
        if given != task.is_pair:
            kinds = ("single texts", "pairs of texts")
            raise InputError(
                f"the augmented rows are {kinds[given]}, the task has {kinds[task.is_pair]}: give rows with the "
                f"columns label, text{' and text_pair' if task.is_pair else ''}"
            )
        configuration["augmented"] = {"rows": len(augmented), "sha256": rows_sha256(augmented)}
    state = process_state()
    teacher_model = (
        load_for_general_stage(str(teacher), general) if general else load_classifier(str(teacher))
    )
    tokenizer = load_tokenizer(str(teacher))
    if task is not None:
        _check_labels(teacher_model, task, str(teacher))
    check_max_length(training.max_length, teacher_model, tokenizer)
    set_seed(training.seed)
    sources = Sources(
        teacher_model,
        tokenizer,
        task,
        augmented,
        corpus,
        None if teacher_cache is None else Path(teacher_cache),
    )
    model = instance.build_model(sources)
    if isinstance(method_options, StudentOptions):
        student_name = f"the student {method_options.student}"
        check_max_length(training.max_length, model, tokenizer, student_name)
    planned = instance.stages(model, sources, training)
    check_sources(output_dir, teacher, getattr(method_options, "student", None))
    if corpus is not None:
        # After what can be refused without the text, which may take hours to read.
        with state.main_process_first():
            configuration["corpus"] = load_corpus(corpus, tokenizer, training.max_length).describe()
    with state.main_process_first():
        run = RunDirectory(
            output_dir, configuration, overwrite=overwrite, resume=resume, main_process=state.is_main_process
        )
    if run.finished:
        if general and general.general_head == "masked_lm":
            return load_masked_lm(str(run.path))
        return load_any(str(run.path))[0]
    metrics: dict[str, Any] = {}
    if task is not None:
        split = "dev" if "dev" in task.splits else "train"
        dataset = tokenised(task, split, tokenizer, training.max_length)
        teacher_score, majority = measure_teacher(
            teacher_model.to(state.device), task, dataset, tokenizer, split
        )
        metrics |= {"teacher": {split: teacher_score}, "majority_baseline": majority}
    with run.released_on_error():
        histories = run_stages(model, planned, task, tokenizer, run, report_to, stop_at)
        instance.finish(model)
        model.eval()
        if task is None:
            metrics |= {"terms": {stage: last_terms(history) for stage, history in histories.items()}}
        for name in ("dev", "test"):
            if task is not None and name in task.splits:
                # In every process: the others wait for the first to tokenise.
                dataset = tokenised(task, name, tokenizer, training.max_length)
                if state.is_main_process:
                    logits, labels = predict_logits(model, dataset, tokenizer, f"measuring {name}")
                    metrics[name] = exit_metrics(model, task, logits, labels)
        if state.is_main_process:
            in_part = isinstance(method_options, StudentOptions) and method_options.stages is not None
            projection = find_projection(planned[-1].objective) if in_part else None
            run.finish(model, tokenizer, metrics, histories, model_card(configuration, metrics), projection)
        state.wait_for_everyone()
    return model


def check_student(method: type[Method[Any]], student: str | None) -> None:
    """Raises InputError when a student is named for a method that makes its model of the teacher."""
    options = method.options_class.model_fields
    if student is not None and "student" not in options:
        depth = " (its depth is --set depth=…)" if "depth" in options else ""
        raise InputError(
            f"method {method.name} makes its model of the teacher{depth} and takes no --student {student}: leave it "
            f"out, or train the student first, as --method tinybert+{method.name} does"
        )


def check_teacher_cache(method: type[Method[Any]], teacher_cache: str | Path | None) -> None:
    """Raises InputError for a cache where no teacher runs beside the model that learns."""
    if teacher_cache is not None and not method.separate_teacher:
        raise InputError(
            f"method {method.name} has no separate teacher whose outputs could be kept in {teacher_cache}: leave "
            "--teacher-cache out"
        )


def general_method(
    method: Method[Any], *, has_task: bool, has_corpus: bool
) -> StudentDistillation[Any] | None:
    """The method where its chosen stages read plain text, else None.

    Raises InputError when what they read is missing, or something else is there too.
    """
    general = method if isinstance(method, StudentDistillation) and method.is_general() else None
    if (has_task, has_corpus) != (general is None, general is not None):
        raise InputError(_missing_data(type(method), general is not None))
    return general


def load_for_general_stage(source: str, method: StudentDistillation[Any]) -> PreTrainedModel:
    """The pretrained teacher of a stage on plain text, with the head that the method's general stage needs."""
    if method.general_head == "masked_lm":
        return load_masked_lm(source)
    return load_bare_encoder(source)


def last_terms(history: dict[str, Any]) -> dict[str, float]:
    """The loss and its terms as last logged."""
    entries = [entry for entry in history["log_history"] if "loss" in entry]
    last = entries[-1] if entries else {}
    return {name: value for name, value in last.items() if name == "loss" or name.startswith("terms/")}


def _missing_data(method: type[Method[Any]], general: bool) -> str:
    if general:
        return (
            f"the stage {', '.join(method.general_stages)} of {method.name} reads plain text: pass --corpus, and "
            "no --data"
        )
    if not method.general_stages:
        return f"method {method.name} needs a task: pass --data, and no --corpus"
    return (
        "the stages on the task need --data and take no --corpus; for the stage on plain text pass "
        f"--stages {method.general_stages[0]} --corpus and no --data"
    )


def measure_teacher(
    teacher: PreTrainedModel, task: Task, dataset: Any, tokenizer: Any, split: str
) -> tuple[dict[str, float], float]:
    """The teacher's metrics on a split, and the main metric of always answering the commonest label.

    Raises InputError when the teacher is no better than that: nothing can be learned from it.
    """
    logits, labels = predict_logits(teacher, dataset, tokenizer, "measuring the teacher")
    assert labels is not None
    score = compute_metrics(task.problem_type, task.metrics, logits[:, -1], labels)
    return score, check_teacher_score(task, score[task.main_metric], split)


def check_teacher_score(task: Task, score: float, split: str) -> float:
    """The main metric of always answering the commonest label; InputError when the teacher's is no better."""
    majority = majority_score(task)
    if not score > majority:
        raise InputError(
            f"the teacher's {task.main_metric} on {split} is {score:.4f}, no better than always "
            f"giving the commonest answer ({majority:.4f}): there is nothing to learn from it. Is it fine-tuned on "
            "this task, with the same labels? Fine-tune it first (alembert finetune)."
        )
    return majority


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
    check_same_labels(classifier_facts(teacher).label_names, task, source)
