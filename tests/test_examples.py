"""The examples in the docstrings of the public names run as they stand, in a folder that has what they name."""

from __future__ import annotations

import doctest
import shutil
from pathlib import Path

import pytest

import alembert

PUBLIC = {name: getattr(alembert, name) for name in alembert.__all__}


@pytest.fixture(scope="module")
def workplace(
    tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path, task_folder: Path, teacher: Path, fast: Path
) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    for source, name in (
        (tiny_encoder, "encoder"),
        (task_folder, "topics"),
        (teacher, "runs/teacher"),
        (fast, "runs/fast"),
    ):
        shutil.copytree(source, folder / name)
    return folder


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_example_runs(name: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    finder = doctest.DocTestFinder(recurse=False)
    (example,) = finder.find(PUBLIC[name], name, globs={})
    assert example.examples, f"alembert.{name} has no example in its docstring"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report: list[str] = []
    assert runner.run(example, out=report.append).failed == 0, "".join(report)
