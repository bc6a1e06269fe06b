"""Configurations of students: the teacher's in another shape, or one read from a file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from alembert.common.errors import InputError
from alembert.models import loading
from alembert.models.families import FAMILIES
from alembert.models.initialisation import feed_forward_key

# TinyBERT's feed-forward layers are not four times as wide as its hidden states.
_TINYBERT_HIDDEN_SIZE, _TINYBERT_INTERMEDIATE_SIZE = 312, 1200
_ROTARY_FAMILIES = ("modernbert",)
_SHAPE = re.compile(r"([1-9]\d*)x([1-9]\d*)")
# What a teacher's configuration says of the teacher alone.
_NOT_INHERITED = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "id2label",
    "label2id",
    "problem_type",
)


def parse_shape(shape: str) -> tuple[int, int]:
    """Layers and hidden size of a shape: "4x312" → (4, 312).

    Raises InputError when the text is no such shape.
    """
    match = _SHAPE.fullmatch(shape)
    if match is None:
        raise InputError(f"student shape {shape!r}: write layers x hidden size, such as 4x312 or 6x768")
    return int(match[1]), int(match[2])


def looks_like_shape(student: str) -> bool:
    """Whether a student's name is a shape, well written or not; an existing file or folder only with such a name."""
    # A mistyped shape such as "4x" is no hub id that anybody means.
    if Path(student).exists():
        return _SHAPE.fullmatch(student) is not None
    return re.fullmatch(r"[\d.\s-]+[xX×*][\d.\s-]*", student) is not None


def usable_heads(hidden_size: int, family: str) -> list[int]:
    """The numbers of attention heads that divide a width, ascending; rotary families need heads of even width."""
    step = 2 if family in _ROTARY_FAMILIES else 1
    return [heads for heads in range(1, hidden_size + 1) if hidden_size % (heads * step) == 0]


def read_config(source: str, teacher: PreTrainedConfig) -> PreTrainedConfig:
    """A student's configuration from a file or folder. Raises InputError for a type or vocabulary that cannot serve."""
    config: PreTrainedConfig = loading.load_config(source)
    if config.model_type not in FAMILIES:
        raise InputError(
            f"{source}: a student of type {config.model_type!r} is not supported; "
            f"supported: {', '.join(FAMILIES)}"
        )
    if config.vocab_size < teacher.vocab_size:
        raise InputError(
            f"{source}: vocab_size is {config.vocab_size} and the teacher's is {teacher.vocab_size}: "
            f"set it to {teacher.vocab_size}, for both read the same token ids"
        )
    return config


def config_like_teacher(
    teacher: PreTrainedConfig,
    layers: int,
    hidden_size: int,
    heads: int | None,
    intermediate_size: int | None,
    init_layers: tuple[int, ...] | None,
) -> PreTrainedConfig:
    """The teacher's configuration with other sizes, and with all that in its family depends on them."""
    family: str = teacher.model_type
    if family not in FAMILIES:
        raise InputError(
            f"a shape takes the teacher's type, and {family!r} is not supported: choose a teacher of one of "
            f"{', '.join(FAMILIES)}"
        )
    names = getattr(teacher, "attribute_map", {})
    sizes: dict[str, Any] = {
        "num_hidden_layers": layers,
        "hidden_size": hidden_size,
        "num_attention_heads": _checked_heads(teacher, hidden_size, heads),
        feed_forward_key(teacher): _checked_intermediate_size(teacher, hidden_size, intermediate_size),
    }
    same_width = all(sizes[key] == getattr(teacher, key) for key in ("hidden_size", "num_attention_heads"))
    settings = {key: value for key, value in teacher.to_diff_dict().items() if key not in _NOT_INHERITED}
    settings |= {names.get(key, key): value for key, value in sizes.items()}
    settings.pop("model_type", None)
    if not same_width:
        settings.pop("attention_head_size", None)
    if "pooler_hidden_size" in settings:
        settings["pooler_hidden_size"] = hidden_size
    embedding_size = getattr(teacher, "embedding_size", None)
    if embedding_size is not None:
        # Narrower embeddings keep their width, full ones stay full.
        is_full = embedding_size == teacher.hidden_size
        settings["embedding_size"] = hidden_size if is_full else embedding_size
    if family == "modernbert":
        types = list(teacher.layer_types)
        chosen = init_layers or [1 + index % len(types) for index in range(layers)]
        settings["layer_types"] = [types[layer - 1] for layer in chosen]
    if family == "albert":
        settings["num_hidden_groups"] = _albert_groups(teacher, layers, init_layers)
    return AutoConfig.for_model(family, **settings)


def _checked_heads(teacher: PreTrainedConfig, hidden_size: int, heads: int | None) -> int:
    usable = usable_heads(hidden_size, teacher.model_type)
    even = " to an even width" if teacher.model_type in _ROTARY_FAMILIES else ""
    if heads is None:
        fitting = [number for number in usable if number <= teacher.num_attention_heads]
        if fitting:
            return fitting[-1]
        raise InputError(f"hidden size {hidden_size} cannot be split into heads{even}: choose an even one")
    if heads not in usable:
        raise InputError(
            f"hidden size {hidden_size} cannot be split evenly into {heads} attention heads{even}: "
            f"choose one of {', '.join(map(str, usable))}"
        )
    return heads


def _checked_intermediate_size(teacher: PreTrainedConfig, hidden_size: int, size: int | None) -> int:
    if size is not None:
        if size < 1:
            raise InputError(f"intermediate size {size}: choose a positive number, such as {4 * hidden_size}")
        return size
    teachers = int(getattr(teacher, feed_forward_key(teacher)))
    if hidden_size == teacher.hidden_size:
        return teachers
    if hidden_size == _TINYBERT_HIDDEN_SIZE:
        return _TINYBERT_INTERMEDIATE_SIZE
    return round(hidden_size * teachers / int(teacher.hidden_size))


def _albert_groups(teacher: PreTrainedConfig, layers: int, init_layers: tuple[int, ...] | None) -> int:
    """The fewest groups of layers that let layers of one group start as one teacher group."""

    def group(layer: int, depth: int, groups: int) -> int:
        return int((layer - 1) / (depth / groups))  # as ALBERT itself divides its layers

    if init_layers is None:
        return min(int(teacher.num_hidden_groups), layers)
    sources = [group(layer, teacher.num_hidden_layers, teacher.num_hidden_groups) for layer in init_layers]
    for groups in range(1, layers):
        own = [group(layer, layers, groups) for layer in range(1, layers + 1)]
        if len(set(zip(own, sources, strict=True))) == len(set(own)):
            return groups
    return layers


def set_labels(config: PreTrainedConfig, label_names: Sequence[str], problem_type: str | None) -> None:
    """Sets the names of the outputs and the problem type; no names mean one value, so regression."""
    names = list(label_names) or ["value"]
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    config.problem_type = problem_type or default_problem_type(label_names)


def default_problem_type(label_names: Sequence[str]) -> str:
    """transformers' problem type of a student whose caller named none."""
    return "single_label_classification" if label_names else "regression"
