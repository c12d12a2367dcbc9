"""Models, and label images of any other program, measured on labelled sets.

    nuclei = LabelledSet(DataSet("nuclei", "nuclei_fluo_dsb2018/test"), root="../shared/data")
    network = NetworkLabels("final_models/dinocell_tiny.pt")
    result = measure_model("tiny", nuclei, network, folder)      # NAME_pred.tif, metrics.json
    result.scores.mean["AP@0.5"], score_intervals(result.scores)

Beside every prediction lies what it was made from: hashes of weights and image, and every option.
As long as these are the same it is read, not made again.
"""
from __future__ import annotations

import copy
import json
import math
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from glob import glob
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import numpy as np

import report
import runs
from report import chart_mean, shown_value

with runs.lazy():                       # evaluate.py --help does not wait for these
    import scipy
    import tqdm
    import yaml

    import cells
    import data
    import metrics
    import model as networks
    import segment
    import watershed

ENOUGH = 10                             # images, for an interval
POOLED = ("precision", "recall", "F1", "TP", "FP", "FN", "n_true", "n_pred", "SEG", "DET", "OP_CSB",
          "error_rate")
Score = Literal["AP@0.5", "AP@0.75", "AP@0.9", "F1", "PQ", "AJI", "SEG", "DET", "OP_CSB", "DSB",
                "MMA"]
COMPARED = get_args(Score)                        # between models
PAGE_SCORES = tuple(name for name in COMPARED if name not in ("DSB", "MMA"))
BRIEF = ("AP@0.5", "AP@0.75", "AP@0.9")           # in the short table
CEILING = "ceiling"                               # name of the row of the encoding
LABEL_SUFFIXES = (".tif", ".tiff", ".npy", ".png")
LABEL_ENDS = re.compile(r"_(pred|labels?|cp_masks|masks?|nuclei|cells)$")


# ------------------------------------------------------------------------------------ configuration

RowName = Annotated[str, runs.Bound("letters, digits, _ . + -, for it becomes a folder",
                                    lambda name: bool(re.fullmatch(r"[\w+-][\w.+-]*", name)))]


@dataclass(frozen=True)
class Model:
    name: RowName                           # its folder and row
    weights: str | None = None              # file of this project; with *: several seeds
    labels: str | None = None               # or a folder of label images, or SET/ in it
    note: str = ""                          # printed beside the name; why, if it was not run
    optional: bool = False                  # missing files make a row "not run", and no error
    peak: runs.Distance | None = None       # thresholds of the watershed; null: as in the weights
    fill: runs.Distance | None = None       # the same
    depth: runs.NotNegative | None = None   # the same
    smooth: runs.NotNegative | None = None  # the same, px of the network
    shape: runs.NotNegative | None = None   # the same, per px of the network
    min_area: runs.Area | None = None       # the same, px
    tile: runs.Side | None = None           # px; null: as trained
    overlap: runs.Whole | None = None       # px; null: a cell's diameter
    scale: runs.Positive = 1.0              # factor on the zoom by the diameter, given or seen
    channels: tuple[runs.Count, ...] | None = None  # of the set's, that it is shown; null: all

    def __post_init__(self):
        if self.name == CEILING:
            raise ValueError(f"model '{CEILING}': the encoding's row has this name; choose another")
        if self.weights and self.labels:
            raise ValueError(f"model '{self.name}' has weights and labels; give one of the two")
        if not (self.weights or self.labels or self.note):
            raise ValueError(f"model '{self.name}' has neither weights nor labels; give one, or a "
                             "note that says why it was not run")


@dataclass(frozen=True)
class DataSet:
    name: RowName                           # its folder and row
    path: str                               # labelled images (data.examples), within root
    channels: tuple[str, ...] | None = None  # up to three names or numbers from 1; null: all
    labels: str | None = None               # nuclei or cells, where an image has both
    match: str | None = None                # regular expression on names; others are left out
    diameter: runs.Positive | None = None   # px, of its cells, to scale as trained; null: as is
    manifest: str | None = None             # CSV or TSV within root with a row per image
    group: str | None = None                # its column; without it, a regular expression on names
    where: str | None = None                # COLUMN=REGEX: only images whose row fits
    limit: runs.Count | None = None         # only the first so many images
    note: str = ""                          # printed with it: trained on, never seen

    def __post_init__(self):
        if self.where is not None and ("=" not in self.where or self.manifest is None):
            raise ValueError(f"set '{self.name}' has where: {self.where}; expected COLUMN=REGEX, "
                             "and the manifest that has the column")


@dataclass(frozen=True)
class Encoding:
    cap: tuple[runs.Positive | None, ...] = (None, 2.0, 4.0, 8.0)  # px; null: none; []: no ceiling
    peak: tuple[runs.Distance, ...] = (0.47, 0.6)  # thresholds of the watershed (watershed.Setting)
    fill: tuple[runs.Distance, ...] = (0.09, 0.2, 0.3)
    depth: tuple[runs.NotNegative, ...] = (0.0,)
    smooth: tuple[runs.NotNegative, ...] = (0.0,)  # px
    shape: tuple[runs.NotNegative, ...] = (0.0,)  # per px
    min_area: tuple[runs.Area, ...] = (0,)  # px

    def __post_init__(self):
        bench_threshold_grid(self)


def bench_threshold_grid(grid: Any, *more: str,
                         stored: watershed.Setting | None = None) -> list[dict]:
    """Combinations of `more` and the six thresholds that a configuration lists, with fill <= peak.

    stored : what null stands for, once the weights are known.
    """
    names = (*more, "peak", "fill", "depth", "smooth", "shape", "min_area")
    lists = [getattr(grid, name) for name in names]
    if empty := [name for name, values in zip(names, lists) if not values]:
        raise ValueError(f"{empty[0]}: expected one value or more")
    every = [dict(zip(names, values)) for values in product(*lists)]
    found = []
    for one in every:
        peak, fill = (getattr(stored, name, None) if one[name] is None else one[name]
                      for name in ("peak", "fill"))
        if peak is None or fill is None or fill <= peak:
            found.append(one)
    if not found:
        null = f"; null: {stored.peak:g} and {stored.fill:g}, as in the weights" if stored else ""
        raise ValueError(f"peak={list(grid.peak)}, fill={list(grid.fill)}: no pair with "
                         f"fill <= peak{null}; give a larger peak or a smaller fill")
    return found


def check_bench_names(what: str, things: Sequence[Any]) -> None:
    """Refuse none, and two things, or names, that are called the same."""
    if not things:
        raise ValueError(f"no {what}; give at least one")
    names = [thing if isinstance(thing, str) else thing.name for thing in things]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two {what}s are called '{twice[0]}'; give each a name of its own")


# ---------------------------------------------------------------------------------- images of a set

class Item(NamedTuple):
    name: str
    pixels: np.ndarray                      # (C, H, W), the channels that the network sees
    truth: np.ndarray                       # (H, W)
    digest: str                             # of the pixels: the content, in whatever file


class LabelledSet:
    """Images of a DataSet; each is read when it is needed."""

    def __init__(self, config: DataSet, root: str):
        self.config, self.name, self.note = config, config.name, config.note
        self.root = Path(root)
        self.examples = data.examples(self.root / config.path, config.channels, config.match,
                                      config.labels)
        if config.where is not None:
            self.examples = self._where(*config.where.split("=", 1))
        self.examples = self.examples[:config.limit]
        check_bench_names(f"image in set {self.name}",
                          [bench_image_name(e.name) for e in self.examples])
        self.groups = self._groups(config.group) if config.group else {}   # image -> its group

    def items(self, what: str) -> Iterator[Item]:
        for example in bench_progress(self.examples, f"{what} on {self.name}"):
            name, pixels = f"{self.name}/{example.name}", example.image().pixels
            truth = example.labels()
            if pixels.shape[1:] != truth.shape:
                raise ValueError(f"{name}: image of {pixels.shape[1:]} px, labels of {truth.shape}")
            if len(pixels) > 3:
                raise ValueError(f"{name}: {len(pixels)} channels; choose up to three that the "
                                 "network sees, such as channels: [1, 2]")
            yield Item(bench_image_name(example.name), pixels, truth, runs.digest(pixels))

    def _where(self, column: str, pattern: str) -> list:
        values = self._column(column)
        fits = data.labelled_name_pattern(f"set '{self.name}': where", pattern).search
        if unlisted := [e.name for e in self.examples if bench_image_name(e.name) not in values]:
            raise ValueError(f"{self._manifest}: no row for {unlisted[0]} of set '{self.name}', "
                             f"which {self.config.where} needs")
        found = [e for e in self.examples if fits(values[bench_image_name(e.name)])]
        if not found:
            raise ValueError(f"set '{self.name}': no image with {self.config.where}; it has "
                             f"{', '.join(sorted(set(values.values())))}")
        return found

    def _groups(self, group: str) -> dict[str, str]:
        """Image -> its group: a column of the manifest, or what is found in the name."""
        if self.config.manifest:
            groups = self._column(group)
        else:
            pattern = data.labelled_name_pattern(f"set '{self.name}': group", group)
            hits = {bench_image_name(e.name): pattern.search(e.name) for e in self.examples}
            part = 1 if pattern.groups else 0
            groups = {name: hit[part] for name, hit in hits.items()
                      if hit and hit[part] is not None}
        if not groups:
            raise ValueError(f"set '{self.name}': group '{group}' fits none of its "
                             f"{len(self.examples)} images, such as {self.examples[0].name}; to "
                             "mean a column, give its manifest")
        return groups

    @property
    def _manifest(self) -> Path:
        return self.root / str(self.config.manifest)

    def _column(self, column: str) -> dict[str, str]:
        """Image -> its value in a column of the manifest; images without a row are left out.

        A row names an image by the end of its path, with or without suffix, or by its stem alone.
        """
        rows = runs.read_table(self._manifest, [column], f"it is the manifest of set '{self.name}'")
        names = list(rows[0]) if rows else [""]
        image = next(name for name in ("image", "file", "filename", "name", *names)
                     if name in names)
        by_name, by_stem = defaultdict(list), defaultdict(list)
        for row in rows:
            by_name[row[image]].append(row)
            by_stem[Path(row[image]).stem].append(row)
        values = {}
        for example in self.examples:
            files = [Path(example.name), *map(Path, example.files)]
            ends = sorted({end for file in files for end in bench_path_ends(file)}, key=len)
            stems = dict.fromkeys([files[0].name, *(file.stem for file in files[1:])])
            fits = next((by_name[end] for end in reversed(ends) if end in by_name), None) or [
                row for stem in stems for row in by_stem.get(stem, ())]
            if len({row[column] for row in fits}) > 1:
                raise ValueError(f"{self._manifest}: {len(fits)} rows may be that of {example.name}"
                                 f" ({runs.listed([row[image] for row in fits], 3)}) and differ in "
                                 f"'{column}'; write names with their folders")
            if fits:
                values[bench_image_name(example.name)] = fits[0][column] or "-"
        return values


def bench_path_ends(file: Path) -> Iterator[str]:
    """The path with fewer and fewer folders in front, with the suffix and without."""
    for parts in (file.parts, file.with_suffix("").parts):
        yield from ("/".join(parts[start:]) for start in range(len(parts) - 1))


def bench_progress(things: Iterable, what: str) -> Iterable:
    return tqdm.tqdm(things, what, delay=1, file=sys.stderr, leave=False)


def bench_image_name(name: str) -> str:
    """A name from data as a file name that reaches no other folder."""
    return re.sub(r"[^\w.+-]", "_", name).lstrip(".") or "_"


# ---------------------------------------------------------------------------- records on the disk

def cached_bench_map(path: Path, key: dict, make: Callable[[], Any]) -> Any:
    """Result of make(), from the JSON file if that was written for the same key."""
    if record := load_bench_record(path, key):
        return record["value"]
    value = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    runs.write_text(path, json.dumps({"key": key, "value": value}))
    return value


def bench_load_or_predict(path: Path, key: dict, predict: Callable, overwrite: bool
                          ) -> tuple[np.ndarray, float | None]:
    """Labels and their seconds, from NAME_pred.tif if NAME_pred.json has the same key."""
    beside = path.with_suffix(".json")
    if path.exists() and not overwrite and (record := load_bench_record(beside, key)):
        return data.read_labels(path), record["seconds"]
    beside.unlink(missing_ok=True)          # first: it must not vouch for labels that come later
    labels, seconds = predict()
    data.write_labels(path, labels)
    runs.write_text(beside, json.dumps({"key": key, "seconds": seconds}))
    return labels, seconds


def load_bench_record(path: Path, key: dict) -> dict | None:
    """The record, if it was written for this key; a missing or damaged one was not."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    same = isinstance(record, dict) and record.get("key") == json.loads(json.dumps(key))
    return record if same else None


# ------------------------------------------------------------------------------ sources of labels

class NetworkLabels:
    """Labels by weights of this project, which are read at once."""
    note = ""

    def __init__(self, path: str | Path, device: str = "auto", batch: int | None = None, **options):
        self.path, self.device, self.batch = Path(path), device, batch
        if not self.path.is_file():
            raise FileNotFoundError(f"no weights at {self.path}; train with train_seg.py, or say "
                                    "optional: true")
        settings = networks.load(self.path).settings
        try:                                # now, not at the first image
            settings.setting.changed(**{name: options.get(name)
                                        for name in watershed.Setting._fields})
        except ValueError as error:
            raise ValueError(f"{self.path}: with thresholds given and its own {error}") from None
        # labelled images it was trained on; 0: not known
        self.images = len(settings.provenance.get("images", {}).get("train", {}))
        self.digest = runs.digest(self.path)
        self.options = {"scale": 1.0, **options}

    @cached_property
    def net(self):
        return networks.load(self.path).ready(runs.pick_device(self.device))

    def with_options(self, **options) -> NetworkLabels:
        """The same network with other options."""
        other = copy.copy(self)
        other.net, other.options = self.net, {**self.options, **options}
        return other

    def key(self, item: Item, dataset: LabelledSet) -> dict:
        return dict(weights=self.digest, image=item.digest, diameter=dataset.config.diameter,
                    **self.options)

    def labels(self, item: Item, dataset: LabelledSet) -> tuple[np.ndarray, float]:
        net, wanted, pixels = self.net, dict(self.options), item.pixels
        start = time.perf_counter()
        if channels := wanted.pop("channels", None):
            if max(channels) > len(pixels):
                raise ValueError(f"{dataset.name}/{item.name}: {len(pixels)} channels, but a model "
                                 f"has channels: {list(channels)}; they count from 1 among the "
                                 "set's")
            pixels = pixels[[number - 1 for number in channels]]
        scale, wanted["diameter"] = wanted.pop("scale"), dataset.config.diameter
        with naming_bench_item(item, dataset):
            if scale != 1:                  # the size head sees the image at scale 1 as well
                plan = segment.plan_for(pixels, net, diameter=wanted["diameter"])
                wanted["zoom"] = scale * plan.zoom
            labels = segment.segment(pixels, net, batch=self.batch, **wanted)
        return labels, time.perf_counter() - start


@contextmanager
def naming_bench_item(item: Item, dataset: LabelledSet) -> Iterator[None]:
    """Name the image in errors of segment.py, which knows none."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{dataset.name}/{item.name}: {error}") from None


class PeerLabels:
    """Label images of any other program, found by the stems of their names."""
    note = ""

    def __init__(self, folder: Path, dataset: LabelledSet):
        folder = folder / dataset.name if (folder / dataset.name).is_dir() else folder
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; expected label images")
        examples = [example.name for example in dataset.examples]
        tails = Counter(name.rpartition("/")[2] for name in examples)
        names = {bench_image_name(tail): bench_image_name(name) for name in examples
                 for tail in (name, name.rpartition("/")[2]) if tail == name or tails[tail] == 1}
        candidates = defaultdict(list)
        for path in data.list_files(folder, LABEL_SUFFIXES):
            stem = bench_image_name(path.relative_to(folder).with_suffix("").as_posix())
            if name := names.get(stem) or names.get(LABEL_ENDS.sub("", stem)):
                candidates[name].append(path)
        self.files: dict[str, Path] = {}
        for name, paths in candidates.items():              # beside x_masks.tif, x.tif is the image
            paths = [path for path in paths if LABEL_ENDS.search(path.stem)] or paths
            if len(paths) > 1:
                raise ValueError(f"{paths[0]}, {paths[1].name}: both may be the labels of {name}; "
                                 "keep one")
            self.files[name] = paths[0]
        if not self.files:
            some = next(iter(names))
            raise FileNotFoundError(f"{folder}: labels for none of the {len(examples)} images of "
                                    f"set '{dataset.name}', expected names such as {some}.tif or "
                                    f"{some}_masks.png")

    def key(self, item: Item, dataset: LabelledSet) -> dict | None:
        file = self.files.get(item.name)
        return dict(labels=runs.digest(file)) if file else None

    def labels(self, item: Item, dataset: LabelledSet) -> tuple[np.ndarray, None]:
        file = self.files[item.name]
        return of_same_size(data.read_labels(file), item, file), None


def setting_of(row: dict) -> watershed.Setting:
    return watershed.Setting(**{name: row[name] for name in watershed.Setting._fields})


class EncodedLabels:
    """True labels, made a distance map and found again in it: a row of bench_encoding_rows()."""

    def __init__(self, row: dict):
        self.cap, self.setting = row["cap"], setting_of(row)
        changed = [f"{name} {value:g}" for name, value in self.setting._asdict().items() if value]
        self.note = f"{f'cap {self.cap:g} px' if self.cap else 'no cap'}, {', '.join(changed)}"

    def key(self, item: Item, dataset: LabelledSet) -> dict:
        return dict(truth=runs.digest(item.truth), cap=self.cap, **self.setting._asdict())

    def labels(self, item: Item, dataset: LabelledSet) -> tuple[np.ndarray, None]:
        return watershed.flood(watershed.distance_map(item.truth, self.cap), self.setting), None


def of_same_size(labels: np.ndarray, item: Item, where: Path) -> np.ndarray:
    if labels.shape != item.truth.shape:
        raise ValueError(f"{where}: labels of {labels.shape} px, the image {item.name} has "
                         f"{item.truth.shape}; expected the same size")
    return labels


# -------------------------------------------------------------------------------- score of a cell

class JudgedCells(NamedTuple):
    """Cells that a network found."""
    features: dict[str, np.ndarray]         # of cells.cell_map_features, (n,) each
    right: np.ndarray                       # (n,) bool: IoU >= .5 with a true cell


def bench_judged_cells(dataset: LabelledSet, net) -> JudgedCells:
    """The cells that a network finds in a set, and whether they are right."""
    features: dict[str, list] = defaultdict(list)
    right = []
    for item in dataset.items("cells"):
        plan = segment.plan_for(item.pixels, net, diameter=dataset.config.diameter)
        seen, _ = segment.network_map(item.pixels, plan)
        labels, distance = segment.cells_in_map(seen, plan, item.truth.shape)
        ids = np.arange(1, int(labels.max(initial=0)) + 1)
        for name, values in cells.cell_map_features(labels, distance, plan.diameter, ids).items():
            features[name].append(values)
        table = metrics.overlap(item.truth, labels)
        right.append(np.isin(ids, table.pred_ids[table.cols[table.ious >= 0.5]]))
    return JudgedCells({name: np.concatenate(parts) for name, parts in features.items()},
                       np.concatenate(right))


def fit_cell_score(sets: Sequence[JudgedCells]) -> dict[str, float]:
    """Weights of cells.cell_probability: logistic regression by Newton's method.

    A set counts by the root of its cells, so that none drowns the others. The penalty on squared
    weights, 1, is for features divided by their standard deviations.
    """
    names = list(sets[0].features)
    x = np.concatenate([np.stack([each.features[name] for name in names], 1) for each in sets])
    right = np.concatenate([each.right for each in sets]).astype(float)          # (n,)
    if not 0 < right.sum() < len(right):
        raise ValueError(f"{len(right)} cells, {right.sum():.0f} of them right: expected right and "
                         "wrong ones, to tell them apart; give more validation images")
    counts = np.array([len(each.right) for each in sets])
    share = np.repeat(np.maximum(counts, 1) ** -0.5, counts)
    share *= len(share) / share.sum()
    mean, spread = x.mean(0), x.std(0) + 1e-9
    x = np.column_stack(((x - mean) / spread, np.ones(len(x))))                  # (n, F + 1)
    ridge = np.diag([*[1.0] * len(names), 1e-9])
    weights = np.zeros(len(names) + 1)
    for _ in range(50):
        p = 1 / (1 + np.exp(-x @ weights))
        slope = x.T @ (share * (p - right)) + ridge @ weights
        weights -= np.linalg.solve((x.T * (share * p * (1 - p))) @ x + ridge, slope)
    *scaled, constant = weights
    raw = scaled / spread
    return {"constant": float(constant - raw @ mean), **dict(zip(names, raw.tolist()))}


def bench_held_out_sets(net, root: str) -> list[LabelledSet]:
    """The images that were held out when the network was trained, as its weights tell."""
    story = net.settings.provenance
    held = story.get("images", {}).get("validation", {})
    trained = (yaml.safe_load(story.get("config", "")) or {}).get("data", {})
    sets = []
    for given in (*trained.get("sets", ()), *trained.get("validation", ())):
        chosen = data.TrainingSet(given["path"], given["channels"] and tuple(given["channels"]),
                                  given["match"], given["labels"])
        dataset = LabelledSet(DataSet(bench_image_name(chosen.path), chosen.path,
                                      chosen.channels or trained.get("channels"), chosen.labels,
                                      chosen.match), root)
        dataset.examples = [each for each in dataset.examples
                            if f"{chosen.name}/{each.name}" in held]
        if dataset.examples:
            sets.append(dataset)
    if not sets:
        raise ValueError("the weights do not name labelled images that were held out in training; "
                         "give validation sets")
    return sets


# ---------------------------------------------------------------------------------- rows of a table

class TableRow(NamedTuple):
    """A model in the tables, or several seeds of one."""
    name: str
    note: str
    sources: dict[str, tuple]               # set -> a source of labels for each seed; none: not run
    images: int = 0                         # labelled images it was trained on; 0: not known
    curve: str = ""                         # the model whose other rows differ in that number


def rows_of(model: Model, sets: Sequence[LabelledSet], device: str,
            batch: int | None) -> list[TableRow]:
    """Row of a model; several, where its weights differ in the number of training images.

    Missing files are an error, or with `optional` a set without a source.
    """
    def said(error: FileNotFoundError) -> None:
        if not model.optional:
            raise error
        print(f"{model.name}: not run; {error}", file=sys.stderr)

    sources: dict[str, tuple] = {}
    if model.weights:
        try:
            return bench_network_rows(model, model.weights, sets, device, batch)
        except FileNotFoundError as error:
            said(error)
    for dataset in sets if model.labels else ():
        try:
            sources[dataset.name] = (PeerLabels(Path(str(model.labels)), dataset),)
        except FileNotFoundError as error:
            said(error)
    return [TableRow(model.name, model.note, sources)]


def bench_network_rows(model: Model, weights: str, sets: Sequence[LabelledSet], device: str,
                       batch: int | None) -> list[TableRow]:
    options = {name: getattr(model, name)
               for name in (*watershed.Setting._fields, "tile", "overlap", "scale", "channels")}
    pattern = any(letter in weights for letter in "*?[")
    paths = sorted(glob(weights, recursive=True)) if pattern else [weights]
    if not paths:
        raise FileNotFoundError(f"no weights fit {weights}, of model '{model.name}'")
    check_bench_names("file of weights", [Path(path).stem for path in paths])
    trained_on = defaultdict(list)
    for path in paths:
        network = NetworkLabels(path, device, batch, **options)
        trained_on[network.images].append(network)
    several = len(trained_on) > 1
    return [TableRow(f"{model.name}_{images}" if several else model.name, model.note,
                     {each.name: tuple(seeds) for each in sets}, images,
                     model.name if several else "")
            for images, seeds in sorted(trained_on.items())]


class Result(NamedTuple):
    """A model on a set."""
    model: str
    note: str                               # what its source says of itself
    folder: Path                            # with the predictions
    names: list[str]                        # of the images scored
    tables: list                            # metrics.Overlap of each; [] of several seeds
    scores: Any                             # metrics.SetScores
    missing: list[str]                      # images that a peer has no labels for, left out
    seconds: float | None                   # to segment them all; None: not by us
    seeds: tuple[Result, ...] = ()          # that this is the mean of, if it is one

    @property
    def runs(self) -> tuple[Result, ...]:
        return self.seeds or (self,)


def measure_row(row: TableRow, dataset: LabelledSet, folder: Path, overwrite: bool) -> Result:
    """Measure every seed of a row on a set, and take their mean."""
    sources, folder = row.sources[dataset.name], folder / row.name
    if len(sources) == 1:
        return measure_model(row.name, dataset, sources[0], folder / dataset.name, overwrite)
    return bench_mean_of_seeds(row.name, [
        measure_model(seed.path.stem, dataset, seed, folder / seed.path.stem / dataset.name,
                      overwrite) for seed in sources])


def measure_model(model: str, dataset: LabelledSet,
                  source: NetworkLabels | PeerLabels | EncodedLabels, folder: Path,
                  overwrite: bool = False) -> Result:
    """Predict every image, unless that was done before, score it, write metrics.json."""
    names, tables, missing = [], [], []
    seconds: list[Any] = []                 # a float of each, or None of each
    folder.mkdir(parents=True, exist_ok=True)
    for item in dataset.items(model):
        key = source.key(item, dataset)
        if key is None:
            missing.append(item.name)
            continue
        path = folder / f"{item.name}_pred.tif"
        labels, took = bench_load_or_predict(path, key, partial(source.labels, item, dataset),
                                             overwrite)
        names.append(item.name)
        tables.append(metrics.overlap(item.truth, of_same_size(labels, item, path)))
        seconds.append(took)
    if missing:
        print(f"{model} on {dataset.name}: {len(missing)} of {len(dataset.examples)} images have "
              f"no labels and are left out: {', '.join(missing)}", file=sys.stderr)
    total = None if None in seconds else round(sum(seconds), 3)
    scores = metrics.set_scores(tables)
    content = {"model": model, "set": dataset.name, "note": dataset.note, "n": len(names),
               "missing": missing, "seconds": total, **bench_headline(scores),
               "intervals": score_intervals(scores), "mean": scores.mean, "pooled": scores.pooled,
               "images": dict(zip(names, scores.images))}
    runs.write_text(folder / "metrics.json",
                    json.dumps(runs.without_nan(content), indent=1) + "\n")
    return Result(model, source.note, folder, names, tables, scores, missing, total)


def bench_mean_of_seeds(name: str, seeds: Sequence[Result]) -> Result:
    """Mean of several seeds on the same images."""
    scores = metrics.run_scores([seed.tables for seed in seeds])
    return seeds[0]._replace(model=name, note=f"{len(seeds)} seeds", tables=[], scores=scores,
                             seconds=None, seeds=tuple(seeds))


# ------------------------------------------------------------------------------------------ numbers

def bench_headline(scores) -> dict[str, float]:
    """Each score, a mean over images, or for those in POOLED of all cells."""
    return scores.mean | {name: scores.pooled[name] for name in POOLED}


def score_intervals(scores) -> dict[str, tuple[float, float]]:
    """95 % intervals of bench_headline(); none below ENOUGH images."""
    if len(scores.images) < ENOUGH:
        return {}
    found = scores.mean_interval | {name: scores.pooled_interval[name] for name in POOLED}
    return {name: ends for name, ends in found.items() if not math.isnan(ends[0])}


def score_columns(scores) -> dict[str, Any]:
    """Every score, each with its interval behind it."""
    ends = score_intervals(scores)
    columns: dict[str, Any] = {}
    for name, value in bench_headline(scores).items():
        low, high = ends.get(name, (None, None))
        columns |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return columns


def bench_differences(dataset: LabelledSet, first: Result, other: Result) -> list[dict]:
    """Other minus first on the images of both: mean and interval, or image by image if few."""
    theirs, ours = (dict(zip(result.names, result.scores.images)) for result in (first, other))
    both = [name for name in theirs if name in ours]
    rows = []
    for score in COMPARED:
        change = np.array([ours[name][score] - theirs[name][score] for name in both], float)
        defined = change[~np.isnan(change)]
        row = {"set": dataset.name, "model": other.model, "against": first.model, "score": score}
        low, high = metrics.bootstrap_scores(defined) if len(defined) >= ENOUGH else (None, None)
        mean = float(defined.mean()) if len(defined) else None
        rows.append({**row, "image": "mean", "n": len(defined), "difference": mean, "low": low,
                     "high": high})
        if len(defined) < ENOUGH:
            rows += [{**row, "image": name, "n": 1, "difference": float(value)}
                     for name, value in zip(both, change)]
    return rows


def bench_group_rows(dataset: LabelledSet, results: Iterable[Result]) -> list[dict]:
    """Scores of each group of images; images without a group stand under '-'."""
    rows, groups = [], dataset.groups
    names = {groups.get(bench_image_name(example.name), "-") for example in dataset.examples}
    for group, result in product(sorted(names) if groups else (), results):
        tables = [[table for name, table in zip(seed.names, seed.tables)
                   if groups.get(name, "-") == group] for seed in result.runs]
        if tables[0]:
            rows.append({"set": dataset.name, "group": group, "model": result.model,
                         "n": len(tables[0]), **score_columns(metrics.run_scores(tables))})
    return rows


def model_rows(dataset: LabelledSet, rows: Sequence[TableRow],
               results: dict[str, Result]) -> list[dict]:
    """Models on a set, seeds below their mean."""
    lines: list[dict] = []
    for row in rows:
        result, first = results.get(row.name), {"set": dataset.name, "model": row.name}
        if result is None:
            lines.append({**first, "note": row.note, "n": "not run"})
            continue
        for number, seed in enumerate((result, *result.seeds)):
            lines.append({**first, "seed": seed.model if number else None,
                          "note": bench_row_notes(row, seed), "trained_on": row.images or None,
                          "n": len(seed.names), "missing": len(seed.missing),
                          "seconds": seed.seconds, **score_columns(seed.scores)})
    return lines


# ----------------------------------------------------------------------- ceiling, sweep of settings

def bench_encoding_rows(dataset: LabelledSet, grid: Encoding, folder: Path) -> list[dict]:
    """Scores of true labels after distance map and watershed: a row per setting, best DSB first."""
    settings = bench_threshold_grid(grid, "cap")

    def measure() -> list[dict]:
        tables: list[list] = [[] for _ in settings]
        for example in bench_progress(dataset.examples, f"{CEILING} of {dataset.name}"):
            truth = example.labels()
            maps = {cap: watershed.distance_map(truth, cap) for cap in grid.cap}
            for found, chosen in zip(tables, settings):
                labels = watershed.flood(maps[chosen["cap"]], setting_of(chosen))
                found.append(metrics.overlap(truth, labels))
        rows = [{**chosen, "n": len(found), **score_columns(metrics.set_scores(found))}
                for chosen, found in zip(settings, tables)]
        return runs.without_nan(sorted(rows, key=lambda row: -row["DSB"]))

    key = dict(settings=settings,
               truths=[runs.digest(example.labels()) for example in dataset.examples])
    rows = cached_bench_map(folder / CEILING / dataset.name / "encodings.json", key, measure)
    return [{"set": dataset.name, **row} for row in rows]   # the content counts, not the name


def ceiling_row(dataset: LabelledSet, grid: Encoding, folder: Path, **first: str) -> list[dict]:
    """Best row of the encoding, to stand before the rows of a set; none without cap."""
    rows = bench_encoding_rows(dataset, grid, folder)[:1] if grid.cap else []
    return [{**best, **first} for best in rows]


def sweep_image(item: Item, dataset: LabelledSet, network: NetworkLabels,
                settings: Sequence[dict]) -> list[dict]:
    """Scores of an image with each setting; the network runs once per tile, overlap and scale."""
    maps: dict[tuple, Any] = {}             # (h, w) of each view
    rows: list[dict] = []
    for setting in settings:
        wanted = dict(setting)
        with naming_bench_item(item, dataset):
            if not rows:
                seen = segment.plan_for(item.pixels, network.net, diameter=dataset.config.diameter)
            plan = segment.plan_for(item.pixels, network.net, zoom=seen.zoom * wanted.pop("scale"),
                                    limits=seen.limits, batch=network.batch, **wanted)
            view = plan.zoom, plan.tile, plan.overlap
            if view not in maps:
                maps[view], _ = segment.network_map(item.pixels, plan._replace(embed=False))
        labels, _ = segment.cells_in_map(maps[view], plan, item.truth.shape)
        scores = metrics.scores(item.truth, labels)
        rows.append({name: scores[name] for name in COMPARED})
    return rows


def measured_best_setting(rows: Sequence[dict], settings: Sequence[dict], score: str) -> dict:
    """Setting with the highest score, a mean over the sets in rows; of equal ones the first."""
    def mean(setting: dict) -> float:
        value = chart_mean(row[score] for row in rows if setting.items() <= row.items())
        return -math.inf if math.isnan(value) else value
    return max(settings, key=mean)


# ------------------------------------------------------------------------------------------- gating

class Prediction(NamedTuple):
    name: str
    table: Any                              # metrics.Overlap: R true cells, S predicted ones
    marker: np.ndarray                      # (S,) mean intensity
    cut: np.ndarray                         # (S,) bool, by the edge of the image
    cut_true: np.ndarray                    # (R,) bool


def read_prediction(item: Item, folder: Path) -> Prediction:
    path = folder / f"{item.name}_pred.tif"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such prediction; run evaluate.py bench on this set, "
                                "and give predictions=runs/EXPERIMENT/MODEL")
    labels = of_same_size(data.read_labels(path), item, path)
    table = metrics.overlap(item.truth, labels)
    marker = scipy.ndimage.mean(item.pixels[0], labels, table.pred_ids)
    return Prediction(item.name, table, marker,
                      np.isin(table.pred_ids, bench_cells_at_edge(labels)),
                      np.isin(table.truth_ids, bench_cells_at_edge(item.truth)))


def bench_cells_at_edge(labels: np.ndarray) -> np.ndarray:
    """Ids of cells that the edge of the image cuts."""
    return np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))


def gated_scores(predictions: Sequence[Prediction], min_area: int, window: tuple[float, ...],
                 border: str) -> tuple[Result, int]:
    """Scores without small cells, cells outside the window of marker intensity, or cut cells.

    Returns also the number of cells removed.
    window : percentiles of the marker in all cells of the set.
    border : keep, drop predicted cells at the edge, or both predicted and true ones.
    """
    pooled, tables, removed = np.concatenate([image.marker for image in predictions]), [], 0
    low, high = np.percentile(pooled, window) if len(pooled) else (0, 0)
    for _, table, marker, cut, cut_true in predictions:
        keep = (table.pred_areas >= min_area) & (marker >= low) & (marker <= high)
        keep &= (border == "keep") | ~cut
        removed += int(np.count_nonzero(~keep))
        tables.append(bench_labels_without(table, keep, (border != "both") | ~cut_true))
    names = [image.name for image in predictions]
    return Result("gated", "", Path(), names, tables, metrics.set_scores(tables), [], None), removed


def bench_labels_without(table, keep: np.ndarray, keep_true: np.ndarray):
    """Table of overlaps without some cells: keep (S,), keep_true (R,)."""
    pairs = keep_true[table.rows] & keep[table.cols]
    return metrics.Overlap(
        table.truth_ids[keep_true], table.pred_ids[keep],
        table.truth_areas[keep_true], table.pred_areas[keep],
        (np.cumsum(keep_true) - 1)[table.rows[pairs]], (np.cumsum(keep) - 1)[table.cols[pairs]],
        table.counts[pairs])


# ---------------------------------------------------------------------------------- bench as a page

BenchResults = dict[str, dict[str, Result]]      # set -> row -> result


def bench_page(title: str, sets: Sequence[LabelledSet], rows: Sequence[TableRow],
               results: BenchResults, models: int, made: str) -> str:
    """An overview, then for each set a table, charts, and pictures of the first `models` models."""
    styles = report.page_styles([row.name for row in rows], CEILING)
    lines: list[list[report.Cell | str]] = [
        [report.Cell(dataset.name, dataset.note), str(len(dataset.examples)),
         *(bench_score_cell(results[dataset.name].get(row.name), "AP@0.5") for row in rows)]
        for dataset in sets]
    overview = report.html_table(["set", "images", *(row.name for row in rows)], lines)
    sections = [report.report_section("AP@0.5", "Mean over the images of each set.", overview)]
    if any(row.curve for row in rows):
        sections.append(measured_efficiency(sets, rows, results))
    for dataset in sets:
        there = results[dataset.name]
        measured = [result for name, result in there.items() if name != CEILING]
        strips = [report.picture_strip(text, [report.picture(*panel) for panel in panels])
                  for text, panels in bench_example_strips(dataset, measured[:models])]
        sections.append(report.report_section(
            dataset.name, dataset.note, bench_score_table(rows, there),
            bench_score_charts(there, styles), *strips))
    note = ("AP, PQ and AJI (AJI+) are means over images; F1, SEG, DET and OP_CSB count the cells "
            "of all images together. Small: 95 % bootstrap intervals over images, from "
            f"{ENOUGH} images on. Bold: the best model. The ceiling is the score of true labels "
            "that went through distance map and watershed.")
    return report.page(title, note, sections, made)


def bench_score_cell(result: Result | None, name: str, best: float | None = None) -> report.Cell:
    """A score with its interval, bold where it is the best."""
    if result is None:
        return report.Cell("-")
    value, ends = bench_headline(result.scores)[name], score_intervals(result.scores).get(name, ())
    return report.Cell(shown_value(value), "–".join(shown_value(end) for end in ends),
                       value == best)


def bench_score_table(rows: Sequence[TableRow], there: dict[str, Result]) -> str:
    models = [bench_headline(result.scores) for name, result in there.items() if name != CEILING]
    best = {name: max((model[name] for model in models), default=None) for name in PAGE_SCORES}
    lines: list[list[report.Cell | str]] = []
    for row in rows:
        result = there.get(row.name)
        lines.append([*bench_row_cells(row, result, PAGE_SCORES,
                                       {} if row.name == CEILING else best),
                      shown_value(result and result.seconds, 1)])
    return report.html_table(["model", "images", *PAGE_SCORES, "seconds"], lines)


def bench_row_notes(row: TableRow, result: Result | None) -> str:
    return "; ".join(filter(None, (row.note, result.note if result else "")))


def bench_row_cells(row: TableRow, result: Result | None, scores: Sequence[str],
                    best: dict[str, float | None]) -> list[report.Cell]:
    """A model on a set: name and note, images, scores."""
    return [report.Cell(row.name, bench_row_notes(row, result)),
            report.Cell(str(len(result.names)) if result else "not run"),
            *(bench_score_cell(result, score, best.get(score)) for score in scores)]


def measured_efficiency(sets: Sequence[LabelledSet], rows: Sequence[TableRow],
                        results: BenchResults) -> str:
    """AP@0.5 over the number of training images, a dot for each seed."""
    charts, rows = {}, [row for row in rows if row.images]
    styles = report.page_styles(dict.fromkeys(row.curve or row.name for row in rows))
    for dataset in sets:
        points: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for row in rows:
            if result := results[dataset.name].get(row.name):
                points[row.curve or row.name] += [(row.images, seed.scores.mean["AP@0.5"])
                                                  for seed in result.runs]
        charts[dataset.name] = report.dot_chart(points, styles, "training images", "AP@0.5",
                                                log=True, means=True)
    return report.report_section(
        "AP@0.5 over training images", "A dot for each seed, a line through their means.",
        report.legend(styles), report.side_by_side(charts))


def bench_score_charts(there: dict[str, Result], styles: dict[str, report.Style]) -> str:
    curves = {model: [(t, result.scores.mean[f"AP@{t:g}"]) for t in metrics.THRESHOLDS]
              for model, result in there.items()}
    return report.legend({name: styles[name] for name in there}) + report.side_by_side({
        "AP over the threshold": report.line_chart(curves, styles, "IoU threshold", "mean AP"),
        "Cells found over their size": report.line_chart(
            bench_scores_by_size(there), styles, "equivalent diameter (px)",
            "share found at IoU 0.5", log=True)})


def bench_scores_by_size(there: dict[str, Result]) -> dict[str, list[tuple[float, float]]]:
    """Share of true cells found at IoU 0.5, in up to eight classes of size with equal counts."""
    tables = {model: [table for run in result.runs for table in run.tables]
              for model, result in there.items()}
    sizes = {model: np.concatenate([2 * np.sqrt(table.truth_areas / np.pi) for table in each])
             for model, each in tables.items()}                          # px
    every = max(sizes.values(), key=len, default=np.empty(0))
    if not len(every):
        return {}
    classes = min(8, max(1, len(every) // 10))
    edges = np.unique(np.quantile(every, np.linspace(0, 1, 1 + classes)))
    curves = {}
    for model, each in tables.items():
        hit = np.concatenate([np.isin(t.truth_ids, metrics.match(t).pairs[:, 0]) for t in each])
        size = np.searchsorted(edges[1:-1], sizes[model], side="right")
        curves[model] = [(float(np.median(sizes[model][size == k])), float(hit[size == k].mean()))
                         for k in np.unique(size)]
    return curves


# ----------------------------------------------------------------------------- pictures on the page

SIDE = 512                                           # px, of a picture
RIGHT, WRONG = (0, 160, 255), (255, 130, 0)          # colours of outlines


def bench_example_strips(dataset: LabelledSet,
                         results: Sequence[Result]) -> Iterator[tuple[str, list]]:
    """Title and panels (truth, predictions) of the first model's best, median and worst image."""
    if not results:
        return
    results = [result.runs[0] for result in results]
    first = results[0]
    order = sorted(range(len(first.names)), key=lambda i: -first.scores.images[i]["DSB"])
    picks = {order[0]: "best", order[len(order) // 2]: "median", order[-1]: "worst"}
    for i, which in picks.items():
        name = first.names[i]
        example = next(e for e in dataset.examples if bench_image_name(e.name) == name)
        pixels, truth = example.image().pixels, example.labels()
        square = bench_crowded_square(truth)
        found = metrics.match(first.tables[i])
        panels = [(bench_outlined_square(pixels, truth, found.pairs[:, 0], square),
                   f"true cells: {found.tp + found.fn}; orange: missed by {first.model}")]
        for result in results:
            if name in result.names:
                at = result.names.index(name)
                labels = data.read_labels(result.folder / f"{name}_pred.tif")
                found = metrics.match(result.tables[at])
                panels.append((bench_outlined_square(pixels, labels, found.pairs[:, 1], square),
                               f"{result.model}: AP@0.5 {found.rates.average_precision:.2f}; "
                               f"{found.tp} found, {found.fp} false (orange), {found.fn} missed"))
        (H, W), side = truth.shape, square.px
        part = f", {min(side, H)} × {min(side, W)} of {H} × {W} px" if side < max(H, W) else ""
        yield f"{which} of {first.model}: {name}{part}", panels


class Square(NamedTuple):
    """Part of an image, to be shown."""
    top: int
    left: int
    px: int                                 # its side
    step: int                               # its sides are divided by this
    thick: int                              # px, of outlines then


def bench_crowded_square(truth: np.ndarray) -> Square:
    """The square with most cells: reduced while cells keep 14 px, then cut to SIDE px."""
    diameter = data.median_diameter(truth) or SIDE
    step = max(1, min(-(-max(truth.shape) // SIDE), int(diameter / 14)))
    px = SIDE * step
    tops, lefts = ([*range(0, max(1, n - px), px // 4), max(0, n - px)] for n in truth.shape)

    def content(at: tuple[int, int]) -> int:
        return int(np.count_nonzero(truth[at[0]:at[0] + px, at[1]:at[1] + px]))

    zoom = max(1, SIDE // max(truth.shape))
    thick = 1 if diameter * zoom / step < 24 else 2
    return Square(*max(product(tops, lefts), key=content), px, step, thick)


def bench_outlined_square(pixels: np.ndarray, labels: np.ndarray, right: np.ndarray, square: Square
                          ) -> np.ndarray:
    """A square of the image, (h, w, 3): cells in `right` outlined in blue, others in orange."""
    from PIL import Image
    top, left, px, step, thick = square
    rgb = cells.overlay_background(pixels)[top:top + px, left:left + px]
    inside = labels[top:top + px, left:left + px]
    ids, numbers = np.unique(np.append(0, inside), return_inverse=True)
    numbers = numbers[1:].reshape(rgb.shape[:2]).astype(np.int32)            # 0..n without gaps
    small, numbers = cells.reduced_overlay(np.moveaxis(rgb, 2, 0), numbers, step)
    rgb, (h, w) = np.ascontiguousarray(np.moveaxis(small, 0, 2)), numbers.shape
    if (zoom := SIDE // max(h, w)) > 1:
        size = zoom * w, zoom * h
        rgb = np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.BICUBIC))
        numbers = cells.enlarged_outlines(numbers, zoom)
    colours = np.where(np.isin(ids[1:], right)[:, None], RIGHT, WRONG).astype(np.uint8)
    return cells.draw_outlines(rgb, numbers, colours, thick)


# -------------------------------------------------------------------------------- bench as Markdown

def marked(name: str, note: str, notes: dict[str, int]) -> str:
    """A name, with the number of its note among the notes of a text."""
    return f"{name} ({notes.setdefault(note, len(notes) + 1)})" if note else name


def bench_footnotes(notes: dict[str, int], printed: int = 0) -> str:
    """A line under a table: all notes but for the first so many, which stand under one before."""
    new = " ".join(f"({i}) {note}." for note, i in notes.items() if i > printed)
    return f"\n{new}\n" if new else ""


def bench_markdown(sets: Sequence[LabelledSet], rows: Sequence[TableRow], results: BenchResults,
                   columns: Sequence[str], made: str, compared: Sequence[dict]) -> tuple[str, str]:
    """One short table of all sets; and that with all columns of every model behind it.

    compared : rows of bench_differences(), for a table between them.
    """
    ran = [row.name for row in rows if any(row.name in there for there in results.values())]
    lines, notes = [], dict[str, int]()
    for dataset in sets:
        there = [results[dataset.name].get(name) for name in ran]
        n = max((len(result.names) for result in there if result), default=0)
        lines.append((marked(dataset.name, dataset.note, notes), str(n), *(
            " / ".join(shown_value(result.scores.mean[name]) for name in BRIEF)
            if result else "not run" for result in there)))
    brief = (f"{' / '.join(BRIEF).replace('/ AP@', '/ ')}, mean over the images of each set.\n\n"
             + report.markdown(("set", "images", *ran), lines) + bench_footnotes(notes))
    printed = len(notes)
    if missing := [row.name for row in rows if row.name not in ran]:
        brief += f"\nNot run: {', '.join(missing)}.\n"
    lines = []
    for dataset, row in product(sets, rows):
        name, *found = bench_row_cells(row, results[dataset.name].get(row.name), columns, {})
        lines.append((dataset.name, marked(name.text, name.small, notes),
                      *(f"{cell.text} [{cell.small}]" if cell.small else cell.text
                        for cell in found)))
    whole = report.markdown(("set", "model", "images", *columns), lines, words=2)
    return brief, "\n".join([made + "\n", brief,
                             *([bench_difference_table(compared)] if compared else []),
                             whole + bench_footnotes(notes, printed)])


def bench_difference_table(compared: Sequence[dict]) -> str:
    """A row for each set and model, a column for each model that it was compared with."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for row in compared:
        if ((row["score"], row["image"]) == (BRIEF[0], "mean") and row["model"] != CEILING
                and row["difference"] is not None):
            ends = f" [{row['low']:+.3f} to {row['high']:+.3f}]" if row["low"] is not None else ""
            line = found.setdefault((row["set"], row["model"]), {})
            line[row["against"]] = f"{row['difference']:+.3f}{ends}"
    firsts = list(dict.fromkeys(name for there in found.values() for name in there))
    lines = [(*key, *(there.get(first, "-") for first in firsts)) for key, there in found.items()]
    columns = ("set", "model", *(f"against {first}" for first in firsts))
    return (f"Difference in {BRIEF[0]}, image by image.\n\n"
            + report.markdown(columns, lines, words=2))
