"""Speed, as ratios in one run on one machine: every row stands beside what it is compared with.

    python tests/bench.py                         everything
    python tests/bench.py watershed network       some of it: watershed, network

Medians of several runs; the header names hardware and versions. With a CUDA device the network and the watershed
run there as well.
"""
from __future__ import annotations

import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def hardware() -> str:
    import torch
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{cpu}, {torch.get_num_threads()} threads{gpu}"


def versions() -> str:
    import numpy, scipy, skimage, torch                      # noqa: E401
    return (f"Python {platform.python_version()}, torch {torch.__version__}, numpy {numpy.__version__}, "
            f"scipy {scipy.__version__}, scikit-image {skimage.__version__}")


def seconds(run, repeats: int = 5) -> float:
    """Median wall time, after one run that warms up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def table(title: str, head: list[str], rows: list[list[str]]) -> None:
    """A Markdown table, to be pasted as it is."""
    print(f"\n**{title}**\n\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    sys.stdout.flush()


def cells_map(size: int, cells: int, seed: int = 0, cap: float | None = None, levels: int | None = None,
              blur: float = 1.0):
    """Touching round cells as a network would draw them: (size, size) float32 in [0, 1]."""
    import numpy as np
    from scipy import ndimage
    rng = np.random.default_rng(seed)
    y, x = (rng.random((2, cells)) * size).astype(int)
    away = np.ones((size, size), bool)
    away[y, x] = False
    distance, nearest = ndimage.distance_transform_edt(away, return_indices=True)
    owner = np.zeros((size, size), int)
    owner[y, x] = np.arange(cells)
    owner = owner[tuple(nearest)]                            # Voronoi regions, cut to discs: some touch, some do not
    inside = distance < np.sqrt(size * size / cells / np.pi) * rng.uniform(0.6, 1.1, cells)[owner]
    border = (owner != np.roll(owner, 1, 0)) | (owner != np.roll(owner, 1, 1))
    d = ndimage.distance_transform_edt(inside & ~border)
    d = np.minimum(d, cap) / cap if cap else d / np.maximum(ndimage.maximum(d, owner, np.arange(cells))[owner], 1)
    d = ndimage.gaussian_filter(d, blur)
    return (np.round(d * levels) / levels if levels else d).astype(np.float32)


def watershed() -> None:
    import torch
    from scipy import ndimage
    from skimage.segmentation import watershed as theirs
    from watershed import watershed as ours
    rows = []
    for name, options in (("smooth", {}), ("capped at 4 px", dict(cap=4.0)),
                          ("capped at 6 px, 16 levels", dict(cap=6.0, levels=16))):
        d = cells_map(2048, 2000, **options)
        reference = seconds(lambda: theirs(-d, ndimage.label(d > 0.47)[0], mask=d > 0.09), 3)
        expected, got = theirs(-d, ndimage.label(d > 0.47)[0], mask=d > 0.09), ours(d)
        took = seconds(lambda: ours(d), 7)
        rows.append([f"{name}, CPU", f"{reference:.3f} s", f"{took:.3f} s", f"{reference / took:.1f} x",
                     f"{(expected == got).mean():.2%}"])
        if torch.cuda.is_available():
            on_gpu = torch.from_numpy(d).cuda()

            def run():
                ours(on_gpu)
                torch.cuda.synchronize()
            took = seconds(run, 7)
            rows.append([f"{name}, GPU", f"{reference:.3f} s", f"{took:.4f} s", f"{reference / took:.0f} x",
                         f"{(expected == ours(on_gpu).cpu().numpy()).mean():.2%}"])
    table("Watershed, 2048 x 2048 px, 2,000 cells", ["map", "scikit-image", "watershed.py", "faster", "same pixels"], rows)


def network() -> None:
    import torch
    import model
    rows = []
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        net = model.DINOCell().eval().to(device)
        for size in (224, 512):
            parts = model.cost(net, size)
            flops = sum(row[2] for row in parts)
            x = torch.rand(1, 3, size, size, device=device)
            h = size // net.backbone.patch

            def whole():
                net(x)
                x.is_cuda and torch.cuda.synchronize()

            def backbone():
                net.backbone.features(x, net.taps)
                x.is_cuda and torch.cuda.synchronize()

            with torch.inference_mode():
                taps = net.backbone.features(x, net.taps)

                def decoder():
                    net.decoder(x, taps, h, h)
                    x.is_cuda and torch.cuda.synchronize()
                all_of_it, first, second = seconds(whole), seconds(backbone), seconds(decoder)
            work = sum(row[2] for row in parts if row[0].startswith("decoder"))
            rows.append([f"{size}, {device}", f"{all_of_it:.3f} s", f"{flops / all_of_it / 1e9:.0f} GFLOP/s",
                         f"{flops / 1e9:.1f}", f"{first / (first + second):.0%} / {second / (first + second):.0%}",
                         f"{1 - work / flops:.0%} / {work / flops:.0%}"])
    table("S/8, forward pass of one image, float32",
          ["px, device", "time", "rate", "GFLOPs", "time backbone / decoder", "FLOPs backbone / decoder"], rows)


PARTS = {"watershed": watershed, "network": network}


if __name__ == "__main__":
    if "--help" in sys.argv or "-h" in sys.argv:
        sys.exit(print(__doc__.strip()))
    chosen = sys.argv[1:] or list(PARTS)
    if unknown := set(chosen) - set(PARTS):
        sys.exit(f"error: unknown part '{min(unknown)}'; parts: {', '.join(PARTS)}")
    print(f"{hardware()}; {versions()}; {time.strftime('%Y-%m-%d')}")
    for part in chosen:
        PARTS[part]()
