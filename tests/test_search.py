"""Hyper-parameter search: the space's syntax, the Pareto front, interruptions, refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import alembert
from alembert.benchmarks.flops import CostModel
from alembert.cli.app import run
from alembert.common.errors import InputError
from alembert.compression import search as search_module
from alembert.compression.search import search
from alembert.compression.search_space import parse_dimension, parse_space
from alembert.methods.base import resolve
from alembert.methods.registry import METHODS, find_method
from alembert.methods.search_spaces import SEARCH_SPACES, student_shapes
from alembert.models.loading import load_classifier, load_tokenizer

TINY: dict[str, Any] = {"epochs": 1, "batch_size": 32, "max_length": 32}
SPACE = ["learning_rate=1e-4..1e-2:log", "student=1x16|2x16", "hard_weight=0..1"]


class Chosen:
    """A trial that takes what it is told, or an end of the range."""

    def __init__(self, index: int = 0) -> None:
        self.index = index

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return (low, high)[self.index]

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        return (low, high)[self.index]

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        assert all(isinstance(choice, str) for choice in choices)
        return choices[self.index]


@settings(deadline=None, max_examples=25)
@given(low=st.floats(1e-8, 1e3, allow_subnormal=False), factor=st.floats(1.001, 1e3), log=st.booleans())
def test_ranges_survive_text(low: float, factor: float, log: bool) -> None:
    high = low * factor
    dimension = parse_dimension(f"temperature={low!r}..{high!r}{':log' if log else ''}", find_method("kd"))
    assert (dimension.kind, dimension.low, dimension.high, dimension.log) == ("float", low, high, log)
    assert not dimension.is_setting
    again = parse_dimension(f"temperature={dimension.describe()}", find_method("kd"))
    assert again == dimension


@settings(deadline=None, max_examples=25)
@given(low=st.integers(1, 500), width=st.integers(1, 500))
def test_ranges_of_whole_numbers_are_whole(low: int, width: int) -> None:
    dimension = parse_dimension(f"batch-size={low}..{low + width}", find_method("kd"))
    assert dimension.kind == "int" and dimension.is_setting
    ends = dimension.suggest(Chosen(0)), dimension.suggest(Chosen(1))
    assert ends == (low, low + width) and all(type(end) is int for end in ends)


@settings(deadline=None, max_examples=25)
@given(shapes=st.lists(st.tuples(st.integers(0, 24), st.integers(2, 999)), min_size=1, unique=True))
def test_shapes_stay_text(shapes: list[tuple[int, int]]) -> None:
    texts = [f"{layers}x{width}" for layers, width in shapes]
    dimension = parse_dimension(f"student={'|'.join(texts)}", find_method("kd"))
    assert list(dimension.values) == texts


def test_choices_become_what_options_take() -> None:
    layers = parse_dimension("layers=1|[1, 3]", find_method("ms-bert"))
    assert layers.values == ([1], [1, 3])
    assert layers.suggest(Chosen(1)) == [1, 3]
    assert parse_dimension("temperature=1|2.5|1e-1", find_method("kd")).values == (1, 2.5, 0.1)
    assert parse_dimension("normalise=true|false", find_method("pkd")).values == (True, False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("temperature", ["name=low..high"]),
        ("warmth=1..2", ["warmth", "kd", "temperature"]),
        ("temperature=3..2", ["below"]),
        ("temperature=0..2:log", ["above 0"]),
        ("temperature=a..b", ["two numbers"]),
        ("temperature=1||2", ["empty"]),
        ("soft_loss=1..2", ["no number"]),
        ("batch_size=1.5..3", ["whole"]),
        ("hard_weight=0..2", ["hard_weight", "2"]),
        ("soft_loss=divergence|nothing", ["soft_loss", "nothing"]),
        ("seed=1..9", ["seed", "fixed"]),
    ],
)
def test_spaces_that_cannot_be_are_refused(text: str, words: list[str]) -> None:
    with pytest.raises(InputError) as refusal:
        parse_space([text], find_method("kd"), "default", {}, {"seed": 1})
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_default_spaces_fit_every_method() -> None:
    assert SEARCH_SPACES.keys() == METHODS.keys()
    for name, texts in SEARCH_SPACES.items():
        parse_space(texts, METHODS[name], "default", {}, {})
    assert student_shapes("kd", 12, 768, 12) == ("2x384", "2x768", "4x384", "4x768", "6x384", "6x768")
    assert student_shapes("pkd", 12, 768, 12) == ("2x768", "4x768", "6x768")
    assert student_shapes("kd", 4, 30, 15) == ("1x15", "1x30", "2x15", "2x30")


def dominated(trial: dict[str, Any], trials: list[dict[str, Any]]) -> bool:
    """Whether another is at least as good in both and better in one, spelled out."""
    return any(
        other["metric"] >= trial["metric"]
        and other["macs"] <= trial["macs"]
        and (other["metric"] > trial["metric"] or other["macs"] < trial["macs"])
        for other in trials
    )


def without_clock(results: dict[str, Any]) -> list[Any]:
    return [
        (trial["number"], trial["options"], trial["metric"], trial["macs"], trial["pareto"])
        for trial in results["trials"]
    ]


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory, teacher: Path, task: alembert.Task
) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("search") / "whole"
    return folder, search("kd", str(teacher), task, folder, trials=4, space=SPACE, settings=TINY)


def test_every_trial_is_a_run_with_its_metric_and_macs(
    found: tuple[Path, dict[str, Any]], task: alembert.Task
) -> None:
    folder, results = found
    assert json.loads((folder / "search.json").read_text()) == results
    assert len(results["trials"]) == 4
    for trial in results["trials"]:
        path = folder / "trials" / f"{trial['number']:04d}"
        assert trial["run"] == str(path)
        configuration = json.loads((path / "alembert.json").read_text())["configuration"]
        values = configuration["options"] | configuration["settings"]
        assert {name: values[name] for name in trial["options"]} == trial["options"]
        measured = json.loads((path / "metrics.json").read_text())
        assert math.isclose(trial["metric"], measured["dev"]["full"][task.main_metric], abs_tol=1e-6)
        texts = list(task.dataset("dev")["text"])
        lengths = [
            len(ids) for ids in load_tokenizer(str(path))(texts, truncation=True, max_length=32)["input_ids"]
        ]
        macs = CostModel.from_model(load_classifier(str(path))).full_model_macs(lengths).mean()
        assert math.isclose(trial["macs"], macs)
        assert math.isclose(trial["flops"], 2 * macs)


def test_front_is_what_no_trial_dominates(found: tuple[Path, dict[str, Any]]) -> None:
    _, results = found
    for trial in results["trials"]:
        assert trial["pareto"] is not dominated(trial, results["trials"])
    assert any(trial["pareto"] for trial in results["trials"])


def test_interrupted_search_gives_the_same(
    found: tuple[Path, dict[str, Any]],
    teacher: Path,
    task: alembert.Task,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, calls = tmp_path / "cut", []
    distill = search_module.distill

    def cut_off(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments[3])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return distill(*arguments, **options)

    monkeypatch.setattr(search_module, "distill", cut_off)
    with pytest.raises(KeyboardInterrupt):
        search("kd", str(teacher), task, folder, trials=4, space=SPACE, settings=TINY)
    assert len(json.loads((folder / "search.json").read_text())["trials"]) == 1
    first = search("kd", str(teacher), task, folder, trials=2, space=SPACE, settings=TINY)
    assert calls[1] == calls[2] == folder / "trials" / "0001"
    assert len(first["trials"]) == 2
    results = search("kd", str(teacher), task, folder, trials=4, space=SPACE, settings=TINY)
    assert without_clock(results) == without_clock(found[1])
    again = search("kd", str(teacher), task, folder, trials=4, space=SPACE, settings=TINY)
    assert again == results and len(calls) == 5


def test_another_search_in_the_same_folder_is_refused(
    found: tuple[Path, dict[str, Any]], teacher: Path, task: alembert.Task, tmp_path: Path
) -> None:
    folder, _ = found
    with pytest.raises(InputError, match="another space"):
        search("kd", str(teacher), task, folder, trials=5, space=SPACE[:2], settings=TINY)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds no search"):
        search("kd", str(teacher), task, tmp_path, trials=1, space=SPACE, settings=TINY)


def test_two_processes_do_not_search_in_one_folder(
    found: tuple[Path, dict[str, Any]], teacher: Path, task: alembert.Task, held_elsewhere: Any
) -> None:
    folder, results = found
    with held_elsewhere(folder), pytest.raises(InputError, match="another process is working on it"):
        search("kd", str(teacher), task, folder, trials=9, space=SPACE, settings=TINY)
    assert json.loads((folder / "search.json").read_text()) == results


def test_refused_trials_are_recorded_and_only_all_of_them_are_an_error(
    teacher: Path, task: alembert.Task, tmp_path: Path
) -> None:
    space = ["student=5x16|2x16"]
    options: dict[str, Any] = {"attention": False, "intermediate_epochs": 1}
    results = search(
        "tinybert",
        str(teacher),
        task,
        tmp_path / "some",
        trials=5,
        space=space,
        options=options,
        settings=TINY,
    )
    states = {trial["options"]["student"]: trial["state"] for trial in results["trials"]}
    assert states == {"5x16": "failed", "2x16": "complete"}
    for trial in results["trials"]:
        if trial["state"] == "failed":
            assert "no deeper" in trial["message"] and trial["metric"] is None and not trial["pareto"]
    with pytest.raises(InputError, match=r"all 2 trials failed.*no deeper"):
        search(
            "tinybert", str(teacher), task, tmp_path / "none", trials=2, space=["student=5x16|6x16"],
            options=options, settings=TINY,
        )  # fmt: skip


def test_a_trial_that_diverges_has_failed(teacher: Path, task: alembert.Task, tmp_path: Path) -> None:
    space = ["student=1x16", "learning_rate=1e29..1e30"]
    for _ in range(2):
        with pytest.raises(
            InputError, match=r"all 1 trials failed.*the training diverged; lower the learning"
        ):
            search("kd", str(teacher), task, tmp_path / "out", trials=1, space=space, settings=TINY)
    (trial,) = json.loads((tmp_path / "out" / "search.json").read_text())["trials"]
    assert trial["state"] == "failed" and trial["metric"] is None


def test_no_trial_begins_after_the_timeout(teacher: Path, task: alembert.Task, tmp_path: Path) -> None:
    results = search(
        "kd", str(teacher), task, tmp_path / "out", trials=3, timeout=0, space=SPACE, settings=TINY
    )
    assert results["trials"] == []


def test_command_prints_json_alone_and_draws(
    teacher: Path, task_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "search", "--method", "ms-bert", "--teacher", teacher, "--data", task_folder, "--output", tmp_path / "out",
        "--trials", 2, "--space", "placement=all|last_k", "--sampler", "nsga2", "--speed", 0.3,
        "--epochs", 1, "--batch-size", 32, "--max-length", 32,
    ]  # fmt: skip
    assert run([*map(str, arguments), "--json"]) == 0
    out, _ = capfd.readouterr()
    results = json.loads(out)
    assert results == json.loads((tmp_path / "out" / "search.json").read_text())
    for trial in results["trials"]:
        (chosen,) = [row for row in trial["speeds"] if row["speed"] == 0.3]
        assert (chosen["metric"], chosen["macs"]) == (trial["metric"], trial["macs"])
        assert len(trial["speeds"]) == 10
    assert (tmp_path / "out" / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert "Pareto front" in (tmp_path / "out" / "pareto.html").read_text()
    assert run([str(argument) for argument in arguments]) == 0
    out, err = capfd.readouterr()
    assert "Pareto front" in out and "teacher" in out and "pareto.png" in out
    assert "Trial 1" not in err


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--space", "warmth=1..2"], ["warmth"]),
        (["--space", "temperature=1..2", "--set", "temperature=3"], ["temperature", "fixed"]),
        (["--sampler", "luck"], ["luck", "tpe"]),
        (["--method", "kd+ms-bert"], ["one method"]),
    ],
)
def test_bad_commands_are_refused_before_anything_is_written(
    extra: list[str], words: list[str], teacher: Path, task_folder: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    output = tmp_path / "out"
    arguments = [
        "--method",
        "kd",
        "--teacher",
        teacher,
        "--data",
        task_folder,
        "--output",
        output,
        "--trials",
        1,
    ]
    assert run(["search", *map(str, arguments), *extra]) == 2
    out, err = capfd.readouterr()
    assert out == "" and not output.exists()
    assert all(word in err for word in words), err


def test_default_space_of_students_is_below_the_teacher(teacher: Path) -> None:
    texts = search_module.default_space(find_method("kd"), str(teacher), {"temperature": 2.0}, {})
    assert texts[-1] == "student=1x16|1x32|2x16|2x32"
    assert [text.partition("=")[0] for text in texts] == ["learning_rate", "hard_weight", "student"]
    resolve(find_method("kd"), "default", {"student": "1x16"}, {})
