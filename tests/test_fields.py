"""fields.py: the index of plates, listed from S3 or a folder; fields of folders and drawn ones."""
import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from jump_fields import (
    ADDRESS,
    BATCH,
    CHANNELS,
    FIELDS,
    NUMBERS,
    PLATES,
    TRUTH,
    files,
    key,
    picture,
    put,
    tiff,
)

import fields
import runs
import s3
import stream


def command(*arguments, code=0, capsys=None) -> str:
    with pytest.raises(SystemExit) as stop:
        runs.script(stream.__doc__, stream.Config, stream.main, [str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert stop.value.code == code, err or out
    assert not code or err.count("\n") == 1
    return err if code else out


# ------------------------------------------------------------------------------------------- index

def test_index_of_a_bucket_a_folder_and_load_data_are_one(server, tmp_path, capsys):
    """The same fields, names and files, wherever they are listed; root= moves them."""
    index = fields.make_index(ADDRESS)[0]
    assert len(index) == 36 and index.channels == CHANNELS and index.root == ADDRESS
    assert [index[i].name for i in range(36)] == sorted(TRUTH)
    assert index[10].files["DNA"] == key(2, 1, 5).removeprefix(f"{BATCH}/")
    size = 9 * len(NUMBERS) * len(tiff(picture(1, 1, 1)))
    assert list(index.plate_sizes()) == [(BATCH, f"BR{p:08}", 9, size) for p in PLATES]

    for path, body in files():
        (tmp_path / "disk" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "disk" / path).write_bytes(body)
    out = tmp_path / "disk.tsv.gz"
    said = command("index", tmp_path / "disk" / BATCH, f"out={out}", capsys=capsys)
    assert "36 fields of 4 plates, 4 channels, from 144 files" in said
    local = fields.Index.load(out)
    assert local.lines == index.lines and local.digest == index.digest
    assert local.root == f"{tmp_path}/disk/{BATCH}/"
    assert fields.Index.load(out, root=index.root).root == index.root
    assert [p.name for p in tmp_path.iterdir()
            if p.is_file()] == ["disk.tsv.gz"]        # no journal, no half file

    heads = "".join(f",FileName_Orig{c},PathName_Orig{c}" for c in CHANNELS)
    for p in PLATES:
        lines = ["Metadata_Plate,Metadata_Well,Metadata_Site" + heads]
        for f in FIELDS:
            paths = [Path("/home/ubuntu/projects") / key(p, f, c) for c in NUMBERS]
            lines.append(f"BR{p:08},A{p % 24 + 1:02},{f + 1}" + "".join(f",{x.name},{x.parent}"
                                                                        for x in paths))
        table = f"workspace/load_data_csv/{BATCH}/BR{p:08}/load_data.csv"
        put(server, table, "\n".join(lines).encode())
        put(server, table.replace(".csv", "_with_illum.csv"), b"not this one")
    command("index", "s3://cellpainting-gallery/workspace/load_data_csv", f"out={out}",
            capsys=capsys)
    tables = fields.Index.load(out, root=f"{tmp_path}/disk/{BATCH}/images")
    assert [f.files for f in map(tables.__getitem__, range(36))] == [
        {c: n.removeprefix("images/") for c, n in index[i].files.items()} for i in range(36)]
    assert [tables[i].name for i in range(36)] == [
        index[i].name.replace("2020-11-05T19_51_35-Measurement1/", "") for i in range(36)]
    tables.save(out)                                                     # and what is there is read
    config = fields.FieldData(index=str(out), held=5, held_share=0.3)
    one = fields.FieldData(**{**vars(config), "channels": ("dna",)})
    for used, channels in ((config, CHANNELS), (one, ("DNA",))):
        found, held = fields.held_out_fields(used, 0)
        held = list(held)
        assert found == channels and len(held) == 5 and len({field for field, *_ in held}) == 5
        for field, pixels, _ in held:
            batch, plate, site = field.split("/")
            truth = [picture(int(plate[2:]), int(site[7:]) - 1, NUMBERS[CHANNELS.index(c)])
                     for c in channels]
            assert np.array_equal(pixels, np.stack(truth))
    assert fields.field_extent(one, 0) == (27, ("DNA",), (1080, 1080))


def test_urls_and_other_names_of_load_data(tmp_path):
    """cpg0016: names of another microscope, https and s3 addresses, wells past Z."""
    table = tmp_path / "load_data_csv" / "Batch1" / "P1" / "load_data.csv.gz"
    table.parent.mkdir(parents=True)
    table.write_bytes(gzip.compress(
        b"Metadata_Plate,Metadata_Well,Metadata_Site,URL_OrigDNA,URL_OrigBrightfield_H\n"
        b"P1,AB03,2,https://cellpainting-gallery.s3.amazonaws.com/cpg0016/x/A 1.tif,"
        b"s3://cellpainting-gallery/cpg0016/x/B 1.tif\n"
        b"P1,A01,1,https://s3.us-east-1.amazonaws.com/cellpainting-gallery/cpg0016/y/z/A.tif,\n"))
    index, counts = fields.make_index(str(tmp_path / "load_data_csv"))
    assert index.root == "s3://cellpainting-gallery/cpg0016/"
    assert index.channels == ("DNA", "Brightfield_H")
    assert counts["incomplete"] == counts["without Brightfield_H"] == 1 and len(index) == 1
    assert index[0] == fields.IndexedField("Batch1/P1/r28c03f02", {
        "DNA": "x/A 1.tif", "Brightfield_H": "x/B 1.tif"})
    index = fields.make_index(str(table), ["DNA"])[0]
    assert index[0] == fields.IndexedField("Batch1/P1/r01c01f01", {"DNA": "y/z/A.tif"})
    assert list(index.plate_sizes()) == [("Batch1", "P1", 2, 0)]
    table.write_bytes(gzip.compress(b"Metadata_Well,Metadata_Site,URL_OrigDNA,Metadata_Plate\n"
                                    b"A01,1,s3://cellpainting-gallery/x/A.tif\n"))     # cut off
    with pytest.raises(ValueError, match="line 2 has no plate"):
        fields.make_index(str(table))


def test_plates_are_told_apart_and_incomplete_fields_counted(tmp_path, capsys):
    """The same site on two plates is two fields; so it is in two measurements of a plate."""
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
    assert "left out: 1 incomplete fields (missing DNA 1), 2 other files, 1 further planes" in said
    assert [fields.Index.load(out)[i].name for i in range(4)] == [
        "b/P1/t-Measurement1/r01c01f01", "b/P1/t-Measurement2/r01c01f01",
        "b/P2/t-Measurement1/r01c01f01",
        "c/P1/t-Measurement1/r01c01f01"]
    assert "5 fields" in command("index", tmp_path / "src", f"out={out}", "channels=Mito",
                                 capsys=capsys)
    said = command("stats", out, capsys=capsys)
    assert "2 plates, 5 fields, 1 channels (Mito), 21 bytes" in said and "b\tP2\t1 fields" in said
    assert "no channel 'DMA', did you mean 'DNA'" in command(
        "index", tmp_path / "src", f"out={out}", "channels=dna,DMA", code=1, capsys=capsys)


def test_a_listing_goes_on_where_it_was_stopped(server, tmp_path, monkeypatch):
    """What the journal holds is not asked again, a line that was cut is; the table is the same."""
    asked, pages = [], s3.Bucket.pages

    def watched(self, folder):
        asked.append(folder)
        if broken and "BR00000003" in folder and folder.endswith("Images/"):
            raise OSError("network gone")
        return pages(self, folder)
    whole = fields.make_index(ADDRESS)[0]
    monkeypatch.setattr(s3.Bucket, "pages", watched)
    monkeypatch.setattr(fields, "CONNECTIONS", 1)
    broken = True
    with pytest.raises(OSError, match="network gone"):
        fields.make_index(ADDRESS, journal=tmp_path / "journal")
    journal = (tmp_path / "journal").read_text()
    assert json.loads(journal.splitlines()[0]) == {"source": ADDRESS}
    finished = {json.loads(line)["place"] for line in journal.splitlines()[1:]}
    assert finished >= {"", "images/", "illum/"}
    asked[:], broken = [], False
    (tmp_path / "journal").write_text(journal + '{"place": "images/BR0000')
    index, counts = fields.make_index(ADDRESS, journal=tmp_path / "journal")
    assert asked and not finished & set(asked) and counts["keys"] == 145 and counts["other"] == 1
    assert index.lines == whole.lines
    with pytest.raises(ValueError, match="begun for .*remove it"):
        fields.make_index(str(tmp_path), journal=tmp_path / "journal")


def test_listing_of_several_pages_through_faults(server, monkeypatch):
    """1,000 names come at once; here 7."""
    server.set(errors=0.1, resets=0.05, truncated=0.05)
    open_store = s3.open_store

    def small_pages(*args, **options):
        store = open_store(*args, **options)
        list_objects = store.client.list_objects_v2
        store.client.list_objects_v2 = lambda **how: list_objects(MaxKeys=7, **how)
        return store
    monkeypatch.setattr(s3, "open_store", small_pages)
    index, _ = fields.make_index(ADDRESS)
    assert [index[i].name for i in range(len(index))] == sorted(TRUTH)


def test_a_large_index_is_small_and_quick(tmp_path):
    """A tenth of JUMP's 378,000 fields: under 6 MB on disk, 0.7 s to load and 50 MB of memory."""
    columns = [f"p01-ch{c}sk{c}fk1fl" for c in range(1, 9)]
    folder = "images/PLATE__2020-11-05T19_51_35-Measurement1/Images/"
    rng, one = np.random.default_rng(0), []
    for site, size in enumerate(rng.integers(19_000_000, 21_000_000, 3437).tolist()):
        r, c, f = site // 216 + 1, site // 9 % 24 + 1, site % 9 + 1
        names = "\t".join(f"r{r:02}c{c:02}f{f:02}{x}{site % 7}.tiff" for x in columns)
        one.append(f"{BATCH}\tPLATE\t2020-11-05T19_51_35-Measurement1\t{r}\t{c}\t{f}\t{size}\t"
                   f"{folder}\t{names}".encode())
    lines = [line.replace(b"PLATE", b"BR%08d" % plate) for plate in range(11) for line in one]
    path = tmp_path / "big.tsv.gz"
    fields.Index(ADDRESS, fields.JUMP_CHANNELS, lines).save(path)
    assert len(lines) == 37_807 and path.stat().st_size < 6e6
    watch = ("import resource, sys, time; sys.path.insert(0, sys.argv[1]); import fields\n"
             "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
             "before, t = peak(), time.process_time(); index = fields.Index.load(sys.argv[2])\n"
             "t = time.process_time() - t; index.plates; index[37806].files\n"
             "print(len(index), t, peak() - before)")
    root = str(Path(fields.__file__).parent)
    done = subprocess.run([sys.executable, "-c", watch, root, str(path)], capture_output=True,
                          text=True, check=True)
    n, seconds, mib = map(float, done.stdout.split())
    assert n == 37_807 and seconds < 0.7 and mib < 50


@pytest.mark.smoke
def test_hold_out_whole_plates():
    """A plate is on one side with all its measurements and batches; the share is kept."""
    lines = [f"b{p % 2}\tP{p % 10}\tm{p}\t1\t1\t{f}\t0\tx/\tf{f}".encode() for p in range(20)
             for f in range(30)]
    index = fields.Index("/x", ["DNA"], lines)
    chosen = set()
    for seed in range(5):
        train, held = fields.hold_out_plates(index, 0.2, seed)
        assert set(train.plates) & set(held.plates) == set() and len(set(held.plates)) == 2
        assert sorted(train.lines + held.lines) == sorted(lines) and len(held) == 120
        chosen.add(tuple(sorted(set(held.plates))))
    assert len(chosen) > 1
    assert len(set(fields.hold_out_plates(index, 1e-6)[1].plates)) == 1      # at least one
    for wrong in (0.0, 1.5):
        with pytest.raises(ValueError, match="share above 0"):
            fields.hold_out_plates(index, wrong)
    with pytest.raises(ValueError, match="two plates"):
        fields.hold_out_plates(index.select([0, 1]), 0.5)


@pytest.mark.smoke
def test_wrong_indexes(tmp_path, capsys):
    for arguments, message in (
            ((), "expected index SOURCE"), (("stats", tmp_path / "none.gz"), "no such index"),
            (("index", tmp_path, "out=x.tsv"), "expected a file .tsv.gz"),
            (("index", tmp_path / "none", f"out={tmp_path}/x.tsv.gz"), "no such folder"),
            (("index", tmp_path, f"out={tmp_path}/x.tsv.gz"), "no TIFF named as"),
            (("index", "http://x/y", f"out={tmp_path}/x.tsv.gz"), "no such folder")):
        assert message in command(*arguments, code=1, capsys=capsys)
    assert not list(tmp_path.iterdir())
    (tmp_path / "load_data_csv").mkdir()
    said = command("index", tmp_path / "load_data_csv", f"out={tmp_path}/x.tsv.gz", code=1,
                   capsys=capsys)
    assert "no load_data.csv" in said
    head = "#root\t/x\n" + "\t".join((*fields.COLUMNS, "DNA"))
    text = f"{head}\nb\tp\tm\t1\t1\t1\t0\tf/\tx.tiff\n".encode()
    good, odd = gzip.compress(text), gzip.compress(text.replace(b"\t1\t1\t1", b"\t1\t1\tA"))
    for body, message in ((b"plain", "damaged or no gzip"), (good[:-9], "damaged"),
                          (gzip.compress(b""), "no index"),
                          (gzip.compress(b"a\tb\n"), "no index"), (odd, "line 3")):
        (tmp_path / "x.gz").write_bytes(body)
        with pytest.raises(ValueError, match=message):
            fields.Index.load(tmp_path / "x.gz")
    (tmp_path / "x.gz").write_bytes(good)
    index = fields.Index.load(tmp_path / "x.gz")
    assert index[0].files == {"DNA": "f/x.tiff"} and fields.index_channels(index,
                                                                           ("dna",)) == ("DNA",)
    for channels, message in ((("DNAA",), "did you mean 'DNA'"), (("DNA", "dna"), "each once")):
        with pytest.raises(ValueError, match=message):
            fields.index_channels(index, channels)


# ------------------------------------------------------------------------ folders and drawn fields

def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, pixels, imagej=True, metadata={"axes": "CYX"[-pixels.ndim:]})


@pytest.fixture
def folders(tmp_path):
    """Three fields of two channels, 48 px; a larger one of five, a small one of one, labels."""
    rng = np.random.default_rng(0)
    for stem in "abc":
        write(tmp_path / f"stains/{stem}.tif", rng.integers(0, 60000, (2, 48, 48), dtype=np.uint16))
    write(tmp_path / "more/five.tif",
          (np.arange(5)[:, None, None] * 1000 + np.arange(70)).repeat(40, 1).astype(np.uint16))
    write(tmp_path / "more/below/one.tif", np.arange(20 * 24, dtype=np.uint8).reshape(20, 24))
    write(tmp_path / "more/below/one_masks.tif", np.ones((20, 24), np.uint8))
    return dict(root=str(tmp_path), folders=("stains", "more"), held=1)


def made(config, seed=0):
    return [make() for make in fields.local_fields(config, seed)[1]]


@pytest.mark.smoke
def test_unlike_images_become_fields_of_one_size(folders):
    config = fields.FieldData(**folders, square=32, fields=2, field_size=64, field_cells=8,
                              field_diameter=20)
    assert fields.local_fields(config, 0)[0] == ("1", "2")
    held, *train = made(config)
    found = {stem: pixels for stem, pixels, _ in train}
    assert held[1].shape == (2, 48, 48)                     # whole, and nothing of it is trained on
    assert not any(stem.startswith(f"{held[0]} ") for stem in found)
    assert {pixels.shape for pixels in found.values()} == {(2, 32, 32)}
    stains = [stem for stem in "abc" if stem != held[0]]
    wanted = {f"{stem} {y},{x}" for stem in stains for y in (0, 16) for x in (0, 16)}
    wanted |= {f"five {y},{x}" for y in (0, 8) for x in (0, 19, 38)} | {"one 0,0", "synthetic 0",
                                                                        "synthetic 1"}
    assert set(found) == wanted and len(train) == len(wanted)
    whole = tifffile.imread(f"{folders['root']}/stains/{stains[0]}.tif")
    assert (found[f"{stains[0]} 16,0"] == whole[:, 16:,
                                                :32]).all()    # squares cover an image to its edges
    five = found["five 8,38"]
    assert len(set(five[:, 0, 0] // 1000)) == 2            # two of its five channels, not one twice
    assert (five % 1000 == np.arange(38, 70)).all()
    one = found["one 0,0"]
    assert (one[0] == one[1]).all()                                        # its only channel, twice
    assert (one[0, :20, 24:] == one[0, :20, 23:15:-1]).all()                 # mirrored
    assert (one[0, 20:] == one[0, 19:7:-1]).all()


def test_the_same_lot_every_time(folders):
    config = fields.FieldData(**folders, square=32)
    first, second = made(config, 3), made(config, 3)
    assert all(a[0] == b[0] and (a[1] == b[1]).all() for a, b in zip(first, second, strict=True))
    found = {fields.local_fields(config, seed)[1][0]()[0] for seed in range(9)}
    assert found == {"a", "b", "c"}                                          # the seed decides


def test_what_is_measured_on_has_the_same_stains(folders, tmp_path):
    write(tmp_path / "stains/b.tif", np.ones((3, 48, 48), np.uint16))
    config = fields.FieldData(**{**folders, "held": 2}, square=32)
    with pytest.raises(ValueError, match="b.tif: 3 channels, expected 2 as in a.tif"):
        for seed in range(9):                                      # b is held out with most of them
            list(fields.held_out_fields(config, seed)[1])


def test_pool_holds_what_is_not_held_out(folders):
    config = fields.FieldData(**folders, square=32)
    pool = stream.open_pool(config, 4, 0, "cpu")
    held = [field for field, *_ in fields.held_out_fields(config, 0)[1]]
    assert pool.pixels.shape == (15, 2, 32, 32)                # 2 x 4 of the stains, 6 of five, one
    assert not any(field.startswith(f"{held[0]} ") for field in pool.names) and len(held) == 1
    assert fields.field_extent(config, 0) == (15, ("1", "2"), (32, 32))
    with pytest.raises(ValueError, match="batch=16: 15 fields to train on"):
        stream.open_pool(config, 16, 0, "cpu")


@pytest.mark.parametrize("change, said", [
    (dict(match="nowhere"), "no images with 'nowhere' in their path"),
    (dict(held=3), "3 images, expected more than data.held=3"),
    (dict(square=None), r"\.tif: \(., .., ..\), expected \(2, 48, 48\) as in a.tif; data.square"),
    (dict(square=0), "square is 0, expected a whole number, 1 or more or null"),
    (dict(square=None, fields=3), "folders and fields given"),
    (dict(folders=[]), "nothing given"),
    (dict(folders=["more", "more/below"]), "one.tif lies in more and in more/below"),
    (dict(folders=["more", "more"]), "lies in more and in more"),
    (dict(folders=["more", "more/below"], square=None), "one.tif lies in more and in more/below"),
])
def test_wrong_data_are_said(folders, change, said):
    values = {**folders, "folders": list(folders["folders"]), "square": 32, **change}
    with pytest.raises(ValueError, match=said):
        made(runs.from_dict(fields.FieldData, values, "data"))
