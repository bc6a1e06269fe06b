"""What an exported model costs to start, to keep in memory, to stream a long file through, and what regrouping gains.

    python benchmarks/deployment.py EXPORTED --data FOLDER --rows 1000000 --speed 0.5 --output deployment.json

- Start: fresh processes import Alembert, open the folder and answer one text; their clocks start after the
  interpreter has started. Memory is read after opening and after the first answer: all that is resident, and the
  private part of it, which leaves out the libraries' code that a process shares with others. What a process has that
  loads the same libraries and no model is measured beside it.
- Streaming: `alembert predict` reads files of a tenth of `--rows` and of all rows, the data's texts over and over, and
  writes its answers; the peak memory of both runs is what shows whether it grows with the file.
- Regrouping: the data's texts in a random order, answered with and without it, in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alembert.benchmarks.evaluation import task_texts
from alembert.benchmarks.timing import interleave, machine_description, ratio
from alembert.cli.evaluate import parse_speeds
from alembert.cli.options import load_evaluation_task, quiet_libraries
from alembert.common.errors import InputError
from alembert.common.files import write_json
from alembert.runtime.adaptive import AdaptiveClassifier
from alembert.runtime.manifest import Manifest

START = """
import json, sys, time
started = time.perf_counter()
def memory():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return [int(lines[name].split()[0]) / 1000 for name in ("VmRSS", "RssAnon")]
before, _ = memory()
from alembert import AdaptiveClassifier
imported = time.perf_counter()
classifier = AdaptiveClassifier.from_pretrained(sys.argv[1])
opened, (opened_mb, opened_private_mb) = time.perf_counter(), memory()
classifier.predict(sys.argv[2])
answered, (answered_mb, answered_private_mb) = time.perf_counter(), memory()
print(json.dumps({
    "import_s": imported - started, "open_s": opened - imported, "first_answer_s": answered - opened,
    "total_s": answered - started, "interpreter_mb": before, "opened_mb": opened_mb, "answered_mb": answered_mb,
    "opened_private_mb": opened_private_mb, "answered_private_mb": answered_private_mb,
    "torch_is_loaded": "torch" in sys.modules, "modules": ",".join(sorted(sys.modules)),
}))
"""
LIBRARIES = """
import sys
modules = sys.argv[1].split(",")
for module in modules:
    __import__(module)
lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(*(int(lines[name].split()[0]) / 1000 for name in ("VmRSS", "RssAnon")))
"""
# Linux counts the starter's own peak as the new program's, so the peak is read inside the program.
STREAM = """
import json, sys, time
from alembert.cli import main
started = time.perf_counter()
try:
    main()
finally:
    peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1000
    taken = time.perf_counter() - started
    open(sys.argv[sys.argv.index("--output") + 1] + ".json", "w").write(json.dumps({"peak_mb": peak, "s": taken}))
"""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints and returns the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("exported")
    parser.add_argument("--data", required=True)
    parser.add_argument("--split")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--starts", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--speed", default="0.5")
    parser.add_argument("--output")
    given = parser.parse_args(arguments)
    quiet_libraries()
    classifier = AdaptiveClassifier.from_pretrained(given.exported)
    task, split, _ = load_evaluation_task(given.data, given.exported, classifier, given.split)
    texts: Any = task_texts(task, split)
    if task.is_pair:
        raise InputError(f"{given.data}: pairs of texts; this program streams files of single texts")
    files = list(Manifest.read(given.exported).files)
    speeds = parse_speeds(given.speed)
    results: dict[str, Any] = {
        "machine": machine_description(),
        "model": Manifest.read(given.exported).source["name"],
        "files_mb": sum((Path(given.exported) / name).stat().st_size for name in files) / 1e6,
        "start": measure_start(given.exported, texts[0], given.starts),
        "regrouping": [measure_regrouping(classifier, texts, speed, given.repeats) for speed in speeds],
        "streaming": [
            stream(given.exported, texts, rows, speeds[0]) for rows in (given.rows // 10, given.rows)
        ],
    }
    print(json.dumps(results, indent=1))
    if given.output:
        write_json(given.output, results)
    return results


def measure_start(exported: str, text: str, starts: int) -> dict[str, Any]:
    """Medians over fresh processes."""
    runs = [
        json.loads(
            subprocess.run(
                [sys.executable, "-c", START, exported, text], capture_output=True, text=True, check=True
            ).stdout
        )
        for _ in range(starts)
    ]
    modules = runs[0].pop("modules").removeprefix("__main__,")
    numbers = [name for name in runs[0] if name != "torch_is_loaded"]
    medians = {name: float(np.median([run[name] for run in runs])) for name in numbers}
    libraries = [
        subprocess.run(
            [sys.executable, "-c", LIBRARIES, modules], capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(starts)
    ]
    resident, private = np.median(np.array(libraries, float), axis=0).tolist()
    return medians | {
        "libraries_mb": resident,
        "libraries_private_mb": private,
        "torch_is_loaded": any(run["torch_is_loaded"] for run in runs),
        "starts": starts,
    }


def measure_regrouping(
    classifier: AdaptiveClassifier, texts: Sequence[str], speed: float, repeats: int
) -> dict[str, Any]:
    """Texts per second with regrouping over those without, in turns."""
    shuffled = [texts[index] for index in np.random.default_rng(0).permutation(len(texts))]

    def answer(regroup: bool) -> None:
        classifier.regroup = regroup
        classifier.predict_proba(shuffled, speed=speed)

    timings = interleave({"with": lambda: answer(True), "without": lambda: answer(False)}, repeats=repeats)
    classifier.regroup = True
    gain = ratio(timings["without"], timings["with"])
    exits = [prediction.exit for prediction in classifier.predict(shuffled, speed=speed)]
    return {
        "speed": speed,
        "texts": len(texts),
        "mean_exit_layer": float(np.mean(exits)),
        "texts_per_second": timings["with"].per_second(len(texts)).median,
        "texts_per_second_without": timings["without"].per_second(len(texts)).median,
        "gain": gain.median,
        "gain_quartiles": [gain.lower, gain.upper],
    }


def stream(exported: str, texts: Sequence[str], rows: int, speed: float) -> dict[str, Any]:
    """`alembert predict` over a file of so many rows."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "texts.txt", Path(folder) / "answers.jsonl"
        lines = [" ".join(text.split()) for text in texts]
        with source.open("w", encoding="utf-8") as file:
            file.writelines(f"{lines[row % len(lines)]}\n" for row in range(rows))
        command = [
            "predict",
            exported,
            "--input",
            str(source),
            "--output",
            str(target),
            "--speed",
            str(speed),
        ]
        subprocess.run(
            [sys.executable, "-c", STREAM, *command],
            check=True,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"COLUMNS": "80"},
        )
        with target.open(encoding="utf-8") as file:
            answers = sum(1 for _ in file)
        if answers != rows:
            raise InputError(f"{answers} answers for {rows} rows")
        taken = json.loads(Path(f"{target}.json").read_text())
        return {
            "rows": rows,
            "speed": speed,
            "seconds": taken["s"],
            "rows_per_second": rows / taken["s"],
            "peak_memory_mb": taken["peak_mb"],
            "input_mb": source.stat().st_size / 1e6,
            "output_mb": target.stat().st_size / 1e6,
        }


if __name__ == "__main__":
    main()
