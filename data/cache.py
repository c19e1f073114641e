"""All images of a run decoded, to keep them in memory or to check them."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.datasets import ImageSet
from utils import distributed
from utils.errors import InputError, count, naming, printable
from utils.images import read_image
from utils.metrics import require_size


def decode_all(sets: Sequence[ImageSet]) -> dict[Path, np.ndarray]:
    """Every image that some sets read, [H,W,3] uint8, by file; InputError at the first unreadable one.

    DataLoader workers that are forked share this memory, torchrun's processes have it each.
    """
    paths = sorted({path for images in sets for path in images.files})
    with ThreadPoolExecutor() as pool:
        return dict(zip(paths, decoding(pool.map(read_image, paths), len(paths)), strict=True))


def check(file: str, sources: Sequence[ImageSet], sets: Sequence[ImageSet], smallest: int,
          problems: list[str] | None = None) -> None:
    """InputError at the first test image that cannot be measured, or, in a dry run, where anything is wrong.

    file: the option file. smallest: side in pixels that metrics need. problems: a dry run's, found so far;
    it decodes every file and prints all.
    """
    if problems is not None:
        problems += wrong_files(sources, sets)
    for images in sets:
        for index in range(len(images)):
            try:
                _, clean = images.read(index)
                if clean is not None:
                    with naming(str(images.pairs[index].clean)):
                        require_size(clean, smallest)
            except InputError as error:
                if problems is None:
                    raise
                problems.append(str(error))
    for problem in (lines := dict.fromkeys(problems or ())):    # each once
        print(printable(f"problem: {problem}"))
    if problems:
        raise InputError(f"{file}: {count(len(lines), 'problem')} with its data")


def wrong_files(sources: Sequence[ImageSet], sets: Sequence[ImageSet]) -> list[str]:
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


def decoding(images: Iterable, total: int) -> Iterator:
    """A progress bar, of the first process."""
    return tqdm(images, "decoding", total, leave=False, dynamic_ncols=True, disable=distributed.rank() > 0)
