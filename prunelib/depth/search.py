"""Searches over sets of layers by their loss: greedy, beam, evolutionary, single swaps, and every set there is.

They ask for the losses of many sets at a time, so that the evaluation can share the work between them
(`prunelib.depth.objective.LayerSetLoss` does).
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from tqdm.auto import tqdm

from prunelib.depth.select import candidates_for
from prunelib.models.layerwise import LayerSet

Unit = int | tuple[int, str]
"""What a search removes: a layer, or a sublayer (layer, "attn" | "mlp")."""

Evaluate = Callable[[list[LayerSet]], list[float]]
"""Loss of the model without each of the given sets of layers, in their order; lower is better."""

Fitness = Callable[[list[LayerSet], list[int]], list[float]]
"""As `Evaluate`, on the windows of the given indices only."""


@dataclass(frozen=True)
class SearchStep:
    """The best set after one step of a search, its value, and the evaluations of sets spent until then."""

    removed: LayerSet
    value: float
    evaluations: int


@dataclass(frozen=True)
class SearchResult:
    """What a search found: the layers removed, their value, the evaluations of sets spent, and the way there.

    ``values`` holds every set that was evaluated on all windows.
    """

    removed: LayerSet
    value: float
    evaluations: int
    steps: tuple[SearchStep, ...]
    values: dict[LayerSet, float] = field(repr=False)


def greedy(
    units: int | Sequence[Unit],
    layers_removed: int,
    evaluate: Evaluate,
    protect_first: int = 1,
    protect_last: int = 1,
    *,
    progress: bool = True,
) -> SearchResult:
    """SLEB (arXiv 2402.09025): remove the layer without which the current model is best, score the others again, repeat.

    The defaults are SLEB's barriers: the first and the last layer stay. Among equals the shallower layer goes, as by the strict
    comparison of the released code. Step k of the result holds the choice for k + 1 layers, so that one run serves all
    smaller numbers. L = 32 and K = 7 take 189 evaluations. `units` is the number of layers, or
    everything that may go: over the sublayers of ``LayerSetLoss(unit="sublayer").units``, without barriers, it is BlockPruner
    (arXiv 2406.10594).

    Raises ValueError when so many layers cannot be removed, and RuntimeError for a NaN value.
    """
    return beam(units, layers_removed, evaluate, 1, protect_first, protect_last, progress=progress)


def beam(
    units: int | Sequence[Unit],
    layers_removed: int,
    evaluate: Evaluate,
    width: int = 4,
    protect_first: int = 0,
    protect_last: int = 0,
    *,
    progress: bool = True,
) -> SearchResult:
    """`greedy` that carries on the `width` best sets of every size instead of one.

    Each distinct set is evaluated once. Raises ValueError for a width below 1, and as `greedy`.
    """
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    candidates = _candidates(units, layers_removed, protect_first, protect_last)
    values = _Memo(evaluate)
    carried: list[LayerSet] = [()]
    steps = []
    for _ in tqdm(range(layers_removed), desc="layers removed", unit="layer", disable=not progress):
        grown = dict.fromkeys(
            tuple(sorted((*removed, layer))) for removed in carried for layer in candidates if layer not in removed
        )
        # The sort is stable: the first among equals.
        ranked = sorted(zip(grown, values(list(grown)), strict=True), key=lambda scored: scored[1])
        carried = [removed for removed, _ in ranked[:width]]
        steps.append(SearchStep(*ranked[0], len(values.known)))
    value = values(carried[:1])[0]
    return SearchResult(carried[0], value, len(values.known), tuple(steps), values.known)


def swap_descent(
    units: int | Sequence[Unit],
    start: LayerSet,
    evaluate: Evaluate,
    protect_first: int = 0,
    protect_last: int = 0,
    *,
    progress: bool = True,
) -> SearchResult:
    """From a set downhill: put one removed layer back and take another instead, the best such swap while one improves.

    The result is at least as good as `start`, and no single swap makes it better. A round takes K (n - K) evaluations, for n
    layers that may go. Raises ValueError for a start that is not ascending and unique or holds a protected layer, and
    RuntimeError for a NaN value.
    """
    candidates = _candidates(units, len(start), protect_first, protect_last)
    if list(start) != sorted(set(start)) or not set(start) <= set(candidates):
        raise ValueError(
            f"cannot start from {start}: give distinct layers in ascending order, all within {candidates[0]} to "
            f"{candidates[-1]}"
        )
    values = _Memo(evaluate)
    best = (values([start])[0], start)
    steps = [SearchStep(start, best[0], len(values.known))]
    with tqdm(desc="swaps", unit="swap", disable=not progress) as bar:
        while True:
            kept = [layer for layer in candidates if layer not in best[1]]
            near = [tuple(sorted({*best[1], into} - {out})) for out in best[1] for into in kept]
            found = min(zip(values(near), near, strict=True), default=best)
            if not found[0] < best[0]:
                return SearchResult(best[1], best[0], len(values.known), tuple(steps), values.known)
            best = found
            steps.append(SearchStep(best[1], best[0], len(values.known)))
            bar.update()


def exhaustive(
    units: int | Sequence[Unit],
    layers_removed: int,
    evaluate: Evaluate,
    protect_first: int = 0,
    protect_last: int = 0,
    *,
    limit: int = 50_000,
    chunk: int = 512,
    progress: bool = True,
) -> SearchResult:
    """Every set of `layers_removed` layers, and the best of them: the optimum that other choices are measured against.

    The sets come in lexicographic order, `chunk` at a time: neighbors share their first removed layers, and with them nearly
    all beginnings that any order could share. Among equals the first in that order wins.

    Args:
        limit: refuse when there are more sets than this.
        chunk: sets handed to one evaluation, the bound on what it must hold at a time.

    Raises:
        ValueError: when so many layers cannot be removed, more than `limit` sets.
        RuntimeError: a NaN value.
    """
    candidates = _candidates(units, layers_removed, protect_first, protect_last)
    count = math.comb(len(candidates), layers_removed)
    if count > limit:
        raise ValueError(
            f"{count} sets of {layers_removed} of {len(candidates)} layers are more than limit={limit}: raise the limit, "
            "protect more layers, or search with beam or evolutionary"
        )
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    sets = list(itertools.combinations(candidates, layers_removed))
    values = _Memo(evaluate)
    with tqdm(total=count, desc="all sets", unit="set", disable=not progress) as bar:
        for start in range(0, count, chunk):
            bar.update(len(values(sets[start : start + chunk])))
    best = min(sets, key=values.known.__getitem__)
    step = SearchStep(best, values.known[best], count)
    return SearchResult(best, step.value, count, (step,), values.known)


def evolutionary(
    units: int | Sequence[Unit],
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

    `groups` divides the units into that many kinds, the one at place i in group i % groups. Each gives K / groups, and a swap
    picks a group, then exchanges within it; K and n of the default generations are those of one group, on average. With the
    units of LayerSetLoss(unit="sublayer") and groups=2 that is the published search: as many attention as MLP sublayers.

    Steps hold each generation's best and its value in the last stage; the value of the result is that on all windows, and
    `evaluations` counts (set, stage) pairs plus that one.

    Raises ValueError for settings out of range, when so many layers cannot be removed, and when K is no multiple of
    `groups`; RuntimeError for a NaN value.
    """
    candidates = _candidates(units, layers_removed, protect_first, protect_last)
    kept = len(candidates) - layers_removed
    counts = [initial, initial_windows, offspring, max_swaps, n_windows, groups, *itertools.chain(*stages)]
    if not stages or min(counts) < 1 or (generations is not None and generations < 0):
        raise ValueError(
            f"initial={initial}, initial_windows={initial_windows}, offspring={offspring}, max_swaps={max_swaps}, "
            f"n_windows={n_windows}, groups={groups}, stages={stages}: all from 1, with at least one stage; "
            f"generations={generations}: from 0"
        )
    generations = int(layers_removed * kept / groups**2 / 1.5) if generations is None else generations
    kinds = _groups(candidates, layers_removed, groups, protect_first)
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


def _candidates(units: int | Sequence[Unit], layers_removed: int, protect_first: int, protect_last: int) -> Sequence[Unit]:
    """The units that may go, after checking that `layers_removed` of them can."""
    everything = range(units) if isinstance(units, int) else tuple(units)
    places = candidates_for(len(everything), layers_removed, protect_first, protect_last)
    return everything[places.start : places.stop]


def _groups(candidates: Sequence[Unit], layers_removed: int, groups: int, first: int) -> list[list[Unit]]:
    """The candidates of each group, after checking that the groups can give equal parts. `first` is the place of the first one.

    Neighbors belong to different groups, so that none has too few where there are enough together.
    """
    if layers_removed % groups:
        raise ValueError(f"cannot remove {layers_removed} in equal parts from groups={groups}: give a multiple of {groups}")
    return [list(candidates[(group - first) % groups :: groups]) for group in range(groups)]


def _drawn(kind: list[Unit], count: int, rng: np.random.Generator) -> list[Unit]:
    return [kind[place] for place in rng.choice(len(kind), count, replace=False)]


def _random_sets(kinds: list[list[Unit]], from_each: int, count: int, rng: np.random.Generator) -> list[LayerSet]:
    """Distinct sets, all of them where there are no more than `count`; so many members of each kind in a set."""
    if math.prod(math.comb(len(kind), from_each) for kind in kinds) <= count:
        parts = itertools.product(*(itertools.combinations(kind, from_each) for kind in kinds))
        return [tuple(sorted(itertools.chain(*part))) for part in parts]
    found: dict[LayerSet, None] = {}
    while len(found) < count:
        drawn = (_drawn(kind, from_each, rng) for kind in kinds)
        found[tuple(sorted(itertools.chain(*drawn)))] = None
    return list(found)


def _mutants(
    parents: list[LayerSet], kinds: list[list[Unit]], count: int, max_swaps: int, rng: np.random.Generator
) -> list[LayerSet]:
    """Distinct sets other than the parents; fewer than `count` where so many are hard to come by."""
    found: dict[LayerSet, None] = {}
    movable = [kind for kind in kinds if not set(kind) <= set(parents[0])]  # all removed: nothing to exchange with
    for _ in range(100 * count):
        removed = set(parents[rng.integers(len(parents))])
        for _ in range(rng.integers(1, max_swaps + 1, size=2).min()):
            kind = movable[rng.integers(len(movable))]
            kept, gone = ([unit for unit in kind if (unit in removed) == inside] for inside in (False, True))
            removed ^= {kept[rng.choice(len(kept))], gone[rng.choice(len(gone))]}
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


class _Memo:
    """An evaluation of many layer sets that runs once per set; ``known`` holds every value."""

    def __init__(self, evaluate: Evaluate):
        self.evaluate = evaluate
        self.known: dict[LayerSet, float] = {}

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
