"""kinds.py: images get the setting of the training set that they look like, if that set has one of its own."""
from __future__ import annotations

import csv

import numpy as np
import pytest
import skimage.io
import torch

import infer
import kinds
import model
import segment
import trainset

OWN = dict(peak=0.7, fill=0.2, min_area=9, depth=0.3, smooth=1.5, shape=0.1)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    backbone = model.ViT(dim=32, depth=4, heads=2, patch=8, layerscale=1.0)
    return model.DINOCell(backbone, (16, 16, 8), 8, model.Settings(tile=32)).eval()


def look(kind: str, seed: int, side: int = 70) -> np.ndarray:
    """(3, side, side): stripes, or bright dots on black."""
    rng = np.random.default_rng([seed, len(kind)])
    if kind == "stripes":
        image = 0.5 + 0.3 * np.sin(np.arange(side) / rng.uniform(1, 2))[None].repeat(side, 0)
    else:
        image = (rng.random((side, side)) < 0.05).astype(float)
    return (image[None].repeat(3, 0) + rng.normal(0, 0.02, (3, side, side))).clip(0, 1).astype(np.float32)


def tiles(image: np.ndarray) -> torch.Tensor:
    return segment.glimpses(segment.as_source(image), segment.UNIT, image.shape[1:], 32)


def nearest(net, image: np.ndarray | torch.Tensor) -> str:
    seen = kinds.token(net, tiles(image) if isinstance(image, np.ndarray) else image)
    return kinds.nearest(net, {name: seen for name in kinds.sets(net)})


def best(**changes) -> dict:
    own = dict(images=2, score=0.2, own_score=0.4, setting=OWN)
    return dict(stripes={**own, **changes}, dots=dict(images=9, score=0.5, own_score=0.51, setting=OWN))


def learnt(net, **changes) -> dict:
    images = {kind: trainset.Look([tiles(look(kind, seed)) for seed in range(6)], None) for kind in ("stripes", "dots")}
    return kinds.learnt(net, images, kinds.gaining(best(**changes), images))


def test_the_nearest_set_decides(net):
    net.settings.kinds = learnt(net)
    for seed in range(50, 60):
        assert nearest(net, look("stripes", seed)) == "stripes"
        assert nearest(net, look("dots", seed, 33)) == "dots"              # gains too little: as all
    assert kinds.settings(net) == {kinds.SHARED: {}, "stripes": OWN, "dots": {}} and kinds.named(net, "str") == "stripes"
    assert kinds.settings_of(net, "dots") == kinds.settings_of(net, kinds.SHARED) == net.settings != kinds.settings_of(net, "stripes")


def test_a_set_of_many_looks_and_one_in_their_midst(net, monkeypatch):
    """The image in the most similar direction decides, not the mean of a set, which is the other's here, and not how far from the
    middle an image lies, which goes with its contrast."""
    def token(net, tiles):                                                   # on a circle: where, and how far from its middle
        turn, radius = 2 * torch.pi * tiles[0, 0, 0, 0], tiles[0, 0, 0, 1]
        return 5 + radius * torch.stack([torch.cos(turn), torch.sin(turn)])

    def place(turn, radius=1.0):
        return torch.tensor([turn, radius]).view(1, 1, 1, 2)
    monkeypatch.setattr(kinds, "token", token)
    images = {name: trainset.Look([place(turn) for turn in turns], None)
              for name, turns in (("stripes", (0.0, 0.1, 0.5, 0.6)), ("dots", (0.25, 0.3, 0.75, 0.8)))}
    net.settings.kinds = kinds.learnt(net, images, kinds.gaining(best(), images))
    for turn, expected in ((0.02, "stripes"), (0.12, "stripes"), (0.22, "dots"), (0.31, "dots"), (0.48, "stripes"), (0.72, "dots")):
        assert nearest(net, place(turn)) == nearest(net, place(turn, 9.0)) == nearest(net, place(turn, 0.2)) == expected


@pytest.mark.parametrize("unclear", ["all", "nearest"])
def test_an_image_of_no_clear_kind_is_nobodys(net, unclear):
    """Between two decoders, or far from all. Between two sets of one decoder, or without that in the file, the nearest decides."""
    net.settings.kinds = dict(unclear=unclear, spread=[1.0, 1.0, 1.0], sets=[
        dict(name=name, setting={}, decoder=decoder, tokens=[at])
        for name, decoder, at in (("east", "a", [1.0, 0.0, 0.0]), ("north", "b", [0.8, 0.6, 0.0]),
                                  ("west", "b", [-1.0, 0.0, 0.0]), ("south", "b", [-0.8, -0.6, 0.0]))])

    def at(degrees, up=0.0):
        turn = np.deg2rad(degrees)
        return kinds.nearest(net, dict.fromkeys(kinds.sets(net), torch.tensor([np.cos(turn), np.sin(turn), up]).float()))
    assert at(5) == at(-15) == "east" and at(32) == at(45) == "north"
    assert at(198) == at(198, 0.2) == "west"                                 # in the middle of two that have the same decoder
    for unsure, near in ((at(18), "east"), (at(-60), "east"), (at(5, 2.0), "east"), (at(35, 0.6), "north"), (at(198, 0.6), "west")):
        assert unsure == (kinds.SHARED if unclear == "all" else near)
    del net.settings.kinds["unclear"]
    assert at(18) == at(5, 2.0) == "east"


def test_the_same_mean_and_another_deviation(net):
    """Of tokens within a tile; tiles that differ from one another are no deviation."""
    flat, lively = torch.full((4, 3, 32, 32), 0.5), torch.full((4, 3, 32, 32), 0.5)
    lively[:, :, :16] = 0.0
    lively[:, :, 16:] = 1.0
    deviation = [kinds.token(net, tiles)[32:].norm() for tiles in (flat, lively, torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32)]))]
    assert deviation[1] > 3 * deviation[0] and deviation[1] > 3 * deviation[2]
    assert kinds.token(net, flat[:, :, :8, :8]).isfinite().all()             # one token


@pytest.mark.parametrize("change", [dict(own_score=0.21), dict(images=9, own_score=0.215), dict(images=2, own_score=0.245),
                                    dict(images=1, own_score=0.29)])
def test_no_setting_without_a_gain_that_was_seen(net, change):
    assert learnt(net, **change) == {}


@pytest.mark.parametrize("change", [dict(images=9, own_score=0.225), dict(images=2, own_score=0.255), dict(images=1, own_score=0.31)])
def test_the_fewer_images_the_more_must_be_gained(net, change):
    assert learnt(net, **change)["sets"][0]["setting"] == OWN


def test_one_set_needs_no_kinds(net):
    assert kinds.gaining({"stripes": best()["stripes"]}, ["stripes"]) == {} == kinds.learnt(net, {}, {})


def test_sets_to_validate_on_may_be_others(net):
    """They say nothing of how the sets that were trained on look."""
    others = {"other": best()["stripes"], "more": best()["dots"]}
    assert kinds.gaining(others, ["stripes", "dots"]) == {} == kinds.gaining(best(), ["stripes"])
    assert kinds.gaining(best(), ["stripes", "dots"]) == {"stripes": dict(setting=OWN)}


def test_segment_takes_the_setting_and_gives_way(net, monkeypatch):
    net.settings.kinds = learnt(net)
    asked = []

    def watershed(distance, *setting):
        asked.append(setting)
        return torch.zeros(distance.shape, dtype=torch.int32)
    monkeypatch.setattr(segment, "watershed", watershed)
    segment.segment(look("stripes", 70), net)
    assert asked.pop() == (0.7, 0.2, 9, 0.3, 1.5, 0.1, 16)
    segment.segment(look("stripes", 70), net, depth=0.1, smooth=0, shape=0)
    assert asked.pop() == (0.7, 0.2, 9, 0.1, 0, 0, 16)
    segment.segment(look("stripes", 70), net, scale=0.5)                     # px of the network are two of the image
    assert asked.pop() == (0.7, 0.2, 36, 0.3, 3.0, 0.05, 32)
    plain = net.settings
    for image, kind in (("dots", None), ("stripes", "shared")):
        segment.segment(look(image, 70), net, kind=kind)
        assert asked.pop() == (plain.peak, plain.fill, plain.min_area, plain.depth, plain.smooth, plain.shape, 16)
    segment.segment(look("dots", 70), net, kind="stripes")
    assert asked.pop() == (0.7, 0.2, 9, 0.3, 1.5, 0.1, 16)


def test_each_kind_knows_how_wide_its_cells_are(net, monkeypatch):
    """Told their diameter, an image is shown to each kind with cells as wide as in its images, and goes through at its size."""
    net.settings.diameter, net.settings.kinds = 10.0, learnt(net)
    net.settings.kinds["sets"][0]["setting"]["diameter"] = 40.0              # of stripes; dots have nothing of their own
    assert segment.scale_for(20, net) == 0.5 and segment.scale_for(20, net, "stripes") == 2
    shown, seen = [], segment.glimpses
    monkeypatch.setattr(segment, "glimpses", lambda source, limits, size, tile: shown.append(size) or seen(source, limits, size, tile))
    segment.kind_of(look("dots", 5), net, diameter=20)
    assert sorted(shown) == [(35, 35), (140, 140)]
    shown.clear()
    net.settings.kinds["sets"][0]["setting"]["zoom"] = 0.5                   # the network saw stripes at half their size
    segment.kind_of(look("dots", 5), net, diameter=20)
    assert sorted(shown) == [(35, 35), (280, 280)]
    shown.clear()
    segment.kind_of(look("dots", 5), net)
    assert shown == [(70, 70)]                                               # not told, all look at the image as it is
    del net.settings.kinds["sets"][0]["setting"]["zoom"]
    sizes, distances = [], segment._distances
    monkeypatch.setattr(segment, "_distances", lambda source, limits, size, model, tile, overlap, *more:
                        sizes.append((size, overlap)) or distances(source, limits, size, model, tile, overlap, *more))
    for kind, expected in (("stripes", ((140, 140), 16)), ("shared", ((35, 35), 10))):       # 40 px is more than half a tile
        segment.segment(look("dots", 5), net, diameter=20, kind=kind)
        assert sizes.pop() == expected
    segment.segment(look("dots", 5), net, diameter=20, scale=2, kind="stripes")
    assert sizes.pop()[0] == (280, 280)
    shown.clear()
    assert segment.kind_of(look("stripes", 70), net) == "stripes" and shown == [(70, 70)]    # not told: as it is


def test_tiles_of_another_size_do_not_change_the_kind(net, monkeypatch):
    """The weights know images by tiles of their own size; tile= is about speed and memory."""
    net.settings.kinds = learnt(net)
    shown, seen = [], segment.glimpses
    monkeypatch.setattr(segment, "glimpses", lambda source, limits, size, tile: shown.append(tile) or seen(source, limits, size, tile))
    segment.segment(look("dots", 5), net, tile=64)
    assert shown == [32]


def test_a_kind_of_large_cells_does_not_forbid_small_ones(net):
    net.settings.diameter, net.settings.kinds = 10.0, learnt(net)
    net.settings.kinds["sets"][0]["setting"]["diameter"] = 40.0              # of stripes; 40 / 3 is more than 10 times
    assert segment.kind_of(look("stripes", 5), net) == "stripes"
    assert segment.kind_of(look("stripes", 5, 20), net, diameter=3) == "dots"
    segment.segment(look("stripes", 5, 20), net, diameter=3)
    with pytest.raises(ValueError, match="diameter=0.5: the image would be enlarged 20 times"):
        segment.segment(look("stripes", 5, 20), net, diameter=0.5)
    with pytest.raises(ValueError, match="diameter=3: the image would be enlarged 13 times"):
        segment.segment(look("stripes", 5, 20), net, diameter=3, kind="stripes")


def test_kinds_travel_with_the_weights(net, tmp_path):
    net.settings.kinds = learnt(net)
    model.save(net, tmp_path / "net.pt", half=True)
    read = model.load(tmp_path / "net.pt")
    assert nearest(read, look("stripes", 80)) == "stripes" and kinds.settings(read)["stripes"] == OWN
    assert nearest(read, look("dots", 80)) == "dots"             # and not one answer for all


def test_names_are_short_where_that_suffices(net):
    def names(*given):
        images = {name: trainset.Look([tiles(look("stripes", 0))], None) for name in given}
        return [one["name"] for one in kinds.learnt(net, images, {given[0]: best()["stripes"]})["sets"]]
    assert names("phase/train ^a", "dots/train") == ["phase/train", "dots/train"]
    assert names("phase/train ^a", "phase/train ^b") == ["phase/train ^a", "phase/train ^b"]


def test_a_name_may_begin_another(net):
    images = {name: trainset.Look([tiles(look(kind, 0))], 20.0) for name, kind in (("cells", "stripes"), ("cells_dense", "dots"))}
    net.settings.kinds = kinds.learnt(net, images, dict.fromkeys(images, best()["stripes"]))
    assert kinds.settings(net)["cells"] == dict(OWN, diameter=20.0)
    assert kinds.named(net, "cells") == "cells" and kinds.named(net, "cells_") == "cells_dense"
    assert kinds.named(net, "dense") == "cells_dense" and kinds.named(net, "s_") == "cells_dense" and kinds.named(net, "sh") == "shared"
    with pytest.raises(ValueError, match="kind=cel: several have this in their names, expected one of 'shared', 'cells', 'cells_dense'"):
        kinds.named(net, "cel")
    segment.segment(look("stripes", 0), net)


@pytest.mark.parametrize("kind", [None, "shared"])
def test_a_wrong_tile_is_said_first(net, kind):
    net.settings.kinds = learnt(net)
    with pytest.raises(ValueError, match="tile=100: expected a multiple of the patch, 8 px"):
        segment.segment(look("dots", 0), net, tile=100, kind=kind)


def test_a_folder_of_images_is_told_its_kind_once(net, tmp_path, capsys):
    """One plate, one setting; the summary says which an image got."""
    net.settings.kinds = learnt(net)
    model.save(net, tmp_path / "net.pt", half=True)
    (tmp_path / "in").mkdir()
    for name, kind in (("a", "stripes"), ("b", "dots")):
        skimage.io.imsave(tmp_path / f"in/{name}.png", (look(kind, 3)[0] * 255).astype(np.uint8), check_contrast=False)

    def kinds_of(out, **options):
        config = infer.Config(out=str(tmp_path / out), weights=str(tmp_path / "net.pt"), device="cpu", **options)
        assert infer.main(config, [str(tmp_path / "in")]) == 0
        with open(tmp_path / out / "summary.csv", newline="") as file:
            return [row["kind"] for row in csv.DictReader(file)]
    assert kinds_of("by_itself") == ["stripes", "dots"]
    assert "for 1 as stripes, 1 as dots; kind= gives all the same" in capsys.readouterr().out
    assert kinds_of("told", kind="str") == ["stripes", "stripes"] and "kind=" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="kind=spots: expected one of 'shared', 'stripes', 'dots'"):
        kinds_of("wrong", kind="spots")
    assert not list((tmp_path / "wrong").glob("*_labels.tif"))


def test_glimpses_are_corners_and_middle():
    image = np.arange(3 * 40 * 100, dtype=np.float32).reshape(3, 40, 100) / 12000
    found = segment.glimpses(segment.as_source(image), segment.UNIT, (40, 100), 32)
    for tile, (y, x) in zip(found, [(0, 0), (0, 68), (4, 34), (8, 0), (8, 68)], strict=True):
        np.testing.assert_allclose(tile, image[:, y:y + 32, x:x + 32], atol=1e-5)
    small = segment.glimpses(segment.as_source(image[:, :20, :32]), segment.UNIT, (20, 32), 32)
    assert small.shape == (1, 3, 32, 32)                                     # mirrored to a whole tile
    np.testing.assert_allclose(small[0, :, 20:], image[:, 18:6:-1, :32], atol=1e-5)


def test_a_zoom_of_its_own_makes_a_set_a_kind():
    """Where one zoom is not that of all; whatever else the set has stays."""
    sets = [trainset.Set("a", zoom=0.5), trainset.Set("b"), trainset.Set("c", zoom=0.25)]
    own = dict(a=dict(setting=OWN, decoder="a"), b=dict(setting=OWN))
    assert kinds.zoomed(own, sets, 1.0) == dict(a=dict(setting={**OWN, "zoom": 0.5}, decoder="a"), b=dict(setting=OWN), c=dict(setting={"zoom": 0.25}))
    assert kinds.zoomed({}, sets[:1], 0.5) == {} and own["a"]["setting"] is OWN and "zoom" not in OWN
