"""Which speeds keep a risk within a budget, with a stated confidence: p-values and the order of testing.

Learn then Test (Angelopoulos, Bates, Candès, Jordan, Lei; arXiv 2110.01052): for every speed λ the hypothesis
H_λ "the risk R(λ), the mean loss of a text, exceeds the budget ε" gets a p-value that is valid in finite samples,
P(p ≤ u) ≤ u under H_λ. Speeds are tested from safe to risky, each at level δ, until one cannot be rejected (their
fixed-sequence testing). With probability at least 1 − δ over the calibration texts, every speed before that one has
R(λ) ≤ ε, whatever the dependence between speeds and however many there are.

The p-value depends on the kind of loss:

- `LossKind.WRONG`, 0 or 1: the exact binomial tail. Hoeffding–Bentkus is never smaller for such losses.
- `LossKind.FRACTION`, in [0, 1]: Hoeffding–Bentkus (Bates et al., Distribution-free, risk-controlling prediction
  sets, JACM 2021).
- `LossKind.WRONG_DIFFERENCE`, −1, 0 or 1, the accuracy that a text loses or gains against the full model: an exact
  test for paired answers, `paired_p_value`. Mapping the loss to [0, 1] and using Hoeffding–Bentkus would be valid and
  void: the variance it allows for is up to 1, while that of the loss is about the share of texts answered otherwise.
- `LossKind.FRACTION_DIFFERENCE`, in [−1, 1]: mapped to [0, 1] by (x + 1) / 2, then `betting_p_value`, which adapts
  to the variance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from enum import StrEnum
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

Array = NDArray[np.float64]

_NUISANCE_SHARE = 0.01
"""Part of the level that `paired_p_value` spends on the confidence interval of the share of changed answers."""
_GRIDS = (65, 17)
"""Shares at which `paired_p_value` looks for the largest probability, and again between the best one's neighbours."""
_NEGLIGIBLE = 1e-13
"""Chances below this count in full, which errs on the safe side, rather than being worked out."""
_CLOSEST = 1e-9
"""To the budget that a risk may come for any number of rows to be worked out."""
_POWER = 0.8
"""`rows_needed` aims at this probability of certifying."""
_SMALLEST_GAP = 1e-4
"""For which the rows that bets with limited stakes take are worked out."""
_FEW_ROWS = 2000
"""Below these `rows_needed` counts mistakes one by one; above, the normal approximation comes close."""
_QUANTILE = NormalDist().inv_cdf


class LossKind(StrEnum):
    """What values a text's loss takes."""

    WRONG = "wrong"
    FRACTION = "fraction"
    WRONG_DIFFERENCE = "wrong-difference"
    FRACTION_DIFFERENCE = "fraction-difference"

    @property
    def is_difference(self) -> bool:
        """Whether the loss is that of the early answer less that of the full model's."""
        return self in (LossKind.WRONG_DIFFERENCE, LossKind.FRACTION_DIFFERENCE)


def p_value(kind: LossKind, losses: Array, budget: float, level: float) -> float:
    """The p-value of "the mean loss exceeds the budget", for independent texts.

    Args:
        kind: what values `losses` can take, known beforehand and not read off the data.
        losses: (rows,) of values of that kind.
        budget: ε in (0, 1).
        level: δ in (0, 1), at which the p-value will be used; differences of losses are tested best around it.

    Returns:
        A value in [0, 1] that is at most u with probability at most u if the mean loss exceeds the budget, for
        any u; `LossKind.WRONG_DIFFERENCE` never gives less than level / 100.
    """
    rows = len(losses)
    if kind is LossKind.WRONG:
        return binomial_p_value(round(float(losses.sum())), rows, budget)
    if kind is LossKind.FRACTION:
        return hoeffding_bentkus_p_value(float(losses.mean()), rows, budget)
    if kind is LossKind.WRONG_DIFFERENCE:
        return paired_p_value(int((losses > 0).sum()), int((losses < 0).sum()), rows, budget, level)
    return betting_p_value((losses + 1) / 2, (budget + 1) / 2, level)


def binomial_p_value(mistakes: int, rows: int, budget: float) -> float:
    """P(Bin(n, ε) ≤ k): how likely at most `mistakes` are among `rows` texts if each is one with probability ε."""
    return float(stats.binom.cdf(mistakes, rows, budget))


def hoeffding_bentkus_p_value(mean_loss: float, rows: int, budget: float) -> float:
    """The smaller of Hoeffding's and Bentkus' bound, for losses in [0, 1] (Bates et al. 2021, Theorem 1 and Eq. 11).

    p = min( exp(−n · h(min(R̂, ε), ε)), e · P(Bin(n, ε) ≤ ⌈n R̂⌉) ), with
    h(a, b) = a ln(a / b) + (1 − a) ln((1 − a) / (1 − b)).

    Args:
        mean_loss: R̂ in [0, 1], the mean over `rows` independent texts.
        rows: n.
        budget: ε in (0, 1).
    """
    # What rounding adds to a sum of losses must not lift it over a whole number.
    bentkus = math.e * stats.binom.cdf(math.ceil(rows * mean_loss - 1e-9), rows, budget)
    return float(min(1.0, math.exp(-rows * _relative_entropy(min(mean_loss, budget), budget)), bentkus))


def _relative_entropy(a: float, b: float) -> float:
    """KL divergence of Bernoulli(a) from Bernoulli(b), for b in (0, 1)."""
    return sum(x * math.log(x / y) for x, y in ((a, b), (1 - a, 1 - b)) if x > 0)


@lru_cache(maxsize=65536)
def paired_p_value(lost: int, gained: int, rows: int, budget: float, level: float) -> float:
    """An exact p-value of "accuracy drops by more than the budget", for two models' answers to the same texts.

    Texts that the full model answers rightly and the early exit wrongly are `lost` (probability p₊ each), the
    reverse are `gained` (p₋). The hypothesis is d = p₊ − p₋ ≥ ε. The share of changed answers, s = p₊ + p₋, is not
    known. Three steps, each with a finite-sample proof:

    1. Outcomes are ordered by the score statistic Z(lost, gained) = (lost − gained − nε) / √(n(s̃ − ε²)), with s̃ the
       maximum-likelihood estimate of s under d = ε (Nam, Biometrics 53, 1997; Tango, Statistics in Medicine 17,
       1998). Lloyd and Moldovan (Statistics in Medicine 27, 2008) find it the best order for exact tests.
    2. For a given s, the probability of an outcome as extreme, P(Z ≤ z), is largest at d = ε: given lost + gained = m,
       lost is Bin(m, (1 + d/s) / 2), which grows with d, and Z grows with lost. It is summed up exactly over m.
    3. s is bounded by a Clopper–Pearson interval from lost + gained ~ Bin(n, s) that misses with probability at most
       γ = δ/100, and p = γ + max over the interval (Berger and Boos, JASA 89, 1994). The maximum of this smooth
       function, which may have several peaks, is looked for on two grids.

    Args:
        lost, gained: counts, together at most `rows`.
        rows: n ≥ 1.
        budget: ε in (0, 1).
        level: δ in (0, 1).

    Returns:
        p in [γ, 1]. Close to the normal approximation Φ(Z), which is not valid in finite samples, plus γ.
    """
    changed, gamma = lost + gained, level * _NUISANCE_SHARE
    low = float(stats.beta.ppf(gamma / 2, changed, rows - changed + 1)) if changed else 0.0
    high = float(stats.beta.isf(gamma / 2, changed + 1, rows - changed)) if changed < rows else 1.0
    if high < budget:  # s ≥ d: so few changed answers rule the hypothesis out by themselves
        return gamma
    low = max(low, budget)
    counts = np.arange(_likely_counts(rows, low)[0], _likely_counts(rows, high)[1] + 1)
    most_lost = _most_lost(float(_score(lost, changed, rows, budget)), counts, rows, budget)

    ways = special.gammaln([rows + 1]) - special.gammaln(counts + 1) - special.gammaln(rows - counts + 1)

    def probabilities(angles: Array) -> Array:
        shares = (np.sin(angles) ** 2).clip(budget, 1.0)[:, None]
        chances = np.exp(ways + special.xlogy(counts, shares) + special.xlog1py(rows - counts, -shares))
        matters = (chances > _NEGLIGIBLE) & (most_lost >= 0)
        lost_given_changed = np.broadcast_to((1 + budget / shares) / 2, chances.shape)[matters]
        changed_now = np.broadcast_to(counts, chances.shape)[matters]
        lost_now = np.broadcast_to(most_lost, chances.shape)[matters]
        chances[matters] *= special.bdtr(lost_now, changed_now, lost_given_changed)
        chances[~matters & (most_lost < 0)] = 0.0
        return np.asarray(chances.sum(-1))

    # In arcsin √s the sampling error of a share is the same everywhere.
    first, last = math.asin(math.sqrt(low)), math.asin(math.sqrt(high))
    for points in _GRIDS:
        angles = np.linspace(first, last, points)
        found = probabilities(angles)
        best = int(found.argmax())
        first, last = angles[max(best - 1, 0)], angles[min(best + 1, points - 1)]
    return float(min(1.0, gamma + found.max()))


def _score(lost: ArrayLike, changed: ArrayLike, rows: int, budget: float) -> Array:
    """The score statistic of `paired_p_value` for `lost` of `changed` texts, elementwise."""
    losers, movers = np.asarray(lost, float), np.asarray(changed, float)
    difference = 2 * losers - movers
    # The likelihood equation under d = ε is quadratic in p₋; s̃ = 2 p₋ + ε.
    linear = (2 * rows - difference) * budget - movers
    constant = -(movers - losers) * budget * (1 - budget)
    gained = (np.sqrt(linear**2 - 8 * rows * constant) - linear) / (4 * rows)
    variance = rows * (2 * gained + budget - budget**2)
    return np.asarray((difference - rows * budget) / np.sqrt(variance))


def _most_lost(score: float, changed: NDArray[np.int64], rows: int, budget: float) -> NDArray[np.int64]:
    """For each number of changed answers the most lost ones with a statistic of at most `score`; −1 for none."""
    low, high = np.full_like(changed, -1), changed.copy()
    while (low < high).any():
        middle = (low + high + 1) // 2
        inside = _score(middle, changed, rows, budget) <= score + 1e-9
        low, high = np.where(inside, middle, low), np.where(inside, high, middle - 1)
    return low


def _likely_counts(rows: int, share: float) -> tuple[int, int]:
    """A range that Bin(rows, share) leaves with probability below 1e-12."""
    reach = 8 * math.sqrt(rows * share * (1 - share)) + 20
    return max(0, math.floor(rows * share - reach)), min(rows, math.ceil(rows * share + reach))


def betting_p_value(values: Array, mean: float, level: float) -> float:
    """A p-value of "the mean is at least `mean`", for values in [0, 1] of any distribution.

    The wealth of a gambler who bets on smaller values, K_t = Π (1 + λ_i (mean − x_i)), is a supermartingale under
    the hypothesis, so that p = 1 / max K_t is valid by Ville's inequality. The stakes λ_i are the predictable
    plug-ins of Waudby-Smith and Ramdas (Estimating means of bounded random variables by betting, JRSSB 2024,
    Section 4.2), which adapt to the variance. Values are taken in an order drawn with a fixed seed: files are often
    sorted.

    Args:
        values: (rows,) floats in [0, 1].
        mean: in (0, 1).
        level: δ for which the stakes are chosen.
    """
    rows = len(values)
    shuffled = np.asarray(values, float)[np.random.default_rng(0).permutation(rows)]
    seen = np.arange(1, rows + 1)
    centre = (0.5 + shuffled.cumsum()) / (seen + 1)
    variance = (0.25 + ((shuffled - centre) ** 2).cumsum()) / (seen + 1)
    before = np.concatenate([[0.25], variance[:-1]])
    stakes = np.minimum(np.sqrt(2 * math.log(1 / level) / (rows * before)), 0.5 / (1 - mean))
    wealth = np.log1p(stakes * (mean - shuffled)).cumsum()
    return float(min(1.0, math.exp(-max(0.0, wealth.max()))))


def fixed_sequence(p_values: Iterable[float], level: float) -> list[float]:
    """The p-values up to and including the first above the level; later ones are not asked for.

    All but a last one above the level are rejected: with probability at least 1 − level none of them wrongly
    (Angelopoulos et al., Proposition 3, after Bauer 1991).
    """
    tested = []
    for value in p_values:
        tested.append(value)
        if value > level:
            break
    return tested


def worst_class(p_values: Iterable[float]) -> float:
    """The p-value of "in some class the risk exceeds the budget", from one p-value for each class.

    It is the largest. To rule out a union of hypotheses each must be rejected at the full level, and no level need be
    divided between them (intersection–union test; Berger, Technometrics 24, 1982).
    """
    return max(p_values)


@lru_cache
def smallest_set(kind: LossKind, budget: float, level: float) -> int:
    """The fewest rows with which anything can be certified: as many as it takes when no loss is seen."""
    return _smallest(lambda rows: p_value(kind, np.zeros(rows), budget, level) <= level)


def smallest_budget(kind: LossKind, rows: int, level: float) -> float:
    """The least budget, in steps of 0.001, that `rows` rows can certify when no loss is seen; 1.0 where none can."""
    steps = 1000
    enough = _smallest(
        lambda step: step >= steps or p_value(kind, np.zeros(rows), step / steps, level) <= level
    )
    return enough / steps


@lru_cache(maxsize=4096)
def rows_needed(kind: LossKind, risk: float, spread: float, budget: float, level: float) -> int | None:
    """About how many rows certify a speed with 80% probability, if risk and spread are what they are here.

    With z the normal quantile of the power, L = ln(1/δ), and σ² the variance of the loss:
    - `WRONG`, exactly: the fewest n with P(Bin(n, R) ≤ k) ≥ 0.8, k the most mistakes among n that certify; from
      2,000 on by the normal approximation, n = ((z_δ σ₀ + z σ) / (ε − R))², σ₀² the variance at the edge of the budget;
    - `WRONG_DIFFERENCE`, likewise, n (ε − R) = (z_δ σ₀ + z σ) √n + 1; the 1 makes up for differences going in steps
      of two. Below 2,000 no more than for the lost answers alone, counted as mistakes;
    - `FRACTION`, Hoeffding's bound: n · h(R + z σ / √n, ε) = L;
    - `FRACTION_DIFFERENCE`, the wealth of steady stakes: n = (σ (√(2L) + z) / (ε − R))², at least as many as for a
      risk without spread, since stakes are limited.

    Never fewer than `smallest_set`.

    Args:
        kind: of loss.
        risk: R, its mean.
        spread: its mean square; for the difference of two answers the share of texts that change sides.
        budget: ε.
        level: δ.

    Returns:
        The number of rows; None where the risk is not clearly below the budget, so that no number would do.
    """
    gap = budget - risk
    if gap < _CLOSEST:
        return None
    z_level, z_power = -_QUANTILE(level), _QUANTILE(_POWER)
    variance, doubt = max(spread - risk**2, 0.0), math.log(1 / level)
    if kind is LossKind.FRACTION_DIFFERENCE:
        steady = variance * ((math.sqrt(2 * doubt) + z_power) / gap) ** 2
        rows = max(steady, smallest_set(kind, max(min(gap, budget), _SMALLEST_GAP), level))
    elif kind is LossKind.FRACTION:

        def certifies(rows: int) -> bool:
            mean = min(risk + z_power * math.sqrt(variance / rows), budget)
            return rows * _relative_entropy(mean, budget) >= doubt

        rows = _smallest(certifies)
    elif kind is LossKind.WRONG:
        rows = _rows_for_mistakes(risk, budget, level)
    else:
        spreads = z_level * math.sqrt(max(spread, budget) - budget**2) + z_power * math.sqrt(variance)
        rows = ((spreads + math.sqrt(spreads**2 + 4 * gap)) / (2 * gap)) ** 2
        if rows < _FEW_ROWS:
            rows = min(rows, _rows_for_mistakes(max(spread + risk, 0.0) / 2, budget, level))
    return max(math.ceil(rows), smallest_set(kind, budget, level))


def _rows_for_mistakes(risk: float, budget: float, level: float) -> float:
    """The rows with which mistakes of probability `risk` are few enough for the budget with 80% probability."""
    if budget - risk < _CLOSEST:
        return math.inf
    at_edge, seen = (math.sqrt(share - share**2) for share in (budget, risk))
    rows = ((-_QUANTILE(level) * at_edge + _QUANTILE(_POWER) * seen) / (budget - risk)) ** 2
    if rows >= _FEW_ROWS:
        return rows

    # So many mistakes at most are likeliest among the fewest rows that certify the budget with them.
    def likely(mistakes: int) -> bool:
        return bool(stats.binom.cdf(mistakes, _fewest_rows(mistakes, budget, level), risk) >= _POWER)

    return _fewest_rows(_smallest(lambda count: likely(count - 1)) - 1, budget, level)


@lru_cache(maxsize=4096)
def _fewest_rows(mistakes: int, budget: float, level: float) -> int:
    """Among which no more mistakes than these certify the budget."""
    return _smallest(lambda rows: stats.binom.cdf(mistakes, rows, budget) <= level)


def _smallest(holds: Callable[[int], bool]) -> int:
    """The smallest whole number from 1 that holds, if larger ones do too."""
    high = 1
    while not holds(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
