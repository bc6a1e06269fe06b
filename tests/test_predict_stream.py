"""`alembert predict` from file to file: in order, resumable, bad rows told, nothing half-written counted."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alembert.cli import options
from alembert.cli.app import run
from alembert.cli.predict import _count
from alembert.common.errors import InputError
from alembert.data.texts import attempt_texts, iterate_texts
from alembert.runtime.adaptive import AdaptiveClassifier, Prediction
from alembert.runtime.calibration_file import CALIBRATION_FILE, model_files_fingerprint, write_calibration
from alembert.runtime.prediction_file import PredictionFile, json_line

Capture = pytest.CaptureFixture[str]


class WordCounter:
    """Stands in for a classifier: the label is the text's last word, the score its number of words."""

    window = 4
    is_pair: bool | None = None

    def __init__(self) -> None:
        self.texts: list[Any] = []
        self.starts: list[int] = []
        self.settings: dict[str, Any] = {}

    def load(self, *_: Any, **options: Any) -> WordCounter:
        self.settings = {name: options[name] for name in ("speed", "policy", "max_length", "batch_tokens")}
        return self

    def stream(self, texts: Iterable[Any], *, start: int) -> Iterator[Prediction]:
        self.starts.append(start)
        for text in texts:
            self.texts.append(text)
            words = (" ".join(text) if isinstance(text, tuple) else text).split()
            yield Prediction(words[-1], len(words) + (self.settings["speed"] or 0), 2, None)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}", encoding="utf-8")
    return folder


@pytest.fixture
def classifier(monkeypatch: pytest.MonkeyPatch) -> WordCounter:
    counter = WordCounter()
    monkeypatch.setattr(options, "load_adaptive", counter.load)
    return counter


@pytest.fixture
def predict(model: Path, classifier: WordCounter, tmp_path: Path) -> Callable[..., int]:
    def call(source: Path, output: str = "labels.jsonl", *more: str) -> int:
        classifier.texts.clear()
        return run(["predict", str(model), "--input", str(source), "--output", str(tmp_path / output), *more])

    return call


def lines(path: Path, texts: Iterable[str]) -> Path:
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


def labels(path: Path) -> list[Any]:
    if ".jsonl" in path.name:
        return [json.loads(line)["label"] for line in path.read_text(encoding="utf-8").splitlines()]
    with path.open(encoding="utf-8", newline="") as file:
        return [row["label"] for row in csv.DictReader(file, delimiter="\t" if ".tsv" in path.name else ",")]


TEXTS = [f"text number {row}" for row in range(19)]


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_a_failed_run_goes_on_past_the_bad_row(
    predict: Callable[..., int], classifier: WordCounter, tmp_path: Path, capfd: Capture, ending: str
) -> None:
    texts = [*TEXTS[:10], " ", *TEXTS[11:]]
    source, output = lines(tmp_path / "texts.txt", texts), tmp_path / f"labels.{ending}"
    assert predict(source, output.name) == 2
    assert "go on past bad rows with --on-error skip" in capfd.readouterr().err
    assert predict(source, output.name, "--on-error", "skip") == 0
    assert classifier.texts == [text for text in texts[8:] if text != " "]
    assert classifier.starts[-3:] == [8, 12, 16]
    resumed = output.read_bytes()
    assert predict(source, output.name, "--on-error", "skip", "--resume", "never") == 0
    assert output.read_bytes() == resumed


def test_a_run_that_skipped_bad_rows_does_not_go_on_without(
    predict: Callable[..., int],
    classifier: WordCounter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Capture,
) -> None:
    source = lines(tmp_path / "texts.txt", ["a", " ", *TEXTS])
    calls = iter([None, None, SystemExit(137)])

    def dying(*_: Any) -> None:
        if (error := next(calls)) is not None:
            raise error

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", dying)
        assert predict(source, "labels.jsonl", "--on-error", "skip") == 137
    capfd.readouterr()
    assert predict(source) == 2
    assert "1 of the 8 rows that an interrupted run has done are bad ones" in capfd.readouterr().err
    assert predict(source, "labels.jsonl", "--on-error", "skip") == 0
    assert classifier.texts == TEXTS[6:]


def test_two_processes_do_not_write_to_one_file(
    predict: Callable[..., int], classifier: WordCounter, tmp_path: Path, capfd: Capture
) -> None:
    source, output = lines(tmp_path / "texts.txt", TEXTS), tmp_path / "labels.jsonl"
    program = (
        "import sys\nfrom pathlib import Path\nfrom alembert.runtime.prediction_file import PredictionFile\n"
        "with PredictionFile(Path(sys.argv[1]), {}, resume=True):\n    print(flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, str(output)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert predict(source) == 2
        assert predict(source, "labels.jsonl", "--resume", "never") == 2
        message = capfd.readouterr().err
        assert f"--output {output}: another process is writing to it" in message
        other.kill()
    assert predict(source) == 0
    assert [path.name for path in tmp_path.rglob("*labels*")] == ["labels.jsonl"]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv"])
def test_a_failed_run_goes_on_when_the_row_is_mended(
    predict: Callable[..., int], classifier: WordCounter, tmp_path: Path, capfd: Capture, ending: str
) -> None:
    source, output = tmp_path / "texts.txt", tmp_path / f"labels.{ending}"
    assert predict(lines(source, [*TEXTS[:10], " ", *TEXTS[11:]]), output.name) == 2
    message = capfd.readouterr().err
    assert "texts.txt, row 11" in message
    assert "The 8 predictions before are kept" in message
    assert not output.exists()
    assert labels(tmp_path / f"labels.{ending}.part") == [str(row) for row in range(8)]

    assert predict(lines(source, TEXTS), output.name) == 0
    assert classifier.texts == TEXTS[8:]
    assert labels(output) == [str(row) for row in range(19)]
    assert sorted(path.name for path in tmp_path.glob("labels*")) == [output.name]
    resumed = output.read_bytes()
    assert predict(source, output.name) == 0
    assert classifier.texts == TEXTS
    assert output.read_bytes() == resumed


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
@pytest.mark.parametrize(("dies_at", "dying_call"), [("fsync", 3), ("journal", 3), ("journal", 1)])
def test_what_was_written_when_the_run_was_killed_is_not_counted(
    predict: Callable[..., int],
    classifier: WordCounter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ending: str,
    dies_at: str,
    dying_call: int,
) -> None:
    source, output = lines(tmp_path / "texts.txt", TEXTS), tmp_path / f"labels.{ending}"
    calls = 0

    def dying(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == dying_call:
                raise SystemExit(137)
            return original(*arguments)

        return call

    with monkeypatch.context() as patched:
        if dies_at == "fsync":
            patched.setattr(os, "fsync", dying(os.fsync))
        else:
            from alembert.runtime import prediction_file

            patched.setattr(prediction_file, "write_json", dying(prediction_file.write_json))
        assert predict(source, output.name) == 137
    part = tmp_path / f"labels.{ending}.part"
    journal = part.with_name(part.name + ".json")
    whole = json.loads(journal.read_text())["rows"] if journal.exists() else 0
    assert whole == 4 * (dying_call - 1)
    with part.open("a", encoding="utf-8") as file:
        file.write('{"label": "hal')
    assert predict(source, output.name) == 0
    assert classifier.texts == TEXTS[whole:]
    assert labels(output) == [str(row) for row in range(19)]


def test_an_interrupted_run_of_another_job_is_refused_or_thrown_away(
    predict: Callable[..., int], classifier: WordCounter, model: Path, tmp_path: Path, capfd: Capture
) -> None:
    source = lines(tmp_path / "texts.txt", [*TEXTS[:10], "", *TEXTS[11:]])
    assert predict(source) == 2
    part = (tmp_path / "labels.jsonl.part").read_bytes()
    capfd.readouterr()
    for changed, words in (
        (["--speed", "0.5"], "another speed (None there, 0.5 now)."),
        (
            ["--batch-tokens", "9", "--policy", "margin"],
            "(None there, 'margin' now), batch tokens (None there, 9 now)",
        ),
        ([], "no longer"),
    ):
        if not changed:
            lines(source, ["another text", *TEXTS[1:]])
        assert predict(source, "labels.jsonl", *changed) == 2
        message = capfd.readouterr().err
        assert words in message
        assert "--resume never" in message
        assert not classifier.texts
    lines(source, TEXTS[:5])
    assert predict(source) == 2
    lines(source, TEXTS)
    (model / "manifest.json").write_text('{"other": 1}', encoding="utf-8")
    assert predict(source) == 2
    assert "another model (manifest.json)" in capfd.readouterr().err
    (model / "manifest.json").write_text("{}", encoding="utf-8")
    (model / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    assert predict(source) == 2
    assert "another tokenizer (tokenizer_config.json)" in capfd.readouterr().err
    assert (tmp_path / "labels.jsonl.part").read_bytes() == part
    assert predict(source, "labels.jsonl", "--resume", "never") == 0
    assert classifier.texts == TEXTS


FAULTY: dict[str, tuple[str, list[tuple[int, str | None]]]] = {
    "txt": ("a first\n \n\nb fourth\n\n", [(1, "first"), (2, None), (3, None), (4, "fourth")]),
    "tsv": (
        "label\ttext\nx\ta second\nb\n\nx\t \nx\tc sixth\n",
        [(2, "second"), (3, None), (4, None), (5, None), (6, "sixth")],
    ),
    "csv": (
        'text,label\n"a\nthird",x\nb,"x"y\n"",x\none\n,\nc eighth,x\n',
        [(2, "third"), (4, None), (5, None), (6, None), (7, None), (8, "eighth")],
    ),
    "jsonl": (
        '{"text": \n{"text": "a second"}\n[1]\n{"label": 1}\n{"text": 7}\n{"text": "b sixth"}\n',
        [(1, None), (2, "second"), (3, None), (4, None), (5, None), (6, "sixth")],
    ),
}


@pytest.mark.parametrize("form", FAULTY)
@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_bad_rows_are_told_in_their_place(
    predict: Callable[..., int],
    classifier: WordCounter,
    tmp_path: Path,
    capfd: Capture,
    form: str,
    ending: str,
) -> None:
    content, expected = FAULTY[form]
    source, output = tmp_path / f"texts.{form}", tmp_path / f"labels.{ending}"
    source.write_text(content, encoding="utf-8")
    assert predict(source, output.name, "--on-error", "skip", "--json") == 0
    bad = sum(label is None for _, label in expected)
    summary = json.loads(capfd.readouterr().out)
    assert (summary["rows"], summary["errors"]) == (len(expected), bad)
    assert _count(source) == (None if form == "csv" else len(content.splitlines()) - (form == "tsv"))
    source.write_text(content.rstrip("\n"), encoding="utf-8")
    assert _count(source) == (
        None if form == "csv" else len(content.rstrip("\n").splitlines()) - (form == "tsv")
    )
    if ending == "jsonl":
        records = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    else:
        with output.open(encoding="utf-8", newline="") as file:
            records = [{name: value or None for name, value in row.items()} for row in csv.DictReader(file)]
    assert [record["label"] for record in records] == [label for _, label in expected]
    for record, (row, label) in zip(records, expected, strict=True):
        assert list(record) == ["label", "score", "exit", "uncertainty", "error"]
        assert (record["error"] is None) == (label is not None)
        if label is None:
            assert f"texts.{form}, row {row}" in record["error"]
            assert record["score"] is None
    assert len(classifier.texts) == len(expected) - bad

    capfd.readouterr()
    assert predict(source, "other.jsonl") == 2
    first = next(row for row, label in expected if label is None)
    assert f"row {first}" in capfd.readouterr().err
    assert not list(tmp_path.glob("other*"))


def test_bytes_that_are_no_text_and_files_that_are_no_tables(
    predict: Callable[..., int], tmp_path: Path, capfd: Capture
) -> None:
    source = tmp_path / "texts.txt"
    source.write_bytes(b"a first\nb \xff second\nc third\n")
    assert predict(source, "labels.jsonl", "--on-error", "skip") == 0
    assert labels(tmp_path / "labels.jsonl") == ["first", None, "third"]
    assert "0xff" in json.loads((tmp_path / "labels.jsonl").read_text().splitlines()[1])["error"]
    capfd.readouterr()
    for name, content in (("no.tsv", b"review_text\n1\n"), ("list.jsonl", b"[\n]\n"), ("none.txt", b"")):
        (tmp_path / name).write_bytes(content)
        assert predict(tmp_path / name, "more.jsonl", "--on-error", "skip") == 2
        assert name in capfd.readouterr().err
    assert not list(tmp_path.glob("more*"))


def test_standard_output_takes_files_too(
    model: Path, classifier: WordCounter, tmp_path: Path, capfd: Capture
) -> None:
    source = lines(tmp_path / "texts.txt", ["a first", " ", "c third"])
    assert run(["predict", str(model), "--input", str(source), "--on-error", "skip"]) == 0
    assert [json.loads(line)["label"] for line in capfd.readouterr().out.splitlines()] == [
        "first",
        None,
        "third",
    ]
    assert run(["predict", str(model), "one text", "another text here"]) == 0
    assert capfd.readouterr().out.splitlines() == [
        "text\t2.000\texit 2\tone text",
        "here\t3.000\texit 2\tanother text here",
    ]


def test_arguments_are_checked_row_by_row_like_files(
    model: Path, classifier: WordCounter, capfd: Capture
) -> None:
    arguments = ["predict", str(model), "one text", " ", "half \udc80", "another text here"]
    assert run(arguments) == 2
    assert "text argument 2 is empty" in capfd.readouterr().err
    assert run([*arguments, "--on-error", "skip"]) == 0
    first, second, third, fourth = capfd.readouterr().out.splitlines()
    assert (first, fourth) == ("text\t2.000\texit 2\tone text", "here\t3.000\texit 2\tanother text here")
    assert second == "error\ttext argument 2 is empty"
    assert third.startswith("error\ttext argument 3: holds the lone surrogate U+DC80 at character 6")
    assert run([*arguments, "--on-error", "skip", "--json"]) == 0
    records = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [record["label"] for record in records] == ["text", None, None, "here"]
    assert [record["error"] is None for record in records] == [True, False, False, True]


def test_strict_and_tolerant_reading_give_the_same_rows(tmp_path: Path) -> None:
    source = tmp_path / "pairs.csv"
    source.write_text('text,text_b\na,b\n"c,d",e\n', encoding="utf-8")
    assert list(iterate_texts(source)) == [("a", "b"), ("c,d", "e")]
    assert list(attempt_texts(source)) == [(2, ("a", "b")), (3, ("c,d", "e"))]
    source.write_text("text,text_b\na,b\nc\n", encoding="utf-8")
    (_, first), (row, second) = attempt_texts(source)
    assert (first, row) == (("a", "b"), 3)
    assert isinstance(second, InputError)
    with pytest.raises(InputError, match="row 3"):
        list(iterate_texts(source))


@given(
    st.lists(st.text(min_size=1, max_size=8), max_size=20),
    st.lists(st.integers(1, 6), min_size=1, max_size=8),
    st.sampled_from(["jsonl", "csv", "tsv"]),
    st.integers(0, 20),
)
@settings(max_examples=25, deadline=None)
def test_any_interruption_gives_the_same_file(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], sizes: list[int], ending: str, stop: int
) -> None:
    """Writes windows of changing size, opens the file anew after `stop` rows, and compares with one run."""
    folder = tmp_path_factory.mktemp("files")
    rows = list(enumerate(names))

    def record(name: str) -> dict[str, Any]:
        return {"label": name, "score": 0.5, "exit": 1, "uncertainty": None}

    whole = PredictionFile(folder / f"whole.{ending}", {"speed": 0.1}, resume=True)
    whole.append(names, [record(name) for name in names])
    whole.finish()
    whole.close()
    file = PredictionFile(folder / f"parts.{ending}", {"speed": 0.1}, resume=True)
    reopened = False
    turn = 0
    while file.rows < len(names):
        if file.rows >= stop and not reopened:
            reopened = True
            file.close()
            file = PredictionFile(folder / f"parts.{ending}", {"speed": 0.1}, resume=True)
            file.skip(iter(rows))
        window = names[file.rows : file.rows + sizes[turn % len(sizes)]]
        turn += 1
        file.append(window, [record(name) for name in window])
    file.finish()
    file.close()
    assert (folder / f"parts.{ending}").read_bytes() == (folder / f"whole.{ending}").read_bytes()


@pytest.fixture
def calibrated(fast: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the run, and a calibration for it on demand."""
    folder = shutil.copytree(fast, tmp_path / "calibrated")

    def write() -> Path:
        settings = {"speed": 0.9, "policy": "entropy", "top_k": None, "renormalise": None, "tolerance": None}
        record = settings | {
            "exits": [1, 3],
            "max_length": 20,
            "dtype": "fp32",
            "model_files": model_files_fingerprint(folder),
        }
        write_calibration(folder / CALIBRATION_FILE, record)
        return folder

    return write


@pytest.mark.parametrize(
    "asked",
    [{}, {"policy": "margin"}, {"speed": 0.3}, {"policy": "top_k_entropy", "top_k": 2, "speed": 0.5}],
)
def test_a_calibration_is_used_or_left_aside_as_from_python(
    calibrated: Callable[..., Path], asked: dict[str, Any], capfd: Capture
) -> None:
    folder, texts = (
        calibrated(),
        ["we saw the soup", "the goal and the rain", "wind", "very much bread there"],
    )
    flags = [part for name, value in asked.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    assert run(["predict", str(folder), *texts, "--json", *flags]) == 0
    found = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    classifier = AdaptiveClassifier.from_pretrained(folder, **asked)
    effective = classifier.settings
    assert (effective["exits"], effective["max_length"]) == (([1, 2, 3], 32) if asked else ([1, 3], 20))
    assert effective["speed"] == (asked.get("speed", 0.0) if asked else 0.9)
    for record, expected in zip(found, classifier.predict(texts), strict=True):
        assert (record["label"], record["exit"]) == (expected.label, expected.exit)
        assert record["uncertainty"] == pytest.approx(expected.uncertainty)


def test_a_calibration_between_two_runs_is_another_job(
    calibrated: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture
) -> None:
    load = options.load_adaptive
    monkeypatch.setattr(options, "load_adaptive", partial(load, window=4))
    folder = tmp_path / "calibrated"
    source = lines(tmp_path / "texts.txt", [*TEXTS[:10], " ", *TEXTS[11:]])
    command = ["predict", str(folder), "--input", str(source), "--output", str(tmp_path / "labels.csv")]
    assert run(command) == 2
    lines(source, TEXTS)
    calibrated()
    capfd.readouterr()
    assert run(command) == 2
    message = capfd.readouterr().err
    assert "holds 8 predictions of an interrupted run with another speed (0.0 there, 0.9 now)" in message
    assert "exits ([1, 2, 3] there, [1, 3] now)" in message
    assert "max length (32 there, 20 now)" in message
    (folder / CALIBRATION_FILE).unlink()
    described = json.loads((folder / "alembert.json").read_text(encoding="utf-8"))
    described["configuration"]["settings"]["max_length"] = 16
    (folder / "alembert.json").write_text(json.dumps(described), encoding="utf-8")
    assert run(command) == 2
    assert "another max length (32 there, 16 now)." in capfd.readouterr().err


def test_precision_and_device_are_chosen_on_the_command_line(
    fast: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture
) -> None:
    opened: list[AdaptiveClassifier] = []
    load = options.load_adaptive
    monkeypatch.setattr(
        options, "load_adaptive", lambda *given, **how: opened.append(load(*given, **how)) or opened[-1]
    )
    assert run(["predict", str(fast), "the soup", "--device", "cpu", "--precision", "bf16"]) == 0
    assert (opened[0].settings["device"], opened[0].settings["dtype"]) == ("cpu", "bfloat16")
    assert run(["predict", str(model), "the soup", "--precision", "bf16"]) == 2
    assert "precision bf16: the numbers of an exported model were chosen" in capfd.readouterr().err
    assert run(["predict", str(fast), "the soup", "--device", "abacus"]) == 2
    assert "device 'abacus': cannot be used here" in capfd.readouterr().err


def test_json_that_python_does_not_read_is_a_bad_row(
    predict: Callable[..., int], tmp_path: Path, capfd: Capture
) -> None:
    rows = ['{"text": "a first"}', f'{{"text": {"7" * 5000}}}', "[" * 100_000, '{"text": "b fourth"}']
    source, output = lines(tmp_path / "texts.jsonl", rows), tmp_path / "labels.jsonl"
    assert predict(source, output.name, "--on-error", "skip") == 0
    records = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [record["label"] for record in records] == ["first", None, None, "fourth"]
    assert "texts.jsonl, row 2: cannot be read (an integer has too many digits)" in records[1]["error"]
    assert "texts.jsonl, row 3: cannot be read (lists or objects are nested too deep)" in records[2]["error"]


def test_a_quote_that_never_closes_is_no_row_to_skip(
    predict: Callable[..., int], classifier: WordCounter, tmp_path: Path, capfd: Capture
) -> None:
    rows = ["text,label", *(f"{text},x" for text in TEXTS)]
    source, output = tmp_path / "texts.csv", tmp_path / "labels.jsonl"
    lines(source, [*rows[:10], f'"{rows[10]}', *rows[11:]])
    assert predict(source, output.name, "--on-error", "skip") == 2
    message = capfd.readouterr().err
    assert "row 11: not well-formed CSV: a quote that opens in this row never closes" in message
    assert "the 9 lines to the end of the file" in message
    assert predict(source, output.name) == 2
    for told in (message, capfd.readouterr().err):
        assert "are kept" in told and "--on-error" not in told
    assert not output.exists()
    lines(source, rows)
    assert predict(source, output.name, "--on-error", "skip") == 0
    assert classifier.texts == TEXTS[8:]
    assert labels(output) == [text.split()[-1] for text in TEXTS]


def test_a_bad_row_of_many_lines_says_which(predict: Callable[..., int], tmp_path: Path) -> None:
    source, output = tmp_path / "texts.csv", tmp_path / "labels.jsonl"
    lines(source, ["text,label", '"a,x', "b,x", 'c"d,x', 'e,"x', 'y",z', "f last,x"])
    assert predict(source, output.name, "--on-error", "skip") == 0
    first, second, last = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert "row 2: not well-formed CSV (lines 2 to 4)" in first["error"]
    assert "row 5, field 'label': this row (lines 5 to 6) has 3 fields, the header 2" in second["error"]
    assert last["label"] == "last"


def test_a_record_is_never_invalid_json() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        json_line({"label": "a", "score": float("nan")})


PAIRS = {"sentence1": "a first", "sentence2": "b second", "body": "c third"}


@pytest.mark.parametrize(
    ("is_pair", "given", "read"),
    [
        (False, [], "a first"),
        (False, ["--text-column", "body"], "c third"),
        (None, [], ("a first", "b second")),
        (None, ["--text-column", "body"], "c third"),
        (None, ["--text-column", "body", "--text-pair-column", "sentence1"], ("c third", "a first")),
        (True, [], ("a first", "b second")),
        (True, ["--text-column", "body"], ("c third", "b second")),
    ],
)
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_second_text_is_read_where_the_model_reads_one(
    predict: Callable[..., int],
    classifier: WordCounter,
    tmp_path: Path,
    is_pair: bool | None,
    given: list[str],
    read: Any,
    ending: str,
) -> None:
    classifier.is_pair = is_pair
    rows = [",".join(PAIRS), ",".join(PAIRS.values())] if ending == "csv" else [json.dumps(PAIRS)]
    assert predict(lines(tmp_path / f"pairs.{ending}", rows), "labels.jsonl", *given) == 0
    assert classifier.texts == [read]


def test_texts_of_the_wrong_kind_are_refused_with_file_and_column(
    predict: Callable[..., int], classifier: WordCounter, tmp_path: Path, capfd: Capture
) -> None:
    source = lines(tmp_path / "pairs.csv", ["text,other", "a,b"])
    classifier.is_pair = True
    assert predict(source) == 2
    message = capfd.readouterr().err
    assert "pairs.csv: this model was trained on pairs of texts" in message
    assert "--text-pair-column" in message
    classifier.is_pair = False
    assert predict(source, "labels.jsonl", "--text-pair-column", "other") == 2
    assert "pairs.csv, field 'other': this model was trained on single texts" in capfd.readouterr().err
    assert not list(tmp_path.glob("labels*"))


def test_options_that_nothing_would_read_are_refused(
    model: Path, classifier: WordCounter, tmp_path: Path, capfd: Capture
) -> None:
    source = str(lines(tmp_path / "texts.txt", TEXTS))
    for flags, words in (
        (["a text", "--text-column", "zzz"], "--text-column zzz: texts given as arguments have no columns"),
        (["a text", "--text-pair-column", "zzz"], "--text-pair-column zzz: texts given as arguments"),
        (["--input", source, "--text-column", "zzz"], "has a text per line and no columns"),
        (["a text", "--resume", "never"], "--resume never: is about a file: name it with --output"),
        (["a text", "--resume", "auto"], "--resume auto: is about a file: name it with --output"),
    ):
        assert run(["predict", str(model), *flags]) == 2
        assert words in capfd.readouterr().err
    assert not classifier.texts


def test_an_output_that_cannot_be_written_is_told(
    predict: Callable[..., int],
    classifier: WordCounter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Capture,
) -> None:
    source = lines(tmp_path / "texts.txt", TEXTS)
    (tmp_path / "folder.jsonl").mkdir()
    for output, words in (
        ("texts.txt/labels.jsonl", "texts.txt is no folder): name another file"),
        ("texts.txt/deep/labels.jsonl", "nothing can be written there"),
        ("folder.jsonl", "folder.jsonl: is a folder: name a file"),
    ):
        assert predict(source, output) == 2
        assert words in capfd.readouterr().err

    def refusing(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("filelock.FileLock.acquire", refusing)
    assert predict(source) == 2
    assert "labels.jsonl: nothing can be written there (Permission denied)" in capfd.readouterr().err
    assert not classifier.texts


def test_tsv_has_a_line_per_row_and_no_quoting(tmp_path: Path) -> None:
    output = tmp_path / "labels.tsv"
    with PredictionFile(output, {}, resume=False) as file:
        answers = [Prediction('the "best"\tof\r\nall', 0.5, 2, None), Prediction(("a", "b"), 0.25, 1, 0.125)]
        file.append(["x", "y"], [vars(answer) for answer in answers])
        file.append([InputError("bad\nrow")], [{"error": "bad\nrow"}])
        file.finish()
    assert output.read_bytes().decode().split("\n") == [
        "label\tscore\texit\tuncertainty\terror",
        'the "best" of all\t0.5\t2\t\t',
        "a|b\t0.25\t1\t0.125\t",
        "\t\t\t\tbad row",
        "",
    ]
