"""Search by a surrogate of second order: the losses seen so far are fitted, and only what the fit ranks best is evaluated.

The surrogate of a set S is L0 + sum_i a_i + sum_{i<j} b_ij, i and j in S: own, after the observation that the costs of layers
nearly add up, and that what is left is mostly between neighbors. Once the fit is cheap, so is searching it.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64
from tqdm.auto import tqdm

from prunelib.depth.search import SearchResult, SearchStep, Unit, _candidates, beam, swap_descent
from prunelib.depth.select import Evaluate, Values
from prunelib.models.layerwise import LayerSet

# Prior standard deviations and noise, in units of the median cost of one layer; chosen on a small model of this project.
SINGLE, PAIR, PER_UNIT, PER_PAIR, NOISE = 1.0, 0.4, 10.0, 2.0, 0.03
CAP = 100.0  # largest extra loss that is fitted, in the same units: a ruined model says no more than that
ROUNDS = 4  # fits for each size
WIDTH = 8  # sets that a beam search over the surrogate keeps


def second_order(
    units: int | Sequence[Unit], layers_removed: int, evaluate: Evaluate, effort: float | int = 1, *, progress: bool = True
) -> SearchResult:
    """Fit a surrogate to all losses seen, evaluate the new sets that it ranks best, fit again: `ROUNDS` times for each size.

    All n single units come first. For K units n - K + 1 sets are evaluated, as many as greedy search evaluates, or `effort`
    times as many; sets need not be nested. Step k of the result holds the best evaluated set of k + 1 units, so that one run
    serves all smaller numbers; among equals the first one evaluated. Raises ValueError for an `effort` that is not above 0 and
    where so many units cannot be removed, and RuntimeError for a NaN value.
    """
    if not effort > 0:
        raise ValueError(f"effort must be above 0, got {effort}")
    candidates = list(_candidates(units, layers_removed))
    values = Values(evaluate)
    values([(), *((unit,) for unit in candidates if layers_removed)])
    known, steps = values.known, [SearchStep((), values.known[()], 1)]
    for size in tqdm(range(1, layers_removed + 1), desc="layers removed", unit="layer", disable=not progress):
        left = int(effort * (len(candidates) - size + 1)) or 1
        for later in reversed(range(min(ROUNDS, left) if size > 1 else 0)):
            new = _best_predicted(Quadratic(candidates, known, size), known, size, left - left * later // (later + 1))
            values(new)
            left -= len(new)
        best = min((removed for removed in known if len(removed) == size), key=known.__getitem__)
        steps.append(SearchStep(best, known[best], len(known)))
    return SearchResult(steps[-1].removed, steps[-1].value, len(known), tuple(steps[1:]), known)


def _best_predicted(surrogate: "Quadratic", known: dict[LayerSet, float], size: int, count: int) -> list[LayerSet]:
    """The sets of lowest predicted loss, among those not yet evaluated, that beam search and swaps find; at most `count`."""
    grown = beam(surrogate.units, size, surrogate, WIDTH, progress=False)
    swapped = swap_descent(surrogate.units, grown.removed, surrogate, progress=False)
    predicted = grown.values | swapped.values
    new = (removed for removed in predicted if len(removed) == size and removed not in known)
    return sorted(new, key=predicted.__getitem__)[:count]


class Quadratic:
    """Ridge regression (the mean of a Gaussian posterior) of losses on the units that a set holds, and on their pairs.

    units: all that may go, ascending. known: set → loss, at least of () and all single units. What a pair adds is expected to
    fall off with the square root of its distance. The number of units and of pairs in a set have broad priors of their own: a
    level of all costs, which other sets of that size share. Sets of another size than `size` count for less, so the fit is
    local in size, as higher orders would make it.
    """

    def __init__(self, units: Sequence[Unit], known: dict[LayerSet, float], size: int):
        self.units, self.place = units, {unit: place for place, unit in enumerate(units)}
        self.first, self.second = np.triu_indices(len(units), 1)
        held = self._held(list(known))
        scale = abs(np.median([known[unit,] for unit in units]) - known[()]) or 1.0
        extra = np.minimum(np.array(list(known.values())) - known[()], CAP * scale)
        counts = held.sum(axis=1, keepdims=True)
        features = np.hstack([held, held[:, self.first] * held[:, self.second], counts, counts * (counts - 1) / 2])
        pairs = PAIR / np.sqrt(self.second - self.first)
        prior = (scale * np.concatenate([np.full(len(units), SINGLE), pairs, [PER_UNIT, PER_PAIR]])) ** 2
        noise = (scale * NOISE * (1 + np.abs(counts[:, 0] - size))) ** 2
        weights = prior * (features.T @ np.linalg.solve((features * prior) @ features.T + np.diag(noise), extra))
        self.single = weights[: len(units)] + weights[-2]
        self.pairs = np.zeros((len(units), len(units)))
        self.pairs[self.first, self.second] = weights[len(units) : -2] + weights[-1]

    def _held(self, sets: Sequence[LayerSet]) -> Float64[np.ndarray, "set unit"]:
        held = np.zeros((len(sets), len(self.units)))
        for row, removed in enumerate(sets):
            held[row, [self.place[unit] for unit in removed]] = 1
        return held

    def __call__(self, sets: Sequence[LayerSet]) -> list[float]:
        """Predicted loss of each set beyond that of the whole model."""
        held = self._held(sets)
        return (held @ self.single + (held @ self.pairs * held).sum(axis=1)).tolist()
