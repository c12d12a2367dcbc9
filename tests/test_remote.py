"""infer.py on S3 (a server on loopback) and in shards: every image once, whatever happens meanwhile."""
import csv
import functools
import io
import os
import signal

import pytest
import tifffile

import data
import infer
import remote
import store
import synthetic
from fault_proxy import FaultyS3

Config = functools.partial(infer.Config, weights="demo_synthetic")

NAMES = ["p1/a.tif", "p1/b.tif", "p10/c.tif", "p1/deep/d.tif"]


@pytest.fixture(scope="module")
def pictures():
    """Four small images as files."""
    bodies = {}
    for number, name in enumerate(NAMES):
        field, file = synthetic.field(40 + number, 96, 12, diameter=28), io.BytesIO()
        tifffile.imwrite(file, field.pixels[field.channels.index("ER")])
        bodies[name] = file.getvalue()
    return bodies


@pytest.fixture(scope="module")
def s3(pictures):
    with FaultyS3(("cells",)) as server:
        for name, body in pictures.items():
            server.client.put_object(Bucket="cells", Key=f"raw/{name}", Body=body, ACL="public-read")
        yield server


@pytest.fixture(autouse=True)
def account(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setattr(store, "LONGEST", 0.5)


@pytest.fixture
def folder(tmp_path, pictures):
    for name, body in pictures.items():
        (tmp_path / "raw" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "raw" / name).write_bytes(body)
    return tmp_path / "raw"


def listed(s3, prefix):
    found = s3.client.list_objects_v2(Bucket="cells", Prefix=prefix).get("Contents", [])
    return sorted(entry["Key"].removeprefix(prefix) for entry in found)


def get(s3, key):
    return s3.client.get_object(Bucket="cells", Key=key)["Body"].read()


def test_from_s3_to_s3_is_what_folders_give(s3, folder, tmp_path, capsys):
    assert infer.main(Config(out=str(tmp_path / "here")), [str(folder)]) == 0
    config = Config(out="s3://cells/out1", endpoint=s3.url)
    s3.set(errors=0.2)
    assert infer.main(config, ["s3://cells/raw/"]) == 0
    s3.set()
    here = sorted(path.name for path in (tmp_path / "here").iterdir())
    assert listed(s3, "out1/") == here and len(here) == 3 * len(NAMES) + 1
    for name in here:
        if name != "summary.csv":                             # it has the seconds
            assert get(s3, f"out1/{name}") == (tmp_path / "here" / name).read_bytes(), name
    rows = list(csv.DictReader(io.StringIO(get(s3, "out1/summary.csv").decode())))
    assert sorted(row["image"] for row in rows) == ["p10_c", "p1_a", "p1_b", "p1_deep_d"]
    assert max(int(row["cells"]) for row in rows) > 0

    s3.client.delete_object(Bucket="cells", Key="out1/p1_b_cells.csv")
    capsys.readouterr()
    assert infer.main(config, ["s3://cells/raw"]) == 0        # makes that one again, and keeps the others' rows
    assert "1 image," in (said := capsys.readouterr().out) and "3 of 4 images have their results" in said
    assert len(list(csv.DictReader(io.StringIO(get(s3, "out1/summary.csv").decode())))) == 4
    assert listed(s3, "out1/") == here


def test_a_folder_is_no_prefix_and_an_object_is_itself(s3, tmp_path):
    config = Config(endpoint=s3.url)
    assert list(infer.find_images(["s3://cells/raw/p1"], config).values()) == ["a", "b", "deep_d"]
    assert infer.find_images(["s3://cells/raw/p1"], Config(endpoint=s3.url, pattern="b*")) == {"s3://cells/raw/p1/b.tif": "b"}
    assert infer.main(Config(out=str(tmp_path), endpoint=s3.url), ["s3://cells/raw/p10/c.tif"]) == 0
    assert tifffile.imread(tmp_path / "c_labels.tif").shape == (96, 96)


def test_mistakes_on_s3_are_one_line(s3, tmp_path, monkeypatch, capsys):
    config = Config(out=str(tmp_path / "out"), endpoint=s3.url)
    for wrong, problem in (("s3://cells/nothing", "no image in this folder"), ("s3://gone/raw", "cannot be listed, 404"),
                           ("s3://cells/raw/none.tif", "s3://cells/raw/none.tif: 404 NoSuchKey")):
        with pytest.raises(OSError, match=problem):
            infer.main(config, [wrong])
    for wrong, problem in (("s3://", "names no bucket"), ("s3://cells/raw/*.tif", "pattern=\\*.tif")):
        with pytest.raises(ValueError, match=problem):
            infer.main(config, [wrong])
    with pytest.raises(OSError, match="s3://gone/out.*404"):
        infer.main(Config(out="s3://gone/out", endpoint=s3.url), ["s3://cells/raw"])

    s3.client.put_object(Bucket="cells", Key="broken/a.tif", Body=b"no image", ACL="public-read")
    s3.client.put_object(Bucket="cells", Key="broken/b.tif", Body=get(s3, "raw/p1/b.tif"), ACL="public-read")
    with pytest.raises(ValueError, match="1 of 2 images could not be done: s3://cells/broken/a.tif"):
        infer.main(config, ["s3://cells/broken"])
    assert (tmp_path / "out" / "b_labels.tif").exists()
    assert "warning: s3://cells/broken/a.tif" in (said := capsys.readouterr().err) and "/tmp" not in said

    with monkeypatch.context() as patched, pytest.raises(ValueError, match=r"s3://cells/raw: The config profile \(nope\) could not be found"):
        patched.setenv("AWS_PROFILE", "nope")
        infer.main(config, ["s3://cells/raw"])
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(OSError, match="no AWS credentials found"):
        infer.main(Config(out="s3://cells/out", endpoint=s3.url), ["s3://cells/raw"])


def test_four_shards_do_every_image_once_also_after_a_stop(folder, tmp_path, monkeypatch):
    for number in range(5):                                   # 9 images: shards of 3, 2, 2, 2
        (folder / f"more{number}.tif").write_bytes((folder / "p1/a.tif").read_bytes())
    out, real, done = tmp_path / "out", infer.segment_file, []

    def counted(path, name, *rest, **options):
        row = real(path, name, *rest, **options)
        done.append(name)
        return row

    def told(path, name, *rest, **options):                   # Slurm's signal comes in the middle of the first image
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
    assert shard(1, told) == 85 and len(done) == 1            # finishes its image, then asks to be queued again
    assert signal.getsignal(signal.SIGUSR1) == before
    with pytest.raises(KeyboardInterrupt):
        shard(2, killed)
    assert len(done) == 2
    for number in (3, 4, 2, 1):
        assert shard(number, counted) == 0
    assert sorted(done) == sorted(infer.find_images([str(folder)], Config()).values())      # nine, none twice
    rows = [row["image"] for number in (1, 2, 3, 4)
            for row in csv.DictReader(open(out / f"summary_{number}_of_4.csv", newline=""))]
    assert sorted(rows) == sorted(done)
    assert all(data.read_labels(out / f"{name}_labels.tif").ndim == 2 for name in done)


@pytest.mark.parametrize("wrong", ["0/4", "5/4", "4", "1/0", "a/b"])
def test_shard_is_checked(wrong):
    with pytest.raises(ValueError, match="expected i/n"):
        Config(shard=wrong)


def test_the_next_image_comes_while_this_one_is_worked_on(s3):
    addresses = [f"s3://cells/raw/{name}" for name in NAMES]
    seen = []
    for address, file in remote.fetched(addresses, s3.url):
        seen.append(file)
        assert file.read_bytes() == get(s3, address.removeprefix("s3://cells/"))
        assert not any(before.exists() for before in seen[:-1])
    assert not seen[-1].exists() and [file.name for file in seen] == ["a.tif", "b.tif", "c.tif", "d.tif"]


def test_an_interruption_leaves_whole_images_and_the_table(s3, monkeypatch):
    real = infer.segment_file

    def interrupted(file, name, out, *rest):
        if name == "p1_b":
            (out / "p1_b_labels.tif").write_bytes(b"half")
            raise KeyboardInterrupt
        return real(file, name, out, *rest)

    monkeypatch.setattr(infer, "segment_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        infer.main(Config(out="s3://cells/out2", endpoint=s3.url), ["s3://cells/raw"])
    assert listed(s3, "out2/") == ["p1_a_cells.csv", "p1_a_labels.tif", "p1_a_overlay.png", "summary.csv"]
