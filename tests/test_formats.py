"""readers.py and formats.py: each layout is written here, tiny, and must come back."""
import json
import os
import pickle
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings, strategies as st
from skimage import io
from skimage.measure import label

import cells
import formats
import data
import runs
from data import to_rgb


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
        runs.script(data.__doc__, data.Options, data.main, [str(a) for a in arguments])
    out, err = capsys.readouterr() if capsys else ("", "")
    assert stop.value.code == code, err or out
    return err if code and err else out


# ------------------------------------------------------------------------------------------------------ pairs

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
    """An image may end as labels do (val_nuclei); classes, overlays and hidden files are neither."""
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
    assert [(e.name, e.labels().max()) for e in data.examples(tmp_path)] == [("a_cells", blobs(1).max())]
    save(tmp_path / "a_masks.tif", blobs(2))
    assert [e.name for e in data.examples(tmp_path)] == ["a", "a_cells"]
    assert np.array_equal(data.examples(tmp_path)[0].labels(), blobs(2))


def test_cells_without_a_pixel_are_told_of():
    with pytest.warns(UserWarning, match="2 of 3 cells have no pixel of their own"):
        labels = formats.painted((3, 4), [np.array([0, 1, 2]), np.array([], int), np.array([0, 1, 2])])
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
    for path, error in ((tmp_path, ValueError), (tmp_path / "gone", OSError), (tmp_path / "x.png", OSError)):
        with pytest.raises(error, match=re.escape(str(path))) as caught:
            data.examples(path)
        assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------ tiles

@pytest.mark.parametrize("labels", ["b0c0x0_masks.png", "b0c1x0_cells.png", "b0x0_masks.tif"])
def test_tiles_are_joined(tmp_path, labels):
    for c in (0, 1):
        save(tmp_path / f"case7_AT8_b0c{c}x0.tif", picture(c))
    truth = blobs(5)
    save(tmp_path / f"case7_AT8_{labels}", truth)
    example = only(tmp_path)
    image = example.image()
    assert image.channels == ("DAPI", "marker") and np.array_equal(image.pixels, [picture(0), picture(1)])
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


# ----------------------------------------------------------------------------------- nuclei, arrays, tracking

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
    save(alone / "01.png", truth.astype(np.uint8))                         # labels of all under a name that says nothing
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
    assert np.array_equal(found[2].image().pixels, expected) and np.array_equal(found[2].labels(), truths[2])


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
    """Annotated frames alone; silver truth where there is no gold; the other frames are no mistake."""
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
    assert [e.name for e in data.examples(tmp_path, labels="ST")] == ["01/t001", "01/t002", "02/t001"]
    assert [e.name for e in data.examples(tmp_path, labels="gt")] == ["01/t001"]
    assert "clean" in command("check", tmp_path, capsys=capsys)

    save(tmp_path / "01_GT" / "SEG" / "man_seg007.tif", blobs(1))
    with pytest.raises(FileNotFoundError, match="man_seg007.tif: its frame 01/t007.tif is missing"):
        data.examples(tmp_path)
    (tmp_path / "01_GT" / "SEG" / "man_seg007.tif").rename(tmp_path / "01_GT" / "SEG" / "man_seg_000_012.tif")
    with pytest.raises(ValueError, match="man_seg_000_012.tif: .*3-D"):
        data.examples(tmp_path)


# ------------------------------------------------------------------------------------------------------- COCO

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
    """A square closed form, a ring in two parts, a mask as runs; the smaller lies on top; ids as listed."""
    save(tmp_path / "images" / "a.tif", picture(0)), save(tmp_path / "images" / "b.tif", picture(1))
    truth = blobs(4)
    path = coco(tmp_path, {"a.tif": [[[3, 4, 5, 4, 5, 6, 3, 6]], [SQUARE, [20, 0, 22, 0, 22, 2, 20, 2]]],
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
        pixels = formats.rle_pixels({"counts": text, "size": list(mask.shape)}, mask.shape, "here")
        assert np.array_equal(np.sort(pixels), np.flatnonzero(mask))


def test_livecell_layout(tmp_path):
    """Images lie beside annotations/, where the JSON has a dictionary, and an image twice, with two ids."""
    name = "A172_Phase_C7_1_00d04h00m_2"
    save(tmp_path / "images" / "livecell_test_images" / "A172" / f"{name}.tif", picture(0))
    path = coco(tmp_path / "annotations" / "LIVECell", {f"{name}.tif": [[SQUARE]]})
    parsed = json.loads(path.read_text())
    parsed["images"].append(parsed["images"][0] | {"id": 5})
    parsed["annotations"] = {"1": parsed["annotations"][0], "2": {"image_id": 5, "segmentation": [SQUARE]}}
    path.write_text(json.dumps(parsed))
    found = data.examples(path)
    assert [e.name for e in found] == [name, f"{name}_copy2"]
    assert {data.group_of(e.name) for e in found} == {"A172_Phase_C7"}
    assert all(e.labels().sum() == 30 for e in found)


@pytest.mark.parametrize("written", ["../../secret.tif", "/x/secret.tif", "..\\secret.tif", "C:\\secret.tif"])
def test_coco_reaches_no_file_outside(tmp_path, written):
    """The name alone is looked up, below the folder: a file elsewhere is missing, one below is read."""
    save(tmp_path / "secret.tif", picture(0))
    path = coco(tmp_path / "a" / "b", {written: [[SQUARE]]})
    with pytest.raises(FileNotFoundError, match="1 of its images are missing, such as secret.tif"):
        data.examples(path)
    save(tmp_path / "a" / "b" / "c" / "secret.tif", picture(1))
    example = only(tmp_path / "a" / "b")
    assert example.files[0] == tmp_path / "a" / "b" / "c" / "secret.tif" and example.name == "set/secret"


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
    ('{"images": [], "annotations": [{"bbox": [1, 2, 3, 4], "image_id": 1}]}', "without image_id or segm"),
    ('{"images": [], "annotations": [{"segmentation": [], "image_id": 1}]}', "image_id 1, which is not"),
    ('{"images": [], "annotations": [{"segmentation": [["x"]], "image_id": 1}]}', "no JSON that can be read"),
    ('{"some": "settings"}', "no labelled images"), ('{"images": [], "annotations": []}', "no labelled")])
def test_coco_files_that_are_none(tmp_path, text, problem):
    (tmp_path / "set.json").write_text(text)
    with pytest.raises(ValueError, match=problem) as caught:
        data.examples(tmp_path / "set.json")
    assert "\n" not in str(caught.value)


def test_coco_of_another_size(tmp_path):
    save(tmp_path / "a.tif", picture(0))
    with pytest.raises(ValueError, match=r"a.tif is \(48, 31\) px there, but the image has \(24, 31\)"):
        only(coco(tmp_path, {"a.tif": [[SQUARE]]}, height=48)).labels()


# --------------------------------------------------------------------------------------------------- polygons

def holed(seed: int) -> np.ndarray:
    """Labels with holes, several parts and pixels that hang together by a corner alone."""
    labels = blobs(seed, n=9).astype(np.int32)
    labels[np.random.default_rng(seed).random(labels.shape) < 0.2] = 0
    return np.unique(labels, return_inverse=True)[1].reshape(labels.shape)


@pytest.mark.parametrize("seed", range(8))
def test_geojson_gives_back_what_cells_outlined(tmp_path, seed):
    labels = holed(seed)
    save(tmp_path / "x.tif", picture(0))
    cells.write_geojson(tmp_path / ("x.geojson" if seed % 2 else "x_cells.geojson"), labels)
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
    pixels = formats.polygon_pixels(rings, (18, 20))
    assert len(np.unique(pixels)) == len(pixels)
    assert np.array_equal(np.sort(pixels), np.flatnonzero(oracle(rings, (18, 20))))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 36)), min_size=4, max_size=4, unique=True))
def test_neighbours_share_a_side_without_gap_or_overlap(corners):
    """Two triangles with a common side, corners on half pixels, make up the quadrangle around them."""
    a, b, c, d = np.array(corners) / 2
    one, other = (formats.polygon_pixels([np.array(ring)], (18, 20)) for ring in ((a, b, c), (c, b, d)))
    around = formats.polygon_pixels([np.array([a, b, d, c])], (18, 20))
    assert np.array_equal(np.sort(around), np.setxor1d(one, other))    # also where they cross


def test_qupath_regions_are_no_cells(tmp_path):
    def feature(kind, left, shape="Polygon"):
        ring = [[left, 1], [left + 3, 1], [left + 3, 5], [left, 5], [left, 1]]
        geometry = {"type": shape, "coordinates": [ring]}
        return {"type": "Feature", "geometry": geometry, "properties": {"objectType": kind}}
    region, cell = feature("annotation", 0), feature("detection", 10)
    path = tmp_path / "x.geojson"

    def labels(features) -> np.ndarray:
        path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
        return formats.read_geojson(path, (24, 31))
    alone = [[y, x] for y in range(1, 5) for x in range(10, 13)]
    assert np.array_equal(np.argwhere(labels([region, cell])), alone) and labels([region]).sum() == 12
    for one, name in ((region, "PathAnnotationObject"), (cell, "PathCellObject")):         # QuPath 0.2 says it there
        del one["properties"]["objectType"]
        one["id"] = name
    assert np.array_equal(np.argwhere(labels([region, cell])), alone)
    high = feature("detection", 10)
    high["geometry"]["coordinates"] = [[[x, y, 7] for x, y in cell["geometry"]["coordinates"][0]]]
    assert np.array_equal(np.argwhere(labels([high])), alone)                               # heights are left out
    for features, problem in (([feature("cell", 2, "LineString")], "1 is a LineString"), (7, "expected Geo"),
                              ([feature("cell", 90)], "outside of the"), ([{"geometry": None}], "is a None")):
        with pytest.raises(ValueError, match=problem):
            labels(features)


# --------------------------------------------------------------------------------------------------- Cellpose

def seg(path: Path, content, protocol: int, old_numpy: bool = False) -> Path:
    """As np.save writes it, with the names that NumPy 1 or 2 gives."""
    stream = pickle.dumps(np.array(content, dtype=object), protocol=protocol)
    stream = stream.replace(b"numpy._core.multiarray\n" if old_numpy else b"numpy.core.multiarray\n",
                            b"numpy.core.multiarray\n" if old_numpy else b"numpy._core.multiarray\n")
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        file.write(stream)
    return path


def cellpose(masks: np.ndarray) -> dict:
    return {"masks": masks, "outlines": masks * 2, "colors": np.zeros((3, 3)), "filename": Path("/x/y.png"),
            "flows": [np.zeros((1, 3), np.float32), [], None], "est_diam": np.float64(17.5), "model_path": 0}


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
    (os.system, "touch {}"), (exec, "open({!r}, 'w')"), (os.mkdir, "{}"), (np.save, "{}"), (getattr, "{}"),
    (subprocess.check_call, "touch {}"), (__import__, "this"), (np.load, "{}")])
def test_seg_runs_nothing(tmp_path, protocol, function, arguments):
    """The code comes beside masks that are whole, as the masks, or instead of all; os.system would run."""
    call = Call(function, arguments.format(str(tmp_path / "ran")))
    for content in (cellpose(blobs(0)) | {"colors": call}, {"masks": call}, call):
        path = seg(tmp_path / "x_seg.npy", content, protocol)
        with pytest.raises(ValueError, match="x_seg.npy: .*nothing in it was run") as caught:
            formats.read_seg(path)
        assert not list(tmp_path.glob("ran*")) and "\n" not in str(caught.value)
    if function is os.system:
        pickle.loads(pickle.dumps(call, protocol))
        assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [
    {}, {"masks": [[1, 2]]}, {"masks": 7}, [1], "a", {"masks": np.array(["a"])}, {"masks": np.ones((3, 4))},
    {"masks": np.array([{}], dtype=object)}, {"masks": np.zeros((2, 3, 4), np.uint16)},
    {"masks": np.full((3, 4), -1, np.int16)}])
def test_seg_without_masks(tmp_path, content):
    with pytest.raises(ValueError, match="x_seg.npy"):
        formats.read_seg(seg(tmp_path / "x_seg.npy", content, 4))


def test_damaged_seg(tmp_path):
    """Cut anywhere or with any byte changed: labels or one line that names the file, nothing else."""
    whole = seg(tmp_path / "x_seg.npy", cellpose(blobs(0, (5, 6), 2)), 4).read_bytes()
    rng = np.random.default_rng(0)
    for i in range(600):
        content = bytearray(whole[:rng.integers(len(whole))] if i % 2 else whole)
        for at in rng.integers(len(content), size=2 if content and not i % 2 else 0):
            content[at] = rng.integers(256)
        (tmp_path / "y_seg.npy").write_bytes(content)
        try:
            assert formats.read_seg(tmp_path / "y_seg.npy").dtype == np.int32
        except ValueError as error:
            assert "y_seg.npy" in str(error)
