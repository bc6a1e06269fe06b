"""Plain text tokenised shard by shard."""

from __future__ import annotations

import gzip
import hashlib
import re
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, BertJapaneseTokenizer, BertTokenizerFast, PreTrainedTokenizerBase

import alembert.data.corpus
from alembert.common.errors import InputError
from alembert.data import load_task, tokenise
from alembert.data.corpus import load_corpus

WORDS = ["good", "bad", "food", "service", "very"]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
IDS = {word: index for index, word in enumerate(VOCABULARY)}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def tokenizer() -> BertTokenizerFast:
    return BertTokenizerFast(vocab=IDS)


def cache_files() -> dict[Path, int]:
    folder = Path(datasets.config.HF_DATASETS_CACHE)
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.arrow")}


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def expected_rows(lines: list[str], max_length: int) -> list[list[int]]:
    """Windows of whole-word lines, spelled out."""
    rows, room = [], max_length - 2
    for line in lines:
        ids = [IDS[word] for word in line.split()]
        windows = [ids[start : start + room] for start in range(0, len(ids), room)]
        kept = [window for window in windows if len(windows) == 1 or len(window) >= min(8, room)]
        rows += [[IDS["[CLS]"], *window, IDS["[SEP]"]] for window in kept]
    return rows


@given(
    lines=st.lists(st.lists(st.sampled_from(WORDS), max_size=40).map(" ".join), min_size=1, max_size=12),
    max_length=st.integers(3, 20),
    shard_bytes=st.integers(1, 300),
    ending=st.sampled_from(["\n", "\r\n"]),
    last=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_windows_are_those_of_the_lines_whatever_the_shards(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: BertTokenizerFast,
    lines: list[str],
    max_length: int,
    shard_bytes: int,
    ending: str,
    last: bool,
) -> None:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_bytes((ending.join([*lines, "good"]) + ending * last).encode())
    corpus = load_corpus(path, tokenizer, max_length, shard_bytes=shard_bytes)
    rows = expected_rows([*lines, "good"], max_length)
    assert list(corpus.dataset["input_ids"]) == rows
    assert list(corpus.dataset["length"]) == [len(row) for row in rows]
    assert list(corpus.dataset["attention_mask"]) == [[1] * len(row) for row in rows]
    assert list(corpus.dataset["token_type_ids"]) == [[0] * len(row) for row in rows]
    assert sum(corpus.shard_rows) == len(rows)
    assert corpus.tokens == sum(map(len, rows))


def test_columns_are_those_of_tokenise(tmp_path: Path, tokenizer: BertTokenizerFast) -> None:
    table = write(tmp_path / "task.tsv", "label\ttext", "a\tvery good food", "b\tbad")
    split = load_task(table, required_splits=("test",)).dataset("test")
    expected = tokenise(split, tokenizer, 8).remove_columns("labels")
    corpus = load_corpus(write(tmp_path / "text.txt", "very good food", "", "  bad "), tokenizer, 8)
    assert corpus.dataset.features == expected.features
    assert corpus.dataset.to_dict() == expected.to_dict()


def test_a_tokenizer_without_backend_gives_the_same_rows(
    tmp_path: Path, tokenizer: BertTokenizerFast
) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY), encoding="utf-8")
    slow = BertJapaneseTokenizer(
        str(tmp_path / "vocab.txt"), word_tokenizer_type="basic", subword_tokenizer_type="wordpiece"
    )
    assert not slow.is_fast
    path = write(tmp_path / "text.txt", " ".join(WORDS * 4), "good", "", "bad food " * 10)
    first, second = (load_corpus(path, each, 12).dataset for each in (tokenizer, slow))
    for name in ("input_ids", "attention_mask", "length"):
        assert list(first[name]) == list(second[name])


def test_a_folder_is_read_in_the_order_of_names_and_compressed_files_too(
    tmp_path: Path, tokenizer: BertTokenizerFast
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    write(folder / "b.txt", "bad")
    (folder / "c.txt.gz").write_bytes(gzip.compress(b"food\nvery\n"))
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbfgood\n")
    write(folder / "README.md", "service")
    write(folder / ".hidden.txt", "service")
    corpus = load_corpus(folder, tokenizer, 8)
    assert [ids[1] for ids in corpus.dataset["input_ids"]] == [
        IDS[word] for word in ("good", "bad", "food", "very")
    ]
    assert corpus.shard_rows == (1, 1, 2)
    assert corpus.describe() == {
        "name": "texts",
        "rows": 4,
        "tokens": 12,
        "shards": 3,
        "files": {
            "a.txt": hashlib.sha256(b"\xef\xbb\xbfgood\n").hexdigest(),
            "b.txt": hashlib.sha256(b"bad\n").hexdigest(),
            "c.txt.gz": hashlib.sha256(b"food\nvery\n").hexdigest(),
        },
        "fingerprint": corpus.fingerprint,
    }
    assert corpus.dataset._fingerprint == corpus.fingerprint


def test_an_interrupted_preparation_goes_on_and_a_changed_file_costs_its_shards_only(
    tmp_path: Path, tokenizer: BertTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"{word} food" for word in WORDS]
    path = write(tmp_path / "text.txt", *lines)
    options: dict[str, Any] = {"shard_bytes": 1}
    real = alembert.data.corpus._windows
    calls: list[list[str]] = []

    def interrupted(paragraphs: list[str], *arguments: Any) -> Any:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(paragraphs)
        return real(paragraphs, *arguments)

    monkeypatch.setattr(alembert.data.corpus, "_windows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_corpus(path, tokenizer, 8, **options)
    finished = cache_files()
    assert len(finished) == 3
    assert not list(Path(datasets.config.HF_DATASETS_CACHE).rglob(".*"))

    monkeypatch.setattr(alembert.data.corpus, "_windows", real)
    whole = load_corpus(path, tokenizer, 8, **options)
    assert list(whole.dataset["input_ids"]) == expected_rows(lines, 8)
    assert finished.items() <= cache_files().items()
    before = cache_files()
    assert load_corpus(path, tokenizer, 8, **options).fingerprint == whole.fingerprint
    assert cache_files() == before

    write(path, *lines[:2], "very bad", *lines[3:])
    changed = load_corpus(path, tokenizer, 8, **options)
    assert changed.fingerprint != whole.fingerprint
    assert before.items() <= cache_files().items()
    assert len(cache_files()) == len(before) + 1


def test_another_tokenizer_or_length_is_prepared_anew(tmp_path: Path, tokenizer: BertTokenizerFast) -> None:
    path = write(tmp_path / "text.txt", "very good food")
    other = BertTokenizerFast(vocab={word: index for index, word in enumerate([*VOCABULARY, "more"])})
    corpora = [load_corpus(path, *choice) for choice in ((tokenizer, 8), (tokenizer, 9), (other, 8))]
    assert len({corpus.fingerprint for corpus in corpora}) == len(cache_files()) == 3


def test_rows_are_limited_from_the_beginning(tmp_path: Path, tokenizer: BertTokenizerFast) -> None:
    lines = [f"{word} food" for word in WORDS]
    path = write(tmp_path / "text.txt", *lines)
    corpus = load_corpus(path, tokenizer, 8, shard_bytes=15, max_rows=3)
    assert list(corpus.dataset["input_ids"]) == expected_rows(lines[:3], 8)
    assert corpus.shard_rows == (2, 1)
    assert len(cache_files()) == 2
    assert corpus.tokens == 12
    assert corpus.fingerprint != load_corpus(path, tokenizer, 8, shard_bytes=15, max_rows=4).fingerprint
    assert len(load_corpus(path, tokenizer, 8, max_rows=99).dataset) == 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"good\nfood\nvery b\xe4d\n", "text.txt, row 3: not UTF-8: the byte 0xe4 at character 7. Convert"),
        (b"\xff\xfeg\x00", "text.txt, row 1: not UTF-8: the byte 0xff"),
        (b"", "text.txt: there is no text in this file."),
        (b"\n  \n\r\n", "text.txt: there is no text in this file."),
        (b"good\n" + b"x" * 4_000_001, "text.txt, row 2: the line is longer than 4,000,000 bytes"),
    ],
)
def test_unusable_files_are_refused(
    tmp_path: Path, tokenizer: BertTokenizerFast, content: bytes, message: str
) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(message)):
        load_corpus(path, tokenizer, 8, shard_bytes=8)


def test_unusable_arguments_are_refused(tmp_path: Path, tokenizer: BertTokenizerFast) -> None:
    path = write(tmp_path / "text.txt", "good")
    with pytest.raises(InputError, match="max_length 2 leaves no room for text"):
        load_corpus(path, tokenizer, 2)
    with pytest.raises(InputError, match="max_rows is 0"):
        load_corpus(path, tokenizer, 8, max_rows=0)
    with pytest.raises(InputError, match=r"none\.txt: no such file or folder"):
        load_corpus(tmp_path / "none.txt", tokenizer, 8)
    with pytest.raises(InputError, match=r"a\.tsv: a corpus is plain text"):
        load_corpus(write(tmp_path / "a.tsv", "good"), tokenizer, 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"there are no \.txt or \.txt\.gz files in this folder"):
        load_corpus(tmp_path / "empty", tokenizer, 8)
    broken = tmp_path / "broken.txt.gz"
    broken.write_bytes(gzip.compress(b"good\n" * 1000)[:-12])
    with pytest.raises(InputError, match=r"broken\.txt\.gz: cannot be read"):
        load_corpus(broken, tokenizer, 8)


def test_memory_depends_on_the_shard_and_not_on_the_file(tmp_path: Path, tiny_encoder: Path) -> None:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_encoder)
    words = np.random.default_rng(0).choice(["soup", "rain", "goal", "today"], size=(4000, 30))
    path = write(tmp_path / "text.txt", *map(" ".join, words))
    load_corpus(write(tmp_path / "small.txt", "soup"), tokenizer, 16)

    def peak(shard_bytes: int) -> int:
        tracemalloc.start()
        try:
            load_corpus(path, tokenizer, 16, shard_bytes=shard_bytes)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(20_000) < 0.15 * peak(10**9)
