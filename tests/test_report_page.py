"""The report's page, Markdown and pictures: what they say, that nothing in them is markup or comes from outside."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from alembert.cli.app import run
from alembert.common.errors import InputError
from alembert.reports.page import add_layer_transport, render_page, wording
from alembert.reports.page.rendering import json_in_html
from alembert.reports.page_summary import escaped, markdown
from alembert.reports.report_files import write_report

ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)>"
LAYERS = [1, 2, 3]
SPEEDS = [0.0, 0.1, 0.3, 0.5, 0.9]
METRICS = [0.9, 0.9, 0.88, 0.8, 0.7]
RATES = [20.0, 22.0, 40.0, 50.0, 80.0]


def row(name: str, backend: str, metric: float, rate: float, speed: float | None = None) -> dict[str, Any]:
    return {
        "name": name, "backend": backend, "precision": "fp32", "batching": "by length", "batch_size": None,
        "batch_tokens": 64, "speed": speed, "policy": None, "metric": metric,
        "metric_interval": [metric - 0.02, metric + 0.02], "agreement": 1.0, "texts_per_second": rate,
        "texts_per_second_quartiles": [rate, rate], "ratio_to_baseline": rate / 10,
        "ratio_to_baseline_quartiles": [rate / 10, rate / 10], "p50_ms": 100 / rate, "p95_ms": 120 / rate,
        "p99_ms": 130 / rate, "mean_ms": 100 / rate, "p50_ratio_to_baseline": 1.0, "macs": 4e9 / rate,
        "speedup": rate / 10, "exits": {"3": 1.0}, "full_depth": None, "peak_memory_mb": 300.0,
        "load_seconds": 1.0, "tokenisation_ms": 0.1,
        "pareto": {"texts_per_second": metric < 0.9, "macs": metric < 0.9, "p50_ms": True},
    }  # fmt: skip


def example(text: str, exit_: int) -> dict[str, Any]:
    answers = [
        {"layer": layer, "answer": "good", "probability": 0.9, "uncertainty": 0.2, "wrong": layer == 1}
        for layer in LAYERS
    ]
    return {"text": [text], "label": ATTACK, "exit": exit_, "answers": answers}


def calibration_part() -> dict[str, Any]:
    """Of speed 0.3, with 0.1 not among the speeds that were tested."""
    return {
        "speed": 0.3, "risk": "accuracy-drop", "max_drop": 0.01, "confidence": 0.95, "mode": "certified",
        "per_class": False, "reference": None, "certified_speeds": [0.3], "data": "reviews", "split": "dev",
        "rows": 1200, "same_rows": False, "at_speed": {}, "next": None, "created": None,
    }  # fmt: skip


def exit_part(calibrated: bool) -> dict[str, Any]:
    counts = [[0, 0, 100], [10, 5, 85], [40, 30, 30], [70, 20, 10], [95, 5, 0]]
    return {
        "layers": LAYERS,
        "policy": {"name": "entropy", "top_k": None, "renormalise": None, "tolerance": None},
        "speeds": SPEEDS,
        "default_speed": 0.3,
        "default_from": "calibrated" if calibrated else "picked",
        "example_speed": 0.3,
        "curve": {
            "metric": METRICS,
            "low": [value - 0.02 for value in METRICS],
            "high": [value + 0.02 for value in METRICS],
            "changed": [0.0, 0.01, 0.03, 0.12, 0.2],
            "macs": [2e8, 1.9e8, 1e8, 8e7, 5e7],
            "speedup": [1.0, 1.05, 2.0, 2.5, 4.0],
            "counts": counts,
        },
        "texts_per_second": RATES,
        "ratio_to_baseline": [rate / 10 for rate in RATES],
        "measured_speeds": [0.0, 0.3],
        "classes": {
            "labels": [ATTACK, "good"],
            "rows": [50, 50],
            "counts": [[[c / 2 for c in part], [c / 2 for c in part]] for part in counts],
            "right": [[45, 45]] * 5,
        },
        "uncertainty": {
            "edges": [0.0, 0.5, 1.0],
            "right": [[60, 20], [70, 20]],
            "wrong": [[5, 15], [5, 5]],
        },
        "examples": {"early_right": [example(ATTACK, 1)], "late": [example("fine", 3)], "early_wrong": []},
    }


def model(
    name: str, exits: dict[str, Any] | None, calibration: dict[str, Any] | None = None
) -> dict[str, Any]:
    layers = LAYERS if exits else LAYERS[-1:]
    bins = [
        {"low": 0.4, "high": 0.6, "rows": 20, "confidence": 0.5, "accuracy": 0.4},
        {"low": 0.8, "high": 1.0, "rows": 80, "confidence": 0.9, "accuracy": 0.95},
    ]
    curve = {"steps": [1, 10, 20], "values": [1.0, None, 0.5]}
    return {
        "name": name,
        "source": f"runs/{name}",
        "exported": False,
        "layers": 3,
        "parameters": 1000,
        "max_length": 64,
        "metric": 0.9,
        "metric_interval": [0.88, 0.92],
        "reliability": [
            {"layer": layer, "metric": 0.9, "expected_calibration_error": 0.05, "bins": bins}
            for layer in layers
        ],
        "exits": exits,
        "calibration": calibration,
        "confusions": {
            "against": "its full model",
            "pairs": [{"label": ATTACK, "answer": "good", "count": 9, "reference_count": 4, "rows": 50}],
        },
        "run": {
            "training": [
                {
                    "name": "task",
                    "steps": 20,
                    "terms": {"loss": curve, "exit_1": curve},
                    "score": {"steps": [20], "values": [0.9]},
                }
            ],
            "configuration": {
                "command": "distill",
                "method": "fastbert",
                "options": {"k": None, "kl": ATTACK},
            },
            "versions": {"alembert": "0.1.0"},
            "finished": "2026-01-01",
            "recorded_metrics": {"dev": {"accuracy": 0.9}},
            "export": None,
            "files": {"config.json": "0" * 64},
            "transport": [
                {
                    "name": name,
                    "steps": [1, 20],
                    "kinds": {
                        "hidden": {
                            "flows": [[[0.5, 0.0], [0.0, 0.5]]] * 2,
                            "student_weights": [[0.5, 0.5]] * 2,
                            "teacher_weights": [[0.4, 0.6]] * 2,
                        }
                    },
                }
            ],
        },
    }


def made_report(calibrated: bool = True) -> dict[str, Any]:
    exits, calibration = exit_part(calibrated), calibration_part() if calibrated else None
    return {
        "format": 1,
        "alembert_version": "0.1.0",
        "created": "2026-01-01T00:00:00+00:00",
        "title": f"reviews {ATTACK}",
        "task": {
            "name": "reviews", "problem_type": "single_label_classification", "metric": "accuracy",
            "metrics": ["accuracy"], "labels": [ATTACK, "good"], "num_labels": 2, "is_pair": False,
            "split": "test", "rows": 100, "rows_sha256": "f" * 64,
        },
        "machine": {"processor": "A processor", "threads": 1, "device": "cpu"},
        "price_per_hour": 0.36,
        "benchmark": {
            "measured_here": True, "created": "then", "settings": {},
            "timing": {"rows": 50, "rounds": 3, "latency_rows": 5, "mean_tokens": 20.0},
        },
        "verdict": {
            "model": "fast", "speed": 0.3, "default_from": exits["default_from"], "metric": 0.88,
            "metric_interval": [0.86, 0.9], "drop": 0.003, "ratio": 4.08, "ratio_kind": "measured",
            "texts_per_second": 40.0, "fewer_macs": 2.0, "guarantee": calibration,
            "against_baseline": True, "met": True, "baseline": "teacher (transformers fp32)",
            "baseline_metric": 0.9, "beaten_by": [],
        },
        "candidates": [
            row("teacher", "transformers", 0.9, 10.0),
            row("fast", "torch", 0.9, 20.0, 0.0),
            row("fast", "torch", 0.88, 40.0, 0.3),
        ],
        "models": [model("teacher", None), model("fast", exits, calibration)],
        "compression": {
            "verdict": ATTACK,
            "candidates": [{"name": "small", "accuracy": 0.8, "dominated": True}, {"name": "big", "macs": 3}],
            "steps": ["teacher", {"step": "student", "seconds": 3.5}],
        },
    }  # fmt: skip


class Page(HTMLParser):
    """Elements with their attributes, and the text of the scripts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = tag
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self._open == "script" and self.scripts:
            self.scripts[-1] += data
        elif self._open != "style":
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        self._open = ""


@pytest.fixture(scope="module")
def html() -> str:
    return render_page(made_report())


def test_verdict_comes_first_with_its_guarantee(html: str) -> None:
    page = Page(html)
    text = " ".join(page.text.split())
    headline = "4.1× cheaper at −0.3 points, 95% sure of ≤ 1.0"
    assert wording.headline(made_report()) == headline
    assert text.index(headline, len(headline)) < text.index("All candidates")
    assert "With 95% confidence at most 1.0 points of accuracy are lost" in text
    assert "A million texts cost 2.50 instead of 10.0 at 0.36 per machine-hour" in text
    unsure = Page(render_page(made_report(calibrated=False))).text
    assert "Nothing is guaranteed" in unsure and "95% sure" not in unsure.split("All candidates")[0]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"ratio": 0.5}, "2.0× dearer at −0.3 points"),
        ({"ratio": 1.01, "drop": -0.012}, "No cheaper at +1.2 points"),
        ({"ratio": None, "drop": 0.0}, "2.0× fewer operations at the same accuracy"),
        ({"ratio": None, "fewer_macs": None}, "Cost not measured, at −0.3 points"),
    ],
)
def test_headlines(changes: dict[str, Any], expected: str) -> None:
    report = made_report(calibrated=False)
    report["verdict"] |= changes
    assert wording.headline(report) == expected


def test_guarantees_in_words() -> None:
    report = made_report()
    report["verdict"]["against_baseline"] = False
    assert wording.headline(report).endswith("95% sure of at most 1.0 below its own full model")
    report["verdict"]["guarantee"]["reference"] = "other"
    assert wording.headline(report).endswith("95% sure of at most 1.0 below other")
    report["verdict"]["guarantee"] |= {"risk": "disagreement", "per_class": True, "same_rows": True}
    assert wording.headline(report).endswith("95% sure of at most 1.0% of answers other than those of other")
    report["verdict"]["against_baseline"] = True
    assert wording.headline(report).endswith("95% sure of ≤ 1.0% changed answers")
    report["task"]["metric"] = "f1_macro"
    report["verdict"]["guarantee"] |= {"risk": "accuracy-drop", "per_class": False}
    assert wording.headline(report).endswith("95% sure of ≤ 1.0 of accuracy lost")
    report["verdict"]["guarantee"]["scale"] = 5.0
    promised = "the mean error is larger than that of other by at most 0.05, no text counting for more than 5"
    assert wording.headline(report).endswith(f"95% sure: {promised}")
    assert promised in wording.guarantee_sentence(report)
    report["verdict"]["guarantee"] |= {"risk": "disagreement", "per_class": True, "scale": None}
    said = wording.guarantee_sentence(report)
    assert "of every class differ" in said and "rows of this report" in said
    for speed, origin, expected in (
        (None, None, "without exits"),
        (None, "calibrated", "empirical"),
        (0.3, "own", "a setting of the model"),
        (0.0, "calibrated", "no speed above 0 that saves work"),
        (0.3, "calibrated", "empirical"),
    ):
        report["verdict"] |= {"guarantee": None, "speed": speed, "default_from": origin}
        assert expected in wording.guarantee_sentence(report)


def test_what_was_not_measured_or_not_promised_of_one_model_alone_is_said() -> None:
    report = made_report()
    report["verdict"]["guarantee"] |= {"confidence": 0.9, "among": 2}
    assert "90% sure" in wording.headline(report)
    assert "chosen here among 2 that are certified one by one" in wording.guarantee_sentence(report)
    report["verdict"]["ratio_kind"] = "estimated"
    exits = next(m for m in report["models"] if m["name"] == report["verdict"]["model"])["exits"]
    exits["measured_speeds"] = [0.0, 0.5]
    assert wording.headline(report).startswith("About 4.1× cheaper")
    exits["measured_speeds"] = [0.0]
    assert wording.headline(report).startswith("At best 4.1× cheaper")
    report["verdict"]["ratio"] = 1.0
    assert wording.headline(report).startswith("At best no cheaper")


def test_limits_are_told_exactly_and_small_costs_in_two_digits() -> None:
    report = made_report()
    for most, told in ((0.0025, "0.25"), (0.0125, "1.25"), (0.07, "7.0"), (0.0004, "0.04")):
        report["verdict"]["guarantee"]["max_drop"] = most
        assert wording.headline(report).endswith(f"sure of ≤ {told}")
        assert f"at most {told} points" in wording.guarantee_sentence(report)
    assert [wording.cost(rate, 0.1) for rate in (1051.0, 6000.0, 20.0, 278.0)] == [
        "0.026",
        "0.0046",
        "1.39",
        "0.10",
    ]


def test_a_graphics_card_is_named_where_time_was_its() -> None:
    report = made_report()
    report["machine"] |= {"device": "NVIDIA H100", "processor": "Xeon", "threads": 16}
    text = " ".join(Page(render_page(report)).text.split())
    assert "included, on NVIDIA H100; the ratio" in text
    assert "rounds on NVIDIA H100." in markdown(report, {})


def contrast(*colours: Sequence[float]) -> float:
    """That of two colours, as the Web Content Accessibility Guidelines define it."""

    def luminance(colour: Sequence[float]) -> float:
        shares = (part / 255 for part in colour)
        linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted(map(luminance, colours))
    return (high + 0.05) / (low + 0.05)


def test_colours_stand_out_in_both_themes(html: str) -> None:
    blocks = re.findall(r":root[^{]*\{([^}]*--bg:[^}]*)\}", html)
    light, dark, chosen_dark = (
        {name: bytes.fromhex(colour) for name, colour in re.findall(r"--([\w-]+): #(\w{6});", block)}
        for block in blocks
    )
    assert dark == chosen_dark and dark.keys() == light.keys()
    texts = {
        **dict.fromkeys(("ink", "muted", "right", "wrong"), ("bg", "surface", "soft", "accent-soft")),
        "accent": ("bg", "surface"),
        "good": ("bg", "surface", "good-soft"),
        "open": ("bg", "surface", "open-soft"),
    }
    marks = [*(f"c{index}" for index in range(7)), *(f"r{index}" for index in range(6))]
    for theme in (light, dark):
        for name, grounds in texts.items():
            for ground in grounds:
                assert contrast(theme[name], theme[ground]) >= 4.5, (name, ground)
        for name in (*marks, "full", "right", "wrong"):
            assert contrast(theme[name], theme["bg"]) >= 3, name
        # The ramp has an order, and keeps it without hues.
        shades = [contrast(theme[f"r{index}"], bytes(3)) for index in range(6)]
        assert shades == sorted(shades, reverse=True)


def test_examples_tell_right_from_wrong_without_colours(html: str) -> None:
    outcomes = re.findall(r'<p class="outcome">.*?</p>', html, re.DOTALL)
    answers = [re.findall(r'<b class="(\w+)">(.) good</b>', outcome) for outcome in outcomes]
    assert answers == [[("wrong", "✗"), ("right", "✓")], [("right", "✓")]]


def test_regression_says_what_counts_as_wrong() -> None:
    report = made_report()
    assert "further off than half" not in render_page(report)
    report["task"] |= {"problem_type": "regression", "metric": "pearson"}
    html = render_page(report)
    assert html.count("further off than half of the full model’s") == 1 + len(
        [model for model in report["models"] if model["exits"]]
    )
    assert "its height the probability" not in html


def test_a_rate_that_rests_on_one_speed_is_said_to() -> None:
    report = made_report()
    report["verdict"]["ratio_kind"] = "estimated"
    assert "(estimated from measured speeds)" in " ".join(wording.verdict_sentences(report))
    for one in report["models"]:
        if one["exits"]:
            one["exits"]["measured_speeds"] = [0.0]
    assert "(at best, by operations)" in " ".join(wording.verdict_sentences(report))


def test_a_faster_candidate_is_named_with_its_speed() -> None:
    report = made_report()
    report["verdict"]["beaten_by"] = [row("other", "onnx", 0.89, 60.0, 0.5)]
    assert "other at speed 0.5 run by Alembert, ONNX Runtime, fp32 is faster still" in markdown(report, {})


def test_page_of_a_search_that_met_nothing_says_so_and_shows_the_nearest() -> None:
    report = made_report(calibrated=False)
    report["verdict"]["met"] = False
    report["compression"]["verdict"] = "Nothing is 100 times as fast; nearest is fast"
    html = render_page(report)
    heading = re.search(r"<h1.*?</h1>", html)
    assert (
        heading is not None and "cheaper" not in heading.group() and "Nothing met the aim" in heading.group()
    )
    text = Page(html).text
    for said in (
        "Nothing is 100 times as fast; nearest is fast.",
        "Measured here, fast at speed 0.3 reaches 88.0",
        "A million texts",
    ):
        assert said in text.partition("All candidates")[0] and said in markdown(report, {})
    # Where the search had nothing to measure, the baseline is not put against itself.
    report["verdict"]["model"] = "teacher"
    text = Page(render_page(report)).text.partition("All candidates")[0]
    assert "nearest is fast" in text and "reaches" not in text and "A million texts" not in text


def test_nothing_in_the_page_comes_from_outside(html: str) -> None:
    page = Page(html)
    for tag, attributes in page.elements:
        assert tag not in ("img", "iframe", "object", "embed", "audio", "video", "base")
        for name in ("src", "href", "action", "srcset", "data", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, name, value)
        assert not any(name.startswith("on") for name in attributes), tag
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style is not None and "url(" not in style.group(1) and "@import" not in style.group(1)
    addresses = set(re.findall(r"https?://[^\s\"'`<)]+", html))
    assert addresses <= {"http://www.w3.org/2000/svg"}, (
        "only the name of SVG's vocabulary, which nobody loads"
    )
    policy = next(attributes["content"] for tag, attributes in page.elements if "http-equiv" in attributes)
    assert policy is not None and "default-src 'none'" in policy and "script-src 'sha256-" in policy


def test_texts_and_names_are_never_markup(html: str) -> None:
    page = Page(html)
    assert ATTACK in page.text
    assert [tag for tag, _ in page.elements].count("script") == 3
    assert html.count("<script") == 3 and "<img" not in html
    kinds = [attributes.get("type") for tag, attributes in page.elements if tag == "script"]
    assert kinds == [None, "application/json", None]
    shown = json.loads(page.scripts[1])
    promises = [(one["calibration"] or {}).pop("promise", None) for one in shown["models"]]
    assert promises == [None, "95% sure of at most 1.0 below its own full model"]
    assert shown == made_report()
    assert "<" not in page.scripts[1]
    hostile = {"a": "</script><!--<script>&amp;\u2028"}
    assert json.loads(json_in_html(hostile)) == hostile
    with pytest.raises(ValueError, match="JSON compliant"):
        json_in_html({"a": float("nan")})


def plain_report() -> dict[str, Any]:
    """Of one model without exits, training, reliability and anything to compare with."""
    report = made_report(calibrated=False)
    report["models"], report["compression"] = [model("teacher", None)], None
    report["models"][0]["run"] |= {"training": [], "configuration": None, "versions": None}
    del report["models"][0]["run"]["transport"]
    report["models"][0] |= {"reliability": None, "confusions": None}
    report["verdict"] |= {"model": "teacher", "speed": None, "default_from": None}
    return report


def test_every_part_is_there_and_what_does_not_apply_is_not(html: str) -> None:
    ids = {attributes.get("id") for _, attributes in Page(html).elements}
    sections = {
        *("verdict", "trade", "speed", "exits", "examples"),
        *("training", "transport", "compression", "provenance"),
    }
    assert sections <= ids
    plain = plain_report()
    ids = {attributes.get("id") for _, attributes in Page(render_page(plain)).elements}
    assert ids & sections == {"verdict", "trade", "exits", "provenance"}
    with pytest.raises(InputError, match="no 'verdict'"):
        render_page({key: value for key, value in plain.items() if key != "verdict"})


def test_compression_is_a_table_of_whatever_it_has(html: str) -> None:
    section = html.partition('id="compression"')[2].partition("</section>")[0]
    assert re.findall(r'<th scope="col">(\w+)</th>', section) == [
        *("name", "accuracy", "dominated", "macs"),
        *("step", "seconds"),
    ]
    assert 'class="dominated"' in section and "student" in section


def test_markdown_and_pictures(tmp_path: Path) -> None:
    report = made_report()
    for one in report["models"]:
        one["source"] = str(tmp_path)
    flow = {"flow": [[1.0]], "student_weights": [1.0], "teacher_weights": [1.0]}
    log = [{"loss": 1.0, "step": 1, "snapshot": {"hidden": flow}}]
    for step in ("1-bert-emd", "2-bert-emd"):
        (tmp_path / "steps" / step).mkdir(parents=True)
        (tmp_path / "steps" / step / "trainer_state.json").write_text(
            json.dumps({"task": {"log_history": log}})
        )
    folder = tmp_path / "report"
    folder.mkdir()
    written = write_report(copy.deepcopy(report), folder)
    assert {f"transport-fast-{step}-bert-emd.png" for step in (1, 2)} <= set(written)
    assert (folder / "report.md").read_text().count("](transport-fast-") == 2
    assert sorted(written) == sorted(path.name for path in folder.iterdir())
    for name in written:
        if name.endswith(".png"):
            assert imread(folder / name).std() > 0.01, name
    text = markdown(report, {"candidates": "candidates.png"})
    assert text.startswith("# 4.1× cheaper at −0.3 points, 95% sure of ≤ 1.0\n")
    assert "![Accuracy of every candidate against what it costs](candidates.png)" in text
    assert "| 0.3 (certified) | 88.0 | −2.0 | 40 | 2.50 | 2.00× | 3.0% | 70.0% |" in text
    assert "| 0.5 | 80.0 | −10.0 | 50 est. | 2.00 | 2.50× | 12.0% | 90.0% |" in text
    assert "<" not in text.replace("\\<", "") and "\\<script\\>" in text
    assert escaped("a|b\n![x](y)") == r"a\|b \!\[x\](y)"
    # Neither a list nor a link of GitHub's.
    assert (
        escaped("- a") == r"\- a"
        and escaped("12. b") == r"12\. b"
        and escaped("-- 1.2") == r"\-- 1.2"
        and escaped("1.2") == "1.2"
    )
    assert [escaped(link) for link in ("see http://x.y", "www.x.y")] == [
        "see http:&#8203;//x.y",
        "www&#8203;.x.y",
    ]


def test_transport_is_read_from_the_runs(tmp_path: Path) -> None:
    flow = {"flow": [[1.0]], "student_weights": [1.0], "teacher_weights": [1.0]}
    log = [{"loss": 1.0, "step": step, "snapshot": {"hidden": flow}} for step in range(1, 101)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"task": {"log_history": log}}))
    report = made_report()
    for one in report["models"]:
        one["source"] = str(tmp_path / "nothing")
    report["models"][1]["source"] = str(tmp_path)
    add_layer_transport(report)
    assert report["models"][0]["run"]["transport"] == []
    (part,) = report["models"][1]["run"]["transport"]
    assert (len(part["steps"]), part["steps"][0], part["steps"][-1]) == (40, 1, 100)
    assert len(part["kinds"]["hidden"]["flows"]) == 40


def test_command(fast: Path, teacher: Path, task_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "report"
    command = ["report", str(teacher), str(fast), "--data", str(task_folder), "--output", str(folder)]
    measuring = [
        "--repeats",
        "1",
        "--timing-rows",
        "8",
        "--latency-rows",
        "0",
        "--one-process",
        "--peers",
        "none",
    ]
    assert run([*command, *measuring, "--title", "Topics", "--examples", "2"]) == 0
    report = json.loads((folder / "report.json").read_text())
    assert report["title"] == "Topics" and [one["name"] for one in report["models"]] == ["teacher", "fast"]
    assert (folder / "report.html").read_text() == render_page(report)
    assert (folder / "report.md").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--benchmark", "nothing.json"], "there is no such file"),
        (["--machine-price-per-hour", "-1"], "machine-price-per-hour"),
        (["--split", "train2"], "train2"),
    ],
)
def test_command_refuses_before_it_works(
    teacher: Path, task_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    arguments: list[str], message: str,
) -> None:  # fmt: skip
    folder = tmp_path / "report"
    command = ["report", str(teacher), "--data", str(task_folder), "--output", str(folder)]
    assert run([*command, *arguments]) == 2
    assert message in capsys.readouterr().err and not folder.exists()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()


class Visit:
    """A page opened in the browser, with all that it asked for and complained of."""

    def __init__(self, browser: Any, path: Path, **context: Any) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page = browser.new_context(**context).new_page()
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("dialog", lambda dialog: self.complaints.append("dialog"))
        self.page.goto(path.as_uri())

    def text(self, name: str) -> str:
        return str(self.page.text_content(f"#{name}"))


def written_page(report: dict[str, Any], folder: Path) -> Path:
    path = folder / "report.html"
    path.write_text(render_page(report), encoding="utf-8")
    return path


@pytest.fixture
def page_file(tmp_path: Path) -> Path:
    return written_page(made_report(), tmp_path)


def test_slider_moves_the_figures(browser: Any, page_file: Path) -> None:
    visit = Visit(browser, page_file)
    assert (visit.text("speed-value"), visit.text("figure-metric"), visit.text("figure-rate")) == (
        "0.3",
        "88.0",
        "40",
    )
    assert visit.text("figure-cost") == "2.50" and "measured" in visit.text("figure-rate-sub")
    assert visit.text("speed-status") == "95% sure of at most 1.0 below its own full model"
    visit.page.focus("#slider")
    visit.page.keyboard.press("ArrowRight")
    assert (visit.text("speed-value"), visit.text("figure-metric"), visit.text("figure-rate")) == (
        "0.5",
        "80.0",
        "50",
    )
    assert visit.text("figure-cost") == "2.00" and "estimated" in visit.text("figure-rate-sub")
    assert visit.text("speed-status") == "faster than certified: no guarantee"
    assert "90% leave early" in visit.text("exit-bars")
    width = visit.page.locator("#exit-bars .bar").first.locator("span").first.evaluate("e => e.style.width")
    assert width == "70%"
    visit.page.fill("#price", "3.6")
    assert visit.text("figure-cost") == "20.0"
    assert visit.page.locator("#trade [data-rate]").first.text_content() == "100"
    assert "cost 25.0 instead of 100 at 3.6 per" in visit.text("verdict")
    visit.page.hover("#trade-chart .point >> nth=2")
    assert "25.0 per million" in visit.text("tip")
    visit.page.click("#to-full")
    assert (visit.text("speed-value"), visit.text("figure-metric")) == ("0", "90.0")
    assert visit.text("speed-status") == "the full model itself"
    visit.page.focus("#slider")
    visit.page.keyboard.press("ArrowRight")
    assert visit.text("speed-status") == "not among the speeds tested: no guarantee"
    visit.page.click("#to-default")
    assert visit.text("speed-value") == "0.3"
    assert visit.complaints == [] and visit.requests == [page_file.as_uri()]


def test_details_by_pointer_and_by_keys(browser: Any, page_file: Path) -> None:
    visit = Visit(browser, page_file)
    visit.page.hover("#trade-chart .point >> nth=2")
    assert "40 texts/s" in visit.text("tip")
    visit.page.focus("#trade-chart svg")
    visit.page.keyboard.press("Home")
    assert visit.text("tip").startswith("teacher") and visit.page.is_visible("#tip")
    visit.page.keyboard.press("Escape")
    assert not visit.page.is_visible("#tip")
    visit.page.check("input[value=macs]", force=True)
    assert "FLOPs per text" in visit.text("trade-chart")
    visit.page.select_option("#model", "0")
    assert not visit.page.is_visible("#speed") and visit.page.is_visible("#reliability")
    visit.page.select_option("#model", "1")
    assert visit.page.is_visible("#speed") and visit.page.locator("#uncertainty svg").count() == 2
    assert visit.complaints == []


def test_charts_of_speeds_and_training_answer_to_keys(browser: Any, page_file: Path) -> None:
    visit = Visit(browser, page_file, reduced_motion="reduce")

    def focus(chart: str) -> None:
        visit.page.focus(chart)
        # Scrolling hides details, and is told of a frame later.
        visit.page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    for chart in ("curve-chart", "shares-chart"):
        focus(f"#{chart} svg")
        visit.page.keyboard.press("Home")
        visit.page.keyboard.press("ArrowRight")
        assert visit.text("speed-value") == "0.1" and visit.text("tip").startswith("speed 0.1")
        visit.page.keyboard.press("Escape")
        assert not visit.page.is_visible("#tip")
    focus("[data-training='1'] svg >> nth=0")
    visit.page.keyboard.press("End")
    assert visit.text("tip") == "lossstep 20: 0.5" and visit.page.is_visible("#tip")
    assert visit.complaints == []


def test_charts_are_spoken(browser: Any, page_file: Path) -> None:
    visit = Visit(browser, page_file, reduced_motion="reduce")
    charts = visit.page.locator("svg[aria-label]")
    kinds = charts.evaluate_all(
        "(all, names) => all.map(e => names.map(name => e.getAttribute(name)))",
        ["role", "tabindex", "aria-roledescription", "aria-label"],
    )
    assert {(role, place, word) for role, place, word, _ in kinds} == {
        ("application", "0", "chart"),
        ("img", None, None),
    }
    assert all(("Arrow keys" in label) == (role == "application") for role, _, _, label in kinds)
    labels = [label for *_, label in kinds]
    for told in (
        "uncertainty at layer 1: 80.0% right; half of what is right up to 0.5, half of what is wrong up to 1; "
        "40% of texts leave here at speed 0.3",
        "accuracy by confidence after layer 1: 84.0% right, 82.0% sure on average, ECE 0.050. Arrow keys",
        "loss by step: 1 at step 1, 0.5 at step 20, between 0.5 and 1. Arrow keys",
        "score on dev by step: 0.9 at step 20. Arrow keys",
    ):
        assert any(label.startswith(told) for label in labels), told
    # A region that is there before it has words, unlike the details that show them.
    box = visit.page.locator("#spoken[aria-live=polite]").bounding_box()
    assert box is not None and (box["width"], box["height"], visit.text("spoken")) == (1, 1, "")
    assert visit.page.get_attribute("#tip", "aria-live") is visit.page.get_attribute("#tip", "role") is None
    for chart, told in (("trade-chart", "teacher, "), ("curve-chart", "speed 0, accuracy 90.0")):
        visit.page.focus(f"#{chart} svg")
        visit.page.keyboard.press("Home")
        assert visit.text("spoken").startswith(told)
        visit.page.evaluate("document.activeElement.blur()")
        assert visit.text("spoken") == ""
    assert visit.complaints == []


def test_a_step_of_the_slider_is_spoken_once(browser: Any, page_file: Path) -> None:
    visit = Visit(browser, page_file)
    assert visit.page.locator("output:not([aria-live=off])").count() == 0
    visit.page.evaluate(
        "window.told = []; new MutationObserver(all => told.push(document.getElementById('speed-status').textContent))"
        ".observe(document.getElementById('speed-status'), {childList: true, characterData: true, subtree: true})"
    )
    visit.page.focus("#slider")
    for _ in range(2):
        visit.page.keyboard.press("ArrowRight")
    assert visit.text("speed-value") == "0.9"
    assert visit.page.evaluate("told") == ["faster than certified: no guarantee"]


def test_numbers_of_the_flow_are_read_after_the_system_changed_its_theme(
    browser: Any, tmp_path: Path
) -> None:
    report = made_report()
    flow = [[0.4 - 0.02 * row, 0.5 - 0.05 * row] for row in range(8)]
    for one in report["models"]:
        kinds = one["run"]["transport"][0]["kinds"]
        kinds["hidden"] |= {"flows": [flow] * 2, "student_weights": [[0.125] * 8] * 2}
    visit = Visit(browser, written_page(report, tmp_path), color_scheme="light")
    for scheme in ("light", "dark"):
        visit.page.emulate_media(color_scheme=scheme)
        ground, cells = visit.page.evaluate(
            r"""() => {
                const parts = colour => colour.match(/\d+/g).slice(0, 3).map(Number), style = getComputedStyle;
                const cells = [...document.querySelectorAll(".maps rect.point")].map(cell => [cell, cell.nextSibling]);
                return [parts(style(document.body).backgroundColor), cells.map(([cell, text]) =>
                    [parts(style(cell).fill), Number(style(cell).fillOpacity), parts(style(text).fill)])];
            }"""
        )
        assert len(cells) == 32
        for fill, share, text in cells:
            cell = [share * part + (1 - share) * below for part, below in zip(fill, ground, strict=True)]
            assert contrast(cell, text) >= 4.5, (scheme, share)


def test_charts_at_the_edges(browser: Any, tmp_path: Path) -> None:
    report = made_report()
    report["models"][1]["exits"]["curve"]["speedup"] = [1.0, 2.0, 10.0, 40.0, 90.0]
    for one in report["models"][1]["reliability"]:
        for bin_ in one["bins"]:
            bin_ |= {"confidence": 1.0, "accuracy": 1.0}
    visit = Visit(browser, written_page(report, tmp_path))
    drawn = visit.page.locator("#curve-chart, #reliability").evaluate_all("all => all.map(e => e.innerHTML)")
    assert len(drawn) == 2 and not any("NaN" in part for part in drawn)
    ticks = visit.page.locator("#reliability svg").first.locator("text[text-anchor=end]").all_text_contents()
    assert ticks == ["90", "95", "100"]
    report["models"][1]["exits"]["curve"]["speedup"] = [1.0] * 5
    visit.complaints += Visit(browser, written_page(report, tmp_path)).complaints
    assert visit.complaints == []


def test_slider_gives_the_ratio_that_was_measured(browser: Any, tmp_path: Path) -> None:
    report = made_report()
    report["models"][1]["exits"]["ratio_to_baseline"][2] = 41.3
    visit = Visit(browser, written_page(report, tmp_path))
    assert visit.text("figure-rate-sub") == "measured, 41.3× the baseline"


def test_only_certified_speeds_look_so(browser: Any, tmp_path: Path) -> None:
    report = made_report()
    calibration = report["models"][1]["calibration"]
    calibration |= {"reference": "teacher", "certified_speeds": [0.0, 0.3]}
    visit = Visit(browser, written_page(report, tmp_path))
    assert visit.page.locator("#curve-chart .certified").count() == 2
    assert visit.page.text_content("#default-mark.certified") == "certified"
    visit.page.click("#to-full")
    assert visit.text("speed-status") == "95% sure of at most 1.0 below teacher"
    calibration |= {"mode": "empirical", "certified_speeds": []}
    visit = Visit(browser, written_page(report, tmp_path))
    assert visit.page.locator("#curve-chart .certified").count() == 0
    assert visit.page.text_content("#default-mark:not(.certified)") == "empirical"
    assert visit.text("to-default") == "empirical (0.3)"
    assert visit.text("speed-status") == "no guarantee"
    assert "| 0.3 (empirical) |" in markdown(report, {})


def test_links_lead_to_what_is_shown(browser: Any, tmp_path: Path) -> None:
    report = made_report()
    report["verdict"] |= {"model": "teacher", "speed": None}
    visit = Visit(browser, written_page(report, tmp_path))
    for shown in (False, True):
        for link in visit.page.locator("nav a").all():
            assert link.is_visible() == visit.page.is_visible(str(link.get_attribute("href")))
        assert visit.page.is_visible("nav a[href='#speed']") == shown
        visit.page.select_option("#model", "1")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.832, 0.842, ["83.25", "83.50", "83.75", "84.00", "84.25"]),
        (0.5, 0.9, ["50", "60", "70", "80", "90"]),
    ],
)
def test_ticks_are_exact(browser: Any, tmp_path: Path, low: float, high: float, expected: list[str]) -> None:
    report = made_report()
    for one, metric in zip(report["candidates"], (high, low, low), strict=True):
        one["metric"] = metric
    visit = Visit(browser, written_page(report, tmp_path))
    texts = visit.page.locator("#trade-chart svg > text[text-anchor=end]").all_text_contents()
    assert texts[: len(expected)] == expected
    ticks = [[12.25, 12.5, 12.75], [0, 250000, 500000], [1.25e9, 1.5e9]]
    shown = visit.page.evaluate("all => all.map(ticks => Charts.tickTexts(ticks, {}))", ticks)
    assert shown == [["12.25", "12.50", "12.75"], ["0", "250,000", "500,000"], ["1.25 G", "1.50 G"]]


def test_themes(browser: Any, page_file: Path) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    shades = {}
    for scheme in ("light", "dark"):
        visit = Visit(browser, page_file, color_scheme=scheme)
        shades[scheme] = visit.page.evaluate(background)
        visit.page.click("#theme")
        shades[f"{scheme} switched"] = visit.page.evaluate(background)
        visit.page.reload()
        assert visit.page.evaluate(background) == shades[f"{scheme} switched"]
    assert shades["light"] == shades["dark switched"] != shades["dark"] == shades["light switched"]


@pytest.mark.parametrize("width", [320, 380, 768, 1280])
def test_page_fits_the_screen(browser: Any, tmp_path: Path, width: int) -> None:
    report = made_report()
    report["models"][0]["name"] = "runs/2026-01-01/" + "a-long-name/" * 6
    path = written_page(report, tmp_path)
    visit = Visit(browser, path, viewport={"width": width, "height": 800}, is_mobile=width < 500)
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    for axis in ("macs", "p50_ms", "texts_per_second"):
        visit.page.check(f"input[value={axis}]", force=True)
        texts = visit.page.locator(".chart svg > text, .maps svg > text")
        boxes = texts.evaluate_all("all => all.map(e => e.getBoundingClientRect())")
        assert min(box["left"] for box in boxes) >= 0 and max(box["right"] for box in boxes) <= width, axis
    assert visit.page.locator("#curve-chart svg").count() == 1
    assert visit.complaints == []


def test_page_without_scripts_still_tells_the_verdict(browser: Any, page_file: Path) -> None:
    visit = Visit(browser, page_file, java_script_enabled=False)
    assert "4.1× cheaper" in str(visit.page.text_content("h1"))
    assert visit.page.is_visible("#examples .example >> nth=0") and not visit.page.is_visible("#speed")


def test_page_of_a_plain_model(browser: Any, tmp_path: Path) -> None:
    visit = Visit(browser, written_page(plain_report(), tmp_path))
    assert visit.page.locator("#trade-chart .point").count() == 3
    assert visit.page.is_visible("[data-lacks=reliability]")
    visit.page.fill("#price", "3.6")
    assert "instead of 100 at 3.6 per" in visit.text("verdict")
    assert visit.complaints == []
