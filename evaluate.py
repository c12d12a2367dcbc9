"""Measure models and what limits them: python evaluate.py VERB CONFIG.yaml [key=value ...]

    bench      models, and label images of any other program, on labelled sets: scores, differences, a page
    gating     post-processing of saved predictions: smallest area, window of marker intensity, cut cells
    sweep      peak, fill, min_area, tile, overlap, scale: chosen on validation sets, reported on test sets
    ceiling    what the encoding can reach: true labels -> distance map -> watershed -> scores
    channels   does a backbone see the same field in each of its channels? features and attention maps

`python evaluate.py VERB --help` lists the keys of each. Everything is written into runs/<experiment>/:

    bench      MODEL/SET/NAME_pred.tif, MODEL/SET/metrics.json;
               metrics_all_models.tsv, groups.tsv, delta.tsv, table.md, report.html
    gating     gating.tsv: each set raw, then with every setting
    sweep      sweep.tsv (validation); selected.tsv, delta.tsv and CHOICE/SET/ as bench has them (test)
    ceiling    ceiling.tsv, best first
    channels   channels.json, cosine.tsv, retrieval.tsv, attention.tsv, channels.png, attention.png,
               heads.png, pca.png

The same command goes on where it was stopped, and makes anew what has changed in the content of weights or
images, or in an option. Every table begins with the best ceiling, so that nobody blames a network for it.
Scores of a set are means over its images; SEG, DET, OP_CSB, F1 and counts are of the cells of all images
together. Differences are paired, image by image. Intervals are 95 % bootstraps over images, from ten on.
"""
from __future__ import annotations

import json
import os
import platform
import re
import shlex
import sys
import typing
from dataclasses import dataclass, field, is_dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np

import report
import runs
from measure import (CEILING, COMPARED, READ, DataSet, Encoded, Model, Network, Peer, Result, check_distinct,
                     check_scores, columns_of, differences, digest, examples, group_rows, grouped, items,
                     kept, measured, plain, seeds_joined)
from tuning import (Encoding, best_setting, encodings, gateable, gated, mean_defined, swept,
                    thresholds)


def run_folder(config) -> Path:
    name = Path(config.experiment)
    if not name.parts or ".." in name.parts or name.is_absolute():
        raise ValueError(f"experiment={config.experiment}: expected the name of a folder in runs/")
    folder = Path(config.output_base_dir) / "runs" / config.experiment
    folder.mkdir(parents=True, exist_ok=True)
    runs.write_text(folder / f"{type(config).__name__.lower()}.yaml", runs.to_yaml(config))
    return folder


# ---------------------------------------------------------------------------------------------------- bench

@dataclass(frozen=True)
class Bench:
    models: tuple[Model, ...]               # to measure, in this order
    sets: tuple[DataSet, ...]               # labelled images
    experiment: str = "evaluate"            # name of the run
    output_base_dir: str = "."              # where runs/ is made
    root: str = "."                         # folder that the sets are in
    against: tuple[str, ...] = ()           # models to compare the others with, in documents too; empty: the first, in delta.tsv
    ceiling: Encoding = field(default_factory=Encoding)  # grid whose best stands first: cap, peak, fill
    score: str = "DSB"                      # what best means for the ceiling
    pictures: int = 3                       # models shown on the page, from the first on
    columns: tuple[str, ...] = ("AP@0.5", "AP@0.75", "F1", "SEG", "DET", "OP_CSB")  # scores in table.md
    markdown: str | None = None             # document to put table.md into, between two lines of comment
    summary: str | None = None              # document for its first table alone
    batch: int | None = None                # tiles at once; null: 4 on the CPU, 32 on a GPU
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU if there is one
    overwrite: bool = False                 # make every prediction anew

    def __post_init__(self):
        check_distinct("model", [*{m.seeds_of: "" for m in self.models if m.seeds_of}, *(m.name for m in self.models)])
        check_distinct("set", [s.name for s in self.sets])
        check_scores(self.score, *self.columns)
        for name in set(self.against) - {m.row for m in self.models}:
            raise ValueError(f"against: '{name}', expected a model or, of several seeds, their seeds_of")


def bench(config: Bench) -> None:
    """Measure models, and label images of any other program, on labelled sets."""
    import results
    found = {place.name: examples(place, config.root) for place in config.sets}
    groups = {place.name: grouped(place, config.root, found[place.name]) for place in config.sets}
    documents = {Path(path): f"bench {config.experiment}{part}" for path, part in
                 ((config.markdown, ""), (config.summary, " in short")) if path}
    for path, name in documents.items():
        report.between(path, name)
    sources = sources_of(config, found)     # all looked up before one is run
    folder, entries = run_folder(config), [(entry.name, entry.note) for entry in config.models]
    if config.ceiling.cap:
        entries.insert(0, (CEILING, "of the encoding"))
        for place in config.sets:
            best = encodings(place, found[place.name], config.ceiling, config.score, folder)[0]
            sources[CEILING, place.name] = Encoded(best["cap"], best["peak"], best["fill"])
    done: dict[str, dict[str, Result]] = {place.name: {} for place in config.sets}      # set, model
    for (name, _), place in product(entries, config.sets):
        if source := sources.pop((name, place.name), None):             # so that one network is in memory
            done[place.name][name] = measured(name, place, found[place.name], source,
                                              folder / name / place.name, config.overwrite)
    lines, joined = seeds_joined(config.models, entries, done)          # as documents have them
    for name in set(config.against).difference(*joined.values()):
        print(f"against: {name} was not run; nothing is compared with it", file=sys.stderr)
    rows, compared, by_group = [], [], []
    for place in config.sets:
        there = done[place.name]
        for name, note in entries:
            line, result = {"set": place.name, "model": name, "note": note}, there.get(name)
            if result is None:
                rows.append({**line, "n": "not run"})
                continue
            line["note"] = "; ".join(filter(None, (note, result.note)))
            rows.append({**line, "n": len(result.names), "missing": len(result.missing),
                         "seconds": result.seconds, **columns_of(result.scores)})
        alike = joined[place.name]
        against = config.against or [m.row for m in config.models if m.row in alike][:1]
        for first, other in product(filter(alike.get, against), alike):
            if other != first:
                compared += differences(place, alike[first], alike[other])
        by_group += group_rows(place, list(there.values()), groups[place.name])
    for name, table in (("metrics_all_models", rows), ("delta", compared), ("groups", by_group)):
        runs.write_table(folder / f"{name}.tsv", table)
    brief, full = results.markdown(config.sets, lines, joined, config.columns, made_by(config),
                                   compared if config.against else [])
    runs.write_text(folder / "table.md", full)
    for (path, name), text in zip(documents.items(), [full] * bool(config.markdown) + [brief]):
        report.put_between(path, name, text)
    runs.write_text(folder / "report.html", results.page(config.experiment, config.sets, entries, found, done,
                                                         config.pictures, made_by(config)))
    report.print_table(rows, ("set", "model", "n", *config.columns))
    print(f"-> {folder / 'report.html'}, {folder / 'table.md'}")


def sources_of(config: Bench, found: dict[str, list]) -> dict[tuple[str, str], Network | Peer]:
    """Where the labels of each model on each set come from; none for what is not run."""
    sources = {}
    for entry in config.models:
        try:
            network = Network(entry, config.device, config.batch) if entry.weights else None
            for place in config.sets if entry.weights or entry.labels else ():
                sources[entry.name, place.name] = network or Peer(entry, place, found[place.name])
        except FileNotFoundError as error:
            if not entry.optional:
                raise
            print(f"{entry.name}: not run; {error}", file=sys.stderr)
    return sources


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
    ceiling: Encoding = field(default_factory=Encoding)  # as in bench
    score: str = "DSB"                      # what best means for the ceiling

    def __post_init__(self):
        check_distinct("set", [s.name for s in self.sets])
        check_scores(self.score)
        for window in self.windows:
            if len(window) != 2 or not 0 <= window[0] < window[1] <= 100:
                raise ValueError(f"windows: {list(window)}, expected two percentiles such as [2, 98]")
        if not (self.min_area and self.windows and self.border):
            raise ValueError("min_area, windows and border need one value or more each")


def gating(config: Gating) -> None:
    """Post-processing of saved predictions: every setting against the raw result, without any network."""
    found = {place.name: examples(replace(place, channels=(config.marker,)), config.root)
             for place in config.sets}
    seen = {place.name: [gateable(item, Path(config.predictions) / place.name)
                         for item in items(found[place.name], place, "gating")] for place in config.sets}
    folder, rows = run_folder(config), []
    for place in config.sets:
        images = seen[place.name]
        rows += ceiling_row(place, found[place.name], config, folder, what=CEILING)
        raw, _ = gated(images, config.over, 0, (0, 100), "keep")
        rows.append({"set": place.name, "what": "raw", "n": len(images), "min_area": 0, "window": "q0-100",
                     "border": "keep", "removed": 0, **columns_of(raw.scores)})
        for setting in product(config.min_area, config.windows, config.border):
            least, window, border = setting
            result, removed = gated(images, config.over, *setting)
            rows.append({"set": place.name, "what": "gated", "n": len(images), "min_area": least,
                         "window": "q{:g}-{:g}".format(*window), "border": border, "removed": removed,
                         **columns_of(result.scores)})
            for line in differences(place, raw, result):
                if line["image"] == "mean":
                    name = f"{line['score']}_change"
                    rows[-1] |= {name: line["difference"], f"{name}_low": line["low"],
                                 f"{name}_high": line["high"]}
    first = ("set", "what", "n", "min_area", "window", "border", "removed")
    runs.write_table(folder / "gating.tsv", rows, first)
    report.print_table(rows, (*first, "AP@0.5", "AP@0.5_change", "SEG"))
    print(f"-> {folder / 'gating.tsv'}")


def ceiling_row(place: DataSet, found: list, config: Gating | Sweep, folder: Path, **first: str
                ) -> list[dict]:
    """The best of the encoding, to stand before the rows of a set."""
    if not config.ceiling.cap:
        return []
    best = encodings(place, found, config.ceiling, config.score, folder)[0]
    return [{"set": place.name, **first, "n": best["n"], **best}]


# ---------------------------------------------------------------------------------------------------- sweep

@dataclass(frozen=True)
class Sweep:
    weights: str                            # file of this project
    validation: tuple[DataSet, ...]         # settings are chosen on these
    test: tuple[DataSet, ...]               # and reported on these; sets of one name belong together
    experiment: str = "sweep"               # name of the run
    output_base_dir: str = "."              # where runs/ is made
    root: str = "."                         # folder that the sets are in
    peak: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)       # a cell's marker lies above
    fill: tuple[float, ...] = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4)       # a cell reaches down to
    min_area: tuple[int | None, ...] = (None,)  # px; null: the weights' own
    tile: tuple[int | None, ...] = (None,)  # px; null: as trained
    overlap: tuple[int | None, ...] = (None,)  # px; null: a cell's width, from an eighth to half of the tile
    scale: tuple[float, ...] = (1.0,)       # network px per image px, on top of the set's diameter
    score: str = "DSB"                      # what best means, mean over images
    ceiling: Encoding = field(default_factory=Encoding)  # as in bench
    batch: int | None = None                # tiles at once; null: 4 on the CPU, 32 on a GPU
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU if there is one

    def __post_init__(self):
        check_distinct("validation set", [s.name for s in self.validation])
        check_distinct("test set", [s.name for s in self.test])
        check_scores(self.score)
        thresholds(self.peak, self.fill)
        if not (self.min_area and self.tile and self.overlap and self.scale):
            raise ValueError("min_area, tile, overlap and scale need one value or more each; null is one")
        if min(self.scale) <= 0:
            raise ValueError(f"scale={min(self.scale):g}: expected more than 0")


def sweep(config: Sweep) -> None:
    """Choose settings on validation sets, report on test sets; the network runs once per tile and scale."""
    validation, test = ([(place, examples(place, config.root)) for place in places]
                        for places in (config.validation, config.test))
    check_apart(validation, test)
    network = Network(Model("weights", config.weights), config.device, config.batch)
    folder = run_folder(config)
    settings = [dict(tile=tile, overlap=overlap, scale=scale, peak=peak, fill=fill, min_area=min_area)
                for tile, overlap, scale in product(config.tile, config.overlap, config.scale)
                for (peak, fill), min_area in product(thresholds(config.peak, config.fill), config.min_area)]
    rows, table = [], []
    for place, found in validation:
        images = []
        for item in items(found, place, "sweep"):
            key = dict(weights=network.digest, image=item.digest, truth=digest(item.truth), settings=settings,
                       diameter=place.diameter)
            images.append(kept(folder / "validation" / place.name / f"{item.name}.json", key,
                               lambda: swept(item, place, network, settings)))
        table += ceiling_row(place, found, config, folder / "validation", choice=CEILING)
        rows += [{"set": place.name, "choice": "-", "n": len(images), **setting,
                  **{name: mean_defined(image[k][name] for image in images) for name in COMPARED}}
                 for k, setting in enumerate(settings)]
        table += rows[-len(settings):]
    first = ("set", "choice", "n", "cap", *settings[0])
    runs.write_table(folder / "sweep.tsv", [{name: line.get(name) for name in (*first, *COMPARED)}
                                            for line in table])
    shared, selected, compared = best_setting(rows, settings, config.score), [], []
    for place, found in test:
        choices = {"shared": shared, "weights": {}}
        if own := [line for line in rows if line["set"] == place.name]:
            choices["own"] = best_setting(own, settings, config.score)
        selected += ceiling_row(place, found, config, folder / "test", choice=CEILING)
        results = {}
        for choice, setting in choices.items():
            source = network.with_options(**setting)
            results[choice] = measured(choice, place, found, source, folder / choice / place.name)
            selected.append({"set": place.name, "choice": choice, "n": len(found), **source.options,
                             "seconds": results[choice].seconds, **columns_of(results[choice].scores)})
            if choice != "shared":
                compared += differences(place, results["shared"], results[choice])
    runs.write_table(folder / "selected.tsv", selected, first)
    runs.write_table(folder / "delta.tsv", compared)
    report.print_table(selected, dict.fromkeys((*first, config.score, "AP@0.5", "SEG")))
    print(f"-> {folder / 'selected.tsv'}; by {config.score} on validation, shared by all sets or a set's "
          "own; weights: as they are stored")


def check_apart(validation: list[tuple[DataSet, list]], test: list[tuple[DataSet, list]]) -> None:
    """What is reported must not have chosen: no image is on both sides, under whatever name."""
    def contents(example) -> list[str]:     # by its cells it is known in another channel, too
        pixels, truth = example.image().pixels, example.labels()
        return [digest(pixels), digest(truth)] if truth.any() else [digest(pixels)]
    seen = {content: f"{place.name}/{example.name}" for place, found in validation for example in found
            for content in contents(example)}
    for place, found in test:
        for example in found:
            if twin := next((seen[content] for content in contents(example) if content in seen), None):
                raise ValueError(f"test image {place.name}/{example.name} ({place.path}) is in validation "
                                 f"too, as {twin}; what chose the setting flatters, give other images")


# -------------------------------------------------------------------------------------------------- ceiling

@dataclass(frozen=True)
class Ceiling:
    sets: tuple[DataSet, ...]               # as in bench; only their labels count
    cap: tuple[float | None, ...] = Encoding.cap  # px, of watershed.distance_map; null: none
    peak: tuple[float, ...] = Encoding.peak  # of the watershed
    fill: tuple[float, ...] = Encoding.fill  # of the watershed
    experiment: str = "ceiling"             # name of the run
    output_base_dir: str = "."              # where runs/ is made
    root: str = "."                         # folder that the sets are in
    score: str = "DSB"                      # what best means, mean over images

    def __post_init__(self):
        check_distinct("set", [s.name for s in self.sets])
        check_scores(self.score)
        Encoding(self.cap, self.peak, self.fill)
        if not self.cap:
            raise ValueError("cap needs one value or more; null is one: no cap")


def ceiling(config: Ceiling) -> None:
    """What the encoding can reach: true labels -> distance map -> watershed -> scores."""
    found = [(place, examples(place, config.root)) for place in config.sets]
    folder = run_folder(config)
    rows = [encodings(place, images, Encoding(config.cap, config.peak, config.fill), config.score, folder)
            for place, images in found]   # best first
    runs.write_table(folder / "ceiling.tsv", [line for own in rows for line in own])
    report.print_table([own[0] for own in rows], ("set", "n", "cap", "peak", "fill", "DSB", *READ))
    print(f"-> {folder / 'ceiling.tsv'}; here the best of each set by {config.score}")


# ------------------------------------------------------------------------------------------------- channels

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
    shown: int = 4                          # fields in the pictures
    seed: int = 0                           # of synthetic fields and random weights
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU if there is one

    def __post_init__(self):
        if self.size < 1 or self.patch < 1 or self.size % self.patch:
            raise ValueError(f"size={self.size}: expected a multiple of the patch, {self.patch} px")
        if self.channels is not None and len(self.channels) < 2:
            raise ValueError(f"channels={', '.join(self.channels)}: expected two or more to compare")
        if min(self.synthetic if self.fields is None else 2, 2 if self.limit is None else self.limit) < 2:
            raise ValueError("synthetic and limit: expected two fields or more to compare")
        if self.shown < 1:
            raise ValueError(f"shown={self.shown}: expected 1 or more")


def channels(config: Channels) -> None:
    """Does a backbone see the same field in each of its channels? Features, and where it looks."""
    import consistency
    vit, weights = backbone(config)
    features, maps, shown, known, folder = [], [], [], None, None
    for name, known, pixels in consistency.alike(fields_of(config)):
        folder = folder or run_folder(config)                   # only once a field could be read
        pictured = len(features) < config.shown
        key = dict(weights=weights, image=digest(pixels), feature=config.feature, pictured=pictured)
        feature, looks_at, more = kept(folder / "fields" / f"{plain(name)}.json", key,
                                       lambda: seen_by(vit, pixels, config.feature, pictured))
        features.append(feature)                                # (C, D)
        maps.append(looks_at)                                   # (C, h, w)
        if pictured:
            shown.append((name, pixels, *map(np.array, more)))
    found = consistency.compare(features, maps)
    content = {"weights": config.weights or "random", "feature": config.feature, "fields": len(features),
               **found.numbers(), "chance": 1 / len(features)}  # of retrieval
    runs.write_text(folder / "channels.json", json.dumps({**content, "channels": known}, indent=1) + "\n")
    matrices = {"cosine": found.features.cosine_matrix, "retrieval": found.features.retrieval_matrix,
                "attention": found.attention.cosine_matrix}
    for name, matrix in matrices.items():
        runs.write_table(folder / f"{name}.tsv", [{"channel": channel, **dict(zip(known, map(float, line)))}
                                                  for channel, line in zip(known, matrix)])
    titled = ("cosine of features", f"retrieval of column by row (chance {content['chance']:.2f})",
              "correlation of attention")
    report.matrices(folder / "channels.png", dict(zip(titled, matrices.values())), known)
    pictures = consistency.write_pictures(folder, *zip(*shown), known)
    report.print_table([content], content)
    print(f"-> {', '.join(map(str, (folder / 'channels.png', *pictures)))}")


def fields_of(config: Channels):
    import consistency
    if config.fields is not None:
        return consistency.field_files(Path(config.fields), config.size, config.channels, config.limit)
    count = min(config.synthetic, config.limit or config.synthetic)
    return consistency.synthetic_fields(count, config.size, config.channels, config.seed)


def seen_by(vit, pixels: np.ndarray, feature: str, pictured: bool) -> tuple[list, list, list]:
    """Of each channel the feature (C, D), where the class token looks (C, h, w), and what pictures need."""
    import consistency
    import data
    seen = consistency.look(vit, data.normalise(pixels, data.percentiles(pixels)))
    more = [seen.attention.tolist(), seen.colours().tolist()] if pictured else []
    return seen.feature(feature).tolist(), seen.attention.mean(1).tolist(), more


def backbone(config: Channels):
    """The ViT, and the hash of its weights or what random ones are made from."""
    import torch
    import model
    device = runs.pick_device(config.device)
    if config.weights is not None:
        vit = model.load_backbone(config.weights, config.patch)
        return vit.eval().to(device), [digest(Path(config.weights)), config.patch]
    torch.manual_seed(config.seed)
    vit = model.ViT(config.dim, config.depth, config.heads, config.patch, layerscale=1.0)   # 1e-5: all alike
    return vit.eval().to(device), [config.seed, vit.architecture]


# -------------------------------------------------------------------------------------------------- command

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
    sections: dict[type, list[str]] = {}
    for name, hint in typing.get_type_hints(cls).items():
        for part in filter(is_dataclass, (hint, *typing.get_args(hint))):
            sections.setdefault(part, []).append(name)
    keys = "".join(f"\n\nKeys in {' and '.join(names)}:\n{runs.describe(part)}"
                   for part, names in sections.items())
    usage = f"python evaluate.py {verb} CONFIG.yaml [key=value ...]"
    runs.script(f"{usage}\n\n{measure.__doc__}{keys}", cls, run, rest)


if __name__ == "__main__":
    sys.exit(runs.guarded(lambda: main(sys.argv[1:])))
