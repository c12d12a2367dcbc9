"""Look at cells, correct them, learn from the corrections, in the browser: python page.py FOLDER

    python page.py plate1/                            opens the browser, and prints the address
    python page.py plate1/ port=8000 browser=false    on another machine; then here
                                                      ssh -L 8000:127.0.0.1:8000 MACHINE, and open
                                                      the address that it printed

Everything stays on this machine: the server answers to 127.0.0.1 alone, asks for the token in the
address, and nothing is fetched from elsewhere. For each image NAME it keeps in out=

    NAME_labels.tif      the cells, as infer.py writes them; written anew within a second of an edit
    NAME_journal.jsonl   every edit, to undo it also tomorrow
    page.json            which images are done, thresholds, diameters, types, weights
    WEIGHTS_types.pt     the weights in use with the types that were taught; for infer.py, too
    .page/               maps, and a folder for each round of learning: images, run, weights

Planes of a stack and frames of a movie are images that a slider goes through: NAME_z03, NAME_t003.

and export writes what infer.py writes of the corrected cells: NAME_cells.csv, NAME_overlay.png,
NAME.geojson, summary.csv; of a stack or a movie with its cells linked. An image that infer.py
out=FOLDER/cells has seen opens with its cells.
"""
from __future__ import annotations

import contextlib
import functools
import glob
import http.server
import json
import math
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
import webbrowser
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import learning
import runs

with runs.lazy():
    import numpy as np
    import torch

    import cells
    import edits
    import images
    import model
    import segment
    import vectors

ROOT = Path(__file__).resolve().parent
TILE = 512                      # px, side of what the browser asks for at once
OVERVIEW = 2048                 # px, images are reduced to about this once, to be seen whole
OPEN = 8                        # images that stay open
LARGEST = 1 << 30               # px of an image: four bytes each for its labels
LONGEST = 1 << 20               # bytes of a request
SAVE_EVERY = 0.3                # s, between looks for labels that are not on the disk yet
UNDONE = 50                     # searches and thresholds of an image that undo goes back to
FOUND = ("setting", "used", "map", "weights", "diameter")    # what cells were found with
HUES = {1: ["#ffffff"], 2: ["#00ff00", "#ff00ff"],
        8: ["#ff4040", "#40ff40", "#5070ff", "#ffd040", "#40e0e0", "#ff50ff", "#ffffff", "#ff9040"]}


@dataclass(frozen=True)
class Config:
    out: str | None = None              # folder for labels and all else; null: FOLDER/cells
    weights: str = "auto"   # file, or the name of one in final_models/; auto: tiny without a GPU
    channels: tuple[str, ...] | None = None  # names or numbers, up to three: what the network sees
    plane: runs.Count | None = None     # which z plane of a stack
    time: runs.Count | None = None      # which time point of a stack
    level: runs.Count | None = None     # of a slide in several sizes; null: 1, the largest
    pattern: str = "*"                  # which files of the folder, such as *_w1.tif
    port: Annotated[int, runs.within(0, 65535)] = 0  # of the address; 0: a free one
    browser: bool = True                # open the page
    learn_steps: runs.Count = 300       # optimiser steps of a round of learning
    device: runs.Device = "auto"        # auto: the GPU if there is one


def main(config: Config, files: list[str]) -> int:
    if len(files) != 1:
        raise ValueError(f"{len(files)} folders, expected one: python page.py FOLDER")
    project = Project(Path(files[0]), config)
    with only_page(project.out):
        server = Server(project, config.port)
        print(f"{len(project.names)} images of {files[0]}; labels in {project.out}\n"
              f"{server.address}\nCtrl-C ends it; every edit is on the disk", flush=True)
        if config.browser:
            webbrowser.open(server.address)
        for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
            if signal.getsignal(number) is not signal.SIG_IGN:     # nohup
                signal.signal(number, signal.default_int_handler)  # ends as Ctrl-C does
        with project, server:
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                print("\nended", file=sys.stderr)
    return 0


def only_page(out: Path) -> contextlib.AbstractContextManager[None]:
    """Refuse a second page on the same folder: each would overwrite what the other remembers."""
    (out / ".page").mkdir(exist_ok=True)
    return runs.locked(out / ".page", f"out={out}: another page.py has it open; use that one, or "
                       "give another out=")


# ------------------------------------------------------------------------------------------- image

class Entry(NamedTuple):
    """An image of the folder, which may be a plane of a stack or a frame of a movie."""
    path: Path
    plane: int | None                   # from 1; None: the file has one
    time: int | None
    stack: str = ""                     # name of the stack or movie; "" for an image of its own
    axis: str = ""                      # along which its planes lie, Z or T
    place: int = 1                      # which of them, from 1

    def open(self, channels: tuple[str, ...] | None, level: int) -> images.Source:
        return images.open_image(self.path, channels, self.plane, self.time, level=level)


class Picture:
    """An open image for the screen: tiles of TILE px, each pixel the mean of 2 ** z x 2 ** z."""

    def __init__(self, entry: Entry, config: Config):
        level, self.files = config.level or 1, contextlib.ExitStack()
        self.source = self.files.enter_context(entry.open(None, level))
        self.lock = threading.Lock()                    # a Source is not thread-safe
        C, H, W = self.source.shape
        self.step = 2 ** max(0, math.ceil(math.log2(max(H, W) / OVERVIEW)))
        # how much smaller -> the slide as it is stored so; the smallest is an array
        self.sizes: dict[int, Any] = {1: self.source}
        for number in range(level + 1, self.source.levels + 1):
            small = self.files.enter_context(entry.open(None, number))
            factor = round(H / small.shape[1])
            if factor & (factor - 1) == 0 and factor <= self.step and (
                    abs(small.shape[2] - W / factor) <= 1):
                self.sizes[factor] = small
        band = max(1, (1 << 22) // (W * self.step)) * self.step
        self.overview = self.sizes[self.step] = np.concatenate(      # (C, h, w), in memory
            [self.reduced(y, min(y + band, H), 0, W, self.step) for y in range(0, H, band)], 1)
        low, high = (float(self.overview.min()), float(self.overview.max()))
        self.wire = self.source.dtype if self.source.dtype.str[1:] in ("u1", "u2") else "<u2"
        # wire = (value - low) * scale
        self.low, self.scale = (0.0, 1.0) if self.wire == self.source.dtype else (
            low, 65535 / (high - low) if high > low else 1.0)

    def reduced(self, top: int, bottom: int, left: int, right: int, step: int):
        """(C, h, w) means of step x step px of a part of the image, from the smallest size."""
        factor = max(factor for factor in self.sizes if factor <= step)
        size = self.sizes[factor]
        _, h, w = size.shape
        y0, y1 = min(top // factor, h - 1), min(-(-bottom // factor), h)
        x0, x1 = min(left // factor, w - 1), min(-(-right // factor), w)
        with self.lock:
            pixels = (size[:, y0:y1, x0:x1] if isinstance(size, np.ndarray)
                      else size.region(y0, y1, x0, x1))
        nothing = np.zeros(pixels.shape[1:], np.uint8)
        small = cells.reduced_overlay(pixels, nothing, step // factor)[0]
        missing = (-(-(bottom - top) // step) - small.shape[1],
                   -(-(right - left) // step) - small.shape[2])   # a size rounded down
        return np.pad(small, [(0, 0), *((0, max(0, n)) for n in missing)], mode="edge")

    def close(self) -> None:
        self.files.close()

    def tile(self, z: int, row: int, column: int) -> bytes:
        """(C, h, w) of uint8 or uint16, little-endian."""
        _, H, W = self.source.shape
        side = TILE << z
        top, left = row * side, column * side
        pixels = self.reduced(top, min(top + side, H), left, min(left + side, W), 1 << z)
        return self.for_wire(pixels).tobytes()

    def for_wire(self, pixels):
        if self.wire == pixels.dtype:
            return pixels.astype(pixels.dtype.newbyteorder("<"), copy=False)
        return ((pixels - self.low) * self.scale).clip(0, 65535).round().astype("<u2")

    def about(self) -> dict:
        """Names, hues and contrast of the channels, in the units of the tiles."""
        C, H, W = self.source.shape
        shown = self.for_wire(self.overview)
        limits = images.percentiles(shown)
        names = self.source.channels or [f"channel {i}" for i in self.source.numbers]
        colour = C == 3 and not self.source.channels and self.wire == np.uint8
        bright = colour and bool(np.median(shown) >= 85)       # stained: as it is
        if colour:
            names, hues = ["red", "green", "blue"], ["#ff0000", "#00ff00", "#0000ff"]
        else:
            hues = HUES.get(C) or [HUES[8][i % 8] for i in range(C)]
        return {"height": H, "width": W, "channels": list(names), "hues": hues,
                "bits": np.dtype(self.wire).itemsize * 8,
                "limits": [[0, 255]] * 3 if bright else limits.round().astype(int).tolist(),
                "highest": [int(channel.max()) for channel in shown], "tile": TILE}


def place_text(place: dict[str, int | None]) -> str:
    return " ".join(f"{key}={value}" for key, value in place.items() if value)


class Opened:
    """An image of the folder with its cells, its map and its thresholds."""

    def __init__(self, entry: Entry, name: str, project: Project):
        self.entry, self.name = entry, name
        self.project, self.config = project, project.config
        self.file = runs.file_state(entry.path)
        self.state = project.of(name)                   # to be changed in place and remembered
        self.map_file = project.out / ".page" / "maps" / f"{name}.npy"
        self.vectors_file = project.out / ".page" / "vectors" / f"{name}.npz"
        self.picture = Picture(entry, project.config)
        source = self.picture.source
        self.size = source.shape[1:]
        if math.prod(self.size) > LARGEST:
            self.picture.close()
            raise ValueError(f"{entry.path}: {self.size[0]} x {self.size[1]} px, expected at most "
                             f"{LARGEST / 1e9:.2g} gigapixels; start with level=2 or more if it is "
                             "a slide, or cut out a part")
        labels, linked = project.labels_file(name), project.linked_file(entry)
        place = {"plane": entry.plane, "time": entry.time, "level": self.config.level or 1}
        there = [file for file in project.kept_files(name) if file.exists()]
        if there == [labels]:
            self.state["given"] = True                  # by another program: not to be searched
        if there and self.state.setdefault("place", place) != place:
            self.picture.close()
            raise ValueError(f"{there[0]}: cells of {place_text(self.state['place'])}, the page "
                             f"was started with {place_text(place)}; give another out=")
        pixels = runs.digest(self.picture.overview)
        if self.state.get("pixels", pixels) != pixels:
            if there:
                self.picture.close()
                raise ValueError(f"{entry.path}: another image than that of "
                                 f"{' and '.join(map(str, there))}; remove these, or give another "
                                 "out=")
            self.state.clear()                          # it was of the image before
        self.state |= {"place": place, "pixels": pixels}
        newer = linked and labels.exists() and (
            linked.stat().st_mtime_ns > labels.stat().st_mtime_ns)
        if newer and (project.kept_files(name)[1].exists()
                      or self.state.get("linked") != runs.digest(labels)):
            project.complain(f"{name}: infer.py has written the labels of its stack since; those "
                             "found or corrected here or in another program stay")
        elif linked and (newer or not labels.exists()):            # as infer.py z=all found them
            images.write_labels(labels, images.read_labels(
                linked, *(entry.place if entry.axis == axis else None for axis in "ZT")),
                source.pixel_size)
            self.state["linked"] = runs.digest(labels)             # as long as nobody changes them
        self.book = edits.Book(project.out / name, self.size, source.pixel_size)
        self.seen: Any = None                           # (h, w) distances, as the network gave them
        self.distance: Any = None                       # (H, W) the same at the image's scale
        self.limits: Any = None
        self.preview: Any = None                        # (H, W) labels while a slider moves
        self.previews = 0
        self.sure: tuple[int, dict] = (-1, {})          # revision, id -> how sure
        self.rows: Any = None                           # vectors.CellVectors of the cells
        self.outside = 0                                # labels of other programs that were noted
        self.note_outside()
        self.state.pop("marked", None)                  # of the time while it is not open

    def close(self) -> None:
        self.book.save()
        self.state["marked"] = self.marked_types()      # those that count while it is not open
        self.picture.close()

    @property
    def large(self) -> bool:
        """Whether its map is not kept: other thresholds are another search."""
        return math.prod(self.size) > edits.LARGE

    @property
    def labels(self):
        return self.book.labels if self.preview is None else self.preview

    def for_network(self):
        return self.entry.open(self.config.channels, self.config.level or 1)

    @property
    def diameter(self) -> float | None:
        """px, given for the image, or learnt for the folder; None: as the network judges."""
        return self.state.get("diameter") or self.project.state.get("diameter")

    @property
    def map_key(self) -> str:
        """What the map depends on."""
        weights, stat = Path(self.project.state["weights"]), self.entry.path.stat()
        return runs.digest(str(weights), weights.stat().st_mtime_ns, stat.st_size,
                           stat.st_mtime_ns, str(self.config.channels), str(self.entry.plane),
                           str(self.entry.time), str(self.config.level), str(self.diameter))[:16]

    def recall_map(self) -> None:
        """Take the map on the disk, if it is that of the cells."""
        key, self.seen = self.state.get("map"), None
        there = self.state.get("map_on_disk", key) == key and self.map_file.exists()
        if there and key == self.map_key:
            self.seen = torch.from_numpy(np.load(self.map_file))

    def note_found(self) -> None:
        """Keep what the cells were found with, for undo and redo."""
        found = self.state.setdefault("found", {})
        found[str(self.book.numbering())] = {key: self.state[key] for key in FOUND
                                             if key in self.state}
        for old in list(found)[:-UNDONE]:
            del found[old]

    def forget_found(self) -> None:
        for key in FOUND:
            self.state.pop(key, None)

    def note_outside(self) -> bool:
        """Forget what the cells were found with, if another program has written others since."""
        with self.book.lock:
            if self.outside == self.book.outside:
                return False
            self.outside = self.book.outside
            self.forget_found()
            self.state["given"] = True
            self.seen = self.distance = self.preview = None
            self.state["cells"] = len(self.book.boxes)
            self.note_found()
            return True

    def recall_found(self) -> None:
        """Go back to what the cells were found with; before the first search, to nothing."""
        number = self.book.numbering()
        known = self.state.get("found", {}).get(str(number), None if number else {})
        if known is not None:
            self.forget_found()
            self.state |= known
            self.distance = None
            self.recall_map()

    def can_flood(self) -> bool:
        """Whether its cells were found with these weights and this diameter."""
        there = self.large or self.seen is not None
        return there and self.state.get("map") == self.map_key

    def plan(self, source, net, setting: dict | None = None, embed: bool = False):
        """What the image gets, with its own diameter and thresholds, or with other thresholds."""
        if self.limits is None:
            self.limits = images.percentiles(source, net.settings.low, net.settings.high)
        diameter = self.diameter
        if net.size is not None and self.state.get("map") == self.map_key:
            diameter = self.state["used"]["diameter"]   # as it was seen for the map
        if setting is None:
            setting = self.state.get("setting", {})
        return segment.plan_for(source, net, diameter=diameter, limits=self.limits, embed=embed,
                                **setting)

    def tile(self, z: int, row: int, column: int) -> bytes:
        """(h, w) int32 labels of a tile, nearest pixels."""
        side, step = TILE << z, 1 << z
        y, x = (np.minimum(np.arange(i * side, min((i + 1) * side, n), step) + step // 2, n - 1)
                for i, n in zip((row, column), self.size))
        return np.ascontiguousarray(self.labels[np.ix_(y, x)], "<i4").tobytes()

    def numbers(self, cell: int) -> dict:
        """The row of cells.csv of a cell."""
        book = self.book
        if cell not in book.boxes:
            raise ValueError(f"no cell {cell}")
        near = self.state.get("used", {}).get("diameter") or self.diameter or math.sqrt(
            4 / math.pi * book.area(cell))
        box = edits.edit_box_widened(book.boxes[cell], math.ceil(near) + 1, self.size)
        rows, columns = box
        with self.picture.lock:
            pixels = self.picture.source.region(rows.start, rows.stop, columns.start, columns.stop)
        source = self.picture.source
        table = cells.cell_table(
            book.labels[box], pixels, pixel_size=source.pixel_size,
            channels=[str(name) for name in source.channels or source.numbers], near=near,
            ids=np.array([cell]), origin=(rows.start, columns.start),
            edges=(rows.start == 0, columns.start == 0, rows.stop == self.size[0],
                   columns.stop == self.size[1]))
        return {name: values[0].item() for name, values in table.items()}

    def certainty(self, net) -> dict[int, float]:
        """How sure the map is of each cell: the calibrated probability that it is right, or its
        mean in the cell where the weights have none; 1 for cells made by hand."""
        with self.book.lock:
            (revision, known), seen, distance = self.sure, self.seen, self.distance
            if revision == self.book.revision or seen is None:
                return known
            labels, revision = self.book.labels.copy(), self.book.revision
            ids, hand = np.array(sorted(self.book.boxes), int), self.book.by_hand()
        with self.for_network() as source:
            plan = self.plan(source, net)
        if distance is None:
            distance = segment.cells_in_map(seen, plan, self.size)[1]
            with self.book.lock:
                self.distance = distance if self.seen is seen else self.distance
        features = cells.cell_map_features(labels, distance, plan.diameter, ids)
        score = net.settings.score
        sure = cells.cell_probability(features, score) if score else features["mean"]
        sure = np.where(np.isin(ids, labels[hand]), 1.0, sure)
        known = dict(zip(ids.tolist(), sure.tolist()))
        self.sure = revision, known
        return known

    # --------------------------------------------------------------------------------------- types

    def known_vectors(self):
        """The vectors and outlines of cells that are known, in memory or on the disk; None: there
        are none. A cell that was grown keeps its number and both; split or merged ones have others.
        """
        if self.rows is None and self.vectors_file.exists():
            with contextlib.suppress(ValueError):       # damaged: the network runs again
                self.rows = vectors.read_vectors(self.vectors_file)
        fits = self.rows is not None and self.rows.weights == self.vectors_key()
        return self.rows if fits else None

    def vectors_key(self) -> str:
        """What vectors depend on: the network, and the numbers of the cells."""
        return f"{self.map_key}-{self.book.numbering()}-outlines"

    def keep_vectors(self, pool, labels, plan) -> None:
        self.vectors_file.parent.mkdir(parents=True, exist_ok=True)
        self.rows = vectors.CellVectors(*segment.pooled_vectors(pool, labels, plan, outlines=True),
                                        self.vectors_key())
        vectors.write_vectors(self.vectors_file, self.rows)

    def cell_vectors(self, net):
        """The vectors of all cells; the network runs where one is not known."""
        known = self.known_vectors()
        if known is not None and self.book.boxes.keys() <= set(known.ids.tolist()):
            return known
        if self.large:
            raise ValueError(f"{self.size[0]} x {self.size[1]} px, expected at most "
                             f"{edits.LARGE / 1e6:.0f} megapixels to tell types; cut out a part")
        with self.book.lock:
            labels = self.book.labels.copy()
        with self.for_network() as source:
            plan = self.plan(source, net, embed=True)
            pool = segment.network_map(source, plan, self.project.progress)[1]
            self.keep_vectors(pool, labels, plan)
        return self.rows

    def marks_without_cell(self) -> list[list]:
        """Marks of cells that were removed."""
        return [mark for mark in self.state.get("marks", ())
                if not self.book.labels[int(mark[1]), int(mark[0])]]

    def marked(self) -> dict[int, list]:
        """The mark (x, y, type) of each cell that has one: what is marked is a place, so that a
        cell may change its number. Marks of removed cells wait for an undo."""
        found = {int(self.book.labels[int(mark[1]), int(mark[0])]): mark
                 for mark in self.state.get("marks", ())}
        found.pop(0, None)
        return found

    def keep_marks_inside(self, before: dict[int, list]) -> None:
        """Move a mark that no longer lies in its cell, which was grown, shrunk or cut, to the
        nearest place that does. before : cell -> mark."""
        for cell, mark in before.items():
            box = self.book.boxes.get(cell)
            if box is not None and self.book.labels[int(mark[1]), int(mark[0])] != cell:
                rows, columns = np.nonzero(self.book.labels[box] == cell)
                y, x = rows + box[0].start + 0.5, columns + box[1].start + 0.5
                nearest = np.argmin((x - mark[0])**2 + (y - mark[1])**2)
                self.state["marks"] = [[float(x[nearest]), float(y[nearest]), mark[2]]
                                       if each is mark else each for each in self.state["marks"]]

    def marked_types(self) -> list[str]:
        """Those of the marks that count."""
        return [type_ for _, _, type_ in self.marked().values()]


# ----------------------------------------------------------------------------------------- project

class Project:
    """A folder of images, what is known about each, and the thread that runs the network."""

    def __init__(self, folder: Path, config: Config):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; expected one with images")
        self.folder, self.config = folder, config
        self.out = Path(config.out) if config.out else folder / "cells"
        if self.out.resolve() == folder.resolve():
            raise ValueError(f"out={self.out}: is the folder of the images; choose another")
        self.names = images_of(folder, self.out, config)
        self.out.mkdir(parents=True, exist_ok=True)
        self.state: dict[str, Any] = {"images": {}, "weights": str(weights_file(config))}
        if (self.out / "page.json").exists():
            self.state |= runs.read_record(self.out / "page.json", learning.DAMAGED)
            known = self.state["images"]
            if not isinstance(known, dict) or not all(isinstance(v, dict) for v in known.values()):
                raise ValueError(f"{self.out / 'page.json'}: damaged, what it knows of images is "
                                 f"no list of keys; {learning.DAMAGED}")
        if config.weights != "auto" or not Path(self.state["weights"]).is_file():
            self.state["weights"] = str(weights_file(config))
        self.lock, self.loading = threading.RLock(), threading.Lock()
        self.exporting = threading.Lock()               # one window after the other
        self.opened: OrderedDict[str, Opened] = OrderedDict()
        self.queue: list[str] = []                      # images to search
        self.wanted: dict[str, dict] = {}               # diameter and thresholds to search with
        self.untyped: list[str] = []                    # images whose cells want a type
        self.teaching = False                           # types are to be learnt from the marks
        self.working: dict[str, Any] = {}               # what the network does now
        self.problems: list[str] = []                   # the latest last
        self.marks = 0                                  # how often one was set or taken away
        self.stopping = threading.Event()               # what the network does
        self.ending = threading.Event()                 # everything
        self.awake = threading.Condition(self.lock)
        self.net: Any = None
        self.net_file = ""
        self.learning, self.types = learning.Learning(self), learning.Types(self)
        self.threads = [threading.Thread(target=target, daemon=True)
                        for target in (self.work, self.keep)]

    def __enter__(self) -> Project:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ending.set()
        self.stopping.set()
        with self.awake:
            self.awake.notify_all()
        self.learning.close()
        for thread in self.threads:
            thread.join(30)
        for opened in self.opened.values():
            try:
                opened.close()
            except (OSError, ValueError) as error:      # the others are closed nevertheless
                print(f"{opened.name}: {runs.error_sentence(error)}", file=sys.stderr)
        self.remember()

    # --------------------------------------------------------------------------------------- state

    def of(self, name: str) -> dict:
        """What is known of an image, to be changed in place and remembered."""
        if name not in self.names:
            raise ValueError("no such image in the folder")
        return self.state["images"].setdefault(name, {})

    def remember(self) -> None:
        with self.lock:
            runs.write_text(self.out / "page.json", json.dumps(self.state, indent=1))

    def open(self, name: str) -> Opened:
        self.of(name)
        with self.lock:
            if opened := self.opened.get(name):
                if name == self.working.get("image") or (
                        opened.file == runs.file_state(opened.entry.path)):
                    self.opened.move_to_end(name)
                    return opened
                self.put_away(name)                     # its file was replaced
            opened = self.opened[name] = Opened(self.names[name], name, self)
            if opened.book.path.exists() or opened.book.done:
                opened.state["cells"] = len(opened.book.boxes)
            opened.recall_map()
            busy = self.working.get("image")
            for old in [old for old in self.opened if old not in (name, busy)]:
                if len(self.opened) <= OPEN:
                    break
                with contextlib.suppress(OSError, ValueError):     # keep() says so
                    self.put_away(old)
            return opened

    def put_away(self, name: str) -> None:
        """Close an image, once its labels are on the disk."""
        self.opened[name].close()
        del self.opened[name]

    def network(self):
        """The network of the weights in use."""
        with self.loading:
            weights = self.state["weights"]
            if self.net_file != weights:
                device = runs.pick_device(self.config.device)
                self.net, self.net_file = model.load(weights).ready(device), weights
            return self.net

    def keep(self) -> None:
        """Write labels that changed, until the end."""
        while not self.ending.wait(SAVE_EVERY):
            with self.lock:
                opened = list(self.opened.values())
            for each in opened:
                try:
                    each.book.save()
                    if each.note_outside():
                        self.complain(f"{each.name}: another program has written its labels; undo "
                                      "brings back those before")
                        self.remember()
                except (OSError, ValueError) as error:  # a full disk, or labels of another program
                    self.complain(f"{each.name}: the labels could not be written, "
                                  f"{runs.error_sentence(error)}")

    def complain(self, text: str, asked: bool = False) -> None:
        """Say what is wrong; asked : of something that a person has just asked for, not of what is
        tried each second, where several images may say theirs in turns."""
        with self.lock:
            if asked or text not in self.problems[-OPEN:]:
                self.problems.append(text)

    # --------------------------------------------------------------------------------- the network

    def labels_file(self, name: str) -> Path:
        return self.out / f"{name}_labels.tif"

    def kept_files(self, name: str) -> tuple[Path, Path]:
        """Where the cells of an image and its edits lie."""
        return self.labels_file(name), self.out / f"{name}_journal.jsonl"

    def linked_file(self, entry: Entry) -> Path | None:
        """The labels of the whole stack, if infer.py wrote them."""
        file = self.labels_file(entry.stack)
        if entry.stack and file.exists():
            with contextlib.suppress(ValueError, OSError):       # damaged
                if images.stack_of(file, entry.axis).planes > 1:   # not of one plane
                    return file
        return None

    def is_to_search(self, name: str) -> bool:
        """Whether cells were not found with the weights in use; those of other programs count."""
        state = self.of(name)
        if state.get("done") or name in self.queue:
            return False
        if "weights" not in state:
            file, journal = self.kept_files(name)
            given = state.get("given") or not journal.exists()
            return not (file.exists() and given or self.linked_file(self.names[name]))
        return state["weights"] != self.state["weights"]

    def work(self) -> None:
        """Search image after image, teach types, tell them, until the end."""
        try:
            self.network()                              # while the first image is looked at
        except runs.FAILURES as error:                      # each search says so again
            self.complain(runs.error_sentence(error))
        while not self.ending.is_set():
            with self.awake:
                while not (self.queue or self.teaching or self.untyped or self.ending.is_set()):
                    self.awake.wait()
                if self.ending.is_set():
                    return
                job: Callable[[], None]
                if self.teaching:
                    name, job, self.teaching = "types", self.types.teach, False
                else:
                    run = self.find if self.queue else self.embed
                    name = (self.queue or self.untyped).pop(0)
                    job = functools.partial(run, name)
                self.working = {"image": name, "share": 0.0}
                self.stopping.clear()
            try:
                job()
            except runs.Stopped:
                pass
            except runs.FAILURES as error:              # the next image is searched
                self.complain(f"{name}: {runs.error_sentence(error)}", asked=True)
            finally:
                with self.lock:
                    self.working = {}

    def progress(self, share: float) -> None:
        if self.stopping.is_set():
            raise runs.Stopped
        self.working["share"] = share

    def search(self, names: list[str]) -> None:
        """Queue images for the network."""
        with self.awake:
            self.queue += [name for name in names if name not in self.queue]
            self.awake.notify_all()
        self.remember()

    def find(self, name: str) -> None:
        """Run the network on an image; cells made by hand stay. If it is stopped or fails, diameter
        and thresholds stay those of the cells that are there."""
        opened, net = self.open(name), self.network()
        state, before, asked = opened.state, dict(opened.state), self.wanted.pop(name, {})
        if state.get("weights") != self.net_file:
            asked = {"setting": {}} | asked             # thresholds of other weights mean nothing
        state |= asked
        number = opened.book.numbering()
        try:
            self.search_image(opened, net, {key: state.get(key) for key in ("diameter", "setting")})
        except BaseException:
            if opened.book.numbering() == number:       # else an undo has brought others
                for key in asked:
                    state.pop(key, None)
                state |= {key: before[key] for key in asked if key in before}
            raise

    def search_image(self, opened: Opened, net, how: dict) -> None:
        """Find the cells of an image with its diameter and thresholds of now."""
        state, key, weights = opened.state, opened.map_key, self.net_file
        with opened.for_network() as source:
            if source.shape[0] > 3:
                known = ", ".join(source.channels or map(str, source.numbers))
                raise ValueError(f"{source.shape[0]} channels ({known}); start with up to three "
                                 "that the network sees, such as channels=1,2")
            plan, pool = opened.plan(source, net, embed=not opened.large), None
            if not opened.large:
                seen, pool = segment.network_map(source, plan, self.progress)
                labels, _ = segment.cells_in_map(seen, plan, opened.size)
            else:
                seen, labels = None, np.zeros(opened.size, np.int32)
                for block in segment.blocks(source, plan, None, self.progress):
                    labels[block.core] = block.labels
        if seen is not None:
            opened.map_file.parent.mkdir(parents=True, exist_ok=True)
            with runs.replacing(opened.map_file) as path, open(path, "wb") as file:
                np.save(file, seen.cpu().numpy())
        with self.lock, opened.book.lock:
            opened.seen, opened.preview = seen, None
            state["map_on_disk"] = key
            opened.distance, opened.sure = None, (-1, {})
            opened.book.do(edits.flooded_edit(opened.book, labels, "find"))
            state |= how | {"map": key, "cells": len(opened.book.boxes), "weights": weights,
                      "used": {**plan.setting._asdict(), "diameter": plan.diameter,
                               "min_area": round(plan.setting.min_area / plan.zoom ** 2)}}
            opened.note_found()
            self.remember()
            if pool:
                opened.keep_vectors(pool, opened.book.labels, plan)

    def flood(self, name: str, setting: dict, commit: bool) -> dict:
        """Cells of the map at other thresholds: a preview, or for good. Of a large image, whose map
        is not kept, for good alone, and the network runs again."""
        opened, net = self.open(name), self.network()
        if not opened.can_flood():
            raise ValueError("the cells of this image were not found in this way yet; press Find")
        setting = {key: float(setting[key]) for key in net.settings.setting._fields
                   if key in setting}
        if opened.large:
            if commit:
                self.wanted.setdefault(name, {})["setting"] = setting
                self.search([name])
            return {"cells": len(opened.book.boxes), "version": version_of(opened)}
        with opened.for_network() as source:
            plan = opened.plan(source, net, setting)
        labels, _ = segment.cells_in_map(opened.seen, plan, opened.size)
        with self.lock, opened.book.lock:
            edit = edits.flooded_edit(opened.book, labels)
            if commit:
                opened.state["setting"], opened.preview = setting, None
                if not np.array_equal(edit.before, edit.after):
                    opened.book.do(edit)
                opened.state["cells"] = len(opened.book.boxes)
                opened.note_found()
                self.remember()
            else:
                opened.previews += 1
                opened.preview = edit.after
        return {"cells": int(np.count_nonzero(np.bincount(edit.after.ravel())[1:])),
                "version": version_of(opened)}

    def embed(self, name: str) -> None:
        """Find the vectors of the cells of an image, for their types."""
        self.open(name).cell_vectors(self.network())

    # --------------------------------------------------------------------------------------- export

    def export(self) -> dict:
        """Write what infer.py writes, of the cells as they are now."""
        with self.exporting:
            return self.write_results()

    def write_results(self) -> dict:
        began = time.time()
        known = [name for name in self.names
                 if any(file.exists() for file in self.kept_files(name))]
        for name in list(known):                        # it is the same image; edits before a crash
            try:
                self.open(name).book.save()
            except (ValueError, OSError) as error:
                self.complain(f"left out of the export: {runs.error_sentence(error)}", asked=True)
                known.remove(name)
        known = [name for name in known if self.labels_file(name).exists()]
        written = {}
        for opened in list(self.opened.values()):
            opened.book.save()
            written[opened.name] = opened.book.revision
        jobs: dict[tuple, list[str]] = {}               # keys of infer.py -> images
        for name in known:
            entry, diameter = self.names[name], self.state.get("diameter")
            if entry.stack:
                what = "z" if entry.axis == "Z" else "time", "all"
                job = what, ("pattern", glob.escape(entry.path.name)), ("diameter", diameter)
            else:                                       # types and neighbours depend on it
                diameter = self.of(name).get("diameter") or diameter
                job = ("geojson", "true"), ("pattern", self.config.pattern), ("diameter", diameter)
            jobs.setdefault(job, []).append(name)
        given = {"channels": ",".join(self.config.channels or ()), "plane": self.config.plane,
                 "time": self.config.time, "level": self.config.level, "out": self.out,
                 "weights": self.types.file() or self.state["weights"], "overwrite": "true"}
        for job, names in jobs.items():
            labels = self.out / ".page" / "export"      # a stack's own labels are not among them
            shutil.rmtree(labels, ignore_errors=True)
            labels.mkdir(parents=True)
            for name in names:
                shutil.copy(self.labels_file(name), labels)
            keys = given | {"labels": labels} | dict(job)
            command = [sys.executable, str(ROOT / "infer.py"), str(self.folder.resolve()),
                       *(f"{key}={value}" for key, value in keys.items() if value)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise ValueError(learning.last_line(done.stderr))
        self.save_after_export(known, written, began)
        self.remember()
        whole = {self.names[name].stack or name for name in known}
        return {"written": len(whole), "folder": str(self.out)}

    def save_after_export(self, known: list[str], written: dict[str, int], began: float) -> None:
        """Write edits that were made while infer.py wrote the labels of before, and show what it
        has found. written : revisions that it was given; began : when, s."""
        for name in known:                              # and of stacks what it has from these
            if self.names[name].stack:
                self.labels_file(name).touch()
        for opened in list(self.opened.values()):       # infer.py has written those of before
            with opened.book.lock:
                opened.book.saved &= written.get(opened.name) == opened.book.revision
            opened.book.save()
        for name in known:                              # and images edited meanwhile, closed again
            journal = self.kept_files(name)[1]
            with contextlib.suppress(OSError, ValueError):
                if name not in self.opened and journal.stat().st_mtime > began - 2:
                    self.open(name).book.save()
        for name, entry in self.names.items():          # planes that infer.py has searched
            if (file := self.linked_file(entry)) and not self.labels_file(name).exists():
                plane = images.read_labels(file, *(entry.place if entry.axis == axis else None
                                                   for axis in "ZT"))
                self.of(name)["cells"] = len(np.unique(plane[plane > 0]))
                if opened := self.opened.get(name):     # it was looked at before there were any
                    opened.book.take_outside(plane.astype(np.int32))
                    opened.note_outside()


def images_of(folder: Path, out: Path, config: Config) -> dict[str, Entry]:
    """Name of its results -> image; no results, no labels of others, nothing that a link leads out
    of the folder."""
    pattern = config.pattern
    inside, results = folder.resolve(), out.resolve()
    found = [path for path in images.image_files(folder, pattern)
             if inside in path.resolve().parents and results not in path.resolve().parents
             and not images.is_challenge_mask(path.relative_to(folder).as_posix())]
    alone = images.without_labels(path.stem for path in found)
    names: dict[str, Entry] = {}
    for path in (path for path in found if path.stem in alone):
        name = runs.flat_name(path.relative_to(folder).with_suffix("").as_posix())
        for one, entry in entries_of(path, name, config):
            if one in names:
                other = names[one].path
                advice = (f"choose with pattern=*{path.suffix}" if other.suffix != path.suffix
                          else "rename one of them")
                raise ValueError(f"{other} and {path} would both have the labels "
                                 f"{one}_labels.tif; {advice}")
            names[one] = entry
    if not names:
        raise FileNotFoundError(f"{folder}: no image in this folder "
                                f"({', '.join(images.IMAGE_SUFFIXES)}; pattern={pattern}; links "
                                "that lead out of it are passed over)")
    return names


def entries_of(path: Path, name: str, config: Config) -> Iterator[tuple[str, Entry]]:
    """The images of a file, with their names: one, or the planes of a stack."""
    given = {"Z": config.plane, "T": config.time}
    axis, count = "", 1
    try:
        stacks = {letter: images.stack_of(path, letter) for letter in "ZT" if given[letter] is None}
    except (ValueError, OSError):
        stacks = {}                                     # damaged: it says so when it is opened
    for letter, stack in stacks.items():
        named = letter in stack.axes
        if stack.planes > 1 and (named or not (axis or config.channels or any(given.values()))):
            if axis:                                    # planes and frames: one must be given
                axis = ""
                break
            axis, count = letter, stack.planes
    if not axis:
        yield name, Entry(path, config.plane, config.time)
        return
    for place in range(1, count + 1):
        plane, time = (place, config.time) if axis == "Z" else (config.plane, place)
        yield (images.plane_name(name, axis, place, count),
               Entry(path, plane, time, name, axis, place))


def weights_file(config: Config) -> Path:
    """The file that weights= means."""
    slow = runs.pick_device(config.device) == "cpu"
    name = config.weights if config.weights != "auto" else "tiny" if slow else "s8"
    return model.find_weights(name).resolve()


def version_of(opened: Opened) -> str:
    """Changes with every change of the labels that are shown."""
    return str(opened.book.revision) + (f"p{opened.previews}" if opened.preview is not None else "")


# ------------------------------------------------------------------------------------------ server

class Server(http.server.ThreadingHTTPServer):
    """Answers to this machine, to who has the token, and to no other page in the browser."""

    daemon_threads = True

    def __init__(self, project: Project, port: int):
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as error:
            raise OSError(f"port={port}: {error.strerror}; choose another, or 0 for a free one"
                          ) from None
        self.project, self.token = project, secrets.token_urlsafe(24)
        self.address = f"http://127.0.0.1:{self.server_port}/?token={self.token}"

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):     # a tab that was closed
            super().handle_error(request, client_address)


class Refusal(Exception):
    """A request that is not answered: status and reason."""


class Handler(http.server.BaseHTTPRequestHandler):
    """One request; what is asked for is looked up in GETS and POSTS, never in the file system."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "DINOCell", ""

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal is for the user."""

    def do_GET(self) -> None:
        self.answer(self.get)

    def do_POST(self) -> None:
        self.answer(self.post)

    def answer(self, respond: Callable[[], tuple[bytes, str]]) -> None:
        """Send what `respond` gives, or one sentence on why not."""
        status, problem = 200, ""
        try:
            content, kind = respond()
        except Refusal as refusal:
            status, problem = refusal.args
            self.close_connection = True                # what was not read is not the next request
        except (ValueError, OSError) as error:
            stale = runs.is_loaded("edits") and isinstance(error, edits.Stale)
            status, problem = 409 if stale else 400, runs.error_sentence(error)
        except runs.FAILURES as error:                      # out of memory, say
            status, problem = 500, runs.error_sentence(error)
        if problem:
            content, kind = json.dumps({"error": problem}).encode(), "application/json"
        self.send_response(status)
        if len(content) > 1000 and "deflate" in self.headers.get("Accept-Encoding", ""):
            content = zlib.compress(content, 1)
            self.send_header("Content-Encoding", "deflate")
        for name, value in {"Content-Type": kind, "Content-Length": len(content),
                            "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
                            "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY",
                            "Cross-Origin-Resource-Policy": "same-origin",
                            "Content-Security-Policy": self.policy}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)

    policy = "default-src 'none'; frame-ancestors 'none'"

    def checked_query(self) -> tuple[str, dict[str, str]]:
        """Path and query of a request from this page; Refusal for any other."""
        where = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(where.query, True))
        host = self.headers.get("Host", "")
        if re.sub(r":\d+$", "", host) not in ("127.0.0.1", "localhost", "[::1]"):
            raise Refusal(403, "this page answers to this machine alone")
        origin, own = self.headers.get("Origin"), f"http://{host}"
        fetched = self.headers.get("Sec-Fetch-Site", "none")
        if origin not in (None, own) or fetched not in ("none", "same-origin"):
            raise Refusal(403, "another page may not ask here")
        given = self.headers.get("X-Token") or query.get("token", "")
        if not secrets.compare_digest(given.encode(), self.server.token.encode()):
            raise Refusal(403, "open the address that page.py printed; it has a token")
        return where.path, query

    def get(self) -> tuple[bytes, str]:
        path, query = self.checked_query()
        if path == "/":
            nonce = secrets.token_urlsafe(16)
            self.policy = (f"default-src 'none'; script-src 'nonce-{nonce}'; style-src "
                           f"'nonce-{nonce}'; connect-src 'self'; img-src blob: data:; "
                           "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
            text = (ROOT / "page.html").read_text(encoding="utf-8")
            return text.replace("NONCE", nonce).encode(), "text/html; charset=utf-8"
        return self.called(GETS, path, query)

    def post(self) -> tuple[bytes, str]:
        path, _ = self.checked_query()
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > LONGEST:
            raise Refusal(413, f"a request of {length or 'unknown'} bytes, expected at most "
                               f"{LONGEST}")
        try:
            values = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise Refusal(400, "expected a JSON object")
        return self.called(POSTS, path, values)

    def called(self, functions: dict[str, Callable], path: str, values: dict) -> tuple[bytes, str]:
        """The answer of the function of a path and its type: bytes as they are, all else as JSON.
        """
        if path not in functions:
            raise Refusal(404, "there is nothing here")
        try:
            answer = functions[path](self.server.project, values)
        except (KeyError, TypeError) as error:
            raise Refusal(400, f"a request without what it needs: {error}") from None
        if isinstance(answer, bytes):
            return answer, "application/octet-stream"
        return json.dumps(runs.without_nan(answer)).encode(), "application/json"


# ---------------------------------------------------------------------------- requests

def get_news(project: Project, query: dict[str, str]) -> dict:
    """What changed: images, the network, learning, problems. Asked for again and again."""
    with project.lock:
        shown = project.opened.get(query.get("image", ""))
        return {"images": [{"name": name, "cells": state.get("cells"),
                            "done": bool(state.get("done")), "queued": name in project.queue,
                            "stack": entry.stack, "axis": entry.axis.lower(), "place": entry.place}
                           for name, entry in project.names.items()
                           for state in [project.state["images"].get(name, {})]],
                "working": project.working, "queue": len(project.queue),
                "version": version_of(shown) if shown else None,
                "saved": all(opened.book.saved for opened in project.opened.values()),
                "problems": project.problems[-3:], "problem_count": len(project.problems),
                "learning": project.learning.status(), "types": project.types.version,
                "marks": project.marks,
                "weights": Path(project.state["weights"]).stem}


def get_image(project: Project, query: dict[str, str]) -> dict:
    """All that is known of an image."""
    name = query["image"]
    opened, net = project.open(name), project.network()
    opened.preview, state = None, opened.state          # of a slider that nobody holds
    known = state if state.get("weights") == project.state["weights"] else {}
    wanted = project.wanted.get(name, {})
    setting = {**net.settings.setting._asdict(), **known.get("used", {}),
               **known.get("setting", {}), **wanted.get("setting", {})}
    return {**opened.picture.about(), "name": name, "version": version_of(opened),
            "revision": opened.book.revision, "cells": len(opened.book.boxes),
            "done": bool(state.get("done")), "setting": setting,
            "diameter": {**state, **wanted}.get("diameter"),
            "usual_diameter": project.state.get("diameter"), "can_flood": opened.can_flood()}


def get_pixels(project: Project, query: dict[str, str]) -> bytes:
    opened = project.open(query["image"])
    return opened.picture.tile(*tile_place(opened, query))


def get_labels(project: Project, query: dict[str, str]) -> bytes:
    opened = project.open(query["image"])
    return opened.tile(*tile_place(opened, query))


def get_cell(project: Project, query: dict[str, str]) -> dict:
    opened, cell = project.open(query["image"]), int(query["cell"])
    net = project.network()
    sure = opened.certainty(net).get(cell)
    kind = "score" if net.settings.score else "certainty"
    told = (project.types.of(opened) or {}).get(cell)
    return {**opened.numbers(cell), **({} if sure is None else {kind: round(sure, 3)}),
            **({} if told is None else {"type": told[0], "type_probability": told[1]})}


def get_least(project: Project, query: dict[str, str]) -> list:
    """Cells from the least certain on: number, y, x, diameter."""
    opened = project.open(query["image"])
    sure = opened.certainty(project.network())
    found = []
    for cell in sorted((i for i in sure if i in opened.book.boxes), key=sure.__getitem__)[:200]:
        rows, columns = opened.book.boxes[cell]
        found.append((cell, (rows.start + rows.stop) / 2, (columns.start + columns.stop) / 2,
                      max(rows.stop - rows.start, columns.stop - columns.start)))
    return found


def get_types(project: Project, query: dict[str, str]) -> dict:
    """Types that were marked in any image, marks in this one, and what type its cells are; where
    that is not known yet the network is asked, and `cells` is null."""
    opened = project.open(query["image"])
    told, file = project.types.of(opened), project.types.file()
    if file and not opened.book.boxes.keys() <= (told or {}).keys():
        with project.awake:
            if opened.name not in (*project.untyped, project.working.get("image")):
                project.untyped.append(opened.name)
                project.awake.notify_all()
    return {"types": project.types.known(), "marks": list(opened.marked().values()),
            "version": project.types.version, "marked": project.marks,
            "taught": {**project.state.get("types", {}), "file": Path(file).name} if file else None,
            "cells": None if told is None else [(cell, *type_) for cell, type_ in told.items()]}


def tile_place(opened: Opened, query: dict[str, str]) -> tuple[int, int, int]:
    z, row, column = (int(query[key]) for key in ("z", "row", "column"))
    (H, W), side = opened.size, TILE << max(0, min(z, 16))
    if not (0 <= z <= 16 and 0 <= row * side < H and 0 <= column * side < W):
        raise ValueError(f"no tile {row}, {column} at z={z}")
    return z, row, column


def post_find(project: Project, values: dict) -> dict:
    """Queue an image for the network, with a diameter (px, null for the usual one), or all that
    are not done."""
    names = [values["image"]] if "image" in values else [
        name for name in project.names if project.is_to_search(name)]
    for name in names:
        if "diameter" in values:
            given = values["diameter"]
            if given is not None and not (type(given) in (int, float) and 1 <= given <= 10000):
                raise ValueError(f"diameter={given}: expected 1 to 10000 px")
            project.wanted.setdefault(name, {})["diameter"] = (
                None if given is None else float(given))
    project.search(names)
    return {"queued": len(names)}


def post_stop(project: Project, values: dict) -> dict:
    with project.lock:
        project.queue.clear()
        project.wanted.clear()
        project.stopping.set()
    return {}


def post_edit(project: Project, values: dict) -> dict:
    """Change cells by hand; refused if they are not those that the page shows."""
    opened, what = project.open(values["image"]), values["what"]
    with opened.book.lock:
        if opened.preview is not None:
            raise edits.Stale("cells of other thresholds were shown, which nobody kept; please "
                              "repeat your edit")
        if values["revision"] != opened.book.revision:
            raise edits.Stale("another window or the network changed these cells; they are shown "
                              "as they are now, please repeat your edit")
        numbering, waiting = opened.book.numbering(), opened.marks_without_cell()
        marked = opened.marked()
        if what in ("undo", "redo"):
            box = getattr(opened.book, what)()
        else:
            box = opened.book.do(edit_of(opened.book, values))
        if searched := opened.book.numbering() != numbering:
            opened.recall_found()
        else:
            opened.keep_marks_inside(marked)
        revision, count = opened.book.revision, len(opened.book.boxes)
    opened.state["cells"] = count
    if what == "draw" and waiting:                      # a new cell is of no type yet
        still = opened.marks_without_cell()
        opened.state["marks"] = [mark for mark in opened.state["marks"]
                                 if mark not in waiting or mark in still]
    if searched:
        project.remember()
    (top, bottom), (left, right) = ((side.start, side.stop) for side in box)
    return {"revision": revision, "version": version_of(opened), "cells": count,
            "searched": searched, "box": [top, left, bottom, right]}


def line_of(values: dict):
    """(K, 2) x y of a request."""
    line = np.array(values["line"], np.float64)
    if line.ndim != 2 or line.shape[1] != 2 or not 1 <= len(line) <= 20000 \
            or not (np.abs(line) < 1e7).all():
        raise ValueError("expected a line of points x, y")
    return line


def edit_of(book, values: dict):
    """The edit of a request."""
    what = values["what"]
    if what in edits.LINE_EDITS:
        return edits.LINE_EDITS[what](book, line_of(values))
    if what in edits.CELL_EDITS:
        return edits.CELL_EDITS[what](book, int(values["cell"]))
    known = ", ".join((*edits.LINE_EDITS, *edits.CELL_EDITS, "undo", "redo"))
    raise ValueError(f"no edit {what}, expected one of {known}")


def post_done(project: Project, values: dict) -> dict:
    project.of(values["image"])["done"] = bool(values["done"])
    project.remember()
    return {}


def post_mark(project: Project, values: dict) -> dict:
    """Mark the cell at a place as of a type; the same mark again takes it away."""
    opened, type_ = project.open(values["image"]), str(values["type"]).strip()
    x, y = float(values["x"]), float(values["y"])
    H, W = opened.size
    if not 0 < len(type_) <= 60 or not type_.isprintable():
        raise ValueError("a type has a name of 1 to 60 letters")
    cell = opened.book.labels[int(y), int(x)] if 0 <= x < W and 0 <= y < H else 0
    if not cell:
        raise ValueError("there is no cell here; click into one")
    with project.lock:
        before, state = opened.marked().get(int(cell), [0, 0, ""])[2], opened.state
        state["marks"] = [mark for mark in state.get("marks", ())
                          if opened.book.labels[int(mark[1]), int(mark[0])] != cell]
        if before != type_:
            state["marks"].append([x, y, type_])
            project.types.note(type_)
        project.marks += 1
        project.remember()
    return {"marks": list(opened.marked().values()), "types": project.types.known(),
            "marked": project.marks}


def post_teach(project: Project, values: dict) -> dict:
    """Learn types from what is marked in all images."""
    with project.awake:
        project.teaching = True
        project.awake.notify_all()
    return {}


def post_learn(project: Project, values: dict) -> dict:
    """Start, stop, or use weights of a round."""
    what = values["what"]
    if what == "use":
        project.learning.use(str(values["weights"]))
    elif what in ("start", "stop"):
        getattr(project.learning, what)()
    else:
        raise ValueError(f"learning cannot {what}; expected start, stop or use")
    return project.learning.status()


GETS: dict[str, Callable[[Project, dict[str, str]], Any]] = {
    "/news": get_news, "/image": get_image, "/pixels": get_pixels, "/labels": get_labels,
    "/cell": get_cell, "/least": get_least, "/types": get_types}
POSTS: dict[str, Callable[[Project, dict], Any]] = {
    "/find": post_find, "/stop": post_stop, "/edit": post_edit, "/done": post_done,
    "/flood": lambda project, values: project.flood(values["image"], values["setting"],
                                                    bool(values.get("commit"))),
    "/export": lambda project, values: project.export(), "/learn": post_learn,
    "/mark": post_mark, "/teach": post_teach}


if __name__ == "__main__":
    runs.script(__doc__, Config, main)
