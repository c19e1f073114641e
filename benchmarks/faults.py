"""What damage does: training runs that are killed, images and checkpoints with wrong bytes (seed 0).

    python -m benchmarks.faults     50 kills, 300 images, 100 checkpoints; about a quarter of an hour

kills         A training run, on one CPU thread, that writes a checkpoint after every step is killed (SIGKILL)
              at a random moment and continued with --resume. Its last checkpoint must equal, bit by bit,
              that of the run that was left alone.
images        Files of every format, cut, with flipped bits, zeroed or foreign bytes, are read;
checkpoints   likewise.

A damaged file must give one line, or load as it was. JPEG, WebP, TIFF, BMP, PPM and NumPy's arrays have no
checksum: there, changed pixels cannot be told from other pixels by anyone; they are counted by themselves.
"""

import multiprocessing
import os
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from models.baryir import BaryIR
from utils.checkpoint import load_network, read_checkpoint, save_checkpoint
from utils.errors import InputError, one_line_errors
from utils.images import read_image
from utils.options import TrainOptions, load_options
from utils.tables import as_text

TINY = str(Path(__file__).parent.parent / "options/train_tiny.yml")
RUN = ["--opt", TINY, "--set", "validation.sets=[]", "batch=2", "patch=16", "workers=1", "cache=false",
       "warmup=2", "log_every=1", "save_every=1"]
SERVER = multiprocessing.get_context("forkserver")          # imports torch once for all training runs
SERVER.set_forkserver_preload(["train", "torch._dynamo"])
ERROR, SAME, OTHER = "one line", "as it was", "other values, no checksum"
SILENT, TRACEBACK = FAILURES = "wrong in silence", "traceback"


def damaged(content: bytes, rng: random.Random) -> bytes:
    """A file's bytes, cut, with flipped bits, or with a stretch of zeros or of foreign bytes."""
    kind, data = rng.choice(["cut", "flip", "flip", "zeros", "foreign", "insert"]), bytearray(content)
    place = rng.randrange(len(data) if rng.random() < 0.7 else min(len(data), 200))     # headers more often
    length = rng.randrange(1, 64)
    if kind == "cut":
        return bytes(data[:place])
    if kind == "flip":
        for _ in range(rng.choice([1, 1, 8])):
            data[rng.randrange(len(data)) if rng.random() < 0.5 else place] ^= 1 << rng.randrange(8)
    elif kind == "insert":
        data[place:place] = rng.randbytes(length)
    else:
        data[place:place + length] = bytes(length) if kind == "zeros" else rng.randbytes(length)
    return bytes(data)


def outcome(read: Callable[[], object], same: Callable[[object], bool], checksum: bool) -> str:
    """What reading a damaged file comes to."""
    try:
        result = read()
    except InputError as error:
        return ERROR if str(error) and "\n" not in str(error) else TRACEBACK
    except Exception as error:                                  # what a user would see as a traceback
        tqdm.write(f"{type(error).__name__}: {error}")
        return TRACEBACK
    return SAME if same(result) else SILENT if checksum else OTHER


def readings(files: Iterable[Path], read: Callable[[Path], object], same: Callable[..., bool], count: int,
             seed: int) -> Counter:
    """Outcomes of reading `count` times one of some files, damaged."""
    rng, found = random.Random(seed), Counter()
    whole = [(path, path.read_bytes(), read(path)) for path in sorted(files)]
    for _ in tqdm(range(count), "damaged files", leave=False):
        path, content, right = rng.choice(whole)
        path.write_bytes(damaged(content, rng))
        found[outcome(partial(read, path), partial(same, right), path.suffix in (".png", ".pth"))] += 1
    return found


def images(count: int, seed: int) -> Counter:
    """Outcomes of reading `count` damaged images."""
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent)
        for name in ("a.png", "a.jpg", "a.webp", "a.tif", "a.bmp", "a.ppm"):
            image.save(folder / name)
        image.save(folder / "lzw.tif", compression="tiff_lzw")
        image.save(folder / "exif.jpg", exif=Image.Exif(), icc_profile=bytes(200))
        image.save(folder / "progressive.jpg", progressive=True)
        image.quantize(16).save(folder / "palette.png")
        for name in ("deep.png", "deep.tif"):
            Image.fromarray(pixels[..., 0] * np.uint16(250)).save(folder / name, icc_profile=bytes(100))
        return readings(folder.iterdir(), read_image, np.array_equal, count, seed)


def checkpoints(count: int, seed: int) -> Counter:
    """Outcomes of reading `count` damaged checkpoints."""
    torch.manual_seed(seed)
    network = vars(load_options(TrainOptions, TINY).network)

    def read(path: Path) -> dict:
        load_network(path)
        return read_checkpoint(path)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.pth"
        state = BaryIR(**network).state_dict()
        save_checkpoint(path, {"net": state, "network": network, "step": 1, "train": {"best": 1.0}})
        return readings([path], read, same_state, count, seed)


def same_state(a: object, b: object) -> bool:
    """Whether two states are equal, tensors bit by bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_state, a, b))
    return a == b


def start_training(arguments: Sequence[str], output: Path, **environment: str) -> BaseProcess:
    """Start train.py on one CPU thread, in a process group of its own; its output is added to a file."""
    process = SERVER.Process(target=_train, args=(list(arguments), output, environment))
    process.start()
    return process


def _train(arguments: list[str], output: Path, environment: dict[str, str]) -> None:
    import train

    multiprocessing.set_start_method("fork", force=True)        # of its DataLoader's workers
    os.setpgid(0, 0)
    os.environ.update({"CUDA_VISIBLE_DEVICES": "", **environment})
    with open(output, "ab") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    torch.set_num_threads(1)
    with one_line_errors():
        train.main(arguments)


def train_until(folder: Path, steps: int, *arguments: str, seconds: float | None = None) -> dict | None:
    """Train in a folder; returns the last checkpoint without the options, which name the folder.

    None where the run was killed before its end, so long after its log began.
    """
    process = start_training([*RUN, f"output={folder}", f"steps={steps}", *arguments], folder / "output.txt")
    while process.is_alive() and not (folder / "tiny/train.log").exists():
        time.sleep(0.01)
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        return None
    if process.exitcode:
        last = (folder / "output.txt").read_text(encoding="utf-8").strip().splitlines()[-1]
        raise InputError(f"a run that was not killed ended with {process.exitcode}: {last}")
    content = read_checkpoint(folder / "tiny/last.pth")
    del content["train"]["options"]
    return content


def kill(parent: Path, steps: int, right: dict, seconds: float) -> list[str]:
    """Kill a run at a moment, continue it and compare; one that ends before is killed at half the time."""
    folder = Path(tempfile.mkdtemp(dir=parent))
    if train_until(folder, steps, seconds=seconds):
        return kill(parent, steps, right, seconds / 2)
    half_written = list((folder / "tiny").glob(".partial*"))
    try:
        resumed = train_until(folder, steps, "--resume")
        outcome = "identical" if same_state(resumed, right) else "different"
    except InputError as error:
        tqdm.write(str(error))
        return ["lost"]
    return [outcome] + ["while a checkpoint was written"] * bool(half_written)


def kills(count: int, seed: int, jobs: int, steps: int = 40) -> Counter:
    """Kill `count` training runs at random moments, continue them, compare with one that was left alone."""
    rng, found = random.Random(seed), Counter()
    with tempfile.TemporaryDirectory() as parent, ThreadPoolExecutor(jobs) as pool:
        start = time.monotonic()
        alone = train_until(Path(tempfile.mkdtemp(dir=parent)), steps)
        length = time.monotonic() - start
        one = partial(kill, Path(parent), steps, alone)
        for outcomes in tqdm(pool.map(one, [rng.uniform(0, length) for _ in range(count)]), "kills", count):
            found.update(outcomes)
    return found


def main() -> None:
    found = {"images": images(300, 0), "checkpoints": checkpoints(100, 0), "kills": kills(50, 0, jobs=2)}
    rows = [[damage, outcome, str(number)] for damage, of_damage in found.items()
            for outcome, number in of_damage.items()]
    print(as_text([["damage", "outcome", "count"], *rows]))
    print(f"{platform.machine()}, torch {torch.__version__}, {date.today()}")
    if bad := [row for row in rows if row[1] in (*FAILURES, "different", "lost")]:
        raise InputError(f"{sum(int(row[2]) for row in bad)} of them ended as none should")


if __name__ == "__main__":
    with one_line_errors():
        main()
