"""What an augmentation can be told."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class AugmentationOptions(BaseModel):
    """Options of `augment`; the defaults are TinyBERT's (Jiao et al. 2020, section 4.1, there p_t, N_a and K).

    Attributes:
        copies: varied copies of each row; of a pair, of each of its two texts.
        probability: chance of a word in a copy to be replaced, in (0, 1].
        candidates: words that a replacement is drawn from, at most.
        context: what the masked model reads: the text with the masked word ("single"), or that and the
            unchanged text as a second segment ("pair"), which costs twice as much.
        max_length: tokens of a text that the masked model reads; words behind them stay as they are.
        skip_stop_words: leave function words such as "the" or "not" in their places, and put none in others'.
        bf16: run the masked model in bfloat16, about twice as fast where the hardware has it. Its rounding, and
            with it the batch size, may swap the least likely candidates.
        seed: of all draws.

    Examples:
        >>> from alembert.data.augmentation import AugmentationOptions
        >>> AugmentationOptions(copies=5).probability
        0.4
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    copies: int = Field(20, ge=1)
    probability: float = Field(0.4, gt=0, le=1)
    candidates: int = Field(15, ge=1)
    context: Literal["single", "pair"] = "single"
    max_length: int = Field(128, ge=8)
    skip_stop_words: bool = True
    bf16: bool = False
    seed: int = Field(42, ge=0)
