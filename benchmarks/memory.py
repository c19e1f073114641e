"""Peak memory and time of restoring one image at the paper's size: textbook form, whole image, strips.

    python -m benchmarks.memory                                 sizes up to 2160x3840 (H x W)
    python -m benchmarks.memory --size 1080x1920 --mode strips  one of them; the peak in GB is the last line
    python -m benchmarks.memory --check 512x768                 strips against whole: the largest difference

On a CPU the peak is the resident memory of the process, Python, libraries and weights (0.2 GB) included; on
CUDA the allocator's. The difference is relative to the largest value.
"""

import argparse
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch

from benchmarks import plain
from benchmarks.complexity import peak_memory, reset_peak_memory
from models.baryir import BaryIR
from utils import distributed
from utils.errors import InputError, one_line_errors
from utils.evaluation import restore
from utils.files import write_csv
from utils.tables import as_text

SIZES = ["256x256", "512x512", "1024x1024", "1080x1920", "2048x2048", "2160x3840"]
LARGEST = {"plain": 512 * 512, "whole": 1024 * 1024, "strips": 2160 * 3840}     # pixels that 24 GB hold
COLUMNS = ["size", "mode", "device", "dtype", "peak_gb", "seconds"]


def measure(size: tuple[int, int], mode: str, device: str, dtype: str) -> tuple[float, float]:
    """Peak memory in GB and seconds of one pass in this process, which has done nothing else."""
    torch.manual_seed(0)
    net, image = BaryIR().eval().to(device), torch.rand(1, 3, *size, device=device)
    reset_peak_memory(device)
    start = time.perf_counter()
    if mode == "plain":
        with torch.inference_mode():
            plain.network(net, image)
    else:
        restore(net.to(memory_format=torch.channels_last), image, "auto" if mode == "strips" else 0, dtype)
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return peak_memory(device) / 1e9, time.perf_counter() - start


def check(size: tuple[int, int], device: str, dtype: str) -> float:
    """Largest difference between strips and whole, relative to the largest value, with random weights."""
    torch.manual_seed(0)
    net = BaryIR().eval().to(device, memory_format=torch.channels_last)
    image = torch.rand(1, 3, *size, device=device)
    whole, in_strips = (restore(net, image, strip, dtype) for strip in (0, 16))
    return float((in_strips - whole).abs().max() / whole.abs().max())


def pixels(text: str) -> tuple[int, int]:
    """HxW as numbers."""
    height, _, width = text.partition("x")
    numbers = height.isdecimal() and width.isdecimal() and int(height) and int(width)
    if not numbers or int(height) % 8 or int(width) % 8:
        raise InputError(f"{text}, expected a size HxW of multiples of 8, for example 1080x1920")
    return int(height), int(width)


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--size", metavar="HxW")
    parser.add_argument("--mode", choices=LARGEST, default="strips", help="of --size")
    parser.add_argument("--check", metavar="HxW")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of our side")
    parser.add_argument("--out", type=Path, default=Path("results/memory.csv"))
    flags = parser.parse_args()
    distributed.setup(flags.device)
    if flags.check:
        print(f"{check(pixels(flags.check), flags.device, flags.dtype):.2g}")
        return
    if flags.size:
        peak, seconds = measure(pixels(flags.size), flags.mode, flags.device, flags.dtype)
        write_csv(flags.out, [COLUMNS, [flags.size, flags.mode, flags.device, flags.dtype, peak, seconds]])
        print(f"{flags.size} {flags.mode}: {seconds:.1f} s, peak GB:\n{peak:.3f}")
        return
    rows = []
    for size in SIZES:
        for mode, largest in LARGEST.items():
            height, width = pixels(size)
            if height * width > largest:
                continue
            part = flags.out.with_suffix(".part.csv")
            command = [sys.executable, "-m", "benchmarks.memory", "--size", size, "--mode", mode,
                       "--device", flags.device, "--dtype", flags.dtype, "--out", str(part)]
            result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if result.returncode:
                raise InputError(f"{size} {mode}: status {result.returncode}, expected enough memory")
            rows.append(part.read_text(encoding="utf-8").splitlines()[1].split(","))
            part.unlink()
            write_csv(flags.out, [COLUMNS, *rows])
    print(as_text([COLUMNS, *([*row[:4], f"{float(row[4]):.2f}", f"{float(row[5]):.3g}"] for row in rows)]))
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {date.today()}; {flags.out}")


if __name__ == "__main__":
    with one_line_errors():
        main()
