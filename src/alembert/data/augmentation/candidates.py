"""What each word of a text may be replaced by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from alembert.data.augmentation.options import AugmentationOptions
from alembert.data.augmentation.predictions import logits_at
from alembert.data.augmentation.vectors import WordVectors
from alembert.data.augmentation.vocabulary import PieceVocabulary
from alembert.data.augmentation.words import STOP_WORDS, Word, find_words, in_case_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Replacement(NamedTuple):
    """text[start:end] may be replaced by any of `choices`, which are sorted and at least one."""

    start: int
    end: int
    choices: tuple[str, ...]


class _Masking(NamedTuple):
    """A word to be masked: the text and the word by their places in lists, the token by its place in the text."""

    text: int
    word: int
    token: int


class CandidateFinder:
    """Finds replacements for the words of texts (Jiao et al. 2020, Algorithm 1).

    Words of one piece are masked, one at a time, and get the words that the model finds most likely; the
    others get their nearest neighbours among the word vectors.

    Args:
        model: a model for masked language modelling; used as it is, on its device.
        tokenizer: the model's.
        vectors: None leaves words of several pieces in their places.
        options: see there.
        batch_size: masked texts in a forward pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        vectors: WordVectors | None,
        options: AugmentationOptions,
        batch_size: int,
    ) -> None:
        self._model, self._tokenizer, self._vectors = model, tokenizer, vectors
        self._options, self._batch_size = options, batch_size
        positions = int(getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length)
        # Some families number positions from 2 on.
        self._max_tokens = min(positions - 2, tokenizer.model_max_length)
        self._excluded = STOP_WORDS if options.skip_stop_words else frozenset()
        self._vocabulary = PieceVocabulary(tokenizer, self._excluded)
        # A model may score fewer or more ids than the tokenizer knows.
        kinds = torch.zeros(model.config.vocab_size, dtype=torch.int64)
        shared = min(len(kinds), len(self._vocabulary.kinds))
        kinds[:shared] = self._vocabulary.kinds[:shared]
        self._kinds = kinds.to(model.device)

    def __call__(self, texts: Sequence[str]) -> list[list[Replacement]]:
        """The replacements of each text, in the order of its words, which do not overlap."""
        encodings = self._encode(texts)
        words = [
            self._words(text, encodings, place) if text.strip() else [] for place, text in enumerate(texts)
        ]
        maskings = [
            _Masking(place, index, word.token)
            for place, text_words in enumerate(words)
            for index, word in enumerate(text_words)
            if word.token is not None
        ]
        predicted = self._predict(encodings, maskings)
        written = [
            [text[word.start : word.end] for word in found] for text, found in zip(texts, words, strict=True)
        ]
        near = self._neighbours(written, words)
        result = []
        for place, text_words in enumerate(words):
            replacements = []
            for index, word in enumerate(text_words):
                surface = written[place][index]
                candidates = near.get(surface, ()) if word.token is None else predicted[place, index]
                choices = self._choices(surface, candidates)
                if choices:
                    replacements.append(Replacement(word.start, word.end, choices))
            result.append(replacements)
        return result

    def _encode(self, texts: Sequence[str]) -> Any:
        pair = self._options.context == "pair"
        return self._tokenizer(
            list(texts),
            list(texts) if pair else None,
            truncation=True,
            max_length=min(self._options.max_length * (1 + pair), self._max_tokens),
            return_offsets_mapping=True,
        )

    def _words(self, text: str, encodings: Any, place: int) -> list[Word]:
        ids, sequences = encodings["input_ids"][place], encodings.sequence_ids(place)
        surfaces, unknown = self._vocabulary.surfaces, self._tokenizer.unk_token_id
        first = [sequence == 0 for sequence in sequences]
        offsets = [
            span if kept else (0, 0)
            for span, kept in zip(encodings["offset_mapping"][place], first, strict=True)
        ]
        whole = [
            kept and token != unknown and bool(surfaces[token])
            for token, kept in zip(ids, first, strict=True)
        ]
        return find_words(text, offsets, whole, skip_stop_words=self._options.skip_stop_words)

    def _neighbours(self, written: list[list[str]], words: list[list[Word]]) -> dict[str, tuple[str, ...]]:
        if self._vectors is None:
            return {}
        several = (
            surface
            for surfaces, found in zip(written, words, strict=True)
            for surface, word in zip(surfaces, found, strict=True)
            if word.token is None
        )
        return self._vectors.neighbours(several, self._options.candidates)

    @torch.inference_mode()
    def _predict(self, encodings: Any, maskings: list[_Masking]) -> dict[tuple[int, int], list[str]]:
        predicted: dict[tuple[int, int], list[str]] = {}
        lengths = [len(ids) for ids in encodings["input_ids"]]
        ordered = sorted(maskings, key=lambda masking: lengths[masking.text])
        for start in range(0, len(ordered), self._batch_size):
            batch = ordered[start : start + self._batch_size]
            inputs, kinds = self._inputs(encodings, batch)
            rows = torch.arange(len(batch), device=self._model.device)
            columns = torch.tensor([masking.token for masking in batch], device=self._model.device)
            with torch.autocast(self._model.device.type, torch.bfloat16, enabled=self._options.bf16):
                logits = logits_at(self._model, inputs, rows, columns).float()
            for masking, surfaces in zip(batch, self._likeliest(logits, kinds), strict=True):
                predicted[masking.text, masking.word] = surfaces
        return predicted

    def _inputs(self, encodings: Any, batch: list[_Masking]) -> tuple[dict[str, Tensor], Tensor]:
        """The padded batch with its masks, and the kind of piece that stood under each mask."""
        names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in encodings]
        padded = self._tokenizer.pad(
            {name: [encodings[name][masking.text] for masking in batch] for name in names},
            return_tensors="pt",
        )
        rows = torch.arange(len(batch))
        columns = torch.tensor([masking.token for masking in batch])
        kinds = self._vocabulary.kinds[padded["input_ids"][rows, columns]]
        # A word behind a bracket, say, starts without the mark of a word's start; words are wanted all the same.
        kinds = kinds.clamp(min=1)
        padded["input_ids"][rows, columns] = self._tokenizer.mask_token_id
        device = self._model.device
        return {name: padded[name].to(device) for name in names}, kinds.to(device)

    def _likeliest(self, logits: Tensor, kinds: Tensor) -> Iterable[list[str]]:
        """For each row of logits, words of the kind in that row, the likeliest first, more than are wanted."""
        logits = logits.masked_fill(self._kinds != kinds.unsqueeze(1), -torch.inf)
        # The word itself is among them, and the same word in other cases of letters.
        count = min(2 * self._options.candidates + 4, logits.shape[1])
        values, ids = logits.topk(count, dim=1)
        for row, possible in zip(ids.tolist(), values.isfinite().tolist(), strict=True):
            yield [
                self._vocabulary.surfaces[index] for index, kept in zip(row, possible, strict=True) if kept
            ]

    def _choices(self, surface: str, candidates: Iterable[str]) -> tuple[str, ...]:
        distinct: dict[str, str] = {}
        for candidate in candidates:
            key = candidate.casefold()
            if key != surface.casefold() and key not in self._excluded:
                distinct.setdefault(key, in_case_of(surface, candidate))
        # Sorted, so that rounding which swaps two candidates changes nothing.
        return tuple(sorted(list(distinct.values())[: self._options.candidates]))
