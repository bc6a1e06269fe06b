"""The bidirectional LSTM classifier of "Distilled BiLSTM" as a transformers model.

The file imports torch and transformers alone: it is saved beside the weights, and transformers can load a model from
there without Alembert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class BilstmConfig(PreTrainedConfig):  # type: ignore[misc]
    """Configuration of `BilstmForSequenceClassification`.

    Attributes:
        vocab_size: tokens in the vocabulary, the teacher's.
        embedding_size: width of the token embeddings.
        hidden_size: width of the LSTM in each direction.
        num_hidden_layers: LSTM layers.
        head_size: width of the layer with ReLU before the logits.
        dropout: on the embeddings, between LSTM layers and before the logits.
        initializer_range: standard deviation of embeddings drawn at random.

    Examples:
        >>> from alembert import BilstmConfig
        >>> config = BilstmConfig(vocab_size=1000, hidden_size=64, num_labels=3)
        >>> config.hidden_size, config.num_labels
        (64, 3)
    """

    model_type = "alembert-bilstm"

    vocab_size: int = 30522
    embedding_size: int = 300
    hidden_size: int = 150
    num_hidden_layers: int = 1
    head_size: int = 400
    dropout: float | int = 0.0
    initializer_range: float = 0.1
    pad_token_id: int | None = 0


class BilstmForSequenceClassification(PreTrainedModel):  # type: ignore[misc]
    """Token embeddings, a bidirectional LSTM, a layer with ReLU and the logits (Tang et al. 2019, section 3.1).

    The LSTM's last states of both directions are concatenated. Padding on either side is never read. A pair of
    texts is read as one sequence, as the tokenizer joins it; the paper reads the two apart and compares them.

    Examples:
        >>> import torch
        >>> from alembert import BilstmConfig, BilstmForSequenceClassification
        >>> config = BilstmConfig(vocab_size=1000, embedding_size=32, hidden_size=16, head_size=24, num_labels=3)
        >>> model = BilstmForSequenceClassification(config)
        >>> model(torch.tensor([[5, 7, 9], [4, 2, 0]])).logits.shape
        torch.Size([2, 3])
    """

    config_class = BilstmConfig
    base_model_prefix = ""
    main_input_name = "input_ids"

    def __init__(self, config: BilstmConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.embedding_size, config.pad_token_id)
        self.lstm = nn.LSTM(
            config.embedding_size,
            config.hidden_size,
            config.num_hidden_layers,
            batch_first=True,
            dropout=config.dropout if config.num_hidden_layers > 1 else 0.0,
            bidirectional=True,
        )
        self.dense = nn.Linear(2 * config.hidden_size, config.head_size)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.head_size, config.num_labels)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Logits (rows, labels), and the task loss when labels are given.

        Args:
            input_ids: (rows, tokens), int64.
            attention_mask: (rows, tokens), 1 = token; all tokens when absent.
            token_type_ids: ignored, as are further arguments.
            labels: (rows,) int64, (rows, labels) float for multi-label, (rows,) float for regression.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        # Tokens to the front, in their order: padding on the left is then no different from padding on the right.
        order = mask.argsort(dim=1, descending=True, stable=True)
        embedded = self.dropout(self.embeddings(input_ids.gather(1, order)))
        lengths = mask.sum(dim=1).clamp(min=1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
        _, (states, _) = self.lstm(packed)
        row_vectors = torch.cat([states[-2], states[-1]], dim=-1)
        logits = self.classifier(self.dropout(torch.relu(self.dense(row_vectors))))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _init_weights(self, module: nn.Module) -> None:
        # LSTM and linear layers keep torch's initialisation, which suits their widths.
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, 0.0, self.config.initializer_range)
        elif isinstance(module, nn.LSTM | nn.Linear):
            module.reset_parameters()


BilstmConfig.register_for_auto_class()
BilstmForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
AutoConfig.register(BilstmConfig.model_type, BilstmConfig, exist_ok=True)
AutoModelForSequenceClassification.register(BilstmConfig, BilstmForSequenceClassification, exist_ok=True)
