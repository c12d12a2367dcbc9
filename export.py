"""The network as one ONNX file, for ONNX Runtime, TensorRT, OpenVINO and others, without Python or PyTorch.

    python infer.py export [out=dinocell.onnx] [weights=FILE] [kind=phase] [tile=PX] [opset=18] [half=true]

    image     (batch, 3, tile, tile) float32 in [0, 1], any batch, as images.normalise and images.to_rgb make it
    distance  (batch, 1, tile, tile) float32 in [0, 1], what watershed.watershed takes

Subtracting the mean is part of the network; tiling, blending and the watershed are not (segment.py). What these
need to know, such as percentiles, zoom, peak, fill and diameter, is JSON in the file's metadata under "dinocell". Where weights
have several decoders (kinds.py) kind= chooses one, with its setting of the watershed; else it is the one for all kinds.
half=true computes in float16: half the size, for GPUs. Where onnxruntime is installed, the file is compared with PyTorch
before it appears.
"""
from __future__ import annotations

import copy
import importlib.util
import json
import logging
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

EXACT, HALF = 1e-4, 1e-2         # largest difference from PyTorch that passes, of distances in [0, 1]


@dataclass(frozen=True)
class Config:
    out: str = "dinocell.onnx"      # the file
    weights: str = "default"        # file, or the name of one in final_models/ (tiny)
    kind: str | None = None         # of images, whose decoder is exported (a part of its name); null: the decoder for all
    tile: int | None = None         # px, side of the tiles the file takes; null: as trained
    opset: int = 18                 # version of ONNX's operators
    half: bool = False              # compute in float16

    def __post_init__(self):
        if not self.out.endswith(".onnx"):
            raise ValueError(f"out={self.out}: expected a file name that ends in .onnx")
        if not 18 <= self.opset <= 23:
            raise ValueError(f"opset={self.opset}: expected 18 to 23")


def to_onnx(net, path: str | Path, tile: int | None = None, opset: int = 18,
            half: bool = False, kind: str | None = None) -> float | None:
    """Write a model.DINOCell; returns the largest difference from PyTorch, None without onnxruntime."""
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{path}: export needs {' and '.join(missing)}; "
                         "pip install onnx onnxscript onnxruntime")
    import onnx
    import torch
    import kinds
    from runs import replacing
    net, settings = kinds.suited(net, kinds.named(net, kind) if kind else kinds.SHARED)
    net = copy.deepcopy(net).cpu().float().eval()
    net.drop_decoders()                                            # but this one
    tile, patch = tile or net.settings.tile, net.backbone.patch
    if tile < 1 or tile % patch:
        raise ValueError(f"tile={tile}: expected a multiple of the patch, {patch} px")

    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = copy.deepcopy(net)
            if half:
                self.net.half()
                self.net.backbone.periods = net.backbone.periods.clone()     # angles multiply errors

        def forward(self, image):
            return self.net(image.half() if half else image)

    images = torch.rand(3, 3, tile, tile, generator=torch.Generator().manual_seed(0))
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")                            # PyTorch's, about its own insides
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(Whole(), (images,), None, input_names=["image"], output_names=["distance"],
                                    dynamic_shapes=({0: torch.export.Dim("batch")},), opset_version=opset,
                                    dynamo=True, verbose=False)
        proto = program.model_proto
        onnx.helper.set_model_props(proto, {"dinocell": json.dumps(asdict(settings) | {"tile": tile, "kinds": {}})})
        onnx.checker.check_model(proto)
        temporary.write_bytes(proto.SerializeToString())
        if importlib.util.find_spec("onnxruntime") is None:
            return None
        import onnxruntime
        session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])
        with torch.inference_mode():
            expected = net(images).numpy()
        error = max(abs(session.run(None, {"image": images[:n].numpy()})[0] - expected[:n]).max()
                    for n in (1, 3))
        limit = HALF if half else EXACT
        if not error <= limit:
            raise ValueError(f"{path}: differs from PyTorch by {error:.1e}, expected {limit:.0e} at most; "
                             f"not written, try another opset= or half=false")
        return float(error)
