"""Time of BaryIR against its textbook form (benchmarks/plain.py): forward, steps, data, large images.

    python -m benchmarks.speed                                  the paper's size; 90 minutes on two CPU cores

Each figure is the median of its repetitions, each in a process of its own, the two sides in turn; a
repetition is the median of three passes (inference of large images: one pass) after one that is not
measured. Ours is what train.py and test.py run: channels-last layout, on a CPU strips in inference, freed
memory kept in training; with --dtype bfloat16 autocast. The plain form is float32 (TF32 on CUDA) in the
default layout. Much of its time on a CPU is that of memory which the system hands out anew, page by page.

    forward         256x256, batch 1, without gradients
    step            batch 3, 128x128, five sources: forward, losses, backward, RMSprop of both sides;
                    step_recompute: with option recompute
    loading         480 pairs of an option file's sources by train.py's loader with two workers, decoded anew
                    (plain) or cached (ours)
    inference       one image of each of --sizes; the plain form up to 512, where its memory allows
"""

import platform
import re
import statistics
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks import plain
from data.cache import decode_all
from data.datasets import TrainingSet, open_sets
from data.sampler import EpochSampler, make_loader
from losses.barycenter import sample_weights
from models.baryir import BaryIR
from models.potentials import Potentials
from train import Batch, joint_steps, make_sides
from utils.errors import one_line_errors
from utils.evaluation import restore
from utils.files import write_csv
from utils.graphs import Recorded
from utils.memory import keep_freed_memory
from utils.options import TrainOptions, load_options
from utils.tables import as_text

WHAT = ("forward", "step", "step_recompute", "loading", "inference")
SOURCES, BATCH = 5, 3                                           # of the steps
PASSES = 3
PAIRS, WORKERS = 480, 2                                         # of the loading


def forward(side: str, what: str, size: int, flags: Namespace) -> Callable[[], object]:
    net = BaryIR().eval().to(flags.device)
    image = torch.rand(1, 3, size, size, device=flags.device)
    if side == "plain":
        return torch.inference_mode()(partial(plain.network, net, image))
    return partial(restore, net.to(memory_format=torch.channels_last), image, "auto", flags.dtype)


def training(side: str, what: str, size: int, flags: Namespace) -> Callable[[], object]:
    """The step of one batch."""
    device = torch.device(flags.device)
    lambdas = torch.full((SOURCES,), 1 / SOURCES, device=device)
    net, potentials = BaryIR().to(device), Potentials(lambdas).to(device)
    degraded, clean = torch.rand(2, BATCH, 3, size, size, device=device)
    source = torch.arange(BATCH, device=device) % SOURCES
    weights = sample_weights(source, lambdas, lambdas)
    if side == "plain":
        optimizers = [torch.optim.RMSprop(m.parameters(), 1e-5) for m in (net, potentials)]
        return partial(plain.training_step, net, potentials, optimizers, degraded, clean, source, weights)
    keep_freed_memory(device)
    net = net.to(memory_format=torch.channels_last)
    if what == "step_recompute":
        net.recompute_blocks()
    options = TrainOptions(name="speed", sources=[], steps=1, precision=flags.dtype,
                           learning_rate=1e-5, potential_learning_rate=1e-5)
    recorded = device.type == "cuda"
    sides = make_sides(net, potentials, options, recorded)
    net.requires_grad_(False)
    potentials.requires_grad_(False)
    step = partial(joint_steps, net, potentials, sides, options)
    batch = Batch(degraded, clean, source, weights, torch.zeros((), device=device))
    return partial(Recorded(step) if recorded else step, batch)


def loading(side: str, what: str, size: int, flags: Namespace) -> Callable[[], object]:
    """PAIRS training samples in batches of 4 by train.py's loader."""
    options = load_options(TrainOptions, flags.opt, flags.set)
    sources = open_sets(options.sources, options, "sources")
    cache = None if side == "plain" else decode_all(sources)
    samples = TrainingSet(sources, 0, cache, options.clean_share, options.camera_share)
    sampler = EpochSampler([len(samples)], [(0, 4, size)], 2**40, seed=0)
    batches = iter(make_loader(samples, sampler, WORKERS, torch.device("cpu")))
    return lambda: [next(batches) for _ in range(PAIRS // 4)]


def measure(side: str, what: str, size: int, flags: Namespace) -> tuple[float, float]:
    """Median seconds of the passes after the first; peak of memory in GB: resident, or of tensors on CUDA."""
    torch.manual_seed(0)
    torch.set_num_threads(flags.threads)
    on_cuda, times = flags.device.startswith("cuda"), []
    if on_cuda:
        torch.cuda.set_device(torch.device(flags.device).index or 0)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    make = {"forward": forward, "inference": forward, "loading": loading}.get(what, training)
    run = make(side, what, size, flags)
    run()
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")       # Linux: VmHWM starts again
    for _ in range(20 if on_cuda else 1 if what == "inference" else PASSES):
        start = time.perf_counter()
        run()
        if on_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    if on_cuda:
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))
    return statistics.median(times), peak / 1e9


def measure_alone(side: str, what: str, size: int, flags: Namespace) -> tuple[float, float]:
    """`measure` in a process of its own; on CUDA, whose allocator no earlier run disturbs, in this one."""
    if flags.device.startswith("cuda"):
        return measure(side, what, size, flags)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(measure, side, what, size, flags).result()


def compare(what: str, size: int, flags: Namespace) -> list:
    """A row of the table: both sides in turn, medians; "" where the plain form is too large."""
    sides = ["plain", "ours"] if what != "inference" or size <= 512 else ["ours"]
    runs = [[measure_alone(side, what, size, flags) for side in sides] for _ in range(flags.repeats)]
    medians = [[*map(statistics.median, zip(*of_side, strict=True))] for of_side in zip(*runs, strict=True)]
    (plain_s, plain_gb), (ours_s, ours_gb) = medians if len(sides) == 2 else [["", ""], *medians]
    ratio = plain_s / ours_s if plain_s else ""
    return [what, size, flags.device, flags.dtype, plain_s, ours_s, ratio, plain_gb, ours_gb]


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", choices=WHAT, default=WHAT)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 512, 1024, 2048],
                        help="of the inference, multiples of 8")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--opt", default="options/train_tiny.yml", metavar="FILE", help="of the loading")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="options")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of our side")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--out", type=Path, default=Path("results/speed.csv"))
    flags = parser.parse_args()
    header = ["what", "size", "device", "dtype", "plain_s", "ours_s", "ratio", "plain_gb", "ours_gb"]
    rows = []
    for what in flags.what:
        for size in flags.sizes if what == "inference" else [256 if what == "forward" else 128]:
            rows.append(compare(what, size, flags))
            write_csv(flags.out, [header, *rows])
            print(*rows[-1], file=sys.stderr, flush=True)
    print(as_text([header, *([f"{value:.3g}" if isinstance(value, float) else str(value) for value in row]
                             for row in rows)]))
    where = (torch.cuda.get_device_name(flags.device) if flags.device.startswith("cuda")
             else f"{platform.machine()} CPU, {flags.threads} threads")
    print(f"BaryIR, {flags.dtype}, batch {BATCH} in the steps, {where}, "
          f"torch {torch.__version__}, {date.today()}; {flags.out}")


if __name__ == "__main__":
    with one_line_errors():
        main()
