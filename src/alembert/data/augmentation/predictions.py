"""What a masked language model predicts at chosen positions, without scoring the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def logits_at(model: PreTrainedModel, inputs: Mapping[str, Tensor], rows: Tensor, columns: Tensor) -> Tensor:
    """The vocabulary's logits at the positions (rows[i], columns[i]) of a batch.

    The model's own forward pass runs, but its head sees these positions alone, which saves most of the product
    with the vocabulary. The numbers are those of the whole forward pass.

    Args:
        model: a model for masked language modelling; gradients pass where they are recorded.
        inputs: the model's inputs, (rows of the batch, tokens).
        rows, columns: (positions,), int64.

    Returns:
        (positions, vocabulary), in the model's floating-point type.
    """

    def keep(_: nn.Module, __: Any, output: Any) -> Any:
        kept = output[0][rows, columns].unsqueeze(0)
        if isinstance(output, tuple):
            return (kept, *output[1:])
        output["last_hidden_state"] = kept
        return output

    handle = model.base_model.register_forward_hook(keep)
    try:
        logits: Tensor = model(**inputs).logits
    finally:
        handle.remove()
    return logits.squeeze(0)
