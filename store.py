"""Bytes by name, from S3 or a folder, fetched with patience; and a disk cache that processes share.

    store = open_store("s3://cellpainting-gallery/cpg0000-jump-pilot/", connections=32)
    body = store.read("source_4/images/.../r01c01f01p01-ch1sk1fk1fl1.tiff")  # bytes, or Absent with a reason
    for folders, files in store.pages("source_4/"):                          # names directly below, and sizes
        ...
    store.close()

Names are relative to the root, with slashes. Many threads may use one store. boto3 is imported for S3 alone.
"""
from __future__ import annotations

import contextlib
import hashlib
import math
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

Answer = TypeVar("Answer")
Page = tuple[list[str], list[tuple[str, int]]]          # folders, (file, bytes) directly below

CONNECT, READ = 5.0, 10.0               # seconds until connected, and until the next byte
TRIES = 8                               # failures of one object that count, see Bucket._tried
LONGEST = 15.0                          # seconds between two tries of one object, at most
QUIET = 15.0                            # seconds without an answer that are called an outage
BUSY = ("SlowDown", "Throttling", "RequestTimeout", "RequestTimeTooSkewed", "InternalError",
        "ServiceUnavailable")


class Absent(OSError):
    """What was asked for cannot be had; the text is the reason, without the name."""


class Stopped(Exception):
    """The store was closed meanwhile."""


def open_store(root: str, connections: int = 16, endpoint: str | None = None, signed: bool = False,
               time_limit: float = 60.0, patience: float = 45.0, notice: Callable[[str], None] = print
               ) -> Folder | Bucket:
    """The store at s3://bucket/prefix or in a folder.

    endpoint : URL of another S3 server than Amazon's. signed : with the user's credentials.
    time_limit : seconds for one object; twice as many after each try that they did not suffice for.
    patience : seconds without any answer after which a call raises ConnectionError; inf waits for ever.
    """
    if root.startswith("s3://"):
        if not root.removeprefix("s3://").strip("/"):
            raise ValueError(f"{root}: names no bucket, expected s3://bucket/prefix")
        return Bucket(root, connections, endpoint, signed, time_limit, patience, notice)
    if "://" in root:
        raise ValueError(f"{root}: expected s3://bucket/prefix or a folder; endpoint= is for other servers")
    return Folder(root)


class Folder:
    """A store on a disk."""

    def __init__(self, root: str):
        self.root, self.patience, self.counts, self.remote = Path(root), math.inf, Counter(), False
        if not self.root.is_dir():
            raise FileNotFoundError(f"{root}: no such folder; give root= where the images lie, or an s3:// "
                                    "address")

    def read(self, name: str, largest: float = math.inf) -> bytes:
        if name.startswith("/") or "\0" in name or ".." in name.split("/"):
            raise Absent("a name that leads out of the folder")
        try:
            with open(self.root / name, "rb") as file:
                check_size(os.fstat(file.fileno()).st_size, largest)
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


def check_size(size: int, largest: float) -> None:
    if size > largest:
        raise Absent(f"wrong size, more than {largest / 1e6:.0f} MB")
    if size == 0:
        raise Absent("an empty file, 0 bytes")


class Bucket:
    """A store on S3.

    A try that fails (no connection, reset, cut off, too slow, 5xx, 429) is made again after a wait that
    doubles, plus one that all threads share and that grows while the server says it is busy. Failures count
    against an object only if the server answered others meanwhile: while nothing answers, threads wait.
    """

    def __init__(self, root: str, connections: int, endpoint: str | None, signed: bool, time_limit: float,
                 patience: float, notice: Callable[[str], None]):
        import boto3
        import botocore
        from botocore.config import Config
        self.root, self.time_limit, self.patience, self.notice = root, time_limit, patience, notice
        self.remote = True                               # may fail, and may be cached
        self.bucket, _, prefix = root.removeprefix("s3://").partition("/")
        self.prefix = prefix.rstrip("/") + "/" if prefix.strip("/") else ""
        how = {} if signed else {"signature_version": botocore.UNSIGNED}
        try:
            self.client = boto3.session.Session().client("s3", endpoint_url=endpoint, config=Config(
                max_pool_connections=connections, connect_timeout=CONNECT, read_timeout=READ,
                retries={"total_max_attempts": 1}, **how))             # tries are made here, bodies included
        except botocore.exceptions.BotoCoreError as error:             # of AWS_PROFILE and the like
            raise ValueError(f"{root}: {error}") from None
        self.tried = f"{self.client.meta.endpoint_url} ({'signed' if signed else 'unsigned'})"
        self.counts = Counter()                          # bytes, retries
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._answers, self._good = 0, None              # whole answers so far; the last key that came
        self._heard, self._failing = time.monotonic(), False     # last sign of life; whether tries fail since
        self._said = False                               # an outage was announced
        self._busy = 0.0                                 # seconds that every request waits at most, see above
        self._open: dict[socket.socket, float] = {}      # bodies being read: when each is cut off
        self._watch = threading.Thread(target=self._cut_late, name="store-watch", daemon=True)
        self._watch.start()

    def read(self, name: str, largest: float = math.inf) -> bytes:
        key = self.prefix + name
        body = self._tried(lambda seconds: self._get(key, seconds, largest))
        self._good = key
        with self._lock:
            self.counts["bytes"] += len(body)
        return body

    def _get(self, key: str, seconds: float, largest: float = math.inf, **part: str) -> bytes:
        response = self.client.get_object(Bucket=self.bucket, Key=key, **part)
        self._hear()
        with response["Body"] as raw:
            check_size(response["ContentLength"], largest)
            with self._cut_after(raw.fileno(), seconds):
                return response["Body"].read()           # and checks the length

    def write(self, name: str, file: str | Path) -> None:
        """The bytes of a file as object `name`, which appears whole or not at all."""
        def once(seconds: float) -> None:
            with open(file, "rb") as body:
                self.client.put_object(Bucket=self.bucket, Key=self.prefix + name, Body=body)
        try:
            self._tried(once)
        except Absent as error:
            raise OSError(f"s3://{self.bucket}/{self.prefix}{name}: cannot be written, {error} from {self.tried}") from None

    def pages(self, folder: str, deep: bool = False) -> Iterator[Page]:
        """deep: no folders, but all files below, with the folders in their names."""
        where, more = self.prefix + folder, {} if deep else {"Delimiter": "/"}
        while more is not None:
            try:
                page = self._tried(lambda seconds: self.client.list_objects_v2(
                    Bucket=self.bucket, Prefix=where, **more))
            except Absent as error:
                raise OSError(f"s3://{self.bucket}/{where}: cannot be listed, {error} from {self.tried}; "
                              "signed=true uses your credentials") from None
            yield ([entry["Prefix"][len(where):].rstrip("/") for entry in page.get("CommonPrefixes", ())],
                   [(entry["Key"][len(where):], entry["Size"]) for entry in page.get("Contents", ())
                    if entry["Key"] != where])
            more = {**more, "ContinuationToken": page["NextContinuationToken"]} if page["IsTruncated"] else None

    def _tried(self, once: Callable[[float], Answer]) -> Answer:
        """What once(seconds allowed) answers; tried until it does, is given up or patience ends."""
        from botocore.exceptions import (BotoCoreError, ClientError, ConnectionError as Unconnected,
                                         HTTPClientError,
                                         IncompleteReadError, NoCredentialsError)
        from botocore.parsers import ResponseParserError
        from urllib3.exceptions import HTTPError
        begun, answers, failures, counted, slow = time.monotonic(), self._answers, 0, 0, 0
        while True:
            self._stop.wait(self._busy * random.random())
            if self._stop.is_set():
                raise Stopped
            seconds, since = self.time_limit * 2 ** slow, time.monotonic()
            try:
                answer = once(seconds)
                self._answered()
                return answer
            except ClientError as error:
                status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
                code = str(error.response.get("Error", {}).get("Code", ""))
                reason = detail = str(status) if code in ("", str(status)) else f"{status} {code}"
                if status < 500 and status != 429 and code not in BUSY:
                    self._answered()
                    raise Absent(reason) from None
                self._busy = min(1.0, 2 * self._busy + 0.01)
            except (Unconnected, HTTPClientError, IncompleteReadError, ResponseParserError, HTTPError,
                    ConnectionError) as error:
                reason, detail = type(error).__name__, f"{type(error).__name__}: {error}"
                if time.monotonic() - since > seconds:
                    self._hear()                         # it was answering, if slowly
                    reason, slow = "too slow", slow + 1
            except NoCredentialsError:
                raise OSError(f"{self.root}: no AWS credentials found, which signed=true and writing need; set "
                              "AWS_PROFILE or AWS_ACCESS_KEY_ID") from None
            except BotoCoreError as error:               # wrong parameters: no try would help
                raise OSError(f"{self.root}: {error}") from None
            if self._stop.is_set():
                raise Stopped
            failures, self._failing = failures + 1, True
            with self._lock:
                self.counts["retries"] += 1
            if self._answers > answers or self._alive():
                counted, answers = counted + 1, self._answers
            if counted >= TRIES:
                raise Absent(f"{reason} (again and again)")
            now = time.monotonic()
            if now - max(begun, self._heard) > self.patience:
                raise ConnectionError(f"{self.root}: no answer in {now - begun:.0f} s and {failures} tries "
                                      f"from {self.tried}, last: {detail}; check the network, or endpoint=")
            self._complain(now, detail)
            self._stop.wait(min(LONGEST, 0.1 * 2 ** min(failures, 10)) * random.uniform(0.5, 1))

    def _alive(self) -> bool:
        """Whether the server gives what it gave before."""
        from botocore.exceptions import BotoCoreError, ClientError
        from urllib3.exceptions import HTTPError
        if self._good is None:
            return False
        try:
            self._get(self._good, self.time_limit, Range="bytes=0-0")
        except (BotoCoreError, ClientError, HTTPError, OSError):
            return False
        return True

    def _hear(self) -> None:
        self._heard = time.monotonic()

    def _answered(self) -> None:
        with self._lock:
            quiet, said = self.outage(), self._said
            self._answers, self._busy = self._answers + 1, self._busy * 0.9
            self._failing, self._said = False, False
            self._hear()
        if said:
            self.notice(f"{self.root} answers again after {quiet:.0f} s")

    def _complain(self, now: float, reason: str) -> None:
        with self._lock:
            silent = now - self._heard > QUIET and not self._said
            self._said |= silent
        if silent:
            self.notice(f"{self.root} has not answered for {now - self._heard:.0f} s ({reason})")

    def outage(self) -> float:
        """Seconds since the last sign of life, 0 while requests succeed."""
        return time.monotonic() - self._heard if self._failing else 0.0

    @contextlib.contextmanager
    def _cut_after(self, descriptor: int, seconds: float) -> Iterator[None]:
        """Shut the connection down when time is up: a drip of bytes never reaches a socket's own limit."""
        twin = socket.socket(fileno=os.dup(descriptor))
        with self._lock:
            self._open[twin] = time.monotonic() + seconds
        try:
            if self._stop.is_set():                      # stop() has cut what it knew of
                raise Stopped
            yield
        finally:
            with self._lock:
                del self._open[twin]
            twin.close()

    def _cut_late(self) -> None:
        while not self._stop.wait(min(1.0, self.time_limit / 4)):
            self._cut(time.monotonic())

    def _cut(self, now: float) -> None:
        with self._lock:
            for twin, deadline in self._open.items():
                if now > deadline:
                    with contextlib.suppress(OSError):   # the other side was faster
                        twin.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        """Make all calls end in Stopped; those that wait for a first byte do so within READ seconds."""
        self._stop.set()
        self._cut(math.inf)

    def close(self) -> None:
        """To be called when no other thread uses the store any more."""
        self.stop()
        self._watch.join()
        self.client.close()


class Cache:
    """Bodies on disk by the hash of their address, at most `limit` bytes, least recently used out first.

    A lock file, which also holds the number of bytes, makes processes take turns; files appear whole or not.
    """

    def __init__(self, folder: str | Path, limit: float):
        self.folder, self.limit = Path(folder), limit
        if limit < 0:
            raise ValueError(f"cache of {limit:g} bytes: expected 0 or more")
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, address: str) -> Path:
        name = hashlib.sha256(address.encode("utf-8", "surrogatepass")).hexdigest()
        return self.folder / name[:2] / name[2:]

    def get(self, address: str) -> bytes | None:
        path = self.path(address)
        try:
            body = path.read_bytes()
            os.utime(path)                               # used now; access times are often not kept
            return body
        except OSError:                                  # not here, or thrown out by another process
            return None

    def put(self, address: str, body: bytes) -> None:
        path = self.path(address)
        if len(body) > self.limit:
            return
        path.parent.mkdir(exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
        try:
            beside.write_bytes(body)
            with self._turn() as file:
                if not path.exists():
                    total = int(file.read() or -1)
                    if total < 0 or total + len(body) > self.limit:
                        total = self._make_room(len(body))
                    file.seek(0)
                    file.truncate()
                    file.write(str(total + len(body)))
                    os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)

    def drop(self, address: str) -> None:
        """Forget a body that turned out damaged; its bytes are counted until the next clearing."""
        self.path(address).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _turn(self) -> Iterator:
        with open(self.folder / "bytes.lock", "a+", encoding="ascii") as file:
            import fcntl                                 # not on Windows, which reads without a cache
            fcntl.flock(file, fcntl.LOCK_EX)             # until closed
            file.seek(0)
            yield file

    def _make_room(self, size: int) -> int:
        """Throw out the least recently used until a tenth is free; bytes that are left."""
        found, total, kept = [], 0, max(0, min(0.9 * self.limit, self.limit - size))
        for path in self.folder.glob("??/*"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                if path.name.endswith(".part"):          # of another thread, or of a process that was killed
                    if status.st_mtime < time.time() - 3600:
                        path.unlink()
                    continue
                found.append((status.st_mtime_ns, status.st_size, path))
                total += status.st_size
        for _, bytes_, path in sorted(found):
            if total <= kept:
                break
            path.unlink(missing_ok=True)
            total -= bytes_
        return total
