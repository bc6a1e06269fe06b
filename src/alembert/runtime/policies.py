"""Exit policies: how uncertain an exit is about each row, in [0, 1].

A row leaves at the first exit whose uncertainty is below the speed (FastBERT, Section 3.4). Everything here
is written once for NumPy arrays and torch tensors, so that backends cannot differ, and never imports torch.

Probabilities are softmax outputs for "single_label_classification", sigmoid outputs for
"multi_label_classification" and raw values for "regression". The four measures of a distribution work on the
last axis, (..., labels) → (...), in float32 or float64, and return the dtype they were given.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from alembert.common.errors import InputError

Array = Any
"""A `numpy.ndarray` or a `torch.Tensor`."""

SINGLE_LABEL = "single_label_classification"
MULTI_LABEL = "multi_label_classification"
REGRESSION = "regression"
PROBLEM_TYPES = (SINGLE_LABEL, MULTI_LABEL, REGRESSION)

MANY_LABELS = 20
"""Above this number of labels the default policy looks at the most probable labels only."""
MANY_LABELS_TOP_K = 18
"""MS-BERT's K for the 166 classes of TCST; with few classes it uses K = number of labels."""


def entropy(probabilities: Array) -> Array:
    """Normalised entropy −Σ p ln p / ln L, with 0 · ln 0 = 0 (FastBERT, Section 3.4; MS-BERT, Eq. 11).

    Args:
        probabilities: (..., L) distributions, L ≥ 2.

    Returns:
        (...) values in [0, 1]: 1 for the uniform distribution, 0 for a one-hot one.
    """
    return _normalised_surprise(probabilities, probabilities.shape[-1])


def top_k_entropy(probabilities: Array, k: int, renormalise: bool) -> Array:
    """Entropy of the K largest probabilities, Σ −p ln p / ln K (MS-BERT, Eq. 12).

    As printed (`renormalise=False`) the K probabilities do not sum to 1, so a flat distribution over many
    classes looks certain (0.19 for 166 classes and K = 18); for K = 2 the sum can reach 1.06 and is cut at 1.
    `renormalise=True` divides by their sum first, and the flat distribution gives 1.

    Args:
        probabilities: (..., L) distributions.
        k: how many of the largest probabilities count, 2 ≤ k ≤ L; k = L is `entropy`.
        renormalise: whether the K probabilities are divided by their sum.

    Returns:
        (...) values in [0, 1].
    """
    largest = _largest(probabilities, k)
    if renormalise:
        largest = largest / largest.sum(axis=-1)[..., None]
    return _normalised_surprise(largest, k)


def max_probability(probabilities: Array) -> Array:
    """What the largest probability leaves over, (1 − max p) · L / (L − 1): (..., L) → (...) in [0, 1]."""
    labels = probabilities.shape[-1]
    largest = _namespace(probabilities).amax(probabilities, axis=-1)
    return ((1 - largest) * (labels / (labels - 1))).clip(0.0, 1.0)


def margin(probabilities: Array) -> Array:
    """How close the two largest probabilities are, 1 − (p₁ − p₂): (..., L) → (...) in [0, 1]."""
    two = _largest(probabilities, 2)
    first = _namespace(probabilities).amax(two, axis=-1)
    second = two.sum(axis=-1) - first
    return (1 - (first - second)).clip(0.0, 1.0)


class PolicyHistory(NamedTuple):
    """What a policy remembers of the rows still running; every field has rows first."""

    predictions: Array
    """(rows, 1) class indices, (rows, L) label decisions, or (rows, 1) regression values at the last exit."""
    agreements: Array
    """(rows,) number of consecutive exits up to the last one that agreed with the exit before them."""

    def select(self, rows: Array) -> PolicyHistory:
        """The history of `rows`, an index or boolean array over the rows, in that order."""
        return PolicyHistory(self.predictions[rows], self.agreements[rows])


_DISTRIBUTION_POLICIES = ("entropy", "top_k_entropy", "max_probability", "margin")
POLICIES = (*_DISTRIBUTION_POLICIES, "patience", "learned")


@dataclass(frozen=True)
class ExitPolicy:
    """Turns an exit's probabilities into an uncertainty in [0, 1]; a row leaves when it is below the speed.

    - "entropy" (FastBERT), "top_k_entropy" (MS-BERT, Eq. 12), "max_probability" and "margin" look at one
      exit's distribution. In a multi-label problem each label is a distribution (p, 1 − p), and the most
      uncertain label counts.
    - "patience" (PABEE) counts consecutive exits that agree, per row: uncertainty = 1 − count / num_exits.
      The first exit counts 0, so a row leaves after P = floor((1 − speed) · num_exits) + 1 agreements on end.
      Exits agree when the most probable class is equal, when all labels decided at 0.5 are equal, or when
      the regression values differ by less than `tolerance`.
    - "learned" (BERxiT) takes the value that the model's exits were trained to give.

    Examples:
        >>> import numpy as np
        >>> from alembert import ExitPolicy
        >>> uncertainty, _ = ExitPolicy("entropy").uncertainty(np.array([[0.5, 0.5], [0.99, 0.01]]))
        >>> uncertainty.round(2).tolist()
        [1.0, 0.08]
    """

    name: str = "entropy"
    """One of `POLICIES`."""
    problem_type: str = SINGLE_LABEL
    """One of `PROBLEM_TYPES`."""
    num_exits: int = 2
    """Number of exits, the full model's own head included; at least 1."""
    top_k: int | None = None
    """K of "top_k_entropy", in [2, labels]. Default: all of up to 20 labels, 18 of more, as in MS-BERT."""
    renormalise: bool | None = None
    """Whether "top_k_entropy" divides the K probabilities by their sum. Default: True."""
    tolerance: float = 0.1
    """Below this difference (in the target's unit) two regression values agree under "patience"; positive."""

    def __post_init__(self) -> None:
        self.validate()

    def validate(self, num_labels: int | None = None) -> None:
        """Checks the settings, and `top_k` against `num_labels` where that is given.

        Raises:
            InputError: names the setting that is wrong and what is allowed.
        """
        if self.name not in POLICIES:
            raise InputError(f"Unknown exit policy {self.name!r}: choose one of {', '.join(POLICIES)}.")
        if self.problem_type not in PROBLEM_TYPES:
            raise InputError(
                f"Unknown problem type {self.problem_type!r}: choose one of {', '.join(PROBLEM_TYPES)}."
            )
        if self.num_exits < 1:
            raise InputError(f"num_exits is {self.num_exits}: a model has at least one exit, its own head.")
        if self.problem_type == REGRESSION and self.name in _DISTRIBUTION_POLICIES:
            raise InputError(
                f"Exit policy {self.name!r} needs class probabilities, and a regression model has none: "
                "choose patience or learned."
            )
        if self.name == "top_k_entropy":
            self._validate_top_k(num_labels)
        elif self.top_k is not None or self.renormalise is not None:
            raise InputError(
                f"top_k and renormalise belong to the exit policy 'top_k_entropy', not to {self.name!r}: "
                "leave them out or change the policy."
            )
        if not self.tolerance > 0:
            raise InputError(
                f"tolerance is {self.tolerance}: give a positive difference of regression values."
            )

    def _validate_top_k(self, num_labels: int | None) -> None:
        if self.problem_type == MULTI_LABEL:
            raise InputError(
                "Exit policy 'top_k_entropy' ranks classes that exclude each other, and the labels of a "
                "multi-label model do not: choose entropy, max_probability, margin, patience or learned."
            )
        if self.top_k is None:
            return
        if self.top_k < 2 or (num_labels is not None and self.top_k > num_labels):
            most = "the number of labels" if num_labels is None else f"{num_labels}, the number of labels"
            raise InputError(f"top_k is {self.top_k}: it must lie between 2 and {most}.")

    @property
    def settings(self) -> dict[str, Any]:
        """Name and settings, None where the policy has none: values that JSON can carry."""
        compares_values = self.name == "patience" and self.problem_type == REGRESSION
        return {
            "name": self.name,
            "top_k": self.top_k,
            "renormalise": self.renormalise,
            "tolerance": self.tolerance if compares_values else None,
        }

    def resolve(self, num_labels: int) -> ExitPolicy:
        """The same policy with the defaults that depend on the number of labels filled in.

        Raises:
            InputError: as `validate`; also a single-label model with fewer than two labels.
        """
        self.validate(num_labels)
        if self.problem_type == SINGLE_LABEL and num_labels < 2:
            raise InputError(f"A single-label classifier needs at least 2 labels, not {num_labels}.")
        if self.name != "top_k_entropy":
            return self
        default_k = num_labels if num_labels <= MANY_LABELS else MANY_LABELS_TOP_K
        return replace(
            self,
            top_k=default_k if self.top_k is None else self.top_k,
            renormalise=True if self.renormalise is None else self.renormalise,
        )

    def uncertainty(
        self,
        probabilities: Array,
        history: PolicyHistory | None = None,
        learned_uncertainty: Array | None = None,
    ) -> tuple[Array, PolicyHistory | None]:
        """The uncertainty of every row at one exit.

        Args:
            probabilities: (rows, L) at this exit; (rows, 1) values for regression.
            history: what the call at the exit before returned, for the rows that are left
                (`PolicyHistory.select`); None at the first exit.
            learned_uncertainty: (rows,) in [0, 1], needed by "learned" only.

        Returns:
            (rows,) values in [0, 1] in the dtype of `probabilities`, and the history for the next exit, which
            stays None unless the policy is "patience".

        Raises:
            InputError: "learned" without `learned_uncertainty`.
        """
        if self.name == "learned":
            if learned_uncertainty is None:
                raise InputError(
                    "Exit policy 'learned' needs a model whose exits were trained to estimate their own "
                    "uncertainty: choose another policy or train such a model."
                )
            return learned_uncertainty.clip(0.0, 1.0), None
        if self.name == "patience":
            history = self._agreements(probabilities, history)
            # One division of integers, so that the values are those of literals such as 0.1 and a row whose
            # uncertainty equals the speed stays.
            return (self.num_exits - history.agreements) / self.num_exits, history
        if self.problem_type == MULTI_LABEL:
            binary = _namespace(probabilities).stack((probabilities, 1 - probabilities), axis=-1)
            return _namespace(binary).amax(self._of_distribution(binary), axis=-1), None
        return self._of_distribution(probabilities), None

    def _of_distribution(self, probabilities: Array) -> Array:
        if self.name == "top_k_entropy":
            resolved = self.resolve(probabilities.shape[-1])
            assert resolved.top_k is not None and resolved.renormalise is not None
            return top_k_entropy(probabilities, resolved.top_k, resolved.renormalise)
        if self.name == "max_probability":
            return max_probability(probabilities)
        return margin(probabilities) if self.name == "margin" else entropy(probabilities)

    def _agreements(self, probabilities: Array, history: PolicyHistory | None) -> PolicyHistory:
        predictions = self._predictions(probabilities)
        if history is None:
            return PolicyHistory(predictions, _namespace(probabilities).zeros_like(probabilities[:, 0]))
        if self.problem_type == REGRESSION:
            agree = abs(predictions - history.predictions) < self.tolerance
        else:
            agree = predictions == history.predictions
        return PolicyHistory(predictions, (history.agreements + 1) * agree.all(axis=-1))

    def _predictions(self, probabilities: Array) -> Array:
        if self.problem_type == SINGLE_LABEL:
            return probabilities.argmax(axis=-1)[:, None]
        return probabilities >= 0.5 if self.problem_type == MULTI_LABEL else probabilities


def own_policy(
    policy: str | None, top_k: int | None, problem_type: str, num_labels: int, num_exits: int
) -> ExitPolicy:
    """The policy of a model with these defaults, resolved; `num_exits` counts the full model's own."""
    name = policy or default_policy(problem_type, num_labels)
    k = top_k if name == "top_k_entropy" else None
    return ExitPolicy(name, problem_type, num_exits, top_k=k).resolve(num_labels)


def default_policy(problem_type: str, num_labels: int) -> str:
    """The name of the policy used when none is chosen.

    "patience" for regression, "top_k_entropy" for more than 20 single-label classes, else "entropy".
    """
    if problem_type == REGRESSION:
        return "patience"
    if problem_type == SINGLE_LABEL and num_labels > MANY_LABELS:
        return "top_k_entropy"
    return "entropy"


def check_speed(speed: float) -> float:
    """`speed` as a float.

    Raises:
        InputError: not a number in [0, 1].
    """
    try:
        value = float(speed)
    except (TypeError, ValueError):
        value = math.nan
    if not 0.0 <= value <= 1.0:
        raise InputError(f"Speed is {speed!r}: give a number from 0 (the full model) to 1 (the first exit).")
    return value


def _namespace(array: Array) -> Any:
    """The module whose functions take `array`; only functions that both modules spell alike are used."""
    return np if isinstance(array, np.ndarray | np.generic) else sys.modules["torch"]


def _largest(probabilities: Array, k: int) -> Array:
    """(..., L) → (..., k): the k largest, in any order."""
    if isinstance(probabilities, np.ndarray):
        return np.partition(probabilities, -k, axis=-1)[..., -k:]
    return probabilities.topk(k, sorted=False).values


def _normalised_surprise(probabilities: Array, k: int) -> Array:
    # A lower bound inside the logarithm makes 0 · ln 0 = 0 without a warning; 1e-30 is a normal float32.
    logarithms = _namespace(probabilities).log(probabilities.clip(1e-30, 1.0))
    return (-(probabilities * logarithms).sum(axis=-1) / math.log(k)).clip(0.0, 1.0)
