"""The repository's own benchmark programs run, on models small enough to say nothing of time."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import alembert
from alembert.benchmarks.evaluation import task_texts
from alembert.cli.app import run
from alembert.common.errors import InputError
from alembert.models.loading import load_classifier
from alembert.runtime.export import export_classifier

PROGRAMS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a program by name, as Python finds it when it is run."""
    monkeypatch.syspath_prepend(str(PROGRAMS))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def test_fastberts_published_inference(
    program: Any, fast: Path, task: alembert.Task, task_folder: Path, tmp_path: Path
) -> None:
    module = program("fastbert_inference")
    classifier = alembert.AdaptiveClassifier.from_pretrained(fast)
    texts = task_texts(task, "test")
    for speed in (0.0, 0.7):
        for policy in ("entropy", "patience", "learned"):
            published = module.PublishedInference(
                classifier.backend.model, classifier.tokenizer, classifier.policy(policy), 32, 64
            )
            expected = classifier.predict(texts, speed=speed, policy=policy)
            found = [published.predict(text, speed) for text in texts]
            assert [classifier.label_names[label] for label, _ in found] == [one.label for one in expected]
            assert [layer for _, layer in found] == [one.exit for one in expected]
    # A calibration beside the export, for another policy, has no say.
    output, exported = tmp_path / "fastbert.json", tmp_path / "fp32"
    export_classifier(fast, exported, precision="fp32")
    calibration = ["--mode", "empirical", "--max-drop", "0.5", "--policy", "patience", "--split", "dev"]
    assert run(["calibrate", str(exported), "--data", str(task_folder), *calibration]) == 0
    results = module.main(
        [str(fast), "--exported", str(exported), "--data", str(task_folder), "--speed", "0.7", "--rows", "6",
         "--repeats", "1", "--padded-length", "48", "--policy", "margin", "--output", str(output)]
    )  # fmt: skip
    ways = [
        f"{name}, {how}" for name in ("torch", str(exported)) for how in ("one text at a time", "all texts")
    ]
    assert list(results["results"]) == ["published", *ways]
    for entry in results["results"].values():
        assert entry["same_exit"] == entry["same_label"] == 1.0
    assert len([share for share in results["exits"].values() if share > 0]) > 1
    assert (json.loads(output.read_text())["padded_length"], results["policy"]) == (48, "margin")


def test_parity_of_exports(
    program: Any, fast: Path, task: alembert.Task, task_folder: Path, tmp_path: Path
) -> None:
    module, output = program("parity"), tmp_path / "parity.json"
    exported = {precision: tmp_path / precision for precision in ("fp32", "int8")}
    for precision, folder in exported.items():
        export_classifier(fast, folder, precision=precision)
    results = module.main(
        [str(fast), "--exported", *map(str, exported.values()), "--data", str(task_folder), "--split", "dev",
         "--speed", "0,0.6", "--alone-rows", "5", "--output", str(output)]
    )  # fmt: skip
    assert json.loads(output.read_text()) == results
    assert (results["split"], results["rows"], results["alone_rows"]) == ("dev", 32, 5)
    rows = results["results"]
    assert [(row["speed"], Path(row["model"]).name) for row in rows] == [
        (speed, name) for speed in (0.0, 0.6) for name in ("fast", "fp32", "int8")
    ]
    texts, truth = task_texts(task, "dev"), np.array(task.dataset("dev")["labels"])
    right = {}
    for row in rows:
        classifier = alembert.AdaptiveClassifier.from_pretrained(row["model"])
        names = np.array([answer.label for answer in classifier.predict(texts, speed=row["speed"])])
        right[row["model"], row["speed"]] = names == np.array(classifier.label_names)[truth]
        assert row["accuracy"] == right[row["model"], row["speed"]].mean()
        if Path(row["model"]).name != "int8":
            alone = row["alone_against_batches"]
            assert alone["same_exit"] == alone["same_label"] == 1.0
            assert alone["mean_difference"] <= alone["max_difference"] < 1e-4
    for row in (row for row in rows if "against_run" in row):
        against = row["against_run"]
        changes = right[row["model"], row["speed"]].astype(int) - right[str(fast), row["speed"]]
        assert against["accuracy_difference"] == changes.mean()
        assert (against["lost"], against["gained"]) == ((changes < 0).sum(), (changes > 0).sum())
        if Path(row["model"]).name == "fp32":
            assert against["same_exit"] == against["same_label"] == 1.0
            assert against["max_difference"] < 1e-4
            assert against["accuracy_difference_interval"] == [0.0, 0.0]
        else:
            assert 1e-6 < against["mean_difference"] <= against["max_difference"]


def test_ranges_from_the_batch_and_from_the_export(
    program: Any, teacher: Path, fast: Path, task: alembert.Task, task_folder: Path, tmp_path: Path
) -> None:
    module, output = program("input_ranges"), tmp_path / "ranges.json"
    arguments = ["--data", str(task_folder), "--timing-rows", "4", "--repeats", "1", "--output", str(output)]
    results = module.main([str(teacher), *arguments])
    assert json.loads(output.read_text()) == results
    exact, from_batch, from_export = results["results"]
    assert (exact["other_labels"], exact["largest_change"], exact["share_of_float32_time"]) == (0, 0, 1)
    assert from_batch["largest_change"] > 0 and from_export["largest_change"] > 0
    assert from_batch["mean_change"] != from_export["mean_change"]
    export_classifier(teacher, tmp_path / "int8", precision="int8")
    classifier = alembert.AdaptiveClassifier.from_pretrained(tmp_path / "int8")
    found = classifier.predict_proba(task_texts(task, results["split"])).argmax(axis=1)
    assert from_export["accuracy"] == (found == np.array(task.dataset(results["split"])["labels"])).mean()
    with pytest.raises(InputError, match="has exits"):
        module.main([str(fast), *arguments])


def test_budgets_of_tokens(program: Any, fast: Path, task_folder: Path, tmp_path: Path) -> None:
    module, output = program("batch_tokens"), tmp_path / "tokens.json"
    results = module.main(
        [str(fast), "--data", str(task_folder), "--rows", "9", "--speed", "0.5", "--repeats", "1",
         "--output", str(output)]
    )  # fmt: skip
    assert json.loads(output.read_text()) == results
    assert [row["batch_tokens"] for row in results["results"]] == list(module.BUDGETS)
    assert {row["rows"] for row in results["results"]} == {9}
    assert results["results"][-1]["ratio_to_largest"] == 1
    assert all(row["texts_per_second"] > 0 for row in results["results"])


def test_a_difference_in_pairs(program: Any) -> None:
    right, reference = np.repeat([True, False, True, False], [70, 5, 10, 15]), np.arange(100) < 75
    found = program("parity").paired_difference(right, reference)
    assert (found["lost"], found["gained"], found["accuracy_difference"]) == (5, 10, 0.05)
    # Normal approximation: variance of a pair is 0.15 − 0.05².
    half = 1.96 * ((0.15 - 0.05**2) / 100) ** 0.5
    assert found["accuracy_difference_interval"] == pytest.approx([0.05 - half, 0.05 + half], abs=0.012)


def test_a_hard_row(program: Any, capsys: pytest.CaptureFixture[str]) -> None:
    results = program("hard_row").main(
        ["--model", "3x24", "--batch", "4x9", "--exits", "1,2", "--precision", "fp32", "--repeats", "1",
         "--mixed-lengths"]
    )  # fmt: skip
    hard = [f"{number} of 4 hard{how}" for number in (0, 1, 2, 4) for how in ("", ", 8 batches regrouped")]
    assert list(results["results"]) == ["full model, one graph", "full model, speed 0", *hard]
    for name, row in results["results"].items():
        assert row["batches"] == (8 if "regrouped" in name else 1)
    assert results["results"]["full model, one graph"]["share_of_full_model"] == 1.0
    alone = program("hard_row").main(
        ["--model", "3x24", "--batch", "1x9", "--exits", "1,2", "--precision", "fp32", "--repeats", "1"]
    )
    assert list(alone["results"]) == [
        "full model, one graph", "full model, speed 0", "0 of 1 hard", "1 of 1 hard",
        "1 of 1 hard, one graph with exits",
    ]  # fmt: skip


def test_what_is_inside_and_outside_the_graphs(program: Any) -> None:
    arguments = ["--model", "2x24", "--exits", "1", "--precision", "fp32", "--texts", "4", "--speed", "0.5"]
    rows = program("overhead").main(arguments)["results"]
    assert [row["graphs"] for row in rows] == ["merged", "segments"]
    for row in rows:
        assert row["graphs_ms"] > 0 and row["tokenizer_ms"] > 0 and row["rest_ms"] > 0
        assert 0 < row["outside_share"] < 1
        assert row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"]


def test_start_memory_stream_and_regrouping(
    program: Any, fast: Path, task_folder: Path, tmp_path: Path
) -> None:
    export_classifier(fast, tmp_path / "exported", precision="fp32")
    results = program("deployment").main(
        [
            str(tmp_path / "exported"),
            "--data",
            str(task_folder),
            "--rows",
            "50",
            "--starts",
            "1",
            "--repeats",
            "1",
        ]
    )
    start, (regrouped,) = results["start"], results["regrouping"]
    assert not start["torch_is_loaded"]
    assert start["interpreter_mb"] < start["opened_mb"] and start["import_s"] < start["total_s"]
    # The libraries' code is resident, and not the process's own.
    for moment in ("libraries", "opened", "answered"):
        assert 0 < start[f"{moment}_private_mb"] < start[f"{moment}_mb"]
    assert start["libraries_private_mb"] < start["opened_private_mb"]
    assert results["files_mb"] > 0 and regrouped["gain"] > 0 and 1 <= regrouped["mean_exit_layer"] <= 4
    assert [streamed["rows"] for streamed in results["streaming"]] == [5, 50]
    assert all(streamed["peak_memory_mb"] > start["opened_mb"] / 2 for streamed in results["streaming"])


def test_what_heads_cost(program: Any) -> None:
    results = program("exit_head_cost").main(
        ["--model", "2x24", "--batch", "2x5", "--precision", "fp32", "--repeats", "1"]
    )
    assert [row["head"] for row in results["results"]] == ["fastbert", "pooled", "linear", "mean"]
    assert all(row["layer_ms"] > 0 for row in results["results"])


def test_libraries_that_run_are_compared_and_the_others_named(
    program: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = program("runtime_backends")

    def unavailable(*_: object) -> Any:
        raise RuntimeError("no such CPU")

    monkeypatch.setattr(module, "openvino_run", unavailable)
    names = ["ONNX Runtime fp32", "ONNX Runtime int8", "Alembert int8", "OpenVINO fp32"]
    only = [flag for name in names for flag in ("--only", name)]
    results = module.main(["--model", "2x24", "--batch", "2x5", "--repeats", "1", *only])
    found = {row["candidate"]: row for row in results["results"]}
    assert list(found) == ["torch fp32", *names[:3]]
    assert found["ONNX Runtime fp32"]["largest_difference"] < 1e-4
    assert not any(row["logits_differ"] for row in results["results"])
    assert results["not_run"] == [
        {"model": "2x24", "candidate": "OpenVINO fp32", "reason": "RuntimeError: no such CPU"}
    ]


def test_random_models_and_batches(program: Any) -> None:
    module = program("random_models")
    assert module.parse_pair(" 12x768") == (12, 768)
    with pytest.raises(InputError, match="12by768"):
        module.parse_pair("12by768")
    lengths = np.array([7, 3])
    batch = module.random_batch(module.BatchShape(2, 7), lengths)
    assert batch["attention_mask"].sum(1).tolist() == [7, 3]
    assert (batch["input_ids"][1, 3:] == 0).all()
    assert (batch["input_ids"][:, 0] == 2).all()
    tokenizer = module.random_tokenizer()
    encoded = tokenizer(module.random_texts(3, 9))["input_ids"]
    assert [len(ids) for ids in encoded] == [9, 9, 9]
    assert 1 not in {token for ids in encoded for token in ids}


@pytest.mark.parametrize(("compared", "banks"), [("methods", 10), ("heads", 4)])
def test_a_study_of_exits(
    program: Any, teacher: Path, task_folder: Path, tmp_path: Path, compared: str, banks: int
) -> None:
    study = tmp_path / "exits.json"
    program("exit_study").main(
        ["--teacher", str(teacher), "--data", str(task_folder), "--output", str(study), "--compare", compared,
         "--epochs", "4", "--learning-rate", "3e-2", "--max-length", "32",
         "--checkpoints", str(tmp_path / "checkpoints"), "--models", str(tmp_path / "models")]
    )  # fmt: skip
    results = json.loads(study.read_text())
    assert len(results["banks"]) == banks
    assert len(results["results"]) == 3 * banks
    full = json.loads((teacher / "metrics.json").read_text())["test"]["accuracy"]
    for row in results["results"]:
        assert row["exit_scores"]["4"] == pytest.approx(full)
    best = max(row["exit_scores"]["3"] for row in results["results"] if row["placement"] == "all")
    # Three classes of equal size.
    assert best > 0.4
    saved = load_classifier(str(tmp_path / "models" / ("mean" if compared == "heads" else "fastbert")))
    assert saved.exit_layers == (1, 2, 3)
    assert saved.config.exit_head == ("mean" if compared == "heads" else "fastbert")


def test_a_study_of_methods_of_exits_and_its_tables(
    program: Any, tiny_encoder: Path, task_folder: Path, tmp_path: Path
) -> None:
    module, study = program("early_exit_study"), tmp_path / "early-exits-toy.json"
    arguments = [
        "--model", str(tiny_encoder), "--data", str(task_folder), "--output", str(tmp_path / "runs"),
        "--json", str(study),
        "--epochs", "16", "--batch-size", "8", "--learning-rate", "2e-3", "--max-length", "32", "--seeds", "1",
    ]  # fmt: skip
    rows = ["fastbert", "deebert, mean heads", "pabee, mean heads", "student, then pabee", "alembert"]
    module.main([*arguments, "--rows", ";".join(rows)])
    results = json.loads(study.read_text())
    assert list(results["results"]) == rows
    teacher = results["teacher"]["1"]["test"]["accuracy"]
    for row, seeds in results["results"].items():
        test = seeds["1"]["test"]
        assert len(test["area_samples"]) == module.RESAMPLES
        # Resamples scatter around what they are drawn from.
        assert np.mean(test["area_samples"]) == pytest.approx(test["area"], abs=0.03)
        assert np.std(test["area_samples"]) > 0.01
        assert list(test["exits"]) == (["1", "2"] if row in rows[3:] else ["1", "2", "3", "4"])
    # A frozen backbone's last answers are the teacher's.
    assert results["results"]["fastbert"]["1"]["test"]["exits"]["4"] == pytest.approx(teacher)
    # A study from before there was a row goes on; one in which a row was something else does not.
    before = json.loads(study.read_text())
    added = before["settings"]["moving"].pop("alembert, two thirds")
    study.write_text(json.dumps(before))
    module.main([*arguments, "--rows", ";".join(rows)])
    assert json.loads(study.read_text())["results"] == before["results"]
    before["settings"]["moving"]["alembert"] = added
    (tmp_path / "other.json").write_text(json.dumps(before))
    with pytest.raises(InputError, match="other rows or settings"):
        module.main([*arguments[:7], str(tmp_path / "other.json"), *arguments[8:], "--rows", "alembert"])
    output = tmp_path / "tables"
    program("summarise_early_exits").main([str(study), "--output", str(output)])
    page = output.with_suffix(".md").read_text()
    assert all(f"| {row} | 1 |" in page for row in rows)
    assert output.with_suffix(".png").stat().st_size > 10_000

    together = program("exit_answers")
    together.main(
        ["--runs", str(tmp_path / "runs"), "--data", str(task_folder), "--json", str(tmp_path / "answers.json"),
         "--max-length", "32", "--rows", "deebert, mean heads;pabee;alembert", "--seeds", "1,2"]
    )  # fmt: skip
    (measured,) = json.loads((tmp_path / "answers.json").read_text()).values()
    assert list(measured["results"]) == ["deebert, mean heads", "alembert"]
    for row, result in measured["results"].items():
        seeds = result["seeds"]
        ways = seeds["1"]["ways"]
        assert list(result["difference_intervals"]) == list(together.WAYS)[1:]
        for way, (low, high) in result["difference_intervals"].items():
            assert low - 0.01 <= ways[way]["area"] - ways[together.OWN]["area"] <= high + 0.01
        assert list(ways) == list(together.WAYS)
        # Where exits answer for themselves it is the study's own curve, but for its other policies and placement.
        own, study_area = ways[together.OWN]["area"], results["results"][row]["1"]["test"]["area"]
        assert own == pytest.approx(study_area, abs=0.15)
        assert len(seeds["1"]["temperatures"]) == len(results["results"][row]["1"]["test"]["exits"])
    assert "| alembert | 1 | mean of all so far |" in (tmp_path / "answers-tables.md").read_text()
    with pytest.raises(InputError, match="holds no model"):
        together.main(
            ["--runs", str(tmp_path), "--data", str(task_folder), "--json", str(tmp_path / "answers.json")]
        )


def test_what_exits_say_together(program: Any) -> None:
    module = program("exit_answers")
    rng = np.random.default_rng(0)
    # Labels drawn from what the exits say are likeliest at temperature 1, so that logits times 2 want 2.
    logits = rng.normal(size=(20_000, 3))
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    labels = (chances.cumsum(-1) > rng.random((20_000, 1))).argmax(-1)
    split = module.Split(
        np.stack([2 * logits, logits], axis=1), labels, np.broadcast_to([0.25, 1.0], (20_000, 2))
    )
    temperatures = split.temperatures()
    assert temperatures == pytest.approx([2, 1], abs=0.06)
    said = np.log([[[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]]])
    mean = np.exp(module.geometric_mean(said))[0]
    assert mean[1] == pytest.approx([np.sqrt(0.45), np.sqrt(0.05)])
    assert mean[2] == pytest.approx([0.09 ** (1 / 3), 0.04 ** (1 / 3)])
    half = np.exp(module.half_of_before(said))[0]
    # √0.5·0.9 to √0.5·0.1 is 3 to 1; √0.75·0.2 to √0.25·0.8 is √3 to 2.
    assert half[1] == pytest.approx([0.75, 0.25])
    assert half[2] == pytest.approx(np.array([np.sqrt(3), 2]) / (np.sqrt(3) + 2))
    alone = np.exp(module.half_of_before_but_last(said))[0]
    assert alone[:2] == pytest.approx(half[:2])
    assert alone[2] == pytest.approx([0.2, 0.8])
    # Which texts leave at the first exit hangs on its temperature, what they cost on nothing else.
    policy = alembert.ExitPolicy("max_probability").resolve(3)
    for way, threshold in ((module.OWN, 2.0), ("temperature per exit", 1.0)):
        correct, shares = split.per_row(way, temperatures, policy)
        largest = np.exp(threshold * logits) / np.exp(threshold * logits).sum(-1, keepdims=True)
        leaves = (1 - largest.max(-1)) * 1.5 < module.SPEEDS[:, None]
        if way == module.OWN:
            assert (shares == np.where(leaves, 0.25, 1.0)).all()
        assert shares.mean(1) == pytest.approx(np.where(leaves, 0.25, 1.0).mean(1), abs=0.02)
        assert (correct == (logits.argmax(-1) == labels)).all()


def test_a_study_of_exits_can_leave_rows_out_that_stand_in_train(
    program: Any, tiny_encoder: Path, task_folder: Path, tmp_path: Path
) -> None:
    data, study = shutil.copytree(task_folder, tmp_path / "data"), tmp_path / "study.json"
    task = alembert.load_task(task_folder)
    new = len(set(task.dataset("test")["text"]) - set(task.dataset("train")["text"]))
    train = (data / "train.tsv").read_text().splitlines()
    with (data / "test.tsv").open("a") as file:
        file.writelines(f"{line}\n" for line in train[1:21])
    program("early_exit_study").main(
        ["--model", str(tiny_encoder), "--data", str(data), "--output", str(tmp_path / "runs"), "--json", str(study),
         "--epochs", "16", "--batch-size", "8", "--learning-rate", "2e-3", "--max-length", "32", "--seeds", "1",
         "--rows", "deebert", "--unseen-rows"]
    )  # fmt: skip
    results = json.loads(study.read_text())
    assert results["rows"]["train"] == 64 and new <= results["rows"]["test"] <= 32
    teacher = results["teacher"]["1"]["test"]["accuracy"]
    assert results["results"]["deebert"]["1"]["test"]["exits"]["4"] == pytest.approx(teacher)
    rows = results["rows"]["test"]
    assert teacher * rows == pytest.approx(round(teacher * rows))


def test_what_slim_exits_keep_of_a_teacher(
    program: Any, teacher: Path, fast: Path, task_folder: Path, tmp_path: Path
) -> None:
    module, path = program("slim_exits"), tmp_path / "slim.json"
    arguments = ["--teacher", str(teacher), "--data", str(task_folder), "--output", str(path)]
    with pytest.raises(InputError, match="holds no model"):
        module.main([*arguments, "--model", str(tmp_path)])
    module.main([*arguments, "--model", str(fast)])
    found = json.loads(path.read_text())
    accuracy = found["teacher"]["accuracy"]
    assert list(found["at_speedup"]) == [f"{speed_up:g}" for speed_up in module.SPEED_UPS]
    for result in found["at_speedup"].values():
        assert result["share_of_teacher"] == pytest.approx(result["accuracy"] / accuracy, abs=1e-4)
        low, high = result["share_interval"]
        assert low <= result["share_of_teacher"] <= high
    # Its exits save at most three quarters of four layers: beyond that only the commonest answer is cheaper.
    assert found["at_speedup"]["24"]["accuracy"] < found["at_speedup"]["2"]["accuracy"]


def test_areas_of_exits(program: Any) -> None:
    module = program("early_exit_study")
    shares = np.array([0.0, 1 / 12, 1 / 2, 1.0])
    # Constant between the bounds; then a straight line, whose mean is that of its ends.
    assert module.area(shares, np.array([0.1, 0.7, 0.7, 0.9])) == pytest.approx(0.7)
    assert module.area(shares, np.array([0.1, 0.5, 0.9, 0.9])) == pytest.approx(0.7)
    answers = module.ExitAnswers(
        (1, 2, 3, 4), np.zeros((2, 4, 2), np.float32), np.zeros((2, 3), np.float32), np.array([4, 4])
    )
    answers.logits[0, :, 1] = [1, 2, 3, 4]
    measured = module.Measured(answers, np.array([1, 1]), np.array([8.0, 8.0]), 0)
    assert measured.placed(2).answers.exit_layers == (1, 3, 4)
    assert measured.placed(2).answers.logits[0, :, 1].tolist() == [1, 3, 4]
    correct, macs = np.array([[1.0, 0.0], [1.0, 1.0]]), np.array([[2.0, 2.0], [6.0, 2.0]])
    shares, accuracies = measured.curve(correct, macs)
    # The commonest label, 0, is nobody's; then 4 of 16 MACs and one of two right, then 8 of 16 and both.
    assert shares.tolist() == [0.0, 0.25, 0.5] and accuracies.tolist() == [0.0, 0.5, 1.0]
    shares, accuracies = measured.curve(correct, macs, np.array([1.0, 0.0]))
    assert shares.tolist() == [0.0, 0.25, 0.75] and accuracies.tolist() == [0.0, 1.0, 1.0]


def test_a_study_of_students_and_its_tables(
    program: Any, teacher: Path, task_folder: Path, tmp_path: Path
) -> None:
    study = tmp_path / "students-toy.json"
    arguments = [
        "--teacher", str(teacher), "--data", str(task_folder), "--student", "2x16", "--shape", "2x16",
        "--output", str(tmp_path / "runs"), "--json", str(study), "--epochs", "1", "--max-length", "32",
    ]  # fmt: skip
    rows = ["labels alone", "labels alone, slower", "minilm-v2", "tinybert, no general stage"]
    program("student_study").main([*arguments, "--rows", ";".join(rows[:3]), "--seeds", "1,2"])
    program("student_study").main([*arguments, "--rows", rows[3], "--seeds", "1"])
    results = json.loads(study.read_text())
    assert {row: list(seeds) for row, seeds in results["students"].items()} == {
        **{row: ["1", "2"] for row in rows[:3]}, rows[3]: ["1"],
    }  # fmt: skip
    for row, seeds in results["students"].items():
        for seed, scores in seeds.items():
            folder = tmp_path / "runs" / f"{row.replace(', ', '-').replace(' ', '-')}-{seed}"
            metrics = json.loads((folder / "metrics.json").read_text())
            assert scores["test"]["accuracy"] == metrics["test"]["full"]["accuracy"]
    slower = json.loads((tmp_path / "runs" / "labels-alone-slower-1" / "alembert.json").read_text())
    assert slower["configuration"]["settings"]["learning_rate"] == pytest.approx(1e-4)
    halves = json.loads((tmp_path / "runs" / "minilm-v2-1" / "alembert.json").read_text())["configuration"]
    assert halves["options"]["intermediate_epochs"] + halves["settings"]["epochs"] == pytest.approx(1)
    program("summarise_students").main([str(study), "--output", str(tmp_path / "tables")])
    tables = (tmp_path / "tables.md").read_text()
    assert all(f"| {row} |" in tables for row in ["teacher", *rows])
    assert (tmp_path / "tables.png").read_bytes().startswith(b"\x89PNG")


def test_students_are_compared_with_the_better_of_the_labels_rates(program: Any) -> None:
    def seeds(*pairs: tuple[float, float]) -> dict[str, Any]:
        return {
            str(seed): {"dev": {"f1": dev}, "test": {"f1": test}} for seed, (dev, test) in enumerate(pairs, 1)
        }

    study = {
        "metric": "f1",
        "teacher": {"dev": {}, "test": {}},
        "students": {
            "labels alone": seeds((0.5, 0.4), (0.7, 0.6)),
            "labels alone, slower": seeds((0.6, 0.3), (0.6, 0.9), (0.1, 0.2)),
        },
    }
    assert program("summarise_students").baseline_scores(study) == pytest.approx([30, 60, 20])


def test_transport_between_layers_and_the_teachers_cache_are_timed(program: Any, tmp_path: Path) -> None:
    small = ["--rows", "4", "--tokens", "8", "--repeats", "2", "--threads", "1"]
    program("layer_emd_speed").main(
        [*small, "--teacher-layers", "2", "--student-layers", "1", "--output", str(tmp_path / "emd.json")]
    )
    emd = json.loads((tmp_path / "emd.json").read_text())
    assert 0 < emd["emd_ms"] < emd["step_ms"] and emd["pyemd_ms"] > 0
    assert 0 < emd["share_of_step"] < 1 and emd["pyemd_share_of_step"] > 0
    program("teacher_cache_speed").main(
        [*small, "--teacher", "2x24", "--student", "1x12", "--batch-size", "2", "--output",
         str(tmp_path / "cache.json")]
    )  # fmt: skip
    cache = json.loads((tmp_path / "cache.json").read_text())
    assert cache["times_faster"] > 0 and cache["preparation"]["bytes"] > 0


def test_cuts_of_data_are_always_the_same(program: Any, tmp_path: Path) -> None:
    data, output = tmp_path / "data", tmp_path / "cuts"
    sizes = {"glue_sst2": (5000, 20, 30), "glue_stsb": (3500, 20, 30), "glue_cola": (5000, 40, 0),
             "glue_rte": (600, 40, 0), "lcqmc": (0, 4000, 4500)}  # fmt: skip
    for name, counts in sizes.items():
        (data / name).mkdir(parents=True)
        for split, count in zip(("train", "dev", "test"), counts, strict=True):
            rows = "".join(f"{index % 2}\t{name} {split} {index}\n" for index in range(count))
            (data / name / f"{split}.tsv").write_text("label\ttext\n" + rows)
    program("student_data").main([str(data), str(output)])

    def rows(folder: str, split: str) -> list[str]:
        header, *found = (output / folder / f"{split}.tsv").read_text().splitlines()
        assert header == "label\ttext"
        return found

    assert [len(rows("sst2-4000", split)) for split in ("train", "dev", "test")] == [4000, 20, 30]
    assert [len(rows("cola", split)) for split in ("train", "dev", "test")] == [4200, 800, 40]
    assert rows("cola-4000", "train") == rows("cola", "train")[:4000]
    assert not set(rows("rte", "train")) & set(rows("rte", "dev"))
    assert [len(rows("lcqmc-4000", split)) for split in ("train", "dev", "test")] == [4000, 800, 3000]
    assert rows("sst2-4000", "train")[:2] != sorted(rows("sst2-4000", "train"))[:2]
    before = {path: path.read_bytes() for path in output.rglob("*.tsv")}
    program("student_data").main([str(data), str(output)])
    assert {path: path.read_bytes() for path in output.rglob("*.tsv")} == before


def test_ways_from_graph_to_graph(program: Any) -> None:
    arguments = ["--model", "2x24", "--exits", "1", "--batch", "2x5", "--precision", "fp32", "--repeats", "1"]
    rows = program("io_binding").main(arguments)["results"]
    assert [row["way"] for row in rows] == ["arrays", "OrtValues", "IO binding"]
    assert rows[0]["gain"] == 1.0 and all(row["ms"] > 0 and row["gain"] > 0 for row in rows)


def test_a_summary_of_compressions(program: Any, tmp_path: Path) -> None:
    row = {"name": "teacher", "kept": True, "dominated": False, "speed": 0.0, "metric": 0.9172, "risk": 0.001,
           "metric_difference": 0.0006, "texts_per_second": 1177.4, "ratio": 7.594, "p50_ms": 2.32,
           "rows_needed": None}  # fmt: skip
    measured = dict.fromkeys(("metric", "metric_difference", "texts_per_second", "ratio", "p50_ms"))
    over = row | measured | {"name": "student", "kept": False, "risk": 0.012}
    summary = {"verdict": "teacher: 7.6 times", "unsure": "perhaps: exits", "best": row, "candidates": [row, over],
               "seconds": 1322, "budget_seconds": 2400,
               "trainings": {"student": {"status": "done", "reason": None, "seconds": 505.2}}}  # fmt: skip
    (tmp_path / "compress-some.json").write_text(json.dumps(summary))
    output = tmp_path / "tables.md"
    page = program("summarise_compression").main(
        ["--output", str(output), str(tmp_path / "compress-some.json")]
    )
    assert output.read_text() == page
    assert "## some" in page and "**Teacher: 7.6 times.**" in page and "Perhaps: exits." in page
    assert "It took 22 min of 40 min. Trained: student 8 min." in page
    assert "| teacher | 0 | 91.7 | +0.1 | 1,177 | 7.6 | 2.3 | 0.1 | best |" in page
    assert "| student | – | – | – | – | – | – | 1.2 | over the budget |" in page


def test_attention_kernels(program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = program("attention_kernels")
    monkeypatch.setattr(module, "SHAPES", {"small": (2, 2, 5, 4)})
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    output = tmp_path / "kernels.json"
    results = module.main(["--repeats", "2", "--threads", "1", "--output", str(output)])
    assert json.loads(output.read_text()) == results
    passes = [(row["dtype"], row["pass"]) for row in results["results"]]
    assert len(set(passes)) == len(passes) == 4
    for row in results["results"]:
        low, high = row["quartiles"]
        assert 0 < low <= row["fused_over_products"] <= high
        assert row["fused_ms"] > 0 and row["products_ms"] > 0
