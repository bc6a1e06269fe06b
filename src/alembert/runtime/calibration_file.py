"""The speed that a calibration found, kept beside the model that it holds for. Needs no torch."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from alembert.common.errors import InputError
from alembert.common.files import read_json, write_json
from alembert.runtime.policies import check_speed

CALIBRATION_FILE = "calibration.json"
FORMAT = 2

_MODEL_FILES = (
    *("config.json", "manifest.json", "*.safetensors", "*.onnx"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.txt"),
)
_SAMPLES = 16
_SAMPLE_BYTES = 1 << 16
_TENSOR_BYTES = 1 << 10
_FIELDS: dict[str, tuple[type, ...]] = {
    "speed": (float, int),
    "policy": (str,),
    "top_k": (int, type(None)),
    "renormalise": (bool, type(None)),
    "tolerance": (float, int, type(None)),
    "exits": (list,),
    "max_length": (int,),
    "dtype": (str, type(None)),
    "model_files": (dict,),
}


@dataclass(frozen=True)
class CalibratedSpeed:
    """A speed, and all that it must go with.

    Attributes:
        speed: in [0, 1].
        policy: name of the exit policy.
        top_k, renormalise, tolerance: its settings; None where the policy has none.
        exits: layers of the exits that are used, ascending, without the full model's.
        max_length: texts were cut to this many tokens.
        dtype: of a model of torch, "fp32" or "bf16"; None of an exported one.
        model_files: what `model_files_fingerprint` gave for the model.
        record: everything in the file.
    """

    speed: float
    policy: str
    top_k: int | None
    renormalise: bool | None
    tolerance: float | None
    exits: tuple[int, ...]
    max_length: int
    dtype: str | None
    model_files: Mapping[str, str]
    record: Mapping[str, Any]

    @classmethod
    def read(cls, folder: str | Path) -> Self | None:
        """The calibration in a model's folder; None where there is none, or `folder` is no folder.

        Raises:
            InputError: the file is broken or of another format.
        """
        path = Path(folder) / CALIBRATION_FILE
        if not path.is_file():
            return None
        values = read_json(path)
        again = "calibrate the model again (alembert calibrate) or delete the file"
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise InputError(f"{path}: is no calibration of format {FORMAT}: {again}")
        for name, kinds in _FIELDS.items():
            if name not in values or not isinstance(values[name], kinds):
                raise InputError(f"{path}: {name} is {values.get(name)!r}: {again}")
        if not all(isinstance(layer, int) for layer in values["exits"]):
            raise InputError(f"{path}: exits is {values['exits']!r}, not a list of layers: {again}")
        try:
            speed = check_speed(values["speed"])
        except InputError as error:
            raise InputError(f"{path}: {error} Or {again}") from error
        chosen = {name: values[name] for name in _FIELDS}
        return cls(**chosen | {"speed": speed, "exits": tuple(values["exits"])}, record=values)

    def options(self) -> dict[str, Any]:
        """The arguments of `AdaptiveClassifier.from_pretrained` that go with the speed, itself included."""
        options: dict[str, Any] = {
            "speed": self.speed,
            "policy": self.policy,
            "top_k": self.top_k,
            "renormalise": self.renormalise,
            "tolerance": self.tolerance,
            "exits": list(self.exits),
            "max_length": self.max_length,
            "dtype": self.dtype,
        }
        return {name: value for name, value in options.items() if value is not None}

    def fits(self, folder: str | Path) -> bool:
        """Whether the model in the folder is the one that was calibrated."""
        return self.model_files == model_files_fingerprint(folder)

    def contradicted_by(self, options: Mapping[str, Any]) -> list[str]:
        """Names of the options that differ from those of the calibration; None means not given."""
        given = {name: value for name, value in options.items() if value is not None}
        if "exits" in given:
            given["exits"] = sorted(set(given["exits"]))
        own: dict[str, Any] = dict.fromkeys(_FIELDS) | self.options()
        own.pop("model_files")
        return [name for name in own if name in given and given[name] != own[name]]


def with_calibrated_defaults(source: str | Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `AdaptiveClassifier.from_pretrained`, completed by the calibration beside the model.

    A calibrated speed holds for its policy, exits, length and precision alone, so they come together or not at all.
    They are left out where a speed is given, or an option that contradicts them, and where the model's files have
    changed since, with a warning.

    Args:
        source: folder or hub id of the model.
        options: as given by the caller; None means not given.

    Raises:
        InputError: there is a calibration, and it is broken.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if "speed" in given:
        return given
    calibrated = CalibratedSpeed.read(source)
    if calibrated is None:
        return given
    logger = logging.getLogger("alembert")
    path = Path(source) / CALIBRATION_FILE
    if not calibrated.fits(source):
        logger.warning("%s is of another model than the one beside it and is not used: calibrate again", path)
        return given
    contradicted = calibrated.contradicted_by(given)
    if contradicted:
        logger.info("%s is not used: it holds for another %s", path, ", ".join(contradicted))
        return given
    return calibrated.options() | given


def write_calibration(path: str | Path, record: Mapping[str, Any]) -> None:
    """Writes the record of a calibration, whole or not at all."""
    write_json(path, {"format": FORMAT, **record})


def model_files_fingerprint(folder: str | Path) -> dict[str, str]:
    """SHA-256 of samples of configuration, weights and tokenizer in a folder, by file name; empty for a hub id.

    Each file's size and 16 evenly spaced stretches of 64 KiB are read, and the beginning of every tensor, so that
    checking takes no time to speak of whatever the model's size. It tells a model that was trained again, if only its
    heads were, not one that was tampered with.
    """
    folder = Path(folder)
    files = (
        sorted(path for pattern in _MODEL_FILES for path in folder.glob(pattern)) if folder.is_dir() else []
    )
    return {file.name: _sampled_sha256(file) for file in files}


def _sampled_sha256(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for sample in range(_SAMPLES):
            file.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
        if path.suffix == ".safetensors":
            for start in _tensor_starts(file, size):
                file.seek(start)
                digest.update(file.read(_TENSOR_BYTES))
    return digest.hexdigest()


def _tensor_starts(file: BinaryIO, size: int) -> list[int]:
    """Where the tensors of a safetensors file begin; none of one that is broken, which loading says."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > size:
        return []
    try:
        header = json.loads(file.read(length))
        first = [tensor["data_offsets"][0] for name, tensor in header.items() if name != "__metadata__"]
        return sorted(8 + length + int(start) for start in first if 0 <= int(start) < size)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError):
        return []
