"""All images of a run decoded, to keep them in memory or to check them."""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.datasets import ImageSet, unequal
from utils import distributed
from utils.errors import InputError, count, printable
from utils.images import read_image
from utils.metrics import too_small


def decode_all(sets: Sequence[ImageSet], read: Callable[[Path], Any] = read_image) -> dict[Path, Any]:
    """Every image that some sets read, [H,W,3] uint8, or what another `read` gives, by file; in parallel.

    InputError at the first unreadable one. DataLoader workers that are forked share this memory, torchrun's
    processes have it each.
    """
    paths = sorted({path for images in sets for path in images.files})
    with ThreadPoolExecutor() as pool:
        found = tqdm(pool.map(read, paths), "decoding", len(paths), leave=False, dynamic_ncols=True,
                     disable=distributed.rank() > 0)
        return dict(zip(paths, found, strict=True))


def check(file: str, sources: Sequence[ImageSet], sets: Sequence[ImageSet], smallest: int,
          problems: list[str] | None = None) -> None:
    """InputError at the first test image that cannot be measured, or, in a dry run, where anything is wrong.

    file: the option file. smallest: side in pixels that metrics need. problems: a dry run's, found so far;
    it decodes every file and prints all.
    """
    if problems is not None:
        problems = list(dict.fromkeys([*problems, *wrong_files(sources, sets, smallest)]))      # each once
        for problem in problems if distributed.rank() == 0 else ():
            print(printable(f"problem: {problem}"))
        if problems:
            raise InputError(f"{file}: {count(len(problems), 'problem')} with its data")
        return
    for images in sets:
        for index in range(len(images)):
            _, clean = images.read(index)
            if clean is not None and (problem := too_small(clean.shape, smallest, images.options.offset)):
                raise InputError(f"{images.pairs[index].clean}: {problem}")


def wrong_files(sources: Sequence[ImageSet], sets: Sequence[ImageSet], smallest: int) -> list[str]:
    """What is wrong with the files of some sources and test sets, a line each. Every file is decoded."""
    found = decode_all([*sources, *sets], examine)
    problems = [examined for examined in found.values() if isinstance(examined, str)]
    trained = {found[path]: path for images in sources for pair in images.pairs for path in pair if path}
    for images in (*sources, *sets):
        if images.complete < images.options.expected:
            problems.append(f"{images.where}: {count(images.complete, 'image')}, "
                            f"expected {images.options.expected}")
        for pair in images.pairs:
            degraded, clean = (found.get(path) for path in pair)        # None: not on disk
            if images in sets and clean in trained:
                problems.append(f"{images.where}: {pair.clean} is among the training images, "
                                f"{trained[clean]}")
            if isinstance(degraded, str) or isinstance(clean, str) or not clean:
                continue
            if images in sets and (problem := too_small(clean[0], smallest, images.options.offset)):
                problems.append(f"{pair.clean}: {problem}")
            if degraded and (problem := unequal(pair, degraded[0], clean[0])):
                problems.append(problem)
            elif degraded == clean and not images.options.degradation:
                problems.append(f"{pair.degraded} and {pair.clean} are equal, "
                                "expected a degraded and a clean image")
    return problems


def examine(path: Path) -> tuple[tuple[int, ...], str] | str:
    """Shape [H,W,3] and digest of an image file's pixels, or why it cannot be read."""
    try:
        image = read_image(path)
    except InputError as error:
        return str(error)
    return image.shape, hashlib.sha256(image).hexdigest()
