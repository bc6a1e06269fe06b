"""Files of every format read alike, and every kind of bad row refused at its exact place."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alembert.common.errors import InputError
from alembert.data import iterate_texts, load_task
from alembert.data.reading import open_table

ROWS = [("good", "quick and friendly"), ("bad", 'the "best" of, nothing'), ("good", "真好吃")]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write_tsv(path: Path, rows: list[tuple[Any, ...]], header: tuple[str, ...] = ("label", "text")) -> Path:
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in [header, *rows]), encoding="utf-8")
    return path


def write_csv(path: Path, rows: list[tuple[Any, ...]], header: tuple[str, ...] = ("label", "text")) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def write_jsonl(path: Path, rows: list[tuple[Any, ...]], header: tuple[str, ...] = ("label", "text")) -> Path:
    lines = (json.dumps(dict(zip(header, row, strict=True)), ensure_ascii=False) for row in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_parquet(
    path: Path, rows: list[tuple[Any, ...]], header: tuple[str, ...] = ("label", "text")
) -> Path:
    columns = zip(*rows, strict=True)
    pq.write_table(pa.table(dict(zip(header, map(list, columns), strict=True))), path)
    return path


WRITERS: dict[str, Callable[..., Path]] = {
    "tsv": write_tsv,
    "csv": write_csv,
    "jsonl": write_jsonl,
    "json": write_jsonl,
    "parquet": write_parquet,
}


def message(path: Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        load_task(path, **options)
    return str(caught.value)


def evaluate(path: Path, **options: Any) -> Any:
    return load_task(path, required_splits=("test",), **options).dataset("test")


@pytest.mark.parametrize("ending", WRITERS)
def test_every_format_gives_the_same_task(tmp_path: Path, ending: str) -> None:
    split = evaluate(WRITERS[ending](tmp_path / f"reviews.{ending}", ROWS))
    assert split["text"][:] == [text for _, text in ROWS]
    assert split["labels"][:] == [1, 0, 1]


@pytest.mark.parametrize("ending", WRITERS)
def test_every_format_reads_pairs(tmp_path: Path, ending: str) -> None:
    rows = [(0, "a question", "an answer"), (1, "another", "reply")]
    split = evaluate(WRITERS[ending](tmp_path / f"f.{ending}", rows, ("label", "question", "sentence")))
    assert (split["text"][:], split["text_pair"][:]) == (["a question", "another"], ["an answer", "reply"])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(
        st.text(st.characters(exclude_categories=("Cs",)), min_size=1).filter(str.strip), min_size=1
    )
)
def test_csv_jsonl_and_parquet_keep_any_text(tmp_path: Path, texts: list[str]) -> None:
    texts = [text.replace("\r", "") for text in texts if text.replace("\r", "").strip()] or ["x"]
    for ending in ("csv", "jsonl", "parquet"):
        path = WRITERS[ending](tmp_path / f"any.{ending}", [(text,) for text in texts], ("text",))
        assert list(iterate_texts(path)) == texts


def test_a_csv_row_is_named_by_its_first_line(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text('label,text\na,"two\nlines"\nb,\n', encoding="utf-8")
    assert message(path).startswith(f"{path}, row 4, field 'text': the text is empty")


def test_tsv_has_no_quoting_and_tolerates_bom_crlf_and_closing_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "f.tsv"
    path.write_bytes(b'\xef\xbb\xbflabel\ttext\r\nx\t"open quote\r\ny\tb\xe2\x80\xa8c\r\n\r\n\n')
    split = evaluate(path)
    assert split["text"][:] == ['"open quote', "b\u2028c"]


def test_a_field_longer_than_the_csv_module_allows_by_itself(tmp_path: Path) -> None:
    long = "word " * 100_000
    assert evaluate(write_csv(tmp_path / "f.csv", [("a", long), ("b", "x")]))["text"][0] == long


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("f.tsv", b"", ": the file is empty"),
        ("f.tsv", b"\n\n", ": the file is empty"),
        ("f.csv", b"\xef\xbb\xbf", ": the file is empty"),
        ("f.jsonl", b"\n", ": the file is empty"),
        ("f.tsv", b"label\ttext\n", ": there are no rows, only the header 'label', 'text'"),
        ("f.csv", b"label,text\n", ": there are no rows, only the header 'label', 'text'"),
        ("f.xls", b"label", ": unknown file ending '.xls'"),
        ("f.parquet", b"PAR?", ": cannot be read as Parquet"),
        ("f.tsv", b"label\ttext\ttext\na\tb\tc\n", ", row 1, field 'text': this column stands twice"),
        ("f.tsv", b"label\ttext\na\tb\nc\n", ", row 3, field 'label': this row has 1 field, the header 2"),
        ("f.tsv", b"label\ttext\na\tb\tc\n", ", row 2, field 'text': this row has 3 fields, the header 2"),
        ("f.csv", b"label,text\na,b,c\n", ", row 2, field 'text': this row has 3 fields, the header 2"),
        ("f.csv", b'label,text\na,"b\nc,d\n', ", row 2: not well-formed CSV"),
        ("f.csv", b'label,text\na,"b"c\n', ", row 2: not well-formed CSV"),
        ("f.tsv", b"label\ttext\na\tb\n\nc\td\n", ", row 3: the line is empty"),
        ("f.csv", b"label,text\na,b\n\nc,d\n", ", row 3: the line is empty"),
        ("f.tsv", b"label\ttext\na\t \n", ", row 2, field 'text': the text is empty"),
        ("f.tsv", b"label\ttext_a\ttext_b\na\tb\t\n", ", row 2, field 'text_b': the text is empty"),
        ("f.tsv", b"label\ttext\na\tb\n\tc\n", ", row 3, field 'label': the label is missing"),
        ("f.tsv", b"label\ttext\na\tb\nNaN\tc\n", ", row 3, field 'label': the label is missing (NaN)"),
        ("f.tsv", b"label\ttext\na\tb\nc\tcaf\xe9\n", ", row 3, field 'text': not UTF-8: the byte 0xe9"),
        ("f.csv", b"label,text\na,b\n\xff,d\n", ", row 3, field 'label': not UTF-8: the byte 0xff at char"),
        ("f.tsv", b"label\tt\xe9xt\na\tb\n", ", row 1: not UTF-8: the byte 0xe9 at character 2"),
        ("f.tsv", "label\ttext\na\tb\n".encode("utf-16"), ", row 1: the file is UTF-16, not UTF-8"),
        ("f.jsonl", b'{"label": "a", "text": "\\ud800"}', ", row 1, field 'text': not UTF-8: the lone"),
        ("f.jsonl", b'{"label": "a", "text": "b"}\n{"label"', ", row 2: not JSON"),
        ("f.json", b'[\n{"label": "a"}]', ", row 1: not JSON"),
        ("f.jsonl", b'["a", "b"]\n', ", row 1: a JSON list; each line must be an object"),
        ("f.jsonl", b'{"label": 1, "text": "b"}\n{"text": "c"}', ", row 2, field 'label': this row lacks"),
        ("f.jsonl", b'{"label": 1, "text": "b"}\n{"label": null, "text": "c"}', ", row 2, field 'label': "),
        ("f.jsonl", b'{"label": NaN, "text": "b"}', ", row 1, field 'label': the label is missing (nan)"),
        ("f.jsonl", b'{"label": 1, "text": 5}', ", row 1, field 'text': the text is of type int"),
        ("f.jsonl", b'{"label": 1, "text": null}', ", row 1, field 'text': the text is missing"),
        ("f.jsonl", b'{"label": {"a": 1}, "text": "b"}', ", row 1, field 'label': a label cannot be a dict"),
        (
            "f.jsonl",
            b'{"label": 1, "text": "b"}\n{"label": "x", "text": "c"}',
            ", row 2, field 'label': mixed label types: this row's label is a string, row 1's a number",
        ),
        (
            "f.jsonl",
            b'{"label": "x", "text": "b"}\n{"label": ["x"], "text": "c"}',
            ", row 2, field 'label': mixed label types: this row's label is a list, row 1's a string",
        ),
        (
            "f.tsv",
            b"label\ttext\n1\ta\n2\tb\nthree\tc\n",
            ", row 4, field 'label': mixed label types: 'three' here, but '1' in row 2",
        ),
        (
            "f.tsv",
            b"label\ttext\n1\ta\n1.0\tb\n2\tc\n",
            ", row 3, field 'label': mixed label types: '1.0' here, but '1' in row 2",
        ),
        ("f.tsv", b"label\ttext\na\tb\na\tc\n", ", field 'label': every row has the label 'a'"),
        ("f.tsv", b"pos\tgood food\nneg\tbad food\n", ", row 1: the header seems to be missing"),
        ("f.csv", b"label;text\na;b\n", ", row 1: there is one column, 'label;text': fields seem to be separated"),
        ("f.csv", b"label\ttext\na\tb\n", ", row 1: there is one column, 'label\ttext': fields seem to be"),
        ("f.tsv", b"label\tbody\na\tb\n", ": there is no text column; there are 'label', 'body'. Name it"),
        ("f.tsv", b"mark\ttext\na\tb\n", ": there is no label column; there are 'mark', 'text'. Name it"),
    ],
)  # fmt: skip
def test_bad_files_are_refused_with_their_place(
    tmp_path: Path, name: str, content: bytes, expected: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert message(path).startswith(f"{path}{expected}")


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([("a", "x"), (None, "y")], ", row 2, field 'label': the label is missing"),
        ([(1.0, "x"), (float("nan"), "y")], ", row 2, field 'label': the label is missing (nan)"),
        ([("a", "x"), ("b", None)], ", row 2, field 'text': the text is missing"),
        ([("a", 1), ("b", 2)], ", row 1, field 'text': the text is of type int, not a string"),
    ],
)
def test_bad_parquet_rows_are_refused(tmp_path: Path, rows: list[tuple[Any, ...]], expected: str) -> None:
    path = write_parquet(tmp_path / "f.parquet", rows)
    assert message(path).startswith(f"{path}{expected}")


def test_rows_of_parquet_are_counted_on_from_batch_to_batch(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "f.parquet", [("ab"[row % 2], f"text {row}") for row in range(9_999)] + [("a", " ")]
    )
    assert message(path).startswith(f"{path}, row 10000, field 'text': the text is empty")


def test_a_parquet_file_without_rows(tmp_path: Path) -> None:
    path = tmp_path / "f.parquet"
    pq.write_table(pa.table({"text": pa.array([], pa.string()), "label": pa.array([], pa.int64())}), path)
    assert message(path) == f"{path}: there are no rows, only the columns 'text', 'label'."


def test_dictionary_columns_of_parquet_are_read(tmp_path: Path) -> None:
    path = tmp_path / "f.parquet"
    pq.write_table(pa.table({"text": ["x", "y"], "label": pa.array(["b", "a"]).dictionary_encode()}), path)
    assert evaluate(path)["labels"][:] == [1, 0]


def test_a_column_named_by_an_option_that_is_not_there(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "f.tsv", ROWS)
    text = message(path, text_column="body")
    assert text == f"{path}: there is no column 'body' (--text-column); there are 'label', 'text'."
    assert "column 'text' is given for two purposes" in message(path, label_column="text")


def test_columns_are_found_in_any_case_and_by_option(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "f.tsv", [("0", "x", "y"), ("1", "z", "w")], ("Intent", "Body", "Utterance"))
    assert evaluate(path)["text"][:] == ["y", "w"]
    assert evaluate(path, text_column="Body", text_pair_column="Utterance")["text_pair"][:] == ["y", "w"]


def test_a_bad_file_leaves_nothing_in_the_cache(tmp_path: Path) -> None:
    rows = [("a", f"text {row}") for row in range(12_000)] + [("b", "")]
    assert "row 12002, field 'text'" in message(write_tsv(tmp_path / "f.tsv", rows))
    assert not list(Path(datasets.config.HF_DATASETS_CACHE).rglob("*.*"))


def test_a_file_is_parsed_once_and_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tsv(tmp_path / "f.tsv", ROWS)
    first = evaluate(path)
    written = {file: file.stat().st_mtime_ns for file in Path(datasets.config.HF_DATASETS_CACHE).rglob("*.*")}
    second = evaluate(path)
    assert second._fingerprint == first._fingerprint
    assert second["text"][:] == first["text"][:]
    assert written == {
        file: file.stat().st_mtime_ns for file in Path(datasets.config.HF_DATASETS_CACHE).rglob("*.*")
    }
    assert evaluate(write_tsv(path, ROWS[:2]))["text"][:] == [text for _, text in ROWS[:2]]


def test_texts_without_labels(tmp_path: Path) -> None:
    lines = tmp_path / "f.txt"
    lines.write_text("one\ntwo\n", encoding="utf-8")
    assert list(iterate_texts(lines)) == ["one", "two"]
    pairs = write_tsv(tmp_path / "f.tsv", [("x", "y")], ("text_a", "text_b"))
    assert list(iterate_texts(pairs)) == [("x", "y")]
    assert list(iterate_texts(pairs, text_column="text_b", text_pair_column="text_a")) == [("y", "x")]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("f.txt", "", ": the file is empty"),
        ("f.txt", "one\n\ntwo\n", ", row 2: the line is empty"),
        ("f.txt", "one\n  \n", ", row 2, field 'text': the text is empty"),
        ("f.tsv", "text\none\n \n", ", row 3, field 'text': the text is empty"),
    ],
)
def test_bad_texts_without_labels(tmp_path: Path, name: str, content: str, expected: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        list(iterate_texts(path))
    assert str(caught.value).startswith(f"{path}{expected}")


def test_texts_are_streamed(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text('{"text": "one"}\nbroken\n', encoding="utf-8")
    texts = iterate_texts(path)
    assert next(texts) == "one"
    with pytest.raises(InputError, match="row 2: not JSON"):
        next(texts)


def test_missing_files_are_named_before_anything_is_read(tmp_path: Path) -> None:
    for name in ("f.tsv", "f.txt"):
        with pytest.raises(InputError, match=r"no such file"):
            iterate_texts(tmp_path / name)
    with pytest.raises(InputError, match="no such file"):
        open_table(tmp_path / "f.csv")
