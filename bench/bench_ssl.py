"""Speed of pretraining: a step as train_ssl.py runs it against one of plain modules, and what each
operation is bound by.

    python bench/bench.py ssl

On a GPU the shape of configs/ssl.yaml (S/8, 64 fields, 2 x 224 and 8 x 96 px, bf16, compiled); on a
CPU a small one in float32, uncompiled: there the two ways differ by little. The rate that
utilisation is a share of, a large matrix product, and the bandwidth, a large copy, are measured in
the same run. `plain` runs the backbone once for each size of crops, uncompiled, and holds all of
iBOT's logits at once.
"""
from __future__ import annotations

import time

from bench import seconds, table


def config_of(on_gpu: bool):
    import runs
    import train_ssl
    network = {} if on_gpu else dict(dim=128, depth=4, heads=2, hidden=512, prototypes=1024)
    shown = {} if on_gpu else dict(size=96, local_size=48, locals=4, zoom=0.5, scale=[0.8, 1.2])
    return runs.from_dict(train_ssl.Config, dict(
        network=network, views=shown, data=dict(fields=96 if on_gpu else 12),
        batch=64 if on_gpu else 8, lr=5e-4,
        precision="bf16" if on_gpu else "float32", compile=on_gpu), "bench")


def pool_of(config, device: str, size: int):
    """Noise: what pixels show costs nothing."""
    import numpy as np

    import stream
    import synthetic
    rng = np.random.default_rng(0)
    fields = ((str(i), rng.integers(100, 60000, (8, size, size), dtype=np.uint16))
              for i in range(config.data.fields))
    return stream.ResidentPool(fields, synthetic.CHANNELS, device)


class Step:
    """One optimiser step after the other, as in train_ssl.main."""

    def __init__(self, config, pool, device: str, plain: bool):
        import numpy as np
        import torch

        import ssl_
        import train_ssl
        torch.manual_seed(0)
        self.config, self.pool, self.device, self.number = config, pool, device, 0
        self.student, self.teacher = (part.to(device)
                                      for part in train_ssl.build_train_ssl_student(config))
        if plain:
            for part in (self.student, self.teacher):
                part.encoder = one_by_one(part.encoder.vit)
            self.student.chunk = 10**9
        elif config.compile:
            self.student.encoder.compile()
            self.teacher.encoder.compile()
        self.optimiser = train_ssl.train_ssl_optimiser(self.student, config)
        self.light, self.kinds = ssl_.view_light(), ssl_.view_stains(pool.channels,
                                                                 config.data.brightfield)
        self.numbers = np.arange(config.batch)
        self.cutting = train_ssl.Stopwatch(device)

    def __call__(self) -> None:
        import torch

        import ssl_
        import train_ssl
        config = self.config
        with self.cutting:
            slots, numbers = (
                self.pool.sample(config.batch, self.number),
                self.numbers + self.number * config.batch,
            )
            batch = train_ssl.make_train_ssl_batch(config, self.pool, slots, numbers, self.number,
                                                   self.light,
                                         self.kinds)
        with torch.autocast(self.device, torch.bfloat16, enabled=config.precision == "bf16"):
            found = self.student(self.teacher, batch, 0.05, config.loss)
        found["loss"].backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), config.clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        ssl_.update_teacher(self.teacher, self.student, 0.996)
        self.number += 1


def one_by_one(vit):
    """A backbone that runs once for each size of crops; at rest, so that it draws no jitter of its
    own."""
    import torch

    class OneByOne(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = vit.eval()

        def forward(self, crops, mask=None, jitter=None):
            return [self.vit(x, mask if i == 0 else None) for i, x in enumerate(crops)]
    return OneByOne()


def waiting(run, device: str):
    """run() until the GPU has done it."""
    import torch

    def whole():
        run()
        if device == "cuda":
            torch.cuda.synchronize()
    return whole


def peaks(device: str) -> tuple[float, float]:
    """FLOP/s of a large matrix product in the type that training computes in, bytes/s of a large
    copy."""
    import torch
    n, kind, size = (8192, torch.bfloat16, 2**30) if device == "cuda" else (1536, torch.float32,
                                                                            2**27)
    a, b = (torch.randn(n, n, device=device, dtype=kind) for _ in range(2))
    x, y = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    product, copied = (seconds(waiting(run, device), 9)
                       for run in (lambda: a @ b, lambda: y.copy_(x)))
    return 2 * n**3 / product, 2 * size / copied


def ssl() -> None:
    import torch

    import ssl_
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config, steps = config_of(device == "cuda"), 20 if device == "cuda" else 4
    rate, bandwidth = peaks(device)
    pool = pool_of(config, device, 1080 if device == "cuda" else 384)
    shown, rows = config.views, []
    for name, plain in (("train_ssl.py", False), ("plain modules, uncompiled", True)):
        step = Step(config, pool, device, plain)
        for _ in range(5 if device == "cuda" else 1):          # compiles, fills caches
            waiting(step, device)()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        step.cutting.spent.clear()

        def several(step=step) -> None:
            for _ in range(steps):
                step()
        begin = time.perf_counter()
        waiting(several, device)()
        took = (time.perf_counter() - begin) / steps
        work = ssl_.student_step_flops(step.student, shown.size, shown.local_size,
                               shown.locals) * config.batch
        memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device == "cuda" else "-"
        rows.append([name, f"{took:.3f} s", f"{config.batch / took:.1f}", f"{work / 1e9:.0f}",
                     f"{work / took / rate:.1%}", f"{step.cutting.seconds() / steps / took:.1%}",
                     memory])
        del step                                               # frees its memory
    table(f"Pretraining, {config.network.dim} wide, {config.network.depth} blocks, {config.batch} "
          f"fields, "
          f"2 x {shown.size} and {shown.locals} x {shown.local_size} px, {config.precision}, on "
          f"{device}; a matrix "
          f"product reaches {rate / 1e9:.0f} GFLOP/s, a copy {bandwidth / 1e9:.1f} GB/s",
          ["what", "step", "images/s", "GFLOPs a step", "of that rate", "cutting views", "memory"],
          rows)
    table("Operations of a step, forward, each by itself and uncompiled",
          ["operation", "time", "GFLOP/s", "of the product's", "GB/s", "of the copy's", "bound by"],
          operations(config, pool, device, rate, bandwidth))


def operations(config, pool, device: str, rate: float, bandwidth: float) -> list[list[str]]:
    """Time of each kind of operation at the sizes of a step, and which of the two peaks it comes
    nearer to."""
    import numpy as np
    import torch
    import torch.nn.functional as F

    import model
    import ssl_
    import train_ssl
    net, shown = config.network, config.views
    kind = torch.bfloat16 if config.precision == "bf16" else torch.float32
    width, B, D, heads = kind.itemsize, config.batch, net.dim, net.heads

    def tokens(side: int) -> int:
        return 1 + net.registers + (side // net.patch) ** 2
    T, t = tokens(shown.size), tokens(shown.local_size)
    n, M = B * (2 * T + shown.locals * t), min(ssl_.Learner.chunk, round(0.3 * B * T))
    x, wide = (torch.randn(n, w, device=device, dtype=kind) for w in (D, 4 * D))
    weight, prototypes = (torch.randn(a, b, device=device, dtype=kind)
                          for a, b in ((4 * D, D), (net.prototypes, net.bottleneck)))
    z = torch.randn(M, net.bottleneck, device=device, dtype=kind)
    large, small = (torch.randn(b, heads, length, D // heads, device=device, dtype=kind)
                    for b, length in ((2 * B, T), (B * shown.locals, t)))
    side = shown.size // net.patch
    rope = model.rope_table(model.rope_periods(D // heads).to(device), side, side,
                            1 + net.registers)
    ones, light = torch.ones(D, device=device, dtype=kind), ssl_.view_light()
    kinds, numbers = ssl_.view_stains(pool.channels, config.data.brightfield), np.arange(B)
    slots = pool.sample(B, 0)
    student, teacher = (part.to(device) for part in train_ssl.build_train_ssl_student(config))
    for p in student.parameters():
        p.grad = torch.zeros_like(p)
    optimiser = train_ssl.train_ssl_optimiser(student, config)
    P = sum(p.numel() for p in student.parameters())
    pixels = B * (2 * shown.size**2 + shown.locals * shown.local_size**2)
    cases = [
        ("linear layer D -> 4 D, all tokens", lambda: F.linear(x, weight),
         8 * n * D * D, width * (5 * n * D + 4 * D * D)),
        ("attention in large crops", lambda: F.scaled_dot_product_attention(large, large, large),
         4 * 2 * B * T * T * D, 4 * width * large.numel()),
        ("attention in small crops", lambda: F.scaled_dot_product_attention(small, small, small),
         4 * B * shown.locals * t * t * D, 4 * width * small.numel()),
        ("RoPE on large crops", lambda: model.rotate_by_rope(large.transpose(1, 2), *rope),
         3 * large.numel(), 2 * width * large.numel()),
        ("LayerNorm, all tokens", lambda: F.layer_norm(x, (D,), ones, ones), 8 * n * D,
         2 * width * n * D),
        ("GELU, all tokens", lambda: F.gelu(wide), 8 * wide.numel(), 2 * width * wide.numel()),
        ("residual with LayerScale", lambda: x + ones * x, 2 * n * D, 3 * width * n * D),
        (f"iBOT, {M} patches: logits and softmax",
         lambda: F.linear(z, prototypes).float().log_softmax(1),
         2 * M * net.bottleneck * net.prototypes, (width + 8) * M * net.prototypes),
        ("views: gather, light, camera", lambda: ssl_.draw_views(pool, slots, numbers, 0, 0, shown,
                                                                 light, kinds),
         # four corners of about three channels; written once
         40 * pixels, (4 * 2 * 3 + 4 * 3) * pixels),
        ("AdamW", optimiser.step, 12 * P, 4 * 7 * P),
    ]
    rows = []
    with torch.no_grad():
        for name, run, flops, moved in cases:
            took = seconds(waiting(run, device), 5)
            compute, traffic = flops / took, moved / took
            rows.append([name, f"{took * 1e3:.2f} ms", f"{compute / 1e9:.0f}",
                         f"{compute / rate:.0%}",
                         f"{traffic / 1e9:.1f}", f"{traffic / bandwidth:.0%}",
                         "arithmetic" if compute / rate > traffic / bandwidth else "bandwidth"])
    return rows


if __name__ == "__main__":
    ssl()
