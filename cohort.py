"""From tiles of images to donors: pairs of files, marker intensities, lines of shards, thresholds, tables.

    tiles, lost, passed = find_tiles("slides", r"b0c(?P<channel>\\d+)")    # pairs; the rest, and why
    values = intensity(labels, read_tile(tiles[0])[1])                    # the marker over each cell
    done = recorded("shards", key)                                        # tile -> its line, of all shards
    cuts = thresholds(done.values(), "otsu")                              # donor -> threshold
    donors = read_donors("outcomes.tsv", "donor", ["braaksc"])            # .names, .outcomes (K, D)

M models, D donors, N tiles of all donors, K outcomes, k covariates.
"""
from __future__ import annotations

import csv
import difflib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import association
import data
import runs

MISSING = ("", "na", "n/a", "nan", "null", "none", ".", "-")      # what people write where there is no value
UNNAMED = ("", "na", "n/a", "nan", "null")                        # the same of a category, where none is a treatment


# ------------------------------------------------------------------------------------------------- tiles

class Tile(NamedTuple):
    name: str                    # path below the folder, without suffix, that its image of nuclei has
    donor: str
    files: tuple[Path, Path]     # nuclei, marker


def find_tiles(root: str | Path, pattern: str, nuclei: str = "0", marker: str = "1", donor: str | None = None
               ) -> tuple[list[Tile], dict[str, str], int]:
    """Tiles by name; names of those that cannot be used, and why; the number of files passed over.

    pattern : regular expression, sought in the names of .tif and .tiff files; its group `channel` is the
        channel, and names that differ in nothing else are one tile.
    donor : regular expression with one group, sought in a tile's name; None: as in donor_7 (data.donor_of).
    """
    root, expression, passed = Path(root), data.regex("pattern", pattern), 0
    if not root.is_dir():
        raise FileNotFoundError(f"tiles={root}: no such folder")
    found: dict[str, dict[str, list[Path]]] = defaultdict(lambda: {nuclei: [], marker: []})
    for folder, files in data.walk(root):
        for file in files:
            match = expression.search(file.stem) if file.suffix.lower() in (".tif", ".tiff") else None
            if match and match["channel"] in (nuclei, marker):
                begin, end = match.span("channel")
                name = folder / (file.stem[:begin] + nuclei + file.stem[end:])
                found[name.relative_to(root).as_posix()][match["channel"]].append(file)
            else:
                passed += 1
    if not found:
        raise ValueError(f"tiles={root}: no tiles; none of its {passed} files is a .tif or .tiff of channel "
                         f"{nuclei} or {marker} with '{pattern}' in its name; give pattern=")
    tiles, lost = [], {}
    for name, images in sorted(found.items()):
        try:
            for channel, what in ((nuclei, "nuclei"), (marker, "marker")):
                if len(images[channel]) != 1:
                    names = ", ".join(file.name for file in images[channel])
                    raise ValueError(f"{len(images[channel]) or 'no'} images of the {what} {names}".strip())
            tiles.append(Tile(name, data.donor_of(name, donor), (images[nuclei][0], images[marker][0])))
        except ValueError as error:
            lost[name] = str(error)
    if not tiles:
        name, why = next(iter(lost.items()))
        raise ValueError(f"tiles={root}: none of {len(lost)} tiles can be used; {name}: {why}")
    return tiles, lost, passed


def read_tile(tile: Tile) -> np.ndarray:
    """(2, H, W): nuclei, marker."""
    nuclei, marker = (data.read_image(path).pixels for path in tile.files)
    for path, pixels in zip(tile.files, (nuclei, marker)):
        if pixels.shape != (1, *nuclei.shape[1:]):
            raise ValueError(f"{path}: (C, H, W) = {pixels.shape}, expected one channel, as large as "
                             f"{tile.files[0].name}")
    if nuclei.dtype != marker.dtype:
        raise ValueError(f"{tile.files[1]}: pixels of {marker.dtype}, expected {nuclei.dtype} as in "
                         f"{tile.files[0].name}")
    return np.concatenate([nuclei, marker])


def intensity(labels: np.ndarray, marker: np.ndarray, percentile: float | None = None) -> np.ndarray:
    """Mean, or percentile as of numpy, of the marker (H, W) over each cell 1..n of labels (H, W): (n,)."""
    size = np.bincount(labels.ravel())[1:]
    if percentile is None:
        return np.bincount(labels.ravel(), marker.ravel())[1:] / size
    cell, value = labels[labels > 0], marker[labels > 0].astype(float)
    value = value[np.lexsort((value, cell))]                  # cell after cell, ascending in each
    first, at = np.cumsum(size) - size, (size - 1) * percentile / 100
    low = at.astype(int)
    below, above = value[first + low], value[first + np.minimum(low + 1, size - 1)]
    return below + (at - low) * (above - below)


# ------------------------------------------------------------------------------------------------ shards

def lines(path: Path) -> list[dict]:
    """What a shard has written; a line that is being written, or that a crash cut, is passed over."""
    found = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return found


def recorded(folder: str | Path, key: str) -> dict[str, dict]:
    """Tile -> its line, of all shards however many there were; a line with `why` says why there are no cells.

    Lines of another key were made with other weights or settings. A tile done in one shard counts as done.
    """
    found: dict[str, dict] = {}
    for path in sorted(Path(folder).glob("*.jsonl")):
        for line in lines(path):
            if line["key"] == key and ("why" not in line or line["tile"] not in found):
                found[line["tile"]] = line
    return found


def thresholds(done: Iterable[dict], how: str, value: float | None = None, controls: Sequence[str] = (),
               percentile: float = 99.0) -> dict[str, float]:
    """Donor -> the marker intensity above which its cells are positive, from lines of tiles that are done.

    how : fixed (`value`), otsu (over all cells), controls (a percentile of the cells of those donors) or
        otsu_per_donor; a donor whose cells do not fall into two classes then has no positive cell.
    """
    parts, kinds = defaultdict(list), {}
    for line in done:
        parts[line["donor"]].append(line["intensity"])
        kinds.setdefault(line["dtype"], line["tile"])
    if len(kinds) > 1 and how != "otsu_per_donor":
        said = ", ".join(f"{kind} ({tile})" for kind, tile in kinds.items())
        raise ValueError(f"tiles have pixels of {said}: no one threshold fits both; export them alike")
    cells = {donor: np.concatenate(found).astype(float) for donor, found in parts.items()}
    if how == "fixed":
        return dict.fromkeys(cells, float(value))
    if how == "otsu_per_donor":
        return {donor: association.otsu(found) if len(found) and np.ptp(found) else math.inf
                for donor, found in cells.items()}
    if how == "controls":
        if absent := [donor for donor in controls if donor not in cells]:
            raise ValueError(f"controls={absent[0]}: no tiles of it; donors are {some(sorted(cells))}")
        found = np.concatenate([cells[donor] for donor in controls])
        if not len(found):
            raise ValueError(f"controls={','.join(controls)}: no cells in their tiles; use threshold=fixed")
        return dict.fromkeys(cells, float(np.percentile(found, percentile)))
    try:
        return dict.fromkeys(cells, association.otsu(np.concatenate([*cells.values(), []])))
    except ValueError as error:
        raise ValueError(f"threshold=otsu: marker intensities are {error}; use threshold=fixed") from None


# ------------------------------------------------------------------------------------------------ donors

class Cohort(NamedTuple):
    donors: list[str]            # D
    flags: list[str]             # D, why a donor is left out; "" if it is not
    donor: np.ndarray            # (N,) 0..D-1, of the tiles that every model has done
    cells: np.ndarray            # (M, N)
    positive: np.ndarray         # (M, N)

    def sums(self, counts: np.ndarray) -> np.ndarray:
        """(M, N) of tiles -> (M, D) of donors."""
        return np.stack([np.bincount(self.donor, row, len(self.donors)) for row in counts])


def read_cohort(paths: Sequence[Path], controls: Sequence[str] = (), min_tiles: int = 1, min_cells: int = 1
                ) -> Cohort:
    """Counts of tiles, one table for each model; a donor is flagged if it has too little in any of them."""
    tables = [{row["tile"]: row for row in read_table(path, ("donor", "tile", "cells", "positive"),
                                                      "run `downstream.py merge` first")} for path in paths]
    names = [name for name in tables[0] if all(name in table for table in tables)]
    donors = sorted({tables[0][name]["donor"] for name in names})
    place = {name: number for number, name in enumerate(donors)}
    donor = np.array([place[tables[0][name]["donor"]] for name in names], int)
    cells, positive = (np.array([[int(table[name][what]) for name in names] for table in tables])
                       for what in ("cells", "positive"))
    cohort = Cohort(donors, [], donor, cells, positive)
    tiles, least = np.bincount(donor, minlength=len(donors)), cohort.sums(cells).min(0)
    return cohort._replace(flags=[
        "negative control" if name in controls else
        f"fewer than {min_tiles} tiles" if tiles[d] < min_tiles else
        f"fewer than {min_cells} cells" if least[d] < min_cells else "" for d, name in enumerate(donors)])


class Donors(NamedTuple):
    """The table of outcomes."""
    names: list[str]
    outcomes: np.ndarray                 # (K, D), NaN where missing
    covariates: np.ndarray | None        # (k, D); of a category 0 and 1 for each level but the first


def read_donors(path: str | Path, donor: str, outcomes: Sequence[str], covariates: Sequence[str] = (),
                categories: Sequence[str] = ()) -> Donors:
    """Outcomes and covariates by donor; the words are names of columns."""
    path = Path(path)
    columns = (donor, *outcomes, *covariates, *categories)
    rows = read_table(path, columns, "give outcomes=, a table with a row for each donor")
    seen: dict[str, int] = {}
    for number, row in enumerate(rows, 2):
        if not row[donor]:
            raise ValueError(f"{path}, line {number}: no donor in column {donor}; name it or remove the line")
        if row[donor] in seen:
            raise ValueError(f"{path}, line {number}: donor {row[donor]} stands in line {seen[row[donor]]} "
                             "already; keep one line for each")
        seen[row[donor]] = number

    def numbers(column: str) -> list[float]:
        return [number_of(row[column], f"{path}, line {line}, donor {name}: {column}")
                for row, (name, line) in zip(rows, seen.items())]

    extra = [numbers(column) for column in covariates]
    for column in categories:
        words = [row[column] for row in rows]
        levels = sorted({word for word in words if word.lower() not in UNNAMED})
        extra += [[math.nan if word.lower() in UNNAMED else float(word == level) for word in words]
                  for level in levels[1:]]
    return Donors(list(seen), np.array([numbers(column) for column in outcomes]),
                  np.array(extra) if extra else None)


# ------------------------------------------------------------------------------------------------ tables

def read_table(path: Path, needed: Iterable[str], advice: str) -> list[dict[str, str]]:
    """Rows of a table with tabs or commas, without blanks around the words; `needed` are columns."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such table; {advice}")
    try:
        text = path.read_text(encoding="utf-8-sig")           # -sig: Excel puts a mark in front
    except UnicodeDecodeError:
        raise ValueError(f"{path}: no text in UTF-8; save the table as text, with tabs or commas") from None
    delimiter = "\t" if "\t" in text.partition("\n")[0] else ","
    rows = [[word.strip() for word in row] for row in csv.reader(text.splitlines(), delimiter=delimiter)]
    while rows and not any(rows[-1]):                         # blank lines, or empty cells below the table
        rows.pop()
    names = rows[0] if rows else []
    for name in needed:
        if names.count(name) != 1:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"columns are {some(names, 12)}"
            raise ValueError(f"{path}: {names.count(name) or 'no'} columns '{name}', expected one; {hint}")
    for number, row in enumerate(rows, 1):
        if len(row) != len(names):
            raise ValueError(f"{path}, line {number}: {len(row)} values, expected {len(names)} as in line 1")
    return [dict(zip(names, row)) for row in rows[1:]]


def number_of(text: str, where: str) -> float:
    """NaN for what stands for a missing value; `where` heads the error."""
    try:
        value = math.nan if text.lower() in MISSING else float(text)
    except ValueError:
        value = math.inf
    if math.isinf(value):
        raise ValueError(f"{where} is '{text}', expected a number, or NA where it is missing")
    return value


def write_tsv(path: str | Path, rows: list[dict], columns: Iterable[str] = ()) -> None:
    """Numbers with ten digits, nothing for NaN; `columns` where there may be no row to tell them."""
    def printed(value: Any) -> str:
        if isinstance(value, (float, np.floating)):
            return "" if math.isnan(value) else f"{value:.10g}"
        return " ".join(str(value).split())

    columns, path = list(columns or rows[0]), Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    table = [columns, *([printed(row[name]) for name in columns] for row in rows)]
    runs.write_text(path, "".join("\t".join(line) + "\n" for line in table))


def some(names: Sequence[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
