"""Cohorts with known truth: do intervals, p-values and q-values of cohort.py hold?

    python bench/simulate_cohorts.py [cohorts] [seed]      1000 cohorts of 200 donors: two minutes

A donor has a trait u, standard normal. In a tile of it the share of positive cells is
s(-1 + 0.6 u + 0.8 e) with s the logistic function and e standard normal, drawn for each tile. A
tile holds 10 + Poisson(40) cells, each positive with the tile's share. What is measured is the
ratio of sums over a donor's tiles, as in downstream.py. Outcomes are normal, of a chosen Spearman's
rho with u, and correlate with each other beyond it through a second trait of the donor (half of
what u leaves). Ordinal outcomes are cut to six levels, 5 to 35 % of the donors in each.

The truth for an interval is the rho of outcome and *measured* ratio, tile noise and levels
included, in the population that such cohorts are drawn from. It is below the rho of u that was
chosen, and taken from one cohort of a million donors, whose own standard error is at most 0.001.
"""
from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cohort  # noqa: E402

DONORS, TILES, HUGE = 200, 20, 1_000_000
MEAN, SPREAD, TILE_SPREAD = -1.0, 0.6, 0.8                    # logits
LEVELS = np.cumsum([0.05, 0.10, 0.20, 0.35, 0.20])            # of an ordinal outcome, and a sixth
CUTS = [NormalDist().inv_cdf(share) for share in LEVELS]
Q = NormalDist().inv_cdf(0.975)


# -------------------------------------------------------------------------------------- the cohorts

def logistic(x):
    return 1 / (1 + np.exp(-x))


def measured(rng, u, tiles):
    """Ratio of each donor, shape of u; tile by tile, in bounded memory."""
    positive, cells = np.zeros(u.shape), np.zeros(u.shape)
    for _ in range(tiles):
        n = 10 + rng.poisson(40, u.shape)
        logits = MEAN + SPREAD * u + TILE_SPREAD * rng.standard_normal(u.shape)
        positive += rng.binomial(n, logistic(logits))
        cells += n
    return positive / cells


def outcome(rng, u, rho, shared=None, ordinal=False):
    """An outcome with this Spearman's rho with u; `shared` by the outcomes of a donor beyond u."""
    a = 2 * math.sin(math.pi * rho / 6)                       # Pearson's r of normal variables
    rest = rng.standard_normal(u.shape)
    if shared is not None:
        rest = math.sqrt(0.5) * (rest + shared)
    y = a * u + math.sqrt(1 - a * a) * rest
    return np.searchsorted(CUTS, y).astype(float) if ordinal else y


class Share(NamedTuple):
    """How often something was so, of n times."""
    value: float
    n: int

    @property
    def error(self):                                          # standard error
        return math.sqrt(max(self.value * (1 - self.value), 1 / self.n) / self.n)

    def __str__(self):
        return f"{100 * self.value:5.1f} % (± {100 * self.error:.1f})"


def share(values):
    return Share(float(np.mean(values)), np.size(values))


# ------------------------------------------------------------------------------------ what is asked

def coverage(cohorts, seed, huge=HUGE, rhos=(0.0, 0.3, 0.5, 0.7)):
    """How often intervals hold the truth: {(rho of u, kind): (population's, ours, Fisher's)}."""
    rng, found = np.random.default_rng((seed, 1)), {}
    u_huge, u = rng.standard_normal(huge), rng.standard_normal((cohorts, DONORS))
    ratio_huge, ratio = measured(rng, u_huge, TILES), measured(rng, u, TILES)
    for rho in rhos:
        for kind in ("normal", "ordinal"):
            y_huge, y = (outcome(rng, each, rho, ordinal=kind == "ordinal") for each in (u_huge, u))
            truth, seen = cohort.spearman(ratio_huge, y_huge), cohort.spearman(ratio, y)
            low, high = cohort.donor_interval(seen, DONORS)
            fisher = np.abs(np.arctanh(seen) - np.arctanh(truth)) <= Q / math.sqrt(DONORS - 3)
            found[rho, kind] = float(truth), share((low <= truth) & (truth <= high)), share(fisher)
    return found


def partial_coverage(cohorts, seed, huge=HUGE):
    """The same for a partial rho, where age drives both: (rho, partial rho, coverage)."""
    rng = np.random.default_rng((seed, 2))

    def draw(shape):
        age = rng.standard_normal(shape)
        u = 0.6 * age + 0.8 * rng.standard_normal(shape)
        y = 0.5 * age + 0.3 * u + 0.7 * rng.standard_normal(shape)
        return measured(rng, u, TILES), y, age[..., None, :]

    x, y, z = draw(huge)
    truth = cohort.spearman(x, y, z)
    low, high = cohort.donor_interval(cohort.spearman(*draw((cohorts, DONORS))), DONORS, 1)
    return float(cohort.spearman(x, y)), float(truth), share((low <= truth) & (truth <= high))


def difference_coverage(cohorts, seed, huge=HUGE):
    """Two models on the same donors, the first errs: (difference of rho, its coverage)."""
    rng = np.random.default_rng((seed, 3))

    def draw(shape):
        u = rng.standard_normal(shape)
        y = outcome(rng, u, 0.5)
        tuned = measured(rng, u, TILES)
        return np.clip(tuned + 0.08 * rng.standard_normal(shape), 0, 1), tuned, y

    baseline, tuned, y = draw(huge)
    truth = float(cohort.spearman(tuned, y) - cohort.spearman(baseline, y))
    ends = [cohort.donor_difference(*donors, resamples=1000, seed=number)[2:]
            for number, donors in enumerate(zip(*draw((cohorts, DONORS))))]
    return truth, share([low <= truth <= high for low, high in ends])


def discoveries(cohorts, seed, associated, rho=0.3, outcomes=8):
    """Outcomes that correlate, `associated` with u: (false discovery rate, error, power)."""
    rng = np.random.default_rng((seed, 4, associated))
    u, shared = rng.standard_normal((2, cohorts, DONORS))
    ratio = measured(rng, u, TILES)
    y = np.stack([outcome(rng, u, rho if k < associated else 0.0, shared)
                  for k in range(outcomes)], 1)
    q = cohort.false_discovery(cohort.p_value(cohort.spearman(ratio[:, None], y), DONORS))
    found, false = (q < 0.05).sum(1), (q[:, associated:] < 0.05).sum(1)
    proportion = false / np.maximum(found, 1)  # (C,)
    power = share(q[:, :associated] < 0.05) if associated else None
    return float(proportion.mean()), float(proportion.std(ddof=1) / math.sqrt(cohorts)), power


def power(cohorts, seed, rho=0.25, tiles=(1, 2, 5, 20, 100)):
    """Share of cohorts with p < 0.05, and the mean rho, by the number of tiles of each donor."""
    rng, found = np.random.default_rng((seed, 5)), {}
    u = rng.standard_normal((cohorts, DONORS))
    y = outcome(rng, u, rho)
    for count in tiles:
        seen = cohort.spearman(measured(rng, u, count), y)
        found[count] = float(seen.mean()), share(cohort.p_value(seen, DONORS) < 0.05)
    return found


def ratio_coverage(donors, seed, tiles=(5, 20, 100)):
    """How often a donor's interval holds its tissue's ratio, by the number of its tiles."""
    rng, found = np.random.default_rng((seed, 6)), {}
    x, weight = np.polynomial.hermite_e.hermegauss(40)  # the mean over tiles, by quadrature
    for count in tiles:
        u = rng.standard_normal(donors)
        truth = logistic(MEAN + SPREAD * u[:, None] + TILE_SPREAD * x) @ weight / weight.sum()
        cells = 10 + rng.poisson(40, (donors, count))
        logits = MEAN + SPREAD * u[:, None] + TILE_SPREAD * rng.standard_normal((donors, count))
        positive = rng.binomial(cells, logistic(logits))
        ends = np.array([cohort.ratio_interval(positive[d], cells[d], 1000, d)
                         for d in range(donors)])
        low, high = ends.T
        found[count] = share((low <= truth) & (truth <= high)), float(np.mean(high - low))
    return found


def main(cohorts=1000, seed=0):
    begin = time.process_time()
    print(f"{cohorts} cohorts of {DONORS} donors, {TILES} tiles each, seed {seed}; ± is a standard "
          "error")
    print("\n95 % intervals for the population's rho of the measured ratio: how often they hold it")
    print("rho of the trait   outcome    population's rho   Bonett-Wright        Fisher")
    for (rho, kind), (truth, ours, fisher) in coverage(cohorts, seed).items():
        print(f"{rho:16.1f}   {kind:8s} {truth:18.3f}   {ours}   {fisher}")
    rho, truth, held = partial_coverage(cohorts, seed)
    print(f"partial, for age   normal   {truth:18.3f}   {held}   (without age: rho {rho:.3f})")
    truth, held = difference_coverage(cohorts, seed)
    print(f"\ndifference in rho of two models, {truth:.3f} in the population: its interval holds "
          f"it {held}")
    print("\nfalse discovery rate at q < 0.05, eight outcomes that correlate")
    for associated in (0, 2, 4):
        rate, error, found = discoveries(cohorts, seed, associated)
        print(f"{associated} of 8 associated (rho of the trait 0.3): {100 * rate:.2f} % "
              f"(± {100 * error:.2f})" + (f", power {found}" if found else ""))
    print("\ntiles of each donor: mean rho, and power (p < 0.05), where the rho of the trait "
          "is 0.25")
    for count, (rho, found) in power(cohorts, seed).items():
        print(f"{count:5d} tiles   rho {rho:.3f}   power {found}")
    print("\n95 % intervals of a donor's ratio from resampling its tiles: how often they hold it; "
          "mean width")
    for count, (held, width) in ratio_coverage(cohorts, seed).items():
        print(f"{count:5d} tiles   {held}   {width:.3f}")
    seconds = time.process_time() - begin
    print(f"\n{seconds:.0f} s of one core; Python {sys.version.split()[0]}, NumPy {np.__version__}")


if __name__ == "__main__":
    if any(not word.isdigit() for word in sys.argv[1:]):
        sys.exit(__doc__)
    main(*map(int, sys.argv[1:]))
