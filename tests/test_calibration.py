"""Calibration: p-values against enumeration, the guarantee by simulation, and the command from end to end."""

from __future__ import annotations

import copy
import itertools
import json
import logging
import math
import re
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import typer
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy import special, stats

from alembert import AdaptiveClassifier, InputError, Task, load_task
from alembert.benchmarks import risk_control
from alembert.benchmarks.calibration import SPEEDS, NothingCertifiedError, calibrate, rows_to_certify, store
from alembert.benchmarks.evaluation import ExitAnswers, collect_exit_answers, task_texts
from alembert.benchmarks.replayed_exits import ReplayedExits, exit_uncertainties
from alembert.benchmarks.risk_budget import RiskBudget
from alembert.benchmarks.risk_control import (
    LossKind,
    betting_p_value,
    binomial_p_value,
    fixed_sequence,
    hoeffding_bentkus_p_value,
    p_value,
    paired_p_value,
    rows_needed,
    smallest_budget,
    smallest_set,
    worst_class,
)
from alembert.cli import calibrate as calibrate_command
from alembert.cli.options import load_calibration_task, load_evaluation_task
from alembert.common.files import read_json, write_json
from alembert.models.loading import classifier_facts, weights_fingerprint
from alembert.reports.calibration import calibration_table, verdict
from alembert.runtime.calibration_file import (
    CALIBRATION_FILE,
    CalibratedSpeed,
    model_files_fingerprint,
    with_calibrated_defaults,
)
from alembert.runtime.export import export_classifier
from alembert.runtime.policies import ExitPolicy

PAGE = Path(__file__).parents[1] / "docs" / "calibration.md"
LEVEL = 0.05


def trinomial(rows: int, lost: float, gained: float) -> dict[tuple[int, int], float]:
    """Probability of every (lost, gained)."""
    outcomes = [(a, b) for a in range(rows + 1) for b in range(rows + 1 - a)]
    counts = np.array([(a, b, rows - a - b) for a, b in outcomes])
    chances = stats.multinomial.pmf(counts, rows, [lost, gained, 1 - lost - gained])
    return dict(zip(outcomes, chances, strict=True))


@pytest.mark.parametrize(("rows", "budget"), [(24, 0.1), (32, 0.08)])
def test_paired_p_value_is_valid_whatever_the_share_of_changed_answers(rows: int, budget: float) -> None:
    values = {(a, b): paired_p_value(a, b, rows, budget, LEVEL) for a, b in trinomial(rows, 0.2, 0.1)}
    for gained in (0.0, 0.005, 0.02, 0.05, 0.1, 0.2, 0.3, 0.45 - budget / 2):
        for drop in (budget, 1.5 * budget):
            chances = trinomial(rows, gained + drop, gained)
            for level in (0.01, LEVEL, 0.1, 0.3):
                wrongly = sum(chance for outcome, chance in chances.items() if values[outcome] <= level)
                assert wrongly <= level + 1e-9, (gained, drop, level)


def test_paired_p_value_is_hardly_larger_than_the_best_possible() -> None:
    # The normal approximation is not valid in finite samples, but it says where an exact test can be.
    for lost, gained in ((40, 36), (28, 18), (60, 52)):
        changed = lost + gained
        approximate = stats.norm.cdf((lost - gained - 20) / math.sqrt(changed))
        exact = paired_p_value(lost, gained, 2000, 0.01, LEVEL)
        assert approximate / 1.5 < exact < 1.5 * approximate + LEVEL / 100


def test_paired_p_value_by_enumeration() -> None:
    # Step 2 and 3 spelled out: order all outcomes by the score, sum, maximise over the interval of shares.
    rows, budget, lost, gained = 30, 0.1, 2, 3

    def score(a: int, b: int) -> float:
        linear = -a - b + (2 * rows - a + b) * budget
        q = (math.sqrt(linear**2 + 8 * rows * b * budget * (1 - budget)) - linear) / (4 * rows)
        return (a - b - rows * budget) / math.sqrt(rows * (2 * q + budget - budget**2))

    gamma = LEVEL / 100
    interval = stats.binomtest(lost + gained, rows).proportion_ci(1 - gamma, "exact")
    largest = max(
        sum(
            chance
            for (a, b), chance in trinomial(rows, (share + budget) / 2, (share - budget) / 2).items()
            if score(a, b) <= score(lost, gained) + 1e-9
        )
        for share in np.linspace(max(interval.low, budget), interval.high, 200)
    )
    assert paired_p_value(lost, gained, rows, budget, LEVEL) == pytest.approx(gamma + largest, abs=2e-5)


@pytest.mark.parametrize(
    ("lost", "gained", "rows", "budget"),
    [(21, 7, 483, 0.043051477218274736), (7, 5, 43, 0.12795534290161845)],
)
def test_paired_p_value_finds_the_highest_peak(lost: int, gained: int, rows: int, budget: float) -> None:
    # Over the interval of shares the probability has several peaks, some of them narrow.
    changed, gamma = lost + gained, LEVEL / 100
    interval = stats.binomtest(changed, rows).proportion_ci(1 - gamma, "exact")
    counts = np.arange(rows + 1)
    score = float(risk_control._score(lost, changed, rows, budget))
    most = risk_control._most_lost(score, counts, rows, budget)
    counts, most = counts[most >= 0], most[most >= 0]
    shares = np.linspace(max(interval.low, budget), interval.high, 1000)[:, None]
    chances = stats.binom.pmf(counts, rows, shares) * special.bdtr(most, counts, (1 + budget / shares) / 2)
    largest = chances.sum(-1).max()
    assert paired_p_value(lost, gained, rows, budget, LEVEL) == pytest.approx(gamma + largest, abs=1e-5)


@settings(deadline=None, max_examples=25)
@given(st.integers(20, 3000), st.floats(0.003, 0.3), st.data())
def test_paired_p_value_grows_with_what_is_lost(rows: int, budget: float, data: st.DataObject) -> None:
    lost, gained = data.draw(st.integers(0, rows // 10)), data.draw(st.integers(0, rows // 10))
    value = paired_p_value(lost, gained, rows, budget, LEVEL)
    assert LEVEL / 100 <= value <= 1
    assert value <= paired_p_value(lost + 1, gained, rows, budget, LEVEL) + 2e-5


def test_binomial_and_hoeffding_bentkus_values() -> None:
    assert binomial_p_value(0, 299, 0.01) == pytest.approx(0.99**299)
    assert binomial_p_value(1, 50, 0.1) == pytest.approx(0.9**50 + 50 * 0.1 * 0.9**49)
    hoeffding = math.exp(-200 * (0.05 * math.log(0.05 / 0.1) + 0.95 * math.log(0.95 / 0.9)))
    bentkus = math.e * float(stats.binom.cdf(10, 200, 0.1))
    assert hoeffding_bentkus_p_value(0.05, 200, 0.1) == pytest.approx(min(hoeffding, bentkus))
    assert hoeffding_bentkus_p_value(0.2, 200, 0.1) == 1.0
    for mistakes in range(20):
        assert (
            binomial_p_value(mistakes, 200, 0.1)
            <= hoeffding_bentkus_p_value(mistakes / 200, 200, 0.1) + 1e-12
        )


@pytest.mark.parametrize("spread", [0.05, 0.5])
def test_p_values_of_fractions_are_valid(spread: float) -> None:
    # Losses whose mean is exactly the budget, for 600 sets: at most 5% may be rejected at level 5%.
    generator = np.random.default_rng(3)
    budget, rows = 0.05, 400
    losses = generator.random((600, rows)) * 2 * budget
    rejected = sum(p_value(LossKind.FRACTION, row, budget, LEVEL) <= LEVEL for row in losses)
    assert stats.binomtest(rejected, 600, LEVEL, alternative="greater").pvalue > 0.01
    differences = budget + spread * (2 * generator.random((600, rows)) - 1)
    rejected = sum(p_value(LossKind.FRACTION_DIFFERENCE, row, budget, LEVEL) <= LEVEL for row in differences)
    assert stats.binomtest(rejected, 600, LEVEL, alternative="greater").pvalue > 0.01
    # Far within the budget both say so.
    assert p_value(LossKind.FRACTION, losses[0] / 20, budget, LEVEL) <= LEVEL
    assert p_value(LossKind.FRACTION_DIFFERENCE, (differences[0] - budget) / 10, budget, LEVEL) <= LEVEL


@pytest.mark.parametrize(
    ("kind", "chance"), [(LossKind.FRACTION, 0.05), (LossKind.FRACTION_DIFFERENCE, 0.06)]
)
def test_p_values_of_rare_large_losses_are_valid_where_the_normal_approximation_is_not(
    kind: LossKind, chance: float
) -> None:
    budget, rows, sets = 0.05, 40, 2000
    small = (budget - chance) / (1 - chance)
    large = np.random.default_rng(4).random((sets, rows)) < chance
    losses = np.where(large, 1.0, small)
    assert chance + (1 - chance) * small == pytest.approx(budget)
    approximate = losses.mean(1) + 1.645 * losses.std(1) / math.sqrt(rows) <= budget
    assert approximate.sum() > 1.5 * LEVEL * sets
    rejected = sum(p_value(kind, row, budget, LEVEL) <= LEVEL for row in losses)
    assert stats.binomtest(rejected, sets, LEVEL, alternative="greater").pvalue > 0.01


def test_betting_does_not_depend_on_how_a_file_is_sorted_by_much() -> None:
    values = np.concatenate([np.zeros(700), np.ones(300)])
    assert betting_p_value(values, 0.36, LEVEL) < LEVEL
    assert betting_p_value(values[::-1], 0.36, LEVEL) < LEVEL
    assert betting_p_value(values, 0.29, LEVEL) > LEVEL


def test_sequence_stops_at_the_first_that_is_not_rejected() -> None:
    asked = iter([0.01, 0.05, 0.06, 0.001])
    assert fixed_sequence(asked, LEVEL) == [0.01, 0.05, 0.06]
    assert next(asked) == 0.001
    assert worst_class([0.01, 0.2, 0.03]) == 0.2


@cache
def most_lost(gained: int, rows: int, budget: float) -> int:
    """The most lost answers at which `paired_p_value` still rejects; a table makes simulations quick."""
    lost = max(0, math.ceil(gained + rows * budget - 1.645 * math.sqrt(2 * gained + rows * budget)))
    while lost >= 0 and paired_p_value(lost, gained, rows, budget, LEVEL) > LEVEL:
        lost -= 1
    while paired_p_value(lost + 1, gained, rows, budget, LEVEL) <= LEVEL:
        lost += 1
    return lost


@cache
def population(noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Losses (texts, speeds) in −1, 0, 1 of a made-up model with 12 exits, and the speed-up at each speed.

    Evidence for the right label grows with depth and is noisy early on; an exit's entropy is that of the evidence.
    """
    generator, texts = np.random.default_rng(0), 40_000
    depth = np.arange(1, 13) / 12
    growth = (1 - np.exp(-4 * depth)) / (1 - np.exp(-4))
    strength = generator.normal(1.35, 1.1, texts)
    evidence = strength[:, None] * growth + noise * np.sqrt(1 - depth) * generator.normal(size=(texts, 12))
    logits = np.stack([evidence, np.zeros_like(evidence)], -1).astype(np.float32) * 2.5
    answers = ExitAnswers(tuple(range(1, 13)), logits, None, np.ones(texts))
    replayed = ReplayedExits(answers, ExitPolicy(num_exits=12).resolve(2), np.zeros(texts, int))
    losses = [replayed.losses(speed, RiskBudget()) for speed in SPEEDS]
    speedups = [12 / (replayed.taken(speed) + 1).mean() for speed in SPEEDS]
    return np.stack(losses, 1).astype(np.int8), np.array(speedups)


def certified(losses: np.ndarray, rows: int, budget: float) -> int:
    """How many speeds fixed-sequence testing certifies on losses (rows, speeds)."""
    lost, gained = (losses > 0).sum(0), (losses < 0).sum(0)
    passed = (a <= most_lost(int(b), rows, budget) for a, b in zip(lost, gained, strict=True))
    return len(list(itertools.takewhile(bool, passed)))


@pytest.mark.parametrize(("noise", "budget"), [(0.3, 0.01), (0.6, 0.01), (0.6, 0.02), (1.0, 0.02)])
def test_the_guarantee_holds_and_is_not_vacuous(noise: float, budget: float) -> None:
    losses, speedups = population(noise)
    risk = losses.mean(0)
    oracle = speedups[np.flatnonzero(risk <= budget).max()]
    generator, rows, resamples = np.random.default_rng(5), 2000, 500
    broken, reached = 0, []
    for _ in range(resamples):
        count = certified(losses[generator.integers(0, len(losses), rows)], rows, budget)
        broken += count > 0 and risk[count - 1] > budget
        reached.append(speedups[count - 1] if count else 1.0)
    assert stats.binomtest(broken, resamples, LEVEL, alternative="greater").pvalue > 0.01
    assert np.mean(reached) >= 0.8 * oracle


@pytest.mark.parametrize("per_class", [False, True])
def test_calibrate_takes_a_speed_over_the_budget_as_rarely_as_stated(
    per_class: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Slow, and no part of the choice.
    monkeypatch.setattr("alembert.benchmarks.calibration.compute_metrics", lambda *_: {"accuracy": 0.0})
    monkeypatch.setattr("alembert.benchmarks.calibration.rows_sha256", lambda _: "")
    # Two classes, the second one harder; of two speeds the last is just over the budget.
    generator, texts, rows, resamples = np.random.default_rng(0), 40_000, 400, 500
    labels, depth, speeds = np.arange(texts) % 2, np.arange(1, 7) / 6, (0.05, 0.27)
    noise = (1 + labels[:, None]) * np.sqrt(1 - depth) * generator.normal(size=(texts, 6))
    evidence = generator.normal(1.35, 1.1, (texts, 1)) * (1 - np.exp(-4 * depth)) + noise
    evidence *= 2.5 * (1 - 2 * labels[:, None])
    logits = np.stack([evidence, np.zeros_like(evidence)], -1).astype(np.float32)
    policy = ExitPolicy(num_exits=6).resolve(2)

    def answers(taken: np.ndarray) -> ExitAnswers:
        return ExitAnswers(tuple(range(1, 7)), logits[taken], None, np.ones(len(taken)))

    losses = ReplayedExits(answers(np.arange(texts)), policy, labels).losses(speeds[-1], RiskBudget())
    risk = max(losses[labels == label].mean() for label in (0, 1)) if per_class else losses.mean()
    budget = RiskBudget(most=0.999 * float(risk), per_class=per_class)
    classifier: Any = SimpleNamespace(
        exit_layers=tuple(range(1, 7)),
        max_length=32,
        label_names=("a", "b"),
        backend=SimpleNamespace(manifest=SimpleNamespace(macs=())),
        policy=lambda *_: policy,
    )
    everything, chosen = Dataset.from_dict({"text": ["one"] * texts, "labels": labels}), []
    for resample in range(resamples):
        drawn = generator.integers(0, texts, rows)
        dev = everything.select(drawn, new_fingerprint=str(resample))
        task = Task("made-up", "single_label_classification", ("a", "b"), ("accuracy",), {"dev": dev})
        found = calibrate(
            classifier, task, "dev", budget, model_name="m", data_name="d", answers=answers(drawn), speeds=speeds
        )  # fmt: skip
        chosen.append(found["speed"])
    broken = sum(speed == speeds[-1] for speed in chosen)
    assert stats.binomtest(broken, resamples, LEVEL, alternative="greater").pvalue > 0.01
    assert broken > 0 and np.mean(np.array(chosen) > 0) > 0.5


def test_the_guarantee_holds_where_the_first_unsafe_speed_is_just_over_the_budget() -> None:
    # The hardest case: many speeds with a risk just over the budget, and a test that almost always gets there.
    generator, rows, resamples, budget = np.random.default_rng(6), 2000, 1000, 0.01
    share = 0.06
    chances = [(share + budget * 1.0001) / 2, (share - budget * 1.0001) / 2]
    counts = generator.multinomial(rows, [*chances, 1 - share], size=resamples)
    broken = sum(a <= most_lost(int(b), rows, budget) for a, b, _ in counts)
    assert stats.binomtest(broken, resamples, LEVEL, alternative="greater").pvalue > 0.01
    # ... and the level is used up: a test that never errs would be too timid.
    assert broken > 0.5 * LEVEL * resamples


def test_the_worst_class_is_within_the_budget_as_often_as_stated() -> None:
    # Three classes of different sizes, the middle one just over the budget: it must be let through rarely.
    generator, budget, resamples = np.random.default_rng(7), 0.05, 500
    shares = {"easy": (600, 0.01), "hard": (400, budget * 1.001), "small": (200, 0.0)}
    broken = 0
    for _ in range(resamples):
        values = [
            p_value(LossKind.WRONG, (generator.random(rows) < risk).astype(float), budget, LEVEL)
            for rows, risk in shares.values()
        ]
        broken += worst_class(values) <= LEVEL
    assert stats.binomtest(broken, resamples, LEVEL, alternative="greater").pvalue > 0.01


def test_smallest_sets() -> None:
    assert smallest_set(LossKind.WRONG, 0.01, LEVEL) == math.ceil(math.log(LEVEL) / math.log(0.99)) == 299
    for kind in LossKind:
        rows = smallest_set(kind, 0.05, LEVEL)
        assert (
            p_value(kind, np.zeros(rows), 0.05, LEVEL)
            <= LEVEL
            < p_value(kind, np.zeros(rows - 1), 0.05, LEVEL)
        )
        least = smallest_budget(kind, rows, LEVEL)
        assert least <= 0.05
        assert p_value(kind, np.zeros(rows), least - 0.001, LEVEL) > LEVEL


@pytest.mark.parametrize(
    ("risk", "share", "budget"),
    [(0.0, 0.05, 0.01), (0.005, 0.04, 0.015), (-0.002, 0.02, 0.005), (0.0, 0.01, 0.01), (0.0, 0.05, 0.05)],
)
def test_rows_needed_give_the_stated_power(risk: float, share: float, budget: float) -> None:
    rows = rows_needed(LossKind.WRONG_DIFFERENCE, risk, share, budget, LEVEL)
    assert rows is not None
    counts = np.random.default_rng(8).multinomial(
        rows, [(share + risk) / 2, (share - risk) / 2, 1 - share], size=400
    )
    power = np.mean([a <= most_lost(int(b), rows, budget) for a, b, _ in counts])
    assert 0.7 < power < 0.9
    assert rows_needed(LossKind.WRONG_DIFFERENCE, budget, share, budget, LEVEL) is None


@pytest.mark.parametrize(
    ("risk", "budget"), [(0.0, 0.01), (0.001, 0.01), (0.003, 0.01), (0.02, 0.05), (0.008, 0.01)]
)
def test_rows_needed_for_fewer_mistakes_are_enough_and_hardly_more(risk: float, budget: float) -> None:
    def power(rows: int) -> float:
        certified = stats.binom.cdf(np.arange(rows + 1), rows, budget) <= LEVEL
        return float(stats.binom.cdf(int(certified.sum()) - 1, rows, risk)) if certified.any() else 0.0

    rows = rows_needed(LossKind.WRONG, risk, risk, budget, LEVEL)
    assert rows is not None and power(rows) >= 0.79
    assert power(rows - math.ceil(0.4 / budget)) < 0.82


def test_rows_needed_where_the_risk_is_hardly_below_the_budget() -> None:
    for kind in LossKind:
        rows = rows_needed(kind, 0.01 - 1e-8, 0.02, 0.01, LEVEL)
        assert rows is not None and rows > 1e6
        assert rows_needed(kind, 0.01 - 1e-10, 0.02, 0.01, LEVEL) is None


def test_rows_needed_where_the_risk_is_far_below_the_budget() -> None:
    for risk in (-0.1, -0.3):
        rows = rows_needed(LossKind.FRACTION_DIFFERENCE, risk, 0.2, 0.9, LEVEL)
        assert rows is not None and rows >= smallest_set(LossKind.FRACTION_DIFFERENCE, 0.9, LEVEL)


@pytest.mark.parametrize("kind", [LossKind.WRONG, LossKind.FRACTION, LossKind.FRACTION_DIFFERENCE])
def test_rows_needed_of_other_losses(kind: LossKind) -> None:
    generator, mean, budget = np.random.default_rng(9), 0.02, 0.05
    square = mean if kind is LossKind.WRONG else 4 / 3 * mean**2
    rows = rows_needed(kind, mean, square, budget, LEVEL)
    assert rows is not None
    drawn = generator.random((200, rows))
    losses = (drawn < mean).astype(float) if kind is LossKind.WRONG else 2 * mean * drawn
    assert np.mean([p_value(kind, row, budget, LEVEL) <= LEVEL for row in losses]) > 0.7


def test_the_table_of_sample_sizes_in_the_documentation() -> None:
    lines = re.findall(r"^\| \d+% \|.*$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(lines) == 5
    for line in lines:
        share, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        found = [
            rows_needed(LossKind.WRONG_DIFFERENCE, 0.0, float(share.rstrip("%")) / 100, budget, LEVEL)
            for budget in (0.005, 0.01, 0.02, 0.05)
        ]
        assert [int(cell.replace(",", "")) for cell in cells] == found


# ---- with a model ----


@pytest.fixture(scope="module")
def classifier(fast: Path) -> AdaptiveClassifier:
    return AdaptiveClassifier.from_pretrained(fast, speed=0.0)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, task: Task) -> Task:
    """A task whose dev split is the three splits of the tiny one, four times over: enough to certify something."""
    folder = tmp_path_factory.mktemp("many")
    lines = [
        f"{task.label_names[label]}\t{text}"
        for split in task.splits.values()
        for text, label in zip(split["text"], split["labels"], strict=True)
    ]
    (folder / "dev.tsv").write_text("\n".join(["label\ttext", *(lines * 4)]) + "\n", encoding="utf-8")
    return load_task(folder, label_names=task.label_names, required_splits=())


@pytest.fixture(scope="module")
def results(classifier: AdaptiveClassifier, many: Task) -> dict[str, Any]:
    return calibrate(classifier, many, "dev", RiskBudget(most=0.1), model_name="fast", data_name="topics")


@pytest.mark.parametrize("policy", ["entropy", "patience", "learned", "margin"])
def test_exits_are_replayed_as_evaluation_does(
    classifier: AdaptiveClassifier, task: Task, policy: str
) -> None:
    answers = collect_exit_answers(classifier, task_texts(task, "test"))
    chosen = classifier.policy(policy)
    replayed = ReplayedExits(answers, chosen, np.asarray(task.dataset("test")["labels"]))
    assert exit_uncertainties(answers, chosen).shape == (32, 3)
    for speed in (0.0, 0.01, 0.25, 0.5, 0.75, 1.0):
        assert (replayed.taken(speed) == answers.replay(chosen, speed)).all()


def test_the_curve_is_what_the_classifier_does(
    results: dict[str, Any], classifier: AdaptiveClassifier, many: Task
) -> None:
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    dataset = many.dataset("dev")
    names = np.array(many.label_names)[np.array(dataset["labels"])]
    full = np.array([answer.label for answer in classifier.predict(list(dataset["text"]))])
    rows = len(names)
    for point in results["curve"]:
        if point["speed"] not in (0.05, 0.3, 0.7):
            continue
        early = np.array(
            [answer.label for answer in classifier.predict(list(dataset["text"]), speed=point["speed"])]
        )
        lost, gained = ((full == names) & (early != names)).sum(), ((full != names) & (early == names)).sum()
        assert point["risk"] == pytest.approx((lost - gained) / rows)
        assert point["metric"] == pytest.approx((early == names).mean())
        assert point["changed"] == pytest.approx((early != full).mean())
        if point["p_value"] is not None:
            assert point["p_value"] == pytest.approx(paired_p_value(int(lost), int(gained), rows, 0.1, 0.05))


def test_the_largest_certified_speed_is_chosen(results: dict[str, Any]) -> None:
    curve = results["curve"]
    assert [point["speed"] for point in curve] == [0.0, *SPEEDS]
    accepted = [point for point in curve if point["accepted"]]
    assert curve[: len(accepted)] == accepted
    assert results["speed"] == accepted[-1]["speed"] > 0
    assert all(point["p_value"] <= 0.05 for point in accepted[1:])
    rest = curve[len(accepted) :]
    if rest:
        assert rest[0]["p_value"] > 0.05
        assert all(point["p_value"] is None for point in rest[1:])
        assert results["next"]["speed"] == rest[0]["speed"]
    assert results["at_speed"]["speedup"] == accepted[-1]["speedup"]
    assert curve[0]["speedup"] == 1.0
    assert calibration_table(results).row_count <= 14
    assert "95% confidence" in verdict(results)


def test_rows_that_stand_in_train_are_left_out(
    classifier: AdaptiveClassifier, many: Task, results: dict[str, Any]
) -> None:
    dev = many.dataset("dev")
    known = set(dev["text"][:40])
    shared = np.array([text in known for text in dev["text"]])
    names = {"model_name": "fast", "data_name": "topics"}
    task = replace(many, splits={"train": dev.select(range(40)), "dev": dev})
    found = calibrate(classifier, task, "dev", RiskBudget(most=0.1), **names)
    others = dev.select(np.flatnonzero(~shared))
    alone = calibrate(classifier, replace(many, splits={"dev": others}), "dev", RiskBudget(most=0.1), **names)
    assert (found["left_out"], found["rows"]) == (shared.sum(), len(others))
    assert (alone["left_out"], results["left_out"]) == (0, 0)
    assert (found["curve"], found["speed"]) == (alone["curve"], alone["speed"])
    # The rows as they were given, so that a report can tell that it shows the same.
    assert found["data_sha256"] == results["data_sha256"]
    assert f"{shared.sum()} rows that stand in train too were left out." in verdict(found)

    answers = collect_exit_answers(classifier, task_texts(many, "dev"))
    given = {"answers": answers, "reference_logits": answers.logits[:, -1]}
    again = calibrate(classifier, task, "dev", RiskBudget(most=0.1), **names, **given)
    assert [row["risk"] for row in again["curve"]] == [row["risk"] for row in alone["curve"]]
    everything = replace(many, splits={"train": dev, "dev": dev})
    with pytest.raises(
        InputError, match=f"without the {len(dev)} rows that stand in train too: there are no rows"
    ):
        calibrate(classifier, everything, "dev", RiskBudget(most=0.1), **names)


def test_a_speed_that_costs_more_than_it_saves_is_not_chosen(
    classifier: AdaptiveClassifier, many: Task
) -> None:
    found = calibrate(
        classifier, many, "dev", RiskBudget(most=0.1), model_name="fast", data_name="topics", speeds=[1e-6]
    )
    assert found["curve"][1]["accepted"] and found["curve"][1]["speedup"] < 1
    assert found["speed"] == 0 and found["at_speed"]["speedup"] == 1
    assert found["next"] is None
    assert verdict(found).startswith(
        "Speed 0, though up to speed 1e-06 the accuracy-drop is at most 0.1 with 95%"
    )
    assert "× the MACs of speed 0" in verdict(found)
    assert calibration_table(found).row_count == 2


def test_other_risks_and_modes(classifier: AdaptiveClassifier, many: Task) -> None:
    def speed(**how: Any) -> float:
        budget = RiskBudget(**{"most": 0.1} | how)
        found = calibrate(
            classifier, many, "dev", budget, model_name="fast", data_name="topics", speeds=SPEEDS[::9]
        )
        verdict(found)
        assert calibration_table(found).row_count
        return float(found["speed"])

    drop, empirical = speed(), speed(mode="empirical")
    assert empirical >= drop
    assert speed(confidence=0.999) <= drop
    assert speed(most=0.3, per_class=True) <= speed(most=0.3)
    assert speed(risk="disagreement", most=0.2) <= speed(risk="disagreement", most=0.4)
    assert speed(risk="task-error", most=0.9) == 1.0


def test_per_class_reports_every_class(classifier: AdaptiveClassifier, many: Task) -> None:
    budget = RiskBudget(most=0.3, per_class=True)
    found = calibrate(classifier, many, "dev", budget, model_name="fast", data_name="topics")
    assert [entry["label"] for entry in found["classes"]] == list(many.label_names)
    assert sum(entry["rows"] for entry in found["classes"]) == found["rows"]
    assert max(entry["risk"] for entry in found["classes"]) == found["at_speed"]["risk"]
    assert all(entry["p_value"] <= 0.05 for entry in found["classes"]) or found["speed"] == 0


def test_the_drop_can_be_against_another_model(
    classifier: AdaptiveClassifier, many: Task, teacher: Path, results: dict[str, Any]
) -> None:
    budget = RiskBudget(most=0.1)
    names = {"model_name": "fast", "data_name": "topics"}
    itself = calibrate(classifier, many, "dev", budget, reference=classifier, reference_name="fast", **names)
    assert (itself["reference"], results["reference"]) == ("fast", None)
    assert [row["risk"] for row in itself["curve"]] == [row["risk"] for row in results["curve"]]
    assert itself["speed"] == results["speed"]
    assert itself["curve"][0]["p_value"] is not None and results["curve"][0]["p_value"] is None

    other = AdaptiveClassifier.from_pretrained(teacher)
    labels = np.asarray(many.dataset("dev")["labels"])
    texts = task_texts(many, "dev")
    right = {
        name: np.array([many.label_names.index(answer.label) for answer in model.predict(texts)]) == labels
        for name, model in (("fast", classifier), ("teacher", other))
    }
    found = calibrate(classifier, many, "dev", RiskBudget(most=0.9), reference=other, **names)
    assert found["curve"][0]["risk"] == pytest.approx(right["teacher"].mean() - right["fast"].mean())

    plain = calibrate(other, many, "dev", budget, reference=other, **names)
    assert (plain["speed"], plain["exits"], len(plain["curve"])) == (0.0, [], 1)
    named = plain | {"reference": "teacher"}
    assert verdict(named) == (
        "The model as it is, without exits: the accuracy-drop against teacher is at most 0.1 with 95% confidence."
    )


def test_a_model_that_is_worse_than_the_reference_at_full_depth_is_not_certified(
    classifier: AdaptiveClassifier, many: Task
) -> None:
    worse = copy.copy(classifier)
    worse.backend = copy.copy(classifier.backend)

    def other_answers(batch: Any) -> Any:
        logits, learned = classifier.backend.run_all_exits(batch)
        return logits.roll(1, -1), learned

    worse.backend.run_all_exits = other_answers
    with pytest.raises(NothingCertifiedError, match="full model itself") as error:
        calibrate(
            worse, many, "dev", RiskBudget(most=0.1), reference=classifier, model_name="w", data_name="topics"
        )
    assert "--max-drop" in str(error.value)


def test_requests_that_cannot_be_met_are_refused(
    classifier: AdaptiveClassifier, task: Task, many: Task, teacher: Path
) -> None:
    def refusal(
        budget: RiskBudget, task: Task = task, model: AdaptiveClassifier = classifier, **how: Any
    ) -> str:
        with pytest.raises(InputError) as error:
            calibrate(model, task, "dev", budget, model_name="fast", data_name="topics", **how)
        return str(error.value)

    few = refusal(RiskBudget(most=0.01))
    assert "32 rows are too few" in few and "takes 300" in few and "allow 0.09" in few
    assert "of class" in refusal(RiskBudget(most=0.05, per_class=True))
    assert "full model itself" in refusal(RiskBudget("task-error", 0.02), many)
    assert "max_drop" in refusal(RiskBudget(most=0.0))
    assert "confidence" in refusal(RiskBudget(confidence=1.0))
    assert "risk 'loss'" in refusal(RiskBudget("loss"))
    assert "scale is for regression" in refusal(RiskBudget(scale=1.0))
    assert "no speeds" in refusal(RiskBudget(most=0.3), speeds=[0.0])
    assert "no exits" in refusal(RiskBudget(), model=AdaptiveClassifier.from_pretrained(teacher))


def test_exported_models_are_calibrated_alike(
    results: dict[str, Any], classifier: AdaptiveClassifier, many: Task
) -> None:
    def run_all_exits(batch: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
        logits, learned = classifier.backend.run_all_exits(batch)
        return logits.numpy(), None if learned is None else learned.numpy()

    exported = copy.copy(classifier)
    exported.backend = SimpleNamespace(
        manifest=SimpleNamespace(macs=()),
        run_all_exits=run_all_exits,
        exit_layers=classifier.backend.exit_layers,
        num_layers=classifier.backend.num_layers,
    )
    found = calibrate(exported, many, "dev", RiskBudget(most=0.1), model_name="fast", data_name="topics")
    assert found["speed"] == results["speed"]
    assert [point["risk"] for point in found["curve"]] == [point["risk"] for point in results["curve"]]
    assert found["at_speed"]["speedup"] is None
    assert verdict(found).startswith(f"Speed {found['speed']:g}: ")


def test_losses_of_several_labels_and_of_values() -> None:
    logits = np.array([[[-1, 2], [3, 1]], [[1, 1], [2, 4]], [[1, -3], [1, -1]]], np.float32)
    answers = ExitAnswers((1, 2), logits, None, np.ones(3))
    labels = np.array([[1, 1], [1, 1], [1, 0]])
    policy = ExitPolicy(problem_type="multi_label_classification", num_exits=2)
    replayed = ReplayedExits(answers, policy, labels)
    assert replayed.losses(1.0, RiskBudget()).tolist() == [1, 0, 0]
    assert replayed.losses(1.0, RiskBudget("disagreement")).tolist() == [1, 0, 0]
    assert replayed.losses(0.0, RiskBudget("task-error")).tolist() == [0, 0, 0]

    values = np.array([[[1.0], [2.0]], [[3.0], [3.5]], [[9.0], [0.0]]], np.float32)
    learned = np.zeros((3, 1), np.float32)
    policy = ExitPolicy("learned", problem_type="regression", num_exits=2)
    replayed = ReplayedExits(
        ExitAnswers((1, 2), values, learned, np.ones(3)), policy, np.array([2.0, 3.0, 0.0])
    )
    assert replayed.losses(0.5, RiskBudget("task-error", scale=2.0)).tolist() == [0.5, 0.0, 1.0]
    assert replayed.losses(0.5, RiskBudget("disagreement", scale=2.0)).tolist() == [0.5, 0.25, 1.0]
    assert replayed.losses(0.5, RiskBudget(scale=2.0)).tolist() == [0.5, -0.25, 1.0]
    assert replayed.changed(0.5) == 1.0


def test_texts_without_labels_count_where_every_class_must_keep_to_the_budget() -> None:
    rows, labelled = 1000, 400
    labels = np.zeros((rows, 2), int)
    labels[:labelled] = 1
    full = np.where(labels, 5.0, -5.0)
    # The early exit finds both labels in every text, with or without them.
    early = np.full((rows, 2), 5.0)
    answers = ExitAnswers((1, 2), np.stack([early, full], 1).astype(np.float32), None, np.ones(rows))
    policy = ExitPolicy(problem_type="multi_label_classification", num_exits=2)
    splits = {"dev": Dataset.from_dict({"text": ["a"] * rows, "labels": labels.tolist()})}
    task = Task("tags", "multi_label_classification", ("a", "b"), ("f1_micro",), splits)
    classifier: Any = SimpleNamespace(policy=lambda: policy)
    for budget in (RiskBudget(most=0.05), RiskBudget(most=0.05, per_class=True)):
        assert rows_to_certify(classifier, task, "dev", budget, [1.0], answers=answers) is None
    budget = RiskBudget(most=0.7, per_class=True)
    kind = LossKind.WRONG_DIFFERENCE
    of_all, of_a_class = (rows_needed(kind, share, share, 0.7, LEVEL) for share in (1 - labelled / rows, 0.0))
    assert of_all is not None and of_a_class is not None and of_all > of_a_class * rows / labelled
    assert rows_to_certify(classifier, task, "dev", budget, [1.0], answers=answers) == of_all


@pytest.fixture
def copied(fast: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fast, tmp_path / "fast"))


def test_the_file_is_used_only_where_it_holds(results: dict[str, Any], copied: Path) -> None:
    assert CalibratedSpeed.read(copied) is None
    assert with_calibrated_defaults(copied, {"threads": None}) == {}
    store(results, copied)
    found = CalibratedSpeed.read(copied)
    assert found is not None and found.fits(copied)
    assert (found.speed, found.policy, found.exits) == (results["speed"], "entropy", (1, 2, 3))
    options = with_calibrated_defaults(copied, {"threads": 1, "policy": None})
    assert options == {
        "threads": 1,
        "speed": found.speed,
        "policy": "entropy",
        "exits": [1, 2, 3],
        "max_length": 32,
        "dtype": "fp32",
    }
    assert with_calibrated_defaults(copied, {"exits": (3, 1, 2)})["speed"] == found.speed
    for other in (
        {"speed": 0.3},
        {"policy": "margin"},
        {"exits": [1]},
        {"max_length": 16},
        {"top_k": 2},
        {"dtype": "bf16"},
    ):
        assert with_calibrated_defaults(copied, other) == other
    loaded = AdaptiveClassifier.from_pretrained(copied, **options)
    assert (loaded.speed, loaded.exit_layers) == (found.speed, (1, 2, 3, 4))


def test_the_file_of_another_model_is_not_used(
    results: dict[str, Any], copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store(results, copied)
    weights = copied / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    caplog.set_level("WARNING", "alembert")
    assert with_calibrated_defaults(copied, {}) == {}
    assert "another model" in caplog.text
    assert set(model_files_fingerprint(copied)) == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_a_model_whose_heads_alone_were_trained_again_is_another(tmp_path: Path) -> None:
    backbone = {f"layer.{number}": torch.zeros(1 << 20) for number in range(12)}
    heads = {f"exit_heads.{number}": torch.zeros(64) for number in range(500)}
    fingerprints = []
    for value in (0.0, 1.0):
        save_file(
            backbone | {name: head + value for name, head in heads.items()}, tmp_path / "model.safetensors"
        )
        fingerprints.append(model_files_fingerprint(tmp_path))
    assert fingerprints[0] != fingerprints[1]
    whole = (tmp_path / "model.safetensors").read_bytes()
    offsets = ("[]", "[-9]", "[0.5]", "[1e400]", f"[1{30 * '0'}]", '["a"]')
    headers = [f'{{"a": {{"data_offsets": {each}}}}}'.encode() for each in offsets]
    headers += [b"[]", b"[" * 100_000]
    for broken in (
        *(whole[:3], b"\xff" * 100, len(whole).to_bytes(8, "little") + b"[]"),
        *(len(header).to_bytes(8, "little") + header for header in headers),
    ):
        (tmp_path / "model.safetensors").write_bytes(broken)
        assert model_files_fingerprint(tmp_path)


def test_a_speed_holds_for_the_precision_that_it_was_found_in(fast: Path, many: Task, copied: Path) -> None:
    half = AdaptiveClassifier.from_pretrained(fast, speed=0.0, dtype="bf16")
    store(calibrate(half, many, "dev", RiskBudget(most=0.1), model_name="fast", data_name="topics"), copied)
    assert with_calibrated_defaults(copied, {})["dtype"] == "bf16"
    assert with_calibrated_defaults(copied, {"dtype": "fp32"}) == {"dtype": "fp32"}
    assert AdaptiveClassifier.from_pretrained(copied).settings["dtype"] == "bfloat16"


def test_a_broken_file_is_refused(results: dict[str, Any], copied: Path) -> None:
    store(results, copied)
    whole = read_json(copied / CALIBRATION_FILE)
    for change in ({"speed": 1.5}, {"speed": "fast"}, {"format": 1}, {"exits": ["a"]}, {"policy": None}):
        write_json(copied / CALIBRATION_FILE, whole | change)
        with pytest.raises(InputError, match="calibrate the model again"):
            CalibratedSpeed.read(copied)


# ---- the command ----


def command(*arguments: object) -> None:
    app = typer.Typer()
    app.command()(calibrate_command.calibrate)
    app([str(argument) for argument in arguments], standalone_mode=False)


def test_the_command_prints_json_and_stores_the_speed(
    copied: Path, many: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "calibration.tsv"
    rows = zip(many.dataset("dev")["labels"], many.dataset("dev")["text"], strict=True)
    lines = [f"{many.label_names[label]}\t{text}" for label, text in rows]
    data.write_text("\n".join(["label\ttext", *lines]) + "\n", encoding="utf-8")
    config = tmp_path / "calibrate.yaml"
    config.write_text("max-drop: 0.1\npolicy: margin\n", encoding="utf-8")
    command(copied, "--data", data, "--config", config, "--exits", "1,3", "--json")
    printed = json.loads(capsys.readouterr().out)
    assert (printed["max_drop"], printed["policy"], printed["exits"]) == (0.1, "margin", [1, 3])
    stored = read_json(copied / CALIBRATION_FILE)
    assert {name: stored[name] for name in printed} == printed
    command(copied, "--data", data, "--max-drop", "0.1", "--output", tmp_path / "other.json")
    out = capsys.readouterr().out
    assert f"Speed {read_json(tmp_path / 'other.json')['speed']:g}" in out
    assert "speed-up" in out
    assert read_json(copied / CALIBRATION_FILE) == stored


def test_the_command_takes_the_dev_split_and_says_when_it_is_too_small(
    copied: Path, task_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="topics, dev: 32 rows are too few"):
        command(copied, "--data", task_folder)
    assert not (copied / CALIBRATION_FILE).exists()
    with pytest.raises(InputError, match="--output"):
        command("organisation/model", "--data", task_folder)


def test_a_failed_calibration_says_which_one_stays_in_force(
    results: dict[str, Any], copied: Path, task_folder: Path
) -> None:
    store(results, copied)
    before = (copied / CALIBRATION_FILE).read_bytes()
    with pytest.raises(InputError, match="32 rows are too few") as error:
        command(copied, "--data", task_folder)
    assert f"{copied / CALIBRATION_FILE} of an earlier calibration stays in force" in str(error.value)
    assert f"speed {results['speed']:g}, found for accuracy-drop within 0.1. Delete" in str(error.value)
    assert (copied / CALIBRATION_FILE).read_bytes() == before
    write_json(copied / CALIBRATION_FILE, {"format": 0})
    with pytest.raises(InputError, match=r"guarantees nothing$"):
        command(copied, "--data", task_folder)


def test_train_is_no_split_to_calibrate_on(copied: Path, task_folder: Path) -> None:
    with pytest.raises(InputError, match="--split train"):
        command(copied, "--data", task_folder, "--split", "train")


# ---- rows held out of train ----


@pytest.fixture
def undivided(many: Task, tmp_path: Path) -> Path:
    """Data of train and test, without a dev split; no text stands in it twice."""
    rows = dict(zip(many.dataset("dev")["text"], many.dataset("dev")["labels"], strict=True))
    lines = [f"{many.label_names[label]}\t{text}" for text, label in rows.items()]
    folder = tmp_path / "undivided"
    folder.mkdir()
    for name, part in (("train", lines[:-20]), ("test", lines[-20:])):
        (folder / f"{name}.tsv").write_text("\n".join(["label\ttext", *part]) + "\n", encoding="utf-8")
    return folder


def as_if_trained(run: Path, task: Task, seed: int, teacher: str | None = None) -> Path:
    """Makes a folder the run that training on the task with this seed would have left."""
    configuration: dict[str, Any] = {"task": task.describe(), "settings": {"seed": seed, "max_length": 32}}
    if teacher is not None:
        configuration |= {"teacher": teacher, "teacher_files": weights_fingerprint(teacher)}
    run.mkdir(exist_ok=True)
    write_json(run / "alembert.json", {"configuration": configuration})
    return run


def test_dev_is_what_the_run_or_its_export_held_out(
    copied: Path, undivided: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained_on = load_task(undivided, seed=1)
    teacher = as_if_trained(tmp_path / "teacher", trained_on, 1)
    # The seed of the student's own training says nothing of the data, which its teacher's run divided.
    as_if_trained(copied, trained_on, 7, str(teacher))
    export_classifier(copied, tmp_path / "exported", precision="fp32", exits=[2])
    for source in (copied, tmp_path / "exported"):
        facts: Any = SimpleNamespace(facts=classifier_facts(str(copied)))
        loaded, split = load_calibration_task(str(undivided), str(source), facts, None)
        assert split == "dev" and loaded.fingerprint() == trained_on.fingerprint()
        assert load_evaluation_task(str(undivided), str(source), facts, None)[1] == "test"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_rows_that_the_model_may_have_learned_are_refused(
    fast: Path, copied: Path, undivided: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    facts: Any = SimpleNamespace(facts=classifier_facts(str(copied)))
    ones, others = load_task(undivided, seed=1), load_task(undivided, seed=2)

    def refused(source: Path) -> bool:
        caplog.clear()
        load_evaluation_task(str(undivided), str(source), facts, "dev")
        warned = "may flatter" in caplog.text
        try:
            load_calibration_task(str(undivided), str(source), facts, None)
        except InputError as error:
            assert "not known to be new" in str(error) and "--split test" in str(error)
            assert warned
            return True
        assert not warned
        return False

    teacher = as_if_trained(tmp_path / "teacher", ones, 1)
    assert not refused(teacher)
    assert refused(as_if_trained(copied, others, 2, str(teacher)))
    caplog.clear()
    load_evaluation_task(str(undivided), str(teacher), facts, "dev", others=[str(copied), str(teacher)])
    warnings = [record.getMessage() for record in caplog.records if "may flatter" in record.getMessage()]
    assert len(warnings) == 1 and str(copied) in warnings[0]
    assert refused(as_if_trained(copied, ones, 1, "organisation/teacher"))
    assert refused(as_if_trained(copied, ones, 3))
    # Cut to fewer rows, one split still tells that both were divided alike.
    fewer = replace(ones, splits=ones.splits | {"dev": ones.dataset("dev").select(range(3))})
    assert not refused(as_if_trained(copied, fewer, 1, str(teacher)))
    (teacher / "config.json").write_text("{}")  # trained anew since
    assert refused(copied)
    (teacher / "config.json").unlink()
    assert not refused(copied)
    (copied / "alembert.json").unlink()
    assert refused(copied)


def test_test_rows_are_taken_with_a_warning_only(
    copied: Path, undivided: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(InputError, match="undivided, test: 20 rows are too few"):
        command(copied, "--data", undivided, "--split", "test")
    assert "chosen on test, which therefore no longer measures" in caplog.text
    caplog.clear()
    with pytest.raises(InputError, match="too few"):
        command(copied, "--data", undivided / "test.tsv")
    assert "no longer measures" not in caplog.text
