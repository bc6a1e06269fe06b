"""What is imported when: nothing heavy by `import alembert`, the Auto classes in any order, no torch for exports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from alembert import AdaptiveClassifier
from alembert.runtime.export import export_classifier

HEAVY = ("torch", "transformers", "datasets", "pyarrow", "sklearn", "scipy", "safetensors", "ot")
BLOCK = f"""
import sys
from importlib.abc import MetaPathFinder
class Blocker(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
"""
KNOWN = """
from transformers import AutoConfig, AutoModelForSequenceClassification
for name in ("alembert-multi-exit", "alembert-bilstm"):
    assert type(AutoConfig.for_model(name)) in AutoModelForSequenceClassification._model_mapping, name
"""


def python(code: str) -> str:
    """Runs code in a process of its own and returns what it printed."""
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_the_package_and_the_command_line_imports_nothing_heavy() -> None:
    code = f"import sys, alembert, alembert.cli.app; print([m for m in {HEAVY!r} + ('numpy',) if m in sys.modules])"
    assert python(code).strip() == "[]"
    code = f"from alembert import AdaptiveClassifier; import sys; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert python(code).strip() == "[]"


def test_every_command_shows_its_help_without_heavy_libraries() -> None:
    code = """
from alembert.cli.app import COMMANDS, run
for name in COMMANDS:
    assert run([name, "--help"]) == 0, name
assert run(["--help"]) == 0
"""
    assert "Usage:" in python(BLOCK + code)


@pytest.mark.parametrize(
    "first",
    [
        "import alembert",
        "from transformers import AutoModelForSequenceClassification; import alembert",
        "import alembert; from transformers import AutoConfig; AutoConfig.for_model('alembert-bilstm')",
        "import alembert; from transformers import Trainer",
        "import alembert; from transformers import pipeline",
        "import alembert; from transformers import PreTrainedModel",
    ],
)
def test_the_auto_classes_know_the_models_whatever_comes_first(first: str) -> None:
    python(f"{first}\n{KNOWN}")


def test_transformers_without_torch_is_left_alone() -> None:
    code = """
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "torch" else find_spec(name, *more)
import alembert
from transformers import AutoConfig
AutoConfig.for_model("bert")
print("alembert.models" in sys.modules)
"""
    assert python(code).strip() == "False"


def test_an_export_is_run_without_torch_and_transformers(fast: Path, tmp_path: Path) -> None:
    texts = ["we saw the soup, again", "a storm today"]
    expected = [answer.label for answer in AdaptiveClassifier.from_pretrained(fast).predict(texts, speed=0.6)]
    folder, source, output = tmp_path / "export", tmp_path / "texts.csv", tmp_path / "labels.jsonl"
    export_classifier(fast, folder, precision="fp32")
    source.write_text("".join(f'"{text}"\n' for text in ["text", *texts]), encoding="utf-8")
    code = f"""
from alembert import AdaptiveClassifier
from alembert.cli.app import run
answers = AdaptiveClassifier.from_pretrained({str(folder)!r}, speed=0.6).predict({texts!r})
command = ["predict", {str(folder)!r}, "--input", {str(source)!r}]
assert run([*command, "--output", {str(output)!r}, "--speed", "0.6"]) == 0
assert run(["predict", {str(fast)!r}, "the soup"]) == 2
assert run(["predict", {str(folder)!r}, "--input", "texts.parquet"]) == 2
print([answer.label for answer in answers])
"""
    assert python(BLOCK + code).strip().splitlines()[-1] == str(expected)
    assert [json.loads(line)["label"] for line in output.read_text().splitlines()] == expected
