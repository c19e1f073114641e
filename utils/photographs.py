"""One's own photographs: python test.py --opt FILE --input PATH --output PATH, a file or a folder of them.

Each comes back with its name, depth, transparency, EXIF and ICC profile. What cannot be restored is named,
the others are restored, and the exit status is 3. A folder that was interrupted goes on where it stopped.
"""

import csv
import errno
import hashlib
import os
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import getchunks, putchunk
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from tqdm import tqdm

from models.baryir import BaryIR
from utils.errors import InputError, count, first_few, printable
from utils.evaluation import restore
from utils.files import append_row, list_files, remove_partial, write_atomically
from utils.images import DIRECTORIES, EXTENSIONS, Picture, read_picture, require_format, save_image, to_uint8

DEEP = (".png", ".tif", ".tiff")                            # formats that hold 16 bits a channel
PORTABLE = (".bmp", ".ppm", ".pgm", ".pnm")                 # that hold colours alone: no alpha, EXIF, profile
OPAQUE = (*PORTABLE, ".pbm", ".jpg", ".jpeg", ".jpe", ".jfif")
KINDS = ", ".join(sorted(EXTENSIONS))
NAMED = 10                                                  # failures that the last line names


class Journal:
    """restored.csv in the folder of results: from which files and by which weights photographs are restored.

    A row is added just before its result takes its place: no interruption leaves a result without one.
    """

    COLUMNS = ("input", "bytes", "modified_ns", "weights", "output")

    def __init__(self, source: Path, target: Path, checkpoint: str) -> None:
        self.source, self.target, self.path = source, target, target / "restored.csv"
        with open(checkpoint, "rb") as file:
            self.weights = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        self.done, self.start = set(), ",".join(self.COLUMNS) + "\r\n"
        if self.path.exists():
            self.start = "" if self.path.read_bytes().endswith(b"\n") else "\r\n"
            with open(self.path, newline="", encoding="utf-8", errors="surrogateescape") as file:
                self.done = {tuple(row) for row in csv.reader(file)}    # one that a kill cut off equals none

    def _row(self, source: Path, target: Path) -> tuple[str, ...]:
        stat = source.stat()
        names = source.relative_to(self.source).as_posix(), target.relative_to(self.target).as_posix()
        return names[0], str(stat.st_size), str(stat.st_mtime_ns), self.weights, names[1]

    def has(self, source: Path, target: Path) -> bool:
        """Whether a photograph, as it is now, was restored by these weights and its result is there."""
        return os.path.exists(source) and os.path.exists(target) and self._row(source, target) in self.done

    def add(self, source: Path, target: Path) -> None:
        append_row(self.path, self._row(source, target), before=self.start)
        self.start = ""


@dataclass
class Photographs:
    """What one command restores, as pairs of a photograph and where its result goes.

    others: files that are no images by their names. unreadable: folders that cannot be listed, a line each.
    done: number of photographs that an earlier run restored. journal: that of a folder.
    """

    source: Path
    target: Path
    jobs: list[tuple[Path, Path]]
    others: list[Path] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    done: int = 0
    journal: Journal | None = None

    def leave_done(self, checkpoint: str, overwrite: bool) -> None:
        """Drop what an earlier run restored; InputError where anything else would be overwritten unasked."""
        if self.source.is_dir():
            self.journal = Journal(self.source, self.target, checkpoint)
        if overwrite:
            return
        todo = [job for job in self.jobs if not (self.journal and self.journal.has(*job))]
        self.jobs, self.done = todo, len(self.jobs) - len(todo)
        if there := [str(target) for _, target in todo if os.path.exists(target)]:
            raise InputError(f"--output {self.target}: {count(len(there), 'file')} there already: "
                             f"{first_few(there)}; expected --overwrite or another place")


def find_photographs(source: Path, target: Path, keep_format: bool) -> Photographs:
    """The photographs of a file or a folder, and where each goes; InputError where that is no place for them.

    A folder's keep their names below `target`; formats that lose become PNG unless `keep_format`. A single
    file goes to `target` itself where that is an image's name, and gets its format.
    """
    if source.is_dir():
        return find_in_folder(source, target, keep_format)
    if not source.is_file():
        found = "neither a regular file nor a folder" if os.path.lexists(source) else "no such file or folder"
        raise InputError(f"--input {source}: {found}")
    if source.suffix.lower() not in EXTENSIONS:
        raise InputError(f"--input {source}: no image by its name, expected {KINDS}")
    if is_image_name(target):
        require_format(target)
        return Photographs(source, target, refuse_clashes([(source, target)], target))
    if target.suffix and not target.exists():
        raise InputError(f"--output {target}: no image by its name, expected {KINDS}, or a folder "
                         "(one with a dot must be there)")
    return Photographs(source, target, place([source], source.parent, target, keep_format))


def is_image_name(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS and not path.is_dir()


def find_in_folder(source: Path, target: Path, keep_format: bool) -> Photographs:
    """The photographs of a folder, but for those below `target`, which are an earlier run's results."""
    if is_image_name(target):
        raise InputError(f"--output {target}: an image file, expected a folder for the folder {source}")
    real_source, real_target = Path(os.path.realpath(source)), Path(os.path.realpath(target))
    if real_source == real_target:
        raise InputError(f"--output {target}: would overwrite the images there, expected another folder")
    unreadable: list[str] = []
    files = list_files(source, unreadable=unreadable)
    if real_target.is_relative_to(real_source):
        files = [path for path in files if not Path(os.path.realpath(path)).is_relative_to(real_target)]
    images = [path for path in files if path.suffix.lower() in EXTENSIONS]
    if not images:
        raise InputError("; ".join([f"--input {source}: no images, expected {KINDS}", *unreadable]))
    others = [path for path in files if path.suffix.lower() not in EXTENSIONS]
    return Photographs(source, target, place(images, source, target, keep_format), others, unreadable)


def place(images: list[Path], source: Path, target: Path, keep_format: bool) -> list[tuple[Path, Path]]:
    """Images of a folder, each with where its result goes below the folder `target`."""
    if target.exists() and not target.is_dir():
        raise InputError(f"--output {target}: a file, expected a folder")
    names = {path: path.relative_to(source) for path in images}
    kept = {name for name in names.values() if keep_format or name.suffix.lower() in DEEP + PORTABLE}
    changed = [name for name in names.values() if name not in kept]
    results = dict(zip(changed, png_names(changed, taken=kept), strict=True))
    return refuse_clashes([(path, target / results.get(name, name)) for path, name in names.items()], target)


def png_names(names: list[Path], taken: Collection[Path] = frozenset()) -> list[Path]:
    """Where restored images go: a.jpg -> a.png, or a.jpg.png where that is taken or two would share it."""
    pngs = [name.with_suffix(".png") for name in names]
    free = {png for png, number in Counter(pngs).items() if number == 1} - set(taken)
    both = zip(names, pngs, strict=True)
    return [png if png in free else name.with_name(f"{name.name}.png") for name, png in both]


def refuse_clashes(jobs: list[tuple[Path, Path]], target: Path) -> list[tuple[Path, Path]]:
    """The jobs; InputError where one's result would take the place of a photograph, or of another result."""
    inputs = {os.path.realpath(path) for path, _ in jobs}
    places: dict[Path, Path] = {}
    for path, result in jobs:
        if os.path.realpath(result) in inputs:
            raise InputError(f"--output {target}: would overwrite {result}, expected another place")
        if (other := places.setdefault(result, path)) != path:
            raise InputError(f"--output {target}: {other} and {path} would both go to {result}, "
                             "expected another name for one of them")
    return jobs


def restore_photographs(net: BaryIR, photographs: Photographs, strip: int | str, precision: str) -> None:
    """Restore photographs and write each to its place.

    InputError with exit status 3, after all others, where some could not be restored.
    """
    journal, device, failures = photographs.journal, next(net.parameters()).device, []
    others = [f"left out: {path}, no photograph by its name" for path in photographs.others]
    for line in others + photographs.unreadable:
        print(printable(line))
    if journal:
        photographs.target.mkdir(parents=True, exist_ok=True)
        remove_partial(photographs.target, seconds=3600)    # of killed runs, not of one that is at work
    with tqdm(photographs.jobs, desc=f"restoring on {device}", dynamic_ncols=True) as bar:
        for source, target in bar:
            try:
                refuse_place(target)
                photograph = read_photograph(source)
                for remark in photograph.remarks + unwritten(photograph, target):
                    bar.write(printable(f"{source}: {remark}"))
                degraded = torch.from_numpy(photograph.floats()).permute(2, 0, 1)[None].to(device)
                restored = restore(net, degraded, strip, precision)[0].permute(1, 2, 0).cpu().numpy()
                if journal:
                    target.unlink(missing_ok=True)
                    journal.add(source, target)
                write_photograph(photograph, restored, target)
            except InputError as error:
                named = printable(str(source)) in str(error)
                failures.append(str(error) if named else printable(f"{source}: {error}"))
                bar.write(failures[-1])
            except KeyboardInterrupt:
                again = "; the same command goes on where it stopped" if journal else ""
                raise InputError(f"interrupted before {source}{again}", status=130) from None
    report(photographs, failures)


def report(photographs: Photographs, failures: list[str]) -> None:
    """Say how many are restored; InputError with exit status 3 where any photograph or folder is not."""
    restored, total = len(photographs.jobs) - len(failures), len(photographs.jobs) + photographs.done
    where = f", in {photographs.target}" if restored else ""
    earlier = f"; {photographs.done} by an earlier run" if photographs.done else ""
    others, closed = photographs.others, photographs.unreadable
    left_out = f"; {count(len(others), 'file')} left out, no photographs" if others else ""
    print(printable(f"{restored} of {total} images restored{where}{earlier}{left_out}"))
    if failures or closed:
        folders = f", {count(len(closed), 'folder')} not read" if closed else ""
        names = first_few(closed + failures, NAMED)
        raise InputError(f"{len(failures)} of {total} images not restored{folders}: {names}", status=3)


def refuse_place(path: Path) -> None:
    """InputError where no file can have that name: it is a folder's, or too long."""
    try:
        path.lstat()
        if path.is_dir():
            raise InputError(f"{path}: a folder, expected a place for a file")
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:                   # such as no place for any of them
            raise
        raise InputError(f"{path}: {error.strerror}") from None


def read_photograph(path: Path) -> Picture:
    """An image file, with a remark on further frames and on metadata of which Pillow passes over a part."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        photograph = read_picture(path)
    if photograph.frames > 1:
        photograph.remarks.append(f"{photograph.frames} frames, only the first is restored")
    said = any("EXIF" in remark for remark in photograph.remarks)
    if not said and any(warning.category is UserWarning for warning in caught):
        photograph.remarks.append("damaged metadata, which are kept as far as they can be read")
    return photograph


def unwritten(photograph: Picture, path: Path) -> list[str]:
    """What the format of a result cannot hold of a photograph, a remark each."""
    suffix, remarks = path.suffix.lower(), []
    if suffix in OPAQUE and photograph.transparent():
        remarks.append(f"transparency, which {suffix} cannot hold: put on white")
    if suffix not in DEEP and photograph.bits == 16:
        remarks.append(f"16 bits a channel, of which {suffix} gets 8")
    if suffix in (*PORTABLE, ".pbm", ".gif") and photograph.metadata.keys() & {"exif", "icc_profile"}:
        remarks.append(f"EXIF or an ICC profile, which {suffix} cannot hold")
    return remarks


def write_photograph(photograph: Picture, restored: np.ndarray, path: Path) -> None:
    """Write restored pixels [H,W,3] in [0, 1] with a photograph's depth, transparency and metadata.

    The format is that of the path's extension. What it cannot hold is left out, as `unwritten` says;
    InputError where it cannot hold the image at all.
    """
    suffix, alpha, colours = path.suffix.lower(), photograph.alpha, restored.clip(0, 1)
    if photograph.grey:
        colours = colours.mean(axis=2, keepdims=True, dtype=np.float64)
    if alpha is not None and suffix in OPAQUE:
        cover = alpha / (2**photograph.bits - 1)
        colours, alpha = colours * cover + 1 - cover, None
    deep = photograph.bits == 16 and suffix in DEEP
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
    for tag in exif:
        tags[tag] = exif.get_ifd(tag) if tag in DIRECTORIES else exif[tag]
    tags[256], tags[257], tags[258], tags[277] = width, height, (16,) * channels, channels
    tags[259], tags[262] = 1, 2 if channels > 2 else 1      # not compressed; RGB or grey
    tags[273], tags[278], tags[279] = 0, height, pixels.nbytes          # one strip, behind the tags
    if channels in (2, 4):
        tags[338] = 2                                       # alpha, not multiplied into the colours
    if "icc_profile" in metadata:
        tags[34675] = metadata["icc_profile"]
    if "dpi" in metadata:
        (tags[282], tags[283]), tags[296] = metadata["dpi"], 2
    with open(path, "wb") as file:
        tags.save(file)
        file.write(pixels.astype("<u2").tobytes())
