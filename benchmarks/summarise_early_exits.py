"""Tables and a plot of studies made by `benchmarks/early_exit_study.py`.

python benchmarks/summarise_early_exits.py --output docs/results/early-exits-tables docs/results/early-exits-*.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from alembert.common.files import read_json, write_text

mpl.use("Agg")
from matplotlib import pyplot as plt

OURS = "alembert"
"""The method that the others are compared with, unless another one is named."""
DRAWN = (
    "fastbert", "ms-bert, paper", "deebert", "deebert, mean heads", "berxit, mean heads", "pabee, mean heads",
    "alembert, two budgets", "alembert, all layers", "alembert"
)  # fmt: skip


def main(command_line: Sequence[str] | None = None) -> None:
    """Writes OUTPUT.md and OUTPUT.png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("studies", nargs="+", type=Path)
    parser.add_argument("--output", required=True, type=Path, help="without an ending")
    parser.add_argument("--title", default="Early exits, in tables")
    parser.add_argument("--ours", default=OURS, help="the row that the others are compared with")
    arguments = parser.parse_args(command_line)
    studies = [read_json(path) for path in arguments.studies]
    text = f"# {arguments.title}\n\n" + "\n".join(table(study, arguments.ours) for study in studies)
    write_text(arguments.output.with_suffix(".md"), text.rstrip() + "\n")
    plot(studies, arguments.output.with_suffix(".png"), arguments.ours)


def table(study: dict[str, Any], ours: str = OURS) -> str:
    """A set's section: how each method did over its seeds, and by how much ours differs from it."""
    teacher = [metrics["test"]["accuracy"] for metrics in study["teacher"].values()]
    speedups = list(next(iter(next(iter(study["results"].values())).values()))["test"]["at_speedup"])
    rows, settings = study["rows"], study["settings"]
    lines = [
        f"## {study['task']}",
        "",
        f"{settings['model']}; {rows['train']:,} train, {rows['dev']:,} dev, {rows['test']:,} test rows; "
        f"{settings['training']['epochs']:g} epochs, at most {settings['training']['max_length']} tokens. "
        f"Teacher: **{spread(teacher)}** ({len(teacher)} seed{'s' * (len(teacher) > 1)}).",
        "",
        "| method | seeds | area 2×–12× | 95% interval | "
        + " | ".join(f"{float(speedup):g}×" for speedup in speedups)
        + f" | {ours} − it |",
        "|---" * (5 + len(speedups)) + "|",
    ]
    for name, seeds in study["results"].items():
        tests = [result["test"] for result in seeds.values()]
        low, high = np.percentile(np.mean([test["area_samples"] for test in tests], axis=0), (2.5, 97.5))
        cells = [
            name,
            str(len(tests)),
            f"**{spread([test['area'] for test in tests])}**",
            f"{100 * low:.1f} – {100 * high:.1f}",
            *(
                f"{100 * np.mean([test['at_speedup'][speedup] for test in tests]):.1f}"
                for speedup in speedups
            ),
            difference(study["results"].get(ours, {}), seeds) if name != ours else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation, in points."""
    return f"{100 * np.mean(values):.1f}" + (
        f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    )


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Mean difference of the areas ± its standard deviation over common seeds, and its 95% interval.

    The interval is over common resamples of the test rows.
    """
    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        return "–"
    found = [ours[seed]["test"]["area"] - theirs[seed]["test"]["area"] for seed in seeds]
    samples = [
        np.subtract(ours[seed]["test"]["area_samples"], theirs[seed]["test"]["area_samples"])
        for seed in seeds
    ]
    low, high = np.percentile(np.mean(samples, axis=0), (2.5, 97.5))
    scatter = f" ± {100 * np.std(found, ddof=1):.1f}" if len(found) > 1 else ""
    return f"{100 * np.mean(found):+.1f}{scatter} ({100 * low:+.1f} to {100 * high:+.1f})"


def plot(studies: Sequence[dict[str, Any]], path: Path, ours: str = OURS) -> None:
    """Accuracy against speed-up in MACs, a panel a set; bands are one standard deviation over seeds."""
    figure, panels = plt.subplots(
        1, len(studies), figsize=(4.2 * len(studies), 4), squeeze=False, layout="constrained"
    )
    for axes, study in zip(panels[0], studies, strict=True):
        teacher = np.mean([metrics["test"]["accuracy"] for metrics in study["teacher"].values()])
        axes.axhline(100 * teacher, color="0.5", linestyle=":", label="teacher")
        for number, name in enumerate(DRAWN):
            if name not in study["results"]:
                continue
            results = [result["test"]["at_speedup"] for result in study["results"][name].values()]
            speedups = [float(speedup) for speedup in results[0]]
            values = 100 * np.array([list(result.values()) for result in results])
            style = {"color": "black", "linewidth": 2.5} if name == ours else {"color": f"C{number}"}
            axes.plot(speedups, values.mean(0), marker="o", markersize=4, label=name, **style)
            if len(values) > 1:
                low, high = values.mean(0) - values.std(0, ddof=1), values.mean(0) + values.std(0, ddof=1)
                axes.fill_between(speedups, low, high, alpha=0.15, color=style["color"], linewidth=0)
        axes.set(title=study["task"], xlabel="MACs of the teacher / MACs", xscale="log")
        axes.set_xticks(speedups, [f"{speedup:g}×" for speedup in speedups])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("accuracy on test (%)")
    handles = {}
    for axes in panels[0]:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
