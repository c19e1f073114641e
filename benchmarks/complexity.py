"""Cost table: parameters, FLOPs, time and peak memory of a forward pass, next to the published figures.

    python -m benchmarks.complexity [--sizes 128 256 512] [--device cpu] [--out results/complexity.csv]

For the shipped lite network and, at the paper's size, BaryIR on both backbones and the backbones alone.
FLOP = 2 MAC, counted by torch.utils.flop_counter (convolutions and matrix products), of the textbook form as
in published tables, and of ours, which multiplies attention and output projection once. Time is the median
of `--repeats` passes in float32, batch 1, inference mode. Each peak is measured in a process of its own, as
the growth of its memory during the pass (CPU, on Linux: resident set; CUDA: allocated tensors), weights not
included. The potentials exist in training only and are listed apart.
"""

import json
import platform
import re
import statistics
import subprocess
import sys
import time
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import torch
import yaml
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks import plain
from models.baryir import BaryIR
from models.potentials import Potentials
from utils.errors import InputError, one_line_errors
from utils.files import write_csv
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


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def gflop(net_of: Callable[[], BaryIR], size: int, textbook: bool = False) -> float:
    """GFLOP of a forward pass at size x size, ours or the textbook form's, without computing anything."""
    with torch.device("meta"):
        net, image = net_of(), torch.empty(1, 3, size, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        plain.network(net, image) if textbook else net(image)
    return counter.get_total_flops() / 1e9


def reset_peak_memory(device: str) -> int:
    """Forget the process's peak memory so far; returns the bytes in use now."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")               # Linux: VmHWM starts again at VmRSS
    return _status("VmRSS")


def peak_memory(device: str) -> int:
    """The process's peak memory in bytes since reset_peak_memory."""
    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else _status("VmHWM")


def _status(key: str) -> int:
    return 1024 * int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1))


def median_seconds(run: Callable[[], object], device: str, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(name: str, size: int, device: str, repeats: int) -> dict[str, float]:
    """Median seconds and peak memory in GB of forward passes; the process should have run nothing else."""
    torch.manual_seed(0)
    net = NETWORKS[name]().eval().to(device)
    image = torch.rand(1, 3, size, size, device=device)
    with torch.inference_mode():
        net(image[..., :16, :16])                               # libraries load their kernels
        before = reset_peak_memory(device)
        net(image)                                              # for the memory; the time is a warm pass's
        peak = peak_memory(device)
        seconds = median_seconds(lambda: net(image), device, repeats)
    return {"seconds": seconds, "gigabytes": (peak - before) / 1e9}


def measure_alone(name: str, size: int, device: str, repeats: int, threads: int) -> dict[str, float]:
    """`measure` in a new process."""
    command = [sys.executable, "-m", "benchmarks.complexity", "--alone", name, "--sizes", str(size),
               "--device", device, "--repeats", str(repeats), "--threads", str(threads)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["killed"])[-1]
        raise InputError(f"{name} at {size}x{size}: ended with status {result.returncode}: {reason}")
    return json.loads(result.stdout)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 512],
                        help="sides of the square images, multiples of 8")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--out", type=Path, default=Path("results/complexity.csv"), help="CSV file to write")
    parser.add_argument("--alone", choices=NETWORKS, help=SUPPRESS)
    flags = parser.parse_args()
    for size in flags.sizes:
        if size < 16 or size % 8:
            raise InputError(f"--sizes {size}, expected multiples of 8 from 16 on")
    if min(flags.repeats, flags.threads) < 1:
        raise InputError(f"--repeats {flags.repeats} --threads {flags.threads}, expected 1 or more")
    torch.set_num_threads(flags.threads)
    if flags.alone:
        print(json.dumps(measure(flags.alone, flags.sizes[0], flags.device, flags.repeats)))
        return

    published = yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))["sizes"]
    columns = ["network", "size", "parameters_million", "gflop_textbook", "gflop", "seconds", "gigabytes",
               "published_parameters_million", "published_gflop"]
    rows = []
    for name, net_of in NETWORKS.items():
        with torch.device("meta"):
            count = parameters(net_of()) / 1e6
        for size in tqdm(flags.sizes, name, leave=False):
            measured = measure_alone(name, size, flags.device, flags.repeats, flags.threads)
            known = published.get(name, ["", ""])
            rows.append([name, size, count, gflop(net_of, size, textbook=True), gflop(net_of, size),
                         measured["seconds"], measured["gigabytes"],
                         known[0], known[1] if size == 256 else ""])
    lines = [["network", "size", "parameters", "GFLOP", "ours", "seconds", "peak GB",
              "published parameters", "published GFLOP"]]
    for name, size, count, textbook, flop, seconds, gigabytes, known_count, known_flop in rows:
        lines.append([name, f"{size}x{size}", f"{count:.2f} M", f"{textbook:.1f}", f"{flop:.1f}",
                      f"{seconds:.3g}", f"{gigabytes:.2f}", f"{known_count} M" if known_count else "-",
                      str(known_flop or "-")])
    for other in (name for name in published if name not in NETWORKS):
        lines.append([other, "256x256", *["-"] * 5, f"{published[other][0]} M", str(published[other][1])])
    print(as_text(lines))
    for sources in (3, 5):
        with torch.device("meta"):
            count = parameters(Potentials(torch.full((sources,), 1 / sources, device="cpu"), 384))
        print(f"potentials for {sources} sources, in training only: {count / 1e6:.2f} M parameters")
    where = (torch.cuda.get_device_name(flags.device) if flags.device.startswith("cuda")
             else f"{platform.machine()} CPU, {flags.threads} threads")
    print(f"float32, batch 1, {where}, torch {torch.__version__}, {date.today()}; {flags.out}")
    write_csv(flags.out, [columns, *rows])


if __name__ == "__main__":
    with one_line_errors():
        main()
