"""Compare the paper-size network with reference outputs of the authors' network.

    python -m benchmarks.golden PATH/official_forward.npz [--checkpoint CONVERTED.pth]

The file holds the arrays restored, z and b for the input `np.random.default_rng(0).random((2,3,64,96))`, all parameters
filled by `utils.official.fill_reference`; or those of a checkpoint that utils.convert_official made of a file so filled.
Exits non-zero if a relative error reaches 1e-4.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from models.baryir import BaryIR
from utils.checkpoint import load_network
from utils.errors import InputError, one_line_errors
from utils.official import fill_reference


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
        outputs = dict(zip(("restored", "z", "b"), net(degraded)))
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
