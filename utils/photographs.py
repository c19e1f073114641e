"""One's own photographs: python test.py --opt FILE --input PATH --output PATH, a file or a folder of them.

Each comes back with its name, transparency, EXIF, ICC profile, XMP and resolution, at 8 bits a channel. What
cannot be restored is named, the others are restored, and the exit status is 3. A folder that was interrupted
goes on where it stopped.
"""

import errno
import os
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from models.baryir import BaryIR
from utils.errors import InputError, count, first_few, printable
from utils.evaluation import BORDER, restore, with_tones_of
from utils.files import list_files
from utils.images import EXTENSIONS, as_rgb, decode, format_of, save_image, to_uint8
from utils.options import TestOptions
from utils.report import Report, photograph_report

LOSSLESS = (".png", ".tif", ".tiff", ".bmp", ".ppm", ".pgm", ".pnm")   # come back as they are, others as PNG
OPAQUE = ("JPEG", "BMP", "PPM")                             # formats that hold no transparency
Jobs = list[tuple[Path, Path]]                              # a photograph, and where its result goes
NAMED = 10                                                  # failures that the last line names


@dataclass
class Photograph:
    """pixels: [H,W,C] uint8 as of `decode`. metadata: as Pillow's save takes it. remarks: for its user."""

    pixels: np.ndarray
    metadata: dict
    remarks: list[str]


def restore_input(flags: Namespace, options: TestOptions, network: Callable[[], BaryIR]) -> None:
    """test.py --input, with its flags: restore what can be restored, and write the page of --report.

    network: makes the network, once input and output are checked. InputError with exit status 3, after all
    others, where some could not be restored.
    """
    images, closed = find_photographs(flags.input, flags.output)
    jobs = place_results(images, flags.input, flags.output, flags.keep_format)
    left = jobs if flags.overwrite else leave_done(jobs, flags.input, flags.output, options.checkpoint)
    folder = flags.output.parent if jobs[0][1] == flags.output else flags.output
    page = Report(folder, "--report", [target for _, target in jobs]) if flags.report else None
    failures = restore_photographs(network(), left, options)
    there = f"; {len(jobs) - len(left)} there already, newer than photograph and weights"
    print(printable(f"{len(left) - len(failures)} of {len(jobs)} images restored, in {flags.output}, "
                    f"precision {options.precision}{there * (len(left) < len(jobs))}"))
    if page and (index := photograph_report(page, jobs)):
        print(f"look at them: {index}")
    if failures or closed:
        unread = f", {count(len(closed), 'folder')} not read" * bool(closed)
        raise InputError(f"{len(failures)} of {len(jobs)} images not restored{unread}: "
                         f"{first_few(closed + failures, NAMED)}", status=3)


def find_photographs(source: Path, target: Path) -> tuple[list[Path], list[str]]:
    """The photographs of a file or of a folder without `target`, and a line on each folder that is closed.

    InputError where there are none.
    """
    closed, files = [], [source]
    if source.is_dir():
        files = list_files(source, unreadable=closed)
        if source.resolve() in target.resolve().parents:    # results of an earlier run
            files = [path for path in files if not path.resolve().is_relative_to(target.resolve())]
    elif not source.is_file():
        found = "neither a regular file nor a folder" if os.path.lexists(source) else "no such file or folder"
        raise InputError(f"--input {source}: {found}")
    images = [path for path in files if is_image_name(path)]
    if not images:
        found = f"--input {source}: no image by its name, expected {', '.join(sorted(EXTENSIONS))}"
        raise InputError("; ".join([found, *closed]))
    for path in files:
        if not is_image_name(path):
            print(printable(f"left out: {path}, no photograph by its name"))
    return images, closed


def is_image_name(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS


def place_results(images: list[Path], source: Path, target: Path, keep_format: bool) -> Jobs:
    """Pairs of a photograph and where its result goes; InputError where that is no place for it.

    Below a folder `target` they keep their names, but lossy formats become PNG unless `keep_format`. A single
    file goes to `target` itself where that is an image's name.
    """
    folder = source.is_dir()
    if not folder and is_image_name(target) and not target.is_dir():
        format_of(target)
        jobs = [(source, target)]
    elif not target.is_dir() and (target.exists() or is_image_name(target) or not folder and target.suffix):
        place = "a folder" if folder else "a folder that is there, or an image's name"
        raise InputError(f"--output {target}: expected {place}")
    else:
        names = [path.relative_to(source if folder else source.parent) for path in images]
        places = png_names(names, EXTENSIONS if keep_format else LOSSLESS)
        jobs = [(path, target / name) for path, name in zip(images, places, strict=True)]
    taken = {source.resolve(), *(path.resolve() for path in images)}
    for path, result in jobs:
        if result.resolve() in taken or target.resolve() in taken:
            raise InputError(f"--output {target}: {path} would overwrite {result}, expected another place")
        taken.add(result.resolve())
    return jobs


def png_names(names: list[Path], kept: Container[str] = ()) -> list[Path]:
    """Where restored images go: a.jpg -> a.png, or a.jpg.png where that is taken or two would share it.

    kept: extensions, in lower case, of names that stay.
    """
    pngs = [name if name.suffix.lower() in kept else name.with_suffix(".png") for name in names]
    number = Counter(pngs)
    return [png if png == name or number[png] == 1 else name.with_name(f"{name.name}.png")
            for name, png in zip(names, pngs, strict=True)]


def leave_done(jobs: Jobs, source: Path, target: Path, weights: str) -> Jobs:
    """The jobs of a folder without those whose result is newer than the photograph and the weights.

    InputError where anything else would be overwritten unasked.
    """
    def is_done(photograph: Path, result: Path) -> bool:
        return source.is_dir() and all(
            os.path.exists(path) and os.path.getmtime(result) > os.path.getmtime(path)
            for path in (photograph, weights))

    left = [job for job in jobs if not (job[1].exists() and is_done(*job))]
    if others := [str(result) for _, result in left if result.exists()]:
        raise InputError(f"--output {target}: {count(len(others), 'file')} there already: "
                         f"{first_few(others)}; expected --overwrite or another place")
    return left


def restore_photographs(net: BaryIR, jobs: Jobs, options: TestOptions) -> list[str]:
    """Restore photographs and write each to its place; returns a line on each that could not be restored."""
    device, failures = next(net.parameters()).device, []
    with tqdm(jobs, desc=f"restoring on {device}", dynamic_ncols=True) as bar:
        for source, target in bar:
            try:
                photograph = read_photograph(source)
                degraded = as_rgb(photograph.pixels) / np.float32(255)
                batch = torch.from_numpy(degraded).permute(2, 0, 1)[None].to(device)
                restored = restore(net, batch, options.strip, options.precision, BORDER)
                restored = restored[0].permute(1, 2, 0).cpu().numpy()
                restored = with_tones_of(degraded, restored) if options.keep_tones else restored
                write_photograph(photograph, restored, target)
                for remark in photograph.remarks:
                    bar.write(printable(f"{source}: {remark}"))
            except (InputError, OSError) as error:
                if getattr(error, "errno", None) not in (None, errno.ENAMETOOLONG, errno.EISDIR):
                    raise                                   # such as no place for any of them
                text = str(error) if isinstance(error, InputError) else f"{target}: {error.strerror}"
                failures.append(printable(text if printable(str(source)) in text else f"{source}: {text}"))
                bar.write(failures[-1])
            except KeyboardInterrupt:
                again = "; the same command goes on where it stopped" * (len(jobs) > 1)
                raise InputError(f"interrupted before {source}{again}", status=130) from None
    return failures


def read_photograph(path: Path) -> Photograph:
    """An image file and what is needed to write it again; see `decode`."""
    remarks: list[str] = []
    image, pixels = decode(path, remarks)
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    remarks += [f"{frames} frames, only the first is restored"] * (frames > 1)
    kept = {key: image.info[key] for key in ("icc_profile", "xmp", "dpi") if image.info.get(key)}
    return Photograph(pixels, kept, remarks)


def write_photograph(photograph: Photograph, restored: np.ndarray, path: Path) -> None:
    """Write restored pixels [H,W,3] in [0, 1] with a photograph's transparency and metadata.

    The format is that of the path's extension. What it cannot hold is left out, with a remark; InputError
    where it cannot hold the image at all.
    """
    channels, colours = photograph.pixels.shape[2], restored.clip(0, 1)
    if channels < 3:
        colours = colours.mean(axis=2, keepdims=True)
    alpha = photograph.pixels[..., -1:] if channels in (2, 4) else None
    if alpha is not None and format_of(path) in OPAQUE:
        if alpha.min() < 255:
            photograph.remarks.append(f"transparency, which {path.suffix} cannot hold: put on white")
        colours, alpha = 1 - (1 - colours) * (alpha / 255), None
    pixels = to_uint8(colours) if alpha is None else np.concatenate([to_uint8(colours), alpha], axis=2)
    image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    save_image(image, path, **photograph.metadata)
