"""train_ssl.py end to end at toy size: what it writes, resuming, ranks, what it refuses."""
import json
import math
import re
import signal
import socket
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from test_train_seg import ENVIRONMENT

import model
import probe
import runs
import ssl_
import train_ssl

TOY = dict(
    network=dict(dim=24, depth=4, heads=2, registers=1, layerscale=0.5, hidden=24, bottleneck=12,
                 prototypes=32),
    data=dict(fields=10, field_size=96, field_cells=12, field_diameter=24, held=2),
    views=dict(size=32, local_size=16, locals=2, scale=[0.8, 1.2]), loss=dict(teacher_warmup=5),
    measure=dict(every=4, window=48, windows=6), steps=8, batch=4, lr=2e-3, warmup=2, freeze=2,
    momentum=0.9, log_every=2, save_every=2, device="cpu", precision="float32")
PROBED = dict(probe_every=8, probe_steps=2, probe_images=2)


def toy(folder, **changes):
    path = folder / "toy.yaml"
    changes = {key: {**TOY[key], **value} if isinstance(value, dict) else value
               for key, value in changes.items()}
    path.write_text(yaml.safe_dump({**TOY, "output_base_dir": str(folder), **changes}))
    return path


def two_processes(path):
    """Both exit codes and stderrs, in the environment that torchrun and slurm/train.sh set."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = dict(ENVIRONMENT, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    started = [subprocess.Popen([sys.executable, ROOT / "train_ssl.py", path], text=True,
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                env=dict(group, RANK=rank, LOCAL_RANK=rank)) for rank in "01"]
    errors = [process.communicate(timeout=300)[1] for process in started]
    return [process.returncode for process in started], errors


@pytest.fixture(scope="module")
def inside():
    """The script in this process: starting Python takes longer than the run."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before, threads = [signal.getsignal(number) for number in numbers], torch.get_num_threads()
    torch.set_num_threads(1)

    def call(*arguments):
        with pytest.raises(SystemExit) as left:
            runs.script(train_ssl.__doc__, train_ssl.Config, train_ssl.main,
                        [str(a) for a in arguments])
        return left.value.code
    yield call
    torch.set_num_threads(threads)
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def checkpoint(folder, name="ssl"):
    newest = max((folder / "runs" / name / "checkpoints/ssl").glob("step_*.pt"))
    return torch.load(newest, weights_only=True)


def log_of(folder, name="ssl"):
    return runs.log_history(folder / "runs" / name / "log.jsonl")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, inside):
    """One run from start to end, never disturbed, with a probe."""
    folder = tmp_path_factory.mktemp("whole")
    assert inside(toy(folder, measure=PROBED)) == 0
    return folder


def wandb_records(path):
    """Records of a .wandb file: a header of 7 bytes, then LevelDB's log in blocks of 32 KiB."""
    raw, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(raw):
        if 32768 - at % 32768 < 7:                             # a block's end, too short for a head
            at += 32768 - at % 32768
        _, length, kind = struct.unpack("<IHB", raw[at:at + 7])
        parts += raw[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):                                     # whole, or the last of several
            yield parts
            parts = b""


def test_wandb_itself_writes_every_number_and_picture_offline(tmp_path, inside, monkeypatch):
    """The real package, without a network; its file is read back."""
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")       # read at import
    pytest.importorskip("wandb", reason="needs wandb")
    from wandb.proto import wandb_internal_pb2 as wire
    for name in ("WANDB_DIR", "WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    options = dict(project="cells", gradient_norms=True, gradient_histogram=True, pca=False)
    assert inside(toy(tmp_path), "wandb=offline", f"wandb_options={json.dumps(options)}") == 0
    file, = (tmp_path / "runs/ssl/wandb").glob("offline-run-*/run-*.wandb")
    sent, projects = {}, set()
    for raw in wandb_records(file):
        record = wire.Record()
        record.ParseFromString(raw)
        if record.HasField("run"):
            projects.add(record.run.project)
        if record.HasField("history"):
            for item in record.history.item:
                values = sent.setdefault(record.history.step.num, {})
                values[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
    assert projects == {"cells"}
    assert {step for step, values in sent.items() if "loss" in values} == {2, 4, 6, 8}
    assert {step for step, values in sent.items() if "retrieval" in values} == {0, 4, 8}
    for step in (0, 4, 8):                                     # pictures at the step they show
        assert sent[step]["pictures/attention._type"] == "image-file"
        assert not any(name.startswith("pictures/pca") for name in sent[step])
    assert sent[4]["gradients._type"] == "histogram"
    assert {"gradient/encoder.vit.blocks.0", "gradient/dino.mlp"} <= sent[4].keys()
    logged = next(line for line in log_of(tmp_path) if line["step"] == 8 and "loss" in line)
    assert sent[8]["loss"] == pytest.approx(logged["loss"], rel=1e-4)


def test_a_run_leaves_what_it_promises(whole):
    folder, log = whole / "runs/ssl", log_of(whole)
    resolved = runs.load_config(train_ssl.Config, folder / "config.yaml")
    assert resolved.steps == 8 and resolved.views.strategy == "average_single"
    lines = [line for line in log if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    for name in ("dino", "ibot", "koleo", "teacher_entropy", "kl", "usage", "feature_std",
                 "effective_rank", "lr", "weight_decay", "momentum", "temperature", "gradient",
                 "data_share", "images_per_s"):
        assert all(math.isfinite(line[name]) for line in lines), name
    looks = [line for line in log if "retrieval" in line]
    assert [line["step"] for line in looks] == [0, 4, 8]
    assert all(
        {"margin", "control", "consistency", "attention_entropy"} <= line.keys() for line in looks
    )
    assert ["background_retrieval" in line for line in looks] == [True, False, True]
    assert ["probe_AP@0.5" in line for line in looks] == [True, False, True]
    drawn = sorted(
        str(p.relative_to(folder / "images")) for p in (folder / "images").rglob("*.*g")
    )
    assert drawn == sorted(["curves.svg"] + [f"{step:08d}/{name}.png" for step in (0, 4, 8)
                                             for name in ("attention", "heads", "pca")])


def test_the_export_is_the_teachers_backbone(whole):
    vit = model.load_backbone(whole / "final_models/ssl.pt")
    teacher = checkpoint(whole)["teacher"]
    told = torch.load(whole / "final_models/ssl.pt", weights_only=True)["settings"]["provenance"]
    assert (
        told["step"] == 8
        and "prototypes:" in told["config"]
        and {"margin", "retrieval"} <= told["scores"].keys()
    )
    for name, value in vit.state_dict().items():
        assert torch.equal(value, teacher[f"encoder.vit.{name}"]), name
    assert not any(
        torch.equal(value, checkpoint(whole)["student"][name])
        for name, value in teacher.items()
        if "blocks" in name and value.ndim > 1
    )


def test_a_file_of_weights_is_measured_as_in_the_run(whole, inside, capsys):
    assert inside(whole / "toy.yaml", whole / "final_models/ssl.pt") == 0
    printed = capsys.readouterr().out
    last = [line for line in log_of(whole) if "retrieval" in line][-1]
    for name in ("retrieval", "margin", "background_retrieval", "effective_rank"):
        assert float(
            re.search(rf"\b{name} (\S+?),? ", printed.replace("\n", " "))[1].strip(",")
        ) == pytest.approx(last[name], abs=2e-4), name


def test_the_table_of_runs(whole, capsys):
    assert probe.main([str(whole / "runs/ssl")]) == 0
    head, rule, first, last = capsys.readouterr().out.strip().splitlines()
    assert "retrieval" in head and first.split("|")[2:5] == [" average_single ", " 0 ", " 0 "]
    assert last.split("|")[4] == " 8 " and first != last
    with pytest.raises(FileNotFoundError, match="log.jsonl"):
        probe.main([str(whole)])


def test_stopped_and_started_again_it_is_the_same(whole, inside, tmp_path, monkeypatch):
    """SIGTERM in the third step: exit code 85, and the rest ends bit for bit as the whole run."""
    path, update, calls = toy(tmp_path, measure=PROBED), ssl_.update_teacher, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return update(*arguments)
    monkeypatch.setattr(ssl_, "update_teacher", interrupted)
    assert inside(path) == 85 and checkpoint(tmp_path)["step"] == 3
    assert inside(path) == 0 and len(calls) == 8
    one, other = checkpoint(whole), checkpoint(tmp_path)
    for part in ("student", "teacher"):
        assert all(torch.equal(value, other[part][name]) for name, value in one[part].items())
    assert torch.equal(one["usage"], other["usage"])
    weights = tmp_path / "final_models/ssl.pt"
    before = model.load_backbone(weights).state_dict()
    weights.unlink()
    assert inside(path) == 0                             # it is done; its file is written again
    assert all(torch.equal(value, before[name])
               for name, value in model.load_backbone(weights).state_dict().items())


def test_it_does_not_go_on_with_other_fields(inside, tmp_path, capsys):
    folder = tmp_path / "fields"
    folder.mkdir()
    for number in range(6):
        np.save(folder / f"{number}.npy",
                np.random.default_rng(number).integers(0, 255, (2, 64, 64)).astype(np.uint8))
    path = toy(tmp_path, data=dict(fields=0, folders=[str(folder)], brightfield=[]), steps=3,
               measure=dict(every=9))
    assert inside(path) == inside(path) == 0
    np.save(folder / "6.npy", np.zeros((2, 64, 64), np.uint8))
    assert inside(path) == 1 and "pool had other fields" in capsys.readouterr().err


def test_two_processes_train_to_the_weights_of_one(inside, tmp_path):
    """The same batch over all; eps keeps gradients of mere rounding from becoming steps."""
    def path(name):
        return toy(tmp_path, steps=12, experiment=name, eps=1e-4, log_every=6, save_every=12,
                   measure=dict(every=12))
    assert inside(path("one")) == 0
    codes, errors = two_processes(path("two"))
    assert codes == [0, 0], errors
    one, two = (checkpoint(tmp_path, name) for name in ("one", "two"))
    for part in ("student", "teacher"):
        a, b = (torch.cat([v.flatten() for v in state[part].values()]) for state in (one, two))
        assert ((a - b).norm() / a.norm()).item() < 1e-5
    before = train_ssl.build_train_ssl_student(
        runs.load_config(train_ssl.Config, tmp_path / "toy.yaml")
    )[0].state_dict()
    moved, length = (torch.cat([(x - y).flatten() for x, y in pairs]).norm() for pairs in (
        [(one["student"][name], value) for name, value in before.items()],
        [(value, 0) for value in before.values()]))
    assert moved > 0.02 * length                               # there was something to differ
    lines = [[line for line in log_of(tmp_path, name) if "loss" in line] for name in ("one", "two")]
    for x, y in zip(*lines, strict=True):
        for name in ("loss", "dino"):
            assert x[name] == pytest.approx(y[name], rel=1e-4)


def test_from_dinov3_with_folders_and_every_strategy(shared, inside, tmp_path):
    """A tenth of the learning rate, patch 16 turned into 8; fields from files of two channels."""
    fixture = torch.load(shared / "fixtures/dinov3_small.pt", weights_only=True)
    torch.save(fixture["state_dict"], tmp_path / "dinov3.pth")
    (tmp_path / "fields").mkdir()
    for number in range(6):
        np.save(tmp_path / "fields" / f"{number}.npy",
                np.random.default_rng(number).integers(0, 255, (2, 64, 64)).astype(np.uint8))
    for strategy in ("average", "single", "pairs", "average_single", "all"):
        path = toy(tmp_path, init=str(tmp_path / "dinov3.pth"), steps=3, lr=None,
                   experiment=strategy, measure=dict(every=9),
                   data=dict(fields=0, folders=[str(tmp_path / "fields")], brightfield=[]))
        assert inside(path, f"views.strategy={strategy}") == 0
        config = runs.load_config(train_ssl.Config, tmp_path / "runs" / strategy / "config.yaml")
        assert config.lr == 5e-5 and config.views.strategy == strategy
    vit = model.load_backbone(tmp_path / "dinov3.pth", 8)
    trained = model.load_backbone(tmp_path / "final_models/all.pt", 8)
    assert trained.architecture == vit.architecture
    assert torch.allclose(trained.patch_embed.weight, vit.patch_embed.weight, atol=1e-3)


def test_check_prints_the_table_and_writes_nothing(inside, capsys, tmp_path):
    assert inside(toy(tmp_path), "--check") == 0
    printed = capsys.readouterr().out
    assert "10 fields to train on, 10 on the device at a time, 2 to measure on" in printed
    assert "AdamW" in printed and "TFLOPs a step" in printed
    pool = next(line for line in printed.splitlines() if line.startswith("fields in the pool"))
    assert pool.endswith(f"{10 * 8 * 96 * 96 * 2 / 2**30:.2f} GiB")
    assert [p.name for p in tmp_path.iterdir()] == ["toy.yaml"]


def test_help_is_fast():
    command = [sys.executable, "-X", "importtime", str(ROOT / "train_ssl.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0 and "--check" in done.stdout and " torch._C" not in done.stderr


@pytest.mark.parametrize(
    "changes, said",
    [
        (["batch=11"], "11: 10 fields to train on"),
        (["data.fields=0"], "expected one of data.index"),
        (["views.size=30"], "multiple of the patch"),
        (["views.strategie=all"], "did you mean 'strategy'"),
        (["views.overlap=1.5"], "from 0 to 1"),
        (["views.scale=[2, 1]"], "low and high"),
        (["views.zoom=0.3"], "0.33"),
        (["views.locals=-1"], "0 or more"),
        (["batch=1"], "from 2 to 65536"),
        (["seed=-1"], "seed=-1: expected a whole number, 0 or more"),
        (["measure.probe_every=3"], "multiple of"),
        (["measure.window=100"], "expected 100 px or more"),
        (["init=nowhere.pt"], "no weights at nowhere.pt"),
        (["augment.elastic=1"], "augment.elastic"),
        (["data.channels=[DNA, XYZ]"], "'XYZ'"),
        (["data.fields=0", "data.folders=nowhere"], "nowhere"),
        (["loss.mask=[0.5, 0.1]"], "loss.mask"),
        (["data.fields=0", "data.index=nowhere.tsv.gz"], "nowhere.tsv.gz"),
    ],
)
def test_refusals_in_one_line(inside, tmp_path, capsys, changes, said):
    assert inside(toy(tmp_path), *changes) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and said in error


@pytest.mark.smoke
def test_collapse_is_said(tmp_path):
    config = runs.load_config(train_ssl.Config, toy(tmp_path))
    said = []

    class Run:
        def log(self, step, **values):
            said.append(values)
    healthy = dict(usage=20.0, effective_rank=5.0, teacher_entropy=2.0)
    train_ssl.warn_of_collapse(config, Run(), 100, healthy, (8, 24))
    assert not said
    train_ssl.warn_of_collapse(config, Run(), 100, {**healthy, "usage": 1.2}, (8, 24))
    train_ssl.warn_of_collapse(config, Run(), 100, {**healthy, "effective_rank": 1.01}, (8, 24))
    even = {**healthy, "teacher_entropy": math.log(32) - 0.001}
    train_ssl.warn_of_collapse(config, Run(), 100, even, (8, 24))
    assert "even to 99.97%" in said.pop()["COLLAPSE"]
    assert "usage is 1.20" in said[0]["COLLAPSE"] and "effective_rank" in said[1]["COLLAPSE"]


def test_first_weights(tmp_path):
    config = runs.load_config(train_ssl.Config, toy(tmp_path, network=dict(dim=96, init_std=0.15)))
    student, teacher = train_ssl.build_train_ssl_student(config)
    weights = [m.weight for m in student.encoder.modules() if isinstance(m, torch.nn.Linear)]
    assert len(weights) == 16
    assert all(0.12 < w.std() < 0.14 and w.abs().max() <= 0.3 for w in weights)      # cut at 2 std
    for a, b in zip(student.parameters(), teacher.parameters(), strict=True):
        assert torch.equal(a, b) and not b.requires_grad


@pytest.mark.smoke
def test_parameter_groups(tmp_path):
    config = runs.load_config(train_ssl.Config, toy(tmp_path, layer_decay=0.5, patch_lr=0.1))
    student, _ = train_ssl.build_train_ssl_student(config)
    groups = train_ssl.train_ssl_optimiser(student, config).param_groups
    of = {id(p): group for group in groups for p in group["params"]}
    assert len(of) == len(list(student.parameters()))
    named = {name: of[id(p)] for name, p in student.named_parameters()}
    assert named["encoder.vit.blocks.3.fc1.weight"]["scale"] == 0.5
    assert named["encoder.vit.blocks.0.fc1.weight"]["scale"] == 0.0625
    assert named["encoder.vit.patch_embed.weight"]["scale"] == pytest.approx(0.1 * 0.03125)
    assert named["encoder.vit.register_tokens"]["scale"] == 0.03125
    assert named["dino.mlp.0.weight"]["scale"] == 1 == named["encoder.vit.norm.weight"]["scale"]
    assert named["dino.prototypes.weight"]["prototypes"]
    assert not named["dino.mlp.0.weight"]["prototypes"]
    for name, parameter in student.named_parameters():
        assert named[name]["decays"] == (parameter.ndim > 1 and "token" not in name), name
