"""Image files: read in one way for training, test sets, data.check and one's own photographs, and written.

Decided here once: what is an image by its name, which way up it is, what becomes of transparency, colour
spaces, 16 bits and floats, and what is refused. Pillow decodes, from bytes; tifffile decodes TIFFs of 16 bits
and of floats, which Pillow cuts to 8 bits or reads wrongly. (At a damaged 16-bit PNG, torchvision crashes.)
"""

import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image, ImageCms, UnidentifiedImageError

from utils.errors import InputError, count
from utils.files import write_atomically

EXTENSIONS = frozenset((
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".avif",
    ".heic", ".heif", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx",
))
# Their formats, in Pillow's words. It knows more, some of which run other programs.
FORMATS = ("PNG", "JPEG", "MPO", "TIFF", "BMP", "WEBP", "GIF", "AVIF", "HEIF", "PPM", "JPEG2000")
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
LZW, ZSTANDARD = 5, 50000       # compressions of TIFFs that tifffile reads only with another package
ORIENTATION, X_RESOLUTION, RESOLUTION_UNIT, EXTRA_SAMPLES, ICC_PROFILE = 274, 282, 296, 338, 34675      # tags
DIRECTORIES = 34665, 34853      # of tags within EXIF: Exif and GPS
# The EXIF tags that describe a photograph: description, make, model, software, date, artist, host, rating,
# Windows' own, copyright. The others say how a file stores its pixels, and the next one has its own way.
DESCRIPTION = {270, 271, 272, 305, 306, 315, 316, 18246, *range(40091, 40096), 33432, *DIRECTORIES}

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
    format: str
    frames: int = 1

    def __post_init__(self) -> None:
        self.metadata = {key: value for key, value in self.metadata.items() if value}

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

    def transparent(self) -> bool:
        """Whether anything is, at least in part."""
        return self.alpha is not None and bool((self.alpha < 2**self.bits - 1).any())

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
    with decoding(path):
        content = read_file(path)
        if path.suffix.lower() in (".heic", ".heif"):
            register_heif(path)
        deep_tiff = read_deep_tiff(content) if content.startswith(TIFF_STARTS) else None
        picture = deep_tiff or read_by_pillow(content)
    if still and picture.frames > 1:
        raise InputError(f"{path}: {picture.frames} frames, expected a still image")
    fill_hidden(picture)
    return picture


@contextmanager
def decoding(path: Path) -> Iterator[None]:
    """Whatever a broken image file raises, as an InputError that names it."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:                              # broken files raise nearly anything
        if isinstance(error, OSError) and error.errno:
            raise InputError(f"{path}: {error.strerror}") from None
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):       # its text names a place in memory
            reason = "no kind of image that is known here, or damaged at its beginning"
        raise InputError(f"{path}: cannot be read as an image ({reason})") from None


def read_file(path: Path) -> bytes:
    """A regular file's bytes. A pipe or a device is never opened: reading it might not end."""
    if not os.path.isfile(path):
        found = "a link that leads to no file" if os.path.islink(path) else "no regular file"
        raise InputError(f"{path}: {found if os.path.lexists(path) else 'no such file'}")
    return path.read_bytes()


def register_heif(path: Path) -> None:
    try:
        import pillow_heif
    except ImportError:
        raise InputError(f"{path}: HEIC needs a package: pip install pillow-heif") from None
    pillow_heif.register_heif_opener()


def open_content(content: bytes) -> Image.Image:
    """Pillow's image, not decoded yet; of a PNG the checksums are verified, which decoding does not."""
    formats = [name for name in FORMATS if name in Image.OPEN]
    image = Image.open(io.BytesIO(content), formats=formats)
    if image.format != "PNG":
        return image
    image.verify()                                          # after which it cannot be decoded
    return Image.open(io.BytesIO(content), formats=formats)


def raw_mode(image: Image.Image) -> str:
    """How a file that is not decoded yet stores its pixels, in Pillow's words: RGB;16B, L;4, ..."""
    arguments = image.tile[0].args if image.tile else ""
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def read_by_pillow(content: bytes) -> Picture:
    """An image file of any format, but for TIFFs that `read_deep_tiff` reads."""
    with open_content(content) as image:
        stored, remarks, name = raw_mode(image), losses(image, content), image.format
        frames = 1 if name == "MPO" else getattr(image, "n_frames", 1)      # a phone adds a small copy
        image.load()
        exif, orientation = describe(lambda: exif_of(image), remarks)
        profile, dpi = image.info.get("icc_profile"), image.info.get("dpi")
        if stored in ("LA;16B", "RGB;16B", "RGBA;16B"):
            pixels = both_bytes(content, stored)
        elif image.mode == "F" or image.mode.startswith("I"):
            pixels = to_uint16(np.asarray(image)[..., None])
        else:
            if image.mode in ("CMYK", "LAB"):
                image, profile = to_srgb(image, profile, remarks), None
            pixels = eight_bits(image)
        if image.mode != "P" and "transparency" in image.info:
            pixels = add_alpha(pixels, image.info["transparency"], stored)
        metadata = {"exif": exif, "icc_profile": profile, "dpi": resolution(dpi)}
        return Picture(upright(pixels, orientation), metadata, remarks, name, frames)


def losses(image: Image.Image, content: bytes) -> list[str]:
    """What a file that is not decoded yet holds and Pillow does not read, a remark each."""
    stored, bits, remarks = raw_mode(image), 8, []
    if image.format == "PPM" and image.mode == "RGB" and isinstance(image.tile[0].args, tuple):
        bits = int(image.tile[0].args[1]).bit_length()      # of the largest number
    elif image.format == "JPEG2000" and image.mode != "I;16":
        bits = (content[content.index(b"\xff\x4f\xff\x51") + 42] & 127) + 1     # in the codestream's header
    elif stored.startswith("CMYK;16"):
        bits = 16
    if bits > 8:
        remarks.append(f"{bits} bits a channel, of which 8 are read")
    if image.format == "TIFF" and 0 in (extra := image.tag_v2.get(EXTRA_SAMPLES, ())):
        remarks.append("a channel without a stated meaning, which is left out")
    elif image.format == "TIFF" and image.mode == "RGBA" and not extra:
        remarks.append("a fourth channel without a stated meaning, which is taken as transparency")
    if image.format == "BMP" and stored == "BGRX":
        start = image.tile[0].offset
        if len(set(content[start + 3:start + 4 * image.width * image.height:4])) > 1:
            remarks.append("a fourth channel, which has no meaning in this format and is left out")
    if image.format == "PNG" and "icc_profile" not in image.info:
        gamma = 1 / 2.2 if "srgb" in image.info else image.info.get("gamma", 1 / 2.2)
        if abs(gamma - 1 / 2.2) > 0.01 or b"cICP" in content[:content.find(b"IDAT")]:
            remarks.append("colours of another gamma or space than sRGB, which are read as sRGB")
    return remarks


def exif_of(image: Image.Image) -> Image.Exif:
    """A decoded image's EXIF block; raises nearly anything where it is damaged."""
    exif = image.getexif()
    if "exif" in image.info and not exif:
        Image.Exif().load(image.info["exif"])               # raises what Pillow passed over when it opened
    return exif


def describe(load: Callable[[], Image.Exif], remarks: list[str]) -> tuple[bytes, int]:
    """What an EXIF block says of a photograph, as a block, and the file's orientation.

    What is damaged is left out, with a remark.
    """
    orientation = 1
    try:
        exif = load()
        orientation = exif.get(ORIENTATION, 1)
        for tag in set(exif) - DESCRIPTION:
            del exif[tag]
        if any(tag in exif and not exif.get_ifd(tag) for tag in DIRECTORIES):
            remarks.append("a damaged EXIF block, of which a part is left out")
        exif.bigtiff = False                                # the block is none, even of a BigTIFF's tags
        return exif.tobytes() if exif else b"", orientation
    except Exception:                                       # a damaged block raises nearly anything in Pillow
        remarks.append("a damaged EXIF block, which is left out")
        return b"", orientation


def resolution(dpi: object) -> tuple[float, ...]:
    """Pixels an inch; () where a file says none, or none that can be meant."""
    known = isinstance(dpi, tuple) and all(0 < float(value) < 1e6 for value in dpi)
    return tuple(map(float, dpi)) if known else ()


def to_srgb(image: Image.Image, profile: bytes | None, remarks: list[str]) -> Image.Image:
    """A CMYK or LAB image as sRGB by its ICC profile, with a remark where it has none that can be used."""
    try:
        lab = ImageCms.createProfile("LAB") if image.mode == "LAB" else None
        if source := ImageCms.ImageCmsProfile(io.BytesIO(profile)) if profile else lab:
            return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        reason = "no ICC profile"
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        reason = f"an ICC profile that cannot be used ({error})"
    remarks.append(f"{image.mode} with {reason}: its colours are approximate")
    return image.convert("RGB")


def eight_bits(image: Image.Image) -> np.ndarray:
    """A decoded image of at most 8 bits a channel as [H,W,C] uint8."""
    colours = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    palette = image.mode == "P" and image.has_transparency_data
    alpha = palette or image.mode in ("LA", "La", "PA", "RGBA", "RGBa")
    pixels = np.asarray(image.convert(colours + "A" * alpha))
    return pixels.reshape(*pixels.shape[:2], -1)


def both_bytes(content: bytes, stored: str) -> np.ndarray:
    """A file of 16 bits a channel for which Pillow has no mode, as [H,W,C] uint16.

    Pillow keeps the high byte of each number; told that the bytes lie the other way round, it keeps the low
    one. A pixel of grey with alpha has four bytes, as one of 8-bit RGBA.
    """
    def numbers(stored: str) -> np.ndarray:
        with open_content(content) as image:
            (tile,) = image.tile
            arguments = stored if isinstance(tile.args, str) else (stored, *tile.args[1:])
            image.tile = [tile._replace(args=arguments)]
            image.load()
            return np.asarray(image).astype(np.uint16)

    if stored == "LA;16B":
        grey_alpha = numbers("RGBA")
        return grey_alpha[..., 0::2] << 8 | grey_alpha[..., 1::2]
    big = stored[-1] == "B" or (stored[-1] == "N" and sys.byteorder == "big")
    return numbers(stored) << 8 | numbers(stored[:-1] + ("L" if big else "B"))


def add_alpha(pixels: np.ndarray, colour: int | tuple, stored: str) -> np.ndarray:
    """Pixels with an alpha channel, where one colour, in the numbers that the file stores, is transparent."""
    full = np.iinfo(pixels.dtype).max
    if bits := {"L;2": 2, "L;4": 4}.get(stored):
        colour = colour % 2**bits * full // (2**bits - 1)
    seen = (pixels != np.atleast_1d(colour)).any(axis=2, keepdims=True)
    return np.concatenate([pixels, seen.astype(pixels.dtype) * full], axis=2)


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
    """A TIFF of 16 bits or of floats in [0, 1], grey or RGB; None for others, which are for Pillow.

    ValueError where neither library reads a file rightly, or where its numbers could mean several things.
    """
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        page, remarks = file.pages[0], []
        if not is_deep(page):
            return None
        exif, orientation = describe(lambda: tiff_tags(file), remarks)
        numbers = tiff_numbers(content, page, orientation)
        if numbers.dtype.kind == "f":
            remarks.append("floats, which are kept with 16 bits")
        pixels = to_uint16(numbers)
        if page.photometric == 0:                           # white is zero
            pixels[..., 0] = 65535 - pixels[..., 0]
        if page.extrasamples == (1,):                       # alpha is multiplied into the colours
            colours = pixels[..., :-1] / np.maximum(pixels[..., -1:], 1) * 65535
            pixels[..., :-1] = (colours + 0.5).clip(0, 65535)
        in_inches = X_RESOLUTION in page.tags and page.tags.valueof(RESOLUTION_UNIT, default=2) in (2, 3)
        dpi = resolution(page.get_resolution(2) if in_inches else None)
        metadata = {"exif": exif, "icc_profile": page.tags.valueof(ICC_PROFILE), "dpi": dpi}
        return Picture(pixels, metadata, remarks, "TIFF", len(file.pages))


def is_deep(page: tifffile.TiffPage) -> bool:
    """Whether a TIFF is for `read_deep_tiff`, not for Pillow; ValueError where it is for neither."""
    colours = {0: 1, 1: 1, 2: 3}.get(page.photometric, 0)   # 0 where it is neither grey nor RGB
    kind, channels = (page.sampleformat, page.bitspersample), page.samplesperpixel
    separate = page.planarconfig == 2 and channels > 1
    if kind in ((1, 1), (1, 2), (1, 4), (1, 8)) and not (separate and colours == 1):
        return False
    if not colours and not separate:
        return False
    described = channels == colours + len(page.extrasamples) and page.extrasamples in ((), (1,), (2,))
    known = kind in ((1, 16), (3, 16), (3, 32), (3, 64)) and page.axes in ("YX", "YXS", "SYX")
    if not (colours and described and known):
        numbers = {1: "integers", 2: "signed integers", 3: "floats"}.get(kind[0], "other numbers")
        raise ValueError(f"a TIFF of {kind[1]}-bit {numbers}, {count(channels, 'channel')}, photometric "
                         f"{int(page.photometric)}; expected grey or RGB of 8 or 16 bits, or of floats")
    if page.imagewidth * page.imagelength > 2 * Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{page.imagewidth}x{page.imagelength} pixels, could be a decompression bomb")
    return True


def tiff_numbers(content: bytes, page: tifffile.TiffPage, orientation: int) -> np.ndarray:
    """The numbers that a TIFF stores, [H,W,C], upright."""
    if page.compression in (LZW, ZSTANDARD):
        if page.sampleformat != 1 or (page.planarconfig == 2 and page.samplesperpixel > 1):
            raise ValueError("a TIFF of floats or of separate planes, compressed by LZW or Zstandard")
        with open_content(content) as image:                # turns a TIFF itself
            stored = raw_mode(image).replace("a", "A")      # the numbers, though alpha may be within them
            return np.asarray(image)[..., None] if image.mode == "I;16" else both_bytes(content, stored)
    if any(map(lambda start, size: start + size > len(content), page.dataoffsets, page.databytecounts)):
        raise ValueError("the file is cut off")
    numbers = page.asarray()
    numbers = np.moveaxis(numbers, 0, -1) if page.axes == "SYX" else numbers
    return upright(numbers.reshape(*numbers.shape[:2], -1), orientation)


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
        raise InputError(f"{path}: cannot be written as {name} ({' '.join(str(error).split())})") from None
