"""Train segmentation on labelled images: python train_seg.py configs/seg.yaml [key=value ...] [--check]

From pretrained weights or from scratch, the network learns each pixel's distance to the edge of its cell (mean squared
error). All images lie on the training device, and each step cuts, turns and disturbs its own crops there. Started
again with the same configuration it goes on from the last checkpoint, to the same weights. --check validates the
configuration, counts the data, estimates time and memory here, and stops. `torchrun --nproc_per_node=4 train_seg.py
configs/seg.yaml` shares the batch out between four GPUs, with the same result.

    runs/<experiment>/config.yaml, log.jsonl, checkpoints/, images/curves.png, images/validation_*.png
    final_models/<experiment>.pt      the averaged weights with the best validation score, for infer.py
"""
from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

import runs


@dataclass(frozen=True)
class Network:
    dim: int = 384                          # width of the backbone
    depth: int = 12                         # blocks
    heads: int = 6                          # attention heads
    patch: int = 8                          # px
    registers: int = 4                      # register tokens
    layerscale: float = 0.1                 # start of LayerScale; small values need long training
    widths: tuple[int, ...] = (256, 128, 64)  # decoder stages, one for each doubling of the grid
    last: int = 32                          # width of the last stage, at full size


@dataclass(frozen=True)
class Data:
    root: str = "."                         # folder that `sets` are in; may change when a run goes on elsewhere
    sets: tuple[str, ...] = ()              # labelled sets (data.examples), each drawn equally often
    validation: tuple[str, ...] = ()        # folders to validate on; empty: a share of each set is held out
    share: float = 0.1                      # of each set that is held out then
    limit: int | None = None                # images used of each set (label efficiency); null: all
    diameter: float | None = None           # px, images are scaled so that median cells come out as wide; null: as is
    fields: int = 0                         # synthetic fields to draw in addition (synthetic.py), a tenth to validate on
    field_size: int = 384                   # px, their side
    field_cells: int = 40                   # cells in the fullest; each field draws its own number, down to a tenth
    field_diameter: float = 56.0            # px, how wide these are


@dataclass(frozen=True)
class Config:
    experiment: str = "seg"                 # name of the run
    checkpoint_name: str = "seg"            # folder of its checkpoints
    export_path: str | None = None          # weights; null: final_models/<experiment>.pt
    output_base_dir: str = "."              # where runs/ and final_models/ are made
    init: str | None = None                 # weights to start from: a backbone (DINOv3, train_ssl.py) or a whole network
    network: Network = field(default_factory=Network)   # from scratch, or the decoder of a new backbone
    data: Data = field(default_factory=Data)
    augment: dict = field(default_factory=dict)          # what happens to crops: changes to augment.Augment
    cap: float | None = 4.0                 # px, distances stop growing here (data.distance_map)
    crop: int = 256                         # px, side of the training crops, and of the tiles later
    seed: int = 0                           # of everything random
    steps: int = 20000                      # optimiser steps
    batch: int = 16                         # crops a step, over all processes
    lr: float = 3e-4                        # at its highest
    lr_end: float = 1e-6                    # at the last step
    warmup: int = 500                       # steps until lr is reached
    weight_decay: float = 0.05              # AdamW; none on biases, norms and scales
    layer_decay: float = 1.0                # lr of each backbone block relative to the next deeper one; 0.8 when pretrained
    clip: float = 1.0                       # norm of the gradient
    ema: float = 0.999                      # the exported weights are a running average with this memory
    train_blocks: int | None = None         # only the last k blocks of the backbone learn; 0: the decoder alone; null: all
    val_every: int = 1000                   # steps between validations
    patience: int | None = None             # stop after so many validations without a better score
    log_every: int = 20                     # steps
    save_every: int = 500                   # steps
    keep: int = 2                           # checkpoints
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "bf16", "float32"] = "auto"   # auto: bf16 where the hardware has it
    compile: bool = False                   # torch.compile: worth its minute on a GPU
    wandb: Literal["off", "online", "offline"] = "off"       # live curves

    def __post_init__(self):
        if self.crop % self.network.patch:
            raise ValueError(f"crop={self.crop}: expected a multiple of the patch, {self.network.patch} px")
        for name in ("steps", "batch", "val_every", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected 1 or more")
        if self.warmup >= self.steps:
            raise ValueError(f"warmup={self.warmup}: expected fewer than steps={self.steps}")
        if not self.data.sets and not self.data.fields:
            raise ValueError("no data: give data.sets (folders of images and labels) or data.fields (synthetic fields)")


def main(config: Config, files: list[str], check: bool = False) -> int:
    import torch
    import augment
    if files:
        raise ValueError(f"{files[0]}: train_seg.py takes one configuration and key=value")
    rank, world, device = runs.join_group(config.device)
    if config.batch % world:
        raise ValueError(f"batch={config.batch}: expected a multiple of the {world} processes")
    changes = runs.from_dict(augment.Augment, config.augment, "augment")
    torch.manual_seed(config.seed)
    train, validation, hashes = load_data(config, device)
    net = build(config)
    if check:
        return print_check(config, net, train, validation, device)
    run = runs.Run(config, rank, world, device)
    state = run.resume()
    net.to(device)
    average = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(config.ema))
    optimiser = torch.optim.AdamW(parameter_groups(net, config), betas=(0.9, 0.999))
    start, best, since = 0, -1.0, 0
    if state:
        net.load_state_dict(state["net"])
        average.load_state_dict(state["average"])
        optimiser.load_state_dict(state["optimiser"])
        start, best, since = state["step"], state["best"], state["since"]
        if config.patience is not None and since >= config.patience:
            start = config.steps                              # it had come to its end
    wrapped = net
    if world > 1:
        wrapped = torch.nn.parallel.DistributedDataParallel(net, device_ids=[device] if "cuda" in device else None)
    if config.compile:
        wrapped.compile()
    share = slice(rank * config.batch // world, (rank + 1) * config.batch // world)
    autocast = torch.autocast(device.split(":")[0], torch.bfloat16, enabled=use_bf16(config, device))

    losses, waited, clock = [], 0.0, time.perf_counter()
    for step in range(start, config.steps):
        factor = runs.cosine(step, config.steps, 1.0, config.lr_end / config.lr, config.warmup)
        for group in optimiser.param_groups:
            group["lr"] = config.lr * factor * group["scale"]
        before = time.perf_counter()
        sample = np.arange(config.batch)[share] + step * config.batch        # numbers that no other sample ever has
        x, target, _ = augment.sample(train, train.draw(config.seed, sample), sample, changes, size=config.crop,
                                      seed=config.seed, cap=config.cap)      # (B, 3, S, S), (B, 1, S, S)
        waited += time.perf_counter() - before
        with autocast:
            predicted = wrapped(x)                                           # (B, 1, S, S)
        loss = (predicted.float() - target).square().mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), config.clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        average.update_parameters(net)
        losses.append(loss.detach())
        done = step + 1

        if done % config.log_every == 0:
            mean = torch.stack(losses).mean().item()
            run.check_finite(done, mean)
            took = time.perf_counter() - clock
            memory = dict(gpu_gib=torch.cuda.max_memory_allocated() / 2**30) if "cuda" in device else {}
            run.log(done, loss=mean, lr=config.lr * factor, weight_decay=config.weight_decay, gradient=norm.item(),
                    images_per_s=len(losses) * config.batch / took, data_share=waited / took, **memory)
            losses, waited, clock = [], 0.0, time.perf_counter()
        better = False
        if done % config.val_every == 0 or done == config.steps:
            before = time.perf_counter()
            scores = validate(average.module, validation, run, done)
            better = scores["score"] > best
            best, since = max(best, scores["score"]), 0 if better else since + 1
            if better and rank == 0:
                export(average.module, config, train.diameter, hashes, scores, done)
            clock += time.perf_counter() - before             # the rate of training, validation aside
        finished = done == config.steps or (config.patience is not None and since >= config.patience)
        stop = not finished and run.should_stop(done)
        if better or finished or stop or done % config.save_every == 0:
            run.check_finite(done, loss.item())
            run.save(done, better, net=net.state_dict(), average=average.state_dict(),
                     optimiser=optimiser.state_dict(), best=best, since=since)
        if finished:
            break
        if stop:
            print(f"stopped at step {done}; the same command goes on from there", file=sys.stderr)
            return run.exit_code()
    if rank == 0:
        print(f"best validation score {best:.4f} -> {export_path(config)}")
    return 0


# -------------------------------------------------------------------------------------------------- data

def load_data(config: Config, device: str):
    """Training images resident on the device; validation list of (name, pixels (3, H, W), labels); content hashes of both."""
    import augment
    import data
    import synthetic
    chosen, validation, groups = [], [], []
    for place in config.data.sets:
        examples = data.examples(Path(config.data.root) / place)
        held = [] if config.data.validation else data.hold_out(examples, config.data.share, config.seed)
        names = {example.name for example in held}
        kept = [example for example in examples if example.name not in names][:config.data.limit]
        chosen += map(read, kept)
        validation += map(read, held)
        groups += [place] * len(kept)
    for place in config.data.validation:
        validation += map(read, data.examples(Path(config.data.root) / place))
    for number in range(config.data.fields):
        seed = config.seed * 100003 + number
        count = round(config.data.field_cells * np.random.default_rng(seed).uniform(0.1, 1))
        drawn = synthetic.field(seed, config.data.field_size, count, config.data.field_diameter)
        for name in synthetic_views(config.seed, number, drawn.channels):
            pixels = drawn.pixels[drawn.channels.index(name)][None]
            pixels = data.to_rgb(data.normalise(pixels, data.percentiles(pixels)))
            entry = (f"synthetic {number} {name}", pixels, drawn.labels)
            if number < max(1, round(0.1 * config.data.fields)):
                validation.append(entry)
            else:
                chosen.append(entry)
                groups.append("synthetic")
    if not validation:
        raise ValueError("no validation images; give data.validation, or data.share so large that some are held out")
    hashes = {part: {name: hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()[:16]
                     for name, pixels, labels in entries} for part, entries in (("train", chosen), ("validation", validation))}
    return augment.Resident(chosen, groups, device, config.cap, config.data.diameter), validation, hashes


def synthetic_views(seed: int, number: int, channels: tuple[str, ...]) -> list[str]:
    """Two channels of each synthetic field, drawn by its number: the network must not lean on one stain.

    DNA shows nuclei and Mito parts of the body: the edge of the cell is not to be seen in them.
    """
    return list(np.random.default_rng((seed, number)).choice([c for c in channels if c not in ("DNA", "Mito")], 2, False))


def read(example) -> tuple[str, np.ndarray, np.ndarray]:
    """(name, pixels (3, H, W) in [0, 1], labels (H, W)) of one labelled image."""
    import data
    pixels, labels = example.image().pixels, example.labels()
    return example.name, data.to_rgb(data.normalise(pixels, data.percentiles(pixels))), labels


# ----------------------------------------------------------------------------------------------- network

def build(config: Config):
    """The network to train: a whole one, a backbone under a new decoder, or all from scratch."""
    import torch
    import model
    shape = config.network
    settings = model.Settings(tile=config.crop, cap=config.cap)
    if config.init is None:
        vit = model.ViT(shape.dim, shape.depth, shape.heads, shape.patch, shape.registers, shape.layerscale)
        net = model.DINOCell(vit, shape.widths, shape.last, settings)
    elif model.kind(config.init) == "DINOCell":
        net = model.load(config.init).train()
        net.settings = dataclasses.replace(net.settings, tile=config.crop, cap=config.cap)
    else:
        net = model.DINOCell(model.load_backbone(config.init, shape.patch), shape.widths, shape.last, settings)
    if config.train_blocks is not None:
        for name, parameter in net.backbone.named_parameters():
            block = int(name.split(".")[1]) if name.startswith("blocks.") else -1
            if block < net.backbone.depth - config.train_blocks:
                parameter.requires_grad_(False)
    return net


def parameter_groups(net, config: Config) -> list[dict]:
    """AdamW's groups: no decay on vectors; smaller lr for shallower blocks when layer_decay < 1."""
    groups: dict[tuple, dict] = {}
    for name, parameter in net.named_parameters():
        if not parameter.requires_grad:
            continue
        depth = net.backbone.depth
        below = 0                                             # blocks between this parameter and the decoder
        if name.startswith("backbone."):
            below = depth - int(name.split(".")[2]) if name.startswith("backbone.blocks.") else depth + 1
        decay = config.weight_decay if parameter.ndim > 1 and "token" not in name else 0.0
        group = groups.setdefault((below, decay), dict(params=[], weight_decay=decay, lr=config.lr,
                                                       scale=config.layer_decay ** below))
        group["params"].append(parameter)
    return list(groups.values())


def use_bf16(config: Config, device: str) -> bool:
    import model
    return config.precision == "bf16" or (config.precision == "auto" and model.has_bf16(device))


# -------------------------------------------------------------------------------------------- validation

PEAKS, FILLS = (0.3, 0.4, 0.5, 0.6, 0.7), (0.1, 0.15, 0.2, 0.25, 0.3, 0.4)


def validate(net, images: list, run: runs.Run, step: int) -> dict:
    """Scores on whole images, at the peak and fill that serve them best; these go into the weights.

    The score that decides is AP averaged over IoU 0.5 to 0.95, mean over images.
    """
    import metrics
    import segment
    from watershed import watershed
    net.eval()
    distances = [segment.distance_map(pixels, net, limits=segment.UNIT) for _, pixels, _ in images]
    truths = [truth for *_, truth in images]
    found = {}
    for peak in PEAKS:
        for fill in FILLS:
            if fill < peak:
                tables = [metrics.overlap(truth, watershed(d, peak, fill)) for d, truth in zip(distances, truths)]
                found[peak, fill] = float(np.mean([metrics.dsb_score(table) for table in tables]))
    (peak, fill), score = max(found.items(), key=lambda item: item[1])
    labels = [watershed(d, peak, fill) for d in distances]
    pooled = metrics.set_scores([metrics.overlap(t, p) for t, p in zip(truths, labels)])
    net.settings = dataclasses.replace(net.settings, peak=peak, fill=fill)
    scores = {"score": score, "peak": peak, "fill": fill, **summary(pooled)}
    run.log(step, **{f"val_{k}" if k != "score" else k: v for k, v in scores.items()})
    if run.rank == 0:
        draw(run, images, labels, step)
    net.train()
    return scores


def summary(scores) -> dict[str, float]:
    """The few numbers worth a line: AP as mean over images, the rest pooled."""
    return {"AP@0.5": scores.mean["AP@0.5"], "AP@0.75": scores.mean["AP@0.75"], "AP@0.9": scores.mean["AP@0.9"],
            **{name: scores.pooled[name] for name in ("F1", "SEG", "DET", "OP_CSB")}}


def draw(run: runs.Run, images: list, labels: list, step: int) -> None:
    """Curves of all that was logged, and the first validation images with what the network finds."""
    import cells
    import report
    log = run.history()
    report.curves(run.folder / "images" / "curves.png", {
        "loss": [(line["step"], line["loss"]) for line in log if "loss" in line],
        **{name: [(line["step"], line[key]) for line in log if key in line]
           for name, key in (("validation score", "score"), ("AP@0.5", "val_AP@0.5"), ("F1 at IoU 0.5", "val_F1"))}})
    for number, ((_, pixels, _), found) in enumerate(zip(images[:4], labels)):
        picture = cells.overlay(pixels, found)
        cells.write_png(run.folder / "images" / f"validation_{number}.png", picture)
        run.log_picture(step, f"validation_{number}", picture)


# ------------------------------------------------------------------------------------------------ export

def export_path(config: Config) -> Path:
    return Path(config.export_path or Path(config.output_base_dir) / "final_models" / f"{config.experiment}.pt")


def export(net, config: Config, diameter: float | None, hashes: dict, scores: dict, step: int) -> None:
    import torch
    import model
    net.settings = dataclasses.replace(net.settings, diameter=diameter, provenance=dict(
        config=runs.to_yaml(config), step=step, scores={k: float(v) for k, v in scores.items()}, commit=commit(),
        torch=str(torch.__version__), images=hashes))
    model.save(net, export_path(config), half=True)


def commit() -> str:
    """The version of the code, with a + when files differ from it."""
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=Path(__file__).parent, text=True,
                              capture_output=True, timeout=10)
        return done.stdout.strip() or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def print_check(config: Config, net, train, validation: list, device: str) -> int:
    """What one wants to know before a job is submitted: nothing is written."""
    import torch
    import augment
    import model
    print(runs.to_yaml(config))
    changes = runs.from_dict(augment.Augment, config.augment, "augment")
    trainable = sum(p.numel() for p in net.parameters() if p.requires_grad)
    print(f"{len(train)} training images, {len(validation)} for validation; "
          f"median cell {train.diameter or 0:.1f} px wide as the network sees it")
    net.to(device)
    optimiser = torch.optim.AdamW(parameter_groups(net, config))
    times = []
    for step in range(4):
        begin = time.perf_counter()
        sample = np.arange(config.batch)
        x, target, _ = augment.sample(train, train.draw(config.seed, sample), sample, changes, size=config.crop,
                                      seed=config.seed, cap=config.cap)
        prepared = time.perf_counter()
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=use_bf16(config, device)):
            predicted = net(x)
        (predicted - target).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if "cuda" in device:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begin, prepared - begin))
    took, data = np.median(times[1:], 0)
    flops = 3 * config.batch * sum(row[2] for row in model.cost(net.cpu(), config.crop))
    print(f"{sum(p.numel() for p in net.parameters()) / 1e6:.1f} M parameters, {trainable / 1e6:.1f} M of them learn; "
          f"{flops / 1e9:.0f} GFLOPs a step")
    print(f"{took:.3f} s a step on {device} ({data / took:.0%} of it crops and augmentation): "
          f"{config.steps} steps take about {config.steps * took / 3600:.1f} h, validation aside")
    if "cuda" in device:
        print(f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of GPU memory at most")
    return 0


if __name__ == "__main__":
    runs.script(__doc__, Config, main)
