"""The words of a text that may be replaced, by their places in it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_HAN_ONLY = re.compile(f"[{_HAN}]+")
# Addresses come first, so that no part of them is taken for a word.
_RUN = re.compile(rf"(?:https?://|www\.)\S+|\S+@\S+\.\w+|[@#]\w+|(?P<word>(?:[^\W{_HAN}]|[\u0300-\u036f])+)")

_ENGLISH = (
    "a about above after again against all also am an and any are as at be because been before being below "
    "between both but by can cannot could did do does doing down during each either else few for from further "
    "had has have having he her here hers herself him himself his how however i if in into is it its itself "
    "just may me might more most must my myself neither no nobody none nor not nothing of off on once one only "
    "or other ought our ours ourselves out over own per same shall she should so some such than that the their "
    "theirs them themselves then there these they this those though through thus to too under until up upon us "
    "very was we were what when where whether which while who whom whose why will with without would yet you "
    "your yours yourself yourselves"
)
# What stands before and behind the apostrophe of "don't", "we'll", "it's".
_APOSTROPHE_PARTS = (
    "ain aren couldn didn doesn don hadn hasn haven isn ll mightn mustn needn nt re shouldn ve wasn weren won "
    "wouldn"
)
_CHINESE = (
    "的 了 是 不 没 无 非 在 和 与 或 而 也 都 就 很 这 那 我 你 他 她 它 们 吗 呢 吧 啊 之 其 把 被 "
    "我们 你们 他们 没有 不是"
)
STOP_WORDS = frozenset(f"{_ENGLISH} {_APOSTROPHE_PARTS} {_CHINESE}".split())
"""Words that carry a sentence's structure or negate it; in small letters."""


class Word(NamedTuple):
    """A word at text[start:end]; `token` is its place among the text's tokens, None if it has several pieces."""

    start: int
    end: int
    token: int | None


def is_han(text: str) -> bool:
    """Whether the text is made of Han characters alone, one or more."""
    return _HAN_ONLY.fullmatch(text) is not None


def find_words(
    text: str, offsets: Sequence[tuple[int, int]], whole: Sequence[bool], *, skip_stop_words: bool
) -> list[Word]:
    """The replaceable words of a text, in order.

    A word is a run of letters, at least two, not in an address, a @name or a #tag. Where Han characters are
    written, it is one piece of the tokenizer: a character with BERT's Chinese tokenizers, often several with
    sentencepiece's. Words behind the last token are left out.

    Args:
        text: the text.
        offsets: start and end of each token in it; white space around a token does not matter.
        whole: whether the token stands for letters: false for special and unknown tokens.
        skip_stop_words: leave out `STOP_WORDS`.
    """
    places: dict[tuple[int, int], int] = {}
    covered = 0
    words = []
    for token, ((start, end), stands_for_letters) in enumerate(zip(offsets, whole, strict=True)):
        covered = max(covered, end)
        piece = text[start:end].strip()
        if not stands_for_letters or not piece:
            continue
        begin = text.index(piece, start)
        if not is_han(piece):
            places[begin, begin + len(piece)] = token
        elif not (skip_stop_words and piece in STOP_WORDS):
            words.append(Word(begin, begin + len(piece), token))
    for match in _RUN.finditer(text):
        run = match["word"]
        if run is None or len(run) < 2 or match.end() > covered or not _is_letters(run):
            continue
        if not (skip_stop_words and run.casefold() in STOP_WORDS):
            words.append(Word(*match.span(), places.get(match.span())))
    return sorted(words, key=lambda word: word.start)


def _is_letters(run: str) -> bool:
    return all(character.isalpha() or "\u0300" <= character <= "\u036f" for character in run)


def in_case_of(word: str, candidate: str) -> str:
    """The candidate in capitals, with a capital or in small letters, as the word is written."""
    if len(word) > 1 and word.isupper():
        return candidate.upper()
    if word[:1].isupper():
        return candidate[:1].upper() + candidate[1:]
    return candidate.lower() if word.islower() else candidate
