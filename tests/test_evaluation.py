"""What `evaluate` measures: the contract of its results, and that they fit together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

import alembert
from alembert import AdaptiveClassifier, InputError, Task
from alembert.benchmarks.calibration import calibrate, store
from alembert.benchmarks.evaluation import task_texts
from alembert.benchmarks.flops import CostModel
from alembert.benchmarks.risk_budget import RiskBudget
from alembert.cli import evaluate as evaluate_command
from alembert.common.files import read_json

SPEEDS = [0.0, 0.3, 0.6, 1.0]


@pytest.fixture(scope="module")
def classifier(fast: Path) -> AdaptiveClassifier:
    return AdaptiveClassifier.from_pretrained(fast)


@pytest.fixture(scope="module")
def results(classifier: AdaptiveClassifier, task: Task) -> dict[str, Any]:
    return alembert.evaluate(
        classifier,
        task,
        "test",
        SPEEDS,
        model_name="runs/fast",
        data_name="topics",
        repeats=1,
        timing_rows=20,
    )


def test_every_key_of_the_contract_is_there(results: dict[str, Any]) -> None:
    assert {"alembert_version", "created", "model", "data", "split", "rows", "task", "machine"} <= set(
        results
    )
    assert {"batch_tokens", "repeats", "full_model", "speeds"} <= set(results)
    assert (results["model"], results["data"], results["split"], results["rows"]) == (
        "runs/fast", "topics", "test", 32,
    )  # fmt: skip
    assert results["task"] == {
        "problem_type": "single_label_classification", "metric": "accuracy", "num_labels": 3,
    }  # fmt: skip
    assert {"processor", "cores", "threads", "torch", "transformers", "device"} <= set(results["machine"])
    assert {
        "metric", "metrics", "macs", "flops", "texts_per_second", "texts_per_second_quartiles",
    } <= set(results["full_model"])  # fmt: skip
    assert [row["speed"] for row in results["speeds"]] == SPEEDS
    for row in results["speeds"]:
        assert {
            "speed", "policy", "top_k", "metric", "metric_interval", "metrics", "agreement", "macs", "flops",
            "macs_full_convention", "speedup", "exits", "exit_metrics", "texts_per_second",
            "texts_per_second_quartiles", "ratio_to_full", "ratio_to_full_quartiles",
        } <= set(row)  # fmt: skip
    assert json.loads(json.dumps(results, allow_nan=False)) == results


def test_speed_0_is_the_full_model(results: dict[str, Any], classifier: AdaptiveClassifier) -> None:
    first, full = results["speeds"][0], results["full_model"]
    for name in ("metric", "metrics", "macs", "flops"):
        assert first[name] == full[name]
    assert first["agreement"] == first["speedup"] == 1.0
    assert first["exits"] == {"1": 0.0, "2": 0.0, "3": 0.0, "4": 1.0}


def test_numbers_of_a_row_fit_together(results: dict[str, Any]) -> None:
    full = results["full_model"]
    assert [row["macs"] for row in results["speeds"]] != [full["macs"]] * len(SPEEDS)
    for row in results["speeds"]:
        assert row["flops"] == 2 * row["macs"]
        assert row["speedup"] == pytest.approx(full["macs"] / row["macs"])
        assert sum(row["exits"].values()) == pytest.approx(1.0)
        low, high = row["metric_interval"]
        assert 0 <= low <= row["metric"] <= high <= 1
        assert row["metric"] == row["metrics"]["accuracy"]
        assert row["same_exit_as_replayed"] == 1.0
        low, high = row["ratio_to_full_quartiles"]
        assert 0 < low <= row["ratio_to_full"] <= high
        low, high = row["texts_per_second_quartiles"]
        assert 0 < low <= row["texts_per_second"] <= high
        for layer, entry in row["exit_metrics"].items():
            assert entry["rows"] == pytest.approx(row["exits"][layer] * 32)
            assert 0 <= entry["expected_calibration_error"] <= 1


def test_quality_is_that_of_the_answers_given(
    results: dict[str, Any], classifier: AdaptiveClassifier, task: Task
) -> None:
    dataset = task.dataset("test")
    names = np.array(task.label_names)[np.array(dataset["labels"])]
    full = [prediction.label for prediction in classifier.predict(list(dataset["text"]))]
    costs = CostModel.from_model(classifier.backend.model)
    for row in results["speeds"]:
        predictions = classifier.predict(list(dataset["text"]), speed=row["speed"])
        labels = np.array([prediction.label for prediction in predictions])
        exits = np.array([prediction.exit for prediction in predictions])
        assert row["metric"] == pytest.approx(float((labels == names).mean()))
        assert row["agreement"] == pytest.approx(float((labels == np.array(full)).mean()))
        assert row["exits"] == {str(layer): pytest.approx((exits == layer).mean()) for layer in (1, 2, 3, 4)}
        lengths = np.array([len(ids["input_ids"]) for ids in classifier.encode(list(dataset["text"]))])
        active = classifier.exit_layers[:-1] if row["speed"] > 0 else ()
        each = [
            costs.macs(np.array([layer]), np.array([length]), active_exits=active).item()
            for layer, length in zip(exits, lengths, strict=True)
        ]
        assert row["macs"] == pytest.approx(np.mean(each))
        for layer, entry in row["exit_metrics"].items():
            left = exits == int(layer)
            assert entry["metric"] == pytest.approx(float((labels == names)[left].mean()))


@pytest.mark.parametrize("policy", ["margin", "patience", "learned", "max_probability"])
def test_other_policies(classifier: AdaptiveClassifier, task: Task, policy: str) -> None:
    results = alembert.evaluate(
        classifier, task, "dev", [0.5, 1.0], model_name="m", data_name="d", policy=policy, repeats=1
    )
    assert [row["policy"] for row in results["speeds"]] == [policy] * 2
    assert [row["same_exit_as_replayed"] for row in results["speeds"]] == [1.0] * 2


def test_time_can_be_left_out(classifier: AdaptiveClassifier, task: Task) -> None:
    results = alembert.evaluate(classifier, task, "dev", [0.5], model_name="m", data_name="d", repeats=0)
    assert "texts_per_second" not in results["full_model"]
    assert "ratio_to_full" not in results["speeds"][0]


def test_a_stock_model_can_be_evaluated(teacher: Path, task: Task) -> None:
    classifier = AdaptiveClassifier.from_pretrained(teacher)
    results = alembert.evaluate(classifier, task, "dev", [0.0, 0.9], model_name="m", data_name="d", repeats=1)
    assert [row["exits"] for row in results["speeds"]] == [{"4": 1.0}] * 2
    assert results["speeds"][0]["metric"] == results["speeds"][1]["metric"] == results["full_model"]["metric"]


def test_the_command_measures_what_predictions_are_made_with(
    fast: Path, task: Task, task_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(fast, tmp_path / "fast"))
    found_with = AdaptiveClassifier.from_pretrained(
        fast, speed=0.0, policy="margin", exits=[1], max_length=16
    )
    record = calibrate(
        found_with,
        task,
        "test",
        RiskBudget(most=0.5, mode="empirical"),
        model_name="fast",
        data_name="topics",
    )
    store(record, folder)
    assert record["speed"] not in [step / 10 for step in range(10)]
    app = typer.Typer()
    app.command()(evaluate_command.evaluate)

    def measured(*options: str) -> dict[str, Any]:
        output = tmp_path / "results"
        arguments = [
            str(folder),
            "--data",
            str(task_folder),
            "--output",
            str(output),
            "--repeats",
            "0",
            *options,
        ]
        app(arguments, standalone_mode=False)
        results: dict[str, Any] = read_json(output / "results.json")
        return results

    def share_right(**options: Any) -> float:
        answers = AdaptiveClassifier.from_pretrained(folder, **options).predict(task_texts(task, "test"))
        labels = [task.label_names[label] for label in task.dataset("test")["labels"]]
        return float(np.mean([answer.label == label for answer, label in zip(answers, labels, strict=True)]))

    (own,) = (row for row in measured()["speeds"] if row["speed"] == record["speed"])
    assert own["policy"] == "margin" and set(own["exits"]) == {"1", "4"}
    assert own["metric"] == pytest.approx(share_right())
    for name, value in (("speed", "0.3"), ("policy", "entropy")):
        rows = measured(f"--{name}", value)["speeds"]
        assert all(set(row["exits"]) == {"1", "2", "3", "4"} for row in rows)
        assert all(row["policy"] == "entropy" for row in rows)
        if name == "speed":
            assert rows[0]["metric"] == pytest.approx(share_right(speed=0.3))


def test_wrong_requests_are_refused(classifier: AdaptiveClassifier, task: Task) -> None:
    for speeds, words in (([], "no speeds"), ([0.5, 2.0], "number from 0")):
        with pytest.raises(InputError, match=words):
            alembert.evaluate(classifier, task, "dev", speeds, model_name="m", data_name="d")
    with pytest.raises(InputError, match="no holdout split"):
        alembert.evaluate(classifier, task, "holdout", [0.5], model_name="m", data_name="d")
