"""decoders.py: a decoder for each kind of image on one backbone, trained, joined, chosen."""
from __future__ import annotations

import shutil

import numpy as np
import pytest
import skimage.io
import torch

import decoders
import export
import instruct
import kinds
import model
import runs
import segment
import train_seg
import tuning
from conftest import ROOT
from test_train_seg import run, toy

SIX = dict(steps=6, lr=5e-3, eps=1e-4)      # else AdamW makes whole steps of gradients that are rounding alone
SHORT = dict(steps=4, lr=2e-4, warmup=1, val_every=4, save_every=2, log_every=2)


def stripes(seed: int) -> np.ndarray:
    return np.tile(128 + 90 * np.sin(np.arange(64) / 1.5 + seed), (64, 1))


def dots(seed: int) -> np.ndarray:
    return np.where(np.random.default_rng(seed).random((64, 64)) < 0.1, 250, 5)


def upright(seed: int) -> np.ndarray:
    return stripes(seed).T


def smooth(seed: int) -> np.ndarray:
    return np.clip(np.add.outer(np.arange(64), np.arange(64)) * 1.5 + 3 * seed, 0, 255)


LOOKS = dict(striped=stripes, dotted=dots, upright=upright, smooth=smooth)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Sets that look different, a decoder for two of them, one for a third, none for the last, from one command."""
    folder = tmp_path_factory.mktemp("decoders")
    labels, large = np.zeros((2, 64, 64), np.uint16)
    labels[5:30, 5:30], labels[35:60, 20:60] = 1, 2
    large[5:45, 5:45] = 1
    for name, look in LOOKS.items():
        (folder / name).mkdir()
        for seed in range(5):
            skimage.io.imsave(folder / name / f"{name}{seed}.png", look(seed).astype(np.uint8), check_contrast=False)
            skimage.io.imsave(folder / name / f"{name}{seed}_masks.png", large if name == "upright" else labels, check_contrast=False)
    path = toy(folder, **SHORT, unclear="nearest", decoders=dict(stripes=SIX, dots=SIX),
               data=dict(root=str(folder), share=0.3, sets=[dict(path="striped", decoder="stripes"), dict(path="dotted", decoder="dots"), dict(path="upright", decoder="stripes"),
                          dict(path="smooth")]))
    done = run(path)
    assert done.returncode == 0, done.stderr
    return folder, path


def test_one_command_trains_all_and_one_file_holds_them(trained):
    folder, _ = trained
    net = model.load(folder / "final_models/seg.pt")
    assert list(net.decoders) == ["stripes", "dots"] and net.settings.kinds["unclear"] == "nearest"
    start = torch.load(folder / "runs/seg/checkpoints/seg/best.pt", weights_only=True)["average"]
    for name, tensor in net.state_dict().items():             # the network for all is as it was
        if not name.startswith("decoders."):
            assert torch.equal(tensor, start[f"module.{name}"].half().float() if "periods" not in name else tensor), name
    for name in net.decoders:
        alone = model.load(folder / f"runs/seg/{name}.pt")
        assert alone.settings.provenance["step"] in (4, 6) and len(alone.settings.provenance["images"]["train"]) == (8 if name == "stripes" else 4)
        assert net.settings.provenance["decoders"][name] == alone.settings.provenance
        assert all(torch.equal(tensor, alone.decoder.state_dict()[key]) for key, tensor in net.decoders[name].state_dict().items())
        moved = [not torch.equal(tensor, net.decoder.state_dict()[key]) for key, tensor in net.decoders[name].state_dict().items()]
        assert np.mean(moved) > 0.9


def test_an_image_goes_through_the_decoder_of_its_kind(trained):
    folder, _ = trained
    net = model.load(folder / "final_models/seg.pt")
    for own, other, look, kind in (("stripes", "dots", stripes, "striped"), ("dots", "stripes", dots, "dotted"),
                                   ("stripes", "dots", upright, "upright")):
        image = look(77)
        found = segment.distance_map(image, net)
        assert segment.kind_of(image, net) == kind
        assert np.array_equal(found, segment.distance_map(image, model.load(folder / f"runs/seg/{own}.pt"), kind="shared"))
        assert np.array_equal(found, segment.distance_map(image, net, kind=kind))
        assert not np.allclose(found, segment.distance_map(image, model.load(folder / f"runs/seg/{other}.pt"), kind="shared"))
        assert not np.allclose(found, segment.distance_map(image, net, kind="shared"))
        alone = model.load(folder / f"runs/seg/{own}.pt").settings
        gained = kinds.gaining(alone.provenance["scores"]["sets"], ["striped", "upright"]).get(kind)
        setting = (gained or dict(setting={name: getattr(alone, name) for name in tuning.Setting._fields}))["setting"]
        wide = np.sqrt(4 / np.pi * (1600 if kind == "upright" else np.median([625, 1000])))     # the set's, not its decoder's
        assert kinds.settings(net)[kind] == {**setting, "diameter": pytest.approx(wide)}
        assert segment.scale_for(20, net, kind) == pytest.approx(wide / 20)
    if kinds.settings(net)["smooth"].keys() == {"diameter"}:                   # it gained nothing by a setting of its own
        assert segment.kind_of(smooth(3), net) == "smooth"
    whole, image = model.load(folder / "final_models/seg.pt"), smooth(3)
    whole.drop_decoders()
    assert np.array_equal(segment.distance_map(image, net), segment.distance_map(image, whole))


def test_a_signal_between_two_trainings_ends_them_there(trained):
    """It came when no run was listening."""
    _, path = trained
    config = runs.load(train_seg.Config, path)
    jobs, begun = dict(decoders.plan(config, str(train_seg.export_path(config)))), []
    for stopped, expected in (([15], (runs.REQUEUE, [])), ([], (1, ["stripes"]))):
        assert (decoders.train_all(config, jobs, lambda one, *_: begun.append(one.experiment.split("/")[1]) or 1, 0, 1, "cpu", stopped), begun) == expected


def test_a_set_that_the_decoder_for_all_serves_better_keeps_it(trained, tmp_path):
    folder, path = trained
    for part in ("runs", "final_models", *LOOKS):
        shutil.copytree(folder / part, tmp_path / part)
    net = model.load(tmp_path / "final_models/seg.pt")
    assert net.settings.provenance["scores"]["sets"]["upright"]["score"] < 0.05
    net.settings.provenance["scores"]["sets"]["upright"].update(score=0.9, own_score=0.9)
    model.save(net, tmp_path / "final_models/seg.pt", half=True)
    done = run(path, f"output_base_dir={tmp_path}", "unclear=all")              # which is of the weights, not of what was trained
    assert done.returncode == 0, done.stderr
    known = model.load(tmp_path / "final_models/seg.pt").settings.kinds
    assert known["unclear"] == "all"
    chosen = {entry["name"]: entry["decoder"] for entry in known["sets"]}
    assert chosen == dict(striped="stripes", dotted="dots", upright=None, smooth=None)


def test_started_again_nothing_is_trained_twice(trained, tmp_path):
    folder, path = trained
    before = {p: p.read_bytes() for p in folder.glob("runs/seg/**/log.jsonl")}
    whole = torch.load(folder / "final_models/seg.pt", weights_only=True)
    done = run(path)
    assert done.returncode == 0 and len(before) == 3
    assert {p: p.read_bytes() for p in before} == before
    again = torch.load(folder / "final_models/seg.pt", weights_only=True)
    assert all(torch.equal(again["state_dict"][name], tensor) for name, tensor in whole["state_dict"].items())
    assert again["settings"] == whole["settings"]


def test_training_from_the_file_takes_the_network_for_all(trained):
    folder, path = trained
    config = runs.load(train_seg.Config, path, [f"init={folder / 'final_models/seg.pt'}"])
    net = train_seg.build(config)
    whole = model.load(folder / "final_models/seg.pt")
    assert not net.decoders and "decoders" not in net.architecture and whole.settings.kinds and not net.settings.kinds
    assert all(torch.equal(tensor, whole.decoder.state_dict()[name]) for name, tensor in net.decoder.state_dict().items())
    assert sum(row[1] for row in model.cost(whole, 32)) == sum(row[1] for row in model.cost(net, 32))
    model.save(net, folder / "plain.pt")
    assert not model.load(folder / "plain.pt").decoders


def test_a_decoder_of_another_backbone_is_refused(trained, tmp_path):
    folder, path = trained
    for part in ("runs", "final_models", *LOOKS):
        shutil.copytree(folder / part, tmp_path / part)
    stranger = model.load(tmp_path / "runs/seg/dots.pt")
    stranger.backbone.cls_token.data += 1
    model.save(stranger, tmp_path / "runs/seg/dots.pt", half=True)
    done = run(path, f"output_base_dir={tmp_path}")
    assert done.returncode == 1 and "dots.pt: trained on another backbone" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("changes,said", [
    (["decoders.dots.stepps=3"], "decoders.dots: unknown key 'stepps'"),
    (["decoders.dots.augment.invrt=1"], "decoders.dots.augment: unknown key 'invrt'"),
    (["decoders.dots.crop=64"], "decoders.dots.crop: follows from the network for all; leave it out"),
    (["decoders.dots.unclear=all"], "decoders.dots.unclear: follows from the network for all; leave it out"),
    (["decoders.dots.init=x.pt"], "decoders.dots.init: follows from the network for all; leave it out"),
    (["data.share=0"], "decoder: stripes: its sets leave no image to validate on"),
    (["decoders.dots=3"], "decoders.dots=3: expected what it changes, {key: value}"),
    (["decoders.dots.warmup=100"], "warmup=100: expected fewer than steps=6"),
    (["decoders.dashes.steps=3"], "decoders.dashes: no set in data.sets has decoder: dashes (there are: stripes, dots)")])
def test_wrong_changes_are_said_before_anything_is_trained(trained, tmp_path, changes, said):
    _, path = trained
    done = run(path, f"output_base_dir={tmp_path}", *changes)
    assert done.returncode == 1 and said in done.stderr and not (tmp_path / "final_models").exists()


def test_a_wrong_name_is_refused(tmp_path):
    done = run(toy(tmp_path, data=dict(sets=[dict(path="cells", decoder="a.b")])))
    assert done.returncode == 1 and "cells: decoder='a.b', expected a name of letters, digits and _" in done.stderr


def test_evaluating_settings_runs_the_right_decoder_once(trained):
    """tuning.Recorded keeps tiles of the network; the decoder of a kind must not slip past it."""
    folder, _ = trained
    net = model.load(folder / "final_models/seg.pt")
    recorded, image, ran = tuning.Recorded(net), stripes(77), []
    net.decoders["stripes"].register_forward_hook(lambda *_: ran.append(1))
    found, batches = [], []
    for _ in range(3):
        recorded.at = 0
        found.append(segment.distance_map(image, recorded))
        batches.append(len(ran))
    assert batches[0] > 0 and batches == batches[:1] * 3 and all(np.array_equal(found[0], other) for other in found)
    assert np.array_equal(found[0], segment.distance_map(image, model.load(folder / "runs/seg/stripes.pt"), kind="shared"))


def test_the_decoder_of_a_kind_can_be_exported(trained, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    folder, _ = trained
    net = model.load(folder / "final_models/seg.pt")
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for kind, alone in (("dot", "runs/seg/dots.pt"), (None, "final_models/seg.pt")):
        export.to_onnx(net, tmp_path / f"{kind}.onnx", kind=kind)
        found, = onnxruntime.InferenceSession(tmp_path / f"{kind}.onnx").run(None, {"image": x.numpy()})
        with torch.inference_mode():
            np.testing.assert_allclose(found, model.load(folder / alone)(x).numpy(), atol=1e-4)
    assert list(net.decoders) == ["stripes", "dots"]          # the network itself is as it was
    sizes = [(tmp_path / f"{kind}.onnx").stat().st_size for kind in ("dot", None)]
    assert abs(sizes[0] - sizes[1]) < 2000                    # one decoder in each
    with pytest.raises(ValueError, match="kind=blue: expected one of 'shared', 'striped', 'dotted'"):
        export.to_onnx(net, tmp_path / "x.onnx", kind="blue")


def test_check_counts_the_decoders_as_well(trained):
    done = run(trained[1], "--check")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "then 2 decoders (stripes, dots), 12 steps in all"


def test_two_processes_train_the_same_decoders(trained, tmp_path):
    folder, path = trained
    done = run(path, f"output_base_dir={tmp_path}", torchrun=2)
    assert done.returncode == 0, done.stderr
    one, two = (torch.load(place / "final_models/seg.pt", weights_only=True) for place in (folder, tmp_path))
    assert one["state_dict"].keys() == two["state_dict"].keys() and one["architecture"] == two["architecture"]
    for name, tensor in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name].float(), tensor.float(), atol=6e-3, rtol=2e-3, msg=lambda said, name=name: f"{name}: {said}")


def test_a_decoder_may_be_trained_otherwise_without_the_network_for_all(trained, tmp_path):
    """Its own run is begun anew; the network for all, hours of training, stays as it is."""
    folder, path = trained
    for part in ("runs", "final_models", *LOOKS):
        shutil.copytree(folder / part, tmp_path / part)
    done = run(path, f"output_base_dir={tmp_path}", "decoders.dots.steps=8")
    assert done.returncode == 1 and "runs/seg/dots was begun with another configuration" in done.stderr
    shutil.rmtree(tmp_path / "runs/seg/dots")
    done = run(path, f"output_base_dir={tmp_path}", "decoders.dots.steps=8")
    assert done.returncode == 0, done.stderr
    whole, before = model.load(tmp_path / "final_models/seg.pt"), model.load(folder / "final_models/seg.pt")
    assert "steps: 8" in whole.settings.provenance["decoders"]["dots"]["config"]
    same = [torch.equal(tensor, before.state_dict()[name]) for name, tensor in whole.state_dict().items() if "decoders.dots" not in name]
    assert all(same) and not torch.equal(whole.decoders["dots"].head.weight, before.decoders["dots"].head.weight)


def test_the_instructed_network_starts_from_the_decoder_for_all(trained):
    folder, _ = trained
    base = model.load(folder / "final_models/seg.pt")
    config = runs.load(instruct.Config, ROOT / "configs/instruct.yaml", [f"init={folder / 'final_models/seg.pt'}", "crop=32"])
    record = dict(trained=["tumour"], regions=[], tissues=[], licence=["", ""])
    net = instruct.build(config, record, ["tumour"], 4)
    assert torch.equal(net.decoder.refine[0].weight, base.decoder.refine[0].weight) and not net.settings.kinds and not net.decoders
