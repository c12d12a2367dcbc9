"""Do marker-positive cells go with outcomes of donors? python downstream.py [STEP] CONFIG.yaml

    infer       find the cells of every tile (images of nuclei and of a marker) with every model
    merge       count each tile's cells, from what one process or an array of shards has found
    ratios      the positive fraction of each donor
    associate   Spearman's rho with each outcome, its stability, and what the better model changes
    report      one page of it all

Without a step it does all; with --check it says what is there and stops. On a cluster `infer
shard=3/16` does a sixteenth (slurm/array.sh), and `merge` follows when all are done. Stopped and
started again, infer goes on with the next tile. Below out= there are

    full_inference/MODEL/shards/3_of_16.jsonl    the marker in each cell: a line for each tile and
                                                 settings; those of other settings stay
    full_inference/MODEL/tile_counts.tsv         donor, tile, cells, positive, area, threshold, ...
    full_inference/MODEL/skipped.tsv             the other tiles, and why: found = done + skipped
    donor_marker_ratio.tsv                       positive / cells of each donor, with an interval
    e5_spearman.tsv, e5_difference.tsv           rho, p, q; the models' difference in rho
    e5_bootstrap_stability.tsv, e5_redraws.tsv   rho of redrawn tiles: in short, and one by one
    e5_donors.tsv, report.html                   who was used and who not, and why; the page
    settings.json                                what each step ran with; others are refused

A cell is positive if the marker over its pixels lies above `threshold`. Only tiles that every model
has done count, and only donors that no model flags, so that models are compared on the same data.
"""
from __future__ import annotations

import json
import math
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

import runs

with runs.lazy():
    import tqdm

    import cohort
    import model
    import report
    import segment
    import watershed

OUTCOMES = ("braaksc", "ceradsc", "cogdx", "dcfdx_lv", "plaq_d", "plaq_n", "nft", "gpath")
STABILITY = ("redraws", "sd", "q2.5", "q25", "median", "q75", "q97.5", "same_sign", "q_below_0.05")
SPEARMAN = ("model", "outcome", "n", "rho", "low", "high", "p", "q", "p_from", "covariates",
            "left_out")
CHANGES = ("model", "against", "outcome", "n", "difference", "low", "high")
WORDS = ("model", "against", "outcome", "p_from", "left_out", "donor", "flag", "interval")
INTERVALS = {"rho": ("low", "high"), "difference": ("low", "high"), "median": ("q2.5", "q97.5")}
HEADS = {"median": "median rho", "sd": "standard deviation", "q_below_0.05": "q < 0.05"}
# keys that the tables of a step depend on, besides those of the step before
SETTINGS = {"merge": ("pattern", "nuclei", "marker", "donor", "diameter", "border"),
            "ratios": ("controls", "min_tiles", "min_cells", "resamples", "seed"),
            "associate": ("controls", "min_tiles", "min_cells", "outcomes", "columns", "covariates",
                          "categories", "share", "resamples", "seed")}
FEW = 20             # tiles below which an interval from resampling tiles is too narrow

Percent = Annotated[float, runs.within(0, 100)]


@dataclass(frozen=True)
class StudyModel:
    name: str                               # its folder and row
    weights: str                            # file that train_seg.py exported
    sees: Literal["both", "nuclei", "marker"] = "both"  # [nuclei, marker, 0], or one three times
    peak: float | None = None               # thresholds; null: the weights' own
    fill: float | None = None
    depth: float | None = None
    smooth: float | None = None
    shape: float | None = None
    min_area: int | None = None             # px

    def digest(self) -> str:
        """Digest of the content of the weights."""
        path = Path(self.weights)
        if not path.is_file():
            raise FileNotFoundError(f"model '{self.name}': no weights at {path}; train_seg.py "
                                    "writes them")
        return runs.digest(path)[:16]


@dataclass(frozen=True)
class Experiment:
    name: str                               # heads its columns: E1
    table: str                              # TSV, with a column `model`
    columns: tuple[str, ...]                # numbers in it, averaged over a model's rows


@dataclass(frozen=True)
class Config:
    out: str = "downstream"                 # folder for everything
    tiles: str = "tiles"                    # folder of the images, searched whole
    pattern: str = r"b0c(?P<channel>\d+)"   # regular expression around the channel in a file's name
    nuclei: str = "0"                       # channel of the nuclei
    marker: str = "1"                       # channel of the marker
    donor: str | None = None                # the same around the donor in a path; null: donor_7
    models: tuple[StudyModel, ...] = ()     # name, weights, sees, peak, ...; first the baseline
    shard: str = "1/1"                      # infer: which part of the tiles, 3/16
    diameter: float | None = None           # px, of cells in the tiles; null: as trained
    border: Literal["keep", "drop"] = "keep"  # drop: leave out cells cut by the edge of a tile
    percentile: Percent | None = None       # of the marker over a cell; null: its mean
    threshold: Literal["otsu", "fixed", "controls"] = "otsu"  # otsu: over all cells
    value: float | None = None              # if threshold=fixed, in the images' own units
    controls: tuple[str, ...] = ()          # donors without the marker; if threshold=controls
    min_tiles: runs.Count = 3               # donors with fewer are flagged and left out
    min_cells: runs.Count = 100             # the same
    outcomes: str = "outcomes.tsv"          # table with a column `donor`, .tsv or .csv
    columns: tuple[str, ...] = OUTCOMES     # its columns of outcomes
    covariates: tuple[str, ...] = ()        # its columns of numbers to correct for: age
    categories: tuple[str, ...] = ()        # its columns of words to correct for: sex, batch
    share: runs.Share = 0.8                 # of each donor's tiles in a redraw, at most all but one
    resamples: runs.Count = 1000            # redraws; and of tiles or donors, for intervals
    seed: runs.Whole = 0                    # of everything random
    experiments: tuple[Experiment, ...] = ()  # other tables for the page: name, table, columns
    device: runs.Device = "auto"            # auto: the GPU if there is one
    batch: runs.Batch | None = None         # network tiles at once; null: 6 on the CPU, 32 on a GPU

    def __post_init__(self):
        names = [model.name for model in self.models]
        if not names:
            raise ValueError("no models; give models: [{name: baseline, weights: FILE}, ...]")
        for name in names:
            if not re.fullmatch(r"\w[\w.-]*", name) or names.count(name) > 1:
                raise ValueError(f"model '{name}': expected different words, of A-Z a-z 0-9 _ . -")
        if self.nuclei == self.marker:
            raise ValueError(f"nuclei={self.nuclei}, marker={self.marker}: expected two channels")
        runs.shard_of(self.shard)
        if self.threshold == "fixed" and self.value is None:
            raise ValueError("threshold=fixed needs value=, in the units of the marker images")
        if self.threshold == "controls" and not self.controls:
            raise ValueError("threshold=controls needs controls=, the donors without the marker")
        used = Counter(("donor", *self.columns, *self.covariates, *self.categories))
        if twice := [name for name, count in used.items() if count > 1]:
            raise ValueError(f"column {twice[0]} is used twice; expected one use of each column")

    def find_tiles(self) -> tuple[list[cohort.TilePair], dict[str, str], int]:
        return cohort.find_tiles(self.tiles, self.pattern, self.nuclei, self.marker, self.donor)

    def folder(self, model: StudyModel) -> Path:
        """Where the counts of a model lie."""
        return Path(self.out) / "full_inference" / model.name

    def key(self, model: StudyModel) -> str:
        """Digest of what a tile's line depends on besides the tile: weights and settings."""
        names = ("diameter", "border", "percentile", "pattern", "nuclei", "marker")
        settings = {**asdict(model), "name": None, "weights": model.digest(),
                    **{name: getattr(self, name) for name in names}}
        return runs.digest(json.dumps(settings, sort_keys=True))[:16]

    def lines(self, model: StudyModel, tiles: list[cohort.TilePair]) -> dict[str, dict]:
        """The line of each tile that is done with a model."""
        return cohort.lines_by_tile(self.folder(model) / "shards", self.key(model), tiles)

    def read_counts(self) -> cohort.Counts:
        paths = [self.folder(model) / "tile_counts.tsv" for model in self.models]
        return cohort.read_donor_counts(paths, self.controls, self.min_tiles, self.min_cells)

    def read_donors(self, with_tiles: Collection[str] | None = None) -> cohort.Donors:
        """All donors of the table; an error if none is among those that have tiles."""
        donors = cohort.read_donors(self.outcomes, self.columns, self.covariates, self.categories)
        if with_tiles is not None and not set(with_tiles) & set(donors.names):
            raise ValueError(f"{self.outcomes}: none of its donors ({runs.listed(donors.names)}) "
                             f"has tiles, which are of {runs.listed(sorted(with_tiles))}; name "
                             "them alike, or give donor=")
        return donors


def main(config: Config, files: list[str], check: bool = False) -> int:
    step = files[0] if files else None
    if len(files) > 1 or step not in (None, *STEPS):
        raise ValueError(f"got {' '.join(files)}, expected one of {', '.join(STEPS)}, or none")
    if config.shard != "1/1" and step != "infer":
        raise ValueError(f"shard={config.shard} is for infer; when all are done, merge without it")
    if check:
        return print_study(config)
    if step is None:                                           # a mistake there must not cost hours
        config.read_donors({tile.donor for tile in config.find_tiles()[0]})
    for run in STEPS.values() if step is None else [STEPS[step]]:
        if code := run(config):
            return code
    return 0


# -------------------------------------------------------------------------------------------- infer

def infer_donor_tiles(config: Config) -> int:
    """Find the cells of this shard's tiles: a line for each tile and model, never done twice."""
    tiles, unusable, others = config.find_tiles()
    number, count = runs.shard_of(config.shard)
    mine = tiles[number - 1::count]
    print(f"{config.tiles}: {len(tiles)} tiles of {len({tile.donor for tile in tiles})} donors, "
          f"{len(mine)} in shard {config.shard}; {len(unusable)} lack a partner or a donor; "
          f"{others} other files")
    shards = [Shard(model, config, tiles) for model in config.models]
    skipped = 0
    with runs.stop_signals() as stop:
        for tile in tqdm.tqdm(mine, f"shard {config.shard}", unit="tile", delay=1, file=sys.stderr):
            todo = [shard for shard in shards if tile.name not in shard.done]
            if todo and stop:
                print("stopped; the same command goes on from here", file=sys.stderr)
                return runs.REQUEUE
            if not todo:
                continue
            stamp = None
            try:
                stamp = tile.stamp()                           # before it could change
                pixels = cohort.read_tile(tile)
            except (ValueError, OSError) as error:             # of this tile alone
                why = " ".join(runs.error_sentence(error).split())
                tqdm.tqdm.write(f"warning: {why}", file=sys.stderr)
                skipped += 1
                for shard in todo:
                    shard.write(tile, stamp, why=why)
            else:
                for shard in todo:
                    shard.write(tile, stamp, **shard.measure(pixels))
    print(f"shard {config.shard}: {len(mine) - skipped} tiles done, {skipped} skipped")
    return 0


class Shard:
    """A model's file of lines in this process."""

    def __init__(self, model: StudyModel, config: Config, tiles: list[cohort.TilePair]):
        self.model, self.config, self.key = model, config, config.key(model)
        found = config.lines(model, tiles)
        self.done = {name for name, line in found.items() if "why" not in line}
        part = f"{config.shard.replace('/', '_of_')}.jsonl"
        self.path = config.folder(model) / "shards" / part
        self.path.parent.mkdir(parents=True, exist_ok=True)
        others = {line["tile"] for line in cohort.read_tile_lines(self.path)
                  } - {tile.name for tile in tiles}            # not asked for this time
        whole = [json.dumps(line) + "\n" for line in cohort.read_tile_lines(self.path)
                 if line["key"] != self.key or line["tile"] in others
                 or ("why" not in line and line == found.get(line["tile"]))]
        runs.write_text(self.path, "".join(whole))

    @cached_property
    def net(self):
        return model.load(self.model.weights).ready(runs.pick_device(self.config.device))

    def measure(self, pixels: np.ndarray) -> dict[str, Any]:
        """Cells of a tile (2, H, W): the marker in each, in the image's units, and their area."""
        model, config = self.model, self.config
        begin = time.perf_counter()
        seen = {"both": pixels, "nuclei": pixels[:1], "marker": pixels[1:]}[model.sees]
        thresholds = {name: getattr(model, name) for name in watershed.Setting._fields}
        labels = segment.segment(seen, self.net, diameter=config.diameter, border=config.border,
                                 batch=config.batch, **thresholds)
        seconds = time.perf_counter() - begin
        marker = cohort.marker_of_cells(labels, pixels[1], config.percentile)
        return dict(seconds=round(seconds, 3), area_px=int(np.count_nonzero(labels)),
                    dtype=str(pixels.dtype), intensity=[float(f"{value:.6g}") for value in marker])

    def write(self, tile: cohort.TilePair, stamp: list | None, **found: Any) -> None:
        line = dict(tile=tile.name, donor=tile.donor, key=self.key, files=stamp, **found)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


# ----------------------------------------------------------------------------------------- settings

def downstream_step_settings(config: Config, step: str) -> dict[str, Any]:
    """What the tables of a step depend on, as JSON gives it back."""
    values = {name: asdict(config)[name] for name in SETTINGS[step]}
    if step == "merge":
        values["names of models"] = [model.name for model in config.models]
        values |= {f"{key} of model '{model.name}'": value for model in config.models
                   for key, value in {**asdict(model), "weights": model.digest() if Path(
                       model.weights).is_file() else None}.items()}
        values["positive"] = downstream_positive_rule(config)
    if step == "associate":
        values["outcomes"] = runs.digest(Path(config.outcomes))[:16]   # of the content
    return json.loads(json.dumps(values))


def read_downstream_settings(config: Config) -> dict[str, dict[str, Any]]:
    path = Path(config.out) / "settings.json"
    return runs.read_record(path, "remove it and run merge again") if path.exists() else {}


def forget_downstream_settings(config: Config, step: str) -> None:
    """Before a step writes its tables: if it stops half-way, report refuses them."""
    known = read_downstream_settings(config)
    if known.pop(step, None):
        runs.write_text(Path(config.out) / "settings.json", json.dumps(known, indent=1))


def record_downstream_settings(config: Config, step: str) -> None:
    """Write down what a step ran with; after merge all others are to be run anew."""
    known = {} if step == "merge" else read_downstream_settings(config)
    runs.write_text(Path(config.out) / "settings.json", json.dumps(
        known | {step: downstream_step_settings(config, step)}, indent=1))


def check_downstream_settings(config: Config, *steps: str) -> None:
    """Refuse tables of steps that did not run, or ran with other settings."""
    known = read_downstream_settings(config)
    for step in steps:
        if step not in known:
            raise ValueError(f"{config.out}: no tables of these settings; run `downstream.py "
                             f"{step}` first")
        for key, now in downstream_step_settings(config, step).items():
            if now is None and key.startswith("weights of"):
                continue                                # report on a machine without them
            if (then := known[step].get(key)) != now:
                raise ValueError(f"{config.out}: {step} ran with {key} {then}, now it is {now}; "
                                 f"run `downstream.py {step}` again")


# ------------------------------------------------------------------------------------ merge, ratios

def count_positive_cells(config: Config) -> int:
    """Count the cells of all tiles, by a threshold over the cohort."""
    tiles, unusable, _ = config.find_tiles()
    found = []
    for model in config.models:
        found.append(config.lines(model, tiles))
        if missing := [tile.name for tile in tiles if tile.name not in found[-1]]:
            raise ValueError(f"model '{model.name}': {len(missing)} of {len(tiles)} tiles are not "
                             f"done with these settings and files, such as {missing[0]}; run "
                             "infer, or what is left of its shards")
    print(f"positive: {downstream_positive_rule(config)}")
    (Path(config.out) / "settings.json").unlink(missing_ok=True)
    for model, line_of in zip(config.models, found):
        lines = [{**line_of[tile.name], "donor": tile.donor} for tile in tiles]   # donor= of now
        done = [line for line in lines if "why" not in line]
        skipped = unusable | {line["tile"]: line["why"] for line in lines if "why" in line}
        if not done:
            raise ValueError(f"model '{model.name}': all {len(skipped)} tiles were skipped; the "
                             f"first: {next(iter(skipped.values()))}")
        cut = cohort.marker_threshold(done, config.threshold, config.value or 0.0, config.controls)
        sha256 = model.digest()
        rows = [{"donor": line["donor"], "tile": line["tile"], "cells": len(line["intensity"]),
                 "positive": sum(value > cut for value in line["intensity"]),
                 "area_px": line["area_px"], "seconds": line["seconds"], "model_sha256": sha256,
                 "threshold": cut} for line in done]
        runs.write_table(config.folder(model) / "tile_counts.tsv", rows)
        runs.write_table(config.folder(model) / "skipped.tsv",
                         [{"tile": name, "why": skipped[name]} for name in sorted(skipped)],
                         ("tile", "why"))
        cells, positive = (sum(row[name] for row in rows) for name in ("cells", "positive"))
        print(f"{model.name}: {len(done) + len(skipped)} tiles found = {len(done)} done + "
              f"{len(skipped)} skipped; {positive} of {cells} cells positive")
    record_downstream_settings(config, "merge")
    return 0


def downstream_positive_rule(config: Config) -> str:
    """When a cell is positive, in words."""
    what = "mean" if config.percentile is None else f"{config.percentile:g}th percentile"
    return f"{what} of the marker over the cell above " + {
        "fixed": f"{config.value}", "otsu": "Otsu's threshold over all cells of the cohort",
        "controls": f"the {cohort.CONTROLS}th percentile of cells of {'/'.join(config.controls)}",
    }[config.threshold]


def write_ratios(config: Config) -> int:
    """Write positive cells / cells of each donor: not the mean of its tiles."""
    check_downstream_settings(config, "merge")
    counts, rows = config.read_counts(), []
    for model, cells, positive in zip(config.models, counts.cells, counts.positive):
        for d, donor in enumerate(counts.donors):
            mine = counts.donor == d
            n, total, above = int(mine.sum()), int(cells[mine].sum()), int(positive[mine].sum())
            low, high = cohort.ratio_interval(positive[mine], cells[mine], config.resamples,
                                              config.seed)
            rows.append({"model": model.name, "donor": donor, "tiles": n, "cells": total,
                         "positive": above, "ratio": above / total if total else math.nan,
                         "low": low, "high": high, "flag": counts.flags[d],
                         "interval": "" if n >= FEW else f"too narrow: fewer than {FEW} tiles"})
    path = Path(config.out) / "donor_marker_ratio.tsv"
    forget_downstream_settings(config, "ratios")
    runs.write_table(path, rows)
    record_downstream_settings(config, "ratios")
    print(f"{len(counts.donors)} donors with {len(counts.donor)} tiles that every model has done; "
          f"{sum(map(bool, counts.flags))} donors flagged -> {path}")
    return 0


# ---------------------------------------------------------------------------------------- associate

def write_associations(config: Config) -> int:
    """Write rho of every model with every outcome, over the donors that have both."""
    check_downstream_settings(config, "merge")
    counts = config.read_counts()
    donors = config.read_donors(counts.donors)
    out, names, seed = Path(config.out), [model.name for model in config.models], config.seed
    status = dict.fromkeys(donors.names, "no tiles") | {
        name: flag or ("used" if name in donors.names else f"not in {Path(config.outcomes).name}")
        for name, flag in zip(counts.donors, counts.flags)}
    used = [d for d, name in enumerate(counts.donors) if status[name] == "used"]
    varies = np.bincount(counts.donor)[used] > 1                # (D,): a tile can be left out
    parts = [f"{count} {what}" for what, count in Counter(status.values()).most_common()]
    print(f"{len(status)} donors: {', '.join(parts)}; {np.count_nonzero(~varies)} of those used "
          "have one tile and cannot vary in redraws")
    row_of = [donors.names.index(counts.donors[d]) for d in used]
    outcomes, z = donors.outcomes[:, row_of], donors.covariates[:, row_of]         # (K, D), (k, D)
    for name in (*config.covariates, *config.categories):
        rows = z[[column == name for column in donors.columns]]
        if not any(len(np.unique(row[~np.isnan(row)])) > 1 for row in rows):
            print(f"{config.outcomes}: column {name} has no two values among the donors used; "
                  "nothing is corrected for it", file=sys.stderr)
    ratio = counts.sums(counts.positive)[:, used] / counts.sums(counts.cells)[:, used]     # (M, D)
    redrawn = cohort.redrawn_ratios(counts.positive, counts.cells, counts.donor, config.share,
                                    config.resamples, seed)[..., used]                  # (M, B, D)
    whole = [[cohort.donor_association(x, y, z, seed) for y in outcomes] for x in ratio]    # M x K
    rho, p = np.array([[cohort.redrawn_donors(x, y, z, found) for y, found in zip(outcomes, row)]
                       for x, row in zip(redrawn, whole)]).transpose(2, 3, 0, 1)   # (B, M, K) each
    known = ~np.isnan(outcomes) & ~np.isnan(z).any(0)                              # (K, D)
    fixed = ~(known & varies).any(1)                           # no redraw differs from all tiles
    rho[..., fixed] = p[..., fixed] = np.nan
    q_whole = cohort.false_discovery(np.array([[each.p for each in row] for row in whole]))
    q = cohort.false_discovery(p)
    found, stable, changes = [], [], []
    for m, i in np.ndindex(len(names), len(outcomes)):
        outcome, result = config.columns[i], whole[m][i]._asdict()
        row = {"model": names[m], "outcome": outcome, "q": q_whole[m, i], **result}
        found.append({name: row[name] for name in SPEARMAN})
        stable.append({**{name: row[name] for name in SPEARMAN[:4]},
                       **outcome_stability(row["rho"], rho[:, m, i], q[:, m, i])})
        if m:
            change = cohort.donor_difference(ratio[0], ratio[m], outcomes[i], z, config.resamples,
                                             seed)
            changes.append(dict(zip(CHANGES, (names[m], names[0], outcome, *change))))
    forget_downstream_settings(config, "associate")
    runs.write_table(out / "e5_donors.tsv",
                     [{"donor": name, "status": status[name]} for name in sorted(status)])
    runs.write_table(out / "e5_spearman.tsv", found)
    runs.write_table(out / "e5_bootstrap_stability.tsv", stable)
    runs.write_table(out / "e5_redraws.tsv", [
        {"model": name, "redraw": b + 1, **dict(zip(config.columns, rho[b, m]))}
        for m, name in enumerate(names) for b in range(config.resamples)])
    runs.write_table(out / "e5_difference.tsv", changes, CHANGES)
    record_downstream_settings(config, "associate")
    for row in found:
        values = "rho {rho:.3f} [{low:.3f}, {high:.3f}]  p {p:.2g}  q {q:.2g}".format(**row)
        print(f"{row['model']}  {row['outcome']}  n {row['n']}  {row['left_out'] or values}")
    return 0


def outcome_stability(rho: float, redrawn: np.ndarray, q: np.ndarray) -> dict[str, Any]:
    """Summary of an association over redraws (B,) of the tiles."""
    have = ~np.isnan(redrawn)
    values, n = redrawn[have], int(have.sum())
    if n < 2:
        return dict.fromkeys(STABILITY, math.nan) | {"redraws": n}
    quantiles = np.quantile(values, (0.025, 0.25, 0.5, 0.75, 0.975))
    return dict(zip(STABILITY, (n, values.std(ddof=1), *quantiles,
                                np.mean(np.sign(values) == np.sign(rho)), np.mean(q[have] < 0.05))))


# ------------------------------------------------------------------------------------------- report

def write_outcome_report(config: Config) -> int:
    check_downstream_settings(config, "merge", "ratios", "associate")
    looks = report.page_styles(model.name for model in config.models)
    legend, found = report.legend(looks), read_outcome_rows(config, "e5_spearman.tsv")
    stable = read_outcome_rows(config, "e5_bootstrap_stability.tsv")
    forest = report.forest_chart([report.Interval(
        row["outcome"], row["model"], row["rho"], row["low"], row["high"], row["q"] < 0.05,
        row["left_out"]) for row in found], looks, "Spearman's rho")
    corrected = ", ".join((*config.covariates, *config.categories))
    corrected = f", corrected for {corrected}" if corrected else ""
    sections = [
        ("What was used", f"Positive: {downstream_positive_rule(config)}.\nOnly tiles that every "
         "model has done count, and only donors that no model flags. A donor without an outcome is "
         "left out of that one.", *outcome_tables_used(config)),
        ("Association", "Spearman's rho of the positive fraction with each outcome, and its 95 % "
         f"interval (Bonett and Wright){corrected}. Filled marks: q below 0.05, Benjamini and "
         "Hochberg over the outcomes of a model.", legend, forest,
         downstream_table(found, "outcome", "model", "n", "rho", "p", "q", "p_from", "left_out")),
        ("Donors", "A dot is a donor: its fraction of positive cells, over its outcome.", legend,
         report.side_by_side(outcome_scatters(config, looks))),
        ("Stability", f"rho in {config.resamples} redraws of {config.share:.0%} of each donor's "
         "tiles, at least one left out; the dashed line is rho with all tiles. Fewer tiles are "
         "noisier, so redraws tend to lie nearer to 0. A redraw's q is taken over the same family.",
         legend, report.side_by_side(marker_histograms(config, found, looks)),
         downstream_table(stable, "outcome", "model", "median", "sd", "same_sign", "q_below_0.05"))]
    if len(config.models) > 1:
        changes = read_outcome_rows(config, "e5_difference.tsv")
        sections.append((
            "Between models", f"rho less that of {config.models[0].name}, of the same donors; 95 % "
            f"interval from {config.resamples} resamples of the donors with all their values. "
            "Where rho is negative, a negative difference is the stronger association.",
            downstream_table(changes, "outcome", "model", "n", "difference")))
    if config.experiments:
        sections.append((
            "All experiments", "Means over a model's rows of the tables given. E5 is this page: "
            "the median over outcomes of |rho|, the mean share of redraws of the same sign, "
            "outcomes with q below 0.05.", experiments_table(config, found, stable)))
    weights = "; ".join(f"{model.name}: {Path(model.weights).name}" for model in config.models)
    note = f"{', '.join(looks)}; {len(config.columns)} outcomes of {Path(config.outcomes).name}"
    path = Path(config.out) / "report.html"
    runs.write_text(path, report.page(
        "Marker-positive cells and outcomes", note,
        [report.report_section(*parts) for parts in sections],
        f"{weights}; seed {config.seed}. The tables behind this page lie beside it."))
    print(path)
    return 0


def read_outcome_rows(config: Config, name: str) -> list[dict[str, Any]]:
    """Rows of a table of an earlier step, by outcome; NaN where there is no number."""
    path = Path(config.out) / name
    rows = [{name: text if name in WORDS else float(text or "nan") for name, text in row.items()}
            for row in runs.read_table(path, advice="run `downstream.py associate` first")]
    if rows and "outcome" in rows[0]:
        rows.sort(key=lambda row: config.columns.index(row["outcome"]))
    return rows


def downstream_table(rows: list[dict[str, Any]], *columns: str) -> str:
    """Columns of read_outcome_rows for the page, those of INTERVALS with their interval below."""
    def cell(row: dict[str, Any], name: str) -> str | report.Cell:
        if name in WORDS:
            return row[name] or "-"
        if name == "n":
            return f"{row[name]:.0f}"
        if name in ("same_sign", "q_below_0.05"):
            return outcome_percent(row[name])
        low, high = (row[end] for end in INTERVALS.get(name, (name, name)))
        below = name in INTERVALS and not math.isnan(low)
        return report.Cell(outcome_number(row[name]), f"{low:.3f} to {high:.3f}" * below)

    heads = [HEADS.get(name, name.replace("_", " ")) for name in columns]
    return report.html_table(heads, [[cell(row, name) for name in columns] for row in rows], 2)


def outcome_number(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.3f}" if abs(value) >= 0.001 or not value else f"{value:.0e}"


def outcome_percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.0%}"


def outcome_tables_used(config: Config) -> list[str]:
    """Tables of tiles, donors, and skipped tiles."""
    rows = []
    why: dict[str, str] = {}
    for model in config.models:
        counts, skipped = (runs.read_table(config.folder(model) / name, (), "run merge first")
                           for name in ("tile_counts.tsv", "skipped.tsv"))
        cells, positive = (sum(int(row[what]) for row in counts) for what in ("cells", "positive"))
        numbers = len(counts) + len(skipped), len(counts), len(skipped), cells, positive
        rows.append((model.name, *(f"{number:,}" for number in numbers),
                     outcome_percent(positive / cells if cells else math.nan),
                     f"{float(counts[0]['threshold']):.5g}"))
        why |= {row["tile"]: row["why"] for row in skipped}
    table = runs.read_table(Path(config.out) / "e5_donors.tsv", (), "run associate first")
    status = Counter(row["status"] for row in table).most_common()
    shown = [(name, why[name]) for name in sorted(why)[:10]]
    if len(why) > len(shown):
        shown.append((f"and {len(why) - len(shown)} more", "in skipped.tsv"))
    columns = "model", "tiles found", "done", "skipped", "cells", "positive", "share", "threshold"
    donors = [(what, str(count)) for what, count in status]
    tables = [report.html_table(columns, rows), report.html_table(("donors", "number"), donors)]
    return tables + ([report.html_table(("skipped tile", "why"), shown, 2)] if shown else [])


def outcome_scatters(config: Config, looks: dict) -> dict[str, str]:
    donors = config.read_donors()
    ratio = {(row["model"], row["donor"]): row["ratio"]
             for row in read_outcome_rows(config, "donor_marker_ratio.tsv") if not row["flag"]}
    charts = {}
    for name, outcome in zip(config.columns, donors.outcomes):
        points = {model: [(x, ratio[model, donor]) for donor, x in zip(donors.names, outcome)
                          if (model, donor) in ratio] for model in looks}
        charts[name] = report.dot_chart(points, looks, name, "positive fraction")
    return charts


def marker_histograms(config: Config, found: list[dict], looks: dict) -> dict[str, str]:
    redraws, charts = read_outcome_rows(config, "e5_redraws.tsv"), {}
    for name in config.columns:
        values = {model: [row[name] for row in redraws if row["model"] == model] for model in looks}
        rho = {row["model"]: row["rho"] for row in found if row["outcome"] == name}
        charts[name] = report.histogram_chart(values, rho, looks, "rho", "redraws")
    return charts


def experiments_table(config: Config, found: list[dict], stable: list[dict]) -> str:
    """A row for each model, with columns of all experiments."""
    columns: dict[str, dict[str, str]] = defaultdict(dict)
    for experiment in config.experiments:
        rows = runs.read_table(experiment.table, ("model", *experiment.columns),
                               f"it is the table of {experiment.name}")
        for column in experiment.columns:
            values = defaultdict(list)
            for number, row in enumerate(rows, 2):
                where = f"{experiment.table}, line {number}: {column}"
                values[row["model"]].append(cohort.donor_table_number(row[column], where))
            columns[f"{experiment.name} {column}"] = {
                name: outcome_number(report.chart_mean(each)) for name, each in values.items()}
    for model in config.models:
        mine = [row for row in found if row["model"] == model.name and not math.isnan(row["rho"])]
        rho = float(np.median([abs(row["rho"]) for row in mine])) if mine else math.nan
        same = (row["same_sign"] for row in stable if row["model"] == model.name)
        few = sum(row["q"] < 0.05 for row in mine)
        columns["E5 |rho|"][model.name] = outcome_number(rho)
        columns["E5 same sign"][model.name] = outcome_percent(report.chart_mean(same))
        columns["E5 q < 0.05"][model.name] = f"{few} of {len(mine)}"
    names = dict.fromkeys(name for column in columns.values() for name in column)
    return report.html_table(("model", *columns), [
        (name, *(column.get(name, "-") for column in columns.values())) for name in names])


# -------------------------------------------------------------------------------------------- check

def print_study(config: Config) -> int:
    print(runs.to_yaml(config))
    tiles, unusable, others = config.find_tiles()
    names = sorted({tile.donor for tile in tiles})
    print(f"{len(tiles)} tiles of {len(names)} donors ({runs.listed(names)}), such as "
          f"{' and '.join(path.name for path in tiles[0].files)}")
    print(f"{len(unusable)} tiles cannot be used; {others} other files")
    for name in sorted(unusable)[:5]:
        print(f"    {name}: {unusable[name]}")
    for model in config.models:
        lines = config.lines(model, tiles)
        done = sum(tile.name in lines and "why" not in lines[tile.name] for tile in tiles)
        print(f"{model.name}: {model.weights} ({model.digest()}), {done} tiles done")
    donors = config.read_donors()
    both = [name in names for name in donors.names]
    print(f"{config.outcomes}: {len(both)} donors, {sum(both)} of them with tiles")
    for name, values in zip(config.columns, donors.outcomes[:, both]):
        print(f"    {name}: {np.count_nonzero(~np.isnan(values))} values")
    return 0


STEPS = {"infer": infer_donor_tiles, "merge": count_positive_cells, "ratios": write_ratios,
         "associate": write_associations, "report": write_outcome_report}

if __name__ == "__main__":
    yaml_first = sorted(sys.argv[1:], key=lambda word: not word.endswith((".yaml", ".yml")))
    runs.script(__doc__, Config, main, yaml_first)
