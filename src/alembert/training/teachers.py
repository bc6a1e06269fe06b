"""Where a teacher's features come from: its forward pass, or files written once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from alembert.common.errors import InputError
from alembert.models.capture import capture
from alembert.models.features import FeatureRequest, Features

if TYPE_CHECKING:
    from alembert.training.teacher_cache import TeacherCache


class Teacher(Protocol):
    """Gives the features that an objective reads of the teacher, without gradients."""

    def __call__(self, inputs: Mapping[str, Tensor], rows: Tensor | None) -> Features:
        """The features of a batch.

        Args:
            inputs: `input_ids` and what else the tokenizer gives, (B, n).
            rows: (B,) int64, numbers of the rows in the data set; teachers that look nothing up ignore them.
        """
        ...


class LiveTeacher:
    """Runs the teacher on every batch, always in evaluation mode and without gradients.

    Args:
        model: its parameters are fixed for good.
        request: the features wanted.
    """

    def __init__(self, model: PreTrainedModel, request: FeatureRequest) -> None:
        self.model, self.request = model.eval().requires_grad_(False), request

    def to(self, device: torch.device | str) -> Self:
        """Moves the teacher's weights; returns itself."""
        self.model.to(device)
        return self

    def __call__(self, inputs: Mapping[str, Tensor], rows: Tensor | None = None) -> Features:
        # Others hold the model too, and may have switched dropout on.
        self.model.eval()
        with torch.no_grad():
            return capture(self.model, inputs, self.request)


class CachedTeacher:
    """Looks a batch's features up in a `TeacherCache`.

    Args:
        cache: holds everything of `request`.
        request: the features wanted.
        logits: whether the logits are wanted too.
    """

    def __init__(self, cache: TeacherCache, request: FeatureRequest, *, logits: bool = True) -> None:
        self.cache, self.request, self.logits = cache, request, logits

    def __call__(self, inputs: Mapping[str, Tensor], rows: Tensor | None) -> Features:
        """The features as float32 on the inputs' device, zero where there is padding.

        Raises:
            InputError: `rows` is missing, or a row has another length here than in the cache.
        """
        if rows is None:
            raise InputError("a cached teacher needs the numbers of the rows, but the batch has none")
        return self.cache.read(self.request, rows, inputs["attention_mask"], logits=self.logits)
