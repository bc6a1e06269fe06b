"""Optimiser, duration and hardware settings of a stage."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from alembert.common.errors import InputError


class TrainingSettings(BaseModel):
    """Settings of one training stage; the names follow transformers' TrainingArguments where they match.

    Attributes:
        epochs: passes over the training split.
        batch_size: texts per optimiser step, over all processes and accumulated steps.
        gradient_accumulation_steps: parts that a batch is run in, to save memory.
        learning_rate: peak rate of AdamW.
        head_learning_rate: peak rate of what stands outside the encoder: the task's head, exits, and an objective's own
            weights, which begin at random; None = learning_rate.
        weight_decay: AdamW's decoupled weight decay.
        warmup_ratio: share of the steps with rising learning rate.
        scheduler: transformers' scheduler type after warm-up; `constant` has none, `constant_with_warmup` does.
        max_grad_norm: gradients are clipped to this norm; 0 turns clipping off.
        max_length: longer texts are cut to this many tokens.
        group_by_length: batches of similar lengths, so that little is padded.
        bf16: autocast to bfloat16; None = where the hardware has it.
        evaluate_every_epoch: measure the dev split after each epoch and keep the best epoch's weights.
        early_stopping_patience: stop after this many evaluations without gain; needs evaluate_every_epoch.
        checkpoint_steps: optimiser steps between checkpoints, beside one per evaluation; None = one per epoch,
            on plain text every 1000.
        max_minutes: the training ends, with the weights that it has, after the step in which all its stages together
            have taken this long, counted anew after a resume; None = it ends with its epochs.
        teacher_cache_dtype: of the numbers in a cache of the teacher's outputs; float16 ends at ±65504.
        seed: of initialisation, dropout and order of the data.

    Examples:
        >>> from alembert import TrainingSettings
        >>> TrainingSettings(epochs=1, batch_size=16).learning_rate
        2e-05
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: float = Field(3.0, gt=0)
    batch_size: int = Field(32, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    learning_rate: float = Field(2e-5, gt=0)
    head_learning_rate: float | None = Field(None, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    scheduler: Literal[
        "linear", "cosine", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
    ] = "linear"
    max_grad_norm: float = Field(1.0, ge=0)
    max_length: int = Field(128, ge=4)
    group_by_length: bool = True
    bf16: bool | None = None
    evaluate_every_epoch: bool = False
    early_stopping_patience: int | None = Field(None, ge=1)
    checkpoint_steps: int | None = Field(None, ge=1)
    max_minutes: float | None = Field(None, gt=0)
    # No part of a run's identity: the cache itself keeps it.
    teacher_cache_dtype: Literal["float16", "float32"] = Field("float16", exclude=True)
    seed: int = Field(42, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _patience_needs_evaluation(self) -> TrainingSettings:
        if self.early_stopping_patience is not None and not self.evaluate_every_epoch:
            raise ValueError("early_stopping_patience needs evaluate_every_epoch=true")
        return self

    def autocast_dtype(self) -> Literal["bf16", "fp32"]:
        """What the forward pass runs in, after looking at the hardware when `bf16` is None."""
        wanted = bf16_pays() if self.bf16 is None else self.bf16
        return "bf16" if wanted else "fp32"


def bf16_pays() -> bool:
    """Whether this machine multiplies bfloat16 matrices in hardware (CUDA from Ampere on, AVX512-BF16, AMX)."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


ModelT = TypeVar("ModelT", bound=BaseModel)


def validated(model: type[ModelT], values: dict[str, Any], what: str) -> ModelT:
    """`values` as a `model`; InputError names the first that does not exist or does not fit, as a `what`."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        fault = error.errors()[0]
        name = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            raise InputError(
                f"unknown {what} {name!r}: choose from {', '.join(model.model_fields)}"
            ) from error
        raise InputError(f"{what} {name}={fault['input']!r}: {fault['msg'].lower()}") from error
