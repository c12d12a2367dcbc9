"""Pretrain a backbone without labels: python train_ssl.py configs/ssl.yaml [key=value ...]

The method (DINO, iBOT, KoLeo) is in ssl_.py; the fields lie on the training device (stream.py).
Started again with the same configuration it goes on from the last checkpoint. --check validates
the configuration, prints a table of memory and time, and stops. With files of weights after the
configuration it measures these backbones on the fields held out and trains nothing.
`torchrun --nproc_per_node=4 train_ssl.py configs/ssl.yaml` shares the batch out between four GPUs,
with the same result.

    runs/<experiment>/config.yaml, log.jsonl, checkpoints/, images/curves.svg,
    images/<step>/{attention,heads,pca}.png
    final_models/<experiment>.pt      the teacher's backbone, for train_seg.py init=
"""
from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import sys
import time
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np

import fields
import probe
import runs
from runs import Count, Positive, Share, Whole

with runs.lazy():
    import torch

    import augment
    import model
    import optim
    import ssl_
    import stream


@dataclass(frozen=True)
class BackboneShape:
    dim: runs.Width = 384                        # width of the backbone
    depth: runs.Depth = 12                       # blocks
    heads: runs.Depth = 6                        # attention heads
    patch: runs.Patch = 8                        # px
    registers: Whole = 4                    # register tokens
    layerscale: float = 1e-5                # start of LayerScale; 0.1 or more for short training
    init_std: Positive = 0.02               # of linear layers; 0.1 suits narrow networks
    rope_jitter: Positive = 2.0             # coordinates times 1/2 to 2, for any crop size later
    hidden: Count = 2048                    # width of the heads
    bottleneck: Count = 256                 # width before the prototypes
    prototypes: Count = 8192                # of each head; 65536 for batches in the thousands
    unit: bool = False                      # prototypes keep length 1: for short training


Strategy = Literal["average", "single", "pairs", "average_single", "all"]


@dataclass(frozen=True)
class Views:
    strategy: Strategy = "average_single"   # which channels the views of a field show
    size: runs.Side = 224                       # px, side of the two global views
    local_size: runs.Side = 96                  # px, side of the local views
    locals: Whole = 8                       # local views of a field
    zoom: Positive = 1.0                    # px of the view per px of the field
    scale: tuple[Positive, ...] = (0.7, 1.4)   # low, high: factor on that, each view's own
    overlap: Share = 0.5                    # least share of the smaller global view in the other
    rotate: Share = 0.5                     # probability of a turn by any angle; else by quarters

    def __post_init__(self):
        if len(self.scale) != 2 or self.scale[0] > self.scale[1]:
            raise ValueError(f"views.scale={list(self.scale)}: expected two numbers, low and high")
        if self.zoom * self.scale[0] < 0.33:
            raise ValueError(f"views.zoom={self.zoom:g}, views.scale from {self.scale[0]:g}: "
                             "expected a product of 0.33 or more, below it pixels are skipped")


@dataclass(frozen=True)
class Loss:
    ibot: float = 1.0                       # weight: hidden patches (class tokens: 1)
    koleo: float = 0.1                      # weight: nearest class tokens apart
    teacher: tuple[Positive, ...] = (0.04, 0.07)   # its temperature before and after the warm-up
    teacher_warmup: Whole = 10000           # steps
    mask: tuple[Share, ...] = (0.1, 0.5)    # share of patches hidden in half of the global views
    together: bool = False                  # Sinkhorn over both global views at once, as DINOv2

    def __post_init__(self):
        pairs = len(self.teacher) == len(self.mask) == 2
        if not pairs or not 0 < self.mask[0] <= self.mask[1] < 1:
            raise ValueError(f"loss.teacher={list(self.teacher)}, loss.mask={list(self.mask)}: "
                             "expected two numbers each, masks between 0 and 1")


@dataclass(frozen=True)
class Config:
    experiment: runs.Name = "ssl"           # name of the run
    checkpoint_name: str = "ssl"            # folder of its checkpoints
    export_path: str | None = None          # weights; null: final_models/<experiment>.pt
    output_base_dir: str = "."              # where runs/ and final_models/ are made
    init: str | None = None                 # backbone to go on from, DINOv3's or ours
    # with init only patch, jitter and heads
    network: BackboneShape = field(default_factory=BackboneShape)
    data: fields.FieldData = field(default_factory=fields.FieldData)
    views: Views = field(default_factory=Views)         # what is cut from fields
    augment: dict = field(default_factory=dict)         # their light: changes to augment.Augment
    loss: Loss = field(default_factory=Loss)
    measure: probe.Measure = field(default_factory=probe.Measure)   # on the fields held out
    seed: Whole = 0                         # of everything random
    steps: Count = 300000                   # optimiser steps
    batch: Annotated[int, runs.within(2, 1 << 16)] = 64   # fields a step, over all processes
    lr: Positive | None = None              # highest; null: 5e-4 from scratch, 5e-5 with init
    lr_end: float = 1e-6                    # at the last step
    warmup: Whole = 5000                    # steps until lr is reached
    freeze: Whole = 1250                    # steps in which the prototypes do not learn yet
    weight_decay: float = 0.04              # at the first step; none on vectors and tokens
    weight_decay_end: float = 0.4           # at the last step
    layer_decay: Positive = 0.9             # lr of each block relative to the next deeper one
    patch_lr: float = 0.2                   # lr of the patch embedding, a factor on that
    momentum: Share = 0.996                 # the teacher's, at the first step; 1 at the last
    clip: Positive = 3.0                    # norm of the gradient
    eps: Positive = 1e-8                    # AdamW's: gradients far below it move nothing
    log_every: Count = 50                   # steps
    save_every: Count = 1000                # steps
    keep: Count = 2                         # checkpoints
    device: runs.Device = "auto"
    precision: Literal["auto", "bf16", "float32"] = "auto"   # auto: bf16 where the hardware has it
    compile: bool = False                   # torch.compile: worth its minutes on a GPU
    wandb: runs.WandbMode = "off"           # live curves and pictures; on is online
    wandb_options: runs.WandbOptions = field(default_factory=runs.WandbOptions)

    def __post_init__(self):
        if self.warmup >= self.steps:
            raise ValueError(f"warmup={self.warmup}: expected fewer than steps={self.steps}")
        patch, stages = self.network.patch, self.network.patch.bit_length()
        for name, side in (("size", self.views.size), ("local_size", self.views.local_size)):
            if side % patch:
                raise ValueError(f"views.{name}={side}: expected a multiple of the patch, "
                                 f"{patch} px")
        if self.measure.probe_every and (self.network.depth < stages or 2 ** (stages - 1) != patch):
            raise ValueError(f"measure.probe_every={self.measure.probe_every}: its decoder needs a "
                             f"patch of 2, 4, 8 ... px and {stages} blocks, here {patch} px and "
                             f"{self.network.depth} blocks")


def main(config: Config, files: list[str], check: bool = False) -> int:
    rank, world, device = runs.join_group(config.device)
    if config.batch % world:
        raise ValueError(f"batch={config.batch}: expected a multiple of {world} processes")
    light = ssl_.view_light(config.augment)
    if files:
        return measure_train_ssl(config, files, device)
    torch.manual_seed(config.seed)
    student, teacher = build_train_ssl_student(config)
    config = dataclasses.replace(              # the shape as it came from init
        config, lr=config.lr or (5e-4 if config.init is None else 5e-5),
        network=dataclasses.replace(config.network, **teacher.encoder.vit.architecture))
    student.to(device)
    teacher.to(device)
    if check:
        return print_ssl_plan(config, student, teacher, light, device)
    return pretrain(config, student, teacher, light, rank, world, device)


def pretrain(config: Config, student, teacher, light, rank: int, world: int, device: str) -> int:
    run = runs.Run(config, rank, world, device)
    state, start = run.resume(), 0
    pool = stream.open_pool(config.data, config.batch, config.seed, device, rank, world,
                            run.folder / "bad_fields.tsv")
    kinds = ssl_.view_stains(pool.channels, config.data.brightfield)
    optimiser = train_ssl_optimiser(student, config)
    usage = torch.zeros(config.network.prototypes, device=device)
    learning = dict(student=student, teacher=teacher, optimiser=optimiser)
    if state:
        for name, part in learning.items():
            part.load_state_dict(state[name])
        usage.copy_(state["usage"])
        pool.restore(state["pool"])
        start = state["step"]
    wrapped = student
    if world > 1:                                # gradients are averaged over the processes
        wrapped = torch.nn.parallel.DistributedDataParallel(
            student, device_ids=[device] if "cuda" in device else None)
    if config.compile:
        student.encoder.compile()
        teacher.encoder.compile()
    share = slice(rank * config.batch // world, (rank + 1) * config.batch // world)
    autocast = train_ssl_autocast(config, device)
    pool.stopped = lambda: run.stopping
    looker = probe.Looker(config, run, runs.export_path(config))
    with pool:
        if start == 0:
            looker.look(teacher.encoder.vit, 0)       # the random network, to compare all else with
        since = Since(device)
        for step in range(start, config.steps):
            done = step + 1
            rates = train_ssl_schedules(config, step)
            set_train_ssl_rates(optimiser, rates, frozen=step < config.freeze)
            sample = np.arange(config.batch)[share] + step * config.batch    # its own numbers
            try:
                with since.cutting:
                    slots = pool.sample(config.batch // world, step)
                    batch = make_train_ssl_batch(config, pool, slots, sample, step, light, kinds)
            except runs.Stopped:                    # while the pool was being filled
                print(f"stopped at step {step}, waiting for fields; the same command goes on from "
                      "there", file=sys.stderr)
                return run.exit_code()
            with autocast:
                found = wrapped(teacher, batch, rates["temperature"], config.loss)
            found["loss"].backward()
            norm = torch.nn.utils.clip_grad_norm_(student.parameters(), config.clip)
            if done % config.log_every == 0:
                run.log_gradients(done, student)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            ssl_.update_teacher(teacher, student, rates["momentum"])
            since.add(found)
            usage = usage * 0.999 + found["chosen"]                  # the last 1000 steps, fading

            if done % config.log_every == 0:
                means = since.means(world)
                run.check_finite(done, means["loss"])
                cls = found["cls"]
                health = dict(usage=ssl_.perplexity(usage),
                              feature_std=ssl_.student_feature_std(cls),
                              effective_rank=ssl_.student_effective_rank(cls))
                run.log(done, **means, **health, **rates, gradient=norm.item(),
                        **since.speed(config.batch), **pool.stats())
                warn_of_collapse(config, run, done, {**means, **health}, cls.shape)
                since = Since(device)
            finished = done == config.steps
            stop = not finished and run.should_stop(done)
            if finished or done % config.measure.every == 0:
                with since.paused():
                    looker.look(teacher.encoder.vit, done)
            if finished or stop or done % config.save_every == 0:
                run.check_finite(done, found["loss"].item())
                pools = runs.shared_out(lambda _: pool.state(), range(world), rank, world)
                run.save(done, usage=usage, pool=pools, **{
                    name: part.state_dict() for name, part in learning.items()})
            if stop:
                print(f"stopped at step {done}; the same command goes on from there",
                      file=sys.stderr)
                return run.exit_code()
    if not runs.export_path(config).exists():           # removed, or its folder was moved
        looker.look(teacher.encoder.vit, config.steps)
    if rank == 0:
        print(f"-> {runs.export_path(config)}")
    run.close()
    return 0


def set_train_ssl_rates(optimiser, rates: dict[str, float], frozen: bool) -> None:
    """Set learning rates and weight decay; prototypes may be frozen."""
    for group in optimiser.param_groups:
        group["lr"] = 0.0 if frozen and group["prototypes"] else rates["lr"] * group["scale"]
        group["weight_decay"] = rates["weight_decay"] if group["decays"] else 0.0


def train_ssl_schedules(config: Config, step: int) -> dict[str, float]:
    """Everything that changes with the step."""
    assert config.lr                                                         # main() sets it
    steps, end, decay = config.steps, config.lr_end / config.lr, config.weight_decay
    return dict(lr=config.lr * optim.cosine(step, steps, 1.0, end, config.warmup),
                weight_decay=optim.cosine(step, steps, decay, config.weight_decay_end),
                momentum=optim.cosine(step, steps, config.momentum, 1.0),
                temperature=optim.linear(step, config.loss.teacher_warmup, *config.loss.teacher))


# ----------------------------------------------------------------------------------------- network

def build_train_ssl_student(config: Config):
    """Student and teacher, equal at the start."""
    shape, std = config.network, config.network.init_std
    if config.init is None:
        vit = model.ViT(shape.dim, shape.depth, shape.heads, shape.patch, shape.registers,
                        shape.layerscale)
        for layer in vit.modules():
            if isinstance(layer, torch.nn.Linear):
                torch.nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    else:
        vit = model.load_backbone(config.init, shape.patch)
    student = ssl_.Learner(vit, shape.prototypes, shape.hidden, shape.bottleneck, shape.unit)
    return student, copy.deepcopy(student).requires_grad_(False)


def train_ssl_optimiser(student, config: Config):
    """AdamW, with lower rates for shallower blocks and the patch embedding, prototypes apart."""
    depth = student.encoder.vit.depth

    def traits(name: str, parameter) -> dict:
        above = 0 if ".norm." in name else optim.parameter_blocks_above(name, "encoder.vit.", depth)
        scale = config.layer_decay ** above * (config.patch_lr if "patch_embed" in name else 1.0)
        return dict(scale=scale, decays=optim.decays(name, parameter),
                    prototypes="prototypes" in name)
    groups = optim.parameter_groups(student, config.lr or 0.0, traits)       # set at each step
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=config.eps, fused=True)


def train_ssl_autocast(config: Config, device: str):
    bf16 = config.precision == "bf16" or (config.precision == "auto" and model.has_bf16(device))
    return torch.autocast(device.split(":")[0], torch.bfloat16, enabled=bf16)


def make_train_ssl_batch(config: Config, pool, slots, numbers: np.ndarray, step: int, light,
                         kinds):
    """Views, masks and jitter of the samples `numbers`, whose fields are in `slots` of the pool."""
    large, small = ssl_.draw_views(pool, slots, numbers, step, config.seed, config.views, light,
                                   kinds)
    side = config.views.size // config.network.patch
    mask = ssl_.block_masks(config.seed, numbers, side, side, config.loss.mask)
    mask = mask.reshape(2 * len(numbers), -1)
    weight = 1 / np.maximum(mask.sum(1, keepdims=True), 1) * np.ones(mask.shape)
    depth, rng = config.network.depth, np.random.default_rng((config.seed, step))
    jitter = config.network.rope_jitter ** rng.uniform(-1, 1, (depth, 2))    # the same on all ranks
    sent = (augment.send_crop_values(values, large.device)
            for values in (mask, np.flatnonzero(mask), weight[mask], jitter))
    return ssl_.Batch(large, small, *sent)


# ---------------------------------------------------------------------------- is it getting better

class Stopwatch:
    """Seconds inside `with`, added up: on a GPU by its own clock, without waiting for it."""

    def __init__(self, device: str):
        self.on_gpu = "cuda" in device
        self.spent: list[tuple] = []

    def _now(self):
        if not self.on_gpu:
            return time.perf_counter()
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        return mark

    def __enter__(self) -> None:
        self.begun = self._now()

    def __exit__(self, *_) -> None:
        self.spent.append((self.begun, self._now()))

    def seconds(self) -> float:
        """The sum; call after a wait for the GPU."""
        return sum(a.elapsed_time(b) / 1e3 if self.on_gpu else b - a for a, b in self.spent)


class Since:
    """Sums and times since the last line of the log."""

    def __init__(self, device: str):
        self.steps, self.cutting = 0, Stopwatch(device)
        self.sums: dict[str, Any] = {}
        self.clock = time.perf_counter()

    def add(self, found: dict) -> None:
        """Add the scalars of a step."""
        self.steps += 1
        for name, value in found.items():
            if value.ndim == 0:
                self.sums[name] = self.sums.get(name, 0) + value.detach()

    def means(self, world: int) -> dict[str, float]:
        """Means over the steps and over all processes."""
        return {name: runs.mean_over_ranks(value / self.steps, world)
                for name, value in self.sums.items()}

    @contextlib.contextmanager
    def paused(self):
        """Leave out the time inside."""
        before = time.perf_counter()
        yield
        self.clock += time.perf_counter() - before

    def speed(self, batch: int) -> dict[str, float]:
        """Images a second, the share of the time spent cutting views, and the GPU's memory."""
        took = time.perf_counter() - self.clock
        found = dict(images_per_s=self.steps * batch / took,
                     data_share=self.cutting.seconds() / took)
        if self.cutting.on_gpu:
            found["gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return found


# Collapse: below these shares of the prototypes and the effective rank that could be reached, or
# above this share of the largest entropy of the teacher's targets.
USAGE, RANK, EVEN = 0.02, 0.02, 0.995


def warn_of_collapse(config: Config, run: runs.Run, step: int, health: dict, shape) -> None:
    """Warn on the screen and in the log: the loss of a collapsed network looks fine.

    Features become all alike, or targets become even. shape : of the class tokens of the rank.
    """
    share = health["teacher_entropy"] / math.log(config.network.prototypes)
    if share > EVEN and step > config.warmup:
        run.log(step, COLLAPSE=f"the teacher's targets are even to {share:.2%}: nothing is learnt "
                               "from them; lower loss.teacher, or set network.unit=true")
    used = min(config.network.prototypes, shape[0] * min(step, 1000))
    for name, bound in (("usage", USAGE * used),
                        ("effective_rank", RANK * min(shape[0] - 1, shape[1]))):
        if health[name] < max(bound, 1.5):
            run.log(step, COLLAPSE=f"{name} is {health[name]:.2f}, below {max(bound, 1.5):.2f}: "
                                   "features become all alike; lower lr, raise loss.koleo, or "
                                   "lower loss.teacher")


def measure_train_ssl(config: Config, files: list[str], device: str) -> int:
    """Measure backbones from files on the fields held out."""
    windows = probe.probe_held_windows(config)
    for path in files:
        vit = model.load_backbone(path, config.network.patch).eval().to(device)
        numbers = probe.measure_backbone(vit, windows, config.views.size)[0]
        numbers |= probe.metadata_leaks(vit, windows, config.views.size)
        print(f"{path}: " + ", ".join(f"{name} {value:.4f}" for name, value in numbers.items()))
    return 0


def print_ssl_plan(config: Config, student, teacher, light, device: str) -> int:
    """Print memory, work and time of a step, tried on noise; write and fetch nothing."""
    print(runs.to_yaml(config))
    train, channels, extent = fields.field_extent(config.data, config.seed)
    fields.check_field_count(train, config.batch, config.data)
    count = min(train, config.data.pool) if config.data.index else train
    on_gpu = "cuda" in device
    print(f"{train} fields to train on, {count} on the device at a time, {config.data.held} to "
          f"measure on; {extent[0]} x {extent[1]} px in {len(channels)} channels")
    tried = config.batch if on_gpu else min(config.batch, 4)  # fields; all would take minutes
    rng = np.random.default_rng(0)
    noise = ((str(i), rng.integers(0, 60000, (len(channels), *extent), dtype=np.uint16))
             for i in range(tried))
    pool = stream.ResidentPool(noise, channels, device, seed=config.seed)
    kinds = ssl_.view_stains(channels, config.data.brightfield)
    optimiser, autocast = train_ssl_optimiser(student, config), train_ssl_autocast(config, device)
    kept, times = [], []                                      # bytes, (seconds, of them cutting)

    def count_bytes(tensor):
        kept.append(tensor.nbytes)
        return tensor

    counting = torch.autograd.graph.saved_tensors_hooks(count_bytes, lambda tensor: tensor)
    compiled = config.compile and on_gpu                      # on a CPU it would take minutes
    for step in range(3 + compiled):                          # the first counts, a second compiles
        if step == 1 and compiled:
            student.encoder.compile()
            teacher.encoder.compile()
        begin = time.perf_counter()
        slots = pool.sample(tried, step)
        batch = make_train_ssl_batch(config, pool, slots, np.arange(tried), step, light, kinds)
        prepared = time.perf_counter()
        with counting if step == 0 else contextlib.nullcontext(), autocast:
            found = student(teacher, batch, config.loss.teacher[0], config.loss)
        found["loss"].backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if on_gpu:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begin, prepared - begin))
    took, cutting = np.median(times[-2:], 0)
    weights, whole = sum(p.nbytes for p in student.parameters()), config.batch / tried
    masked = min(student.chunk, config.loss.mask[1] * batch.mask.numel() / 2 * whole)
    table = [("fields in the pool, 16 bits", 2 * count * len(channels) * extent[0] * extent[1]),
             ("student and teacher", 2 * weights),
             ("gradients, both moments of AdamW", 3 * weights),
             ("views", (batch.large.nbytes + batch.small.nbytes) * whole),
             ("kept for the backward pass, uncompiled", sum(kept) * whole),
             ("iBOT's logits, one chunk", 16 * masked * config.network.prototypes)]
    for name, size in [*table, ("sum", sum(size for _, size in table))]:
        print(f"{name:40}{size / 2**30:9.2f} GiB")
    backbone, all_of_it = (sum(p.numel() for p in part.parameters()) / 1e6
                           for part in (student.encoder, student))
    views = config.views
    flops = ssl_.student_step_flops(student, views.size, views.local_size, views.locals)
    print(f"{backbone:.1f} M parameters in the backbone, {all_of_it:.1f} M with the heads; "
          f"{config.batch * flops / 1e12:.2f} TFLOPs a step")
    seconds = took * whole
    print(f"{seconds:.3f} s a step on {device}{', compiled' * compiled}, tried with {tried} fields "
          f"({cutting / took:.0%} of it cutting views): {config.steps} steps take about "
          f"{config.steps * seconds / 3600:.1f} h, measuring aside")
    if on_gpu:
        peak = torch.cuda.max_memory_allocated() / 2**30
        print(f"{peak:.1f} GiB of GPU memory at most in this trial")
    return 0


if __name__ == "__main__":
    runs.script(__doc__, Config, main)
