"""Fields that stay on the training device and are cropped many times, while others come from S3.

    python stream.py index s3://BUCKET/PREFIX/ out=fields.tsv.gz     which fields there are
    python stream.py stats fields.tsv.gz                             plates, fields, channels, bytes

SOURCE may be a folder, or the address of load_data tables. A stopped `index` goes on where it was.
In training:

    with open_pool(config.data, batch, seed, "cuda", rank, world) as pool:
        if checkpoint: pool.restore(checkpoint)
        slots = pool.sample(batch, step)             # (B,) int64, distinct; until the next sample()
        fields = pool.pixels[slots]                      # (B, C, H, W) int16, the bits of uint16

The network decides how fresh the fields are, never how fast sample() answers.
"""
from __future__ import annotations

import math
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import fields
import runs
from images import sampled_limits
from s3 import Absent, Closed

with runs.lazy():
    import torch

WINDOW = 1000                      # fields whose failures are counted; a tenth of it before judging
MAX_FAILED = 0.2                    # share of them that may fail


def open_pool(config: fields.FieldData, batch: int, seed: int, device: str, rank: int = 0,
              world: int = 1, bad_fields: Path | None = None) -> ResidentPool | FieldPool:
    """The fields to train on."""
    if config.index:
        train, _ = fields.split_field_index(config, seed)
        fields.check_field_count(len(train), batch, config)
        return FieldPool(train, config, device, rank, world, seed, bad_fields)
    channels, makers = fields.local_fields(config, seed)
    held, makers = makers[:config.held], makers[config.held:]
    fields.check_field_count(len(makers), batch, config)
    return ResidentPool((make()[:2] for make in makers), channels, device, rank, world, seed,
                        [getattr(make.args[0], "name", str(make.args[0])) for make in held])


# ---------------------------------------------------------------------------------------- resident

class Pool:
    """Fields on the device.

    pixels : (slots, C, H, W) int16 holding the bits of uint16. limits : (slots, C, 2) float32, see
    images.sampled_limits. names : of the fields in the slots. channels : their names.
    """

    pixels: torch.Tensor
    limits: torch.Tensor
    names: list[str | None]
    channels: tuple[str, ...]
    stopped: Callable[[], bool] = staticmethod(lambda: False)      # asked while sample() waits

    def _sent(self, slots: np.ndarray) -> torch.Tensor:
        slots = torch.from_numpy(slots)
        if not self.pixels.is_cuda:
            return slots
        return slots.pin_memory().to(self.pixels.device, non_blocking=True)

    def close(self) -> None:
        """End threads and connections; the pixels stay."""

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()


class ResidentPool(Pool):
    """A pool filled once with (name, (C, H, W) uint16), equal on all ranks; sample() depends on
    seed, step and the batch over all ranks alone. held : names of the fields to measure on."""

    def __init__(self, arrays: Iterable[tuple[str, np.ndarray]], channels: Sequence[str],
                 device: str | torch.device, rank: int = 0, world: int = 1, seed: int = 0,
                 held: Sequence[str] = ()):
        self.held = held
        self.rank, self.world, self.seed = rank, world, seed
        self.channels, self.names = tuple(channels), []
        pixels, limits = [], []
        for name, array in arrays:
            if array.dtype != np.uint16:
                raise ValueError(f"{name}: {array.dtype}, expected uint16")
            self.names.append(name)
            pixels.append(torch.from_numpy(array.view(np.int16)))
            limits.append(torch.from_numpy(sampled_limits(array)))
        self.pixels, self.limits = torch.stack(pixels).to(device), torch.stack(limits).to(device)

    def sample(self, batch: int, step: int) -> torch.Tensor:
        """(batch,) int64 distinct slots on the device."""
        slots = np.random.default_rng((self.seed, step)).choice(
            len(self.names), batch * self.world, replace=False)
        return self._sent(slots[self.rank * batch:(self.rank + 1) * batch])

    def state(self) -> dict:
        """State for the checkpoint: which fields there are, and which of them are held out."""
        return {"fields": runs.digest("\n".join((*self.held, "", *map(str, self.names))))}

    def restore(self, states: Sequence[dict]) -> None:
        """Refuse other fields."""
        if states[0] != self.state():
            raise ValueError("the checkpoint's pool had other fields, or others held out; give "
                             "data.folders the same files again, or begin a new experiment")

    def stats(self) -> dict[str, float]:
        return {}


# ---------------------------------------------------------------------------------------- streamed

@dataclass(eq=False)
class Job:
    """A field on its way."""
    row: int                            # of the index
    name: str
    visit: bool                         # of the pass; else a resident of a checkpoint returns
    uses: int                           # crops that a resident had given
    slot: int                           # its place
    planes: np.ndarray               # (C, H, W) uint16: the slot's memory, or pinned beside the GPU
    limits: np.ndarray                  # (C, 2) float32
    waiting: int                        # channels still to come
    reason: str = ""                    # why it cannot be had, and the file
    file: str = ""


class FieldPool(Pool):
    """N decoded fields on the device, replaced one by one in the background.

    If not all fields fit there are some slots more than N, which are empty (name None): a new field
    comes into one, and when its channels are complete it frees the slot of the most used field that
    is not in the current batch.

    config : `pool` is N; `least` crops that a field gives before it may go: downloads wait for them
    bad_fields : table of the fields that could not be had.

    Every pass visits each field of this rank's shard once, in an order of seed, pass and rank.
    restore() comes before the first sample(), which starts the threads. sample() waits for half of
    the N fields, or a batch. On a GPU queue all work on a batch on the current stream before the
    next sample(). No answer at the start is an error; later outages are waited for.
    """

    def __init__(self, index: fields.Index, config: fields.FieldData, device: str | torch.device,
                 rank: int = 0, world: int = 1, seed: int = 0, bad_fields: Path | None = None):
        self.index = index
        self.rank, self.world, self.seed = rank, world, seed
        self.channels = fields.index_channels(index, config.channels)
        self.shard = pool_shard(len(index), seed, rank, world)
        self._fields, self._least = min(config.pool, len(self.shard)), config.least
        if self._fields < 1:
            raise ValueError(f"no field for rank {rank} of {world}, of {len(index)}; start fewer "
                             "processes")
        self._floor, self._threads, self._bad_file = self._fields // 2, config.threads, bad_fields
        self._limit = 2 * math.ceil(config.threads / len(self.channels)) + 2   # fields on their way
        self.bad: dict[str, str] = {}                              # name: reason
        slots = self._fields + (self._limit if self._fields < len(self.shard) else 0)
        self._rows = np.full(slots, -1)                       # of the index, in each slot; -1: none
        self._reader = fields.FieldReader(index.root, config)
        self._store, self._store.notice = self._reader.store, self._notice
        try:
            self.size = self._reader.find_size(index, self.channels[0])          # H, W
            self._hold(slots, device)
        except BaseException:
            self._store.close()
            raise

        self._changed = threading.Condition()                      # guards all below
        self._free = deque(range(slots))                           # slots for new fields
        self._drawn = np.zeros(0, np.int64)                        # slots of the current batch
        self._uses = np.zeros(slots, np.int64)                     # crops
        self._arrived = np.zeros(slots)                            # seconds
        self._pass, self._whole = 0, True                          # _whole: begun by this process
        self._consumed = np.zeros(len(self.index), bool)           # visited in this pass
        self._order = deque(self._order_of(0))
        self._refill: deque[tuple[int, int]] = deque()       # residents of a checkpoint: row, crops
        self._flight: dict[int, Job] = {}                          # by row
        self._tasks: deque[tuple[Job, int]] = deque()              # job, channel
        self._complete: deque[Job] = deque()                    # all here, waiting until one may go
        self._recent: deque[str] = deque(maxlen=WINDOW)   # reasons of failures; empty for successes
        self._counts: Counter[str] = Counter()                   # fields, failures, cache_hits, ...
        self._base = 0                                             # bytes before this process
        self._waited = 0.0                                    # seconds that sample() did not answer
        self._last = time.monotonic(), 0, 0                        # of stats(): when, fields, bytes
        self._closing = False
        self._error: Exception | None = None                       # goes to sample()
        self._workers: list[threading.Thread] = []

    @property
    def _ready(self) -> np.ndarray:
        return self._rows >= 0                                     # (slots,)

    def _notice(self, text: str) -> None:
        print(f"{text}; {self._ready.sum()} fields are here", file=sys.stderr)

    def _hold(self, slots: int, device: str | torch.device) -> None:
        shape = (slots, len(self.channels), *self.size)
        try:
            self.pixels = torch.zeros(shape, dtype=torch.int16, device=device)
            self.limits = torch.zeros((*shape[:2], 2), device=device)
        except RuntimeError:                                     # the one reason that zeros() knows
            raise ValueError(f"data.pool={self._fields}: {2 * math.prod(shape) / 2**30:.1f} GiB do "
                             f"not fit on {device}; give fewer fields or channels") from None
        self.names: list[str | None] = [None] * slots
        if self.pixels.is_cuda:
            self._stream = torch.cuda.Stream(self.pixels.device)
            self._drawing = torch.cuda.current_stream(self.pixels.device).record_event()
            self._staging = [torch.empty(shape[1:], dtype=torch.int16, pin_memory=True)
                             for _ in range(self._limit)]     # pinned, or copies would stop the GPU

    # --------------------------------------------------------------------------------- drawing

    def sample(self, batch: int, step: int) -> torch.Tensor:
        """(batch,) int64 distinct slots on the device; their pixels stay until the next call."""
        if not 1 <= batch <= self._fields or batch == self._fields < len(self.shard):
            raise ValueError(f"batch={batch} of {self._fields} fields in the pool: expected fewer, "
                             f"since those of a batch stay; give data.pool={2 * batch} or more")
        with self._changed:
            self._floor = max(self._floor, batch)
            self._start()
            self._wait_for_fields()
            rng = np.random.default_rng((self.seed, self.rank, step))
            slots = rng.choice(np.flatnonzero(self._ready), batch, replace=False)
            self._drawn = slots
            self._uses[slots] += 1
            self._settle()
            if self.pixels.is_cuda:                        # work queued so far reads the last batch
                self._drawing = torch.cuda.current_stream(self.pixels.device).record_event()
            self._changed.notify()                         # the next of the pass may be used by now
        return self._sent(slots)

    def _wait_for_fields(self) -> None:
        begun = said = time.monotonic()
        while True:
            if self._error is not None:
                raise self._error
            if self._closing:
                raise ValueError("the pool is closed")
            if self.stopped():
                raise runs.Stopped
            if self._ready.sum() >= self._floor:
                break
            self._changed.wait(1.0)
            if (now := time.monotonic()) - said > 10:
                said = now
                self._notice(f"waiting for {self._floor} fields since {now - begun:.0f} s")
        self._waited += time.monotonic() - begun

    def _start(self) -> None:
        if not self._workers and not self._closing:
            self._workers = [threading.Thread(target=self._work, name=f"fields-{i}", daemon=True)
                             for i in range(self._threads)]
            for worker in self._workers:
                worker.start()

    # ------------------------------------------------------------------------------ background

    def _work(self) -> None:
        """Fetch files until the pool is closed."""
        problem: Exception | None = RuntimeError("a download thread failed; its traceback is above")
        try:
            while (task := self._next()) is not None:
                self._fetch(*task)
            problem = None
        except Closed:
            problem = None
        except OSError as error:                          # no answer, or bad_fields is not writable
            problem = error
        finally:
            with self._changed:
                self._error = self._error or problem
                self._changed.notify_all()

    def _next(self) -> tuple[Job, int] | None:
        """The next file to fetch; waits while there is none."""
        with self._changed:
            while not self._closing and self._error is None:
                if not self._tasks:
                    self._begin()
                if self._tasks:
                    return self._tasks.popleft()
                self._changed.wait()
        return None

    def _begin(self) -> None:
        """Queue the files of the next field, if one may be begun."""
        full = len(self._flight) >= self._limit or not self._free
        if self._refill and not full:
            row, uses = self._refill.popleft()
            return self._queue(row, False, uses)
        while True:
            if not self._order:
                if self._flight:                                   # a pass ends when all has come
                    return
                self._end_pass()
                if self._error is not None:
                    return
            row = self._order[0]
            if row not in self._rows:
                break
            slot = int(np.flatnonzero(self._rows == row)[0])
            if self._uses[slot] < self._least:                   # still here: wait until it is used
                return
            self._uses[slot], self._arrived[slot] = 0, time.monotonic()  # stays, as if it came anew
            self._recent.append("")
            self._consumed[self._order.popleft()] = True
        if not full and row not in self._flight:                   # where a returning resident is
            self._queue(self._order.popleft(), True, 0)

    def _queue(self, row: int, visit: bool, uses: int) -> None:
        slot, C = self._free.popleft(), len(self.channels)
        memory = self._staging.pop() if self.pixels.is_cuda else self.pixels[slot]
        planes, limits = memory.numpy().view(np.uint16), np.zeros((C, 2), np.float32)
        job = Job(row, self.index[row].name, visit, uses, slot, planes, limits, C)
        self._flight[row] = job
        self._tasks.extend((job, channel) for channel in range(C))
        self._changed.notify_all()

    def _fetch(self, job: Job, channel: int) -> None:
        reason, name = "", self.index[job.row].files.get(self.channels[channel], "")
        if not job.reason:                                     # else another channel failed already
            try:
                if not name:
                    raise Absent(f"no file of channel {self.channels[channel]} in the index")
                self._reader.read(name, job.planes[channel])
                job.limits[channel] = sampled_limits(job.planes[channel:channel + 1])
            except (Absent, ValueError) as error:
                reason = str(error)
        with self._changed:
            if reason and not job.reason:
                job.reason, job.file = reason, name
            job.waiting -= 1
            if job.waiting:
                return
        if not job.reason:
            self._send(job)
        with self._changed:
            if job.reason:
                self._failed(job)
            else:
                self._complete.append(job)
                self._settle()
            self._changed.notify_all()

    def _send(self, job: Job) -> None:
        """Put limits into the slot, on a GPU pixels too."""
        limits = torch.from_numpy(job.limits)
        if not self.pixels.is_cuda:
            self.limits[job.slot] = limits
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._drawing)            # no work queued later reads this slot
            planes = torch.from_numpy(job.planes.view(np.int16))
            self.pixels[job.slot].copy_(planes, non_blocking=True)
            self.limits[job.slot].copy_(limits)
            self._stream.record_event().synchronize()           # this thread waits, the GPU goes on

    def _settle(self) -> None:
        """Make complete fields available; for each the most used goes, of several the oldest."""
        while self._complete:
            if self._ready.sum() >= self._fields:
                may = self._ready & (self._uses >= self._least)
                may[self._drawn] = False
                if not may.any():
                    return
                most = np.flatnonzero(may & (self._uses == self._uses[may].max()))
                old = int(most[self._arrived[most].argmin()])
                self._rows[old], self.names[old] = -1, None
                self._free.append(old)
            job = self._complete.popleft()
            slot = job.slot
            self._rows[slot], self.names[slot] = job.row, job.name
            self._uses[slot], self._arrived[slot] = job.uses, time.monotonic()
            self._counts["fields"] += 1
            self._done(job, "")
            self._changed.notify_all()

    def _done(self, job: Job, reason: str) -> None:
        self._recent.append(reason)
        del self._flight[job.row]
        if self.pixels.is_cuda:
            self._staging.append(torch.from_numpy(job.planes.view(np.int16)))
        if job.visit:
            self._consumed[job.row] = True

    def _failed(self, job: Job) -> None:
        self._counts["failures"] += 1
        self._free.append(job.slot)
        self._done(job, job.reason)
        if job.name not in self.bad:
            self.bad[job.name] = job.reason
            if self._bad_file:
                log_failed_field(self._bad_file, job.name, job.file, job.reason)
        reasons = Counter(filter(None, self._recent))
        if reasons.total() > MAX_FAILED * max(len(self._recent), WINDOW // 10):
            where = f"; {self._bad_file} lists them" if self._bad_file else ""
            self._fail(f"{reasons.total()} of the last {len(self._recent)} fields could not be "
                       f"had, most often: {reasons.most_common(1)[0][0]}{where}")

    def _fail(self, text: str) -> None:
        self._error = self._error or ValueError(f"{self._store.root}: {text}")
        self._changed.notify_all()

    def _end_pass(self) -> None:
        here = int(self._ready.sum())
        if self._whole and here < self._floor:
            reasons = Counter(self.bad.values()).most_common(1)
            most = f"; most often: {reasons[0][0]}" if reasons else ""
            self._fail(f"only {here} of {len(self.shard)} fields could be had, expected "
                       f"{self._floor} to draw from{most}")
        self._pass, self._whole = self._pass + 1, True
        self._consumed[:] = False
        self._order = deque(self._order_of(self._pass))

    def _order_of(self, number: int) -> list[int]:
        rng = np.random.default_rng((self.seed, 1, number, self.rank))
        return rng.permutation(self.shard).tolist()

    # -------------------------------------------------------------------- checkpoint, log, end

    def state(self) -> dict:
        """State for the checkpoint: fields visited in the pass, and residents."""
        with self._changed:
            here = np.flatnonzero(self._ready)
            residents = [*zip(self._rows[here].tolist(), self._uses[here].tolist()), *self._refill,
                         *((job.row, job.uses) for job in self._flight.values() if not job.visit)]
            return {"index": self.index.digest, "seed": self.seed, "pass": self._pass,
                    "consumed": torch.from_numpy(self._consumed.copy()), "residents": residents,
                    "bytes": self._bytes()}

    def restore(self, states: Sequence[dict]) -> None:
        """Go on in the pass, from the states of all ranks, whose number may have changed.

        Residents are fetched again.
        """
        seed, same = states[0]["seed"], len(states) == self.world
        if (states[0]["index"], seed) != (self.index.digest, self.seed):
            raise ValueError(f"the checkpoint's pool had another index or seed ({seed}); keep "
                             "them, or begin a new experiment")
        if same:
            states = [states[self.rank]]
            self._pass, consumed = states[0]["pass"], states[0]["consumed"].numpy().copy()
            left = [row for row in self._order_of(self._pass) if not consumed[row]]
        else:                                                      # new shares of what is left
            self._pass = min(one["pass"] for one in states)
            consumed = np.zeros(len(self.index), bool)
            for rank, one in enumerate(states):
                ahead = one["pass"] > self._pass                   # it has visited all of its shard
                old = pool_shard(len(self.index), self.seed, rank, len(states))
                consumed[old if ahead else one["consumed"].numpy()] = True
            rng = np.random.default_rng((self.seed, 2, self._pass))
            left = rng.permutation(np.flatnonzero(~consumed))
            left = left[self.rank::self.world].tolist()
        self._consumed, self._whole, self._order = consumed, False, deque(left)
        residents: dict[int, int] = {}                     # two old ranks may have had the same one
        for row, uses in (resident for one in states for resident in one["residents"]):
            residents.setdefault(row, uses)
        share = slice(None) if same else slice(self.rank, None, self.world)
        self._refill = deque([*residents.items()][share][:self._fields])
        self._base = sum(one["bytes"] for one in states) // (1 if same else self.world)

    def _bytes(self) -> int:
        return self._base + self._store.counts["bytes"]

    def stats(self) -> dict[str, float]:
        """For the log: rates since the last call, and totals.

        fields_per_s, mb_per_s (10**6 bytes from the network), bytes, freshness (crops that a field
        here has given, mean), resident (fields), passes, retries, failures (fields), cache_hits
        (files), outage_s (0 while all is well), waited_s (that sample() did not answer).
        """
        with self._changed:
            counts, last = self._store.counts, self._last
            self._last = time.monotonic(), self._counts["fields"], counts["bytes"]
            seconds, arrived, loaded = np.subtract(self._last, last)
            here, seconds = int(self._ready.sum()), max(seconds, 1e-9)
            visited = 1 - len(self._order) / len(self.shard)
            return {"fields_per_s": float(arrived / seconds),
                    "mb_per_s": float(loaded / 1e6 / seconds),
                    "bytes": float(self._bytes()), "resident": float(here),
                    "freshness": float(self._uses[self._ready].sum() / max(1, here)),
                    "passes": self._pass + visited, "retries": float(counts["retries"]),
                    "failures": float(self._counts["failures"]),
                    "cache_hits": float(counts["cache_hits"]),
                    "outage_s": self._store.outage(), "waited_s": self._waited}

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._store.stop()
        for worker in self._workers:
            worker.join()
        self._store.close()


def pool_shard(fields: int, seed: int, rank: int, world: int) -> np.ndarray:
    """This rank's share of the rows of the index, by chance."""
    return np.random.default_rng((seed, 0)).permutation(fields)[rank::world]


def log_failed_field(path: Path, *cells: str) -> None:
    """Add a line to bad_fields.tsv in one write, since processes may share it."""
    line = "\t".join(" ".join(cell.split()) for cell in cells) + "\n"
    with open(path, "ab", buffering=0) as file:
        head = "" if file.tell() else "name\tfile\treason\n"
        file.write((head + line).encode("utf-8", "replace"))


# ---------------------------------------------------------------------------------------- commands

@dataclass(frozen=True)
class Config:
    out: str | None = None                      # index: file to write, .tsv.gz
    channels: tuple[str, ...] | None = None     # index: those that a field must have; null: all
    signed: bool = False                       # with your AWS credentials; public buckets need none


def main(config: Config, arguments: list[str]) -> int:
    commands = {"index": write_stream_index, "stats": print_pool_stats}
    if len(arguments) != 2 or arguments[0] not in commands:
        raise ValueError(f"got {' '.join(arguments) or 'nothing'}, expected index SOURCE out=FILE "
                         "or stats FILE")
    return commands[arguments[0]](config, arguments[1])


def write_stream_index(config: Config, source: str) -> int:
    out = Path(config.out or "")
    if not config.out or not out.parent.is_dir() or out.suffix != ".gz":
        raise ValueError(f"out={config.out}: expected a file .tsv.gz in a folder that is there")
    journal = out.with_name(f"{out.name}.part")
    index, counts = fields.make_index(source, config.channels, config.signed, journal)
    index.save(out)
    journal.unlink()
    missing = ", ".join(f"{name[8:]} {n:,}" for name, n in sorted(counts.items())
                        if name.startswith("without "))
    missing = missing and f" (missing {missing})"
    print(f"{out}: {len(index):,} fields of {len(set(index.plates))} plates, {len(index.channels)} "
          f"channels, from {counts['keys']:,} files")
    print(f"left out: {counts['incomplete']:,} incomplete fields{missing}, {counts['other']:,} "
          f"other files, {counts['repeated']:,} further planes or time points, "
          f"{counts['twice']:,} fields listed twice")
    return 0


def print_pool_stats(config: Config, path: str) -> int:
    index = fields.Index.load(path)
    plates = list(index.plate_sizes())
    for batch, plate, count, size in plates:
        print(f"{batch}\t{plate}\t{count:,} fields\t{size / 1e9:,.1f} GB")
    size = sum(size for *_, size in plates)
    known = f"{size:,} bytes ({size / 1e12:.2f} TB)" if size else "bytes not known"
    print(f"{index.root}: {len(set(index.plates))} plates, {len(index):,} fields, "
          f"{len(index.channels)} channels ({', '.join(index.channels)}), {known}")
    return 0


if __name__ == "__main__":
    runs.script(__doc__, Config, main)
