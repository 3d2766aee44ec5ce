"""Slice schedules: the published allocation to the digit, exact means, clear refusals, and plans that survive a file."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import silence

from prunelib.criteria import statistics
from prunelib.criteria.similarity import block_influence
from prunelib.slicing import SlicePlan, constant, dynamic, final_slices, from_slices, layer_redundancy, redundancy
from prunelib.slicing.schedules import _largest_remainder

TOY = np.array([0.0, 7, 8, 9, 6]) / 9  # 1 - min-max of the importances 10, 3, 2, 1, 4


@pytest.fixture(scope="module")
def mistral() -> np.ndarray:
    """Layer redundancy of Mistral-7B, as released with the paper."""
    path = Path(__file__).parents[1] / "data" / "published" / "dynamic_slicing_mistral7b_lr.csv"
    with open(path, newline="", encoding="utf-8") as file:
        return np.array([float(row["lr"]) for row in csv.DictReader(file)])


def test_the_example_of_chapter_04():
    assert final_slices(np.array([0.0, 1.0]), 0.3, 0.1) == pytest.approx([0.1, 0.5])
    assert dynamic(np.array([0.0, 1.0]), 576, 0.3, 0.1).widths == (518, 288)


def test_published_widths(mistral):
    assert mistral.mean() == pytest.approx(0.795673948388219, abs=1e-15)
    slices = final_slices(mistral, 0.30, 0.10)
    assert (slices.min(), slices.max()) == pytest.approx((0.1, 0.3514), abs=5e-5)
    assert slices.mean() == pytest.approx(0.30, abs=1e-15)
    widths = tuple(np.round((1 - slices) * 4096))  # DynamicSlicing rounds each layer by itself
    # fmt: off
    assert widths == (
        3686, 3245, 3062, 2980, 3043, 3002, 2965, 2948, 2917, 2880, 2879, 2855, 2831, 2814, 2834, 2816, 2819, 2775, 2836, 2799,
        2740, 2699, 2675, 2675, 2659, 2657, 2658, 2669, 2698, 2725, 2731, 3179,
    )
    # fmt: on
    assert sum(widths) == 91751
    plan = dynamic(mistral, 4096, 0.30, 0.10, multiple=8)
    assert plan.widths[:3] == (3688, 3248, 3064)
    assert plan.widths[-3:] == (2728, 2728, 3176)
    assert sum(plan.widths) == 91752
    assert all(width % 8 == 0 for width in plan.widths)
    slices = final_slices(mistral, 0.40, 0)
    assert (slices.min(), slices.max()) == pytest.approx((0, 0.5027), abs=5e-5)
    widths = tuple(np.round((1 - slices) * 4096))
    assert (widths[:3], widths[-3:]) == ((4096, 3212, 2848), (2174, 2186, 3081))
    high = final_slices(mistral, 0.35, 0.15)
    assert (high.min(), high.max()) == pytest.approx((0.15, 0.4014), abs=5e-5)


def test_toy_importances():
    assert final_slices(TOY, 0.30, 0.10) == pytest.approx([0.10, 0.10 + 7 / 30, 0.10 + 8 / 30, 0.40, 0.30])


redundancies = st.lists(st.floats(0, 1), min_size=2, max_size=40).map(np.array)


@given(redundancies, st.floats(0, 0.8), st.floats(0, 1), st.sampled_from([1, 8]))
@settings(deadline=None, max_examples=200)
def test_the_mean_is_exact(redundancy, percentage, part, multiple):
    slices = final_slices(redundancy, percentage, part * percentage, cap=0.85)
    assert slices.mean() == pytest.approx(percentage, abs=1e-12)
    assert slices.max() <= 0.85 + 1e-12
    assert slices.min() >= part * percentage - 1e-12
    plan = dynamic(redundancy, 512, percentage, part * percentage, cap=0.85, multiple=multiple)
    units = len(redundancy) * 512 * (1 - percentage) / multiple
    assert abs(sum(plan.widths) / multiple - units) <= 0.5 + 1e-6
    assert max(abs(width - 512 * (1 - cut)) for width, cut in zip(plan.widths, slices, strict=True)) < multiple + 1e-6
    assert SlicePlan.from_json(plan.to_json()) == plan


def test_equal_bases_and_equal_redundancies_give_a_constant_schedule():
    flat = constant(5, 100, 0.3).widths
    assert flat == (70,) * 5
    assert dynamic(TOY, 100, 0.3, 0.3).widths == flat
    assert dynamic(np.full(5, 0.4), 100, 0.3, 0.1).widths == flat
    assert dynamic(np.zeros(5), 100, 0.3, 0.1).widths == flat  # mean redundancy 0
    assert dynamic(np.array([1.0]), 100, 0.3, 0.1).widths == (70,)


def test_what_exceeds_the_cap_is_shared_out():
    redundancy = np.array([0.0, 0.0, 0.0, 1.0])
    assert final_slices(redundancy, 0.5, 0.1, cap=0.999) == pytest.approx([(2 - 0.999) / 3] * 3 + [0.999])  # FS was 1.7
    capped = final_slices(redundancy, 0.5, 0.1, cap=0.8)
    assert capped == pytest.approx([0.4, 0.4, 0.4, 0.8])
    twice = final_slices(np.array([0.0, 0.2, 0.8, 1.0]), 0.6, 0.0, cap=0.7)  # lifting the others caps the third as well
    assert twice.mean() == pytest.approx(0.6)
    assert twice[2:] == pytest.approx([0.7, 0.7])
    assert twice[1] - twice[0] == pytest.approx(0.24)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dynamic(TOY, 100, 0.3, 0.4), r"slice_base=0\.4: it lies between 0 and slice_percentage=0\.3"),
        (lambda: dynamic(TOY, 100, 30, 10), r"slice_percentage=30: a fraction"),
        (lambda: dynamic(np.array([10.0, 3, 2, 1, 4]), 100, 0.3, 0.1), "raw importances are not redundancies"),
        (lambda: dynamic(np.array([0.1, np.nan]), 100, 0.3, 0.1), "lie between 0 and 1"),
        (lambda: dynamic(TOY, 100, 0.3, 0.1, cap=0.2), r"cap=0\.2: it must be below 1 and at least slice_percentage=0\.3"),
        (lambda: dynamic(TOY, 100, 0.3, 0.1, multiple=8), "a width of 100 cannot be cut in steps of 8"),
        (lambda: from_slices(np.array([0.2, 1.0]), 100), "fractions of the width, at least 0 and below 1"),
        (lambda: from_slices(np.array([]), 100), "at least 0"),
        (lambda: from_slices(np.array([0.99, 0.99]), 16, multiple=8), r"layers \[0, 1\] would keep no width"),
        (lambda: SlicePlan(32, (), "test"), "at least one layer"),
        (lambda: SlicePlan(32, (33,), "test"), r"between 1 and 32.*\(0, 33\)"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_layer_redundancy(tiny_llama):
    tokens = torch.randint(0, 97, (4, 24))
    silence(tiny_llama, 3)
    stats = statistics.collect(tiny_llama, tokens, progress=False)
    found, influence = layer_redundancy(stats), block_influence(stats)
    assert (found[3], found[influence.argmax()]) == (1, 0)
    assert found == pytest.approx(1 - (influence - influence.min()) / np.ptp(influence))
    widths = dynamic(found, 32, 0.3, 0.1).widths
    assert widths[3] == min(widths)


def test_normalizations_that_one_layer_does_not_rule(tiny_llama, monkeypatch):
    stats = statistics.collect(tiny_llama, torch.randint(0, 97, (2, 16)), progress=False)
    influence = np.array([0.95, 0.12, 0.10, 0.08, 0.08, 0.14])
    monkeypatch.setattr(redundancy, "block_influence", lambda stats: influence)
    monkeypatch.setattr(redundancy, "QUANTILE", 0.2)
    assert layer_redundancy(stats)[1:].min() > 0.9  # layer 0 takes nearly the whole range
    assert layer_redundancy(stats, normalize="rank") == pytest.approx([0, 4 / 9, 6 / 9, 1, 1, 2 / 9])
    assert layer_redundancy(stats, normalize="clipped") == pytest.approx([0, 1 / 3, 2 / 3, 1, 1, 0])
    assert influence[0] == 0.95  # not changed in place
    monkeypatch.setattr(redundancy, "block_influence", lambda stats: np.full(6, 0.3))
    assert all((layer_redundancy(stats, normalize=name) == 1).all() for name in redundancy.NORMALIZATIONS)
    with pytest.raises(ValueError, match="unknown normalize 'softmax'; there are: minmax, rank, clipped"):
        layer_redundancy(stats, normalize="softmax")


def test_released_score_of_the_last_layer(tiny_llama):
    tokens = torch.randint(0, 97, (5, 24))
    with torch.no_grad():
        tiny_llama.model.norm.weight.mul_(torch.rand(32) * 3)
        states = tiny_llama(tokens, output_hidden_states=True).hidden_states
    expected = 1 - float(torch.cosine_similarity(states[-2].double(), states[-1].double(), dim=-1).mean())
    last = statistics.influence_through_final_norm(tiny_llama, tokens, batch_size=2)
    assert last == pytest.approx(expected, rel=1e-6)
    stats = statistics.collect(tiny_llama, tokens, progress=False)
    own, released = layer_redundancy(stats), layer_redundancy(stats, last=last)
    assert last > 1.5 * block_influence(stats)[-1]
    assert released[-1] < own[-1]
    with torch.no_grad():
        tiny_llama.model.layers[-1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="NaN or infinity around the last layer"):
        statistics.influence_through_final_norm(tiny_llama, tokens)


def test_the_total_does_not_hang_on_the_last_digits_of_the_scores():
    """Bisection halves slices and so meets sums of n + 1/2 units, and other processors sum scores a little otherwise."""
    slices = np.array([0.1, 0.2, 0.3, 0.25])
    wanted = {}
    for moved in np.random.default_rng(0).normal(scale=1e-9, size=(50, 4)):
        units = (1 - slices) * 90 + moved  # 283.5 in all
        wanted.setdefault(tuple(_largest_remainder(units)), units.sum())
    assert len(wanted) == 1
