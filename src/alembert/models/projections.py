"""Learnable maps from the student's width to the teacher's, for losses on hidden states."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from alembert.common.errors import InputError

SHARING = ("shared", "per_layer")
PROJECTION_FILE = "projection.safetensors"
"""W beside a student that some of a method's stages trained, for the others to go on with."""
logger = logging.getLogger("alembert")


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

    def fits(self, weights: Mapping[str, Tensor]) -> bool:
        """Whether these weights are of the same maps, in the same shapes."""
        own = {name: value.shape for name, value in self.state_dict().items()}
        return own == {name: value.shape for name, value in weights.items()}


def find_projection(module: nn.Module) -> HiddenProjection | None:
    """The first projection with weights inside a module, such as an objective."""
    found = (part for part in module.modules() if isinstance(part, HiddenProjection))
    return next((projection for projection in found if projection.linears), None)


def carry_projection(objectives: Iterable[nn.Module], checkpoint: Path | None) -> None:
    """Makes W one for the whole way: it goes on from the stage on plain text, and through all stages of a run.

    Args:
        objectives: of a run's stages, in order, still untrained; where a later one needs the same maps as the first,
            it gets the first one's.
        checkpoint: the folder that the student's weights come from; it holds `PROJECTION_FILE` if a run of some of a
            method's stages trained it.

    Raises:
        InputError: that file is broken.
    """
    carried: HiddenProjection | None = None
    for objective in objectives:
        projection = find_projection(objective)
        if projection is None:
            continue
        if carried is None:
            carried = projection
            if checkpoint is not None:
                _load(projection, checkpoint / PROJECTION_FILE)
        elif projection.fits(carried.state_dict()):
            for part in objective.modules():
                for name, child in part.named_children():
                    if child is projection:
                        setattr(part, name, carried)


def _load(projection: HiddenProjection, path: Path) -> None:
    if not path.is_file():
        return
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise InputError(
            f"{path}: is broken ({error}): copy the student's whole folder again, or delete the file to learn the maps "
            "between the widths anew"
        ) from error
    if projection.fits(weights):
        projection.load_state_dict(weights)
        logger.info("The maps between the widths go on from %s.", path)
    else:
        logger.info("%s has other maps than this method needs: they are learned anew.", path)
