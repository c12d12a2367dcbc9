"""train_seg.py end to end at toy size: resuming, signals, ranks, what it writes and what it refuses."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

import model
import runs
import train_seg
from conftest import ROOT

TOY = dict(network=dict(dim=16, depth=4, heads=2, registers=1, widths=[8, 8, 4], last=4),
           data=dict(fields=5, field_size=80, field_cells=4, diameter=24), crop=32, batch=4, steps=12, lr=1e-3, warmup=2,
           ema=0.8, val_every=6, log_every=3, save_every=3, device="cpu", precision="float32")


def toy(folder, **changes):
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump({**TOY, "output_base_dir": str(folder), **changes}))
    return path


def command(*arguments, torchrun=0):
    start = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={torchrun}", "--master_addr=127.0.0.1",
             "--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0"] if torchrun else [sys.executable]
    return [*start, str(ROOT / "train_seg.py"), *map(str, arguments)]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(*arguments, **options):
    return subprocess.run(command(*arguments, **options), capture_output=True, text=True, env=ENVIRONMENT)


def weights(folder):
    return torch.load(folder / "final_models/seg.pt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One run from start to end, never disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    done = run(toy(folder))
    assert done.returncode == 0, done.stderr
    return folder


def test_a_run_leaves_what_it_promises(whole):
    folder = whole / "runs/seg"
    assert runs.load(train_seg.Config, folder / "config.yaml").steps == 12
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "loss" in line] == [3, 6, 9, 12]
    assert [line["step"] for line in log if "score" in line] == [6, 12]
    assert sorted(p.name for p in (folder / "images").iterdir())[0] == "curves.png"
    kept = sorted(p.name for p in (folder / "checkpoints/seg").iterdir())
    assert kept == ["best.pt", "step_00000009.pt", "step_00000012.pt"]
    net = model.load(whole / "final_models/seg.pt")
    best = max((line for line in log if "score" in line), key=lambda line: line["score"])
    assert net.settings.tile == 32 and net.settings.cap == 4.0 and net.settings.diameter == pytest.approx(24, abs=1)
    assert net.settings.peak == best["val_peak"] and net.settings.fill == best["val_fill"]
    story = net.settings.provenance
    assert len(story["images"]["train"]) == 8 and len(story["images"]["validation"]) == 2
    assert story["scores"]["score"] == pytest.approx(best["score"], rel=1e-4)


@pytest.mark.parametrize("number,code", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, runs.REQUEUE),
                                         (signal.SIGUSR1, runs.REQUEUE)])
def test_stopped_and_started_again_it_reaches_the_same_weights(whole, tmp_path, number, code):
    path = toy(tmp_path)
    process = subprocess.Popen(command(path), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    checkpoints = tmp_path / "runs/seg/checkpoints/seg"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("step_*.pt")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    reached = max(int(p.stem[5:]) for p in checkpoints.glob("step_*.pt"))
    done = run(path)
    assert done.returncode == 0, done.stderr
    assert f"going on from step {reached}" in done.stderr
    expected, got = weights(whole), weights(tmp_path)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_two_processes_train_as_one(whole, tmp_path):
    """The same gradient from two halves of the batch. Weights agree less and less well step by step: where a gradient is
    next to nothing, Adam divides it by itself and so turns the rounding of its sum into a step."""
    done = run(toy(tmp_path), torchrun=2)
    assert done.returncode == 0, done.stderr
    norms = [next(line["gradient"] for line in map(json.loads, (folder / "runs/seg/log.jsonl").read_text().splitlines())
                  if "gradient" in line) for folder in (whole, tmp_path)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    expected, got = (torch.load(folder / "runs/seg/checkpoints/seg/step_00000012.pt", weights_only=True)["net"]
                     for folder in (whole, tmp_path))
    apart = sum((got[name] - value).square().sum() for name, value in expected.items()).sqrt()
    assert apart < 1e-2 * sum(value.square().sum() for value in expected.values()).sqrt()


def test_check_says_what_would_happen_and_writes_nothing(tmp_path):
    done = run(toy(tmp_path), "--check", "steps=7000")
    assert done.returncode == 0, done.stderr
    assert "8 training images, 2 for validation" in done.stdout and "steps: 7000" in done.stdout
    assert "GFLOPs a step" in done.stdout and "7000 steps take about" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["toy.yaml"]


def test_another_configuration_does_not_go_on_in_the_same_folder(whole):
    done = run(whole / "toy.yaml", "lr=2e-3")
    assert done.returncode == 1 and "lr: 0.001 -> 0.002" in done.stderr and "new experiment=" in done.stderr
    done = run(whole / "toy.yaml", "log_every=1")
    assert done.returncode == 0 and "log_every: 3 -> 1" in done.stderr


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    done = run(toy(tmp_path), "lr=1e30", "clip=1e30", "warmup=0", "steps=30")
    assert done.returncode == 1 and "the loss is nan at step" in done.stderr and "last good checkpoint" in done.stderr


def test_it_starts_from_weights(whole, tmp_path):
    path = whole / "final_models/seg.pt"
    config = runs.load(train_seg.Config, toy(tmp_path), [f"init={path}", "train_blocks=1"])
    net = train_seg.build(config)
    assert torch.equal(net.backbone.norm.weight, model.load(path).backbone.norm.weight)
    learns = {name.split(".")[1] for name, p in net.backbone.blocks.named_parameters(prefix="blocks") if p.requires_grad}
    assert learns == {"3"} and not net.backbone.patch_embed.weight.requires_grad
    assert all(p.requires_grad for p in net.decoder.parameters())
    groups = train_seg.parameter_groups(net, runs.load(train_seg.Config, toy(tmp_path), ["layer_decay=0.5"]))
    assert {group["scale"] for group in groups} >= {1.0, 0.5}
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed)) == sum(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("changes,said", [
    (["data.fields=0"], "no data: give data.sets"), (["crop=30"], "crop=30: expected a multiple of the patch"),
    (["augment.flpi=1"], "unknown key 'flpi', did you mean 'flip'?"), (["init=gone.pt"], "no weights at gone.pt"),
    (["warmup=12"], "warmup=12: expected fewer than steps=12"), (["wandb=online"], "pip install wandb"),
    (["data.fields=1"], "no images to")])
def test_mistakes_are_one_line(tmp_path, changes, said):
    done = run(toy(tmp_path), *changes)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and said in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "final_models").exists()
