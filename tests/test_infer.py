"""infer.py as a user meets it: files in, files out, one line for every mistake.

Uses weights that ship.
"""
import csv
import dataclasses
import functools
import hashlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import zipfile

import numpy as np
import PIL.Image
import pytest
import test_images
import test_model
import tifffile
import torch
import yaml
from conftest import ROOT
from skimage.io import imread

import data
import images
import infer
import metrics
import model
import runs
import segment
import synthetic
import vectors

# drawn fields here, so the weights that were trained on them
Config = functools.partial(infer.Config, weights="demo_synthetic")


@pytest.fixture(scope="module")
def field():
    return synthetic.field(7, (240, 300), 60, diameter=32)


@pytest.fixture(scope="module")
def broad():
    """Of several blocks of 64 px, with what lies within four cells of them."""
    return synthetic.field(7, (240, 480), 90, diameter=32)


def write(path, field, *names, **options):
    pixels = np.stack([field.pixels[field.channels.index(name)] for name in names])
    tifffile.imwrite(path, pixels if len(names) > 1 else pixels[0], imagej=True,
                     metadata={"axes": "CYX", "Labels": list(names)} if len(names) > 1 else None,
                     **options)
    return path


def run(*arguments, cwd=None):
    done = subprocess.run([sys.executable, str(ROOT / "infer.py"), *map(str, arguments)],
                          capture_output=True, text=True,
                          cwd=cwd)
    return done.returncode, done.stdout, done.stderr


def run_here(*arguments, capsys):
    """The same in this process."""
    with pytest.raises(SystemExit) as end:
        runs.script(infer.__doc__, infer.Config, infer.main, [str(a) for a in arguments])
    return end.value.code, *capsys.readouterr()


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_each_channel_brings_its_vectors(tmp_path, field):
    """channels=each finds cells in the mean of four channels, as in a file of that mean; the
    vectors are those of each channel alone with these cells."""
    names = ("DNA", "ER", "RNA", "AGP")
    path = write(tmp_path / "four.tif", field, *names)
    net = model.load(model.find_weights("demo_synthetic")).ready("cpu")
    with images.open_image(path) as source:
        limits = images.percentiles(source, net.settings.low, net.settings.high)
        mean = images.normalise(source.whole().pixels, limits).mean(0)
    infer.segment_file(path, "each", tmp_path, net,
                       Config(channels=("each",), embed=True, diameter="32"))
    labels = images.read_labels(tmp_path / "each_labels.tif")
    expected = segment.segment(mean, net, limits=segment.UNIT[:1], diameter=32)
    assert labels.max() > 20 and np.array_equal(labels, expected)
    found = vectors.read_vectors(tmp_path / "each_cells.npz")
    assert found.channels == names and found.vectors.shape == (labels.max(), 4 * net.backbone.dim)
    for k, part in enumerate(np.split(found.vectors, 4, 1)):
        ids, alone = segment.cell_vectors(field.pixels[field.channels.index(names[k])], labels, net,
                                          limits=limits[k:k + 1], diameter=32)
        np.testing.assert_allclose(part, alone[np.searchsorted(ids, found.ids)], atol=0.02)
    with open(tmp_path / "each_cells.csv", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [int(row["id"]) for row in table] == found.ids.tolist()
    assert {f"intensity_mean_{name}" for name in names} <= table[0].keys()
    with pytest.raises(ValueError, match="channels=each is for single planes"):
        Config(channels=("each",), z="all")


@pytest.mark.smoke
def test_all_results_of_one_image(tmp_path, field):
    image = write(tmp_path / "a.tif", field, "ER", "Brightfield")
    out = tmp_path / "out"
    config = Config(out=str(out), channels=("ER",), geojson=True, rois=True, distance=True)
    assert infer.main(config, [str(image)]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["a.geojson", "a_cells.csv", "a_distance.tif",
                                                     "a_labels.tif",
                                                     "a_overlay.png", "a_rois.zip", "summary.csv"]
    labels = tifffile.imread(out / "a_labels.tif")
    assert labels.shape == (240, 300) and labels.dtype == np.uint16 and labels.max() > 5
    table, found = rows(out / "a_cells.csv"), labels.max()
    assert [int(row["id"]) for row in table] == list(range(1, found + 1))
    assert [int(row["area_px"]) for row in table] == np.bincount(labels.ravel())[1:].tolist()
    summary = rows(out / "summary.csv")[0]
    assert int(summary["cells"]) == found and summary["image"] == "a"
    assert float(summary["confluency"]) == pytest.approx((labels > 0).mean(), abs=1e-4)
    features = json.loads((out / "a.geojson").read_text())["features"]
    assert len(features) == found == len(zipfile.ZipFile(out / "a_rois.zip").namelist())
    distance = tifffile.imread(out / "a_distance.tif")
    assert distance.shape == labels.shape and 0 <= distance.min() and distance.max() <= 1
    assert distance[labels > 0].mean() > 5 * distance[labels == 0].mean()


def test_it_finds_the_cells_of_a_field_it_never_saw(field, tmp_path):
    for name in ("ER", "Brightfield"):
        infer.main(Config(out=str(tmp_path)), [str(write(tmp_path / f"{name}.tif", field, name))])
        found = data.read_labels(tmp_path / f"{name}_labels.tif")
        assert metrics.average_precision(field.labels, found, [0.5])[0] > 0.5


def surface(geometry) -> float:
    """Area of GeoJSON polygons by the shoelace formula; holes turn the other way."""
    parts = (
        geometry["coordinates"] if geometry["type"] == "MultiPolygon" else [geometry["coordinates"]]
    )
    rings = [np.array(ring) for part in parts for ring in part]
    return sum((r[:-1, 0] * r[1:, 1] - r[1:, 0] * r[:-1, 1]).sum() / 2 for r in rings)


def test_large_images_go_block_by_block_with_the_same_result(tmp_path, broad, monkeypatch):
    """Cells are whole whatever they are measured with: near= is about neighbours, not about what a
    block sees."""
    image = write(tmp_path / "a.tif", broad, "ER")
    outs = tmp_path / "one", tmp_path / "many"
    more = dict(geojson=True, rois=True, distance=True, near=1)
    infer.main(Config(out=str(outs[0]), **more), [str(image)])
    monkeypatch.setattr(segment, "HALO", 1)
    infer.main(Config(out=str(outs[1]), block=64, **more), [str(image)])
    one, many = (tifffile.imread(out / "a_labels.tif") for out in outs)
    assert many.dtype == np.uint32 and tifffile.TiffFile(outs[1] / "a_labels.tif").pages[0].is_tiled
    assert metrics.average_precision(one, many, [0.9])[0] >= 0.999
    tables = [rows(out / "a_cells.csv") for out in outs]
    assert len(tables[0]) == len(tables[1]) == one.max() == many.max()
    areas = [sorted(int(row["area_px"]) for row in table) for table in tables]
    assert areas[0] == areas[1]
    places = [sorted((row["centroid_y_px"], row["centroid_x_px"], row["touches_border"])
                     for row in table) for table in tables]
    assert places[0] == places[1]
    for out, labels in zip(outs, (one, many)):  # every outline is its cell's own
        features = json.loads((out / "a.geojson").read_text())["features"]
        area = {int(feature["properties"]["name"]): surface(feature["geometry"])
                for feature in features}
        assert area == {i: (labels == i).sum() for i in range(1, labels.max() + 1)}
        names = zipfile.ZipFile(out / "a_rois.zip").namelist()
        assert sorted(names) == [f"{i:04d}.roi" for i in range(1, labels.max() + 1)]
    np.testing.assert_allclose(*(tifffile.imread(out / "a_distance.tif") for out in outs),
                               atol=2e-3)      # kept as float16


def test_a_slide_costs_its_tissue_alone(tmp_path, monkeypatch):
    """The same cells as without a pyramid, in blocks, and no look at empty glass."""
    cells_of = synthetic.field(7, (192, 192), 30, diameter=32)
    pixels = np.full((1024, 1536, 3), 238, np.uint8)
    shown = cells_of.pixels[cells_of.channels.index("ER")]
    pixels[128:320, 1280:1472] = 235 - (shown / shown.max() * 180).astype(np.uint8)[..., None]
    test_images.slide(tmp_path / "slide.svs", pixels)
    monkeypatch.setattr(images, "OVERVIEW", 1)
    looked, real = [], segment._Runner._forward
    monkeypatch.setattr(segment._Runner, "_forward",
                        lambda self, x: (looked.append(len(x)), real(self, x))[1])
    config = Config(out=str(tmp_path / "out"), geojson=True, block=256, fill=0.02, peak=0.05)
    assert infer.main(config, [str(tmp_path / "slide.svs")]) == 0
    tile = model.load(model.find_weights("demo_synthetic")).settings.tile
    assert 0 < sum(looked) < 0.5 * (1024 / tile) * (1536 / tile)
    labels = tifffile.imread(tmp_path / "out/slide_labels.tif")
    assert labels.shape == (1024, 1536) and not labels[:, :1100].any()
    found = json.loads((tmp_path / "out/slide.geojson").read_text())["features"]
    assert sorted(int(each["properties"]["name"]) for each in found) == sorted(
        np.unique(labels)[1:].tolist())
    assert infer.main(dataclasses.replace(config, pixel_size=0.5, overwrite=True),
                      [str(tmp_path / "slide.svs")]) == 0
    assert tifffile.imread(tmp_path / "out/slide_labels.tif").shape == (512, 768)


def test_weights_that_are_not_free_say_so(tmp_path, broad, capsys):
    write(tmp_path / "a.tif", broad, "AGP")
    free, bound = model.find_weights("demo_synthetic"), tmp_path / "bound.pt"
    model.change_weights_settings(free, bound, licence="CC-BY-NC-SA-4.0")
    for weights, said in ((free, "with demo_synthetic.pt ->"),
                          (bound, "with bound.pt (weights under CC-BY-NC-SA-4.0) ->")):
        infer.main(Config(out=str(tmp_path / weights.stem), weights=str(weights)),
                   [str(tmp_path / "a.tif")])
        assert said in capsys.readouterr().out


def test_score_and_min_score(tmp_path, broad):
    """Where weights have a score it is a column and a measurement; cells below min_score are gone,
    whatever the blocks."""
    write(tmp_path / "a.tif", broad, "AGP")
    shipped = model.find_weights("demo_synthetic")
    model.change_weights_settings(shipped, tmp_path / "s.pt", score={"constant": -4.0, "mean": 6.0})
    folders = []
    for block, least in ((2048, None), (64, None), (2048, 0.5), (64, 0.5)):
        folders.append(tmp_path / f"{block}_{least}")
        infer.main(Config(out=str(folders[-1]), weights=str(tmp_path / "s.pt"), geojson=True,
                          block=block, min_score=least), [str(tmp_path / "a.tif")])
    tables = [list(csv.DictReader((f / "a_cells.csv").read_text().splitlines())) for f in folders]
    whole, blocks, likely, likely_blocks = (
        {(row["centroid_y_px"][:4], row["centroid_x_px"][:4]): float(row["score"]) for row in table}
        for table in tables)
    assert 0 < len(likely) < len(whole) and min(likely.values()) >= 0.5
    assert likely == {place: score for place, score in whole.items() if score >= 0.5}
    assert blocks.keys() == whole.keys() and likely_blocks.keys() == likely.keys()
    assert blocks == pytest.approx(whole, abs=0.01)
    for folder, table in zip(folders, tables):
        labels = data.read_labels(folder / "a_labels.tif")
        assert set(np.unique(labels)) - {0} == {int(row["id"]) for row in table}
        shapes = json.loads((folder / "a.geojson").read_text())["features"]
        assert {s["properties"]["measurements"]["score"] for s in shapes} == {
            float(row["score"]) for row in table}
    with pytest.raises(ValueError, match="has no calibrated score"):
        infer.main(Config(out=str(tmp_path / "o"), min_score=0.5), [str(tmp_path / "a.tif")])


@pytest.mark.parametrize("block", [2048, 64])
def test_labels_that_are_given_are_measured(tmp_path, broad, block, capsys):
    """As those that were found, whatever the blocks."""
    write(tmp_path / "a.tif", broad, "AGP")
    write(tmp_path / "b.tif", broad, "AGP")                     # has no labels: left out
    infer.main(Config(out=str(tmp_path / "found"), geojson=True), [str(tmp_path / "a.tif")])
    infer.main(Config(out=str(tmp_path / "given"), geojson=True, block=block,
                      labels=str(tmp_path / "found")), [str(tmp_path / name) for name in
                                                        ("a.tif", "b.tif")])
    assert "1 of 2 images have no NAME_labels.tif there and are left out" in capsys.readouterr().err
    found, given = ([list(csv.DictReader(open(tmp_path / folder / "a_cells.csv")))  # noqa: SIM115
                     for folder in ("found", "given")])
    assert sorted(given, key=lambda row: int(row["id"])) == found and len(found) > 20
    np.testing.assert_array_equal(*(data.read_labels(tmp_path / folder / "a_labels.tif")
                                    for folder in ("found", "given")))
    assert not (tmp_path / "given" / "b_cells.csv").exists()
    with pytest.raises(FileNotFoundError, match="no NAME_labels.tif for any of the 1 images"):
        infer.main(Config(out=str(tmp_path / "given"), labels=str(tmp_path / "found")),
                   [str(tmp_path / "b.tif")])
    for keys, said in ((dict(min_area=9, peak=0.5), "leave out peak= and min_area="),
                       (dict(distance=True), "leave out distance="),
                       (dict(time="all", min_score=0.5), "leave out min_score="),
                       (dict(out=str(tmp_path / "found")), "choose another out=")):
        with pytest.raises(ValueError, match=said):
            infer.main(Config(labels=str(tmp_path / "found"), **keys), [str(tmp_path / "a.tif")])


def test_labels_that_changed_are_measured_anew(tmp_path, field, monkeypatch):
    write(tmp_path / "a.tif", field, "ER")
    infer.main(Config(out=str(tmp_path / "found")), [str(tmp_path / "a.tif")])
    labels = images.read_labels(tmp_path / "found" / "a_labels.tif")
    given = Config(out=str(tmp_path / "given"), labels=str(tmp_path / "found"))
    for _ in range(2):                                       # the second time they are kept
        assert infer.main(given, [str(tmp_path / "a.tif")]) == 0
    images.write_labels(tmp_path / "found" / "a_labels.tif",
                        np.where(labels == labels.max(), 0, labels))
    with pytest.raises(ValueError, match="with other labels than now in labels=.*found; overwrit"):
        infer.main(given, [str(tmp_path / "a.tif")])
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):  # tables of new cells
        killed.setattr(infer.cells, "write_picture", stop)
        infer.main(dataclasses.replace(given, overwrite=True), [str(tmp_path / "a.tif")])
    assert not (tmp_path / "given" / "a_labels.tif").exists()    # beside labels of before
    infer.main(dataclasses.replace(given, overwrite=True), [str(tmp_path / "a.tif")])
    assert len(rows(tmp_path / "given" / "a_cells.csv")) == labels.max() - 1
    infer.main(dataclasses.replace(given, overwrite=True, border="drop"), [str(tmp_path / "a.tif")])
    edge = np.concatenate((labels[0], labels[-1], labels[:, 0], labels[:, -1]))
    kept = np.where(np.isin(labels, edge) | (labels == labels.max()), 0, labels)
    assert 5 < len(np.unique(kept)) < labels.max() - 1
    assert np.array_equal(images.read_labels(tmp_path / "given" / "a_labels.tif"), kept)


def test_tables_and_outlines_of_others_are_not_overwritten(tmp_path, field):
    image = str(write(tmp_path / "a.tif", field, "ER"))
    for name, text in (("a_cells.csv", "id,type\n1,round\n"),
                       ("a.geojson", '{"type":"FeatureCollection","features":[{"a":1}]}')):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=f"{name} beside it .* none of this program's"):
            infer.main(Config(out=str(tmp_path), geojson=True), [image])
        assert (tmp_path / name).read_text() == text
        (tmp_path / name).unlink()
    infer.main(Config(out=str(tmp_path), geojson=True), [image])
    (tmp_path / "a_labels.tif").unlink()                        # as after a stop
    assert infer.main(Config(out=str(tmp_path), geojson=True), [image]) == 0


def test_what_is_made_anew_leaves_nothing_of_before_beside_it(tmp_path, field):
    image, out = str(write(tmp_path / "a.tif", field, "ER")), tmp_path / "out"
    infer.main(Config(out=str(out), geojson=True, rois=True), [image])
    infer.main(Config(out=str(out), embed=True), [image])       # more of the same cells
    assert (out / "a_rois.zip").exists()
    (out / "a_note.txt").touch()                                # the user's
    infer.main(Config(out=str(out), geojson=True, min_area=1e6, overwrite=True), [image])
    assert sorted(file.name for file in out.glob("a*")) == [
        "a.geojson", "a_cells.csv", "a_labels.tif", "a_note.txt", "a_overlay.png"]


def test_types_with_gaps_in_the_ids_of_cells(tmp_path, field):
    """Cells 3, 6, 9, ... of labels that are given keep their numbers, types and colours."""
    write(tmp_path / "a.tif", field, "ER")
    infer.main(Config(out=str(tmp_path / "found")), [str(tmp_path / "a.tif")])
    labels = images.read_labels(tmp_path / "found" / "a_labels.tif")
    net = model.load(model.find_weights("demo_synthetic"))
    net.set_types(torch.nn.Linear(net.backbone.dim, 2), ("one", "other"))
    model.save(net, tmp_path / "typed.pt")
    tables, pictures = [], []
    for step in (1, 3):
        images.write_labels(tmp_path / "found" / "a_labels.tif", step * labels)
        out = tmp_path / str(step)
        infer.main(Config(out=str(out), labels=str(tmp_path / "found"),
                          weights=str(tmp_path / "typed.pt")), [str(tmp_path / "a.tif")])
        tables.append([(int(row["id"]) // step, row["type"], row["type_probability"])
                       for row in rows(out / "a_cells.csv")])
        pictures.append(imread(out / "a_overlay.png"))
    assert tables[0] == tables[1] and len(tables[0]) == labels.max()
    assert len({share for *_, share in tables[0]}) > 1          # each has its own vector
    np.testing.assert_array_equal(*pictures)


def test_pictures_of_large_images_are_reduced(tmp_path, broad, monkeypatch):
    image = write(tmp_path / "a.tif", broad, "ER")
    monkeypatch.setattr(infer, "PICTURE", 100)
    monkeypatch.setattr(segment, "HALO", 1)
    pictures = []
    for block in (64, 2048):
        out = tmp_path / str(block)
        infer.main(Config(out=str(out), block=block), [str(image)])
        # where it is coloured
        pictures.append(np.ptp(imread(out / "a_overlay.png").astype(int), axis=2) > 10)
    # 48 x 96, enlarged to be seen
    assert pictures[0].shape[0] * 2 == pictures[0].shape[1] and pictures[0].any()
    assert (pictures[0] == pictures[1]).mean() > 0.999  # other ids, other colours, same lines


def test_results_are_kept_unless_overwritten(tmp_path, field, capsys):
    images = [write(tmp_path / f"{name}.tif", field, "ER") for name in "ab"]
    out = tmp_path / "out"
    infer.main(Config(out=str(out)), [str(images[0])])
    first = (out / "a_labels.tif").stat().st_mtime_ns
    infer.main(Config(out=str(out)), [str(tmp_path)])
    assert (out / "a_labels.tif").stat().st_mtime_ns == first and (out / "b_labels.tif").exists()
    assert "1 of 2 images have their results" in capsys.readouterr().out
    assert [row["image"] for row in rows(out / "summary.csv")] == ["a", "b"]
    for one, other in (("20", "20.0px"), ("5um", "5.0 µm")):     # said otherwise
        assert infer._diameter_said(one) == infer._diameter_said(other)
    assert infer._diameter_said("20") != infer._diameter_said("20um")
    infer.main(Config(out=str(out), overwrite=True), [str(images[0])])
    assert (out / "a_labels.tif").stat().st_mtime_ns > first


def test_one_bad_file_among_many(tmp_path, field, capsys):
    write(tmp_path / "a.tif", field, "ER")
    write(tmp_path / "c.tif", field, "RNA")
    (tmp_path / "b.tif").write_bytes(b"")
    code, out, err = run_here(tmp_path, f"out={tmp_path / 'out'}", "weights=demo_synthetic",
                              capsys=capsys)
    assert code == 1 and "2 images" in out
    assert err.count("warning: ") == 1 and "b.tif" in err
    assert err.strip().splitlines()[-1].startswith("error: 1 of 3 images could not be done:")
    assert (tmp_path / "out" / "a_labels.tif").exists() and (tmp_path / "out"
                                                             / "c_labels.tif").exists()
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith((".", "b"))]


def test_a_device_is_no_image():
    with pytest.raises(ValueError, match="/dev/null: a device or pipe, expected a file"):
        infer.find_images(["/dev/null"], Config())


@pytest.mark.smoke
def test_folders_globs_and_patterns(tmp_path, monkeypatch):
    for name in ("p1/x_w1.tif", "p1/x_w2.tif", "p2/deep/x_w1.png", "p1/x_w1_labels.tif",
                 "p1/notes.txt", "p1/x_overlay.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = infer.find_images([str(tmp_path)], Config())
    assert list(found.values()) == ["p1_x_w1", "p1_x_w2", "p2_deep_x_w1"]
    assert list(infer.find_images([str(tmp_path)],
                                  Config(pattern="*_w1.*")).values()) == ["p1_x_w1", "p2_deep_x_w1"]
    assert list(infer.find_images([str(tmp_path / "p1" / "*_w?.tif")],
                                  Config()).values()) == ["x_w1", "x_w2"]
    assert list(infer.find_images([str(tmp_path / "p1" / "*_w?.tif")],
                                  Config(pattern="*w2*")).values()) == ["x_w2"]
    monkeypatch.chdir(tmp_path)                # the second of a name keeps its folder and suffix
    assert list(infer.find_images(["p1/x_w1.tif", "p2/deep/x_w1.png"], Config()).values()) == [
        "x_w1", "p2_deep_x_w1.png"]
    for wrong in (["gone"], [str(tmp_path / "*.jpg")], [str(tmp_path / "*/*_labels.tif")]):
        with pytest.raises(FileNotFoundError):
            infer.find_images(wrong, Config())


def test_what_is_no_image_of_a_folder_is_left_out_and_nothing_else(tmp_path, capsys):
    """Results and labels beside their images, and what a Mac leaves; a stain called nuclei is an
    image."""
    for name in ("a.tif", "a_labels.tif", "a_cp_masks.tif", "b_nuclei.tif", "b_actin.btf",
                 "._a.tif", ".cache/c.png", "sub/a_masks.png",
                 "a_cells.csv", "a_mask.png", "a_img_seg.npy", "a_types.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert sorted(infer.find_images([str(tmp_path)], Config()).values()) == ["a", "b_actin",
                                                                             "b_nuclei"]
    assert sorted(infer.find_images([str(tmp_path / "*")], Config()).values()) == ["a", "b_actin",
                                                                                   "b_nuclei"]
    assert list(infer.find_images([str(tmp_path)],
                                  Config(pattern="*_masks.*")).values()) == ["a_cp_masks",
                                                                             "sub_a_masks"]
    # as a shell gives them
    named = [str(tmp_path / name) for name in ("a.tif", "a_labels.tif", "b_nuclei.tif")]
    (tmp_path / "well").mkdir()
    for name in ("w1.tif", "w1_nuclei.tif", "w1_masks.tif"):
        (tmp_path / "well" / name).touch()
    assert [path.name for path in infer.find_images([str(tmp_path / "well")], Config())] == [
        "w1.tif"]
    assert "passed over: w1_nuclei.tif; what is an image" in capsys.readouterr().err
    assert list(infer.find_images(named, Config()).values()) == ["a", "b_nuclei"]
    # asked for by name
    assert list(infer.find_images(named[1:2], Config()).values()) == ["a_labels"]


@pytest.mark.smoke
def test_channels_keep_their_numbers(tmp_path, field):
    tifffile.imwrite(tmp_path / "a.tif", field.pixels[:3], photometric="minisblack",
                     metadata={"axes": "CYX"})
    infer.main(Config(out=str(tmp_path / "out"), channels=("3", "1")), [str(tmp_path / "a.tif")])
    table, whole = rows(tmp_path / "out/a_cells.csv"), data.read_image(tmp_path / "a.tif").pixels
    assert {"intensity_mean_3",
            "intensity_mean_1"} <= table[0].keys() and "intensity_mean_2" not in table[0]
    labels = data.read_labels(tmp_path / "out/a_labels.tif")
    for number in (1, 3):
        assert float(table[0][f"intensity_mean_{number}"]) == pytest.approx(
            whole[number - 1][labels == int(table[0]["id"])].mean(), rel=1e-4
        )


def test_a_summary_saved_by_another_program(tmp_path, field):
    write(tmp_path / "a.tif", field, "ER")
    out = tmp_path / "out"
    infer.main(Config(out=str(out)), [str(tmp_path / "a.tif")])
    plain = (out / "summary.csv").read_text(encoding="utf-8")
    write(tmp_path / "b.tif", field, "RNA")
    # with the mark that Excel puts first
    (out / "summary.csv").write_text(plain, encoding="utf-8-sig")
    infer.main(Config(out=str(out)), [str(tmp_path / "b.tif")])
    assert [row["image"] for row in rows(out / "summary.csv")] == ["a", "b"]
    (out / "summary.csv").write_text(plain.replace(",", ";"), encoding="utf-8")
    with pytest.raises(ValueError, match="no columns 'image', expected one"):
        infer.main(Config(out=str(out), overwrite=True), [str(tmp_path / "b.tif")])


@pytest.mark.smoke
def test_diameter_in_px_and_micrometres():
    assert infer.parse_diameter("40", None, None) == 40 and infer.parse_diameter("12um", 0.5,
                                                                                 None) == 24
    assert infer.parse_diameter("12 µm", 0.5, None) == 24
    with pytest.raises(ValueError, match="does not say how large a pixel is"):
        infer.parse_diameter("12um", None, "a.tif")
    with pytest.raises(ValueError, match="diameter=wide: expected px"):
        Config(diameter="wide")


@pytest.mark.parametrize("diameter, scale", [(None, 1.0), ("20", 1.2)])
def test_the_summary_tells_at_which_scale_the_network_saw_the_image(tmp_path, field, diameter,
                                                                    scale):
    """The labels are segment()'s, and the scale in the summary is the one at which the network saw
    the image."""
    image = write(tmp_path / "a.tif", field, "ER")
    net = model.load(ROOT / "final_models/demo_synthetic.pt")
    net.settings = dataclasses.replace(net.settings, diameter=24.0)
    model.save(net, tmp_path / "net.pt")
    infer.main(infer.Config(out=str(tmp_path), weights=str(tmp_path / "net.pt"), diameter=diameter),
               [str(image)])
    expected = segment.segment(tifffile.imread(image), net.ready("cpu"),
                               diameter=diameter and float(diameter))
    assert expected.max() > 3 and np.array_equal(data.read_labels(tmp_path / "a_labels.tif"),
                                                 expected)
    assert float(rows(tmp_path / "summary.csv")[0]["scale"]) == scale


def test_enlarged_cells_are_found_with_diameter(tmp_path, field):
    """Cells three times as wide as in training: told so, the network finds them all the same."""
    agp = field.pixels[field.channels.index("ER")][:120, :150]
    large, truth = np.kron(agp, np.ones((3, 3), np.uint16)), np.kron(field.labels[:120, :150],
                                                                     np.ones((3, 3), int))
    tifffile.imwrite(tmp_path / "a.tif", large)
    area = np.bincount(truth.ravel())[1:]
    diameter = 2 * np.sqrt(np.median(area[area > 0]) / np.pi)
    infer.main(Config(out=str(tmp_path), diameter=f"{diameter:.0f}"), [str(tmp_path / "a.tif")])
    assert metrics.average_precision(truth, data.read_labels(tmp_path / "a_labels.tif"),
                                     [0.5])[0] > 0.45    # .64
    with pytest.raises(ValueError, match="cannot tell how large cells are"):
        infer.main(Config(out=str(tmp_path), diameter="auto", overwrite=True),
                   [str(tmp_path / "a.tif")])


def constant(tmp_path):
    tifffile.imwrite(tmp_path / "x.tif", np.full((50, 60), 9, np.uint16))


@pytest.mark.smoke
def test_a_constant_image_has_no_cells(tmp_path, capsys):
    constant(tmp_path)
    code, out, err = run_here(tmp_path / "x.tif", f"out={tmp_path / 'out'}", capsys=capsys)
    assert code == 0 and tifffile.imread(tmp_path / "out/x_labels.tif").max() == 0
    assert "x.tif: has no contrast, or less than 4 grey levels" in err
    assert rows(tmp_path / "out/x_cells.csv") == [] and rows(tmp_path
                                                             / "out/summary.csv")[0]["cells"] == "0"


def test_every_mistake_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    constant(tmp_path)
    (tmp_path / "empty.tif").touch()
    (tmp_path / "text.tif").write_text("this is no image\n" * 50)
    tifffile.imwrite(tmp_path / "whole.tif",
                     np.random.default_rng(0).integers(0, 999, (300, 300)).astype(np.uint16))
    (tmp_path / "cut.tif").write_bytes((tmp_path / "whole.tif").read_bytes()[:50000])
    tifffile.imwrite(tmp_path / "stack.tif", np.zeros((25, 40, 40), np.uint16), imagej=True,
                     metadata={"axes": "ZYX"})
    broken = np.ones((40, 40), np.float32)
    broken[3, 4] = np.nan
    tifffile.imwrite(tmp_path / "nan.tif", broken)
    tifffile.imwrite(tmp_path / "five.tif", np.zeros((5, 40, 40), np.uint16), imagej=True,
                     metadata={"axes": "CYX"})
    (tmp_path / "a file").touch()
    (tmp_path / "none.pt").write_text("no weights")
    good = tmp_path / "x.tif"
    for arguments, said in [
            (["empty.tif"], "empty"), (["text.tif"], "text.tif"), (["cut.tif"], "cut.tif"),
            (["stack.tif"], "plane=1..25"), (["nan.tif"], "NaN"), (["five.tif"], "channels="),
            (["gone"], "gone: no such file or folder"),
            ([good, "out=a file/x"], "cannot write there"),
            ([good, "weights=none.pt"], "none.pt: not a file of PyTorch weights"),
            ([good, "weights=ssl_tiny"], "a backbone without decoder"),
            (["weights=text.tif", good], "text.tif: not a file of PyTorch weights"),
            ([good, "weights=gone"], "no weights at"), ([good, "peak=2"], "peak=2: expected"),
            ([good, "peka=0.3"], "unknown key 'peka', did you mean 'peak'?"),
            ([""], "an empty file name"),
            ([good, "near=nan"], "near=nan: expected"), ([good, "near=-1"], "near=-1: expected"),
            ([good, "diameter=0.5"], "would be enlarged"),
            ([good, "diameter=9000"], "would be reduced"),
            ([good, "block=0"], "block=0: expected a whole number, 1 or more"),
            ([good, "overlap=500"], "overlap=500: expected"),
            ([good, "fill=0.99"], "expected 0 <= fill <= peak"),
            ([good, "z=2"], "for one plane give plane=2"),
            ([good, "plane=2"], "has no axis Z"), ([good, "border=cut"], "expected keep or drop"),
            ([good, "tile=60"], "tile=60: expected a multiple of the patch"),
            ([good, "channels=DNA"], "no channel 'DNA'"),
            ([good, "channels=3"], "no channel '3'"), ([good, "diameter=12um"],
                                                       "does not say how large a pixel is")]:
        more = [default for default in ("out=o", "weights=demo_synthetic")
                if not any(default.split("=")[0] + "=" in str(a) for a in arguments)]
        code, out, err = run_here(*arguments, *more, capsys=capsys)
        last = err.strip().splitlines()
        assert code == 1 and last[-1].startswith("error: ") and said in err, (arguments, err)
        assert "Traceback" not in err and len(last) <= 2, err
    assert not (tmp_path / "o").exists()
    # once as a process of its own
    code, out, err = run("cut.tif", "weights=demo_synthetic", cwd=tmp_path)
    assert code == 1 and err.startswith("error: cut.tif: ") and err.count("\n") == 1 and not out


def test_help_comes_at_once_and_lists_the_keys():
    code, out, err = run("--help")
    assert code == 0 and "diameter=null" in out and "NAME_labels.tif" in out


def test_no_arguments_segment_the_demo(tmp_path):
    code, out, err = run(f"out={tmp_path}", cwd=tmp_path)
    assert code == 0, err
    demo = [p for p in os.listdir(ROOT / "demo") if p.endswith(".png")]
    assert len(list(tmp_path.glob("*_labels.tif"))) == len(demo) >= 1
    assert err.count("weights=tiny is five times as fast") == (not torch.cuda.is_available())
    assert all(int(row["cells"]) > 5 for row in rows(tmp_path / "summary.csv"))


def test_a_package_for_the_model_zoo(tmp_path, monkeypatch, capsys):
    """What the zip holds fits together; bioimageio.core validates and runs it where it is there."""
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    monkeypatch.chdir(tmp_path)
    model.save(test_model.onnx_net(), tmp_path / "small.pt")
    with pytest.raises(SystemExit) as end:
        runs.script("", infer.Export, infer.export, ["weights=small.pt", "format=bioimageio"])
    assert end.value.code == 0 and "dinocell_bioimageio.zip" in capsys.readouterr().out
    with zipfile.ZipFile("dinocell_bioimageio.zip") as package:
        files = {name: package.read(name) for name in package.namelist()}
    told = yaml.safe_load(files["rdf.yaml"])
    assert told["config"]["dinocell"].keys() >= {"peak", "fill", "min_area", "tile", "diameter"}
    for entry in (told["inputs"][0]["test_tensor"], told["outputs"][0]["test_tensor"],
                  told["weights"]["onnx"]):
        assert hashlib.sha256(files[entry["source"]]).hexdigest() == entry["sha256"]
    image, distance = (np.load(io.BytesIO(files[f"test_{name}.npy"])) for name in ("input",
                                                                                   "output"))
    assert image.shape[1:] == (3, *distance.shape[2:]) and image.max() > 1 >= distance.max()
    core = pytest.importorskip("bioimageio.core", reason="needs bioimageio.core")
    summary = core.test_model(tmp_path / "dinocell_bioimageio.zip", weight_format="onnx")
    assert summary.status == "passed", summary.format()


def test_export(tmp_path, monkeypatch, capsys):
    """Mistakes in one line; the file itself where the packages are there."""
    def export(*arguments):
        with pytest.raises(SystemExit) as end:
            runs.script(infer.export.__doc__, infer.Export, infer.export, list(arguments))
        return end.value.code, *capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    model.save(test_model.onnx_net(), tmp_path / "small.pt")
    assert "opset=18" in run("export", "--help")[1]
    for wrong, said in (("out=x.pt", "ends in .onnx"), ("opset=3", "18 to 23"),
                        ("weights=gone", "no weights at"),
                        ("format=bioimageio out=x.onnx", "ends in .zip"),
                        ("format=bioimageio half=true", "expected false with format=bioimageio"),
                        ("image.tif", "unexpected image.tif")):
        code, _, err = export(*wrong.split())
        assert code == 1 and err.startswith("error: ") and err.count("\n") == 1 and said in err, err
    if importlib.util.find_spec("onnxruntime"):
        code, out, err = export("weights=small.pt", "out=x.onnx")
        assert code == 0 and "of PyTorch" in out and err == "", err
        for wrong, said in (("out=no/x.onnx", "error: no: no such folder"),
                            ("tile=33", "tile=33: expected a multiple of the patch")):
            code, _, err = export("weights=small.pt", wrong)
            assert code == 1 and said in err and err.count("\n") == 1, err


def test_a_folder_of_one_magnification_is_told_its_diameter():
    """The median, where more than a quarter of the images looks otherwise; images without cells
    and a diameter that is given say nothing."""
    def hint(*widths, cells=5, **wanted):
        return infer.hint_at_one_diameter([{"diameter_px": w, "cells": cells} for w in widths],
                                          Config(**wanted))
    assert "diameter=21 overwrite=true" in hint(12.0, 33.0, 21.0, 20.0, 40.0)
    assert "12 to 40 px" in hint(12.0, 33.0, 21.0, 20.0, 40.0, diameter="auto")
    assert not hint(20.0, 21.0, 22.0, 24.0, 40.0)
    assert not hint(12.0, 33.0, 21.0, 40.0)
    assert not hint(12.0, 33.0, 21.0, 20.0, 40.0, diameter="12um")
    assert not hint(12.0, 33.0, 21.0, 20.0, 40.0, labels="given")
    assert not hint(12.0, 33.0, 21.0, 20.0, 40.0, cells=0)


def test_files_of_other_settings_are_not_taken_for_those_of_these(tmp_path, field):
    """A by-product of an earlier setting is made anew; the summary has the row of the labels; what
    stopped between two files is done again."""
    image, out = str(write(tmp_path / "a.tif", field, "ER")), tmp_path / "out"
    infer.main(Config(out=str(out), geojson=True, peak=0.9), [image])
    few = len(json.loads((out / "a.geojson").read_text())["features"])
    infer.main(Config(out=str(out), overwrite=True), [image])
    infer.main(Config(out=str(out), geojson=True), [image])
    count = images.read_labels(out / "a_labels.tif").max()
    assert len(json.loads((out / "a.geojson").read_text())["features"]) == count != few

    summary = (out / "summary.csv").read_text()
    (out / "summary.csv").write_text(summary.replace(f",{count},", f",{count + 1},"))
    infer.main(Config(out=str(out)), [image])
    assert (out / "summary.csv").read_text() == summary

    (out / "a_distance.tif").mkdir()
    with pytest.raises(OSError):
        infer.main(Config(out=str(out), overwrite=True, distance=True, peak=0.9), [image])
    (out / "a_distance.tif").rmdir()
    infer.main(Config(out=str(out)), [image])
    assert len(rows(out / "a_cells.csv")) == images.read_labels(out / "a_labels.tif").max() == count


def test_labels_that_are_of_no_plane_are_refused(tmp_path, field):
    """Of twelve planes the third is z03: labels of z3 would be passed over in silence."""
    stack = np.stack([field.pixels[field.channels.index("ER")][:64, :64]] * 12)
    tifffile.imwrite(tmp_path / "st.tif", stack, ome=True, metadata={"axes": "ZYX"})
    (tmp_path / "given").mkdir()
    labels = np.zeros((64, 64), np.int32)
    labels[10:40, 10:40] = 1
    config = Config(out=str(tmp_path / "out"), z="all", labels=str(tmp_path / "given"))
    for wrong in ("st_z3", "st_z13"):
        file = tmp_path / "given" / f"{wrong}_labels.tif"
        images.write_labels(file, labels)
        with pytest.raises(ValueError, match=f"{wrong}_labels.tif: is of no plane.*st_z01_labels"):
            infer.main(config, [str(tmp_path / "st.tif")])
        file.unlink()
    images.write_labels(tmp_path / "given" / "st_zoo_z1_labels.tif", labels)     # of another stack
    images.write_labels(tmp_path / "given" / "st_z03_labels.tif", labels)
    infer.main(config, [str(tmp_path / "st.tif")])
    with tifffile.TiffFile(tmp_path / "out" / "st_labels.tif") as tif:
        assert np.array_equal(tif.asarray()[2] > 0, labels > 0)


def test_a_second_run_on_a_movie_is_refused(tmp_path, field):
    """It would mix its frames with those of the first."""
    movie = np.stack([field.pixels[field.channels.index("ER")][:64, :64]] * 3)
    tifffile.imwrite(tmp_path / "mov.tif", movie, ome=True, metadata={"axes": "TYX"})
    config = Config(out=str(tmp_path / "out"), time="all")
    (tmp_path / "out/.mov_planes").mkdir(parents=True)
    (tmp_path / "out/.mov_planes/0_labels.tif").write_bytes(b"of other settings")
    with runs.locked(tmp_path / "out/.mov_planes"), pytest.raises(
            ValueError, match="mov.tif: another run is at work on it in out="):
        infer.main(config, [str(tmp_path / "mov.tif")])
    assert infer.main(config, [str(tmp_path / "mov.tif")]) == 0
    assert not (tmp_path / "out/.mov_planes").exists()
    labels = tmp_path / "out/mov_labels.tif"                     # its record lies at its front
    assert images.label_record(labels.read_bytes()[:-300])["source"]["file"].endswith("mov.tif")
    before = labels.stat().st_mtime_ns
    assert infer.main(config, [str(tmp_path / "mov.tif")]) == 0
    assert labels.stat().st_mtime_ns == before                   # kept
    assert len(list((tmp_path / "out/mov_ctc/01_RES").glob("mask*.tif"))) == 3


def test_a_picture_beside_stacks_does_not_make_them_frames(tmp_path, field):
    plane = field.pixels[field.channels.index("ER")][:64, :64]
    tifffile.imwrite(tmp_path / "b.tif", np.stack([plane] * 3), ome=True, metadata={"axes": "ZYX"})
    tifffile.imwrite(tmp_path / "a.tif", plane)
    found = infer.find_images([str(tmp_path)], Config(z="all"))
    assert sorted(found.values()) == ["a", "b"]


def test_colours_of_a_jpeg_do_not_make_cells_in_channels_that_are_dark(tmp_path, capsys):
    gray = imread(ROOT / "demo/nuclei_fluorescence.png")[:160, :160]
    blue = np.stack([0 * gray, 0 * gray, gray], -1)
    PIL.Image.fromarray(blue).save(tmp_path / "a.jpg", quality=75)
    with images.open_image(tmp_path / "a.jpg") as source:
        low, high = images.percentiles(source).T
    assert (low < high).tolist() == [False, False, True]
    infer.main(Config(out=str(tmp_path / "out"), diameter="20"), [str(tmp_path / "a.jpg")])
    assert "channels 1 and 2: hardly any contrast" in capsys.readouterr().err
    with pytest.raises(ValueError, match="chooses among the sizes of a slide, and here is one"):
        infer.main(Config(out=str(tmp_path / "o2"), pixel_size=0.5), [str(tmp_path / "a.jpg")])


def test_keys_of_stacks_are_refused_for_single_images():
    for key in ("spacing", "max_distance", "gap"):
        with pytest.raises(ValueError, match=f"{key}=2: goes with"):
            Config(**{key: 2})


def test_an_image_of_a_movie_keeps_nothing_of_the_movie(tmp_path, field):
    movie = np.stack([field.pixels[field.channels.index("ER")][:64, :64]] * 2)
    tifffile.imwrite(tmp_path / "m.tif", movie, ome=True, metadata={"axes": "TYX"})
    out, image = tmp_path / "out", [str(tmp_path / "m.tif")]
    infer.main(Config(out=str(out), time="all"), image)
    (out / "m_ctc/01_GT").mkdir()                                # of somebody else
    (out / "m_ctc/01_GT/man_track.txt").touch()
    infer.main(Config(out=str(out), time=1, overwrite=True), image)
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()) == [
        "m_cells.csv", "m_ctc/01_GT/man_track.txt", "m_labels.tif", "m_overlay.png", "summary.csv"]
    assert not (out / "m_ctc/01_RES").exists()


def test_given_cells_larger_than_a_block_and_in_parts_are_measured_whole(tmp_path):
    labels = np.zeros((700, 700), np.uint32)
    labels[50:650, 50:650], labels[5:15, 5:15], labels[680:690, 680:690] = 2_000_000_000, 7, 7
    pixels = np.random.default_rng(0).integers(0, 1000, labels.shape).astype(np.uint16)
    tifffile.imwrite(tmp_path / "big.tif", pixels)
    (tmp_path / "given").mkdir()
    tifffile.imwrite(tmp_path / "given/big_labels.tif", np.where(labels > 9, 9, labels))
    infer.main(Config(out=str(tmp_path / "out"), labels=str(tmp_path / "given"), geojson=True,
                      block=300, diameter="20"), [str(tmp_path / "big.tif")])
    table = {int(row["id"]): row for row in rows(tmp_path / "out/big_cells.csv")}
    assert {i: float(row["area_px"]) for i, row in table.items()} == {9: 360_000, 7: 200}
    assert float(table[9]["intensity_mean_1"]) == pytest.approx(pixels[labels > 9].mean())
    net = model.load(infer.model.find_weights("tiny")).ready("cpu")
    plan = segment.plan_for(pixels, net, block=300, diameter=20)
    blocks = [*segment.blocks_of(labels, pixels, plan._replace(embed=True))]
    met = [block.ids[block.new].tolist() for block in blocks]
    assert sorted(sum(met, [])) == [7, 2_000_000_000]
    whole, = segment.blocks_of(labels, pixels, plan._replace(embed=True, block=2048))
    for block in blocks:                                          # each cell has its own vector
        for number, vector in zip(block.ids[block.new], block.vectors, strict=True):
            np.testing.assert_allclose(vector, whole.vectors[[7, 2_000_000_000].index(number)],
                                       atol=1e-5)
    with pytest.raises(ValueError, match="label 7 reaches over 6.. px, .*used twice"):
        list(segment.blocks_of(labels, pixels, plan._replace(block=100)))


def test_min_area_counts_px_of_the_image(tmp_path, field):
    image = field.pixels[[field.channels.index("ER")]][:, ::3, ::3]
    net = model.load(infer.model.find_weights("tiny")).ready("cpu")
    everything = segment.segment(image, net, diameter=8)
    areas = np.bincount(everything.ravel())[1:]
    least = int(np.median(areas))
    kept = np.bincount(segment.segment(image, net, diameter=8, min_area=least).ravel())[1:]
    assert sorted(kept) == sorted(areas[areas >= least]) and len(kept) < len(areas)


def test_outlines_are_in_px_of_the_slide_and_on_their_plane(tmp_path):
    """Where QuPath expects them, whichever size the network saw."""
    y, x = np.mgrid[:256, :256]
    pixels = ((np.sin(x / 12) * np.sin(y / 12) > 0.4) * 200).astype(np.uint8)
    with tifffile.TiffWriter(tmp_path / "s.ome.tif") as tif:
        tif.write(pixels, subifds=1, tile=(64, 64))
        tif.write(pixels[::2, ::2], subfiletype=1, tile=(64, 64))
    tifffile.imwrite(tmp_path / "z.tif", np.stack([pixels] * 4), ome=True,
                     metadata={"axes": "ZYX"})
    ends = {}
    for name, keys in (("s.ome", {}), ("s.ome", {"level": 2}), ("z", {"plane": 3})):
        (tmp_path / "given").mkdir(exist_ok=True)
        small = pixels[::2, ::2] if keys.get("level") else pixels
        images.write_labels(tmp_path / f"given/{name}_labels.tif",
                            np.int32(images_label(small > 0)))
        infer.main(Config(out=str(tmp_path / "out"), labels=str(tmp_path / "given"), geojson=True,
                          overwrite=True, diameter="20", **keys), [str(tmp_path / f"{name}.tif")])
        features = json.loads((tmp_path / f"out/{name}.geojson").read_text())["features"]
        shapes = [feature["geometry"] for feature in features]
        assert {json.dumps(shape.get("plane")) for shape in shapes} == {
            '{"c": -1, "z": 2, "t": 0}' if "plane" in keys else "null"}
        ends[str(keys)] = np.max([np.max(shape["coordinates"][0], 0) for shape in shapes
                                  if shape["type"] == "Polygon"], 0)
    np.testing.assert_allclose(ends["{'level': 2}"], ends["{}"], atol=2)
    np.testing.assert_array_equal(ends["{'plane': 3}"], ends["{}"])


def images_label(mask):
    from scipy import ndimage
    return ndimage.label(mask)[0]


def test_keys_and_folders_that_would_mix_cells_are_refused(tmp_path, field, capsys):
    frame = field.pixels[field.channels.index("ER")][:64, :64]
    with pytest.raises(ValueError, match="slices would be dropped, not cells"):
        Config(z="all", border="drop")
    for name in ("two/A/z0", "two/A/z1", "two/B/z0", "gap/t_001", "gap/t_002", "gap/t_005"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(tmp_path / f"{name}.tif", frame)
    with pytest.raises(ValueError, match="images in 2 folders, such as .*A and .*B"):
        infer.main(Config(out=str(tmp_path / "o"), z="all"), [str(tmp_path / "two")])
    for t in range(2):                                           # a folder for each frame
        (tmp_path / f"each/t{t}").mkdir(parents=True)
        tifffile.imwrite(tmp_path / f"each/t{t}/img.tif", frame)
    infer.main(Config(out=str(tmp_path / "o"), time="all"), [str(tmp_path / "each")])
    infer.main(Config(out=str(tmp_path / "o"), time="all"), [str(tmp_path / "gap")])
    assert "have a gap after 2" in capsys.readouterr().err
    tifffile.imwrite(tmp_path / "c.tif", np.stack([frame] * 3), imagej=True,
                     metadata={"axes": "CYX"})
    infer.main(Config(out=str(tmp_path / "o"), z="all"), [str(tmp_path / "c.tif")])
    assert "c.tif: no axis Z (axes CYX), taken as one plane" in capsys.readouterr().err
    tifffile.imwrite(tmp_path / "n.tif", frame)
    infer.main(Config(out=str(tmp_path / "o")), [str(tmp_path / "n.tif")])
    before = (tmp_path / "o/n_labels.tif").read_bytes()
    with pytest.raises(ValueError, match="n_labels.tif would be replaced by the cells of this run"):
        infer.main(Config(out=str(tmp_path / "o"), within=str(tmp_path / "o"), overwrite=True,
                          peak=0.9), [str(tmp_path / "n.tif")])
    assert (tmp_path / "o/n_labels.tif").read_bytes() == before


def test_frames_that_are_stacks_take_the_plane_that_is_asked_for(tmp_path, field):
    frame = field.pixels[field.channels.index("ER")][:64, :64]
    for t in range(2):
        tifffile.imwrite(tmp_path / f"in_t{t}.tif", np.stack([frame * 0, frame, frame * 0]),
                         ome=True, metadata={"axes": "ZYX"})
    infer.main(Config(out=str(tmp_path / "o"), time="all", plane=2), [str(tmp_path)])
    table, = (tmp_path / "o").glob("*_tracks.csv")
    assert len(rows(table))


def test_channels_named_by_numbers_are_taken_by_their_places(tmp_path):
    pixels = np.arange(3 * 32 * 32, dtype=np.uint16).reshape(3, 32, 32)
    tifffile.imwrite(tmp_path / "n.ome.tif", pixels, metadata={
        "axes": "CYX", "Channel": {"Name": ["0", "1", "2"]}})
    with images.open_image(tmp_path / "n.ome.tif") as source:
        assert source.channels == ("0", "1", "2") and source.numbers == (1, 2, 3)
    for number in (1, 2, 3):
        with images.open_image(tmp_path / "n.ome.tif", number) as source:
            np.testing.assert_array_equal(source.whole().pixels[0], pixels[number - 1])
    with images.open_image(tmp_path / "n.ome.tif", "1") as source:              # its name
        np.testing.assert_array_equal(source.whole().pixels[0], pixels[1])


def test_a_link_that_leads_nowhere_stops_no_other_image(tmp_path, field, capsys):
    frame = field.pixels[field.channels.index("ER")][:64, :64]
    (tmp_path / "in").mkdir()
    for name in ("real", "other"):
        tifffile.imwrite(tmp_path / f"{name}.tif", frame)
    (tmp_path / "in/a.tif").symlink_to(tmp_path / "real.tif")
    infer.main(Config(out=str(tmp_path / "o")), [str(tmp_path / "in")])
    (tmp_path / "real.tif").unlink()
    (tmp_path / "other.tif").rename(tmp_path / "in/b.tif")
    with pytest.raises(ValueError, match="1 of 2 images could not be done"):
        infer.main(Config(out=str(tmp_path / "o")), [str(tmp_path / "in")])
    assert "in/a.tif: No such file" in capsys.readouterr().err
    assert (tmp_path / "o/b_labels.tif").exists()
