"""Kinds of images, and what suits each: a decoder of its own, a setting of the watershed of its own.

    net.settings.kinds = learnt(net, trainset.glimpsed(...), {"phase": {"setting": ..., "decoder": "phase"}})
    kind = nearest(net, {name: token(net, tiles) for name in sets(net)})                # of an image to be segmented
    net, settings = suited(net, kind)                                                   # its decoder, its setting

One decoder and one setting for all cost most where cells are unlike the others: the large ones of phase contrast fall to
pieces at a depth that just parts touching nuclei. The backbone's tokens tell what an image shows, and images that
look like one of a training set get what that set has of its own, which may be nothing. Who gives kind=, peak=, fill=, depth=, smooth=, shape=
or min_area= decides himself.

Why single images are kept and not a mean for each set: a set shows many things, and a small set of one thing lies among
them. With means, half of the nuclei went to two sets of two images. Why by direction from the middle of all, and not by distance: how far
from the middle a token lies follows the contrast of the image. `python bench/bench.py kinds` measures how often each errs.

Letters: n tiles, T their side in px, D width of the backbone.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

GAIN = 0.02         # of the score on validation that a setting of its own must bring a set
ALONE = 0.1         # and what it must bring where it was found on one image; on n an n-th of it
CLEAR = 0.7         # an image is of the nearest kind if it is at most this much as far from it as from those with another decoder
NEAR = 0.4          # and this far from it at most, as apart() measures
SHARED = "shared"   # the name of the decoder and the setting that serve all sets


@torch.inference_mode()
def token(net, tiles: Tensor) -> Tensor:
    """(n, 3, T, T) in [0, 1] of one image -> (2 D,): mean and deviation of the last block's tokens in a tile, of all tiles."""
    with net.autocast():
        last, = net.backbone.features(net.standardised(tiles.to(net.mean.device)), net.taps[-1:])
    last = last.float()                                                                # (n, tokens, D)
    return torch.cat([last.mean(1), last.std(1, correction=0)], 1).mean(0).cpu()


def apart(tokens: Tensor, others: Tensor, middle: Tensor) -> Tensor:
    """(m, 2 D) and (n, 2 D), each value divided by its spread -> (m, n): between the directions in which they lie from (2 D,), 0 to 2."""
    return torch.cdist(torch.nn.functional.normalize(tokens - middle, dim=1), torch.nn.functional.normalize(others - middle, dim=1))


def middle_of(sets: Iterable[Tensor]) -> Tensor:
    """(images, 2 D) of each set -> (2 D,), where each set counts the same."""
    return torch.stack([tokens.mean(0) for tokens in sets]).mean(0)


def is_clear(near: float, next_near: float) -> bool:
    """Whether an image is of the nearest kind, by how far apart() it is from that and from the nearest with another decoder."""
    return near <= min(NEAR, CLEAR * next_near)


def gaining(best: Mapping[str, dict], trained: Iterable[str]) -> dict[str, dict]:
    """{set: {"setting": its own}} of the sets that gain enough by it; best : of each set images, score, own_score and setting,
    as tuning.OwnBest has them. Images are told apart by the sets that the network was trained on: it takes two, and sets to
    validate on that are others have no say."""
    trained = set(trained)
    return {name: dict(setting=of["setting"]) for name, of in best.items() if name in trained and len(trained) > 1 and
            of["own_score"] - of["score"] >= max(GAIN, ALONE / of["images"])}


def reached(best: Mapping[str, dict], own: Mapping[str, dict], name: str) -> float:
    """The score of a set on validation with the setting that it gets, its own where it gains by it; 0 without images there."""
    return best[name]["own_score" if name in own else "score"] if name in best else 0.0


def zoomed(own: dict[str, dict], sets: Iterable, common: float) -> dict[str, dict]:
    """What sets have of their own, and the zoom (trainset.Set) of those whose images the network sees at an uncommon one."""
    own = dict(own)
    for one in sets:
        if one.zoom != common:
            mine = own.get(one.name, dict(setting={}))
            own[one.name] = dict(mine, setting={**mine["setting"], "zoom": one.zoom})
    return own


def learnt(net, looks: Mapping, own: Mapping[str, dict], unclear: str = "nearest") -> dict:
    """What nearest() needs, for the weights' settings; empty where nothing is any set's own.

    looks : of each set a trainset.Look, some of its images and how wide its cells are. own : of the sets that have something of
    their own, the setting of the watershed and perhaps the name of a decoder. unclear : of nearest().
    """
    if not own:
        return {}
    tokens = {name: torch.stack([token(net, tiles) for tiles in look.tiles]) for name, look in looks.items()}    # (images, 2 D)
    spread = torch.cat(list(tokens.values())).std(0) + 1e-6
    first = Counter(name.split()[0] for name in looks)         # "phase/train" says enough of "phase/train ^(?!set40$)"
    mine = {name: {**own.get(name, {}).get("setting", {}), **({"diameter": look.diameter} if look.diameter else {})}
            for name, look in looks.items()}
    return dict(unclear=unclear, spread=spread.tolist(), sets=[
        dict(name=name.split()[0] if first[name.split()[0]] == 1 else name, setting=mine[name], decoder=own.get(name, {}).get("decoder"),
             tokens=[[float(f"{value:.3g}") for value in row] for row in (of / spread).tolist()])      # (images, 2 D)
        for name, of in tokens.items()])


def nearest(net, looks: Mapping[str, Tensor]) -> str:
    """The kind of an image: the training set that has the image most like it. Where that is not clear, it is nobody's, SHARED, if the
    weights say so (unclear: all): the decoder for all errs little where another kind's sees nothing.

    looks : by the name of each set of sets(), the image's token (2 D,) at the scale at which this set would have its cells;
        sets that are missing here are not compared.
    """
    spread = torch.tensor(net.settings.kinds["spread"])                                # (2 D,)
    known = {one["name"]: torch.tensor(one["tokens"]) for one in net.settings.kinds["sets"]}            # (images, 2 D)
    middle = middle_of(known.values())
    far = {name: float(apart(looks[name][None] / spread, known[name], middle).min()) for name in known if name in looks}
    decoder = {one["name"]: one.get("decoder") for one in net.settings.kinds["sets"]}
    best = min(far, key=far.get)
    others = [far[name] for name in far if decoder[name] != decoder[best]]
    return SHARED if net.settings.kinds.get("unclear") == "all" and others and not is_clear(far[best], min(others)) else best


def sets(net) -> list[str]:
    """The training sets that images are compared with."""
    return [one["name"] for one in net.settings.kinds.get("sets", ())]


def settings(net) -> dict[str, dict]:
    """Kinds that the weights know, and what each changes in the settings that serve all: the watershed's, the diameter of cells."""
    return {SHARED: {}, **{one["name"]: one["setting"] for one in net.settings.kinds.get("sets", ())}}


def settings_of(net, kind: str):
    """The network's settings with those of this kind."""
    return replace(net.settings, **settings(net)[kind])


def suited(net, kind: str) -> tuple:
    """(the network with the decoder of this kind, its settings with those of this kind)"""
    decoder = next((one.get("decoder") for one in net.settings.kinds.get("sets", ()) if one["name"] == kind), None)
    return net.with_decoder(decoder) if decoder else net, settings_of(net, kind)


def named(net, kind: str) -> str:
    """The kind of that name, or the only one that begins so; where none does, the only one that has this in its name."""
    known = settings(net)
    found = ([kind] if kind in known else
             [name for name in known if name.startswith(kind)] or [name for name in known if kind in name])
    if len(found) != 1:
        raise ValueError(f"kind={kind}: {'several have this in their names, ' * (len(found) > 1)}expected one of "
                         f"{', '.join(map(repr, known))} (a part is enough), the kinds of images that these weights know")
    return found[0]
