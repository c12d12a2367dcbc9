"""Part of bench.py: which decoder images go to."""
from __future__ import annotations

import dataclasses
from pathlib import Path

import tqdm

ROOT = Path(__file__).resolve().parent.parent


def kinds() -> None:
    """How often an image goes to another kind's decoder, or to the one for all, of both generalists that ship: each training image, as
    it is and as two other microscopes might show it, against all but those of its own group. By distance, and by direction as kinds.py
    has it, with the nearest kind's decoder and with the one for all where the kind is not clear."""
    import numpy as np
    import torch
    import data
    import kinds as rooms
    import model
    import runs
    import segment
    import train_seg as script
    import trainset
    from bench import table
    rows, names = [], []
    for weights in ("dinocell_tiny", "dinocell_s8"):
        config = runs.load(script.Config, ROOT / f"configs/{weights}.yaml").data
        config = dataclasses.replace(config, root=str(ROOT / config.root))
        if not Path(config.root).is_dir():
            raise SystemExit(f"{config.root}: no such folder; the images of configs/{weights}.yaml are needed")
        net = model.load(ROOT / f"final_models/{weights}.pt")
        looks, kind, groups = {view: [] for view in (_as_is, _resized, _dimmed)}, [], []
        jobs = [(chosen, example) for chosen in config.sets for example in trainset.examples(config, chosen)]
        for i, (chosen, example) in enumerate(tqdm.tqdm(jobs, desc=weights, leave=False)):
            pixels = trainset.read(example, chosen.name).pixels                                 # (3, H, W) in [0, 1]
            for view, found in looks.items():
                seen = view(pixels, np.random.default_rng(i)).clip(0, 1).astype(np.float32)
                seen = seen if view is _as_is else data.normalise(seen, data.percentiles(seen))
                found.append(rooms.token(net, segment.glimpses(segment.as_source(seen), segment.UNIT, seen.shape[1:], net.settings.tile)))
            kind.append(chosen.decoder)
            groups.append((chosen.name, data.group_of(example.name)))
        names = list(dict.fromkeys(kind))
        looks = {view: torch.stack(found) for view, found in looks.items()}                     # (images, 2 D)
        spread = looks[_as_is].std(0) + 1e-6
        known, same = looks[_as_is] / spread, torch.tensor([[a == b for b in groups] for a in groups])
        of_set = [torch.tensor([name == group[0] for group in groups]) for name in dict.fromkeys(group[0] for group in groups)]
        middle = rooms.middle_of(known[mine] for mine in of_set)
        of_kind = [torch.tensor([one == name for one in kind]) for name in names]
        for view, found in looks.items():
            distance, direction = torch.cdist(found / spread, known), rooms.apart(found / spread, known, middle)    # (images, images)
            for rule, far, clear in (("distance", distance, lambda *_: True), ("direction", direction, lambda *_: True),
                                     ("direction, unclear: all", direction, rooms.is_clear)):
                far = far.masked_fill(same, torch.inf)
                far = torch.stack([far[:, mine].min(1).values for mine in of_kind], 1)          # (images, kinds)
                seen = [(own, names[min(range(len(names)), key=one.__getitem__)] if clear(*sorted(one)[:2]) else None)
                        for own, one in zip(kind, far.tolist())]
                rows.append([weights, view.__doc__, rule, *(f"{sum(own == name and to not in (own, None) for own, to in seen)} / "
                                                            f"{seen.count((name, None))} of {kind.count(name)}" for name in names)])
    table("Images that go to another kind's decoder / to the one for all, where none of their own group is known",
          ["weights", "images", "by", *names], rows)


def _as_is(pixels, rng):
    """as they are"""
    return pixels


def _resized(pixels, rng):
    """resized by .75 to 1.33, another gamma, noise"""
    import numpy as np
    from skimage.transform import rescale
    zoom = rng.uniform(0.75, 1.33)
    seen = np.stack([rescale(plane, zoom, order=1, anti_aliasing=zoom < 1) for plane in pixels]).clip(0, 1) ** rng.uniform(0.6, 1.6)
    return seen + rng.normal(0, 0.03, seen.shape)


def _dimmed(pixels, rng):
    """resized, blurred, less contrast, uneven light, grain"""
    import numpy as np
    from scipy import ndimage
    from skimage.transform import rescale
    seen = ndimage.gaussian_filter(pixels, (0, *(rng.uniform(0, 1.2),) * 2))
    y, x = np.mgrid[-1:1:seen.shape[1] * 1j, -1:1:seen.shape[2] * 1j]
    seen = rng.uniform(0.5, 1) * seen + rng.uniform(0, 0.3) + rng.uniform(-0.12, 0.12) * y + rng.uniform(-0.12, 0.12) * x
    grain = ndimage.gaussian_filter(rng.normal(0, 1, seen.shape), (0, 1, 1))
    seen += grain / grain.std() * rng.uniform(0, 0.03)
    zoom = rng.uniform(0.75, 1.33)
    return np.stack([rescale(plane, zoom, order=1, anti_aliasing=zoom < 1) for plane in seen])
