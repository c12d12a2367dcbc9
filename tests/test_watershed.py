"""watershed.py against SciPy, scikit-image and every setting by hand, and against its own promises.
"""
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from skimage.morphology import reconstruction
from skimage.segmentation import watershed as reference

import metrics
from images import read_image
from watershed import (
    REACH,
    Setting,
    basin_components,
    distance_map,
    flood,
    gaussian_map,
    push_inwards,
    tune,
    watershed,
    window_sum,
    without_holes,
)

PEAK, FILL = 0.47, 0.09


def oracle(d, peak=PEAK, fill=FILL):
    return reference(-d, ndimage.label(d > peak)[0], mask=d > fill)


def discs(seed, size, cells):
    """Discs in random places, some touching: the distance to their edge, divided by its largest
    value."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    d = np.zeros((size, size))
    for _ in range(cells):
        cy, cx, r = rng.uniform(0, size), rng.uniform(0, size), rng.uniform(3, size / 6)
        d = np.maximum(d, 1 - np.hypot(y - cy, x - cx) / r)
    return d.clip(0, 1).astype(np.float32)


def noise(seed, size):
    return np.random.default_rng(seed).random((size, size + 3)).astype(np.float32)


def smooth_noise(seed, size, sigma=2.0):
    d = ndimage.gaussian_filter(np.random.default_rng(seed).random((size, size + 5)), sigma)
    return ((d - d.min()) / np.ptp(d)).astype(np.float32)


def quantised(d, levels):
    return (np.round(d * levels) / levels).astype(np.float32)


def capped(d, cap):
    return np.minimum(d, cap) / np.float32(cap)


MAPS = {
    "discs": lambda seed: discs(seed, 96, 25),
    "smooth noise": lambda seed: smooth_noise(seed, 80),
    "salt": lambda seed: noise(seed, 48),
    "discs in 6 levels": lambda seed: quantised(discs(seed, 96, 25), 6),
    "discs capped": lambda seed: capped(discs(seed, 96, 25), 0.3),
    "capped in 5 levels": lambda seed: quantised(capped(discs(seed, 96, 30), 0.6), 5),
    "salt in 4 levels": lambda seed: quantised(noise(seed, 48), 4),
    "smooth noise in 8 levels": lambda seed: quantised(smooth_noise(seed, 64, 3.0), 8),
}


def check_promises(d, labels, peak=PEAK, fill=FILL, markers=None):
    markers = ndimage.label(d > peak)[0] if markers is None else markers
    count = markers.max(initial=0)
    mask = d > fill
    islands, _ = ndimage.label(mask)
    assert labels.max(initial=0) == count
    np.testing.assert_array_equal(labels[markers > 0], markers[markers > 0])  # one marker, its own
    reachable = np.isin(islands, np.unique(islands[markers > 0])) & mask
    np.testing.assert_array_equal(labels > 0, reachable)  # all that is connected
    best = reconstruction(np.where(markers > 0, d, 0), np.where(mask, d, 0),
                          footprint=ndimage.generate_binary_structure(2, 1))
    for k in range(1, count + 1):
        region = labels == k
        assert ndimage.label(region)[1] == 1, f"region {k} is in pieces"
        own = reconstruction(np.where(markers == k, d, 0), np.where(region, d, 0),
                             footprint=ndimage.generate_binary_structure(2, 1))
        # highest lowest point from any marker
        np.testing.assert_array_equal(own[region], best[region])


@pytest.mark.parametrize("name", MAPS)
def test_promises_hold_on_every_kind_of_map(name):
    for seed in range(6):
        d = MAPS[name](seed)
        check_promises(d, watershed(d))


@pytest.mark.smoke
@pytest.mark.parametrize("name,least", [("discs", 0.999), ("smooth noise", 0.999), ("salt", 0.99),
                                        ("discs capped", 0.999)])
def test_agrees_with_scikit_image(name, least):
    equal = total = 0
    for seed in range(25):
        d = MAPS[name](seed)
        ours, theirs = watershed(d), oracle(d)
        assert ours.max() == theirs.max()
        np.testing.assert_array_equal(ours > 0, theirs > 0)
        equal, total = equal + (ours == theirs).sum(), total + d.size
    assert equal / total >= least


def test_same_pixels_and_cells_on_flat_ground():
    for name in ("discs in 6 levels", "capped in 5 levels", "salt in 4 levels",
                 "smooth noise in 8 levels"):
        for seed in range(15):
            d = MAPS[name](seed)
            ours, theirs = watershed(d), oracle(d)
            assert ours.max() == theirs.max()
            np.testing.assert_array_equal(ours > 0, theirs > 0)


def test_flat_ground_between_two_cells_is_shared_in_the_middle():
    """A plateau nine px wide between two markers: each side takes its nearest four, the middle
    either."""
    d = np.full((5, 11), 0.3, np.float32)
    d[:, 0] = d[:, -1] = 1
    labels = watershed(d)
    assert (labels[:, :5] == 1).all() and (labels[:, 6:] == 2).all()


@pytest.mark.smoke
def test_basin_without_marker_joins_over_its_highest_saddle():
    """Heights in a row: marker A, saddle .10, hill .4, saddle .2, marker B: the hill belongs to B.
    """
    d = np.array([[0.9, 0.10, 0.4, 0.2, 0.9]], np.float32)
    np.testing.assert_array_equal(watershed(d), [[1, 1, 2, 2, 2]])


def test_hill_without_any_marker_stays_background():
    d = np.zeros((9, 9), np.float32)
    d[1:3, 1:3], d[6:8, 6:8] = 0.4, 0.8
    assert watershed(d)[1, 1] == 0 and watershed(d)[7, 7] == 1


def test_spiral_plateau_is_one_cell():
    """A corridor of one height, a thousand px long, with the marker at its end."""
    d = np.zeros((64, 64), np.float32)
    d[1::2] = 0.2
    d[2:-1:4, -1] = d[4:-1:4, 0] = 0.2
    d[1, 0] = 0.6
    labels = watershed(d)
    np.testing.assert_array_equal(labels, oracle(d))
    assert labels.max() == 1 and (labels > 0).sum() > 1000


@pytest.mark.smoke
def test_small_and_empty_and_full_maps():
    assert watershed(np.zeros((7, 5), np.float32)).sum() == 0
    np.testing.assert_array_equal(watershed(np.ones((7, 5), np.float32)), np.ones((7, 5)))
    np.testing.assert_array_equal(watershed(np.full((1, 1), 0.5, np.float32)), [[1]])
    np.testing.assert_array_equal(watershed(np.full((1, 1), 0.3, np.float32)), [[0]])
    assert watershed(np.zeros((0, 4), np.float32)).shape == (0, 4)
    board = np.indices((20, 20)).sum(0) % 2  # one-pixel cells, none 4-connected
    np.testing.assert_array_equal(watershed(board.astype(np.float32)),
                                  oracle(board.astype(np.float32)))


def test_cells_do_not_wrap_around_the_border():
    d = np.zeros((4, 6), np.float32)
    d[1, -1], d[2, 0] = 1, 1
    assert watershed(d).max() == 2


def test_min_area_drops_and_renumbers():
    d = np.zeros((12, 12), np.float32)
    d[0, 0] = d[2:6, 2:6] = d[8:11, 8:11] = 1                                # 1, 16 and 9 px
    labels = watershed(d, min_area=10)
    assert labels.max() == 1 and (labels == 1).sum() == 16
    labels = watershed(d, min_area=9)
    assert [(labels == k).sum() for k in (1, 2)] == [16, 9]


def standing_out(d, depth, peak=PEAK, fill=FILL):
    """Markers by h-maxima: summits above peak from which every way to higher ground goes down by
    depth or more."""
    cross, e = ndimage.generate_binary_structure(2, 1), np.where(d > np.float32(fill), d,
                                                                 -1).astype(np.float64)
    flooded = reconstruction(e - depth, e, footprint=cross)
    tops, n = ndimage.label(flooded - reconstruction(flooded - 1e-9, flooded, footprint=cross)
                            > 5e-10)
    high = np.append(False, ndimage.maximum(d, tops, np.arange(1, n + 1))
                     > peak) if n else np.zeros(1, bool)
    return ndimage.label(high[tops])[0]


@pytest.mark.parametrize("name", MAPS)
def test_with_a_depth_every_cell_is_a_summit_that_stands_out(name):
    """One h-maximum in each cell, all of the mask that hangs together with one, in one piece, and
    over saddles that are the highest; depths lie between the levels of the quantised maps, where
    rounding would decide. Ground and hills are left in."""
    for seed in range(3):
        d = MAPS[name](seed)
        for depth in (0.013, 0.07, 0.29):
            markers = standing_out(d, depth)
            labels = watershed(d, PEAK, FILL, 0, depth, ground=False)
            pairs = np.unique(np.stack((markers, labels))[:, markers > 0], axis=1)
            assert (
                len(set(pairs[0])) == len(set(pairs[1])) == pairs.shape[1] == labels.max(initial=0)
            )  # one to one
            check_promises(d, labels, markers=np.where(markers > 0, labels, 0))


def level_by_hand(d, peak, fill, reach=REACH):
    """Where cells end: the mean of what is far from all above 2 fill, beyond half of fill."""
    window = np.ones(2 * reach + 1)

    def total(x):
        return ndimage.convolve1d(ndimage.convolve1d(x.astype(float), window, 0, mode="constant"),
                                  window, 1, mode="constant")
    apart = ~ndimage.maximum_filter(d > 2 * fill, 2 * (reach // 4) + 1, mode="constant")
    ground = total(d * apart) / np.maximum(total(apart), 1)
    return np.minimum(fill + np.maximum(ground - fill / 2, 0), peak)


def cells_by_hand(d, peak, fill, depth):
    """Basins of all summits, joined one at a time; heights must differ."""
    level = level_by_hand(d, peak, fill)
    inside = d > level
    beside = {}
    for y, x in np.argwhere(inside):
        near = [(y + j, x + i) for j, i in ((-1, 0), (0, -1), (0, 1), (1, 0))
                if 0 <= y + j < d.shape[0] and 0 <= x + i < d.shape[1]]
        beside[y, x] = [place for place in near if inside[place]]
    summit = {}
    for place in sorted(beside, key=lambda place: -d[place]):
        higher = max([*beside[place], place], key=lambda other: d[other])
        summit[place] = place if higher == place else summit[higher]

    unsure = {top for place, top in summit.items() if level[place] > fill}

    def join(least, takes):
        while True:
            passes = {}
            for place, near in beside.items():
                for a, b in ((summit[place], summit[other]) for other in near):
                    if a != b and takes(a) and takes(b):
                        passes.setdefault(a, []).append((min(d[place], max(
                            d[other] for other in near if summit[other] == b)), b))
            for a, ways in passes.items():
                low, b = max(ways)
                if d[b] > d[a] and d[a] - low < least(a):
                    summit.update({place: b for place, top in summit.items() if top == a})
                    break
            else:
                return

    join(lambda top: 0 if d[top] > peak else 0.2 * d[top] if top in unsure else np.inf,
         lambda top: True)
    join(lambda top: depth, lambda top: d[top] > peak)
    cells = sorted({top for top in summit.values() if d[top] > peak})
    labels = np.zeros(d.shape, int)
    for place, top in summit.items():
        labels[place] = cells.index(top) + 1 if top in cells else 0
    return labels


@pytest.mark.parametrize("name", ["discs", "smooth noise"])
def test_hills_and_ground_are_left_out_as_by_hand(name):
    """On maps whose heights all differ, also with ground between the cells that lies high."""
    left_out = 0
    for seed in range(3):
        d = MAPS[name](seed)[:40, :44]
        d = (d + np.random.default_rng(seed).random(d.shape) * 0.02).astype(np.float32)
        for low in (0.0, 0.15):
            raised = (low + (1 - low) * d).astype(np.float32)
            for depth in (0.05, 0.3):
                labels = watershed(raised, 0.6, 0.2, 0, depth)
                np.testing.assert_array_equal(labels, cells_by_hand(raised, 0.6, 0.2, depth))
                left_out += ((raised > 0.2) & (labels == 0)).sum()
    assert left_out > 100


@pytest.mark.smoke
def test_a_hill_on_unsure_ground_is_no_part_of_a_cell():
    cell, hill = [0.9, 0.6, 0.5, 0.3], [0.5, 0.3]                     # the valley is at .3
    for ground, left in ((0.15, False), (0.04, True)):
        d = np.array([cell + hill + [ground] * 30], np.float32)
        labels = watershed(d, 0.7, 0.1, 0, 0.4)[0]
        assert (labels[:3] == 1).all() and (labels[4:6] == left).all() and not labels[6:].any()
        d[0, 3] = 0.45                                                # hardly a valley
        assert (watershed(d, 0.7, 0.1, 0, 0.4)[0, :6] == 1).all()
    d[0, 3] = 0.3
    assert (watershed(d, 0.7, 0.1)[0, :6] == 1).all()                 # without a depth all is


def test_ground_is_measured_between_cells_alone():
    """Cells wall to wall keep all their pixels; on ground at .15 they end where they would on
    ground at 0, as far above it."""
    y, x = np.mgrid[:96, :96]
    waves = (np.sin(y / 4) ** 2 + np.sin(x / 4) ** 2) / 2
    walls = (0.25 + 0.75 * waves).astype(np.float32)
    assert (watershed(walls, 0.6, 0.2, 0, 0.3) > 0).mean() > 0.95
    far = np.clip(1 - np.hypot((y - 48) / 20, (x - 48) / 20), 0, 1).astype(np.float32)
    alone = watershed(far, 0.6, 0.2, 0, 0.3) > 0
    raised = watershed(np.maximum(far, 0.15).astype(np.float32), 0.6, 0.2, 0, 0.3) > 0
    assert 0.5 < raised.sum() / alone.sum() < 1 and not raised[~alone].any()


def test_window_sums_are_those_of_every_part():
    x = torch.rand(60, 70, generator=torch.Generator().manual_seed(0))
    for reach in (1, 4, 7, 16):
        window = np.ones(2 * reach + 1)
        by_hand = ndimage.convolve1d(ndimage.convolve1d(x.double().numpy(), window, 0,
                                                        mode="constant"), window, 1,
                                     mode="constant")
        np.testing.assert_allclose(window_sum(x, reach), by_hand, rtol=1e-5)
        part = window_sum(x[5:55, 8:68], reach)
        whole = window_sum(x, reach)[5:55, 8:68]
        inner = (slice(reach, 50 - reach), slice(reach, 60 - reach))
        assert torch.equal(part[inner], whole[inner])


@pytest.mark.smoke
def test_a_depth_parts_two_summits_by_their_valley():
    d = np.array([[0.6, 0.9, 0.8, 0.85, 0.6]], np.float32)
    for depth, cells in ((0.0, 1), (0.04, 2), (0.06, 1), (0.5, 1)):
        assert watershed(d, 0.5, 0.1, 0, depth).max() == cells
    assert watershed(d, 0.5, 0.1, 0, 0.04).tolist() == [[1, 1, 1, 2, 2]] or \
        watershed(d, 0.5, 0.1, 0, 0.04).tolist() == [[1, 1, 2, 2, 2]]
    assert watershed(d, 0.87, 0.1, 0, 0.04).max() == 1        # the second is not above peak
    assert watershed(d * 0, 0.5, 0.1, 0, 0.04).max() == 0
    assert watershed(d, 0.5, 0.1, 3, 0.04).max() == 1         # and min_area holds


def test_kind_and_dtype_and_input_are_kept():
    d = discs(3, 64, 10)
    before = d.copy()
    array, tensor = watershed(d), watershed(torch.from_numpy(d))
    assert isinstance(array, np.ndarray) and isinstance(tensor, torch.Tensor)
    assert array.dtype == np.int32 and tensor.dtype == torch.int32
    np.testing.assert_array_equal(array, tensor.numpy())
    np.testing.assert_array_equal(array, watershed(d.astype(np.float64)))
    np.testing.assert_array_equal(array.T > 0, watershed(d.T) > 0)           # not contiguous
    np.testing.assert_array_equal(d, before)


def test_arrays_may_be_turned_read_only_or_of_another_byte_order():
    """Also single rows and columns, whose negative strides NumPy calls contiguous."""
    d = discs(3, 60, 12)
    for part in (d, d[:1], d[:, :1], d[:1, :1]):
        for view in (part[::-1], part[:, ::-1], part[::-1, ::-1], part.T, part[::2],
                     part.astype(">f4"), np.broadcast_to(part[:1], part.shape)):
            view.flags.writeable = False
            plain = np.array(view, "f4")
            assert (watershed(view, PEAK, FILL) == watershed(plain, PEAK, FILL)).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_same_labels_on_the_gpu():
    for make in MAPS.values():
        d = torch.from_numpy(make(1))
        on_gpu = watershed(d.cuda())
        assert on_gpu.is_cuda
        assert torch.equal(on_gpu.cpu(), watershed(d))


def test_wrong_input_is_named():
    good = np.zeros((4, 4), np.float32)
    bad = good.copy()
    bad[1, 2] = np.nan
    for call, said in [(lambda: watershed(bad), "NaN"),
                       (lambda: watershed(good, peak=0.1, fill=0.2), "fill=0.2, peak=0.1"),
                       (lambda: watershed(good, shape=-1), "shape=-1: expected 0 or more"),
                       (lambda: watershed(good, reach=0), "reach=0: expected 1"),
                       (lambda: watershed(good[0]), r"\(4,\)"),
                       (lambda: watershed(good.astype(int)), "floats")]:
        with pytest.raises(ValueError, match=said):
            call()


def test_infinity_is_no_nan():
    d = np.array([[np.inf, 0.2, -np.inf, 0.9]], np.float32)
    np.testing.assert_array_equal(watershed(d), [[1, 1, 0, 2]])


def test_components_are_scipys():
    for seed in range(30):
        for density in (0.2, 0.5, 0.65, 0.9):
            mask = np.random.default_rng(seed).random((23, 31)) < density
            padded = np.pad(mask, ((1, 1), (0, 1)))
            pixels, labels, count = basin_components(torch.from_numpy(padded.ravel()), 32)
            expected, n = ndimage.label(padded)
            assert count == n
            np.testing.assert_array_equal(labels.numpy(), expected.ravel()[pixels.numpy()])
            assert (np.diff(pixels.numpy()) > 0).all() and len(pixels) == mask.sum()


@pytest.mark.parametrize("sigma", [0.7, 2.5])
def test_smoothing_is_scipys(sigma):
    """The same filter, and the same cells as of a map that was gaussian before."""
    distance = np.random.default_rng(0).random((37, 52)).astype(np.float32)
    wanted = ndimage.gaussian_filter(distance, sigma, mode="nearest",
                                     truncate=np.ceil(3 * sigma) / sigma)
    np.testing.assert_allclose(gaussian_map(torch.from_numpy(distance), sigma), wanted, atol=1e-5)
    found = watershed(distance, 0.55, 0.45, smooth=sigma)
    np.testing.assert_array_equal(found, watershed(gaussian_map(torch.from_numpy(distance), sigma),
                                                   0.55, 0.45))
    assert found.max() > 1


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_how_far_inside_is_scipys(share):
    """Beyond the border nothing ends: the image goes on set there."""
    high = np.random.default_rng(0).random((70, 90)) < share
    wanted = ndimage.distance_transform_edt(np.pad(high, REACH, constant_values=True))[
        REACH:-REACH, REACH:-REACH
    ]
    np.testing.assert_allclose(push_inwards(torch.from_numpy(high), REACH), wanted.clip(max=REACH),
                               rtol=1e-6)
    for value in (True, False):
        assert (push_inwards(torch.full((3, 2), value), REACH) == REACH * value).all()


def test_a_shape_parts_cells_at_their_neck():
    """Two discs that the map does not part, as a network that saw no valley draws them."""
    y, x = np.mgrid[:40, :70]
    discs = [np.hypot(y - 20, x - at) < 14 for at in (20, 44)]
    d = np.where(discs[0] | discs[1], 0.9, 0).astype(np.float32)
    assert watershed(d, 0.5, 0.1, depth=0.3).max() == watershed(d, 0.5, 0.1, shape=0.1).max() == 1
    parted = watershed(d, 0.5, 0.1, depth=0.3, shape=0.1)
    assert parted.max() == 2 and np.array_equal(parted > 0, d > 0)           # nothing is lost
    for number, disc in enumerate(discs, 1):
        assert (parted[disc] == number).mean() > 0.95
    assert watershed(np.where(discs[0], 0.9, 0).astype(np.float32), 0.5, 0.1, depth=0.3,
                     shape=0.1).max() == 1
    np.testing.assert_array_equal(watershed(d.astype(np.float64), 0.5, 0.1, depth=0.3, shape=0.1),
                                  parted)


@pytest.mark.parametrize("apart", [18, 20, 24])
def test_shape_is_the_same_at_every_scale(apart):
    """An image k times as large, shape / k and k times the reach: the same neck parts the same
    cells."""
    def cells(times: int) -> list[int]:
        y, x = np.mgrid[:44 * times, :70 * times] / times
        discs = [np.hypot(y - 22, x - at) < 14 for at in (20, 20 + apart)]
        d = np.where(discs[0] | discs[1], 0.9, 0).astype(np.float32)
        return [watershed(d, 0.5, 0.1, depth=depth, shape=0.1 / times, reach=REACH * times).max()
                for depth in (0.05, 0.15, 2)]
    assert cells(1) == cells(2) == cells(4) == [2, 2, 1]


def test_background_that_one_cell_encloses_is_the_cells():
    """scipy's components of the background; each has one answer by who is beside it."""
    filled = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        labels = (rng.integers(1, 3, (19, 27)) * (rng.random((19, 27))
                                                  < rng.choice([0.6, 0.75, 0.9]))).astype(np.int32)
        ground, parts = ndimage.label(np.pad(labels, 1) == 0)
        expected = np.pad(labels, 1)
        for part in range(1, parts + 1):
            beside = np.unique(expected[ndimage.binary_dilation(ground == part) & (ground != part)])
            if part != ground[0, 0] and len(beside) == 1:
                expected[ground == part] = beside[0]
                filled += 1
        found = without_holes(torch.from_numpy(labels))
        np.testing.assert_array_equal(found.numpy(), expected[1:-1, 1:-1])
        assert found.dtype == torch.int32
    assert filled > 100


def test_what_two_cells_enclose_or_the_edge_cuts_stays_background():
    labels = np.zeros((7, 16), np.int32)
    labels[:5, :5] = 1
    labels[1:4, 1:4] = 0  # a ring at the corner: filled
    labels[1:6, 6:11] = 2
    labels[2:5, 7:10] = 0
    labels[3, 8] = 3  # a cell in a ring: the ground between them stays
    labels[:4, 12:] = 4
    labels[:3, 13:15] = 0  # open to the edge: stays
    found = without_holes(torch.from_numpy(labels)).numpy()
    assert (found[:5, :5] == 1).all()
    labels[:5, :5] = 1
    np.testing.assert_array_equal(found, labels)
    empty = torch.zeros((3, 4), dtype=torch.int32)
    assert torch.equal(without_holes(empty), empty)


# ------------------------------------------------------------------------------------- distance map

def alone(labels, cap=None):
    """The definition: each cell by itself, everything else is outside, the border of the image is
    no edge."""
    out = np.zeros(labels.shape)
    for i in np.unique(labels[labels > 0]):
        own = labels == i
        d = np.ones(labels.shape) if own.all() else ndimage.distance_transform_edt(own)
        d = np.minimum(d, np.inf if cap is None else cap)
        out[own] = d[own] / d[own].max()
    return out


def check_distances(labels, caps=(None, 0.5, 1, 2.5, 4, 20, 70.5)):
    for cap in caps:
        got = distance_map(labels, cap)
        assert got.dtype == np.float32 and got.shape == labels.shape
        np.testing.assert_allclose(got, alone(labels, cap), atol=1e-6, err_msg=f"cap {cap}")


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.int64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12),
                  elements=st.sampled_from([0, 1, 2, 70_000, 2 ** 62])))
def test_distance_map_of_any_small_labels(labels):
    check_distances(labels)


@pytest.mark.parametrize("seed", range(4))
def test_distance_map_of_blobs_that_touch_wrap_and_come_in_pieces(seed):
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.random((90, 110)), 4)
    # rings, holes, many pieces
    labels = np.digitize(smooth, np.quantile(smooth, [0.2, 0.4, 0.6, 0.8]))
    labels[rng.random(labels.shape) > 0.998] = 9  # holes and cells of one pixel
    check_distances(labels)


def test_distance_map_of_large_cells():
    y, x = np.mgrid[:330, :420]
    labels = np.zeros((330, 420), np.uint16)
    labels[np.hypot(y - 150, x - 150) < 140] = 3
    labels[np.hypot(y - 160, x - 330) < 120] = 8                             # touches the first
    labels[100:110, 100:105] = 5
    labels[:, 400:] = 6  # cut by the border
    check_distances(labels)
    check_distances(np.where(x < 200, 1, 2))  # two cells, no background


@pytest.mark.smoke
def test_distance_map_closed_forms():
    assert not distance_map(np.zeros((5, 7), int)).any()
    assert (distance_map(np.full((5, 7), 3)) == 1).all()                          # without any edge
    assert distance_map(np.zeros((0, 7), int)).shape == (0, 7)
    bar = np.zeros((1, 9), int)
    bar[0, 2:7] = 4
    np.testing.assert_allclose(distance_map(bar)[0], [0, 0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3, 0, 0],
                               atol=1e-7)
    np.testing.assert_allclose(distance_map(bar, cap=2)[0], [0, 0, 1 / 2, 1, 1, 1, 1 / 2, 0, 0],
                               atol=1e-7)
    pair = np.array([[1, 1, 2, 2]])
    # the other cell is an edge
    np.testing.assert_allclose(distance_map(pair)[0], [1, 1 / 2, 1 / 2, 1])


def test_distance_map_ignores_names_and_turns_with_the_image():
    rng = np.random.default_rng(0)
    labels = np.kron(rng.integers(0, 6, (9, 7)), np.ones((9, 11), int))
    d = distance_map(labels)
    renamed = np.array([0, 500, 3, 10 ** 12, 8, 77])[labels]
    np.testing.assert_array_equal(distance_map(renamed), d)
    np.testing.assert_allclose(distance_map(labels.T).T, d, atol=1e-6)
    np.testing.assert_allclose(distance_map(labels[::-1, ::-1])[::-1, ::-1], d, atol=1e-6)


def test_distance_map_refuses():
    good = np.zeros((4, 4), int)
    for wrong, cap in ((good * 1.0, None), (good[None], None), (good - 1, None), (good, 0),
                       (good, float("nan")), (good, float("inf"))):
        with pytest.raises(ValueError, match="expected"):
            distance_map(wrong, cap)


def test_distance_map_of_real_cells(shared):
    labels = read_image(min((shared / "data/phase_usiigaci/train").glob("*_cells.png"))).pixels[
        0, 200:450, 200:450
    ]
    assert len(np.unique(labels)) > 5
    check_distances(labels, caps=(None, 4))


# ----------------------------------------------------------------------------------------- settings

def mean_score(maps, truths):
    return lambda setting: float(np.mean([metrics.average_precision(truth, flood(d, setting)).mean()
                                          for d, truth in zip(maps, truths)]))


def squares(pitch, side, count=4):
    """(count * pitch)² px with squares of `side` px, one in each `pitch`."""
    y, x = np.mgrid[:count * pitch, :count * pitch]
    return ((y % pitch < side) & (x % pitch < side)) * (1 + y // pitch * count
                                                        + x // pitch).astype(np.int32)


@pytest.mark.smoke
def test_tune_finds_the_best_setting():
    """Against every setting tried by hand."""
    rng = np.random.default_rng(0)
    truths = [squares(16, side) for side in (9, 12, 14)]
    maps = [np.clip(distance_map(t, 4) + rng.normal(0, 0.15, t.shape), 0, 1).astype(np.float32)
            for t in truths]
    score, grid = mean_score(maps, truths), dict(peak=(0.4, 0.6, 0.8), fill=(0.2, 0.5, 0.7),
                                                 depth=(0,), smooth=(0,), shape=(0,))
    known = {(peak, fill, area): score(Setting(peak, fill, area)) for peak, fill, area in
             itertools.product(grid["peak"], grid["fill"], (0, 12, 2000)) if fill <= peak}
    best = tune(score, **grid, min_area=(0, 12, 2000))
    assert len(set(known.values())) > 5 and score(best) == max(known.values())
    assert best.min_area == 12 and score(best) > score(best._replace(min_area=0)), (
        "noise makes crumbs; 2000 px is too much"
    )
    with pytest.raises(ValueError, match="no pair"):
        tune(score, peak=(0.1,), fill=(0.2,))


def test_tune_finds_depth_and_shape():
    """Valleys that end above every peak; pairs of discs that the map does not part at all."""
    truth = squares(10, 10)                                                  # they touch
    soft = np.maximum(distance_map(truth, 4), 0.75).astype(np.float32)
    score, grid = mean_score([soft], [truth]), dict(peak=(0.4, 0.6), fill=(0.2,), smooth=(0,),
                                                    shape=(0,), min_area=(0,))
    assert tune(score, **grid, depth=(0.0, 0.1)).depth == 0.1
    y, x = np.mgrid[:40, :70]
    truths, maps = [], []
    for at in (42, 43, 44):
        pair = [np.hypot(y - 20, x - centre) < 14 for centre in (20, at)]
        truths.append(np.where(pair[0] & (x < (20 + at) / 2), 1,
                               np.where(pair[1], 2, 0)).astype(np.int32))
        maps.append(np.where(truths[-1] > 0, 0.9, 0).astype(np.float32))
    score, grid = mean_score(maps, truths), dict(peak=(0.5,), fill=(0.2,), smooth=(0,),
                                                 min_area=(0,), depth=(0, 0.1, 0.2))
    assert tune(score, **grid, shape=(0, 0.1)).shape == 0.1
    assert score(tune(score, **grid, shape=(0, 0.1))) > 0.8 > 0.2 > score(tune(score, **grid,
                                                                               shape=(0,)))


@pytest.mark.parametrize("height, expected", [(0.6, (0.4, 0.2, 20, 0.2, 1.0, 0.05)),
                                              (0.4, (0.3, 0.1, 0, 0.0, 0.0, 0.0))])
def test_the_higher_of_two_hills_is_found_from_either_start(height, expected):
    """One hill at the first values and one at the middle ones: every path between them goes down
    first."""
    hills = {(0.3, 0.1, 0, 0.0, 0.0, 0.0): 0.5, (0.4, 0.2, 20, 0.2, 1.0, 0.05): height}
    best = tune(lambda setting: max(top - 0.05 * sum(a != b for a, b in zip(setting, hill))
                                    for hill, top in hills.items()),
                peak=(0.3, 0.4, 0.5), fill=(0.1, 0.2, 0.3), min_area=(0, 20, 40),
                depth=(0.0, 0.2, 0.4),
                smooth=(0.0, 1.0, 2.0), shape=(0.0, 0.05, 0.1))
    assert best == expected


def test_a_setting_changes_by_what_is_given():
    setting = Setting(0.5, 0.2, 30)
    assert setting.changed(peak=None, fill=0.1, depth=0.3) == (0.5, 0.1, 30, 0.3, 0.0, 0.0)
    for wrong in (dict(peak=0.1), dict(fill=0.6), dict(peak=1.0), dict(fill=-0.1)):
        with pytest.raises(ValueError, match="expected 0 <= fill <= peak < 1"):
            setting.changed(**wrong)


@pytest.mark.parametrize("zoom", [0.5, 0.25])
def test_lengths_are_of_the_network(zoom):
    """A map that is enlarged is flooded to the enlarged cells."""
    truth = squares(20, 15)
    small = distance_map(truth, 4)
    factor = round(1 / zoom)
    setting = Setting(0.5, 0.1, 40, smooth=0.7)
    large = flood(np.kron(small, np.ones((factor, factor), np.float32)), setting, zoom)
    expected = np.kron(flood(small, setting), np.ones((factor, factor), np.int32))
    assert metrics.average_precision(expected, large, [0.8])[0] == 1 and large.max() == 16
