"""augment.py: the hash in closed form, crops that do not know their batch, targets by an oracle,
script."""
import dataclasses
import hashlib
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import tifffile
import torch
from conftest import ROOT
from scipy import ndimage, stats
from skimage.measure import label
from skimage.segmentation import find_boundaries

import augment
import data
import runs
import watershed
from augment import Augment, Draws, Resident, sample

CHANCES = [f.name for f in dataclasses.fields(Augment) if f.type == "float"]
OFF = Augment(scale=(1, 1), **{name: 0.0 for name in CHANCES})


def only(**changes):
    return dataclasses.replace(OFF, **changes)


def discs(seed, H, W, n, radius):
    """Labels of n discs, later ones over earlier ones, so that some touch and some are cut by the
    border."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:H, :W]
    labels = np.zeros((H, W), np.int32)
    for i in range(n):
        cy, cx, r = rng.uniform(0, H), rng.uniform(0, W), rng.uniform(0.5, 1) * radius
        labels[(y - cy) ** 2 + (x - cx) ** 2 < r * r] = i + 1
    return labels


def entry(seed, H, W, n=12, radius=14, colour=False):
    rng = np.random.default_rng(seed)
    labels = discs(seed, H, W, n, radius)
    pixels = rng.random((3 if colour else 1, H, W), np.float32) * 0.3 + 0.6 * (labels > 0)
    return f"{seed}", np.clip(np.broadcast_to(pixels, (3, H, W)), 0, 1), labels


def resident_of(entries, **options):
    return Resident((data.Labelled(*each) for each in entries), **options)


def crops(entries, config, images=None, size=64, seed=0, cap=4.0, B=8, **options):
    images = np.zeros(B, int) if images is None else images
    return sample(resident_of(entries, cap=cap, **options), images, np.arange(B), config, size,
                  seed, cap)


# ------------------------------------------------------------------------------------------- random

def test_hash_is_splitmix64():
    """The published first values of splitmix64 from seed 0; arrays and tensors agree."""
    state = np.array([0, augment.GOLDEN], np.int64)
    known = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    assert augment.scramble_draws(state).view(np.uint64).tolist() == known
    assert augment.scramble_draws(torch.from_numpy(state)).numpy().view(np.uint64).tolist() == known


def test_uniform_is_uniform_and_independent():
    numbers = np.arange(20000)
    draws = Draws.of(3, numbers)
    sets = [draws.uniform("a"), draws.uniform("b"), draws.uniform("a happens"),
            draws.uniform("c", 3)[:, 2],
            Draws.of(4, numbers).uniform("a"), Draws.of(3, numbers + 20000).uniform("a")]
    for u in sets:
        assert 0 < u.min() and u.max() < 1
        assert stats.kstest(u, "uniform").pvalue > 1e-3
        assert abs(np.corrcoef(u[1:], u[:-1])[0, 1]) < 0.03  # 4 sigma of 1 / sqrt(n)
    assert np.abs(np.corrcoef(sets) - np.eye(len(sets))).max() < 0.03
    assert np.array_equal(draws.at(numbers[5:7]).uniform("c", 3), draws.uniform("c", 3)[5:7])


def test_noise_is_normal_and_white():
    z = augment.crop_noise("n", Draws.of(0, np.arange(2)), torch.empty(2, 3, 101, 101))
    flat = z.double().flatten()
    n = len(flat)
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
        spread = np.sqrt(stats.norm.moment(2 * power) / n)  # of the mean of z^power
        assert abs((flat ** power).mean() - moment) < 4 * spread + (0.01 if power == 4 else 0)
    assert stats.kstest(flat.numpy()[::3], "norm").pvalue > 1e-3
    for a, b in ((z[..., 1:], z[..., :-1]), (z[:, :, 1:], z[:, :, :-1]), (z[:, 0], z[:, 1]),
                 (z[0], z[1])):
        assert abs((a * b).mean()) < 4 / np.sqrt(a.numel())


def test_ranges_are_log_uniform_and_chances_kept():
    draws = Draws.of(0, np.arange(20000), only(blur=0.3, blur_px=(0.5, 2),
                                               brightness_range=(-0.1, 0.3)))
    assert abs(draws.happens("blur").mean() - 0.3) < 0.015
    assert stats.kstest(np.log2(draws.within("blur_px")), "uniform", (-1, 2)).pvalue > 1e-3
    assert stats.kstest(draws.within("brightness_range"), "uniform", (-0.1, 0.4)).pvalue > 1e-3


@pytest.mark.parametrize("cap", [4.0, None])
def test_a_sample_does_not_know_its_batch(cap):
    """Bit for bit, with everything on, gray and colour mixed; number and seed matter."""
    entries = [entry(0, 80, 90), entry(1, 61, 75, colour=True), entry(2, 200, 110),
               entry(3, 90, 90, n=0)]
    resident = resident_of(entries, cap=cap)
    config = Augment(**{name: 0.5 for name in CHANCES})
    images = np.array([0, 1, 1, 2, 3, 0, 1, 2, 3, 2])
    numbers = np.array([7, 8, 9, 10, 11, 12, 2 ** 40, -5, 3, 4])
    whole = sample(resident, images, numbers, config, 53, 1, cap)
    for i in range(len(images)):
        alone = sample(resident, images[[i]], numbers[[i]], config, 53, 1, cap)
        assert all(torch.equal(a[i], b[0]) for a, b in zip(whole, alone)), i
    assert not torch.equal(whole[0][1], whole[0][2])  # one image under two numbers
    other = sample(resident, images, numbers, config, 53, 2, cap)
    assert all(not torch.equal(a, b) for a, b in zip(whole[0], other[0]))


def test_nothing_waits_for_the_device():
    """Meta tensors have no values: whatever would copy one to the host raises."""
    resident = resident_of([entry(0, 80, 90), entry(1, 60, 70, colour=True)], device="meta")
    everything = Augment(**{name: 1.0 for name in CHANCES})
    x, target, labels = sample(resident, [0, 1, 1, 0], np.arange(4), everything, 48, 0)
    assert (x.shape, target.shape, labels.shape) == ((4, 3, 48, 48), (4, 1, 48, 48), (4, 48, 48))
    assert x.is_meta and target.is_meta and labels.is_meta


def test_groups_are_drawn_equally():
    resident = resident_of((*entry(i, 20, 20, 3), name) for i, name in enumerate("abbbbbbbba"))
    images = resident.draw(0, np.arange(4000))
    count = np.bincount(images, minlength=10) / 4000
    assert np.abs(count[[0, 9]] - 0.25).max() < 0.03 and np.abs(count[1:9] - 1 / 16).max() < 0.02
    assert np.array_equal(images[100:110], resident.draw(0, np.arange(100, 110)))
    assert not np.array_equal(images, resident.draw(1, np.arange(4000)))


@pytest.mark.parametrize("cap", [4.0, None])
def test_images_in_a_file_give_the_same_crops(monkeypatch, cap):
    """What passes the limit lies in a file."""
    made, real = [], augment.tempfile.TemporaryFile
    monkeypatch.setattr(augment.tempfile, "TemporaryFile",
                        lambda **more: (made.append(1), real(**more))[1])
    entries = [entry(s, 40 + 10 * s, 50, 6, 12) for s in range(6)]
    numbers, crops = np.arange(12), []
    for limit in (np.inf, 4 * 40 * 50 * 1.5, 0):
        resident = resident_of(entries, cap=cap, limit=limit)
        crops.append(sample(resident, numbers % 6, numbers, Augment(), 48, 0, cap))
    assert len(made) == 4                                     # words and labels, twice
    for one, other in ((0, 1), (0, 2)):
        assert all(torch.equal(a, b) for a, b in zip(crops[one], crops[other]))


# ----------------------------------------------------------------------------------------- geometry

def test_a_disk_that_is_too_small_for_images_is_named():
    import resource
    before, pile = resource.getrlimit(resource.RLIMIT_FSIZE), augment.Pile(np.int64, 100)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10000, before[1]))
        with pytest.raises(OSError, match=f"{tempfile.gettempdir()}: no space for images"):
            pile.add(np.zeros(100000, np.int64))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_untouched_crops_are_copies():
    """All off: somewhere in the image, exactly these pixels and labels, to 16 bits."""
    name, pixels, labels = entry(5, 97, 120, colour=True)
    x, _, cut = crops([(name, pixels, labels)], OFF)
    places = set()
    for crop, piece in zip(x.numpy(), cut.numpy()):
        (i, j), = [(i, j) for i in range(97 - 63) for j in range(120 - 63)
                   if np.abs(pixels[:, i, j] - crop[:, 0, 0]).max() < 1e-5]
        assert np.abs(pixels[:, i:i + 64, j:j + 64] - crop).max() <= 0.51 / 65535
        assert np.array_equal(piece > 0, labels[i:i + 64, j:j + 64] > 0)
        assert len(np.unique(piece)) == len(np.unique(labels[i:i + 64, j:j + 64]))
        places.add((i, j))
    assert len(places) > 5


def test_quarters_and_mirrors_lose_nothing():
    """A crop of the whole square image is one of its eight images."""
    _, pixels, labels = entry(6, 64, 64, colour=True)
    x, _, _ = crops([("a", pixels, labels)], only(flip=0.5, quarter=1.0), B=24)
    eight = [np.rot90(p, k, (1, 2)) for p in (pixels, pixels[:, :, ::-1]) for k in range(4)]
    hits = [[np.abs(e - crop).max() < 1e-5 for e in eight] for crop in x.numpy()]
    assert all(sum(h) == 1 for h in hits) and (np.sum(hits, 0) > 0).sum() >= 6


def test_mirroring_in_closed_form():
    c = torch.tensor([[[-4.0, -3, -2, -1, 0, 1, 2, 3, 4, 5, 1.25, 2.5]]])
    folded = augment.mirrored_coordinates(c, torch.tensor([3.0])[:, None, None])
    assert folded.flatten().tolist() == [0, 1, 2, 1, 0, 1, 2, 1, 0, 1, 1.25, 1.5]
    assert augment.mirrored_coordinates(c, torch.tensor([1.0])[:, None, None]).abs().max() == 0


@pytest.mark.parametrize("changes", [
    dict(rotate=1.0, flip=0.5), dict(scale=(0.5, 0.5)), dict(scale=(0.3, 0.3)),
    dict(scale=(1.7, 1.7)),
    dict(elastic=1.0, elastic_px=(3, 3)), dict(scale=(0.4, 1.6), rotate=0.7, flip=0.5, quarter=1,
                                               elastic=1)])
def test_image_and_labels_move_together(changes):
    """An image that shows its labels: after any resampling the two agree but for the pixels at the
    edges."""
    labels = discs(7, 300, 320, 25, 24)
    shown = np.repeat((labels > 0).astype(np.float32)[None], 3, 0)
    x, target, cut = crops([("a", shown, labels)], only(**changes))
    inside = cut.numpy() > 0
    differ = (x[:, 0].numpy() > 0.5) != inside
    near = np.stack([ndimage.binary_dilation(find_boundaries(v), np.ones((3, 3))) for v in inside])
    assert differ.mean() < 0.03 and inside.mean() > 0.1
    assert (differ & ~near).mean() < 1e-3  # slivers that shrinking removes
    assert ((target[:, 0].numpy() > 0) == inside).all()


def test_scale_is_the_size_of_cells():
    """One disc of radius 20 px in the middle: its area grows with the square of the factor."""
    y, x = np.mgrid[:256, :256]
    labels = ((y - 128) ** 2 + (x - 128) ** 2 < 400).astype(np.int32)
    one = [("a", np.repeat(labels[None].astype(np.float32), 3, 0), labels)]
    for factor in (0.25, 0.5, 1.5):
        config = only(scale=(factor, factor), on_cell=1.0)
        _, _, cut = crops(one, config, size=64 if factor < 1 else 128)
        areas = (cut > 0).sum((1, 2)).double() / (labels.sum() * factor ** 2)
        assert (areas.median() - 1).abs() < 0.04
    resident = resident_of(one, diameter=10)
    assert abs(resident.diameter - 10) < 1e-9 and abs(resident.scale[0] - 0.25) < 0.005
    _, _, cut = sample(resident, [0], [0], OFF, 64, 0)
    assert abs(int((cut > 0).sum()) - np.pi * 25) < 8


def test_shrinking_averages():
    """A chessboard of single pixels becomes even gray; plain bilinear sampling would keep black and
    white."""
    board = np.indices((256, 256)).sum(0) % 2
    image = np.repeat(board[None].astype(np.float32), 3, 0)
    x, _, _ = crops([("a", image, np.zeros((256, 256), int))], only(scale=(0.4, 0.6), rotate=1.0),
                    size=96)
    assert (x - 0.5).abs().max() < 0.01


def test_crops_around_cells_and_elsewhere():
    """One small cell in a large image: on_cell finds it always, uniform crops as often as their
    area says."""
    labels = np.zeros((512, 512), int)
    labels[100:104, 300:304] = 1
    one = [("a", np.zeros((3, 512, 512), np.float32), labels)]
    assert (crops(one, only(on_cell=1.0), B=32)[2] > 0).any((1, 2)).all()
    seen = (crops(one, OFF, B=500)[2] > 0).any((1, 2)).float().mean()
    assert abs(seen - (67 / 449) ** 2) < 0.03  # 64 + 4 - 1 of 449 places, twice


# ---------------------------------------------------------------------------------------- distances

def oracle(labels, cap):
    """Each cell alone, in SciPy's transform; the border is no edge."""
    out = np.zeros(labels.shape)
    for i in np.unique(labels[labels > 0]):
        mask = labels == i
        d = ndimage.distance_transform_edt(mask) if not mask.all() else np.full(labels.shape,
                                                                                np.inf)
        out[mask] = (np.minimum(d, cap) / min(d.max(), cap))[mask]
    return out


@pytest.mark.parametrize("cap", [1.0, 2.0, 3.5, 4.0, 11.0, 13.0])
def test_distances_equal_the_oracle(cap):
    """Touching cells, cells cut by the border, a cell of one pixel, a cell that fills the crop, no
    cell."""
    stack = np.stack([discs(s, 70, 70, 20, 16) for s in range(3)] + [np.ones((70, 70), np.int32),
                                                                    np.zeros((70, 70), np.int32)])
    stack[0, 5, 5] = 77
    labels = torch.from_numpy(stack)
    found = augment.crop_distance_per_cell(augment.capped_crop_distance(labels, cap), labels,
                                           torch.zeros(5, 78))[:, 0].numpy()
    for got, truth in zip(found, stack):
        assert np.abs(got - oracle(truth, cap)).max() < 1e-6
        assert np.abs(got - watershed.distance_map(truth, cap)).max() < 1e-6


def test_target_is_the_distance_map_of_the_labels():
    """After all moves, but for cells that the crop cuts: those are divided by as much or more."""
    resident = resident_of(entry(s, 200, 200, 30, 12) for s in range(4))
    config = Augment(**{name: 0.0 for name in ("negative",)})
    _, target, labels = sample(resident, np.arange(4), np.arange(4), config, 96, 0, 4.0)
    for got, cut in zip(target[:, 0].numpy(), labels.numpy()):
        plain = watershed.distance_map(cut, 4.0)
        border = np.unique(np.concatenate((cut[0], cut[-1], cut[:, 0], cut[:, -1])))
        whole = ~np.isin(cut, border)
        assert whole.any() and np.abs(got - plain)[whole].max() < 1e-6
        assert (got <= plain + 1e-6).all()


def test_cut_cells_keep_the_scale_of_the_whole():
    """A crop through discs much larger than the cap: off its border it shows the map of the whole
    image."""
    labels = discs(11, 300, 300, 12, 40)
    # says where the crop lies
    pixels = np.repeat((labels / labels.max()).astype(np.float32)[None], 3, 0)
    pixels[1], pixels[2] = np.linspace(0, 1, 300), np.linspace(0, 1, 300)[:, None]
    x, target, _ = crops([("a", pixels, labels)], OFF)
    whole = watershed.distance_map(labels, 4.0)
    for crop, got in zip(x.numpy(), target[:, 0].numpy()):
        i, j = round(float(crop[2, 0, 0]) * 299), round(float(crop[1, 0, 0]) * 299)
        assert np.abs(got - whole[i:i + 64, j:j + 64])[4:-4, 4:-4].max() < 1e-6


def test_uncapped_target():
    """Copied crops show the uncapped map of the whole image; shrunk ones still rise to 1 in whole
    cells."""
    labels = discs(12, 64, 64, 6, 12)
    one = [("a", np.repeat(labels[None] / 64, 3, 0).astype(np.float32), labels)]
    _, target, _ = crops(one, OFF, cap=None)
    assert np.abs(target[0, 0].numpy() - watershed.distance_map(labels)).max() < 1e-4
    labels = discs(13, 256, 256, 20, 20)
    one, turned = [("a", np.zeros((3, 256, 256), np.float32), labels)], only(scale=(0.5, 0.5),
                                                                             rotate=1.0)
    _, target, cut = crops(one, turned, size=100, cap=None, B=1)
    target, cut = target[0, 0], cut[0]
    inner = np.setdiff1d(cut, torch.cat((cut[0], cut[-1], cut[:, 0], cut[:, -1])))
    assert len(inner) > 3
    assert all(abs(float(target[cut == i].max()) - 1) < 1e-6 for i in inner)
    with pytest.raises(ValueError, match=r"make Resident\(..., cap=None\)"):
        sample(resident_of(one), [0], [0], OFF, 64, 0, None)


# ---------------------------------------------------------------------------------------- intensity

def ramp(value=None, colour=False):
    """An image of one value, or of a ramp."""
    pixels = np.full((3, 64, 64), value, np.float32) if value is not None else (
        np.broadcast_to(np.linspace(0, 1, 64, dtype=np.float32), (3, 64, 64)).copy())
    if colour:
        pixels = pixels * np.float32([[[1]], [[0.6]], [[0.3]]])
    return [("ramp", pixels, np.zeros((64, 64), int))], torch.from_numpy(pixels)


def test_inversion_brightness_contrast_gamma():
    entries, pixels = ramp()
    assert torch.allclose(crops(entries, only(invert=1.0))[0], 1 - pixels, atol=2e-5)
    assert torch.allclose(crops(entries, only(brightness=1.0, brightness_range=(0.2, 0.2)))[0],
                          (pixels + 0.2).clamp(max=1), atol=2e-5)
    assert torch.allclose(crops(entries, only(contrast=1.0, contrast_range=(0.5, 0.5)))[0],
                          (pixels - 0.5) / 2 + 0.5, atol=2e-5)
    assert torch.allclose(crops(entries, only(gamma=1.0, gamma_range=(2, 2)))[0], pixels ** 2,
                          atol=5e-5)


def test_blur_is_gaussian():
    """A point becomes a Gaussian: its sum stays, its variance is sigma^2."""
    image = np.zeros((3, 64, 64), np.float32)
    image[:, 32, 32] = 1
    x = crops([("a", image, np.zeros((64, 64), int))], only(blur=1.0, blur_px=(1.5, 1.5)),
              B=1)[0][0, 0]
    y = torch.arange(64) - 32
    assert abs(x.sum() - 1) < 1e-3
    assert abs((x.sum(1) * y ** 2).sum() - 2.25) < 0.02 and abs((x.sum(0) * y ** 2).sum()
                                                                - 2.25) < 0.02
    assert abs(float(x.max()) - 1 / (2 * np.pi * 2.25)) < 1e-3


@pytest.mark.parametrize("noise,shot", [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("value", [0.3, 0.6])
def test_noise_has_the_variance_it_should(noise, shot, value):
    config = only(noise=noise, noise_range=(0.05, 0.05), shot=shot, shot_photons=(100, 100))
    x = crops(ramp(value)[0], config)[0][:, 0].double()
    assert abs(x.mean() - value) < 5e-3
    # 8 x 64^2 values: 1 % spread
    assert abs(x.var() / (noise * 0.05 ** 2 + shot * value / 100) - 1) < 0.05


def test_dim_counts_photons():
    """Few photons: whole counts of the right mean, stretched to [0, 1]; a field without light stays
    black."""
    entries, _ = ramp(0.5)
    x = crops(entries, only(dim=1.0, dim_photons=(8, 8)), B=1)[0][0, 0]
    steps = torch.unique(x).diff()
    assert len(steps) > 4 and (steps - steps[0]).abs().max() < 1e-5  # levels equally far apart
    few = crops(ramp()[0], only(dim=1.0, dim_photons=(20, 20)))[0]
    assert few[..., 56:].mean() > 0.6 and few[..., :8].mean() < 0.15
    assert crops(ramp(0.0)[0], only(dim=1.0))[0].max() == 0


def test_light_darkens_smoothly():
    """The field is 1 at its brightest knot; between knots cubic interpolation overshoots a little.
    """
    x = crops(ramp(0.8)[0], only(light=1.0, light_range=(0.3, 0.3)))[0][:, 0]
    assert x.max() <= 0.8 * 1.15 and x.mean() < 0.7 and x.std((1, 2)).min() > 0.02
    assert (x[:, 1:] - x[:, :-1]).abs().max() < 0.06


def test_gray_stays_gray_and_black_stays_black():
    busy = Augment(**{name: 0.7 for name in CHANCES} | {"drop": 0.0, "negative": 0.3})
    x = crops([entry(0, 90, 90)], busy, B=16)[0]
    assert torch.equal(x[:, 0], x[:, 1]) and torch.equal(x[:, 0], x[:, 2])
    name, pixels, labels = entry(1, 90, 90, colour=True)
    pixels[2] = 0                                                            # [DAPI, marker, 0]
    x = crops([(name, pixels, labels)], dataclasses.replace(busy, mix=0.0, gray=0.0, shuffle=0.0),
              B=16)[0]
    assert x[:, 2].max() == 0 and x[:, 0].std() > 0.05
    assert not torch.equal(x[:, 0], x[:, 1])


def test_channels_are_shuffled_mixed_dropped():
    entries, pixels = ramp(colour=True)
    top = lambda x: x.amax((2, 3))                                           # noqa: E731  (B, 3)
    shuffled = top(crops(entries, only(shuffle=1.0), B=40)[0])
    assert torch.allclose(shuffled.sort(1).values, torch.tensor([0.3, 0.6, 1.0]).expand(40, 3),
                          atol=1e-4)
    assert len({tuple(row) for row in shuffled.mul(10).round().int().tolist()}) == 6
    mixed = top(crops(entries, only(mix=1.0), B=40)[0])
    assert 0.3 < mixed.min() and mixed.max() < 1 and (mixed[:, 0] - mixed[:, 1]).abs().min() > 0
    gray = crops(entries, only(gray=1.0))[0]
    assert torch.equal(gray[:, 0], gray[:, 1]) and torch.equal(gray[:, 0], gray[:, 2])
    kept = (top(crops(entries, only(drop=1.0), B=40)[0]) > 0).sum(1)
    assert kept.min() == 1 and kept.max() == 2


def test_negatives_have_no_cells():
    x, target, labels = crops([entry(0, 90, 90)], only(negative=1.0), B=64)
    assert labels.abs().max() == 0 and target.max() == 0
    assert x.min() >= 0 and x.max() <= 1
    spread = x.std((1, 2, 3))
    assert spread.min() < 0.02 and spread.max() > 0.15  # even ground, strong texture
    mixed = crops([entry(0, 90, 90)], only(negative=0.5, on_cell=1.0), B=64)[2].amax((1, 2)) > 0
    assert 20 < mixed.sum() < 44


def test_negatives_of_colour_images_are_gray_as_well_and_some_have_few_levels():
    x = crops([entry(0, 90, 90, colour=True)], only(negative=1.0), B=96)[0]
    gray = (x[:, 0] == x[:, 1]).all((1, 2)) & (x[:, 0] == x[:, 2]).all((1, 2))
    assert 30 < gray.sum() < 66 and (x[~gray, 0] != x[~gray, 1]).any((1, 2)).all()
    levels = np.array([len(crop.unique()) for crop in x])
    assert 15 < (levels < 100).sum() < 45 < (levels > 1000).sum()


@pytest.mark.parametrize("changes,said", [(dict(blur=1.5), "blur=1.5: expected a probability"),
                                          (dict(scale=(2, 1)),
                                           "expected two numbers, low and high"),
                                          (dict(dim_photons=(0, 1)), "expected numbers above 0")])
def test_mistakes_in_the_configuration(changes, said):
    with pytest.raises(ValueError, match=said):
        Augment(**changes)


@pytest.mark.parametrize("pixels,labels", [(np.zeros((3, 4, 5)), np.zeros((4, 4), int)),
                                           (np.zeros((1, 4, 4)), np.zeros((4, 4), int)),
                                           (np.zeros((3, 4, 4)), np.zeros((4, 4))),
                                           (np.full((3, 4, 4), 2.0), np.zeros((4, 4), int))])
def test_mistakes_in_the_data_name_the_image(pixels, labels):
    with pytest.raises(ValueError, match="^cells.tif: .*expected"):
        resident_of([("cells.tif", pixels, labels)])


# --------------------------------------------------------------------------------------- the script

@pytest.fixture
def folder(tmp_path):
    """Dark cells on light ground, gray and colour, 16 and 8 bits."""
    place = tmp_path / "set"
    place.mkdir()
    for seed, (colour, kind) in enumerate([(False, np.uint16), (True, np.uint8)]):
        _, pixels, labels = entry(seed, 90, 100, colour=colour)
        pixels = ((1 - pixels) * np.iinfo(kind).max).astype(kind)
        tifffile.imwrite(place / f"im{seed}.tif", pixels if colour else pixels[0],
                         photometric="minisblack",
                         metadata={"axes": "CYX" if colour else "YX"})
        data.write_labels(place / f"im{seed}_masks.tif", labels)
    return place


def write(folder, output, **changes):
    quiet = Augment(invert=0.0, negative=0.0, noise=0.0, shot=0.0, dim=0.0, drop=0.0)
    augment.main(augment.Config((str(folder),), str(output), 3, 64, augment=quiet, **changes), [])
    return {p.relative_to(output).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(output.rglob("*.tif"))}


def test_hashes_know_types():
    """Without types they are those of the version before, which checkpoints hold."""
    image = data.Labelled("x", np.zeros((3, 4, 4), np.float32), np.ones((4, 4), np.int32))
    content = image.pixels.tobytes() + image.labels.tobytes()
    assert augment.content_hash(image) == hashlib.sha256(content).hexdigest()[:16]
    first, other = (augment.content_hash(image._replace(types=np.array([n]))) for n in (1, 2))
    assert first != other != augment.content_hash(image)


@pytest.mark.parametrize("change", ["pixels", "labels"])
def test_the_same_cells_or_pixels_are_the_same_image(folder, tmp_path, change):
    """In another channel, and with labels that differ by one pixel."""
    other = tmp_path / "other"
    other.mkdir()
    for end in ("", "_masks"):
        (other / f"copy{end}.tif").write_bytes((folder / f"im1{end}.tif").read_bytes())
    if change == "pixels":
        tifffile.imwrite(other / "copy.tif", tifffile.imread(other / "copy.tif") // 2,
                         photometric="rgb", planarconfig="separate")
    else:
        labels = data.read_labels(other / "copy_masks.tif")
        labels[tuple(np.argwhere(labels)[0])] = 0
        data.write_labels(other / "copy_masks.tif", labels)
    given = data.TrainingData(root=str(tmp_path), sets=(data.TrainingSet("set"),),
                              validation=(data.TrainingSet("other"),))
    with pytest.raises(ValueError, match="set/im1: trained on, and validated on as other/copy"):
        augment.load_resident(given, 0, "cpu", 4.0)


def test_a_type_that_held_out_images_alone_have_is_refused_before_training():
    types = {"a": np.array([1, 2]), "b": np.array([1]), "c": np.array([2]), "d": np.array([2])}
    wanted = {"one": ["1"], "two": ["2"]}
    data.check_training_types(types, wanted, ["a", "b", "c"])
    with pytest.raises(ValueError, match="cells of 'one' are in images that are held out .a, b"):
        data.check_training_types(types, wanted, ["c", "d"])


def test_an_image_is_not_on_both_sides(folder, tmp_path, capsys):
    """By content, whatever its name; but an image without cells, and the only one there is."""
    def load(*validation, match=None, **more):
        given = data.TrainingData(root=str(tmp_path), sets=(data.TrainingSet("set", match=match),),
                                  validation=tuple(map(data.TrainingSet, validation)), **more)
        return augment.load_resident(given, 0, "cpu", 4.0)
    other = tmp_path / "other"
    other.mkdir()
    for end in ("", "_masks"):
        (other / f"copy{end}.tif").write_bytes((folder / f"im1{end}.tif").read_bytes())
    for name, twin in (("other", "other/copy"), ("set", "set/im0")):
        with pytest.raises(ValueError, match=f"trained on, and validated on as {twin}; expected"):
            load(name)
    assert load("other", match="im0") and load(share=0.5)
    assert not capsys.readouterr().err
    for place in (tmp_path / f"copies/{number}" for number in range(3)):
        place.mkdir(parents=True)
        for end in ("", "_masks"):
            (place / f"im{end}.tif").write_bytes((folder / f"im1{end}.tif").read_bytes())
    copies = data.TrainingData(root=str(tmp_path), sets=(data.TrainingSet("copies"),), share=0.3)
    assert len(augment.load_resident(copies, 0, "cpu", 4.0)[0]) == 2
    assert ", 1 such copies in all; scores are too good" in capsys.readouterr().err
    assert load("other", match="im1") and "the only image chooses" in capsys.readouterr().err
    assert load(match="im1")
    assert capsys.readouterr().err.count("set im1/im1: the only image chooses thresholds") == 1
    for name in (folder / "black", other / "copy"):
        data.write_labels(f"{name}_masks.tif", np.zeros((90, 100), np.int32))
        tifffile.imwrite(f"{name}.tif", np.zeros((90, 100), np.uint8))
    _, pixels, labels = entry(9, 90, 100)
    tifffile.imwrite(other / "new.tif", (pixels[0] * 255).astype(np.uint8))
    data.write_labels(other / "new_masks.tif", labels)
    assert len(load("other")[1]) == 2


def test_an_augmented_set(folder, tmp_path):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    first, out = write(folder, tmp_path / "a"), tmp_path / "a"
    assert len(first) == 12 and first == write(folder, tmp_path / "b")       # 2 images, 3 copies
    assert first != write(folder, tmp_path / "c", seed=1)
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()}
    for path in sorted((out / "images").iterdir()):
        pixels, labels = data.read_image(path).pixels, data.read_labels(out / "labels" / path.name)
        assert pixels.dtype == np.uint16 and pixels.shape[1:] == labels.shape == (64, 64)
        assert len(pixels) == (3 if path.name.startswith("im1") and len(pixels) != 1 else 1)
        cells = label(labels, connectivity=1)  # every cell is one piece
        assert (
            len(np.unique(cells)) == len(np.unique(labels))
            and np.bincount(labels.ravel()).min() >= 5
        )
        assert pixels[0][labels > 0].mean() + 5000 < pixels[0][labels == 0].mean()   # dark on light
    assert {p.name for p in (out / "images").iterdir()} == {p.name
                                                            for p in (out / "labels").iterdir()}
    written = {example.name: example.files for example in data.examples(out)}
    assert out / "labels" / "im0_crop000.tif" in written["im0_crop000"] and len(written) == 6


def test_it_goes_on_and_does_not_mix(folder, tmp_path):
    out = tmp_path / "a"
    first = write(folder, out)
    lost, kept = out / "images" / "im1_crop001.tif", out / "images" / "im0_crop000.tif"
    lost.unlink()
    kept.write_bytes(b"mine")
    second = write(folder, out)
    assert second["images/im1_crop001.tif"] == first["images/im1_crop001.tif"]
    assert kept.read_bytes() == b"mine"
    image = folder / "im0.tif"
    tifffile.imwrite(image, 255 - tifffile.imread(image))
    third = write(folder, out)                                   # of another image: made anew
    assert third["images/im0_crop000.tif"] not in (b"mine", first["images/im0_crop000.tif"])
    assert third["images/im1_crop000.tif"] == first["images/im1_crop000.tif"]
    tifffile.imwrite(image, 255 - tifffile.imread(image))
    (tmp_path / "more").mkdir()
    for end in ("", "_masks"):
        (folder / f"im1{end}.tif").rename(tmp_path / f"more/im1{end}.tif")
    assert write(folder, out)["images/im1_crop000.tif"] == first["images/im1_crop000.tif"]  # stays
    for end in ("", "_masks"):
        (tmp_path / f"more/im1{end}.tif").rename(folder / f"im1{end}.tif")
    with pytest.raises(ValueError, match="augmented.yaml: its crops were made otherwise"):
        write(folder, out, seed=1)
    assert write(folder, out, overwrite=True) == first


def test_the_command_and_a_mistake(folder, tmp_path):
    """The second image has labels of another size: one line says so, and what was made before it
    stays."""
    data.write_labels(folder / "im1_masks.tif", np.zeros((5, 5), int))
    command = [sys.executable, str(ROOT / "augment.py"), str(ROOT / "configs" / "augment.yaml")]
    done = subprocess.run([*command, f"data={folder}", "copies=2", "size=48"], capture_output=True,
                          text=True,
                          cwd=tmp_path)
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and said.startswith("error: ") and "Traceback" not in done.stderr
    assert "im1.tif: pixels (3, 90, 100), labels (5, 5) int32; expected (3, H, W)" in said
    made = tmp_path / "dat" / "augmented_training_data"
    for kind in ("images", "labels"):
        assert [p.name for p in sorted((made / kind).iterdir())] == ["im0_crop000.tif",
                                                                     "im0_crop001.tif"]


def test_mistakes_name_the_folder(folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="empty: no labelled image"):
        augment.examples_to_augment([empty])
    with pytest.raises(FileNotFoundError, match="gone"):
        augment.examples_to_augment([tmp_path / "gone"])
    with pytest.raises(ValueError,
                       match="im0.tif: a second image named im0, beside .*im0.tif; names"):
        augment.examples_to_augment([folder, folder])
    for folders in ((), ("a", "out/")):
        with pytest.raises(ValueError, match="expected folders other than output=out"):
            augment.Config(folders, "out")
    with pytest.raises(ValueError,
                       match="augment.py takes a configuration and key=value; give data=x.tif"):
        augment.main(augment.Config(("a",)), ["x.tif"])


def test_help_does_not_wait_for_torch():
    code = ("import runpy, sys; sys.argv = ['augment.py', '--help']\ntry: "
            "runpy.run_path('augment.py', None, "
            "'__main__')\nexcept SystemExit as end:\n    import runs\n    assert not end.code and "
            "not runs.is_loaded('torch')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "blur_px=" in done.stdout and "copies=4" in done.stdout


def test_the_shipped_configuration_lists_every_key():
    """configs/augment.yaml says what the defaults are, so that nobody has to look for a key."""
    config = runs.load_config(augment.Config, ROOT / "configs" / "augment.yaml", ["data=x"])
    assert config == augment.Config(("x",))
    text = (ROOT / "configs" / "augment.yaml").read_text()
    assert all(f"{f.name}: " in text for c in (augment.Config, Augment)
               for f in dataclasses.fields(c)
               if f.name != "augment")


# ------------------------------------------------------------------------- what strangers look like

def test_pasted_cells_bring_their_pixels_labels_and_distances():
    """Half of the pixels are bright where cells are; pasted ones as well, and the target is the
    distance map of what is there."""
    entries = [entry(seed, 96, 96, n=8, radius=10) for seed in range(3)]
    one, two = (crops(entries, config, np.arange(8) % 3, size=96)
                for config in (OFF, only(paste=1.0)))
    assert sum(len(np.unique(b)) > len(np.unique(a)) for a, b in zip(one[2], two[2])) >= 6
    for x, y, labels in zip(*two):
        labels = labels.numpy()
        inside = ndimage.minimum_filter(labels, 5) == ndimage.maximum_filter(labels, 5)
        assert (
            x[0].numpy()[inside & (labels > 0)].min() > 0.55
            and x[0].numpy()[inside & (labels == 0)].max() < 0.35
        )
        whole = watershed.distance_map(labels, cap=4)
        cut = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
        kept = np.isin(labels, cut, invert=True) & (np.bincount(labels.ravel())[labels] > 150)
        assert abs(y[0].numpy() - whole)[kept].max() < 0.35  # covered cells keep the depth they had
    assert torch.equal(two[0], crops(entries, only(paste=1.0), np.arange(8) % 3, size=96)[0])


def test_halos_push_the_surroundings_away():
    """A bright square on gray gets a darker rim, a dark one a brighter; far from both nothing
    changes sides."""
    image = np.full((3, 96, 96), 0.5, np.float32)
    image[:, 20:40, 20:40], image[:, 60:80, 60:80] = 1, 0
    x = crops([("a", image, np.zeros((96, 96), int))],
              only(halo=1.0, halo_px=(5, 5), halo_range=(1, 1)), size=96, B=2)[0][0, 0]
    far, beside_bright, beside_dark = x[8, 88], x[44, 30], x[56, 70]
    assert beside_bright < far - 0.05 and beside_dark > far + 0.05


def test_coarse_images_have_no_fine_detail():
    rng = np.random.default_rng(0)
    image = rng.random((1, 96, 96), np.float32).repeat(3, 0)
    x = crops([("a", image, np.zeros((96, 96), int))], only(coarse=1.0, coarse_range=(0.4, 0.4)),
              size=96, B=1)[0][0, 0].numpy()
    power = abs(np.fft.fft2(x - x.mean())) ** 2
    y, x = np.meshgrid(*(abs(np.fft.fftfreq(96)),) * 2, indexing="ij")
    assert power[np.hypot(y, x) > 0.3].sum() < 0.05 * power.sum()


def test_blocks_are_what_pillow_writes():
    """Quality 50 is the standard's tables themselves; without subsampling the images differ by a
    level of its integers or two, and a coefficient here and there."""
    from io import BytesIO

    from PIL import Image
    y, x = np.mgrid[:64, :64] / 64
    image = np.stack([y, x, 0.5 + 0.4 * np.sin(20 * x * y)]).astype(np.float32)
    image = np.round(image * 255) / 255
    ours = crops([("a", image, np.zeros((64, 64), int))], only(blocks=1.0, blocks_range=(1, 1)),
                 size=64, B=1)[0][0].numpy()
    file = BytesIO()
    Image.fromarray(np.round(image * 255).astype(np.uint8).transpose(1, 2, 0)).save(
        file, "JPEG", quality=50, subsampling=0
    )
    theirs = np.asarray(Image.open(file), float).transpose(2, 0, 1) / 255
    assert (
        abs(ours - theirs).max() < 0.04
        and abs(ours - theirs).mean() < 0.003
        and abs(ours - image).max() > 0.05
    )


def test_stains_change_hue_but_not_place():
    labels, (_, image, _) = discs(0, 96, 96, 10, 12), entry(0, 96, 96, colour=True)
    image = 1 - 0.6 * (labels > 0) * np.array([0.9, 1.0, 0.5])[:, None, None] - 0.1 * image
    x = crops([("a", image.astype(np.float32), labels)], only(stain=1.0, stain_range=(0.2, 0.2)),
              size=96)[0].numpy()
    assert (abs(x - image).max((1, 2, 3))
            > 0.02).all() and len(np.unique(x.mean((1, 2, 3)).round(4))) == 8
    for one in x:
        assert max(abs(np.corrcoef(plane.ravel(), labels.ravel() > 0)[0, 1]) for plane in one) > 0.8
