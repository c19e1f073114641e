"""All images of a run decoded: once, into files that its processes and workers map, or to check them."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.datasets import ImageSet
from utils import distributed
from utils.errors import InputError, count, naming, printable
from utils.files import remove_partial, write_atomically
from utils.images import read_image
from utils.metrics import require_size


def decode_all(sets: Sequence[ImageSet], folder: Path) -> dict[Path, Path]:
    """Every image that some sets read, decoded into a file in `folder`: the files by image.

    The first process decodes what no earlier run has left there, the others wait. InputError at the first
    unreadable one.
    """
    paths = {path for images in sets for path in images.files}
    places = {path: folder / f"{stamp(path)}.raw" for path in paths}
    if distributed.rank() == 0:
        remove_partial(folder)
        with ThreadPoolExecutor() as pool:
            for _ in decoding(pool.map(decode, places, places.values()), len(places)):
                pass
    distributed.wait()
    return places


def stamp(path: Path) -> str:
    """A name for what a file holds now."""
    state = path.stat()
    return hashlib.sha256(f"{path.resolve()} {state.st_mtime_ns} {state.st_size}".encode()).hexdigest()[:32]


def decode(path: Path, place: Path) -> None:
    """Write height and width of an image, int32, and its pixels, [H,W,3] uint8, if the file is not there.

    np.load parses a header anew at each access, which takes a quarter of the time of a noisy sample.
    """
    if not place.exists():
        image = read_image(path)
        content = np.int32(image.shape[:2]).tobytes() + image.tobytes()
        write_atomically(place, lambda temporary: Path(temporary).write_bytes(content))


def check(file: str, sources: Sequence[ImageSet], sets: Sequence[ImageSet], smallest: int,
          problems: list[str] | None = None) -> None:
    """InputError at the first test image that cannot be measured, or, in a dry run, where anything is wrong.

    file: the option file. smallest: side in pixels that metrics need. problems: a dry run's, found so far;
    it decodes every file and prints all.
    """
    found = unmeasurable(sets, smallest)
    if problems is None:
        for problem in found:
            raise InputError(problem)
        return
    problems = list(dict.fromkeys([*problems, *wrong_files(sources, sets), *found]))
    for problem in problems:
        print(printable(f"problem: {problem}"))
    if problems:
        raise InputError(f"{file}: {count(len(problems), 'problem')} with its data")


def unmeasurable(sets: Sequence[ImageSet], smallest: int) -> Iterator[str]:
    """Lines on the images of test sets that cannot be read, or have a side of less than so many pixels."""
    for images in sets:
        for index in range(images.selected):
            try:
                _, clean = images.read(index)
                if clean is not None:
                    with naming(str(images.pairs[index].clean)):
                        require_size(clean, smallest)
            except InputError as error:
                yield str(error)


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
