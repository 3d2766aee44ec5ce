"""Searches over sets of layers by their loss: greedy, beam, evolutionary, single swaps, and every set there is.

They ask for the losses of many sets at a time, which `LayerSetLoss` evaluates together. What they remove are `units`: all
layers, given as their number, or a sequence of those that may go, ascending: layers or sublayers (layer, "attn" | "mlp"). All
raise ValueError when so many cannot be removed, and RuntimeError for a NaN value.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from tqdm.auto import tqdm

from prunelib.depth.select import Evaluate, Values, candidates_for, checked_values
from prunelib.models.layerwise import LayerSet

CHUNK = 512  # sets that `exhaustive` hands to one evaluation, which must hold their hidden states
LIMIT = 50_000  # sets that `exhaustive` evaluates at most
MAX_SWAPS = 3  # units that `evolutionary` exchanges at most between a parent and its child

Unit = int | tuple[int, str]

Fitness = Callable[[list[LayerSet], list[int]], Sequence[float]]
"""As `Evaluate`, on the windows of the given indices only."""


@dataclass(frozen=True)
class SearchStep:
    """The best set after one step of a search, its value, and the evaluations of sets spent until then."""

    removed: LayerSet
    value: float
    evaluations: int


@dataclass(frozen=True)
class SearchResult(SearchStep):
    """What a search found, and the steps that led there; ``values`` holds every set that was evaluated on all windows."""

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
    smaller numbers. Over sublayers and without barriers it is BlockPruner (arXiv 2406.10594).
    """
    everything = range(units) if isinstance(units, int) else units
    places = candidates_for(len(everything), layers_removed, protect_first, protect_last)
    return beam(everything[places.start : places.stop], layers_removed, evaluate, 1, progress=progress)


def beam(
    units: int | Sequence[Unit], layers_removed: int, evaluate: Evaluate, width: int = 4, *, progress: bool = True
) -> SearchResult:
    """`greedy` without barriers that carries on the `width` best sets of every size instead of one.

    Each distinct set is evaluated once. Raises ValueError for a width below 1.
    """
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    candidates = _candidates(units, layers_removed)
    values = Values(evaluate)
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


def swap_descent(units: int | Sequence[Unit], start: LayerSet, evaluate: Evaluate, *, progress: bool = True) -> SearchResult:
    """From a set downhill: put one removed layer back and take another instead, the best such swap while one improves.

    Raises ValueError for a start that is not ascending and unique or holds a layer that may not go.
    """
    candidates = _candidates(units, len(start))
    if list(start) != sorted(set(start)) or not set(start) <= set(candidates):
        raise ValueError(f"cannot start from {start}: give distinct layers in ascending order, of those that may go")
    values = Values(evaluate)
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


def exhaustive(units: int | Sequence[Unit], layers_removed: int, evaluate: Evaluate, *, progress: bool = True) -> SearchResult:
    """Every set of `layers_removed` layers, and the best of them: the optimum that other choices are measured against.

    The sets come in lexicographic order: neighbors share their first removed layers, and with them nearly all beginnings that
    any order could share. Among equals the first in that order wins. Raises ValueError for more sets than `LIMIT`.
    """
    candidates = _candidates(units, layers_removed)
    count = math.comb(len(candidates), layers_removed)
    if count > LIMIT:
        what = f"{count} sets of {layers_removed} of {len(candidates)} layers are more than {LIMIT}"
        raise ValueError(f"{what}: give fewer layers, or search with beam or evolutionary")
    sets = list(itertools.combinations(candidates, layers_removed))
    values = Values(evaluate)
    with tqdm(total=count, desc="all sets", unit="set", disable=not progress) as bar:
        for start in range(0, count, CHUNK):
            bar.update(len(values(sets[start : start + CHUNK])))
    best = min(sets, key=values.known.__getitem__)
    found = (best, values.known[best], count)
    return SearchResult(*found, (SearchStep(*found),), values.known)


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
    stages: Sequence[tuple[int, int]] = ((2, 1), (1, 16)),
    groups: int = 1,
    progress: bool = True,
) -> SearchResult:
    """EvoPress's search (arXiv 2410.14649, `run_drop_search.sh`): swap removed and kept units, keep the best sets.

    `initial` random sets are scored on `initial_windows` windows, the best ones are the parents. Every generation makes
    `offspring` distinct sets, each from a parent by min(u1, u2) swaps with u uniform in 1 .. `MAX_SWAPS`, and selects in
    `stages` of (survivors, windows); the parents take part in the last stage. Each selection draws its own windows out of the
    `n_windows`, at most all. The defaults are the published settings, for windows of 2,048 tokens. generations is
    int(K (n - K) / 1.5) by default, for n layers that may go. (In the released code half of the swaps of whole layers fall on a
    list that is then overwritten; here each one counts.)

    The unit at place i is in group i % groups: each group gives K / groups, and swaps are within a group; K and n of the
    default generations are those of one group. With sublayers and groups=2 as many attention as MLP sublayers go, as published.

    Steps hold each generation's best and its value in the last stage; the result's value is that on all windows, `evaluations`
    counts (set, stage) pairs plus that one. Raises ValueError for settings out of range, and when `groups` do not divide K.
    """
    candidates = _candidates(units, layers_removed)
    kept = len(candidates) - layers_removed
    counts = [initial, initial_windows, offspring, n_windows, groups, *itertools.chain(*stages)]
    if not stages or min(counts) < 1 or (generations is not None and generations < 0):
        raise ValueError(
            f"{initial=}, {initial_windows=}, {offspring=}, {n_windows=}, {groups=}, {stages=}: all from 1, with at least one "
            f"stage; {generations=}: from 0"
        )
    if layers_removed % groups:
        raise ValueError(f"cannot remove {layers_removed} in equal parts from groups={groups}: give a multiple of {groups}")
    generations = int(layers_removed * kept / groups**2 / 1.5) if generations is None else generations
    # Neighbors belong to different groups, so that none has too few where there are enough together.
    kinds = [list(candidates[group::groups]) for group in range(groups)]
    rng = np.random.default_rng(seed)
    evaluations = 0

    def select(sets: list[LayerSet], survivors: int, windows: int) -> list[tuple[LayerSet, float]]:
        """The best sets and their values on newly drawn windows, best first; the first among equals."""
        nonlocal evaluations
        evaluations += len(sets)
        rows = sorted(rng.choice(n_windows, min(windows, n_windows), replace=False).tolist())
        found = checked_values(sets, fitness(sets, rows)) if sets else []
        return sorted(zip(sets, found, strict=True), key=lambda scored: scored[1])[:survivors]

    parents = _random_sets(kinds, layers_removed // groups, initial, rng)
    if len(parents) > 1:
        parents = [removed for removed, _ in select(parents, stages[-1][0], initial_windows)]
    steps = []
    for _ in tqdm(range(generations if kept and layers_removed else 0), desc="generations", disable=not progress):
        pool = _mutants(parents, kinds, offspring, rng)
        for survivors, windows in stages[:-1]:
            pool = [removed for removed, _ in select(pool, survivors, windows)]
        best = select(pool + [parent for parent in parents if parent not in pool], *stages[-1])
        parents = [removed for removed, _ in best]
        steps.append(SearchStep(*best[0], evaluations))
    value = checked_values(parents[:1], fitness(parents[:1], list(range(n_windows))))[0]
    return SearchResult(parents[0], value, evaluations + 1, tuple(steps), {parents[0]: value})


def _candidates(units: int | Sequence[Unit], layers_removed: int) -> Sequence[Unit]:
    """The units that may go, after checking that `layers_removed` of them can."""
    if isinstance(units, int):
        return candidates_for(units, layers_removed, 0, 0)
    if not 0 <= layers_removed <= len(units):
        raise ValueError(f"cannot remove {layers_removed} of {len(units)} units that may go")
    return units


def _random_sets(kinds: list[list[Unit]], from_each: int, count: int, rng: np.random.Generator) -> list[LayerSet]:
    """Distinct sets, all of them where there are no more than `count`; so many members of each kind in a set."""
    if math.prod(math.comb(len(kind), from_each) for kind in kinds) <= count:
        parts = itertools.product(*(itertools.combinations(kind, from_each) for kind in kinds))
        return [tuple(sorted(itertools.chain(*part))) for part in parts]
    found: dict[LayerSet, None] = {}
    while len(found) < count:
        drawn = [kind[place] for kind in kinds for place in rng.choice(len(kind), from_each, replace=False)]
        found[tuple(sorted(drawn))] = None
    return list(found)


def _mutants(parents: list[LayerSet], kinds: list[list[Unit]], count: int, rng: np.random.Generator) -> list[LayerSet]:
    """Distinct sets other than the parents; fewer than `count` where so many are hard to come by."""
    found: dict[LayerSet, None] = {}
    movable = [kind for kind in kinds if not set(kind) <= set(parents[0])]  # all removed: nothing to exchange with
    for _ in range(100 * count):
        removed = set(parents[rng.integers(len(parents))])
        for _ in range(rng.integers(1, MAX_SWAPS + 1, size=2).min()):
            kind = movable[rng.integers(len(movable))]
            kept, gone = ([unit for unit in kind if (unit in removed) == inside] for inside in (False, True))
            removed ^= {kept[rng.choice(len(kept))], gone[rng.choice(len(gone))]}
        mutant = tuple(sorted(removed))
        if mutant not in parents:
            found[mutant] = None
        if len(found) == count:
            break
    return list(found)
