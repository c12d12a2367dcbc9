"""model.py against DINOv3's own outputs (../shared/fixtures), and its closed forms."""
import copy
import importlib.util
import json
import math

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


def test_training_checkpoint_is_the_teachers_backbone(shared, tmp_path):
    weights = torch.load(shared / "fixtures/dinov3_small.pt", weights_only=True)["state_dict"]
    torch.save(weights, tmp_path / "flat.pth")
    nested = {"backbone." + k: v
              for k, v in weights.items()} | {"dino_head.mlp.0.weight": torch.zeros(3)}
    torch.save({"teacher": nested, "iteration": 7}, tmp_path / "training.pth")
    a, b = model.load_backbone(tmp_path / "flat.pth"), model.load_backbone(tmp_path
                                                                           / "training.pth")
    assert all(torch.equal(a.state_dict()[k], v) for k, v in b.state_dict().items())


def test_uninitialised_bias_mask_does_no_harm(shared, tmp_path):
    weights = torch.load(shared / "fixtures/dinov3_small.pt", weights_only=True)["state_dict"]
    torch.save(weights, tmp_path / "a.pth")
    torch.save({k: torch.full_like(v, math.nan) if k.endswith("bias_mask") else v
                for k, v in weights.items()},
               tmp_path / "b.pth")
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(model.load_backbone(tmp_path / "a.pth")(x).cls,
                       model.load_backbone(tmp_path / "b.pth")(x).cls)


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
    assert "no vision transformer" in said({"a": torch.zeros(1)})
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
def test_attention_by_products_has_the_gradient_of_attention():
    torch.manual_seed(0)
    parts = [torch.randn(2, 3, 17, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weight = torch.randn(2, 3, 17, 8, dtype=torch.float64)
    found = []
    for attend in (model.AttentionByProducts.apply,
                   torch.nn.functional.scaled_dot_product_attention):
        out = attend(*parts)
        found.append((out, *torch.autograd.grad((out * weight).sum(), parts)))
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
    q, k = (model.rotate(part.expand(-1, 36, -1, -1), cos, sin)[0, :, 0] for part in (q, k))
    product = (q @ k.mT).view(6, 6, 6, 6)  # row, column of the query; row, column of the key
    assert torch.allclose(product[:5, :5, 0, 0], product[1:, 1:, 1, 1], atol=1e-4)
    assert not torch.allclose(product[0, 0, 0, 1], product[0, 0, 1, 0], atol=1e-3)


def test_rope_jitter_only_trains():
    vit = small_vit(rope_jitter=2.0)
    x = torch.rand(1, 3, 32, 32)
    assert not torch.equal(vit(x).cls, vit(x).cls)
    vit.eval()
    assert torch.equal(vit(x).cls, vit(x).cls)


def test_a_size_head_is_kept_and_each_token_counts_by_its_own_word(tmp_path):
    torch.manual_seed(0)
    net = small_net().eval()
    plain = net(torch.ones(1, 3, 32, 32) / 2)
    net.add_size_head()
    model.save(net, tmp_path / "net.pt")
    back, x = model.load(tmp_path / "net.pt"), torch.rand(2, 3, 32, 40)
    with torch.inference_mode():
        assert all(torch.equal(a, b) for a, b in zip(net.log_diameters(x), back.log_diameters(x)))
        assert torch.equal(back(torch.ones(1, 3, 32, 32) / 2), plain)
        head, tokens = back.size, torch.randn(1, 5, back.backbone.dim)
        head.fc2.weight.zero_()
        head.fc2.bias.copy_(torch.tensor([3.0, -1.0, 0.0]))
        assert [v.item() for v in head(tokens)] == pytest.approx([3, -1])


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
