"""The best of many candidates by their sums of losses, where nobody is evaluated further than it can still win.

Losses are not negative: what a candidate has lost so far bounds its sum from below, whatever is still to come. Once that is
above the sum of a candidate evaluated to the end, it can be dropped, and the choice stays what it would have been, ties
included. No better bound holds for the likelihood of a language model, nor for its divergence from another one: the windows
still to come may all be predicted perfectly. So a candidate that is 5% worse than the best is dropped when 5% of the loss are
left. Guesses about its final sum (means, confidence bounds) would drop it sooner, and now and then the winner.

How little that can be: in a greedy search for 8 layers of the main reference model (16 windows, `benchmarks/search_cost.py`) it
saves 8% of the layers when sets are told apart by their divergence from the dense model, and nothing when by likelihood, where
all candidates lie within a few percent; what the leaders' own runs no longer share eats up the rest.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

Candidate = TypeVar("Candidate")

Losses = Callable[[list[Candidate], int], Sequence[Sequence[float]]]
"""For each of the candidates its losses on one part of the data, none negative."""


@dataclass(frozen=True)
class Finals:
    """What came of the candidates.

    ``values`` holds the mean losses of those that were evaluated on every part, in the order given. ``part_sums`` are the
    summed losses of the best of them, part by part. ``evaluated`` counts (candidate, part) pairs.
    """

    values: dict
    part_sums: dict[int, float]
    evaluated: int


def finals(
    candidates: Sequence[Candidate],
    parts: Sequence[int],
    losses: Losses,
    count: int,
    width: int = 1,
    bound: float = math.inf,
) -> Finals:
    """Evaluate candidates part by part, and drop those that cannot be among the `width` lowest with a value up to `bound`.

    Every candidate is in the result that has one of the `width` lowest values and no higher one than `bound`, and so is every
    other one that has the same value. Values are sums of losses, correctly rounded, over `count`: the same ones whatever the
    order of the parts. Without a bound the first part finds the leaders, which are evaluated to the end before the others go
    on. So a part that tells much (a difficult one) belongs in front.

    Raises:
        ValueError: no part, or a `width` or `count` below 1.
        RuntimeError: a negative loss or NaN, which would make the bound void.
    """
    if not parts or width < 1 or count < 1:
        raise ValueError(f"parts={list(parts)}, width={width}, count={count}: at least one of each")
    everyone = list(dict.fromkeys(candidates))
    lost: dict[Candidate, dict[int, list[float]]] = {candidate: {} for candidate in everyone}

    def value(candidate: Candidate) -> float:
        # Both roundings keep the order, so a part of the losses never comes to more than all of them.
        return math.fsum(loss for part in lost[candidate].values() for loss in part) / count

    def run(some: list[Candidate], part: int) -> None:
        for candidate, found in zip(some, losses(some, part) if some else (), strict=True):
            if not all(loss >= 0 for loss in found):
                raise RuntimeError(f"{candidate} lost {min(found)} in part {part}: only losses from 0 can be bounded")
            lost[candidate][part] = list(found)

    first, *rest = parts
    run(everyone, first)
    leaders: list[Candidate] = []
    if math.isinf(bound) and rest and len(everyone) > width:
        leaders = sorted(everyone, key=value)[:width]
        for part in rest:
            run(leaders, part)
        bound = max(value(leader) for leader in leaders)
    alive = [candidate for candidate in everyone if candidate not in leaders]
    for part in rest:
        alive = [candidate for candidate in alive if value(candidate) <= bound]
        run(alive, part)
    values = {candidate: value(candidate) for candidate in everyone if len(lost[candidate]) == len(parts)}
    best = min(values, key=values.__getitem__, default=None)
    part_sums = {part: math.fsum(found) for part, found in lost[best].items()} if best is not None else {}
    return Finals(values, part_sums, sum(map(len, lost.values())))
