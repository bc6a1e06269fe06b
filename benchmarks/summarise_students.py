"""Tables (Markdown) and a plot (PNG) of `student_study.py` results, one file a task.

Students are compared with the same student trained on the labels alone, at whichever of its learning rates had the
better dev score, seed by seed.

python benchmarks/summarise_students.py --output docs/results/students-tables docs/results/students-*.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from alembert.common.files import read_json, replacing, write_text

mpl.use("Agg")
import matplotlib.pyplot as plt

BASELINES = ("labels alone", "labels alone, slower")
MARKERS = "osD^v"


def main(command_line: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("studies", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="without ending: .md and .png are added")
    arguments = parser.parse_args(command_line)
    studies = {path.stem.removeprefix("students-"): read_json(path) for path in arguments.studies}
    parts = [overview(studies), *(section(name, study) for name, study in studies.items())]
    plot(studies, arguments.output.with_suffix(".png"))
    picture = (
        f"![difference from the student trained on labels alone]({arguments.output.with_suffix('.png').name})"
    )
    title = "# Students, in tables"
    write_text(arguments.output.with_suffix(".md"), "\n\n".join([title, *parts, picture]) + "\n")


ORDER = (
    *BASELINES, "labels alone, no general stage", "kd", "distilbert", "pkd", "minilm-v2", "tinybert",
    "tinybert, no general stage", "tinybert, augmented", "bert-emd", "bert-emd, beta 1", "lrc-bert",
)  # fmt: skip


def overview(studies: dict[str, Any]) -> str:
    """All rows of all studies in one table: mean ± standard deviation over seeds, in per cent."""
    rows = {row for study in studies.values() for row in study["students"]}
    lines = ["| | " + " | ".join(studies) + " |", "|---" * (len(studies) + 1) + "|"]
    metrics = [f"{study['metric']}, {main_split(study)}" for study in studies.values()]
    lines.append("| metric, split | " + " | ".join(metrics) + " |")
    teachers = [study["teacher"][main_split(study)][study["metric"]] for study in studies.values()]
    lines.append("| teacher | " + " | ".join(f"{100 * score:.1f}" for score in teachers) + " |")
    for row in sorted(rows, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name)):
        cells = [
            mean_and_spread(seed_scores(study, row)) if row in study["students"] else ""
            for study in studies.values()
        ]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(["## All", "", *lines])


def mean_and_spread(scores: list[float]) -> str:
    spread = f" ± {np.std(scores, ddof=1):.1f}" if len(scores) > 1 else ""
    return f"{np.mean(scores):.1f}{spread}"


def main_split(study: dict[str, Any]) -> str:
    """The split that the comparison is about: test where it has labels."""
    return "test" if "test" in study["teacher"] else "dev"


def seed_scores(study: dict[str, Any], row: str) -> list[float]:
    """The main metric of every seed, in per cent."""
    split, metric = main_split(study), study["metric"]
    return [100 * seed[split][metric] for seed in study["students"][row].values()]


def baseline_scores(study: dict[str, Any]) -> list[float]:
    """The baseline's main metric of every seed, in per cent."""
    split, metric = main_split(study), study["metric"]
    rows = [study["students"][row] for row in BASELINES if row in study["students"]]
    seeds = sorted({seed for row in rows for seed in row})
    best = [
        max((row[seed] for row in rows if seed in row), key=lambda run: run["dev"][metric]) for seed in seeds
    ]
    return [100 * run[split][metric] for run in best]


def section(name: str, study: dict[str, Any]) -> str:
    split, metric = main_split(study), study["metric"]
    size = next(iter(next(iter(study["students"].values())).values()))["size"]
    shaped = any("no general" in row for row in study["students"])
    settings = ", ".join(
        f"{key} {value}"
        for key, value in study["settings"].items()
        if value is not None and (key != "shape" or shaped)
    )
    lines = [
        f"## {name}: {metric} on {split} ({study['rows'][split]} rows)",
        f"Student: {size['layers']} layers × {size['hidden_size']}, {size['parameters'] / 1e6:.1f}M parameters. "
        f"Train: {study['rows']['train']} rows; {settings}. Cells: mean ± standard deviation over seeds.",
        f"| | {metric} | seeds | 95% bootstrap interval, first seed | against labels alone |",
        "|---|---|---|---|---|",
        row_of("teacher", study["teacher"][split], [100 * study["teacher"][split][metric]], metric, None),
    ]
    baseline = baseline_scores(study)
    for row, seeds in study["students"].items():
        first = seeds[min(seeds, key=int)][split]
        lines.append(
            row_of(row, first, seed_scores(study, row), metric, None if row in BASELINES else baseline)
        )
    return "\n".join([lines[0], "", lines[1], "", *lines[2:]])


def row_of(
    name: str, first: dict[str, Any], scores: list[float], metric: str, baseline: list[float] | None
) -> str:
    low, high = (100 * bound for bound in first["interval"])
    difference = "" if baseline is None else f"{np.mean(scores) - np.mean(baseline):+.1f}"
    return f"| {name} | {mean_and_spread(scores)} | {len(scores)} | {low:.1f} – {high:.1f} | {difference} |"


def plot(studies: dict[str, Any], path: Path) -> None:
    rows = list(dict.fromkeys(row for study in studies.values() for row in study["students"]))
    rows = [row for row in rows if row not in BASELINES]
    figure, axes = plt.subplots(figsize=(8, 0.45 * len(rows) + 1.8), layout="constrained")
    for index, (name, study) in enumerate(studies.items()):
        baseline = np.mean(baseline_scores(study))
        offset = (index - (len(studies) - 1) / 2) * 0.8 / len(studies)
        label = name
        for position, row in enumerate(rows):
            if row in study["students"]:
                scores = np.asarray(seed_scores(study, row)) - baseline
                heights = np.full(len(scores), position + offset)
                axes.plot(
                    scores,
                    heights,
                    MARKERS[index % 5],
                    color=f"C{index}",
                    alpha=0.8,
                    label=label,
                    markersize=5,
                )
                label = "_"
    axes.axvline(0, color="grey", linewidth=1)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    for between in range(1, len(rows)):
        axes.axhline(between - 0.5, color="grey", linewidth=0.3)
    axes.set_xlabel("points against the same student trained on labels alone (a mark a seed)")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower right")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
