"""How `alembert benchmark` measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain

from alembert.common.errors import InputError
from alembert.runtime.policies import check_speed

PEERS: tuple[str, ...] = ("transformers-bf16", "onnx-int8", "onnx-int8-sorted")
"""What the first model is also run as, besides plain transformers in fp32, the baseline."""
DEFAULT_SPEEDS: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class BenchmarkSettings:
    """How a benchmark is run.

    Attributes:
        peers: which of `PEERS` are measured beside the given models.
        speeds: of every model with exits; None = the model's own speed, else 0, 0.1 … 0.9.
        model_speeds: the speeds of some models with exits, by their folders, in place of `speeds`.
        batch_size: texts of a batch for what takes them in their order.
        batch_tokens: token budget of Alembert's own batches; None = that of `batch_size` texts of mean length.
        repeats: timed rounds.
        timing_rows: texts of a round, drawn by `seed` from those that are scored.
        latency_rows: how many of these are also run one by one, each round; 0 leaves latency out.
        threads: of each library, within an operation; None = torch's own choice, for all.
        device: torch's.
        torch_precisions: "fp32", "bf16" or both, for the given models on torch.
        exits, policy, top_k, renormalise, tolerance, max_length: over the models' own, as in `AdaptiveClassifier`.
        own_processes: whether every engine has a process of its own; else all share this one, and memory is not
            measured.
        seed: of the sample and of the orders of turns.
    """

    peers: tuple[str, ...] = PEERS
    speeds: tuple[float, ...] | None = None
    model_speeds: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    batch_size: int = 32
    batch_tokens: int | None = None
    repeats: int = 5
    timing_rows: int = 512
    latency_rows: int = 64
    threads: int | None = None
    device: str = "cpu"
    torch_precisions: tuple[str, ...] = ("fp32",)
    exits: tuple[int, ...] | None = None
    policy: str | None = None
    top_k: int | None = None
    renormalise: bool | None = None
    tolerance: float | None = None
    max_length: int | None = None
    own_processes: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises InputError for what cannot be."""
        unknown = sorted(set(self.peers) - set(PEERS))
        if unknown:
            raise InputError(f"unknown peer {unknown[0]!r}: choose from {', '.join(PEERS)}")
        if self.speeds is not None:
            if not self.speeds:
                raise InputError("no speeds given: name at least one between 0 and 1")
            for speed in self.speeds:
                check_speed(speed)
        for speed in chain.from_iterable(self.model_speeds.values()):
            check_speed(speed)
        unknown = sorted(set(self.torch_precisions) - {"fp32", "bf16"})
        if unknown or not self.torch_precisions:
            raise InputError(
                f"torch precision {', '.join(unknown) or 'not given'}: choose fp32, bf16 or both"
            )
        for name in ("batch_size", "repeats", "timing_rows"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: at least 1 is needed")
