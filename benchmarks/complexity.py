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


def of_step(net_of: Callable[[], BaryIR], size: int) -> float:
    """GFLOP of a training step (scheme joint) for a patch: forward, backward, the potential step's b."""
    with torch.device("meta"):
        net, image = net_of(), torch.empty(1, 3, size, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.transport(net.encode(image)[0])
    return 3 * gflop(net_of, size) + counter.get_total_flops() / 1e9        # backward: twice the forward


def kept_bytes(net_of: Callable[[], BaryIR], size: int, recompute: bool) -> int:
    """Bytes of the maps that the backward pass of a patch needs, in float32."""
    with torch.device("meta"):
        net, image = net_of().to(memory_format=torch.channels_last), torch.empty(1, 3, size, size)
    if recompute:
        net.recompute_blocks()
    own, kept = {p.untyped_storage()._cdata for p in net.parameters()}, {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = net(image)                                    # which keeps the storages alive
    return sum(kept.values()) if outputs else 0


def print_trainings() -> None:
    """A step's operations and memory for each patch, and whole trainings'."""
    cells = [["network", "patch", "GFLOP a step", "GB for backward", "with recompute"]]
    for name, size in (("BaryIR", 128), ("BaryIR (PromptIR)", 128), ("lite", 128), ("lite", 64)):
        memory = (f"{kept_bytes(NETWORKS[name], size, recompute) / 1e9:.2f}" for recompute in (False, True))
        cells.append([name, f"{size}x{size}", f"{of_step(NETWORKS[name], size):.1f}", *memory])
    print(as_text(cells))
    for file, samples in (("train_3d.yml", 221_295), ("train_5d.yml", 367_650)):
        epochs = load_options(TrainOptions, str(LITE.with_name(file))).epochs
        flop = samples * epochs * of_step(BaryIR, 128) * 1e9
        print(f"{file}: {epochs:g} epochs of {samples:,} patches: {flop:.2g} FLOP")


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
    print_trainings()
    print(f"torch {torch.__version__}, {date.today()}")


if __name__ == "__main__":
    with one_line_errors():
        main()
