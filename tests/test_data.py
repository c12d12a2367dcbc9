"""data.py: groups, splits, convert and check, on layouts written here."""
import csv
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings, strategies as st

import cells
import data
from test_formats import SQUARE, blobs, coco, command, holed, pair, picture, save


# --------------------------------------------------------------------------------------------- groups, splits

@pytest.mark.parametrize("name, group", [
    ("trpL_t09", "trpL"), ("01/t012", "01"), ("t00", ""), ("pg6_t3", "pg6"), ("movie/frame_12", "movie"),
    ("omnipose_ec_5I_t141xy5c1", "omnipose_ec_5I_xy5c1"), ("SkBr3_Phase_H3_2_03d00h00m_4", "SkBr3_Phase_H3"),
    ("jump_r01c01f03", "jump_r01c01"), ("pediatric_r03c03f03p01", "pediatric_r03c03"), ("nf1_F7_2", "nf1_F7"),
    ("A01_s3", "A01"), ("emb1_z01", "emb1"), ("emb1_slice3", "emb1"), ("emb1_ch2", "emb1"), ("emb1_w2", "emb1"), ("A01_pos3", "A01"),
    ("A01f03d0", "A01"), ("plate_B02f01d1", "plate_B02"), ("hela_copy007", "hela"), ("s1_slide3_s0b0c0x0-512y0", "s1_slide3"),
    *((name, name) for name in ("A01", "set46", "T98G_12", "T47D", "gbm12", "he/test_11", "bc_22_2",
                                "set/007", "3T3_set1", "val_MCF10A", "00ae65c1", "b3c4d5", "2024-05_dish"))])
def test_group_of(name, group):
    assert data.group_of(name) == group


@pytest.mark.parametrize("name, donor", [
    ("donor_7/t1", "7"), ("cases/donor_12/tile_b0c0x1", "12"), ("case_control/donor_7/x", "7"), ("patients/patient_3/a", "3"),
    ("patient7/a", "7"), ("Subject AB12/a", "AB12"), ("showcase_1/donor_2", "2")])
def test_donor_of(name, donor):
    assert data.donor_of(name) == donor


@pytest.mark.parametrize("name", ["donors/7_b0c0", "cases/a", "tile7", "showcase_1"])
def test_no_donor_in_the_name(name):
    with pytest.raises(ValueError, match="no donor in the name"):
        data.donor_of(name)


def test_copies_of_an_image_stay_on_one_side(tmp_path):
    """COCO files name an image twice, and then it is called so."""
    for number in range(8):
        for name in (f"im{number}", f"im{number}_copy2"):
            pair(tmp_path / "in", name, number)
    command("split", tmp_path / "in", f"out={tmp_path / 'out'}", "fractions=0.5,0.5")
    with open(tmp_path / "out/split.tsv", newline="") as file:
        sides = {row["name"]: row["split"] for row in csv.DictReader(file, delimiter="\t")}
    assert len(sides) == 16 and len(set(sides.values())) == 2
    assert all(sides[f"im{number}"] == sides[f"im{number}_copy2"] for number in range(8))


def named(*names: str) -> list[data.Example]:
    return [data.Example(name, (), None, None) for name in names]


def movies(n: int, frames: int) -> list[data.Example]:
    return named(*(f"m{i}_t{t:02d}" for i in range(n) for t in range(frames)))


@pytest.mark.parametrize("share", [0.01, 0.1, 0.3, 0.9, 1.0])
def test_hold_out_takes_whole_groups(share):
    """Groups stay together, neither side is empty, the share is met to within a group."""
    everything = movies(10, 4) + named(*(f"img{i}" for i in range(13)))
    for seed in range(5):
        held = data.hold_out(everything, share, seed)
        groups = {data.group_of(e.name) for e in held}
        assert 0 < len(held) < len(everything)
        assert held == [e for e in everything if data.group_of(e.name) in groups]
        assert abs(len(held) - share * 53) <= 4
        assert {e.name for e in data.hold_out(everything[::-1], share, seed)} == {e.name for e in held}
    assert len({tuple(e.name for e in data.hold_out(everything, 0.3, seed)) for seed in range(5)}) > 1


def test_hold_out_of_few():
    assert data.hold_out(named("a"), 0.5, 0) == [] and data.hold_out(named("a", "b"), 0, 0) == []
    assert len(data.hold_out(named("a", "b"), 0.01, 0)) == len(data.hold_out(named("a", "b"), 1, 0)) == 1
    frames = movies(1, 10)
    assert data.hold_out(frames, 0.2, 0) == frames[-2:] and data.hold_out(frames, 1, 0) == frames[1:]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=3, max_size=25), st.sampled_from([(0.6, 0.2, 0.2), (0.9, 0.1)]))
def test_sides_are_balanced_by_images(sizes, fractions):
    """No side is empty, and each is as large as wanted to within the largest group."""
    groups = {f"g{i}": ("", size) for i, size in enumerate(sizes)}
    sides = data._divide(groups, fractions, seed=1)
    assert sides.keys() == groups.keys()
    for side, fraction in enumerate(fractions):
        have = sum(groups[group][1] for group in sides if sides[group] == side)
        assert have > 0 and abs(have - fraction * sum(sizes)) <= max(sizes)


def table(path: Path) -> list[dict]:
    return list(csv.DictReader(path.open(encoding="utf-8"), delimiter="\t"))


def test_split_by_donor(tmp_path, capsys):
    source, out = tmp_path / "in", tmp_path / "out"
    for donor in range(6):
        for tile in range(donor + 1):
            pair(source, f"donor-{donor}_tile{tile}", 10 * donor + tile, "{}_masks.tif", "{}.tif")
    keys = ("by=donor", "fractions=0.6,0.2,0.2")
    assert "train: " in command("split", source, *keys, capsys=capsys)
    rows = table(source / "split.tsv")
    assert [r["name"] for r in rows] == [e.name for e in data.examples(source)]
    assert all(r["group"] == r["name"][6] for r in rows)
    assert len({(r["group"], r["split"]) for r in rows}) == 6
    counts = [sum(r["split"] == side for r in rows) for side in ("train", "validation", "test")]
    assert sum(counts) == 21 and abs(counts[0] - 12.6) <= 2 and abs(counts[1] - 4.2) <= 2

    command("split", source, *keys, f"out={out}", capsys=capsys)
    assert (out / "split.tsv").read_bytes() == (source / "split.tsv").read_bytes()         # deterministic
    for row in rows:
        moved = {e.name: e for e in data.examples(out / row["split"])}[row["name"]]
        origin = {e.name: e for e in data.examples(source)}[row["name"]]
        assert np.array_equal(moved.image().pixels, origin.image().pixels)
        assert np.array_equal(moved.labels(), origin.labels())
    assert "written for something else" in command("split", source, f"out={out}", code=1, capsys=capsys)
    assert "written for something else" in command("split", source, code=1, capsys=capsys)

    text = (out / "split.tsv").read_text().replace("donor-5_tile0\ttrain", "donor-5_tile0\ttest")
    assert "donor-5_tile0\ttest" in text
    (out / "split.tsv").write_text(text)
    assert "5 is in test and in train" in command("check", out, code=1, capsys=capsys)


def test_split_with_a_pattern_and_without_donors(tmp_path, capsys):
    for name in ("77_x", "77_y", "81_x", "90_z"):
        pair(tmp_path, name, 0)
    error = command("split", tmp_path, "by=donor", code=1, capsys=capsys)
    assert "no donor in the name 77_x" in error and not (tmp_path / "split.tsv").exists()
    command("split", tmp_path, "by=donor", "pattern=^([0-9]+)_", capsys=capsys)
    assert [row["group"] for row in table(tmp_path / "split.tsv")] == ["77", "77", "81", "90"]
    for keys, problem in ((("pattern=(", "by=donor"), "not a regular expression"),
                          (("pattern=_x", "by=donor"), "one group"), (("fractions=0.5,0.4",), "add up to 1"),
                          (("fractions=1",), "two or three"),
                          (("stratify=dataset",), "77_x lies in no folder of its own"),
                          (("by=donor", "pattern=^(7)", "match=^7"), "1 donors for 2 sides")):
        assert problem in command("split", tmp_path, *keys, code=1, capsys=capsys)


def test_recipes_for_tiles(tmp_path, capsys):
    """configs/if_*.yaml: donors split once; of them one marker, or the marker's channel alone."""
    for donor in range(4):
        for marker in ("AT8", "GFAP"):
            for c in (0, 1):
                save(tmp_path / "in" / f"case{donor}_{marker}_b0c{c}x0.tif", picture(10 * donor + c))
            save(tmp_path / "in" / f"case{donor}_{marker}_b0c0x0_masks.png", blobs(donor))
    command("split", tmp_path / "in", "by=donor", f"out={tmp_path}/if", "fractions=0.5,0.5", capsys=capsys)
    train = data.examples(tmp_path / "if" / "train")
    assert len(train) == 4 and train[0].image().channels == ("DAPI", "marker")
    command("convert", tmp_path / "if" / "train", tmp_path / "AT8", "match=AT8", capsys=capsys)
    command("convert", tmp_path / "if" / "train", tmp_path / "marker", "channels=marker", capsys=capsys)
    assert [e.name for e in data.examples(tmp_path / "AT8")] == [e.name for e in train if "AT8" in e.name]
    for both, alone in zip(train, data.examples(tmp_path / "marker"), strict=True):
        assert np.array_equal(alone.image().pixels, both.image().pixels[1:])
        assert np.array_equal(alone.labels(), both.labels())


def test_split_stratified(tmp_path, capsys):
    """Ten per cent of each data set, not of their sum."""
    for dataset, n in (("livecell", 30), ("cyto", 20), ("small", 3)):
        for i in range(n):
            pair(tmp_path / dataset / "train", f"{i:03d}", i)
    command("split", tmp_path, "by=image", "stratify=dataset", "fractions=0.9,0.1", capsys=capsys)
    rows = table(tmp_path / "split.tsv")
    held = [row["dataset"] for row in rows if row["split"] == "validation"]
    assert held.count("livecell") == 3 and held.count("cyto") == 2 and len(held) in (5, 6)


# ------------------------------------------------------------------------------------------ convert and check

def test_convert_keeps_pixels_names_and_pixel_size(tmp_path, capsys):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    stack = np.random.default_rng(0).normal(size=(2, 24, 31))
    written = {"axes": "CYX", "Channel": {"Name": ["DNA", "ER"]}, "PhysicalSizeX": .65, "PhysicalSizeY": .65}
    for dtype in ("uint16", "float32", "float64", "int16", "int64"):
        tifffile.imwrite(source / f"{dtype}.tif", (1000 * stack).astype(dtype), photometric="minisblack",
                         ome=dtype != "int64", metadata=written)
        save(source / f"{dtype}_masks.tif", blobs(0).astype(np.uint32) * 30000)
    command("convert", source, out, capsys=capsys)
    for before, after in zip(data.examples(source), data.examples(out), strict=True):
        one, two = before.image(), after.image()
        assert before.name == after.name and two.pixels.dtype == one.pixels.dtype
        assert np.array_equal(one.pixels, two.pixels) and np.array_equal(before.labels(), after.labels())
        assert (one.channels, one.pixel_size) == (two.channels, two.pixel_size)
    assert data.examples(out)[0].image().channels == ("DNA", "ER")
    assert data.examples(out)[0].image().pixel_size == pytest.approx(0.65)


def test_convert_every_layout_and_go_on(tmp_path, capsys):
    source, out = tmp_path / "in", tmp_path / "out"
    pair(source / "pairs", "p", 0)
    for name, array in (("dsb/ab/images/ab.png", picture(1)), ("dsb/ab/masks/1.png", np.uint8(blobs(1) == 1)),
                        ("npy/imgs.npy", picture(2)[None]), ("npy/anns.npy", blobs(2)[None]),
                        ("ctc/01/t000.tif", picture(3)), ("ctc/01_GT/SEG/man_seg000.tif", blobs(3)),
                        ("coco/c.tif", picture(4)), ("qupath/q.tif", picture(5))):
        save(source / name, array)
    coco(source / "coco", {"c.tif": [[SQUARE]]})
    cells.write_geojson(source / "qupath" / "q.geojson", holed(5))
    before = data.examples(source)
    assert len(before) == 6
    assert "6 images written, 0 were there" in command("convert", source, out, capsys=capsys)
    after = data.examples(out)
    assert [e.name for e in before] == [e.name for e in after]
    for one, two in zip(before, after):
        assert np.array_equal(one.image().pixels, two.image().pixels)
        assert np.array_equal(one.labels(), two.labels()) and one.labels().any()

    bytes_before = {path: path.read_bytes() for path in out.rglob("*.tif")}
    (out / "pairs" / "p.tif").unlink()
    assert "1 images written, 5 were there" in command("convert", source, out, capsys=capsys)
    assert {path: path.read_bytes() for path in out.rglob("*.tif")} == bytes_before
    error = command("convert", source, out, "channels=1", code=1, capsys=capsys)
    assert "converted.txt: written for something else" in error
    assert not list(out.rglob(".*"))


def test_convert_stops_before_half_a_pair(tmp_path, capsys):
    pair(tmp_path / "in", "a", 0), pair(tmp_path / "in", "b", 1)
    save(tmp_path / "in" / "b_masks.png", blobs(0, (10, 10)))
    error = command("convert", tmp_path / "in", tmp_path / "out", code=1, capsys=capsys)
    assert "b.png: (24, 31) px, labels (10, 10)" in error
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.tif", "a_masks.tif", "converted.txt"]
    within = command("convert", tmp_path / "in", tmp_path / "in" / "x", code=1, capsys=capsys)
    assert "choose a folder outside" in within and not (tmp_path / "in" / "x").exists()


def test_planes_of_stacks_become_images(tmp_path, capsys):
    """Every second plane that has three cells, numbered anew, under a name that keeps the planes of a stack together."""
    stack = np.random.default_rng(0).integers(0, 999, (5, 30, 40)).astype(np.uint16)
    labels = np.zeros((5, 30, 40), np.uint16)
    for cell, z in enumerate((0, 0, 0, 2, 2, 4, 4, 4, 4, 1, 1, 1)):
        labels[z, 2 * cell:2 * cell + 2, 5:20] = 7 * cell + 3
    (tmp_path / "in").mkdir()
    tifffile.imwrite(tmp_path / "in" / "ovule.tif", stack)
    tifffile.imwrite(tmp_path / "in" / "ovule_labels.tif", labels)
    assert data.main(data.Options(every=2), ["planes", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    found = data.examples(tmp_path / "out")
    assert [example.name for example in found] == ["ovule_z000", "ovule_z004"] and "2 planes" in capsys.readouterr().out
    for example, z in zip(found, (0, 4)):
        np.testing.assert_array_equal(example.image().pixels[0], stack[z])
        np.testing.assert_array_equal(example.labels() > 0, labels[z] > 0)
        assert len(np.unique(example.labels())) - 1 == example.labels().max() == len(np.unique(labels[z])) - 1
    assert {data.group_of(example.name) for example in found} == {"ovule"}
    tifffile.imwrite(tmp_path / "in" / "flat_labels.tif", labels[0])
    tifffile.imwrite(tmp_path / "in" / "flat.tif", stack[0])
    with pytest.raises(ValueError, match=r"flat_labels.tif: .* expected \(Z, Y, X\)"):
        data.main(data.Options(every=2), ["planes", str(tmp_path / "in"), str(tmp_path / "out")])
    with pytest.raises(ValueError, match="no NAME_labels.tif"):
        data.main(data.Options(), ["planes", str(tmp_path / "out"), str(tmp_path / "x")])


def test_check_lists_everything(tmp_path, capsys):
    one, two = tmp_path / "train", tmp_path / "test"
    for i in range(3):
        pair(one, f"fine{i}", i), pair(two, f"new{i}", 10 + i)
    n = sum(int(blobs(i).max()) for i in (0, 1, 2, 10, 11, 12))
    assert command("check", one, two, capsys=capsys).strip() == f"6 images, {n} cells: clean"

    save(one / "alone.png", picture(90)), save(one / "nobody_masks.png", blobs(0))
    save(one / "fine0_masks.png", np.eye(10, dtype=np.uint8))
    pieces = np.zeros((24, 31), np.uint8)
    pieces[2:4, 2:4] = pieces[10:12, 2:4] = 7
    save(one / "fine1_masks.png", pieces)
    (one / "fine2_masks.png").unlink(), save(one / "fine2_masks.tif", np.ones((24, 31), np.float32))
    save(two / "again.tif", picture(1)), save(two / "again_masks.png", pieces * 0)
    lines = command("check", one, two, code=1, capsys=capsys).splitlines()
    expected = [r"alone.png: an image without labels", r"nobody_masks.png: labels without image",
                r"fine0: image of \(24, 31\) px, labels of \(10, 10\)",
                r"fine1: 1 of 1 cells in pieces, \[7\]",
                r"fine2: .*fine2_masks.tif: .*float32, expected labels",
                r"the same image: .*train: fine1, .*test: again",
                r"6 images, \d+ cells: 6 problems"]
    assert len(lines) == len(expected)
    for pattern in expected:
        assert sum(bool(re.search(pattern, line)) for line in lines) == 1, (pattern, lines)


@pytest.mark.parametrize("arguments, problem", [
    ((), "got nothing, expected convert"), (("chek", "."), "got chek"), (("check",), "DIR"),
    (("convert", "."), "expected SRC DST"), (("check", ".", "seed=3"), "check does not use seed="),
    (("split", ".", "by=doner"), "image or group or donor"), (("check", "gone"), "gone: no such folder"),
    (("check", ".", "match=("), "match=(: not a regular expression"), (("check", "--fast"), "unknown option"),
    (("check", ".", "chanels=1"), "did you mean 'channels'")])
def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch, arguments, problem):
    pair(tmp_path, "x", 0)
    monkeypatch.chdir(tmp_path)
    error = command(*arguments, code=1, capsys=capsys)
    assert problem in error and error.startswith("error: ") and error.count("\n") == 1


def test_as_a_command(tmp_path):
    """In a process of its own: help names every key and needs no torch, check tells by its exit code."""
    script, folder = data.__file__, Path(data.__file__).parent
    help_without_torch = f"""import runpy, sys; sys.argv[1:] = ['--help']
try: runpy.run_path({script!r}, None, '__main__')
finally: assert 'torch' not in sys.modules"""
    told = subprocess.check_output([sys.executable, "-c", help_without_torch], text=True, cwd=folder)
    assert all(f"  {field}=" in told for field in data.Options.__dataclass_fields__) and "man_seg" in told
    pair(tmp_path, "x", 0), save(tmp_path / "y.png", picture(1))
    done = subprocess.run([sys.executable, script, "check", tmp_path], capture_output=True, text=True)
    assert done.returncode == 1 and "y.png: an image without labels" in done.stdout and not done.stderr


def test_shared_sets(shared):
    """Every image of the manifest is found, with as many instances as it says, of each kind of labels."""
    root = shared / "data"
    rows = {row["image"].rpartition(".")[0]: row for row in csv.DictReader(open(root / "manifest.csv"))}
    assert {example.name for example in data.examples(root)} == rows.keys()
    for kind in ("nuclei", "cells"):
        found = {example.name: example for example in data.examples(root, labels=kind)}
        with_kind = {name for name, row in rows.items() if kind in row["labels"].split(";")}
        assert found.keys() == with_kind
        for name in with_kind:
            if "dsb2018" not in name:                              # the large ones; they are only found
                counts = dict(zip(rows[name]["labels"].split(";"), rows[name]["n_instances"].split(";")))
                labels = found[name].labels()
                assert np.count_nonzero(np.unique(labels)) == int(counts[kind])
                assert labels.shape == (int(rows[name]["height"]), int(rows[name]["width"]))
