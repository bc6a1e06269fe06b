"""What `mkdocs build` needs besides docs/: the pages at the repository's root, and the reference of the Python API."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
ROOT_PAGES = {"README.md": "readme.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
MODULES = (
    "alembert.data.task",
    "alembert.training.finetuning",
    "alembert.training.settings",
    "alembert.methods.distillation",
    "alembert.methods.base",
    "alembert.runtime.adaptive",
    "alembert.runtime.policies",
    "alembert.runtime.export",
    "alembert.benchmarks.evaluation",
    "alembert.benchmarks.comparison",
    "alembert.benchmarks.comparison_settings",
    "alembert.benchmarks.calibration",
    "alembert.benchmarks.risk_budget",
    "alembert.compression.compress",
    "alembert.compression.search",
    "alembert.compression.ablation",
    "alembert.data.augmentation",
    "alembert.losses.self_distillation",
    "alembert.losses.transport",
    "alembert.losses.prediction",
    "alembert.losses.hidden",
    "alembert.losses.attention",
    "alembert.losses.relation",
    "alembert.losses.contrastive",
    "alembert.losses.layer_transport",
    "alembert.models.multi_exit",
    "alembert.models.layered",
    "alembert.models.students",
)


def on_files(files: Files, config: Any) -> Files:
    """Adds the root's pages and api.md."""
    for name, page in ROOT_PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, page, content=_without_code_links(text)))
    sections = "\n\n".join(f"::: {module}" for module in MODULES)
    files.append(File.generated(config, "api.md", content=f"# Python API\n\n{sections}\n"))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Points links at the root's pages to where these are in the site."""
    up = "../" * page.file.src_uri.count("/")
    for name, target in ROOT_PAGES.items():
        markdown = re.sub(rf"\]\((?:\.\./)*{re.escape(name)}(#[^)]*)?\)", rf"]({up}{target}\1)", markdown)
    return markdown


def _without_code_links(text: str) -> str:
    """Links to files that are no pages, such as the licence, become plain text."""
    return re.sub(r"\[([^\]]+)\]\((?:LICENSE|src/[^)]*|tests/[^)]*)\)", r"\1", text)
