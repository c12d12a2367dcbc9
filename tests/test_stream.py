"""stream.py: pools, against a real S3 server over HTTP on loopback, behind a proxy with faults."""
import collections
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jump_fields import (
    ABOVE,
    ADDRESS,
    BATCH,
    CHANNELS,
    NUMBERS,
    SIDE,
    TRUTH,
    key,
    name,
    picture,
    put,
    tiff,
)

import fields
import images
import runs
import s3
import stream


@pytest.fixture(scope="module")
def listed(jump_server):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", jump_server.url)
        return fields.make_index(ADDRESS)[0]


@pytest.fixture
def index(server, listed):
    return listed


def pool_of(index, count, *channels, kind=stream.FieldPool, least=1, threads=4, cache=None,
            device="cpu", **options):
    config = fields.FieldData(index="-", pool=count, channels=channels, least=least,
                              threads=threads, cache=cache)
    return kind(index, config, device, **options)


class Watched(stream.FieldPool):
    """Writes down which fields arrived or failed in which pass."""

    def __init__(self, *args, **options):
        self.seen, self.returned = collections.defaultdict(list), []    # by pass; from a checkpoint
        super().__init__(*args, **options)

    def _done(self, job, reason):
        (self.seen[self._pass] if job.visit else self.returned).append((job.name, reason))
        super()._done(job, reason)


def check_pixels(pool, slots) -> set[str]:
    """Every drawn field is what was stored, in all channels; their names."""
    drawn = [pool.names[slot] for slot in slots]
    assert len(set(drawn)) == len(slots)
    for slot, field in zip(slots, drawn, strict=True):
        expected = np.stack([picture(*TRUTH[field], NUMBERS[CHANNELS.index(c)])
                             for c in pool.channels])
        pixels = pool.pixels[slot].numpy().view(np.uint16)
        assert np.array_equal(pixels, expected)
        np.testing.assert_allclose(pool.limits[slot], images.percentiles(expected), rtol=1e-6)
    return set(drawn)


def draw(pool, until, batch=4, seconds=40.0, pause=0.002) -> set[str]:
    """Sample and check until until(); names of all that was drawn."""
    drawn, step, end = set(), 0, time.monotonic() + seconds
    while not until():
        drawn |= check_pixels(pool, pool.sample(batch, step))
        step += 1
        time.sleep(pause)
        assert time.monotonic() < end, pool.stats()
    return drawn


def consumed(index, state) -> set[str]:
    return {index[int(i)].name for i in np.flatnonzero(state["consumed"])}


# ----------------------------------------------------------------------------------- resident pool

def arrays(n=12):
    return [(f"f{i}", np.stack([picture(9, i, c) for c in (1, 5)])) for i in range(n)]


@pytest.mark.smoke
def test_resident_two_ranks_equal_one():
    """The batch of all ranks is the same, its parts disjoint; only seed and step decide."""
    one = stream.ResidentPool(arrays(), ("Mito", "DNA"), "cpu", seed=3)
    two = [stream.ResidentPool(iter(arrays()), ("Mito", "DNA"), "cpu", rank=r, world=2, seed=3)
           for r in (0, 1)]
    for step in (7, 0, 3):
        parts = [pool.sample(4, step) for pool in two]
        assert torch.equal(torch.cat(parts),
                           one.sample(8, step)) and torch.cat(parts).unique().numel() == 8
        assert parts[0].dtype == torch.int64
    assert not torch.equal(one.sample(8, 0), one.sample(8, 1))
    counts = torch.zeros(12)
    for step in range(600):
        counts[one.sample(4, step)] += 1
    assert (counts / 200 - 1).abs().max() < 0.3                      # each as often, within 5 sigma
    for i, (field, pixels) in enumerate(arrays()):
        assert one.names[i] == field and np.array_equal(one.pixels[i].numpy().view(np.uint16),
                                                        pixels)
    np.testing.assert_allclose(one.limits, [images.percentiles(p) for _, p in arrays()], rtol=1e-6)
    assert one.stats() == {}


def test_a_resident_pool_goes_on_with_the_same_fields_alone(tmp_path):
    """A file more, or another name, would change what is trained on and what is held out."""
    for number in range(6):
        tifffile.imwrite(tmp_path / f"f{number}.tif", picture(9, number, 1))
    config = fields.FieldData(folders=(str(tmp_path),), held=2)

    def opened():
        return stream.open_pool(config, 2, 0, "cpu")
    state = opened().state()
    opened().restore([state, state])
    held = next(fields.held_out_fields(config, 0)[1])[0]
    kept = opened().names[0]
    for stem in (held, kept):
        (tmp_path / f"{stem}.tif").rename(tmp_path / f"{stem}_.tif")
        with pytest.raises(ValueError, match="had other fields, or others held out; give"):
            opened().restore([state])
        (tmp_path / f"{stem}_.tif").rename(tmp_path / f"{stem}.tif")
    tifffile.imwrite(tmp_path / "g.tif", picture(9, 7, 1))
    with pytest.raises(ValueError, match="had other fields"):
        opened().restore([state])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**16 - 1), st.integers(0, 99))
def test_limits_are_percentiles(h, w, top, seed):
    pixels = np.random.default_rng(seed).integers(0, top + 1, (2, h, w)).astype(np.uint16)
    pixels[1] = 0
    pixels[1, 0, 0] = top
    np.testing.assert_allclose(images.sampled_limits(pixels), images.percentiles(pixels), rtol=2e-7)


def test_limits_of_a_large_field_are_close():
    pixels = np.random.default_rng(0).gamma(2, 900, (1, 1080, 1080)).clip(0,
                                                                          65535).astype(np.uint16)
    low, high = images.sampled_limits(pixels)[0]
    assert abs((pixels <= low).mean() - 0.01) < 0.0015
    assert abs((pixels <= high).mean() - 0.998) < 0.0007


# ---------------------------------------------------------------------------------- streaming pool

def test_faults_kill_and_resume_every_good_field_exactly_once(server, index, tmp_path, monkeypatch,
                                                              capsys):
    """Latency, 503s, cut bodies, resets, a drip and bad files; a kill, a resume, an outage."""
    monkeypatch.setattr(s3, "TIME_LIMIT", 0.8)
    monkeypatch.setattr(stream, "MAX_FAILED", 0.5)
    field = {n: next(i for i in range(36) if index[i].name == name(*n)) for n in TRUTH.values()}
    lines = list(index.lines)
    lines[field[1, 2]] = lines[field[1, 2]].replace(b"ch4sk", b"ch4xx")                # 404
    lines[field[2, 2]] = lines[field[2, 2]].rsplit(b"\t",
                                                   1)[0] + b"\t"       # no file of the last channel
    odd = {(3, 2): tiff(picture(3, 2, 4))[:-300], (3, 3): b"<html>",
           (4, 2): tiff(picture(4, 2, 4, side=16)),
           (4, 3): tiff(picture(4, 3, 4).astype(np.uint8)), (4, 4): b"",
           (4, 5): tiff(np.zeros((3, SIDE, SIDE), np.uint16))}
    reasons = {(1, 2): "404", (2, 2): "no file of channel Brightfield", (3, 2): "truncated|damaged",
               (3, 3): "damaged or no TIFF", (4, 2): "wrong size, 16 x 16 px", (4, 3): "uint8",
               (4, 4): "empty",
               (4, 5): "3 page"}
    good = set(TRUTH) - {name(*n) for n in reasons}
    bad = fields.Index(index.root, index.channels, lines)
    options = dict(kind=Watched, threads=16, least=2, seed=5,
                   bad_fields=tmp_path / "bad_fields.tsv")
    try:
        for n, body in odd.items():
            put(server, ABOVE + key(*n, 4), body)
        server.set(latency=0.2, errors=0.1, truncated=0.05, resets=0.05, drips=0.02)
        with pool_of(bad, 10, **options) as pool:
            draw(pool, lambda: len(pool.seen[0]) >= 12)
            torch.save(pool.state(), tmp_path / "checkpoint.pt")
            draw(pool, lambda: len(pool.seen[0]) >= 16)                       # lost with the kill
            assert pool.stats()["retries"] > 5
        state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        before = consumed(bad, state)
        resident = {bad[i].name for i, _ in state["residents"]}
        with pool_of(bad, 10, **options) as pool:
            pool.restore([state])
            drawn = draw(pool, lambda: len(before) + len(pool.seen[0]) >= 26)
            server.set(outage=True)                                          # the loop goes on
            meanwhile = draw(pool, lambda: pool.stats()["outage_s"] > 1)
            assert len(meanwhile) >= 8
            server.set(latency=0.02)
            drawn |= meanwhile | draw(pool, lambda: pool.seen[1])
            stats = pool.stats()
            after = [n for n, _ in pool.seen[0]]
        assert len(set(after)) == len(after) and not set(after) & before     # exactly once
        assert set(after) | before == set(TRUTH)
        assert {n for n, _ in pool.returned} == resident and resident <= before
        arrived = {n for n, reason in pool.seen[0] if not reason}
        assert arrived | before >= good and arrived <= drawn | {n for n in pool.names
                                                                if n}   # none left unused
        assert stats["outage_s"] == 0 and stats["bytes"] > 5e4
        said = capsys.readouterr().err
        for text in ("has not answered", "fields are here", "answers again after"):
            assert text in said
        table = [line.split("\t")
                 for line in (tmp_path / "bad_fields.tsv").read_text().splitlines()]
        assert table[0] == ["name", "file", "reason"]
        assert {row[0] for row in table[1:]} == {name(*n) for n in reasons}
        for n, reason in reasons.items():
            found = [row for row in table if row[0] == name(*n)]
            assert any(word in found[0][2] for word in reason.split("|")), found
        wrong = [row[1] for row in table if row[0] == name(4, 3)]
        assert wrong[0] == key(4, 3, 4).removeprefix(f"{BATCH}/")
    finally:
        server.set()
        for n in odd:
            put(server, ABOVE + key(*n, 4), tiff(picture(*n, 4)))


def test_shards_are_disjoint_and_ranks_may_change(index, tmp_path):
    """Three ranks visit all fields of a pass once; two that take over finish it, once each."""
    states, seen = [], []
    for rank in range(3):
        with pool_of(index, 4, "DNA", "ER", kind=Watched, rank=rank, world=3, seed=1) as pool:
            visited = (4, 6, 8)[rank]
            draw(pool, lambda pool=pool, visited=visited: len(pool.seen[0]) >= visited, batch=2)
            states.append(pool.state())
            seen += consumed(index, states[-1])
    torch.save(states, tmp_path / "states.pt")
    states = torch.load(tmp_path / "states.pt", weights_only=True)
    rest = []
    for rank in range(2):
        with pool_of(index, 4, "DNA", "ER", kind=Watched, rank=rank, world=2, seed=1) as pool:
            pool.restore(states)
            draw(pool, lambda: pool.seen[1], batch=2)
            rest += [n for n, _ in pool.seen[0]]
    assert len(seen) == len(set(seen)) >= 18 and sorted(seen + rest) == sorted(TRUTH)
    with pool_of(index, 4, "DNA", rank=1, world=2, seed=1) as pool, \
            pytest.raises(ValueError, match="another index or seed"):
        pool.restore([{**states[0], "seed": 2}])
    with pytest.raises(ValueError, match="no field for rank 50 of 100"):
        pool_of(index, 8, "DNA", rank=50, world=100)


def test_every_pass_is_another_order_and_all_resident_needs_no_network(index):
    """A pool that holds its whole shard downloads it once, and passes go on."""
    few = index.select(range(9))
    with pool_of(few, 100, "DNA", kind=Watched) as pool:
        assert len(pool.names) == 9
        drawn = draw(pool, lambda: pool.stats()["passes"] > 3, batch=3)
        assert drawn == {few[i].name for i in range(9)}
        assert pool.stats()["bytes"] < 12 * len(tiff(picture(1, 1, 1)))
    with pool_of(few, 4, "DNA", kind=Watched) as pool:
        draw(pool, lambda: pool.seen[3], batch=2)
    assert sorted(n for n, _ in pool.seen[0]) == [few[i].name for i in range(9)]
    for number in (1, 2):                               # what was still there was not fetched again
        visited = [n for n, _ in pool.seen[number]]
        assert 5 <= len(visited) <= 9 and len(set(visited)) == len(visited)
    first, second = pool._order_of(0), pool._order_of(1)
    assert sorted(first) == sorted(second) != second != first


def test_the_batch_stays_and_sample_never_waits(index):
    """Pixels of a batch stay until the next one, while all else is replaced; draws take no time."""
    with pool_of(index, 8, "DNA", "ER", threads=8) as pool:
        pool.sample(3, 0)
        taken = []
        for step in range(40):
            slots = pool.sample(3, step)
            pixels, names = pool.pixels[slots].clone(), [pool.names[s] for s in slots]
            time.sleep(0.02)
            assert torch.equal(pool.pixels[slots], pixels) and [pool.names[s]
                                                                for s in slots] == names
            assert sum(n is not None for n in pool.names) >= 4
            begun = time.perf_counter()
            pool.sample(3, step)
            taken.append(time.perf_counter() - begun)
        assert np.median(taken) < 0.01
        assert pool.stats()["fields_per_s"] > 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(index):
    """The same fields, and a batch that queued work still reads is not overwritten."""
    with pool_of(index, 8, "DNA", "ER", threads=8, device="cuda") as pool:
        for step in range(60):
            slots = pool.sample(3, step)
            names = [pool.names[slot] for slot in slots.tolist()]
            torch.cuda._sleep(20_000_000)                                    # the GPU lags behind
            pixels, limits = pool.pixels[slots], pool.limits[slots]
            for field, found, pair in zip(names, pixels.cpu().numpy().view(np.uint16), limits.cpu(),
                                          strict=True):
                expected = np.stack([picture(*TRUTH[field], NUMBERS[CHANNELS.index(c)])
                                     for c in pool.channels])
                assert np.array_equal(found, expected)
                np.testing.assert_allclose(pair, images.percentiles(expected), rtol=1e-6)


def test_the_network_waits_for_slow_training(index):
    """With nobody drawing, downloads stop: no field goes unused."""
    with pool_of(index, 6, "DNA", least=3) as pool:
        pool.sample(1, 0)
        had, end = -1, time.monotonic() + 20
        while had < pool.stats()["bytes"] and time.monotonic() < end:     # until nothing more comes
            had = pool.stats()["bytes"]
            time.sleep(0.3)
        first = list(pool.names)
        pool.stats()
        time.sleep(0.3)
        assert pool.names == first and len(first) - first.count(None) == 6
        assert pool.stats()["bytes"] == had
        assert pool.stats()["fields_per_s"] == pool.stats()["mb_per_s"] == 0


def test_memory_stays_bounded(server, index):
    """While 41 MB come, each of four threads holds a file and the counts for its limits: 2.5 MB."""
    big = tiff(picture(1, 1, 1, side=400))
    keys = [f"big/{i}.tiff" for i in range(4)]
    for k in keys:
        put(server, k, big)
    files = "\t".join(k[4:] for k in keys)
    lines = [f"b\tP{p}\tm\t1\t1\t{f}\t0\tbig/\t{files}".encode() for p in (1, 2) for f in range(18)]
    many = fields.Index("s3://cellpainting-gallery/", CHANNELS, lines)
    with pool_of(many, 6) as pool:
        pool.sample(2, 0)
        tracemalloc.start()
        step, end = 0, time.monotonic() + 30
        while pool.stats()["bytes"] < 32 * 4 * len(big) and time.monotonic() < end:
            pool.sample(2, step := step + 1)
            time.sleep(0.005)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        fetched = pool.stats()["bytes"]
    assert fetched >= 32 * 4 * len(big) and peak < 16e6 < 0.4 * fetched


def test_a_broken_object_is_no_outage(server, index, monkeypatch):
    """503 for ever on one file, with all threads at it: the server still gives what it gave."""
    monkeypatch.setattr(s3, "TRIES", 4)
    monkeypatch.setattr(stream, "MAX_FAILED", 0.5)
    server.set(broken="BR00000002__2020-11-05T19_51_35-Measurement1/Images/r01c03f02")
    with pool_of(index.select(range(18)), 4, "DNA", kind=Watched, threads=1) as pool:
        draw(pool, lambda: pool.seen[1], batch=2)
        assert pool.bad == {name(2, 1): "503 SlowDown (again and again)"}


def test_an_outage_counts_against_no_field_and_is_waited_for(server, index, monkeypatch):
    """Many more failures than an object may have, for longer than a start would wait."""
    for limit, value in (("PATIENCE", 1.0), ("TRIES", 4), ("LONGEST", 0.1)):
        monkeypatch.setattr(s3, limit, value)
    with pool_of(index, 6, "DNA", kind=Watched) as pool:
        pool.sample(2, 0)
        server.set(outage=True)
        draw(pool, lambda: pool.stats()["outage_s"] > 2, batch=2)
        server.set()
        draw(pool, lambda: pool.seen[1], batch=2)
        assert not pool.bad and pool.stats()["retries"] > 16


def test_too_many_failures_stop_the_run_with_the_commonest_reason(index, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "WINDOW", 400)                # 40 count, before that many were seen
    monkeypatch.setattr(stream, "MAX_FAILED", 0.15)
    lines = [line.replace(b"-ch5", b"-ch9") if i % 3 else line for i,
             line in enumerate(index.lines)]
    index = fields.Index(index.root, CHANNELS, lines)
    with pool_of(index, 6, "DNA", bad_fields=tmp_path / "bad.tsv") as pool, \
            pytest.raises(ValueError,
                          match=r"7 of the last \d+ .* most often: 404 NoSuchKey; .*bad.tsv lists"):
        draw(pool, lambda: False, batch=2)
    monkeypatch.setattr(stream, "MAX_FAILED", 1)
    with pool_of(index.select(range(12)), 12, "DNA") as pool, \
            pytest.raises(ValueError, match=r"only 4 of 12 fields could be had, expected 6 .*404"):
        pool.sample(2, 0)
    with pytest.raises(ValueError, match="none of 8 fields tried could be had: 404 NoSuchKey"):
        pool_of(index.select([1] * 12), 12, "DNA")


def test_a_damaged_field_is_no_more_of_the_fields_in_every_pass(index, monkeypatch):
    """Those that stay in the pool count as well."""
    monkeypatch.setattr(stream, "WINDOW", 200)
    monkeypatch.setattr(stream, "MAX_FAILED", 0.3)                           # of 20: more than 6
    lines = [line.replace(b"-ch5", b"-ch9") if i == 3 else line for i,
             line in enumerate(index.lines[:12])]
    few = fields.Index(index.root, CHANNELS, lines)
    with pool_of(few, 12, "DNA") as pool:
        draw(pool, lambda: pool.stats()["failures"] >= 12, batch=2)
        assert list(pool.bad) == [few[3].name]


def test_a_stop_is_heard_while_fields_are_waited_for(server, index):
    with pool_of(index, 6, "DNA", threads=2) as pool:
        server.set(latency=30)
        begun = time.monotonic()
        pool.stopped = lambda: time.monotonic() > begun + 0.5
        with pytest.raises(runs.Stopped):
            pool.sample(2, 0)
        assert time.monotonic() - begun < 5


def test_no_answer_at_the_start_is_an_error(server, index, monkeypatch):
    monkeypatch.setattr(s3, "PATIENCE", 0.5)
    server.set(outage=True)
    with pytest.raises(ConnectionError,
                       match=r"no answer .* tries from http://127.0.0.1:\d+, last: "):
        pool_of(index, 4, threads=2)


def test_cache_is_shared_and_a_second_run_needs_no_network(server, index, tmp_path):
    few, folder = index.select(range(9)), tmp_path / "cache"

    def fill(pool):
        draw(pool, lambda: pool.stats()["resident"] == 9, batch=3)
        return pool.stats()
    with pool_of(few, 9, "DNA", "ER", cache=folder) as pool:
        assert fill(pool)["cache_hits"] <= 1                         # the size was asked for before
    files = list(folder.glob("??/*"))
    assert len(files) == 18 and sum(p.stat().st_size
                                    for p in files) == int((folder / "bytes.lock").read_text())
    files[0].write_bytes(b"damaged")                         # a crash of the machine: fetched again
    with pool_of(few, 9, "DNA", "ER", cache=folder) as pool:
        stats = fill(pool)
        assert stats["cache_hits"] >= 17 and stats["bytes"] == len(tiff(picture(1, 1, 1)))
    server.set(outage=True)
    with pool_of(few, 9, "DNA", "ER", cache=folder) as pool:
        assert fill(pool)["bytes"] == 0


def test_help_is_quick_and_needs_no_boto3():
    """boto3 and torch run where they are used."""
    watch = ("import sys; sys.path.insert(0, sys.argv[1]); import stream; "
             "names = ('boto3', 'botocore', 'torch', 'scipy'); "
             "print([name for name in names if stream.runs.is_loaded(name)])")
    root = Path(stream.__file__).parent
    done = subprocess.run([sys.executable, "-c", watch, str(root)], capture_output=True, text=True,
                          check=True)
    assert done.stdout.strip() == "[]"
    done = subprocess.run([sys.executable, root / "stream.py", "--help"], capture_output=True,
                          text=True, check=True)
    assert "load_data" in done.stdout and "signed=false" in done.stdout
