"""Cost table: parameters and FLOPs of a forward pass, next to the published figures.

    python -m benchmarks.complexity

For the shipped lite network and, at the paper's size, BaryIR on both backbones and the backbones alone; then
what the paper's training takes. FLOP = 2 MAC, counted by torch.utils.flop_counter (convolutions and matrix
products), of the textbook form as in published tables, and of ours, which multiplies attention and output
projection once. Published figures in brackets. Time and memory: benchmarks/speed.py.
"""

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
from utils.options import TrainOptions, load_options
from utils.tables import PUBLISHED, as_text

SIZES = (128, 256, 512)                 # pixels, sides of the images; published figures are of 256
LITE = Path(__file__).parent.parent / "options/train_lite.yml"
NETWORKS = {                                                    # by their names in published.yml
    "lite": partial(BaryIR, **vars(load_options(TrainOptions, str(LITE)).network)),
    "BaryIR": BaryIR, "BaryIR (PromptIR)": partial(BaryIR, backbone="promptir"),
    "Restormer": partial(BaryIR, barycenter=False),
    "PromptIR": partial(BaryIR, backbone="promptir", barycenter=False),
}


def parameters(net_of: Callable[[], nn.Module]) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in net_of().parameters())


def gflop(net_of: Callable[[], BaryIR], size: int, textbook: bool = False, to_b: bool = False) -> float:
    """GFLOP of a forward pass at size x size, ours or the textbook form's; to_b: of ours as far as b."""
    with torch.device("meta"):                                  # nothing is computed
        net, image = net_of(), torch.empty(1, 3, size, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        if to_b:
            net.transport(net.encode(image)[0])
        else:
            plain.network(net, image) if textbook else net(image)
    return counter.get_total_flops() / 1e9


def kept_bytes(recompute: bool) -> int:
    """Bytes of the maps of BaryIR that the backward pass of a patch of 128x128 needs, in float32."""
    with torch.device("meta"):
        net, image = BaryIR().to(memory_format=torch.channels_last), torch.empty(1, 3, 128, 128)
    if recompute:
        net.recompute_blocks()
    kept = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = net(image)                                    # which keeps the storages alive
    for parameter in net.parameters():
        kept.pop(parameter.untyped_storage()._cdata, None)
    return sum(kept.values()) if outputs else 0


def main() -> None:
    published = yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))["sizes"]
    cells = [["network", "million parameters", f"GFLOP at {SIZES[1]}, textbook form",
              *(f"ours at {size}" for size in SIZES)]]
    for name, net_of in NETWORKS.items():
        count, flop = (f" ({figure})" for figure in published.get(name, ["-", "-"]))
        cells.append([name, f"{parameters(net_of) / 1e6:.2f}{count}",
                      f"{gflop(net_of, SIZES[1], textbook=True):.1f}{flop}",
                      *(f"{gflop(net_of, size):.1f}" for size in SIZES)])
    print(as_text(cells))
    of_step = 3 * gflop(BaryIR, 128) + gflop(BaryIR, 128, to_b=True)    # backward: twice the forward
    whole, recomputed = (kept_bytes(recompute) / 1e9 for recompute in (False, True))
    print(f"BaryIR, training step, for each patch of 128x128: {of_step:.1f} GFLOP, {whole:.2f} GB for the "
          f"backward pass, {recomputed:.2f} with recompute")
    for file, samples in (("train_3d.yml", 221_295), ("train_5d.yml", 367_650)):
        epochs = load_options(TrainOptions, str(LITE.with_name(file))).epochs
        flop = samples * epochs * of_step * 1e9
        print(f"{file}: {epochs:g} epochs of {samples:,} patches: {flop:.2g} FLOP")
    print(f"torch {torch.__version__}, {date.today()}")


if __name__ == "__main__":
    main()
