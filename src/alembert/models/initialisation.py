"""What a student takes over from its teacher before it is trained: whole layers, or the embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, PreTrainedModel

from alembert.common.errors import InputError
from alembert.models.families import FAMILIES, BertFamily

# ModernBERT's first layer has no norm before its attention, all others have.
_NOT_IN_EVERY_LAYER = ("attn_norm.",)


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draws weights on the CPU from `seed`, and leaves the process's own generators as they were."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@torch.no_grad()
def copy_layers(student: PreTrainedModel, teacher: PreTrainedModel, layers: Sequence[int]) -> None:
    """Makes student layer m the teacher's layer `layers[m − 1]` (1..N) and copies all that lies around them.

    That is embeddings, final norm and pooler; and the head, where both models have one of the same kind, with the
    same labels and shapes. In ModernBERT, whose layer 1 alone has no norm before its attention, a teacher layer
    above 1 loses this norm as student layer 1, and teacher layer 1 gets a fresh one elsewhere.

    Raises InputError when sizes differ, or student layers that share weights would start as different layers.
    """
    _check_family(student, teacher)
    check_same_sizes(student.config, teacher.config)
    ours, theirs = FAMILIES[student.config.model_type](student), FAMILIES[teacher.config.model_type](teacher)
    sources: dict[nn.Module, nn.Module] = {}
    for index, layer in enumerate(layers, start=1):
        source = theirs.layer(layer)
        if sources.setdefault(ours.layer(index), source) is not source:
            raise InputError(
                f"student layer {index} shares its weights with an earlier one, but teacher layers "
                f"{', '.join(map(str, layers))} do not: give the student more groups (num_hidden_groups)"
            )
    for own, source in sources.items():
        _load(own, source.state_dict(), "a layer", optional=_NOT_IN_EVERY_LAYER)
    around = _around_layers(theirs)
    missing = [key for key in _around_layers(ours) if key not in around and not key.startswith("pooler.")]
    if missing:
        raise InputError(f"the teacher has no weights {', '.join(missing)}, which this student needs")
    _load(ours.base, {key: around[key] for key in _around_layers(ours) if key in around}, "the encoder", None)
    _copy_head(student, teacher)


@torch.no_grad()
def copy_embeddings(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Gives the student the teacher's token, position and type embeddings, projected where it is narrower.

    The projection is on the leading principal components of the token embeddings, so that a linear map back
    recovers them as well as their width allows. With equal embedding widths they are copied, with their norm; a
    projected embedding keeps a fresh norm. Where a table of the student has fewer or more rows, the first are taken.

    Raises InputError when the families differ, or the student's embeddings are wider than the teacher's.
    """
    _check_family(student, teacher)
    ours, theirs = student.base_model, teacher.base_model
    tokens: Tensor = theirs.get_input_embeddings().weight
    width = ours.get_input_embeddings().weight.shape[1]
    components = None if width == tokens.shape[1] else principal_components(tokens, width)
    tables = {
        name: table for name, table in theirs.embeddings.named_modules() if isinstance(table, nn.Embedding)
    }
    for name, table in ours.embeddings.named_modules():
        if isinstance(table, nn.Embedding) and name in tables:
            rows = min(len(table.weight), len(tables[name].weight))
            table.weight[:rows] = project(tables[name].weight[:rows], components)
    if components is None:
        state = theirs.embeddings.state_dict()
        for key, value in ours.embeddings.state_dict().items():
            if key in state and state[key].shape == value.shape:
                value.copy_(state[key])


def principal_components(matrix: Tensor, count: int) -> Tensor:
    """The `count` leading principal directions (width, count), orthonormal, of the rows of (rows, width).

    The rows are not centred: `matrix @ components @ components.T` is then the best approximation of that rank
    (Eckart and Young 1936), with no constant to keep.

    Raises InputError when `count` is more than the width.
    """
    width = matrix.shape[1]
    if count > width:
        raise InputError(
            f"embeddings of width {count} cannot be made of the teacher's of width {width}: "
            f"choose at most {width}, or initialise at random"
        )
    values = matrix.detach().double()
    _, directions = torch.linalg.eigh(values.T @ values)
    leading: Tensor = directions.flip(1)[:, :count]
    # An eigenvector's sign is arbitrary and differs between libraries.
    largest = leading.abs().argmax(dim=0)
    signs: Tensor = leading[largest, torch.arange(count, device=leading.device)].sign()
    return leading * signs


def project(embeddings: Tensor, components: Tensor | None) -> Tensor:
    """Embeddings (rows, width) on components (width, count), in float64; as they are without components."""
    return embeddings if components is None else embeddings.double() @ components


def check_same_sizes(student: Any, teacher: Any) -> None:
    """Raises InputError when two configurations of a family differ in a size that copied layers must share."""
    sizes = {
        "hidden_size": "the width comes from the student's shape",
        "num_attention_heads": "leave the heads to their default",
        feed_forward_key(teacher): "leave the intermediate size to its default",
        "embedding_size": "take a shape, whose embeddings are as wide as the teacher's",
    }
    for key, way_out in sizes.items():
        ours, theirs = getattr(student, key, None), getattr(teacher, key, None)
        if ours != theirs:
            raise InputError(
                f"layers can be copied only between equal sizes, and {key} is {ours} in the student and {theirs} "
                f"in the teacher: {way_out}, or initialise with random or embeddings in place of layers"
            )


def feed_forward_key(config: Any) -> str:
    """The configuration's name for the width of the feed-forward layer."""
    return "intermediate_size" if hasattr(config, "intermediate_size") else "hidden_dim"


def _check_family(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    ours, theirs = student.config.model_type, teacher.config.model_type
    if ours != theirs:
        raise InputError(
            f"a student of type {ours!r} cannot start from the weights of a teacher of type {theirs!r}: "
            "initialise it at random, or take a shape such as 4x312, which has the teacher's type"
        )


def _around_layers(family: BertFamily) -> dict[str, Tensor]:
    """The base encoder's weights by name, its layers' left out."""
    layers = {family.layer(index) for index in range(1, family.num_layers + 1)}
    prefixes = tuple(f"{name}." for name, module in family.base.named_modules() if module in layers)
    state: dict[str, Tensor] = family.base.state_dict()
    return {key: value for key, value in state.items() if not key.startswith(prefixes)}


def _load(
    module: nn.Module, weights: Mapping[str, Tensor], what: str, optional: tuple[str, ...] | None = ()
) -> None:
    """Copies weights into a module; keys may be left out when `optional` is None, or names their beginning."""
    own = module.state_dict()
    for key, value in weights.items():
        if key in own and own[key].shape != value.shape:
            raise InputError(
                f"{key} of {what} has shape {tuple(own[key].shape)} in the student and {tuple(value.shape)} in the "
                "teacher: copy layers between models of one shape, or initialise with random or embeddings"
            )
    differing = [] if optional is None else list(own.keys() ^ weights.keys())
    found = sorted(key for key in differing if not key.startswith(optional or ()))
    if found:
        raise InputError(f"{what} has {', '.join(found[:3])} in only one of student and teacher")
    module.load_state_dict({key: value for key, value in weights.items() if key in own}, strict=False)


def _copy_head(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    if type(student) is not type(teacher):
        return
    classifier = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(student.config), ())
    if isinstance(student, classifier) and not _same_labels(student.config, teacher.config):
        return
    base = f"{student.base_model_prefix}."
    own = {key: value for key, value in student.state_dict().items() if not key.startswith(base)}
    source = teacher.state_dict()
    if all(key in source and source[key].shape == value.shape for key, value in own.items()):
        student.load_state_dict({key: source[key] for key in own}, strict=False)


def _same_labels(student: Any, teacher: Any) -> bool:
    if student.num_labels != teacher.num_labels:
        return False
    # One output has no name that matters: regression.
    return student.num_labels == 1 or dict(student.id2label) == dict(teacher.id2label)
