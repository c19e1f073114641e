"""All images of a run decoded once, in a file that its processes and workers map."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.datasets import ImageSet
from utils import distributed
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


def check_all(sets: Sequence[ImageSet]) -> None:
    """Decode every file of some sets in parallel; InputError at an unreadable one or an unequal pair."""
    def decode(read: Callable, what: int | Path) -> None:
        read(what)

    tasks = [(images.read, index) for images in sets for index in range(len(images))]
    tasks += [(images.image, path) for images in sets for path in (*images.layers, *images.depths.values())]
    with ThreadPoolExecutor() as pool:
        for _ in decoding(pool.map(decode, *zip(*tasks, strict=True)), len(tasks)):
            pass


def decoding(images: Iterable, total: int) -> Iterator:
    """A progress bar, of the first process."""
    return tqdm(images, "decoding", total, leave=False, dynamic_ncols=True, disable=distributed.rank() > 0)
