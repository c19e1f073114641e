"""Compare the paper-size networks with reference outputs of the authors' and of the public ones.

    python -m benchmarks.golden PATH/FILE.npz

The files, official_forward.npz and baselines_forward.npz, hold the arrays restored, z and b of BaryIR, and
the images restormer and promptir of the backbones, for the input
`np.random.default_rng(0).random((2,3,64,96))`, all parameters filled by `fill_reference`. Exits non-zero if a
relative error reaches 1e-4.
"""

import argparse
import zlib
from pathlib import Path

import numpy as np
import torch

from models.baryir import BaryIR
from utils.convert_official import official_name, official_shape
from utils.errors import InputError, one_line_errors

NETWORKS = {"restored z b": {}, "restormer": {"barycenter": False},             # by the arrays that they give
            "promptir": {"backbone": "promptir", "barycenter": False}}


@torch.no_grad()
def fill_reference(net: BaryIR) -> None:
    """Fill every parameter by its public name, with the rule by which the public networks were measured.

    v = N(0, 1) seeded by the CRC-32 of the name; 1 + 0.1 v for temperatures and 1-d weights, 0.1 v for other
    1-d parameters, else v / sqrt(fan-in).
    """
    for name, parameter in net.named_parameters():
        name = official_name(name)
        shape = official_shape(name, parameter.shape)
        v = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
        if name.endswith(".temperature") or (v.ndim == 1 and name.endswith(".weight")):
            v = 1 + 0.1 * v
        elif v.ndim == 1:
            v = 0.1 * v
        else:
            v = v / np.sqrt(np.prod(v.shape[1:]))
        parameter.copy_(torch.from_numpy(v.astype(np.float32)).reshape(parameter.shape))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="official_forward.npz or baselines_forward.npz")
    flags = parser.parse_args()
    golden = dict(np.load(flags.path, allow_pickle=False))
    degraded = torch.from_numpy(np.random.default_rng(0).random((2, 3, 64, 96)).astype(np.float32))
    errors = []
    for names, network in NETWORKS.items():
        if not set(names.split()) <= golden.keys():
            continue
        net = BaryIR(**network).eval()
        fill_reference(net)
        outputs = dict(zip(names.split(), net(degraded), strict=False))         # of a backbone the image
        print(f"{sum(p.numel() for p in net.parameters()):,} parameters")
        for name, ours in outputs.items():
            theirs = golden[name]
            errors.append(np.abs(ours.numpy() - theirs).max() / np.abs(theirs).max())
            print(f"{name:9s} {theirs.shape}  max |ours - theirs| / max |theirs| = {errors[-1]:.1e}")
    if not errors:
        raise InputError(f"{flags.path}: expected the arrays {', or '.join(NETWORKS)}")
    if max(errors) >= 1e-4:
        raise SystemExit("a relative error is 1e-4 or more: this is not the same network")


if __name__ == "__main__":
    with one_line_errors():
        main()
