"""The light distribution: the same files with fewer dependencies, all of which the full one has too."""

from __future__ import annotations

import ast
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LIGHT = ROOT / "packaging" / "runtime"
IMPORTED_AS = {"pyyaml": "yaml"}
NEEDED_AT_RUN_TIME = (
    "cli/predict",
    "cli/options",
    "cli/app",
    "data/texts",
    "data/reading",
    "data/validation",
)
RUNTIME = (
    "adaptive", "backend", "batching", "calibration_file", "exited", "manifest", "onnx_backend", "policies",
    "prediction_file", "processor", "tokenization",
)  # fmt: skip


def _project(folder: Path) -> dict[str, Any]:
    with (folder / "pyproject.toml").open("rb") as file:
        project: dict[str, Any] = tomllib.load(file)["project"]
    return project


def _names(requirements: list[str]) -> dict[str, str]:
    return {requirement.partition(">=")[0]: requirement for requirement in requirements}


def test_the_licence_goes_with_it() -> None:
    assert _project(LIGHT)["license-files"] == ["LICENSE"]
    assert (LIGHT / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_dependencies_are_those_of_the_full_distribution() -> None:
    full = _project(ROOT)
    known = _names([*full["dependencies"], *full["optional-dependencies"]["onnx"]])
    for name, requirement in _names(_project(LIGHT)["dependencies"]).items():
        # transformers brings tokenizers.
        assert known.get(name, requirement) == requirement


def test_what_runs_there_imports_nothing_that_is_not_there() -> None:
    there = {IMPORTED_AS.get(name, name) for name in _names(_project(LIGHT)["dependencies"])}
    files = [*NEEDED_AT_RUN_TIME, *(f"runtime/{name}" for name in RUNTIME)]
    for file in files:
        tree = ast.parse((ROOT / "src" / "alembert" / f"{file}.py").read_text(encoding="utf-8"))
        for node in tree.body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            outside = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)
            assert outside <= there | {"alembert"}, file
