"""Pack a part of a training folder into one file, for a machine that the whole does not fit or reach.

    python -m benchmarks.pack ROOT OUT.tar [--megabytes 35] [--opt options/train_lite.yml]

Takes of each source and validation set of the option file the images that are held out, and of the others
every n-th, with all that belongs to them (both sides of a pair, depth, rain layers), n the same for all: the
least with which the file is small enough. Below another root, the option file finds the same names.
"""

import tarfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from data.datasets import ImageSet, open_sets
from utils.errors import InputError, count, one_line_errors
from utils.options import TrainOptions, load_options


def chosen(sets: list[ImageSet], every: int) -> set[Path]:
    """The files of every n-th image of each set, and every n-th of its rain layers."""
    files = set()
    for images in sets:
        for pair in images.pairs[::every]:
            files |= {path for path in (pair.degraded, pair.clean, images.depths.get(pair.clean)) if path}
        files |= set(images.layers[::every])
    return files


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--megabytes", type=float, default=35)
    parser.add_argument("--opt", default="options/train_lite.yml", metavar="FILE")
    flags = parser.parse_args()
    options = load_options(TrainOptions, flags.opt, [f"root={flags.root}"])
    sources = open_sets(options.sources, options, "sources")
    held_out = open_sets(options.validation.sets, options, "validation.sets")
    for every in range(1, 1 + max(map(len, sources))):
        files = chosen(sources, every) | chosen(held_out, 1)
        if sum(path.stat().st_size + 1024 for path in files) <= flags.megabytes * 1e6:
            break
    else:
        raise InputError(f"--megabytes {flags.megabytes:g}: they do not hold one image of each source")
    with tarfile.open(flags.out, "w") as archive:
        for path in sorted(files):
            archive.add(path.resolve(), path.relative_to(flags.root))
    print(f"{flags.out}: {count(len(files), 'file')}, every {every}. image")


if __name__ == "__main__":
    with one_line_errors():
        main()
