"""Bootstrap and McNemar's test against theory and golden values."""

import math

import numpy as np
import pytest

from prunelib.evaluation.intervals import McNemar, mcnemar, paired_bootstrap


def test_the_interval_has_the_width_of_theory():
    a, b = np.random.default_rng(1).normal(50, 10, size=(2, 400))
    found = paired_bootstrap(a, b, 0, 2000, sizes=[20] * 400)
    error = (a - b).std(ddof=1) / math.sqrt(400) / 20
    assert found.value == pytest.approx((a.mean() - b.mean()) / 20)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    same, other = (paired_bootstrap(a, b, seed, 2000, sizes=[20] * 400) for seed in (0, 1))
    assert same == found != other


def test_windows_weigh_by_their_tokens():
    found = paired_bootstrap([30.0, 1.0], [0.0, 0.0], sizes=[10, 1])
    assert (found.value, found.low, found.high) == pytest.approx((31 / 11, 1.0, 3.0))


def test_right_or_wrong_answers_have_the_binomial_interval():
    # Ten of a hundred differ, all in favor of a: the bootstrap means are Binomial(100, 0.1) / 100.
    found = paired_bootstrap([1] * 60 + [0] * 40, [1] * 50 + [0] * 50, n=10_000)
    assert (found.value, found.low, found.high) == pytest.approx((0.1, 0.05, 0.16), abs=0.0101)


def test_items_of_one_document_are_drawn_together():
    """Two questions on each document, always answered alike: half as many groups, an interval wider by sqrt(2)."""
    twice = np.repeat(np.random.default_rng(1).random(300) < 0.4, 2).astype(float)
    grouped = paired_bootstrap(twice, 0 * twice, groups=[str(i // 2) for i in range(600)], n=10_000)
    naive = paired_bootstrap(twice, 0 * twice, n=10_000)
    assert (grouped.n, naive.n) == (300, 600)
    assert (grouped.high - grouped.low) / (naive.high - naive.low) == pytest.approx(2**0.5, rel=0.06)


def test_mcnemar_golden_values():
    def pair(both: int, only_a: int, only_b: int, neither: int) -> McNemar:
        a = [1] * (both + only_a) + [0] * (only_b + neither)
        b = [1] * both + [0] * only_a + [1] * only_b + [0] * neither
        return mcnemar(a, b)

    # Exact: 2 * sum of C(10, k) / 2^10 for k = 0, 1, 2 is 112 / 1024.
    small = pair(5, 8, 2, 4)
    assert (small.only_a, small.only_b, small.p) == (8, 2, pytest.approx(112 / 1024))
    assert pair(3, 4, 4, 0).p == pair(7, 0, 0, 2).p == 1.0
    # Chi-square with continuity correction: (|700 - 500| - 1)^2 / 1200 = 33.0008.
    assert pair(10, 700, 500, 10).p == pair(10, 500, 700, 10).p == pytest.approx(9.214e-9, rel=1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paired_bootstrap([1.0, 2.0, 3.0], [1.0, 2.0]), r"shape \(3,\) and \(2,\)"),
        (lambda: paired_bootstrap([1.0, 1.0], [1.0, 1.0], sizes=[1, 1, 1]), "2 values, 3 sizes"),
        (lambda: paired_bootstrap([1.0, 2.0], [0.0, 0.0], groups=["a", "a"]), "1 independent items"),
        (lambda: mcnemar([0.5, 0.0], [1.0, 0.0]), "paired_bootstrap"),
    ],
)
def test_what_cannot_be_paired_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
