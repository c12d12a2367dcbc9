"""Train segmentation on labelled images: python train_seg.py configs/seg.yaml [key=value ...]

From pretrained weights or from scratch, the network learns each pixel's distance to the edge of its
cell (mean squared error). All images lie on the training device, and each step cuts, turns and
disturbs its own crops there. Started again with the same configuration it goes on from the last
checkpoint, to the same weights. --check validates the configuration, counts the data, estimates
time and memory here, and stops. `torchrun --nproc_per_node=4 train_seg.py configs/seg.yaml` shares
the batch out between four GPUs, with the same result.

    runs/<experiment>/          config.yaml, log.jsonl, checkpoints/, images/curves.svg,
                                images/validation_*.png
    final_models/<experiment>.pt      the averaged weights with the best validation score
"""
from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import data
import runs

with runs.lazy():
    import numpy as np
    import torch

    import augment
    import cells
    import metrics
    import model
    import optim
    import report
    import segment
    import vectors
    import watershed


@dataclass(frozen=True)
class NetworkShape:
    arch: Literal["vit", "unet"] = "vit"    # unet: convolutions for the transformer, to compare
    dim: runs.Width = 384                   # width of the backbone
    depth: runs.Depth = 12                  # blocks
    heads: runs.Depth = 6                   # attention heads
    patch: runs.Patch = 8                   # px
    registers: runs.Whole = 4               # register tokens
    layerscale: float = 0.1                 # start of LayerScale; small values need long training
    # decoder stages, one for each doubling of the grid
    widths: tuple[runs.Width, ...] = (256, 128, 64)
    last: runs.Whole = 32                   # width of the last stage, at full size
    stem: int = 1       # levels of convolutions on the image: 1 at full size, 2 at a half, too


@dataclass(frozen=True)
class Config:
    experiment: runs.Name = "seg"           # name of the run
    checkpoint_name: str = "seg"            # folder of its checkpoints
    export_path: str | None = None          # weights; null: final_models/<experiment>.pt
    output_base_dir: str = "."              # where runs/ and final_models/ are made
    # weights to start from: a backbone (DINOv3, train_ssl.py) or a whole network
    init: str | None = None
    new_decoder: bool = False               # take the backbone of init alone
    # of the weights, as SPDX names it: what the images allow; null: that of init, or MIT
    licence: str | None = None
    # few labelled images: of init only the decoder learns (docs/results.md, few examples)
    few: bool = False
    # what is built from scratch
    network: NetworkShape = field(default_factory=NetworkShape)
    data: data.TrainingData = field(default_factory=data.TrainingData)
    augment: dict = field(default_factory=dict)  # what happens to crops: changes to augment.Augment
    edge_weight: runs.NotNegative = 0.0     # k: pixels near an edge count up to 1 + k times
    seam_weight: runs.NotNegative = 0.0     # pixels between touching cells count so much more
    type_weight: runs.Positive = 0.1        # of the types' cross-entropy, where data.types has some
    # px, distances stop growing here (watershed.distance_map)
    cap: Annotated[float, runs.within(0.1, 1000)] | None = 4.0
    crop: runs.Side = 256                   # px, side of the training crops, and of the tiles later
    seed: runs.Whole = 0                    # of everything random
    steps: runs.Count = 20000               # optimiser steps
    batch: runs.Batch = 16                  # crops a step, over all processes
    lr: runs.Positive = 3e-4                # at its highest
    lr_end: runs.NotNegative = 1e-6         # at the last step
    warmup: runs.Whole = 500                # steps until lr is reached
    # of lr; constant: it falls in the last fifth, and until then steps may change
    schedule: Literal["cosine", "constant"] = "cosine"
    # muon: learns from scratch in far fewer steps (optim.py)
    optimiser: Literal["adamw", "muon"] = "adamw"
    weight_decay: runs.NotNegative = 0.05   # none on biases, norms and scales
    # lr of each backbone block relative to the next deeper one; 0.8 when pretrained
    layer_decay: runs.Positive = 1.0
    clip: runs.Positive = 1.0               # norm of the gradient
    eps: runs.Positive = 1e-8               # AdamW's: gradients far below it move nothing
    # then the head learns that tells the diameter of cells; 0: there is none
    size_steps: runs.Whole = 0
    ema: runs.Share = 0.999  # the exported weights are a running average with this memory
    # only the last k blocks of the backbone learn; 0: the decoder alone; null: all
    train_blocks: runs.Whole | None = None
    val_every: runs.Count = 1000            # steps between validations
    patience: runs.Count | None = None      # stop after so many validations without a better score
    log_every: runs.Count = 20              # steps
    save_every: runs.Count = 500            # steps
    keep: runs.Count = 2                    # checkpoints
    device: runs.Device = "auto"
    precision: Literal["auto", "bf16", "float32"] = "auto"   # auto: bf16 where the hardware has it
    compile: bool = False                   # torch.compile: worth its minute on a GPU
    wandb: runs.WandbMode = "off"           # live curves and pictures; on is online
    wandb_options: runs.WandbOptions = field(default_factory=runs.WandbOptions)

    def __post_init__(self):
        if self.crop < 1 or self.crop % self.network.patch:
            raise ValueError(f"crop={self.crop}: expected a multiple of the patch, "
                             f"{self.network.patch} px")
        if self.few and (self.init is None or self.new_decoder or self.train_blocks is not None):
            raise ValueError("few=true chooses what learns of a whole network; give init=, and "
                             "leave new_decoder and train_blocks out")
        if self.warmup >= self.steps:
            raise ValueError(f"warmup={self.warmup}: expected fewer than steps={self.steps}")


def main(config: Config, files: list[str], check: bool = False) -> int:
    if files:
        raise ValueError(f"{files[0]}: train_seg.py takes one configuration and key=value")
    group = runs.join_group(config.device)
    if config.batch % group[1]:
        raise ValueError(f"batch={config.batch}: expected a multiple of the {group[1]} processes")
    with runs.stop_signals():
        return train_network(config, *group, check)


def train_network(config: Config, rank: int, world: int, device: str, check: bool = False) -> int:
    changes = runs.from_dict(augment.Augment, config.augment, "augment")
    if data.training_was_augmented(config.data):
        changes = changes.still()
    torch.manual_seed(config.seed)
    images, validation, hashes = augment.load_resident(config.data, config.seed, device, config.cap)
    net = build_train_seg_net(config, images.diameter)
    if check:
        return print_train_seg_plan(config, net, images, validation, device, changes)
    run = runs.Run(config, rank, world, device)
    state = run.resume()
    trainer = Trainer(config, net, device, world, images)
    average = trainer.average
    start, best, since, patience = 0, -1.0, 0, config.patience or math.inf
    if state:
        check_same_images(run, state["images"], hashes)
        trainer.restore(state)
        start, best, since = state["step"], state["best"], state["since"]
        if since >= patience:
            start = config.steps                              # it had come to its end
    share = slice(rank * config.batch // world, (rank + 1) * config.batch // world)

    meter = Meter(config, run)
    for step in range(start, config.steps):
        factor, done = train_seg_rate(config, step), step + 1
        sample = np.arange(config.batch)[share] + step * config.batch  # no other sample's numbers
        begin = time.perf_counter()
        chosen, batch = training_crops(config, images, changes, sample)
        meter.waited += time.perf_counter() - begin
        look = functools.partial(run.log_gradients, done) if done % config.log_every == 0 else None
        loss, norm = trainer.step(batch, factor, chosen, look)
        meter.losses.append(loss)
        if done % config.log_every == 0:
            meter.log(done, factor, norm)
        better = False
        if done % config.val_every == 0 or done == config.steps:
            try:
                begin = time.perf_counter()
                scores = validate(average.module, validation, run, done)
                meter.begun += time.perf_counter() - begin        # counts for no step
            except runs.Stopped:
                print(f"stopped in the validation of step {done}; the same command goes on from "
                      "the last checkpoint", file=sys.stderr)
                return run.exit_code()
            better = scores["score"] > best
            best, since = max(best, scores["score"]), 0 if better else since + 1
            if better and rank == 0:
                export_trained(average.module, config, hashes, scores, done)
        finished = done == config.steps or since >= patience
        stop = not finished and run.should_stop(done)
        if better or finished or stop or done % config.save_every == 0:
            run.check_finite(done, loss.item())
            run.save(done, better, **trainer.state(), best=best, since=since, images=hashes)
        if finished:
            break
        if stop:
            print(f"stopped at step {done}; the same command goes on from there", file=sys.stderr)
            return run.exit_code()
    if not finish_export(trainer, run, validation):
        return run.exit_code()
    if rank == 0:
        print(f"best validation score {best:.4f} -> {runs.export_path(config)}")
    run.close()
    return 0


def training_crops(config: Config, images, changes, sample: np.ndarray) -> tuple:
    """The images that samples (B,) are cut from, and x, targets and labels of the crops."""
    chosen = images.draw(config.seed, sample)
    return chosen, augment.sample(images, chosen, sample, changes, config.crop, config.seed,
                                  config.cap)


class Meter:
    """Losses and time since the last line of the log."""

    def __init__(self, config: Config, run: runs.Run):
        self.config, self.run = config, run
        self.begin()

    def begin(self) -> None:
        self.losses: list[torch.Tensor] = []
        self.waited, self.begun = 0.0, time.perf_counter()    # s, for crops; since the last line

    def log(self, done: int, factor: float, norm: torch.Tensor) -> None:
        """Write a line, and begin anew."""
        config, run, took = self.config, self.run, time.perf_counter() - self.begun
        mean = runs.mean_over_ranks(torch.stack(self.losses).mean(), run.world)
        run.check_finite(done, mean)
        memory = {}
        if "cuda" in run.device:
            memory["gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
        run.log(done, loss=mean, lr=config.lr * factor, weight_decay=config.weight_decay,
                gradient=norm.item(), images_per_s=len(self.losses) * config.batch / took,
                data_share=self.waited / took, **memory)
        self.begin()


def train_seg_rate(config: Config, step: int) -> float:
    """The learning rate of a step, as a factor on its highest."""
    end = config.lr_end / config.lr
    if config.schedule == "constant":
        return optim.constant(step, config.steps, end, config.warmup)
    return optim.cosine(step, config.steps, 1.0, end, config.warmup)


# ------------------------------------------------------------------------------------------ network

class Trainer:
    """A network, its optimiser and its running average, and the step that changes all three."""

    def __init__(self, config: Config, net, device: str, world: int = 1, images=None):
        bf16 = train_seg_uses_bf16(config, device)
        self.config, self.net, self.images, self.world = config, net, images, world
        self.balance: torch.Tensor | None = None               # (1 + K,) weight of each type
        if config.data.types:
            self.balance = type_balance(images.types, len(net.type_names))
        # not for float32 on a CPU
        self.layout = torch.channels_last if bf16 or "cuda" in device else torch.contiguous_format
        self.autocast = torch.autocast(device.split(":")[0], torch.bfloat16, enabled=bf16)
        net.to(device, memory_format=self.layout)
        mean = torch.optim.swa_utils.get_ema_multi_avg_fn(config.ema)
        self.average = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=mean)
        self.optimiser = train_seg_optimiser(net, config, device)
        self.wrapped = net
        if world > 1:
            self.wrapped = torch.nn.parallel.DistributedDataParallel(
                net, device_ids=[device] if "cuda" in device else None)
        if config.compile:
            self.wrapped.compile()

    def state(self) -> dict:
        """Its part of a checkpoint."""
        return dict(net=self.net.state_dict(), average=self.average.state_dict(),
                    optimiser=self.optimiser.state_dict())

    def restore(self, state: dict) -> None:
        """Go on from a checkpoint."""
        self.net.load_state_dict(state["net"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])

    def step(self, batch: tuple, factor: float, chosen: np.ndarray, look=None) -> tuple:
        """Learn from x (B, 3, S, S), targets (B, 1, S, S) and labels (B, S, S) of the images
        `chosen` (B,), at `factor` of the learning rate; returns the loss and the norm of its
        gradient.

        look : called with the network while it has its gradients.
        """
        x, target, labels = batch
        for group in self.optimiser.param_groups:
            group["lr"] = self.config.lr * factor * group["scale"]
        x = x.contiguous(memory_format=self.layout)
        more: torch.Tensor | float = 0.0
        with self.autocast:
            if self.balance is None:
                predicted = self.wrapped(x)                                  # (B, 1, S, S)
            else:
                predicted, logits, place = self.wrapped(x, labels)
                more = self.config.type_weight * self.type_loss(logits, place, chosen)
        loss = model.distance_loss(predicted.float(), target, labels, self.config.edge_weight,
                                   self.config.seam_weight) + more
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.config.clip)
        if look:
            look(self.net)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.average.update_parameters(self.net)
        return loss.detach(), norm

    def type_loss(self, logits, place, chosen: np.ndarray):
        """Cross-entropy of types (n, K) over the cells of known type, 0 without any."""
        assert self.balance is not None
        types = augment.crop_cell_types(self.images, chosen, place)
        weight = self.balance[types]
        each = torch.nn.functional.cross_entropy(logits.float(), (types - 1).clamp(min=0),
                                                 reduction="none")
        whole = weight.sum()                            # of all processes, whose means are averaged
        if self.world > 1:
            torch.distributed.all_reduce(whole)
            whole = whole / self.world
        return (each * weight).sum() / whole.clamp(min=1e-6)


def check_same_images(run: runs.Run, before: dict, now: dict) -> None:
    """Refuse to go on with more, fewer or otherwise divided images, {train, validation: {name:
    hash}}; say where one has another content."""
    old, new = ({name: side for side in each for name in each[side]} for each in (before, now))
    if old != new:
        more, gone = len(new.keys() - old.keys()), len(old.keys() - new.keys())
        raise ValueError(f"{run.folder} was begun with other images, or others held out ({more} "
                         f"new, {gone} gone); give a new experiment= name, or remove the folder to "
                         "begin anew")
    other = [name for side in now for name in now[side] if now[side][name] != before[side][name]]
    if other and run.rank == 0:
        print(f"warning: {runs.listed(other)}: not as when {run.folder} was begun", file=sys.stderr)


def type_balance(types, count: int):
    """(1 + K,) weights that let every type count the same, 0 for cells of unknown type."""
    held = torch.bincount(types, minlength=1 + count).float()
    balance = held[1:].sum() / (count * held.clamp(min=1))
    balance[0] = 0
    return balance


def learn_heads(config: Config, run: runs.Run) -> bool:
    """Learn what comes after the network, types and sizes; False: a signal came."""
    if config.data.types:
        fit_types(config, run)
    return not config.size_steps or train_size_head(config, run)


SIZED = 24          # images of each set that the size head learns from


def train_size_head(config: Config, run: runs.Run) -> bool:
    """Train the size head on what the exported weights make of images that are too large or too
    small, and add it to them. False: a signal came, and it begins anew next time."""
    net = model.load(runs.export_path(config))
    if net.size is not None:
        return True
    ready, typical = copy.deepcopy(net).ready(run.device), net.settings.diameter
    assert typical is not None                                # size_steps: data.diameter
    rng, count = np.random.default_rng(config.seed), Counter[str]()
    seen: list[torch.Tensor] = []
    logs, sets = [], []
    pending, _ = data.training_images(config.data, config.seed)
    for number in rng.permutation(len(pending)):
        if run.stopping:
            return False
        for image in pending[number]():
            own, shift = data.median_diameter(image.labels), rng.uniform(-0.5, 0.5)  # octaves
            if not own or count[image.set] == SIZED:
                continue
            count[image.set] += 1
            octaves = shift + np.arange(-4, 5)                # zooms a factor of two apart
            seen.append(segment.described_cells(
                segment.as_source(image.pixels), ready, segment.UNIT,
                (typical / own * 2 ** octaves).tolist()))
            logs.append(torch.from_numpy(math.log(2) * octaves).float())
            sets.append(image.set)
    net.add_size_head()
    weights = np.array([count[name] ** -0.5 for name in sets])
    losses = fit_size_head(net.size, torch.stack(seen), torch.stack(logs),
                           torch.from_numpy(weights / weights.mean()).float(), config)
    for done in range(config.log_every, len(losses) + 1, config.log_every):
        run.log(config.steps + done,
                size_loss=float(np.mean(losses[done - config.log_every:done])))
    model.save(net, runs.export_path(config), half=True)
    return True


def fit_size_head(head, seen, logs, weights, config: Config) -> list[float]:
    """Fit it to images described at more zooms than it sees, (n, Z, features), where cells have the
    logs of diameters (n, Z); errors are absolute, of its word and, for a third, of each zoom's.
    Returns each step's."""
    torch.manual_seed(config.seed)
    head.mean.copy_(seen.flatten(0, 1).mean(0))
    head.spread.copy_(seen.flatten(0, 1).std(0).clamp(min=1e-3))
    optimiser = torch.optim.AdamW(head.parameters(), 3e-3, weight_decay=0.1)
    n, losses = len(model.SIZE_ZOOMS), []
    head.train()
    for step in range(config.size_steps):
        optimiser.param_groups[0]["lr"] = 3e-3 * (1 - step / config.size_steps)
        some = torch.randint(len(seen), (256,))
        first = torch.randint(seen.shape[1] - n + 1, (256, 1))
        zooms = first + torch.arange(n)
        x, y = seen[some[:, None], zooms], logs[some[:, None], zooms]
        error = (head(x) - y[:, n // 2]).abs() + (head.votes(x)[0] - y).abs().mean(1) / 3
        loss = (error * weights[some]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    head.eval()
    return losses


def fit_types(config: Config, run: runs.Run) -> None:
    """Fit the type head of the exported weights anew, on all cells of the training images whole."""
    net = model.load(runs.export_path(config))
    pending, _ = data.training_images(config.data, config.seed)
    images = (image._replace(zoom=config.data.diameter / own) if config.data.diameter and
              (own := data.median_diameter(image.labels)) else image
              for read in pending for image in read())
    rows, types = typed_vectors(images, copy.deepcopy(net).ready(run.device))
    head = vectors.linear_type_head(rows, types - 1, len(net.type_names))
    net.set_types(head, net.type_names)
    model.save(net, runs.export_path(config), half=True)


def typed_vectors(images: Iterable[data.Labelled], net) -> tuple[np.ndarray, np.ndarray]:
    """Rows (n, D + 8) and types (n,) of the true cells of known type."""
    rows, types = [], []
    for image in images:
        assert image.types is not None
        _, row = segment.cell_vectors(image.pixels, image.labels, net, outlines=True,
                                      limits=segment.UNIT, zoom=image.zoom)
        rows.append(row[image.types > 0])
        types.append(image.types[image.types > 0])
    return np.concatenate(rows), np.concatenate(types)


def build_train_seg_net(config: Config, diameter: float | None = None):
    """Network to train: a whole one, a backbone under a new decoder, or all from scratch; diameter:
    px, of the cells that it will learn."""
    shape = config.network
    settings = model.Settings(tile=config.crop, cap=config.cap, diameter=diameter,
                              licence=model.licence_of(config.init))
    if config.init is None:
        if shape.arch == "unet":
            backbone = model.ConvNet(shape.dim, shape.depth, shape.patch)
        else:
            backbone = model.ViT(shape.dim, shape.depth, shape.heads, shape.patch, shape.registers,
                                 shape.layerscale)
        net = model.DINOCell(backbone, shape.widths, shape.last, settings, shape.stem)
    elif model.kind(config.init) == "DINOCell" and not config.new_decoder:
        net = model.load(config.init).train()
        known = net.settings.diameter
        net.settings = dataclasses.replace(net.settings, tile=config.crop, cap=config.cap,
                                           diameter=diameter, score={})  # fitted to what it was
        if config.size_steps:
            net.remove_size_head()                          # it is learnt anew at the end
        elif net.size is not None and config.data.diameter and diameter and math.isclose(
                known or 0, diameter, rel_tol=1e-3):
            net.size.requires_grad_(False)                  # cells are as wide as it knows them
        elif net.size is not None:
            print(f"{config.init}: its size head knows cells of {known or 0:.3g} px, not those to "
                  "learn now, and is left out; weights without one take the image as it is, "
                  "size_steps= teaches one", file=sys.stderr)
            net.remove_size_head()
    elif config.few:
        raise ValueError(f"few=true, init={config.init}: a backbone alone, expected a whole "
                         "network")
    else:
        net = model.DINOCell(model.load_backbone(config.init, shape.patch), shape.widths,
                             shape.last, settings, shape.stem)
    if config.data.types:        # of vectors alone; fit_types() at the end knows outlines as well
        net.set_types(torch.nn.Linear(net.backbone.dim, len(config.data.types)),
                      list(map(str, config.data.types)))
    elif net.types is not None and not config.few:
        print(f"{config.init}: tells types, the new weights will not; data.types teaches some",
              file=sys.stderr)
        net.remove_types()
    if config.few:
        net.requires_grad_(False)
        net.decoder.requires_grad_(True)
        if net.types is not None and config.data.types:
            net.types.requires_grad_(True)
    if config.train_blocks is not None:
        for name, parameter in net.backbone.named_parameters():
            block = int(name.split(".")[1]) if name.startswith("blocks.") else -1
            if block < net.backbone.depth - config.train_blocks:
                parameter.requires_grad_(False)
    return net


def train_seg_optimiser(net, config: Config, device: str):
    groups = optim.parameter_groups(net, config.lr, lambda name, parameter: train_seg_traits(
        name, parameter, net.backbone.depth, config))
    if config.optimiser == "muon":
        products = torch.bfloat16 if train_seg_uses_bf16(config, device) else torch.float32
        return optim.Muon(groups, config.lr, eps=config.eps, products=products)
    return torch.optim.AdamW(groups, config.lr, betas=(0.9, 0.999), eps=config.eps, fused=True)


def train_seg_traits(name: str, parameter, depth: int, config: Config) -> dict:
    """Traits of a parameter's group: lr falls with depth by layer_decay; Muon takes the matrices
    between the patch embedding and the head."""
    above = optim.parameter_blocks_above(name, "backbone.", depth)
    decays = optim.decays(name, parameter)
    return dict(above=above, decays=decays, matrix=decays and "patch_embed" not in name
                and "head" not in name and not name.startswith("types"),
                weight_decay=config.weight_decay * decays, scale=config.layer_decay ** above)


def train_seg_uses_bf16(config: Config, device: str) -> bool:
    return config.precision == "bf16" or (config.precision == "auto" and model.has_bf16(device))


# --------------------------------------------------------------------------------------- validation

def validate(net, images: list[data.Labelled], run: runs.Run, step: int) -> dict:
    """Scores on whole images, with the watershed's setting that serves all sets best; it goes into
    the weights.

    What decides is AP over IoU 0.5 to 0.95: mean over the images of a set, then over sets by their
    weight in training (1 for others), so that a set of many images drowns none.
    """
    ready = copy.deepcopy(net).ready(run.device)              # as in infer.py
    weights = {chosen.name: chosen.weight for chosen in run.config.data.sets}
    maps = [torch.from_numpy(distance).to(run.device) for distance in run.each(
        lambda image: segment.distances(image.pixels, ready, limits=segment.UNIT, zoom=image.zoom),
        images)]

    def cells_of(i: int, setting: watershed.Setting) -> np.ndarray:
        return watershed.flood(maps[i], setting, images[i].zoom).cpu().numpy()

    def score(setting: watershed.Setting, numbers: Sequence[int] = range(len(images))) -> float:
        values = run.each(lambda i: float(metrics.average_precision(
            images[i].labels, cells_of(i, setting)).mean()), numbers)
        means = mean_by_set([images[i] for i in numbers], values)
        return float(np.average([*means.values()],
                                weights=[weights.get(name, 1.0) for name in means]))

    best = watershed.tune(score)
    held = [i for i, image in enumerate(images) if image.held]
    labels = [cells_of(i, best) for i in held]
    tables = [metrics.overlap(images[i].labels, answer) for i, answer in zip(held, labels)]
    net.settings = dataclasses.replace(net.settings, **best._asdict())
    sets = {name: validation_summary(metrics.set_scores([table for table, i in zip(tables, held)
                                                         if images[i].set == name]))
            for name in dict.fromkeys(images[i].set for i in held)}
    scores = {"score": score(best, held), **best._asdict(),
              **validation_summary(metrics.set_scores(tables))}
    if net.types is not None and images[0].types is not None:
        scores["types"] = segmentation_type_score([images[i] for i in held], ready)
    run.log(step, **{f"val_{k}" if k != "score" else k: v for k, v in scores.items()},
            **{f"AP@0.5 {name}": row["AP@0.5"] for name, row in sets.items() if len(sets) > 1})
    if run.rank == 0:
        draw_run_charts(run, [images[i] for i in held], labels, step)
    return {**scores, "sets": sets}


def mean_by_set(images: Sequence[data.Labelled], values: Sequence[float]) -> dict[str, float]:
    """Mean value of the images of each set."""
    found: dict[str, list[float]] = {}
    for image, value in zip(images, values):
        found.setdefault(image.set, []).append(value)
    return {name: float(np.mean(some)) for name, some in found.items()}


def segmentation_type_score(images: list[data.Labelled], net) -> float:
    """Mean F1 over the types, of the true cells of known type."""
    rows, truth = typed_vectors(images, net)
    answer = 1 + net.type_probabilities(rows).argmax(1)
    return report.chart_mean(metrics.type_f1(truth, answer, range(1, 1 + len(net.type_names))))


def validation_summary(scores) -> dict[str, float]:
    """The few numbers worth a line: AP as mean over images, the rest pooled."""
    return {**{name: scores.mean[name] for name in ("AP@0.5", "AP@0.75", "AP@0.9")},
            **{name: scores.pooled[name] for name in ("F1", "SEG", "DET", "OP_CSB")}}


def draw_run_charts(run: runs.Run, images: list[data.Labelled], labels: list, step: int) -> None:
    """Draw curves of the log, and the cells of one validation image a set (two of a single set)."""
    log = run.history()
    report.write_curves(run.folder / "images" / "curves.svg", {
        "loss": [(line["step"], line["loss"]) for line in log if "loss" in line],
        **{name: [(line["step"], line[key]) for line in log if key in line]
           for name, key in (("validation score", "score"), ("AP@0.5", "val_AP@0.5"),
                             ("F1 at IoU 0.5", "val_F1"))}})
    first = {image.set: number for number, image in reversed(list(enumerate(images)))}
    for number in sorted({*first.values(), len(images) - 1}):
        picture = cells.overlay(images[number].pixels, labels[number])
        cells.write_picture(run.folder / "images" / f"validation_{number}.png", picture)
        run.log_picture(step, f"validation_{number}", picture)


# ------------------------------------------------------------------------------------------- export

def export_trained(net, config: Config, hashes: dict, scores: dict, step: int) -> None:
    """Write the weights for infer.py."""
    net, names = copy.deepcopy(net), shared_set_names(config)
    scores = {**scores, "sets": {names.get(name, name): row
                                 for name, row in scores["sets"].items()}}
    images = {side: {shared_image_name(name, names): each for name, each in known.items()}
              for side, known in hashes.items()}
    story = runs.provenance(config, step, scores=scores, images=images)
    net.settings = dataclasses.replace(net.settings, provenance=story,
                                       licence=config.licence or net.settings.licence)
    model.save(net, runs.export_path(config), half=True)


def shared_set_names(config: Config) -> dict[str, str]:
    """{name of a set: as the configuration inside weights has it, without paths of this machine}"""
    told, names = runs.parse_yaml(runs.to_yaml(config, shared=True))["data"], dict[str, str]()
    for own, given in zip((*config.data.sets, *config.data.validation),
                          (*told["sets"], *told["validation"])):
        if own.name not in names:
            names[own.name] = data.TrainingSet(**given).name
            while [*names.values()].count(names[own.name]) > 1:    # folders of one name, elsewhere
                names[own.name] += "_"
    return names


def shared_image_name(name: str, sets: dict[str, str]) -> str:
    """Name of an image, SET/NAME, with that of its set as shared_set_names() has it."""
    own = max((one for one in sets if name.startswith(f"{one}/")), key=len, default="")
    return sets.get(own, "") + name[len(own):]


def finish_export(trainer: Trainer, run: runs.Run, validation: list[data.Labelled]) -> bool:
    """See that the best weights are in their file, with their heads. False: a signal came."""
    gone = not runs.export_path(trainer.config).exists()
    group = run.rank, run.world
    if runs.shared_out(lambda _: gone, range(run.world), *group)[0]:     # as the first process sees
        try:
            export_best_again(trainer, run, validation)
        except runs.Stopped:
            return False
    return run.rank > 0 or learn_heads(trainer.config, run)


def export_best_again(trainer: Trainer, run: runs.Run, validation: list[data.Labelled]) -> None:
    """Export the best weights of a run whose file is gone: removed, or its folder moved. Their
    thresholds are in no checkpoint, so that they are validated once more."""
    config, net, path = trainer.config, trainer.average.module, run.checkpoints / "best.pt"
    if not path.is_file():
        raise ValueError(f"{runs.export_path(config)}: gone, and {path}, which it could be written "
                         "from, too; give a new experiment= name to begin anew")
    best = runs.load_torch(path)
    trainer.average.load_state_dict(best["average"])
    scores = validate(net, validation, run, best["step"])
    if run.rank == 0:
        export_trained(net, config, best["images"], scores, best["step"])


def print_train_seg_plan(config: Config, net, images, validation: list, device: str, changes
                         ) -> int:
    """Print a summary without training."""
    print(runs.to_yaml(config))
    trainable = sum(p.numel() for p in net.parameters() if p.requires_grad)
    print(f"{len(images)} training images, {sum(image.held for image in validation)} for "
          f"validation; median cell {images.diameter or 0:.1f} px wide as the network sees it")
    flops = 3 * config.batch * sum(row[2] for row in model.cost(net, config.crop))
    compiled = config.compile and "cuda" in device            # on a CPU it would take minutes
    trainer = Trainer(dataclasses.replace(config, compile=compiled), net, device, images=images)
    times = []
    for _ in range(5):  # the first two compile, measure, take memory
        begin = time.perf_counter()
        chosen, batch = training_crops(config, images, changes, np.arange(config.batch))
        prepared = time.perf_counter()
        trainer.step(batch, 1.0, chosen)
        if "cuda" in device:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begin, prepared - begin))
    took, prepared = np.median(times[2:], 0)
    print(f"{sum(p.numel() for p in net.parameters()) / 1e6:.1f} M parameters, "
          f"{trainable / 1e6:.1f} M of them learn; {flops / 1e9:.0f} GFLOPs a step")
    print(f"{took:.3f} s a step on {device}{', compiled' * compiled} ({prepared / took:.0%} of it "
          f"crops): {config.steps} steps take about {config.steps * took / 3600:.1f} h, "
          "validation aside")
    if "cuda" in device:
        print(f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of GPU memory at most")
    with contextlib.suppress(ImportError):
        import resource  # not on Windows
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        print(f"{peak / 2**30:.1f} GiB of memory at most")
    return 0


if __name__ == "__main__":
    runs.script(__doc__, Config, main)
