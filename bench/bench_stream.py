"""How fast fields come, and whether training waits for them: `python bench/bench.py stream`.

A server on loopback (moto in a process of its own) gives fields of 8 channels of 1080 x 1080 px.
(1) Fields a second against a plain loop of boto3 in threads that decodes as well. (2) With the
server limited to 20 MB/s, who keeps up with 500 crop sets a second: the pool, or loaders of the
usual kind. Takes about three minutes.
"""
from __future__ import annotations

import io
import itertools
import statistics
import sys
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / part) for part in (".", "tests")]

BUCKET, PREFIX = "cellpainting-gallery", "bench/"
STORED = 6                              # fields on the server; the index has many names for them
LATE = 0.05  # seconds after which an answer was waited for: a batch of 25 at 500 a second


def fill(server, side: int, fields: int):
    """An index of `fields` fields on the server, each the same files as another."""
    import tifffile

    import fields as unlabelled
    names = [[f"r01c01f{f + 1:02}p01-ch{c}sk1fk1fl1.tiff" for c in range(1, 9)]
             for f in range(STORED)]
    for number, name in enumerate(itertools.chain(*names)):
        pixels = np.random.default_rng(number).gamma(2, 900,
                                                     (side, side)).clip(0, 65535).astype(np.uint16)
        file = io.BytesIO()
        tifffile.imwrite(file, pixels, photometric="minisblack")
        server.client.put_object(Bucket=BUCKET, Key=PREFIX + name, Body=file.getvalue(),
                                 ACL="public-read")
    lines = ["\t".join(("b", f"P{i}", "", "1", "1", "1", "0", "", *names[i % STORED])).encode()
             for i in range(fields)]
    return unlabelled.Index(f"s3://{BUCKET}/{PREFIX}", unlabelled.JUMP_CHANNELS, lines)


def plain_client(url: str, connections: int):
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config
    return boto3.session.Session().client("s3", endpoint_url=url, config=Config(
        signature_version=UNSIGNED, max_pool_connections=connections))


def plain_loop(url: str, index, connections: int, fields: int) -> float:
    """Fields a second of a thread pool that downloads and decodes file by file."""
    import tifffile
    client = plain_client(url, connections)

    def one(name: str) -> np.ndarray:
        return tifffile.imread(io.BytesIO(client.get_object(Bucket=BUCKET,
                                                            Key=PREFIX + name)["Body"].read()))

    def all_of(files: list[str], pool: ThreadPoolExecutor) -> float:
        begin = time.perf_counter()
        for _ in pool.map(one, files):
            pass
        return time.perf_counter() - begin
    files = [name for i in range(fields) for name in index[i].files.values()]
    with ThreadPoolExecutor(connections) as pool:
        all_of(files[:2 * connections], pool)                     # warm
        took = all_of(files, pool)
    client.close()
    return fields / took


def pool_of(url: str, index, connections: int, count: int):
    """A pool of `count` fields, streamed from the server at `url`."""
    import os

    from fields import FieldData
    from stream import FieldPool
    os.environ["AWS_ENDPOINT_URL"] = url
    return FieldPool(index, FieldData(index="-", pool=count, threads=connections), "cpu")


def pool_rate(url: str, index, connections: int, fields: int) -> float:
    """Fields a second of FieldPool that replaces what is drawn meanwhile."""
    with pool_of(url, index, connections, 16) as pool:
        step = itertools.count()
        while pool.stats()["resident"] < 16:                      # warm
            pool.sample(4, next(step))
            time.sleep(0.02)
        begin, before = time.perf_counter(), pool._counts["fields"]
        while pool._counts["fields"] < before + fields:
            pool.sample(4, next(step))
            time.sleep(0.02)
        return (pool._counts["fields"] - before) / (time.perf_counter() - begin)


def demand(draw, batch: int, rate: float, seconds: float) -> tuple[float, float, float]:
    """(share of requests not answered when due, crop sets a second, longest wait in seconds), after
    a first one."""
    draw()
    begin, answered, on_time, slowest = time.perf_counter(), 0, 0, 0.0
    due = itertools.count(0, batch / rate)
    while (now := time.perf_counter() - begin) < seconds:
        when = next(due)
        if when > seconds:
            break
        time.sleep(max(0.0, when - now))
        asked = time.perf_counter() - begin
        draw()
        came = time.perf_counter() - begin
        slowest, answered = max(slowest, came - asked), answered + batch
        on_time += batch * (came - when < LATE)
    return 1 - on_time / (rate * seconds), answered / max(seconds,
                                                          time.perf_counter() - begin), slowest


class Files:
    """A worker's connection, made where it is used."""

    def __init__(self, url: str, index):
        self.url, self.index = url, index
        self.client: Any = None

    def image(self, row: int, channel: str) -> np.ndarray:
        import tifffile
        self.client = self.client or plain_client(self.url, 1)
        key = PREFIX + self.index[row].files[channel]
        return tifffile.imread(io.BytesIO(self.client.get_object(Bucket=BUCKET,
                                                                 Key=key)["Body"].read()))


class WithLRU:
    """Dataset: a field by number, its last 1,000 images kept.

    It hands out the number alone, not the crop.
    """

    def __init__(self, url: str, index, images: int = 1000):
        self.files, self.images = Files(url, index), images
        self.kept: OrderedDict = OrderedDict()

    def __len__(self) -> int:
        return len(self.files.index)

    def __getitem__(self, row: int) -> int:
        for channel in self.files.index.channels:
            if (row, channel) not in self.kept:
                self.kept[row, channel] = self.files.image(row, channel)
                if len(self.kept) > self.images:
                    self.kept.popitem(last=False)
            self.kept.move_to_end((row, channel))
        return row


def crops_of(url: str, index, crops: int, worker: int):
    """A field by lot, then as many crops of it, for ever."""
    files, rng = Files(url, index), np.random.default_rng(worker)
    while True:
        row = int(rng.integers(len(index)))
        field = np.stack([files.image(row, channel) for channel in index.channels])
        yield from itertools.repeat(row, crops * len(field) // len(index.channels))


def stream(side: int = 1080, fields: int = 24, seconds: float = 30.0,
           connections: int = 16) -> None:
    from fault_proxy import FaultyS3

    from bench import table
    with FaultyS3((BUCKET,)) as server:
        index = fill(server, side, 10_000)
        loop, pool = [], []
        for _ in range(5):  # in turns, so that both meet the same machine
            loop.append(plain_loop(server.direct, index, connections, fields))
            pool.append(pool_rate(server.direct, index, connections, fields))
        spread = [f"{min(rates):.1f} to {max(rates):.1f}" for rates in (loop, pool)]
        table(f"Fields of 8 x {side} x {side} px downloaded and decoded a second, {connections} "
              f"connections, five "
              f"times {fields} fields", ["what", "median", "range", "ratio"],
              [["boto3 in a thread pool, tifffile", f"{statistics.median(loop):.1f}", spread[0],
                "1"],
               ["stream.FieldPool", f"{statistics.median(pool):.1f}", spread[1],
                f"{statistics.median(pool) / statistics.median(loop):.2f}"]])
        server.set(rate=20e6)
        rows = [[name, f"{late:.2%}", f"{rate:.0f}", f"{1e3 * slowest:.0f} ms"]
                for name, (late, rate, slowest) in waits(server.url, index, seconds, connections)]
        table(f"500 crop sets a second wanted for {seconds:.0f} s, one field each, server limited "
              f"to 20 MB/s",
              ["what", "requests that wait", "sets/s answered", "longest wait"], rows)


def waits(url: str, index, seconds: float, connections: int):
    """A row for the pool and for each of two loaders; all are given the time until their first
    answer."""
    import torch
    from torch.utils.data import DataLoader, IterableDataset

    class Crops(IterableDataset):
        def __iter__(self):
            return crops_of(url, index, 100, torch.utils.data.get_worker_info().id)

    fields: Any = WithLRU(url, index)
    lru: DataLoader = DataLoader(fields, batch_size=None, shuffle=True, num_workers=10)
    crops = DataLoader(Crops(), batch_size=None, num_workers=10)
    for name, loader in (("Dataset + DataLoader, 10 workers, LRU of 1,000 images each", lru),
                         ("the same, 100 crops from each field fetched", crops)):
        answers: Any = iter(loader)
        yield name, demand(lambda: next(answers), 1, 500, seconds)
        answers._shutdown_workers()
    with pool_of(url, index, connections, 64) as pool:
        step = itertools.count()
        yield "stream.FieldPool of 64 fields", demand(lambda: pool.sample(25, next(step)), 25, 500,
                                                      seconds)


if __name__ == "__main__":
    stream()
