"""Texts to token ids, on disk, once."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from datasets import Dataset, Features, List, Value

from alembert.common.errors import InputError
from alembert.data.cache import cache_path, fingerprint_of, quiet_unless_terminal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenise(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Tokenises "text" (and "text_pair"), truncating the longer text first to `max_length` tokens.

    The result lies on disk and is found again by a fingerprint of the data, the tokenizer's content and
    `max_length`, so that the same call, also in another process, does not tokenise again.

    Args:
        dataset: a split of a `Task`: columns "text", optionally "text_pair" and "labels".
        tokenizer: its padding and truncation settings do not matter and are left as they are.
        max_length: tokens per row, those that the tokenizer adds included.

    Returns:
        A data set with "input_ids" and whatever else the tokenizer gives ("attention_mask",
        "token_type_ids"), lists of ints without padding; "length", the number of tokens; and "labels" as
        they were.

    Raises:
        InputError: `max_length` leaves no room for text.
    """
    is_pair = "text_pair" in dataset.column_names
    added = tokenizer.num_special_tokens_to_add(pair=is_pair)
    if max_length <= added:
        raise InputError(
            f"max_length {max_length} leaves no room for text: {added} special tokens are added."
        )
    outputs = [
        name
        for name in ("input_ids", "attention_mask", "token_type_ids")
        if name in tokenizer_outputs(tokenizer)
    ]

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        encoding = tokenizer(
            batch["text"], batch.get("text_pair"), truncation=True, max_length=max_length, padding=False
        )
        columns = {name: encoding[name] for name in outputs}
        return columns | {"length": [len(ids) for ids in encoding["input_ids"]]}

    kept = {name: feature for name, feature in dataset.features.items() if name == "labels"}
    types = {name: List(Value("int32" if name == "input_ids" else "int8")) for name in outputs}
    fingerprint = fingerprint_of(
        dataset._fingerprint, tokenizer_content(tokenizer), outputs, max_length, sorted(dataset.features)
    )
    with quiet_unless_terminal():
        return dataset.map(
            encode,
            batched=True,
            remove_columns=[name for name in dataset.column_names if name not in kept],
            features=Features(kept | types | {"length": Value("int32")}),
            cache_file_name=str(cache_path(f"tokens-{fingerprint}")),
            load_from_cache_file=True,
            new_fingerprint=fingerprint,
            desc="Tokenising",
        )


def tokenizer_outputs(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The names of what a tokenizer gives for a text."""
    return {"input_ids", "attention_mask", *tokenizer.model_input_names}


def tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> str:
    """All that token ids depend on, as JSON."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content: Any = [type(tokenizer).__name__, tokenizer.get_vocab(), tokenizer.init_kwargs]
    else:
        # A call with padding or truncation leaves its settings behind in the backend.
        content = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    return json.dumps([content, tokenizer.truncation_side], sort_keys=True, default=str)
