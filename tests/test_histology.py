"""histology.py: converters, own labels, truth of tiles, on tissue drawn here (small dark and large pale nuclei)."""
import collections
import math

import numpy as np
import pytest
import skimage.data
import skimage.io

import histology
from histology import Source, Tile

KINDS = {"inflammatory": (5, (70, 35, 115)), "malignant epithelial": (9, (150, 100, 175))}     # radius px, colour


def tissue(seed: int, kinds=tuple(KINDS), size: int = 192, count: int = 40) -> Tile:
    """Pink ground with discs; they do not touch."""
    rng = np.random.default_rng(seed)
    pixels = np.array([225, 165, 200])[:, None, None] + rng.normal(0, 6, (3, size, size))
    labels, classes = np.zeros((size, size), np.int32), {}
    y, x = np.indices((size, size))
    for _ in range(count):
        kind = kinds[rng.integers(len(kinds))]
        radius, colour = KINDS[kind]
        at = rng.integers(radius, size - radius, 2)
        away = np.hypot(y - at[0], x - at[1])
        if labels[away < radius + 2].any():
            continue
        disc = away < radius
        labels[disc] = len(classes) + 1
        classes[len(classes) + 1] = kind
        pixels[:, disc] = np.array(colour)[:, None] + rng.normal(0, 6, (3, disc.sum()))
    return Tile(f"tissue_{seed}", pixels.clip(0, 255).astype(np.uint8), labels, classes, {}, "")


# ------------------------------------------------------------------------------------------------ converters

def test_pannuke(tmp_path):
    """The published layout: instances of five classes in channels, each numbered for itself, and tissues."""
    masks = np.zeros((2, 16, 16, 6))
    masks[0, 1:4, 1:4, 1], masks[0, 8:12, 8:12, 1], masks[0, 5:8, 1:4, 4] = 3, 7, 3
    masks[0, 3, 1:9,
          0] = 2                                                  # on top of both: the first channel keeps it
    for kind, content in (("images", np.full((2, 16, 16, 3), 200.4)), ("masks", masks)):
        folder = tmp_path / "fold1" / kind / "fold1"
        folder.mkdir(parents=True)
        np.save(folder / f"{kind}.npy", content)
    np.save(tmp_path / "fold1" / "images" / "fold1" / "types.npy", np.array(["Breast", "Colon"]))
    first, second = histology.source_tiles(Source(str(tmp_path), "pannuke"))
    names = {i: name for i, name in first.classes.items()}
    assert collections.Counter(names.values()) == {"inflammatory": 2, "healthy epithelial": 1,
                                                   "malignant epithelial": 1}
    assert names[first.labels[9, 9]] == "inflammatory" and names[first.labels[6, 2]] == "healthy epithelial"
    assert names[first.labels[3, 2]] == "malignant epithelial" and first.labels[0, 0] == 0
    assert first.tissue == "breast" and second.tissue == "colon"
    assert not second.labels.any() and not second.classes
    assert first.pixels.shape == (3, 16, 16) and (first.pixels == 200).all() and first.name != second.name


def test_lizard(tmp_path):
    import scipy.io
    labels = np.zeros((12, 20), np.int32)
    labels[1:4, 1:4], labels[6:9, 10:15] = 5, 2
    (tmp_path / "Labels").mkdir()
    (tmp_path / "Images").mkdir()
    scipy.io.savemat(tmp_path / "Labels" / "dpath_1.mat", {"inst_map": labels, "id": np.array([[2], [5]]),
                                                           "class": np.array([[3], [6]]),
                                                           "bbox": np.zeros((2, 4))})
    skimage.io.imsave(tmp_path / "Images" / "dpath_1.png", np.full((12, 20, 3), 90, np.uint8),
                      check_contrast=False)
    tile, = histology.source_tiles(Source(str(tmp_path), "lizard", tissue="colon"))
    assert tile.classes == {2: "lymphocyte",
                            5: "connective"} and (tile.labels == labels).all() and tile.tissue == "colon"
    (tmp_path / "Images" / "dpath_1.png").unlink()
    with pytest.raises(FileNotFoundError, match="dpath_1.png"):
        list(histology.source_tiles(Source(str(tmp_path), "lizard")))


def test_consep_layout_takes_the_class_of_most_pixels(tmp_path):
    labels, types = np.zeros((8, 8), np.uint16), np.zeros((8, 8), np.uint8)
    labels[:3, :3], labels[5:, 5:] = 4, 9
    types[:3, :3], types[5:, 5:], types[0, 0] = 2, 5, 3
    for name, content in (("a", np.zeros((8, 8, 3), np.uint8)), ("a_nuclei", labels), ("a_types", types)):
        skimage.io.imsave(tmp_path / f"{name}.png", content, check_contrast=False)
    tile, = histology.source_tiles(Source(str(tmp_path), "consep"))
    assert tile.classes == {4: "inflammatory", 9: "fibroblast"}


def test_real_consep(shared):
    tiles = list(histology.source_tiles(Source(str(shared / "data" / "he_consep" / "train"), "consep",
                                                  limit=2)))
    counts = collections.Counter(tiles[0].classes.values())
    assert len(tiles) == 2 and counts == {"other": 9, "inflammatory": 94, "malignant epithelial": 289,
                                          "fibroblast": 449}


def test_own_labels_round_trip_with_regions_and_mistakes(tmp_path):
    tile = tissue(1, size=64, count=9)
    area = np.zeros((64, 64), bool)
    area[10:30, 5:40] = True
    histology.write_tile(tmp_path, tile._replace(regions={"necrosis": area}, tissue="liver"),
                            ["mucin", "necrosis"])
    source = Source(str(tmp_path), regions={"1": "mucin", "2": "necrosis"})
    back, = histology.source_tiles(source)
    assert (back.pixels == tile.pixels).all() and (back.labels == tile.labels).all()
    assert back.classes == tile.classes
    assert (back.regions["necrosis"] == area).all() and not back.regions["mucin"].any()
    table = tmp_path / "tissue_1_classes.csv"
    table.write_text("id,class\n1,lemon\n")
    with pytest.raises(ValueError, match="class 'lemon', expected one of nuclei"):
        list(histology.source_tiles(source))
    table.write_text("id,class\n1,inflammatory\n")
    with pytest.raises(ValueError, match="cells without a class, such as 2"):
        list(histology.source_tiles(source))
    with pytest.raises(ValueError, match="class 'lemon' is none of"):
        Source("x", classes={1: "lemon"})
    with pytest.raises(FileNotFoundError, match="no such folder"):
        list(histology.source_tiles(Source(str(tmp_path / "nowhere"))))


def test_truth_of_a_cut_tile():
    tile = tissue(2)
    part = histology.cut(tile, (0, 0, 96, 96))
    assert set(part.classes) == set(np.unique(part.labels)) - {0}
    assert np.bincount(part.labels.ravel())[list(part.classes)].min() >= histology.LEAST
    found, labels = histology.truth(part, "count", ("inflammatory",))
    assert found.count == sum(name == "inflammatory" for name in part.classes.values()) > 0
    rest, others = histology.truth(part, "exclude", ("inflammatory",))
    assert rest.count + found.count == len(part.classes) and not ((labels > 0) & (others > 0)).any()
    assert math.isclose(found.area + rest.area, (part.labels > 0).mean())
    assert histology.truth(part._replace(classes={i: "inflammatory" for i in part.classes}), "count",
                              ("plasma",)) is None


def test_a_table_may_name_cells_without_pixels(tmp_path):
    """They would shift the classes of all cells after them."""
    tile = tissue(33)
    covered = sorted(tile.classes)[2]
    tile.labels[tile.labels == covered] = 0
    histology.write_tile(tmp_path, tile, [])
    read, = histology.source_tiles(Source(str(tmp_path)))
    assert covered not in read.classes and read.classes.keys() == set(np.unique(read.labels)) - {0}
    assert all(read.classes[i] == tile.classes[i] for i in read.classes)
