"""Image files, by Pillow: read upright with 8 bits a channel, and written whole or not at all."""

import contextlib
import io
import logging
import os
import re
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError

from utils.errors import InputError, one_line
from utils.files import write_atomically

WRITTEN = {"PNG": {}, "JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"quality": 95}}
PNG_START, PNG_XMP = b"\x89PNG\r\n\x1a\n", b"XML:com.adobe.xmp\0"
PNG_NEEDED = (b"tRNS", b"acTL", b"fcTL", b"fdAT", b"iCCP", b"pHYs", b"eXIf")    # by Pillow, but for capitals
BITS_PER_SAMPLE, PHOTOMETRIC, PLANES, SAMPLE_FORMAT = 258, 262, 284, 339        # TIFF's tags

with contextlib.suppress(ImportError):                      # HEIC needs a package
    import pillow_heif

    pillow_heif.register_heif_opener()
Image.init()                                                # registers all of Pillow's formats
Image.MAX_IMAGE_PIXELS = None                               # the limit here is `require_memory`
PngImagePlugin.MAX_TEXT_CHUNK = 2**26                       # a scanner's ICC profile may exceed Pillow's 1 MB
warnings.filterwarnings("ignore", module="PIL")             # for developers
logging.getLogger("PIL").setLevel(logging.CRITICAL)
# Others run other programs, as EPS does.
FORMATS = {*WRITTEN, "TIFF", "BMP", "PPM", "GIF", "AVIF", "HEIF", "JPEG2000"} & Image.OPEN.keys()
# An image's names, .heic without its package, too: it is not passed over in silence.
EXTENSIONS = {end for end, name in Image.registered_extensions().items() if name in FORMATS}
EXTENSIONS |= {".heic", ".heif", ".avif", ".mpo"}


def read_image(path: Path) -> np.ndarray:
    """A still image as RGB, [H,W,3] uint8, upright; InputError where it is none or cannot be read rightly."""
    image, pixels = decode(path, [])
    if (frames := frames_of(image)) > 1:
        raise InputError(f"{path}: {frames} frames, expected a still image")
    return as_rgb(pixels)


def frames_of(image: Image.Image) -> int:
    """How many frames the file of an image has, as of `decode`; 1, too, where those behind it are damaged.

    Nor does the small copy count that phones add to a JPEG (MPO), unlike the other half of a stereo pair.
    """
    with contextlib.suppress(Exception):                    # of a copy: Pillow goes there to count them
        copy = Image.open(io.BytesIO(image.info["content"]))
        if copy.format != "MPO":
            return copy.n_frames
        copy.seek(1)
        return copy.n_frames if copy.size == image.size else 1
    return 1


def as_rgb(pixels: np.ndarray) -> np.ndarray:
    """[H,W,C] as [H,W,3], without alpha; C as of `decode`."""
    colours = pixels[..., :1 if pixels.shape[2] < 3 else 3]
    return np.ascontiguousarray(np.broadcast_to(colours, (*colours.shape[:2], 3)))


def decode(path: Path, remarks: list[str]) -> tuple[Image.Image, np.ndarray]:
    """Pillow's image of a file and its pixels, [H,W,C] uint8, upright; of several frames the first.

    C is 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha). The image's info also has the file's "content"
    and the "chunks" of a PNG that Pillow did not see. remarks: takes what a user should know.
    InputError where the file cannot be read, or not rightly.
    """
    if not os.path.isfile(path):                            # a pipe is never opened: it might not end
        raise InputError(f"{path}: {'no regular file' if os.path.lexists(path) else 'no such file'}")
    try:
        content, chunks = path.read_bytes(), []
        if content.startswith(PNG_START):
            content, chunks = sound_png(content, remarks)
        image = Image.open(io.BytesIO(content), formats=sorted(FORMATS))
        require_memory(image.size, 16)
        if isinstance(xmp := image.info.get("xmp"), str):   # of a TIFF whose tag is text, not bytes
            image.info["xmp"] = xmp.encode("latin-1")
        bits = bits_stored(image, content)
        image = load(image, content, remarks)
        image.info |= {"content": content, "chunks": chunks}
        remarks += [f"{bits} bits a channel, of which 8 are read"] * (bits > 8)
        picture = to_8_bits(image, bits, remarks)
        picture.info = dict(image.info)                         # new ones lack the orientation
        with contextlib.suppress(Exception):                # damaged EXIF raises nearly anything
            ImageOps.exif_transpose(picture, in_place=True)
        return image, fill_hidden(np.atleast_3d(np.asarray(picture)))
    except UnidentifiedImageError:
        found = f"damaged, or of a kind that Pillow does not know: its first bytes are {content[:8]}"
        if re.match(rb"(?s)....ftyp(hei|hev|mif|msf)", content):
            found = "HEIC, which needs a package: pip install pillow-heif"
    except Exception as error:                              # broken files raise nearly anything
        found = getattr(error, "strerror", "") or one_line(error) or type(error).__name__
    raise InputError(f"{path}: cannot be read as an image ({found})")


def sound_png(content: bytes, remarks: list[str]) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """A PNG of the chunks that Pillow needs, and kind and content of its others.

    A wrong checksum costs an ancillary chunk, of another one it is a ValueError. The end mark may be missing.
    """
    parts, others, place = [PNG_START], [], len(PNG_START)
    while place + 8 <= len(content) and content[place + 4:place + 8] != b"IEND":
        end = place + 12 + int.from_bytes(content[place:place + 4])
        kind, body = content[place + 4:place + 8], content[place + 8:end - 4]
        if zlib.crc32(kind + body).to_bytes(4) != content[end - 4:end]:
            if not kind[:1].islower() or kind == b"tRNS":
                raise ValueError(f"cut off, or a wrong checksum of its chunk {kind}")
            remarks.append(f"its chunk {kind} has a wrong checksum and is left out")
        elif kind[:1].isupper() or kind in PNG_NEEDED or body.startswith(PNG_XMP):
            parts.append(content[place:end])
        else:
            others.append((kind, body))
        place = end
    return b"".join([*parts, b"\0\0\0\0IEND\xaeB`\x82"]), others


def load(image: Image.Image, content: bytes, remarks: list[str]) -> Image.Image:
    """The image, decoded; of a JPEG the end mark may be missing, if nothing else is."""
    try:
        image.load()
        return image
    except OSError:
        # Were pixels missing, what follows would be taken for them; of a progressive file whole scans may be.
        ended = [Image.open(io.BytesIO(content.rstrip(b"\xff") + more * 99 + b"\xff\xd9"))
                 for more in (b"", b"\x55", b"\xaa", b"\x1b", b"\xe4") if image.format == "JPEG"]
        if "progressive" in image.info or len({image.tobytes() for image in ended}) != 1:
            raise
    remarks.append("its end mark is missing, but no pixels")
    return ended[0]


def require_memory(size: tuple[int, int], bytes_a_pixel: float) -> None:
    """InputError where an image of that width and height needs more memory than the machine has."""
    needed, there = size[0] * size[1] * bytes_a_pixel / 1e9, float("inf")       # which Windows does not say
    if hasattr(os, "sysconf"):
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    if needed > there:
        raise InputError(f"{size[0]}x{size[1]} pixels, which need at least {needed:.0f} GB of memory, "
                         f"expected at most {there:.0f} GB, as this machine has")


def bits_stored(image: Image.Image, content: bytes) -> int:
    """Bits a channel of an image that is not decoded yet; ValueError where Pillow would read it wrongly."""
    tags = getattr(image, "tag_v2", {})
    bits = image.info.get("bit_depth", 16 if image.mode.startswith("I") else 8)         # which HEIC has
    if image.format == "PNG":
        bits = content[24]
    elif image.format == "TIFF":
        bits = max(tags.get(BITS_PER_SAMPLE, (1,)))
    elif image.format == "JPEG2000":
        bits = content[content.index(b"\xff\x4f\xff\x51") + 42] % 128 + 1       # the first component's
    elif image.format == "AVIF":
        bits = 10 if content[content.index(b"av1C") + 6] & 64 else 8            # or 12
    elif image.format == "PPM" and isinstance(image.tile[0].args, tuple):
        bits = image.tile[0].args[1].bit_length()           # of the largest number
    numbers, planes, light = tags.get(SAMPLE_FORMAT, (1,)), tags.get(PLANES, 1), tags.get(PHOTOMETRIC, 1)
    deep = bits > 8 and (light == 0 or "transparency" in image.info)
    if image.mode == "F" or bits > 16 or set(numbers) != {1} or planes != 1 or deep:
        raise ValueError(
            f"{bits} bits, mode {image.mode}, sample format {numbers[0]}, {planes=}, photometric {light}; "
            "expected unsigned numbers of 8 or 16 bits a channel, in one plane, black at 0: convert it")
    return bits


def to_8_bits(image: Image.Image, bits: int, remarks: list[str]) -> Image.Image:
    """A decoded image, `bits` a channel in its file, as one of mode L, LA, RGB or RGBA; CMYK as sRGB."""
    if image.mode.startswith("I"):                          # other formats than TIFF are scaled to 16 bits
        high = 4 if image.format == "TIFF" and bits == 12 else 8
        return Image.fromarray((np.asarray(image) >> high).astype(np.uint8))
    if image.mode == "CMYK":
        if image.format == "JPEG" and "adobe" not in image.info:
            image = ImageChops.invert(image)                # Pillow takes all for Adobe's, which are inverted
        with contextlib.suppress(ImageCms.PyCMSError, KeyError):
            profile = io.BytesIO(image.info["icc_profile"])
            return ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
        remarks.append("CMYK without an ICC profile that can be used: its colours are approximate")
    if image.mode == "L" and "transparency" in image.info:  # a number of the file's, whose pixels are scaled
        image.info["transparency"] *= {2: 85, 4: 17}.get(bits, 1)
    grey = image.mode in ("1", "L", "LA", "La") or image.format == "PNG" and image.info["content"][25] == 4
    return image.convert(("L" if grey else "RGB") + "A" * image.has_transparency_data)


def fill_hidden(pixels: np.ndarray) -> np.ndarray:
    """Give fully transparent pixels, which nobody sees, the mean of the others: the network sees them."""
    if pixels.shape[2] in (1, 3) or pixels[..., -1].all():
        return pixels
    pixels, hidden = pixels.copy(), pixels[..., -1] == 0
    pixels[hidden, :-1] = 128 if hidden.all() else pixels[~hidden, :-1].mean(axis=0).round()
    return pixels


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """[0, 1] floats -> 8 bit, rounded to nearest and clipped."""
    return (pixels.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """[H,W,3] uint8 -> [3,H,W] float32 in [0, 1]."""
    return torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C")).float() / 255


def to_image(pixels: np.ndarray, mode: str = "RGB") -> Image.Image:
    """[H,W,3] floats in [0, 1] -> an image of mode RGB, or of L by the mean over the channels."""
    return Image.fromarray(to_uint8(pixels.clip(0, 1).mean(axis=2) if mode == "L" else pixels))


def format_of(path: Path) -> str:
    """Pillow's name for the format of a file name's extension; InputError where it is none of WRITTEN."""
    name = Image.registered_extensions().get(path.suffix.lower())
    if name not in WRITTEN:
        raise InputError(f"{path}: expected .png, .jpg or .webp")
    return name


def save_image(image: Image.Image, path: Path, **metadata) -> None:
    """Write an image as its extension says, whole or not at all; InputError where the format is too small."""
    name, content = format_of(path), io.BytesIO()
    try:
        image.save(content, name, **WRITTEN[name], **metadata)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be written as {name} ({one_line(error)})") from None
    write_atomically(path, lambda temporary: Path(temporary).write_bytes(content.getbuffer()))
