"""The documentation against the code: lines, options, presets, flags, links and docstrings."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import typer

import alembert
from alembert.cli.app import app
from alembert.methods.base import resolve
from alembert.methods.registry import METHODS
from alembert.training.settings import TrainingSettings

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
METHOD_PAGES = sorted(ROOT.glob("docs/methods/*.md"))
PROGRAM: Any = typer.main.get_command(app)

LINE_REFERENCE = re.compile(r"`(src/[\w/]+\.py):(\d+)` `([^`]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE_COMMAND = re.compile(r"`(alembert [^`\n]+)`")

by_name = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
by_method = pytest.mark.parametrize("page", METHOD_PAGES, ids=lambda page: page.stem)


@by_method
def test_lines_of_code_hold_what_the_page_says(page: Path) -> None:
    references = LINE_REFERENCE.findall(page.read_text(encoding="utf-8"))
    assert references, "a method's page maps its equations to lines of code"
    moved = []
    for file, number, snippet in references:
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        if int(number) > len(lines) or snippet not in lines[int(number) - 1]:
            moved.append(_remedy(page, file, int(number), snippet, lines))
    if moved:
        pytest.fail("lines have moved; run:\n" + "\n".join(moved), pytrace=False)


def _remedy(page: Path, file: str, number: int, snippet: str, lines: list[str]) -> str:
    """The command that mends a reference, or what to look for when the snippet is gone."""
    found = [place for place, line in enumerate(lines, 1) if snippet in line]
    if not found:
        return f"# {file}:{number}: no line holds `{snippet}` any more; find what replaced it"
    nearest = min(found, key=lambda place: abs(place - number))
    pattern = re.sub(r"([][\\.*^$&])", r"\\\1", snippet)
    return f"sed -i 's|{file}:{number}` `{pattern}|{file}:{nearest}` `{pattern}|' {page.relative_to(ROOT)}"


def _table(page: Path, heading: str) -> dict[str, list[str]]:
    """The rows of a section's table: the backticked name in the first cell to the other cells."""
    section = page.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if cells and re.fullmatch(r"`\w+`", cells[0]):
            rows[cells[0].strip("`")] = [cell.replace(r"\|", "|") for cell in cells[1:]]
    return rows


@by_method
def test_options_table_is_complete_and_right(page: Path) -> None:
    options = METHODS[page.stem].options_class.model_fields
    documented = {name: cells[0] for name, cells in _table(page, "Options").items()}
    assert documented == {name: f"`{field.default}`" for name, field in options.items()}


def test_table_of_training_settings_is_complete_and_right() -> None:
    page = ROOT / "docs" / "training.md"
    (section,) = page.read_text(encoding="utf-8").split("\n## ")[:1]
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", section, re.M)
    assert dict(rows) == {name: str(field.default) for name, field in TrainingSettings.model_fields.items()}


@by_method
def test_presets_table_is_complete_and_right(page: Path) -> None:
    method = METHODS[page.stem]
    settings_of: dict[str, dict[str, Any]] = {}
    for preset in method.presets:
        options, settings = resolve(method, preset, {}, {})
        settings_of[preset] = options.model_dump() | settings.model_dump()
    documented = _table(page, "Presets")
    expected = {
        name: [
            f"`{settings_of[preset][name]:g}`" if name == "epochs" else f"`{settings_of[preset][name]}`"
            for preset in settings_of
        ]
        for name in documented
    }
    assert documented == expected
    differing = {
        name
        for name in [*method.options_class.model_fields, *TrainingSettings.model_fields]
        if len({str(values.get(name)) for values in settings_of.values()}) > 1
    }
    assert differing <= documented.keys()


@by_name
def test_links_point_to_files(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        target = link.partition("#")[0]
        if target and not re.match(r"\w+:", target):
            assert (page.parent / target).exists(), f"{page.name} links to {link}, which is not there"


def _commands(text: str) -> Iterator[str]:
    for block in FENCED.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip().startswith("alembert "):
                yield line.strip()
    yield from INLINE_COMMAND.findall(FENCED.sub("", text))


@by_name
def test_commands_use_flags_that_exist(page: Path) -> None:
    for command in _commands(page.read_text(encoding="utf-8")):
        words = shlex.split(command, comments=True)[1:]
        name = words[0]
        if name == "COMMAND" or name.startswith("--"):
            continue
        assert name in PROGRAM.commands, f"{page.name}: {command}: there is no command {name}"
        parameters = PROGRAM.commands[name].params
        flags = {flag for parameter in parameters for flag in [*parameter.opts, *parameter.secondary_opts]}
        used = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert used <= flags | {"--help"}, f"{page.name}: {command}: no {used - flags}"
        if "--method" in words:
            methods = words[words.index("--method") + 1].split("+")
            options = {
                name
                for method in methods
                for option in METHODS[method].options_class.model_fields
                for name in (option, f"{method}.{option}")
            }
            chosen = {value.partition("=")[0] for flag, value in pairwise(words) if flag == "--set"}
            assert chosen <= options, f"{page.name}: {command}: no option {chosen - options}"


def test_readme_shows_commands() -> None:
    shown = {command.split()[1] for command in _commands((ROOT / "README.md").read_text(encoding="utf-8"))}
    assert {"finetune", "distill", "evaluate", "predict"} <= shown


def _public_objects() -> Iterator[tuple[str, Any]]:
    for module_info in pkgutil.walk_packages(alembert.__path__, "alembert."):
        module = importlib.import_module(module_info.name)
        yield module.__name__, module
        for name, value in vars(module).items():
            is_own = getattr(value, "__module__", None) == module.__name__
            if name.startswith("_") or not is_own or not isinstance(value, type | FunctionType):
                continue
            yield f"{module.__name__}.{name}", value
            if isinstance(value, type):
                for member, raw in vars(value).items():
                    wrapped = isinstance(raw, FunctionType | property | classmethod | staticmethod)
                    if wrapped and not member.startswith("_"):
                        yield f"{module.__name__}.{name}.{member}", getattr(value, member)


def test_everything_public_has_a_docstring() -> None:
    def is_bare(value: Any) -> bool:
        # A method may take its docstring from the class it overrides, a class may not.
        text = value.__doc__ if isinstance(value, type) else inspect.getdoc(value)
        return not (text or "").strip(" .\n")

    objects = dict(_public_objects())
    assert {"alembert.data.task.Task.num_labels", "alembert.losses.transport.sorted_emd"} <= objects.keys()
    assert [name for name, value in objects.items() if is_bare(value)] == []
    assert [name for name in alembert.__all__ if is_bare(getattr(alembert, name))] == []
