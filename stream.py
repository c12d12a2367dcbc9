"""Fields from S3 that stay in memory and are cropped many times, while the network replaces them one by one.

    python stream.py index s3://BUCKET/PREFIX/ out=fields.tsv.gz     which fields there are; or of a folder
    python stream.py index PREFIX out=fields.tsv.gz from=load_data   the same from its load_data tables
    python stream.py stats fields.tsv.gz                             plates, fields, channels, bytes

A stopped `index` goes on where it was. In training:

    train, validation = stream.hold_out(stream.Index.load("fields.tsv.gz"), 0.01, seed=0)
    with stream.FieldPool(train, 1000, ("DNA", "AGP"), "cuda", rank=rank, world=world, seed=0) as pool:
        if checkpoint: pool.restore(checkpoint)
        slots = pool.sample(batch, step)                 # (B,) int64, distinct; valid until the next sample()
        fields = pool.pixels[slots]                      # (B, C, H, W) int16 that holds the bits of uint16

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
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from planes import decode, limits_of, size_of
from plates import CHANNELS, Field, Index, hold_out, make_index, rooted, summary   # noqa: F401  stream.hold_out
from store import Absent, Cache, Stopped, open_store

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WINDOW = 1000                       # fields whose failures are counted; at least a tenth of it before judging


# ----------------------------------------------------------------------------------------------------- pool

@dataclass(eq=False)
class Job:
    """A field on its way."""
    row: int                            # of the index
    field: Field
    files: list[str]                    # a name for each channel; empty where the index has none
    visit: bool                         # it is the pass's turn; else a resident of a checkpoint comes back
    uses: int                           # crops that a resident had given
    slot: int                           # where it will be
    planes: np.ndarray                  # (C, H, W) uint16: the slot's own memory, or pinned beside the GPU
    limits: np.ndarray                  # (C, 2) float32
    waiting: int                        # channels still to come
    reason: str = ""                    # why it cannot be had, and the file
    file: str = ""
    damaged: bool = False               # the reason may be the way it came
    again: bool = False                 # all of it was fetched twice, since it came damaged


class FieldPool:
    """N decoded fields on the device, replaced one by one in the background; sample() hands out slot numbers.

    pixels : (slots, C, H, W) int16 holding the bits of uint16. limits : (slots, C, 2) float32, see planes.limits_of.
    names : field name in each slot or None. channels : their names.

    There are some more slots than N if not all fields fit: new ones come into these, and when all their
    channels are there, the slot of the most used field is free for the next.

    index : Index, or the file of one.
    fields : N; fewer if the shard has no more.
    size : (H, W) px; that of the first field by default. Other sizes are bad fields.
    min_fill : fields that must be there before sample() answers; by default N / 2, never fewer than a batch.
    least : crops that a field gives before it may go: the downloads wait for slow training.
    threads : and connections. root, endpoint, signed, time_limit : see store.open_store.
    cache, cache_gb : folder for what was downloaded, and its limit (10**9 bytes).
    bad_fields : table to which fields are added that could not be had.
    max_failed : share of the last 1,000 fields that may fail.
    price : $ for 10**9 bytes.
    patience : seconds until a start without any answer is an error; later outages are waited for.
    notice : takes what a person should read.

    Every pass visits each field of this rank's shard once, in an order of seed, pass and rank. Threads start
    with the first sample(), so restore() comes before it. The most used field goes first, never one of the
    current batch. On a GPU all work on a batch must have been queued on the current stream before the next
    sample().
    """

    def __init__(self, index: Index | str | Path, fields: int, channels: Sequence[str],
                 device: str | torch.device, *,
                 rank: int = 0, world: int = 1, seed: int = 0, size: tuple[int, int] | None = None,
                 min_fill: int | None = None, least: int = 1, threads: int = 32, root: str | None = None,
                 endpoint: str | None = None, signed: bool = False, cache: str | Path | None = None,
                 cache_gb: float = 100.0, bad_fields: str | Path | None = None, max_failed: float = 0.2,
                 price: float = 0.09, time_limit: float = 60.0, patience: float = 45.0,
                 notice: Callable[[str], None] = partial(print, file=sys.stderr)):
        self.index = index if isinstance(index, Index) else Index.load(index)
        self.rank, self.world, self.seed = check_place(rank, world, seed)
        self.channels, self.device = known_channels(self.index, channels), device
        self.shard = shard(len(self.index), seed, rank, world)
        self._fields = min(fields, len(self.shard))
        if self._fields < 1:
            raise ValueError(f"fields={fields} of {len(self.shard)} that rank {rank} of {world} has: "
                             "expected 1 or more")
        self._least, self._floor = max(1, least), self._fields // 2 if min_fill is None else min_fill
        if not 0 <= self._floor <= self._fields or threads < 1 or not 0 < max_failed <= 1:
            raise ValueError(f"min_fill={min_fill}, threads={threads}, max_failed={max_failed:g}: expected 0 "
                             f"to {self._fields}, 1 or more, and above 0 to 1")
        self._max_failed, self._price, self._notice, self._patience = max_failed, price, notice, patience
        self._threads, self._limit = threads, 2 * math.ceil(threads / len(self.channels)) + 2   # on their way
        root = rooted(root or self.index.root)
        self._address = (endpoint or "") + root                   # with a name: what the cache knows a file by
        self._cache = Cache(cache, cache_gb * 1e9) if cache is not None else None
        self._cache_works = True
        self._bad_file, self.bad = Path(bad_fields) if bad_fields else None, {}      # name: reason
        self._slot_of: dict[int, int] = {}                         # row: slot of those that are ready
        self._store = open_store(root, threads, endpoint, signed, time_limit, patience,
                                 self._say)
        try:
            self._largest = math.inf if size is None else 4 * size[0] * size[1] + (1 << 20)
            self.size = size or self._first_size()                 # H, W
            self._largest = 4 * self.size[0] * self.size[1] + (1 << 20)         # bytes that one file may have
            slots = self._fields + (self._limit if self._fields < len(self.shard) else 0)
            self._hold(slots)
        except BaseException:
            self._store.stop()
            self._store.close()
            raise

        self._changed = threading.Condition()                      # guards all below
        self._ready = np.zeros(slots, bool)
        self._claimed = np.zeros(slots, bool)                      # of a field on its way
        self._drawn = np.zeros(slots, bool)                        # in the current batch
        self._uses = np.zeros(slots, np.int64)                     # crops
        self._arrived = np.zeros(slots)                            # seconds
        self._rows = np.full(slots, -1)                            # of the index
        self._pass, self._whole = 0, True                          # _whole: begun by this process
        self._consumed = np.zeros(len(self.index), bool)           # visited in this pass
        self._order = deque(self._order_of(0))
        self._refill: deque[tuple[int, int]] = deque()             # residents of a checkpoint: row, crops
        self._flight: dict[int, Job] = {}                          # by row
        self._tasks: deque[tuple[Job, int]] = deque()              # job, channel
        self._complete: deque[Job] = deque()                       # all here, waiting until one may go
        self._recent: deque[str] = deque(maxlen=WINDOW)            # reasons of failures; empty for successes
        self._counts: Counter[str] = Counter()                     # fields, failures, cache_hits, ...
        self._base = 0                                             # bytes before this process
        self._waited = 0.0                                         # seconds that sample() did not answer
        self.stopped: Callable[[], bool] = lambda: False           # asked while sample() waits
        self._last = time.monotonic(), 0, 0                        # of stats(): when, fields, bytes
        self._closing, self._error, self._workers = False, None, []

    @staticmethod
    def resident(fields: Iterable[tuple[str, np.ndarray]], channels: Sequence[str],
                 device: str | torch.device, *,
                 rank: int = 0, world: int = 1, seed: int = 0) -> FieldPool:
        """A pool filled once with (name, (C, H, W) uint16), equal on all ranks.

        sample() then depends on nothing but seed, step and the batch over all ranks.
        """
        return _Resident(fields, channels, device, rank, world, seed)

    def _hold(self, slots: int) -> None:
        import torch
        shape = (slots, len(self.channels), *self.size)
        try:
            self.pixels = torch.zeros(shape, dtype=torch.int16, device=self.device)
            self.limits = torch.zeros((*shape[:2], 2), device=self.device)
        except RuntimeError:                                       # the one reason that zeros() knows
            raise ValueError(f"fields={self._fields}: {2 * math.prod(shape) / 2**30:.1f} GiB do not fit on "
                             f"{self.device}; give fewer fields or channels") from None
        self.names: list[str | None] = [None] * slots
        if self.pixels.is_cuda:
            self._stream = torch.cuda.Stream(self.pixels.device)
            self._drawing = torch.cuda.current_stream(self.pixels.device).record_event()     # after the zeros
            self._staging = [torch.empty(shape[1:], dtype=torch.int16, pin_memory=True)
                             for _ in range(self._limit)]          # pinned, or copies would stop the GPU

    # ------------------------------------------------------------------------------------------------ drawing

    def sample(self, batch: int, step: int) -> Tensor:
        """(batch,) int64 distinct slots on the device; their pixels stay until the next call."""
        if not 1 <= batch <= self._fields or batch == self._fields < len(self.shard):
            raise ValueError(f"batch={batch} of {self._fields} fields in the pool: expected fewer, since "
                             f"the fields of a batch cannot be replaced; give fields={2 * batch} or more, or "
                             "a smaller batch")
        with self._changed:
            self._floor = max(self._floor, batch)
            self._start()
            self._wait_for_fields()
            rng = np.random.default_rng((self.seed, self.rank, step))
            slots = rng.choice(np.flatnonzero(self._ready), batch, replace=False)
            self._drawn[:] = False
            self._drawn[slots] = True
            self._uses[slots] += 1
            self._settle()
            if self.pixels.is_cuda:                        # what was queued so far still reads the last batch
                import torch
                self._drawing = torch.cuda.current_stream(self.pixels.device).record_event()
            self._changed.notify()                                 # the next of the pass may be used by now
        return self._sent(slots)

    def _sent(self, slots: np.ndarray) -> Tensor:
        import torch
        slots = torch.from_numpy(slots)
        return slots.pin_memory().to(self.device, non_blocking=True) if self.pixels.is_cuda else slots

    def _wait_for_fields(self) -> None:
        begun = said = time.monotonic()
        while True:
            if self._error is not None:
                raise self._error
            if self._closing:
                raise ValueError("the pool is closed")
            if self.stopped():
                raise Stopped
            if (here := int(self._ready.sum())) >= self._floor:
                break
            self._changed.wait(1.0)
            if (now := time.monotonic()) - said > 10:
                said = now
                self._notice(f"{here} of {self._floor} fields are here after {now - begun:.0f} s")
        self._waited += time.monotonic() - begun

    def _start(self) -> None:
        if not self._workers and not self._closing:
            self._workers = [threading.Thread(target=self._work, name=f"fields-{number}", daemon=True)
                             for number in range(self._threads)]
            for worker in self._workers:
                worker.start()

    # --------------------------------------------------------------------------------------------- background

    def _work(self) -> None:
        orderly = False
        try:
            while (task := self._next()) is not None:
                task()
            orderly = True
        except Stopped:
            orderly = True
        except OSError as error:                           # no answer at all, or bad_fields cannot be written
            orderly = True
            self._stop_with(error)
        finally:
            if not orderly:
                self._stop_with(RuntimeError("a download thread failed; its traceback is above"))

    def _stop_with(self, error: Exception) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def _next(self) -> Callable[[], None] | None:
        """Which file to fetch now; waits while there is none."""
        with self._changed:
            while not self._closing and self._error is None:
                if not self._tasks:
                    self._begin()
                if self._tasks:
                    return partial(self._fetch, *self._tasks.popleft())
                self._changed.wait()
        return None

    def _begin(self) -> None:
        """Queue the files of the next field, if one may be begun."""
        full = len(self._flight) >= self._limit or (self._ready | self._claimed).all()
        if self._refill and not full:
            row, uses = self._refill.popleft()
            return self._queue(row, False, uses)
        while True:
            if not self._order:
                if self._flight:                                   # a pass ends when all of it has come
                    return
                self._end_pass()
                if self._error is not None:
                    return
            row = self._order[0]
            slot = self._slot_of.get(row)
            if slot is None:
                break
            if self._uses[slot] < self._least:                 # still here and not used yet: wait until it is
                return
            self._uses[slot], self._arrived[slot] = 0, time.monotonic()      # used: stays, as if it came anew
            self._recent.append("")
            self._consumed[self._order.popleft()] = True
        if not full and row not in self._flight:                     # where a returning resident is
            self._queue(self._order.popleft(), True, 0)

    def _queue(self, row: int, visit: bool, uses: int) -> None:
        field, C = self.index[row], len(self.channels)
        slot = int(np.flatnonzero(~(self._ready | self._claimed))[0])
        memory = self._staging.pop() if self.pixels.is_cuda else self.pixels[slot]
        planes, limits = memory.numpy().view(np.uint16), np.zeros((C, 2), np.float32)
        files = [field.files.get(channel, "") for channel in self.channels]
        job = Job(row, field, files, visit, uses, slot, planes, limits, C, again=not self._store.remote)
        self._flight[row], self._claimed[slot] = job, True
        self._tasks.extend((job, channel) for channel in range(C))
        self._changed.notify_all()

    def _fetch(self, job: Job, channel: int) -> None:
        reason, damaged = "", False
        if not job.reason:                                         # else another channel failed already
            try:
                if not job.files[channel]:
                    raise Absent(f"no file of channel {self.channels[channel]} in the index")
                decode(self._body(job.files[channel], not job.again), job.planes[channel])
                job.limits[channel] = limits_of(job.planes[channel:channel + 1])
            except Absent as error:
                reason = str(error)
            except ValueError as error:
                reason, damaged = str(error), True
        with self._changed:
            if reason and not job.reason:
                job.reason, job.file, job.damaged = reason, job.files[channel], damaged
            job.waiting -= 1
            if job.waiting:
                return
        if not job.reason:
            self._send(job)
        with self._changed:
            if not job.reason:
                self._complete.append(job)
                self._settle()
            elif job.damaged and not job.again:                    # on the way, perhaps, or in the cache
                job.reason, job.again, job.waiting = "", True, len(job.files)
                self._tasks.extend((job, channel) for channel in range(len(job.files)))
                if self._cache is not None:
                    for name in job.files:
                        self._cache.drop(self._address + name)
            else:
                self._failed(job)
            self._changed.notify_all()

    def _send(self, job: Job) -> None:
        """Limits into the slot, and pixels too if they are not there already."""
        import torch
        limits = torch.from_numpy(job.limits)
        if not self.pixels.is_cuda:
            self.limits[job.slot] = limits
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._drawing)                 # no queued work reads this slot after it
            self.pixels[job.slot].copy_(torch.from_numpy(job.planes.view(np.int16)), non_blocking=True)
            self.limits[job.slot].copy_(limits)
            self._stream.record_event().synchronize()              # this thread waits, the GPU goes on

    def _settle(self) -> None:
        """Fields that are complete take part, and for each one the most used goes, of several the oldest."""
        while self._complete:
            if self._ready.sum() >= self._fields:
                may = self._ready & ~self._drawn & (self._uses >= self._least)
                if not may.any():
                    return
                most = np.flatnonzero(may & (self._uses == self._uses[may].max()))
                old = int(most[self._arrived[most].argmin()])
                del self._slot_of[int(self._rows[old])]
                self._ready[old], self.names[old] = False, None
            job = self._complete.popleft()
            slot = job.slot
            self._ready[slot], self.names[slot], self._rows[slot] = True, job.field.name, job.row
            self._uses[slot], self._arrived[slot] = job.uses, time.monotonic()
            self._slot_of[job.row] = slot
            self._counts["fields"] += 1
            self._done(job, "")
            self._changed.notify_all()

    def _body(self, name: str, may_be_cached: bool) -> bytes:
        if self._cache is None or not self._store.remote:
            return self._read(name)
        if may_be_cached and (body := self._cache.get(self._address + name)) is not None:
            with self._changed:
                self._counts["cache_hits"] += 1
            return body
        body = self._read(name)
        try:
            if self._cache_works:
                self._cache.put(self._address + name, body)
        except OSError as error:                                   # a full disk is no reason to stop
            self._cache_works = False
            self._notice(f"{self._cache.folder}: {error.strerror}; going on without writing to the cache")
        return body

    def _read(self, name: str) -> bytes:
        body = self._store.read(name, self._largest)
        self._store.patience = math.inf                          # it has answered: outages are waited for now
        return body

    def _done(self, job: Job, reason: str) -> None:
        self._recent.append(reason)
        self._claimed[job.slot] = False
        del self._flight[job.row]
        if self.pixels.is_cuda:
            import torch
            self._staging.append(torch.from_numpy(job.planes.view(np.int16)))
        if job.visit:
            self._consumed[job.row] = True

    def _failed(self, job: Job) -> None:
        self._counts["failures"] += 1
        self._done(job, job.reason)
        if job.field.name not in self.bad:
            self.bad[job.field.name] = job.reason
            if self._bad_file:
                note(self._bad_file, job.field.name, job.file, job.reason)
        reasons = Counter(filter(None, self._recent))
        if reasons.total() > self._max_failed * max(len(self._recent), WINDOW // 10):
            where = f"; {self._bad_file} lists them" if self._bad_file else ""
            most = reasons.most_common(1)[0][0]
            self._error = self._error or ValueError(
                f"{self._store.root}: {reasons.total()} of the last {len(self._recent)} fields could not be had, "
                f"most often: {most}{where}")

    def _end_pass(self) -> None:
        here = int(self._ready.sum())
        if self._whole and here < self._floor:
            reasons = Counter(self.bad.values()).most_common(1)
            most = f"; most often: {reasons[0][0]}" if reasons else ""
            self._error = self._error or ValueError(
                f"{self._store.root}: only {here} of {len(self.shard)} fields could be had, expected "
                f"{self._floor} to draw from{most}")
            self._changed.notify_all()
        self._pass, self._whole = self._pass + 1, True
        self._consumed[:] = False
        self._order = deque(self._order_of(self._pass))

    def _order_of(self, number: int) -> list[int]:
        return np.random.default_rng((self.seed, 1, number, self.rank)).permutation(self.shard).tolist()

    def _first_size(self) -> tuple[int, int]:
        """(H, W) of the first field, of those that can be had; all ranks ask the same ones."""
        reasons = []
        for number in np.linspace(0, len(self.index) - 1, 8).astype(int):
            try:
                name = self.index[number].files.get(self.channels[0])
                return size_of(self._read(name) if name else b"")
            except Absent as error:
                reasons.append(str(error))
        raise ValueError(f"{self._store.root}: none of 8 fields tried could be had: "
                         f"{Counter(reasons).most_common(1)[0][0]}")

    def _say(self, text: str) -> None:
        self._notice(f"{text}; going on with the {len(self._slot_of)} fields that are here")

    # ----------------------------------------------------------------------------------- checkpoint, log, end

    def state(self) -> dict:
        """For the checkpoint: what this rank visited in the pass, and residents."""
        import torch
        with self._changed:
            here = np.flatnonzero(self._ready)
            rows = [*self._rows[here].tolist(), *(row for row, _ in self._refill)]
            uses = [*self._uses[here].tolist(), *(uses for _, uses in self._refill)]
            for job in self._flight.values():
                if not job.visit:
                    rows, uses = [*rows, job.row], [*uses, job.uses]
            return {"index": self.index.digest, "seed": self.seed, "rank": self.rank, "world": self.world,
                    "pass": self._pass, "consumed": torch.from_numpy(np.packbits(self._consumed)),
                    "rows": torch.tensor(rows, dtype=torch.int64),
                    "uses": torch.tensor(uses, dtype=torch.int64),
                    "bytes": self._bytes()}

    def restore(self, state: dict | Sequence[dict]) -> None:
        """Go on in the pass; residents are fetched again. With all ranks' states their number may change."""
        states = [state] if isinstance(state, dict) else sorted(state, key=lambda one: one["rank"])
        if self._workers:
            raise ValueError("restore() after sample(): expected before the first one")
        for one in states:
            if (one["index"], one["seed"]) != (self.index.digest, self.seed):
                raise ValueError(f"the checkpoint's pool had another index or seed ({one['seed']}); give the "
                                 "same ones, or begin a new experiment")
        own = [one for one in states if (one["rank"], one["world"]) == (self.rank, self.world)]
        if not own and len(states) != states[0]["world"]:
            raise ValueError(f"the checkpoint's pool is of rank {states[0]['rank']} of {states[0]['world']}, "
                             f"here rank {self.rank} of {self.world} goes on; give restore() the states of "
                             "all ranks")
        if own:
            self._pass, consumed = own[0]["pass"], self._unpacked(own[0])
            left = [row for row in self._order_of(self._pass) if not consumed[row]]
        else:                                                   # the pass is finished together, in new shares
            self._pass, consumed = min(one["pass"] for one in states), np.zeros(len(self.index), bool)
            for one in states:
                behind = one["pass"] == self._pass
                old = shard(len(self.index), self.seed, one["rank"], one["world"])       # all of it, if ahead
                consumed[self._unpacked(one) if behind else old] = True
            left = np.random.default_rng((self.seed, 2, self._pass)).permutation(np.flatnonzero(~consumed))
            left = left[self.rank::self.world].tolist()
        self._consumed, self._whole, self._order = consumed, False, deque(left)
        rows, uses = (np.concatenate([one[key].numpy() for one in own or states]) for key in ("rows", "uses"))
        share = slice(None) if own else slice(self.rank, None, self.world)
        _, first = np.unique(rows, return_index=True)              # two old ranks may have had the same one
        chosen = np.sort(first)[share][:self._fields]
        self._refill = deque(zip(rows[chosen].tolist(), uses[chosen].tolist()))
        self._base = own[0]["bytes"] if own else sum(one["bytes"] for one in states) // self.world

    def _unpacked(self, state: dict) -> np.ndarray:
        return np.unpackbits(state["consumed"].numpy(), count=len(self.index)).astype(bool)

    def _bytes(self) -> int:
        return self._base + self._store.counts["bytes"]

    def stats(self) -> dict[str, float]:
        """For the log: rates since the last call, and totals.

        fields_per_s, mb_per_s (10**6 bytes from the network), bytes, cost ($), freshness (crops that a field
        here has given, mean), age_s (since it came, mean), resident (fields), passes, retries, failures
        (fields), cache_hits (files), outage_s (since the last answer; 0 while all is well), waited_s (that
        sample() did not answer).
        """
        with self._changed:
            now, ready = time.monotonic(), self._ready
            fields, total, came = self._counts["fields"], self._bytes(), self._store.counts["bytes"]
            took, since, before = now - self._last[0], fields - self._last[1], came - self._last[2]
            self._last = now, fields, came
            any_here = max(1, int(ready.sum()))
            visited = 1 - len(self._order) / max(1, len(self.shard))
            return {"fields_per_s": since / max(took, 1e-9), "mb_per_s": before / 1e6 / max(took, 1e-9),
                    "bytes": float(total), "cost": total / 1e9 * self._price,
                    "freshness": float(self._uses[ready].sum() / any_here),
                    "age_s": float((now - self._arrived[ready]).sum() / any_here),
                    "resident": float(ready.sum()),
                    "passes": self._pass + visited, "retries": float(self._store.counts["retries"]),
                    "failures": float(self._counts["failures"]),
                    "cache_hits": float(self._counts["cache_hits"]),
                    "outage_s": self._store.outage(), "waited_s": self._waited}

    def close(self) -> None:
        """End the threads and connections; the pixels stay."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._store.stop()
        for worker in self._workers:
            worker.join()
        self._store.close()

    def __enter__(self) -> FieldPool:
        return self

    def __exit__(self, *_) -> None:
        self.close()


class _Resident(FieldPool):
    """What FieldPool.resident returns."""

    def __init__(self, fields: Iterable[tuple[str, np.ndarray]], channels: Sequence[str],
                 device: str | torch.device,
                 rank: int, world: int, seed: int):
        import torch
        self.rank, self.world, self.seed = check_place(rank, world, seed)
        self.channels, self.device, self.names, pixels, limits = tuple(channels), device, [], [], []
        for name, array in fields:
            expected = (len(self.channels), *(pixels[0].shape[1:] if pixels else array.shape[1:]))
            if array.ndim != 3 or array.shape != expected or array.dtype != np.uint16:
                raise ValueError(f"{name}: {array.shape} {array.dtype}, expected {expected} uint16, as the "
                                 f"first field and the channels {', '.join(self.channels)}")
            self.names.append(name)
            pixels.append(torch.from_numpy(np.ascontiguousarray(array).view(np.int16)))
            limits.append(torch.from_numpy(limits_of(array)))
        if not pixels:
            raise ValueError("no fields for the pool")
        self.size = tuple(pixels[0].shape[1:])
        self.pixels, self.limits = torch.stack(pixels).to(device), torch.stack(limits).to(device)

    def sample(self, batch: int, step: int) -> Tensor:
        together = batch * self.world
        if not 1 <= together <= len(self.names):
            raise ValueError(f"batch={batch} on {self.world} processes: {together} fields of "
                             f"{len(self.names)}, expected at most as many, since a field is taken once; "
                             "give more fields or a smaller batch")
        slots = np.random.default_rng((self.seed, step)).choice(len(self.names), together, False)
        return self._sent(slots[self.rank * batch:(self.rank + 1) * batch])

    def state(self) -> dict:
        return {}

    def restore(self, state: dict | Sequence[dict]) -> None:
        if any([state] if isinstance(state, dict) else state):
            raise ValueError("the checkpoint's fields were streamed, here all are resident; keep the data "
                             "as it was")

    def stats(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass


def shard(fields: int, seed: int, rank: int, world: int) -> np.ndarray:
    """The rows of the index that are this rank's: disjoint, together all, by lot."""
    return np.random.default_rng((seed, 0)).permutation(fields)[rank::world]


def check_place(rank: int, world: int, seed: int) -> tuple[int, int, int]:
    if not 0 <= rank < world or seed < 0:
        raise ValueError(f"rank={rank} of world={world}, seed={seed}: expected 0 <= rank < world and a seed "
                         "of 0 or more")
    return rank, world, seed


def known_channels(index: Index, channels: Sequence[str]) -> tuple[str, ...]:
    """As the index writes them."""
    known = {name.lower(): name for name in index.channels}
    for name in channels:
        if name.lower() not in known:
            near = get_close_matches(name.lower(), known, 1)
            hint = f", did you mean '{known[near[0]]}'?" if near else ""
            raise ValueError(f"no channel '{name}' in the index of {index.root}{hint}; there are "
                             f"{', '.join(index.channels)}")
    found = tuple(known[name.lower()] for name in channels)
    if not found or len(set(found)) < len(found):
        raise ValueError(f"channels={','.join(channels)}: expected one or more, each once")
    return found


def note(path: Path, *cells: str) -> None:
    """Add a line to bad_fields.tsv; processes may share it, since a short line is written at once."""
    line = "\t".join(" ".join(cell.split()) for cell in cells) + "\n"
    with open(path, "ab", buffering=0) as file:
        file.write((("" if file.tell() else "name\tfile\treason\n") + line).encode("utf-8", "replace"))


# ------------------------------------------------------------------------------------------------ commands

@dataclass(frozen=True)
class Options:
    out: str | None = None                  # index: file to write, .tsv.gz
    from_: Literal["listing", "load_data"] = "listing"   # index: written from=; file names or tables
    channels: tuple[str, ...] | None = None # index: those that a field must have; null: all that occur
    incomplete: Literal["drop", "keep"] = "drop"         # index: fields that miss one of them
    names: tuple[str, ...] = CHANNELS       # index: what ch1, ch2, ... in file names are
    root: str | None = None         # where the files lie, if not where they were listed: s3://... or a folder
    endpoint: str | None = None             # URL of another S3 server than Amazon's
    signed: bool = False                    # with your AWS credentials; public buckets need none
    connections: int = 16                   # requests at a time


def main(options: Options, arguments: list[str]) -> int:
    commands = {"index": make, "stats": stats}
    if len(arguments) != 2 or arguments[0] not in commands:
        raise ValueError(f"got {' '.join(arguments) or 'nothing'}, expected index SOURCE out=FILE or stats "
                         "FILE; --help explains them")
    return commands[arguments[0]](options, arguments[1])


def make(options: Options, source: str) -> int:
    out = Path(options.out or "")
    if not options.out or not out.parent.is_dir() or out.suffix != ".gz":
        raise ValueError(f"out={options.out}: expected a file .tsv.gz in a folder that is there")
    journal = out.with_name(f"{out.name}.part")
    index, counts = make_index(source, options.from_, options.channels, options.incomplete, options.root,
                               options.names,
                               journal, options.connections, options.endpoint, options.signed)
    index.save(out)
    journal.unlink()
    missing = ", ".join(f"{name[8:]} {n:,}" for name, n in sorted(counts.items())
                        if name.startswith("without "))
    kept = "kept" if options.incomplete == "keep" else "left out"
    print(f"{out}: {len(index):,} fields of {len(set(index.plates))} plates, {len(index.channels)} channels, "
          f"from {counts['keys']:,} files")
    print(f"{counts['incomplete']:,} incomplete fields {kept}" + (f" (missing {missing})" if missing else "")
          + f", {counts['other']:,} other files, {counts['repeated']:,} further planes or time points and "
          f"{counts['twice']:,} fields listed twice left out")
    return 0


def stats(options: Options, path: str) -> int:
    index = Index.load(path, options.root)
    fields = size = 0
    for batch, plate, n, bytes_ in summary(index):
        print(f"{batch}\t{plate}\t{n:,} fields\t{bytes_ / 1e9:,.1f} GB")
        fields, size = fields + n, size + bytes_
    known = f"{size:,} bytes ({size / 1e12:.2f} TB)" if size else "bytes not known"
    print(f"{index.root}: {len(set(index.plates))} plates, {fields:,} fields, {len(index.channels)} channels "
          f"({', '.join(index.channels)}), {known}")
    return 0


if __name__ == "__main__":
    import runs
    given = ["from_" + a[4:] if a.startswith("from=") else a for a in sys.argv[1:]]      # from is Python's
    runs.script(__doc__, Options, main, given)
