"""Time of BaryIR against its textbook form (benchmarks/plain.py): forward, steps, data, large images.

    python -m benchmarks.speed                                  the paper's size; 90 minutes on two CPU cores
    python -m benchmarks.speed --what forward --sizes 128

Each figure is the median of its repetitions, each in a process of its own, the two sides in turn; a
repetition is the median of three passes (inference of large images: one pass) after one that is not
measured, in which memory is used for the first time. Ours is what train.py and test.py run: channels-last
layout, on a CPU strips in inference, freed memory kept in training and with compile; with --dtype bfloat16
autocast. The plain form is float32 (TF32 on CUDA) in the default layout. Of forward passes two floors are
printed, too, in both precisions: the operations at the rate of a large matrix product, the bytes of the
feature maps at that of a large copy, both measured at the end of the run. Much of the plain form's time on a
CPU is that of memory which the system hands out anew, page by page; its share varies, --keep removes it.

    forward         256x256, batch 1, without gradients; forward_compiled: torch.compile, any size, whole
    map_step        batch 3, 128x128, five sources: forward, losses, backward, RMSprop
    potential_step  the same batch
    step            both; step_compiled: with torch.compile; step_recompute: with option recompute: cheap
    loading         480 pairs by train.py's loader, decoded anew (plain) or cached (ours): of bundled
                    photographs, or of an option file (--opt options/train_lite.yml --set root=PATH)
    inference       one image of each of --sizes; the plain form up to 512, where its memory allows
"""

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import plain
from benchmarks.complexity import NETWORKS, gflop
from models.baryir import BaryIR
from models.potentials import Potentials
from utils.errors import InputError, one_line_errors
from utils.files import write_csv
from utils.memory import keep_freed_memory
from utils.tables import as_text

WHAT = ("forward", "forward_compiled", "map_step", "potential_step", "step", "step_compiled",
        "step_recompute", "loading", "inference")
FORWARD = ("forward", "forward_compiled", "inference")
SIZES = {"forward": 256, "forward_compiled": 256, "loading": 128}               # the steps: 128
SOURCES = 5
PASSES = 3
PAIRS = 480                                                     # that `loading` loads in a pass


def forward(side: str, what: str, size: int, flags: argparse.Namespace) -> Callable[[], None]:
    from models.baryir import compile_stages
    from utils.evaluation import restore

    device, dtype = flags.device, flags.dtype
    net, image = NETWORKS[flags.network]().eval().to(device), torch.rand(1, 3, size, size, device=device)
    if side == "plain":
        return torch.inference_mode()(lambda: plain.network(net, image))
    net = net.to(memory_format=torch.channels_last)
    if what == "forward_compiled":
        if device == "cpu":
            keep_freed_memory(torch.device(device))
        compile_stages(net, dynamic=True)
    strip = 0 if what == "forward_compiled" else "auto"
    return lambda: restore(net, image, strip, dtype)


def training(side: str, what: str, size: int, device: str, dtype: str, batch: int) -> Callable[[], None]:
    from losses.barycenter import sample_weights
    from models.baryir import compile_stages
    from models.recompute import recompute
    from train import Batch, make_sides, map_step, potential_step
    from utils.graphs import Recorded
    from utils.options import Objective, Source, TrainOptions

    options = TrainOptions(name="speed", sources=[Source(type="denoise", levels=[25])], steps=1,
                           precision=dtype, objective=Objective(cost="mean_square"), learning_rate=1e-5,
                           potential_learning_rate=1e-5)
    lambdas = torch.full((SOURCES,), 1 / SOURCES)
    net, potentials = BaryIR().to(device), Potentials(lambdas).to(device)
    degraded, clean = torch.rand(2, batch, 3, size, size, device=device)
    source = torch.arange(batch, device=device) % SOURCES
    weights = sample_weights(source, lambdas.to(device), lambdas.to(device))
    if side == "plain":
        map_optimizer, potential_optimizer = (torch.optim.RMSprop(m.parameters(), 1e-5)
                                              for m in (net, potentials))

        def maps() -> None:
            plain.map_step(net, potentials, map_optimizer, degraded, clean, source, weights)

        def potentials_too() -> None:
            plain.potential_step(net, potentials, potential_optimizer, degraded, source, weights)
    else:
        keep_freed_memory(torch.device(device))
        net = net.to(memory_format=torch.channels_last)
        recompute(net, "cheap" if what == "step_recompute" else "none")
        if what == "step_compiled":
            compile_stages(net)
        recorded = device.startswith("cuda")
        sides = make_sides(net, potentials, options, recorded)
        sample = Batch(degraded, clean, source, weights)
        net.requires_grad_(False)
        potentials.requires_grad_(False)
        steps = [partial(map_step, net, potentials, sides["map"], options=options),
                 partial(potential_step, net, potentials, sides["potential"], options=options)]
        maps, potentials_too = (partial(Recorded(step) if recorded else step, sample) for step in steps)
    if what == "map_step":
        return maps
    if what == "potential_step":
        return potentials_too
    return lambda: (maps(), potentials_too())


def loading(side: str, size: int, folder: str, flags: argparse.Namespace) -> Callable[[], None]:
    """PAIRS training samples in batches of 4 by train.py's loader, of all sources or of --source.

    folder: holds the decoded images, which workers map as long as they load.
    """
    from data.cache import decode_all
    from data.datasets import TrainingSet, open_sources
    from data.sampler import EpochSampler, make_loader
    from utils.options import Source, TrainOptions, load_options

    bundled = ["astronaut.png", "coffee.png", "chelsea.png"]
    options = TrainOptions(name="speed", steps=1,
                           sources=[Source(name="noise", bundled=bundled, degradation="noise", levels=[25])])
    if flags.opt:
        options = load_options(TrainOptions, flags.opt, flags.set)
    if flags.source:
        options.sources = [entry for entry in options.sources
                           if flags.source in (entry.source, entry.name, entry.degradation)]
    sources = open_sources(options)
    cache = None if side == "plain" else decode_all(sources, Path(folder) / "decoded.bin")
    samples = TrainingSet(sources, 0, cache, options.clean_share, options.camera_share)
    sampler = EpochSampler([len(samples)], [(0, 4, size)], 2**40, seed=0)
    batches = iter(make_loader(samples, sampler, flags.workers, torch.device("cpu")))

    def run() -> None:
        for _ in range(PAIRS // 4):
            next(batches)
    return run


def reset_peak_memory(device: str) -> None:
    """Forget the process's peak memory so far."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")           # Linux: VmHWM starts again


def peak_memory(device: str) -> int:
    """Bytes, since reset_peak_memory: allocated tensors on CUDA, else the process's resident memory."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1))


def median_seconds(run: Callable[[], object], device: str, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(side: str, what: str, size: int, flags: argparse.Namespace) -> dict[str, float]:
    """Seconds and the peak of resident memory in GB of this process, which has done nothing else."""
    device, dtype = flags.device, flags.dtype
    torch.manual_seed(0)
    if device.startswith("cuda"):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    with tempfile.TemporaryDirectory() as folder:
        if what == "loading":
            run = loading(side, size, folder, flags)
        elif what in FORWARD:
            run = forward(side, what, size, flags)
        else:
            run = training(side, what, size, device, dtype, flags.batch)
        run()
        reset_peak_memory(device)
        passes = 20 if device.startswith("cuda") else 1 if what == "inference" else PASSES
        return {"seconds": median_seconds(run, device, passes), "gigabytes": peak_memory(device) / 1e9}


def rates(device: str) -> tuple[dict[str, float], float]:
    """FLOP/s of a large matrix product in both precisions, bytes/s that a large copy reads and writes."""
    size = 8192 if device.startswith("cuda") else 2048
    a, (x, y) = torch.rand(size, size, device=device), torch.rand(2, 2**26, device=device)
    flops = {name: 2 * size**3 / median_seconds(partial(torch.matmul, factor, factor), device, 10)
             for name, factor in (("float32", a), ("bfloat16", a.bfloat16()))}
    return flops, 2 * x.nbytes / median_seconds(lambda: y.copy_(x), device, 10)


def floors(rows: list[list], flags: argparse.Namespace) -> list[list[str]]:
    """What forward passes cannot beat: operations and bytes at the rates of a product and of a copy.

    A table; the share is that of the larger floor in our time, in our precision.
    """
    flops, bandwidth = rates(flags.device)
    lines = [["what", "size", "floors in", "operations s", "at GFLOP/s", "bytes s", "at GB/s", "share"]]
    for what, size, _, dtype, _, ours, _ in rows:
        operations = 1e9 * gflop(NETWORKS[flags.network], size)
        values = maps_read_and_written(NETWORKS[flags.network], size)
        for precision, rate in flops.items():
            least = operations / rate, values * getattr(torch, precision).itemsize / bandwidth
            share = f"{max(least) / ours:.0%}" if precision == dtype else ""
            lines.append([what, str(size), precision, f"{least[0]:.3g}", f"{rate / 1e9:.0f}",
                          f"{least[1]:.3g}", f"{bandwidth / 1e9:.0f}", share])
    return lines


def maps_read_and_written(net_of: Callable[[], BaryIR], size: int) -> int:
    """Values that a forward pass reads and writes if each convolution, norm, matrix product does so once."""
    aten = torch.ops.aten
    counted = {aten.convolution.default, aten.native_layer_norm.default, aten.bmm.default, aten.mm.default}

    class Count(TorchDispatchMode):
        values = 0

        def __torch_dispatch__(self, operation, types, arguments=(), options=None):
            result = operation(*arguments, **(options or {}))
            if operation in counted:
                written = result[0] if isinstance(result, tuple) else result
                self.values += arguments[0].numel() + written.numel()
            return result

    with Count() as count, torch.no_grad():
        net_of().to("meta")(torch.empty(1, 3, size, size, device="meta"))
    return count.values


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--what", nargs="+", choices=WHAT, default=WHAT)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 512, 1024, 2048],
                        help="of the inference, multiples of 8")
    parser.add_argument("--network", choices=NETWORKS, default="BaryIR",
                        help="of forward, forward_compiled and inference; the steps are BaryIR's")
    parser.add_argument("--batch", type=int, default=3, help="of the steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--opt", default="", metavar="FILE", help="option file whose sources are loaded")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                        help="override its options")
    parser.add_argument("--source", default="", help="of its sources the one of this name or degradation")
    parser.add_argument("--workers", type=int, default=2, help="of the loading")
    parser.add_argument("--keep", action="store_true", help="the plain form keeps freed memory, too")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of our side")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--out", type=Path, default=Path("results/speed.csv"))
    parser.add_argument("--alone", nargs=3, metavar=("SIDE", "WHAT", "SIZE"), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    positive = min(flags.batch, flags.repeats, flags.threads, flags.workers + 1) > 0
    if not positive or any(size < 16 or size % 8 for size in flags.sizes):
        raise InputError("expected --batch, --repeats, --threads from 1 on, --workers from 0 on, "
                         "--sizes that are multiples of 8")
    on_cuda = flags.device.startswith("cuda")
    torch.set_num_threads(flags.threads)
    if flags.alone:
        if flags.keep:
            keep_freed_memory(torch.device(flags.device))
        side, what, size = flags.alone
        print(json.dumps(measure(side, what, int(size), flags)))
        return

    def alone(side: str, what: str, size: int) -> dict[str, float]:
        if on_cuda:                                             # whose allocator no earlier run disturbs
            return measure(side, what, size, flags)
        command = [sys.executable, "-m", "benchmarks.speed", "--alone", side, what, str(size),
                   "--network", flags.network, "--device", flags.device, "--dtype", flags.dtype,
                   "--batch", str(flags.batch), "--threads", str(flags.threads),
                   "--workers", str(flags.workers), *["--keep"] * flags.keep,
                   "--opt", flags.opt, "--source", flags.source,
                   *(["--set", *flags.set] if flags.set else [])]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            reason = (result.stderr.strip().splitlines() or ["killed"])[-1]
            raise InputError(f"{side} {what} {size}: ended with status {result.returncode}: {reason}")
        return json.loads(result.stdout)

    rows, lines = [], [["what", "size", "plain s", "ours s", "ratio", "plain GB", "ours GB"]]
    for what in flags.what:
        for size in flags.sizes if what == "inference" else [SIZES.get(what, 128)]:
            runs = {"plain": [], "ours": []}
            for _ in range(flags.repeats):
                for side, results in runs.items():
                    if side == "ours" or what != "inference" or size <= 512:
                        results.append(alone(side, what, size))
            theirs, ours = ({key: statistics.median(result[key] for result in results) for key in results[0]}
                            if results else None for results in runs.values())
            seconds, ratio = (theirs["seconds"], theirs["seconds"] / ours["seconds"]) if theirs else ("", "")
            rows.append([what, size, flags.device, flags.dtype, seconds, ours["seconds"], ratio])
            lines.append([what, str(size), f"{seconds:.3g}" if theirs else "-", f"{ours['seconds']:.3g}",
                          f"{ratio:.2f}" if theirs else "-", f"{theirs['gigabytes']:.2f}" if theirs else "-",
                          f"{ours['gigabytes']:.2f}"])
            print("  ".join(lines[-1]), file=sys.stderr, flush=True)
            if what == "loading":
                rates = " and ".join(f"{PAIRS / result['seconds']:.0f}" for result in (theirs, ours))
                print(f"{rates} pairs a second with {flags.workers} workers", file=sys.stderr, flush=True)
            write_csv(flags.out, [["what", "size", "device", "dtype", "plain_s", "ours_s", "ratio"], *rows])
    print(as_text(lines))
    if forward_rows := [row for row in rows if row[0] in FORWARD]:
        print(as_text(floors(forward_rows, flags)))
    where = f"{platform.machine()} CPU, {flags.threads} threads"
    if on_cuda:
        where = torch.cuda.get_device_name(flags.device)
    print(f"{flags.network}, {flags.dtype}, batch {flags.batch} in the steps, {where}, "
          f"torch {torch.__version__}, {date.today()}; {flags.out}")


if __name__ == "__main__":
    with one_line_errors():
        main()
