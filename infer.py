"""Find the cells in images: python infer.py img.tif [more files, folders, globs] [out=DIR] [key=value ...]

    python infer.py                                   the demo images
    python infer.py plate1/ "scans/*.tif" out=cells   folders (every image in them) and globs
    python infer.py img.tif channels=DNA,AGP diameter=auto geojson=true
    python infer.py s3://bucket/plate out=s3://bucket/cells shard=3/16     the third of 16 equal parts (slurm/array.sh)
    python infer.py export out=dinocell.onnx          the network for other programs; `export --help` has its keys

For each image NAME it writes into out=

    NAME_labels.tif      every cell its own number, 0 is background (uint16; uint32 past 65,535 cells and over some 2,500 px)
    NAME_cells.csv       one row per cell: place, size, shape, intensity per channel, neighbours; in µm where known
    NAME_overlay.png     the image with coloured outlines
    NAME_distance.tif, NAME.geojson (QuPath), NAME_rois.zip (ImageJ)      with distance=, geojson=, rois=true
    summary.csv          one row per image: cells, mean area, confluency, kind, seconds

With --check it says what there is to do, and stops.
Results that exist are kept unless overwrite=true, so that the same command goes on where it stopped.
Channels, planes and time points are counted from 1. Reading from S3 is anonymous unless signed=true; writing uses
your AWS credentials. A shard writes summary_3_of_16.csv.
"""
from __future__ import annotations

import csv
import glob
import itertools
import math
import os
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path, PurePath
from typing import Literal

import numpy as np

import export
import remote
import runs

SUFFIXES = (".tif", ".tiff", ".btf", ".png", ".jpg", ".jpeg", ".npy")
OURS = ("_labels", "_overlay", "_distance")                                    # ends of names that are results
THEIRS = ("_cells", "_masks", "_nuclei")                                       # and labels of others, where the image is there too
PICTURE = 4096                                                                 # px, longest side of an overlay
HALO = 256                                                                     # px around a block, at least
TILE = 512                                                                     # px, of label files written in blocks


@dataclass(frozen=True)
class Config:
    out: str = "results"                            # folder for all results, or s3://bucket/folder
    weights: str = "default"                        # file, or the name of one in final_models/ (tiny)
    channels: tuple[str, ...] | None = None         # names or numbers, one to three: what the network sees; null: all
    plane: int | None = None                        # which z plane of a stack
    time: int | None = None                         # which time point of a stack
    diameter: str | None = None                     # how wide cells are here: 40 (px), 12um, auto; null: as trained
    peak: float | None = None                       # a cell's marker lies above this distance; null: the weights' own
    fill: float | None = None                       # a cell reaches down to this distance; null: the weights' own
    depth: float | None = None                      # a valley so deep parts two cells; 0: one down to peak; null: the weights' own
    smooth: float | None = None                     # px, Gaussian over the map before the watershed; null: the weights' own
    shape: float | None = None                      # added per px inside a cell, so that necks part; null: the weights' own
    min_area: int | None = None                     # px, smaller cells are dropped; null: the weights' own
    kind: str | None = None                         # taken as: a part of a training set's name, or shared; null: by what it shows
    border: Literal["keep", "drop"] = "keep"        # drop: leave out cells cut by the edge of the image
    near: float | None = None                       # px, neighbours are counted within this distance; null: a cell's width
    geojson: bool = False                           # polygons for QuPath
    rois: bool = False                              # ImageJ ROI zip
    distance: bool = False                          # the distance map the network predicts
    overlay: bool = True                            # the picture
    tile: int | None = None                         # px, side of the network's tiles; null: as trained
    overlap: int | None = None                      # px shared by tiles; null: a cell's width, from an eighth to half the tile
    batch: int | None = None                        # tiles at once; null: 4 on the CPU, 32 on a GPU
    block: int = 2048                               # px, larger images are worked off in blocks of this side
    pattern: str = "*"                              # which files of a folder, such as *_w1.tif
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU if there is one
    overwrite: bool = False                         # make results anew
    shard: str = "1/1"                              # which part of the images: 3/16
    endpoint: str | None = None                     # URL of another S3 server than Amazon's
    signed: bool = False                            # read from S3 with your AWS credentials; public buckets need none

    def __post_init__(self):
        for name in ("peak", "fill", "depth"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name}={value:g}: expected a distance from 0 to below 1")
        if self.smooth is not None and not 0 <= self.smooth <= 20:
            raise ValueError(f"smooth={self.smooth:g}: expected 0 to 20 px")
        if self.shape is not None and not 0 <= self.shape <= 1:
            raise ValueError(f"shape={self.shape:g}: expected 0 to 1 per px")
        if self.peak is not None and self.fill is not None and self.fill > self.peak:
            raise ValueError(f"fill={self.fill:g} is above peak={self.peak:g}: cells would end above their markers")
        for name in ("tile", "batch", "block", "plane", "time"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected 1 or more")
        if self.near is not None and not 0 <= self.near < math.inf:
            raise ValueError(f"near={self.near:g}: expected a distance of 0 px or more")
        if self.min_area is not None and self.min_area < 0:
            raise ValueError(f"min_area={self.min_area}: expected 0 px or more")
        if self.diameter not in (None, "auto"):
            parse_diameter(self.diameter, 1.0, None)
        runs.part_of(self.shard)


def main(config: Config, files: list[str], check: bool = False) -> int:
    root = Path(__file__).resolve().parent
    found = find_images(files or [str(root / "demo" / "*.png")], config)
    part, parts = runs.part_of(config.shard)
    mine = {path: found[path] for path in sorted(found, key=str)[part - 1::parts]} if parts > 1 else found
    if not mine:
        print(f"shard {config.shard}: none of the {len(found)} images")
        return 0
    table = "summary.csv" if parts == 1 else f"summary_{part}_of_{parts}.csv"
    weights = find_weights(config.weights, root / "final_models")
    if check:
        print(f"{len(mine)} of {len(found)} images, the first {next(iter(mine))}\n"
              f"weights {weights}\nresults into {config.out}")
        return 0
    if not remote.is_remote(config.out):
        new = not Path(config.out).exists()
        out = prepare(Path(config.out))
        try:
            return segment_all(mine, remote.Shelf(out), table, weights, config)
        finally:
            if new and parts == 1 and not any(out.iterdir()):            # nothing came of it
                out.rmdir()
    with remote.open_shelf(config.out, [table], config.endpoint) as shelf:
        return segment_all(mine, shelf, table, weights, config)


def segment_all(found: dict[Path | str, str], shelf: remote.Shelf, table: str, weights: Path, config: Config) -> int:
    """Those images that have no results yet; one that cannot be done does not stop the others."""
    todo = {path: name for path, name in found.items() if config.overwrite or not shelf.has(results(name, config))}
    kept, failed, megapixels, seconds = len(found) - len(todo), [], 0.0, 0.0
    taken: Counter = Counter()                                # images done of each kind
    if todo:
        from tqdm import tqdm                                 # what follows needs torch: half the start-up time
        import kinds
        import model
        from images import TOLD
        device = runs.pick_device(config.device)
        net = model.load(weights).ready(device)
        if config.kind:                                       # one that there is not: said before the first image
            config = replace(config, kind=kinds.named(net, config.kind))
        summary, start = Summary(shelf.folder / table), time.perf_counter()
        with (runs.stop_signals() as stop, tqdm(total=len(todo), unit="image", delay=1, file=sys.stderr, smoothing=0.05,
              bar_format="{l_bar}{bar}| {n:.2f}/{total} images [{elapsed}<{remaining}]") as bar):
            for count, (path, file) in enumerate(remote.fetched(list(todo), config.endpoint, config.signed)):
                def progress(share: float) -> None:
                    bar.update(count + share - bar.n)
                if stop:
                    bar.clear()
                    print("stopped; the same command goes on from here", file=sys.stderr)
                    return runs.REQUEUE
                try:
                    if isinstance(file, OSError):
                        raise file
                    row = segment_file(file, todo[path], shelf.folder, net, config, progress)
                except (ValueError, OSError) as error:        # this image's fault: the others are done all the same
                    if len(found) == 1:
                        raise
                    say(f"warning: {runs.sentence(error).replace(str(file), str(path))}")
                    failed.append(str(path))
                    continue
                if not taken and device == "cpu" and config.weights == "default" and weights.stem == "dinocell_s8":
                    say("no GPU: weights=tiny is three times as fast, and hardly less accurate")
                summary.add(row)
                shelf.deliver()
                taken[row["kind"]] += 1
                megapixels += row["height"] * row["width"] / 1e6
                bar.update(count + 1 - bar.n)
            bar.clear()                                       # a warning draws it before its second; close() then leaves it
        seconds = time.perf_counter() - start
    if done := taken.total():
        print(f"{done} image{'s' * (done != 1)}, {megapixels:.3g} megapixels in {seconds:.1f} s "
              f"({done / seconds:.3g} images/s, {megapixels / seconds:.3g} MP/s) with {weights.name} -> {config.out}")
        if len(taken) > 1:
            named = ", ".join(f"{n} as {kind}" for kind, n in taken.most_common())
            print(f"decoder and watershed chosen by what the images show, for {named}; kind= gives all the same")
        for notice, count in TOLD.items():
            if count > 1:
                print(f"{notice}: {count} images", file=sys.stderr)
    if kept:
        print(f"{kept} of {len(found)} images have their results in {config.out} already; overwrite=true makes them anew")
    if failed:
        raise ValueError(f"{len(failed)} of {len(found)} images could not be done: {', '.join(failed)}")
    return 0


# -------------------------------------------------------------------------------------------- one image

def segment_file(path: Path, name: str, out: Path, net, config: Config, progress=None, clock=None) -> dict:
    """Segment one image and write its results; returns its row of the summary."""
    import tifffile
    import cells
    import data
    import images
    import kinds
    import overlay
    import segment
    start, clock = time.perf_counter(), Counter() if clock is None else clock
    with data.open_image(path, config.channels, config.plane, config.time) as source:
        C, H, W = source.shape
        if C > 3:
            raise ValueError(f"{path}: has {C} channels ({', '.join(source.channels or map(str, range(1, C + 1)))}); "
                             "choose what the network sees, up to three, with channels=1,2 or by name")
        with segment.timed(clock, "read"):
            limits = data.percentiles(source, net.settings.low, net.settings.high)
        for notice in source.notices:                          # now, for all pixels have been seen
            if said := images.told(path, notice):
                say(said)
        options = dict(limits=limits, peak=config.peak, fill=config.fill, depth=config.depth, smooth=config.smooth,
                       shape=config.shape, kind=config.kind, tile=config.tile, overlap=config.overlap, batch=config.batch)
        diameter, scale = choose_size(config, source, net, options, path)
        with segment.timed(clock, "network"):
            kind = options["kind"] = segment.kind_of(source, net, kind=config.kind, diameter=diameter, scale=scale, limits=limits)
        zoom = scale * segment.scale_for(diameter, net, kind)  # network px per image px
        reduce = -(-max(H, W) // PICTURE)                      # the overlay is reduced by this whole number
        wide = (kinds.settings_of(net, kind).diameter or 40) / zoom            # px, a cell of this kind
        near = wide if config.near is None else config.near
        side = max(1, int(config.block / max(zoom, 1)) // reduce) * reduce      # of blocks; enlarged, they keep their memory
        columns, polygons, labelled = [], [], 0
        small = (-(-H // reduce), -(-W // reduce))
        picture = (np.zeros((C, *small), source.dtype), np.zeros(small, np.int32)) if config.overlay else None
        distance = np.zeros((H, W), np.float16) if config.distance else None

        def walk():
            """Every block measured; yields what the label file needs."""
            nonlocal labelled
            for block in segment.blocks(source, net, diameter=diameter, scale=scale, min_area=config.min_area,
                                        border=config.border, block=side, halo=max(HALO, round(4 * max(near, wide))),
                                        clock=clock, progress=progress, **options):
                with segment.timed(clock, "read"):
                    pixels = source.region(*edges(block.view))
                with segment.timed(clock, "measure"):
                    labelled += np.count_nonzero(block.labels)
                    top, bottom, left, right = edges(block.view)
                    rows = cells.table(block.local, pixels, channels=source.channels or source.numbers, pixel_size=source.pixel_size,
                                       near=near, ids=block.new, origin=(top, left),
                                       edges=(top == 0, left == 0, bottom == H, right == W))
                    columns.append({**rows, "id": block.ids[rows["id"]]})
                    if config.geojson or config.rois:
                        mine = np.zeros_like(block.ids)
                        mine[block.new] = block.ids[block.new]
                        polygons.append(cells.polygons(mine[block.local], (top, left)))
                    if picture is not None:                    # blocks are multiples of `reduce`: no seams here either
                        part = overlay.reduced(pixels[(slice(None), *block.inner)], block.labels, reduce)
                        place = tuple(slice(c.start // reduce, -(-c.stop // reduce)) for c in block.core)
                        picture[0][(slice(None), *place)], picture[1][place] = part
                    if distance is not None:
                        distance[block.core] = block.distance
                yield block.core, block.labels

        save_labels(out / f"{name}_labels.tif", (H, W), walk(), source.pixel_size, clock)
    with segment.timed(clock, "write"):
        table = {key: np.concatenate([part[key] for part in columns]) for key in columns[0]}
        cells.write_csv(out / f"{name}_cells.csv", table)
        if picture is not None:
            overlay.write_png(out / f"{name}_overlay.png", overlay.overlay(*picture))
        if distance is not None:
            with runs.replacing(out / f"{name}_distance.tif") as beside:
                tifffile.imwrite(beside, distance.astype(np.float32), compression="zlib", photometric="minisblack")
        shapes = [pair for found in polygons for pair in found.items()]
        if config.geojson:
            cells.write_geojson(out / f"{name}.geojson", shapes, table)
        if config.rois:
            cells.write_rois(out / f"{name}_rois.zip", shapes)
    n = len(table["id"])
    row = {"image": name, "height": H, "width": W, "cells": n,
           "mean_area_px": round(float(table["area_px"].mean()), 2) if n else "",
           "confluency": round(labelled / (H * W), 4), "scale": round(zoom, 4), "kind": kind,
           "seconds": round(time.perf_counter() - start, 2)}
    if source.pixel_size:
        row["mean_area_um2"] = round(float(table["area_um2"].mean()), 3) if n else ""
    return row


def save_labels(path: Path, size: tuple[int, int], parts, pixel_size: float | None, clock: Counter) -> None:
    """One block: a plain TIFF. Several: a tiled BigTIFF that grows with them, a band of blocks in memory at a time."""
    import data
    import segment
    H, W = size
    core, labels = next(parts)
    if core == (slice(0, H), slice(0, W)):
        list(parts)                                           # no further block: lets the walk come to its end
        with segment.timed(clock, "write"):
            data.write_labels(path, labels, pixel_size)
        return

    def tiles():
        rows = np.zeros((0, W), np.uint32)                    # not yet written
        for place, part in itertools.chain([(core, labels)], parts):
            top, bottom = place[0].start, place[0].stop
            if place[1].start == 0:
                rows = np.concatenate((rows, np.zeros((bottom - top, W), np.uint32)))
            rows[len(rows) - (bottom - top):, place[1]] = part
            if place[1].stop == W:
                while len(rows) >= TILE or (len(rows) and bottom == H):
                    yield from (rows[:TILE, x:x + TILE] for x in range(0, W, TILE))
                    rows = rows[TILE:]

    data.write_label_tiles(path, size, tiles(), (TILE, TILE), pixel_size)


def choose_size(config: Config, source, net, options: dict, path: Path) -> tuple[float | None, float]:
    """(how wide cells are, px, where that is known; network px per image px, on top of what follows from it)"""
    import segment
    settings = net.settings
    if config.diameter is None:
        if source.pixel_size and settings.pixel_size:
            return None, segment.scale_for(settings.diameter * settings.pixel_size / source.pixel_size, net)
        return segment.look(source, net, options["limits"]) if net.size is not None else None, 1.0
    if config.diameter == "auto":
        diameter = segment.find_diameter(source, net, **options)
        if diameter is None:
            say(f"{path}: diameter=auto found no cells to measure; taking the image as it is")
    else:
        diameter = parse_diameter(config.diameter, source.pixel_size, path)
    return diameter, 1.0


def parse_diameter(text: str, pixel_size: float | None, path: Path | None) -> float:
    """'40' px or '12um' -> px."""
    match = re.fullmatch(r"(\d+\.?\d*)\s*(px|um|µm|μm)?", text)
    if not match or not float(match[1]):
        raise ValueError(f"diameter={text}: expected px (40), µm (12um) or auto")
    if match[2] in (None, "px"):
        return float(match[1])
    if pixel_size is None:
        raise ValueError(f"{path}: diameter={text} is in µm, but the file does not say how large a pixel is; give px")
    return float(match[1]) / pixel_size


def say(text: str) -> None:
    """A line on stderr, above the progress bar if there is one."""
    from tqdm import tqdm
    tqdm.write(text, file=sys.stderr)


def edges(view: tuple[slice, slice]) -> tuple[int, int, int, int]:
    return view[0].start, view[0].stop, view[1].start, view[1].stop


# ------------------------------------------------------------------------------------- files in and out

def find_images(arguments: list[str], config: Config) -> dict[Path | str, str]:
    """Image -> name of its results. Folders are searched whole; results of earlier runs are no images."""
    found: dict[Path | str, str] = {}
    results_of_named = {Path(argument).stem + end for argument in arguments for end in OURS}
    for argument in arguments:
        if not argument:
            raise ValueError("an empty file name among the images; is a variable of the shell empty?")
        path = Path(argument)
        if remote.is_remote(argument) and glob.has_magic(argument):
            raise ValueError(f"{argument}: on S3 give the folder, and pattern={path.name} beside it")
        if remote.is_remote(argument) and path.suffix.lower() in SUFFIXES:
            found[argument] = path.stem
        elif remote.is_remote(argument) or path.is_dir():
            if remote.is_remote(argument):
                below = remote.find(argument, config.endpoint, config.signed)
            else:
                below = {p: str(p.relative_to(path)) for p in sorted(path.rglob("*")) if p.is_file()}
            below = images_among({p: name for p, name in below.items() if fnmatch(Path(name).name, config.pattern)})
            if not below:
                raise FileNotFoundError(f"{argument}: no image in this folder ({', '.join(SUFFIXES)}; pattern={config.pattern}; "
                                        f"names with {', '.join(OURS)} are results)")
            found.update((p, "_".join(Path(name).with_suffix("").parts)) for p, name in below.items())
        elif path.exists() or not glob.has_magic(argument):
            if not path.exists():
                raise FileNotFoundError(f"{argument}: no such file or folder")
            if path.stem not in results_of_named:             # a shell that wrote *.tif out names them, too
                found[path] = path.stem
        else:
            matches = images_among({Path(p): Path(p).name for p in sorted(glob.glob(argument, recursive=True)) if Path(p).is_file()})
            if not matches:
                raise FileNotFoundError(f"{argument}: no image matches ({', '.join(SUFFIXES)}; names with {', '.join(OURS)} are results)")
            found.update((p, p.stem) for p in matches)
    owner: dict[str, Path | str] = {}
    for path, name in found.items():
        if name in owner:
            raise ValueError(f"{owner[name]} and {path} would both write {name}_labels.tif; "
                             "run them one after the other with different out=")
        owner[name] = path
    return found


def images_among(files: dict[Path | str, str]) -> dict[Path | str, str]:
    """Of {file: its path below the folder asked for} the images: nothing hidden, no results, no labels of an image that is there."""
    files = {p: name for p, name in files.items() if Path(name).suffix.lower() in SUFFIXES
             and not Path(name).stem.endswith(OURS) and not any(part.startswith(".") for part in PurePath(name).parts)}
    images = {Path(name).stem for name in files.values() if not Path(name).stem.endswith(THEIRS)}

    def labels(stem: str) -> bool:                            # a_masks or a_cp_masks, of a
        parts = stem.split("_")
        return stem.endswith(THEIRS) and any("_".join(parts[:n]) in images for n in range(1, len(parts)))
    return {p: name for p, name in files.items() if not labels(Path(name).stem)}


def results(name: str, config: Config) -> list[str]:
    return [f"{name}_labels.tif", f"{name}_cells.csv"] + [
        f for f, wanted in ((f"{name}_overlay.png", config.overlay), (f"{name}_distance.tif", config.distance),
                            (f"{name}.geojson", config.geojson), (f"{name}_rois.zip", config.rois)) if wanted]


def find_weights(name: str, folder: Path) -> Path:
    if name == "default":
        choices = [folder / f for f in ("dinocell_s8.pt", "dinocell_tiny.pt", "demo_synthetic.pt")]
    elif name.endswith(".pt") or "/" in name or Path(name).is_file():
        choices = [Path(name)]
    else:
        choices = [folder / f"{name}.pt", folder / f"dinocell_{name}.pt"]
    for path in choices:
        if path.exists():
            return path
    raise FileNotFoundError(f"no weights at {choices[0]}; train with train_seg.py or pass weights=FILE")


def prepare(out: Path) -> Path:
    """Make the folder, and find out now whether one may write there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".{os.getpid()}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"out={out}: cannot write there ({error.strerror}); choose another folder") from None
    return out


class Summary:
    """summary.csv, written anew after each image; rows of earlier runs stay."""

    def __init__(self, path: Path):
        self.path, self.rows = path, {}
        if path.exists():
            with open(path, newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file)
                if "image" not in (reader.fieldnames or ["image"]):
                    raise ValueError(f"{path}: no column 'image'; was it saved by another program? rename or remove it")
                self.rows = {row["image"]: row for row in reader}

    def add(self, row: dict) -> None:
        self.rows[row["image"]] = row
        names = list(dict.fromkeys(key for r in self.rows.values() for key in r))
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        with open(beside, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names, restval="")
            writer.writeheader()
            writer.writerows(self.rows.values())
        os.replace(beside, self.path)


def export_network(config: export.Config, files: list[str]) -> int:
    if files:
        raise ValueError(f"export: unexpected {files[0]}; the file to write is out=FILE.onnx, --help lists the keys")
    import model
    weights = find_weights(config.weights, Path(__file__).resolve().parent / "final_models")
    error = export.to_onnx(model.load(weights), config.out, config.tile, config.opset, config.half, config.kind)
    checked = "not compared with PyTorch: pip install onnxruntime" if error is None else f"within {error:.1e} of PyTorch"
    print(f"{weights.name} -> {config.out}, {Path(config.out).stat().st_size / 1e6:.1f} MB, {checked}")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["export"]:
        runs.script(export.__doc__, export.Config, export_network, sys.argv[2:])
    runs.script(__doc__, Config, main)
