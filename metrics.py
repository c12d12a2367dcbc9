"""Scores of a segmentation against the truth, from one sparse table of overlaps.

    table = metrics.overlap(truth, pred)              # one pass over the two label images
    metrics.match(table, threshold=0.5).tp            # functions take the table or the two images
    metrics.scores(truth, pred)["AP@0.5"]             # every score of one image
    metrics.set_scores(tables).pooled["SEG"]          # of a set: per image, mean, pooled, intervals
    metrics.track_scores(truths, preds, rows, rows)   # of a movie: TRA, LNK, CT, TF, BC(i), CTB ...

A label image holds integers from 0, the background; ids may have gaps. R is a true cell, S a
predicted one, IoU = |R & S| / |R | S|. The table lists only pairs that touch.

With neither truth nor prediction AP, precision, recall, F1, PQ, SQ, RQ, AJI, MMA and DSB are 1,
with one of the two 0. SEG, DET, OP_CSB and error_rate are NaN without true cells. "AJI" is AJI+,
and PQ counts an IoU of exactly 0.5.
"""
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)  # IoU, of the DSB score
COUNTS = ("n_true", "n_pred", "TP", "FP", "FN", "count_error")        # scores in whole numbers
RESAMPLES = 1000                                                      # of images, for intervals


# ------------------------------------------------------------------------------- table of overlaps

class Overlap(NamedTuple):
    """R true cells, S predicted cells, P pairs that share a pixel."""
    truth_ids: NDArray    # (R,) labels of the truth, ascending
    pred_ids: NDArray     # (S,) labels of the prediction, ascending
    truth_areas: NDArray  # (R,) px
    pred_areas: NDArray   # (S,) px
    rows: NDArray         # (P,) index into truth_ids
    cols: NDArray         # (P,) index into pred_ids
    counts: NDArray       # (P,) shared px

    @property
    def ious(self) -> NDArray:  # (P,)
        areas = self.truth_areas[self.rows] + self.pred_areas[self.cols]
        return self.counts / (areas - self.counts)


Labels = ArrayLike | Overlap  # the first of two label images, or the table of both


def overlap(truth: ArrayLike, pred: ArrayLike) -> Overlap:
    """Count the pixels that each true cell shares with each predicted cell, in one pass.

    >>> table = overlap([[7, 7, 0], [0, 9, 9]], [[4, 0, 0], [0, 4, 4]])
    >>> table.truth_ids.tolist(), table.pred_areas.tolist(), table.counts.tolist()
    ([7, 9], [3], [1, 2])
    """
    truth, pred = np.asarray(truth), np.asarray(pred)
    if truth.shape != pred.shape:
        raise ValueError(f"truth has shape {truth.shape}, prediction {pred.shape}, "
                         "expected the same shape")
    for side, labels in (("truth", truth), ("prediction", pred)):
        if labels.dtype.kind not in "iu":
            raise ValueError(f"{side} has type {labels.dtype}, expected integers")
    truth, pred = truth.ravel(), pred.ravel()
    # Neighbours in a row mostly carry the same two labels: count runs, times their length.
    starts = np.ones(truth.size, bool)
    np.not_equal(truth[1:], truth[:-1], out=starts[1:])
    starts[1:] |= pred[1:] != pred[:-1]
    starts = np.flatnonzero(starts)
    lengths = np.diff(starts, append=truth.size)  # px
    truth_ids, rows = _compact_ids(truth[starts], "truth")
    pred_ids, cols = _compact_ids(pred[starts], "prediction")
    joint = coo_array((lengths, (rows, cols)), (len(truth_ids), len(pred_ids))).tocsr()
    truth_areas, pred_areas = joint.sum(axis=1), joint.sum(axis=0)  # px
    joint = joint.tocoo()
    cells = (joint.row > 0) & (joint.col > 0)     # index 0 is the background on either side
    return Overlap(truth_ids[1:], pred_ids[1:], truth_areas[1:], pred_areas[1:],
                   joint.row[cells] - 1, joint.col[cells] - 1, joint.data[cells])


def _compact_ids(labels: NDArray, side: str) -> tuple[NDArray, NDArray]:
    """Ids that occur, with 0 always first, and the index of each label among them."""
    given, labels = labels, labels.astype(np.int64)  # a uint64 from 2^63 on turns negative here
    if (labels < 0).any():
        raise ValueError(f"{side} has the label {given[labels < 0][0]}, "
                         "expected labels from 0 to 2^63 - 1")
    if labels.max(initial=0) > labels.size:  # wide gaps: a table of all ids would be too large
        ids, index = np.unique(np.append(labels, 0), return_inverse=True)
        return ids, index[:-1]
    present = np.zeros(labels.max(initial=0) + 1, bool)
    present[labels] = present[0] = True
    return np.flatnonzero(present), (np.cumsum(present) - 1)[labels]


def _overlap_table(truth: Labels, pred: ArrayLike | None) -> Overlap:
    if isinstance(truth, Overlap) and pred is None:
        return truth
    if isinstance(truth, Overlap) or pred is None:
        raise ValueError("expected two label images, or one overlap table and options by name")
    return overlap(truth, pred)


# ---------------------------------------------------------------------------------- pairs of cells

class Rates(NamedTuple):
    average_precision: Any  # each a float, or an array over thresholds or images
    precision: Any
    recall: Any
    f1: Any


class Match(NamedTuple):
    """One-to-one pairs of true and predicted cells at a threshold."""
    tp: int
    fp: int
    fn: int
    pairs: NDArray  # (tp, 2) true id, predicted id
    ious: NDArray   # (tp,)

    @property
    def rates(self) -> Rates:
        return Rates(*map(float, match_rates(self.tp, self.fp, self.fn)))


def match(truth: Labels, pred: ArrayLike | None = None, threshold: float = 0.5) -> Match:
    """Pair cells one to one with IoU >= threshold, in (0, 1].

    Above 0.5 the pairs are unique; at or below, as many pairs as can be, of the largest summed IoU.

    >>> match([[1, 1, 1, 0, 2, 2]], [[5, 5, 0, 0, 0, 8]], threshold=0.6).pairs.tolist()
    [[1, 5]]
    """
    table = _overlap_table(truth, pred)
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}, expected an IoU in (0, 1]")
    ious = table.ious
    chosen = np.flatnonzero(ious >= threshold)
    if threshold <= 0.5:
        # One more pair outweighs any gain in IoU, which sums to less than `cells`.
        cells = 1 + min(len(table.truth_ids), len(table.pred_ids))
        chosen = chosen[match_one_to_one(table.rows[chosen], table.cols[chosen],
                                         cells + ious[chosen])]
    pairs = np.stack([table.truth_ids[table.rows[chosen]], table.pred_ids[table.cols[chosen]]], 1)
    tp = len(chosen)
    return Match(tp, len(table.pred_ids) - tp, len(table.truth_ids) - tp, pairs, ious[chosen])


def match_one_to_one(rows: NDArray, cols: NDArray, weights: NDArray) -> NDArray:
    """Indices of the edges, no two at one cell, whose positive weights have the largest sum.

    >>> weights = np.array([3.0, 2.0, 2.0])
    >>> match_one_to_one(np.array([0, 0, 1]), np.array([0, 1, 0]), weights).tolist()
    [1, 2]
    """
    edges, chosen = np.arange(len(rows)), []
    for _ in range(10):  # an edge heavier than its rivals on both sides together is in an optimum
        r, c, w = rows[edges], cols[edges], weights[edges]
        safe = np.flatnonzero(w >= _rival_match(r, w) + _rival_match(c, w))
        safe = safe[np.unique(r[safe], return_index=True)[1]]  # of equal edges, the first
        safe = safe[np.unique(c[safe], return_index=True)[1]]
        if len(safe) == 0:
            break
        chosen.append(edges[safe])
        edges = edges[~np.isin(r, r[safe]) & ~np.isin(c, c[safe])]
    if len(edges):  # the few that are left: a full matching, where rows may take a spare column
        row_ids, r = np.unique(rows[edges], return_inverse=True)
        col_ids, c = np.unique(cols[edges], return_inverse=True)
        spare = np.arange(len(row_ids))
        ends = np.array([np.append(r, spare), np.append(c, len(col_ids) + spare)], np.int32)
        # Each row takes one edge: 1 more for each changes nothing, but then no edge weighs 0.
        graph = coo_array((np.append(1 + weights[edges], np.ones(len(spare))), tuple(ends))).tocsr()
        _, partner = min_weight_full_bipartite_matching(graph, maximize=True)
        chosen.append(edges[partner[r] == c])
    return np.sort(np.concatenate([np.empty(0, np.int64), *chosen]))


def _rival_match(ends: NDArray, weights: NDArray) -> NDArray:
    """Weight of the heaviest other edge at the same end of each edge, 0 where there is none."""
    best, second = np.zeros((2, ends.max(initial=0) + 1))
    np.maximum.at(best, ends, weights)
    top = weights == best[ends]
    np.maximum.at(second, ends[~top], weights[~top])
    alone = top & (np.bincount(ends[top], minlength=len(best))[ends] == 1)
    return np.where(alone, second[ends], best[ends])


# --------------------------------------------------------------------- scores as ratios of sums

def _score_sums(table: Overlap) -> NDArray:
    """Sums (19,) whose ratios are the scores, and which add up over images."""
    rows, cols, counts, ious = table.rows, table.cols, table.counts, table.ious
    n_true, n_pred = len(table.truth_ids), len(table.pred_ids)
    area = table.truth_areas.sum() + table.pred_areas.sum()
    matches = [match(table, threshold=t) for t in THRESHOLDS]
    # AJI+ maximises summed IoU; 2^-40 of the shared pixels decides ties, not the order of ids.
    aji_overlap = counts[match_one_to_one(rows, cols, ious + counts * 2.0**-40)].sum()
    mma_overlap = counts[match_one_to_one(rows, cols, counts.astype(float))].sum()
    covers = 2 * counts > table.truth_areas[rows]         # at most one S covers more than half of R
    detects = np.bincount(cols[covers], minlength=n_pred)  # (S,) true cells that each S detects
    splits = np.maximum(detects - 1, 0).sum()
    aogm = 5 * splits + 10 * (n_true - covers.sum()) + (detects == 0).sum()
    return np.array([n_true, n_pred, matches[0].ious.sum(), area, area - counts.sum(), aji_overlap,
                     mma_overlap, ious[covers].sum(), aogm, *(m.tp for m in matches)], float)


def _score_ratios(sums: NDArray) -> dict[str, NDArray]:
    """Scores of sums ([[runs,] rows,] 19), by name: ([rows[, runs]])."""
    (n_true, n_pred, paired_iou, area, union, aji_overlap, mma_overlap, covered_iou,
     aogm) = sums.T[:9]
    at = {t: match_rates(tp, n_pred - tp, n_true - tp) for t, tp in zip(THRESHOLDS, sums.T[9:])}
    tp, half, empty = sums.T[9], at[0.5], (n_true + n_pred == 0).astype(float)
    seg_score = _score_ratio(covered_iou, n_true, np.nan)
    det_score = 1 - np.minimum(_score_ratio(aogm, 10 * n_true, np.nan), 1)
    return {**{f"AP@{t:g}": rates.average_precision for t, rates in at.items()},
            "precision": half.precision, "recall": half.recall, "F1": half.f1,
            "TP": tp, "FP": n_pred - tp, "FN": n_true - tp, "n_true": n_true, "n_pred": n_pred,
            "PQ": _score_ratio(paired_iou, (n_true + n_pred) / 2, empty), "RQ": half.f1,
            "SQ": _score_ratio(paired_iou, tp, empty),
            "AJI": _score_ratio(aji_overlap, area - aji_overlap, empty),
            "MMA": _score_ratio(mma_overlap, union, empty),
            "SEG": seg_score, "DET": det_score, "OP_CSB": (seg_score + det_score) / 2,
            "DSB": np.mean([rates.average_precision for rates in at.values()], axis=0),
            "error_rate": _score_ratio(n_true + n_pred - 2 * tp, n_true, np.nan),
            "count_error": np.abs(n_pred - n_true)}


def match_rates(tp: ArrayLike, fp: ArrayLike, fn: ArrayLike) -> Rates:
    """AP = tp / (tp + fp + fn), precision, recall and F1 from counts, element by element.

    Without any count they are 1; otherwise 0 where a rate would divide by 0.

    >>> match_rates([6, 0, 0], [2, 3, 0], [0, 0, 0]).average_precision.tolist()
    [0.75, 0.0, 1.0]
    """
    tp, fp, fn = np.asarray(tp), np.asarray(fp), np.asarray(fn)
    empty = (tp + fp + fn == 0).astype(float)
    return Rates(_score_ratio(tp, tp + fp + fn, empty), _score_ratio(tp, tp + fp, empty),
                 _score_ratio(tp, tp + fn, empty), _score_ratio(2 * tp, 2 * tp + fp + fn, empty))


def _score_ratio(part: NDArray, whole: NDArray, otherwise: ArrayLike) -> NDArray:
    """part / whole, and `otherwise` where whole is 0."""
    out = np.array(np.broadcast_to(otherwise, np.shape(whole)), float)
    return np.divide(part, whole, out=out, where=np.asarray(whole) > 0)


# ------------------------------------------------------------------------------ one image, one set

def scores(truth: Labels, pred: ArrayLike | None = None) -> dict[str, float]:
    """Every score of one image.

    AP@0.5 ... AP@0.95; at 0.5 precision, recall, F1, TP, FP, FN, PQ, SQ, RQ, error_rate =
    (FP + FN) / n_true; n_true, n_pred, count_error = |n_pred - n_true|; AJI (AJI+); MMA, paired for
    the largest overlap, shared pixels / pixels of any cell; SEG, DET, OP_CSB; DSB, the mean AP over
    0.5 ... 0.95 (Data Science Bowl 2018).

    >>> one = scores([[1, 1, 1, 1], [0, 0, 2, 2]], [[3, 3, 3, 0], [0, 0, 0, 0]])
    >>> one["AP@0.75"], one["AP@0.8"], one["PQ"], one["FN"], one["MMA"], one["DSB"]
    (0.5, 0.0, 0.5, 1, 0.5, 0.3)
    """
    return _plain_scores(_score_ratios(_score_sums(_overlap_table(truth, pred))))


class SetScores(NamedTuple):
    images: list[dict[str, float]]                 # `scores` of each image
    mean: dict[str, float]                         # over the images on which the score is defined
    pooled: dict[str, float]                       # cells and pixels of all images together
    mean_interval: dict[str, tuple[float, float]]  # bootstrap over images
    pooled_interval: dict[str, tuple[float, float]]


def set_scores(tables: Iterable[Overlap]) -> SetScores:
    """Every score of a set: image by image, their mean, pooled, and 95 % intervals of both.

    SEG, DET and OP_CSB of a set are the pooled ones by definition; DSB and count_error are means
    over images and not among the pooled; AP is reported both ways.

    >>> both = set_scores([overlap([[1, 2]], [[1, 2]]), overlap([[1, 0]], [[0, 0]])])
    >>> both.mean["AP@0.5"], round(both.pooled["AP@0.5"], 3), both.mean_interval["AP@0.5"]
    (0.5, 0.667, (0.0, 1.0))
    """
    return run_scores([tables])


def run_scores(runs: Iterable[Iterable[Overlap]]) -> SetScores:
    """Scores of several runs on the same images, such as seeds: means over runs.

    Intervals are over images: a resample draws an image with what every run made of it.

    >>> right, half = overlap([[1, 2]], [[1, 2]]), overlap([[1, 2]], [[1, 0]])
    >>> run_scores([[right, half], [half, half]]).mean["AP@0.5"]
    0.625
    """
    rows = [[_score_sums(table) for table in tables] for tables in runs]
    if not any(rows):
        raise ValueError("no image to score, expected at least one overlap table")
    if len({len(row) for row in rows}) > 1:
        raise ValueError(f"{', '.join(str(len(row)) for row in rows)} images to score, "
                         "expected as many of each run")
    sums = np.array(rows)                                     # (runs, images, 19)

    def over_runs(sums: NDArray) -> dict[str, NDArray]:       # (runs[, rows], 19) -> ([rows])
        return {name: np.mean(values, -1) for name, values in _score_ratios(sums).items()}

    columns = over_runs(sums)                                 # name: (images,)
    images = [_plain_scores({name: column[i] for name, column in columns.items()})
              for i in range(sums.shape[1])]
    defined = {name: column[~np.isnan(column)] for name, column in columns.items()}
    mean = {name: float(column.mean()) if len(column) else np.nan
            for name, column in defined.items()}
    mean_interval = {name: bootstrap_scores(column) for name, column in columns.items()}
    # How often a resample draws an image, times its sums: all resamples of all scores at once.
    share = np.full(len(images), 1 / len(images))
    drawn = np.random.default_rng(0).multinomial(len(images), share, RESAMPLES)  # (n, images)
    pooled, resampled = _plain_scores(over_runs(sums.sum(1))), over_runs(drawn @ sums)
    for name in ("DSB", "count_error"):
        del pooled[name]
    return SetScores(images, mean, pooled, mean_interval,
                     {name: _score_interval(resampled[name]) for name in pooled})


def bootstrap_scores(values: ArrayLike, statistic: Callable = np.mean, n: int = RESAMPLES,
                     seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic over images (Efron, 1979): (low, high).

    values : (images,) or (images, ...); an image with a NaN is left out.
    statistic : callable(resampled, axis=1), from (n, images, ...) to (n,).

    >>> bootstrap_scores([0.5, 0.5, 0.5])
    (0.5, 0.5)
    >>> low, high = bootstrap_scores(np.arange(101))
    >>> low < 50 < high
    True
    """
    values = np.asarray(values, float)
    values = values[~np.isnan(values).any(axis=tuple(range(1, values.ndim)))]
    if len(values) == 0:
        return np.nan, np.nan
    rng, images = np.random.default_rng(seed), len(values)
    block = max(1, 2**22 // values.size)  # resamples at once: about 32 MB
    resampled = [statistic(values[rng.integers(0, images, (min(block, n - done), images))], axis=1)
                 for done in range(0, n, block)]
    return _score_interval(np.concatenate(resampled), level)


def _score_interval(resampled: NDArray, level: float = 0.95) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}, expected a coverage in (0, 1)")
    resampled = resampled[~np.isnan(resampled)]
    if len(resampled) == 0:
        return np.nan, np.nan
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _plain_scores(values: dict[str, Any]) -> dict[str, float]:
    return {name: round(float(value)) if name in COUNTS else float(value)
            for name, value in values.items()}


# -------------------------------------------------------------------------------- types of cells

def match_centres(truth: ArrayLike, pred: ArrayLike, reach: float = 12.0) -> NDArray:
    """Pairs (n, 2) of places in truth (R, 2) and pred (S, 2), as HoVer-Net's authors match them at
    40 x: the assignment of the least summed distance, then pairs no further apart than `reach` px.

    >>> match_centres([[0, 0], [50, 50]], [[3, 4], [90, 90], [50, 49]]).tolist()
    [[0, 0], [1, 2]]
    """
    truth, pred = np.reshape(truth, (-1, 2)), np.reshape(pred, (-1, 2))
    apart = np.hypot(*(truth[:, None, axis] - pred[None, :, axis] for axis in (0, 1)))
    rows, cols = linear_sum_assignment(apart)
    near = apart[rows, cols] <= reach
    return np.stack((rows[near], cols[near]), 1)


def type_scores(paired_true: NDArray, paired_found: NDArray, missed: NDArray, extra: NDArray,
                types: Iterable[Any]) -> tuple[float, dict[Any, float]]:
    """F_d, and F_c of each type (Graham et al., Medical Image Analysis 2019, as in their code).

    F_d = 2 TP / (2 TP + FP + FN) of detection. F_c = 2 TP / (2 TP + 2 (FP + FN) + FP_d + FN_d) of a
    type: among pairs its right ones, those called so wrongly and those called otherwise; of the
    type among found cells without partner and among true ones without. PanNuke uses the same.

    paired_true, paired_found : types (n,) of the cells of each pair; missed : of true cells alone;
    extra : of found cells alone. A type that is nowhere has NaN.

    >>> type_scores(np.array([1, 1, 2]), np.array([1, 2, 2]), np.array([1]), np.array([]), [1, 2])
    (0.8571428571428571, {1: 0.4, 2: 0.5})
    """
    paired = len(paired_true)
    whole = 2 * paired + len(missed) + len(extra)
    by_type = {}
    for one in types:
        true, found = paired_true == one, paired_found == one
        right, wrong = np.sum(true & found), np.sum(true != found)
        alone = np.sum(missed == one) + np.sum(extra == one)
        total = 2 * right + 2 * wrong + alone
        by_type[one] = float(2 * right / total) if total else np.nan
    return (2 * paired / whole if whole else np.nan), by_type


def type_f1(true: NDArray, found: NDArray, types: Iterable[Any]) -> list[float]:
    """F1 of each type among the same cells (n,); NaN for one that is nowhere.

    >>> type_f1(np.array([1, 1, 2]), np.array([1, 2, 2]), [1, 2, 3])[:2]
    [0.6666666666666666, 0.6666666666666666]
    """
    counts = [(np.sum((true == one) & (found == one)), np.sum(true == one) + np.sum(found == one))
              for one in types]
    return [float(2 * both / whole) if whole else np.nan for both, whole in counts]


# -------------------------------------------------------------------------- single scores by name

def roc_area(right: ArrayLike, score: ArrayLike) -> float:
    """Area under the ROC: how often a right one scores above a wrong one; ties count half.

    >>> roc_area([True, True, False], [0.9, 0.4, 0.4])
    0.75
    """
    right, score = np.asarray(right, bool), np.asarray(score, float)
    values, index, count = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[index]      # of equal ones the mean, from 1
    yes, no = right.sum(), (~right).sum()
    return float((rank[right].sum() - yes * (yes + 1) / 2) / (yes * no)) if yes and no else np.nan


def calibration_error(right: ArrayLike, probability: ArrayLike) -> float:
    """Expected calibration error: over ten bins of equal width, the gap between mean probability
    and share of right ones, weighted by their number (Guo et al., ICML 2017).

    >>> calibration_error([True, False], [0.75, 0.75])
    0.25
    """
    right, probability = np.asarray(right, float), np.asarray(probability, float)
    chosen = np.minimum((probability * 10).astype(int), 9)
    gaps = np.abs(np.bincount(chosen, right - probability, 10))
    return float(gaps.sum() / len(right)) if len(right) else np.nan


def average_precision(truth: Labels, pred: ArrayLike | None = None,
                      thresholds: ArrayLike = THRESHOLDS) -> NDArray:
    """AP(t) = tp / (tp + fp + fn) of one image at each threshold, or at a single one.

    >>> average_precision([[1, 1, 1, 1, 2]], [[1, 1, 1, 0, 2]], [0.5, 0.75, 0.8]).round(3).tolist()
    [1.0, 1.0, 0.333]
    """
    table = _overlap_table(truth, pred)
    counts = [match(table, threshold=t)[:3] for t in np.ravel(thresholds)]
    tp, fp, fn = np.array(counts).reshape(-1, 3).T
    return match_rates(tp, fp, fn).average_precision.reshape(np.shape(thresholds))[()]


class PanopticQuality(NamedTuple):
    pq: float  # = sq * rq
    sq: float  # mean IoU of the pairs at 0.5
    rq: float  # F1 at 0.5


def panoptic_quality(truth: Labels, pred: ArrayLike | None = None) -> PanopticQuality:
    """Summed IoU of the pairs at 0.5 / (tp + fp/2 + fn/2) (Kirillov et al., 2019, eq. 1-2).

    An IoU of exactly 0.5 is a pair here, as everywhere in this file; there it has to be above.

    >>> panoptic_quality([[1, 1, 1, 1, 2]], [[1, 1, 1, 0, 0]])
    PanopticQuality(pq=0.5, sq=0.75, rq=0.6666666666666666)
    """
    every = scores(truth, pred)
    return PanopticQuality(every["PQ"], every["SQ"], every["RQ"])


def aji(truth: Labels, pred: ArrayLike | None = None) -> float:
    """AJI+: paired for the largest summed IoU, shared px / (px of the pairs + px of the unpaired).

    The AJI of Kumar et al. (2017) lets a prediction serve several true cells; HoVer-Net's AJI+
    (Graham et al., 2019) pairs one to one, and does not depend on the order of cells.

    >>> aji([[1, 1, 1, 1, 2]], [[5, 5, 5, 0, 0]])
    0.6
    """
    return scores(truth, pred)["AJI"]


def seg(truths: Iterable, preds: Iterable | None = None) -> float:
    """SEG of the Cell Tracking Challenge, over all true cells of all frames.

    The mean IoU with the prediction that covers more than half of the cell, 0 where there is none.
    truths, preds : label images of the frames, or overlap tables and None; or a single frame.

    >>> seg([[[1, 1, 1, 1]], [[1, 1, 0, 2]]], [[[9, 9, 9, 0]], [[4, 0, 0, 2]]])  # 3/4, half: 0, 1
    0.5833333333333334
    """
    return _score_frames(truths, preds)["SEG"]


def det(truths: Iterable, preds: Iterable | None = None) -> float:
    """DET of the Cell Tracking Challenge: 1 - min(AOGM-D, 10 R) / 10 R over all frames.

    AOGM-D = 5 NS + 10 FN + 1 FP (Matula et al., 2015); NS grows by k - 1 where one prediction
    detects k true cells.

    >>> det([[[1, 1, 2, 2]]], [[[7, 7, 7, 7]]])  # merged: one split is missing, 1 - 5 / 20
    0.75
    """
    return _score_frames(truths, preds)["DET"]


def op_csb(truths: Iterable, preds: Iterable | None = None) -> float:
    """(SEG + DET) / 2, of the pooled values.

    >>> op_csb([[[1, 1, 2, 2]]], [[[7, 7, 7, 7]]])  # SEG (1/2 + 1/2) / 2, DET 3/4
    0.625
    """
    return _score_frames(truths, preds)["OP_CSB"]


def _score_frames(truths: Iterable, preds: Iterable | None) -> dict[str, float]:
    if isinstance(truths, Overlap) or (isinstance(truths, np.ndarray) and truths.ndim == 2):
        truths, preds = [truths], None if preds is None else [preds]
    total = sum((_score_sums(table) for table in _overlap_tables(truths, preds)),
                np.zeros(9 + len(THRESHOLDS)))
    return _plain_scores(_score_ratios(total))


# ------------------------------------------------------------------------------------------ tracks

Vertex = tuple[int, int]                   # a cell in a frame: frame, label
Edges = dict[tuple[Vertex, Vertex], bool]  # earlier and later; from a mother, or over a gap


def track_scores(truths: Iterable, preds: Iterable | None = None,
                 truth_tracks: ArrayLike | None = None, pred_tracks: ArrayLike | None = None
                 ) -> dict[str, float]:
    """Every score of a tracked movie, as the Cell Tracking Challenge defines them.

    TRA = 1 - AOGM / AOGM of no answer, and LNK the same of edges alone; AOGM = 5 NS + 10 FN + FP +
    ED + 1.5 EA + EC, whose counts are among the scores: missing splits, cells missing and too many,
    edges too many, missing, and of the wrong kind. CT, the share of tracks that are right from end
    to end (an F1); TF, the longest stretch of a track that one predicted track follows; BC(i), F1
    of divisions up to i = 0 ... 3 frames off; SEG, DET, CSB = (SEG + DET) / 2, CTB = (SEG + TRA) /
    2. NaN where the truth has no cell, no edge or no division.

    truths, preds : label images of the frames, whose labels are tracks, or overlap tables and None.
    truth_tracks, pred_tracks : (N, 4) label, first frame, last frame, parent (0: none), as in
        man_track.txt; None: from the labels, without parents.

    >>> frames = [[[1, 1, 0, 0]], [[1, 1, 0, 0]], [[2, 0, 0, 3]]]
    >>> lineage = [(1, 0, 1, 0), (2, 2, 2, 1), (3, 2, 2, 1)]
    >>> one = track_scores(frames, frames, lineage, [(1, 0, 1, 0), (2, 2, 2, 1), (3, 2, 2, 0)])
    >>> one["EA"], round(one["LNK"], 3), one["DET"], one["CT"], one["BC(0)"]
    (1, 0.667, 1.0, 1.0, 0.0)
    """
    tables = _overlap_tables(truths, preds)
    true_ids = [table.truth_ids.tolist() for table in tables]
    pred_ids = [table.pred_ids.tolist() for table in tables]
    truth_tracks = _score_tracks(truth_tracks, true_ids, "truth")
    pred_tracks = _score_tracks(pred_tracks, pred_ids, "prediction")
    found: dict[Vertex, Vertex] = {}  # true cell -> the predicted one that covers more than half
    for t, table in enumerate(tables):
        covers = 2 * table.counts > table.truth_areas[table.rows]
        found |= {(t, true_ids[t][i]): (t, pred_ids[t][j]) for i, j in
                  zip(table.rows[covers].tolist(), table.cols[covers].tolist())}
    detects = Counter(found.values())
    alone = {true: answer for true, answer in found.items() if detects[answer] == 1}
    true_links = _track_edges(true_ids, truth_tracks)
    counts = {"NS": len(found) - len(detects), "FN": sum(map(len, true_ids)) - len(found),
              "FP": sum(map(len, pred_ids)) - len(detects),
              **_link_corrections(true_links, _track_edges(pred_ids, pred_tracks), alone)}
    frames = _score_frames(tables, None)
    cells, links = 10.0 * sum(map(len, true_ids)), 1.5 * len(true_links)
    wrong_links = counts["ED"] + 1.5 * counts["EA"] + counts["EC"]
    aogm = 5 * counts["NS"] + 10 * counts["FN"] + counts["FP"] + wrong_links
    tra = 1 - min(aogm, cells + links) / (cells + links) if cells else np.nan
    # for each true track the predicted label that finds its cell and no other, 0 without one
    followed: dict[int, dict[int, int]] = {k: {} for k in truth_tracks[:, 0].tolist()}
    for t, ids in enumerate(true_ids):
        for k in ids:
            followed[k][t] = alone.get((t, k), (t, 0))[1]
    branching = {f"BC({late})": _branching_score(followed, truth_tracks, pred_tracks, late)
                 for late in range(4)}
    return {"SEG": frames["SEG"], "DET": frames["DET"], "TRA": tra,
            "LNK": 1 - min(wrong_links, links) / links if links else np.nan,
            "CT": _complete_tracks(followed, truth_tracks, pred_tracks),
            "TF": _track_fractions(followed, truth_tracks), **branching, "CSB": frames["OP_CSB"],
            "CTB": (frames["SEG"] + tra) / 2, "AOGM": aogm, **counts}


def _overlap_tables(truths: Iterable, preds: Iterable | None) -> list[Overlap]:
    truths = list(truths)
    preds = [None] * len(truths) if preds is None else list(preds)
    if len(truths) != len(preds):
        raise ValueError(f"{len(truths)} frames of truth, {len(preds)} of prediction, "
                         "expected as many")
    return [_overlap_table(truth, pred) for truth, pred in zip(truths, preds)]


def _score_tracks(given: ArrayLike | None, frames: list[list[int]], side: str) -> NDArray:
    """(N, 4) tracks; frames without the cell, which a crop may cut off, are allowed."""
    seen: dict[int, list[int]] = {}
    for t, ids in enumerate(frames):
        for label in ids:
            seen.setdefault(label, [t, t])[1] = t
    if given is None:
        return np.array([(k, *seen[k], 0) for k in sorted(seen)], np.int64).reshape(-1, 4)
    tracks = np.asarray(given, np.int64).reshape(-1, 4)
    spans = {row[0]: row[1:3] for row in tracks.tolist()}
    if len(spans) < len(tracks):
        raise ValueError(f"{side}: {len(tracks)} tracks, {len(spans)} labels; expected a row each")
    for label, (first, last) in seen.items():
        begin, end = spans.get(label, (0, -1))
        if not begin <= first <= last <= end:
            raise ValueError(f"{side}: label {label} is in frames {first} to {last}, its track "
                             f"{f'from {begin} to {end}' if label in spans else 'is missing'}; "
                             "expected a row for each label, with frames counted from 0")
    orphans = set(tracks[:, 3].tolist()) - set(spans) - {0}
    if orphans:
        raise ValueError(f"{side}: parent {min(orphans)} is no track; expected a label or 0")
    return tracks


def _track_edges(frames: list[list[int]], tracks: NDArray) -> Edges:
    """Links of the cells of all frames (Matula et al., 2015)."""
    edges: Edges = {}
    first: dict[int, int] = {}                          # frame of each label
    last: dict[int, int] = {}
    for t, ids in enumerate(frames):
        for k in ids:
            if last.get(k) == t - 1:
                edges[(t - 1, k), (t, k)] = False
            first.setdefault(k, t)
            last[k] = t
    return edges | {((last[parent], parent), (first[k], k)): True
                    for k, _, _, parent in tracks.tolist() if parent in last and k in first}


def _link_corrections(truth: Edges, pred: Edges, alone: dict[Vertex, Vertex]) -> dict[str, int]:
    """ED, EA, EC: what turns the links between predicted cells that find one true cell alone into
    the true links."""
    true_of = {answer: true for true, answer in alone.items()}
    answers = {(true_of[a], true_of[b]): division for (a, b), division in pred.items()
               if a in true_of and b in true_of}
    both = truth.keys() & answers.keys()
    return {"ED": len(answers) - len(both), "EA": len(truth) - len(both),
            "EC": sum(truth[edge] != answers[edge] for edge in both)}


def _complete_tracks(followed: dict, truth_tracks: NDArray, pred_tracks: NDArray) -> float:
    """CT: tracks that one predicted track follows from the first frame to the last, as F1."""
    spans = {row[0]: row[1:3] for row in pred_tracks.tolist()}
    complete = 0
    for k, first, last, _ in truth_tracks.tolist():
        answers = set(followed[k].values())
        complete += len(answers) == 1 and spans.get(*answers) == [first, last]
    tracks = len(truth_tracks) + len(pred_tracks)
    return 2 * complete / tracks if tracks else np.nan


def _track_fractions(followed: dict, truth_tracks: NDArray) -> float:
    """TF, over true tracks that are followed at all.

    As the challenge counts: a predicted track that follows one whole is not asked about further
    ones, in the order of their labels.
    """
    longest: dict[int, dict[int, float]] = {}              # predicted track -> true one -> share
    for k, first, last, _ in truth_tracks.tolist():
        run, before = 0, 0
        for t in range(first, last + 1):
            answer = followed[k].get(t, 0)
            run = run + 1 if answer == before else 1
            if answer:
                shares = longest.setdefault(answer, {})
                shares[k] = max(shares.get(k, 0.0), run / (last - first + 1))
            before = answer
    best: dict[int, float] = {}
    for _, shares in sorted(longest.items()):
        for k, share in sorted(shares.items()):
            if best.get(k) == 1:
                continue
            best[k] = max(best.get(k, 0.0), share)
            if share == 1:
                break
    return float(np.mean(list(best.values()))) if best else 0.0


def _branching_score(followed: dict, truth_tracks: NDArray, pred_tracks: NDArray, late: int
                     ) -> float:
    """BC(i): F1 of divisions; one is right if mother and daughters are found, at most i frames
    off."""
    def born(tracks: NDArray) -> dict[int, tuple[int, dict[int, int]]]:
        """Mother -> its last frame, and the first frames of its daughters."""
        rows = tracks.tolist()
        last = {row[0]: row[2] for row in rows}
        daughters: dict[int, dict[int, int]] = {}
        for k, first, _, parent in rows:
            if parent:
                daughters.setdefault(parent, {})[k] = first
        return {k: (last[k], each) for k, each in daughters.items() if len(each) > 1}

    true, answered, right = born(truth_tracks), born(pred_tracks), 0
    for mother, (end, daughters) in true.items():
        for answer, (last, others) in answered.items():
            if len(others) != len(daughters) or abs(end - last) > late \
                    or followed[mother].get(min(end, last)) != answer:
                continue
            met: set[int] = set()
            for k, begin in daughters.items():
                for other, first in others.items():
                    if abs(begin - first) <= late and followed[k].get(max(begin, first)) == other:
                        met.add(other)
                        break
            right += len(met) == len(daughters)
    return 2 * right / (len(true) + len(answered)) if true else np.nan
