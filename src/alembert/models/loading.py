"""Models and tokenizers from folders or hub ids: safetensors only, and loud about weights that do not fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.tokenization_utils_base import LARGE_INTEGER

from alembert.common.errors import InputError
from alembert.common.facts import ClassifierFacts
from alembert.common.files import file_sha256, read_json
from alembert.models.bilstm import BilstmConfig
from alembert.models.layered import SUPPORTED_FAMILIES
from alembert.models.multi_exit import (
    STOCK_HEAD,
    MultiExitConfig,
    MultiExitModel,
    check_loading,
    usual_problem_type,
)

# Weights that a pretrained encoder has or lacks by its pretraining, and that a classifier learns or drops.
_HEAD_KEYS = ("classifier", "pooler", "pre_classifier", "head.", "score")
PRETRAINING_KEYS: tuple[str, ...] = (
    *_HEAD_KEYS,
    "cls.",
    "lm_head",
    "predictions",
    "position_ids",
    "vocab_",
    "discriminator_",
    "generator_",
    "decoder.",
)

STOCK_CLASSIFIERS: tuple[str, ...] = (*SUPPORTED_FAMILIES, BilstmConfig.model_type)
"""The `model_type` of every classifier that is read: encoders, and the student that is none."""
_TOKENS_WITHOUT_LIMIT = 512


def load_encoder(
    source: str, *, label_names: Sequence[str], problem_type: str, head: str = STOCK_HEAD
) -> PreTrainedModel:
    """A pretrained encoder with a fresh classification head, in fp32, ready to be fine-tuned.

    A head that the checkpoint has is kept where it fits the labels' number.

    Args:
        source: folder or hub id of a supported family, or with the stock head of a BiLSTM.
        label_names: names in the order of the label ids; empty for regression (one output).
        problem_type: transformers' problem type.
        head: "stock" for the family's own classification head, else an exit head kind for the final head.

    Raises InputError when the source cannot be read, its family is not supported or encoder weights are missing.
    """
    config = load_config(source)
    supported = STOCK_CLASSIFIERS if head == STOCK_HEAD else SUPPORTED_FAMILIES
    if config.model_type not in supported:
        raise InputError(
            f"{source}: models of type {config.model_type!r} cannot be fine-tuned here; "
            f"supported: {', '.join(supported)}"
        )
    names = list(label_names) or ["value"]
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    config.problem_type = problem_type
    auto_class = AutoModelForSequenceClassification if head == STOCK_HEAD else AutoModel
    model, info = load_weights(auto_class, source, config=config, dtype=torch.float32)
    info = dict(info) | {
        "unexpected_keys": [
            key for key in info["unexpected_keys"] if not contains_any(key, PRETRAINING_KEYS)
        ],
        "mismatched_keys": [key for key in info["mismatched_keys"] if not contains_any(key, _HEAD_KEYS)],
    }
    check_loading(info, source, allowed_missing=_HEAD_KEYS)
    return model if head == STOCK_HEAD else MultiExitModel.from_full_model(model, final_head=head)


def load_classifier(source: str) -> PreTrainedModel:
    """A fine-tuned classifier, stock, multi-exit or BiLSTM, in fp32 and evaluation mode.

    Raises InputError when the source cannot be read or any weight of the classifier is missing, for instance
    because it was never fine-tuned, and for a regression model of several values.
    """
    config = load_config(source)
    family = (
        config.full_model_config().model_type if isinstance(config, MultiExitConfig) else config.model_type
    )
    supported = SUPPORTED_FAMILIES if isinstance(config, MultiExitConfig) else STOCK_CLASSIFIERS
    if family not in supported:
        raise InputError(
            f"{source}: models of type {family!r} are not supported; supported: {', '.join(supported)}"
        )
    model, info = load_weights(AutoModelForSequenceClassification, source, config=config, dtype=torch.float32)
    if any(contains_any(key, _HEAD_KEYS) for key in info["missing_keys"]):
        raise NoTrainedHeadError(
            f"{source} has no trained classification head: fine-tune it first (alembert finetune)"
        )
    # Classifiers of families that read the first token directly are often saved with their encoder's pooler.
    unused = [key for key in info["unexpected_keys"] if "pooler." in str(key)]
    check_loading(dict(info) | {"unexpected_keys": set(info["unexpected_keys"]) - set(unused)}, source)
    model.config.problem_type = classifier_facts(model).problem_type
    return model.eval()


def load_any(source: str) -> tuple[PreTrainedModel, bool]:
    """A classifier, or else the encoder alone, in evaluation mode; and whether it is a trained classifier."""
    try:
        return load_classifier(source), True
    except NoTrainedHeadError:
        encoder, _ = load_weights(AutoModel, source, config=load_config(source), dtype=torch.float32)
        return encoder.eval(), False


class NoTrainedHeadError(InputError):
    """The checkpoint is an encoder whose classification head was never trained."""


def load_bare_encoder(source: str) -> PreTrainedModel:
    """The encoder of any checkpoint of a supported family without a head, in fp32 and evaluation mode."""
    config = load_config(source)
    if config.model_type not in SUPPORTED_FAMILIES:
        raise InputError(
            f"{source}: models of type {config.model_type!r} are not supported; "
            f"supported: {', '.join(SUPPORTED_FAMILIES)}"
        )
    model, info = load_weights(AutoModel, source, config=config, dtype=torch.float32)
    unused = {key for key in info["unexpected_keys"] if contains_any(key, PRETRAINING_KEYS)}
    info = dict(info) | {"unexpected_keys": set(info["unexpected_keys"]) - unused}
    check_loading(info, source, allowed_missing=("pooler",))
    return model.eval()


def load_masked_lm(source: str) -> PreTrainedModel:
    """A model for masked language modelling, in fp32 and evaluation mode.

    Raises InputError when the source cannot be read or any weight is missing, its head's above all: sentence
    encoders and classifiers have none.
    """
    model, info = load_weights(AutoModelForMaskedLM, source, config=load_config(source), dtype=torch.float32)
    prefix = f"{model.base_model_prefix}."
    if any(not str(key).startswith(prefix) for key in info["missing_keys"]):
        raise InputError(
            f"{source} has no trained head for masked language modelling. Take the checkpoint that the encoder "
            "was pretrained as, such as bert-base-uncased, or train a head on plain text with "
            "scripts/train_masked_lm.py."
        )
    unused = {key for key in info["unexpected_keys"] if contains_any(key, PRETRAINING_KEYS)}
    check_loading(dict(info) | {"unexpected_keys": set(info["unexpected_keys"]) - unused}, source)
    return model.eval()


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside a model; InputError when there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # tokenizers raises nothing more special for a file that it cannot read
        words = f"{source}: no tokenizer could be read ({_first_line(error)})"
        if any(library in str(error) for library in ("sentencepiece", "tiktoken", "protobuf")):
            words += "; files without a tokenizer.json beside them need: pip install sentencepiece protobuf"
        raise InputError(words) from error
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        # transformers makes one up of special tokens where there are no files: all texts would look alike.
        raise InputError(
            f"{source}: no tokenizer files lie beside the model; save there the tokenizer that it was trained with "
            "(tokenizer.save_pretrained)"
        )
    if tokenizer.pad_token_id is None:
        raise InputError(f"{source}: its tokenizer has no padding token, which batches need")
    tokenizer.padding_side = "right"
    return tokenizer


def classifier_facts(source: str | PreTrainedModel) -> ClassifierFacts:
    """The facts of a classifier, from its configuration alone; names are () for regression.

    Raises InputError for a regression model of several values.
    """
    config = load_config(source) if isinstance(source, str) else source.config
    problem_type = usual_problem_type(config)
    if problem_type == "regression":
        if config.num_labels > 1:
            raise InputError(
                f"{config.name_or_path or 'this model'}: predicts {config.num_labels} values at once, and only "
                "regression of one value is supported; if they are scores of labels, set problem_type in its "
                "config.json to multi_label_classification or single_label_classification"
            )
        return ClassifierFacts(problem_type, ())
    names = tuple(str(config.id2label[index]) for index in range(config.num_labels))
    return ClassifierFacts(problem_type, names)


def load_config(source: str) -> Any:
    """A model's configuration; no code beside it is run. Raises InputError when there is none."""
    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").exists():
        if any(folder.glob("*.onnx")):
            raise InputError(
                f"{source}: is an exported model, or a part of one, which only predict, evaluate, benchmark and report "
                "can run, and with its manifest.json alone: give the run that it came from, or copy the whole folder"
            )
        raise InputError(f"{source}: no config.json in this folder, so it is no model in Hugging Face layout")
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{source}: no model could be read: neither a folder in Hugging Face layout nor a hub id that "
            f"can be reached ({_first_line(error)})"
        ) from error


def load_weights(auto_class: Any, source: str, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model from safetensors files, and transformers' report of missing, unexpected and misshapen keys.

    Args:
        auto_class: one of transformers' Auto classes.
        source: folder or hub id; no code beside the weights is run.
        options: further arguments of `from_pretrained`.

    Raises InputError when the weights cannot be read.
    """
    try:
        model, info = auto_class.from_pretrained(
            source,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # what does not fit is named by `check_loading`
            **options,
        )
    except InputError:
        raise
    except (
        Exception
    ) as error:  # safetensors, transformers and json each raise their own kinds for a broken file
        raise InputError(
            f"{source}: the weights could not be read ({_first_line(error)}). Only safetensors files are read: "
            "a model.safetensors must lie in the folder, whole and fitting its config.json."
        ) from error
    return model, info


def contains_any(key: Any, parts: tuple[str, ...]) -> bool:
    """Whether one of `parts` occurs in a weight's key."""
    return any(part in str(key) for part in parts)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def max_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The longest text in tokens that the position embeddings and the tokenizer allow.

    A BiLSTM has no position embeddings: the tokenizer decides, or 512 where it has no limit either.
    """
    config = model.config.full_model_config() if isinstance(model.config, MultiExitConfig) else model.config
    tokenizer_limit = int(tokenizer.model_max_length)
    if isinstance(config, BilstmConfig):
        return tokenizer_limit if tokenizer_limit < LARGE_INTEGER else _TOKENS_WITHOUT_LIMIT
    positions = int(getattr(config, "max_position_embeddings", None) or _TOKENS_WITHOUT_LIMIT)
    # These families number positions from behind the padding id.
    after_padding = config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet")
    return min(positions - (int(config.pad_token_id) + 1 if after_padding else 0), tokenizer_limit)


def check_max_length(
    max_length: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, what: str = "this model"
) -> None:
    """Raises InputError when texts of `max_length` tokens do not fit the model, or no text fits `max_length`.

    The message calls the model `what`.
    """
    longest, added = max_tokens(model, tokenizer), tokenizer.num_special_tokens_to_add()
    if not added < max_length <= longest:
        raise InputError(f"max length {max_length}: {what} takes {added + 1} to {longest} tokens")


def run_configuration(source: str | Path) -> dict[str, Any]:
    """The resolved configuration of the run in a folder; empty when it is no finished run of Alembert."""
    record = Path(source) / "alembert.json"
    configuration: dict[str, Any] = read_json(record)["configuration"] if record.is_file() else {}
    return configuration


def weights_fingerprint(source: str) -> dict[str, str]:
    """SHA-256 of configuration and weights in a local folder, or of a file, by file name; empty for a hub id."""
    folder = Path(source)
    if folder.is_file():
        return {folder.name: file_sha256(folder)}
    files = sorted([*folder.glob("config.json"), *folder.glob("*.safetensors")]) if folder.is_dir() else []
    return {file.name: file_sha256(file) for file in files}
