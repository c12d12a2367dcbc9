"""evaluate.py end to end at toy size: closed forms, the same numbers another way, its files."""
import csv
import dataclasses
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tifffile
import torch
import yaml
from conftest import ROOT
from test_report import browse

import data
import evaluate
import measure
import metrics
import model
import probe
import runs
import watershed

# --------------------------------------------------------------------------------------------- toys

def discs(seed, size=64, count=5):
    """An image of bright discs on dark ground, and their labels with gaps between the ids."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((size, size), np.int32)
    yx = np.mgrid[:size, :size].transpose(1, 2, 0)
    for k in range(count):
        centre, r = rng.uniform(0, size, 2), rng.uniform(3, 7)
        free = np.hypot(*(yx - centre).transpose(2, 0, 1)) < r
        if not labels[free].any():
            labels[free] = 3 * k + 1
    return (rng.normal(60, 8, (1, size, size)) + 120 * (labels > 0)).astype(np.uint8), labels


def write_image(path, pixels, names=None):
    metadata = {"axes": "CYX", **({"Labels": names} if names else {})}
    tifffile.imwrite(path, pixels, imagej=True, metadata=metadata)


def a_set(folder, seeds, name="{}"):
    folder.mkdir(parents=True)
    for seed in seeds:
        pixels, labels = discs(seed)
        stem = name.format(seed)
        write_image(folder / f"{stem}.tif", pixels)
        data.write_labels(folder / f"{stem}_masks.tif", labels)
    return folder


def peer(folder, source, change):
    """Labels of another program: change(labels, number), or None for an image it does not have."""
    folder.mkdir(parents=True)
    for number, example in enumerate(data.examples(source)):
        labels = change(example.labels(), number)
        if labels is not None:
            data.write_labels(folder / f"{example.name}.tif", labels)
    return folder


def weights(path, gain=2.0, peak=0.5, fill=0.3):
    """A network that sees how bright a pixel is: the convolutions on its path are box filters."""
    torch.manual_seed(0)
    settings = model.Settings(tile=64, peak=peak, fill=fill, diameter=10.0)
    net = model.DINOCell(model.ViT(16, 4, 2, 8, 1), (8, 8, 8), 8, settings)
    with torch.no_grad():
        for layer in (*net.decoder.stem, *net.decoder.refine):
            if isinstance(layer, torch.nn.Conv2d):
                layer.weight.zero_()
                for i in range(8):
                    layer.weight[i, i % layer.in_channels] = 1 / 9
        net.decoder.narrow.weight.zero_()
        net.decoder.head.weight.fill_(gain / 8)
        net.decoder.head.bias.fill_(-2.0)
    model.save(net, path)
    return path


GRID = dict(cap=[4.0], peak=[0.47], fill=[0.09])


def trained(path, images):
    """The weights, as if trained on so many images."""
    net = model.load(path)
    images = dict(train={str(number): "" for number in range(images)})
    net.settings = dataclasses.replace(net.settings, provenance=dict(images=images))
    model.save(net, path)
    return path


def run(verb, folder, **config):
    if verb in ("bench", "gating", "sweep"):  # the ceiling and pictures where they are asked for
        config = {"ceiling": dict(cap=[]), **({"pictures": 0} if verb == "bench" else {}), **config}
    path = folder / f"{verb}.yaml"
    path.write_text(yaml.safe_dump({"output_base_dir": str(folder), **config}))
    with pytest.raises(SystemExit) as end:
        evaluate.main([verb, str(path)])
    return end.value.code


def fails(capsys, verb, folder, **config):
    capsys.readouterr()
    assert run(verb, folder, **config) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and "\n" not in said
    return said


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def entry(name, path, **more):
    return dict(name=name, path=str(path), **more)


@pytest.fixture
def calls(monkeypatch):
    """Counts the batches and tiles that the network sees."""
    seen = []
    forward = model.DINOCell.forward
    monkeypatch.setattr(model.DINOCell, "forward",
                        lambda self, x: seen.append(len(x)) or forward(self, x))
    return seen


def eroded(labels, number):
    """Every second image loses a pixel all around its cells, and its first cell."""
    if number % 2:
        return labels
    return np.where((watershed.distance_map(labels, 2) == 1) & (labels > 1), labels, 0)


# -------------------------------------------------------------------------------------------- bench

def test_bench_closed_forms(tmp_path, capsys):
    """A perfect prediction scores 1 everywhere, an empty one 0; groups and differences add up."""
    place = a_set(tmp_path / "set", range(12), "plate{}")
    models = [entry_of("perfect", peer(tmp_path / "a", place, lambda labels, n: labels)),
              entry_of("empty", peer(tmp_path / "b", place, lambda labels, n: 0 * labels)),
              entry_of("half", peer(tmp_path / "c", place, eroded))]
    assert run("bench", tmp_path, models=models,
               sets=[entry("discs", place, group=r"\d$", note="toys")],
               ceiling=GRID, pictures=3) == 0
    folder = tmp_path / "runs/evaluate"
    for name, value in (("perfect", 1.0), ("empty", 0.0)):
        scores = json.loads((folder / name / "discs/metrics.json").read_text())
        for score in ("AP@0.95", "precision", "recall", *measure.COMPARED):
            assert scores[score] == pytest.approx(value), (name, score)
            assert scores["intervals"][score] == pytest.approx([value, value])
        assert scores["n"] == 12 and scores["missing"] == [] and scores["seconds"] is None
    found = data.examples(place)
    tables = [metrics.overlap(e.labels(), eroded(e.labels(), n)) for n, e in enumerate(found)]
    expected = metrics.set_scores(tables)
    scores = json.loads((folder / "half/discs/metrics.json").read_text())
    assert scores["mean"] == pytest.approx(expected.mean)
    assert scores["pooled"] == pytest.approx(expected.pooled)
    assert scores["AP@0.5"] == pytest.approx(expected.mean["AP@0.5"])
    assert scores["SEG"] == pytest.approx(expected.pooled["SEG"])
    assert scores["SEG"] != pytest.approx(expected.mean["SEG"])
    assert scores["images"][found[3].name] == pytest.approx(expected.images[3])
    np.testing.assert_array_equal(data.read_labels(folder / f"half/discs/{found[2].name}_pred.tif"),
                                  eroded(found[2].labels(), 2))

    rows = {row["model"]: row for row in table(folder / "metrics_all_models.tsv")}
    assert list(rows) == ["ceiling", "perfect", "empty", "half"]
    low, f1, high = (float(rows["half"][name]) for name in ("F1_low", "F1", "F1_high"))
    assert low < f1 < high
    groups = [row for row in table(folder / "groups.tsv") if row["model"] == "half"]
    # plate1, plate11
    assert len(groups) == 10 and {row["group"]: row["n"] for row in groups}["1"] == "2"
    for count in ("TP", "FP", "FN", "n_true", "n"):
        assert sum(int(row[count]) for row in groups) == int(rows["half"][count])
    delta = {(row["model"], row["score"]): row for row in table(folder / "delta.tsv")}
    empty, half = delta["empty", "AP@0.5"], delta["half", "AP@0.9"]
    assert [float(empty[k]) for k in ("difference", "low", "high")] == [-1, -1, -1]
    assert empty["n"] == "12"
    assert float(half["difference"]) == pytest.approx(expected.mean["AP@0.9"] - 1, abs=1e-4)
    low, high = metrics.bootstrap_scores([image["AP@0.9"] - 1 for image in expected.images])
    assert (float(half["low"]), float(half["high"])) == pytest.approx((low, high), abs=1e-4)
    page = (folder / "report.html").read_text()
    assert page.count("<h2>") == 2 and page.count("data:image/png") == 12 and "toys" in page
    assert "report.html" in capsys.readouterr().out


def entry_of(name, labels):
    return dict(name=name, labels=str(labels))


@pytest.mark.smoke
def test_few_images_are_listed_one_by_one(tmp_path):
    place = a_set(tmp_path / "set", range(3))
    models = [entry_of("all", peer(tmp_path / "a", place, lambda labels, n: labels)),
              entry_of("first", peer(tmp_path / "b", place, lambda labels, n: labels * (n == 0)))]
    assert run("bench", tmp_path, models=models, sets=[entry("few", place)]) == 0
    folder = tmp_path / "runs/evaluate"
    rows = [row for row in table(folder / "delta.tsv") if row["score"] == "F1"]
    assert [(row["image"], row["difference"], row["low"]) for row in rows] == [
        ("mean", "-0.6666666667", ""), ("0", "0", ""), ("1", "-1", ""), ("2", "-1", "")]
    assert {row["F1_low"] for row in table(folder / "metrics_all_models.tsv")} == {""}
    assert json.loads((folder / "all/few/metrics.json").read_text())["intervals"] == {}


def test_an_image_without_cells_is_null_and_a_dash(tmp_path):
    place = a_set(tmp_path / "set", [0])
    data.write_labels(place / "0_masks.tif", np.zeros((64, 64), np.uint16))
    models = [entry_of("a", peer(tmp_path / "a", place, lambda labels, n: labels))]
    assert run("bench", tmp_path, models=models, sets=[entry("bare", place)]) == 0
    folder = tmp_path / "runs/evaluate"
    text = (folder / "a/bare/metrics.json").read_text()
    assert json.loads(text)["SEG"] is None and json.loads(text)["AP@0.5"] == 1 and "NaN" not in text
    assert {row["SEG"] for row in table(folder / "metrics_all_models.tsv")} == {""}


def test_peers_are_matched_by_stem(tmp_path, capsys):
    place = a_set(tmp_path / "set", range(3), "im.{}")
    folder = peer(tmp_path / "peer" / "dots", place, lambda labels, n: labels if n < 2 else None)
    (folder / "im.0.tif").rename(folder / "im.0_cp_masks.tif")
    data.write_labels(folder / "im.0.tif", np.ones((64, 64), np.uint8))  # the image beside them
    good = dict(models=[entry_of("peer", tmp_path / "peer")], sets=[entry("dots", place)])
    assert run("bench", tmp_path, **good) == 0
    assert "1 of 3 images have no labels and are left out: im.2" in capsys.readouterr().err
    scores = json.loads((tmp_path / "runs/evaluate/peer/dots/metrics.json").read_text())
    assert scores["n"] == 2 and scores["missing"] == ["im.2"] and scores["F1"] == 1
    shutil.copy(folder / "im.1.tif", folder / "im.1_pred.tif")
    shutil.copy(folder / "im.1.tif", folder / "im.1_masks.tif")
    assert "both may be the labels of im.1" in fails(capsys, "bench", tmp_path, **good)
    for file in folder.iterdir():
        file.rename(folder / f"other_{file.name}")
    assert "labels for none of the 3 images" in fails(capsys, "bench", tmp_path, **good)
    other = dict(good, models=[entry_of("peer", tmp_path / "nowhere")])
    assert "nowhere: no such folder" in fails(capsys, "bench", tmp_path, **other)


def test_nothing_is_done_twice(tmp_path, calls):
    """A prediction is made again for other weights, another image or option, and nothing else."""
    place = a_set(tmp_path / "set", range(3))
    net = weights(tmp_path / "net.pt")
    config = dict(models=[dict(name="net", weights=str(net))], sets=[entry("discs", place)],
                  pictures=0)
    folder = tmp_path / "runs/evaluate"

    def tiles(**changes):
        calls.clear()
        assert run("bench", tmp_path, **{**config, **changes}) == 0
        return sum(calls)
    whole = tiles()
    one = whole // 3
    assert whole == 3 * one > 0
    written = folder / "net/discs/metrics.json", folder / "metrics_all_models.tsv"
    before = [path.read_text() for path in written]
    assert json.loads(before[0])["seconds"] > 0
    assert tiles() == 0
    assert before == [path.read_text() for path in written]

    (folder / "net/discs/1_pred.tif").unlink()  # as if it had been interrupted
    assert tiles() == one
    (folder / "net/discs/2_pred.json").unlink()
    assert tiles() == one
    moved = shutil.copytree(place, tmp_path / "elsewhere")
    assert tiles(sets=[entry("discs", moved)]) == 0  # the content counts, not the place
    data.write_labels(place / "0_masks.tif", discs(9)[1])
    assert tiles() == 0  # other labels: only scored anew
    assert written[0].read_text() != before[0]
    write_image(place / "0.tif", discs(9)[0])
    assert tiles() == one
    assert tiles(models=[dict(name="net", weights=str(net), peak=0.6)]) == whole
    assert tiles() == whole
    assert tiles(sets=[entry("discs", place, diameter=20)]) > 0
    assert tiles() == whole
    weights(net, gain=3)
    assert tiles() == whole
    assert tiles(overwrite=True) == whole
    copy = str(shutil.copy(net, tmp_path / "copy.pt"))
    assert tiles(models=[dict(name="net", weights=copy)]) == 0


def test_ctrl_c_keeps_what_is_done(tmp_path, calls, monkeypatch, capsys):
    place = a_set(tmp_path / "set", range(4))
    config = dict(models=[dict(name="net", weights=str(weights(tmp_path / "net.pt")))],
                  sets=[entry("discs", place)], pictures=0)
    forward = model.DINOCell.forward

    def interrupted(self, x):
        if len(calls) == 2:
            raise KeyboardInterrupt
        return forward(self, x)
    with monkeypatch.context() as context:
        context.setattr(model.DINOCell, "forward", interrupted)
        assert run("bench", tmp_path, **config) == 130
    assert "the same command goes on" in capsys.readouterr().err
    folder = tmp_path / "runs/evaluate/net/discs"
    assert len(list(folder.glob("*_pred.tif"))) == 2 and not (folder / "metrics.json").exists()
    (folder / "0_pred.json").write_text('{"key": ')                   # damaged: counts as not done
    calls.clear()
    assert run("bench", tmp_path, **config) == 0 and len(calls) == 3


def test_optional_models_are_not_run(tmp_path, capsys):
    """A row says so; differences are to the first that ran; without `optional` it is an error."""
    place = a_set(tmp_path / "set", range(2))
    models = [dict(name="large", weights=str(tmp_path / "none.pt"), optional=True),
              entry_of("a", peer(tmp_path / "a", place, lambda labels, n: labels)),
              entry_of("b", peer(tmp_path / "b", place, lambda labels, n: 0 * labels)),
              dict(name="peer", labels=str(tmp_path / "none"), optional=True)]
    config = dict(models=models, sets=[entry("s", place)])
    assert run("bench", tmp_path, **config) == 0
    said = capsys.readouterr()
    assert "large: not run; no weights at" in said.err and "peer: not run; " in said.err
    rows = table(tmp_path / "runs/evaluate/metrics_all_models.tsv")
    assert [(row["model"], row["n"]) for row in rows] == [
        ("large", "not run"), ("a", "2"), ("b", "2"), ("peer", "not run")]
    assert {row["against"] for row in table(tmp_path / "runs/evaluate/delta.tsv")} == {"a"}
    text = (tmp_path / "runs/evaluate/table.md").read_text()
    assert "| large | not run | - |" in text and "\nNot run: large, peer.\n" in text
    models[0] = dict(models[0], optional=False)
    assert "no weights at" in fails(capsys, "bench", tmp_path, **config)


def test_summary_goes_elsewhere(tmp_path, capsys):
    """Its lines are sought before anything is measured."""
    place = a_set(tmp_path / "set", range(2))
    models = [entry_of("a", peer(tmp_path / "a", place, eroded))]
    readme = tmp_path / "README.md"
    config = dict(models=models, sets=[entry("discs", place)], summary=str(readme))
    readme.write_text("# Title\n")
    assert "<!-- begin bench evaluate in short -->" in fails(capsys, "bench", tmp_path, **config)
    assert not (tmp_path / "runs").exists()
    readme.write_text("# Title\n<!-- begin bench evaluate in short -->\n"
                      "<!-- end bench evaluate in short -->")
    assert run("bench", tmp_path, **config) == 0
    scores = json.loads((tmp_path / "runs/evaluate/a/discs/metrics.json").read_text())
    cell = " / ".join(f"{scores['mean'][name]:.3f}" for name in ("AP@0.5", "AP@0.75", "AP@0.9"))
    assert f"| discs | 2 | {cell} |" in readme.read_text() and scores["AP@0.9"] < 1
    assert "SEG" not in readme.read_text()


def test_document(tmp_path, capsys):
    """The tables stand between two comments; text around stays; a second run changes nothing."""
    place = a_set(tmp_path / "set", range(2))
    models = [entry_of("a", peer(tmp_path / "a", place, lambda labels, n: labels)),
              dict(name="b", note="no GPU yet")]
    document = tmp_path / "results.md"
    sets = [entry("discs", place, note="never trained on")]
    config = dict(models=models, sets=sets, markdown=str(document))
    document.write_text("before\n")
    assert "<!-- begin bench evaluate -->" in fails(capsys, "bench", tmp_path, **config)
    document.write_text("before\n<!-- begin bench evaluate -->\nold\n"
                        "<!-- end bench evaluate -->\nafter\n")
    assert run("bench", tmp_path, **config) == 0
    text = document.read_text()
    assert text.startswith("before\n<!--") and text.endswith("-->\nafter\n") and "old" not in text
    assert "| discs (1) | 2 | 1.000 / 1.000 / 1.000 |" in text
    assert "\n(1) never trained on.\n" in text
    assert "| discs | a | 2 | 1.000 | 1.000 |" in text
    number = re.search(r"\| discs \| b \((\d)\) \| not run \| - \|", text)[1]
    assert f"({number}) no GPU yet." in text and text.count("never trained on") == 1
    assert text.split("-->\n")[1].startswith((tmp_path / "runs/evaluate/table.md").read_text())
    assert run("bench", tmp_path, **config) == 0 and document.read_text() == text


def test_seeds_stand_as_one_and_label_efficiency_is_drawn(tmp_path, capsys):
    """A pattern of weights is a row, the mean of its seeds; by numbers of images, a curve."""
    place = a_set(tmp_path / "set", range(11))
    for name, gain, images in (("one_0", 2, 4), ("one_1", 3, 4), ("two_3", 2, 3),
                               ("two_30", 3, 30)):
        trained(weights(tmp_path / f"{name}.pt", gain), images)
    models = [dict(name=name, weights=str(tmp_path / f"{name}_*.pt"), note="toys")
              for name in ("one", "two")]
    models.append(entry_of("none", peer(tmp_path / "none", place, lambda labels, n: 0 * labels)))
    config = dict(models=models, sets=[entry("discs", place)], against=["one", "none"])
    assert run("bench", tmp_path, **config) == 0
    folder = tmp_path / "runs/evaluate"
    rows = table(folder / "metrics_all_models.tsv")
    assert [(row["model"], row["seed"], row["trained_on"]) for row in rows] == [
        ("one", "", "4"), ("one", "one_0", "4"), ("one", "one_1", "4"), ("two_3", "", "3"),
        ("two_30", "", "30"), ("none", "", "")]
    means = [json.loads((folder / f"one/one_{k}/discs/metrics.json").read_text())["AP@0.5"]
             for k in (0, 1)]
    mean, text = np.mean(means), (folder / "table.md").read_text()
    assert means[0] != means[1] and float(rows[0]["AP@0.5"]) == pytest.approx(mean)
    assert f"| discs | one (1) | 11 | {mean:.3f} [" in text and "one_0" not in text
    assert f"| discs | none | -{mean:.3f} [" in text
    assert "| set | model | against one | against none |" in text
    delta = {(row["model"], row["against"]): float(row["difference"])
             for row in table(folder / "delta.tsv")
             if row["score"] == "AP@0.5"}
    assert delta["one", "none"] == pytest.approx(mean) == -delta["none", "one"]
    page = (folder / "report.html").read_text()
    curves = page.partition("AP@0.5 over training images")[2].partition("</section>")[0]
    assert [len(re.findall("M", d))
            for d in re.findall(r'd="([^"]+)" stroke="#\w+" stroke-width="6"', curves)] == [2, 2]
    said = fails(capsys, "bench", tmp_path, **config | dict(against=["on"]))
    assert "against: 'on', expected some of one, two_3, two_30, none" in said
    models[2]["name"] = "two_3"
    assert "two rows are called 'two_3'" in fails(capsys, "bench", tmp_path, **config)


def test_report_page_of_a_network(tmp_path):
    """The whole page in a browser: nothing is fetched, no error, everything has a size."""
    place = a_set(tmp_path / "set", range(11))
    models = [dict(name="net", weights=str(weights(tmp_path / "net.pt"))),
              entry_of("half", peer(tmp_path / "half", place, eroded)),
              dict(name="later", note="no GPU yet")]
    sets = [entry("discs", place), entry("again", place, limit=2)]
    assert run("bench", tmp_path, models=models, sets=sets, ceiling=GRID, pictures=3) == 0
    seen = browse(tmp_path / "runs/evaluate/report.html")
    assert seen["requests"] == [] and seen["errors"] == []
    assert len(seen["boxes"]) == 4 + 2 * 3 + (3 + 2) * 3  # charts, keys of legends, pictures
    assert all(width > 10 and height > 5 for width, height in seen["boxes"])


# ------------------------------------------------------------------------------------------ ceiling

def test_ceiling_is_kept(tmp_path, monkeypatch):
    place = a_set(tmp_path / "set", range(2))
    made = []
    encode = watershed.distance_map
    monkeypatch.setattr(watershed, "distance_map", lambda *a: made.append(1) or encode(*a))
    for expected in (2 * 4, 0):
        made.clear()
        assert run("ceiling", tmp_path, sets=[entry("discs", place)]) == 0
        assert len(made) == expected
    data.write_labels(place / "1_masks.tif", discs(7)[1])
    assert run("ceiling", tmp_path, sets=[entry("discs", place)]) == 0 and len(made) == 8


def test_ceiling_of_real_sets(shared, tmp_path):
    """The published numbers of the house: the cap is what lets phase contrast pass 0.9 IoU."""
    place = shared / "data/phase_usiigaci/train"
    if not place.is_dir():
        pytest.skip("needs shared/data/phase_usiigaci")
    grid = dict(cap=[None, 4], peak=[0.47], fill=[0.09])
    assert run("ceiling", tmp_path, sets=[entry("phase", place, limit=2)], **grid) == 0
    capped, plain = table(tmp_path / "runs/ceiling/ceiling.tsv")
    assert (capped["cap"], plain["cap"]) == ("4", "")
    assert float(capped["AP@0.9"]) > 0.7 and float(plain["AP@0.9"]) < 0.2


# ------------------------------------------------------------------------------------------- gating

@pytest.mark.smoke
def test_gating(tmp_path):
    """A row for the ceiling, the raw prediction and each setting; raw is what bench measured."""
    place = a_set(tmp_path / "set", range(3))
    models = [entry_of("peer", peer(tmp_path / "peer", place, eroded))]
    sets = [entry("discs", place)]
    assert run("bench", tmp_path, models=models, sets=sets) == 0
    config = dict(predictions=str(tmp_path / "runs/evaluate/peer"), sets=sets, min_area=[0, 60],
                  windows=[[0, 100], [10, 80]])
    assert run("gating", tmp_path, **config, ceiling=GRID) == 0
    best, *rows = table(tmp_path / "runs/gating/gating.tsv")
    assert [row["what"] for row in (best, *rows)] == ["ceiling", "raw", *["gated"] * 2 * 2 * 3]
    assert run("ceiling", tmp_path, sets=sets, **GRID) == 0
    expected = table(tmp_path / "runs/ceiling/ceiling.tsv")[0]
    assert all(best[name] == value for name, value in expected.items())
    raw = table(tmp_path / "runs/evaluate/metrics_all_models.tsv")[0]
    assert rows[0]["removed"] == rows[1]["removed"] == "0" and rows[1]["F1_change"] == "0"
    assert all(rows[0][score] == raw[score] for score in ("AP@0.5", "SEG", "AJI", "TP", "FP", "FN"))
    removed = {(row["min_area"], row["window"], row["border"]): int(row["removed"]) for row in rows}
    assert 0 < removed["0", "q0-100", "drop"] < removed["60", "q10-80", "drop"]
    changed = rows[-1]
    assert float(changed["PQ_change"]) == pytest.approx(float(changed["PQ"]) - float(raw["PQ"]),
                                                        abs=1e-9)


def test_gating_window_over_the_set(tmp_path, capsys):
    """Percentiles of the whole set: of 12 cells with 12 intensities q5-95 drops the extremes."""
    place = tmp_path / "set"
    place.mkdir()
    labels = np.zeros((20, 60), np.int32)
    for k in range(6):
        labels[5:10, 10 * k + 2:10 * k + 7] = k + 1
    for number in range(2):
        bright = np.where(labels, 10 * labels + 5 * number, 0)
        pixels = np.stack([0 * labels, bright]).astype(np.uint8)
        write_image(place / f"{number}.tif", pixels, ["DNA", "marker"])
        data.write_labels(place / f"{number}_masks.tif", labels)
    models = [entry_of("a", peer(tmp_path / "a", place, lambda labels, n: labels))]
    assert run("bench", tmp_path, models=models, sets=[entry("s", place)]) == 0
    config = dict(predictions=str(tmp_path / "runs/evaluate/a"), sets=[entry("s", place)],
                  marker="marker",
                  min_area=[0], border=["keep"], windows=[[5, 95]])
    assert run("gating", tmp_path, **config) == 0
    assert [row["removed"] for row in table(tmp_path / "runs/gating/gating.tsv")] == ["0", "2"]
    assert "marker" in fails(capsys, "gating", tmp_path, **{**config, "marker": "actin"})
    missing = {**config, "predictions": str(tmp_path / "runs/evaluate/b")}
    assert "no such prediction" in fails(capsys, "gating", tmp_path, **missing)
    assert "expected two percentiles" in fails(capsys, "gating", tmp_path,
                                               **{**config, "windows": [[95, 5]]})


# -------------------------------------------------------------------------------------------- sweep

def sweep_config(tmp_path, **more):
    place = {name: a_set(tmp_path / name, seeds) for name, seeds in
             (("va", range(2)), ("vb", range(2, 4)), ("ta", range(4, 6)), ("tb", range(6, 8)))}
    return {"weights": str(weights(tmp_path / "net.pt")), "peak": [0.4, 0.9], "fill": [0.2, 0.6],
            "validation": [entry("a", place["va"]), entry("b", place["vb"])],
            "test": [entry("a", place["ta"]), entry("c", place["tb"])], **more}


def test_sweep_runs_the_network_once_per_tile_and_scale(tmp_path, calls, monkeypatch):
    config = sweep_config(tmp_path, tile=[32, 64], scale=[1.0, 0.5], ceiling=GRID)
    passes, sweep_image = [], measure.sweep_image

    def counted(*given):
        before = sum(calls)
        rows = sweep_image(*given)
        passes.append(sum(calls) - before)
        return rows
    monkeypatch.setattr(measure, "sweep_image", counted)
    assert run("sweep", tmp_path, **config) == 0
    rows = table(tmp_path / "runs/sweep/sweep.tsv")
    assert len(rows) == 2 * (1 + 4 * 3)  # sets, ceiling, views, fill <= peak
    assert rows[0]["choice"] == rows[13]["choice"] == "ceiling" and "SEG_low" not in rows[0]
    rows = [row for row in rows if row["choice"] == "-"]
    calls.clear()
    assert run("sweep", tmp_path, **config) == 0 and not calls        # all kept
    selected = {(row["set"], row["choice"]): row
                for row in table(tmp_path / "runs/sweep/selected.tsv")}
    assert list(selected) == [("a", "ceiling"), ("a", "shared"), ("a", "weights"), ("a", "own"),
                              ("c", "ceiling"), ("c", "shared"), ("c", "weights")]
    few = {**config, "peak": [0.4], "fill": [0.2], "experiment": "few", "test": config["test"][:1]}
    assert run("sweep", tmp_path, **few) == 0
    # thresholds cost no pass of the network
    assert len(passes) == 8 and passes[:4] == passes[4:] and min(passes) > 0

    def mean(view):
        return np.mean([float(row["DSB"]) for row in rows if view.items() <= row.items()])
    keys = ("tile", "overlap", "scale", "peak", "fill", "depth", "smooth", "shape", "min_area")
    views = {tuple(row[key] for key in keys): row for row in rows}
    best = max(mean(dict(zip(keys, view))) for view in views)
    chosen = {key: selected["c", "shared"][key] for key in keys}
    assert mean(chosen) == pytest.approx(best)
    own = {key: selected["a", "own"][key] for key in keys}
    first = [row for row in rows if row["set"] == "a"]
    assert max(float(row["DSB"]) for row in first) == next(
        float(row["DSB"]) for row in first if own.items() <= row.items())


def test_sweep_reports_what_bench_would(tmp_path):
    """The row of a setting, on validation and on test, is what bench measures with it."""
    setting = dict(peak=0.5, fill=0.2, depth=0.05, smooth=0.7, shape=0.02, min_area=5, scale=1.6,
                   tile=64)
    config = sweep_config(tmp_path, **{name: [value] for name, value in setting.items()})
    assert run("sweep", tmp_path, **config) == 0
    models = [dict(name="net", weights=config["weights"], **setting)]
    sets = [config["validation"][0], {**config["test"][1], "name": "test"}]
    assert run("bench", tmp_path, models=models, sets=sets) == 0
    on_validation, on_test = table(tmp_path / "runs/evaluate/metrics_all_models.tsv")
    swept = table(tmp_path / "runs/sweep/sweep.tsv")[0]
    assert all(swept[score] == on_validation[score] for score in ("DSB", "AP@0.5", "PQ", "AJI"))
    selected = [row for row in table(tmp_path / "runs/sweep/selected.tsv") if row["set"] == "c"][0]
    assert selected["choice"] == "shared"
    assert all(selected[score] == on_test[score]
               for score in ("DSB", "AP@0.5", "SEG", "F1_low", "TP"))


def test_sweep_leaves_out_what_the_weights_do_not_allow(tmp_path, capsys):
    """null is their peak of 0.5 and fill of 0.3."""
    config = sweep_config(tmp_path, peak=[0.1, 0.6], fill=[None, 0.05])
    assert run("sweep", tmp_path, **config) == 0
    rows = [row for row in table(tmp_path / "runs/sweep/sweep.tsv") if row["set"] == "a"]
    assert [(row["peak"], row["fill"]) for row in rows] == [("0.1", "0.05"), ("0.6", ""),
                                                            ("0.6", "0.05")]
    said = fails(capsys, "sweep", tmp_path, **{**config, "peak": [0.1], "fill": [None],
                                               "experiment": "none"})
    assert "no pair with fill <= peak; null: 0.5 and 0.3, as in the weights" in said
    assert not (tmp_path / "runs/none").exists()


def test_sweep_keeps_validation_and_test_apart(tmp_path, capsys):
    config = sweep_config(tmp_path)
    same = {**config, "test": [entry("x", tmp_path / "va" / ".." / "va")]}
    assert "test image x/0" in fails(capsys, "sweep", tmp_path, **same)
    assert "tile: expected one value" in fails(capsys, "sweep", tmp_path, **{**config, "tile": []})
    pixels = discs(1)[0]
    for seed, stain in ((9, pixels), (1, 255 - pixels)):  # another channel is no other image
        data.write_labels(tmp_path / "tb/other_masks.tif", discs(seed)[1])
        write_image(tmp_path / "tb/other.tif", stain)
        said = fails(capsys, "sweep", tmp_path, **config)
        assert "test image c/other" in said and "is in validation too, as a/1" in said
    assert not (tmp_path / "runs").exists()


# ----------------------------------------------------------------------------------------- mistakes

@pytest.mark.smoke
def test_mistakes_are_one_line(tmp_path, capsys):
    place = a_set(tmp_path / "set", range(2))
    (tmp_path / "empty").mkdir()
    good = entry("s", place)
    a = entry_of("a", place)  # X_masks.tif beside X.tif: found too
    (tmp_path / "no.pt").write_text("no weights")

    def said(models=(a,), sets=(good,), **more):
        return fails(capsys, "bench", tmp_path, models=list(models), sets=list(sets), **more)
    assert run("bench", tmp_path, models=[a], sets=[good]) == 0
    assert "nowhere" in said(sets=[entry("s", tmp_path / "nowhere")])
    assert "empty" in said(sets=[entry("s", tmp_path / "empty")])
    assert "no weights at" in said(models=[dict(name="w", weights=str(tmp_path / "gone.pt"))])
    assert "no.pt" in said(models=[dict(name="w", weights=str(tmp_path / "no.pt"))])
    assert "neither weights nor labels" in said(models=[dict(name="w")])
    assert "weights and labels" in said(models=[dict(name="w", weights="x", labels="y")])
    assert "becomes a folder" in said(models=[dict(a, name="../w")])
    assert "two models are called 'a'" in said(models=[a, a])
    assert "two sets are called 's'" in said(sets=[good, good])
    assert "the encoding's row" in said(models=[dict(a, name="ceiling")])
    assert "no model" in said(models=[]) and "no set" in said(sets=[])
    assert "columns is 'AP', expected AP@0.5 or AP@0.75" in said(columns=["AP"])
    assert "no pair with fill <= peak" in said(ceiling=dict(peak=[0.1], fill=[0.2]))
    assert "unknown key 'ceiling.caps', did you mean 'cap'?" in said(ceiling=dict(caps=[1]))
    assert "unknown key 'stes', did you mean 'sets'?" in said(stes=[])
    assert "s/0: " in said(models=[dict(name="w", weights=str(weights(tmp_path / "w.pt")),
                                        tile=30)])
    data.write_labels(tmp_path / "set/1_masks.tif", np.ones((5, 5), np.uint8))
    assert "s/1: image of (64, 64) px, labels of (5, 5)" in said()
    write_image(place / "1.tif", np.zeros((4, 5, 5), np.uint8))
    assert "s/1: 4 channels; choose up to three" in said()


def test_peers_of_another_size(tmp_path, capsys):
    place = a_set(tmp_path / "set", [0])
    other = peer(tmp_path / "peer", place, lambda labels, n: labels[:50])
    said = fails(capsys, "bench", tmp_path, models=[entry_of("a", other)], sets=[entry("s", place)])
    assert "peer/0.tif: labels of (50, 64) px, the image 0 has (64, 64)" in said
    assert not list((tmp_path / "runs/evaluate/a").rglob("*.tif"))


def test_command():
    """As one types it: verbs are listed, help needs no torch, files are no arguments."""
    def command(*arguments):
        return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True,
                              text=True)
    wrong = command("evaluate.py", "brench", "x.yaml")
    assert (wrong.returncode, wrong.stderr) == (
        1, "error: unknown verb 'brench', expected one of bench, gating, sweep, ceiling, "
        "calibrate, channels, embed\n")
    helped = command("evaluate.py", "sweep", "--help")
    assert helped.returncode == 0
    assert helped.stdout.count("ceiling.min_area") == 1 and "Keys in ceiling" not in helped.stdout
    assert "Keys in validation and test" in helped.stdout
    assert "evaluate.py sweep CONFIG" in helped.stdout
    light = command("-c", "import evaluate, runs; "
                          "assert not any(map(runs.is_loaded, ('torch', 'scipy')))")
    assert light.returncode == 0, light.stderr


def test_calibrate_writes_the_score_into_a_copy(tmp_path, capsys):
    """The tensors stay; scores of new images come from it; validation and test stay apart."""
    sets = {name: a_set(tmp_path / name, seeds) for name, seeds in
            (("val", range(6)), ("new", range(6, 12)))}
    weights(tmp_path / "w.pt", gain=2.0)
    for name in sets:                                       # half of the cells are not in the truth
        for path in sets[name].glob("*_masks.tif"):
            labels = data.read_labels(path)
            data.write_labels(path, np.where(labels % 2, labels, 0))
    keys = dict(weights=str(tmp_path / "w.pt"), root=str(tmp_path), out=str(tmp_path / "s.pt"),
                validation=[entry("val", "val")], home=[entry("new", "new")])
    evaluate.calibrate(runs.from_dict(evaluate.Calibrate, keys, "x"))
    *told, last = capsys.readouterr().out.splitlines()
    assert "ECE" in told[0] and "fitted on 6 images" in last
    before = (tmp_path / "s.pt").read_bytes()
    evaluate.calibrate(runs.from_dict(evaluate.Calibrate, {
        **keys, "weights": str(tmp_path / "s.pt"), "out": None, "validation": []}, "x"))
    assert capsys.readouterr().out.splitlines() == told      # the score that is there, not another
    assert (tmp_path / "s.pt").read_bytes() == before
    with pytest.raises(ValueError, match="w.pt: has no score to report on; out=FILE"):
        evaluate.calibrate(runs.from_dict(evaluate.Calibrate, {**keys, "out": None}, "x"))
    with pytest.raises(ValueError, match="no home or abroad, and no out"):
        runs.from_dict(evaluate.Calibrate, {**keys, "out": None, "home": []}, "x")
    old, new = model.load(tmp_path / "w.pt"), model.load(tmp_path / "s.pt")
    assert set(new.settings.score) == {"constant", "summit", "mean", "spread", "valley", "touching",
                                       "slope", "size", "raggedness"} and not old.settings.score
    for a, b in zip(old.state_dict().values(), new.state_dict().values()):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="is in validation too"):
        evaluate.calibrate(runs.from_dict(evaluate.Calibrate, {**keys, "home": keys["validation"]},
                                          "x"))
    with pytest.raises(ValueError, match="do not name labelled images that were held out"):
        evaluate.calibrate(runs.from_dict(evaluate.Calibrate, {**keys, "validation": []}, "x"))


def test_scores_of_types_are_made_anew_with_other_classes_or_another_shape(tmp_path):
    """The key of a record: tables of classes beside the images, and the finder of `random`."""
    a_set(tmp_path / "s", range(2))
    classes, finder = tmp_path / "s/0_types.csv", weights(tmp_path / "net.pt")
    classes.write_text("id,type\n1,a\n4,b\n")
    typed = evaluate.TypedSet("t", (data.TrainingSet("s"),), (data.TrainingSet("s"),),
                              {"a": "a", "b": "b"})
    sources = [evaluate.VectorSource(name, name) for name in ("pixels", "random")]
    config = evaluate.Embed(tuple(sources), (typed,), finder=str(finder), root=str(tmp_path))

    def keys():
        return [evaluate.embed_key(source, typed, config) for source in sources]
    first = keys()
    classes.write_text("id,type\n1,b\n4,a\n")
    second = keys()
    assert first == [{**one, "files": first[0]["files"]} for one in second] != second
    weights(finder, gain=1.0)
    assert keys()[0] == second[0] and keys()[1] != second[1]


def test_results_stay_in_runs(tmp_path, capsys):
    place = a_set(tmp_path / "set", [0])
    for name in ("../x", str(tmp_path / "x"), "a/../../x", ""):
        config = dict(experiment=name, sets=[entry("s", place)])
        assert "expected text, the name of a folder" in fails(capsys, "ceiling", tmp_path, **config)
    assert not (tmp_path / "x").exists()
    for what in ("sources", "sets"):
        config = {"sources": [dict(name="a", weights="pixels")], "sets": [], "fields": "x"}
        config[what] = [dict(name="../x", weights="pixels", train=[], test=[], types={})]
        assert f"{what}.name is '../x'" in fails(capsys, "embed", tmp_path, **config)


@pytest.mark.smoke
@pytest.mark.parametrize("name,cls", [
    ("evaluate", evaluate.Bench), ("results", evaluate.Bench), ("results_ablation", evaluate.Bench),
    ("results_budget", evaluate.Bench), ("laptop", evaluate.Bench), ("livecell", evaluate.Bench),
    ("pbl", evaluate.Bench), ("if_e1", evaluate.Bench), ("if_e2", evaluate.Bench),
    ("if_e4", evaluate.Bench), ("if_deepliif", evaluate.Bench),
    ("ceiling", evaluate.Ceiling), ("gating", evaluate.Gating), ("sweep", evaluate.Sweep),
    ("channels", probe.Channels), ("calibrate", evaluate.Calibrate)])
def test_configs_that_ship_are_valid(name, cls):
    config = runs.load_config(cls, ROOT / "configs" / f"{name}.yaml")
    assert runs.from_dict(cls, yaml.safe_load(runs.to_yaml(config)), name) == config
