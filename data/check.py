"""Check the data of an option file before a run, every file that the run reads.

    python -m data.check --opt options/train_5d.yml [--set root=PATH]

For each source and test set: folder, images, pairs, sizes in pixels, and what a run does not use of a file;
then what is wrong: an absent folder, another number of images than the complete set has, unreadable files,
pairs of unequal size or of equal images, names without partner. Exits non-zero where a run would not be the
one that the option file describes.
"""

import argparse
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.datasets import ImageSet
from data.pairs import MissingFolder
from utils.errors import InputError, count, first_few, one_line_errors, printable
from utils.images import read_picture
from utils.options import TestOptions, TrainOptions, load_options


@dataclass
class File:
    """What was found of an image file.

    error: why it cannot be read. size: width and height in pixels. digest: SHA-256 of the pixels that a run
    sees. remarks: what it does not see.
    """

    error: str = ""
    size: tuple[int, int] | None = None
    digest: str = ""
    remarks: list[str] = field(default_factory=list)


def examine(path: Path) -> File:
    """Decode a file, keeping none of its pixels."""
    try:
        picture = read_picture(path, still=True)
    except InputError as error:
        return File(str(error))
    if picture.alpha is not None and (picture.alpha < np.iinfo(picture.alpha.dtype).max).any():
        picture.remarks.append("transparency, which is left out")
    pixels = picture.rgb()
    height, width = pixels.shape[:2]
    remarks = [f"{path}: {remark}" for remark in picture.remarks]
    return File("", (width, height), hashlib.sha256(pixels).hexdigest(), remarks)


def find_sets(options: TrainOptions | TestOptions) -> tuple[dict[str, ImageSet], list[str]]:
    """The sources and test sets of an option file by their place there; what is wrong with the others."""
    if isinstance(options, TrainOptions):
        lists = {"sources": options.sources, "validation.sets": options.validation.sets}
    else:
        lists = {"sets": options.sets}
    places = {f"{options.file}: {key}[{i}] {entry.name}": entry
              for key, entries in lists.items() for i, entry in enumerate(entries)}
    sets, problems = {}, []
    for where, entry in places.items():
        try:
            sets[where] = ImageSet(entry, options.root, where, strict=False)
        except InputError as error:
            if isinstance(error, MissingFolder) and getattr(entry, "optional", False):
                print(f"left out (optional): {error}")
            else:
                problems.append(str(error))
    if not sets:
        problems.append(f"{options.file}: none of its sets is there, root {options.root}")
    return sets, problems


def report(where: str, images: ImageSet, files: dict[Path, File]) -> None:
    """Print what was found of a set."""
    sizes = [files[path].size for path in images.files if files[path].size]
    spans = ["-".join(map(str, sorted({min(side), max(side)}))) for side in zip(*sizes, strict=True)]
    found = f"{images.describe()}; {count(len(images.files), 'file')}"
    print(f"{where}: {found}" + (f", {' x '.join(spans)} pixels" if sizes else ""))
    if images.options.expected:
        print(f"    {count(images.complete, 'image')} of {images.options.expected} expected")
    if remarks := [remark for path in images.files for remark in files[path].remarks]:
        print(printable(f"    {count(len(remarks), 'remark')} on what is not used: {first_few(remarks)}"))


def set_problems(where: str, images: ImageSet, files: dict[Path, File]) -> list[str]:
    """What is wrong with a set, once its files are examined."""
    problems = list(images.problems)
    found, expected = images.complete, images.options.expected
    if expected and found != expected:
        problems.append(f"{where}: {count(found, 'pair' if images.paired else 'image')}, expected {expected}")
    unreadable = [files[path].error for path in images.files if files[path].error]
    unequal, equal = [], []
    for pair in images.pairs if images.paired else []:
        degraded, clean = files[pair.degraded], files[pair.clean]
        if degraded.error or clean.error:
            continue
        if degraded.size != clean.size:
            sizes = ["{}x{}".format(*file.size) for file in (degraded, clean)]
            unequal.append(f"{pair.degraded} is {sizes[0]} but {pair.clean} is {sizes[1]}")
        elif degraded.digest == clean.digest and not images.options.degradation:    # which comes on top
            same = " (the same file)" if os.path.samefile(pair.degraded, pair.clean) else ""
            equal.append(f"{pair.degraded} = {pair.clean}{same}")
    findings = [("unreadable file", "", unreadable), ("pair", " of unequal size", unequal),
                ("pair", " of equal images", equal)]
    return problems + [f"{where}: {count(len(names), thing)}{what}: {first_few(names)}"
                       for thing, what, names in findings if names]


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--opt", required=True, metavar="FILE", help="option file of train.py or test.py")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                        help="override options, keys dotted")
    flags = parser.parse_args()
    options = load_options(None, flags.opt, flags.set)

    sets, problems = find_sets(options)
    paths = sorted({path for images in sets.values() for path in images.files})
    with ThreadPoolExecutor() as pool:
        examined = tqdm(pool.map(examine, paths), "decoding", len(paths), leave=False, dynamic_ncols=True)
        files = dict(zip(paths, examined, strict=True))
    for where, images in sets.items():
        report(where, images, files)
        problems += set_problems(where, images, files)
    for problem in problems:
        print(printable(f"problem: {problem}"))
    decoded = f"{count(len(files), 'file')} decoded"
    if problems:
        raise InputError(f"{count(len(problems), 'problem')}, {decoded}: "
                         f"a run with {options.file} would not be the one that it describes")
    print(f"no problems, {decoded}")


if __name__ == "__main__":
    with one_line_errors():
        main()
