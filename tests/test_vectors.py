"""vectors.py and what hangs on it: pooling, files, linear heads, retrieval, types end to end."""
import dataclasses
import functools
import json

import numpy as np
import pytest
import tifffile
import torch
from conftest import write_geojson

import augment
import cells
import data
import evaluate
import images
import infer
import metrics
import model
import segment
import train_seg
import vectors


def tiny(types=()):
    """A network of random weights."""
    torch.manual_seed(0)
    net = model.DINOCell(model.ViT(32, 3, 2, 8, layerscale=1.0), (8, 8), 0,
                         model.Settings(tile=64), 1).eval()
    if types:
        net.set_types(torch.nn.Linear(32, len(types)), types)
    return net


def disks(side, centres, radius):
    y, x = np.mgrid[:side, :side]
    labels = np.zeros((side, side), np.int32)
    for i, (cy, cx) in enumerate(centres, 1):
        labels[(y - cy) ** 2 + (x - cx) ** 2 <= radius ** 2] = i
    return labels


# ------------------------------------------------------------------------------------------ pooling

@pytest.mark.smoke
def test_a_vector_is_the_mean_token_of_the_pixels():
    """Against loops over pixels."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, (2, 16, 24))
    tokens = torch.from_numpy(rng.normal(size=(2, 6, 5))).float()
    rows, place = vectors.pooled(tokens, torch.from_numpy(labels), 8)
    normal = vectors.even_vector_lengths(tokens).numpy()
    for row, (b, label) in zip(rows.numpy(), place.tolist()):
        own = [normal[b, y // 8 * 3 + x // 8] for y, x in zip(*np.nonzero(labels[b] == label))]
        np.testing.assert_allclose(row, np.mean(own, 0), atol=1e-5)
    assert len(rows) == 6


def test_tiles_give_the_vectors_of_one_pass():
    """With one tile, both ways of pooling agree."""
    net, labels = tiny(), disks(64, [(12, 12), (40, 30), (60, 60)], 9)
    pixels = np.random.default_rng(1).random((3, 64, 64)).astype(np.float32)
    ids, rows = segment.cell_vectors(pixels, labels, net, limits=segment.UNIT)
    with torch.inference_mode():
        _, tokens = net.with_tokens(torch.from_numpy(pixels)[None])
        expected, _ = vectors.pooled(tokens, torch.from_numpy(labels)[None], 8)
    assert ids.tolist() == [1, 2, 3]
    np.testing.assert_allclose(rows, expected, atol=2e-2)     # in bfloat16, some


@pytest.mark.parametrize("zoom", [1.0, 0.5, 2.0])
def test_vectors_do_not_depend_on_blocks(zoom):
    class Seen(torch.nn.Module):
        """Distances are the first channel, tokens its mean and that of the second."""
        size = types = None

        def __init__(self):
            super().__init__()
            self.settings = model.Settings(tile=64, peak=0.5, fill=0.1, diameter=16.0)
            self.backbone = torch.nn.Module()
            self.backbone.patch, self.backbone.dim = 8, 4
            self.mean = torch.zeros(())

        def autocast(self):
            return torch.autocast("cpu", enabled=False)

        def with_tokens(self, x):
            means = torch.nn.functional.avg_pool2d(x, 8).flatten(2).mT
            return x[:, :1], torch.cat((means, means[:, :, :1] ** 2), 2)

    labels = disks(160, [(20, 20), (60, 90), (120, 40), (118, 122), (70, 20)], 11)
    pixels = np.stack([(labels > 0) * 0.9, labels / 5, np.ones(labels.shape)])
    pixels += np.random.default_rng(0).random(pixels.shape) * 0.05
    found = {}
    for block in (2048, 64):
        plan = segment.plan_for(pixels, Seen(), limits=segment.UNIT, zoom=zoom, embed=True,
                                block=block, halo=32)
        parts = list(segment.blocks(segment.as_source(pixels), plan))
        whole = np.zeros(labels.shape, int)
        for part in parts:
            whole[part.core] = part.labels
        rows = {int(part.ids[n]): row for part in parts for n, row in zip(part.new, part.vectors)}
        found[block] = {int(labels[whole == i].max()): row for i, row in rows.items()}
    assert found[64].keys() == found[2048].keys() == {1, 2, 3, 4, 5}
    for i, row in found[64].items():
        np.testing.assert_allclose(row, found[2048][i], atol=0.02)


def test_outlines_stand_beside_vectors():
    """At the network's scale: a half as large image that is enlarged twice has the same."""
    y, x = np.mgrid[:200, :200]
    rod = (abs(y - 150) < 8) & (abs(x - 100) < 40)
    large = disks(200, [(60, 60), (60, 99)], 20) + 3 * rod
    rows = vectors.type_rows(np.ones((3, 4)), cells.cell_table(large, near=30), 1.0)
    assert rows.shape == (3, 4 + len(vectors.OUTLINE)) and (rows[:, :4] == 1).all()
    told = dict(zip(vectors.OUTLINE, rows[:, 4:].T))
    np.testing.assert_allclose(told["area_px"][:2], np.log(np.pi * 20 ** 2), atol=0.01)
    np.testing.assert_allclose(told["major_axis_px"][2], np.log(79 * 2 / 3 ** 0.5), atol=0.01)
    np.testing.assert_allclose(told["perimeter_px"][0], np.log(2 * np.pi * 20), atol=0.05)
    np.testing.assert_allclose(told["minor_axis_px"][2], np.log(15 * 2 / 3 ** 0.5), atol=0.01)
    for name, disc, bar in (("eccentricity", 0, 0.98), ("solidity", 1, 1), ("extent", np.pi / 4, 1),
                            ("circularity", 1, 4 * np.pi * 79 * 15 / 188 ** 2)):
        np.testing.assert_allclose(told[name][[0, 2]], (disc, bar), atol=0.1, err_msg=name)
    small = cells.cell_table(large[::2, ::2], near=15)
    again = dict(zip(vectors.OUTLINE, vectors.type_rows(np.ones((3, 4)), small, 2.0)[:, 4:].T))
    for name in vectors.OUTLINE:
        if name != "eccentricity":                            # of a disc it is all rounding
            np.testing.assert_allclose(again[name], told[name], atol=0.12, err_msg=name)


def test_an_outline_tells_a_type(tmp_path):
    """What no vector tells: large and small cells of one look; a file keeps the head, one of the
    version before reads vectors alone, one of another width is refused."""
    centres = [(y, x) for y in range(30, 240, 40) for x in range(30, 240, 40)]
    labels, large = disks(256, centres, 5), disks(256, centres, 9)
    labels = np.where(large > 18, large, labels)
    types = (np.arange(1, 37) > 18).astype(int)
    rows = vectors.type_rows(np.ones((36, 32)), cells.cell_table(labels), 1.0)
    net = tiny()
    net.set_types(vectors.linear_type_head(rows[::2], types[::2], 2), ("small", "large"))
    model.save(net, tmp_path / "new.pt")
    read = model.load(tmp_path / "new.pt")
    assert (read.type_probabilities(rows).argmax(1) == types).all()
    old = tiny(("small", "large"))
    model.save(old, tmp_path / "old.pt")
    np.testing.assert_array_equal(model.load(tmp_path / "old.pt").type_probabilities(rows),
                                  vectors.type_probabilities(old.types, rows[:, :32]))
    old.set_types(torch.nn.Linear(33, 2), ("small", "large"))
    model.save(old, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match="odd.pt.*33 numbers"):
        model.load(tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=r"rows of 32 numbers, expected 40.*type_rows"):
        read.type_probabilities(rows[:, :32])


def test_an_empty_image_has_no_vectors():
    ids, rows = segment.cell_vectors(np.zeros((3, 40, 40)), np.zeros((40, 40), int), tiny())
    assert ids.shape == (0,) and rows.shape == (0, 32)
    _, rows = segment.cell_vectors(np.zeros((3, 40, 40)), np.zeros((40, 40), int), tiny(), True)
    assert rows.shape == (0, 32 + len(vectors.OUTLINE))


# -------------------------------------------------------------------------------------------- files

def test_vectors_come_back_and_do_not_mix(tmp_path):
    rng = np.random.default_rng(0)
    for name, weights in (("a", "w1"), ("b", "w1"), ("c", "w2")):
        vectors.write_vectors(tmp_path / f"{name}.npz", vectors.CellVectors(
            np.arange(1, 4), rng.normal(size=(3, 8)).astype(np.float16), weights))
    both = vectors.read_vectors(tmp_path / "a.npz", tmp_path / "b.npz")
    assert both.vectors.shape == (6, 8) and both.weights == "w1"
    with pytest.raises(ValueError, match="c.npz: vectors of weights w2, but .*a.npz has those of"):
        vectors.read_vectors(tmp_path / "a.npz", tmp_path / "c.npz")
    vectors.write_vectors(tmp_path / "e.npz", both._replace(channels=("DNA", "ER")))
    assert vectors.read_vectors(tmp_path / "e.npz").channels == ("DNA", "ER")
    with pytest.raises(ValueError, match="e.npz: vectors of channels DNA, ER, but .* one of all"):
        vectors.read_vectors(tmp_path / "a.npz", tmp_path / "e.npz")
    (tmp_path / "d.npz").write_bytes(b"none")
    with pytest.raises(ValueError, match="d.npz: no vectors of cells"):
        vectors.read_vectors(tmp_path / "d.npz")


# -------------------------------------------------------------------------------------------- types

def test_the_linear_head_is_scikit_learns():
    """Multinomial logistic regression with balanced classes, of the same penalty."""
    linear = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    types = rng.choice(3, 120, p=(0.6, 0.3, 0.1))
    x = rng.normal(size=(120, 6)) + types[:, None] * rng.normal(size=6)
    head = vectors.linear_type_head(x, types, 3, penalty=0.1)
    z = (x - x.mean(0)) / x.std(0)
    theirs = linear.LogisticRegression(C=1 / (0.1 * 120), class_weight="balanced", tol=1e-8,
                                       max_iter=1000).fit(z, types)
    np.testing.assert_allclose(vectors.type_probabilities(head, x), theirs.predict_proba(z),
                               atol=2e-3)


def test_neighbours_and_retrieval_by_hand():
    known = np.array([[1.0, 0], [0.9, 0.1], [0, 1], [0.1, 0.9]])
    assert vectors.neighbour_types(known, np.array([0, 0, 1, 1]), np.array([[5.0, 0], [0, 2]]),
                                   k=2).tolist() == [0, 1]
    # a and b alike: each a finds the other a second, each b finds the other b first
    rows = np.array([[1, 0], [0, 1], [0.1, 1], [0, 1.0]])
    got = vectors.vector_retrieval_precision(rows, ["a", "b", "a", "b"])
    # row 0: order 2 1 3 -> 1; row 1: 3 -> 1; row 2: 1 3 0 -> 1/3; row 3: 1 -> 1
    assert got == pytest.approx((1 + 1 + 1 / 3 + 1) / 4)
    assert np.isnan(vectors.vector_retrieval_precision(rows, ["a", "b", "c", "d"]))


def reference_scores(true_xy, true_type, found_xy, found_type, types):
    """F_d and F_c, counted pair by pair from the published formula."""
    from scipy.optimize import linear_sum_assignment
    apart = np.linalg.norm(true_xy[:, None] - found_xy[None], axis=2)
    pairs = [(r, c) for r, c in zip(*linear_sum_assignment(apart)) if apart[r, c] <= 12]
    missed = [true_type[r] for r in range(len(true_xy)) if r not in {p[0] for p in pairs}]
    extra = [found_type[c] for c in range(len(found_xy)) if c not in {p[1] for p in pairs}]
    by_type = {}
    for t in types:
        counts = dict(tp=0, fp=0, fn=0)
        for r, c in pairs:
            if true_type[r] == t or found_type[c] == t:
                counts["tp"] += true_type[r] == t == found_type[c]
                counts["fp"] += true_type[r] != t
                counts["fn"] += found_type[c] != t
        by_type[t] = 2 * counts["tp"] / (2 * counts["tp"] + 2 * counts["fp"] + 2 * counts["fn"]
                                         + extra.count(t) + missed.count(t))
    return 2 * len(pairs) / (2 * len(pairs) + len(missed) + len(extra)), by_type


def test_f_d_and_f_c_are_the_published_formula():
    rng = np.random.default_rng(0)
    for _ in range(5):
        true_xy = rng.random((40, 2)) * 200
        found_xy = np.concatenate((true_xy[:30] + rng.normal(0, 4, (30, 2)),
                                   rng.random((12, 2)) * 200))
        true_type, found_type = rng.integers(1, 4, 40), rng.integers(1, 4, 42)
        pairs = metrics.match_centres(true_xy, found_xy)
        rows, cols = pairs.T
        got = metrics.type_scores(true_type[rows], found_type[cols],
                                  np.delete(true_type, rows), np.delete(found_type, cols),
                                  (1, 2, 3))
        expected = reference_scores(true_xy, true_type, found_xy, found_type, (1, 2, 3))
        assert got[0] == pytest.approx(expected[0])
        assert got[1] == pytest.approx(expected[1])


# ------------------------------------------------------------------------ classes of labelled sets

def labelled(folder, name, types, labels=None, seed=0):
    """An image of two kinds of disks, bright and dim, in NAME.png and NAME_masks.png."""
    folder.mkdir(exist_ok=True)
    labels = disks(64, [(14, 14), (14, 46), (46, 14), (46, 46)], 8) if labels is None else labels
    kinds = {i: types[(i - 1) % len(types)] for i in range(1, 5)}
    noise = np.random.default_rng(seed).random(labels.shape) * 30
    bright = np.array([0] + [200 if kinds[i] == 1 else 90 for i in range(1, 5)])
    cells.write_picture(folder / f"{name}.png", (bright[labels] + noise).astype(np.uint8))
    images.write_labels(folder / f"{name}_masks.tif", labels)
    return labels, kinds


def test_classes_from_every_layout(tmp_path):
    labels, _ = labelled(tmp_path / "s", "a", (1, 2))
    classes = np.array([0, 1, 2, 1, 2])[labels].astype(np.uint8)
    cells.write_picture(tmp_path / "s" / "a_types.png", classes)
    example, = data.examples(tmp_path / "s")
    assert example.types() == {1: "1", 2: "2", 3: "1", 4: "2"}
    (tmp_path / "s" / "a_types.csv").write_text("id,type\n1,round\n3,long\n4,\n")
    assert example.types() == {1: "round", 3: "long"}        # a table goes before a picture
    wanted = data.training_types({"R": "round", "L": ["long"]})
    assert data.training_type_numbers(example, labels, wanted).tolist() == [1, 0, 2, 0]
    (tmp_path / "s" / "a_types.csv").write_text("id,type\n9,round\n")
    with pytest.raises(ValueError, match="a type for cell 9, which is not in a_masks.tif"):
        example.types()
    (tmp_path / "s" / "a_types.csv").write_text("id,type\n2,long\n1,round\n2,round\n2,\n")
    with pytest.raises(ValueError, match="two types for cell 2; expected one"):
        example.types()

    (tmp_path / "g").mkdir()
    cells.write_picture(tmp_path / "g" / "a.png", np.zeros((64, 64), np.uint8))
    columns = {"id": np.arange(1, 5), "type": np.array(["x", "y", "x", "y"])}
    write_geojson(tmp_path / "g" / "a.geojson", labels, columns, names=("x", "y"))
    example, = data.examples(tmp_path / "g")
    assert example.types() == {1: "x", 2: "y", 3: "x", 4: "y"}

    (tmp_path / "c").mkdir()
    cells.write_picture(tmp_path / "c" / "a.png", np.zeros((64, 64), np.uint8))
    square = [[1, 1, 9, 1, 9, 9, 1, 9]]
    (tmp_path / "c" / "set.json").write_text(json.dumps({
        "images": [{"id": 1, "file_name": "a.png"}],
        "categories": [{"id": 5, "name": "tumour"}],
        "annotations": [{"image_id": 1, "segmentation": square, "category_id": 5.0}]}))
    example, = data.examples(tmp_path / "c")
    assert example.types() == {1: "tumour"}


def test_classes_are_converted_with_their_cells(tmp_path, capsys):
    """A table of other labels is left out with a word, one that is wrong ends the conversion."""
    source, out = tmp_path / "in", tmp_path / "out"
    for seed, (name, end, table) in enumerate((("a", "types", "id,type\n3,round\n1,long\n"),
                                               ("b", "cells", "id,type\n9,round\n"))):
        labelled(source, name, (1, 2), seed=seed)
        (source / f"{name}_{end}.csv").write_text(table)
    assert data.check(data.Config(), str(source)) == 0
    assert data.main(data.Config(), ["convert", str(source), str(out)]) == 0
    assert "b: without classes of cells; " in capsys.readouterr().err
    assert (out / "a_types.csv").read_text() == "id,type\n1,long\n3,round\n"
    assert [example.types() for example in data.examples(out)] == [{1: "long", 3: "round"}, {}]

    (source / "a_types.csv").write_text("id,type\n9,round\n")
    assert data.check(data.Config(), str(source)) == 1
    assert "2 images, 8 cells: 1 problems" in capsys.readouterr().out
    with pytest.raises(ValueError, match="a type for cell 9, which is not in a_masks.tif"):
        data.main(data.Config(), ["convert", str(source), str(tmp_path / "new")])
    assert not (tmp_path / "new" / "a.tif").exists()              # it would stand for the classes


def test_classes_that_lie_beside_the_cells(tmp_path):
    labels, _ = labelled(tmp_path, "a", (1, 2))
    cells.write_picture(tmp_path / "a_types.png", (labels == 0).astype(np.uint8))
    example, = data.examples(tmp_path)
    with pytest.raises(ValueError, match="a_types.png: classes where there is no cell"):
        example.types()


def config_of(tmp_path, **more):
    return train_seg.Config(
        experiment="t", output_base_dir=str(tmp_path), crop=32, batch=2, steps=4, warmup=1,
        val_every=4, log_every=2, device="cpu", precision="float32",
        network=train_seg.NetworkShape(dim=16, depth=3, heads=2, widths=(8, 8), last=0),
        data=data.TrainingData(root=str(tmp_path), sets=(data.TrainingSet("s"),), share=0.5,
                               **more))


@pytest.mark.parametrize(("types", "words"), [
    ({"a": 1, "b": 3}, "no cell is 'b'"), ({"a": 1, "b": 2}, "all cells of 'b' are in s/two"),
    ({"a": 1}, "1 alone; expected two types or more"), ({"a": 1, "b": 1}, "'1' is listed twice")])
def test_types_that_cannot_be_learnt(tmp_path, types, words):
    for name, given in (("one", (1, 1)), ("two", (1, 2)), ("three", (1, 1))):
        labels, kinds = labelled(tmp_path / "s", name, given)
        number = np.array([0, *kinds.values()])[labels].astype(np.uint8)
        cells.write_picture(tmp_path / "s" / f"{name}_types.png", number)
    with pytest.raises(ValueError, match=words):
        augment.load_resident(config_of(tmp_path, types=types).data, 0, "cpu", 4.0)


def test_types_from_training_to_files(tmp_path, capsys):
    """Trained with types for a few steps, inferred: CSV, GeoJSON, overlay and vectors agree."""
    for seed, name in enumerate(("one", "two", "four")):
        down = disks(64, [(y + seed, x) for y in (14, 46) for x in (14, 46)], 8)
        labels, kinds = labelled(tmp_path / "s", name, (1, 2), down, seed=seed)
        number = np.array([0, *kinds.values()])[labels].astype(np.uint8)
        cells.write_picture(tmp_path / "s" / f"{name}_types.png", number)
    config = config_of(tmp_path, types={"bright": 1, "dim": "2"},
                       validation=(data.TrainingSet("s", match="four"),))
    config = dataclasses.replace(config, data=dataclasses.replace(
        config.data, sets=(data.TrainingSet("s", match="one|two"),)))
    assert train_seg.main(config, []) == 0
    assert "types" in capsys.readouterr().out                # a score of the validation
    path = tmp_path / "final_models" / "t.pt"
    net = model.load(path)
    assert net.type_names == ("bright", "dim")

    image, out = tmp_path / "s" / "one.png", tmp_path / "out"
    infer.main(infer.Config(out=str(out), weights=str(path), embed=True, geojson=True, peak=0.01,
                            fill=0.01, depth=0.0, device="cpu"), [str(image)])
    lines = (out / "one_cells.csv").read_text().splitlines()
    header = lines[0].split(",")
    assert header[-2:] == ["type", "type_probability"] and len(lines) > 1
    table = vectors.read_vectors(out / "one_cells.npz")
    labels = images.read_labels(out / "one_labels.tif")
    plan = segment.plan_for(images.read_image(image).pixels, net)
    share = net.type_probabilities(vectors.type_rows(
        table.vectors, cells.cell_table(labels, near=plan.near), plan.zoom))
    rows = [line.split(",") for line in lines[1:]]
    assert [row[-2] for row in rows] == [net.type_names[i] for i in share.argmax(1)]
    np.testing.assert_allclose([float(row[-1]) for row in rows], share.max(1), atol=2e-3)
    features = json.loads((out / "one.geojson").read_text())["features"]
    assert [f["properties"]["classification"]["name"] for f in features] == [r[-2] for r in rows]
    assert all(len(f["properties"]["classification"]["color"]) == 3 for f in features)

    infer.main(infer.Config(out=str(tmp_path / "near"), weights=str(path), peak=0.01, fill=0.01,
                            depth=0.0, near=40.0, device="cpu"), [str(image)])
    near = [line.split(",") for line in
            (tmp_path / "near" / "one_cells.csv").read_text().splitlines()[1:]]
    assert [row[-2:] for row in near] == [row[-2:] for row in rows]   # who is near tells no type

    # further training without types: the head would read tokens that it does not know
    plain = dataclasses.replace(config.data, types={})
    for name, few in (("plain", False), ("few", True)):
        assert train_seg.main(dataclasses.replace(config, experiment=name, init=str(path), few=few,
                                                  export_path=None, data=plain), []) == 0
        told = model.load(tmp_path / "final_models" / f"{name}.pt").type_names
        assert told == (("bright", "dim") if few else ())
        assert ("the new weights will not" in capsys.readouterr().err) is not few


def test_pasted_and_unknown_cells_do_not_count():
    """Types of places in crops: of the own image, 0 where pasted in."""
    import augment
    labels = disks(64, [(14, 14), (46, 46)], 8)
    image = data.Labelled("a", np.random.default_rng(0).random((3, 64, 64)), labels)
    resident = augment.Resident(image._replace(types=np.array(types))
                                for types in ([2, 1], [0, 2]))
    place = torch.tensor([[0, 1], [0, 2], [0, 3], [1, 1], [1, 2]])
    assert augment.crop_cell_types(resident, np.array([0, 1]), place).tolist() == [2, 1, 0, 0, 2]
    assert train_seg.type_balance(resident.types, 2).tolist() == pytest.approx([0, 1.5, 0.75])


def test_colours_of_types_in_the_overlay():
    """Cells of a type have its colour on their rim; the legend lies below the picture."""
    labels = disks(1200, [(300, 300), (900, 900)], 80)       # large: not enlarged
    picture = cells.overlay(np.zeros((1, 1200, 1200), np.uint8), labels,
                            types={1: "b", 2: "a"}, names=("a", "b"))
    colours = cells.cell_type_colours(("a", "b"))
    assert picture.shape[1] == 1200 < picture.shape[0]
    assert tuple(picture[300, 380]) == colours["b"] and tuple(picture[900, 980]) == colours["a"]
    assert picture[1200:].any()
    for far in (40, 10 ** 7):                                # ids with gaps
        assert (cells.overlay(np.zeros((1, 1200, 1200), np.uint8),
                              np.where(labels == 2, far, labels),
                              types={1: "b", far: "a"}, names=("a", "b")) == picture).all()


# ------------------------------------------------------------------------------ nuclei within cells

@pytest.mark.smoke
def test_nuclei_in_cells_by_hand():
    """One cell with two nuclei, one with none, a nucleus half outside, one on the background."""
    large, small = np.zeros((2, 10, 12), int)
    large[0:4, 0:6], large[6:10, 0:4] = 5, 9
    small[1, 1], small[2, 3:5] = 1, 2
    small[3:6, 5] = 3                                        # 1 px in cell 5, 2 outside
    small[8, 10] = 4
    small[2:5, 2] = 6                                        # 2 px in cell 5, 1 outside
    nesting = cells.Nesting()
    nesting.add(small[:5], large[:5])
    nesting.add(small[5:], large[5:])
    owner, table = nesting.tables()
    assert owner == {1: 5, 2: 5, 3: 0, 4: 0, 6: 5}
    assert {name: values.tolist() for name, values in table.items()} == {
        "id": [5, 9], "area_px": [24, 16], "nuclei": [3, 0], "nuclei_area_px": [6, 0],
        "nuclei_share": [5 / 24, 0], "nuclei_ids": ["1 2 6", ""]}


@pytest.mark.parametrize("block", [2048, 64])
def test_within_from_files(tmp_path, block):
    """What infer finds, in one large cell that covers the left half."""
    pixels = (disks(160, [(30, 30), (30, 120), (90, 40), (130, 120)], 10) > 0) * 200
    cells.write_picture(tmp_path / "a.png", pixels.astype(np.uint8))
    large = np.zeros((160, 160), np.uint16)
    large[:, :80], large[140:150, 150:] = 7, 8
    images.write_labels(tmp_path / "cells.tif", large)
    out = tmp_path / "out"
    config = infer.Config(out=str(out), weights="demo_synthetic", block=block, device="cpu",
                          within=str(tmp_path / "cells.tif"))
    infer.main(config, [str(tmp_path / "a.png")])
    labels = images.read_labels(out / "a_labels.tif")
    lines = [line.split(",") for line in (out / "a_cells.csv").read_text().splitlines()]
    assert lines[0][-1] == "within"
    for line in lines[1:]:
        inside = (large[labels == int(line[0])] == 7).mean()
        assert int(line[-1]) == (7 if inside > 0.5 else 0)
    rows = (out / "a_within.csv").read_text().splitlines()
    assert rows[0] == "id,area_px,nuclei,nuclei_area_px,nuclei_share,nuclei_ids"
    assert [row.split(",")[0] for row in rows[1:]] == ["7", "8"]
    again = dataclasses.replace(config, overwrite=True)
    with pytest.raises(ValueError, match="is the image itself; expected labels"):
        infer.main(dataclasses.replace(again, within=str(tmp_path / "a.png")),
                   [str(tmp_path / "a.png")])
    for wrong in (large.astype(np.int16) - 1, large.astype(np.uint64) << 32):
        tifffile.imwrite(tmp_path / "cells.tif", wrong)
        with pytest.raises(ValueError, match="cells.tif: labels from .* expected 0 to 4294967295"):
            infer.main(again, [str(tmp_path / "a.png")])
    images.write_labels(tmp_path / "cells.tif", large[:100])
    with pytest.raises(ValueError, match=r"cells.tif: uint16.*expected labels of 1 channel and"):
        infer.main(dataclasses.replace(config, overwrite=True), [str(tmp_path / "a.png")])
    with pytest.raises(FileNotFoundError, match="no .*a_labels.tif; expected a label image"):
        infer.main(dataclasses.replace(config, overwrite=True, within=str(tmp_path)),
                   [str(tmp_path / "a.png")])


# ---------------------------------------------------------------------------- evaluate.py embed

def embed_config(tmp_path, **more):
    model.save(tiny(), tmp_path / "n.pt")
    typed = evaluate.TypedSet("s", (data.TrainingSet("s", match="one|two"),),
                              (data.TrainingSet("s", match="three"),), {"bright": 1, "dim": 2})
    sources = (evaluate.VectorSource("pixels", "pixels"), evaluate.VectorSource("random", "random"),
               evaluate.VectorSource("n", str(tmp_path / "n.pt")))
    return evaluate.Embed(**{"sources": sources, "sets": (typed,), "root": str(tmp_path),
                             "output_base_dir": str(tmp_path), "device": "cpu",
                             "finder": str(tmp_path / "n.pt"), **more})


def test_found_cells_teach_their_types_and_false_ones_none():
    """And what is told to be none counts no more."""
    types, rng = np.array([1, 2, 1, 2, 0]), np.random.default_rng(0)
    told = np.append(types, [3] * 5)                              # five more, far from any cell
    centres = np.stack([np.arange(10) * 50.0, rng.random(10)], 1)
    rows = np.eye(4)[told]
    seen = [evaluate.SeenCells(types, centres[:5], rows[:5], centres, rows)] * 2
    known, numbers = evaluate.embed_known_type_rows(seen)
    found, every = evaluate.embed_found_type_rows(seen, 5.0, 3)
    assert numbers.tolist() == [1, 2, 1, 2] * 2 and every.tolist() == ([1, 2, 1, 2] + [3] * 5) * 2
    np.testing.assert_array_equal(found, np.eye(4)[every])
    sure = [evaluate.SeenCells(types[:4], centres[:4], rows[:4], *(
        np.delete(each, 4, 0) for each in (centres, rows)))] * 2
    for count, detection in ((2, 2 * 8 / (2 * 8 + 10)), (3, 1.0)):
        some = every <= count
        head = vectors.linear_type_head(np.concatenate((known, found[some])),
                                        np.concatenate((numbers, every[some])) - 1, count)
        tell = functools.partial(vectors.type_probabilities, head)
        assert evaluate.embed_found_types(sure, tell, ("a", "b"), 5.0)["F_d"] == detection


def test_what_vectors_are_worth(tmp_path, capsys):
    """Bright and dim disks are told apart by pixels and tokens; the head is exported and read."""
    for seed, name in enumerate(("one", "two", "three")):
        labels, kinds = labelled(tmp_path / "s", name, (1, 2), seed=seed)
        number = np.array([0, *kinds.values()])[labels].astype(np.uint8)
        cells.write_picture(tmp_path / "s" / f"{name}_types.png", number)
    evaluate.embed(embed_config(tmp_path))
    table = (tmp_path / "runs" / "embed" / "embed.tsv").read_text().splitlines()
    rows = [dict(zip(table[0].split("\t"), line.split("\t"))) for line in table[1:]]
    assert [row["source"] for row in rows] == ["pixels", "random", "n"]
    assert all(float(row["linear_accuracy"]) == 1 == float(row["knn_accuracy"])
               for row in rows)
    assert 0 <= float(rows[2]["F_d"]) <= 1

    one = embed_config(tmp_path)
    with pytest.raises(ValueError, match="pixels are no weights"):
        dataclasses.replace(one, sources=one.sources[:1], export="x.pt")
    evaluate.embed(dataclasses.replace(one, sources=one.sources[2:],
                                       export=str(tmp_path / "typed.pt")))
    assert model.load(tmp_path / "typed.pt").type_names[:2] == ("bright", "dim")
    assert "diameter=" not in capsys.readouterr().out           # n.pt knows no size
    sized = tiny()
    sized.settings = dataclasses.replace(sized.settings, diameter=20.0)
    model.save(sized, tmp_path / "sized.pt")
    evaluate.embed(dataclasses.replace(
        one, sources=(evaluate.VectorSource("sized", str(tmp_path / "sized.pt")),),
        export=str(tmp_path / "typed.pt")))
    assert "infer.py wants diameter=15.8 with it" in capsys.readouterr().out    # of the disks
    with pytest.raises(ValueError, match="expected one source and one set"):
        dataclasses.replace(one, export="x.pt")
    with pytest.raises(ValueError, match="two sets are called"):
        dataclasses.replace(one, sets=one.sets * 2)
    taken = dataclasses.replace(one.sets[0], types={"none": 1, "dim": 2})
    with pytest.raises(ValueError, match="a type is called none"):
        dataclasses.replace(one, sets=(taken,))
    with pytest.raises(ValueError, match="images of train are in test as well; keep them apart"):
        evaluate.embed(dataclasses.replace(one, sets=(
            dataclasses.replace(one.sets[0], test=one.sets[0].train),)))
    lost = dataclasses.replace(one.sets[0], types={"bright": 1, "dim": 7})
    with pytest.raises(ValueError, match=r"no cell is 'dim' \(7\) in"):
        evaluate.embed(dataclasses.replace(one, sets=(lost,)))


def test_fields_across_channels_and_wells(tmp_path, capsys):
    """Two channels that show the same: each field finds itself; two wells of two fields each."""
    folder = tmp_path / "f"
    folder.mkdir()
    for i in range(4):
        labels = disks(64, [(14, 14 + 4 * i), (40, 30), (50, 50 - 6 * i)], 7 + i)
        pixels = (labels > 0) * (60 + 40 * (i // 2)) + np.random.default_rng(i).random(
            labels.shape) * 20
        images.write_image(folder / f"f{i}.tif", images.Image(
            np.stack([pixels, pixels + 1]).astype(np.uint8), None, None))
    (tmp_path / "wells.csv").write_text("image,well\n" + "".join(
        f"f{i},{'AB'[i // 2]}\n" for i in range(4)))
    config = embed_config(tmp_path, sets=(), fields=str(folder), size=64,
                          wells=str(tmp_path / "wells.csv"),
                          sources=(evaluate.VectorSource("pixels", "pixels"),))
    net = model.load(tmp_path / "n.pt")
    net.settings = dataclasses.replace(net.settings, peak=0.01, fill=0.01)
    model.save(net, tmp_path / "n.pt")
    evaluate.embed(config)
    header, line = (tmp_path / "runs" / "embed" / "fields.tsv").read_text().splitlines()
    row = dict(zip(header.split("\t"), line.split("\t")))
    assert float(row["retrieval"]) == 1 and int(row["fields"]) == 4
    assert 0 < float(row["replicates"]) <= 1
    (tmp_path / "wells.csv").write_text("image,well\nf0,A\n")
    with pytest.raises(ValueError, match="no row for f1"):
        evaluate.embed(config)
    net.settings = dataclasses.replace(net.settings, peak=0.999)
    model.save(net, tmp_path / "n.pt")
    with pytest.raises(ValueError, match="cells were found in 0 fields, expected two or more"):
        evaluate.embed(config)
