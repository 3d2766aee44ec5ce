"""Golden values of SimDiff's terms, invariances, and the order that every criterion must give."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from model_helpers import silence

from prunelib.criteria import BLOCK_CRITERIA, CRITERIA, criterion
from prunelib.criteria.simdiff import difference_term, layer_difference, similarity_term
from prunelib.criteria.similarity import angular, block_cosine
from prunelib.criteria.statistics import LayerStats, collect, from_states
from prunelib.depth import lowest, lowest_block
from prunelib.models import remove_layers

MEASURED = ("block_influence", "simdiff_mssd", "simdiff_masd", "relative_magnitude")


@pytest.fixture
def golden() -> LayerStats:
    """One layer, two tokens: inputs [1, 0] and [0, 2], outputs [1, 1] and [0, 3]."""
    return from_states(torch.tensor([[[1.0, 0.0], [1.0, 1.0]], [[0.0, 2.0], [0.0, 3.0]]])[None])


@pytest.fixture
def stats() -> LayerStats:
    """Seven layers of a random walk whose steps grow unevenly."""
    steps = torch.tensor([1.0, 0.5, 0.1, 0.3, 0.2, 0.9, 0.15, 0.4])[:, None] * torch.randn(3, 20, 8, 16, dtype=torch.float64)
    return from_states(steps.cumsum(2))


def test_golden_values(golden):
    """Those of the example in chapter 01 among them."""
    assert CRITERIA["block_influence"](golden)[0] == pytest.approx(0.1464466, abs=5e-8)
    assert layer_difference(golden, "mssd", "sum")[0] == pytest.approx(1.0, rel=1e-14)
    assert layer_difference(golden, "mssd", "mean")[0] == pytest.approx(0.5, rel=1e-14)
    assert layer_difference(golden, "masd")[0] == pytest.approx(0.5, rel=1e-14)
    assert similarity_term(golden)[0] == pytest.approx(0.0732233, abs=5e-8)
    assert CRITERIA["simdiff_mssd"](golden)[0] == pytest.approx(0.3478413, abs=5e-8)
    assert CRITERIA["simdiff_masd"](golden, alpha=0.5)[0] == pytest.approx(0.3478413, abs=5e-8)
    assert CRITERIA["simdiff_mssd"](golden, reduce="sum")[0] == pytest.approx(0.4021409, abs=5e-8)
    assert CRITERIA["relative_magnitude"](golden)[0] == pytest.approx((1 / np.sqrt(2) + 1 / 3) / 2)
    assert angular(golden, 1, tokens="all")[0] == pytest.approx(0.125)
    assert angular(golden, 1)[0] == pytest.approx(0.0, abs=1e-12)  # the last token is only stretched


@pytest.mark.parametrize("name", ["simdiff_mssd", "simdiff_masd"])
def test_the_ends_of_alpha_and_linear_between(stats, name):
    similarity_only = CRITERIA[name](stats, alpha=0)
    np.testing.assert_allclose(similarity_only, CRITERIA["block_influence"](stats) / 2, rtol=1e-15)
    assert np.argsort(similarity_only).tolist() == np.argsort(CRITERIA["block_influence"](stats)).tolist()
    kind = name.removeprefix("simdiff_")
    np.testing.assert_array_equal(CRITERIA[name](stats, alpha=1), difference_term(stats, kind))
    for tokens in ("all", "without_first", "last"):
        expected = 0.8 * difference_term(stats, kind, tokens=tokens) + 0.2 * similarity_term(stats, tokens)
        np.testing.assert_allclose(CRITERIA[name](stats, alpha=0.8, tokens=tokens), expected, rtol=1e-14)


def test_scaling_all_states_by_c():
    states = torch.randn(2, 9, 6, 8, dtype=torch.float64).cumsum(2)
    plain, scaled = from_states(states), from_states(5 * states)
    for name in ("block_influence", "relative_magnitude"):
        np.testing.assert_allclose(CRITERIA[name](scaled), CRITERIA[name](plain), rtol=1e-12)
    np.testing.assert_allclose(layer_difference(scaled, "masd"), 5 * layer_difference(plain, "masd"), rtol=1e-12)
    np.testing.assert_allclose(layer_difference(scaled, "mssd"), 25 * layer_difference(plain, "mssd"), rtol=1e-12)
    np.testing.assert_allclose(angular(scaled, 3), angular(plain, 3), rtol=1e-12)


def test_the_sigmoid_neither_overflows_nor_loses_small_differences(stats):
    huge = replace(stats, squared_difference=stats.squared_difference * 1e300)
    assert difference_term(huge, "mssd").tolist() == [1.0] * 7
    tiny = replace(stats, squared_difference=np.full_like(stats.squared_difference, 1e-12) * stats.count[:, None] * 16)
    np.testing.assert_allclose(difference_term(tiny, "mssd") - 0.5, 2.5e-13, rtol=1e-3)
    moderate = np.linspace(0, 30, 7)
    spread = replace(stats, squared_difference=np.tile(moderate, (3, 1)) * stats.count[:, None] * 16)
    np.testing.assert_allclose(difference_term(spread, "mssd"), 1 / (1 + np.exp(-moderate)), rtol=1e-15)


def test_block_angle_of_every_block():
    """States that turn by 10, 20, 30 and 40 degrees in a plane."""
    degrees = torch.tensor([0.0, 10.0, 30.0, 60.0, 100.0], dtype=torch.float64)
    states = torch.stack([degrees.deg2rad().cos(), degrees.deg2rad().sin()], dim=1)[None, None]
    stats = from_states(states)
    np.testing.assert_allclose(angular(stats, 1) * 180, [10, 20, 30, 40])
    np.testing.assert_allclose(angular(stats, 2) * 180, [30, 50, 70])
    np.testing.assert_allclose(angular(stats, 4) * 180, [100])
    # The average of the angle is not the angle of the average.
    pairs = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])[:, None]
    assert angular(from_states(pairs), 1)[0] == pytest.approx(0.25)


def test_block_cosine_of_every_block(stats):
    np.testing.assert_allclose(block_cosine(stats, 1), similarity_term(stats), rtol=1e-14)
    for n in (2, 5, 7):
        cosines = [stats.cosine[0, start, start + n] / stats.count[0] for start in range(8 - n)]
        np.testing.assert_allclose(block_cosine(stats, n), (1 - np.array(cosines)) / 2, rtol=1e-14)


@pytest.mark.parametrize("name", ["angular", "block_cosine"])
def test_a_planted_block_is_found_and_its_removal_changes_nothing(tiny_llama, name):
    silence(tiny_llama, 2, 3)
    windows = torch.randint(3, 97, (3, 12))
    rule = BLOCK_CRITERIA[name]
    importance = rule(collect(tiny_llama, windows, progress=False), 2)
    removed = lowest_block(importance, 6, rule.protect_first, rule.protect_last)
    assert removed == (2, 3)
    assert importance[2] == pytest.approx(0, abs=1e-15)
    with torch.no_grad():
        assert torch.equal(remove_layers(tiny_llama, removed)(windows).logits, tiny_llama(windows).logits)


def test_controls(stats):
    """Random layers: seeded, nested, all alike. The deepest: contiguous, and the last one stays."""
    rule = CRITERIA["random"]
    first = rule(stats, seed=3)
    np.testing.assert_array_equal(first, rule(stats, seed=3))
    sets = [set(lowest(first, k)) for k in range(7)]
    assert all(smaller < larger for smaller, larger in pairwise(sets))
    rule = CRITERIA["deepest"]
    assert lowest(rule(stats), 3, rule.protect_first, rule.protect_last) == (3, 4, 5)


def test_registries(stats):
    assert set(CRITERIA) == {*MEASURED, "random", "deepest"}
    assert set(BLOCK_CRITERIA) == {"angular", "block_cosine"}
    # SimDiff and ShortGPT let any layer go.
    assert all((CRITERIA[name].protect_first, CRITERIA[name].protect_last) == (0, 0) for name in MEASURED)
    assert CRITERIA["simdiff_mssd"].options == {"alpha": 0.5, "reduce": "mean", "tokens": "all"}
    assert BLOCK_CRITERIA["angular"].options == {"tokens": "last"}
    try:

        @criterion(title="Deep first", source="test", protect_first=2)
        def own(stats, factor=1.0):
            return -factor * np.arange(stats.n_layers)

        assert lowest(CRITERIA["own"](stats, factor=2.0), 1) == (6,)
        with pytest.raises(ValueError, match="'own' exists already"):
            criterion(title="again", source="test")(own.importance)
    finally:
        CRITERIA.pop("own", None)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda stats: CRITERIA["cosine"], "unknown criterion 'cosine'; there are: block_influence, deepest, random"),
        (lambda stats: BLOCK_CRITERIA["angle"], "unknown criterion of blocks 'angle'; there are: angular, block_cosine"),
        (lambda stats: CRITERIA["simdiff_masd"](stats, reduce="sum"), "has no option reduce; its options are: alpha, tokens"),
        (lambda stats: CRITERIA["block_influence"](stats, tokens="first"), "unknown tokens 'first'; there are: all, without"),
        (lambda stats: CRITERIA["simdiff_mssd"](stats, reduce="max"), "unknown reduce 'max'; there are: mean, sum"),
        (lambda stats: difference_term(stats, "l2"), "unknown kind 'l2'; there are: mssd, masd"),
        (lambda stats: CRITERIA["simdiff_masd"](stats, alpha=1.5), "alpha must lie between 0 and 1"),
        (lambda stats: CRITERIA["simdiff_masd"](stats, alpha=float("nan")), "alpha must lie between 0 and 1"),
        (lambda stats: angular(stats, 0), "a block of 0 layers does not exist in 7 layers"),
        (lambda stats: block_cosine(stats, 8), "a block of 8 layers does not exist in 7 layers"),
    ],
)
def test_refusals(stats, call, message):
    with pytest.raises(ValueError, match=message):
        call(stats)


@pytest.mark.parametrize("name", MEASURED)
def test_empty_and_damaged_statistics(stats, name):
    with pytest.raises(ValueError, match="no tokens in subset 'without_first'"):
        CRITERIA[name](from_states(torch.randn(2, 1, 4, 8)), tokens="without_first")
    fields = ("cosine", "relative_magnitude", "squared_difference", "absolute_difference")
    damaged = {field: getattr(stats, field).copy() for field in fields}
    for values in damaged.values():
        values[:, 4] = np.nan
    damaged["cosine"] = stats.cosine.copy()
    damaged["cosine"][:, 4, 5] = np.nan
    with pytest.raises(RuntimeError, match=r"NaN or infinite at \[4\]"):
        CRITERIA[name](replace(stats, **damaged))
