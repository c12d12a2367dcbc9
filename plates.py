"""Which fields there are: plates of wells of fields, each a file per channel; listed once, kept in a table.

    index = Index.load("jump.tsv.gz", root="/mirror")       # root: where the files lie now
    train, validation = hold_out(index, 0.01, seed=0)       # whole plates
    index[0].name, index[0].files["DNA"]

The table is tab-separated text, gzipped: `#root`, a tab and an s3:// address or folder; a line of column
names (batch, plate, measurement, row, column, field, bytes, folder, then the channels); a line for each field
with its files in folder below root. A missing file is empty. make_index() makes it from a listing or from
load_data tables.
"""
from __future__ import annotations

import csv
import functools
import gzip
import hashlib
import io
import json
import os
import re
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import numpy as np

from store import open_store

COLUMNS = ("batch", "plate", "measurement", "row", "column", "field", "bytes", "folder")
CHANNELS = ("Mito", "AGP", "RNA", "ER", "DNA", "HighZBF", "LowZBF", "Brightfield")     # ch1 to ch8 of CPJUMP1
FILE = re.compile(r"r(\d+)c(\d+)f(\d+)p\d+-ch(\d+)(?:sk\d+|fk\d+|fl\d+)+\.tiff?", re.IGNORECASE)
WELL = re.compile(r"([A-Za-z]{1,2})(\d{1,2})")


class Field(NamedTuple):
    name: str                                           # batch/plate/measurement/r01c01f01
    batch: str
    plate: str
    row: int                                            # of the well, from 1
    column: int
    field: int
    bytes: int                                          # of all channels together; 0: not known
    files: dict[str, str]                               # channel: name below root; those there are


class Index:
    """Fields in a fixed order. Lines of text are kept as they are: 378,000 of 8 channels take 150 MB."""

    def __init__(self, root: str, channels: Sequence[str], lines: list[bytes]):
        self.root, self.channels, self.lines = rooted(root), tuple(channels), lines

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, number: int) -> Field:
        cells = self.lines[number].decode().split("\t")
        batch, plate, measurement, row, column, field, size, folder, *files = cells
        site = f"r{int(row):02}c{int(column):02}f{int(field):02}"
        return Field("/".join(filter(None, (batch, plate, measurement, site))), batch, plate, int(row),
                     int(column),
                     int(field), int(size), {c: folder + f for c, f in zip(self.channels, files) if f})

    def select(self, numbers: Sequence[int]) -> Index:
        return Index(self.root, self.channels, [self.lines[i] for i in numbers])

    @functools.cached_property
    def plates(self) -> list[str]:
        """The plate of each field, whichever batch or measurement."""
        seen: dict[bytes, str] = {}                     # one text for each plate, not for each field
        found = (line.split(b"\t", 2)[1] for line in self.lines)
        return [seen.get(plate) or seen.setdefault(plate, plate.decode()) for plate in found]

    @functools.cached_property
    def digest(self) -> str:
        """The same wherever root is."""
        digest = hashlib.blake2b("\t".join(self.channels).encode(), digest_size=16)
        for line in self.lines:
            digest.update(b"\n" + line)
        return digest.hexdigest()

    def save(self, path: str | Path) -> None:
        path = Path(path)
        beside = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with open(beside, "wb") as raw, gzip.GzipFile("", "wb", 1, raw, mtime=0) as file:
                file.write(f"#root\t{self.root}\n{chr(9).join((*COLUMNS, *self.channels))}\n".encode())
                for line in self.lines:
                    file.write(line + b"\n")
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path, root: str | None = None) -> Index:
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such index; write one with `python stream.py index SOURCE "
                                    f"out={path}`")
        try:
            with gzip.open(path, "rb") as file:
                first, head = file.readline().decode().rstrip("\n"), file.readline().decode().rstrip("\n")
                mark, _, written = first.partition("\t")
                columns = tuple(head.split("\t"))
                if mark != "#root" or columns[:len(COLUMNS)] != COLUMNS or len(columns) == len(COLUMNS):
                    raise ValueError(f"{path}: no index of fields, as `python stream.py index` writes them")
                lines = [line.rstrip(b"\n") for line in file]
            form = re.compile(rb"[^\t]*(?:\t[^\t]*){2}(?:\t\d+){4}(?:\t[^\t]*){%d}" % (len(columns) - 7))
            for number, line in enumerate(lines):
                if not form.fullmatch(line) or not plain(line.decode().replace("\t", "")):
                    raise ValueError(f"{path}: line {number + 3} is no field of {len(columns)} columns; "
                                     "write the index again with `python stream.py index`")
        except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: damaged or no gzip ({error}); write it again with `python stream.py "
                             "index`") from None
        return cls(root or written, columns[len(COLUMNS):], lines)


def rooted(root: str) -> str:
    """With one slash at its end."""
    return str(root).rstrip("/") + "/"


def hold_out(index: Index, plates: Sequence[str] | float, seed: int = 0) -> tuple[Index, Index]:
    """(to train on, held out): whole plates, in all batches and measurements, since their cells are the same.

    plates : names, or a share of the fields; then plates drawn by name and seed that come nearest to it, at
    least one and never all.
    """
    sizes = Counter(index.plates)
    if isinstance(plates, (int, float)):
        if not 0 < plates < 1 or len(sizes) < 2:
            raise ValueError(f"{plates:g} of {len(sizes)} plates to hold out: expected a share above 0 and "
                             "below 1, and two plates or more")
        held, total, wanted = set(), 0, plates * len(index)
        for plate in sorted(sizes, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())[:-1]:
            if not held or abs(total + sizes[plate] - wanted) < abs(total - wanted):
                held.add(plate)
                total += sizes[plate]
    else:
        held = set(plates)
        for plate in sorted(held - set(sizes)):
            near = get_close_matches(plate, sizes, 1)
            raise ValueError(f"no plate '{plate}' to hold out" + (f", did you mean '{near[0]}'?" if near else
                             f"; the index has {len(sizes)}, such as {min(sizes, default='none')}"))
        if not held or held == set(sizes):
            raise ValueError(f"{len(held)} of {len(sizes)} plates to hold out: expected one or more, but not "
                             "all")
    out = np.array([plate in held for plate in index.plates])
    return index.select(np.flatnonzero(~out)), index.select(np.flatnonzero(out))


# ------------------------------------------------------------------------------------------------ making it

class Row(NamedTuple):
    """A field as it was found."""
    batch: str
    plate: str
    measurement: str
    row: int
    column: int
    field: int
    folder: str                                         # s3:// address or path, with a slash at its end
    files: dict[str, tuple[str, int]]                   # channel: name in folder, bytes


def make_index(source: str, kind: str = "listing", channels: Sequence[str] | None = None,
               incomplete: str = "drop",
               root: str | None = None, names: Sequence[str] = CHANNELS, journal: str | Path | None = None,
               connections: int = 16, endpoint: str | None = None, signed: bool = False,
               patience: float = 60.0
               ) -> tuple[Index, dict[str, int]]:
    """The fields below an s3:// address or folder, and what was counted on the way.

    kind : "listing" goes by file names, "load_data" by tables.
    channels : of which a field must have a file; all that occur by default.
    incomplete : "drop" or "keep" fields that miss one.
    root : where the files lie, if not where the names say.
    names : what ch1, ch2, ... are.
    journal : file that keeps finished folders; a second call goes on from it.
    """
    if not source.startswith("s3://"):
        source = str(Path(source).resolve())
    start, first = (source.rpartition("/")[::2] if source.endswith((".csv", ".csv.gz")) else (source, ""))
    store = open_store(rooted(start), connections, endpoint, signed, patience=patience,
                       notice=lambda text: print(text, file=sys.stderr))
    visit = _Listing(store, rooted(start), names) if kind == "listing" else _Tables(store, rooted(start))
    try:
        rows, counts = _walk(visit, first, f"{source} {kind} {','.join(names)}", journal, connections)
    finally:
        store.stop()
        store.close()
    if not rows:
        if journal is not None:
            Path(journal).unlink()
        tiff, table = "TIFF named as r01c01f01p01-ch1sk1fk1fl1.tiff", "load_data.csv with rows"
        what = tiff if kind == "listing" else table
        raise ValueError(f"{source}: no {what} among {counts['keys']} files")
    common = rooted(start) if kind == "listing" else _common({row.folder for row in rows if row.files})
    if common in ("", "s3:/", "s3://"):
        raise ValueError(f"{source}: its tables name files in several buckets, or without a folder; index them "
                         "one by one")
    index = _table(rows, common, channels, incomplete, counts)
    return Index(root or common, index.channels, index.lines), counts


def _walk(visit, first: str, what: str, journal: str | Path | None, connections: int
          ) -> tuple[list[Row], Counter]:
    """All rows below `first`: threads visit places, and each finished one is a line of the journal."""
    from tqdm import tqdm
    done: dict[str, dict] = {}
    if journal is not None:
        done = _read_journal(Path(journal), what)
    rows, counts, waiting, running = [], Counter(), [first], {}
    with tqdm(unit=" keys", unit_scale=True, file=sys.stderr, delay=1, leave=False) as bar, \
            open(journal or os.devnull, "a",
                 encoding="utf-8") as log, ThreadPoolExecutor(connections) as pool:
        if journal is not None and log.tell() == 0:
            log.write(json.dumps({"what": what}) + "\n")
        try:
            while waiting or running:
                while waiting:
                    place = waiting.pop()
                    if place not in done:
                        running[pool.submit(visit, place, bar.update)] = place
                        continue
                    found = done.pop(place)
                    bar.update(found["counts"]["keys"])
                    waiting += _collect(found, rows, counts)
                finished, _ = wait(running, return_when=FIRST_COMPLETED) if running else ((), ())
                for future in finished:
                    found = {"place": running.pop(future), **future.result()}
                    log.write(json.dumps(found) + "\n")
                    log.flush()
                    waiting += _collect(found, rows, counts)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            visit.store.stop()
    return rows, counts


def _collect(found: dict, rows: list[Row], counts: Counter) -> list[str]:
    rows += [Row(*values) for values in found["rows"]]
    counts.update(found["counts"])
    return found["places"]


def _read_journal(path: Path, what: str) -> dict[str, dict]:
    """Finished places; a last line that was cut off is removed."""
    if not path.exists():
        return {}
    whole = path.read_bytes()
    whole = whole[:whole.rfind(b"\n") + 1]
    lines = [json.loads(line) for line in whole.splitlines()]
    if lines and lines[0] != {"what": what}:
        raise ValueError(f"{path}: begun for {lines[0].get('what')}; remove it, or give another out=")
    os.truncate(path, len(whole))
    return {line["place"]: line for line in lines[1:]}


class _Listing:
    """Fields of one folder, by the names of its files."""

    def __init__(self, store, root: str, names: Sequence[str]):
        self.store, self.root, self.names = store, root, tuple(names)

    def __call__(self, place: str, progress) -> dict:
        counts, fields, places = Counter(), defaultdict(dict), set()
        batch, plate, measurement = acquisition(self.root + place)
        for folders, files in self.store.pages(place):
            places.update(f"{place}{folder}/" for folder in folders if plain(folder))
            counts["keys"] += len(files)
            progress(len(files))
            for name, size in files:
                found = FILE.fullmatch(name)
                if not found or not plain(self.root + place):
                    counts["other"] += 1
                    continue
                row, column, field, channel = map(int, found.groups())
                label = self.names[channel - 1] if 0 < channel <= len(self.names) else f"ch{channel}"
                old = fields[row, column, field].get(label)
                counts["repeated"] += old is not None    # a further plane or time point: the first counts
                if old is None or name < old[0]:
                    fields[row, column, field][label] = name, size
        return {"rows": [(batch, plate, measurement, *site, self.root + place, files) for site,
                         files in fields.items()],
                "places": sorted(places), "counts": counts}


def acquisition(folder: str) -> tuple[str, str, str]:
    """batch, plate, measurement: .../B/images/P__2020-Measurement1/Images/ -> B, P, 2020-Measurement1"""
    parts = [part for part in folder.split("/") if part]
    if parts and parts[-1].lower() == "images":
        parts.pop()
    plate, _, measurement = parts.pop().partition("__") if parts else ("", "", "")
    if parts and parts[-1].lower() == "images":
        parts.pop()
    return (parts[-1] if parts else ""), plate, measurement


def plain(text: str) -> bool:
    """Whether it can stand in a table: no tabs, line ends, other control characters or undecodable bytes."""
    return text.isprintable()


class _Tables:
    """Fields of one folder's load_data table; it names addresses, or paths on the machine that wrote it."""

    def __init__(self, store, root: str):
        self.store, self.root = store, root

    def __call__(self, place: str, progress) -> dict:
        if place.endswith((".csv", ".csv.gz")):
            return self._table(place, progress)
        places, tables = [], []
        for folders, files in self.store.pages(place):
            places += [f"{place}{folder}/" for folder in folders if plain(folder)]
            tables += [name for name, _ in files if re.fullmatch(r"load_data.*\.csv(\.gz)?", name)]
        tables.sort(key=lambda name: (name.split(".")[0], name))       # load_data before load_data_with_illum
        return {"rows": [], "places": places + [place + name for name in tables[:1]], "counts": {"keys": 0}}

    def _table(self, place: str, progress) -> dict:
        where = self.root + place
        try:
            body = self.store.read(place)
            text = (gzip.decompress(body) if place.endswith(".gz") else body).decode("utf-8-sig")
        except (EOFError, zlib.error, UnicodeDecodeError, gzip.BadGzipFile) as error:
            raise ValueError(f"{where}: damaged or no table ({error})") from None
        table = csv.DictReader(io.StringIO(text, newline=""))
        labels = [re.sub(r"^(URL|FileName)_Orig", "", column) for column in table.fieldnames or ()
                  if re.match(r"(URL|FileName)_Orig", column)]
        if not labels or "Metadata_Plate" not in table.fieldnames:
            raise ValueError(f"{where}: no columns Metadata_Plate and FileName_Orig... or URL_Orig...; no "
                             "load_data table")
        rows, keys = [], 0
        for number, line in enumerate(table, 2):
            found = {label: address for label in labels if plain(address := _address(line, label))
                     and address}
            folder = _common(address.rpartition("/")[0] for address in found.values())
            files = {label: (address.removeprefix(folder), 0) for label, address in found.items()}
            batch = line.get("Metadata_Batch") or where.split("/")[-3]         # .../batch/plate/load_data.csv
            try:
                row, column, field = _site(line)
            except (KeyError, TypeError, ValueError):
                raise ValueError(f"{where}: line {number} has no Metadata_Well such as A01 (or Row and Col) "
                                 "and whole number Metadata_Site") from None
            if not plain(batch + line["Metadata_Plate"]):
                raise ValueError(f"{where}: line {number} has control characters in its plate")
            rows.append((batch, line["Metadata_Plate"], "", row, column, field, folder, files))
            keys += len(files)
        progress(keys)
        return {"rows": rows, "places": [], "counts": {"keys": keys}}


def _address(line: dict, label: str) -> str:
    """s3://bucket/key or a path, of one channel in a line of load_data; empty if there is none."""
    url = line.get(f"URL_Orig{label}") or ""
    if not url:
        path, name = line.get(f"PathName_Orig{label}") or "", line.get(f"FileName_Orig{label}") or ""
        url = f"{path.rstrip('/')}/{name}" if name and path else name
    for pattern in (r"https?://([^./]+)\.s3[^/]*\.amazonaws\.com/(.*)",
                    r"https?://s3[^/]*\.amazonaws\.com/([^/]+)/(.*)"):
        if found := re.fullmatch(pattern, url):
            return f"s3://{found[1]}/{found[2]}"
    return url.removeprefix("file:")


def _site(line: dict) -> tuple[int, int, int]:
    well = WELL.fullmatch(line.get("Metadata_Well") or "")
    if well:
        letters = [ord(letter) - 64 for letter in well[1].upper()]
        row, column = letters[-1] + 26 * sum(letters[:-1]), int(well[2])         # Z is 26, AA 27
    else:
        row, column = int(line["Metadata_Row"]), int(line["Metadata_Col"])
    return row, column, int(line["Metadata_Site"])


def _common(folders: Iterable[str]) -> str:
    """The folder that all of them are in, with a slash at its end; empty if there is none."""
    parts = os.path.commonprefix([folder.rstrip("/").split("/") for folder in folders])
    return "/".join(parts) + "/" if parts else ""


def _table(rows: list[Row], root: str, channels: Sequence[str] | None, incomplete: str,
           counts: Counter) -> Index:
    """Sorted lines; counts incomplete fields, what they miss, and fields that occur twice."""
    found = Counter(label for row in rows for label in row.files)
    order = {name: number for number, name in enumerate(CHANNELS)}
    chosen = tuple(channels or sorted(found, key=lambda name: (order.get(name, len(order)), name)))
    for name in chosen:
        if name not in found:
            raise ValueError(f"channels: no '{name}' in {root}; there are {', '.join(sorted(found))}")
    lines: dict[tuple, bytes] = {}
    for row in sorted(rows, key=lambda row: row[:6]):
        missing = [name for name in chosen if name not in row.files]
        counts["incomplete"] += bool(missing)
        counts.update(f"without {name}" for name in missing)
        if row[:6] in lines:
            counts["twice"] += 1
            continue
        if len(missing) == len(chosen) or missing and incomplete == "drop":
            continue
        files, sizes = zip(*(row.files.get(name, ("", 0)) for name in chosen))
        cells = (*row[:6], sum(sizes), row.folder.removeprefix(root), *files)
        lines[row[:6]] = "\t".join(map(str, cells)).encode()
    if not lines:
        raise ValueError(f"{root}: all {counts['incomplete']} fields miss one of {', '.join(chosen)}; "
                         "incomplete=keep keeps them, channels= asks for fewer")
    return Index(root, chosen, list(lines.values()))


def summary(index: Index) -> Iterator[tuple[str, str, int, int]]:
    """batch, plate, fields, bytes of each plate."""
    fields, sizes = Counter(), Counter()
    for line in index.lines:
        batch, plate, _, _, _, _, size, _ = line.split(b"\t", 7)
        fields[batch, plate] += 1
        sizes[batch, plate] += int(size)
    for batch, plate in sorted(fields):
        yield batch.decode(), plate.decode(), fields[batch, plate], sizes[batch, plate]
