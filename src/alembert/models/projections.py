"""Learnable maps from the student's width to the teacher's, for losses on hidden states."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from alembert.common.errors import InputError

SHARING = ("shared", "per_layer")


class HiddenProjection(nn.Module):
    """H W + b, which takes student hidden states to the teacher's width (TinyBERT, equations 8 and 9).

    Args:
        student_size: width d' of the student's hidden states.
        teacher_size: width d of the teacher's.
        num_layers: M, the student's layers; "per_layer" then has a map for the embeddings and every layer.
        layers: in place of `num_layers`, the only ones (0 = embeddings) that "per_layer" has a map for, so that no
            weight stays without a gradient where a loss reads few layers.
        sharing: "shared" for one map of all layers and the embeddings, as published code has it, or "per_layer"
            for one each.
        when_equal: whether to project where d' = d too, as published code does; otherwise hidden states pass
            unchanged there.
        initializer_range: standard deviation of the initial weights; the bias starts at 0.

    Raises:
        InputError: unknown sharing, or "per_layer" without either of `num_layers` and `layers`.
    """

    def __init__(
        self,
        student_size: int,
        teacher_size: int,
        *,
        num_layers: int | None = None,
        layers: Sequence[int] | None = None,
        sharing: str = "shared",
        when_equal: bool = True,
        initializer_range: float = 0.02,
    ) -> None:
        super().__init__()
        if sharing not in SHARING:
            raise InputError(f"unknown sharing of projections {sharing!r}: choose {' or '.join(SHARING)}")
        if layers is None and num_layers is not None:
            layers = range(num_layers + 1)
        if sharing == "per_layer" and layers is None:
            raise InputError("projections per layer need the number of student layers")
        self.sharing = sharing
        self.is_identity = student_size == teacher_size and not when_equal
        names = ["shared"] if sharing == "shared" else [str(layer) for layer in layers or ()]
        self.linears = nn.ModuleDict()
        for name in [] if self.is_identity else names:
            linear = nn.Linear(student_size, teacher_size)
            nn.init.normal_(linear.weight, 0.0, initializer_range)
            nn.init.zeros_(linear.bias)
            self.linears[name] = linear

    def forward(self, hidden_states: Tensor, layer: int) -> Tensor:
        """(…, d') → (…, d).

        Args:
            hidden_states: the student's, after `layer`.
            layer: 0 for the embeddings, else 1..M.
        """
        if self.is_identity:
            return hidden_states
        projected: Tensor = self.linears["shared" if self.sharing == "shared" else str(layer)](hidden_states)
        return projected
