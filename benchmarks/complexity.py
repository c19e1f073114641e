"""Cost table: parameters and FLOPs of a forward pass, next to the published figures.

    python -m benchmarks.complexity [--sizes 128 256 512]

For the shipped lite network and, at the paper's size, BaryIR on both backbones and the backbones alone.
FLOP = 2 MAC, counted by torch.utils.flop_counter (convolutions and matrix products), of the textbook form as
in published tables, and of ours, which multiplies attention and output projection once. The potentials exist
in training only and are listed apart. Time and memory: benchmarks/speed.py.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import torch
import yaml
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import plain
from models.baryir import BaryIR
from models.potentials import Potentials
from utils.errors import InputError, one_line_errors
from utils.options import TrainOptions, load_options
from utils.tables import PUBLISHED, as_text

LITE = Path(__file__).parent.parent / "options/train_lite.yml"


def lite() -> BaryIR:
    return BaryIR(**vars(load_options(TrainOptions, str(LITE)).network))


NETWORKS = {                                                    # by their names in published.yml
    "lite": lite, "BaryIR": BaryIR, "BaryIR (PromptIR)": partial(BaryIR, backbone="promptir"),
    "Restormer": partial(BaryIR, barycenter=False),
    "PromptIR": partial(BaryIR, backbone="promptir", barycenter=False),
}


def parameters(net_of: Callable[[], nn.Module]) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in net_of().parameters())


def gflop(net_of: Callable[[], BaryIR], size: int, textbook: bool = False) -> float:
    """GFLOP of a forward pass at size x size, ours or the textbook form's, without computing anything."""
    with torch.device("meta"):
        net, image = net_of(), torch.empty(1, 3, size, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        plain.network(net, image) if textbook else net(image)
    return counter.get_total_flops() / 1e9


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 512],
                        help="sides of the square images, multiples of 8")
    flags = parser.parse_args()
    if any(size < 16 or size % 8 for size in flags.sizes):
        raise InputError(f"--sizes {flags.sizes}, expected multiples of 8 from 16 on")
    published = yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))["sizes"]
    lines = [["network", "size", "million parameters", "GFLOP, textbook", "GFLOP, ours",
              "published parameters", "published GFLOP"]]
    for name, net_of in NETWORKS.items():
        count, (known_count, known_flop) = parameters(net_of) / 1e6, published.get(name, ["-", "-"])
        for size in flags.sizes:
            flops = (f"{gflop(net_of, size, textbook):.1f}" for textbook in (True, False))
            lines.append([name, f"{size}x{size}", f"{count:.2f}", *flops, str(known_count),
                          str(known_flop if size == 256 else "-")])
    lines += [[name, "256x256", "-", "-", "-", str(known_count), str(known_flop)]
              for name, (known_count, known_flop) in published.items() if name not in NETWORKS]
    for sources in (3, 5):
        count = parameters(lambda k=sources: Potentials(torch.full((k,), 1 / k, device="cpu"), 384)) / 1e6
        lines.append([f"potentials of {sources} sources, training only", "", f"{count:.2f}", *[""] * 4])
    print(as_text(lines))
    print(f"torch {torch.__version__}, {date.today()}")


if __name__ == "__main__":
    with one_line_errors():
        main()
