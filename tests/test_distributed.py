"""Two processes train what one does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from alembert.cli.app import run


@pytest.mark.parametrize("method", ["fastbert", "ms-bert"])
def test_two_processes_end_where_one_does(
    teacher: Path, task_folder: Path, tmp_path: Path, method: str
) -> None:
    options = [
        "distill", "--method", method, "--teacher", str(teacher), "--data", str(task_folder),
        "--set", "placement=all", "--epochs", "2", "--batch-size", "4", "--learning-rate", "1e-3",
        "--max-length", "32", "--training", "bf16=false", "--json",
    ]  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*launcher, "-m", "alembert", *options, "--output", str(tmp_path / "two")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["output"] == str(tmp_path / "two")
    assert run([*options, "--output", str(tmp_path / "one")]) == 0

    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for key, weight in one.items():
        torch.testing.assert_close(two[key], weight, rtol=0, atol=1e-4)
    logs = [
        [
            entry
            for entry in json.loads((tmp_path / name / "trainer_state.json").read_text())[
                "self-distillation"
            ]["log_history"]
            if "loss" in entry
        ]
        for name in ("one", "two")
    ]
    assert len(logs[0]) == len(logs[1]) == 4
    for first, second in zip(*logs, strict=True):
        names = [name for name in first if name == "loss" or name.startswith("terms/")]
        assert len(names) == 4
        for name in names:
            assert second[name] == pytest.approx(first[name], abs=1e-4)
    assert not list(tmp_path.glob("*/checkpoints"))
