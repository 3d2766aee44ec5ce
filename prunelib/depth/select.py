"""Which layers an importance removes: the lowest ones, the lowest contiguous block, and SimDiff's alpha.

SimDiff's importance (arXiv 2604.19520, Eq. 7) of each layer is linear in alpha. A set of K layers is therefore the K least
important on at most one interval of alpha, few sets occur at all, and each needs only one evaluation.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from jaxtyping import Float64

from prunelib.models.layerwise import LayerSet

Evaluate = Callable[[list[LayerSet]], Sequence[float]]
"""Loss of the model without each of the given sets of layers, in their order; lower is better. `LayerSetLoss` is one."""

# Where several lines meet in one point, their rounded coefficients make them cross a few 1e-16 apart. The sets in between
# are artifacts, and no floating-point alpha would reproduce them.
_NARROWEST = 1e-12
EPS = 1e-3  # width of the bracket at which `ternary_alpha` stops; the paper gives none


@dataclass(frozen=True)
class AlphaInterval:
    """For alpha between low and high the layers `removed` (ascending) are the least important ones."""

    low: float
    high: float
    removed: LayerSet

    @property
    def midpoint(self) -> float:
        """The alpha that stands for the interval."""
        return (self.low + self.high) / 2


@dataclass(frozen=True)
class AlphaChoice:
    """The best alpha, the layers removed there, their value, and how many distinct sets were evaluated for it."""

    alpha: float
    removed: LayerSet
    value: float
    evaluations: int


def lowest(
    importance: Float64[np.ndarray, "layer"], layers_removed: int, protect_first: int = 0, protect_last: int = 0
) -> LayerSet:
    """The `layers_removed` layers of lowest importance, ascending; the first and last few can be protected.

    Among equals the shallower layer goes first. Raises ValueError when so many cannot be removed, or for NaN importance.
    """
    candidates = candidates_for(len(importance), layers_removed, protect_first, protect_last)
    if np.isnan(importance).any():
        raise ValueError(f"importance of layers {np.flatnonzero(np.isnan(importance)).tolist()} is NaN")
    order = np.argsort(importance[candidates.start : candidates.stop], kind="stable")
    return tuple(sorted((order[:layers_removed] + candidates.start).tolist()))


def lowest_block(
    importance: Float64[np.ndarray, "start"], n_layers: int, protect_first: int = 0, protect_last: int = 0
) -> LayerSet:
    """The contiguous block of lowest importance: l*(n) = argmin over l (Gromov et al., arXiv 2403.17887).

    Element l of `importance` is that of the layers l .. l+n-1, as `criteria.angular` gives it, so its length
    n_layers + 1 - n states the size n of the block. Among equals the shallower block goes. Raises ValueError when no block of
    that size may go, or for NaN importance.
    """
    size = n_layers + 1 - len(importance)
    if not 1 <= size <= n_layers:
        raise ValueError(f"{len(importance)} blocks do not exist in {n_layers} layers: give one number per first layer")
    candidates = candidates_for(n_layers, size, protect_first, protect_last)
    starts = importance[candidates.start : candidates.stop - size + 1]
    if np.isnan(starts).any():
        raise ValueError(f"importance of blocks {(np.flatnonzero(np.isnan(starts)) + candidates.start).tolist()} is NaN")
    first = candidates.start + int(np.argmin(starts))
    return tuple(range(first, first + size))


def alpha_path(
    similarity: Float64[np.ndarray, "layer"],
    difference: Float64[np.ndarray, "layer"],
    layers_removed: int,
    protect_first: int = 0,
    protect_last: int = 0,
) -> list[AlphaInterval]:
    """All sets of layers that ``alpha * difference + (1 - alpha) * similarity`` removes, in order of alpha from 0 to 1.

    Intervals touch, cover [0, 1], and no set occurs twice. A set that is lowest at a single alpha only, by a tie, is not
    listed (nor on less than 1e-12). Layers equal at every alpha are ordered as in `lowest`.
    Raises ValueError like `lowest`, and for terms that are not finite.
    """
    if not (np.isfinite(similarity).all() and np.isfinite(difference).all()):
        raise ValueError("similarity and difference terms must be finite")
    candidates = candidates_for(len(similarity), layers_removed, protect_first, protect_last)
    sweep = _sweep(similarity.tolist(), difference.tolist(), candidates, layers_removed)
    found = [(float(low), removed) for low, high, removed in sweep if high - low >= _NARROWEST]
    lows = [0.0, *(low for low, _ in found[1:])]
    highs = [*lows[1:], 1.0]
    return [AlphaInterval(low, high, removed) for low, high, (_, removed) in zip(lows, highs, found, strict=True)]


def _sweep(
    similarity: list[float], difference: list[float], candidates: range, layers_removed: int
) -> Iterator[tuple[Fraction, Fraction, LayerSet]]:
    """Walk alpha from 0 to 1 and yield (low, high, removed), in exact arithmetic: no tolerance decides an order."""
    start = {i: Fraction(similarity[i]) for i in candidates}
    slope = {i: Fraction(difference[i]) - Fraction(similarity[i]) for i in candidates}
    alpha = Fraction(0)
    while alpha < 1:
        # Order just right of alpha: among layers that are equal there, the one that grows more slowly is about to be lower.
        order = sorted(candidates, key=lambda i: (start[i] + alpha * slope[i], slope[i], i))
        removed, kept = order[:layers_removed], order[layers_removed:]
        # The set lasts until a removed layer overtakes a kept one, which takes a steeper slope.
        crossings = ((start[k] - start[r]) / (slope[r] - slope[k]) for r in removed for k in kept if slope[r] > slope[k])
        following = min((crossing for crossing in crossings if crossing > alpha), default=Fraction(1))
        following = min(following, Fraction(1))
        yield alpha, following, tuple(sorted(removed))
        alpha = following


def exact_alpha(path: list[AlphaInterval], evaluate: Evaluate) -> AlphaChoice:
    """Evaluate every set of the path once and choose the lowest value; on equal values the lower alpha.

    alpha is the midpoint of the best interval. Raises RuntimeError for a NaN value.
    """
    values = Values(evaluate)
    found = values([interval.removed for interval in path])
    value, best = min(zip(found, path, strict=True), key=lambda scored: scored[0])  # the first among equals
    return AlphaChoice(best.midpoint, best.removed, value, len(values.known))


def ternary_alpha(removed_at: Callable[[float], LayerSet], evaluate: Evaluate) -> AlphaChoice:
    """SimDiff's Algorithm 1: ternary search for the alpha of lowest value on [0, 1].

    Probes stand at a third and two thirds of the bracket; both may improve the best (strictly, lower probe first). If the
    lower probe is worse, the left end moves up to it, otherwise the right end moves down to the upper probe. The value is a
    step function of alpha, so the search can miss the minimum; 0 and 1 are never probed. Each distinct set is evaluated once.
    Raises RuntimeError for a NaN value.
    """
    values = Values(evaluate)
    probes: list[tuple[float, LayerSet, float]] = []  # (alpha, removed, value)
    left, right = 0.0, 1.0
    while right - left > EPS:
        third = (right - left) / 3
        for alpha in (left + third, right - third):
            removed = removed_at(alpha)
            probes.append((alpha, removed, values([removed])[0]))
        lower, upper = probes[-2:]
        if lower[2] > upper[2]:
            left = lower[0]
        else:
            right = upper[0]
    best = min(probes, key=lambda probe: probe[2])  # the first among equals
    return AlphaChoice(*best, len(values.known))


class Values:
    """An evaluation of many layer sets that runs once per set; ``known`` holds every value.

    Raises RuntimeError when there is not one value per set, or for NaN, which would make every comparison false; infinity is
    a result (the perplexity of a ruined model).
    """

    def __init__(self, evaluate: Evaluate):
        self.evaluate = evaluate
        self.known: dict[LayerSet, float] = {}

    def __call__(self, sets: list[LayerSet]) -> list[float]:
        new = list(dict.fromkeys(removed for removed in sets if removed not in self.known))
        if new:
            self.known.update(zip(new, checked_values(new, self.evaluate(new)), strict=True))
        return [self.known[removed] for removed in sets]


def checked_values(sets: list[LayerSet], found: Sequence[float]) -> list[float]:
    """The values as floats; raises the errors of `Values`."""
    values = [float(value) for value in found]
    if len(values) != len(sets):
        raise RuntimeError(f"the evaluation of {len(sets)} sets gave {len(values)} values")
    for removed, value in zip(sets, values, strict=True):
        if math.isnan(value):
            raise RuntimeError(f"the evaluation of the model without layers {list(removed)} gave NaN")
    return values


def candidates_for(n_layers: int, layers_removed: int, protect_first: int, protect_last: int) -> range:
    """The layers that may go, after checking that `layers_removed` of them can."""
    if min(layers_removed, protect_first, protect_last) < 0:
        raise ValueError(f"{layers_removed=}, {protect_first=}, {protect_last=}: none of them can be negative")
    if layers_removed >= n_layers:
        raise ValueError(f"cannot remove {layers_removed} of {n_layers} layers: at least one must stay")
    candidates = range(protect_first, n_layers - protect_last)
    if layers_removed > len(candidates):
        raise ValueError(
            f"cannot remove {layers_removed} of {n_layers} layers with the first {protect_first} and the last {protect_last} "
            f"protected: only {len(candidates)} may go"
        )
    return candidates
