"""downstream.py with cohort.py: tiles, shards, tables, the page, mistakes."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from xml.etree import ElementTree

import numpy as np
import pytest
import tifffile
import torch
import yaml
from scipy import stats

import association
import cohort
import downstream
import runs
import synthetic
from conftest import ROOT

WEIGHTS = ROOT / "final_models/demo_synthetic.pt"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the processes started here have: the number of threads changes how sums in bfloat16 are rounded."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------ tiles and shards


def test_intensity_of_cells():
    rng = np.random.default_rng(7)
    labels, marker = rng.integers(0, 6, (40, 50)), rng.integers(0, 60000, (40, 50)).astype(np.uint16)
    cells = [marker[labels == i] for i in range(1, 6)]
    assert cohort.intensity(labels, marker) == pytest.approx([cell.mean() for cell in cells], rel=1e-14)
    for percentile in (0, 33.3, 75, 100):
        assert cohort.intensity(labels, marker, percentile) == pytest.approx(
            [np.percentile(cell, percentile) for cell in cells], rel=1e-14
        )
    assert len(cohort.intensity(np.zeros((3, 3), int), marker[:3, :3])) == 0


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.lower().endswith((".tif", ".tiff")):
            tifffile.imwrite(folder / name, np.zeros((4, 4), np.uint16))
        else:
            (folder / name).write_text("")


PATTERN = downstream.Config(models=(downstream.Model("m", "w"),)).pattern


def test_tiles_are_pairs(tmp_path):
    touch(
        tmp_path,
        "donor_1/s2b0c0x7-9.tif",
        "donor_1/s2b0c1x7-9.tif",
        "donor_2/a_b0c0.tiff",
        "donor_2/a_b0c1.TIF",
        "donor_2/only_b0c0.tif",
        "donor_2/alone_b0c1.tif",
        "donor_2/a_b0c2.tif",
        "donor_2/info.xml",
        "x/b0c0.tif",
        "x/b0c1.tif",
        ".hidden/donor_3_b0c0.tif",
        "donor_2/twice_b0c0.tif",
        "donor_2/twice_b0c0.tiff",
        "donor_2/twice_b0c1.tif",
        "donor_2/a_b0c0.png.txt",
    )
    tiles, lost, passed = cohort.find_tiles(tmp_path, PATTERN)
    assert [(tile.name, tile.donor) for tile in tiles] == [
        ("donor_1/s2b0c0x7-9", "1"),
        ("donor_2/a_b0c0", "2"),
    ]
    assert [path.name for path in tiles[1].files] == ["a_b0c0.tiff", "a_b0c1.TIF"] and passed == 3
    assert sorted(lost) == ["donor_2/alone_b0c0", "donor_2/only_b0c0", "donor_2/twice_b0c0", "x/b0c0"]
    assert lost["donor_2/only_b0c0"] == "no images of the marker" and "no donor" in lost["x/b0c0"]
    assert lost["donor_2/twice_b0c0"].startswith("2 images of the nuclei twice_b0c0.tif, ")
    tiles, _, _ = cohort.find_tiles(tmp_path, PATTERN, donor="^([^/_]+)")
    assert [tile.donor for tile in tiles] == ["donor", "donor", "x"]
    swapped, _, _ = cohort.find_tiles(tmp_path, r"c(?P<channel>\d)(?=x7|\.|$)", nuclei="1", marker="0")
    assert [path.name for path in swapped[0].files] == ["s2b0c1x7-9.tif", "s2b0c0x7-9.tif"]


def test_folders_without_tiles(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        cohort.find_tiles(tmp_path / "none", PATTERN)
    with pytest.raises(ValueError, match="no tiles; none of its 0 files"):
        cohort.find_tiles(tmp_path, PATTERN)
    touch(tmp_path, "a.tif", "meta.xml")
    with pytest.raises(ValueError, match="no tiles; none of its 2 files is a .tif"):
        cohort.find_tiles(tmp_path, PATTERN)
    touch(tmp_path, "b0c0.tif", "b0c1.tif")
    with pytest.raises(ValueError, match="none of 1 tiles can be used; b0c0: no donor"):
        cohort.find_tiles(tmp_path, PATTERN)


def test_thresholds():
    rng = np.random.default_rng(8)
    done = [
        {"donor": name, "tile": f"{name}{i}", "dtype": "uint16", "intensity": list(rng.normal(centre, 1, 40))}
        for name, centre in (("a", 0), ("b", 20), ("control", 1))
        for i in range(3)
    ]
    cells = {
        name: np.concatenate([line["intensity"] for line in done if line["donor"] == name])
        for name in ("a", "b", "control")
    }
    whole = cohort.thresholds(done, "otsu")
    assert set(whole) == set(cells) and len(set(whole.values())) == 1 and 5 < whole["a"] < 16
    assert cohort.thresholds(done, "fixed", 7.5) == dict.fromkeys(cells, 7.5)
    found = cohort.thresholds(done, "controls", controls=["control"], percentile=90)
    assert found["b"] == pytest.approx(np.percentile(cells["control"], 90))
    own = cohort.thresholds(done, "otsu_per_donor")
    shares = {name: np.mean(values > own[name]) for name, values in cells.items()}
    assert max(shares.values()) - min(shares.values()) < 0.2  # what the warning says: the difference is gone
    with pytest.raises(ValueError, match="controls=zz: no tiles of it; donors are a, b, control"):
        cohort.thresholds(done, "controls", controls=["zz"])
    done[0]["dtype"] = "uint8"
    with pytest.raises(ValueError, match=r"tiles have pixels of uint8 \(a0\), uint16 \(a1\)"):
        cohort.thresholds(done, "fixed", 7.5)
    with pytest.raises(
        ValueError, match="threshold=otsu: marker intensities are 0 values that are all equal"
    ):
        cohort.thresholds([{**done[0], "intensity": []}], "otsu")


# -------------------------------------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Eight donors of two tiles, and two tiles that cannot be used; positive cells are five times as bright."""
    folder, rng = tmp_path_factory.mktemp("study"), np.random.default_rng(9)
    rows = ["donor\tnft\tbraaksc\tage\tsex"]
    for d in range(8):
        for t in range(2):
            drawn = synthetic.field(100 + 2 * d + t, 96, 8, 28)
            nuclei, marker = (drawn.pixels[drawn.channels.index(name)] for name in ("DNA", "AGP"))
            on = np.arange(drawn.labels.max() + 1) % 8 < d + 1
            on[0] = False
            marker = (marker / marker.mean() * 300 * (1 + 4 * on[drawn.labels])).clip(0, 65535)
            place = folder / "tiles" / f"donor_{d}"
            place.mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(place / f"t{t}_b0c0.tif", nuclei)
            tifffile.imwrite(place / f"t{t}_b0c1.tif", marker.astype(np.uint16))
        rows.append(
            f"{d}\t{d + rng.normal():.3f}\t{'NA' if d == 3 else d // 2}\t{60 + 5 * (d % 3)}\t{'mf'[d % 2]}"
        )
    (folder / "tiles/donor_0/scan.xml").write_text("<scan/>")
    (folder / "tiles/donor_5/t2_b0c0.tif").write_bytes(b"no image")
    (folder / "tiles/donor_5/t2_b0c1.tif").write_bytes(b"no image")
    tifffile.imwrite(folder / "tiles/donor_6/t2_b0c1.tif", np.zeros((96, 96), np.uint16))
    (folder / "outcomes.tsv").write_text("\n".join([*rows, "77\t1\t1\t70\tf"]) + "\n")
    return folder


def configured(study, folder, **changes):
    path = folder / "c.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "out": str(folder / "results"),
                "tiles": str(study / "tiles"),
                "outcomes": str(study / "outcomes.tsv"),
                "models": [
                    {"name": "base", "weights": str(WEIGHTS), "peak": 0.6},
                    {"name": "tuned", "weights": str(WEIGHTS)},
                ],
                "columns": ["nft", "braaksc"],
                "min_tiles": 1,
                "min_cells": 3,
                "redraws": 50,
                "resamples": 100,
                "device": "cpu",
                **changes,
            }
        )
    )
    return path


def command(*words):
    return subprocess.run(
        [sys.executable, str(ROOT / "downstream.py"), *map(str, words)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )


def step(path, *words):
    """A step in this process: torch is loaded already."""
    return downstream.main(
        runs.load(downstream.Config, path, [w for w in words if "=" in w]), [w for w in words if "=" not in w]
    )


def table(path):
    return cohort.read_table(path, (), "")


@pytest.fixture(scope="module")
def whole(study, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    done = command(
        configured(
            study, out, experiments=[{"name": "E1", "table": str(out / "e1.tsv"), "columns": ["AP@0.5"]}]
        ),
        "--check",
    )
    assert (
        done.returncode == 0 and "16 tiles" not in done.stderr and not (out / "results").exists()
    ), done.stderr
    assert "17 tiles of 8 donors" in done.stdout and "9 donors, 8 of them with tiles" in done.stdout
    (out / "e1.tsv").write_text("model\tset\tAP@0.5\nbase\ta\t0.5\nbase\tb\t0.7\nother\ta\t-\n")
    done = command(out / "c.yaml")
    assert done.returncode == 0, done.stderr
    return out, done


def test_all_steps(study, whole):
    out, done = whole
    assert "warning" in done.stderr and "t2_b0c0.tif" in done.stderr
    for name in ("base", "tuned"):
        folder = out / "results/full_inference" / name
        counts, skipped = table(folder / "tile_counts.tsv"), table(folder / "skipped.tsv")
        assert f"{name}: 18 tiles found = 16 done + 2 skipped" in done.stdout
        assert [row["tile"] for row in skipped] == ["donor_5/t2_b0c0", "donor_6/t2_b0c0"]
        assert len(counts) == 16 and {row["donor"] for row in counts} == set("01234567")
        lines = {line["tile"]: line for line in cohort.lines(folder / "shards/1_of_1.jsonl")}
        cut = association.otsu(
            np.concatenate([line["intensity"] for line in lines.values() if "why" not in line])
        )
        for row in counts:
            above = np.array(lines[row["tile"]]["intensity"]) > cut
            assert (int(row["positive"]), int(row["cells"])) == (above.sum(), len(above))
            assert float(row["threshold"]) == pytest.approx(cut) and len(row["model_sha256"]) == 16
    ratios = [row for row in table(out / "results/donor_marker_ratio.tsv") if row["model"] == "tuned"]
    for row in ratios:  # counts is of the model tuned
        mine = [each for each in counts if each["donor"] == row["donor"]]
        sums = [sum(int(each[what]) for each in mine) for what in ("positive", "cells")]
        assert float(row["ratio"]) == pytest.approx(sums[0] / sums[1]) and row["tiles"] == str(len(mine))
        assert float(row["low"]) <= float(row["ratio"]) <= float(row["high"])
        assert row["interval"] == "too narrow: fewer than 20 tiles" and row["flag"] == ""
    outcomes = {row["donor"]: row for row in table(study / "outcomes.tsv")}
    x = [float(row["ratio"]) for row in ratios]
    found = {(row["model"], row["outcome"]): row for row in table(out / "results/e5_spearman.tsv")}
    assert float(found["tuned", "nft"]["rho"]) == pytest.approx(
        stats.spearmanr(x, [float(outcomes[row["donor"]]["nft"]) for row in ratios]).statistic, abs=1e-9
    )
    assert found["tuned", "nft"]["n"] == "8" and found["base", "braaksc"]["n"] == "7"
    assert found["tuned", "nft"]["p_from"] == "exact"
    p = [float(found["tuned", name]["p"]) for name in ("nft", "braaksc")]
    assert [float(found["tuned", name]["q"]) for name in ("nft", "braaksc")] == pytest.approx(
        stats.false_discovery_control(p), rel=1e-9
    )
    assert {row["donor"]: row["status"] for row in table(out / "results/e5_donors.tsv")} == {
        **dict.fromkeys("01234567", "used"),
        "77": "no tiles",
    }
    redraws = [float(row["nft"]) for row in table(out / "results/e5_redraws.tsv") if row["model"] == "tuned"]
    stable = next(
        row
        for row in table(out / "results/e5_bootstrap_stability.tsv")
        if (row["model"], row["outcome"]) == ("tuned", "nft")
    )
    assert len(redraws) == 50 and float(stable["median"]) == pytest.approx(np.median(redraws))
    assert float(stable["same_sign"]) == np.mean(np.sign(redraws) == np.sign(float(stable["rho"])))
    change = table(out / "results/e5_difference.tsv")[0]
    assert float(change["difference"]) == pytest.approx(
        float(found["tuned", "nft"]["rho"]) - float(found["base", "nft"]["rho"]), abs=1e-9
    )


def test_the_page(whole):
    out, _ = whole
    text = (out / "results/report.html").read_text(encoding="utf-8")
    charts = [ElementTree.fromstring(chart) for chart in re.findall("<svg.*?</svg>", text, re.DOTALL)]
    assert sum("role" in chart.attrib for chart in charts) == 1 + 2 + 2  # forest, dots, histograms
    assert not re.search(r"(src|href)=\"(?!data:)|@import|<script", text)
    for said in ("donor_6/t2_b0c0", "no images of the nuclei", "E1 AP@0.5", "0.600", "E5 q &lt; 0.05"):
        assert said in text


def test_the_same_command_does_nothing_twice(study, whole, monkeypatch, capsys):
    out, _ = whole
    shard = out / "results/full_inference/tuned/shards/1_of_1.jsonl"
    before = sorted(shard.read_text().splitlines())
    monkeypatch.setattr(downstream.Network, "measure", lambda *_: pytest.fail("a tile was done again"))
    assert step(out / "c.yaml", "infer") == 0  # what was skipped is tried again, and skipped again
    assert sorted(shard.read_text().splitlines()) == before
    assert step(out / "c.yaml", "merge") == 0
    assert "16 done + 2 skipped" in capsys.readouterr().out


def test_another_rule_takes_the_old_lines_another_statistic_does_not(whole, capsys):
    out, _ = whole
    with pytest.raises(ValueError, match="17 of 17 tiles are not done with these settings"):
        step(out / "c.yaml", "merge", "statistic=percentile")
    assert step(out / "c.yaml", "merge", "threshold=fixed", "value=900") == 0
    counts = table(out / "results/full_inference/tuned/tile_counts.tsv")
    assert {row["threshold"] for row in counts} == {"900"}
    capsys.readouterr()
    assert step(out / "c.yaml", "merge", "threshold=otsu_per_donor") == 0
    assert "erases the differences between donors" in capsys.readouterr().err
    assert step(out / "c.yaml", "merge") == 0


def test_lines_of_other_channels_or_folders_are_not_taken(whole, study):
    """A tile is called after its image of nuclei alone."""
    out, _ = whole
    assert step(out / "c.yaml", "merge") == 0
    config = runs.load(downstream.Config, out / "c.yaml")
    keys = {downstream.key(dataclasses.replace(config.models[0], **of), dataclasses.replace(config, **change)) for of, change in (
        ({}, {}), ({}, dict(marker="2")), ({}, dict(nuclei="1", marker="0")), ({}, dict(tiles="elsewhere")),
        ({}, dict(pattern=r"b1c(?P<channel>\d+)")), (dict(kind="phase"), {}), (dict(peak=0.5), {}), (dict(sees="marker"), {}))}
    assert len(keys) == 8
    same = [downstream.key(config.models[0], dataclasses.replace(config, **change)) for change in (
        dict(shard="2/3"), dict(threshold="fixed", value=9), dict(donor="x(.)"), dict(out="other"))]
    assert set(same) == {downstream.key(config.models[0], config)}
    with pytest.raises(ValueError, match="17 of 17 tiles are not done with these settings"):
        step(out / "c.yaml", "merge", "marker=0", "nuclei=1")


def test_donors_are_those_of_now(whole, capsys):
    """Not those of the day when the tiles were done."""
    out, _ = whole
    assert step(out / "c.yaml", "merge", "donor=donor_[0-9]/(t[0-9])") == 0
    counts = table(out / "results/full_inference/tuned/tile_counts.tsv")
    assert {row["donor"] for row in counts} == {"t0", "t1"}
    assert step(out / "c.yaml", "merge") == 0


def test_tiles_of_several_kinds_are_told(whole, study, tmp_path, capsys):
    out, _ = whole
    shutil.copytree(out / "results", tmp_path / "results")
    path = configured(study, tmp_path)
    assert step(path, "merge") == 0 and "kinds of images" not in capsys.readouterr().err
    shard = tmp_path / "results/full_inference/tuned/shards/1_of_1.jsonl"
    assert shard.read_text().count('"kind": "shared"') == 16
    shard.write_text(shard.read_text().replace('"kind": "shared"', '"kind": "phase"', 3))
    assert step(path, "merge") == 0
    said = capsys.readouterr().err
    assert "model 'tuned': tiles went through" in said and "13 as shared, 3 as phase" in said and "'base'" not in said


def test_four_shards_are_one_run_also_when_one_is_killed(study, whole, tmp_path):
    path = configured(study, tmp_path)
    folders = [tmp_path / "results/full_inference" / name for name in ("base", "tuned")]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "downstream.py"), "infer", str(path), "shard=2/4"],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    shard, deadline = folders[1] / "shards/2_of_4.jsonl", time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if shard.exists() and shard.stat().st_size:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with open(shard, "a") as file:  # and it died in the middle of a line
        file.write('{"tile": "donor_7/t1_b0')
    for number in (1, 3, 4):
        assert step(path, "infer", f"shard={number}/4") == 0
    with pytest.raises(ValueError, match="tiles are not done with these settings"):
        step(path, "merge")
    assert step(path, "infer", "shard=2/4") == 0
    for folder in folders:
        shards = [path.read_text().splitlines() for path in sorted(folder.glob("shards/*_of_4.jsonl"))]
        names = [json.loads(text)["tile"] for texts in shards for text in texts]
        assert len(names) == len(set(names)) == 17 and [len(texts) for texts in shards] == [5, 4, 4, 4]
    assert step(path, "merge", "threshold=otsu") == 0
    assert step(whole[0] / "c.yaml", "merge") == 0
    for name in ("base", "tuned"):
        one, four = (
            [
                {k: v for k, v in row.items() if k != "seconds"}
                for row in table(out / "results/full_inference" / name / "tile_counts.tsv")
            ]
            for out in (whole[0], tmp_path)
        )
        assert one == four and len(four) == 16


def test_a_warned_shard_asks_to_be_queued_again(study, tmp_path, monkeypatch):
    path, measure = configured(study, tmp_path), downstream.Network.measure

    def preempted(self, pixels):
        os.kill(os.getpid(), signal.SIGTERM)
        return measure(self, pixels)

    def counted():
        return [len(cohort.lines(path)) for path in tmp_path.glob("results/full_inference/*/shards/*")]

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(downstream.Network, "measure", preempted)
    assert step(path, "infer", "shard=1/8") == runs.REQUEUE and signal.getsignal(signal.SIGTERM) is before
    assert counted() == [1, 1]
    monkeypatch.setattr(downstream.Network, "measure", measure)
    assert step(path, "infer", "shard=1/8") == 0
    assert counted() == [3, 3]


def test_a_shard_alone_must_know_of_how_many_it_is_one(tmp_path):
    """slurm/array.sh with a stand-in for srun; tests/test_slurm.py has the rest."""
    (tmp_path / "srun").write_text('#!/bin/bash\necho "${@: -1}"\n')
    (tmp_path / "srun").chmod(0o755)
    (tmp_path / "say.py").write_text("")

    def job(number, first, last, count, **more):
        environment = dict(PATH=f"{tmp_path}:/usr/bin:/bin", SLURM_SUBMIT_DIR=str(tmp_path), **more)
        for name, value in zip(("ID", "MIN", "MAX", "COUNT"), (number, first, last, count)):
            environment[f"SLURM_ARRAY_TASK_{name}"] = str(value)
        words = ["bash", str(ROOT / "slurm/array.sh"), "say.py", "c.yaml"]
        return subprocess.run(words, capture_output=True, text=True, env=environment)

    assert job(3, 1, 4, 4).stdout == "shard=3/4\n"
    alone = job(3, 3, 3, 1)
    assert alone.returncode == 2 and "say SHARDS=n" in alone.stdout
    assert job(3, 3, 3, 1, SHARDS="4").stdout == "shard=3/4\n"


def test_left_out_donors_and_covariates(study, whole, tmp_path):
    path = configured(study, tmp_path, covariates=["age"], categories=["sex"], family="all")
    (tmp_path / "full_inference").symlink_to(whole[0] / "results/full_inference")
    (tmp_path / "outcomes.tsv").write_text((study / "outcomes.tsv").read_text().replace("\n2\t", "\nwho\t"))
    words = (f"out={tmp_path}", f"outcomes={tmp_path / 'outcomes.tsv'}", "controls=4")
    assert (
        step(path, "ratios", *words) == step(path, "associate", *words) == step(path, "report", *words) == 0
    )
    assert "corrected for age, sex" in (tmp_path / "report.html").read_text()
    status = {row["donor"]: row["status"] for row in table(tmp_path / "e5_donors.tsv")}
    assert status == {
        **dict.fromkeys("013567", "used"),
        "2": "not in outcomes.tsv",
        "4": "negative control",
        "77": "no tiles",
        "who": "no tiles",
    }
    rows = {(row["model"], row["outcome"]): row for row in table(tmp_path / "e5_spearman.tsv")}
    assert (
        rows["base", "braaksc"]["left_out"] == "too few donors" and rows["base", "nft"]["covariates"] == "2"
    )
    assert {row["n"] for row in rows.values()} == {"6", "5"} and not rows["tuned", "braaksc"]["rho"]
    p = [float(rows[model, "nft"]["p"]) for model in ("base", "tuned")]  # the family is of both models
    assert [float(rows[model, "nft"]["q"]) for model in ("base", "tuned")] == pytest.approx(
        stats.false_discovery_control(p), rel=1e-9
    )

    cells = {}
    for row in table(tmp_path / "donor_marker_ratio.tsv"):
        cells[row["donor"]] = min(int(row["cells"]), cells.get(row["donor"], 10**6))
    limit = sorted(cells.values())[4]
    assert step(path, "associate", *words, f"min_cells={limit}") == 0
    again = {row["donor"]: row["status"] for row in table(tmp_path / "e5_donors.tsv")}
    assert {name for name, why in again.items() if why == f"fewer than {limit} cells"} == {
        name for name, count in cells.items() if count < limit and name != "4"
    }
    assert step(path, "associate", *words, "min_tiles=3") == 0
    assert {row["left_out"] for row in table(tmp_path / "e5_spearman.tsv")} == {"too few donors"}


# ----------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "text,said",
    [
        ("donor\ty\na\t1\nb\t2\na\t3\n", "line 4: donor a stands in line 2 already"),
        ("donor\ty\na\t1\nb\tfew\n", "line 3, donor b: y is 'few', expected a number"),
        ("donor\ty\na\tinf\n", "line 2, donor a: y is 'inf'"),
        ("donor\tz\na\t1\n", "no columns 'y', expected one; columns are donor, z"),
        ("donor\tY\ty2\na\t1\t1\n", "no columns 'y', expected one; did you mean"),
        ("donor,y\na,1\nb,2,3\n", "line 3: 3 values, expected 2 as in line 1"),
        ("donor\ty\n\t1\n", "line 2: no donor in column donor"),
        ("", "no columns 'donor', expected one"),
        ("donor\ty\n" + "\xe9\t1\n", "no text in UTF-8"),
    ],
)
def test_outcome_tables_with_mistakes(tmp_path, text, said):
    (tmp_path / "o.tsv").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        cohort.read_donors(tmp_path / "o.tsv", "donor", ["y"])
    assert "o.tsv" in str(error.value) and "\n" not in str(error.value)


def test_outcome_tables_as_people_write_them(tmp_path):
    (tmp_path / "o.csv").write_text(
        '\ufeffdonor, y ,sex,batch\n"007", 1.5,f,x\n8,NA,,x\n9,-3e2,m,x\n,,,\n\n', "utf-8"
    )
    found = cohort.read_donors(tmp_path / "o.csv", "donor", ["y"], categories=["sex", "batch"])
    assert found.names == ["007", "8", "9"]
    assert np.array_equal(found.outcomes, [[1.5, np.nan, -300]], equal_nan=True)
    assert np.array_equal(found.covariates, [[0, np.nan, 1]], equal_nan=True)  # one batch says nothing
    (tmp_path / "t.csv").write_text("donor,y,drug\na,1,none\nb,2,NA\nc,3,statin\n")
    found = cohort.read_donors(tmp_path / "t.csv", "donor", ["y"], categories=["drug"])
    assert np.array_equal(found.covariates, [[0, np.nan, 1]], equal_nan=True)  # none is a treatment, and NA is no word


@pytest.mark.parametrize(
    "changes,said",
    [
        ({"shard": "5/4"}, "shard=5/4: expected i/n"),
        ({"shard": "1/4"}, "shard=1/4 is for infer"),
        ({"models": []}, "no models"),
        ({"models": [{"name": "../x", "weights": "w"}]}, "model '../x'"),
        ({"pattern": "b0c(\\d)"}, "has no group (?P<channel>...)"),
        ({"pattern": "("}, "not a regular expression"),
        ({"threshold": "fixed"}, "needs value="),
        ({"threshold": "controls"}, "needs controls="),
        ({"share": 0}, "share=0"),
        ({"covariates": ["nft"]}, "column nft is used twice"),
        ({"columns": ["nfft"]}, "no columns 'nfft', expected one; did you mean 'nft'?"),
        ({"outcomes": "gone.tsv"}, "gone.tsv: no such table"),
        ({"models": [{"name": "a", "weights": "gone.pt"}]}, "model 'a': no weights at gone.pt"),
    ],
)
def test_mistakes_are_one_line(study, tmp_path, changes, said):
    path = configured(study, tmp_path, **changes)
    done = command(path)
    assert done.returncode == 1 and said in done.stderr and done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr and not (tmp_path / "results/report.html").exists()


def test_steps_out_of_order_and_unknown_ones(study, tmp_path):
    path = configured(study, tmp_path)
    for word, said in (
        ("merge", "17 of 17 tiles are not done"),
        ("ratios", "run `downstream.py merge` first"),
        ("report", "run `downstream.py associate` first"),
        ("asociate", "expected one of infer, merge"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            step(path, word)
    (tmp_path / "o.tsv").write_text("donor\tnft\tbraaksc\nzz\t1\t1\n")
    counts = tmp_path / "results/full_inference"
    for name in ("base", "tuned"):
        cohort.write_tsv(
            counts / name / "tile_counts.tsv", [{"donor": "a", "tile": "t", "cells": 9, "positive": 1}]
        )
    with pytest.raises(ValueError, match=r"none of its donors \(zz\) has tiles, which are of a"):
        step(path, "associate", f"outcomes={tmp_path / 'o.tsv'}")


def test_the_configuration_that_ships():
    config = runs.load(downstream.Config, ROOT / "configs/downstream.yaml")
    assert config == downstream.Config(
        out="downstream", tiles=config.tiles, models=config.models, outcomes=config.outcomes
    )
    assert [entry.name for entry in config.models] == ["baseline", "finetuned"]
