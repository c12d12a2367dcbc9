"""s3.py: stores, the cache, and infer.py on S3 (a server on loopback with faults) and in shards."""
import contextlib
import csv
import functools
import io
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tifffile
from jump_fields import ABOVE, ADDRESS, BATCH, key, picture, tiff

import data
import fields
import images
import infer
import runs
import s3
import synthetic

Config = functools.partial(infer.Config, weights="demo_synthetic")

NAMES = ["p1/a.tif", "p1/b.tif", "p10/c.tif", "p1/deep/d.tif"]


# ------------------------------------------------------------------------------------------ stores

def test_a_drip_is_cut_off_and_stop_ends_it_at_once(server, monkeypatch):
    """A byte every 50 ms keeps a socket's own time limit from ever coming: 70 s for one file."""
    monkeypatch.setattr(s3, "TIME_LIMIT", 0.3)
    bucket, answer, name = s3.open_store(ADDRESS), [], key(1, 0, 5).removeprefix(f"{BATCH}/")

    def read():
        try:
            answer.append(bucket.read(name))
        except s3.Closed:
            answer.append(None)
    for end in (server.set, bucket.stop):                      # the network is well again; or we go
        server.set(drips=1.0)
        reader = threading.Thread(target=read)
        reader.start()
        time.sleep(1)
        assert reader.is_alive() and bucket.counts["retries"] >= 1
        begun = time.monotonic()
        end()
        reader.join(10)
        assert not reader.is_alive()
    assert time.monotonic() - begun < 0.5
    bucket.close()
    assert answer == [tiff(picture(1, 0, 5)), None]


def test_no_network_and_no_bucket_are_one_line(server, monkeypatch):
    monkeypatch.setattr(s3, "PATIENCE", 0.5)
    with pytest.raises(OSError, match="no-such-bucket/: cannot be listed, 404 NoSuchBucket"):
        fields.make_index("s3://no-such-bucket")
    with pytest.raises(ValueError, match="ftp://x: expected s3://"):
        s3.open_store("ftp://x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError,
                       match="no answer in 0.5 s .* from http://127.0.0.1:9, last: .*AWS_ENDP"):
        fields.make_index(ADDRESS)


# ----------------------------------------------------------------------------------------- results

class Shelf:
    """A bucket in memory, which stops after some uploads."""
    def __init__(self, **files: bytes):
        self.files, self.written, self.left = dict(files), [], 99

    def pages(self, folder):
        yield [], [(name, len(body)) for name, body in self.files.items()]

    def write(self, name, file):
        if not self.left:
            raise ConnectionError
        self.left -= 1
        self.files[name] = Path(file).read_bytes()
        self.written.append(name)


def test_new_results_take_the_place_of_old_ones_labels_last(tmp_path):
    """Stopped half-way there are no labels, and the image is made anew."""
    old = {f"a_{end}": b"old" for end in ("cells.csv", "labels.tif", "overlay.png", "rois.zip")}
    for left in range(1, 6):
        store, folder = Shelf(**old), tmp_path / str(left)
        folder.mkdir()
        output = s3.OutputBucket(folder, store, ())
        for end in ("cells.csv", "labels.tif", "overlay.png"):
            (folder / f"a_{end}").write_bytes(b"new")
        store.left = left
        with contextlib.suppress(ConnectionError):
            output.withdraw(["a_labels.tif", "a_rois.zip"])
            output.deliver()
        after = s3.OutputBucket(folder, store, ())
        assert after.has(["a_labels.tif"]) == (left == 5)        # two emptied, three uploaded
        assert store.written == ["a_labels.tif", "a_rois.zip", "a_cells.csv", "a_overlay.png",
                                 "a_labels.tif"][:left]
    assert not after.has(["a_rois.zip"]) and store.files["a_cells.csv"] == b"new"


# ------------------------------------------------------------------------------------------- cache

@pytest.mark.smoke
def test_cache_stays_within_its_limit_least_recently_used_out_first(tmp_path):
    cache = s3.Cache(tmp_path / "c", 1000)
    for i in range(9):
        cache.put(f"k{i}", bytes([i]) * 100)
        os.utime(cache.path(f"k{i}"), ns=(i, i))
    assert cache.get("k0") == bytes(100)                                     # used now
    cache.put("k9", b"9" * 100)
    cache.put("k10", b"a" * 100)                                 # the eleventh hundred: room for it
    assert cache.get("k0") and cache.get("k10") and cache.get("k9") and cache.get("k1") is None
    assert sum(p.stat().st_size for p in (tmp_path / "c").glob("??/*")) <= 1000
    cache.put("huge", b"x" * 1001)
    assert cache.get("huge") is None and cache.get("k0")


def test_a_count_that_a_crash_left_damaged_is_taken_anew(tmp_path):
    cache = s3.Cache(tmp_path / "c", 1000)
    cache.put("a", b"a" * 100)
    (tmp_path / "c/bytes.lock").write_bytes(b"\0\xff")
    cache.put("b", b"b" * 100)
    assert cache.get("a") and cache.get("b")
    assert (tmp_path / "c/bytes.lock").read_text() == "200"


def test_without_locks_nothing_is_cached(tmp_path, monkeypatch):
    monkeypatch.setattr(s3, "fcntl", None)                                   # as on Windows
    cache = s3.Cache(tmp_path / "c", 1000)
    for body in (b"body", b""):                                              # and nothing fails
        cache.put("k", body)
    assert cache.get("k") is None and not list((tmp_path / "c").glob("??/*"))


@pytest.mark.smoke
@pytest.mark.parametrize("address",
                         ["../../etc/passwd", "/etc/passwd", "a\0b", "x" * 5000, "é\udc80\n\t",
                          "CON", ".."])
def test_hostile_keys_have_safe_file_names(tmp_path, address):
    cache = s3.Cache(tmp_path / "c", 1e6)
    cache.put(address, b"body")
    assert cache.get(address) == b"body"
    path = cache.path(address)
    assert path.parent.parent == tmp_path / "c" and path.name.isalnum()
    if address.startswith((".", "/")) or "\0" in address:        # nor is anything read from outside
        (tmp_path / "passwd").write_text("secret")
        with pytest.raises(s3.Absent, match="out of the folder"):
            s3.Folder(str(tmp_path / "c")).read(address)


def test_cache_of_several_processes(tmp_path):
    """Six write and read at once: bodies are whole, the limit holds, the count is right."""
    work = ("import sys; sys.path.insert(0, sys.argv[1]); import s3\n"
            "cache = s3.Cache(sys.argv[2], 20_000)\n"
            "for i in range(150):\n"
            "    k = i * int(sys.argv[3]) % 97\n"
            "    body = cache.get(str(k))\n"
            "    assert body is None or body == bytes([k]) * 500, (k, len(body))\n"
            "    cache.put(str(k), bytes([k]) * 500)\n")
    root = str(Path(s3.__file__).parent)
    running = [subprocess.Popen([sys.executable, "-c", work, root, str(tmp_path / "c"), str(n)])
               for n in (1, 3, 5, 7, 11, 13)]
    assert [process.wait() for process in running] == [0] * 6
    files = [p for p in (tmp_path / "c").glob("??/*")]
    total = sum(p.stat().st_size for p in files)
    assert 10_000 < total <= 20_000 and not [p for p in files if p.name.endswith(".part")]
    assert int((tmp_path / "c" / "bytes.lock").read_text()) == total


def test_a_full_disk_ends_the_cache_and_nothing_else(server, tmp_path, monkeypatch, capsys):
    cache, name = s3.Cache(tmp_path / "c", 1e6), key(1, 0, 5)
    bucket = s3.open_store(f"s3://cellpainting-gallery/{ABOVE}", cache=cache)
    monkeypatch.setattr(Path, "write_bytes", lambda self,
                        body: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert bucket.read(name) == bucket.read(name) == tiff(picture(1, 0, 5))
    assert bucket.counts["cache_hits"] == 0
    assert capsys.readouterr().err.count("No space left on device; nothing more is cached") == 1
    bucket.close()


# ------------------------------------------------------------------------------------- infer on S3

@pytest.fixture(scope="module")
def pictures():
    """Four small images as files."""
    bodies = {}
    for number, name in enumerate(NAMES):
        field, file = synthetic.field(40 + number, 96, 12, diameter=28), io.BytesIO()
        tifffile.imwrite(file, field.pixels[field.channels.index("ER")])
        bodies[name] = file.getvalue()
    return bodies


@pytest.fixture
def cells(server, pictures, monkeypatch):
    """The server with these images in a bucket, and an account that may write there."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    if not listed(server, "raw/"):
        for name, body in pictures.items():
            server.client.put_object(Bucket="cells", Key=f"raw/{name}", Body=body,
                                     ACL="public-read")
    return server


@pytest.fixture
def folder(tmp_path, pictures):
    for name, body in pictures.items():
        (tmp_path / "raw" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "raw" / name).write_bytes(body)
    return tmp_path / "raw"


def listed(server, prefix):
    found = server.client.list_objects_v2(Bucket="cells", Prefix=prefix).get("Contents", [])
    return sorted(entry["Key"].removeprefix(prefix) for entry in found)


def get(server, key):
    return server.client.get_object(Bucket="cells", Key=key)["Body"].read()


def test_a_movie_on_s3_gets_its_folder_there(cells, capsys):
    """With the masks of the Cell Tracking Challenge, which lie in a folder of their own."""
    movie, file = synthetic.movie(0, frames=2, size=64, cells=6, diameter=24), io.BytesIO()
    tifffile.imwrite(file, movie.pixels, imagej=True, metadata={"axes": "TYX"})
    cells.client.put_object(Bucket="cells", Key="movies/m.tif", Body=file.getvalue(),
                            ACL="public-read")
    config = Config(out="s3://cells/film", time="all")
    assert infer.main(config, ["s3://cells/movies/m.tif"]) == 0
    assert listed(cells, "film/") == [
        "m_cells.csv", "m_ctc/01_RES/mask000.tif", "m_ctc/01_RES/mask001.tif",
        "m_ctc/01_RES/res_track.txt", "m_labels.tif", "m_lineage.svg", "m_overlay.png",
        "m_trackmate.xml", "m_tracks.csv", "summary.csv"]
    capsys.readouterr()
    assert infer.main(config, ["s3://cells/movies/m.tif"]) == 0
    assert "1 of 1 images have their results" in capsys.readouterr().out


def test_from_s3_to_s3_is_what_folders_give(cells, folder, tmp_path, capsys):
    assert infer.main(Config(out=str(tmp_path / "here")), [str(folder)]) == 0
    config = Config(out="s3://cells/out1")
    cells.set(errors=0.2)
    assert infer.main(config, ["s3://cells/raw/"]) == 0
    cells.set()
    here = sorted(path.name for path in (tmp_path / "here").iterdir())
    assert listed(cells, "out1/") == here and len(here) == 3 * len(NAMES) + 1
    for name in here:
        there = get(cells, f"out1/{name}")
        if name.endswith("_labels.tif"):                      # their records name the source
            assert (tifffile.imread(io.BytesIO(there)) == tifffile.imread(tmp_path / "here" / name)
                    ).all(), name
            record = images.label_record(there[:images.RECORD])
            assert record["source"]["file"].startswith("s3://cells/raw/")
        elif name != "summary.csv":                           # it has the seconds
            assert there == (tmp_path / "here" / name).read_bytes(), name
    rows = list(csv.DictReader(io.StringIO(get(cells, "out1/summary.csv").decode())))
    assert sorted(row["image"] for row in rows) == ["p10_c", "p1_a", "p1_b", "p1_deep_d"]
    assert max(int(row["cells"]) for row in rows) > 0

    cells.client.delete_object(Bucket="cells", Key="out1/p1_b_cells.csv")
    capsys.readouterr()
    assert infer.main(config,
                      ["s3://cells/raw"]) == 0    # makes that one again, and keeps the others' rows
    said = capsys.readouterr().out
    assert "1 image," in said and "3 of 4 images have their results" in said
    assert len(list(csv.DictReader(io.StringIO(get(cells, "out1/summary.csv").decode())))) == 4
    assert listed(cells, "out1/") == here

    cells.client.delete_object(Bucket="cells", Key="out1/summary.csv")   # a kill before its upload
    assert infer.main(config, ["s3://cells/raw"]) == 0
    again = list(csv.DictReader(io.StringIO(get(cells, "out1/summary.csv").decode())))
    assert sorted(row["image"] for row in again) == ["p10_c", "p1_a", "p1_b", "p1_deep_d"]


def test_a_folder_is_no_prefix_and_an_object_is_itself(cells, tmp_path):
    config = Config()
    assert list(infer.find_images(["s3://cells/raw/p1"], config).values()) == ["a", "b", "deep_d"]
    assert infer.find_images(["s3://cells/raw/p1"],
                             Config(pattern="b*")) == {"s3://cells/raw/p1/b.tif": "b"}
    assert infer.main(Config(out=str(tmp_path)), ["s3://cells/raw/p10/c.tif"]) == 0
    assert tifffile.imread(tmp_path / "c_labels.tif").shape == (96, 96)


@pytest.fixture
def keys(cells, pictures):
    """Puts images under keys, and removes them afterwards."""
    made = []

    def put(*names, body=pictures[NAMES[0]]):
        for name in names:
            cells.client.put_object(Bucket="cells", Key=name, Body=body, ACL="public-read")
            made.append(name)
    yield put
    for name in made:
        cells.client.delete_object(Bucket="cells", Key=name)


def test_keys_cannot_leave_the_folder_of_the_results(keys, cells, tmp_path):
    """Doubled slashes, dots, backslashes, and keys too long for a file; to disk and to S3."""
    names = ["plate1//x.tif", "plate1/../y.tif", "plate1/..\\..\\z.tif", "plate1/./w.tif",
             f"plate1/{'n' * 300}.tif"]
    keys(*(f"hostile/{name}" for name in names))
    out = tmp_path / "out"
    assert infer.main(Config(out=str(out), overlay=False), ["s3://cells/hostile"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    labels = {path.name.removesuffix("_labels.tif") for path in out.glob("*_labels.tif")}
    assert {"plate1_x", "plate1_y", "plate1_z", "plate1_w"} < labels and len(labels) == 5
    assert infer.main(Config(out="s3://cells/outh", overlay=False), ["s3://cells/hostile"]) == 0
    assert listed(cells, "outh/") == sorted(path.name for path in out.iterdir())


def test_objects_of_any_size_or_none(keys, cells, tmp_path, capsys, monkeypatch):
    """Without a size they are read to their end; one that claims 40 TB is refused by the disk, one
    that always fails is given up, although it is the first; the others are done."""
    monkeypatch.setattr(s3, "TRIES", 2)
    monkeypatch.setattr(s3, "LONGEST", 0.1)
    keys(*(f"sizes/{name}.tif" for name in ("a_broken", "b_claims", "c_unsized", "d_good")))
    cells.set(broken="a_broken", claims="b_claims", unsized="c_unsized")
    try:
        with pytest.raises(ValueError, match="2 of 4 images could not be done"):
            infer.main(Config(out=str(tmp_path), overlay=False), ["s3://cells/sizes"])
    finally:
        cells.set()
    said = capsys.readouterr().err
    assert "sizes/a_broken.tif: 503 SlowDown (again and again)" in said
    assert "sizes/b_claims.tif: wrong size, 43980465 MB of at most " in said
    assert sorted(p.name for p in tmp_path.glob("*_labels.tif")) == ["c_unsized_labels.tif",
                                                                     "d_good_labels.tif"]


def test_a_large_object_takes_little_memory(keys, tmp_path):
    keys("large/x.bin", body=bytes(64 << 20))
    bucket = s3.open_store("s3://cells/large")
    tracemalloc.start()
    bucket.fetch("x.bin", tmp_path / "x.bin", 1e9)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    bucket.close()
    assert (tmp_path / "x.bin").stat().st_size == 64 << 20 and peak < 8 << 20


def test_mistakes_on_s3_are_one_line(cells, tmp_path, monkeypatch, capsys):
    config = Config(out=str(tmp_path / "out"))
    for wrong, problem in (("s3://cells/nothing", "no image in this folder"),
                           ("s3://gone/raw", "cannot be listed, 404"),
                           ("s3://cells/raw/none.tif", "s3://cells/raw/none.tif: 404 NoSuchKey")):
        with pytest.raises(OSError, match=problem):
            infer.main(config, [wrong])
    for wrong, problem in (("s3://", "names no bucket"),
                           ("s3://cells/raw/*.tif", "pattern=\\*.tif")):
        with pytest.raises(ValueError, match=problem):
            infer.main(config, [wrong])
    with pytest.raises(OSError, match="s3://gone/out.*404"):
        infer.main(Config(out="s3://gone/out"), ["s3://cells/raw"])

    cells.client.put_object(Bucket="cells", Key="broken/a.tif", Body=b"no image", ACL="public-read")
    cells.client.put_object(Bucket="cells", Key="broken/b.tif", Body=get(cells, "raw/p1/b.tif"),
                            ACL="public-read")
    with pytest.raises(ValueError,
                       match="1 of 2 images could not be done: s3://cells/broken/a.tif"):
        infer.main(config, ["s3://cells/broken"])
    assert (tmp_path / "out" / "b_labels.tif").exists()
    said = capsys.readouterr().err
    assert "warning: s3://cells/broken/a.tif" in said and "/tmp" not in said

    said = r"s3://cells/raw: The config profile \(nope\) could not be found"
    with monkeypatch.context() as patched, pytest.raises(ValueError, match=said):
        patched.setenv("AWS_PROFILE", "nope")
        infer.main(config, ["s3://cells/raw"])
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(OSError, match="no AWS credentials found"):
        infer.main(Config(out="s3://cells/out"), ["s3://cells/raw"])


def test_four_shards_do_every_image_once_also_after_a_stop(folder, tmp_path, monkeypatch):
    for number in range(5):                                   # 9 images: shards of 3, 2, 2, 2
        (folder / f"more{number}.tif").write_bytes((folder / "p1/a.tif").read_bytes())
    out, real, done = tmp_path / "out", infer.segment_file, []

    def counted(path, name, *rest, **options):
        row = real(path, name, *rest, **options)
        done.append(name)
        return row

    def told(path, name, *rest, **options):  # Slurm's signal comes in the middle of the first image
        os.kill(os.getpid(), signal.SIGUSR1)
        return counted(path, name, *rest, **options)

    def killed(path, name, out, *rest, **options):           # in its second image, half written
        if len(done) > 1:
            (out / f"{name}_labels.tif").write_bytes(b"half")
            raise KeyboardInterrupt
        return counted(path, name, out, *rest, **options)

    def shard(number, way):
        monkeypatch.setattr(infer, "segment_file", way)
        return infer.main(Config(out=str(out), overlay=False, shard=f"{number}/4"), [str(folder)])

    before = signal.getsignal(signal.SIGUSR1)
    assert shard(1,
                 told) == 85 and len(done) == 1   # finishes its image, then asks to be queued again
    assert signal.getsignal(signal.SIGUSR1) == before
    with pytest.raises(KeyboardInterrupt):
        shard(2, killed)
    assert len(done) == 2
    for number in (3, 4, 2, 1):
        assert shard(number, counted) == 0
    wanted = infer.find_images([str(folder)], Config()).values()
    assert sorted(done) == sorted(wanted)                     # nine, none twice
    rows = [row["image"] for number in (1, 2, 3, 4)
            for row in runs.read_table(out / f"summary_{number}_of_4.csv")]
    assert sorted(rows) == sorted(done)
    assert all(data.read_labels(out / f"{name}_labels.tif").ndim == 2 for name in done)


@pytest.mark.parametrize("wrong", ["0/4", "5/4", "4", "1/0", "a/b"])
def test_shard_is_checked(wrong):
    with pytest.raises(ValueError, match="expected i/n"):
        Config(shard=wrong)


def test_the_next_image_comes_while_this_one_is_worked_on(cells):
    addresses = [f"s3://cells/raw/{name}" for name in NAMES]
    seen = []
    for address, file in s3.download(addresses):
        seen.append(file)
        assert file.read_bytes() == get(cells, address.removeprefix("s3://cells/"))
        assert not any(before.exists() for before in seen[:-1])
    assert not seen[-1].exists() and [file.name for file in seen] == ["0.tif", "1.tif", "2.tif",
                                                                      "3.tif"]


@pytest.mark.parametrize("done, code", [(0, None), (1, runs.REQUEUE)])
def test_stacks_for_s3_are_queued_again_while_some_get_done(tmp_path, monkeypatch, done, code):
    """One alone that is stopped would begin anew each time, for ever."""
    def stopped(file, name, *rest):
        if len(rows) == done:
            raise runs.Stopped
        rows.append({"image": name})
        return rows[-1]

    rows: list[dict] = []
    monkeypatch.setattr(infer, "infer_stack", stopped)
    todo = {tmp_path / f"{name}.tif": name for name in "ab"}
    for path in todo:
        tifffile.imwrite(path, np.zeros((3, 8, 8), np.uint8))
    work = infer.Work(s3.OutputFolder(tmp_path / "out"), infer.Summary(tmp_path / "s.csv"), {})
    config = Config(z="all", out="s3://cells/out")
    if code is None:
        with pytest.raises(ValueError, match="it begins anew: give more time"):
            work.do(todo, None, config, False)
    else:
        assert work.do(todo, None, config, False) == code


def test_an_interruption_leaves_whole_images_and_the_table(cells, monkeypatch):
    real = infer.segment_file

    def interrupted(file, name, out, *rest):
        if name == "p1_b":
            (out / "p1_b_labels.tif").write_bytes(b"half")
            raise KeyboardInterrupt
        return real(file, name, out, *rest)

    monkeypatch.setattr(infer, "segment_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        infer.main(Config(out="s3://cells/out2"), ["s3://cells/raw"])
    assert listed(cells, "out2/") == ["p1_a_cells.csv", "p1_a_labels.tif", "p1_a_overlay.png",
                                      "summary.csv"]
