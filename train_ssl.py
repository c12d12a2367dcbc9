"""Pretrain a backbone without labels: python train_ssl.py configs/ssl.yaml [key=value ...] [--check]

A student network sees two large and several small views of a field, each through another stain, and learns to
say of them what a teacher, the running mean of the student, says of the large ones (DINO), also of patches
that are hidden from it (iBOT), while features are kept apart (KoLeo). The fields lie on the training device
(stream.FieldPool), each step cuts its own views there. Started again with the same configuration it goes on
from the last checkpoint. --check validates the configuration, prints the table of memory and time, and stops.
With a file of weights after the configuration it trains nothing, but measures that backbone on the fields
held out. `torchrun --nproc_per_node=4 train_ssl.py configs/ssl.yaml` shares the batch out between four GPUs,
with the same result.

    runs/<experiment>/config.yaml, log.jsonl, checkpoints/, images/curves.svg,
    images/<step>/{attention,heads,pca}.png
    final_models/<experiment>.pt      the teacher's backbone, for train_seg.py init= and model.load_backbone
"""
from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

import runs
from fieldset import Data
from probe import Measure
from views import Views


@dataclass(frozen=True)
class Network:
    dim: int = 384                          # width of the backbone
    depth: int = 12                         # blocks
    heads: int = 6                          # attention heads
    patch: int = 8                          # px
    registers: int = 4                      # register tokens
    layerscale: float = 1e-5                # start of LayerScale; 0.1 or more for short training from scratch
    init_std: float = 0.02                  # of linear layers from scratch; DINOv3's. Narrow networks learn sooner with 0.1
    rope_jitter: float = 2.0                # in training coordinates times 1/2 to 2: any crop size will do later
    hidden: int = 2048                      # width of the heads
    bottleneck: int = 256                   # width before the prototypes
    prototypes: int = 8192                  # of each head; 65536 are DINOv3's, for batches in the thousands
    unit: bool = False                      # prototypes keep length 1: for short training of small batches


@dataclass(frozen=True)
class Loss:
    dino: float = 1.0                       # weight: class tokens across views
    ibot: float = 1.0                       # weight: hidden patches
    koleo: float = 0.1                      # weight: nearest class tokens apart
    temperature: float = 0.1                # of the student
    teacher: tuple[float, ...] = (0.04, 0.07)   # temperature of the teacher, before and after its warm-up
    teacher_warmup: int = 10000             # steps
    mask: tuple[float, ...] = (0.1, 0.5)    # share of the patches hidden in half of the global views
    chunk: int = 4096                       # masked patches whose logits are in memory at a time

    def __post_init__(self):
        if len(self.teacher) != 2 or len(self.mask) != 2 or not 0 < self.mask[0] <= self.mask[1] < 1:
            raise ValueError(f"loss.teacher={list(self.teacher)}, loss.mask={list(self.mask)}: expected two numbers "
                             "each, masks between 0 and 1")


@dataclass(frozen=True)
class Config:
    experiment: str = "ssl"                 # name of the run
    checkpoint_name: str = "ssl"            # folder of its checkpoints
    export_path: str | None = None          # weights; null: final_models/<experiment>.pt
    output_base_dir: str = "."              # where runs/ and final_models/ are made
    init: str | None = None                 # backbone to go on from: DINOv3 (its patch 16 is turned into ours), or ours
    network: Network = field(default_factory=Network)   # from scratch; with init: patch, rope_jitter and the heads
    data: Data = field(default_factory=Data)
    views: Views = field(default_factory=Views)         # what is cut from fields
    augment: dict = field(default_factory=dict)         # what happens to its light: changes to augment.Augment
    loss: Loss = field(default_factory=Loss)
    measure: Measure = field(default_factory=Measure)   # on the fields held out
    seed: int = 0                           # of everything random
    steps: int = 300000                     # optimiser steps
    batch: int = 64                         # fields a step, over all processes and parts
    accumulate: int = 1                     # parts a step is computed in; losses look across the fields of one part
    lr: float | None = None                 # at its highest; null: 5e-4 from scratch, 5e-5 with init
    lr_end: float = 1e-6                    # at the last step
    warmup: int = 5000                      # steps until lr is reached
    freeze: int = 1250                      # steps in which the prototypes do not learn yet
    weight_decay: float = 0.04              # AdamW, at the first step; none on biases, norms, tokens, scales
    weight_decay_end: float = 0.4           # at the last step
    layer_decay: float = 0.9                # lr of each block relative to the next deeper one
    patch_lr: float = 0.2                   # lr of the patch embedding, a factor on that
    momentum: float = 0.996                 # the teacher's, at the first step; 1 at the last
    clip: float = 3.0                       # norm of the gradient
    eps: float = 1e-8                       # AdamW's: gradients far below it move nothing
    log_every: int = 50                     # steps
    save_every: int = 1000                  # steps
    keep: int = 2                           # checkpoints
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "bf16", "float32"] = "auto"   # auto: bf16 where the hardware has it
    compile: bool = False                   # torch.compile: worth its minutes on a GPU
    wandb: Literal["off", "online", "offline"] = "off"       # live curves and pictures

    def __post_init__(self):
        for name in ("steps", "batch", "accumulate", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected 1 or more")
        for name in ("lr", "clip"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name):g}: expected more than 0")
        if self.batch % self.accumulate or self.batch < 2 * self.accumulate:
            raise ValueError(f"batch={self.batch}: expected a multiple of accumulate={self.accumulate}, with two "
                             "fields or more in each part")
        if self.warmup >= self.steps:
            raise ValueError(f"warmup={self.warmup}: expected fewer than steps={self.steps}")
        if self.measure.probe_every % self.measure.every:
            raise ValueError(f"measure.probe_every={self.measure.probe_every}: expected a multiple of measure.every="
                             f"{self.measure.every}, since probes are part of a measurement")
        patch, stages = self.network.patch, self.network.patch.bit_length()
        for name, side in (("size", self.views.size), ("local_size", self.views.local_size)):
            if side % patch:
                raise ValueError(f"views.{name}={side}: expected a multiple of the patch, {patch} px")
        if self.measure.probe_every and (self.network.depth < stages or 2 ** (stages - 1) != patch):
            raise ValueError(f"measure.probe_every={self.measure.probe_every}: the decoder of the probe needs a patch "
                             f"of 2, 4, 8 ... px and {stages} blocks, here {patch} px and {self.network.depth} blocks")


def main(config: Config, files: list[str], check: bool = False) -> int:
    import torch
    import views
    rank, world, device = runs.join_group(config.device)
    if config.batch % (world * config.accumulate):
        raise ValueError(f"batch={config.batch}: expected a multiple of {world} processes times "
                         f"accumulate={config.accumulate}")
    light = views.light(config.augment)
    if files:
        return measure_weights(config, files, device)
    torch.manual_seed(config.seed)
    student, teacher = build(config)
    config = dataclasses.replace(config, lr=config.lr or (5e-4 if config.init is None else 5e-5), network=(
        dataclasses.replace(config.network, **teacher.encoder.vit.architecture)))            # as it came from init
    if check:
        return print_check(config, student, teacher, light, device)
    return train(config, student, teacher, light, rank, world, device)


def train(config: Config, student, teacher, light, rank: int, world: int, device: str) -> int:
    import torch
    import fieldset
    import probe
    import ssl_
    import stream
    import views
    run = runs.Run(config, rank, world, device)
    state, start = run.resume(), 0
    pool = fieldset.pool(config.data, config.batch, config.seed, device, rank, world, run.folder / "bad_fields.tsv")
    kinds = views.stains(pool.channels, config.data.brightfield)
    student.to(device), teacher.to(device)
    optimiser = torch.optim.AdamW(parameter_groups(student, config), betas=(0.9, 0.999), eps=config.eps, fused=True)
    usage = torch.zeros(config.network.prototypes, device=device)
    if state:
        student.load_state_dict(state["student"])
        teacher.load_state_dict(state["teacher"])
        optimiser.load_state_dict(state["optimiser"])
        usage.copy_(state["usage"])
        pool.restore(state["pool"])
        start = state["step"]
    wrapped = student
    if world > 1:
        devices = [device] if "cuda" in device else None
        wrapped = torch.nn.parallel.DistributedDataParallel(student, device_ids=devices)
    if config.compile:
        student.encoder.compile()
        teacher.encoder.compile()
    share = slice(rank * config.batch // world, (rank + 1) * config.batch // world)
    autocast = torch.autocast(device.split(":")[0], torch.bfloat16, enabled=use_bf16(config, device))

    pool.stopped = lambda: run.stopping
    with pool, probe.Looker(config, run, export_path(config)) as looker:
        if start == 0:
            looker.look(teacher.encoder.vit, 0)               # the random network: what all else is compared with
        sums, cutting, clock, last = {}, Stopwatch(device), time.perf_counter(), start
        for step in range(start, config.steps):
            rates = schedules(config, step)
            for group in optimiser.param_groups:
                frozen = group["prototypes"] and step < config.freeze
                group["lr"] = 0.0 if frozen else rates["lr"] * group["scale"]
                group["weight_decay"] = rates["weight_decay"] if group["decays"] else 0.0
            try:
                with cutting:
                    slots = pool.sample(config.batch // world, step)
            except stream.Stopped:                            # the pool is being filled: no step was made since
                print(f"stopped at step {step}, waiting for fields; the same command goes on from there", file=sys.stderr)
                return run.exit_code()
            sample = np.arange(config.batch)[share] + step * config.batch    # numbers that no other sample has
            for part in np.array_split(np.arange(len(sample)), config.accumulate):
                with cutting:
                    batch = make_batch(config, pool, slots[part[0]:part[-1] + 1], sample[part], step, light, kinds)
                alone = world > 1 and part[-1] + 1 < len(sample)             # gradients meet at the last part
                with wrapped.no_sync() if alone else contextlib.nullcontext():
                    with autocast:
                        found = wrapped(teacher, batch, rates["temperature"], config.loss)
                    (found["loss"] / config.accumulate).backward()
                for name, value in found.items():
                    if value.ndim == 0:
                        sums[name] = sums.get(name, 0) + value.detach() / config.accumulate
                usage = usage * 0.999 + found["chosen"]                      # the last thousand parts, fading
            norm = torch.nn.utils.clip_grad_norm_(student.parameters(), config.clip)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            ssl_.update(teacher, student, rates["momentum"])
            done = step + 1

            if done % config.log_every == 0:
                means = {name: runs.mean_over_ranks(v / (done - last), world) for name, v in sums.items()}
                run.check_finite(done, means["loss"])
                took = time.perf_counter() - clock
                memory = dict(gpu_gib=torch.cuda.max_memory_allocated() / 2**30) if "cuda" in device else {}
                health = dict(usage=ssl_.perplexity(usage), feature_std=ssl_.spread(found["cls"]),
                              effective_rank=ssl_.effective_rank(found["cls"]))
                run.log(done, **means, **health, **rates, gradient=norm.item(),
                        images_per_s=(done - last) * config.batch / took, data_share=cutting.seconds() / took,
                        **memory, **pool.stats())
                warn_of_collapse(config, run, done, {**means, **health}, found["cls"].shape)
                looker.publish(done)
                sums, cutting, clock, last = {}, Stopwatch(device), time.perf_counter(), done
            finished = done == config.steps
            stop = not finished and run.should_stop(done)
            if finished or done % config.measure.every == 0:
                before = time.perf_counter()
                looker.look(teacher.encoder.vit, done)
                clock += time.perf_counter() - before         # the rate of training, measuring aside
            if finished or stop or done % config.save_every == 0:
                run.check_finite(done, found["loss"].item())
                run.save(done, student=student.state_dict(), teacher=teacher.state_dict(), usage=usage,
                         optimiser=optimiser.state_dict(), pool=from_all_ranks(pool.state(), world))
            if stop:
                print(f"stopped at step {done}; the same command goes on from there", file=sys.stderr)
                return run.exit_code()
    if rank == 0:
        print(f"-> {export_path(config)}")
    return 0


def schedules(config: Config, step: int) -> dict[str, float]:
    """Everything that changes with the step."""
    import optim
    return dict(lr=config.lr * optim.cosine(step, config.steps, 1.0, config.lr_end / config.lr, config.warmup),
                weight_decay=optim.cosine(step, config.steps, config.weight_decay, config.weight_decay_end),
                momentum=optim.cosine(step, config.steps, config.momentum, 1.0),
                temperature=optim.linear(step, config.loss.teacher_warmup, *config.loss.teacher))


# ------------------------------------------------------------------------------------------------ network

def build(config: Config):
    """Student and teacher, alike at the start."""
    import copy
    import torch
    import learner
    import model
    shape = config.network
    if config.init is None:
        vit = model.ViT(shape.dim, shape.depth, shape.heads, shape.patch, shape.registers, shape.layerscale)
        for layer in vit.modules():
            if isinstance(layer, torch.nn.Linear):
                torch.nn.init.trunc_normal_(layer.weight, std=shape.init_std, a=-2 * shape.init_std,
                                            b=2 * shape.init_std)
    else:
        vit = model.load_backbone(config.init, shape.patch)
    student = learner.Learner(vit, shape.prototypes, shape.hidden, shape.bottleneck, shape.unit)
    teacher = copy.deepcopy(student).requires_grad_(False)
    return student, teacher


def traits(name: str, parameter, depth: int, config: Config) -> dict:
    """Smaller lr for shallower blocks and the patch embedding; no decay on vectors and tokens; prototypes apart."""
    import optim
    above = 0 if ".norm." in name else optim.blocks_above(name, "encoder.vit.", depth)
    scale = config.layer_decay ** above * (config.patch_lr if "patch_embed" in name else 1.0)
    return dict(scale=scale, decays=optim.decays(name, parameter), prototypes="prototypes" in name)


def parameter_groups(student, config: Config) -> list[dict]:
    import optim
    depth = student.encoder.vit.depth
    return optim.parameter_groups(student, config.lr, lambda name, parameter: traits(name, parameter, depth, config))


def use_bf16(config: Config, device: str) -> bool:
    import model
    return config.precision == "bf16" or (config.precision == "auto" and model.has_bf16(device))


def make_batch(config: Config, pool, slots, numbers: np.ndarray, step: int, light, kinds):
    """Views, masks and jitter of the samples `numbers`, whose fields are in `slots`, on the pool's device."""
    import learner
    import ssl_
    import views
    from augment import send
    large, small = views.draw(pool, slots, numbers, step, config.seed, config.views, light, kinds)
    side = config.views.size // config.network.patch
    mask = ssl_.block_masks(config.seed, numbers, side, side, config.loss.mask).reshape(2 * len(numbers), -1)
    weight = 1 / np.maximum(mask.sum(1, keepdims=True), 1) * np.ones(mask.shape)
    depth, rng = config.network.depth, np.random.default_rng((config.seed, step))
    jitter = config.network.rope_jitter ** rng.uniform(-1, 1, (depth, 2))    # the same on all processes
    return learner.Batch(large, small, send(mask, large.device), send(np.flatnonzero(mask), large.device),
                         send(weight[mask], large.device), send(jitter, large.device))


# --------------------------------------------------------------------------------------- is it getting better

class Stopwatch:
    """Seconds spent inside `with`, added up: on the GPU by its own clock, without waiting for it."""

    def __init__(self, device: str):
        self.on_gpu, self.spent = "cuda" in device, []

    def _now(self):
        if not self.on_gpu:
            return time.perf_counter()
        import torch
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        return mark

    def __enter__(self) -> None:
        self.begun = self._now()

    def __exit__(self, *_) -> None:
        self.spent.append((self.begun, self._now()))

    def seconds(self) -> float:
        """To be asked after something has waited for the GPU."""
        return sum(a.elapsed_time(b) / 1e3 if self.on_gpu else b - a for a, b in self.spent)


def warn_of_collapse(config: Config, run: runs.Run, step: int, health: dict[str, float], shape) -> None:
    """Loudly, on the screen and in the log: a collapsed network trains on, and its loss looks fine.

    Features become all alike, or, which balancing cannot prevent either, the targets fade until they say nothing.
    shape : of the class tokens that the rank was taken from; with the steps it bounds what could be reached.
    """
    share = health["teacher_entropy"] / math.log(config.network.prototypes)
    if share > config.measure.even and step > config.warmup:
        run.log(step, COLLAPSE=f"the teacher's targets are even to {share:.2%}: nothing is learnt from them; lower "
                               "loss.teacher, or keep the prototypes at length 1 (network.unit)")
    most = min(config.network.prototypes, shape[0] * config.accumulate * min(step, 1000))
    for name, bound in (("usage", config.measure.usage * most),
                        ("effective_rank", config.measure.rank * min(shape[0] - 1, shape[1]))):
        if health[name] < max(bound, 1.5):
            run.log(step, COLLAPSE=f"{name} is {health[name]:.2f}, below {max(bound, 1.5):.2f}: features become all "
                                   "alike; lower lr, raise loss.koleo, or lower the teacher's temperature")


def measure_weights(config: Config, files: list[str], device: str) -> int:
    """Backbones from files, on the fields that this configuration holds out."""
    import model
    import probe
    windows = probe.windows_of(config)
    for path in files:
        vit = model.load_backbone(path, config.network.patch).eval().to(device)
        numbers = probe.measured(vit, windows, config.views.size)[0]
        if windows.labels is not None:
            numbers |= probe.leaks(vit, windows, config.views.size)
        print(f"{path}: " + ", ".join(f"{name} {value:.4f}" for name, value in numbers.items()))
    return 0


# ------------------------------------------------------------------------------------------------ leaving

def from_all_ranks(state: dict, world: int) -> list[dict]:
    """What each process must remember, in the order of their ranks, for the checkpoint that the first one writes."""
    import torch
    states: list = [state] * world
    if world > 1:
        torch.distributed.all_gather_object(states, state)
    return states


def export_path(config: Config) -> Path:
    return Path(config.export_path or Path(config.output_base_dir, "final_models", f"{config.experiment}.pt"))


def print_check(config: Config, student, teacher, light, device: str) -> int:
    """What one wants to know before a job is submitted: nothing is written, nothing fetched from S3."""
    import torch
    import fieldset
    import learner
    import stream
    import views
    print(runs.to_yaml(config))
    train, channels, extent = fieldset.size(config.data, config.seed)
    count = min(train, config.data.pool) if config.data.index else train
    print(f"{train} fields to train on, {count} on the device at a time, {config.data.held} to measure on; "
          f"{extent[0]} x {extent[1]} px in {len(channels)} channels")
    part = config.batch // config.accumulate
    tried = part if "cuda" in device else min(part, 4)        # fields; on a CPU all of them would take minutes
    rng = np.random.default_rng(0)
    noise = ((str(i), rng.integers(0, 60000, (len(channels), *extent), dtype=np.uint16)) for i in range(tried))
    pool = stream.FieldPool.resident(noise, channels, device, seed=config.seed)
    kinds = views.stains(channels, config.data.brightfield)
    student.to(device), teacher.to(device)
    optimiser = torch.optim.AdamW(parameter_groups(student, config), fused=True)
    autocast = torch.autocast(device.split(":")[0], torch.bfloat16, enabled=use_bf16(config, device))
    kept, times = 0, []

    def count_bytes(tensor):
        nonlocal kept
        kept += tensor.nbytes
        return tensor
    counting = torch.autograd.graph.saved_tensors_hooks(count_bytes, lambda tensor: tensor)
    compiled = config.compile and "cuda" in device            # on a CPU it would take minutes
    for step in range(3 + compiled):                          # the first counts; if need be, the second compiles
        if step == 1 and compiled:
            student.encoder.compile()
            teacher.encoder.compile()
        begin = time.perf_counter()
        batch = make_batch(config, pool, pool.sample(tried, step), np.arange(tried), step, light, kinds)
        prepared = time.perf_counter()
        with counting if step == 0 else contextlib.nullcontext(), autocast:
            found = student(teacher, batch, config.loss.teacher[0], config.loss)
        found["loss"].backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if "cuda" in device:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begin, prepared - begin))
    took, cutting = np.median(times[-2:], 0)
    weights = sum(p.nbytes for p in student.parameters())
    rows = int(config.loss.mask[1] * batch.mask.numel() / 2) * part // tried                 # masked patches, at most
    table = [("fields in the pool, 16 bits", 2 * count * len(channels) * extent[0] * extent[1]),
             ("student and teacher", 2 * weights), ("gradients, both moments of AdamW", 3 * weights),
             ("views of one part", (batch.large.nbytes + batch.small.nbytes) * part // tried),
             ("kept for the backward pass, uncompiled", kept * part // tried),
             ("iBOT's logits, one chunk", 16 * min(config.loss.chunk, rows) * config.network.prototypes)]
    for name, size in table + [("sum", sum(size for _, size in table))]:
        print(f"{name:40}{size / 2**30:9.2f} GiB")
    backbone, whole = (sum(p.numel() for p in m.parameters()) / 1e6 for m in (student.encoder, student))
    work = config.batch * learner.flops(student, config.views.size, config.views.local_size, config.views.locals)
    print(f"{backbone:.1f} M parameters in the backbone, {whole:.1f} M with the heads; {work / 1e12:.2f} TFLOPs a step")
    seconds = took * config.batch / tried
    print(f"{seconds:.3f} s a step on {device}{', compiled' * compiled}, tried with {tried} fields ({cutting / took:.0%} of it "
          f"cutting views): {config.steps} steps take about {config.steps * seconds / 3600:.1f} h, measuring aside")
    if "cuda" in device:
        print(f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of GPU memory at most in this trial")
    return 0


if __name__ == "__main__":
    runs.script(__doc__, Config, main)
