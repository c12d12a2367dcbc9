"""labels.py: files read back, parts that fail."""
import itertools
import os

import numpy as np
import PIL.Image
import pytest
import tifffile

import labels
from images import read_image
from labels import read_labels, write_labels
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


@pytest.mark.parametrize("size, block", [((700, 900), 300), ((512, 512), 256), ((1025, 513), 400), ((3, 5), 2)])
def test_labels_that_come_in_parts_round_trip(tmp_path, size, block):
    expected, path = noise(*size, dtype=np.uint32) // 2, tmp_path / "x.tif"
    writer = labels.LabelWriter(path, size, pixel_size=0.5)
    for y, x in itertools.product(range(0, size[0], block), range(0, size[1], block)):
        core = slice(y, min(y + block, size[0])), slice(x, min(x + block, size[1]))
        writer.add(core, expected[core])
        assert os.listdir(tmp_path) == []
    writer.close()
    np.testing.assert_array_equal(read_labels(path), expected)
    assert read_image(path).pixel_size == pytest.approx(0.5) and os.listdir(tmp_path) == ["x.tif"]
    with tifffile.TiffFile(path) as tif:
        page = tif.pages[0]
        assert not tif.is_bigtiff and page.tile == (512, 512) and page.dtype == np.uint32 and page.compression > 1


def test_one_part_is_a_plain_file(tmp_path):
    expected = noise(40, 30, dtype=np.uint16)
    writer = labels.LabelWriter(tmp_path / "x.tif", (40, 30))
    writer.add((slice(0, 40), slice(0, 30)), expected)
    writer.close()
    with tifffile.TiffFile(tmp_path / "x.tif") as tif:
        assert not tif.pages[0].is_tiled and tif.pages[0].dtype == np.uint16
    np.testing.assert_array_equal(read_labels(tmp_path / "x.tif"), expected)


def test_only_large_files_in_parts_are_bigtiff(tmp_path, monkeypatch):
    """Many programs read no BigTIFF."""
    monkeypatch.setattr("labels.CLASSIC", 4 * 100 * 100)
    for side in (100, 101):
        expected, writer = noise(side, side, dtype=np.uint32) // 2, labels.LabelWriter(tmp_path / "x.tif", (side, side))
        for rows in (slice(0, 50), slice(50, side)):
            writer.add((rows, slice(0, side)), expected[rows])
        writer.close()
        np.testing.assert_array_equal(read_labels(tmp_path / "x.tif"), expected)
        with tifffile.TiffFile(tmp_path / "x.tif") as tif:
            assert tif.is_bigtiff == (side > 100)


def test_parts_that_are_missing_keep_the_file_that_was(tmp_path):
    path = tmp_path / "x.tif"
    path.write_bytes(b"before")
    writer = labels.LabelWriter(path, (600, 600))
    writer.add((slice(0, 300), slice(0, 600)), noise(300, 600))
    with pytest.raises(ValueError, match="0 tiles of labels, expected 4 for 600 x 600 px"):
        writer.close()
    assert os.listdir(tmp_path) == ["x.tif"] and path.read_bytes() == b"before"
