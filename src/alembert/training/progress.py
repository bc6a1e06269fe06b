"""Progress of a training: a bar on a terminal, plain lines elsewhere, always on standard error."""

from __future__ import annotations

import time
from typing import Any

from rich.progress import TextColumn
from transformers import TrainerCallback

from alembert.common.progress import progress_bar

_SECONDS_BETWEEN_LINES = 15.0


class TrainingProgress(TrainerCallback):  # type: ignore[misc]
    """Shows step, loss and dev score of one stage."""

    def __init__(self, description: str) -> None:
        self.description = description
        self.bar = progress_bar(TextColumn("{task.fields[note]}"))
        self._last_line = 0.0
        self._notes: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.bar.start()
            self._task = self.bar.add_task(
                self.description, total=state.max_steps, completed=state.global_step, note=""
            )
            if state.global_step:
                self._say(f"{self.description}: going on from step {state.global_step} of {state.max_steps}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.bar.update(self._task, completed=state.global_step, note=self._note())
            if self.bar.disable and time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
                self._say(f"{self.description}: step {state.global_step} of {state.max_steps} {self._note()}")
                self._last_line = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            self._notes["loss"] = f"{logs['loss']:.4f}"
        if "eval_score" in logs and state.is_world_process_zero:
            self._notes["dev score"] = f"{logs['eval_score']:.4f}"
            self._say(
                f"{self.description}: epoch {logs.get('epoch', 0):.2f}, dev score {logs['eval_score']:.4f}"
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.bar.stop()

    def _note(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self._notes.items())

    def _say(self, line: str) -> None:
        self.bar.console.print(line, highlight=False)
