"""Slices and frames: closed forms on spheres and discs, invariants on drawn movies, real volumes
beside other programs."""
import numpy as np
import pytest
import tifffile

import link
import metrics
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
                         ([one.astype(float)], "integers"), ([-one], "0 or more")):
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
        one, other = link.plane_of(a), link.plane_of(b)
        table = metrics.overlap(a, b)
        assert one.ids.tolist() == table.truth_ids.tolist()
        assert one.area.tolist() == table.truth_areas.tolist()
        first, second, px = link.shared_pixels(one, other)
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
