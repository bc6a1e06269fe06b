"""Trains what `alembert compress` has planned, and keeps the record of it: done, skipped for want of time, failed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from alembert.common.errors import InputError
from alembert.compression.durations import format_duration
from alembert.compression.plan import TEACHER, PlannedTraining, fitted
from alembert.compression.work_clock import WorkClock
from alembert.compression.work_state import DONE, FAILED, RUNS, SKIPPED
from alembert.data.task import Task
from alembert.methods.distillation import distill
from alembert.training.finetuning import finetune
from alembert.training.settings import TrainingSettings

_LIMIT = 1.3
"""A training is stopped when it takes so many times its estimate, and others could use the time."""
_LEAST_SLOWNESS = 0.05
"""Even where measuring took all of the time."""
logger = logging.getLogger("alembert")


class Trainings:
    """The trainings of one work.

    Args:
        model: the teacher, or the encoder that becomes it.
        task: what is learned.
        folder: of the work; runs go to its `runs/`.
        state: the work's record; "trainings" of it is written to.
        save: writes the record to disk.
        budget: seconds for the whole work, or None.
    """

    def __init__(
        self,
        model: str,
        task: Task,
        folder: Path,
        state: dict[str, Any],
        save: Callable[[], None],
        budget: float | None,
    ) -> None:
        self._model, self._task, self._folder = model, task, folder
        self._state, self._save, self._budget = state, save, budget

    def run(self, plan: Sequence[PlannedTraining], clock: WorkClock) -> None:
        """Runs those that have no record yet; one that was interrupted goes on where it was.

        Raises InputError where the teacher cannot be fine-tuned; what else fails is noted.
        """
        to_come = [training for training in plan if training.name not in self._state["trainings"]]
        while to_come:
            training = to_come.pop(0)
            self._run_one(training, to_come, self._slowness(plan), clock)

    def folder_of(self, name: str) -> Path:
        """The run directory of a model; the given folder for a teacher that came trained."""
        if name == TEACHER and not self._state["needs_finetuning"]:
            return Path(self._model)
        return self._folder / RUNS / name

    def trained(self) -> list[str]:
        """Names of the models that there are, the teacher first."""
        done = [name for name, record in self._state["trainings"].items() if record["status"] == DONE]
        return [TEACHER, *(name for name in done if name != TEACHER)]

    def _slowness(self, plan: Sequence[PlannedTraining]) -> float:
        """The most time that a finished training took of what its epochs were expected to; 1 before there is one."""
        found, measuring = [], self._state.get("seconds_to_measure", 0.0)
        for training in plan:
            record = self._state["trainings"].get(training.name)
            if record is not None and record["status"] == DONE:
                begun = self._state["started"][training.name]["training"]
                share = begun["settings"]["epochs"] / training.settings["epochs"]
                found.append((record["seconds"] - measuring) / (share * training.seconds))
        return max(_LEAST_SLOWNESS, *found) if found else 1.0

    def _run_one(
        self, training: PlannedTraining, later: Sequence[PlannedTraining], slowness: float, clock: WorkClock
    ) -> None:
        left = None
        if self._budget is not None:
            after = self._state["seconds_after_training"] * max(1.0, slowness)
            measuring = self._state.get("seconds_to_measure", 0.0) * max(1.0, slowness)
            left = max(0.0, self._budget - clock.seconds - after - measuring)
        before = self._state["started"].get(training.name)
        if before is None:
            begun = training
            if left is not None and training.name != TEACHER:
                expected = [replace(it, seconds=slowness * it.seconds) for it in (training, *later)]
                fitting = fitted(expected, left)
                if not fitting:
                    reason = (
                        f"{format_duration(left)} were left, and all of its epochs take "
                        f"{format_duration(expected[0].seconds)}"
                    )
                    self._note(training.name, SKIPPED, reason, 0.0)
                    return
                # Where others were fast, this one is not stopped for taking what it was first expected to.
                begun = replace(fitting[0], seconds=fitting[0].seconds / min(1.0, slowness))
            before = {"training": begun.as_json(), "at_seconds": clock.seconds}
            self._state["started"][training.name] = before
            self._save()
        # As it was begun: a run is only gone on with as what it is.
        begun, started = PlannedTraining(**before["training"]), before["at_seconds"]
        limit = None if left is None else self._limit(begun, later, left, clock.seconds - started)
        stop_at = None if limit is None else time.monotonic() + limit
        try:
            self._train(begun, stop_at)
        except (InputError, torch.OutOfMemoryError) as error:
            if begun.method == "finetune":
                raise
            self._note(begun.name, FAILED, str(error), clock.seconds - started)
            return
        notes = []
        if begun.settings["epochs"] < training.settings["epochs"]:
            notes.append(f"{begun.settings['epochs']:g} of {training.settings['epochs']:g} epochs")
        if stop_at is not None and time.monotonic() >= stop_at:
            notes.append("stopped when its time was up")
        self._note(begun.name, DONE, ", ".join(notes) or None, clock.seconds - started)

    def _limit(
        self, begun: PlannedTraining, later: Sequence[PlannedTraining], left: float, taken: float
    ) -> float:
        """Seconds that a training may go on: all that the others have no use for, at the most `left`."""
        own = max(_LIMIT * begun.seconds - taken, 0.0)
        fair = left * begun.seconds / (begun.seconds + sum(training.seconds for training in later))
        return min(left, max(own, fair))

    def _train(self, training: PlannedTraining, stop_at: float | None) -> None:
        output = self.folder_of(training.name)
        if training.method == "finetune":
            settings = TrainingSettings(**training.settings)
            finetune(self._model, self._task, output, settings=settings, stop_at=stop_at)
            return
        distill(
            training.method,
            str(self.folder_of(TEACHER)),
            self._task,
            output,
            student=training.student,
            options=dict(training.options),
            settings=dict(training.settings),
            stop_at=stop_at,
        )

    def _note(self, name: str, status: str, reason: str | None, seconds: float) -> None:
        self._state["trainings"][name] = {"status": status, "reason": reason, "seconds": round(seconds, 1)}
        if reason is not None:
            logger.warning("%s is %s: %s", name, status, reason)
        self._save()
