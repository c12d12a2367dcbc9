"""data.py: each layout is written here, tiny, and must come back; groups, splits, convert and
check."""
import csv
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from conftest import write_geojson
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage import io
from skimage.measure import label

import data
import runs
from data import to_rgb

# ------------------------------------------------------------------------------------------ layouts

def blobs(seed: int, shape=(24, 31), n: int = 6) -> np.ndarray:
    """(H, W) uint16 labels 1, 2, ...: discs that touch and cut each other, none in pieces."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:shape[0], :shape[1]]
    labels = np.zeros(shape, np.uint16)
    for i in range(1, n + 1):
        labels[(y - rng.uniform(0, shape[0])) ** 2 + (x - rng.uniform(0, shape[1])) ** 2 < 20] = i
    return label(labels, connectivity=1).astype(np.uint16)


def picture(seed: int, shape=(24, 31)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8)


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix in (".tif", ".tiff"):
        tifffile.imwrite(path, array, photometric="minisblack")
    else:
        io.imsave(path, array, check_contrast=False)
    return path


def pair(folder: Path, name: str, seed: int, labels="{}_masks.png", image="{}.png") -> np.ndarray:
    save(folder / image.format(name), picture(seed))
    save(folder / labels.format(name), blobs(seed))
    return blobs(seed)


def only(path, **choice) -> data.Example:
    example, = data.examples(path, **choice)
    return example


def command(*arguments, code: int = 0, capsys=None) -> str:
    with pytest.raises(SystemExit) as stop:
        runs.script(data.__doc__, data.Config, data.main, [str(a) for a in arguments])
    out, err = capsys.readouterr() if capsys else ("", "")
    assert stop.value.code == code, err or out
    return err if code and err else out


# -------------------------------------------------------------------------------------------- pairs

@pytest.mark.parametrize("image, labels", [
    ("{}_img.png", "{}_masks.png"), ("{}.png", "{}_masks.tif"), ("{}.tif", "{}_cp_masks.png"),
    ("{}.jpg", "{}_mask.npy"), ("{}_img.png", "{}_img_cp_masks.tif"), ("{}.npy", "{}_labels.png"),
    ("{}.tif", "{}_label.tif"), ("{}.png", "{}_cells.png"), ("{}.PNG", "{}_nuclei.png"),
    ("{}.tif", "{}_seg.npy"), ("{}.ome.tif", "{}_masks.png"), ("images/{}.tif", "labels/{}.png"),
    ("images/{}.png", "masks/{}.tif"), ("images/{}.png", "masks/{}_mask.png")])
def test_pairs(tmp_path, image, labels):
    truth = pair(tmp_path / "train", "well 1", 3, labels, image)
    example = only(tmp_path)
    assert example.name == "train/well 1"
    assert np.array_equal(example.labels(), truth) and example.labels().dtype == np.int32
    assert set(example.files) == {p for p in tmp_path.rglob("*") if p.is_file()}
    assert example.image().pixels.shape == (1, 24, 31)
    if not image.endswith("jpg"):
        assert np.array_equal(example.image().pixels[0], picture(3))


def test_names_are_sorted_naturally_and_what_is_no_label_is_none(tmp_path):
    """An image may end as labels do (val_nuclei); classes, overlays and hidden files are neither.
    """
    for i, name in enumerate(("t10", "t9", "a/t1", "val_nuclei")):
        pair(tmp_path, name, i, "{}_nuclei.png")
    for name in ("t9_types.png", "t9_overlay.png", "t9_distance.tif", ".t9_masks.png"):
        save(tmp_path / name, blobs(9))
    found = data.examples(tmp_path)
    assert [example.name for example in found] == ["a/t1", "t9", "t10", "val_nuclei"]
    assert np.array_equal(found[1].labels(), blobs(1))
    assert [e.name for e in data.examples(str(tmp_path), match="^t")] == ["t9", "t10"]


def test_of_several_labels_the_first_counts_or_those_asked_for(tmp_path):
    pair(tmp_path, "x", 0, "{}_cells.png")
    save(tmp_path / "x_nuclei.tif", blobs(1))
    save(tmp_path / "x_types.png", blobs(2))
    assert np.array_equal(only(tmp_path).labels(), blobs(0))
    assert np.array_equal(only(tmp_path, labels="nuclei").labels(), blobs(1))
    with pytest.raises(ValueError, match="no labelled images"):
        data.examples(tmp_path, labels="masks")


def test_an_image_that_has_labels_is_none_of_another(tmp_path):
    save(tmp_path / "a.tif", picture(0))
    pair(tmp_path, "a_cells", 1)
    assert [(e.name, e.labels().max()) for e in data.examples(tmp_path)] == [("a_cells",
                                                                              blobs(1).max())]
    save(tmp_path / "a_masks.tif", blobs(2))
    assert [e.name for e in data.examples(tmp_path)] == ["a", "a_cells"]
    assert np.array_equal(data.examples(tmp_path)[0].labels(), blobs(2))


def test_cells_without_a_pixel_are_told_of():
    with pytest.warns(UserWarning, match="2 of 3 cells have no pixel of their own"):
        labels = data.labels_from_pixels((3, 4), [np.array([0, 1, 2]), np.array([], int),
                                                  np.array([0, 1, 2])])
    assert np.unique(labels).tolist() == [0, 3]


def test_channels_of_an_image_by_number_and_name(tmp_path):
    stack = np.stack([picture(i) for i in range(8)])
    names = {"axes": "CYX", "Labels": list("abcdefgh")}
    tifffile.imwrite(tmp_path / "f.tif", stack, imagej=True, metadata=names)
    save(tmp_path / "f_masks.png", blobs(0))
    image = only(tmp_path, channels=["c", 8]).image()
    assert image.channels == ("c", "h") and np.array_equal(image.pixels, stack[[2, 7]])


@pytest.mark.parametrize("extra", ["x.tif", "x_img.png", "x_masks.tif"])
def test_what_belongs_together_is_never_guessed(tmp_path, extra):
    pair(tmp_path, "x", 0)
    save(tmp_path / extra, blobs(1))
    with pytest.raises(ValueError, match="which belong together.*Keep one"):
        data.examples(tmp_path)


def test_nothing_labelled(tmp_path):
    save(tmp_path / "x.png", picture(0))
    for path, error in ((tmp_path, ValueError), (tmp_path / "gone", OSError),
                        (tmp_path / "x.png", OSError)):
        with pytest.raises(error, match=re.escape(str(path))) as caught:
            data.examples(path)
        assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------------- tiles

@pytest.mark.parametrize("labels", ["b0c0x0_masks.png", "b0c1x0_cells.png", "b0x0_masks.tif"])
def test_tiles_are_joined(tmp_path, labels):
    for c in (0, 1):
        save(tmp_path / f"case7_AT8_b0c{c}x0.tif", picture(c))
    truth = blobs(5)
    save(tmp_path / f"case7_AT8_{labels}", truth)
    example = only(tmp_path)
    image = example.image()
    assert image.channels == ("DAPI", "marker") and np.array_equal(image.pixels,
                                                                   [picture(0), picture(1)])
    assert np.array_equal(to_rgb(image.pixels), [picture(0), picture(1), np.zeros((24, 31))])
    assert np.array_equal(example.labels(), truth) and len(example.files) == 3
    for marker in ("2", "marker"):                                 # without DAPI
        assert np.array_equal(only(tmp_path, channels=[marker]).image().pixels, [picture(1)])
    assert data.donor_of(example.name) == "7" and data.group_of(example.name) == "case7_AT8"


def test_a_tile_without_its_marker_is_left_out_and_listed(tmp_path, capsys):
    for name in ("p1_b0c0.tif", "p1_b0c1.tif", "p2_b0c0.tif"):
        save(tmp_path / name, picture(len(name)))
    for name in ("p1_b0c0_masks.png", "p2_b0c0_masks.png"):
        save(tmp_path / name, np.eye(24, 31, dtype=np.uint8))
    assert only(tmp_path).name == "p1_b0c0"
    listed = command("check", tmp_path, code=1, capsys=capsys)
    assert "p2_b0c0.tif: a tile that lacks a channel or labels" in listed and "p1" not in listed


def test_tiles_of_one_channel_and_hashes_are_plain_images(tmp_path):
    for name in ("q_b0c1x1", "q_b0c1x2"):
        pair(tmp_path / "marker", name, 0)
    for name in ("ab3c4f00", "ab3c5f00", "b3c4d", "b3c5d"):        # as DSB2018 names its images
        pair(tmp_path / "hash", name, 1)
    assert [e.image().pixels.shape for e in data.examples(tmp_path)] == [(1, 24, 31)] * 6


def test_tiles_of_different_size(tmp_path):
    save(tmp_path / "p_b0c0.tif", picture(0)), save(tmp_path / "p_b0c1.tif", picture(1, (24, 30)))
    save(tmp_path / "p_b0c0_masks.png", blobs(0))
    with pytest.raises(ValueError, match=r"p_b0c1.tif: uint8 of \(1, 24, 30\)"):
        only(tmp_path).image()


# ------------------------------------------------------------------------- nuclei, arrays, tracking

def test_one_mask_for_each_nucleus(tmp_path):
    truth = blobs(2)
    for identity in ("00ae65", "0bcd2c"):
        save(tmp_path / "stage1_train" / identity / "images" / f"{identity}.png", picture(0))
        for i in range(1, truth.max() + 1):
            mask = (truth == i) * np.uint8(255)
            save(tmp_path / "stage1_train" / identity / "masks" / f"{i:02d}.png", mask)
    found = data.examples(tmp_path)
    assert [e.name for e in found] == ["stage1_train/00ae65", "stage1_train/0bcd2c"]
    assert np.array_equal(found[0].labels(), truth)
    assert len(found[0].files) == 1 + truth.max()
    assert only(tmp_path / "stage1_train" / "00ae65").name == "00ae65"
    alone = tmp_path / "stage1_train" / "0bcd2c" / "masks"
    for path in sorted(alone.iterdir())[1:]:
        path.unlink()
    assert np.array_equal(data.examples(tmp_path)[1].labels(), truth == 1)
    save(alone / "01.png", truth.astype(np.uint8))  # labels of all under a name that says nothing
    with pytest.raises(ValueError, match=f"{truth.max()} values, expected a mask of one cell"):
        data.examples(tmp_path)[1].labels()
    save(found[0].files[-1], np.zeros((3, 3), np.uint8))
    with pytest.raises(ValueError, match=r"a mask of \(3, 3\)"):
        found[0].labels()


@pytest.mark.parametrize("shape", [(3, 24, 31), (3, 24, 31, 3)])
def test_arrays(tmp_path, shape):
    images = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    truths = np.stack([blobs(i) for i in range(3)]).astype(np.int16)
    save(tmp_path / "PBL_HEK" / "imgs.npy", images), save(tmp_path / "PBL_HEK" / "anns.npy", truths)
    found = data.examples(tmp_path)
    assert [e.name for e in found] == ["PBL_HEK/0000", "PBL_HEK/0001", "PBL_HEK/0002"]
    expected = images[2][None] if images.ndim == 3 else images[2].transpose(2, 0, 1)
    assert np.array_equal(found[2].image().pixels, expected) and np.array_equal(found[2].labels(),
                                                                                truths[2])


def test_arrays_that_do_not_fit(tmp_path):
    save(tmp_path / "imgs.npy", np.zeros((3, 5, 5), np.uint8))
    save(tmp_path / "anns.npy", np.zeros((2, 5, 5), np.int16))
    with pytest.raises(ValueError, match=r"imgs.npy of \(3, 5, 5\), anns.npy of \(2, 5, 5\)"):
        data.examples(tmp_path)
    save(tmp_path / "anns.npy", np.zeros((3, 5, 5), np.float32))
    with pytest.raises(ValueError, match="anns.npy, number 0.*float32.*integers"):
        data.examples(tmp_path)[0].labels()
    np.save(tmp_path / "anns.npy", np.array([{}]))                 # pickled
    with pytest.raises(ValueError, match="anns.npy"):
        data.examples(tmp_path)


def test_tracking(tmp_path, capsys):
    """Annotated frames alone; silver truth where there is no gold; the other frames are no mistake.
    """
    for sequence, kinds in (("01", ("GT", "ST")), ("02", ("ST",))):
        for t in range(3):
            save(tmp_path / sequence / f"t{t:03d}.tif", picture(t + int(sequence)))
        for kind in kinds:
            seed = {"01GT": 5, "01ST": 7, "02ST": 6}[sequence + kind]
            save(tmp_path / f"{sequence}_{kind}" / "SEG" / "man_seg001.tif", blobs(seed))
            save(tmp_path / f"{sequence}_{kind}" / "TRA" / "man_track001.tif", blobs(0))
    save(tmp_path / "01_ST" / "SEG" / "man_seg002.tif", blobs(8))
    assert [e.name for e in data.examples(tmp_path)] == ["01/t001", "02/t001"]
    gold, silver = data.examples(tmp_path)
    assert np.array_equal(gold.labels(), blobs(5)) and np.array_equal(silver.labels(), blobs(6))
    assert [e.name for e in data.examples(tmp_path, labels="ST")] == ["01/t001", "01/t002",
                                                                      "02/t001"]
    assert [e.name for e in data.examples(tmp_path, labels="gt")] == ["01/t001"]
    assert "clean" in command("check", tmp_path, capsys=capsys)

    save(tmp_path / "01_GT" / "SEG" / "man_seg007.tif", blobs(1))
    with pytest.raises(FileNotFoundError, match="man_seg007.tif: its frame 01/t007.tif is missing"):
        data.examples(tmp_path)
    (tmp_path / "01_GT" / "SEG" / "man_seg007.tif").rename(tmp_path / "01_GT" / "SEG"
                                                           / "man_seg_000_012.tif")
    with pytest.raises(ValueError, match="man_seg_000_012.tif: .*3-D"):
        data.examples(tmp_path)


# --------------------------------------------------------------------------------------------- COCO

SQUARE = [2, 3, 7, 3, 7, 9, 2, 9]                                  # columns 2..6, rows 3..8


def coco(folder: Path, annotated: dict[str, list], name: str = "set.json", **more) -> Path:
    """A COCO file for images of 24 x 31 px."""
    size = {"height": 24, "width": 31} | more
    images = [{"id": i, "file_name": file} | size for i, file in enumerate(annotated)]
    parts = [{"id": 0, "image_id": i, "iscrowd": 1, "segmentation": part}
             for i, file in enumerate(annotated) for part in annotated[file]]
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps({"images": images, "annotations": parts}))
    return folder / name


def uncompressed(mask: np.ndarray) -> dict:
    """An independent way to runs: counted one pixel after the other down the columns."""
    counts, value = [0], 0
    for pixel in mask.T.ravel().tolist():
        if pixel != value:
            counts, value = counts + [0], pixel
        counts[-1] += 1
    return {"counts": counts, "size": list(mask.shape)}


def test_coco_polygons_and_rle(tmp_path):
    """A square closed form, a ring in two parts, a mask as runs; the smaller lies on top; ids as
    listed."""
    save(tmp_path / "images" / "a.tif", picture(0)), save(tmp_path / "images" / "b.tif", picture(1))
    truth = blobs(4)
    path = coco(tmp_path,
                {"a.tif": [[[3, 4, 5, 4, 5, 6, 3, 6]], [SQUARE, [20, 0, 22, 0, 22, 2, 20, 2]]],
                           "b.tif": [uncompressed(truth == i) for i in range(1, truth.max() + 1)]})
    a, b = data.examples(path)
    expected = np.zeros((24, 31), int)
    expected[3:9, 2:7] = expected[:2, 20:22] = 2
    expected[4:6, 3:5] = 1
    assert np.array_equal(a.labels(), expected) and np.array_equal(b.labels(), truth)
    assert (a.name, a.files) == ("a", (tmp_path / "images" / "a.tif", path))
    assert [e.name for e in data.examples(tmp_path)] == ["set/a", "set/b"]


def test_coco_packed_rle():
    """Strings that pycocotools 2.0.8 made of a disc and of a square."""
    y, x = np.mgrid[:12, :10]
    disc = (y - 5) ** 2 + (x - 4) ** 2 <= 14
    for text, mask in (("?562O00000001Nf0", disc), ("R[m0X6T3" + "0" * 397 + "nWm0", None)):
        if mask is None:
            mask = np.zeros((300, 400), bool)
            mask[50:250, 100:300] = True
        pixels = data.rle_pixels({"counts": text, "size": list(mask.shape)}, mask.shape, "here")
        assert np.array_equal(np.sort(pixels), np.flatnonzero(mask))


def test_livecell_layout(tmp_path):
    """Images lie beside annotations/, where the JSON has a dictionary, and an image twice, with two
    ids."""
    name = "A172_Phase_C7_1_00d04h00m_2"
    save(tmp_path / "images" / "livecell_test_images" / "A172" / f"{name}.tif", picture(0))
    path = coco(tmp_path / "annotations" / "LIVECell", {f"{name}.tif": [[SQUARE]]})
    parsed = json.loads(path.read_text())
    parsed["images"].append(parsed["images"][0] | {"id": 5})
    parsed["annotations"] = {"1": parsed["annotations"][0],
                             "2": {"image_id": 5, "segmentation": [SQUARE]}}
    path.write_text(json.dumps(parsed))
    found = data.examples(path)
    assert [e.name for e in found] == [name, f"{name}_copy2"]
    assert {data.group_of(e.name) for e in found} == {"A172_Phase_C7"}
    assert all(e.labels().sum() == 30 for e in found)


@pytest.mark.parametrize("written", ["../../secret.tif", "/x/secret.tif", "..\\secret.tif",
                                     "C:\\secret.tif"])
def test_coco_reaches_no_file_outside(tmp_path, written):
    """The name alone is looked up, below the folder: a file elsewhere is missing, one below is
    read."""
    save(tmp_path / "secret.tif", picture(0))
    path = coco(tmp_path / "a" / "b", {written: [[SQUARE]]})
    with pytest.raises(FileNotFoundError, match="1 of its images are missing, such as secret.tif"):
        data.examples(path)
    save(tmp_path / "a" / "b" / "c" / "secret.tif", picture(1))
    example = only(tmp_path / "a" / "b")
    assert (
        example.files[0] == tmp_path / "a" / "b" / "c" / "secret.tif"
        and example.name == "set/secret"
    )


def test_coco_names_in_several_folders(tmp_path):
    for folder in ("p", "q"):
        save(tmp_path / folder / "1.tif", picture(len(folder)))
    assert only(coco(tmp_path, {"q/1.tif": [[SQUARE]]})).files[0] == tmp_path / "q" / "1.tif"
    with pytest.raises(ValueError, match="1.tif may be .*keep one"):
        data.examples(coco(tmp_path, {"1.tif": [[SQUARE]]}))


@pytest.mark.parametrize("part, problem", [
    ([[1, 2, 3]], "expected polygons"), ("abc", "expected polygons"), (None, "expected polygons"),
    ([[1, 2, float("nan"), 4, 5, 6]], "no pixel"), ([[1e300, 2, 3, 4, 5, 6]], "no pixel"),
    ([[100, 100, 110, 100, 110, 110]], "outside of the image"), ({"counts": 7}, "do not fill"),
    *(({"counts": counts, "size": [24, 31]}, "do not fill")
      for counts in ([1, 2], [-744, 1488], {}, [10 ** 30], [744.0])),
    ({"counts": [744], "size": [31, 24]}, "do not fill"),
    *(({"counts": text, "size": [24, 31]}, "as COCO packs") for text in ("\x7f", "o" * 10000))])
def test_coco_segmentations_that_are_none(tmp_path, part, problem):
    save(tmp_path / "a.tif", picture(0))
    with pytest.raises(ValueError, match=problem) as caught:
        only(coco(tmp_path, {"a.tif": [part]})).labels()
    assert "set.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text, problem", [
    ('{"images": [{"id": 1, "file_na', "no JSON"), ("[" * 100000, "no JSON"),
    ('{"images": [{"id": 1}], "annotations": []}', "id, file_name"),
    ('{"images": 7, "annotations": []}', "lists"), ('{"images": [], "annotations": 7}', "lists"),
    ('{"images": [], "annotations": [{"bbox": [1, 2, 3, 4], "image_id": 1}]}',
     "without image_id or segm"),
    ('{"images": [], "annotations": [{"segmentation": [], "image_id": 1}]}',
     "image_id 1, which is not"),
    ('{"images": [], "annotations": [{"segmentation": [["x"]], "image_id": 1}]}',
     "no JSON that can be read"),
    *(('{"images": [], "annotations": [{"segmentation": [], "image_id": 1, "category_id": [2]}], '
       f'"categories": {categories}}}', "image_id 1, which is not")
      for categories in ("7", "null", '[3, {"id": [2]}]')),
    ('{"some": "settings"}', "no labelled images"), ('{"images": [], "annotations": []}',
                                                     "no labelled")])
def test_coco_files_that_are_none(tmp_path, text, problem):
    (tmp_path / "set.json").write_text(text)
    with pytest.raises(ValueError, match=problem) as caught:
        data.examples(tmp_path / "set.json")
    assert "\n" not in str(caught.value)


def test_coco_of_another_size(tmp_path):
    save(tmp_path / "a.tif", picture(0))
    with pytest.raises(ValueError,
                       match=r"a.tif is \(48, 31\) px there, but the image has \(24, 31\)"):
        only(coco(tmp_path, {"a.tif": [[SQUARE]]}, height=48)).labels()


# ----------------------------------------------------------------------------------------- polygons

def holed(seed: int) -> np.ndarray:
    """Labels with holes, several parts and pixels that hang together by a corner alone."""
    labels = blobs(seed, n=9).astype(np.int32)
    labels[np.random.default_rng(seed).random(labels.shape) < 0.2] = 0
    return np.unique(labels, return_inverse=True)[1].reshape(labels.shape)


@pytest.mark.parametrize("seed", range(8))
def test_geojson_gives_back_what_cells_outlined(tmp_path, seed):
    labels = holed(seed)
    save(tmp_path / "x.tif", picture(0))
    write_geojson(tmp_path / ("x.geojson" if seed % 2 else "x_cells.geojson"), labels)
    assert np.array_equal(only(tmp_path).labels(), labels)


def oracle(rings: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Even-odd, one pixel's centre and one side at a time."""
    inside = np.zeros(shape, bool)
    for r, c in np.ndindex(shape):
        for ring in rings:
            for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, 0)):
                if (y0 <= r + 0.5) != (y1 <= r + 0.5):
                    inside[r, c] ^= x0 + (r + 0.5 - y0) * (x1 - x0) / (y1 - y0) <= c + 0.5
    return inside


@pytest.mark.parametrize("seed", range(5))
def test_polygons_against_one_pixel_at_a_time(seed):
    """Stars that cross themselves and reach over every border, with a hole."""
    rng = np.random.default_rng(seed)
    rings = [rng.uniform(-6, 26, (7, 2)), rng.uniform(5, 15, (3, 2))]
    pixels = data.polygon_pixels(rings, (18, 20))
    assert len(np.unique(pixels)) == len(pixels)
    assert np.array_equal(np.sort(pixels), np.flatnonzero(oracle(rings, (18, 20))))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 36)), min_size=4, max_size=4,
                unique=True))
def test_neighbours_share_a_side_without_gap_or_overlap(corners):
    """Two triangles with a common side, corners on half pixels, make up the quadrangle around them.
    """
    a, b, c, d = np.array(corners) / 2
    one, other = (data.polygon_pixels([np.array(ring)], (18, 20))
                  for ring in ((a, b, c), (c, b, d)))
    around = data.polygon_pixels([np.array([a, b, d, c])], (18, 20))
    assert np.array_equal(np.sort(around), np.setxor1d(one, other))    # also where they cross


def test_qupath_classes_of_several_parts_and_cells_inside_of_others(tmp_path):
    def feature(left, given, *below, kind="annotation"):
        ring = [[left, 1], [left + 3, 1], [left + 3, 5], [left, 5], [left, 1]]
        return {"geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": {
            "objectType": kind if below else "detection", "classification": given,
            "childObjects": list(below)}}
    save(tmp_path / "x.tif", picture(0))
    cells = (feature(1, {"names": ["Tumor", "Positive"]}), feature(9, "Stroma"),
             feature(16, None, feature(17, "a spot in the cell"), kind="cell"))
    (tmp_path / "x.geojson").write_text(json.dumps(feature(0, None, *cells)))
    example = only(tmp_path)
    assert example.types() == {1: "Tumor: Positive", 2: "Stroma"}
    assert np.bincount(example.labels().ravel())[1:].tolist() == [12, 12, 12]
    (tmp_path / "x.geojson").write_text(json.dumps([feature(1, None), feature(9, None)]))
    (tmp_path / "x_types.csv").write_text("id,type\n2,Stroma\n")
    assert only(tmp_path).types() == {2: "Stroma"}


def test_images_that_would_be_written_over_each_other_are_refused(tmp_path):
    for name in ("x", "x_masks"):
        save(tmp_path / f"c/{name}.tif", picture(0))
    coco(tmp_path / "c", {name: [uncompressed(blobs(0) == 1)] for name in ("x.tif", "x_masks.tif")})
    with pytest.raises(ValueError, match="set/x and set/x_masks would both be written"):
        data.main(data.Config(), ["convert", str(tmp_path / "c"), str(tmp_path / "out")])


def test_qupath_regions_are_no_cells(tmp_path):
    def feature(kind, left, shape="Polygon"):
        ring = [[left, 1], [left + 3, 1], [left + 3, 5], [left, 5], [left, 1]]
        geometry = {"type": shape, "coordinates": [ring]}
        return {"type": "Feature", "geometry": geometry, "properties": {"objectType": kind}}
    region, cell = feature("annotation", 0), feature("detection", 10)
    path = tmp_path / "x.geojson"

    def labels(features) -> np.ndarray:
        path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
        return data.read_geojson(path, (24, 31))
    alone = [[y, x] for y in range(1, 5) for x in range(10, 13)]
    assert np.array_equal(np.argwhere(labels([region, cell])),
                          alone) and labels([region]).sum() == 12
    # QuPath 0.2 says it there
    for one, name in ((region, "PathAnnotationObject"), (cell, "PathCellObject")):
        del one["properties"]["objectType"]
        one["id"] = name
    assert np.array_equal(np.argwhere(labels([region, cell])), alone)
    high = feature("detection", 10)
    high["geometry"]["coordinates"] = [[[x, y, 7] for x, y in cell["geometry"]["coordinates"][0]]]
    assert np.array_equal(np.argwhere(labels([high])), alone)  # heights are left out
    for features, problem in (([feature("cell", 2, "LineString")], "1 is a LineString"),
                              (7, "expected Geo"),
                              ([feature("cell", 90)], "outside of the"),
                              ([{"geometry": None}], "is a None")):
        with pytest.raises(ValueError, match=problem):
            labels(features)


# ----------------------------------------------------------------------------------------- Cellpose

def seg(path: Path, content, protocol: int, old_numpy: bool = False) -> Path:
    """As np.save writes it, with the names that NumPy 1 or 2 gives."""
    stream = pickle.dumps(np.array(content, dtype=object), protocol=protocol)
    stream = stream.replace(b"numpy._core.multiarray\n" if old_numpy
                            else b"numpy.core.multiarray\n",
                            b"numpy.core.multiarray\n" if old_numpy
                            else b"numpy._core.multiarray\n")
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False,
                                                    "shape": ()})
        file.write(stream)
    return path


def cellpose(masks: np.ndarray) -> dict:
    return {"masks": masks, "outlines": masks * 2, "colors": np.zeros((3, 3)),
            "filename": Path("/x/y.png"),
            "flows": [np.zeros((1, 3), np.float32), [], None], "est_diam": np.float64(17.5),
            "model_path": 0}


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int64", ">u2", "uint8"])
def test_seg(tmp_path, protocol, dtype):
    masks = np.asfortranarray(blobs(0).astype(dtype)) if protocol == 3 else blobs(0).astype(dtype)
    save(tmp_path / "x.png", picture(0))
    seg(tmp_path / "x_seg.npy", cellpose(masks), protocol, old_numpy=protocol < 4)
    assert np.array_equal(only(tmp_path).labels(), blobs(0))


def test_seg_as_numpy_saves_it(tmp_path):
    save(tmp_path / "x.png", picture(0))
    np.save(tmp_path / "x_seg.npy", cellpose(blobs(0)))
    assert np.array_equal(only(tmp_path).labels(), blobs(0))


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("function, arguments", [
    (os.system, "touch {}"), (exec, "open({!r}, 'w')"), (os.mkdir, "{}"), (np.save, "{}"),
    (getattr, "{}"),
    (subprocess.check_call, "touch {}"), (__import__, "this"), (np.load, "{}")])
def test_seg_runs_nothing(tmp_path, protocol, function, arguments):
    """The code comes beside masks that are whole, as the masks, or instead of all; os.system would
    run."""
    call = Call(function, arguments.format(str(tmp_path / "ran")))
    for content in (cellpose(blobs(0)) | {"colors": call}, {"masks": call}, call):
        path = seg(tmp_path / "x_seg.npy", content, protocol)
        with pytest.raises(ValueError, match="x_seg.npy: .*nothing in it was run") as caught:
            data.read_seg(path)
        assert not list(tmp_path.glob("ran*")) and "\n" not in str(caught.value)
    if function is os.system:
        pickle.loads(pickle.dumps(call, protocol))
        assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [
    {}, {"masks": [[1, 2]]}, {"masks": 7}, [1], "a", {"masks": np.array(["a"])},
    {"masks": np.ones((3, 4))},
    {"masks": np.array([{}], dtype=object)}, {"masks": np.zeros((2, 3, 4), np.uint16)},
    {"masks": np.full((3, 4), -1, np.int16)}])
def test_seg_without_masks(tmp_path, content):
    with pytest.raises(ValueError, match="x_seg.npy"):
        data.read_seg(seg(tmp_path / "x_seg.npy", content, 4))


def test_damaged_seg(tmp_path):
    """Cut anywhere or with any byte changed: labels or one line that names the file, nothing else.
    """
    whole = seg(tmp_path / "x_seg.npy", cellpose(blobs(0, (5, 6), 2)), 4).read_bytes()
    rng = np.random.default_rng(0)
    for i in range(600):
        content = bytearray(whole[:rng.integers(len(whole))] if i % 2 else whole)
        for at in rng.integers(len(content), size=2 if content and not i % 2 else 0):
            content[at] = rng.integers(256)
        (tmp_path / "y_seg.npy").write_bytes(content)
        try:
            assert data.read_seg(tmp_path / "y_seg.npy").dtype == np.int32
        except ValueError as error:
            assert "y_seg.npy" in str(error)


# ----------------------------------------------------------------------------------- groups, splits

@pytest.mark.parametrize("name, group", [
    ("trpL_t09", "trpL"), ("01/t012", "01"), ("t00", ""), ("pg6_t3", "pg6"),
    ("movie/frame_12", "movie"),
    ("omnipose_ec_5I_t141xy5c1", "omnipose_ec_5I_xy5c1"),
    ("SkBr3_Phase_H3_2_03d00h00m_4", "SkBr3_Phase_H3"),
    ("jump_r01c01f03", "jump_r01c01"), ("pediatric_r03c03f03p01", "pediatric_r03c03"),
    ("nf1_F7_2", "nf1_F7"),
    ("A01_s3", "A01"), ("emb1_z01", "emb1"), ("emb1_slice3", "emb1"), ("emb1_ch2", "emb1"),
    ("emb1_w2", "emb1"), ("A01_pos3", "A01"),
    ("A01f03d0", "A01"), ("plate_B02f01d1", "plate_B02"), ("hela_copy007", "hela"),
    ("s1_slide3_s0b0c0x0-512y0", "s1_slide3"),
    *((name, name) for name in ("A01", "set46", "T98G_12", "T47D", "gbm12", "he/test_11", "bc_22_2",
                                "set/007", "3T3_set1", "val_MCF10A", "00ae65c1", "b3c4d5",
                                "2024-05_dish"))])
def test_group_of(name, group):
    assert data.group_of(name) == group


@pytest.mark.parametrize("name, donor", [
    ("donor_7/t1", "7"), ("cases/donor_12/tile_b0c0x1", "12"), ("case_control/donor_7/x", "7"),
    ("patients/patient_3/a", "3"),
    ("patient7/a", "7"), ("Subject AB12/a", "AB12"), ("showcase_1/donor_2", "2"),
    ("donor_Müller_t1", "Müller"), ("donor_Mörk_t1", "Mörk"), ("donor_1/case_control_t1", "1"),
    ("donor_7/donor_7_t1", "7")])
def test_donor_of(name, donor):
    assert data.donor_of(name) == donor


@pytest.mark.parametrize("name", ["donors/7_b0c0", "cases/a", "tile7", "showcase_1"])
def test_no_donor_in_the_name(name):
    with pytest.raises(ValueError, match="no donor in the name"):
        data.donor_of(name)


def test_two_donors_in_a_name_are_refused():
    with pytest.raises(ValueError, match="donors 1 and 2 in the name donor_1/patient_2"):
        data.donor_of("donor_1/patient_2")
    with pytest.raises(ValueError, match="donors Smith and review in the name"):
        data.donor_of("case_review/donor_Smith")
    with pytest.raises(ValueError, match="donors 1 and A in the name"):
        data.donor_of("patient_A/case_1/t")
    assert data.donor_of("case_study/donor_Smith") == "Smith"
    assert data.donor_of("donor_1/patient_2", "patient_([0-9]+)") == "2"


def test_copies_of_an_image_stay_on_one_side(tmp_path):
    """COCO files name an image twice, and then it is called so."""
    for number in range(8):
        for name in (f"im{number}", f"im{number}_copy2"):
            pair(tmp_path / "in", name, number)
    command("split", tmp_path / "in", f"out={tmp_path / 'out'}", "fractions=0.5,0.5")
    sides = {row["name"]: row["split"] for row in table(tmp_path / "out/split.tsv")}
    assert len(sides) == 16 and len(set(sides.values())) == 2
    assert all(sides[f"im{number}"] == sides[f"im{number}_copy2"] for number in range(8))


def named(*names: str) -> list[data.Example]:
    return [data.Example(name, (), None, None) for name in names]


def movies(n: int, frames: int) -> list[data.Example]:
    return named(*(f"m{i}_t{t:02d}" for i in range(n) for t in range(frames)))


@pytest.mark.parametrize("share", [0.01, 0.1, 0.3, 0.9, 1.0])
def test_hold_out_takes_whole_groups(share):
    """Groups stay together, neither side is empty, the share is met to within a group."""
    everything = movies(10, 4) + named(*(f"img{i}" for i in range(13)))
    for seed in range(5):
        held = data.hold_out(everything, share, seed)
        groups = {data.group_of(e.name) for e in held}
        assert 0 < len(held) < len(everything)
        assert held == [e for e in everything if data.group_of(e.name) in groups]
        assert abs(len(held) - share * 53) <= 4
        assert {e.name for e in data.hold_out(everything[::-1], share, seed)} == {e.name
                                                                                  for e in held}
    assert len({tuple(e.name for e in data.hold_out(everything, 0.3, seed))
                for seed in range(5)}) > 1


def test_hold_out_of_few():
    assert data.hold_out(named("a"), 0.5, 0) == [] and data.hold_out(named("a", "b"), 0, 0) == []
    assert len(data.hold_out(named("a", "b"), 0.01, 0)) == len(data.hold_out(named("a", "b"), 1,
                                                                             0)) == 1
    frames = movies(1, 10)
    assert data.hold_out(frames, 0.2, 0) == frames[-2:] and data.hold_out(frames, 1,
                                                                          0) == frames[1:]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=3, max_size=25),
       st.sampled_from([(0.6, 0.2, 0.2), (0.9, 0.1)]))
def test_sides_are_balanced_by_images(sizes, fractions):
    """No side is empty, and each is as large as wanted to within the largest group."""
    groups = {f"g{i}": ("", size) for i, size in enumerate(sizes)}
    sides = data._split_sides(groups, fractions, seed=1)
    assert sides.keys() == groups.keys()
    for side, fraction in enumerate(fractions):
        have = sum(groups[group][1] for group in sides if sides[group] == side)
        assert have > 0 and abs(have - fraction * sum(sizes)) <= max(sizes)


def table(path: Path) -> list[dict]:
    return list(csv.DictReader(path.open(encoding="utf-8"), delimiter="\t"))


def test_split_by_donor(tmp_path, capsys):
    source, out = tmp_path / "in", tmp_path / "out"
    for donor in range(6):
        for tile in range(donor + 1):
            pair(source, f"donor-{donor}_tile{tile}", 10 * donor + tile, "{}_masks.tif", "{}.tif")
    keys = ("by=donor", "fractions=0.6,0.2,0.2")
    assert "train: " in command("split", source, *keys, capsys=capsys)
    rows = table(source / "split.tsv")
    assert [r["name"] for r in rows] == [e.name for e in data.examples(source)]
    assert all(r["group"] == r["name"][6] for r in rows)
    assert len({(r["group"], r["split"]) for r in rows}) == 6
    counts = [sum(r["split"] == side for r in rows) for side in ("train", "validation", "test")]
    assert sum(counts) == 21 and abs(counts[0] - 12.6) <= 2 and abs(counts[1] - 4.2) <= 2

    command("split", source, *keys, f"out={out}", capsys=capsys)
    assert (out / "split.tsv").read_bytes() == (source / "split.tsv").read_bytes()  # deterministic
    for row in rows:
        moved = {e.name: e for e in data.examples(out / row["split"])}[row["name"]]
        origin = {e.name: e for e in data.examples(source)}[row["name"]]
        assert np.array_equal(moved.image().pixels, origin.image().pixels)
        assert np.array_equal(moved.labels(), origin.labels())
    assert "written for something else" in command("split", source, f"out={out}", code=1,
                                                   capsys=capsys)
    assert "written for something else" in command("split", source, code=1, capsys=capsys)

    text = (out / "split.tsv").read_text().replace("donor-5_tile0\ttrain", "donor-5_tile0\ttest")
    assert "donor-5_tile0\ttest" in text
    (out / "split.tsv").write_text(text)
    assert "5 is in test and in train" in command("check", out, code=1, capsys=capsys)


def test_split_with_a_pattern_and_without_donors(tmp_path, capsys):
    for name in ("77_x", "77_y", "81_x", "90_z"):
        pair(tmp_path, name, 0)
    error = command("split", tmp_path, "by=donor", code=1, capsys=capsys)
    assert "no donor in the name 77_x" in error and not (tmp_path / "split.tsv").exists()
    command("split", tmp_path, "by=donor", "pattern=^([0-9]+)_", capsys=capsys)
    assert [row["group"] for row in table(tmp_path / "split.tsv")] == ["77", "77", "81", "90"]
    for keys, problem in ((("pattern=(", "by=donor"), "not a regular expression"),
                          (("pattern=_x", "by=donor"), "one group"),
                          (("pattern=^([0-9]+)_",), "finds the donor in a name; give by=donor"),
                          (("fractions=0.5,0.4",), "add up to 1"),
                          (("fractions=1",), "two or three"),
                          (("stratify=dataset",), "77_x lies in no folder of its own"),
                          (("by=donor", "pattern=^(7)", "match=^7"), "1 donors for 2 sides")):
        assert problem in command("split", tmp_path, *keys, code=1, capsys=capsys)


def test_recipes_for_tiles(tmp_path, capsys):
    """configs/if_*.yaml: donors split once; of them one marker, or the marker's channel alone."""
    for donor in range(4):
        for marker in ("AT8", "GFAP"):
            for c in (0, 1):
                save(tmp_path / "in" / f"case{donor}_{marker}_b0c{c}x0.tif",
                     picture(10 * donor + c))
            save(tmp_path / "in" / f"case{donor}_{marker}_b0c0x0_masks.png", blobs(donor))
    command("split", tmp_path / "in", "by=donor", f"out={tmp_path}/if", "fractions=0.5,0.5",
            capsys=capsys)
    train = data.examples(tmp_path / "if" / "train")
    assert len(train) == 4 and train[0].image().channels == ("DAPI", "marker")
    command("convert", tmp_path / "if" / "train", tmp_path / "AT8", "match=AT8", capsys=capsys)
    command("convert", tmp_path / "if" / "train", tmp_path / "marker", "channels=marker",
            capsys=capsys)
    assert [e.name for e in data.examples(tmp_path / "AT8")] == [e.name for e in train
                                                                 if "AT8" in e.name]
    for both, alone in zip(train, data.examples(tmp_path / "marker"), strict=True):
        assert np.array_equal(alone.image().pixels, both.image().pixels[1:])
        assert np.array_equal(alone.labels(), both.labels())


def test_split_stratified(tmp_path, capsys):
    """Ten per cent of each data set, not of their sum."""
    for dataset, n in (("livecell", 30), ("cyto", 20), ("small", 3)):
        for i in range(n):
            pair(tmp_path / dataset / "train", f"{i:03d}", i)
    command("split", tmp_path, "by=image", "stratify=dataset", "fractions=0.9,0.1", capsys=capsys)
    rows = table(tmp_path / "split.tsv")
    held = [row["dataset"] for row in rows if row["split"] == "validation"]
    assert held.count("livecell") == 3 and held.count("cyto") == 2 and len(held) in (5, 6)


# -------------------------------------------------------------------------------- convert and check

def test_convert_keeps_pixels_names_and_pixel_size(tmp_path, capsys):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    stack = np.random.default_rng(0).normal(size=(2, 24, 31))
    written = {"axes": "CYX", "Channel": {"Name": ["DNA", "ER"]}, "PhysicalSizeX": .65,
               "PhysicalSizeY": .65}
    for dtype in ("uint16", "float32", "float64", "int16", "int64"):
        tifffile.imwrite(source / f"{dtype}.tif", (1000 * stack).astype(dtype),
                         photometric="minisblack",
                         ome=dtype != "int64", metadata=written)
        save(source / f"{dtype}_masks.tif", blobs(0).astype(np.uint32) * 30000)
    command("convert", source, out, capsys=capsys)
    for before, after in zip(data.examples(source), data.examples(out), strict=True):
        one, two = before.image(), after.image()
        assert before.name == after.name and two.pixels.dtype == one.pixels.dtype
        assert np.array_equal(one.pixels, two.pixels) and np.array_equal(before.labels(),
                                                                         after.labels())
        assert (one.channels, one.pixel_size) == (two.channels, two.pixel_size)
    assert data.examples(out)[0].image().channels == ("DNA", "ER")
    assert data.examples(out)[0].image().pixel_size == pytest.approx(0.65)


def test_convert_every_layout_and_go_on(tmp_path, capsys):
    source, out = tmp_path / "in", tmp_path / "out"
    pair(source / "pairs", "p", 0)
    for name, array in (("dsb/ab/images/ab.png", picture(1)),
                        ("dsb/ab/masks/1.png", np.uint8(blobs(1) == 1)),
                        ("npy/imgs.npy", picture(2)[None]), ("npy/anns.npy", blobs(2)[None]),
                        ("ctc/01/t000.tif", picture(3)), ("ctc/01_GT/SEG/man_seg000.tif", blobs(3)),
                        ("coco/c.tif", picture(4)), ("qupath/q.tif", picture(5))):
        save(source / name, array)
    coco(source / "coco", {"c.tif": [[SQUARE]]})
    write_geojson(source / "qupath" / "q.geojson", holed(5))
    before = data.examples(source)
    assert len(before) == 6
    assert "6 images written, 0 were there" in command("convert", source, out, capsys=capsys)
    after = data.examples(out)
    assert [e.name for e in before] == [e.name for e in after]
    for one, two in zip(before, after):
        assert np.array_equal(one.image().pixels, two.image().pixels)
        assert np.array_equal(one.labels(), two.labels()) and one.labels().any()

    bytes_before = {path: path.read_bytes() for path in out.rglob("*.tif")}
    (out / "pairs" / "p.tif").unlink()
    assert "1 images written, 5 were there" in command("convert", source, out, capsys=capsys)
    assert {path: path.read_bytes() for path in out.rglob("*.tif")} == bytes_before
    save(source / "pairs" / "p_masks.png", blobs(7))             # corrected since
    os.utime(source / "pairs" / "p_masks.png", (2**31, 2**31))
    assert "1 images written, 5 were there" in command("convert", source, out, capsys=capsys)
    assert np.array_equal(tifffile.imread(out / "pairs" / "p_masks.tif"), blobs(7))
    runs.write_text(source / "pairs" / "p_types.csv", "id,type\n1,round\n")
    os.utime(source / "pairs" / "p_types.csv", (2**31 + 9, 2**31 + 9))
    assert "1 images written, 5 were there" in command("convert", source, out, capsys=capsys)
    assert "1,round" in (out / "pairs" / "p_types.csv").read_text()
    save(source / "pairs" / "p_masks.png", blobs(8))             # an older file in its place
    os.utime(source / "pairs" / "p_masks.png", (2**30, 2**30))
    assert "1 images written, 5 were there" in command("convert", source, out, capsys=capsys)
    assert np.array_equal(tifffile.imread(out / "pairs" / "p_masks.tif"), blobs(8))
    for path in (source / "qupath").iterdir():                   # left out since
        path.unlink()
    assert "0 images written, 5 were there" in command("convert", source, out, capsys=capsys)
    assert len(data.examples(out)) == 5 and not list((out / "qupath").iterdir())
    error = command("convert", source, out, "channels=1", code=1, capsys=capsys)
    assert "converted.txt: written for something else" in error
    assert not list(out.rglob(".*"))


def test_convert_after_a_kill(tmp_path, capsys, monkeypatch):
    """The record is as old as its last writing; what it does not know is written again, or stays,
    for it may be somebody's."""
    source, out = tmp_path / "in", tmp_path / "out"
    for seed, name in enumerate(("a", "b/c", "d", "e")):
        pair(source, name, seed)
    monkeypatch.setattr(data, "NOTED", -1.0)
    recorded, write_data_stamps = [], data.write_data_stamps
    monkeypatch.setattr(data, "write_data_stamps", lambda record, stamps: recorded.append(
        sorted(stamps)) or write_data_stamps(record, stamps))
    assert "4 images written" in command("convert", source, out, capsys=capsys)
    whole = ["a", "b/c", "d", "e"]
    assert recorded == [whole[:1], whole[:2], whole[:3], whole, whole]
    stamps = data.read_data_stamps(out / "converted.tsv", "")
    write_data_stamps(out / "converted.tsv", {"a": stamps["a"], "d": stamps["d"]})   # killed
    for name in ("a", "b/c"):
        (source / f"{name}.png").unlink()
        (source / f"{name}_masks.png").unlink()
    assert "1 images written, 1 were there" in command("convert", source, out, capsys=capsys)
    assert [example.name for example in data.examples(out)] == ["b/c", "d", "e"]


@pytest.mark.parametrize("name", ["x ", "a\tb", '"x"', "12", "a\nb"])
def test_convert_takes_every_name(tmp_path, capsys, name):
    """Also such as do not fit in the table of split, which says so."""
    pair(tmp_path / "in", name, 0)
    pair(tmp_path / "in", "y", 1)
    for said in ("2 images written, 0 were there", "0 images written, 2 were there"):
        assert said in command("convert", tmp_path / "in", tmp_path / "out", capsys=capsys)
    assert {example.name for example in data.examples(tmp_path / "out")} == {name, "y"}
    if re.search("[\t\n]", name):
        error = command("split", tmp_path / "in", code=1, capsys=capsys)
        assert f"{name!r} has a tab, a line break or bytes that are no UTF-8 in its name" in error
    runs.write_text(tmp_path / "out/converted.tsv", "name\tstamp\ny\tabc\n")
    assert "converted.tsv: damaged" in command("convert", tmp_path / "in", tmp_path / "out",
                                               code=1, capsys=capsys)


def test_a_name_in_no_encoding_is_said_before_anything_is_written(tmp_path, capsys):
    pair(tmp_path / "in", "a", 0)
    pair(tmp_path / "in", "caf\udce9", 1)
    for end in ((tmp_path / "out",), ()):
        error = command("split" if not end else "convert", tmp_path / "in", *end, code=1,
                        capsys=capsys)
        assert "bytes that are no UTF-8 in its name; rename the file" in error
    assert not list(tmp_path.rglob("*.tif"))


def test_convert_stops_before_half_a_pair(tmp_path, capsys):
    pair(tmp_path / "in", "a", 0), pair(tmp_path / "in", "b", 1)
    save(tmp_path / "in" / "b_masks.png", blobs(0, (10, 10)))
    error = command("convert", tmp_path / "in", tmp_path / "out", code=1, capsys=capsys)
    assert "b.png: (24, 31) px, labels (10, 10)" in error
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "a.tif", "a_masks.tif", "converted.tsv", "converted.txt"]
    save(tmp_path / "in" / "b_masks.png", blobs(1))
    assert "1 images written, 1 were there" in command("convert", tmp_path / "in",
                                                       tmp_path / "out", capsys=capsys)
    within = command("convert", tmp_path / "in", tmp_path / "in" / "x", code=1, capsys=capsys)
    assert "choose a folder outside" in within and not (tmp_path / "in" / "x").exists()


def test_planes_of_stacks_become_images(tmp_path, capsys):
    """Every second plane that has three cells, numbered anew, under a name that keeps the planes of
    a stack together."""
    stack = np.random.default_rng(0).integers(0, 999, (5, 30, 40)).astype(np.uint16)
    labels = np.zeros((5, 30, 40), np.uint16)
    for cell, z in enumerate((0, 0, 0, 2, 2, 4, 4, 4, 4, 1, 1, 1)):
        labels[z, 2 * cell:2 * cell + 2, 5:20] = 7 * cell + 3
    with pytest.raises(FileNotFoundError, match="no such folder; expected one with stacks"):
        data.main(data.Config(), ["planes", str(tmp_path / "in"), str(tmp_path / "out")])
    (tmp_path / "in").mkdir()
    tifffile.imwrite(tmp_path / "in" / "ovule.tif", stack)
    tifffile.imwrite(tmp_path / "in" / "ovule_labels.tif", labels)
    (tmp_path / "in" / "ovule_z3_projection.tif").touch()
    with pytest.raises(ValueError, match="choose a folder outside"):
        data.main(data.Config(), ["planes", str(tmp_path / "in"), str(tmp_path / "in")])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "ovule_z001.tif").touch()
    with pytest.raises(ValueError, match="has images of its own, such as ovule_z001.tif"):
        data.main(data.Config(), ["planes", str(tmp_path / "in"), str(tmp_path / "mine")])
    tifffile.imwrite(tmp_path / "in" / "ovule_labels.tif", labels.astype(np.int32) - 1)
    with pytest.raises(ValueError, match="labels from -1"):
        data.main(data.Config(every=2), ["planes", str(tmp_path / "in"), str(tmp_path / "out")])
    tifffile.imwrite(tmp_path / "in" / "ovule_labels.tif", labels)
    assert data.main(data.Config(every=2), ["planes", str(tmp_path / "in"),
                                            str(tmp_path / "out")]) == 0
    found = data.examples(tmp_path / "out")
    assert [example.name for example in found] == [
        "ovule_z000",
        "ovule_z004",
    ] and "2 planes" in capsys.readouterr().out
    for example, z in zip(found, (0, 4)):
        np.testing.assert_array_equal(example.image().pixels[0], stack[z])
        np.testing.assert_array_equal(example.labels() > 0, labels[z] > 0)
        assert (
            len(np.unique(example.labels())) - 1
            == example.labels().max()
            == len(np.unique(labels[z])) - 1
        )
    assert {data.group_of(example.name) for example in found} == {"ovule"}
    (tmp_path / "in" / "B").mkdir()                           # of the same name, in another folder
    tifffile.imwrite(tmp_path / "in" / "B" / "ovule.tif", stack + 1)
    tifffile.imwrite(tmp_path / "in" / "B" / "ovule_labels.tif", labels)
    labels[4] = 0                                             # no cells any more
    tifffile.imwrite(tmp_path / "in" / "ovule_labels.tif", labels)
    data.main(data.Config(every=2), ["planes", str(tmp_path / "in"), str(tmp_path / "out")])
    found = data.examples(tmp_path / "out")
    assert [example.name for example in found] == ["B/ovule_z000", "B/ovule_z004", "ovule_z000"]
    np.testing.assert_array_equal(found[0].image().pixels[0], stack[0] + 1)
    tifffile.imwrite(tmp_path / "in" / "flat_labels.tif", labels[0])
    tifffile.imwrite(tmp_path / "in" / "flat.tif", stack[0])
    with pytest.raises(ValueError, match=r"flat_labels.tif: .* expected \(Z, Y, X\)"):
        data.main(data.Config(every=2), ["planes", str(tmp_path / "in"), str(tmp_path / "out")])
    tifffile.imwrite(tmp_path / "in" / "flat.tif", stack, compression="zlib")
    os.truncate(tmp_path / "in" / "flat.tif", (tmp_path / "in" / "flat.tif").stat().st_size - 9)
    with pytest.raises(ValueError, match="flat.tif: damaged, truncated or no .tif"):
        data.main(data.Config(every=2), ["planes", str(tmp_path / "in"), str(tmp_path / "out")])
    with pytest.raises(ValueError, match="no NAME_labels.tif"):
        data.main(data.Config(), ["planes", str(tmp_path / "out"), str(tmp_path / "x")])


def test_check_lists_everything(tmp_path, capsys):
    one, two = tmp_path / "train", tmp_path / "test"
    for i in range(3):
        pair(one, f"fine{i}", i), pair(two, f"new{i}", 10 + i)
    n = sum(int(blobs(i).max()) for i in (0, 1, 2, 10, 11, 12))
    assert command("check", one, two, capsys=capsys).strip() == f"6 images, {n} cells: clean"

    save(one / "m_ctc/01_RES/mask000.tif", blobs(0))               # of a movie, by infer.py
    (one / "fine0.geojson").write_text("[]")                       # beside it, by infer.py
    save(one / "alone.png", picture(90)), save(one / "nobody_masks.png", blobs(0))
    save(one / "fine0_masks.png", np.eye(10, dtype=np.uint8))
    pieces = np.zeros((24, 31), np.uint8)
    pieces[2:4, 2:4] = pieces[10:12, 2:4] = 7
    save(one / "fine1_masks.png", pieces)
    (one / "fine2_masks.png").unlink(), save(one / "fine2_masks.tif", np.ones((24, 31), np.float32))
    save(two / "again.tif", picture(1)), save(two / "again_masks.png", pieces * 0)
    lines = command("check", one, two, code=1, capsys=capsys).splitlines()
    expected = [r"alone.png: an image without labels", r"nobody_masks.png: labels without image",
                r"fine0: image of \(24, 31\) px, labels of \(10, 10\)",
                r"fine1: 1 of 1 cells in pieces, \[7\]",
                r"fine2: .*fine2_masks.tif: .*float32, expected labels",
                r"the same image: .*train: fine1, .*test: again",
                r"6 images, \d+ cells: 6 problems"]
    assert len(lines) == len(expected)
    for pattern in expected:
        assert sum(bool(re.search(pattern, line)) for line in lines) == 1, (pattern, lines)


def test_fields_to_draw_are_no_negative_number():
    with pytest.raises(ValueError, match="fields is -3, expected a whole number, 0 or more"):
        runs.from_dict(data.TrainingData, {"sets": ["x"], "fields": -3}, "here")


@pytest.mark.parametrize("arguments, problem", [
    ((), "got nothing, expected convert"), (("chek", "."), "got chek"), (("check",), "DIR"),
    (("convert", "."), "expected SRC DST"), (("check", ".", "seed=3"), "check does not use seed="),
    (("split", ".", "every=2"), "split does not use every="),
    (("split", ".", "by=doner"), "image or group or donor"),
    (("check", "gone"), "gone: no such folder"),
    (("check", ".", "match=("), "match=(: not a regular expression"),
    (("check", "--fast"), "unknown option"),
    (("check", ".", "chanels=1"), "did you mean 'channels'")])
def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch, arguments, problem):
    pair(tmp_path, "x", 0)
    monkeypatch.chdir(tmp_path)
    error = command(*arguments, code=1, capsys=capsys)
    assert problem in error and error.startswith("error: ") and error.count("\n") == 1


def test_as_a_command(tmp_path):
    """In a process of its own: help names every key and needs no torch, check tells by its exit
    code."""
    script, folder = data.__file__, Path(data.__file__).parent
    help_without_torch = f"""import runpy, sys; sys.argv[1:] = ['--help']
try: runpy.run_path({script!r}, None, '__main__')
finally: assert 'torch' not in sys.modules"""
    told = subprocess.check_output([sys.executable, "-c", help_without_torch], text=True,
                                   cwd=folder)
    assert all(f"  {field}=" in told
               for field in data.Config.__dataclass_fields__) and "man_seg" in told
    pair(tmp_path, "x", 0), save(tmp_path / "y.png", picture(1))
    done = subprocess.run([sys.executable, script, "check", tmp_path], capture_output=True,
                          text=True)
    assert done.returncode == 1 and "y.png: an image without labels" in done.stdout
    assert "error" not in done.stderr and "Traceback" not in done.stderr   # a slow start has a bar


def test_shared_sets(shared):
    """Every image of the manifest is found, with as many instances as it says, of each kind of
    labels."""
    root = shared / "data"
    rows = {row["image"].rpartition(".")[0]: row for row in runs.read_table(root / "manifest.csv")}
    assert {example.name for example in data.examples(root)} == rows.keys()
    for kind in ("nuclei", "cells"):
        found = {example.name: example for example in data.examples(root, labels=kind)}
        with_kind = {name for name, row in rows.items() if kind in row["labels"].split(";")}
        assert found.keys() == with_kind
        for name in with_kind:
            if "dsb2018" not in name:  # the large ones; they are only found
                counts = dict(zip(rows[name]["labels"].split(";"),
                                  rows[name]["n_instances"].split(";")))
                labels = found[name].labels()
                assert np.count_nonzero(np.unique(labels)) == int(counts[kind])
                assert labels.shape == (int(rows[name]["height"]), int(rows[name]["width"]))
