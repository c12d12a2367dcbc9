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


def kinds() -> None:
    """How often an image goes to another kind's decoder, by how many training images of each set the weights know."""
    import numpy as np
    import torch
    import kinds as rooms
    import model
    import runs
    import segment
    import train_seg as script
    import trainset
    from bench import table
    config = runs.load(script.Config, ROOT / "configs/dinocell_tiny.yaml").data
    if not (ROOT / config.root).is_dir():
        raise SystemExit(f"{ROOT / config.root}: no such folder; the images of configs/dinocell_tiny.yaml are needed")
    net, parts = model.load(ROOT / "final_models/dinocell_tiny.pt"), []
    config = dataclasses.replace(config, root=str(ROOT / config.root))
    zooms = {one["decoder"]: one["setting"].get("zoom", net.settings.zoom) for one in net.settings.kinds["sets"] if one["decoder"]}
    for chosen in config.sets:
        for examples in trainset.divide(trainset.examples(config, chosen), config, 0):          # to train on, held out
            images = [trainset.read(example, chosen.name).pixels for example in examples]
            order = np.random.default_rng(0).permutation(len(images))
            parts.append((chosen.decoder, {zoom: torch.stack([rooms.token(net, segment.glimpses(
                segment.as_source(v), segment.UNIT, segment.scaled(v.shape[1:], zoom), net.settings.tile)) for v in images])[order]
                for zoom in set(zooms.values())}))                                              # (images, D) at each zoom
    rows = []
    for count in (16, 32, 64, 128, 256):
        known = [(zooms[name], tokens[zooms[name]][:count]) for name, tokens in parts[::2]]     # (<= count, D) of each set
        names = np.repeat([name for name, _ in parts[::2]], [len(mine) for _, mine in known])
        spread = torch.cat([mine for _, mine in known]).std(0) + 1e-6

        def wrong(some: list, first: int) -> str:
            found = [names[torch.cat([torch.cdist(tokens[zoom][first:] / spread, mine / spread) for zoom, mine in known], 1).argmin(1).numpy()] != name
                     for name, tokens in some if len(tokens[1.0]) > first]
            return f"{sum(map(np.count_nonzero, found))} of {sum(map(len, found))}"
        rows.append([str(count), wrong(parts[::2], count), wrong(parts[1::2], 0)])
    table("Images that go to another kind's decoder", ["known of each set", "other training images", "held out to validate"], rows)
