"""Tables (Markdown) and plots (PNG) of `exit_study.py` results, one study a data set, seeds pooled.

python benchmarks/summarise_study.py --output docs/results/exits --title "clinc150" study-1.json study-2.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from alembert.common.files import read_json, replacing, write_text

mpl.use("Agg")
import matplotlib.pyplot as plt

SPEED_UPS = ("1.5", "2.0", "3.0", "4.0", "6.0", "8.0")
COLOURS = (
    "#0072B2",
    "#56B4E9",
    "#D55E00",
    "#E69F00",
    "#CC79A7",
    "#009E73",
    "#999999",
    "#000000",
    "#882255",
    "#44AA99",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("studies", nargs="+", type=Path)
    parser.add_argument(
        "--output", type=Path, required=True, help="path without ending: .md and .png are added"
    )
    parser.add_argument("--title", required=True)
    arguments = parser.parse_args()
    studies = [read_json(path) for path in arguments.studies]
    parts = [
        f"# {arguments.title}",
        describe(studies),
        "Cells: mean ± standard deviation (number of seeds).",
    ]
    parts += [speedup_table(studies, placement) for placement in placements(studies[0])]
    parts.append(exit_table(studies))
    parts.append(speeds_table(studies))
    plot(studies, arguments.title, arguments.output.with_suffix(".png"))
    parts.append(
        f"![accuracy against speed-up, {arguments.title}]({arguments.output.with_suffix('.png').name})"
    )
    if "top_k" in studies[0]:
        parts.append(top_k_tables(studies))
        plot_top_k(
            studies[0], arguments.title, arguments.output.with_name(arguments.output.name + "-top-k.png")
        )
        parts.append(f"![uncertainty against K]({arguments.output.name}-top-k.png)")
    write_text(arguments.output.with_suffix(".md"), "\n\n".join(parts) + "\n")


def describe(studies: list[dict[str, Any]]) -> str:
    arguments, task = studies[0]["arguments"], studies[0]["task"]
    rows = ", ".join(f"{split} {facts['rows']}" for split, facts in task["splits"].items())
    seeds = ", ".join(study["arguments"]["seed"] for study in studies)
    full = [study["results"][0]["exit_scores"][str(study["num_layers"])] for study in studies]
    return (
        f"Rows: {rows}; scored on {task['evaluated_split']}. {task['num_labels']} labels, metric {task['metrics'][0]}. "
        f"Seeds {seeds}; {arguments['epochs']} epochs at batch {arguments['batch_size']}, learning rate "
        f"{arguments['learning_rate']}, at most {arguments['max_length']} tokens. "
        f"Full model (teacher): **{spread(full)}**."
    )


def placements(study: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(entry["placement"] for entry in study["results"]))


def banks(studies: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(entry["bank"] for study in studies for entry in study["results"]))


def find(studies: list[dict[str, Any]], bank: str, placement: str) -> list[dict[str, Any]]:
    """The entries of a bank and placement, one for each study that has the bank."""
    return [
        e for study in studies for e in study["results"] if (e["bank"], e["placement"]) == (bank, placement)
    ]


def speedup_table(studies: list[dict[str, Any]], placement: str) -> str:
    lines = [
        f"## Score at equal MACs, exits: {placement}",
        "",
        "| exits taught by | " + " | ".join(f"{float(s):g}×" for s in SPEED_UPS) + " |",
        "|---|" + "---|" * len(SPEED_UPS),
    ]
    for bank in banks(studies):
        cells = []
        for wanted in SPEED_UPS:
            values = [entry["at_speedup"][wanted] for entry in find(studies, bank, placement)]
            cells.append("–" if any(value is None for value in values) else spread(values))
        lines.append(f"| {escaped(bank)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def exit_table(studies: list[dict[str, Any]]) -> str:
    layers = list(find(studies, banks(studies)[0], "all")[0]["exit_scores"])
    lines = [
        "## Score of every exit on all texts",
        "",
        "| exits taught by | " + " | ".join(layers) + " |",
        "|---|" + "---|" * len(layers),
    ]
    for bank in banks(studies):
        cells = [
            f"{100 * np.mean([entry['exit_scores'][layer] for entry in find(studies, bank, 'all')]):.1f}"
            for layer in layers
        ]
        lines.append(f"| {escaped(bank)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def speeds_table(studies: list[dict[str, Any]]) -> str:
    """MS-BERT's Table 1 layout for its printed form, FastBERT and our default, exits after every second layer."""
    chosen = ("fastbert", "ms-bert, histogram, paper", "ms-bert, sorted, inverse")
    lines = [
        "## At every speed, exits: every 2 (score, speed-up in MACs)",
        "",
        "| speed | " + " | ".join(chosen) + " |",
        "|---|" + "---|" * len(chosen),
    ]
    for index, point in enumerate(find(studies, chosen[0], "every 2")[0]["speeds"]):
        cells = []
        for bank in chosen:
            points = [entry["speeds"][index] for entry in find(studies, bank, "every 2")]
            metric, speedup = (float(np.mean([p[key] for p in points])) for key in ("metric", "speedup"))
            cells.append(f"{100 * metric:.1f}, {speedup:.2f}×")
        lines.append(f"| {point['speed']:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def top_k_tables(studies: list[dict[str, Any]]) -> str:
    lines = []
    for renormalise, title in ((False, "as printed (Eq. 12)"), (True, "renormalised")):
        entries = [e for e in studies[0]["top_k"] if e["renormalise"] is renormalise]
        layers = list(entries[0]["mean_uncertainty"])
        lines += [f"## Top-K {title}: mean uncertainty at each exit, and what speeds 0.2, 0.5, 0.8 give", ""]
        lines.append("| exits taught by | K | " + " | ".join(layers) + " | 0.2 | 0.5 | 0.8 |")
        lines.append("|---|---|" + "---|" * (len(layers) + 3))
        for entry in entries:
            uncertainty = [f"{entry['mean_uncertainty'][layer]:.2f}" for layer in layers]
            points = [entry["speeds"][index] for index in (2, 5, 8)]
            cells = [f"{100 * point['metric']:.1f}, {point['speedup']:.2f}×" for point in points]
            lines.append(f"| {entry['bank']} | {entry['k']} | " + " | ".join(uncertainty + cells) + " |")
        lines.append("")
    return "\n".join(lines).rstrip()


def plot(studies: list[dict[str, Any]], title: str, path: Path) -> None:
    names = placements(studies[0])
    figure, axes = plt.subplots(
        1, len(names), figsize=(5 * len(names), 5.2), sharey=True, layout="constrained"
    )
    for panel, placement in zip(axes, names, strict=True):
        for bank, colour in zip(banks(studies), COLOURS, strict=False):
            values = {
                float(s): [entry["at_speedup"][s] for entry in find(studies, bank, placement)]
                for s in SPEED_UPS
            }
            known = {s: v for s, v in values.items() if None not in v}
            means = [100 * np.mean(v) for v in known.values()]
            panel.plot(list(known), means, marker="o", markersize=4, color=colour, label=bank, linewidth=1.6)
        full = [study["results"][0]["exit_scores"][str(study["num_layers"])] for study in studies]
        panel.axhline(100 * np.mean(full), color="#666666", linestyle=(0, (4, 4)), linewidth=1)
        panel.set_title(f"exits: {placement}")
        panel.set_xlabel("speed-up in MACs (×)")
        panel.set_xlim(1, 8.4)
        panel.grid(alpha=0.25)
    axes[0].set_ylabel(f"{studies[0]['task']['metrics'][0]} (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(f"{title}: score at equal MACs (dashed: full model)")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)


def plot_top_k(study: dict[str, Any], title: str, path: Path) -> None:
    """MS-BERT's Fig. 4: uncertainty of every exit against K."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    for panel, renormalise in zip(axes, (False, True), strict=True):
        entries = [
            e
            for e in study["top_k"]
            if e["renormalise"] is renormalise and e["bank"] == "ms-bert, sorted, inverse"
        ]
        layers = list(entries[0]["mean_uncertainty"])
        for shade, layer in zip(np.linspace(0.15, 0.9, len(layers)), layers, strict=True):
            panel.plot(
                [e["k"] for e in entries],
                [e["mean_uncertainty"][layer] for e in entries],
                marker="o",
                markersize=4,
                color=mpl.colormaps["viridis"](shade),
                label=f"exit {layer}",
            )
        panel.set_xscale("log")
        panel.set_xlabel("K")
        panel.set_title("renormalised" if renormalise else "as printed (Eq. 12)")
        panel.grid(alpha=0.25)
    axes[0].set_ylabel("mean uncertainty")
    axes[0].legend(fontsize=8)
    figure.suptitle(f"{title}: uncertainty against K, exits of ms-bert (sorted, inverse)")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)


def escaped(bank: str) -> str:
    """A bank's name inside a Markdown table."""
    return bank.replace("|", r"\|")


def spread(values: list[float]) -> str:
    mean = 100 * float(np.mean(values))
    return (
        f"{mean:.1f}"
        if len(values) == 1
        else f"{mean:.1f} ± {100 * float(np.std(values, ddof=1)):.1f} ({len(values)})"
    )


if __name__ == "__main__":
    main()
