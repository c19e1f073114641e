"""Check the data of an option file before a run, every file of it.

    python -m data.check --opt options/train_5d.yml [--set root=PATH] [--hash]

For each source and test set: folder, images, pairs, sizes in pixels; then what is wrong: an absent folder, another number of
images than the complete set has (METHOD section 4), unreadable files, pairs of unequal size, names without partner. Exits
non-zero where a run would not be the one that the option file describes.
"""

import argparse
import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from data.datasets import ImageSet
from data.pairs import MissingFolder, list_others
from utils.errors import InputError, count, first_few, one_line_errors
from utils.files import write_text
from utils.images import read_image
from utils.options import TestSet, TrainOptions, load_any

LOSSY = ("JPEG", "MPO")         # formats, as Pillow calls them


@dataclass
class File:
    """What was found of an image file: its size in pixels or why it cannot be read, its format and its SHA-256."""

    size: tuple[int, int] | None            # width, height
    error: str
    format: str
    digest: str


def examine(path: Path) -> File:
    """Decode a file, keeping none of its pixels."""
    try:
        height, width = read_image(path).shape[:2]
        with Image.open(path) as header:
            size, error, file_format = (width, height), "", header.format
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return File(size, error, file_format, digest)
    except InputError as unreadable:
        return File(None, str(unreadable), "", "")


def entries(options) -> Iterator[tuple[str, object]]:
    """The sources and test sets of an option file, each with its place there."""
    lists = {"sources": options.sources, "validation.sets": options.validation.sets} if isinstance(options, TrainOptions) else {"sets": options.sets}
    for key, sets in lists.items():
        for i, images in enumerate(sets):
            yield f"{options.file}: {key}[{i}] {images.name}", images


def report(where: str, images: ImageSet, files: dict[Path, File]) -> None:
    """Print what was found of a set."""
    sizes = [files[path].size for path in images.files if files[path].size]
    print(f"{where}: {images.describe()}; {count(len(images.files), 'file')}" + (f", {size_range(sizes)}" if sizes else ""))
    if images.options.expected:
        print(f"    {count(images.complete, 'image')} of {images.options.expected} expected")
    if images.paired and (shared := len(images.pairs) - len({pair.clean for pair in images.pairs})):
        print(f"    {count(len(images.pairs) - shared, 'clean image')} for {len(images.pairs)} degraded ones")
    if others := list_others(images.folder) if not images.options.bundled else []:
        print(f"    {count(len(others), 'file')} of other kinds: {first_few(map(str, others))}")


def set_problems(where: str, images: ImageSet, files: dict[Path, File], training: bool) -> list[str]:
    """What is wrong with a set, once its files are examined."""
    problems = list(images.problems)
    found, expected = images.complete, images.options.expected
    if expected and found != expected:
        problems.append(f"{where}: {count(found, 'pair' if images.paired else 'image')}, expected {expected}")
    if unreadable := [files[path].error for path in images.files if files[path].error]:
        problems.append(f"{where}: {count(len(unreadable), 'unreadable file')}: {first_few(unreadable)}")
    unequal, lossy = [], []
    for degraded, clean in ((pair.degraded, pair.clean) for pair in images.pairs if pair.degraded and pair.clean):
        sizes = [files[path].size for path in (degraded, clean)]
        if None not in sizes and sizes[0] != sizes[1]:
            unequal.append(f"{degraded} is {sizes[0][0]}x{sizes[0][1]} but {clean} is {sizes[1][0]}x{sizes[1][1]}")
        if files[clean].format in LOSSY and files[degraded].format and files[degraded].format not in LOSSY:
            lossy.append(f"{clean}, of {degraded}")
    if unequal:
        problems.append(f"{where}: {count(len(unequal), 'pair')} of unequal size: {first_few(unequal)}")
    if lossy:
        problems.append(f"{where}: {count(len(lossy), 'clean image')} in JPEG beside a lossless degraded one: {first_few(lossy)}")
    named = [path for path in images.files if files[path].format in LOSSY and path.suffix.lower() not in (".jpg", ".jpeg")]
    if named:
        problems.append(f"{where}: {count(len(named), 'file')} with JPEG data under another format's name: {first_few(map(str, named))}")
    if (same := repeated(images, files)) and isinstance(images.options, TestSet):       # in training they only weigh more
        problems.append(f"{where}: {count(len(same), 'image')} there more than once: {first_few(same)}")
    if images.selected < len(images) and not training:                                  # a validation may be short
        problems.append(f"{where}: its option limit leaves {images.selected} of {len(images)} images")
    return problems


def repeated(images: ImageSet, files: dict[Path, File]) -> list[str]:
    """Images of a set whose files are equal to the byte."""
    same: dict[str, list[Path]] = {}
    for pair in images.pairs:
        if files[pair.path].digest:
            same.setdefault(files[pair.path].digest, []).append(pair.path)
    return [" = ".join(map(str, paths)) for paths in same.values() if len(paths) > 1]


def check_manifest(path: Path, root: Path, files: dict[Path, File], write: bool) -> list[str]:
    """Compare the files with a manifest, lines of `sha256sum`; where there is none yet, write it if `write`."""
    digests = {file.relative_to(root).as_posix(): files[file].digest for file in sorted(files) if root in file.parents and files[file].digest}
    if not path.exists():
        if not write:
            return [f"{path}: not written, for the problems above"]
        text = "".join(f"{digest}  {file}\n" for file, digest in digests.items())
        write_text(path, text)
        print(f"manifest {path}: written, {count(len(digests), 'file')}; verify with the same command, or below {root} with sha256sum -c")
        return []
    recorded = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        digest, separator, file = line.partition("  ")
        if not separator or len(digest) != 64:
            raise InputError(f"{path}: line {number}: {line[:80]!r}, expected a SHA-256, two blanks and a file name")
        recorded[file] = digest
    print(f"manifest {path}: {count(len(recorded), 'file')}")
    changes = {
        "changed": [file for file in recorded if file in digests and digests[file] != recorded[file]],
        "gone": [file for file in recorded if file not in digests],
        "new": [file for file in digests if file not in recorded],
    }
    return [f"{path}: {count(len(names), 'file')} {kind} since it was written: {first_few(names)}" for kind, names in changes.items() if names]


def size_range(sizes: list[tuple[int, int]]) -> str:
    """Smallest and largest width and height."""
    def spread(numbers: tuple[int, ...]) -> str:
        return f"{min(numbers)}" if min(numbers) == max(numbers) else f"{min(numbers)}-{max(numbers)}"

    width, height = zip(*sizes)
    return f"{spread(width)} x {spread(height)} pixels"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--opt", required=True, metavar="FILE", help="option file of train.py or test.py")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override options, keys dotted")
    parser.add_argument("--hash", nargs="?", const="", metavar="MANIFEST",
                        help="write the files' SHA-256 to a manifest, or verify them where it exists; default: ROOT/manifest_NAME.sha256")
    flags = parser.parse_args()
    options = load_any(flags.opt, flags.set)

    # Find the files of all sets, then decode each file once.
    sets, problems = [], []
    for where, description in entries(options):
        try:
            sets.append((where, ImageSet(description, options.root, where, strict=False)))
        except MissingFolder as error:
            if getattr(description, "optional", False) and not error.similar:
                print(f"left out (optional): {error}")
            else:
                problems.append(str(error))
        except InputError as error:
            problems.append(str(error))
    paths = sorted({path for _, images in sets for path in images.files})
    with ThreadPoolExecutor() as pool:
        files = dict(zip(paths, tqdm(pool.map(examine, paths), "decoding", len(paths), leave=False, dynamic_ncols=True)))

    for where, images in sets:
        report(where, images, files)
        problems += set_problems(where, images, files, training=isinstance(options, TrainOptions))
    if not sets:
        problems.append(f"{options.file}: none of its sets is there, root {options.root}")
    elif flags.hash is not None:
        manifest = Path(flags.hash or Path(options.root, f"manifest_{options.name}.sha256"))
        problems += check_manifest(manifest, Path(options.root), files, write=not problems)
    for problem in problems:
        print(f"problem: {problem}")
    if problems:
        raise InputError(f"{count(len(problems), 'problem')}, {count(len(files), 'file')} decoded: a run with {options.file} would not be the one that it describes")
    print(f"no problems, {count(len(files), 'file')} decoded")


if __name__ == "__main__":
    with one_line_errors():
        main()
