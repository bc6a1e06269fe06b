"""What the exits of a model learn from its own last layer: FastBERT's and MS-BERT's targets and losses.

Shapes: N layers, E exits, B rows, L classes. Exits and layers are the first dimension, so that one call
serves all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from alembert.common.errors import InputError
from alembert.losses.prediction import distillation_divergence
from alembert.losses.tensors import full_precision, without_autocast
from alembert.losses.transport import EMD_FUNCTIONS

WEIGHTINGS = ("paper", "normalised", "inverse")
SCOPES = ("example", "batch")
EMD_VALUES = ("logits", "probabilities")


def fastbert_loss(
    exit_logits: Tensor,
    teacher_logits: Tensor,
    *,
    kl: str = "student||teacher",
    problem_type: str = "single_label_classification",
    temperature: float = 1.0,
) -> Tensor:
    """Divergence of every exit from the last layer's prediction (Liu et al., ACL 2020, Eq. 7–8).

    Args:
        exit_logits: `(E, B, L)`.
        teacher_logits: `(B, L)`, taken as constant.
        kl: direction, as in `alembert.losses.prediction.kl_divergence`.
        problem_type: one of `alembert.losses.prediction.PROBLEM_TYPES`.
        temperature: of both sides, > 0.

    Returns:
        `(E,)`, the mean over rows for each exit; the paper's loss is their sum.

    Raises:
        InputError: an option has an unknown value.
    """
    divergence = distillation_divergence(
        exit_logits,
        teacher_logits.detach(),
        problem_type,
        direction=kl,
        temperature=temperature,
        reduction="none",
    )
    return divergence.mean(dim=-1)


@torch.no_grad()
def ms_bert_targets(
    layer_logits: Tensor,
    exit_logits: Tensor,
    *,
    emd: str = "sorted",
    weighting: str = "paper",
    teacher_weight: float = 1.0,
    ground_cost: Tensor | None = None,
    scope: str = "example",
    values: str = "logits",
    weighting_temperature: float = 1.0,
    own_layers: bool = False,
) -> Tensor:
    """Every exit's own target: a mixture of all layers' logits (MS-BERT, CollaborateCom 2021, Eq. 5–7).

    The target of exit j is Σ_{i<N} w_ij z_i + λ z_N, where z_i are the logits of layer i and w_ij come from
    the distance d_ij between layer i's and exit j's logits:

    - `"paper"`: w = d, as printed. Far layers weigh most, and the sum grows with the number of layers.
    - `"normalised"`: w ∝ d^(1/T) with Σ_i w_ij = 1; equal weights where all distances are 0.
    - `"inverse"`: w ∝ (1/d)^(1/T) with Σ_i w_ij = 1, so that near layers weigh most; layers at distance 0
      share all the weight.

    For the last two the target is divided by 1 + λ: all weights, the last layer's included, then sum to one
    and the target stays on the logits' scale.

    Memory: the value-based distances hold one N × E × B × L tensor; the mixture none.

    Args:
        layer_logits: `(N, B, L)`, the teacher's logits after each layer 1..N, N ≥ 2.
        exit_logits: `(E, B, L)`.
        emd: name in `alembert.losses.transport.EMD_FUNCTIONS`.
        weighting: see above.
        teacher_weight: λ ≥ 0, the weight of the last layer.
        ground_cost: `(L, L)`, only for `emd="class_aware"`.
        scope: `"example"` for one distance per row; `"batch"` for one per layer and exit, between all the
            batch's values at once, the other reading of the paper (not for `"class_aware"`).
        values: what the value-based distances compare, `"logits"` or the softmax `"probabilities"`; logits
            are mixed either way. `"class_aware"` always compares probabilities.
        weighting_temperature: T > 0 of the normalised weightings: larger is more even. Unused by `"paper"`.
        own_layers: `layer_logits` are the exits' own, in their order, and the teacher's: an exit has no part in
            its own mixture.

    Returns:
        `(E, B, L)` target logits, in fp32 where the inputs have less, without gradient: distances and the frozen
        teacher are constants.

    Raises:
        InputError: an option has an unknown value or does not go with another one, or shapes do not fit.
    """
    if layer_logits.ndim != 3 or exit_logits.ndim != 3 or layer_logits.shape[1:] != exit_logits.shape[1:]:
        raise InputError(
            "layer_logits and exit_logits must be (layers, rows, classes) and (exits, rows, classes), but "
            f"have shapes {tuple(layer_logits.shape)} and {tuple(exit_logits.shape)}."
        )
    if len(layer_logits) < 2:
        raise InputError(
            "layer_logits must hold the logits of at least 2 layers: the last one is the teacher."
        )
    if teacher_weight < 0:
        raise InputError(f"teacher_weight must not be negative, but is {teacher_weight}.")
    if own_layers and (len(layer_logits) != len(exit_logits) + 1 or len(exit_logits) < 2):
        raise InputError(
            "an exit's own logits have no part in its mixture, so there must be at least 2 exits, and of the layers "
            f"theirs and the teacher's; there are {len(exit_logits)} exits and {len(layer_logits)} layers."
        )
    with without_autocast(layer_logits):
        layer_logits, exit_logits = full_precision(layer_logits), full_precision(exit_logits)
        distances = layer_distances(
            layer_logits[:-1], exit_logits, emd=emd, ground_cost=ground_cost, scope=scope, values=values
        )
        own = None
        if own_layers:
            own = torch.eye(len(exit_logits), dtype=torch.bool, device=distances.device)[..., None]
        weights = layer_weights(distances, weighting, weighting_temperature, own).to(layer_logits.dtype)
        mixture = torch.einsum("neb,nbl->ebl", weights, layer_logits[:-1]) + teacher_weight * layer_logits[-1]
        return mixture if weighting == "paper" else mixture / (1 + teacher_weight)


def ms_bert_loss(
    exit_logits: Tensor,
    layer_logits: Tensor,
    *,
    kl: str = "student||teacher",
    problem_type: str = "single_label_classification",
    temperature: float = 1.0,
    emd: str = "sorted",
    weighting: str = "paper",
    teacher_weight: float = 1.0,
    ground_cost: Tensor | None = None,
    scope: str = "example",
    values: str = "logits",
    weighting_temperature: float = 1.0,
    own_layers: bool = False,
) -> Tensor:
    """Divergence of every exit from its own target of `ms_bert_targets` (MS-BERT, Eq. 9–10).

    With several labels the targets are log-odds and the divergence is Bernoulli's; in regression they are
    values and the divergence is the squared difference. Both need a value-based distance on logits; for
    regression choose another weighting than `"paper"`, whose targets are not on the values' scale.

    Args:
        exit_logits: `(E, B, L)`.
        layer_logits: `(N, B, L)`, taken as constant.
        kl: direction, as in `alembert.losses.prediction.kl_divergence`.
        problem_type: one of `alembert.losses.prediction.PROBLEM_TYPES`.
        temperature: of student and target, > 0.
        emd, weighting, teacher_weight, ground_cost, scope, values, weighting_temperature, own_layers: see
        `ms_bert_targets`.

    Returns:
        `(E,)`, the mean over rows for each exit; the paper's loss is their sum.

    Raises:
        InputError: as `ms_bert_targets`; also a distance between classes where they do not exclude one
        another.
    """
    if problem_type != "single_label_classification" and (emd == "class_aware" or values == "probabilities"):
        raise InputError(
            "emd='class_aware' and values='probabilities' compare softmax distributions: for several labels "
            "and regression choose emd='sorted' or 'histogram' with values='logits'."
        )
    targets = ms_bert_targets(
        layer_logits,
        exit_logits,
        emd=emd,
        weighting=weighting,
        teacher_weight=teacher_weight,
        ground_cost=ground_cost,
        scope=scope,
        values=values,
        weighting_temperature=weighting_temperature,
        own_layers=own_layers,
    )
    divergence = distillation_divergence(
        exit_logits, targets, problem_type, direction=kl, temperature=temperature, reduction="none"
    )
    return divergence.mean(dim=-1)


@torch.no_grad()
def layer_distances(
    layer_logits: Tensor,
    exit_logits: Tensor,
    *,
    emd: str = "sorted",
    ground_cost: Tensor | None = None,
    scope: str = "example",
    values: str = "logits",
) -> Tensor:
    """Distances d_ij between layers' and exits' logits (MS-BERT, Eq. 5), without gradient.

    Args:
        layer_logits: `(layers, B, L)`.
        exit_logits: `(E, B, L)`.
        emd, ground_cost, scope, values: see `ms_bert_targets`.

    Returns:
        `(layers, E, B)`, ≥ 0; with `scope="batch"` the same for all rows.

    Raises:
        InputError: an option has an unknown value or does not go with another one.
    """
    for name, value, known in (
        ("emd", emd, tuple(EMD_FUNCTIONS)),
        ("scope", scope, SCOPES),
        ("values", values, EMD_VALUES),
    ):
        if value not in known:
            raise InputError(f"{name} {value!r} is unknown: choose one of {', '.join(known)}.")
    if emd == "class_aware":
        if scope == "batch":
            raise InputError(
                "scope='batch' mixes the classes of all rows: choose emd='sorted' or 'histogram'."
            )
        return EMD_FUNCTIONS[emd](layer_logits[:, None], exit_logits[None], ground_cost)
    if ground_cost is not None:
        raise InputError(f"ground_cost is only for emd='class_aware', not for emd={emd!r}.")
    if values == "probabilities":
        layer_logits, exit_logits = functional.softmax(layer_logits, -1), functional.softmax(exit_logits, -1)
    if scope == "batch":
        distances: Tensor = EMD_FUNCTIONS[emd](layer_logits.flatten(1)[:, None], exit_logits.flatten(1)[None])
        return distances[..., None].expand(-1, -1, layer_logits.shape[1])
    return EMD_FUNCTIONS[emd](layer_logits[:, None], exit_logits[None])


def layer_weights(
    distances: Tensor, weighting: str, temperature: float = 1.0, excluded: Tensor | None = None
) -> Tensor:
    """Weights of the layers from their distances along the first dimension, see `ms_bert_targets`.

    Args:
        distances: `(layers, ...)`, ≥ 0.
        weighting: one of `WEIGHTINGS`.
        temperature: T > 0 of the normalised weightings.
        excluded: bool, broadcastable to `distances`: True where a layer's weight is 0; not for all layers at once.

    Returns:
        Like `distances`; for `"normalised"` and `"inverse"` the sum over the first dimension is 1.

    Raises:
        InputError: unknown weighting, or T not positive.
    """
    if weighting not in WEIGHTINGS:
        raise InputError(f"weighting {weighting!r} is unknown: choose one of {', '.join(WEIGHTINGS)}.")
    if not temperature > 0:
        raise InputError(f"weighting_temperature must be greater than 0, but is {temperature}.")
    nobody = torch.zeros((), dtype=torch.bool, device=distances.device) if excluded is None else excluded
    if weighting == "paper":
        return distances.masked_fill(nobody, 0.0)
    # A softmax of logarithms normalises powers of d; the smallest number keeps log 0 finite, so that
    # distances of 0 yield the limit and not NaN.
    log_distances = (distances.double() + torch.finfo(torch.float64).tiny).log()
    sign = 1 if weighting == "normalised" else -1
    scores = (sign * log_distances / temperature).masked_fill(nobody, -torch.inf)
    return functional.softmax(scores, dim=0).to(distances.dtype)
