"""The README.md of a compressed model: what it is, what it costs and loses, how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def compression_card(summary: Mapping[str, Any], task: Mapping[str, Any]) -> str:
    """A model card in the Hub's layout.

    The licence field is left for the owner: it follows from those of the base model and of the data.

    Args:
        summary: what `compress` returns; its "best" must not be None.
        task: what `Task.describe` returns.
    """
    rows = "\n".join(_row(candidate, summary["best"]["name"]) for candidate in summary["candidates"])
    splits = ", ".join(f"{split} {facts['rows']}" for split, facts in task["splits"].items())
    return f"""---
pipeline_tag: text-classification
license: other
license_name: to-be-set-by-the-owner
tags:
- text-classification
- alembert
---

# {task["name"]}: compressed with Alembert {summary["alembert_version"]}

{summary["verdict"]}.

- task: {task["problem_type"]}, {task["num_labels"]} label(s), metric {task["metrics"][0]}
- rows: {splits}
- texts: their first {summary["max_length"]} tokens

`onnx` is the int8 model, ready to deploy without torch; the speed that it was calibrated at is its default. `torch` is
the same model in fp32. The promise is of `onnx`: calibrate `torch` before you deploy that.

```
alembert predict onnx --input texts.txt --output labels.jsonl
```

## What was compared

Differences are to the teacher under transformers in fp32, on {_split(summary["split"])}.

| model | speed | metric | difference | texts/s, in multiples of the teacher's |
|---|---|---|---|---|
{rows}

"Not sure" is a model that kept to the budget on dev, without rows enough there to be sure of it.
"""


def _split(name: str) -> str:
    if name == "test":
        return "test, which nothing was chosen by but the fastest model"
    return "dev, which speeds were chosen by too, for want of a test split"


def _row(candidate: Mapping[str, Any], best: str) -> str:
    name = f"**{candidate['name']}**" if candidate["name"] == best else candidate["name"]
    if candidate["ratio"] is None:
        return f"| {name} | – | – | {-100 * candidate['risk']:+.1f} points on dev: over the budget | – |"
    return (
        f"| {name}{'' if candidate['kept'] else ' (not sure)'} | {candidate['speed']:g} | {candidate['metric']:.4f} | "
        f"{100 * candidate['metric_difference']:+.1f} points | {candidate['ratio']:.1f} |"
    )
