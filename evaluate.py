"""Measure models and what limits them: python evaluate.py VERB CONFIG.yaml [key=value ...]

    bench      models, and label images of any other program, on labelled sets: scores, a page
    gating     post-processing of saved predictions: smallest area, window of marker, cut cells
    sweep      thresholds of the watershed, tile, overlap, scale: chosen on validation sets
    ceiling    what the encoding can reach: true labels -> distance map -> watershed -> scores
    channels   does a backbone see the same field in each channel? features and attention maps

`python evaluate.py VERB --help` lists the keys of each. All files go to runs/<experiment>/:

    bench      MODEL/SET/NAME_pred.tif, MODEL/SET/metrics.json;
               metrics_all_models.tsv, groups.tsv, delta.tsv, table.md, report.html
    gating     gating.tsv: each set raw, then with every setting
    sweep      sweep.tsv (validation); selected.tsv, delta.tsv and CHOICE/SET/ as in bench (test)
    ceiling    ceiling.tsv, best first
    channels   channels.json, cosine.tsv, retrieval.tsv, attention.tsv, channels.png,
               attention.png, heads.png, pca.png

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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, is_dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import measure
import probe
import report
import runs
from measure import CEILING, COMPARED, DataSet, Encoding, LabelledSet, Model, TableRow

with runs.lazy():
    import torch


def run_folder(config) -> Path:
    name = Path(config.experiment)
    if not name.parts or ".." in name.parts or name.is_absolute():
        raise ValueError(f"experiment={config.experiment}: expected the name of a folder in runs/")
    folder = Path(config.output_base_dir) / "runs" / config.experiment
    folder.mkdir(parents=True, exist_ok=True)
    runs.write_text(folder / f"{type(config).__name__.lower()}.yaml", runs.to_yaml(config))
    return folder


# ------------------------------------------------------------------------------------------- bench

@dataclass(frozen=True)
class Bench:
    models: tuple[Model, ...]               # to measure, in this order
    sets: tuple[DataSet, ...]               # labelled images
    experiment: str = "evaluate"            # name of the run
    output_base_dir: str = "."              # where runs/ is made
    root: str = "."                         # folder that the sets are in
    against: tuple[str, ...] = ()           # rows that others are compared with; empty: the first
    ceiling: Encoding = field(default_factory=Encoding)  # settings whose best stands first
    score: str = "DSB"                      # what best means for the ceiling
    pictures: int = 3                       # models shown on the page, from the first on
    columns: tuple[str, ...] = ("AP@0.5", "AP@0.75", "F1", "SEG", "DET", "OP_CSB")  # in table.md
    markdown: str | None = None             # document for table.md, between two lines of comment
    summary: str | None = None              # document for its first table alone
    batch: runs.Batch | None = None         # tiles at once; null: 4 on the CPU, 32 on a GPU
    device: runs.Device = "auto"            # auto: the GPU if there is one
    overwrite: bool = False                 # make every prediction anew

    def __post_init__(self):
        measure.check_distinct("model", [model.name for model in self.models])
        measure.check_distinct("set", [dataset.name for dataset in self.sets])
        measure.check_scores(self.score, *self.columns)


def bench(config: Bench) -> None:
    """Measure models, and label images of any other program, on labelled sets."""
    sets = [LabelledSet(dataset, config.root) for dataset in config.sets]
    documents = [(Path(path), f"bench {config.experiment}{part}") for path, part in
                 ((config.markdown, ""), (config.summary, " in short")) if path]
    for path, name in documents:
        report.between(path, name)
    rows = [row for model in config.models              # all files are found before one is run
            for row in measure.rows_of(model, sets, config.device, config.batch)]
    measure.check_distinct("row", [row.name for row in rows])
    if unknown := set(config.against) - {row.name for row in rows}:
        raise ValueError(f"against: '{min(unknown)}', expected some of "
                         f"{runs.listed([row.name for row in rows], 12)}")
    folder = run_folder(config)
    rows = [*ceiling_rows(config, sets, folder), *rows]
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
              for line in measure.group_rows(dataset, results[dataset.name].values())]
    for name, lines in (("metrics_all_models", table), ("delta", compared), ("groups", groups)):
        runs.write_table(folder / f"{name}.tsv", lines)
    brief, full = measure.bench_markdown(sets, rows, results, config.columns, made_by(config),
                                         compared if config.against else [])
    runs.write_text(folder / "table.md", full)
    for path, name in documents:
        report.put_between(path, name, brief if name.endswith(" in short") else full)
    runs.write_text(folder / "report.html", measure.bench_page(
        config.experiment, sets, rows, results, config.pictures, made_by(config)))
    report.print_table([line for line in table if not line.get("seed")],
                       ("set", "model", "n", *config.columns))
    print(f"-> {folder / 'report.html'}, {folder / 'table.md'}")


def ceiling_rows(config: Bench, sets: list[LabelledSet], folder: Path) -> Iterator[TableRow]:
    """Row of the encoding, on each set with its best setting."""
    if config.ceiling.cap:
        best = {dataset.name: measure.encoding_rows(dataset, config.ceiling, config.score,
                                                    folder)[0] for dataset in sets}
        yield TableRow(CEILING, "of the encoding",
                       {name: (measure.EncodedLabels(row),) for name, row in best.items()})


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
                compared += measure.differences(dataset, there[name], there[other])
    return compared


def made_by(config: Bench) -> str:
    """Command, machine and versions."""
    about = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    cpu = re.search(r"model name\s*: (.*)", about)
    machine = cpu[1] if cpu else platform.processor() or platform.machine()
    machine += f", {os.cpu_count()} cores"
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
    experiment: str = "gating"              # name of the run
    output_base_dir: str = "."              # where runs/ is made
    root: str = "."                         # folder that the sets are in
    min_area: tuple[runs.Area, ...] = (0, 20, 50, 100)  # px, smaller cells are dropped
    windows: tuple[tuple[float, ...], ...] = ((0, 100), (2, 98), (5, 95))  # percentiles to keep
    marker: str = "1"                       # channel of the file, whose mean over a cell counts
    border: tuple[Literal["keep", "drop", "both"], ...] = ("keep", "drop", "both")  # both: true too
    ceiling: Encoding = field(default_factory=Encoding)  # as in bench
    score: str = "DSB"                      # what best means for the ceiling

    def __post_init__(self):
        measure.check_distinct("set", [dataset.name for dataset in self.sets])
        measure.check_scores(self.score)
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
    folder, rows = run_folder(config), []
    for dataset in sets:
        images = predictions[dataset.name]
        rows += measure.ceiling_row(dataset, config.ceiling, config.score, folder, what=CEILING)
        raw, _ = measure.gate(images, 0, (0, 100), "keep")
        rows.append({"set": dataset.name, "what": "raw", "n": len(images), "min_area": 0,
                     "window": "q0-100", "border": "keep", "removed": 0,
                     **measure.score_columns(raw.scores)})
        for min_area, window, border in product(config.min_area, config.windows, config.border):
            result, removed = measure.gate(images, min_area, window, border)
            change = {f"{line['score']}_change{end}": line[value]
                      for line in measure.differences(dataset, raw, result)
                      if line["image"] == "mean" for end, value in
                      (("", "difference"), ("_low", "low"), ("_high", "high"))}
            rows.append({"set": dataset.name, "what": "gated", "n": len(images),
                         "min_area": min_area, "window": "q{:g}-{:g}".format(*window),
                         "border": border, "removed": removed,
                         **measure.score_columns(result.scores), **change})
    first = ("set", "what", "n", "min_area", "window", "border", "removed")
    runs.write_table(folder / "gating.tsv", rows, first)
    report.print_table(rows, (*first, "AP@0.5", "AP@0.5_change", "SEG"))
    print(f"-> {folder / 'gating.tsv'}")


# ------------------------------------------------------------------------------------------- sweep

@dataclass(frozen=True)
class Sweep:
    weights: str                            # file of this project
    validation: tuple[DataSet, ...]         # settings are chosen on these
    test: tuple[DataSet, ...]               # and reported on these, set by set
    experiment: str = "sweep"               # name of the run
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
    scale: tuple[runs.Positive, ...] = (1.0,)  # network px per image px, on top of the diameter
    score: str = "DSB"                      # what best means, mean over images
    ceiling: Encoding = field(default_factory=Encoding)  # as in bench
    batch: runs.Batch | None = None         # tiles at once; null: 4 on the CPU, 32 on a GPU
    device: runs.Device = "auto"            # auto: the GPU if there is one

    def __post_init__(self):
        measure.check_distinct("validation set", [part.name for part in self.validation])
        measure.check_distinct("test set", [dataset.name for dataset in self.test])
        measure.check_scores(self.score)
        measure.threshold_grid(self)
        if not (self.tile and self.overlap and self.scale):
            raise ValueError("tile, overlap and scale need one value or more each; null is one")


def sweep(config: Sweep) -> None:
    """Choose settings on validation sets, report on test sets.

    The network runs once for each tile, overlap and scale.
    """
    validation, test = ([LabelledSet(dataset, config.root) for dataset in sets]
                        for sets in (config.validation, config.test))
    check_apart(validation, test)
    network = measure.NetworkLabels(config.weights, config.device, config.batch)
    folder = run_folder(config)
    settings = [dict(tile=tile, overlap=overlap, scale=scale, **chosen)
                for tile, overlap, scale in product(config.tile, config.overlap, config.scale)
                for chosen in measure.threshold_grid(config)]
    rows, table = [], []
    for dataset in validation:
        found = sweep_rows(dataset, network, settings, folder / "validation" / dataset.name)
        table += measure.ceiling_row(dataset, config.ceiling, config.score, folder / "validation",
                                     choice=CEILING) + found
        rows += found
    first = ("set", "choice", "n", "cap", *settings[0])
    runs.write_table(folder / "sweep.tsv", [{name: row.get(name) for name in (*first, *COMPARED)}
                                            for row in table])
    shared, selected, compared = measure.best_setting(rows, settings, config.score), [], []
    for dataset in test:
        choices = {"shared": shared, "weights": {}}
        if its := [row for row in rows if row["set"] == dataset.name]:
            choices["own"] = measure.best_setting(its, settings, config.score)
        selected += measure.ceiling_row(dataset, config.ceiling, config.score, folder / "test",
                                        choice=CEILING)
        results = {}
        for choice, setting in choices.items():
            source = network.with_options(**setting)
            result = measure.measure_model(choice, dataset, source, folder / choice / dataset.name)
            results[choice] = result
            selected.append({"set": dataset.name, "choice": choice, "n": len(result.names),
                             **source.options, "seconds": result.seconds,
                             **measure.score_columns(result.scores)})
            if choice != "shared":
                compared += measure.differences(dataset, results["shared"], result)
    runs.write_table(folder / "selected.tsv", selected, first)
    runs.write_table(folder / "delta.tsv", compared)
    report.print_table(selected, dict.fromkeys((*first, config.score, "AP@0.5", "SEG")))
    print(f"-> {folder / 'selected.tsv'}; by {config.score} on validation: shared by all sets, or "
          "a set's own; weights: as they are stored")


def sweep_rows(dataset: LabelledSet, network: measure.NetworkLabels, settings: list[dict],
               folder: Path) -> list[dict]:
    """Mean scores of a set with each setting, of images that are done from their files."""
    images = []
    for item in dataset.items("sweep"):
        key = dict(weights=network.digest, image=item.digest, truth=runs.digest(item.truth),
                   settings=settings, diameter=dataset.config.diameter)
        images.append(measure.cached(folder / f"{item.name}.json", key, partial(
            measure.sweep_image, item, dataset, network, settings)))
    return [{"set": dataset.name, "choice": "-", "n": len(images), **setting,
             **{name: report.mean_defined(image[k][name] for image in images)
                for name in COMPARED}} for k, setting in enumerate(settings)]


def check_apart(validation: list[LabelledSet], test: list[LabelledSet]) -> None:
    """Refuse an image that is on both sides, whatever its name."""
    def contents(example) -> list[str]:     # its cells show it in another channel, too
        pixels, truth = example.image().pixels, example.labels()
        return [runs.digest(pixels), *([runs.digest(truth)] if truth.any() else [])]

    seen = {content: f"{dataset.name}/{example.name}" for dataset in validation
            for example in dataset.examples for content in contents(example)}
    for dataset in test:
        for example in dataset.examples:
            if twins := [seen[content] for content in contents(example) if content in seen]:
                raise ValueError(f"test image {dataset.name}/{example.name} ({dataset.config.path})"
                                 f" is in validation too, as {twins[0]}; what chose the setting "
                                 "flatters, give other images")


# ----------------------------------------------------------------------------------------- ceiling

@dataclass(frozen=True, kw_only=True)
class Ceiling(Encoding):
    sets: tuple[DataSet, ...]               # as in bench; only their labels count
    experiment: str = "ceiling"             # name of the run
    output_base_dir: str = "."              # where runs/ is made
    root: str = "."                         # folder that the sets are in
    score: str = "DSB"                      # what best means, mean over images

    def __post_init__(self):
        super().__post_init__()
        measure.check_distinct("set", [dataset.name for dataset in self.sets])
        measure.check_scores(self.score)
        if not self.cap:
            raise ValueError("cap needs one value or more; null is one: no cap")


def ceiling(config: Ceiling) -> None:
    """What the encoding can reach: true labels -> distance map -> watershed -> scores."""
    sets = [LabelledSet(dataset, config.root) for dataset in config.sets]
    folder = run_folder(config)
    tables = [measure.encoding_rows(dataset, config, config.score, folder) for dataset in sets]
    runs.write_table(folder / "ceiling.tsv", [row for table in tables for row in table])
    report.print_table([table[0] for table in tables],
                       ("set", "n", "cap", "peak", "fill", "DSB", *measure.PAGE_SCORES))
    print(f"-> {folder / 'ceiling.tsv'}; here the best of each set by {config.score}")


# ----------------------------------------------------------------------------------------- channels

def channels(config: probe.Channels) -> None:
    """Does a backbone see the same field in each of its channels? Features, and where it looks."""
    probe.compare_channels(config, run_folder)


# ----------------------------------------------------------------------------------------- command

VERBS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "bench": (Bench, bench), "gating": (Gating, gating), "sweep": (Sweep, sweep),
    "ceiling": (Ceiling, ceiling), "channels": (probe.Channels, channels)}


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

    runs.script(usage(verb) if {"--help", "-h"} & set(rest) else "", VERBS[verb][0], run, rest)
    return 0


def usage(verb: str) -> str:
    """Help on a verb and the keys of its sections."""
    cls, function = VERBS[verb]
    sections: dict[Any, list[str]] = defaultdict(list)
    for name, hint in typing.get_type_hints(cls).items():
        for part in filter(is_dataclass, (hint, *typing.get_args(hint))):
            sections[part].append(name)
    keys = "".join(f"\n\nKeys in {' and '.join(names)}:\n{runs.describe(part)}"
                   for part, names in sections.items())
    return f"python evaluate.py {verb} CONFIG.yaml [key=value ...]\n\n{function.__doc__}{keys}"


if __name__ == "__main__":
    sys.exit(runs.guarded(lambda: main(sys.argv[1:])))
