"""Clumsy and hostile input: a table of what is tried and what is said, damage at random, and a
whole run over one of each between good images."""
import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import test_images
import tifffile
import torch
from conftest import ROOT

import cohort
import data
import fields
import images
import infer
import model
import runs
import synthetic
import train_seg

TINY = dict(arch="vit", dim=64, depth=4, heads=1, patch=8, widths=[32, 16, 8], last=8)


# ---------------------------------------------------------------------------- files made by hand

def png_of_zeros(side: int) -> bytes:
    """A PNG of side² black pixels that keeps its word: hundreds of times smaller than they are."""
    rows = side * (side + 1)
    def chunk(name, content):
        return (struct.pack(">I", len(content)) + name + content
                + struct.pack(">I", zlib.crc32(name + content)))
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
            + chunk(b"IDAT", test_images.zeros_deflated(-(-rows // (1 << 24)) << 24))
            + chunk(b"IEND", b""))


def tiff_that_claims(height: int, width: int) -> bytes:
    """A BigTIFF of one deflated strip."""
    strip = zlib.compress(bytes(64))
    tags = {256: width, 257: height, 258: 8, 259: 8, 262: 1, 273: 16 + 8 + 20 * 9 + 8, 277: 1,
            278: height, 279: len(strip)}
    return (struct.pack("<2sHHHQQ", b"II", 43, 8, 0, 16, len(tags))
            + b"".join(struct.pack("<HHQQ", tag, 16, 1, value) for tag, value in tags.items())
            + bytes(8) + strip)


def stack(path: Path, share: float = 1.0, **options) -> Path:
    pixels = np.random.default_rng(0).integers(0, 999, (3, 2, 40, 40)).astype(np.uint16)
    tifffile.imwrite(path, pixels, imagej=True, metadata={"axes": "ZCYX"}, **options)
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small network that nobody trained."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    net = model.DINOCell(model.ViT(64, 4, 1, 8, 4), (32, 16, 8), 8, model.Settings(tile=64))
    model.save(net, path)
    return path


# ---------------------------------------------------------------------------------- configurations

BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi"))


@pytest.mark.smoke
@pytest.mark.parametrize("text, said", [
    ("steps: 3\nsteps: 4\n", "the key 'steps' stands twice"),
    ("data: {root: a, root: b}\n", "the key 'root' stands twice"),
    (BOMB, "aliases (*) that grow beyond 100000 values"),
    ("data: &d\n  root: *d\n", "an alias (*) that holds itself"),
    ("[" * 2000, "nested too deep"),
    ("seed: 2024-13-45\n", "month must be in 1..12"),
    ("- a\n", "expected lines `key: value`"),
    ("a: \x00\n", "not valid YAML"),
    ("network: {patch: 0}\n", "network.patch is 0, expected a whole number, from 1 to 64"),
    ("network: {dim: 0}\n", "network.dim is 0, expected a whole number, from 1 to 16384"),
    ("cap: 1e300\n", "cap is '1e300', expected a number, from 0.1 to 1000"),
    ("batch: 1e9\n", "batch is '1e9', expected a whole number, from 1 to 65536"),
    ("steps: 1e30\n", "steps is '1e30', expected a whole number"),
    ("steps: .nan\n", "steps is nan, expected a whole number")],
    ids=lambda text: text[:20])
def test_a_configuration_is_refused(tmp_path, text, said):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError) as error:
        runs.load_config(train_seg.Config, tmp_path / "x.yaml")
    assert said in str(error.value) and str(tmp_path / "x.yaml") in str(error.value)


@pytest.mark.smoke
@pytest.mark.parametrize("given, said", [
    ("near=1e9", "from 0 to 10000"), ("min_area=1e30", "expected a whole number"),
    ("min_area=2e9", "from 0 to 1e+09"), ("tile=20000", "from 1 to 4096"),
    ("batch=1e9", "from 1 to 65536")])
def test_a_number_out_of_all_reason_is_refused(given, said):
    with pytest.raises(ValueError, match=given.replace("+", r"\+")) as error:
        runs.load_config(infer.Config, None, [given])
    assert said in str(error.value)


# -------------------------------------------------------------------------- weights, checkpoints

def rewritten(path: Path, change) -> None:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


WRONG_WEIGHTS = {
    "no architecture": lambda c: c.pop("architecture"),
    "no tensors": lambda c: c.pop("state_dict"),
    "no settings": lambda c: c.update(settings=None),
    "text for tensors": lambda c: c.update(state_dict="x"),
    "a number for a tensor": lambda c: c["state_dict"].update({"backbone.cls_token": 3}),
    "a tensor of another shape": lambda c: c["state_dict"].update(
        {"backbone.cls_token": torch.zeros(3)}),
    "a sparse tensor": lambda c: c["state_dict"].update(
        {"backbone.cls_token": c["state_dict"]["backbone.cls_token"].float().to_sparse()}),
    "complex numbers": lambda c: c["state_dict"].update(
        {"backbone.cls_token": c["state_dict"]["backbone.cls_token"].to(torch.complex64)}),
    "a tensor without numbers": lambda c: c["state_dict"].update(
        {"backbone.cls_token": c["state_dict"]["backbone.cls_token"].to("meta")}),
    "a tensor too many": lambda c: c["state_dict"].update(extra=torch.zeros(1)),
    "a tensor too few": lambda c: c["state_dict"].pop("backbone.cls_token"),
    "a tensor that claims 4 TB": lambda c: c["state_dict"].update(
        {"backbone.cls_token": torch.zeros(1).expand(1 << 40)}),
    "a backbone of another kind": lambda c: c["architecture"]["backbone"].update(kind="RNN"),
    "a key too many": lambda c: c["architecture"]["backbone"].update(spin=1),
    "text for a width": lambda c: c["architecture"]["backbone"].update(dim="64"),
    "a width of 0": lambda c: c["architecture"]["backbone"].update(dim=0),
    "a negative depth": lambda c: c["architecture"]["backbone"].update(depth=-1),
    "a million blocks": lambda c: c["architecture"]["backbone"].update(depth=10**6),
    "a width beyond memory": lambda c: c["architecture"]["backbone"].update(dim=1 << 40),
    "stages of text": lambda c: c["architecture"].update(widths="abc"),
    "no stages": lambda c: c["architecture"].pop("widths"),
    "text for a tile": lambda c: c["settings"].update(tile="large"),
    "an unknown setting": lambda c: c["settings"].update(colour="red"),
    "a mean of text": lambda c: c["settings"].update(mean=["a", "b", "c"]),
}


@pytest.mark.parametrize("wrong", WRONG_WEIGHTS)
def test_wrong_weights_are_one_line(weights, tmp_path, wrong):
    path = tmp_path / "x.pt"
    path.write_bytes(weights.read_bytes())
    rewritten(path, WRONG_WEIGHTS[wrong])
    with pytest.raises(ValueError) as error:
        model.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_byte_flipped_in_a_tensor_is_told(weights, tmp_path):
    """PyTorch loads such a file without a word."""
    path, body = tmp_path / "x.pt", bytearray(weights.read_bytes())
    with zipfile.ZipFile(weights) as parts:
        largest = max(parts.infolist(), key=lambda part: part.file_size)
    body[largest.header_offset + 4096] ^= 1
    path.write_bytes(body)
    torch.load(path, weights_only=True)
    with pytest.raises(ValueError, match="does not fit its checksum"):
        model.load(path)


def test_packed_weights_are_refused(weights, tmp_path):
    with zipfile.ZipFile(weights) as source, zipfile.ZipFile(
            tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as target:
        for part in source.namelist():
            target.writestr(part, source.read(part))
    with pytest.raises(ValueError, match="compressed parts, which PyTorch does not write"):
        model.load(tmp_path / "x.pt")


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A training of two checkpoints, steps 2 and 4."""
    folder = tmp_path_factory.mktemp("begun")
    values = dict(experiment="x", output_base_dir=str(folder), network=TINY, crop=64, batch=2,
                  steps=4, warmup=1, save_every=2, val_every=4, log_every=1, device="cpu",
                  data=dict(fields=4, field_size=96), precision="float32")
    assert train_seg.main(runs.from_dict(train_seg.Config, values, "here"), []) == 0
    return values, folder


@pytest.mark.parametrize("damage", ["cut", "empty", "stray", "config"])
def test_a_damaged_run_goes_on_from_what_is_whole(begun, tmp_path, damage, capsys):
    values, folder = begun
    saved = tmp_path / "runs/x/checkpoints/seg"
    for file in sorted((folder / "runs/x").rglob("*")):
        if file.is_file():
            copy = tmp_path / file.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    newest, body = saved / "step_00000004.pt", (saved / "step_00000004.pt").read_bytes()
    if damage == "stray":
        (saved / "step_abc.pt").write_bytes(b"x")
    elif damage == "config":
        (tmp_path / "runs/x/config.yaml").write_text("steps: [")
    else:
        newest.write_bytes(body[:len(body) // 2 if damage == "cut" else 0])
    values = {**values, "output_base_dir": str(tmp_path)}
    assert train_seg.main(runs.from_dict(train_seg.Config, values, "here"), []) == 0
    step = 2 if damage in ("cut", "empty") else 4
    assert f"going on from step {step} " in capsys.readouterr().err
    assert len(torch.load(newest, weights_only=True)) > 5


def test_training_needs_a_cell(tmp_path):
    for number in range(4):
        tifffile.imwrite(tmp_path / f"{number}.tif", test_images.noise(96, 96))
        images.write_labels(tmp_path / f"{number}_masks.tif", np.zeros((96, 96), np.int32))
    config = runs.from_dict(train_seg.Config, dict(
        data=dict(sets=[str(tmp_path)]), network=TINY, crop=64, output_base_dir=str(tmp_path),
        warmup=1, steps=2), "here")
    with pytest.raises(ValueError, match="data.validation: no cell in 4 labelled images"):
        train_seg.main(config, [])
    assert not (tmp_path / "final_models").exists()


# --------------------------------------------------------------------------------- tables, labels

@pytest.mark.smoke
@pytest.mark.parametrize("properties", ['"text"', "3", "[]", "null"])
@pytest.mark.parametrize("geometry", ['"text"', "[]", "null", '{"type": "Polygon"}'])
def test_geojson_of_anything_is_one_line(tmp_path, properties, geometry):
    (tmp_path / "x.geojson").write_text('{"features": [{"type": "Feature", "properties": '
                                        f'{properties}, "geometry": {geometry}}}]}}')
    with pytest.raises(ValueError) as error:
        data.read_geojson(tmp_path / "x.geojson", (20, 20))
    assert str(tmp_path / "x.geojson") in str(error.value)


@pytest.mark.smoke
@pytest.mark.parametrize("line", ["{}", "5", '"a"', "null", "[1]"])
def test_lines_of_anything_in_a_journal_are_one_line(tmp_path, line):
    (tmp_path / "1_of_1.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match="remove the line"):
        cohort.lines_by_tile(tmp_path, "key", [])
    with pytest.raises(ValueError, match="remove it"):
        fields._read_index_journal(tmp_path / "1_of_1.jsonl", "plates")


def test_a_cell_of_a_table_may_be_long_or_is_one_line(tmp_path):
    (tmp_path / "x.csv").write_text("image,cells\n" + "a" * 200_000 + ",3\n")
    with pytest.raises(ValueError, match="x.csv: not a table of text"):
        runs.read_table(tmp_path / "x.csv", ["image"])


def test_results_of_an_ome_tiff_are_a_labelled_image(tmp_path, weights):
    field = synthetic.field(3, (96, 96), 4, diameter=24)
    tifffile.imwrite(tmp_path / "x.ome.tif", field.pixels[0], ome=True)
    assert infer.main(infer.Config(out=str(tmp_path), weights=str(weights)),
                      [str(tmp_path / "x.ome.tif")]) == 0
    assert [example.name for example in data.examples(tmp_path)] == ["x"]


# --------------------------------------------------------------------------------------- names

@pytest.mark.smoke
@pytest.mark.parametrize("name, flat", [
    ("plate1/A1", "plate1_A1"), ("plate1//x", "plate1_x"), ("/etc/passwd", "etc_passwd"),
    ("../../x", "x"), ("./x", "x"), ("a/../b", "a_b"), ("..\\..\\x", "x"), ("C:\\x", "C:_x")])
def test_names_from_outside_stay_in_their_folder(name, flat):
    assert runs.flat_name(name) == flat


@pytest.mark.parametrize("name", ["=1+1", "@sum", "+x", "-dash"])
def test_names_are_no_formulas_and_no_options(name):
    assert runs.flat_name(name).startswith(f"_{name[1:]}_") and runs.flat_name(name[1:]) == name[1:]


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["", "..", "/", "a" * 1000, "é" * 300, "a/" * 600 + "b",
                                  "bad\udcff", "line\nfeed", "nul\0"])
def test_names_that_are_none_get_one(tmp_path, name):
    """One that can be written, is the same each time, and is no other's."""
    flat = runs.flat_name(name)
    (tmp_path / f"{flat}_distance.tif").write_text("x")
    assert flat == runs.flat_name(name) != runs.flat_name(name + "x")
    assert len(flat.encode()) <= runs.LONGEST


# --------------------------------------------------------------------- whose results these are

def results_of(out: Path, *arguments: str, weights: Path, **changes) -> tuple:
    """Exit code or error, and the rows of the summary."""
    config = infer.Config(out=str(out), weights=str(weights), overlay=False, **changes)
    try:
        code: int | str = infer.main(config, list(arguments))
    except ValueError as error:
        code = str(error)
    table = out / "summary.csv"
    return code, runs.read_table(table) if table.exists() else []


@pytest.fixture
def plates(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, plate in enumerate("ab"):
        (tmp_path / plate).mkdir()
        for well in ("A1", "A2"):
            PIL.Image.fromarray(test_images.noise(64, 80, dtype=np.uint8, seed=number)).save(
                tmp_path / plate / f"{well}.png")
            os.utime(tmp_path / plate / f"{well}.png", (1e9, 1e9))  # alike but for their pixels
    return tmp_path


def test_results_of_another_image_are_never_taken_for_its_own(plates, weights):
    code, rows = results_of(plates / "o", "a/A1.png", weights=weights)
    assert code == 0 and len(rows) == 1
    before = (plates / "o/A1_labels.tif").read_bytes()
    code, _ = results_of(plates / "o", "b/A1.png", weights=weights)
    assert "A1_labels.tif: comes from a/A1.png, which is another image than b/A1.png" in code
    assert (plates / "o/A1_labels.tif").read_bytes() == before
    (plates / "moved").mkdir()
    (plates / "a/A1.png").rename(plates / "moved/A1.png")          # the same image elsewhere
    assert results_of(plates / "o", "moved/A1.png", weights=weights)[0] == 0
    assert (plates / "o/A1_labels.tif").read_bytes() == before
    shutil.copy(plates / "b/A1.png", plates / "a/A1.png")
    code, _ = results_of(plates / "o", "a/A1.png", weights=weights)
    assert "A1_labels.tif: a/A1.png has changed since; overwrite=true makes it anew" in code


def test_results_of_other_settings_or_weights_are_told(plates, weights):
    assert results_of(plates / "o", "a/A1.png", weights=weights)[0] == 0
    code, _ = results_of(plates / "o", "a/A1.png", weights=weights, diameter="40", peak=0.6)
    assert "was made with diameter left out (now 40), peak left out (now 0.6); overwrite" in code
    other = plates / "other.pt"
    other.write_bytes(weights.read_bytes())            # the same weights under another name
    assert results_of(plates / "o", "a/A1.png", weights=other)[0] == 0
    rewritten(other, lambda content: content["settings"].update(peak=0.3))
    code, _ = results_of(plates / "o", "a/A1.png", weights=other)
    assert "was made with weights tiny.pt (now other.pt)" in code
    assert results_of(plates / "o", "a/A1.png", weights=other, overwrite=True)[0] == 0


def test_results_without_a_record_are_kept_and_empty_ones_made_anew(plates, weights):
    (plates / "o").mkdir()
    images.write_labels(plates / "o/A1_labels.tif", np.ones((64, 80), np.int32))   # drawn by hand
    code, _ = results_of(plates / "o", "a/A1.png", weights=weights)
    assert "is there and does not say how it was made" in code
    assert (images.read_labels(plates / "o/A1_labels.tif") == 1).all()
    (plates / "o/A1_labels.tif").write_bytes(b"")
    code, rows = results_of(plates / "o", "a/A1.png", weights=weights)
    assert code == 0 and [row["image"] for row in rows] == ["A1"]


def test_rows_of_the_summary_come_back_from_the_results(plates, weights):
    """After a kill in a bad moment, and where another process wrote the table."""
    assert results_of(plates / "o", "a", weights=weights)[0] == 0
    table = plates / "o/summary.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0], lines[2].replace("A2", "B7")]) + "\n")
    code, rows = results_of(plates / "o", "a", weights=weights)
    assert code == 0 and sorted(row["image"] for row in rows) == ["A1", "A2", "B7"]
    table.unlink()
    code, rows = results_of(plates / "o", "a", weights=weights)
    assert [row["image"] for row in rows] == ["A1", "A2"]
    assert [",".join(row.values()) for row in rows] == lines[1:]


def test_two_runs_into_one_folder_lose_no_row(plates, weights, monkeypatch):
    """The second begins and ends while the first is at work."""
    real = infer.segment_file

    def busy(path, *rest, **options):
        monkeypatch.setattr(infer, "segment_file", real)
        assert results_of(plates / "o", "b/A2.png", weights=weights)[0] == 0
        return real(path, *rest, **options)

    monkeypatch.setattr(infer, "segment_file", busy)
    code, rows = results_of(plates / "o", "a/A1.png", weights=weights)
    assert code == 0 and sorted(row["image"] for row in rows) == ["A1", "A2"]


def test_a_full_disk_ends_the_run_and_says_where(plates, weights, monkeypatch):
    def full(path, *rest, **options):
        raise OSError(28, "No space left on device", None)

    calls, real = [], infer.segment_file

    def counted(path, name, *rest, **options):
        calls.append(name)
        if len(calls) == 2:
            monkeypatch.setattr(tifffile, "imwrite", full)
        return real(path, name, *rest, **options)

    monkeypatch.setattr(infer, "segment_file", counted)
    with pytest.raises(OSError, match=r"A2_labels.tif: no space left on this disk, .* MB free; "
                                      r"some .* MB for the 3 images left; make room"):
        infer.main(infer.Config(out=str(plates / "o"), weights=str(weights)), ["a", "b"])
    assert len(calls) == 2 and not list((plates / "o").glob(".*"))


def test_temporary_files_of_killed_runs_are_swept(plates, weights):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (plates / "o").mkdir()
    for process in (ended.pid, os.getppid()):
        (plates / f"o/.0123.{runs.HOST}.{process}.part").write_text("half")
    assert results_of(plates / "o", "a/A1.png", weights=weights)[0] == 0
    assert [path.name for path in (plates / "o").glob(".*")] == [
        f".0123.{runs.HOST}.{os.getppid()}.part"]                  # that one is alive


# ------------------------------------------------------------------------------- damage at random

def kinds(folder: Path) -> dict[str, tuple[bytes, object]]:
    """A whole file of each kind, and what reads it."""
    pixels, colours = test_images.noise(40, 60), test_images.COLOURS
    files: dict[str, object] = {}
    def tiff(name, array=pixels, **options):
        tifffile.imwrite(folder / name, array, **options)
        files[name] = images.read_image
    tiff("plain.tif")
    tiff("deflate.tif", compression="zlib", predictor=True)
    tiff("tiled.tif", tile=(16, 16), compression="zlib")
    tiff("big.tif", bigtiff=True)
    tiff("x.ome.tif", ome=True)
    tiff("channels.tif", np.stack([pixels] * 3), imagej=True, metadata={"axes": "CYX"})
    PIL.Image.fromarray(colours).save(folder / "lzw.tif", compression="tiff_lzw")
    PIL.Image.fromarray(colours).save(folder / "x.png")
    PIL.Image.fromarray(colours).save(folder / "x.jpg")
    np.save(folder / "x.npy", pixels)
    for name in ("lzw.tif", "x.png", "x.jpg", "x.npy"):
        files[name] = images.read_image
    (folder / "x.geojson").write_text(json.dumps({"features": [{
        "type": "Feature", "properties": {"objectType": "cell"}, "geometry": {
            "type": "Polygon", "coordinates": [[[1, 1], [9, 1], [9, 9], [1, 1]]]}}]}))
    files["x.geojson"] = lambda path: data.read_geojson(path, (40, 60))
    (folder / "x.yaml").write_text("steps: 30\ndata:\n  root: x\n  fields: 3\n")
    files["x.yaml"] = lambda path: runs.load_config(train_seg.Config, path)
    return {name: ((folder / name).read_bytes(), read) for name, read in files.items()}


def test_200_damaged_files_are_read_or_are_one_line(tmp_path):
    rng = np.random.default_rng(7)
    whole = kinds(tmp_path)
    assert len(whole) == 12
    names, refused = sorted(whole), 0
    for number in range(200):
        name = names[number % 12]
        content, read = whole[name]
        body = bytearray(content)
        if rng.random() < 0.4:
            body = body[:rng.integers(len(body))]
        else:
            for place in rng.integers(0, len(body), rng.integers(1, 20)):
                body[place] = rng.integers(256)
        (tmp_path / name).write_bytes(body)
        try:
            read(tmp_path / name)
        except (ValueError, OSError) as error:
            refused += 1
            assert name in str(error) and "\n" not in str(error).strip(), error
    assert 80 < refused < 200


# ----------------------------------------------------------------------------- a whole run of it

def test_one_of_each_between_good_images(tmp_path, weights):
    """All good ones are done, one line says what is wrong with each other, and memory stays under
    2 GB although the files claim hundreds."""
    folder = tmp_path / "in"
    folder.mkdir()
    good = ["a.tif", "m.png", "z.tif", "deep.tif"]
    pixels = synthetic.field(3, (96, 128), 5, diameter=24).pixels[0]
    for name in ("a.tif", "z.tif"):
        tifffile.imwrite(folder / name, pixels)
    PIL.Image.fromarray((pixels >> 8).astype(np.uint8)).save(folder / "m.png")
    deep = folder.joinpath(*["d" * 100] * 3)
    deep.mkdir(parents=True)
    tifffile.imwrite(deep / "deep.tif", pixels)
    foreign = os.path.join(os.fsencode(folder), b"b\xff.tif")      # a name that is not UTF-8
    Path(os.fsdecode(foreign)).write_bytes((folder / "a.tif").read_bytes())
    bad = {"c_jpeg_of_65500.jpg": test_images.jpeg_that_claims(65500, 65500),
           "d_png_of_2_31.png": test_images.png(2**31 - 1, 2**31 - 1, 8, 0, bytes(64)),
           "e_png_of_zeros.png": png_of_zeros(100_000),
           "f_tiff_of_2_32.tif": tiff_that_claims(16, 2**32),
           "g_empty.tif": b"", "h_text.png": b"no image",
           "j_unknown_axes.tif": None, "k_nan.tif": None, "l_cut_stack.tif": None}
    for name, body in bad.items():
        (folder / name).write_bytes(body or b"")
    tifffile.imwrite(folder / "j_unknown_axes.tif", np.stack([pixels] * 5), metadata=None)
    tifffile.imwrite(folder / "k_nan.tif", np.full((64, 64), np.nan, np.float32))
    stack(folder / "l_cut_stack.tif", 0.6)
    (folder / "i_deflate_bomb.tif").write_bytes(
        test_images.gray_tiff(192, 160, 8, 8, test_images.zeros_deflated(4096 << 20)))
    code = ("import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))\n"
            f"sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['infer.py', *{[str(folder)]!r}, "
            f"'out={tmp_path / 'out'}', 'weights={weights}']\n"
            "import atexit; atexit.register(lambda: print('PEAK', "
            "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))\n"
            "import infer, runs; runs.script(infer.__doc__, infer.Config, infer.main)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          errors="backslashreplace", env={**os.environ, "OMP_NUM_THREADS": "1"})
    said = done.stderr
    assert done.returncode == 1 and "Traceback" not in said, said
    assert int(done.stdout.split("PEAK")[1]) < 2 << 20             # kB
    warnings = [line for line in said.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == len(bad), said
    for name in bad:
        assert sum(name in line for line in warnings) == 1, (name, said)
    assert f"{len(bad)} of {len(bad) + len(good) + 2} images could not be done" in said
    rows = runs.read_table(tmp_path / "out/summary.csv")
    assert len(rows) == len(good) + 2                              # b and the bomb's black pixels
    names = {row["image"] for row in rows}
    assert {"a", "m", "z", "i_deflate_bomb"} < names
    assert all(len(list((tmp_path / "out").glob(f"{name}_*"))) == 3 for name in names)
    assert (tifffile.imread(tmp_path / "out/a_labels.tif")
            == tifffile.imread(tmp_path / "out/z_labels.tif")).all()
