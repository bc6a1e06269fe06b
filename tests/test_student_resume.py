"""Teacher–student runs that were killed go on and end, bit for bit, where an undisturbed run ends."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, set_seed

import alembert
from alembert.cli.app import run
from alembert.common.files import file_sha256
from alembert.training.checkpoints import COMPLETE_MARKER
from alembert.training.progress import TrainingProgress

# Each stage has 64 rows / 8 × 2 epochs = 16 steps, but for LRC-BERT's two of 8.
SIZES = [
    "--epochs", "2", "--batch-size", "8", "--learning-rate", "2e-3", "--max-length", "32",
    "--training", "checkpoint_steps=3",
]  # fmt: skip
# The process is killed at some moment after this checkpoint is complete, and stands still at the step after next.
CHECKPOINT = 3
INTERMEDIATE = ["--set", "intermediate_epochs=2"]
PROJECTED = ["--set", "project=true"]
PLAIN_TEXT = ["--student", "2x16", "--stages", "general"]
GENERAL = {
    f"{method}-general": method for method in ("tinybert", "distilbert", "lrc-bert", "minilm", "minilm-v2")
}
METHODS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "kd": (["--student", "2x16"], ("task",)),
    "bilstm": (["--student", "bilstm", "--set", "bilstm_hidden_size=8"], ("task",)),
    "tinybert": (["--student", "2x16", *INTERMEDIATE], ("task-intermediate", "task-prediction")),
    "bert-emd": (["--student", "2x16", "--set", "beta=1"], ("task",)),
    "lrc-bert": (
        ["--student", "2x16", "--set", "first_stage_share=0.5"],
        ("task-intermediate", "task-prediction"),
    ),
    "distilbert": (["--student", "2x16", *PROJECTED], ("task-prediction",)),
    "pkd": (["--student", "2x32"], ("task",)),
    "minilm": (["--student", "2x16", *INTERMEDIATE], ("task-intermediate", "task-prediction")),
    "minilm-v2": (["--student", "2x16", *INTERMEDIATE], ("task-intermediate", "task-prediction")),
    # The student must have learned something before it gets exits: it begins as some of the teacher's layers.
    "tinybert+ms-bert": (
        ["--student", "3x32", "--set", "initialise=layers", "--set", "placement=all", *INTERMEDIATE],
        ("task-intermediate", "task-prediction", "self-distillation"),
    ),
    **dict.fromkeys(GENERAL, (PLAIN_TEXT, ("general",))),
    "distilbert-general": ([*PLAIN_TEXT, *PROJECTED], ("general",)),
}
# Where methods run in turn, the run of all but the last lies in a folder of its own.
FOLDERS = dict.fromkeys(
    (("tinybert+ms-bert", "task-intermediate"), ("tinybert+ms-bert", "task-prediction")), "steps/1-tinybert"
)
# What else than the student must come back, beside the optimiser's state for it.
SHARED_PROJECTION = "objective.projection.linears.shared.weight"
OBJECTIVE_TENSORS = {
    ("tinybert", "task-intermediate"): SHARED_PROJECTION,
    ("tinybert-general", "general"): SHARED_PROJECTION,
    ("lrc-bert-general", "general"): "objective.projection.linears.2.weight",
    ("tinybert+ms-bert", "task-intermediate"): SHARED_PROJECTION,
    ("bert-emd", "task"): "objective.weights.attention.student",
    ("lrc-bert", "task-intermediate"): "objective.projection.linears.2.weight",
    ("lrc-bert", "task-prediction"): "objective.projection.linears.2.weight",
    ("distilbert", "task-prediction"): "objective.cosine.projection.linears.shared.weight",
}


def child(command: list[str], messages: str, stage: str | None) -> None:
    """A process of the command line, its messages in a file; in `stage` it waits to be killed."""
    torch.set_num_threads(1)
    original = TrainingProgress.on_step_end

    def wait(self: TrainingProgress, args: Any, state: Any, *rest: Any, **more: Any) -> None:
        original(self, args, state, *rest, **more)
        if self.description == stage and state.global_step == CHECKPOINT + 2:
            time.sleep(300)

    TrainingProgress.on_step_end = wait  # type: ignore[method-assign]
    with Path(messages).open("w", encoding="utf-8") as file, Path(os.devnull).open("w") as nothing:
        os.dup2(file.fileno(), 2)
        os.dup2(nothing.fileno(), 1)
        sys.stderr, sys.stdout = file, nothing
        code = run(command)
        file.flush()
    os._exit(code)


@pytest.fixture(scope="module")
def start() -> Callable[[list[str], Path, str | None], BaseProcess]:
    """Starts the command line in a process of its own, which is forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "torch",
            "transformers",
            "alembert.cli.app",
            "alembert.methods.distillation",
            "alembert.reports.layer_transport",
        ]
    )

    def begin(command: list[str], messages: Path, stage: str | None) -> BaseProcess:
        process = context.Process(target=child, args=(command, str(messages), stage))
        process.start()
        return process

    return begin


@pytest.fixture(scope="module")
def command(
    tmp_path_factory: pytest.TempPathFactory,
    teacher: Path,
    tiny_encoder: Path,
    task_folder: Path,
    task: alembert.Task,
) -> Callable[[str, Path], list[str]]:
    """The command line of a method and an output folder."""
    masked_lm = tmp_path_factory.mktemp("masked-lm")
    set_seed(2)
    BertForMaskedLM(BertConfig.from_pretrained(tiny_encoder)).save_pretrained(masked_lm)
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(masked_lm)
    corpus = masked_lm / "corpus.txt"
    corpus.write_text("\n".join(task.dataset("train")["text"]) + "\n", encoding="utf-8")

    def arguments(name: str, output: Path) -> list[str]:
        method = ({"bilstm": "kd"} | GENERAL).get(name, name)
        source = ["--teacher", masked_lm, "--corpus", corpus] if name in GENERAL else [
            "--teacher", teacher, "--data", task_folder,
        ]  # fmt: skip
        parts = ["distill", "--method", method, "--output", output, *source, *METHODS[name][0], *SIZES]
        return [str(part) for part in parts]

    return arguments


def newest(checkpoints: Path) -> int:
    """The step of the newest complete checkpoint."""
    steps = [int(marker.parent.name.rsplit("-", 1)[1]) for marker in checkpoints.glob(f"*/{COMPLETE_MARKER}")]
    return max(steps, default=0)


@pytest.mark.parametrize("name", METHODS)
def test_a_killed_run_ends_as_an_undisturbed_one(
    start: Callable[[list[str], Path, str | None], BaseProcess],
    command: Callable[[str, Path], list[str]],
    tmp_path: Path,
    name: str,
) -> None:
    killed, undisturbed, messages = tmp_path / "killed", tmp_path / "undisturbed", tmp_path / "messages.txt"
    for stage in METHODS[name][1]:
        checkpoints = killed / FOLDERS.get((name, stage), ".") / "checkpoints" / stage
        process = start(command(name, killed), messages, stage)
        deadline = time.monotonic() + 120
        while process.is_alive() and newest(checkpoints) < CHECKPOINT and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        process.join()
        assert process.exitcode == -signal.SIGKILL, messages.read_text()
        step = newest(checkpoints)
        assert step == CHECKPOINT
        assert not (killed / "alembert.json").exists()
        newest_state = json.loads((checkpoints / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert step < newest_state["max_steps"]
        if (name, stage) in OBJECTIVE_TENSORS:
            state = load_file(checkpoints / f"checkpoint-{step}" / "model.safetensors")
            tensor = state[OBJECTIVE_TENSORS[name, stage]]
            assert name != "bert-emd" or not torch.equal(tensor, torch.full((2,), 0.5))

    process = start(command(name, killed), messages, None)
    process.join(300)
    assert process.exitcode == 0, messages.read_text()
    assert f"{METHODS[name][1][-1]}: going on from step {step} of" in messages.read_text()
    assert not list(killed.rglob("checkpoints"))

    assert run(command(name, undisturbed)) == 0
    # The terms in a general stage's metrics are means over the steps since the last entry of the log.
    patterns = ("*.safetensors", *(["metrics.json"] if name not in GENERAL else []))
    files = [path.relative_to(undisturbed) for pattern in patterns for path in undisturbed.rglob(pattern)]
    assert {str(file.parent) for file in files} == {
        FOLDERS.get((name, stage), ".") for stage in METHODS[name][1]
    }
    for file in files:
        assert file_sha256(killed / file) == file_sha256(undisturbed / file), file
    if name == "bert-emd":
        # Flows and weights at the end: those that an interruption could have lost.
        last = [
            json.loads((folder / "trainer_state.json").read_text())["task"]["log_history"]
            for folder in (killed, undisturbed)
        ]
        snapshots = [[entry["snapshot"] for entry in log if "snapshot" in entry] for log in last]
        assert snapshots[0] == snapshots[1]
        assert len(snapshots[0]) == 2
