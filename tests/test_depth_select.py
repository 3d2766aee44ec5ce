"""Choosing layers and alpha: the exact path against brute force, and against the paper's ternary search."""

import itertools
import math

import numpy as np
import pytest

from prunelib.criteria import ABLATIONS
from prunelib.depth import AlphaInterval, alpha_path, exact_alpha, lowest, lowest_block, ternary_alpha


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
    # Among equals the shallower goes.
    assert lowest(np.array([1.0, 0.0, 0.0, 0.0]), 2) == (1, 2)
    assert lowest(np.zeros(6), 3, protect_first=2) == (2, 3, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lowest(np.arange(6.0), 6), "cannot remove 6 of 6 layers: at least one must stay"),
        (lambda: alpha_path(np.arange(6.0), np.arange(6.0), 6), "cannot remove 6 of 6 layers"),
        (lambda: lowest(np.arange(6.0), 4, 2, 1), "with the first 2 and the last 1 protected: only 3 may go"),
        (lambda: lowest(np.arange(6.0), -1), "layers_removed=-1, .*: none of them can be negative"),
        (lambda: lowest(np.arange(6.0), 1, protect_last=-1), "protect_last=-1: none"),
        (lambda: lowest(np.array([0.0, 1.0, np.nan]), 1), r"importance of layers \[2\] is NaN"),
        (lambda: alpha_path(np.array([0.1, np.nan]), np.zeros(2), 1), "must be finite"),
        (lambda: lowest_block(np.zeros(1), 6), "cannot remove 6 of 6 layers"),
        (lambda: lowest_block(np.zeros(3), 6, 2, 1), "cannot remove 4 of 6 layers with the first 2 and the last 1 protected"),
        (lambda: lowest_block(np.zeros(7), 6), "7 blocks do not exist in 6 layers"),
        (lambda: lowest_block(np.array([0.0, 0.0, np.nan, 0.0]), 6, 1), r"importance of blocks \[2\] is NaN"),
    ],
)
def test_what_cannot_be_removed(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_lowest_block():
    importance = np.array([0.5, 0.2, 0.4, 0.1])  # blocks of 3 of 6 layers, from 0, 1, 2, 3
    assert lowest_block(importance, 6) == (3, 4, 5)
    assert lowest_block(importance, 6, protect_last=1) == (1, 2, 3)
    assert lowest_block(importance, 6, protect_first=2, protect_last=1) == (2, 3, 4)
    assert lowest_block(np.zeros(4), 6) == (0, 1, 2)
    # What no block of the choice touches may be NaN.
    assert lowest_block(np.array([np.nan, 1.0, 0.5, 2.0]), 6, protect_first=1) == (2, 3, 4)
    for seed in range(20):
        importance = np.random.default_rng(seed).random(9)
        assert lowest_block(importance, 9, 1, 2) == lowest(importance, 1, 1, 2)


# Llama-2-7B, least important first, as printed by the authors or their repositories.
SHORTGPT_PAPER = (27, 26, 25, 28, 24, 29, 23, 21, 22)
SHORTGPT_CODE = (25, 27, 24, 26, 28, 29, 23, 22, 21)
SHORTENED_PPL = (11, 8, 24, 21, 12, 7, 9, 10, 18, 27, 14, 23, 25, 15, 20, 26, 17, 6, 13, 28)
SHORTENED_TAYLOR = (0, 28, 27, 25, 29, 26, 24, 23, 21, 22, 30, 20, 19, 18)


def printed_order(order: tuple[int, ...]) -> np.ndarray:
    """Importance that gives back an order; layers that were not printed come after it."""
    importance = np.full(32, 32.0)
    importance[list(order)] = np.arange(len(order))
    return importance


def test_printed_orders_give_the_published_sets():
    assert lowest(printed_order(SHORTGPT_PAPER), 9) == lowest(printed_order(SHORTGPT_CODE), 9) == tuple(range(21, 30))
    ppl, taylor = ((rule.protect_first, rule.protect_last) for rule in map(ABLATIONS.get, ("leave_one_out_nll", "taylor")))
    assert lowest(printed_order(SHORTENED_PPL), 6, *ppl) == (7, 8, 11, 12, 21, 24)
    assert lowest(printed_order(SHORTENED_TAYLOR), 6, *taylor) == tuple(range(24, 30))
    # ShortGPT's seven are those of Taylor+, without whose rule the first layer would go first.
    assert lowest(printed_order(SHORTENED_TAYLOR), 7, *taylor) == lowest(printed_order(SHORTGPT_PAPER), 7)
    assert 0 in lowest(printed_order(SHORTENED_TAYLOR), 1)


@pytest.mark.parametrize("seed", range(0, 25, 4))
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
    for interval in alpha_path(similarity, difference, 1, 1, 1):
        assert lowest(mixed(similarity, difference, interval.midpoint), 1, 1, 1) == interval.removed


@pytest.mark.parametrize(
    ("similarity", "difference", "layers_removed", "expected"),
    [
        # Layer 0 from 0 to 0.4, layer 1 from 0.3 to 0.1 (equal at 0.5), layer 2 always above.
        ([0.0, 0.3, 0.5], [0.4, 0.1, 0.9], 1, [(0,), (1,)]),
        ([0.5, 0.25, 0.375, 0.125], [0.75, 0.5, 0.625, 0.375], 2, [(1, 3)]),  # parallel lines never cross
        ([0.25, 0.25], [0.75, 0.5], 1, [(1,)]),  # equal at alpha = 0, then apart
        ([0.25, 0.5], [0.75, 0.75], 1, [(0,)]),  # the other way round
        # The sigmoid of a sum over many dimensions is exactly 1 for several layers: they tie only at alpha = 1.
        ([0.1, 0.05, 0.2, 0.01], [1.0, 1.0, 0.6, 1.0], 2, [(1, 3), (2, 3)]),
    ],
)
def test_known_paths(similarity, difference, layers_removed, expected):
    path = alpha_path(np.array(similarity), np.array(difference), layers_removed)
    assert_partition(path)
    assert [interval.removed for interval in path] == expected
    assert alpha_path(np.array(similarity), np.array(difference), 0) == [AlphaInterval(0.0, 1.0, ())]


@pytest.mark.parametrize("alpha", [0.5, 1 / 3, 0.1])
def test_all_lines_through_one_point(alpha):
    """All pairs cross at one alpha, up to rounding: the order turns over at once, with no sliver between."""
    slopes = np.arange(8.0)
    similarity = 1 - alpha * slopes
    path = alpha_path(similarity, similarity + slopes, 3)
    assert_partition(path)
    assert [interval.removed for interval in path] == [(5, 6, 7), (0, 1, 2)]
    assert path[0].high == pytest.approx(alpha)


def table(seed: int):
    """An arbitrary but fixed value for every set, as a perplexity is."""
    return lambda sets: [float(np.random.default_rng([seed, *removed]).random()) for removed in sets]


@pytest.mark.parametrize("seed", range(20))
def test_exact_is_never_worse_than_ternary(seed):
    similarity, difference = random_terms(seed, 14)
    layers_removed = 1 + seed % 12
    evaluate = table(seed)
    exact = exact_alpha(alpha_path(similarity, difference, layers_removed), evaluate)
    ternary = ternary_alpha(lambda alpha: lowest(mixed(similarity, difference, alpha), layers_removed), evaluate)
    assert exact.value <= ternary.value
    grid = {lowest(mixed(similarity, difference, alpha), layers_removed) for alpha in np.linspace(0, 1, 501)}
    assert exact.value <= min(evaluate(grid))


def recorded(evaluate):
    calls = []
    return lambda sets: calls.extend(sets) or evaluate(sets), calls


def test_exact_evaluates_each_set_once():
    path = alpha_path(*random_terms(3, 14), 5)
    evaluate, calls = recorded(table(3))
    choice = exact_alpha(path, evaluate)
    assert calls == [interval.removed for interval in path]
    assert choice.evaluations == len(path) > 2
    best = min(path, key=lambda interval: table(3)([interval.removed])[0])
    assert (choice.alpha, choice.removed, choice.value) == (best.midpoint, best.removed, table(3)([best.removed])[0])
    # Of equal values that at the lower alpha.
    assert exact_alpha(path, lambda sets: [2.0] + [1.0] * (len(sets) - 1)).alpha == path[1].midpoint


def test_ternary_follows_algorithm_1():
    """First probes at 1/3 and 2/3; the lower one is worse, so the left end moves up to it; then the other way."""
    alphas, values = [], {(3,): 5.0, (6,): 1.0, (5,): 0.5, (7,): 2.0, (4,): 3.0}
    evaluate, calls = recorded(lambda sets: [values[removed] for removed in sets])
    choice = ternary_alpha(lambda alpha: alphas.append(alpha) or (round(alpha * 9),), evaluate)
    assert alphas[:6] == pytest.approx([1 / 3, 2 / 3, 5 / 9, 7 / 9, 13 / 27, 17 / 27])
    assert calls == list(values)
    assert (choice.alpha, choice.value, choice.evaluations) == (pytest.approx(5 / 9), 0.5, 5)


def test_ternary_on_a_plateau_moves_the_right_end_down():
    alphas = []
    choice = ternary_alpha(lambda alpha: alphas.append(alpha) or (0,), lambda sets: [1.0])
    assert choice.alpha == pytest.approx(1 / 3)  # the first probe: later ones are no strict improvement
    assert choice.evaluations == 1
    assert alphas[-2] < 1e-3
    assert 1e-3 < (alphas[-1] - alphas[-2]) * 3 < 1.6e-3


def test_infinite_values_are_results_and_nan_is_not():
    path = [AlphaInterval(0.0, 0.5, (0, 2)), AlphaInterval(0.5, 1.0, (1, 2))]
    assert exact_alpha(path, lambda sets: [math.inf, 3.0]).removed == (1, 2)
    assert exact_alpha(path, lambda sets: [math.inf, math.inf]).removed == (0, 2)
    with pytest.raises(RuntimeError, match=r"without layers \[0, 2\] gave NaN"):
        exact_alpha(path, lambda sets: [math.nan, 1.0])
    with pytest.raises(RuntimeError, match="gave NaN"):
        ternary_alpha(lambda alpha: (1,), lambda sets: [math.nan])
    with pytest.raises(RuntimeError, match="the evaluation of 2 sets gave 1 values"):
        exact_alpha(path, lambda sets: [1.0])
