"""Choosing layers and alpha: the exact path against brute force, and against the paper's ternary search."""

import inspect
import itertools
import math

import numpy as np
import pytest

from prunelib.depth import AlphaInterval, alpha_path, exact_alpha, lowest, ternary_alpha


def mixed(similarity: np.ndarray, difference: np.ndarray, alpha: float) -> np.ndarray:
    return alpha * difference + (1 - alpha) * similarity


def random_terms(seed: int, layers: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.random(layers) / 2, 0.5 + rng.random(layers) / 2


def assert_partition(path: list[AlphaInterval]) -> None:
    """Touching intervals of positive width from 0 to 1, and no set twice."""
    assert path[0].low == 0
    assert path[-1].high == 1
    assert all(interval.low < interval.high for interval in path)
    assert all(left.high == right.low for left, right in itertools.pairwise(path))
    assert len({interval.removed for interval in path}) == len(path)


def test_lowest():
    importance = np.array([0.3, 0.1, 0.9, 0.2, 0.5])
    assert [lowest(importance, k) for k in range(5)] == [(), (1,), (1, 3), (0, 1, 3), (0, 1, 3, 4)]
    assert lowest(importance, 2, protect_first=2) == (3, 4)
    assert lowest(importance, 2, protect_last=2) == (0, 1)
    assert lowest(importance, 2, protect_first=1, protect_last=2) == (1, 2)
    assert all(type(index) is int for index in lowest(importance, 3))


def test_among_equals_the_shallower_goes():
    assert lowest(np.array([1.0, 0.0, 0.0, 0.0]), 2) == (1, 2)
    assert lowest(np.zeros(6), 3, protect_first=2) == (2, 3, 4)


def test_too_many_layers():
    importance = np.arange(6.0)
    with pytest.raises(ValueError, match="cannot remove 6 of 6 layers: at least one must stay"):
        lowest(importance, 6)
    with pytest.raises(
        ValueError, match="cannot remove 4 of 6 layers with the first 2 and the last 1 protected: only 3 may go"
    ):
        lowest(importance, 4, protect_first=2, protect_last=1)
    with pytest.raises(ValueError, match="layers_removed must not be negative, got -1"):
        lowest(importance, -1)
    with pytest.raises(ValueError, match="protect_last must not be negative"):
        lowest(importance, 1, protect_last=-1)
    with pytest.raises(ValueError, match=r"importance of layers \[2\] is NaN"):
        lowest(np.array([0.0, 1.0, np.nan]), 1)
    with pytest.raises(ValueError, match="cannot remove 6 of 6 layers"):
        alpha_path(importance, importance, 6)


@pytest.mark.parametrize("seed", range(25))
def test_path_agrees_with_a_fine_grid(seed):
    layers = 3 + seed
    similarity, difference = random_terms(seed, layers)
    grid = np.linspace(0, 1, 1001)
    for layers_removed in sorted({1, layers // 3, layers // 2, layers - 1}):
        path = alpha_path(similarity, difference, layers_removed)
        assert_partition(path)
        seen = set()
        for alpha in grid:
            here = {interval.removed for interval in path if interval.low <= alpha <= interval.high}
            removed = lowest(mixed(similarity, difference, alpha), layers_removed)
            assert removed in here
            seen.add(removed)
        # Every interval that a grid point falls into is found on the grid, so none of them is invented.
        wide = {interval.removed for interval in path if interval.high - interval.low > 2e-3}
        assert wide <= seen


def test_midpoints_give_the_set():
    for seed in range(100):
        similarity, difference = random_terms(seed, 12)
        for interval in alpha_path(similarity, difference, 5):
            assert lowest(mixed(similarity, difference, interval.midpoint), 5) == interval.removed


def test_path_respects_protection():
    similarity, difference = random_terms(1, 16)
    path = alpha_path(similarity, difference, 6, protect_first=2, protect_last=3)
    assert_partition(path)
    for interval in path:
        assert set(interval.removed) <= set(range(2, 13))
        assert lowest(mixed(similarity, difference, interval.midpoint), 6, 2, 3) == interval.removed


def test_a_worked_example():
    """Layer 0 from 0 to 0.4, layer 1 from 0.3 to 0.1 (equal at 0.5), layer 2 always above."""
    path = alpha_path(np.array([0.0, 0.3, 0.5]), np.array([0.4, 0.1, 0.9]), 1)
    assert [interval.removed for interval in path] == [(0,), (1,)]
    assert path[0].high == pytest.approx(0.5)
    assert path[1].midpoint == pytest.approx(0.75)


def test_nothing_to_remove():
    assert alpha_path(np.array([0.1, 0.2]), np.array([0.6, 0.5]), 0) == [AlphaInterval(0.0, 1.0, ())]


@pytest.mark.parametrize("layers_removed", [1, 2, 3])
def test_identical_lines_tie_like_lowest(layers_removed):
    constant = np.full(4, 0.25)
    assert alpha_path(constant, constant, layers_removed) == [AlphaInterval(0.0, 1.0, lowest(constant, layers_removed))]
    similarity, difference = np.array([0.3, 0.1, 0.1, 0.1]), np.array([0.5, 0.7, 0.7, 0.7])
    path = alpha_path(similarity, difference, layers_removed)
    assert_partition(path)
    for interval in path:
        assert lowest(mixed(similarity, difference, interval.midpoint), layers_removed) == interval.removed


def test_parallel_lines_never_cross():
    similarity = np.array([0.5, 0.25, 0.375, 0.125])
    assert alpha_path(similarity, similarity + 0.25, 2) == [AlphaInterval(0.0, 1.0, (1, 3))]


@pytest.mark.parametrize("alpha", [0.5, 1 / 3, 0.1])
def test_all_lines_through_one_point(alpha):
    """All pairs cross at one alpha, up to rounding: the order turns over at once, with no sliver between."""
    slopes = np.arange(8.0)
    similarity = 1 - alpha * slopes
    path = alpha_path(similarity, similarity + slopes, 3)
    assert_partition(path)
    assert [interval.removed for interval in path] == [(5, 6, 7), (0, 1, 2)]
    assert path[0].high == pytest.approx(alpha)


def test_crossings_at_the_ends_add_no_interval():
    """Equal at alpha = 0, then apart; and the other way round."""
    assert alpha_path(np.array([0.25, 0.25]), np.array([0.75, 0.5]), 1) == [AlphaInterval(0.0, 1.0, (1,))]
    assert alpha_path(np.array([0.25, 0.5]), np.array([0.75, 0.75]), 1) == [AlphaInterval(0.0, 1.0, (0,))]


def test_saturated_differences():
    """The sigmoid of a sum over many dimensions is exactly 1 for several layers: they tie only at alpha = 1."""
    similarity, difference = np.array([0.1, 0.05, 0.2, 0.01]), np.array([1.0, 1.0, 0.6, 1.0])
    path = alpha_path(similarity, difference, 2)
    assert_partition(path)
    assert [interval.removed for interval in path] == [(1, 3), (2, 3)]


def test_bad_terms():
    with pytest.raises(ValueError, match="3 similarity terms but 4 difference terms"):
        inspect.unwrap(alpha_path)(np.zeros(3), np.zeros(4), 1)  # the type checker of the tests would speak first
    with pytest.raises(ValueError, match="must be finite"):
        alpha_path(np.array([0.1, np.nan]), np.array([0.1, 0.2]), 1)


def test_few_sets_even_for_many_layers():
    similarity, difference = random_terms(0, 80)
    path = alpha_path(similarity, difference, 30)
    assert_partition(path)
    assert len(path) < 200


def table(seed: int):
    """An arbitrary but fixed value for every set, as a perplexity is."""

    def evaluate(removed: tuple[int, ...]) -> float:
        return float(np.random.default_rng([seed, *removed]).random())

    return evaluate


@pytest.mark.parametrize("seed", range(60))
def test_exact_is_never_worse_than_ternary(seed):
    similarity, difference = random_terms(seed, 14)
    layers_removed = 1 + seed % 12
    evaluate = table(seed)
    exact = exact_alpha(alpha_path(similarity, difference, layers_removed), evaluate)
    ternary = ternary_alpha(lambda alpha: lowest(mixed(similarity, difference, alpha), layers_removed), evaluate)
    assert exact.value <= ternary.value
    grid = {lowest(mixed(similarity, difference, alpha), layers_removed) for alpha in np.linspace(0, 1, 501)}
    assert exact.value <= min(evaluate(removed) for removed in grid)


def test_exact_is_sometimes_better_than_ternary():
    """Perplexity is a step function of alpha, not a unimodal one: that is why the exact path exists."""
    better = 0
    for seed in range(40):
        similarity, difference = random_terms(seed, 14)
        exact = exact_alpha(alpha_path(similarity, difference, 5), table(seed))
        ternary = ternary_alpha(lambda alpha, s=similarity, d=difference: lowest(mixed(s, d, alpha), 5), table(seed))
        better += exact.value < ternary.value
    assert better > 5


def counted(evaluate):
    calls = []

    def call(removed):
        calls.append(removed)
        return evaluate(removed)

    return call, calls


def test_exact_evaluates_each_set_once():
    similarity, difference = random_terms(3, 14)
    path = alpha_path(similarity, difference, 5)
    evaluate, calls = counted(table(3))
    choice = exact_alpha(path, evaluate)
    assert calls == [interval.removed for interval in path]
    assert choice.evaluations == len(path) > 2
    assert [(probe.alpha, probe.removed) for probe in choice.trace] == [(i.midpoint, i.removed) for i in path]
    best = min(path, key=lambda interval: table(3)(interval.removed))
    assert (choice.alpha, choice.removed, choice.value) == (best.midpoint, best.removed, table(3)(best.removed))


def test_equal_values_choose_the_lower_alpha():
    path = [AlphaInterval(0.0, 0.25, (0,)), AlphaInterval(0.25, 0.75, (1,)), AlphaInterval(0.75, 1.0, (2,))]
    assert exact_alpha(path, {(0,): 2.0, (1,): 1.0, (2,): 1.0}.get).alpha == 0.5


@pytest.mark.parametrize("target", [0.0, 0.123, 1 / 3, 0.5, 0.77, 1.0])
def test_ternary_finds_the_minimum_of_a_unimodal_function(target):
    """A set for every alpha, so that the value can be any function of alpha."""
    choice = ternary_alpha(lambda alpha: (round(alpha * 10**9),), lambda removed: (removed[0] / 10**9 - target) ** 2)
    assert choice.alpha == pytest.approx(target, abs=1e-3)
    assert 0 < choice.alpha < 1


def test_ternary_follows_algorithm_1():
    """First probes at 1/3 and 2/3; the lower one is worse, so the left end moves up to it; then the other way."""
    choice = ternary_alpha(lambda alpha: (round(alpha * 9),), {(3,): 5.0, (6,): 1.0, (5,): 0.5, (7,): 2.0}.get, max_steps=2)
    assert [probe.alpha for probe in choice.trace] == pytest.approx([1 / 3, 2 / 3, 5 / 9, 7 / 9])
    assert [probe.value for probe in choice.trace] == [5.0, 1.0, 0.5, 2.0]
    assert (choice.alpha, choice.value, choice.evaluations) == (pytest.approx(5 / 9), 0.5, 4)


def test_ternary_on_a_plateau_moves_the_right_end_down():
    choice = ternary_alpha(lambda alpha: (0,), lambda removed: 1.0)
    assert choice.alpha == pytest.approx(1 / 3)  # the first probe: later ones are no strict improvement
    assert choice.evaluations == 1
    assert choice.trace[-2].alpha < 1e-3
    width = (choice.trace[-1].alpha - choice.trace[-2].alpha) * 3
    assert 1e-3 < width < 1.6e-3


def test_ternary_stops_at_the_cap():
    assert len(ternary_alpha(lambda alpha: (0,), lambda removed: 1.0, eps=1e-12, max_steps=4).trace) == 8
    assert len(ternary_alpha(lambda alpha: (0,), lambda removed: 1.0, eps=0.5).trace) == 4


def test_ternary_evaluates_each_set_once():
    evaluate, calls = counted(table(0))
    choice = ternary_alpha(lambda alpha: (int(alpha * 5),), evaluate)
    assert len(calls) == len(set(calls)) == choice.evaluations
    assert choice.evaluations < len(choice.trace)


def test_infinite_values_are_results_and_nan_is_not():
    path = [AlphaInterval(0.0, 0.5, (0, 2)), AlphaInterval(0.5, 1.0, (1, 2))]
    assert exact_alpha(path, {(0, 2): math.inf, (1, 2): 3.0}.get).removed == (1, 2)
    assert exact_alpha(path, lambda removed: math.inf).removed == (0, 2)
    with pytest.raises(RuntimeError, match=r"without layers \[0, 2\] gave NaN"):
        exact_alpha(path, lambda removed: math.nan)
    with pytest.raises(RuntimeError, match="gave NaN"):
        ternary_alpha(lambda alpha: (1,), lambda removed: math.nan)


def test_bad_settings():
    with pytest.raises(ValueError, match="alpha path is empty"):
        exact_alpha([], lambda removed: 0.0)
    with pytest.raises(ValueError, match="eps must lie between 0 and 1, got 0"):
        ternary_alpha(lambda alpha: (0,), lambda removed: 0.0, eps=0.0)
    with pytest.raises(ValueError, match="max_steps must be at least 1, got 0"):
        ternary_alpha(lambda alpha: (0,), lambda removed: 0.0, max_steps=0)
