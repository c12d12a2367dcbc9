"""Images on S3 as files on this machine, one after the other, and results back to S3: what infer.py needs of it.

    found = find("s3://bucket/plate1/")                          # address -> name below, of all objects there
    for address, file in fetched(addresses):                     # the next one comes while this one is worked on
    with open_shelf("s3://bucket/cells/") as shelf:              # or a folder
        if not shelf.has(["a_labels.tif"]): ...                  # written to shelf.folder, then
        shelf.deliver()

Reading is anonymous unless signed; writing always uses your AWS credentials.
"""
from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import store

OFTEN = 30.0            # seconds between two uploads of a file that grows


def is_remote(address: object) -> bool:
    return str(address).startswith("s3://")


def find(address: str, endpoint: str | None = None, signed: bool = False) -> dict[str, str]:
    """Address -> name below, of all objects in the folder or bucket `address`."""
    place = store.open_store(address, 1, endpoint, signed)
    try:
        return {f"{address.rstrip('/')}/{name}": name for _, files in place.pages("", deep=True) for name, _ in files}
    finally:
        place.close()


def fetched(addresses: Sequence[Path | str], endpoint: str | None = None, signed: bool = False
            ) -> Iterator[tuple[Path | str, Path | OSError]]:
    """Each address with a file on this machine, or with why there is none; files from S3 are gone after their turn."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dinocell-")))
        ahead = stack.enter_context(ThreadPoolExecutor(1))
        stores: dict[str, store.Bucket] = {}

        def get(number: int) -> Path | OSError:
            address = addresses[number]
            if not is_remote(address):
                return Path(address)
            bucket, _, name = address.removeprefix("s3://").partition("/")
            if bucket not in stores:
                stores[bucket] = store.open_store(f"s3://{bucket}", 2, endpoint, signed)
                stack.callback(stores[bucket].close)
            try:
                body = stores[bucket].read(name)
            except store.Absent as error:
                return OSError(f"{address}: {error}")
            file = folder / str(number) / Path(name).name
            file.parent.mkdir()
            file.write_bytes(body)
            return file

        coming = ahead.submit(get, 0) if addresses else None
        for number, address in enumerate(addresses):
            file = coming.result()
            if number + 1 < len(addresses):
                coming = ahead.submit(get, number + 1)
            yield address, file
            if is_remote(address) and isinstance(file, Path):
                file.unlink()


class Shelf:
    """A folder for results. On S3, `folder` is one of this machine whose files deliver() takes there."""

    def __init__(self, folder: Path):
        self.folder = folder

    def has(self, names: Sequence[str]) -> bool:
        return all((self.folder / name).exists() for name in names)

    def deliver(self) -> None:
        """What was written is finished."""


class Bucket(Shelf):
    """Files that grow, such as a table, stay in the folder and are taken to S3 now and then."""

    def __init__(self, folder: Path, place: store.Bucket, growing: Sequence[str]):
        super().__init__(folder)
        self.place, self.growing, self.when = place, growing, time.monotonic()
        self.there = {name for _, files in place.pages("") for name, _ in files}
        for name in self.there.intersection(growing):
            (folder / name).write_bytes(place.read(name))

    def has(self, names: Sequence[str]) -> bool:
        return self.there.issuperset(names)

    def deliver(self) -> None:
        for file in sorted(self.folder.iterdir()):
            if file.name not in self.growing:
                self.place.write(file.name, file)
                self.there.add(file.name)
                file.unlink()
        if time.monotonic() - self.when > OFTEN:
            self.take_growing()

    def take_growing(self) -> None:
        for name in self.growing:
            if (self.folder / name).exists():
                self.place.write(name, self.folder / name)
        self.when = time.monotonic()


@contextmanager
def open_shelf(out: str, growing: Sequence[str] = (), endpoint: str | None = None) -> Iterator[Bucket]:
    """The shelf at s3://...; an image that was interrupted leaves nothing there, the table is taken there all the same."""
    with tempfile.TemporaryDirectory(prefix="dinocell-") as folder:
        place = store.open_store(out, 4, endpoint, signed=True)
        try:
            shelf = Bucket(Path(folder), place, growing)
            try:
                yield shelf
            finally:
                shelf.take_growing()
        finally:
            place.close()
