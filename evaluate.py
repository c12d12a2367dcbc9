"""Measure models and what limits them: python evaluate.py VERB CONFIG.yaml [key=value ...]

    bench      models, and label images of any other program, on labelled sets: scores, a page
    gating     post-processing of saved predictions: smallest area, window of marker, cut cells
    sweep      thresholds of the watershed, tile, overlap, scale: chosen on validation sets
    ceiling    what the encoding can reach: true labels -> distance map -> watershed -> scores
    calibrate  how likely a cell is right: fitted on validation images, written into weights
    channels   does a backbone see the same field in each channel? features and attention maps
    embed      what a vector per cell is worth: types of cells, the same field in other channels

`python evaluate.py VERB --help` lists the keys of each. All files go to runs/<experiment>/:

    bench      MODEL/SET/NAME_pred.tif, MODEL/SET/metrics.json;
               metrics_all_models.tsv, groups.tsv, delta.tsv, table.md, report.html
    gating     gating.tsv: each set raw, then with every setting
    sweep      sweep.tsv (validation); selected.tsv, delta.tsv and CHOICE/SET/ as in bench (test)
    ceiling    ceiling.tsv, best first
    calibrate  only out=, a copy of the weights; without it nothing is fitted
    channels   channels.json, cosine.tsv, retrieval.tsv, attention.tsv, channels.png,
               attention.png, heads.png, pca.png
    embed      embed.tsv, fields.tsv; with export= weights that tell types

The same command goes on where it was stopped, and makes anew what has changed: content of weights
or images, options. Every table begins with the best ceiling, the limit of any network. Scores of a
set are means over its images; SEG, DET, OP_CSB, F1 and counts are of the cells of all images.
Differences are paired, image by image. Intervals are 95 % bootstraps over images, from ten on.
`weights` with a * is the mean of the files that fit (seeds); files trained on different numbers of
images become rows, and a curve on the page.
"""
from __future__ import annotations

import os
import platform
import re
import shlex
import sys
import typing
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import data
import measure
import probe
import report
import runs
from measure import CEILING, COMPARED, DataSet, Encoding, LabelledSet, Model, TableRow

with runs.lazy():
    import numpy as np
    import torch

    import cells
    import metrics
    import model as networks
    import segment
    import vectors
    import watershed


# ------------------------------------------------------------------------------------------- bench

@dataclass(frozen=True)
class Bench:
    models: tuple[Model, ...]               # to measure, in this order
    sets: tuple[DataSet, ...]               # labelled images
    experiment: runs.Name = "evaluate"      # name of the run
    output_base_dir: str = "."              # where runs/ is made
    root: str = "."                         # folder that the sets are in
    against: tuple[str, ...] = ()           # rows that others are compared with; empty: the first
    ceiling: Encoding = field(default_factory=Encoding)  # settings whose best stands first
    pictures: int = 3                       # models shown on the page, from the first on
    # in table.md
    columns: tuple[measure.Score, ...] = ("AP@0.5", "AP@0.75", "F1", "SEG", "DET", "OP_CSB")
    markdown: str | None = None             # document for table.md, between two lines of comment
    summary: str | None = None              # document for its first table alone
    batch: runs.Batch | None = None         # tiles at once; null: 6 on the CPU, 32 on a GPU
    device: runs.Device = "auto"            # auto: the GPU if there is one
    overwrite: bool = False                 # make every prediction anew

    def __post_init__(self):
        measure.check_bench_names("model", self.models)
        measure.check_bench_names("set", self.sets)


def bench(config: Bench) -> None:
    """Measure models, and label images of any other program, on labelled sets."""
    sets = [LabelledSet(dataset, config.root) for dataset in config.sets]
    documents = [(Path(path), f"bench {config.experiment}{part}") for path, part in
                 ((config.markdown, ""), (config.summary, " in short")) if path]
    for path, name in documents:
        report.text_between(path, name)
    rows = [row for model in config.models              # all files are found before one is run
            for row in measure.rows_of(model, sets, config.device, config.batch)]
    measure.check_bench_names("row", rows)
    if unknown := set(config.against) - {row.name for row in rows}:
        raise ValueError(f"against: '{min(unknown)}', expected some of "
                         f"{runs.listed([row.name for row in rows], 12)}")
    folder = runs.run_folder(config)
    if config.ceiling.cap:
        best = {dataset.name: (measure.EncodedLabels(measure.bench_encoding_rows(
            dataset, config.ceiling, folder)[0]),) for dataset in sets}
        rows.insert(0, TableRow(CEILING, "of the encoding", best))
    results: measure.BenchResults = {dataset.name: {} for dataset in sets}
    for row in rows:
        for dataset in sets:
            if dataset.name in row.sources:
                results[dataset.name][row.name] = measure.measure_row(row, dataset, folder,
                                                                      config.overwrite)
        row.sources.clear()                             # so that one network is in memory
    compared = compare_rows(config, sets, rows, results)
    table = [line for dataset in sets
             for line in measure.model_rows(dataset, rows, results[dataset.name])]
    groups = [line for dataset in sets
              for line in measure.bench_group_rows(dataset, results[dataset.name].values())]
    for name, lines in (("metrics_all_models", table), ("delta", compared), ("groups", groups)):
        runs.write_table(folder / f"{name}.tsv", lines)
    brief, full = measure.bench_markdown(sets, rows, results, config.columns, made_by(config),
                                         compared if config.against else [])
    runs.write_text(folder / "table.md", full)
    for path, name in documents:
        report.put_report_between(path, name, brief if name.endswith(" in short") else full)
    runs.write_text(folder / "report.html", measure.bench_page(
        config.experiment, sets, rows, results, config.pictures, made_by(config)))
    report.print_report_table([line for line in table if not line.get("seed")],
                              ("set", "model", "n", *config.columns))
    print(f"-> {folder / 'report.html'}, {folder / 'table.md'}")


def compare_rows(config: Bench, sets: list[LabelledSet], rows: list[TableRow],
                 results: measure.BenchResults) -> list[dict]:
    """Differences of every row from those in `against`, or from the first model that ran."""
    for name in set(config.against).difference(*results.values()):
        print(f"against: {name} was not run; nothing is compared with it", file=sys.stderr)
    compared = []
    for dataset in sets:
        there = results[dataset.name]
        first = [row.name for row in rows if row.name in there and row.name != CEILING][:1]
        for name, other in product(config.against or first, there):
            if name in there and other != name:
                compared += measure.bench_differences(dataset, there[name], there[other])
    return compared


def made_by(config: Bench) -> str:
    """Command, machine and versions."""
    about = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    cpu = re.search(r"model name\s*: (.*)", about)
    machine = f"{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores"
    if config.device != "cpu" and torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    return (f"`{command}` on {machine}; Python {platform.python_version()}, PyTorch "
            f"{torch.__version__}; intervals: 95 %, 1000 resamples of the images")


# ------------------------------------------------------------------------------------------ gating

@dataclass(frozen=True)
class Gating:
    predictions: str                        # folder of a model in a bench run: runs/evaluate/MODEL
    sets: tuple[DataSet, ...]               # as in bench
    experiment: runs.Name = "gating"        # name of the run
    output_base_dir: str = "."              # where runs/ is made
    root: str = "."                         # folder that the sets are in
    min_area: tuple[runs.Area, ...] = (0, 20, 50, 100)  # px, smaller cells are dropped
    windows: tuple[tuple[float, ...], ...] = ((0, 100), (2, 98), (5, 95))  # percentiles to keep
    marker: str = "1"                       # channel of the file, whose mean over a cell counts
    border: tuple[Literal["keep", "drop", "both"], ...] = ("keep", "drop", "both")  # both: true too
    ceiling: Encoding = field(default_factory=Encoding)  # as in bench

    def __post_init__(self):
        measure.check_bench_names("set", self.sets)
        for window in self.windows:
            if len(window) != 2 or not 0 <= window[0] < window[1] <= 100:
                raise ValueError(f"windows: {list(window)}, expected two percentiles such as "
                                 "[2, 98]")
        if not (self.min_area and self.windows and self.border):
            raise ValueError("min_area, windows and border need one value or more each")


def gating(config: Gating) -> None:
    """Post-processing of saved predictions: every setting against the raw result."""
    sets = [LabelledSet(replace(dataset, channels=(config.marker,)), config.root)
            for dataset in config.sets]
    predictions = {dataset.name: [
        measure.read_prediction(item, Path(config.predictions) / dataset.name)
        for item in dataset.items("gating")] for dataset in sets}
    folder, rows = runs.run_folder(config), []
    for dataset in sets:
        images = predictions[dataset.name]
        rows += measure.ceiling_row(dataset, config.ceiling, folder, what=CEILING)
        for what, min_area, window, border in (("raw", 0, (0, 100), "keep"), *product(
                ("gated",), config.min_area, config.windows, config.border)):
            result, removed = measure.gated_scores(images, min_area, window, border)
            rows.append({"set": dataset.name, "what": what, "n": len(images),
                         "min_area": min_area, "window": "q{:g}-{:g}".format(*window),
                         "border": border, "removed": removed,
                         **measure.score_columns(result.scores)})
            if what == "raw":
                raw = result
                continue
            rows[-1] |= {f"{line['score']}_change{end}": line[value]
                         for line in measure.bench_differences(dataset, raw, result)
                         if line["image"] == "mean" for end, value in
                         (("", "difference"), ("_low", "low"), ("_high", "high"))}
    first = ("set", "what", "n", "min_area", "window", "border", "removed")
    runs.write_table(folder / "gating.tsv", rows, first)
    report.print_report_table(rows, (*first, "AP@0.5", "AP@0.5_change", "SEG"))
    print(f"-> {folder / 'gating.tsv'}")


# ------------------------------------------------------------------------------------------- sweep

@dataclass(frozen=True)
class Sweep:
    weights: str                            # file of this project
    validation: tuple[DataSet, ...]         # settings are chosen on these
    test: tuple[DataSet, ...]               # and reported on these, set by set
    experiment: runs.Name = "sweep"         # name of the run
    output_base_dir: str = "."              # where runs/ is made
    root: str = "."                         # folder that the sets are in
    peak: tuple[runs.Distance | None, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # null: as in weights
    fill: tuple[runs.Distance | None, ...] = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4)  # null: the same
    depth: tuple[runs.NotNegative | None, ...] = (None,)  # the same
    smooth: tuple[runs.NotNegative | None, ...] = (None,)  # the same, px of the network
    shape: tuple[runs.NotNegative | None, ...] = (None,)  # the same, per px of the network
    min_area: tuple[runs.Area | None, ...] = (None,)  # the same, px
    tile: tuple[runs.Side | None, ...] = (None,)  # px; null: as trained
    overlap: tuple[runs.Whole | None, ...] = (None,)  # px; null: a cell's diameter
    scale: tuple[runs.Positive, ...] = (1.0,)  # factor on the zoom by the diameter, given or seen
    score: measure.Score = "DSB"            # what best means, mean over images
    ceiling: Encoding = field(default_factory=Encoding)  # as in bench
    batch: runs.Batch | None = None         # tiles at once; null: 6 on the CPU, 32 on a GPU
    device: runs.Device = "auto"            # auto: the GPU if there is one

    def __post_init__(self):
        measure.check_bench_names("validation set", self.validation)
        measure.check_bench_names("test set", self.test)
        self.settings()

    def settings(self, stored: watershed.Setting | None = None) -> list[dict]:
        return measure.bench_threshold_grid(self, "tile", "overlap", "scale", stored=stored)


def sweep(config: Sweep) -> None:
    """Choose settings on validation sets, report on test sets.

    The network runs once for each tile, overlap and scale.
    """
    validation, test = ([LabelledSet(dataset, config.root) for dataset in sets]
                        for sets in (config.validation, config.test))
    check_apart(validation, test)
    network = measure.NetworkLabels(config.weights, config.device, config.batch)
    settings = config.settings(network.net.settings.setting)
    folder = runs.run_folder(config)
    rows, table = [], []
    for dataset in validation:
        found = sweep_rows(dataset, network, settings, folder / "validation" / dataset.name)
        table += measure.ceiling_row(dataset, config.ceiling, folder / "validation",
                                     choice=CEILING) + found
        rows += found
    first = ("set", "choice", "n", "cap", *settings[0])
    runs.write_table(folder / "sweep.tsv", [{name: row.get(name) for name in (*first, *COMPARED)}
                                            for row in table])
    shared, selected, compared = measure.measured_best_setting(rows, settings, config.score), [], []
    for dataset in test:
        choices = {"shared": shared, "weights": {}}
        if its := [row for row in rows if row["set"] == dataset.name]:
            choices["own"] = measure.measured_best_setting(its, settings, config.score)
        selected += measure.ceiling_row(dataset, config.ceiling, folder / "test", choice=CEILING)
        results = {}
        for choice, setting in choices.items():
            source = network.with_options(**setting)
            result = measure.measure_model(choice, dataset, source, folder / choice / dataset.name)
            results[choice] = result
            selected.append({"set": dataset.name, "choice": choice, "n": len(result.names),
                             **source.options, "seconds": result.seconds,
                             **measure.score_columns(result.scores)})
            if choice != "shared":
                compared += measure.bench_differences(dataset, results["shared"], result)
    runs.write_table(folder / "selected.tsv", selected, first)
    runs.write_table(folder / "delta.tsv", compared)
    report.print_report_table(selected, dict.fromkeys((*first, config.score, "AP@0.5", "SEG")))
    print(f"-> {folder / 'selected.tsv'}; by {config.score} on validation: shared by all sets, or "
          "a set's own; weights: as they are stored")


def sweep_rows(dataset: LabelledSet, network: measure.NetworkLabels, settings: list[dict],
               folder: Path) -> list[dict]:
    """Mean scores of a set with each setting, of images that are done from their files."""
    images = []
    for item in dataset.items("sweep"):
        key = dict(weights=network.digest, image=item.digest, truth=runs.digest(item.truth),
                   settings=settings, diameter=dataset.config.diameter)
        images.append(measure.cached_bench_map(folder / f"{item.name}.json", key, partial(
            measure.sweep_image, item, dataset, network, settings)))
    return [{"set": dataset.name, "choice": "-", "n": len(images), **setting,
             **{name: report.chart_mean(image[k][name] for image in images)
                for name in COMPARED}} for k, setting in enumerate(settings)]


def check_apart(validation: list[LabelledSet], test: list[LabelledSet]) -> None:
    """Refuse an image that is on both sides, whatever its name."""
    def contents(example) -> list[str]:
        return data.contents(example.image().pixels, example.labels())

    seen = {content: f"{dataset.name}/{example.name}" for dataset in validation
            for example in dataset.examples for content in contents(example)}
    for dataset in test:
        for example in dataset.examples:
            if twins := [seen[content] for content in contents(example) if content in seen]:
                raise ValueError(f"test image {dataset.name}/{example.name} ({dataset.config.path})"
                                 f" is in validation too, as {twins[0]}; give another")


# ----------------------------------------------------------------------------------------- ceiling

@dataclass(frozen=True, kw_only=True)
class Ceiling(Encoding):
    sets: tuple[DataSet, ...]               # as in bench; only their labels count
    experiment: runs.Name = "ceiling"       # name of the run
    output_base_dir: str = "."              # where runs/ is made
    root: str = "."                         # folder that the sets are in

    def __post_init__(self):
        super().__post_init__()
        measure.check_bench_names("set", self.sets)
        if not self.cap:
            raise ValueError("cap needs one value or more; null is one: no cap")


def ceiling(config: Ceiling) -> None:
    """What the encoding can reach: true labels -> distance map -> watershed -> scores."""
    sets = [LabelledSet(dataset, config.root) for dataset in config.sets]
    folder = runs.run_folder(config)
    tables = [measure.bench_encoding_rows(dataset, config, folder) for dataset in sets]
    runs.write_table(folder / "ceiling.tsv", [row for table in tables for row in table])
    report.print_report_table([table[0] for table in tables],
                              ("set", "n", "cap", "peak", "fill", "DSB", *measure.PAGE_SCORES))
    print(f"-> {folder / 'ceiling.tsv'}; here the best of each set by DSB")


# --------------------------------------------------------------------------------------- calibrate

@dataclass(frozen=True)
class Calibrate:
    weights: str                            # file of this project
    out: str | None = None    # copy of it, with the score calibrated; null: report the one it has
    validation: tuple[DataSet, ...] = ()    # fitted on these; empty: what was held out in training
    home: tuple[DataSet, ...] = ()          # reported on: images like those trained on
    abroad: tuple[DataSet, ...] = ()        # reported on: unlike them
    root: str = "."                         # folder that the sets are in
    device: runs.Device = "auto"            # auto: the GPU if there is one

    def __post_init__(self):
        if sets := (*self.home, *self.abroad):
            measure.check_bench_names("set", sets)
        elif self.out is None:
            raise ValueError("no home or abroad, and no out; give sets to report on or a file to "
                             "write")


def calibrate(config: Calibrate) -> None:
    """Fit the score of a cell, the probability that it has IoU >= .5 with a true cell, and write it
    into a copy of the weights; or report on the one that they have."""
    net = networks.load(config.weights).ready(runs.pick_device(config.device))
    if config.out is not None:
        runs.check_file_can_be_written(Path(config.out))
    elif not net.settings.score:
        raise ValueError(f"{config.weights}: has no score to report on; out=FILE fits one")
    tested = {place: [LabelledSet(dataset, config.root) for dataset in sets]
              for place, sets in (("home", config.home), ("abroad", config.abroad))}
    score = net.settings.score
    if config.out:
        fitted = ([LabelledSet(dataset, config.root) for dataset in config.validation]
                  or measure.bench_held_out_sets(net, config.root))
        check_apart(fitted, [dataset for sets in tested.values() for dataset in sets])
        score = measure.fit_cell_score([measure.bench_judged_cells(dataset, net)
                                        for dataset in fitted])
        networks.change_weights_settings(config.weights, config.out, score=score)
    rows = []
    for place, sets in tested.items():
        found = {dataset.name: measure.bench_judged_cells(dataset, net) for dataset in sets}
        rows += [score_row(place, name, [judged], score) for name, judged in found.items()]
        if len(found) > 1:
            rows.append(score_row(place, "all", list(found.values()), score))
    report.print_report_table(rows, ("place", "set", "cells", "right", "score", "ECE", "AUROC"))
    if config.out:
        print(f"-> {config.out}; fitted on {sum(len(each.examples) for each in fitted)} images")


def score_row(place: str, name: str, found: list[measure.JudgedCells], score: dict) -> dict:
    """How well scores tell right cells from wrong ones, over all cells together."""
    right = np.concatenate([judged.right for judged in found])
    given = np.concatenate([cells.cell_probability(judged.features, score) for judged in found])
    return {"place": place, "set": name, "cells": len(right), "right": right.mean(),
            "score": given.mean(), "ECE": metrics.calibration_error(right, given),
            "AUROC": metrics.roc_area(right, given)}


# ------------------------------------------------------------------------------------------- embed

NONE = "none"               # type of what a network finds where no cell is


@dataclass(frozen=True)
class VectorSource:
    name: runs.Name                         # its folder and row
    weights: str                            # file; random; or pixels: columns of NAME_cells.csv


@dataclass(frozen=True)
class TypedSet:
    name: runs.Name                         # its file and row
    train: tuple[data.TrainingSet, ...]     # images to learn types from, within root
    test: tuple[data.TrainingSet, ...]      # images to tell types on
    types: dict                             # {type: its classes in the sets}
    reach: runs.Positive = 12.0             # px, of F_d: found and true centres of one cell


@dataclass(frozen=True)
class Embed:
    sources: tuple[VectorSource, ...]       # of vectors
    sets: tuple[TypedSet, ...] = ()         # whose types are told from them
    # folder of fields with two channels or more, to find in one channel by another; null: none
    fields: str | None = None
    channels: tuple[str, ...] | None = None  # of the fields: names or numbers; null: all
    size: runs.Count = 512                  # px, side of the square in the middle of a field
    limit: probe.AtLeastTwo = 24            # fields
    wells: str | None = None                # CSV with columns image, well: fields to find by well
    # weights that find the cells of the fields, in their last channel; `random` has their shape
    finder: str = "final_models/dinocell_tiny.pt"
    export: str | None = None    # weights that tell the types of the only set, by the only source
    experiment: runs.Name = "embed"         # name of the run
    output_base_dir: str = "."              # where runs/ is made
    root: str = "."                         # folder that the sets are in
    seed: runs.Whole = 0                    # of random weights
    device: runs.Device = "auto"            # auto: the GPU if there is one

    def __post_init__(self):
        measure.check_bench_names("source", self.sources)
        if self.sets:
            measure.check_bench_names("set", self.sets)
        for typed in self.sets:
            if NONE in data.training_types(typed.types):
                raise ValueError(f"set '{typed.name}': a type is called {NONE}, as what is found "
                                 "where no cell is; choose another name")
        if self.export and (len(self.sources), len(self.sets)) != (1, 1):
            raise ValueError(f"export={self.export}: expected one source and one set, got "
                             f"{len(self.sources)} and {len(self.sets)}")
        if self.export and self.sources[0].weights in ("pixels", "random"):
            raise ValueError(f"export={self.export}: {self.sources[0].weights} are no weights of a "
                             "network")
        if not self.sets and self.fields is None:
            raise ValueError("no sets and no fields; give one of the two or both")


def embed(config: Embed) -> None:
    """What a vector per cell is worth, beside the pixels' own statistics and random weights.

    k-NN and a linear head learn the types of the cells in `train` and tell those of the true cells
    in `test`, from vectors and outlines: accuracy, and mean F1 over the types. A network that knows
    a diameter sees all images at the median one of `train`, others as they are. F_d and F_c
    (metrics.type_scores) are those of the cells that the source itself finds, with a linear head
    that learns from those it finds in `train`, too, and knows one more type, `none`: what is found
    where no cell is. Cells that are told so count as not found; infer.py keeps them, with their
    type.

    Fields: mean vector of a field's cells in each channel; is the nearest one of another channel
    that of the same field?
    """
    if config.export is not None:
        runs.check_file_can_be_written(Path(config.export))
    folder, rows, found = runs.run_folder(config), [], []
    seen = [] if config.fields is None else embed_cells_of_fields(config)
    for source in config.sources:
        net = embed_net(source, config)
        for typed in config.sets:
            tell = partial(embed_told_types, net, typed, config)
            scores = tell() if config.export else measure.cached_bench_map(
                folder / source.name / f"{typed.name}.json", embed_key(source, typed, config), tell)
            rows.append({"set": typed.name, "source": source.name, **scores})
        if config.fields is not None:
            found.append({"source": source.name, **embed_told_fields(net, seen, config)})
    for name, table in (("embed", rows), ("fields", found)):
        if table:
            runs.write_table(folder / f"{name}.tsv", table)
            report.print_report_table(table, dict.fromkeys(name for row in table for name in row))
    print(f"-> {folder}")


def embed_key(source: VectorSource, typed: TypedSet, config: Embed) -> dict[str, Any]:
    """What the scores of a source on a set are made from."""
    files = [file for example in embed_examples((*typed.train, *typed.test), config.root)
             for file in (*example.files, *data.type_files(example.files[-1], example.files[0]))]
    weights: list[Any] = [source.weights if source.weights == "pixels" else Path(source.weights)]
    if source.weights == "random":
        weights = ["random", Path(config.finder)]                  # which gives the shape
    return {"set": asdict(typed), "files": runs.digest(*files), "weights": runs.digest(*weights),
            "seed": config.seed, "outline": vectors.OUTLINE}


def embed_net(source: VectorSource, config: Embed):
    """The network whose tokens are the vectors; None: the pixels' own statistics."""
    if source.weights == "pixels":
        return None
    device = runs.pick_device(config.device)
    if source.weights == "random":
        torch.manual_seed(config.seed)
        return networks.untrained(networks.load(config.finder), 1.0).ready(device)
    if networks.kind(source.weights) == "DINOCell":
        return networks.load(source.weights).ready(device)
    return networks.DINOCell(networks.load_backbone(source.weights)).ready(device)


def embed_vectors_of(net, pixels: np.ndarray, labels: np.ndarray, only: str = "") -> np.ndarray:
    """(n, D) of the cells, ascending; without a network columns of cell_table but for places.

    only : how the names of these columns begin.
    """
    if net is not None:
        return segment.cell_vectors(pixels, labels, net)[1]
    near = data.median_diameter(labels)
    table = cells.cell_table(labels, pixels, near=near)
    left_out = ("id", "near_px", "touches_border", "orientation_rad")
    return np.stack([values for name, values in table.items() if name not in left_out
                     and name.startswith(only) and not name.startswith(("bbox", "centroid"))],
                    1).astype(np.float32)


class TypedImage(typing.NamedTuple):
    pixels: np.ndarray                      # (C, H, W)
    labels: np.ndarray                      # (H, W)
    types: np.ndarray                       # (n,) of its cells, from 1; 0 unknown


def embed_examples(sets: Sequence[data.TrainingSet], root: str) -> list[data.Example]:
    return [example for chosen in sets for example in data.examples(
        Path(root) / chosen.path, chosen.channels, chosen.match, chosen.labels)]


def embed_images(sets: Sequence[data.TrainingSet], typed: TypedSet, root: str) -> list[TypedImage]:
    """A set's images, with each type in one or more."""
    wanted, found = data.training_types(typed.types), []
    examples = embed_examples(sets, root)
    for example in examples:
        labels = example.labels()
        found.append(TypedImage(example.image().pixels, labels,
                                data.training_type_numbers(example, labels, wanted)))
    for number, (name, classes) in enumerate(wanted.items(), 1):
        if not any(number in image.types for image in found):
            raise ValueError(f"types: no cell is '{name}' ({', '.join(classes)}) in "
                             f"{runs.listed([example.name for example in examples])}; check the "
                             "class, or leave it out")
    if len({len(image.pixels) for image in found}) > 1:
        raise ValueError(f"set '{typed.name}': images of different channels; choose the same of "
                         "all with channels=")
    return found


class SeenCells(typing.NamedTuple):
    """True and found cells of an image; rows are what types are told from, D + 8 numbers each."""
    types: np.ndarray                       # (n,) of the true cells, from 1; 0 unknown
    centres: np.ndarray                     # (n, 2) px
    rows: np.ndarray                        # (n, D + 8)
    found_centres: np.ndarray               # (m, 2) of the cells that the network finds
    found_rows: np.ndarray                  # (m, D + 8)


def embed_cell_centres(labels: np.ndarray) -> np.ndarray:
    """(n, 2) of the cells, in px."""
    table = cells.cell_table(labels, near=0)
    return np.stack([table["centroid_y_px"], table["centroid_x_px"]], 1)


def embed_seen_cells(net, image: TypedImage, diameter: float | None) -> SeenCells:
    """The cells of an image as a network sees and finds them; None, the pixels, and a backbone find
    none."""
    labels = np.zeros_like(image.labels)
    if net is None:
        rows = embed_vectors_of(None, image.pixels, image.labels)
        found = rows[:0]
    else:
        plan = segment.plan_for(image.pixels, net, diameter=diameter, embed=True)
        distance, pool = segment.network_map(image.pixels, plan)
        if net.origin is not None:
            labels, _ = segment.cells_in_map(distance, plan, image.labels.shape)
        rows, found = (segment.pooled_vectors(pool, each, plan, outlines=True)[1]
                       for each in (image.labels, labels))
    return SeenCells(image.types, embed_cell_centres(image.labels), rows,
                     embed_cell_centres(labels), found)


def embed_known_type_rows(seen: Sequence[SeenCells]) -> tuple[np.ndarray, np.ndarray]:
    """Rows (n, D + 8) and types (n,) of the true cells of known type."""
    rows, types = (np.concatenate(parts) for parts in
                   ([each.rows for each in seen], [each.types for each in seen]))
    return rows[types > 0], types[types > 0]


def embed_found_type_rows(seen: Sequence[SeenCells], reach: float, none: int
                          ) -> tuple[np.ndarray, np.ndarray]:
    """Rows (n, D + 8) and types (n,) of the cells that a network finds: those of the true cells
    there, `none` where there are none."""
    types = []
    for each in seen:
        i, j = metrics.match_centres(each.centres, each.found_centres, reach).T
        own = np.full(len(each.found_rows), none)
        own[j] = each.types[i]
        types.append(own)
    rows, numbers = np.concatenate([each.found_rows for each in seen]), np.concatenate(types)
    return rows[numbers > 0], numbers[numbers > 0]


def embed_told_types(net, typed: TypedSet, config: Embed) -> dict[str, Any]:
    """Scores of the types of a set's test images."""
    names = tuple(data.training_types(typed.types))
    images = [embed_images(part, typed, config.root) for part in (typed.train, typed.test)]
    learnt, asked = ({runs.digest(image.pixels) for image in part} for part in images)
    if learnt & asked:
        raise ValueError(f"set '{typed.name}': {len(learnt & asked)} images of train are in test "
                         "as well; keep them apart")
    wide = [data.median_diameter(image.labels) for image in images[0] if image.labels.any()]
    sized = net is not None and net.settings.diameter
    diameter = round(float(np.median(wide)), 1) if sized else None
    train, test = ([embed_seen_cells(net, image, diameter) for image in part] for part in images)
    (rows, types), (asked, truth) = map(embed_known_type_rows, (train, test))
    head = vectors.linear_type_head(rows, types - 1, len(names))
    linear = 1 + vectors.type_probabilities(head, asked).argmax(1)
    nearest = 1 + vectors.neighbour_types(rows, types - 1, asked,
                                          beside=0 if net is None else len(vectors.OUTLINE))
    scores: dict[str, Any] = {"cells": len(truth), "most": np.bincount(truth).max() / len(truth)}
    for how, answer in (("knn", nearest), ("linear", linear)):
        scores |= {f"{how}_accuracy": float((answer == truth).mean()),
                   f"{how}_F1": report.chart_mean(
                       metrics.type_f1(truth, answer, range(1, 1 + len(names))))}
    if net is None or net.origin is None:      # none that finds cells
        return scores
    found, numbers = embed_found_type_rows(train, typed.reach, 1 + len(names))
    told = (*names, NONE)[:max(len(names), numbers.max(initial=0))]
    head = vectors.linear_type_head(np.concatenate((rows, found)),
                                    np.concatenate((types, numbers)) - 1, len(told))
    if config.export:
        whole = networks.load(net.origin)
        whole.set_types(head, told)
        networks.save(whole, config.export, half=True)
        print(f"{', '.join(told)} -> {config.export}" + (f"; infer.py wants diameter={diameter:g} "
              "with it, for images of the same magnification" if diameter else ""))
    # trained to tell these: with its own head
    own = net.type_names in (names, (*names, NONE))
    tell = net.type_probabilities if own else partial(vectors.type_probabilities, head)
    return (scores | {"diameter": diameter or np.nan}
            | embed_found_types(test, tell, names, typed.reach))


def embed_found_types(seen: Sequence[SeenCells], tell: Callable[[np.ndarray], np.ndarray],
                      names: tuple[str, ...], reach: float) -> dict[str, float]:
    """F_d and F_c of the cells that a network finds, without those told to be none; `tell`: rows
    (n, D + 8) -> probabilities of the types, and perhaps of none."""
    pairs, missed, extra = [], [], []
    for each in seen:
        told = 1 + tell(each.found_rows).argmax(1)
        at, told = each.found_centres[told <= len(names)], told[told <= len(names)]
        i, j = metrics.match_centres(each.centres, at, reach).T
        pairs.append(np.stack((each.types[i], told[j])))
        missed.append(np.delete(each.types, i))
        extra.append(np.delete(told, j))
    both = np.concatenate(pairs, 1)
    detection, by_type = metrics.type_scores(both[0], both[1], np.concatenate(missed),
                                             np.concatenate(extra), range(1, 1 + len(names)))
    return {"F_d": detection, "F_c": float(np.mean(list(by_type.values()))),
            **{f"F_c {name}": by_type[i] for i, name in enumerate(names, 1)}}


def embed_cells_of_fields(config: Embed) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Name, pixels (C, H, W) and labels (H, W) of the fields in which cells are found."""
    finder = networks.load(config.finder).ready(runs.pick_device(config.device))
    read = ((name, pixels, segment.segment(pixels[-1], finder))
            for name, _, pixels in probe.probe_field_files(config))
    found = [field for field in read if field[2].any()]
    if len(found) < 2:
        raise ValueError(f"fields={config.fields}: cells were found in {len(found)} fields, "
                         "expected two or more; give other weights as finder=")
    return found


def embed_told_fields(net, seen: Sequence[tuple[str, np.ndarray, np.ndarray]], config: Embed
                      ) -> dict[str, float]:
    """Retrieval of fields across channels, and of fields of the same well, by mean vectors."""
    # shapes are those of the same cells in all channels
    fields = [[embed_vectors_of(net, channel[None], labels, "intensity").mean(0)
               for channel in pixels] for _, pixels, labels in seen]
    x = np.array(fields)                                                     # (F, C, D)
    x = (x - x.mean(0)) / np.maximum(x.std(0), 1e-6)         # a channel has its own mean
    agree = probe.channel_consistency(x)
    scores = {"fields": len(x), "retrieval": agree.retrieval, "chance": 1 / len(x),
              "cosine": agree.consistency, "control": agree.control}
    if config.wells:
        wells = {row["image"]: row["well"]
                 for row in runs.read_table(Path(config.wells), ["image", "well"])}
        names = [name for name, _, _ in seen]
        if missing := [name for name in names if name not in wells]:
            raise ValueError(f"{config.wells}: no row for {missing[0]}; expected a row per image, "
                             "columns image (without suffix) and well")
        own = [wells[name] for name in names]
        flat = x.reshape(len(x), -1)
        shuffled = np.random.default_rng(0).permutation(own)
        scores |= {"replicates": vectors.vector_retrieval_precision(flat, own),
                   "replicates_shuffled": vectors.vector_retrieval_precision(flat, list(shuffled))}
    return scores


# ----------------------------------------------------------------------------------------- command

VERBS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "bench": (Bench, bench), "gating": (Gating, gating), "sweep": (Sweep, sweep),
    "ceiling": (Ceiling, ceiling), "calibrate": (Calibrate, calibrate),
    "channels": (probe.Channels, probe.compare_channels), "embed": (Embed, embed)}


def main(arguments: list[str]) -> int:
    """The first word is the verb, the rest a configuration and key=value."""
    verb, *rest = arguments or ["--help"]
    if verb in ("--help", "-h"):
        print(__doc__.strip())
        return 0
    if verb not in VERBS:
        raise ValueError(f"unknown verb '{verb}', expected one of {', '.join(VERBS)}")

    def run(config, files: list[str]) -> None:
        if files:
            raise ValueError(f"{files[0]}: evaluate.py {verb} takes a configuration and key=value")
        VERBS[verb][1](config)

    runs.script(usage(verb), VERBS[verb][0], run, rest)
    return 0


def usage(verb: str) -> str:
    """Help on a verb and the keys of its sections."""
    cls, function = VERBS[verb]
    sections: dict[Any, list[str]] = defaultdict(list)
    for name, hint in typing.get_type_hints(cls).items():
        for part in filter(is_dataclass, typing.get_args(hint)):    # a section is among the keys
            sections[part].append(name)
    keys = "".join(f"\n\nKeys in {' and '.join(names)}:\n{runs.config_help(part)}"
                   for part, names in sections.items())
    return f"python evaluate.py {verb} CONFIG.yaml [key=value ...]\n\n{function.__doc__}{keys}"


if __name__ == "__main__":
    sys.exit(runs.guarded(lambda: main(sys.argv[1:])))
