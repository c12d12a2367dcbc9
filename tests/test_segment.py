"""segment.py with a network that passes its input on: then tiles, blending, scale and blocks must
not show at all."""
import dataclasses
from collections import Counter
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage import measure

import metrics
import model
import segment
import watershed


class PassOn(torch.nn.Module):
    """Its distance map is the mean of the three channels it sees."""
    size = types = None

    def __init__(self, tile=64, diameter=16.0):
        super().__init__()
        self.settings = model.Settings(tile=tile, diameter=diameter, peak=0.5, fill=0.1, min_area=0)
        self.backbone = torch.nn.Module()
        self.backbone.patch = 8
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.mean = torch.zeros(())                                          # says the device
        self.sizes = Counter()

    def autocast(self):
        return nullcontext()

    def forward(self, x):
        self.sizes[tuple(x.shape)] += 1
        return x.mean(1, keepdim=True) * self.weight


def cones(seed, height, width, count, radius=8.0):
    """Round cells in random places, as the image of their distances in [0, 1]."""
    rng = np.random.default_rng(seed)
    d = np.zeros((height, width), np.float32)
    yx = np.stack((rng.uniform(0, height, count), rng.uniform(0, width, count)), 1)
    for y, x in yx:
        r = radius * rng.uniform(0.7, 1.3)
        top, left = max(0, int(y - r)), max(0, int(x - r))
        gy, gx = np.mgrid[top:min(height, int(y + r) + 2), left:min(width, int(x + r) + 2)]
        window = d[top:gy[-1, 0] + 1, left:gx[0, -1] + 1]
        np.maximum(window, 1 - np.hypot(gy - y, gx - x) / r, out=window)
    return d.clip(0, 1)


def same_cells(a, b):
    """Equal up to the numbers of the cells."""
    table = metrics.overlap(a, b)
    return len(table.counts) == len(table.truth_ids) == len(table.pred_ids) and bool((table.ious
                                                                                      == 1).all())


def whole(image):
    """The cells of an image that is its own distance map."""
    return watershed.without_holes(torch.from_numpy(watershed.watershed(image, 0.5, 0.1))).numpy()


UNIT = segment.UNIT[:1]


@pytest.mark.parametrize("shape", [(1, 50), (7, 3), (64, 64), (65, 64), (63, 200), (150, 131)])
def test_tiles_do_not_show(shape):
    image = cones(0, *shape, count=1 + shape[0] * shape[1] // 300)
    net = PassOn()
    np.testing.assert_allclose(segment.distances(image, net, limits=UNIT), image, atol=1e-5)
    assert len({size[1:] for size in net.sizes}) == 1 and {size[2] for size in net.sizes} <= set(
        range(64, 103, 8)
    )
    labels = segment.segment(image, net, limits=UNIT)
    assert labels.shape == shape and labels.dtype == np.int32
    assert same_cells(labels, whole(image))


@pytest.mark.smoke
def test_blocks_do_not_show():
    image = cones(1, 700, 900, 700)
    whole = segment.segment(image, PassOn(), limits=UNIT)
    for block, halo in ((128, 64), (200, 50), (333, 40)):
        parts = segment.segment(image, PassOn(), limits=UNIT, block=block, halo=halo)
        assert same_cells(whole, parts)
        assert len(np.unique(parts)) - 1 == parts.max()                      # ids 1..n without gaps


def test_blocks_do_not_show_on_ground_that_rises():
    """The same hills and ground are left out, whatever the blocks: their sums have one order."""
    rng = np.random.default_rng(0)
    image = np.maximum(cones(1, 400, 500, 200) * rng.uniform(0.4, 1, (1, 500)),
                       0.12 + 0.06 * np.sin(np.arange(500) / 40)).astype(np.float32)
    net = PassOn()
    net.settings = dataclasses.replace(net.settings, depth=0.2, peak=0.6, fill=0.2, smooth=1.0)
    whole = segment.segment(image, net, limits=UNIT)
    for block, halo in ((128, 64), (200, 90)):
        assert same_cells(whole, segment.segment(image, net, limits=UNIT, block=block, halo=halo))
    net.settings = dataclasses.replace(net.settings, depth=0.0)
    assert (segment.segment(image, net, limits=UNIT) > 0).sum() > 1.02 * (whole > 0).sum() > 0


def test_every_cell_is_new_once_and_whole_in_that_view():
    image = cones(2, 400, 500, 250)
    whole = segment.segment(image, PassOn(), limits=UNIT)
    area = np.bincount(whole.ravel())
    met = {}
    for block in segment.blocks(segment.as_source(image),
                                segment.plan_for(image, PassOn(), limits=UNIT, block=100, halo=40)):
        for local in block.new:
            assert block.ids[local] not in met
            met[block.ids[local]] = (block.local == local).sum()
        assert block.distance.shape == block.labels.shape == (block.core[0].stop
                                                              - block.core[0].start,
                                                              block.core[1].stop
                                                              - block.core[1].start)
    assert sorted(met) == list(range(1, whole.max() + 1))
    assert sorted(met.values()) == sorted(area[1:])


@pytest.mark.smoke
def test_a_cell_larger_than_the_halo_keeps_one_id():
    image = np.zeros((64, 600), np.float32)
    image[20:40, 30:570] = 1
    labels = segment.segment(image, PassOn(), limits=UNIT, block=100, halo=20)
    np.testing.assert_array_equal(labels, image.astype(int))


@pytest.mark.parametrize("scale", [0.5, 0.37, 2.0, 1.6])
def test_scale_gives_the_cells_back_at_full_size(scale):
    image = cones(3, 300, 260, 60, radius=12)
    expected = whole(image)
    labels = segment.segment(image, PassOn(), limits=UNIT, zoom=scale)
    assert labels.shape == image.shape
    assert metrics.average_precision(expected, labels, [0.6])[0] > 0.9
    in_blocks = segment.segment(image, PassOn(), limits=UNIT, zoom=scale, block=90, halo=60)
    assert metrics.average_precision(labels, in_blocks, [0.9])[0] >= 0.999


def test_reducing_is_an_average_and_enlarging_is_bilinear():
    """A fine checkerboard reduced four times is grey; a ramp enlarged stays a ramp."""
    board = (np.indices((64, 64)).sum(0) % 2).astype(np.float32)[None]
    small = segment.scaled_rows(segment.as_source(board), UNIT, (16, 16), slice(0, 16))
    assert small.shape == (3, 16, 16) and (small - 0.5).abs().max() < 0.05
    ramp = np.tile(np.linspace(0, 1, 32, dtype=np.float32), (8, 1))[None]
    large = segment.scaled_rows(segment.as_source(ramp), UNIT, (8, 64), slice(2, 5))
    expected = np.interp((np.arange(64) + 0.5) / 2 - 0.5, np.arange(32), ramp[0, 0])
    np.testing.assert_allclose(large[1, 1].numpy(), expected, atol=1e-6)


def test_starts_cover_the_axis_with_the_overlap_asked_for():
    for length in range(1, 400, 7):
        starts = segment.tile_starts(length, 64, 16)
        assert starts[0] == 0 and (length <= 64 or starts[-1] == length - 64)
        assert all(0 < b - a <= 48 for a, b in zip(starts, starts[1:]))


def test_reflection_continues_an_axis():
    x = torch.arange(3.0)[None, None]                                # (1, 1, 3)
    longer = segment._reflected(x, (2, 8))
    assert longer.tolist() == [[[0, 1, 2, 1, 0, 1, 2, 1]] * 2]
    assert torch.equal(segment._reflected(longer.mT, (8, 2)), longer.mT)


def test_flat_tiles_are_not_shown_to_the_network():
    image = np.zeros((64, 640), np.float32)
    image[:, :64] = cones(4, 64, 64, 4)
    net = PassOn()
    segment.segment(image, net, limits=UNIT, overlap=0)
    assert sum(size[0] * n for size, n in net.sizes.items()) == 1
    # a constant image: no cells
    assert segment.segment(np.full((50, 40), 7, np.uint16), net).sum() == 0


def test_nothing_is_judged_by_an_image_without_contrast(monkeypatch):
    net = PassOn(diameter=20)
    net.size = "a head"
    monkeypatch.setattr(segment, "seen_diameter", lambda *_: 60.0)
    assert segment.plan_for(np.arange(2500).reshape(50, 50), net).zoom == 1 / 3
    assert segment.plan_for(np.arange(2500).reshape(50, 50) % 3, net).zoom == 1


@pytest.mark.smoke
def test_border_cells_are_dropped_when_asked():
    image = cones(5, 300, 300, 120)
    kept = segment.segment(image, PassOn(), limits=UNIT, border="drop")
    full = segment.segment(image, PassOn(), limits=UNIT)
    edge = np.unique(np.concatenate((full[0], full[-1], full[:, 0], full[:, -1])))
    expected = np.where(np.isin(full, edge), 0, full)
    assert same_cells(kept, expected) and kept.max() < full.max()
    assert same_cells(kept, segment.segment(image, PassOn(), limits=UNIT, border="drop", block=90,
                                            halo=40))


def test_min_area_is_counted_in_px_of_the_image():
    image = np.zeros((64, 64), np.float32)
    image[4:8, 4:8] = image[20:40, 20:40] = 1                                # 16 and 400 px
    for scale in (1.0, 2.0, 0.5):
        assert segment.segment(image, PassOn(), limits=UNIT, zoom=scale, min_area=100).max() == 1
        assert segment.segment(image, PassOn(), limits=UNIT, zoom=scale, min_area=0).max() == 2


@pytest.mark.smoke
def test_a_given_diameter_is_kept_where_the_image_is_not_scaled():
    net = PassOn()
    net.settings = dataclasses.replace(net.settings, diameter=16.0)
    plan = segment.plan_for(np.zeros((1, 32, 32), np.float32), net, diameter=16.5, limits=UNIT)
    assert (plan.zoom, plan.diameter, plan.near) == (1.0, 16.5, 16.5)


def test_zoom_follows_the_diameter():
    net = PassOn(diameter=16.0)
    assert segment.zoom_for(32, net) == 0.5
    assert segment.zoom_for(16.3, net) == 1, "a few per cent are not worth resampling"
    for wrong, said in ((0, "more than 0 px"), (1, "enlarged 16 times"), (999, "reduced 62 times")):
        with pytest.raises(ValueError, match=said):
            segment.zoom_for(wrong, net)
    net.settings.diameter = None
    with pytest.raises(ValueError, match="do not say how large"):
        segment.zoom_for(32, net)


def test_cells_are_described_by_number_clearness_and_width():
    """Against the watershed and regions of a map by other code; nothing is found in an empty one,
    and twice as large an image has cells twice as wide."""
    net, image = PassOn(tile=96, diameter=16.0), 0.9 * cones(4, 96, 96, 14)
    source = segment.as_source(image)
    plain, large = segment.described_cells(source, net, UNIT, (1.0, 2.0)).numpy()
    labels = segment.segment(image, net, limits=UNIT, zoom=1.0)
    regions = [r for r in measure.regionprops(labels, image)]
    inner = [r for r in regions if min(r.bbox[:2]) > 0 and max(r.bbox[2:]) < 96]
    wide = np.log(1 + np.array([r.equivalent_diameter_area for r in inner]))
    assert 3 <= len(inner) < len(regions)
    expected = [np.log1p(sum(r.intensity_max > 0.6 for r in regions)), np.log1p(len(regions)),
                np.mean([r.intensity_max for r in regions]),
                np.mean([r.intensity_mean for r in regions]), np.median(wide),
                np.subtract(*np.quantile(wide, (0.75, 0.25))), wide.std()]
    np.testing.assert_allclose(plain[:7], expected, atol=1e-5)
    assert wide.min() < plain[7] <= wide.max() and plain[7] >= np.median(wide)
    assert large[4] - plain[4] == pytest.approx(np.log(2), abs=0.2)
    empty = segment.described_cells(segment.as_source(np.zeros((96, 96))), net, UNIT, (1.0,))
    assert empty[0].tolist() == pytest.approx([0, 0, 0, 0, np.log(16), 0, 0, 0])


def test_lengths_of_a_setting_are_px_of_the_network():
    """What the watershed was tuned to in training is what it does with an image that is reduced;
    min_area is of the image."""
    net, image = PassOn(diameter=10.0), cones(3, 200, 180, 40, 20.0)
    setting = watershed.Setting(peak=0.6, fill=0.15, min_area=30, depth=0.1, smooth=1.0, shape=0.04)
    expected = watershed.without_holes(torch.from_numpy(
        watershed.flood(segment.distances(image, net, limits=UNIT, zoom=0.5), setting,
                        0.5))).numpy()
    found = segment.segment(image, net, limits=UNIT, zoom=0.5,
                            **{**setting._asdict(), "min_area": 120})
    assert 5 < found.max() and same_cells(expected,
                                          found) and np.bincount(found.ravel())[1:].min() >= 120
    net.settings = dataclasses.replace(net.settings, **setting._asdict())
    assert same_cells(found, segment.segment(image, net, limits=UNIT, diameter=20.0))
    assert not same_cells(found, segment.segment(image, net, limits=UNIT, zoom=0.5, smooth=0.0))


@pytest.mark.smoke
def test_a_plan_says_what_the_image_gets():
    net, image = PassOn(diameter=16.0), cones(3, 300, 260, 60)
    plan = segment.plan_for(image, net, diameter=32, peak=0.7, min_area=40)
    assert (plan.zoom, plan.diameter, plan.near, plan.border) == (0.5, 32, 32, "keep")
    assert plan.setting == net.settings.setting._replace(
        peak=0.7, min_area=10
    ) and plan.limits.shape == (1, 2)
    assert plan.halo == 256 and segment.plan_for(image, net,
                                                 near=100).halo == 400 and plan.block == 2048
    assert segment.plan_for(image, net, zoom=4.0).block == 512, "enlarged, blocks keep their memory"


def test_cells_smaller_than_a_pixel_leave_no_gap_in_the_numbers():
    """Where the network sees more pixels than the image has."""
    net, image = PassOn(diameter=40.0), np.random.default_rng(2).random((60, 60), np.float32)
    plan = segment.plan_for(image, net, limits=UNIT, diameter=5, peak=0.5, fill=0.5, min_area=0)
    block, = segment.blocks(segment.as_source(image), plan)
    fine = segment.segment(image, net, limits=UNIT, peak=0.5, fill=0.5, min_area=0)
    assert 100 < block.labels.max() < 900 and fine.max() > 100
    assert np.array_equal(np.unique(block.labels),
                          np.arange(block.labels.max()
                                    + 1)) and len(block.new) == block.labels.max()


@pytest.mark.parametrize("batch,sizes", [(4, [3, 2]), (2, [2, 2, 1]), (5, [5]), (8, [5])])
def test_batches_of_a_row_are_even(batch, sizes):
    """One tile alone takes more than its share."""
    seen = []

    class Counted(PassOn):
        def forward(self, x):
            seen.append(len(x))
            return super().forward(x)
    segment.distances(cones(7, 32, 160, 60), Counted(), limits=UNIT, tile=32, overlap=0,
                      batch=batch)
    assert seen == sizes


def test_memory_runs_out_and_the_batch_shrinks():
    class Small(PassOn):
        def forward(self, x):
            if len(x) > 2:
                raise torch.cuda.OutOfMemoryError("full")
            return super().forward(x)

    image = cones(7, 64, 600, 60)
    net = Small()
    np.testing.assert_allclose(segment.distances(image, net, limits=UNIT, batch=16), image,
                               atol=1e-5)
    assert max(size[0] for size in net.sizes) == 2


@pytest.mark.smoke
def test_wrong_values_are_named():
    image = np.zeros((9, 9), np.float32)
    for options, said in [(dict(tile=60), "tile=60: expected a multiple of the patch, 8"),
                          (dict(overlap=40), "overlap=40"), (dict(peak=2), "peak=2"),
                          (dict(fill=0.6), "fill=0.6")]:
        with pytest.raises(ValueError, match=said):
            segment.segment(image, PassOn(), **options)
    for bad in (np.zeros((2, 3, 4, 5)), np.zeros(4), np.array([["a"]]), np.zeros((0, 5))):
        with pytest.raises(ValueError, match="expected"):
            segment.segment(bad, PassOn())
    with pytest.raises(ValueError, match="NaN"):
        segment.segment(np.full((5, 5), np.nan), PassOn())


def test_progress_and_clock():
    seen, clock = [], Counter()
    source = segment.as_source(cones(8, 200, 100, 20))
    list(segment.blocks(source, segment.plan_for(source, PassOn(), limits=UNIT), clock,
                        seen.append))
    assert seen == sorted(seen) and seen[-1] == 1
    assert set(clock) == {"read", "network", "watershed"} and min(clock.values()) > 0


@pytest.mark.smoke
def test_cells_come_without_holes():
    """In one block and in many, where the hole lies over a corner of four."""
    image = np.zeros((130, 130), np.float32)
    y, x = np.mgrid[:130, :130]
    image[np.abs(np.hypot(y - 64, x - 64) - 12) < 5] = 0.9                   # a ring
    disc, outside = np.hypot(y - 64, x - 64) < 16, np.hypot(y - 64, x - 64) > 18
    for block in (2048, 64):
        labels = segment.segment(image, PassOn(), limits=UNIT, block=block, halo=32)
        assert labels.max() == 1 and (labels[disc] == 1).all() and not labels[outside].any()


def test_components_touching_only_at_block_corners_stay_apart():
    image = np.kron(np.indices((6, 6)).sum(0) % 2, np.ones((20, 20))).astype(np.float32)
    labels = segment.segment(image, PassOn(), limits=UNIT, block=40, halo=20)
    assert same_cells(labels, ndimage.label(image)[0])


def test_floats_without_a_sum_of_squares_are_refused():
    image = np.ones((1, 32, 32), np.float64)
    for value in (np.nan, np.inf, 1e31):
        image[0, 3, 3] = value
        with pytest.raises(ValueError, match="NaN, infinite or beyond 1e[+]30"):
            segment.as_source(image)
    image[0, 3, 3] = 1e30
    assert segment.as_source(image) and segment.as_source(image.clip(0, 1).astype(np.float16))
