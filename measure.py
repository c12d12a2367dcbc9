"""Measuring models, and label images of any other program, on labelled sets; what is done is not done again.

    place = DataSet("nuclei", "nuclei_fluo_dsb2018/test")
    found = examples(place, root="../shared/data")
    network = Network(Model("tiny", weights="final_models/dinocell_tiny.pt"))
    result = measured("tiny", place, found, network, folder)     # folder/NAME_pred.tif, folder/metrics.json
    result.scores.mean["AP@0.5"], intervals(result.scores), differences(place, first, result)

Beside everything kept lies what it was made from: the hash of the weights, of the image, and every option.
"""
from __future__ import annotations

import copy
import csv
import hashlib
import json
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import runs

ENOUGH = 10          # images, for an interval
POOLED = ("precision", "recall", "F1", "TP", "FP", "FN", "n_true", "n_pred", "SEG", "DET", "OP_CSB",
          "error_rate")
READ = ("AP@0.5", "AP@0.75", "AP@0.9", "F1", "PQ", "AJI", "SEG", "DET", "OP_CSB")      # on the page
COMPARED = (*READ, "DSB", "MMA")                                                       # between models
CEILING = "ceiling"  # the row of the encoding itself
LABELS = re.compile(r"_(pred|labels?|cp_masks|masks?|nuclei|cells)$")                  # ends of label files
FILES = (".tif", ".tiff", ".npy", ".png")                                              # of labels


# ------------------------------------------------------------------------------------ what one may ask for

@dataclass(frozen=True)
class Model:
    name: str                               # its folder and row
    weights: str | None = None              # file of this project
    labels: str | None = None               # or a folder of label images of any other program, or SET/ in it
    note: str = ""                          # printed beside the name; why, if it was not run
    seeds_of: str | None = None             # runs that differ in their seed alone: in documents the mean of all stands so
    optional: bool = False                  # files that are not there make a row "not run", and no error
    peak: float | None = None               # null: the weights' own
    fill: float | None = None               # null: the weights' own
    min_area: int | None = None             # px; null: the weights' own
    tile: int | None = None                 # px; null: as trained
    overlap: int | None = None              # px; null: a cell's width, from an eighth to half of the tile
    scale: float = 1.0                      # network px per image px, on top of the set's diameter

    @property
    def row(self) -> str:
        """What documents call it."""
        return self.seeds_of or self.name

    def __post_init__(self):
        check_name(self.name)
        check_name(self.row)
        if CEILING in (self.name, self.seeds_of):
            raise ValueError(f"model '{CEILING}': the row of the encoding is called so; choose another name")
        if self.weights and self.labels:
            raise ValueError(f"model '{self.name}' has weights and labels; give one of the two")
        if not (self.weights or self.labels or self.note):
            raise ValueError(f"model '{self.name}' has neither weights nor labels; give one, or a note that "
                             "says why it was not run")
        if not self.scale > 0:
            raise ValueError(f"model '{self.name}' has scale={self.scale:g}, expected more than 0")


@dataclass(frozen=True)
class DataSet:
    name: str                               # its folder and row
    path: str                               # labelled images as data.examples reads them, within root
    channels: tuple[str, ...] | None = None  # names or numbers from 1, up to three that are seen; null: all
    labels: str | None = None               # nuclei or cells, where an image has both
    match: str | None = None                # regular expression on names; others are left out
    diameter: float | None = None           # px, how wide cells are here, to scale as trained; null: as is
    manifest: str | None = None             # CSV or TSV with a row per image, within root: group, where
    group: str | None = None                # its column; without manifest, a regular expression on names
    where: str | None = None                # COLUMN=REGEX: only images whose row of the manifest fits
    limit: int | None = None                # only the first so many images
    note: str = ""                          # printed with it: trained on, never seen

    def __post_init__(self):
        check_name(self.name)
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"set '{self.name}' has limit={self.limit}, expected 1 or more")
        if self.where is not None and ("=" not in self.where or self.manifest is None):
            raise ValueError(f"set '{self.name}' has where: {self.where}; expected COLUMN=REGEX, and the "
                             "manifest that has the column")


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


# --------------------------------------------------------------------------------------- images of a set

class Item(NamedTuple):
    name: str
    pixels: np.ndarray                      # (C, H, W), the channels that the network sees
    truth: np.ndarray                       # (H, W)
    digest: str                             # of the pixels: the content, in whatever file


def examples(place: DataSet, root: str) -> list:
    """data.Example of each image of the set; nothing is decoded yet."""
    import data
    found = data.examples(Path(root) / place.path, place.channels, place.match, place.labels)
    if place.where is not None:
        column, _, pattern = place.where.partition("=")
        said = manifested(place, root, found, column)
        if unlisted := [example.name for example in found if plain(example.name) not in said]:
            raise ValueError(f"{Path(root) / place.manifest}: no row for {unlisted[0]} of set "
                             f"'{place.name}', of which {place.where} cannot be told")
        fits = expression(place, "where", pattern).search
        if not (found := [example for example in found if fits(said[plain(example.name)])]):
            values = ", ".join(sorted(set(said.values())))
            raise ValueError(f"set '{place.name}': no image with {place.where}; it has {values}")
    check_distinct(f"image in set {place.name}", [plain(example.name) for example in found[:place.limit]])
    return found[:place.limit]


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


def grouped(place: DataSet, root: str, found: list) -> dict[str, str]:
    """Image -> its group: a column of the manifest, or what a regular expression finds in the name."""
    if place.group is None:
        return {}
    if place.manifest:
        groups = manifested(place, root, found, place.group)
    else:
        pattern = expression(place, "group", place.group, "; to mean a column, give its manifest")
        hits = {plain(example.name): pattern.search(example.name) for example in found}
        groups = {name: hit[1 if pattern.groups else 0] for name, hit in hits.items() if hit}
    if not groups:
        raise ValueError(f"set '{place.name}': group '{place.group}' fits none of its {len(found)} images, "
                         f"such as {found[0].name}")
    return groups


def expression(place: DataSet, key: str, text: str, more: str = "") -> re.Pattern:
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"set '{place.name}': {key} '{text}' is no regular expression ({error}){more}"
                         ) from None


def manifested(place: DataSet, root: str, found: list, column: str) -> dict[str, str]:
    """Image -> what a column of the manifest says of it; those without a row are left out."""
    path = Path(root) / place.manifest
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter="," if path.suffix.lower() == ".csv" else "\t")
            table, columns = list(reader), reader.fieldnames or []
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: no table of text ({error}); expected CSV or TSV") from None
    if column not in columns:
        raise ValueError(f"{path}: no column '{column}' for set '{place.name}'; it has {', '.join(columns)}")
    image = next((name for name in ("image", "file", "filename", "name") if name in columns), columns[0])
    by_stem: dict[str, list[dict]] = {}
    for line in table:
        by_stem.setdefault(Path(line[image] or "").stem, []).append(line)
    said = {}
    for example in found:                   # of several rows with its stem, the one with its folders too
        files = [Path(file) for file in example.files]
        stems = dict.fromkeys([example.name.rpartition("/")[2], *(file.stem for file in files)])
        fits = [line for stem in stems for line in by_stem.get(stem, ())]
        names = [f"/{name}" for name in (example.name, *(way.as_posix() for file in files for way in (file, file.with_suffix(""))))]
        whole = [line for line in fits if any(name.endswith(f"/{line[image]}") for name in names)]
        fits = [line for line in whole if len(line[image]) == max(len(other[image]) for other in whole)] or fits
        if len({line[column] for line in fits}) > 1:
            raise ValueError(f"{path}: {len(fits)} rows may be that of {example.name} ({', '.join(line[image] for line in fits[:3])}) "
                             f"and differ in '{column}'; write names with their folders")
        if fits:
            said[plain(example.name)] = fits[0][column] or "-"
    return said


# -------------------------------------------------------------------------------------------- what is kept

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
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError):
        record = None
    return record if isinstance(record, dict) and "key" in record else {"key": None}


# ------------------------------------------------------------------------------------ where labels come from

class Network:
    """Weights of this project. A file that is none is noticed here, before anything is measured."""
    note = ""

    def __init__(self, entry: Model, device: str = "auto", batch: int | None = None):
        import model
        self.path, self.device, self.batch = Path(entry.weights), device, batch
        if not self.path.is_file():
            raise FileNotFoundError(f"no weights at {self.path} for model '{entry.name}'; train with "
                                    "train_seg.py, or say optional: true")
        model.load(self.path)
        self.digest = digest(self.path)
        self.options = dict(peak=entry.peak, fill=entry.fill, min_area=entry.min_area, tile=entry.tile,
                            overlap=entry.overlap, scale=entry.scale)

    @cached_property
    def net(self):
        import model
        return model.load(self.path).ready(runs.pick_device(self.device))

    def with_options(self, **options) -> Network:
        """The same network, read once, with other options."""
        self.net
        other = copy.copy(self)
        other.options = {**self.options, **options}
        return other

    def key(self, item: Item, place: DataSet) -> dict:
        return dict(weights=self.digest, image=item.digest, diameter=place.diameter, **self.options)

    def labels(self, item: Item, place: DataSet) -> tuple[np.ndarray, float]:
        net, start = self.net, time.perf_counter()
        labels = segmented(item, place, net, batch=self.batch, **self.options)
        return labels, time.perf_counter() - start


def segmented(item: Item, place: DataSet, net, scale: float, **options) -> np.ndarray:
    import segment
    try:
        zoom = None if scale == 1 else scale * (segment.zoom_for(place.diameter, net) if place.diameter else 1.0)
        return segment.segment(item.pixels, net, diameter=place.diameter, zoom=zoom, **options)
    except ValueError as error:             # segment knows no names
        raise ValueError(f"{place.name}/{item.name}: {error}") from None


class Peer:
    """Label images that any other program wrote, found by the stem of their names."""
    note = ""

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
            if path.suffix.lower() in FILES:
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
        file = self.files[item.name]
        return same_size(data.read_labels(file), item, str(file)), None


class Encoded:
    """The truth, made a distance map and found again in it."""

    def __init__(self, cap: float | None, peak: float, fill: float):
        self.cap, self.options = cap, dict(peak=peak, fill=fill)
        self.note = f"{f'cap {cap:g} px' if cap else 'no cap'}, peak {peak:g}, fill {fill:g}"

    def key(self, item: Item, place: DataSet) -> dict:
        return dict(truth=digest(item.truth), cap=self.cap, **self.options)

    def labels(self, item: Item, place: DataSet) -> tuple[np.ndarray, None]:
        from watershed import distance_map, watershed
        return watershed(distance_map(item.truth, self.cap), **self.options), None


# ------------------------------------------------------------------------------------------ a model on a set

class Result(NamedTuple):
    model: str
    note: str                               # what its source says of itself
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
        tables.append(metrics.overlap(item.truth, same_size(labels, item, str(path))))
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
    return Result(model, source.note, folder, names, tables, scores, missing, total)


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


def same_size(labels: np.ndarray, item: Item, where: str) -> np.ndarray:
    """The labels, if they are of the image."""
    if labels.shape != item.truth.shape:
        raise ValueError(f"{where}: labels of {labels.shape} px, the image {item.name} has "
                         f"{item.truth.shape}; expected the same size")
    return labels


def without_nan(value: Any) -> Any:
    """For JSON, which knows no NaN: null."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -------------------------------------------------------------------------------------------------- numbers

def headline(scores) -> dict[str, float]:
    """One number for each score: the mean over images, or for those in POOLED that of all cells together."""
    return {name: (scores.pooled if name in POOLED else scores.mean)[name] for name in scores.mean}


def intervals(scores) -> dict[str, tuple[float, float]]:
    """95 % bootstrap over images of each score in headline(); empty below ENOUGH images."""
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


def seeds_joined(models: Sequence[Model], entries: Sequence[tuple[str, str]], results: dict[str, dict[str, Result]]
                 ) -> tuple[list[tuple[str, str]], dict[str, dict[str, Result]]]:
    """Entries (name, note) and {set: {name: Result}} with one result for all runs of one `seeds_of`: their mean."""
    import metrics
    called, joined = {m.name: m.row for m in models if m.seeds_of}, {}
    for place, there in results.items():
        members: dict[str, list[Result]] = {}
        for name, result in there.items():
            members.setdefault(called.get(name, name), []).append(result)
        for name, found in members.items():
            for other in found[1:]:
                if other.names != found[0].names:
                    unlike = sorted(set(other.names) ^ set(found[0].names))
                    raise ValueError(f"{name} on {place}: {found[0].model} and {other.model} are seeds of one, but "
                                     f"only one of them has {', '.join(unlike[:3])}{' ...' * (len(unlike) > 3)}; expected the same images of each")
        joined[place] = {name: found[0] if name not in called.values() else found[0]._replace(
            model=name, note=f"{len(found)} seed{'s' * (len(found) > 1)}", tables=[], seconds=None,
            scores=metrics.run_scores([result.tables for result in found])) for name, found in members.items()}
    notes: dict[str, str] = {}
    for name, note in entries:
        notes.setdefault(called.get(name, name), note)
    return list(notes.items()), joined


def group_rows(place: DataSet, results: list[Result], groups: dict[str, str]) -> list[dict]:
    """Scores of each group of images, model below model; images without a group stand under '-'."""
    import metrics
    members: dict[tuple[str, int], list] = {}
    for number, result in enumerate(results if groups else ()):
        for name, table in zip(result.names, result.tables):
            members.setdefault((groups.get(name, "-"), number), []).append(table)
    return [{"set": place.name, "group": group, "model": results[number].model, "n": len(tables),
             **columns_of(metrics.set_scores(tables))} for (group, number), tables in sorted(members.items())]
