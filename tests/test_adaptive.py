"""Adaptive inference: exact at speed 0, the same answers in any company, constant memory, in order."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from alembert import AdaptiveClassifier, InputError, Task
from alembert.benchmarks.evaluation import collect_exit_answers
from alembert.runtime import torch_backend
from alembert.runtime.batching import token_budget_batches, windows
from alembert.runtime.policies import POLICIES
from alembert.runtime.torch_backend import _staying

SPEEDS = (0.2, 0.5, 0.8, 1.0)


@pytest.fixture(scope="module")
def classifier(fast: Path) -> AdaptiveClassifier:
    return AdaptiveClassifier.from_pretrained(fast, batch_tokens=64)


@pytest.fixture(scope="module")
def texts(task: Task) -> list[str]:
    """Texts of very different lengths, short and long ones mixed."""
    rows = [*task.dataset("test")["text"], *task.dataset("dev")["text"]]
    return [" ".join([text] * (1 + position % 3)) for position, text in enumerate(rows)]


def test_speed_0_is_the_stock_model_exactly(
    classifier: AdaptiveClassifier, teacher: Path, texts: list[str]
) -> None:
    stock = AutoModelForSequenceClassification.from_pretrained(teacher).eval()
    # The same place in memory for the weights: rounding may depend on it.
    stock.load_state_dict(classifier.backend.model.full_model.state_dict(), assign=True)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    encoded = classifier.encode(texts)
    for policy in POLICIES:
        checked = 0
        for positions, batch in classifier.batches(encoded):
            exited = classifier.backend.run(batch, classifier.policy(policy), 0.0)
            padded = tokenizer(
                [texts[position] for position in positions],
                padding=True,
                truncation=True,
                max_length=32,
                return_tensors="pt",
            )
            assert np.array_equal(padded["input_ids"], batch["input_ids"])
            with torch.no_grad():
                expected = stock(**padded).logits.softmax(-1)
            assert torch.equal(torch.from_numpy(exited.probabilities), expected)
            assert torch.equal(torch.as_tensor(classifier.backend.run_stock(batch)).softmax(-1), expected)
            assert (exited.exit_layers == 4).all()
            assert np.isnan(exited.uncertainties).all()
            checked += len(positions)
        assert checked == len(texts)
        names = [
            stock.config.id2label[int(row.argmax())] for row in classifier.predict_proba(texts, policy=policy)
        ]
        assert [prediction.label for prediction in classifier.predict(texts, policy=policy)] == names


def test_weights_are_those_of_the_teacher(classifier: AdaptiveClassifier, teacher: Path) -> None:
    stock = AutoModelForSequenceClassification.from_pretrained(teacher).state_dict()
    ours = classifier.backend.model.full_model.state_dict()
    assert stock.keys() == ours.keys()
    assert all(torch.equal(stock[name], ours[name]) for name in stock)


@pytest.mark.parametrize("policy", POLICIES)
def test_company_changes_no_answer_and_replaying_takes_the_same_exits(
    classifier: AdaptiveClassifier, texts: list[str], policy: str
) -> None:
    answers = collect_exit_answers(classifier, texts)
    layers = np.array(answers.exit_layers)
    seen: set[int] = set()
    for speed in SPEEDS:
        together = classifier.predict(texts, speed=speed, policy=policy)
        replayed = layers[answers.replay(classifier.policy(policy), speed)]
        assert [prediction.exit for prediction in together] == replayed.tolist()
        probabilities = classifier.predict_proba(texts, speed=speed, policy=policy)
        for position in range(0, len(texts), 7):
            alone = classifier.predict(texts[position], speed=speed, policy=policy)
            assert (alone.label, alone.exit) == (together[position].label, together[position].exit)
            assert alone.score == pytest.approx(together[position].score, abs=1e-5)
            row = classifier.predict_proba([texts[position]], speed=speed, policy=policy)[0]
            np.testing.assert_allclose(row, probabilities[position], rtol=0, atol=1e-5)
        for prediction in together:
            if prediction.exit == 4:
                assert prediction.uncertainty is None
            else:
                assert prediction.uncertainty is not None
                assert 0 <= prediction.uncertainty < speed
        seen |= {prediction.exit for prediction in together}
    assert len(seen) >= 2


def test_more_speed_never_leaves_later(classifier: AdaptiveClassifier, texts: list[str]) -> None:
    exits = [[p.exit for p in classifier.predict(texts, speed=speed)] for speed in (0.0, *SPEEDS)]
    assert (np.diff(np.array(exits), axis=0) <= 0).all()
    assert np.mean(exits[-1]) < np.mean(exits[0])


@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
@pytest.mark.parametrize("window", [1, 8, 4096])
def test_order_is_kept_whatever_the_batches(
    fast: Path, texts: list[str], batch_tokens: int, window: int
) -> None:
    expected = AdaptiveClassifier.from_pretrained(fast).predict_proba(texts, speed=0.5)
    other = AdaptiveClassifier.from_pretrained(fast, batch_tokens=batch_tokens, window=window, speed=0.5)
    np.testing.assert_allclose(other.predict_proba(texts), expected, rtol=0, atol=1e-5)
    order = np.random.default_rng(0).permutation(len(texts))
    shuffled = other.predict_proba([texts[position] for position in order])
    np.testing.assert_allclose(shuffled, expected[order], rtol=0, atol=1e-5)


def test_input_is_read_a_window_at_a_time(fast: Path, texts: list[str]) -> None:
    classifier = AdaptiveClassifier.from_pretrained(fast, window=8)
    read = 0

    def source() -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield texts[read % len(texts)]

    stream = classifier.stream(source(), speed=0.5)
    assert read == 0
    for answered in range(1, 30):
        next(stream)
        assert read == 8 * ((answered + 7) // 8)


@given(st.lists(st.integers(), max_size=40), st.integers(1, 10))
@settings(max_examples=50, deadline=None)
def test_windows_are_consecutive(items: list[int], size: int) -> None:
    parts = list(windows(iter(items), size))
    assert [item for part in parts for item in part] == items
    assert all(len(part) == size for part in parts[:-1])


@given(st.lists(st.integers(0, 600), max_size=80), st.integers(1, 2000))
@settings(max_examples=200, deadline=None)
def test_token_budget_batches_are_a_partition_within_budget(lengths: list[int], budget: int) -> None:
    batches = token_budget_batches(lengths, budget)
    assert sorted(position for batch in batches for position in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[position] for position in batch)
        assert len(batch) == 1 or len(batch) * longest <= budget
    order = [lengths[position] for batch in batches for position in batch]
    assert order == sorted(order, reverse=True)


def test_overrides_hold_for_one_call(classifier: AdaptiveClassifier, texts: list[str]) -> None:
    before = classifier.predict(texts)
    assert {prediction.exit for prediction in before} == {4}
    margin = classifier.predict(texts, speed=0.9, policy="margin")
    entropy = classifier.predict(texts, speed=0.9)
    two = classifier.predict(texts, speed=0.9, policy="top_k_entropy", top_k=2)
    every = classifier.predict(texts, speed=0.9, policy="top_k_entropy", top_k=3)
    assert margin != entropy
    assert two != every
    assert [p.exit for p in every] == [p.exit for p in entropy]
    printed = classifier.predict(texts, speed=0.9, policy="top_k_entropy", top_k=2, renormalise=False)
    assert printed != two
    assert classifier.predict(texts) == before


def test_defaults_of_construction_and_of_the_model(fast: Path, texts: list[str]) -> None:
    set_once = AdaptiveClassifier.from_pretrained(fast, speed=0.6, policy="top_k_entropy", top_k=2)
    plain = AdaptiveClassifier.from_pretrained(fast)
    how: dict[str, Any] = {"speed": 0.6, "policy": "top_k_entropy", "top_k": 2}
    assert set_once.predict(texts) == plain.predict(texts, **how)
    assert set_once.predict(texts, speed=0.0) == plain.predict(texts)
    assert set_once.predict(texts, policy="margin") == plain.predict(texts, speed=0.6, policy="margin")

    stored = AdaptiveClassifier.from_pretrained(fast)
    stored.backend.model.config.update(how)
    from_config = AdaptiveClassifier(stored.backend.model, stored.tokenizer, max_length=32)
    assert from_config.predict(texts) == plain.predict(texts, **how)
    overridden = AdaptiveClassifier(stored.backend.model, stored.tokenizer, max_length=32, speed=0.0)
    assert overridden.predict(texts) == plain.predict(texts)


def test_one_text_none_and_pairs(classifier: AdaptiveClassifier, texts: list[str]) -> None:
    one = classifier.predict(texts[0])
    assert one.label == classifier.predict([texts[0]])[0].label
    assert classifier.predict([]) == []
    assert classifier.predict_proba([]).shape == (0, 3)
    for method in (classifier.predict_proba, lambda text: list(classifier.stream(text))):
        with pytest.raises(InputError, match="put it in a list"):
            method(texts[0])
    pairs = list(zip(texts[:6], texts[6:12], strict=True))
    with pytest.raises(InputError, match="trained on single texts"):
        classifier.predict(pairs)
    with pytest.raises(InputError, match="trained on pairs of texts"):
        AdaptiveClassifier(classifier.backend.model, classifier.tokenizer, is_pair=True).predict(texts[0])
    either = AdaptiveClassifier(classifier.backend.model, classifier.tokenizer, max_length=32)
    tokenizer = AutoTokenizer.from_pretrained(classifier.tokenizer.name_or_path)
    encoded = tokenizer(
        texts[:6], texts[6:12], padding=True, truncation=True, max_length=32, return_tensors="pt"
    )
    with torch.no_grad():
        expected = classifier.backend.model(**encoded).logits.softmax(-1)
    np.testing.assert_allclose(either.predict_proba(pairs), expected, rtol=0, atol=1e-5)
    assert either.predict(pairs[0]).label == either.predict(pairs)[0].label


@pytest.mark.parametrize("window", [2, 100])
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("", "is empty"),
        (" \t\n", "is empty"),
        (7, "must be a string"),
        (None, "must be a string"),
        ("ü \ud800", r"holds the lone surrogate U\+D800 at character 3"),
        ("caf\udce9", r"holds the lone surrogate U\+DCE9"),
    ],
)
def test_wrong_texts_are_named_by_position(fast: Path, window: int, bad: Any, words: str) -> None:
    classifier = AdaptiveClassifier.from_pretrained(fast, window=window)
    with pytest.raises(InputError, match=f"text 3[: ].*{words}|text 3 {words}"):
        classifier.predict(["soup", "rain", "goal", bad, "soup"])
    with pytest.raises(InputError, match="text 4099"):
        list(classifier.stream(["soup", "rain", "goal", bad], start=4096))


def test_other_wrong_input_is_refused(fast: Path, classifier: AdaptiveClassifier) -> None:
    with pytest.raises(InputError, match="mixed"):
        classifier.predict(["soup", ("soup", "rain")])
    with pytest.raises(InputError, match="empty"):
        classifier.predict([("soup", "")])
    for speed in (-0.1, 1.1, float("nan"), "fast"):
        with pytest.raises(InputError, match="number from 0"):
            classifier.predict(["soup"], speed=speed)
        with pytest.raises(InputError, match="number from 0"):
            AdaptiveClassifier.from_pretrained(fast, speed=speed)
    with pytest.raises(InputError, match="Unknown exit policy"):
        classifier.predict(["soup"], policy="guess")
    with pytest.raises(InputError, match="top_k is 4"):
        classifier.predict(["soup"], policy="top_k_entropy", top_k=4)
    with pytest.raises(InputError, match="belong to the exit policy"):
        classifier.predict(["soup"], policy="entropy", top_k=2)
    for wrong_text in ((), ("soup",), ("soup", "bread", "tea"), ("soup", 3), 3):
        with pytest.raises(InputError, match="text 1: must be a string or a pair of strings"):
            classifier.predict(["soup", wrong_text])
    assert AdaptiveClassifier.from_pretrained(fast, device="cpu").batch_tokens == 512
    for wrong in ({"batch_tokens": 0}, {"window": 0}):
        with pytest.raises(InputError, match="at least 1"):
            AdaptiveClassifier.from_pretrained(fast, **wrong)


def test_a_stock_classifier_runs_too_but_has_no_learned_exit(teacher: Path, texts: list[str]) -> None:
    classifier = AdaptiveClassifier.from_pretrained(teacher)
    assert classifier.exit_layers == (4,)
    assert {prediction.exit for prediction in classifier.predict(texts, speed=1.0)} == {4}


def test_learned_policy_needs_a_learned_exit(fast: Path, texts: list[str]) -> None:
    classifier = AdaptiveClassifier.from_pretrained(fast)
    classifier.backend.model.learned_exit = None
    with pytest.raises(InputError, match="learned exit"):
        classifier.predict(texts, speed=0.5, policy="learned")


def test_exits_can_be_chosen_at_run_time(fast: Path, task: Task) -> None:
    texts = list(task.dataset("test")["text"])
    every = AdaptiveClassifier.from_pretrained(fast, speed=0.7)
    some = AdaptiveClassifier.from_pretrained(fast, speed=0.7, exits=[3, 1])
    assert every.exit_layers == (1, 2, 3, 4)
    assert some.exit_layers == (1, 3, 4)
    answers = some.predict(texts)
    assert {answer.exit for answer in answers} <= {1, 3, 4}
    for chosen, full in zip(answers, every.predict(texts), strict=True):
        assert chosen.exit == full.exit if full.exit != 2 else chosen.exit >= 3
    collected = collect_exit_answers(some, texts)
    assert collected.logits.shape[1] == 3
    taken = collected.replay(some.policy(), 0.7)
    assert [collected.exit_layers[index] for index in taken] == [answer.exit for answer in answers]


class _HostReads(TorchDispatchMode):
    """Counts operations for whose results the host has to wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")[1]
        by_mask = name == "index" and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if by_mask or name in (
            "nonzero",
            "item",
            "_local_scalar_dense",
            "is_nonzero",
            "masked_select",
            "equal",
        ):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", POLICIES)
def test_the_host_waits_for_the_device_once_per_exit(
    fast: Path, texts: list[str], policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = AdaptiveClassifier.from_pretrained(fast)
    told: list[tuple[int, int]] = []

    def staying(leaves: torch.Tensor, mask: torch.Tensor) -> tuple[int, int]:
        told.append(_staying(leaves, mask))
        kept = mask[~leaves]
        assert told[-1] == (len(kept), int(kept.sum(1).max()) if len(kept) else 0)
        return told[-1]

    monkeypatch.setattr(torch_backend, "_staying", staying)
    (_, batch), *_ = classifier.batches(classifier.encode(texts))
    chosen = classifier.policy(policy)
    expected = classifier.backend.run(batch, chosen, 0.7)
    told.clear()
    monkeypatch.setattr(torch_backend, "_staying", lambda *given: told.append(_staying(*given)) or told[-1])
    with _HostReads() as reads:
        found = classifier.backend.run(batch, chosen, 0.7)
    assert 1 <= len(told) <= 3
    # transformers asks every mask that it is given whether it masks anything: at the start, and when rows left.
    assert set(reads.names) <= {"is_nonzero"} and len(reads.names) <= 1 + len(told)
    assert np.array_equal(found.exit_layers, expected.exit_layers)


def test_half_precision_and_devices(fast: Path, teacher: Path, texts: list[str], tmp_path: Path) -> None:
    full = AdaptiveClassifier.from_pretrained(fast, speed=0.5, device="cpu")
    half = AdaptiveClassifier.from_pretrained(fast, speed=0.5, dtype="bf16")
    assert {weight.dtype for weight in half.backend.model.parameters()} == {torch.bfloat16}
    assert (half.settings["dtype"], full.settings["dtype"]) == ("bfloat16", "float32")
    assert full.settings["device"] == "cpu"
    probabilities = half.predict_proba(texts, speed=0.0)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities, full.predict_proba(texts, speed=0.0), atol=0.05)
    same = [
        one.label == other.label for one, other in zip(half.predict(texts), full.predict(texts), strict=True)
    ]
    assert np.mean(same) > 0.9
    with pytest.raises(InputError, match="precision 'int4'"):
        AdaptiveClassifier.from_pretrained(fast, dtype="int4")
    for device in ("abacus", "cuda:77"):
        with pytest.raises(InputError, match=f"device '{device}'"):
            AdaptiveClassifier.from_pretrained(teacher, device=device)


@pytest.mark.parametrize("exits", [[5], [0, 1]])
def test_exits_that_the_model_lacks_are_refused(fast: Path, exits: list[int]) -> None:
    with pytest.raises(InputError, match="no exit after layer"):
        AdaptiveClassifier.from_pretrained(fast, exits=exits)


def test_an_answer_that_is_no_number_is_an_error(fast: Path, texts: list[str]) -> None:
    classifier = AdaptiveClassifier.from_pretrained(fast, window=4)
    answer = classifier.backend.run

    def broken(batch: Any, *how: Any) -> Any:
        exited = answer(batch, *how)
        exited.probabilities[(batch["input_ids"][:, 1] == unlike).nonzero()] = np.nan
        return exited

    unlike = classifier.encode(["goal"])[0]["input_ids"][1]
    classifier.backend.run = broken
    assert len(classifier.predict(["soup", "rain"])) == 2
    for call in (classifier.predict, classifier.predict_proba):
        with pytest.raises(InputError, match=r"text 5: the model's answer is no finite number: its weights"):
            call([*["soup"] * 5, "goal", "rain"])
    with pytest.raises(InputError, match="text 0: the model's answer"):
        classifier.predict("goal")


def test_a_mapping_and_a_list_for_a_pair_are_refused(classifier: AdaptiveClassifier) -> None:
    for method in (classifier.predict, classifier.predict_proba):
        with pytest.raises(InputError, match="a dict is given where a list of texts belongs: give its texts"):
            method({"text": "soup"})
        with pytest.raises(InputError, match=r"text 0: .*; a pair is a tuple: \(text, text_pair\)"):
            method([["soup", "rain"]])


def test_regression_of_several_values_is_refused(teacher: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(teacher, tmp_path / "several")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"problem_type": "regression"}), encoding="utf-8")
    with pytest.raises(
        InputError, match="several: predicts 3 values at once, and only regression of one value"
    ):
        AdaptiveClassifier.from_pretrained(folder)


def test_classes_are_the_labels_under_scikit_learns_name(classifier: AdaptiveClassifier) -> None:
    assert classifier.classes_.tolist() == list(classifier.label_names) == ["food", "sport", "weather"]
