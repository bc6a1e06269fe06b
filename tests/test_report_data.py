"""What a report collects, against evaluation, prediction and formulas spelled out."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from safetensors.torch import load_file, save_file
from sklearn.metrics import confusion_matrix

import alembert
from alembert.benchmarks.calibration import calibrate, store
from alembert.benchmarks.comparison import benchmark
from alembert.benchmarks.comparison_settings import BenchmarkSettings
from alembert.benchmarks.evaluation import ExitAnswers, task_texts
from alembert.benchmarks.replayed_exits import ReplayedExits
from alembert.benchmarks.report_data import collect_report
from alembert.benchmarks.report_examples import confusions, examples
from alembert.benchmarks.report_exits import (
    MOST_CLASSES,
    OTHER_CLASSES,
    ExitAnswersOfTask,
    class_curve,
    reliability,
    uncertainty_histograms,
)
from alembert.benchmarks.report_rates import estimated_rates, rows_of, speeds_along
from alembert.benchmarks.report_runs import run_record, spread, training_curves
from alembert.benchmarks.report_verdict import verdict
from alembert.benchmarks.risk_budget import RiskBudget
from alembert.common.errors import InputError
from alembert.data.metrics import expected_calibration_error
from alembert.reports.layer_transport import layer_transport_history
from alembert.reports.page import wording
from alembert.runtime.calibration_file import model_files_fingerprint
from alembert.runtime.policies import ExitPolicy

QUICK = BenchmarkSettings(peers=(), repeats=1, timing_rows=8, latency_rows=2, own_processes=False)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory, fast: Path, task: alembert.Task) -> Path:
    folder = shutil.copytree(fast, tmp_path_factory.mktemp("calibrated") / "certified")
    classifier = alembert.AdaptiveClassifier.from_pretrained(folder, speed=0.0)
    budget = RiskBudget(most=0.2, confidence=0.8)
    record = calibrate(
        classifier, task, "dev", budget, model_name="certified", data_name="topics", speeds=[0.3, 0.5]
    )
    accepted = [row | {"accepted": True} for row in record["curve"]]
    store(record | {"speed": 0.5, "curve": accepted}, folder)
    return folder


@pytest.fixture(scope="module")
def report(teacher: Path, fast: Path, calibrated: Path, task: alembert.Task) -> dict[str, Any]:
    return collect_report([teacher, fast, calibrated], task, "test", settings=QUICK, examples=3)


def test_report_is_json_with_the_documented_keys(report: dict[str, Any]) -> None:
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert {"format", "title", "task", "machine", "price_per_hour", "benchmark", "verdict"} <= set(report)
    assert [model["name"] for model in report["models"]] == ["teacher", "fast", "certified"]
    assert report["task"]["rows"] == 32 and report["benchmark"]["measured_here"] is True
    assert report["compression"] is None


def test_curve_is_what_evaluation_measures(report: dict[str, Any], fast: Path, task: alembert.Task) -> None:
    classifier = alembert.AdaptiveClassifier.from_pretrained(fast)
    speeds = [0.0, 0.2, 0.5, 1.0]
    measured = alembert.evaluate(
        classifier, task, "test", speeds, model_name="fast", data_name="topics", repeats=0
    )
    exits = report["models"][1]["exits"]
    curve = exits["curve"]
    assert exits["layers"] == [1, 2, 3, 4] and len(exits["speeds"]) == 110
    for entry in measured["speeds"]:
        place = exits["speeds"].index(entry["speed"])
        assert curve["metric"][place] == entry["metric"]
        assert [curve["low"][place], curve["high"][place]] == entry["metric_interval"]
        assert curve["macs"][place] == pytest.approx(entry["macs"])
        assert curve["speedup"][place] == pytest.approx(entry["speedup"])
        assert curve["changed"][place] == pytest.approx(1 - entry["agreement"])
        assert [count / 32 for count in curve["counts"][place]] == list(entry["exits"].values())
        classes = exits["classes"]
        assert classes["rows"] == [11, 11, 10] and classes["labels"] == list(task.label_names)
        assert np.sum(classes["counts"][place], axis=0).tolist() == curve["counts"][place]
        assert sum(classes["right"][place]) / 32 == pytest.approx(entry["metric"])


def test_examples_are_what_the_runtime_answers(
    report: dict[str, Any], fast: Path, task: alembert.Task
) -> None:
    exits = report["models"][1]["exits"]
    classifier = alembert.AdaptiveClassifier.from_pretrained(fast)
    gold = dict(zip(task_texts(task, "test"), task.dataset("test")["labels"], strict=True))
    assert any(exits["examples"].values())
    for kind, found in exits["examples"].items():
        assert len(found) <= 3
        for example in found:
            (text,) = example["text"]
            answer = classifier.predict(text, speed=exits["example_speed"])
            assert example["label"] == task.label_names[gold[text]]
            assert example["exit"] == answer.exit
            taken = next(one for one in example["answers"] if one["layer"] == answer.exit)
            assert taken["answer"] == answer.label
            assert taken["probability"] == pytest.approx(answer.score, abs=1e-4)
            assert taken["wrong"] == (answer.label != example["label"])
            assert (kind == "late") == (answer.exit == 4)
            assert taken["wrong"] == (kind == "early_wrong") or kind == "late"


def test_the_calibrated_speed_leads_and_its_guarantee_is_told(report: dict[str, Any]) -> None:
    plain, fast, certified = (model["exits"] for model in report["models"])
    assert plain is None
    assert fast["default_from"] == "picked" and report["models"][1]["calibration"] is None
    assert (certified["default_speed"], certified["default_from"]) == (0.5, "calibrated")
    calibration = report["models"][2]["calibration"]
    assert (calibration["max_drop"], calibration["confidence"], calibration["rows"]) == (0.2, 0.8, 32)
    assert calibration["same_rows"] is False
    # Of the speeds below only one was tested, and the full model cannot differ from itself.
    assert calibration["certified_speeds"] == [0.3, 0.5]
    leading = report["verdict"]
    if leading["model"] == "certified":
        assert leading["guarantee"] == calibration and leading["speed"] == 0.5
    row = next(row for row in report["candidates"] if row["name"] == "certified" and row["speed"] == 0.5)
    assert row["ratio_to_baseline"] is not None


def test_measured_speeds_are_exact_and_others_lie_between(report: dict[str, Any]) -> None:
    exits = report["models"][2]["exits"]
    assert {0.0, 0.5} <= set(exits["measured_speeds"])
    for row in report["candidates"]:
        if row["name"] == "certified":
            place = exits["speeds"].index(row["speed"])
            for key in ("texts_per_second", "ratio_to_baseline"):
                assert exits[key][place] == row[key]
    assert all(rate > 0 for rate in exits["texts_per_second"])
    place = next(
        place for place, speed in enumerate(exits["speeds"]) if speed not in exits["measured_speeds"]
    )
    quotient = exits["texts_per_second"][place] / report["candidates"][0]["texts_per_second"]
    assert exits["ratio_to_baseline"][place] == pytest.approx(quotient)


def test_rates_between_and_beyond_measured_points() -> None:
    points = [{"macs": 100.0, "texts_per_second": 10.0}, {"macs": 50.0, "texts_per_second": 16.0}]
    seconds = lambda macs: 1 / estimated_rates(points, [macs])[0]  # type: ignore[index, operator]  # noqa: E731
    assert seconds(100) == pytest.approx(0.1) and seconds(50) == pytest.approx(1 / 16)
    assert seconds(75) == pytest.approx((0.1 + 1 / 16) / 2)
    slope = (0.1 - 1 / 16) / 50
    assert seconds(20) == pytest.approx(1 / 16 - 30 * slope)
    assert seconds(110) == pytest.approx(0.1 + 10 * slope)
    # A line that would promise more than the work saved is not believed.
    steep = [{"macs": 100.0, "texts_per_second": 10.0}, {"macs": 50.0, "texts_per_second": 40.0}]
    assert estimated_rates(steep, [25.0]) == [pytest.approx(80.0)]
    assert estimated_rates(points[:1], [50.0, None]) == [pytest.approx(20.0), None]
    assert estimated_rates([], [50.0]) is None


def test_speeds_along_a_curve() -> None:
    speeds, macs = [0.0, 0.2, 0.4, 0.6, 0.8], [100.0, 90.0, 70.0, 40.0, 20.0]
    # A quarter of what can be saved leaves 80, as near to 90 as to 70; three quarters leave 40.
    assert speeds_along(speeds, macs, (0.2, 0.75)) == [0.2, 0.6]
    assert speeds_along(speeds, macs, (0.01,)) == [0.0]
    assert speeds_along(speeds, [None, *macs[1:]], (0.5,)) == []


def test_pareto_front_is_what_nothing_beats(report: dict[str, Any]) -> None:
    rows = report["candidates"]
    for axis, sign in (("texts_per_second", 1), ("macs", -1), ("p50_ms", -1)):
        for row in rows:
            beaten = any(
                other["metric"] >= row["metric"]
                and sign * other[axis] >= sign * row[axis]
                and (other["metric"], other[axis]) != (row["metric"], row[axis])
                for other in rows
            )
            assert row["pareto"][axis] == (not beaten)


def test_extra_parts_are_merged_and_a_given_benchmark_is_used(
    report: dict[str, Any], teacher: Path, fast: Path, calibrated: Path, task: alembert.Task
) -> None:
    given = {
        "results": [
            {key: value for key, value in row.items() if key != "pareto"} for row in report["candidates"]
        ],
        "machine": report["machine"],
        "task": {"metric": "accuracy"},
        "split": "test",
        "rows": 32,
        "created": "then",
        **{key: report["benchmark"][key] for key in ("timing", "settings")},
    }
    sources = [teacher, fast]
    again = collect_report(
        sources,
        task,
        "test",
        benchmark=given,
        title="Ours",
        price_per_hour=2.5,
        extra={"compression": {"verdict": "x"}},
    )
    assert again["candidates"] == report["candidates"]
    assert again["benchmark"] == {**report["benchmark"], "measured_here": False, "created": "then"}
    assert (again["title"], again["price_per_hour"], again["compression"]) == (
        "Ours",
        2.5,
        {"verdict": "x"},
    )
    with pytest.raises(InputError, match="31 rows"):
        collect_report(sources, task, "test", benchmark=given | {"rows": 31})
    with pytest.raises(InputError, match="no 'machine'"):
        collect_report(
            sources,
            task,
            "test",
            benchmark={key: value for key, value in given.items() if key != "machine"},
        )
    without = [row for row in given["results"] if row["name"] != "fast"]
    with pytest.raises(InputError, match="does not hold"):
        collect_report(sources, task, "test", benchmark=given | {"results": without})
    # Its ratios are against its own first model.
    with pytest.raises(InputError, match="the same model first"):
        collect_report(sources[::-1], task, "test", benchmark=given)
    with pytest.raises(InputError, match="price"):
        collect_report(sources, task, "test", price_per_hour=-1.0)
    with pytest.raises(InputError, match="no train2"):
        collect_report(sources, task, "train2")


def offered_row(name: str, metric: float, rate: float, speed: float | None = None) -> dict[str, Any]:
    backend = "transformers" if name == "base" else "torch"
    return {
        "name": name, "backend": backend, "precision": "fp32", "batching": "by length", "speed": speed, "policy": None,
        "metric": metric, "metric_interval": [metric, metric], "texts_per_second": rate,
        "ratio_to_baseline": rate / 10, "speedup": 2.0, "macs": 1e6,
    }  # fmt: skip


def offering_model(
    name: str, speed: float | None = None, origin: str = "picked", calibration: dict[str, Any] | None = None
) -> dict[str, Any]:
    policy = {"name": "entropy"}
    exits = None if speed is None else {"default_speed": speed, "default_from": origin, "policy": policy}
    return {
        "exported": False, "name": name, "source": f"runs/{name}", "precision": "fp32", "exits": exits,
        "calibration": calibration,
        "metric": 0.9, "metric_interval": [0.9, 0.9],
    }  # fmt: skip


def certificate(speed: float = 0.3, **changes: Any) -> dict[str, Any]:
    return {
        "mode": "certified", "risk": "accuracy-drop", "max_drop": 0.03, "confidence": 0.95, "reference": None,
        "certified_speeds": [speed], "against_baseline": False, **changes,
    }  # fmt: skip


def test_verdict_prefers_what_is_certified_and_names_what_beats_it() -> None:
    rows = [
        offered_row("base", 0.9, 10),
        offered_row("plain", 0.9, 30),
        offered_row("sure", 0.88, 20, 0.3),
        offered_row("sure", 0.88, 25, 0.5),
        offered_row("other", 0.895, 40, 0.3),
    ]
    sure = certificate()
    models = [
        offering_model("plain"),
        offering_model("sure", 0.3, "calibrated", sure),
        offering_model("other", 0.3),
    ]
    chosen = verdict(models, rows)
    assert (chosen["model"], chosen["ratio"], chosen["ratio_kind"]) == ("sure", 2.0, "measured")
    assert chosen["drop"] == pytest.approx(0.02) and chosen["guarantee"] is sure
    # The model at another speed is neither another model nor another engine.
    assert [(other["name"], other["speed"]) for other in chosen["beaten_by"]] == [
        ("plain", None),
        ("other", 0.3),
    ]
    empirical = certificate(mode="empirical", certified_speeds=[])
    models[1] = offering_model("sure", 0.3, "calibrated", empirical)
    chosen = verdict(models, rows)
    assert (chosen["model"], chosen["guarantee"]) == ("other", None)
    bad = [
        *rows[:1],
        offered_row("plain", 0.5, 90),
        offered_row("sure", 0.8, 20, 0.3),
        offered_row("other", 0.7, 40, 0.3),
    ]
    assert verdict(models, bad)["model"] == "sure"


@pytest.mark.parametrize("changes", [{}, {"risk": "task-error", "max_drop": 0.3}])
def test_a_certificate_against_its_own_full_model_excuses_no_loss_against_the_baseline(
    changes: dict[str, Any],
) -> None:
    rows = [
        offered_row("base", 0.9, 10),
        offered_row("weak", 0.82, 12, 0.3),
        offered_row("lossless", 0.9, 40, 0.3),
    ]
    weak = certificate(**changes)
    models = [
        offering_model("base"),
        offering_model("weak", 0.3, "calibrated", weak),
        offering_model("lossless", 0.3),
    ]
    assert verdict(models, rows)["model"] == "lossless"
    kept = [*rows[:1], offered_row("weak", 0.89, 12, 0.3), rows[2]]
    assert verdict(models, kept)["model"] == "weak"


@pytest.mark.parametrize(
    ("name", "speed", "against_baseline"),
    [("base", 0.3, True), ("other", 0.3, False), ("other", 0.0, True), ("other", None, True)],
)
def test_a_guarantee_holds_at_any_certified_speed_and_says_whether_it_is_against_the_baseline(
    name: str, speed: float | None, against_baseline: bool
) -> None:
    sure = certificate(speed or 0.0, against_baseline=against_baseline)
    models = [offering_model(name, speed, "calibrated", sure)]
    if name != "base":
        models.insert(0, offering_model("base"))
    rows = [offered_row("base", 0.9, 10), offered_row(name, 0.9, 40, speed) | {"backend": "torch"}]
    chosen = verdict(models, rows, lead=f"runs/{name}")
    assert (chosen["guarantee"], chosen["against_baseline"]) == (sure, against_baseline)
    assert chosen["default_from"] == "calibrated"
    promise = {"confidence": 0.9}
    chosen = verdict(models, rows, lead=f"runs/{name}", promise=promise)
    assert (chosen["guarantee"], chosen["against_baseline"]) == (promise, True)


def test_a_choice_among_certified_models_is_as_sure_as_all_of_them_together() -> None:
    rows = [offered_row("base", 0.9, 10)]
    models = [offering_model("base")]
    for number in range(3):
        rows.append(offered_row(f"sure{number}", 0.89, 20 + number, 0.3))
        promised = certificate(created=f"day {number}")
        models.append(offering_model(f"sure{number}", 0.3, "calibrated", promised))
    chosen = verdict(models, rows)
    assert chosen["model"] == "sure2"
    assert chosen["guarantee"] == certificate(created="day 2") | {"confidence": 0.85, "among": 3}
    # Chosen elsewhere, it is one.
    assert verdict(models, rows, lead="runs/sure1")["guarantee"] == certificate(created="day 1")
    # A model and its export share one promise, which fails for both or for none.
    for model in models[1:]:
        model["calibration"] = certificate(created="once")
    assert verdict(models, rows)["guarantee"] == certificate(created="once")
    many = [
        offering_model(f"sure{number % 3}", 0.3, "calibrated", certificate(created=number))
        for number in range(30)
    ]
    assert verdict([models[0], *many], rows)["guarantee"]["confidence"] == 0.0


def test_a_promise_about_a_scale_says_nothing_of_the_metric() -> None:
    rows = [
        offered_row("base", 0.9, 10),
        offered_row("far", 0.81, 40, 0.3),
        offered_row("near", 0.9, 20, 0.3),
    ]
    far, near = certificate(max_drop=0.1, scale=5.0), certificate(max_drop=0.1, scale=5.0, created="later")
    models = [
        offering_model("base"),
        offering_model("far", 0.3, "calibrated", far),
        offering_model("near", 0.3, "calibrated", near),
    ]
    assert verdict(models, rows)["model"] == "near"


def test_rows_of_another_precision_are_not_a_models_own() -> None:
    sure = certificate()
    models = [offering_model("base"), offering_model("sure", 0.3, "calibrated", sure)]
    rows = [
        offered_row("base", 0.9, 10),
        offered_row("sure", 0.9, 80, 0.3) | {"precision": "bf16"},
        offered_row("sure", 0.9, 40, 0.3),
    ]
    assert verdict(models, rows)["ratio"] == 4.0
    models[1]["precision"] = "bf16"
    assert verdict(models, rows)["ratio"] == 8.0


def test_a_speed_that_was_not_tested_is_not_certified() -> None:
    models = [offering_model("base"), offering_model("other", 0.3, "calibrated", certificate(0.5))]
    rows = [offered_row("base", 0.9, 10), offered_row("other", 0.9, 40, 0.3)]
    assert verdict(models, rows)["guarantee"] is None


def test_where_nothing_met_the_aim_the_nearest_is_another_than_the_baseline() -> None:
    models = [offering_model("base"), offering_model("far", 0.3), offering_model("near", 0.3)]
    rows = [
        offered_row("base", 0.9, 10),
        offered_row("far", 0.5, 90, 0.3),
        offered_row("near", 0.8, 20, 0.3),
        offered_row("base", 0.9, 11) | {"backend": "torch"},
    ]
    assert (verdict(models, rows)["model"], verdict(models, rows)["met"]) == ("base", True)
    chosen = verdict(models, rows, met=False)
    assert (chosen["model"], chosen["met"]) == ("near", False)
    assert verdict(models[:1], rows, met=False)["model"] == "base"


def test_a_model_without_exits_is_certified_against_a_reference(
    teacher: Path, task: alembert.Task, tmp_path: Path
) -> None:
    folder = shutil.copytree(teacher, tmp_path / "student")
    classifier, reference = (
        alembert.AdaptiveClassifier.from_pretrained(path, speed=0.0) for path in (folder, teacher)
    )
    budget = RiskBudget(most=0.2, confidence=0.8)
    names = {"model_name": "student", "data_name": "topics", "reference_name": "teacher"}
    names |= {"reference_files": model_files_fingerprint(teacher)}
    store(calibrate(classifier, task, "dev", budget, reference=reference, **names), folder)
    report = collect_report([teacher, folder], task, "test", settings=QUICK, examples=1)
    calibration = report["models"][1]["calibration"]
    assert calibration["certified_speeds"] == [0.0] and report["models"][1]["exits"] is None
    assert report["verdict"]["met"] is True
    measured = {"results": report["candidates"], "machine": report["machine"], "task": report["task"]}
    searched = collect_report(
        [teacher, folder],
        task,
        "test",
        benchmark=report["benchmark"] | measured | {"split": "test", "rows": 32},
        extra={"compression": {"verdict": "nothing"}},
    )
    leading = searched["verdict"]
    assert (leading["met"], leading["model"], leading["guarantee"]) == (False, "student", calibration)
    assert leading["against_baseline"] is True
    # Another model of the same folder name is not what it was tested against.
    other = shutil.copytree(folder, tmp_path / "elsewhere" / "teacher", ignore=shutil.ignore_patterns("cal*"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"classifier_dropout": 0.1}))
    against = collect_report([other, folder], task, "test", settings=QUICK, examples=1)
    assert against["models"][1]["calibration"]["against_baseline"] is False


def test_a_benchmark_of_other_rows_or_weights_is_refused(
    report: dict[str, Any], teacher: Path, fast: Path, task: alembert.Task, tmp_path: Path
) -> None:
    given = benchmark([str(teacher), str(fast)], task, "test", data_name="topics", settings=QUICK)
    collect_report([teacher, fast], task, "test", benchmark=given, examples=1)
    turned = replace(task, splits=task.splits | {"test": task.dataset("test").shuffle(seed=3)})
    with pytest.raises(InputError, match="other rows of test"):
        collect_report([teacher, fast], turned, "test", benchmark=given)
    changed = shutil.copytree(fast, tmp_path / "fast")
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"classifier_dropout": 0.1}))
    with pytest.raises(InputError, match="has changed since"):
        collect_report([teacher, changed], task, "test", benchmark=given)


def test_a_benchmark_with_other_exits_than_the_models_have_is_refused(
    report: dict[str, Any], teacher: Path, fast: Path, calibrated: Path, task: alembert.Task
) -> None:
    settings = report["benchmark"]["settings"]
    given = {"results": report["candidates"], "task": report["task"], "split": "test", "rows": 32}
    given |= {"machine": report["machine"], "timing": report["benchmark"]["timing"]}
    for changes, message in (
        ({"exits": [1, 3]}, r"ran fast with exits \[1, 3\], the report shows it with \[1, 2, 3\]"),
        ({"policy": "margin"}, "with policy margin"),
        ({"top_k": 2}, "with top_k 2"),
    ):
        with pytest.raises(InputError, match=message):
            collect_report([teacher, fast], task, "test", benchmark=given | {"settings": settings | changes})
    same = settings | {"exits": [3, 1, 2]}
    collect_report([teacher, fast], task, "test", benchmark=given | {"settings": same}, examples=0)


def test_a_calibration_of_another_length_is_not_told(
    report: dict[str, Any], teacher: Path, task: alembert.Task, tmp_path: Path
) -> None:
    folder = shutil.copytree(teacher, tmp_path / "student")
    classifier, reference = (
        alembert.AdaptiveClassifier.from_pretrained(path, speed=0.0) for path in (folder, teacher)
    )
    names = {"model_name": "student", "data_name": "topics", "reference_name": "teacher"}
    names |= {"reference_files": model_files_fingerprint(teacher)}
    budget = RiskBudget(most=0.2, confidence=0.8)
    store(calibrate(classifier, task, "dev", budget, reference=reference, **names), folder)
    settings = replace(QUICK, max_length=6)
    short = collect_report([teacher, folder], task, "test", settings=settings, examples=0)
    assert short["models"][1]["max_length"] == 6 and short["models"][1]["calibration"] is None
    assert short["verdict"]["guarantee"] is None


def test_some_of_the_rows_that_a_model_was_calibrated_on_are_known(
    teacher: Path, calibrated: Path, task: alembert.Task
) -> None:
    some = replace(task, splits=task.splits | {"dev": task.dataset("dev").select(range(20))})
    kept: list[dict[str, Any]] = []
    report = collect_report(
        [teacher, calibrated],
        some,
        "dev",
        settings=QUICK,
        examples=0,
        drawn_from=task,
        doubts=["dev is old"],
        measured=kept.append,
    )
    assert report["models"][1]["calibration"]["same_rows"] is True
    assert (report["task"]["rows"], report["task"]["drawn_from"]) == (20, 32)
    (sentence,) = (text for text in wording.verdict_sentences(report) if "reaches" in text)
    assert "on 20 of the 32 texts" in sentence
    assert wording.verdict_sentences(report)[-1] == "Mind: dev is old: scores on them may flatter it."
    # What was measured can be given to the next report.
    again = collect_report(
        [teacher, calibrated], some, "dev", benchmark=json.loads(json.dumps(kept[0])), examples=0
    )
    assert again["candidates"] == report["candidates"]


def test_answers_that_are_no_numbers_are_told_before_anything_is_timed(
    teacher: Path, fast: Path, task: alembert.Task, tmp_path: Path
) -> None:
    broken = shutil.copytree(fast, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    (head,) = (
        name for name in weights if name.startswith("exit_heads.2.") and name.endswith("classifier.bias")
    )
    weights[head][0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="text 1 of test with NaN or infinity after layer 2"):
        collect_report([teacher, broken], task, "test", settings=QUICK)


def test_rows_of_another_engine_policy_or_model_are_not_taken_for_a_models_own() -> None:
    models = [offering_model("base"), offering_model("fast", 0.3)]
    models[1]["exits"]["policy"]["top_k"] = None
    rows = [
        offered_row("base", 0.9, 10),
        # What the benchmark exported of the first model is not what its folder holds.
        offered_row("base", 0.9, 90) | {"backend": "onnx", "precision": "int8"},
        offered_row("base", 0.9, 11) | {"backend": "torch"},
        offered_row("fast", 0.95, 99, 0.3) | {"policy": "margin"},
        offered_row("fast", 0.95, 98, 0.3) | {"policy": "entropy", "top_k": 2},
        offered_row("fast", 0.9, 40, 0.3) | {"policy": "entropy"},
    ]
    chosen = verdict(models, rows, lead="runs/base")
    assert (chosen["ratio"], chosen["beaten_by"][0]["backend"]) == (1.1, "onnx")
    assert verdict(models, rows, lead="runs/fast")["ratio"] == 4.0
    # Where names are whole paths, a folder's name alone is another's.
    named = [{"name": name} for name in ("teacher", "fast", "archive/fast")]
    assert rows_of(named, "archive/fast") == named[2:]
    assert rows_of(named, "fast") == named[1:2]
    assert rows_of(named, "runs/teacher") == named[:1]


def made_up(
    problem_type: str, names: tuple[str, ...], labels: Any, seed: int = 0
) -> tuple[ExitAnswersOfTask, ReplayedExits]:
    """Random answers of three exits."""
    random = np.random.default_rng(seed)
    rows = len(labels)
    logits = random.normal(size=(rows, 3, len(names) or 1)).astype(np.float32) * 2
    answers = ExitAnswers((2, 4, 6), logits, None, np.full(rows, 8))
    splits = {"test": Dataset.from_dict({"text": ["x"] * rows, "labels": labels.tolist()})}
    metrics = {"regression": ("pearson",), "multi_label_classification": ("f1_micro",)}
    task = alembert.Task("t", problem_type, names, metrics.get(problem_type, ("accuracy",)), splits)
    policy = ExitPolicy(
        "patience" if problem_type == "regression" else "entropy",
        problem_type,
        3,
        tolerance=0.5,
    )
    return ExitAnswersOfTask(answers, task, labels), ReplayedExits(answers, policy, labels)


def test_uncertainties_and_reliability_against_a_loop() -> None:
    labels = np.random.default_rng(1).integers(0, 3, 200)
    own, replayed = made_up("single_label_classification", ("a", "b", "c"), labels)
    histograms = uncertainty_histograms(own, replayed)
    for exit_ in range(2):
        wrong = own.answers.logits[:, exit_].argmax(-1) != labels
        expected = np.zeros(20, int)
        for value in replayed.uncertainties[wrong, exit_]:
            expected[min(int(value * 20), 19)] += 1
        assert histograms["wrong"][exit_] == expected.tolist()
        assert sum(histograms["right"][exit_]) == (~wrong).sum()
    parts = reliability(own)
    assert parts is not None and [part["layer"] for part in parts] == [2, 4, 6]
    for exit_, part in enumerate(parts):
        exponentials = np.exp(own.answers.logits[:, exit_].astype(float))
        probabilities = exponentials / exponentials.sum(-1, keepdims=True)
        assert part["metric"] == pytest.approx((probabilities.argmax(-1) == labels).mean())
        from_bins = sum(one["rows"] * abs(one["confidence"] - one["accuracy"]) for one in part["bins"]) / len(
            labels
        )
        assert part["expected_calibration_error"] == pytest.approx(from_bins, abs=1e-6)
        assert from_bins == pytest.approx(expected_calibration_error(probabilities, labels), abs=1e-6)


def test_confusions_are_those_that_grow() -> None:
    random = np.random.default_rng(2)
    labels, reference, early = (random.integers(0, 4, 300) for _ in range(3))
    own, _ = made_up("single_label_classification", ("a", "b", "c", "d"), labels)
    found = confusions(own.task, labels, early, reference)
    growth = confusion_matrix(labels, early) - confusion_matrix(labels, reference)
    np.fill_diagonal(growth, 0)
    assert found is not None and len(found) == (growth > 0).sum()
    names = "abcd"
    grown = [pair["count"] - pair["reference_count"] for pair in found]
    assert grown == sorted(grown, reverse=True)
    for pair in found:
        i, j = names.index(pair["label"]), names.index(pair["answer"])
        assert pair["count"] - pair["reference_count"] == growth[i, j]
        assert pair["rows"] == (labels == i).sum()


def test_several_labels_and_values() -> None:
    labels = np.random.default_rng(3).integers(0, 2, (60, 3)).astype(float)
    own, replayed = made_up("multi_label_classification", ("a", "b", "c"), labels)
    taken = [replayed.taken(speed) for speed in (0.0, 0.9)]
    curve = class_curve(own, taken)
    assert curve is not None and curve["rows"] == labels.sum(0).tolist()
    wrong = (own.answers.logits[np.arange(60), taken[1]] > 0) != labels
    assert curve["right"][1][0] == int((~wrong.any(-1) & (labels[:, 0] > 0)).sum())
    found = confusions(own.task, labels, own.decisions[:, 0], own.decisions[:, -1])
    missed = (labels[:, 1] > 0) & ~own.decisions[:, 0, 1]
    before = (labels[:, 1] > 0) & ~own.decisions[:, -1, 1]
    pair = next((one for one in found or [] if one["label"] == "b"), None)
    assert (pair is not None) == (missed.sum() > before.sum())
    parts = reliability(own)
    assert parts is not None and sum(one["rows"] for one in parts[0]["bins"]) == 180
    text = examples(own, replayed, ["x"] * 60, 0.9, 2)["early_right"][0]
    assert text["answers"][-1]["uncertainty"] is None

    values = np.random.default_rng(4).normal(size=50)
    own, replayed = made_up("regression", (), values)
    assert class_curve(own, [replayed.taken(0.5)]) is None
    assert reliability(own) is None and confusions(own.task, values, values, values) is None
    assert own.wrong[:, -1].sum() == 25
    shown = examples(own, replayed, [("x", "y")] * 50, 0.7, 2)
    assert shown["late"][0]["text"] == ["x", "y"] and shown["late"][0]["answers"][0]["probability"] is None


def test_many_classes_are_counted_together() -> None:
    names = tuple(f"class {index}" for index in range(MOST_CLASSES + 6))
    labels = np.concatenate([np.arange(len(names)), np.repeat(np.arange(MOST_CLASSES), 3)])
    own, replayed = made_up("single_label_classification", names, labels)
    curve = class_curve(own, [replayed.taken(0.0)])
    assert curve is not None and curve["labels"] == [*names[:MOST_CLASSES], OTHER_CLASSES]
    assert curve["rows"] == [4] * MOST_CLASSES + [6]


def test_long_texts_are_cut() -> None:
    labels = np.random.default_rng(5).integers(0, 2, 20)
    own, replayed = made_up("single_label_classification", ("a", "b"), labels)
    (shown,) = examples(own, replayed, ["word " * 500] * 20, 0.3, 1)["late"]
    assert len(shown["text"][0]) <= 802 and shown["text"][0].endswith(" …")


def test_runs_leave_their_training_and_provenance(fast: Path, tmp_path: Path) -> None:
    record = run_record(str(fast))
    assert record["configuration"]["method"] == "ms-bert" and record["versions"]["alembert"]
    assert set(record["files"]) == {"config.json", "model.safetensors"}
    (stage, *_) = record["training"]
    log = json.loads((fast / "trainer_state.json").read_text())
    logged = [entry for entry in log[stage["name"]]["log_history"] if "loss" in entry]
    assert stage["terms"]["loss"]["values"] == [entry["loss"] for entry in logged]
    names = {key for entry in logged for key in entry if key.startswith("terms/")}
    assert {f"terms/{name}" for name in stage["terms"] if name != "loss"} == names
    assert run_record(str(tmp_path))["training"] == []
    (tmp_path / "trainer_state.json").write_text('{"stage": {"log_history": 3}}')
    with pytest.raises(InputError, match="no training log"):
        training_curves(tmp_path)
    # That of transformers, beside a checkpoint of its Trainer.
    own = {"global_step": 20, "log_history": [{"step": 10, "loss": 0.5}, {"step": 20, "loss": float("nan")}]}
    (tmp_path / "trainer_state.json").write_text(json.dumps(own))
    (only,) = training_curves(tmp_path)
    assert (only["name"], only["steps"], only["score"]) == ("training", 20, None)
    assert only["terms"] == {"loss": {"steps": [10, 20], "values": [0.5, None]}}
    assert layer_transport_history(tmp_path) == {}
    (tmp_path / "metrics.json").write_text('{"dev": {"loss": NaN}}')
    assert run_record(str(tmp_path))["recorded_metrics"] == {"dev": {"loss": None}}
    (tmp_path / "steps" / "1-tinybert").mkdir(parents=True)
    (tmp_path / "trainer_state.json").write_text(json.dumps(log))
    (tmp_path / "steps" / "1-tinybert" / "trainer_state.json").write_text(json.dumps(log))
    assert training_curves(tmp_path)[0]["name"].startswith("1-tinybert: ")


def test_spread_keeps_both_ends() -> None:
    assert spread(3, 5) == [0, 1, 2]
    assert spread(0, 5) == []
    kept = spread(1000, 7)
    assert (kept[0], kept[-1], len(kept)) == (0, 999, 7)
