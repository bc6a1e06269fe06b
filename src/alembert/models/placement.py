"""Where exits stand: MS-BERT's splicing strategies (Huang et al., CollaborateCom 2021, Fig. 2)."""

from __future__ import annotations

from collections.abc import Sequence

from alembert.common.errors import InputError

PLACEMENTS: tuple[str, ...] = ("every_k", "last_k", "all")


def exit_layers(
    num_layers: int, placement: str = "every_k", k: int | None = None, layers: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Layers after which student exits stand, ascending; the full model's own exit N is not among them.

    `every_k`: 1, 1+k, … ≤ N−1 (k = 2 unless given); `last_k`: N−k … N−1 (k = N/2 unless given); `all`:
    1 … N−1. The positions were recovered from the FLOPs columns of MS-BERT's Table 1. `layers` is an
    explicit list and overrides `placement`.

    Raises InputError for an unknown placement, a k out of range or without a use, or a layer outside 1 … N−1.
    """
    if num_layers < 2:
        raise InputError(f"a model of {num_layers} layer(s) has no room for early exits")
    last = num_layers - 1
    if layers is not None:
        chosen = tuple(sorted(set(layers)))
        wrong = [layer for layer in chosen if not 1 <= layer <= last]
        if wrong or not chosen:
            raise InputError(f"exit layers {list(layers)}: each must be between 1 and {last}")
        return chosen
    if placement == "all":
        if k is not None:
            raise InputError(
                f"placement k={k}: the placement all has none; leave it out, or choose every_k or last_k"
            )
        return tuple(range(1, num_layers))
    if placement == "every_k":
        k = 2 if k is None else k
        _check_k(k, last)
        return tuple(range(1, num_layers, k))
    if placement == "last_k":
        k = num_layers // 2 if k is None else k
        _check_k(k, last)
        return tuple(range(num_layers - k, num_layers))
    raise InputError(
        f"unknown placement {placement!r}: choose one of {', '.join(PLACEMENTS)} or a list of layers"
    )


def _check_k(k: int, last: int) -> None:
    if not 1 <= k <= last:
        raise InputError(f"placement k={k}: must be between 1 and {last}")
