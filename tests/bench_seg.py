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
            optimiser = torch.optim.AdamW(script.parameter_groups(net, config))
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
    for chosen in config.sets:
        for examples in trainset.divide(trainset.examples(config, chosen), config, 0):          # to train on, held out
            images = (trainset.read(example, chosen.name).pixels for example in examples)
            tokens = [rooms.token(net, segment.glimpses(segment.as_source(v), segment.UNIT, v.shape[1:], net.settings.tile))
                      for v in images]
            parts.append((chosen.decoder, torch.stack(tokens)[np.random.default_rng(0).permutation(len(tokens))]))
    rows = []
    for count in (16, 32, 64, 128, 256):
        known = torch.cat([tokens[:count] for _, tokens in parts[::2]])                          # (K, D)
        names = np.repeat([name for name, _ in parts[::2]], [len(tokens[:count]) for _, tokens in parts[::2]])
        spread = known.std(0) + 1e-6
        wrong = [[names[torch.cdist(token[None] / spread, known / spread).argmin()] != name for name, tokens in some for token in tokens]
                 for some in ([(name, tokens[count:]) for name, tokens in parts[::2]], parts[1::2])]
        rows.append([str(count), *(f"{sum(w)} of {len(w)}" for w in wrong)])
    table("Images that go to another kind's decoder", ["known of each set", "other training images", "held out to validate"], rows)
