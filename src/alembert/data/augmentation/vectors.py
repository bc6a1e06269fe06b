"""Word vectors in GloVe's text format, and the nearest neighbours among them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.neighbors import NearestNeighbors

from alembert.common.errors import InputError
from alembert.common.files import file_sha256
from alembert.data.reading import at

Matrix = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True, eq=False)
class WordVectors:
    """Words and their vectors, normalised to length 1.

    Attributes:
        words: distinct words of letters alone.
        vectors: (words, dimensions), float32.
        content_key: text that changes when the content does.
    """

    words: tuple[str, ...]
    vectors: Matrix
    content_key: str
    _known: dict[tuple[str, int], tuple[str, ...]] = field(default_factory=dict, repr=False)

    def neighbours(self, words: Iterable[str], count: int) -> dict[str, tuple[str, ...]]:
        """For each word that has a vector, as written or in small letters, the `count` nearest others by cosine.

        The nearest stands first; fewer are given if there are no more.
        """
        places = {word: self._place(word) for word in dict.fromkeys(words)}
        there = {word: place for word, place in places.items() if place is not None}
        new = [(word, place) for word, place in there.items() if (word, count) not in self._known]
        if new:
            found = self._index.kneighbors(
                self.vectors[[place for _, place in new]],
                n_neighbors=min(count + 1, len(self.words)),
                return_distance=False,
            )
            for (word, own), row in zip(new, found, strict=True):
                others = [self.words[place] for place in row if place != own]
                self._known[word, count] = tuple(others[:count])
        return {word: self._known[word, count] for word in there}

    def _place(self, word: str) -> int | None:
        return self._places.get(word, self._places.get(word.lower()))

    @cached_property
    def _places(self) -> dict[str, int]:
        return {word: place for place, word in enumerate(self.words)}

    @cached_property
    def _index(self) -> NearestNeighbors:
        # Among vectors of length 1 the order by distance is the order by cosine, and scikit-learn is faster at it.
        return NearestNeighbors(algorithm="brute", metric="euclidean").fit(self.vectors)


def load_word_vectors(path: str | Path, max_vectors: int = 100_000) -> WordVectors:
    """Reads the first `max_vectors` lines: a word, then its numbers, separated by single spaces.

    Words with other characters than letters are passed over, as are repeated words and vectors of zeros. A
    first line of two counts, as word2vec writes, is skipped.

    Raises:
        InputError: the file is missing or empty, or a line is malformed; names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file of word vectors.")
    words: dict[str, None] = {}
    rows: list[Matrix] = []
    width = 0
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if number > max_vectors:
                break
            fields = line.rstrip("\r\n ").split(" ")
            if number == 1 and len(fields) == 2 and all(field.isdecimal() for field in fields):
                continue
            width = width or len(fields) - 1
            # Some tokens of published files hold spaces themselves; no word of letters does.
            surplus = len(fields) - 1 - width
            vector = _numbers(str(path), number, fields[1 + max(surplus, 0) :], width)
            word = fields[0]
            length = float(np.linalg.norm(vector))
            if surplus == 0 and word.isalpha() and word not in words and length > 0:
                words[word] = None
                rows.append(vector / length)
    if len(words) < 2:
        raise InputError(
            f"{path}: fewer than two words of letters with vectors; is this GloVe's text format?"
        )
    return WordVectors(tuple(words), np.stack(rows), f"{file_sha256(path)}-{max_vectors}")


def _numbers(source: str, line: int, fields: list[str], width: int) -> Matrix:
    if width < 1 or len(fields) != width:
        expected = f"{width} as in the lines before" if width else "at least one"
        raise InputError(
            f"{at(source, line)}: {len(fields)} numbers behind the word, not {expected}; each line must be a word "
            "and its numbers, separated by single spaces."
        )
    try:
        vector = np.array(fields, dtype=np.float32)
    except ValueError as error:
        raise InputError(f"{at(source, line)}: not a number in a word vector ({error}).") from None
    if not np.isfinite(vector).all():
        raise InputError(f"{at(source, line)}: a word vector must have finite numbers.")
    return vector
