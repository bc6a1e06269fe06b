"""One model, one library, one way of batching: what `alembert benchmark` compares. Needs no torch until it loads."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

Text = str | tuple[str, str]
Label = str | float | list[str]
"""A label's name, a regression value, or the names of a multi-label answer."""

Convention = Literal["paper", "full"]
"""As in `flops`, which needs torch."""

TRANSFORMERS, ONNXRUNTIME, ALEMBERT = "transformers", "onnxruntime", "alembert"
_MACS_LENGTH = 128
"""Tokens of the text whose multiply-accumulates a manifest gives."""


@dataclass(frozen=True)
class EngineSettings:
    """What it takes to load an engine, in values that JSON can carry.

    Attributes:
        source: run directory, folder in Hugging Face layout, hub id or exported folder.
        kind: "transformers" (its own forward pass, texts in their order), "onnxruntime" (a folder of
            `export_plain_int8`, texts in their order) or "alembert" (`AdaptiveClassifier`).
        precision: "fp32" or "bf16" for torch; of an exported folder it is what was exported.
        batch_size: texts of a batch in their order.
        batch_tokens: token budget of a batch for "alembert"; None = the classifier's default.
        threads: of the library, within an operation.
        device: torch's.
        exits, policy, top_k, renormalise, tolerance, max_length: as in `AdaptiveClassifier`; None keeps its defaults.
            "onnxruntime" must be given the length.
    """

    source: str
    kind: str
    precision: str
    batch_size: int
    batch_tokens: int | None
    threads: int
    device: str = "cpu"
    exits: tuple[int, ...] | None = None
    policy: str | None = None
    top_k: int | None = None
    renormalise: bool | None = None
    tolerance: float | None = None
    max_length: int | None = None
    own_speed: bool = True


@dataclass(frozen=True)
class Answers:
    """What an engine said of some texts, in their order.

    Attributes:
        labels: one per text.
        exit_layers: (rows,) int64, the layer that each text left after.
    """

    labels: list[Label]
    exit_layers: np.ndarray


class Engine(Protocol):
    """A loaded model. `answer` goes all the way from strings to labels.

    Attributes:
        policy: name and settings of the exit policy; None for a model that is always run whole.
        max_length: texts are cut to this many tokens.
        speed: the model's own; 0 where it has none.
        exits: layers of the exits that are used.
    """

    policy: dict[str, Any] | None
    max_length: int
    speed: float
    exits: tuple[int, ...]

    def answer(self, texts: Sequence[Text], speed: float) -> Answers:
        """Labels of texts, batched as the engine batches."""

    def answer_one(self, text: Text, speed: float) -> Label:
        """The label of one text that came alone."""

    def lengths(self, texts: Sequence[Text]) -> np.ndarray:
        """Tokens of each text, (rows,) int64, by the engine's own tokenizer."""

    def macs(
        self, exit_layers: np.ndarray, lengths: np.ndarray, speed: float, convention: Convention = "paper"
    ) -> np.ndarray | None:
        """Multiply-accumulates of each text, (rows,) float64; None where unknown.

        In the convention "paper", or in "full", which is what the engine really computes.
        """


def load_engine(settings: EngineSettings) -> Engine:
    """Loads a model with the library that its settings name.

    Raises InputError when the source cannot be read or is none of that library's.
    """
    if settings.kind == TRANSFORMERS:
        return TransformersEngine(settings)
    return OnnxRuntimeEngine(settings) if settings.kind == ONNXRUNTIME else AlembertEngine(settings)


class TransformersEngine:
    """The stock model under transformers: batches in the order of the input, padded to their longest text.

    Of a model with exits, the full model alone is run.
    """

    def __init__(self, settings: EngineSettings) -> None:
        import torch

        from alembert.benchmarks.flops import CostModel
        from alembert.models.loading import load_classifier, load_tokenizer, max_tokens, run_configuration
        from alembert.models.multi_exit import MultiExitModel

        torch.set_num_threads(settings.threads)
        self._torch = torch
        model = load_classifier(settings.source)
        self._costs = CostModel.from_model(model)
        self.policy: dict[str, Any] | None = None
        self.speed = 0.0
        self.exits: tuple[int, ...] = ()
        self._num_layers = self._costs.num_layers
        self._problem_type: str = model.config.problem_type
        self._names = [str(model.config.id2label[index]) for index in range(model.config.num_labels)]
        self._final_head = None
        dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        model = model.to(settings.device, dtype)
        if isinstance(model, MultiExitModel):
            self._final_head, model = model.final_head, model.full_model
        self._model, self._device, self._batch_size = model.eval(), settings.device, settings.batch_size
        self._tokenizer = load_tokenizer(settings.source)
        trained = run_configuration(settings.source).get("settings", {}).get("max_length")
        self.max_length: int = settings.max_length or trained or max_tokens(model, self._tokenizer)

    def answer(self, texts: Sequence[Text], speed: float) -> Answers:
        """The full model's labels; `speed` has no meaning here."""
        labels: list[Label] = []
        for batch in _batches(texts, self._batch_size):
            labels += decisions(self._logits(batch), self._problem_type, self._names)
        return Answers(labels, np.full(len(texts), self._num_layers))

    def answer_one(self, text: Text, speed: float) -> Label:
        """The full model's label of one text."""
        return decisions(self._logits([text]), self._problem_type, self._names)[0]

    def lengths(self, texts: Sequence[Text]) -> np.ndarray:
        """Tokens of each text."""
        encoding = self._tokenizer(*columns(texts), truncation=True, max_length=self.max_length)
        return np.array([len(ids) for ids in encoding["input_ids"]])

    def macs(
        self, exit_layers: np.ndarray, lengths: np.ndarray, speed: float, convention: Convention = "paper"
    ) -> np.ndarray:
        """The full model's multiply-accumulates for each text."""
        return self._costs.full_model_macs(lengths, convention)

    def _logits(self, texts: Sequence[Text]) -> np.ndarray:
        with self._torch.inference_mode():
            batch = self._tokenizer(
                *columns(texts),
                truncation=True,
                max_length=self.max_length,
                padding=True,
                return_tensors="pt",
            ).to(self._device)
            output = self._model(**batch)
            if self._final_head is None:
                logits = output.logits
            else:
                logits = self._final_head(output.last_hidden_state, batch["attention_mask"])
            # The copy waits for the device, so that its time is counted.
            return logits.float().cpu().numpy()  # type: ignore[no-any-return]


class OnnxRuntimeEngine:
    """A graph of `export_plain_int8`, called as one calls ONNX Runtime: texts in their order, padded, defaults."""

    def __init__(self, settings: EngineSettings) -> None:
        import onnxruntime
        from transformers import AutoConfig, AutoTokenizer

        from alembert.benchmarks.plain_onnx import GRAPH_FILE

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = settings.threads
        self._session = onnxruntime.InferenceSession(
            Path(settings.source) / GRAPH_FILE, options, providers=["CPUExecutionProvider"]
        )
        # The exporter drops an input that no operation reads.
        self._inputs = [entry.name for entry in self._session.get_inputs()]
        self._batch_size = settings.batch_size
        self._tokenizer = AutoTokenizer.from_pretrained(settings.source, trust_remote_code=False)
        config = AutoConfig.from_pretrained(settings.source, trust_remote_code=False)
        self._problem_type: str = config.problem_type
        self._names = [str(config.id2label[index]) for index in range(config.num_labels)]
        self._num_layers = int(config.num_hidden_layers)
        assert settings.max_length is not None, "a bare graph does not know how long its texts may be"
        self.max_length = settings.max_length
        self.policy: dict[str, Any] | None = None
        self.speed = 0.0
        self.exits: tuple[int, ...] = ()

    def answer(self, texts: Sequence[Text], speed: float) -> Answers:
        """The model's labels; `speed` has no meaning here."""
        labels: list[Label] = []
        for batch in _batches(texts, self._batch_size):
            labels += self._labels(batch)
        return Answers(labels, np.full(len(texts), self._num_layers))

    def answer_one(self, text: Text, speed: float) -> Label:
        """The model's label of one text."""
        return self._labels([text])[0]

    def lengths(self, texts: Sequence[Text]) -> np.ndarray:
        """Tokens of each text."""
        encoding = self._tokenizer(*columns(texts), truncation=True, max_length=self.max_length)
        return np.array([len(ids) for ids in encoding["input_ids"]])

    def macs(
        self, exit_layers: np.ndarray, lengths: np.ndarray, speed: float, convention: Convention = "paper"
    ) -> np.ndarray | None:
        """None: a graph does not tell."""
        return None

    def _labels(self, texts: Sequence[Text]) -> list[Label]:
        batch = self._tokenizer(
            *columns(texts), truncation=True, max_length=self.max_length, padding=True, return_tensors="np"
        )
        feed = {name: batch[name].astype(np.int64, copy=False) for name in self._inputs}
        (logits,) = self._session.run(["logits"], feed)
        return decisions(logits, self._problem_type, self._names)


class AlembertEngine:
    """`AdaptiveClassifier`, on torch for a run directory and on ONNX Runtime for an exported folder."""

    def __init__(self, settings: EngineSettings) -> None:
        from alembert.runtime.adaptive import AdaptiveClassifier
        from alembert.runtime.manifest import Manifest, is_exported

        is_torch = not is_exported(settings.source)
        self._manifest = None if is_torch else Manifest.read(settings.source)
        self._classifier = AdaptiveClassifier.from_pretrained(
            settings.source,
            speed=None if settings.own_speed else 0.0,
            exits=settings.exits,
            policy=settings.policy,
            top_k=settings.top_k,
            renormalise=settings.renormalise,
            **({} if settings.tolerance is None else {"tolerance": settings.tolerance}),
            max_length=settings.max_length,
            batch_tokens=settings.batch_tokens,
            threads=settings.threads,
            device=settings.device if is_torch else None,
            dtype=settings.precision if is_torch else None,
        )
        self._costs: Any = None
        if is_torch:
            from alembert.benchmarks.flops import CostModel

            self._costs = CostModel.from_model(self._classifier.backend.model)
        self.max_length, self.speed = self._classifier.max_length, self._classifier.speed
        self.exits: tuple[int, ...] = self._classifier.exit_layers[:-1]
        self.policy: dict[str, Any] | None = self._classifier.policy().settings if self.exits else None

    def answer(self, texts: Sequence[Text], speed: float) -> Answers:
        """Labels and exits at a speed."""
        predictions = self._classifier.predict(list(texts), speed=speed)
        labels = [_plain(prediction.label) for prediction in predictions]
        return Answers(labels, np.array([prediction.exit for prediction in predictions]))

    def answer_one(self, text: Text, speed: float) -> Label:
        """The label of one text at a speed."""
        return _plain(self._classifier.predict(text, speed=speed).label)

    def lengths(self, texts: Sequence[Text]) -> np.ndarray:
        """Tokens of each text."""
        return np.array([len(row["input_ids"]) for row in self._classifier.encode(texts)])

    def macs(
        self, exit_layers: np.ndarray, lengths: np.ndarray, speed: float, convention: Convention = "paper"
    ) -> np.ndarray | None:
        """Multiply-accumulates of each text, heads passed on the way included.

        An exported model's manifest holds the `paper` convention alone; `graph_macs` counts what graphs compute.
        """
        active = self.exits if speed > 0 else ()
        if self._manifest is not None:
            known = bool(self._manifest.macs) and convention == "paper"
            return manifest_macs(self._manifest, exit_layers, lengths, active) if known else None
        macs: np.ndarray = self._costs.macs(exit_layers, lengths, convention, active_exits=active)
        return macs


def manifest_macs(
    manifest: Any, exit_layers: np.ndarray, lengths: np.ndarray, active_exits: Iterable[int] | None = None
) -> np.ndarray:
    """Multiply-accumulates of texts by the layer that each left after, (rows,) float64.

    A manifest counts each segment of a text of 128 tokens, its head included. Linear layers grow with the length, so
    the count is scaled. What one layer costs is read off the last segment, which has no exit's head, so that heads
    that are not among `active_exits` (None = all) can be taken off; the final head's share of that, under 1%, stays in.

    Args:
        manifest: one in which somebody counted: its `macs` are not empty.
        exit_layers, lengths: (rows,) of each text.
        active_exits: layers of the exits whose heads are run; speed 0 runs none.
    """
    counted = np.array(manifest.macs, np.float64)
    layers = np.array([segment.last_layer - segment.first_layer + 1 for segment in manifest.segments])
    ends = np.array([segment.exit_layer for segment in manifest.segments])
    bodies = layers * counted[-1] / layers[-1]
    heads = np.maximum(counted - bodies, 0.0)
    asked = np.full(len(ends), True) if active_exits is None else np.isin(ends, list(active_exits))
    through = np.cumsum(bodies + heads * asked)
    return np.asarray(through[np.searchsorted(ends, exit_layers)] * lengths / _MACS_LENGTH)


def decisions(logits: np.ndarray, problem_type: str, names: Sequence[str]) -> list[Label]:
    """The answers that logits (rows, labels) stand for."""
    if problem_type == "regression":
        return [float(value) for value in logits[:, 0]]
    if problem_type == "multi_label_classification":
        return [[name for name, value in zip(names, row, strict=True) if value >= 0] for row in logits]
    return [names[index] for index in logits.argmax(-1)]


def columns(texts: Sequence[Text]) -> list[list[str]]:
    """The texts as a tokenizer takes them: one list, or two for pairs."""
    if isinstance(texts[0], tuple):
        return [list(column) for column in zip(*texts, strict=True)]
    return [[str(text) for text in texts]]


def seconds(call: Any) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _batches(texts: Sequence[Text], size: int) -> Iterator[Sequence[Text]]:
    return (texts[start : start + size] for start in range(0, len(texts), size))


def _plain(label: str | tuple[str, ...] | float) -> Label:
    return list(label) if isinstance(label, tuple) else label
