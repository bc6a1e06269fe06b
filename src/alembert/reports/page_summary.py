"""The report as Markdown, with its pictures beside it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from alembert.common.files import write_text
from alembert.reports.page import wording
from alembert.reports.page.rendering import check_report, flat, model_facts, shown
from alembert.reports.page_figures import SHOWN_SPEEDS, transport_picture, write_figures

Report = Mapping[str, Any]

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#+!|~$&@^=])")
_LIST = re.compile(r"^(\d*)([-.)])(?=[-\s]|$)")
_LINK = re.compile(r"(?i)(https?:|ftp:|mailto:|xmpp:|www)(/|\.)")
_KINDS = {
    "early_right": "Leave early, rightly",
    "late": "Leave late",
    "early_wrong": "Leave early, wrongly, where the full model is right",
}


def write_summary(folder: Path, report: Report) -> list[str]:
    """Writes report.md and its PNG files, each whole or not at all, and returns the names of all.

    Raises:
        InputError: matplotlib is not installed, or a part of the report is missing.
    """
    check_report(report)
    figures = write_figures(report, folder)
    write_text(folder / "report.md", markdown(report, figures))
    return ["report.md", *figures.values()]


def markdown(report: Report, figures: Mapping[str, str]) -> str:
    """The report in Markdown; `figures` are names of pictures beside it, as `write_figures` gives them.

    Texts and names of labels come from the data, so everything in them that Markdown or HTML would act on is escaped.
    """
    return "\n".join(_lines(report, figures)) + "\n"


def _lines(report: Report, figures: Mapping[str, str]) -> Iterator[str]:
    yield from (f"# {escaped(wording.headline(report))}", "")
    yield from (escaped(report["title"]), "")
    sentences, price = wording.verdict_sentences(report), report["price_per_hour"]
    if rates := wording.verdict_rates(report):
        costs = (wording.cost(rate, price) for rate in rates)
        sentences.append(wording.COSTS % (*costs, wording.price(price)))
    for sentence in (*sentences, wording.guarantee_sentence(report)):
        yield from (escaped(sentence), "")
    metric = wording.metric_name(report).capitalize()
    yield from ("## All candidates", "")
    yield from _picture(figures, "candidates", f"{metric} of every candidate against what it costs")
    yield from _candidates(report)
    if any(model["exits"] is not None for model in report["models"]):
        yield from ("## Speeds", "")
        yield from _picture(figures, "speeds", f"{metric} against operations, by speed")
    for model in report["models"]:
        yield from _model(report, model, figures)
    yield from _compression(report.get("compression"))
    yield from _provenance(report)


def _candidates(report: Report) -> Iterator[str]:
    metric, price = wording.metric_name(report), report["price_per_hour"]
    heading = (
        *("model", "run by", "speed", metric, "95% interval", "texts/s", "ratio", "cost per million"),
        *("FLOPs", "p50 ms", "MB", "front"),
    )
    rows = []
    for row in report["candidates"]:
        low, high = row["metric_interval"]
        rows.append(
            (
                row["name"],
                wording.engine(row),
                "–" if row["speed"] is None else f"{row['speed']:g}",
                wording.points(row["metric"]),
                f"{wording.points(low)}–{wording.points(high)}",
                wording.number(row["texts_per_second"]),
                wording.times(row["ratio_to_baseline"]),
                wording.cost(row["texts_per_second"], price),
                wording.operations(row["macs"]),
                wording.number(row["p50_ms"]),
                wording.number(row["peak_memory_mb"]),
                "yes" if row["pareto"]["texts_per_second"] else "",
            )
        )
    yield from _table(heading, rows)
    timing = report["benchmark"]["timing"]
    yield from (
        escaped(
            f"The first row is the baseline. Time is that of {timing['rows']} texts in {timing['rounds']} rounds on "
            f"{wording.machine(report['machine'])}. Cost is at {wording.price(price)} per "
            f"machine-hour; front: on the Pareto front of {metric} and throughput."
        ),
        "",
    )


def _model(report: Report, model: Mapping[str, Any], figures: Mapping[str, str]) -> Iterator[str]:
    name, exits = model["name"], model["exits"]
    yield from (f"## {escaped(name)}", "")
    if exits is not None:
        yield from _speeds(report, model)
        yield from _picture(
            figures, f"exits {name}", f"Share of texts of {name} that leave at each exit, by speed"
        )
        yield from _classes(exits)
    yield from _picture(
        figures, f"trust {name}", f"Confidence, accuracy and uncertainty of the exits of {name}"
    )
    confusions = model["confusions"]
    if confusions is not None and confusions["pairs"]:
        yield from (f"Confusions that suffer most, against {escaped(confusions['against'])}:", "")
        keys = ("label", "answer", "count", "reference_count", "rows")
        yield from _table(
            ("label", "answered", "texts", "before", "of"),
            [[pair[key] for key in keys] for pair in confusions["pairs"]],
        )
    if exits is not None:
        yield from _examples(exits)
    yield from _picture(figures, f"training {name}", f"Terms of the loss in the training of {name}")
    for run in model["run"].get("transport") or ():
        yield from _picture(
            figures, transport_picture(model, run), f"From which teacher layers the layers of {name} learned"
        )


def _speeds(report: Report, model: Mapping[str, Any]) -> Iterator[str]:
    exits, price = model["exits"], report["price_per_hour"]
    curve = exits["curve"]
    speeds = sorted({0.0, *SHOWN_SPEEDS, exits["default_speed"]} & set(exits["speeds"]))
    rows = []
    for speed in speeds:
        place = exits["speeds"].index(speed)
        rate = exits["texts_per_second"][place] if exits["texts_per_second"] else None
        rows.append(
            (
                f"{speed:g}"
                + (f" ({wording.speed_origin(model)})" if speed == exits["default_speed"] else ""),
                wording.points(curve["metric"][place]),
                wording.signed_points(curve["metric"][place] - curve["metric"][0]),
                wording.number(rate) + ("" if speed in exits["measured_speeds"] or rate is None else " est."),
                wording.cost(rate, price),
                wording.times(curve["speedup"][place]),
                f"{curve['changed'][place]:.1%}",
                f"{1 - curve['counts'][place][-1] / report['task']['rows']:.1%}",
            )
        )
    heading = ("speed", wording.metric_name(report), "change", "texts/s", "cost per million")
    yield from _table((*heading, "fewer operations than at speed 0", "answers changed", "leave early"), rows)


def _classes(exits: Mapping[str, Any]) -> Iterator[str]:
    classes = exits["classes"]
    if classes is None:
        return
    place = exits["speeds"].index(exits["example_speed"])
    yield from (f"By class, at speed {exits['example_speed']:g}:", "")
    rows = [
        (
            label,
            size,
            f"{classes['right'][place][index] / size:.1%}",
            f"{1 - classes['counts'][place][index][-1] / size:.1%}",
        )
        for index, (label, size) in enumerate(zip(classes["labels"], classes["rows"], strict=True))
    ]
    yield from _table(("class", "texts", "right", "leave early"), rows)


def _examples(exits: Mapping[str, Any]) -> Iterator[str]:
    for kind, title in _KINDS.items():
        found = exits["examples"][kind]
        if not found:
            continue
        yield from (f"### {title}", "")
        for example in found:
            answers = "; ".join(
                f"{answer['layer']}: {answer['answer']}"
                + ("" if answer["probability"] is None else f" {answer['probability']:.2f}")
                for answer in example["answers"]
            )
            text = " / ".join(example["text"])
            yield f"- {escaped(text)}  "
            yield (
                f"  label {escaped(example['label'])}, left after layer {example['exit']}; exits: {escaped(answers)}"
            )
        yield ""


def _compression(part: Mapping[str, Any] | None) -> Iterator[str]:
    if not part:
        return
    yield from ("## Compression", "")
    if part.get("verdict"):
        yield from (escaped(shown(part["verdict"])), "")
    for name in ("candidates", "steps"):
        rows = [row if isinstance(row, Mapping) else {"step": row} for row in part.get(name) or ()]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        if rows:
            yield from (f"### {name.capitalize()}", "")
            yield from _table(columns, [[shown(row.get(column, "")) for column in columns] for row in rows])


def _provenance(report: Report) -> Iterator[str]:
    task, timed = report["task"], report["benchmark"]
    yield from ("## Configuration and provenance", "")
    rows: list[tuple[str, str]] = [
        ("made", f"{report['created']}, Alembert {report['alembert_version']}"),
        ("data", f"{task['name']}, {task['split']}: {task['rows']:,} rows"),
        ("rows’ SHA-256", task["rows_sha256"]),
        ("problem", f"{task['problem_type'].replace('_', ' ')}, {len(task['labels'])} labels"),
        ("time measured", f"{timed['created'] or '–'}{'' if timed['measured_here'] else ' (given)'}"),
        *((f"machine: {name}", shown(value)) for name, value in report["machine"].items()),
    ]
    yield from _table(("", ""), rows)
    for model in report["models"]:
        run = model["run"]
        parts = [*model_facts(model), *flat({"finished": run["finished"], "versions": run["versions"]})]
        parts += [*flat(run["configuration"]), *flat({"export": run["export"]})]
        parts += [(f"SHA-256 {name}", value) for name, value in run["files"].items()]
        yield from (f"### {escaped(model['name'])}", "")
        yield from _table(("", ""), [(name, shown(value)) for name, value in parts if name])


def _picture(figures: Mapping[str, str], what: str, alternative: str) -> Iterator[str]:
    if what in figures:
        yield from (f"![{escaped(alternative)}]({figures[what]})", "")


def _table(heading: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    yield "| " + " | ".join(escaped(str(cell)) for cell in heading) + " |"
    yield "|" + "---|" * len(heading)
    for row in rows:
        yield "| " + " | ".join(escaped(str(cell)) for cell in row) + " |"
    yield ""


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, in one line; also at the beginning of one."""
    plain = _SPECIAL.sub(r"\\\1", " ".join(str(text).split()))
    return _LINK.sub(r"\1&#8203;\2", _LIST.sub(r"\1\\\2", plain))
