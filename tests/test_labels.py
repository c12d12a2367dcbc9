"""labels.py: files read back, tiles that fail, distances one by one."""
import os

import numpy as np
import PIL.Image
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from images import read_image
from labels import distance_map, read_labels, write_label_tiles, write_labels
from test_images import noise, one_line


# ------------------------------------------------------------------------------------------------------ files

@pytest.mark.parametrize("top, dtype", [(0, np.uint16), (65535, np.uint16), (65536, np.uint32),
                                        (2 ** 31 - 1, np.uint32)])
def test_labels_round_trip(tmp_path, top, dtype):
    labels = noise(50, 60, dtype=np.uint16).astype(np.int64) % (top + 1)
    labels[3, 4] = top
    write_labels(tmp_path / "x.tif", labels, pixel_size=0.325)
    got = read_labels(tmp_path / "x.tif")
    assert got.dtype == np.int32 and os.listdir(tmp_path) == ["x.tif"]
    np.testing.assert_array_equal(got, labels)
    image = read_image(tmp_path / "x.tif")
    assert image.pixels.dtype == dtype and image.pixel_size == pytest.approx(0.325, rel=1e-5)
    assert (tmp_path / "x.tif").stat().st_size < labels.size * np.dtype(dtype).itemsize + 2000


def test_labels_from_png_and_npy_and_what_are_no_labels(tmp_path):
    labels = noise(20, 30).astype(np.int64) % 900
    PIL.Image.fromarray(labels.astype(np.uint16)).save(tmp_path / "x.png")
    np.save(tmp_path / "x.npy", labels)
    for name in ("x.png", "x.npy"):
        np.testing.assert_array_equal(read_labels(tmp_path / name), labels)
    for wrong, expected in ((labels.astype(float), "save it as uint16"), (labels - 5, "0 to 2147483647"),
                            (labels + 2 ** 31, "0 to 2147483647"), (np.stack([labels] * 3), "one channel")):
        np.save(tmp_path / "x.npy", wrong)
        with pytest.raises(ValueError) as error:
            read_labels(tmp_path / "x.npy")
        assert expected in one_line(error)
    for wrong in (labels - 5, labels + 2 ** 32, labels.astype(float), labels[None]):
        with pytest.raises(ValueError):
            write_labels(tmp_path / "new.tif", wrong)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        write_labels(tmp_path / "nowhere" / "new.tif", labels)
    assert sorted(os.listdir(tmp_path)) == ["x.npy", "x.png"]


def cut(labels, h, w):
    H, W = labels.shape
    return (labels[y:y + h, x:x + w] for y in range(0, H, h) for x in range(0, W, w))


@pytest.mark.parametrize("shape", [(300, 333), (64, 32), (1, 1), (65, 33)])
def test_label_tiles_round_trip(tmp_path, shape):
    labels = noise(*shape, dtype=np.uint32) // 2
    path = tmp_path / "x.tif"
    write_label_tiles(path, shape, cut(labels, 64, 32), tile=(64, 32), pixel_size=0.5)
    np.testing.assert_array_equal(read_labels(path), labels)
    assert read_image(path).pixel_size == pytest.approx(0.5) and os.listdir(tmp_path) == ["x.tif"]
    with tifffile.TiffFile(path) as tif:
        page = tif.pages[0]
        assert not tif.is_bigtiff and page.tile == (64, 32) and page.dtype == np.uint32 and page.compression > 1


def test_only_large_label_tiles_are_bigtiff(tmp_path, monkeypatch):
    """Many programs read no BigTIFF."""
    monkeypatch.setattr("labels.CLASSIC", 4 * 100 * 100)
    for side in (100, 101):
        labels = noise(side, side, dtype=np.uint32) // 2
        write_label_tiles(tmp_path / "x.tif", labels.shape, cut(labels, 64, 32), tile=(64, 32))
        np.testing.assert_array_equal(read_labels(tmp_path / "x.tif"), labels)
        with tifffile.TiffFile(tmp_path / "x.tif") as tif:
            assert tif.is_bigtiff == (side > 100)


def test_label_tiles_that_fail_leave_nothing_and_keep_what_was(tmp_path):
    labels = noise(100, 100)
    path = tmp_path / "x.tif"
    path.write_bytes(b"before")

    def broken():
        yield labels[:64, :64]
        raise KeyboardInterrupt

    for tiles, error in ((broken(), KeyboardInterrupt), (list(cut(labels, 64, 64))[:3], ValueError),
                         ([*cut(labels, 64, 64), labels], ValueError), (cut(labels, 32, 64), ValueError)):
        with pytest.raises(error):
            write_label_tiles(path, (100, 100), tiles, tile=(64, 64))
        assert os.listdir(tmp_path) == ["x.tif"] and path.read_bytes() == b"before"
    with pytest.raises(ValueError, match="multiples of 16"):
        write_label_tiles(path, (100, 100), [], tile=(50, 64))


# ----------------------------------------------------------------------------------------------- distance map

def alone(labels, cap=None):
    """The definition: each cell by itself, everything else is outside, the border of the image is no edge."""
    out = np.zeros(labels.shape)
    for i in np.unique(labels[labels > 0]):
        own = labels == i
        d = np.ones(labels.shape) if own.all() else ndimage.distance_transform_edt(own)
        d = np.minimum(d, np.inf if cap is None else cap)
        out[own] = d[own] / d[own].max()
    return out


def check(labels, caps=(None, 0.5, 1, 2.5, 4, 20, 70.5)):
    for cap in caps:
        got = distance_map(labels, cap)
        assert got.dtype == np.float32 and got.shape == labels.shape
        np.testing.assert_allclose(got, alone(labels, cap), atol=1e-6, err_msg=f"cap {cap}")


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.int64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12),
                  elements=st.sampled_from([0, 1, 2, 70_000, 2 ** 62])))
def test_distance_map_of_any_small_labels(labels):
    check(labels)


@pytest.mark.parametrize("seed", range(4))
def test_distance_map_of_blobs_that_touch_wrap_and_come_in_pieces(seed):
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.random((90, 110)), 4)
    labels = np.digitize(smooth, np.quantile(smooth, [0.2, 0.4, 0.6, 0.8]))  # rings, holes, many pieces
    labels[rng.random(labels.shape) > 0.998] = 9                             # holes and cells of one pixel
    check(labels)


def test_distance_map_of_cells_deeper_than_the_passes_go():
    y, x = np.mgrid[:330, :420]
    labels = np.zeros((330, 420), np.uint16)
    labels[np.hypot(y - 150, x - 150) < 140] = 3
    labels[np.hypot(y - 160, x - 330) < 120] = 8                             # touches the first
    labels[100:110, 100:105] = 5
    labels[:, 400:] = 6                                                           # cut by the border
    check(labels)
    check(np.where(x < 200, 1, 2))                                                # two cells, no background


def test_distance_map_closed_forms():
    assert not distance_map(np.zeros((5, 7), int)).any()
    assert (distance_map(np.full((5, 7), 3)) == 1).all()                          # without any edge
    assert distance_map(np.zeros((0, 7), int)).shape == (0, 7)
    bar = np.zeros((1, 9), int)
    bar[0, 2:7] = 4
    np.testing.assert_allclose(distance_map(bar)[0], [0, 0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3, 0, 0], atol=1e-7)
    np.testing.assert_allclose(distance_map(bar, cap=2)[0], [0, 0, 1 / 2, 1, 1, 1, 1 / 2, 0, 0], atol=1e-7)
    pair = np.array([[1, 1, 2, 2]])
    np.testing.assert_allclose(distance_map(pair)[0], [1, 1 / 2, 1 / 2, 1])       # the other cell is an edge


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
        with pytest.raises(ValueError) as error:
            distance_map(wrong, cap)
        one_line(error)


def test_distance_map_of_real_cells(shared):
    labels = read_labels(min((shared / "data/phase_usiigaci/train").glob("*_cells.png")))[200:450, 200:450]
    assert len(np.unique(labels)) > 5
    check(labels, caps=(None, 4))
