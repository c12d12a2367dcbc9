"""Labelled sets: groups that stay together, splits, converter, checks. Readers: readers.py, files: images.py, labels.py.

    held = hold_out(examples("cells"), share=0.1, seed=0)

    python data.py convert SRC DST             any layout below -> NAME.tif and NAME_masks.tif; resumes
    python data.py split SRC by=donor fractions=0.6,0.2,0.2 [out=DIR]
                                               SRC/split.tsv; with out= DIR/split.tsv, and images converted
                                               in DIR/train, DIR/validation, DIR/test
    python data.py planes SRC DST [every=4]    stacks NAME.tif (Z, Y, X) with NAME_labels.tif -> every fourth plane
                                               with three cells or more, as `convert` writes images
    python data.py check DIR [DIR ...]         counts, and what is wrong in and between them: exit code 1
"""
from __future__ import annotations

import csv
import hashlib
import io
import re
import sys
import uuid
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tifffile

import readers
import runs
from images import (Image, Source, normalise, open_image, percentiles, read_image,  # noqa: F401
                    to_rgb)                                        # data.read_image and the like
from labels import read_labels, write_labels      # noqa: F401
from readers import TILE, Example, examples, regex, unread

def seen(example: Example) -> np.ndarray:
    """(3, H, W) float32, what a network in training sees of a labelled image."""
    pixels = example.image().pixels
    try:
        return to_rgb(normalise(pixels, percentiles(pixels)))
    except ValueError as error:                                    # of a channel too many, say
        raise ValueError(f"{example.files[0]}: {error}") from None


# ------------------------------------------------------------------------------------------ groups and splits

DONOR = r"(?i).*(?<![a-z])(?:donor|patient|subject|case)(?:[-_ ]|(?=\d))([a-z0-9]+)"
MOMENT = re.compile(r"(?i)[-_. ]?\d+d\d+h\d+m.*")                  # LIVECell's 01d04h00m_2: time and quarter
FRAME = re.compile(r"(?i)(?<![a-z0-9])(?:t|tp|time|frame|copy|crop|z|slice|plane|w|ch|channel)[-_]?\d+(?=xy|[^a-z0-9]|$)")
FIELD = re.compile(r"(?i)(?<![a-z0-9])(r\d+c\d+|[a-p]\d\d?)(?:[-_]?(?:s|f|site|field|pos)[-_]?|[-_])\d+(?:[pd]\d+)?"
                   r"(?![a-z0-9])")                                # of a well


def group_of(name: str) -> str:
    """What must not be on two sides: a time-lapse, a stack, a well, a slide, copies of an image; else the name itself.

    trpL_t09 -> trpL, 01/t012 -> 01, A172_Phase_C7_1_00d04h00m_2 -> A172_Phase_C7, nf1_F7_2 -> nf1_F7,
    jump_r01c01f03 -> jump_r01c01, slide3_b0c0x0 -> slide3, hela_copy007 -> hela. Bare numbers say nothing:
    Usiigaci's set46 and set47 are unrelated, but set23, set37 and set40 one place. Nor do DSB2018's hashes.
    """
    tile = TILE.search(name)
    name = name[:tile.start()] if tile else name
    name = FIELD.sub(r"\1", FRAME.sub("", MOMENT.sub("", name)))
    return re.sub(r"([-_. ])[-_. ]+", r"\1", name).rstrip("-_. /")


def donor_of(name: str, pattern: str | None = None) -> str:
    """What the group of a regular expression finds; by default what follows the last donor, patient, subject or case."""
    expression = regex("pattern", pattern or DONOR)
    found = expression.search(name)
    if expression.groups != 1 or not found or not found[1]:
        raise ValueError(f"no donor in the name {name}; give pattern=REGEX with one group around it, such as "
                         f"'^([^_]+)_' for 1234_tile7")
    return found[1]


def hold_out(examples: list[Example], share: float, seed: int) -> list[Example]:
    """Whole groups (group_of) of about this share of the images, at least one, never all; by names and seed.

    Images that are all of one group are cut once, the last held out: neighbours in time meet there alone.
    """
    if share <= 0 or len(examples) < 2:
        return []
    sizes = Counter(group_of(example.name) for example in examples)
    if len(sizes) == 1:
        return examples[-min(max(1, round(share * len(examples))), len(examples) - 1):]
    sides = _divide({group: ("", size) for group, size in sizes.items()}, (1 - share, share), seed)
    return [example for example in examples if sides[group_of(example.name)] == 1]


def _divide(groups: dict[str, tuple[Any, int]], fractions: Sequence[float], seed: int) -> dict[str, int]:
    """A side for each group of (stratum, images): large ones first, to where most is missing; none empty."""
    def order(group: str) -> tuple:
        stratum, size = groups[group]
        return stratum, -size, hashlib.sha256(f"{seed}/{group}".encode()).digest()

    totals = Counter()
    for stratum, size in groups.values():
        totals[stratum] += size
    sides: dict[str, int] = {}
    missing = np.zeros(len(fractions))                             # images
    for group in sorted(groups, key=order):
        stratum, size = groups[group]
        missing += np.multiply(fractions, totals.pop(stratum, 0))  # the stratum's share, with its first group
        empty = [side for side in range(len(fractions)) if side not in sides.values()]
        free = empty if len(groups) - len(sides) <= len(empty) else range(len(fractions))
        sides[group] = max(free, key=lambda side: missing[side])
        missing[sides[group]] -= size
    return sides


# --------------------------------------------------------------------------------------------------- commands

@dataclass(frozen=True)
class Options:
    channels: tuple[str, ...] | None = None # of images, numbers from 1 or names; 2 of a tile: the marker
    match: str | None = None                # regular expression: only images with it in their names
    labels: str | None = None               # which, where an image has several: masks, cells, nuclei, GT, ST
    by: Literal["image", "group", "donor"] = "image"     # split: what stays together
    fractions: tuple[float, ...] = (0.8, 0.2)            # split: of train, validation[, test]
    stratify: Literal["dataset"] | None = None           # split: each folder in SRC in these fractions
    pattern: str | None = None              # split: regular expression with one group, the donor in a name
    out: str | None = None                  # split: folder to convert the images to
    seed: int = 0                           # split
    every: int = 4                          # planes: of so many, one

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"every={self.every}: expected 1 or more")
        total = round(sum(self.fractions), 6)
        if len(self.fractions) not in (2, 3) or min(self.fractions) <= 0 or total != 1:
            raise ValueError(f"fractions={self.fractions}: expected two or three above 0 that add up to 1")


def main(options: Options, paths: list[str]) -> int:
    commands = {"convert": (convert, "SRC DST"), "split": (split, "SRC"), "planes": (planes, "SRC DST"), "check": (check, "DIR ...")}
    command = paths.pop(0) if paths else "nothing"
    if command not in commands:
        raise ValueError(f"got {command}, expected {', '.join(commands)}; --help explains them")
    run, expected = commands[command]
    if not paths or "..." not in expected and len(paths) != len(expected.split()):
        raise ValueError(f"{command}: got {' '.join(paths) or 'no folder'}, expected {expected}")
    for field in fields(Options):
        given = getattr(options, field.name) != field.default
        used = {convert: ("channels", "match", "labels"), check: ("channels", "match", "labels"), planes: ("every",)}
        if given and field.name not in used.get(run, field.name):
            raise ValueError(f"{command} does not use {field.name}=; leave it out")
    return run(options, *paths)


def _read(path: str, options: Options) -> list[Example]:
    return examples(path, options.channels, options.match, options.labels)


def convert(options: Options, source: str, target: str) -> int:
    found = _read(source, options)
    made = _write(found, source, Path(target), options)
    print(f"{target}: {made} images written, {len(found) - made} were there")
    return 0


def _write(found: list[Example], source: str, target: Path, options: Options) -> int:
    """NAME.tif and NAME_masks.tif, the image last: it says that both are there."""
    from tqdm import tqdm
    if target.resolve().is_relative_to(Path(source).resolve()):
        raise ValueError(f"{target}: is in {source}, where it would be read as data; choose a folder outside")
    chosen = {name: getattr(options, name) for name in ("channels", "match", "labels")}
    _claim(target / "converted.txt", f"from {Path(source).resolve()} with {chosen}\n")
    made = 0
    for example in tqdm(found, target.name, unit="image", delay=1, file=sys.stderr, leave=False):
        path = target / f"{example.name}.tif"
        if not path.exists():
            image, labels = example.image(), example.labels()
            if image.pixels.shape[1:] != labels.shape:
                raise ValueError(f"{example.files[0]}: {image.pixels.shape[1:]} px, labels {labels.shape}")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_labels(target / f"{example.name}_masks.tif", labels, image.pixel_size)
            write_image(path, image)
            made += 1
    return made


def _claim(record: Path, text: str) -> None:
    """Say how the files beside it are made: a folder is gone on with, but never mixed."""
    if record.exists() and record.read_text(encoding="utf-8") != text:
        raise ValueError(f"{record}: written for something else before; choose another folder, or remove it "
                         f"with all that was made beside it")
    record.parent.mkdir(parents=True, exist_ok=True)
    with runs.replacing(record) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_image(path: Path, image: Image) -> None:
    """Compressed TIFF; OME, with channel names and pixel size, if that knows the type. Always equal bytes."""
    ome: dict[str, Any] = {"UUID": uuid.uuid5(uuid.NAMESPACE_URL, path.name).urn}
    if image.channels:
        ome["Channel"] = {"Name": list(image.channels)}
    if image.pixel_size:
        ome |= {"PhysicalSizeX": image.pixel_size, "PhysicalSizeY": image.pixel_size}
    known = image.pixels.dtype.str[1:] in ("u1", "u2", "u4", "i1", "i2", "i4", "f4", "f8")
    with runs.replacing(path) as temporary:
        tifffile.imwrite(temporary, image.pixels, photometric="minisblack", compression="zlib", ome=known,
                         metadata={"axes": "CYX", **(ome if known else {})})


def split(options: Options, source: str) -> int:
    found, sides = _read(source, options), ("train", "validation", "test")[:len(options.fractions)]
    of = {"image": partial(re.sub, r"_copy\d+$", ""), "group": group_of, "donor": partial(donor_of, pattern=options.pattern)}[options.by]
    rows, members = [], defaultdict(set)                           # members: data sets of a group
    for name in (example.name for example in found):
        if options.stratify and "/" not in name:
            raise ValueError(f"{source}: stratify=dataset, but {name} lies in no folder of its own there")
        dataset = name.rpartition("/")[0].split("/")[0]
        rows.append({"name": name, "split": "", "group": of(name), "dataset": dataset})
        members[of(name)].add(dataset if options.stratify else "")
    sizes = Counter(row["group"] for row in rows)
    if len(sizes) < len(sides):
        raise ValueError(f"{source}: {len(sizes)} {options.by}s for {len(sides)} sides; give fewer fractions")
    side_of = _divide({group: (tuple(sorted(members[group])), size) for group, size in sizes.items()},
                      options.fractions, options.seed)
    for row in rows:
        row["split"] = sides[side_of[row["group"]]]

    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    table = Path(options.out or source) / "split.tsv"
    _claim(table, text.getvalue())
    for side in sides:
        chosen = [example for example, row in zip(found, rows) if row["split"] == side]
        if options.out:
            _write(chosen, source, table.parent / side, options)
        groups = {row["group"] for row in rows if row["split"] == side}
        print(f"{side}: {len(chosen)} images, {len(groups)} {options.by}s")
    print(table)
    return 0


def planes(options: Options, source: str, target: str) -> int:
    made, found = 0, sorted(Path(source).rglob("*_labels.tif"))
    if not found:
        raise ValueError(f"{source}: no NAME_labels.tif in it or below; expected stacks NAME.tif (Z, Y, X) with these beside them")
    _claim(Path(target) / "converted.txt", f"planes of {Path(source).resolve()}, every={options.every}\n")
    for labelled in found:
        name = labelled.name.removesuffix("_labels.tif")
        stack, labels = tifffile.imread(labelled.with_name(f"{name}.tif")), tifffile.imread(labelled)
        if stack.shape != labels.shape or stack.ndim != 3:
            raise ValueError(f"{labelled}: labels {labels.shape} for a stack {stack.shape}; expected (Z, Y, X), the same of both")
        for z in range(0, len(stack), options.every):
            ids, plane = np.unique(np.append(labels[z], 0), return_inverse=True)             # background first
            if len(ids) > 3:
                path = Path(target) / f"{name}_z{z:03d}.tif"
                write_labels(path.with_name(f"{path.stem}_masks.tif"), plane[:-1].reshape(labels[z].shape).astype(np.int32))
                write_image(path, Image(stack[z][None], None, None))
                made += 1
    print(f"{target}: {made} planes of {len(found)} stacks")
    return 0


def _rows(table: Path) -> list[dict[str, str]]:
    with open(table, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    if not rows or not {"name", "split", "group"} <= rows[0].keys():
        raise ValueError(f"{table}: expected columns name, split, group, as `split` writes them")
    return rows


def check(options: Options, *paths: str) -> int:
    from tqdm import tqdm
    problems, images, cells = [], 0, 0
    seen = defaultdict(list)                                       # names of images, by content
    for path in paths:
        found = _read(path, options)
        if Path(path).is_dir():
            problems += unread(Path(path), found) if options.match is None else []
            problems += _straddling(Path(path, "split.tsv"))
        for example in tqdm(found, path, unit="image", delay=1, file=sys.stderr, leave=False):
            where = f"{path}: {example.name}"
            try:
                pixels, labels = example.image().pixels, example.labels()
            except (ValueError, OSError) as error:
                problems.append(f"{where}: {error}")
                continue
            content = hashlib.sha256(f"{pixels.shape} {pixels.dtype}".encode() + pixels.tobytes()).digest()
            seen[content].append(where)
            if pixels.shape[1:] != labels.shape:
                problems.append(f"{where}: image of {pixels.shape[1:]} px, labels of {labels.shape}")
            count, several = _pieces(labels)
            if several:
                problems.append(f"{where}: {len(several)} of {count} cells in pieces, {several[:5]} ...")
            images, cells = images + 1, cells + count
    problems += [f"the same image: {', '.join(names)}" for names in seen.values() if len(names) > 1]
    for problem in problems:
        print(" ".join(problem.split()))
    print(f"{images} images, {cells} cells: " + (f"{len(problems)} problems" if problems else "clean"))
    return 1 if problems else 0


def _pieces(labels: np.ndarray) -> tuple[int, list[int]]:
    """The number of cells, and those of several pieces; what touches at a corner is one."""
    from skimage.measure import label
    pieces, first = np.unique(label(labels, connectivity=2), return_index=True)
    ids, counts = np.unique(labels.ravel()[first[pieces > 0]], return_counts=True)
    return len(ids), ids[counts > 1].tolist()


def _straddling(table: Path) -> list[str]:
    """Groups of a split.tsv that are on two sides."""
    sides = defaultdict(set)
    for row in _rows(table) if table.is_file() else []:
        sides[row["group"]].add(row["split"])
    return [f"{table}: {group} is in {' and in '.join(sorted(parts))}"
            for group, parts in sides.items() if len(parts) > 1]


if __name__ == "__main__":
    runs.script(f"{__doc__}\n{readers.__doc__}", Options, main)
