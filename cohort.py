"""Donors: tiles of two files, the marker's threshold, tables, and the statistics of associations.

    tiles, unusable, others = find_tiles("slides", r"b0c(?P<channel>\\d+)")
    values = marker_of_cells(labels, read_tile(tiles[0])[1])      # (n,) the marker over each cell
    lines = lines_by_tile("shards", key, tiles)                   # {tile: its line}, of all shards
    cut = marker_threshold(lines.values(), "otsu")                # cells above it are positive
    donors = read_donors("outcomes.tsv", ["braaksc"])             # .names, .outcomes (K, D)

    found = donor_association(ratio, outcome)  # (D,) each, NaN where missing: rho, interval, p
    rho, p = redrawn_donors(ratios[m], outcome, z, found)     # the same for redrawn tiles
    q = false_discovery(p)                                    # over the last axis

M models, K outcomes, k covariates, D donors, n donors with every value, N tiles of all donors,
B redraws or resamples.

Every rho may be partial: of what is left of both ranks after a linear regression on the ranks of k
covariates z. A column of 0 and 1 for a level of a category serves as a covariate: its ranks are the
column itself but for origin and scale.
"""
from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy import ndarray as Array
from numpy.typing import ArrayLike
from scipy import ndimage, stats

import data
import metrics
import runs

MISSING = ("", "na", "n/a", "nan", "null", "none", ".", "-")   # written where there is no number
UNNAMED = ("", "na", "n/a", "nan", "null", ".")  # for categories, where none is a treatment
EXACT = 8            # donors up to which all n! orders are tried
SMALL = 30           # donors below which p is from random orders, not from Student's t
LEVEL = 0.95         # of intervals
CONTROLS = 99        # percentile of the controls' cells that is the threshold


# -------------------------------------------------------------------------------------------- tiles

class TilePair(NamedTuple):
    name: str                    # path below the folder, without suffix, of its image of nuclei
    donor: str
    files: tuple[Path, Path]     # nuclei, marker

    def stamp(self) -> list[list]:
        """Bytes, time of the last change (ns) and content of each file."""
        return [[*runs.file_state(file), runs.digest(file)[:16]] for file in self.files]

    def is_as(self, stamp: list[list]) -> bool:
        """Whether a stamp is of these files; where one was only copied its content tells."""
        try:
            return all(runs.file_state(file) == state or runs.digest(file)[:16] == content
                       for file, (*state, content) in zip(self.files, stamp, strict=True))
        except (OSError, ValueError, TypeError):               # gone, or a damaged line
            return False


def find_tiles(root: str | Path, pattern: str, nuclei: str = "0", marker: str = "1",
               donor: str | None = None) -> tuple[list[TilePair], dict[str, str], int]:
    """Tiles by name; names of unusable ones, and why; the number of all other files.

    pattern : regular expression for the names of .tif and .tiff files. Names that differ in its
        group `channel` alone are one tile.
    donor : regular expression with one group, for a tile's name; None: as in donor_7.
    """
    root, expression, others = Path(root), data.labelled_name_pattern("pattern", pattern), 0
    if "channel" not in expression.groupindex:
        raise ValueError(f"pattern={pattern}: has no group (?P<channel>...) around the channel")
    if not root.is_dir():
        raise FileNotFoundError(f"tiles={root}: no such folder")
    found: dict[str, dict[str, list[Path]]] = defaultdict(lambda: {nuclei: [], marker: []})
    for folder, files in data.layout_folders(root):
        for file in files:
            tiff = file.suffix.lower() in (".tif", ".tiff")
            match = expression.search(file.stem) if tiff else None
            if match and match["channel"] in (nuclei, marker):
                begin, end = match.span("channel")
                name = folder / (file.stem[:begin] + nuclei + file.stem[end:])
                found[name.relative_to(root).as_posix()][match["channel"]].append(file)
            else:
                others += 1
    if not found:
        raise ValueError(f"tiles={root}: no tiles; none of its {others} files is a .tif or .tiff "
                         f"of channel {nuclei} or {marker} by pattern={pattern}")
    tiles, unusable = [], {}
    for name, images in sorted(found.items()):
        try:
            for channel, what in ((nuclei, "nuclei"), (marker, "marker")):
                if (count := len(images[channel])) != 1:
                    names = ", ".join(file.name for file in images[channel])
                    raise ValueError(f"{count or 'no'} images of the {what} {names}".strip())
            pair = images[nuclei][0], images[marker][0]
            tiles.append(TilePair(name, data.donor_of(name, donor, "donor"), pair))
        except ValueError as error:
            unusable[name] = str(error)
    if not tiles:
        name, why = next(iter(unusable.items()))
        raise ValueError(f"tiles={root}: none of {len(unusable)} tiles can be used; {name}: {why}")
    if donor is None:
        check_donor_folders(root, tiles)
    return tiles, unusable, others


def check_donor_folders(root: Path, tiles: Sequence[TilePair]) -> None:
    """Refuse folders such as donor_A-01 and donor_A-02, which by default are one donor, A."""
    folder_of: dict[str, tuple[str, str]] = {}                 # donor: rest of its word, folder
    for name, donor, _ in tiles:
        found = [one for one in re.finditer(data.DONOR, name) if one[1] == donor][-1]
        before, after = name[:found.end()].rpartition("/")[2], name[found.end():]
        if "/" in after:                                       # not in the name of a file
            here = re.split("[/_]", after)[0], before + after.partition("/")[0]
            rest, folder = folder_of.setdefault(donor, here)
            if rest != here[0]:
                raise ValueError(f"tiles={root}: folders {folder} and {here[1]} both give donor "
                                 f"{donor}; give donor=REGEX with one group around it, such as "
                                 "'donor_([^/]+)', or 'donor_([a-zA-Z0-9]+)' if they are one")


def read_tile(tile: TilePair) -> Array:
    """(2, H, W): nuclei, marker."""
    nuclei, marker = (data.read_image(path).pixels for path in tile.files)
    for path, pixels in zip(tile.files, (nuclei, marker)):
        if pixels.shape != (1, *nuclei.shape[1:]):
            raise ValueError(f"{path}: (C, H, W) = {pixels.shape}, expected one channel, as large "
                             f"as {tile.files[0].name}")
    if nuclei.dtype != marker.dtype:
        raise ValueError(f"{tile.files[1]}: pixels of {marker.dtype}, expected {nuclei.dtype} as "
                         f"in {tile.files[0].name}")
    return np.concatenate([nuclei, marker])


def marker_of_cells(labels: Array, marker: Array, percentile: float | None = None) -> Array:
    """Mean, or a percentile, of the marker (H, W) over each cell 1..n of labels (H, W): (n,)."""
    cells = np.arange(1, labels.max(initial=0) + 1)
    if percentile is None or not len(cells):
        return ndimage.mean(marker, labels, cells)
    return ndimage.labeled_comprehension(marker.astype(float), labels, cells, partial(
        np.percentile, q=percentile), float, math.nan)


def read_tile_lines(path: Path) -> list[dict]:
    """Lines of a shard, without one that is being written or that a crash cut."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            line = json.loads(text)
            if not (isinstance(line, dict) and {"tile", "key", "donor"} <= line.keys()):
                raise ValueError(f"{path}: a line {text[:40]}, expected one with tile, donor and "
                                 "key, as `downstream.py infer` writes; remove the line")
            lines.append(line)
    return lines


def lines_by_tile(folder: str | Path, key: str, tiles: Iterable[TilePair]) -> dict[str, dict]:
    """{tile: its line} of all shards; `why` in a line says why there are no cells.

    Lines of other keys were made with other weights or settings, those of another stamp from
    other pixels; files that cannot be read have none.
    """
    found: dict[str, dict] = {}
    named = {tile.name: tile for tile in tiles}
    for path in sorted(Path(folder).glob("*.jsonl")):
        for line in read_tile_lines(path):
            tile, stamp = named.get(line["tile"]), line.get("files")
            if (line["key"] == key and tile and ("why" not in line or tile.name not in found)
                    and (stamp is None or tile.is_as(stamp))):
                found[tile.name] = line
    return found


def marker_threshold(lines: Iterable[dict], how: str, value: float = math.nan,
                     controls: Sequence[str] = ()) -> float:
    """Marker intensity above which a cell is positive, from the lines of tiles that are done.

    how : fixed (`value`), otsu (over all cells) or controls (percentile CONTROLS of their cells).
    """
    parts = defaultdict(list)
    dtypes: dict[str, str] = {}
    for line in lines:
        parts[line["donor"]].append(line["intensity"])
        dtypes.setdefault(line["dtype"], line["tile"])
    if len(dtypes) > 1:
        both = ", ".join(f"{dtype} ({tile})" for dtype, tile in dtypes.items())
        raise ValueError(f"tiles have pixels of {both}, which no one threshold fits; export them "
                         "alike")
    if how == "fixed":
        return value
    if how == "controls":
        if absent := [donor for donor in controls if donor not in parts]:
            raise ValueError(f"controls={absent[0]}: no tiles of it; donors are "
                             f"{runs.listed(sorted(parts))}")
        cells = np.concatenate([part for donor in controls for part in parts[donor]])
        if not len(cells):
            raise ValueError(f"controls={','.join(controls)}: no cells in their tiles")
        return float(np.percentile(cells, CONTROLS))
    try:
        return otsu_threshold(np.concatenate([[], *itertools.chain(*parts.values())]))
    except ValueError as error:
        raise ValueError(f"threshold=otsu: marker intensities are {error}") from None


def otsu_threshold(values: Array) -> float:
    """Otsu's threshold (1979) of the values, not of a histogram: half-way between both classes.

    It maximises the variance between them, n_low n_high (mean_high - mean_low)².
    """
    x = np.sort(np.asarray(values, float))
    total, below = np.cumsum(x), np.flatnonzero(x[1:] > x[:-1]) + 1  # sizes of the lower class
    if not len(below):
        raise ValueError(f"{len(x)} values that are all equal; use threshold=fixed")
    above = len(x) - below
    apart = (total[-1] - total[below - 1]) / above - total[below - 1] / below
    size = below[np.argmax(below * 1.0 * above * apart ** 2)]
    return float((x[size - 1] + x[size]) / 2)


# ------------------------------------------------------------------------------------------- tables

class Counts(NamedTuple):
    donors: list[str]            # D
    flags: list[str]             # D, why a donor is left out; "" if it is not
    donor: Array                 # (N,) 0..D-1, of the tiles that every model has done
    cells: Array                 # (M, N)
    positive: Array              # (M, N)

    def sums(self, counts: Array) -> Array:
        """(M, N) of tiles -> (M, D) of donors."""
        return np.stack([np.bincount(self.donor, row, len(self.donors)) for row in counts])


def read_donor_counts(paths: Sequence[Path], controls: Sequence[str], min_tiles: int,
                      min_cells: int) -> Counts:
    """Counts from a table for each model; a donor with too little in any is flagged."""
    needed, advice = ("donor", "tile", "cells", "positive"), "run `downstream.py merge` first"
    tables = [{row["tile"]: row for row in runs.read_table(path, needed, advice)} for path in paths]
    names = [name for name in tables[0] if all(name in table for table in tables)]
    donors, donor = np.unique([tables[0][name]["donor"] for name in names], return_inverse=True)
    cells, positive = (np.array([[int(table[name][what]) for name in names] for table in tables])
                       for what in ("cells", "positive"))
    counts = Counts(donors.tolist(), [], donor, cells, positive)
    tiles, least = np.bincount(donor, minlength=len(donors)), counts.sums(cells).min(0)
    return counts._replace(flags=[
        "negative control" if name in controls else
        f"fewer than {min_tiles} tiles" if tiles[d] < min_tiles else
        f"fewer than {min_cells} cells" if least[d] < min_cells else ""
        for d, name in enumerate(counts.donors)])


class Donors(NamedTuple):
    names: list[str]
    outcomes: Array              # (K, D), NaN where missing
    covariates: Array            # (k, D); of a category 0 and 1 for each level but the first
    columns: list[str]           # k, the column of each


def read_donors(path: str | Path, outcomes: Sequence[str], covariates: Sequence[str] = (),
                categories: Sequence[str] = ()) -> Donors:
    """Outcomes and covariates from a table with a column `donor` and these columns."""
    rows = runs.read_table(path, ("donor", *outcomes, *covariates, *categories),
                           "give outcomes=, a table with a row for each donor")
    line_of: dict[str, int] = {}
    for number, row in enumerate(rows, 2):
        if not (name := row["donor"]):
            raise ValueError(f"{path}, line {number}: no donor in column donor; name it")
        if name in line_of:
            raise ValueError(f"{path}, line {number}: donor {name} stands in line {line_of[name]} "
                             "already; keep one")
        line_of[name] = number

    def numbers(column: str) -> list[float]:
        return [donor_table_number(row[column], f"{path}, line {line}, donor {name}: {column}")
                for row, (name, line) in zip(rows, line_of.items())]

    extra, columns = [numbers(column) for column in covariates], [*covariates]
    for column in categories:
        words = ["" if row[column].lower() in UNNAMED else row[column] for row in rows]
        levels = sorted({*words} - {""})[1:]
        extra += [[float(word == level) if word else math.nan for word in words]
                  for level in levels]
        columns += [column] * len(levels)
    return Donors(list(line_of), np.array([numbers(column) for column in outcomes]),
                  np.reshape(extra, (len(extra), len(rows))), columns)


def donor_table_number(text: str, where: str) -> float:
    """The number in a cell of a table, NaN where it is missing; `where` begins the error."""
    try:
        value = math.nan if text.lower() in MISSING else float(text)
    except ValueError:
        value = math.inf
    if math.isinf(value):
        raise ValueError(f"{where} is '{text}', expected a number, or NA where it is missing")
    return value


# -------------------------------------------------------------------------------------- correlation

def centred_ranks(x: Array, z: ArrayLike = ()) -> Array:
    """Ranks of x (..., n) less their mean, and less what ranks of z (..., k, n) explain of them."""
    return rank_residual(stats.rankdata(x, axis=-1) - (x.shape[-1] + 1) / 2, z)


def rank_residual(r: Array, z: ArrayLike) -> Array:
    """Residuals (..., n) of centred r after least squares on the ranks of z (..., k, n), if any.

    Covariates may depend on each other, as sex and clinic where one clinic sees only women.
    """
    if not np.size(z):
        return r
    z = centred_ranks(np.asarray(z))
    length = np.sqrt((z * z).sum(-1, keepdims=True))
    z = z / np.where(length > 0, length, 1)
    turned = np.swapaxes(z, -1, -2)  # (..., n, k)
    inverse = np.linalg.pinv(z @ turned, 1e-10, hermitian=True)  # (..., k, k)
    left = r - (turned @ (inverse @ (z @ r[..., None])))[..., 0]
    nothing = (left * left).sum(-1, keepdims=True) <= 1e-20 * (r * r).sum(-1, keepdims=True)
    return np.where(nothing, 0, left)


def divided(a: Array, b: Array) -> Array:
    """a / b (...), NaN where b is 0."""
    return np.divide(a, b, out=np.full(b.shape, np.nan), where=b > 0)


def correlation(a: Array, b: Array) -> Array:
    """Pearson's correlation (...) of centred a and b (..., n); NaN where one does not vary."""
    size = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return np.clip(divided((a * b).sum(-1), size), -1, 1)


def spearman(x: Array, y: Array, z: ArrayLike = ()) -> Array:
    """Spearman's rho (...) of x and y (..., n), ties with average ranks; partial, given z.

    NaN where x or y is all equal, or wholly explained by z (..., k, n).
    """
    return correlation(centred_ranks(x, z), centred_ranks(y, z))


def null_rhos(x: Array, y: Array, z: ArrayLike, seed: int) -> Array:
    """|rho| under the null hypothesis, ascending: y (n,) in other orders against x (n,).

    All n! orders up to EXACT donors, else the given one and 9,999 random ones. With covariates
    the residuals of y's ranks are reordered and regressed on z again (Freedman & Lane, 1983).
    """
    n, a, b = len(x), centred_ranks(x, z), centred_ranks(y, z)
    if n <= EXACT and not np.size(z):
        order = np.array(list(itertools.permutations(range(n))))
    else:
        order = np.argsort(np.random.default_rng(seed).random((10000, n)), 1)
        order[0] = np.arange(n)
    return np.sort(np.abs(correlation(a, rank_residual(b[order], z))))  # b[order]: (orders, n)


def p_value(rho: Array | float, n: Array | int, k: int = 0, null: Array | None = None) -> Array:
    """Two-sided p (...): the share of `null` at least as far from 0 as rho, or from Student's t.

    t = rho sqrt(df / (1 - rho²)) has df = n - 2 - k degrees of freedom (Kendall & Stuart, 31.19).
    """
    rho, df = np.abs(rho), np.asarray(n) - 2 - k
    if null is not None:  # 1e-9: sums are rounded
        p = (len(null) - np.searchsorted(null, rho - 1e-9)) / len(null)
        return np.where(np.isnan(rho), np.nan, p)
    with np.errstate(divide="ignore", invalid="ignore"):
        return 2 * stats.t.sf(rho * np.sqrt(df / ((1 - rho) * (1 + rho))), df)


def donor_interval(rho: Array | float, n: Array | int, k: int = 0) -> tuple[Array, Array]:
    """Interval for the population's rho: Fisher's transform, with a variance that holds for ranks.

    tanh(atanh rho ± z sqrt((1 + rho² / 2) / (n - 3 - k))), Bonett & Wright (2000, Psychometrika
    65:23-28); Fisher's 1 / (n - 3) is for Pearson's r of normal data and covers too seldom. NaN for
    n - k <= 3 and for |rho| = 1: the variance is unknown.
    """
    rho, left = np.asarray(rho, float), np.asarray(n, float) - 3 - k
    centre = np.arctanh(np.where((left > 0) & (np.abs(rho) < 1), rho, np.nan))
    error = np.sqrt((1 + rho * rho / 2) / np.where(left > 0, left, np.nan))
    reach = NormalDist().inv_cdf((1 + LEVEL) / 2) * error
    return np.tanh(centre - reach), np.tanh(centre + reach)


def false_discovery(p: Array) -> Array:
    """q-values (Benjamini & Hochberg, 1995) of the families p (..., m); NaN belongs to none."""
    def family(p: Array) -> Array:
        q, have = p.copy(), ~np.isnan(p)
        q[have] = stats.false_discovery_control(p[have])
        return q
    return np.apply_along_axis(family, -1, p)


# ------------------------------------------------------------------------------------- associations

class Association(NamedTuple):
    n: int                       # donors with every value
    covariates: int              # degrees of freedom that they take
    rho: float = math.nan
    low: float = math.nan        # of the interval
    high: float = math.nan
    p: float = math.nan
    p_from: str = ""             # exact, permutation, Student's t
    left_out: str = ""           # why there is no rho
    null: Array | None = None    # what p is from, unless it is Student's t


def complete_donors(*rows: Array) -> Array:
    """(rows, n) of the donors (D,) that have every value."""
    values = np.stack(rows)
    return values[:, ~np.isnan(values).any(0)]


def donor_association(x: Array, y: Array, z: Iterable[Array] = (), seed: int = 0) -> Association:
    """Association of a ratio x (D,) and an outcome y (D,), given covariates z (k, D).

    Missing values are NaN.
    """
    values = complete_donors(x, y, *z)
    x, y, z = values[0], values[1], values[2:]
    n, k = len(x), int(np.linalg.matrix_rank(centred_ranks(z))) if z.size else 0
    if n < 4 + k:
        return Association(n, k, left_out="too few donors")
    for what, values in (("ratios", x), ("outcomes", y)):
        if not np.ptp(values):
            return Association(n, k, left_out=f"all {n} {what} are {values[0]:g}")
    rho = float(spearman(x, y, z))
    if math.isnan(rho):
        return Association(n, k, left_out="covariates explain all of it")
    null = null_rhos(x, y, z, seed) if n < SMALL else None
    p_from = ("Student's t" if null is None else
              "exact" if n <= EXACT and not len(z) else "permutation")
    low, high = map(float, donor_interval(rho, n, k))
    return Association(n, k, rho, low, high, float(p_value(rho, n, k, null)), p_from, "", null)


def redrawn_donors(x: Array, y: Array, z: Array, whole: Association) -> tuple[Array, Array]:
    """rho and p (B,) of each row of x (B, D), as `whole` has them of all tiles."""
    rho, fixed = np.full(len(x), np.nan), np.stack([y, *z])  # (1 + k, D)
    if whole.left_out:
        return rho, rho
    known = ~np.isnan(fixed).any(0)
    x, fixed = x[:, known], fixed[:, known]
    have = ~np.isnan(x)
    full = have.all(1)  # nearly always all
    rho[full] = spearman(x[full], fixed[0], fixed[1:])
    for b in np.flatnonzero(~full):
        rho[b] = spearman(x[b, have[b]], fixed[0, have[b]], fixed[1:, have[b]])
    return rho, p_value(rho, have.sum(1), whole.covariates, whole.null)


def donor_difference(first: Array, second: Array, y: Array, z: Iterable[Array] = (),
                     resamples: int = 1000, seed: int = 0) -> tuple[int, float, float, float]:
    """Number of donors, rho(second, y) - rho(first, y), and its interval; (D,) each, z (k, D).

    Both correlations share y and the donors: the percentile bootstrap of donors with all their
    values keeps that dependence (Efron, 1979).
    """
    values = complete_donors(first, second, y, *z).T  # (n, 3 + k)

    def change(v: Array, axis: int) -> Array:  # (B, n, 3 + k) -> (B,)
        v = np.swapaxes(v, 1, 2)  # (B, 3 + k, n)
        first, second, y = (centred_ranks(v[:, i], v[:, 3:]) for i in range(3))
        return correlation(second, y) - correlation(first, y)

    if len(values) < 2:
        return len(values), math.nan, math.nan, math.nan
    low, high = metrics.bootstrap_scores(values, change, resamples, seed, LEVEL)
    return len(values), float(change(values[None], 1)[0]), low, high


def ratio_interval(positive: Array, cells: Array, resamples: int = 1000, seed: int = 0
                   ) -> tuple[float, float]:
    """Interval for a donor's Σ positive / Σ cells from resampling its tiles (N,).

    Too narrow for few tiles: bench/simulate_cohorts.py measures its coverage at 5, 20, 100.
    """
    if len(cells) < 2:
        return math.nan, math.nan

    def ratio(v: Array, axis: int) -> Array:  # (B, N, 2) -> (B,)
        return divided(*v.sum(1).T)
    return metrics.bootstrap_scores(np.stack([positive, cells], 1), ratio, resamples, seed, LEVEL)


def redrawn_ratios(positive: Array, cells: Array, donor: Array, share: float, redraws: int,
                   seed: int = 0) -> Array:
    """Ratios (M, B, D) from a share of each donor's tiles, drawn without putting back.

    positive, cells : (M, N); every model sees the same draw. donor : (N,) 0..D-1.
    At least one tile is left out where there are more. NaN where the drawn tiles have no cell.
    """
    rng, D = np.random.default_rng(seed), int(donor.max(initial=-1)) + 1
    counts = np.stack([positive, cells]).astype(float)  # (2, M, N)
    sums = np.empty((*counts.shape[:2], redraws, D))
    for d in range(D):
        tiles = np.flatnonzero(donor == d)
        keep = max(1, min(len(tiles) - 1, round(share * len(tiles))))  # else nothing varies
        drawn = np.argpartition(rng.random((redraws, len(tiles))), keep - 1, 1)[:, :keep]
        chosen = np.zeros((redraws, len(tiles)))
        np.put_along_axis(chosen, drawn, 1, 1)
        sums[..., d] = counts[..., tiles] @ chosen.T  # (2, M, B)
    return divided(*sums)
