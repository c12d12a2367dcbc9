"""stream.py, plates.py, store.py, against a real S3 server over HTTP on loopback, behind a proxy with faults."""
import collections
import gc
import gzip
import io
import json
import os
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings, strategies as st

import data
import planes
import plates
import runs
import store
import stream
from fault_proxy import FaultyS3

BATCH = "2020_11_04_CPJUMP1"
ABOVE = "cpg0000-jump-pilot/source_4/images/"
PREFIX = f"{ABOVE}{BATCH}/"
CHANNELS = stream.CHANNELS
SIDE = 24                                                     # px


def key(plate: int, field: int, channel: int) -> str:
    """As in CPJUMP1; sk, fk and fl vary."""
    site = f"r{1 + field // 9:02}c{plate % 24 + 1:02}f{1 + field % 9:02}"
    return (f"{BATCH}/images/BR{plate:08}__2020-11-05T19_51_35-Measurement1/Images/"
            f"{site}p01-ch{channel}sk{1 + field}fk1fl{1 + channel}.tiff")


def name(plate: int, field: int) -> str:
    return (f"{BATCH}/BR{plate:08}/2020-11-05T19_51_35-Measurement1/"
            f"r{1 + field // 9:02}c{plate % 24 + 1:02}f{1 + field % 9:02}")


def picture(plate: int, field: int, channel: int, side: int = SIDE) -> np.ndarray:
    return np.random.default_rng((plate, field, channel)).integers(0, 1 << 16, (side, side)).astype(np.uint16)


def tiff(pixels: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, photometric="minisblack", **options)
    return file.getvalue()


PLATES, FIELDS = (1, 2, 3, 4), range(9)
TRUTH = {name(p, f): (p, f) for p in PLATES for f in FIELDS}


@pytest.fixture(scope="module")
def s3():
    """36 fields of 8 channels on 4 plates."""
    with FaultyS3() as server:
        for p in PLATES:
            for f in FIELDS:
                for c in range(1, 9):
                    put(server, ABOVE + key(p, f, c), tiff(picture(p, f, c)))
        put(server, f"{PREFIX}illum/BR1_IllumDNA.npy", b"x")
        yield server


def put(server, name: str, body: bytes) -> None:
    server.client.put_object(Bucket="cellpainting-gallery", Key=name, Body=body, ACL="public-read")


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """No proxy of the machine, quick complaints, and nothing left over: no thread, no socket."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(store, "QUIET", 0.3)
    monkeypatch.setattr(store, "LONGEST", 0.5)
    before = sockets()
    yield
    assert not [t.name for t in threading.enumerate() if t.name.startswith(("fields", "store"))]
    if sockets() > before:                                    # a cycle may hold them yet
        gc.collect()
    assert sockets() <= before


def sockets() -> int:
    found = 0
    for number in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        try:
            found += os.readlink(f"/proc/self/fd/{number}").startswith("socket:")
        except FileNotFoundError:                             # the listing itself
            pass
    return found


@pytest.fixture
def index(s3):
    s3.set()
    return stream.make_index("s3://cellpainting-gallery/" + PREFIX, endpoint=s3.direct)[0]


class Watched(stream.FieldPool):
    """Writes down which fields arrived or failed in which pass."""

    def __init__(self, *args, **options):
        self.seen, self.returned = collections.defaultdict(list), []         # by pass; from a checkpoint
        super().__init__(*args, **options)

    def _done(self, job, reason):
        (self.seen[self._pass] if job.visit else self.returned).append((job.field.name, reason))
        super()._done(job, reason)


def check_pixels(pool, slots) -> set[str]:
    """Every drawn field is what was stored, in all channels; their names."""
    drawn = [pool.names[slot] for slot in slots]
    assert len(set(drawn)) == len(slots)
    for slot, field in zip(slots, drawn):
        expected = np.stack([picture(*TRUTH[field], CHANNELS.index(c) + 1) for c in pool.channels])
        pixels = pool.pixels[slot].numpy().view(np.uint16)
        assert np.array_equal(pixels, expected)
        np.testing.assert_allclose(pool.limits[slot], data.percentiles(expected), rtol=1e-6)
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


def command(*arguments, code=0, capsys=None) -> str:
    with pytest.raises(SystemExit) as stop:
        runs.script(stream.__doc__, stream.Options, stream.main, [str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert stop.value.code == code, err or out
    assert not code or err.count("\n") == 1
    return err if code else out


# ------------------------------------------------------------------------------------------------------ index

def test_index_of_a_bucket_a_folder_and_load_data_are_one(s3, index, tmp_path, capsys):
    """The same fields, names and files, wherever they are listed; root= moves them."""
    assert len(index) == 36 and index.channels == CHANNELS and index.root.endswith(PREFIX)
    assert [index[i].name for i in range(36)] == sorted(TRUTH)
    assert index[10].files["DNA"] == key(2, 1, 5).removeprefix(f"{BATCH}/")
    assert index[10].bytes == 8 * len(tiff(picture(1, 1, 1)))
    assert (index[10].row, index[10].column, index[10].field) == (1, 3, 2)

    for p in PLATES:
        for f in FIELDS:
            for c in range(1, 9):
                path = tmp_path / "disk" / key(p, f, c)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(tiff(picture(p, f, c)))
    out = tmp_path / "disk.tsv.gz"
    said = command("index", tmp_path / "disk" / BATCH, f"out={out}", capsys=capsys)
    assert "36 fields of 4 plates, 8 channels, from 288 files" in said
    local = stream.Index.load(out)
    assert local.lines == index.lines and local.digest == index.digest and local.root == f"{tmp_path}/disk/{BATCH}/"
    assert stream.Index.load(out, root=index.root).root == index.root
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["disk.tsv.gz"]        # no journal, no half file

    heads = "".join(f",FileName_Orig{c},PathName_Orig{c}" for c in CHANNELS)
    for p in PLATES:
        lines = ["Metadata_Plate,Metadata_Well,Metadata_Site" + heads]
        for f in FIELDS:
            paths = [Path("/home/ubuntu/projects") / key(p, f, c) for c in range(1, 9)]
            lines.append(f"BR{p:08},A{p % 24 + 1:02},{f + 1}" + "".join(f",{x.name},{x.parent}" for x in paths))
        table = f"workspace/load_data_csv/{BATCH}/BR{p:08}/load_data.csv"
        put(s3, table, "\n".join(lines).encode())
        put(s3, table.replace(".csv", "_with_illum.csv"), b"not this one")
    said = command("index", "s3://cellpainting-gallery/workspace/load_data_csv", f"out={out}", "from_=load_data",
                   f"root={tmp_path}/disk/{BATCH}/images", f"endpoint={s3.direct}", capsys=capsys)
    tables = stream.Index.load(out)
    assert [f.files for f in map(tables.__getitem__, range(36))] == [
        {c: n.removeprefix("images/") for c, n in index[i].files.items()} for i in range(36)]
    assert [(f.batch, f.plate, f.row, f.column, f.field) for f in map(tables.__getitem__, range(36))] == [
        tuple(index[i][k] for k in (1, 2, 3, 4, 5)) for i in range(36)]
    with stream.FieldPool(tables, 36, CHANNELS, "cpu", threads=2) as pool:               # and it reads them there
        for slot in pool.sample(36, 0):
            batch, plate, site = pool.names[slot].split("/")
            p, f = int(plate[2:]), int(site[7:]) - 1
            assert np.array_equal(pool.pixels[slot, 4].numpy().view(np.uint16), picture(p, f, 5))


def test_urls_and_other_names_of_load_data(tmp_path):
    """cpg0016: names of another microscope, https and s3 addresses, wells past Z, no batch but the folder's."""
    table = tmp_path / "Batch1" / "P1" / "load_data.csv.gz"
    table.parent.mkdir(parents=True)
    table.write_bytes(gzip.compress(
        b"Metadata_Plate,Metadata_Well,Metadata_Site,URL_OrigDNA,URL_OrigBrightfield_H\n"
        b"P1,AB03,2,https://cellpainting-gallery.s3.amazonaws.com/cpg0016/x/A 1.tif,"
        b"s3://cellpainting-gallery/cpg0016/x/B 1.tif\n"
        b"P1,A01,1,s3://cellpainting-gallery/cpg0016/y/z/A.tif,\n"))
    index, counts = stream.make_index(str(tmp_path), "load_data", incomplete="keep")
    assert index.root == "s3://cellpainting-gallery/cpg0016/" and index.channels == ("DNA", "Brightfield_H")
    assert counts["incomplete"] == counts["without Brightfield_H"] == 1
    assert index[0] == plates.Field("Batch1/P1/r01c01f01", "Batch1", "P1", 1, 1, 1, 0, {"DNA": "y/z/A.tif"})
    assert index[1].row == 28 and index[1].files == {"DNA": "x/A 1.tif", "Brightfield_H": "x/B 1.tif"}
    assert len(stream.make_index(str(table), "load_data")[0]) == 1


def test_plates_are_told_apart_and_incomplete_fields_counted(tmp_path, capsys):
    """The same well and field on two plates are two fields; so are two measurements of a plate. Odd names are others."""
    for folder in ("b/images/P1__t-Measurement1/Images", "b/images/P1__t-Measurement2/Images",
                   "b/images/P2__t-Measurement1/Images", "c/images/P1__t-Measurement1/Images"):
        (tmp_path / "src" / folder).mkdir(parents=True)
        for c in (1, 5):
            (tmp_path / "src" / folder / f"r01c01f01p01-ch{c}sk1fk1fl1.tiff").write_bytes(b"1234")
    folder = tmp_path / "src/b/images/P1__t-Measurement1/Images"
    for odd in ("r01c02f01p01-ch1sk1fk1fl1.tiff", "r01c01f01p02-ch1sk1fk1fl1.tiff", "Index.xml",
                "r01c01f01p01-ch1\tsk1.tiff"):
        (folder / odd).write_bytes(b"12345")
    out = tmp_path / "x.tsv.gz"
    said = command("index", tmp_path / "src", f"out={out}", capsys=capsys)
    assert "4 fields of 2 plates, 2 channels, from 12 files" in said
    assert "1 incomplete fields left out (missing DNA 1), 2 other files, 1 further planes" in said
    assert [stream.Index.load(out)[i].name for i in range(4)] == [
        "b/P1/t-Measurement1/r01c01f01", "b/P1/t-Measurement2/r01c01f01", "b/P2/t-Measurement1/r01c01f01",
        "c/P1/t-Measurement1/r01c01f01"]
    said = command("index", tmp_path / "src", f"out={out}", "incomplete=keep", capsys=capsys)
    assert "5 fields" in said and list(stream.Index.load(out)[1].files) == ["Mito"]
    assert "5 fields" in command("index", tmp_path / "src", f"out={out}", "channels=Mito", capsys=capsys)
    said = command("stats", out, capsys=capsys)
    assert "2 plates, 5 fields, 1 channels (Mito), 21 bytes" in said and "b\tP2\t1 fields" in said


def test_a_listing_goes_on_where_it_was_stopped(s3, tmp_path, monkeypatch):
    """What the journal holds is not asked again, a line that was cut is; the table is the same in the end."""
    s3.set()
    asked = []
    pages = store.Bucket.pages

    def watched(self, folder):
        asked.append(folder)
        if broken and "BR00000003" in folder and folder.endswith("Images/"):
            raise OSError("network gone")
        return pages(self, folder)
    monkeypatch.setattr(store.Bucket, "pages", watched)
    options = dict(journal=tmp_path / "journal", connections=1, endpoint=s3.direct)
    broken = True
    with pytest.raises(OSError, match="network gone"):
        stream.make_index("s3://cellpainting-gallery/" + PREFIX, **options)
    journal = (tmp_path / "journal").read_text()
    finished = {json.loads(line)["place"] for line in journal.splitlines()[1:]}
    assert finished >= {"", "images/", "illum/"}
    asked[:], broken = [], False
    (tmp_path / "journal").write_text(journal + '{"place": "images/BR0000')
    index, counts = stream.make_index("s3://cellpainting-gallery/" + PREFIX, **options)
    assert asked and not finished & set(asked) and counts["keys"] == 289 and counts["other"] == 1
    monkeypatch.undo()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert index.lines == stream.make_index("s3://cellpainting-gallery/" + PREFIX, endpoint=s3.url)[0].lines
    with pytest.raises(ValueError, match="begun for .*remove it"):
        stream.make_index(str(tmp_path), journal=tmp_path / "journal")


def test_listing_of_several_pages(s3, tmp_path, monkeypatch):
    """1,000 names come at once; here 7."""
    s3.set(errors=0.1, resets=0.05, truncated=0.05)
    monkeypatch.setattr(plates, "open_store", small_pages(plates.open_store))
    index, _ = stream.make_index("s3://cellpainting-gallery/" + PREFIX, endpoint=s3.url)
    assert [index[i].name for i in range(len(index))] == sorted(TRUTH)


def small_pages(open_store):
    def opened(*args, **options):
        found = open_store(*args, **options)
        list_objects = found.client.list_objects_v2
        found.client.list_objects_v2 = lambda **how: list_objects(MaxKeys=7, **how)
        return found
    return opened


def test_index_of_378000_fields_is_small_and_quick(tmp_path):
    """8 keys each: under 60 MB on disk, loads in under 5 s, under 500 MB of memory for the whole process."""
    columns = [f"p01-ch{c}sk{c}fk1fl" for c in range(1, 9)]
    folder, rng, one = "images/PLATE__2020-11-05T19_51_35-Measurement1/Images/", np.random.default_rng(0), []
    for site, size in enumerate(rng.integers(19_000_000, 21_000_000, 3437).tolist()):
        r, c, f = site // 216 + 1, site // 9 % 24 + 1, site % 9 + 1
        files = "\t".join(f"r{r:02}c{c:02}f{f:02}{x}{site % 7}.tiff" for x in columns)
        one.append(f"{BATCH}\tPLATE\t2020-11-05T19_51_35-Measurement1\t{r}\t{c}\t{f}\t{size}\t{folder}\t{files}"
                   .encode())
    lines = [line.replace(b"PLATE", b"BR%08d" % plate) for plate in range(110) for line in one]
    path = tmp_path / "big.tsv.gz"
    stream.Index("s3://cellpainting-gallery/" + PREFIX, CHANNELS, lines).save(path)
    assert len(lines) == 378_070 and path.stat().st_size < 60e6
    watch = ("import sys, time; sys.path.insert(0, sys.argv[1]); import plates; t = time.process_time(); "
             "index = plates.Index.load(sys.argv[2]); t = time.process_time() - t; index.plates; index[378069].files; "
             "print(len(index), t, next(int(line.split()[1]) / 1024 for line in open('/proc/self/status') if 'VmHWM' in line))")
    root = str(Path(stream.__file__).parent)
    done = subprocess.run([sys.executable, "-c", watch, root, str(path)], capture_output=True, text=True, check=True)
    n, seconds, mib = map(float, done.stdout.split())
    assert n == 378_070 and seconds < 5 and mib < 480


def test_hold_out_whole_plates():
    """A plate is on one side with all its measurements and batches; the share is kept; seeds differ."""
    lines = [f"b{p % 2}\tP{p % 10}\tm{p}\t1\t1\t{f}\t0\tx/\tf{f}".encode() for p in range(20) for f in range(30)]
    index = stream.Index("/x", ["DNA"], lines)
    chosen = set()
    for seed in range(5):
        train, held = stream.hold_out(index, 0.2, seed)
        assert set(train.plates) & set(held.plates) == set() and len(set(held.plates)) == 2
        assert sorted(train.lines + held.lines) == sorted(lines) and len(held) == 120
        chosen.add(tuple(sorted(set(held.plates))))
    assert len(chosen) > 1
    train, held = stream.hold_out(index, ["P3"])
    assert set(held.plates) == {"P3"} and len(held) == 60
    assert len(set(stream.hold_out(index, 1e-6)[1].plates)) == 1             # at least one
    for wrong, message in ((["P33"], "did you mean 'P3'"), (0.0, "share above 0"), ([], "one or more"), (1.5, "share")):
        with pytest.raises(ValueError, match=message):
            stream.hold_out(index, wrong)
    with pytest.raises(ValueError, match="two plates"):
        stream.hold_out(held, 0.5)


# ----------------------------------------------------------------------------------------------- resident pool

def arrays(n=12):
    return [(f"f{i}", np.stack([picture(9, i, c) for c in (1, 5)])) for i in range(n)]


def test_resident_two_ranks_equal_one():
    """The batch of all ranks is the same, its parts disjoint, and nothing but seed and step decides."""
    one = stream.FieldPool.resident(arrays(), ("Mito", "DNA"), "cpu", seed=3)
    two = [stream.FieldPool.resident(iter(arrays()), ("Mito", "DNA"), "cpu", rank=r, world=2, seed=3) for r in (0, 1)]
    for step in (7, 0, 3):
        parts = [pool.sample(4, step) for pool in two]
        assert torch.equal(torch.cat(parts), one.sample(8, step)) and torch.cat(parts).unique().numel() == 8
        assert parts[0].dtype == torch.int64
    assert not torch.equal(one.sample(8, 0), one.sample(8, 1))
    counts = torch.zeros(12)
    for step in range(600):
        counts[one.sample(4, step)] += 1
    assert (counts / 200 - 1).abs().max() < 0.3                              # each as often, within 5 sigma
    for i, (field, pixels) in enumerate(arrays()):
        assert one.names[i] == field and np.array_equal(one.pixels[i].numpy().view(np.uint16), pixels)
    np.testing.assert_allclose(one.limits, [data.percentiles(p) for _, p in arrays()], rtol=1e-6)
    one.restore(one.state())
    assert one.stats() == {}
    with pytest.raises(ValueError, match="batch=7 on 2 processes: 14 fields of 12"):
        two[0].sample(7, 0)
    with pytest.raises(ValueError, match="f1: .*expected .*uint16"):
        stream.FieldPool.resident([arrays()[0], ("f1", arrays()[1][1][:, 1:])], ("Mito", "DNA"), "cpu")
    with pytest.raises(ValueError, match="no fields"):
        stream.FieldPool.resident([], ("DNA",), "cpu")


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**16 - 1), st.integers(0, 99))
def test_limits_are_the_percentiles_of_data_py(h, w, top, seed):
    pixels = np.random.default_rng(seed).integers(0, top + 1, (2, h, w)).astype(np.uint16)
    pixels[1] = 0
    pixels[1, 0, 0] = top
    np.testing.assert_allclose(planes.limits_of(pixels), data.percentiles(pixels), rtol=2e-7)


def test_limits_of_a_large_field_are_close():
    pixels = np.random.default_rng(0).gamma(2, 900, (1, 1080, 1080)).clip(0, 65535).astype(np.uint16)
    low, high = planes.limits_of(pixels)[0]
    assert abs((pixels <= low).mean() - 0.01) < 0.0015 and abs((pixels <= high).mean() - 0.998) < 0.0007


# ---------------------------------------------------------------------------------------------- streaming pool

def test_faults_kill_and_resume_every_good_field_exactly_once(s3, index, tmp_path):
    """Latency, 503s, cut bodies, resets, a drip and bad files; killed, resumed, and S3 goes away meanwhile."""
    field = {n: next(i for i in range(36) if index[i].name == name(*n)) for n in TRUTH.values()}
    lines = list(index.lines)
    lines[field[1, 2]] = lines[field[1, 2]].replace(b"ch3sk", b"ch3xx")                # 404
    lines[field[2, 2]] = lines[field[2, 2]].rsplit(b"\t", 1)[0] + b"\t"                # no file of the last channel
    odd = {(3, 2): tiff(picture(3, 2, 4))[:-300], (3, 3): b"<html>", (4, 2): tiff(picture(4, 2, 4, side=16)),
           (4, 3): tiff(picture(4, 3, 4).astype(np.uint8)), (4, 4): b"",
           (4, 5): tiff(np.zeros((3, SIDE, SIDE), np.uint16))}
    reasons = {(1, 2): "404", (2, 2): "no file of channel Brightfield", (3, 2): "truncated|damaged",
               (3, 3): "damaged or no TIFF", (4, 2): "wrong size, 16 x 16 px", (4, 3): "uint8", (4, 4): "empty",
               (4, 5): "3 page"}
    good = set(TRUTH) - {name(*n) for n in reasons}
    said = []
    options = dict(threads=16, endpoint=s3.url, root=index.root, time_limit=0.8, max_failed=0.5, notice=said.append,
                   bad_fields=tmp_path / "bad_fields.tsv", least=2, seed=5)
    bad = stream.Index(index.root, index.channels, lines)
    try:
        for n, body in odd.items():
            put(s3, ABOVE + key(*n, 4), body)
        s3.set(latency=0.2, errors=0.1, truncated=0.05, resets=0.05, drips=0.02)
        with Watched(bad, 10, CHANNELS, "cpu", **options) as pool:
            draw(pool, lambda: len(pool.seen[0]) >= 12)
            torch.save(pool.state(), tmp_path / "checkpoint.pt")
            draw(pool, lambda: len(pool.seen[0]) >= 16)                       # lost with the kill
            assert pool.stats()["retries"] > 5
        state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        before = {bad[i].name for i in np.flatnonzero(np.unpackbits(state["consumed"].numpy(), count=36))}
        resident = {bad[i].name for i in state["rows"].tolist()}
        with Watched(bad, 10, CHANNELS, "cpu", **options) as pool:
            pool.restore(state)
            drawn = draw(pool, lambda: len(before) + len(pool.seen[0]) >= 26)
            s3.set(outage=True)                                              # the loop goes on
            meanwhile = draw(pool, lambda: pool.stats()["outage_s"] > 1)
            assert len(meanwhile) >= 8
            s3.set(latency=0.02)
            drawn |= meanwhile | draw(pool, lambda: pool.seen[1])
            stats = pool.stats()
            after = [n for n, _ in pool.seen[0]]
        assert len(set(after)) == len(after) and not set(after) & before      # exactly once, along the checkpoints
        assert set(after) | before == set(TRUTH)
        assert {n for n, _ in pool.returned} == resident and resident <= before
        arrived = {n for n, reason in pool.seen[0] if not reason}
        assert arrived | before >= good and arrived <= drawn | {n for n in pool.names if n}   # none left unused
        assert stats["outage_s"] == 0 and stats["bytes"] > 1e5
        assert stats["cost"] == pytest.approx(stats["bytes"] / 1e9 * 0.09)
        assert [text for text in said if "has not answered" in text and "fields that are here" in text]
        assert [text for text in said if "answers again" in text]
        table = [line.split("\t") for line in (tmp_path / "bad_fields.tsv").read_text().splitlines()]
        assert table[0] == ["name", "file", "reason"] and {row[0] for row in table[1:]} == {name(*n) for n in reasons}
        for n, reason in reasons.items():
            found = [row for row in table if row[0] == name(*n)]
            assert any(word in found[0][2] for word in reason.split("|")), found
        assert [row[1] for row in table if row[0] == name(4, 3)][0] == key(4, 3, 4).removeprefix(f"{BATCH}/")
    finally:
        s3.set()
        for n in odd:
            put(s3, ABOVE + key(*n, 4), tiff(picture(*n, 4)))


def test_shards_are_disjoint_and_ranks_may_change(s3, index, tmp_path):
    """Three ranks visit all fields of a pass once; two that take over from them finish it, once each."""
    s3.set()
    options = dict(threads=4, endpoint=s3.direct, seed=1)
    states, seen = [], []
    for rank in range(3):
        with Watched(index, 4, ("DNA", "ER"), "cpu", rank=rank, world=3, **options) as pool:
            draw(pool, lambda: len(pool.seen[0]) >= (4, 6, 8)[rank], batch=2)
            states.append(pool.state())
            seen += [index[int(i)].name for i in np.flatnonzero(np.unpackbits(states[-1]["consumed"].numpy(), count=36))]
    states = torch.load(saved(states, tmp_path), weights_only=True)
    rest = []
    for rank in range(2):
        with Watched(index, 4, ("DNA", "ER"), "cpu", rank=rank, world=2, **options) as pool:
            pool.restore(states)
            draw(pool, lambda: pool.seen[1], batch=2)
            rest += [n for n, _ in pool.seen[0]]
    assert len(seen) == len(set(seen)) >= 18 and sorted(seen + rest) == sorted(TRUTH)
    with stream.FieldPool(index, 4, ("DNA",), "cpu", rank=1, world=2, **options) as pool:
        with pytest.raises(ValueError, match="states of all ranks"):
            pool.restore(states[0])
        with pytest.raises(ValueError, match="another index or seed"):
            pool.restore({**states[0], "seed": 2})
        pool.sample(1, 0)
        with pytest.raises(ValueError, match="before the first"):
            pool.restore(states)


def saved(states, folder):
    torch.save(states, folder / "states.pt")
    return folder / "states.pt"


def test_every_pass_is_another_order_and_all_resident_needs_no_network(s3, index):
    """A pool that holds its whole shard downloads it once, and passes go on."""
    s3.set()
    few = index.select(range(9))
    with Watched(few, 100, ("DNA",), "cpu", threads=4, endpoint=s3.direct) as pool:
        assert len(pool.names) == 9
        drawn = draw(pool, lambda: pool.stats()["passes"] > 3, batch=3)
        assert drawn == {few[i].name for i in range(9)} and pool.stats()["bytes"] < 12 * len(tiff(picture(1, 1, 1)))
    with Watched(few, 4, ("DNA",), "cpu", threads=4, endpoint=s3.direct, min_fill=2) as pool:
        draw(pool, lambda: pool.seen[3], batch=2)
    assert sorted(n for n, _ in pool.seen[0]) == [few[i].name for i in range(9)]
    for number in (1, 2):                                                    # what was still there was not fetched again
        visited = [n for n, _ in pool.seen[number]]
        assert 5 <= len(visited) <= 9 and len(set(visited)) == len(visited)
    assert sorted(pool._order_of(0)) == sorted(pool._order_of(1)) != pool._order_of(1) != pool._order_of(0)


def test_the_batch_stays_and_sample_never_waits(s3, index):
    """Pixels of a batch do not change before the next one, while all else is replaced; draws take no time."""
    s3.set()
    with stream.FieldPool(index, 8, ("DNA", "AGP"), "cpu", threads=8, endpoint=s3.direct, min_fill=6) as pool:
        pool.sample(3, 0)
        taken = []
        for step in range(40):
            slots = pool.sample(3, step)
            pixels, names = pool.pixels[slots].clone(), [pool.names[s] for s in slots]
            time.sleep(0.02)
            assert torch.equal(pool.pixels[slots], pixels) and [pool.names[s] for s in slots] == names
            assert sum(n is not None for n in pool.names) >= 6
            begun = time.perf_counter()
            pool.sample(3, step)
            taken.append(time.perf_counter() - begun)
        assert np.median(taken) < 0.01
        assert pool.stats()["fields_per_s"] > 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(s3, index):
    """The same fields, and a batch that queued work still reads is not overwritten."""
    s3.set()
    with stream.FieldPool(index, 8, ("DNA", "AGP"), "cuda", threads=8, endpoint=s3.direct, min_fill=6) as pool:
        for step in range(60):
            slots = pool.sample(3, step)
            names = [pool.names[slot] for slot in slots.tolist()]
            torch.cuda._sleep(20_000_000)                                    # the GPU lags behind
            pixels, limits = pool.pixels[slots], pool.limits[slots]
            for field, found, pair in zip(names, pixels.cpu().numpy().view(np.uint16), limits.cpu()):
                expected = np.stack([picture(*TRUTH[field], CHANNELS.index(c) + 1) for c in pool.channels])
                assert np.array_equal(found, expected)
                np.testing.assert_allclose(pair, data.percentiles(expected), rtol=1e-6)


def test_the_network_waits_for_slow_training(s3, index):
    """With nobody drawing, downloads stop: no field goes unused."""
    s3.set()
    with stream.FieldPool(index, 6, ("DNA",), "cpu", threads=4, endpoint=s3.direct, least=3) as pool:
        pool.sample(1, 0)
        had, end = -1, time.monotonic() + 20
        while had < pool.stats()["bytes"] and time.monotonic() < end:        # until nothing more comes
            had = pool.stats()["bytes"]
            time.sleep(0.5)
        first = list(pool.names)
        pool.stats()
        time.sleep(0.5)
        assert pool.names == first and len(first) - first.count(None) == 6 and pool.stats()["bytes"] == had
        assert pool.stats()["fields_per_s"] == pool.stats()["mb_per_s"] == 0


def test_memory_stays_bounded(s3, index):
    """While 75 MB come, each thread holds its file and what its limits are counted in, and no more piles up."""
    s3.set()
    big = tiff(picture(1, 1, 1, side=400))
    keys = [f"big/{i}.tiff" for i in range(8)]
    for k in keys:
        put(s3, k, big)
    files = "\t".join(k[4:] for k in keys)
    lines = [f"b\tP{p}\tm\t1\t1\t{f}\t0\tbig/\t{files}".encode() for p in (1, 2) for f in range(18)]
    many = stream.Index("s3://cellpainting-gallery/", CHANNELS, lines)
    with stream.FieldPool(many, 6, CHANNELS, "cpu", threads=8, endpoint=s3.direct, min_fill=3) as pool:
        pool.sample(2, 0)
        tracemalloc.start()
        step, end = 0, time.monotonic() + 30
        while pool.stats()["bytes"] < 30 * 8 * len(big) and time.monotonic() < end:
            pool.sample(2, step := step + 1)
            time.sleep(0.005)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        fetched = pool.stats()["bytes"]
    assert fetched >= 30 * 8 * len(big) and peak < 8 * (2 * len(big) + 1.6e6) < 0.3 * fetched


def test_no_network_at_the_start(s3, index, tmp_path):
    """An error of one line that says what was tried; also when size= leaves the first question to the threads."""
    s3.set(outage=True)
    begun = time.monotonic()
    options = dict(threads=2, endpoint=s3.url, patience=1)
    with pytest.raises(ConnectionError, match=r"no answer .* tries from http://127.0.0.1:\d+ \(unsigned\), last: "):
        stream.FieldPool(index, 4, CHANNELS, "cpu", **options)
    with stream.FieldPool(index, 4, CHANNELS, "cpu", size=(SIDE, SIDE), **options) as pool:
        with pytest.raises(ConnectionError, match="no answer"):
            pool.sample(1, 0)
    assert time.monotonic() - begun < 10
    assert 30 <= stream.FieldPool.__init__.__kwdefaults__["patience"] <= 50      # seconds: within a minute
    with pytest.raises(ConnectionError, match="no answer"):
        stream.make_index("s3://cellpainting-gallery/" + PREFIX, endpoint="http://127.0.0.1:9", patience=0.5)
    s3.set()
    with pytest.raises(OSError, match="no-such-bucket/: cannot be listed, 404 NoSuchBucket"):
        stream.make_index("s3://no-such-bucket", endpoint=s3.direct)


def test_a_broken_object_is_no_outage(s3, index, monkeypatch):
    """503 for ever on one file, with all threads at it: given up, since the server gives what it gave before."""
    monkeypatch.setattr(store, "TRIES", 4)
    s3.set(broken="BR00000002__2020-11-05T19_51_35-Measurement1/Images/r01c03f02")
    options = dict(threads=1, endpoint=s3.url, min_fill=2, max_failed=0.5)
    with Watched(index.select(range(18)), 4, ("DNA",), "cpu", **options) as pool:
        draw(pool, lambda: pool.seen[1], batch=2)
        assert pool.bad == {name(2, 1): "503 SlowDown (again and again)"}
    s3.set()


def test_a_drip_is_cut_off_and_stop_ends_it_at_once(s3, index):
    """A byte every 50 ms keeps a socket's own time limit from ever coming: 70 s for one file."""
    s3.set(drips=1.0)
    bucket, answer = store.open_store(index.root, endpoint=s3.url, time_limit=0.3, notice=lambda text: None), []

    def read():
        try:
            answer.append(bucket.read(index[0].files["DNA"]))
        except store.Stopped:
            answer.append(None)
    for end in (s3.set, bucket.stop):                                        # the network is well again; or we go
        s3.set(drips=1.0)
        reader = threading.Thread(target=read)
        reader.start()
        time.sleep(1)
        assert reader.is_alive() and bucket.counts["retries"] >= 1
        end()
        reader.join(10)
        assert not reader.is_alive()
    bucket.close()
    assert answer == [tiff(picture(1, 0, 5)), None]
    s3.set()


def test_too_many_failures_stop_the_run_with_the_commonest_reason(s3, index, tmp_path):
    s3.set()
    lines = [line.replace(b"-ch5", b"-ch9") if i % 3 else line for i, line in enumerate(index.lines)]
    index, options = stream.Index(index.root, CHANNELS, lines), dict(threads=4, endpoint=s3.direct)
    with stream.FieldPool(index, 6, ("DNA",), "cpu", min_fill=3, max_failed=0.15,
                          bad_fields=tmp_path / "bad.tsv", **options) as pool:
        with pytest.raises(ValueError, match=r"16 of the last \d+ .* most often: 404 NoSuchKey; .*bad.tsv lists"):
            draw(pool, lambda: False, batch=2)
    with stream.FieldPool(index.select(range(12)), 12, ("DNA",), "cpu", min_fill=8, size=(SIDE, SIDE), max_failed=1,
                          **options) as pool:
        with pytest.raises(ValueError, match=r"only 4 of 12 fields could be had, expected 8 .*404"):
            pool.sample(2, 0)


def test_a_stop_is_heard_while_fields_are_waited_for(s3, index):
    s3.set(latency=30)
    with stream.FieldPool(index, 6, ("DNA",), "cpu", threads=2, endpoint=s3.url, min_fill=3, size=(SIDE, SIDE)) as pool:
        begun = time.monotonic()
        pool.stopped = lambda: time.monotonic() > begun + 1
        with pytest.raises(stream.Stopped):
            pool.sample(2, 0)
        assert time.monotonic() - begun < 6
    s3.set()


def test_a_damaged_field_is_no_more_of_the_fields_in_every_pass(s3, index):
    """Those that stay in the pool count as well."""
    s3.set()
    lines = [line.replace(b"-ch5", b"-ch9") if i == 3 else line for i, line in enumerate(index.lines[:12])]
    few = stream.Index(index.root, CHANNELS, lines)
    with stream.FieldPool(few, 12, ("DNA",), "cpu", threads=4, endpoint=s3.direct, min_fill=8, size=(SIDE, SIDE), max_failed=0.3) as pool:
        draw(pool, lambda: pool.stats()["failures"] >= 45, batch=2)
        assert list(pool.bad) == [few[3].name]


# ------------------------------------------------------------------------------------------------------ cache

def test_cache_is_shared_and_a_second_run_needs_no_network(s3, index, tmp_path):
    s3.set()
    options = dict(threads=4, cache=tmp_path / "cache", endpoint=s3.url, min_fill=9)
    few = index.select(range(9))
    with stream.FieldPool(few, 9, ("DNA", "ER"), "cpu", size=(SIDE, SIDE), **options) as pool:
        draw(pool, lambda: pool.stats()["resident"] == 9, batch=3)
        assert pool.stats()["cache_hits"] == 0
    files = list((tmp_path / "cache").glob("??/*"))
    counted = int((tmp_path / "cache" / "bytes.lock").read_text())
    assert len(files) == 18 and sum(p.stat().st_size for p in files) == counted
    files[0].write_bytes(b"damaged")                                         # a crash of the machine: fetched again
    with stream.FieldPool(few, 9, ("DNA", "ER"), "cpu", size=(SIDE, SIDE), **options) as pool:
        draw(pool, lambda: pool.stats()["resident"] == 9, batch=3)
        assert pool.stats()["cache_hits"] in (17, 18) and pool.stats()["bytes"] == 2 * len(tiff(picture(1, 1, 1)))
    s3.set(outage=True)
    with stream.FieldPool(few, 9, ("DNA", "ER"), "cpu", size=(SIDE, SIDE), **options) as pool:
        draw(pool, lambda: pool.stats()["resident"] == 9, batch=3)
        assert pool.stats()["bytes"] == 0
    s3.set()


def test_cache_stays_within_its_limit_least_recently_used_out_first(tmp_path):
    cache = store.Cache(tmp_path / "c", 1000)
    for i in range(9):
        cache.put(f"k{i}", bytes([i]) * 100)
        os.utime(cache.path(f"k{i}"), ns=(i, i))
    assert cache.get("k0") == bytes(100)                                     # used now
    cache.put("k9", b"9" * 100)
    cache.put("k10", b"a" * 100)                                             # the eleventh hundred: room for it
    assert cache.get("k0") and cache.get("k10") and cache.get("k9") and cache.get("k1") is None
    assert sum(p.stat().st_size for p in (tmp_path / "c").glob("??/*")) <= 1000
    cache.put("huge", b"x" * 1001)
    assert cache.get("huge") is None and cache.get("k0")


@pytest.mark.parametrize("address", ["../../etc/passwd", "/etc/passwd", "a\0b", "x" * 5000, "é\udc80\n\t", "CON", ".."])
def test_hostile_keys_have_safe_file_names(tmp_path, address):
    cache = store.Cache(tmp_path / "c", 1e6)
    cache.put(address, b"body")
    assert cache.get(address) == b"body"
    assert cache.path(address).parent.parent == tmp_path / "c" and cache.path(address).name.isalnum()
    if address.startswith((".", "/")) or "\0" in address:                    # nor is anything read from outside
        (tmp_path / "passwd").write_text("secret")
        with pytest.raises(store.Absent, match="out of the folder"):
            store.Folder(str(tmp_path / "c")).read(address)


def test_cache_of_several_processes(tmp_path):
    """Six write and read at once: bodies are whole, the limit holds, the count is right."""
    work = ("import sys; sys.path.insert(0, sys.argv[1]); import store\n"
            "cache = store.Cache(sys.argv[2], 20_000)\n"
            "for i in range(150):\n"
            "    k = i * int(sys.argv[3]) % 97\n"
            "    body = cache.get(str(k))\n"
            "    assert body is None or body == bytes([k]) * 500, (k, len(body))\n"
            "    cache.put(str(k), bytes([k]) * 500)\n")
    root = str(Path(store.__file__).parent)
    running = [subprocess.Popen([sys.executable, "-c", work, root, str(tmp_path / "c"), str(n)])
               for n in (1, 3, 5, 7, 11, 13)]
    assert [process.wait() for process in running] == [0] * 6
    files = [p for p in (tmp_path / "c").glob("??/*")]
    total = sum(p.stat().st_size for p in files)
    assert 10_000 < total <= 20_000 and not [p for p in files if p.name.endswith(".part")]
    assert int((tmp_path / "c" / "bytes.lock").read_text()) == total


# ------------------------------------------------------------------------------------------------------ errors

def test_wrong_inputs(tmp_path, index, capsys):
    for arguments, message in (
            ((), "expected index SOURCE"), (("stats", tmp_path / "none.gz"), "no such index"),
            (("index", tmp_path, "out=x.tsv"), "expected a file .tsv.gz"),
            (("index", tmp_path / "none", f"out={tmp_path}/x.tsv.gz"), "no such folder"),
            (("index", tmp_path, f"out={tmp_path}/x.tsv.gz"), "no TIFF named as"),
            (("index", tmp_path, f"out={tmp_path}/x.tsv.gz", "from_=load_data"), "no load_data.csv"),
            (("index", "http://x/y", f"out={tmp_path}/x.tsv.gz"), "no such folder|expected s3://"),
            (("index", tmp_path, f"out={tmp_path}/x.tsv.gz", "incomplete=maybe"), "drop or keep")):
        assert any(part in command(*arguments, code=1, capsys=capsys) for part in message.split("|"))
    assert not list(tmp_path.iterdir())
    text = "\t".join((*plates.COLUMNS, "DNA")).join(("#root\t/x\n", "\nb\tp\tm\t1\t1\t1\t0\tf/\tx.tiff\n")).encode()
    good, odd = gzip.compress(text), gzip.compress(text.replace(b"\t1\t1\t1", b"\t1\t1\tA"))
    for body, message in ((b"plain", "damaged or no gzip"), (good[:-9], "damaged"),
                          (gzip.compress(b"a\tb\n"), "no index"), (odd, "line 3")):
        (tmp_path / "x.gz").write_bytes(body)
        with pytest.raises(ValueError, match=message):
            stream.Index.load(tmp_path / "x.gz")
    (tmp_path / "x.gz").write_bytes(good)
    assert stream.Index.load(tmp_path / "x.gz")[0].files == {"DNA": "f/x.tiff"}
    for options, message in ((dict(channels=("DNAA",)), "did you mean 'DNA'"), (dict(channels=("DNA", "dna")), "each once"),
                             (dict(rank=2, world=2), "rank < world"), (dict(fields=0), "1 or more"), (dict(seed=-1), "seed"),
                             (dict(min_fill=9), "expected 0 to 8"), (dict(root="ftp://x"), "expected s3://"),
                             (dict(world=100, rank=50), "0 that rank")):
        given = {"fields": 8, "channels": ("DNA",), "device": "cpu", "size": (8, 8), **options}
        with pytest.raises(ValueError, match=message):
            stream.FieldPool(index, **given)


def test_help_is_quick_and_needs_no_boto3():
    """boto3 and torch are imported where they are used."""
    watch = ("import sys; sys.path.insert(0, sys.argv[1]); import stream; "
             "print(sorted({'boto3', 'botocore', 'torch', 'scipy'} & set(sys.modules)))")
    root = Path(stream.__file__).parent
    done = subprocess.run([sys.executable, "-c", watch, str(root)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    done = subprocess.run([sys.executable, root / "stream.py", "--help"], capture_output=True, text=True, check=True)
    assert "from=load_data" in done.stdout and "endpoint=null" in done.stdout
