"""Image files: read in one way for training, test sets, data.check and one's own photographs, and written.

Pillow decodes, from bytes; tifffile decodes TIFFs of 16 bits and of floats, which Pillow cuts to 8 bits or
reads wrongly. What neither reads rightly is refused. (At a damaged 16-bit PNG, torchvision crashes.)
"""

import io
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image, ImageCms, UnidentifiedImageError

from utils.errors import InputError, count, one_line
from utils.files import write_atomically

EXTENSIONS = frozenset((
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".avif",
    ".heic", ".heif", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx",
))
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
ORIENTATION, X_RESOLUTION, RESOLUTION_UNIT, ICC_PROFILE = 274, 282, 296, 34675          # tags
DIRECTORIES = 34665, 34853      # of tags within EXIF: Exif and GPS
# The EXIF tags that describe a photograph: description, make, model, software, date, artist, host, rating,
# Windows' own, copyright. The others say how a file stores its pixels, and the next one has its own way.
DESCRIPTION = {270, 271, 272, 305, 306, 315, 316, 18246, *range(40091, 40096), 33432, *DIRECTORIES}
DAMAGED = "damaged EXIF, kept as far as it can be read"

Image.init()                                                # registers all of Pillow's formats
warnings.filterwarnings("ignore", module="PIL")             # for developers; too many pixels remain an error
for library in ("PIL", "tifffile"):
    logging.getLogger(library).setLevel(logging.CRITICAL)


@dataclass
class Picture:
    """A decoded image file, upright; of an animation or of several pages the first.

    pixels: [H,W,C] uint8 or uint16, C = 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha). metadata: exif
    (without orientation), icc_profile, dpi, as Pillow's save takes them. remarks: what a user should know.
    """

    pixels: np.ndarray
    metadata: dict
    remarks: list[str]
    frames: int

    @property
    def grey(self) -> bool:
        return self.pixels.shape[2] < 3

    @property
    def bits(self) -> int:
        """8 or 16 a channel."""
        return 8 * self.pixels.itemsize

    @property
    def colours(self) -> np.ndarray:
        """[H,W,1] or [H,W,3], a view."""
        return self.pixels[..., :1 if self.grey else 3]

    @property
    def alpha(self) -> np.ndarray | None:
        """[H,W,1], a view; None for a file without transparency."""
        return self.pixels[..., -1:] if self.pixels.shape[2] in (2, 4) else None

    def rgb(self) -> np.ndarray:
        """[H,W,3] uint8."""
        colours = to_uint8(self.colours / 65535) if self.bits == 16 else self.colours
        return np.repeat(colours, 3, axis=2) if self.grey else np.ascontiguousarray(colours)

    def floats(self) -> np.ndarray:
        """RGB, [H,W,3] float32 in [0, 1]."""
        colours = self.colours.astype(np.float32) / (2**self.bits - 1)
        return np.repeat(colours, 3, axis=2) if self.grey else colours


def read_image(path: Path) -> np.ndarray:
    """A still image as RGB, [H,W,3] uint8; InputError where it is none or cannot be read."""
    return read_picture(path, still=True).rgb()


def read_picture(path: Path, still: bool = False) -> Picture:
    """An image file and what is needed to write it again.

    InputError where it cannot be read, or not rightly; with `still` also where it has several frames.
    """
    content = read_file(path)
    if path.suffix.lower() in (".heic", ".heif"):
        register_heif(path)
    try:
        deep_tiff = read_deep_tiff(content) if content.startswith(TIFF_STARTS) else None
        picture = deep_tiff or read_by_pillow(content)
    except Exception as error:                              # broken files raise nearly anything
        unknown = isinstance(error, UnidentifiedImageError)             # its text names a place in memory
        reason = "" if unknown else one_line(error)
        raise InputError(f"{path}: cannot be read as an image ({reason or type(error).__name__})") from None
    if still and picture.frames > 1:
        raise InputError(f"{path}: {picture.frames} frames, expected a still image")
    fill_hidden(picture)
    return picture


def read_file(path: Path) -> bytes:
    """A regular file's bytes. A pipe or a device is never opened: reading it might not end."""
    if not os.path.isfile(path):
        found = "a link that leads to no file" if os.path.islink(path) else "no regular file"
        raise InputError(f"{path}: {found if os.path.lexists(path) else 'no such file'}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def register_heif(path: Path) -> None:
    try:
        import pillow_heif
    except ImportError:
        raise InputError(f"{path}: HEIC needs a package: pip install pillow-heif") from None
    pillow_heif.register_heif_opener()


def open_content(content: bytes) -> Image.Image:
    """Pillow's image, not decoded yet; of a PNG the checksums are verified, which decoding does not.

    Only the formats of EXTENSIONS: Pillow knows more, some of which run other programs.
    """
    known = Image.registered_extensions()
    formats = list({known[extension] for extension in EXTENSIONS & known.keys()})
    Image.open(io.BytesIO(content), formats=formats).verify()
    return Image.open(io.BytesIO(content), formats=formats)


def read_by_pillow(content: bytes) -> Picture:
    """An image file of any format, but for TIFFs that `read_deep_tiff` reads."""
    image = open_content(content)
    how = image.tile[0].args if image.tile else ""
    stored = str(how[0] if isinstance(how, tuple) and how else how)     # RGB;16B, L;4, ... in Pillow's words
    remarks = left_out(image, stored, content)
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)      # a phone adds a small copy
    image.load()
    exif, orientation = describe(lambda: exif_of(image), remarks)
    profile, dpi = image.info.get("icc_profile"), image.info.get("dpi")
    key = image.info.pop("transparency", None) if image.mode != "P" else None
    if stored in ("LA;16B", "RGB;16B", "RGBA;16B"):
        pixels = both_bytes(content, stored)
    elif image.mode == "F" or image.mode.startswith("I"):
        pixels = to_uint16(np.asarray(image))
    else:
        if image.mode in ("CMYK", "LAB"):
            image, profile = to_srgb(image, profile, remarks), None
        colours = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
        pixels = np.asarray(image.convert(colours + "A" * image.has_transparency_data))
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    if key is not None:             # one colour that is transparent, in the numbers that the file stores
        seen = (pixels != np.atleast_1d(key) * {"L;2": 85, "L;4": 17}.get(stored, 1)).any(axis=2)
        pixels = np.dstack([pixels, seen.astype(pixels.dtype) * np.iinfo(pixels.dtype).max])
    return Picture(upright(pixels, orientation), as_metadata(exif, profile, dpi), remarks, frames)


def left_out(image: Image.Image, stored: str, content: bytes) -> list[str]:
    """What a file that is not decoded yet holds and Pillow does not read, a remark each."""
    how, fourth = image.tile and image.tile[0].args, stored.startswith("RGBX")
    if image.format == "PPM" and image.mode == "RGB" and isinstance(how, tuple) and how[1] > 255:
        return [f"{how[1].bit_length()} bits a channel, of which 8 are read"]
    if stored == "BGRX":                                    # a BMP, whose fourth channel is mostly empty
        start = image.tile[0].offset + 3
        fourth = len(set(content[start:start + 4 * image.width * image.height:4])) > 1
    return ["a fourth channel without a stated meaning, which is left out"] * fourth


def exif_of(image: Image.Image) -> Image.Exif:
    """A decoded image's EXIF block; raises nearly anything where it is damaged."""
    exif = image.getexif()
    if "exif" in image.info and not exif:
        Image.Exif().load(image.info["exif"])               # raises what Pillow passed over when it opened
    return exif


def describe(load: Callable[[], Image.Exif], remarks: list[str]) -> tuple[bytes, int]:
    """What an EXIF block says of a photograph, as a block, and the file's orientation."""
    block, orientation = b"", 1
    try:
        exif = load()
        orientation = exif.get(ORIENTATION, 1)
        for tag in set(exif) - DESCRIPTION:
            del exif[tag]
        exif.bigtiff = False                                # the block is none, even of a BigTIFF's tags
        block = exif.tobytes() if exif else b""
    except Exception:                                       # a damaged block raises nearly anything in Pillow
        remarks.append(DAMAGED)
    return block, orientation


def as_metadata(exif: bytes, profile: bytes | None, dpi: tuple | None) -> dict:
    """What there is of these, as Pillow's save takes it. A resolution that cannot be meant is left out."""
    known = dpi and all(0 < float(value) < 1e6 for value in dpi)
    entries = {"exif": exif, "icc_profile": profile, "dpi": known and tuple(map(float, dpi))}
    return {key: value for key, value in entries.items() if value}


def to_srgb(image: Image.Image, profile: bytes | None, remarks: list[str]) -> Image.Image:
    """A CMYK or LAB image as sRGB by its ICC profile, with a remark where it has none that can be used."""
    lab = ImageCms.createProfile("LAB") if image.mode == "LAB" else None
    source = io.BytesIO(profile) if profile else lab or io.BytesIO()
    try:
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        remarks.append(f"{image.mode} without an ICC profile that can be used: its colours are approximate")
        return image.convert("RGB")


def both_bytes(content: bytes, stored: str) -> np.ndarray:
    """A PNG of 16 bits a channel for which Pillow has no mode, as [H,W,C] uint16.

    Pillow keeps the high byte of each number; told that the bytes lie the other way round, it keeps the low
    one. A pixel of grey with alpha has four bytes, as one of 8-bit RGBA.
    """
    def numbers(mode: str) -> np.ndarray:
        image = open_content(content)
        image.tile = [image.tile[0]._replace(args=mode)]
        return np.asarray(image).astype(np.uint16)

    if stored == "LA;16B":
        grey_alpha = numbers("RGBA")
        return grey_alpha[..., 0::2] << 8 | grey_alpha[..., 1::2]
    return numbers(stored) << 8 | numbers(stored[:-1] + "L")


def fill_hidden(picture: Picture) -> None:
    """Give fully transparent pixels the mean of the others, or mid-grey where there are none.

    Nobody sees what they hold, but the network would, and it would change what is beside them.
    """
    if picture.alpha is None or picture.alpha.all():
        return
    picture.pixels, hidden = picture.pixels.copy(), picture.alpha[..., 0] == 0
    mean = 2**picture.bits / 2 if hidden.all() else picture.colours[~hidden].mean(axis=0).round()
    picture.colours[hidden] = np.asarray(mean, picture.pixels.dtype)


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """[H,W,C] turned and mirrored as an EXIF orientation, 1 to 8, says; any other means nothing."""
    pixels = pixels.swapaxes(0, 1) if orientation in (5, 6, 7, 8) else pixels
    pixels = pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels
    return np.ascontiguousarray(pixels[::-1] if orientation in (3, 4, 7, 8) else pixels)


def read_deep_tiff(content: bytes) -> Picture | None:
    """A TIFF of 16 bits or of floats in [0, 1], grey or RGB; None for one that Pillow reads as it is.

    Those are TIFFs of 8 bits, and grey ones whose compression tifffile may lack (LZW, Zstandard, ...).
    ValueError where neither library reads a file rightly, or where its numbers could mean several things.
    """
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        page, remarks, tags = file.pages[0], [], file.pages[0].tags
        channels = {0: 1, 1: 1, 2: 3}.get(page.photometric, 0) + len(page.extrasamples)     # grey, grey, RGB
        grey_planes = page.photometric in (0, 1) and page.axes == "SYX"
        if page.dtype in (bool, np.uint8) and not grey_planes:
            return None
        if (page.dtype not in (np.uint16, np.float16, np.float32, np.float64) or page.bitspersample % 16
                or page.axes not in ("YX", "YXS", "SYX") or grey_planes
                or page.samplesperpixel != channels or page.extrasamples not in ((), (1,), (2,))):
            raise ValueError(f"a TIFF of {page.dtype}, {count(page.samplesperpixel, 'channel')}, photometric "
                             f"{int(page.photometric)}; expected grey or RGB of 8 or 16 bits, or of floats")
        compressed = page.compression != tifffile.COMPRESSION.NONE
        if compressed and channels == page.photometric == 1 and page.dtype in (np.uint16, np.float32):
            return None
        if page.imagewidth * page.imagelength > 2 * Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{page.imagewidth}x{page.imagelength} pixels, could be a decompression bomb")
        if any(page.dataoffsets[i] + size > len(content) for i, size in enumerate(page.databytecounts)):
            raise ValueError("the file is cut off")
        numbers = page.asarray()
        numbers = np.moveaxis(numbers, 0, -1) if page.axes == "SYX" else numbers
        pixels = to_uint16(numbers.reshape(*numbers.shape[:2], -1))
        if page.photometric == 0:                           # white is zero
            pixels[..., 0] = 65535 - pixels[..., 0]
        if page.extrasamples == (1,):                       # alpha is multiplied into the colours
            colours = pixels[..., :-1] / np.maximum(pixels[..., -1:], 1) * 65535
            pixels[..., :-1] = (colours + 0.5).clip(0, 65535)
        exif, orientation = describe(lambda: tiff_tags(file), remarks)
        inches = X_RESOLUTION in tags and tags.valueof(RESOLUTION_UNIT, default=2) in (2, 3)
        metadata = as_metadata(exif, tags.valueof(ICC_PROFILE), page.get_resolution(2) if inches else None)
        return Picture(upright(pixels, orientation), metadata, remarks, len(file.pages))


def tiff_tags(file: tifffile.TiffFile) -> Image.Exif:
    """A TIFF's tags as an EXIF block, which has the same form."""
    exif = Image.Exif()
    exif.endian, exif.bigtiff = file.byteorder, file.is_bigtiff
    exif.load_from_fp(file.filehandle, file.pages[0].offset)
    return exif


def to_uint16(numbers: np.ndarray) -> np.ndarray:
    """Integers as they are, floats scaled from [0, 1]; ValueError for other floats."""
    if numbers.dtype.kind != "f":
        return numbers.astype(np.uint16)
    if not np.isfinite(numbers).all():
        raise ValueError("pixels that are infinite or not a number")
    if numbers.min() < 0 or numbers.max() > 1:
        raise ValueError(f"floats from {numbers.min():g} to {numbers.max():g}, expected 0 to 1")
    return (numbers.astype(np.float64) * 65535 + 0.5).astype(np.uint16)


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """[0, 1] floats -> 8 bit, rounded to nearest and clipped."""
    return (pixels.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def to_image(pixels: np.ndarray, mode: str = "RGB") -> Image.Image:
    """[H,W,3] floats in [0, 1] -> an image of mode RGB, or of L by the mean over the channels."""
    return Image.fromarray(to_uint8(pixels.clip(0, 1).mean(axis=2) if mode == "L" else pixels))


def require_format(path: Path) -> str:
    """Pillow's name for the format of a file name's extension; InputError where it cannot be written here."""
    if path.suffix.lower() in (".heic", ".heif"):
        register_heif(path)
    name = Image.registered_extensions().get(path.suffix.lower())
    if name not in Image.SAVE:
        raise InputError(f"{path}: this Pillow cannot write {path.suffix}, expected another format")
    return name


def save_image(image: Image.Image, path: Path, **metadata) -> None:
    """Write an image, whole or not at all, in the format of its extension. JPEG and WebP at quality 95.

    InputError where the format cannot hold it: it is too large, ...
    """
    name = require_format(path)
    quality = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"quality": 95}}.get(name, {})
    try:
        write_atomically(path, lambda temporary: image.save(temporary, format=name, **quality, **metadata))
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno:      # of the file system, not of the format
            raise
        raise InputError(f"{path}: cannot be written as {name} ({one_line(error)})") from None
