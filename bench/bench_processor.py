"""Part of bench.py: what share of the rate of a matrix product our networks reach, beside those of
the peers.

    python bench/bench.py processor               inference, a step of train_seg.py, one of
                                                  train_ssl.py; peers
    python bench/bench.py threads                 infer.py alone, and beside as many busy processes
                                                  as there are cores

Other users of a machine change its speed by the minute. So a product of two matrices of 2048 x
2048, in bfloat16 where the device computes in it, is timed before every single run, and what counts
is the ratio of the two medians. The peers' networks have random weights, which cost as much as
trained ones, and run in the same type by autocast.
"""
from __future__ import annotations

import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench import hardware, table, whole_image

ROOT = Path(__file__).resolve().parent.parent
SIZE = 1024                 # px, side of the image that all networks see
SIDE = 2048                 # of the matrices


def waited(run: Callable[[], object]) -> float:
    """Seconds that run() takes, on a GPU until that is done."""
    import torch
    begin = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def beside_product(run: Callable[[], object], device: str, repeats: int) -> tuple[float, float]:
    """(seconds of run(), seconds of a product), medians; each run has its products just before it.
    """
    import torch

    import model
    kind = torch.bfloat16 if model.has_bf16(device) else torch.float32
    a, b = (torch.randn(SIDE, SIDE, device=device).to(kind) for _ in range(2))
    waited(run)
    runs, products = [], []
    for _ in range(repeats):
        products += [waited(lambda: a @ b) for _ in range(4)][1:]
        runs.append(waited(run))
    return statistics.median(runs), statistics.median(products)


def row(name: str, run: Callable[[], object], flops: float | None, device: str,
        repeats: int = 5) -> list[str]:
    took, product = beside_product(run, device, repeats)
    rate = 2 * SIDE**3 / product
    share = [f"{flops / 1e12:.2f}", f"{flops / took / rate:.0%}"] if flops else ["-", "-"]
    return [name, f"{took:.2f} s", f"{rate / 1e12:.2f}", f"{took / product:.0f}", *share]


def processor() -> None:
    import torch
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for part in (inference, supervised, unsupervised, peers):
        rows += (found := part(device))
        # some take minutes
        print(*(" ".join(row) for row in found), sep="\n", file=sys.stderr, flush=True)
    table(f"{hardware()}: one image of {SIZE} x {SIDE // 2} px through the network, tiles "
          f"included; steps of training",
          ["what", "time", "TFLOP/s of a product", "products", "TFLOP", "of that rate"], rows)


def inference(device: str) -> list[list[str]]:
    """The networks that ship, as infer.py runs them."""
    import numpy as np

    import model
    import segment
    rows, image = [], np.random.default_rng(0).random((3, SIZE, SIZE), np.float32)
    for name in ("s8", "tiny"):
        net = model.load(model.find_weights(name))
        flops = sum(part[2] for part in model.cost(net, SIZE // 4)) * 16  # without what tiles share
        net = net.ready(device)
        rows.append(row(f"dinocell_{name}", lambda: segment.distances(image, net,
                                                                      limits=segment.UNIT,
                                                                      zoom=1.0), flops, device))
    return rows


def supervised(device: str) -> list[list[str]]:
    """A step of train_seg.py with the network, loss and optimiser of configs/dinocell_s8.yaml, on
    drawn fields."""
    import numpy as np
    import torch

    import augment
    import data
    import model
    import runs
    import train_seg as script
    config = runs.load_config(script.Config, ROOT / "configs" / "dinocell_s8.yaml")
    images, *_ = augment.load_resident(data.TrainingData(fields=20, field_size=384), 0, device,
                                       config.cap)
    trainer = script.Trainer(config, script.build_train_seg_net(config), device)
    changes = runs.from_dict(augment.Augment, config.augment, "augment")
    flops = 3 * config.batch * sum(part[2] for part in model.cost(trainer.net, config.crop))
    number = 0

    def step() -> None:
        nonlocal number
        sample = np.arange(config.batch) + number * config.batch
        number += 1
        chosen = images.draw(0, sample)
        trainer.step(augment.sample(images, chosen, sample, changes, config.crop, 0, config.cap),
                     1.0, chosen)
    torch.manual_seed(0)
    return [row(f"train_seg.py, {config.batch} crops of {config.crop} px, {config.optimiser}", step,
                flops, device)]


def unsupervised(device: str) -> list[list[str]]:
    """A step of train_ssl.py at S/8 with the views of configs/ssl.yaml; on a CPU with a few fields.
    """
    import bench_ssl

    import model
    import runs
    import ssl_
    import train_ssl
    config = runs.load_config(train_ssl.Config, ROOT / "configs" / "ssl.yaml")
    on_gpu = device == "cuda"
    config = dataclasses.replace(config, batch=64 if on_gpu else 4, compile=on_gpu, lr=5e-4,
                                 precision="bf16" if model.has_bf16(device) else "float32",
                                 data=dataclasses.replace(config.data, index=None,
                                                          fields=96 if on_gpu else 8))
    step = bench_ssl.Step(config, bench_ssl.pool_of(config, device, 1080 if on_gpu else 512),
                          device, plain=False)
    shown = config.views
    flops = config.batch * ssl_.student_step_flops(step.student, shown.size, shown.local_size,
                                                   shown.locals)
    return [row(f"train_ssl.py, {config.batch} fields, 2 x {shown.size} and {shown.locals} x "
                f"{shown.local_size} px", step, flops, device, 3)]


# -------------------------------------------------------------------------------------------- peers

def peers(device: str) -> list[list[str]]:
    """Other programs' networks over the same image; a line says which is not installed."""
    rows = []
    for name, make in (("Cellpose-SAM", cellpose_sam),
                       ("SAMCell's ViT-B, one of 25 windows", samcell),
                       ("InstanSeg's U-Net", instanseg)):
        try:
            net, x = make(device)
        except (ImportError, RuntimeError) as missing:  # a torchvision that does not fit torch
            rows.append([f"{name}: left out, {str(missing).splitlines()[0]}", *"-----"])
            continue
        rows.append(row(name, lambda: forward(net, x, device), None, device,
                        repeats=1 if device == "cpu" and "U-Net" not in name else 5))
    return rows


def forward(net, x, device: str):
    import torch

    import model
    with torch.inference_mode(), torch.autocast(device, torch.bfloat16,
                                                enabled=model.has_bf16(device)):
        return net(x)


def cellpose_sam(device: str):
    """ViT-L with patches of 8 px on 25 tiles of 256 px, which share a tenth, as its eval() cuts
    them."""
    import torch
    from cellpose.vit import CPSAM
    net = CPSAM().to(device).eval()
    return lambda x: [net(tile[None]) for tile in x], torch.rand(25, 3, 256, 256, device=device)


def samcell(device: str):
    """SAM's ViT-B encoder at its one size, to which SAMCell enlarges windows of 256 px that share
    32: 25 for this image. Its decoder is not counted."""
    import torch
    from transformers import SamVisionConfig, SamVisionModel
    return SamVisionModel(SamVisionConfig()).to(device).eval(), torch.rand(1, 3, 1024, 1024,
                                                                           device=device)


def instanseg(device: str):
    """Its U-Net for nuclei and cells, over the whole image at once."""
    import torch
    from instanseg.utils.models.InstanSeg_UNet import InstanSeg_UNet
    net = InstanSeg_UNet(3, [[2, 2, 1], [2, 2, 1]]).to(device).eval()
    return net, torch.rand(1, 3, SIZE, SIZE, device=device)


# ------------------------------------------------------------------------------------------ threads

def threads() -> None:
    """Fair is twice the time: as many other processes as cores take half of each."""
    import runs
    rows, count = [], runs.cores()
    with tempfile.TemporaryDirectory() as folder:
        image = whole_image(SIZE, Path(folder))
        for weights in ("tiny", "s8"):
            took: dict = {}
            for busy in (0, count, 0, count):
                others = [subprocess.Popen([sys.executable, "-c", "while True: pass"])
                          for _ in range(busy)]
                try:
                    begin = time.perf_counter()
                    subprocess.run([sys.executable, ROOT / "infer.py", image, f"weights={weights}",
                                    f"out={folder}/out", "overwrite=true"],
                                   check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                    took.setdefault(busy, []).append(time.perf_counter() - begin)
                finally:
                    for other in others:
                        other.kill()
            alone, beside = (statistics.mean(took[busy]) for busy in (0, count))
            rows.append([weights, f"{alone:.1f} s", f"{beside:.1f} s", f"{beside / alone:.2f}",
                         f"{beside / alone / 2:.2f}"])
    table(f"infer.py on one image of {SIZE} x {SIZE} px, start included, alone and beside {count} "
          f"busy processes on {os.cpu_count()} cores",
          ["weights", "alone", "beside", "times", "of the fair share"], rows)
