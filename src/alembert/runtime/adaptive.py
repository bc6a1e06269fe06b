"""The classifier that users hold: texts in, labels out, as fast as the speed says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, overload

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alembert.common.errors import InputError
from alembert.models.loading import (
    check_max_length,
    classifier_facts,
    load_classifier,
    load_tokenizer,
    max_tokens,
    run_configuration,
)
from alembert.runtime.batching import token_budget_batches, windows
from alembert.runtime.policies import ExitPolicy, check_speed, default_policy
from alembert.runtime.torch_backend import ExitedBatch, TorchBackend

Text = str | tuple[str, str]
"""A text, or a pair of texts."""

DEFAULT_SPEED = 0.0
DEFAULT_BATCH_TOKENS = 4096
DEFAULT_WINDOW = 4096


@dataclass(frozen=True)
class Prediction:
    """One text's answer.

    Attributes:
        label: the label's name; a tuple of names for multi-label; the value for regression.
        score: the label's probability; for multi-label the lowest probability of the decisions taken; for regression
            the value.
        exit: the layer after which the text left; the number of layers when the full model answered.
        uncertainty: the policy's, in [0, 1], at the exit taken; None when the full model answered.

    Example:
        >>> from alembert import AdaptiveClassifier
        >>> AdaptiveClassifier.from_pretrained("runs/fast").predict("we saw the soup and bread again", speed=0.0)
        Prediction(label='food', score=..., exit=4, uncertainty=None)
    """

    label: str | tuple[str, ...] | float
    score: float
    exit: int
    uncertainty: float | None


class AdaptiveClassifier:
    """A classifier whose easy texts leave early.

    Speed 0 is the full model exactly; 1 lets every text leave at the first exit that is not at a complete loss.
    Speed, policy and K can be given at construction and overridden in any call. Texts are read in windows,
    sorted by length into token-budget batches, and answered in their order: memory does not grow with the input.

    Args:
        model: a multi-exit or stock classifier; a BiLSTM always answers in full, whatever the speed.
        tokenizer: the model's.
        speed: default speed in [0, 1]; None = the model's own, else 0.
        policy: default exit policy by name; None = the model's own, else by problem type and number of labels.
        top_k, renormalise: of the policy "top_k_entropy".
        tolerance: of the policy "patience" for regression: values closer than this agree; in the label's unit.
        is_pair: whether inputs are pairs of texts; None = either.
        max_length: longer texts are cut to this many tokens; None = as in training, else the tokenizer's limit.
        batch_tokens: rows × longest row of a batch.
        window: texts read ahead for sorting by length.
        exits: the layers whose exits are used; None = all that the model has. With a frozen backbone an exit's
            training does not depend on the others, so that any choice is as good as one made before training.
        device: None = CUDA where there is one.

    Example:
        >>> from alembert import AdaptiveClassifier
        >>> classifier = AdaptiveClassifier.from_pretrained("runs/fast", speed=0.5)
        >>> answers = classifier.predict(["we saw the soup and bread again", "there was a storm today"])
        >>> [answer.label for answer in answers]
        ['food', 'weather']
        >>> classifier.predict_proba(["we saw the soup again"], speed=0.0).shape
        (1, 3)
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        speed: float | None = None,
        policy: str | None = None,
        top_k: int | None = None,
        renormalise: bool | None = None,
        tolerance: float = 0.1,
        is_pair: bool | None = None,
        max_length: int | None = None,
        batch_tokens: int = DEFAULT_BATCH_TOKENS,
        window: int = DEFAULT_WINDOW,
        exits: Sequence[int] | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        if batch_tokens < 1 or window < 1:
            raise InputError(f"batch_tokens={batch_tokens} and window={window}: both must be at least 1")
        self.facts = classifier_facts(model)
        config = model.config
        self.backend = TorchBackend(model, device, exits)
        self.tokenizer = tokenizer
        self.batch_tokens, self.window = batch_tokens, window
        self.is_pair = is_pair
        self.max_length = max_tokens(model, tokenizer) if max_length is None else max_length
        check_max_length(self.max_length, model, tokenizer)
        stored_speed, stored_policy = getattr(config, "speed", None), getattr(config, "policy", None)
        self.speed = check_speed(speed if speed is not None else stored_speed or DEFAULT_SPEED)
        self._policy = policy or stored_policy
        self._top_k = top_k if policy or top_k else getattr(config, "top_k", None)
        self._renormalise = renormalise
        self._tolerance = tolerance
        self.policy(None, top_k, renormalise)

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> AdaptiveClassifier:
        """Loads a run directory, a folder in Hugging Face layout or a hub id; options as in the constructor."""
        model, tokenizer = load_classifier(str(source)), load_tokenizer(str(source))
        trained = run_configuration(source)
        as_trained = {
            "max_length": trained.get("settings", {}).get("max_length"),
            "is_pair": trained.get("task", {}).get("is_pair"),
        }
        options = as_trained | {name: value for name, value in options.items() if value is not None}
        return cls(model, tokenizer, **options)

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """Layers after which a text may leave, ascending; the last is the full model's."""
        return (*self.backend.exit_layers, self.backend.num_layers)

    def policy(
        self, name: str | None = None, top_k: int | None = None, renormalise: bool | None = None
    ) -> ExitPolicy:
        """The exit policy that a call with these overrides uses, checked and with its defaults filled in."""
        num_labels = len(self.facts.label_names) or 1
        chosen = name or self._policy or default_policy(self.facts.problem_type, num_labels)
        k, normalise = top_k, renormalise
        if chosen == "top_k_entropy":
            k = top_k if top_k is not None else self._top_k
            normalise = renormalise if renormalise is not None else self._renormalise
        return ExitPolicy(
            name=chosen,
            problem_type=self.facts.problem_type,
            num_exits=len(self.exit_layers),
            top_k=k,
            renormalise=normalise,
            tolerance=self._tolerance,
        ).resolve(num_labels)

    @overload
    def predict(self, texts: str | tuple[str, str], **how: Any) -> Prediction: ...
    @overload
    def predict(self, texts: Sequence[Text], **how: Any) -> list[Prediction]: ...
    def predict(self, texts: str | Sequence[Text], **how: Any) -> Prediction | list[Prediction]:
        """Labels of one text or pair, or of a sequence of texts or pairs in their order.

        A tuple of two strings is one pair, unless the model is known to take single texts.
        Keyword arguments `speed`, `policy`, `top_k` and `renormalise` override the defaults for this call.
        Raises InputError for an empty text, a wrong speed or policy, naming the position of the text.
        """
        one_pair = (
            isinstance(texts, tuple) and self.is_pair is not False and [type(t) for t in texts] == [str, str]
        )
        if isinstance(texts, str) or one_pair:
            return next(self.stream([cast(Text, texts)], **how))
        return list(self.stream(texts, **how))

    def predict_proba(self, texts: Sequence[Text], **how: Any) -> np.ndarray:
        """Probabilities (rows, labels) float32, columns in the order of `label_names`; overrides as in `predict`."""
        parts = [exited.probabilities for exited in self._run(texts, **how)]
        return np.concatenate(parts) if parts else np.empty((0, len(self.facts.label_names) or 1), np.float32)

    def stream(self, texts: Iterable[Text], **how: Any) -> Iterator[Prediction]:
        """Predictions for input of any length, in its order and at constant memory; overrides as in `predict`."""
        for exited in self._run(texts, **how):
            for probabilities, layer, uncertainty in zip(
                exited.probabilities, exited.exit_layers, exited.uncertainties, strict=True
            ):
                label, score = self._answer(probabilities)
                yield Prediction(
                    label, score, int(layer), None if np.isnan(uncertainty) else float(uncertainty)
                )

    @property
    def label_names(self) -> tuple[str, ...]:
        """Label names in the order of the probabilities; () for regression."""
        return self.facts.label_names

    def encode(self, texts: Sequence[Text], start: int = 0) -> list[dict[str, list[int]]]:
        """Token ids of texts, unpadded; `start` is the position of the first one, for messages."""
        for position, text in enumerate(texts, start):
            _check_text(text, position)
        if not texts:
            return []
        pairs = isinstance(texts[0], tuple)
        if any(isinstance(text, tuple) != pairs for text in texts):
            raise InputError("texts and pairs of texts are mixed in one input: give one kind")
        if self.is_pair is not None and pairs != self.is_pair:
            kind, other = (
                ("pairs of texts", "single texts") if self.is_pair else ("single texts", "pairs of texts")
            )
            raise InputError(f"this model was trained on {kind}, the input is {other}")
        columns = [list(column) for column in zip(*texts, strict=True)] if pairs else [list(texts)]
        encoding = self.tokenizer(*columns, truncation=True, max_length=self.max_length, padding=False)
        names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in encoding]
        return [
            dict(zip(names, values, strict=True))
            for values in zip(*(encoding[n] for n in names), strict=True)
        ]

    def batches(
        self, encoded: Sequence[dict[str, list[int]]]
    ) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """Length-sorted token-budget batches of encoded texts: positions (rows,), padded arrays (rows, tokens)."""
        lengths = [len(row["input_ids"]) for row in encoded]
        return [
            (positions, self._pad([encoded[position] for position in positions]))
            for positions in token_budget_batches(lengths, self.batch_tokens)
        ]

    def _run(
        self,
        texts: Iterable[Text],
        *,
        speed: float | None = None,
        policy: str | None = None,
        top_k: int | None = None,
        renormalise: bool | None = None,
    ) -> Iterator[ExitedBatch]:
        chosen_speed = self.speed if speed is None else check_speed(speed)
        chosen_policy = self.policy(policy, top_k, renormalise)
        start = 0
        for window in windows(texts, self.window):
            encoded = self.encode(window, start)
            start += len(window)
            yield join(
                [
                    (positions, self.backend.run(batch, chosen_policy, chosen_speed))
                    for positions, batch in self.batches(encoded)
                ]
            )

    def _pad(self, rows: list[dict[str, list[int]]]) -> dict[str, np.ndarray]:
        longest = max(len(row["input_ids"]) for row in rows)
        fill = {
            "input_ids": cast(int, self.tokenizer.pad_token_id),
            "attention_mask": 0,
            "token_type_ids": self.tokenizer.pad_token_type_id,
        }
        padded = {name: np.full((len(rows), longest), fill[name], dtype=np.int64) for name in rows[0]}
        for index, row in enumerate(rows):
            for name, values in row.items():
                padded[name][index, : len(values)] = values
        return padded

    def _answer(self, probabilities: np.ndarray) -> tuple[str | tuple[str, ...] | float, float]:
        if self.facts.problem_type == "regression":
            return float(probabilities[0]), float(probabilities[0])
        if self.facts.problem_type == "multi_label_classification":
            names = tuple(name for name, p in zip(self.label_names, probabilities, strict=True) if p >= 0.5)
            return names, float(np.maximum(probabilities, 1 - probabilities).min())
        best = int(probabilities.argmax())
        return self.label_names[best], float(probabilities[best])


def join(parts: Sequence[tuple[np.ndarray, ExitedBatch]]) -> ExitedBatch:
    """Batches put back in the order of their positions."""
    order = np.concatenate([positions for positions, _ in parts]).argsort()
    return ExitedBatch(
        np.concatenate([exited.probabilities for _, exited in parts])[order],
        np.concatenate([exited.exit_layers for _, exited in parts])[order],
        np.concatenate([exited.uncertainties for _, exited in parts])[order],
    )


def _check_text(text: Any, position: int) -> None:
    fields = text if isinstance(text, tuple) else (text,)
    if len(fields) > 2 or not all(isinstance(field, str) for field in fields):
        raise InputError(f"text {position}: must be a string or a pair of strings, not {text!r}")
    if not all(field.strip() for field in fields):
        raise InputError(f"text {position} is empty")
