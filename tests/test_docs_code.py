"""Every block of Python in the documentation is run, on tiny models in place of real ones."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertModel

import alembert
from alembert.methods.registry import METHODS
from alembert.runtime.export import export_classifier

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
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
    config = BertConfig.from_pretrained(tiny_encoder)
    BertForMaskedLM(config).save_pretrained(folder / "masked-lm")
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(folder / "masked-lm")
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
        if "finetune(" in block:
            shutil.rmtree("runs")
        if "exported/fast" in block:
            shutil.rmtree("exported")
            if "export_classifier" not in block:
                shutil.move("kept", "exported/fast")

        def messages() -> Iterator[str]:
            yield from ("the soup was good", "the match was lost")

        return {"task": alembert.load_task("topics/"), "MODEL": "masked-lm", "messages": messages}

    return prepare


@pytest.mark.parametrize("block", BLOCKS)
def test_the_block_runs(block: str, workplace: Callable[[str], dict[str, Any]]) -> None:
    names = workplace(block)
    for written, run in SMALLER:
        block = block.replace(written, run)
    exec(compile(block, "block", "exec"), names | {"__name__": "block"})


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
