"""What `alembert compress` refuses before it reads a model or writes anything."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from alembert.benchmarks.risk_budget import CERTIFIED, RiskBudget
from alembert.common.errors import InputError, install_extra
from alembert.compression.candidates import fewest_rows, split_confidence
from alembert.compression.plan import RECIPES
from alembert.data.task import Task


def check_inputs(model: str, task: Task, folder: Path, risk: RiskBudget, min_speedup: float | None) -> None:
    """Raises InputError for what cannot serve: a missing extra or split, too few rows of dev, folders in one another.

    Args:
        model: folder or hub id.
        task: without the rows of dev that stand in train.
        folder: of the work.
        risk: what may be lost.
        min_speedup: what else is asked.
    """
    risk.check(task.problem_type)
    for name, what in (("onnxruntime", "ONNX Runtime"), ("onnx", "onnx")):
        if find_spec(name) is None:
            raise InputError(f"{what} is not installed, which exports need: {install_extra('onnx')}")
    for split in ("train", "dev"):
        if split not in task.splits:
            raise InputError(f"{task.name}: there is no {split} split, which compressing needs: add one")
    if min_speedup is not None and min_speedup <= 0:
        raise InputError(f"min_speedup is {min_speedup}: it must be above 0, such as 4")
    if Path(model).exists() and folder.resolve() in Path(model).resolve().parents:
        raise InputError(f"{model} lies in {folder}: give another --output")
    if Path(model).exists() and Path(model).resolve() in folder.resolve().parents:
        raise InputError(f"{folder} lies in {model}, which is copied to it: give another --output")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output {folder}: is a file; name a folder")
    confidence = split_confidence(risk.confidence, len(RECIPES) + 1)
    needed = fewest_rows(task, replace(risk, confidence=confidence))
    rows = int(task.dataset("dev").num_rows)
    if rows == 0:
        raise InputError(f"{task.name}: all rows of dev stand in train too: give rows of its own to dev")
    if risk.mode == CERTIFIED and rows < needed:
        raise InputError(
            f"dev has {rows:,} rows, and to be {100 * risk.confidence:g}% sure of a drop of at most "
            f"{risk.most:g} takes {needed:,} at the least: give more, allow a larger --max-drop, or choose "
            "--mode empirical, which guarantees nothing"
        )
