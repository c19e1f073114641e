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

from tqdm import tqdm

from data.datasets import ImageSet, MissingFolder, first_few, list_others
from utils.errors import InputError, one_line_errors
from utils.images import read_image, write_atomically
from utils.options import TrainOptions, load_any


@dataclass
class File:
    """What was found of an image file: its size in pixels or why it cannot be read, and its SHA-256 if asked for."""

    size: tuple[int, int] | None            # width, height
    error: str
    digest: str


def examine(path: Path, hashed: bool) -> File:
    """Decode a file, keeping its size only."""
    try:
        height, width = read_image(path).shape[:2]
        size, error = (width, height), ""
    except InputError as unreadable:
        size, error = None, str(unreadable)
    digest = ""
    if hashed and path.is_file():
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    return File(size, error, digest)


def entries(options) -> Iterator[tuple[str, object]]:
    """The sources and test sets of an option file, each with its place there."""
    lists = {"sources": options.sources, "validation.sets": options.validation.sets} if isinstance(options, TrainOptions) else {"sets": options.sets}
    for key, sets in lists.items():
        for i, images in enumerate(sets):
            yield f"{options.file}: {key}[{i}] {images.name}", images


def set_problems(images: ImageSet, where: str, files: dict[Path, File]) -> list[str]:
    """What is wrong with a set, once its files are examined."""
    problems = list(images.problems)
    found, expected = len(images), images.options.expected
    if expected and found != expected:
        problems.append(f"{where}: {found} {'pairs' if images.paired else 'images'}, expected {expected}")
    if unreadable := [files[path].error for path in images.files if files[path].error]:
        problems.append(f"{where}: {len(unreadable)} unreadable files: {first_few(unreadable)}")
    unequal = []
    for pair in images.pairs:
        sizes = [files[path].size for path in (pair.degraded, pair.clean) if path]
        if len(sizes) == 2 and None not in sizes and sizes[0] != sizes[1]:
            unequal.append(f"{pair.degraded} is {sizes[0][0]}x{sizes[0][1]} but {pair.clean} is {sizes[1][0]}x{sizes[1][1]}")
    if unequal:
        problems.append(f"{where}: {len(unequal)} pairs of unequal size: {first_few(unequal)}")
    return problems


def check_manifest(path: Path, root: Path, files: dict[Path, File], write: bool) -> list[str]:
    """Compare the files with a manifest, lines of `sha256sum`; where there is none yet, write it if `write`."""
    def name(file: Path) -> str:
        return (file.relative_to(root) if root in file.parents else file).as_posix()

    digests = {name(file): files[file].digest for file in sorted(files) if files[file].digest}
    if not path.exists():
        if not write:
            return [f"{path}: not written, for the problems above"]
        text = "".join(f"{digest}  {file}\n" for file, digest in digests.items())
        write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))
        print(f"manifest {path}: written, {len(digests)} files; verify with the same command, or below {root} with sha256sum -c")
        return []
    recorded = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        digest, separator, file = line.partition("  ")
        if not separator or len(digest) != 64:
            raise InputError(f"{path}: line {number}: {line[:80]!r}, expected a SHA-256, two blanks and a file name")
        recorded[file] = digest
    print(f"manifest {path}: {len(recorded)} files")
    changes = {
        "changed": [file for file in recorded if file in digests and digests[file] != recorded[file]],
        "gone": [file for file in recorded if file not in digests],
        "new": [file for file in digests if file not in recorded],
    }
    return [f"{path}: {len(names)} files {kind} since it was written: {first_few(names)}" for kind, names in changes.items() if names]


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
            if getattr(description, "optional", False):
                print(f"left out (optional): {error}")
            else:
                problems.append(str(error))
        except InputError as error:
            problems.append(str(error))
    paths = sorted({path for _, images in sets for path in images.files})
    with ThreadPoolExecutor() as pool:
        examined = pool.map(lambda path: examine(path, flags.hash is not None), paths)
        files = dict(zip(paths, tqdm(examined, "decoding", len(paths), leave=False, dynamic_ncols=True)))

    # Report set by set.
    for where, images in sets:
        sizes = [files[path].size for path in images.files if files[path].size]
        print(f"{where}: {images.describe()}" + (f", {size_range(sizes)}" if sizes else ""))
        if images.paired and (shared := len(images.pairs) - len({pair.clean for pair in images.pairs})):
            print(f"    {len(images.pairs) - shared} clean images for {len(images.pairs)} degraded ones")
        if others := list_others(images.folder) if not images.options.bundled else []:
            print(f"    {len(others)} files that are not images: {first_few(map(str, others))}")
        problems += set_problems(images, where, files)
    if flags.hash is not None:
        manifest = Path(flags.hash or Path(options.root, f"manifest_{options.name}.sha256"))
        problems += check_manifest(manifest, Path(options.root), files, write=not problems)
    for problem in problems:
        print(f"problem: {problem}")
    if problems:
        raise InputError(f"{len(problems)} problems, {len(files)} files decoded: a run with {options.file} would not be the one that it describes")
    print(f"no problems, {len(files)} files decoded")


if __name__ == "__main__":
    with one_line_errors():
        main()
