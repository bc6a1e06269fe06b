"""Models with random weights and batches of random ids, for benchmarks in which only the time counts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast, set_seed

from alembert.benchmarks.pruning import segment_macs
from alembert.common.errors import InputError
from alembert.models.multi_exit import MultiExitModel
from alembert.runtime.export import export_classifier
from alembert.runtime.manifest import Manifest
from alembert.runtime.onnx_backend import OnnxBackend

VOCABULARY = 8000
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class Shape(NamedTuple):
    """An encoder's layers and width, as in 12x768."""

    layers: int
    width: int


class BatchShape(NamedTuple):
    """A batch's rows and tokens, as in 32x20."""

    rows: int
    tokens: int


def parse_pair(text: str) -> tuple[int, int]:
    """`AxB` as two numbers; InputError when it is none."""
    found = re.fullmatch(r"(\d+)x(\d+)", text.strip())
    if not found:
        raise InputError(f"{text!r}: give two numbers, as in 12x768")
    return int(found[1]), int(found[2])


def random_model(
    shape: Shape, *, exits: tuple[int, ...] = (), exit_head: str = "fastbert", num_labels: int = 2
) -> MultiExitModel:
    """A BERT of a shape with random weights, and exits after the given layers."""
    set_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=12 if shape.width % 12 == 0 else max(1, shape.width // 32),
        intermediate_size=4 * shape.width,
        num_labels=num_labels,
    )
    full_model = BertForSequenceClassification(config)
    model = MultiExitModel.from_full_model(full_model, exit_layers=exits, exit_head=exit_head)
    model.config.problem_type = "single_label_classification"
    return model.eval()


def random_tokenizer() -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer of made-up words w5, w6, … that stand for their ids."""
    vocabulary = {
        word: index for index, word in enumerate([*SPECIAL, *(f"w{i}" for i in range(5, VOCABULARY))])
    }
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=512,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def save_random_model(
    folder: Path,
    shape: Shape,
    *,
    exits: tuple[int, ...] = (),
    exit_head: str = "fastbert",
    num_labels: int = 2,
) -> Path:
    """Writes a random model and its tokenizer in Hugging Face layout, as `alembert export` reads them."""
    random_model(shape, exits=exits, exit_head=exit_head, num_labels=num_labels).save_pretrained(folder)
    random_tokenizer().save_pretrained(folder)
    return folder


def random_texts(count: int, tokens: int, seed: int = 0) -> list[str]:
    """Texts of made-up words that are `tokens` tokens long, special ones included."""
    words = np.random.default_rng(seed).integers(len(SPECIAL), VOCABULARY, size=(count, tokens - 2))
    return [" ".join(f"w{word}" for word in row) for row in words]


def random_batch(
    shape: BatchShape, lengths: np.ndarray | None = None, seed: int = 0
) -> dict[str, np.ndarray]:
    """A padded batch of random ids.

    Args:
        shape: rows and tokens.
        lengths: (rows,) tokens of each row; None = all are as long as the batch.
        seed: of the ids.

    Returns input_ids, attention_mask and token_type_ids, (rows, tokens) int64.
    """
    generator = np.random.default_rng(seed)
    size = np.full(shape.rows, shape.tokens) if lengths is None else lengths
    mask = (np.arange(shape.tokens) < size[:, None]).astype(np.int64)
    ids = generator.integers(len(SPECIAL), VOCABULARY, size=shape) * mask
    ids[:, 0] = SPECIAL.index("[CLS]")
    ids[np.arange(shape.rows), size - 1] = SPECIAL.index("[SEP]")
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def export_random_model(
    folder: Path,
    shape: Shape,
    precision: str,
    *,
    exits: tuple[int, ...] = (),
    exit_head: str = "fastbert",
    num_labels: int = 2,
    merge_exits: Literal["all"] | None = None,
) -> Path:
    """Exports a random model as `alembert export` does; returns the folder."""
    model = save_random_model(
        folder / "model", shape, exits=exits, exit_head=exit_head, num_labels=num_labels
    )
    export_classifier(
        model,
        folder / "exported",
        precision=precision,
        merge_exits=merge_exits,
        count_macs=segment_macs,
    )
    return folder / "exported"


def open_export_backend(folder: Path, threads: int) -> OnnxBackend:
    """The backend of an exported folder."""
    return OnnxBackend(folder, Manifest.read(folder), threads=threads)
