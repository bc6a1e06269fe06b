"""What an exported folder holds: its segments, labels, tokenizer and policy, with checksums. Needs no torch.

The graphs are saved as ONNX Runtime's optimiser left them: open them with `GraphOptimizationLevel.ORT_DISABLE_ALL`.
That loads faster, and leaves out a fusion of additions into layer normalisations that is slower on CPUs.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from alembert.common.errors import InputError
from alembert.common.files import file_sha256, read_json, write_json

MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
HIDDEN_STATES = "hidden_states"
NEXT_HIDDEN_STATES = "next_hidden_states"
LOGITS = "logits"
MISTAKE_LOGITS = "mistake_logits"
SPEED = "speed"
FORMAT = 2
PRECISIONS: tuple[str, ...] = ("fp32", "int8")
PROBLEM_TYPES: tuple[str, ...] = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)

_EXPORT_AGAIN = "export the model again (alembert export)"


@dataclass(frozen=True)
class Head:
    """An exit's head as a graph of its own, so that it runs only where its answer is wanted.

    Attributes:
        file: name of the ONNX file in the folder.
        sha256: of that file.
        inputs: `hidden_states`, which its segment gives as `next_hidden_states`, and `attention_mask` if it reads it.
        outputs: `logits` (rows, labels) float32 and, for a model with a learned exit, `mistake_logits` (rows,) float32.
    """

    file: str
    sha256: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Segment:
    """The layers between two exits, as one graph.

    Attributes:
        file: name of the ONNX file in the folder.
        sha256: of that file, 64 hexadecimal digits.
        first_layer, last_layer: layers that the graph runs, 1 … N; the first segment also embeds.
        exit_layer: the layer after which rows may leave, which is `last_layer`; N is the full model's answer.
        inputs, outputs: names of the graph's inputs and outputs, in its order. Inputs are `input_ids`,
            `attention_mask` and `token_type_ids` (rows, tokens) int64 for the first segment, as far as the family
            reads them; `hidden_states` (rows, tokens, hidden) float32 and `attention_mask` for the others. The
            output is `next_hidden_states` (rows, tokens, hidden) for the next segment (in ONNX a graph's inputs and
            outputs must differ in name), and `logits` (rows, labels) float32 of the last one, which ends in the full
            model's head.
        head: of the exit; None of the last segment.
    """

    file: str
    sha256: str
    first_layer: int
    last_layer: int
    exit_layer: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    head: Head | None = None


@dataclass(frozen=True)
class MergedGraph:
    """All segments as one graph for single texts, in which the later ones run only when they are needed.

    Attributes:
        file: name of the ONNX file in the folder.
        sha256: of that file.
        exit_layers: layers after which the text may leave.
        inputs: the first segment's inputs, then `speed` (), float32.
        outputs: `probabilities` (1, labels) float32, `exit_layer` () int64, `uncertainty` () float32.
    """

    file: str
    sha256: str
    exit_layers: tuple[int, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class HoldOut:
    """What a run trained on and what it held out, so that rows that it has learned can be told from others.

    Attributes:
        seed: of the run, or of the first of its teachers: it draws dev out of train where the data has no dev split.
        rows_sha256: of the run's train and dev rows, by split, as `alembert.data.task.rows_sha256` gives it. Of a
            distilled model only those that its teacher had too; {} where the teacher's are not known.
    """

    seed: int
    rows_sha256: dict[str, str]


@dataclass(frozen=True)
class Manifest:
    """An exported classifier.

    Attributes:
        format: of this file; 2. In format 1 a segment held its exit's head.
        precision: "fp32" or "int8", of the linear layers' weights.
        model_type: transformers' name of the encoder's family.
        num_layers: N, of the full model.
        hidden_size: width of the hidden states between segments.
        problem_type: transformers' problem type.
        label_names: in the order of the logits; () for regression.
        policy, top_k, speed: defaults for adaptive inference; None leaves the choice to the runtime.
        max_length: longer texts are cut to this many tokens, special ones included.
        is_pair: whether inputs are pairs of texts; None = either.
        pad_token_id, pad_token_type_id: what batches are filled up with; the mask is filled up with 0.
        tokenizer_sha256: of tokenizer.json.
        segments: in the order in which they run.
        macs: multiply-accumulate operations of each segment for one text of 128 tokens, exit head included, in
            the `paper` convention of `alembert.benchmarks.flops`; () where nobody counted them.
        opset: ONNX operator set of the graphs.
        versions: of the libraries that exported, by name.
        source: what was exported: folder name, method and the like.
        reduce_range: whether int8 weights have 7 bits.
        truncation_side: end at which longer texts are cut, "right" or "left".
        merged: the single-file graph, where one was asked for.
        hold_out: of the run that was exported; None of other models, and in exports of earlier versions.
    """

    precision: str
    model_type: str
    num_layers: int
    hidden_size: int
    problem_type: str
    label_names: tuple[str, ...]
    policy: str | None
    top_k: int | None
    speed: float | None
    max_length: int
    is_pair: bool | None
    pad_token_id: int
    pad_token_type_id: int
    tokenizer_sha256: str
    segments: tuple[Segment, ...]
    macs: tuple[int, ...]
    opset: int
    versions: dict[str, str] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    merged: MergedGraph | None = None
    reduce_range: bool = False
    truncation_side: str = "right"
    hold_out: HoldOut | None = None
    format: int = FORMAT

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """Layers of the student exits, ascending; the full model's exit N is not among them."""
        return tuple(segment.exit_layer for segment in self.segments[:-1])

    @property
    def learned_exit(self) -> bool:
        """Whether every student exit foresees its own mistakes, which the policy "learned" needs."""
        return bool(self.heads) and all(MISTAKE_LOGITS in head.outputs for head in self.heads.values())

    @property
    def heads(self) -> dict[int, Head]:
        """Heads of the student exits by layer, ascending."""
        return {segment.exit_layer: segment.head for segment in self.segments if segment.head is not None}

    @property
    def files(self) -> dict[str, str]:
        """SHA-256 of every file that a checksum is kept of, by name."""
        graphs: list[Segment | Head | MergedGraph] = [*self.segments, *self.heads.values()]
        graphs += [self.merged] if self.merged else []
        return {graph.file: graph.sha256 for graph in graphs} | {TOKENIZER_FILE: self.tokenizer_sha256}

    def write(self, folder: str | Path) -> None:
        """Writes manifest.json into the folder: last of all files, for it says that the others are whole."""
        write_json(Path(folder) / MANIFEST_FILE, {"format": self.format} | dataclasses.asdict(self))

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """The manifest of an exported folder; checks that every file is there, not what is in it.

        Raises:
            InputError: there is no manifest, it is broken or of another format, or a file that it names is missing.
        """
        folder = Path(folder)
        path = folder / MANIFEST_FILE
        if not path.is_file():
            raise InputError(
                f"{folder}: no {MANIFEST_FILE} in this folder, so it is no exported model: "
                "make one with alembert export"
            )
        values = read_json(path)
        if not isinstance(values, dict) or "format" not in values:
            raise InputError(f"{path}: is not the manifest of an exported model")
        if values["format"] != FORMAT:
            raise InputError(
                f"{path}: is of format {values['format']!r}, this version of Alembert reads format {FORMAT}: "
                f"{_EXPORT_AGAIN} or install the version that wrote it"
            )
        manifest: Self = _parse(cls, values, str(path))
        manifest._validate(path)
        for name in manifest.files:
            if not (folder / name).is_file():
                raise InputError(
                    f"{folder / name}: is missing, and {MANIFEST_FILE} names it: "
                    f"copy the whole folder, or {_EXPORT_AGAIN}"
                )
        return manifest

    def check(self, folder: str | Path, names: Sequence[str] | None = None) -> None:
        """Compares files with their checksums, all unless named; it reads them, so it takes as long as that.

        Raises:
            InputError: naming the first file that is missing or is another one than was exported.
        """
        folder, sha256s = Path(folder), self.files
        for name in sha256s if names is None else names:
            path, sha256 = folder / name, sha256s[name]
            if not path.is_file():
                raise InputError(f"{path}: is missing: copy the whole folder, or {_EXPORT_AGAIN}")
            if file_sha256(path) != sha256:
                raise InputError(
                    f"{path}: {_otherness(name)}: copy the whole folder again, or {_EXPORT_AGAIN}"
                )

    def _validate(self, path: Path) -> None:
        faults = []
        if self.precision not in PRECISIONS:
            faults.append(f"precision {self.precision!r} is none of {', '.join(PRECISIONS)}")
        if self.problem_type not in PROBLEM_TYPES:
            faults.append(f"problem_type {self.problem_type!r} is none of {', '.join(PROBLEM_TYPES)}")
        if self.truncation_side not in ("left", "right"):
            faults.append(f"truncation_side {self.truncation_side!r} is neither left nor right")
        if bool(self.label_names) == (self.problem_type == "regression"):
            faults.append("label_names must be empty for regression, and only there")
        if not self.segments or len(self.macs) not in (0, len(self.segments)):
            faults.append("there must be at least one segment, and as many macs as segments or none")
        # A name that leads out of the folder would let a manifest open any file of the machine.
        names = list(self.files)
        if any(Path(name).name != name or name in ("", ".", "..") or "\\" in name for name in names):
            faults.append("files must be plain names in the same folder")
        covered = [n for s in self.segments for n in range(s.first_layer, s.last_layer + 1)]
        if covered != list(range(1, self.num_layers + 1)):
            faults.append(f"the segments do not run layers 1 to {self.num_layers} in order")
        if any(s.exit_layer != s.last_layer for s in self.segments):
            faults.append("an exit must stand after the last layer of its segment")
        if tuple(self.heads) != self.exit_layers:
            faults.append("every segment but the last must have an exit's head")
        if faults:
            raise InputError(f"{path}: {'; '.join(faults)}: {_EXPORT_AGAIN}")


def is_exported(folder: str | Path) -> bool:
    """Whether a folder holds an exported model, whole or not."""
    return (Path(folder) / MANIFEST_FILE).is_file()


def _otherness(name: str) -> str:
    if name == TOKENIZER_FILE:
        return "is another tokenizer than the one that the model was exported with (its checksum differs)"
    return f"is not the file that was exported (its checksum is not the one in {MANIFEST_FILE})"


def _parse(kind: Any, value: Any, where: str) -> Any:
    """`value` as read from JSON, as a value of the annotated type `kind`; InputError says where it does not fit."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type) and isinstance(value, dict):
        return kind(**_parse_fields(kind, value, where))
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _parse(next(a for a in arguments if a is not type(None)), value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_parse(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _parse(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is Any or (kind is float and isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    if isinstance(kind, type) and type(value) is kind:
        return value
    name = getattr(kind, "__name__", str(kind))
    raise InputError(f"{where}: {value!r} stands where {name} is needed: {_EXPORT_AGAIN}")


def _parse_fields(kind: Any, values: dict[str, Any], where: str) -> dict[str, Any]:
    annotations = typing.get_type_hints(kind)
    known = {item.name for item in dataclasses.fields(kind)}
    needed = {
        item.name
        for item in dataclasses.fields(kind)
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    }
    if missing := sorted(needed - set(values)):
        raise InputError(f"{where}: the field {missing[0]!r} is missing: {_EXPORT_AGAIN}")
    if unknown := sorted(set(values) - known):
        raise InputError(f"{where}: the field {unknown[0]!r} is unknown to this version of Alembert")
    return {name: _parse(annotations[name], value, f"{where}: {name}") for name, value in values.items()}
