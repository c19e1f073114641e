"""One's own photographs: python test.py --opt FILE --input PATH --output PATH, a file or a folder of them.

Each comes back with its name, depth, transparency, EXIF and ICC profile. What cannot be restored is named,
the others are restored, and the exit status is 3. A folder that was interrupted goes on where it stopped.
"""

import errno
import os
import struct
import sys
import warnings
import zlib
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import getchunks, putchunk
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from tqdm import tqdm

from models.baryir import BaryIR
from utils.errors import InputError, count, first_few, printable
from utils.evaluation import BORDER, restore
from utils.files import list_files, write_atomically
from utils.images import (
    DAMAGED,
    DIRECTORIES,
    EXTENSIONS,
    ICC_PROFILE,
    Picture,
    read_picture,
    require_format,
    save_image,
    to_uint8,
)
from utils.options import TestOptions
from utils.report import Report, photograph_report

DEEP = (".png", ".tif", ".tiff")                            # formats that hold 16 bits a channel
PORTABLE = (".bmp", ".ppm", ".pgm", ".pnm")                 # that hold colours alone: no alpha, EXIF, profile
OPAQUE = (*PORTABLE, ".pbm", ".jpg", ".jpeg", ".jpe", ".jfif")
KINDS = ", ".join(sorted(EXTENSIONS))
NAMED = 10                                                  # failures that the last line names


@dataclass
class Photographs:
    """What one command restores: jobs, pairs of a photograph and where its result goes.

    others: files that are no images by their names. unreadable: folders that cannot be listed, a line each.
    done: number of results that are there already.
    """

    source: Path
    target: Path
    jobs: list[tuple[Path, Path]]
    others: list[Path]
    unreadable: list[str]
    done: int = 0

    def leave_done(self, checkpoint: str, overwrite: bool) -> None:
        """Drop the jobs of a folder whose result is newer than the photograph and the weights.

        InputError where anything else would be overwritten unasked.
        """
        def is_done(source: Path, target: Path) -> bool:
            return self.source.is_dir() and all(
                os.path.exists(path) and os.path.getmtime(target) > os.path.getmtime(path)
                for path in (source, checkpoint))

        there = [] if overwrite else [job for job in self.jobs if os.path.exists(job[1])]
        done = {job for job in there if is_done(*job)}
        if others := [str(target) for source, target in there if (source, target) not in done]:
            raise InputError(f"--output {self.target}: {count(len(others), 'file')} there already: "
                             f"{first_few(others)}; expected --overwrite or another place")
        self.jobs, self.done = [job for job in self.jobs if job not in done], len(done)


def restore_input(flags: Namespace, options: TestOptions, network: Callable[[], BaryIR]) -> None:
    """test.py --input, with its flags: restore what can be restored, and write the page of --report.

    network: makes the network, once input and output are checked.
    """
    photographs = find_photographs(flags.input, flags.output, flags.keep_format)
    jobs, place = photographs.jobs, photographs.target              # those that are restored already, too
    folder = place.parent if jobs[0][1] == place else place
    photographs.leave_done(options.checkpoint, flags.overwrite)
    page = Report(folder, "--report", [target for _, target in jobs]) if flags.report else None
    try:
        restore_photographs(network(), photographs, options)
    finally:                                                # where some could not be restored, too (status 3)
        whole = getattr(sys.exception(), "status", 3) == 3
        if page and whole and (index := photograph_report(page, jobs)):
            print(f"look at them: {index}")


def find_photographs(source: Path, target: Path, keep_format: bool) -> Photographs:
    """The photographs of a file or a folder, and where each goes; InputError where that is no place for them.

    Below a folder `target` they keep their names, but lossy formats become PNG unless `keep_format`. A single
    file goes to `target` itself where that is an image's name. Earlier results below `source` are left out.
    """
    folder, unreadable = source.is_dir(), []
    if not (folder or source.is_file()):
        found = "neither a regular file nor a folder" if os.path.lexists(source) else "no such file or folder"
        raise InputError(f"--input {source}: {found}")
    inside, results = Path(os.path.realpath(source)), Path(os.path.realpath(target))
    if inside == results:
        raise InputError(f"--output {target}: would overwrite {source}, expected another place")
    files = list_files(source, unreadable=unreadable) if folder else [source]
    if inside in results.parents:
        files = [path for path in files if not Path(os.path.realpath(path)).is_relative_to(results)]
    images = [path for path in files if is_image_name(path)]
    others = [path for path in files if not is_image_name(path)]
    if not images:
        found = "no images" if folder else "no image by its name"
        raise InputError("; ".join([f"--input {source}: {found}, expected {KINDS}", *unreadable]))

    if not folder and is_image_name(target) and not target.is_dir():
        require_format(target)
        jobs = [(source, target)]
    elif not target.is_dir() and (target.exists() or is_image_name(target) or not folder and target.suffix):
        place = "a folder" if folder else f"a folder that is there, or an image's name, {KINDS}"
        raise InputError(f"--output {target}: expected {place}")
    else:
        root, kept = source if folder else source.parent, EXTENSIONS if keep_format else DEEP + PORTABLE
        names = png_names([path.relative_to(root) for path in images], kept)
        jobs = [(path, target / name) for path, name in zip(images, names, strict=True)]
    taken = {os.path.realpath(path) for path in images}
    for path, result in jobs:
        if (place := os.path.realpath(result)) in taken:
            raise InputError(f"--output {target}: {path} would overwrite {result}, expected another place")
        taken.add(place)
    return Photographs(source, target, jobs, others, unreadable)


def is_image_name(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS


def png_names(names: list[Path], kept: Container[str] = ()) -> list[Path]:
    """Where restored images go: a.jpg -> a.png, or a.jpg.png where that is taken or two would share it.

    kept: extensions, in lower case, of names that stay.
    """
    stay = [name.suffix.lower() in kept for name in names]
    pngs = [name if same else name.with_suffix(".png") for name, same in zip(names, stay, strict=True)]
    number = Counter(pngs)
    return [png if same or number[png] == 1 else name.with_name(f"{name.name}.png")
            for name, png, same in zip(names, pngs, stay, strict=True)]


def restore_photographs(net: BaryIR, photographs: Photographs, options: TestOptions) -> None:
    """Restore photographs and write each to its place.

    InputError with exit status 3, after all others, where some could not be restored.
    """
    failures = []
    others = [f"left out: {path}, no photograph by its name" for path in photographs.others]
    for line in others + photographs.unreadable:
        print(printable(line))
    device = next(net.parameters()).device
    with tqdm(photographs.jobs, desc=f"restoring on {device}", dynamic_ncols=True) as bar:
        for source, target in bar:
            try:
                photograph = read_photograph(source)
                degraded = torch.from_numpy(photograph.floats()).permute(2, 0, 1)[None].to(device)
                restored = restore(net, degraded, options.strip, options.precision, BORDER)
                restored = restored[0].permute(1, 2, 0).cpu().numpy()
                write_photograph(photograph, restored, target)
                for remark in photograph.remarks:
                    bar.write(printable(f"{source}: {remark}"))
            except (InputError, OSError) as error:
                if getattr(error, "errno", None) not in (None, errno.ENAMETOOLONG, errno.EISDIR):
                    raise                                   # such as no place for any of them
                text = str(error) if isinstance(error, InputError) else f"{target}: {error.strerror}"
                named = printable(str(source)) in text
                failures.append(printable(text if named else f"{source}: {text}"))
                bar.write(failures[-1])
            except KeyboardInterrupt:
                again = "; the same command goes on where it stopped" * photographs.source.is_dir()
                raise InputError(f"interrupted before {source}{again}", status=130) from None
    report(photographs, failures, options.precision)


def report(photographs: Photographs, failures: list[str], precision: str) -> None:
    """Say how many are restored; InputError with exit status 3 where any photograph or folder is not."""
    restored, total = len(photographs.jobs) - len(failures), len(photographs.jobs) + photographs.done
    place = f", in {photographs.target}, precision {precision}"
    line = f"{restored} of {total} images restored" + place * (restored > 0)
    if photographs.done:
        line += f"; {photographs.done} there already, newer than photograph and weights"
    if photographs.others:
        line += f"; {count(len(photographs.others), 'file')} left out, no photographs"
    print(printable(line))
    if failures or photographs.unreadable:
        folders = count(len(photographs.unreadable), "folder")
        closed = f", {folders} not read" if photographs.unreadable else ""
        names = first_few(photographs.unreadable + failures, NAMED)
        raise InputError(f"{len(failures)} of {total} images not restored{closed}: {names}", status=3)


def read_photograph(path: Path) -> Picture:
    """An image file, with a remark on further frames and on EXIF of which Pillow passes over a part."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        photograph = read_picture(path)
    if photograph.frames > 1:
        photograph.remarks.append(f"{photograph.frames} frames, only the first is restored")
    if DAMAGED not in photograph.remarks and any(warning.category is UserWarning for warning in caught):
        photograph.remarks.append(DAMAGED)
    return photograph


def write_photograph(photograph: Picture, restored: np.ndarray, path: Path) -> None:
    """Write restored pixels [H,W,3] in [0, 1] with a photograph's depth, transparency and metadata.

    The format is that of the path's extension. What it cannot hold is left out, with a remark; InputError
    where it cannot hold the image at all.
    """
    suffix, alpha, colours = path.suffix.lower(), photograph.alpha, restored.clip(0, 1)
    deep, full = photograph.bits == 16 and suffix in DEEP, 2**photograph.bits - 1
    if photograph.bits == 16 and not deep:
        photograph.remarks.append(f"16 bits a channel, of which {suffix} gets 8")
    if suffix in (*PORTABLE, ".pbm", ".gif") and photograph.metadata.keys() & {"exif", "icc_profile"}:
        photograph.remarks.append(f"EXIF or an ICC profile, which {suffix} cannot hold")
    if photograph.grey:
        colours = colours.mean(axis=2, keepdims=True, dtype=np.float64)
    if alpha is not None and suffix in OPAQUE:
        if alpha.min() < full:
            photograph.remarks.append(f"transparency, which {suffix} cannot hold: put on white")
        colours, alpha = colours * (alpha / full) + 1 - alpha / full, None
    pixels = (colours * 65535 + 0.5).astype(np.uint16) if deep else to_uint8(colours)
    if alpha is not None:
        alpha = alpha if deep else alpha >> (photograph.bits - 8)
        pixels = np.concatenate([pixels, alpha.astype(pixels.dtype)], axis=2)
    if deep:
        save = save_png16 if suffix == ".png" else save_tiff16
        write_atomically(path, lambda temporary: save(temporary, pixels, photograph.metadata))
    else:
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        save_image(image, path, **photograph.metadata)


def save_png16(path: str, pixels: np.ndarray, metadata: dict) -> None:
    """[H,W,C] uint16 as PNG, C = 1 (grey), 2 (with alpha), 3 (RGB) or 4, which no library here writes.

    Its chunks are Pillow's, but for the header and the pixels.
    """
    height, width, channels = pixels.shape
    rows = pixels.astype(">u2").reshape(height, -1).view(np.uint8)
    above = np.concatenate([np.zeros_like(rows[:1]), rows[:-1]])
    filtered = np.concatenate([np.full((height, 1), 2, np.uint8), rows - above], axis=1)    # by filter 2, up
    own = {b"IHDR": struct.pack(">IIBBBBB", width, height, 16, (0, 4, 2, 6)[channels - 1], 0, 0, 0),
           b"IDAT": zlib.compress(filtered, 6)}
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, content, _ in getchunks(Image.new("L", (1, 1)), **metadata):
            putchunk(file, kind, own.get(kind, content))


def save_tiff16(path: str, pixels: np.ndarray, metadata: dict) -> None:
    """[H,W,C] uint16 as TIFF, C = 1 (grey), 2 (with alpha), 3 (RGB) or 4.

    Its tags are written by Pillow, which has a place for EXIF's directories; tifffile has none.
    """
    height, width, channels = pixels.shape
    exif, tags = Image.Exif(), ImageFileDirectory_v2()
    exif.load(metadata.get("exif", b""))
    tags.update({tag: exif.get_ifd(tag) if tag in DIRECTORIES else exif[tag] for tag in exif})
    tags.update({256: width, 257: height, 258: (16,) * channels, 277: channels,
                 259: 1, 262: 2 if channels > 2 else 1,     # not compressed; RGB or grey
                 273: 0, 278: height, 279: pixels.nbytes})  # one strip, behind the tags
    if channels in (2, 4):
        tags[338] = 2                                       # alpha, not multiplied into the colours
    if "icc_profile" in metadata:
        tags[ICC_PROFILE] = metadata["icc_profile"]
    if "dpi" in metadata:
        (tags[282], tags[283]), tags[296] = metadata["dpi"], 2
    with open(path, "wb") as file:
        tags.save(file)
        file.write(pixels.astype("<u2").tobytes())
