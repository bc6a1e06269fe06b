from __future__ import annotations

import copy
import csv
import importlib
import io
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from alembert.common.errors import InputError
from alembert.reports import plots, tables

EXITS = (1, 3, 5, 7, 9, 11, 12)
LAYER, HEAD = 335.2e6, 7.8e6
FULL = 12 * LAYER + HEAD


def evaluation(model: str = "runs/fast", metric: float = 0.925) -> dict:
    """Results of a 12-layer model with exits after every second layer, at ten speeds."""
    speeds = []
    for tenth in range(10):
        speed = tenth / 10
        shares = np.zeros(7)
        shares[-1] = 1.0
        if speed:
            leaving = 0.75 / (1 + np.exp((7 - np.array(EXITS[:-1]) - 9.5 * speed) / 1.6) ** -1)
            staying = np.cumprod(1 - leaving)
            shares = np.append(np.append(1.0, staying[:-1]) * leaving, staying[-1])
        heads = np.arange(1, 8) if speed else np.array([0] * 6 + [1])
        macs = float(shares @ (np.array(EXITS) * LAYER + heads * HEAD))
        now = metric - 0.07 * speed**3
        ratio = 1 / (macs / FULL + 0.05)
        speeds.append(
            {
                "speed": speed, "policy": "entropy", "top_k": None,
                "metric": now, "metric_interval": [now - 0.013, now + 0.012],
                "metrics": {"accuracy": now}, "agreement": 1 - 0.1 * speed**2,
                "macs": macs, "flops": 2 * macs, "macs_full_convention": 1.04 * macs, "speedup": FULL / macs,
                # An exit that nobody takes may be left out.
                "exits": {str(e): float(s) for e, s in zip(EXITS, shares, strict=True) if s > 0},
                "exit_metrics": {},
                "texts_per_second": 31 * ratio, "texts_per_second_quartiles": [30 * ratio, 32 * ratio],
                "ratio_to_full": ratio, "ratio_to_full_quartiles": [0.98 * ratio, 1.02 * ratio],
            }
        )  # fmt: skip
    return {
        "alembert_version": "0.1.0", "created": "2025-03-01T12:00:00+00:00",
        "model": model, "data": "reviews", "split": "test", "rows": 1200,
        "task": {"problem_type": "single_label_classification", "metric": "accuracy", "num_labels": 2},
        "machine": {
            "processor": "Example CPU", "cores": 2, "threads": 2,
            "torch": "2.9.0", "transformers": "5.1.0", "device": "cpu",
        },
        "batch_tokens": 4096, "repeats": 3,
        "full_model": {
            "metric": metric, "metrics": {"accuracy": metric}, "macs": FULL, "flops": 2 * FULL,
            "texts_per_second": 31.0, "texts_per_second_quartiles": [30.1, 32.0],
        },
        "speeds": speeds,
    }  # fmt: skip


def untimed(results: dict) -> dict:
    results = copy.deepcopy(results)
    for entry in (results["full_model"], *results["speeds"]):
        for key in [key for key in entry if key.startswith(("texts_per_second", "ratio_to_full"))]:
            del entry[key]
    return results


def rendered(results: dict, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(tables.speed_table(results))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_rows_are_flat_and_start_with_the_full_model() -> None:
    results = evaluation()
    rows = tables.speed_rows(results)
    assert [row["speed"] for row in rows] == ["full model", *(tenth / 10 for tenth in range(10))]
    assert len({tuple(row) for row in rows}) == 1
    full, fifth = rows[0], rows[6]
    assert (full["accuracy"], full["macs"], full["speedup"], full["ratio_to_full"]) == (0.925, FULL, 1.0, 1.0)
    assert full["exit_12"] == 1.0 and full["metric_lower"] is None
    given = results["speeds"][5]
    assert fifth["accuracy"] == given["metric"]
    assert [fifth["metric_lower"], fifth["metric_upper"]] == given["metric_interval"]
    assert [fifth["ratio_to_full_lower"], fifth["ratio_to_full_upper"]] == given["ratio_to_full_quartiles"]
    assert [fifth[f"exit_{layer}"] for layer in EXITS] == [given["exits"][str(layer)] for layer in EXITS]
    assert rows[1]["exit_1"] == 0.0


def test_csv_holds_the_rows(tmp_path: Path) -> None:
    results = evaluation("runs/快，速")
    path = tmp_path / "new" / "speeds.csv"
    tables.write_csv(path, results)
    with path.open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert len(read) == 11
    for row, written in zip(tables.speed_rows(results), read, strict=True):
        assert written == {key: "" if value is None else str(value) for key, value in row.items()}


def test_table_fits_a_terminal_and_shows_every_speed() -> None:
    lines = rendered(evaluation()).splitlines()
    text = "\n".join(lines)
    assert "runs/fast on reviews, test (1200 texts)" in text
    assert "…\n" not in text and "layer 1, 3, 5, 7, 9, 11, 12" in text
    full = next(line for line in lines if line.strip().startswith("full"))
    assert full.split() == ["full", "0.925", "4,030", "1.00×", "31.0", "1.00", "······█"]
    half = next(line for line in lines if line.strip().startswith("0.5 "))
    given = evaluation()["speeds"][5]
    assert half.split()[1:4] == [
        f"{given['metric']:.3f}",
        "{:.3f}…{:.3f}".format(*given["metric_interval"]),
        f"{given['macs'] / 1e6:,.0f}",
    ]
    assert max(map(len, lines)) <= 80


def test_bars_grow_with_the_share_and_only_nothing_looks_empty() -> None:
    results = evaluation()
    results["speeds"] = results["speeds"][:1]
    results["speeds"][0]["exits"] = {"1": 0.0, "3": 0.001, "5": 0.25, "7": 0.5, "12": 0.249}
    assert "·▁▂▄▂" in rendered(results)


def test_table_of_what_was_not_timed() -> None:
    lines = rendered(untimed(evaluation())).splitlines()
    assert next(line for line in lines if line.strip().startswith("full")).split()[-3:] == [
        "–",
        "–",
        "······█",
    ]


def test_names_in_brackets_are_not_markup() -> None:
    assert "runs/[bold]fast on" in rendered(evaluation("runs/[bold]fast"))


@pytest.mark.parametrize("key", ["task", "full_model", "speeds", "model", "data"])
def test_missing_parts_are_named(key: str, tmp_path: Path) -> None:
    results = evaluation()
    del results[key]
    for use in (tables.speed_table, lambda r: plots.plot_speed_curve([r], tmp_path / "curve.png")):
        with pytest.raises(InputError, match=f"'{key}'"):
            use(results)
    assert not list(tmp_path.iterdir())


def inked(path: Path) -> np.ndarray:
    """(height, width) True where a PNG is not white."""
    return np.any(imread(path)[..., :3] < 0.99, axis=-1)


def test_speed_curve_draws_every_result_in_its_colour(tmp_path: Path) -> None:
    path = tmp_path / "curve.png"
    plots.plot_speed_curve([evaluation(), evaluation("runs/other", 0.9)], path)
    pixels = (imread(path)[..., :3] * 255).round().astype(int)
    assert pixels.shape == (720, 1650, 3)
    for colour, drawn in (("#0072B2", True), ("#D55E00", True), ("#009E73", False)):
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        matches = (pixels == rgb).all(axis=-1)
        for half in (matches[:, :825], matches[:, 825:]):
            assert (half.sum() > 200) is np.True_ if drawn else half.sum() == 0


def test_speed_curve_without_times_has_one_panel(tmp_path: Path) -> None:
    plots.plot_speed_curve([untimed(evaluation("runs/$cheap_$"))], tmp_path / "curve.png")
    assert inked(tmp_path / "curve.png").shape == (720, 825)


def test_labels_overlap_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    plots.plot_speed_curve([evaluation(), evaluation("runs/other", 0.921)], tmp_path / "curve.png")
    for panel in figures[0].axes:
        extents = [text.get_window_extent() for text in panel.texts]
        assert len(extents) >= 12
        for index, extent in enumerate(extents):
            assert extent.count_overlaps(extents[:index]) == 0
            for line in panel.get_lines():
                if line.get_marker() != "None":
                    for x, y in panel.transData.transform(line.get_xydata()):
                        assert not extent.contains(x, y)


def test_exit_shares_stack_to_the_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figures = []
    save = plots.save_figure
    monkeypatch.setattr(
        plots, "save_figure", lambda figure, path: (figures.append(figure), save(figure, path))
    )
    results = evaluation()
    plots.plot_exit_shares(results, tmp_path / "shares.png")
    assert inked(tmp_path / "shares.png").mean() > 0.3
    (panel,) = figures[0].axes
    heights = np.array([[bar.get_height() for bar in container] for container in panel.containers])
    assert heights.shape == (7, 10)
    np.testing.assert_allclose(heights.sum(axis=0), 100)
    expected = [100 * results["speeds"][5]["exits"][str(layer)] for layer in EXITS]
    np.testing.assert_allclose(heights[:, 5], expected)


def test_html_is_self_contained_and_tells_the_exits(tmp_path: Path) -> None:
    path = tmp_path / "curve.html"
    plots.plot_speed_curve_html([evaluation(), evaluation("runs/other", 0.9)], path)
    # plotly escapes slashes and angle brackets, so that no name ends a script.
    page = path.read_text(encoding="utf-8").replace(r"\u002f", "/")
    assert "<script src=" not in page
    share = evaluation()["speeds"][5]["exits"]["3"]
    assert "speed 0.5 (entropy)" in page and f"3: {share:.1%}" in page and "runs/other" in page
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["curve.html"]


def test_results_that_cannot_share_a_plot_are_refused(tmp_path: Path) -> None:
    other = evaluation()
    other["task"]["metric"] = "f1"
    with pytest.raises(InputError, match="accuracy, f1"):
        plots.plot_speed_curve([evaluation(), other], tmp_path / "curve.png")
    with pytest.raises(InputError, match="at least one"):
        plots.plot_speed_curve_html([], tmp_path / "curve.html")


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", absent)
    for draw, library in (
        (lambda: plots.plot_speed_curve([evaluation()], tmp_path / "a.png"), "matplotlib"),
        (lambda: plots.plot_exit_shares(evaluation(), tmp_path / "b.png"), "matplotlib"),
        (lambda: plots.plot_speed_curve_html([evaluation()], tmp_path / "c.html"), "plotly"),
    ):
        with pytest.raises(InputError, match=rf"{library}.*pip install -e '\.\[report\]'"):
            draw()
