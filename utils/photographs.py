"""One's own photographs: python test.py --opt FILE --input PATH --output PATH, a file or a folder of them.

Each comes back with its name, transparency and metadata, at 8 bits a channel. What cannot be restored is
named, the others are restored, and the exit status is 3. An interrupted folder goes on where it stopped.
"""

import contextlib
import errno
import os
import unicodedata
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Container
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from models.baryir import BaryIR
from utils.errors import InputError, count, first_few, printable
from utils.evaluation import BORDER, restore_pixels
from utils.files import list_files, remove_partial
from utils.images import EXTENSIONS, as_rgb, decode, format_of, save_image, to_image
from utils.metadata import for_format, read_metadata
from utils.options import TestOptions
from utils.report import Report, photograph_report

LOSSY = (".jpg", ".jpeg", ".jpe", ".jfif", ".webp")         # come back as such with --keep-format
NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)        # for any result; other errors are one file's
Jobs = list[tuple[Path, Path]]                              # a photograph, and where its result goes


def restore_input(flags: Namespace, options: TestOptions, network: Callable[[], BaryIR]) -> None:
    """test.py --input, with its flags: restore what can be restored, and write the page of --report.

    network: makes the network, once input and output are checked. InputError with status 3 at the end, where
    some could not be restored.
    """
    images, closed = find_photographs(flags.input, flags.output)
    jobs = place_results(images, flags)
    left = jobs if flags.overwrite else leave_done(jobs, flags, Path(options.checkpoint))
    folder = flags.output.parent if jobs[0][1] == flags.output else flags.output
    page = Report(folder, "--report") if flags.report else None
    failures = restore_photographs(network(), left, options)
    how = f"precision {options.precision}" + ", tones of the input kept" * options.keep_tones
    if done := len(jobs) - len(left):
        how += f"; {done} there already, newer than photograph and weights, whatever their options"
    print(printable(f"{len(left) - len(failures)} of {len(jobs)} images restored, in {flags.output}, {how}"))
    if page and (index := photograph_report(page, jobs, how)):
        print(f"look at them: {index}")
    if failures or closed:
        unread = f", {count(len(closed), 'folder')} not read" * bool(closed)
        raise InputError(f"{len(failures)} of {len(jobs)} images not restored{unread}: "
                         f"{first_few(closed + failures, 10)}", status=3)


def find_photographs(source: Path, target: Path) -> tuple[list[Path], list[str]]:
    """The photographs of a file or a folder, without `target`, and a line on each folder that is closed."""
    if not (source.is_dir() or source.is_file()):
        raise InputError(f"--input {source}: no such file or folder")
    closed: list[str] = []
    files = list_files(source, unreadable=closed) if source.is_dir() else [source]
    if source.resolve() in target.resolve().parents:        # results of an earlier run
        files = [path for path in files if not path.resolve().is_relative_to(target.resolve())]
    images = [path for path in files if path.suffix.lower() in EXTENSIONS]
    for path in sorted(set(files) - set(images)):
        print(printable(f"left out: {path}, no photograph by its name"))
    if not images:
        raise InputError("; ".join([f"--input {source}: no image by its name", *closed]))
    return images, closed


def place_results(images: list[Path], flags: Namespace) -> Jobs:
    """The place of each result; InputError where it is none.

    Below a folder --output they keep their names, as PNGs, JPEG and WebP with --keep-format as such. A single
    file goes to --output itself where that is an image's name.
    """
    source, target = flags.input, flags.output
    alone, named = source.is_file(), target.suffix.lower() in EXTENSIONS
    if alone and named and not target.is_dir():
        format_of(target)
        return [(source, target)]
    if not target.is_dir() and (target.exists() or named or alone and target.suffix):
        raise InputError(f"--output {target}: expected a folder" + " or an image's name" * alone)
    names = [path.relative_to(source.parent if alone else source) for path in images]
    places = png_names(names, (".png", *LOSSY * flags.keep_format))
    return [(path, target / name) for path, name in zip(images, places, strict=True)]


def png_names(names: list[Path], kept: Container[str] = ()) -> list[Path]:
    """Where restored images go: a.jpg -> a.png, or a.jpg.png where that is taken or two would share it.

    Names that differ in case or Unicode form would share a place: some file systems do not tell them apart.
    kept: extensions, in lower case, of names that stay.
    """
    def folded(name: Path) -> str:
        return unicodedata.normalize("NFC", str(name)).casefold()

    pngs = [name if name.suffix.lower() in kept else name.with_suffix(".png") for name in names]
    number, places = Counter(map(folded, pngs)), {}
    for name, png in zip(names, pngs, strict=True):
        png = png if png == name or number[folded(png)] == 1 else name.with_name(f"{name.name}.png")
        while folded(png) in places:
            png = png.with_name(f"{png.name}.png")
        places[folded(png)] = png
    return list(places.values())


def leave_done(jobs: Jobs, flags: Namespace, weights: Path) -> Jobs:
    """The jobs without those of a folder that are done: their result is newer than photograph and weights.

    InputError where anything else would be overwritten unasked.
    """
    left = [job for job in jobs if flags.input.is_file() or modified(job[1]) <= modified(job[0], weights)]
    if others := [str(result) for _, result in left if os.path.exists(result)]:
        raise InputError(f"--output {flags.output}: {count(len(others), 'file')} there already: "
                         f"{first_few(others)}; expected --overwrite or another place")
    return left


def modified(*paths: Path) -> float:
    """When the newest of some files was written; 0 where none is there."""
    return max((os.path.getmtime(path) for path in paths if os.path.exists(path)), default=0)


def identity(path: Path) -> tuple[int, int] | None:
    """What the names of one file share, if it is there."""
    return (os.stat(path).st_dev, os.stat(path).st_ino) if os.path.exists(path) else None


def restore_photographs(net: BaryIR, jobs: Jobs, options: TestOptions) -> list[str]:
    """Restore photographs and write each to its place; returns a line on each that could not be restored."""
    failures, weights, taken = [], Path(options.checkpoint), {identity(source) for source, _ in jobs} - {None}
    with tqdm(jobs, desc="restoring", dynamic_ncols=True) as bar:
        for source, target in bar:
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                remove_partial(target.parent, target)
                if identity(target) in taken:               # by other names, as file systems have it
                    raise InputError(f"{source}: {target} is a photograph or another one's result")
                pixels, metadata, remarks = read_photograph(source)
                restored = restore_pixels(net, as_rgb(pixels), options.keep_tones, strip=options.strip,
                                          precision=options.precision, border=BORDER)
                remarks += write_photograph(target, restored, pixels, metadata)
                taken.add(identity(target))
                if modified(target) <= (date := modified(source, weights)):     # a clock is ahead of ours
                    with contextlib.suppress(OSError):      # FAT counts in steps of two seconds
                        os.utime(target, (date + 2, date + 2))
                if remarks:
                    bar.write(printable(f"{source}: {'; '.join(remarks)}"))
            except (InputError, OSError) as error:
                if getattr(error, "errno", None) in NO_PLACE:
                    raise
                text = str(error) if isinstance(error, InputError) else f"{target}: {error.strerror}"
                failures.append(printable(text if printable(str(source)) in text else f"{source}: {text}"))
                bar.write(failures[-1])
    return failures


def read_photograph(path: Path) -> tuple[np.ndarray, dict, list[str]]:
    """A file's pixels as of `decode`, metadata as of `read_metadata`, and remarks."""
    remarks: list[str] = []
    image, pixels = decode(path, remarks)
    return pixels, read_metadata(image, pixels, remarks), remarks


def write_photograph(path: Path, restored: np.ndarray, stored: np.ndarray, metadata: dict) -> list[str]:
    """Write restored pixels [H,W,3] in [0, 1], grey and transparent as those that were stored, [H,W,C] uint8.

    Returns a remark on what the format, the extension's, cannot hold; InputError where that is the image.
    """
    name, mode, lost = format_of(path), "L" if stored.shape[2] < 3 else "RGB", []
    image = to_image(restored, mode)
    alpha = Image.fromarray(stored[..., -1]) if stored.shape[2] in (2, 4) else None
    if alpha and name == "JPEG":
        lost = ["transparency (put on white)"] * bool(stored[..., -1].min() < 255)
        image = Image.composite(image, Image.new(mode, image.size, "white"), alpha)
    elif alpha:
        image.putalpha(alpha)
    kept, refused = for_format(metadata, name)
    save_image(image, path, **kept)
    return [f"{', '.join(lost + refused)}: {path.suffix} cannot hold that"] * bool(lost + refused)
