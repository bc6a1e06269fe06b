"""Every command and every block of Python in the documentation is run, on tiny models in place of real ones."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertModel

import alembert
from alembert.cli.app import run
from alembert.methods.registry import METHODS
from alembert.runtime.export import export_classifier

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMANDS = re.compile(r"^```\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = [
    page
    for page in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
    if "results" not in page.parts  # hours of work, whose commands `test_docs` checks
]
BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}-{number}")
    for page in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
    for number, block in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")), 1)
]
# Sizes alone, and a student that knows the task already: defaults teach a tiny one nothing.
SMALLER = (
    ('student="4x312"', 'student="runs/teacher"'),
    ("4x312|6x384", "2x16|2x32"),
    ("4x312", "4x16"),
    ("trials=20", "trials=1"),
    ("copies=10", "copies=1"),
)
SMALLER_COMMANDS = (
    ("--stages general --student 4x312", "--stages general --student 4x32"),
    ("--student 4x312", "--student runs/teacher"),
    ("6x384", "4x32"),
    ("6x768", "4x32"),
    ("k=4", "k=3"),
    ("--trials 8", "--trials 2"),
    ("--seeds 1,2,3", "--seeds 1"),
    ("--budget 2h", "--budget 2h --max-train-rows 40 --max-drop 0.5"),
    ("benchmark ", "benchmark --repeats 1 --timing-rows 8 --latency-rows 2 --one-process "),
    ("report ", "report --repeats 1 --timing-rows 8 --latency-rows 2 --one-process "),
    (
        "distilbert --stages general --teacher bert-base-uncased",
        "distilbert --stages general --teacher MASKED_LM",
    ),
)


def commands(page: Path) -> list[str]:
    """The lines of a page's blocks that call the program, comments left out."""
    lines = [
        line.partition("  #")[0].strip()
        for block in COMMANDS.findall(page.read_text(encoding="utf-8"))
        for line in block.replace("\\\n", "").splitlines()
    ]
    return [line for line in lines if line.startswith("alembert ") and "COMMAND" not in line]


@pytest.fixture(scope="module")
def furnished(
    tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path, teacher: Path, task_folder: Path
) -> Path:
    """A folder with all that the blocks name: data, runs, exports, an encoder, a masked language model."""
    folder = tmp_path_factory.mktemp("documentation")
    shutil.copytree(task_folder, folder / "topics")
    shutil.copytree(task_folder, folder / "reviews")
    head, *rows = (task_folder / "dev.tsv").read_text().splitlines()
    (folder / "reviews" / "dev.tsv").write_text("\n".join([head, *rows * 10]) + "\n")
    (folder / "texts.txt").write_text("the soup was good\nthe match was lost\n")
    (folder / "glove.txt").write_text("soup 1.0 0.0\nbread 0.9 0.1\n")
    shutil.copytree(_with_room(tiny_encoder, folder / "roomy"), folder / "bert-base-uncased")
    shutil.copytree(teacher, folder / "runs" / "teacher")
    task = alembert.load_task(task_folder)
    alembert.distill("fastbert", str(teacher), task, folder / "runs" / "fast", settings={"epochs": 1})
    export_classifier(folder / "runs" / "fast", folder / "exported")
    shutil.copytree(folder / "exported", folder / "kept")
    shutil.copytree(folder / "exported", folder / "exports" / "fast-int8")
    shutil.copytree(teacher, folder / "runs" / "tiny")
    shutil.copytree(folder / "reviews", folder / "DATA" / "sst2")
    (folder / "text").mkdir()
    (folder / "text" / "some.txt").write_text("the soup was good\n\nthe match was lost\n" * 20)
    (folder / "texts.tsv").write_text("text\nthe soup was good\nthe match was lost\n")
    (folder / "texts.jsonl").write_text('{"text": "the soup was good"}\n')
    (folder / "theirs.py").write_text(
        "import sys\n"
        "texts = open(sys.argv[1]).read().splitlines()\n"
        "open(sys.argv[2], 'w').write('food\\n' * len(texts))\n"
    )
    config = BertConfig.from_pretrained(tiny_encoder, max_position_embeddings=128)
    BertForMaskedLM(config).save_pretrained(folder / "masked-lm")
    # The default length of the stage on plain text.
    AutoTokenizer.from_pretrained(tiny_encoder, model_max_length=128).save_pretrained(folder / "masked-lm")
    shutil.copytree(folder / "masked-lm", folder / "MASKED_LM")
    return folder


def _with_room(encoder: Path, folder: Path) -> Path:
    """A classifier that takes 128 tokens, the default, and knows the task: the default rate would not teach it."""
    model = BertModel.from_pretrained(encoder)
    config = BertConfig.from_pretrained(encoder, max_position_embeddings=128)
    larger = BertModel(config)
    weights = model.state_dict() | {
        name: weight for name, weight in larger.state_dict().items() if "position_embeddings" in name
    }
    larger.load_state_dict(weights)
    larger.save_pretrained(folder / "encoder")
    AutoTokenizer.from_pretrained(encoder, model_max_length=128).save_pretrained(folder / "encoder")
    settings = alembert.TrainingSettings(epochs=8, batch_size=8, learning_rate=2e-3, max_length=32)
    task = alembert.load_task(folder.parent / "topics")
    alembert.finetune(str(folder / "encoder"), task, folder / "classifier", settings=settings)
    return folder / "classifier"


@pytest.fixture
def workplace(
    furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], dict[str, Any]]:
    """Prepares a copy of the folder for a block, goes there, and returns the names that the block may use."""

    def prepare(block: str) -> dict[str, Any]:
        shutil.copytree(furnished, tmp_path / "here")
        monkeypatch.chdir(tmp_path / "here")
        if "finetune(" in block or "alembert finetune" in block:
            shutil.rmtree("runs")
        if "exported/fast" in block or "--output exported" in block:
            shutil.rmtree("exported")
            if "export_classifier" not in block and "alembert export" not in block:
                shutil.move("kept", "exported/fast")

        def messages() -> Iterator[str]:
            yield from ("the soup was good", "the match was lost")

        return {"task": alembert.load_task("topics/"), "MODEL": "masked-lm", "messages": messages}

    return prepare


@pytest.mark.parametrize("block", BLOCKS)
def test_the_block_runs(block: str, workplace: Callable[[str], dict[str, Any]]) -> None:
    names = workplace(block)
    for written, small in SMALLER:
        block = block.replace(written, small)
    exec(compile(block, "block", "exec"), names | {"__name__": "block"})


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if commands(page)],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_the_commands_of_a_page_run_in_turn(
    page: Path, workplace: Callable[[str], dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    written = "\n".join(commands(page))
    workplace(written)
    for shown, small in SMALLER_COMMANDS:
        written = written.replace(shown, small)
    for command in written.splitlines():
        words = shlex.split(command)[1:]
        output = words[words.index("--output") + 1] if "--output" in words else None
        if output is not None and Path(output).is_dir() and words[0] in ("distill", "finetune", "export"):
            shutil.rmtree(output)  # what an earlier page would have left
        code = run(words)
        # Nothing may be good enough on so few rows; that is an answer too.
        assert code == 0, (command, capfd.readouterr().err[-2000:])


@pytest.mark.parametrize(
    ("page", "method", "changes"),
    [
        ("adding-a-method.md", "Trust", {"options": {"trust": 0.5}}),
        ("architecture.md", "LastLayer", {"student": "2x16"}),
    ],
)
def test_the_methods_shown_can_be_distilled_with(
    page: str, method: str, changes: dict[str, Any], teacher: Path, task: alembert.Task, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (block,) = BLOCK.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))
    assert len(block.splitlines()) < 60
    names: dict[str, Any] = {"__name__": "block"}
    exec(compile(block, "block", "exec"), names)
    shown = names[method]
    monkeypatch.setitem(METHODS, shown.name, shown)
    settings = {"epochs": 20, "batch_size": 16, "learning_rate": 3e-3, "max_length": 32}
    alembert.distill(shown.name, str(teacher), task, tmp_path / "run", settings=settings, **changes)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    if method == "Trust":
        assert metrics["dev"]["3"]["accuracy"] > metrics["majority_baseline"]
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    losses = [entry["loss"] for stage in log.values() for entry in stage["log_history"] if "loss" in entry]
    assert losses[-1] < losses[0]
