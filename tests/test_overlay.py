"""overlay.py: lines where cells end and nowhere else, colours that differ, pictures read back."""
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from skimage.segmentation import find_boundaries

import overlay
from test_cells import PATTERNS


@pytest.mark.parametrize("labels", PATTERNS)
def test_outlines_are_inner_boundaries(labels):
    assert np.array_equal(overlay.outlines(labels), find_boundaries(labels, mode="inner", connectivity=1))


def test_overlay_outlines_cells_and_nothing_else():
    """Ground far from cells and the inside of cells stay as they are; lines are inside and stand out."""
    y, x = np.mgrid[:1500, :1500]
    labels = ((y - 750) ** 2 + (x - 600) ** 2 < 300 ** 2).astype(int)
    for ground, cell in ((20, 90), (230, 120)):            # fluorescence and brightfield
        image = np.repeat(np.where(labels, cell, ground).astype(np.uint8)[None], 3, 0)
        bare = overlay.overlay(image, labels * 0)
        picture = overlay.overlay(image, labels)
        changed = (picture != bare).any(-1)
        depth = ndimage.distance_transform_edt(labels) - ndimage.distance_transform_edt(labels == 0)
        assert not changed[(depth > 6) | (depth < -6)].any()
        line = changed & (depth > 0)
        assert line[(depth > 0) & (depth < 1.5)].all()
        assert np.ptp(np.concatenate((picture[line], bare[line])).astype(int), axis=1).max() > 80
        colour = np.unique(picture[line], axis=0)
        assert len(colour) == 1 and np.abs(colour[0].astype(int) - bare[750, 600]).max() > 80
        assert (picture[changed & (depth < 0)] == bare[changed & (depth < 0)] // 2).all()


def test_overlay_gives_neighbours_different_colours():
    """Invariant on a plane full of cells: both colours at every border differ."""
    rng = np.random.default_rng(0)
    points = rng.integers(0, 1500, (300, 2))
    seeds = np.ones((1500, 1500), bool)
    seeds[tuple(points.T)] = False
    y, x = ndimage.distance_transform_edt(seeds, return_distances=False, return_indices=True)
    labels = np.unique(y * 1500 + x, return_inverse=True)[1].reshape(1500, 1500) + 1         # Voronoi cells
    picture = overlay.overlay(np.zeros((1, 1500, 1500), np.uint8), labels).astype(int)
    for axis in (0, 1):
        border = np.diff(labels, axis=axis) != 0
        assert (np.abs(np.diff(picture, axis=axis)).sum(-1)[border] > 30).all()
    assert len(np.unique(picture[overlay.outlines(labels)], axis=0)) == 8


def test_overlay_sizes():
    """Large images shrink by a whole number, small ones grow, those between keep their size."""
    def size(h, w, **key):
        return overlay.overlay(np.ones((1, h, w)), np.ones((h, w), int), **key).shape
    assert size(1200, 1000) == (1200, 1000, 3) and size(1401, 30) == (1401, 30, 3)
    assert size(100, 250) == (400, 1000, 3) and size(1, 1) == (8, 8, 3)
    assert size(50, 4097) == (25, 2049, 3) and size(2000, 90, max_side=1500) == (1000, 45, 3)


def test_reduced_is_the_area_mean():
    image = np.arange(2 * 6 * 9, dtype=np.uint16).reshape(2, 6, 9) * 2
    labels = np.arange(54).reshape(6, 9)
    small, few = overlay.reduced(image, labels, 3)
    assert np.array_equal(small, image[:, 1::3, 1::3]) and small.dtype == np.uint16      # mean of a ramp
    assert np.array_equal(few, labels[1::3, 1::3])
    small, few = overlay.reduced(image, labels, 4)           # sizes that do not divide round up
    assert small.shape == (2, 2, 3) and few.shape == (2, 3)


def test_displayed_stretches_each_channel():
    """Closed form: percentiles 1 and 99.8 become black and full; brightfield RGB is not touched."""
    ramp = np.linspace(300, 5300, 64 * 64).reshape(1, 64, 64).astype(np.uint16)
    gray = overlay.displayed(ramp)
    low, high = np.percentile(ramp, (1, 99.8))
    expected = np.clip((ramp[0] - low) / (high - low) * 255, 0, 255)
    assert np.abs(gray - expected[..., None]).max() <= 0.5 + 1e-3
    two = overlay.displayed(np.concatenate((ramp, ramp[:, ::-1])))
    assert np.array_equal(two[..., 1], gray[..., 0]) and np.array_equal(two[..., 0], gray[::-1, :, 0])
    assert np.array_equal(two[..., 0], two[..., 2])
    five = overlay.displayed(np.repeat(ramp, 5, 0))
    assert five.shape == (64, 64, 3) and (five[-1, -1] == 255).all()
    stained = np.random.default_rng(0).integers(120, 250, (3, 64, 64), dtype=np.uint8)
    assert np.array_equal(overlay.displayed(stained), np.moveaxis(stained, 0, -1))
    assert overlay.displayed(np.full((1, 5, 5), 7.0)).max() == 0               # constant: black, no crash
    spot = np.zeros((1, 100, 100), np.uint16)
    spot[0, 50, 50] = 900
    assert overlay.displayed(spot)[50, 50, 0] == 255


def test_enlarged_keeps_areas_and_rounds_stairs():
    """A disc grows by the square of the zoom; its staircase border gets closer to the circle."""
    y, x = np.mgrid[:40, :40]
    disc = ((y - 19.5) ** 2 + (x - 19.5) ** 2 < 14 ** 2).astype(np.int32) * 5
    large = overlay.enlarged(disc, 8)
    assert large.shape == (320, 320) and set(np.unique(large)) == {0, 5}
    assert np.count_nonzero(large) == pytest.approx(64 * np.count_nonzero(disc), rel=0.01)
    ideal = np.hypot(*(np.mgrid[:320, :320] - 159.5)) < 8 * 14
    plain = disc.repeat(8, 0).repeat(8, 1)
    assert np.count_nonzero((large > 0) != ideal) < 0.75 * np.count_nonzero((plain > 0) != ideal)


def test_png_reads_back(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    for picture in (rgb, rgb[..., 0], rgb.repeat(40, 0).repeat(30, 1), rgb[:1, :1]):         # the third in bands
        overlay.write_png(tmp_path / "a.png", picture)
        with Image.open(tmp_path / "a.png") as image:
            image.load()
            assert np.array_equal(np.asarray(image), picture)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    for wrong in (rgb.astype(float), rgb[..., :2], rgb[:0]):
        with pytest.raises(ValueError, match="expected .* uint8"):
            overlay.write_png(tmp_path / "b.png", wrong)


def test_grown_is_a_disc():
    """Every pixel within the radius of a point, also past the sides."""
    mask = np.zeros((9, 12), bool)
    mask[4, 5] = mask[0, 11] = True
    y, x = np.mgrid[:9, :12]
    for radius in (0.5, 1.5, 2.5, 6.5, 20.5):
        near = (np.hypot(y - 4, x - 5) <= radius) | (np.hypot(y, x - 11) <= radius)
        assert np.array_equal(overlay.grown(mask, radius), near)


def test_labels_with_wide_gaps_are_drawn_as_those_without():
    labels = PATTERNS[0]
    ids = np.unique(labels)
    wide = np.where(labels > 0, np.searchsorted(ids, labels).astype(np.int64) * 10 ** 9, 0)
    image = np.random.default_rng(0).random((1, *labels.shape))
    assert np.array_equal(overlay.overlay(image, wide), overlay.overlay(image, np.searchsorted(ids, labels)))
