"""The search by a surrogate: against brute force where the loss is what it fits, and against other searches on a model."""

import itertools
import math

import numpy as np
import pytest
from architectures import build
from model_helpers import random_windows

from prunelib.depth import LayerSetLoss, exhaustive, second_order
from prunelib.depth.surrogate import Quadratic


def quadratic(n_layers: int, seed: int):
    """A loss in which layers cost something each, and neighbors more together than apart."""
    rng = np.random.default_rng(seed)
    alone, together = rng.uniform(0.5, 1.5, n_layers), np.triu(rng.uniform(0, 0.5, (n_layers, n_layers)), 1)

    def one(removed):
        return 3 + sum(alone[i] for i in removed) + sum(together[i, j] / (j - i) for i, j in itertools.combinations(removed, 2))

    return lambda sets: [float(one(removed)) for removed in sets]


@pytest.mark.parametrize("seed", range(5))
def test_it_finds_the_optimum_of_a_quadratic_loss_at_every_size(seed):
    evaluate = quadratic(8, seed)
    found = second_order(8, 7, evaluate, progress=False)
    best = [exhaustive(8, size, evaluate, progress=False) for size in range(1, 8)]
    assert [step.removed for step in found.steps] == [one.removed for one in best]
    assert [step.value for step in found.steps] == [one.value for one in best]
    assert (found.removed, found.value) == (best[-1].removed, best[-1].value)


@pytest.mark.parametrize(("effort", "counts"), [(1, [17, 32, 46, 59]), (0.5, [17, 24, 31, 37]), (0.01, [17, 18, 19, 20])])
def test_it_evaluates_as_much_as_greedy_or_a_part_and_gives_the_same_again(effort, counts):
    asked = []
    evaluate = quadratic(16, 0)
    found = second_order(16, 4, lambda sets: [asked.extend(sets), evaluate(sets)][1], effort, progress=False)
    assert len(asked) == len(set(asked)) == found.evaluations == len(found.values)
    assert [step.evaluations for step in found.steps] == counts
    assert all(found.values[step.removed] == step.value for step in found.steps)
    assert found == second_order(16, 4, evaluate, effort, progress=False)
    assert found == second_order(list(range(16)), 4, evaluate, effort, progress=False)


@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_the_choice_does_not_depend_on_the_unit_of_the_loss(factor):
    evaluate = quadratic(12, 1)
    scaled = second_order(12, 5, lambda sets: [factor * value for value in evaluate(sets)], progress=False)
    assert [step.removed for step in scaled.steps] == [s.removed for s in second_order(12, 5, evaluate, progress=False).steps]


def test_a_fit_to_all_sets_predicts_the_loss():
    evaluate, sets = quadratic(7, 2), [s for size in range(8) for s in itertools.combinations(range(7), size)]
    losses = evaluate(sets)
    surrogate = Quadratic(range(7), dict(zip(sets, losses, strict=True)), 3)
    assert surrogate(sets) == pytest.approx([loss - losses[0] for loss in losses], abs=0.02)


@pytest.mark.parametrize(("ruined", "kept"), [(math.inf, 0), (1e6, 5)])
def test_a_layer_that_ruins_the_model_stays(ruined, kept):
    evaluate = quadratic(10, 3)
    found = second_order(10, 4, lambda sets: [ruined if kept in s else evaluate([s])[0] for s in sets], progress=False)
    best = exhaustive([u for u in range(10) if u != kept], 4, evaluate, progress=False)
    assert found.value <= best.value + 0.1 and kept not in found.removed


@pytest.mark.parametrize("unit", ["layer", "sublayer"])
def test_on_a_model_it_is_as_good_as_all_sets(unit):
    loss = LayerSetLoss(build("llama"), random_windows(), "kl", unit=unit)
    found = second_order(loss.units, 3, loss, 2, progress=False)
    assert found.value == pytest.approx(exhaustive(loss.units, 3, loss, progress=False).value, rel=1e-5)


def test_nothing_to_remove_and_everything():
    evaluate = quadratic(4, 0)
    assert second_order(4, 0, evaluate, progress=False).removed == ()
    assert second_order([0, 1, 2], 3, evaluate, progress=False).removed == (0, 1, 2)
    constant = second_order(5, 2, lambda sets: [1.0] * len(sets), progress=False)
    assert (constant.steps[0].removed, constant.value) == ((0,), 1.0)


@pytest.mark.parametrize(
    ("change", "match"),
    [({"effort": 0}, "above 0, got 0"), ({"effort": math.nan}, "got nan"), ({"layers_removed": 6}, "cannot remove 6 of 6")],
)
def test_settings_out_of_range(change, match):
    with pytest.raises(ValueError, match=match):
        second_order(**{"units": 6, "layers_removed": 2, "evaluate": quadratic(6, 0)} | change)


def test_nan_is_an_error():
    with pytest.raises(RuntimeError, match=r"\[1\]"):
        second_order(4, 2, lambda sets: [math.nan if 1 in removed else 0.0 for removed in sets], progress=False)
