"""What a cache of the teacher's outputs saves in a training step, and what it costs to prepare.

Teacher and student have random weights; TinyBERT's features are read of both: hidden states of the embeddings and
of every student layer's counterpart, attention scores of the counterparts, and logits. Rows have 8 tokens to
`--tokens`. A step is: teacher, student forward and backward, optimiser. Both kinds of step take turns on the same
batches within every repetition, so that a busy machine slows both alike. The files have just been written, so they
are read from memory; a cache that is larger than memory reads from its disk.

    python benchmarks/teacher_cache_speed.py --threads 2 --output teacher_cache_speed.json
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from alembert.common.files import write_json
from alembert.losses.attention import attention_score_mse
from alembert.losses.hidden import hidden_state_mse
from alembert.losses.prediction import soft_cross_entropy
from alembert.models.capture import capture
from alembert.models.features import FeatureRequest
from alembert.training.teacher_cache import TeacherCache
from alembert.training.teachers import LiveTeacher, Teacher

VOCABULARY, LABELS, HEADS = 1000, 10, 12
KINDS = ("live", "cached")


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles in milliseconds."""
    low, middle, high = np.percentile(np.array(seconds) * 1e3, [25, 50, 75])
    return {"median_ms": float(middle), "lower_quartile_ms": float(low), "upper_quartile_ms": float(high)}


def build(shape: tuple[int, int]) -> PreTrainedModel:
    """A random BERT of `layers × width` with a classifier."""
    layers, width = shape
    config = BertConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=HEADS,
        intermediate_size=4 * width,
        num_labels=LABELS,
    )
    return BertForSequenceClassification(config)


def random_rows(rows: int, tokens: int) -> Dataset:
    """Rows of random length and content, as `tokenise` gives them."""
    generator = np.random.default_rng(0)
    ids = [
        generator.integers(5, VOCABULARY, size=generator.integers(8, tokens + 1)).tolist()
        for _ in range(rows)
    ]
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})


class Step:
    """A training step of TinyBERT's losses."""

    def __init__(self, student: PreTrainedModel, layers: dict[int, int], widths: tuple[int, int]) -> None:
        self.student, self.layers = student, layers
        self.projection = nn.Linear(*widths)
        parameters = [*student.parameters(), *self.projection.parameters()]
        self.optimiser = torch.optim.AdamW(parameters, lr=1e-5)
        self.request = FeatureRequest(hidden_states=(0, *layers), attention_scores=tuple(layers))

    def run(self, teacher: Teacher, inputs: dict[str, Tensor], rows: Tensor) -> float:
        """Seconds of a step."""
        start = time.perf_counter()
        target = teacher(inputs, rows)
        features = capture(self.student, inputs, self.request)
        mask = features.attention_mask
        loss = soft_cross_entropy(features.logits, target.logits, "single_label_classification")
        for layer, counterpart in ({0: 0} | self.layers).items():
            hidden = self.projection(features.hidden_states[layer])
            loss = loss + hidden_state_mse(hidden, target.hidden_states[counterpart], mask)
            if layer:
                scores = features.attention_scores[layer]
                loss = loss + attention_score_mse(scores, target.attention_scores[counterpart], mask)
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        if mask.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start


def batches(
    data: Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int, device: torch.device
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Random batches with their row numbers, without end."""
    pad, generator = DataCollatorWithPadding(tokenizer), torch.Generator().manual_seed(0)
    while True:
        for rows in torch.randperm(len(data), generator=generator).split(batch_size):
            yield dict(pad(list(data.select(rows.tolist()))).to(device)), rows


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Preparation, and both kinds of step."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    (teacher_layers, teacher_width), (student_layers, student_width) = arguments.teacher, arguments.student
    mapping = {layer: layer * teacher_layers // student_layers for layer in range(1, student_layers + 1)}
    request = FeatureRequest(hidden_states=(0, *mapping.values()), attention_scores=tuple(mapping.values()))
    teacher = build(arguments.teacher).to(device)
    data = random_rows(arguments.rows, arguments.tokens)
    tokenizer = BertTokenizerFast(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4})

    start = time.perf_counter()
    cached = TeacherCache.prepare(
        folder, teacher, data, tokenizer, request, dtype=arguments.dtype, batch_size=arguments.batch_size
    )
    preparation = time.perf_counter() - start
    size = sum(path.stat().st_size for path in folder.glob("*.npy"))

    step = Step(build(arguments.student).to(device).train(), mapping, (student_width, teacher_width))
    step.projection.to(device)
    teachers: dict[str, Teacher] = {"live": LiveTeacher(teacher, request), "cached": cached}
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    source = batches(data, tokenizer, arguments.batch_size, device)
    for repetition in range(arguments.repeats + 2):
        inputs, rows = next(source)
        # Neither always comes second, when the batch is in the processor's cache.
        for kind in KINDS if repetition % 2 else KINDS[::-1]:
            seconds[kind].append(step.run(teachers[kind], inputs, rows))
    # The first two repetitions warm up.
    seconds = {kind: values[2:] for kind, values in seconds.items()}
    ratios = np.array(seconds["live"]) / np.array(seconds["cached"])
    saved = float(np.median(np.array(seconds["live"]) - np.array(seconds["cached"])))
    steps_per_epoch = -(-arguments.rows // arguments.batch_size)
    return {
        "preparation": {
            "seconds": preparation,
            "rows_per_second": arguments.rows / preparation,
            "bytes": size,
            "bytes_per_row": size / arguments.rows,
        },
        "step": {kind: summary(values) for kind, values in seconds.items()},
        "times_faster": float(np.median(ratios)),
        "times_faster_quartiles": [float(value) for value in np.percentile(ratios, [25, 75])],
        "epochs_to_pay_off": preparation / (saved * steps_per_epoch) if saved > 0 else None,
    }


def shape(text: str) -> tuple[int, int]:
    layers, width = text.split("x")
    return int(layers), int(width)


def main(command_line: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", type=shape, default=(12, 384), help="layers x width, e.g. 12x384")
    parser.add_argument("--student", type=shape, default=(4, 312), help="layers x width, e.g. 4x312")
    parser.add_argument("--rows", type=int, default=256, help="rows of the data set")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of the longest row")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    parser.add_argument("--repeats", type=int, default=15, help="steps of each kind")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of torch")
    parser.add_argument("--output", help="JSON file to write")
    arguments = parser.parse_args(command_line)
    if min(arguments.repeats, arguments.threads, arguments.rows, arguments.batch_size) < 1:
        parser.error("--repeats, --threads, --rows and --batch-size must be at least 1.")
    if arguments.tokens < 8:
        parser.error("--tokens must be at least 8.")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments, Path(folder))

    console = Console()
    table = Table("teacher", "step ms", "quartiles ms", title="A training step")
    for kind, row in result["step"].items():
        quartiles = f"{row['lower_quartile_ms']:.0f}–{row['upper_quartile_ms']:.0f}"
        table.add_row(kind, f"{row['median_ms']:.0f}", quartiles)
    console.print(table)
    low, high = result["times_faster_quartiles"]
    preparation = result["preparation"]
    console.print(
        f"× {result['times_faster']:.2f} ({low:.2f}–{high:.2f}); preparation {preparation['seconds']:.1f} s, "
        f"{preparation['bytes'] / 2**20:.1f} MiB, {preparation['bytes_per_row'] / 2**10:.0f} KiB a row"
    )
    settings = ("teacher", "student", "rows", "tokens", "batch_size", "dtype", "repeats")
    result = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "threads": arguments.threads,
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "settings": {name: getattr(arguments, name) for name in settings},
        **result,
    }
    if arguments.output:
        write_json(arguments.output, result)


if __name__ == "__main__":
    main()
