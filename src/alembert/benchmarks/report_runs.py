"""What a report shows of a run's folder: training curves by loss term, configuration, versions, fingerprints."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from alembert.common.errors import InputError
from alembert.common.files import finite, read_json
from alembert.models.loading import weights_fingerprint
from alembert.runtime.manifest import Manifest, is_exported
from alembert.training.run_directory import FINISHED, STEPS

MOST_POINTS = 200
"""Of a training curve."""
_LOG = "trainer_state.json"


def run_record(source: str) -> dict[str, Any]:
    """What lies beside a model. What it does not have is None, or empty.

    Keys: "training" (`training_curves`), "configuration", "versions" and "finished" (of `alembert.json`),
    "recorded_metrics" (`metrics.json`), "export" (of a manifest) and "files" (SHA-256 by name).

    Raises:
        InputError: a file is damaged.
    """
    folder = Path(source)
    record = _read(folder / FINISHED)
    export = None
    if is_exported(source):
        manifest = Manifest.read(source)
        export = {
            key: value
            for key, value in asdict(manifest).items()
            if key in ("precision", "model_type", "num_layers", "opset", "versions", "source", "max_length")
        }
    files = dict(manifest.files) if export is not None else weights_fingerprint(source)
    return {
        "training": training_curves(folder),
        "configuration": record.get("configuration"),
        "versions": record.get("versions"),
        "finished": record.get("finished"),
        "recorded_metrics": _read(folder / "metrics.json") or None,
        "export": export,
        "files": files,
    }


def training_curves(folder: Path) -> list[dict[str, Any]]:
    """Every stage of a run, those of methods before it first: its loss terms and dev scores by optimiser step.

    Keys: "name", "steps" (in all), "terms" (by name, "loss" being their sum) and "score" (dev, where it was measured),
    each {"steps", "values"}, thinned to 200 points. Values that were not finite are None.

    Raises:
        InputError: a log is damaged.
    """
    stages = []
    earlier = sorted((folder / STEPS).iterdir()) if (folder / STEPS).is_dir() else []
    for run in (*earlier, folder):
        log = run / _LOG
        try:
            for name, stage in logged_stages(_read(log)).items():
                title = name if run == folder else f"{run.name}: {name}"
                stages.append({"name": title, "steps": stage["global_step"], **_curves(stage["log_history"])})
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{log}: is no training log of Alembert, or was changed by hand ({error!r})"
            ) from error
    return stages


def logged_stages(log: Mapping[str, Any]) -> Mapping[str, Any]:
    """The stages of a trainer_state.json by name; transformers' own, which has no names, is one."""
    return {"training": log} if isinstance(log.get("log_history"), list) else log


def _curves(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    logged = [entry for entry in history if "loss" in entry]
    names = sorted({key for entry in logged for key in entry if key.startswith("terms/")}, key=_by_numbers)
    terms = {name.removeprefix("terms/"): _series(logged, name) for name in names}
    if len(terms) != 1:
        terms = {"loss": _series(logged, "loss"), **terms}
    scored = [entry for entry in history if "eval_score" in entry]
    return {"terms": terms, "score": _series(scored, "eval_score") if scored else None}


def _series(entries: Sequence[Mapping[str, Any]], key: str) -> dict[str, list[Any]]:
    there = [entry for entry in entries if key in entry]
    kept = [there[place] for place in spread(len(there), MOST_POINTS)]
    return {"steps": [entry["step"] for entry in kept], "values": [entry[key] for entry in kept]}


def spread(length: int, most: int) -> list[int]:
    """At most `most` places of a list, evenly spread, first and last included."""
    if length <= most:
        return list(range(length))
    return sorted({round(step * (length - 1) / (most - 1)) for step in range(most)})


def _by_numbers(name: str) -> list[str | int]:
    """Sorts exit_2 before exit_10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _read(path: Path) -> dict[str, Any]:
    content = finite(read_json(path)) if path.is_file() else {}
    if not isinstance(content, dict):
        raise InputError(f"{path}: is a JSON {type(content).__name__}, not an object: it was changed by hand")
    return content
