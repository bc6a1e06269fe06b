"""The usual way to a fast classifier, as a peer: PyTorch's exporter, ONNX Runtime's dynamic quantisation, defaults."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alembert.common.errors import InputError, install_extra
from alembert.models.loading import load_classifier, load_tokenizer
from alembert.models.multi_exit import MultiExitModel

GRAPH_FILE = "model.onnx"
OPSET = 17
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class _Logits(nn.Module):
    """A classifier that takes tensors by position and gives logits alone."""

    def __init__(self, model: PreTrainedModel, names: list[str]) -> None:
        super().__init__()
        self.names, self.final_head = names, None
        if isinstance(model, MultiExitModel):
            self.final_head, model = model.final_head, model.full_model
        self.model = model

    def forward(self, *tensors: Tensor) -> Tensor:
        inputs = dict(zip(self.names, tensors, strict=True))
        output = self.model(**inputs)
        if self.final_head is None:
            return output.logits  # type: ignore[no-any-return]
        logits: Tensor = self.final_head(output.last_hidden_state, inputs["attention_mask"])
        return logits


def export_plain_int8(source: str, folder: Path) -> Path:
    """Exports a classifier's full model, quantises it dynamically, and writes configuration and tokenizer beside it.

    Args:
        source: run directory, folder in Hugging Face layout or hub id.
        folder: where to; made if need be.

    Returns the folder, which `OnnxRuntimeEngine` opens.

    Raises:
        InputError: the source cannot be read, the `onnx` extra is not installed, or the exporter cannot take the model.
    """
    model, tokenizer = load_classifier(source), load_tokenizer(source)
    folder.mkdir(parents=True, exist_ok=True)
    plain = folder / "fp32.onnx"
    export_plain(model, tokenizer, plain)
    quantise_plain(plain, folder / GRAPH_FILE)
    plain.unlink()
    config = model.config.full_model_config() if isinstance(model, MultiExitModel) else model.config
    config.problem_type = model.config.problem_type
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def export_plain(model: PreTrainedModel, tokenizer: Any, path: Path) -> None:
    """Writes the full model as one graph, ids to logits, for any rows and tokens.

    Raises InputError when the `onnx` extra is not installed or the exporter cannot take the model.
    """
    example = tokenizer(["a", "b b b"], padding=True, return_tensors="pt")
    names = [name for name in _INPUTS if name in example]
    axes = {name: {0: "rows", 1: "tokens"} for name in names} | {"logits": {0: "rows"}}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                _Logits(model, names).eval(),
                tuple(example[name] for name in names),
                str(path),
                input_names=names,
                output_names=["logits"],
                dynamic_axes=axes,
                opset_version=OPSET,
                dynamo=False,
            )
    except ModuleNotFoundError as error:
        raise InputError(
            f"ONNX needs {error.name}: {install_extra('onnx')}, or leave these peers out (--peers)"
        ) from error
    except Exception as error:  # the exporter raises whatever the model's code raised while it was traced
        reason = (str(error).strip().splitlines() or [""])[0]
        raise InputError(
            f"PyTorch's ONNX exporter cannot take this model ({type(error).__name__}: {reason}): "
            "leave the peer onnx-int8 out (--peers)"
        ) from error


def quantise_plain(source: Path, target: Path) -> None:
    """Writes a graph with its matrix products in int8, weights per channel, activations as they come."""
    import logging

    try:
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ModuleNotFoundError as error:
        raise InputError(
            f"ONNX needs {error.name}: {install_extra('onnx')}, or leave these peers out (--peers)"
        ) from error
    logger = logging.getLogger()
    level, handlers = logger.level, list(logger.handlers)
    # Its advice on preparing the graph goes to the root logger, which gets a handler by that.
    logger.setLevel(logging.ERROR)
    try:
        quantize_dynamic(source, target, per_channel=True, weight_type=QuantType.QInt8)
    finally:
        logger.setLevel(level)
        logger.handlers[:] = handlers
