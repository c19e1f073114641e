"""Export a checkpoint's network to ONNX, for programmes that do not have PyTorch.

    pip install onnx onnxscript onnxruntime
    python -m utils.export_onnx checkpoints/baryir_lite.pth baryir_lite.onnx

Input `image` and output `restored` are float32 [B,3,H,W] of pixels in [0, 1], the output not clipped, of any
B, H and W: the padding is inside. The file is kept if ONNX Runtime restores as PyTorch does, at three sizes.
"""

import logging
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch
from torch import Tensor, nn

from models.baryir import BaryIR
from utils.checkpoint import load_network
from utils.errors import InputError, one_line_errors
from utils.files import write_atomically

SIZES = (64, 64), (101, 83), (37, 203)          # height, width that are compared
TOLERANCE = 1e-4                                # of 1; rounding is some 1e-6


class Restoring(nn.Sequential):
    """A network that gives the restored image alone."""

    def forward(self, image: Tensor) -> Tensor:
        return self[0](image)[0]


def export(net: BaryIR, path: Path) -> None:
    """Write a network on the CPU, in eval mode, to a file, and print by how much it differs from PyTorch.

    InputError where a package is absent, or where the two differ by more than TOLERANCE.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch.onnx needs it)
    except ImportError as error:
        raise InputError(f"{error}, expected after: pip install onnx onnxscript onnxruntime") from None
    logging.getLogger("onnxscript").setLevel(logging.ERROR)     # it tells of each constant that it leaves
    images = [torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)) for size in SIZES]
    with torch.inference_mode():
        expected = [net(image)[0].numpy() for image in images]
    free = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    program = torch.onnx.export(Restoring(net), (torch.rand(2, 3, 40, 56),), input_names=["image"],
                                output_names=["restored"], dynamic_shapes={"image": free}, verbose=False)

    def compare(file: str) -> None:
        session = onnxruntime.InferenceSession(file)
        restored = [session.run(None, {"image": image.numpy()})[0] for image in images]
        difference = max(float(abs(a - b).max()) for a, b in zip(restored, expected, strict=True))
        if not difference < TOLERANCE:
            raise InputError(f"{path}: ONNX Runtime and PyTorch differ by {difference:.1e}, "
                             f"expected less than {TOLERANCE}")
        print(f"{path}: within {difference:.1e} of PyTorch at heights and widths {SIZES}, in ONNX Runtime")

    write_atomically(path, program.save, compare)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="weights of this repository")
    parser.add_argument("output", type=Path, metavar="OUT.onnx", help="file to write")
    flags = parser.parse_args()
    export(load_network(flags.checkpoint), flags.output)


if __name__ == "__main__":
    with one_line_errors():
        main()
