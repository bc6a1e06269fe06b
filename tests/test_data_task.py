"""Tasks: labels, problem types, splits, presets, the hub."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pytest

from alembert.common.errors import InputError
from alembert.data import PRESETS, load_task

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(folder: Path, labels: dict[str, list[str]], ending: str = "tsv") -> Path:
    """A folder with a file per split; texts are unlike one another."""
    for split, values in labels.items():
        rows = "".join(f"{label}\t{split} text {row}\n" for row, label in enumerate(values))
        (folder / f"{split}.{ending}").write_text("label\ttext\n" + rows, encoding="utf-8")
    return folder


def message(source: Path | str, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        load_task(source, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["b", "a", "C", "a"], ("C", "a", "b")),
        (["10", "9", "-1", "9"], ("-1", "9", "10")),
        (["true", "false"], ("false", "true")),
    ],
)
def test_labels_are_sorted(tmp_path: Path, labels: list[str], names: tuple[str, ...]) -> None:
    task = load_task(write(tmp_path, {"train": labels, "dev": labels[:1]}))
    assert (task.problem_type, task.label_names, task.num_labels) == (SINGLE, names, len(names))
    assert [names[label] for label in task.dataset("train")["labels"][:]] == labels
    assert (task.metrics, task.main_metric) == (("accuracy", "f1_macro"), "accuracy")
    assert not task.is_pair
    assert task.name == tmp_path.name


@pytest.mark.parametrize("labels", [["1.5", "2", "3.25"], ["1.0", "2.0", "3.0"], ["1e-3", "1", "2"]])
def test_decimal_numbers_are_a_regression(
    tmp_path: Path, labels: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "alembert"):
        task = load_task(write(tmp_path, {"train": labels, "dev": ["9"]}))
    assert (task.problem_type, task.label_names, task.num_labels) == (REGRESSION, (), 1)
    assert task.dataset("train")["labels"][:] == [float(label) for label in labels]
    assert task.dataset("dev").features["labels"].dtype == "float64"
    assert "this is a regression" in caplog.text


def test_the_problem_type_can_be_given(tmp_path: Path) -> None:
    folder = write(tmp_path, {"train": ["1.0", "0.0"], "dev": ["1.0"]})
    assert load_task(folder, problem_type=SINGLE).label_names == ("0.0", "1.0")
    folder = write(tmp_path, {"train": ["1", "0"], "dev": ["1"]})
    assert load_task(folder, problem_type=REGRESSION).dataset("dev")["labels"][:] == [1.0]
    assert "Unknown problem type 'sorting'" in message(folder, problem_type="sorting")


def test_labels_can_be_taken_as_strings(tmp_path: Path) -> None:
    folder = write(tmp_path, {"train": ["10", "9", "unknown"], "dev": ["9"]})
    assert f"{folder / 'train.tsv'}, row 4, field 'label': mixed label types" in message(folder)
    task = load_task(folder, label_type="string")
    assert (task.problem_type, task.label_names) == (SINGLE, ("10", "9", "unknown"))
    assert "Unknown label type 'int'" in message(folder, label_type="int")


@pytest.mark.parametrize("label", ["high", "nan", "inf"])
def test_a_score_that_is_no_number(tmp_path: Path, label: str) -> None:
    folder = write(tmp_path, {"train": ["1.5", "2.5"], "dev": ["1.5", label]})
    text = message(folder, problem_type=REGRESSION)
    assert text.startswith(f"{folder / 'dev.tsv'}, row 3, field 'label': '{label}' is not a finite number")


def test_labels_unseen_in_train(tmp_path: Path) -> None:
    folder = write(tmp_path, {"train": ["a", "b"], "dev": ["a"], "test": ["b", "c", "d", "c"]})
    text = message(folder)
    assert text.startswith(
        f"{folder / 'test.tsv'}, row 3, field 'label': the label 'c' (2 rows) is not among"
    )
    assert "seen in train: 'a', 'b'. Nor are 'd'." in text


def test_known_labels_of_a_model(tmp_path: Path) -> None:
    path = write(tmp_path, {"other": ["b", "b"]}) / "other.tsv"
    task = load_task(path, label_names=["b", "a"], problem_type=SINGLE, required_splits=("test",))
    assert task.label_names == ("b", "a")
    assert task.dataset("test")["labels"][:] == [0, 0]
    assert (
        f"{path}, row 2, field 'label': the label 'b' (2 rows) is not one of the known labels: 'x'"
        in message(path, label_names=["x", "y"], required_splits=("test",))
    )


def test_a_model_without_label_names_takes_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, {"other": ["1", "0"]}) / "other.tsv"
    task = load_task(path, label_names=["LABEL_0", "LABEL_1"], required_splits=("test",))
    assert task.dataset("test")["labels"][:] == [1, 0]
    assert "the label '1'" in message(path, label_names=["no", "yes"], required_splits=("test",))


def test_multi_label_by_lists_and_by_separator(tmp_path: Path) -> None:
    rows = [{"labels": labels, "text": f"text {labels}"} for labels in (["a", "c"], ["b"], [], ["c", "c"])]
    jsonl = tmp_path / "f.jsonl"
    jsonl.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    tsv = tmp_path / "f.tsv"
    tsv.write_text(
        "labels\ttext\n" + "".join(f"{'|'.join(row['labels'])}\t{row['text']}\n" for row in rows),
        encoding="utf-8",
    )
    expected = [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    for path, options in ((jsonl, {}), (tsv, {"label_separator": "|"})):
        task = load_task(path, required_splits=("test",), **options)
        assert (task.problem_type, task.label_names) == (MULTI, ("a", "b", "c"))
        assert task.dataset("test")["labels"][:] == expected
        assert task.metrics == ("f1_micro", "f1_macro", "subset_accuracy")
    assert f"{jsonl}, row 1, field 'labels': lists of labels, but {SINGLE} has one" in message(
        jsonl, problem_type=SINGLE
    )


@pytest.mark.parametrize("labels", [[[0, 1, 0], [1, 1, 0]], [[0.0, 1.0], [1.0, 0.0]]])
def test_a_0_or_1_for_each_label_is_no_list_of_names(tmp_path: Path, labels: list[list[float]]) -> None:
    path = tmp_path / "f.jsonl"
    rows = [{"labels": values, "text": f"text {row}"} for row, values in enumerate(labels)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    size = len(labels[0])
    expected = f"{path}, row 1, field 'labels': every list has {size} numbers 0 or 1"
    for names in (None, ["0", "1"]):
        assert message(path, required_splits=("test",), label_names=names).startswith(expected)
    # Lists of several lengths are names, numbers too.
    rows.append({"labels": [type(labels[0][0])(1)], "text": "one"})
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = load_task(path, required_splits=("test",))
    assert task.dataset("test")["labels"][:][-1] == [0.0, 1.0]


def test_a_train_split_must_have_two_classes(tmp_path: Path) -> None:
    folder = write(tmp_path, {"train": ["a", "a"], "dev": ["a"]})
    expected = (
        f"{folder / 'train.tsv'}, field 'label': every row has the label 'a'; training needs two classes."
    )
    assert message(folder) == expected
    assert message(folder, label_names=["a", "b"]) == expected


def test_dev_is_held_out_of_train(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    labels = ["a"] * 150 + ["b"] * 49 + ["c"]
    folder = write(tmp_path, {"train": labels, "test": ["a"]})
    with caplog.at_level(logging.INFO, "alembert"):
        task = load_task(folder, required_splits=("train", "dev"))
    assert "20 of 200 rows are held out of train (seed 42)" in caplog.text
    assert list(task.splits) == ["train", "dev", "test"]
    train, dev = task.dataset("train"), task.dataset("dev")
    assert sorted(train["text"][:] + dev["text"][:]) == sorted(f"train text {row}" for row in range(200))
    assert np.bincount(dev["labels"][:], minlength=3).tolist() == [15, 5, 0]
    again, other = load_task(folder), load_task(folder, seed=1)
    assert again.dataset("dev")["text"][:] == dev["text"][:] != other.dataset("dev")["text"][:]
    assert "dev" not in load_task(folder, required_splits=("test",)).splits


def test_texts_that_stand_in_train_and_in_the_dev_held_out_of_it_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = "".join(f"{'ab'[row % 2]}\tsame text {row % 10}\n" for row in range(100))
    (tmp_path / "train.tsv").write_text("label\ttext\n" + rows, encoding="utf-8")
    load_task(tmp_path)
    assert "10 of 10 rows of dev also stand in train" in caplog.text


@pytest.mark.parametrize(("single", "more"), [(100, 12), (90, 11), (20, 3)])
def test_no_row_is_held_out_twice(tmp_path: Path, single: int, more: int) -> None:
    # Hardly more rows may be held out than must be: the first one of each class stays in train.
    labels = [f"class {number:03}" for number in range(single)] + ["class 000"] * more
    task = load_task(write(tmp_path, {"train": labels}))
    texts = [*task.dataset("train")["text"], *task.dataset("dev")["text"]]
    assert len(task.dataset("dev")["text"][:]) == (single + more) // 10
    assert sorted(texts) == sorted(f"train text {row}" for row in range(single + more))


def test_dev_of_a_regression_spans_the_scores(tmp_path: Path) -> None:
    folder = write(tmp_path, {"train": [f"{row / 10}" for row in range(1, 101)]})
    held_out = load_task(folder).dataset("dev")["labels"][:]
    assert len(held_out) == 10
    assert max(np.diff(sorted(held_out))) < 1.5


def test_too_few_rows_to_hold_out(tmp_path: Path) -> None:
    folder = write(tmp_path, {"train": ["a", "b"]})
    assert message(folder) == f"{folder / 'train.tsv'}: too few rows to hold out a dev split; add a dev file."


def test_shared_rows_are_counted_and_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for split, texts in {"train": "xyz", "dev": "xyu", "test": "uvw"}.items():
        rows = "".join(f"{row % 2}\tsame\t{text}\n" for row, text in enumerate(texts))
        (tmp_path / f"{split}.tsv").write_text("label\ttext_a\ttext_b\n" + rows, encoding="utf-8")
    load_task(tmp_path)
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert record.getMessage().startswith("2 of 3 rows of dev also stand in train")


def test_extra_columns_are_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for split in ("train", "dev"):
        rows = f"1\ta\t{split} x\n2\tb\t{split} y\n"
        (tmp_path / f"{split}.tsv").write_text("id\tlabel\ttext\n" + rows, encoding="utf-8")
    with caplog.at_level(logging.INFO, "alembert"):
        load_task(tmp_path)
    assert [record.getMessage() for record in caplog.records] == ["Columns not used: id (used: text, label)."]


def test_folders_and_their_files(tmp_path: Path) -> None:
    folder = write(tmp_path, {"train": ["a", "b"], "validation": ["a"], "train.oos": ["x"], "notes": ["y"]})
    assert list(load_task(folder).splits) == ["train", "dev"]
    with pytest.raises(InputError, match="there is no test split; there are: train, dev"):
        load_task(folder).dataset("test")
    assert message(folder, required_splits=("test",)) == (
        f"{folder}: there is no test split (test.*); there are: train, dev."
    )
    write(folder, {"dev": ["a"]})
    assert "2 files for the dev split (dev.tsv, validation.tsv); keep one" in message(folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert message(empty).startswith(f"{empty}: no train, dev or test file (e.g. train.tsv;")


def test_matched_splits_are_mnlis(tmp_path: Path) -> None:
    write(
        tmp_path, {"train": ["a", "b"], "dev_matched": ["a"], "dev_mismatched": ["b"], "test_matched": ["b"]}
    )
    task = load_task(tmp_path)
    assert {split: data["text"][:] for split, data in task.splits.items() if split != "train"} == {
        "dev": ["dev_matched text 0"],
        "test": ["test_matched text 0"],
    }


def test_a_test_file_without_labels_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, {"train": ["a", "b"], "dev": ["a"]})
    test = tmp_path / "test.tsv"
    test.write_text("index\tsentence\n0\tmovie\n", encoding="utf-8")
    assert list(load_task(tmp_path).splits) == ["train", "dev"]
    assert f"{test}: there is no label column, so this split is left out." in caplog.text
    for required in ((), ("test",), ("train", "test")):
        told = message(tmp_path, required_splits=required)
        assert f"{test}: there is no label column; there are" in told
        assert told.endswith("Where test has no labels, give another split's file alone.")
    assert load_task(tmp_path / "dev.tsv", required_splits=("dev",)).dataset("dev").num_rows == 1
    # A header that is missing is told as such.
    test.write_text("a\tmovie\nb\tfilm\n", encoding="utf-8")
    assert f"{test}, row 1: the header seems to be missing" in message(tmp_path)


def test_no_pairs_by_an_empty_name(tmp_path: Path) -> None:
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_text(
            f"label\tquestion1\tquestion2\na\t{split} x\ty\nb\t{split} z\tu\n", encoding="utf-8"
        )
    assert load_task(tmp_path).is_pair
    task = load_task(tmp_path, text_column="question1", text_pair_column="")
    assert not task.is_pair
    assert task.dataset("dev")["text"][:] == ["dev x", "dev z"]


def test_a_single_file_takes_the_split_required(tmp_path: Path) -> None:
    path = write(tmp_path, {"f": ["a", "b"] * 10}) / "f.tsv"
    assert list(load_task(path, required_splits=()).splits) == ["test"]
    assert list(load_task(path, required_splits=("test",)).splits) == ["test"]
    assert list(load_task(path, required_splits=("dev",)).splits) == ["dev"]
    assert list(load_task(path).splits) == ["train", "dev"]


def test_splits_must_agree_on_pairs(tmp_path: Path) -> None:
    folder = write(tmp_path, {"dev": ["0"]})
    (folder / "train.tsv").write_text("label\ttext_a\ttext_b\n0\tx\ty\n1\tz\tw\n", encoding="utf-8")
    assert message(folder).startswith(f"{folder / 'dev.tsv'}: there is no second text column")


def test_fingerprint_and_description_follow_the_content(tmp_path: Path) -> None:
    folder = write(tmp_path, {"train": ["a", "b"], "dev": ["a"]})
    first = load_task(folder).fingerprint()
    assert (first["train_rows"], first["dev_rows"]) == (2, 1)
    assert load_task(folder).fingerprint() == first
    write(folder, {"dev": ["b"]})
    second = load_task(folder)
    assert second.fingerprint()["train_sha256"] == first["train_sha256"]
    assert second.fingerprint()["dev_sha256"] != first["dev_sha256"]
    assert json.loads(json.dumps(second.describe()))["label_names"] == ["a", "b"]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_read_their_own_and_the_general_columns(tmp_path: Path, preset: str) -> None:
    known = PRESETS[preset]
    is_pair = known.text_pair_column is not None
    own = [known.text_column, *([known.text_pair_column] if is_pair else [])]
    general = ["text_a", "text_b"] if is_pair else ["text"]
    names = known.label_names
    values = {"names": list(names), "ids": [str(index) for index in range(len(names))]}
    if not names:
        values = {"scores": ["0.5", "4.75"], "more": ["5.000", "1"]}
    for kind, labels in values.items():
        for columns in (own, general):
            folder = tmp_path / f"{kind}-{columns[0]}"
            folder.mkdir()
            for split in ("train", "dev"):
                rows = [
                    "\t".join([label, *(f"{split} {label} {column}" for column in columns)])
                    for label in labels
                ]
                lines = "\n".join(["\t".join(["label", *columns]), *rows])
                (folder / f"{split}.tsv").write_text(lines, encoding="utf-8")
            task = load_task(folder, preset=preset)
            assert (task.name, task.problem_type) == (preset, known.problem_type)
            assert (task.label_names, task.metrics, task.is_pair) == (names, known.metrics, is_pair)
            expected = list(range(len(names))) if names else [float(label) for label in labels]
            assert task.dataset("train")["labels"][:] == expected
            assert task.dataset("dev")["text"][0] == f"dev {labels[0]} {columns[0]}"


def test_what_a_preset_refuses(tmp_path: Path) -> None:
    folder = write(tmp_path, {"train": ["0", "1"], "dev": ["0", "2"]})
    assert message(folder, preset="sst2").startswith(
        f"{folder / 'dev.tsv'}, row 3, field 'label': the label '2' (1 row) is not one of the known labels"
    )
    assert "holds single texts, but 'rte' is a task of pairs of texts" in message(folder, preset="rte")
    assert "Unknown preset 'imdb'; known are cola, sst2" in message(folder, preset="imdb")


def test_a_presets_numbers_are_its_own_whatever_the_models_order(tmp_path: Path) -> None:
    folder = write(tmp_path, {"train": ["0", "1", "1"]})
    path, names = folder / "train.tsv", PRESETS["sst2"].label_names
    task = load_task(
        path, preset="sst2", label_names=[name.upper() for name in reversed(names)], required_splits=()
    )
    assert task.dataset("test")["labels"][:] == [1, 0, 0]
    assert "the label '0'" in message(path, preset="sst2", label_names=["a", "b"], required_splits=())
    unnamed = load_task(path, preset="sst2", label_names=["LABEL_0", "LABEL_1"], required_splits=())
    assert unnamed.dataset("test")["labels"][:] == [0, 1, 1]


def test_metrics_can_be_given(tmp_path: Path) -> None:
    folder = write(tmp_path, {"train": ["0", "1"], "dev": ["0"]})
    assert load_task(folder, metrics=["f1"]).main_metric == "f1"
    assert "Unknown metric 'bleu'" in message(folder, metrics=["bleu"])


@pytest.mark.parametrize("source", ["reviews", "/no/such/folder", "./org/name", "a/b/c", "org/train.tsv"])
def test_paths_that_are_not_there_do_not_reach_for_the_hub(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hint = " A data set of the hub is named organisation/name." if source == "reviews" else ""
    assert message(source) == f"{source}: no such file or folder.{hint}"


def test_a_hub_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("name not known")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    expected = "no such file or folder, and the hub gave no data set of that name: name not known"
    assert message("org/name") == f"org/name: {expected}"


def test_a_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def split(texts: str, labels: list[int]) -> datasets.Dataset:
        features = datasets.Features(
            {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["unfit", "fit"])}
        )
        return datasets.Dataset.from_dict({"sentence": list(texts), "label": labels}, features=features)

    asked = []

    def load_dataset(*arguments: Any) -> datasets.DatasetDict:
        asked.append(arguments)
        return datasets.DatasetDict(
            train=split("abc", [0, 1, 1]), validation_matched=split("d", [1]), test=split("e", [-1])
        )

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = load_task("org/name:config")
    assert asked == [("org/name", "config")]
    assert {name: len(rows) for name, rows in task.splits.items()} == {"train": 3, "dev": 1}
    assert task.label_names == ("unfit", "fit")
    assert task.dataset("train")["labels"][:] == [0, 1, 1]
    assert task.dataset("dev")["text"][:] == ["d"]


def test_labels_of_the_hub_that_are_lists_or_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = datasets.ClassLabel(names=["joy", "anger", "fear"])
    features = {"text": datasets.Value("string"), "labels": datasets.List(names)}
    several = datasets.Dataset.from_dict(
        {"text": ["a", "b", "c", "d"], "labels": [[0, 2], [1], [], [2]]}, features=datasets.Features(features)
    )
    features = {"text": datasets.Value("string"), "label": names}
    some = datasets.Dataset.from_dict(
        {"text": ["a", "b", "c"], "label": [0, -1, 1]}, features=datasets.Features(features)
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for split in (several, several.shuffle(seed=0)):
        monkeypatch.setattr(
            datasets, "load_dataset", lambda *_, split=split: datasets.DatasetDict(train=split, dev=split)
        )
        task = load_task("org/emotions")
        assert (task.problem_type, task.label_names) == (
            "multi_label_classification",
            ("joy", "anger", "fear"),
        )
        by_text = dict(zip(task.dataset("dev")["text"][:], task.dataset("dev")["labels"][:], strict=True))
        assert by_text == {"a": [1, 0, 1], "b": [0, 1, 0], "c": [0, 0, 0], "d": [0, 0, 1]}
    # A model that was given no names has the data's, in their order.
    for names in ([f"LABEL_{index}" for index in range(3)], ["0", "1", "2"]):
        task = load_task("org/emotions", label_names=names, problem_type="multi_label_classification")
        assert task.label_names == tuple(names)
        by_text = dict(zip(task.dataset("dev")["text"][:], task.dataset("dev")["labels"][:], strict=True))
        assert by_text["a"] == [1, 0, 1] and by_text["b"] == [0, 1, 0]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.DatasetDict(train=some, dev=some))
    assert "the label is missing" in message("org/snli")
