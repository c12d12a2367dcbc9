"""model.py against DINOv3's own outputs, and its closed forms.

    python tests/test_model.py           writes dinov3_random.npz anew, with transformers

dinov3_random.npz is a small random network by transformers' code, its configuration and its
outputs. ../shared/fixtures has one with the outputs of Meta's code.
"""
import copy
import importlib.util
import json
import math
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import model
from model import DINOCell, ViT


def small_vit(**options):
    torch.manual_seed(0)
    return ViT(**{**dict(dim=48, depth=4, heads=2, patch=8, registers=2, layerscale=0.1),
                  **options})


def small_net(**options):
    return DINOCell(small_vit(**options), widths=(32, 16, 8), last=8)


def relative_error(got, expected):
    return ((got - expected).abs().max() / expected.abs().max()).item()


# ----------------------------------------------------------------------------- the official network

@pytest.mark.smoke
@pytest.mark.parametrize("file,limit", [("official", 1e-5), ("hugging face", 2e-3)])
def test_reproduces_dinov3(shared, tmp_path, file, limit):
    fixture = torch.load(shared / "fixtures/dinov3_small.pt", weights_only=True)
    if file == "official":
        path = tmp_path / "dinov3.pth"
        torch.save(fixture["state_dict"], path)
    else:
        path = shared / "fixtures/dinov3_small_hf.safetensors"
    vit = model.load_backbone(path, patch=16).eval()
    with torch.no_grad():
        for case in fixture["cases"]:
            image, mask = case["image"].float(), case["mask"]
            got = vit(image)
            for name in ("cls", "registers", "patches"):
                assert relative_error(getattr(got, name), case[name]) < limit, name
            masked = vit(image, mask)
            assert relative_error(masked.cls, case["masked_cls"]) < limit
            assert relative_error(masked.patches, case["masked_patches"]) < limit
            for block, expected in zip(vit.features(image, tuple(range(vit.depth))),
                                       case["blocks"]):
                assert relative_error(block.mT, expected.flatten(2)) < limit


RANDOM = Path(__file__).with_name("dinov3_random.npz")
SHAPE = dict(hidden_size=48, intermediate_size=192, num_hidden_layers=3, num_attention_heads=3,
             num_register_tokens=4, patch_size=16, rope_theta=80.0)       # heads of 16, not of 64


def write_safetensors(path, tensors, metadata=None):
    """By the format's description."""
    header, body = {"__metadata__": metadata} if metadata else {}, b""
    for name, (kind, array) in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = dict(dtype=kind, shape=list(np.shape(array)),
                            data_offsets=[len(body), len(body) + len(raw)])
        body += raw
    head = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + body)
    return path


def transformers_network(shape):
    """A random DINOv3 of transformers, its weights such as float16 holds."""
    unneeded = "torchvision" not in sys.modules                # and often for another torch
    if unneeded:
        sys.modules["torchvision"] = None
    try:
        transformers = pytest.importorskip("transformers", reason="needs transformers")
        network = transformers.DINOv3ViTModel
    finally:
        if unneeded:
            del sys.modules["torchvision"]
    torch.manual_seed(0)
    theirs = network(transformers.DINOv3ViTConfig(**shape)).eval()
    with torch.no_grad():
        for name, tensor in theirs.named_parameters():
            spread = 0.3 if "norm" in name or "lambda" in name or "token" in name else 0.1
            tensor.copy_((torch.randn_like(tensor) * spread).half().float())
            if "norm" in name and "weight" in name or "lambda" in name:
                tensor.add_(1).copy_(tensor.half().float())
    return theirs


def folder_of(folder, tensors, config):
    """model.safetensors with config.json beside it, as Hugging Face has them."""
    folder.mkdir(exist_ok=True)
    write_safetensors(folder / "model.safetensors", {
        name: ("F16" if array.dtype == np.float16 else "F32", array)
        for name, array in tensors.items()})
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "model.safetensors"


def shipped():
    """(weights, configuration, image, tokens after the final norm) of dinov3_random.npz."""
    with np.load(RANDOM) as content:
        arrays = dict(content)
    config, image, tokens = json.loads(str(arrays.pop("config"))), arrays.pop("image"), \
        arrays.pop("tokens")
    return arrays, config, torch.from_numpy(image), torch.from_numpy(tokens)


def official_names(weights):
    """Hugging Face's tensors under the names of Meta's file, with its masked bias on keys."""
    pairs = (("embeddings.patch_embeddings", "patch_embed.proj"), ("embeddings.", ""),
             ("register_tokens", "storage_tokens"), ("model.layer.", "blocks."),
             ("layer.", "blocks."), ("layer_scale1.lambda1", "ls1.gamma"),
             ("layer_scale2.lambda1", "ls2.gamma"), ("mlp.up_proj", "mlp.fc1"),
             ("mlp.down_proj", "mlp.fc2"), ("attention.o_proj", "attn.proj"))
    ours = {}
    for name, array in weights.items():
        for old, new in pairs:
            name = name.replace(old, new)
        ours[name] = torch.from_numpy(array).float()
    for stem in {name[:-len("attention.q_proj.weight")] for name in ours if "q_proj.w" in name}:
        q, k, v = (ours.pop(f"{stem}attention.{letter}_proj.weight") for letter in "qkv")
        biases = [ours.pop(f"{stem}attention.{letter}_proj.bias") for letter in "qv"]
        ours[f"{stem}attn.qkv.weight"] = torch.cat((q, k, v))
        ours[f"{stem}attn.qkv.bias"] = torch.cat((biases[0], torch.ones(len(q)), biases[1]))
        ours[f"{stem}attn.qkv.bias_mask"] = torch.tensor([1.0, 0, 1]).repeat_interleave(len(q))
    return ours


def periods_of(config):
    return model.rope_periods(config["hidden_size"] // config["num_attention_heads"],
                              config["rope_theta"])


@pytest.mark.smoke
@pytest.mark.parametrize("layout", ["hugging face", "official", "training checkpoint"])
def test_reproduces_a_random_dinov3(tmp_path, layout):
    """Every token after the last norm, whatever the names in the file."""
    weights, config, image, tokens = shipped()
    if layout == "hugging face":
        path = folder_of(tmp_path / "hf", weights, config)
    else:
        path, content = tmp_path / "w.pth", official_names(weights)
        content["rope_embed.periods"] = periods_of(config)
        if layout == "training checkpoint":
            content = {"teacher": {f"backbone.{k}": v for k, v in content.items()}
                       | {"dino_head.mlp.0.weight": torch.zeros(3)}, "iteration": 7}
        torch.save(content, path)
    vit = model.load_backbone(path, patch=16).eval()
    with torch.no_grad():
        found = vit(image)
    assert relative_error(torch.cat((found.cls[:, None], found.registers, found.patches), 1),
                          tokens) < 1e-5


@pytest.mark.parametrize("shape", [{}, dict(num_attention_heads=2, rope_theta=10000.0),
                                   dict(hidden_size=128, intermediate_size=512, rope_theta=100.0,
                                        num_attention_heads=2)])
def test_live_against_transformers(tmp_path, shape):
    theirs = transformers_network(SHAPE | shape)
    weights = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()
               if "inv_freq" not in name}
    path = folder_of(tmp_path / "hf", weights, theirs.config.to_dict())
    x = torch.rand(2, 3, 48, 80, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected = model.load_backbone(path, patch=16).eval()(x), theirs(x)
    assert relative_error(found.patches, expected.last_hidden_state[:, 5:]) < 1e-5
    assert relative_error(found.cls, expected.last_hidden_state[:, 0]) < 1e-5


def test_a_bias_on_keys_is_refused_unless_masked(tmp_path):
    weights, config, image, _ = shipped()
    content = official_names(weights) | {"rope_embed.periods": periods_of(config)}

    def loaded(**changes):
        torch.save({k: v for k, v in (content | changes).items() if v is not None},
                   tmp_path / "w.pth")
        return model.load_backbone(tmp_path / "w.pth", patch=16)
    masks = [name for name in content if name.endswith("bias_mask")]
    whole, plain = loaded(), loaded(**{name: torch.full((144,), math.nan) for name in masks})
    assert torch.equal(whole(image).cls, plain(image).cls)
    for gone in (None, torch.ones(144)):
        with pytest.raises(ValueError, match="bias on keys"):
            loaded(**{name: gone for name in masks})
    zero = {name: tensor * torch.tensor([1.0, 0, 1]).repeat_interleave(48)
            for name, tensor in content.items() if name.endswith("qkv.bias")}
    assert torch.equal(loaded(**dict.fromkeys(masks), **zero)(image).cls, whole(image).cls)
    for value, there in ((0, True), (1, False)):
        path = folder_of(tmp_path / "hf", weights | {
            name.replace("q_proj", "k_proj"): np.full(48, value, np.float32)
            for name in weights if name.endswith("q_proj.bias")}, config)
        if there:
            model.load_backbone(path)
        else:
            with pytest.raises(ValueError, match=r"k_proj.bias has a bias on keys"):
                model.load_backbone(path)


def test_the_configuration_beside_the_weights_counts(tmp_path, capsys):
    weights, config, image, _ = shipped()
    path = folder_of(tmp_path / "hf", weights, config)

    def said(**changes):
        (path.parent / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ValueError) as error:
            model.load_backbone(path)
        assert "config.json" in str(error.value) and "\n" not in str(error.value)
        return str(error.value)
    assert "use_gated_mlp=True instead of False" in said(use_gated_mlp=True)
    assert "hidden_act=silu instead of gelu" in said(hidden_act="silu")
    assert "hidden_size=384 instead of 48" in said(hidden_size=384)
    assert "num_attention_heads=5" in said(num_attention_heads=5)
    assert "not the configuration" in said(num_attention_heads=None)
    (path.parent / "config.json").write_text(json.dumps(config | {"rope_theta": 90.0}))
    other = model.load_backbone(path, patch=16).eval()(image).cls
    (path.parent / "config.json").write_text(json.dumps(config))
    assert relative_error(model.load_backbone(path, patch=16).eval()(image).cls, other) > 1e-3
    assert not capsys.readouterr().err
    wide = {name: np.tile(array, [64 // 48 + 1] * array.ndim)[tuple(
        slice(64 if side == 48 else 192 if side == 144 else 256 if side == 192 else side)
        for side in array.shape)] for name, array in weights.items()}
    alone = folder_of(tmp_path / "alone", wide, {})
    (alone.parent / "config.json").unlink()
    assert len(model.load_backbone(alone, patch=16).periods) == 16
    assert "no config.json beside it" in capsys.readouterr().err


def test_safetensors_of_every_type(tmp_path):
    """Also what is empty, and eight bits; the package reads the same where it is installed."""
    values = np.arange(6).reshape(2, 3)
    kinds = {"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I16": "i2",
             "I8": "i1", "U64": "u8", "U32": "u4", "U16": "u2", "U8": "u1", "BOOL": "?"}
    tensors = {kind: (kind, values.astype(dtype)) for kind, dtype in kinds.items()}
    tensors |= {"BF16": ("BF16", np.array([0x3FC0, 0xC000], "u2")),          # 1.5, -2
                "F8_E4M3": ("F8_E4M3", np.array([0x3C, 0xC0], "u1")),
                "F8_E5M2": ("F8_E5M2", np.array([0x3E, 0xC0], "u1")),
                "empty": ("F32", np.zeros((0, 4), "f4")), "scalar": ("F32", np.float32(7))}
    path = write_safetensors(tmp_path / "all.safetensors", tensors, {"format": "pt"})
    read = model.read_safetensors(path)
    for kind in kinds:
        assert np.array_equal(read[kind].numpy(), tensors[kind][1])
        assert read[kind].numpy().dtype == tensors[kind][1].dtype
    for kind in ("BF16", "F8_E4M3", "F8_E5M2"):
        assert read[kind].float().tolist() == [1.5, -2.0], kind
    assert read["empty"].shape == (0, 4) and read["scalar"].shape == () and read["scalar"] == 7
    for name, change in (("type", ("F4", values.astype("u1"))), ("size", ("F64", values[:1]))):
        broken = write_safetensors(tmp_path / f"{name}.safetensors", {"a": change})
        if name == "size":
            broken.write_bytes(broken.read_bytes()[:-4])
        with pytest.raises(ValueError, match=rf"{name}.safetensors: not a whole"):
            model.read_safetensors(broken)
    theirs = pytest.importorskip("safetensors.torch", reason="needs safetensors").load_file(path)
    assert all(torch.equal(read[name].float(), tensor.float()) for name, tensor in theirs.items())


# ------------------------------------------------------------------------------------ patch 16 -> 8

def test_patch_8_answers_as_patch_16_on_the_image_enlarged(shared, tmp_path):
    """Enlarge an image patch by patch: patch-16 features of it equal patch-8 features of the image
    itself.

    A kernel that is resized (bicubic) or cut out instead answers something else: how far off stands
    below.
    """
    weights = torch.load(shared / "fixtures/dinov3_small.pt", weights_only=True)["state_dict"]
    torch.save(weights, tmp_path / "dinov3.pth")
    p16, p8 = (model.load_backbone(tmp_path / "dinov3.pth", patch=p).eval() for p in (16, 8))
    torch.manual_seed(0)
    image = torch.randn(2, 3, 40, 56)
    patches = F.unfold(image, 8, stride=8).mT.reshape(-1, 3, 8, 8)
    large = F.interpolate(patches, size=(16, 16), mode="bicubic").view(2, 5, 7, 3, 16, 16)
    large = large.permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 80, 112)
    with torch.no_grad():
        expected, got = p16(large), p8(image)
        assert relative_error(got.patches, expected.patches) < 1e-5
        assert relative_error(got.cls, expected.cls) < 1e-5
        kernel, embedded = p16.patch_embed.weight, p16.patch_embed(large)
        bias = p16.patch_embed.bias.view(1, -1, 1, 1)
        bicubic = F.conv2d(image, F.interpolate(kernel, size=(8, 8), mode="bicubic"),
                           stride=8) + bias
        sliced = F.conv2d(image, kernel[:, :, 4:12, 4:12], stride=8) + bias
        ours = p8.patch_embed(image)

    def off(x):
        return ((x - embedded).norm() / (embedded - bias).norm()).item()
    assert off(ours) < 1e-5
    assert off(bicubic) > 0.5 and off(sliced) > 0.5
    gain = ((bicubic - bias).norm() / (embedded - bias).norm()).item()
    assert gain < 0.5, "a bicubic kernel answers far too weakly"


@pytest.mark.smoke
def test_a_smooth_kernel_resized_is_weaker_by_four():
    """Closed form: on a constant image 256 ones answer 256; resized to 64 ones they would answer
    64."""
    kernel = torch.ones(1, 3, 16, 16)
    assert torch.allclose(model.shrink_patch(kernel, 8).sum((2, 3)), torch.tensor(256.0))
    with pytest.raises(ValueError, match="smaller"):
        model.shrink_patch(torch.ones(1, 3, 8, 8), 16)


# ------------------------------------------------------------------------------------------ weights

def test_round_trip_keeps_everything(tmp_path):
    net = small_net().eval()
    net.settings.cap, net.settings.peak, net.settings.provenance = 4.0, 0.5, {"data": "discs"}
    model.save(net, tmp_path / "net.pt")
    back = model.load(tmp_path / "net.pt")
    x = torch.rand(1, 3, 32, 40)
    assert torch.equal(net(x), back(x))
    assert back.settings == net.settings
    assert [p.name for p in tmp_path.iterdir()] == ["net.pt"]
    model.save(net, tmp_path / "half.pt", half=True)
    assert (tmp_path / "half.pt").stat().st_size < 0.6 * (tmp_path / "net.pt").stat().st_size
    assert (model.load(tmp_path / "half.pt")(x) - net(x)).abs().max() < 1e-2
    alone = model.load_backbone(tmp_path / "net.pt")
    assert torch.equal(alone(x).patches, net.backbone(x).patches)
    model.save(alone, tmp_path / "backbone.pt")
    assert torch.equal(model.load_backbone(tmp_path / "backbone.pt")(x).cls, alone(x).cls)


@pytest.mark.smoke
def test_wrong_weights_are_named(tmp_path, shared):
    weights = torch.load(shared / "fixtures/dinov3_small.pt", weights_only=True)["state_dict"]

    def said(content, load=model.load_backbone):
        path = tmp_path / "w.pth"
        torch.save(content, path)
        with pytest.raises(ValueError) as error:
            load(path)
        assert "w.pth" in str(error.value) and "\n" not in str(error.value)
        return str(error.value)

    assert "missing: blocks.1.norm1.weight" in said({k: v for k, v in weights.items()
                                                     if k != "blocks.1.norm1.weight"})
    assert "surplus: extra" in said(weights | {"extra": torch.zeros(1)})
    assert "norm.weight (5,) instead of (128,)" in said(weights | {"norm.weight": torch.zeros(5)})
    for strange in ({"a": torch.zeros(1)}, {0: torch.zeros(1)}, {"cls_token": 3},
                    {"teacher": {0: torch.zeros(1)}}):
        assert "no vision transformer" in said(strange)
    assert "no DINOCell file" in said(weights, model.load)
    assert "a list" in said([1, 2])
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match="text.pt: not a file of PyTorch weights"):
        model.load(tmp_path / "text.pt")
    (tmp_path / "cut.safetensors").write_bytes(
        (shared / "fixtures/dinov3_small_hf.safetensors").read_bytes()[:9000]
    )
    with pytest.raises(ValueError, match="cut.safetensors"):
        model.load_backbone(tmp_path / "cut.safetensors")
    with pytest.raises(FileNotFoundError, match="no weights at .*gone.pt; train with train_seg.py"):
        model.load(tmp_path / "gone.pt")
    model.save(small_vit(), tmp_path / "vit.pt")
    with pytest.raises(ValueError, match="backbone without decoder"):
        model.load(tmp_path / "vit.pt")


# ------------------------------------------------------------------------------------------ network

def test_default_is_s8_with_the_parameters_the_readme_states():
    with torch.device("meta"):
        net = DINOCell()
    backbone = sum(p.numel() for p in net.backbone.parameters())
    assert net.taps == (2, 5, 8, 11)
    D = 384  # per block qkv 3, proj 1, ffn 8 matrices and 14 vectors of D
    assert backbone == 12 * (12 * D * D + 14 * D) + (3 * 64 * D + D) + (1 + 4 + 1 + 2) * D
    assert 21.3e6 < backbone < 21.5e6


def test_stem_sees_the_image_at_every_level_and_none_without():
    """A gradient reaches every level; one level less is exactly as many parameters less; 0 leaves
    tokens alone."""
    nets = [DINOCell(ViT(16, 4, 2), (16, 8, 8), 8, stem=stem) for stem in range(4)]
    counts = [sum(p.numel() for p in net.parameters()) for net in nets]

    def level(a: int, b: int) -> int:  # two convolutions, two norms
        return 9 * a * b + 9 * b * b + 4 * b
    assert np.diff(counts).tolist() == [level(3, 8), level(8, 8), level(8, 16)]
    torch.manual_seed(0)
    for net in nets:
        net(torch.rand(1, 3, 32, 32)).sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in net.decoder.stem.parameters())
    with pytest.raises(ValueError, match="stem=4: expected 0 to 3 levels"):
        DINOCell(ViT(16, 4, 2), (16, 8, 8), 8, stem=4)


def test_a_plain_unet_in_place_of_the_transformer(tmp_path):
    """It trains, is saved and loaded like the other, and what it says moves with the image (a ViT's
    does not exactly)."""
    torch.manual_seed(0)
    net = DINOCell(model.ConvNet(16, 4), (16, 8, 8), 8, stem=3).eval()
    model.save(net, tmp_path / "unet.pt")
    loaded = model.load(tmp_path / "unet.pt")
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(loaded(x), net(x)) and isinstance(loaded.backbone, model.ConvNet)
    features = net.backbone.features(x, (0, 3))
    assert [f.shape for f in features] == [(1, 64, 16)] * 2
    net.train()(x).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_a_head_that_answers_for_two_by_two_pixels(tmp_path):
    """last=0: a stage less, the same size of answer, every level of the stem learns, and each pixel
    of four has its own weights."""
    torch.manual_seed(0)
    net = DINOCell(ViT(16, 3, 2), (16, 8), last=0, stem=2)
    x = torch.rand(2, 3, 32, 48)
    net(x).sum().backward()
    assert net(x).shape == (2, 1, 32, 48) and all(p.grad is not None and p.grad.any()
                                                  for p in net.decoder.parameters())
    model.save(net, tmp_path / "net.pt")
    assert torch.equal(model.load(tmp_path / "net.pt")(x), net.eval()(x))
    assert sum(row[1] for row in model.cost(net, 32)) == sum(p.numel() for p in net.parameters())
    before = net(x)
    with torch.no_grad():
        net.decoder.head.bias[1] += 1  # of the upper right one
    changed = net(x) != before
    assert changed[..., ::2, 1::2].all() and changed.sum() == changed[..., ::2, 1::2].numel()
    with pytest.raises(ValueError, match="give 2 widths with last=0"):
        DINOCell(ViT(16, 4, 2), (16, 8, 8), last=0)


def test_ready_is_the_same_network_in_the_type_of_the_hardware(monkeypatch):
    """In bfloat16, of which this processor may know nothing, maps differ by rounding alone;
    elsewhere by nothing."""
    torch.manual_seed(0)
    net, x = small_net().eval(), torch.rand(2, 3, 32, 40)
    with torch.inference_mode():
        for bf16, tolerance in ((False, 0), (True, 0.02)):
            monkeypatch.setattr(model, "has_bf16", lambda device, bf16=bf16: bf16)
            ready = copy.deepcopy(net).ready("cpu")
            assert ready.dtype == (torch.bfloat16 if bf16 else torch.float32)
            with ready.autocast():
                found = ready(x)
            assert found.dtype == torch.float32 and (found - net(x)).abs().max() <= tolerance
            assert not bf16 or not torch.equal(found, net(x))


@pytest.mark.smoke
@pytest.mark.parametrize("heads", [100, 4, 1])      # at a time, of the six
@pytest.mark.parametrize("amx", [True, False])
@pytest.mark.parametrize("tokens", [17, 32])        # filled up to 32, or as they are
def test_attention_on_a_cpu_is_attention_and_its_gradient(monkeypatch, heads, amx, tokens):
    monkeypatch.setattr(model, "PIECE", heads * 32 * 32 * 8)
    monkeypatch.setattr(model, "has_amx", lambda: amx)
    torch.manual_seed(0)
    qkv = torch.randn(2, tokens, 3, 3, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, tokens, 3, 8, dtype=torch.float64)
    angle = torch.randn(tokens, 4, dtype=torch.float64).repeat(1, 2)
    cos, sin = angle.cos(), angle.sin()

    def plain(qkv, cos, sin):
        q, k, v = (part.squeeze(2) for part in qkv.split(1, 2))              # (B, T, heads, head)
        q, k = model.rotate_by_rope(q, cos, sin), model.rotate_by_rope(k, cos, sin)
        return torch.nn.functional.scaled_dot_product_attention(
            *(part.transpose(1, 2) for part in (q, k, v))).transpose(1, 2)
    found = []
    for attend in (model.AttentionOnCPU.apply, plain):
        out = attend(qkv, cos, sin)
        found.append((out, *torch.autograd.grad((out * weight).sum(), qkv)))
    for ours, theirs in zip(*found):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_decoder_costs_less_than_the_backbone():
    rows = model.cost(DINOCell(), 224)
    total = sum(r[2] for r in rows)
    decoder = sum(r[2] for r in rows if r[0].startswith("decoder"))
    assert sum(r[1] for r in rows) == sum(p.numel() for p in DINOCell().parameters())
    assert decoder / total < 0.40
    tokens, D = 28 * 28 + 5, 384
    # products by hand, 2 FLOPs each
    blocks = 12 * (2 * tokens * 12 * D * D + 4 * tokens * tokens * D)
    assert math.isclose(next(r[2] for r in rows if "blocks" in r[0]), blocks, rel_tol=1e-6)


@pytest.mark.parametrize("H,W", [(8, 8), (8, 56), (40, 16), (64, 64)])
def test_any_multiple_of_the_patch(H, W):
    y = small_net().eval()(torch.rand(2, 3, H, W))
    assert y.shape == (2, 1, H, W) and y.min() >= 0 and y.max() <= 1


@pytest.mark.smoke
def test_other_sides_are_refused():
    with pytest.raises(ValueError, match="30 x 32 px.*multiples of the patch"):
        small_net()(torch.rand(1, 3, 30, 32))


def test_an_image_does_not_depend_on_its_batch():
    net = small_net()  # in training mode: no batch statistics anywhere
    x = torch.rand(3, 3, 32, 32)
    assert torch.allclose(net(x)[:1], net(x[:1]), atol=1e-6)


@pytest.mark.smoke
def test_gradient_reaches_everything_that_trains():
    net = small_net()
    net(torch.rand(2, 3, 32, 32)).square().sum().backward()
    for name, p in net.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and p.grad.abs().sum() > 0, name
    assert {n for n, p in net.named_parameters() if not p.requires_grad} == {
        "backbone.norm.weight", "backbone.norm.bias", "backbone.mask_token"}


def test_bf16_autocast_is_close():
    net, x = small_net().eval(), torch.rand(1, 3, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = net(x)
    assert low.dtype == torch.float32 and (low - net(x)).abs().max() < 0.05


def test_compiled_network_gives_the_same():
    net, x = small_net().eval(), torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        expected = net(x)
        names = list(net.state_dict())
        net.compile()
        assert torch.allclose(net(x), expected, atol=1e-5)
    assert list(net.state_dict()) == names


@pytest.mark.smoke
def test_rope_sees_relative_places_only():
    """The product of a rotated query and key depends on the difference of their places, not on the
    places."""
    vit = ViT(dim=64, depth=1, heads=1)
    cos, sin = model.rope_table(vit.periods, 6, 6, 0)
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 64)
    # (36, 64)
    q, k = (model.rotate_by_rope(part.expand(-1, 36, -1, -1), cos, sin)[0, :, 0] for part in (q, k))
    product = (q @ k.mT).view(6, 6, 6, 6)  # row, column of the query; row, column of the key
    assert torch.allclose(product[:5, :5, 0, 0], product[1:, 1:, 1, 1], atol=1e-4)
    assert not torch.allclose(product[0, 0, 0, 1], product[0, 0, 1, 0], atol=1e-3)


def test_a_size_head_is_kept_and_rests_in_float32(tmp_path):
    torch.manual_seed(0)
    net = small_net().eval()
    plain = net(torch.ones(1, 3, 32, 32) / 2)
    net.add_size_head()
    net.size.mean += 1
    model.save(net, tmp_path / "net.pt")
    back, seen = model.load(tmp_path / "net.pt"), torch.rand(2, 5, 8)
    with torch.inference_mode():
        assert torch.equal(net.size(seen), back.size(seen))
        assert torch.equal(back(torch.ones(1, 3, 32, 32) / 2), plain)
        assert torch.equal(back.ready("cpu").size(seen), net.size(seen))


def test_the_size_head_judges_each_zoom_in_the_same_way():
    """An image enlarged by one step shows at each zoom what the one before showed: the diameter is
    larger by a step, whatever the head has learnt."""
    torch.manual_seed(0)
    head = model.SizeHead().eval()
    head.fc2.weight.data[1], head.fc2.bias.data[1] = 0, 0          # each zoom counts the same
    alike = torch.rand(1, 1, 8).expand(1, 5, 8).clone()
    far, counts = head.votes(alike)
    assert torch.allclose(far[0, 1:4], far[0, 2].expand(3)) and torch.allclose(counts, counts[0, 0])
    assert torch.allclose(head(alike), far.mean())                  # steps up and down cancel out
    head.fc2.weight.data[0] = 0
    with torch.no_grad():
        head.fc2.bias[0] = 0.3
        assert float(head(alike)[0]) == pytest.approx(0.3)
        counts = torch.tensor([[0, 0, 0, 0, 1.0]])                  # the last zoom alone: two steps
        head.votes = lambda seen: (torch.full((1, 5), 0.3), counts)
        assert float(head(alike)[0]) == pytest.approx(0.3 - 2 * np.log(2))


# --------------------------------------------------------------------------------------------- ONNX

needs_onnx = pytest.mark.skipif(not all(map(importlib.util.find_spec,
                                            ("onnx", "onnxscript", "onnxruntime"))),
                                reason="pip install onnx onnxscript onnxruntime")


def onnx_net() -> model.DINOCell:
    """A network whose distances differ from pixel to pixel and from image to image, in a second."""
    torch.manual_seed(0)
    vit = model.ViT(dim=32, depth=3, heads=2, registers=2, layerscale=0.5)
    settings = model.Settings(tile=32, peak=0.4, diameter=21.0, low=2.0)
    net = model.DINOCell(vit, (16, 8), 0, settings, stem=1).eval()
    torch.nn.init.normal_(net.decoder.head.weight)
    return net


@needs_onnx
@pytest.mark.parametrize("half, tile, opset", [(False, None, 18), (True, 48, 20)])
def test_onnx_runtime_gives_what_pytorch_gives(tmp_path, half, tile, opset):
    import onnxruntime
    net, path = onnx_net(), tmp_path / "x.onnx"
    error = model.to_onnx(net, path, tile, opset, half)
    assert [p.name for p in tmp_path.iterdir()] == ["x.onnx"]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given, = session.get_inputs()
    side = tile or 32
    assert given.name == "image" and given.shape[1:] == [3, side,
                                                         side] and isinstance(given.shape[0], str)
    settings = json.loads(session.get_modelmeta().custom_metadata_map["dinocell"])
    assert (settings["tile"], settings["peak"], settings["diameter"],
            settings["low"]) == (side, 0.4, 21.0, 2.0)
    for batch in (1, 2, 5):
        x = torch.rand(batch, 3, side, side)
        with torch.inference_mode():
            expected = net(x).numpy()
        found, = session.run(None, {"image": x.numpy()})
        assert found.dtype == np.float32 and expected.std() > 0.02, "a constant would pass"
        np.testing.assert_allclose(found, expected, atol=1e-2 if half else 1e-4)
    assert error <= (1e-2 if half else 1e-4) and (error > 1e-5) == half


@needs_onnx
def test_onnx_of_a_plain_unet_in_halves(tmp_path):
    net = DINOCell(model.ConvNet(8, 3), (8, 8), 0, stem=1).eval()
    assert model.to_onnx(net, tmp_path / "x.onnx", 32, half=True) < 1e-2


@needs_onnx
def test_the_weights_that_ship_can_be_exported(tmp_path):
    assert model.to_onnx(model.load(ROOT / "final_models/dinocell_tiny.pt"),
                         tmp_path / "x.onnx") <= 1e-4


@needs_onnx
def test_a_file_that_differs_does_not_appear(tmp_path, monkeypatch):
    monkeypatch.setattr(model, "EXACT", -1.0)
    with pytest.raises(ValueError, match="differs from PyTorch"):
        model.to_onnx(onnx_net(), tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


def test_packages_that_are_missing_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError,
                       match="needs onnx and onnxscript; pip install onnx onnxscript onnxruntime"):
        model.to_onnx(onnx_net(), tmp_path / "x.onnx")


if __name__ == "__main__":
    network = transformers_network(SHAPE)
    picture = torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(1)).half().float()
    with torch.no_grad():
        after = network(picture).last_hidden_state
    matrices = {name: tensor.half().numpy() for name, tensor in network.state_dict().items()
                if "inv_freq" not in name}
    np.savez_compressed(RANDOM, config=json.dumps(network.config.to_dict()),
                        image=picture.numpy(), tokens=after.numpy(), **matrices)
    print(f"{RANDOM}: {RANDOM.stat().st_size:,} bytes", file=sys.stderr)
