"""A teacher's outputs read from files are those of its forward pass."""

from __future__ import annotations

import logging
import shutil
import threading
from collections import namedtuple
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import alembert.training.teacher_cache
import alembert.training.teacher_cache_files
import alembert.training.teacher_cache_writer
from alembert.common.errors import InputError
from alembert.models.features import LAYER_FEATURES, FeatureRequest, Features
from alembert.training.teacher_cache import TeacherCache
from alembert.training.teachers import CachedTeacher, LiveTeacher

EVERYTHING = FeatureRequest(
    hidden_states=(0, 2, 4),
    attention_scores=(1, 4),
    attention_probabilities=(3,),
    queries=(4,),
    keys=(4,),
    values=(2, 4),
)
LENGTHS = (3, 9, 17, 5, 9, 30, 4, 12, 2, 8)


@pytest.fixture(scope="module")
def tokenizer(tiny_encoder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_encoder)


@pytest.fixture
def model(tiny_encoder: Path) -> PreTrainedModel:
    torch.manual_seed(3)
    return AutoModelForSequenceClassification.from_pretrained(tiny_encoder, num_labels=5)


@pytest.fixture(scope="module")
def data() -> Dataset:
    generator = np.random.default_rng(0)
    ids = [generator.integers(5, 40, size=length).tolist() for length in LENGTHS]
    return Dataset.from_dict(
        {
            "input_ids": ids,
            "attention_mask": [[1] * len(row) for row in ids],
            "token_type_ids": [[0] * (len(row) // 2) + [1] * (len(row) - len(row) // 2) for row in ids],
            "length": [len(row) for row in ids],
        }
    )


def batch(
    data: Dataset, tokenizer: PreTrainedTokenizerBase, rows: list[int], **padding: Any
) -> tuple[dict[str, Tensor], Tensor]:
    pad = DataCollatorWithPadding(tokenizer, **padding)
    return dict(pad(list(data.select(rows).remove_columns("length")))), torch.tensor(rows)


def assert_same(cached: Features, live: Features, request: FeatureRequest, **tolerance: float) -> None:
    """Equal where there are tokens, and 0 elsewhere."""
    token = cached.attention_mask.bool()
    assert cached.attention_mask.equal(live.attention_mask)
    torch.testing.assert_close(cached.logits, live.logits, **tolerance)
    for feature in LAYER_FEATURES:
        assert set(getattr(cached, feature)) == set(getattr(request, feature))
        for layer, value in getattr(cached, feature).items():
            expected = getattr(live, feature)[layer]
            if feature == "hidden_states":
                valid = token[:, :, None]
            elif feature in ("queries", "keys", "values"):
                valid = token[:, None, :, None]
            else:
                valid = token[:, None, :, None] & token[:, None, None, :]
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, expected.where(valid, 0.0), **tolerance)


def files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.suffix == ".npy"}


def count_rows(monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[int]:
    """Records the rows of every batch that a teacher is run on, and interrupts once there are so many batches."""
    seen: list[int] = []
    real = LiveTeacher.__call__

    def run(self: LiveTeacher, inputs: Mapping[str, Tensor], rows: Tensor | None = None) -> Features:
        if stop_after is not None and len(seen) == stop_after:
            raise KeyboardInterrupt
        seen.append(len(inputs["input_ids"]))
        return real(self, inputs, rows)

    monkeypatch.setattr(LiveTeacher, "__call__", run)
    return seen


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [("float32", {"atol": 5e-6, "rtol": 1e-6}), ("float16", {"atol": 1e-3, "rtol": 1e-3})],
)
def test_cached_features_are_the_live_ones_under_any_padding(
    tmp_path: Path,
    model: PreTrainedModel,
    data: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    dtype: Any,
    tolerance: dict[str, float],
) -> None:
    live = LiveTeacher(model, EVERYTHING)
    cached = TeacherCache.prepare(tmp_path, model, data, tokenizer, EVERYTHING, dtype=dtype, batch_size=3)
    for rows in ([0, 1, 2], [5], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]):
        inputs, numbers = batch(data, tokenizer, rows)
        assert_same(cached(inputs, numbers), live(inputs, numbers), EVERYTHING, **tolerance)
    inputs, numbers = batch(data, tokenizer, [3, 6], padding="max_length", max_length=24)
    assert_same(cached(inputs, numbers), live(inputs, numbers), EVERYTHING, **tolerance)


def test_the_same_batch_gives_the_same_bits(
    tmp_path: Path, model: PreTrainedModel, data: Dataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    cached = TeacherCache.prepare(
        tmp_path, model, data, tokenizer, EVERYTHING, dtype="float32", batch_size=10
    )
    longest_first = sorted(range(10), key=lambda row: -LENGTHS[row])
    inputs, rows = batch(data, tokenizer, longest_first)
    assert_same(cached(inputs, rows), LiveTeacher(model, EVERYTHING)(inputs), EVERYTHING, atol=0, rtol=0)


def test_padding_may_stand_in_front(
    tmp_path: Path,
    model: PreTrainedModel,
    data: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    tiny_encoder: Path,
) -> None:
    request = FeatureRequest(hidden_states=(4,), attention_scores=(2,))
    cached = TeacherCache.prepare(tmp_path, model, data, tokenizer, request, dtype="float32")
    left = AutoTokenizer.from_pretrained(tiny_encoder, padding_side="left")
    right_batch, left_batch = (cached(*batch(data, each, [0, 3])) for each in (tokenizer, left))
    torch.testing.assert_close(right_batch.hidden_states[4][0, :3], left_batch.hidden_states[4][0, 2:])
    torch.testing.assert_close(
        right_batch.attention_scores[2][0, :, :3, :3], left_batch.attention_scores[2][0, :, 2:, 2:]
    )
    assert not left_batch.hidden_states[4][0, :2].any()


def test_a_layer_more_adds_one_file(
    tmp_path: Path,
    model: PreTrainedModel,
    data: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    TeacherCache.prepare(tmp_path, model, data, tokenizer, FeatureRequest(hidden_states=(1, 4)))
    before = files(tmp_path)
    assert set(before) == {"logits.npy", "hidden_states-1.npy", "hidden_states-4.npy", "lengths.npy"}
    more = FeatureRequest(hidden_states=(1, 2), values=(4,))
    cached = TeacherCache.prepare(tmp_path, model, data, tokenizer, more)
    after = files(tmp_path)
    assert set(after) - set(before) == {"hidden_states-2.npy", "values-4.npy"}
    for name in set(before) - {"lengths.npy"}:
        assert after[name] == before[name]
    inputs, rows = batch(data, tokenizer, [2, 4])
    assert_same(cached(inputs, rows), LiveTeacher(model, more)(inputs), more, atol=1e-3, rtol=1e-3)

    seen = count_rows(monkeypatch)
    TeacherCache.prepare(tmp_path, model, data, tokenizer, FeatureRequest(values=(4,), hidden_states=(4,)))
    assert seen == []
    assert files(tmp_path) == after


def test_an_interrupted_preparation_goes_on_where_it_was(
    tmp_path: Path, model: PreTrainedModel, data: Dataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    request = FeatureRequest(hidden_states=(3,), attention_scores=(4,))

    def prepare() -> Any:
        return TeacherCache.prepare(tmp_path, model, data, tokenizer, request, dtype="float32", batch_size=2)

    with pytest.MonkeyPatch.context() as patch:
        count_rows(patch, stop_after=3)
        with pytest.raises(KeyboardInterrupt):
            prepare()
    assert set(files(tmp_path)) == {"lengths.npy"}
    with pytest.MonkeyPatch.context() as patch:
        seen = count_rows(patch)
        cached = prepare()
    # The first pass got through two batches after the shortest row; the second measures that row again.
    assert seen == [1, 2, 2, 2]
    inputs, rows = batch(data, tokenizer, list(range(10)))
    assert_same(cached(inputs, rows), LiveTeacher(model, request)(inputs), request, atol=5e-6, rtol=1e-6)
    assert {path.name for path in tmp_path.iterdir()} == {
        ".lock", "teacher_cache.json", "lengths.npy", "logits.npy", "hidden_states-3.npy", "attention_scores-4.npy"
    }  # fmt: skip


def test_another_interrupted_pass_is_not_gone_on_with(
    tmp_path: Path, model: PreTrainedModel, data: Dataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        count_rows(patch, stop_after=3)
        with pytest.raises(KeyboardInterrupt):
            TeacherCache.prepare(
                tmp_path, model, data, tokenizer, FeatureRequest(hidden_states=(3,)), batch_size=2
            )
    request = FeatureRequest(hidden_states=(2,))
    cached = TeacherCache.prepare(tmp_path, model, data, tokenizer, request, dtype="float32")
    inputs, rows = batch(data, tokenizer, list(range(10)))
    assert_same(cached(inputs, rows), LiveTeacher(model, request)(inputs), request, atol=5e-6, rtol=1e-6)
    assert not list(tmp_path.glob(".*partial*"))


def test_a_folder_claimed_by_a_killed_run_is_free(
    tmp_path: Path, model: PreTrainedModel, data: Dataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    request = FeatureRequest(hidden_states=(2,))
    for module, name in ((alembert.training.teacher_cache_writer, "write_json"), (np, "save")):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, name, killed)
            TeacherCache.prepare(tmp_path, model, data, tokenizer, request, dtype="float32")
    cached = TeacherCache.prepare(tmp_path, model, data, tokenizer, request, dtype="float32")
    inputs, rows = batch(data, tokenizer, [7, 2])
    assert_same(cached(inputs, rows), LiveTeacher(model, request)(inputs), request, atol=5e-6, rtol=1e-6)


@pytest.mark.parametrize("layer", [2, 3])
def test_of_two_runs_that_share_a_folder_one_writes_at_a_time(
    tmp_path: Path,
    model: PreTrainedModel,
    data: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    layer: int,
) -> None:
    requests = FeatureRequest(hidden_states=(2,)), FeatureRequest(hidden_states=(layer,))
    half_way, go_on = threading.Event(), threading.Event()
    real, calls = LiveTeacher.__call__, []

    def run(self: LiveTeacher, inputs: Mapping[str, Tensor], rows: Tensor | None = None) -> Features:
        calls.append(self.request)
        if len(calls) == 3:
            half_way.set()
            assert go_on.wait(60)
        return real(self, inputs, rows)

    monkeypatch.setattr(LiveTeacher, "__call__", run)
    monkeypatch.setattr(alembert.training.teacher_cache_files, "_SECONDS_BETWEEN_TRIES", 0.01)

    def prepare(request: FeatureRequest) -> CachedTeacher:
        return TeacherCache.prepare(tmp_path, model, data, tokenizer, request, dtype="float32", batch_size=2)

    with ThreadPoolExecutor() as pool, caplog.at_level(logging.INFO, logger="alembert"):
        first = pool.submit(prepare, requests[0])
        assert half_way.wait(60)
        second = pool.submit(prepare, requests[1])
        with pytest.raises(TimeoutError):
            second.result(timeout=0.3)
        assert len(calls) == 3
        go_on.set()
        teachers = first.result(timeout=60), second.result(timeout=60)
    assert "another run is writing to it" in caplog.text
    # The shortest row alone, then five batches, for each run that has something to write.
    assert len(calls) == (6 if layer == 2 else 12)
    inputs, rows = batch(data, tokenizer, list(range(10)))
    for cached, request in zip(teachers, requests, strict=True):
        live = real(LiveTeacher(model, request), inputs)
        assert_same(cached(inputs, rows), live, request, atol=5e-6, rtol=1e-6)


def test_a_folder_of_something_else_is_refused_with_what_differs(
    tmp_path: Path,
    model: PreTrainedModel,
    data: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    tiny_encoder: Path,
) -> None:
    folder, request = tmp_path / "cache", FeatureRequest(hidden_states=(1,))
    TeacherCache.prepare(folder, model, data, tokenizer, request)
    # The same content in another arrangement is the same data.
    TeacherCache.prepare(folder, model, data.select(range(10)).flatten_indices(), tokenizer, request)

    def refused(match: str, **changes: Any) -> None:
        arguments = {"model": model, "data": data} | changes
        with pytest.raises(InputError, match=match):
            TeacherCache.prepare(
                folder, arguments.pop("model"), arguments.pop("data"), tokenizer, request, **arguments
            )

    refused(
        r"something else \(tokenised data: [0-9a-f]{12} there, [0-9a-f]{12} now\)", data=data.select(range(9))
    )
    reordered = data.select([1, 0, *range(2, 10)])
    refused("tokenised data", data=reordered)
    other = AutoModelForSequenceClassification.from_pretrained(tiny_encoder, num_labels=5)
    refused(r"something else \(teacher: ", model=other)
    refused(r"\(dtype: float16 there, float32 now\)", dtype="float32")
    refused("dtype: .*; tokenised data: .*; teacher: ", dtype="float32", model=other, data=reordered)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and is no teacher cache"):
        TeacherCache.prepare(tmp_path, model, data, tokenizer, request)
    with pytest.raises(InputError, match="is no teacher cache"):
        TeacherCache(tmp_path)


def test_the_same_teacher_loaded_again_is_the_same(
    tmp_path: Path,
    model: PreTrainedModel,
    data: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    request = FeatureRequest(attention_scores=(1,))
    for number in (1, 2):
        model.save_pretrained(tmp_path / str(number))
    first, second = (
        AutoModelForSequenceClassification.from_pretrained(
            tmp_path / str(number), attn_implementation=attention
        )
        for number, attention in ((1, "sdpa"), (2, "eager"))
    )
    TeacherCache.prepare(tmp_path / "cache", first, data, tokenizer, request)
    seen = count_rows(monkeypatch)
    TeacherCache.prepare(tmp_path / "cache", second.train(), data, tokenizer, request)
    assert seen == []


def test_the_announced_size_is_that_on_disk(
    tmp_path: Path,
    model: PreTrainedModel,
    data: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(alembert.training.teacher_cache_writer, "_gib", lambda size: f"{size} bytes")
    request = FeatureRequest(hidden_states=(0, 4), attention_scores=(4,), queries=(1,))
    for dtype, width in (("float16", 2), ("float32", 4)):
        folder = tmp_path / dtype
        with caplog.at_level(logging.INFO, logger="alembert"):
            TeacherCache.prepare(folder, model, data, tokenizer, request, dtype=dtype)  # type: ignore[arg-type]
        tokens, squares = sum(LENGTHS), sum(length**2 for length in LENGTHS)
        # 5 labels; width 32; 2 heads of width 16; a header of 128 bytes in each of 5 files.
        expected = width * (10 * 5 + 2 * tokens * 32 + 2 * squares + 2 * tokens * 16) + 5 * 128
        names = ("logits", "hidden_states-0", "hidden_states-4", "attention_scores-4", "queries-1")
        assert sum((folder / f"{name}.npy").stat().st_size for name in names) == expected
        message = caplog.messages[-1]
        assert f"10 rows, {', '.join(names)}: {expected} bytes to write" in message
        assert np.load(folder / "hidden_states-4.npy").shape == (tokens * 32,)


def test_what_has_no_room_is_refused_before_anything_is_written(
    tmp_path: Path,
    model: PreTrainedModel,
    data: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    request, folder = FeatureRequest(hidden_states=(1,)), tmp_path / "new" / "cache"
    with pytest.raises(
        InputError, match=r"outputs take 0\.00 GiB, and no more than 0\.00 GiB may be written"
    ):
        TeacherCache.prepare(folder, model, data, tokenizer, request, budget_bytes=1000)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(InputError, match=r"the disk has 0\.00 GiB left: ask for fewer layers"):
        TeacherCache.prepare(folder, model, data, tokenizer, request)
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_numbers_beyond_float16_are_refused(
    tmp_path: Path, model: PreTrainedModel, data: Dataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    with torch.no_grad():
        model.classifier.weight[0] = 1e5  # type: ignore[union-attr, operator]
        model.classifier.bias[0] = 1e5  # type: ignore[union-attr, operator]
    with pytest.raises(
        InputError, match=r'logits of row \d+ reach .* more than float16 holds.*dtype="float32"'
    ):
        TeacherCache.prepare(tmp_path, model, data, tokenizer, FeatureRequest())
    assert not list(tmp_path.glob(".*partial*"))
    # The folder is free for another attempt.
    cached = TeacherCache.prepare(tmp_path, model, data, tokenizer, FeatureRequest(), dtype="float32")
    inputs, rows = batch(data, tokenizer, [1])
    assert_same(
        cached(inputs, rows),
        LiveTeacher(model, FeatureRequest())(inputs),
        FeatureRequest(),
        atol=0,
        rtol=1e-5,
    )
    with torch.no_grad():
        model.classifier.bias[0] = float("nan")  # type: ignore[union-attr, operator]
    with pytest.raises(InputError, match=r"logits of row \d+ are not finite numbers"):
        TeacherCache.prepare(tmp_path / "nan", model, data, tokenizer, FeatureRequest())


def test_rows_that_do_not_fit_are_refused(
    tmp_path: Path, model: PreTrainedModel, data: Dataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    request = FeatureRequest(hidden_states=(1,))
    cached = TeacherCache.prepare(tmp_path, model, data, tokenizer, request)
    inputs, rows = batch(data, tokenizer, [0, 1])
    with pytest.raises(InputError, match="row 1 has 3 tokens in the batch but 9 in the cache"):
        cached(inputs, rows.flip(0))
    with pytest.raises(InputError, match="there is no row 10: the cache has 10 rows"):
        cached(inputs, torch.tensor([0, 10]))
    with pytest.raises(InputError, match="needs the numbers of the rows"):
        cached(inputs, None)
    with pytest.raises(InputError, match="hidden_states of layer 2 are not in this cache"):
        cached.cache.read(FeatureRequest(hidden_states=(2,)), rows, inputs["attention_mask"])


def test_teachers_without_logits_and_with_logits_for_every_token(
    tmp_path: Path, tiny_encoder: Path, data: Dataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    request = FeatureRequest(hidden_states=(4,))
    inputs, rows = batch(data, tokenizer, [0, 5])
    bare = AutoModel.from_pretrained(tiny_encoder)
    cached = TeacherCache.prepare(tmp_path / "bare", bare, data, tokenizer, request)
    assert cached(inputs, rows).logits is None
    with pytest.MonkeyPatch.context() as patch:
        seen = count_rows(patch)
        TeacherCache.prepare(tmp_path / "bare", bare, data, tokenizer, request)
        assert seen == []

    language = AutoModelForMaskedLM.from_pretrained(tiny_encoder)
    cached = TeacherCache.prepare(
        tmp_path / "language", language, data, tokenizer, request, logits=False, dtype="float32"
    )
    assert not (tmp_path / "language" / "logits.npy").exists()
    assert cached(inputs, rows).logits is None
    cached = TeacherCache.prepare(tmp_path / "language", language, data, tokenizer, request, dtype="float32")
    expected = language.eval()(**inputs).logits * inputs["attention_mask"][:, :, None]
    torch.testing.assert_close(cached(inputs, rows).logits, expected, atol=1e-6, rtol=1e-6)


def test_a_live_teacher_stays_in_evaluation_mode_and_without_gradients(
    model: PreTrainedModel, data: Dataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    request = FeatureRequest(hidden_states=(4,), attention_scores=(4,))
    teacher = LiveTeacher(model, request).to("cpu")
    inputs, rows = batch(data, tokenizer, [0, 5])
    first = teacher(inputs, rows)
    model.train()
    second = teacher(inputs, None)
    for features in (first, second):
        assert not features.logits.requires_grad  # type: ignore[union-attr]
        assert not features.hidden_states[4].requires_grad
    assert first.hidden_states[4].equal(second.hidden_states[4])
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_of_several_processes_one_writes_and_the_others_wait(
    tmp_path: Path,
    model: PreTrainedModel,
    data: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    main, request = threading.current_thread(), FeatureRequest(hidden_states=(2,))

    def state() -> SimpleNamespace:
        return SimpleNamespace(
            is_main_process=threading.current_thread() is main, wait_for_everyone=lambda: None
        )

    monkeypatch.setattr(alembert.training.teacher_cache, "PartialState", state)
    monkeypatch.setattr(alembert.training.teacher_cache, "_POLL_SECONDS", 0.01)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(
            TeacherCache.prepare, tmp_path, model, data, tokenizer, request, dtype="float32"
        )
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.2)
        assert not list(tmp_path.iterdir())
        TeacherCache.prepare(tmp_path, model, data, tokenizer, request, dtype="float32")
        cached = waiting.result(timeout=20)
    inputs, rows = batch(data, tokenizer, [3, 1])
    assert_same(cached(inputs, rows), LiveTeacher(model, request)(inputs), request, atol=5e-6, rtol=1e-6)
