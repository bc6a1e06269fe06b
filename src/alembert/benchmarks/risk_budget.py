"""What a calibrated speed must keep to: which risk, how much of it, how surely."""

from __future__ import annotations

from dataclasses import dataclass

from alembert.benchmarks.risk_control import LossKind
from alembert.common.errors import InputError
from alembert.runtime.policies import REGRESSION

ACCURACY_DROP, DISAGREEMENT, TASK_ERROR = "accuracy-drop", "disagreement", "task-error"
RISKS: tuple[str, ...] = (ACCURACY_DROP, DISAGREEMENT, TASK_ERROR)
CERTIFIED, EMPIRICAL = "certified", "empirical"
MODES: tuple[str, ...] = (CERTIFIED, EMPIRICAL)


@dataclass(frozen=True)
class RiskBudget:
    """What a calibration must keep to.

    Attributes:
        risk: "accuracy-drop" (of the early answers against the full model's), "disagreement" (share of texts
            answered otherwise than by the full model) or "task-error" (share of texts answered wrongly).
        most: ε, in (0, 1): the most of it that is allowed.
        confidence: 1 − δ, in (0, 1).
        mode: "certified", or "empirical": the risk seen on the rows themselves, with no guarantee.
        per_class: whether the risk of every class, by its gold label, must keep to the budget; where texts may have
            several labels or none, that of all texts too.
        scale: for regression, the difference in the label's unit that counts as a whole mistake; a smaller one
            counts in proportion.
    """

    risk: str = ACCURACY_DROP
    most: float = 0.01
    confidence: float = 0.95
    mode: str = CERTIFIED
    per_class: bool = False
    scale: float | None = None

    @property
    def level(self) -> float:
        """δ = 1 − confidence."""
        return round(1 - self.confidence, 12)

    def check(self, problem_type: str) -> None:
        """Raises InputError naming the setting that is wrong or does not suit the problem type."""
        if self.risk not in RISKS:
            raise InputError(f"risk {self.risk!r}: choose one of {', '.join(RISKS)}")
        if self.mode not in MODES:
            raise InputError(f"mode {self.mode!r}: choose one of {', '.join(MODES)}")
        shares = (("max_drop", self.most, "a point is 0.01"), ("confidence", self.confidence, "95% is 0.95"))
        for name, value, example in shares:
            if not 0 < value < 1:
                raise InputError(f"{name} is {value:g}: it is a share between 0 and 1, and {example}")
        is_regression = problem_type == REGRESSION
        if is_regression and self.per_class:
            raise InputError("per_class: a regression model has no classes; leave it out")
        if is_regression and (self.scale is None or not self.scale > 0):
            raise InputError(
                "regression: give scale, the difference that counts as a whole mistake (--scale 1.0)"
            )
        if self.scale is not None and not is_regression:
            raise InputError("scale is for regression only; leave it out")

    def loss_kind(self, problem_type: str) -> LossKind:
        """What values the loss of one text takes."""
        if self.risk == ACCURACY_DROP:
            return LossKind.FRACTION_DIFFERENCE if problem_type == REGRESSION else LossKind.WRONG_DIFFERENCE
        return LossKind.FRACTION if problem_type == REGRESSION else LossKind.WRONG
