"""Students: smaller encoders by shape, by configuration or from a checkpoint, in fp32, ready to be distilled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from alembert.common.errors import InputError
from alembert.models import loading
from alembert.models.bilstm import BilstmConfig, BilstmForSequenceClassification
from alembert.models.families import FAMILIES
from alembert.models.initialisation import (
    copy_embeddings,
    copy_layers,
    feed_forward_key,
    principal_components,
    project,
    seeded,
)
from alembert.models.layer_mapping import layer_mapping
from alembert.models.multi_exit import MultiExitModel, check_loading
from alembert.models.student_configuration import (
    config_like_teacher,
    default_problem_type,
    looks_like_shape,
    parse_shape,
    read_config,
    set_labels,
)

TASK_HEADS: dict[str, Any] = {
    "classification": AutoModelForSequenceClassification,
    "encoder": AutoModel,
    "masked_lm": AutoModelForMaskedLM,
}
INITIALISATIONS = ("random", "layers", "embeddings")
BILSTM = "bilstm"
# Of the word vectors that Distilled BiLSTM starts from.
_WORD_VECTOR_SIZE = 300


def build_student(
    student: str,
    teacher: PreTrainedModel,
    *,
    task_head: str = "classification",
    initialise: str = "random",
    init_layers: Sequence[int] | None = None,
    heads: int | None = None,
    intermediate_size: int | None = None,
    label_names: Sequence[str] = (),
    problem_type: str | None = None,
    seed: int | None = None,
) -> PreTrainedModel:
    """A student for a teacher, in fp32.

    Args:
        student: a shape `LxH` (the teacher's family and settings with L layers of width H); a config.json or a
            folder with no weights beside it; a folder or hub id of a checkpoint, whose weights are kept (with a
            fresh head, unless it has the one asked for); or "bilstm", see `build_bilstm`. A shape and "bilstm" are
            taken as such even if a folder has that name.
        teacher: any supported family, with any head; of a multi-exit model its full model is taken.
        task_head: "classification", "encoder" (none) or "masked_lm".
        initialise: "random", the family's own; "layers", the teacher's layers `init_layers` and all around them;
            "embeddings", the teacher's embeddings, projected on their principal components where the student is
            narrower, the rest at random.
        init_layers: teacher layers (1..N), one for each student layer, for "layers"; spread evenly from the first
            to the last when absent, as in DistilBERT.
        heads: attention heads; the teacher's number when absent, or the next smaller one that fits the width.
        intermediate_size: width of the feed-forward layer; when absent the teacher's at its width, TinyBERT's 1200
            at width 312, else as many times the hidden size as in the teacher.
        label_names: in the order of the label ids, for classification; empty for regression (one output).
        problem_type: transformers' problem type, for classification.
        seed: of all weights drawn at random; from the process's own generator when absent.

    Raises:
        InputError: the student cannot be read, or sizes do not fit each other, the teacher or the initialisation.

    Examples:
        >>> student = build_student("4x312", teacher, label_names=["no", "yes"], seed=0)  # doctest: +SKIP
    """
    for value, known, what in (
        (task_head, TASK_HEADS, "task head"),
        (initialise, INITIALISATIONS, "initialisation"),
    ):
        if value not in known:
            raise InputError(f"unknown {what} {value!r} of a student: choose one of {', '.join(known)}")
    if init_layers is not None and initialise != "layers":
        raise InputError(
            f"teacher layers to start from are given, but the student is initialised with {initialise!r}: "
            "choose 'layers', or leave them out"
        )
    teacher = _stock(teacher)
    if student == BILSTM:
        if heads is not None or intermediate_size is not None or task_head != "classification":
            raise InputError(
                "a bilstm is a classifier without attention heads: leave heads and intermediate size out"
            )
        return build_bilstm(
            teacher, label_names=label_names, problem_type=problem_type, initialise=initialise, seed=seed
        )
    is_shape = looks_like_shape(student)
    if not is_shape and (heads is not None or intermediate_size is not None):
        raise InputError(
            f"{student} has its own heads and intermediate size: set these in its config.json, or give a shape"
        )
    if not is_shape and has_weights(student):
        if initialise != "random":
            raise InputError(
                f"{student} comes with weights, so it cannot be initialised with {initialise!r} too: "
                "leave the initialisation out, or give a shape such as 4x312"
            )
        with seeded(seed):
            return _load_checkpoint(student, task_head, label_names, problem_type)
    if is_shape:
        shape = parse_shape(student)
        layers = _chosen_layers(shape[0], teacher, init_layers) if initialise == "layers" else None
        config = config_like_teacher(teacher.config, *shape, heads, intermediate_size, layers)
    else:
        config = read_config(student, teacher.config)
        layers = (
            _chosen_layers(config.num_hidden_layers, teacher, init_layers) if initialise == "layers" else None
        )
    if task_head == "classification":
        set_labels(config, label_names, problem_type)
    with seeded(seed):
        model: PreTrainedModel = TASK_HEADS[task_head].from_config(
            config, dtype=torch.float32, trust_remote_code=False
        )
    if layers is not None:
        copy_layers(model, teacher, layers)
    elif initialise == "embeddings":
        copy_embeddings(model, teacher)
    return model


def build_bilstm(
    teacher: PreTrainedModel,
    *,
    label_names: Sequence[str] = (),
    problem_type: str | None = None,
    embedding_size: int | None = None,
    hidden_size: int = 150,
    num_layers: int = 1,
    head_size: int = 400,
    dropout: float = 0.0,
    initialise: str = "embeddings",
    seed: int | None = None,
) -> BilstmForSequenceClassification:
    """The bidirectional LSTM of Tang et al. 2019 over the teacher's vocabulary, in fp32.

    Args:
        teacher: any supported family, with any head.
        label_names, problem_type: as in `build_student`.
        embedding_size: width of the token embeddings; 300 when absent, or the teacher's where that is smaller.
        hidden_size: width of the LSTM in each direction (150 or 300 in the paper).
        num_layers: LSTM layers.
        head_size: width of the layer with ReLU before the logits (200 or 400 in the paper).
        dropout: on the embeddings and before the logits; the paper has none.
        initialise: "embeddings" for the teacher's token embeddings on their principal components, or "random".
        seed: of all weights drawn at random.

    Raises:
        InputError: unknown initialisation, or embeddings wider than the teacher's.
    """
    if initialise not in ("embeddings", "random"):
        raise InputError(
            f"unknown initialisation {initialise!r} of a BiLSTM: choose embeddings or random "
            "(it has no layers that a teacher's could become)"
        )
    tokens: Tensor = _stock(teacher).base_model.get_input_embeddings().weight
    if embedding_size is None:
        embedding_size = min(_WORD_VECTOR_SIZE, tokens.shape[1])
    config = BilstmConfig(
        vocab_size=len(tokens),
        embedding_size=embedding_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        head_size=head_size,
        dropout=dropout,
        pad_token_id=_stock(teacher).config.pad_token_id,
    )
    set_labels(config, label_names, problem_type)
    with seeded(seed):
        model = BilstmForSequenceClassification(config)
    if initialise == "embeddings":
        components = None
        if embedding_size != tokens.shape[1]:
            components = principal_components(tokens, embedding_size)
        with torch.no_grad():
            model.embeddings.weight.copy_(project(tokens, components))
    return model


def describe_student(model: PreTrainedModel) -> dict[str, int | str | None]:
    """Type, sizes and number of parameters; heads and intermediate size are None where there are none."""
    config = _stock(model).config
    return {
        "model_type": str(config.model_type),
        "layers": int(config.num_hidden_layers),
        "hidden_size": int(config.hidden_size),
        "heads": getattr(config, "num_attention_heads", None),
        "intermediate_size": getattr(config, feed_forward_key(config), None),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def encoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The base encoder without a head, its pooler included; it shares its weights with the model."""
    base: PreTrainedModel = _stock(model).base_model
    return base


def _stock(model: PreTrainedModel) -> PreTrainedModel:
    return model.full_model if isinstance(model, MultiExitModel) else model


def has_weights(source: str) -> bool:
    """Whether a student comes with weights; of a hub id that is taken for granted."""
    path = Path(source)
    if not path.exists():
        return True  # a hub id
    return path.is_dir() and any(any(path.glob(f"*.{suffix}")) for suffix in ("safetensors", "bin"))


def _load_checkpoint(
    source: str, task_head: str, label_names: Sequence[str], problem_type: str | None
) -> PreTrainedModel:
    if task_head == "classification":
        return loading.load_encoder(
            source, label_names=label_names, problem_type=problem_type or default_problem_type(label_names)
        )
    config = loading.load_config(source)
    if config.model_type not in FAMILIES:
        raise InputError(
            f"{source}: a student of type {config.model_type!r} is not supported; "
            f"supported: {', '.join(FAMILIES)}"
        )
    model, info = loading.load_weights(TASK_HEADS[task_head], source, config=config, dtype=torch.float32)
    # A masked-language-modelling head, a pooler or a classifier may be too many or too few; the encoder must fit.
    extra = [
        key for key in info["unexpected_keys"] if not loading.contains_any(key, loading.PRETRAINING_KEYS)
    ]
    check_loading(dict(info) | {"unexpected_keys": extra}, source, allowed_missing=loading.PRETRAINING_KEYS)
    return model


def _chosen_layers(
    student_layers: int, teacher: PreTrainedModel, explicit: Sequence[int] | None
) -> tuple[int, ...]:
    return layer_mapping("spread", student_layers, teacher.config.num_hidden_layers, explicit)
