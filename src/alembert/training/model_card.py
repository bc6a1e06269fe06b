"""The README.md beside every model: how it was made and what it measured."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Any


def model_card(configuration: dict[str, Any], metrics: dict[str, Any]) -> str:
    """A model card in the Hub's layout: metadata, task, method, measurements, full configuration.

    The licence field is left for the owner: it follows from those of the base model and of the data.
    """
    task = configuration["task"]
    data = "plain text" if task is None else task["name"]
    facts = "" if task is None else _task_facts(task)
    base_model = configuration.get("model") or configuration.get("teacher")
    what = configuration.get("method", "fine-tuning")
    tags = "\n".join(f"- {tag}" for tag in ("text-classification", "alembert", what))
    return f"""---
library_name: transformers
pipeline_tag: {"feature-extraction" if task is None else "text-classification"}
license: other
license_name: to-be-set-by-the-owner
tags:
{tags}
---

# {data}: {what} with Alembert {version("alembert")}

- base model or teacher: `{base_model}`
{facts}
## Measured

```json
{json.dumps(metrics, indent=2, ensure_ascii=False)}
```

## Configuration

```json
{json.dumps(configuration, indent=2, ensure_ascii=False)}
```
"""


def _task_facts(task: dict[str, Any]) -> str:
    rows = ", ".join(f"{split} {facts['rows']}" for split, facts in task["splits"].items())
    return (
        f"- task: {task['problem_type']}, {task['num_labels']} label(s), metric {task['metrics'][0]}\n"
        f"- rows: {rows}\n"
    )
