"""The comparison with what people use: what is measured, how it is put into numbers, and what is refused."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import alembert
from alembert.benchmarks.comparison import benchmark
from alembert.benchmarks.comparison_engines import ModelFacts, Opener, check_models
from alembert.benchmarks.comparison_rows import Candidate, Measurements, OutsideCandidate, as_scores
from alembert.benchmarks.comparison_settings import DEFAULT_SPEEDS, BenchmarkSettings
from alembert.benchmarks.engines import EngineSettings, decisions, load_engine, manifest_macs
from alembert.benchmarks.evaluation import task_texts
from alembert.benchmarks.flops import CostModel
from alembert.benchmarks.outside import OutsideProgram, ProcessRun, read_labels
from alembert.benchmarks.plain_onnx import export_plain_int8
from alembert.benchmarks.pruning import segment_macs
from alembert.benchmarks.timing import Timing, take_turns
from alembert.benchmarks.worker import EngineRequests, ProcessWorker, peak_memory_mb
from alembert.cli.app import run
from alembert.common.errors import InputError
from alembert.data.metrics import compute_metrics
from alembert.reports.benchmark import benchmark_rows, benchmark_table, plot_benchmark, write_benchmark_csv
from alembert.runtime.export import export_classifier
from alembert.runtime.manifest import Manifest, Segment

NAMES = ("food", "sport", "weather")
QUICK = BenchmarkSettings(
    peers=(), speeds=(0.0, 0.5), repeats=2, timing_rows=8, latency_rows=3, own_processes=False
)


def engine_settings(source: Path, kind: str, **others: Any) -> EngineSettings:
    values: dict[str, Any] = {"precision": "fp32", "batch_size": 8, "batch_tokens": 100, "threads": 1}
    return EngineSettings(str(source), kind, **(values | others))


@pytest.fixture(scope="module")
def results(teacher: Path, fast: Path, task: alembert.Task) -> dict[str, Any]:
    return benchmark([str(teacher), str(fast)], task, "test", data_name="topics", settings=QUICK)


def test_take_turns_collects_what_candidates_measured() -> None:
    order: list[str] = []

    def candidate(name: str) -> Callable[[], str]:
        values = iter(f"{name}{turn}" for turn in range(4))
        return lambda: order.append(name) or next(values)  # type: ignore[func-returns-value]

    seen: list[tuple[int, int]] = []
    collected = take_turns(
        {name: candidate(name) for name in "ab"}, repeats=3, progress=lambda *steps: seen.append(steps)
    )
    assert collected == {"a": ["a1", "a2", "a3"], "b": ["b1", "b2", "b3"]}
    assert ["".join(sorted(order[turn : turn + 2])) for turn in range(0, 8, 2)] == ["ab"] * 4
    assert seen == [(step, 8) for step in range(1, 9)]


def test_rows_hold_the_stock_models_and_evaluates_numbers(
    results: dict[str, Any], teacher: Path, fast: Path, task: alembert.Task
) -> None:
    rows = results["results"]
    assert [(row["name"], row["backend"], row["precision"], row["speed"]) for row in rows] == [
        ("teacher", "transformers", "fp32", None),
        ("teacher", "torch", "fp32", None),
        ("fast", "torch", "fp32", 0.0),
        ("fast", "torch", "fp32", 0.5),
    ]
    texts, labels = task_texts(task, "test"), np.array(task.dataset("test")["labels"])
    model = AutoModelForSequenceClassification.from_pretrained(teacher).eval()
    batch = AutoTokenizer.from_pretrained(teacher)(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        stock = compute_metrics(task.problem_type, ["accuracy"], model(**batch).logits.numpy(), labels)
    assert rows[0]["metric"] == rows[1]["metric"] == stock["accuracy"]
    classifier = alembert.AdaptiveClassifier.from_pretrained(fast)
    measured = alembert.evaluate(
        classifier, task, "test", [0.0, 0.5], model_name="fast", data_name="topics", repeats=0
    )
    for row, entry in zip(rows[2:], measured["speeds"], strict=True):
        for key in ("metric", "metric_interval", "macs", "policy", "top_k", "renormalise"):
            assert row[key] == pytest.approx(entry[key]), key
        taken = {layer: share for layer, share in entry["exits"].items() if share}
        assert row["exits"] == pytest.approx(taken)
    assert rows[0]["exits"] == {"4": 1.0}
    assert rows[3]["speedup"] == pytest.approx(rows[0]["macs"] / rows[3]["macs"])
    assert rows[0]["policy"] is rows[1]["policy"] is None


def test_every_row_has_what_was_measured(results: dict[str, Any]) -> None:
    baseline, whole, full, quick = results["results"]
    for row in results["results"]:
        assert row["texts_per_second"] > 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"]
        assert row["load_seconds"] > 0 < row["tokenisation_ms"] and row["peak_memory_mb"] is None
        low, high = row["ratio_to_baseline_quartiles"]
        assert low <= row["ratio_to_baseline"] <= high
    assert baseline["ratio_to_baseline"] == baseline["p50_ratio_to_baseline"] == 1.0
    assert (baseline["batch_size"], baseline["batch_tokens"]) == (32, None)
    timing = results["timing"]
    assert whole["batch_size"] is None
    assert whole["batch_tokens"] == round(32 * timing["mean_tokens"])
    assert (timing["rows"], timing["latency_rows"], timing["rounds"]) == (8, 3, 2)
    assert whole["full_depth"] is None
    assert full["full_depth"]["ratio"] == full["full_depth"]["speedup"] == 1.0
    depth = quick["full_depth"]
    assert depth["ratio_over_speedup"] == pytest.approx(depth["ratio"] / depth["speedup_executed"])
    assert depth["ratio_over_paper_speedup"] == pytest.approx(depth["ratio"] / depth["speedup"])
    # The heads of torch compute less than the papers charge: more was saved than the papers' count says.
    assert depth["speedup_executed"] > depth["speedup"]
    assert depth["speedup"] == pytest.approx(full["macs"] / quick["macs"], rel=0.3) != 1.0
    json.dumps(results, allow_nan=False)


def test_speeds_are_the_models_own_unless_given(fast: Path, teacher: Path, tmp_path: Path) -> None:
    calibrated = shutil.copytree(fast, tmp_path / "calibrated")
    config = json.loads((calibrated / "config.json").read_text())
    (calibrated / "config.json").write_text(json.dumps(config | {"speed": 0.3}))
    opened: list[float] = []

    def measure(source: Path, speeds: tuple[float, ...] | None) -> list[float]:
        from contextlib import ExitStack

        opened.clear()
        with ExitStack() as stack:
            chosen = BenchmarkSettings(peers=(), speeds=speeds, own_processes=False)
            opener = Opener(chosen, 1, stack, ["the soup"], np.array([0]), lambda *_: None)
            candidates = opener.open_all([ModelFacts.read(str(source))], tmp_path)
        return [candidate.speed for candidate in candidates[1:]]

    assert measure(calibrated, None) == [0.3]
    assert measure(calibrated, (0.7, 0.1, 0.7)) == [0.7, 0.1]
    assert measure(fast, None) == list(DEFAULT_SPEEDS)
    assert measure(teacher, (0.7, 0.1)) == [0.0]


class Scripted:
    """A worker that gives prepared replies."""

    def __init__(
        self, labels: list[Any], exits: list[int], macs: list[float], executed: list[float] | None = None
    ) -> None:
        self.reply = {"labels": labels, "exit_layers": exits, "macs": macs, "macs_executed": executed}
        self.reply["lengths"] = [10] * len(labels)

    def ask(self, what: str, **how: Any) -> Any:
        assert what == "answers"
        return self.reply

    def close(self) -> None: ...


def scripted(worker: Scripted, speed: float, has_exits: bool = True) -> Candidate:
    candidate = Candidate("m", "torch", "fp32", "by length", None, 64, worker, None, has_exits, 0.5, speed)
    candidate.answer([])
    return candidate


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, fast: Path) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "fast-int8"
    export_classifier(fast, folder, precision="int8", count_macs=segment_macs)
    return folder


def test_exported_models_and_onnx_peers(
    teacher: Path, fast: Path, exported: Path, task: alembert.Task
) -> None:
    settings = replace(QUICK, peers=("onnx-int8", "onnx-int8-sorted"), speeds=(0.0, 0.9))
    models = [str(teacher), str(fast), str(exported)]
    rows = benchmark(models, task, "test", data_name="topics", settings=settings)["results"]
    assert [(row["name"], row["backend"], row["precision"], row["batching"]) for row in rows] == [
        ("teacher", "transformers", "fp32", "input order"),
        ("teacher", "onnxruntime", "int8", "input order"),
        ("teacher", "onnx", "int8", "by length"),
        ("teacher", "torch", "fp32", "by length"),
        *[("fast", "torch", "fp32", "by length")] * 2,
        *[("fast-int8", "onnx", "int8", "by length")] * 2,
    ]
    baseline, plain, whole, _, *adaptive = rows
    assert plain["macs"] is plain["speedup"] is None
    assert min(row["agreement"] for row in rows[:4]) > 0.9
    assert whole["macs"] == pytest.approx(baseline["macs"], rel=0.02)
    for torch_row, onnx_row in zip(adaptive[:2], adaptive[2:], strict=True):
        assert onnx_row["speed"] == torch_row["speed"]
        assert onnx_row["policy"] == torch_row["policy"] == "entropy"
        # Rows at the threshold may take another exit in int8.
        assert onnx_row["macs"] == pytest.approx(torch_row["macs"], rel=0.1)
        assert onnx_row["metric"] == pytest.approx(torch_row["metric"], abs=0.1)
    assert adaptive[3]["full_depth"]["speedup"] == pytest.approx(
        adaptive[1]["full_depth"]["speedup"], rel=0.15
    )
    assert plain["macs_executed"] is None
    # Of its last layer an exported model computes the first token alone, where the head reads no other.
    assert whole["macs_executed"] < baseline["macs_executed"] > adaptive[2]["macs_executed"]


def test_a_worker_of_an_exported_model_has_no_torch(exported: Path) -> None:
    program = (
        "import json, sys\n"
        "from alembert.benchmarks.worker import EngineRequests, EngineSettings\n"
        "requests = EngineRequests(EngineSettings(**json.loads(sys.argv[1])))\n"
        "assert requests.ask('answers', texts=['the soup'], speed=0.5)['labels'] == ['food']\n"
        "assert not {'torch', 'transformers', 'sklearn', 'datasets'} & set(sys.modules)\n"
    )
    settings = json.dumps(asdict(engine_settings(exported, "alembert", precision="int8")))
    done = subprocess.run([sys.executable, "-c", program, settings], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_an_exported_model_is_no_baseline(exported: Path, fast: Path) -> None:
    with pytest.raises(InputError, match="run directory"):
        check_models([str(exported), str(fast)])
    facts = check_models([str(fast), str(exported)])[1]
    assert (facts.exported, facts.precision, facts.has_exits) == (True, "int8", True)
    assert facts.label_names == NAMES


def test_numbers_of_a_row(task: alembert.Task) -> None:
    truth = np.array([0, 1, 2, 1])
    full = scripted(Scripted(["food", "sport", "weather", "sport"], [4] * 4, [8.0] * 4, [8.0] * 4), 0.0)
    quick = scripted(
        Scripted(
            ["food", "sport", "food", "sport"], [1, 1, 2, 4], [2.0, 2.0, 4.0, 8.0], [1.5, 1.5, 3.5, 6.5]
        ),
        0.5,
    )
    quick.worker = full.worker
    measured = Measurements(
        task,
        truth,
        sample=np.array([3, 0]),
        timings={full.title: Timing([2.0, 4.0, 6.0]), quick.title: Timing([1.0, 1.0, 2.0])},
        latencies={full.title: [[0.008, 0.012], [0.01, 0.03]], quick.title: [[0.002, 0.006], [0.004, 0.004]]},
        latency_rows=1,
        memory={id(full.worker): 123.0},
        tokenisation={id(full.worker): 0.004},
    )
    row = measured.row(quick, [full, quick])
    assert (row["metric"], row["agreement"]) == (0.75, 0.75)
    assert row["texts_per_second"] == 2.0  # of 2, 2 and 1
    assert row["ratio_to_baseline"] == 3.0  # of 2, 4 and 3, round by round
    assert row["ratio_to_baseline_quartiles"] == [2.5, 3.5]
    assert (row["macs"], row["macs_executed"], row["speedup"]) == (4.0, 3.25, 2.0)
    assert row["exits"] == {"1": 0.5, "2": 0.25, "4": 0.25}
    assert row["p50_ms"] == pytest.approx(4.0)
    assert row["mean_ms"] == pytest.approx(4.0)
    assert row["p95_ms"] == pytest.approx(np.quantile([2, 6, 4, 4], 0.95))
    assert row["p50_ratio_to_baseline"] == pytest.approx((10 / 4 + 20 / 4) / 2)
    assert row["p50_ratio_to_baseline_quartiles"] == pytest.approx([10 / 4 + 2.5 / 4, 20 / 4 - 2.5 / 4])
    assert row["full_depth"] == {
        "ratio": 3.0,
        "ratio_quartiles": [2.5, 3.5],
        "speedup": 16 / 10,  # of the two timed texts alone
        "speedup_executed": 16 / 8,
        "ratio_over_speedup": 3.0 / 2.0,
        "ratio_over_paper_speedup": 3.0 / 1.6,
        "latency_ratio": pytest.approx((10 / 4 + 20 / 4) / 2),
        "latency_ratio_quartiles": pytest.approx([2.5 + 2.5 / 4, 5 - 2.5 / 4]),
        "latency_speedup": 1.0,  # the one text that was run alone never left
        "latency_speedup_executed": 8 / 6.5,
        "latency_ratio_over_speedup": pytest.approx(3.75 * 6.5 / 8),
        "latency_ratio_over_paper_speedup": pytest.approx(3.75),
    }
    quick.macs_executed = None
    unknown = measured.row(quick, [full, quick])
    assert unknown["macs_executed"] is unknown["full_depth"]["ratio_over_speedup"] is None
    assert unknown["full_depth"]["ratio_over_paper_speedup"] == 3.0 / 1.6
    assert (row["peak_memory_mb"], row["load_seconds"]) == (123.0, 0.5)
    assert row["tokenisation_ms"] == pytest.approx(2.0)


def test_decisions_of_every_problem_type() -> None:
    logits = np.array([[0.2, 0.9, -1.0], [3.0, -2.0, 0.0]])
    assert decisions(logits, "single_label_classification", NAMES) == ["sport", "food"]
    assert decisions(logits, "multi_label_classification", NAMES) == [["food", "sport"], ["food", "weather"]]
    assert decisions(logits[:, :1], "regression", ()) == pytest.approx([0.2, 3.0])
    assert as_scores([["food"], []], "multi_label_classification", NAMES).tolist() == [
        [1.0, -1.0, -1.0],
        [-1.0, -1.0, -1.0],
    ]
    assert as_scores([0.25, 3.0], "regression", ()).tolist() == [[0.25], [3.0]]


@settings(deadline=None, max_examples=25)
@given(st.lists(st.lists(st.floats(-5, 5), min_size=3, max_size=3), min_size=1, max_size=6), st.data())
def test_scores_of_decisions_score_as_the_logits(rows: list[list[float]], data: st.DataObject) -> None:
    logits = np.array(rows)
    logits[logits == 0] = 1e-3
    truth = np.array(data.draw(st.lists(st.integers(0, 2), min_size=len(rows), max_size=len(rows))))
    for kind, labels in (
        ("single_label_classification", truth),
        ("multi_label_classification", np.eye(3, dtype=int)[truth]),
    ):
        metrics = ("accuracy", "f1_macro") if kind.startswith("single") else ("subset_accuracy", "f1_micro")
        scores = as_scores(decisions(logits, kind, NAMES), kind, NAMES)
        assert compute_metrics(kind, metrics, scores, labels) == compute_metrics(
            kind, metrics, logits, labels
        )


def test_macs_of_an_exported_model() -> None:
    names: dict[str, Any] = {"inputs": (), "outputs": ("logits",)}
    segments = tuple(
        Segment(f"segment-{n}.onnx", "", first, last, last, **names)
        for n, (first, last) in enumerate([(1, 2), (3, 3), (4, 6)], 1)
    )
    manifest = Manifest(
        "int8", "bert", 6, 32, "single_label_classification", NAMES, None, None, None, 64, None, 0, 0, "",
        segments, macs=(1050, 520, 1500), opset=17,
    )  # fmt: skip
    exits, lengths = np.array([2, 3, 6, 2]), np.array([128, 128, 64, 32])
    # A layer takes 500, as the last segment tells; the first head 50, the second 20.
    assert manifest_macs(manifest, exits, lengths, ()).tolist() == [1000, 1500, 1500, 250]
    assert manifest_macs(manifest, exits, lengths, (3,)).tolist() == [1000, 1520, 1510, 250]
    assert manifest_macs(manifest, exits, lengths, (2, 3)).tolist() == [1050, 1570, 1535, 262.5]
    assert manifest_macs(manifest, exits, lengths).tolist() == [1050, 1570, 1535, 262.5]


def test_engines_answer_alike_and_count_alike(teacher: Path, fast: Path, task: alembert.Task) -> None:
    texts = task_texts(task, "dev")
    stock = load_engine(engine_settings(teacher, "transformers"))
    ours = load_engine(engine_settings(fast, "alembert", exits=(2,), policy="margin"))
    assert stock.policy is None
    assert ours.policy == {"name": "margin", "top_k": None, "renormalise": None, "tolerance": None}
    printed = {"policy": "top_k_entropy", "top_k": 2, "renormalise": False}
    assert load_engine(engine_settings(fast, "alembert", **printed)).policy == {
        "name": "top_k_entropy", "top_k": 2, "renormalise": False, "tolerance": None,
    }  # fmt: skip
    answers, others = stock.answer(texts, 0.9), ours.answer(texts, 0.0)
    assert answers.labels == others.labels
    assert set(answers.exit_layers) == set(others.exit_layers) == {4}
    assert [stock.answer_one(text, 0.0) for text in texts[:4]] == answers.labels[:4]
    assert [ours.answer_one(text, 0.0) for text in texts[:4]] == answers.labels[:4]
    lengths = stock.lengths(texts)
    assert lengths.tolist() == ours.lengths(texts).tolist() == [len(text.split()) + 2 for text in texts]
    costs = CostModel.from_model(AutoModelForSequenceClassification.from_pretrained(teacher))
    assert stock.macs(answers.exit_layers, lengths, 0.0).tolist() == costs.full_model_macs(lengths).tolist()
    assert ours.macs(others.exit_layers, lengths, 0.0).tolist() == costs.full_model_macs(lengths).tolist()
    left = ours.answer(texts, 1.0).exit_layers
    assert set(left) == {2}
    assert (ours.macs(left, lengths, 1.0) < 0.7 * costs.full_model_macs(lengths)).all()


def test_the_full_model_of_a_model_with_exits_is_a_baseline(fast: Path, teacher: Path) -> None:
    texts = ["the soup was there", "we saw the goal and the race", "rain again"]
    whole = load_engine(engine_settings(fast, "transformers"))
    assert (
        whole.answer(texts, 0.0).labels
        == load_engine(engine_settings(teacher, "transformers")).answer(texts, 0.0).labels
    )
    half = load_engine(engine_settings(teacher, "transformers", precision="bf16"))
    assert half.answer(texts, 0.0).labels == whole.answer(texts, 0.0).labels


def test_the_plain_way_to_onnx_int8(teacher: Path, fast: Path, task: alembert.Task, tmp_path: Path) -> None:
    texts = task_texts(task, "test")
    stock = load_engine(engine_settings(teacher, "transformers"))
    for source in (teacher, fast):
        folder = export_plain_int8(str(source), tmp_path / source.name)
        assert sorted(path.name for path in folder.glob("*.onnx")) == ["model.onnx"]
        graph = onnx.load(folder / "model.onnx").graph
        assert sum(node.op_type == "MatMulInteger" for node in graph.node) > 4 * 4
        plain = load_engine(engine_settings(folder, "onnxruntime", precision="int8", max_length=32))
        answers, expected = plain.answer(texts, 0.0), stock.answer(texts, 0.0)
        agree = [one == other for one, other in zip(answers.labels, expected.labels, strict=True)]
        assert np.mean(agree) > 0.9
        assert answers.exit_layers.tolist() == expected.exit_layers.tolist()
        assert [plain.answer_one(text, 0.0) for text in texts[:3]] == answers.labels[:3]
        assert plain.lengths(texts).tolist() == stock.lengths(texts).tolist()
        assert plain.macs(answers.exit_layers, stock.lengths(texts), 0.0) is None


def test_requests_carry_what_json_can(fast: Path) -> None:
    requests = EngineRequests(engine_settings(fast, "alembert"))
    texts = ["the soup", "the goal was again", "rain"]
    requests.ask("hold", texts=texts, alone=texts[:2])
    reply = requests.ask("answers", texts=texts, speed=0.8)
    assert json.loads(json.dumps(reply)) == reply
    assert len(reply["labels"]) == len(reply["exit_layers"]) == len(reply["macs"]) == 3
    assert requests.ask("throughput", speed=0.5) > 0
    assert len(requests.ask("latencies", speed=0.5)) == 2
    assert requests.ask("lengths", texts=texts) == [4, 6, 3]


def test_a_worker_of_its_own(fast: Path) -> None:
    settings = engine_settings(fast, "alembert", exits=(1, 3))
    with ProcessWorker(settings) as worker:
        here = EngineRequests(settings)
        texts = ["the soup was there", "we saw the goal", "rain and wind"]
        for speed in (0.0, 0.9):
            theirs = worker.ask("answers", texts=texts, speed=speed)
            assert theirs == here.ask("answers", texts=texts, speed=speed)
        memory = worker.ask("peak_memory")
        assert 50 < memory < 5000
        # A refusal leaves the worker as it was.
        with pytest.raises(InputError, match="text 1 is empty"):
            worker.ask("answers", texts=["soup", ""], speed=0.0)
        with pytest.raises(RuntimeError, match="no_such_request"):
            worker.ask("no_such_request")
        assert worker.ask("lengths", texts=texts) == [6, 6, 5]
        worker._process.kill()
        with pytest.raises(RuntimeError, match="ended with code -9"):
            worker.ask("lengths", texts=texts)


def test_peak_memory_is_read_from_the_system(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("VmPeak:\t  900 kB\nVmHWM:\t  2000 kB\nVmRSS:\t 100 kB\n")
    assert peak_memory_mb(status) == 2.048
    before = peak_memory_mb()
    kept = np.ones(30_000_000)
    after = peak_memory_mb()
    assert before is not None and after is not None and kept.any()
    assert after - before > 100 or before > 1000


PROGRAM = """
import sys, time
words = {"soup": "food", "bread": "food", "cheese": "food", "goal": "sport", "match": "sport"}
texts = open(sys.argv[1]).read().splitlines()
time.sleep(0.01 * len(texts))
labels = [next((words[w] for w in text.split() if w in words), "weather") for text in texts]
open(sys.argv[2], "w").write("\\n".join(labels) + "\\n")
"""


@pytest.fixture
def program(tmp_path: Path) -> OutsideProgram:
    script = tmp_path / "their program.py"
    script.write_text(PROGRAM)
    return OutsideProgram.parse(f"theirs={sys.executable} -S '{script}' {{input}} {{output}}")


def test_outside_programs(program: OutsideProgram, task: alembert.Task) -> None:
    labels, taken = program.label(["a  soup", "the\ngoal", "rain"])
    assert labels == ["food", "sport", "weather"]
    assert 0.03 < taken.seconds < 10
    assert 3 < taken.peak_memory_mb < 60  # a bare interpreter; this process has far more
    texts = task_texts(task, "test")
    outside = OutsideCandidate.measure(program, task, texts)
    assert outside.labels == program.label(texts)[0]
    assert outside.seconds(texts) > 0.2  # 0.01 s a text, on whatever machine


def test_the_start_of_an_outside_program_is_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        OutsideProgram,
        "label",
        lambda _, texts: ([""] * len(texts), ProcessRun(5 + 0.25 * len(texts), 9.0)),
    )
    outside = OutsideCandidate(OutsideProgram("theirs", ""), [], 9.0)
    assert outside.seconds(["a", "b", "c", "d"]) == pytest.approx(1.0)
    monkeypatch.setattr(OutsideProgram, "label", lambda _, texts: ([""] * len(texts), ProcessRun(5.0, 9.0)))
    assert outside.seconds(["a", "b"]) == np.inf


def test_an_outside_programs_row(program: OutsideProgram, task: alembert.Task) -> None:
    truth = np.array([0, 1])
    baseline = scripted(Scripted(["food", "food"], [4, 4], [8.0, 8.0]), 0.0, has_exits=False)
    outside = OutsideCandidate(program, ["food", "sport"], 12.0)
    timings = {baseline.title: Timing([2.0]), outside.title: Timing([4.0])}
    measured = Measurements(task, truth, np.arange(2), timings, {}, 0, {}, {id(baseline.worker): 0.1})
    row, other = measured.outside_row(outside, baseline), measured.row(baseline, [baseline])
    assert set(other) <= set(row)
    assert (row["metric"], row["agreement"], row["peak_memory_mb"]) == (1.0, 0.5, 12.0)
    assert (row["texts_per_second"], row["ratio_to_baseline"]) == (0.5, 0.5)
    assert row["p50_ms"] is row["macs"] is row["speed"] is other["p50_ms"] is None
    hidden = replace(measured, timings=timings | {outside.title: Timing([np.inf])}).outside_row(
        outside, baseline
    )
    assert hidden["texts_per_second"] is hidden["ratio_to_baseline"] is None
    assert set(hidden) == set(row)


def test_outside_programs_that_fail_are_refused() -> None:
    def failing(command: str) -> str:
        with pytest.raises(InputError) as caught:
            OutsideProgram.parse(f"theirs={command}").label(["soup", "goal"])
        return str(caught.value)

    assert "cannot be started" in failing("/no/such/program {input} {output}")
    assert "code 3: too bad" in failing("sh -c 'echo too bad >&2; exit 3' {input} {output}")
    assert "wrote nothing" in failing("true {input} {output}")
    assert "1 labels for 2 texts" in failing("sh -c 'head -n 1 $0 > $1' {input} {output}")
    for wrong, words in (("theirs", "NAME=command"), ("=cat {input} {output}", "NAME=command"),
                         ("theirs=cat {input}", "{output}")):  # fmt: skip
        with pytest.raises(InputError, match=words):
            OutsideProgram.parse(wrong)


def test_labels_of_outside_programs() -> None:
    assert read_labels(["food", "sport"], "single_label_classification", NAMES, "x") == ["food", "sport"]
    assert read_labels(["food|sport", ""], "multi_label_classification", NAMES, "x") == [
        ["food", "sport"],
        [],
    ]
    assert read_labels(["0.5", "-1"], "regression", (), "x") == [0.5, -1.0]
    with pytest.raises(InputError, match="line 2: 'foot'"):
        read_labels(["food", "foot"], "single_label_classification", NAMES, "x")
    with pytest.raises(InputError, match="line 1: 'food'"):
        read_labels(["food"], "regression", (), "x")


def test_models_that_cannot_be_compared_are_refused(teacher: Path, fast: Path, tmp_path: Path) -> None:
    other = shutil.copytree(teacher, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    names = {"0": "food", "1": "sport", "2": "politics"}
    config |= {"id2label": names, "label2id": {name: int(key) for key, name in names.items()}}
    (other / "config.json").write_text(json.dumps(config))
    for models, words in (
        ([], "at least one model"),
        ([str(teacher), str(teacher)], "given twice"),
        ([str(teacher), str(other)], "other labels"),
        ([str(tmp_path / "nowhere")], "nowhere"),
    ):
        with pytest.raises(InputError, match=words):
            check_models(models)
    for wrong, words in (
        ({"peers": ("tflite",)}, "tflite"),
        ({"speeds": (0.5, 2.0)}, "2.0"),
        ({"speeds": ()}, "no speeds"),
        ({"torch_precisions": ("fp8",)}, "fp8"),
        ({"batch_size": 0}, "batch_size"),
    ):
        with pytest.raises(InputError, match=words):
            BenchmarkSettings(**wrong)


def prepared(rows: int = 4) -> dict[str, Any]:
    """Results of a made-up benchmark of a teacher, a student, an adaptive model and a program."""

    def row(name: str, backend: str, precision: str, rate: float, p50: float | None, **others: Any) -> Any:
        values: dict[str, Any] = {
            "name": name, "backend": backend, "precision": precision, "batching": "by length",
            "batch_size": None, "batch_tokens": 512, "speed": None, "policy": None, "metric": 0.95,
            "metric_interval": [0.94, 0.96], "agreement": 1.0, "texts_per_second": rate,
            "texts_per_second_quartiles": [rate * 0.9, rate * 1.1], "ratio_to_baseline": rate / 50,
            "ratio_to_baseline_quartiles": [rate / 55, rate / 45], "p50_ms": p50,
            "p95_ms": p50 and 2 * p50, "p99_ms": p50 and 3 * p50, "mean_ms": p50,
            "p50_ratio_to_baseline": p50 and 20 / p50, "macs": 1e9, "speedup": 1.0, "exits": {},
            "full_depth": None, "peak_memory_mb": 900.0, "load_seconds": 1.0, "tokenisation_ms": 0.1,
        }  # fmt: skip
        return values | others

    adaptive = [
        row(
            "fast-int8", "onnx", "int8", 300 * (1 + 4 * speed), 4 / (1 + 4 * speed), speed=speed,
            metric=0.95 - 0.05 * speed**2, policy="entropy",
            full_depth={"ratio": 1 + 4 * speed, "ratio_quartiles": [1.0, 2.0], "speedup": 1 + 4 * speed},
        )
        for speed in np.linspace(0, 0.9, rows).round(1).tolist()
    ]  # fmt: skip
    return {
        "data": "clinc150", "split": "test", "rows": 5500, "machine": {"threads": 2},
        "task": {"metric": "accuracy"},
        "timing": {"rows": 512, "rounds": 5, "latency_rows": 64, "mean_tokens": 12.3},
        "results": [
            row("teacher", "transformers", "fp32", 50, 20.0, batching="input order", batch_size=32),
            row("teacher", "transformers", "bf16", 150, 8.0, batching="input order", batch_size=32),
            row("teacher", "onnxruntime", "int8", 280, 5.0, metric=0.948, batching="input order"),
            row("teacher", "onnx", "int8", 320, 4.2, metric=0.948),
            row("tiny", "torch", "fp32", 400, 3.0, metric=0.93),
            *adaptive,
            row("theirs", "outside", "", 90, None, metric=0.91),
        ],
    }  # fmt: skip


def test_table_csv_and_plot(tmp_path: Path) -> None:
    from rich.console import Console

    results = prepared()
    console = Console(width=100, record=True, file=(tmp_path / "out").open("w"))
    console.print(benchmark_table(results))
    text = console.export_text()
    assert "1,380.0 27.60×" in " ".join(text.split())
    assert "512 texts a round, 5 rounds, 12 tokens a text" in " ".join(text.split())
    assert text.count("fast-int8") == 1
    write_benchmark_csv(tmp_path / "b.csv", results)
    with (tmp_path / "b.csv").open() as file:
        flat = list(csv.DictReader(file))
    assert len(flat) == len(results["results"]) == len(benchmark_rows(results))
    assert (flat[0]["metric_lower"], flat[0]["texts_per_second_upper"]) == ("0.94", str(50 * 1.1))
    assert (flat[0]["full_depth_ratio"], flat[5]["full_depth_ratio"]) == ("", "1.0")
    plot_benchmark(results, tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    for row in results["results"]:
        row["p50_ms"] = None
    results["results"][-1] |= {"texts_per_second": None, "ratio_to_baseline": None}
    console.print(benchmark_table(results))
    plot_benchmark(results, tmp_path / "c.png")
    del results["results"][0]["metric"]
    with pytest.raises(InputError, match="metric"):
        benchmark_rows(results)
    with pytest.raises(InputError, match="no rows"):
        benchmark_table(results | {"results": []})


def quick_command(*arguments: object) -> list[str]:
    flags = [
        "--peers",
        "none",
        "--one-process",
        "--repeats",
        "1",
        "--timing-rows",
        "6",
        "--latency-rows",
        "2",
    ]
    return ["benchmark", *(str(argument) for argument in arguments), *flags]


def test_command(
    teacher: Path, fast: Path, task_folder: Path, tmp_path: Path, program: OutsideProgram,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    output = tmp_path / "measured"
    command = quick_command(
        teacher, fast, "--data", task_folder, "--speed", "0,0.5", "--output", output,
        "--against", f"{program.name}={program.command}",
    )  # fmt: skip
    capfd.readouterr()
    assert run([*command, "--json"]) == 0
    results = json.loads(capfd.readouterr().out)
    assert json.loads((output / "benchmark.json").read_text()) == results
    assert [row["name"] for row in results["results"]] == ["teacher", "teacher", "fast", "fast", "theirs"]
    assert results["machine"]["threads"] == results["settings"]["threads"] == torch.get_num_threads()
    assert (output / "benchmark.png").stat().st_size > 10_000
    assert len((output / "benchmark.csv").read_text().splitlines()) == 6


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    def check(*arguments: object) -> str:
        capfd.readouterr()
        assert run(quick_command(*arguments)) == 2
        captured = capfd.readouterr()
        assert captured.out == ""
        return captured.err

    yield check


def test_command_refuses_before_it_measures(
    refused: Callable[..., str], teacher: Path, fast: Path, task_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    common = ["--data", task_folder, "--output", output]
    for arguments, words in (
        ([teacher, *common, "--speed", "1.5"], "1.5"),
        ([teacher, *common, "--against", "theirs"], "NAME=command"),
        ([teacher, *common, "--against", "x=run 'a {input} {output}"], "no shell line"),
        ([teacher, *common, "--torch-precision", "int4"], "int4"),
        ([fast, *common, "--exits", "2,9"], "no exit after layer 9"),
        ([fast, *common, "--policy", "guess"], "guess"),
        (
            [fast, *common, "--peers", "none", "--one-process", "--tolerance", "0.2"],
            "under the policy patience",
        ),
        ([tmp_path / "none", *common], "none"),
        ([teacher, "--data", tmp_path / "none", "--output", output], "none"),
        ([teacher, "--data", task_folder, "--output", task_folder / "dev.tsv"], "is a file"),
    ):
        assert words in refused(*arguments), arguments
        assert not output.exists()
