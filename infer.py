"""Find the cells in images: python infer.py img.tif [more files, folders, globs] [key=value ...]

    python infer.py                                   the demo images
    python infer.py plate1/ "scans/*.tif" out=cells   folders (every image in them, but not in
                                                      folders that are links) and globs
    python infer.py img.tif channels=DNA,AGP diameter=auto geojson=true
    python infer.py slide.svs pixel_size=0.5 geojson=true      a slide, at the size that suits
    python infer.py s3://bucket/plate out=s3://bucket/cells shard=3/16     the third of 16 parts
    python infer.py stack.tif z=all                   cells through all slices of a stack
    python infer.py movie.tif time=all                tracks and divisions through all frames of a
                                                      movie; a folder of frames is one, too
    python infer.py export out=dinocell.onnx          the network for other programs; see
                                                      `export --help`

For each image NAME it writes into out=

    NAME_labels.tif      every cell its own number, 0 is background (uint16; uint32 past 65,535
                         cells and over some 2,500 px)
    NAME_cells.csv       one row per cell: place, size, shape (also in µm where known), intensity
                         per channel, neighbours; score, the probability that a cell is right,
                         where the weights have it
    NAME_overlay.png     the image with coloured outlines
    NAME_distance.tif, NAME.geojson (QuPath), NAME_rois.zip (ImageJ)
                         with distance=true, geojson=true, rois=true
    NAME_cells.npz       a vector per cell (ids, vectors, weights), with embed=true; with
                         channels=each one of each channel, side by side, and their names
    NAME_within.csv      one row per cell of within=: the nuclei found in it, their number and area
    summary.csv          one row per image: cells, mean area, confluency, diameter, seconds

A stack and a movie have all planes in NAME_labels.tif, one number a cell or track; NAME_cells.csv
has volumes or t, track, parent and age; the picture shows some planes side by side. Of a movie also

    NAME_tracks.csv      one row per track: parent, first and last frame, path, speed
    NAME_lineage.svg     who descends from whom
    NAME_trackmate.xml   for TrackMate in Fiji
    NAME_ctc/01_RES/     as the Cell Tracking Challenge has it

With --check it says what there is to do, and stops.
Results of the same image, settings and weights are kept unless overwrite=true: the same command
goes on where it stopped. NAME_labels.tif says inside how it was made. Channels, planes and time
points are counted from 1. Reading from S3 is anonymous unless signed=true; writing uses your AWS
credentials. A shard writes summary_3_of_16.csv; on S3 only shards may write into one folder at
once, and an image is known by its address, so that one that was replaced needs overwrite=true.
"""
from __future__ import annotations

import copy
import csv
import glob
import hashlib
import io
import math
import os
import re
import shutil
import sys
import tempfile
import time
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import runs
import s3

with runs.lazy():  # what needs torch: half the start-up time
    import numpy as np
    import torch
    import tqdm
    import yaml

    import cells
    import images
    import link
    import model
    import segment
    import vectors

OURS = ("_labels", "_overlay", "_distance")  # ends of names that are results
PLANNED = ("peak", "fill", "depth", "smooth", "shape", "min_area", "border", "near", "tile",
           "overlap", "batch", "block", "embed")
# what changes the cells and their table
SETTINGS = ("channels", "plane", "z", "time", "spacing", "max_distance", "gap", "level",
            "pixel_size", "diameter", "labels", "min_score", *PLANNED[:10], "within")
PICTURE = 4096  # px, longest side of an overlay
SHOWN = 6       # planes in the overlay of a stack
SAMPLED = 1 << 25  # px, planes that say how bright a stack is have so many together


@dataclass(frozen=True)
class Config:
    out: str = "results"  # folder for all results, or s3://bucket/folder
    weights: str = "default"  # file, or the name of one in final_models/ (tiny)
    # names or numbers, one to three: what the network sees; null: all; each: cells are found in the
    # mean of all channels, and embed=true gives a vector of each channel
    channels: tuple[str, ...] | None = None
    plane: runs.Count | None = None  # which z plane of a stack
    z: Literal["all"] | runs.Count | None = None  # all: every plane, with linked cells
    # which time point of a stack; all: every one, with tracks
    time: runs.Count | Literal["all"] | None = None
    spacing: runs.Positive | None = None  # µm from one plane to the next; null: as the file says
    # px, a cell goes no further in a frame; null: from the median displacement
    max_distance: runs.Positive | None = None
    gap: runs.Whole | None = None  # frames that a track may miss; null: 2
    # of a slide that is stored in several sizes: which, from 1, the largest; null: pixel_size's
    level: runs.Count | None = None
    pixel_size: runs.Positive | None = None  # µm: the coarsest size with these; null: level 1
    # how large cells are here: 40 (px), 12um or auto; null: auto if the weights can tell
    diameter: str | None = None
    # a cell's marker lies above this distance; null: the weights' own
    peak: runs.Distance | None = None
    # a cell reaches down to this distance; null: the weights' own
    fill: runs.Distance | None = None
    # a valley so deep parts two cells; 0: one down to peak; null: the weights' own
    depth: runs.Distance | None = None
    # px, Gaussian over the map before the watershed; null: the weights' own
    smooth: Annotated[float, runs.within(0, 20)] | None = None
    # added per px inside a cell, so that necks part; null: the weights' own
    shape: runs.Share | None = None
    min_area: runs.Area | None = None  # px, smaller cells are dropped; null: the weights' own
    min_score: runs.Share | None = None  # drop cells less likely right (column score); null: none
    border: Literal["keep", "drop"] = "keep"  # drop: leave out cells cut by the edge of the image
    # px, neighbours are counted within this distance; null: a cell's diameter
    near: runs.Reach | None = None
    geojson: bool = False  # polygons for QuPath
    rois: bool = False  # ImageJ ROI zip
    distance: bool = False  # the distance map the network predicts
    overlay: bool = True  # the picture
    embed: bool = False  # a vector per cell, to compare or sort cells by
    # label image of the cells whose nuclei are found here, or a folder with NAME_labels.tif
    within: str | None = None
    tile: runs.Side | None = None  # px, side of the network's tiles; null: as trained
    # px shared by tiles; null: a cell's diameter, from an eighth to half the tile
    overlap: runs.Whole | None = None
    batch: runs.Batch | None = None  # tiles at once; null: 6 on the CPU, 32 on a GPU
    block: runs.Count = 2048  # px, larger images are worked off in blocks of this side
    pattern: str = "*"  # which files of a folder, such as *_w1.tif
    device: runs.Device = "auto"  # auto: the GPU if there is one
    overwrite: bool = False  # make results anew
    shard: str = "1/1"  # which part of the images: 3/16
    # folder with NAME_labels.tif, corrected by hand say: these cells are measured, none are found;
    # of a stack or movie planes as NAME_z03_labels.tif, NAME_t007_labels.tif: others are found
    labels: str | None = None
    signed: bool = False  # read from S3 with your AWS credentials; public buckets need none

    def __post_init__(self):
        if self.peak is not None and self.fill is not None and self.fill > self.peak:
            raise ValueError(f"fill={self.fill:g}: expected at most peak={self.peak:g}")
        if self.level and self.pixel_size:
            raise ValueError(f"level={self.level} and pixel_size={self.pixel_size:g}: expected one")
        parse_diameter(self.diameter, 1.0, None)
        if isinstance(self.z, int):
            raise ValueError(f"z={self.z}: expected all; for one plane give plane={self.z}")
        if self.z and self.time == "all":
            raise ValueError("z=all and time=all: choose one plane=3 or one time=3")
        if self.z and self.border == "drop":
            raise ValueError("z=all and border=drop: slices would be dropped, not cells; leave it "
                             "out, and drop what touches_border in NAME_cells.csv")
        if self.z and self.plane:
            raise ValueError(f"z=all and plane={self.plane}: expected one of the two")
        for key in ("geojson", "rois", "distance", "embed", "within"):
            if self.linked and getattr(self, key):
                raise ValueError(f"{key}= is for single planes; leave it out with z=all, time=all")
        if self.linked and self.each:
            raise ValueError("channels=each is for single planes; with z=all, time=all name up to "
                             "three, as channels=1,2")
        for key, value, axis in (("spacing", "z=all", "Z"), ("max_distance", "time=all", "T"),
                                 ("gap", "time=all", "T")):
            if getattr(self, key) is not None and self.linked != axis:
                raise ValueError(f"{key}={getattr(self, key):g}: goes with {value}; leave it out")
        runs.shard_of(self.shard)
        if self.within is not None and s3.is_remote(self.within):
            raise ValueError(f"within={self.within}: expected a file or folder here; copy it first")

    @property
    def linked(self) -> str:
        """The axis along which cells are linked: Z, T or none."""
        return "Z" if self.z else "T" if self.time == "all" else ""

    @property
    def each(self) -> bool:
        """Whether the network sees the mean of all channels, and then each alone."""
        return self.channels == ("each",)

    @property
    def frame(self) -> int | None:
        """The one time point that is wanted."""
        return None if self.time == "all" else self.time

    @property
    def size(self) -> images.Level:
        """Which size of a slide, as open_image takes it."""
        return images.level_of(self.pixel_size) if self.pixel_size else self.level or 1


def main(config: Config, files: list[str], check: bool = False) -> int:
    root = Path(__file__).resolve().parent
    unreadable: list[OSError] = []
    mine = found = find_images(files or [str(root / "demo" / "*.png")], config, unreadable)
    for error in unreadable:
        print_line(f"warning: {runs.error_sentence(error)}; nothing in this folder is done")
    part, parts = runs.shard_of(config.shard)
    if parts > 1:
        mine = {path: found[path] for path in sorted(found, key=str)[part - 1::parts]}
    if config.labels is not None:
        check_label_keys(config)
        whole = len(mine)
        mine = {path: name for path, name in mine.items() if given_files(name, config)["labels"]}
        if 0 < len(mine) < whole:
            print_line(f"labels={config.labels}: {whole - len(mine)} of {whole} images have no "
                       "NAME_labels.tif there and are left out")
        if not mine:
            end = f"_{config.linked.lower()}*" if config.linked else ""
            raise FileNotFoundError(f"labels={config.labels}: no NAME{end}_labels.tif for any of "
                                    f"the {len(found)} images")
    if not mine:
        print(f"shard {config.shard}: none of the {len(found)} images")
        return 0
    table = "summary.csv" if parts == 1 else f"summary_{part}_of_{parts}.csv"
    weights = model.find_weights(config.weights)
    if check:
        print(f"{len(mine)} of {len(found)} images, the first {next(iter(mine))}",
              f"weights {weights}", f"results into {config.out}", sep="\n")
        return 0
    if not s3.is_remote(config.out):
        out = Path(config.out)
        new = not out.exists()
        try:
            out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=out).close()
        except OSError as error:
            raise OSError(f"out={out}: cannot write there ({error.strerror}); choose another folder"
                          ) from None
        runs.sweep_temporary(out)
        try:
            code = infer_all(mine, s3.OutputFolder(out), table, weights, config)
        finally:
            if new and parts == 1 and not any(out.iterdir()):  # nothing came of it
                out.rmdir()
    else:
        with s3.open_s3_output(config.out, [table]) as shelf:
            code = infer_all(mine, shelf, table, weights, config)
    return code or int(bool(unreadable))


def infer_all(found: Images, shelf: s3.OutputFolder, table: str, weights: Path,
              config: Config) -> int:
    """Segment the images that have no results yet; one that fails does not stop the others."""
    work, code = Work(shelf, Summary(shelf.folder / table), made_with(weights, config)), 0
    if todo := work.without_results(found, config):
        net = model.load(weights).ready(runs.pick_device(config.device))
        if config.diameter == "auto" and net.size is None:
            raise ValueError(f"diameter=auto: {weights.name} cannot tell how large cells are; give "
                             "px (40) or µm (12um)")
        if config.min_score is not None and not net.settings.score:
            raise ValueError(f"min_score={config.min_score:g}: {weights.name} has no calibrated "
                             "score; `evaluate.py calibrate` writes one into a copy")
        if (net.mean.device.type == "cpu" and config.weights == "default"
                and weights.stem == "dinocell_s8"):
            print_line("no GPU: weights=tiny is five times as fast, and a little less accurate")
        start = time.perf_counter()
        try:
            code = work.do(todo, net, config, alone=len(found) == 1)
        finally:
            with suppress(OSError):  # the next run brings the rows back
                work.summary.write()
        seconds = time.perf_counter() - start
    else:
        work.summary.write()
    if rows := work.summary.fresh.values():
        licence, done = net.settings.licence, len(rows)
        terms = f" (weights under {licence})" if licence != "MIT" else ""
        size = sum(row["height"] * row["width"] * row.get("planes", 1) for row in rows) / 1e6
        print(f"{done} image{'s' * (done != 1)}, {size:.3g} megapixels in {seconds:.1f} s "
              f"({done / seconds:.3g} images/s, {size / seconds:.3g} MP/s) with "
              f"{weights.name}{terms} -> {config.out}")
        if hint := hint_at_one_diameter(rows, config):
            print(hint)
        for notice, count in images.TOLD.items():
            if count > 1:
                print(f"{notice}: {count} images", file=sys.stderr)
    if work.kept:
        print(f"{work.kept} of {len(found)} images have their results in {config.out} already; "
              "overwrite=true makes them anew")
    if work.failed:
        raise ValueError(f"{len(work.failed)} of {len(found)} images could not be done: "
                         f"{', '.join(work.failed)}")
    return code


def hint_at_one_diameter(rows: Iterable[dict], config: Config) -> str:
    """What to do where more than a quarter of the judged diameters is beyond 1.25 of the median, or
    "": in a folder of one magnification and one kind of cell the median is mostly nearer."""
    seen = sorted(row["diameter_px"] for row in rows if row["cells"])
    if len(seen) < 5 or config.diameter not in (None, "auto") or config.labels is not None:
        return ""
    middle = seen[len(seen) // 2]
    if sum(not 0.8 <= width / middle <= 1.25 for width in seen) <= len(seen) / 4:
        return ""
    return (f"the cells look {seen[0]:.3g} to {seen[-1]:.3g} px wide; if all images have one "
            f"magnification, measure one and give its width: diameter={middle:.3g} overwrite=true "
            "for the median")


class Work:
    """Images that are done, that have their results, that failed."""

    def __init__(self, shelf: s3.OutputFolder, summary: Summary, made: dict):
        self.shelf, self.summary, self.made = shelf, summary, made
        self.kept = 0
        self.failed: list[str] = []

    def without_results(self, found: Images, config: Config) -> Images:
        """The images to do. Results of another image or of other settings are not touched."""
        if config.overwrite:
            return found
        names = {name: result_files(name, config) for name in found.values()}
        there = [name for name in names if self.shelf.has(names[name][:1])]
        with ThreadPoolExecutor(8) as readers:  # from S3 each takes a round trip
            heads = readers.map(partial(self.shelf.head, size=images.RECORD),
                                (names[name][0] for name in there))
            records = dict(zip(there, map(images.label_record, heads), strict=True))
        todo: Images = {}
        others: dict[str, list[Path | str]] = defaultdict(list)  # reason -> images
        for path, name in found.items():
            record = records.get(name)
            try:
                reason = "" if record is None else result_difference(record, path, name, self.made,
                                                                     config)
            except OSError as error:                    # a link that leads nowhere
                self.fail(error, path, error, len(found) == 1)
                continue
            if name not in records and (strange := self.strange_file(names[name][1:])):
                reason = f"{strange} beside it is there and is none of this program's"
            if reason:
                others[reason].append(path)
            elif record and self.shelf.has(names[name]) and (
                    set(names[name][1:]) <= set(record.get("files", names[name]))):
                self.kept += 1
                self.summary.rows[name] = record["row"]
            else:
                todo[path] = name
        for reason, paths in others.items():
            first = Path(config.out) / names[found[paths[0]]][0]
            more = f" and of {len(paths) - 1} other images" * (len(paths) > 1)
            text = f"{first}{more}: {reason}; overwrite=true makes it anew, another out= keeps both"
            if len(found) == 1:
                raise ValueError(text)
            print_line(f"warning: {paths[0]}: {text}")
            self.failed += map(str, paths)
        return todo

    def strange_file(self, names: list[str]) -> str | None:
        """A table or outlines that somebody else made; ours have measures in px."""
        for name in names:
            if name.endswith(("_cells.csv", ".geojson")) and self.shelf.has([name]):
                head = self.shelf.head(name, size=1 << 20)
                if b"_px" not in head and not head.rstrip().endswith(b'"features":[]}'):
                    return name
        return None

    def fail(self, error: Exception, path: Path | str, file: Path | OSError, alone: bool) -> None:
        """Say why an image is not done; raise it if the image is alone."""
        if alone:
            raise error
        reason = "out of memory" if runs.is_out_of_memory(error) else runs.error_sentence(error)
        if isinstance(file, Path):
            reason = reason.replace(str(file), str(path))
        print_line("warning: " + reason if str(path) in reason else f"warning: {path}: {reason}")
        self.failed.append(str(path))

    def do(self, todo: Images, net, config: Config, alone: bool) -> int:
        """Exit code, REQUEUE after a signal."""
        form = "{l_bar}{bar}| {n:.2f}/{total} images [{elapsed}<{remaining}]"
        with (runs.stop_signals() as stop,
              tqdm.tqdm(total=len(todo), delay=1, file=sys.stderr, smoothing=0.05,
                        bar_format=form) as bar):
            def show(count: int, share: float) -> None:
                bar.update(count + share - bar.n)

            for count, (path, file) in enumerate(s3.download(list(todo), config.signed)):
                try:
                    if stop:
                        raise runs.Stopped
                    if isinstance(file, OSError):
                        raise file
                    how = {**self.made, "source": result_source(path, file, config.pattern),
                           "given": given_labels(todo[path], config),
                           "files": self.files_beside(todo[path], config)}
                    job = (file, todo[path], self.shelf.folder, net, config, how,
                           partial(show, count))
                    row = infer_stack(*job, stop) if config.linked else segment_file(*job)
                    self.shelf.withdraw(self.old_files(todo[path], config))
                    self.shelf.deliver()
                    self.summary.add(row)
                except runs.Stopped:
                    bar.clear()
                    if config.linked and s3.is_remote(config.out) and not self.summary.fresh:
                        raise ValueError(f"{path}: stopped; its planes are not kept on S3, and it "
                                         "begins anew: give more time, or out= on a disk") from None
                    way = "; without overwrite=true" * (config.overwrite and not config.linked)
                    print(f"stopped; the same command goes on from here{way}", file=sys.stderr)
                    return runs.REQUEUE
                except (ValueError, OSError, MemoryError, RuntimeError) as error:
                    if isinstance(error, RuntimeError) and not runs.is_out_of_memory(error):
                        raise
                    if isinstance(error, OSError) and error.errno in runs.FULL:
                        raise self.full(error, len(todo) - count) from None
                    self.fail(error, path, file, alone)
                show(count, 1.0)
            bar.clear()  # a warning draws it before its second; close() then leaves it
        return 0

    def recorded_files(self, labels: str) -> list[str]:
        """What an image has beside its labels from before."""
        there = self.shelf.has([labels])
        return files_in_record(self.shelf.head(labels, images.RECORD)) if there else []

    def files_beside(self, name: str, config: Config) -> list[str]:
        """What lies beside the labels in the end: what is asked for and, where the same labels are
        made again, what was there."""
        labels, *asked = result_files(name, config)
        before = [] if config.overwrite else self.recorded_files(labels)
        return list(dict.fromkeys([*asked, *(file for file in before if self.shelf.has([file]))]))

    def old_files(self, name: str, config: Config) -> list[str]:
        """With overwrite=true what an image has from before, the labels first."""
        labels, *_ = result_files(name, config)
        there = config.overwrite and self.shelf.has([labels])
        return [labels, *self.recorded_files(labels)] if there else []

    def full(self, error: OSError, left: int) -> OSError:
        """An error that says where a disk is full, and how much the images left will need."""
        folder, done = self.shelf.folder, self.summary.fresh
        written = sum(file.stat().st_size for name in done
                      for file in folder.glob(f"{glob.escape(name)}[_.]*"))
        needed = f"; some {written / len(done) * left / 1e6:.3g} MB" if done else ""
        free = shutil.disk_usage(folder).free / 1e6
        return OSError(f"{error.filename or folder}: no space left on this disk, {free:.3g} MB free"
                       f"{needed} for the {left} images left; make room, then the same command "
                       "goes on")


# ------------------------------------------------------------------------------- how results came

def made_with(weights: Path, config: Config) -> dict:
    """The settings that change the cells, and the weights."""
    given = {key: getattr(config, key) for key in SETTINGS}
    return {"settings": {key: list(value) if isinstance(value, tuple) else value
                         for key, value in given.items() if value is not None},
            "weights": {"file": weights.name, "sha256": runs.digest(weights)[:16]}}


def _comparable(settings: dict) -> dict:
    """Settings that are spelt in one way; of labels the content is compared elsewhere."""
    return {key: _diameter_said(value) if key == "diameter" else
            True if key in ("labels", "within") else value
            for key, value in settings.items() if (key, value) != ("diameter", "auto")}


def _diameter_said(text: str) -> str:
    """20, 20.0 and 20px are one."""
    number = re.sub(r"[^\d.]", "", text)
    return f"{float(number):g}" + "um" * (not re.fullmatch(r"[\d.]+\s*(px)?", text))


def result_source(path: Path | str, file: Path, pattern: str) -> dict:
    """An image as results remember it: name, place (hashed, for results are shared), content."""
    size, modified = source_size(file, pattern)
    return {"file": str(path), "place": source_place(path), "bytes": size,
            "modified": None if s3.is_remote(path) else modified,
            "sha256": runs.digest(*source_files(file, pattern))}


def check_label_keys(config: Config) -> None:
    """Refuse keys that do nothing where labels are given; of a stack planes may have none."""
    keys = ("distance", "min_score") if config.linked else ("distance", "min_score", *PLANNED[:6])
    given = [f"{key}=" for key in keys if getattr(config, key) not in (None, False)]
    if given:
        raise ValueError(f"labels={config.labels}: leave out {' and '.join(given)}, which labels "
                         "that are given do not have")
    if not config.linked and Path(config.labels or "").resolve() == Path(config.out).resolve():
        raise ValueError(f"labels={config.labels}: is out= as well, where results would take the "
                         "place of what is given; choose another out=")


def given_files(name: str, config: Config) -> dict[str, list[Path]]:
    """The label files that are given for an image, by their key."""
    files: dict[str, list[Path]] = {"labels": [], "within": []}
    if config.labels is not None:
        end = f"_{config.linked.lower()}*" if config.linked else ""  # of single planes
        files["labels"] = sorted(Path(config.labels).glob(f"{glob.escape(name)}{end}_labels.tif"))
    if (around := around_file(name, config)) is not None and around.is_file():
        files["within"] = [around]
    return files


def given_labels(name: str, config: Config) -> dict[str, str]:
    """Digests of given_files()."""
    return {key: runs.digest(*(part for file in files for part in (file.name, file)))[:16]
            for key, files in given_files(name, config).items() if files}


def source_files(path: Path, pattern: str) -> list[Path]:
    """A file, or the images of a folder in natural order."""
    if not path.is_dir():
        return [path]
    files = images.image_files(path, pattern)
    kept = infer_images_among({file: file.relative_to(path).as_posix() for file in files})
    return [file for file in files if file in kept]


def source_size(path: Path, pattern: str) -> tuple[int, int | str]:
    """Bytes, and time of the last change (ns); of a folder a digest of names and states."""
    states = [(file.relative_to(path).as_posix(), (status := file.stat()).st_size,
               status.st_mtime_ns) for file in source_files(path, pattern)]
    size = sum(size for _, size, _ in states)
    return size, runs.digest(*states) if path.is_dir() else states[0][2]


def source_place(path: Path | str) -> str:
    return runs.digest(path if s3.is_remote(path) else str(Path(path).resolve()))[:16]


def result_difference(record: dict, path: Path | str, name: str, made: dict,
                      config: Config) -> str:
    """How results differ from those wanted, or nothing."""
    pattern = config.pattern
    if not record:
        return "is there and does not say how it was made"
    source = record["source"]
    same = there = source["place"] == source_place(path)
    if not s3.is_remote(path):
        size, modified = source_size(Path(path), pattern)
        same = source["bytes"] == size and (
            same and source["modified"] == modified
            or source["sha256"] == runs.digest(*source_files(Path(path), pattern)))
    if there and not same:
        return f"{path} has changed since"
    if not same:
        return f"comes from {source['file']}, which is another image than {path}"
    old, new = ({**_comparable(one["settings"]), "weights": one["weights"]["file"],
                 "their content": one["weights"]["sha256"]} for one in (record, made))
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if "their content" not in changed:
        changed = [key for key in changed if key != "weights"]  # a new name alone is nothing
    elif "weights" in changed:
        changed.remove("their content")  # one of the two is said
    if changed:
        return "was made with " + ", ".join(
            f"{key} {old.get(key, 'left out')} (now {new.get(key, 'left out')})" for key in changed)
    before, given = record.get("given", {}), given_labels(name, config)
    other = [f"{key}={getattr(config, key)}" for key in given if given[key] != before.get(key)]
    return "was made with other labels than now in " * bool(other) + ", ".join(other)


# ---------------------------------------------------------------------------------------- one image

def segment_file(path: Path, name: str, out: Path, net, config: Config, made: dict | None = None,
                 progress=None, clock=None) -> dict:
    """Segment one image and write its results, with how they were made; returns its row of the
    summary."""
    start, clock = time.perf_counter(), Counter() if clock is None else clock
    where = None if config.each else config.channels, config.plane, config.frame
    with images.open_image(path, *where, level=config.size) as source:
        if not config.each:
            check_infer_channels(path, source)
        pixels, tissue = source, None
        with segment.timed(clock, "read"):
            if source.levels > 1:  # a slide: its small picture tells
                with images.open_image(path, *where, level=images.overview_level) as small:
                    pixels = small.whole().pixels
                tissue = segment.tissue_map(pixels)
            limits = images.percentiles(pixels, net.settings.low, net.settings.high)
        print_notices(path, source, limits)  # now, for all pixels have been seen
        seen = segment.MeanOfChannels(source, limits) if config.each else source
        with segment.timed(clock, "network"):
            plan = plan_of(seen, path, net, config, tissue=tissue,
                           limits=segment.UNIT[:1] if config.each else limits)
        if config.each:
            plan = plan._replace(embed=net.types is not None)
        results = Results(out, name, source, plan, config, clock)
        given = None if config.labels is None else Path(config.labels, f"{name}_labels.tif")
        results.fill(seen, given, progress)
        if config.each and config.embed:
            with segment.timed(clock, "network"):
                results.add_vectors_of_channels(limits)
    return results.close(made, start)


def print_notices(path: Path, source: images.Source, limits: np.ndarray) -> None:
    """Print what was noticed of an image."""
    flat = [images.FLAT] if images.is_flat(limits) else []
    dark = [str(n) for n, (low, high) in zip(source.numbers, limits) if low == high]
    if source.lossy and dark and not flat:
        flat = [f"channel{'s' * (len(dark) > 1)} {' and '.join(dark)}: hardly any contrast beside "
                "the others, taken as none, for a JPEG mixes its colours"]
    for notice in (*source.notices, *flat):
        if said := images.image_notice(path, notice):
            print_line(said)


def check_infer_channels(path: Path, source: images.Source) -> None:
    C = source.shape[0]
    if C > 3:
        names = ", ".join(source.channels or map(str, range(1, C + 1)))
        raise ValueError(f"{path}: has {C} channels ({names}); choose up to three for the network "
                         "with channels=1,2 or by name")


def plan_of(source, path: Path, net, config: Config, **more) -> segment.Plan:
    return segment.plan_for(source, net,
                            diameter=parse_diameter(config.diameter, source.pixel_size, path),
                            **{key: getattr(config, key) for key in PLANNED}, **more)


class Results:
    """The files of one image: fed block by block, written when it is closed."""

    def __init__(self, out: Path, name: str, source, plan, config: Config, clock: Counter):
        C, H, W = source.shape
        self.around = around_of(name, config, source)  # file of the cells around
        self.out, self.name, self.source, self.config, self.clock = out, name, source, config, clock
        self.reduce = -(-max(H, W) // PICTURE)  # the overlay is reduced by this whole number
        # blocks of whole pixels of the overlay
        self.plan = plan._replace(block=max(1, plan.block // self.reduce) * self.reduce)
        small = (-(-H // self.reduce), -(-W // self.reduce))
        self.picture = ((np.zeros((C, *small), source.dtype), np.zeros(small, np.int32))
                        if config.overlay else None)
        self.distance = np.zeros((H, W), np.float16) if config.distance else None
        self.labels = images.LabelWriter(out / f"{name}_labels.tif", (H, W), source.pixel_size)
        self.columns: list[dict] = []
        self.vectors: list[np.ndarray] = []
        # cells of the whole image, where each channel is to be seen with them
        self.all = np.zeros((H, W), np.int32) if config.each and config.embed else None
        self.nesting = cells.Nesting()
        self.polygons: list[tuple] = []  # for rois
        place = (config.plane or 1) - 1, (config.frame or 1) - 1
        self.geojson = cells.GeoWriter(
            out / f"{name}.geojson", plan.net.type_names, source.reduced,
            place if any(place) else None) if config.geojson else None
        self.labelled = 0  # px
        self.unlikely: set[int] = set()  # cells below min_score

    def fill(self, seen, given: Path | None, progress=None) -> None:
        """Take all blocks of an image as the network sees it, or of the labels in a file."""
        if given is None:
            found = segment.blocks(seen, self.plan, self.clock, progress)
        else:
            labels = images.read_labels(given)
            if labels.shape != self.source.shape[1:]:
                raise ValueError(f"{given}: labels of {labels.shape}, expected "
                                 f"{self.source.shape[1:]} px, as {self.source.path} has")
            found = segment.blocks_of(labels, seen, self.plan)
        for block in found:
            self.add(block)

    def add(self, block: segment.Block) -> None:
        """Measure the cells of a block, and take over its part of labels and pictures."""
        (_, H, W), (rows, columns) = self.source.shape, block.view
        with segment.timed(self.clock, "read"):
            pixels = self.source.region(rows.start, rows.stop, columns.start, columns.stop)
        with segment.timed(self.clock, "measure"):
            score = self.scores(block)
            if self.config.min_score is not None:
                block, score = self.without_unlikely(block, score)
            self.labelled += int(np.count_nonzero(block.labels))
            origin = (rows.start, columns.start)
            table = cells.cell_table(
                block.local, pixels, channels=self.source.channels or self.source.numbers,
                pixel_size=self.source.pixel_size, near=self.plan.near, ids=block.new,
                origin=origin, edges=(rows.start == 0, columns.start == 0, rows.stop == H,
                                      columns.stop == W))
            table = {**table, "id": block.ids[table["id"]], **score}
            if self.all is not None:
                self.all[block.core] = block.labels
            if block.vectors is not None:
                self.vectors.append(block.vectors)
                if self.plan.net.types is not None:
                    share = self.plan.net.type_probabilities(
                        vectors.type_rows(block.vectors, table, self.plan.zoom))
                    table |= {"type": np.array(self.plan.net.type_names)[share.argmax(1)],
                              "type_probability": share.max(1)}
            self.columns.append(table)
            if self.geojson or self.config.rois:
                new = np.zeros_like(block.ids)
                new[block.new] = block.ids[block.new]
                polygons = list(cells.polygons(new[block.local], origin).items())
                if self.geojson:
                    self.geojson.add(polygons, table)
                if self.config.rois:
                    self.polygons += polygons
            if self.picture is not None:
                part = cells.reduced_overlay(pixels[(slice(None), *block.inner)], block.labels,
                                             self.reduce)
                core = tuple(slice(c.start // self.reduce, -(-c.stop // self.reduce))
                             for c in block.core)
                self.picture[0][(slice(None), *core)], self.picture[1][core] = part
            if self.distance is not None:
                self.distance[block.core] = block.distance
            if self.around is not None:
                y, x = block.core
                with images.open_image(self.around, colours=False) as large:
                    outer = large.region(y.start, y.stop, x.start, x.stop)[0]
                images.check_label_image(outer, self.around, np.iinfo(np.uint32).max)
                self.nesting.add(block.labels, outer)
        with segment.timed(self.clock, "write"):
            self.labels.add(block.core, block.labels)

    def add_vectors_of_channels(self, limits: np.ndarray) -> None:
        """A vector of each cell from each channel alone, one beside the other."""
        assert self.all is not None
        config, ids, parts = self.config, np.zeros(0, int), []
        for number, limit in zip(self.source.numbers, limits):
            with images.open_image(self.source.path, number, config.plane, config.frame,
                                   level=config.size) as one:
                alone = self.plan._replace(limits=limit[None], embed=True)
                ids, found = segment.pooled_vectors(segment.network_map(one, alone)[1], self.all,
                                                    alone)
            parts.append(found)
        place = np.searchsorted(ids, np.concatenate([part["id"] for part in self.columns]))
        self.vectors = [np.concatenate(parts, 1)[place]]

    def scores(self, block: segment.Block) -> dict:
        """The column of probabilities of new cells, where the weights have them calibrated."""
        weights = self.plan.net.settings.score
        if not weights or self.config.labels is not None:
            return {}
        return {"score": cells.cell_probability(cells.cell_map_features(
            block.local, block.seen, self.plan.diameter, block.new), weights)}

    def without_unlikely(self, block: segment.Block, score: dict) -> tuple[segment.Block, dict]:
        """The block without cells whose score, here or where they were met, is below min_score."""
        likely = score["score"] >= self.config.min_score
        self.unlikely |= set(block.ids[block.new[~likely]].tolist())
        drop = np.isin(block.ids, list(self.unlikely))
        others = np.setdiff1d(np.arange(1, len(drop)), block.new)  # a later block may drop them
        drop[others] |= self.scores(replace(block, new=others))["score"] < self.config.min_score
        local = np.where(drop[block.local], 0, block.local)
        labels = np.where(np.isin(block.labels, list(self.unlikely)), 0, block.labels)
        vectors = None if block.vectors is None else block.vectors[likely]
        return (replace(block, local=local, labels=labels, new=block.new[likely], vectors=vectors),
                {"score": score["score"][likely]})

    def close(self, made: dict | None, start: float) -> dict:
        """Write the files, the labels last, for they say how; returns the row of the summary."""
        beginning = f"{self.out / self.name}_"
        remove_old_labels(self.out, self.name, self.config)
        with segment.timed(self.clock, "write"):
            table = {key: np.concatenate([part[key] for part in self.columns])
                     for key in self.columns[0]}
            nested = {}
            if self.around is not None:
                owner, large = self.nesting.tables()
                table["within"] = np.array([owner.get(int(i), 0) for i in table["id"]], np.int64)
                cells.write_cell_table(f"{beginning}within.csv", large)
                nested = {"within": len(large["id"]),
                          "within_none": int((large["nuclei"] == 0).sum()),
                          "within_several": int((large["nuclei"] > 1).sum()),
                          "outside": int((table["within"] == 0).sum())}
            cells.write_cell_table(f"{beginning}cells.csv", table)
            if self.config.embed:
                weights = runs.digest(self.plan.net.origin)[:16]
                vectors.write_vectors(f"{beginning}cells.npz", vectors.CellVectors(
                    table["id"], np.concatenate(self.vectors), weights,
                    tuple(map(str, self.source.channels or self.source.numbers))
                    if self.config.each else ()))
            if self.picture is not None:
                types = dict(zip(table["id"].tolist(), table["type"])) if "type" in table else None
                cells.write_picture(f"{beginning}overlay.png", cells.overlay(
                    *self.picture, types=types, names=self.plan.net.type_names))
            if self.distance is not None:
                images.write_tiff(f"{beginning}distance.tif", self.distance.astype(np.float32))
            if self.geojson:
                self.geojson.close()
            if self.config.rois:
                cells.write_rois(f"{beginning}rois.zip", self.polygons)
            row = self.row(table) | nested
            row["seconds"] = round(time.perf_counter() - start, 2)
            self.labels.close({**made, "row": row} if made else None)
        return row

    def row(self, table: dict) -> dict:
        (_, H, W), n = self.source.shape, len(table["id"])
        row = {"image": self.name, "height": H, "width": W, "cells": n,
               "mean_area_px": round(float(table["area_px"].mean()), 2) if n else "",
               "confluency": round(self.labelled / (H * W), 4),
               "diameter_px": round(self.plan.diameter, 1), "scale": round(self.plan.zoom, 4)}
        if self.source.pixel_size:
            row["mean_area_um2"] = round(float(table["area_um2"].mean()), 3) if n else ""
        return row | {f"cells_{name}": int(np.count_nonzero(table["type"] == name))
                      for name in self.plan.net.type_names}


def around_file(name: str, config: Config) -> Path | None:
    """Where the label image of within= for an image is to lie; None without."""
    path = None if config.within is None else Path(config.within)
    return path / f"{name}_labels.tif" if path and path.is_dir() else path


def around_of(name: str, config: Config, source) -> Path | None:
    """The label image of within= for an image, checked; None without."""
    path = around_file(name, config)
    if path is None:
        return None
    if path.resolve() == (Path(config.out) / f"{name}_labels.tif").resolve():
        raise ValueError(f"within={config.within}: {path} would be replaced by the cells of this "
                         "run; choose another out=")
    if path.resolve() == Path(source.path).resolve():
        raise ValueError(f"within={config.within}: is the image itself; expected labels of cells")
    if not path.is_file():
        raise FileNotFoundError(f"within={config.within}: no {path}; expected a label image of the "
                                "cells around, or a folder with NAME_labels.tif of each image")
    with images.open_image(path, colours=False) as large:
        if large.shape != (1, *source.shape[1:]) or large.dtype.kind not in "ui":
            raise ValueError(f"{path}: {large.dtype}, (C, H, W) = {large.shape}; expected labels "
                             f"of 1 channel and {source.shape[1:]} px, as {source.path} has")
    return path


# ------------------------------------------------------------------------------- stacks and movies

class Planes:
    """Planes of a stack or frames of a movie: pages of a file, or the images of a folder."""

    def __init__(self, path: Path, config: Config):
        self.path, self.config = path, config
        self.files = source_files(path, config.pattern)
        self.about = images.stack_of(self.files[0], config.linked)
        if config.spacing:
            self.about = self.about._replace(step=config.spacing)
        sizes: dict[tuple[int | str, ...], Path] = {}
        if path.is_dir():
            self.check_folders()
        elif self.about.planes == 1 and config.linked not in self.about.axes:
            print_line(f"{path}: no axis {config.linked} (axes {self.about.axes}), taken as one "
                       f"{'plane' if config.z else 'frame'}")
        for number, file in enumerate(self.files if path.is_dir() else ()):
            with self.open(number) as source:
                sizes.setdefault((*source.shape, str(source.dtype)), file)
        if len(sizes) > 1:
            (one, first), (other, second) = list(sizes.items())[:2]
            raise ValueError(f"{second}: {' x '.join(map(str, other))} (channels, height, width, "
                             f"kind), but {first} has {' x '.join(map(str, one))}; expected one "
                             "size and kind")
        self.warn_of_gaps()

    def check_folders(self) -> None:
        """Refuse frames of several folders; a folder for each is a movie."""
        folders = Counter(file.parent for file in self.files)
        if len(folders) > 1 and max(folders.values()) > 1:
            one, other, *_ = folders
            raise ValueError(f"{self.path}: images in {len(folders)} folders, such as {one} and "
                             f"{other}, would be linked; choose the frames with pattern=, or give "
                             "each folder by itself")

    def warn_of_gaps(self) -> None:
        """Say which numbers are missing among the names of frames."""
        numbers = [int((re.findall(r"\d+", file.stem) or [0])[-1]) for file in self.files]
        steps = np.diff(numbers)
        if len(steps) and (steps > 0).all() and (steps != steps.min()).any():
            after = numbers[int(np.argmax(steps != steps.min()))]
            print_line(f"warning: {self.path}: the numbers of its images have a gap after {after}; "
                       "neighbours in the list count as neighbours")

    def __len__(self) -> int:
        return len(self.files) if self.path.is_dir() else self.about.planes

    def open(self, number: int) -> images.Source:
        """A plane, counted from 0."""
        config, file, plane, frame = self.config, self.path, self.config.plane, self.config.frame
        if file.is_dir():
            file = self.files[number]
        elif config.linked == "Z":
            plane = number + 1
        else:
            frame = number + 1
        return images.open_image(file, config.channels, plane, frame, level=config.size)

    def limits(self, net) -> np.ndarray:
        """Intensities (C, 2) that become 0 and 1, the same in all planes: one without cells is not
        stretched until its noise looks like some."""
        with self.open(0) as source:
            _, H, W = source.shape
        count, parts = min(len(self), max(1, SAMPLED // (H * W))), []
        for number in np.linspace(0, len(self) - 1, count).round().astype(int).tolist():
            with self.open(number) as source:
                parts.append(source.whole().pixels)
        return images.percentiles(np.concatenate(parts, 1), net.settings.low, net.settings.high)


def infer_stack(path: Path, name: str, out: Path, net, config: Config, made: dict, progress,
                stop) -> dict:
    """As segment_file(), of planes: each is an image of its own, then their cells are linked.

    Planes that are done lie in a hidden folder until all is written: a run that is killed goes on.
    """
    start, clock = time.perf_counter(), Counter[str]()
    planes = Planes(path, config)
    with planes.open(len(planes) // 2) as source:
        check_infer_channels(path, source)
        plan = plan_of(source, path, net, config, limits=planes.limits(net))
        print_notices(path, source, plan.limits)
    flat = [images.plane_name(name, config.linked, n + 1, len(planes)) for n in range(len(planes))]
    for file in given_files(name, config)["labels"]:
        plane = file.name.removesuffix("_labels.tif")
        if plane not in flat and plane.removeprefix(f"{name}_{config.linked.lower()}").isdigit():
            raise ValueError(f"{file}: is of no plane of {path}; expected {flat[0]}_labels.tif to "
                             f"{flat[-1]}_labels.tif")
    work = out / f".{name}_planes"
    work.mkdir(exist_ok=True)
    with runs.locked(work, f"{path}: another run is at work on it in out={config.out}; wait for "
                     "its end, or give another out="):
        sign = work / runs.digest(str(made), len(planes))
        if not sign.exists():
            for old in work.iterdir():  # of another image or setting
                old.unlink()
        sign.touch()
        infer_planes(planes, flat, name, work, plan, clock, progress, stop)
        row = link_planes(planes, work, name, out, plan, made, start)
        shutil.rmtree(work)
    return row


def infer_planes(planes: Planes, flat: list[str], name: str, work: Path, plan: segment.Plan,
                 clock: Counter, progress, stop) -> None:
    """Write the results of planes, called `flat`, that have none yet."""
    config = planes.config
    alone = replace(config, overlay=False, z=None, time=None)
    for number in range(len(planes)):
        if stop:
            raise runs.Stopped
        if not (work / f"{number}_labels.tif").exists():
            given = given_files(flat[number], alone)["labels"]  # one file, or none
            with planes.open(number) as source:
                results = Results(work, str(number), source, plan, alone, clock)
                results.fill(source, given[0] if given else None)
            results.close(None, time.perf_counter())
        progress((number + 1) / (len(planes) + 1))


def link_planes(planes: Planes, work: Path, name: str, out: Path, plan: segment.Plan, made: dict,
                start: float) -> dict:
    """Link the cells of planes that are done, and write the results, the labels last."""
    config, axis, count = planes.config, planes.config.linked, len(planes)

    def labels(number: int) -> np.ndarray:
        return images.read_labels(work / f"{number}_labels.tif")

    def numbered() -> Iterator[np.ndarray]:
        return (linked.renumber(number, labels(number)) for number in range(count))

    with planes.open(0) as source:
        (_, H, W), pixel_size = source.shape, source.pixel_size
    about, beginning = planes.about, f"{out / name}_"
    remove_old_labels(out, name, config)
    seen = link.Seen(map(labels, range(count)), skip=axis == "Z")
    tables = (runs.read_table(work / f"{number}_cells.csv", ["id"]) for number in range(count))
    of_type: dict[str, int] = {}
    if axis == "Z":
        ratio = about.step / pixel_size if about.step and pixel_size else 1.0
        linked = link.link_slices(seen, ratio)
        solids = link.linked_solid_rows(linked, tables, pixel_size, about.step)
        runs.write_table(f"{beginning}cells.csv", solids, link.SOLID)
        of_type = {f"cells_{name}": sum(solid["type"] == name for solid in solids)
                   for name in plan.net.type_names}
    else:
        gap = link.GAP if config.gap is None else config.gap
        linked = link.link_frames(seen, config.max_distance, gap)
        with open(work / "0_cells.csv", encoding="utf-8", newline="") as file:
            columns = [name.strip() for name in next(csv.reader(file))]
        link.write_track_cells(Path(f"{beginning}cells.csv"), linked, tables, columns)
        table = seen.cells()
        runs.write_table(f"{beginning}tracks.csv", link.track_rows(linked, table, pixel_size),
                         link.TRACK)
        link.write_lineage(Path(f"{beginning}lineage.svg"), linked)
        link.write_trackmate(Path(f"{beginning}trackmate.xml"), linked, table, planes.path,
                             (H, W), pixel_size, about.interval)
        link.write_challenge(out / f"{name}_ctc" / "01_RES", linked, numbered())
    if config.overlay:
        shown = sorted({round(i * (count - 1) / (SHOWN - 1)) for i in range(SHOWN)})

        def pictures() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for number in shown:
                with planes.open(number) as source:
                    yield source.whole().pixels, linked.renumber(number, labels(number))
        strip = link.linked_strip(pictures(), len(shown), (H, W), PICTURE)
        cells.write_picture(f"{beginning}overlay.png", strip)
    row = {"image": name, "height": H, "width": W, "planes": count,
           "cells": len(linked.parent) - 1, "diameter_px": round(plan.diameter, 1),
           "scale": round(plan.zoom, 4), "seconds": round(time.perf_counter() - start, 2)} | of_type
    step = about.step if axis == "Z" else about.interval
    images.write_label_stack(f"{beginning}labels.tif", numbered(), (count, H, W), f"{axis}YX",
                             len(linked.parent), pixel_size, step, {**made, "row": row})
    return row


def parse_diameter(text: str | None, pixel_size: float | None, path: Path | None) -> float | None:
    """'40' px or '12um' -> px; None: as the network sees it."""
    if text in (None, "auto"):
        return None
    match = re.fullmatch(r"(\d+\.?\d*)\s*(px|um|µm|μm)?", text)
    if not match or not float(match[1]):
        raise ValueError(f"diameter={text}: expected px (40), µm (12um) or auto")
    if match[2] in (None, "px"):
        return float(match[1])
    if pixel_size is None:
        raise ValueError(f"{path}: does not say how large a pixel is; give the diameter in "
                         f"px, such as diameter=40, instead of {text}")
    return float(match[1]) / pixel_size


def print_line(text: str) -> None:
    """Print a line on stderr, above the progress bar if there is one."""
    tqdm.tqdm.write(text, file=sys.stderr)


# --------------------------------------------------------------------------------- files in and out

Images = dict[Path | str, str]      # file -> name of its results, or its path below a folder


def find_images(arguments: list[str], config: Config,
                unreadable: list[OSError] | None = None) -> Images:
    """Image -> name of its results; folders are searched whole, results are no images.

    unreadable : takes the errors of folders below that cannot be opened; None: they are raised.
    """
    found: Images = {}
    results_of_named = {Path(argument).stem + end for argument in arguments for end in OURS}
    for argument in arguments:
        path, remote = Path(argument), s3.is_remote(argument)
        if not argument:
            raise ValueError("an empty file name among the images; is a shell variable empty?")
        if remote and re.search("[*?]", argument):       # [ may be in a name
            raise ValueError(f"{argument}: on S3 give the folder, and pattern={path.name}")
        if remote and path.suffix.lower() in images.IMAGE_SUFFIXES:
            found[argument] = runs.flat_name(path.stem)
        elif config.linked and remote:
            raise ValueError(f"{argument}: a folder of frames must lie on this machine; copy it "
                             "first")
        elif config.linked and path.is_dir() and is_series_to_infer(path, config):
            found[path] = runs.flat_name(path.resolve().name)
        elif path.exists() and not path.is_dir():
            if not path.is_file():
                raise ValueError(f"{argument}: a device or pipe, expected a file or folder")
            if path.stem not in results_of_named:  # a shell that wrote *.tif out names them, too
                found[path] = runs.flat_name(path.stem)
        elif remote or path.is_dir() or glob.has_magic(argument):
            found |= infer_images_below(argument, config, unreadable)
        else:
            raise FileNotFoundError(f"{argument}: no such file or folder")
    names: set[str] = set()
    for image, name in found.items():
        if name in names:  # of another folder, or another suffix
            name = found[image] = runs.flat_name(str(image).removeprefix("s3://"))
            print_line(f"{image}: another image has its name; its results begin with {name}_")
        names.add(name)
    return found


def infer_images_below(place: str, config: Config,
                       unreadable: list[OSError] | None = None) -> Images:
    """Images of a folder, here or on S3, or of a glob, and the names of their results."""
    below: Images
    if s3.is_remote(place):
        below = {p: name for p, name in s3.files_below(place, config.signed).items()
                 if fnmatch(Path(name).name, config.pattern)}
    elif Path(place).is_dir():
        below = {p: p.relative_to(place).as_posix()
                 for p in images.image_files(place, config.pattern, unreadable)}
    else:
        paths = map(Path, sorted(glob.glob(place, recursive=True)))
        below = {p: p.name for p in paths if p.is_file() and fnmatch(p.name, config.pattern)}
    given, below = below, infer_images_among(below)
    if passed := [name for path, name in given.items() if path not in below
                  and Path(name).stem.endswith(("_cells", "_nuclei"))   # or images of a channel
                  and name.lower().endswith(images.IMAGE_SUFFIXES)]:
        print_line(f"{place}: taken for labels and passed over: {runs.listed(passed)}; what is an "
                   "image needs another name")
    if not below:
        raise FileNotFoundError(f"{place}: no image in this folder, or of this pattern "
                                f"({', '.join(images.IMAGE_SUFFIXES)}; pattern={config.pattern}; "
                                f"names with {', '.join(OURS)} are results)")
    return {p: runs.flat_name(os.path.splitext(name)[0]) for p, name in below.items()}


def is_series_to_infer(folder: Path, config: Config) -> bool:
    """Whether the images of a folder are the planes of one stack, or some are stacks."""
    frames = source_files(folder, config.pattern)
    with suppress(ValueError, OSError):                 # a damaged one: it is said for this folder
        return bool(frames) and all(images.stack_of(frame, config.linked).planes == 1
                                    for frame in frames)
    return True


def infer_images_among(files: Images) -> Images:
    """Drop hidden files, results, and labels of an image that is there."""
    files = {p: name for p, name in files.items()
             if name.lower().endswith(images.IMAGE_SUFFIXES) and not Path(name).stem.endswith(OURS)
             and not images.is_challenge_mask(name)
             and not any(part.startswith(".") and part not in (".", "..")
                         for part in re.split(r"[/\\]", name))}
    alone = images.without_labels(Path(name).stem for name in files.values())
    return {p: name for p, name in files.items() if Path(name).stem in alone}


def result_files(name: str, config: Config) -> list[str]:
    """Files that an image gets."""
    wanted = {"_overlay.png": config.overlay, "_distance.tif": config.distance,
              ".geojson": config.geojson, "_rois.zip": config.rois, "_cells.npz": config.embed,
              "_within.csv": config.within is not None}
    if config.linked == "T":
        wanted |= dict.fromkeys(("_tracks.csv", "_lineage.svg", "_trackmate.xml"), True)
    return [f"{name}_labels.tif", f"{name}_cells.csv",
            *(name + end for end, asked in wanted.items() if asked)]


def files_in_record(labels: Path | bytes) -> list[str]:
    """Names of the files beside labels, as their record has them; no paths out of the folder."""
    named = (images.label_record(labels) or {}).get("files", [])
    return [file for file in named if isinstance(file, str) and runs.flat_name(file) == file]


def remove_old_labels(out: Path, name: str, config: Config) -> None:
    """Before other files are replaced: an image without labels is made anew, should this stop.
    With overwrite=true so go files of the labels before that are not asked for now."""
    if config.overwrite:
        old = files_in_record(out / f"{name}_labels.tif")
        for file in {*old} - {*result_files(name, config)}:
            (out / file).unlink(missing_ok=True)
            if file == f"{name}_tracks.csv":            # a movie that is an image now
                link.remove_challenge(out / f"{name}_ctc" / "01_RES")
                with suppress(OSError):  # files of somebody else
                    (out / f"{name}_ctc" / "01_RES").rmdir()
                    (out / f"{name}_ctc").rmdir()
    if config.labels is None or Path(config.labels).resolve() != out.resolve():
        (out / f"{name}_labels.tif").unlink(missing_ok=True)    # given ones may be the only ones


class Summary:
    """summary.csv, written anew every second. Rows of earlier runs stay, those that were lost come
    back from the results; other processes may write the same table."""

    def __init__(self, path: Path):
        self.path: Path = path
        self.rows: dict[str, dict] = {}  # of images with results, by name
        self.fresh: dict[str, dict] = {}  # of this run
        self.written = -math.inf
        self.read()

    def read(self) -> dict[str, dict]:
        if not self.path.exists():
            return {}
        return {row["image"]: row for row in runs.read_table(self.path, ["image"], "remove it")}

    def add(self, row: dict) -> None:
        self.fresh[row["image"]] = row
        if time.monotonic() - self.written > 1:
            self.write()

    def write(self) -> None:
        with runs.locked(self.path.parent):
            there = self.read()
            kept = {name: row for name, row in self.rows.items() if any(
                str(value) != there.get(name, {}).get(key, "") for key, value in row.items())}
            table = {**there, **kept, **self.fresh}
            if table and list(table.values()) != list(there.values()):
                runs.write_table(self.path, list(table.values()))
        self.written = time.monotonic()


# ----------------------------------------------------------------------------- for other programs

@dataclass(frozen=True)
class Export:
    out: str | None = None          # the file; null: dinocell.onnx or dinocell_bioimageio.zip
    format: Literal["onnx", "bioimageio"] = "onnx"   # bioimageio: a package of the Model Zoo
    weights: str = "default"        # file, or the name of one in final_models/ (tiny)
    tile: runs.Side | None = None  # px, side of the tiles the file takes; null: as trained
    opset: Annotated[int, runs.within(18, 23)] = 18   # version of ONNX's operators
    half: bool = False              # compute in float16; format=onnx alone
    # of the weights, as SPDX names it, for format=bioimageio; null: as the file says
    licence: str | None = None

    def __post_init__(self):
        end = {"onnx": ".onnx", "bioimageio": ".zip"}[self.format]
        if self.out and not self.out.endswith(end):
            raise ValueError(f"out={self.out}: expected a file name that ends in {end}")
        if self.half and self.format == "bioimageio":
            raise ValueError("half=true: expected false with format=bioimageio")


def export(config: Export, files: list[str]) -> int:
    """Write the network as one file for ONNX Runtime, TensorRT, OpenVINO and others: python
    infer.py export [key=value ...]

    Where onnxruntime is installed, the file is compared with PyTorch before it appears. Its input
    and output stand at model.to_onnx.
    """
    if files:
        raise ValueError(f"export: unexpected {files[0]}; the file to write is out=FILE.onnx")
    weights = model.find_weights(config.weights)
    net = model.load(weights)
    if config.format == "bioimageio":
        out = Path(config.out or "dinocell_bioimageio.zip")
        error = to_bioimageio(net, out, config.tile, config.opset,
                              config.licence or net.settings.licence)
    else:
        out = Path(config.out or "dinocell.onnx")
        error = model.to_onnx(net, out, config.tile, config.opset, config.half)
    checked = f"within {error:.1e} of PyTorch"
    if error is None:
        checked = "not compared with PyTorch: pip install onnxruntime"
    print(f"{weights.name} -> {out}, {out.stat().st_size / 1e6:.1f} MB, {checked}")
    return 0


def to_bioimageio(net, path: Path, tile: int | None, opset: int, licence: str) -> float | None:
    """Write the network as a package of the BioImage Model Zoo: ONNX with its description (format
    0.5), a test image and its distances. Returns what model.to_onnx does.

    The package takes a tile and gives distances; percentiles are taken over the tile, and the
    watershed is the caller's, with the thresholds in the description (config.dinocell).
    """
    settings = net.settings
    tile = tile or settings.tile
    rng = np.random.default_rng(0)
    squares = rng.random((1, 3, -(-tile // 8), -(-tile // 8))).repeat(8, 2).repeat(8, 3)
    image = (squares[..., :tile, :tile] * 1000).astype(np.float32)
    low, high = np.percentile(image, (settings.low, settings.high), (2, 3), keepdims=True)
    shown = ((image - low) / (high - low + 1e-6)).clip(0, 1).astype(np.float32)
    with torch.inference_mode():
        distance = copy.deepcopy(net).cpu().float().eval()(torch.from_numpy(shown)).numpy()
    with tempfile.TemporaryDirectory() as folder:
        error = model.to_onnx(net, Path(folder, "weights.onnx"), tile, opset)
        files = {"weights.onnx": Path(folder, "weights.onnx").read_bytes()}
    for name, array in (("test_input.npy", image), ("test_output.npy", distance)):
        file = io.BytesIO()
        np.save(file, array)
        files[name] = file.getvalue()
    files["README.md"] = (b"# DINOCell\n\nDistance of each pixel to the edge of its cell, over the "
                          b"cell's largest (capped). A watershed makes cells of it: markers above "
                          b"`peak`, cells down to `fill`, both in rdf.yaml under config.dinocell."
                          b"\n")

    def source(name: str) -> dict:
        return dict(source=name, sha256=hashlib.sha256(files[name]).hexdigest())

    def axes(channels: list[str]) -> list[dict]:
        return [dict(type="batch"), dict(type="channel", channel_names=channels),
                dict(type="space", id="y", size=tile), dict(type="space", id="x", size=tile)]
    scale = dict(axes=["y", "x"], min_percentile=settings.low, max_percentile=settings.high)
    told = {name: value for name, value in asdict(settings).items() if name != "provenance"}
    description = dict(
        format_version="0.5.3", type="model", name="DINOCell", license=licence,
        description="Distance to the edge of the cell, for a watershed to find cells in microscopy",
        authors=[dict(name="DINOCell")], documentation="README.md",
        cite=[dict(text="Siméoni et al., DINOv3, 2025 (the architecture)",
                   url="https://arxiv.org/abs/2508.10104")],
        tags=["cell-segmentation", "instance-segmentation", "2d", "onnx"],
        inputs=[dict(id="image", axes=axes(["red", "green", "blue"]),
                     data=dict(type="float32"), test_tensor=source("test_input.npy"),
                     preprocessing=[dict(id="scale_range", kwargs=scale),
                                    dict(id="clip", kwargs=dict(min=0.0, max=1.0))])],
        outputs=[dict(id="distance", axes=axes(["distance"]), data=dict(type="float32"),
                      test_tensor=source("test_output.npy"))],
        weights=dict(onnx=dict(source("weights.onnx"), opset_version=opset)),
        config=dict(dinocell=told | dict(tile=tile)))
    files["rdf.yaml"] = yaml.safe_dump(description, sort_keys=False, allow_unicode=True).encode()
    with runs.replacing(path) as temporary, zipfile.ZipFile(
            temporary, "w", zipfile.ZIP_DEFLATED) as package:
        for name, content in files.items():
            package.writestr(name, content)
    return error


if __name__ == "__main__":
    if sys.argv[1:2] == ["export"]:
        runs.script(export.__doc__ or "", Export, export, sys.argv[2:])
    runs.script(__doc__, Config, main)
