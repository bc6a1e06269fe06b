"""Which rows a model has not learned: what its run, and those of its teachers, held out of train."""

from __future__ import annotations

from pathlib import Path

from alembert.data.task import Task, rows_sha256
from alembert.models.loading import run_configuration, weights_fingerprint
from alembert.runtime.manifest import HoldOut, Manifest, is_exported


def read_hold_out(source: str | Path) -> HoldOut | None:
    """What a run, or the run that was exported, held out of train; None where there is no record of it."""
    if is_exported(source):
        return Manifest.read(source).hold_out
    trained = run_configuration(source)
    if not trained.get("task"):
        return None
    splits = trained["task"]["splits"]
    own = HoldOut(
        seed=trained["settings"]["seed"],
        rows_sha256={name: splits[name]["sha256"] for name in ("train", "dev") if name in splits},
    )
    if "teacher" not in trained:
        return own
    # A student has learned from whatever its teacher has, which may even be its backbone.
    # Another model may lie there by now.
    is_same = weights_fingerprint(trained["teacher"]) == trained.get("teacher_files")
    teacher = (read_hold_out(trained["teacher"]) if is_same else None) or HoldOut(own.seed, {})
    common = dict(own.rows_sha256.items() & teacher.rows_sha256.items())
    return HoldOut(teacher.seed if common else own.seed, common)


def held_out_alike(task: Task, hold_out: HoldOut | None) -> bool:
    """Whether a task's dev rows, held out of its train rows, are surely new to the model that `hold_out` is of."""
    # One is enough: the other may have been cut to fewer rows for the run.
    known = {} if hold_out is None else hold_out.rows_sha256
    return any(rows_sha256(task.dataset(split)) == sha256 for split, sha256 in known.items())
