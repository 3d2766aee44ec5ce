"""Who decides which layers go: importance (one shot, or one contiguous block), SimDiff's alpha, or a search over sets.

Importance alone: `lowest` and `lowest_block`. SimDiff's importance (arXiv 2604.19520, Eq. 7) of each layer is linear in
alpha. A set of K layers is therefore the K least important on at most one interval of alpha, few sets occur at all, and each
needs only one evaluation: `alpha_path`, `exact_alpha`, and the paper's `ternary_alpha`.

Searches that ask for the loss of sets, many at a time so that the evaluation can share the work between them
(`prunelib.criteria.loss_based.LayerSetLoss` does): `greedy`, `beam`, `evolutionary`, `swap_descent`; and `exhaustive`, the optimum.
"""

import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
from jaxtyping import Float64
from tqdm.auto import tqdm

from prunelib.io import write_text
from prunelib.models.layerwise import LayerSet

Evaluate = Callable[[list[LayerSet]], list[float]]
"""Loss of the model without each of the given sets of layers, in their order; lower is better."""

Finalists = Callable[[list[LayerSet], int, float], Mapping[LayerSet, float]]
"""Given sets, a width and a bound: the losses of at least all those sets that have one of the `width` lowest ones and no higher
one than the bound. The others need not be evaluated to the end (`prunelib.depth.stopping`; `LayerSetLoss.finalists` does it)."""

Fitness = Callable[[list[LayerSet], list[int]], list[float]]
"""As `Evaluate`, on the windows of the given indices only."""

# Where several lines meet in one point, their rounded coefficients make them cross a few 1e-16 apart. The sets in between
# are artifacts, and no floating-point alpha would reproduce them.
_NARROWEST = 1e-12


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
class AlphaProbe:
    """One alpha looked at, the layers removed there and the value of the evaluation."""

    alpha: float
    removed: LayerSet
    value: float


@dataclass(frozen=True)
class AlphaChoice:
    """The best probe, how many distinct sets were evaluated for it, and every probe in order."""

    alpha: float
    removed: LayerSet
    value: float
    evaluations: int
    trace: tuple[AlphaProbe, ...]


@dataclass(frozen=True)
class SearchStep:
    """The best set after one step of a search, its value, and the evaluations of sets spent until then."""

    removed: LayerSet
    value: float
    evaluations: int


@dataclass(frozen=True)
class SearchResult:
    """What a search found: the layers removed, their value, the evaluations of sets spent, and the way there.

    ``values`` holds every set that was evaluated on all windows; ``evaluations`` counts those that were given up as well.
    """

    removed: LayerSet
    value: float
    evaluations: int
    steps: tuple[SearchStep, ...]
    values: dict[LayerSet, float] = field(repr=False)


def lowest(
    importance: Float64[np.ndarray, "layer"],
    layers_removed: int,
    protect_first: int = 0,
    protect_last: int = 0,
) -> LayerSet:
    """The `layers_removed` layers of lowest importance, ascending; the first and last few can be protected.

    Among equals the shallower layer goes first. Raises ValueError when so many cannot be removed, or for NaN importance.
    """
    candidates = _candidates(len(importance), layers_removed, protect_first, protect_last)
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
    candidates = _candidates(n_layers, size, protect_first, protect_last)
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
    Raises ValueError like `lowest`, and for terms that are not finite or of different length.
    """
    if len(similarity) != len(difference):
        raise ValueError(f"{len(similarity)} similarity terms but {len(difference)} difference terms: one of each per layer")
    if not (np.isfinite(similarity).all() and np.isfinite(difference).all()):
        raise ValueError("similarity and difference terms must be finite")
    candidates = _candidates(len(similarity), layers_removed, protect_first, protect_last)
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


def exact_alpha(path: list[AlphaInterval], evaluate: Callable[[LayerSet], float]) -> AlphaChoice:
    """Evaluate every set of the path once and choose the lowest value; on equal values the lower alpha.

    alpha is the midpoint of the best interval. Raises ValueError for an empty path and RuntimeError for a NaN value.
    """
    if not path:
        raise ValueError("the alpha path is empty; make it with alpha_path")
    return _choice([interval.midpoint for interval in path], [interval.removed for interval in path], _Memo(evaluate))


def ternary_alpha(
    removed_at: Callable[[float], LayerSet], evaluate: Callable[[LayerSet], float], eps: float = 1e-3, max_steps: int = 20
) -> AlphaChoice:
    """SimDiff's Algorithm 1: ternary search for the alpha of lowest value on [0, 1].

    Probes stand at a third and two thirds of the bracket; both may improve the best (strictly, lower probe first). If the
    lower probe is worse, the left end moves up to it, otherwise the right end moves down to the upper probe. Stops at width
    eps or after max_steps steps (neither is given in the paper). The value is a step function of alpha, so the search can
    miss the minimum; 0 and 1 are never probed. Each distinct set is evaluated once.

    Raises ValueError for eps outside (0, 1) or max_steps below 1, and RuntimeError for a NaN value.
    """
    if not 0 < eps < 1:
        raise ValueError(f"eps must lie between 0 and 1, got {eps}")
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")
    memo = _Memo(evaluate)
    alphas: list[float] = []
    sets: list[LayerSet] = []
    left, right = 0.0, 1.0
    for _ in range(max_steps):
        third = (right - left) / 3
        if 3 * third <= eps:
            break
        lower, upper = left + third, right - third
        alphas += [lower, upper]
        sets += [removed_at(lower), removed_at(upper)]
        if memo(sets[-2]) > memo(sets[-1]):
            left = lower
        else:
            right = upper
    return _choice(alphas, sets, memo)


class _Memo:
    """An evaluation of layer sets that runs once per set."""

    def __init__(self, evaluate: Callable[[LayerSet], float]):
        self.evaluate = evaluate
        self.values: dict[LayerSet, float] = {}

    def __call__(self, removed: LayerSet) -> float:
        if removed not in self.values:
            value = float(self.evaluate(removed))
            # Infinity is a result (a ruined model's perplexity); NaN would make every comparison false.
            if math.isnan(value):
                raise RuntimeError(f"the evaluation of the model without layers {list(removed)} gave NaN")
            self.values[removed] = value
        return self.values[removed]


def _choice(alphas: list[float], sets: list[LayerSet], memo: _Memo) -> AlphaChoice:
    trace = tuple(AlphaProbe(alpha, removed, memo(removed)) for alpha, removed in zip(alphas, sets, strict=True))
    best = min(trace, key=lambda probe: probe.value)  # the first among equals
    return AlphaChoice(best.alpha, best.removed, best.value, len(memo.values), trace)


def greedy(
    n_layers: int,
    layers_removed: int,
    evaluate: Evaluate,
    protect_first: int = 1,
    protect_last: int = 1,
    *,
    finalists: Finalists | None = None,
    progress: bool = True,
) -> SearchResult:
    """SLEB (arXiv 2402.09025): remove the layer without which the current model is best, score the others again, repeat.

    The defaults are SLEB's barriers: the first and the last layer stay. Among equals the shallower layer goes, as by the strict
    comparison of the released code. Step k of the result holds the choice for k + 1 layers, so that one run serves all
    smaller numbers. L = 32 and K = 7 take 189 evaluations. Over the 2 L sublayers of LayerSetLoss(unit="sublayer"), without
    barriers, it is BlockPruner (arXiv 2406.10594). With `finalists` hopeless sets are given up early, to the same choice.

    Raises ValueError when so many layers cannot be removed, and RuntimeError for a NaN value.
    """
    return beam(n_layers, layers_removed, evaluate, 1, protect_first, protect_last, finalists=finalists, progress=progress)


def beam(
    n_layers: int,
    layers_removed: int,
    evaluate: Evaluate,
    width: int = 4,
    protect_first: int = 0,
    protect_last: int = 0,
    *,
    finalists: Finalists | None = None,
    progress: bool = True,
) -> SearchResult:
    """`greedy` that carries on the `width` best sets of every size instead of one.

    Each distinct set is evaluated once. Raises ValueError for a width below 1, and as `greedy`.
    """
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    candidates = _candidates(n_layers, layers_removed, protect_first, protect_last)
    values = _Values(evaluate, finalists)
    carried: list[LayerSet] = [()]
    steps = []
    for _ in tqdm(range(layers_removed), desc="layers removed", unit="layer", disable=not progress):
        grown = dict.fromkeys(
            tuple(sorted((*removed, layer))) for removed in carried for layer in candidates if layer not in removed
        )
        found = values.lowest(list(grown), width)
        ranked = sorted(found.items(), key=lambda scored: scored[1])  # stable: the first among equals
        carried = [removed for removed, _ in ranked[:width]]
        steps.append(SearchStep(*ranked[0], values.evaluations))
    value = values(carried[:1])[0]
    return SearchResult(carried[0], value, values.evaluations, tuple(steps), values.known)


def swap_descent(
    n_layers: int,
    start: LayerSet,
    evaluate: Evaluate,
    protect_first: int = 0,
    protect_last: int = 0,
    *,
    finalists: Finalists | None = None,
    progress: bool = True,
) -> SearchResult:
    """From a set downhill: put one removed layer back and take another instead, the best such swap while one improves.

    The result is at least as good as `start`, and no single swap makes it better. A round takes K (n - K) evaluations, for n
    layers that may go; with `finalists` the hopeless ones are given up early. Raises ValueError for a start that is not
    ascending and unique or holds a protected layer, and RuntimeError for a NaN value.
    """
    candidates = _candidates(n_layers, len(start), protect_first, protect_last)
    if list(start) != sorted(set(start)) or not set(start) <= set(candidates):
        raise ValueError(
            f"cannot start from {start}: give distinct layers in ascending order, all within {candidates.start} to "
            f"{candidates.stop - 1}"
        )
    values = _Values(evaluate, finalists)
    best = (values([start])[0], start)
    steps = [SearchStep(start, best[0], values.evaluations)]
    with tqdm(desc="swaps", unit="swap", disable=not progress) as bar:
        while True:
            kept = [layer for layer in candidates if layer not in best[1]]
            near = [tuple(sorted({*best[1], into} - {out})) for out in best[1] for into in kept]
            found = min(((value, removed) for removed, value in values.lowest(near, 1, best[0]).items()), default=best)
            if not found[0] < best[0]:
                return SearchResult(best[1], best[0], values.evaluations, tuple(steps), values.known)
            best = found
            steps.append(SearchStep(best[1], best[0], values.evaluations))
            bar.update()


def exhaustive(
    n_layers: int,
    layers_removed: int,
    evaluate: Evaluate,
    protect_first: int = 0,
    protect_last: int = 0,
    *,
    limit: int = 50_000,
    chunk: int = 512,
    finalists: Finalists | None = None,
    journal: str | os.PathLike | None = None,
    key: str = "",
    progress: bool = True,
) -> SearchResult:
    """Every set of `layers_removed` layers, and the best of them: the optimum that other choices are measured against.

    The sets come in lexicographic order, `chunk` at a time: neighbors share their first removed layers, and with them nearly
    all beginnings that any order could share. Among equals the first in that order wins.

    Args:
        limit: refuse when there are more sets than this.
        chunk: sets handed to one evaluation, the bound on what it must hold at a time.
        finalists: gives up sets early that are worse than the best of the chunks before; `values` then lacks them.
        journal: a file that takes the values chunk by chunk. When it exists, its values are not computed again.
        key: whatever identifies what is evaluated (model, windows), so that a journal of something else is refused.

    Raises:
        ValueError: when so many layers cannot be removed, more than `limit` sets, a journal of another search.
        RuntimeError: a NaN value.
    """
    candidates = _candidates(n_layers, layers_removed, protect_first, protect_last)
    count = math.comb(len(candidates), layers_removed)
    if count > limit:
        raise ValueError(
            f"{count} sets of {layers_removed} of {len(candidates)} layers are more than limit={limit}: raise the limit, "
            "protect more layers, or search with beam or evolutionary"
        )
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    header = {"n_layers": n_layers, "layers_removed": layers_removed, "key": key}
    values = _Values(evaluate, finalists)
    if journal is not None:
        values.known.update(_read_journal(Path(journal), header))
    sets = list(itertools.combinations(candidates, layers_removed))
    missing = [removed for removed in sets if removed not in values.known]
    bound = min((values.known[removed] for removed in sets if removed in values.known), default=math.inf)
    with tqdm(total=count, initial=count - len(missing), desc="all sets", unit="set", disable=not progress) as bar:
        for start in range(0, len(missing), chunk):
            part = missing[start : start + chunk]
            found = values.lowest(part, 1, bound)
            bound = min([bound, *found.values()])
            if journal is not None:
                _append_journal(Path(journal), found.items())
            bar.update(len(part))
    all_values = {removed: values.known[removed] for removed in sets if removed in values.known}
    best = min(all_values, key=all_values.__getitem__)
    step = SearchStep(best, all_values[best], count)
    return SearchResult(best, step.value, count, (step,), all_values)


def evolutionary(
    n_layers: int,
    layers_removed: int,
    fitness: Fitness,
    n_windows: int,
    *,
    seed: int = 0,
    generations: int | None = None,
    initial: int = 64,
    initial_windows: int = 1,
    offspring: int = 32,
    max_swaps: int = 3,
    stages: Sequence[tuple[int, int]] = ((2, 1), (1, 16)),
    resample: bool = True,
    groups: int = 1,
    protect_first: int = 0,
    protect_last: int = 0,
    progress: bool = True,
) -> SearchResult:
    """EvoPress's search (arXiv 2410.14649, `run_drop_search.sh`) over whole layers: swap removed and kept ones, keep the best.

    `initial` random sets are scored on `initial_windows` windows, the best ones are the parents. Every generation makes
    `offspring` distinct sets, each from a parent by min(u1, u2) swaps with u uniform in 1 .. `max_swaps`, and selects in
    `stages` of (survivors, windows); the parents take part in the last stage, so the best never gets worse on the same
    windows. Each selection draws its own windows out of the `n_windows`, or with resample=False always those of the first
    time. The published settings are in tokens, 2,048 for the first and 32,768 for the last stage: the defaults, for
    windows of 2,048 tokens. A stage larger than `n_windows` takes them all.

    generations is int(K (n - K) / 1.5) by default, for n layers that may go. The number of layers removed never changes.
    (In the released code half of the swaps of whole layers fall on a list that is then overwritten; here each one counts.)

    `groups` divides what may go into that many kinds, u in group u % groups. Each gives K / groups, and a swap picks a group,
    then exchanges within it; K and n of the default generations are those of one group, on average. With the units of
    LayerSetLoss(unit="sublayer") and groups=2 that is the published search: as many attention as MLP sublayers.

    Steps hold each generation's best and its value in the last stage; the value of the result is that on all windows, and
    `evaluations` counts (set, stage) pairs plus that one.

    Raises ValueError for settings out of range, when so many layers cannot be removed, and when K is no multiple of
    `groups`; RuntimeError for a NaN value.
    """
    candidates = _candidates(n_layers, layers_removed, protect_first, protect_last)
    kept = len(candidates) - layers_removed
    counts = [initial, initial_windows, offspring, max_swaps, n_windows, groups, *itertools.chain(*stages)]
    if not stages or min(counts) < 1 or (generations is not None and generations < 0):
        raise ValueError(
            f"initial={initial}, initial_windows={initial_windows}, offspring={offspring}, max_swaps={max_swaps}, "
            f"n_windows={n_windows}, groups={groups}, stages={stages}: all from 1, with at least one stage; "
            f"generations={generations}: from 0"
        )
    generations = int(layers_removed * kept / groups**2 / 1.5) if generations is None else generations
    kinds = _groups(candidates, layers_removed, groups)
    rng = np.random.default_rng(seed)
    values = _Fitness(fitness, n_windows, rng, resample)
    parents = _random_sets(kinds, layers_removed // groups, initial, rng)
    if len(parents) > 1:
        parents, _ = values.select(parents, stages[-1][0], initial_windows, stage=-1)
    steps = []
    for _ in tqdm(range(generations if kept and layers_removed else 0), desc="generations", disable=not progress):
        pool = _mutants(parents, kinds, offspring, max_swaps, rng)
        for stage, (survivors, windows) in enumerate(stages):
            if stage == len(stages) - 1:
                pool += [parent for parent in parents if parent not in pool]
            pool, found = values.select(pool, survivors, windows, stage)
        parents = pool
        steps.append(SearchStep(parents[0], found[0], values.evaluations))
    value = values.on(parents[:1], list(range(n_windows)))[0]
    return SearchResult(parents[0], value, values.evaluations, tuple(steps), {parents[0]: value})


def _groups(candidates: range, layers_removed: int, groups: int) -> list[list[int]]:
    """The candidates of each group, after checking that the groups can give equal parts.

    Neighbors belong to different groups, so that none has too few where there are enough together.
    """
    if layers_removed % groups:
        raise ValueError(f"cannot remove {layers_removed} in equal parts from groups={groups}: give a multiple of {groups}")
    return [[layer for layer in candidates if layer % groups == group] for group in range(groups)]


def _random_sets(kinds: list[list[int]], from_each: int, count: int, rng: np.random.Generator) -> list[LayerSet]:
    """Distinct sets, all of them where there are no more than `count`; so many members of each kind in a set."""
    if math.prod(math.comb(len(kind), from_each) for kind in kinds) <= count:
        parts = itertools.product(*(itertools.combinations(kind, from_each) for kind in kinds))
        return [tuple(sorted(itertools.chain(*part))) for part in parts]
    found: dict[LayerSet, None] = {}
    while len(found) < count:
        drawn = (rng.choice(kind, from_each, replace=False).tolist() for kind in kinds)
        found[tuple(sorted(itertools.chain(*drawn)))] = None
    return list(found)


def _mutants(
    parents: list[LayerSet], kinds: list[list[int]], count: int, max_swaps: int, rng: np.random.Generator
) -> list[LayerSet]:
    """Distinct sets other than the parents; fewer than `count` where so many are hard to come by."""
    found: dict[LayerSet, None] = {}
    movable = [kind for kind in kinds if not set(kind) <= set(parents[0])]  # all removed: nothing to exchange with
    for _ in range(100 * count):
        removed = set(parents[rng.integers(len(parents))])
        for _ in range(rng.integers(1, max_swaps + 1, size=2).min()):
            kind = movable[rng.integers(len(movable))]
            into = rng.choice([layer for layer in kind if layer not in removed])
            removed ^= {int(into), int(rng.choice([layer for layer in kind if layer in removed]))}
        mutant = tuple(sorted(removed))
        if mutant not in parents:
            found[mutant] = None
        if len(found) == count:
            break
    return list(found)


class _Fitness:
    """Fitness on drawn windows, and selection by it."""

    def __init__(self, fitness: Fitness, n_windows: int, rng: np.random.Generator, resample: bool):
        self.fitness, self.n_windows, self.rng, self.resample = fitness, n_windows, rng, resample
        self.drawn: dict[int, list[int]] = {}
        self.evaluations = 0

    def on(self, sets: list[LayerSet], rows: list[int]) -> list[float]:
        self.evaluations += len(sets)
        return _checked(sets, self.fitness(sets, rows) if sets else [])

    def select(self, sets: list[LayerSet], survivors: int, windows: int, stage: int) -> tuple[list[LayerSet], list[float]]:
        """The best sets and their values, best first; the first among equals."""
        if self.resample or stage not in self.drawn:
            size = min(windows, self.n_windows)
            self.drawn[stage] = sorted(self.rng.choice(self.n_windows, size, replace=False).tolist())
        found = self.on(sets, self.drawn[stage])
        ranked = sorted(zip(sets, found, strict=True), key=lambda scored: scored[1])[:survivors]
        return [removed for removed, _ in ranked], [value for _, value in ranked]


class _Values:
    """An evaluation of many layer sets that runs once per set. ``given_up`` holds those that were not run to the end."""

    def __init__(self, evaluate: Evaluate, finalists: Finalists | None = None):
        self.evaluate, self.finalists = evaluate, finalists
        self.known: dict[LayerSet, float] = {}
        self.given_up: set[LayerSet] = set()

    @property
    def evaluations(self) -> int:
        return len(self.known) + len(self.given_up)

    def lowest(self, sets: list[LayerSet], width: int, bound: float = math.inf) -> dict[LayerSet, float]:
        """Values of at least the `width` lowest of the sets up to `bound`, in the order of the sets; of all, without finalists.

        What has been given up stays so: `bound` must not grow from call to call with the same sets.
        """
        if self.finalists is None:
            return dict(zip(sets, self(sets), strict=True))
        new = [removed for removed in sets if removed not in self.known and removed not in self.given_up]
        if new:
            found = self.finalists(new, width, bound)
            self.known.update(zip(found, _checked(list(found), list(found.values())), strict=True))
            self.given_up.update(removed for removed in new if removed not in found)
        return {removed: self.known[removed] for removed in sets if removed in self.known}

    def __call__(self, sets: list[LayerSet]) -> list[float]:
        new = [removed for removed in sets if removed not in self.known]
        if new:
            self.known.update(zip(new, _checked(new, self.evaluate(new)), strict=True))
        return [self.known[removed] for removed in sets]


def _checked(sets: list[LayerSet], found: Sequence[float]) -> list[float]:
    """Values as floats, one per set and none NaN: NaN would make every comparison false, while infinity is a result."""
    values = [float(value) for value in found]
    if len(values) != len(sets):
        raise RuntimeError(f"the evaluation of {len(sets)} sets gave {len(values)} values")
    for removed, value in zip(sets, values, strict=True):
        if math.isnan(value):
            raise RuntimeError(f"the evaluation of the model without layers {list(removed)} gave NaN")
    return values


def _read_journal(path: Path, header: dict) -> dict[LayerSet, float]:
    """The values of an earlier run that was stopped; a new file with its header where there is none."""
    if not path.exists():
        write_text(path, json.dumps(header) + "\n")
        return {}
    text = path.read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1]
    lines = complete.splitlines()
    if not lines or json.loads(lines[0]) != header:
        raise ValueError(f"journal {path} is of another search ({lines[:1]}, not {header}): delete it or name another file")
    if complete != text:  # the run was killed while it wrote its last line
        write_text(path, complete)
    return {tuple(removed): value for removed, value in map(json.loads, lines[1:])}


def _append_journal(path: Path, scored: Iterable[tuple[LayerSet, float]]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps([list(removed), value]) + "\n" for removed, value in scored)
        file.flush()
        os.fsync(file.fileno())


def _candidates(n_layers: int, layers_removed: int, protect_first: int, protect_last: int) -> range:
    """The layers that may go, after checking that `layers_removed` of them can."""
    counts = {"layers_removed": layers_removed, "protect_first": protect_first, "protect_last": protect_last}
    for name, count in counts.items():
        if count < 0:
            raise ValueError(f"{name} must not be negative, got {count}")
    if layers_removed >= n_layers:
        raise ValueError(f"cannot remove {layers_removed} of {n_layers} layers: at least one must stay")
    candidates = range(protect_first, n_layers - protect_last)
    if layers_removed > len(candidates):
        raise ValueError(
            f"cannot remove {layers_removed} of {n_layers} layers with the first {protect_first} and the last {protect_last} "
            f"protected: only {len(candidates)} may go"
        )
    return candidates
