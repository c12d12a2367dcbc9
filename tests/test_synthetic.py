"""synthetic.py: the truth is sound, pictures are what they claim, nothing but the cells ties
channels."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from scipy import ndimage

import runs
import synthetic

STAINS, PLANES = slice(0, 5), slice(5, 8)


@pytest.fixture(scope="module")
def fields() -> list[synthetic.Field]:
    return [synthetic.field(seed, 256, 18, 48) for seed in range(16)]


def contacts(labels: np.ndarray) -> set[tuple[int, int]]:
    """Pairs of ids with pixels side by side, the ground's 0 left out."""
    sides = [(labels[1:], labels[:-1]), (labels[:, 1:], labels[:, :-1])]
    pairs = np.concatenate([np.stack([a.ravel(), b.ravel()], 1) for a, b in sides])
    pairs = np.unique(np.sort(pairs[(pairs[:, 0] != pairs[:, 1]) & (pairs > 0).all(1)], 1), axis=0)
    return set(map(tuple, pairs.tolist()))


def standard(image: np.ndarray) -> np.ndarray:
    """Mean 0, variance 1: the gain and offset of a field drop out."""
    return (image - image.mean()) / image.std()


def means(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean of the image over each cell."""
    return ndimage.mean(image, labels, np.arange(1, labels.max() + 1))


def test_same_arguments_same_field_whatever_came_between():
    first = synthetic.field(3, (64, 96), 5)
    np.random.default_rng(3).random(10), synthetic.field(4, 64, 5)
    again = synthetic.field(3, (64, 96), 5)
    for a, b in zip(first[:3], again[:3]):
        np.testing.assert_array_equal(a, b)


def test_another_seed_another_field():
    a, b = synthetic.field(1, 64, 5), synthetic.field(2, 64, 5)
    assert (a.labels != b.labels).any()
    for one, other in zip(a.pixels, b.pixels):
        assert (one != other).mean() > 0.9


@pytest.mark.parametrize("size, shape", [(32, (32, 32)), ((33, 70), (33, 70)),
                                         ([130, 64], (130, 64))])
def test_sizes_types_and_names(size, shape):
    drawn = synthetic.field(0, size, 6, 24)
    assert drawn.pixels.shape == (8, *shape) and drawn.pixels.dtype == np.uint16
    assert drawn.labels.shape == drawn.nuclei.shape == shape
    assert drawn.labels.dtype == drawn.nuclei.dtype == np.int32
    assert drawn.labels.max() > 0
    assert drawn.channels == ("Mito", "AGP", "RNA", "ER", "DNA", "HighZBF", "LowZBF", "Brightfield")
    assert drawn.pixel_size == 0.598


@pytest.mark.parametrize("cells, diameter", [(6, 48), (40, 48), (60, 20), (400, 12)])
def test_ids_are_contiguous_and_every_cell_is_one_piece(cells, diameter):
    for seed in range(3):
        labels = synthetic.field(seed, 192, cells, diameter).labels
        n = labels.max()
        assert 0 < n <= cells
        areas = np.bincount(labels.ravel(), minlength=n + 1)[1:]
        assert areas.min() >= (diameter / 6) ** 2
        for k, box in enumerate(ndimage.find_objects(labels), 1):
            assert ndimage.label(labels[box] == k)[1] == 1                     # 4-connected


def test_a_cell_cut_in_two_by_the_edge_keeps_its_larger_piece():
    grown = np.array([[5, 5, 0, 5, 5],
                      [5, 0, 0, 5, 5],
                      [2, 0, 7, 2, 2]])
    labels, number = synthetic.synthetic_largest_pieces(grown, smallest=2)
    assert len(np.unique(labels)) == 3 and labels.max() == 2  # 7 shows a single pixel
    np.testing.assert_array_equal(number[labels], [[0, 0, 0, 5, 5], [0, 0, 0, 5, 5],
                                                   [0, 0, 0, 2, 2]])


def test_nearly_all_cells_asked_for_are_there_when_there_is_room(fields):
    counts = np.array([f.labels.max() for f in fields])
    assert (counts <= 18).all() and counts.mean() > 0.9 * 18


def test_cells_that_do_not_fit_are_left_out():
    crowded = synthetic.field(0, 96, 300, 48)
    assert 4 < crowded.labels.max() < 60
    assert (crowded.labels > 0).mean() > 0.6


def test_diameter_is_that_of_a_cell_that_has_room():
    for diameter in (10, 20):
        alone = [synthetic.field(seed, 8 * diameter, 1, diameter).labels for seed in range(40)]
        whole = [a for a in alone if a.any() and not (a[[0, -1]].any() or a[:, [0, -1]].any())]
        mean = np.mean([2 * np.sqrt((a > 0).sum() / np.pi) for a in whole])
        assert len(whole) > 20 and mean == pytest.approx(diameter, rel=0.1)


def test_many_cells_touch_and_some_stand_alone(fields):
    cells = sum(f.labels.max() for f in fields)
    touching = sum(len(set(sum(contacts(f.labels), ()))) for f in fields)
    assert 0.5 < touching / cells < 0.97
    assert all(contacts(f.labels) for f in fields)


def test_nuclei_lie_inside_their_cells(fields):
    cells = nuclei = 0
    for f in fields:
        inside = f.nuclei > 0
        np.testing.assert_array_equal(f.nuclei[inside], f.labels[inside])
        n = f.labels.max()
        area, whole = (np.bincount(a.ravel(), minlength=n + 1)[1:] for a in (f.nuclei, f.labels))
        assert 0.08 < np.median(area / whole) < 0.5
        at_edge = np.r_[f.labels[0], f.labels[-1], f.labels[:, 0], f.labels[:, -1]]
        # only the edge hides a nucleus
        assert np.isin(np.flatnonzero(area == 0) + 1, at_edge).all()
        cells, nuclei = cells + n, nuclei + (area > 0).sum()
    assert nuclei > 0.95 * cells


def test_nuclei_end_where_the_dna_does(fields):
    """Nuclei are where DNA is over half of that in the cell's own nucleus."""
    for f in fields:
        dna = f.pixels[4] - np.median(f.pixels[4][f.labels == 0])
        area = np.bincount(f.nuclei.ravel(), minlength=f.labels.max() + 1)
        mean = np.bincount(f.nuclei.ravel(), dna.ravel(), len(area)) / np.maximum(area, 1)
        nucleus = f.nuclei > 0
        bright = (dna > mean[f.labels] / 2) & (f.labels > 0) & (area[f.labels] > 0)
        assert (bright & nucleus).sum() > 0.93 * (bright | nucleus).sum()


def test_nucleus_and_cytoplasm_show_in_the_channels_that_stain_them(fields):
    for f in fields:
        nucleus, cytoplasm = f.nuclei > 0, (f.labels > 0) & (f.nuclei == 0)
        ratio = [c[nucleus].mean() / c[cytoplasm].mean() for c in f.pixels[STAINS].astype(float)]
        mito, _, _, er, dna = ratio
        assert mito < 1.1 and dna > 2 and er < dna / 2


def test_fluorescence_is_brighter_and_brightfield_darker_in_cells(fields):
    for f in fields:
        cell, ground = f.labels > 0, f.labels == 0
        ratio = np.array([c[cell].mean() / c[ground].mean() for c in f.pixels])
        assert (ratio[STAINS] > 1.3).all()
        assert (ratio[PLANES] < 0.995).all() and (ratio[PLANES] > 0.8).all()


def test_halos_flip_with_the_focus(fields):
    """Just outside a cell one plane brightens and the other darkens against the ground further out.
    """
    rings = []
    for f in fields:
        away = ndimage.distance_transform_edt(f.labels == 0)
        halo, ground = (away > 0) & (away < 3), (away > 8) & (away < 20)
        rings.append([c[halo].mean() / c[ground].mean() - 1
                      for c in f.pixels[PLANES].astype(float)])
    high, low, _ = np.mean(rings, 0)
    assert high > low + 0.005


def test_values_use_the_range_without_saturating(fields):
    for f in fields:
        for c in f.pixels:
            assert (c == 65535).mean() < 1e-4 and (c == 0).mean() < 1e-4
            assert np.percentile(c, 99.5) > 1000
            assert len(np.unique(c)) > 500


def test_ground_of_two_channels_is_uncorrelated_over_many_fields():
    """Over 64 fields: neither light and haze, nor noise, nor levels go together.

    Two smooth surfaces of one field do by chance, r = ±0.5 or so, hence the mean over fields.
    """
    smooth, fine, levels = [], [], []
    for seed in range(64):
        c = synthetic.field(seed, 64, 0).pixels.astype(float)
        # hot pixels would set r alone
        c = np.clip(c, *np.percentile(c, [1, 99], axis=(1, 2), keepdims=True))
        blurred = np.stack([ndimage.gaussian_filter(x, 6) for x in c])
        smooth.append(np.corrcoef(blurred.reshape(8, -1)))
        fine.append(np.corrcoef((c - blurred).reshape(8, -1)))
        levels.append(c.mean((1, 2)))
    pairs = np.triu_indices(8, 1)
    assert np.abs(np.mean(smooth, 0)[pairs]).max() < 0.25
    assert np.abs(np.mean(smooth, 0)[pairs].mean()) < 0.05
    assert np.abs(np.mean(fine, 0)[pairs]).max() < 0.01
    assert np.abs(np.corrcoef(np.transpose(levels))[pairs]).max() < 0.4


def test_a_cell_is_recognised_in_another_channel(fields):
    """A cell bright for its field in one stain is bright in every other, and dark in brightfield.
    """
    brightness = np.concatenate([[means(standard(c), f.labels) for c in f.pixels] for f in fields],
                                1)
    r = np.corrcoef(brightness)
    stains = r[STAINS, STAINS][np.triu_indices(5, 1)]
    assert stains.min() > 0.2 and stains.mean() > 0.4
    assert r[STAINS, 7].mean() < -0.15


def test_no_cells_is_ground_alone():
    f = synthetic.field(0, 128, 0)
    assert not f.labels.any() and not f.nuclei.any()
    spread = [np.diff(np.percentile(c, [5, 95]))[0] / np.median(c) for c in f.pixels]
    assert max(spread[STAINS]) < 1 and max(spread[PLANES]) < 0.2
    full = synthetic.field(0, 128, 20)
    assert all(a.std() > 2 * b.std() for a, b in zip(full.pixels[STAINS], f.pixels[STAINS]))


@pytest.mark.parametrize("arguments, word", [(dict(size=31), "size=31"),
                                             (dict(size=(64, 8)), "size=8"),
                                             (dict(cells=-1), "cells=-1"),
                                             (dict(diameter=3), "diameter=3"),
                                             (dict(seed=-2), "seed=-2"),
                                             (dict(diameter=float("nan")), "diameter=nan"),
                                             (dict(diameter=float("inf")), "diameter=inf")])
def test_impossible_arguments_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        synthetic.field(**{"seed": 0, "size": 64} | arguments)


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    script = Path(synthetic.__file__)
    return subprocess.run([sys.executable, script, *arguments], cwd=cwd, capture_output=True,
                          text=True,
                          timeout=60)


def test_command_writes_what_field_draws(tmp_path):
    done = command("out=drawn", "n=2", "size=40x64", "cells=4", "diameter=20", "seed=7",
                   cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "drawn"
    assert sorted(p.name for p in folder.iterdir()) == ["field_7.tif", "field_7_cells.tif",
                                                        "field_8.tif",
                                                        "field_8_cells.tif", "synthetic.txt"]
    assert "2 fields -> drawn" in done.stdout
    mixed = command("out=drawn", "n=1", "size=40x64", "cells=9", "diameter=20", cwd=tmp_path)
    assert mixed.returncode == 1 and "drawn otherwise; choose another out=" in mixed.stderr
    drawn = synthetic.field(8, (40, 64), 4, 20)
    with tifffile.TiffFile(folder / "field_8.tif") as tiff:
        np.testing.assert_array_equal(tiff.asarray(), drawn.pixels)
        assert (
            tiff.series[0].axes == "CYX" and tuple(tiff.imagej_metadata["Labels"]) == drawn.channels
        )
        per_um = np.divide(*tiff.pages[0].tags["XResolution"].value)
        assert 1 / per_um == pytest.approx(drawn.pixel_size, rel=1e-5)
    np.testing.assert_array_equal(tifffile.imread(folder / "field_8_cells.tif"), drawn.labels)


@pytest.mark.parametrize("arguments, words", [((), "key 'out' is missing"),
                                              (("out=a", "sise=5"), "did you mean 'size'"),
                                              (("out=a", "n=0"), "n=0: expected"),
                                              (("out=a", "size=9"), "size=9"),
                                              (("out=a", "size=64x64x3"), "size=480x640"),
                                              (("out=a", "b"), "such as out=b")])
def test_command_says_a_mistake_in_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        runs.script(synthetic.__doc__, synthetic.Config, synthetic.main, list(arguments))
    said = capsys.readouterr()
    assert (
        end.value.code == 1
        and said.out == ""
        and said.err.startswith("error: ")
        and words in said.err
    )
    assert said.err.count("\n") == 1 and not list(tmp_path.rglob("*.t*"))


# ------------------------------------------------------------------------------------------ movies

def test_tracks_of_a_movie_are_those_of_its_labels():
    drawn = synthetic.movie(1, frames=12, size=128, cells=50, diameter=18, speed=0.2, cycle=12)
    assert drawn.pixels.shape == drawn.labels.shape == (12, 128, 128)
    spans = {k: (a, b) for k, a, b, _ in drawn.tracks.tolist()}
    for k, (first, last) in spans.items():
        assert np.flatnonzero((drawn.labels == k).any((1, 2))).tolist() == list(
            range(first, last + 1))                                    # no gap, no way back
    assert set(spans) == set(np.unique(drawn.labels)) - {0}
    born = drawn.tracks[drawn.tracks[:, 3] > 0]
    assert len(born) > 6
    for _, first, _, parent in born.tolist():
        assert spans[parent][1] == first - 1
    assert drawn.pixels[drawn.labels > 0].mean() > 2 * drawn.pixels[drawn.labels == 0].mean()
    again = synthetic.movie(1, frames=12, size=128, cells=50, diameter=18, speed=0.2, cycle=12)
    assert all(np.array_equal(a, b) for a, b in zip(drawn, again))


def test_steps_are_as_long_as_asked_for():
    drawn = synthetic.movie(2, frames=30, size=256, cells=12, diameter=16, speed=0.3, cycle=1e6)
    steps = []
    for k, first, last, _ in drawn.tracks.tolist():
        at = [np.argwhere(drawn.labels[t] == k) for t in range(first, last + 1)]
        whole = [not ((a == 0) | (a == 255)).any() for a in at]
        steps += [np.hypot(*(b.mean(0) - a.mean(0))) for a, b, w, v in
                  zip(at, at[1:], whole, whole[1:]) if w and v]
    assert np.mean(steps) == pytest.approx(0.3 * 16, rel=0.15)


def test_more_tracks_than_a_file_can_number_are_refused(tmp_path, monkeypatch):
    labels = np.full((1, 64, 64), 65536, np.int32)
    monkeypatch.setattr(synthetic, "movie", lambda *_: synthetic.Movie(labels, labels, labels))
    with pytest.raises(ValueError, match="cells=60: 65536 tracks, expected at most 65535"):
        synthetic.main(synthetic.Config(out=str(tmp_path), size="64", frames=1), [])
    assert not list(tmp_path.iterdir())


def test_movies_from_the_command(tmp_path):
    synthetic.main(synthetic.Config(out=str(tmp_path), n=1, size="64", cells=8, diameter=16,
                                    frames=3), [])
    labels = tifffile.imread(tmp_path / "movie_0_cells.tif")
    rows = np.loadtxt(tmp_path / "movie_0_tracks.txt", dtype=int, ndmin=2)
    assert labels.shape == (3, 64, 64) and set(rows[:, 0]) == set(np.unique(labels)) - {0}
    with tifffile.TiffFile(tmp_path / "movie_0.tif") as tif:
        assert tif.series[0].axes == "TYX"
    for wrong, said in ((dict(frames=0), "frames=0"), (dict(speed=-1), "speed=-1")):
        with pytest.raises(ValueError, match=said):
            synthetic.movie(0, **wrong)
