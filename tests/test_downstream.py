"""downstream.py: one study from tiles to page, shards, mistakes."""
import contextlib
import dataclasses
import io
import os
import re
import shutil
import signal
from xml.etree import ElementTree

import numpy as np
import pytest
import tifffile
import torch
import yaml
from conftest import ROOT
from scipy import stats

import cohort
import downstream
import runs
import synthetic

WEIGHTS = ROOT / "final_models/demo_synthetic.pt"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the processes started here have: threads change how sums in bfloat16 are rounded."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Eight donors of two tiles, two unusable tiles; positive cells are five times as bright."""
    folder, rng = tmp_path_factory.mktemp("study"), np.random.default_rng(9)
    rows = ["donor\tnft\tbraaksc\tage\tsex"]
    for d in range(8):
        (folder / f"tiles/donor_{d}").mkdir(parents=True)
        for t in range(2):
            drawn = synthetic.field(100 + 2 * d + t, 96, 8, 28)
            nuclei, marker = (drawn.pixels[drawn.channels.index(name)] for name in ("DNA", "AGP"))
            on = np.arange(drawn.labels.max() + 1) % 8 < d + 1
            on[0] = False
            marker = (marker / marker.mean() * 300 * (1 + 4 * on[drawn.labels])).clip(0, 65535)
            tifffile.imwrite(folder / f"tiles/donor_{d}/t{t}_b0c0.tif", nuclei)
            tifffile.imwrite(folder / f"tiles/donor_{d}/t{t}_b0c1.tif", marker.astype(np.uint16))
        nft, braaksc, age = f"{d + rng.normal():.3f}", "NA" if d == 3 else d // 2, 60 + 5 * (d % 3)
        rows.append("\t".join(map(str, (d, nft, braaksc, age, "mf"[d % 2]))))
    (folder / "tiles/donor_0/scan.xml").write_text("<scan/>")
    (folder / "tiles/donor_5/t2_b0c0.tif").write_bytes(b"no image")
    (folder / "tiles/donor_5/t2_b0c1.tif").write_bytes(b"no image")
    tifffile.imwrite(folder / "tiles/donor_6/t2_b0c1.tif", np.zeros((96, 96), np.uint16))
    (folder / "outcomes.tsv").write_text("\n".join([*rows, "77\t1\t1\t70\tf"]) + "\n")
    return folder


def configured(study, folder, **changes):
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump({
        "out": str(folder / "results"), "tiles": str(study / "tiles"),
        "outcomes": str(study / "outcomes.tsv"), "columns": ["nft", "braaksc"],
        "models": [{"name": "base", "weights": str(WEIGHTS), "peak": 0.6},
                   {"name": "tuned", "weights": str(WEIGHTS)}],
        "min_tiles": 1, "min_cells": 3, "resamples": 50, "device": "cpu", **changes}))
    return path


def command(*words):
    """Exit code of the command, in this process, where torch is loaded already."""
    with pytest.raises(SystemExit) as end:
        runs.script(downstream.__doc__, downstream.Config, downstream.main, [*map(str, words)])
    return end.value.code


def step(path, *words):
    """The same without the handling of errors."""
    config = runs.load_config(downstream.Config, path, [word for word in words if "=" in word])
    return downstream.main(config, [word for word in words if "=" not in word])


table = runs.read_table


@pytest.fixture(scope="module")
def whole(study, tmp_path_factory):
    """All steps: the folder and what was printed."""
    out = tmp_path_factory.mktemp("whole")
    (out / "e1.tsv").write_text("model\tset\tAP@0.5\nbase\ta\t0.5\nbase\tb\t0.7\nother\ta\t-\n")
    path = configured(study, out, experiments=[
        {"name": "E1", "table": str(out / "e1.tsv"), "columns": ["AP@0.5"]}])
    said, warned = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(warned):
        assert command(path) == 0
    return out, said.getvalue(), warned.getvalue()


# --------------------------------------------------------------------------------------- end to end

@pytest.mark.smoke
def test_check_prints_and_writes_nothing(study, tmp_path, capsys):
    assert command(configured(study, tmp_path), "--check") == 0
    said = capsys.readouterr().out
    assert "17 tiles of 8 donors" in said and "9 donors, 8 of them with tiles" in said
    assert "braaksc: 7 values" in said and not (tmp_path / "results").exists()


def test_all_steps(study, whole):
    out, said, warned = whole
    assert "warning" in warned and "t2_b0c0.tif" in warned
    for name in ("base", "tuned"):
        folder = out / "results/full_inference" / name
        counts, skipped = table(folder / "tile_counts.tsv"), table(folder / "skipped.tsv")
        assert f"{name}: 18 tiles found = 16 done + 2 skipped" in said
        assert [row["tile"] for row in skipped] == ["donor_5/t2_b0c0", "donor_6/t2_b0c0"]
        assert len(counts) == 16 and {row["donor"] for row in counts} == set("01234567")
        lines = {line["tile"]: line
                 for line in cohort.read_tile_lines(folder / "shards/1_of_1.jsonl")}
        cut = cohort.otsu_threshold(np.concatenate([line["intensity"] for line in lines.values()
                                                    if "why" not in line]))
        for row in counts:
            above = np.array(lines[row["tile"]]["intensity"]) > cut
            assert (int(row["positive"]), int(row["cells"])) == (above.sum(), len(above))
            assert float(row["threshold"]) == pytest.approx(cut) and len(row["model_sha256"]) == 16
    ratios = [row for row in table(out / "results/donor_marker_ratio.tsv")
              if row["model"] == "tuned"]
    for row in ratios:                                         # counts is of the model tuned
        mine = [each for each in counts if each["donor"] == row["donor"]]
        positive, cells = (sum(int(each[what]) for each in mine) for what in ("positive", "cells"))
        assert float(row["ratio"]) == pytest.approx(positive / cells)
        assert float(row["low"]) <= float(row["ratio"]) <= float(row["high"])
        assert row["tiles"] == str(len(mine)) and row["flag"] == ""
        assert row["interval"] == "too narrow: fewer than 20 tiles"
    outcomes = {row["donor"]: row for row in table(study / "outcomes.tsv")}
    x = [float(row["ratio"]) for row in ratios]
    y = [float(outcomes[row["donor"]]["nft"]) for row in ratios]
    found = {(row["model"], row["outcome"]): row for row in table(out / "results/e5_spearman.tsv")}
    rho = float(found["tuned", "nft"]["rho"])
    assert rho == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-9)
    assert found["tuned", "nft"]["n"] == "8" and found["base", "braaksc"]["n"] == "7"
    assert found["tuned", "nft"]["p_from"] == "exact"
    p, q = ([float(found["tuned", name][what]) for name in ("nft", "braaksc")] for what in "pq")
    assert q == pytest.approx(stats.false_discovery_control(p), rel=1e-9)
    assert {row["donor"]: row["status"] for row in table(out / "results/e5_donors.tsv")} == {
        **dict.fromkeys("01234567", "used"), "77": "no tiles"}
    redraws = [float(row["nft"]) for row in table(out / "results/e5_redraws.tsv")
               if row["model"] == "tuned"]
    stable = next(row for row in table(out / "results/e5_bootstrap_stability.tsv")
                  if (row["model"], row["outcome"]) == ("tuned", "nft"))
    assert len(redraws) == 50 and float(stable["median"]) == pytest.approx(np.median(redraws))
    assert float(stable["same_sign"]) == np.mean(np.sign(redraws) == np.sign(rho))
    change = table(out / "results/e5_difference.tsv")[0]
    assert float(change["difference"]) == pytest.approx(rho - float(found["base", "nft"]["rho"]),
                                                        abs=1e-9)


def test_the_page(whole):
    text = (whole[0] / "results/report.html").read_text(encoding="utf-8")
    charts = map(ElementTree.fromstring, re.findall("<svg.*?</svg>", text, re.DOTALL))
    assert sum("role" in chart.attrib for chart in charts) == 1 + 2 + 2   # forest, dots, histograms
    assert not re.search(r"(src|href)=\"(?!data:)|@import|<script", text)
    for said in ("donor_6/t2_b0c0", "no images of the nuclei", "E1 AP@0.5", "0.600",
                 "E5 q &lt; 0.05"):
        assert said in text


def test_the_same_command_does_nothing_twice(whole, monkeypatch, capsys):
    out = whole[0]
    shard = out / "results/full_inference/tuned/shards/1_of_1.jsonl"
    before = sorted(shard.read_text().splitlines())
    monkeypatch.setattr(downstream.Shard, "measure", lambda *_: pytest.fail("a tile was redone"))
    assert step(out / "c.yaml", "infer") == 0                  # skipped ones are tried again
    assert sorted(shard.read_text().splitlines()) == before
    assert step(out / "c.yaml", "merge") == 0
    assert "16 done + 2 skipped" in capsys.readouterr().out


def test_another_threshold_takes_the_old_lines_another_statistic_does_not(whole):
    path = whole[0] / "c.yaml"
    with pytest.raises(ValueError, match="17 of 17 tiles are not done with these settings"):
        step(path, "merge", "percentile=75")
    assert step(path, "merge", "threshold=fixed", "value=900") == 0
    counts = table(whole[0] / "results/full_inference/tuned/tile_counts.tsv")
    assert {row["threshold"] for row in counts} == {"900"}
    assert step(path, "merge") == 0


def test_lines_of_other_channels_are_not_taken(whole):
    """A tile is called after its image of nuclei alone. Its files' stamps say which folder's."""
    path = whole[0] / "c.yaml"
    config = runs.load_config(downstream.Config, path)

    def key(model=(), **changes):
        return dataclasses.replace(config, **changes).key(
            dataclasses.replace(config.models[0], **dict(model)))

    keys = {key(), key(marker="2"), key(nuclei="1", marker="0"),
            key(pattern=r"b1c(?P<channel>\d+)"), key({"depth": 0.1}), key({"peak": 0.5}),
            key({"sees": "marker"})}
    assert len(keys) == 7
    same = (key(shard="2/3"), key(threshold="fixed", value=9), key(donor="x(.)"), key(out="o"),
            key(tiles="elsewhere"))
    assert set(same) == {key()}
    with pytest.raises(ValueError, match="17 of 17 tiles are not done with these settings"):
        step(path, "merge", "marker=0", "nuclei=1")


def test_donors_are_those_of_now(whole):
    """Not those of the day when the tiles were done."""
    path = whole[0] / "c.yaml"
    assert step(path, "merge", "donor=donor_[0-9]/(t[0-9])") == 0
    counts = table(whole[0] / "results/full_inference/tuned/tile_counts.tsv")
    assert {row["donor"] for row in counts} == {"t0", "t1"}
    assert step(path, "merge") == 0


def test_a_study_that_moved_goes_on(study, whole, tmp_path, monkeypatch):
    """Content counts, not paths: copied tiles, weights and outcomes are the same study."""
    for folder, name in ((study, "tiles"), (study, "outcomes.tsv"), (whole[0], "results")):
        (shutil.copytree if (folder / name).is_dir() else shutil.copy)(folder / name,
                                                                       tmp_path / name)
    shutil.copy(WEIGHTS, tmp_path / "w.pt")
    monkeypatch.setattr(downstream.Shard, "measure", lambda *_: pytest.fail("a tile was redone"))
    monkeypatch.chdir(tmp_path)
    path = configured(study, tmp_path, tiles="./tiles/", outcomes="outcomes.tsv", models=[
        {"name": "base", "weights": "w.pt", "peak": 0.6}, {"name": "tuned", "weights": "w.pt"}])
    for name in ("infer", "merge", "ratios", "associate", "report"):
        assert step(path, name) == 0
    (tmp_path / "w.pt").write_bytes((ROOT / "final_models/dinocell_tiny.pt").read_bytes())
    with pytest.raises(ValueError, match=r"merge ran with weights of model 'base' \w{16}, now"):
        step(path, "report")


def test_lines_of_other_settings_stay(whole, tmp_path, monkeypatch):
    shutil.copytree(whole[0] / "results", tmp_path / "results")
    journal = tmp_path / "results/full_inference/base/shards/1_of_1.jsonl"
    before = journal.read_text().splitlines()
    with monkeypatch.context() as patch:
        patch.setattr(downstream.Shard, "measure", lambda *_: dict(
            seconds=1, area_px=1, dtype="uint16", intensity=[1.0]))
        assert step(whole[0] / "c.yaml", "infer", f"out={tmp_path / 'results'}",
                    "percentile=75") == 0
    after = journal.read_text().splitlines()
    assert set(before) < set(after) and len(after) == 2 * len(before)
    assert step(whole[0] / "c.yaml", "merge", f"out={tmp_path / 'results'}") == 0


# ------------------------------------------------------------------------------------------- shards

class Killed(BaseException):
    """As SIGKILL: nothing runs after it."""


def test_four_shards_are_one_run_also_when_one_is_killed(study, whole, tmp_path, monkeypatch):
    path, write = configured(study, tmp_path), downstream.Shard.write
    folders = [tmp_path / "results/full_inference" / name for name in ("base", "tuned")]

    def killed(self, tile, stamp, **found):
        write(self, tile, stamp, **found)
        if self.model.name == "tuned":                         # in the middle of the next line
            with open(self.path, "a") as file:
                file.write('{"tile": "donor_7/t1_b0')
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(downstream.Shard, "write", killed)
        step(path, "infer", "shard=2/4")
    assert len(cohort.read_tile_lines(folders[1] / "shards/2_of_4.jsonl")) == 1
    for number in (1, 3, 4):
        assert step(path, "infer", f"shard={number}/4") == 0
    with pytest.raises(ValueError, match="tiles are not done with these settings"):
        step(path, "merge")
    assert step(path, "infer", "shard=2/4") == 0
    for folder in folders:
        shards = [cohort.read_tile_lines(file)
                  for file in sorted(folder.glob("shards/*_of_4.jsonl"))]
        names = [line["tile"] for lines in shards for line in lines]
        assert len(names) == len(set(names)) == 17 and [*map(len, shards)] == [5, 4, 4, 4]
    assert step(path, "merge") == 0
    for name in ("base", "tuned"):
        files = (out / f"results/full_inference/{name}/tile_counts.tsv"
                 for out in (whole[0], tmp_path))
        one, four = ([{**row, "seconds": ""} for row in table(file)] for file in files)
        assert one == four and len(four) == 16


def test_a_tile_that_changed_is_found_again(study, tmp_path):
    shutil.copytree(study / "tiles", tmp_path / "tiles")
    path = configured(study, tmp_path, tiles=str(tmp_path / "tiles"))
    assert step(path, "infer") == 0
    changed = tmp_path / "tiles/donor_3/t1_b0c1.tif"
    tifffile.imwrite(changed, tifffile.imread(changed) // 2)
    with pytest.raises(ValueError, match="1 of 17 tiles .* settings and files"):
        step(path, "merge")
    assert step(path, "infer") == 0 == step(path, "merge")
    journal = tmp_path / "results/full_inference/base/shards/1_of_1.jsonl"
    before = journal.read_bytes()
    for file in (tmp_path / "tiles").rglob("*.tif"):             # as a copy has other times
        os.utime(file, (1, 1))
    assert step(path, "merge") == 0
    assert step(path, "infer", "donor=(donor_1)/") == 0          # of fewer tiles: the rest stays
    assert sorted(journal.read_bytes().splitlines()) == sorted(before.splitlines())
    (tmp_path / "tiles/donor_5/t0_b0c0.tif").unlink()            # a link that leads nowhere now
    (tmp_path / "tiles/donor_5/t0_b0c0.tif").symlink_to("nowhere.tif")
    assert step(path, "infer") == 0
    lines = cohort.read_tile_lines(tmp_path / "results/full_inference/base/shards/1_of_1.jsonl")
    assert len({line["tile"] for line in lines}) == len(lines)


def test_outcomes_of_other_donors_are_refused_before_the_network_runs(study, tmp_path):
    table = (study / "outcomes.tsv").read_text().splitlines()
    (tmp_path / "others.tsv").write_text("\n".join(
        [table[0], *(f"x{line}" for line in table[1:])]))
    with pytest.raises(ValueError, match="none of its donors .* has tiles, which are of 0, 1"):
        step(configured(study, tmp_path, outcomes=str(tmp_path / "others.tsv")))
    assert not (tmp_path / "results").exists()


def test_a_warned_shard_asks_to_be_queued_again(study, tmp_path, monkeypatch):
    path, measure = configured(study, tmp_path), downstream.Shard.measure

    def preempted(self, pixels):
        os.kill(os.getpid(), signal.SIGTERM)
        return measure(self, pixels)

    def counted():
        return [len(cohort.read_tile_lines(path))
                for path in tmp_path.glob("results/full_inference/*/shards/*")]

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(downstream.Shard, "measure", preempted)
    assert step(path, "infer", "shard=1/8") == runs.REQUEUE
    assert signal.getsignal(signal.SIGTERM) is before and counted() == [1, 1]
    monkeypatch.setattr(downstream.Shard, "measure", measure)
    assert step(path, "infer", "shard=1/8") == 0 and counted() == [3, 3]


# ------------------------------------------------------------------------------- donors, covariates

def test_left_out_donors_and_covariates(study, whole, tmp_path):
    path = configured(study, tmp_path, covariates=["age"], categories=["sex"])
    (tmp_path / "full_inference").symlink_to(whole[0] / "results/full_inference")
    shutil.copy(whole[0] / "results/settings.json", tmp_path)
    (tmp_path / "outcomes.tsv").write_text(
        (study / "outcomes.tsv").read_text().replace("\n2\t", "\nwho\t"))
    words = (f"out={tmp_path}", f"outcomes={tmp_path / 'outcomes.tsv'}", "controls=4")
    assert [step(path, name, *words) for name in ("ratios", "associate", "report")] == [0, 0, 0]
    assert "corrected for age, sex" in (tmp_path / "report.html").read_text()
    status = {row["donor"]: row["status"] for row in table(tmp_path / "e5_donors.tsv")}
    assert status == {**dict.fromkeys("013567", "used"), "2": "not in outcomes.tsv",
                      "4": "negative control", "77": "no tiles", "who": "no tiles"}
    rows = {(row["model"], row["outcome"]): row for row in table(tmp_path / "e5_spearman.tsv")}
    assert rows["base", "braaksc"]["left_out"] == "too few donors"
    assert rows["base", "nft"]["covariates"] == "2"
    assert {row["n"] for row in rows.values()} == {"6", "5"} and not rows["tuned", "braaksc"]["rho"]
    for model in ("base", "tuned"):                            # what has no p is of no family
        assert rows[model, "nft"]["q"] == rows[model, "nft"]["p"] != ""

    cells = {}
    for row in table(tmp_path / "donor_marker_ratio.tsv"):
        cells[row["donor"]] = min(int(row["cells"]), cells.get(row["donor"], 10**6))
    limit = sorted(cells.values())[4]
    assert step(path, "associate", *words, f"min_cells={limit}") == 0
    again = {row["donor"]: row["status"] for row in table(tmp_path / "e5_donors.tsv")}
    assert {name for name, why in again.items() if why == f"fewer than {limit} cells"} == {
        name for name, count in cells.items() if count < limit and name != "4"}
    assert step(path, "associate", *words, "min_tiles=3") == 0
    assert {row["left_out"] for row in table(tmp_path / "e5_spearman.tsv")} == {"too few donors"}


def test_tables_of_other_settings_are_refused(study, whole, tmp_path):
    """The report says what counts as positive: it must be what merge counted."""
    shutil.copytree(whole[0] / "results", tmp_path / "results")
    path = configured(study, tmp_path)
    steps = "merge", "ratios", "associate", "report"
    assert [step(path, name) for name in steps] == [0, 0, 0, 0]
    for words, said in (
            (("report", "threshold=fixed", "value=9"), r"merge ran with positive mean .* Otsu.*"
             r"now it is mean .* above 9.0; run `downstream.py merge` again"),
            (("associate", "percentile=90"), "now it is 90th percentile"),
            (("report", "share=0.5"), "associate ran with share 0.8, now it is 0.5"),
            (("report", "min_tiles=2"), "ratios ran with min_tiles 1"),
            (("report", "columns=nft"), "associate ran with columns")):
        with pytest.raises(ValueError, match=said):
            step(path, *words)
    models = [{"name": "base", "weights": str(WEIGHTS), "peak": 0.6},
              {"name": "tuned", "weights": "elsewhere.pt"}]
    (tmp_path / "other").mkdir()
    other = configured(study, tmp_path / "other", out=str(tmp_path / "results"), models=models)
    assert step(other, "report") == 0                          # a machine without the weights
    models[1] = {"name": "tuned", "weights": str(WEIGHTS), "peak": 0.5}
    other = configured(study, tmp_path / "other", out=str(tmp_path / "results"), models=models)
    with pytest.raises(ValueError, match="ran with peak of model 'tuned' None, now it is 0.5; run"):
        step(other, "report")
    assert step(path, "merge", "threshold=fixed", "value=9") == 0
    with pytest.raises(ValueError, match="run `downstream.py ratios` first"):
        step(path, "report", "threshold=fixed", "value=9")
    shutil.copy(study / "outcomes.tsv", tmp_path)              # the same table, then corrected
    words = f"outcomes={tmp_path / 'outcomes.tsv'}", "threshold=fixed", "value=9"
    assert [step(path, name, *words) for name in steps[1:]] == [0, 0, 0]
    (tmp_path / "outcomes.tsv").write_text((tmp_path / "outcomes.tsv").read_text() + "z\t1\t1\n")
    with pytest.raises(ValueError, match="associate ran with outcomes"):
        step(path, "report", *words)


@pytest.mark.parametrize("name, last", [("ratios", "donor_marker_ratio.tsv"),
                                        ("associate", "e5_donors.tsv"),
                                        ("associate", "e5_redraws.tsv")])
def test_a_step_that_stops_half_way_leaves_nothing_for_the_report(study, whole, tmp_path, name,
                                                                  last, monkeypatch):
    shutil.copytree(whole[0] / "results", tmp_path / "results")
    path, write = configured(study, tmp_path), runs.write_table
    assert [step(path, each) for each in ("merge", "ratios", "associate", "report")] == [0] * 4

    def killed(file, *given):
        write(file, *given)
        if file.name == last:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(runs, "write_table", killed)
        step(path, name, "seed=1")
    with pytest.raises(ValueError, match=f"run `downstream.py {name}` first"):
        step(path, "report")
    assert [step(path, again) for again in (name, "report")] == [0, 0]


def test_donors_of_one_tile_cannot_vary(study, whole, tmp_path, capsys):
    """Nothing is redrawn then: their stability is unknown, not perfect."""
    shutil.copytree(whole[0] / "results", tmp_path / "results")
    path = configured(study, tmp_path, columns=["nft"], min_cells=1)
    assert step(path, "merge") == 0
    for name in ("base", "tuned"):
        counts = tmp_path / f"results/full_inference/{name}/tile_counts.tsv"
        rows = table(counts)
        runs.write_table(counts, [row for row in rows if "/t0" in row["tile"]])
    assert step(path, "ratios") == step(path, "associate") == step(path, "report") == 0
    assert "8 of those used have one tile and cannot vary in redraws" in capsys.readouterr().out
    for row in table(tmp_path / "results/e5_bootstrap_stability.tsv"):
        assert row["rho"] and row["redraws"] == "0" and not row["same_sign"] and not row["sd"]
    assert {row["nft"] for row in table(tmp_path / "results/e5_redraws.tsv")} == {""}


def test_a_covariate_without_two_values_is_said(study, whole, tmp_path, capsys):
    shutil.copytree(whole[0] / "results", tmp_path / "results")
    lines = (study / "outcomes.tsv").read_text().splitlines()      # the donor 77 has no tiles
    (tmp_path / "o.tsv").write_text("\n".join(
        [f"{lines[0]}\tbatch"] + [f"{line}\tb{line.startswith('77')}" for line in lines[1:]]))
    path = configured(study, tmp_path, outcomes=str(tmp_path / "o.tsv"), covariates=["age"],
                      categories=["sex", "batch"])
    assert step(path, "associate") == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "corrected" in line]
    assert len(said) == 1 and "column batch has no two values among the donors used" in said[0]


# ----------------------------------------------------------------------------------------- mistakes

@pytest.mark.smoke
@pytest.mark.parametrize("changes,said", [
    ({"shard": "5/4"}, "shard=5/4: expected i/n"),
    ({"shard": "1/4"}, "shard=1/4 is for infer"),
    ({"models": []}, "no models"),
    ({"models": [{"name": "../x", "weights": "w"}]}, "model '../x'"),
    ({"pattern": "b0c(\\d)"}, "has no group (?P<channel>...)"),
    ({"pattern": "("}, "not a regular expression"),
    ({"threshold": "fixed"}, "needs value="),
    ({"threshold": "controls"}, "needs controls="),
    ({"percentile": 101}, "percentile is 101, expected a number, from 0 to 100"),
    ({"min_cells": 0}, "min_cells is 0, expected a whole number, 1 or more"),
    ({"covariates": ["nft"]}, "column nft is used twice"),
    ({"columns": ["nfft"]}, "no columns 'nfft', expected one; did you mean 'nft'?"),
    ({"outcomes": "gone.tsv"}, "gone.tsv: no such table"),
    ({"models": [{"name": "a", "weights": "gone.pt"}]}, "model 'a': no weights at gone.pt"),
])
def test_mistakes_are_one_line(study, tmp_path, capsys, changes, said):
    path = configured(study, tmp_path, **changes)
    assert command(path) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and said in error
    assert not (tmp_path / "results/report.html").exists()


def test_steps_out_of_order_and_unknown_ones(study, tmp_path):
    path = configured(study, tmp_path)
    for word, said in (("merge", "17 of 17 tiles are not done"),
                       ("ratios", "run `downstream.py merge` first"),
                       ("report", "run `downstream.py merge` first"),
                       ("asociate", "expected one of infer, merge")):
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            step(path, word)
    (tmp_path / "o.tsv").write_text("donor\tnft\tbraaksc\nzz\t1\t1\n")
    for name in ("base", "tuned"):
        runs.write_table(tmp_path / f"results/full_inference/{name}/tile_counts.tsv",
                         [{"donor": "a", "tile": "t", "cells": 9, "positive": 1}])
    downstream.record_downstream_settings(runs.load_config(downstream.Config, path), "merge")
    with pytest.raises(ValueError, match=r"none of its donors \(zz\) has tiles, which are of a"):
        step(path, "associate", f"outcomes={tmp_path / 'o.tsv'}")


def test_the_configuration_that_ships():
    config = runs.load_config(downstream.Config, ROOT / "configs/downstream.yaml")
    assert config == downstream.Config(out="downstream", tiles=config.tiles, models=config.models,
                                       outcomes=config.outcomes)
    assert [model.name for model in config.models] == ["baseline", "finetuned"]
