"""Image files, by Pillow: read upright with 8 bits a channel, and written whole or not at all."""

import contextlib
import io
import logging
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from utils.errors import InputError, one_line
from utils.files import write_atomically

EXTENSIONS = frozenset((
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".avif",
    ".heic", ".heif", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx",
))
BITS_PER_SAMPLE, PHOTOMETRIC, PLANAR, EXTRA_SAMPLES, SAMPLE_FORMAT = 258, 262, 284, 338, 339    # TIFF's tags

with contextlib.suppress(ImportError):                      # HEIC needs a package
    import pillow_heif

    pillow_heif.register_heif_opener()
Image.init()                                                # registers all of Pillow's formats
FORMATS = sorted({name for end, name in Image.registered_extensions().items() if end in EXTENSIONS})
warnings.filterwarnings("ignore", module="PIL")             # for developers; too many pixels remain an error
logging.getLogger("PIL").setLevel(logging.CRITICAL)


def read_image(path: Path) -> np.ndarray:
    """A still image as RGB, [H,W,3] uint8, upright; InputError where it is none or cannot be read rightly."""
    image, pixels = decode(path, [])
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:     # MPO: a phone adds a small copy
        raise InputError(f"{path}: {image.n_frames} frames, expected a still image")
    return as_rgb(pixels)


def is_grey(path: Path) -> bool:
    return decode(path, [])[1].shape[2] < 3


def as_rgb(pixels: np.ndarray) -> np.ndarray:
    """[H,W,C] as [H,W,3], without alpha; C as of `decode`."""
    colours = pixels[..., :1 if pixels.shape[2] < 3 else 3]
    return np.ascontiguousarray(np.broadcast_to(colours, (*colours.shape[:2], 3)))


def decode(path: Path, remarks: list[str]) -> tuple[Image.Image, np.ndarray]:
    """Pillow's image of a file and its pixels, [H,W,C] uint8, upright; of several frames the first.

    C is 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha). remarks: takes what a user should know.
    InputError where the file cannot be read, or not rightly.
    """
    content = read_file(path)
    try:
        Image.open(io.BytesIO(content), formats=FORMATS).verify()      # a PNG's checksums; decoding does not
        image = Image.open(io.BytesIO(content), formats=FORMATS)        # other formats run other programs
        bits = bits_stored(image, content)
        if wrong := misread(image, bits):
            raise ValueError(f"{wrong}; expected whole numbers of 8 or 16 bits, interleaved: convert it")
        if bits > 8:
            remarks.append(f"{bits} bits a channel, of which 8 are read")
        image.load()
        picture = to_8_bits(image, bits, remarks)
        if image.format == "PNG" and content[25] == 4:      # grey with alpha, of 16 bits RGBA to Pillow
            picture = picture.convert("LA")
        with contextlib.suppress(Exception):                # damaged EXIF raises nearly anything
            ImageOps.exif_transpose(picture, in_place=True)
        return image, fill_hidden(np.atleast_3d(np.asarray(picture)))
    except UnidentifiedImageError:
        heic = content[4:8] == b"ftyp" and content[8:11] in (b"hei", b"hev", b"mif", b"msf")
        found = "HEIC, which needs a package: pip install pillow-heif" if heic else \
                f"damaged or of no known format, its first bytes are {content[:8]}"
    except Exception as error:                              # broken files raise nearly anything
        found = one_line(error) or type(error).__name__
    raise InputError(f"{path}: cannot be read as an image ({found})")


def read_file(path: Path) -> bytes:
    """A regular file's bytes. A pipe or a device is never opened: reading it might not end."""
    if not path.is_file():
        raise InputError(f"{path}: {'no regular file' if os.path.lexists(path) else 'no such file'}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def bits_stored(image: Image.Image, content: bytes) -> int:
    """Bits a channel of an image that is not decoded yet, by its header."""
    if image.format == "PNG":
        return content[24]
    if image.format == "TIFF":
        return max(image.tag_v2.get(BITS_PER_SAMPLE, (1,)))
    if image.format == "JPEG2000":
        return content[content.index(b"\xff\x4f\xff\x51") + 42] % 128 + 1       # the first component's
    if image.format == "PPM" and isinstance(image.tile[0].args, tuple):
        return image.tile[0].args[1].bit_length()           # of the largest number
    return 16 if image.mode.startswith("I") else 8


def misread(image: Image.Image, bits: int) -> str:
    """What Pillow would read wrongly of an image that is not decoded yet, or nothing."""
    tags = getattr(image, "tag_v2", {})
    planes = tags.get(PLANAR) == 2 and (
        bits > 8 or image.mode not in ("RGB", "RGBA", "CMYK") or 1 in tags.get(EXTRA_SAMPLES, ()))
    return next((what for what, found in {
        "floats": image.mode == "F" or 3 in tags.get(SAMPLE_FORMAT, ()),
        "signed numbers": 2 in tags.get(SAMPLE_FORMAT, ()),
        f"{bits} bits a channel": bits > 16,
        "channels in planes": planes,
        "16 bits of which 0 is white": bits == 16 and tags.get(PHOTOMETRIC) == 0,
        "a transparent colour of 16 bits": bits == 16 and "transparency" in image.info,
    }.items() if found), "")


def to_8_bits(image: Image.Image, bits: int, remarks: list[str]) -> Image.Image:
    """A decoded image, `bits` a channel in its file, as one of mode L, LA, RGB or RGBA."""
    if image.mode.startswith("I"):
        high = 4 if image.format == "TIFF" and bits == 12 else 8        # other formats are scaled to 16 bits
        image = Image.fromarray((np.asarray(image) >> high).astype(np.uint8))
    if image.mode in ("CMYK", "LAB"):
        return to_srgb(image, remarks)
    if image.mode == "L" and "transparency" in image.info:  # a number of the file's, whose pixels are scaled
        image.info["transparency"] *= {2: 85, 4: 17}.get(bits, 1)
    colours = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    return image.convert(colours + "A" * image.has_transparency_data)


def to_srgb(image: Image.Image, remarks: list[str]) -> Image.Image:
    """A CMYK or LAB image as sRGB by its ICC profile, with a remark where it has none that can be used."""
    profile = image.info.get("icc_profile")
    source = ImageCms.createProfile("LAB") if image.mode == "LAB" and not profile else io.BytesIO(profile)
    try:
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        remarks.append(f"{image.mode} without an ICC profile that can be used: its colours are approximate")
        return image.convert("RGB")


def fill_hidden(pixels: np.ndarray) -> np.ndarray:
    """Give fully transparent pixels the mean of the others, or mid-grey where there are none.

    Nobody sees what they hold, but the network would, and it would change what is beside them.
    """
    if pixels.shape[2] in (1, 3) or pixels[..., -1].all():
        return pixels
    pixels, hidden = pixels.copy(), pixels[..., -1] == 0
    pixels[hidden, :-1] = 128 if hidden.all() else pixels[~hidden, :-1].mean(axis=0).round()
    return pixels


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """[0, 1] floats -> 8 bit, rounded to nearest and clipped."""
    return (pixels.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def to_image(pixels: np.ndarray, mode: str = "RGB") -> Image.Image:
    """[H,W,3] floats in [0, 1] -> an image of mode RGB, or of L by the mean over the channels."""
    return Image.fromarray(to_uint8(pixels.clip(0, 1).mean(axis=2) if mode == "L" else pixels))


def format_of(path: Path) -> str:
    """Pillow's name for the format of a file name's extension; InputError where it cannot be written here."""
    name = Image.registered_extensions().get(path.suffix.lower())
    if name not in Image.SAVE:
        raise InputError(f"{path}: this Pillow cannot write {path.suffix}, expected another format")
    return name


def save_image(image: Image.Image, path: Path, **metadata) -> None:
    """Write an image, whole or not at all, in the format of its extension. JPEG and WebP at quality 95.

    InputError where the format cannot hold it: it is too large, ...
    """
    name, content = format_of(path), io.BytesIO()
    quality = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"quality": 95}}.get(name, {})
    try:
        image.save(content, name, **quality, **metadata)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be written as {name} ({one_line(error)})") from None
    write_atomically(path, lambda temporary: Path(temporary).write_bytes(content.getbuffer()))
