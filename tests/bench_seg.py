"""Parts of bench.py: a step of train_seg.py and what of it is not the network; which decoder images go to."""
from __future__ import annotations

import dataclasses
import statistics
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def train_seg(steps: int = 20) -> None:
    """The shipped small configurations on drawn fields: forward, backward and AdamW against cutting and augmenting crops."""
    import numpy as np
    import torch
    import augment
    import runs
    import train_seg as script
    import trainset
    from bench import table
    rows = []
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        for name in ("seg_laptop", "dinocell_tiny"):
            config = runs.load(script.Config, ROOT / "configs" / f"{name}.yaml")
            drawn = trainset.Data(fields=20, field_size=384)
            images, *_ = trainset.load(drawn, 0, device, config.cap)
            changes = runs.from_dict(augment.Augment, config.augment, name)
            net = script.build(config).to(device)
            optimiser = script.optimiser_for(net, config, device)
            average = torch.optim.swa_utils.AveragedModel(
                net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(config.ema))

            def wait():
                if device == "cuda":
                    torch.cuda.synchronize()
            clocks = []
            for step in range(steps + 2):
                begin = time.perf_counter()
                sample = np.arange(config.batch) + step * config.batch
                x, target, _ = augment.sample(images, images.draw(0, sample), sample, changes, config.crop, 0, config.cap)
                wait()
                prepared = time.perf_counter()
                with torch.autocast(device, torch.bfloat16, enabled=script.use_bf16(config, device)):
                    loss = (net(x).float() - target).square().mean()
                loss.backward()
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
                wait()
                learned = time.perf_counter()
                average.update_parameters(net)
                wait()
                clocks.append((time.perf_counter() - begin, learned - prepared))
            whole, network = (statistics.median(c) for c in zip(*clocks[2:]))
            rows.append([name, device, f"{config.batch} x {config.crop} x {config.crop}", f"{whole:.3f} s",
                         f"{config.batch / whole:.1f}", f"{1 - network / whole:.1%}"])
    table("A step of train_seg.py", ["configuration", "device", "crops", "time", "crops/s", "outside the network"], rows)


def kinds(weights: str = "dinocell_tiny") -> None:
    """How often an image goes to another kind's decoder: each training image against all but those of its own group."""
    import torch
    import data
    import kinds as rooms
    import model
    import runs
    import segment
    import train_seg as script
    import trainset
    from bench import table
    config = runs.load(script.Config, ROOT / f"configs/{weights}.yaml").data
    config = dataclasses.replace(config, root=str(ROOT / config.root))
    if not Path(config.root).is_dir():
        raise SystemExit(f"{config.root}: no such folder; the images of configs/{weights}.yaml are needed")
    net = model.load(ROOT / f"final_models/{weights}.pt")
    looks, kind, groups = [], [], []
    for chosen in config.sets:
        for example in trainset.examples(config, chosen):
            pixels = trainset.read(example, chosen.name).pixels
            looks.append(rooms.token(net, segment.glimpses(segment.as_source(pixels), segment.UNIT, pixels.shape[1:], net.settings.tile)))
            kind.append(chosen.decoder)
            groups.append((chosen.name, data.group_of(example.name)))
    looks = torch.stack(looks)                                                                  # (images, 2 D)
    far = torch.cdist(looks / (spread := looks.std(0) + 1e-6), looks / spread)                  # (images, images)
    far[torch.tensor([[a == b for b in groups] for a in groups])] = torch.inf
    went = list(zip(kind, (kind[i] for i in far.argmin(1).tolist())))
    table("Which decoder an image gets that is like no other of its group: rows, its own; columns, where it goes",
          ["", *(names := list(dict.fromkeys(kind))), "images"],
          [[own, *(str(went.count((own, name))) for name in names), str(kind.count(own))] for own in names])
