"""metrics.py against what one can work out on paper, slow oracles, invariants, and three other
programs."""
import doctest
import inspect
import itertools
import math
import tracemalloc

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import linear_sum_assignment

import metrics
from metrics import Overlap, match, overlap, scores, set_scores

AP = [f"AP@{t:g}" for t in metrics.THRESHOLDS]
UNIT = [*AP, "precision", "recall", "F1", "PQ", "SQ", "RQ", "AJI", "MMA", "DSB"]
PER_TRUTH = ["SEG", "DET", "OP_CSB"]
LABELS = arrays(np.int32, (6, 8), elements=st.integers(0, 4))


def image(*boxes, shape=(20, 40)):
    """Boxes (top, left, height, width) in px, labelled 1, 2, ... in this order."""
    labels = np.zeros(shape, np.int32)
    for i, (top, left, height, width) in enumerate(boxes, 1):
        labels[top:top + height, left:left + width] = i
    return labels


def random_pair(rng, size=32):
    """Boxes, and the same moved a little, one merged or lost, one split, one new; row 0 is
    background."""
    truth = np.zeros((size, size), np.uint16)
    for i in range(1, rng.integers(3, 12)):
        (top, left), (height, width) = rng.integers(1, size - 6, 2), rng.integers(3, 12, 2)
        truth[top:top + height, left:left + width] = i
    pred = np.roll(truth, rng.integers(-2, 3, 2), axis=(0, 1))
    ids = rng.permutation(np.unique(truth[truth > 0]))
    pred[pred == ids[0]] = rng.choice([0, ids[-1]])            # lost or merged
    columns = np.flatnonzero((pred == ids[-1]).any(0))
    if len(columns):                                           # split
        right = np.arange(size) >= rng.choice(columns)
        pred[(pred == ids[-1]) & right] = 30
    top, left = rng.integers(1, size - 4, 2)
    pred[top:top + 4, left:left + 4] = 31                      # new
    truth[0] = pred[0] = 0
    return truth, pred


def same(a, b, tolerance=1e-12):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name] == pytest.approx(b[name], abs=tolerance, nan_ok=True), name


# ----------------------------------------------------------------------------------------- on paper

@pytest.mark.smoke
def test_docstrings_run_and_every_public_function_has_one():
    result = doctest.testmod(metrics)
    public = [f for name, f in inspect.getmembers(metrics, inspect.isfunction) if name[0] != "_"]
    public = [f for f in public if f.__module__ == "metrics"]
    assert result.failed == 0 and len(public) >= 13 and all(">>>" in f.__doc__ for f in public)


@pytest.mark.smoke
def test_shifted_square():
    """10 x 10 moved by 2: 80 shared of 120."""
    result = scores(image((2, 2, 10, 10)), image((2, 4, 10, 10)))
    for name in ("PQ", "SQ", "AJI", "MMA", "SEG"):
        assert result[name] == pytest.approx(2 / 3)
    assert result["DSB"] == pytest.approx(0.4)  # found at .5, .55, .6, .65
    assert (result["AP@0.65"], result["AP@0.7"], result["DET"], result["error_rate"]) == (1, 0, 1,
                                                                                          0)


def test_shifted_disc():
    """Two discs of radius r at distance d share 2 r^2 acos(d / 2r) - d/2 sqrt(4r^2 - d^2)."""
    r, d = 60, 40
    y, x = np.mgrid[-80:81, -80:121]
    lens = 2 * r**2 * math.acos(d / (2 * r)) - d / 2 * math.sqrt(4 * r**2 - d**2)
    iou = match((y**2 + x**2 <= r**2).astype(int), (y**2 + (x - d)**2 <= r**2).astype(int),
                0.1).ious
    assert iou == pytest.approx([lens / (2 * math.pi * r**2 - lens)], rel=5e-3)


def test_split_in_two_halves():
    """Each half has IoU exactly 1/2: one pair at 0.5; neither covers more than half: no SEG, no
    DET."""
    result = scores(image((0, 0, 10, 10)), image((0, 0, 10, 5), (0, 5, 10, 5)))
    assert (result["TP"], result["FP"], result["FN"]) == (1, 1, 0)
    assert (result["AP@0.5"], result["AP@0.55"]) == (0.5, 0)
    assert result["PQ"] == pytest.approx(0.5 / 1.5) and result["AJI"] == pytest.approx(50 / 150)
    assert result["MMA"] == 0.5 and result["SEG"] == 0
    assert result["DET"] == 0  # min(10 FN + 2 FP, 10) / 10


@pytest.mark.smoke
def test_split_seven_to_three():
    result = scores(image((0, 0, 10, 10)), image((0, 0, 10, 7), (0, 7, 10, 3)))
    # one FP of weight 1
    assert result["SEG"] == pytest.approx(0.7) and result["DET"] == pytest.approx(0.9)
    assert (
        result["OP_CSB"] == pytest.approx(0.8)
        and result["error_rate"] == 1
        and result["count_error"] == 1
    )


@pytest.mark.smoke
def test_three_merged():
    """One prediction over three cells of 40, 30 and 30 px: two splits of weight 5 out of 3 x 10."""
    truth, pred = image((0, 0, 10, 4), (0, 4, 10, 3), (0, 7, 10, 3)), image((0, 0, 10, 10))
    result = scores(truth, pred)
    assert result["SEG"] == pytest.approx((0.4 + 0.3 + 0.3)
                                          / 3) and result["DET"] == pytest.approx(2 / 3)
    assert (result["TP"], result["FN"], result["AP@0.5"]) == (0, 3, 0)
    assert result["AJI"] == pytest.approx(40 / (100 + 60)) and result["MMA"] == pytest.approx(0.4)


def test_pairing_takes_the_optimum_not_the_best_pair_first():
    """R1 = [0, 10), R2 = [10, 14), S1 = [3, 13), S2 = [0, 3): IoU 7/13, and 3/10 + 3/11 is more
    than that."""
    truth = image((0, 0, 1, 10), (0, 10, 1, 4), shape=(1, 14))
    pred = image((0, 3, 1, 10), (0, 0, 1, 3), shape=(1, 14))
    assert match(truth, pred, 0.5).pairs.tolist() == [[1, 1]]
    found = match(truth, pred, 0.25)
    assert found.pairs.tolist() == [[1, 2], [2, 1]] and found.ious == pytest.approx([3 / 10,
                                                                                     3 / 11])
    assert metrics.aji(truth, pred) == pytest.approx(6 / (27 - 6))  # both pairs: 6 px of 14 + 13
    assert scores(truth, pred)["MMA"] == pytest.approx(7 / 14)  # the one pair of 7 px


def test_equal_iou_goes_to_the_larger_overlap():
    """S1 = [0, 30), R = [20, 50), S2 = [30, 120): IoU 10/50 and 20/100, which no order of ids may
    decide."""
    truth = image((0, 20, 1, 30), shape=(1, 120))
    pred = image((0, 0, 1, 30), (0, 30, 1, 90), shape=(1, 120))
    for labels in (pred, np.array([0, 2, 1])[pred]):
        assert metrics.aji(truth, labels) == pytest.approx(20 / (30 + 120 - 20))


@pytest.mark.smoke
def test_seg_and_det_are_pooled_over_frames():
    """1 of 1 cells in one frame and 0 of 3 in the other: 1/4, not the mean of 1 and 0."""
    truths = [image((0, 0, 4, 4)), image((0, 0, 4, 4), (8, 8, 4, 4), (14, 0, 4, 4))]
    preds = [truths[0], np.zeros_like(truths[1])]
    assert metrics.seg(truths, preds) == metrics.det(truths, preds) == metrics.op_csb(truths,
                                                                                      preds) == 0.25
    assert metrics.seg(map(overlap, truths, preds)) == 0.25
    # one frame
    assert metrics.seg(truths[0], truths[0]) == metrics.seg(overlap(truths[0], truths[0])) == 1


def test_det_false_positives_never_cost_more_than_everything():
    """20 false positives of weight 1 against one truth of weight 10, found."""
    truth = image((0, 0, 2, 2))
    pred = image((0, 0, 2, 2), *[(4 + 4 * (i // 10), 4 * (i % 10), 2, 2) for i in range(20)],
                 shape=(20, 40))
    assert metrics.det([truth], [pred]) == 0
    # pooled: 20 of 100
    assert metrics.det([truth] * 10, [truth] * 9 + [pred]) == pytest.approx(0.8)


def test_average_precision_of_a_set_is_reported_twice():
    hit, miss = image((0, 0, 4, 4)), image((0, 0, 4, 4), (8, 8, 4, 4), (14, 0, 4, 4))
    result = set_scores([overlap(hit, hit), overlap(miss, 0 * miss)])
    assert result.mean["AP@0.5"] == 0.5 and result.pooled["AP@0.5"] == 0.25
    assert result.mean["count_error"] == 1.5 and not {"DSB", "count_error"} & result.pooled.keys()


@pytest.mark.smoke
def test_empty_sides():
    none, one = image(), image((0, 0, 4, 4))
    for truth, pred, value in ((none, none, 1), (one, none, 0), (none, one, 0)):
        result = scores(truth, pred)
        assert {name: result[name] for name in UNIT} == dict.fromkeys(UNIT, value)
        assert tuple(metrics.panoptic_quality(truth, pred)) == (value,) * 3
        assert match(truth, pred).rates == (value,) * 4
        assert all(np.isnan(result[name]) != (truth is one) for name in PER_TRUTH + ["error_rate"])
    assert (
        scores(one, none)["SEG"] == scores(one, none)["DET"] == 0
        and scores(one, none)["error_rate"] == 1
    )
    assert all(np.isnan(score([none], [one])) for score in (metrics.seg, metrics.det,
                                                            metrics.op_csb))
    assert metrics.seg([none, one], [one, one]) == 1  # a frame without truth leaves the set defined
    result = set_scores([overlap(none, one), overlap(one, one)])
    assert result.mean["SEG"] == 1 and result.mean_interval["SEG"] == (1, 1)
    assert result.pooled_interval["SEG"] == (1, 1)
    assert np.isnan(set_scores([overlap(none, one)]).mean["SEG"])
    assert scores(np.zeros((0, 5), int), np.zeros((0, 5), int))["F1"] == 1  # no pixel at all


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", ">u2", "int32", "uint32", "uint64",
                                   "int64"])
def test_types_of_labels(dtype):
    truth, pred = random_pair(np.random.default_rng(1))
    same(scores(truth.astype(dtype), pred), scores(truth, pred))
    same(scores(truth, pred.astype(dtype)), scores(truth, pred))


def test_ids_with_gaps_come_back_as_they_were():
    truth, pred = image((0, 0, 4, 4), (8, 8, 4, 4)), image((8, 8, 4, 4), (0, 0, 4, 4))
    truth = np.array([0, 2**62, 5])[truth]
    pred = np.array([0, 70_000, 9], np.uint64)[pred]
    assert match(truth, pred).pairs.tolist() == [[5, 70_000], [2**62, 9]]
    assert overlap(truth, pred).truth_ids.tolist() == [5, 2**62]


def test_no_background_at_all():
    truth = np.repeat([[1, 1, 2, 2]], 3, axis=0)
    assert scores(truth, 3 - truth)["PQ"] == 1 and scores(truth, np.ones_like(truth))["SEG"] == 0.5


@pytest.mark.smoke
def test_errors_say_what_was_expected():
    labels = image((0, 0, 4, 4))
    for bad, words in (((labels, labels[:5]), r"\(20, 40\).*\(5, 40\)"),
                       ((labels, labels * 1.0), "prediction.*float64"),
                       ((labels > 0, labels), "truth.*bool"),
                       ((labels, -labels), "prediction.*-1"),
                       ((labels, labels.astype(np.uint64) << np.uint64(63)), "9223372036854775808"),
                       ((labels,), "two label images"),
                       ((overlap(labels, labels), 0.5), "by name")):
        with pytest.raises(ValueError, match=words):
            match(*bad)
    for threshold in (0, 1.01, np.nan):
        with pytest.raises(ValueError, match="threshold"):
            match(labels, labels, threshold)
    with pytest.raises(ValueError, match="2 frames of truth, 1 of prediction"):
        metrics.seg([labels, labels], [labels])
    with pytest.raises(ValueError, match="two label images"):
        metrics.seg([labels, labels])
    with pytest.raises(ValueError, match="no image"):
        set_scores([])
    with pytest.raises(ValueError, match="level"):
        metrics.bootstrap_scores([1, 2], level=95)


# ------------------------------------------------------------------------------------- slow oracles

def by_hand(truth, pred):
    """IoU and shared pixels of every pair, one mask at a time: (R, S) each."""
    cells = [[labels == i for i in np.unique(labels[labels > 0])] for labels in (truth, pred)]
    shared = np.array([[(r & s).sum() for s in cells[1]] for r in cells[0]])
    return shared / np.array([[(r | s).sum() for s in cells[1]] for r in cells[0]]), shared


def best_pairing(value):
    """The lexicographically largest sum of (R, S, V) over every one-to-one pairing of rows and
    columns."""
    if value.shape[0] > value.shape[1]:
        value = value.transpose(1, 0, 2)
    rows = range(value.shape[0])
    return max(tuple(sum(value[i, j] for i, j in zip(rows, columns)).round(12))
               for columns in itertools.permutations(range(value.shape[1]), value.shape[0]))


@pytest.mark.parametrize("seed", range(40))
def test_tiny_images_against_every_permutation(seed):
    rng = np.random.default_rng(seed)
    # stripes: every cell meets several
    truth, pred = np.sort(rng.integers(0, 5, (2, 3, 12)), axis=2)
    truth[0, 0], pred[0, 0] = 4, 4                                   # neither side empty
    iou, shared = by_hand(truth, pred)
    for threshold in (0.05, 0.2, 0.3, 0.5, 0.7):
        above = iou >= threshold
        pairs, summed = best_pairing(np.stack([above, iou * above], axis=2))
        found = match(truth, pred, threshold)
        assert (found.tp, found.fp, found.fn) == (pairs, iou.shape[1] - pairs, iou.shape[0] - pairs)
        assert found.ious.sum() == pytest.approx(summed) and (found.ious >= threshold).all()
        assert all(len(set(side)) == len(side) for side in found.pairs.T)
    areas = (truth > 0).sum() + (pred > 0).sum()
    _, paired = best_pairing(np.stack([iou, shared], axis=2))
    assert metrics.aji(truth, pred) == pytest.approx(paired / (areas - paired))
    summed, = best_pairing(shared[..., None])
    assert scores(truth, pred)["MMA"] == pytest.approx(summed / ((truth > 0) | (pred > 0)).sum())


@pytest.mark.smoke
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_tangled_tables_against_a_dense_assignment(seed, ties):
    """60 x 80 cells with about five partners each in one component, where no pair is obvious."""
    rng = np.random.default_rng(seed)
    shared = np.where(rng.random((60, 80)) < 0.08, rng.integers(1, 4 if ties else 200, (60, 80)), 0)
    rows, cols = np.nonzero(shared)
    truth_areas, pred_areas = (np.full(n, 1000) if ties else rng.integers(900, 1100, n)
                               for n in shared.shape)
    truth_ids, pred_ids = np.arange(1, 61), np.arange(1, 81)
    table = Overlap(truth_ids, pred_ids, truth_areas, pred_areas, rows, cols, shared[rows, cols])
    iou, areas = shared / (truth_areas[:, None] + pred_areas
                           - shared), truth_areas.sum() + pred_areas.sum()
    result, most = scores(table), shared[linear_sum_assignment(-shared)].sum()
    assert result["MMA"] == pytest.approx(most / (areas - shared.sum()))
    paired = shared[linear_sum_assignment(-iou)].sum()
    assert result["AJI"] == pytest.approx(paired / (areas - paired))
    for threshold in (1e-3, 0.02):
        above = iou >= threshold
        best = linear_sum_assignment(-1 * above * (100 + iou))
        found = match(table, threshold=threshold)
        assert found.tp == above[best].sum() and found.ious.sum() == pytest.approx(
            (iou * above)[best].sum()
        )


def test_table_against_one_mask_at_a_time():
    truth, pred = random_pair(np.random.default_rng(3))
    table, (iou, shared) = overlap(truth, pred), by_hand(truth, pred)
    dense = np.zeros_like(shared)
    dense[table.rows, table.cols] = table.counts
    assert (dense == shared).all() and (table.counts > 0).all()
    assert table.ious == pytest.approx(iou[table.rows, table.cols])
    assert table.truth_areas.tolist() == [(truth == i).sum() for i in table.truth_ids]


def test_a_hundred_thousand_cells_stay_sparse():
    """3 x 3 px cells, moved by a pixel, ids up to 2^60: IoU 6/12 each; a dense table would take 80
    GB."""
    side = 317
    grid = np.kron(np.arange(1, side**2 + 1).reshape(side, side), np.ones((3, 3), int))
    ids = np.random.default_rng(0).choice(2**60, side**2 + 1, replace=False)
    ids[0] = 0
    padded = np.pad(grid, ((0, 0), (0, 1)))
    tracemalloc.start()
    result = scores(ids[padded], np.roll(padded, 1, axis=1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result["n_true"] == side**2 and result["TP"] == side**2 and result["AP@0.55"] == 0
    assert (
        result["PQ"] == pytest.approx(0.5) and result["SEG"] == pytest.approx(0.5) and peak < 500e6
    )


# --------------------------------------------------------------------------------------- invariants

@settings(max_examples=80, deadline=None, derandomize=True)
@given(LABELS, LABELS, st.permutations(range(1, 5)), st.permutations([3, 40, 5000, 2**40]))
def test_relabelling_changes_nothing(truth, pred, dense, gaps):
    same(scores(np.array([0, *dense])[truth], np.array([0, *gaps])[pred]), scores(truth, pred))
    for threshold in (0.1, 0.4):
        before, after = match(truth, pred, threshold), match(np.array([0, *gaps])[truth], pred,
                                                             threshold)
        assert before[:3] == after[:3] and before.ious.sum() == pytest.approx(after.ious.sum())


@settings(max_examples=80, deadline=None, derandomize=True)
@given(LABELS, LABELS)
def test_swapping_truth_and_prediction(truth, pred):
    one, other = scores(truth, pred), scores(pred, truth)
    assert (one["TP"], one["FP"], one["FN"]) == (other["TP"], other["FN"], other["FP"])
    assert one["precision"] == other["recall"] and one["recall"] == other["precision"]
    symmetric = set(UNIT) - {"precision", "recall"}
    same({name: one[name] for name in symmetric}, {name: other[name] for name in symmetric})


@settings(max_examples=80, deadline=None, derandomize=True)
@given(LABELS, LABELS)
def test_ranges_and_identity(truth, pred):
    result = scores(truth, pred)
    assert all(0 <= result[name] <= 1 for name in UNIT)
    assert all(0 <= result[name] <= 1 for name in PER_TRUTH) or not truth.any()
    assert result["PQ"] == pytest.approx(result["SQ"] * result["RQ"])
    curve = [result[name] for name in AP]
    assert curve == sorted(curve, reverse=True)
    itself = scores(truth, truth)
    assert all(itself[name] == 1 for name in UNIT) and itself["count_error"] == 0


def test_single_functions_agree_with_all_scores():
    truth, pred = random_pair(np.random.default_rng(5))
    result, table = scores(truth, pred), overlap(truth, pred)
    for pair in ((truth, pred), (table,)):
        assert metrics.panoptic_quality(*pair) == (result["PQ"], result["SQ"], result["RQ"])
        assert metrics.aji(*pair) == result["AJI"]
        assert metrics.average_precision(*pair).mean() == pytest.approx(result["DSB"])
        assert metrics.average_precision(*pair, thresholds=0.75) == result["AP@0.75"]
        assert match(*pair).rates == (result["AP@0.5"], result["precision"], result["recall"],
                                      result["F1"])


def test_a_threshold_is_reached_exactly():
    """IoU 6/10 counts at 0.6."""
    truth, pred = image((0, 0, 1, 10)), image((0, 0, 1, 6))
    assert match(truth, pred, 0.6).tp == 1 and match(truth, pred, 0.61).tp == 0
    assert scores(truth, pred)["AP@0.6"] == 1


@pytest.mark.smoke
def test_pooling_is_laying_the_images_side_by_side():
    rng = np.random.default_rng(6)
    pairs = [random_pair(rng) for _ in range(8)]
    result = set_scores(overlap(*pair) for pair in pairs)
    truth, pred = (np.hstack([np.where(labels, labels + 100 * i, 0)
                              for i, labels in enumerate(side)])
                   for side in zip(*pairs))
    together = scores(truth, pred)
    del together["DSB"], together["count_error"]
    same(result.pooled, together)
    for one, pair in zip(result.images, pairs):
        same(one, scores(*pair))
    same(result.mean, {name: np.mean([one[name] for one in result.images]) for name in result.mean})
    for values, intervals in ((result.mean, result.mean_interval),
                              (result.pooled, result.pooled_interval)):
        assert all(intervals[name][0] <= values[name] <= intervals[name][1] for name in values)
    f1 = np.array([[2 * one["TP"], one["n_true"] + one["n_pred"]] for one in result.images])
    ratio = metrics.bootstrap_scores(f1, lambda drawn, axis: np.divide(*drawn.sum(axis).T), n=4000)
    assert result.pooled_interval["F1"] == pytest.approx(ratio, abs=0.03)  # other draws
    alone = set_scores([overlap(*pairs[0])])
    for name, value in alone.pooled.items():
        assert alone.pooled_interval[name] == pytest.approx((value, value))


def test_runs_are_averaged_and_drawn_together():
    """Equal runs are one run, with its interval; of unlike ones scores are the means, an image
    without cells included."""
    rng = np.random.default_rng(7)
    pairs = [random_pair(rng) for _ in range(6)] + [(np.zeros((9, 9), int), np.zeros((9, 9), int))]
    good = [overlap(truth, truth) for truth, _ in pairs]
    poor = [overlap(*pair) for pair in pairs]
    thrice, once = metrics.run_scores([poor] * 3), set_scores(poor)
    for part in ("mean", "pooled"):
        same(getattr(thrice, part), getattr(once, part))
        for name, ends in getattr(once, f"{part}_interval").items():
            assert getattr(thrice, f"{part}_interval")[name] == pytest.approx(ends, nan_ok=True)
    both, best = metrics.run_scores([good, poor]), set_scores(good)
    for name in ("AP@0.5", "SEG", "F1", "DET"):
        assert both.mean[name] == pytest.approx((best.mean[name] + once.mean[name]) / 2)
        assert both.pooled[name] == pytest.approx((best.pooled[name] + once.pooled[name]) / 2)
        assert both.pooled_interval[name][0] < both.pooled[name] < both.pooled_interval[name][1]
    with pytest.raises(ValueError, match="7, 6 images to score, expected as many of each run"):
        metrics.run_scores([good, poor[1:]])


# ---------------------------------------------------------------------------------------- bootstrap

def test_bootstrap_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(0).normal(0.7, 0.1, 400)
    low, high = metrics.bootstrap_scores(values, n=4000)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half),
                                        abs=0.1 * half)
    assert metrics.bootstrap_scores(values, n=4000, level=0.5)[1] < high
    assert (
        metrics.bootstrap_scores(values)
        == metrics.bootstrap_scores(values)
        != metrics.bootstrap_scores(values, seed=1)
    )


def test_bootstrap_leaves_undefined_images_out():
    assert metrics.bootstrap_scores([np.nan, 3, np.nan, 3]) == (3, 3)
    assert (
        np.isnan(metrics.bootstrap_scores([np.nan])).all()
        and np.isnan(metrics.bootstrap_scores([])).all()
    )
    assert metrics.bootstrap_scores([0, 1]) == (
        0,
        1,
    )  # either image alone is drawn a quarter of the time


def test_bootstrap_draws_n_times_in_blocks_that_fit():
    seen = []

    def statistic(drawn, axis):
        seen.append(drawn.shape)
        return drawn.mean(axis)

    metrics.bootstrap_scores(np.zeros(2**21), statistic, n=5)
    assert seen == [(2, 2**21), (2, 2**21), (1, 2**21)]


# ----------------------------------------------------------------------------- three other programs

def peer(module):
    return pytest.importorskip(module, reason=f"needs {module}, see tests/requirements-peers.txt")


def test_agrees_with_stardist():
    """40 pairs, exact counts at every threshold. It keeps IoU as float32: PQ agrees to that."""
    matching = peer("stardist.matching").matching
    rng, thresholds = np.random.default_rng(10), (0.1, 0.3, 0.5, 0.65, 0.8, 0.95)
    for _ in range(40):
        truth, pred = random_pair(rng)
        table = overlap(truth, pred)
        for threshold, theirs in zip(thresholds, matching(truth, pred, thresholds)):
            ours = match(table, threshold=threshold)
            assert ours[:3] == (theirs.tp, theirs.fp, theirs.fn)
            same_rates = theirs.accuracy, theirs.precision, theirs.recall, theirs.f1
            assert ours.rates == pytest.approx(same_rates, abs=1e-9)
            if threshold == 0.5:
                assert metrics.panoptic_quality(table).pq == pytest.approx(theirs.panoptic_quality,
                                                                           abs=1e-6)
    # Below 0.5 it settles equal numbers of pairs by IoU summed over all pairs, also those that do
    # not count:
    # its counts are ours, but which pairs they are may differ, and so may its PQ there.
    none, one = image(), image((0, 0, 4, 4))
    # it has no rule for no cells
    assert matching(none, none).f1 == 0 and match(none, none).rates.f1 == 1
    assert matching(one, none).f1 == match(one, none).rates.f1 == 0


def test_stardist_pools_as_we_do():
    stardist = peer("stardist.matching")
    rng = np.random.default_rng(11)
    pairs = [random_pair(rng) for _ in range(40)]
    result = set_scores(overlap(*pair) for pair in pairs)
    theirs = stardist.matching_dataset(*zip(*pairs), thresh=0.5, show_progress=False)
    assert [result.pooled[name] for name in ("TP", "FP", "FN")] == [theirs.tp, theirs.fp, theirs.fn]
    for name, value in (("AP@0.5", theirs.accuracy), ("F1", theirs.f1),
                        ("precision", theirs.precision)):
        assert result.pooled[name] == pytest.approx(value, abs=1e-9)
    assert result.pooled["PQ"] == pytest.approx(theirs.panoptic_quality, abs=1e-6)
    theirs = stardist.matching_dataset(*zip(*pairs), thresh=0.5, by_image=True, show_progress=False)
    assert result.mean["AP@0.5"] == pytest.approx(theirs.accuracy, abs=1e-9)


def test_agrees_with_cellpose():
    """40 pairs at ten thresholds: equal counts, equal AP in its float32, PQ from its IoU to 1e-9.
    """
    cellpose = peer("cellpose.metrics")
    rng, thresholds = np.random.default_rng(12), list(metrics.THRESHOLDS)
    for _ in range(40):
        truth, pred = random_pair(rng)
        # It takes the largest label for the number of cells: ids without gaps.
        truth, pred = (np.searchsorted(np.unique(labels), labels) for labels in (truth, pred))
        ap, tp, fp, fn = cellpose.average_precision(truth, pred, thresholds)
        table = overlap(truth, pred)
        ours = np.transpose([match(table, threshold=t)[:3] for t in thresholds])
        assert ours.tolist() == np.stack([tp, fp, fn]).tolist()
        assert (metrics.average_precision(table).astype(np.float32) == ap).all()
        iou, _ = cellpose.mask_ious(truth, pred)
        pq = iou[iou >= 0.5].sum() / (tp[0] + fp[0] / 2 + fn[0] / 2)
        assert metrics.panoptic_quality(table).pq == pytest.approx(pq, abs=1e-9)
    # 0 / 0: it does not define the empty image, which counts 1 here
    with np.errstate(invalid="ignore"):
        assert np.isnan(cellpose.average_precision(image(), image(), [0.5])[0]).all()
    assert scores(image(), image())["AP@0.5"] == 1


# ------------------------------------------------------------------------------------------ tracks

def random_movie(rng, frames=8, size=24):
    """Truth and answer as label images, with rows of tracks: blobs that drift, split and get lost;
    the answer is the truth with labels exchanged, merged, cut and dropped."""
    y, x = np.indices((size, size))
    truth, pred = np.zeros((2, frames, size, size), np.int32)
    rows, free = [], 7
    for k in range(1, 7):
        at, begin = rng.uniform(2, size - 2, 2), int(rng.integers(0, 3))
        end = int(rng.integers(begin, frames))
        for t in range(begin, end + 1):
            at = at + rng.normal(0, 1, 2)
            truth[t][((y - at[0]) ** 2 + (x - at[1]) ** 2 < 12) & (truth[t] == 0)] = k
        for daughter in range(2 if end < frames - 2 and rng.random() < 0.6 else 0):
            for t in range(end + 1, frames):
                here = at + (3 * daughter - 1.5, t - end)
                inside = (y - here[0]) ** 2 + (x - here[1]) ** 2 < 7
                truth[t][inside & (truth[t] == 0)] = free
            rows.append((free, k))
            free += 1
    swap = np.arange(free + 3)
    for t in range(frames):
        if rng.random() < 0.3:
            a, b = rng.integers(1, free + 2, 2)
            swap[[a, b]] = swap[[b, a]]
        pred[t] = swap[truth[t]]
        pred[t][rng.random((size, size)) < 0.05] = 0
        if rng.random() < 0.4:
            pred[t][pred[t] == rng.integers(1, free)] = rng.integers(0, free)
        truth[t, 0, 0] = pred[t, 0, 0] = 0                       # it takes the least for background
        truth[t, -1, -1], pred[t, -1, -1] = 99, 99                # and needs a cell in every frame
    return truth, pred, dict(rows)


def rows_of(movie, parents):
    """Rows of tracks; a stretch after a gap becomes a new label whose parent is the one before."""
    rows, free = [], 100
    for k in np.unique(movie[movie > 0]).tolist():
        at, label, parent = np.flatnonzero((movie == k).any((1, 2))), k, parents.get(k, 0)
        for part in np.split(at, np.flatnonzero(np.diff(at) > 1) + 1):
            for t in part:
                movie[t][movie[t] == k] = label
            rows.append((label, part[0], part[-1], parent))
            free, parent = free + 1, label
            label = free
    ends = {row[0]: row[2] for row in rows}
    return np.array([(k, a, b, p if ends.get(p, b) < a else 0) for k, a, b, p in rows])


def theirs_of(truth, pred, truth_rows, pred_rows, folder):
    """Scores by py-ctcmetrics, which reads files."""
    theirs = peer("ctc_metrics.metrics")
    graph = peer("ctc_metrics.utils.representations")
    found = []
    for one, other in zip(truth, pred):
        for name, labels in (("truth", one), ("pred", other)):
            tifffile.imwrite(folder / f"{name}.tif", labels)
        found.append(graph.match(str(folder / "truth.tif"), str(folder / "pred.tif")))
    truth_ids, pred_ids, truth_found, pred_found, ious = (list(column) for column in zip(*found))
    counts = graph.count_acyclic_graph_correction_operations(
        truth_rows, pred_rows, truth_ids, pred_ids, truth_found, pred_found)
    tra, aogm, _ = theirs.tra(**counts)
    every = {"SEG": theirs.seg(truth_ids, ious), "DET": theirs.det(**counts), "TRA": tra,
             "LNK": theirs.lnk(**counts), "AOGM": aogm,
             "CT": theirs.ct(pred_rows, truth_rows, truth_ids, truth_found, pred_found),
             "TF": theirs.tf(truth_rows, truth_ids, truth_found, pred_found)}
    for late in range(4):
        score = theirs.bc(*theirs.raw_division_metrics(pred_rows, truth_rows, truth_found,
                                                       pred_found, late))
        every[f"BC({late})"] = np.nan if score is None else score
    every["CSB"] = theirs.op_csb(every["SEG"], every["DET"])
    every["CTB"] = theirs.op_ctb(every["SEG"], every["TRA"])
    return every | {name: counts[name] for name in ("NS", "FN", "FP", "ED", "EA", "EC")}


def test_tracks_agree_with_ctcmetrics(tmp_path):
    """12 movies with drifting, dividing, exchanged, merged and lost cells."""
    rng, divisions = np.random.default_rng(14), 0
    for _ in range(12):
        truth, pred, parents = random_movie(rng)
        truth_rows, pred_rows = rows_of(truth, parents), rows_of(pred, parents)
        ours = metrics.track_scores(truth, pred, truth_rows, pred_rows)
        divisions += ours["BC(3)"] > 0
        theirs = theirs_of(truth, pred, truth_rows, pred_rows, tmp_path)
        frames = {"SEG": metrics.seg(truth, pred), "DET": metrics.det(truth, pred),
                  "CSB": metrics.op_csb(truth, pred)}
        assert set(ours) == set(theirs) and frames.items() <= ours.items()
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, abs=1e-9, nan_ok=True), name
    assert divisions > 2


def test_tracks_of_a_real_movie_agree_with_ctcmetrics(shared, tmp_path):
    """Simulated nuclei of the challenge, eight frames, with the divisions that one sees in it;
    answered by link.py on labels of which some are gone."""
    import link
    file = shared / "volumes/tracks_sim_plus/test/sim01_t15_49_labels.tif"
    if not file.exists():
        pytest.skip("needs shared/volumes")
    truth = tifffile.imread(file)[2:10].astype(np.int32)
    truth_rows = rows_of(truth, {43: 5, 44: 5, 57: 8, 58: 8})
    torn, rng = truth.copy(), np.random.default_rng(3)
    for frame in torn:
        frame[frame == rng.choice(np.unique(frame)[1:])] = 0
    pred, _ = link.track(torn)
    pred_rows = rows_of(pred, dict(link.track(torn)[1][:, [0, 3]].tolist()))
    ours = metrics.track_scores(truth, pred, truth_rows, pred_rows)
    for name, value in theirs_of(truth, pred, truth_rows, pred_rows, tmp_path).items():
        assert ours[name] == pytest.approx(value, abs=1e-9, nan_ok=True), name
    assert 0.5 < ours["TRA"] < 1


@pytest.mark.smoke
def test_tracks_in_closed_form():
    """Four frames of two cells, the first of which divides after the second frame."""
    truth = np.array([[[1, 1, 0, 2, 2]], [[1, 1, 0, 2, 2]], [[3, 4, 0, 2, 2]], [[3, 4, 0, 2, 2]]])
    rows = [(1, 0, 1, 0), (2, 0, 3, 0), (3, 2, 3, 1), (4, 2, 3, 1)]   # 8 links, two from the mother
    right = metrics.track_scores(truth, truth, rows, rows)
    assert all(right[name] == 1 for name in ("SEG", "DET", "TRA", "LNK", "CT", "TF", "BC(0)"))
    assert right["AOGM"] == 0
    followed = np.where(truth == 3, 1, truth)                         # a daughter keeps the number
    one = metrics.track_scores(truth, followed, rows, [(1, 0, 3, 0), (2, 0, 3, 0), (4, 2, 3, 0)])
    assert (one["EA"], one["EC"], one["ED"], one["BC(3)"]) == (1, 1, 0, 0)
    assert one["LNK"] == pytest.approx(1 - 2.5 / 12)
    assert one["TRA"] == pytest.approx(1 - 2.5 / (10 * 10 + 12))
    assert one["CT"] == pytest.approx(2 * 2 / 7)                      # 2 and 4 from end to end
    late = truth.copy()
    late[2] = [[1, 1, 0, 2, 2]]
    two = metrics.track_scores(truth, late, rows, [(1, 0, 2, 0), (2, 0, 3, 0), (3, 3, 3, 1),
                                                   (4, 3, 3, 1)])
    assert two["NS"] == 1 and two["BC(0)"] == 0
    nothing = metrics.track_scores(truth, np.zeros_like(truth), rows, [])
    assert nothing["TRA"] == nothing["LNK"] == nothing["TF"] == 0 and nothing["FN"] == 10
    assert np.isnan(metrics.track_scores(np.zeros_like(truth), truth)["TRA"])


def test_tracks_that_do_not_fit_their_labels():
    truth = np.array([[[1, 0]], [[1, 2]]])
    for rows, said in (([(1, 0, 1, 0)], "label 2 is in frames 1 to 1, its track is missing"),
                       ([(1, 0, 0, 0), (2, 1, 1, 0)], "from 0 to 0"),
                       ([(1, 0, 1, 0), (2, 1, 1, 9)], "parent 9 is no track"),
                       ([(1, 0, 1, 0), (2, 1, 1, 0), (2, 1, 1, 0)], "a row each")):
        with pytest.raises(ValueError, match=said):
            metrics.track_scores(truth, truth, rows)
    metrics.track_scores(truth, truth, [(1, 0, 1, 0), (2, 0, 1, 0)])     # a crop may cut frames off


def test_roc_area_counts_pairs():
    """Against every pair of a right and a wrong one."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        right, score = rng.random(30) < 0.4, rng.integers(0, 6, 30)
        if 0 < right.sum() < 30:
            pairs = score[right][:, None] - score[~right]
            expected = ((pairs > 0) + 0.5 * (pairs == 0)).mean()
            assert metrics.roc_area(right, score) == pytest.approx(expected)
    assert np.isnan(metrics.roc_area([True, True], [0.1, 0.2]))


def test_calibration_error_of_a_fair_and_of_a_boastful_score():
    rng = np.random.default_rng(0)
    p = rng.random(200_000)
    right = rng.random(len(p)) < p
    assert metrics.calibration_error(right, p) < 0.01
    assert metrics.calibration_error(right, np.ones(len(p))) == pytest.approx(0.5, abs=0.01)
