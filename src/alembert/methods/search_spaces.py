"""What `alembert search` varies where `--space` is not given, by method."""

from __future__ import annotations

SEARCH_SPACES: dict[str, tuple[str, ...]] = {
    "alembert": (
        "learning_rate=2e-5..3e-4:log",
        "depth=0.34..1",
        "temperature=1..4",
        "hard_weight=0..1",
    ),
    "fastbert": ("learning_rate=1e-4..5e-3:log", "placement=every_k|last_k|all", "temperature=1..4"),
    "ms-bert": (
        "learning_rate=1e-4..5e-3:log",
        "placement=every_k|last_k|all",
        "temperature=1..4",
        "weighting=paper|normalised|inverse",
    ),
    "pabee": ("learning_rate=1e-5..2e-4:log", "placement=every_k|last_k|all", "self_distillation=0..2"),
    "deebert": (
        "learning_rate=1e-4..5e-3:log",
        "placement=every_k|last_k|all",
        "exit_head=fastbert|pooled|linear|mean",
    ),
    "berxit": ("learning_rate=1e-5..2e-4:log", "placement=every_k|last_k|all", "strategy=alternating|joint"),
    "kd": ("learning_rate=5e-5..5e-4:log", "temperature=1..10", "hard_weight=0..1"),
    "tinybert": (
        "learning_rate=5e-5..5e-4:log",
        "intermediate_learning_rate=5e-5..1e-3:log",
        "temperature=1..4",
        "hard_weight=0..1",
    ),
    "bert-emd": ("learning_rate=5e-5..5e-4:log", "temperature=1..7", "beta=1e-3..1:log"),
    "lrc-bert": ("learning_rate=5e-5..5e-4:log", "temperature=1..4", "hard_weight=0..5"),
    "distilbert": ("learning_rate=5e-5..5e-4:log", "temperature=1..4", "cosine_weight=0..2"),
    "pkd": (
        "learning_rate=5e-5..5e-4:log",
        "temperature=1..20",
        "hard_weight=0..1",
        "patient_weight=0.1..1000:log",
    ),
    "minilm": (
        "learning_rate=5e-5..5e-4:log",
        "intermediate_learning_rate=5e-5..1e-3:log",
        "temperature=1..4",
    ),
    "minilm-v2": (
        "learning_rate=5e-5..5e-4:log",
        "intermediate_learning_rate=5e-5..1e-3:log",
        "temperature=1..4",
    ),
}
"""In the syntax of `--space`. Methods with a student also vary its shape, which depends on the teacher."""

SAME_WIDTH = ("distilbert", "pkd")
"""Methods that compare layers without a projection: their students are as wide as the teacher."""


def student_shapes(method: str, layers: int, hidden_size: int, heads: int) -> tuple[str, ...]:
    """Shapes `LxH` to choose from below a teacher: a sixth, a third and half of its layers, all and half its width.

    Half the width is left out where the teacher's heads do not divide it or the method needs equal widths.
    """
    depths = sorted({max(1, layers // share) for share in (6, 3, 2)})
    half_fits = hidden_size % (2 * heads) == 0 and method not in SAME_WIDTH
    widths = (hidden_size // 2, hidden_size) if half_fits else (hidden_size,)
    return tuple(f"{depth}x{width}" for depth in depths for width in widths)
