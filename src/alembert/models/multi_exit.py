"""A stock encoder with exit heads after chosen layers, as one transformers model."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from alembert.common.errors import InputError
from alembert.losses.prediction import task_loss
from alembert.models.exit_heads import EXIT_HEADS, ExitHead, build_exit_head
from alembert.models.layered import LayeredEncoder

STOCK_HEAD = "stock"


class MultiExitConfig(PreTrainedConfig):  # type: ignore[misc]
    """Configuration of `MultiExitModel`.

    Attributes:
        full_model: the stock model's configuration as a dictionary, `model_type` included.
        exit_layers: layers (1 … N−1) after which student exits stand, ascending.
        exit_head: kind of the student heads, one of `EXIT_HEADS`.
        exit_head_size: inner width of FastBERT heads.
        final_head: "stock" (the family's own classification head) or one of `EXIT_HEADS`, after layer N.
        final_head_size: inner width of a FastBERT final head.
        learned_exit: whether a shared linear layer foresees an exit's mistakes (BERxiT).
        policy, top_k, speed: defaults for adaptive inference; None leaves the choice to the runtime.

    Examples:
        >>> from alembert import MultiExitConfig
        >>> config = MultiExitConfig.from_pretrained("runs/fast")
        >>> config.exit_layers, config.exit_head, config.full_model_config().model_type
        ([1, 2, 3], 'fastbert', 'bert')
    """

    model_type = "alembert-multi-exit"

    full_model: dict[str, Any] | None = None
    exit_layers: list[int] | tuple[int, ...] = ()
    exit_head: str = "fastbert"
    exit_head_size: int = 128
    final_head: str = STOCK_HEAD
    final_head_size: int = 128
    learned_exit: bool = False
    policy: str | None = None
    top_k: int | None = None
    speed: float | None = None

    def full_model_config(self) -> PreTrainedConfig:
        """The stock model's configuration, carrying this one's labels and problem type."""
        if not self.full_model or "model_type" not in self.full_model:
            raise InputError(
                "a multi-exit configuration needs `full_model`, the stock model's configuration with its `model_type`"
            )
        settings = {key: value for key, value in self.full_model.items() if key != "model_type"}
        settings |= {"id2label": self.id2label, "label2id": self.label2id, "problem_type": self.problem_type}
        return AutoConfig.for_model(self.full_model["model_type"], **settings)


@dataclass
class MultiExitOutput(ModelOutput):  # type: ignore[misc]
    """Output of `MultiExitModel`; N layers, E student exits.

    Attributes:
        loss: task loss of the full model's logits, when labels were given.
        logits: (rows, labels), the full model's.
        exit_logits: (E, rows, labels), student exits in ascending order of layers.
        layer_logits: (N, rows, labels), the final head applied after every layer, on request.
        mistake_logits: (E, rows), the learned exit's logits of "this exit is wrong".
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    exit_logits: Tensor | None = None
    layer_logits: Tensor | None = None
    mistake_logits: Tensor | None = None


class MultiExitModel(PreTrainedModel):  # type: ignore[misc]
    """Backbone, final head and student exits; loads and saves as any transformers model.

    Examples:
        >>> import alembert
        >>> from transformers import AutoModelForSequenceClassification
        >>> model = AutoModelForSequenceClassification.from_pretrained("runs/fast")
        >>> type(model).__name__, model.exit_layers
        ('MultiExitModel', (1, 2, 3))
    """

    config_class = MultiExitConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: MultiExitConfig, full_model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        if config.final_head not in (STOCK_HEAD, *EXIT_HEADS):
            raise InputError(
                f"unknown final head {config.final_head!r}: choose stock, {', '.join(EXIT_HEADS)}"
            )
        if full_model is None:
            auto_class = AutoModelForSequenceClassification if config.final_head == STOCK_HEAD else AutoModel
            full_model = auto_class.from_config(config.full_model_config(), trust_remote_code=False)
        self.full_model: PreTrainedModel = full_model
        self.layered = LayeredEncoder(full_model)
        hidden_size, head_size = self.layered.hidden_size, config.exit_head_size
        self.final_head: ExitHead | None = None
        if config.final_head != STOCK_HEAD:
            self.final_head = build_exit_head(
                config.final_head, hidden_size, config.num_labels, config.final_head_size
            )
        self.exit_heads = nn.ModuleDict(
            {
                str(layer): build_exit_head(config.exit_head, hidden_size, config.num_labels, head_size)
                for layer in config.exit_layers
            }
        )
        self.learned_exit = nn.Linear(hidden_size, 1) if config.learned_exit else None
        self.layer_heads: nn.ModuleDict | None = None
        self.post_init()

    @classmethod
    def from_full_model(
        cls,
        full_model: PreTrainedModel,
        *,
        exit_layers: tuple[int, ...] = (),
        exit_head: str = "fastbert",
        exit_head_size: int = 128,
        final_head: str = STOCK_HEAD,
        final_head_size: int = 128,
        learned_exit: bool = False,
    ) -> MultiExitModel:
        """Puts fresh exits on a stock classifier, or on a base encoder when `final_head` is not "stock"."""
        stock = full_model.config
        config = MultiExitConfig(
            full_model=stock.to_diff_dict() | {"model_type": stock.model_type},
            exit_layers=list(exit_layers),
            exit_head=exit_head,
            exit_head_size=exit_head_size,
            final_head=final_head,
            final_head_size=final_head_size,
            learned_exit=learned_exit,
            id2label=stock.id2label,
            label2id=stock.label2id,
            problem_type=stock.problem_type,
        )
        return cls(config, full_model)

    @classmethod
    def from_teacher(cls, teacher: MultiExitModel | PreTrainedModel, **exits: Any) -> MultiExitModel:
        """A multi-exit model with fresh exits that shares the teacher's backbone and final head."""
        if not isinstance(teacher, MultiExitModel):
            return cls.from_full_model(teacher, **exits)
        exits |= {"final_head": teacher.config.final_head, "final_head_size": teacher.config.final_head_size}
        model = cls.from_full_model(teacher.full_model, **exits)
        if model.final_head is not None and teacher.final_head is not None:
            model.final_head.load_state_dict(teacher.final_head.state_dict())
        return model

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, except that missing, unexpected or misshapen weights raise InputError."""
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs.setdefault("use_safetensors", True)
        # Misshapen weights are let through to `check_loading`, which names them in one error with the others.
        kwargs.setdefault("ignore_mismatched_sizes", True)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        check_loading(info, str(args[0]) if args else "the checkpoint")
        return (model, info) if wants_info else model

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """Layers of the student exits, ascending; the full model's exit N is not among them."""
        return tuple(self.config.exit_layers)

    @property
    def num_layers(self) -> int:
        """N, the number of encoder layers."""
        return self.layered.num_layers

    @property
    def backbone_is_frozen(self) -> bool:
        """Whether neither backbone nor final head is trained."""
        return not any(parameter.requires_grad for parameter in self._backbone_parameters())

    def freeze_backbone(self) -> None:
        """Fixes backbone and final head: no gradients, and evaluation mode whatever `train` says."""
        for parameter in self._backbone_parameters():
            parameter.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> MultiExitModel:
        super().train(mode)
        if mode and self.backbone_is_frozen:
            self.full_model.eval()
            if self.final_head is not None:
                self.final_head.eval()
        return self

    def add_layer_heads(self) -> None:
        """Gives every layer below N a linear head for `layer_logits`, in place of the final head's answer.

        They serve training alone (deep supervision); take them away with `remove_layer_heads` before saving.
        """
        self.layer_heads = nn.ModuleDict(
            {
                str(layer): build_exit_head("linear", self.layered.hidden_size, self.config.num_labels)
                for layer in range(1, self.num_layers)
            }
        ).to(self.device)
        for head in self.layer_heads.modules():
            self._init_weights(head)

    def remove_layer_heads(self) -> None:
        """Takes away the heads that `add_layer_heads` gave."""
        self.layer_heads = None

    def output_weight(self) -> Tensor:
        """The weight (labels, width) of the final head's last linear layer."""
        modules = (self.full_model if self.final_head is None else self.final_head).modules()
        linears = [module for module in modules if isinstance(module, nn.Linear)]
        return [linear.weight for linear in linears if linear.out_features == self.config.num_labels][-1]

    def final_logits(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        """The final head's logits (rows, labels) on any layer's hidden states (rows, tokens, hidden)."""
        if self.final_head is not None:
            return self.final_head(hidden_states, attention_mask)  # type: ignore[no-any-return]
        return self.layered.classify(hidden_states, attention_mask)

    def mistake_logits(self, hidden_states: Tensor) -> Tensor:
        """The learned exit's logits (rows,) that an exit reading these hidden states is wrong (BERxiT, section 3)."""
        if self.learned_exit is None:
            raise InputError(
                "this model has no learned exit: distil with the option learned_exit=true, or choose another policy"
            )
        return self.learned_exit(hidden_states[:, 0])[:, 0]  # type: ignore[no-any-return]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        output_layer_logits: bool = False,
        **kwargs: Any,
    ) -> MultiExitOutput:
        """Runs every layer once and every exit; a frozen backbone builds no graph.

        Args:
            input_ids: (rows, tokens), int64.
            attention_mask: (rows, tokens), 1 = token, padding on the right; all tokens when absent.
            token_type_ids: (rows, tokens), for families that have them.
            labels: (rows,) int64, (rows, labels) float for multi-label, (rows,) float for regression.
            output_layer_logits: also apply the final head after every layer (`teacher_logits="shared_head"`).
        """
        exit_logits, layer_logits, mistake_logits = [], [], []
        frozen = self.backbone_is_frozen

        def backbone_context() -> Any:
            return torch.no_grad() if frozen else nullcontext()

        with backbone_context():
            state = self.layered.embed(input_ids, attention_mask, token_type_ids)
        for layer in range(1, self.num_layers + 1):
            with backbone_context():
                state = self.layered.run_layer(layer, state)
                hidden_states = self.layered.output(state)
                if layer == self.num_layers or (output_layer_logits and self.layer_heads is None):
                    layer_logits.append(self.final_logits(hidden_states, state.attention_mask))
            if output_layer_logits and self.layer_heads is not None and layer < self.num_layers:
                layer_logits.append(self.layer_heads[str(layer)](hidden_states, state.attention_mask))
            if str(layer) in self.exit_heads:
                exit_logits.append(self.exit_heads[str(layer)](hidden_states, state.attention_mask))
                if self.learned_exit is not None:
                    # It watches the backbone and must not move it.
                    mistake_logits.append(self.mistake_logits(hidden_states.detach()))
        logits = layer_logits[-1]
        return MultiExitOutput(
            loss=None if labels is None else task_loss(logits, labels, usual_problem_type(self.config)),
            logits=logits,
            exit_logits=torch.stack(exit_logits) if exit_logits else None,
            layer_logits=torch.stack(layer_logits) if output_layer_logits else None,
            mistake_logits=torch.stack(mistake_logits) if mistake_logits else None,
        )

    def _backbone_parameters(self) -> list[nn.Parameter]:
        head = [] if self.final_head is None else list(self.final_head.parameters())
        return [*self.full_model.parameters(), *head]


def usual_problem_type(config: PreTrainedConfig) -> str:
    """A configuration's problem type; where it has none, as transformers takes it: one output means regression."""
    if config.problem_type is not None:
        return str(config.problem_type)
    return "regression" if config.num_labels == 1 else "single_label_classification"


def check_loading(info: dict[str, Any], source: str, allowed_missing: tuple[str, ...] = ()) -> None:
    """Raises InputError when a checkpoint lacks weights, carries unknown ones, or has them in other shapes.

    Missing keys that contain one of `allowed_missing` are let through.
    """
    missing = [key for key in info["missing_keys"] if not any(part in key for part in allowed_missing)]
    faults = {"missing": missing, "unexpected": info["unexpected_keys"], "misshapen": info["mismatched_keys"]}
    found = [f"{len(keys)} {fault} ({_sample(keys)})" for fault, keys in faults.items() if keys]
    if found:
        raise InputError(
            f"{source}: the weights do not fit the configuration: {'; '.join(found)}. "
            "The checkpoint is incomplete or belongs to another architecture."
        )


def _sample(keys: Any) -> str:
    names = sorted(str(key) for key in keys)
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


AutoConfig.register(MultiExitConfig.model_type, MultiExitConfig, exist_ok=True)
AutoModelForSequenceClassification.register(MultiExitConfig, MultiExitModel, exist_ok=True)
