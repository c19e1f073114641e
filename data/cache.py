"""All images of a run decoded: once, into a file that its processes and workers map, or to check them."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.datasets import ImageSet
from utils import distributed
from utils.errors import InputError, count, printable
from utils.files import write_atomically, write_text
from utils.images import read_image


class DecodedImages:
    """Images by path, [H,W,3] uint8, decoded one after the other in a file that all processes map."""

    def __init__(self, file: Path, shapes: dict[Path, Sequence[int]]) -> None:
        self.file, self.shapes = file, shapes
        starts = np.cumsum([0, *map(math.prod, shapes.values())]).tolist()
        self.starts = dict(zip(shapes, starts, strict=False))

    def __contains__(self, path: Path) -> bool:
        return path in self.shapes

    def __getitem__(self, path: Path) -> np.ndarray:
        return np.memmap(self.file, np.uint8, "r", self.starts[path], tuple(self.shapes[path]))


def decode_all(sets: Sequence[ImageSet], file: Path) -> DecodedImages:
    """Every image that some sets read, decoded into one memory-mapped file.

    The first process decodes, the others wait. A file that an earlier run left is used again where it holds
    the same images. InputError at the first unreadable one.
    """
    paths = sorted({path for images in sets for path in images.files})
    index = file.with_suffix(".json")
    if distributed.rank() == 0:
        stamps = [[str(path), path.stat().st_mtime_ns, path.stat().st_size] for path in paths]
        known = json.loads(index.read_text(encoding="utf-8")) if index.exists() and file.exists() else {}
        if known.get("files") != stamps:
            index.unlink(missing_ok=True)
            write_text(index, json.dumps({"files": stamps, "shapes": _decode(paths, file)}))
    distributed.wait()
    shapes = json.loads(index.read_text(encoding="utf-8"))["shapes"]
    return DecodedImages(file, dict(zip(paths, shapes, strict=True)))


def _decode(paths: Sequence[Path], file: Path) -> list[Sequence[int]]:
    """Write the images' pixels one after the other; returns their shapes."""
    shapes = []

    def write(temporary: str) -> None:
        with open(temporary, "wb") as target, ThreadPoolExecutor() as pool:
            batches = (paths[start:start + 64] for start in range(0, len(paths), 64))   # never all in memory
            images = (image for batch in batches for image in pool.map(read_image, batch))
            for image in decoding(images, len(paths)):
                target.write(image.tobytes())
                shapes.append(image.shape)

    write_atomically(file, write)
    return shapes


def check(sources: Sequence[ImageSet], sets: Sequence[ImageSet]) -> list[str]:
    """What is wrong with the files of some sources and test sets, a line each. Every file is decoded."""
    paths = sorted({path for images in (*sources, *sets) for path in images.files})
    with ThreadPoolExecutor() as pool:
        found = dict(zip(paths, decoding(pool.map(examine, paths), len(paths)), strict=True))
    problems = [examined for examined in found.values() if isinstance(examined, str)]
    trained = {found[path]: path for images in sources for pair in images.pairs for path in pair if path}
    for images in (*sources, *sets):
        if images.complete < images.options.expected:
            problems.append(f"{images.where}: {count(images.complete, 'image')}, "
                            f"expected {images.options.expected}")
        for degraded, clean in images.pairs:
            if images in sets and clean and found[clean] in trained:
                problems.append(f"{images.where}: {clean} is among the training images, "
                                f"{trained[found[clean]]}")
            if not (degraded and clean) or isinstance(found[degraded], str) or isinstance(found[clean], str):
                continue
            (size, pixels), (clean_size, clean_pixels) = found[degraded], found[clean]
            if size != clean_size:
                problems.append(f"{degraded} is {size} but {clean} is {clean_size}, expected the same size")
            elif pixels == clean_pixels and not images.options.degradation:
                problems.append(f"{degraded} and {clean} are equal, expected a degraded and a clean image")
    return problems


def examine(path: Path) -> tuple[str, str] | str:
    """Size and digest of an image file's pixels, or why it cannot be read."""
    try:
        image = read_image(path)
    except InputError as error:
        return str(error)
    return f"{image.shape[1]}x{image.shape[0]}", hashlib.sha256(np.ascontiguousarray(image)).hexdigest()


def require_no_problems(problems: Sequence[str], file: str) -> None:
    """InputError where anything is wrong with an option file's data, each problem printed before."""
    for problem in problems:
        print(printable(f"problem: {problem}"))
    if problems:
        raise InputError(f"{file}: {count(len(problems), 'problem')} with its data")


def decoding(images: Iterable, total: int) -> Iterator:
    """A progress bar, of the first process."""
    return tqdm(images, "decoding", total, leave=False, dynamic_ncols=True, disable=distributed.rank() > 0)
