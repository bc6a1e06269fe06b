"""Tokenising once, on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import BertTokenizerFast

from alembert.common.errors import InputError
from alembert.data import load_task, tokenise

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "food", "service", "very"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def make_tokenizer(**options: Any) -> BertTokenizerFast:
    return BertTokenizerFast(vocab={token: index for index, token in enumerate(VOCABULARY)}, **options)


def make_split(path: Path, content: str) -> datasets.Dataset:
    path.write_text(content, encoding="utf-8")
    return load_task(path, required_splits=("test",)).dataset("test")


SINGLE = "label\ttext\nb\tgood food\na\tvery very bad service\n"


def cache_files() -> dict[Path, int]:
    return {
        path: path.stat().st_mtime_ns for path in Path(datasets.config.HF_DATASETS_CACHE).rglob("*.arrow")
    }


def test_single_texts(tmp_path: Path) -> None:
    tokens = tokenise(make_split(tmp_path / "f.tsv", SINGLE), make_tokenizer(), max_length=5)
    assert set(tokens.column_names) == {"input_ids", "attention_mask", "token_type_ids", "length", "labels"}
    assert tokens["input_ids"][:] == [[2, 5, 7, 3], [2, 9, 9, 6, 3]]
    assert tokens["attention_mask"][:] == [[1] * 4, [1] * 5]
    assert tokens["length"][:] == [4, 5]
    assert tokens["labels"][:] == [1, 0]
    assert tokens.cache_files


def test_pairs_truncate_the_longer_text(tmp_path: Path) -> None:
    split = make_split(tmp_path / "f.tsv", "label\ttext_a\ttext_b\n1\tgood\tvery very bad food\n")
    row = tokenise(split, make_tokenizer(), max_length=6)[0]
    assert row["input_ids"] == [2, 5, 3, 9, 9, 3]
    assert row["token_type_ids"] == [0, 0, 0, 1, 1, 1]


def test_a_tokenizer_without_token_types_gives_none(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(model_input_names=["input_ids", "attention_mask"])
    tokens = tokenise(make_split(tmp_path / "f.tsv", SINGLE), tokenizer, max_length=8)
    assert "token_type_ids" not in tokens.column_names


def test_the_second_call_finds_the_first_ones_tokens(tmp_path: Path) -> None:
    split, tokenizer = make_split(tmp_path / "f.tsv", SINGLE), make_tokenizer()
    first = tokenise(split, tokenizer, max_length=8)
    before = cache_files()
    tokenizer("good", padding="max_length", truncation=True, max_length=3)  # leaves settings behind
    again = tokenise(make_split(tmp_path / "f.tsv", SINGLE), tokenizer, max_length=8)
    assert again._fingerprint == first._fingerprint
    assert again["input_ids"][:] == first["input_ids"][:]
    assert cache_files() == before


def test_other_data_length_or_tokenizer_is_tokenised_anew(tmp_path: Path) -> None:
    split, tokenizer = make_split(tmp_path / "f.tsv", SINGLE), make_tokenizer()
    other_split = make_split(tmp_path / "g.tsv", SINGLE.replace("food", "service"))
    other_tokenizer = make_tokenizer()
    other_tokenizer.add_tokens(["goo"])
    results = [
        tokenise(split, tokenizer, max_length=8),
        tokenise(split, tokenizer, max_length=7),
        tokenise(other_split, tokenizer, max_length=8),
        tokenise(split, other_tokenizer, max_length=8),
        tokenise(split, make_tokenizer(truncation_side="left"), max_length=8),
    ]
    assert len({result._fingerprint for result in results}) == len(results)


def test_held_out_rows_are_tokenised_apart(tmp_path: Path) -> None:
    rows = "".join(f"{row % 2}\t{'good' if row % 2 else 'bad'} food\n" for row in range(40))
    (tmp_path / "train.tsv").write_text("label\ttext\n" + rows, encoding="utf-8")
    task = load_task(tmp_path)
    dev = tokenise(task.dataset("dev"), make_tokenizer(), max_length=8)
    assert dev.num_rows == 4
    assert [5 if label else 6 for label in dev["labels"][:]] == [ids[1] for ids in dev["input_ids"][:]]
    assert tokenise(task.dataset("train"), make_tokenizer(), max_length=8).num_rows == 36


def test_no_room_for_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="max_length 2 leaves no room for text: 2 special tokens"):
        tokenise(make_split(tmp_path / "f.tsv", SINGLE), make_tokenizer(), max_length=2)
