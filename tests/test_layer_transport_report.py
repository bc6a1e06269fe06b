"""The record of BERT-EMD's layer transport: what is read from a run, what is drawn, what a run is left with."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from alembert.cli.app import run
from alembert.cli.distill import report_layer_transport
from alembert.common.errors import InputError
from alembert.reports import layer_transport
from alembert.reports.layer_transport import (
    layer_transport_history,
    plot_layer_transport,
    write_layer_transport,
)

STUDENT_LAYERS, TEACHER_LAYERS = 2, 4
STEPS = [1, 10, 20, 26]


def features(step: int, offset: float = 0.0) -> dict[str, Any]:
    student = np.array([0.5 - 0.01 * step - offset, 0.5 + 0.01 * step + offset])
    teacher = np.array([0.1, 0.2, 0.3, 0.4])
    return {
        "flow": np.outer(student, teacher).round(5).tolist(),
        "student_weights": student.tolist(),
        "teacher_weights": teacher.tolist(),
    }


def write_run(folder: Path, *kinds: str, offset: float = 0.0, steps: list[int] = STEPS) -> Path:
    """A run's log: snapshots beside the loss, among entries that have none."""
    log: list[dict[str, Any]] = []
    for step in steps:
        snapshot = {kind: features(step, offset * (kind == "hidden")) for kind in kinds}
        log.append({"loss": 1.0, "step": step, **({"snapshot": snapshot} if kinds else {})})
        log.append({"eval_score": 0.5, "step": step})
    folder.mkdir()
    stages = {"task": {"log_history": log, "best_metric": None, "global_step": STEPS[-1]}}
    (folder / "trainer_state.json").write_text(json.dumps(stages))
    return folder


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn."""
    drawn: list[Any] = []
    save = layer_transport.save_figure
    monkeypatch.setattr(
        layer_transport, "save_figure", lambda figure, path: (drawn.append(figure), save(figure, path))
    )
    return drawn


def panels(figure: Any) -> dict[str, Any]:
    return {panel.get_title(): panel for panel in figure.axes if panel.get_title()}


def test_history_is_what_was_logged(tmp_path: Path) -> None:
    history = layer_transport_history(write_run(tmp_path / "run", "attention", "hidden", offset=0.1))
    assert list(history) == ["attention", "hidden"]
    for kind, offset in (("attention", 0.0), ("hidden", 0.1)):
        assert history[kind].steps == STEPS
        for index, step in enumerate(STEPS):
            logged = features(step, offset)
            assert history[kind].flows[index] == logged["flow"]
            assert history[kind].student_weights[index] == logged["student_weights"]
            assert history[kind].teacher_weights[index] == logged["teacher_weights"]


def test_json_holds_the_same(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", "hidden")
    write_layer_transport(folder, tmp_path / "out.json")
    written = json.loads((tmp_path / "out.json").read_text())
    assert list(written) == ["hidden"]
    assert written["hidden"] == vars(layer_transport_history(folder)["hidden"])


def test_panels_show_flows_over_the_training_and_the_weights_by_step(
    tmp_path: Path, figures: list[Any]
) -> None:
    folder = write_run(tmp_path / "run", "attention", "hidden", offset=0.1)
    plot_layer_transport(folder, tmp_path / "out.png")
    assert (imread(tmp_path / "out.png")[..., :3] < 0.5).any(axis=-1).mean() > 0.02
    drawn = panels(figures[0])
    assert len(drawn) == 10
    for name, offset in (("attention", 0.0), ("hidden states", 0.1)):
        for step in (1, 10, 26):
            flow = drawn[f"{name}: flow at step {step}"]
            expected = 100 * np.array(features(step, offset)["flow"])
            np.testing.assert_allclose(flow.collections[0].get_array(), expected)
            assert [text.get_text() for text in flow.texts] == [f"{share:.0f}" for share in expected.ravel()]
            assert (flow.get_xlabel(), flow.get_ylabel()) == ("teacher layer", "student layer")
            assert flow.get_xticks().tolist() == [1, 2, 3, 4]
        weights = drawn[f"{name}: student's weights (white: even, 50%)"].collections[0]
        by_step = [features(step, offset)["student_weights"] for step in STEPS]
        np.testing.assert_allclose(weights.get_array(), 100 * np.array(by_step).T)
        # Even weights are the middle of the colours, and all panels of a side have one scale.
        assert weights.norm.vmin + weights.norm.vmax == pytest.approx(100)
        assert weights.norm.vmax == pytest.approx(50 + 36)
        columns = weights.get_coordinates()[0, :, 0]
        np.testing.assert_allclose(columns, [0.5, 5.5, 15, 23, 26.5])


def test_shared_weights_share_a_panel(tmp_path: Path, figures: list[Any]) -> None:
    plot_layer_transport(write_run(tmp_path / "run", "attention", "hidden"), tmp_path / "out.png")
    assert list(panels(figures[0])) == [
        *(f"attention: flow at step {step}" for step in (1, 10, 26)),
        *(f"hidden states: flow at step {step}" for step in (1, 10, 26)),
        "attention and hidden states: student's weights (white: even, 50%)",
        "attention and hidden states: teacher's weights (white: even, 25%)",
    ]


def within(limits: tuple[float, float], position: float) -> bool:
    return limits[0] <= position <= limits[1]


def test_nothing_overlaps(tmp_path: Path, figures: list[Any]) -> None:
    plot_layer_transport(write_run(tmp_path / "run", "attention", "hidden", offset=0.1), tmp_path / "out.png")
    texts = []
    for panel in figures[0].axes:
        ticks = [tick for tick in panel.get_xticklabels() if within(panel.get_xlim(), tick.get_position()[0])]
        ticks += [
            tick for tick in panel.get_yticklabels() if within(panel.get_ylim(), tick.get_position()[1])
        ]
        labels = panel.title, panel.xaxis.label, panel.yaxis.label, *ticks
        texts += [label for label in labels if label.get_text() and label.get_window_extent().height]
    extents = [text.get_window_extent() for text in (*texts, figures[0]._suptitle)]
    assert len(extents) > 30
    for index, extent in enumerate(extents):
        assert extent.count_overlaps(extents[:index]) == 0
        assert extent.x0 >= 0 and extent.x1 <= figures[0].bbox.width


def test_a_single_snapshot_of_one_kind_is_drawn(tmp_path: Path, figures: list[Any]) -> None:
    plot_layer_transport(write_run(tmp_path / "run", "hidden", steps=[1]), tmp_path / "out.png")
    assert next(iter(panels(figures[0]))) == "hidden states: flow at step 1"


def test_ticks_of_deep_models_are_thinned_out() -> None:
    assert layer_transport._layer_ticks(12) == list(range(1, 13))
    assert layer_transport._layer_ticks(24) == list(range(2, 25, 2))


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (None, "no trainer_state.json"),
        ({"task": {"log_history": []}}, "logged no transport between layers"),
        ({"task": {"log_history": [{"step": 1, "snapshot": {"hidden": {}}}]}}, "changed by hand"),
        ([1], "changed by hand"),
    ],
)
def test_folders_without_a_record_are_refused(log: Any, message: str, tmp_path: Path) -> None:
    if log is not None:
        (tmp_path / "trainer_state.json").write_text(json.dumps(log))
    with pytest.raises(InputError, match=message):
        plot_layer_transport(tmp_path, tmp_path / "out.png")
    assert not list(tmp_path.glob("*.png"))


def distil(method: str, teacher: Path, data: Path, output: Path, *more: str) -> int:
    arguments = ["distill", "--method", method, "--teacher", str(teacher), "--data", str(data)]
    size = ["--student", "2x16", "--epochs", "1", "--batch-size", "8", "--max-length", "32"]
    return run([*arguments, "--output", str(output), *size, *more])


def test_a_run_of_bert_emd_is_left_with_both_files(teacher: Path, task_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert distil("bert-emd", teacher, task_folder, output) == 0
    picture = imread(output / "layer_transport.png")
    assert picture.shape[1] > 1000
    series = json.loads((output / "layer_transport.json").read_text())
    assert list(series) == ["attention", "hidden"] and series["hidden"]["steps"] == [1]
    assert np.shape(series["attention"]["flows"]) == (1, STUDENT_LAYERS, TEACHER_LAYERS)
    np.testing.assert_allclose(np.sum(series["attention"]["flows"], axis=(1, 2)), 1, atol=1e-4)
    np.testing.assert_allclose(np.sum(series["hidden"]["teacher_weights"], axis=1), 1, atol=1e-4)


def test_without_matplotlib_the_run_succeeds_with_a_warning(
    teacher: Path,
    task_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    real = importlib.import_module

    def absent(name: str, *more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *more)

    monkeypatch.setattr(importlib, "import_module", absent)
    monkeypatch.setattr("logging.Logger.propagate", True, raising=False)
    output = tmp_path / "run"
    assert distil("bert-emd", teacher, task_folder, output) == 0
    assert "pip install -e '.[report]'" in caplog.text
    assert (output / "layer_transport.json").is_file()
    assert not list(output.glob("*.png"))


def test_other_methods_leave_neither(teacher: Path, task_folder: Path, tmp_path: Path) -> None:
    assert distil("kd", teacher, task_folder, tmp_path / "run") == 0
    assert not list((tmp_path / "run").glob("layer_transport.*"))


def test_of_methods_in_turn_the_run_with_transport_has_the_files(tmp_path: Path) -> None:
    output = write_run(tmp_path / "run")
    (output / "steps").mkdir()
    write_run(output / "steps" / "1-bert-emd", "hidden")
    report_layer_transport(output)
    assert sorted(str(file.relative_to(output)) for file in output.rglob("layer_transport.*")) == [
        "steps/1-bert-emd/layer_transport.json",
        "steps/1-bert-emd/layer_transport.png",
    ]


def test_other_processes_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = write_run(tmp_path / "run", "hidden")
    monkeypatch.setattr("accelerate.PartialState.is_main_process", False)
    report_layer_transport(output)
    assert [file.name for file in output.iterdir()] == ["trainer_state.json"]
