"""Searches over sets of layers: against brute force, against each other, and what they cost."""

import itertools
import math

import numpy as np
import pytest
from architectures import build
from model_helpers import random_windows

from prunelib.depth import LayerSetLoss, beam, evolutionary, exhaustive, greedy, swap_descent
from prunelib.evaluation import perplexity
from prunelib.models import remove_layers
from prunelib.models.sublayers import all_sublayers, remove_sublayers


def interacting(n_layers: int, seed: int):
    """A loss of sets in which layers cost more, or less, together than apart."""
    rng = np.random.default_rng(seed)
    alone, together = rng.random(n_layers), rng.normal(size=(n_layers, n_layers))

    def one(removed):
        return sum(alone[i] for i in removed) + sum(together[i, j] for i, j in itertools.combinations(removed, 2))

    return lambda sets: [float(one(removed)) for removed in sets]


def naive_greedy(n_layers: int, layers_removed: int, one) -> list[int]:
    """As SLEB's released code goes about it: indices into the list of layers still there, strict comparison."""
    alive, order = list(range(n_layers)), []
    for _ in range(layers_removed):
        best, chosen = math.inf, None
        for place in range(1, len(alive) - 1):
            value = one(tuple(sorted([*order, alive[place]])))
            if value < best:
                best, chosen = value, place
        order.append(alive.pop(chosen))
    return order


@pytest.mark.parametrize("seed", range(5))
def test_greedy_equals_the_naive_loop(seed):
    evaluate = interacting(9, seed)
    order = naive_greedy(9, 5, lambda removed: evaluate([removed])[0])
    found = greedy(9, 5, evaluate, progress=False)
    assert [step.removed for step in found.steps] == [tuple(sorted(order[:count])) for count in range(1, 6)]
    assert found.removed == found.steps[-1].removed
    assert found.value == evaluate([found.removed])[0]
    assert found.evaluations == len(found.values) == 7 + 6 + 5 + 4 + 3
    assert not {0, 8} & set(found.removed)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt"])
def test_greedy_on_a_model_equals_pruning_it_again_and_again(family):
    model, windows = build(family), random_windows()
    found = greedy(6, 3, LayerSetLoss(model, windows), progress=False)
    order = naive_greedy(6, 3, lambda removed: perplexity(remove_layers(model, removed), windows).nll)
    assert [step.removed for step in found.steps] == [tuple(sorted(order[:count])) for count in (1, 2, 3)]
    assert found.value == pytest.approx(perplexity(remove_layers(model, found.removed), windows).nll, abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_beam_between_greedy_and_the_optimum(seed):
    evaluate = interacting(9, seed)
    narrow, wide = beam(9, 3, evaluate, 1, progress=False), beam(9, 3, evaluate, 1000, progress=False)
    assert narrow == greedy(9, 3, evaluate, 0, 0, progress=False)
    best = exhaustive(9, 3, evaluate, progress=False)
    assert (wide.removed, wide.value) == (best.removed, best.value)
    assert best.value <= beam(9, 3, evaluate, 4, progress=False).value <= narrow.value + 1e-12
    assert beam(range(2, 7), 3, evaluate, 4, progress=False).removed in itertools.combinations(range(2, 7), 3)


@pytest.mark.parametrize("seed", range(3))
def test_swap_descent_ends_where_no_swap_helps(seed):
    evaluate = interacting(9, seed)
    start = greedy(9, 3, evaluate, 0, 0, progress=False).removed
    found = swap_descent(9, start, evaluate, progress=False)
    values = [step.value for step in found.steps]
    assert values == sorted(values, reverse=True) and found.value <= evaluate([start])[0]
    for out, into in itertools.product(found.removed, set(range(9)) - set(found.removed)):
        assert evaluate([tuple(sorted(set(found.removed) - {out} | {into}))])[0] >= found.value
    # From everywhere, the best of the ends is the optimum: it is its own end.
    best = exhaustive(9, 3, evaluate, progress=False)
    assert swap_descent(9, best.removed, evaluate, progress=False).removed == best.removed
    protected = swap_descent(range(2, 8), (2, 3, 4), evaluate, progress=False)
    assert set(protected.removed) <= set(range(2, 8))
    for impossible in ((3, 2), (3, 3), (1, 5)):
        with pytest.raises(ValueError, match="cannot start from"):
            swap_descent(range(2, 8), impossible, evaluate, progress=False)


def fitness_of(evaluate, n_windows: int, noise: float = 0.0):
    """Windows that agree on the loss up to noise, and a record of every call."""
    shift = np.random.default_rng(5).normal(size=n_windows) * noise
    calls: list[tuple[list, list]] = []

    def fitness(sets, rows):
        calls.append((list(sets), list(rows)))
        return [value * float(1 + shift[rows].mean()) for value in evaluate(sets)]

    return fitness, calls


def test_evolution_follows_the_recipe():
    fitness, calls = fitness_of(interacting(32, 0), 40)
    found = evolutionary(32, 8, fitness, 40, generations=5, progress=False)
    sizes = [(len(sets), len(rows)) for sets, rows in calls]
    assert sizes == [(64, 1), *[(32, 1), (3, 16)] * 5, (1, 40)]
    assert found.evaluations == 64 + 5 * 35 + 1
    assert all(len(set(sets)) == len(sets) for sets, _ in calls)
    assert all(len(set(rows)) == len(rows) and 0 <= min(rows) <= max(rows) < 40 for _, rows in calls)
    # Every set ever looked at removes 8 layers, ascending and distinct.
    assert all(len(set(removed)) == 8 and list(removed) == sorted(removed) for sets, _ in calls for removed in sets)
    # Children differ from their parent by one to three swaps.
    parent = min(calls[0][0], key=lambda removed: fitness([removed], calls[0][1])[0])
    distances = {len(set(parent) - set(child)) for child in calls[1][0]}
    assert distances <= {1, 2, 3}
    assert 1 in distances
    assert len({tuple(rows) for _, rows in calls[2:12:2]}) > 1  # drawn anew


@pytest.mark.parametrize(("layers_removed", "generations"), [(4, 74), (8, 128), (12, 160)])
def test_generations_of_the_released_script(layers_removed, generations):
    fitness, _ = fitness_of(interacting(32, 0), 2)
    found = evolutionary(32, layers_removed, fitness, 2, initial=2, offspring=1, progress=False)
    assert len(found.steps) == generations


def test_fitness_never_worsens_on_the_same_windows_and_the_seed_decides():
    runs = []
    for seed in (0, 0, 1):
        fitness, _ = fitness_of(interacting(24, 0), 16, noise=0.1)  # as many windows as the last stage takes
        runs.append(evolutionary(24, 8, fitness, 16, seed=seed, generations=20, progress=False))
        values = [step.value for step in runs[-1].steps]
        assert values == sorted(values, reverse=True)
        assert values[-1] < values[0]
    assert runs[0] == runs[1] != runs[2]


def test_evolution_finds_the_optimum_of_a_planted_problem():
    """Two layers that must go together: removing either alone is what a greedy search never does."""
    target = {3, 7}

    def evaluate(sets):
        return [1.0 if not target & set(s) else (0.0 if target <= set(s) else 5.0) + 0.01 * min(s) for s in sets]

    assert not target & set(greedy(10, 2, evaluate, progress=False).removed)
    found = evolutionary(10, 2, lambda sets, rows: evaluate(sets), 4, initial=3, generations=30, progress=False)
    assert set(found.removed) == target
    assert found.value == exhaustive(10, 2, evaluate, progress=False).value


def test_evolution_takes_as_many_of_each_group():
    """Attention and MLP sublayers in equal parts, as EvoPress does; and it finds the best of these sets."""
    units = all_sublayers(4)
    cost = dict(zip(units, np.random.default_rng(0).random(8), strict=True))
    fitness, calls = fitness_of(lambda sets: [sum(cost[unit] for unit in removed) for removed in sets], 3)
    found = evolutionary(units, 4, fitness, 3, groups=2, initial=4, generations=20, progress=False)
    assert all(sum(part == "attn" for _, part in removed) == 2 for sets, _ in calls for removed in sets)
    parts = ([unit for unit in units if unit[1] == part] for part in ("attn", "mlp"))
    assert set(found.removed) == {unit for part in parts for unit in sorted(part, key=cost.get)[:2]}
    with pytest.raises(ValueError, match="cannot remove 3 in equal parts from groups=2"):
        evolutionary(units, 3, fitness, 3, groups=2)


def test_blockpruner_is_greedy_over_sublayers():
    """Against the naive loop over models without these sublayers."""
    model, windows = build("llama"), random_windows()
    loss = LayerSetLoss(model, windows, unit="sublayer")
    found = greedy(loss.units, 2, loss, 0, 0, progress=False)

    def alone(removed):
        return perplexity(remove_sublayers(model, removed), windows).nll

    first = min(loss.units, key=lambda unit: alone((unit,)))
    second = min((unit for unit in loss.units if unit != first), key=lambda unit: alone(tuple(sorted((first, unit)))))
    assert [step.removed for step in found.steps] == [(first,), tuple(sorted((first, second)))]
    assert found.value == pytest.approx(alone(found.removed), abs=1e-5)


def test_evolution_refuses_settings_that_mean_nothing():
    fitness, calls = fitness_of(interacting(8, 0), 3)
    for settings in ({"offspring": 0}, {"initial": 0}, {"stages": ()}, {"stages": ((0, 1),)}, {"generations": -1}):
        with pytest.raises(ValueError, match="all from 1"):
            evolutionary(8, 2, fitness, 3, **settings)
    with pytest.raises(ValueError, match="cannot remove 8 of 8 layers"):
        evolutionary(8, 8, fitness, 3)
    assert calls == []


def test_values_are_checked():
    with pytest.raises(RuntimeError, match=r"without layers \[2\] gave NaN"):
        greedy(5, 1, lambda sets: [math.nan if removed == (2,) else 1.0 for removed in sets], progress=False)
    with pytest.raises(RuntimeError, match="the evaluation of 3 sets gave 1 values"):
        greedy(5, 1, lambda sets: [1.0], progress=False)
    assert greedy(5, 1, lambda sets: [math.inf if r != (3,) else 1.0 for r in sets], progress=False).removed == (3,)
    with pytest.raises(ValueError, match="201376 sets of 5 of 32 layers are more than 50000: give fewer layers"):
        exhaustive(32, 5, interacting(32, 0))
    with pytest.raises(ValueError, match="width must be at least 1"):
        beam(5, 1, lambda sets: [1.0], 0)
