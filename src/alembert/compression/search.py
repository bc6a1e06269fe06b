"""Hyper-parameter search: quality against cost, every trial a run directory, the whole of it resumable."""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset

from alembert.common.errors import InputError, install_extra
from alembert.common.files import write_json
from alembert.common.locks import FolderLock
from alembert.compression.measuring import measure
from alembert.compression.search_space import Dimension, parse_space
from alembert.data.task import Task, rows_sha256
from alembert.methods.base import Method, resolve
from alembert.methods.distillation import distill
from alembert.methods.registry import find_method
from alembert.methods.search_spaces import SEARCH_SPACES, student_shapes
from alembert.methods.student_distillation import StudentOptions
from alembert.models.loading import load_config, weights_fingerprint
from alembert.models.multi_exit import MultiExitConfig
from alembert.runtime.policies import check_speed
from alembert.training.settings import TrainingSettings

DATABASE = "search.db"
RESULTS = "search.json"
TRIALS = "trials"
SAMPLERS = ("tpe", "nsga2")
_STUDY = "search"
logger = logging.getLogger("alembert")


def search(
    method: str,
    teacher: str,
    task: Task,
    output_dir: str | Path,
    *,
    trials: int,
    timeout: float | None = None,
    space: Sequence[str] = (),
    sampler: Literal["tpe", "nsga2"] = "tpe",
    speed: float = 0.5,
    student: str | None = None,
    preset: str = "default",
    options: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    stages: Sequence[str] | None = None,
    augmented: Dataset | None = None,
    teacher_cache: str | Path | None = None,
) -> dict[str, Any]:
    """Searches for the method's options that give the best metric on dev for the fewest MACs per text.

    The same call goes on with a search until it has `trials` trials; a trial that was cut off is gone on with first,
    from its newest checkpoint. A trial that the method refuses, or that needs more memory than there is, is recorded
    with its message.

    Args:
        method: one of `alembert.methods.registry.METHODS`.
        teacher: folder or hub id of a fine-tuned classifier.
        task: with train and dev splits.
        output_dir: folder of the search: `search.db`, `search.json` and `trials/NNNN`.
        trials: in all, those refused included.
        timeout: seconds of this call after which no further trial begins; None = no limit.
        space: what to vary, such as `learning_rate=1e-5..5e-4:log`, `temperature=1..10` or `student=4x312|6x384`;
            empty = the method's default space.
        sampler: `tpe` (multi-objective tree-structured Parzen estimator) or `nsga2` (genetic). Seeded by the
            training seed and the trial's number, so that an interruption changes nothing.
        speed: at which models with exits are judged.
        student, preset, options, settings, stages, augmented, teacher_cache: as for `distill`, for all trials.

    Returns what `search.json` holds: "method", "teacher" (with its "metric" and "macs"), "data", "metric", "speed",
    "sampler", "seed", "space", and "trials", each with "number", "state" ("complete" or "failed"), "options",
    "metric", "macs", "flops", "seconds", "run", "pareto" and "message".

    Raises InputError for a space that the method does not have, a folder of something else, of another search or that
    another process works on, and when every trial failed.
    """
    optuna = required_optuna()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("a search runs in one process: start it without a launcher")
    if "+" in method:
        raise InputError(f"a search varies one method: name one of the methods of {method!r}")
    if trials < 1:
        raise InputError(f"--trials {trials}: must be at least 1")
    if sampler not in SAMPLERS:
        raise InputError(f"unknown sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}")
    if "dev" not in task.splits:
        raise InputError("a search compares trials on the dev split, and the data has none")
    check_speed(speed)
    method_class = find_method(method)
    named = {"student": student, "stages": None if stages is None else tuple(stages)}
    fixed = (options or {}) | {name: value for name, value in named.items() if value is not None}
    training = dict(settings or {})
    resolve(method_class, preset, fixed, training)
    texts = list(space) or default_space(method_class, teacher, fixed, training)
    dimensions = parse_space(texts, method_class, preset, fixed, training)
    seed = int(training.get("seed", TrainingSettings.model_fields["seed"].default))
    folder = Path(output_dir)
    database = folder / DATABASE
    if not database.exists() and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and holds no search: choose another --output")
    with FolderLock(folder):
        study = _open_study(
            optuna,
            folder,
            {
                "method": method,
                "preset": preset,
                "teacher": str(teacher),
                "teacher_files": weights_fingerprint(str(teacher)),
                "task": task.describe(),
                "options": json.loads(json.dumps(fixed)),
                "settings": training,
                "space": {dimension.name: dimension.describe() for dimension in dimensions},
                "sampler": sampler,
                "speed": speed,
                "augmented": None if augmented is None else rows_sha256(augmented),
            },
        )
        if "teacher" not in study.user_attrs:
            measured = measure(teacher, task, "dev", 0.0)
            study.set_user_attr("teacher", {"metric": measured["metric"], "macs": measured["macs"]})
        started = time.monotonic()
        state = optuna.trial.TrialState
        while True:
            interrupted = study.get_trials(deepcopy=False, states=(state.RUNNING,))
            if not interrupted and len(study.get_trials(deepcopy=False)) >= trials:
                break
            if timeout is not None and time.monotonic() - started >= timeout:
                logger.info("The time is up: the same command goes on with the search.")
                break
            number = interrupted[0].number if interrupted else len(study.trials)
            study.sampler = _make_sampler(optuna, sampler, seed + number)
            # A trial that was cut off keeps the values that it had.
            trial = optuna.trial.Trial(study, interrupted[0]._trial_id) if interrupted else study.ask()
            values = _suggested(trial, dimensions)
            shown = ", ".join(f"{name}={_short(value)}" for name, value in values.items())
            logger.info("Trial %d of %d: %s", trial.number + 1, trials, shown)
            run = folder / TRIALS / f"{trial.number:04d}"
            begun = time.monotonic()
            try:
                measured = _run_trial(
                    method, teacher, task, run, dimensions, values, speed,
                    preset=preset, options=fixed, settings=training, augmented=augmented,
                    teacher_cache=teacher_cache,
                )  # fmt: skip
            except (InputError, torch.OutOfMemoryError) as error:
                trial.set_user_attr("message", str(error))
                study.tell(trial, state=state.FAIL)
                logger.warning("Trial %d failed: %s", trial.number + 1, error)
            else:
                trial.set_user_attr("measured", measured)
                trial.set_user_attr("seconds", round(time.monotonic() - begun, 2))
                study.tell(trial, (measured["metric"], measured["macs"]))
                logger.info(
                    "Trial %d of %d: %s %.4f, %.3g MACs per text",
                    trial.number + 1, trials, task.main_metric, measured["metric"], measured["macs"],
                )  # fmt: skip
            write_json(folder / RESULTS, _results(study, task, folder, dimensions, seed))
        results = _results(study, task, folder, dimensions, seed)
        write_json(folder / RESULTS, results)
        finished = results["trials"]
        if finished and all(trial["state"] == "failed" for trial in finished):
            raise InputError(
                f"all {len(finished)} trials failed, the first with: {finished[0]['message']} Change --space or what "
                "all trials have in common, and choose another --output"
            )
        return results


def required_optuna() -> Any:
    """Optuna. Raises InputError when it is not installed."""
    try:
        optuna = importlib.import_module("optuna")
    except ModuleNotFoundError as error:
        raise InputError(f"A search needs optuna: {install_extra('search')}.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def default_space(
    method: type[Method[Any]], teacher: str, options: dict[str, Any], settings: dict[str, Any]
) -> list[str]:
    """The method's default space without what is fixed; for students also shapes below the teacher's."""
    fixed = options.keys() | settings.keys()
    space = [text for text in SEARCH_SPACES.get(method.name, ()) if text.partition("=")[0] not in fixed]
    if issubclass(method.options_class, StudentOptions) and "student" not in fixed:
        config = load_config(teacher)
        config = config.full_model_config() if isinstance(config, MultiExitConfig) else config
        shapes = student_shapes(
            method.name, config.num_hidden_layers, config.hidden_size, config.num_attention_heads
        )
        space.append(f"student={'|'.join(shapes)}")
    return space


def _open_study(optuna: Any, folder: Path, configuration: dict[str, Any]) -> Any:
    database = folder / DATABASE
    study = optuna.create_study(
        study_name=_STUDY,
        # An absolute path may begin with a slash of its own: sqlite:////folder.
        storage=f"sqlite:///{database.resolve()}",
        directions=["maximize", "minimize"],
        load_if_exists=True,
    )
    previous = study.user_attrs.get("configuration")
    if previous is None:
        study.set_user_attr("configuration", configuration)
    elif previous != json.loads(json.dumps(configuration)):
        different = sorted(name for name in configuration if previous.get(name) != configuration[name])
        raise InputError(
            f"{folder} holds a search with another {', '.join(different)}: choose another --output, or repeat the "
            "command that began it"
        )
    return study


def _make_sampler(optuna: Any, name: str, seed: int) -> Any:
    if name == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=10)
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=5)


def _suggested(trial: Any, dimensions: Sequence[Dimension]) -> dict[str, Any]:
    return {dimension.name: dimension.suggest(trial) for dimension in dimensions}


def _run_trial(
    method: str,
    teacher: str,
    task: Task,
    run: Path,
    dimensions: Sequence[Dimension],
    values: dict[str, Any],
    speed: float,
    *,
    options: dict[str, Any],
    settings: dict[str, Any],
    **arguments: Any,
) -> dict[str, Any]:
    chosen = {dimension.name for dimension in dimensions if dimension.is_setting}
    distill(
        method,
        teacher,
        task,
        run,
        options=options | {name: value for name, value in values.items() if name not in chosen},
        settings=settings | {name: value for name, value in values.items() if name in chosen},
        **arguments,
    )
    measured = measure(run, task, "dev", speed, all_speeds=True)
    if not math.isfinite(measured["metric"]):
        raise InputError(f"the {task.main_metric} is no finite number: the training diverged")
    return measured


def _results(
    study: Any, task: Task, folder: Path, dimensions: Sequence[Dimension], seed: int
) -> dict[str, Any]:
    configuration = study.user_attrs["configuration"]
    best = {trial.number for trial in study.best_trials}
    entries = []
    for trial in study.get_trials(deepcopy=False):
        if not trial.state.is_finished():
            continue
        measured = trial.user_attrs.get("measured", {})
        entries.append(
            {
                "number": trial.number,
                "state": "complete" if measured else "failed",
                "options": {name.name: _decoded(name, trial.params) for name in dimensions},
                "metric": measured.get("metric"),
                "metrics": measured.get("metrics"),
                "macs": measured.get("macs"),
                "flops": measured.get("flops"),
                "macs_full_convention": measured.get("macs_full_convention"),
                "speeds": measured.get("speeds"),
                "seconds": trial.user_attrs.get("seconds"),
                "run": str(folder / TRIALS / f"{trial.number:04d}"),
                "pareto": trial.number in best,
                "message": trial.user_attrs.get("message"),
            }
        )
    return {
        "alembert_version": version("alembert"),
        "method": configuration["method"],
        "preset": configuration["preset"],
        "teacher": {"source": configuration["teacher"], **study.user_attrs["teacher"]},
        "data": task.name,
        "split": "dev",
        "metric": task.main_metric,
        "speed": configuration["speed"],
        "sampler": configuration["sampler"],
        "seed": seed,
        "options": configuration["options"],
        "settings": configuration["settings"],
        "space": configuration["space"],
        "trials": entries,
    }


def _decoded(dimension: Dimension, parameters: dict[str, Any]) -> Any:
    if dimension.name not in parameters:
        return None
    value = parameters[dimension.name]
    return dimension.values[dimension.choices.index(value)] if dimension.kind == "choice" else value


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
