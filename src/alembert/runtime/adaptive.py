"""The classifier that users hold: texts in, labels out, as fast as the speed says."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, overload

import numpy as np

from alembert.common.errors import InputError
from alembert.runtime.backend import OpenedClassifier, SingleTextBackend, SteppedBackend
from alembert.runtime.batching import pad_rows, run_regrouped, token_budget_batches, windows
from alembert.runtime.calibration_file import with_calibrated_defaults
from alembert.runtime.exited import ExitedBatch, ExitedText, join
from alembert.runtime.manifest import is_exported
from alembert.runtime.policies import (
    MULTI_LABEL,
    REGRESSION,
    SINGLE_LABEL,
    ExitPolicy,
    check_speed,
    default_policy,
)
from alembert.runtime.tokenization import EncodedText

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Text = str | tuple[str, str]
"""A text, or a pair of texts."""

DEFAULT_SPEED = 0.0
DEFAULT_BATCH_TOKENS = {"cpu": 512, "cuda": 4096}
"""By kind of device. Large batches gain nothing on a few cores and hold more padding, while a GPU needs them."""
DEFAULT_WINDOW = 4096
_OPENING_OPTIONS = ("max_length", "is_pair", "exits", "device", "dtype", "threads")


@dataclass(frozen=True)
class Prediction:
    """One text's answer.

    Attributes:
        label: the label's name; a tuple of names for multi-label; the value for regression.
        score: the label's probability; for multi-label the lowest probability of the decisions taken; for regression
            the value.
        exit: the layer after which the text left; the number of layers when the full model answered.
        uncertainty: the policy's, in [0, 1], at the exit taken; None when the full model answered.

    Examples:
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
        model: a multi-exit or stock classifier of torch (a BiLSTM always answers in full, whatever the speed), or a
            classifier opened by a backend.
        tokenizer: the model's; nothing where a backend opened it.
        speed: default speed in [0, 1]; None = the model's own, else 0.
        policy: default exit policy by name; None = the model's own, else by problem type and number of labels.
        top_k, renormalise: of the policy "top_k_entropy".
        tolerance: of the policy "patience" for regression: values closer than this agree; in the label's unit.
        is_pair: whether inputs are pairs of texts; None = either.
        max_length: longer texts are cut to this many tokens; None = as in training, else the tokenizer's limit.
        batch_tokens: rows × longest row of a batch; None = 512 on a processor, 4,096 on CUDA.
        window: texts read ahead for sorting by length. Answers come when a window is full or the input ends, so
            that an input which trickles in wants a small one.
        regroup: whether the rows that go on after an exit wait for those of other batches of the window, so that
            later layers too see full batches. Exported models only; the others run batch by batch.
        exits: the layers whose exits are used; None = all that the model has. With a frozen backbone an exit's
            training does not depend on the others, so that any choice is as good as one made before training.
        device: None = CUDA where there is one. Exported models run on the processor.
        dtype: of a model of torch, "fp32" or "bf16"; None = fp32 when it is loaded from files, however it was saved,
            and as it is when it is given. An exported model's was chosen at export.
        threads: of the processor; None = as many as the process may use. For a model of torch it is the setting of
            the whole process, and None leaves it alone.

    Examples:
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
        model: PreTrainedModel | OpenedClassifier,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        speed: float | None = None,
        policy: str | None = None,
        top_k: int | None = None,
        renormalise: bool | None = None,
        tolerance: float = 0.1,
        is_pair: bool | None = None,
        max_length: int | None = None,
        batch_tokens: int | None = None,
        window: int = DEFAULT_WINDOW,
        regroup: bool = True,
        exits: Sequence[int] | None = None,
        device: str | torch.device | None = None,
        dtype: str | None = None,
        threads: int | None = None,
    ) -> None:
        if (batch_tokens is not None and batch_tokens < 1) or window < 1:
            raise InputError(f"batch_tokens={batch_tokens} and window={window}: both must be at least 1")
        if threads is not None and threads < 1:
            raise InputError(f"threads={threads}: must be at least 1")
        opened = model
        if not isinstance(opened, OpenedClassifier):
            from alembert.runtime.torch_backend import open_model

            if tokenizer is None:
                raise InputError("a model of torch needs its tokenizer: give it as the second argument")
            opened = open_model(
                opened,
                tokenizer,
                max_length=max_length,
                is_pair=is_pair,
                exits=exits,
                device=device,
                dtype=dtype,
                threads=threads,
            )
        self.facts, self.tokenizer = opened.facts, opened.tokenizer
        self.backend: Any = opened.backend
        # Asked once: to compare with a protocol takes long beside a short text.
        self._runs_alone = isinstance(opened.backend, SingleTextBackend)
        self._encoder = opened.encoder
        device_kind = str(getattr(self.backend, "device", "cpu")).partition(":")[0]
        self.batch_tokens = batch_tokens or DEFAULT_BATCH_TOKENS.get(device_kind, 4096)
        self.window, self.regroup = window, regroup
        self.is_pair, self.max_length = opened.is_pair, opened.max_length
        self.speed = check_speed(speed if speed is not None else opened.speed or DEFAULT_SPEED)
        self._policy = policy or opened.policy
        self._top_k = top_k if policy or top_k else opened.top_k
        self._renormalise = renormalise
        self._tolerance = tolerance
        self._default_policy = self.policy(None, top_k, renormalise)

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> AdaptiveClassifier:
        """Loads an exported folder, a run directory, a folder in Hugging Face layout or a hub id.

        An exported folder (it has a manifest.json) needs neither torch nor transformers. A calibrated speed
        (calibration.json, as `alembert calibrate` leaves it) is the default, with the policy, exits, length
        and precision that it holds for.

        Args:
            source: folder or hub id.
            options: as in the constructor; also `verify`, whether the files of an exported folder are compared with
                their checksums first (True unless given). What is None keeps its default.

        Raises:
            InputError: nothing can be loaded from there, or its files do not belong together.
        """
        options = with_calibrated_defaults(source, options)
        verify = options.pop("verify", True)
        how = {name: options.pop(name, None) for name in _OPENING_OPTIONS}
        if how["threads"] is not None and how["threads"] < 1:
            raise InputError(f"threads={how['threads']}: must be at least 1")
        if is_exported(source):
            from alembert.runtime.onnx_backend import open_export

            dtype = how.pop("dtype")
            if dtype is not None:
                raise InputError(
                    f"precision {dtype}: the numbers of an exported model were chosen when it was exported "
                    "(alembert export --precision); leave it out"
                )
            return cls(open_export(source, verify=verify, **how), **options)
        from alembert.runtime.torch_backend import open_run

        return cls(open_run(source, **how), **options)

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """Layers after which a text may leave, ascending; the last is the full model's."""
        return (*self.backend.exit_layers, self.backend.num_layers)

    @property
    def settings(self) -> dict[str, Any]:
        """What answers depend on besides model and texts, all defaults filled in: values that JSON can carry."""
        policy = self.policy().settings
        return {
            "speed": self.speed,
            "policy": policy["name"],
            "top_k": policy["top_k"],
            "renormalise": policy["renormalise"],
            "tolerance": policy["tolerance"],
            "exits": list(self.exit_layers[:-1]),
            "max_length": self.max_length,
            "is_pair": self.is_pair,
            "batch_tokens": self.batch_tokens,
            "window": self.window,
            "regroup": self.regroup,
            "device": str(getattr(self.backend, "device", "cpu")),
            "dtype": getattr(self.backend, "dtype", None),
        }

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
        Raises InputError for an empty text, a wrong speed or policy, or an answer that is no finite number, naming
        the position of the text.
        """
        if isinstance(texts, str):
            return self._predict_one(texts, **how)
        if isinstance(texts, tuple) and self.is_pair is not False and [type(t) for t in texts] == [str, str]:
            return self._predict_one(cast(tuple[str, str], texts), **how)
        return list(self.stream(texts, **how))

    def predict_proba(self, texts: Sequence[Text], **how: Any) -> np.ndarray:
        """Probabilities (rows, labels) float32, columns in the order of `label_names`; overrides as in `predict`."""
        parts = [exited.probabilities for exited in self._run(texts, **how)]
        return np.concatenate(parts) if parts else np.empty((0, len(self.facts.label_names) or 1), np.float32)

    def stream(self, texts: Iterable[Text], *, start: int = 0, **how: Any) -> Iterator[Prediction]:
        """Predictions for input of any length, in its order and at constant memory; overrides as in `predict`.

        Texts are read a window at a time, and answered when it is full or the input ends. `start` is the position of
        the first one, for messages. Raises InputError as `predict`.
        """
        for exited in self._run(texts, start=start, **how):
            yield from self._predictions(exited)

    @property
    def label_names(self) -> tuple[str, ...]:
        """Label names in the order of the probabilities; () for regression."""
        return self.facts.label_names

    @property
    def classes_(self) -> np.ndarray:
        """`label_names` as an array, under scikit-learn's name."""
        return np.array(self.label_names)

    def encode(self, texts: Sequence[Text], start: int = 0) -> list[EncodedText]:
        """Token ids of texts, unpadded; `start` is the position of the first one, for messages."""
        for position, text in enumerate(texts, start):
            check_text(text, f"text {position}")
        if not texts:
            return []
        kinds = {isinstance(text, tuple) for text in texts}
        if len(kinds) > 1:
            raise InputError("texts and pairs of texts are mixed in one input: give one kind")
        (pairs,) = kinds
        if self.is_pair is not None and pairs != self.is_pair:
            kind, other = (
                ("pairs of texts", "single texts") if self.is_pair else ("single texts", "pairs of texts")
            )
            raise InputError(f"this model was trained on {kind}, the input is {other}")
        columns: list[Any] = list(zip(*texts, strict=True)) if pairs else [texts]
        return self._encoder.encode(columns, self.max_length)

    def batches(self, encoded: Sequence[EncodedText]) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """Length-sorted token-budget batches of encoded texts: positions (rows,), padded arrays (rows, tokens)."""
        return list(self._batches(encoded))

    def warm_up(self, tokens: Sequence[int] = (16, 128)) -> None:
        """Runs every layer on made-up texts of these lengths, so that the first request is as fast as the others.

        Both ways are run, a text alone and texts in a batch.
        """
        names = self._encoder.encode([["a"]], self.max_length)[0]
        for length in tokens:
            size = min(length, self.max_length)
            row = {name: [self._encoder.fill[name]] * size for name in names}
            for rows in ([row], [row, row]):
                # The least speed at which exits are run: hardly any text leaves.
                self._run_window(rows, self._default_policy, float(np.finfo(np.float32).tiny))

    def _batches(self, encoded: Sequence[EncodedText]) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        if len(encoded) == 1:
            yield np.zeros(1, np.int64), pad_rows(encoded, self._encoder.fill)
            return
        lengths = [len(row["input_ids"]) for row in encoded]
        for positions in token_budget_batches(lengths, self.batch_tokens):
            yield positions, pad_rows([encoded[position] for position in positions], self._encoder.fill)

    def _run(
        self,
        texts: Iterable[Text],
        *,
        start: int = 0,
        **how: Any,
    ) -> Iterator[ExitedBatch]:
        if isinstance(texts, str):
            raise InputError(
                "a single text is given where a list of texts belongs: put it in a list, or call predict"
            )
        if isinstance(texts, Mapping):
            raise InputError(
                f"a {type(texts).__name__} is given where a list of texts belongs: give its texts, not its keys"
            )
        decision = self._decision(**how)
        for window in windows(texts, self.window):
            exited = join(self._run_window(self.encode(window, start), *decision))
            finite = np.isfinite(exited.probabilities).all(axis=1)
            if not finite.all():
                raise _no_number(start + int(finite.argmin()))
            start += len(window)
            yield exited

    def _predict_one(self, text: Text, **how: Any) -> Prediction:
        if not self._runs_alone:
            return next(self.stream((text,), **how))
        # As `stream`, without windows and NumPy: they take long beside a short text.
        batch = pad_rows(self.encode((text,)), self._encoder.fill)
        exited = self.backend.run_alone(batch, *self._decision(**how))
        if not math.isfinite(sum(exited.probabilities)):
            raise _no_number(0)
        return self._prediction(exited)

    def _decision(
        self,
        speed: float | None = None,
        policy: str | None = None,
        top_k: int | None = None,
        renormalise: bool | None = None,
    ) -> tuple[ExitPolicy, float]:
        chosen = self._default_policy
        if policy is not None or top_k is not None or renormalise is not None:
            chosen = self.policy(policy, top_k, renormalise)
        return chosen, self.speed if speed is None else check_speed(speed)

    def _run_window(
        self, encoded: Sequence[EncodedText], policy: ExitPolicy, speed: float
    ) -> list[tuple[np.ndarray, ExitedBatch]]:
        batches, backend = self._batches(encoded), self.backend
        if len(encoded) == 1 and self._runs_alone:
            return [
                (positions, backend.run_alone(batch, policy, speed).as_batch())
                for positions, batch in batches
            ]
        # Where no row can leave there are no survivors to bring together.
        if self.regroup and speed > 0 and isinstance(backend, SteppedBackend):
            return run_regrouped(backend, batches, policy, speed, self.batch_tokens)
        return [(positions, backend.run(batch, policy, speed)) for positions, batch in batches]

    def _prediction(self, exited: ExitedText) -> Prediction:
        """As `_predictions`, of one text."""
        probabilities, layer, uncertainty = exited
        facts = self.facts
        label: Any
        if facts.problem_type == SINGLE_LABEL:
            score = max(probabilities)
            label = facts.label_names[probabilities.index(score)]
        elif facts.problem_type == MULTI_LABEL:
            named = zip(facts.label_names, probabilities, strict=True)
            label = tuple(name for name, probability in named if probability >= 0.5)
            score = min(max(probability, 1 - probability) for probability in probabilities)
        else:
            score = label = probabilities[0]
        return Prediction(label, score, layer, None if math.isnan(uncertainty) else uncertainty)

    def _predictions(self, exited: ExitedBatch) -> Iterator[Prediction]:
        labels: list[Any]
        probabilities = exited.probabilities
        if self.facts.problem_type == REGRESSION:
            labels = scores = probabilities[:, 0].tolist()
        elif self.facts.problem_type == MULTI_LABEL:
            names = np.array(self.label_names, dtype=object)
            labels = [tuple(names[row].tolist()) for row in probabilities >= 0.5]
            wide = probabilities.astype(np.float64)
            scores = np.maximum(wide, 1 - wide).min(axis=1).tolist()
        else:
            best = probabilities.argmax(axis=1)
            labels = [self.label_names[index] for index in best.tolist()]
            scores = probabilities.max(axis=1).tolist()
        uncertainties = exited.uncertainties.tolist()
        layers = exited.exit_layers.tolist()
        for label, score, layer, uncertainty in zip(labels, scores, layers, uncertainties, strict=True):
            yield Prediction(label, score, layer, None if math.isnan(uncertainty) else uncertainty)


def check_text(text: Any, where: str) -> None:
    """Raises InputError unless it is a text, or a pair of texts, that a tokenizer can read; `where` is its place."""
    fields = text if isinstance(text, tuple) and len(text) == 2 else (text,)
    for field in fields:
        if not isinstance(field, str):
            raise InputError(
                f"{where}: must be a string or a pair of strings, not {text!r}; "
                "a pair is a tuple: (text, text_pair)"
            )
        if not field or field.isspace():
            raise InputError(f"{where} is empty")
        if not field.isascii():
            _check_encoding(field, where)


def _no_number(position: int) -> InputError:
    return InputError(
        f"text {position}: the model's answer is no finite number: its weights are broken, or the device's arithmetic "
        "is; train or export the model again, or try another device and precision"
    )


def _check_encoding(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: holds the lone surrogate U+{ord(text[error.start]):04X} at character {error.start + 1}, which "
            "stands for bytes that are not UTF-8 or for half a character: mend where the text comes from"
        ) from None
