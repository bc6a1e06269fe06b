"""Augmentation: words, candidates, draws, files, and the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    MPNetConfig,
    MPNetForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    set_seed,
)

import alembert
from alembert.cli.app import run
from alembert.data.augmentation import AugmentationOptions, augment, load_word_vectors, write_augmented
from alembert.data.augmentation import dataset as dataset_module
from alembert.data.augmentation.candidates import CandidateFinder, Replacement
from alembert.data.augmentation.predictions import logits_at
from alembert.data.augmentation.rows import varied_copies, varied_rows
from alembert.data.augmentation.words import STOP_WORDS, find_words, in_case_of
from alembert.models.loading import load_masked_lm

OPTIONS = AugmentationOptions(copies=4, candidates=3, max_length=32)


def masked_lm_folder(folder: Path, tokenizer: Any) -> Path:
    set_seed(3)
    config = BertConfig(
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def masked_lm(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    return masked_lm_folder(tmp_path_factory.mktemp("mlm"), AutoTokenizer.from_pretrained(tiny_encoder))


@pytest.fixture(scope="module")
def sentencepiece_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = [
        "▁film",
        "▁movie",
        "▁story",
        "▁music",
        "▁",
        "电",
        "影",
        "好",
        "看",
        "书",
        "电影",
        "音乐",
        "故事",
        "s",
        "!",
    ]
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    pieces = [
        (piece, 0.0 if piece in special else -float(len(words)) / len(piece)) for piece in special + words
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", cls_token="<s>", eos_token="</s>", sep_token="</s>",
        pad_token="<pad>", unk_token="<unk>", mask_token="<mask>", model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    return masked_lm_folder(tmp_path_factory.mktemp("sentencepiece"), wrapped)


@pytest.fixture(scope="module")
def glove(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = np.random.default_rng(0)
    words = ["soups", "breads", "goals", "matches", "races", "teams", "storms", "it's", "3d", "clouds"]
    lines = [" ".join([word, *(f"{x:.4f}" for x in generator.normal(size=6))]) for word in words]
    path = tmp_path_factory.mktemp("vectors") / "glove.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def finder(folder: Path, vectors: Any = None, batch_size: int = 8, **changes: Any) -> CandidateFinder:
    options = OPTIONS.model_copy(update=changes)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return CandidateFinder(load_masked_lm(str(folder)), tokenizer, vectors, options, batch_size)


def replaced(texts: list[str], found: list[list[Replacement]]) -> list[dict[str, tuple[str, ...]]]:
    return [{text[r.start : r.end]: r.choices for r in row} for text, row in zip(texts, found, strict=True)]


# Words


def test_words_have_places_and_addresses_names_and_numbers_have_none() -> None:
    text = "Soup, and über-bread (x) see www.soup.de or me@soup.de @soup 3d #soup don't"
    found = find_words(text, [(0, len(text))], [True], skip_stop_words=True)
    assert [text[word.start : word.end] for word in found] == ["Soup", "über", "bread", "see"]
    everything = find_words(text, [(0, len(text))], [True], skip_stop_words=False)
    assert {text[word.start : word.end] for word in everything} >= {"and", "or", "don"}


def test_a_word_is_of_one_piece_only_if_a_token_covers_it_exactly() -> None:
    text = "soup breads"
    found = find_words(text, [(0, 4), (4, 10), (10, 11)], [True, True, True], skip_stop_words=True)
    assert [(word.start, word.end, word.token) for word in found] == [(0, 4, 0), (5, 11, None)]
    assert find_words(text, [(0, 4)], [True], skip_stop_words=True)[-1].end == 4


@pytest.mark.parametrize(
    ("word", "candidate", "expected"),
    [("Soup", "bread", "Bread"), ("SOUP", "bread", "BREAD"), ("soup", "Bread", "bread"), ("汤", "面", "面")],
)
def test_replacements_are_written_as_the_word_is(word: str, candidate: str, expected: str) -> None:
    assert in_case_of(word, candidate) == expected


# Predictions


@pytest.mark.parametrize(
    "model",
    [
        BertForMaskedLM(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)),
        RobertaForMaskedLM(RobertaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)),
        DistilBertForMaskedLM(DistilBertConfig(vocab_size=50, dim=16, n_layers=2, n_heads=2, hidden_dim=32)),
        MPNetForMaskedLM(MPNetConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)),
        AlbertForMaskedLM(
            AlbertConfig(vocab_size=50, embedding_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
        ),
        ModernBertForMaskedLM(
            ModernBertConfig(
                vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
                pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
            )
        ),
    ],
    ids=lambda model: model.config.model_type,
)  # fmt: skip
def test_logits_at_positions_are_those_of_the_whole_forward_pass(model: Any) -> None:
    model.eval()
    ids = torch.randint(5, 50, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    rows, columns = torch.tensor([2, 0, 1, 1]), torch.tensor([4, 8, 0, 5])
    inputs = {"input_ids": ids, "attention_mask": mask}
    with torch.inference_mode():
        whole = model(**inputs).logits
        found = logits_at(model, inputs, rows, columns)
        torch.testing.assert_close(found, whole[rows, columns], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(**inputs).logits, whole)  # the hook is gone


@pytest.mark.parametrize("context", ["single", "pair"])
def test_candidates_are_the_likeliest_whole_words_of_a_forward_pass_of_their_own(
    masked_lm: Path, context: str
) -> None:
    texts = ["we saw Soup, rain!", "the goal was very much again today", "storm"]
    found = replaced(texts, finder(masked_lm, context=context, skip_stop_words=False)(texts))
    tokenizer, model = AutoTokenizer.from_pretrained(masked_lm), load_masked_lm(str(masked_lm))
    pieces = [""] * model.config.vocab_size
    for piece, index in tokenizer.get_vocab().items():
        pieces[index] = piece
    checked = 0
    for text, choices in zip(texts, found, strict=True):
        encoding = tokenizer(text, *([text] if context == "pair" else []), return_tensors="pt")
        for position, token in enumerate(encoding["input_ids"][0].tolist()):
            if encoding.sequence_ids(0)[position] != 0 or not pieces[token].isalpha():
                continue
            masked = {name: tensor.clone() for name, tensor in encoding.items()}
            masked["input_ids"][0, position] = tokenizer.mask_token_id
            with torch.inference_mode():
                order = model(**masked).logits[0, position].argsort(descending=True)
            words = [pieces[i] for i in order if len(pieces[i]) > 1 and pieces[i].isalpha() and i != token]
            span = encoding.token_to_chars(position)
            word = text[span.start : span.end]
            assert choices[word] == tuple(sorted(in_case_of(word, x) for x in words[:3]))
            checked += 1
    assert checked == 12


def test_sentencepiece_words_start_with_a_mark_and_han_pieces_keep_their_length(
    sentencepiece_lm: Path,
) -> None:
    texts = ["film  story! 电影好看", "书 s"]
    first, second = replaced(texts, finder(sentencepiece_lm, candidates=10, skip_stop_words=False)(texts))
    assert set(first) == {"film", "story", "电影", "好", "看"} and set(second) == {"书"}
    assert set(first["film"]) == {"movie", "story", "music"}
    assert set(first["电影"]) == {"音乐", "故事"}
    assert set(first["好"]) == {"电", "影", "看", "书"}
    assert set(second["书"]) == {"电", "影", "好", "看"}


def test_function_words_neither_go_nor_come(masked_lm: Path) -> None:
    (found,) = finder(masked_lm, candidates=40)(["the soup was very good and it was much rain"])
    choices = {choice for replacement in found for choice in replacement.choices}
    assert found and not choices & STOP_WORDS


def test_words_behind_the_last_token_stay(masked_lm: Path) -> None:
    text = "soup " * 40
    (found,) = finder(masked_lm, max_length=10)([text])
    assert len(found) == 8


# Vectors


def test_neighbours_are_those_of_the_cosine(glove: Path) -> None:
    vectors = load_word_vectors(glove)
    lines = [line.split() for line in glove.read_text(encoding="utf-8").splitlines()]
    table = {fields[0]: np.array(fields[1:], dtype=float) for fields in lines if fields[0].isalpha()}

    def cosine(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> float:
        return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))

    expected = sorted(table.keys() - {"goals"}, key=lambda word: -cosine(table[word], table["goals"]))
    assert vectors.neighbours(["Goals", "unheard"], 4) == {"Goals": tuple(expected[:4])}
    assert len(vectors.neighbours(["goals"], 99)["goals"]) == len(table) - 1
    assert len(load_word_vectors(glove, max_vectors=3).words) == 3


def test_words_of_several_pieces_get_neighbours_and_without_vectors_stay(
    masked_lm: Path, glove: Path
) -> None:
    texts = ["we saw Breads, unheard rain"]
    vectors = load_word_vectors(glove)
    (found,) = replaced(texts, finder(masked_lm, vectors)(texts))
    expected = vectors.neighbours(["breads"], 3)["breads"]
    assert set(found["Breads"]) == {word.capitalize() for word in expected}
    assert "unheard" not in found
    assert "Breads" not in replaced(texts, finder(masked_lm)(texts))[0]


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ("soup 1 2\nbread 1\n", "row 2"),
        ("soup 1 2\nbread 1 x\n", "row 2"),
        ("soup 1 2\nbread 1 nan\n", "row 2"),
        ("soup\nbread\n", "row 1"),
        ("soup 1 2\n", "fewer than two"),
        ("", "fewer than two"),
    ],
)
def test_malformed_vectors_are_refused(tmp_path: Path, content: str, place: str) -> None:
    path = tmp_path / "vectors.txt"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(alembert.InputError, match=f"vectors.txt.*{place}"):
        load_word_vectors(path)
    with pytest.raises(alembert.InputError, match="no such file"):
        load_word_vectors(tmp_path / "none.txt")


def test_a_header_of_counts_and_words_with_spaces_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "vectors.txt"
    path.write_text("4 2\nsoup 1 0\n. . 3 4\nbread 3 4\nsoup 5 5\nnull 0 0\n", encoding="utf-8")
    vectors = load_word_vectors(path)
    assert vectors.words == ("soup", "bread")
    np.testing.assert_allclose(vectors.vectors, [[1, 0], [0.6, 0.8]], rtol=1e-6)


# Draws


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 30), st.floats(0.05, 1.0), st.integers(0, 5))
def test_copies_differ_from_the_text_in_replaceable_places_only(
    copies: int, probability: float, seed: int
) -> None:
    text = "a  soup, (goal)!"
    places = [Replacement(3, 7, ("bread", "rain")), Replacement(10, 14, ("race",))]
    options = AugmentationOptions(copies=copies, probability=probability)
    allowed = {f"a  {x}, ({y})!" for x in ("soup", "bread", "rain") for y in ("goal", "race")}
    varied = varied_copies(text, places, options, np.random.default_rng(seed))
    assert len(varied) == copies and set(varied) <= allowed


def test_words_are_replaced_with_the_probability_and_evenly() -> None:
    options = AugmentationOptions(copies=20_000, probability=0.4)
    places = [Replacement(0, 1, ("b", "c", "d", "e"))]
    varied = varied_copies("a", places, options, np.random.default_rng(0))
    shares = {word: varied.count(word) / 20_000 for word in "abcde"}
    assert shares["a"] == pytest.approx(0.6, abs=0.015)
    assert all(shares[word] == pytest.approx(0.1, abs=0.01) for word in "bcde")


def test_of_a_pair_one_text_varies_beside_the_other_as_it_was() -> None:
    options = AugmentationOptions(copies=8, probability=0.9)
    pair = ("soup", "goal")
    rows = varied_rows(pair, [[Replacement(0, 4, ("rain", "wind"))], [Replacement(0, 4, ("race",))]], options)
    assert rows[0] == pair and len(rows) == len(set(rows))
    assert set(rows) == {pair, ("rain", "goal"), ("wind", "goal"), ("soup", "race")}


# Data sets


def rows_of(dataset: Dataset) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in dataset.to_list()]


def run_augment(split: Dataset, folder: Path, glove: Path, **arguments: Any) -> Dataset:
    options = arguments.pop("options", OPTIONS)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return augment(
        split, load_masked_lm(str(folder)), tokenizer, load_word_vectors(glove), options, **arguments
    )


def test_rows_do_not_depend_on_batches_or_order_but_on_the_seed(
    task: alembert.Task, masked_lm: Path, glove: Path
) -> None:
    split = task.splits["train"]
    first = rows_of(run_augment(split, masked_lm, glove, batch_size=1, resume=False))
    second = rows_of(run_augment(split, masked_lm, glove, batch_size=64, resume=False))
    turned = rows_of(run_augment(split.select(range(split.num_rows)[::-1]), masked_lm, glove))
    other = rows_of(run_augment(split, masked_lm, glove, options=OPTIONS.model_copy(update={"seed": 1})))
    assert first == second and set(first) == set(turned) and first != other
    assert set(rows_of(split)) <= set(first) and len(first) > 2 * split.num_rows
    assert not any("[" in row[0] for row in first)
    labels = dict(zip(split["text"], split["labels"], strict=True))
    current = -1
    for text, label in first:  # copies follow their row, with its label
        current = labels.get(text, current)
        assert label == current


def test_an_interrupted_augmentation_goes_on(
    task: alembert.Task, masked_lm: Path, glove: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = task.splits["train"]
    monkeypatch.setattr(dataset_module, "CHUNK_ROWS", 10)
    whole = rows_of(run_augment(split, masked_lm, glove, resume=False))
    seen: list[int] = []
    call = CandidateFinder.__call__

    def limited(limit: int) -> Callable[..., Any]:
        def find(self: CandidateFinder, texts: Any) -> Any:
            if len(seen) == limit:
                raise KeyboardInterrupt
            seen.append(len(texts))
            return call(self, texts)

        return find

    monkeypatch.setattr(CandidateFinder, "__call__", limited(4))
    with pytest.raises(KeyboardInterrupt):
        run_augment(split, masked_lm, glove, resume=False)
    monkeypatch.setattr(CandidateFinder, "__call__", limited(99))
    assert rows_of(run_augment(split, masked_lm, glove)) == whole
    assert len(seen) == -(-split.num_rows // 10)  # four chunks were not computed again
    assert rows_of(run_augment(split, masked_lm, glove)) == whole
    assert len(seen) == -(-split.num_rows // 10)


def test_repeated_rows_are_taken_once_and_scores_are_copied(masked_lm: Path, glove: Path) -> None:
    columns = {
        "text": ["soup today", "rain", "soup today"],
        "text_pair": ["goal"] * 3,
        "labels": [2.5, 0.25, 2.5],
    }
    found = run_augment(Dataset.from_dict(columns), masked_lm, glove)
    rows = rows_of(found)
    assert len(rows) == len(set(rows)) and {row[2] for row in rows} == {2.5, 0.25}
    assert found.column_names == ["text", "text_pair", "labels"]


@pytest.mark.parametrize("kind", ["single", "pair", "multi", "regression"])
def test_written_files_read_back(
    kind: str, tmp_path: Path, write_task: Callable[..., Path], masked_lm: Path, glove: Path
) -> None:
    columns: dict[str, Any] = {"label_separator": "|"} if kind == "multi" else {}
    task = alembert.load_task(write_task(tmp_path / "task", kind), **columns)
    found = run_augment(task.splits["train"], masked_lm, glove)
    (tmp_path / "out").mkdir()
    write_augmented(found, task, tmp_path / "out" / "train.tsv", {"rows": {}})
    (tmp_path / "out" / "dev.tsv").write_bytes((tmp_path / "task" / "dev.tsv").read_bytes())
    again = alembert.load_task(tmp_path / "out", **columns)
    assert again.label_names == task.label_names and again.problem_type == task.problem_type
    assert again.splits["train"].to_list() == found.to_list()


def test_breaks_become_spaces_and_separators_in_labels_are_refused(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"text": ["a\tb\nc", "d"], "labels": [0, 1]})
    task = alembert.Task("t", "single_label_classification", ("x", "y"), ("accuracy",), {"train": rows})
    write_augmented(rows, task, tmp_path / "out.tsv", {})
    assert (tmp_path / "out.tsv").read_text(encoding="utf-8") == "label\ttext\nx\ta b c\ny\td\n"
    wrong = alembert.Task("t", "single_label_classification", ("x\t", "y"), ("accuracy",), {"train": rows})
    with pytest.raises(alembert.InputError, match="separator"):
        write_augmented(rows, wrong, tmp_path / "out.tsv", {})


def test_an_encoder_without_its_head_is_refused(tiny_encoder: Path) -> None:
    with pytest.raises(alembert.InputError, match="train_masked_lm"):
        load_masked_lm(str(tiny_encoder))


# Command


def test_command(
    tmp_path: Path, task_folder: Path, masked_lm: Path, glove: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "augmented" / "train.tsv"
    command = [
        "augment", "--data", str(task_folder), "--model", str(masked_lm), "--vectors", str(glove),
        "--copies", "3", "--max-length", "32", "--output", str(output), "--json",
    ]  # fmt: skip
    assert run(command) == 0
    printed = json.loads(capsys.readouterr().out)
    content = output.read_bytes()
    record = json.loads((tmp_path / "augmented" / "train.augmentation.json").read_text(encoding="utf-8"))
    assert printed["rows"] == record["rows"] and record["configuration"]["seed"] == 42
    assert record["rows"] == {"source": 64, "augmented": content.count(b"\n") - 1}
    assert alembert.load_task(tmp_path / "augmented").label_names == ("food", "sport", "weather")

    output.touch()
    modified = output.stat().st_mtime_ns
    assert run(command) == 0 and output.stat().st_mtime_ns == modified
    assert run([*command, "--seed", "7"]) == 2
    assert run([*command, "--seed", "7", "--overwrite"]) == 0
    assert output.read_bytes() != content
    assert run([*command, "--overwrite", "--resume", "never"]) == 0
    assert output.read_bytes() == content
    capsys.readouterr()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "out.csv"], "ends in .tsv"),
        (["--probability", "0"], "probability"),
        (["--vectors", "none.txt"], "none.txt"),
        (["--context", "triple"], "context"),
    ],
)
def test_bad_flags_are_refused(
    flags: list[str], message: str, tmp_path: Path, task_folder: Path, masked_lm: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    command = ["augment", "--data", str(task_folder), "--model", str(masked_lm)]
    assert run([*command, "--output", str(tmp_path / "out.tsv"), *flags]) == 2
    assert message in capsys.readouterr().err
