"""Measure models and what limits them: python evaluate.py VERB CONFIG.yaml [key=value ...]

    bench      models, and label images of any other program, on labelled sets: scores, differences, a page
    gating     post-processing of saved predictions: smallest area, window of marker intensity, cut cells
    sweep      peak, fill, min_area, tile, overlap, scale: chosen on validation sets, reported on test sets
    ceiling    what the encoding can reach: true labels -> distance map -> watershed -> scores
    channels   does a backbone see the same field in each of its channels? features and attention maps

`python evaluate.py VERB --help` lists the keys of each. Everything is written into runs/<experiment>/:

    bench      MODEL/SET/NAME_pred.tif, MODEL/SET/metrics.json;
               metrics_all_models.tsv, groups.tsv, delta.tsv, report.html
    gating     gating.tsv, the first row of each set is the raw result
    sweep      sweep.tsv (validation); selected.tsv, delta.tsv and CHOICE/SET/ as bench has them (test)
    ceiling    ceiling.tsv, best first
    channels   channels.json, cosine.tsv, retrieval.tsv, attention.tsv, channels.png, attention.png

The same command goes on where it was stopped, and makes anew what has changed in the content of weights or
images, or in an option. Scores of a set are means over its images; those in POOLED count the cells of all
images together, as SEG and DET are defined. Intervals are 95 % bootstraps over images, from ten images on.
"""
from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import platform
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

import runs

ENOUGH = 10          # images, for an interval
POOLED = ("precision", "recall", "F1", "TP", "FP", "FN", "n_true", "n_pred", "SEG", "DET", "OP_CSB",
          "error_rate")
READ = ("AP@0.5", "AP@0.75", "AP@0.9", "F1", "PQ", "AJI", "SEG", "DET", "OP_CSB")      # on the page
COMPARED = (*READ, "DSB", "MMA")                                                       # with the first model
CEILING = "ceiling"  # the row of the encoding itself
LABELS = re.compile(r"_(pred|labels?|cp_masks|masks?|nuclei|cells)$")                  # ends of label files
STACKS = (".tif", ".tiff", ".npy")                                                     # suffixes
RIGHT, WRONG = (0, 160, 255), (255, 130, 0)                                            # colours of outlines


# ------------------------------------------------------------------------------------ what one may ask for

@dataclass(frozen=True)
class Model:
    name: str                               # its folder and row
    weights: str | None = None              # file of this project
    labels: str | None = None               # or a folder of label images of any other program, or SET/ in it
    note: str = ""                          # printed beside the name; why, if it was not run
    peak: float | None = None               # null: the weights' own
    fill: float | None = None               # null: the weights' own
    min_area: int | None = None             # px; null: the weights' own
    tile: int | None = None                 # px; null: as trained
    overlap: int | None = None              # px; null: an eighth of the tile
    scale: float = 1.0                      # network px per image px, on top of the set's diameter

    def __post_init__(self):
        check_name(self.name)
        if self.weights and self.labels:
            raise ValueError(f"model '{self.name}' has weights and labels; give one of the two")
        if not (self.weights or self.labels or self.note):
            raise ValueError(f"model '{self.name}' has neither weights nor labels; give one, or a note that "
                             "says why it was not run")


@dataclass(frozen=True)
class DataSet:
    name: str                               # its folder and row
    path: str                               # labelled images as data.examples reads them, within root
    channels: tuple[str, ...] | None = None  # names or numbers from 1, up to three that are seen; null: all
    labels: str | None = None               # nuclei or cells, where an image has both
    match: str | None = None                # regular expression on names; others are left out
    diameter: float | None = None           # px, how wide cells are here, to scale as trained; null: as is
    manifest: str | None = None             # CSV or TSV with a row per image, within root, for group
    group: str | None = None                # its column; without manifest, a regular expression on names
    limit: int | None = None                # only the first so many images
    note: str = ""                          # printed with it: trained on, never seen

    def __post_init__(self):
        check_name(self.name)


@dataclass(frozen=True)
class Encoding:
    cap: tuple[float | None, ...] = (4.0,)  # px, of data.distance_map; null: none; []: no row for the ceiling
    peak: tuple[float, ...] = (0.47,)       # of the watershed
    fill: tuple[float, ...] = (0.09,)       # of the watershed

    def __post_init__(self):
        thresholds(self.peak, self.fill)


@dataclass(frozen=True)
class Bench:
    models: tuple[Model, ...]               # {name, weights or labels, note}; differences are to the first
    sets: tuple[DataSet, ...]               # {name, path, channels, diameter, manifest, group, limit, note}
    experiment: str = "evaluate"            # name of the run
    output_base_dir: str = "."              # where runs/ is made
    root: str = "."                         # folder that the sets are in
    ceiling: Encoding = field(default_factory=Encoding)  # grid whose best stands first: cap, peak, fill
    score: str = "DSB"                      # what best means for the ceiling
    pictures: int = 3                       # models shown on the page, from the first on
    markdown: str | None = None             # document to put the tables into, between two lines of comment
    columns: tuple[str, ...] = ("AP@0.5", "AP@0.75", "F1", "SEG", "DET", "OP_CSB")  # scores in the document
    batch: int | None = None                # tiles at once; null: 4 on the CPU, 32 on a GPU
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU if there is one
    overwrite: bool = False                 # make every prediction anew

    def __post_init__(self):
        check_distinct("model", [m.name for m in self.models])
        check_distinct("set", [s.name for s in self.sets])
        check_scores(self.score, *self.columns)
        if CEILING in [m.name for m in self.models]:
            raise ValueError(f"model '{CEILING}': the row of the encoding is called so; choose another name")


@dataclass(frozen=True)
class Gating:
    predictions: str                        # folder of a model in a bench run: runs/evaluate/MODEL
    sets: tuple[DataSet, ...]               # as in bench
    experiment: str = "gating"              # name of the run
    output_base_dir: str = "."              # where runs/ is made
    root: str = "."                         # folder that the sets are in
    min_area: tuple[int, ...] = (0, 20, 50, 100)  # px, smaller cells are dropped
    windows: tuple[tuple[float, ...], ...] = ((0, 100), (2, 98), (5, 95))  # percentiles; others are dropped
    marker: str = "1"                       # channel of the file, whose mean over a cell counts
    over: Literal["set", "image"] = "set"   # percentiles among the cells of the whole set, or of each image
    border: tuple[Literal["keep", "drop", "both"], ...] = ("keep", "drop", "both")  # both: true ones too

    def __post_init__(self):
        check_distinct("set", [s.name for s in self.sets])
        for window in self.windows:
            if len(window) != 2 or not 0 <= window[0] < window[1] <= 100:
                raise ValueError(f"windows: {list(window)}, expected two percentiles such as [2, 98]")


@dataclass(frozen=True)
class Sweep:
    weights: str                            # file of this project
    validation: tuple[DataSet, ...]         # settings are chosen on these
    test: tuple[DataSet, ...]               # and reported on these; sets of one name belong together
    experiment: str = "sweep"               # name of the run
    output_base_dir: str = "."              # where runs/ is made
    root: str = "."                         # folder that the sets are in
    peak: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7)  # a cell's marker lies above
    fill: tuple[float, ...] = (0.1, 0.15, 0.2, 0.3, 0.4)  # a cell reaches down to
    min_area: tuple[int | None, ...] = (None,)  # px; null: the weights' own
    tile: tuple[int | None, ...] = (None,)  # px; null: as trained
    overlap: tuple[int | None, ...] = (None,)  # px; null: an eighth of the tile
    scale: tuple[float, ...] = (1.0,)       # network px per image px, on top of the set's diameter
    score: str = "DSB"                      # what best means, mean over images
    batch: int | None = None                # tiles at once; null: 4 on the CPU, 32 on a GPU
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU if there is one

    def __post_init__(self):
        check_distinct("validation set", [s.name for s in self.validation])
        check_distinct("test set", [s.name for s in self.test])
        check_scores(self.score)
        thresholds(self.peak, self.fill)
        if not (self.min_area and self.tile and self.overlap and self.scale):
            raise ValueError("min_area, tile, overlap and scale need one value or more each; null is one")


@dataclass(frozen=True)
class Ceiling:
    sets: tuple[DataSet, ...]               # as in bench; only their labels count
    experiment: str = "ceiling"             # name of the run
    output_base_dir: str = "."              # where runs/ is made
    root: str = "."                         # folder that the sets are in
    cap: tuple[float | None, ...] = (None, 2.0, 4.0, 8.0)  # px, of data.distance_map; null: none
    peak: tuple[float, ...] = (0.47, 0.6)   # of the watershed
    fill: tuple[float, ...] = (0.09, 0.2, 0.3)  # of the watershed
    score: str = "DSB"                      # what best means, mean over images

    def __post_init__(self):
        check_distinct("set", [s.name for s in self.sets])
        check_scores(self.score)
        thresholds(self.peak, self.fill)
        if not self.cap:
            raise ValueError("cap needs one value or more; null is one: no cap")


@dataclass(frozen=True)
class Channels:
    fields: str | None = None               # folder of images with several channels; null: synthetic fields
    synthetic: int = 16                     # how many of those
    channels: tuple[str, ...] | None = None  # names or numbers from 1, two or more; null: all
    weights: str | None = None              # a backbone, or a whole network; null: random ones, as a control
    dim: int = 384                          # width of random weights
    depth: int = 12                         # their blocks
    heads: int = 6                          # their attention heads
    patch: int = 8                          # px
    experiment: str = "channels"            # name of the run
    output_base_dir: str = "."              # where runs/ is made
    feature: Literal["cls", "patches"] = "cls"  # the class token, or the mean of the patch tokens
    size: int = 256                         # px, side of the square in the middle of a field that is seen
    limit: int | None = None                # only the first so many fields
    shown: int = 4                          # fields in attention.png
    seed: int = 0                           # of synthetic fields and random weights
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU if there is one

    def __post_init__(self):
        if self.size < 1 or self.size % self.patch:
            raise ValueError(f"size={self.size}: expected a multiple of the patch, {self.patch} px")
        if self.channels is not None and len(self.channels) < 2:
            raise ValueError(f"channels={', '.join(self.channels)}: expected two or more to compare")


def check_name(name: str) -> None:
    if not re.fullmatch(r"[\w+-][\w.+-]*", name):
        raise ValueError(f"name '{name}': it becomes a folder; expected letters, digits and _ . + -")


def check_distinct(what: str, names: list[str]) -> None:
    if not names:
        raise ValueError(f"no {what}; give at least one")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two {what}s are called '{twice[0]}'; give each a name of its own")


def check_scores(*names: str) -> None:
    if unknown := [name for name in names if name not in COMPARED]:
        raise ValueError(f"score '{unknown[0]}', expected one of {', '.join(COMPARED)}")


def thresholds(peaks: Iterable[float], fills: Iterable[float]) -> list[tuple[float, float]]:
    pairs = [(peak, fill) for peak, fill in product(peaks, fills) if 0 <= fill <= peak]
    if not pairs:
        raise ValueError(f"peak={list(peaks)}, fill={list(fills)}: no pair with 0 <= fill <= peak")
    return pairs


# --------------------------------------------------------------------------------- images, and what is kept

class Item(NamedTuple):
    name: str
    pixels: np.ndarray                      # (C, H, W), the channels that the network sees
    truth: np.ndarray                       # (H, W)
    digest: str                             # of the pixels: the content, in whatever file


def examples(place: DataSet, root: str) -> list:
    import data
    found = data.examples(Path(root) / place.path, place.channels, place.match, place.labels)[:place.limit]
    check_distinct(f"image in set {place.name}", [plain(example.name) for example in found])
    return found


def items(found: list, place: DataSet, what: str) -> Iterator[Item]:
    """One image after the other, with a bar."""
    for example in progress(found, f"{what} on {place.name}"):
        pixels, truth = example.image().pixels, example.labels()
        if pixels.shape[1:] != truth.shape:
            raise ValueError(f"{place.name}/{example.name}: image of {pixels.shape[1:]} px, labels of "
                             f"{truth.shape}")
        if len(pixels) > 3:
            raise ValueError(f"{place.name}/{example.name}: {len(pixels)} channels; choose up to three that "
                             "the network sees, such as channels: [1, 2]")
        yield Item(plain(example.name), pixels, truth, digest(pixels))


def progress(things: Iterable, what: str) -> Iterable:
    from tqdm import tqdm
    return tqdm(things, what, delay=1, file=sys.stderr, leave=False)


def plain(name: str) -> str:
    """A name that comes from data, as a file name that reaches no other folder."""
    return re.sub(r"[^\w.+-]", "_", name).lstrip(".") or "_"


def digest(content: np.ndarray | Path) -> str:
    """Hash of an array, or of a file."""
    if isinstance(content, Path):
        return hashlib.sha256(content.read_bytes()).hexdigest()
    head = f"{content.shape} {content.dtype.str} ".encode()
    return hashlib.sha256(head + np.ascontiguousarray(content).tobytes()).hexdigest()


def kept(path: Path, key: dict, make: Callable[[], Any]) -> Any:
    """What make() gives, written as JSON beside its key, and read from there while the key is the same."""
    before, key = recorded(path), json.loads(json.dumps(key))
    if before["key"] == key:
        return before["value"]
    value = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    runs.write_text(path, json.dumps({"key": key, "value": value}))
    return value


def recorded(path: Path) -> dict:
    """A record with its key; one that is not there or was damaged fits no key."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {"key": None}


def run_folder(config) -> Path:
    folder = Path(config.output_base_dir) / "runs" / config.experiment
    folder.mkdir(parents=True, exist_ok=True)
    runs.write_text(folder / f"{type(config).__name__.lower()}.yaml", runs.to_yaml(config))
    return folder


# ------------------------------------------------------------------------------------ where labels come from

class Network:
    """Weights of this project; they are read when the first image really needs them."""

    def __init__(self, entry: Model, config: Bench | Sweep):
        self.path = Path(entry.weights)
        if not self.path.is_file():
            raise FileNotFoundError(f"no weights at {self.path} for model '{entry.name}'; train with "
                                    "train_seg.py, or leave weights out and say why in its note")
        self.digest, self.batch, self.device = digest(self.path), config.batch, config.device
        self.options = dict(peak=entry.peak, fill=entry.fill, min_area=entry.min_area, tile=entry.tile,
                            overlap=entry.overlap, scale=entry.scale)

    @cached_property
    def net(self):
        import model
        return model.load(self.path).to(runs.join_group(self.device)[2])

    def key(self, item: Item, place: DataSet) -> dict:
        return dict(weights=self.digest, image=item.digest, diameter=place.diameter, **self.options)

    def labels(self, item: Item, place: DataSet) -> tuple[np.ndarray, float]:
        net, start = self.net, time.perf_counter()
        labels = segmented(item, place, net, batch=self.batch, **self.options)
        return labels, time.perf_counter() - start


def segmented(item: Item, place: DataSet, net, scale: float, **options) -> np.ndarray:
    import segment
    try:
        scale *= segment.scale_for(place.diameter, net)
        return segment.segment(item.pixels, net, scale=scale, **options)
    except ValueError as error:             # segment knows no names
        raise ValueError(f"{place.name}/{item.name}: {error}") from None


class Peer:
    """Label images that any other program wrote, found by the stem of their names."""

    def __init__(self, entry: Model, place: DataSet, found: list):
        folder = Path(entry.labels)
        folder = folder / place.name if (folder / place.name).is_dir() else folder
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; expected label images of '{entry.name}'")
        tails = Counter(example.name.rpartition("/")[2] for example in found)
        names = {plain(tail): plain(full) for full in (example.name for example in found)
                 for tail in (full, full.rpartition("/")[2]) if tail == full or tails[tail] == 1}
        candidates: dict[str, list[Path]] = {}
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in (*STACKS, ".png"):
                stem = plain(path.relative_to(folder).with_suffix("").as_posix())
                if name := names.get(stem) or names.get(LABELS.sub("", stem)):
                    candidates.setdefault(name, []).append(path)
        self.files: dict[str, Path] = {}
        for name, paths in candidates.items():                  # beside x_masks.tif, x.tif is but the image
            paths = [path for path in paths if LABELS.search(path.stem)] or paths
            if len(paths) > 1:
                raise ValueError(f"{paths[0]}, {paths[1].name}: both may be the labels of {name}; keep one")
            self.files[name] = paths[0]
        if not self.files:
            some = next(iter(names))
            raise FileNotFoundError(f"{folder}: labels for none of the {len(found)} images of set "
                                    f"'{place.name}', expected names such as {some}.tif or {some}_masks.png")

    def key(self, item: Item, place: DataSet) -> dict | None:
        file = self.files.get(item.name)
        return file and dict(labels=digest(file))

    def labels(self, item: Item, place: DataSet) -> tuple[np.ndarray, None]:
        import data
        return data.read_labels(self.files[item.name]), None


class Encoded:
    """The truth, made a distance map and found again in it."""

    def __init__(self, cap: float | None, peak: float, fill: float):
        self.cap, self.options = cap, dict(peak=peak, fill=fill)

    def key(self, item: Item, place: DataSet) -> dict:
        return dict(truth=digest(item.truth), cap=self.cap, **self.options)

    def labels(self, item: Item, place: DataSet) -> tuple[np.ndarray, None]:
        import data
        from watershed import watershed
        return watershed(data.distance_map(item.truth, self.cap), **self.options), None


# ------------------------------------------------------------------------------------------ a model on a set

class Result(NamedTuple):
    model: str
    folder: Path                            # with the predictions
    names: list[str]                        # of the images scored
    tables: list                            # metrics.Overlap of each
    scores: Any                             # metrics.SetScores
    missing: list[str]                      # images that a peer has no labels for; they are left out
    seconds: float | None                   # to segment them all; None: not by us


def measured(model: str, place: DataSet, found: list, source: Network | Peer | Encoded, folder: Path,
             overwrite: bool = False) -> Result:
    """Every image predicted, unless that was done before, and scored; writes metrics.json too."""
    import metrics
    names, tables, missing, seconds = [], [], [], []
    folder.mkdir(parents=True, exist_ok=True)
    for item in items(found, place, model):
        key = source.key(item, place)
        if key is None:
            missing.append(item.name)
            continue
        path = folder / f"{item.name}_pred.tif"
        labels, took = predicted(path, key, lambda: source.labels(item, place), overwrite)
        names.append(item.name)
        tables.append(overlap(item, labels, f"{model} on {place.name}"))
        seconds.append(took)
    if missing:
        print(f"{model} on {place.name}: {len(missing)} of {len(found)} images have no labels and are left "
              f"out: {', '.join(missing)}", file=sys.stderr)
    total = None if None in seconds else round(sum(seconds), 3)
    scores = metrics.set_scores(tables)
    content = {"model": model, "set": place.name, "note": place.note, "n": len(names), "missing": missing,
               "seconds": total, **headline(scores), "intervals": intervals(scores), "mean": scores.mean,
               "pooled": scores.pooled, "images": dict(zip(names, scores.images))}
    runs.write_text(folder / "metrics.json", json.dumps(without_nan(content), indent=1) + "\n")
    return Result(model, folder, names, tables, scores, missing, total)


def predicted(path: Path, key: dict, make: Callable, overwrite: bool) -> tuple[np.ndarray, float | None]:
    """Labels and the seconds they took: from NAME_pred.tif if NAME_pred.json has this key, else made now."""
    import data
    record, key = path.with_suffix(".json"), json.loads(json.dumps(key))
    before = recorded(record)
    if before["key"] == key and path.exists() and not overwrite:
        return data.read_labels(path), before["seconds"]
    record.unlink(missing_ok=True)          # first: it must not vouch for labels it was not written for
    labels, seconds = make()
    data.write_labels(path, labels)
    runs.write_text(record, json.dumps({"key": key, "seconds": seconds}))
    return labels, seconds


def overlap(item: Item, labels: np.ndarray, what: str):
    import metrics
    if labels.shape != item.truth.shape:
        raise ValueError(f"{what}: labels of {item.name} are {labels.shape}, the image is {item.truth.shape} "
                         "px; expected the same size")
    return metrics.overlap(item.truth, labels)


def headline(scores) -> dict[str, float]:
    """One number for each score: the mean over images, or for those in POOLED that of all cells together."""
    return {name: (scores.pooled if name in POOLED else scores.mean)[name] for name in scores.mean}


def intervals(scores) -> dict[str, tuple[float, float]]:
    if len(scores.images) < ENOUGH:
        return {}
    found = {name: (scores.pooled_interval if name in POOLED else scores.mean_interval)[name]
             for name in scores.mean}
    return {name: ends for name, ends in found.items() if not math.isnan(ends[0])}


def columns_of(scores) -> dict[str, Any]:
    """Every score, each with its interval behind it."""
    between, columns = intervals(scores), {}
    for name, value in headline(scores).items():
        low, high = between.get(name, (None, None))
        columns |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return columns


def differences(place: DataSet, first: Result, other: Result) -> list[dict]:
    """Other minus first on the images of both: the mean and its interval, or below ENOUGH image by image."""
    import metrics
    theirs, ours = (dict(zip(result.names, result.scores.images)) for result in (first, other))
    both = [name for name in theirs if name in ours]
    rows = []
    for score in COMPARED:
        change = np.array([ours[name][score] - theirs[name][score] for name in both], float)
        defined = change[~np.isnan(change)]
        line = {"set": place.name, "model": other.model, "against": first.model, "score": score}
        low, high = metrics.bootstrap(defined) if len(defined) >= ENOUGH else (None, None)
        mean = float(defined.mean()) if len(defined) else None
        rows.append({**line, "image": "mean", "n": len(defined), "difference": mean, "low": low,
                     "high": high})
        if len(defined) < ENOUGH:
            rows += [{**line, "image": name, "n": 1, "difference": float(d)} for name, d in zip(both, change)]
    return rows


# --------------------------------------------------------------------------------------------------- tables

def without_nan(value: Any) -> Any:
    """For JSON, which knows no NaN: null."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def shown(value: Any, digits: int = 4) -> str:
    """A number for people, '-' where there is none."""
    if value is None or isinstance(value, float) and math.isnan(value):
        return "-"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def write_tsv(path: Path, rows: list[dict]) -> None:
    columns = list(dict.fromkeys(name for line in rows for name in line))
    cells = [columns, *([" ".join(shown(line.get(name)).split()) for name in columns] for line in rows)]
    runs.write_text(path, "".join("\t".join(line) + "\n" for line in cells))


def print_table(rows: list[dict], columns: Iterable[str]) -> None:
    columns = list(columns)
    cells = [columns, *([shown(line.get(name), 3) for name in columns] for line in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


# ---------------------------------------------------------------------------------------------------- bench

def bench(config: Bench) -> None:
    """Measure models, and label images of any other program, on labelled sets."""
    found = {place.name: examples(place, config.root) for place in config.sets}
    groups = {place.name: grouped(place, config.root, found[place.name]) for place in config.sets}
    sources: dict[tuple[str, str], Network | Peer | Encoded] = {}   # all looked up before one is run
    for entry in config.models:
        network = Network(entry, config) if entry.weights else None
        for place in config.sets if entry.weights or entry.labels else ():
            sources[entry.name, place.name] = network or Peer(entry, place, found[place.name])
    folder, entries = run_folder(config), list(config.models)
    if config.ceiling.cap:
        entries.insert(0, Model(CEILING, note="of the encoding"))
        for place in config.sets:
            best = all_settings(config.ceiling)
            if len(best) > 1:
                best = [(line["cap"], line["peak"], line["fill"]) for line in encodings(
                    place, found[place.name], config.ceiling, config.score, folder / CEILING / place.name)]
            sources[CEILING, place.name] = Encoded(*best[0])

    results: dict[str, dict[str, Result]] = {place.name: {} for place in config.sets}    # set, model
    for entry, place in product(entries, config.sets):
        if source := sources.pop((entry.name, place.name), None):        # so that one network is in memory
            results[place.name][entry.name] = measured(entry.name, place, found[place.name], source,
                                                       folder / entry.name / place.name, config.overwrite)
    rows, compared, by_group = [], [], []
    for place, entry in product(config.sets, entries):
        result, first = (results[place.name].get(name) for name in (entry.name, config.models[0].name))
        line = {"set": place.name, "model": entry.name, "note": entry.note}
        if result is None:
            rows.append({**line, "n": "not run"})
            continue
        rows.append({**line, "n": len(result.names), "missing": len(result.missing),
                     "seconds": result.seconds, **columns_of(result.scores)})
        if first and result is not first:
            compared += differences(place, first, result)
        by_group += group_rows(place, result, groups[place.name])
    for name, table in (("metrics_all_models", rows), ("delta", compared), ("groups", by_group)):
        write_tsv(folder / f"{name}.tsv", table)
    write_page(folder / "report.html", config, entries, found, results)
    if config.markdown:
        write_document(config, entries, results)
    print_table(rows, ("set", "model", "n", *config.columns))
    print(f"-> {folder / 'report.html'}")


def grouped(place: DataSet, root: str, found: list) -> dict[str, str]:
    """Image -> its group: a column of the manifest, or what a regular expression finds in the name."""
    if place.group is None:
        return {}
    groups = from_manifest(place, root, found) if place.manifest else from_names(place, found)
    if not groups:
        raise ValueError(f"set '{place.name}': group '{place.group}' fits none of its {len(found)} images, "
                         f"such as {found[0].name}")
    return groups


def from_names(place: DataSet, found: list) -> dict[str, str]:
    try:
        pattern = re.compile(place.group)
    except re.error as error:
        raise ValueError(f"set '{place.name}': group '{place.group}' is no regular expression ({error}); to "
                         "mean a column, give its manifest") from None
    hits = {example.name: pattern.search(example.name) for example in found}
    return {plain(name): hit[1 if pattern.groups else 0] for name, hit in hits.items() if hit}


def from_manifest(place: DataSet, root: str, found: list) -> dict[str, str]:
    path = Path(root) / place.manifest
    with open(path, newline="", encoding="utf-8-sig") as file:
        table = list(csv.DictReader(file, delimiter="," if path.suffix.lower() == ".csv" else "\t"))
    columns = list(table[0]) if table else []
    if place.group not in columns:
        raise ValueError(f"{path}: no column '{place.group}' for set '{place.name}'; it has "
                         f"{', '.join(columns)}")
    image = next((name for name in ("image", "file", "filename", "name") if name in columns), columns[0])
    by_stem: dict[str, list[dict]] = {}
    for line in table:
        by_stem.setdefault(Path(line[image]).stem, []).append(line)
    groups = {}
    for example in found:                   # of several rows with its stem, the one with its folders too
        files = [Path(file).as_posix() for file in example.files]
        stems = dict.fromkeys([example.name.rpartition("/")[2], *(Path(file).stem for file in files)])
        fits = [line for stem in stems for line in by_stem.get(stem, ())]
        fits.sort(key=lambda line: not any(file.endswith(line[image]) for file in files))
        if fits:
            groups[plain(example.name)] = fits[0][place.group]
    return groups


def group_rows(place: DataSet, result: Result, groups: dict[str, str]) -> list[dict]:
    """Scores of each group of images; those without one stand under '-'."""
    import metrics
    members: dict[str, list] = {}
    for name, table in zip(result.names, result.tables) if groups else ():
        members.setdefault(groups.get(name, "-"), []).append(table)
    return [{"set": place.name, "group": group, "model": result.model, "n": len(tables),
             **columns_of(metrics.set_scores(tables))} for group, tables in sorted(members.items())]


# ------------------------------------------------------------------------------------------ bench, to be read

def write_page(path: Path, config: Bench, entries: list[Model], found: dict, results: dict) -> None:
    """report.html: an overview, then each set with its table, curves and pictures."""
    import report
    looks = report.looks([entry.name for entry in entries], CEILING if config.ceiling.cap else None)
    rows = [[report.Cell(place.name, place.note), str(len(found[place.name])),
             *(page_cell(results[place.name].get(entry.name), "AP@0.5") for entry in entries)]
            for place in config.sets]
    table = report.table(["set", "images", *(entry.name for entry in entries)], rows)
    sections = [report.section("AP@0.5", "Mean over the images of each set.", table)]
    for place in config.sets:
        there = results[place.name]
        first = [there[entry.name] for entry in config.models if entry.name in there][:config.pictures]
        strips = [report.strip(title, [report.picture(*panel) for panel in panels])
                  for title, panels in pictures(place, found[place.name], first)]
        sections.append(report.section(place.name, place.note, page_table(entries, there),
                                       page_charts(there, looks), *strips))
    note = ("AP, PQ and AJI are means over images; F1, SEG, DET and OP_CSB count the cells of all images "
            f"together. Small: 95 % bootstrap intervals over images, from {ENOUGH} images on. Bold: the best "
            "model. The ceiling is what true labels score that went through distance map and watershed.")
    runs.write_text(path, report.page(config.experiment, note, sections, made_by(config)))


def page_table(entries: list[Model], results: dict[str, Result]) -> str:
    import report
    rows, models = [], [headline(r.scores) for model, r in results.items() if model != CEILING]
    best = {name: max((model[name] for model in models), default=None) for name in READ}
    for entry in entries:
        result = results.get(entry.name)
        cells = (page_cell(result, name, None if entry.name == CEILING else best[name]) for name in READ)
        rows.append([report.Cell(entry.name, entry.note), str(len(result.names)) if result else "not run",
                     *cells, shown(result and result.seconds, 1)])
    return report.table(["model", "images", *READ, "seconds"], rows)


def page_charts(results: dict[str, Result], looks: dict) -> str:
    import metrics
    import report
    curves = {model: [(t, result.scores.mean[f"AP@{t:g}"]) for t in metrics.THRESHOLDS]
              for model, result in results.items()}
    return report.legend({name: looks[name] for name in results}) + report.side_by_side(
        report.titled("AP over the threshold", report.chart(curves, looks, "IoU threshold", "mean AP")),
        report.titled("Cells found over their size", report.chart(
            found_by_size(results), looks, "equivalent diameter (px)", "share found at IoU 0.5", log=True)))


def page_cell(result: Result | None, name: str, best: float | None = None):
    import report
    if result is None:
        return "-"
    value, between = headline(result.scores)[name], intervals(result.scores).get(name, ())
    return report.Cell(shown(value, 3), "–".join(shown(end, 3) for end in between), value == best)


def found_by_size(results: dict[str, Result]) -> dict[str, list[tuple[float, float]]]:
    """Share of true cells found at IoU 0.5, in up to eight classes of size with equally many cells."""
    import metrics
    sizes = {model: np.concatenate([2 * np.sqrt(table.truth_areas / np.pi) for table in r.tables])
             for model, r in results.items()}                                # px
    every = max(sizes.values(), key=len, default=np.empty(0))
    if not len(every):
        return {}
    edges = np.unique(np.quantile(every, np.linspace(0, 1, 1 + min(8, max(1, len(every) // 10)))))
    curves = {}
    for model, r in results.items():
        hit = np.concatenate([np.isin(t.truth_ids, metrics.match(t).pairs[:, 0]) for t in r.tables])
        group = np.searchsorted(edges[1:-1], sizes[model], side="right")
        curves[model] = [(float(np.median(sizes[model][group == k])), float(hit[group == k].mean()))
                         for k in np.unique(group)]
    return curves


def pictures(place: DataSet, found: list, results: list[Result]) -> Iterator[tuple[str, list]]:
    """Title and panels of the first model's best, median and worst image: the truth, then what each finds."""
    import data
    import metrics
    if not results:
        return
    first = results[0]
    order = sorted(range(len(first.names)), key=lambda i: -first.scores.images[i]["DSB"])
    for i, which in {order[0]: "best", order[len(order) // 2]: "median", order[-1]: "worst"}.items():
        name = first.names[i]
        example = next(e for e in found if plain(e.name) == name)
        pixels, truth = example.image().pixels, example.labels()
        part = worth_showing(truth)
        panels = [(outlined(pixels, truth, metrics.match(first.tables[i]).pairs[:, 0], part),
                   f"true cells: {len(first.tables[i].truth_ids)}; orange: missed by {first.model}")]
        for r in results:
            if name in r.names:
                at = r.names.index(name)
                labels, score = data.read_labels(r.folder / f"{name}_pred.tif"), r.scores.images[at]
                panels.append((outlined(pixels, labels, metrics.match(r.tables[at]).pairs[:, 1], part),
                               f"{r.model}: AP@0.5 {score['AP@0.5']:.2f}; {score['TP']} found, {score['FP']} "
                               f"false (orange), {score['FN']} missed"))
        H, W = truth.shape
        cut = f", {min(part.px, H)} × {min(part.px, W)} of {H} × {W} px" if part.px < max(H, W) else ""
        yield f"{which} of {first.model}: {name}{cut}", panels


class Part(NamedTuple):
    """Of an image, to be shown."""
    top: int
    left: int
    px: int                                 # its side
    step: int                               # its sides are divided by this
    thick: int                              # px, of outlines then


def worth_showing(truth: np.ndarray, side: int = 512, least: int = 14) -> Part:
    """The square with most cells in it: reduced while cells stay `least` px wide, then cut to `side` px."""
    areas = np.unique(truth[truth > 0], return_counts=True)[1]
    wide = 2 * math.sqrt(np.median(areas) / math.pi) if len(areas) else side
    step = max(1, min(-(-max(truth.shape) // side), int(wide / least)))
    px = side * step
    tops, lefts = ([*range(0, max(1, n - px), px // 4), max(0, n - px)] for n in truth.shape)

    def content(at: tuple[int, int]) -> int:
        return np.count_nonzero(truth[at[0]:at[0] + px, at[1]:at[1] + px])
    zoom = max(1, side // max(truth.shape))
    return Part(*max(product(tops, lefts), key=content), px, step, thick=1 if wide * zoom / step < 24 else 2)


def outlined(pixels: np.ndarray, labels: np.ndarray, right: np.ndarray, part: Part) -> np.ndarray:
    """(h, w, 3) uint8: a part of the image, cells in `right` outlined in blue, all others in orange."""
    import cells
    from PIL import Image
    top, left, px, step, thick = part
    rgb = cells.displayed(pixels)[top:top + px, left:left + px]
    ids, numbers = np.unique(np.append(0, labels[top:top + px, left:left + px]), return_inverse=True)
    numbers = numbers[1:].reshape(rgb.shape[:2]).astype(np.int32)            # 0..n without gaps
    small, numbers = cells.reduced(np.moveaxis(rgb, 2, 0), numbers, step)
    rgb, (h, w) = np.ascontiguousarray(np.moveaxis(small, 0, 2)), numbers.shape
    if (zoom := 512 // max(h, w)) > 1:
        rgb = np.asarray(Image.fromarray(rgb).resize((zoom * w, zoom * h), Image.BICUBIC))
        numbers = cells.enlarged(numbers, zoom)
    colours = np.where(np.isin(ids[1:], right)[:, None], RIGHT, WRONG).astype(np.uint8)
    return cells.drawn(rgb, numbers, colours, thick)


def write_document(config: Bench, entries: list[Model], results: dict) -> None:
    """The same in Markdown; below ENOUGH images they stand one by one."""
    import report
    parts = [made_by(config) + "\n"]
    for place in config.sets:
        there, rows = results[place.name], []
        for entry in entries:
            title = f"{entry.name} ({entry.note})" if entry.note else entry.name
            if result := there.get(entry.name):
                cells = [page_cell(result, name) for name in config.columns]
                rows.append((title, str(len(result.names)),
                             *(f"{cell.text} [{cell.small}]" if cell.small else cell.text for cell in cells)))
            else:
                rows.append((title, "not run", *["-"] * len(config.columns)))
        parts += [f"**{place.name}**" + (f", {place.note}" if place.note else "") + "\n",
                  report.markdown(("model", "images", *config.columns), rows)]
        few = {model: dict(zip(r.names, r.scores.images)) for model, r in there.items()
               if len(r.names) < ENOUGH}
        if names := dict.fromkeys(name for images in few.values() for name in images):
            score = config.columns[0]
            rows = ((name, *(shown(images.get(name, {}).get(score), 3) for images in few.values()))
                    for name in names)
            parts.append(report.markdown((f"{score} of each image", *few), rows))
    report.put_between(Path(config.markdown), f"bench {config.experiment}", "\n".join(parts))


def made_by(config: Bench) -> str:
    """The command, the machine and the versions, without which numbers mean little."""
    import torch
    about = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    cpu = re.search(r"model name\s*: (.*)", about)
    machine = f"{cpu[1] if cpu else platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    if config.device != "cpu" and torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    return (f"`{command}` on {machine}; Python {platform.python_version()}, PyTorch {torch.__version__}; "
            "intervals: 95 %, 1000 resamples of the images")


# --------------------------------------------------------------------------------------------------- gating

def gating(config: Gating) -> None:
    """Post-processing of saved predictions: every setting against the raw result, without any network."""
    rows = []
    for place in config.sets:
        place = replace(place, channels=(config.marker,))
        seen = [gateable(item, Path(config.predictions) / place.name)
                for item in items(examples(place, config.root), place, "gating")]
        raw, _ = gated(seen, config.over, 0, (0, 100), "keep")
        rows.append({"set": place.name, "min_area": 0, "window": "q0-100", "border": "keep", "removed": 0,
                     "n": len(seen), **columns_of(raw.scores)})
        for setting in product(config.min_area, config.windows, config.border):
            least, window, border = setting
            result, removed = gated(seen, config.over, *setting)
            rows.append({"set": place.name, "min_area": least, "window": "q{:g}-{:g}".format(*window),
                         "border": border, "removed": removed, "n": len(seen), **columns_of(result.scores)})
            for line in differences(place, raw, result):
                if line["image"] == "mean":
                    name = f"{line['score']}_change"
                    rows[-1] |= {name: line["difference"], f"{name}_low": line["low"],
                                 f"{name}_high": line["high"]}
    path = run_folder(config) / "gating.tsv"
    write_tsv(path, rows)
    print_table(rows, ("set", "min_area", "window", "border", "removed", "AP@0.5", "AP@0.5_change", "SEG"))
    print(f"-> {path}; the first row of each set is the raw result")


def gated(seen: list[Gateable], over: str, least: int, window: tuple[float, ...], border: str
          ) -> tuple[Result, int]:
    """The scores with one setting, and how many predicted cells it removes."""
    import metrics
    every, tables, removed = np.concatenate([image.marker for image in seen]), [], 0
    for image in seen:
        among = image.marker if over == "image" else every
        low, high = np.percentile(among, window) if len(among) else (0, 0)
        keep = (image.table.pred_areas >= least) & (image.marker >= low) & (image.marker <= high)
        keep &= (border == "keep") | ~image.cut
        removed += np.count_nonzero(~keep)
        tables.append(without(image.table, keep, (border != "both") | ~image.cut_true))
    names = [image.name for image in seen]
    return Result("gated", Path(), names, tables, metrics.set_scores(tables), [], None), removed


class Gateable(NamedTuple):
    name: str
    table: Any                              # metrics.Overlap: R true cells, S predicted ones
    marker: np.ndarray                      # (S,) mean intensity
    cut: np.ndarray                         # (S,) bool, by the edge of the image
    cut_true: np.ndarray                    # (R,) bool


def gateable(item: Item, folder: Path) -> Gateable:
    import data
    path = folder / f"{item.name}_pred.tif"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such prediction; run evaluate.py bench on this set, and give "
                                "predictions=runs/EXPERIMENT/MODEL")
    labels = data.read_labels(path)
    table = overlap(item, labels, str(folder))
    ids, cell = np.unique(labels, return_inverse=True)
    cell = cell.ravel()
    marker = (np.bincount(cell, item.pixels[0].ravel()) / np.bincount(cell))[ids > 0]
    return Gateable(item.name, table, marker, np.isin(table.pred_ids, at_edge(labels)),
                    np.isin(table.truth_ids, at_edge(item.truth)))


def at_edge(labels: np.ndarray) -> np.ndarray:
    """Ids that the edge of the image cuts."""
    return np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))


def without(table, keep: np.ndarray, keep_true: np.ndarray):
    """The overlap table as if cells had been erased, but for keep (S,) and keep_true (R,) or one for all."""
    keep_true = np.broadcast_to(keep_true, table.truth_ids.shape)
    pairs = keep_true[table.rows] & keep[table.cols]
    return table._replace(truth_ids=table.truth_ids[keep_true], truth_areas=table.truth_areas[keep_true],
                          pred_ids=table.pred_ids[keep], pred_areas=table.pred_areas[keep],
                          rows=(np.cumsum(keep_true) - 1)[table.rows[pairs]],
                          cols=(np.cumsum(keep) - 1)[table.cols[pairs]], counts=table.counts[pairs])


# ---------------------------------------------------------------------------------------------------- sweep

def sweep(config: Sweep) -> None:
    """Choose settings on validation sets, report on test sets; the network runs once per tile and scale."""
    found = {place: examples(place, config.root) for place in (*config.validation, *config.test)}
    check_apart(config, found)
    network = Network(Model("sweep", weights=config.weights), config)
    folder = run_folder(config)
    views = product(config.tile, config.overlap, config.scale)
    settings = [dict(tile=tile, overlap=overlap, scale=scale, peak=peak, fill=fill, min_area=min_area)
                for (tile, overlap, scale), (peak, fill), min_area in product(
                    views, thresholds(config.peak, config.fill), config.min_area)]
    rows = []
    for place in config.validation:
        images = []
        for item in items(found[place], place, "sweep"):
            key = dict(weights=network.digest, image=item.digest, truth=digest(item.truth), settings=settings,
                       diameter=place.diameter)
            images.append(kept(folder / "validation" / place.name / f"{item.name}.json", key,
                               lambda: swept(item, place, network, settings)))
        rows += [{"set": place.name, **setting, "n": len(images),
                  **{name: mean_defined(image[k][name] for image in images) for name in COMPARED}}
                 for k, setting in enumerate(settings)]
    write_tsv(folder / "sweep.tsv", rows)

    shared = best_setting(rows, settings, config.score)
    selected, compared = [], []
    for place in config.test:
        choices = {"shared": shared, "weights": {}}
        if own := [line for line in rows if line["set"] == place.name]:
            choices["own"] = best_setting(own, settings, config.score)
        for choice, setting in choices.items():
            source = Network(Model(choice, weights=config.weights, **setting), config)
            source.net = network.net                            # read once
            result = measured(choice, place, found[place], source, folder / choice / place.name)
            selected.append({"set": place.name, "choice": choice, **source.options, "n": len(result.names),
                             "seconds": result.seconds, **columns_of(result.scores)})
            if choice == "shared":
                first = result
            else:
                compared += differences(place, first, result)
    write_tsv(folder / "selected.tsv", selected)
    write_tsv(folder / "delta.tsv", compared)
    print_table(selected, ("set", "choice", *settings[0], "n", config.score, "AP@0.5", "SEG"))
    print(f"-> {folder / 'selected.tsv'}; by {config.score} on validation, shared by all sets or a set's "
          "own; weights: as they are stored")


def check_apart(config: Sweep, found: dict) -> None:
    """What is reported must not have chosen: no image is on both sides, under whatever name."""
    seen = {digest(example.image().pixels): f"{place.name}/{example.name}"
            for place in config.validation for example in found[place]}
    for place in config.test:
        for example in found[place]:
            if twin := seen.get(digest(example.image().pixels)):
                raise ValueError(f"test image {place.name}/{example.name} ({place.path}) is in validation "
                                 f"too, as {twin}; what chose the setting flatters, give other images")


def swept(item: Item, place: DataSet, network: Network, settings: list[dict]) -> list[dict]:
    """Scores of one image with each setting."""
    import metrics
    views: dict[tuple, Recorded] = {}
    rows = []
    for setting in settings:
        net = views.setdefault((setting["tile"], setting["overlap"], setting["scale"]), Recorded(network.net))
        net.at = 0
        scores = metrics.scores(item.truth, segmented(item, place, net, batch=network.batch, **setting))
        rows.append({name: scores[name] for name in COMPARED})
    return rows


class Recorded:
    """A network that is asked for the same tiles in the same order again and again, and runs only once."""

    def __init__(self, net):
        self.net, self.settings, self.backbone = net, net.settings, net.backbone
        self.parameters, self.autocast = net.parameters, net.autocast
        self.tiles, self.at = [], 0

    def __call__(self, x):                                      # (B, 3, tile, tile) -> (B, 1, tile, tile)
        import torch
        if self.at == len(self.tiles):
            self.tiles += self.net(x)
        self.at += len(x)
        return torch.stack(self.tiles[self.at - len(x):self.at])


def best_setting(rows: list[dict], settings: list[dict], score: str) -> dict:
    """The setting with the highest score, mean over the sets in rows; of equal ones the first."""
    def mean(setting: dict) -> float:
        value = mean_defined(line[score] for line in rows if setting.items() <= line.items())
        return -math.inf if math.isnan(value) else value
    return max(settings, key=mean)


def mean_defined(values: Iterable[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan


# --------------------------------------------------------------------------------------------------- ceiling

def ceiling(config: Ceiling) -> None:
    """What the encoding can reach: true labels -> distance map -> watershed -> scores."""
    found = {place: examples(place, config.root) for place in config.sets}
    folder, rows, best = run_folder(config), [], []
    for place in config.sets:
        rows += encodings(place, found[place], config, config.score, folder / place.name)
        best.append(next(line for line in rows if line["set"] == place.name))
    write_tsv(folder / "ceiling.tsv", rows)
    print_table(best, ("set", "n", "cap", "peak", "fill", "DSB", *READ))
    print(f"-> {folder / 'ceiling.tsv'}; here the best of each set by {config.score}")


def encodings(place: DataSet, found: list, grid: Encoding | Ceiling, score: str, folder: Path) -> list[dict]:
    """A row for each cap, peak and fill, the best first."""
    import data
    import metrics
    from watershed import watershed
    settings = all_settings(grid)

    def measure() -> list[dict]:
        tables = [[] for _ in settings]
        for example in progress(found, f"{CEILING} of {place.name}"):
            truth = example.labels()
            maps = {cap: data.distance_map(truth, cap) for cap in grid.cap}
            for own, (cap, peak, fill) in zip(tables, settings):
                own.append(metrics.overlap(truth, watershed(maps[cap], peak, fill)))
        rows = [{"set": place.name, "cap": cap, "peak": peak, "fill": fill, "n": len(own),
                 **columns_of(metrics.set_scores(own))} for (cap, peak, fill), own in zip(settings, tables)]
        return sorted(rows, key=lambda line: -line[score])

    key = dict(settings=settings, score=score, truths=[digest(example.labels()) for example in found])
    return kept(folder / "encodings.json", key, measure)


def all_settings(grid: Encoding | Ceiling) -> list[tuple[float | None, float, float]]:
    return [(cap, *pair) for cap, pair in product(grid.cap, thresholds(grid.peak, grid.fill))]


# -------------------------------------------------------------------------------------------------- channels

def channels(config: Channels) -> None:
    """Does a backbone see the same field in each of its channels? Features, and where it looks."""
    import cells
    import metrics
    import report
    vit, weights = backbone(config)
    folder, names, features, maps, pictures, titles = run_folder(config), None, [], [], [], []
    for name, known, pixels in fields_of(config):
        if names not in (None, known):
            raise ValueError(f"{name}: channels {', '.join(known)}, the fields before have "
                             f"{', '.join(names)}; choose the same of all with channels=")
        names, key = known, dict(weights=weights, image=digest(pixels), feature=config.feature)
        feature, attended = kept(folder / "fields" / f"{plain(name)}.json", key,
                                 lambda: seen_by(vit, pixels, config.feature))
        features.append(feature)                                # (K, D)
        maps.append(attended)                                   # (K, h, w)
        if len(features) <= config.shown:
            alike = np.corrcoef(np.reshape(attended, (len(names), -1)))[np.triu_indices(len(names), 1)].mean()
            titles += [name, f"attention, r {alike:.2f}"]
            pictures += [[cells.displayed(channel[None]) for channel in pixels],
                         [report.heat(np.array(one)) for one in attended]]
    if len(features) < 2:
        raise ValueError(f"{config.fields or 'synthetic'}: {len(features)} field, expected two or more")
    same = metrics.channel_consistency(features)
    flat = np.reshape(maps, (len(maps), len(names), -1))        # (F, K, N)
    # The cosine of what is left when the mean is taken away is Pearson's correlation.
    alike = metrics.channel_consistency(flat - flat.mean(2, keepdims=True))
    content = {"weights": config.weights or "random", "feature": config.feature, "fields": len(features),
               "consistency": same.consistency, "control": same.control, "margin": same.margin,
               "retrieval": same.retrieval, "attention": alike.consistency,
               "attention_control": alike.control}
    runs.write_text(folder / "channels.json", json.dumps({**content, "channels": names}, indent=1) + "\n")
    matrices = {"cosine": same.cosine_matrix, "retrieval": same.retrieval_matrix,
                "attention": alike.cosine_matrix}
    for name, matrix in matrices.items():
        write_tsv(folder / f"{name}.tsv", [{"channel": channel, **dict(zip(names, map(float, line)))}
                                           for channel, line in zip(names, matrix)])
    titled = ("cosine of features", "retrieval of column by row", "correlation of attention")
    report.matrices(folder / "channels.png", dict(zip(titled, matrices.values())), names)
    report.mosaic(folder / "attention.png", pictures, titles, names)
    print_table([content], content)
    print(f"-> {folder / 'channels.png'}, {folder / 'attention.png'}")


def backbone(config: Channels):
    """The ViT, and the hash of its weights or what random ones are made from."""
    import torch
    import model
    device = runs.join_group(config.device)[2]
    if config.weights is not None:
        vit = model.load_backbone(config.weights, config.patch)
        return vit.eval().to(device), [digest(Path(config.weights)), config.patch]
    torch.manual_seed(config.seed)
    vit = model.ViT(config.dim, config.depth, config.heads, config.patch, layerscale=1.0)   # 1e-5: all alike
    return vit.eval().to(device), [config.seed, vit.architecture]


def fields_of(config: Channels) -> Iterator[tuple[str, list[str], np.ndarray]]:
    """Name, names of channels and pixels (K, size, size) of each field."""
    import data
    import synthetic
    size = config.size
    if config.fields is None:
        known = [name.lower() for name in synthetic.CHANNELS]
        wanted = [name.lower() for name in config.channels or known]
        if unknown := [name for name in wanted if name not in known]:
            raise ValueError(f"channels: '{unknown[0]}', expected some of {', '.join(synthetic.CHANNELS)}")
        indices = [known.index(name) for name in wanted]
        for number in progress(range(config.synthetic)[:config.limit], "synthetic fields"):
            drawn = synthetic.field(config.seed + number, size, max(2, size**2 // 4000))
            yield f"field {number}", [synthetic.CHANNELS[i] for i in indices], drawn.pixels[indices]
        return
    folder = Path(config.fields)
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in STACKS)
    if not files:
        raise FileNotFoundError(f"{folder}: no such folder, or no TIFF or .npy in it; expected images with "
                                "several channels")
    for path in progress(files[:config.limit], folder.name):
        pixels, names, _ = data.read_image(path, config.channels)
        K, H, W = pixels.shape
        if K < 2 or min(H, W) < size:
            raise ValueError(f"{path}: {K} channels of {H} x {W} px, expected two or more of size={size} px")
        top, left = (H - size) // 2, (W - size) // 2
        names = list(names or map(str, config.channels or range(1, K + 1)))
        yield path.stem, names, pixels[:, top:top + size, left:left + size]


def seen_by(vit, pixels: np.ndarray, feature: str) -> tuple[list, list]:
    """Each channel by itself: its feature (K, D) and where the class token looks (K, h, w)."""
    import torch
    import data
    import model
    given = model.Settings()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (given.mean, given.std))
    shares = data.normalise(pixels, data.percentiles(pixels, given.low, given.high))
    x = torch.stack([torch.from_numpy(data.to_rgb(one[None])) for one in shares])            # (K, 3, H, W)
    with torch.inference_mode():
        tokens, attended = with_attention(vit, ((x - mean) / std).to(vit.cls_token.device))
    vectors = tokens.patches.mean(1) if feature == "patches" else tokens.cls                 # (K, D)
    return vectors.tolist(), attended.tolist()


def with_attention(vit, x):
    """The backbone's tokens, and how its last class token shares its attention among the patches: (B, h, w).

    The mean over heads; what goes to the class and register tokens themselves is left out.
    """
    from model import rotate
    inputs, attention = [], vit.blocks[-1].attn
    hook = attention.register_forward_pre_hook(lambda module, given: inputs.append(given))
    try:
        tokens = vit(x)
    finally:
        hook.remove()
    (y, rope), = inputs                                         # (B, T, D)
    B, T, D = y.shape
    q, k = ((y @ part.mT).view(B, T, attention.heads, -1).transpose(1, 2)
            for part in attention.qkv.weight[:2 * D].split(D))  # (B, heads, T, head)
    q = q + attention.q_bias.view(attention.heads, 1, -1)       # keys have no bias
    logits = rotate(q, *rope)[:, :, :1] @ rotate(k, *rope).mT / math.sqrt(q.shape[3])   # (B, heads, 1, T)
    share = logits.softmax(3)[:, :, 0, 1 + vit.registers:].mean(1)                      # (B, N)
    return tokens, share.view(B, x.shape[2] // vit.patch, -1)


# --------------------------------------------------------------------------------------------------- command

VERBS = {"bench": (Bench, bench), "gating": (Gating, gating), "sweep": (Sweep, sweep),
         "ceiling": (Ceiling, ceiling), "channels": (Channels, channels)}


def main(arguments: list[str]) -> int:
    """The first word chooses; the rest is a configuration and key=value, as everywhere."""
    verb, *rest = arguments or ["--help"]
    if verb in ("--help", "-h"):
        print(__doc__.strip())
        return 0
    if verb not in VERBS:
        raise ValueError(f"unknown verb '{verb}', expected one of {', '.join(VERBS)}")
    cls, measure = VERBS[verb]

    def run(config, files: list[str]) -> None:
        if files:
            raise ValueError(f"{files[0]}: evaluate.py {verb} takes one configuration and key=value")
        measure(config)
    runs.script(f"python evaluate.py {verb} CONFIG.yaml [key=value ...]\n\n{measure.__doc__}", cls, run, rest)


if __name__ == "__main__":
    sys.exit(runs.guarded(lambda: main(sys.argv[1:])))
