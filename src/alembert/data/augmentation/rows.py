"""Varied copies of rows, drawn from the replacements of their words."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from alembert.data.augmentation.candidates import Replacement
from alembert.data.augmentation.options import AugmentationOptions


def varied_rows(
    texts: Sequence[str], replacements: Sequence[Sequence[Replacement]], options: AugmentationOptions
) -> list[tuple[str, ...]]:
    """The row itself and its varied copies, each once.

    Of a pair, one text is varied at a time, beside the other as it was. The draws depend on the seed and the
    row's texts alone: neither on other rows nor on the order in which rows come.

    Args:
        texts: the text, or the two texts of a pair.
        replacements: those of each text.
    """
    rows = [tuple(texts)]
    digest = hashlib.sha256("\0".join(texts).encode()).digest()
    for place, text in enumerate(texts):
        generator = np.random.default_rng(
            [options.seed, place, *np.frombuffer(digest, dtype=np.uint32).tolist()]
        )
        for copy in varied_copies(text, replacements[place], options, generator):
            rows.append((*texts[:place], copy, *texts[place + 1 :]))
    return list(dict.fromkeys(rows))


def varied_copies(
    text: str,
    replacements: Sequence[Replacement],
    options: AugmentationOptions,
    generator: np.random.Generator,
) -> list[str]:
    """`copies` texts in which each word is replaced with `probability` by a choice that is drawn evenly."""
    replaced = generator.random((options.copies, len(replacements))) < options.probability
    drawn = generator.random((options.copies, len(replacements)))
    copies = []
    for here, draws in zip(replaced.tolist(), drawn.tolist(), strict=True):
        parts = []
        end = 0
        for replacement, chosen, draw in zip(replacements, here, draws, strict=True):
            if chosen:
                choices = replacement.choices
                parts += [text[end : replacement.start], choices[int(draw * len(choices))]]
                end = replacement.end
        copies.append("".join([*parts, text[end:]]))
    return copies
