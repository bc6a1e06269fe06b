"""Which teacher layer a student layer learns from, or starts as. Layers are numbered 1 … M and 1 … N."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from alembert.common.errors import InputError

LayerPairs = tuple[tuple[int, int], ...]


def _uniform(student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    # Integers throughout, so that halves are rounded up whatever their binary form.
    return tuple(
        (2 * layer * teacher_layers + student_layers) // (2 * student_layers)
        for layer in range(1, student_layers + 1)
    )


def _top(student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    return tuple(range(teacher_layers - student_layers + 1, teacher_layers + 1))


def _bottom(student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    return tuple(range(1, student_layers + 1))


def _spread(student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    steps = student_layers - 1
    if steps == 0:
        return (1,)
    return tuple(1 + (2 * step * (teacher_layers - 1) + steps) // (2 * steps) for step in range(steps + 1))


LAYER_MAPPINGS: dict[str, Callable[[int, int], tuple[int, ...]]] = {
    "uniform": _uniform,
    "top": _top,
    "bottom": _bottom,
    "spread": _spread,
}
PKD_MAPPINGS: dict[str, Callable[[int, int], tuple[int, ...]]] = {"skip": _uniform, "last": _top}


def layer_mapping(
    kind: str, student_layers: int, teacher_layers: int, explicit: Sequence[int] | None = None
) -> tuple[int, ...]:
    """The teacher layer g(m) in 1..N for each student layer m = 1..M.

    Args:
        kind: "uniform" g(m) = m·N/M, the nearest layer where M does not divide N and the upper one of two;
            "top" g(m) = m + N − M; "bottom" g(m) = m (TinyBERT, Jiao et al. 2020, section 4.5); "spread" evenly
            from layer 1 to layer N, both included, which gives DistilBERT's 1, 3, 5, 8, 10, 12 for 12 → 6.
        student_layers: M.
        teacher_layers: N.
        explicit: g(1) … g(M), non-decreasing, in place of `kind`; a teacher layer may serve several.

    Raises:
        InputError: unknown kind, M > N without an explicit list, or a list that does not fit.
    """
    if explicit is not None:
        return _checked(explicit, student_layers, teacher_layers)
    if kind not in LAYER_MAPPINGS:
        raise InputError(f"unknown layer mapping {kind!r}: choose one of {', '.join(LAYER_MAPPINGS)}")
    _check_depth(student_layers, teacher_layers, "or list a teacher layer for every student layer")
    return LAYER_MAPPINGS[kind](student_layers, teacher_layers)


def pkd_layers(kind: str, student_layers: int, teacher_layers: int) -> LayerPairs:
    """The (student layer, teacher layer) pairs of BERT-PKD; the student's last layer is left to the logits.

    Args:
        kind: "skip" or "last" (Sun et al. 2019, section 3.2): for M = 6, N = 12 the teacher layers
            2, 4, 6, 8, 10 or 7 … 11; for M = 3, N = 12 the layers 4, 8 or 10, 11.
        student_layers: M, at least 2.
        teacher_layers: N.

    Raises:
        InputError: unknown kind, M < 2, or M > N.
    """
    if kind not in PKD_MAPPINGS:
        raise InputError(f"unknown choice of teacher layers {kind!r}: choose {' or '.join(PKD_MAPPINGS)}")
    if student_layers < 2:
        raise InputError(
            f"patient distillation reads the student layers below its last one, and a student of "
            f"{student_layers} layer has none: give it 2 to {teacher_layers} layers"
        )
    _check_depth(student_layers, teacher_layers)
    mapped = PKD_MAPPINGS[kind](student_layers, teacher_layers)
    return tuple(enumerate(mapped[:-1], start=1))


def _check_depth(student_layers: int, teacher_layers: int, alternative: str = "") -> None:
    if not 1 <= student_layers <= teacher_layers:
        raise InputError(
            f"a student of {student_layers} layers cannot follow a teacher of {teacher_layers} layer by layer: "
            f"choose 1 to {teacher_layers} student layers{' ' * bool(alternative)}{alternative}"
        )


def _checked(explicit: Sequence[int], student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    layers = tuple(int(layer) for layer in explicit)
    shown = ", ".join(map(str, layers))
    if len(layers) != student_layers:
        raise InputError(
            f"{len(layers)} teacher layers ({shown}) for {student_layers} student layers: list exactly one for each"
        )
    if not all(1 <= layer <= teacher_layers for layer in layers):
        raise InputError(f"teacher layers {shown}: this teacher has layers 1 to {teacher_layers}")
    if list(layers) != sorted(layers):
        raise InputError(
            f"teacher layers {shown} go down somewhere: list them in ascending order (repeats are allowed)"
        )
    return layers
