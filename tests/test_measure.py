"""measure.py: which images, labels and rows belong together, by hand; numbers by closed forms."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_evaluate import a_set, discs, eroded, peer, trained, weights

import cells
import data
import measure
import metrics
import model
import runs
import segment
import watershed


def dataset(root, **config):
    return measure.LabelledSet(runs.from_dict(measure.DataSet, config, "x"), root)


def fails(message, **config):
    with pytest.raises(ValueError, match=message):
        dataset(**config)


# ---------------------------------------------------------------------------------- images of a set

@pytest.mark.smoke
def test_groups_of_a_manifest(tmp_path):
    """Rows are found by folder and name; the same stem in another folder is another image."""
    a_set(tmp_path / "here", range(3))
    (tmp_path / "m.tsv").write_text("\n".join((
        "image\tline", "there/0.tif\tB", "here/0.tif\tA", "here/1.tif\tA", "here/2.tif\tB",
        "there/2.tif\tA")))
    here = dict(root=tmp_path, name="s", path="here")
    assert dataset(**here, manifest="m.tsv", group="line").groups == {"0": "A", "1": "A", "2": "B"}
    assert dataset(**here, group=r"\d$").groups == {"0": "0", "1": "1", "2": "2"}
    assert dataset(**here, group="(1)?").groups == {"1": "1"}         # the others have none
    with open(tmp_path / "m.tsv", "a") as file:                       # more of its path tells more
        file.write(f"\n{tmp_path.name}/here/0.tif\tC")
    assert dataset(**here, manifest="m.tsv", group="line").groups["0"] == "C"
    fails("m.tsv: no columns 'plate', expected one; columns are image, line", **here,
          manifest="m.tsv", group="plate")
    fails("not a regular expression", **here, group="(")
    fails("fits none of its 3 images", **here, group="donor")


@pytest.mark.parametrize("suffix", ["", ".tif"])
def test_rows_of_a_manifest_belong_to_whole_names(tmp_path, suffix):
    """Without their suffix, too, as data.py split writes them; 1/img is not the end of 11/img."""
    folders = ("1", "11", "21")
    for folder in folders:
        a_set(tmp_path / "s" / folder, range(2))
    (tmp_path / "m.tsv").write_text("\n".join(["name\tdonor", *(
        f"{folder}/{n}{suffix}\tP{folder}" for folder in folders for n in range(2))]))
    groups = dataset(tmp_path, name="s", path="s", manifest="m.tsv", group="donor").groups
    assert groups == {f"{folder}_{n}": f"P{folder}" for folder in folders for n in range(2)}
    (tmp_path / "m.tsv").write_text("name\tdonor\nx/0\tA\ny/0\tB\n")
    fails(r"2 rows may be that of 1/0 \(x/0, y/0\) and differ in 'donor'", root=tmp_path, name="s",
          path="s",
          manifest="m.tsv", group="donor")
    (tmp_path / "m.tsv").write_text("name\tdonor\nx/0\tA\ny/0\tA\n")  # alike: no matter
    assert dataset(tmp_path, name="s", path="s", manifest="m.tsv",
                   group="donor").groups["11_0"] == "A"


def test_where_leaves_images_out(tmp_path):
    """Only images whose row fits are there; one without a row cannot be decided."""
    a_set(tmp_path / "here", range(4))
    truths = ("human (edges)", "model", "published masks", "model")
    lines = ["image,gt", *(f"here/{number}.tif,{truth}" for number, truth in enumerate(truths))]
    (tmp_path / "m.csv").write_text("\n".join(lines))
    here = dict(root=tmp_path, name="s", path="here", manifest="m.csv")

    def names(**more):
        return [example.name for example in dataset(**here, **more).examples]
    assert names(where="gt=^human|^published") == ["0", "2"]
    assert names(where="gt=model", limit=1) == ["1"]
    fails(r"no image with gt=auto; it has human \(edges\), model, published masks", **here,
          where="gt=auto")
    fails("no columns 'truth', expected one; columns are image, gt", **here, where="truth=human")
    fails("expected COLUMN=REGEX", **here, where="gt")
    fails("not a regular expression", **here, where="gt=(")
    fails("limit is 0, expected a whole number, 1 or more", **here, where="gt=model", limit=0)
    (tmp_path / "m.csv").write_text("\n".join(lines[:-1]))
    fails("m.csv: no row for 3 of set 's'", **here, where="gt=human")
    (tmp_path / "m.csv").write_bytes(b"\xff\xfe\x00image")
    fails("m.csv: not a table of text", **here, where="gt=human")


@pytest.mark.smoke
def test_names_from_data_reach_no_other_folder():
    for name in ("../x", "/etc/x", "a/b", ".hidden", "a\\b", "..", ""):
        safe = measure.bench_image_name(name)
        assert safe and "/" not in safe and "\\" not in safe and not safe.startswith(".")
    assert measure.bench_image_name("A172_Phase-3.t+1 µ") == "A172_Phase-3.t+1_µ"


# ------------------------------------------------------------------------------------ sources, rows

def test_peers_of_nested_sets(tmp_path):
    """By their folders, or by names alone where these are not ambiguous."""
    for sub, seeds in (("p", (0, 1)), ("q", (1, 2))):
        a_set(tmp_path / "set" / sub, seeds)
    nested = dataset(tmp_path, name="s", path="set")
    assert [example.name for example in nested.examples] == ["p/0", "p/1", "q/1", "q/2"]
    for name in ("p/0", "q/1", "2", "1"):                             # 1 could be either
        path = tmp_path / "peer" / f"{name}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        data.write_labels(path, np.ones((64, 64), np.uint8))
    files = measure.PeerLabels(tmp_path / "peer", nested).files
    found = {name: path.relative_to(tmp_path / "peer").as_posix() for name, path in files.items()}
    assert found == {"p_0": "p/0.tif", "q_1": "q/1.tif", "q_2": "2.tif"}


def test_predictions_are_those_of_segment(tmp_path):
    """With all six thresholds, and a scale on top of the set's diameter."""
    folder, path = a_set(tmp_path / "set", range(2)), weights(tmp_path / "net.pt")
    wanted = dict(peak=0.55, fill=0.2, depth=0.05, smooth=0.7, shape=0.05, min_area=5, tile=32)
    row, = measure.rows_of(measure.Model("net", str(path), scale=0.8, **wanted),
                           [discs_ := dataset(tmp_path, name="discs", path="set", diameter=8)],
                           "cpu", None)
    measure.measure_row(row, discs_, tmp_path, False)
    for example in data.examples(folder):
        expected = segment.segment(example.image().pixels, model.load(path).ready("cpu"),
                                   zoom=0.8 * 10 / 8, **wanted)
        assert expected.max() > 1
        found = data.read_labels(tmp_path / f"net/discs/{example.name}_pred.tif")
        np.testing.assert_array_equal(found, expected)


def test_a_scale_is_on_top_of_what_the_size_head_sees(tmp_path):
    """A head that sees every cell twice as wide as the network knows it: half the size."""
    folder, path = a_set(tmp_path / "set", range(1)), weights(tmp_path / "net.pt")
    net = model.load(path)
    net.add_size_head()
    with torch.no_grad():
        net.size.fc2.weight.zero_()
        net.size.fc2.bias.copy_(torch.tensor([np.log(2), 0.0]))
    model.save(net, path)
    net, example, discs_ = net.ready("cpu"), data.examples(folder)[0], dataset(
        tmp_path, name="discs", path="set")
    item, = discs_.items("x")
    for scale in (1.0, 1.6):
        expected = segment.segment(example.image().pixels, net, zoom=0.5 * scale)
        found, _ = measure.NetworkLabels(path, "cpu", scale=scale).labels(item, discs_)
        assert expected.max() > 1
        np.testing.assert_array_equal(found, expected)


def test_rows_of_seeds_and_of_numbers_of_images(tmp_path):
    """Files that fit a pattern are the seeds of a row; by numbers of images, of several."""
    a_set(tmp_path / "set", range(2))
    sets = [dataset(tmp_path, name="discs", path="set")]
    for name, images in (("a_2_0", 2), ("a_2_1", 2), ("a_10_0", 10)):
        trained(weights(tmp_path / f"{name}.pt"), images)

    def rows(pattern, **more):
        found = measure.rows_of(measure.Model("a", str(tmp_path / pattern), **more), sets, "cpu",
                                None)
        return [(row.name, row.images, row.curve,
                 [s.path.stem for s in row.sources.get("discs", ())]) for row in found]
    assert rows("a_2_*.pt") == [("a", 2, "", ["a_2_0", "a_2_1"])]
    assert rows("a_*.pt") == [("a_2", 2, "a", ["a_2_0", "a_2_1"]), ("a_10", 10, "a", ["a_10_0"])]
    assert rows("a_10_0.pt") == [("a", 10, "", ["a_10_0"])]
    assert rows("b_*.pt", optional=True) == [("a", 0, "", [])]
    with pytest.raises(ValueError, match="a_10_0.pt: with thresholds .* expected 0 <= fill <= pea"):
        rows("a_10_0.pt", peak=0.01)
    with pytest.raises(FileNotFoundError, match="no weights fit .*b_.*, of model 'a'"):
        rows("b_*.pt")
    a_set(tmp_path / "more", range(2))
    sets = [dataset(tmp_path, name="more", path="more"), *sets]      # a peer that has one of two
    (tmp_path / "peer/discs").mkdir(parents=True)
    for example in data.examples(tmp_path / "set"):
        data.write_labels(tmp_path / f"peer/discs/{example.name}.tif", example.labels())
    other = measure.Model("p", labels=str(tmp_path / "peer"), optional=True)
    assert [*measure.rows_of(other, sets, "cpu", None)[0].sources] == ["discs"]


@pytest.mark.smoke
def test_the_mean_of_seeds():
    """Scores are means over seeds; groups and curves count what every seed made of an image."""
    truth = discs(0)[1]
    tables = [metrics.overlap(truth, truth), metrics.overlap(truth, 0 * truth)]
    seeds = [measure.Result(f"s{i}", "", None, ["x"], [table], metrics.set_scores([table]), [], 1.0)
             for i, table in enumerate(tables)]
    result = measure.bench_mean_of_seeds("s", seeds)
    assert result.scores.mean["AP@0.5"] == 0.5
    assert result.runs == tuple(seeds) and result.note == "2 seeds"
    shares = [y for _, y in measure.bench_scores_by_size({"s": result})["s"]]
    assert np.mean(shares) == pytest.approx(0.5)


# ------------------------------------------------------------------------------- thresholds, gating

@pytest.mark.smoke
def test_thresholds_are_every_pair_that_can_be():
    grid = measure.Encoding(peak=(0.4, 0.9), fill=(0.1, 0.5), depth=(0.0, 0.1))
    found = measure.bench_threshold_grid(grid)
    pairs = [(one["peak"], one["fill"]) for one in found[::2]]
    assert pairs == [(0.4, 0.1), (0.9, 0.1), (0.9, 0.5)]
    assert list(found[0]) == ["peak", "fill", "depth", "smooth", "shape",
                              "min_area"] and len(found) == 6
    with pytest.raises(ValueError, match="no pair with fill <= peak"):
        measure.Encoding(peak=(0.1,), fill=(0.2,))
    weights_ = watershed.Setting(peak=0.5, fill=0.3)               # which null stands for
    grid = SimpleNamespace(peak=(0.05, None), fill=(None, 0.02), depth=(None,), smooth=(None,),
                           shape=(None,), min_area=(None,))
    found = measure.bench_threshold_grid(grid, stored=weights_)
    assert [(one["peak"], one["fill"]) for one in found] == [(0.05, 0.02), (None, None),
                                                             (None, 0.02)]
    with pytest.raises(ValueError, match="depth: expected one value or more"):
        measure.Encoding(depth=())


def test_the_encoding_knows_all_thresholds(tmp_path):
    """Rows are true labels encoded and decoded by hand, best first."""
    folder = a_set(tmp_path / "set", range(3))
    grid = measure.Encoding((None, 3.0), (0.4,), (0.1,), (0.0, 0.1), (0.0, 1.0), (0.05,), (0, 40))
    rows = measure.bench_encoding_rows(dataset(tmp_path, name="discs", path="set"), grid, tmp_path)
    assert len(rows) == 16 and [row["DSB"] for row in rows] == sorted((row["DSB"] for row in rows),
                                                                      reverse=True)
    assert rows[0]["DSB"] > rows[-1]["DSB"]
    for row in (rows[0], rows[7], rows[-1]):
        setting = watershed.Setting(**{name: row[name] for name in watershed.Setting._fields})
        tables = [metrics.overlap(e.labels(), watershed.flood(watershed.distance_map(e.labels(),
                                                                                     row["cap"]),
                                                                                     setting))
                  for e in data.examples(folder)]
        assert row["AP@0.9"] == pytest.approx(metrics.set_scores(tables).mean["AP@0.9"])


@pytest.mark.parametrize("window,border", [((10, 80), "keep"), ((10, 80), "drop"),
                                           ((0, 100), "both")])
def test_gating_removes_exactly_what_it_says(tmp_path, window, border):
    """The scores after the cells have been erased from the label images, cell by cell."""
    folder = a_set(tmp_path / "set", range(4))
    peer(tmp_path / "peer", folder, eroded)
    for file in (tmp_path / "peer").iterdir():
        file.rename(file.with_name(f"{file.stem}_pred.tif"))
    items = list(dataset(tmp_path, name="discs", path="set").items("test"))
    result, removed = measure.gated_scores([measure.read_prediction(item, tmp_path / "peer")
                                            for item in items],
                                           60, window, border)
    preds = [eroded(item.truth, number) for number, item in enumerate(items)]
    ids = [[i for i in np.unique(pred) if i] for pred in preds]
    means = [[item.pixels[0][pred == i].mean() for i in own] for item, pred,
             own in zip(items, preds, ids)]
    tables, gone = [], 0
    for item, pred, own, bright in zip(items, preds, ids, means):
        low, high = np.percentile(np.concatenate(means), window)
        rim = np.ones_like(pred, bool)
        rim[1:-1, 1:-1] = False
        lost = {i for i, mean in zip(own, bright) if (pred == i).sum() < 60
                or not low <= mean <= high
                or (border != "keep" and i in pred[rim])}
        truth = np.where(np.isin(item.truth, item.truth[rim]), 0,
                         item.truth) if border == "both" else item.truth
        tables.append(metrics.overlap(truth, np.where(np.isin(pred, list(lost)), 0, pred)))
        gone += len(lost)
    expected = metrics.set_scores(tables)
    assert removed == gone > 0
    for part in ("mean", "pooled"):
        assert getattr(result.scores, part) == pytest.approx(getattr(expected, part), nan_ok=True)


# --------------------------------------------------------------------------------------------- page

def test_found_by_size():
    """Small cells missed, large ones found: a curve from 0 to 1."""
    truth = np.zeros((40, 400), np.int32)
    for k in range(20):
        side = 4 if k < 10 else 12
        truth[5:5 + side, 20 * k:20 * k + side] = k + 1
    tables = [metrics.overlap(truth, np.where(truth > 10, truth, 0))]
    result = measure.Result("a", "", None, ["x"], tables, metrics.set_scores(tables), [], None)
    (small, missed), (large, hit) = measure.bench_scores_by_size({"a": result})["a"]
    assert (missed, hit) == (0, 1) and small == pytest.approx(2 * (16 / np.pi) ** 0.5)
    assert large == pytest.approx(2 * (144 / np.pi) ** 0.5)


@pytest.mark.parametrize("shape,cell,expected", [
    ((300, 200), 8, (0, 0, 512, 1)), ((2000, 3000), 100, (0, 0, 3072, 6)),
    ((2000, 3000), 10, None)])
def test_square_worth_showing(shape, cell, expected):
    """Whole images where cells stay visible; otherwise the square that holds the cells."""
    truth = np.zeros(shape, np.int32)
    truth[-60:-60 + cell, -90:-90 + cell] = 1
    top, left, px, step, _ = square = measure.bench_crowded_square(truth)
    if expected:
        assert square[:4] == expected
    else:
        assert (px, step) == (512, 1) and top <= 1940 < top + px and left <= 2910 < left + px


# ---------------------------------------------------------------------------------- score of a cell

def judged(weights, n, rng):
    """Cells that are right with the probability that these weights say."""
    features = {name: rng.normal(2, 1.5, n) for name in weights if name != "constant"}
    sums = weights["constant"] + sum(weights[name] * x for name, x in features.items())
    return measure.JudgedCells(features, rng.random(n) < 1 / (1 + np.exp(-sums)))


@pytest.mark.smoke
def test_a_score_finds_the_weights_that_made_the_cells():
    rng, weights = np.random.default_rng(0), {"constant": -1.0, "mean": 1.2, "size": -0.7}
    fitted = measure.fit_cell_score([judged(weights, 20000, rng), judged(weights, 5000, rng)])
    for name, weight in weights.items():
        assert fitted[name] == pytest.approx(weight, abs=0.08)
    new = judged(weights, 20000, rng)
    given = cells.cell_probability(new.features, fitted)
    assert metrics.calibration_error(new.right, given) < 0.02
    assert metrics.roc_area(new.right, given) > 0.8


def test_a_score_needs_right_and_wrong_cells():
    features = {"mean": np.arange(4.0)}
    with pytest.raises(ValueError, match="expected right and wrong ones"):
        measure.fit_cell_score([measure.JudgedCells(features, np.ones(4, bool))])


def test_held_out_images_are_those_that_the_weights_name(tmp_path):
    a_set(tmp_path / "s", range(6))
    net = model.load(weights(tmp_path / "w.pt"))
    a_set(tmp_path / "v", range(2))
    one = "{path: %s, channels: null, match: null, labels: null}"
    story = {"config": f"data: {{sets: [{one % 's'}], validation: [{one % 'v'}], channels: ['1']}}",
             "images": {"validation": {"s/2": "", "s/4": "", "v/1": ""}}}
    net.settings.provenance.update(story)
    found = measure.bench_held_out_sets(net, str(tmp_path))
    assert [[each.name for each in some.examples] for some in found] == [["2", "4"], ["1"]]
    assert all(some.config.channels == ["1"] for some in found)      # as it was trained
