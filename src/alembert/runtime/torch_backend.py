"""Runs a multi-exit model layer by layer and keeps only the rows that go on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alembert.common.errors import InputError
from alembert.models.bilstm import BilstmForSequenceClassification
from alembert.models.layered import EncoderState
from alembert.models.loading import (
    check_max_length,
    classifier_facts,
    load_classifier,
    load_tokenizer,
    max_tokens,
    run_configuration,
)
from alembert.models.multi_exit import MultiExitModel
from alembert.runtime.backend import OpenedClassifier
from alembert.runtime.exited import ExitedBatch
from alembert.runtime.policies import ExitPolicy, PolicyHistory
from alembert.runtime.tokenization import TransformersEncoder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Types that a model can be run in, by the names that users give."""


def precision_of(dtype: str | None) -> str | None:
    """The name in `DTYPES` of a type such as "float32"; None for others, and where there is none."""
    return next((name for name, kind in DTYPES.items() if str(kind) == f"torch.{dtype}"), None)


def open_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    is_pair: bool | None = None,
    exits: Sequence[int] | None = None,
    device: str | torch.device | None = None,
    dtype: str | None = None,
    threads: int | None = None,
) -> OpenedClassifier:
    """A model of torch, ready to run.

    Args:
        model: a multi-exit or stock classifier, or a BiLSTM.
        tokenizer: the model's.
        max_length: texts are cut to this many tokens; None = the tokenizer's limit.
        is_pair: whether inputs are pairs of texts; None = either.
        exits: the layers whose exits are used; None = all.
        device: None = CUDA where there is one.
        dtype: "fp32" or "bf16"; None = as the model is.
        threads: of the processor, for the whole process; None leaves torch's setting.

    Raises InputError when texts of `max_length` tokens do not fit the model, it lacks one of the exits, or there is no
    such device or type.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    backend = TorchBackend(model, device, exits, dtype)
    longest = max_tokens(model, tokenizer) if max_length is None else max_length
    check_max_length(longest, model, tokenizer)
    config = model.config
    return OpenedClassifier(
        backend=backend,
        encoder=TransformersEncoder(tokenizer),
        facts=classifier_facts(model),
        max_length=longest,
        is_pair=is_pair,
        speed=getattr(config, "speed", None),
        policy=getattr(config, "policy", None),
        top_k=getattr(config, "top_k", None),
        tokenizer=tokenizer,
    )


def open_run(
    source: str | Path, *, max_length: int | None, is_pair: bool | None, **options: Any
) -> OpenedClassifier:
    """A run directory, a folder in Hugging Face layout or a hub id, ready to run; other options of `open_model`.

    What is None is as in training, where the folder is a run.
    """
    trained = run_configuration(source)
    if max_length is None:
        max_length = trained.get("settings", {}).get("max_length")
    if is_pair is None:
        is_pair = trained.get("task", {}).get("is_pair")
    return open_model(
        load_classifier(str(source)),
        load_tokenizer(str(source)),
        max_length=max_length,
        is_pair=is_pair,
        **options,
    )


class TorchBackend:
    """A multi-exit or stock classifier on any torch device.

    A BiLSTM has nowhere to leave: it is always run whole.

    Args:
        model: the model; it is moved to `device` and put in evaluation mode.
        device: None = CUDA where there is one, else the CPU.
        exits: the layers whose student exits are used; None = all that the model has.
        dtype: one of `DTYPES`, of the weights; None = as they are.

    Raises InputError when the model has no exit after one of `exits`, or there is no such device or type.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        device: str | torch.device | None = None,
        exits: Sequence[int] | None = None,
        dtype: str | None = None,
    ) -> None:
        self.device = _checked_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if dtype is not None and dtype not in DTYPES:
            raise InputError(f"precision {dtype!r}: choose one of {', '.join(DTYPES)}")
        if not isinstance(model, MultiExitModel | BilstmForSequenceClassification):
            model = MultiExitModel.from_full_model(model)
        self.model: PreTrainedModel = model.to(self.device).eval()
        if dtype is not None:
            self.model.to(DTYPES[dtype])
        self.dtype = str(self.model.dtype).removeprefix("torch.")
        self._layer_by_layer = model if isinstance(model, MultiExitModel) else None
        known = () if self._layer_by_layer is None else self._layer_by_layer.exit_layers
        self.exit_layers: tuple[int, ...] = known if exits is None else tuple(sorted(set(exits)))
        unknown = sorted(set(self.exit_layers) - set(known))
        if unknown:
            raise InputError(f"no exit after layer {unknown[0]}: the model's exits are {list(known)}")
        self.num_layers: int = (
            model.config.num_hidden_layers
            if self._layer_by_layer is None
            else self._layer_by_layer.num_layers
        )

    @torch.inference_mode()
    def run(self, batch: dict[str, np.ndarray], policy: ExitPolicy, speed: float) -> ExitedBatch:
        """Runs one padded batch: after each exit the rows with uncertainty < speed leave.

        Args:
            batch: input_ids, attention_mask and, for families that have them, token_type_ids; (rows, tokens) int64.
            policy: resolved for the model's labels.
            speed: in [0, 1]; at 0 no row can leave, so no exit is run and the full model answers.
        """
        inputs, model = self._inputs(batch), self._layer_by_layer
        if model is None:
            return self._run_whole(inputs, policy)
        layered = model.layered
        state = layered.embed(inputs["input_ids"], inputs.get("attention_mask"), inputs.get("token_type_ids"))
        rows = torch.arange(len(state.hidden_states), device=self.device)
        left = _Leavers()
        history: PolicyHistory | None = None
        for layer in range(1, self.num_layers):
            state = layered.run_layer(layer, state)
            if speed == 0 or layer not in self.exit_layers:
                continue
            probabilities, learned = _exit(model, layer, state, policy)
            uncertainty, history = policy.uncertainty(probabilities, history, learned)
            leaves = uncertainty < speed
            count, tokens = _staying(leaves, state.attention_mask)
            if count < len(rows):
                # Those that stay come first, each part in its order; nothing here waits for the device.
                order = leaves.byte().argsort(stable=True)
                staying, leaving = order[:count], order[count:]
                left.add(rows[leaving], probabilities[leaving], uncertainty[leaving], layer)
                if count == 0:
                    rows = rows[:0]
                    break
                rows = rows[staying]
                state = layered.select(state, staying, tokens)
                history = None if history is None else history.select(staying)
        if len(rows):
            state = layered.run_layer(self.num_layers, state)
            logits = model.final_logits(layered.output(state), state.attention_mask)
            probabilities = to_probabilities(logits, policy.problem_type)
            left.add(rows, probabilities, torch.full_like(probabilities[:, 0], torch.nan), self.num_layers)
        return left.in_order()

    @torch.inference_mode()
    def run_all_exits(self, batch: dict[str, np.ndarray]) -> tuple[Tensor, Tensor | None]:
        """Every used exit's logits (rows, exits, labels), full model last; learned uncertainties (rows, exits − 1)."""
        output = self.model(**self._inputs(batch))
        if self._layer_by_layer is None:
            return output.logits[:, None], None
        used = [self._layer_by_layer.exit_layers.index(layer) for layer in self.exit_layers]
        logits = output.logits[None]
        stacked = torch.cat([output.exit_logits[used], logits]) if used else logits
        learned = None if output.mistake_logits is None else output.mistake_logits[used].sigmoid().T
        return stacked.transpose(0, 1), learned

    @torch.inference_mode()
    def run_stock(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        """Logits (rows, labels) by transformers' own forward pass of the full model, the yardstick of all speed."""
        inputs, model = self._inputs(batch), self._layer_by_layer
        output = (self.model if model is None else model.full_model)(**inputs)
        head = None if model is None else model.final_head
        logits = output.logits if head is None else head(output.last_hidden_state, inputs["attention_mask"])
        # The copy waits for the device, so that its time counts as the adaptive run's does.
        return logits.float().cpu().numpy()  # type: ignore[no-any-return]

    def _run_whole(self, inputs: dict[str, Tensor], policy: ExitPolicy) -> ExitedBatch:
        probabilities = to_probabilities(self.model(**inputs).logits, policy.problem_type)
        rows = len(probabilities)
        return ExitedBatch(
            probabilities.cpu().numpy(), np.full(rows, self.num_layers), np.full(rows, np.nan, np.float32)
        )

    def _inputs(self, batch: dict[str, np.ndarray]) -> dict[str, Tensor]:
        return {name: torch.as_tensor(values, device=self.device) for name, values in batch.items()}


def _staying(leaves: Tensor, mask: Tensor) -> tuple[int, int]:
    """How many rows do not leave, and how many columns hold their tokens: all that the host must know of an exit.

    The one place where it waits for the device.
    """
    columns = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    ends = (mask * columns).amax(dim=1)
    stays = ~leaves
    count, tokens = torch.stack([stays.sum(), (ends * stays).max()]).tolist()
    return count, tokens


def _checked_device(device: str | torch.device) -> torch.device:
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        raise InputError(f"device {str(device)!r}: cannot be used here ({error})") from error
    return chosen


def _exit(
    model: MultiExitModel, layer: int, state: EncoderState, policy: ExitPolicy
) -> tuple[Tensor, Tensor | None]:
    hidden_states = model.layered.output(state)
    logits = model.exit_heads[str(layer)](hidden_states, state.attention_mask)
    learned = model.mistake_logits(hidden_states).sigmoid() if policy.name == "learned" else None
    return to_probabilities(logits, policy.problem_type), learned


class _Leavers:
    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def add(self, rows: Tensor, probabilities: Tensor, uncertainty: Tensor, layer: int) -> None:
        self.parts.append((rows, probabilities, uncertainty, torch.full_like(rows, layer)))

    def in_order(self) -> ExitedBatch:
        rows, probabilities, uncertainty, layers = (torch.cat(part) for part in zip(*self.parts, strict=True))
        order = rows.argsort()
        return ExitedBatch(
            probabilities[order].float().cpu().numpy(),
            layers[order].cpu().numpy(),
            uncertainty[order].float().cpu().numpy(),
        )


def to_probabilities(logits: Tensor, problem_type: str) -> Tensor:
    """Softmax, sigmoid, or the value itself for regression, in float32: (rows, labels) → (rows, labels)."""
    if problem_type == "single_label_classification":
        return logits.float().softmax(-1)
    return logits.float().sigmoid() if problem_type == "multi_label_classification" else logits.float()
