"""train_seg.py end to end at toy size: resuming, signals, ranks, what it writes and what it
refuses."""
import contextlib
import dataclasses
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT

import augment
import data
import model
import optim
import runs
import segment
import train_seg
import watershed

TOY = dict(network=dict(dim=16, depth=4, heads=2, registers=1, widths=[8, 8, 4], last=4),
           data=dict(fields=5, field_size=80, field_cells=4, diameter=24), crop=32, batch=4,
           steps=12, lr=1e-3, warmup=2,
           ema=0.8, val_every=6, log_every=3, save_every=3, device="cpu", precision="float32")


def toy(folder, **changes):
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump({**TOY, "output_base_dir": str(folder), **changes}))
    return path


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1",
            "--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0"]


GRID, FEW = watershed.GRID, {"peak": (0.3, 0.5), "fill": (0.1, 0.3), "depth": (0.0, 0.2),
                             "smooth": (0.0,), "shape": (0.0,), "min_area": (0,)}


def command(path, start=()):
    """The script as a process of its own, with the settings to choose from that this one has."""
    script = path.parent / "few.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport runs, train_seg\n"
                      f"import watershed; watershed.GRID = {watershed.GRID}\n"
                      f"runs.script(train_seg.__doc__, train_seg.Config, train_seg.main)\n")
    return [sys.executable, *start, str(script), str(path)]


def run(*arguments):
    """The script in this process: exit code, what it printed, what it said on stderr."""
    out, err, interrupt = io.StringIO(), io.StringIO(), signal.getsignal(signal.SIGINT)
    state = torch.get_rng_state()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), \
            pytest.raises(SystemExit) as end:
        runs.script(train_seg.__doc__, train_seg.Config, train_seg.main, [*map(str, arguments)])
    signal.signal(signal.SIGINT, interrupt)
    torch.set_rng_state(state)
    return SimpleNamespace(returncode=end.value.code, stdout=out.getvalue(), stderr=err.getvalue())


@pytest.fixture(scope="module", autouse=True)
def quick():
    """One thread, as in the processes that are compared with this one, for sums have an order; and
    few settings of the watershed to choose from."""
    before, watershed.GRID = torch.get_num_threads(), FEW
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    watershed.GRID = GRID


def checkpoint(folder, step):
    path = folder / f"runs/seg/checkpoints/seg/step_{step:08d}.pt"
    return torch.load(path, weights_only=True)


def weights(folder):
    return torch.load(folder / "final_models/seg.pt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One run from start to end, never disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    done = run(toy(folder))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.smoke
def test_a_run_leaves_what_it_promises(whole):
    folder = whole / "runs/seg"
    assert runs.load_config(train_seg.Config, folder / "config.yaml").steps == 12
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "loss" in line] == [3, 6, 9, 12]
    assert [line["step"] for line in log if "score" in line] == [6, 12]
    assert sorted(p.name for p in (folder / "images").iterdir())[0] == "curves.svg"
    kept = sorted(p.name for p in (folder / "checkpoints/seg").iterdir())
    assert kept == ["best.pt", "step_00000009.pt", "step_00000012.pt"]
    net = model.load(whole / "final_models/seg.pt")
    best = max((line for line in log if "score" in line), key=lambda line: line["score"])
    assert (
        net.settings.tile == 32
        and net.settings.cap == 4.0
        and net.settings.diameter == pytest.approx(24, abs=1)
    )
    assert net.size is None
    assert (net.settings.peak, net.settings.fill) == (best["val_peak"], best["val_fill"])
    story = net.settings.provenance
    assert len(story["images"]["train"]) == 8 and len(story["images"]["validation"]) == 2
    assert story["scores"]["score"] == pytest.approx(best["score"], rel=1e-4)


def goes_on_to_the_same_weights(whole, folder):
    reached = max(int(p.stem[5:]) for p in (folder / "runs/seg/checkpoints/seg").glob("step_*.pt"))
    done = run(toy(folder))
    assert done.returncode == 0, done.stderr
    assert f"going on from step {reached}" in done.stderr and reached < 12
    expected, got = weights(whole), weights(folder)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_killed_and_started_again_it_reaches_the_same_weights(whole, tmp_path):
    process = subprocess.Popen(command(toy(tmp_path)), env=ENVIRONMENT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while (not list(tmp_path.glob("runs/seg/checkpoints/seg/step_*.pt")) and process.poll() is None
           and time.monotonic() < deadline):
        time.sleep(0.005)
    process.kill()
    _, err = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, err
    goes_on_to_the_same_weights(whole, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_stopped_and_started_again_it_reaches_the_same_weights(whole, tmp_path, number,
                                                               monkeypatch):
    """The signal comes between two checkpoints: what was learnt since is kept."""
    step, seen = train_seg.Trainer.step, []

    def interrupted(trainer, *arguments):
        seen.append(1)
        if len(seen) == 5:
            signal.raise_signal(number)
        return step(trainer, *arguments)
    with monkeypatch.context() as patched:
        patched.setattr(train_seg.Trainer, "step", interrupted)
        assert run(toy(tmp_path)).returncode == runs.REQUEUE and len(seen) == 5
    goes_on_to_the_same_weights(whole, tmp_path)


def test_a_signal_while_it_validates_is_heard(tmp_path, monkeypatch):
    """Nothing is exported, and the next start goes on from the last checkpoint to its end."""
    import segment
    config = runs.load_config(train_seg.Config, toy(tmp_path, steps=4, warmup=1, val_every=4,
                                                    save_every=2))
    asked, look = [], segment.distances

    def interrupted(*arguments, **options):
        asked.append(1)
        signal.raise_signal(signal.SIGTERM)
        return look(*arguments, **options)
    with runs.stop_signals(), monkeypatch.context() as patched:
        patched.setattr(segment, "distances", interrupted)
        assert train_seg.train_network(config, 0, 1, "cpu") == runs.REQUEUE and len(asked) == 1
    assert not (tmp_path / "final_models").exists()
    assert [p.name for p in (tmp_path
                             / "runs/seg/checkpoints/seg").iterdir()] == ["step_00000002.pt"]
    assert train_seg.train_network(config, 0, 1, "cpu") == 0 and (tmp_path
                                                                  / "final_models/seg.pt").exists()


def test_two_processes_train_as_one(tmp_path):
    """Weights after 10 steps. No even ground, in crops without cells or where a change clips it to
    black: there every feature lies exactly on the kink of a ReLU, where the rounding of a sum
    decides which side counts, otherwise on each processor. And an eps that keeps Adam from dividing
    gradients that are nothing but rounding by themselves."""
    uneven = dict(negative=0, dim=0, drop=0, brightness=0, contrast=0, noise=1)
    nets, norms, scores = [], [], []
    for processes in (0, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        path = toy(folder, steps=10, val_every=5, save_every=10, log_every=1, eps=1e-6,
                   augment=uneven)
        done = run(path) if not processes else subprocess.run(
            command(path, start=TORCHRUN), capture_output=True, text=True, env=ENVIRONMENT)
        assert done.returncode == 0, done.stderr
        nets.append(checkpoint(folder, 10)["net"])
        log = [*map(json.loads, (folder / "runs/seg/log.jsonl").read_text().splitlines())]
        norms.append([(line["gradient"], line["loss"]) for line in log if "gradient" in line])
        scores.append([line["val_SEG"] for line in log if "score" in line])
    assert len(norms[0]) == 10 and norms[1] == [pytest.approx(pair, rel=1e-4) for pair in norms[0]]
    assert (
        len(set(scores[0])) == 2
        and min(scores[0]) > 0.1
        and scores[1] == pytest.approx(scores[0], abs=0.02)
    )
    one, two = nets
    apart = sum((two[name] - value).square().sum() for name, value in one.items()).sqrt()
    assert apart < 1e-5 * sum(value.square().sum() for value in one.values()).sqrt()


def test_check_says_what_would_happen_and_writes_nothing(tmp_path):
    done = run(toy(tmp_path), "--check", "steps=7000")
    assert done.returncode == 0, done.stderr
    assert "8 training images, 2 for validation" in done.stdout and "steps: 7000" in done.stdout
    assert "GFLOPs a step" in done.stdout and "7000 steps take about" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["toy.yaml"]


def test_another_configuration_does_not_go_on_in_the_same_folder(whole):
    done = run(whole / "toy.yaml", "lr=2e-3")
    assert (
        done.returncode == 1
        and "lr: 0.001 -> 0.002" in done.stderr
        and "new experiment=" in done.stderr
    )
    done = run(whole / "toy.yaml", "log_every=1")
    assert done.returncode == 0 and "log_every: 3 -> 1" in done.stderr


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    done = run(toy(tmp_path), "lr=1e30", "clip=1e30", "warmup=0", "steps=30")
    assert (
        done.returncode == 1
        and "the loss is nan at step" in done.stderr
        and "last good checkpoint" in done.stderr
    )


@pytest.mark.smoke
def test_edges_and_seams_count_more_when_asked():
    """Closed form, k = 8: a pixel at distance 1/4 counts 1 + 8 * 3/4 = 7 times, ground within 2 px
    of a cell 9 times, the middle of a cell and far ground once; pixels within 2 px of two cells 10
    times more with a seam weight of 10."""
    target = torch.tensor([0.0, 0.0, 0.0, 0.25, 1.0]).view(1, 1, 1, 5)
    labels = torch.tensor([0, 0, 0, 5, 5]).view(1, 1, 5)
    predicted = target + torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]).view(1, 1, 1, 5)
    squares = torch.tensor([0.01, 0.04, 0.09, 0.16, 0.25])
    for edge, weights in ((0, [1, 1, 1, 1, 1]), (8, [1, 9, 9, 7, 1])):
        expected = (squares * torch.tensor(weights)).mean().item()
        assert model.distance_loss(predicted, target, labels,
                                   edge).item() == pytest.approx(expected)
        assert model.distance_loss(predicted, target, labels, edge,
                                   10).item() == pytest.approx(expected)     # one cell: no seam
    two = torch.tensor([7, 0, 0, 5, 5]).view(1, 1, 5)
    expected = (squares * torch.tensor([1, 11, 11, 1, 1])).mean().item()
    assert model.distance_loss(predicted, target, two, 0, 10).item() == pytest.approx(expected)


@pytest.mark.smoke
def test_it_starts_from_weights(whole, tmp_path):
    path = whole / "final_models/seg.pt"
    config = runs.load_config(train_seg.Config, toy(tmp_path), [f"init={path}", "train_blocks=1"])
    net = train_seg.build_train_seg_net(config)
    assert torch.equal(net.backbone.norm.weight, model.load(path).backbone.norm.weight)
    learns = {name.split(".")[1]
              for name, p in net.backbone.blocks.named_parameters(prefix="blocks")
              if p.requires_grad}
    assert learns == {"3"} and not net.backbone.patch_embed.weight.requires_grad
    assert all(p.requires_grad for p in net.decoder.parameters())
    groups = train_seg.train_seg_optimiser(net, runs.load_config(train_seg.Config, toy(tmp_path),
                                                                 ["layer_decay=0.5"]),
                                              "cpu").param_groups
    assert {group["scale"] for group in groups} >= {1.0, 0.5}
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed)) == sum(p.requires_grad for p in net.parameters())
    old, new = model.load(path), train_seg.build_train_seg_net(runs.load_config(train_seg.Config,
                                                                                toy(tmp_path), [
        f"init={path}", "new_decoder=true", "network.widths=[8, 8]", "network.last=0",
        "network.stem=2"]))
    assert torch.equal(new.backbone.blocks[0].fc1.weight,
                       old.backbone.blocks[0].fc1.weight) and new.decoder.grain == 2
    old.settings.licence = "CC-BY-NC-4.0"                        # holds for what begins with it
    model.save(old, tmp_path / "bound.pt")
    model.save(old.backbone, tmp_path / "vit.pt", licence="CC-BY-4.0")
    for name, changes, licence in (("bound", ["new_decoder=true"], "CC-BY-NC-4.0"),
                                   ("bound", [], "CC-BY-NC-4.0"), ("vit", [], "CC-BY-4.0")):
        config = runs.load_config(train_seg.Config, toy(tmp_path), [
            f"init={tmp_path / name}.pt", *changes])
        assert train_seg.build_train_seg_net(config).settings.licence == licence
    torch.save({"teacher": {}}, tmp_path / "dinov3.pth")
    assert model.licence_of(tmp_path / "dinov3.pth") == "LicenseRef-DINOv3"


def test_few_images_teach_the_decoder_alone(whole, tmp_path):
    """few=true, from one image: all else is as it was."""
    labelled_folder(tmp_path / "cells", 1)
    init = whole / "final_models/seg.pt"
    done = run(toy(tmp_path, data=dict(root=str(tmp_path), sets=["cells"]), init=str(init),
                   few=True, steps=2, warmup=1, val_every=2, ema=0.1, lr=0.01))
    assert done.returncode == 0 and "the only image" in done.stderr, done.stderr
    old, new = model.load(init).state_dict(), weights(tmp_path)
    changed = {name for name in old if (old[name] - new[name].float()).abs().max() > 2e-3}
    assert changed and {name.split(".")[0] for name in changed} == {"decoder"}


def test_steps_may_change_until_a_constant_rate_falls(tmp_path):
    labelled_folder(tmp_path / "cells", 4)
    path = toy(tmp_path, data=dict(root=str(tmp_path), sets=["cells"], share=0.3), steps=20,
               warmup=2, schedule="constant", save_every=2,
               val_every=40)

    def begun(*changes):
        return runs.Run(runs.load_config(train_seg.Config, path, list(changes)))
    run = begun()
    run.save(12)
    run.close()
    begun("steps=30").close()  # 12 lies before the last fifth of both
    with pytest.raises(ValueError, match="begun with another configuration .*steps: 30 -> 20, lr"):
        begun("lr=1e-5")
    run = begun()
    run.save(18)
    run.close()
    with pytest.raises(ValueError,
                       match="steps=40: .*step_00000018.pt lies in the last fifth of 20 steps"):
        begun("steps=40")


def test_images_to_validate_on_are_scaled_as_those_to_train_on(tmp_path):
    """data.diameter: settings are chosen on cells as wide as the network learns them."""
    labelled_folder(tmp_path / "cells", 6)
    chosen = data.TrainingData(root=str(tmp_path), sets=(data.TrainingSet("cells"),), share=0.3,
                               diameter=18.0, fields=3, field_size=96, field_cells=5)
    train, validation, _ = augment.load_resident(chosen, 0, "cpu", 4.0)
    assert train.diameter == pytest.approx(18) and {entry.set for entry in validation} == {
        "cells",
        "synthetic",
    }
    for entry in validation:
        area = np.bincount(entry.labels.ravel())[1:]
        assert entry.zoom * np.sqrt(4 / np.pi
                                    * np.median(area[area > 0])) == pytest.approx(18), entry.name
    assert data.median_diameter(np.zeros((9, 9), int)) == 0


def test_muon_learns_the_inner_layers_and_goes_on(tmp_path):
    """Not those that meet pixels or answer, nor vectors; a run that is stopped reaches the same
    weights."""
    config = runs.load_config(train_seg.Config, toy(tmp_path), ["optimiser=muon"])
    net = train_seg.build_train_seg_net(config)
    optimiser, names = (
        train_seg.train_seg_optimiser(net, config, "cpu"),
        {id(p): name for name, p in net.named_parameters()},
    )
    inner = {names[id(p)] for group in optimiser.param_groups if group["matrix"]
             for p in group["params"]}
    assert isinstance(optimiser, optim.Muon) and {"backbone.blocks.0.fc1.weight",
                                                  "decoder.ups.0.weight"} <= inner, sorted(inner)
    assert not [name for name in inner if "bias" in name or "norm" in name or "patch_embed" in name
                or "head" in name or "token" in name]
    assert isinstance(train_seg.train_seg_optimiser(net, runs.load_config(train_seg.Config,
                                                                          toy(tmp_path)), "cpu"),
                      torch.optim.AdamW)
    for precision, products in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        asked = runs.load_config(train_seg.Config, toy(tmp_path),
                                 ["optimiser=muon", f"precision={precision}"])
        assert train_seg.train_seg_optimiser(net, asked, "cpu").products == products
    once, again = tmp_path / "once", tmp_path / "again"
    shape = dict(optimiser="muon", steps=8, val_every=4, save_every=4, warmup=1)
    assert run(toy(tmp_path, output_base_dir=str(once), **shape)).returncode == 0
    shutil.copytree(once, again)                        # as if it had been killed after step 4
    (again / "runs/seg/checkpoints/seg/step_00000008.pt").unlink()
    done = run(toy(tmp_path, output_base_dir=str(again), **shape))
    assert done.returncode == 0 and "going on from step 4" in done.stderr
    first, second = weights(once), weights(again)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_size_head_learns_how_wide_cells_are(tmp_path, capsys):
    """It tells small cells from large ones, nothing else of the network changes, what is learnt is
    not learnt again, and images are segmented at the scale that it asks for."""
    labelled_folder(tmp_path / "cells", 6)
    path = toy(tmp_path, data=dict(root=str(tmp_path), sets=["cells"], share=0.3, diameter=16),
               steps=4, val_every=4, batch=16, crop=64, lr=1e-5, size_steps=300,
               init=str(ROOT / "final_models/demo_synthetic.pt"))
    config = runs.load_config(train_seg.Config, path)
    assert train_seg.main(config, []) == 0
    before = (tmp_path / "final_models/seg.pt").read_bytes()
    assert train_seg.main(config, []) == 0 and (tmp_path
                                                / "final_models/seg.pt").read_bytes() == before
    lines = runs.log_history(tmp_path / "runs/seg/log.jsonl")
    losses = {line["step"]: line["size_loss"] for line in lines if "size_loss" in line}
    assert list(losses) == list(range(7, 305, 3)) and losses[304] < 0.6 * losses[7]
    net = model.load(tmp_path / "final_models/seg.pt")
    learnt = torch.load(tmp_path / "runs/seg/checkpoints/seg/best.pt", weights_only=True)["average"]
    for name, value in net.decoder.named_parameters():
        assert torch.equal(value, learnt[f"module.decoder.{name}"].half().float()), name
    pixels = torch.from_numpy(data.network_input(data.examples(tmp_path / "cells")[0]))
    seen = [torch.nn.functional.interpolate(pixels[None], scale_factor=zoom, mode="bilinear",
                                            antialias=True)[0].numpy() for zoom in (0.3, 3.0)]
    small, large = (segment.seen_diameter(segment.as_source(image), net, segment.UNIT)
                    for image in seen)
    assert 2 < small < 0.8 * large < 200, (small, large)
    wide = segment.seen_diameter(segment.as_source(seen[1]), net, segment.UNIT)
    labels = [segment.segment(seen[1], net, limits=segment.UNIT, diameter=diameter)
              for diameter in (None, wide)]
    assert np.array_equal(*labels)
    # what goes on from such weights keeps it only for cells that are scaled to the same diameter
    for steps, wanted, new, has in ((0, 16, 16, True), (2, 16, 16, False), (0, 30, 30, False),
                                    (0, None, 16, False), (0, None, None, False)):
        capsys.readouterr()
        again = train_seg.build_train_seg_net(dataclasses.replace(
            config, init=str(tmp_path / "final_models/seg.pt"), size_steps=steps,
            data=dataclasses.replace(config.data, diameter=wanted)), new)
        assert (again.size is not None) == has == ("size" in again.architecture)
        said = "size head knows cells of 16 px" in capsys.readouterr().err
        assert said == (not has and not steps)
        assert not (has and any(p.requires_grad for p in again.size.parameters()))


def test_weights_that_are_gone_are_written_again(tmp_path):
    """From best.pt, with the same thresholds; without it, in one line."""
    path = toy(tmp_path, steps=4, warmup=1, val_every=2, save_every=2)
    file = tmp_path / "final_models/seg.pt"
    assert run(path).returncode == 0
    before = model.load(file)
    file.unlink()
    done = run(path)
    assert done.returncode == 0 and f"-> {file}" in done.stdout
    after = model.load(file)
    assert after.settings == before.settings and after.settings.provenance["scores"]["sets"]
    assert all(torch.equal(value, after.state_dict()[name])
               for name, value in before.state_dict().items())
    file.unlink()
    (tmp_path / "runs/seg/checkpoints/seg/best.pt").unlink()
    done = run(path)
    assert done.returncode == 1 and "seg.pt: gone, and " in done.stderr


def test_weights_name_images_without_paths_of_this_machine(tmp_path):
    """A set given by its absolute path: its held-out images are found again; checkpoints keep the
    whole names."""
    import measure
    sets = []
    for number, name in enumerate(("x", "y")):                   # two folders are called cells
        (tmp_path / name).mkdir()
        sets.append(str(labelled_folder(tmp_path / name / "cells", 5, 10 * number)))
    path = toy(tmp_path, steps=2, val_every=2, warmup=1, data=dict(
        sets=[{"path": one, "channels": [1]} for one in sets], share=0.2))
    assert run(path).returncode == 0
    net = model.load(tmp_path / "final_models/seg.pt")
    story, whole = net.settings.provenance, checkpoint(tmp_path, 2)["images"]
    assert str(tmp_path) not in str(story) and [*story["scores"]["sets"]] == ["cells 1", "cells 1_"]
    for side, count in (("train", 8), ("validation", 2)):
        assert len(story["images"][side]) == count
        assert [*whole[side].values()] == [*story["images"][side].values()]
        assert all(name.startswith(str(tmp_path)) for name in whole[side])
    found = measure.bench_held_out_sets(net, str(tmp_path / "x"))[0]
    held = {name for name in whole["validation"] if name.startswith(sets[0])}
    assert {f"{sets[0]} 1/{each.name}" for each in found.examples} == held


def test_few_held_out_images_are_filled_up_for_settings_alone(tmp_path):
    labelled_folder(tmp_path / "cells", 14)
    for share, held in ((0.2, 3), (0.6, 8)):
        config = data.TrainingData(root=str(tmp_path), sets=(data.TrainingSet("cells"),),
                                   share=share, fields=3)
        train, entries, hashes = augment.load_resident(config, 0, "cpu", 4.0)
        own = [entry for entry in entries if entry.set == "cells"]
        assert sum(e.held for e in own) == held and len(own) == 8
        assert all(e.held and e.zoom == 1 for e in entries
                   if e.set == "synthetic") and len(train) == 14 - held + 4
        assert {e.name for e in own
                if e.held} <= set(hashes["validation"]) and len(hashes["validation"]) == held + 2
        assert {e.name for e in own if not e.held} < set(hashes["train"])


def test_more_images_than_memory_train_to_the_same_weights(tmp_path, capsys):
    """data.memory_gb: what passes it is read from a file."""
    nets = []
    for memory in (None, 1e-5):
        folder = tmp_path / str(memory)
        folder.mkdir()
        path = toy(folder, steps=4, val_every=4, save_every=4)
        given = [] if memory is None else [f"data.memory_gb={memory}"]
        assert run(path, *given).returncode == 0
        nets.append(checkpoint(folder, 4)["net"])
    assert all(torch.equal(nets[1][name], value) for name, value in nets[0].items())


@pytest.mark.smoke
def test_parts_can_be_left_out(tmp_path):
    """The keys of configs/ablation.yaml: other weights are trained than those of the whole network.
    """
    def built(*changes):
        return train_seg.build_train_seg_net(runs.load_config(train_seg.Config, toy(tmp_path),
                                                              list(changes)))
    assert isinstance(built("network.arch=unet").backbone,
                      model.ConvNet) and len(built().decoder.stem) == 1
    assert len(built("network.stem=0").decoder.stem) == 0 and built("cap=null").settings.cap is None


def test_few_images_are_among_more(tmp_path):
    """data.limit takes images by lot: nested budgets, another lot for each seed, the same ones held
    out."""
    labelled_folder(tmp_path / "cells", 12)
    lots = {}
    for limit in (2, 5, None):
        for seed in (0, 1):
            config = data.TrainingData(root=str(tmp_path), sets=(data.TrainingSet("cells"),),
                                       share=0.3, limit=limit)
            kept, held = data.split_training_examples(data.training_examples(config,
                                                                             config.sets[0]),
                                                      config, seed)
            lots[limit, seed] = {e.name for e in kept}
            assert len(held) == 4 and not lots[limit, seed] & {e.name for e in held}
    assert [len(lots[limit, 0]) for limit in (2, 5, None)] == [2, 5, 8]
    assert lots[2, 0] < lots[5, 0] < lots[None, 0] == lots[None, 1] and lots[5, 0] != lots[5, 1]


@pytest.mark.smoke
@pytest.mark.parametrize("script, example", [("train_seg", "seg_laptop"), ("instruct", "instruct"),
                                             ("train_ssl", "ssl_laptop")])
@pytest.mark.parametrize("word, mode", [("on", "on"), ("online", "online"), ("offline", "offline"),
                                        ("off", "off"), ("false", "off"), ("true", "on")])
def test_wandb_means_the_same_in_every_script(script, example, word, mode, tmp_path):
    """Also in a file, where YAML reads on and off as truth values."""
    config = importlib.import_module(script).Config
    text = (ROOT / "configs" / f"{example}.yaml").read_text(encoding="utf-8")
    (tmp_path / "c.yaml").write_text(f"{text}\nwandb: {word}\n")
    assert runs.load_config(config, tmp_path / "c.yaml").wandb == mode


@pytest.mark.smoke
@pytest.mark.parametrize("changes,said", [
    (["data.sets=[{path: a, weight: 0}]"], "expected a number, above 0"),
    (["data.diameter=-4"], "data.diameter=-4: expected a number, above 0"),
    (["data.fields=0"], "no data: give data.sets"), (["crop=30"],
                                                     "crop=30: expected a multiple of the patch"),
    (["augment.flpi=1"], "unknown key 'flpi', did you mean 'flip'?"),
    (["init=gone.pt"], "no weights at gone.pt"),
    (["warmup=12"], "warmup=12: expected fewer than steps=12"),
    (["cap=0"], "cap=0: expected a number, from 0.1 to 1000 or null"),
    (["clip=0"], "clip=0: expected a number, above 0"),
    (["lr=0"], "lr=0: expected a number, above 0"), (["crop=0"], "crop=0: expected a whole number"),
    (["steps=.inf"], "steps=.inf: expected a whole number"),
    (["network.heads=0"], "heads=0: expected a whole number"),
    (["few=true"], "few=true chooses what learns of a whole network"),
    (["wandb=on"], "pip install wandb"), (["wandb=yes"], "expected off or on or online or offline"),
    (["data.fields=1"], "no images to")])
def test_mistakes_are_one_line(tmp_path, changes, said, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)            # as if it were not installed
    done = run(toy(tmp_path), *changes)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and said in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "final_models").exists()


def labelled_folder(folder, images, first=0):
    """NAME.tif of two channels with NAME_masks.tif, drawn."""
    import tifffile

    import synthetic
    folder.mkdir()
    for number in range(images):
        drawn = synthetic.field(first + number, 96, 5, 24)
        tifffile.imwrite(folder / f"im{number}.tif", drawn.pixels[1:3], photometric="minisblack",
                         metadata={"axes": "CYX"})
        data.write_labels(folder / f"im{number}_masks.tif", drawn.labels)
    return folder


def test_wandb_gets_numbers_and_pictures(tmp_path, monkeypatch):
    """What is sent, seen by a stand-in for the package: every kind of number, and the pictures."""
    sent, begun, ended = [], [], []

    def init(**options):
        begun.append(options)
        return SimpleNamespace(log=log, finish=lambda: ended.append(1))

    def log(values, step):
        sent.append({"step": step, **values})

    stand_in = SimpleNamespace(init=init, Image=lambda rgb: list(rgb.shape),
                               Histogram=lambda values: len(values),
                               Settings=lambda **options: options)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    done = run(toy(tmp_path), "wandb=on", "steps=6", "experiment=a/seg", "log_every=2",
               "wandb_options={project: p, entity: e, gradient_norms: true, "
               "gradient_histogram: true, system: false, every: 4}")
    assert done.returncode == 0, done.stderr
    options, = begun
    assert {k: options[k] for k in ("mode", "name", "resume", "project", "entity")} == {
        "mode": "online", "name": "a/seg", "resume": "allow", "project": "p", "entity": "e"}
    assert options["settings"] == {"x_disable_stats": True}
    assert not set(options["id"]) & set("/:;,#?'") and ended == [1]
    names = {name for values in sent for name in values}
    assert names >= {"loss", "lr", "weight_decay", "gradient", "images_per_s", "data_share",
                     "score", "val_AP@0.5", "gradients", "gradient/backbone.blocks.0"}
    assert [values["step"] for values in sent if "loss" in values] == [2, 6]    # four apart
    assert [values["step"] for values in sent if "gradients" in values] == [2, 6]
    pictures = [values for values in sent if any(name.startswith("pictures/validation_")
                                                 for name in values)]
    assert any(isinstance(shape, list) and shape[2] == 3 for shape in pictures[0].values())
    scored = {values["step"] for values in sent if "score" in values}
    assert {values["step"] for values in pictures} == scored               # the step they show


def test_an_augmented_set_is_not_moved_again(tmp_path):
    """Crops of a folder that augment.py wrote come out as they lie there; mixed with others it is
    refused."""
    import augment
    cells = labelled_folder(tmp_path / "cells", 3)
    made = tmp_path / "made"
    augment.main(augment.Config((str(cells),), str(made), 2, 32), [])
    alone = data.TrainingData(sets=(data.TrainingSet(str(made)),))
    assert data.training_was_augmented(alone) and not data.training_was_augmented(
        data.TrainingData(sets=(data.TrainingSet(str(cells)),))
    )
    with pytest.raises(ValueError, match="some were written by augment.py and some were not"):
        data.training_was_augmented(data.TrainingData(sets=(data.TrainingSet(str(made)),
                                                            data.TrainingSet(str(cells)))))
    done = run(toy(tmp_path, data=str(made), steps=6, warmup=1))
    assert done.returncode == 0, done.stderr
    still = augment.Augment().still()
    assert still.flip == still.rotate == still.elastic == still.quarter == 0 and still.scale == (
        1,
        1,
    )


@pytest.mark.parametrize("name", ["seg", "seg_s8_a100", "seg_s8_a40", "seg_s8_a100_uncapped",
                                  "budget", "dinocell_tiny", "dinocell_s8",
                                  "ablation", "seg_laptop", "if_generic", "if_hybrid", "if_marker",
                                  "if_marker_only", "channel"])
def test_shipped_configurations_are_whole(name):
    """Every key is known and every combination allowed; the network they describe can be built."""
    config = runs.load_config(train_seg.Config, ROOT / "configs" / f"{name}.yaml")
    assert config.experiment and (config.data.sets or config.data.fields)
    if config.init is None:
        assert train_seg.build_train_seg_net(config).settings.cap == config.cap


def test_a_run_does_not_go_on_with_other_images(tmp_path, capsys):
    """More images would change who is held out; another content is said."""
    labelled_folder(tmp_path / "set", 5)
    held = tmp_path / "set" / "im4.tif"
    path = toy(tmp_path, steps=2, val_every=2, warmup=1,
               data={"root": str(tmp_path), "sets": [{"path": "set", "channels": [1]}]})

    def train():
        return train_seg.main(runs.load_config(train_seg.Config, path), [])
    hidden = tmp_path / "later.tif"
    held.rename(hidden)
    masks = held.with_name("im4_masks.tif").rename(tmp_path / "later_masks.tif")
    assert train() == train() == 0 and "warning" not in capsys.readouterr().err
    (tmp_path / "set" / "im0.tif").write_bytes((tmp_path / "set" / "im1.tif").read_bytes())
    assert train() == 0 and "im0: not as when" in capsys.readouterr().err
    hidden.rename(held)
    masks.rename(held.with_name("im4_masks.tif"))
    with pytest.raises(ValueError, match=r"begun with other images.*1 new, 0 gone"):
        train()
