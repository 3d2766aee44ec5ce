"""How sure is a difference? Bootstrap over windows or items, and McNemar's test."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

Values = Sequence[float] | Sequence[int] | np.ndarray  # one number per window or item

LEVEL = 0.95  # of every interval
EXACT_UP_TO = 1000  # discordant items up to which McNemar's test is the exact binomial one


@dataclass(frozen=True)
class Interval:
    """``value`` with the ends of its bootstrap interval; ``n`` independent windows or groups of items were drawn from."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class McNemar:
    """``only_a``, ``only_b``: items that one model alone answers right; ``p``: two-sided, of "both are equally often right"."""

    only_a: int
    only_b: int
    p: float


def bootstrap_draws(
    values: Values, *, sizes: Values | None = None, groups: Sequence[str] | None = None, seed: int = 0, n: int = 2000
) -> Float64[np.ndarray, " draw"]:
    """`n` bootstrap means: groups are drawn with replacement; each draw is the sum of their values over that of their sizes.

    values: a score of each item, or a sum over the tokens of a window. sizes: what each sums over; None is 1. groups: items of
    one name (two questions on one document) are drawn together; None draws each by itself.
    """
    values = np.asarray(values, dtype=np.float64)
    weights = np.ones(len(values)) if sizes is None else np.asarray(sizes, dtype=np.float64)
    names = range(len(values)) if groups is None else groups
    if not len(values) == len(weights) == len(names):
        raise ValueError(f"{len(values)} values, {len(weights)} sizes, {len(names)} groups: as many of each are needed")
    order = {name: i for i, name in enumerate(dict.fromkeys(names))}
    if len(order) < 2:
        raise ValueError(f"{len(order)} independent items: a bootstrap needs at least 2")
    member = np.array([order[name] for name in names])
    totals = np.stack([np.bincount(member, weights=values), np.bincount(member, weights=weights)], axis=1)
    # Groups with the same sum and size are interchangeable: drawing how often each kind occurs is the same bootstrap, and
    # right or wrong answers have few kinds.
    kinds, frequency = np.unique(totals, axis=0, return_counts=True)
    generator = np.random.default_rng(seed)
    drawn = np.empty(n)
    for start in range(0, n, 256):  # all draws at once would not fit for ten thousand different scores
        counts = generator.multinomial(len(order), frequency / len(order), size=min(256, n - start)).astype(np.float64)
        sums, weights = (counts @ kinds).T
        drawn[start : start + len(counts)] = sums / weights
    return drawn


def interval(value: float, drawn: Float64[np.ndarray, " draw"], n: int) -> Interval:
    """`value` between the quantiles of its draws."""
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high), n)


def paired_bootstrap(
    a: Values, b: Values, seed: int = 0, n: int = 1000, *, sizes: Values | None = None, groups: Sequence[str] | None = None
) -> Interval:
    """The mean of a − b with the middle 95 % of its `bootstrap_draws`: two models on the same windows or items.

    For a difference in nats per token take `Perplexity.window_nll` of both, and ``sizes=Perplexity.window_tokens``.
    """
    left, right = _paired(a, b)
    drawn = bootstrap_draws(left - right, sizes=sizes, groups=groups, seed=seed, n=n)
    mean = float(np.sum(left - right) / (len(left) if sizes is None else np.sum(sizes)))
    return interval(mean, drawn, len(left) if groups is None else len(set(groups)))


def mcnemar(a: Values, b: Values) -> McNemar:
    """McNemar's test on paired right (1) or wrong (0) answers.

    Exact (binomial) up to 1,000 discordant items, above that the chi-square approximation with continuity correction.
    """
    from scipy import stats

    left, right = _paired(a, b)
    if not np.isin([left, right], (0, 1)).all():
        raise ValueError("McNemar's test compares right (1) and wrong (0) answers; take `paired_bootstrap` for other scores")
    only_a, only_b = int((left > right).sum()), int((left < right).sum())
    discordant = only_a + only_b
    if discordant <= EXACT_UP_TO:
        return McNemar(only_a, only_b, float(stats.binomtest(only_a, discordant).pvalue) if discordant else 1.0)
    statistic = max(abs(only_a - only_b) - 1, 0) ** 2 / discordant
    return McNemar(only_a, only_b, float(stats.chi2.sf(statistic, df=1)))


def _paired(a: Values, b: Values) -> tuple[Float64[np.ndarray, " item"], Float64[np.ndarray, " item"]]:
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if left.shape != right.shape or left.ndim != 1 or not len(left):
        raise ValueError(f"values of shape {left.shape} and {right.shape}: a paired test needs the same windows or items")
    return left, right
