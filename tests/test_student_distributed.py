"""Two processes, or several steps in turn, teach a student what one process teaches it in one step."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, set_seed

from alembert.cli.app import run
from alembert.models.loading import load_classifier, load_tokenizer
from conftest import FILLERS, KEYWORDS

SIZES = [
    "--epochs", "1", "--batch-size", "8", "--learning-rate", "1e-3", "--max-length", "32",
    "--training", "bf16=false",
]  # fmt: skip
INTERMEDIATE = ["--set", "intermediate_epochs=1", "--set", "intermediate_learning_rate=1e-3"]
COMBINED, MASKED = "tinybert+ms-bert", "distilbert"
METHODS: dict[str, list[str]] = {
    "kd": ["--student", "2x16"],
    "bilstm": ["--student", "bilstm", "--set", "bilstm_hidden_size=8"],
    "tinybert": ["--student", "2x16", *INTERMEDIATE],
    "bert-emd": ["--student", "2x16", "--set", "beta=1"],
    # Every process has negatives of its own; without negatives the gradients are those of one process.
    "lrc-bert": ["--student", "2x16", "--set", "layer_loss=mse"],
    MASKED: ["--student", "2x16", "--set", "project=true"],
    "pkd": ["--student", "2x32"],
    "minilm": ["--student", "2x16", *INTERMEDIATE],
    "minilm-v2": ["--student", "2x16", *INTERMEDIATE],
    # The student must have learned something before it gets exits: it begins as some of the teacher's layers.
    COMBINED: ["--student", "3x32", "--set", "initialise=layers", "--set", "placement=all", *INTERMEDIATE],
}
NEGATIVES = "lrc-bert-negatives"
GENERAL: dict[str, list[str]] = {
    "tinybert": [],
    "lrc-bert": METHODS["lrc-bert"][2:],
    "minilm": [],
    "minilm-v2": [],
    # Every process masks words of its own, so that one process alone learns something else.
    MASKED: METHODS[MASKED][2:],
}

PROGRAM = """
import hashlib, json, os, sys
from pathlib import Path

import alembert.methods.distillation as distillation
from alembert.cli.app import run

commands, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
trained, original = [], distillation.run_stages


def run_stages(model, stages, *arguments):
    result = original(model, stages, *arguments)
    digest = hashlib.sha256(b"".join(value.cpu().numpy().tobytes() for value in model.state_dict().values()))
    objectives = [{key: value.tolist() for key, value in stage.objective.state_dict().items()} for stage in stages]
    trained.append({"student": digest.hexdigest(), "objectives": objectives})
    return result


distillation.run_stages = run_stages
for command in commands:
    assert run(command) == 0, command
(folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(trained))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of equal length: a mean over a batch's tokens is then the mean of its halves' means."""
    folder = tmp_path_factory.mktemp("even")
    generator = np.random.default_rng(3)
    names = sorted(KEYWORDS)
    for split, count in (("train", 64), ("dev", 30)):
        lines = ["label\ttext"]
        for row in range(count):
            words = [*generator.choice(FILLERS, 5), generator.choice(KEYWORDS[names[row % 3]])]
            lines.append(f"{names[row % 3]}\t{' '.join(generator.permutation(words))}")
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    """The teacher, from whose configuration students take their dropout, without any."""
    folder = tmp_path_factory.mktemp("steady") / "teacher"
    shutil.copytree(teacher, folder)
    config = read(folder / "config.json")
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def masked_lm(tmp_path_factory: pytest.TempPathFactory, steady: Path) -> Path:
    folder = tmp_path_factory.mktemp("masked-lm")
    set_seed(2)
    BertForMaskedLM(BertConfig.from_pretrained(steady)).save_pretrained(folder)
    load_tokenizer(str(steady)).save_pretrained(folder)
    return folder


def general_command(method: str, teacher: Path, corpus: Path, output: Path) -> list[str]:
    paths = ["--teacher", str(teacher), "--corpus", str(corpus), "--output", str(output)]
    options = ["--stages", "general", "--student", "2x16", *GENERAL[method]]
    return ["distill", "--method", method, *paths, *SIZES, *options]


def command(name: str, teacher: Path, data: Path, output: Path, *more: str) -> list[str]:
    method = "lrc-bert" if name == NEGATIVES else "kd" if name == "bilstm" else name
    options = METHODS["lrc-bert"][:2] if name == NEGATIVES else METHODS[name]
    paths = ["--teacher", str(teacher), "--data", str(data), "--output", str(output)]
    return ["distill", "--method", method, *paths, *SIZES, *options, *more]


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def log(output: Path) -> dict[str, list[dict[str, Any]]]:
    state = read(output / "trainer_state.json")
    return {
        stage: [entry for entry in history["log_history"] if "loss" in entry]
        for stage, history in state.items()
    }


def assert_same_weights(ones: Path, others: Path) -> None:
    for stage, entries in log(ones).items():
        for one, other in zip(entries, log(others)[stage], strict=True):
            names = [name for name in one if name == "loss" or name.startswith("terms/")]
            assert len(names) > 1
            for name in names:
                assert one[name] == pytest.approx(other[name], rel=2e-3, abs=2e-4), (stage, name)
    files = [file.relative_to(ones) for file in ones.rglob("*.safetensors")]
    assert Path("model.safetensors") in files
    for file in files:
        first, second = (load_file(folder / file) for folder in (ones, others))
        assert first.keys() == second.keys()
        for key, weight in first.items():
            # A key's bias changes no attention: its gradient is rounding, which Adam makes steps of.
            if not key.endswith("key.bias"):
                torch.testing.assert_close(
                    weight, second[key], rtol=0, atol=1e-3, msg=lambda text, key=key: f"{key}: {text}"
                )


def assert_same_students(ones: Path, others: Path) -> None:
    assert_same_weights(ones, others)
    tokenizer = load_tokenizer(str(ones))
    texts = tokenizer(
        ["we saw the goal", "rain again", "it was the bread"], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = [load_classifier(str(folder))(**texts).logits for folder in (ones, others)]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=2e-3)


def test_two_processes_teach_what_one_does(steady: Path, masked_lm: Path, data: Path, tmp_path: Path) -> None:
    names, two = [*METHODS, NEGATIVES], tmp_path / "two"
    corpus = tmp_path / "corpus.txt"
    rows = (data / "train.tsv").read_text(encoding="utf-8").splitlines()[1:]
    corpus.write_text("\n".join(row.split("\t")[1] for row in rows) + "\n", encoding="utf-8")
    commands = [command(name, steady, data, two / name) for name in names]
    commands += [general_command(method, masked_lm, corpus, two / "general" / method) for method in GENERAL]
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    (tmp_path / "commands.json").write_text(json.dumps(commands), encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*launcher, str(tmp_path / "program.py"), str(tmp_path / "commands.json"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    ranks = [read(tmp_path / f"rank-{rank}.json") for rank in (0, 1)]
    # Students, projections and layer weights are equal in both processes, to the last bit.
    assert len(ranks[0]) == sum(name.count("+") + 1 for name in [*names, *GENERAL])
    assert ranks[0] == ranks[1]
    (weights,) = ranks[0][names.index("bert-emd")]["objectives"]
    assert weights["weights.attention.student"] != pytest.approx([0.5, 0.5], abs=1e-4)
    assert sum(weights["weights.hidden.teacher"]) == pytest.approx(1)
    assert np.isfinite([entry["loss"] for entry in log(two / NEGATIVES)["task-prediction"]]).all()
    assert not list(two.rglob("checkpoints"))

    for name in METHODS:
        assert run(command(name, steady, data, tmp_path / "one" / name)) == 0
        assert_same_students(two / name, tmp_path / "one" / name)
    assert_same_weights(*(tmp_path / count / COMBINED / "steps" / "1-tinybert" for count in ("two", "one")))
    for method in GENERAL:
        if method != MASKED:
            ones = tmp_path / "one" / "general" / method
            assert run(general_command(method, masked_lm, corpus, ones)) == 0
            assert_same_weights(two / "general" / method, ones)
    assert set(read(two / "general" / MASKED / "metrics.json")["terms"]["general"]) == {
        "loss", "terms/soft", "terms/masked_words", "terms/cosine",
    }  # fmt: skip
    logs = [log(tmp_path / count / "bert-emd")["task"] for count in ("one", "two")]
    for first, second in zip(*logs, strict=True):
        for kind in ("attention", "hidden"):
            for key in ("flow", "student_weights", "teacher_weights"):
                np.testing.assert_allclose(
                    first["snapshot"][kind][key], second["snapshot"][kind][key], atol=1e-3
                )


@pytest.mark.parametrize("name", ["kd", "lrc-bert"])
def test_accumulated_steps_teach_what_whole_ones_do(
    steady: Path, data: Path, tmp_path: Path, name: str
) -> None:
    assert run(command(name, steady, data, tmp_path / "whole")) == 0
    parts = ["--training", "gradient_accumulation_steps=2"]
    assert run(command(name, steady, data, tmp_path / "parts", *parts)) == 0
    assert_same_students(tmp_path / "parts", tmp_path / "whole")
