"""export.py: the ONNX file gives PyTorch's distances in any batch, in float32 and float16; its mistakes are one line."""
import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import export
import model
from conftest import ROOT

needs_onnx = pytest.mark.skipif(not all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))),
                                reason="pip install onnx onnxscript onnxruntime")


def small() -> model.DINOCell:
    """A network whose distances differ from pixel to pixel and from image to image, in a second."""
    torch.manual_seed(0)
    vit = model.ViT(dim=32, depth=4, heads=2, registers=2, layerscale=0.5)
    net = model.DINOCell(vit, (16, 8, 8), 8, model.Settings(tile=32, peak=0.4, diameter=21.0, low=2.0)).eval()
    torch.nn.init.normal_(net.decoder.head.weight)
    return net


@needs_onnx
@pytest.mark.parametrize("half, tile, opset", [(False, None, 18), (True, 48, 20)])
def test_onnx_runtime_gives_what_pytorch_gives(tmp_path, half, tile, opset):
    import onnxruntime
    net, path = small(), tmp_path / "x.onnx"
    error = export.to_onnx(net, path, tile, opset, half)
    assert [p.name for p in tmp_path.iterdir()] == ["x.onnx"]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given, = session.get_inputs()
    side = tile or 32
    assert given.name == "image" and given.shape[1:] == [3, side, side] and isinstance(given.shape[0], str)
    settings = json.loads(session.get_modelmeta().custom_metadata_map["dinocell"])
    assert (settings["tile"], settings["peak"], settings["diameter"], settings["low"]) == (side, 0.4, 21.0, 2.0)
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
    assert export.to_onnx(model.load(ROOT / "final_models/dinocell_tiny.pt"), tmp_path / "x.onnx") <= 1e-4


@needs_onnx
def test_a_file_that_differs_does_not_appear(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "EXACT", -1.0)
    with pytest.raises(ValueError, match="differs from PyTorch"):
        export.to_onnx(small(), tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


def test_packages_that_are_missing_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs onnx and onnxscript; pip install onnx onnxscript onnxruntime"):
        export.to_onnx(small(), tmp_path / "x.onnx")


def test_the_verb_of_infer(tmp_path):
    """Help at once, mistakes in one line; the file itself where the packages are there."""
    def run(*arguments):
        done = subprocess.run([sys.executable, str(ROOT / "infer.py"), "export", *arguments], cwd=tmp_path,
                              capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr
    assert "opset=18" in run("--help")[1]
    for wrong, said in (("out=x.pt", "ends in .onnx"), ("opset=3", "18 to 23"), ("weights=gone", "no weights at"),
                        ("image.tif", "unexpected image.tif")):
        code, _, err = run(wrong)
        assert code == 1 and err.startswith("error: ") and err.count("\n") == 1 and said in err, err
    if importlib.util.find_spec("onnxruntime"):
        model.save(small(), tmp_path / "small.pt")
        code, out, err = run("weights=small.pt", "out=x.onnx")
        assert code == 0 and "of PyTorch" in out and err == "", err
        code, _, err = run("weights=small.pt", "out=no/x.onnx")
        assert code == 1 and err.startswith("error: no: no such folder") and err.count("\n") == 1, err
        code, _, err = run("weights=small.pt", "tile=33")
        assert code == 1 and "tile=33: expected a multiple of the patch" in err
