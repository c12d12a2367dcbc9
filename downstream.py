"""Do marker-positive cells go with outcomes of donors? python downstream.py CONFIG.yaml [key=value ...]

    infer       every model finds the cells of every tile, a pair of images: nuclei and marker
    merge       counts of each tile, from what one process or an array of shards has found
    ratios      the positive fraction of each donor
    associate   Spearman's rho with each outcome, its stability, and what the better model changes
    report      one page of it all

`python downstream.py CONFIG` does all, `python downstream.py STEP CONFIG` one; with --check it says what is
there and stops. On a cluster `infer shard=3/16` does a sixteenth (slurm/array.sh), and `merge` follows when
all are done. Stopped and started again, infer goes on with the next tile. Below out= there are

    full_inference/MODEL/shards/3_of_16.jsonl    the intensity of each cell, a line for each tile
    full_inference/MODEL/tile_counts.tsv         donor, tile, cells, positive, area, seconds, model, threshold
    full_inference/MODEL/skipped.tsv             the other tiles, and why: found = done + skipped
    donor_marker_ratio.tsv                       positive / cells of each donor, with an interval
    e5_spearman.tsv, e5_difference.tsv           rho, p, q; the models' difference in rho
    e5_bootstrap_stability.tsv, e5_redraws.tsv   rho when tiles are redrawn: in short, and one by one
    e5_donors.tsv, report.html                   who was used and who not, and why; the page

A cell is positive if `statistic` of the marker over its pixels lies above `threshold`. Only tiles that every
model has done count, and only donors that no model flags, so that models are compared on the same material.
"""
from __future__ import annotations

import hashlib
import json
import math
import re
import sys
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

import runs

OUTCOMES = ("braaksc", "ceradsc", "cogdx", "dcfdx_lv", "plaq_d", "plaq_n", "nft", "gpath")
STABILITY = ("redraws", "sd", "q2.5", "q25", "median", "q75", "q97.5", "same_sign", "q_below_0.05")
FEW = 20             # tiles below which an interval from resampling tiles is too narrow


@dataclass(frozen=True)
class Model:
    name: str                               # its folder and row
    weights: str                            # file that train_seg.py exported
    sees: Literal["both", "nuclei", "marker"] = "both"       # [nuclei, marker, 0], or one of them three times
    peak: float | None = None               # null: the weights' own
    fill: float | None = None               # null: the weights' own
    min_area: int | None = None             # px; null: the weights' own


@dataclass(frozen=True)
class Experiment:
    name: str                               # heads its columns: E1
    table: str                              # TSV
    columns: tuple[str, ...]                # numbers in it, averaged over a model's rows
    by: str = "model"                       # column that names the model


@dataclass(frozen=True)
class Config:
    out: str = "downstream"                 # folder for everything
    tiles: str = "tiles"                    # folder of the images, searched whole
    pattern: str = r"b0c(?P<channel>\d+)"   # regular expression in a file's name, around its channel
    nuclei: str = "0"                       # channel of the nuclei
    marker: str = "1"                       # channel of the marker
    donor: str | None = None                # regular expression in a path, around its donor; null: donor_7
    models: tuple[Model, ...] = ()          # name, weights, sees, peak, fill, min_area; first the baseline
    shard: str = "1/1"                      # infer: which part of the tiles, 3/16
    diameter: float | None = None           # px, how wide cells are in the tiles; null: as trained
    border: Literal["keep", "drop"] = "keep"  # drop: leave out cells cut by the edge of a tile
    statistic: Literal["mean", "percentile"] = "mean"        # of the marker over a cell's pixels
    percentile: float = 75                  # if statistic=percentile
    threshold: Literal["otsu", "fixed", "controls", "otsu_per_donor"] = "otsu"   # otsu: over all cells
    value: float | None = None              # if threshold=fixed, in the images' own units
    controls: tuple[str, ...] = ()          # donors without the marker; if threshold=controls
    control_percentile: float = 99          # of the controls' cells, that are not positive
    min_tiles: int = 3                      # donors with fewer are flagged and left out
    min_cells: int = 100                    # the same
    outcomes: str = "outcomes.tsv"          # table of the donors, .tsv or .csv
    donor_column: str = "donor"             # its column of donors
    columns: tuple[str, ...] = OUTCOMES     # its columns of outcomes
    covariates: tuple[str, ...] = ()        # its columns of numbers to correct for: age
    categories: tuple[str, ...] = ()        # its columns of words to correct for: sex, batch
    family: Literal["model", "all"] = "model"  # q-values over a model's outcomes, or over those of all models
    redraws: int = 1000                     # of tiles, for stability
    share: float = 0.8                      # of each donor's tiles in a redraw
    resamples: int = 1000                   # for bootstrap intervals
    seed: int = 0                           # of everything random
    experiments: tuple[Experiment, ...] = ()  # tables of other experiments for the page: name, table, columns
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU if there is one
    batch: int | None = None                # network tiles at once; null: 4 on the CPU, 32 on a GPU

    def __post_init__(self):
        names = [model.name for model in self.models]
        if not names:
            raise ValueError("no models; give models: [{name: baseline, weights: FILE}, ...]")
        for name in names:
            if not re.fullmatch(r"\w[\w.-]*", name) or names.count(name) > 1:
                raise ValueError(f"model '{name}': expected names that differ, of letters, digits, _ - .")
        try:
            groups = re.compile(self.pattern).groupindex
        except re.error as error:
            raise ValueError(f"pattern={self.pattern}: not a regular expression, {error}") from None
        if "channel" not in groups:
            raise ValueError(f"pattern={self.pattern}: has no group (?P<channel>...) around the channel")
        if self.nuclei == self.marker:
            raise ValueError(f"nuclei={self.nuclei} and marker={self.marker}: expected two channels")
        runs.part_of(self.shard)
        if self.threshold == "fixed" and self.value is None:
            raise ValueError("threshold=fixed needs value=, in the units of the marker images")
        if self.threshold == "controls" and not self.controls:
            raise ValueError("threshold=controls needs controls=, the donors without the marker")
        for name in ("percentile", "control_percentile"):
            if not 0 <= getattr(self, name) <= 100:
                raise ValueError(f"{name}={getattr(self, name):g}: expected 0 to 100")
        for name in ("min_tiles", "min_cells", "redraws", "resamples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected 1 or more")
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share:g}: expected more than 0, at most 1")
        used = [self.donor_column, *self.columns, *self.covariates, *self.categories]
        if doubled := [name for name, count in Counter(used).items() if count > 1]:
            raise ValueError(f"column {doubled[0]} is used twice; expected one use of each column")


def main(config: Config, files: list[str], check: bool = False) -> int:
    step = files[0] if files else None
    if len(files) > 1 or step not in (None, *STEPS):
        raise ValueError(f"got {' '.join(files)}, expected one of {', '.join(STEPS)}, or none for all")
    if config.shard != "1/1" and step != "infer":
        raise ValueError(f"shard={config.shard} is for infer; when all shards are done, merge without it")
    if check:
        return print_check(config)
    if step is None:
        read_donors(config)                                    # a mistake there must not cost hours
    for run in STEPS.values() if step is None else [STEPS[step]]:
        if code := run(config):
            return code
    return 0


# ------------------------------------------------------------------------------------------------- infer

def infer(config: Config) -> int:
    """The cells of this shard's tiles; a line for each tile and model, which is not done again."""
    from tqdm import tqdm
    import cohort
    tiles, lost, passed = find_tiles(config)
    number, count = runs.part_of(config.shard)
    mine = tiles[number - 1::count]
    donors = len({tile.donor for tile in tiles})
    print(f"{config.tiles}: {len(tiles)} tiles of {donors} donors, {len(mine)} in shard {config.shard}; "
          f"{len(lost)} lack a partner or a donor, {passed} other files passed over")
    networks = [Network(entry, config) for entry in config.models]
    skipped = 0
    with runs.stop_signals() as stop:
        for tile in tqdm(mine, f"shard {config.shard}", unit="tile", delay=1, file=sys.stderr):
            todo = [network for network in networks if tile.name not in network.done]
            if not todo:
                continue
            if stop:
                print("stopped; the same command goes on from here", file=sys.stderr)
                return runs.REQUEUE
            try:
                pixels = cohort.read_tile(tile)
            except (ValueError, OSError) as error:             # this tile's fault: the others are done
                tqdm.write(f"warning: {runs.sentence(error)}", file=sys.stderr)
                skipped += 1
                for network in todo:
                    network.write(tile, why=" ".join(runs.sentence(error).split()))
                continue
            for network in todo:
                network.write(tile, **network.measure(pixels))
    print(f"shard {config.shard}: {len(mine) - skipped} tiles done, {skipped} skipped")
    return 0


class Network:
    """A model with its lines in the shard's file."""

    def __init__(self, entry: Model, config: Config):
        import cohort
        self.entry, self.config, self.key = entry, config, key(entry, config)
        folder = folder_of(entry, config) / "shards"
        folder.mkdir(parents=True, exist_ok=True)
        self.done = {name for name, line in cohort.recorded(folder, self.key).items() if "why" not in line}
        self.path = folder / f"{config.shard.replace('/', '_of_')}.jsonl"
        own = [line for line in cohort.lines(self.path) if line["key"] == self.key and "why" not in line]
        runs.write_text(self.path, "".join(json.dumps(line) + "\n" for line in own))    # whole lines

    @cached_property
    def net(self):
        import model
        return model.load(self.entry.weights).ready(runs.pick_device(self.config.device))

    def measure(self, pixels: np.ndarray) -> dict[str, Any]:
        """Cells of a tile (2, H, W): the marker in each, in the image's units, and their area."""
        import cohort
        import data
        import segment
        entry, config, net = self.entry, self.config, self.net
        begin = time.perf_counter()
        seen = {"both": pixels, "nuclei": pixels[:1], "marker": pixels[1:]}[entry.sees]
        options = dict(diameter=config.diameter, limits=data.percentiles(seen, net.settings.low, net.settings.high))
        labels = segment.segment(seen, net, **options, border=config.border, batch=config.batch,
                                 peak=entry.peak, fill=entry.fill, min_area=entry.min_area)
        seconds = time.perf_counter() - begin
        percentile = config.percentile if config.statistic == "percentile" else None
        values = [float(f"{value:.6g}") for value in cohort.intensity(labels, pixels[1], percentile)]
        return dict(seconds=round(seconds, 3), area_px=int(np.count_nonzero(labels)), dtype=str(pixels.dtype),
                    intensity=values)

    def write(self, tile: Any, **found: Any) -> None:
        line = dict(tile=tile.name, donor=tile.donor, key=self.key, **found)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def find_tiles(config: Config):
    import cohort
    return cohort.find_tiles(config.tiles, config.pattern, config.nuclei, config.marker, config.donor)


def folder_of(entry: Model, config: Config) -> Path:
    return Path(config.out) / "full_inference" / entry.name


def key(entry: Model, config: Config) -> str:
    """Stands for all that a line depends on besides the tile: the content of the weights, and settings."""
    percentile = config.percentile if config.statistic == "percentile" else None
    settings = {**asdict(entry), "name": None, "weights": weights_hash(entry), "diameter": config.diameter,
                "border": config.border, "percentile": percentile, "tiles": config.tiles, "pattern": config.pattern,
                "nuclei": config.nuclei, "marker": config.marker}            # a tile is named after its nuclei only
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def weights_hash(entry: Model) -> str:
    path = Path(entry.weights)
    if not path.is_file():
        raise FileNotFoundError(f"model '{entry.name}': no weights at {path}; train with train_seg.py or "
                                "give another file")
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


# ----------------------------------------------------------------------------------------- merge, ratios

def merge(config: Config) -> int:
    """Lines of all shards -> counts of all tiles, now that a threshold over the cohort can be taken."""
    import cohort
    tiles, lost, _ = find_tiles(config)
    found = []
    for entry in config.models:
        found.append(cohort.recorded(folder_of(entry, config) / "shards", key(entry, config)))
        if missing := [tile.name for tile in tiles if tile.name not in found[-1]]:
            raise ValueError(f"model '{entry.name}': {len(missing)} of {len(tiles)} tiles are not done with "
                             f"these settings, such as {missing[0]}; run infer, or the shards that did not "
                             "end, and merge again")
    if config.threshold == "otsu_per_donor":
        print("warning: threshold=otsu_per_donor splits every donor's own cells in two: it erases the "
              "differences between donors that are to be found", file=sys.stderr)
    print(f"positive: {rule(config)}")
    for entry, recorded in zip(config.models, found):
        lines = [{**recorded[tile.name], "donor": tile.donor} for tile in tiles]     # donor= may have changed since
        done = [line for line in lines if "why" not in line]
        skipped = lost | {line["tile"]: line["why"] for line in lines if "why" in line}
        cuts = cohort.thresholds(done, config.threshold, config.value, config.controls,
                                 config.control_percentile)
        digest = weights_hash(entry)
        rows = [{"donor": line["donor"], "tile": line["tile"], "cells": len(line["intensity"]),
                 "positive": sum(value > cuts[line["donor"]] for value in line["intensity"]),
                 "area_px": line["area_px"], "seconds": line["seconds"], "model_sha256": digest,
                 "threshold": cuts[line["donor"]]} for line in done]
        if not rows:
            raise ValueError(f"model '{entry.name}': all {len(skipped)} tiles were skipped, such as "
                             f"{next(iter(skipped.items()))[1]}")
        cohort.write_tsv(folder_of(entry, config) / "tile_counts.tsv", rows)
        cohort.write_tsv(folder_of(entry, config) / "skipped.tsv",
                         [{"tile": name, "why": skipped[name]} for name in sorted(skipped)], ("tile", "why"))
        cells, positive = (sum(row[name] for row in rows) for name in ("cells", "positive"))
        print(f"{entry.name}: {len(done) + len(skipped)} tiles found = {len(done)} done + {len(skipped)} "
              f"skipped; {positive} of {cells} cells positive")
    return 0


def rule(config: Config) -> str:
    """When a cell is positive, in words."""
    what = "mean" if config.statistic == "mean" else f"{config.percentile:g}th percentile"
    return f"{what} of the marker over the cell above " + {
        "fixed": f"{config.value}", "otsu": "Otsu's threshold over all cells of the cohort",
        "otsu_per_donor": "Otsu's threshold of each donor by itself, which erases differences between donors",
        "controls": f"the {config.control_percentile:g}th percentile of cells of {'/'.join(config.controls)}",
    }[config.threshold]


def read_cohort(config: Config):
    import cohort
    return cohort.read_cohort([folder_of(entry, config) / "tile_counts.tsv" for entry in config.models],
                              config.controls, config.min_tiles, config.min_cells)


def read_donors(config: Config):
    import cohort
    return cohort.read_donors(config.outcomes, config.donor_column, config.columns, config.covariates,
                              config.categories)


def ratios(config: Config) -> int:
    """Sum of positive cells over sum of cells of each donor: a tile counts as much as it has cells."""
    import association
    import cohort
    seen, rows = read_cohort(config), []
    for entry, cells, positive in zip(config.models, seen.cells, seen.positive):
        for d, donor in enumerate(seen.donors):
            mine = seen.donor == d
            n, total, above = int(mine.sum()), int(cells[mine].sum()), int(positive[mine].sum())
            low, high = association.ratio_interval(positive[mine], cells[mine], config.resamples, config.seed)
            rows.append({"model": entry.name, "donor": donor, "tiles": n, "cells": total, "positive": above,
                         "ratio": above / total if total else math.nan, "low": low, "high": high,
                         "flag": seen.flags[d],
                         "interval": "" if n >= FEW else f"too narrow: fewer than {FEW} tiles"})
    cohort.write_tsv(Path(config.out) / "donor_marker_ratio.tsv", rows)
    print(f"{len(seen.donors)} donors with {len(seen.donor)} tiles that every model has done; "
          f"{sum(map(bool, seen.flags))} donors flagged -> {Path(config.out) / 'donor_marker_ratio.tsv'}")
    return 0


# --------------------------------------------------------------------------------------------- associate

def associate(config: Config) -> int:
    """rho of every model with every outcome, over the donors that have both."""
    import association
    import cohort
    seen, table, out = read_cohort(config), read_donors(config), Path(config.out)
    if not set(seen.donors) & set(table.names):
        raise ValueError(f"{config.outcomes}: none of its donors ({cohort.some(table.names)}) has tiles, "
                         f"which are of {cohort.some(seen.donors)}; name them alike, or give another donor=")
    place = {name: number for number, name in enumerate(table.names)}
    status = dict.fromkeys(place, "no tiles") | {
        name: flag or ("used" if name in place else f"not in {Path(config.outcomes).name}")
        for name, flag in zip(seen.donors, seen.flags)}
    cohort.write_tsv(out / "e5_donors.tsv",
                     [{"donor": name, "status": status[name]} for name in sorted(status)])
    print(f"{len(status)} donors: "
          + ", ".join(f"{count} {what}" for what, count in Counter(status.values()).most_common()))

    use = [d for d, name in enumerate(seen.donors) if status[name] == "used"]
    rows_of = [place[seen.donors[d]] for d in use]
    outcomes = table.outcomes[:, rows_of]                                                    # (K, D)
    z = None if table.covariates is None else table.covariates[:, rows_of]                   # (k, D)
    ratio = seen.sums(seen.positive)[:, use] / seen.sums(seen.cells)[:, use]                 # (M, D)
    redrawn = association.redrawn_ratios(seen.positive, seen.cells, seen.donor, config.share, config.redraws,
                                         config.seed)[..., use]                              # (M, B, D)
    whole = [[association.associate(x, y, z, config.seed) for y in outcomes] for x in ratio]     # M times K
    rho, p = np.array([[association.redrawn(x, y, z, one) for y, one in zip(outcomes, row)]
                       for x, row in zip(redrawn, whole)]).transpose(2, 3, 0, 1)             # (B, M, K) each
    q_whole = false_discovery(np.array([[one.p for one in row] for row in whole]), config)
    q = false_discovery(p, config)
    found, stable, changes = [], [], []
    for m, entry in enumerate(config.models):
        for i, name in enumerate(config.columns):
            one, labels = whole[m][i], {"model": entry.name, "outcome": name, "n": whole[m][i].n}
            found.append({**labels, "rho": one.rho, "low": one.low, "high": one.high, "p": one.p,
                          "q": q_whole[m, i], "p_from": one.p_from, "covariates": one.k, "left_out": one.why})
            stable.append({**labels, "rho": one.rho, **stability(one.rho, rho[:, m, i], q[:, m, i])})
            if m:
                change, low, high, n = association.difference(ratio[0], ratio[m], outcomes[i], z,
                                                              config.resamples, config.seed)
                changes.append({"model": entry.name, "against": config.models[0].name, "outcome": name,
                                "n": n, "difference": change, "low": low, "high": high})
    cohort.write_tsv(out / "e5_spearman.tsv", found)
    cohort.write_tsv(out / "e5_bootstrap_stability.tsv", stable)
    cohort.write_tsv(out / "e5_redraws.tsv", [
        {"model": entry.name, "redraw": b + 1, **dict(zip(config.columns, rho[b, m]))}
        for m, entry in enumerate(config.models) for b in range(config.redraws)])
    cohort.write_tsv(out / "e5_difference.tsv", changes,
                     ("model", "against", "outcome", "n", "difference", "low", "high"))
    for row in found:
        values = "rho {rho:.3f} [{low:.3f}, {high:.3f}]  p {p:.2g}  q {q:.2g}".format(**row)
        print(f"{row['model']}  {row['outcome']}  n {row['n']}  {row['left_out'] or values}")
    return 0


def false_discovery(p: np.ndarray, config: Config) -> np.ndarray:
    """q of p (..., M, K) over the family that the configuration states."""
    import association
    if config.family == "model":
        return association.benjamini_hochberg(p)
    return association.benjamini_hochberg(p.reshape(*p.shape[:-2], -1)).reshape(p.shape)


def stability(rho: float, redrawn: np.ndarray, q: np.ndarray) -> dict[str, Any]:
    """What redrawn tiles (B,) make of one association."""
    have = ~np.isnan(redrawn)
    if have.sum() < 2:
        return {"redraws": int(have.sum())} | dict.fromkeys(STABILITY[1:], math.nan)
    found = redrawn[have]
    quantiles = np.quantile(found, (0.025, 0.25, 0.5, 0.75, 0.975))
    return dict(zip(STABILITY, (len(found), found.std(ddof=1), *quantiles,
                                np.mean(np.sign(found) == np.sign(rho)), np.mean(q[have] < 0.05))))


# ------------------------------------------------------------------------------------------------ report

def report(config: Config) -> int:
    """The page, from the tables that the other steps wrote."""
    import report as pages
    looks = pages.styles(entry.name for entry in config.models)
    found, stable = numbers(config, "e5_spearman.tsv"), numbers(config, "e5_bootstrap_stability.tsv")
    corrected = ", ".join((*config.covariates, *config.categories))
    sections = [
        pages.section(
            "What was used", f"Positive: {rule(config)}.\nOnly tiles that every model has done count, and "
            "only donors that no model flags. Donors without an outcome are left out of that outcome alone.",
            *used(config)),
        pages.section(
            "Association", "Spearman's rho of a donor's positive fraction with each outcome"
            + (f", corrected for {corrected}" if corrected else "") + ", and its 95 % interval (Bonett and "
            "Wright). Filled marks: q below 0.05, Benjamini and Hochberg over the outcomes of "
            + ("a model." if config.family == "model" else "all models."), pages.legend(looks),
            pages.forest([pages.Interval(
                row["outcome"], row["model"], row["rho"], row["low"], row["high"], row["q"] < 0.05,
                row["left_out"]) for row in found], looks, "Spearman's rho"),
            pages.html_table(("outcome", "model", "n", "rho", "p", "q", "p from", "left out"), [
                (row["outcome"], row["model"], str(row["n"]), bounded(row, "rho"), short(row["p"]),
                 short(row["q"]), row["p_from"] or "-", row["left_out"] or "-") for row in found], 2)),
        pages.section("Donors", "A dot is a donor: its fraction of positive cells, over its outcome.",
                      pages.legend(looks), pages.side_by_side(*scatters(config, looks))),
        pages.section(
            "Stability", f"rho in {config.redraws} redraws of {config.share:.0%} of each donor's tiles; the "
            "dashed line is rho with all tiles. Fewer tiles are noisier, so redraws tend to lie nearer to 0. A "
            "redraw's q is taken over the same family.",
            pages.legend(looks), pages.side_by_side(*histograms(config, found, looks)),
            pages.html_table(("outcome", "model", "median rho", "standard deviation", "same sign", "q < 0.05"), [
                (row["outcome"], row["model"], bounded(row, "median", "q2.5", "q97.5"), short(row["sd"]),
                 percent(row["same_sign"]), percent(row["q_below_0.05"])) for row in stable], 2))]
    if len(config.models) > 1:
        sections.append(pages.section(
            "Between models", f"rho less that of {config.models[0].name}, of the same donors; 95 % interval "
            f"from {config.resamples} resamples of the donors with all their values. Where rho is negative, "
            "a negative difference is the stronger association.",
            pages.html_table(("outcome", "model", "n", "difference"), [
                (row["outcome"], row["model"], str(row["n"]), bounded(row, "difference"))
                for row in numbers(config, "e5_difference.tsv")], 2)))
    if config.experiments:
        sections.append(pages.section(
            "All experiments", "Means over a model's rows of the tables given. E5 is this page: the median "
            "over outcomes of |rho|, the mean share of redraws of the same sign, outcomes with q below 0.05.",
            compared(config, found, stable)))
    foot = "; ".join(f"{entry.name}: {Path(entry.weights).name}" for entry in config.models)
    note = f"{', '.join(looks)}; {len(config.columns)} outcomes of {Path(config.outcomes).name}"
    runs.write_text(Path(config.out) / "report.html", pages.page(
        "Marker-positive cells and outcomes", note, sections,
        f"{foot}; seed {config.seed}. The tables behind this page lie beside it."))
    print(Path(config.out) / "report.html")
    return 0


def numbers(config: Config, name: str) -> list[dict[str, Any]]:
    """Rows of a table of ours, outcome after outcome; numbers as such, NaN where there is none."""
    import cohort
    rows = cohort.read_table(Path(config.out) / name, (), "run `downstream.py associate` first")
    words = ("model", "against", "outcome", "p_from", "left_out", "donor", "flag", "interval")
    found = [{column: text if column in words else int(text) if text.isdigit() else float(text or "nan")
              for column, text in row.items()} for row in rows]
    if found and "outcome" in found[0]:
        if unknown := {row["outcome"] for row in found} ^ set(config.columns):
            raise ValueError(f"{Path(config.out) / name}: {sorted(unknown)[0]} is an outcome of the table or "
                             "the configuration alone; run associate again")
        found.sort(key=lambda row: config.columns.index(row["outcome"]))
    return found


def short(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.3f}" if abs(value) >= 0.001 or not value else f"{value:.0e}"


def percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.0%}"


def bounded(row: dict, name: str, low: str = "low", high: str = "high"):
    """A number, and its interval below it."""
    import report as pages
    return pages.Cell(short(row[name]), "" if math.isnan(row[low]) else f"{row[low]:.3f} to {row[high]:.3f}")


def used(config: Config) -> list[str]:
    """Tiles, donors, and what was left out."""
    import cohort
    import report as pages
    rows, left = [], {}
    for entry in config.models:
        counts, skipped = (cohort.read_table(folder_of(entry, config) / name, (), "run merge first")
                           for name in ("tile_counts.tsv", "skipped.tsv"))
        cells, positive = (sum(int(row[what]) for row in counts) for what in ("cells", "positive"))
        cuts = [float(row["threshold"]) for row in counts]
        rows.append((entry.name, f"{len(counts) + len(skipped):,}", f"{len(counts):,}", f"{len(skipped):,}",
                     f"{cells:,}", f"{positive:,}", percent(positive / cells if cells else math.nan),
                     " to ".join(dict.fromkeys(f"{cut:.5g}" for cut in (min(cuts), max(cuts))))))
        left |= {row["tile"]: row["why"] for row in skipped}
    donors = cohort.read_table(Path(config.out) / "e5_donors.tsv", ("status",), "run associate first")
    status = Counter(row["status"] for row in donors)
    shown = [(name, left[name]) for name in sorted(left)[:10]]
    if len(left) > len(shown):
        shown.append((f"and {len(left) - len(shown)} more", "in skipped.tsv"))
    columns = ("model", "tiles found", "done", "skipped", "cells", "positive", "share", "threshold")
    tables = [pages.html_table(columns, rows),
              pages.html_table(("donors", "number"), [(what, str(count)) for what, count in status.most_common()])]
    return tables + ([pages.html_table(("skipped tile", "why"), shown, 2)] if shown else [])


def scatters(config: Config, looks: dict) -> list[str]:
    import report as pages
    table = read_donors(config)
    ratio = {(row["model"], row["donor"]): row["ratio"] for row in numbers(config, "donor_marker_ratio.tsv")
             if not row["flag"]}
    drawn = []
    for name, outcome in zip(config.columns, table.outcomes):
        points = {model: [(x, ratio[model, donor]) for donor, x in zip(table.names, outcome)
                          if (model, donor) in ratio] for model in looks}
        drawn.append(pages.titled(name, pages.dots(points, looks, name, "positive fraction")))
    return drawn


def histograms(config: Config, found: list[dict], looks: dict) -> list[str]:
    import report as pages
    redraws = numbers(config, "e5_redraws.tsv")
    return [pages.titled(name, pages.histogram(
        {model: [row[name] for row in redraws if row["model"] == model] for model in looks},
        {row["model"]: row["rho"] for row in found if row["outcome"] == name}, looks, "rho", "redraws"))
        for name in config.columns]


def compared(config: Config, found: list[dict], stable: list[dict]) -> str:
    """A row for each model, with columns of all experiments."""
    import cohort
    import report as pages
    columns: dict[str, dict[str, str]] = {}
    for experiment in config.experiments:
        path, by = Path(experiment.table), experiment.by
        rows = cohort.read_table(path, (by, *experiment.columns), f"it is the table of {experiment.name}")
        for column in experiment.columns:
            values = defaultdict(list)
            for number, row in enumerate(rows, 2):
                values[row[by]].append(cohort.number_of(row[column], f"{path}, line {number}: {column}"))
            means = {name: short(mean(each)) for name, each in values.items()}
            columns[f"{experiment.name} {column}"] = means
    for entry in config.models:
        mine = [row for row in found if row["model"] == entry.name]
        rho = [abs(row["rho"]) for row in mine if not math.isnan(row["rho"])]
        same = mean([row["same_sign"] for row in stable if row["model"] == entry.name])
        for what, text in (("|rho|", short(float(np.median(rho)) if rho else math.nan)),
                           ("same sign", percent(same)),
                           ("q < 0.05", f"{sum(row['q'] < 0.05 for row in mine)} of {len(rho)}")):
            columns.setdefault(f"E5 {what}", {})[entry.name] = text
    names = dict.fromkeys(name for column in columns.values() for name in column)
    return pages.html_table(("model", *columns),
                       [(name, *(column.get(name, "-") for column in columns.values())) for name in names])


def mean(values: list[float]) -> float:
    """Of those that are not NaN."""
    have = [value for value in values if not math.isnan(value)]
    return sum(have) / len(have) if have else math.nan


# ------------------------------------------------------------------------------------------------- check

def print_check(config: Config) -> int:
    """What one wants to know before jobs are submitted; nothing is written."""
    import cohort
    print(runs.to_yaml(config))
    tiles, lost, passed = find_tiles(config)
    donors = sorted({tile.donor for tile in tiles})
    print(f"{len(tiles)} tiles of {len(donors)} donors ({cohort.some(donors)}), such as {tiles[0].name}: "
          f"{', '.join(path.name for path in tiles[0].files)}")
    print(f"{len(lost)} tiles cannot be used; {passed} other files passed over")
    for name in sorted(lost)[:5]:
        print(f"    {name}: {lost[name]}")
    for entry in config.models:
        done = cohort.recorded(folder_of(entry, config) / "shards", key(entry, config))
        before = sum("why" not in done.get(tile.name, {"why": ""}) for tile in tiles)
        print(f"{entry.name}: {entry.weights} ({weights_hash(entry)}), {before} tiles done before")
    table = read_donors(config)
    both = [d for d, name in enumerate(table.names) if name in donors]
    print(f"{config.outcomes}: {len(table.names)} donors, {len(both)} of them with tiles")
    for name, values in zip(config.columns, table.outcomes[:, both]):
        print(f"    {name}: {np.count_nonzero(~np.isnan(values))} values")
    return 0


STEPS = {"infer": infer, "merge": merge, "ratios": ratios, "associate": associate, "report": report}

if __name__ == "__main__":
    configuration_first = sorted(sys.argv[1:], key=lambda word: not word.endswith((".yaml", ".yml")))
    runs.script(__doc__, Config, main, configuration_first)
