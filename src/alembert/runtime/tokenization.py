"""Texts to token ids: by the tokenizers library alone, or by transformers. Both give the same ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol, cast

from alembert.common.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

EncodedText = dict[str, list[int]]
"""Unpadded `input_ids` and, where the model reads them, `token_type_ids` of one text or pair."""

_CHARACTERS_AT_ONCE = 1_000_000
"""Tokenised together: until the ids are copied, a text holds many times its size, the part cut off included."""


class TextEncoder(Protocol):
    """Tokenises texts.

    Attributes:
        fill: what rows are filled up with, by the name of the array: `input_ids` and, where the model reads them,
            `token_type_ids`.
    """

    fill: dict[str, int]

    def encode(self, columns: Sequence[Sequence[str]], max_length: int) -> list[EncodedText]:
        """Token ids of texts (one column) or pairs (two columns), each cut to `max_length` tokens.

        Of a pair the longer text is cut first.
        """
        ...

    def added_tokens(self, is_pair: bool) -> int:
        """How many special tokens a text or pair gets."""
        ...


class TransformersEncoder:
    """A tokenizer of transformers."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.fill = {
            "input_ids": cast(int, tokenizer.pad_token_id),
            "token_type_ids": int(tokenizer.pad_token_type_id),
        }

    def encode(self, columns: Sequence[Sequence[str]], max_length: int) -> list[EncodedText]:
        """As `TextEncoder.encode`."""
        encoded: list[EncodedText] = []
        for part in _parts(columns):
            encoding = self._tokenizer(*part, truncation=True, max_length=max_length, padding=False)
            names = [name for name in self.fill if name in encoding]
            encoded += (
                dict(zip(names, values, strict=True))
                for values in zip(*(encoding[name] for name in names), strict=True)
            )
        return encoded

    def added_tokens(self, is_pair: bool) -> int:
        """As `TextEncoder.added_tokens`."""
        return int(self._tokenizer.num_special_tokens_to_add(is_pair))


class TokenizersEncoder:
    """A tokenizer.json, without transformers.

    Args:
        folder: holds tokenizer.json.
        reads_token_types: whether the model reads token types.
        pad_token_id, pad_token_type_id: what rows are filled up with.
        truncation_side: end at which longer texts are cut, "right" or "left".

    Raises InputError when the file is no tokenizer.
    """

    def __init__(
        self,
        folder: Path,
        *,
        reads_token_types: bool,
        pad_token_id: int,
        pad_token_type_id: int,
        truncation_side: str,
    ) -> None:
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        try:
            self.tokenizer: Tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for a broken file
            raise InputError(
                f"{path}: no tokenizer could be read ({error}): copy the whole folder again"
            ) from error
        self._cut_from = truncation_side
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self._max_length: int | None = None
        self._changing = Lock()
        self.fill = {"input_ids": pad_token_id}
        if reads_token_types:
            self.fill["token_type_ids"] = pad_token_type_id

    def cut_to(self, max_length: int) -> None:
        """Cuts texts to so many tokens from now on; while others encode, some versions of the library refuse it."""
        with self._changing:
            self.tokenizer.enable_truncation(max_length, strategy="longest_first", direction=self._cut_from)
            self._max_length = max_length

    def encode(self, columns: Sequence[Sequence[str]], max_length: int) -> list[EncodedText]:
        """As `TextEncoder.encode`."""
        if max_length != self._max_length:
            self.cut_to(max_length)
        encoded: list[EncodedText] = []
        for part in _parts(columns):
            inputs: Any = part[0] if len(part) == 1 else list(zip(*part, strict=True))
            # The fast variant leaves out the characters' offsets, which nobody reads.
            encodings = self.tokenizer.encode_batch_fast(inputs)
            if "token_type_ids" in self.fill:
                encoded += ({"input_ids": one.ids, "token_type_ids": one.type_ids} for one in encodings)
            else:
                encoded += ({"input_ids": one.ids} for one in encodings)
        return encoded

    def added_tokens(self, is_pair: bool) -> int:
        """As `TextEncoder.added_tokens`."""
        return int(self.tokenizer.num_special_tokens_to_add(is_pair))


def _parts(columns: Sequence[Sequence[str]]) -> Iterator[list[list[str]]]:
    """The same columns in parts of consecutive rows that are tokenised together; a longer row is a part alone."""
    first = characters = 0
    # To count takes long beside a short text that comes alone.
    sizes = zip(*(map(len, column) for column in columns), strict=True) if len(columns[0]) > 1 else ()
    for row, lengths in enumerate(sizes):
        characters += sum(lengths)
        if characters > _CHARACTERS_AT_ONCE and row > first:
            yield [list(column[first:row]) for column in columns]
            first, characters = row, sum(lengths)
    yield [list(column[first:]) for column in columns]
