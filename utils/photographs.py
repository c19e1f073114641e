"""A user's own photographs: read as viewers show them, written back with their depth, transparency, profile and metadata."""

import csv
import hashlib
import io
import struct
import sys
import warnings
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

from utils.errors import InputError
from utils.files import append_row, write_atomically
from utils.images import (
    EXTENSIONS,
    decoding,
    deep_grey,
    frames,
    is_deep,
    open_header,
    save_image,
    to_rgb8,
    to_uint8,
)

LOSSY = {".jpg", ".jpeg", ".webp", ".gif", ".heic", ".heif", ".avif"}      # come back as PNG, so that nothing is lost again
PHOTOGRAPHS = EXTENSIONS | LOSSY | {".npy"}     # .npy: arrays, for other value ranges and depths


@dataclass
class Photograph:
    """A user's image: `pixels` [H,W,3] float32 in [0, 1] (an array's: as they are), and what is needed to write it back.

    grey: it has one channel. bits: 8 or 16 a channel, 32 for an array. alpha: [H,W] uint8 or uint16. metadata: ICC profile,
    EXIF without orientation, resolution, as Pillow's save takes them. remarks: what a user should know, a line each.
    """

    pixels: np.ndarray
    grey: bool = False
    bits: int = 8
    alpha: np.ndarray | None = None
    metadata: dict = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> "Photograph":
        """InputError where the file is none, is damaged or cannot be decoded here."""
        if path.suffix.lower() == ".npy":
            return cls(read_array(path), bits=32)
        if path.suffix.lower() in (".heic", ".heif"):
            register_heif(path)
        remarks = []
        with warnings.catch_warnings(record=True) as caught:
            photograph = cls._decode(path, remarks)
        photograph.remarks += dict.fromkeys(" ".join(str(warning.message).split()) for warning in caught)      # Pillow's, each once
        return photograph

    @classmethod
    def _decode(cls, path: Path, remarks: list[str]) -> "Photograph":
        with decoding(path), open_header(path) as image:
            if (count := frames(image)) > 1:
                remarks.append(f"{count} frames, only the first is restored")
            deep = deep_colours(path, image) if count == 1 else None
            image.load()
            image = ImageOps.exif_transpose(image)
            metadata = {"icc_profile": image.info["icc_profile"]} if image.info.get("icc_profile") else {}
            dpi = image.info.get("dpi")
            if isinstance(dpi, tuple) and all(0 < float(value) < 1e6 for value in dpi):
                metadata["dpi"] = tuple(map(float, dpi))
            if exif := image.getexif():                                      # orientation already applied and removed
                metadata["exif"] = exif.tobytes()
            if deep is not None:
                channels = deep.shape[2]
                alpha = deep[..., -1] if channels in (2, 4) else None
                colours = deep[..., :channels - (alpha is not None)]
                pixels = np.broadcast_to(colours.astype(np.float32) / 65535, (*deep.shape[:2], 3))
                return cls(np.array(pixels), channels < 3, 16, alpha, metadata, remarks)
            if is_deep(image):
                grey = deep_grey(image).astype(np.float32)
                return cls(np.repeat(grey[..., None], 3, axis=2), True, 16 if image.mode != "F" else 8, None, metadata, remarks)
            if image.mode in ("CMYK", "LAB"):
                image, remark = to_srgb(image, metadata.pop("icc_profile", None))
                remarks += [remark] if remark else []
            transparent = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
            alpha = np.asarray(image.convert("RGBA").getchannel("A")) if transparent else None
            return cls(to_rgb8(image).astype(np.float32) / 255, image.mode in ("L", "LA", "1"), 8, alpha, metadata, remarks)

    def write(self, restored: np.ndarray, path: Path) -> None:
        """Write restored pixels [H,W,3] in [0, 1] with this photograph's depth, transparency and metadata, in the format of the extension.

        An array is written as an array, float32, not clipped.
        """
        if self.bits == 32:
            write_atomically(path, lambda temporary: _save_array(temporary, restored))
            return
        colours = restored.clip(0, 1).mean(axis=2, keepdims=True, dtype=np.float64) if self.grey else restored.clip(0, 1)
        if self.bits == 16 and path.suffix.lower() in (".png", ".tif", ".tiff"):
            deep = (colours * 65535 + 0.5).astype(np.uint16)
            deep = deep if self.alpha is None else np.concatenate([deep, self.alpha[..., None]], axis=2)
            save = save_png16 if path.suffix.lower() == ".png" else save_tiff16
            write_atomically(path, lambda temporary: save(temporary, deep, self.metadata))
            return
        image = Image.fromarray(to_uint8(colours).squeeze(2) if self.grey else to_uint8(colours))
        if self.alpha is not None and path.suffix.lower() not in (".jpg", ".jpeg", ".ppm"):
            image.putalpha(Image.fromarray(self.alpha if self.alpha.dtype == np.uint8 else (self.alpha >> 8).astype(np.uint8)))
        save_image(image, path, **self.metadata)


def require_format(path: Path) -> None:
    """InputError where photographs cannot be written in the format of this name's extension."""
    if path.suffix.lower() in (".heic", ".heif"):
        register_heif(path)
    elif path.suffix.lower() != ".npy" and path.suffix.lower() not in Image.registered_extensions():
        raise InputError(f"{path}: this Pillow cannot write {path.suffix}, expected another format")


def register_heif(path: Path) -> None:
    try:
        import pillow_heif
    except ImportError:
        raise InputError(f"{path}: HEIC needs a package: pip install pillow-heif") from None
    pillow_heif.register_heif_opener()


def to_srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, str]:
    """A CMYK or LAB image as sRGB by its ICC profile, and a remark where it had none that can be used."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile)) if profile else ImageCms.createProfile("LAB") if image.mode == "LAB" else None
        if source:
            return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB"), ""
        reason = "no ICC profile"
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        reason = f"an ICC profile that cannot be used ({error})"
    return image.convert("RGB"), f"{image.mode} with {reason}: its colours are approximate"


def deep_colours(path: Path, image: Image.Image) -> np.ndarray | None:
    """A file with 16 bits a channel in colour or with transparency as [H,W,C] uint16, upright; None for other files.

    Pillow has no such modes: it keeps the high byte of each number. Told that the bytes lie the other way round, it keeps the low one.
    """
    arguments = image.tile[0].args if len(image.tile) else None
    rawmode = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    if rawmode == "LA;16B" and image.format == "PNG":
        return _grey_and_alpha(path)
    if not isinstance(rawmode, str) or rawmode[:-1] not in ("RGB;16", "RGBA;16", "RGBX;16"):
        return None
    other = "B" if rawmode[-1] == "L" or (rawmode[-1] == "N" and sys.byteorder == "little") else "L"
    swapped = rawmode[:-1] + other
    bytes_of = []
    for order in (rawmode, swapped):
        with Image.open(path) as part:
            part.tile = [tile._replace(args=order if isinstance(tile.args, str) else (order, *tile.args[1:])) for tile in part.tile]
            part.load()
            bytes_of.append(np.asarray(ImageOps.exif_transpose(part)).astype(np.uint16))
    return bytes_of[0] << 8 | bytes_of[1]


def _grey_and_alpha(path: Path) -> np.ndarray:
    """[H,W,2] uint16 of a 16-bit PNG of grey and alpha: its four bytes a pixel are read as those of 8-bit RGBA."""
    content = bytearray(path.read_bytes())
    content[24:26] = 8, 6                                       # of the header chunk: bits, colour type
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        high_low = np.asarray(ImageOps.exif_transpose(image)).astype(np.uint16)
    return high_low[..., 0::2] << 8 | high_low[..., 1::2]


def save_png16(path: str, pixels: np.ndarray, metadata: dict) -> None:
    """[H,W,C] uint16 as PNG, C = 1 (grey), 2 (with alpha), 3 (RGB), 4: Pillow writes 16 bits in grey only."""
    height, width, channels = pixels.shape
    rows = pixels.astype(">u2").reshape(height, -1).view(np.uint8)
    up = rows - np.concatenate([np.zeros_like(rows[:1]), rows[:-1]])                         # filter 2: less the row above, modulo 256
    filtered = np.concatenate([np.full((height, 1), 2, np.uint8), up], axis=1)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, (0, 4, 2, 6)[channels - 1], 0, 0, 0))]
    if profile := metadata.get("icc_profile"):
        chunks.append((b"iCCP", b"ICC Profile\0\0" + zlib.compress(profile)))
    if dpi := metadata.get("dpi"):
        chunks.append((b"pHYs", struct.pack(">IIB", *(int(float(value) / 0.0254 + 0.5) for value in dpi), 1)))
    if exif := metadata.get("exif"):
        chunks.append((b"eXIf", exif.removeprefix(b"Exif\0\0")))
    chunks += [(b"IDAT", zlib.compress(filtered, 6)), (b"IEND", b"")]
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, content in chunks:
            file.write(struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content)))


def save_tiff16(path: str, pixels: np.ndarray, metadata: dict) -> None:
    """[H,W,C] uint16 as TIFF with its ICC profile."""
    try:
        import tifffile
    except ImportError:
        raise InputError(f"{path}: 16-bit TIFF needs a package: pip install tifffile") from None
    channels = pixels.shape[2]
    tifffile.imwrite(path, pixels.squeeze(2) if channels == 1 else pixels, photometric="rgb" if channels > 2 else "minisblack", metadata=None,
                     planarconfig=None if channels == 1 else "contig", extrasamples=["unassalpha"] if channels in (2, 4) else None,
                     iccprofile=metadata.get("icc_profile"), resolution=metadata.get("dpi"), resolutionunit=2 if "dpi" in metadata else None)


def read_array(path: Path) -> np.ndarray:
    """A NumPy file of floats [H,W,3] in [0, 1] as float32; InputError if it holds anything else."""
    try:
        array = np.load(path, allow_pickle=False, mmap_mode="r")            # its header may claim what the file does not hold
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:
        raise InputError(f"{path}: cannot be read as an array ({' '.join(str(error).split())})") from None
    if not isinstance(array, np.ndarray) or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape or array.dtype.kind != "f":
        found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "several arrays"
        raise InputError(f"{path}: {found}, expected floats [H,W,3] in [0, 1]")
    array = np.array(array, dtype=np.float32)
    if not np.isfinite(array).all():
        raise InputError(f"{path}: values that are not finite, expected floats [H,W,3] in [0, 1]")
    return array


def _save_array(path: str, array: np.ndarray) -> None:
    with open(path, "wb") as file:                                          # np.save would add an extension to a name
        np.save(file, array.astype(np.float32))


class Journal:
    """restored.csv in the folder of results: from which files and by which weights photographs are restored.

    A row is added just before its result takes its place, so that no interruption leaves a result without a row.
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
                self.done = {tuple(row) for row in csv.reader(file)}        # a row that a killed run left unfinished is equal to none

    def _row(self, source: Path, target: Path) -> tuple[str, ...]:
        stat = source.stat()
        names = (path.relative_to(folder).as_posix() for path, folder in ((source, self.source), (target, self.target)))
        return next(names), str(stat.st_size), str(stat.st_mtime_ns), self.weights, next(names)

    def has(self, source: Path, target: Path) -> bool:
        """Whether a photograph, as it is now, was restored by these weights and its result is there."""
        return target.exists() and self._row(source, target) in self.done

    def add(self, source: Path, target: Path) -> None:
        append_row(self.path, self._row(source, target), before=self.start)
        self.start = ""
