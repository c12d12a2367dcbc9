"""Slices and frames: closed forms on spheres and discs, invariants on drawn movies, real volumes
beside other programs."""
import csv
import json
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import images
import infer
import link
import metrics
import model
import runs
import synthetic


def spheres(shape, *cells):
    """(Z, H, W) labels 1, 2, ... of balls (z, y, x, radius), later ones on top."""
    grid = np.indices(shape)
    volume = np.zeros(shape, np.int32)
    for i, (*at, r) in enumerate(cells, 1):
        volume[sum((g - c) ** 2 for g, c in zip(grid, at)) <= r ** 2] = i
    return volume


def shuffled(volume, seed=0):
    """Planes whose labels say nothing of the plane before."""
    rng = np.random.default_rng(seed)
    planes = []
    for plane in volume:
        ids, index = np.unique(plane, return_inverse=True)
        new = np.append(0, rng.permutation(len(ids) - 1) + 1) if ids[0] == 0 else \
            rng.permutation(len(ids)) + 1
        planes.append(new[index].reshape(plane.shape).astype(np.int32))
    return planes


def same(a, b):
    """Equal but for the numbers."""
    pairs = np.unique(np.stack([a.ravel(), b.ravel()]), axis=1)
    return len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == pairs.shape[1]


# ------------------------------------------------------------------------------------------- slices

@pytest.mark.smoke
def test_spheres_side_by_side_and_on_each_other():
    truth = spheres((40, 30, 60), (10, 15, 15, 9), (29, 15, 15, 9), (20, 14, 45, 12))
    found = link.stitch(shuffled(truth))
    assert same(found, truth) and found.dtype == np.int32
    # in the order of appearance, whatever the labels were
    assert np.array_equal(found, link.stitch(shuffled(truth, 1)))


def test_a_missing_slice_is_bridged_where_cells_are_thick():
    truth = spheres((30, 30, 60), (15, 15, 15, 10), (10, 14, 44, 8))
    planes = shuffled(truth)
    planes[15] = np.zeros_like(planes[15])
    assert same(link.stitch(planes)[np.arange(30) != 15], truth[np.arange(30) != 15])
    # two steps are thicker than the cells: what lies on the other side is another cell
    assert len(np.unique(link.stitch(planes, spacing=30))) > 3


def test_a_cap_is_no_gap():
    """Balls that leave one empty slice between them are two."""
    truth = spheres((21, 20, 20), (4, 10, 10, 5), (16, 10, 10, 5))
    truth[10] = 0
    assert truth[9].any() and truth[11].any()
    assert same(link.stitch(shuffled(truth)), truth)


def test_a_cell_that_splits_and_joins_again_is_one():
    """A thick ring that stands upright is two sections in the middle."""
    z, y, x = np.indices((30, 12, 40))
    ring = (np.abs(np.hypot(z - 15, x - 20) - 9) <= 4) & (np.abs(y - 6) <= 3)
    planes = []
    for plane in ring:
        left = plane & (x[0] < 20)
        apart = not plane[6, 20]
        planes.append(np.where(plane, 1 + (left & apart), 0))
    assert max(len(np.unique(p)) for p in planes) == 3
    assert same(link.stitch(planes), ring.astype(int))


def test_empty_planes_and_one_plane():
    nothing = np.zeros((4, 9, 9), int)
    assert not link.stitch(nothing).any() and not link.track(nothing)[0].any()
    assert link.track(nothing)[1].shape == (0, 4)
    one = np.array([[0, 7], [9, 9]])
    assert link.stitch([one]).tolist() == [[[0, 1], [2, 2]]]
    volume, tracks = link.track([one, np.zeros_like(one), one])
    assert volume[2].tolist() == [[0, 1], [2, 2]] and tracks.tolist() == [[1, 0, 2, 0],
                                                                          [2, 0, 2, 0]]
    for planes, said in (([], "no planes"), ([one, one[:1]], "of one size"),
                         ([one.astype(float)], "integers"), ([-one], "expected 0 to")):
        with pytest.raises(ValueError, match=said):
            link.track(planes)


def test_wide_gaps_between_labels():
    truth = spheres((20, 30, 30), (10, 10, 10, 8), (10, 20, 20, 6))
    wide = truth.astype(np.int64) * (1 << 40)
    assert np.array_equal(link.stitch(wide), link.stitch(truth))


def test_only_two_planes_lie_in_memory():
    seen = link.Seen()
    for plane in spheres((20, 30, 30), (10, 15, 15, 9)):
        seen.add(plane)
    assert not any(len(plane.start) for plane in seen.planes[:-2])


def test_overlaps_are_those_of_metrics():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 6, (2, 9, 11)) * rng.integers(0, 2, (2, 9, 11))
        one, other = link.linked_plane(a), link.linked_plane(b)
        table = metrics.overlap(a, b)
        assert one.ids.tolist() == table.truth_ids.tolist()
        assert one.area.tolist() == table.truth_areas.tolist()
        first, second, px = link.linked_overlaps(one, other)
        theirs = sorted(zip(table.rows.tolist(), table.cols.tolist(), table.counts.tolist()))
        assert list(zip(first.tolist(), second.tolist(), px.tolist())) == theirs
        for k, centre in zip(one.ids, one.centre):
            np.testing.assert_allclose(centre, np.argwhere(a == k).mean(0))


# ------------------------------------------------------------------------------------------- frames

def discs(paths, size=(80, 120)):
    """(T, H, W) labels of paths: label -> [(y, x, radius) or None, one a frame]."""
    y, x = np.indices(size)
    frames = np.zeros((max(map(len, paths.values())), *size), np.int32)
    for label, path in paths.items():
        for t, place in enumerate(path):
            if place:
                frames[t][(y - place[0]) ** 2 + (x - place[1]) ** 2 <= place[2] ** 2] = label
    return frames


@pytest.mark.smoke
def test_a_division_ends_the_mother_and_begins_two():
    still = [(60, 100, 9)] * 8
    mother = [(30, 20 + 3 * t, 10) for t in range(4)]
    one = [None] * 4 + [(24, 32 + 3 * t, 7) for t in range(4)]
    two = [None] * 4 + [(39 + 2 * t, 33, 7) for t in range(4)]
    truth = discs({1: still, 2: mother, 3: one, 4: two})
    found, tracks = link.track(shuffled(truth))
    assert same(found, truth)
    rows = {tuple(row) for row in tracks[:, 1:].tolist()}
    k = int(found[0, 30, 20])
    assert rows == {(0, 7, 0), (0, 3, 0), (4, 7, k)} and len(tracks) == 4


def test_a_division_before_a_blank_frame():
    """Where no cell is found at all, no daughter is gone."""
    path = {1: [(40, 40, 10)] * 3 + [None] * 4,
            2: [None] * 3 + [(33, 40, 7), None, (33, 40, 7), (33, 40, 7)],
            3: [None] * 3 + [(48, 40, 7), None, (48, 40, 7), (48, 40, 7)]}
    linked = link.link_frames(link.Seen(discs(path)))
    assert linked.parent[1:].tolist() == [0, 1, 1]
    for t, tracks in ((2, {1}), (3, {2, 3}), (5, {2, 3})):
        assert set(linked.numbers[t].tolist()) - {0} == tracks


def test_a_new_cell_beside_another_is_no_daughter():
    truth = discs({1: [(30, 30, 10)] * 6, 2: [None] * 3 + [(30, 52, 10)] * 3})
    found, tracks = link.track(shuffled(truth))
    assert same(found, truth) and not tracks[:, 3].any()


def test_gaps_are_closed_and_long_ones_are_not():
    def blinking(frames):
        return [None if 3 <= t < 3 + frames else (30, 20 + 2 * t, 9) for t in range(12)]
    for missed in (1, 2):
        truth = discs({1: blinking(missed), 2: [(60, 90, 9)] * 12})
        assert same(link.track(shuffled(truth))[0], truth)
    assert len(link.track(shuffled(discs({1: blinking(4)})))[1]) == 2
    assert len(link.track(shuffled(discs({1: blinking(1)})), gap=0)[1]) == 2


def test_cells_that_go_on_in_their_direction():
    """Steps as long as the way to the neighbour: nearest is wrong for all, but for where they came
    from."""
    def row(shift):
        return {k: [(30, 10 + 24 * k + shift * t, 8) for t in range(8)] for k in range(1, 4)}
    slow = discs(row(9), (60, 200))
    assert same(link.track(shuffled(slow))[0], slow)


def test_max_distance_is_a_limit():
    truth = discs({1: [(30, 20, 8), (30, 25, 8), (30, 70, 8), (30, 75, 8)]})
    assert len(link.track(truth, max_distance=10)[1]) == 2
    assert len(link.track(truth, max_distance=60)[1]) == 1
    assert len(link.track(truth, max_distance=4, gap=0)[1]) == 4          # though they overlap


@pytest.mark.parametrize("seed", [0, 1])
def test_drawn_movies_are_tracked(seed):
    """Displacements of a fifth of a diameter on average, a few above .4; LNK .98 or more."""
    movie = synthetic.movie(seed, frames=20, size=192, cells=60, diameter=18, speed=0.2)
    found, tracks = link.track(shuffled(movie.labels))
    scores = metrics.track_scores(movie.labels, found, movie.tracks, tracks)
    assert scores["LNK"] >= 0.98 and scores["TRA"] >= 0.998 and scores["BC(1)"] >= 0.7
    again, rows = link.track(shuffled(movie.labels, 5))
    assert metrics.track_scores(found, again, tracks, rows)["TRA"] > 0.999    # labels say nothing


# --------------------------------------------------------------- real volumes beside other programs

STACKS = ("stack_mouse_embryo_qcanet/train/8_cell_stage", "stack_ovule_nuclei/train/1135_mini",
          "stack_ovule_nuclei/train/1136_mini", "stack_ovule_walls/train/sample_ovule",
          "stack_stardist_example/test/img3d")


@pytest.mark.parametrize("name", STACKS)
def test_real_stacks_as_well_as_cellpose(shared, name):
    utils = pytest.importorskip("cellpose.utils", reason="needs cellpose", exc_type=ImportError)
    if not (shared / "volumes").is_dir():
        pytest.skip("needs shared/volumes")
    truth = tifffile.imread(shared / f"volumes/{name}_labels.tif").astype(np.int32)
    planes = np.stack(shuffled(truth))
    ours, theirs = (metrics.average_precision(truth, found, 0.5)
                    for found in (link.stitch(planes), utils.stitch3D(planes.copy())))
    assert ours >= theirs + 0.1


# --------------------------------------------------------------- infer.py from end to end, in files

@pytest.fixture(scope="module")
def movie():
    return synthetic.movie(3, frames=5, size=96, cells=24, diameter=24, speed=0.1, cycle=12)


@pytest.fixture
def quick(monkeypatch):
    """infer.py whose network is the truth: what a plane's pixels are is its labels."""
    net = infer.model.load(infer.Path(infer.__file__).parent / "final_models/demo_synthetic.pt")
    monkeypatch.setattr(infer.model, "load", lambda path: net)

    def truth(source, plan, clock=None, progress=None):
        _, H, W = source.shape
        labels = source.region(0, H, 0, W)[0].astype(np.int32)
        ids, index = np.unique(np.append(labels, 0), return_inverse=True)
        local, whole = index[:-1].reshape(H, W).astype(np.int32), (slice(0, H), slice(0, W))
        numbers = np.arange(len(ids), dtype=np.int32)
        yield infer.segment.Block(whole, whole, local, numbers, numbers[1:], local,
                                  np.zeros((H, W), np.float32))
    monkeypatch.setattr(infer.segment, "blocks", truth)


def go(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        runs.script(infer.__doc__, infer.Config, infer.main,
                    [*map(str, arguments), "weights=tiny"])
    return end.value.code, *capsys.readouterr()


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def stored(path, movie, axes="TYX", **words):
    tifffile.imwrite(path, movie.labels.astype(np.uint16), imagej=True,
                     metadata={"axes": axes, **words})
    return path


def test_a_movie_gets_all_its_files(tmp_path, movie, quick, capsys):
    file, out = stored(tmp_path / "a.tif", movie, finterval=60, unit="um"), tmp_path / "out"
    assert go(capsys, file, "time=all", f"out={out}")[0] == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "a_cells.csv", "a_ctc", "a_labels.tif", "a_lineage.svg", "a_overlay.png",
        "a_trackmate.xml", "a_tracks.csv", "summary.csv"]
    labels = tifffile.imread(out / "a_labels.tif")
    found, tracks = link.track(list(movie.labels))
    assert np.array_equal(labels, found) and labels.dtype == np.uint16
    with tifffile.TiffFile(out / "a_labels.tif") as tif:
        assert tif.is_ome and tif.series[0].axes == "TYX"
        assert 'TimeIncrement="60' in tif.ome_metadata
    table = rows(out / "a_cells.csv")
    for t in range(5):
        here = {int(row["track"]): int(row["area_px"]) for row in table if int(row["t"]) == t + 1}
        assert here == {k: int((labels[t] == k).sum()) for k in np.unique(labels[t])[1:]}
    parents = {int(row["track"]): int(row["parent"]) for row in rows(out / "a_tracks.csv")}
    assert parents == dict(tracks[:, [0, 3]].tolist()) and any(parents.values())
    assert all(int(row["age"]) == int(row["t"]) - 1 - tracks[int(row["track"]) - 1, 1]
               for row in table)
    summary = rows(out / "summary.csv")[0]
    assert int(summary["planes"]) == 5 and int(summary["cells"]) == len(tracks)
    picture = np.asarray(Image.open(out / "a_overlay.png"))
    assert picture.shape[1] > 4 * picture.shape[0]                    # five frames side by side
    svg = ElementTree.parse(out / "a_lineage.svg").getroot()
    assert len(svg.findall(".//{*}polyline")) == len(tracks) + sum(map(bool, parents.values()))
    # what there is is kept; other settings are not mixed with it
    assert "already" in go(capsys, file, "time=all", f"out={out}")[1]
    assert "max_distance" in go(capsys, file, "time=all", f"out={out}", "max_distance=3")[2]


def test_channel_names_with_commas_and_blanks(tmp_path, movie, quick, capsys):
    film = np.repeat(movie.labels.astype(np.uint16)[:, None], 2, 1)
    tifffile.imwrite(tmp_path / "a.ome.tif", film, photometric="minisblack",
                     metadata={"axes": "TCYX", "Channel": {"Name": ["DAPI, 405", "GFP "]}})
    assert go(capsys, tmp_path / "a.ome.tif", "time=all", f"out={tmp_path / 'out'}")[0] == 0
    table = rows(next((tmp_path / "out").glob("*_cells.csv")))
    assert any("DAPI, 405" in name for name in table[0]) and len(table) > 50


def test_others_read_the_tracks(tmp_path, movie, quick, capsys, monkeypatch):
    """The challenge's own evaluation and a reader of TrackMate's XML see what the labels say."""
    file, out = stored(tmp_path / "a.tif", movie), tmp_path / "out"
    assert go(capsys, file, "time=all", f"out={out}")[0] == 0
    labels, lines = tifffile.imread(out / "a_labels.tif"), rows(out / "a_tracks.csv")
    result = out / "a_ctc/01_RES"
    masks = np.stack([tifffile.imread(p) for p in sorted(result.glob("mask*.tif"))])
    table = np.loadtxt(result / "res_track.txt", dtype=int, ndmin=2)
    scores = metrics.track_scores(labels, masks, [[int(row["track"]), int(row["first"]) - 1,
                                                   int(row["last"]) - 1, int(row["parent"])]
                                                  for row in lines], table)
    assert scores["TRA"] == scores["CT"] == 1
    root = ElementTree.parse(out / "a_trackmate.xml").getroot()
    spots = root.findall(".//Spot")
    assert len(spots) == int(root.find(".//AllSpots").get("nspots")) == len(rows(
        out / "a_cells.csv"))
    edges = len(root.findall(".//Edge"))
    assert edges == len(spots) - len(lines) + sum(row["parent"] != "0" for row in lines)
    monkeypatch.setitem(sys.modules, "xml.etree.cElementTree", ElementTree)   # gone since 3.9
    reader = pytest.importorskip("pytrackmate", reason="needs pytrackmate")
    peaks = reader.trackmate_peak_import(str(out / "a_trackmate.xml"), get_tracks=True)
    assert len(peaks) == len(spots)
    first = peaks[peaks["t_stamp"] == 0].sort_values("spot_id")
    centres = link.linked_plane(labels[0]).centre
    np.testing.assert_allclose(np.sort(first[["y", "x"]].to_numpy(), 0), np.sort(centres, 0), 1e-5)


def test_ctcmetrics_takes_the_folder_for_valid(tmp_path, capsys):
    """Gaps, which the challenge does not allow within a track, become new tracks there."""
    valid = pytest.importorskip("ctc_metrics.metrics", reason="needs py-ctcmetrics").valid
    cell = [(30, 20 + 2 * t, 9) for t in range(6)]
    planes = discs({1: [None if t in (2, 4) else place for t, place in enumerate(cell)],
                    2: [(60, 90, 9)] * 6})
    seen = link.Seen(skip=False)
    for plane in planes:
        seen.add(plane)
    linked = link.link_frames(seen)
    assert len(linked.tracks) == 2
    link.write_challenge(tmp_path, linked, iter(linked.volume(list(planes))))
    table = np.loadtxt(tmp_path / "res_track.txt", dtype=int)
    assert table.tolist() == [[1, 0, 1, 0], [2, 0, 5, 0], [3, 3, 3, 1], [4, 5, 5, 3]]
    masks = sorted(map(str, tmp_path.glob("mask*.tif")))
    assert valid(masks, table, [np.unique(tifffile.imread(m))[1:].tolist() for m in masks]) == 1


@pytest.mark.smoke
def test_a_stack_gets_volumes(tmp_path, quick, capsys):
    truth = spheres((12, 40, 50), (6, 15, 15, 5), (5, 22, 36, 4)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "s.tif", truth, imagej=True, resolution=(2, 2),
                     metadata={"axes": "ZYX", "spacing": 1.5, "unit": "um"})
    out = tmp_path / "out"
    assert go(capsys, tmp_path / "s.tif", "z=all", f"out={out}")[0] == 0
    assert same(tifffile.imread(out / "s_labels.tif"), truth)
    for row in rows(out / "s_cells.csv"):
        cell = tifffile.imread(out / "s_labels.tif") == int(row["id"])
        assert int(row["volume_px"]) == cell.sum()
        assert float(row["volume_um3"]) == pytest.approx(cell.sum() * 0.5 * 0.5 * 1.5)
        z, y, x = np.argwhere(cell).mean(0)
        found = [float(row[name]) for name in ("z", "centroid_y_px", "centroid_x_px", "z_um")]
        assert found == pytest.approx([z + 1, y, x, z * 1.5], rel=1e-5)
        assert float(row["intensity_mean_1"]) == pytest.approx(truth[cell].mean())
    with tifffile.TiffFile(out / "s_labels.tif") as tif:
        assert 'PhysicalSizeZ="1.5"' in tif.ome_metadata and tif.series[0].axes == "ZYX"
    assert images.stack_of(out / "s_labels.tif", "Z").step == 1.5


def test_a_solid_has_the_type_of_most_of_its_voxels():
    def row(number, area, kind, sure):
        return {"id": str(number), "area_px": str(area), "centroid_y_px": "1", "centroid_x_px": "1",
                "touches_border": "0", "type": kind, "type_probability": str(sure)}
    seen = link.Seen(iter([np.ones((4, 4), np.int32)] * 3), skip=True)
    tables = [[row(1, 10, "small", 0.9)], [row(1, 30, "large", 0.5)], [row(1, 10, "small", 0.7)]]
    solid, = link.linked_solid_rows(link.link_slices(seen), tables, None, None)
    assert solid["type"] == "large" and solid["type_probability"] == pytest.approx(15 / 50)


def test_the_largest_area_is_that_of_a_plane(tmp_path):
    """In which a cell may have two sections."""
    planes = np.zeros((3, 20, 30), np.int32)
    planes[:, 5:15, 2:28] = 1
    planes[1, 8:12, 20:28] = 2                                   # a part of it, for one plane
    seen = link.Seen(iter(planes), skip=True)
    tables = [[{key: str(value) for key, value in (
        ("id", number), ("area_px", (plane == number).sum()), ("centroid_y_px", 9),
        ("centroid_x_px", 9), ("touches_border", 0))} for number in np.unique(plane[plane > 0])]
        for plane in planes]
    solid, = link.linked_solid_rows(link.link_slices(seen), tables, None, None)
    assert solid["largest_area_px"] == 260 and solid["volume_px"] == 780 and solid["planes"] == 3


def test_a_folder_with_an_image_and_a_stack_of_one_name_holds_no_series(tmp_path):
    for name, shape in (("w1", (20, 30)), ("w2", (3, 20, 30))):
        (tmp_path / name).mkdir()
        tifffile.imwrite(tmp_path / name / "i.tif", np.zeros(shape, np.uint16), imagej=True,
                         metadata={"axes": "ZYX"[-len(shape):]})
    config = infer.Config(z="all", pattern="i.tif")
    assert sorted(infer.find_images([str(tmp_path)], config).values()) == ["w1_i", "w2_i"]


def test_a_stack_is_told_types(tmp_path, capsys):
    net = model.load(model.find_weights("demo_synthetic"))
    net.set_types(torch.nn.Linear(net.backbone.dim, 2), ("one", "other"))
    model.save(net, tmp_path / "typed.pt")
    drawn = synthetic.field(3, 96, 8, 28)
    tifffile.imwrite(tmp_path / "s.tif", np.stack([drawn.pixels[0]] * 3), imagej=True,
                     metadata={"axes": "ZYX"})
    infer.main(infer.Config(out=str(tmp_path / "out"), z="all", weights=str(tmp_path / "typed.pt")),
               [str(tmp_path / "s.tif")])
    found = rows(tmp_path / "out/s_cells.csv")
    summary, = rows(tmp_path / "out/summary.csv")
    assert found and {row["type"] for row in found} <= {"one", "other"}
    for name in ("one", "other"):
        assert int(summary[f"cells_{name}"]) == sum(row["type"] == name for row in found)


def test_a_run_that_is_killed_goes_on(tmp_path, movie, quick, capsys, monkeypatch):
    file, out = stored(tmp_path / "a.tif", movie), tmp_path / "out"
    blocks, seen = infer.segment.blocks, []

    def dying(source, *rest):
        seen.append(1)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return blocks(source, *rest)
    monkeypatch.setattr(infer.segment, "blocks", dying)
    assert go(capsys, file, "time=all", f"out={out}")[0] == 130
    assert not (out / "a_labels.tif").exists()
    assert go(capsys, file, "time=all", f"out={out}")[0] == 0
    assert len(seen) == 4 + 2                                         # three frames were kept
    assert np.array_equal(tifffile.imread(out / "a_labels.tif"), link.track(movie.labels)[0])
    assert not list(out.glob(".*"))


def test_a_folder_of_frames_is_a_movie(tmp_path, movie, quick, capsys):
    folder, out = tmp_path / "frames", tmp_path / "out"
    folder.mkdir()
    for t, plane in enumerate(movie.labels):
        tifffile.imwrite(folder / f"t{t + 8}.tif", plane.astype(np.uint16))     # t9 before t10
    assert go(capsys, folder, "time=all", f"out={out}")[0] == 0
    found = tifffile.imread(out / "frames_labels.tif")
    assert np.array_equal(found, link.track(movie.labels)[0])
    assert "already" in go(capsys, folder, "time=all", f"out={out}")[1]
    for one, other in (("t8", "x"), ("t9", "t8"), ("x", "t9")):             # in another order
        (folder / f"{one}.tif").rename(folder / f"{other}.tif")
    assert "frames has changed since" in go(capsys, folder, "time=all", f"out={out}")[2]
    results = infer.find_images([str(tmp_path)], infer.Config())
    assert sorted(results.values()) == [f"frames_t{t}" for t in (10, 11, 12, 8, 9)]  # no mask
    tifffile.imwrite(folder / "t99.tif", movie.labels[0, :50].astype(np.uint16))
    code, _, said = go(capsys, folder, "time=all", f"out={tmp_path / 'b'}")
    assert code == 1 and "t99.tif" in said and "1 x 50 x 96" in said and said.count("\n") == 1


def test_empty_frames_and_one_frame(tmp_path, movie, quick, capsys):
    some = movie.labels.astype(np.uint16).copy()
    some[2] = 0
    for name, planes in (("gap", some), ("none", 0 * some), ("one", some[0])):
        tifffile.imwrite(tmp_path / f"{name}.tif", planes)
        out = tmp_path / name
        code, _, said = go(capsys, tmp_path / f"{name}.tif", "time=all", f"out={out}")
        assert code == 0, said
        labels = tifffile.imread(out / f"{name}_labels.tif")
        assert labels.shape[-2:] == (96, 96) and labels.any() == (name != "none")
        for end in ("cells.csv", "tracks.csv", "lineage.svg", "trackmate.xml", "overlay.png"):
            assert (out / f"{name}_{end}").stat().st_size, end
        header = (out / f"{name}_cells.csv").read_text().splitlines()[0]
        assert header.startswith("t,track,parent,age,area_px,")
    assert len(tifffile.imread(tmp_path / "gap/gap_labels.tif")) == 5


def test_what_cannot_be_linked_is_said_in_one_line(tmp_path, movie, quick, capsys):
    unknown = tmp_path / "u.tif"
    tifffile.imwrite(unknown, movie.labels[None].astype(np.uint16), metadata=None)
    both = tmp_path / "both.tif"
    tifffile.imwrite(both, np.zeros((2, 3, 32, 32), np.uint8), imagej=True,
                     metadata={"axes": "TZYX"})
    for arguments, said in (
            ([unknown], "infer.py links all with z=all or time=all"),
            ([both, "z=all"], "time=1..2"), ([both, "z=all", "time=all"], "choose one"),
            ([both, "z=all", "plane=2"], "one of the two"), ([both, "z=3"], "z=3: expected"),
            ([both, "time=all", "plane=2", "rois=true"], "for single planes"),
            (["s3://bucket/frames", "time=all"], "must lie on this machine")):
        code, _, error = go(capsys, *arguments, f"out={tmp_path / 'out'}")
        assert code == 1 and said in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()
    assert go(capsys, both, "z=all", "time=2", f"out={tmp_path / 'out'}")[0] == 0
    assert json.dumps(images.label_record(tmp_path / "out/both_labels.tif")["settings"])
