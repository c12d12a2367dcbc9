"""Corrections of labels by hand: each is undone and redone, and each is on the disk at once.

    book = edits.Book(folder / "well_A1", (H, W))     # well_A1_labels.tif, well_A1_journal.jsonl
    book.do(edits.split_cells(book, line))                  # the journal has it before this returns
    book.undo()
    book.save()                                       # the TIFF, replaced whole

A line and an outline are (K, 2), x y in px of the image, as a mouse draws them; the corner of the
first pixel is (0, 0).

The journal has a line of JSON for each edit: the box that it changed, before and after. Replayed
from its first line on the labels of any later moment it ends in the same labels, so that the two
files need not be written together.
"""
from __future__ import annotations

import base64
import json
import math
import os
import threading
import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage

import images
import runs
from data import polygon_pixels
from images import Region

WHOLE = ("find", "flood")       # edits of the whole image by the network, not by hand
LARGE = 1 << 26                 # px; above, labels are copied and written band by band
CLOSED = 0.35                   # of a line's length: ends nearer than this close it


class Edit(NamedTuple):
    """What an edit changes."""
    what: str                           # draw, split, ..., outside, or one of WHOLE
    box: Region
    before: np.ndarray                  # (h, w) int32
    after: np.ndarray                   # (h, w) int32


class Refused(ValueError):
    """An edit that would change nothing, or nothing that makes sense."""


class Stale(ValueError):
    """An edit of labels that have changed meanwhile."""


# ------------------------------------------------------------------------------------------- edits

def draw_cell(book: Book, outline: np.ndarray) -> Edit:
    """A new cell inside the outline; begun in a cell, the outline adds to that cell. Others keep
    their pixels."""
    box, inside = enclosed(outline, book.shape)
    start = book.at(outline[0])
    box, inside = widened_edit(box, inside, book.boxes.get(start))
    before = book.labels[box].copy()
    cell = start or book.fresh
    after = np.where(inside & (before == 0), cell, before)
    largest = largest_piece(after == cell)
    after[(after == cell) & ~largest & (before != cell)] = 0
    return checked_edit(Edit("draw", box, before, after),
                        "there is no free pixel inside the outline")


def cut_away(book: Book, outline: np.ndarray) -> Edit:
    """What lies inside the outline becomes background; the parts of a cell become cells, of which
    one that is more than half of it keeps its number."""
    box, inside = enclosed(outline, book.shape)
    touched = np.unique(book.labels[box][inside])
    box, inside = widened_edit(box, inside, book.box_of(touched[touched > 0]))
    before = book.labels[box].copy()
    after, fresh = np.where(inside, 0, before), book.fresh
    for cell in touched[touched > 0]:
        rest, whole = after == cell, np.count_nonzero(before == cell)
        same = int(2 * np.count_nonzero(largest_piece(rest)) > whole)   # most of it is left
        fresh = renumber_parts(after, ndimage.label(rest)[0], fresh, same)
    return checked_edit(Edit("erase", box, before, after), "there is no cell inside the outline")


def remove_cells(book: Book, ids: Iterable[int]) -> Edit:
    """Delete cells."""
    ids = [i for i in ids if i in book.boxes]
    box = book.box_of(ids)
    if box is None:
        raise Refused("there is no cell here")
    before = book.labels[box].copy()
    return Edit("remove", box, before, np.where(np.isin(before, ids), 0, before))


def remove_inside(book: Book, outline: np.ndarray) -> Edit:
    """Delete cells that lie inside the outline by more than half."""
    box, inside = enclosed(outline, book.shape)
    ids, px = np.unique(book.labels[box][inside], return_counts=True)
    mostly = [int(i) for i, n in zip(ids, px) if i and 2 * n > book.area(int(i))]
    if not mostly:
        raise Refused("no cell lies inside the line by more than half")
    return remove_cells(book, mostly)


def split_cells(book: Book, line: np.ndarray) -> Edit:
    """Part every cell that the line crosses from edge to edge; the parts have new numbers, for what
    is known of the whole is not of them."""
    y, x = line_pixels(lengthened_line(line), book.shape)
    ids = np.unique(book.labels[y, x])
    box = book.box_of(ids[ids > 0])
    if box is None:
        raise Refused("the line crosses no cell")
    before, knife = book.labels[box].copy(), box_mask(y, x, box)
    after, fresh = before.copy(), book.fresh
    for cell in ids[ids > 0]:
        mask = before == cell
        parts, count = ndimage.label(mask & ~knife)
        if count < 2:
            continue
        nearest = ndimage.distance_transform_edt(parts == 0, return_distances=False,
                                                 return_indices=True)
        parts = np.where(mask, parts[tuple(nearest)], 0)           # the cut goes to the nearer part
        fresh = renumber_parts(after, parts, fresh, 0)
    return checked_edit(Edit("split", box, before, after),
                        "the line crosses no cell from edge to edge")


def merge_cells(book: Book, line: np.ndarray) -> Edit:
    """Make one cell of those under the line, with the gap between them where the line crosses it.

    It has a number of its own: what is known of the others' vectors and outlines is not of it.
    """
    y, x = line_pixels(line, book.shape)
    under = book.labels[y, x]
    ids = [int(i) for i in dict.fromkeys(under.tolist()) if i]
    if len(ids) < 2:
        raise Refused("drag from one cell into another")
    box = book.box_of(ids)
    assert box is not None
    first, last = np.flatnonzero(under > 0)[[0, -1]]               # of the line, between the cells
    bridge = box_mask(y[first:last + 1], x[first:last + 1], box)
    before = book.labels[box].copy()
    gap = ndimage.binary_dilation(bridge, iterations=2) & (before == 0)
    after = np.where(np.isin(before, ids) | gap, book.fresh, before)
    return Edit("merge", box, before, after)


def grow_cell(book: Book, cell: int) -> Edit:
    """Move a cell's edge outwards by a pixel, into the background."""
    box = edit_box_widened(book.box_of([cell]), 1, book.shape)
    before = book.labels[box].copy()
    more = ndimage.binary_dilation(before == cell) & (before == 0)
    return checked_edit(Edit("grow", box, before, np.where(more, cell, before)),
                        "the cell has no background beside it")


def shrink_cell(book: Book, cell: int) -> Edit:
    """Move a cell's edge inwards by a pixel; the largest piece stays."""
    box = edit_box_widened(book.box_of([cell]), 1, book.shape)
    before = book.labels[box].copy()
    mask = before == cell
    less = largest_piece(ndimage.binary_erosion(mask, border_value=1))
    if not less.any():
        raise Refused("the cell is only two pixels wide; delete it instead")
    return Edit("shrink", box, before, np.where(mask & ~less, 0, before))


def edit_gesture(book: Book, line: np.ndarray) -> Edit:
    """The edit that a line by itself means: from a cell into another merges; across a cell splits;
    a loop draws a cell, or adds to the one where it begins."""
    first, last = book.at(line[0]), book.at(line[-1])
    length = float(np.hypot(*np.diff(line, axis=0).T).sum())
    closed = math.dist(line[0], line[-1]) < CLOSED * length
    if first and last and first != last:
        return merge_cells(book, line)
    if closed and (first or not last):
        return draw_cell(book, line)
    return split_cells(book, line)


# What a line, and what a click, asks for.
LINE_EDITS = {"gesture": edit_gesture, "draw": draw_cell, "erase": cut_away, "split": split_cells,
              "merge": merge_cells, "lasso": remove_inside}
CELL_EDITS = {"remove": lambda book, cell: remove_cells(book, [cell]), "grow": grow_cell,
              "shrink": shrink_cell}


def flooded_edit(book: Book, labels: np.ndarray, what: str = "flood") -> Edit:
    """New labels of the whole image around the cells that were made by hand; what was deleted by
    hand stays deleted."""
    after, hand = labels.astype(np.int32), book.by_hand()
    if hand.any():
        kept = np.unique(book.labels[hand])
        kept = kept[kept > 0]
        mine = np.isin(book.labels, kept)
        decided = hand | mine
        area = np.bincount(after.ravel())
        lost = np.bincount(after[decided], minlength=len(area))
        after = np.where(decided | (2 * lost > area)[after], 0, after)
        number = np.zeros(book.fresh, np.int32)
        number[kept] = after.max(initial=0) + 1 + np.arange(len(kept))
        after = np.where(mine, number[np.where(mine, book.labels, 0)], after)
    whole = (slice(0, after.shape[0]), slice(0, after.shape[1]))
    return Edit(what, whole, book.labels.copy(), after)


def checked_edit(edit: Edit, reason: str) -> Edit:
    if np.array_equal(edit.before, edit.after):
        raise Refused(reason)
    return edit


# ---------------------------------------------------------------------------------------- geometry

def enclosed(outline: np.ndarray, shape: tuple[int, int]) -> tuple[Region, np.ndarray]:
    """Box and mask (h, w) of the pixels with their centre inside an outline, within the image."""
    ends = np.floor(outline.min(0)), np.ceil(outline.max(0))
    (left, top), (right, bottom) = np.clip(ends, 0, shape[::-1]).astype(int).tolist()
    mask = np.zeros((bottom - top, right - left), bool)
    if len(outline) > 2 and mask.size:
        mask.ravel()[polygon_pixels([outline - (left, top)], mask.shape)] = True
    if not mask.any():
        raise Refused("too small an outline; draw around the cell")
    return (slice(top, bottom), slice(left, right)), mask


def widened_edit(box: Region, mask: np.ndarray, other: Region | None) -> tuple[Region, np.ndarray]:
    """A box that holds another, too, and its mask."""
    whole = images.region_around([box, other] if other else [box])
    return whole, np.pad(mask, [(a.start - w.start, w.stop - a.stop) for a, w in zip(box, whole)])


def edit_box_widened(box: Region | None, margin: int, shape: tuple[int, int]) -> Region:
    if box is None:
        raise Refused("there is no cell here")
    rows, columns = (slice(max(0, side.start - margin), min(n, side.stop + margin))
                     for side, n in zip(box, shape))
    return rows, columns


def lengthened_line(line: np.ndarray, px: float = 2.0) -> np.ndarray:
    """A line that goes on by some px at both ends: hands stop a little too early."""
    ends, near = [], min(3, len(line) - 1)                         # points that tell the direction
    for end, inner in ((line[0], line[near]), (line[-1], line[-1 - near])):
        away = end - inner
        ends.append(end + px * away / max(float(np.hypot(*away)), 1e-9))
    return np.concatenate((ends[:1], line, ends[1:]))


def line_pixels(line: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (y, x) in the image that a line touches, in its order, 4-connected: nothing slips
    through a diagonal."""
    places = []
    for a, b in zip(line[:-1], line[1:]):
        n = int(np.ceil(4 * np.abs(b - a).max())) + 1
        places.append(np.floor(a + (b - a) * np.linspace(0, 1, n)[:, None]).astype(int))
    x, y = np.concatenate(places).T if places else np.floor(line[:1]).astype(int).T
    step = np.flatnonzero((np.diff(x) != 0) & (np.diff(y) != 0)) + 1      # a diagonal: fill it
    x, y = np.insert(x, step, x[step]), np.insert(y, step, y[step - 1])
    inside = (x >= 0) & (y >= 0) & (x < shape[1]) & (y < shape[0])
    x, y = x[inside], y[inside]
    fresh = np.ones(len(x), bool)
    fresh[1:] = (np.diff(x) != 0) | (np.diff(y) != 0)
    return y[fresh], x[fresh]


def box_mask(y: np.ndarray, x: np.ndarray, box: Region) -> np.ndarray:
    """(h, w) bool of a box: its pixels among some (y, x) of the image."""
    y, x = y - box[0].start, x - box[1].start
    mask = np.zeros([side.stop - side.start for side in box], bool)
    inside = (y >= 0) & (y < mask.shape[0]) & (x >= 0) & (x < mask.shape[1])
    mask[y[inside], x[inside]] = True
    return mask


def largest_piece(mask: np.ndarray) -> np.ndarray:
    """The largest 4-connected part of a mask."""
    parts, count = ndimage.label(mask)
    if count < 2:
        return mask
    return parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])


def renumber_parts(labels: np.ndarray, parts: np.ndarray, fresh: int, kept: int) -> int:
    """Make a cell of each part 1, 2, ... but the `kept` largest, which keep their number, from the
    number `fresh` on; the next number."""
    for part in np.argsort(-np.bincount(parts.ravel())[1:])[kept:]:
        labels[parts == part + 1] = fresh
        fresh += 1
    return fresh


# -------------------------------------------------------------------------------------------- book

class Book:
    """Labels (H, W) of an image with every edit that led to them; its methods may be called from
    several threads."""

    def __init__(self, beginning: str | Path, shape: tuple[int, int],
                 pixel_size: float | None = None):
        self.path = Path(f"{beginning}_labels.tif")
        self.journal = Path(f"{beginning}_journal.jsonl")
        self.pixel_size, self.lock, self.saving = pixel_size, threading.RLock(), threading.Lock()
        self.shape, self.fresh = shape, 1               # fresh: a number that no cell ever had
        self.outside = 0                                # labels taken from another program
        self.read()

    def read(self) -> None:
        """Take the labels and the journal from the disk.

        Labels that were never those of the journal are of another program: they become one edit.
        """
        self.done: list[bytes] = []                     # packed edits
        self.undone: list[bytes] = []
        self.labels = np.zeros(self.shape, np.int32)
        self.boxes: dict[int, Region] = {}
        self.disk = runs.file_state(self.path)
        if self.path.exists():
            self.labels = self.labels_on_disk()
        self.written = {zlib.crc32(self.labels.data)}   # what was on the disk, and ours
        self.revision = self.size = 0
        self.saved = True
        # the bands of a large file may be of many edits; apart: px that differ from the file's
        checked = self.path.exists() and self.labels.size <= LARGE
        file, ours, apart = self.labels.copy() if checked else self.labels, True, 0
        lines = self.journal.read_bytes().splitlines(True) if self.journal.exists() else []
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):                # cut by a crash: it was not confirmed
                os.truncate(self.journal, self.size)
                break
            try:
                edit, labels = self.follow(line)
                ours &= np.array_equal(self.labels[edit.box],
                                       edit.before if labels is edit.after else edit.after)
                apart += int(np.count_nonzero(labels != file[edit.box])
                             - np.count_nonzero(self.labels[edit.box] != file[edit.box]))
                ours |= apart == 0                          # as they were after this edit
                self.labels[edit.box] = labels
            except (ValueError, LookupError, TypeError, zlib.error):
                raise ValueError(f"{self.journal}: line {number} is damaged; remove the file, the "
                                 "labels stay as they are on the disk") from None
            self.fresh = max(self.fresh, *(1 + int(part.max(initial=0))
                                           for part in (edit.before, edit.after)))
            self.revision += 1
            self.size += len(line)
            self.saved = False
        if self.path.exists() or self.done:
            self.index()
        if checked and not ours:
            self.take_outside(file)

    def labels_on_disk(self) -> np.ndarray:
        labels = images.read_labels(self.path)
        if labels.shape != self.shape:
            raise ValueError(f"{self.path}: labels of {labels.shape}, but the image has "
                             f"{self.shape} px; move them elsewhere")
        return labels

    def look(self) -> bool:
        """Take labels that another program has written since, as one edit; whether there are."""
        with self.lock:
            state = runs.file_state(self.path)
            if state in ([], self.disk):
                return False
            labels = self.labels_on_disk()              # if they cannot be read all stays
            self.disk = state
            if self.labels.size > LARGE or np.array_equal(labels, self.labels):
                return False
            if zlib.crc32(labels.data) in self.written:  # ours of before, such as an export's
                self.saved = False
                return False
            if self.has_been(labels):                   # before this book was opened
                self.saved = False
                return False
            self.take_outside(labels)
            return True

    def has_been(self, labels: np.ndarray) -> bool:
        """Whether the labels were these before some of the edits, or after some that were undone.
        """
        for lines, side in ((self.done, "before"), (self.undone, "after")):
            state = self.labels.copy()
            for line in reversed(lines):
                edit = unpacked_edit(line)
                state[edit.box] = getattr(edit, side)
                if np.array_equal(state, labels):
                    return True
        return False

    def take_outside(self, labels: np.ndarray) -> None:
        H, W = self.shape
        self.do(Edit("outside", (slice(0, H), slice(0, W)), self.labels.copy(), labels))
        self.outside += 1

    def index(self) -> None:
        """Find the box of each cell."""
        self.boxes = {i: box for i, box in enumerate(
            ndimage.find_objects(self.labels), 1) if box is not None}
        self.fresh = max(self.fresh, 1 + max(self.boxes, default=0))

    # ----------------------------------------------------------------------------------- questions

    def numbering(self) -> int:
        """Another number whenever the network or another program has numbered all cells anew."""
        with self.lock:
            for number, line in reversed([*enumerate(self.done, 1)]):
                if what_of(line) in (*WHOLE, "outside"):
                    return zlib.crc32(line, number)
            return 0

    def at(self, point: np.ndarray) -> int:
        """The cell under a point (x, y), 0 for none."""
        x, y = np.floor(point).astype(int)
        inside = 0 <= y < self.shape[0] and 0 <= x < self.shape[1]
        return int(self.labels[y, x]) if inside else 0

    def box_of(self, ids: Iterable[int]) -> Region | None:
        boxes = [self.boxes[int(i)] for i in ids if int(i) in self.boxes]
        return images.region_around(boxes) if boxes else None

    def area(self, cell: int) -> int:
        return int(np.count_nonzero(self.labels[self.boxes[cell]] == cell))

    def by_hand(self) -> np.ndarray:
        """(H, W) bool: pixels that edits by hand have changed, and what they left of a cell."""
        hand = np.zeros(self.shape, bool)
        for line in self.done:
            if what_of(line) == "outside":              # all that was before is replaced
                hand[:] = False
            elif what_of(line) not in WHOLE:
                edit = unpacked_edit(line)
                changed = edit.before != edit.after
                touched = np.unique(edit.before[changed])
                hand[edit.box] |= changed | np.isin(edit.after, touched[touched > 0])
        return hand

    # --------------------------------------------------------------------------------------- edits

    def do(self, edit: Edit) -> Region:
        return self.take(packed_edit(edit), edit)

    def undo(self) -> Region:
        with self.lock:
            if not self.done:
                raise Refused("nothing to undo")
            return self.take(journal_line(what="undo"))

    def redo(self) -> Region:
        with self.lock:
            if not self.undone:
                raise Refused("nothing to do again")
            return self.take(journal_line(what="redo"))

    def take(self, line: bytes, edit: Edit | None = None) -> Region:
        """Take an edit over: first into the journal, then into the labels."""
        with self.lock:
            self.write(line)
            edit, labels = self.follow(line, edit)
            self.change(edit.box, labels)
        return edit.box

    def follow(self, line: bytes, edit: Edit | None = None) -> tuple[Edit, np.ndarray]:
        """Move an edit to where a line of the journal says; that edit, and the labels of its box
        from now on."""
        what = what_of(line)
        if what == "undo":
            self.undone.append(self.done.pop())
            edit = unpacked_edit(self.undone[-1])
            return edit, edit.before
        if what == "redo":
            line = self.undone.pop()
        else:
            self.undone.clear()
        self.done.append(line)
        edit = edit or unpacked_edit(line)
        return edit, edit.after

    def change(self, box: Region, labels: np.ndarray) -> None:
        whole = labels.shape == self.shape
        ids = np.zeros(0, int) if whole else np.union1d(self.labels[box], labels)
        self.labels[box] = labels
        self.revision += 1
        self.saved = False
        if whole:
            return self.index()
        for cell in map(int, ids[ids > 0]):
            old = self.boxes.pop(cell, None)
            search = images.region_around([box, old]) if old else box
            y, x = np.nonzero(self.labels[search] == cell)
            if len(y):
                y, x = y + search[0].start, x + search[1].start
                self.boxes[cell] = (slice(int(y[0]), int(y[-1]) + 1),
                                    slice(int(x.min()), int(x.max()) + 1))
                self.fresh = max(self.fresh, cell + 1)

    def write(self, line: bytes) -> None:
        """Add a line to the journal, and wait until it is on the disk."""
        there = self.journal.stat().st_size if self.journal.exists() else 0
        if there != self.size:
            self.read()
            raise Stale(f"{self.journal.name} was changed by another program; its edits are shown "
                        "now")
        if self.look():
            raise Stale(f"{self.path.name} was changed by another program; its cells are shown; "
                        "undo brings back those before")
        with open(self.journal, "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.size += len(line)

    def save(self) -> None:
        """Write the labels, if they changed."""
        with self.saving:                               # edits go on while a file is written
            with self.lock:
                self.look()
                if self.saved:
                    return
                revision = self.revision
            self.write_labels()
            with self.lock:
                self.saved = self.revision == revision

    def write_labels(self) -> None:
        H, W = self.shape
        rows = H if H * W <= LARGE else images.LABEL_TILE
        writer, checksum = images.LabelWriter(self.path, self.shape, self.pixel_size), 0
        for y in range(0, H, rows):
            with self.lock:
                band = self.labels[y:y + rows].copy()
            writer.add((slice(y, y + len(band)), slice(0, W)), band)
            checksum = zlib.crc32(band.data, checksum)
        with self.lock:                                 # nobody takes it for another program's
            writer.close()
            self.written.add(checksum)
            self.disk = runs.file_state(self.path)


def journal_line(**values: Any) -> bytes:
    return json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S"), **values}).encode() + b"\n"


def packed_edit(edit: Edit) -> bytes:
    (top, bottom), (left, right) = ((side.start, side.stop) for side in edit.box)
    before, after = (base64.b64encode(zlib.compress(labels.astype("<i4").tobytes(), 1)).decode()
                     for labels in (edit.before, edit.after))
    return journal_line(what=edit.what, box=[int(n) for n in (top, left, bottom, right)],
                        before=before, after=after)


def what_of(line: bytes) -> str:
    """The word of a line for what it does, from its first bytes: it may be long."""
    return line[:100].split(b'"what": "')[1].split(b'"')[0].decode()


def unpacked_edit(line: bytes) -> Edit:
    values = json.loads(line)
    top, left, bottom, right = values["box"]
    before, after = (np.frombuffer(zlib.decompress(base64.b64decode(values[key])), "<i4")
                     .reshape(bottom - top, right - left) for key in ("before", "after"))
    return Edit(values["what"], (slice(top, bottom), slice(left, right)), before, after)
