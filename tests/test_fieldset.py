"""fieldset.py: which fields a backbone learns from, when they come from files of many kinds."""
from __future__ import annotations

import numpy as np
import pytest
import tifffile

import fieldset


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, pixels, imagej=True, metadata={"axes": "CYX"[-pixels.ndim:]})


@pytest.fixture
def folders(tmp_path):
    """Three fields of two channels, 48 px; a larger image of five channels, a small one of one, and labels."""
    rng = np.random.default_rng(0)
    for name in "abc":
        write(tmp_path / f"stains/{name}.tif", rng.integers(0, 60000, (2, 48, 48), dtype=np.uint16))
    write(tmp_path / "more/five.tif", (np.arange(5)[:, None, None] * 1000 + np.arange(70)).repeat(40, 1).astype(np.uint16))
    write(tmp_path / "more/below/one.tif", np.arange(20 * 24, dtype=np.uint8).reshape(20, 24))
    write(tmp_path / "more/below/one_masks.tif", np.ones((20, 24), np.uint8))
    return dict(root=str(tmp_path), folders=("stains", "more"), held=1)


def test_unlike_images_become_fields_of_one_size(folders):
    config = fieldset.Data(**folders, square=32, fields=2, field_size=64, field_cells=8, field_diameter=20)
    entries, channels, read = fieldset.resident(config, 0)
    fields = {name: pixels for name, pixels, _ in map(read, entries)}
    assert channels == ("1", "2")
    held, *train = map(read, entries)
    assert held[1].shape == (2, 48, 48)                                      # whole, and nothing of it is trained on
    assert not any(name.startswith(f"{held[0]} ") for name, *_ in train)
    assert {pixels.shape for _, pixels, _ in train} == {(2, 32, 32)}
    stains = [name for name in "abc" if name != held[0]]
    wanted = {f"{name} {y},{x}" for name in stains for y in (0, 16) for x in (0, 16)}
    wanted |= {f"five {y},{x}" for y in (0, 8) for x in (0, 19, 38)} | {"one 0,0", "synthetic 0", "synthetic 1"}
    assert {name for name, *_ in train} == wanted and len(train) == len(wanted)
    whole = tifffile.imread(f"{folders['root']}/stains/{stains[0]}.tif")
    assert (fields[f"{stains[0]} 16,0"] == whole[:, 16:, :32]).all()         # squares cover an image to its edges
    five = fields["five 8,38"]
    assert len(set(five[:, 0, 0] // 1000)) == 2                              # two of its five channels, not one twice
    assert (five % 1000 == np.arange(38, 70)).all()
    one = fields["one 0,0"]
    assert (one[0] == one[1]).all()                                          # its only channel, twice
    assert (one[0, :20, 24:] == one[0, :20, 23:15:-1]).all() and (one[0, 20:] == one[0, 19:7:-1]).all()    # mirrored


def test_the_same_lot_every_time(folders):
    config = fieldset.Data(**folders, square=32)
    first, second = ([entry() for entry in fieldset.resident(config, 3)[0]] for _ in range(2))
    assert all(a[0] == b[0] and (a[1] == b[1]).all() for a, b in zip(first, second))
    seen = {next(name for name, *_ in map(lambda make: make(), fieldset.resident(config, seed)[0][:1])) for seed in range(9)}
    assert seen == {"a", "b", "c"}                                           # the seed decides what is held out


def test_what_is_measured_on_has_the_same_stains(folders, tmp_path):
    write(tmp_path / "stains/b.tif", np.ones((3, 48, 48), np.uint16))
    config = fieldset.Data(**{**folders, "held": 2}, square=32)
    with pytest.raises(ValueError, match="b.tif: 3 channels, expected 2 as in a.tif"):
        for seed in range(9):                                                # b is held out with most of them
            [make() for make in fieldset.resident(config, seed)[0][:2]]


def test_pool_holds_what_is_not_held_out(folders):
    pool = fieldset.pool(fieldset.Data(**folders, square=32), 4, 0, "cpu")
    assert pool.pixels.shape == (15, 2, 32, 32)                              # 2 x 4 of the stains, 6 of five, one
    assert fieldset.size(fieldset.Data(**folders, square=32), 0) == (15, ("1", "2"), (32, 32))


@pytest.mark.parametrize("change, said", [
    (dict(match="nowhere"), "no images with 'nowhere' in their path"),
    (dict(held=3), "3 images, expected more than data.held=3"),
    (dict(square=None), r"\.tif: \(., .., ..\), expected \(2, 48, 48\) as in a.tif; data.square"),
    (dict(square=0), "data.square=0"),
    (dict(square=None, fields=3), "folders and fields given"),
])
def test_wrong_data_are_said(folders, change, said):
    with pytest.raises(ValueError, match=said):
        entries, _, read = fieldset.resident(fieldset.Data(**{**folders, "square": 32, **change}), 0)
        for entry in entries:
            read(entry)
