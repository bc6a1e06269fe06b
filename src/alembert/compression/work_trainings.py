"""Trains what `alembert compress` has planned, and keeps the record of it: done, skipped for want of time, failed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from alembert.common.errors import InputError
from alembert.compression.durations import format_duration
from alembert.compression.plan import TEACHER, PlannedTraining
from alembert.compression.work_clock import WorkClock
from alembert.data.task import Task
from alembert.methods.distillation import distill
from alembert.training.finetuning import finetune
from alembert.training.settings import TrainingSettings

DONE, SKIPPED, FAILED = "done", "skipped", "failed"
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
        for training in plan:
            if training.name not in self._state["trainings"]:
                self._run_one(training, clock)

    def folder_of(self, name: str) -> Path:
        """The run directory of a model; the given folder for a teacher that came trained."""
        if name == TEACHER and not self._state["needs_finetuning"]:
            return Path(self._model)
        return self._folder / "runs" / name

    def trained(self) -> list[str]:
        """Names of the models that there are, the teacher first."""
        done = [name for name, record in self._state["trainings"].items() if record["status"] == DONE]
        return [TEACHER, *(name for name in done if name != TEACHER)]

    def _run_one(self, training: PlannedTraining, clock: WorkClock) -> None:
        reason = None if training.teacher is None else self._reason_to_skip(training, clock)
        if reason is not None:
            self._note(training.name, SKIPPED, reason, 0.0)
            return
        started = clock.seconds
        try:
            self._train(training)
        except InputError as error:
            if training.method == "finetune":
                raise
            self._note(training.name, FAILED, str(error), clock.seconds - started)
            return
        self._note(training.name, DONE, None, clock.seconds - started)

    def _reason_to_skip(self, training: PlannedTraining, clock: WorkClock) -> str | None:
        taught_by = self._state["trainings"].get(training.teacher)
        if training.teacher != TEACHER and (taught_by is None or taught_by["status"] != DONE):
            return f"there is no {training.teacher} to start from"
        if self._budget is None:
            return None
        left = self._budget - clock.seconds - self._state["seconds_after_training"]
        if left < training.seconds / 2:
            return f"{format_duration(max(0.0, left))} were left, and it takes {format_duration(training.seconds)}"
        return None

    def _train(self, training: PlannedTraining) -> None:
        output = self.folder_of(training.name)
        if training.method == "finetune":
            finetune(self._model, self._task, output, settings=TrainingSettings(**training.settings))
            return
        assert training.teacher is not None
        distill(
            training.method,
            str(self.folder_of(training.teacher)),
            self._task,
            output,
            student=training.student,
            options=dict(training.options),
            settings=dict(training.settings),
        )

    def _note(self, name: str, status: str, reason: str | None, seconds: float) -> None:
        self._state["trainings"][name] = {"status": status, "reason": reason, "seconds": round(seconds, 1)}
        if reason is not None:
            logger.warning("%s is %s: %s", name, status, reason)
        self._save()
