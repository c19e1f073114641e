"""Compare the paper-size network with reference outputs of the authors' network.

    python -m benchmarks.golden PATH/official_forward.npz [--checkpoint CONVERTED.pth]

The file holds the arrays restored, z and b for the input `np.random.default_rng(0).random((2,3,64,96))`, all
parameters filled by `fill_reference`; a checkpoint is what utils.convert_official made of a file so filled.
Exits non-zero if a relative error reaches 1e-4.
"""

import argparse
import zlib
from pathlib import Path

import numpy as np
import torch

from models.baryir import BaryIR
from utils.checkpoint import load_network
from utils.convert_official import official_name
from utils.errors import InputError, one_line_errors


@torch.no_grad()
def fill_reference(net: BaryIR) -> None:
    """Fill every parameter by the authors' name of it, with the rule by which their network was measured.

    v = N(0, 1) seeded by the CRC-32 of the name; 1 + 0.1 v for temperatures and 1-d weights, 0.1 v for other
    1-d parameters, else v / sqrt(fan-in).
    """
    for name, parameter in net.named_parameters():
        name = official_name(name)
        v = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tuple(parameter.shape))
        if name.endswith(".temperature") or (v.ndim == 1 and name.endswith(".weight")):
            v = 1 + 0.1 * v
        elif v.ndim == 1:
            v = 0.1 * v
        else:
            v = v / np.sqrt(np.prod(v.shape[1:]))
        parameter.copy_(torch.from_numpy(v.astype(np.float32)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="official_forward.npz")
    parser.add_argument("--checkpoint", type=Path, help="take the parameters from here")
    flags = parser.parse_args()
    path = flags.path
    if not path.is_file():
        raise InputError(f"{path}: no such file, expected official_forward.npz")
    try:
        golden = dict(np.load(path, allow_pickle=False))
    except Exception:                                           # broken files raise nearly anything
        golden = {}
    if not {"restored", "z", "b"} <= golden.keys():
        raise InputError(f"{path}: expected official_forward.npz with the arrays restored, z and b")
    if flags.checkpoint:
        net = load_network(flags.checkpoint)
    else:
        net = BaryIR().eval()
        fill_reference(net)
    degraded = torch.from_numpy(np.random.default_rng(0).random((2, 3, 64, 96)).astype(np.float32))
    with torch.no_grad():
        outputs = dict(zip(("restored", "z", "b"), net(degraded), strict=True))
    print(f"{sum(p.numel() for p in net.parameters()):,} parameters")
    errors = {}
    for name, ours in outputs.items():
        theirs = golden[name]
        errors[name] = np.abs(ours.numpy() - theirs).max() / np.abs(theirs).max()
        print(f"{name:8s} {theirs.shape}  max |ours - theirs| / max |theirs| = {errors[name]:.1e}")
    if max(errors.values()) >= 1e-4:
        raise SystemExit("a relative error is 1e-4 or more: this is not the authors' network")


if __name__ == "__main__":
    with one_line_errors():
        main()
