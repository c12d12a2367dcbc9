"""cells.py: numbers against scikit-image and brute force; outlines and files drawn again."""
import csv
import json
import uuid

import numpy as np
import pytest
from conftest import write_geojson
from PIL import Image
from scipy import ndimage
from skimage.measure import label, regionprops_table
from skimage.segmentation import find_boundaries

import cells

REGIONPROPS = {
    "id": "label", "area_px": "area", "perimeter_px": "perimeter_crofton",
    "centroid_y_px": "centroid-0",
    "centroid_x_px": "centroid-1", "bbox_top_px": "bbox-0", "bbox_left_px": "bbox-1",
    "bbox_bottom_px": "bbox-2", "bbox_right_px": "bbox-3", "major_axis_px": "axis_major_length",
    "minor_axis_px": "axis_minor_length",
    "eccentricity": "eccentricity", "solidity": "solidity", "extent": "extent",
    "equivalent_diameter_px": "equivalent_diameter_area", "intensity_mean_1": "intensity_mean-0",
    "intensity_min_2": "intensity_min-1", "intensity_max_2": "intensity_max-1",
}


def blobs(seed: int, shape=(120, 150), smooth=2.5) -> np.ndarray:
    """Touching and lone cells of many shapes with holes, ids with gaps."""
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.normal(size=shape), smooth)
    return label(np.digitize(field, np.quantile(field, [0.4, 0.6, 0.8])), connectivity=1) * 7


def noise(seed: int, shape=(40, 50), cells=3) -> np.ndarray:
    """Every pixel its own way: many parts, holes in holes, parts that meet in corners."""
    return np.random.default_rng(seed).integers(0, cells + 1, shape)


def assert_as_regionprops(labels: np.ndarray, image: np.ndarray) -> None:
    ours = cells.cell_table(labels, image)
    names = {"orientation", *(name.split("-")[0] for name in REGIONPROPS.values())}
    theirs = regionprops_table(labels, np.moveaxis(image, 0, -1), properties=names)
    for mine, yours in REGIONPROPS.items():
        np.testing.assert_allclose(ours[mine], theirs[yours], rtol=1e-9, atol=1e-7, err_msg=mine)
    spread = [image[0][labels == i].std() for i in ours["id"]]
    np.testing.assert_allclose(ours["intensity_sd_1"], spread, rtol=1e-9, atol=1e-9)
    long = ours["major_axis_px"] - ours["minor_axis_px"] > 1e-6  # a square has no direction
    turn = np.exp(2j * (ours["orientation_rad"] - theirs["orientation"]))  # of an axis
    np.testing.assert_allclose(turn[long], 1, atol=1e-6)
    assert np.abs(ours["orientation_rad"]).max() <= np.pi / 2


@pytest.mark.smoke
@pytest.mark.parametrize("seed", range(3))
def test_table_equals_regionprops(seed):
    """Independent reference: all columns of geometry and intensity."""
    image = np.random.default_rng(seed).integers(0, 65536, (2, 80, 90), dtype=np.uint16)
    assert_as_regionprops(blobs(seed, (80, 90)), image)
    assert_as_regionprops(noise(seed), image[:, :40, :50])


@pytest.mark.parametrize("name", ["nuclei_fluo_dsb2018", "he_brain", "phase_usiigaci",
                                  "microglia_fluo"])
def test_table_equals_regionprops_on_real_labels(shared, name):
    path = sorted(p for p in (shared / "data" / name / "train").iterdir()
                  if p.stem.endswith(("_nuclei", "_cells")))[0]
    labels = np.asarray(Image.open(path)).astype(np.int32)[:400, :400]
    image = np.random.default_rng(0).random((2, *labels.shape))
    assert_as_regionprops(labels, image)


def test_discs_are_round_at_every_size_and_ellipses_are_less():
    """Closed form: 4 pi A / P^2 is 1 for a disc and falls as an ellipse gets longer."""
    y, x = np.mgrid[-70:71, -70:71]
    for radius in np.arange(8, 65, 1.5):
        for shift in (0, 0.3, 0.5):
            disc = ((y - shift) ** 2 + (x - shift) ** 2 <= radius ** 2).astype(int)
            assert 0.9 < cells.cell_table(disc)["circularity"][0] < 1.05
    shapes = [(y ** 2 * k + x ** 2 / k <= 400).astype(int) for k in (1, 2, 3)]
    disc, oval, rod = (cells.cell_table(shape)["circularity"][0] for shape in shapes)
    assert disc > oval + 0.1 > rod + 0.2


@pytest.mark.smoke
def test_straight_shapes_in_closed_form():
    labels = np.zeros((40, 60), np.uint8)
    labels[2:12, 3:13] = 3  # a square
    labels[20, 5:25] = 5  # a line
    labels[30, 30] = 9  # a pixel
    labels[15:35, 40:44] = 12  # an upright rectangle
    t = cells.cell_table(labels)
    assert t["id"].tolist() == [3, 5, 9, 12]
    assert t["area_px"].tolist() == [100, 20, 1, 80]
    assert (t["solidity"] == 1).all() and (t["extent"] == 1).all()
    assert t["major_axis_px"][0] == pytest.approx(4 * np.sqrt(99 / 12))
    assert t["minor_axis_px"][[1, 2]] == pytest.approx([0, 0], abs=1e-6)
    assert t["eccentricity"][[0, 1, 2]] == pytest.approx([0, 1, 0], abs=1e-6)
    assert abs(t["orientation_rad"][1]) == pytest.approx(np.pi / 2)  # along the row
    assert t["orientation_rad"][3] == pytest.approx(0)  # along axis 0
    sides = ("top", "left", "bottom", "right")
    assert [t[f"bbox_{side}_px"][1] for side in sides] == [20, 5, 21, 25]
    crossings = np.array([10, 10, 19, 19])  # of the square by rows, columns, diagonals
    steps = [1, 1, 2 ** 0.5, 2 ** 0.5]
    assert t["perimeter_px"][0] == pytest.approx(np.pi / 4 * (crossings / steps).sum())


@pytest.mark.smoke
def test_intensities_keep_the_units_and_the_precision():
    """Closed form: a small spread on a large value survives, in each type."""
    labels = np.repeat([[1, 1, 0, 4, 4, 4]], 4, 0)
    image = np.stack([np.full((4, 6), 65535), np.full((4, 6), 7)]).astype(np.uint16)
    image[0, ::2, :2] = 65533
    t = cells.cell_table(labels, image, channels=["DNA", "actin"])
    assert t["intensity_mean_DNA"].tolist() == [65534, 65535]
    assert t["intensity_sd_DNA"].tolist() == [1, 0]
    assert t["intensity_min_DNA"].tolist() == [65533, 65535]
    assert t["intensity_max_actin"].tolist() == [7, 7]
    assert t["intensity_min_DNA"].dtype == np.uint16
    large = cells.cell_table(labels, image.astype(np.float64) + 1e9)
    assert large["intensity_sd_1"].tolist() == [1, 0]
    twins = cells.cell_table(labels, image, channels=["DNA", "DNA"])  # no column overwrites another
    assert twins["intensity_max_DNA_2"].tolist() == [7, 7]


def brute_gaps(labels: np.ndarray) -> np.ndarray:
    """Distances between pixel squares, cells x cells, from all pixel pairs."""
    ids = np.unique(labels[labels > 0])
    pixels = [np.argwhere(labels == i) for i in ids]
    gaps = np.zeros((len(ids), len(ids)))
    for i, a in enumerate(pixels):
        for j, b in enumerate(pixels[:i]):
            apart = np.maximum(np.abs(a[:, None] - b[None]) - 1, 0)
            gaps[i, j] = gaps[j, i] = np.sqrt((apart ** 2).sum(-1).min())
    return gaps


@pytest.mark.parametrize("seed", range(6))
def test_neighbours_equal_all_pairs_of_pixels(seed, monkeypatch):
    monkeypatch.setattr(cells, "PAIRS", 500 if seed % 2 else cells.PAIRS)
    rng = np.random.default_rng(seed)
    labels = blobs(seed, (36, 48), rng.uniform(0.8, 3))
    labels *= rng.random((36, 48)) < rng.uniform(0.8, 1)
    gaps = brute_gaps(labels)
    itself = np.eye(len(gaps), dtype=bool)
    for near in (0, 1, 2 ** 0.5, 2, 5 ** 0.5, 4.3, 17):
        t = cells.cell_table(labels, near=near)
        close = gaps <= near + 1e-9 * (near > 0)
        assert t["neighbours_near"].tolist() == (close & ~itself).sum(0).tolist()
        assert t["neighbours_touching"].tolist() == ((gaps == 0) & ~itself).sum(0).tolist()
        assert (t["near_px"] == near).all()


def test_nothing_to_the_right_is_no_neighbour():
    """Of the cell that is sorted last."""
    labels = np.array([[4, 0, 1, 2, 3, 0], [2, 2, 3, 2, 2, 4], [3, 4, 0, 1, 2, 0]])
    expected = ((brute_gaps(labels) == 0).sum(0) - 1).tolist()
    assert cells.cell_table(labels, near=0)["neighbours_near"].tolist() == expected


def test_neighbours_of_concave_and_huge_cells():
    """A cell in a bay is as far as the bay's wall, not as the hull; a frame hides nobody."""
    labels = np.zeros((64, 64), int)
    labels[10:54, 10:54] = 1
    labels[20:44, 20:60] = 0  # a C, open to the right
    labels[28:36, 28:36] = 2  # 8 px from the upper, left and lower wall
    labels[[0, -1]] = labels[:, [0, -1]] = 3  # 9 px from the C
    def near(d):
        return cells.cell_table(labels, near=d)["neighbours_near"].tolist()
    assert near(7.9) == [0, 0, 0] and near(8) == [1, 1, 0] and near(9) == [2, 1, 1]
    assert near(28) == [2, 2, 2] and near(26.9) == [2, 1, 1]  # 2 to the frame: 27


def test_default_near_is_the_median_diameter():
    t = cells.cell_table(blobs(4))
    assert (t["near_px"] == np.median(t["equivalent_diameter_px"])).all()


def test_origin_ids_edges_and_micrometres():
    """Invariant: a block with its origin gives the rows of the whole image."""
    labels = blobs(5, (160, 160))
    whole = cells.cell_table(labels, near=5, pixel_size=0.5)
    block = labels[40:160, 30:150]
    inside = [i for i in np.unique(block)[1:] if (labels == i).sum() == (block == i).sum()]
    around = {i: ndimage.binary_dilation(labels == i, iterations=8) for i in inside}
    clear = [i for i in inside if around[i].sum() == around[i][40:160, 30:150].sum()]
    assert len(clear) > 5
    part = cells.cell_table(block, near=5, ids=clear[::-1], origin=(40, 30),
                            edges=(False, False, True, False), pixel_size=0.5)
    rows = np.isin(whole["id"], clear)
    for name, values in part.items():
        np.testing.assert_allclose(values, whole[name][rows], rtol=1e-12, err_msg=name)
    np.testing.assert_allclose(whole["area_um2"], whole["area_px"] / 4)
    np.testing.assert_allclose(whole["major_axis_um"], whole["major_axis_px"] / 2)
    for sides in np.eye(4, dtype=bool):
        frame = np.zeros(labels.shape, bool)
        frame[[0, -1]] = sides[[0, 2], None]
        frame[:, 0] |= sides[1]
        frame[:, -1] |= sides[3]
        cut = np.setdiff1d(labels[frame], 0)
        touches = cells.cell_table(labels, edges=tuple(sides))["touches_border"]
        assert whole["id"][touches].tolist() == cut.tolist()


@pytest.mark.parametrize("shape", [(5, 7), (0, 3), (1, 1)])
def test_no_cells_are_no_rows(shape, tmp_path):
    empty = np.zeros(shape, np.uint16)
    some = cells.cell_table(np.ones((3, 3), int), np.ones((1, 3, 3)), pixel_size=1)
    none = cells.cell_table(empty, np.ones((1, *shape)), pixel_size=1)
    assert list(none) == list(some) and not any(map(len, none.values()))
    cells.write_cell_table(tmp_path / "cells.csv", none)
    assert (tmp_path / "cells.csv").read_text() == ",".join(none) + "\n"
    assert cells.polygons(empty) == {}


def test_huge_ids_stay():
    labels = np.array([[0, 4_000_000_000, 4_000_000_000]], np.uint32)
    assert cells.cell_table(labels)["id"].tolist() == [4_000_000_000]
    assert list(cells.polygons(labels)) == [4_000_000_000]


@pytest.mark.parametrize("arguments, message", [
    ((np.zeros((3, 3)),), "float64"),
    ((np.zeros((1, 3, 3), int),), r"\(1, 3, 3\)"),
    ((np.full((3, 3), -2),), "-2"),
    ((np.ones((3, 3), int), np.ones((3, 3))), r"\(C, H, W\)"),
])
def test_errors_say_what_was_expected(arguments, message):
    with pytest.raises(ValueError, match=f"{message}.*expected|expected.*{message}"):
        cells.cell_table(*arguments)
    for wrong in ({"near": -1}, {"pixel_size": 0}, {"ids": [5]}, {"channels": ["a", "b"]}):
        with pytest.raises(ValueError, match="expected"):
            cells.cell_table(np.ones((3, 3), int), np.ones((1, 3, 3)), **wrong)


# ---------------------------------------------------------------------------------------------- CSV

def test_csv_reads_back_and_fails_whole(tmp_path):
    path = tmp_path / "cells.csv"
    columns = {"id": np.array([3, 70000]), "area, odd": np.array([1 / 3, 123456.789]),
               "cut": np.array([True, False]), "file": ["a\"b.tif", "c.tif"]}
    cells.write_cell_table(path, columns)
    assert list(csv.reader(path.read_text().splitlines())) == [
        list(columns), ["3", "0.3333333", "1", "a\"b.tif"], ["70000", "123456.8", "0", "c.tif"]]
    before = path.read_bytes()
    with pytest.raises(ValueError):
        cells.write_cell_table(path, {"a": np.zeros(2), "b": np.zeros(3)})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["cells.csv"]


# ----------------------------------------------------------------------------------------- outlines

def rasterised(rings, shape, origin=(0, 0)) -> np.ndarray:
    """Pixels inside an odd number of rings: every upright side flips what lies right of it."""
    flips = np.zeros((shape[0], shape[1] + 1), bool)
    for ring in rings:
        ring = np.asarray(ring) - (origin[1], origin[0])
        assert (ring[0] == ring[-1]).all()
        for (x, y), (x2, y2) in zip(ring[:-1].astype(int), ring[1:].astype(int)):
            assert (x == x2) != (y == y2)
            if x == x2:
                flips[min(y, y2):max(y, y2), x] ^= True
    return np.logical_xor.accumulate(flips, 1)[:, :-1]


PATTERNS = [blobs(1), blobs(2, (30, 200), 0.6), noise(3), noise(4, (30, 30), 1), noise(5, (1, 9)),
            np.ones((3, 4), np.uint8)]


@pytest.mark.parametrize("labels", PATTERNS)
def test_polygons_draw_the_labels_again(labels):
    """Round trip, and valid polygons: no ring meets itself, areas add up."""
    drawn = np.zeros(labels.shape, int)
    for identity, parts in cells.polygons(labels).items():
        assert len(parts) == label(labels == identity, connectivity=1).max()
        for part in parts:
            inside = rasterised(part, labels.shape)
            assert (drawn[inside] == 0).all()
            drawn[inside] = identity
            areas = [np.sum(ring[:-1, 0] * ring[1:, 1] - ring[1:, 0] * ring[:-1, 1]) / 2
                     for ring in part]
            assert areas[0] > 0 and all(area < 0 for area in areas[1:])
            assert sum(areas) == inside.sum()
            for ring in part:
                assert len(np.unique(ring[:-1], axis=0)) == len(ring) - 1
                step = np.diff(ring, axis=0)
                assert (step[1:] * step[:-1] == 0).all()  # corners only
    assert np.array_equal(drawn, labels)
    assert list(cells.polygons(labels)) == np.unique(labels[labels > 0]).tolist()


def test_polygon_of_a_ring_that_closes_over_a_corner():
    """Closed form: a hole that touches the outside in one point is a hole."""
    labels = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 0]])
    (outer, hole), = cells.polygons(labels, origin=(10, 20))[1]
    assert {tuple(p) for p in hole} == {(21, 11), (22, 11), (22, 12), (21, 12)}
    assert {tuple(p) for p in outer} == {(20, 10), (23, 10), (23, 12), (22, 12), (22, 13), (20, 13)}


@pytest.mark.smoke
def test_geojson_draws_the_labels_again(tmp_path):
    """Round trip, with what QuPath needs: UUIDs, detections, finite measurements."""
    labels, origin = noise(6), (100, 70000)
    columns = cells.cell_table(labels, np.full((1, *labels.shape), np.nan))
    write_geojson(tmp_path / "a.geojson", labels, columns, origin=origin)
    text = (tmp_path / "a.geojson").read_text()
    collection = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert collection["type"] == "FeatureCollection" and len(collection["features"]) == 3
    drawn = np.zeros(labels.shape, int)
    for feature in collection["features"]:
        uuid.UUID(feature["id"])
        assert feature["type"] == "Feature" and feature["properties"]["objectType"] == "detection"
        measured = feature["properties"]["measurements"]
        identity = int(feature["properties"]["name"])
        assert measured["area_px"] == (labels == identity).sum()
        assert "intensity_mean_1" not in measured
        assert feature["geometry"]["type"] == "MultiPolygon"
        for part in feature["geometry"]["coordinates"]:
            drawn[rasterised(part, labels.shape, origin)] = identity
    assert np.array_equal(drawn, labels)
    assert len({feature["id"] for feature in collection["features"]}) == 3
    write_geojson(tmp_path / "a.geojson", labels[:1] * 0)
    assert json.loads((tmp_path / "a.geojson").read_text())["features"] == []


@pytest.mark.smoke
@pytest.mark.parametrize("origin, composite", [((0, 0), None), ((50, 32700), None),
                                               ((70000, 40000), True)])
@pytest.mark.parametrize("labels", [blobs(7, (60, 80), 1.2) * 1000, noise(8, (20, 30))])
def test_rois_draw_the_labels_again(labels, origin, composite, tmp_path):
    """Round trip through an independent reader: plain cells are traced, others composite."""
    roifile = pytest.importorskip("roifile", reason="see tests/requirements.txt")
    cells.write_rois(tmp_path / "rois.zip", cells.polygons(labels, origin).items())
    rois = roifile.roiread(tmp_path / "rois.zip")
    assert [roi.name for roi in rois] == [f"{i:04d}" for i in np.unique(labels[labels > 0])]
    drawn = np.zeros(labels.shape, int)
    for roi in rois:
        rings = [np.concatenate((ring, ring[:1])) if (ring[0] != ring[-1]).any() else ring
                 for ring in roi.coordinates(multi=True)]
        drawn[rasterised(rings, labels.shape, origin)] = int(roi.name)
        far = max(ring.max() for ring in rings) >= 2 ** 15
        assert roi.composite == (far or len(rings) > 1)
        assert composite is None or roi.composite == composite
    assert np.array_equal(drawn, labels)


# ----------------------------------------------------------------------------------------- pictures

@pytest.mark.smoke
@pytest.mark.parametrize("labels", PATTERNS)
def test_outlines_are_inner_boundaries(labels):
    expected = find_boundaries(labels, mode="inner", connectivity=1)
    assert np.array_equal(cells.outlines(labels), expected)


def test_overlay_outlines_cells_and_nothing_else():
    """Background far from cells and the inside of cells stay as they are; lines stand out."""
    y, x = np.mgrid[:1010, :1010]
    labels = ((y - 500) ** 2 + (x - 400) ** 2 < 300 ** 2).astype(int)
    for ground, cell in ((20, 90), (230, 120)):  # fluorescence and brightfield
        image = np.repeat(np.where(labels, cell, ground).astype(np.uint8)[None], 3, 0)
        bare = cells.overlay(image, labels * 0)
        picture = cells.overlay(image, labels)
        changed = (picture != bare).any(-1)
        depth = ndimage.distance_transform_edt(labels) - ndimage.distance_transform_edt(labels == 0)
        assert not changed[(depth > 6) | (depth < -6)].any()
        line = changed & (depth > 0)
        assert line[(depth > 0) & (depth < 1.5)].all()
        assert np.ptp(np.concatenate((picture[line], bare[line])).astype(int), axis=1).max() > 80
        colour = np.unique(picture[line], axis=0)
        assert len(colour) == 1 and np.abs(colour[0].astype(int) - bare[500, 400]).max() > 80
        assert (picture[changed & (depth < 0)] == bare[changed & (depth < 0)] // 2).all()


def test_overlay_gives_neighbours_different_colours():
    """Invariant on a plane full of cells: both colours at every border differ."""
    rng = np.random.default_rng(0)
    points = rng.integers(0, 1010, (150, 2))
    seeds = np.ones((1010, 1010), bool)
    seeds[tuple(points.T)] = False
    y, x = ndimage.distance_transform_edt(seeds, return_distances=False, return_indices=True)
    labels = np.unique(y * 1010 + x, return_inverse=True)[1].reshape(y.shape) + 1  # Voronoi cells
    picture = cells.overlay(np.zeros((1, *y.shape), np.uint8), labels).astype(int)
    for axis in (0, 1):
        border = np.diff(labels, axis=axis) != 0
        assert (np.abs(np.diff(picture, axis=axis)).sum(-1)[border] > 30).all()
    assert len(np.unique(picture[cells.outlines(labels)], axis=0)) == 8


def test_overlay_sizes():
    """Large images shrink by a whole number, small ones grow, those between keep their size."""
    def size(h, w, **key):
        return cells.overlay(np.ones((1, h, w)), np.ones((h, w), int), **key).shape
    assert size(1200, 1000) == (1200, 1000, 3) and size(1401, 30) == (1401, 30, 3)
    assert size(100, 250) == (400, 1000, 3) and size(1, 1) == (8, 8, 3)
    assert size(50, 4097) == (25, 2049, 3) and size(2000, 90, max_side=1500) == (1000, 45, 3)


def test_reduced_is_the_area_mean():
    image = np.arange(2 * 6 * 9, dtype=np.uint16).reshape(2, 6, 9) * 2
    labels = np.arange(54).reshape(6, 9)
    small, few = cells.reduced_overlay(image, labels, 3)
    assert np.array_equal(small, image[:, 1::3, 1::3]) and small.dtype == np.uint16  # of a ramp
    assert np.array_equal(few, labels[1::3, 1::3])
    small, few = cells.reduced_overlay(image, labels, 4)  # sizes that do not divide round up
    assert small.shape == (2, 2, 3) and few.shape == (2, 3)


def test_displayed_stretches_each_channel():
    """Closed form: percentiles 1 and 99.8 become black and full; brightfield RGB is not touched."""
    ramp = np.linspace(300, 5300, 64 * 64).reshape(1, 64, 64).astype(np.uint16)
    gray = cells.overlay_background(ramp)
    low, high = np.percentile(ramp, (1, 99.8))
    expected = np.clip((ramp[0] - low) / (high - low) * 255, 0, 255)
    assert np.abs(gray - expected[..., None]).max() <= 0.5 + 1e-3
    two = cells.overlay_background(np.concatenate((ramp, ramp[:, ::-1])))
    assert np.array_equal(two[..., 1], gray[..., 0])
    assert np.array_equal(two[..., 0], gray[::-1, :, 0])
    assert np.array_equal(two[..., 0], two[..., 2])
    five = cells.overlay_background(np.repeat(ramp, 5, 0))
    assert five.shape == (64, 64, 3) and (five[-1, -1] == 255).all()
    stained = np.random.default_rng(0).integers(120, 250, (3, 64, 64), dtype=np.uint8)
    assert np.array_equal(cells.overlay_background(stained), np.moveaxis(stained, 0, -1))
    assert cells.overlay_background(np.full((1, 5, 5), 7.0)).max() == 0  # constant: black, no crash
    spot = np.zeros((1, 100, 100), np.uint16)
    spot[0, 50, 50] = 900
    assert cells.overlay_background(spot)[50, 50, 0] == 255


def test_enlarged_keeps_areas_and_rounds_stairs():
    """A disc grows by the square of the zoom; its staircase border gets closer to the circle."""
    y, x = np.mgrid[:40, :40]
    disc = ((y - 19.5) ** 2 + (x - 19.5) ** 2 < 14 ** 2).astype(np.int32) * 5
    large = cells.enlarged_outlines(disc, 8)
    assert large.shape == (320, 320) and set(np.unique(large)) == {0, 5}
    assert np.count_nonzero(large) == pytest.approx(64 * np.count_nonzero(disc), rel=0.01)
    ideal = np.hypot(*(np.mgrid[:320, :320] - 159.5)) < 8 * 14
    plain = disc.repeat(8, 0).repeat(8, 1)
    assert np.count_nonzero((large > 0) != ideal) < 0.75 * np.count_nonzero((plain > 0) != ideal)


@pytest.mark.smoke
def test_png_reads_back(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    banded = rgb.repeat(40, 0).repeat(30, 1)
    for picture in (rgb, rgb[..., 0], banded, rgb[:1, :1]):
        cells.write_picture(tmp_path / "a.png", picture)
        with Image.open(tmp_path / "a.png") as image:
            image.load()
            assert np.array_equal(np.asarray(image), picture)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    for wrong in (rgb.astype(float), rgb[..., :2], rgb[:0]):
        with pytest.raises(ValueError, match="expected .* uint8"):
            cells.write_picture(tmp_path / "b.png", wrong)


def test_grown_is_a_disc():
    """Every pixel within the radius of a point, also past the sides."""
    mask = np.zeros((9, 12), bool)
    mask[4, 5] = mask[0, 11] = True
    y, x = np.mgrid[:9, :12]
    for radius in (0.5, 1.5, 2.5, 6.5, 20.5):
        near = (np.hypot(y - 4, x - 5) <= radius) | (np.hypot(y, x - 11) <= radius)
        assert np.array_equal(cells.grown_outlines(mask, radius), near)


def test_labels_with_wide_gaps_are_drawn_as_those_without():
    labels = PATTERNS[0]
    ids = np.unique(labels)
    wide = np.where(labels > 0, np.searchsorted(ids, labels).astype(np.int64) * 10 ** 9, 0)
    image = np.random.default_rng(0).random((1, *labels.shape))
    expected = cells.overlay(image, np.searchsorted(ids, labels))
    assert np.array_equal(cells.overlay(image, wide), expected)


@pytest.mark.smoke
def test_map_features_by_hand():
    """Two squares that touch along four pixels and one alone, on a map of constants."""
    labels = np.zeros((12, 20), np.int32)
    labels[2:6, 2:6], labels[2:6, 6:10], labels[8:11, 14:17] = 1, 2, 5
    distance = np.select([labels == 1, labels == 2, labels == 5], [0.5, 0.75, 1.0], 0.0)
    distance[3, 5] = 0.9                                              # of cell 1, beside cell 2
    found = cells.cell_map_features(labels, distance.astype(np.float32), 4.0, np.array([1, 2, 5]))
    np.testing.assert_allclose(found["summit"], [0.9, 0.75, 1.0], rtol=1e-6)
    np.testing.assert_allclose(found["mean"], [0.525, 0.75, 1.0], rtol=1e-6)
    np.testing.assert_allclose(found["spread"], [np.std([0.5] * 15 + [0.9]), 0, 0], atol=1e-6)
    np.testing.assert_allclose(found["valley"], [0.9, 0.75, 0], rtol=1e-6)
    np.testing.assert_allclose(found["touching"], [4 / 12, 4 / 12, 0])
    np.testing.assert_allclose(found["size"], np.log(np.array([16, 16, 9]) / (4 * np.pi)))
    np.testing.assert_allclose(found["raggedness"], np.log([144 / 16, 144 / 16, 64 / 9]))
    none = cells.cell_map_features(labels * 0, distance, 4.0, np.zeros(0, int))
    assert all(len(values) == 0 for values in none.values())
    assert len(cells.cell_probability(none, {"constant": 0.5, "mean": 2.0})) == 0
    assert cells.cell_probability(found, {"constant": 0.0, "mean": 0.0}).tolist() == [0.5] * 3
