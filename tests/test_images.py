"""images.py: every kind of file written by another hand and read back, every mistake."""
import contextlib
import importlib.util
import io
import itertools
import os
import re
import struct
import tracemalloc
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import images
from images import open_image, read_image, read_labels, write_labels


def noise(*shape, dtype=np.uint16, seed=0):
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.normal(size=shape).astype(dtype)
    return rng.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


@pytest.fixture(autouse=True)
def nothing_told_yet(monkeypatch):
    monkeypatch.setattr(images, "TOLD", Counter())


def png(width: int, height: int, bits: int, colour_type: int, lines: bytes) -> bytes:
    """A PNG file; lines: a byte for the filter and the pixels of each."""
    def chunk(name: bytes, body: bytes) -> bytes:
        return (struct.pack(">I", len(body)) + name + body
                + struct.pack(">I", zlib.crc32(name + body)))
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines))
            + chunk(b"IEND", b""))


def gray_tiff(width: int, height: int, bits: int, compression: int, strip: bytes) -> bytes:
    """A TIFF file of one strip."""
    tags = {256: width, 257: height, 258: bits, 259: compression, 262: 1, 273: 122, 277: 1,
            278: height, 279: len(strip)}
    return (struct.pack("<2sHIH", b"II", 42, 8, len(tags))
            + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
            + bytes(4) + strip)


@contextlib.contextmanager
def refused(*parts: str):
    """A ValueError of one line with these parts."""
    with pytest.raises(ValueError) as error:
        yield
    text = str(error.value)
    assert "\n" not in text and all(part in text for part in parts), text


# ------------------------------------------------------------------------------------------ folders

def test_image_files_of_a_folder_in_natural_order(tmp_path):
    """All suffixes in any case, below as well; nothing hidden, no folder, no other file."""
    for name in ("b10.tif", "b9.TIFF", "b9_w1.tif", "a/2.png", "a/10.jpeg", "c.btf", "d.jpg",
                 "e.npy", "f.ome.tif",
                 ".hidden.tif", ".git/x.tif", "notes.txt", "x.czi"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.tif").mkdir()
    found = [path.relative_to(tmp_path).as_posix() for path in images.image_files(tmp_path)]
    assert found == ["a/2.png", "a/10.jpeg", "b9.TIFF", "b9_w1.tif", "b10.tif", "c.btf", "d.jpg",
                     "e.npy", "f.ome.tif"]
    assert [path.name for path in images.image_files(str(tmp_path), "*_w1.*")] == ["b9_w1.tif"]
    with pytest.raises(FileNotFoundError):
        images.image_files(tmp_path / "none")


# --------------------------------------------------------------------------------------------- TIFF

LAYOUTS = {
    "contiguous": {},
    "big-endian": dict(byteorder=">"),
    "BigTIFF": dict(bigtiff=True),
    "strips": dict(compression="zlib", rowsperstrip=16),
    "strips, predictor": dict(compression="zlib", predictor=True, rowsperstrip=7),
    "big-endian strips": dict(compression="zlib", rowsperstrip=16, byteorder=">"),
    "tiles": dict(tile=(32, 48)),
    "deflated tiles": dict(tile=(32, 48), compression="zlib", predictor=True),
    "lzma strips": dict(rowsperstrip=64, compression="lzma"),
    "OME tiles": dict(tile=(32, 48), compression="zlib", ome=True),
}


@pytest.mark.smoke
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["u1", "u2", "i2", "u4", "f4", "f8"])
def test_tiff_layouts_give_back_regions(tmp_path, layout, dtype):
    pixels = noise(3, 130, 101, dtype=dtype)
    path = tmp_path / "x.tif"
    options = dict(LAYOUTS[layout], photometric="minisblack", metadata={"axes": "CYX"})
    if dtype[0] == "f":
        options.pop("predictor", None)  # that one needs imagecodecs
    tifffile.imwrite(path, pixels, **options)
    with open_image(path) as source:
        assert (
            source.shape == pixels.shape
            and source.dtype == np.dtype(dtype)
            and source.dtype.isnative
        )
        rng = np.random.default_rng(1)
        for _ in range(12):
            y0, y1 = sorted(rng.choice(131, 2, replace=False))
            x0, x1 = sorted(rng.choice(102, 2, replace=False))
            got = source.region(y0, y1, x0, x1)
            assert got.dtype.isnative and got.flags.writeable
            np.testing.assert_array_equal(got, pixels[:, y0:y1, x0:x1])
    np.testing.assert_array_equal(read_image(path, channels=[3, 1]).pixels, pixels[[2, 0]])


@pytest.mark.parametrize("options", [{}, dict(compression="zlib"), dict(tile=(16, 32)),
                                     dict(tile=(16, 32), compression="zlib", predictor=True)])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("named", [False, True])  # metadata that call the samples channels
def test_rgb_samples_are_channels(tmp_path, options, planar, named):
    pixels = noise(3, 50, 70, dtype=np.uint8)
    stored = pixels if planar == "separate" else np.moveaxis(pixels, 0, 2)
    axes = dict(metadata={"axes": "CYX" if planar == "separate" else "YXC"}) if named else {}
    tifffile.imwrite(tmp_path / "x.tif", stored, photometric="rgb", planarconfig=planar, **options,
                     **axes)
    np.testing.assert_array_equal(read_image(tmp_path / "x.tif").pixels, pixels)
    np.testing.assert_array_equal(read_image(tmp_path / "x.tif", channels=[3, 2]).pixels,
                                  pixels[[2, 1]])
    with open_image(tmp_path / "x.tif") as source:
        np.testing.assert_array_equal(source.region(20, 41, 9, 50), pixels[:, 20:41, 9:50])


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "u4", "i4", "i8", "u8", "i1"])
def test_other_number_types(tmp_path, dtype):
    pixels = noise(1, 20, 30, dtype=dtype)
    tifffile.imwrite(tmp_path / "x.tif", pixels[0])
    got = read_image(tmp_path / "x.tif")
    assert got.pixels.dtype == dtype
    np.testing.assert_array_equal(got.pixels, pixels)


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (1, 1, 3), (2, 1, 3)])
@pytest.mark.parametrize("options", [{}, dict(compression="zlib"), dict(tile=(16, 16))])
def test_smallest_images(tmp_path, shape, options):
    pixels = noise(*shape, dtype=np.uint8)
    colour = len(shape) == 3
    tifffile.imwrite(tmp_path / "x.tif", pixels, photometric="rgb" if colour else "minisblack",
                     **options)
    np.testing.assert_array_equal(read_image(tmp_path / "x.tif").pixels,
                                  np.moveaxis(pixels, 2, 0) if colour else pixels[None])


def test_one_bit(tmp_path):
    mask = np.random.default_rng(0).random((30, 45)) > 0.5
    tifffile.imwrite(tmp_path / "x.tif", mask)
    PIL.Image.fromarray(mask).save(tmp_path / "x.png")
    for name in ("x.tif", "x.png"):
        got = read_image(tmp_path / name).pixels
        assert got.dtype == np.uint8
        np.testing.assert_array_equal(got[0], mask)


STACKS = {"imagej": dict(imagej=True), "ome": dict(ome=True), "shaped": {},
          "deflated": dict(ome=True, compression="zlib"),
          "tiles": dict(tile=(16, 16), compression="zlib")}


@pytest.mark.smoke
@pytest.mark.parametrize("kind", STACKS)
def test_stacks_must_be_chosen_from(tmp_path, kind):
    stack = noise(3, 5, 2, 40, 50)                                        # T, Z, C, Y, X
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, stack, metadata={"axes": "TZCYX"}, photometric="minisblack",
                     **STACKS[kind])
    np.testing.assert_array_equal(read_image(path, plane=4, time=2).pixels, stack[1, 3])
    np.testing.assert_array_equal(read_image(path, [2], plane=5, time=3).pixels, stack[2, 4, 1:])
    for arguments, expected in (({}, ["axis T of 3", "axis Z of 5", "time=1..3", "plane=1..5"]),
                                (dict(plane=2), ["axis T of 3", "time=1..3"]),
                                (dict(plane=6, time=1), ["plane=6", "1..5", "axis Z"]),
                                (dict(plane=0, time=1), ["plane=0", "1..5"])):
        with refused(str(path), *expected):
            open_image(path, **arguments)


def test_axis_z_of_one_needs_no_choice_and_absent_axes_allow_none(tmp_path):
    tifffile.imwrite(tmp_path / "x.tif", noise(1, 2, 20, 30), metadata={"axes": "ZCYX"},
                     imagej=True)
    assert read_image(tmp_path / "x.tif").pixels.shape == (2, 20, 30)
    np.save(tmp_path / "x.npy", noise(20, 30))
    PIL.Image.fromarray(noise(20, 30, dtype=np.uint8)).save(tmp_path / "x.png")
    for name in ("x.npy", "x.png"):
        assert read_image(tmp_path / name, plane=1).pixels.shape == (1, 20, 30)
        with pytest.raises(ValueError, match="no axis Z"):
            open_image(tmp_path / name, plane=2)


def test_units_of_each_axis_in_imagej(tmp_path):
    tifffile.imwrite(tmp_path / "x.tif", noise(3, 20, 30), imagej=True, resolution=(1 / 250, 4.0),
                     metadata={"axes": "ZYX", "spacing": 0.5, "unit": "nm", "yunit": "micron",
                               "zunit": "micron"})
    assert images.stack_of(tmp_path / "x.tif", "Z").step == 0.5
    assert read_image(tmp_path / "x.tif", plane=1).pixel_size == pytest.approx(0.25)


@pytest.mark.parametrize("options", [{}, dict(metadata=None), dict(compression="zlib"),
                                     dict(metadata=None, tile=(16, 16))])
def test_unexplained_pages_are_never_guessed(tmp_path, options):
    pages = noise(6, 20, 30)
    tifffile.imwrite(tmp_path / "x.tif", pages, photometric="minisblack", **options)
    with pytest.raises(ValueError, match="6 pages.*plane=1..6.*channels=1,2"):
        open_image(tmp_path / "x.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "x.tif", plane=4).pixels, pages[3:4])
    np.testing.assert_array_equal(read_image(tmp_path / "x.tif", channels=[6, 2]).pixels,
                                  pages[[5, 1]])


def test_channels_with_samples(tmp_path):
    pixels = noise(2, 20, 30, 3, dtype=np.uint8)                          # C, Y, X, S
    for options in ({}, dict(compression="zlib")):
        path = tmp_path / "x.ome.tif"
        tifffile.imwrite(path, pixels, photometric="rgb", metadata={"axes": "CYXS"}, **options)
        np.testing.assert_array_equal(read_image(path).pixels,
                                      pixels.transpose(0, 3, 1, 2).reshape(6, 20, 30))


def test_imagej_file_that_lists_only_its_first_page(tmp_path):
    """As ImageJ writes stacks above 4 GB."""
    pixels = noise(4, 20, 30)
    tifffile.imwrite(tmp_path / "x.tif", pixels, imagej=True, metadata={"axes": "CYX"})
    with tifffile.TiffFile(tmp_path / "x.tif") as tif:
        following = tif.pages[0].offset + 2 + 12 * len(tif.pages[0].tags)
    with open(tmp_path / "x.tif", "r+b") as file:
        file.seek(following)
        file.write(bytes(4))                                              # no page after the first
    with tifffile.TiffFile(tmp_path / "x.tif") as tif:
        assert len(tif.pages) == 1
    np.testing.assert_array_equal(read_image(tmp_path / "x.tif").pixels, pixels)


def test_only_overlapping_tiles_are_decoded_and_once(tmp_path, monkeypatch):
    pixels = noise(1, 512, 640)
    tifffile.imwrite(tmp_path / "x.tif", pixels, tile=(64, 64), compression="zlib",
                     metadata={"axes": "CYX"})
    seen = []
    whole = tifffile.FileHandle.read
    monkeypatch.setattr(tifffile.FileHandle, "read", lambda *a: seen.append(1) or whole(*a))
    with open_image(tmp_path / "x.tif") as source:
        assert len(seen) < 20                                             # the header
        seen.clear()
        source.region(70, 130, 70, 100)                                   # rows 1 and 2, column 1
        assert len(seen) == 2
        for y in range(0, 512, 40):                                       # bands that cut the tiles
            source.region(y, min(y + 60, 512), 0, 640)
        assert len(seen) == 80
    monkeypatch.setattr(images, "CACHE", 0)  # a row of tiles stays, no more
    with open_image(tmp_path / "x.tif") as source:
        seen.clear()
        for y in range(0, 512, 40):
            source.region(y, min(y + 40, 512), 0, 640)
        assert len(seen) == 80
        assert source._read.bytes <= 64 * 640 * 2


@pytest.mark.parametrize("byteorder", "<>")
def test_uncompressed_pages_apart_are_mapped_not_decoded(tmp_path, monkeypatch, byteorder):
    """As Bio-Formats writes them: a whole page in one strip, headers between the pages."""
    pixels = noise(3, 40, 50)
    with tifffile.TiffWriter(tmp_path / "x.tif", byteorder=byteorder) as tif:
        for page in pixels:
            tif.write(page, metadata=None, contiguous=False, rowsperstrip=40)
    with open_image(tmp_path / "x.tif", channels=[3, 1]) as source:
        monkeypatch.setattr(tifffile.FileHandle, "read", None)
        np.testing.assert_array_equal(source.region(5, 30, 2, 41), pixels[[2, 0], 5:30, 2:41])


def test_sparse_tiles_are_zero(tmp_path):
    pixels = noise(64, 64)
    tifffile.imwrite(tmp_path / "x.tif", pixels, tile=(32, 32), compression="zlib")
    with tifffile.TiffFile(tmp_path / "x.tif", mode="r+") as tif:
        counts = tif.pages[0].databytecounts
        tif.pages[0].tags["TileByteCounts"].overwrite((counts[0], 0, *counts[2:]))
    pixels[:32, 32:] = 0
    np.testing.assert_array_equal(read_image(tmp_path / "x.tif").pixels[0], pixels)


# ----------------------------------------------------------------------------- names, size, notices

def test_channel_names(tmp_path):
    pixels = noise(3, 20, 30)
    tifffile.imwrite(tmp_path / "x.ome.tif", pixels, photometric="minisblack",
                     metadata={"axes": "CYX", "Channel": {"Name": ["DAPI", "GFP-FKHR", "actin"]}})
    tifffile.imwrite(tmp_path / "x.tif", pixels, imagej=True,
                     metadata={"axes": "CYX", "Labels": ["DAPI", "GFP-FKHR", "actin"]})
    for name in ("x.ome.tif", "x.tif"):
        path = tmp_path / name
        assert read_image(path).channels == ("DAPI", "GFP-FKHR", "actin")
        image = read_image(path, channels=["ACTIN", 1])
        assert image.channels == ("actin", "DAPI")
        np.testing.assert_array_equal(image.pixels, pixels[[2, 0]])
        np.testing.assert_array_equal(read_image(path, channels="gfp-fkhr,1").pixels,
                                      pixels[[1, 0]])
        for wrong, expected in (("dapy", "did you mean 'DAPI'"), (0, "1..3, counted from 1"),
                                (4, "1..3"),
                                (-1, "1..3")):
            with refused(expected, f"'{wrong}'"):
                open_image(path, channels=[wrong])
    with pytest.raises(ValueError, match="empty"):
        open_image(path, channels=[])


def test_titles_of_slices_are_no_channel_names(tmp_path):
    """Of Bio-Formats, and of ImageJ where they have lines of text: they differ from file to file.
    """
    for titles in (["c:1/2 - w1.nd2 (series 1)", "c:2/2 - w1.nd2 (series 1)"],
                   ["DAPI\n  x=3", "actin"]):
        tifffile.imwrite(tmp_path / "x.tif", noise(2, 20, 30), imagej=True,
                         metadata={"axes": "CYX", "Labels": titles})
        assert not read_image(tmp_path / "x.tif").channels


@pytest.mark.parametrize("bits", [2, 4])
def test_png_of_few_bits_keeps_its_values(tmp_path, bits):
    values = np.random.default_rng(bits).integers(0, 2**bits, (9, 13))
    packed = np.zeros((9, -(-13 * bits // 8) * 8), np.uint8)
    for bit in range(bits):
        packed[:, bit:13 * bits:bits] = values >> (bits - 1 - bit) & 1
    lines = b"".join(b"\0" + row.tobytes() for row in np.packbits(packed, axis=1))
    (tmp_path / "x.png").write_bytes(png(13, 9, bits, 0, lines))
    np.testing.assert_array_equal(read_image(tmp_path / "x.png").pixels[0], values)


def test_channel_names_that_are_numbers_do_not_shuffle_the_rest(tmp_path):
    pixels = noise(2, 20, 30)
    tifffile.imwrite(tmp_path / "x.ome.tif", pixels, photometric="minisblack",
                     metadata={"axes": "CYX", "Channel": {"Name": ["2", "1"]}})
    np.testing.assert_array_equal(read_image(tmp_path / "x.ome.tif").pixels, pixels)
    # its name
    np.testing.assert_array_equal(read_image(tmp_path / "x.ome.tif", [1]).pixels, pixels[1:])


@pytest.mark.parametrize("options, expected", [
    (dict(ome=True, metadata={"axes": "YX", "PhysicalSizeX": 0.598, "PhysicalSizeY": 0.598}),
     0.598),
    (dict(ome=True, metadata={"axes": "YX", "PhysicalSizeX": 325.0, "PhysicalSizeXUnit": "nm",
                              "PhysicalSizeY": 325.0, "PhysicalSizeYUnit": "nm"}), 0.325),
    (dict(ome=True, metadata={"axes": "YX", "PhysicalSizeX": 1.0, "PhysicalSizeXUnit": "pixel"}),
     None),
    (dict(ome=True, metadata={"axes": "YX"}), None),
    (dict(imagej=True, resolution=(2.0, 2.0), metadata={"unit": "um"}), 0.5),
    (dict(imagej=True, resolution=(2.0, 2.0), metadata={"unit": "micron"}), 0.5),
    (dict(imagej=True, resolution=(2.0, 2.0), metadata={"unit": "\\u00B5m"}), 0.5),
    (dict(imagej=True, resolution=(0.01, 0.01), metadata={"unit": "micron"}), 100.0),
    (dict(imagej=True, resolution=(10000.0, 10000.0), metadata={"unit": "cm"}), 1.0),
    (dict(imagej=True, resolution=(300.0, 300.0), metadata={"unit": "inch"}), None),  # a printer's
    (dict(imagej=True, resolution=(72.0, 72.0), metadata={"unit": "cm"}), None),
    (dict(imagej=True, resolution=(0.2, 0.2), metadata={"unit": "mm"}), 5000.0),
    (dict(imagej=True, resolution=(2.0, 2.0), metadata={"unit": "pixel"}), None),
    (dict(imagej=True), None),
    (dict(resolution=(20000.0, 20000.0), resolutionunit="CENTIMETER"), 0.5),
    (dict(resolution=(50800.0, 50800.0), resolutionunit="INCH"), 0.5),
    (dict(resolution=(72.0, 72.0), resolutionunit="INCH"), None),
    (dict(resolution=(300.0, 300.0), resolutionunit="INCH"), None),
    (dict(resolution=(37.8, 37.8), resolutionunit="CENTIMETER"), None),
    (dict(resolution=(1.0, 1.0)), None),
    ({}, None)])
def test_pixel_size(tmp_path, options, expected):
    tifffile.imwrite(tmp_path / "x.tif", noise(20, 30), **options)
    assert read_image(tmp_path / "x.tif").pixel_size == (expected
                                                         and pytest.approx(expected, rel=1e-6))


def test_a_file_of_an_ome_set_keeps_its_pixel_size_and_takes_no_names(tmp_path):
    """Its XML tells of all files of the set: the size is of each of them, which channel this one
    holds is not said."""
    path = tmp_path / "first.ome.tif"
    for other, names in (("second.ome.tif", None), (path.name, ("DNA",))):
        tifffile.imwrite(path, noise(20, 30), photometric="minisblack",
                         metadata={"axes": "YX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5,
                                   "Channel": {"Name": ["DNA"]}})
        with tifffile.TiffFile(path) as tif:
            told = tif.ome_metadata
        block = f'<TiffData><UUID FileName="{other}">urn:uuid:1</UUID></TiffData>'
        assert "<TiffData" in told
        if names is None:
            tifffile.tiffcomment(path, re.sub(r"<TiffData.*?(/>|</TiffData>)", block, told,
                                              flags=re.DOTALL).encode())
        image = read_image(path)
        assert image.pixel_size == 0.5 and image.channels == names and image.pixels.shape == (1, 20,
                                                                                              30)


def test_pixels_that_are_not_square(tmp_path):
    tifffile.imwrite(tmp_path / "x.tif", noise(20, 30), imagej=True, resolution=(2.0, 1.0),
                     metadata={"unit": "um"})
    with pytest.warns(UserWarning, match="not square"):
        assert read_image(tmp_path / "x.tif").pixel_size is None


@pytest.mark.parametrize("suffix", [".tif", ".png"])
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("options", [{}, dict(tile=(16, 16), compression="zlib")])
def test_alpha_is_dropped_with_a_notice(tmp_path, suffix, count, options):
    path = tmp_path / f"x{suffix}"

    def save(pixels):
        if suffix == ".png":
            PIL.Image.fromarray(pixels).save(path)
        else:
            tifffile.imwrite(path, pixels, photometric="rgb" if count == 4 else "minisblack",
                             planarconfig="contig", extrasamples=["unassalpha"], **options)
    pixels = noise(20, 30, count, dtype=np.uint8)
    pixels[..., -1] = 255
    save(pixels)
    with pytest.warns(UserWarning, match="alpha channel dropped$"):
        got = read_image(path).pixels
    np.testing.assert_array_equal(got, np.moveaxis(pixels[..., :-1], 2, 0))
    with warnings.catch_warnings(record=True) as said:  # the 1st, 10th and 100th file: no flood
        warnings.simplefilter("always")
        for _ in range(99):
            read_image(path)
    assert [str(one.message).rpartition("dropped")[2] for one in said] == [", now in 10 files",
                                                                           ", now in 100 files"]
    pixels[3, 4, -1] = 254
    save(pixels)
    with open_image(path) as source:
        assert source.shape == (count - 1, 20, 30)
        for _ in range(2):
            source.region(0, 20, 0, 30)
            assert len(source.notices) == 1 and source.notices[0].endswith("was not opaque")
    with pytest.raises(ValueError, match=f"1..{count - 1}"):
        open_image(path, channels=[count])


def test_palettes(tmp_path):
    indices = noise(20, 30, dtype=np.uint8)
    palette = noise(256, 3, dtype=np.uint8, seed=1)
    image = PIL.Image.fromarray(indices)
    image.putpalette(palette.tobytes())
    image.save(tmp_path / "x.png")
    colours = np.moveaxis(palette[indices], 2, 0)
    np.testing.assert_array_equal(read_image(tmp_path / "x.png").pixels, colours)
    for factor in (257, 256):  # both are in use for 8-bit colours
        tifffile.imwrite(tmp_path / "x.tif", indices, photometric="palette",
                         colormap=palette.T.astype(np.uint16) * factor)
        np.testing.assert_array_equal(read_image(tmp_path / "x.tif").pixels, colours)
    finer = noise(3, 256, seed=2)
    tifffile.imwrite(tmp_path / "x.tif", indices, photometric="palette", colormap=finer)
    np.testing.assert_array_equal(read_image(tmp_path / "x.tif").pixels, finer[:, indices])
    tifffile.imwrite(tmp_path / "x.tif", indices, imagej=True, photometric="palette",
                     colormap=finer)
    # a lookup table
    np.testing.assert_array_equal(read_image(tmp_path / "x.tif").pixels, indices[None])


def test_min_is_white_and_further_series_are_said(tmp_path):
    pixels = noise(20, 30)
    tifffile.imwrite(tmp_path / "x.tif", pixels, photometric="miniswhite")
    with pytest.warns(UserWarning, match="white as 0"):
        np.testing.assert_array_equal(read_image(tmp_path / "x.tif").pixels[0], pixels)
    with tifffile.TiffWriter(tmp_path / "x.tif") as tif:
        tif.write(pixels)
        tif.write(pixels[:7, :9])
    with pytest.warns(UserWarning, match="1 further image series"):
        np.testing.assert_array_equal(read_image(tmp_path / "x.tif").pixels[0], pixels)


def test_an_ome_header_opens_no_other_file(tmp_path):
    """A TIFF tag that names a file is not followed."""
    secret = tmp_path / "secret.tif"
    tifffile.imwrite(secret, noise(20, 30))
    tifffile.imwrite(tmp_path / "x.ome.tif", noise(1, 20, 30), photometric="minisblack",
                     metadata={"axes": "CYX"})
    with tifffile.TiffFile(tmp_path / "x.ome.tif") as tif:
        header = tif.ome_metadata
    header = header.replace('SizeC="1"', 'SizeC="2"').replace("</Pixels>", (
        '<TiffData FirstC="1" IFD="0" PlaneCount="1"><UUID '
        'FileName="secret.tif">urn:uuid:1</UUID></TiffData>'
        '</Pixels>'))
    tifffile.imwrite(tmp_path / "y.ome.tif", noise(20, 30, seed=5), description=header,
                     metadata=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pixels = read_image(tmp_path / "y.ome.tif").pixels
    np.testing.assert_array_equal(pixels, noise(1, 20, 30, seed=5))


# ---------------------------------------------------------------------------------- PNG, JPEG, .npy

def png_of_16_bits(pixels: np.ndarray, colour_type: int) -> bytes:
    """An independent encoder: row y uses filter y % 5 of the specification."""
    H, W = pixels.shape[:2]
    rows = pixels.astype(">u2").reshape(H, -1).view(np.uint8).astype(int)
    step = rows.shape[1] // W                                             # bytes per pixel
    above, out = np.zeros(rows.shape[1], int), b""
    for y, row in enumerate(rows):
        a, b, c = (np.concatenate([np.zeros(step, int), r[:-step]]) if shift else r
                   for r, shift in ((row, 1), (above, 0), (above, 1)))
        pa, pb, pc = abs(b - c), abs(a - c), abs(a + b - 2 * c)
        paeth = np.where((pa <= pb) & (pa <= pc), a, np.where(pb <= pc, b, c))
        guess = (0, a, b, (a + b) // 2, paeth)[y % 5]
        out += bytes([y % 5]) + ((row - guess) % 256).astype(np.uint8).tobytes()
        above = row
    return png(W, H, 16, colour_type, out)


@pytest.mark.smoke
@pytest.mark.parametrize("samples, colour_type", [(1, 0), (3, 2), (2, 4), (4, 6)])
def test_png_of_16_bits_is_not_cut_to_8(tmp_path, samples, colour_type):
    pixels = noise(37, 23, samples)
    if samples % 2 == 0:
        pixels[..., -1] = 65535
    (tmp_path / "x.png").write_bytes(png_of_16_bits(pixels, colour_type))
    with open_image(tmp_path / "x.png") as source:
        got = source.region(0, 37, 0, 23)
        assert source.dtype == np.uint16 and source.notices == ("alpha channel dropped",) * (
            samples % 2 == 0
        )
    np.testing.assert_array_equal(got, np.moveaxis(pixels, 2, 0)[:samples - (samples % 2 == 0)])


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_png_and_jpeg_of_8_bits(tmp_path, mode):
    pixels = noise(*(40, 50, 3)[:2 + (mode == "RGB")], dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "x.png")
    np.testing.assert_array_equal(read_image(tmp_path / "x.png").pixels,
                                  np.moveaxis(pixels, 2, 0) if mode == "RGB" else pixels[None])
    exif = PIL.Image.Exif()
    exif[274] = 6  # turned on its side; left as stored
    PIL.Image.fromarray(pixels).save(tmp_path / "x.jpg", exif=exif)
    with PIL.Image.open(tmp_path / "x.jpg") as image:
        decoded = np.asarray(image)
    np.testing.assert_array_equal(read_image(tmp_path / "x.jpg").pixels,
                                  np.moveaxis(decoded, 2, 0) if mode == "RGB" else decoded[None])


@pytest.mark.parametrize("shape, expected", [
    ((20, 30), (1, 20, 30)), ((5, 20, 30), (5, 20, 30)), ((3, 20, 4), (3, 20, 4)),
    ((20, 30, 3), (3, 20, 30)), ((20, 30, 4), (4, 20, 30)), ((20, 30, 5), (20, 30, 5))])
@pytest.mark.parametrize("dtype", ["<u2", ">f4"])
def test_npy(tmp_path, shape, expected, dtype):
    pixels = noise(*shape, dtype=np.dtype(dtype).newbyteorder("=")).astype(dtype)
    np.save(tmp_path / "x.npy", pixels)
    got = read_image(tmp_path / "x.npy").pixels
    assert (
        got.shape == expected
        and got.dtype == np.dtype(dtype).newbyteorder("=")
        and got.dtype.isnative
    )
    first = expected[-2:] == shape[-2:]
    np.testing.assert_array_equal(got, pixels.reshape(expected) if first
                                  else np.moveaxis(pixels, 2, 0))


# ----------------------------------------------------------------------------------------- mistakes

def test_files_that_are_no_images(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], object))
    np.save(tmp_path / "complex.npy", np.zeros((4, 4), complex))
    np.save(tmp_path / "nothing.npy", np.zeros((0, 4)))
    np.save(tmp_path / "line.npy", np.zeros(4))
    np.save(tmp_path / "hyper.npy", np.zeros((2, 2, 4, 4)))
    tifffile.imwrite(tmp_path / "complex.tif", np.zeros((4, 4), np.complex64))
    tifffile.imwrite(tmp_path / "volume.tif", np.zeros((16, 16, 16), np.uint8), volumetric=True,
                     tile=(16, 16, 16))
    PIL.Image.new("CMYK", (4, 4)).save(tmp_path / "inks.jpg")
    PIL.Image.fromarray(noise(64, 64, dtype=np.uint8)).save(tmp_path / "cut.png")
    contents = {"empty.tif": b"", "empty.png": b"", "empty.npy": b"", "text.tif": b"hello\nworld",
                "text.png": b"hello", "text.npy": b"hello", "text.jpg": b"hello",
                "cut.tif": b"II*\0\x08",
                "image.czi": b"ZISRAWFILE", "noname": b"x",
                "cut.png": (tmp_path / "cut.png").read_bytes()[:2000]}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name, expected in {
            "empty.tif": "empty file", "empty.png": "empty file", "empty.npy": "empty file",
            "text.tif": "no .tif", "text.png": "no .png", "text.npy": "no .npy",
            "text.jpg": "no .jpg",
            "cut.tif": "truncated", "cut.png": "truncated", "image.czi": "unknown suffix '.czi'",
            "noname": "unknown suffix ''",
            "objects.npy": "object", "complex.npy": "complex128",
            "nothing.npy": "at least one pixel",
            "line.npy": "(H, W)", "hyper.npy": "(C, H, W)", "complex.tif": "complex64",
            "volume.tif": "ZYX",
            "inks.jpg": "CMYK"}.items():
        with refused(expected, str(tmp_path / name)):
            read_image(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        open_image(tmp_path / "missing.tif")
    with pytest.raises(IsADirectoryError):
        open_image(tmp_path)


@pytest.mark.parametrize("options", [{}, dict(compression="zlib"), dict(tile=(16, 16)),
                                     dict(imagej=True),
                                     dict(ome=True)])
def test_tiff_cut_anywhere_is_one_line(tmp_path, options):
    pixels, path = noise(3, 48, 64), tmp_path / "x.tif"
    tifffile.imwrite(path, pixels, photometric="minisblack", metadata={"axes": "CYX"}, **options)
    whole, complete = path.read_bytes(), 0
    for length in np.linspace(1, len(whole) - 1, 60).astype(int):
        path.write_bytes(whole[:length])
        try:
            got = read_image(path, channels=[1, 2, 3]).pixels
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:  # cut behind the last pixel
            complete += 1
            np.testing.assert_array_equal(got, pixels)
    assert complete < 4


def test_tiff_with_bytes_changed_gives_pixels_or_one_line(tmp_path):
    rng = np.random.default_rng(0)
    for options in ({}, dict(compression="zlib", tile=(16, 16))):
        tifffile.imwrite(tmp_path / "x.tif", noise(48, 64), **options)
        whole = np.frombuffer((tmp_path / "x.tif").read_bytes(), np.uint8)
        for _ in range(150):
            bytes_ = whole.copy()
            bytes_[rng.integers(0, 400, 3)] = rng.integers(0, 256, 3)
            bytes_.tofile(tmp_path / "x.tif")
            try:
                with open_image(tmp_path / "x.tif") as source:
                    source.region(0, 1, 0, 1)
            except ValueError as error:
                assert str(tmp_path / "x.tif") in str(error) and "\n" not in str(error)


def test_missing_codec_is_named(tmp_path):
    if importlib.util.find_spec("imagecodecs"):
        pytest.skip("imagecodecs is installed")
    tifffile.imwrite(tmp_path / "x.tif", noise(16, 16))
    with tifffile.TiffFile(tmp_path / "x.tif", mode="r+") as tif:
        tif.pages[0].tags["Compression"].overwrite(50002)
    with refused("JPEGXL", "pip install imagecodecs"):
        open_image(tmp_path / "x.tif")


GRAY = np.cumsum(np.random.default_rng(0).integers(0, 3, (90, 117)), 1).astype(np.uint8)
COLOURS = np.stack([GRAY, GRAY[::-1], GRAY // 2], -1)


@pytest.mark.parametrize("pixels, options", [
    *((GRAY, dict(compression=name)) for name in ("tiff_lzw", "packbits", "tiff_adobe_deflate",
                                                  "lzma", "jpeg")),
    (GRAY, dict(compression="tiff_lzw", tiffinfo={317: 2})),
    (GRAY * np.uint16(113), dict(compression="tiff_lzw", tiffinfo={317: 2, 278: 11})),
    (GRAY.astype(np.float32), dict(compression="tiff_lzw")),
    (COLOURS, dict(compression="tiff_lzw", tiffinfo={278: 16})),
    (COLOURS, dict(compression="jpeg")),
    *((GRAY > 100, dict(compression=name)) for name in (None, "group3", "group4", "tiff_ccitt",
                                                        "tiff_lzw", "packbits"))])
def test_tiffs_of_libtiff_are_read_without_more_packages(tmp_path, pixels, options):
    """As Pillow itself decodes them, also where only a part is asked for."""
    PIL.Image.fromarray(pixels).save(tmp_path / "x.tif", **options)
    with PIL.Image.open(tmp_path / "x.tif") as image:
        expected = np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)
    with open_image(tmp_path / "x.tif") as source:
        assert source.dtype == (np.uint8 if pixels.dtype == bool else pixels.dtype)
        np.testing.assert_array_equal(source.region(0, 90, 0, 117), expected)
        np.testing.assert_array_equal(source.region(31, 57, 5, 80), expected[:, 31:57, 5:80])


@pytest.mark.parametrize("bits", [2, 4])
def test_tiffs_of_few_bits_keep_their_numbers(tmp_path, bits):
    values = np.random.default_rng(1).integers(0, 1 << bits, (20, 32)).astype(np.uint8)
    packed = np.zeros((20, 32 * bits // 8), np.uint8)
    for i in range(8 // bits):
        packed |= values[:, i::8 // bits] << (8 - bits * (i + 1))
    (tmp_path / "x.tif").write_bytes(gray_tiff(32, 20, bits, 1, packed.tobytes()))
    np.testing.assert_array_equal(read_image(tmp_path / "x.tif").pixels[0], values)


def test_labels_with_a_palette_keep_their_numbers(tmp_path):
    """As drawn by programs that colour their masks; as an image they are colours."""
    labels = (GRAY // 16).astype(np.uint8)
    image = PIL.Image.fromarray(labels)
    image.putpalette(list(range(48)) * 16)
    for name in ("x.png", "x.tif"):
        image.save(tmp_path / name)
        np.testing.assert_array_equal(read_labels(tmp_path / name), labels)
        assert read_image(tmp_path / name).pixels.shape == (3, 90, 117)


def slide(path, pixels, **first):
    """A pyramid of three sizes, tiled, as scanners write them; pixels (H, W, 3)."""
    options = dict(photometric="rgb", tile=(128, 128), compression="zlib")
    with tifffile.TiffWriter(path) as file:
        file.write(pixels, subifds=2, resolution=(4e4, 4e4), resolutionunit="CENTIMETER", **options,
                   **first)
        for step in (2, 4):
            file.write(pixels[::step, ::step], subfiletype=1, **options)
    return path


def test_sizes_of_a_slide(tmp_path, monkeypatch):
    """By number, by pixel size, and the smallest with enough pixels; regions of each."""
    pixels = noise(512, 640, 3, dtype=np.uint8)
    path = slide(tmp_path / "x.svs", pixels)
    by_size = {0.2: 1, 0.25: 1, 0.45: 1, 0.5: 2, 0.9: 2, 1.0: 3, 7.0: 3}
    for chosen, number in [*((images.level_of(size), n) for size, n in by_size.items()),
                           (1, 1), (2, 2), (3, 3)]:
        step = 2 ** (number - 1)
        with open_image(path, level=chosen) as source:
            assert source.levels == 3 and source.pixel_size == pytest.approx(0.25 * step)
            np.testing.assert_array_equal(source.region(8, 90, 3, 70),
                                          pixels[::step, ::step][8:90, 3:70].transpose(2, 0, 1))
    for enough, number in ((1, 3), (512 * 640 // 16, 3), (512 * 640 // 4, 2), (1 << 30, 1)):
        monkeypatch.setattr(images, "OVERVIEW", enough)
        with open_image(path, level=images.overview_level) as source:
            assert source.shape[1] == 512 >> (number - 1)
    with pytest.raises(ValueError, match=r"level=4, expected 1..3 \(512 x 640, 256 x 320, 128 x"):
        open_image(path, level=4)
    PIL.Image.fromarray(pixels).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="level=2, but the image is stored in one size"):
        open_image(tmp_path / "x.png", level=2)
    tifffile.imwrite(tmp_path / "x.tif", pixels)
    with pytest.raises(ValueError, match="the file does not say how large a pixel is"):
        open_image(tmp_path / "x.tif", level=images.level_of(0.5))


# ------------------------------------------------------------------- more claimed than can be there

def test_an_image_too_large_for_memory_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(images.runs, "free_memory", lambda: 2e8)
    PIL.Image.new("L", (9000, 9000)).save(tmp_path / "x.png")
    tifffile.imwrite(tmp_path / "strip.tif", np.zeros((9000, 9000), np.uint8), compression="zlib",
                     rowsperstrip=9000)
    np.save(tmp_path / "x.npy", np.zeros((9000, 9000), np.uint8))
    for name in ("x.png", "strip.tif", "x.npy"):
        with refused("too large for memory, 0.081 GB of pixels at once and 0.2 GB free"):
            read_image(tmp_path / name)
    with open_image(tmp_path / "x.npy") as source:                # in parts it can be had
        assert source.region(0, 10, 0, 9000).shape == (1, 10, 9000)


def jpeg_that_claims(width, height):
    body = io.BytesIO()
    PIL.Image.new("L", (8, 8)).save(body, "JPEG")
    body = body.getvalue()
    frame = body.index(b"\xff\xc0")
    return body[:frame + 5] + struct.pack(">HH", height, width) + body[frame + 9:]


def zeros_deflated(size: int) -> bytes:
    """A zlib stream of `size` zeros, a multiple of 16 MB, made without packing them all."""
    packer, block = zlib.compressobj(9, zlib.DEFLATED, -15), 1 << 24
    packed = packer.compress(bytes(block)) + packer.flush(zlib.Z_FULL_FLUSH)
    sum_of_zeros = (size % 65521) << 16 | 1                        # Adler-32
    return b"\x78\xda" + packed * (size // block) + b"\x03\x00" + struct.pack(">I", sum_of_zeros)


@pytest.mark.parametrize("name, body", [
    ("x.jpg", jpeg_that_claims(65500, 65500)),
    *(("x.png", png(side, side, 8, 0, bytes(64))) for side in (2**31 - 1, 50000))])
def test_more_pixels_than_the_bytes_can_hold_are_refused(tmp_path, name, body):
    (tmp_path / name).write_bytes(body)
    with refused("damaged"):
        read_image(tmp_path / name)


def test_a_strip_gives_no_more_than_it_claims(tmp_path):
    (tmp_path / "x.tif").write_bytes(gray_tiff(192, 160, 8, 8, zeros_deflated(64 << 20)))
    tracemalloc.start()
    pixels = read_image(tmp_path / "x.tif").pixels
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert pixels.shape == (1, 160, 192) and peak < 4 << 20


@pytest.mark.parametrize("options", [dict(imagej=True, metadata={"axes": "ZCYX"}),
                                     dict(metadata={"axes": "ZCYX"}),
                                     dict(ome=True, metadata={"axes": "ZCYX"}),
                                     dict(metadata=None)])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_a_stack_cut_anywhere_is_never_taken_for_a_smaller_one(tmp_path, options, compression):
    """What is read of a cut file are pixels that are whole; its shape is that of the whole file."""
    pixels, path = noise(3, 4, 24, 32), tmp_path / "x.tif"
    named = options["metadata"] is not None
    with tifffile.TiffWriter(path, imagej="imagej" in options, ome="ome" in options) as file:
        file.write(pixels if named else pixels.reshape(12, 24, 32), compression=compression,
                   metadata=options["metadata"], photometric="minisblack", contiguous=False)
    whole, refused = path.read_bytes(), 0
    for length in np.linspace(1, len(whole) - 1, 40).astype(int):
        path.write_bytes(whole[:length])
        try:
            with open_image(path, plane=2) as source:
                assert source.shape == ((4 if named else 1), 24, 32)
                np.testing.assert_array_equal(source.region(0, 24, 0, 32),
                                              pixels[1] if named else pixels[0, 1:2])
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 30


@pytest.mark.parametrize("size, said", [("1e-30", "1e-30 µm cannot be"), ("0,5", "nan"),
                                        ("half", "nan"), ("inf", "inf")])
def test_a_pixel_size_that_cannot_be_is_ignored_with_a_word(tmp_path, size, said):
    tifffile.imwrite(tmp_path / "x.ome.tif", noise(20, 30), ome=True,
                     metadata={"axes": "YX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5})
    with tifffile.TiffFile(tmp_path / "x.ome.tif", mode="r+") as tif:
        text = tif.ome_metadata
        tif.pages[0].tags[270].overwrite(re.sub('Size([XY])="0.5"', rf'Size\1="{size}"', text))
    with open_image(tmp_path / "x.ome.tif") as source:
        assert source.pixel_size is None and said in " ".join(source.notices)


@pytest.mark.parametrize("options", [{}, dict(compression="zlib"), dict(photometric="rgb"),
                                     dict(planarconfig="separate", photometric="minisblack"),
                                     dict(photometric="minisblack", tile=(16, 16))])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_plain_tiff_of_channels_is_read(tmp_path, options, count):
    """imwrite(..., metadata={"axes": "CYX"}): as pages, or as samples of one page."""
    if options.get("photometric") == "rgb" and count < 3:
        pytest.skip("RGB has three samples or more")
    pixels = noise(count, 40, 48)
    tifffile.imwrite(tmp_path / "x.tif", pixels, metadata={"axes": "CYX"}, **options)
    with open_image(tmp_path / "x.tif") as source:
        found = source.region(0, 40, 0, 48)
    np.testing.assert_array_equal(found, pixels[:len(found)])      # samples beyond RGB may be alpha
    assert len(found) >= min(count, 4)


def test_a_turned_camera_is_said(tmp_path):
    exif = PIL.Image.Exif()
    exif[274] = 6
    for name in ("x.jpg", "x.png"):
        PIL.Image.fromarray(GRAY).save(tmp_path / name, exif=exif)
        with open_image(tmp_path / name) as source:
            assert source.shape == (1, 90, 117) and "orientation 6" in source.notices[0]


def test_folders_that_cannot_be_opened_are_not_skipped_in_silence(tmp_path, monkeypatch):
    """Whoever tests may open all of them, so the system's answer is made here."""
    for name in ("a/1.png", "locked/2.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    real = os.scandir

    def scandir(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError):
        images.image_files(tmp_path)
    unreadable = []
    assert [path.name for path in images.image_files(tmp_path, "*", unreadable)] == ["1.png"]
    assert [Path(error.filename).name for error in unreadable] == ["locked"]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_is_found_where_it_is(tmp_path, bad):
    pixels = noise(2, 40, 50, dtype=np.float32)
    pixels[1, 30, 7:9] = bad
    tifffile.imwrite(tmp_path / "x.tif", pixels, metadata={"axes": "CYX"}, photometric="minisblack")
    with open_image(tmp_path / "x.tif") as source:
        np.testing.assert_array_equal(source.region(0, 30, 0, 50), pixels[:, :30])
        with refused("2 of 2000 values", "nan_to_num"):
            source.region(20, 40, 0, 50)
        for box in ((0, 41, 0, 50), (-1, 4, 0, 50), (4, 4, 0, 50)):
            with pytest.raises(ValueError, match="no region"):
                source.region(*box)


# ------------------------------------------------------------------------- TIFFs as bytes in memory

def test_tiffs_in_memory_are_decoded_in_place():
    """A whole one, in any layout; another image is an error, a damaged one that may be fetched
    again another."""
    pixels = noise(40, 50)
    for options in ({}, dict(compression="zlib", rowsperstrip=7), dict(tile=(16, 32)),
                    dict(byteorder=">")):
        body, out = tiff_bytes(pixels, **options), np.zeros((40, 50), np.uint16)
        images.decode_tiff(body, out)
        assert (out == pixels).all() and images.tiff_size(body) == (40, 50)
    for other, said in ((noise(40, 51), "40 x 51 px"), (pixels.astype(np.uint8), "uint8"),
                        (noise(2, 40, 50), "2 page")):
        with pytest.raises(ValueError, match=f"wrong size.*{said}.*expected 40 x 50 px of uint16, "
                                             f"1 page") as error:
            images.decode_tiff(tiff_bytes(other), out)
        assert not isinstance(error.value, images.Damaged)
    for damaged in (b"", b"<html>", body[:100], body[:-1]):
        with pytest.raises(images.Damaged, match="damaged or no TIFF|truncated TIFF"):
            images.decode_tiff(damaged, out)


def tiff_bytes(pixels, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, photometric="minisblack", **options)
    return file.getvalue()


# -------------------------------------------------------------------------------------- intensities

def test_to_rgb():
    pixels = noise(3, 4, 5)
    assert images.to_rgb(pixels) is pixels
    np.testing.assert_array_equal(images.to_rgb(pixels[:1]), pixels[[0, 0, 0]])
    np.testing.assert_array_equal(images.to_rgb(pixels[:2]),
                                  np.stack([pixels[0], pixels[1], 0 * pixels[0]]))
    with pytest.raises(ValueError, match="channels=1,2"):
        images.to_rgb(noise(4, 4, 5))


@pytest.mark.smoke
@settings(max_examples=60, deadline=None)
@given(hnp.arrays(st.sampled_from(["u1", "u2", "i2", "f2", "i4", "u4", "f4", "i8", "u8", "f8",
                                   ">u2", ">f4"]),
                  st.tuples(st.integers(1, 2), st.integers(1, 6), st.integers(1, 6))),
       st.sampled_from([(1.0, 99.8), (0.0, 100.0), (50.0, 50.0), (12.5, 33.3)]))
def test_percentiles_are_those_of_numpy(pixels, limits):
    if pixels.dtype.kind == "f":
        pixels = np.nan_to_num(pixels, nan=0, posinf=1, neginf=-1) % 1000
    got = images.percentiles(pixels, *limits)
    expected = np.percentile(pixels.reshape(len(pixels), -1).astype(np.float64), limits, axis=1).T
    expected[:, 1] = np.where(expected[:, 0] < expected[:, 1], expected[:, 1], pixels.max((1, 2)))
    if pixels.dtype.kind != "f":
        ranked = np.sort(pixels.reshape(len(pixels), -1)).astype(float)
        for pair, bright in zip(expected, ranked[:, int(0.9999 * (ranked.shape[1] - 1))]):
            pair[1] = max(pair[1], min(bright, pair[0] + 4))
            pair[1] = pair[1] if pair[1] - pair[0] >= 4 else pair[0]
    assert got.shape == (len(pixels), 2) and got.dtype == np.float64
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("dtype", ["u1", "u2", "f4", "i4"])
def test_percentiles_of_a_file_in_bands(tmp_path, dtype, monkeypatch):
    pixels = noise(2, 130, 101, dtype=dtype)
    tifffile.imwrite(tmp_path / "x.tif", pixels, tile=(32, 32), compression="zlib",
                     metadata={"axes": "CYX"},
                     photometric="minisblack")
    monkeypatch.setattr(images, "COUNTED", 1500)
    with open_image(tmp_path / "x.tif") as source:
        got = images.percentiles(source)
    expected = np.percentile(pixels.reshape(2, -1).astype(float), (1, 99.8), axis=1).T
    np.testing.assert_array_equal(got, expected)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", ["u1", "u2", "i4", "f2", "f4", "f8"])
def test_normalise(dtype):
    pixels = noise(2, 30, 40, dtype=dtype)
    pixels[1] = 7                                                         # without contrast
    limits = images.percentiles(pixels)
    got = images.normalise(pixels, limits)
    low, high = limits[0]
    assert got.dtype == np.float32 and got.shape == pixels.shape
    expected = np.clip((pixels[0].astype(float) - low) / (high - low), 0, 1)
    np.testing.assert_allclose(got[0], expected, atol=1e-6)
    assert got[0].min() == 0 and got[0].max() == 1 and not got[1].any()


def test_normalise_keeps_small_steps_on_a_large_offset():
    steps = np.arange(12).reshape(1, 3, 4)
    got = images.normalise((steps + 2 ** 30).astype(np.int32), [[2 ** 30, 2 ** 30 + 11]])
    np.testing.assert_allclose(got, steps / 11, atol=1e-7)


# --------------------------------------------------------------------------------------- real files

def test_real_images(shared):
    """Multi-channel fields are read as channels."""
    for name, shape in (("fields_sbs/A01.tif", (2, 640, 640)),
                        ("multiplex_mibi/test/fov8.tif", (22, 1024, 1024)),
                        ("cell_painting/test/pediatric_r03c03f03.tif", (6, 1080, 1080))):
        image = read_image(shared / "data" / name)
        assert image.pixels.shape == shape
        np.testing.assert_array_equal(image.pixels, tifffile.imread(shared / "data" / name))


def test_few_cells_on_black_are_not_clipped_away():
    """1 in 1,000 pixels is not black: percentiles 1 and 99.8 are both 0, the limits reach to the
    brightest."""
    pixels = np.zeros((1, 100, 100), np.uint16)
    pixels[0, :2, :5] = 700
    assert images.percentiles(pixels).tolist() == [[0, 700]]
    assert images.normalise(pixels, images.percentiles(pixels)).sum() == 10


@pytest.mark.smoke
def test_three_grey_levels_are_no_contrast():
    """Of whole numbers: what lies between is rounded away. A few brighter pixels are some, a single
    one is not."""
    place = np.arange(300).reshape(1, 15, 20)
    levels = place % 3
    for pixels, expected in ((levels + 20, [20, 20]), (levels / 2, [0, 1]),
                             (np.where(place % 20 < 1, 9, levels), [0, 9]),
                             (np.where(place < 2, 9, levels), [0, 4]),
                             (np.where(place < 1, 9, levels), [0, 0])):
        limits = images.percentiles(pixels, 1, 99)
        assert limits.tolist() == [expected]
        assert images.normalise(pixels, limits).any() == (expected[0] < expected[1])


# ------------------------------------------------------------------------------------------- labels

@pytest.mark.smoke
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
    for wrong, expected in ((labels.astype(float), "save it as uint16"),
                            (labels - 5, "0 to 2147483647"),
                            (labels + 2 ** 31, "0 to 2147483647"),
                            (np.stack([labels] * 3), "one channel")):
        np.save(tmp_path / "x.npy", wrong)
        with refused(expected):
            read_labels(tmp_path / "x.npy")
    for wrong in (labels - 5, labels + 2 ** 32, labels.astype(float), labels[None]):
        with pytest.raises(ValueError):
            write_labels(tmp_path / "new.tif", wrong)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        write_labels(tmp_path / "nowhere" / "new.tif", labels)
    assert sorted(os.listdir(tmp_path)) == ["x.npy", "x.png"]


@pytest.mark.smoke
@pytest.mark.parametrize("size, block", [((700, 900), 300), ((512, 512), 256), ((1025, 513), 400),
                                         ((3, 5), 2)])
def test_labels_that_come_in_parts_round_trip(tmp_path, size, block):
    expected, path = noise(*size, dtype=np.uint32) // 2, tmp_path / "x.tif"
    writer = images.LabelWriter(path, size, pixel_size=0.5)
    for y, x in itertools.product(range(0, size[0], block), range(0, size[1], block)):
        core = slice(y, min(y + block, size[0])), slice(x, min(x + block, size[1]))
        writer.add(core, expected[core])
        assert os.listdir(tmp_path) == []
    writer.close()
    np.testing.assert_array_equal(read_labels(path), expected)
    assert read_image(path).pixel_size == pytest.approx(0.5) and os.listdir(tmp_path) == ["x.tif"]
    with tifffile.TiffFile(path) as tif:
        page = tif.pages[0]
        assert (
            not tif.is_bigtiff
            and page.tile == (512, 512)
            and page.dtype == np.uint32
            and page.compression > 1
        )


def test_one_part_is_a_plain_file(tmp_path):
    expected = noise(40, 30, dtype=np.uint16)
    writer = images.LabelWriter(tmp_path / "x.tif", (40, 30))
    writer.add((slice(0, 40), slice(0, 30)), expected)
    writer.close()
    with tifffile.TiffFile(tmp_path / "x.tif") as tif:
        assert not tif.pages[0].is_tiled and tif.pages[0].dtype == np.uint16
    np.testing.assert_array_equal(read_labels(tmp_path / "x.tif"), expected)


def test_only_large_files_in_parts_are_bigtiff(tmp_path, monkeypatch):
    """Many programs read no BigTIFF."""
    monkeypatch.setattr("images.CLASSIC", 4 * 100 * 100)
    for side in (100, 101):
        expected, writer = (
            noise(side, side, dtype=np.uint32) // 2,
            images.LabelWriter(tmp_path / "x.tif", (side, side)),
        )
        for rows in (slice(0, 50), slice(50, side)):
            writer.add((rows, slice(0, side)), expected[rows])
        writer.close()
        np.testing.assert_array_equal(read_labels(tmp_path / "x.tif"), expected)
        with tifffile.TiffFile(tmp_path / "x.tif") as tif:
            assert tif.is_bigtiff == (side > 100)


def test_parts_that_are_missing_keep_the_file_that_was(tmp_path):
    path = tmp_path / "x.tif"
    path.write_bytes(b"before")
    writer = images.LabelWriter(path, (600, 600))
    writer.add((slice(0, 300), slice(0, 600)), noise(300, 600))
    with pytest.raises(ValueError, match="0 tiles of labels, expected 4 for 600 x 600 px"):
        writer.close()
    assert os.listdir(tmp_path) == ["x.tif"] and path.read_bytes() == b"before"
