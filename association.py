"""Statistics of donors: Spearman's rho with p-value and interval, false discovery, redrawn tiles. No files.

    rho = spearman(ratio, outcome)                        (..., n) each: rows are done at once
    p, (low, high) = p_value(rho, n), interval(rho, n)    n donors; k covariates take degrees of freedom
    q = benjamini_hochberg(p)                             over the last axis
    ratios = redrawn_ratios(positive, cells, donor, 0.8, 1000, seed)

    found = associate(ratio, outcome)                     (D,) each, NaN where missing: all of one association
    rho, p = redrawn(ratios[m], outcome, None, found)     the same for redrawn tiles: how stable it is

Letters: M models, B redraws or resamples, D donors of the cohort, n those of them that have every value,
N tiles of all donors, k covariates. All is NumPy; SciPy's special functions give Student's distribution.

Every rho may be a partial one: of what is left of both ranks after a linear regression on the ranks of k
covariates. A column of 0 and 1 for a level of a category serves as a covariate, for its ranks are the column
itself but for origin and scale.
"""
from __future__ import annotations

import itertools
import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy import ndarray as Array
from scipy.special import stdtr

import metrics

EXACT = 8            # donors up to which all n! orders are gone through
SMALL = 30           # donors below which p comes from random orders, not from Student's distribution


# ------------------------------------------------------------------------------------------- correlation

def ranks(x: Array) -> Array:
    """Ranks 1..n along the last axis; equal values share the average of theirs. No NaN."""
    n, order = x.shape[-1], np.argsort(x, -1)
    ordered = np.take_along_axis(x, order, -1)
    first, last = np.ones(x.shape, bool), np.ones(x.shape, bool)       # of a stretch of equal values
    first[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    last[..., :-1] = first[..., 1:]
    at = np.arange(n)
    begin = np.maximum.accumulate(np.where(first, at, 0), -1)
    end = np.flip(np.minimum.accumulate(np.flip(np.where(last, at, n), -1), -1), -1)
    found = np.empty(x.shape)
    np.put_along_axis(found, order, (begin + end) / 2 + 1, -1)
    return found


def centred_ranks(x: Array, z: Array | None = None) -> Array:
    """Ranks of x (..., n) less their mean, and less what ranks of z (..., k, n) explain of them linearly."""
    r = ranks(x) - (x.shape[-1] + 1) / 2
    return r if z is None else without(r, centred_ranks(z))


def without(r: Array, z: Array) -> Array:
    """Residual (..., n) of centred r after least squares on centred z (..., k, n); 0 where nothing is left.

    Covariates may depend on each other, as the columns of sex and clinic do where one clinic sees only women.
    """
    length = np.sqrt((z * z).sum(-1, keepdims=True))
    z = z / np.where(length > 0, length, 1)
    turned = np.swapaxes(z, -1, -2)                                            # (..., n, k)
    slope = np.linalg.pinv(z @ turned, 1e-10, hermitian=True) @ (z @ r[..., None])       # (..., k, 1)
    left = r - (turned @ slope)[..., 0]
    nothing = (left * left).sum(-1, keepdims=True) <= 1e-20 * (r * r).sum(-1, keepdims=True)
    return np.where(nothing, 0, left)


def correlation(a: Array, b: Array) -> Array:
    """Pearson's correlation (...) of centred a and b (..., n); NaN where one of them does not vary."""
    size = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return np.clip(np.divide((a * b).sum(-1), size, out=np.full(size.shape, np.nan), where=size > 0), -1, 1)


def spearman(x: Array, y: Array, z: Array | None = None) -> Array:
    """Spearman's rho (...) of x and y (..., n), ties with average ranks; partial, given z (..., k, n).

    NaN where x or y is all equal, or is explained by z wholly.
    """
    return correlation(centred_ranks(x, z), centred_ranks(y, z))


def present(x: Array, y: Array, z: Array | None = None) -> Array:
    """Whether a donor has every value: (D,) bool, of x and y (D,) and z (k, D)."""
    have = ~np.isnan(x) & ~np.isnan(y)
    return have if z is None else have & ~np.isnan(z).any(0)


def spearman_of_present(x: Array, y: Array, z: Array | None = None) -> tuple[Array, Array]:
    """Rows x (B, D) against one y (D,), each over the donors with every value: rho (B,) and n (B,)."""
    have = present(y, y, z)
    x, y, z = x[:, have], y[have], None if z is None else z[:, have]
    lacking = np.isnan(x)
    patterns, which = np.unique(lacking, axis=0, return_inverse=True) if lacking.any() else (lacking[:1], 0)
    rho, n = np.empty(len(x)), np.empty(len(x), int)
    for number, pattern in enumerate(patterns):                                # nearly always one: none lacks
        rows = np.broadcast_to(np.reshape(which, -1) == number, len(x))
        rho[rows] = spearman(x[rows][:, ~pattern], y[~pattern], None if z is None else z[:, ~pattern])
        n[rows] = np.count_nonzero(~pattern)
    return rho, n


def independent(z: Array | None) -> int:
    """How many degrees of freedom covariates z (k, n) take: those among them that are no sum of others."""
    return 0 if z is None or not z.size else int(np.linalg.matrix_rank(centred_ranks(z)))


# ------------------------------------------------------------------------------- p-values and intervals

def null(x: Array, y: Array, z: Array | None = None, orders: int = 9999, seed: int = 0) -> Array:
    """|rho| under the null hypothesis, ascending: y (n,) in other orders against x (n,).

    All n! orders up to EXACT donors, else the given one and `orders` random ones. With covariates the
    residuals of y's ranks are reordered and regressed on z again (Freedman & Lane, 1983).
    """
    n, a, b = len(x), centred_ranks(x, z), centred_ranks(y, z)
    if z is None and n <= EXACT:
        order = np.array(list(itertools.permutations(range(n))))
    else:
        order = np.argsort(np.random.default_rng(seed).random((orders + 1, n)), 1)
        order[0] = np.arange(n)
    b = b[order]                                                               # (orders, n)
    return np.sort(np.abs(correlation(a, b if z is None else without(b, centred_ranks(z)))))


def p_value(rho: Array | float, n: Array | int, k: int = 0, null: Array | None = None) -> Array:
    """Two-sided p (...) for no association: the share of `null` that is as far from 0 as rho, or Student's t.

    t = rho sqrt(df / (1 - rho²)) has df = n - 2 - k degrees of freedom (Kendall & Stuart, 31.19).
    """
    rho, df = np.asarray(rho, float), np.asarray(n) - 2 - k
    if null is not None:
        p = (len(null) - np.searchsorted(null, np.abs(rho) - 1e-9)) / len(null)       # 1e-9: sums are rounded
        return np.where(np.isnan(rho), np.nan, p)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.abs(rho) * np.sqrt(df / ((1 - rho) * (1 + rho)))
        return np.where(df > 0, 2 * stdtr(df, -t), np.nan)


def interval(rho: Array | float, n: Array | int, k: int = 0, level: float = 0.95) -> tuple[Array, Array]:
    """Interval for the population's rho: Fisher's transform, with a variance that holds for ranks.

    tanh(atanh rho ± z sqrt((1 + rho² / 2) / (n - 3 - k))), Bonett & Wright (2000, Psychometrika 65:23-28);
    Fisher's own 1 / (n - 3) is for Pearson's r of normal data and covers too seldom. Each covariate of a
    partial correlation costs a donor. NaN for n - k <= 3 and for |rho| = 1, where the variance is unknown.
    """
    rho, left = np.asarray(rho, float), np.asarray(n, float) - 3 - k
    fine = (left > 0) & (np.abs(rho) < 1)
    centre = np.arctanh(np.where(fine, rho, np.nan))
    error = np.sqrt((1 + rho * rho / 2) / np.where(left > 0, left, np.nan))
    reach = NormalDist().inv_cdf((1 + level) / 2) * error
    return np.tanh(centre - reach), np.tanh(centre + reach)


def benjamini_hochberg(p: Array) -> Array:
    """q-values over the last axis, (..., m) -> (..., m): the least false discovery rate that lets one in.

    q of the i-th smallest = min over j >= i of p_j m / j (Benjamini & Hochberg, 1995). NaN is of no family.
    """
    order = np.argsort(p, -1)                                                  # NaN last
    m = (~np.isnan(p)).sum(-1, keepdims=True)
    scaled = np.take_along_axis(p, order, -1) * m / np.arange(1, p.shape[-1] + 1)
    least = np.flip(np.fmin.accumulate(np.flip(scaled, -1), -1), -1)
    q = np.empty(p.shape)
    np.put_along_axis(q, order, least, -1)
    return np.where(np.isnan(p), np.nan, np.minimum(q, 1))


def difference(first: Array, second: Array, y: Array, z: Array | None = None, resamples: int = 1000,
               seed: int = 0, level: float = 0.95) -> tuple[float, float, float, int]:
    """rho(second, y) - rho(first, y) of the same donors, its interval, and how many donors have every value.

    The two correlations depend on each other: they share y and the donors. The interval is the percentile
    bootstrap that resamples donors with all their values, which keeps that dependence (Efron, 1979).
    first, second, y : (D,); z : (k, D).
    """
    values = np.column_stack([first, second, y, *(() if z is None else z)])    # (D, 3 + k)
    values = values[~np.isnan(values).any(1)]

    def change(v: Array, axis: int) -> Array:                                  # (B, n, 3 + k) -> (B,)
        v = np.swapaxes(v, 1, 2)                                               # (B, 3 + k, n)
        covariates = None if z is None else v[:, 3:]
        first, second, y = (centred_ranks(v[:, i], covariates) for i in range(3))
        return correlation(second, y) - correlation(first, y)

    if len(values) < 2:
        return math.nan, math.nan, math.nan, len(values)
    low, high = metrics.bootstrap(values, change, resamples, seed, level)
    return float(change(values[None], 1)[0]), low, high, len(values)


# ---------------------------------------------------------------------------------------- an association

class Association(NamedTuple):
    n: int                       # donors with every value
    k: int                       # degrees of freedom that covariates take
    rho: float = math.nan
    low: float = math.nan        # of the 95 % interval
    high: float = math.nan
    p: float = math.nan
    p_from: str = ""             # exact, permutation, Student's t
    why: str = ""                # there is no rho
    null: Array | None = None    # where p is from, unless it is Student's t


def associate(x: Array, y: Array, z: Array | None = None, seed: int = 0) -> Association:
    """A ratio x (D,) with an outcome y (D,), given covariates z (k, D): over donors that have every value."""
    have = present(x, y, z)
    x, y, z = x[have], y[have], None if z is None else z[:, have]
    n, k = len(x), independent(z)
    if n < 4 + k:
        return Association(n, k, why="too few donors")
    for what, values in (("ratios", x), ("outcomes", y)):
        if not np.ptp(values):
            return Association(n, k, why=f"all {n} {what} are {values[0]:g}")
    rho = float(spearman(x, y, z))
    if math.isnan(rho):
        return Association(n, k, why="covariates explain all of it")
    random = null(x, y, z, seed=seed) if n < SMALL else None
    p_from = "Student's t" if random is None else "exact" if z is None and n <= EXACT else "permutation"
    low, high = map(float, interval(rho, n, k))
    return Association(n, k, rho, low, high, float(p_value(rho, n, k, random)), p_from, "", random)


def redrawn(x: Array, y: Array, z: Array | None, whole: Association) -> tuple[Array, Array]:
    """rho and p (B,) of each row of x (B, D), as `whole` has them of all tiles; NaN where there is none."""
    if whole.why:
        return np.full((2, len(x)), np.nan)
    rho, n = spearman_of_present(x, y, z)
    return rho, p_value(rho, n, whole.k, whole.null)


# --------------------------------------------------------------------------------------- cells and tiles

def otsu(values: Array) -> float:
    """Otsu's threshold (1979) of the values themselves, not of a histogram: half-way between the two classes.

    It makes the variance between them, n_low n_high (mean_high - mean_low)², as large as it can be.
    """
    x = np.sort(np.asarray(values, float))
    total, below = np.cumsum(x), np.flatnonzero(x[1:] > x[:-1]) + 1            # sizes of the lower class
    if not len(below):
        raise ValueError(f"{len(x)} values that are all equal: Otsu's threshold needs two classes")
    above = len(x) - below
    apart = (total[-1] - total[below - 1]) / above - total[below - 1] / below
    size = below[np.argmax(below * 1.0 * above * apart ** 2)]
    return float((x[size - 1] + x[size]) / 2)


def ratio_interval(positive: Array, cells: Array, resamples: int = 1000, seed: int = 0, level: float = 0.95
                   ) -> tuple[float, float]:
    """Interval for a donor's Σ positive / Σ cells from resampling its tiles (N,): percentile bootstrap.

    Too narrow for few tiles: tests/simulate_cohorts.py measures how often it covers at 5, 20 and 100.
    """
    if len(cells) < 2:
        return math.nan, math.nan

    def ratio(v: Array, axis: int) -> Array:                                   # (B, N, 2) -> (B,)
        positive, cells = v.sum(1).T
        return np.divide(positive, cells, out=np.full(len(v), np.nan), where=cells > 0)
    return metrics.bootstrap(np.stack([positive, cells], 1), ratio, resamples, seed, level)


def redrawn_ratios(positive: Array, cells: Array, donor: Array, share: float, redraws: int, seed: int = 0
                   ) -> Array:
    """Ratios (M, B, D) from a share of each donor's tiles, drawn without putting back; NaN without a cell.

    positive, cells : (M, N), of the same tiles for every model, which thus see the same draw.
    donor : (N,) 0..D-1, whose tile it is.
    """
    rng, D = np.random.default_rng(seed), int(donor.max(initial=-1)) + 1
    counts = np.stack([positive, cells]).astype(float)                         # (2, M, N)
    sums = np.empty((*counts.shape[:2], redraws, D))
    for d in range(D):
        tiles = np.flatnonzero(donor == d)
        keep = max(1, round(share * len(tiles)))
        drawn = np.argpartition(rng.random((redraws, len(tiles))), keep - 1, 1)[:, :keep]
        chosen = np.zeros((redraws, len(tiles)))
        np.put_along_axis(chosen, drawn, 1, 1)
        sums[..., d] = counts[..., tiles] @ chosen.T                           # (2, M, B)
    return np.divide(sums[0], sums[1], out=np.full(sums.shape[1:], np.nan), where=sums[1] > 0)
