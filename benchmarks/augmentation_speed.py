"""How much faster batched augmentation is than one masked word at a time.

The reference does what TinyBERT's published code does: for every word of one piece a forward pass of its own, of
the text with the masked word and the unchanged text as a second segment, scored at every position; for every other
word the cosines with all word vectors, sorted. Both find the same words and draw the same number of copies.
`reference_single` is the same without the second segment. `single_fp32` and the like are Alembert's, by context
and precision; the bfloat16 ones, which `alembert augment` uses, run where the hardware has it.

Candidates take turns within every repetition, on the same rows, so that a busy machine slows all of them alike.

    python benchmarks/augmentation_speed.py --data sst2/ --model MASKED_LM --vectors glove.txt --output speed.json
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alembert.common.files import write_json
from alembert.data import load_task
from alembert.data.augmentation import AugmentationOptions, WordVectors, load_word_vectors
from alembert.data.augmentation.candidates import CandidateFinder, Replacement
from alembert.data.augmentation.rows import varied_rows
from alembert.data.augmentation.vocabulary import PieceVocabulary
from alembert.data.augmentation.words import STOP_WORDS, find_words
from alembert.models.loading import load_masked_lm, load_tokenizer
from alembert.training.settings import bf16_pays


class OneWordAtATime:
    """The reference: a forward pass per word, and a sorted list of all cosines per word of several pieces."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        vectors: WordVectors,
        options: AugmentationOptions,
        pair: bool,
    ) -> None:
        self.model, self.tokenizer, self.vectors, self.options = model, tokenizer, vectors, options
        self.pair = pair
        vocabulary = PieceVocabulary(tokenizer, STOP_WORDS)
        self.surfaces, self.kinds = vocabulary.surfaces, vocabulary.kinds.tolist()
        self.places = {word: place for place, word in enumerate(vectors.words)}

    def __call__(self, texts: Sequence[str]) -> list[list[Replacement]]:
        return [self.replacements(text) for text in texts]

    def replacements(self, text: str) -> list[Replacement]:
        encoding = self.tokenizer(text, return_offsets_mapping=True, truncation=True, max_length=128)
        ids = encoding["input_ids"]
        whole = [token != self.tokenizer.unk_token_id and bool(self.surfaces[token]) for token in ids]
        found = []
        for word in find_words(text, encoding["offset_mapping"], whole, skip_stop_words=True):
            surface = text[word.start : word.end]
            candidates = self.near(surface) if word.token is None else self.predicted(ids, word.token)
            choices = [choice for choice in candidates if choice.casefold() != surface.casefold()]
            if choices:
                found.append(Replacement(word.start, word.end, tuple(choices[: self.options.candidates])))
        return found

    @torch.inference_mode()
    def predicted(self, ids: list[int], token: int) -> list[str]:
        masked = [*ids[:token], self.tokenizer.mask_token_id, *ids[token + 1 :]]
        inputs = {"input_ids": torch.tensor([masked + ids[1:] if self.pair else masked])}
        if self.pair and "token_type_ids" in self.tokenizer.model_input_names:
            inputs["token_type_ids"] = torch.tensor([[0] * len(masked) + [1] * (len(ids) - 1)])
        logits = self.model(**inputs).logits[0, token]
        likeliest = logits.argsort(descending=True)[: 4 * self.options.candidates].tolist()
        return [
            self.surfaces[index] for index in likeliest if self.kinds[index] == max(self.kinds[ids[token]], 1)
        ]

    def near(self, word: str) -> list[str]:
        place = self.places.get(word, self.places.get(word.lower()))
        if place is None:
            return []
        order = np.argsort(-(self.vectors.vectors @ self.vectors.vectors[place]))
        return [self.vectors.words[other] for other in order[: self.options.candidates + 1] if other != place]


def measure(
    rows: Sequence[str],
    finders: dict[str, Callable[[Sequence[str]], list[list[Replacement]]]],
    vectors: WordVectors,
    options: AugmentationOptions,
    repeats: int,
) -> dict[str, list[float]]:
    """Seconds of each candidate in each repetition, from texts to varied rows."""
    seconds: dict[str, list[float]] = {name: [] for name in finders}
    for finder in finders.values():
        finder(rows[:2])
    for _ in range(repeats):
        for name, finder in finders.items():
            vectors._known.clear()
            start = time.perf_counter()
            for text, replacements in zip(rows, finder(rows), strict=True):
                varied_rows([text], [replacements], options)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def main(command_line: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="a task: a folder or a file")
    parser.add_argument("--model", required=True, help="a model for masked language modelling")
    parser.add_argument("--vectors", required=True, type=Path, help="word vectors in GloVe's text format")
    parser.add_argument("--rows", type=int, default=48, help="texts, the first of the train split")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions of every measurement")
    parser.add_argument("--batch-size", type=int, default=64, help="masked texts in a forward pass")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of torch")
    parser.add_argument("--output", help="JSON file to write")
    arguments = parser.parse_args(command_line)
    torch.set_num_threads(arguments.threads)

    rows: list[str] = load_task(arguments.data).dataset("train")[: arguments.rows]["text"]
    model, tokenizer = load_masked_lm(arguments.model), load_tokenizer(arguments.model)
    vectors = load_word_vectors(arguments.vectors)
    options = AugmentationOptions()
    finders: dict[str, Any] = {
        "reference": OneWordAtATime(model, tokenizer, vectors, options, pair=True),
        "reference_single": OneWordAtATime(model, tokenizer, vectors, options, pair=False),
    }
    for context in ("single", "pair"):
        for precision in ("fp32", "bf16") if bf16_pays() else ("fp32",):
            chosen = options.model_copy(update={"context": context, "bf16": precision == "bf16"})
            finders[f"{context}_{precision}"] = CandidateFinder(
                model, tokenizer, vectors, chosen, arguments.batch_size
            )
    words = [replacement for found in finders["single_fp32"](rows) for replacement in found]
    seconds = measure(rows, finders, vectors, options, arguments.repeats)

    table = Table(
        "candidate", "words/s", "× reference", "quartiles", title=f"{len(rows)} texts, {len(words)} words"
    )
    results = {}
    for name, times in seconds.items():
        low, middle, high = np.percentile(np.array(seconds["reference"]) / np.array(times), [25, 50, 75])
        results[name] = {
            "median_seconds": float(np.median(times)),
            "words_per_second": len(words) / float(np.median(times)),
            "times_faster": float(middle),
            "times_faster_quartiles": [float(low), float(high)],
        }
        speed = f"{results[name]['words_per_second']:.1f}"
        table.add_row(name, speed, f"{middle:.2f}", f"{low:.2f}–{high:.2f}")
    Console().print(table)
    if arguments.output:
        result = {
            "machine": {
                "processor": platform.processor() or platform.machine(),
                "threads": arguments.threads,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "data": Path(arguments.data).name,
            "model": Path(arguments.model).name,
            "rows": len(rows),
            "words": len(words),
            "repeats": arguments.repeats,
            "batch_size": arguments.batch_size,
            "candidates": results,
        }
        write_json(arguments.output, result)


if __name__ == "__main__":
    main()
