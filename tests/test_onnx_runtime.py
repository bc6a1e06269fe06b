"""Exported models behind `AdaptiveClassifier`: torch's answers, in any batches, from any thread, or a refusal."""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from alembert import AdaptiveClassifier, InputError, Task
from alembert.models.loading import load_classifier, load_encoder
from alembert.models.multi_exit import MultiExitModel
from alembert.runtime import onnx_backend, processor, tokenization
from alembert.runtime.batching import pad_rows, run_regrouped
from alembert.runtime.exited import ExitedBatch, array_probabilities, join
from alembert.runtime.export import export_classifier
from alembert.runtime.onnx_backend import longest, return_freed_memory
from alembert.runtime.policies import POLICIES, PROBLEM_TYPES, ExitPolicy
from alembert.runtime.processor import adds_up_in_16_bits, usable_threads
from alembert.runtime.tokenization import TokenizersEncoder, TransformersEncoder
from alembert.runtime.torch_backend import to_probabilities

SPEEDS = (0.0, 0.3, 0.6, 0.9, 1.0)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, fast: Path) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "fast"
    export_classifier(fast, folder, precision="fp32")
    return folder


@pytest.fixture(scope="module")
def classifier(exported: Path) -> AdaptiveClassifier:
    return AdaptiveClassifier.from_pretrained(exported)


@pytest.fixture(scope="module")
def by_torch(fast: Path) -> AdaptiveClassifier:
    return AdaptiveClassifier.from_pretrained(fast)


@pytest.fixture(scope="module")
def texts(task: Task) -> list[str]:
    rows = [*task.dataset("test")["text"], *task.dataset("dev")["text"]]
    return [" ".join([text] * (1 + position % 3)) for position, text in enumerate(rows)]


@pytest.mark.parametrize("policy", POLICIES)
def test_answers_and_exits_are_those_of_torch(
    classifier: AdaptiveClassifier, by_torch: AdaptiveClassifier, texts: list[str], policy: str
) -> None:
    seen: set[int] = set()
    for speed in SPEEDS:
        how: dict[str, Any] = {"speed": speed, "policy": policy}
        expected, answers = by_torch.predict(texts, **how), classifier.predict(texts, **how)
        assert [a.exit for a in answers] == [e.exit for e in expected]
        assert [a.label for a in answers] == [e.label for e in expected]
        np.testing.assert_allclose(
            classifier.predict_proba(texts, **how), by_torch.predict_proba(texts, **how), rtol=0, atol=1e-5
        )
        for answer, other in zip(answers, expected, strict=True):
            assert (answer.uncertainty is None) == (other.uncertainty is None) == (answer.exit == 4)
            assert answer.uncertainty is None or answer.uncertainty == pytest.approx(
                other.uncertainty, abs=1e-5
            )
        seen |= {answer.exit for answer in answers}
    assert len(seen) >= 2


@pytest.mark.parametrize("policy", ["entropy", "patience", "learned"])
@pytest.mark.parametrize(("batch_tokens", "window"), [(1, 7), (40, 7), (40, 4096), (200, 20), (4096, 4096)])
def test_regrouping_changes_neither_answers_nor_order(
    exported: Path,
    classifier: AdaptiveClassifier,
    texts: list[str],
    policy: str,
    batch_tokens: int,
    window: int,
) -> None:
    for speed in (0.3, 0.7, 1.0):
        how: dict[str, Any] = {"speed": speed, "policy": policy}
        expected = [classifier.predict(text, **how) for text in texts]
        for regroup in (True, False):
            other = AdaptiveClassifier.from_pretrained(
                exported, batch_tokens=batch_tokens, window=window, regroup=regroup, verify=False
            )
            answers = other.predict(texts, **how)
            assert [a.exit for a in answers] == [e.exit for e in expected]
            assert [a.label for a in answers] == [e.label for e in expected]
            np.testing.assert_allclose(
                [a.score for a in answers], [e.score for e in expected], rtol=0, atol=1e-5
            )


@dataclass
class Rows:
    positions: np.ndarray
    segment: int
    tokens: int


class Countdown:
    """Stands in for a backend: each row has a depth of its own, after which it leaves."""

    def __init__(self, depths: Sequence[int], lengths: Sequence[int]) -> None:
        self.depths, self.lengths = np.array(depths), np.array(lengths)
        self.sizes: list[tuple[int, int, int]] = []

    def start(self, batch: dict[str, np.ndarray], positions: np.ndarray) -> Rows:
        return Rows(positions, 0, int(self.lengths[positions].max()))

    def advance(
        self, rows: Rows, policy: ExitPolicy, speed: float
    ) -> tuple[tuple[np.ndarray, ExitedBatch] | None, Rows | None]:
        self.sizes.append((rows.segment, len(rows.positions), rows.tokens))
        leaves = self.depths[rows.positions] == rows.segment
        gone, stay = rows.positions[leaves], rows.positions[~leaves]
        layers = np.full(len(gone), rows.segment)
        answers = ExitedBatch(gone[:, None].astype(np.float32), layers, np.zeros(len(gone), np.float32))
        going_on = Rows(stay, rows.segment + 1, int(self.lengths[stay].max())) if len(stay) else None
        return ((gone, answers) if len(gone) else None), going_on

    def merge(self, parts: Sequence[Rows]) -> Rows:
        assert len({part.segment for part in parts}) == 1
        positions = np.concatenate([part.positions for part in parts])
        return Rows(positions, parts[0].segment, max(part.tokens for part in parts))


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 30)), min_size=1, max_size=60), st.integers(1, 200)
)
@settings(max_examples=50, deadline=None)
def test_regrouped_batches_stay_within_the_limit_and_lose_no_row(
    rows: list[tuple[int, int]], limit: int
) -> None:
    rows = sorted(rows, key=lambda row: -row[1])
    depths, lengths = zip(*rows, strict=True)
    backend = Countdown(depths, lengths)
    batches = []
    start = 0
    while start < len(rows):
        size = max(1, limit // lengths[start])
        batches.append((np.arange(start, min(start + size, len(rows))), {}))
        start += size
    exited = join(run_regrouped(backend, batches, ExitPolicy(), 0.5, limit))
    assert exited.probabilities[:, 0].tolist() == list(range(len(rows)))
    assert exited.exit_layers.tolist() == list(depths)
    for _, count, tokens in backend.sizes:
        assert count == 1 or count * tokens <= limit
    # Never more runs of a segment than batch by batch.
    for segment in range(6):
        alone = sum(any(depths[p] >= segment for p in positions) for positions, _ in batches)
        assert sum(ran == segment for ran, _, _ in backend.sizes) <= alone


def test_survivors_of_several_batches_run_together(
    classifier: AdaptiveClassifier, exported: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    for regroup in (True, False):
        other = AdaptiveClassifier.from_pretrained(exported, batch_tokens=150, regroup=regroup, speed=0.9)
        advance = other.backend.advance

        def counted(rows: Any, *how: Any, kept: Any = runs[regroup], original: Any = advance) -> Any:
            kept.append((rows.segment, len(rows.positions)))
            return original(rows, *how)

        monkeypatch.setattr(other.backend, "advance", counted)
        other.predict(texts)
    for segment in range(4):
        together, alone = (
            [rows for ran, rows in runs[regroup] if ran == segment] for regroup in (True, False)
        )
        assert sum(together) == sum(alone)
        assert len(together) <= len(alone)
    assert len(runs[True]) < len(runs[False])


def test_threads_share_one_classifier(classifier: AdaptiveClassifier, texts: list[str]) -> None:
    expected = classifier.predict_proba(texts, speed=0.6)
    shares = [texts[start::5] for start in range(5)] * 4
    with ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(lambda share: classifier.predict_proba(share, speed=0.6), shares))
    for index, answer in enumerate(answers):
        np.testing.assert_allclose(answer, expected[index % 5 :: 5], rtol=0, atol=1e-5)


def test_exits_can_be_chosen_and_all_be_looked_at(
    exported: Path, classifier: AdaptiveClassifier, by_torch: AdaptiveClassifier, fast: Path, texts: list[str]
) -> None:
    some = AdaptiveClassifier.from_pretrained(exported, exits=[3, 1], speed=0.7)
    same = AdaptiveClassifier.from_pretrained(fast, exits=[1, 3], speed=0.7)
    assert some.exit_layers == (1, 3, 4)
    assert [a.exit for a in some.predict(texts)] == [a.exit for a in same.predict(texts)]
    with pytest.raises(InputError, match="no exit after layer 5"):
        AdaptiveClassifier.from_pretrained(exported, exits=[5])
    for _, batch in classifier.batches(classifier.encode(texts[:9])):
        logits, learned = classifier.backend.run_all_exits(batch)
        expected, expected_learned = by_torch.backend.run_all_exits(batch)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
        np.testing.assert_allclose(learned, expected_learned, rtol=0, atol=1e-4)
        few, few_learned = some.backend.run_all_exits(batch)
        np.testing.assert_allclose(few, logits[:, [0, 2, 3]], rtol=0, atol=1e-5)
        np.testing.assert_allclose(few_learned, learned[:, [0, 2]], rtol=0, atol=1e-5)
        np.testing.assert_allclose(classifier.backend.run_stock(batch), logits[:, -1], rtol=0, atol=1e-5)


def test_a_head_that_nobody_asks_is_not_run(
    teacher: Path, tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, sizes = load_classifier(str(teacher)), {}
    for head_size in (8, 2048):
        model = MultiExitModel.from_full_model(stock, exit_layers=(1, 3), exit_head_size=head_size)
        model.save_pretrained(tmp_path / f"model-{head_size}")
        AutoTokenizer.from_pretrained(teacher).save_pretrained(tmp_path / f"model-{head_size}")
        folder = tmp_path / f"export-{head_size}"
        export_classifier(tmp_path / f"model-{head_size}", folder, precision="fp32")
        sizes[head_size] = {path.name: path.stat().st_size for path in folder.glob("*.onnx")}
    for name, size in sizes[2048].items():
        # Nothing of a head is in a segment's graph, so a segment cannot run it.
        assert (size > 1e7) == name.startswith("exit-")
        assert abs(size - sizes[8][name]) < 100 or name.startswith("exit-")
    ran: list[int] = []
    for exits, speed, expected in (
        (None, 0.0, []), (None, 1e-9, [1, 3]), ([3], 1e-9, [3]), ([], 1e-9, []), ([1], 1.0, [1]),
    ):  # fmt: skip
        classifier = AdaptiveClassifier.from_pretrained(folder, exits=exits, verify=False)
        assert list(classifier.backend._heads) == [layer for layer in exits or (1, 3) if exits != []]
        for layer, head in classifier.backend._heads.items():
            run = head._session.run
            counting = SimpleNamespace(run=lambda *how, n=layer, r=run: (ran.append(n), r(*how))[1])
            monkeypatch.setattr(head, "_session", counting)
        classifier.predict_proba(texts[:5], speed=speed)
        assert ran == expected
        ran.clear()


@pytest.mark.parametrize(
    ("precision", "policy"),
    [("fp32", None), ("int8", None), ("fp32", "learned"), ("fp32", "top_k_entropy"), ("fp32", "margin")],
)
def test_a_single_text_goes_through_the_merged_graph(
    fast: Path, tmp_path: Path, texts: list[str], precision: str, policy: str | None
) -> None:
    model = load_classifier(str(fast))
    model.config.policy = policy
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(fast).save_pretrained(tmp_path / "model")
    export_classifier(tmp_path / "model", tmp_path / "merged", precision=precision, merge_exits="all")
    classifier = AdaptiveClassifier.from_pretrained(tmp_path / "merged")
    assert classifier.backend._merged is None, "its weights are in memory before a single text has come"
    taken = set()
    for speed in SPEEDS:
        expected = classifier.predict(texts[:8], speed=speed)
        # The first texts come from several threads at once.
        with ThreadPoolExecutor(4) as pool:
            alone = list(pool.map(partial(classifier.predict, speed=speed), texts[:8]))
        taken |= {answer.exit for answer in alone}
        assert [(a.label, a.exit) for a in alone] == [(e.label, e.exit) for e in expected]
        for answer, other in zip(alone, expected, strict=True):
            assert answer.score == pytest.approx(other.score, abs=1e-4)
            assert answer.uncertainty == pytest.approx(other.uncertainty, abs=1e-4)
    assert len(taken) >= 2
    assert classifier.backend._merged is not None


@pytest.mark.parametrize(
    ("problem_type", "policy"),
    [("multi_label_classification", "entropy"), ("multi_label_classification", "patience"),
     ("regression", "patience")],
)  # fmt: skip
def test_a_single_text_of_other_problem_types(
    tiny_encoder: Path, tmp_path: Path, texts: list[str], problem_type: str, policy: str
) -> None:
    names = [] if problem_type == "regression" else ["a", "b", "c"]
    torch.manual_seed(3)
    full_model = load_encoder(str(tiny_encoder), label_names=names, problem_type=problem_type)
    model = MultiExitModel.from_full_model(full_model, exit_layers=(1, 3), exit_head="mean")
    model.config.policy = policy
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(tmp_path / "model")
    merge = "all" if policy == "entropy" else None
    export_classifier(tmp_path / "model", tmp_path / "out", precision="fp32", merge_exits=merge)
    opened = [AdaptiveClassifier.from_pretrained(folder) for folder in (tmp_path / "out", tmp_path / "model")]
    for speed in (0.0, 0.99, 1.0):
        batch = opened[1].predict(texts[:6], speed=speed)
        for classifier in opened:
            for text, expected in zip(texts[:6], batch, strict=True):
                found = classifier.predict(text, speed=speed)
                assert (found.exit, type(found.label)) == (expected.exit, type(expected.label))
                assert found.label == (
                    pytest.approx(expected.label, abs=1e-4)
                    if problem_type == "regression"
                    else expected.label
                )
                assert found.score == pytest.approx(expected.score, abs=1e-4)
                assert found.uncertainty == (
                    None if expected.uncertainty is None else pytest.approx(expected.uncertainty, abs=1e-4)
                )
    if problem_type != "regression":
        assert {len(answer.label) for answer in opened[0].predict(texts)} != {0}
    if merge:
        assert opened[0].backend._merged is not None, "the segments answered"


def test_an_export_with_another_policy(fast: Path, tmp_path: Path, texts: list[str]) -> None:
    manifest = export_classifier(
        fast, tmp_path / "out", precision="fp32", merge_exits="all", policy="max_probability"
    )
    assert (manifest.policy, manifest.top_k) == ("max_probability", None)
    classifier, by_torch = (AdaptiveClassifier.from_pretrained(path) for path in (tmp_path / "out", fast))
    assert classifier.policy().name == "max_probability" != by_torch.policy().name
    exits = set()
    for text in texts[:8]:
        found, expected = (
            classifier.predict(text, speed=0.6),
            by_torch.predict(text, speed=0.6, policy="max_probability"),
        )
        assert (found.label, found.exit) == (expected.label, expected.exit)
        exits.add(found.exit)
    assert len(exits) > 1
    assert classifier.backend._merged is not None
    few = export_classifier(fast, tmp_path / "few", precision="fp32", policy="top_k_entropy", top_k=2)
    assert (few.policy, few.top_k) == ("top_k_entropy", 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"policy": "certainty"}, "choose one of entropy"),
     ({"policy": "top_k_entropy", "top_k": 4}, "between 2 and 3"),
     ({"policy": "margin", "top_k": 2}, "belong to the exit policy 'top_k_entropy'"),
     ({"policy": "margin", "exits": []}, "has no exits, or none is kept"),
     ({"policy": "patience", "merge_exits": "all"}, "'patience' does not")],
)  # fmt: skip
def test_an_export_with_a_policy_that_does_not_fit(
    fast: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        export_classifier(fast, tmp_path / "out", precision="fp32", **options)
    assert not (tmp_path / "out").exists()


def test_an_export_with_a_learned_policy_needs_a_learned_exit(teacher: Path, tmp_path: Path) -> None:
    full_model = load_classifier(str(teacher))
    model = MultiExitModel.from_full_model(full_model, exit_layers=(1,), exit_head="mean")
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(teacher).save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="learned_exit=true"):
        export_classifier(tmp_path / "model", tmp_path / "out", precision="fp32", policy="learned")


def test_memory_is_given_back_after_opening(
    fast: Path, tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert return_freed_memory() == (platform.libc_ver()[0] == "glibc")
    given_back: list[int] = []
    monkeypatch.setattr(onnx_backend, "return_freed_memory", lambda: given_back.append(1))
    export_classifier(fast, tmp_path / "out", precision="fp32", merge_exits="all")
    opened = AdaptiveClassifier.from_pretrained(tmp_path / "out")
    assert len(given_back) == 1
    for text in texts[:3]:
        opened.predict(text, speed=0.5)
    assert len(given_back) == 2


def test_the_merged_graph_answers_only_what_it_was_made_for(
    fast: Path,
    tmp_path: Path,
    texts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    export_classifier(fast, tmp_path / "merged", precision="fp32", merge_exits="all")
    classifier = AdaptiveClassifier.from_pretrained(tmp_path / "merged")
    classifier.warm_up([3])
    asked: list[float] = []
    run = classifier.backend._merged.run

    def noted(inputs: dict[str, Any], mask: Any) -> Any:
        asked.append(float(inputs["speed"]))
        return run(inputs, mask)

    monkeypatch.setattr(classifier.backend._merged, "run", noted)
    classifier.predict(texts[0], speed=0.5)
    assert asked == [0.5]
    classifier.predict(texts[:2], speed=0.5)
    classifier.predict(texts[0], speed=0.5, policy="margin")
    assert asked == [0.5]
    # Texts of a list whose batches happen to hold one row.
    apart = AdaptiveClassifier.from_pretrained(tmp_path / "merged", batch_tokens=1, regroup=False)
    for speed in (0.0, 0.5):
        apart.predict(texts[:2], speed=speed)
    assert apart.backend._merged is None
    fewer = AdaptiveClassifier.from_pretrained(tmp_path / "merged", exits=[1], speed=0.5)
    fewer.warm_up([3])
    assert fewer.backend._merged is None
    # Another model lies there by the time that the first single text comes.
    late = AdaptiveClassifier.from_pretrained(tmp_path / "merged")
    (tmp_path / "merged" / "merged.onnx").write_bytes(b"another model")
    answers = [late.predict(texts[0], speed=0.5) for _ in range(2)]
    assert answers[0] == answers[1] and answers[0].label == classifier.predict(texts[0], speed=0.5).label
    assert caplog.text.count("Single texts are answered segment by segment") == 1
    assert "merged.onnx: is not the file that was exported" in caplog.text


def test_a_teacher_is_one_segment_and_always_answers_in_full(
    teacher: Path, tmp_path: Path, texts: list[str]
) -> None:
    export_classifier(teacher, tmp_path / "teacher", precision="fp32")
    classifier = AdaptiveClassifier.from_pretrained(tmp_path / "teacher", threads=1)
    assert classifier.exit_layers == (4,)
    assert len(classifier.backend.manifest.segments) == 1
    classifier.warm_up([3, 500])
    expected = AdaptiveClassifier.from_pretrained(teacher).predict_proba(texts)
    for speed in (0.0, 1.0):
        np.testing.assert_allclose(classifier.predict_proba(texts, speed=speed), expected, rtol=0, atol=1e-5)


def test_defaults_and_overrides_are_the_same_as_with_torch(
    exported: Path, classifier: AdaptiveClassifier, by_torch: AdaptiveClassifier, texts: list[str]
) -> None:
    for name in ("max_length", "is_pair", "speed", "label_names", "exit_layers"):
        assert getattr(classifier, name) == getattr(by_torch, name)
    assert classifier.policy() == by_torch.policy()
    how: dict[str, Any] = {"speed": 0.8, "policy": "top_k_entropy", "top_k": 2}
    expected = [a.exit for a in by_torch.predict(texts, **how)]
    assert [a.exit for a in AdaptiveClassifier.from_pretrained(exported, **how).predict(texts)] == expected
    with pytest.raises(InputError, match="trained on single texts"):
        classifier.predict([("soup", "rain")])
    with pytest.raises(InputError, match="text 1 is empty"):
        classifier.predict(["soup", " "])
    short = AdaptiveClassifier.from_pretrained(exported, max_length=5).encode(texts)
    assert max(len(row["input_ids"]) for row in short) == 5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_length": 33}, "max length 33: this model was exported for 3 to 32 tokens"),
        ({"max_length": 2}, "3 to 32"),
        ({"device": "cuda"}, "runs on the processor"),
        ({"threads": 0}, "threads=0"),
        ({"batch_tokens": 0}, "at least 1"),
        ({"policy": "guess"}, "Unknown exit policy"),
    ],
)
def test_options_that_do_not_fit_are_refused(exported: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        AdaptiveClassifier.from_pretrained(exported, **options)


def test_folders_that_are_not_whole_are_refused(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    shutil.copytree(exported, folder)
    graph = sorted(folder.glob("*.onnx"))[1]
    content = graph.read_bytes()
    graph.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=rf"{graph.name}.*checksum"):
        AdaptiveClassifier.from_pretrained(folder)
    with pytest.raises(InputError, match=rf"{graph.name}.*ONNX Runtime"):
        AdaptiveClassifier.from_pretrained(folder, verify=False)
    other = sorted(folder.glob("*.onnx"))[-1]
    graph.write_bytes(other.read_bytes())
    with pytest.raises(InputError, match=rf"{graph.name}.*not what manifest\.json says"):
        AdaptiveClassifier.from_pretrained(folder, verify=False)
    graph.unlink()
    with pytest.raises(InputError, match=rf"{graph.name}.*missing"):
        AdaptiveClassifier.from_pretrained(folder)
    graph.write_bytes(content)
    AdaptiveClassifier.from_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="another tokenizer"):
        AdaptiveClassifier.from_pretrained(folder)
    with pytest.raises(InputError, match="no tokenizer could be read"):
        AdaptiveClassifier.from_pretrained(folder, verify=False)


def test_without_onnx_runtime_the_message_says_what_to_install(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[onnx\]'"):
        AdaptiveClassifier.from_pretrained(exported)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("max_length", [4, 9, 32])
def test_both_tokenizers_give_the_same_ids(
    tiny_encoder: Path, tmp_path: Path, side: str, max_length: int
) -> None:
    slow = AutoTokenizer.from_pretrained(tiny_encoder, truncation_side=side)
    slow.save_pretrained(tmp_path)
    light = TokenizersEncoder(
        tmp_path, reads_token_types=True, pad_token_id=0, pad_token_type_id=0, truncation_side=side
    )
    full = TransformersEncoder(AutoTokenizer.from_pretrained(tmp_path))
    first = ["we saw the soup", "rain", "Über straße 東京 soup!", "a " * 50, "[SEP] [CLS] soup\n\train"]
    second = ["rain", "the storm was very much there again today", "x", "goal " * 30, "soup"]
    for columns in ([first], [first, second], [second, first], [first[:1]], [first[:1], second[:1]]):
        assert light.encode(columns, max_length) == full.encode(columns, max_length)
    assert light.added_tokens(False) == full.added_tokens(False) == 2
    assert light.added_tokens(True) == full.added_tokens(True) == 3
    assert isinstance(light.tokenizer, Tokenizer)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=9), st.booleans())
@settings(max_examples=25, deadline=None)
def test_rows_are_filled_up_to_the_longest(lengths: list[int], with_types: bool) -> None:
    rows = [
        {"input_ids": [7 + i] * n} | ({"token_type_ids": [1] * n} if with_types else {})
        for i, n in enumerate(lengths)
    ]
    padded = pad_rows(rows, {"input_ids": 3, "token_type_ids": 2})
    longest_row = max(lengths)
    assert set(padded) == {*rows[0], "attention_mask"}
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        gap = longest_row - length
        assert padded["input_ids"][index].tolist() == row["input_ids"] + [3] * gap
        assert padded["attention_mask"][index].tolist() == [1] * length + [0] * gap
        if with_types:
            assert padded["token_type_ids"][index].tolist() == [1] * length + [2] * gap
    assert all(array.dtype == np.int64 for array in padded.values())
    assert longest(padded["attention_mask"]) == longest_row
    assert longest(np.zeros((2, 4), np.int64)) == 1


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
def test_probabilities_are_those_of_torch(problem_type: str) -> None:
    logits = np.random.default_rng(0).normal(scale=30, size=(50, 5)).astype(np.float32)
    logits[0] = [1e4, -1e4, 0, 88, -88]
    with np.errstate(all="raise", under="ignore"):
        probabilities = array_probabilities(logits, problem_type)
    assert probabilities.dtype == np.float32
    expected = to_probabilities(torch.from_numpy(logits), problem_type).numpy()
    np.testing.assert_allclose(probabilities, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("quota", "threads"),
    [
        ("max 100000", 8),
        ("250000 100000", 3),
        ("50000 100000", 1),
        ("900000 100000", 8),
        ("odd", 8),
        (None, 8),
    ],
)
def test_threads_are_no_more_than_the_control_groups_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str | None, threads: int
) -> None:
    if quota is not None:
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
    monkeypatch.setattr(processor, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(processor, "CPU_QUOTA_OLD", tmp_path / "cpu")
    monkeypatch.setattr(processor.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    assert usable_threads() == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "9")
    assert usable_threads() == 9
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    if quota is not None:
        # As the first version of control groups has it.
        (tmp_path / "cpu.max").unlink()
        (tmp_path / "cpu").mkdir()
        for name, value in zip(("quota", "period"), quota.replace("max", "-1").split(), strict=False):
            (tmp_path / "cpu" / f"cpu.cfs_{name}_us").write_text(f"{value}\n")
        assert usable_threads() == threads


@pytest.mark.parametrize(
    ("facts", "narrow"),
    [
        ("flags\t\t: fpu avx2 avx512_vnni\n", False),
        ("flags\t\t: fpu avx2 avx_vnni\n", False),
        ("model name\t: x\nflags\t\t: fpu avx2 avx512f\n", True),
        ("Features\t: fp asimd asimddp\n", False),
        (None, False),
    ],
)
def test_int8_on_a_processor_that_overflows_is_warned_of(
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    facts: str | None,
    narrow: bool,
) -> None:
    if facts is not None:
        (tmp_path / "cpuinfo").write_text(facts)
    monkeypatch.setattr(processor, "CPU_FACTS", tmp_path / "cpuinfo")
    assert adds_up_in_16_bits() == narrow
    if facts is None or not narrow:
        return
    for reduce_range in (False, True):
        folder = tmp_path / f"export-{reduce_range}"
        manifest = export_classifier(teacher, folder, reduce_range=reduce_range)
        assert (manifest.reduce_range, manifest.truncation_side) == (reduce_range, "right")
        caplog.clear()
        AdaptiveClassifier.from_pretrained(folder)
        assert ("--reduce-range" in caplog.text) != reduce_range


def test_threads_are_those_that_the_process_may_use(
    exported: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(processor, "CPU_QUOTA", tmp_path / "none")
    monkeypatch.setattr(processor, "CPU_QUOTA_OLD", tmp_path / "none")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert usable_threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    monkeypatch.setattr(processor.os, "sched_getaffinity", lambda _: {0, 5}, raising=False)
    assert usable_threads() == 2
    assert AdaptiveClassifier.from_pretrained(exported).backend.threads == 2
    assert AdaptiveClassifier.from_pretrained(exported, threads=1).backend.threads == 1


@pytest.mark.parametrize("pairs", [False, True])
def test_long_texts_are_tokenised_a_few_at_a_time(
    tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch, pairs: bool
) -> None:
    monkeypatch.setattr(tokenization, "_CHARACTERS_AT_ONCE", 40)
    full = TransformersEncoder(AutoTokenizer.from_pretrained(tiny_encoder))
    light = TokenizersEncoder(
        tiny_encoder, reads_token_types=True, pad_token_id=0, pad_token_type_id=0, truncation_side="right"
    )
    texts = ["soup", "rain " * 30, "we saw the soup", "a " * 9, "goal", "storm", "wind " * 7]
    columns = [texts, texts[::-1]] if pairs else [texts]
    together: list[int] = []
    library, tokenizer = light.tokenizer, full._tokenizer

    def noting(inputs: Any) -> Any:
        together.append(sum(len("".join(each)) for each in inputs) if len(inputs) > 1 else 0)
        return library.encode_batch_fast(inputs)

    light.tokenizer = SimpleNamespace(encode_batch_fast=noting, enable_truncation=library.enable_truncation)  # type: ignore[assignment]
    whole = tokenizer(*columns, truncation=True, max_length=16)
    expected = [
        {"input_ids": ids, "token_type_ids": types}
        for ids, types in zip(whole["input_ids"], whole["token_type_ids"], strict=True)
    ]
    assert light.encode(columns, 16) == full.encode(columns, 16) == expected
    assert len(together) > 2
    assert max(together) <= 40


def test_an_answer_to_one_text_that_is_no_number_is_an_error(
    classifier: AdaptiveClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = classifier.backend.run_alone
    monkeypatch.setattr(
        classifier.backend,
        "run_alone",
        lambda *how: answer(*how)._replace(probabilities=[float("nan"), 0, 0]),
    )
    with pytest.raises(InputError, match="text 0: the model's answer is no finite number"):
        classifier.predict("soup")
