"""Unlabelled fields to pretrain on: an index of plates in S3, folders of images, or drawn ones.

    index = Index.load("jump.tsv.gz", root="/mirror")       # root: where the files lie now
    train, held = split_field_index(config, seed)           # indexes of other plates
    channels, fields = held_out_fields(config, seed)        # to measure on; never in the pool
    channels, makers = local_fields(config, seed)      # of folders and drawn: held out, then others

`FieldData` is the section `data` of train_ssl.py's configuration. An index is gzipped text with
tabs: `#root` and an s3:// address or folder; the names of columns (COLUMNS, then the channels); a
line for each field. make_index() makes it from a listing or from load_data tables.
"""
from __future__ import annotations

import csv
import functools
import gzip
import hashlib
import io
import json
import math
import os
import re
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import images
import runs
import s3

with runs.lazy():
    import data
    import segment
    import synthetic

COLUMNS = ("batch", "plate", "measurement", "row", "column", "field", "bytes", "folder")
JUMP_CHANNELS = ("Mito", "AGP", "RNA", "ER", "DNA", "HighZBF", "LowZBF", "Brightfield")    # ch1 ...
JUMP_FILE = re.compile(r"(?i)r(\d+)c(\d+)f(\d+)p\d+-ch(\d+)(?:sk\d+|fk\d+|fl\d+)+\.tiff?")
CONNECTIONS = 16                                        # requests at a time for a listing
WELL = re.compile(r"([A-Za-z]{1,2})(\d{1,2})")

Pixels = tuple[str, np.ndarray, np.ndarray | None]      # name, (C, H, W) uint16, labels if known


@dataclass(frozen=True)
class FieldData:
    index: str | None = None      # fields in S3 or on a disk, listed by `stream.py index`; streamed
    root: str | None = None           # folder of `folders`, or where the files of the index lie now
    pool: runs.Count = 512              # fields of the index that lie on the device at a time
    least: runs.Count = 1         # crops of each before it may be replaced; more spares the network
    threads: runs.Count = 32            # that download
    signed: bool = False                # read with your AWS credentials; public buckets need none
    cache: str | None = None            # folder for what was downloaded
    cache_gb: runs.NotNegative = 100.0  # 10^9 bytes, its limit
    held_share: runs.Share = 0.01       # of the fields of the index, held out in whole plates
    folders: tuple[str, ...] = ()       # or folders of images with the same channels; all resident
    match: str | None = None            # regular expression, sought in their paths below the folder
    square: runs.Count | None = None  # px, images are cut to it; the first folder's are measured on
    fields: runs.Whole = 0        # or synthetic fields to draw (synthetic.py); with square, besides
    field_size: runs.Count = 512        # px, their side
    field_cells: runs.Count = 80        # cells in the fullest; the emptiest has a third
    field_diameter: runs.Positive = 56.0    # px, of these cells
    channels: tuple[str, ...] = ()      # of the fields to use, names or numbers from 1; empty: all
    brightfield: tuple[str, ...] = ("HighZBF", "LowZBF", "Brightfield")  # which are no fluorescence
    held: runs.Count = 16        # fields to measure on, by lot; of an index: of the plates held out

    def __post_init__(self):
        given = [name for name in ("index", "folders", "fields") if getattr(self, name)]
        if len(given) != 1 and not (self.square and given == ["folders", "fields"]):
            raise ValueError(f"data: {' and '.join(given) or 'nothing'} given, expected one of "
                             "data.index, data.folders and data.fields")
        if self.square and not self.folders:
            raise ValueError(f"data.square={self.square}: expected data.folders, images to cut")


def held_out_fields(config: FieldData, seed: int) -> tuple[tuple[str, ...], Iterator[Pixels]]:
    """Channels and the fields to measure on."""
    if config.index:
        _, index = split_field_index(config, seed)
        return index_channels(index, config.channels), _streamed_fields(config, index, seed)
    channels, makers = local_fields(config, seed)
    return channels, (make() for make in makers[:config.held])


def field_extent(config: FieldData, seed: int) -> tuple[int, tuple[str, ...], tuple[int, int]]:
    """Number of fields to train on, channels, (H, W); of an index JUMP's, nothing is fetched."""
    if config.index:
        train, _ = split_field_index(config, seed)
        return len(train), index_channels(train, config.channels), (1080, 1080)
    channels, makers = local_fields(config, seed)
    return len(makers) - config.held, channels, makers[config.held]()[1].shape[1:]


def check_field_count(count: int, batch: int, config: FieldData) -> None:
    """Refuse fewer fields to train on than a batch has."""
    held = f"data.held_share={config.held_share:g}" if config.index else f"data.held={config.held}"
    if count < batch:
        raise ValueError(f"batch={batch}: {count} fields to train on beside {held}, and none is "
                         "taken twice; give more fields or a smaller batch")


# ------------------------------------------------------------------------------------------ index

class IndexedField(NamedTuple):
    name: str                                           # batch/plate/measurement/r01c01f01
    files: dict[str, str]                               # channel: name below root


class Index:
    """Fields in a fixed order, as lines of text: 378,000 of 8 channels take 150 MB."""

    def __init__(self, root: str, channels: Sequence[str], lines: list[bytes]):
        self.root, self.channels, self.lines = root.rstrip("/") + "/", tuple(channels), lines

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, number: int) -> IndexedField:
        cells = self.lines[number].decode().split("\t")
        batch, plate, measurement, row, column, field, _, folder = cells[:8]
        site = f"r{int(row):02}c{int(column):02}f{int(field):02}"
        name = "/".join(filter(None, (batch, plate, measurement, site)))
        files = {c: folder + f for c, f in zip(self.channels, cells[8:], strict=True) if f}
        return IndexedField(name, files)

    def select(self, numbers: Iterable[int]) -> Index:
        return Index(self.root, self.channels, [self.lines[i] for i in numbers])

    @functools.cached_property
    def plates(self) -> list[str]:
        """The plate of each field."""
        return [sys.intern(line.split(b"\t", 2)[1].decode()) for line in self.lines]

    @functools.cached_property
    def digest(self) -> str:
        """The same wherever root is."""
        digest = hashlib.blake2b("\t".join(self.channels).encode(), digest_size=16)
        for line in self.lines:
            digest.update(b"\n" + line)
        return digest.hexdigest()

    def plate_sizes(self) -> Iterator[tuple[str, str, int, int]]:
        """batch, plate, fields, bytes of each plate."""
        sizes: dict[tuple[str, str], list[int]] = defaultdict(list)
        for line in self.lines:
            batch, plate, *_, size, _ = line.decode().split("\t", 7)
            sizes[batch, plate].append(int(size))
        for (batch, plate), some in sorted(sizes.items()):
            yield batch, plate, len(some), sum(some)

    def save(self, path: str | Path) -> None:
        head = f"#root\t{self.root}\n" + "\t".join((*COLUMNS, *self.channels)) + "\n"
        with (runs.replacing(path) as beside, open(beside, "wb") as raw,
              gzip.GzipFile("", "wb", 1, raw, mtime=0) as file):
            file.write(head.encode())
            file.writelines(line + b"\n" for line in self.lines)

    @classmethod
    def load(cls, path: str | Path, root: str | None = None) -> Index:
        again = "write the index again with `python stream.py index`"
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such index; `python stream.py index SOURCE "
                                    f"out={path}` writes one")
        try:
            with gzip.open(path, "rb") as file:
                mark, _, written = file.readline().decode().rstrip("\n").partition("\t")
                columns = tuple(file.readline().decode().rstrip("\n").split("\t"))
                lines = [line.rstrip(b"\n") for line in file]
            count, least = len(columns), len(COLUMNS)
            if mark != "#root" or columns[:least] != COLUMNS or count == least:
                raise ValueError(f"{path}: no index of fields; {again}")
            form = re.compile(rb"[^\t]*(?:\t[^\t]*){2}(?:\t\d+){4}(?:\t[^\t]*){%d}" % (count - 7))
            for number, line in enumerate(lines, 3):
                if not form.fullmatch(line) or not line.decode().replace("\t", "").isprintable():
                    raise ValueError(f"{path}: line {number} is no field of {count} columns; "
                                     + again)
        except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: damaged or no gzip ({error}); {again}") from None
        return cls(root or written, columns[least:], lines)


def split_field_index(config: FieldData, seed: int) -> tuple[Index, Index]:
    """The index to train on and the one held out."""
    assert config.index
    return hold_out_plates(Index.load(config.index, config.root), config.held_share, seed)


def hold_out_plates(index: Index, share: float, seed: int = 0) -> tuple[Index, Index]:
    """(to train on, held out): whole plates, in all batches and measurements.

    Plates are drawn by name and seed until their fields come near `share`: one or more, never all.
    """
    sizes = Counter(index.plates)
    if not 0 < share < 1 or len(sizes) < 2:
        raise ValueError(f"{share:g} of {len(sizes)} plates to hold out: expected a share above 0 "
                         "and below 1, and two plates or more")
    held: set[str] = set()
    total, wanted = 0, share * len(index)
    for plate in sorted(sizes, key=lambda name: runs.digest(f"{seed}/{name}"))[:-1]:
        if not held or abs(total + sizes[plate] - wanted) < abs(total - wanted):
            held.add(plate)
            total += sizes[plate]
    out = np.array([plate in held for plate in index.plates])
    return index.select(np.flatnonzero(~out)), index.select(np.flatnonzero(out))


def index_channels(index: Index, channels: Sequence[str]) -> tuple[str, ...]:
    """The channels asked for, or all, as the index writes them."""
    numbers = images.pick_channels(f"index of {index.root}", channels or None, index.channels)
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"channels={','.join(channels)}: expected each once")
    return tuple(index.channels[i] for i in numbers)


class FieldReader:
    """Reads the files of an index. No answer at first is an error, later ones are waited for."""

    def __init__(self, root: str, config: FieldData):
        cache = s3.Cache(config.cache, config.cache_gb * 1e9) if config.cache else None
        self.store = s3.open_store(root, config.threads, config.signed, cache)
        self.largest = math.inf                          # bytes that one file may have

    def find_size(self, index: Index, channel: str) -> tuple[int, int]:
        """(H, W) of the first field of those that can be had; all ranks ask the same ones."""
        reasons: Counter[str] = Counter()
        for number in np.linspace(0, len(index) - 1, 8).astype(int):
            name = index[number].files.get(channel)
            try:
                size = images.tiff_size(self._body(name) if name else b"")
                self.largest = 4 * math.prod(size) + (1 << 20)
                return size
            except (s3.Absent, images.Damaged) as error:
                reasons[str(error)] += 1
        raise ValueError(f"{self.store.root}: none of 8 fields tried could be had: "
                         f"{reasons.most_common(1)[0][0]}")

    def read(self, name: str, out: np.ndarray) -> None:
        """Decode a file into out (H, W) uint16; one that came damaged is fetched once more."""
        try:
            images.decode_tiff(self._body(name), out)
        except images.Damaged:
            if not s3.is_remote(self.store.root):
                raise
            images.decode_tiff(self._body(name, fresh=True), out)

    def _body(self, name: str, **how: bool) -> bytes:
        body = self.store.read(name, self.largest, **how)
        self.store.patience = math.inf                  # the server answered: from now on wait
        return body


def _streamed_fields(config: FieldData, index: Index, seed: int) -> Iterator[Pixels]:
    """The first data.held fields of an index that can be read, in random order."""
    reader, channels = FieldReader(index.root, config), index_channels(index, config.channels)
    found = 0
    with closing(reader.store):
        shape = len(channels), *reader.find_size(index, channels[0])
        for row in np.random.default_rng((seed, 1)).permutation(len(index)):
            field, pixels = index[row], np.empty(shape, np.uint16)
            try:
                for channel, plane in zip(channels, pixels, strict=True):
                    reader.read(field.files[channel], plane)
            except (KeyError, s3.Absent, ValueError) as reason:
                print(f"{field.name} is not measured on: {reason}", file=sys.stderr)
                continue
            yield field.name, pixels, None
            found += 1
            if found == config.held:
                return


# ---------------------------------------------------------------------------------- making an index

class FoundField(NamedTuple):
    batch: str
    plate: str
    measurement: str
    row: int                                            # of the well, from 1
    column: int
    field: int
    folder: str                                     # s3:// address or path, with a slash at its end
    files: dict[str, tuple[str, int]]                   # channel: name in folder, bytes


def make_index(source: str, channels: Sequence[str] | None = None, signed: bool = False,
               journal: str | Path | None = None) -> tuple[Index, Counter]:
    """The fields below an s3:// address or folder, and counts of files.

    A source with `load_data` in its name is read by its tables, others by the names of files.
    channels : that a field must have; by default all that occur.
    journal : file of finished folders, from which a second call goes on.
    """
    if not s3.is_remote(source):
        source = str(Path(source).resolve())
    by_table = "load_data" in source
    is_table = source.endswith((".csv", ".csv.gz"))
    start, first = source.rpartition("/")[::2] if is_table else (source, "")
    root = start.rstrip("/") + "/"
    with closing(s3.open_store(root, CONNECTIONS, signed)) as store:
        visit = functools.partial(_visit_tables if by_table else _visit_files, store, root)
        rows, counts = _visit_all(visit, store.stop, first, source, journal)
    if not rows:
        if journal is not None:
            Path(journal).unlink()
        wanted = ("load_data.csv with rows" if by_table else
                  "TIFF named as r01c01f01p01-ch1sk1fk1fl1.tiff")
        raise ValueError(f"{source}: no {wanted} among {counts['keys']} files")
    common = _index_common_folder({row.folder for row in rows if row.files}) if by_table else root
    if common in ("", "s3:/", "s3://"):
        raise ValueError(f"{source}: its tables name files without a folder or in several buckets; "
                         "index them one by one")
    return _field_index(rows, common, channels, counts), counts


def _visit_all(visit: Callable, stop: Callable, first: str, source: str,
               journal: str | Path | None) -> tuple[list[FoundField], Counter]:
    """All rows below `first`; each folder that a thread finished is a line of the journal."""
    from tqdm import tqdm
    done = {} if journal is None else _read_index_journal(Path(journal), source)
    rows: list[FoundField] = []
    counts, running = Counter[str](), dict[Future, str]()
    begin: dict[str, Any] = {"rows": [], "counts": {"keys": 0}, "places": [first]}
    visited = [begin, *done.values()]
    with (tqdm(unit=" keys", unit_scale=True, file=sys.stderr, delay=1, leave=False) as bar,
          open(journal or os.devnull, "a", encoding="utf-8") as log,
          ThreadPoolExecutor(CONNECTIONS) as threads):
        if journal is not None and log.tell() == 0:
            log.write(json.dumps({"source": source}) + "\n")
        try:
            while visited:
                for result in visited:
                    rows += [FoundField(*values) for values in result["rows"]]
                    counts.update(result["counts"])
                    bar.update(result["counts"]["keys"])
                    running |= {threads.submit(visit, place): place
                                for place in result["places"] if place not in done}
                visited = []
                for future in wait(running, return_when=FIRST_COMPLETED)[0]:
                    visited.append({"place": running.pop(future), **future.result()})
                    log.write(json.dumps(visited[-1]) + "\n")
                    log.flush()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            stop()
    return rows, counts


def _read_index_journal(path: Path, source: str) -> dict[str, dict]:
    """Finished folders; a last line that was cut off is removed."""
    if not path.exists():
        return {}
    whole = path.read_bytes()
    whole = whole[:whole.rfind(b"\n") + 1]
    try:
        head, *lines = map(json.loads, whole.splitlines()) if whole else [{"source": source}]
        begun, done = head["source"], {line["place"]: line for line in lines}
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{path}: damaged; remove it, and the index is made anew") from None
    if begun != source:
        raise ValueError(f"{path}: begun for {begun}; remove it or change out=")
    os.truncate(path, len(whole))
    return done


def _visit_files(store, root: str, place: str) -> dict:
    """Fields of one folder, by the names of its files."""
    counts: Counter[str] = Counter()
    fields: dict[tuple, dict[str, tuple[str, int]]] = defaultdict(dict)
    places: set[str] = set()
    batch, plate, measurement = _plate_acquisition(root + place)
    for folders, files in store.pages(place):
        places.update(f"{place}{folder}/" for folder in folders if folder.isprintable())
        counts["keys"] += len(files)
        for name, size in files:
            found = JUMP_FILE.fullmatch(name)
            if not found or not (root + place).isprintable():     # a tab would break the table
                counts["other"] += 1
                continue
            *site, channel = map(int, found.groups())
            known = 0 < channel <= len(JUMP_CHANNELS)
            label = JUMP_CHANNELS[channel - 1] if known else f"ch{channel}"
            old = fields[tuple(site)].get(label)
            counts["repeated"] += old is not None        # a further plane or time point
            if old is None or name < old[0]:             # the first one counts
                fields[tuple(site)][label] = name, size
    rows = [(batch, plate, measurement, *site, root + place, files)
            for site, files in fields.items()]
    return {"rows": rows, "places": sorted(places), "counts": counts}


def _plate_acquisition(folder: str) -> tuple[str, str, str]:
    """.../B/images/P__2020-Measurement1/Images/ -> B, P, 2020-Measurement1 (batch, plate, ...)"""
    parts = [part for part in folder.split("/") if part]
    if parts and parts[-1].lower() == "images":
        parts.pop()
    plate, _, measurement = parts.pop().partition("__") if parts else ("", "", "")
    if parts and parts[-1].lower() == "images":
        parts.pop()
    return (parts[-1] if parts else ""), plate, measurement


def _visit_tables(store, root: str, place: str) -> dict:
    """Fields of a load_data table, or the tables and folders in a folder."""
    if place.endswith((".csv", ".csv.gz")):
        try:
            rows = list(_plate_table_rows(store.read(place), root + place))
        except csv.Error as error:
            raise ValueError(f"{root + place}: damaged or no table ({error})") from None
        keys = sum(len(files) for *_, files in rows)
        return {"rows": rows, "places": [], "counts": {"keys": keys}}
    places, tables = [], []
    for folders, files in store.pages(place):
        places += [f"{place}{folder}/" for folder in folders if folder.isprintable()]
        tables += [name for name, _ in files if re.fullmatch(r"load_data.*\.csv(\.gz)?", name)]
    tables.sort(key=lambda name: (name.split(".")[0], name))   # load_data before ..._with_illum
    places += [place + name for name in tables[:1]]
    return {"rows": [], "places": places, "counts": {"keys": 0}}


def _plate_table_rows(body: bytes, where: str) -> Iterator[tuple]:
    """Rows of a load_data table, with addresses or paths on the machine that wrote it."""
    try:
        text = (gzip.decompress(body) if where.endswith(".gz") else body).decode("utf-8-sig")
    except (EOFError, zlib.error, UnicodeDecodeError, gzip.BadGzipFile) as error:
        raise ValueError(f"{where}: damaged or no table ({error})") from None
    table = csv.DictReader(io.StringIO(text, newline=""))
    labels = [re.sub(r"^(URL|FileName)_Orig", "", column) for column in table.fieldnames or ()
              if re.match(r"(URL|FileName)_Orig", column)]
    if not labels or "Metadata_Plate" not in (table.fieldnames or ()):
        raise ValueError(f"{where}: no load_data table with columns Metadata_Plate and "
                         "FileName_Orig... or URL_Orig...")
    for number, line in enumerate(table, 2):
        found = {label: address for label in labels
                 if (address := _field_address(line, label)) and address.isprintable()}
        folder = _index_common_folder(address.rpartition("/")[0] for address in found.values())
        files = {label: (address.removeprefix(folder), 0) for label, address in found.items()}
        above = where.split("/")                        # .../batch/plate/load_data.csv
        batch = line.get("Metadata_Batch") or (above[-3] if len(above) > 2 else "")
        try:
            site = _plate_site(line)
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{where}: line {number} has no Metadata_Well such as A01 (or Row and "
                             "Col) and whole number Metadata_Site") from None
        plate = line["Metadata_Plate"]
        if plate is None or not (batch + plate).isprintable():
            raise ValueError(f"{where}: line {number} has no plate, or control characters in it")
        yield batch, plate, "", *site, folder, files


def _field_address(line: dict, label: str) -> str:
    """s3://bucket/key or a path of a channel in a line of load_data, or nothing."""
    url = line.get(f"URL_Orig{label}") or ""
    if not url:
        path, name = (line.get(f"{key}Name_Orig{label}") or "" for key in ("Path", "File"))
        url = f"{path.rstrip('/')}/{name}" if name and path else name
    url = re.sub(r"https?://([^./]+)\.s3[^/]*\.amazonaws\.com/", r"s3://\1/", url)
    url = re.sub(r"https?://s3[^/]*\.amazonaws\.com/", "s3://", url)
    return url.removeprefix("file:")


def _plate_site(line: dict) -> tuple[int, int, int]:
    """Row and column of the well, and the field."""
    if well := WELL.fullmatch(line.get("Metadata_Well") or ""):
        letters = [ord(letter) - 64 for letter in well[1].upper()]
        row, column = letters[-1] + 26 * sum(letters[:-1]), int(well[2])         # Z is 26, AA 27
    else:
        row, column = int(line["Metadata_Row"]), int(line["Metadata_Col"])
    return row, column, int(line["Metadata_Site"])


def _index_common_folder(folders: Iterable[str]) -> str:
    """The folder above all, with a slash at its end, or nothing."""
    parts = os.path.commonprefix([folder.rstrip("/").split("/") for folder in folders])
    return "/".join(parts) + "/" if parts else ""


def _field_index(rows: list[FoundField], root: str, channels: Sequence[str] | None, counts: Counter
                 ) -> Index:
    """An index of sorted rows; counts incomplete and repeated fields, and missing channels."""
    labels = {label for row in rows for label in row.files}
    known = [name for name in JUMP_CHANNELS if name in labels]
    every = Index(root, [*known, *sorted(labels - set(known))], [])
    chosen = index_channels(every, channels or ())
    lines: dict[tuple, bytes] = {}
    for row in sorted(rows, key=lambda row: row[:6]):
        site = row[:6]
        missing = [name for name in chosen if name not in row.files]
        counts["incomplete"] += bool(missing)
        counts.update(f"without {name}" for name in missing)
        counts["twice"] += site in lines
        if missing or site in lines:
            continue
        names, sizes = zip(*(row.files[name] for name in chosen), strict=True)
        cells = (*site, sum(sizes), row.folder.removeprefix(root), *names)
        lines[site] = "\t".join(map(str, cells)).encode()
    if not lines:
        raise ValueError(f"{root}: all {counts['incomplete']} fields miss one of "
                         f"{', '.join(chosen)}; channels= asks for fewer")
    return Index(root, chosen, list(lines.values()))


# ------------------------------------------------------------------------ folders and drawn fields

def local_fields(config: FieldData, seed: int
                 ) -> tuple[tuple[str, ...], list[functools.partial[Pixels]]]:
    """Channels and a function of file or number for each field, first for those held out."""
    make = _mixed_fields if config.square else _drawn_fields if config.fields else _whole_fields
    return make(config, seed)


def synthetic_channels(channels: Sequence[str]) -> list[int]:
    """Numbers from 0 of the channels of synthetic.py that are asked for; of all for none."""
    return images.pick_channels("channels", channels or None, synthetic.CHANNELS)


def _drawn_fields(config: FieldData, seed: int):
    rows = synthetic_channels(config.channels)

    def draw(number: int) -> Pixels:
        field = _synthetic_field(config, seed, number, config.field_size)
        return f"synthetic {number}", np.ascontiguousarray(field.pixels[rows]), field.labels
    makers = [functools.partial(draw, number) for number in range(config.held + config.fields)]
    return tuple(synthetic.CHANNELS[i] for i in rows), makers


def _synthetic_field(config: FieldData, seed: int, number: int, size: int):
    own = seed * 100003 + number
    cells = config.field_cells * np.random.default_rng(own).uniform(1 / 3, 1)
    cells = max(1, round(cells * (size / config.field_size) ** 2))
    return synthetic.field(own, size, cells, config.field_diameter)


def _whole_fields(config: FieldData, seed: int):
    """Images of one size, as they are."""
    found = sum(_files_of_folders(config), [])
    channels, shape, order = _by_lot(found, config, seed)

    def read(path: Path) -> Pixels:
        pixels = _field_pixels(path, config.channels)
        if pixels.shape != shape:
            raise ValueError(f"{path}: {pixels.shape}, expected {shape} as in {found[0].name}; "
                             "data.square cuts images of many sizes to one")
        return path.stem, pixels, None
    return channels, [functools.partial(read, path) for path in order]


def _mixed_fields(config: FieldData, seed: int):
    """Fields of one size from unlike images, with the number of channels of the first folder.

    Squares cover an image; a smaller one is mirrored. Of more channels some are drawn, fewer are
    repeated. Random whole images of the first folder are held out.
    """
    assert config.square
    home, *others = _files_of_folders(config)
    channels, (C, *_), order = _by_lot(home, config, seed)
    side, read = config.square, functools.lru_cache(maxsize=1)(_field_pixels)  # squares in a row

    def whole(path: Path) -> Pixels:
        pixels = _field_pixels(path, config.channels)
        if len(pixels) != C:
            raise ValueError(f"{path}: {len(pixels)} channels, expected {C} as in {home[0].name}, "
                             "since images of the first of data.folders are measured on")
        return path.stem, pixels, None

    def fit(name: str, pixels: np.ndarray) -> Pixels:                 # (c, h, w) -> (C, side, side)
        c, h, w = pixels.shape
        rng = np.random.default_rng(int(runs.digest(f"{seed}/{name}")[:16], 16))
        rows: np.ndarray = np.resize(rng.permutation(c) if c > C else np.arange(c), C)
        return name, np.pad(pixels[rows], ((0, 0), (0, side - h), (0, side - w)), "symmetric"), None

    def square(path: Path, used: tuple[str, ...], y: int, x: int) -> Pixels:
        return fit(f"{path.stem} {y},{x}", read(path, used)[:, y:y + side, x:x + side])

    def draw(number: int) -> Pixels:
        return fit(f"synthetic {number}", _synthetic_field(config, seed, number, side).pixels)

    makers = [functools.partial(whole, path) for path in order[:config.held]]
    sources = [(path, config.channels) for path in order[config.held:]]
    for path, used in [*sources, *((path, ()) for found in others for path in found)]:
        with images.open_image(path) as source:
            _, H, W = source.shape
        makers += [functools.partial(square, path, used, y, x)
                   for y in segment.tile_starts(H, side, 0)
                   for x in segment.tile_starts(W, side, 0)]
    return channels, makers + [functools.partial(draw, number) for number in range(config.fields)]


def _files_of_folders(config: FieldData) -> list[list[Path]]:
    """Images below each folder; none below two, where one could be held out and trained on."""
    found = [_field_files(config, folder) for folder in config.folders]
    seen: dict[Path, int] = {}
    for number, files in enumerate(found):
        for path in files:
            if (other := seen.setdefault(path.resolve(), number)) != number:
                raise ValueError(f"data.folders: {path} lies in {config.folders[other]} and in "
                                 f"{config.folders[number]}; expected folders without common "
                                 "images")
    return found


def _field_files(config: FieldData, folder: str) -> list[Path]:
    """Images below a folder, without labels and what programs write beside them."""
    root = Path(config.root or "", folder)
    others = (*images.LABEL_ENDS, *images.BYPRODUCTS)
    found = [path for path in images.image_files(root) if not data.stem_of(path).endswith(others)]
    if config.match is not None:
        wanted = data.labelled_name_pattern("data.match", config.match)
        found = [path for path in found if wanted.search(path.relative_to(root).as_posix())]
    if not found:
        what = f" with '{config.match}' in their path" if config.match else ""
        raise ValueError(f"data.folders: {root}: no images{what}")
    return sorted(found, key=lambda path: (path.parent.parts, path.name))   # before the draw


def _by_lot(found: list[Path], config: FieldData, seed: int):
    """Channels and shape of the first image, and all images in random order."""
    if len(found) <= config.held:
        raise ValueError(f"data.folders={', '.join(config.folders)}: {len(found)} images, expected "
                         f"more than data.held={config.held}")
    with images.open_image(found[0], config.channels or None) as first:
        numbers = map(str, range(1, first.shape[0] + 1))
        channels = tuple(first.channels or config.channels or numbers)
        order = np.random.default_rng((seed, 1)).permutation(len(found))
        return channels, first.shape, [found[i] for i in order]


def _field_pixels(path: Path, channels: tuple[str, ...]) -> np.ndarray:
    """(C, H, W) uint16."""
    pixels = images.read_image(path, channels or None).pixels
    if pixels.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"{path}: {pixels.dtype}, expected 8 or 16 bits")
    return pixels.astype(np.uint16)
