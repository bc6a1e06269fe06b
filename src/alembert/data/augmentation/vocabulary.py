"""Which pieces of a tokenizer's vocabulary are words by themselves."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alembert.common.errors import InputError
from alembert.data.augmentation.words import is_han

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WORD_START = ("▁", "Ġ")
"""How sentencepiece's and byte-level tokenizers mark a piece that starts a word."""


class PieceVocabulary:
    """The pieces of a WordPiece, sentencepiece or byte-level tokenizer as words.

    Attributes:
        surfaces: by id, the piece as it is written in a text; "" for special tokens and bare marks.
        kinds: by id, 0 for what is no word, 1 for a word of two letters or more, 1 + n for n Han characters.

    Args:
        tokenizer: with a mask token.
        excluded: words, in small letters, whose kind is to be 0.

    Raises:
        InputError: the tokenizer has no mask token, or gives no places of tokens in the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, excluded: Collection[str] = ()) -> None:
        if tokenizer.mask_token_id is None:
            raise InputError("The tokenizer has no mask token, so its model predicts no masked words.")
        if not tokenizer.is_fast:
            raise InputError("The tokenizer gives no offsets; use one with a tokenizer.json.")
        # Some ids may have no piece.
        piece_of = {index: piece for piece, index in tokenizer.get_vocab().items()}
        pieces = [piece_of.get(index, "") for index in range(max(piece_of) + 1)]
        special = set(tokenizer.all_special_ids)
        marked = {mark: sum(piece.startswith(mark) for piece in pieces) for mark in ("##", *_WORD_START)}
        mark = max(marked, key=lambda mark: marked[mark]).replace("##", "")
        decoder = tokenizer.backend_tokenizer.decoder
        self.surfaces: list[str] = []
        kinds = []
        for index, piece in enumerate(pieces):
            starts = piece.startswith(mark) if mark else not piece.startswith("##")
            surface = piece.removeprefix("##")
            if mark:
                # Bytes stand for characters of their own in byte-level vocabularies.
                surface = (decoder.decode([piece]) if mark == "Ġ" else piece.replace(mark, " ")).strip()
            self.surfaces.append("" if index in special else surface)
            is_word = index not in special and surface.casefold() not in excluded
            kinds.append(_kind(surface, starts, bool(mark)) if is_word else 0)
        self.kinds: Tensor = torch.tensor(kinds)


def _kind(surface: str, starts: bool, has_mark: bool) -> int:
    if is_han(surface):
        return 1 + len(surface) if starts or has_mark else 0
    is_word = starts and len(surface) > 1 and surface.isalpha()
    return int(is_word and not any(is_han(character) for character in surface))
