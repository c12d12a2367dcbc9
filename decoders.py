"""A decoder of its own for each kind of image, on the backbone that all share.

    jobs = dict(decoders.plan(config, "final_models/cells.pt"))          # {name: the configuration that trains it}
    code = decoders.train_all(config, jobs, train, rank, world, device)

Called by train_seg.py where sets name a decoder. One decoder for all kinds must part nuclei by valleys of two pixels and
not cut the large cells of phase contrast at any; each kind costs the others. So when the network for all is done, each
name in data.sets trains a copy of its decoder on the sets that name it, with the backbone as it is, and with what
`decoders: {name: {key: value}}` changes in the configuration. Then all go into one file, and kinds.py chooses between them:
who segments sees no difference, and an image takes no more time. Each is a run of its own in runs/<experiment>/<name>/,
resumed like any other.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import runs
import series
import trainset

# Keys of a decoder's run that follow from the network for all.
GIVEN = {"experiment", "export_path", "init", "train_blocks", "data.sets", "data.validation", "data.fields", "data.root",
         "data.diameter", "crop", "output_base_dir", "unclear"}


def plan(config, weights: str) -> Iterator[tuple[str, object]]:
    """(name of a decoder, the configuration that trains it); weights : of the network for all, which gets the decoders."""
    folder = Path(config.output_base_dir) / "runs" / config.experiment
    names = list(dict.fromkeys(chosen.decoder for chosen in config.data.sets if chosen.decoder))
    if strange := sorted(config.decoders.keys() - set(names)):
        raise ValueError(f"decoders.{strange[0]}: no set in data.sets has decoder: {strange[0]} "
                         f"(there are: {', '.join(names) or 'none'})")
    if names:                                                 # what follows needs torch
        import torch
        import augment
    for name in names:
        changes = config.decoders.get(name, {})
        one = series.changed(config, changes, f"decoders.{name}")
        runs.from_dict(augment.Augment, one.augment, f"decoders.{name}.augment")
        if given := sorted(key for key in runs.flatten(changes) if key in GIVEN or key.startswith(("network.", "series."))):
            raise ValueError(f"decoders.{name}.{given[0]}: follows from the network for all; leave it out")
        if name in ("images", "logs", "checkpoints") or hasattr(torch.nn.ModuleDict(), name):
            raise ValueError(f"decoder: {name}: this name is taken; give another")
        sets, validation = ([replace(chosen, decoder=None) for chosen in of if chosen.decoder == name]
                            for of in (config.data.sets, config.data.validation))
        data = replace(one.data, sets=tuple(sets), validation=tuple(validation), fields=0)
        if not validation and not any(trainset.divide(trainset.examples(data, chosen), data, 0)[1] for chosen in sets):
            raise ValueError(f"decoder: {name}: its sets leave no image to validate on; add images, or a set to data.validation "
                             f"with decoder: {name}")
        yield name, replace(one, experiment=f"{config.experiment}/{name}", init=weights, train_blocks=0, decoders={},
                            export_path=str(folder / f"{name}.pt"), data=data)


def train_all(config, jobs: dict, train: Callable[..., int], rank: int, world: int, device: str, stopped: list) -> int:
    """train(config, rank, world, device) -> exit code. After each the weights are whole, and better by a decoder.

    stopped : of runs.stop_signals; a signal that came between two trainings ends it there.
    """
    import model
    done = [one for one in jobs.values() if Path(one.export_path).exists()]
    if rank == 0 and done:
        net = model.load(done[0].init)
        for one in done:                                      # what does not fit is said before more is trained
            trained_on(one, net)
    runs.shared_out(bool, range(world), rank, world)          # all wait for the first, which writes the weights
    for one in jobs.values():
        if any(runs.shared_out(lambda _: bool(stopped), range(world), rank, world)):
            return runs.REQUEUE
        if code := train(one, rank, world, device):
            return code
        if rank == 0:
            join(config, jobs)
    return 0


def trained_on(one, net):
    """The network that a decoder's run exported, if its backbone is that of net."""
    import torch
    import model
    trained = model.load(one.export_path)
    if not all(map(torch.equal, net.backbone.state_dict().values(), trained.backbone.state_dict().values())):
        raise ValueError(f"{one.export_path}: trained on another backbone than that of {one.init}; remove it and its run "
                         f"({Path(one.output_base_dir) / 'runs' / one.experiment}), so that it is trained anew")
    return trained


def join(config, jobs: dict) -> None:
    """Into the weights that they began from all decoders that are trained, and what tells their kinds of images apart.

    A set that the decoder for all serves better on validation keeps it: one of few images gains nothing by one of many.
    """
    import kinds
    import model
    import tuning
    weights = next(iter(jobs.values())).init
    net = model.load(weights)
    story, stories = net.settings.provenance, {}
    general = kinds.gaining(story["scores"]["sets"], [chosen.name for chosen in config.data.sets])
    own = dict(general)
    for name, one in jobs.items():
        if not Path(one.export_path).exists():
            continue
        trained = trained_on(one, net)
        net.give_decoder(name, trained.decoder)
        stories[name], sets = trained.settings.provenance, [chosen.name for chosen in one.data.sets]
        shared = {field: getattr(trained.settings, field) for field in tuning.Setting._fields}
        gained = kinds.gaining(stories[name]["scores"]["sets"], sets)
        for chosen in sets:
            mine, its = stories[name]["scores"]["sets"], story["scores"]["sets"]
            if kinds.reached(mine, gained, chosen) >= kinds.reached(its, general, chosen):
                setting = gained[chosen]["setting"] if chosen in gained else shared
                own[chosen] = dict(setting=dict(setting), decoder=name)
    own = kinds.zoomed(own, config.data.sets, net.settings.zoom)
    looks = trainset.glimpsed(config.data, config.seed, net.settings.tile)
    net.settings = replace(net.settings, kinds=kinds.learnt(net, looks, own, config.unclear), provenance={**story, "decoders": stories})
    model.save(net, weights, half=True)
