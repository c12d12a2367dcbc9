"""association.py against SciPy, closed forms and simulated cohorts of known truth."""

import itertools
import math
import time

import numpy as np
import pytest
from scipy import stats

import association
import simulate_cohorts


@pytest.mark.parametrize("n,levels", [(30, 6), (200, 6), (200, 100000), (500, 3)])
def test_spearman_is_scipys(n, levels):
    rng = np.random.default_rng((n, levels))
    x = rng.integers(0, levels, (4, n)).astype(float)
    y = 0.4 * x + rng.integers(0, levels, (4, n))
    found = association.spearman(x, y)
    for i in range(4):
        expected = stats.spearmanr(x[i], y[i])
        assert abs(found[i] - expected.statistic) < 1e-12
        assert abs(association.p_value(found[i], n) - expected.pvalue) < 1e-12
        assert np.array_equal(association.ranks(x)[i], stats.rankdata(x[i]))


def test_false_discovery_is_scipys_also_in_rows_and_around_what_is_missing():
    p = np.random.default_rng(0).random((5, 4, 12)) ** 3
    p[0, 0, :3] = p[0, 0, 3]  # ties
    q = association.benjamini_hochberg(p)
    assert np.abs(q - stats.false_discovery_control(p, axis=-1)).max() < 1e-12
    with_missing = np.insert(p, 5, np.nan, axis=-1)  # no member of the family
    again = association.benjamini_hochberg(with_missing)
    assert np.isnan(again[..., 5]).all() and np.array_equal(np.delete(again, 5, -1), q)
    assert np.isnan(association.benjamini_hochberg(np.full(3, np.nan))).all()


def test_interval_is_bonetts_and_wrights():
    """By hand: rho 0.5 of 103 donors: atanh 0.5 ± 1.959964 sqrt(1.125 / 100)."""
    low, high = association.interval(0.5, 103)
    assert low == pytest.approx(
        math.tanh(math.atanh(0.5) - 1.959963984540054 * math.sqrt(0.01125)), abs=1e-12
    )
    assert high == pytest.approx(
        math.tanh(math.atanh(0.5) + 1.959963984540054 * math.sqrt(0.01125)), abs=1e-12
    )
    assert np.array(association.interval(0.5, 105, 2)) == pytest.approx(np.array([low, high]), abs=1e-14)
    assert np.isnan(association.interval(np.array([1.0, -1.0, np.nan, 0.2]), np.array([50, 50, 50, 3]))).all()


@pytest.mark.parametrize("n", [5, 6])
def test_few_donors_have_an_exact_p(n):
    """Every order of y, one by one, with SciPy's rho."""
    x, y = np.random.default_rng(n).integers(0, 5, (2, n)).astype(float)
    whole = abs(stats.spearmanr(x, y).statistic)
    orders = [abs(stats.spearmanr(x, order).statistic) for order in itertools.permutations(y)]
    found = association.associate(x, y)
    assert found.p_from == "exact" and found.p == pytest.approx(
        np.mean(np.array(orders) >= whole - 1e-9), abs=1e-12
    )


def test_p_from_random_orders_agrees_with_students_where_both_serve():
    """At 29 donors both are good: their difference is that of 9999 draws, 4 standard errors."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=29)
    for strength in (0.0, 0.2, 0.4):
        found = association.associate(x, strength * x + rng.normal(size=29))
        student = float(association.p_value(found.rho, 29))
        assert found.p_from == "permutation"
        assert abs(found.p - student) < 4 * math.sqrt(student / 9999) + 0.003
    assert association.associate(np.arange(29.0), np.arange(29.0)).p == 1 / 10000  # never 0


def test_partial_spearman_is_the_inverse_of_the_rank_correlations():
    rng = np.random.default_rng(1)
    z = rng.normal(size=(2, 80))
    z[1] = rng.integers(0, 2, 80)
    x, y = z[0] + rng.normal(size=80), z[1] - z[0] + rng.normal(size=80)
    inverse = np.linalg.inv(stats.spearmanr(np.stack([x, y, *z]), axis=1).statistic)
    expected = -inverse[0, 1] / math.sqrt(inverse[0, 0] * inverse[1, 1])
    assert association.spearman(x, y, z) == pytest.approx(expected, abs=1e-10)
    assert association.independent(z) == 2
    doubled = np.stack([*z, 1 - z[1]])  # says nothing new
    assert association.spearman(x, y, doubled) == pytest.approx(expected, abs=1e-10)
    assert association.independent(doubled) == 2
    found = association.associate(x, y, z)
    assert found.k == 2 and found.p == pytest.approx(
        2 * stats.t.sf(abs(expected) * math.sqrt(76 / (1 - expected**2)), 76), abs=1e-10
    )
    assert association.associate(x, z[0] ** 3, z).why == "covariates explain all of it"
    few = association.associate(x[:12], y[:12], z[:, :12])
    assert few.p_from == "permutation" and 0 < few.p <= 1 and few.n == 12


def test_donors_with_missing_values_are_left_out_pair_by_pair():
    rng = np.random.default_rng(2)
    x, y, z = rng.normal(size=(3, 60))
    y[3:9], z[20] = np.nan, np.nan
    keep = ~np.isnan(y + z)
    assert association.associate(x, y).n == 54
    found = association.associate(x, y, z[None])
    assert found.n == 53 and found.rho == association.spearman(x[keep], y[keep], z[None, keep])
    rows = np.stack([x, np.where(np.arange(60) == 40, np.nan, x), -x])  # a redraw without a cell of a donor
    rho, n = association.spearman_of_present(rows, y)
    assert list(n) == [54, 53, 54] and rho[2] == -rho[0]
    assert rho[1] == association.associate(rows[1], y).rho
    assert association.associate(x, np.full(60, 3.0)).why == "all 60 outcomes are 3"
    assert association.associate(np.zeros(60), y).why == "all 54 ratios are 0"
    assert association.associate(x[:5], y[:5]).why == "too few donors"


def test_difference_of_two_models():
    rng = np.random.default_rng(4)
    y = rng.normal(size=150)
    good, bad = y + rng.normal(size=150), y + 6 * rng.normal(size=150)
    change, low, high, n = association.difference(bad, good, y)
    assert change == pytest.approx(
        stats.spearmanr(good, y).statistic - stats.spearmanr(bad, y).statistic, abs=1e-12
    )
    assert 0 < low < change < high and n == 150
    back = association.difference(good, bad, y)
    assert back[:3] == pytest.approx((-change, -high, -low), abs=1e-12)
    assert association.difference(good, np.exp(good), y)[:3] == (0, 0, 0)  # ranks alone count
    y[7] = np.nan
    assert association.difference(bad, good, y)[3] == 149
    unpaired = association.difference(good, good + 1e-3 * rng.normal(size=150), y)
    assert unpaired[2] - unpaired[1] < 0.01  # resampled together: no noise of the donors


def test_otsu_is_the_best_of_all_splits():
    rng = np.random.default_rng(5)
    values = np.concatenate([rng.normal(3, 1, 200), rng.normal(9, 2, 60)]).round(1)

    def between(cut):
        low, high = values[values <= cut], values[values > cut]
        return len(low) * len(high) * (high.mean() - low.mean()) ** 2

    best = max(sorted(set(values))[:-1], key=between)
    cut = association.otsu(values)
    assert best < cut < values[values > best].min()
    assert association.otsu(np.array([1.0, 1, 1, 5])) == 3
    with pytest.raises(ValueError, match="3 values that are all equal"):
        association.otsu(np.array([2.0, 2, 2]))


def test_redrawn_tiles():
    """Each redraw is one of the possible choices of 4 from 5 tiles, all come about equally often."""
    cells, positive = np.array([[10, 20, 30, 40, 50, 7]]), np.array([[1, 5, 9, 20, 44, 7]])
    donor = np.array([0, 0, 0, 0, 0, 1])
    found = association.redrawn_ratios(
        np.repeat(positive, 2, 0), np.repeat(cells, 2, 0), donor, 0.8, 5000, seed=1
    )
    assert found.shape == (2, 5000, 2) and np.array_equal(found[0], found[1])  # models see the same draw
    assert (found[..., 1] == 1).all()
    possible = sorted((79 - positive[0, i]) / (150 - cells[0, i]) for i in range(5))
    seen, times = np.unique(found[0, :, 0], return_counts=True)
    assert seen == pytest.approx(possible) and np.abs(times - 1000).max() < 5 * math.sqrt(800)
    assert np.isnan(association.redrawn_ratios(np.array([[0]]), np.array([[0]]), np.array([0]), 1, 3)).all()


def test_ratio_interval():
    """Bernoulli tiles of one cell: the percentile bootstrap of a mean, sqrt(p (1 - p) / n) wide."""
    positive, cells = np.repeat([1, 0], [60, 140]), np.ones(200, int)
    low, high = association.ratio_interval(positive, cells, 4000)
    error = math.sqrt(0.3 * 0.7 / 200)
    assert low == pytest.approx(0.3 - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(0.3 + 1.96 * error, abs=0.2 * error)
    assert np.isnan(association.ratio_interval(np.array([3]), np.array([9]))).all()


def test_it_is_fast():
    """1,000 redraws and resamples x 8 outcomes x 2 models x 500 donors of 20 tiles: under 10 s of a core."""
    rng = np.random.default_rng(6)
    donor, cells = np.repeat(np.arange(500), 20), rng.integers(20, 80, (2, 10000))
    positive, y = rng.binomial(cells, 0.3), rng.integers(0, 7, (8, 500)).astype(float)
    begin = time.process_time()
    redrawn = association.redrawn_ratios(positive, cells, donor, 0.8, 1000)
    x = np.stack([np.bincount(donor, row) for row in positive]) / 1000
    found = [
        [association.redrawn(redrawn[m], each, None, association.associate(x[m], each)) for each in y]
        for m in range(2)
    ]
    association.benjamini_hochberg(np.array(found)[:, :, 1].transpose(0, 2, 1))
    for each in y:
        association.difference(x[0], x[1], each)
    seconds = time.process_time() - begin
    assert np.array(found).shape == (2, 8, 2, 1000) and seconds < 10, f"{seconds:.1f} s"


# ------------------------------------------------------------------- simulated cohorts, fewer than in docs/


def test_intervals_hold_the_population_rho():
    """300 cohorts in place of 1,000: 95 % within four standard errors."""
    found = simulate_cohorts.coverage(300, seed=1, huge=200_000, rhos=(0.0, 0.7))
    for (rho, _), (truth, ours, _) in found.items():
        assert 0.9 < ours.value < 1 and abs(ours.value - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 300)
        # tile noise takes something away
        assert abs(truth) < 0.01 if rho == 0 else 0.6 < truth < rho
    plain, truth, held = simulate_cohorts.partial_coverage(300, seed=1, huge=200_000)
    assert truth < plain - 0.1 and abs(held.value - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 300)


def test_false_discoveries_stay_under_q():
    for associated in (0, 4):
        rate, error, found = simulate_cohorts.discoveries(400, seed=2, associated=associated)
        assert rate <= 0.05 + 2 * error
        assert found is None or found.value > 0.9


def test_more_tiles_more_power_and_better_intervals():
    found = simulate_cohorts.power(300, seed=3, tiles=(1, 5, 50))
    (weak, first), (_, second), (strong, third) = found.values()
    assert first.value < second.value < third.value and strong > weak + 0.05
    (few, wide), (many, narrow) = simulate_cohorts.ratio_coverage(200, seed=4, tiles=(5, 60)).values()
    assert few.value < 0.9 < many.value and narrow < 0.4 * wide
