"""Bytes from S3 or a folder, fetched with patience; a cache on disk; results back to S3.

    store = open_store("s3://cellpainting-gallery/cpg0000-jump-pilot/")
    body = store.read("source_4/images/.../r01c01f01p01-ch1sk1fk1fl1.tiff")      # or Absent
    for folders, files in store.pages("source_4/"): ...          # directly below; bytes of files
    store.close()

    for address, file in download(files_below("s3://bucket/plate1/")): ...
    with open_s3_output("s3://bucket/cells/") as output:
        if not output.has(["a_labels.tif"]): ...                 # write it to output.folder
        output.deliver()                                         # and it goes to S3

Names are relative to the root, with slashes. Many threads may use one store. Reading is anonymous
unless signed; writing always uses your AWS credentials. AWS_ENDPOINT_URL in the environment names
another server than Amazon's.
"""
from __future__ import annotations

import math
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import runs

try:
    import fcntl
except ImportError:                     # Windows, which reads without a cache
    fcntl = None  # type: ignore[assignment]
with runs.lazy():
    import boto3
    import botocore
    import urllib3

Answer = TypeVar("Answer")
Page = tuple[list[str], list[tuple[str, int]]]          # folders, (file, bytes) directly below

CONNECT, READ = 5.0, 10.0       # seconds until connected, and until the next byte
TIME_LIMIT = 60.0               # seconds for one object; twice as many after each slow try
PATIENCE = 45.0                 # seconds without any answer until a call raises ConnectionError
SLOWEST = 1e6                   # bytes a second; a large object may take longer than TIME_LIMIT
TRIES = 8                       # failures of one object that count, see Bucket
LONGEST = 15.0                  # seconds between two tries of one object, at most
QUIET = 15.0                    # seconds without an answer that are called an outage
CHUNK = 1 << 16                 # bytes of a body that are asked for at once
UPLOAD_EVERY = 30.0             # seconds between two uploads of a file that grows
BUSY = ("SlowDown", "Throttling", "RequestTimeout", "RequestTimeTooSkewed", "InternalError",
        "ServiceUnavailable")


class Absent(OSError):
    """A file that cannot be had; the text is the reason, without the name."""


class Closed(Exception):
    """The store was closed while a call waited."""


def is_remote(address: object) -> bool:
    return str(address).startswith("s3://")


def open_store(root: str, connections: int = 16, signed: bool = False, cache: Cache | None = None
               ) -> Folder | Bucket:
    """The store at s3://bucket/prefix or in a folder; signed : with the user's credentials."""
    if not is_remote(root):
        if "://" in root:
            raise ValueError(f"{root}: expected s3://bucket/prefix or a folder; AWS_ENDPOINT_URL "
                             "names another server")
        return Folder(root)
    return Bucket(root, connections, signed, cache)


def check_object_size(size: int | None, largest: float) -> None:
    if size is not None and size > largest:
        raise Absent(f"wrong size, {size / 1e6:.0f} MB of at most {largest / 1e6:.0f} MB")
    if size == 0:
        raise Absent("an empty file, 0 bytes")


class Folder:
    """A store on a disk."""

    def __init__(self, root: str):
        self.root, self.patience = Path(root), 0.0       # a disk answers at once
        self.counts: Counter[str] = Counter()
        self.notice: Callable[[str], None] = print       # but there are no notices
        if not self.root.is_dir():
            raise FileNotFoundError(f"{root}: no such folder; give one, or an s3:// address")

    def read(self, name: str, largest: float = math.inf, fresh: bool = False) -> bytes:
        if name.startswith("/") or "\0" in name or ".." in name.split("/"):
            raise Absent("a name that leads out of the folder")
        try:
            with open(self.root / name, "rb") as file:
                check_object_size(os.fstat(file.fileno()).st_size, largest)
                return file.read()
        except Absent:
            raise
        except OSError as error:
            raise Absent(error.strerror or str(error)) from None

    def pages(self, folder: str) -> Iterator[Page]:
        with os.scandir(self.root / folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        yield ([entry.name for entry in entries if entry.is_dir()],
               [(entry.name, entry.stat().st_size) for entry in entries if entry.is_file()])

    def outage(self) -> float:
        return 0.0

    def stop(self) -> None:
        pass

    def close(self) -> None:
        pass


class Bucket:
    """A store on S3.

    A try that fails (no connection, reset, cut off, too slow, 5xx, 429) is repeated after a wait
    that doubles. Failures count against an object only if the server answered others meanwhile:
    while nothing answers, threads wait, until `patience` ends.
    """

    def __init__(self, root: str, connections: int, signed: bool, cache: Cache | None = None):
        if not root.removeprefix("s3://").strip("/"):
            raise ValueError(f"{root}: names no bucket, expected s3://bucket/prefix")
        self.root, self.patience, self.cache = root, PATIENCE, cache
        self.counts: Counter[str] = Counter()            # bytes, retries, cache_hits
        self.bucket, _, prefix = root.removeprefix("s3://").partition("/")
        self.prefix = prefix.rstrip("/") + "/" if prefix.strip("/") else ""
        access = {} if signed else {"signature_version": botocore.UNSIGNED}
        try:                                             # tries are made here, bodies included
            session = boto3.session.Session()
            self.client = session.client("s3", config=botocore.config.Config(
                max_pool_connections=connections, connect_timeout=CONNECT, read_timeout=READ,
                retries={"total_max_attempts": 1}, **access))
        except botocore.exceptions.BotoCoreError as error:             # of AWS_PROFILE and the like
            raise ValueError(f"{root}: {error}") from None
        self.server = self.client.meta.endpoint_url
        self.address = root if "amazonaws.com" in self.server else self.server + root
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._answers = 0                                # whole ones so far
        self._good: str | None = None                    # the last good key
        self._heard = time.monotonic()                   # last sign of life
        self._silent_since: float | None = None          # of an outage that was announced
        self.notice: Callable[[str], None] = lambda text: print(text, file=sys.stderr)

    def read(self, name: str, largest: float = math.inf, fresh: bool = False) -> bytes:
        """The bytes of an object of at most `largest`; fresh: not from the cache."""
        key, address = self.prefix + name, self.address + name
        if self.cache and fresh:
            self.cache.drop(address)
        elif self.cache and (body := self.cache.get(address)) is not None:
            self._count(cache_hits=1)
            return body
        body = self._retried(lambda seconds: self._whole(key, seconds, largest))
        self._count(bytes=len(body))
        if self.cache:
            try:
                self.cache.put(address, body)
            except OSError as error:                     # a full disk is no reason to stop
                self.cache.limit = 0
                self.notice(f"{self.cache.folder}: {error.strerror}; nothing more is cached")
        return body

    def _count(self, **more: int) -> None:
        with self._lock:
            self.counts.update(more)

    def head(self, name: str, size: int) -> bytes:
        """The first `size` bytes of an object."""
        key = self.prefix + name
        return self._retried(lambda seconds: self._whole(key, seconds, Range=f"bytes=0-{size - 1}"))

    def fetch(self, name: str, file: Path, most: float) -> None:
        """Write an object of at most `most` bytes to a file, in little memory."""
        key = self.prefix + name

        def get(seconds: float) -> None:
            with open(file, "wb") as out:
                for piece in self._pieces(key, seconds, most):
                    out.write(piece)
        self._retried(get)
        self._count(bytes=file.stat().st_size)

    def _whole(self, key: str, seconds: float, largest: float = math.inf, **part: str) -> bytes:
        return b"".join(self._pieces(key, seconds, largest, **part))

    def _pieces(self, key: str, seconds: float, largest: float, **part: str) -> Iterator[bytes]:
        """The body of an object, piece by piece, so that a drip of bytes meets the time limit.

        A server may leave its size out.
        """
        end, came = time.monotonic() + seconds, 0
        response = self.client.get_object(Bucket=self.bucket, Key=key, **part)
        self._heard = time.monotonic()
        size: int | None = response.get("ContentLength")
        with response["Body"] as raw:
            check_object_size(size, largest)
            read = getattr(raw, "read1", raw.read)       # urllib3 before 2.2 has no read1
            while size is None or came < size:
                if self._stop.is_set():
                    raise Closed
                if time.monotonic() > end + came / SLOWEST:
                    raise TimeoutError
                piece = read(CHUNK)
                if not piece and size is not None:
                    raise ConnectionError(f"{came} of {size} bytes came")
                if not piece:
                    break
                came += len(piece)
                check_object_size(came, largest)
                yield piece
        check_object_size(came, largest)
        self._good = key

    def write(self, name: str, file: str | Path) -> None:
        """Upload a file as object `name`."""
        def put(seconds: float) -> None:
            with open(file, "rb") as body:
                self.client.put_object(Bucket=self.bucket, Key=self.prefix + name, Body=body)
        try:
            self._retried(put)
        except Absent as error:
            raise OSError(f"s3://{self.bucket}/{self.prefix}{name}: cannot be written, {error} "
                          f"from {self.server}") from None

    def pages(self, folder: str, deep: bool = False) -> Iterator[Page]:
        """deep: all files below, with their folders in the names."""
        where, begin = self.prefix + folder, len(self.prefix + folder)
        more: dict[str, Any] = {} if deep else {"Delimiter": "/"}

        def ask(seconds: float) -> dict:
            return self.client.list_objects_v2(Bucket=self.bucket, Prefix=where, **more)

        page: dict[str, Any] = {"IsTruncated": True}
        while page.get("IsTruncated"):
            try:
                page = self._retried(ask)
            except Absent as error:
                raise OSError(f"s3://{self.bucket}/{where}: cannot be listed, {error} from "
                              f"{self.server}; signed=true uses your credentials") from None
            folders = [entry["Prefix"] for entry in page.get("CommonPrefixes", ())]
            yield ([folder[begin:].rstrip("/") for folder in folders],
                   [(entry["Key"][begin:], entry["Size"]) for entry in page.get("Contents", ())
                    if entry["Key"] != where])
            more["ContinuationToken"] = page.get("NextContinuationToken")

    def _retried(self, once: Callable[[float], Answer]) -> Answer:
        """The answer of once(seconds), tried until it comes, is given up, or patience ends."""
        known, begun = botocore.exceptions, time.monotonic()
        answers, failures, counted, slow = self._answers, 0, 0, 0
        while not self._stop.is_set():
            try:
                answer = once(TIME_LIMIT * 2 ** slow)
                self._answered()
                return answer
            except known.ClientError as error:
                reason = detail = self._refusal(error)
            except TimeoutError:
                reason = detail = "too slow"
                self._heard, slow = time.monotonic(), slow + 1         # it was answering, if slowly
            except (known.ConnectionError, known.HTTPClientError, ConnectionError,
                    botocore.parsers.ResponseParserError, urllib3.exceptions.HTTPError) as error:
                reason, detail = type(error).__name__, f"{type(error).__name__}: {error}"
            except known.NoCredentialsError:
                raise OSError(f"{self.root}: no AWS credentials found, which signed=true and "
                              "writing need; set AWS_PROFILE or AWS_ACCESS_KEY_ID") from None
            except known.BotoCoreError as error:         # wrong parameters: no try would help
                raise OSError(f"{self.root}: {error}") from None
            failures += 1
            self._count(retries=1)
            if self._answers > answers or self._alive():
                counted, answers = counted + 1, self._answers
            if counted >= TRIES:
                raise Absent(f"{reason} (again and again)")
            since = max(begun, self._heard)
            if time.monotonic() - since > self.patience:
                raise ConnectionError(
                    f"{self.root}: no answer in {self.patience:g} s and {failures} tries from "
                    f"{self.server}, last: {detail}; check the network, or AWS_ENDPOINT_URL")
            self._complain(since, detail)
            self._stop.wait(min(LONGEST, 0.1 * 2 ** min(failures, 10)) * random.uniform(0.5, 1))
        raise Closed

    def _refusal(self, error: Any) -> str:
        """The status of an answer that another try may mend; else Absent."""
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        code = str(error.response.get("Error", {}).get("Code", ""))
        reason = str(status) if code in ("", str(status)) else f"{status} {code}"
        if status < 500 and status != 429 and code not in BUSY:
            self._answered()
            raise Absent(reason) from None
        return reason

    def _alive(self) -> bool:
        """The server still gives the last good object, or knows its bucket, if none came yet."""
        known = botocore.exceptions
        try:
            if self._good:
                return bool(self._whole(self._good, TIME_LIMIT, Range="bytes=0-0"))
            return bool(self.client.head_bucket(Bucket=self.bucket))     # an answer without a body
        except known.ClientError as error:
            return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500) < 500
        except (known.BotoCoreError, urllib3.exceptions.HTTPError, OSError):
            return False

    def _answered(self) -> None:
        with self._lock:
            self._answers, self._heard = self._answers + 1, time.monotonic()
            since, self._silent_since = self._silent_since, None
        if since is not None:
            self.notice(f"{self.root} answers again after {self._heard - since:.0f} s")

    def _complain(self, since: float, reason: str) -> None:
        """Announce an outage, once."""
        with self._lock:
            quiet = time.monotonic() - since
            if quiet < QUIET or self._silent_since is not None:
                return
            self._silent_since = since
        self.notice(f"{self.root} has not answered for {quiet:.0f} s ({reason})")

    def outage(self) -> float:
        """Seconds since an announced outage began, else 0."""
        since = self._silent_since
        return 0.0 if since is None else time.monotonic() - since

    def stop(self) -> None:
        """Make all calls end in Closed, within READ seconds."""
        self._stop.set()

    def close(self) -> None:
        """Call after all other threads have finished."""
        self.stop()
        self.client.close()


# ------------------------------------------------------------------------------------------ cache

class Cache:
    """Bodies on disk by the hash of their address, at most `limit` bytes; the least used go.

    A lock file, which holds the number of bytes, makes processes take turns.
    """

    def __init__(self, folder: str | Path, limit: float):
        self.folder, self.limit = Path(folder), limit
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, address: str) -> Path:
        name = runs.digest(address)
        return self.folder / name[:2] / name[2:]

    def get(self, address: str) -> bytes | None:
        path = self.path(address)
        try:
            body = path.read_bytes()
            os.utime(path)                               # used now; access times are often not kept
            return body
        except OSError:                                  # not here, or removed by another process
            return None

    def put(self, address: str, body: bytes) -> None:
        path = self.path(address)
        if fcntl is None or len(body) > self.limit:
            return
        path.parent.mkdir(exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
        try:
            beside.write_bytes(body)
            with open(self.folder / "bytes.lock", "a+", encoding="ascii",
                      errors="replace") as file:
                fcntl.flock(file, fcntl.LOCK_EX)         # until closed
                if path.exists():
                    return
                file.seek(0)
                total = int(text) if (text := file.read()).isdigit() else -1   # zeros after a crash
                if total < 0 or total + len(body) > self.limit:
                    total = self._make_room(len(body))
                file.truncate(0)
                file.write(str(total + len(body)))
                os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)

    def drop(self, address: str) -> None:
        """Remove a damaged body; its bytes count until the next clearing."""
        self.path(address).unlink(missing_ok=True)

    def _make_room(self, size: int) -> int:
        """Remove the least recently used until a tenth is free; the bytes left."""
        files, total, wanted = [], 0, max(0, min(0.9 * self.limit, self.limit - size))
        for path in self.folder.glob("??/*"):
            with suppress(FileNotFoundError):
                status = path.stat()
                if not path.name.endswith(".part"):
                    files.append((status.st_mtime_ns, status.st_size, path))
                    total += status.st_size
                elif status.st_mtime < time.time() - 3600:             # its process was killed
                    path.unlink()
        for _, length, path in sorted(files):
            if total <= wanted:
                break
            path.unlink(missing_ok=True)
            total -= length
        return total


# -------------------------------------------------------------------- images here, results there

def files_below(address: str, signed: bool = False) -> dict[str, str]:
    """Address -> name below, of all objects below s3://..."""
    with closing(Bucket(address, 1, signed)) as store:
        return {f"{address.rstrip('/')}/{name}": name
                for _, files in store.pages("", deep=True) for name, _ in files}


def download(addresses: Sequence[Path | str], signed: bool = False
             ) -> Iterator[tuple[Path | str, Path | OSError]]:
    """Each address with a file on this machine or an error; the next is fetched meanwhile.

    Files from S3 are removed after their turn.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dinocell-")))
        ahead = stack.enter_context(ThreadPoolExecutor(1))
        stores: dict[str, Bucket] = {}

        def fetch(number: int) -> Path | OSError:
            address = str(addresses[number])
            if not is_remote(address):
                return Path(address)
            bucket, _, name = address.removeprefix("s3://").partition("/")
            if bucket not in stores:
                stores[bucket] = Bucket(f"s3://{bucket}", 2, signed)
                stack.callback(stores[bucket].close)
            file = folder / f"{number}{Path(name).suffix}"
            try:
                stores[bucket].fetch(name, file, shutil.disk_usage(folder).free)
            except Absent as error:
                file.unlink(missing_ok=True)
                room = f", the room in {folder.parent}" * ("of at most" in str(error))
                return OSError(f"{address}: {error}{room}")
            return file

        coming = ahead.submit(fetch, 0)
        for number, address in enumerate(addresses):
            file = coming.result()
            if number + 1 < len(addresses):
                coming = ahead.submit(fetch, number + 1)
            yield address, file
            if is_remote(address) and isinstance(file, Path):
                file.unlink()


class OutputFolder:
    """A folder for results."""

    def __init__(self, folder: Path):
        self.folder = folder

    def has(self, names: Sequence[str]) -> bool:
        """All are there, and none is empty."""
        return all((self.folder / name).is_file() and (self.folder / name).stat().st_size
                   for name in names)

    def head(self, name: str, size: int) -> bytes:
        """The first `size` bytes of a file that is there."""
        with open(self.folder / name, "rb") as file:
            return file.read(size)

    def withdraw(self, names: Sequence[str]) -> None:
        """Before others are delivered in their place; on a disk they were replaced already."""

    def deliver(self) -> None:
        """Say that the files are finished."""


class OutputBucket(OutputFolder):
    """A folder on this machine; deliver() uploads its files, those that grow now and then."""

    def __init__(self, folder: Path, store: Bucket, growing: Sequence[str]):
        super().__init__(folder)
        self.store, self.growing, self.uploaded = store, growing, time.monotonic()
        self.there = {name for _, files in store.pages("") for name, size in files if size}
        for name in self.there.intersection(growing):
            (folder / name).write_bytes(store.read(name))

    def has(self, names: Sequence[str]) -> bool:
        return self.there.issuperset(names)

    def head(self, name: str, size: int) -> bytes:
        return self.store.head(name, size)

    def withdraw(self, names: Sequence[str]) -> None:
        """Make the labels empty first, so that what is stopped here is begun anew."""
        for name in filter(self.there.__contains__, names):
            self.store.write(name, Path(os.devnull))
            self.there.discard(name)

    def deliver(self) -> None:
        """Upload the labels last, for they stand for all files of an image."""
        for file in sorted(self.folder.rglob("*"),
                           key=lambda file: (file.name.endswith("_labels.tif"), file)):
            name = file.relative_to(self.folder).as_posix()
            if file.is_file() and name not in self.growing and not name.startswith("."):
                self.store.write(name, file)
                self.there.add(name)
                file.unlink()
        if time.monotonic() - self.uploaded > UPLOAD_EVERY:
            self.upload_growing()

    def upload_growing(self) -> None:
        for name in self.growing:
            if (self.folder / name).exists():
                self.store.write(name, self.folder / name)
        self.uploaded = time.monotonic()


@contextmanager
def open_s3_output(address: str, growing: Sequence[str] = ()) -> Iterator[OutputBucket]:
    """The folder for results at s3://...; tables are uploaded after an interruption, too."""
    with (tempfile.TemporaryDirectory(prefix="dinocell-") as folder,
          closing(Bucket(address, 4, signed=True)) as store):
        output = OutputBucket(Path(folder), store, growing)
        try:
            yield output
        finally:
            output.upload_growing()
